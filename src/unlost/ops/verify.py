"""`unlost doctor --verify`: reads everything that is stored, and names the places where it is not what was written.

Rows are read in small batches, each from a snapshot of its own: memory is bounded, and the WAL of a live file is not held
back. A backup is read by the same code before it gets its name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import msgspec

from unlost.brokers.port import Log
from unlost.errors import Damaged, UnlostError
from unlost.events import decode_head, event_hash
from unlost.sqlite.schema import POSITION_BITS, POSITION_MAX, RETIRED
from unlost.sqlite.transaction import LogRow
from unlost.store.port import Look
from unlost.store.progress import Runs

T = TypeVar("T")
BATCH = 500  # rows of one snapshot
BATCH_BYTES = 4 * 1024 * 1024  # of one look at another broker's log, about
NAMED_MAX = 100
SQLITE_SAYS_MAX = 20  # lines of its own check

Said = Callable[[str, int], None]  # what is being read, and how many rows of it were read so far


class Snapshots(Protocol):
    """Where rows are read: `Records`, or a file that nobody else has open."""

    def read(self, work: Callable[[Look], T]) -> T: ...


class Damage(msgspec.Struct, frozen=True, kw_only=True):
    """Something that is not as it was written. `place` is topic/partition:position where there is one."""

    table: str
    place: str
    what: str
    severity: Literal["error", "warning"] = "error"


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """What was read, by table (`log` for a broker elsewhere), and the first damages."""

    rows: Mapping[str, int]
    damages: Sequence[Damage]
    more: int = 0  # damages that are not named
    empty: int = 0  # positions of another broker's log without an event: markers of transactions, or compacted


def nothing(_what: str, _rows: int) -> None:
    """Says nothing."""


def verify_file(source: Snapshots, *, said: Said = nothing) -> Verified:
    """Reads every row of a file of ours: checksums, positions without a gap, the chain of digests, what must be decodable,
    copies on the shelf and in the waiting room against the log; and SQLite's own check of its pages and indexes."""
    reading = _Reading(source, said)
    reading.pages()
    log = _read_log(reading)
    _read_progress(reading, log)
    _read_copies(reading, log)
    _read_outbox(reading)
    _read_lists(reading)
    return reading.result()


def verify_tables(source: Snapshots, *, said: Said = nothing) -> Verified:
    """The same for a store on a server, which checks its own pages: what must be decodable is decoded."""
    reading = _Reading(source, said)
    _read_progress(reading, None)
    _read_copies(reading, None)
    _read_lists(reading)
    return reading.result()


def verify_log(log: Log, names: Collection[str] | None = None, *, said: Said = nothing) -> Verified:
    """Reads a broker's log through its port, from the first position of each partition to what was its end."""
    reading = _Reading(None, said)
    empty = 0
    for info in sorted(log.topics(names), key=lambda t: t.name):
        for partition, (start, end) in enumerate(info.ranges):
            at = start
            while at < end:
                try:
                    arrivals = log.read(info.name, partition, at, BATCH)
                except Damaged as e:
                    reading.found("log", f"{info.name}/{partition}:{at}", f"cannot be read from here on: {e.what}")
                    break
                if not arrivals:
                    empty += end - at
                    break
                for a in arrivals:
                    if a.position >= end:
                        break
                    if a.position < at:
                        reading.found("log", f"{info.name}/{partition}:{a.position}", f"comes after {at - 1}")
                    empty += max(0, a.position - at)
                    at = a.position + 1
                    reading.count("log", 1)
                    if a.envelope is None:
                        place = f"{info.name}/{partition}:{a.position}"
                        reading.found(
                            "log",
                            place,
                            f"is no event that can be decoded: {a.problem.partition(chr(10))[0]}",
                            "warning",
                        )
                else:
                    continue
                empty += end - at
                break
            for first, last in log.holes(info.name, partition):
                reading.found("log", f"{info.name}/{partition}:{first}", f"positions {first} to {last - 1} are missing")
    return reading.result(empty)


class _Topic(NamedTuple):
    name: str
    first_number: int
    partitions: int
    retention: int | None


class _LogSeen(NamedTuple):
    """What the log of a file was when it was read."""

    topics: Mapping[str, _Topic]
    ends: Mapping[tuple[str, int], int]
    here: bool  # this file has a log at all


