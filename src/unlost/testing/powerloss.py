"""A disk that loses power: it records what SQLite writes, and rebuilds what could be left after a power cut.

`kill -9` keeps the page cache, so it says nothing about durability. A `Disk` writes through to the real disk and
notes every write, truncation, deletion and sync. From these notes `materialise` builds the files as they could be
found after a power cut at any moment: each with its content at its last sync, and of what was written later any
part, in any order, torn at the sectors of the disk.

**Guarantee** whatever was acknowledged before the moment `mark()` must be found in `materialise(m, seed)` for every
`m` at or after it and every seed. One missing row is a loss that a real power cut could cause as well.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import apsw

from unlost.sqlite.file import File
from unlost.sqlite.guards import beside
from unlost.sqlite.marks import _ENTRY, Marks

SECTOR_BYTES = 512
_JOURNALS = apsw.SQLITE_OPEN_MAIN_JOURNAL | apsw.SQLITE_OPEN_WAL

Kind = Literal["write", "truncate", "sync", "sync folder", "delete"]
Survival = Literal["nothing", "everything", "some", "torn"]


class Op(NamedTuple):
    """One thing that was asked of the disk. `sync folder` syncs the file and the names in its folder."""

    kind: Kind
    name: str
    at: int = 0
    data: bytes = b""


class Disk(apsw.VFS):  # type: ignore[misc]
    """A SQLite VFS over the real disk, with a log of all that changes it.

    `before`, if set, is called with each `Op` before it is done and may raise (`apsw.FullError`, `apsw.IOError`):
    then it is not done, and SQLite sees that error.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, Disk() as disk:
        ...     file = disk.open(Path(folder) / "live" / "events.db")
        ...     number = file.write_sync(lambda tx: tx.one("select n from unlost_commit")[0])
        ...     acknowledged = disk.mark()
        ...     file.close()
        ...     survivor = disk.materialise(acknowledged, seed=1, folder=Path(folder) / "after")
        ...     again = File(survivor)  # checks itself
        ...     again.read(lambda c: c.execute("select n from unlost_commit").fetchone()[0]) > number
        ...     again.close()
        True
    """

    _count = 0

    def __init__(self) -> None:
        Disk._count += 1
        self.name = f"unlost-powerloss-{os.getpid()}-{Disk._count}"
        self.log: list[Op] = []
        self.before: Callable[[Op], None] | None = None
        self._found: dict[str, bytes] = {}  # content of files that were there before
        super().__init__(self.name, "")

    def __enter__(self) -> Disk:
        return self

    def __exit__(self, *_: object) -> None:
        self.unregister()

    def mark(self) -> int:
        """This moment, as a place in the log."""
        return len(self.log)

    def open(self, path: Path, kind: type[File] = File) -> File:
        """Opens a file of unlost on this disk, its marks included."""
        self._note_found(beside(path, "marks"))
        file = kind(path, vfs=self.name)
        file._marks = RecordedMarks(file._marks, file.marks_path, self)
        return file

    def note(self, op: Op) -> None:
        self.log.append(op)

    def materialise(self, crash_at: int, seed: int, folder: Path, database: str = "events.db") -> Path:
        """Builds what a power cut after the first `crash_at` operations could leave, and returns the database's path.

        The same numbers build the same files.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.survivors(crash_at, seed).items():
            (folder / name).write_bytes(content)
        return folder / database

    def survivors(self, crash_at: int, seed: int) -> dict[str, bytes]:
        """The content of each file that is left."""
        chance = random.Random(seed << 32 | crash_at)
        survival: Survival = chance.choice(("nothing", "everything", "some", "torn"))
        files = {name: _Remembered(content) for name, content in self._found.items()}
        for op in self.log[:crash_at]:
            file = files.setdefault(op.name, _Remembered(None))
            if op.kind == "sync":
                file.settle()
            elif op.kind == "sync folder":
                file.settle()
                for other in files.values():
                    other.settle_name()
            else:
                file.later.append(op)
        left = {name: file.crash(survival, chance) for name, file in sorted(files.items())}
        return {name: bytes(content) for name, content in left.items() if content is not None}

    # --- what SQLite calls -------------------------------------------------------------------------------

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> apsw.VFSFile:
        return _RecordedFile(self, name, flags)

    def xDelete(self, filename: str, syncdir: bool) -> None:
        name = Path(filename).name
        self.ask(Op("delete", name))
        super().xDelete(filename, syncdir)
        self.note(Op("delete", name))
        if syncdir:
            self.note(Op("sync folder", name))

    def ask(self, op: Op) -> None:
        if self.before is not None:
            self.before(op)

    def _note_found(self, path: Path) -> None:
        """A file that is there before anything of it is in the log, has been there for long: it is durable."""
        if path.name in self._found or any(op.name == path.name for op in self.log):
            return
        with contextlib.suppress(FileNotFoundError):
            if content := path.read_bytes():
                self._found[path.name] = content


