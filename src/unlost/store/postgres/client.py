"""Connections to the store: who runs our statements, and what is known when one is lost.

Two pools, so that handlers which hold a transaction open never keep the books from being written: one for us, one that
is lent to `ctx.transaction()`. A session of its own listens, and holds the lock that says "this process lives".
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import psycopg
from psycopg import AsyncConnection, AsyncCursor, sql
from psycopg_pool import AsyncConnectionPool, PoolClosed

from unlost.errors import OutcomeUnknown, Unavailable, UnlostError
from unlost.store.postgres.schema import quoted
from unlost.store.postgres.settings import Settings, explained
from unlost.store.steps import Rows, Steps, in_schema, run_async, with_percent
from unlost.world import end

log = logging.getLogger("unlost.store")
T = TypeVar("T")

OWN_MAX = 4
OWN_SECONDS = 3.0  # how long a connection of our own is waited for
LENT_SECONDS = 10.0  # and one for a handler: others may hold them all
GIVE_UP_SECONDS = 1.0  # of making a connection: whoever needs one asks again
SAY_SECONDS = 20.0
FATE_SECONDS = 60.0  # how long it is asked what became of a commit whose answer was lost
ASK_AGAIN_SECONDS = 0.2
IDLE_SECONDS = 10.0  # inside a commit of ours: whoever stands still there longer is ended, and its locks with it
NOTIFY_SECONDS = 0.005
Connection = AsyncConnection[tuple[Any, ...]]
BEGIN = "begin isolation level read committed read write"


class Client:
    """All connections of one store in one event loop."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.schema = quoted(settings.schema)
        self._lives: WeakKeyDictionary[Connection, object] = WeakKeyDictionary()
        self._own = self._pool(OWN_MAX, OWN_SECONDS, self._configure_own)
        self.lent = self._pool(settings.pool, LENT_SECONDS, _configure)
        self._weeding: asyncio.Task[None] | None = None
        self._notified = float("-inf")

    def _pool(
        self, size: int, seconds: float, configure: Callable[[Connection], Awaitable[None]]
    ) -> AsyncConnectionPool[Connection]:
        return AsyncConnectionPool(
            self.settings.conninfo, min_size=0, max_size=size, open=False, timeout=seconds, configure=configure,
            reconnect_timeout=GIVE_UP_SECONDS, max_idle=60.0,
        )  # fmt: skip

    async def _configure_own(self, connection: Connection) -> None:
        """A process that is stopped in the middle of a commit must not keep its locks from those who replace it."""
        await _configure(connection)
        await connection.execute(f"set idle_in_transaction_session_timeout = {int(IDLE_SECONDS * 1000)}")
        cursor = await connection.execute(_LIFE)
        self._lives[connection] = await cursor.fetchone()

    async def open(self) -> None:
        await self._own.open()
        await self.lent.open()

    async def close(self) -> None:
        if self._weeding is not None:
            await end(self._weeding)
        await self._own.close()
        await self.lent.close()

    def weed(self) -> None:
        """One connection was lost: others that lie in the pools may be dead as well, after a restart of the server."""
        if self._weeding is None or self._weeding.done():
            self._weeding = asyncio.create_task(self._weed())

    async def _weed(self) -> None:
        for pool in (self._own, self.lent):
            with contextlib.suppress(psycopg.Error, PoolClosed):
                await pool.check()

    async def connect(self) -> Connection:
        """A connection of its own; every statement is a transaction."""
        with told(self.settings):
            return await AsyncConnection.connect(self.settings.conninfo, autocommit=True)

    def executor(self, connection: Connection) -> Executor:
        return Executor(connection, self.schema)

    async def read(self, steps: Steps[T]) -> T:
        """Statements that write nothing. Each sees the newest commits."""
        with told(self.settings):
            async with self._own.connection() as connection:
                return await run_async(steps, self.executor(connection))

    async def commit(self, make: Callable[[], Steps[T]]) -> T:
        """Runs the statements in one transaction, and returns when it is durable.

        **Guarantee** when it raises `Unavailable`, surely nothing was written: if the answer to the commit is lost, the
        server is asked what became of the transaction.
        **After a crash** all of it is there, or nothing.
        """
        transaction = ""
        life: object = None
        try:
            with told(self.settings):
                async with self._own.connection() as connection:
                    life = self._lives[connection]
                    execute = Executor(
                        connection, self.schema, BEGIN, "select pg_current_xact_id()::text", together=False
                    )
                    result = await run_async(make(), execute)
                    if execute.before is None:  # no statement was run
                        return result
                    found = await execute.before.fetchone()
                    assert found is not None
                    transaction = found[0]
                    await connection.execute("commit", prepare=False)  # it goes out whole, in one message
                    return result
        except Unavailable as e:
            self.weed()
            if transaction and await self._happened(transaction, life, e):
                return result
            raise

    async def _happened(self, transaction: str, life: object, lost: Unavailable) -> bool:
        """Whether a transaction was committed whose end was not seen. A server that has recovered from a crash since then
        may have given its number to another one: what "committed" is about, nobody knows there."""
        log.warning("the answer to a commit was lost; asking what became of it: %s", lost)
        loop = asyncio.get_running_loop()
        end = loop.time() + FATE_SECONDS
        while loop.time() < end:
            with contextlib.suppress(Unavailable), told(self.settings):
                async with self._own.connection() as connection:
                    same = self._lives[connection] == life
                    if same:
                        await connection.execute(_END_IT, (transaction,))
                    try:
                        cursor = await connection.execute("select pg_xact_status(%s::xid8)", (transaction,))
                    except psycopg.errors.InvalidParameterValue:
                        return False  # it lies in the future of this server, which then has never seen it
                    row = await cursor.fetchone()
                    assert row is not None
                    if row[0] == "committed" and not same:
                        break
                    if row[0] in ("committed", "aborted"):
                        return bool(row[0] == "committed")
            await asyncio.sleep(ASK_AGAIN_SECONDS)
        raise OutcomeUnknown(
            "UL2014", "nobody can say whether a commit to the store happened", found=str(lost),
            fix="start the service again when the store is there: what was settled is known then",
        )  # fmt: skip

    async def notify(self) -> None:
        """Wakes those who wait for the outbox. A statement of its own, never in a transaction that writes; now and then is
        enough, for whoever is woken takes all that is there."""
        loop = asyncio.get_running_loop()
        await asyncio.sleep(max(0.0, self._notified + NOTIFY_SECONDS - loop.time()))
        self._notified = loop.time()
        with told(self.settings):
            async with self._own.connection() as connection:
                await connection.execute("select pg_notify(%s, '')", (self.settings.channel,))


