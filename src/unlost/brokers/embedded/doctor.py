"""What can be seen of the embedded broker from outside: its library, its disk, its rights."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import apsw

from unlost.brokers.findings import Examination, Finding, Ours
from unlost.sqlite.guards import NETWORK, SQLITE_MIN, file_system

FREE_BYTES_MIN = 64 * 1024 * 1024
FREE_BYTES_LOW = 1024 * 1024 * 1024


class EmbeddedDoctor:
    def __init__(self, path: Path) -> None:
        self._path = path

    def open(self) -> str:
        return ""

    def close(self) -> None:
        """Nothing was opened."""

    def examine(self, ours: Ours) -> Examination:
        said = Finding(
            severity="note", code="UL4510",
            what="of the embedded broker this release checks the version of SQLite, the file system, the free space, the rights of the file, "
            "and whether the file opens with all that was acknowledged",
            evidence="retention never passes an event that waits: the log is trimmed below the slowest service only",
            fix="unlost audit --verify reads and checks every event",
        )  # fmt: skip
        return Examination(title="embedded", findings=[*library(), *look_at_file(self._path), said])


def library() -> Iterator[Finding]:
    found = tuple(int(part) for part in apsw.sqlite_lib_version().split("."))
    bad = found < SQLITE_MIN
    yield Finding(
        severity="error" if bad else "ok", code="UL4501",
        what="this SQLite can lose committed data (its WAL-reset bug)" if bad else "SQLite is new enough",
        evidence=f"SQLite {apsw.sqlite_lib_version()}, needed is {'.'.join(map(str, SQLITE_MIN))}",
        fix='pip install -U "apsw>=3.51.3"' if bad else "",
    )  # fmt: skip


def look_at_file(path: Path) -> Iterator[Finding]:
    """Where a file of ours stands; it is not opened."""
    kind = file_system(path.parent.resolve())
    remote = kind.startswith(NETWORK)
    yield Finding(
        severity="error" if remote else "ok", code="UL4502",
        what=f"{path} is on a network file system, where SQLite's locks do not work" if remote else f"{path} is on a local disk",
        evidence=f"the file system is {kind}", fix="put the file on a local disk" if remote else "",
    )  # fmt: skip
    yield _space(path)
    yield _rights(path)


def _space(path: Path) -> Finding:
    free = shutil.disk_usage(path.parent).free
    full = free < FREE_BYTES_MIN
    low = free < FREE_BYTES_LOW
    return Finding(
        severity="error" if full else "warning" if low else "ok", code="UL4503",
        what=f"the disk under {path} is {'full' if full else 'nearly full'}: then nothing more is accepted" if low
        else f"there is room under {path}",
        evidence=f"{free / 1e9:.1f} GB are free", fix="free some space" if low else "",
    )  # fmt: skip


def _rights(path: Path) -> Finding:
    mode, folder = stat.S_IMODE(path.stat().st_mode), stat.S_IMODE(path.parent.stat().st_mode)
    others = mode & 0o077
    writers = folder & 0o022 and not folder & stat.S_ISVTX
    return Finding(
        severity="warning" if others or writers else "ok", code="UL4504",
        what=f"other users can reach {path}, with every event in it" if others
        else f"other users can put files into {path.parent}" if writers else f"only its owner can reach {path}",
        evidence=f"the file has {mode:04o}, its folder {folder:04o}",
        fix=f"chmod 600 {path}" if others else f"chmod 700 {path.parent}" if writers else "",
    )  # fmt: skip
