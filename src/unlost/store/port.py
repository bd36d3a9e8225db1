"""What every store promises. A store remembers, in transactions, what became of each event.

**Guarantee** `settle` makes the whole of an outcome durable or nothing of it: the events that a handler published,
the inbox mark, the dead letter, the waiting room, the ledger, the position (where the broker commits with the
store). It refuses (`Fenced`) when a newer owner has taken the unit, so that a process that slept through its
own replacement cannot write.
**After a crash** an outcome that was not settled does not exist: the event is delivered again.

The suite `unlost.testing.check_store` holds every store to this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Protocol

import msgspec

from unlost.events import Envelope
from unlost.events.topic import Arrival, Gap, TopicInfo, Unit
from unlost.store.progress import Runs

Reason = Literal[
    "exhausted",  # all attempts were spent
    "rejected",  # the handler raised Reject
    "cannot_heal",  # an error that no retry mends
    "undecodable",  # the bytes are not an event of the declared type
    "unknown_version",  # written by a newer release of the event
    "id_reused",  # another event had this id
    "process_killed",  # its handler took the process down, again and again
    "too_large",
]


class Attempt(msgspec.Struct, frozen=True, omit_defaults=True):
    """One failed attempt. `at` in microseconds since 1970."""

    number: int
    at: int
    error: str


class Death(msgspec.Struct, frozen=True, kw_only=True):
    """Why an event goes to the shelf."""

    handler: str
    reason: Reason
    error_type: str = ""
    error: str = ""
    stack: str = ""
    parks: bool = True


class Inbox(msgspec.Struct, frozen=True):
    """What makes an event recognisable as handled: (service, source, id); `content` guards against a reused id."""

    id: str
    source: str
    content: int


State = Literal["done", "skipped", "dead", "retrying", "parked", "attempted"]


class Outcome(msgspec.Struct, kw_only=True):
    """What became of one delivery, in the form that the store makes durable.

    `attempted` is no end: the event is still in hand, only its failed attempts are remembered.
    """

    arrival: Arrival
    state: State
    rule: str = ""  # of a skip
    event_hash: int = 0
    waited: bool = False  # it came from the waiting room, not from the log
    publishes: Sequence[Envelope] = ()
    inbox: Inbox | None = None
    death: Death | None = None
    due: int | None = None
    attempts: Sequence[Attempt] = ()


class Settlement(msgspec.Struct, frozen=True):
    """Outcomes of one unit, decided under one epoch."""

    unit: Unit
    epoch: int
    outcomes: Sequence[Outcome]
    gaps: Sequence[Gap] = ()
    done: Sequence[int] = ()  # positions of events that were handled, and have no other consequence
    done_digest: int = 0  # the XOR of their hashes


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The saved progress of a unit at one instant."""

    unit: Unit
    topic_id: str
    partitions: int
    position: int
    fated: Runs
    counts: dict[str, int]
    digest: int


class Unsent(msgspec.Struct, frozen=True, kw_only=True):
    """An event of the outbox: accepted in a commit of the store, not yet confirmed by the broker."""

    number: int
    envelope: Envelope


class Mirrored(msgspec.Struct, frozen=True, kw_only=True):
    """A copy of a dead letter, for a topic that tools of others read."""

    number: int = 0  # in the outbox
    topic: str
    origin: tuple[str, int]  # topic and partition that it came from
    key: bytes | None
    data: bytes | None
    headers: Sequence[tuple[str, bytes | None]]


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """One event of the waiting room."""

    arrival: Arrival
    due: int | None
    attempts: Sequence[Attempt]


class Taken(msgspec.Struct, frozen=True, kw_only=True):
    """What a new owner needs to know of a unit."""

    unit: Unit
    epoch: int
    address: int  # names the unit where a runner notes what it has in hand
    position: int
    fated: Runs
    attempts: dict[int, list[Attempt]]  # of events that were being retried in memory
    suspects: set[int]  # events that were in a handler when their process died
    waiting: dict[bytes, int | None]  # key -> due time of its first waiting event; None: behind a dead letter
    keyless: dict[int, int]  # position -> due time, of waiting events without a key
    aside: int  # how many events stand in the waiting room and on the shelf


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """An event on the shelf, as operators see it."""

    number: int
    service: str
    handler: str
    topic: str
    partition: int
    position: int
    id: str
    source: str
    type: str
    key: bytes | None
    trace: str | None
    reason: str
    error_type: str
    error: str
    stack: str
    attempts: Sequence[Attempt]
    parks: bool
    parked_behind: int
    died: int
    recorded: int
    head: bytes
    data: bytes | None
    request: str | None


