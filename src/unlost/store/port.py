"""What every store promises. A store remembers, in transactions, what became of each event.

**Guarantee** `settle` makes the whole of an outcome durable or nothing of it: the events that a handler published,
the inbox mark, the dead letter, the waiting room, the ledger, the position (where the broker commits with the
store). It refuses (`Fenced`) when a newer owner has taken the unit, so that a process that slept through its
own replacement cannot write.
**After a crash** an outcome that was not settled does not exist: the event is delivered again.

The suite `unlost.testing.check_store` holds every store to this.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import msgspec

from unlost.errors import UnlostError
from unlost.events import Envelope
from unlost.events.topic import Arrival, Gap, TopicInfo, Unit
from unlost.store.progress import Runs
from unlost.world import rfc3339

T = TypeVar("T")

Reason = Literal[
    "exhausted",  # all attempts were spent
    "rejected",  # the handler raised Reject
    "cannot_heal",  # an error that no retry mends
    "undecodable",  # the bytes are not an event of the declared type
    "unknown_version",  # written by a newer release of the event
    "id_reused",  # another event had this id
    "process_killed",  # its handler took the process down, again and again
    "too_large",
    "too_old",  # older than ids are remembered: nobody can say whether it was handled
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


class Known(NamedTuple):
    """What the inbox knows of an event: what it said, and where it stood when it was handled, if that is remembered. The
    same event at the same place is no duplicate: its handler's transaction was committed, and its position was not."""

    content: int
    place: tuple[str, int, int] | None = None  # topic, partition, position


State = Literal["done", "skipped", "dead", "retrying", "parked", "attempted", "begun", "abandoned", "removed"]


LISTED: tuple[State, ...] = (
    "dead",
    "retrying",
    "parked",
    "abandoned",
    "removed",
)  # one by one in the ledger; others are counted


class Outcome(msgspec.Struct, kw_only=True):
    """What became of one delivery, in the form that the store makes durable.

    `attempted` is no end: the event is still in hand, only its failed attempts are remembered. Nor is `begun`: the event
    is about to be handled at most once, and will not be delivered again; its end then comes with `begun` set.
    """

    arrival: Arrival
    state: State
    rule: str = ""  # of a skip
    event_hash: int = 0
    waited: bool = False  # it came from the waiting room, not from the log
    begun: bool = False  # that it was about to be handled is durable, and this is what became of it
    publishes: Sequence[Envelope] = ()
    inbox: Inbox | None = None
    death: Death | None = None
    due: int | None = None
    attempts: Sequence[Attempt] = ()


def counted_as(o: Outcome) -> str | None:
    """How the books count it; None where the ledger lists it one by one."""
    return None if o.state in LISTED else f"skipped:{o.rule}" if o.state == "skipped" else o.state