class Executor:
    """Runs our statements on a connection. What is to come before them goes out in one trip, `together` with the first.

    A statement that locks must not be in that trip: the driver's pipeline ends with a Flush, with which the server forgets
    for how long a transaction may be idle until the next statement has ended.
    """

    def __init__(self, connection: Connection, schema: str, *before: str, together: bool = True) -> None:
        self._connection = connection
        self._schema = schema
        self._cursor = connection.cursor()
        self._to_come = before
        self._together = together
        self.before: AsyncCursor[tuple[Any, ...]] | None = None  # with the result of the last that came before

    async def __call__(self, text: str, bindings: Sequence[Any] = ()) -> Rows:
        cursor, ours = self._cursor, call(in_schema(text, self._schema), bindings)
        to_come, self._to_come = self._to_come, ()
        if to_come:
            async with self._connection.pipeline():
                for sql_text in to_come:
                    self.before = await self._connection.execute(sql_text)
                if self._together:
                    await cursor.execute(*ours)
        if not (to_come and self._together):
            await cursor.execute(*ours)
        return await rows_of(cursor)


async def rows_of(cursor: AsyncCursor[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """The rows of a statement, none if it has none. (`cursor.description` would say the same, and takes longer.)"""
    result = cursor.pgresult
    return await cursor.fetchall() if result is not None and result.nfields else []


# It changes when a server recovers from a crash, and when another one takes its place: statistics do not survive that.
_LIFE = "select stats_reset from pg_stat_bgwriter"
# Its client is gone, but the server may not know that for hours. If it is committing, it ends that first.
_END_IT = (
    "select pg_terminate_backend(pid) from pg_stat_activity "
    "where backend_xid = (%s::xid8)::xid and pid <> pg_backend_pid()"
)
# A lock of our number that another session holds is that of the session we have lost.
_END_OLD = (
    "select pg_terminate_backend(pid) from pg_locks where locktype = 'advisory' and classid = %s and objid = %s "
    "and objsubid = 2 and database = (select oid from pg_database where datname = current_database()) "
    "and pid <> pg_backend_pid()"
)


# What a connection of ours has. A server that nobody tells would believe for two hours that the client of a lost machine is
# still there, with its locks; and who stands still in the middle of a transaction must not keep them either.
SESSION = (
    "select set_config('synchronous_commit', 'on', false), set_config('idle_in_transaction_session_timeout', '60s', false), "
    "set_config('tcp_keepalives_idle', '20', false), set_config('tcp_keepalives_interval', '5', false), "
    "set_config('tcp_keepalives_count', '3', false), set_config('tcp_user_timeout', '30s', false)"
)


async def _configure(connection: Connection) -> None:
    """Every statement is its own transaction unless we begin one. What is acknowledged must be on the disk, whatever the
    role's default says."""
    await connection.set_autocommit(True)
    await connection.execute(SESSION)


def statement(text: str, schema: str) -> Any:
    """One of our statements as the driver wants it, with bindings."""
    return with_percent(in_schema(text, schema))


def call(text: str, bindings: Any) -> tuple[Any, Any]:
    """What the driver is given. Without bindings it takes the text as it is: `%` and `?` are operators then."""
    return (with_percent(text), bindings) if bindings else (text, None)


@contextlib.contextmanager
def told(settings: Settings) -> Iterator[None]:
    """Errors of the driver come out as ours."""
    try:
        yield
    except (UnlostError, asyncio.CancelledError):
        raise
    except Exception as e:
        meaning = explained(e, settings)
        if meaning is e:
            raise
        raise meaning from e


class Listener:
    """The session that listens and holds the process' lock. It is made again when it is lost."""

    def __init__(self, client: Client, lock: Callable[[], int]) -> None:
        self._client = client
        self._lock = lock
        self._task: asyncio.Task[None] | None = None
        self._heard: set[asyncio.Event] = set()
        self._connection: Connection | None = None
        self._said = float("-inf")

    async def open(self) -> None:
        self._connection = await self._connect()
        self._task = asyncio.create_task(self._listen(), name="unlost-listener")

    async def _connect(self) -> Connection:
        settings = self._client.settings
        connection = await self._client.connect()
        try:
            with told(settings):
                lock = (settings.lock_class, self._lock())
                await connection.execute(_END_OLD, lock)
                await connection.execute("select pg_advisory_lock(%s::integer, %s::integer)", lock)
                await connection.execute(sql.SQL("listen {}").format(sql.Identifier(settings.channel)))
        except BaseException:
            await connection.close()
            raise
        return connection

    async def _listen(self) -> None:
        while True:
            try:
                if self._connection is None:
                    self._connection = await self._connect()
                    self.ring()  # something may have been missed
                with told(self._client.settings):
                    async for _ in self._connection.notifies():
                        self.ring()
            except UnlostError as e:
                self._say(e)
            await self._drop()
            await asyncio.sleep(ASK_AGAIN_SECONDS)

    def _say(self, error: UnlostError) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._said > SAY_SECONDS:
            self._said = now
            log.warning("the session with the store was lost; it is made again: %s", error)

    def ring(self) -> None:
        for event in self._heard:
            event.set()

    def subscribe(self) -> asyncio.Event:
        event = asyncio.Event()
        self._heard.add(event)
        return event

    def unsubscribe(self, event: asyncio.Event) -> None:
        self._heard.discard(event)

    async def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(psycopg.Error):
                await connection.close()

    async def close(self) -> None:
        if self._task is not None:
            await end(self._task)
        await self._drop()
