"""The audit: gathers the evidence, from the store and from the log, and balances it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from unlost.audit import Books, Evidence, Listed, Missing, Passed, reconcile
from unlost.brokers.port import Log, Place
from unlost.errors import Damaged, UsageError
from unlost.events import event_hash
from unlost.events.topic import Arrival, TopicInfo, Unit
from unlost.ops.connect import log_of
from unlost.ops.outbox import Delayed, OutboxStatus, contradictions, delayed_of, status_of
from unlost.store.port import Look, Records
from unlost.store.progress import Runs
from unlost.store.records import FileRecords
from unlost.store.services import decode

NAMED_MAX = 1000
READ_MAX = 500  # events in one look at the log
UNITS_MAX = 100  # in one statement


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


class Stored(msgspec.Struct, frozen=True, kw_only=True):
    """What the store knows of a unit."""

    unit: Unit
    topic_id: str
    partitions: int  # on which the service has positions
    start: int
    start_digest: int | None  # of the log before it; None: nobody has noted it
    position: int
    fated: Sequence[tuple[int, int]]
    counts: dict[str, int]
    digest: int
    listed: Sequence[Listed]
    on_shelf: frozenset[int]
    in_waiting_room: frozenset[int]
    read: int
    passed: Sequence[Passed]
    declared: bool  # the App declares a retention for the topic
    retired: bool = False  # what came since then is not for it


def books(records: Records, services: Sequence[str] | None = None, *, log: Log | None = None) -> Books:
    """Balances the books of every service of this store (or of those named). `log` is that of its broker; without it
    the log is in the same file.

    Raises:
        UsageError: a service of that name has never run here.
    """
    return examine_all(records, services, log=log).books


class Examined(msgspec.Struct, frozen=True, kw_only=True):
    """The books, what is still to be sent, and what became of reading the log again, where that was asked for."""

    books: Books
    outbox: OutboxStatus
    delayed: Delayed
    compared: int = 0  # units whose events were read again and compared with the saved digest
    unverified: Sequence[str] = ()  # units of which that cannot be done, and why


def examine_all(
    records: Records,
    services: Sequence[str] | None = None,
    *,
    log: Log | None = None,
    read_again: bool = False,
    lost: Sequence[tuple[str, str]] = (),
) -> Examined:
    """The same; `read_again` reads what every unit has handled once more, where the log has no digest of its own. `lost`
    says of services what the broker knows to be gone from here."""
    log = log or log_of(records)

    def gather(look: Look) -> tuple[list[Stored], list[tuple[str, str]], OutboxStatus, Delayed]:
        known = {name for (name,) in look.execute("select name from unlost_service")}
        for name in services or ():
            if name not in known:
                raise UsageError(
                    "UL1331", f"no service {name!r} has run on this broker", found=", ".join(sorted(known)) or "none"
                )
        return (
            stored(records, look), vanished(records, look), status_of(records, look), delayed_of(records, look),
        )  # fmt: skip

    def work() -> Examined:
        # The log is asked after the store, so that it is never behind it; the snapshot of a file begins with its first
        # statement. What leaves the outbox in between is counted twice, and never not at all.
        found, traces, outbox, delayed = records.read(gather)
        traces += lost
        if services:
            found = [s for s in found if s.unit.service in services]
            traces = [(name, text) for name, text in traces if name in services]
        infos = {t.name: t for t in log.topics({s.unit.topic for s in found})}
        again = _Again(log, found, infos) if read_again else None
        digests = {} if again is None else again.digests
        evidence = [_evidence(s, infos.get(s.unit.topic), log, digests) for s in found]
        findings = [*_changed(found, infos), *contradictions(outbox)]
        unverified = _incomparable(evidence, log) if again is None else again.unverified
        balanced = reconcile(evidence, [text for _, text in traces], findings)
        return Examined(books=balanced, outbox=outbox, delayed=delayed, compared=len(digests), unverified=unverified)

    return log.together(work)


def gather(records: Records, log: Log | None = None) -> list[Evidence]:
    """All that is known of each unit."""
    log = log or log_of(records)

    def work() -> list[Evidence]:
        found = records.read(lambda look: stored(records, look))
        infos = {t.name: t for t in log.topics({s.unit.topic for s in found})}
        return [_evidence(s, infos.get(s.unit.topic), log, {}) for s in found]

    return log.together(work)


def stored(records: Records, look: Look) -> list[Stored]:
    """The store's side of every unit, from one snapshot: each table is read once."""
    retained, retired = dict[str, set[str]](), set[str]()
    for name, policy, hold in look.execute("select name, policy, hold from unlost_service"):
        retained[name] = set(msgspec.json.decode(policy).get("retained", ()))
        if (held := decode(hold)) is not None and held.state == "retired":
            retired.add(name)
    rows = look.execute(
        "select service, topic, partition, topic_id, start, start_digest, owner, position, fated, counts, digest, "
        "count(*) over (partition by service, topic) from unlost_progress order by service, topic, partition"
    ).fetchall()
    processes = records.processes(look)
    listed: dict[Unit, list[Listed]] = defaultdict(list)
    for *unit, position, state, id in look.execute(
        "select service, topic, partition, position, state, id from unlost_ledger "
        "order by service, topic, partition, position"
    ):
        listed[Unit(*unit)].append(Listed(position, state, id))
    passed: dict[Unit, list[Passed]] = defaultdict(list)
    for *unit, a, b, kind, why, declared in look.execute(
        'select service, topic, partition, start, "end", kind, why, declared from unlost_gap '
        "order by service, topic, partition, start"
    ):
        passed[Unit(*unit)].append(Passed(a, b, kind, why, bool(declared)))
    shelf, waiting = _positions(look, "unlost_shelf"), _positions(look, "unlost_waiting")
    found = []
    for service, topic, partition, id, start, start_digest, owner, position, fated, counts, digest, partitions in rows:
        unit = Unit(service, topic, partition)
        process = processes.get(owner)
        found.append(
            Stored(
                unit=unit, topic_id=id, partitions=partitions, start=start,
                start_digest=None if start and not start_digest else start_digest, position=position,
                fated=list(Runs.decode(fated)), counts=msgspec.json.decode(counts, type=dict[str, int]), digest=digest,
                listed=listed[unit], on_shelf=frozenset(shelf[unit]), in_waiting_room=frozenset(waiting[unit]),
                read=process.read.get(unit, 0) if process is not None and process.alive else 0,
                passed=passed[unit], declared=topic in retained.get(service, ()),
                retired=service in retired,
            )
        )  # fmt: skip
    return found