class Settlement(msgspec.Struct, frozen=True):
    """Outcomes of one unit, decided under one epoch."""

    unit: Unit
    epoch: int
    outcomes: Sequence[Outcome]
    gaps: Sequence[Gap] = ()
    done: Sequence[int] = ()  # positions of events that were handled, and have no other consequence
    done_digest: int = 0  # the XOR of their hashes
    begun: Sequence[int] = ()  # positions of events that are about to be handled, and will not be delivered again
    begun_digest: int = 0
    ended: Sequence[int] = ()  # of these, in an earlier commit: they were handled, and have no other consequence


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The saved progress of a unit at one instant."""

    unit: Unit
    topic_id: str
    partitions: int
    position: int
    fated: Runs
    counts: dict[str, int]
    digest: int


Lane = tuple[str, bytes | None]  # topic and key: what keeps one order


class Unsent(msgspec.Struct, frozen=True, kw_only=True):
    """An event of the outbox: accepted in a commit, claimed by this process, not yet confirmed by the broker."""

    number: int  # its name in this outbox
    envelope: Envelope

    @property
    def lane(self) -> Lane:
        e = self.envelope
        return (e.topic, e.key if e.key is not None else b"\0unlost keyless %d" % self.number)


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


class Hold(msgspec.Struct, frozen=True, kw_only=True):
    """An operator's word that a service does not work. `since` in microseconds since 1970."""

    state: Literal["paused", "retired", "renamed"]
    since: int
    operator: str
    reason: str = ""
    to: str = ""  # its new name

    @property
    def said(self) -> str:
        """
        >>> Hold(state="paused", since=0, operator="ada", reason="card service is away").said
        'paused since 1970-01-01T00:00:00Z by ada: card service is away'
        """
        to = f" to {self.to}" if self.to else ""
        why = f": {self.reason}" if self.reason else ""
        return f"{self.state}{to} since {rfc3339(self.since)[:19]}Z by {self.operator}{why}"


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
    guessed: bool = False  # nobody knows which of the suspects were really in a handler
    aside: int  # how many events stand in the waiting room and on the shelf
    abandoned: int = 0  # how many events the owner before had begun and not ended: they are listed, and not delivered


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
    """A transaction of an async handler (`ctx.transaction()`): its own rows, its events and the mark "handled" in one
    commit."""

    settles: bool  # the commit holds the position as well; else the outcome is still to be settled

    async def begin(self, unit: Unit, epoch: int, inbox: Inbox | None, looked: bool = False) -> Known | None:
        """Returns when the transaction is open: what the inbox knows of the event, None if it is new.

        `looked`: the inbox was asked when the event came in, and need not be asked again. Whatever has changed since then is
        found by `finish`, which lets only one of two come through.

        Raises:
            Fenced: another process owns the unit.
        """

    async def execute(self, sql: str, bindings: Any = ()) -> list[tuple[Any, ...]]:
        """A statement of the user."""

    async def finish(self, settlement: Settlement) -> None:
        """Ends the block with the delivery's outcome in it, and returns when that is durable."""

    async def settled(self) -> BaseException | None:
        """After `finish` was called, however that ended: why it is not durable; None: it is."""

    async def abort(self) -> None:
        """Rolls back. Harmless when it is no longer open."""

    def is_transient(self, error: BaseException) -> bool:
        """Whether the world is to blame for an error of the handler inside of the block, and not the event: a transaction
        that could not be serialized, a deadlock, a lost connection."""


