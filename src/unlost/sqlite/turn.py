"""`ctx.transaction()` on the embedded file: the user's block runs inside the writer's open commit.

The writer thread opens a commit, then lends the connection to the waiting blocks, one after another, each inside
a savepoint. The block that ends wakes the next one itself, so a group of blocks costs two thread hops, not two each.
Meanwhile the writer watches the clock: a block that holds the file longer than its deadline is rolled back.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import apsw

from unlost.errors import StatementFailed, Unavailable, UnlostError, UsageError
from unlost.sqlite.transaction import Transaction
from unlost.world import REAL

_WATCH_SECONDS = 0.02
DISK_ERRORS = (apsw.FullError, apsw.IOError, apsw.CorruptError)
# A cached statement is not shown to the authorizer again; statements prepared with another flag are other statements.
_OF_THE_USER = apsw.SQLITE_PREPARE_PERSISTENT


class BlockExpired(UnlostError):
    """The block held the file longer than its deadline; everything in it was rolled back."""


class Ruined(Unavailable):
    """A block ended the whole commit (`on conflict rollback`, an interrupted write): all of it was rolled back."""


class Block:
    """One transaction block of a handler.

    `wake(error)` is called, from any thread, when the block may begin (None) or cannot.
    `committed(error)` is called from the writer thread when the commit is durable (None) or has failed.
    """

    def __init__(
        self,
        wake: Callable[[BaseException | None], None],
        committed: Callable[[BaseException | None], None],
        deadline_seconds: float,
    ) -> None:
        self.wake = wake
        self.committed = committed
        self.deadline_seconds = deadline_seconds
        self.state = "waiting"  # waiting, open, finished, aborted, expired, withdrawn
        self._beginning = threading.Lock()  # who waits may give up while the writer lends it the connection
        self.turn: Turn | None = None
        self.opened = 0.0
        self.saved: dict[int, tuple[int, int]] = {}

    def execute(self, sql: str, bindings: Any = ()) -> list[tuple[Any, ...]]:
        """Runs a statement of the user and returns its rows."""
        turn = self._open_turn()
        with turn.lock, self._watched(turn):
            self._check()
            turn.guard.user_code = True
            try:
                cursor = turn.tx.connection.execute(sql, bindings, prepare_flags=_OF_THE_USER)
                rows: list[tuple[Any, ...]] = cursor.fetchall()
                return rows
            except apsw.InterruptError as e:
                raise self._expired() from e
            except apsw.AuthError as e:
                raise UsageError(
                    "UL1203",
                    "a transaction block may use its own tables only",
                    found=f"{sql.strip()[:200]}",
                    fix="leave the tables that start with unlost_, transactions, PRAGMA and ATTACH to unlost",
                ) from e
            except DISK_ERRORS:
                raise
            except apsw.Error as e:
                raise StatementFailed(
                    "UL1206", f"{type(e).__name__}: {e}", found=sql.strip()[:200],
                    fix="correct the statement, or catch StatementFailed if it may fail",
                ) from e  # fmt: skip
            finally:
                turn.guard.user_code = False

    def leave_waiting(self, state: str) -> bool:
        """From `waiting` to another state; False if it was not waiting any more."""
        with self._beginning:
            if self.state != "waiting":
                return False
            self.state = state
            return True

    def run(self, work: Callable[[Transaction], Any]) -> Any:
        """Runs our own statements inside the block."""
        turn = self._open_turn()
        with turn.lock, self._watched(turn):
            self._check()
            return work(turn.tx)

    def finish(self, work: Callable[[Transaction], Any]) -> None:
        """Adds our own part (settlement) and closes the block; the commit follows."""
        turn = self._open_turn()
        with turn.lock:
            self._check()
            try:
                with self._watched(turn):
                    work(turn.tx)
                    turn.tx.release()
            except BaseException:
                self.abort()
                raise
            self.state = "finished"
            turn.next()

    def abort(self) -> None:
        """Rolls the block back. Harmless when it is no longer open."""
        if self.leave_waiting("withdrawn") or self.turn is None:
            return
        turn = self.turn
        with turn.lock:
            if self.state == "open":
                self.state = "aborted"
                turn.undo(self)

    @contextlib.contextmanager
    def _watched(self, turn: Turn) -> Iterator[None]:
        """Without the open commit the next statement would be a commit of its own: then everything stops."""
        try:
            yield
        except BaseException as e:
            if self.state == "open" and not turn.tx.connection.in_transaction:
                self.state = "aborted"
                turn.ruin(e)
            if isinstance(e, DISK_ERRORS):
                raise Unavailable(
                    "UL2001", "the disk is full, or failed; nothing of this block was kept",
                    found=f"{type(e).__name__}: {e}", fix="free some space; the block is tried again",
                ) from e  # fmt: skip
            raise
        if self.state == "open" and not turn.tx.connection.in_transaction:
            self.state = "aborted"
            raise turn.ruin(None)

    def _open_turn(self) -> Turn:
        if self.turn is None:
            raise UsageError(
                "UL1204",
                "this transaction block is not open",
                fix="use `async with ctx.transaction() as db:`",
            )
        return self.turn

    def _check(self) -> None:
        if self.state == "expired":
            raise self._expired()
        if self.state != "open":
            raise UsageError(
                "UL1204",
                "this transaction block is over",
                found=f"its state is {self.state}",
                fix="use `db` inside the block only",
            )

    def _expired(self) -> BlockExpired:
        return BlockExpired(
            "UL1205",
            f"a transaction block must end within {self.deadline_seconds:g} s; it was rolled back and will be tried again",
            fix="do the slow work before the block; inside it, await nothing but db",
        )


class Guard:
    """Tells the authorizer whose statement is being prepared."""

    user_code = False

    def __call__(self, action: int, one: str | None, two: str | None, _database: str | None, _by: str | None) -> int:
        return int(self._answer(action, one, two))

    def _answer(self, action: int, one: str | None, two: str | None) -> Any:
        if not self.user_code:
            return apsw.SQLITE_OK
        if action in (
            apsw.SQLITE_ATTACH,
            apsw.SQLITE_DETACH,
            apsw.SQLITE_PRAGMA,
            apsw.SQLITE_TRANSACTION,
            apsw.SQLITE_SAVEPOINT,
        ):
            return apsw.SQLITE_DENY
        if any(name is not None and name.lower().startswith("unlost_") for name in (one, two)):
            return apsw.SQLITE_DENY
        return apsw.SQLITE_OK


class Turn:
    """A group of blocks that share one commit."""

    def __init__(self, blocks: Sequence[Block], tx: Transaction, guard: Guard) -> None:
        self.tx = tx
        self.guard = guard
        self.lock = threading.RLock()
        self._blocks = list(blocks)
        self._following = 0
        self._current: Block | None = None
        self._over = threading.Event()
        self._ruin: BaseException | None = None

    def run(self) -> None:
        """In the writer thread: lends the connection to each block; returns when all are over.

        Raises:
            Ruined: one of them ended the commit; nothing of it is left.
            apsw.Error: the disk failed under one of them.
        """
        for waiting in self._blocks:
            waiting.turn = self
        self.next()
        while not self._over.wait(_WATCH_SECONDS):
            block = self._current
            if block is not None and REAL.monotonic() - block.opened > block.deadline_seconds:
                self._expire(block)
        if self._ruin is not None:
            raise self._ruin

    def ruin(self, cause: BaseException | None) -> BaseException:
        """The commit is gone: no other block may begin."""
        if isinstance(cause, DISK_ERRORS):
            self._ruin = cause
        else:
            self._ruin = Ruined(
                "UL2005", "a transaction block ended the whole commit; all of it was rolled back and is tried again",
                found=str(cause or ""), fix="do not use ON CONFLICT ROLLBACK or RAISE(ROLLBACK); keep statements short",
            )  # fmt: skip
        self._current = None
        self._over.set()
        return self._ruin

    def undo(self, block: Block) -> None:
        """Rolls one block back and goes on with the next one."""
        try:
            self.tx.rollback_to(block.saved)
        except apsw.Error as e:
            self.ruin(e)
        else:
            self.next()

    def next(self) -> None:
        with self.lock:
            self._current = None
            while self._ruin is None and self._following < len(self._blocks):
                block = self._blocks[self._following]
                self._following += 1
                if block.state != "waiting":
                    continue
                try:
                    block.saved = self.tx.savepoint()
                except apsw.Error as e:
                    self.ruin(e)
                    return
                block.opened = REAL.monotonic()
                self._current = block
                if not block.leave_waiting("open"):
                    self._current = None
                    self.tx.rollback_to(block.saved)
                    continue
                try:
                    block.wake(None)
                    return
                except RuntimeError:  # its event loop is closed: nobody will ever use this block
                    block.state = "aborted"
                    self.tx.rollback_to(block.saved)
            self._over.set()

    def _expire(self, block: Block) -> None:
        with contextlib.suppress(apsw.Error):
            self.tx.connection.interrupt()  # in case it is inside a long statement
        with self.lock:
            if block.state == "open":
                # Whoever runs the others is likely to be as slow: they do not hold the file as well, one after another.
                self._following = len(self._blocks)
                block.state = "expired"
                self.undo(block)
