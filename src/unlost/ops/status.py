"""How the services of a broker are doing, cheaply: from saved progress, without reading the log."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import apsw
import msgspec

from unlost.brokers.embedded.log import EmbeddedLog
from unlost.brokers.port import Log, Place
from unlost.errors import Unavailable
from unlost.events.topic import TopicInfo
from unlost.ops.connect import Looking
from unlost.ops.outbox import OutboxStatus, outbox_in
from unlost.sqlite.file import File
from unlost.sqlite.process import Remains, examine, service_hash
from unlost.store.progress import Runs


class ProcessStatus(msgspec.Struct, frozen=True, kw_only=True):
    pid: int
    alive: bool
    hung: bool  # alive, but it has given no sign of life for half a minute
    partitions: int


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
    """`unreachable` says why the broker did not answer; then the numbers are those that the store knows."""

    path: str
    bytes: int
    services: Sequence[ServiceStatus]
    topics: Sequence[TopicStatus]
    broker: str = ""
    outbox: OutboxStatus | None = None
    unreachable: str | None = None


def status(file: File) -> Status:
    """One snapshot of all services and topics of an embedded broker."""
    log = EmbeddedLog(file)

    def work() -> Status:
        found = file.read(lambda c: _services(file, c))
        infos = log.topics()
        _add_log(found.services, infos, log)
        return _status(file, found, topics_of(log, infos, found.readers))

    return log.together(work)


def look(looking: Looking) -> Status:
    """The status of whatever is looked at. Where the broker does not answer, what the store knows is still said."""
    if looking.embedded:
        return status(looking.file)
    file = looking.file
    found = file.read(lambda c: _services(file, c, elsewhere=True))  # before the log, so that this is never behind it
    topics: list[TopicStatus] = []
    unreachable = None
    try:
        log = looking.pair()[1]
        infos = log.topics({u.topic for s in found.services for u in s.units})
        _add_log(found.services, infos, log)
        topics = topics_of(log, infos, found.readers)
    except Unavailable as e:
        unreachable = e
    return _status(file, found, topics, broker=looking.name, unreachable=unreachable)


def _status(
    file: File,
    found: _Found,
    topics: Sequence[TopicStatus],
    *,
    broker: str = "",
    unreachable: Unavailable | None = None,
) -> Status:
    for s in found.services:
        s.todo = _advice(s)
    size = sum(p.stat().st_size for p in (file.path, file.path.with_name(file.path.name + "-wal")) if p.exists())
    return Status(
        path=str(file.path), bytes=size, services=found.services, topics=topics, broker=broker or str(file.path),
        outbox=found.outbox if broker else None, unreachable=None if unreachable is None else str(unreachable),
    )  # fmt: skip


def topics(file: File | None, *, log: Log | None = None) -> list[TopicStatus]:
    """All topics, and who reads them, as far as the store knows."""
    if log is None:
        assert file is not None
        log = EmbeddedLog(file)
    chosen = log

    def work() -> list[TopicStatus]:
        return topics_of(chosen, chosen.topics(), {} if file is None else file.read(_readers))

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


def _readers(c: apsw.Connection) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for topic, service in c.execute("select distinct topic, service from unlost_progress order by topic, service"):
        found.setdefault(topic, []).append(service)
    return found


class _Found(msgspec.Struct, frozen=True, kw_only=True):
    """What the store knows."""

    services: list[ServiceStatus]
    readers: Mapping[str, Sequence[str]]
    outbox: OutboxStatus


def _services(file: File, c: apsw.Connection, *, elsewhere: bool = False) -> _Found:
    """`elsewhere`: who has which partition is the broker's affair, and only who has taken one is known here."""
    services = {
        name: ServiceStatus(name=name, on_dead=str(msgspec.json.decode(policy).get("on_dead", "park")))
        for name, policy in c.execute("select name, policy from unlost_service order by name")
    }
    numbers = dict(c.execute("select name, first_number from unlost_topic").fetchall())
    processes = {
        id: (pid, examine(file.run_folder, id))
        for id, pid in c.execute("select id, pid from unlost_process")
        if id != file.process_id
    }
    for s in services.values():
        _count(c, s, numbers, processes)
        (_owners if elsewhere else _take_part)(c, s, processes)
    return _Found(services=list(services.values()), readers=_readers(c), outbox=outbox_in(file, c))


def _count(
    c: apsw.Connection, s: ServiceStatus, numbers: dict[str, int], processes: dict[str, tuple[int, Remains]]
) -> None:
    """What the store knows of a service. What waits in the log is not known here but for a part of it: what was seen."""
    rows = c.execute(
        "select topic, partition, owner, position, fated from unlost_progress where service = ? order by topic, partition",
        (s.name,),
    ).fetchall()
    for topic, partition, owner, position, fated in rows:
        read = position
        if owner in processes and processes[owner][1].alive:
            s.owned += 1
            read = processes[owner][1].read.get((service_hash(s.name), numbers[topic] + partition), 0)
        runs = Runs.decode(fated)
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
    for state, count in c.execute("select state, count(*) from unlost_ledger where service = ? group by 1", (s.name,)):
        if state in ("retrying", "parked", "dead"):
            setattr(s, state, count)
    s.next_retry = c.execute("select min(due) from unlost_waiting where service = ?", (s.name,)).fetchone()[0]
    s.requested = c.execute(
        "select count(*) from unlost_shelf where request is not null and service = ?", (s.name,)
    ).fetchone()[0]


def _add_log(services: Collection[ServiceStatus], infos: Sequence[TopicInfo], log: Log) -> None:
    """What waits behind the last that was seen, and since when the oldest event without an outcome waits."""
    ranges = {t.name: t.ranges for t in infos}
    first: dict[Place, set[int]] = {}
    for s in services:
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


def _take_part(c: apsw.Connection, s: ServiceStatus, processes: dict[str, tuple[int, Remains]]) -> None:
    owned = dict(
        c.execute(
            "select process, count(*) from unlost_assignment where service = ? and process is not null group by 1",
            (s.name,),
        ).fetchall()
    )
    s.processes = [
        ProcessStatus(
            pid=processes[id][0], alive=processes[id][1].alive, hung=processes[id][1].hung, partitions=owned.get(id, 0)
        )
        for (id,) in c.execute(
            "select process from unlost_member where service = ? group by process order by min(joined)", (s.name,)
        )
        if id in processes
    ]


def _owners(c: apsw.Connection, s: ServiceStatus, processes: dict[str, tuple[int, Remains]]) -> None:
    rows = c.execute(
        "select owner, count(*) from unlost_progress where service = ? and owner is not null group by owner order by owner",
        (s.name,),
    )
    s.processes = [
        ProcessStatus(
            pid=processes[id][0], alive=processes[id][1].alive, hung=processes[id][1].hung, partitions=partitions
        )
        for id, partitions in rows
        if id in processes
    ]


def _advice(s: ServiceStatus) -> list[str]:
    """What to do next, the most urgent first."""
    lines = []
    lines += [
        f"process {p.pid} has given no sign of life for half a minute: is it stopped, or is its event loop blocked?"
        for p in s.processes
        if p.hung
    ]
    todo = s.waiting + s.in_flight + s.retrying + s.requested
    if not s.alive and (todo or s.next_retry is not None):
        lines.append(f"nobody runs it: unlost run --service {s.name}")
    if s.dead:
        behind = f" ({s.parked} more wait behind them)" if s.parked else ""
        lines.append(f"{s.dead} dead{behind}: unlost dead list --service {s.name}")
    return lines
