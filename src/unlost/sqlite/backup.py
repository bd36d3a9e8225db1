"""A whole copy of the file, made while others write, and put back in its place.

**Guarantee** a file with the name of a backup is whole: it gets that name after it was read through, described (`Manifest`,
a row in it) and fsynced. Restoring never overwrites: the old file is moved aside, whole, before another takes its place.
**After a crash** a backup leaves `PATH.part`, which nothing takes for a backup. A restore leaves the old file in its place, or
the new one; where both are half-way, the marks beside them refuse a start until it is run again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import apsw
import msgspec

from unlost.errors import Damaged, Unavailable, UnlostError, UsageError
from unlost.sqlite import guards
from unlost.sqlite.process import examine
from unlost.sqlite.schema import APPLICATION_ID, FORMAT, POSITION_BITS, POSITION_MAX
from unlost.world import new_id, rfc3339

T = TypeVar("T")
PAGES_PER_STEP = 1024
LOCK_SECONDS_MAX = 5.0
BUSY_MS = 5000
HASHED_NOT = ("unlost_log", "unlost_meta")  # the rows of the log have checksums; the manifest is in the other one
SPACE_LEFT = 4 * 1024 * 1024  # a backup must not take the last of the disk from those who write

Said = Callable[[str, int, int], None]  # what is done, and how far it is: `copying`, 1024 of 9000 pages


class Range(msgspec.Struct, frozen=True, kw_only=True):
    """What the log holds of a partition: from `start` to before `end`."""

    topic: str
    partition: int
    start: int
    end: int


class Table(msgspec.Struct, frozen=True, kw_only=True):
    rows: int
    sha256: str  # of all rows in the order of the table; empty for the log


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a backup holds, written into it."""

    schema: str = "unlost.backup/1"
    time: str
    store: str  # its id
    broker: str | None  # of the store beside another broker, which that is
    commit: int
    format: int
    positions: Sequence[Range]
    tables: Mapping[str, Table]


class Copy:
    """A file that nobody else has open, for reading it through."""

    def __init__(self, path: Path, connection: apsw.Connection) -> None:
        self.path = path
        self.connection = connection

    def read(self, work: Callable[[apsw.Connection], T]) -> T:
        with guards.explained(self.path):
            return work(self.connection)


Check = Callable[[Copy], Sequence[str]]  # reads everything; what is damaged, a line each


# --- making one ------------------------------------------------------------------------------------------


def back_up(source: Path, target: Path, *, now: int, check: Check, said: Said) -> Manifest:
    """Copies an open file of ours as it is at one moment. Nobody who writes has to wait: the copy reads one snapshot, and
    meanwhile the WAL grows.

    Raises:
        UsageError: the target is there already, its folder is not, or it is the file itself. Unavailable: no room.
        Damaged: the file is not what was written; nothing is kept then.
    """
    with _written(target):
        _check_target(source, target)
    with _part(target) as (part, fd):
        with _written(part):
            _check_room(source, part)
            _copy_pages(source, part, said)
            connection = apsw.Connection(str(part), flags=apsw.SQLITE_OPEN_READWRITE)
            try:
                connection.pragma("journal_mode", "delete")  # one file, without a WAL beside it
                connection.pragma("journal_mode", "memory")  # nor anything else: if this is killed, it is thrown away
                said("checking", 0, 0)
                _refuse_damage(check(Copy(part, connection)), source, "nothing was written")
                manifest = describe(connection, now)
                text = msgspec.json.encode(manifest).decode()
                connection.execute("insert or replace into unlost_meta values ('backup', ?)", (text,))
            finally:
                connection.close()
            os.fsync(fd)
        said("naming", 0, 0)
        _name(part, target)
    said("done", 0, 0)
    return manifest


