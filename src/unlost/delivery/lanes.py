"""Per-key queues: the order of a key, while other keys go on. No task per event.

A lane is one key of one unit. Its events come from two places, in this order: rows of the waiting room
(`stored`), then the queue in memory. A lane is in exactly one of these conditions:

- idle: nothing to do; ready: queued for a runner; running: its head is in a handler;
- sleeping: its head waits in memory for a short retry;
- blocked: the head waits in the store, until `due` or, behind a dead letter, until an operator decides
  (`due` is None). New events of a blocked key join it in the store.

A unit's `swift` lane has the events of all keys, one after another: for handlers that get each event at most once,
and that end without waiting for anything.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec

from unlost.delivery.service import Handler
from unlost.events import Event
from unlost.events.topic import Arrival, Unit
from unlost.store.port import Attempt, Known, Taken


class Delivery(msgspec.Struct, eq=False):
    """One event in the hands of one service."""

    lane: Lane
    arrival: Arrival
    handler: Handler
    cls: type[Event] | None  # None: its bytes are no event
    event_hash: int
    attempts: Sequence[Attempt]
    size: int
    waited: bool
    suspect: bool
    begun: bool = False  # it is durable that its handler gets it, and that nobody will get it again
    seen: Known | None = None  # an event of the same id in the inbox
    looked: bool = True  # `seen` is fresh enough for a first attempt

    @property
    def position(self) -> int:
        return self.arrival.position

    def __repr__(self) -> str:
        return f"Delivery({self.lane.owned.unit}:{self.position}, attempt {len(self.attempts) + 1})"


class Lane:
    __slots__ = (
        "blocked",
        "due",
        "key",
        "loaded",
        "owned",
        "position",
        "queue",
        "ready",
        "running",
        "sleeping",
        "stored",
        "swift",
    )

    def __init__(self, owned: Owned, key: bytes | None, position: int | None = None, *, swift: bool = False) -> None:
        self.owned = owned
        self.key = key
        self.position = position  # of the only event, where there is no key
        self.queue: deque[Delivery] = deque()
        self.loaded: deque[Delivery] = deque()  # rows of the waiting room, read
        self.stored = False  # the waiting room has events of this lane
        self.blocked = False
        self.due: int | None = None
        self.ready = False
        self.running = False
        self.sleeping = False
        self.swift = swift

    @property
    def startable(self) -> bool:
        return (
            not (self.blocked or self.running or self.ready or self.sleeping)
            and not (self.owned.gone or self.owned.draining)
            and bool(self.stored or self.queue or self.loaded)
        )  # fmt: skip

    @property
    def empty(self) -> bool:
        return not (
            self.queue or self.loaded or self.stored or self.blocked or self.running or self.ready or self.sleeping
        )

    @property
    def head(self) -> Delivery | None:
        if self.loaded:
            return self.loaded[0]
        return None if self.stored or not self.queue else self.queue[0]


class Plain:
    """Events of a unit whose outcome has no consequence but that: they wait for their commit together."""

    __slots__ = ("begun", "begun_digest", "digest", "ended", "positions", "size")

    def __init__(self) -> None:
        self.positions: list[int] = []  # handled
        self.digest = 0
        self.begun: list[int] = []  # about to be handled, at most once
        self.begun_digest = 0
        self.ended: list[int] = []  # handled, of those that were begun before
        self.size = 0  # bytes of those that were handled


class Owned:
    """A unit while this process owns it."""

    __slots__ = ("aside", "attempts", "draining", "epoch", "fated_end", "gone", "in_hand", "lanes", "narrow", "paused", "plain", "put", "read", "running", "size", "sleeping", "suspects", "swift", "taken", "unacked", "unit")  # fmt: skip

    def __init__(self, taken: Taken) -> None:
        self.unit: Unit = taken.unit
        self.epoch = taken.epoch
        self.taken = taken
        self.attempts: dict[int, list[Attempt]] = dict(taken.attempts)
        self.suspects = set(taken.suspects)
        self.fated_end = max((end for _, end in taken.fated), default=0)
        self.plain: Plain | None = None
        self.lanes: dict[Any, Lane] = {}  # by key, or by position where there is no key
        self.aside = taken.aside  # in the waiting room and on the shelf
        self.in_hand = 0  # received and not yet durable
        self.size = 0  # bytes of these
        self.running = 0
        self.sleeping = 0
        self.paused = False
        self.read = taken.position  # how far its log was received
        self.put = 0  # the settler's number of the last outcome; here, because a lane without events is dropped
        self.unacked = False  # the broker does not know yet how far it is settled
        self.narrow = False  # its done-set fills most of the broker's note: only what makes it smaller is taken
        self.draining = False  # on its way to another member
        self.gone = False
        self.swift: Lane | None = None  # while the events of all keys go one after another

    def lane(self, key: bytes | None, position: int) -> Lane:
        name: Any = position if key is None else key
        lane = self.lanes.get(name)
        if lane is None:
            lane = self.lanes[name] = Lane(self, key, position if key is None else None)
        return lane

    def drop(self, lane: Lane) -> None:
        """Forgets a lane that has nothing left."""
        self.lanes.pop(lane.position if lane.key is None else lane.key, None)