def _evidence(s: Stored, info: TopicInfo | None, log: Log, digests: Mapping[Unit, int]) -> Evidence:
    service, topic, partition = s.unit
    if info is not None and _is_same(s, info):
        log_start, end = info.ranges[partition]
        if s.retired:
            log_start, end = min(log_start, s.position), min(end, s.position)
        gaps = log.holes(topic, partition)
        digest = log.digest(topic, partition, s.start, s.start_digest, s.fated)
    else:  # said as a finding; what the store knows by itself is still counted
        log_start, end, gaps, digest = s.start, s.position, (), None
    return Evidence(
        service=service, topic=topic, partition=partition, start=s.start, log_start=log_start, end=end, log_gaps=gaps,
        position=s.position, fated=s.fated, counts=s.counts, digest=s.digest, log_digest=digests.get(s.unit, digest), listed=s.listed,
        on_shelf=s.on_shelf, in_waiting_room=s.in_waiting_room, read=s.read, passed=s.passed, forgets=log.forgets,
        declared=s.declared,
    )  # fmt: skip


def _changed(found: Iterable[Stored], infos: Mapping[str, TopicInfo]) -> Iterable[str]:
    """Topics that are not (any more) what the services have their positions on."""
    for service, topic, id, partitions in dict.fromkeys(
        (s.unit.service, s.unit.topic, s.topic_id, s.partitions) for s in found
    ):
        info = infos.get(topic)
        if info is None:
            yield f"{service} {topic}: the broker has no such topic any more"
        elif info.id != id:
            yield (
                f"{service} {topic}: the topic was deleted and made again (its id is {info.id}, the positions are of {id}); "
                "what was accepted since then is not counted here"
            )
        elif info.partitions != partitions:
            yield (
                f"{service} {topic}: the topic has {info.partitions} partitions, the service has positions on {partitions}; "
                "nobody reads the others"
            )


