"""How the services of a broker are doing, cheaply: from saved progress, without reading the log."""

from __future__ import annotations

from collections.abc import Sequence

import apsw
import msgspec

from unlost.brokers.embedded.log import partition_range
from unlost.sqlite.file import File
from unlost.sqlite.process import Remains, examine, service_hash
from unlost.sqlite.schema import POSITION_BITS
from unlost.store.progress import Runs


class ProcessStatus(msgspec.Struct, frozen=True, kw_only=True):
    pid: int
    alive: bool
    hung: bool  # alive, but it has given no sign of life for half a minute
    partitions: int


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


class Status(msgspec.Struct, frozen=True, kw_only=True):
    path: str
    bytes: int
    services: Sequence[ServiceStatus]
    topics: Sequence[TopicStatus]


def status(file: File) -> Status:
    """One snapshot of all services and topics."""
    found = file.read(lambda c: (_services(file, c), topics_in(c)))
    size = sum(p.stat().st_size for p in (file.path, file.path.with_name(file.path.name + "-wal")) if p.exists())
    return Status(path=str(file.path), bytes=size, services=found[0], topics=found[1])


def topics(file: File) -> list[TopicStatus]:
    return file.read(topics_in)


def topics_in(c: apsw.Connection) -> list[TopicStatus]:
    found = []
    rows = c.execute("select name, id, first_number, partitions, retention from unlost_topic order by name").fetchall()
    for name, id, first, partitions, retention in rows:
        events, times = 0, []
        for number in range(first, first + partitions):
            start, end = partition_range(c, number)
            events += end - start
            times += [t for p in (start, end - 1) if end > start and (t := _recorded(c, number, p)) is not None]
        services = c.execute(
            "select distinct service from unlost_progress where topic = ? order by service", (name,)
        ).fetchall()
        found.append(
            TopicStatus(
                name=name, id=id, partitions=partitions, events=events, retention=retention,
                oldest=min(times, default=None), newest=max(times, default=None), services=[row[0] for row in services],
            )
        )  # fmt: skip
    return found


def _services(file: File, c: apsw.Connection) -> list[ServiceStatus]:
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
        _take_part(c, s, processes)
        s.todo = _advice(s)
    return list(services.values())


def _count(
    c: apsw.Connection, s: ServiceStatus, numbers: dict[str, int], processes: dict[str, tuple[int, Remains]]
) -> None:
    rows = c.execute(
        "select topic, partition, owner, position, fated from unlost_progress where service = ?", (s.name,)
    ).fetchall()
    for topic, partition, owner, position, fated in rows:
        number = numbers[topic] + partition
        end = max(partition_range(c, number)[1], position)
        read = position
        if owner in processes and processes[owner][1].alive:
            s.owned += 1
            read = processes[owner][1].read.get((service_hash(s.name), number), 0)
        runs = Runs.decode(fated)
        in_flight = sum(b - a for a, b in runs.gaps(position, min(read, end)))
        s.partitions += 1
        s.in_flight += in_flight
        s.waiting += sum(b - a for a, b in runs.gaps(position, end)) - in_flight
        if position < end:
            recorded = _recorded(c, number, position)
            s.oldest = min((t for t in (s.oldest, recorded) if t is not None), default=None)
    for state, count in c.execute("select state, count(*) from unlost_ledger where service = ? group by 1", (s.name,)):
        if state in ("retrying", "parked", "dead"):
            setattr(s, state, count)
    s.next_retry = c.execute("select min(due) from unlost_waiting where service = ?", (s.name,)).fetchone()[0]
    s.requested = c.execute(
        "select count(*) from unlost_shelf where request is not null and service = ?", (s.name,)
    ).fetchone()[0]


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


def _recorded(c: apsw.Connection, number: int, position: int) -> int | None:
    row = c.execute("select recorded from unlost_log where at = ?", (number << POSITION_BITS | position,)).fetchone()
    return None if row is None else int(row[0])
