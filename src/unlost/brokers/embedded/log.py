"""Reading the log: every row is checked before anybody sees it."""

from __future__ import annotations

import select
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial, reduce
from operator import xor
from pathlib import Path
from typing import TypeVar

import apsw

from unlost.brokers.embedded.index import Index
from unlost.brokers.embedded.indexer import Indexer
from unlost.brokers.embedded.rows import harmed, missing
from unlost.brokers.port import Find, Ledger, Place, Survives
from unlost.events import decode_head, event_hash, peek_head
from unlost.events.codec import is_erased
from unlost.events.topic import ERASED, Arrival, TopicInfo
from unlost.sqlite.erase import erase_rows
from unlost.sqlite.file import File
from unlost.sqlite.schema import POSITION_BITS, POSITION_MAX
from unlost.sqlite.transaction import LogRow, Transaction, row_crc
from unlost.world import rfc3339

T = TypeVar("T")
READ_BYTES_MAX = 8 * 1024 * 1024
SURVIVES: Survives = "power loss of one machine"


class EmbeddedLog:
    """The log of a file as operators look at it (`Log`). Nothing is checked but by `read` and `verify`."""

    forgets = False  # trimming never passes an event without an outcome

    def __init__(self, file: File) -> None:
        self._file = file

    @property
    def identity(self) -> str:
        return f"embedded {self._file.store_id}"

    def together(self, work: Callable[[], T]) -> T:
        return self._file.read(lambda _: work())

    def names(self) -> Sequence[str]:
        return self._file.read(lambda c: [name for (name,) in c.execute("select name from unlost_topic order by name")])

    def topics(self, names: Collection[str] | None = None) -> Sequence[TopicInfo]:
        found = self._file.read(read_topics)
        return found if names is None else [info for info in found if info.name in names]

    def ends(self, places: Collection[Place]) -> Mapping[Place, int]:
        def work(c: apsw.Connection) -> dict[Place, int]:
            numbers = _numbers(c)
            return {place: partition_range(c, n)[1] for place in places if (n := numbers(place)) is not None}

        return self._file.read(work)

    def read(self, topic: str, partition: int, start: int, limit: int) -> Sequence[Arrival]:
        def work(c: apsw.Connection) -> list[Arrival]:
            number = _numbers(c)((topic, partition))
            if number is None:
                return []
            first = max(start, partition_range(c, number)[0])
            return read_partition(self._file.path, c, topic, partition, number, first, limit)

        return self._file.read(work)

    def at(self, topic: str, partition: int, micros: int) -> int:
        """Reads the times of the partition's rows: the log has no index of them, and a clock may have been set back."""

        def work(c: apsw.Connection) -> int:
            number = _numbers(c)((topic, partition))
            if number is None:
                return 0
            low = number << POSITION_BITS
            row = c.execute(
                "select at from unlost_log where at between ? and ? and recorded >= ? order by at limit 1",
                (low, low | POSITION_MAX, micros),
            ).fetchone()
            return partition_range(c, number)[1] if row is None else int(row[0]) - low

        return self._file.read(work)

    def recorded(self, places: Mapping[Place, int]) -> Mapping[Place, int]:
        def work(c: apsw.Connection) -> dict[Place, int]:
            numbers = _numbers(c)
            found = {}
            for place, position in places.items():
                number = numbers(place)
                time = None if number is None else _recorded(c, number, position)
                if time is not None:
                    found[place] = time
            return found

        return self._file.read(work)

    def spans(self, topics: Sequence[TopicInfo]) -> Mapping[str, tuple[int, int]]:
        def work(c: apsw.Connection) -> dict[str, tuple[int, int]]:
            numbers = _numbers(c)
            found = {}
            for t in topics:
                times = [
                    time
                    for partition, (start, end) in enumerate(t.ranges)
                    for position in (start, end - 1)
                    if end > start
                    and (number := numbers((t.name, partition))) is not None
                    and (time := _recorded(c, number, position)) is not None
                ]
                if times:
                    found[t.name] = (min(times), max(times))
            return found

        return self._file.read(work)

    def holes(self, topic: str, partition: int) -> Sequence[tuple[int, int]]:
        def work(c: apsw.Connection) -> list[tuple[int, int]]:
            number = _numbers(c)((topic, partition))
            return [] if number is None else _holes(c, number)

        return self._file.read(work)

    def digest(
        self, topic: str, partition: int, start: int, before: int | None, runs: Sequence[tuple[int, int]]
    ) -> int | None:
        """Each row holds the XOR of all rows up to it, so two look-ups per run suffice."""

        def work(c: apsw.Connection) -> int | None:
            number = _numbers(c)((topic, partition))
            return None if number is None else _digest(c, number, start, before, runs)

        return self._file.read(work)

    def verify(self, limit: int) -> Sequence[str]:
        """Each row's checksum, and its place in the chain of digests."""
        problems: list[str] = []

        def work(c: apsw.Connection) -> None:
            topics = c.execute("select name, first_number, partitions from unlost_topic").fetchall()
            for name, first, partitions in topics:
                for number in range(first, first + partitions):
                    _verify_partition(c, name, number - first, number, problems, limit)

        self._file.read(work)
        return problems

    def ledger(self) -> Ledger | None:
        return None

    @contextmanager
    def finder(self) -> Iterator[Find]:
        index = Index(self._file)
        with suppress(OSError):  # no room, no rights: what the index lacks is read in the log
            for _ in Indexer(self._file).grow():
                pass
        with index.opened() as segments:
            yield partial(index.find, segments)

    def erase(self, topic: str, partition: int, positions: Collection[int], key: bytes) -> int:
        def work(tx: Transaction) -> int:
            number = _numbers(tx.connection)((topic, partition))
            return 0 if number is None else erase_rows(tx, self._file.path, topic, partition, number, positions, key)

        return self._file.write_sync(work)

    def wait(self, seconds: float) -> None:
        """Until the doorbell rings; without one, the whole time."""
        bell = self._file.bell.socket
        select.select([bell] if bell is not None else [], [], [], seconds)
        self._file.bell.drain()

    def close(self) -> None:
        """The file is its owner's to close."""