class _Reading:
    """Counts rows and damages, and reads tables in batches."""

    def __init__(self, source: Snapshots | None, said: Said) -> None:
        self._source = source
        self._said = said
        self._rows: Counter[str] = Counter()
        self._damages: list[Damage] = []
        self._more = 0

    def read(self, work: Callable[[Look], T]) -> T:
        assert self._source is not None
        return self._source.read(work)

    def found(self, table: str, place: str, what: str, severity: Literal["error", "warning"] = "error") -> None:
        damage = Damage(table=table, place=place, what=what, severity=severity)
        if damage in self._damages:
            return  # a batch that was read twice
        if len(self._damages) < NAMED_MAX:
            self._damages.append(damage)
        else:
            self._more += 1

    def count(self, table: str, rows: int) -> None:
        self._rows[table] += rows
        self._said(table, self._rows[table])

    def result(self, empty: int = 0) -> Verified:
        return Verified(rows=dict(self._rows), damages=self._damages, more=self._more, empty=empty)

    def pages(self) -> None:
        self._said("pages and indexes", 0)
        try:
            lines = self.read(lambda look: look.execute(f"pragma integrity_check({SQLITE_SAYS_MAX})").fetchall())
        except Damaged as e:
            self.found("pages", "", f"SQLite cannot read them: {e.found or e.what}")
            return
        for (line,) in lines:
            if line != "ok":
                self.found("pages", "", f"SQLite says: {line}")

    def scan(
        self, table: str, columns: str, keys: str, check: Callable[[Look, list[tuple[Any, ...]]], None],
        *, where: str = "", bindings: Sequence[Any] = (), place: Callable[[tuple[Any, ...] | None], str] | None = None,
    ) -> None:  # fmt: skip
        """Every row, in the order of `keys`, which are the first columns. Where a page cannot be read, the last row
        before it is named, and the rest is left."""
        width, size = keys.count(",") + 1, BATCH
        after: tuple[Any, ...] | None = None

        def batch(look: Look) -> tuple[int, tuple[Any, ...] | None]:
            parts = [where] if where else []
            values = [*bindings]
            if after is not None:
                parts.append(f"({keys}) > ({', '.join('?' * width)})")
                values += after
            condition = " where " + " and ".join(parts) if parts else ""
            rows = look.execute(
                f"select {columns} from {table}{condition} order by {keys} limit {size}", values
            ).fetchall()
            if rows:
                check(look, rows)
            return len(rows), tuple(rows[-1][:width]) if rows else None

        while True:
            try:
                number, last = self.read(batch)
            except Damaged as e:
                if size > 1:
                    size = 1  # to name the very row
                    continue
                where_ = place(after) if place is not None else "the first row" if after is None else f"after {after}"
                self.found(table, where_, f"cannot be read from here on: {e.found or e.what}")
                return
            self.count(table, number)
            if number < size:
                return
            after = last


# --- the log of a file -----------------------------------------------------------------------------------


def _read_log(reading: _Reading) -> _LogSeen:
    try:
        topics, here = reading.read(_topics)
    except Damaged as e:
        reading.found("unlost_topic", "", f"cannot be read: {e.found or e.what}")
        return _LogSeen({}, {}, False)
    ends = {}
    for t in topics:
        for partition in range(t.partitions):
            ends[t.name, partition] = _read_partition(reading, t, partition)
    try:
        for at, rows in reading.read(lambda look: list(_strangers(look, topics))):
            reading.found("unlost_log", f"row {at}", f"{rows} rows belong to no topic")
    except Damaged as e:
        reading.found("unlost_log", "", f"cannot be read: {e.found or e.what}")
    return _LogSeen({t.name: t for t in topics}, ends, here)


def _topics(look: Look) -> tuple[list[_Topic], bool]:
    rows = look.execute("select name, first_number, partitions, retention from unlost_topic order by first_number")
    other = look.execute("select 1 from unlost_meta where name = 'broker'").fetchone()
    return [_Topic(*row) for row in rows.fetchall()], other is None


def _strangers(look: Look, topics: Sequence[_Topic]) -> Iterator[tuple[int, int]]:
    """Rows at addresses that no partition has: the first of each range of them, and how many."""
    bounds = [-(1 << 62)]
    for t in topics:
        bounds += [t.first_number << POSITION_BITS, (t.first_number + t.partitions) << POSITION_BITS]
    bounds.append(1 << 62)
    for low, high in zip(bounds[::2], bounds[1::2], strict=True):
        first, rows = look.execute(
            "select min(at), count(*) from unlost_log where at >= ? and at < ?", (low, high)
        ).fetchone()
        if rows:
            yield first, rows