def _check_target(source: Path, target: Path) -> None:
    names = [source.name, *(f"{source.name}-{end}" for end in ("wal", "shm", "journal"))]
    names += [guards.beside(source, kind).name for kind in ("lock", "marks", "run", "index")]
    if (target.parent.resolve() == source.parent and target.name in names) or (
        target.exists() and target.samefile(source)
    ):
        raise UsageError(
            "UL1454", "the backup would be the file itself, or one of those beside it", found=str(target),
            fix="choose another name, best on another disk",
        )  # fmt: skip
    if not target.parent.is_dir():
        raise UsageError(
            "UL1452", f"the folder of the backup is not there: {target.parent}", fix=f"mkdir -p {target.parent}"
        )
    if target.exists() or target.is_symlink():
        raise _exists(target)


def _exists(target: Path) -> UnlostError:
    return UsageError(
        "UL1451", f"{target} is there already, and a backup overwrites nothing", fix="choose another name, or remove it"
    )


@contextlib.contextmanager
def _part(target: Path) -> Iterator[tuple[Path, int]]:
    """`PATH.part`, empty and ours alone; it is gone after the block. One that a killed backup left is used again."""
    part = guards.beside(target, "part")
    with _written(part):
        fd = _own(part, target)
        try:
            os.fchmod(fd, 0o600)
            os.ftruncate(fd, 0)
            yield part, fd
        finally:
            part.unlink(missing_ok=True)
            os.close(fd)


def _own(part: Path, target: Path) -> int:
    """A descriptor of it that holds its lock."""
    while True:
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.fstat(fd)
            if part.exists() and os.path.samestat(part.stat(), ours):
                if ours.st_nlink == 1:
                    return fd
                part.unlink()  # killed after the backup got its name: that file is another's now
        except BlockingIOError:
            os.close(fd)
            raise Unavailable(
                "UL1459", f"another backup to {target} is under way", found=f"{part} is locked",
                fix="let it end, or choose another name",
            ) from None  # fmt: skip
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


@contextlib.contextmanager
def _written(path: Path) -> Iterator[None]:
    """What goes wrong with writing a copy, in our words."""
    try:
        yield
    except (apsw.FullError, apsw.IOError) as e:
        raise Unavailable(
            "UL1453", "the copy could not be written: the disk is full or failing", found=f"{path.parent}: {e}",
            fix="free some space, or choose another disk; nothing was kept",
        ) from e  # fmt: skip
    except apsw.BusyError as e:
        raise Unavailable(
            "UL2002", f"another program holds {path} locked", fix="close it (a database browser, a backup?)"
        ) from e
    except apsw.Error as e:
        raise guards.damaged(path, str(e)) from e
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise Unavailable(
                "UL1453", "the copy could not be written: the disk is full or failing", found=f"{path.parent}: {e.strerror}",
                fix="free some space, or choose another disk; nothing was kept",
            ) from e  # fmt: skip
        raise UsageError(
            "UL1452", f"nothing can be written into {path.parent}", found=str(e),
            fix="choose a folder in which you may write",
        ) from e  # fmt: skip


def _check_room(source: Path, part: Path) -> None:
    wal = source.with_name(f"{source.name}-wal")
    needed = source.stat().st_size + (wal.stat().st_size if wal.exists() else 0) + SPACE_LEFT
    free = shutil.disk_usage(part.parent).free
    if free < needed:
        raise Unavailable(
            "UL1453", "there is no room for the copy", found=f"{free:,} bytes are free in {part.parent}, needed are up to {needed:,}",
            fix="free some space, or choose another disk; nothing was written",
        )  # fmt: skip


def _copy_pages(source: Path, part: Path, said: Said) -> None:
    """Within one read transaction: whoever commits meanwhile neither waits nor makes us begin again."""
    reader = apsw.Connection(str(source), flags=apsw.SQLITE_OPEN_READONLY)
    reader.set_busy_timeout(BUSY_MS)
    writer = apsw.Connection(str(part), flags=apsw.SQLITE_OPEN_READWRITE)
    try:
        writer.pragma("journal_mode", "off")  # a copy that does not come to its end is thrown away
        writer.pragma("synchronous", 0)  # fsynced at its end
        reader.execute("begin")
        reader.execute("select n from unlost_commit").fetchall()  # the snapshot begins here
        with writer.backup("main", reader, "main") as copy:
            while not copy.done:
                copy.step(PAGES_PER_STEP)
                said("copying", copy.page_count - copy.remaining, copy.page_count)
        reader.execute("commit")
    finally:
        writer.close(True)
        reader.close(True)


