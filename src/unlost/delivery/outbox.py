"""`app.outbox(connection)`: events in the transaction of a web request, a script, or whatever else is no handler.

**Guarantee** rows and events are committed together, or none of them is: no data without its event, no event without its
data. A relay sends the events after the commit (a running App has one).
**After a crash** before the commit nothing happened; after it, the events stand in the outbox until they are sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Protocol

from unlost.delivery.later import due_of
from unlost.errors import UsageError
from unlost.events import Command, Envelope, Event, seal
from unlost.store.sessions.connect import of
from unlost.store.sessions.port import AnySession, Dialect
from unlost.store.steps import Steps, run, run_async
from unlost.world import World


class Place(Protocol):
    """The outbox of one database, on the side of those who publish."""

    @property
    def ready(self) -> bool:
        """Whether `prepare` has nothing to do."""

    def prepare(self) -> None:
        """Learns what it must know of the database; asks it the first time. Blocks."""

    def put(self, envelopes: Sequence[Envelope]) -> Steps[None]:
        """Statements for the user's transaction, which refuse another database."""

    def woken_after(self, session: AnySession) -> None:
        """Tells the relays when the session's transaction has ended. Costs the caller nothing."""

    def close(self) -> None: ...


# Where the library begins a transaction with the first statement, this is it; in PostgreSQL one that takes no snapshot yet.
_BEGIN: Mapping[Dialect, str] = {"postgresql": "show transaction_isolation", "sqlite": "select 1"}

Find = Callable[[AnySession, str], Place]  # the outbox of a session's database; the text is the path of a SQLite file


class Outbox:
    """Events that leave with a transaction of yours. Made by `app.outbox(connection)`.

    **Guarantee** your rows and these events are committed together, or neither is.
    **After a crash** before your commit nothing has happened; after it, a running App sends them.

    Example:
        >>> async def place(order: OrderPlaced) -> None:
        ...     async with session.begin(), app.outbox(session) as outbox:
        ...         outbox.publish(order)
    """

    def __init__(
        self,
        connection: object,
        find: Find,
        source: str,
        world: World,
    ) -> None:
        self._session = of(connection)
        self._find = find
        self._source = source
        self._world = world
        self._place: Place | None = None
        self._events: list[Envelope] = []
        self._open = False

    def publish(
        self,
        event: Event,
        *,
        id: str | None = None,
        occurred_at: datetime | None = None,
        headers: Mapping[str, str] | None = None,
        delay: float | timedelta | None = None,
        at: datetime | None = None,
    ) -> str:
        """Publishes with the transaction: a plain call, which returns the id. With `delay` (seconds or timedelta) or `at`
        the event leaves then; `app.cancel` takes its id. The events are written at the end of the block, in the order of
        the calls; not at all if the block fails or the transaction is rolled back.

        With an `id` of your own, a request that is sent again publishes at most a duplicate, which effectively-once
        handlers never see.

        Raises:
            UsageError: the event cannot be published, or the block is over.
        """
        return self._add(event, id, occurred_at, headers, delay, at, command=False)

    def send(
        self,
        command: Command,
        *,
        id: str | None = None,
        headers: Mapping[str, str] | None = None,
        delay: float | timedelta | None = None,
        at: datetime | None = None,
    ) -> str:
        """Sends a command with the transaction, as `publish` does it with an event.

        Raises:
            UsageError: the command cannot be sent, or the block is over.
        """
        return self._add(command, id, None, headers, delay, at, command=True)

    def _add(
        self, event: Event, id: str | None, when: datetime | None, headers: Mapping[str, str] | None,
        delay: float | timedelta | None, at: datetime | None, *, command: bool,
    ) -> str:  # fmt: skip
        if not self._open:
            raise UsageError(
                "UL1255", "an outbox is open inside its block only", fix="with app.outbox(connection) as outbox: outbox.publish(…)"
            )  # fmt: skip
        sealed = seal(
            event, source=self._source, id=id, occurred_at=when, headers=headers, command=command,
            due=due_of(self._world, delay, at), now=self._world.now(),
        )  # fmt: skip
        self._events.append(sealed)
        return sealed.id

    # sync

    def __enter__(self) -> Outbox:
        session = self._session
        if session.is_async:
            raise _wrong_kind("with", "async with", session)
        self._check_transaction()
        self._place = self._find(session, session.place())
        self._place.prepare()
        if not session.in_transaction:
            session.execute(_BEGIN[session.dialect])
        self._events, self._open = [], True
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._open = False
        session, place = self._session, self._place
        if error is not None or not self._events or session.is_async or place is None:
            return
        self._check_still_open()
        run(place.put(self._events), session.execute)
        place.woken_after(session)

    # async

    async def __aenter__(self) -> Outbox:
        session = self._session
        if not session.is_async:
            raise _wrong_kind("async with", "with", session)
        self._check_transaction()
        self._place = self._find(session, await session.place())
        if not self._place.ready:
            await asyncio.to_thread(self._place.prepare)
        if not session.in_transaction:
            await session.execute(_BEGIN[session.dialect])
        self._events, self._open = [], True
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._open = False
        session, place = self._session, self._place
        if error is not None or not self._events or not session.is_async or place is None:
            return
        self._check_still_open()
        await run_async(place.put(self._events), session.execute)
        place.woken_after(session)

    def _check_transaction(self) -> None:
        if self._session.autocommits:
            raise UsageError(
                "UL1256", "an outbox needs a transaction: what you write and the events must be one commit",
                found=f"this {self._session.library} commits each statement by itself", fix=self._session.how_to_begin,
            )  # fmt: skip

    def _check_still_open(self) -> None:
        """The block is inside one transaction. Its events in the next one could be lost with it, or come without rows."""
        if not self._session.in_transaction:
            raise UsageError(
                "UL1269", "the transaction ended inside the outbox block, before the events were written",
                found=f"{self._session.library}: committed, rolled back or closed; events not written: {len(self._events)}",
                fix="with transaction, app.outbox(connection) as outbox: …; the transaction first, and nothing in the block ends it",
            )  # fmt: skip


def _wrong_kind(used: str, wanted: str, session: AnySession) -> UsageError:
    kind = "an async" if session.is_async else "a sync"
    return UsageError(
        "UL1252", f"app.outbox of {kind} connection is used with `{wanted}`", found=f"`{used}`, {session.library}",
        fix=f"{wanted} app.outbox(connection) as outbox:",
    )  # fmt: skip
