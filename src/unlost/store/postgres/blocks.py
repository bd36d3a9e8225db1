"""`ctx.transaction()` in PostgreSQL: on a connection that we lend, or on the user's own.

The commit holds the handler's rows, the mark "handled" and what the handler publishes; the position comes after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

import psycopg
from psycopg import AsyncConnection, AsyncCursor, Connection
from psycopg.errors import DivisionByZero

from unlost.errors import Misconfigured, StatementFailed, Unavailable, UsageError
from unlost.events.topic import Unit
from unlost.store.port import Inbox, Known, Settlement
from unlost.store.postgres import rows
from unlost.store.postgres.client import BEGIN, SESSION, Client, Executor, call, rows_of, told
from unlost.store.postgres.schema import quoted
from unlost.store.postgres.settings import Settings, explained
from unlost.store.session_blocks import handled_meanwhile
from unlost.store.steps import Rows, Steps, in_schema, run, run_async

_OF_THE_BLOCK = re.compile(
    r"\s*(begin|commit|rollback|abort|end|savepoint|release|start\s+transaction|prepare\s+transaction|set\s+session|"
    r"set\s+transaction|discard|listen|unlisten|notify|lock)\b",
    re.IGNORECASE,
)  # fmt: skip
_QUOTED = re.compile(r"'(?:[^']|'')*'|--[^\n]*|/\*.*?\*/", re.DOTALL)
_OURS = re.compile(r"\bunlost_[a-z_]+\b", re.IGNORECASE)


def _check_statement(sql: str) -> None:
    """Against mistakes: whoever wants to break the books has the rights for it anyway."""
    bare = _QUOTED.sub(" ", sql)
    if any(_OF_THE_BLOCK.match(part) for part in bare.split(";")) or _OURS.search(bare):
        raise UsageError(
            "UL1203", "a transaction block may use its own tables only", found=sql.strip()[:200],
            fix="leave the tables that start with unlost_, and the transaction itself, to unlost",
        )  # fmt: skip


def _failed(e: Exception, sql: str, settings: Settings) -> BaseException:
    """A statement of the user failed: because of the statement, or because the world said no."""
    meaning = explained(e, settings)
    if isinstance(meaning, Unavailable):
        return meaning
    if isinstance(e, psycopg.errors.FeatureNotSupported) and "cached plan" in str(e):
        return Unavailable(
            "UL2012", "a table was changed; the statement is prepared anew and tried again", found=str(e)
        )
    return StatementFailed(
        "UL1206", f"{type(e).__name__}: {str(e).strip().partition(chr(10))[0]}", found=sql.strip()[:200],
        fix="correct the statement",
    )  # fmt: skip


def _not_open() -> UsageError:
    return UsageError("UL1204", "this transaction block is not open", fix="use `db` inside the block only")


def _expired(seconds: float) -> Unavailable:
    return Unavailable(
        "UL2015", f"a transaction block must end within {seconds:g} s; it was rolled back and will be tried again",
        fix="do the slow work before the block",
    )  # fmt: skip


class LentBlock:
    """A transaction on a connection of our pool; the user's tables are in the store's database."""

    settles = False

    def __init__(self, client: Client, wake: Callable[[], None], deadline_seconds: float | None) -> None:
        self._client = client
        self._wake = wake
        self._deadline = deadline_seconds
        self._lent = contextlib.AsyncExitStack()
        self._connection: AsyncConnection[Any] | None = None
        self._cursor: AsyncCursor[Any]
        self._lock = asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._expiring: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None
        self._late = False

    async def begin(self, unit: Unit, epoch: int, inbox: Inbox | None, looked: bool = False) -> Known | None:
        with told(self._client.settings):
            connection = await self._lent.enter_async_context(self._client.lent.connection())
        self._connection, self._cursor = connection, connection.cursor()
        known: Known | None = None
        try:
            with told(self._client.settings):
                if looked:
                    await self._cursor.execute(BEGIN)
                else:
                    known = await run_async(
                        rows.enter(unit, epoch, inbox), Executor(connection, self._client.schema, BEGIN)
                    )
        except BaseException:
            await self.abort()
            raise
        if self._deadline is not None:
            self._timer = asyncio.get_running_loop().call_later(self._deadline, self._expire)
        return known

    def _expire(self) -> None:
        self._late = True
        self._expiring = asyncio.create_task(self.abort())

    def _open(self) -> AsyncConnection[Any]:
        if self._late and self._deadline is not None:
            raise _expired(self._deadline)
        if self._connection is None:
            raise _not_open()
        return self._connection

    async def execute(self, sql: str, bindings: Any = ()) -> list[tuple[Any, ...]]:
        _check_statement(sql)
        async with self._lock:
            self._open()
            try:
                await self._cursor.execute(*call(sql, bindings))
                return await rows_of(self._cursor)
            except (psycopg.Error, OSError) as e:
                raise _failed(e, sql, self._client.settings) from e

    async def finish(self, settlement: Settlement) -> None:
        self._open()
        self._ending = asyncio.create_task(self._finish(settlement))
        await asyncio.shield(self._ending)

    async def _finish(self, settlement: Settlement) -> None:
        try:
            async with self._lock:
                connection = self._open()
                self._stop_timer()
                text, bindings = rows.finish_or_fail(settlement)
                with told(self._client.settings):
                    async with connection.pipeline():  # one trip for both; where the first fails, nothing is committed
                        await self._cursor.execute(*call(in_schema(text, self._client.schema), bindings))
                        await self._cursor.execute("commit", prepare=False)
        except BaseException as e:
            await self.abort()
            if isinstance(e.__cause__, DivisionByZero):
                await self._refused(settlement)
            raise
        await self._leave()
        if any(o.publishes for o in settlement.outcomes):
            self._wake()

    async def _refused(self, settlement: Settlement) -> None:
        """Raises why the last statement has failed, if it was for a reason of ours."""
        (o,) = settlement.outcomes
        if await self._client.read(rows.enter(settlement.unit, settlement.epoch, o.inbox)) is not None:
            raise handled_meanwhile(f"{settlement.unit}:{o.arrival.position}")

    async def settled(self) -> BaseException | None:
        if self._ending is None:
            return _not_open()
        try:
            await asyncio.shield(self._ending)
        except asyncio.CancelledError:
            if self._ending.cancelled():
                return _not_open()
            raise
        except BaseException as e:
            return e
        return None

    async def abort(self) -> None:
        connection, self._connection = self._connection, None
        self._stop_timer()
        if connection is not None:
            with contextlib.suppress(psycopg.Error, OSError):  # the connection is lost: so is its transaction
                await connection.rollback()
        await self._leave()

    def is_transient(self, error: BaseException) -> bool:
        return False  # `execute` has said so in our own words

    async def _leave(self) -> None:
        self._connection = None
        lent, self._lent = self._lent, contextlib.AsyncExitStack()
        with contextlib.suppress(psycopg.Error, OSError):
            await lent.aclose()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


class SyncLentBlock:
    """The same for a handler in a thread: a connection for as long as the block lasts."""

    settles = False

    def __init__(self, settings: Settings, wake: Callable[[], None], deadline_seconds: float | None) -> None:
        self._settings = settings
        self._schema = quoted(settings.schema)
        self._wake = wake
        self._deadline = deadline_seconds
        self._connection: Connection[tuple[Any, ...]] | None = None
        self._ended = threading.Event()
        self._error: BaseException | None = None

    def begin(self, unit: Unit, epoch: int, inbox: Inbox | None, looked: bool = False) -> Known | None:
        with told(self._settings):
            connection = self._connection = _connections.take(self._settings)
        try:
            with told(self._settings):
                connection.execute(BEGIN)
                return None if looked else run(rows.enter(unit, epoch, inbox), self._execute)
        except BaseException:
            self.abort()
            raise

    def _execute(self, text: str, bindings: Sequence[Any] = ()) -> Rows:
        assert self._connection is not None
        cursor = self._connection.execute(*call(in_schema(text, self._schema), bindings))
        return cursor.fetchall() if cursor.description is not None else []

    def execute(self, sql: str, bindings: Any = ()) -> list[tuple[Any, ...]]:
        _check_statement(sql)
        if self._connection is None:
            raise _not_open()
        try:
            cursor = self._connection.execute(*call(sql, bindings))
            return cursor.fetchall() if cursor.description is not None else []
        except (psycopg.Error, OSError) as e:
            raise _failed(e, sql, self._settings) from e

    def finish(self, settlement: Settlement) -> None:
        try:
            if self._connection is None:
                raise _not_open()
            with told(self._settings):
                run(rows.finish(settlement), self._execute)
                self._connection.execute("commit", prepare=False)
        except BaseException as e:
            self._error = e
            self.abort()
            raise
        finally:
            self._ended.set()
        self._leave()
        if any(o.publishes for o in settlement.outcomes):
            self._wake()

    def settled(self) -> BaseException | None:
        self._ended.wait()
        return self._error

    def abort(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(psycopg.Error, OSError):
                self._connection.rollback()
            self._leave()

    def is_transient(self, error: BaseException) -> bool:
        return False

    def _leave(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            _connections.give(self._settings, connection)


class _Connections:
    """Connections of threads: kept for the next block. A handler's concurrency bounds their number."""

    KEPT = 64

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: dict[str, list[Connection[tuple[Any, ...]]]] = {}

    def take(self, settings: Settings) -> Connection[tuple[Any, ...]]:
        with self._lock:
            idle = self._idle.get(settings.conninfo, [])
            while idle:
                connection = idle.pop()
                if not (connection.closed or connection.broken):
                    return connection
        connection = Connection.connect(settings.conninfo, autocommit=True)
        connection.execute(SESSION)
        return connection

    def give(self, settings: Settings, connection: Connection[tuple[Any, ...]]) -> None:
        fit = not connection.closed and connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
        with self._lock:
            idle = self._idle.setdefault(settings.conninfo, [])
            if fit and len(idle) < self.KEPT:
                idle.append(connection)
                return
        connection.close()

    def close(self, settings: Settings) -> None:
        with self._lock:
            idle = self._idle.pop(settings.conninfo, [])
        for connection in idle:
            connection.close()


