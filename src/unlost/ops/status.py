"""How the services of a broker are doing, cheaply: from saved progress, without reading the log."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

import msgspec

from unlost.brokers.port import Log, Place
from unlost.errors import Unavailable
from unlost.events.topic import TopicInfo, Unit
from unlost.ops.connect import Looking, log_of
from unlost.ops.outbox import Delayed, OutboxStatus, delayed_of, status_of
from unlost.sqlite.file import File
from unlost.store.port import Look, Process, Records
from unlost.store.progress import Runs
from unlost.store.records import FileRecords
from unlost.store.services import decode


class ProcessStatus(msgspec.Struct, frozen=True, kw_only=True):
    pid: int
    alive: bool
    hung: bool  # alive, but it has given no sign of life for a while
    partitions: int
    host: str = ""


class UnitStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How far a service is on a partition. Positions are those after the event in question, so that 0 means none.

    `highest_sequential` is where delivery goes on after a crash: everything below it has an outcome. Between it and
    `highest_succeeded` there are `incompletes`, and all that came after them and has an outcome already.
    """

    topic: str
    partition: int
    highest_seen: int  # received by its owner
    highest_succeeded: int  # the last with an outcome
    highest_sequential: int  # all below have an outcome
    incompletes: int  # seen, and without an outcome
    end: int | None  # of the log; None: the broker did not say


class ServiceStatus(msgspec.Struct, kw_only=True):
    """Counts of events; times in microseconds since 1970, None where there is none."""

    name: str
    on_dead: str
    processes: Sequence[ProcessStatus] = ()
    partitions: int = 0
    owned: int = 0  # partitions that a living process has
    waiting: int = 0
    in_flight: int = 0
    retrying: int = 0
    parked: int = 0
    dead: int = 0
    oldest: int | None = None  # when the oldest event without an outcome was recorded
    next_retry: int | None = None
    requested: int = 0  # operators' requests that nobody has carried out yet
    hold: str | None = None  # paused or retired by an operator: since when, by whom and why, in words
    retired: bool = False
    todo: list[str] = msgspec.field(default_factory=list)
    units: list[UnitStatus] = msgspec.field(default_factory=list)

    @property
    def alive(self) -> int:
        return sum(process.alive for process in self.processes)