def _name(part: Path, target: Path) -> None:
    """Gives the copy its name, unless something has it. It is whole before, and fsynced after."""
    with _written(target):
        try:
            os.link(part, target)
        except FileExistsError:
            raise _exists(target) from None
        except OSError as e:
            if e.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            part.rename(target)  # a file system without links
        sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _refuse_damage(lines: Sequence[str], path: Path, end: str) -> None:
    if lines:
        more = f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""
        raise Damaged(
            "UL1456", f"{path} is damaged; {end}", found="; ".join(lines[:3]) + more,
            fix="unlost doctor --verify names the places in a live file; keep the newest good backup",
        )  # fmt: skip


# --- what one holds --------------------------------------------------------------------------------------


def describe(connection: apsw.Connection, now: int) -> Manifest:
    meta = dict(connection.execute("select name, value from unlost_meta").fetchall())
    return Manifest(
        time=rfc3339(now), store=meta["store_id"], broker=meta.get("broker"), format=connection.pragma("user_version"),
        commit=connection.execute("select n from unlost_commit").fetchone()[0], positions=ranges(connection),
        tables=_tables(connection),
    )  # fmt: skip


def ranges(connection: apsw.Connection) -> list[Range]:
    """Of each partition that holds anything."""
    found = []
    for name, first, partitions in connection.execute(
        "select name, first_number, partitions from unlost_topic order by name"
    ).fetchall():
        for partition in range(partitions):
            low = (first + partition) << POSITION_BITS
            bounds = (low, low | POSITION_MAX)
            start = connection.execute("select min(at) from unlost_log where at between ? and ?", bounds).fetchone()[0]
            last = connection.execute("select max(at) from unlost_log where at between ? and ?", bounds).fetchone()[0]
            if start is not None:
                found.append(Range(topic=name, partition=partition, start=start - low, end=last - low + 1))
    return found


def _tables(connection: apsw.Connection) -> dict[str, Table]:
    """All tables, those of the service as well."""
    names = [
        row[0]
        for row in connection.execute(
            "select name from sqlite_schema where type = 'table' and name not like 'sqlite_%' and sql not like 'create virtual%' "
            "order by name"
        ).fetchall()
    ]
    return {name: _table(connection, name) for name in names if name != "unlost_meta"}


def _table(connection: apsw.Connection, name: str) -> Table:
    quoted = '"' + name.replace('"', '""') + '"'
    if name in HASHED_NOT:
        return Table(rows=connection.execute(f"select count(*) from {quoted}").fetchone()[0], sha256="")
    hashed, rows = hashlib.sha256(), 0
    for row in connection.execute(f"select * from {quoted} not indexed"):
        hashed.update(repr(row).encode())
        rows += 1
    return Table(rows=rows, sha256=hashed.hexdigest())


@contextlib.contextmanager
def opened_backup(path: Path) -> Iterator[tuple[Copy, Manifest]]:
    """A backup, open for reading; its medium may be read-only. Only its description was looked at so far.

    Raises:
        UsageError: it is none, or one of a newer release.
    """
    if not path.is_file():
        raise UsageError(
            "UL1455", f"there is no backup at {path}", fix="name the file that unlost store backup has written"
        )
    try:
        uri = f"{path.resolve().as_uri()}?immutable=1"
        connection = apsw.Connection(uri, flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI)
    except apsw.Error as e:
        raise _no_backup(path, str(e)) from e
    try:
        yield Copy(path, connection), _manifest(path, connection)
    finally:
        connection.close(True)


