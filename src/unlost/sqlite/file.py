"""One SQLite file: opened with care, written by one thread in groups, watched by a doorbell.

**Guarantee** an operation is reported as done only after the commit that holds it has been fsynced
(WAL, `synchronous=FULL`) and the marks file says so. Many operations share one fsync.
**After a crash** either the whole commit is there or none of it; nobody was told of one that is not.

Why apsw and a private file: two SQLite libraries on one file in one process undo each other's locks and can
unlink a live WAL (sqlite.org/howtocorrupt.html §2.2.1), and the library must be 3.51.3 or newer (WAL-reset bug).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import fcntl
import os
import queue
import socket
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import apsw

from unlost.errors import Bug, Damaged, OutcomeUnknown, Unavailable, UnlostError, UsageError
from unlost.sqlite import guards, process
from unlost.sqlite.bell import Bell
from unlost.sqlite.marks import Marks, read_marks
from unlost.sqlite.schema import APPLICATION_ID, FORMAT, LATER, TABLES
from unlost.sqlite.transaction import Transaction
from unlost.sqlite.turn import Block, Guard, Ruined, Turn
from unlost.world import REAL, World, boot_id, new_id

T = TypeVar("T")

GROUP_MAX = 4096  # operations in one commit
OPEN_SECONDS_MAX = 10.0  # how long opening waits for another process that holds the write lock
BUSY_MS = 5000
GOODBYE_SECONDS = 2.0
_HOUSEKEEPING_SECONDS = 1.0
_STOP = object()
_ANY = (OSError, apsw.Error)
_FATAL = (
    apsw.FullError,
    apsw.IOError,
    apsw.CorruptError,
    apsw.NotADBError,
    apsw.ReadOnlyError,
    apsw.BusyError,
)

_open_files: weakref.WeakSet[File] = weakref.WeakSet()


class _Operation:
    __slots__ = ("error", "future", "loop", "result", "work")

    def __init__(
        self,
        work: Callable[[Transaction], Any],
        future: asyncio.Future[Any] | concurrent.futures.Future[Any],
        loop: asyncio.AbstractEventLoop | None,
    ) -> None:
        self.work = work
        self.future = future
        self.loop = loop
        self.result: Any = None
        self.error: BaseException | None = None


class File:
    """An open file. All writing goes through `write`, all reading through `read`."""

    def __init__(self, path: Path, *, world: World = REAL, vfs: str = "", check_tail: bool = True) -> None:
        """Opens the file, or makes it.

        Raises:
            UsageError: not a file of unlost, or one of a newer release; a network file system; no rights.
            Damaged: the file is damaged, or holds less than what was acknowledged.
            Unavailable: another program holds it locked.
        """
        self.path = guards.check_place(path)
        self.world = world
        self.vfs = vfs
        self.run_folder = guards.beside(self.path, "run")
        self.marks_path = guards.beside(self.path, "marks")
        self.process_id = new_id()
        self.store_id = ""
        self.created = False
        self.broken: UnlostError | None = None
        self.on_broken: Callable[[UnlostError], None] | None = None
        self._pid = os.getpid()
        self._listeners: set[Callable[[], None]] = set()
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._read_lock = threading.RLock()
        self._closed = False
        self.guard = Guard()
        self._submitting = threading.Lock()
        self._lock_fd = -1
        self._connections: list[apsw.Connection] = []
        guards.protect(self.path)  # before it is open: another thread may be opening it as well
        try:
            self._lock_fd = guards.open_lock(guards.beside(self.path, "lock"))
            self._open(check_tail)
        except BaseException:  # a refused file is let go at once, or the next attempt would find it in use
            for connection in self._connections:
                connection.close(True)
            if self._lock_fd >= 0:
                os.close(self._lock_fd)
            guards.unprotect(self.path)
            raise
        self._bell = Bell(self.path, self.process_id)
        self._thread = threading.Thread(target=self._write_loop, name="unlost-writer", daemon=True)
        self._thread.start()
        _open_files.add(self)

    # --- opening -----------------------------------------------------------------------------------------

    def _open(self, check_tail: bool) -> None:
        guards.lock_within(self._lock_fd, OPEN_SECONDS_MAX, self.path)
        try:
            with guards.explained(self.path):
                self.run_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                marks = read_marks(self.marks_path)
                self.created = guards.make_file(self.path, marks)
                self._writer = self._connect()
                self._writer.authorizer = self.guard
                self._reader = self._connect()
                self._tx = Transaction(self._writer, self.world)
                self._prepare(marks)
                guards.check_marks(self.path, marks, self.store_id, self._commits)
                if check_tail:  # an audit must be able to look at what is wrong
                    guards.check_tail(self.path, self._writer, thorough=self._died())
                self._register()
        finally:
            fcntl.flock(self._lock_fd, fcntl.LOCK_UN)

    def _connect(self) -> apsw.Connection:
        flags = apsw.SQLITE_OPEN_READWRITE
        connection = apsw.Connection(str(self.path), flags=flags, vfs=self.vfs or None)
        self._connections.append(connection)
        connection.set_busy_timeout(BUSY_MS)
        wanted = {"journal_mode": "wal", "synchronous": 2, "mmap_size": 0, "cell_size_check": 1}
        if guards.DARWIN:
            wanted |= {"fullfsync": 1, "checkpoint_fullfsync": 1}
        for name, value in wanted.items():
            connection.pragma(name, value)
            if connection.pragma(name) not in (value, None):
                raise UsageError(
                    "UL1110", f"SQLite did not take {name}={value}", found=str(connection.pragma(name)),
                    fix='pip install --force-reinstall "apsw>=3.51.3"',
                )  # fmt: skip
        connection.pragma("wal_autocheckpoint", 4000)
        guards.persist_wal(connection)
        return connection

    def _prepare(self, marks: list[tuple[str, int]]) -> None:
        """Checks the format of an old file, or writes the tables of a new one."""
        application, version = self._writer.pragma("application_id"), self._writer.pragma("user_version")
        if self.created or (application == 0 and version == 0 and not self._has_tables()):
            guards.check_new(self.path, marks, "empty")
            self._writer.execute("begin immediate")
            self._writer.execute(TABLES)
            self._writer.execute("insert into unlost_commit values (0)")
            self._writer.execute(
                "insert into unlost_meta values ('store_id', ?), ('created', ?)",
                (new_id(), str(self.world.now())),
            )
            self._writer.pragma("application_id", APPLICATION_ID)
            self._writer.pragma("user_version", FORMAT)
            self._writer.execute("commit")
        elif application != APPLICATION_ID:
            raise UsageError(
                "UL1111", f"{self.path} is a SQLite file, but not one of unlost",
                fix="choose another path; your own tables go into the file that unlost makes",
            )  # fmt: skip
        elif version > FORMAT:
            raise UsageError(
                "UL1112", f"{self.path} was written by a newer release of unlost",
                found=f"file format {version}, this release reads up to {FORMAT}", fix="pip install -U unlost",
            )  # fmt: skip
        elif version < FORMAT:
            self._writer.execute("begin immediate")
            for later in range(version + 1, FORMAT + 1):
                self._writer.execute(LATER[later])
            self._writer.pragma("user_version", FORMAT)
            self._writer.execute("commit")
        self.store_id = self._writer.execute("select value from unlost_meta where name = 'store_id'").get
        self._commits: int = self._writer.execute("select n from unlost_commit").get
        if not isinstance(self.store_id, str) or not isinstance(self._commits, int):
            raise guards.damaged(self.path, "its id or its number of commits is gone")

    def _has_tables(self) -> bool:
        return bool(self._writer.execute("select count(*) from sqlite_schema").fetchone()[0])

    def _died(self) -> bool:
        """Whether a process that had this file open ended without closing it."""
        known = self._writer.execute("select id from unlost_process").fetchall()
        return any(not process.examine(self.run_folder, row[0]).alive for row in known)

    def _register(self) -> None:
        """Takes a place among the processes of this file. Holds the write lock, so no other does so now."""
        execute = self._writer.execute
        execute("begin immediate")
        rows = execute("select id, slot from unlost_process").fetchall()
        dead = [id for id, _ in rows if not process.examine(self.run_folder, id).alive]
        execute("delete from unlost_process where id in (%s)" % ",".join("?" * len(dead)), dead)  # noqa: UP031
        taken = {slot for id, slot in rows if id not in set(dead)}
        slot = next(n for n in range(len(taken) + 1) if n not in taken)
        execute(
            "insert into unlost_process values (?, ?, ?, ?, ?, ?)",
            (self.process_id, slot, os.getpid(), socket.gethostname(), boot_id(), self.world.now()),
        )
        owners = {r[0] for r in execute("select distinct owner from unlost_progress where owner is not null")}
        process.sweep(self.run_folder, keep=owners)
        self.process_file = process.ProcessFile(self.run_folder, self.process_id)
        self._commits += 1
        execute("update unlost_commit set n = ?", (self._commits,))
        execute("commit")
        self._marks = Marks(self.marks_path, self.store_id, slot)
        self._marks.write(self._commits)

    # --- using -------------------------------------------------------------------------------------------

    async def write(self, work: Callable[[Transaction], T]) -> T:
        """Runs `work` in the next group commit and returns its result when that is durable.

        `work` may raise an `UnlostError` before it has written anything; then only this call fails.
        """
        return await self.submit(work)

    def submit(self, work: Callable[[Transaction], T]) -> asyncio.Future[T]:
        """The same, without waiting: the future of the running event loop gets the result."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._submit(_Operation(work, future, loop))
        return future

    def write_sync(self, work: Callable[[Transaction], T], timeout: float | None = 60.0) -> T:
        """The same for a thread without an event loop."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._submit(_Operation(work, future, None))
        try:
            return future.result(timeout)
        except TimeoutError:
            raise OutcomeUnknown("UL2007", f"no commit within {timeout} s", fix="look before you do it again") from None

    def submit_block(self, block: Block) -> None:
        self._submit(block)

    def read(self, work: Callable[[apsw.Connection], T]) -> T:
        """Runs `work` on a consistent snapshot; a read inside of a read sees the same one. Keep it short: a long reader
        keeps the WAL from shrinking."""
        self._check_usable()
        with self._read_lock, guards.explained(self.path):
            if self._reader.in_transaction:
                return work(self._reader)
            self._reader.execute("begin")
            try:
                return work(self._reader)
            finally:
                self._reader.execute("commit")

    def listen(self, listener: Callable[[], None]) -> None:
        """`listener` is called, from any thread, after a commit of this process that added events."""
        self._listeners.add(listener)

    def unlisten(self, listener: Callable[[], None]) -> None:
        self._listeners.discard(listener)

    @property
    def bell(self) -> Bell:
        return self._bell

    def close(self) -> None:
        """Finishes what is queued and leaves. Harmless when called twice."""
        if self._closed or os.getpid() != self._pid:
            return
        with contextlib.suppress(UnlostError):  # then the next start finds the row, and takes us for dead
            self.write_sync(self._sign_off, timeout=GOODBYE_SECONDS)
        with self._submitting:
            self._closed = True
            self._queue.put(_STOP)
        self._thread.join()
        self.process_file.close(keep=self.broken is not None)
        self._bell.close()
        with self._read_lock, contextlib.suppress(*(_ANY if self.broken is not None else ())):
            self._marks.close()
        for connection in self._connections:
            connection.close(self.broken is not None)
        os.close(self._lock_fd)
        guards.unprotect(self.path)
        _open_files.discard(self)

    def _sign_off(self, tx: Transaction) -> None:
        tx.execute("delete from unlost_process where id = ?", (self.process_id,))

    def _submit(self, item: _Operation | Block) -> None:
        with self._submitting:  # nothing is queued behind the end of the writer
            self._check_usable()
            self._queue.put(item)

    def _check_usable(self) -> None:
        if os.getpid() != self._pid:
            raise guards.after_fork()
        if self._closed:
            raise UsageError("UL1114", "this broker is closed", fix="use it inside `async with app:`")
        if self.broken is not None:
            raise self.broken.with_traceback(None)  # else it would keep the frames of everybody who was told

    # --- the writer thread -------------------------------------------------------------------------------

    def _write_loop(self) -> None:
        stop = False
        while not stop:
            try:
                group = [self._queue.get(timeout=_HOUSEKEEPING_SECONDS)]
            except queue.Empty:
                group = []
            try:
                while len(group) < GROUP_MAX:
                    group.append(self._queue.get_nowait())
            except queue.Empty:
                pass  # that was all
            stop = any(item is _STOP for item in group)
            group = [item for item in group if item is not _STOP]
            try:
                if group:
                    self._commit(group)
                self._keep_house()
            except BaseException as e:  # a bug of ours: the file stops, and nobody waits for ever
                self._broke(Bug("UL9002", "the writer of the file failed", found=f"{type(e).__name__}: {e}"))
                _tell(group, self.broken)

    def _keep_house(self) -> None:
        now = REAL.monotonic()
        if now - getattr(self, "_kept", 0.0) >= _HOUSEKEEPING_SECONDS:
            self._kept = now
            self.process_file.beat()
            try:
                self._marks.sync()
            except OSError as e:
                self._failed(e)

    def _commit(self, group: list[Any]) -> None:
        """One group: lock, begin, every operation, commit, mark, unlock, and only then tell everybody."""
        tx, error = self._tx, None
        fcntl.flock(self._lock_fd, fcntl.LOCK_EX)
        try:
            if self.broken is not None:
                raise self.broken
            self._writer.execute("begin immediate")
            tx.begin()
            for part in _parts(group):
                if isinstance(part[0], Block):
                    Turn(part, tx, self.guard).run()
                else:
                    self._run_operations(part)
            tx.flush()
            self._commits = tx.one("update unlost_commit set n = n + 1 returning n")[0]
            self._writer.execute("commit")
            self._marks.write(self._commits)
        except BaseException as e:
            error = self._failed(e)
        finally:
            fcntl.flock(self._lock_fd, fcntl.LOCK_UN)
        news = tx.news and error is None
        if isinstance(error, Ruined):  # a block did it: its neighbours must not pay for that
            _tell([item for item in group if isinstance(item, Block)], error)
            if others := [item for item in group if not isinstance(item, Block)]:
                self._commit(others)
            return
        if news:  # the others first: they can begin while our own are told
            self._bell.ring()
        _tell(group, error)
        if news:
            for listener in tuple(self._listeners):
                listener()

    def _run_operations(self, part: Sequence[_Operation]) -> None:
        """Runs them under one savepoint; if one of them fails half-way, each again under its own."""
        tx = self._tx
        saved = tx.savepoint()
        try:
            for op in part:
                self._run_one(op)
            tx.release()
            return
        except _FATAL:
            raise
        except Exception:
            tx.rollback_to(saved)
        for op in part:
            saved = tx.savepoint()
            op.error = None
            try:
                op.result = op.work(tx)
                tx.release()
            except _FATAL:
                raise
            except Exception as e:
                op.error = e
                tx.rollback_to(saved)

    def _run_one(self, op: _Operation) -> None:
        before = self._tx.changes()
        op.error = None
        try:
            op.result = op.work(self._tx)
        except UnlostError as e:
            if self._tx.changes() != before:
                raise
            op.error = e  # refused before it wrote anything: the others go on

    def _failed(self, e: BaseException) -> BaseException:
        """Rolls back and sorts the error: what may the callers believe?"""
        self._tx.forget()
        try:
            if self._writer.in_transaction:
                self._writer.execute("rollback")
        except apsw.Error as failed:
            e = failed  # not even a rollback: nobody knows
        if isinstance(e, apsw.FullError):
            return Unavailable(
                "UL2001", "the disk is full; nothing was accepted", found=str(self.path.parent),
                fix="free some space; unlost goes on by itself",
            )  # fmt: skip
        if isinstance(e, apsw.BusyError):
            return Unavailable(
                "UL2002",
                f"another program holds {self.path} locked",
                fix="close it (a database browser, a backup?)",
            )
        if isinstance(e, (apsw.IOError, apsw.CorruptError, apsw.NotADBError, apsw.ReadOnlyError, OSError)):
            kind: type[UnlostError] = OutcomeUnknown
            if isinstance(e, (apsw.CorruptError, apsw.NotADBError)):
                kind = Damaged
            return self._broke(kind(
                "UL2003", f"the disk failed under {self.path}; this process must stop and start again",
                found=f"{type(e).__name__}: {e}", fix="check the disk, then restart; what was acknowledged is checked then",
            ))  # fmt: skip
        if isinstance(e, apsw.Error):
            return Unavailable(
                "UL2006", f"SQLite refused a commit to {self.path}; nothing was accepted",
                found=f"{type(e).__name__}: {e}", fix="try again; if it happens again, please report this",
            )  # fmt: skip
        return e

    def _broke(self, error: UnlostError) -> UnlostError:
        """From now on every call raises this; only opening the file again helps."""
        self.broken = error
        if self.on_broken is not None:
            self.on_broken(error)
        return error


def _parts(group: list[Any]) -> list[list[Any]]:
    """Splits a group into runs of operations and runs of blocks, keeping the order."""
    parts: list[list[Any]] = []
    for item in group:
        if parts and isinstance(parts[-1][0], Block) is isinstance(item, Block):
            parts[-1].append(item)
        else:
            parts.append([item])
    return parts


def _tell(group: list[Any], error: BaseException | None) -> None:
    """Resolves every operation of a finished commit; one thread hop per event loop, not per operation."""
    by_loop: dict[asyncio.AbstractEventLoop, list[_Operation]] = {}
    for item in group:
        if isinstance(item, Block):
            with contextlib.suppress(RuntimeError):  # its loop is closed: nobody waits any more
                if item.leave_waiting("withdrawn"):
                    item.wake(error or Unavailable("UL2004", "the commit of this block did not happen"))
                elif item.state == "finished":
                    item.committed(error)
            continue
        if error is not None:
            item.error = error
        if item.loop is not None:
            by_loop.setdefault(item.loop, []).append(item)
        elif item.future.done():
            continue
        elif item.error is not None:
            item.future.set_exception(item.error)
        else:
            item.future.set_result(item.result)
    for loop, items in by_loop.items():
        try:
            loop.call_soon_threadsafe(_resolve, items)
        except RuntimeError:
            continue  # that loop is closed: nobody waits any more


def _resolve(items: list[_Operation]) -> None:
    for op in items:
        if op.future.done():
            continue  # its caller was cancelled
        if op.error is not None:
            op.future.set_exception(op.error)
        else:
            op.future.set_result(op.result)


def _after_fork() -> None:
    for file in tuple(_open_files):
        guards.inherited.add(str(file.path))
        file.process_file.forget_child()
        os.close(file._lock_fd)


os.register_at_fork(after_in_child=_after_fork)
