"""What may be done inside one commit of the file: append events, and run statements.

The embedded broker and the SQLite store share this object; that is why "my rows, the new events, the inbox mark
and the position" can be one commit.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import apsw

from unlost.errors import invariant
from unlost.events import Envelope, encode_head, event_hash, partition_of
from unlost.sqlite.schema import POSITION_BITS, POSITION_MAX
from unlost.world import World, new_id

PARTITIONS = 8  # of a topic for which nothing else was said
_COLUMNS = 7
_NUMBERS = struct.Struct("<qqq").pack
_CHUNKS = (256, 64, 16, 4, 1)
_INSERT = {
    n: "insert into unlost_log (at, head, key, data, recorded, digest, crc) values " + ",".join(["(?,?,?,?,?,?,?)"] * n)
    for n in _CHUNKS
}


class TopicRow(NamedTuple):
    name: str
    id: str
    first_number: int
    partitions: int
    retention: int | None


class Appended(NamedTuple):
    """Where an event stands in the log."""

    partition: int
    position: int
    recorded: int


class LogRow(NamedTuple):
    at: int
    head: bytes
    key: bytes | None
    data: bytes | None
    recorded: int
    digest: int
    crc: int

    @property
    def position(self) -> int:
        return self.at & POSITION_MAX

    def intact(self) -> bool:
        return self.crc == row_crc(self.at, self.head, self.key, self.data, self.recorded, self.digest)


def row_crc(at: int, head: bytes, key: bytes | None, data: bytes | None, recorded: int, digest: int) -> int:
    try:
        crc = zlib.crc32(_NUMBERS(at, recorded, digest))
        crc = zlib.crc32(head, crc)
        if key is not None:
            crc = zlib.crc32(key, crc)
        if data is not None:
            crc = zlib.crc32(data, crc)
    except (TypeError, struct.error):
        return -1  # a column of another type: somebody else wrote it, and no checksum is negative
    return crc


class Transaction:
    """The open transaction of the writer connection. Never leaves the writer, but for blocks (see `turn.py`)."""

    def __init__(self, connection: apsw.Connection, world: World) -> None:
        self.connection = connection
        self.world = world
        self.topic_defaults: dict[str, tuple[int, int | None]] = {}
        self.news = False  # something in this commit concerns those who wait: they are woken after it
        self._rows: list[Any] = []
        self._tails: dict[int, tuple[int, int]] = {}  # partition number -> next position, digest
        self._topics: dict[str, TopicRow] = {}
        self._data_version = -1
        self._turn = 0  # where events without a key go next
        self._count = 0  # of events ever appended: unlike the rows in hand, it does not fall when they are written

    def begin(self) -> None:
        """Starts a commit. What was cached is dropped if anybody else has committed since."""
        self.news = False
        self._rows.clear()
        version = self.connection.pragma("data_version")
        if version != self._data_version:
            self._data_version = version
            self._tails.clear()
            self._topics.clear()

    def forget(self) -> None:
        """After a rollback: nothing cached is trusted."""
        self._rows.clear()
        self._tails.clear()
        self._topics.clear()

    def forget_topics(self) -> None:
        """After they were changed. What others of this commit have appended stays."""
        self._topics.clear()

    def execute(self, sql: str, bindings: Sequence[Any] = ()) -> apsw.Cursor:
        return self.connection.execute(sql, bindings)

    def rows(self, sql: str, bindings: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        return list(self.connection.execute(sql, bindings))

    def one(self, sql: str, bindings: Sequence[Any] = ()) -> Any:
        """The first row, or None."""
        return self.connection.execute(sql, bindings).fetchone()

    def changes(self) -> int:
        """Grows with every row written in this commit; for noticing whether something was written at all."""
        return int(self.connection.total_changes()) + self._count

    def topic(self, name: str) -> TopicRow:
        row = self._topics.get(name)
        if row is None:
            found = self.one(
                "select name, id, first_number, partitions, retention from unlost_topic where name = ?",
                (name,),
            )
            if found is None:
                return self.create_topic(name, *self.topic_defaults.get(name, (PARTITIONS, None)))
            row = self._topics[name] = TopicRow(*found)
        return row

    def create_topic(self, name: str, partitions: int, retention: int | None, id: str = "") -> TopicRow:
        """Makes a topic that is not there yet; its partitions get the next free numbers. `id` is that of a topic of
        another broker's log, of which only the numbers are kept here."""
        self.flush()
        following = self.one("select coalesce(max(first_number + partitions), 0) from unlost_topic")[0]
        row = self._topics[name] = TopicRow(name, id or new_id(), following, partitions, retention)
        self.execute("insert into unlost_topic values (?, ?, ?, ?, ?, ?)", (*row, self.world.now()))
        return row

    def append(self, envelopes: Iterable[Envelope]) -> list[Appended]:
        """Gives each event the next position of its partition. Durable when this commit is."""
        recorded = self.world.now()
        self.news = True
        tails, rows, result = self._tails, self._rows, []
        for e in envelopes:
            topic = self._topics.get(e.topic) or self.topic(e.topic)
            if e.key is None:
                self._turn += 1
                partition = self._turn % topic.partitions
            else:
                partition = partition_of(e.key, topic.partitions)
            number = topic.first_number + partition
            position, digest = tails.get(number) or self._tail(number)
            digest ^= event_hash(e.source, e.id)
            at = number << POSITION_BITS | position
            head = encode_head(e)
            rows.extend(
                (
                    at,
                    head,
                    e.key,
                    e.data,
                    recorded,
                    digest,
                    row_crc(at, head, e.key, e.data, recorded, digest),
                )
            )
            tails[number] = (position + 1, digest)
            self._count += 1
            result.append(Appended(partition, position, recorded))
        return result

    def flush(self) -> None:
        """Writes the appended rows, many per statement: each statement is one trip out of the interpreter."""
        rows = self._rows
        if not rows:
            return
        done, total = 0, len(rows) // _COLUMNS
        for size in _CHUNKS:
            while total - done >= size:
                self.connection.execute(_INSERT[size], rows[done * _COLUMNS : (done + size) * _COLUMNS])
                done += size
        rows.clear()

    def savepoint(self) -> dict[int, tuple[int, int]]:
        self.flush()
        self.connection.execute("savepoint unlost_part")
        return dict(self._tails)

    def release(self) -> None:
        self.flush()
        self.connection.execute("release unlost_part")

    def rollback_to(self, saved: dict[int, tuple[int, int]]) -> None:
        self._rows.clear()
        self.connection.execute("rollback to unlost_part")
        self.connection.execute("release unlost_part")
        self._tails = saved
        self._topics.clear()

    def _tail(self, number: int) -> tuple[int, int]:
        low, high = number << POSITION_BITS, number << POSITION_BITS | POSITION_MAX
        row = self.one(
            "select at, digest from unlost_log where at between ? and ? order by at desc limit 1", (low, high)
        )
        tail = (0, 0) if row is None else ((row[0] & POSITION_MAX) + 1, row[1])
        invariant(tail[0] < POSITION_MAX, "a partition holds at most 2^40 events")
        self._tails[number] = tail
        return tail
