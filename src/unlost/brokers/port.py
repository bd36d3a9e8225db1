"""What every broker promises. The first file to read for whoever adds one.

A broker moves events; it remembers nothing about handling them (that is the store's task). Queue, pub/sub and
stream are the same few verbs with other arguments.

- `publish` returns receipts when the events are durable, as far as `abilities.survives` says; before that it
  has promised nothing. It never drops, never reorders events of one key within a batch or between two calls
  of which the first has returned.
- A `Member` receives what its service's partitions hold, each partition's events in the order of the log, from
  the position that `seek` names. It hands out a partition only between `Assigned` and `Revoked`/`Lost`.
- Delivering twice is allowed, skipping is not: where the log holds no event any more, `receive` says so (`Gone`);
  where it is not the log that it was, it raises `Damaged`.
- Driver exceptions never leave an adapter: callers see `Unavailable`, `OutcomeUnknown`, `UsageError`, `Damaged`.

The suite `unlost.testing.check_broker` holds every adapter to this.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import msgspec

from unlost.events import Envelope
from unlost.events.topic import Arrival, Gap, Topic, TopicInfo, Unit

T = TypeVar("T")
Survives = Literal["process death", "power loss of one machine", "power loss of all machines"]
SURVIVES_ORDER: tuple[Survives, ...] = (
    "process death",
    "power loss of one machine",
    "power loss of all machines",
)


class Abilities(msgspec.Struct, frozen=True, kw_only=True):
    """What this broker can do beyond the port's minimum. The conformance suite and start-up checks read it."""

    name: str
    survives: Survives  # what an accepted event survives
    ordered: bool  # one order per key
    replayable: bool  # the log can be read again from any position
    delayed: bool  # can hold an event back until a time
    atomic_batches: bool  # publish_all is all or nothing
    commits_with_store: bool  # publishing and settling can be one commit
    death_seconds: float = 2.0  # after how long a dead member's units are somebody else's
    leave_seconds: float = 0.5  # the same for one that left cleanly


