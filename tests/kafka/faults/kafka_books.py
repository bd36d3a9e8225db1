"""The books of a store beside Kafka, balanced by somebody else: with other code than the product's own audit.

The log is read from its beginning with a plain client. Each position of it must have exactly one outcome in each
service: counted, listed one by one, or part of a named gap.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import apsw
from confluent_kafka import OFFSET_BEGINNING, Consumer, IsolationLevel, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

from unlost.delivery.note import Note, decode
from unlost.events import event_hash

SECONDS = 30.0
LOOK_SECONDS = 4.0  # the cluster may be away just now, and the next look is soon


class Unit(NamedTuple):
    service: str
    topic: str
    partition: int


class Row(NamedTuple):
    start: int
    position: int
    fated: list[tuple[int, int]]
    counts: dict[str, int]
    digest: int


@functools.lru_cache(4)
def admin(bootstrap: str) -> AdminClient:
    return AdminClient({"bootstrap.servers": bootstrap, "log_level": 0, "reconnect.backoff.max.ms": 200})


def ends(bootstrap: str, places: Sequence[tuple[str, int]]) -> dict[tuple[str, int], int]:
    """The position after the last event that readers may see, by the topics' names on the cluster."""
    if not places:
        return {}
    asked = admin(bootstrap).list_offsets(
        {TopicPartition(*p): OffsetSpec.latest() for p in places},
        isolation_level=IsolationLevel.READ_COMMITTED, request_timeout=SECONDS,
    )  # fmt: skip
    return {(p.topic, p.partition): f.result(SECONDS).offset for p, f in asked.items()}


def noted(bootstrap: str, prefix: str, units: Iterable[Unit]) -> dict[Unit, tuple[int, Note | None]]:
    """What the cluster remembers of these units for their groups, with our note beside it.

    Asked as a consumer that takes part in nothing: the admin client's request for the same has ended this whole
    process by an assertion of its own (`rd_kafka_enq_once_del_source_return`, 2.16.0) when its broker was killed.
    """
    told: dict[Unit, tuple[int, Note | None]] = {}
    by_service: dict[str, list[Unit]] = {}
    for unit in units:
        by_service.setdefault(unit.service, []).append(unit)
    for service, chosen in by_service.items():
        places = [TopicPartition(prefix + unit.topic, unit.partition) for unit in chosen]
        for p in _asking(bootstrap, prefix + service).committed(places, LOOK_SECONDS):
            if p.error is not None:
                raise KafkaException(p.error)
            if p.offset >= 0:
                told[Unit(service, p.topic[len(prefix) :], p.partition)] = (p.offset, decode(p.metadata or ""))
    return told


@functools.lru_cache(100)
def _asking(bootstrap: str, group: str) -> Consumer:
    return Consumer({"bootstrap.servers": bootstrap, "group.id": group, "log_level": 0, "enable.auto.commit": False})


def events(bootstrap: str, places: Sequence[tuple[str, int]]) -> dict[tuple[str, int], dict[int, int]]:
    """Every event of these partitions that the log holds: position -> hash of its source and id (0: no event)."""
    last = ends(bootstrap, places)
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap, "group.id": "proof", "enable.auto.commit": False, "log_level": 0,
            "auto.offset.reset": "earliest", "enable.partition.eof": True, "isolation.level": "read_committed",
        }
    )  # fmt: skip
    found: dict[tuple[str, int], dict[int, int]] = {place: {} for place in places}
    try:
        open_ = {place for place in places if last[place] > 0}
        consumer.assign([TopicPartition(*place, OFFSET_BEGINNING) for place in open_])
        idle = 0
        while open_:
            messages = consumer.consume(1000, 1.0)
            idle = 0 if messages else idle + 1
            if idle > SECONDS:
                raise TimeoutError(f"these cannot be read to their end: {sorted(open_)}")
            for m in messages:
                place = (m.topic(), m.partition())
                if m.error() is not None:
                    if m.error().name() == "_PARTITION_EOF" and m.offset() >= last[place]:
                        open_.discard(place)
                    continue
                headers = dict(m.headers() or ())
                try:
                    if headers["ce_specversion"] != b"1.0" or len(headers) < len(m.headers()):
                        raise KeyError  # no event to anybody
                    known = event_hash(headers["ce_source"].decode(), headers["ce_id"].decode())
                except (KeyError, AttributeError, UnicodeDecodeError):
                    known = 0
                found[place][m.offset()] = known
    finally:
        consumer.close()
    return found