def _manifest(path: Path, connection: apsw.Connection) -> Manifest:
    try:
        if connection.pragma("application_id") != APPLICATION_ID:
            raise _no_backup(path, "it is no file of unlost")
        version = connection.pragma("user_version")
        if version > FORMAT:
            raise UsageError(
                "UL1465", f"{path} was written by a newer release of unlost",
                found=f"file format {version}, this release reads up to {FORMAT}", fix="pip install -U unlost",
            )  # fmt: skip
        row = connection.execute("select value from unlost_meta where name = 'backup'").fetchone()
        if row is None:
            raise _no_backup(path, "it has no description: it is a live file, or a copy that did not come to its end")
        return msgspec.json.decode(row[0], type=Manifest)
    except (apsw.Error, msgspec.MsgspecError, TypeError) as e:
        raise _no_backup(path, str(e)) from e


def _no_backup(path: Path, found: str) -> UnlostError:
    return UsageError(
        "UL1455", f"{path} is no backup, or not a whole one", found=found,
        fix="name a file that unlost store backup has written to its end",
    )  # fmt: skip


def check_backup(copy: Copy, manifest: Manifest, check: Check) -> None:
    """Reads it through, and compares it with its description.

    Raises:
        Damaged: it is not what was written.
    """
    lines = list(check(copy))
    if not lines:
        try:
            lines = copy.read(lambda connection: _differences(connection, manifest))
        except Damaged as e:
            lines = [e.found or e.what]
    _refuse_damage(lines, copy.path, "nothing was changed")


def _differences(connection: apsw.Connection, manifest: Manifest) -> list[str]:
    tables = _tables(connection)
    lines = [
        f"the table {name} is not as it was written"
        for name in sorted(manifest.tables)
        if tables.get(name) != manifest.tables[name]
    ]
    if ranges(connection) != list(manifest.positions):
        lines.append("the log does not hold the positions that it was written with")
    if connection.execute("select n from unlost_commit").fetchone()[0] != manifest.commit:
        lines.append(f"it does not end with commit {manifest.commit}")
    return lines


@contextlib.contextmanager
def opened_anyway(path: Path) -> Iterator[Copy]:
    """A file that cannot be used any more, for reading what is left of it: also where its end is cut off. Writes nothing."""
    with guards.explained(path):
        connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        with guards.explained(path):
            connection.execute("pragma writable_schema = on")  # else SQLite refuses a file that is shorter than it says
        yield Copy(path, connection)
    finally:
        connection.close(True)


# --- putting one back ------------------------------------------------------------------------------------


class Old(NamedTuple):
    """What is in the place now."""

    there: bool
    copy: Copy | None  # None: it is not there, or cannot be read
    why: str  # it cannot be read


@contextlib.contextmanager
def taken(path: Path) -> Iterator[Old]:
    """The place of a file, for the length of the block: nobody has the file open, and nobody can open it.

    Raises:
        UsageError: a process has it open. Unavailable: somebody holds its lock.
    """
    guards.check_place(path)
    lock = guards.open_lock(guards.beside(path, "lock"))
    try:
        guards.lock_within(lock, LOCK_SECONDS_MAX, path)
        _refuse_living(path)
        if not path.exists() or not path.stat().st_size:
            yield Old(path.exists(), None, "")
            return
        connection, why = _open_old(path)
        try:
            yield Old(True, None if connection is None else Copy(path, connection), why)
        finally:
            if connection is not None:
                connection.close(True)
    finally:
        os.close(lock)


def _refuse_living(path: Path) -> None:
    folder = guards.beside(path, "run")
    living = [p.stem for p in sorted(folder.glob("*.process")) if examine(folder, p.stem).alive]
    pids = openers(path)
    if living or pids:
        raise _in_use(path, ", ".join([f"pid {pid}" for pid in pids[:5]] or [f"process {id}" for id in living[:5]]))


def _in_use(path: Path, found: str) -> UnlostError:
    return UsageError(
        "UL1457", f"{path} is in use, and cannot be replaced under those who use it", found=found,
        fix="stop all services and whatever looks at the file, then run it again",
    )  # fmt: skip


