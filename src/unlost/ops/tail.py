"""Looking at the log without taking part: the last events, those since a time, and those that come."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

from unlost.brokers.port import Log, Place
from unlost.config import duration
from unlost.errors import UsageError
from unlost.events import partition_of
from unlost.events.topic import Arrival
from unlost.world import REAL

BATCH = 256
POLL_SECONDS = 0.5
LOOK_SECONDS = 0.5  # how often a follower looks for topics that are new
OWN = "unlost."  # topics of this name are books and not events
_YEAR_1 = -62_135_596_800_000_000  # microseconds: the calendar of Python begins there

Seen = tuple[Place, Arrival]


class Tail:
    """The events of all topics that match. Order: per partition that of the log; between partitions by time.

    **Guarantee** between `last`/`since` and `follow` nothing is left out: following goes on where the first ended.

    Raises:
        Damaged: an event does not match its checksum, or positions are missing.
    """

    def __init__(self, log: Log, *, type: str | None = None, key: str | None = None) -> None:
        self._log = log
        self._type = type
        self._key = None if key is None else key.encode()
        self._first: dict[Place, int] = {}
        self._next: dict[Place, int] = {}
        self._known: set[str] = set()
        self._looked = REAL.monotonic()
        self.stopped: Callable[[], bool] = lambda: False
        self._look(first_time=True)

    def last(self, count: int) -> list[Seen]:
        """The newest `count` that match, oldest first."""
        found: list[Seen] = []
        for place in self._next:
            found += [(place, arrival) for arrival in self._backwards(place, count)]
        found.sort(key=_time)
        return found[-count:] if count else []

    def since(self, micros: int) -> Iterator[Seen]:
        """Those recorded at or after this time."""

        def one(place: Place) -> Iterator[Seen]:
            start = 0 if micros <= 0 else self._log.at(*place, micros)
            for arrival in self._forwards(place, start, self._next[place]):
                if arrival.recorded >= micros:
                    yield place, arrival

        yield from heapq.merge(*(one(place) for place in self._next), key=_time)

    def follow(self) -> Iterator[Seen]:
        """Those that come from now on, until the caller stops asking (or `stopped` says so)."""
        while not self.stopped():
            if REAL.monotonic() - self._looked >= LOOK_SECONDS:
                self._look()
            fresh: list[Seen] = []
            for place, end in self._log.ends(self._next).items():
                if self._next[place] < end:
                    fresh += [(place, a) for a in self._fresh(place, end) if self._matches(a)]
            fresh.sort(key=_time)
            yield from fresh
            if not fresh:
                self._log.wait(POLL_SECONDS)

    def _fresh(self, place: Place, end: int) -> list[Arrival]:
        arrivals = list(self._log.read(*place, self._next[place], BATCH))
        self._next[place] = arrivals[-1].position + 1 if arrivals else end  # the rest were positions without an event
        return arrivals

    def _look(self, *, first_time: bool = False) -> None:
        """Topics and where their partitions end; of topics that came later everything is new."""
        self._looked = REAL.monotonic()
        new = [name for name in self._log.names() if name not in self._known and not name.startswith(OWN)]
        for topic in self._log.topics(new) if new else ():
            self._known.add(topic.name)
            wanted = range(topic.partitions) if self._key is None else [partition_of(self._key, topic.partitions)]
            for partition in wanted:
                start, end = topic.ranges[partition]
                self._first[topic.name, partition] = start
                self._next[topic.name, partition] = end if first_time else start

    def _forwards(self, place: Place, start: int, end: int) -> Iterator[Arrival]:
        at = max(start, self._first[place])
        while at < end:
            arrivals = self._log.read(*place, at, min(BATCH, end - at))
            if not arrivals:
                return
            at = arrivals[-1].position + 1
            yield from (a for a in arrivals if a.position < end and self._matches(a))

    def _backwards(self, place: Place, count: int) -> list[Arrival]:
        end, start = self._next[place], self._first[place]
        found: list[Arrival] = []
        while end > start and len(found) < count:
            at = max(start, end - BATCH)
            batch: list[Arrival] = []
            while at < end:  # a read may be cut short by its size
                part = self._log.read(*place, at, end - at)
                if not part:
                    break
                batch += [a for a in part if a.position < end]
                at = part[-1].position + 1
            found = [a for a in batch if self._matches(a)] + found
            end = max(start, end - BATCH)
        return found[-count:] if count else []

    def _matches(self, a: Arrival) -> bool:
        if self._key is not None and a.key != self._key:
            return False
        if self._type is None:
            return True
        return a.envelope is not None and self._type in (a.envelope.type, a.envelope.type.rpartition(".")[2])


def moment(text: str) -> int:
    """Microseconds since 1970 from `start`, a time of day or date (RFC 3339; without a zone: local), or `10m` ago.

    Raises:
        UsageError: it is none of these.
    """
    if text in ("start", "beginning"):
        return 0
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        pass  # then it may be a duration
    else:
        try:
            return int(when.astimezone(UTC).timestamp() * 1_000_000)
        except (OverflowError, ValueError):
            raise _no_moment(text) from None
    try:
        micros = REAL.now() - int(duration(text) * 1_000_000)
    except (UsageError, OverflowError):
        raise _no_moment(text) from None
    if micros < _YEAR_1:
        raise _no_moment(text)
    return micros


def _no_moment(text: str) -> UsageError:
    return UsageError(
        "UL1320", "a time is a date, an RFC 3339 time, or how long ago", found=repr(text),
        fix="write 2026-11-23, 2026-11-23T14:00:00Z, 10m, 2h, or start",
    )  # fmt: skip


def _time(seen: Seen) -> int:
    return seen[1].recorded