class SyncBlock(Protocol):
    """The same for a handler in a thread."""

    settles: bool

    def begin(self, unit: Unit, epoch: int, inbox: Inbox | None, looked: bool = False) -> Known | None: ...

    def execute(self, sql: str, bindings: Any = ()) -> list[tuple[Any, ...]]: ...

    def finish(self, settlement: Settlement) -> None: ...

    def settled(self) -> BaseException | None: ...

    def abort(self) -> None: ...

    def is_transient(self, error: BaseException) -> bool: ...


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

    @property
    def place(self) -> str:
        """Where it is, for people; without secrets."""

    @property
    def broken(self) -> UnlostError | None:
        """It failed for good: the process must start again."""

    on_broken: Callable[[UnlostError], None] | None  # who is told then
    own: dict[str, OwnPlace]  # SQLite files of the user's with an outbox and an inbox of their own, by path
    sees_hands: bool  # it knows after a death which events were in a handler; else they are guessed in the end

    async def open(self) -> None:
        """
        Raises:
            UsageError: it cannot be a store: no tables, tables of another release, missing rights, a replica …
        """

    async def close(self) -> None: ...

    async def prepare(self, schema: str) -> None:
        """Makes the user's own tables, where the statements that make them are new or have changed."""

    async def service_of(self, queue: str) -> str | None:
        """The service that carries out the commands of a queue, None if none has ever registered for it."""

    async def register(self, service: str, policy: dict[str, Any], topics: Sequence[TopicInfo]) -> None:
        """Pins a service's start positions on topics it sees for the first time, and checks that the other
        releases of the service agree on what must agree (topics' partitions, on_dead). Of a service that an operator has
        ended it writes nothing: an App may have it in its code, as long as it does not run it.

        Raises:
            UsageError: they do not agree, or a topic is not the one that the saved positions belong to.
        """

    async def take(self, units: Sequence[Unit]) -> Sequence[Taken]:
        """Makes this process the only one who can settle these units: every older epoch is fenced from now on.

        Raises:
            UsageError: an operator has retired or renamed the service.
        """

    async def give(self, units: Sequence[tuple[Unit, int]]) -> None:
        """Says that these units (with their epochs) were left cleanly."""

    async def delay(self, envelopes: Sequence[Envelope]) -> None:
        """Keeps events until they are due; returns when that is durable. The same id of a source twice is one."""

    async def cancel(self, id: str, source: str) -> bool:
        """Takes one of them out, and writes that down; False: it is not there (any more)."""

    async def next_due(self) -> int | None:
        """When the first of them is due: microseconds, on the world's steady clock."""

    async def release(self) -> int:
        """Publishes those that are due, the earliest first, in the commit that takes them out; returns how many. Zero also
        if another process is just doing it."""

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Unit]:
        """Makes outcomes durable in one commit. Returns the units that were fenced: nothing of theirs was written."""

    def block(self, session: object = None, deadline_seconds: float | None = None) -> Block:
        """A transaction for an async handler: on the user's own session, or without one in the store's database. One
        that is open longer than its deadline is rolled back (without one: the store's own rule).

        Raises:
            UsageError: this session cannot be used here.
        """

    def sync_block(self, session: object = None, deadline_seconds: float | None = None) -> SyncBlock:
        """The same for a handler in a thread."""

    def hands(self) -> Hands: ...

    async def starting(self, taken: Taken, position: int, waited: bool, alone: bool) -> None:
        """Comes before a handler starts on an event that waited, or that runs alone because it may have killed its
        process: a store that `hands` tells nothing notes it durably."""

    async def seen(self, service: str, events: Iterable[Inbox]) -> Mapping[tuple[str, str], Known]:
        """Which of these the inbox has, by (source, id)."""

    async def waiting(self, unit: Unit, key: bytes | None, position: int | None, limit: int) -> Sequence[Waiting]:
        """Waiting events of a key in order, or the keyless one at `position`."""

    async def held(self, service: str) -> Hold | None:
        """Whether an operator has said that this service is not to work."""

    async def requests(self, service: str) -> Sequence[Request]:
        """What operators want of this service's shelf."""

    def received(self, taken: Taken, position: int) -> None:
        """Notes how far the unit has been read, for those who look. Costs less than a microsecond."""

    async def progress(self, units: Sequence[Unit]) -> Sequence[Snapshot]:
        """The saved progress of these units, from one snapshot."""

    async def keep_house(self, starts: Mapping[tuple[str, int], int], resends: Mapping[str, float]) -> None:
        """Lets go of inbox marks that nothing can need any more: of events before the log's first positions (`starts`, by
        topic and partition), in services whose resends come within so many seconds (`resends`)."""

    async def carry_out(self, request: Request, epoch: int) -> CarriedOut:
        """Redrives (shelf -> waiting room, due now) or discards, and says whether the key is free now or still
        stands behind another dead letter."""

    def outbox(self) -> Outbox | None:
        """Where settling puts what handlers publish, if the broker's log is elsewhere."""

    def copies(self) -> Copies | None:
        """Where settling puts copies of dead letters, if there is a topic for them."""


class OwnPlace(Protocol):
    """A database of the user's that takes part in handlers' transactions, though it is not the store."""

    def rules(self) -> Any: ...