def positions(store: Path) -> dict[Unit, int]:
    with _reading(store) as c:
        return {
            Unit(s, t, p): at
            for s, t, p, at in c.execute("select service, topic, partition, position from unlost_progress")
        }


def balance(store: Path, bootstrap: str, prefix: str, *, whole: bool = True) -> list[str]:
    """What does not balance, or is still open. `whole`: compare with every event of the log, which takes longer."""
    with _reading(store) as c:
        rows = {
            Unit(s, t, p): Row(start, position, _runs(fated), json.loads(counts), digest)
            for s, t, p, start, position, fated, counts, digest in c.execute(
                "select service, topic, partition, start, position, fated, counts, digest from unlost_progress"
            )
        }
        listed: dict[Unit, dict[int, str]] = {}
        for s, t, p, position, state in c.execute(
            "select service, topic, partition, position, state from unlost_ledger"
        ):
            listed.setdefault(Unit(s, t, p), {})[position] = state
        gaps: dict[Unit, list[tuple[int, int]]] = {}
        for s, t, p, a, b in c.execute('select service, topic, partition, start, "end" from unlost_gap'):
            gaps.setdefault(Unit(s, t, p), []).append((a, b))
        unsent = c.execute("select count(*) from unlost_outbox").fetchone()[0]
        later = c.execute("select count(*) from unlost_delayed").fetchone()[0]
    found = [f"{unsent} events are still in the outbox"] if unsent else []
    found += [f"{later} events are still delayed"] if later else []
    places = sorted({(prefix + u.topic, u.partition) for u in rows})
    last = ends(bootstrap, places)
    for unit, row in rows.items():
        end = last[prefix + unit.topic, unit.partition]
        if row.position < end:
            found.append(f"{unit} is at {row.position} of {end}")
        elif row.position > end:
            found.append(f"{unit} is at {row.position}, and the log ends at {end}")
        states = Counter(listed.get(unit, {}).values())
        open_ = sum(states[s] for s in ("retrying", "parked", "dead"))
        if open_:
            found.append(f"{unit}: {open_} events are retried, parked or dead: {dict(states)}")
    if whole and not found:
        log = events(bootstrap, places)
        for unit, row in rows.items():
            found += _wrong(
                unit, row, listed.get(unit, {}), gaps.get(unit, []), log[prefix + unit.topic, unit.partition]
            )
    return found


def _wrong(
    unit: Unit, row: Row, listed: dict[int, str], gaps: list[tuple[int, int]], log: dict[int, int]
) -> Iterator[str]:
    whole = [(row.start, row.position)] if row.position > row.start else []
    if row.fated != whole:
        yield f"{unit}: outcomes are of {row.fated}, and the position is {row.position} from {row.start} on"
    named = sum(b - a for a, b in gaps)
    outcomes = sum(row.counts.values()) + len(listed) + named
    if outcomes != row.position - row.start:
        yield f"{unit}: {outcomes} outcomes for {row.position - row.start} positions: {row.counts}, {len(listed)} listed, {named} in gaps"
    held = {p for p in log if p >= row.start}
    first = min(log, default=row.position)
    below = max(0, first - row.start)  # what is not in the log any more, and may have been handled before that
    void = row.position - row.start - below - sum(b - max(a, first) for a, b in gaps if b > first) - len(held)
    if row.counts.get("void", 0) != void and not (below and row.counts.get("void", 0) > void):
        yield f"{unit}: {row.counts.get('void', 0)} positions are said to be empty, {void} are"
    for a, b in gaps:
        if there := [p for p in held if a <= p < b]:
            yield f"{unit}: {len(there)} events of a gap {a}..{b} are in the log"
    digest = 0
    for position in held:
        digest ^= log[position]
    if digest != row.digest and not below:
        yield f"{unit}: the events that got an outcome are not those of the log"


def _runs(raw: bytes) -> list[tuple[int, int]]:
    """The saved form: LEB128 varints, in turn what lies before a run and how long it is."""
    numbers, value, shift = list[int](), 0, 0
    for byte in raw:
        value |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            numbers.append(value)
            value = shift = 0
    runs, at = list[tuple[int, int]](), 0
    for gap, length in zip(numbers[::2], numbers[1::2], strict=True):
        runs.append((at + gap, at + gap + length))
        at += gap + length
    return runs


class _reading:
    def __init__(self, path: Path) -> None:
        self._connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
        self._connection.set_busy_timeout(5000)

    def __enter__(self) -> apsw.Connection:
        self._connection.execute("begin")  # one snapshot
        return self._connection

    def __exit__(self, *_: object) -> None:
        self._connection.close()