class TopicStatus(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    id: str
    partitions: int
    events: int
    oldest: int | None
    newest: int | None
    retention: float | None
    services: Sequence[str]
    replication: int = 1
    min_insync: int = 1
    survives: str = ""


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """`path` is the store, `bytes` its size. `unreachable` says why the broker did not answer; then the numbers are
    those that the store knows."""

    path: str
    bytes: int
    services: Sequence[ServiceStatus]
    topics: Sequence[TopicStatus]
    broker: str = ""
    outbox: OutboxStatus | None = None
    delayed: Delayed
    unreachable: str | None = None
    elsewhere: Sequence[str] = ()  # services of the broker whose progress is in another store
    lost: Sequence[str] = ()  # what the broker knows to be gone from this one


def status(records: Records) -> Status:
    """One snapshot of all services and topics of an embedded broker with the store in its own file."""
    log = log_of(records)
    assert isinstance(records, FileRecords)

    def work() -> Status:
        found = records.read(lambda look: _services(records, look))
        _take_part(records.file, found.services)
        infos = log.topics()
        _add_log(found.services, infos, log)
        return _status(records.place, found, topics_of(log, infos, found.readers))

    return log.together(work)


def look(looking: Looking) -> Status:
    """The status of whatever is looked at. Where the broker does not answer, what the store knows is still said."""
    records = looking.records
    if looking.log_here:
        found_here = status(records)
        return msgspec.structs.replace(found_here, elsewhere=looking.elsewhere)
    found = records.read(lambda look: _services(records, look))  # before the log, so that this is never behind it
    topics: list[TopicStatus] = []
    unreachable = None
    if looking.embedded:
        _take_part(looking.file, found.services)
    try:
        log = looking.pair()[1]
        infos = log.topics(None if looking.embedded else {u.topic for s in found.services for u in s.units})
        _add_log(found.services, infos, log)
        topics = topics_of(log, infos, found.readers)
    except Unavailable as e:
        unreachable = e
    shown = _status(records.place, found, topics, broker=looking.name, unreachable=unreachable)
    return msgspec.structs.replace(shown, elsewhere=looking.elsewhere, lost=[text for _, text in looking.lost])


def _status(
    place: str,
    found: _Found,
    topics: Sequence[TopicStatus],
    *,
    broker: str = "",
    unreachable: Unavailable | None = None,
) -> Status:
    for s in found.services:
        s.todo = _advice(s)
    return Status(
        path=place, bytes=found.bytes, services=found.services, topics=topics, broker=broker or place,
        outbox=found.outbox if broker else None, delayed=found.delayed, unreachable=None if unreachable is None else str(unreachable),
    )  # fmt: skip


def topics(records: Records | None, *, log: Log | None = None) -> list[TopicStatus]:
    """All topics, and who reads them, as far as the store knows."""
    if log is None:
        assert records is not None
        log = log_of(records)
    chosen = log

    def work() -> list[TopicStatus]:
        return topics_of(chosen, chosen.topics(), {} if records is None else records.read(_readers))

    return log.together(work)


def topics_of(log: Log, infos: Sequence[TopicInfo], readers: Mapping[str, Sequence[str]]) -> list[TopicStatus]:
    spans = log.spans(infos)
    return [
        TopicStatus(
            name=t.name, id=t.id, partitions=t.partitions, events=sum(end - start for start, end in t.ranges),
            oldest=spans.get(t.name, (None, None))[0], newest=spans.get(t.name, (None, None))[1],
            retention=t.retention, services=readers.get(t.name, []), replication=t.replication,
            min_insync=t.min_insync, survives=t.survives,
        )
        for t in infos
    ]  # fmt: skip


def _readers(look: Look) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for topic, service in look.execute("select distinct topic, service from unlost_progress order by topic, service"):
        found.setdefault(topic, []).append(service)
    return found


class _Found(msgspec.Struct, frozen=True, kw_only=True):
    """What the store knows."""

    services: list[ServiceStatus]
    readers: Mapping[str, Sequence[str]]
    outbox: OutboxStatus
    delayed: Delayed
    bytes: int


def _services(records: Records, look: Look) -> _Found:
    """From one snapshot; each table is read once. Of processes only those that have taken a partition are known here."""
    services = dict[str, ServiceStatus]()
    for name, policy, text in look.execute("select name, policy, hold from unlost_service order by name"):
        hold = decode(text)
        if hold is None or hold.state != "renamed":
            on_dead = str(msgspec.json.decode(policy).get("on_dead", "park"))
            services[name] = ServiceStatus(name=name, on_dead=on_dead)
            if hold is not None:
                services[name].hold, services[name].retired = hold.said, hold.state == "retired"
    processes = records.processes(look)
    owners: dict[str, Counter[str]] = defaultdict(Counter)
    for name, topic, partition, owner, position, fated in look.execute(
        "select service, topic, partition, owner, position, fated from unlost_progress order by service, topic, partition"
    ):
        s = services.get(name)
        if s is None:
            continue
        process = processes.get(owner)
        alive = process is not None and process.alive
        s.owned += alive
        if owner is not None:
            owners[name][owner] += 1
        read = process.read.get(Unit(name, topic, partition), 0) if process is not None and alive else position
        _count(s, topic, partition, position, Runs.decode(fated), read)
    for name, found in owners.items():
        services[name].processes = _shown(processes, sorted(found.items()))
    for name, state, count in look.execute(
        "select service, state, count(*) from unlost_ledger group by service, state"
    ):
        if name in services and state in ("retrying", "parked", "dead"):
            setattr(services[name], state, count)
    for name, due in look.execute(
        "select service, min(due) from unlost_waiting where due is not null group by service"
    ):
        if name in services:
            services[name].next_retry = due
    for name, count in look.execute(
        "select service, count(*) from unlost_shelf where request is not null group by service"
    ):
        if name in services:
            services[name].requested = count
    return _Found(
        services=list(services.values()),
        readers=_readers(look),
        outbox=status_of(records, look),
        delayed=delayed_of(records, look),
        bytes=records.size(look),
    )


def _count(s: ServiceStatus, topic: str, partition: int, position: int, runs: Runs, read: int) -> None:
    """What the store knows of a unit. What waits in the log is not known here but for a part of it: what was seen."""
    last = max((b for _, b in runs), default=position)
    seen = max(read, last, position)
    incompletes = sum(b - a for a, b in runs.gaps(position, seen))
    s.partitions += 1
    s.in_flight += sum(b - a for a, b in runs.gaps(position, read))
    s.waiting += sum(b - a for a, b in runs.gaps(max(position, read), seen))
    s.units.append(
        UnitStatus(
            topic=topic, partition=partition, highest_seen=seen, highest_succeeded=last,
            highest_sequential=position, incompletes=incompletes, end=None,
        )
    )  # fmt: skip


def _shown(processes: Mapping[str, Process], chosen: Iterable[tuple[str, int]]) -> list[ProcessStatus]:
    """Those of them that are known, with the number of their partitions."""
    return [
        ProcessStatus(pid=p.pid, alive=p.alive, hung=p.hung, partitions=partitions, host=p.host)
        for id, partitions in chosen
        if (p := processes.get(id)) is not None
    ]


def _add_log(services: Collection[ServiceStatus], infos: Sequence[TopicInfo], log: Log) -> None:
    """What waits behind the last that was seen, and since when the oldest event without an outcome waits."""
    ranges = {t.name: t.ranges for t in infos}
    first: dict[Place, set[int]] = {}
    for s in services:
        if s.retired:  # what comes is not for it
            continue
        for n, u in enumerate(s.units):
            known = ranges.get(u.topic, ())
            end = known[u.partition][1] if u.partition < len(known) else u.highest_seen
            s.units[n] = msgspec.structs.replace(u, end=end)
            s.waiting += max(0, end - u.highest_seen)
            if u.highest_sequential < max(end, u.highest_seen):
                first.setdefault((u.topic, u.partition), set()).add(u.highest_sequential)
    times: dict[tuple[Place, int], int] = {}
    while first:  # one look takes one position of each partition: as many looks as services that lag there differently
        chosen = {place: positions.pop() for place, positions in first.items()}
        for place, time in log.recorded(chosen).items():
            times[place, chosen[place]] = time
        first = {place: positions for place, positions in first.items() if positions}
    for s in services:
        waiting = [times.get(((u.topic, u.partition), u.highest_sequential)) for u in s.units]
        s.oldest = min((t for t in waiting if t is not None), default=None)


def _take_part(file: File, services: Sequence[ServiceStatus]) -> None:
    """Who takes part in each service, with or without a partition: the embedded broker knows."""
    records = FileRecords(file)

    def work(look: Look) -> None:
        processes = records.processes(look)
        has = {
            (service, process): count
            for service, process, count in look.execute(
                "select service, process, count(*) from unlost_assignment where process is not null group by 1, 2"
            )
        }
        members: dict[str, list[str]] = {}
        for service, process in look.execute(
            "select service, process from unlost_member group by service, process order by min(joined)"
        ):
            members.setdefault(service, []).append(process)
        for s in services:
            s.processes = _shown(processes, [(id, has.get((s.name, id), 0)) for id in members.get(s.name, ())])

    records.read(work)


def _advice(s: ServiceStatus) -> list[str]:
    """What to do next, the most urgent first."""
    lines = [] if s.hold is None else [f"{s.hold} (unlost service resume {s.name})"]
    lines += [
        f"process {p.pid} gives no sign of life: is it stopped, or is its event loop blocked?"
        for p in s.processes
        if p.hung
    ]
    todo = s.waiting + s.in_flight + s.retrying + s.requested + (0 if s.dead else s.parked)
    if not s.alive and not s.retired and (todo or s.next_retry is not None):
        lines.append(f"nobody runs it: unlost run --service {s.name}")
    if s.dead:
        behind = f" ({s.parked} more wait behind them)" if s.parked else ""
        lines.append(f"{s.dead} dead{behind}: unlost dead list --service {s.name}")
    return lines
