"""What a handler may do besides computing: publish, and use a transaction. All of it belongs to the delivery."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import datetime, timedelta
from typing import Any, Generic, Protocol, TypeVar, overload

from unlost.errors import Misconfigured, Unavailable, UsageError
from unlost.events import Command, Envelope, Event, derived_id, encode_head, seal
from unlost.store.port import Block, Known, Settlement, SyncBlock

in_block: ContextVar[bool] = ContextVar("unlost_in_block", default=False)


class AlreadyHandled(BaseException):
    """Unwinds a handler whose event turned out to be a duplicate. Not an `Exception`: handlers must not catch it."""

    def __init__(self, known: Known) -> None:
        self.known = known


class Unit(Protocol):
    """What the context needs of its delivery (given by the worker)."""

    def check(self, envelope: Envelope) -> None:
        """Raises `UsageError` for an event that the broker would never accept."""

    def due(self, delay: float | timedelta | None, at: datetime | None) -> tuple[int, bool] | None:
        """When something that is delayed is due."""

    async def before_block(self) -> None:
        """Returns when the key's earlier outcomes are durable: a block's commit must not overtake them."""

    def block(self, session: object) -> Block: ...

    def sync_block(self, session: object) -> SyncBlock: ...

    async def begin(self, block: Block) -> None:
        """Raises `AlreadyHandled` for a duplicate."""

    def begin_sync(self, block: SyncBlock) -> None: ...

    def outcome(self, publishes: list[Envelope]) -> Settlement:
        """The delivery's end, as it stands in the block's commit."""


S = TypeVar("S")
_WITHOUT = object()


class Context:
    """The envelope of the event in hand, and the delivery's unit of work.

    `publish` is a plain call: the events leave with the handler's success, in the order of the calls, and not at
    all if it fails. **After a crash** they have left together with the mark that the event is handled, or not at all.

    Example:
        >>> billing = Service("billing")
        >>> @billing.on(OrderPlaced)
        ... async def charge(order: OrderPlaced, ctx: Context) -> None:
        ...     ctx.publish(OrderCharged(order_id=order.order_id))
    """

    def __init__(
        self, envelope: Envelope, *, service: str, handler: str, attempt: int, now: int, unit: Unit, replaying: bool = False
    ) -> None:  # fmt: skip
        self.envelope = envelope
        self.service = service
        self.attempt = attempt
        self._replaying = replaying
        self._handler = handler
        self._now = now
        self._unit = unit
        self._published: list[Envelope] = []
        self._closed = ""
        self._lock = threading.Lock()
        self.loop = asyncio.get_running_loop()
        self.transaction_used: TransactionBlock[Any, Any] | None = None
        self.waits_for_store = False  # for its turn to write: what that takes is not the handler's fault

    @property
    def id(self) -> str:
        return self.envelope.id

    @property
    def key(self) -> str | None:
        """The event's key as text, None if it has none. Bytes that are no UTF-8 are shown with escapes."""
        key = self.envelope.key
        return None if key is None else key.decode("utf-8", "backslashreplace")

    @property
    def occurred_at(self) -> datetime:
        return self.envelope.occurred_at

    @property
    def headers(self) -> Mapping[str, str]:
        return self.envelope.headers

    @property
    def replaying(self) -> bool:
        """Whether `unlost replay` delivers the event again, and not the service itself."""
        return self._replaying

    @property
    def idempotency_key(self) -> str:
        """The same for every attempt of this handler on this event, also in a replay: give it to foreign APIs."""
        return derived_id(self.envelope, f"{self.service}/{self._handler}", -1)

    def publish(
        self,
        event: Event,
        *,
        occurred_at: datetime | None = None,
        headers: Mapping[str, str] | None = None,
        delay: float | timedelta | None = None,
        at: datetime | None = None,
    ) -> str:
        """Publishes with the delivery; with `delay` (seconds or timedelta) or `at` it leaves then. Returns the id, which is
        derived from the event in hand, so that a repeat is recognised; `app.cancel` takes it.

        Raises:
            UsageError: the event cannot be published, or the delivery is over.
        """
        return self._add(event, occurred_at, headers, delay, at, command=False)

    def send(
        self,
        command: Command,
        *,
        headers: Mapping[str, str] | None = None,
        delay: float | timedelta | None = None,
        at: datetime | None = None,
    ) -> str:
        """Sends a command with the delivery, as `publish` does it with an event.

        Raises:
            UsageError: the command cannot be sent, or the delivery is over.
        """
        return self._add(command, None, headers, delay, at, command=True)

    def _add(
        self, event: Event, occurred_at: datetime | None, headers: Mapping[str, str] | None,
        delay: float | timedelta | None, at: datetime | None, *, command: bool,
    ) -> str:  # fmt: skip
        due = None if delay is None and at is None else self._unit.due(delay, at)
        with self._lock:  # threads of a handler: none may be too late unseen, or get another one's id
            self._check_open("send" if command else "publish")
            number = len(self._published)
            id = derived_id(self.envelope, f"{self.service}/{self._handler}", number)
            envelope = seal(
                event, source=self.service, id=id, occurred_at=occurred_at, cause=self.envelope, headers=headers,
                command=command, due=due, now=self._now,
            )  # fmt: skip
            encode_head(envelope)  # what cannot be stored is refused here, where it is the handler's error
            self._unit.check(envelope)
            self._published.append(envelope)
            return id

    @overload
    def transaction(self) -> TransactionBlock[AsyncDb, Db]: ...

    @overload
    def transaction(self, session: S) -> TransactionBlock[S, S]: ...

    def transaction(self, session: Any = _WITHOUT) -> TransactionBlock[Any, Any]:
        """The final step of a handler: its own rows, its events and the mark "handled" in one commit.

        `async with ctx.transaction() as db:` (in a sync handler `with`); inside, await nothing but `db`. Without an
        argument your tables live in the store's database. With your own connection or session to that database
        (psycopg, SQLAlchemy, Django), what you do with it is the transaction; the block begins and commits it. In the
        embedded file the block must end within 250 ms, else it is rolled back and the event is tried again.

        **Guarantee** when the block has ended, all of it is durable, and the event will not be handled again.
        **After a crash** before that, none of it happened.
        """
        self._check_open("a transaction")
        if self.transaction_used is not None:
            raise UsageError("UL1221", "a delivery has one transaction block", fix="put both parts into one block")
        if session is None:
            raise Misconfigured(
                "UL1251", "ctx.transaction(None) means nothing", found="a session that was not made?",
                fix="ctx.transaction() for your tables in the store, or ctx.transaction(session)",
            )  # fmt: skip
        self.transaction_used = TransactionBlock(self, self._unit, None if session is _WITHOUT else session)
        return self.transaction_used

    def close(self, why: str) -> None:
        """From now on nothing can be added: a handler that outlives its delivery must not write."""
        with self._lock:
            self._closed = self._closed or why

    def close_to_commit(self) -> None:
        """The transaction's own end: whoever comes first, this or the deadline, decides."""
        with self._lock:
            self._check_open("the end of the transaction")
            self._closed = "its transaction has been committed"
            assert self.transaction_used is not None
            self.transaction_used.finished = True

    @property
    def published(self) -> list[Envelope]:
        return self._published

    def _check_open(self, what: str) -> None:
        if self._closed:
            raise UsageError(
                "UL1222",
                f"{what}: this delivery is over",
                found=self._closed,
                fix="use ctx inside the handler only",
            )


