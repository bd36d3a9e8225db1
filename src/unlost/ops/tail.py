"""Looking at the log without taking part: the last events, those since a time, and those that come."""

from __future__ import annotations

import heapq
import select
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import islice

import apsw

from unlost.brokers.embedded.broker import partition_range
from unlost.brokers.embedded.log import read_partition
from unlost.config import duration
from unlost.errors import UsageError
from unlost.events import partition_of
from unlost.events.topic import Arrival
from unlost.sqlite.file import File
from unlost.world import REAL

BATCH = 256
POLL_SECONDS = 0.5
_YEAR_1 = -62_135_596_800_000_000  # microseconds: the calendar of Python begins there

Place = tuple[str, int]  # topic, partition
Seen = tuple[Place, Arrival]


class Tail:
    """The events of all topics that match. Order: per partition that of the log; between partitions by time.

    **Guarantee** between `last`/`since` and `follow` nothing is left out: following goes on where the first ended.

    Raises:
        Damaged: an event does not match its checksum, or positions are missing.
    """

    def __init__(self, file: File, *, type: str | None = None, key: str | None = None) -> None:
        self._file = file
        self._type = type
        self._key = None if key is None else key.encode()
        self._numbers: dict[Place, int] = {}
        self._next: dict[Place, int] = {}
        self._known: set[str] = set()
        self.stopped: Callable[[], bool] = lambda: False
        self._look()

    def last(self, count: int) -> list[Seen]:
        """The newest `count` that match, oldest first."""
        found: list[Seen] = []
        for place in self._numbers:
            found += [(place, arrival) for arrival in self._backwards(place, count)]
        found.sort(key=_time)
        return found[-count:] if count else []

    def since(self, micros: int) -> Iterator[Seen]:
        """Those recorded at or after this time."""

        def one(place: Place) -> Iterator[Seen]:
            for arrival in self._forwards(place, 0, self._next[place]):
                if arrival.recorded >= micros:
                    yield place, arrival

        yield from heapq.merge(*(one(place) for place in self._numbers), key=_time)

    def follow(self) -> Iterator[Seen]:
        """Those that come from now on, until the caller stops asking (or `stopped` says so)."""
        while not self.stopped():
            self._look()
            fresh: list[Seen] = []
            for place in self._numbers:
                arrivals = list(islice(self._read(place, self._next[place], BATCH), BATCH))
                if arrivals:
                    self._next[place] = arrivals[-1].position + 1
                    fresh += [(place, a) for a in arrivals if self._matches(a)]
            fresh.sort(key=_time)
            yield from fresh
            if not fresh:
                self._wait()

    def _wait(self) -> None:
        """Until the doorbell rings; without one, a moment."""
        bell = self._file.bell.socket
        select.select([bell] if bell is not None else [], [], [], POLL_SECONDS)
        self._file.bell.drain()

    def _look(self) -> None:
        """Topics and where their partitions end; of topics that came later everything is new."""
        first_time = not self._known

        def work(c: apsw.Connection) -> None:
            for topic, first, partitions in c.execute("select name, first_number, partitions from unlost_topic"):
                if topic in self._known:
                    continue
                self._known.add(topic)
                wanted = range(partitions) if self._key is None else [partition_of(self._key, partitions)]
                for partition in wanted:
                    self._numbers[topic, partition] = first + partition
                    self._next[topic, partition] = partition_range(c, first + partition)[1] if first_time else 0

        self._file.read(work)

    def _forwards(self, place: Place, start: int, end: int) -> Iterator[Arrival]:
        number = self._numbers[place]
        at = max(start, self._file.read(lambda c: partition_range(c, number)[0]))
        while at < end:
            arrivals = self._read(place, at, min(BATCH, end - at))
            if not arrivals:
                return
            at = arrivals[-1].position + 1
            yield from (a for a in arrivals if self._matches(a))

    def _backwards(self, place: Place, count: int) -> list[Arrival]:
        number, end = self._numbers[place], self._next[place]
        start = self._file.read(lambda c: partition_range(c, number)[0])
        found: list[Arrival] = []
        while end > start and len(found) < count:
            at = max(start, end - BATCH)
            batch: list[Arrival] = []
            while at < end:  # a read may be cut short by its size
                part = self._read(place, at, end - at)
                if not part:
                    break
                batch += part
                at = part[-1].position + 1
            found = [a for a in batch if self._matches(a)] + found
            end = max(start, end - BATCH)
        return found[-count:] if count else []

    def _read(self, place: Place, start: int, limit: int) -> Sequence[Arrival]:
        topic, partition = place
        number = self._numbers[place]
        return self._file.read(lambda c: read_partition(self._file.path, c, topic, partition, number, start, limit))

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