def openers(path: Path) -> list[int]:
    """Processes that have the file open, as far as this user may see that (Linux)."""
    found = set()
    names = {str(path.resolve()), f"{path.resolve()}-wal"}
    for fds in Path("/proc").glob("[0-9]*/fd"):
        try:
            if any(os.readlink(fd) in names for fd in fds.iterdir()):  # noqa: PTH115
                found.add(int(fds.parent.name))
        except OSError:
            continue  # it has ended, or belongs to somebody else
    return sorted(found)


def _open_old(path: Path) -> tuple[apsw.Connection | None, str]:
    """The file with its WAL folded in. Where SQLite cannot do that, it is damaged, and kept as it is."""
    connection: apsw.Connection | None = None
    try:
        connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
        guards.persist_wal(connection)
        connection.execute("select n from unlost_commit").fetchone()
        return connection, ""
    except apsw.Error as e:
        if connection is not None:
            connection.close(True)
        return None, str(e)


def put_back(
    path: Path, backup: Copy, old: Old, *, renew: Callable[[apsw.Connection], None], check: Check, now: int, said: Said
) -> Path | None:
    """Puts a copy of the backup into a place that is `taken`; returns where the old file is now, if there was one.

    `renew` makes of the copy what goes on from here; `check` reads the copy before that. Nothing is changed in the place until both are
    durable.
    """
    fresh = guards.beside(path, "restoring")
    try:
        _copy_whole(backup.path, fresh, said)
        connection = apsw.Connection(str(fresh), flags=apsw.SQLITE_OPEN_READWRITE)
        try:
            connection.pragma("journal_mode", "memory")  # if this is killed, it is thrown away
            connection.pragma("synchronous", 2)
            said("checking", 0, 0)
            _refuse_damage(check(Copy(fresh, connection)), fresh, "nothing was changed")
            with _written(fresh):
                connection.execute("begin immediate")
                renew(connection)
                connection.execute("commit")
        finally:
            connection.close(True)
        said("renewed", 0, 0)
        aside = _move_aside(path, old, now, said)
        with _written(path):
            fresh.rename(path)
            sync_folder(path.parent)
        said("placed", 0, 0)
    finally:
        fresh.unlink(missing_ok=True)
    guards.beside(path, "marks").unlink(missing_ok=True)  # last: until then they refuse a start
    sync_folder(path.parent)
    said("done", 0, 0)
    return aside


def _copy_whole(source: Path, target: Path, said: Said) -> None:
    with _written(target):
        _check_room(source, target)
        target.unlink(missing_ok=True)  # of a restore that was killed
        fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as to, source.open("rb") as of:
            total, done = source.stat().st_size, 0
            while part := of.read(1 << 22):
                to.write(part)
                done += len(part)
                said("copying", done, total)
            to.flush()
            os.fsync(fd)


def _move_aside(path: Path, old: Old, now: int, said: Said) -> Path | None:
    """The old file goes into a folder of its own, and what belongs to it. The file first: where it is missing the marks
    refuse a start, and its WAL must never meet the new one. (Moved, not linked: two names of one file would have two WALs.)"""
    if old.copy is not None:
        with guards.explained(path):
            busy = old.copy.connection.execute("pragma wal_checkpoint(truncate)").fetchone()[0]
        old.copy.connection.close(True)
        if busy:
            raise _in_use(path, "somebody reads it")
    wal, marks = path.with_name(f"{path.name}-wal"), guards.beside(path, "marks")
    there = [one for one in (path, wal) if one.exists()]
    if not there:
        return None
    aside = guards.beside(path, f"replaced-{rfc3339(now)[:19].replace(':', '')}-{new_id()[-6:]}")
    with _written(path):
        aside.mkdir(mode=0o700)
        if marks.exists():
            shutil.copy2(marks, aside / marks.name)
        for one in there:
            one.rename(aside / one.name)
            said(f"moved {one.suffix}", 0, 0)
        path.with_name(f"{path.name}-shm").unlink(missing_ok=True)
        sync_folder(aside)
        sync_folder(path.parent)
    said("cleared", 0, 0)
    return aside