class Request(msgspec.Struct, frozen=True):
    """An operator's wish about one dead letter, to be carried out by the owner of its unit."""

    unit: Unit
    position: int
    key: bytes | None
    action: Literal["redrive", "discard"]


CarriedOut = Literal["no longer wanted", "key is free", "key still parked"]


class Block(Protocol):
    """An open transaction of a handler (`ctx.transaction()`)."""

    def execute(self, sql: str, bindings: Any = ()) -> list[tuple[Any, ...]]: ...

    def abort(self) -> None: ...


class Hands(Protocol):
    """Where one runner notes what it has in hand, so that it is known after `kill -9` which events were running
    when a process died. Costs less than a microsecond; need not survive power loss."""

    def take_up(self, address: int, position: int, alone: bool) -> None: ...

    def put_down(self) -> None: ...

    def close(self) -> None: ...


class Store(Protocol):
    """Remembers, in transactions, what became of each event. See the top of this file for what each store promises."""

    @property
    def id(self) -> str: ...

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def register(self, service: str, policy: dict[str, Any], topics: Sequence[TopicInfo]) -> None:
        """Pins a service's start positions on topics it sees for the first time, and checks that the other
        releases of the service agree on what must agree (topics' partitions, on_dead).

        Raises:
            UsageError: they do not agree, or a topic is not the one that the saved positions belong to.
        """

    async def take(self, units: Sequence[Unit]) -> Sequence[Taken]:
        """Makes this process the only one who can settle these units: every older epoch is fenced from now on."""

    async def give(self, units: Sequence[tuple[Unit, int]]) -> None:
        """Says that these units (with their epochs) were left cleanly."""

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Unit]:
        """Makes outcomes durable in one commit. Returns the units that were fenced: nothing of theirs was written."""

    def block(
        self,
        wake: Callable[[BaseException | None], None],
        committed: Callable[[BaseException | None], None],
        deadline_seconds: float = 0.25,
    ) -> Block:
        """Asks for a transaction block. `wake` is called when it may begin; `committed` when it is durable."""

    def enter(self, block: Block, unit: Unit, epoch: int, inbox: Inbox | None) -> bool:
        """Begins: False if the event was handled before.

        Raises:
            Fenced: another process owns the unit.
        """

    def finish(self, block: Block, settlement: Settlement) -> None:
        """Ends the block with the delivery's outcome in it; the commit follows."""

    def hands(self) -> Hands: ...

    def seen(self, service: str, events: Iterable[Inbox]) -> dict[tuple[str, str], int]:
        """Which of these the inbox has: (source, id) -> content."""

    async def waiting(self, unit: Unit, key: bytes | None, position: int | None, limit: int) -> Sequence[Waiting]:
        """Waiting events of a key in order, or the keyless one at `position`."""

    def requests(self, service: str) -> Sequence[Request]:
        """What operators want of this service's shelf."""

    def received(self, taken: Taken, position: int) -> None:
        """Notes how far the unit has been read, for those who look. Costs less than a microsecond."""

    async def progress(self, units: Sequence[Unit]) -> Sequence[Snapshot]:
        """The saved progress of these units, from one snapshot."""

    async def carry_out(self, request: Request, epoch: int) -> CarriedOut:
        """Redrives (shelf -> waiting room, due now) or discards, and says whether the key is free now or still
        stands behind another dead letter."""


class Outbox(Protocol):
    """Where a store puts events that its broker cannot take in the same commit. One process at a time empties it.

    **Guarantee** an event stands here from the commit that accepted it until `sent`, in the order of the commits.
    """

    async def claim(self) -> bool:
        """Whether this process is the one that sends: it is, if nobody else alive has claimed it."""

    async def unsent(self, after: int, limit: int) -> Sequence[Unsent]:
        """The oldest events with a number above `after`."""

    async def mirrors(self, after: int, limit: int) -> Sequence[Mirrored]:
        """The oldest copies of dead letters with a number above `after`."""

    async def sent(self, numbers: Sequence[int]) -> None:
        """The broker's receipts for these are in hand."""

    async def wait(self, seconds: float) -> None:
        """Until something may have been put in, at most so long."""
