"""The audit of the embedded broker: gathers the evidence in one snapshot and balances it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import xor

import apsw
import msgspec

from unlost.audit import Books, Evidence, Listed, Missing, reconcile
from unlost.errors import UsageError
from unlost.events import decode_head, event_hash
from unlost.sqlite.file import File
from unlost.sqlite.process import Remains, examine, service_hash
from unlost.sqlite.schema import POSITION_BITS, POSITION_MAX
from unlost.sqlite.transaction import LogRow
from unlost.store.progress import Runs

NAMED_MAX = 1000


class Named(msgspec.Struct, frozen=True, kw_only=True):
    """A missing event with all that is known of it."""

    service: str
    topic: str
    partition: int
    position: int
    why: str
    id: str | None
    type: str | None
    key: str | None
    source: str | None
    recorded: int | None
    last_seen: str


def books(file: File, services: Sequence[str] | None = None) -> Books:
    """Balances the books of every service of this broker (or of those named). Exact; reads the log's index once.

    Raises:
        UsageError: a service of that name has never run here.
    """

    def work(c: apsw.Connection) -> Books:
        known = {row[0] for row in c.execute("select name from unlost_service")}
        for name in services or ():
            if name not in known:
                raise UsageError(
                    "UL1331", f"no service {name!r} has run on this broker", found=", ".join(sorted(known)) or "none"
                )
        evidence, traces = gather(file, c), vanished(c)
        if services:
            evidence = [e for e in evidence if e.service in services]
            traces = [(name, text) for name, text in traces if name in services]
        return reconcile(evidence, [text for _, text in traces])

    return file.read(work)


def name_missing(file: File, missing: Sequence[Missing], limit: int = NAMED_MAX) -> list[Named]:
    """Looks up the first missing events: their ids, and in whose hands they were last."""
    return file.read(lambda c: [_name(c, m) for m in missing[:limit]])


def gather(file: File, c: apsw.Connection) -> list[Evidence]:
    numbers: dict[str, int] = dict(c.execute("select name, first_number from unlost_topic").fetchall())
    remains: dict[str, Remains] = {}
    found = []
    rows = c.execute(
        "select service, topic, partition, start, start_digest, owner, position, fated, counts, digest from unlost_progress "
        "order by service, topic, partition"
    ).fetchall()
    logs: dict[int, tuple[int, int, list[tuple[int, int]]]] = {}
    for service, topic, partition, start, start_digest, owner, position, fated, counts, digest in rows:
        number = numbers[topic] + partition
        if number not in logs:
            logs[number] = _log_range(c, number)
        log_start, end, gaps = logs[number]
        runs = list(Runs.decode(fated))
        if owner is not None and owner not in remains:
            remains[owner] = (
                examine(file.run_folder, owner) if owner != file.process_id else Remains(True, False, {}, {})
            )
        read = 0
        if owner is not None and remains[owner].alive:
            read = remains[owner].read.get((service_hash(service), number), 0)
        unit = (service, topic, partition)
        found.append(
            Evidence(
                service=service, topic=topic, partition=partition, start=start, log_start=log_start, end=end,
                log_gaps=gaps, position=position, fated=runs, counts=msgspec.json.decode(counts), digest=digest,
                log_digest=_digest(c, number, start, start_digest, runs),
                listed=[
                    Listed(*row)
                    for row in c.execute(
                        "select position, state, id from unlost_ledger "
                        "where service = ? and topic = ? and partition = ? order by position",
                        unit,
                    )
                ],
                on_shelf=_positions(c, "unlost_shelf", unit),
                in_waiting_room=_positions(c, "unlost_waiting", unit),
                read=read,
            )
        )  # fmt: skip
    return found


def vanished(c: apsw.Connection) -> list[tuple[str, str]]:
    """Units and services of which there are traces, but no saved progress: what became of their events?"""
    traces = " union ".join(
        f"select service, topic, partition from {table}"
        for table in ("unlost_assignment", "unlost_epoch", "unlost_ledger", "unlost_waiting", "unlost_shelf")
    )
    units = c.execute(
        f"select service, topic, partition from ({traces}) except select service, topic, partition from unlost_progress "
        "order by 1, 2, 3"
    ).fetchall()
    found = [
        (service, f"{service} {topic}/{partition}: its saved progress is gone") for service, topic, partition in units
    ]
    idle = c.execute(
        "select name from unlost_service where json_extract(policy, '$.topics') > 0 "
        "and name not in (select service from unlost_progress) order by name"
    ).fetchall()
    return found + [(name, f"{name}: all of its saved progress is gone") for (name,) in idle]


def _positions(c: apsw.Connection, table: str, unit: tuple[str, str, int]) -> frozenset[int]:
    rows = c.execute(f"select position from {table} where service = ? and topic = ? and partition = ?", unit)
    return frozenset(row[0] for row in rows)


def _log_range(c: apsw.Connection, number: int) -> tuple[int, int, list[tuple[int, int]]]:
    """First position, the position after the last, and what is missing between."""
    low = number << POSITION_BITS
    first, last, count = c.execute(
        "select min(at), max(at), count(*) from unlost_log where at between ? and ?", (low, low | POSITION_MAX)
    ).fetchone()
    if first is None:
        return 0, 0, []
    gaps: list[tuple[int, int]] = []
    if count != last - first + 1:
        rows = c.execute(
            "select before + 1, at from (select at, lag(at) over (order by at) as before from unlost_log "
            "where at between ? and ?) where at > before + 1",
            (low, low | POSITION_MAX),
        )
        gaps = [(a - low, b - low) for a, b in rows]
    return first - low, last - low + 1, gaps


def _digest(
    c: apsw.Connection, number: int, start: int, start_digest: int, runs: Sequence[tuple[int, int]]
) -> int | None:
    """XOR of the event hashes of these positions: each row holds that of all rows up to it, so two per run suffice."""
    low = number << POSITION_BITS

    def upto(position: int) -> int | None:
        if position == start:
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


def _name(c: apsw.Connection, m: Missing) -> Named:
    number = c.execute("select first_number from unlost_topic where name = ?", (m.topic,)).fetchone()[0] + m.partition
    row = c.execute(
        "select head, key, recorded from unlost_log where at = ?", (number << POSITION_BITS | m.position,)
    ).fetchone()
    envelope = None
    if row is not None:
        try:
            envelope = decode_head(row[0], topic=m.topic, key=row[1], data=None)
        except Exception:
            envelope = None
    epoch = c.execute(
        "select epoch, pid, taken from unlost_epoch where service = ? and topic = ? and partition = ? and position <= ? "
        "order by epoch desc limit 1",
        (m.service, m.topic, m.partition, m.position),
    ).fetchone()
    if epoch is None:
        seen = "in the log; no process of the service has had this partition"
    else:
        seen = f"in the hands of {m.service} (pid {epoch[1]}, epoch {epoch[0]})"
    key = row[1] if row is not None else None
    return Named(
        service=m.service, topic=m.topic, partition=m.partition, position=m.position, why=m.why,
        id=envelope.id if envelope else None, type=envelope.type if envelope else None,
        key=None if key is None else key.decode("utf-8", "backslashreplace"),
        source=envelope.source if envelope else None, recorded=row[2] if row is not None else None, last_seen=seen,
    )  # fmt: skip


def verify(file: File, limit: int = 100) -> list[str]:
    """Reads every event of the log and checks its checksum and its place in the chain of digests."""
    problems: list[str] = []

    def work(c: apsw.Connection) -> None:
        topics = c.execute("select name, first_number, partitions from unlost_topic").fetchall()
        for name, first, partitions in topics:
            for number in range(first, first + partitions):
                _verify_partition(c, name, number - first, number, problems, limit)

    file.read(work)
    return problems


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