class _Again:
    """Reads what was handled once more: the XOR of its event hashes, per unit. Each partition is read once."""

    def __init__(self, log: Log, found: Sequence[Stored], infos: Mapping[str, TopicInfo]) -> None:
        self.digests: dict[Unit, int] = {}
        self.unverified: list[str] = []
        places: dict[Place, list[Stored]] = defaultdict(list)
        for s in found:
            info = infos.get(s.unit.topic)
            if not _is_same(s, info):
                self.unverified.append(f"{s.unit}: the topic is not the one that its positions are of")
            elif s.fated and info is not None and info.ranges[s.unit.partition][0] > s.start:
                self.unverified.append(
                    f"{s.unit}: its books begin at position {s.start}, the log holds no event before "
                    f"{info.ranges[s.unit.partition][0]}"
                )
            else:
                places[s.unit.topic, s.unit.partition].append(s)
        for place, readers in places.items():
            self._read(log, place, readers)

    def _read(self, log: Log, place: Place, readers: Sequence[Stored]) -> None:
        digests, foreign = [0] * len(readers), 0
        counted = [(Runs(s.fated), Runs((p.start, p.end) for p in s.passed)) for s in readers]
        at = min(s.start for s in readers)
        end = max((s.fated[-1][1] for s in readers if s.fated), default=at)
        while at < end:
            arrivals = log.read(*place, at, READ_MAX)
            if not arrivals:
                break
            for a in arrivals:
                e = a.envelope
                if e is None:
                    foreign += 1
                    continue
                hash = event_hash(e.source, e.id)
                for n, (fated, passed) in enumerate(counted):
                    if a.position in fated and a.position not in passed:
                        digests[n] ^= hash
            at = arrivals[-1].position + 1
        for s, digest in zip(readers, digests, strict=True):
            if foreign and digest != s.digest:
                self.unverified.append(
                    f"{s.unit}: {foreign} of its messages are no CloudEvents, and how its App reads them is not known "
                    "here; name it with --app"
                )
            else:
                self.digests[s.unit] = digest


def _is_same(s: Stored, info: TopicInfo | None) -> bool:
    """Whether this is the topic that the unit's positions are of."""
    return info is not None and info.id == s.topic_id and s.unit.partition < info.partitions


def _incomparable(evidence: Iterable[Evidence], log: Log) -> list[str]:
    """Where a log that keeps digests has none for what was handled."""
    return [
        f"{e.service} {e.topic}/{e.partition}: its books begin at position {e.start}, and what the log held before is not known any more"
        for e in evidence
        if e.log_digest is None and e.fated and not log.forgets
    ]  # fmt: skip


def vanished(records: Records, look: Look) -> list[tuple[str, str]]:
    """Units and services of which there are traces, but no saved progress: what became of their events?"""
    tables = ["unlost_epoch", "unlost_ledger", "unlost_waiting", "unlost_shelf", "unlost_gap"]
    if isinstance(records, FileRecords):
        tables.append("unlost_assignment")
    traces = " union ".join(f"select service, topic, partition from {table}" for table in tables)
    units = look.execute(
        f"select service, topic, partition from ({traces}) t except select service, topic, partition from unlost_progress "
        "order by 1, 2, 3"
    ).fetchall()
    found = [
        (service, f"{service} {topic}/{partition}: its saved progress is gone") for service, topic, partition in units
    ]
    idle = look.execute(
        "select name, policy from unlost_service where name not in (select service from unlost_progress) order by name"
    ).fetchall()
    return found + [
        (name, f"{name}: all of its saved progress is gone")
        for name, policy in idle
        if msgspec.json.decode(policy, type=dict[str, Any]).get("topics", 0)
    ]


