"""`ctx.transaction(session)`: a handler's transaction on a connection or session of the user's.

We begin it and we commit it. What is written besides the user's own rows is up to the database (`Rules`): the mark "handled"
and the events. The position is settled after the commit; until then the mark says where the event stood.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from unlost.errors import Misconfigured, Unavailable, UnlostError, UsageError
from unlost.events.topic import Unit
from unlost.store.port import Inbox, Known, Settlement
from unlost.store.sessions.port import AsyncSession, SyncSession
from unlost.store.steps import Rows, Steps, run, run_async


class Rules(Protocol):
    """How one kind of database takes part in a handler's transaction."""

    def text(self, sql: str) -> str:
        """A statement of ours as this database knows it."""

    def enter(self, unit: Unit, epoch: int, inbox: Inbox | None) -> Steps[Known | None]:
        """The first statements: is this the right database, is the unit still ours, what does the inbox know?"""

    def finish(self, settlement: Settlement) -> Steps[None]:
        """The last ones: the mark, and the events."""

    def meaning(self, error: Exception) -> Exception | None:
        """What the driver's error says about us; None: it is the user's own."""


class SessionBlock:
    settles = False

    def __init__(self, session: AsyncSession | SyncSession, rules: Rules, wake: Callable[[], None]) -> None:
        if not session.is_async:
            raise _wrong_kind(session, "an async handler", "async")
        _check_transaction(session)
        self._session: AsyncSession = session
        self._rules = rules
        self._wake = wake
        self._ending: asyncio.Task[None] | None = None
        self._open = False

    async def _execute(self, sql: str, bindings: Sequence[Any] = ()) -> Rows:
        return await self._session.execute(self._rules.text(sql), bindings)

    async def begin(self, unit: Unit, epoch: int, inbox: Inbox | None, looked: bool = False) -> Known | None:
        with _told(self._session, self._rules):
            if not await self._session.begin():
                raise _open_already()
            self._open = True
            try:
                return await run_async(self._rules.enter(unit, epoch, inbox), self._execute)
            except BaseException:
                await self.abort()
                raise

    async def execute(self, sql: str, bindings: Any = ()) -> list[tuple[Any, ...]]:
        return list(await self._session.execute(sql, bindings))

    async def finish(self, settlement: Settlement) -> None:
        """A cancellation comes out after the commit has ended: else the user's own `async with` would close the session in
        the middle of it, and the driver take the commit of what was rolled back for a success."""
        ending = self._ending = asyncio.create_task(self._finish(settlement))
        cancelled: asyncio.CancelledError | None = None
        while not ending.done():
            try:
                await asyncio.wait({ending})
            except asyncio.CancelledError as e:
                cancelled = e
        if cancelled is not None:
            raise cancelled
        ending.result()

    async def _finish(self, settlement: Settlement) -> None:
        try:
            with _told(self._session, self._rules):
                await run_async(self._rules.finish(settlement), self._execute)
                await self._session.commit()
        except BaseException:
            await self.abort()
            raise
        self._open = False
        if any(o.publishes for o in settlement.outcomes):
            self._wake()

    async def settled(self) -> BaseException | None:
        assert self._ending is not None
        try:
            await asyncio.shield(self._ending)
        except asyncio.CancelledError:
            if self._ending.cancelled():
                return Unavailable("UL2012", "the commit of this transaction was cancelled")
            raise
        except BaseException as e:
            return e
        return None

    async def abort(self) -> None:
        if self._open:
            self._open = False
            with contextlib.suppress(Exception):  # its connection is lost: so is its transaction
                await self._session.rollback()

    def is_transient(self, error: BaseException) -> bool:
        return self._session.is_transient(error)


class SyncSessionBlock:
    """The same for a handler in a thread."""

    settles = False

    def __init__(self, session: AsyncSession | SyncSession, rules: Rules, wake: Callable[[], None]) -> None:
        if session.is_async:
            raise _wrong_kind(session, "a sync handler", "sync")
        _check_transaction(session)
        self._session: SyncSession = session
        self._rules = rules
        self._wake = wake
        self._ended = threading.Event()
        self._error: BaseException | None = None
        self._open = False

    def _execute(self, sql: str, bindings: Sequence[Any] = ()) -> Rows:
        return self._session.execute(self._rules.text(sql), bindings)

    def begin(self, unit: Unit, epoch: int, inbox: Inbox | None, looked: bool = False) -> Known | None:
        with _told(self._session, self._rules):
            if not self._session.begin():
                raise _open_already()
            self._open = True
            try:
                return run(self._rules.enter(unit, epoch, inbox), self._execute)
            except BaseException:
                self.abort()
                raise

    def execute(self, sql: str, bindings: Any = ()) -> list[tuple[Any, ...]]:
        return list(self._session.execute(sql, bindings))

    def finish(self, settlement: Settlement) -> None:
        try:
            with _told(self._session, self._rules):
                run(self._rules.finish(settlement), self._execute)
                self._session.commit()
        except BaseException as e:
            self._error = e
            self.abort()
            raise
        finally:
            self._ended.set()
        self._open = False
        if any(o.publishes for o in settlement.outcomes):
            self._wake()

    def settled(self) -> BaseException | None:
        self._ended.wait()
        return self._error

    def abort(self) -> None:
        if self._open:
            self._open = False
            with contextlib.suppress(Exception):  # its connection is lost: so is its transaction
                self._session.rollback()

    def is_transient(self, error: BaseException) -> bool:
        return self._session.is_transient(error)


def handled_meanwhile(place: str) -> Unavailable:
    """By an owner that has slept through its replacement, or as a duplicate in another partition: the next attempt knows."""
    return Unavailable(
        "UL2017", f"{place}: an event with this id was handled elsewhere in this moment; it is tried again"
    )


@contextlib.contextmanager
def _told(session: AsyncSession | SyncSession, rules: Rules) -> Iterator[None]:
    """What the user's driver says of our statements: try again, wrong database, or a failure of its own."""
    try:
        yield
    except (UnlostError, asyncio.CancelledError):
        raise
    except Exception as e:
        if session.is_transient(e):
            text = f"{type(e).__name__}: {str(e).strip().partition(chr(10))[0]}"
            raise Unavailable(
                "UL2012", "the transaction cannot be committed now", found=text, fix="it is tried again"
            ) from e
        meaning = rules.meaning(e)
        if meaning is None:
            raise
        raise meaning from e


def _check_transaction(session: AsyncSession | SyncSession) -> None:
    if session.in_transaction:
        raise _open_already()


def _open_already() -> UsageError:
    return Misconfigured(
        "UL1254", "ctx.transaction(session) begins and ends the transaction itself", found="one is open on this session already",
        fix="hand it a session that has done nothing yet: read before the block with another one, or commit first",
    )  # fmt: skip


def _wrong_kind(session: AsyncSession | SyncSession, handler: str, kind: str) -> UsageError:
    return Misconfigured(
        "UL1252", f"{handler} needs a session that is {kind} in ctx.transaction()", found=session.library,
        fix=f"use the {kind} connection of the same library, or change the handler's `def`",
    )  # fmt: skip