def read_partition(
    path: Path, connection: apsw.Connection, topic: str, partition: int, number: int, start: int, limit: int
) -> list[Arrival]:
    """Up to `limit` events from `start` on.

    Raises:
        Damaged: a row does not match its checksum, or positions are missing. Nothing is skipped in silence.
    """
    base = number << POSITION_BITS
    found: list[Arrival] = []
    expected = base + start
    size = 0
    rows = connection.execute(
        "select at, head, key, data, recorded, digest, crc from unlost_log where at between ? and ? order by at limit ?",
        (base + start, base | POSITION_MAX, limit),
    )
    try:
        for at, head, key, data, recorded, digest, crc in rows:
            if at != expected:
                raise missing(path, f"{topic}/{partition}", expected - base - 1, at - base)
            if crc != row_crc(at, head, key, data, recorded, digest):
                raise harmed(path, f"{topic}/{partition}", at - base)
            expected += 1
            peeked = peek_head(head)
            if peeked is not None:
                found.append(Arrival(at - base, None, recorded, head, key, data, "", "", topic, *peeked))
            else:
                found.append(_looked_into(at - base, topic, head, key, data, recorded))
            size += len(head) + len(data or b"")
            if size > READ_BYTES_MAX:
                break
    finally:
        rows.close()  # a traceback would keep it open, and with it an old snapshot of the file
    return found


def _looked_into(
    position: int, topic: str, head: bytes, key: bytes | None, data: bytes | None, recorded: int
) -> Arrival:
    """An unusual row; what is wrong with it, if it is no event."""
    try:
        envelope = decode_head(head, topic=topic, key=key, data=data, recordedtime=rfc3339(recorded))
    except Exception as e:
        return Arrival(position, None, recorded, head, key, data, str(e))
    return Arrival(position, envelope, recorded, head, key, data, rule=ERASED if is_erased(head) else "")