class Db:
    """The user's tables in the open block, for sync handlers."""

    def __init__(self, block: SyncBlock) -> None:
        self._block = block

    def execute(self, sql: str, bindings: Any = ()) -> list[tuple[Any, ...]]:
        """Runs one statement (placeholders `?`) and returns its rows."""
        return self._block.execute(sql, bindings)


class AsyncDb:
    """The user's tables in the open block."""

    def __init__(self, block: Block) -> None:
        self._block = block

    async def execute(self, sql: str, bindings: Any = ()) -> list[tuple[Any, ...]]:
        """Runs one statement (placeholders `?`) and returns its rows."""
        return await self._block.execute(sql, bindings)


A = TypeVar("A")
B = TypeVar("B")


class TransactionBlock(Generic[A, B]):
    """`ctx.transaction()`. What came of its commit is known from the moment on when it was asked for (`finished`)."""

    def __init__(self, ctx: Context, unit: Unit, session: object) -> None:
        self._ctx = ctx
        self._unit = unit
        self._session = session
        self._block: Block | None = None
        self._sync: SyncBlock | None = None
        self._token: Any = None
        self._before = 0  # how many events were published before the block
        self.finished = False
        self._blameless: BaseException | None = None  # it ended the block, and is not the event's fault

    @property
    def settles(self) -> bool:
        """Whether its commit held the position as well."""
        block = self._block or self._sync
        return block is not None and block.settles

    # async

    async def __aenter__(self) -> A:
        block = self._unit.block(self._session)
        self._ctx.waits_for_store = True
        await self._unit.before_block()
        await self._unit.begin(block)
        self._ctx.waits_for_store = False
        self._block = block
        self._opened()
        return AsyncDb(block) if self._session is None else self._session  # type: ignore[return-value]

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        in_block.reset(self._token)
        block = self._block
        assert block is not None
        if error is not None:
            del self._ctx.published[self._before :]  # events of the block go with its rows
            self._blame(block, error)
            await block.abort()
            return
        try:
            end = self._unit.outcome(self._ctx.published)
            self._ctx.close_to_commit()
        except BaseException:
            await block.abort()
            raise
        await block.finish(end)

    # sync, in a handler's thread

    def __enter__(self) -> B:
        block = self._unit.sync_block(self._session)
        self._ctx.waits_for_store = True
        asyncio.run_coroutine_threadsafe(self._unit.before_block(), self._ctx.loop).result()
        self._unit.begin_sync(block)
        self._ctx.waits_for_store = False
        self._sync = block
        self._opened()
        return Db(block) if self._session is None else self._session  # type: ignore[return-value]

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        in_block.reset(self._token)
        block = self._sync
        assert block is not None
        if error is not None:
            del self._ctx.published[self._before :]
            self._blame(block, error)
            block.abort()
            return
        try:
            end = self._unit.outcome(self._ctx.published)
            self._ctx.close_to_commit()
        except BaseException:
            block.abort()
            raise
        block.finish(end)

    def _blame(self, block: Block | SyncBlock, error: BaseException) -> None:
        if block.is_transient(error):
            self._blameless = error

    def meaning(self, error: BaseException) -> BaseException:
        """What an error of the handler means, if its block was not committed."""
        if error is not self._blameless:
            return error
        text = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        return Unavailable("UL2012", "the transaction cannot be committed now", found=text, fix="it is tried again")

    def _opened(self) -> None:
        self._token = in_block.set(True)
        self._before = len(self._ctx.published)

    async def settled(self) -> BaseException | None:
        """After the handler: waits for the commit that was asked for; None when it is durable."""
        if self._block is not None:
            return await self._block.settled()
        assert self._sync is not None
        return await asyncio.to_thread(self._sync.settled)


def check_outside_block() -> None:
    """Publishing from inside a transaction block would wait for the block's own commit for ever."""
    if in_block.get():
        raise UsageError(
            "UL1223", "inside ctx.transaction() only `db` may be awaited", found="app.publish",
            fix="use ctx.publish(event): it leaves with the transaction",
        )  # fmt: skip
