"""What is checked before a file is trusted: each refusal says why, and the way out."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import apsw

from unlost.errors import Damaged, Unavailable, UnlostError, UsageError
from unlost.sqlite.schema import POSITION_BITS, POSITION_MAX
from unlost.sqlite.transaction import LogRow
from unlost.world import REAL

DARWIN = sys.platform == "darwin"
SQLITE_MIN = (3, 51, 3)  # older ones can lose committed pages when the WAL is reset
TAIL_ROWS_CHECKED = 16
QUICK_CHECK_BYTES_MAX = 32 * 1024 * 1024
NETWORK = (
    "nfs",
    "cifs",
    "smb",
    "afs",
    "9p",
    "ceph",
    "gluster",
    "lustre",
    "fuse.sshfs",
    "fuse.s3",
    "davfs",
    "ncpfs",
    "webdav",
)

_MAGIC = b"SQLite format 3\0"
_protected: dict[str, int] = {}
_protecting = threading.Lock()
inherited: set[str] = set()  # files that the parent process had open when it forked


def beside(path: Path, kind: str) -> Path:
    """What belongs to a database file stands beside it, under its whole name: `events.db.lock`, `.marks`, `.run`."""
    return path.with_name(f"{path.name}.{kind}")


def check_place(path: Path) -> Path:
    """The resolved path, if a file may live there with this library."""
    version = tuple(int(part) for part in apsw.sqlite_lib_version().split("."))
    if version < SQLITE_MIN:
        raise UsageError(
            "UL1120", "this SQLite can lose committed data (its WAL-reset bug)",
            found=f"SQLite {apsw.sqlite_lib_version()}, needed is {'.'.join(map(str, SQLITE_MIN))} or newer",
            fix='pip install -U "apsw>=3.51.3"',
        )  # fmt: skip
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = path.resolve()  # through links: the marks belong beside the real file
    except OSError as e:
        raise _no_rights(path, e) from e
    if str(path) in inherited:
        raise after_fork()
    kind = file_system(path.parent)
    if kind.startswith(NETWORK):
        raise UsageError(
            "UL1121", f"{path} is on a network file system, where SQLite's locks and shared memory do not work",
            found=kind, fix="put the file on a local disk (UNLOST_BROKER=embedded:///path/events.db)",
        )  # fmt: skip
    return path


def _check_header(path: Path) -> None:
    """A file that was never ours must not get our lock and marks beside it. (Where it is open in this process, it is
    ours; and closing a second descriptor of it would drop SQLite's locks.)"""
    try:
        if beside(path, "marks").exists():
            return
        with path.open("rb") as f:
            header = f.read(len(_MAGIC))
    except OSError:
        return  # not there, or without rights: opening it says so
    if header and not header.startswith(_MAGIC):
        raise UsageError(
            "UL1111", f"{path} is no SQLite file, and no broker has been beside it", found=repr(header),
            fix="choose another path: unlost makes its own file",
        )  # fmt: skip


def file_system(folder: Path) -> str:
    """The name of the file system that holds a folder, `unknown` where the system does not tell."""
    if DARWIN:
        lines = subprocess.run(["/sbin/mount"], capture_output=True, text=True, check=False).stdout.splitlines()
        mounts = [
            (line.split(" on ", 1)[1].split(" (")[0], line.split(" (")[1].split(",")[0])
            for line in lines
            if " (" in line
        ]
    else:
        try:
            lines = Path("/proc/self/mounts").read_text().splitlines()
        except OSError:
            return "unknown"
        mounts = [
            (re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), f[1]), f[2])
            for f in (line.split() for line in lines)
            if len(f) > 2
        ]
    best, kind = "", "unknown"
    for mount, name in mounts:
        inside = folder == Path(mount) or Path(mount) in folder.parents
        if inside and len(mount) >= len(best):
            best, kind = mount, name
    return kind