def read_topics(connection: apsw.Connection) -> list[TopicInfo]:
    found = []
    rows = connection.execute(
        "select name, id, first_number, partitions, retention from unlost_topic order by name"
    ).fetchall()
    for name, id, first, partitions, retention in rows:
        ranges = [partition_range(connection, number) for number in range(first, first + partitions)]
        found.append(
            TopicInfo(name=name, id=id, partitions=partitions, ranges=ranges, retention=retention, survives=SURVIVES)
        )
    return found


def partition_range(connection: apsw.Connection, number: int) -> tuple[int, int]:
    """First position and the position after the last."""
    low = number << POSITION_BITS
    first = connection.execute(
        "select at from unlost_log where at between ? and ? order by at limit 1", (low, low | POSITION_MAX)
    ).fetchone()
    if first is None:
        return 0, 0
    last = connection.execute(
        "select at from unlost_log where at between ? and ? order by at desc limit 1",
        (low, low | POSITION_MAX),
    ).fetchone()
    return first[0] - low, last[0] - low + 1


def _numbers(c: apsw.Connection) -> Callable[[Place], int | None]:
    topics = {n: (f, p) for n, f, p in c.execute("select name, first_number, partitions from unlost_topic")}

    def number(place: Place) -> int | None:
        first, partitions = topics.get(place[0], (0, 0))
        return first + place[1] if 0 <= place[1] < partitions else None

    return number


def _recorded(c: apsw.Connection, number: int, position: int) -> int | None:
    low = number << POSITION_BITS
    row = c.execute(
        "select recorded from unlost_log where at between ? and ? order by at limit 1",
        (low | position, low | POSITION_MAX),
    ).fetchone()
    return None if row is None else int(row[0])


def _holes(c: apsw.Connection, number: int) -> list[tuple[int, int]]:
    low = number << POSITION_BITS
    first, last, count = c.execute(
        "select min(at), max(at), count(*) from unlost_log where at between ? and ?", (low, low | POSITION_MAX)
    ).fetchone()
    if first is None or count == last - first + 1:
        return []
    rows = c.execute(
        "select before + 1, at from (select at, lag(at) over (order by at) as before from unlost_log "
        "where at between ? and ?) where at > before + 1",
        (low, low | POSITION_MAX),
    )
    return [(a - low, b - low) for a, b in rows]


def _digest(
    c: apsw.Connection, number: int, start: int, start_digest: int | None, runs: Sequence[tuple[int, int]]
) -> int | None:
    low = number << POSITION_BITS

    def upto(position: int) -> int | None:
        if position == start and start_digest is not None:
            return start_digest
        row = c.execute("select digest from unlost_log where at = ?", (low | (position - 1),)).fetchone()
        if row is not None:
            return int(row[0])
        row = c.execute("select digest, head from unlost_log where at = ?", (low | position,)).fetchone()
        if row is None:
            return None
        e = decode_head(
            row[1], topic="", key=None, data=None
        )  # the row before was trimmed: take this one out of its own
        return int(row[0]) ^ event_hash(e.source, e.id)

    parts = []
    for a, b in runs:
        before, after = upto(a), upto(b)
        if before is None or after is None:
            return None  # missing from the log: then the gap is reported as such
        parts.append(before ^ after)
    return reduce(xor, parts, 0)


def _verify_partition(
    c: apsw.Connection, topic: str, partition: int, number: int, problems: list[str], limit: int
) -> None:
    low, before = number << POSITION_BITS, None
    for raw in c.execute(
        "select at, head, key, data, recorded, digest, crc from unlost_log where at between ? and ? order by at",
        (low, low | POSITION_MAX),
    ):
        row = LogRow(*raw)
        if len(problems) >= limit:
            return
        where = f"{topic}/{partition}:{row.position}"
        if not row.intact():
            problems.append(f"{where} does not match its checksum")
        elif before is not None and row.position == before.position + 1:
            try:
                e = decode_head(row.head, topic=topic, key=row.key, data=None)
            except Exception:
                e = None
            if e is not None and before.digest ^ event_hash(e.source, e.id) != row.digest:
                problems.append(f"{where} does not continue the digests before it")
        before = row