class _RecordedFile(apsw.VFSFile):  # type: ignore[misc]
    """One open file; the temporary ones have no name and are not recorded."""

    def __init__(self, disk: Disk, name: str | apsw.URIFilename | None, flags: list[int]) -> None:
        path = name.filename() if isinstance(name, apsw.URIFilename) else name
        self._disk = disk
        self._name = Path(path).name if path else ""
        self._new_name = bool(flags[0] & _JOURNALS)  # SQLite syncs the folder with the first sync of a journal
        if path:
            disk._note_found(Path(path))
        super().__init__("", name, flags)

    def xWrite(self, data: Any, offset: int) -> None:
        self._do(Op("write", self._name, offset, bytes(data)), super().xWrite, data, offset)

    def xTruncate(self, newsize: int) -> None:
        self._do(Op("truncate", self._name, newsize), super().xTruncate, newsize)

    def xSync(self, flags: int) -> None:
        kind: Kind = "sync folder" if self._new_name else "sync"
        self._do(Op(kind, self._name), super().xSync, flags)
        self._new_name = False

    def _do(self, op: Op, real: Callable[..., Any], *args: Any) -> None:
        if not self._name:
            real(*args)
            return
        self._disk.ask(op)
        if op.kind in ("sync", "sync folder"):
            real(*args)
            self._disk.note(op)  # a sync has happened when it is over
        else:
            self._disk.note(op)  # a write may have happened as soon as it begins
            real(*args)


class RecordedMarks(Marks):
    """The marks file, which is written beside SQLite."""

    def __init__(self, marks: Marks, path: Path, disk: Disk) -> None:
        self._tag, self._offset = marks._tag, marks._offset
        self._fd, self._unsynced = marks._fd, True
        self._name = path.name
        self._disk = disk
        disk.note(Op("write", self._name, 0, os.pread(self._fd, os.fstat(self._fd).st_size, 0)))

    def write(self, commit: int) -> None:
        self._disk.ask(Op("write", self._name, self._offset))
        super().write(commit)
        entry = os.pread(self._fd, _ENTRY.size, self._offset)
        self._disk.note(Op("write", self._name, self._offset, entry))

    def sync(self) -> None:
        if self._unsynced:
            self._disk.ask(Op("sync", self._name))
            super().sync()
            self._disk.note(Op("sync", self._name))


class _Remembered:
    """A file: what is durable of it, and what was asked later. Content None: there is no such file."""

    __slots__ = ("content", "later")

    def __init__(self, content: bytes | None) -> None:
        self.content = None if content is None else bytearray(content)
        self.later: list[Op] = []

    def settle(self) -> None:
        """A sync: all that was asked is durable."""
        for op in self.later:
            self._apply(op, 0, len(op.data))
        self.later.clear()

    def settle_name(self) -> None:
        """A sync of the folder: deletions are durable, and so is the name of a new file (not its content)."""
        deletions = [i for i, op in enumerate(self.later) if op.kind == "delete"]
        if deletions:
            self.content = None
            del self.later[: deletions[-1] + 1]
        if self.later and self.content is None:
            self.content = bytearray()

    def crash(self, survival: Survival, chance: random.Random) -> bytearray | None:
        for op in self.later:
            for start, end in _surviving(op, survival, chance):
                self._apply(op, start, end)
        return self.content

    def _apply(self, op: Op, start: int, end: int) -> None:
        if op.kind == "delete":
            self.content = None
            return
        if self.content is None:
            self.content = bytearray()
        if op.kind == "truncate":
            del self.content[op.at :]
            self.content.extend(bytes(op.at - len(self.content)))
            return
        missing = op.at + start - len(self.content)
        if missing > 0:
            self.content.extend(bytes(missing))
        self.content[op.at + start : op.at + end] = op.data[start:end]


def _surviving(op: Op, survival: Survival, chance: random.Random) -> Iterator[tuple[int, int]]:
    """Which parts of an operation reached the disk, as ranges of its data."""
    if survival == "nothing":
        return
    if survival == "everything" or op.kind != "write":
        if survival == "everything" or chance.random() < 0.5:
            yield 0, len(op.data)
        return
    if survival == "some":
        if chance.random() < 0.5:
            yield 0, len(op.data)
        return
    start = 0
    while start < len(op.data):
        end = min(len(op.data), start + SECTOR_BYTES - (op.at + start) % SECTOR_BYTES)
        if chance.random() < 0.6:
            yield start, end
        start = end
