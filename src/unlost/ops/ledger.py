"""Statements of the books beside the log: one per (service, topic, partition), for whoever has no hold of the store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import msgspec

from unlost.audit import Passed
from unlost.brokers.port import Entry, Ledger, Log
from unlost.errors import UsageError
from unlost.ops.books import Stored, stored
from unlost.store.port import Records
from unlost.world import REAL, rfc3339

SCHEMA: Literal["unlost.statement/1"] = "unlost.statement/1"


class Statement(msgspec.Struct, frozen=True, kw_only=True):
    """What one store says of one unit at one time. `counts` has every state; positions below `position` are all in it,
    and those of them that came later."""

    schema: Literal["unlost.statement/1"] = SCHEMA
    store: str
    service: str
    topic: str
    partition: int
    topic_id: str
    start: int
    position: int
    counts: dict[str, int]
    digest: int  # XOR of the event hashes of everything that has an outcome
    gaps: Sequence[Passed]
    time: str

    @property
    def key(self) -> str:
        return f"{self.service}/{self.topic}/{self.partition}"


class Statements(msgspec.Struct, frozen=True, kw_only=True):
    """What a ledger says. `unreadable` names what could not be read: it is not applied, and not hidden either."""

    by_key: dict[str, Statement]
    unreadable: Sequence[str]


def place(log: Log) -> Ledger:
    """
    Raises:
        UsageError: this broker has no place for statements.
    """
    found = log.ledger()
    if found is None:
        raise UsageError(
            "UL1340", "the embedded broker lacks the ability to keep statements beside the log",
            found="its books stand in the same file as its log",
            fix="leave --export out; a copy of the file has both, and unlost audit --json writes the books elsewhere",
        )  # fmt: skip
    return found


def export(records: Records, ledger: Ledger, services: Sequence[str] | None = None) -> int:
    """Writes a statement of every unit (or of those services); returns how many. Doing it again replaces them."""
    now = rfc3339(REAL.now())
    found = [
        _statement(records.id, s, now)
        for s in records.read(lambda look: stored(records, look))
        if not services or s.unit.service in services
    ]
    ledger.write({statement.key: msgspec.json.encode(statement) for statement in found})
    return len(found)


def read(log: Log) -> Statements:
    """The last statement of each unit.

    Raises:
        UsageError: this broker has no place for statements. Unavailable: it does not answer.
    """
    by_key: dict[str, Statement] = {}
    unreadable: list[str] = []
    for entry in place(log).read():
        if entry.value is None:
            continue  # taken back
        found = _read(entry)
        if isinstance(found, str):
            unreadable.append(f"{entry.place}: {found}")
        else:
            by_key[found.key] = found
    return Statements(by_key=by_key, unreadable=unreadable)


def _statement(store: str, s: Stored, now: str) -> Statement:
    counts = Counter(s.counts)
    counts.update(line.state for line in s.listed)
    for p in s.passed:
        counts[p.kind] += p.end - p.start
    return Statement(
        store=store, service=s.unit.service, topic=s.unit.topic, partition=s.unit.partition, topic_id=s.topic_id,
        start=s.start, position=s.position, counts=dict(sorted(counts.items())), digest=s.digest, gaps=s.passed,
        time=now,
    )  # fmt: skip


def _read(entry: Entry) -> Statement | str:
    try:
        statement = msgspec.json.decode(entry.value or b"", type=Statement)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        return f"{e}"
    if statement.key.encode() != entry.key:
        return f"it is about {statement.key}, and stands under the key {entry.key[:200]!r}"
    return statement