class Receipt(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Proof that an event is durable: where it stands in the log. `recorded` is in microseconds since 1970. One that is
    delayed stands in the store until it is `due` (microseconds), and has no place in the log yet (-1).

    **Guarantee** who has it need not publish again: the event survives what the broker declares.

    Example:
        >>> receipt = Receipt(id="order-A1-placed", topic="order", partition=3, position=0, recorded=1_767_323_045_000_000)
        >>> f"{receipt.topic}/{receipt.partition}:{receipt.position}"
        'order/3:0'
    """

    id: str
    topic: str
    partition: int
    position: int
    recorded: int  # microseconds since 1970
    due: int | None = None


class Saved(NamedTuple):
    """What was acknowledged last of a unit, where the broker remembers that: the position and our note beside it."""

    position: int
    note: str


class Assigned(NamedTuple):
    """These units are this member's now. Nothing arrives before `seek`."""

    units: Sequence[Unit]
    saved: Mapping[Unit, Saved] = MappingProxyType({})


class Revoked(NamedTuple):
    """Finish or drop what is in hand of these units, save, then `release` them. Until then they stay ours."""

    units: Sequence[Unit]


class Lost(NamedTuple):
    """These units are somebody else's already. Never save anything for them."""

    units: Sequence[Unit]


class Arrivals(NamedTuple):
    unit: Unit
    events: Sequence[Arrival]


class Gone(NamedTuple):
    """The unit's log goes on behind these positions; they hold no event (any more)."""

    unit: Unit
    gap: Gap


class Ack(NamedTuple):
    """Everything of the unit below `position` has an outcome; `note` is kept beside it."""

    unit: Unit
    position: int
    note: str


class Original(NamedTuple):
    """A message as tools of others know it."""

    topic: str
    group: str
    headers: Sequence[tuple[str, bytes | None]]
    stamped: str = "CreateTime"  # who gave it its time: its producer, or the broker (LogAppendTime)


Change = Assigned | Revoked | Lost | Arrivals | Gone


class Member(Protocol):
    """One process' part in a service."""

    async def receive(self) -> Sequence[Change]:
        """Waits for something to happen. Only one call at a time."""

    def seek(self, unit: Unit, position: int) -> None:
        """The next event of this unit to arrive is the one at `position`."""

    def pause(self, unit: Unit) -> None:
        """No more arrivals of this unit until `resume`; membership goes on."""

    def resume(self, unit: Unit) -> None: ...

    async def ack(self, acks: Sequence[Ack]) -> None:
        """Tells the broker how far its log was handled, so that its own tools see it. The store is the authority; so
        this comes after `Store.settle`, and a unit that is not ours any more is left out. Never called when
        `commits_with_store`."""

    async def release(self, units: Sequence[Unit]) -> None:
        """Gives units back; another member may have them at once. Of a unit that was not revoked (the store says that
        another process took it): if the broker still says it is ours, it is assigned to us anew after a moment."""

    async def close(self) -> None:
        """Leaves the group. What was not released is taken over by others as after a crash."""


Place = tuple[str, int]  # topic, partition


class Entry(NamedTuple):
    """A record of a `Ledger`. `value` None: it was taken back."""

    key: bytes
    value: bytes | None
    place: str  # where it stands, for people


class Ledger(Protocol):
    """A place beside the log that keeps the last statement under each key. Blocking calls."""

    @property
    def name(self) -> str:
        """What people know it by."""

    def write(self, statements: Mapping[str, bytes]) -> None:
        """Returns when all are durable."""

    def read(self) -> Sequence[Entry]:
        """The last entry of each key, as it stands there."""


class Log(Protocol):
    """The log as operators look at it: blocking calls, without taking part in anything."""

    @property
    def identity(self) -> str:
        """As that of the broker."""

    @property
    def forgets(self) -> bool:
        """Whether the broker lets go of events by its own rules, handled or not."""

    def together(self, work: Callable[[], T]) -> T:
        """Runs `work`. Where log and store are one file, all its looks at them see one moment."""

    def names(self) -> Sequence[str]:
        """Of all topics."""

    def topics(self, names: Collection[str] | None = None) -> Sequence[TopicInfo]:
        """All topics, or those of these names that exist."""

    def ends(self, places: Collection[Place]) -> Mapping[Place, int]:
        """The position after the last of each of these partitions, looked up in one go."""

    def read(self, topic: str, partition: int, start: int, limit: int) -> Sequence[Arrival]:
        """Up to `limit` events from `start` on, in order; fewer than `limit` does not mean that there are no more,
        none at all does."""

    def at(self, topic: str, partition: int, micros: int) -> int:
        """A position before which no event stands that was recorded at or after this time (microseconds)."""

    def recorded(self, places: Mapping[Place, int]) -> Mapping[Place, int]:
        """When the first event at or behind each of these positions was recorded, where there is one."""

    def spans(self, topics: Sequence[TopicInfo]) -> Mapping[str, tuple[int, int]]:
        """When the first and the last event of each of these topics were recorded, where it has any."""

    def holes(self, topic: str, partition: int) -> Sequence[tuple[int, int]]:
        """Positions between its first and last that should hold an event, and hold none. Empty where a log may have
        positions without one."""

    def digest(
        self, topic: str, partition: int, start: int, before: int | None, runs: Sequence[tuple[int, int]]
    ) -> int | None:
        """XOR of the event hashes of these runs, where the log can say so without being read; `before` is that of all
        positions below `start`, if anybody has noted it."""

    def verify(self, limit: int) -> Sequence[str]:
        """Checks every stored event, where the log can do that better than by reading it; what is wrong, at most so
        many lines."""

    def ledger(self) -> Ledger | None:
        """Where the books can be kept beside the log; None: this broker has no such place."""

    def wait(self, seconds: float) -> None:
        """Until there may be something new, at most so long."""

    def close(self) -> None: ...


Find = Callable[[Collection[bytes]], Iterator[tuple[str, int, int]]]  # topic, partition, position


@runtime_checkable
class Findable(Protocol):
    """What a log can do beyond that, if its broker keeps an index: find events without reading everything."""

    def finder(self) -> AbstractContextManager[Find]:
        """A function that names, a partition after the other and in order, the places of all events that have one of these
        texts as their key, id or correlation, and of a few others: read them and look. It may write, beside the log.

        Begin it before `together`; what it finds is of the moment that `read` sees.

        Raises:
            Damaged: an event that had to be read for it is damaged or missing.
        """


@runtime_checkable
class Erasable(Protocol):
    """What a log can do beyond that, if it can take the content out of an event and leave its place."""

    def erase(self, topic: str, partition: int, positions: Collection[int], key: bytes) -> int:
        """Takes everything out of the events at these positions that have this key, but for id, source, type, version and
        time; returns how many. One commit. From then on `read` and every member give them with the rule `erased`.

        Raises:
            Damaged: one of them is not as it was written. Nothing is changed.
        """


class Broker(Protocol):
    """Moves events. See the top of this file for what each adapter promises."""

    @property
    def abilities(self) -> Abilities: ...

    @property
    def identity(self) -> str:
        """Which broker this is, for good: positions saved with one mean nothing on another."""

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def declare(self, topics: Sequence[Topic]) -> Sequence[TopicInfo]:
        """Creates missing topics.

        Raises:
            UsageError: a topic exists with another number of partitions; nothing is changed.
        """

    async def publish(self, envelopes: Sequence[Envelope]) -> Sequence[Receipt]:
        """Appends events durably and returns where they stand, in the order given.

        **Guarantee** when it returns, every event survives what `abilities.survives` says.
        **After a crash** before the return the events may be in the log or not; publishing again is safe.

        Raises:
            Unavailable: surely nothing was accepted. OutcomeUnknown: nobody can say. PartlyPublished: some were
            accepted (never where `atomic_batches`).
        """

    async def mirror(
        self,
        topic: str,
        key: bytes | None,
        data: bytes | None,
        headers: Sequence[tuple[str, bytes | None]],
        origin: tuple[str, int],
    ) -> None:
        """Sends a message as it is, for tools of others that read dead letters. Returns when it is durable.

        It goes to the partition of the number that it came from (`origin`), if there is one; a topic that is missing
        gets as many partitions as that of the origin. Never where `commits_with_store`."""

    def original(self, unit: Unit, arrival: Arrival) -> Original:
        """What the broker's own tools call the place of an event, and its headers as they came."""

    def check(self, envelope: Envelope) -> None:
        """Says at once what this broker would never accept (too large, say).

        Raises:
            UsageError: why.
        """

    async def join(self, service: str, topics: Sequence[str]) -> Member:
        """Takes part in a service, sharing its partitions with the other members."""

    async def keep_house(self) -> None:
        """What is to be done now and then while a program runs, such as trimming what retention lets go."""

    async def topics(self, names: Collection[str] | None = None) -> Sequence[TopicInfo]:
        """All topics, or those of these names that exist."""

    def reread(self, topic: str, partition: int, arrival: Arrival) -> Arrival:
        """Tries again to make an event of bytes that were none, now that the code may be another."""

    async def read(self, topic: str, partition: int, start: int, limit: int) -> Sequence[Arrival]:
        """Events from `start` on, without taking part in anything. Only where `replayable`."""