def _read_partition(reading: _Reading, topic: _Topic, partition: int) -> int:
    """Every row of it; returns the position after the last."""
    low = (topic.first_number + partition) << POSITION_BITS
    last: LogRow | None = None

    def named(position: int) -> str:
        return f"{topic.name}/{partition}:{position}"

    def check(look: Look, rows: list[tuple[Any, ...]]) -> None:
        nonlocal last
        before = last
        for raw in rows:
            row = LogRow(*raw)
            if before is None:
                _check_front(reading, look, topic, partition, row.position)
            elif row.position != before.position + 1:
                still = look.execute("select 1 from unlost_log where at = ?", (before.at,)).fetchone()
                if still is not None:  # else it was trimmed meanwhile, and what followed it as well
                    first, end = before.position + 1, row.position - 1
                    what = f"position {first} is" if first == end else f"positions {first} to {end} are"
                    reading.found("unlost_log", named(first), f"{what} missing")
                before = None
            _check_row(reading, row, before, topic.name, named(row.position))
            before = row
        last = before

    def place(after: tuple[Any, ...] | None) -> str:
        return named(0 if after is None else (after[0] & POSITION_MAX) + 1)

    reading.scan(
        "unlost_log", "at, head, key, data, recorded, digest, crc", "at", check,
        where="at between ? and ?", bindings=(low, low | POSITION_MAX), place=place,
    )  # fmt: skip
    return 0 if last is None else last.position + 1


def _check_row(reading: _Reading, row: LogRow, before: LogRow | None, topic: str, place: str) -> None:
    if not row.intact():
        reading.found("unlost_log", place, "does not match its checksum")
        return
    try:
        e = decode_head(row.head, topic=topic, key=row.key, data=None)
    except UnlostError as error:
        reading.found("unlost_log", place, f"is no event that can be decoded: {error.what}")
        return
    chain = before.digest if before is not None else 0 if row.position == 0 else None
    if chain is not None and chain ^ event_hash(e.source, e.id) != row.digest:
        reading.found("unlost_log", place, "does not continue the digests before it")


def _check_front(reading: _Reading, look: Look, topic: _Topic, partition: int, first: int) -> None:
    """Only trimming may have taken the first rows, and it takes none that somebody still needs."""
    if not first:
        return
    needed = [
        f"{service} is at {position}"
        for service, position in look.execute(
            "select service, position from unlost_progress where topic = ?1 and partition = ?2 and position < ?3 "
            f"and service not in ({RETIRED}) "
            "union all select service, position from unlost_waiting where topic = ?1 and partition = ?2 and position < ?3 "
            "union all select service, position from unlost_shelf where topic = ?1 and partition = ?2 and position < ?3 "
            "union all select service, position from unlost_follower where topic = ?1 and partition = ?2 and position < ?3 "
            "order by 2 limit 3",
            (topic.name, partition, first),
        ).fetchall()
    ]
    if needed:
        reading.found(
            "unlost_log", f"{topic.name}/{partition}:0", f"positions below {first} are missing, and {', '.join(needed)}"
        )
    elif topic.retention is None:
        reading.found(
            "unlost_log", f"{topic.name}/{partition}:0", f"positions below {first} are missing, and no retention is declared now",
            "warning",
        )  # fmt: skip


# --- the other tables ------------------------------------------------------------------------------------


def _read_progress(reading: _Reading, log: _LogSeen | None) -> None:
    def check(look: Look, rows: list[tuple[Any, ...]]) -> None:
        for service, topic, partition, start, position, fated, counts, attempts in rows:
            place = f"{service} {topic}/{partition}"
            last = position
            try:
                runs = list(Runs.decode(bytes(fated)))
                last = max(position, runs[-1][1] if runs else 0)
                msgspec.json.decode(counts, type=dict[str, Any])
                msgspec.json.decode(attempts, type=dict[str, Any])
            except (Damaged, msgspec.MsgspecError, TypeError, ValueError) as e:
                reading.found("unlost_progress", place, f"cannot be decoded: {e}")
            if position < start:
                reading.found("unlost_progress", place, f"position {position} is before its start {start}")
            end = None if log is None or not log.here else log.ends.get((topic, partition))
            if end is not None and last > max(end, start):
                # the log is read before it: look again, for events that came in between
                now = _end(look, log, topic, partition)
                if last > max(now, start):
                    reading.found(
                        "unlost_log", f"{topic}/{partition}:{now}", f"the end is missing: {service} has handled up to {last - 1}"
                    )  # fmt: skip

    reading.scan(
        "unlost_progress", "service, topic, partition, start, position, fated, counts, attempts",
        "service, topic, partition", check,
    )  # fmt: skip