def _positions(look: Look, table: str) -> dict[Unit, set[int]]:
    found: dict[Unit, set[int]] = defaultdict(set)
    for *unit, position in look.execute(f"select service, topic, partition, position from {table}"):
        found[Unit(*unit)].add(position)
    return found


# --- names for what is missing -----------------------------------------------------------------------------


def name_missing(
    records: Records, missing: Sequence[Missing], limit: int = NAMED_MAX, *, log: Log | None = None
) -> list[Named]:
    """Looks up the first missing events: their ids, and in whose hands they were last."""
    log = log or log_of(records)
    chosen = missing[:limit]

    def work() -> list[Named]:
        owners = records.read(lambda look: _owners(look, {Unit(m.service, m.topic, m.partition) for m in chosen}))
        there = _look_up(log, chosen)
        return [_name(m, there.get((m.topic, m.partition, m.position)), _last_seen(owners, m)) for m in chosen]

    return log.together(work)


def _look_up(log: Log, missing: Sequence[Missing]) -> dict[tuple[str, int, int], Arrival]:
    """The events at these places, as far as the log holds them."""
    wanted: dict[Place, list[int]] = defaultdict(list)
    for m in missing:
        wanted[m.topic, m.partition].append(m.position)
    ranges = {t.name: t.ranges for t in log.topics({topic for topic, _ in wanted})}
    found: dict[tuple[str, int, int], Arrival] = {}
    for (topic, partition), positions in wanted.items():
        if partition >= len(ranges.get(topic, ())):
            continue
        start, end = ranges[topic][partition]
        for first, last in _runs(positions):
            at, until = max(first, start), min(last, end)
            while at < until:
                try:
                    arrivals = log.read(topic, partition, at, min(READ_MAX, until - at))
                except Damaged:
                    arrivals = []  # what can be read of the others still helps
                if not arrivals:
                    at += 1
                    continue
                for a in arrivals:
                    found[topic, partition, a.position] = a
                at = arrivals[-1].position + 1
    return found


def _runs(positions: Iterable[int]) -> Runs:
    runs = Runs()
    for position in positions:
        runs.add(position)
    return runs


class _Owner(NamedTuple):
    position: int  # where it began
    epoch: int
    pid: int


def _owners(look: Look, units: Iterable[Unit]) -> dict[Unit, list[_Owner]]:
    """Who had these units, one after another."""
    found: dict[Unit, list[_Owner]] = defaultdict(list)
    chosen = sorted(units)
    for n in range(0, len(chosen), UNITS_MAX):
        some = chosen[n : n + UNITS_MAX]
        where = " or ".join(["(service = ? and topic = ? and partition = ?)"] * len(some))
        for *unit, position, epoch, pid in look.execute(
            f"select service, topic, partition, position, epoch, pid from unlost_epoch where {where} order by epoch",
            [value for u in some for value in u],
        ):
            found[Unit(*unit)].append(_Owner(position, epoch, pid))
    return found


def _last_seen(owners: Mapping[Unit, Sequence[_Owner]], m: Missing) -> str:
    had = [owner for owner in owners.get(Unit(m.service, m.topic, m.partition), ()) if owner.position <= m.position]
    if not had:
        return "in the log; no process of the service has had this partition"
    return f"in the hands of {m.service} (pid {had[-1].pid}, epoch {had[-1].epoch})"


def _name(m: Missing, arrival: Arrival | None, last_seen: str) -> Named:
    envelope = None if arrival is None else arrival.envelope
    key = None if arrival is None else arrival.key
    return Named(
        service=m.service, topic=m.topic, partition=m.partition, position=m.position, why=m.why,
        id=envelope.id if envelope else None, type=envelope.type if envelope else None,
        key=None if key is None else key.decode("utf-8", "backslashreplace"),
        source=envelope.source if envelope else None, recorded=None if arrival is None else arrival.recorded,
        last_seen=last_seen,
    )  # fmt: skip


def verify(records: Records, limit: int = 100, *, log: Log | None = None) -> list[str]:
    """What is wrong with the stored events, where the log keeps checksums that can be checked."""
    return list((log or log_of(records)).verify(limit))
