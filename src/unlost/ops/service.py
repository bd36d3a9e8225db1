"""Services one by one: who has which partition since when, how far each is, and what the service has registered.

From the store and the broker alone; all numbers of the store are from one snapshot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from unlost.errors import UsageError
from unlost.events.topic import Unit
from unlost.ops.connect import Looking
from unlost.ops.status import ServiceStatus, Status
from unlost.ops.status import look as look_at
from unlost.store.port import Look, Process
from unlost.store.progress import Runs
from unlost.store.services import held, refused
from unlost.store.steps import run

_STATES = ("retrying", "parked", "dead")


class Owner(msgspec.Struct, frozen=True, kw_only=True):
    """Who took a partition last, and has not left it. `since` in microseconds since 1970."""

    pid: int
    host: str  # empty: not known any more
    alive: bool
    hung: bool  # alive, but it has given no sign of life for a while
    since: int | None


class PartitionStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One partition, for one service. Counts of events; every one without an outcome is in one of them, but for the
    dead, which have one."""

    topic: str
    partition: int
    owner: Owner | None
    position: int  # everything below has an outcome
    end: int | None  # of the log; None: the broker did not say
    waiting: int
    in_flight: int
    retrying: int
    parked: int
    dead: int


class ServiceView(msgspec.Struct, frozen=True, kw_only=True):
    """A service as the store knows it. Times in microseconds since 1970, None where nothing is known."""

    status: ServiceStatus
    created: int  # when it registered for the first time
    last_sign: int | None  # the newest thing that a process of it has written down with its time
    topics: Sequence[str]
    queues: Sequence[str]  # those of them whose commands it carries out
    partitions: Sequence[PartitionStatus]


class Services(msgspec.Struct, frozen=True, kw_only=True):
    """`status` is that of the whole broker: where it is, and whether it answered."""

    status: Status
    services: Sequence[ServiceView]


def services(looking: Looking) -> Services:
    """All services that have registered with this store, by name.

    Raises:
        UsageError: there is no store, or it belongs elsewhere. Unavailable: the store does not answer.
    """
    records = looking.records

    def work(look: Look) -> Services:
        status = look_at(looking)  # reads the same snapshot
        registered = dict[str, tuple[Any, int]]()
        for name, policy, created in look.execute("select name, policy, created from unlost_service"):
            registered[name] = (msgspec.json.decode(policy), created)
        partitions = _partitions(look, records.processes(look), status.services)
        signs = _last_signs(look)
        views = [
            ServiceView(
                status=s, created=registered[s.name][1], last_sign=signs.get(s.name),
                topics=sorted({u.topic for u in s.units}),
                queues=sorted(map(str, registered[s.name][0].get("queues", ()))),
                partitions=[partitions[unit] for unit in _units(s)],
            )
            for s in status.services
        ]  # fmt: skip
        return Services(status=status, services=views)

    return records.read(work)


def service(looking: Looking, name: str) -> tuple[ServiceView, Status]:
    """One of them.

    Raises:
        UsageError: no service of this name has registered with this store, or it has another name now.
    """
    found = services(looking)
    for view in found.services:
        if view.status.name == name:
            return view, found.status
    hold = looking.records.read(lambda look: run(held(name), lambda sql, b: look.execute(sql, b).fetchall()))
    if hold is not None:
        raise refused(name, hold)
    raise unknown(name, [v.status.name for v in found.services], found.status.elsewhere)


def unknown(name: str, known: Sequence[str], elsewhere: Sequence[str]) -> UsageError:
    """Of a name that no service of this store has; `elsewhere` are those of the broker that another store has."""
    there = ", ".join(known) or "none"
    if name in elsewhere:
        return UsageError(
            "UL1441", f"the progress of the service {name!r} is kept in another store", found=f"this one has {there}",
            fix="UNLOST_STORE=postgresql://…: the URL that the service uses",
        )  # fmt: skip
    return UsageError(
        "UL1440", f"no service {name!r} has run with this store", found=f"it has {there}", fix="unlost service list"
    )


def _units(s: ServiceStatus) -> list[Unit]:
    return [Unit(s.name, u.topic, u.partition) for u in s.units]


def _partitions(
    look: Look, processes: Mapping[str, Process], services: Sequence[ServiceStatus]
) -> dict[Unit, PartitionStatus]:
    known = {unit: u for s in services for unit, u in zip(_units(s), s.units, strict=True)}
    counts: dict[Unit, dict[str, int]] = {unit: dict.fromkeys(_STATES, 0) for unit in known}
    for *place, state, count in look.execute(
        "select service, topic, partition, state, count(*) from unlost_ledger "
        "where state in (?, ?, ?) group by service, topic, partition, state",
        _STATES,
    ):
        counts.get(Unit(*place), {})[state] = count
    found = {}
    for service, topic, partition, id, position, fated, pid, since in look.execute(
        "select p.service, p.topic, p.partition, p.owner, p.position, p.fated, e.pid, e.taken from unlost_progress p "
        "left join unlost_epoch e on e.service = p.service and e.topic = p.topic and e.partition = p.partition "
        "and e.epoch = p.epoch"
    ):
        unit = Unit(service, topic, partition)
        u = known.get(unit)
        if u is None:  # of a service that has not registered
            continue
        process = processes.get(id)
        read = process.read.get(unit, 0) if process is not None and process.alive else 0
        in_flight = sum(b - a for a, b in Runs.decode(fated).gaps(position, read))
        behind = 0 if u.end is None else max(0, u.end - u.highest_seen)
        found[unit] = PartitionStatus(
            topic=topic, partition=partition, owner=None if id is None else _owner(process, pid, since),
            position=position, end=u.end, waiting=u.incompletes - in_flight + behind, in_flight=in_flight,
            **counts[unit],
        )  # fmt: skip
    return found


def _owner(process: Process | None, pid: int | None, since: int | None) -> Owner:
    """Of a process that nobody knows any more, its number is still in the list of owners."""
    if process is None:
        return Owner(pid=pid or 0, host="", alive=False, hung=False, since=since)
    return Owner(pid=process.pid, host=process.host, alive=process.alive, hung=process.hung, since=since)


def _last_signs(look: Look) -> dict[str, int]:
    """When a process of a service last wrote something down that has a time: no proof that it ran until then only."""
    found: dict[str, int] = {}
    for table, column in (("epoch", "taken"), ("ledger", "since"), ("shelf", "died")):
        for name, at in look.execute(f"select service, max({column}) from unlost_{table} group by service"):
            found[name] = max(at, found.get(name, at))
    return found