def _end(look: Look, log: _LogSeen | None, topic: str, partition: int) -> int:
    assert log is not None
    low = (log.topics[topic].first_number + partition) << POSITION_BITS
    row = look.execute("select max(at) from unlost_log where at between ? and ?", (low, low | POSITION_MAX)).fetchone()
    return 0 if row[0] is None else row[0] - low + 1


def _read_copies(reading: _Reading, log: _LogSeen | None) -> None:
    """The shelf and the waiting room: each row is a whole event, and where the log is here, the same as there."""

    def check(table: str, name: str, place: str, row: tuple[Any, ...], look: Look) -> None:
        topic, partition, position, key, text, head, data, recorded = row
        try:
            decode_head(bytes(head), topic=topic, key=key, data=None)
        except UnlostError as e:
            if name != "undecodable":
                reading.found(table, place, f"is no event that can be decoded: {e.what}")
        try:
            msgspec.json.decode(text)
        except (msgspec.MsgspecError, TypeError) as e:
            reading.found(table, place, f"its attempts cannot be decoded: {e}")
        known = log.topics.get(topic) if log is not None and log.here else None
        if known is None:
            return
        at = (known.first_number + partition) << POSITION_BITS | position
        there = look.execute("select head, key, data, recorded from unlost_log where at = ?", (at,)).fetchone()
        if there is None:
            reading.found(table, place, "its event is not in the log, and trimming never takes such a one")
        elif tuple(there) != (head, key, data, recorded):
            reading.found(table, place, "is not the event that the log has at this place")

    def shelf(look: Look, rows: list[tuple[Any, ...]]) -> None:
        for number, reason, *row in rows:
            check("unlost_shelf", reason, f"{row[0]}/{row[1]}:{row[2]} (number {number})", tuple(row), look)

    def waiting(look: Look, rows: list[tuple[Any, ...]]) -> None:
        for service, *row in rows:
            check("unlost_waiting", "", f"{row[0]}/{row[1]}:{row[2]} ({service})", tuple(row), look)

    reading.scan(
        "unlost_shelf", "number, reason, topic, partition, position, key, attempts, head, data, recorded", "number", shelf
    )  # fmt: skip
    reading.scan(
        "unlost_waiting", "service, topic, partition, position, key, history, head, data, recorded",
        "service, topic, partition, position", waiting,
    )  # fmt: skip


def _read_outbox(reading: _Reading) -> None:
    def check(_look: Look, rows: list[tuple[Any, ...]]) -> None:
        for number, topic, key, head, raw in rows:
            try:
                if raw is None:
                    decode_head(bytes(head), topic=topic, key=key, data=None)
                else:
                    msgspec.json.decode(raw, type=dict[str, Any])
            except (UnlostError, msgspec.MsgspecError, TypeError) as e:
                what = e.what if isinstance(e, UnlostError) else str(e)
                reading.found("unlost_outbox", f"{topic}, number {number}", f"cannot be decoded: {what}")

    reading.scan("unlost_outbox", "number, topic, key, head, raw", "number", check)


def _read_lists(reading: _Reading) -> None:
    """The inbox and the ledger: many small rows, whose values must be of the kind that was written."""

    def inbox(_look: Look, rows: list[tuple[Any, ...]]) -> None:
        for service, id, source, content in rows:
            if not (
                isinstance(content, int) and id and all(isinstance(text, str) and text for text in (service, source))
            ):
                reading.found("unlost_inbox", f"{service} {id}", "is no mark of an event")

    def ledger(_look: Look, rows: list[tuple[Any, ...]]) -> None:
        for service, topic, partition, position, state, id in rows:
            if not (isinstance(position, int) and isinstance(id, str) and state):
                reading.found(
                    "unlost_ledger", f"{topic}/{partition}:{position} ({service})", "is no line of the ledger"
                )

    reading.scan("unlost_inbox", "service, id, source, content", "service, id, source", inbox)
    reading.scan(
        "unlost_ledger", "service, topic, partition, position, state, id", "service, topic, partition, position", ledger
    )  # fmt: skip