class Outbox(Protocol):
    """Events that a database has accepted and a broker has not confirmed yet. Used from one event loop.

    **Guarantee** an event stands here from the commit that accepted it until `sent`. Events of one lane are in the
    hands of one process at a time, and come in the order in which their commits were seen, those of one moment in the
    order in which they were put.
    """

    async def claim(self) -> bool:
        """Whether there is a part of it that this process is to send; takes its share where nobody alive has it."""

    async def next(self, held: Collection[Lane], limit: int) -> Sequence[Unsent]:
        """The oldest events of this process' part, but those of lanes that are `held`. They are durably numbered and
        noted as this process' when it returns; until `sent` they come again."""

    async def sent(self, numbers: Sequence[int]) -> None:
        """The broker's receipts for these are in hand. It becomes durable now, or with the next `next`."""

    async def wait(self, seconds: float) -> None:
        """Until something may have been put in, at most so long."""

    async def give(self) -> None:
        """Other processes may send what this one would have."""

    async def close(self) -> None: ...


class Copies(Protocol):
    """Copies of dead letters on their way to topics that others read. One process at a time sends them."""

    async def claim(self) -> bool: ...

    async def page(self, after: int, limit: int) -> Sequence[Mirrored]:
        """The oldest copies with a number above `after`."""

    async def sent(self, numbers: Sequence[int]) -> None: ...

    async def wait(self, seconds: float) -> None: ...

    async def give(self) -> None: ...

    async def close(self) -> None: ...


# --- for those who look ----------------------------------------------------------------------------------------


class Cursor(Protocol):
    def fetchone(self) -> tuple[Any, ...] | None: ...

    def fetchall(self) -> list[tuple[Any, ...]]: ...

    def __iter__(self) -> Iterator[tuple[Any, ...]]: ...


class Look(Protocol):
    """One snapshot, or one commit, of the store's tables."""

    def execute(self, sql: str, bindings: Sequence[Any] = ()) -> Any:
        """A `Cursor`. Placeholders are `?`, tables are called as in `sqlite/schema.py`."""


class Process(NamedTuple):
    """What is known of a process that uses the store."""

    id: str
    pid: int
    host: str
    alive: bool
    hung: bool  # alive, but it has given no sign of life for a while
    read: Mapping[Unit, int]  # how far it has read


class Relaying(NamedTuple):
    """A living process that sends what stands in the outbox."""

    pid: int
    host: str
    shards: int  # how many parts of the outbox are its own


class Shard(NamedTuple):
    """The books of one part of an outbox. What was ever sent is numbered, and the broker has it or it is in hands."""

    number: int
    sent: int
    confirmed: int
    in_hands: int
    vanished: int  # in hands, and not in the outbox any more


class Accepted(NamedTuple):
    """What a store has accepted, and the broker has not confirmed yet. Times are by the store's clock, in seconds."""

    events: int
    copies: int  # of dead letters
    age: float | None  # of the oldest event
    in_hands: int  # events that a relay has sent, or is about to send
    held: float | None  # how long the first of these has been in hands
    relays: Sequence[Relaying]
    orphaned: int  # parts of the outbox that no living process sends
    shards: Sequence[Shard]  # where a store numbers what it sends
    streams: Sequence[str] = ()  # what else reads the outbox at this moment, in place of our relays


class Records(Protocol):
    """The tables of a store as operators look at them: blocking calls, and SQL that every store understands."""

    @property
    def id(self) -> str: ...

    @property
    def place(self) -> str:
        """Where it is, for people; without secrets."""

    def read(self, work: Callable[[Look], T]) -> T:
        """Runs `work` on one snapshot; a read inside of a read sees the same one."""

    def write(self, work: Callable[[Look], T]) -> T:
        """Runs `work` in one commit, and returns when that is durable.

        Raises:
            Unavailable: surely nothing was written. OutcomeUnknown: nobody can say.
        """

    def processes(self, look: Look) -> Mapping[str, Process]:
        """All that are known, by id. An owner that is not among them does not live."""

    def take_over(self, look: Look, units: Collection[Unit]) -> Collection[Unit]:
        """Those of these units that no living process has. In this commit nobody else takes them, and whoever had
        them is fenced after it."""

    def accepted(self, look: Look) -> Accepted:
        """What stands in the outbox."""

    def size(self, look: Look) -> int:
        """Bytes on the disk."""

    def now(self) -> int:
        """By the clock that its times are of."""

    def close(self) -> None: ...