def open_lock(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as e:
        raise _no_rights(path, e) from e


def lock_within(fd: int, seconds: float, path: Path) -> None:
    """Takes the write lock, waiting at most `seconds`."""
    end = REAL.monotonic() + seconds
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if REAL.monotonic() > end:
                raise Unavailable(
                    "UL2010", f"another process has held the write lock of {path} for {seconds:g} s",
                    fix="a stopped (SIGSTOP) or hung process of this project? let it go on, or end it",
                ) from None  # fmt: skip
            REAL.pause(0.005)


def make_file(path: Path, marks: list[tuple[str, int]]) -> bool:
    """Makes an empty file unless there is one; True if it did. Holds the write lock."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        size = -1
    except OSError as e:
        raise _no_rights(path, e) from e
    if size <= 0:
        check_new(path, marks, "empty" if size == 0 else "gone")
    try:
        if size < 0:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            ignore = path.parent / ".gitignore"
            if path.parent.name == ".unlost" and not ignore.exists():
                ignore.write_text("*\n")
            return True
        if not os.access(path, os.R_OK | os.W_OK):
            raise PermissionError(13, "no right to read and write it")
    except OSError as e:
        raise _no_rights(path, e) from e
    return size == 0


def check_new(path: Path, marks: list[tuple[str, int]], state: str) -> None:
    """A file may begin anew only where nothing was acknowledged yet."""
    acknowledged = max((commit for _, commit in marks), default=0)
    if acknowledged:
        raise Damaged(
            "UL3001", f"{path} is {state}, but commits up to number {acknowledged} had been acknowledged",
            found=f"the marks in {beside(path, 'marks').name}; was the -wal file deleted?",
            fix=f"bring the file back (a backup?); to start anew on purpose, remove the whole folder {path.parent}",
        )  # fmt: skip


def check_marks(path: Path, marks: list[tuple[str, int]], store_id: str, commits: int) -> None:
    """The database must hold at least what was acknowledged."""
    for tag, commit in marks:
        if tag == store_id[:16] and commit > commits:
            raise Damaged(
                "UL3002", f"{path} holds less than what was acknowledged: its tail is lost",
                found=f"the file ends with commit {commits}, commit {commit} had been acknowledged ({commit - commits} are missing)",
                fix="was the -wal file deleted, or an older copy put back? Bring the newest copy back. "
                f"To go on with the loss, remove {beside(path, 'marks').name}: publishers and services then "
                "have to be told what is missing",
            )  # fmt: skip
        if tag != store_id[:16]:
            raise Damaged(
                "UL3003", f"{path} is another file than the one whose commits were acknowledged here",
                found=f"store {store_id[:16]}, the marks are of {tag}",
                fix=f"bring the right file back; to use this one on purpose, remove {beside(path, 'marks').name}",
            )  # fmt: skip


def check_tail(path: Path, connection: apsw.Connection, *, thorough: bool) -> None:
    """The last rows of each partition must be whole and without a gap; after a crash, a small file is read through."""
    pages = connection.pragma("page_count")
    if thorough and pages * connection.pragma("page_size") <= QUICK_CHECK_BYTES_MAX:
        found = connection.execute("pragma quick_check(1)").fetchone()[0]
        if found != "ok":
            raise damaged(path, str(found))
    topics = connection.execute("select first_number, partitions, name from unlost_topic").fetchall()
    for first, partitions, name in topics:
        for number in range(first, first + partitions):
            check_rows(path, tail_rows(connection, number, TAIL_ROWS_CHECKED), f"{name}/{number - first}")


def tail_rows(connection: apsw.Connection, number: int, limit: int) -> list[LogRow]:
    low = number << POSITION_BITS
    rows = connection.execute(
        "select at, head, key, data, recorded, digest, crc from unlost_log "
        "where at between ? and ? order by at desc limit ?",
        (low, low | POSITION_MAX, limit),
    )
    return [LogRow(*row) for row in rows][::-1]


def check_rows(path: Path, rows: list[LogRow], where: str) -> None:
    """Consecutive rows of one partition: checksums, positions without a gap, and the chain of digests."""
    before: LogRow | None = None
    for row in rows:
        if not row.intact():
            raise damaged(path, f"the event at {where}:{row.position} does not match its checksum")
        if before is not None and row.position != before.position + 1:
            raise damaged(path, f"after {where}:{before.position} comes {row.position}: events are missing between")
        before = row


def persist_wal(connection: apsw.Connection) -> None:
    """So that our closing never unlinks a WAL that somebody else may still use."""
    flag = ctypes.c_int(1)
    connection.file_control("main", apsw.SQLITE_FCNTL_PERSIST_WAL, ctypes.addressof(flag))


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns SQLite's errors into ours; none of them leaves this room."""
    try:
        yield
    except (apsw.NotADBError, apsw.CorruptError, apsw.SQLError) as e:
        raise damaged(path, str(e)) from e
    except apsw.BusyError as e:
        raise Unavailable(
            "UL2002", f"another program holds {path} locked", fix="close it (a database browser, a backup?)"
        ) from e
    except (apsw.CantOpenError, apsw.ReadOnlyError, apsw.PermissionsError) as e:
        raise _no_rights(path, e) from e
    except apsw.FullError as e:
        raise _full(path) from e
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(path) from e
        raise _no_rights(path, e) from e
    except apsw.IOError as e:
        raise Unavailable(
            "UL2003", f"the disk failed under {path}", found=str(e), fix="check the disk, then start again"
        ) from e


def protect(path: Path) -> None:
    """From now on Python's own sqlite3 may not open this file in this process: two libraries would corrupt it.

    Whoever is the first one here looks at the file; no other thread can open it between his look and his protection.
    """
    with _protecting:
        _install_hook()
        if str(path) not in _protected:
            foreign = _opened_by_another_library(path)
            if foreign:
                raise second_library(path, foreign)
            _check_header(path)
        _protected[str(path)] = _protected.get(str(path), 0) + 1


def unprotect(path: Path) -> None:
    with _protecting:
        left = _protected.get(str(path), 0) - 1
        if left > 0:
            _protected[str(path)] = left
        else:
            _protected.pop(str(path), None)


def after_fork() -> UnlostError:
    """SQLite believes in the child that it holds the parent's locks: not even a new connection is safe there."""
    return UsageError(
        "UL1113", "this file was opened before a fork and cannot be used after it",
        fix="create the App in the child process only (use the spawn or forkserver start method)",
    )  # fmt: skip


def second_library(path: Path, found: str) -> UnlostError:
    return UsageError(
        "UL1122", f"a second SQLite library uses {path} in this process: together they can destroy it", found=found,
        fix="reach your tables through `ctx.transaction()`, or look at the file from another process",
    )  # fmt: skip


_hook_installed = False


def _install_hook() -> None:
    global _hook_installed
    if _hook_installed:
        return
    _hook_installed = True

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event == "sqlite3.connect" and _protected and isinstance(args[0], str | bytes | os.PathLike):
            name = os.fsdecode(args[0])
            if name.startswith("file:"):
                parts = urlsplit(name)
                name = unquote(parts.path)
            for path in tuple(_protected):
                with contextlib.suppress(OSError, ValueError):
                    if Path(name).samefile(path):
                        raise second_library(Path(path), "sqlite3.connect()")

    sys.addaudithook(hook)


def _opened_by_another_library(path: Path) -> str:
    """How this process already holds the file open, though we do not."""
    if not Path("/proc/self/fd").is_dir():
        return ""
    for fd in Path("/proc/self/fd").iterdir():
        try:
            if fd.readlink() == path:
                return f"file descriptor {fd.name} is open on it"
        except OSError:
            continue  # closed meanwhile
    return ""


def _no_rights(path: Path, e: Exception) -> UnlostError:
    return UsageError(
        "UL1123", f"{path} cannot be opened for reading and writing", found=str(e),
        fix="check the owner and the rights of the file and its folder, or set UNLOST_BROKER to another path",
    )  # fmt: skip


def _full(path: Path) -> UnlostError:
    return Unavailable("UL2001", "the disk is full", found=str(path.parent), fix="free some space, then start again")


def damaged(path: Path, found: str) -> UnlostError:
    return Damaged(
        "UL3004", f"{path} is damaged", found=found,
        fix="stop all processes, keep a copy of the folder, and restore the newest good copy",
    )  # fmt: skip