_connections = _Connections()


def close_threads_connections(settings: Settings) -> None:
    _connections.close(settings)


# --- on the user's own session -----------------------------------------------------------------------------------


class StoreRules:
    """A session in the store's own database."""

    def __init__(self, settings: Settings, store_id: str) -> None:
        self._settings = settings
        self._schema = quoted(settings.schema)
        self._store_id = store_id

    def text(self, sql: str) -> str:
        return in_schema(sql, self._schema)

    def enter(self, unit: Unit, epoch: int, inbox: Inbox | None) -> Steps[Known | None]:
        row = yield from rows.entry(unit, inbox)
        if row[0] != self._store_id:
            raise elsewhere(f"its store is {row[0] or 'none'}, ours is {self._store_id}")
        return rows.entered(unit, epoch, row)

    def finish(self, settlement: Settlement) -> Steps[None]:
        return rows.finish(settlement)

    def meaning(self, error: Exception) -> Exception | None:
        text = str(error)
        if "unlost_" in text and "does not exist" in text:
            return elsewhere(f"this database has no tables of unlost in the schema {self._settings.schema!r}")
        return None


def elsewhere(found: str) -> Misconfigured:
    return Misconfigured(
        "UL1253", 'ctx.transaction(session) needs a session in the store\'s database: effects and the mark "handled" must be '
        "one commit", found=found,
        fix="point UNLOST_STORE at the database of this session (its tables: unlost store migrate), or give the handler a "
        "session of the store's database",
    )  # fmt: skip
