"""What an operator does with a whole service: pause, resume, retire, rename. Each is one commit of the store, and recorded.

Where the embedded broker keeps its log beside a store elsewhere, its file follows in a second commit. **After a crash**
between the two the same command, given again, does what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, TypeVar

import msgspec

from unlost.brokers.port import Log
from unlost.delivery.service import Service
from unlost.errors import UsageError
from unlost.events import event_hash
from unlost.events.topic import TopicInfo, Unit
from unlost.ops.connect import Looking
from unlost.ops.pages import stretch
from unlost.ops.service import unknown
from unlost.store import services
from unlost.store.port import Hold, Look
from unlost.store.progress import Progress, Runs
from unlost.store.records import FileRecords
from unlost.store.steps import Steps, run

T = TypeVar("T")
Action = Literal["pause", "resume", "retire", "rename"]
TRIES = 3  # a process that came and went meanwhile has moved the positions


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """What was done, or would be. `changed` is False where it was so already, and in a dry run."""

    action: Action
    service: str
    to: str = ""  # its new name
    dry_run: bool
    changed: bool
    hold: str | None  # how the service stands now, in words; None: nothing holds it
    unhandled: int = 0  # events of the log without an outcome: of a retired service they are removed
    aside: int = 0  # events that wait in the store, or are dead
    partitions: int = 0


def pause(looking: Looking, name: str, *, operator: str, reason: str = "", dry_run: bool = False) -> Change:
    """The service begins nothing new in any process, and receives nothing, until it is resumed.

    **Guarantee** what is in a handler comes to its normal end; nothing else changes its state.
    **After a crash** it is paused or it is not; a process that starts finds it so.

    Raises:
        UsageError: there is no such service, or it is retired or renamed.
    """
    records = looking.records

    def work(look: Look) -> Change:
        hold = _hold(looking, look, name)
        if hold is not None and hold.state != "paused":
            raise services.refused(name, hold)
        if hold is None and not dry_run:
            hold = Hold(state="paused", since=records.now(), operator=operator, reason=reason)
            _run(look, services.put(name, hold))
            _run(look, services.record(name, "pause", operator, reason, hold.said, records.now()))
            return Change(action="pause", service=name, dry_run=False, changed=True, hold=hold.said)
        said = None if hold is None else hold.said
        return Change(action="pause", service=name, dry_run=dry_run, changed=False, hold=said)

    return records.read(work) if dry_run else records.write(work)


def resume(looking: Looking, name: str, *, operator: str, reason: str = "", dry_run: bool = False) -> Change:
    """A service that was paused or retired may work again. It goes on where it was: one that was retired handles what came
    since then.

    Raises:
        UsageError: there is no such service, or it was renamed; or the log has let go of what came since it was retired.
    """
    records = looking.records
    hold = records.read(lambda look: _hold(looking, look, name))
    if hold is not None and hold.state == "renamed":
        raise services.refused(name, hold)
    if hold is None or dry_run:
        if hold is not None:
            _check_log(looking, name, hold)
        said = None if hold is None else hold.said
        return Change(action="resume", service=name, dry_run=dry_run, changed=False, hold=said)
    if (
        hold.state == "retired"
    ):  # from here on it holds trimming back again; that it may not be resumed is seen after it
        between = msgspec.structs.replace(hold, state="paused")
        records.write(lambda look: _run(look, services.put(name, between)))
    try:
        _check_log(looking, name, hold)
    except UsageError:
        records.write(lambda look: _run(look, services.put(name, hold)))
        raise

    def work(look: Look) -> None:
        _run(look, services.put(name, None))
        _run(look, services.record(name, "resume", operator, reason, f"it was {hold.said}", records.now()))

    records.write(work)
    return Change(action="resume", service=name, dry_run=False, changed=True, hold=None)


def retire(looking: Looking, name: str, *, operator: str, reason: str, dry_run: bool = False) -> Change:
    """Ends a service for good: it no longer holds trimming back, and what it had not handled is counted as removed.

    **Guarantee** each event that it had not handled is counted, those in the waiting room and on the shelf are listed. What
    is accepted after that is not for it.
    **After a crash** it is retired or it is not.

    Raises:
        UsageError: there is no such service, a process runs it, or the log does not hold what it had not handled.
    """
    records, log = looking.pair()
    hold = records.read(lambda look: _hold(looking, look, name))
    if hold is not None and hold.state == "renamed":
        raise services.refused(name, hold)
    if hold is not None and hold.state == "retired":
        if not dry_run:
            _tell_broker(looking, name)
        return Change(action="retire", service=name, dry_run=dry_run, changed=False, hold=hold.said)
    for _ in range(TRIES):
        found = _retire(looking, name, log, operator, reason, dry_run)
        if found is not None:
            if not dry_run:
                _tell_broker(looking, name)
            return found
    raise _runs(name, "its positions move")


def rename(looking: Looking, old: str, new: str, *, operator: str, reason: str = "", dry_run: bool = False) -> Change:
    """Everything that is kept of a service goes on under another name. The old one is refused from then on.

    **Guarantee** positions, marks of handled events, waiting room, shelf and books are moved in one commit.
    **After a crash** the service has the old name or the new one.

    Raises:
        UsageError: there is no such service, a process runs it, or the new name is not valid or not free.
    """
    Service(new)  # says what a name may be
    records = looking.records
    busy = _assigned(looking)

    def work(look: Look) -> Change:
        hold = _hold(looking, look, old)
        if hold is not None and hold.state == "renamed" and hold.to == new:
            return Change(action="rename", service=old, to=new, dry_run=dry_run, changed=False, hold=hold.said)
        if hold is not None and hold.state != "paused":
            raise services.refused(old, hold)
        _check_free(look, old, new)
        units = _units(look, old)
        _take_over(looking, look, old, units, busy, dry_run)
        _take_over(looking, look, new, _units(look, new), busy, dry_run)
        left = Hold(state="renamed", since=records.now(), operator=operator, reason=reason, to=new)
        aside = _count_aside(look, old)
        if not dry_run:
            _run(look, services.move(old, new, left))
            _run(look, services.record(old, "rename", operator, reason, f"to {new}", records.now()))
            if looking.log_here:
                _regroup(look, old, new)
        return Change(
            action="rename", service=old, to=new, dry_run=dry_run, changed=not dry_run, hold=left.said, aside=aside,
            partitions=len(units),
        )  # fmt: skip

    if dry_run:
        return records.read(work)
    changed = records.write(work)
    _tell_broker(looking, old, new)
    return changed


# --- what is looked at first -----------------------------------------------------------------------------


def _hold(looking: Looking, look: Look, name: str) -> Hold | None:
    rows = look.execute("select name, hold from unlost_service order by name").fetchall()
    known = dict(rows)
    if name not in known:
        raise unknown(name, [there for there, hold in rows if hold is None], looking.elsewhere)
    return services.decode(known[name])


def _check_free(look: Look, old: str, new: str) -> None:
    """A name is free if nobody has it, if its service has never had a partition (new code was there before the rename), or
    if it is the one that this service had before."""
    row = look.execute("select hold from unlost_service where name = ?", (new,)).fetchone()
    hold = None if row is None else services.decode(row[0])
    if hold is not None and hold.state == "renamed" and hold.to == old:
        return
    if new == old or hold is not None or _run(look, services.has_worked(new)):
        raise UsageError(
            "UL1446", f"the name {new!r} is not free", found="it is the same" if new == old else f"a service {new!r} has run with this store",
            fix="choose another; what two services have handled cannot become one",
        )  # fmt: skip


def _assigned(looking: Looking) -> Collection[Unit]:
    """What living processes have, as an embedded broker says whose store is elsewhere."""
    if not looking.embedded or looking.log_here:
        return ()
    group = FileRecords(looking.file)
    return group.read(group.assigned)


def _take_over(
    looking: Looking, look: Look, name: str, units: Sequence[Unit], busy: Collection[Unit], dry_run: bool
) -> None:
    """
    Raises:
        UsageError: a living process has one of these units.
    """
    processes = looking.records.processes(look)
    for id, unit in look.execute(
        "select owner, topic from unlost_progress where service = ? and owner is not null", (name,)
    ).fetchall():
        process = processes.get(id)
        if process is not None and process.alive:
            raise _runs(name, f"pid {process.pid} on {process.host} has partitions of {unit}")
    if set(units) & set(busy):
        raise _runs(name, "a process has partitions of it")
    if not dry_run and len(looking.records.take_over(look, units)) < len(units):
        raise _runs(name, "a process is about to take its partitions")


def _runs(name: str, found: str) -> UsageError:
    return UsageError(
        "UL1445", f"the service {name!r} runs", found=found, fix="stop all of its processes first: SIGTERM, and wait"
    )


def _units(look: Look, name: str) -> list[Unit]:
    rows = look.execute(
        "select service, topic, partition from unlost_progress where service = ? order by 2, 3", (name,)
    )
    return [Unit(*row) for row in rows]


def _count_aside(look: Look, name: str) -> int:
    sql = "select count(*) from unlost_ledger where service = ? and state in ('retrying', 'parked', 'dead')"
    return int(look.execute(sql, (name,)).fetchone()[0])


def _check_log(looking: Looking, name: str, hold: Hold) -> None:
    """The embedded log lets go of nothing that a service needs; of a retired one it may have."""
    if not looking.embedded:
        return
    at = dict(looking.records.read(lambda look: _positions(look, name)))
    for info in looking.log.topics({unit.topic for unit in at}):
        for partition, (start, _) in enumerate(info.ranges):
            unit = Unit(name, info.name, partition)
            if at.get(unit, start) < start:
                raise UsageError(
                    "UL1447", f"the log has let go of events that came after {name!r} was retired",
                    found=f"{unit}: it is at {at[unit]}, the log begins at {start}; {hold.said}",
                    fix="give the service another name: it begins with the oldest event that is still there",
                )  # fmt: skip


def _positions(look: Look, name: str) -> list[tuple[Unit, int]]:
    sql = "select service, topic, partition, position from unlost_progress where service = ?"
    return [(Unit(*place), position) for *place, position in look.execute(sql, (name,))]


# --- retiring --------------------------------------------------------------------------------------------


class _Rest(msgspec.Struct, frozen=True):
    """A unit as it will be left."""

    unit: Unit
    before: tuple[int, bytes]  # position and what had an outcome, when it was looked at
    progress: Progress
    removed: int
    abandoned: Sequence[int]
    expired: Sequence[tuple[int, int]]


def _retire(looking: Looking, name: str, log: Log, operator: str, reason: str, dry_run: bool) -> Change | None:
    """None: a process has had the service meanwhile."""
    records, busy = looking.records, _assigned(looking)

    def look_at_all() -> list[_Rest]:
        rows = records.read(lambda look: look.execute(_PROGRESS, (name,)).fetchall())
        infos = {t.name: t for t in log.topics({row[0] for row in rows})}
        return [_rest(log, infos, name, *row) for row in rows]

    rests = log.together(look_at_all)
    units = [rest.unit for rest in rests]
    unhandled = sum(rest.removed for rest in rests)

    def work(look: Look) -> Change | None:
        _take_over(looking, look, name, units, busy, dry_run)
        now = records.now()
        hold = Hold(state="retired", since=now, operator=operator, reason=reason)
        aside = _count_aside(look, name)
        if not dry_run:
            there = {Unit(name, *row[:2]): (row[2], bytes(row[3])) for row in look.execute(_PROGRESS, (name,))}
            if there != {rest.unit: rest.before for rest in rests}:
                return None
            row = look.execute("select policy from unlost_service where name = ?", (name,)).fetchone()
            retained = msgspec.json.decode(row[0]).get("retained", ())
            for rest in rests:
                _run(look, services.save(rest.unit, rest.progress, rest.abandoned, now))
                for start, end in rest.expired:
                    _run(look, services.expired(rest.unit, start, end, rest.unit.topic in retained, now))
            _run(look, services.remove_kept(name, now))
            _run(look, services.give_queues_up(name))
            _run(look, services.put(name, hold))
            result = f"{unhandled + aside} events removed"
            _run(look, services.record(name, "retire", operator, reason, result, now))
            if looking.log_here:
                _regroup(look, name)
        return Change(
            action="retire", service=name, dry_run=dry_run, changed=not dry_run, hold=hold.said, unhandled=unhandled,
            aside=aside, partitions=len(units),
        )  # fmt: skip

    return records.read(work) if dry_run else records.write(work)


_PROGRESS = (
    "select topic, partition, position, fated, counts, digest, begun, topic_id, start, start_digest from unlost_progress "
    "where service = ? order by topic, partition"
)


def _rest(
    log: Log, infos: Mapping[str, TopicInfo], service: str, topic: str, partition: int, position: int, fated: bytes,
    counts: str, digest: int, begun: bytes, topic_id: str, start: int, start_digest: int,
) -> _Rest:  # fmt: skip
    """Gives everything of a unit that has no outcome its last one."""
    unit, before = Unit(service, topic, partition), (position, bytes(fated))
    progress = Progress(
        position, Runs.decode(bytes(fated)), msgspec.json.decode(counts, type=dict[str, int]), digest,
        Runs.decode(bytes(begun)),
    )  # fmt: skip
    abandoned = progress.abandon()
    info = infos.get(topic)
    if info is None or info.id != topic_id or partition >= info.partitions:  # gone with its topic: nothing waits there
        return _Rest(unit, before, progress, 0, abandoned, ())
    first, end = info.ranges[partition]
    expired = progress.pass_over(position, first) if first > position else []
    if expired and not log.forgets:
        raise UsageError(
            "UL1448", f"the log does not hold all events that {service!r} has not handled",
            found=f"{unit}: it is at {position}, the log begins at {first}", fix="unlost audit names them; restore the log first",
        )  # fmt: skip
    left = progress.pass_over(progress.position, end)
    known = log.digest(topic, partition, start, None if start and not start_digest else start_digest, left)
    if known is None:
        removed, known = _read(log, unit, left)
    else:
        removed = sum(b - a for a, b in left)
    void = sum(b - a for a, b in left) - removed
    progress.digest ^= known
    for state, count in (("removed", removed), ("void", void)):
        if count:
            progress.count(state, count)
    return _Rest(unit, before, progress, removed, abandoned, expired)


def _read(log: Log, unit: Unit, runs: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """How many events a log holds there, and the XOR of their hashes, where it cannot say so by itself."""
    count = digest = 0
    for start, end in runs:
        for a in stretch(log, unit.topic, unit.partition, start, end):
            count += 1
            digest ^= 0 if a.envelope is None else event_hash(a.envelope.source, a.envelope.id)
    return count, digest


# --- the embedded broker's group -------------------------------------------------------------------------


def _tell_broker(looking: Looking, old: str, new: str = "") -> None:
    if looking.embedded and not looking.log_here:
        FileRecords(looking.file).write(lambda look: _regroup(look, old, new))


def _regroup(look: Look, old: str, new: str = "") -> None:
    """Nobody is in the group of `old`; how far a store elsewhere was is known of `new` from now on."""
    for table in ("member", "assignment"):
        look.execute(f"delete from unlost_{table} where service = ?", (old,))
    if new:
        look.execute("update or replace unlost_follower set service = ? where service = ?", (new, old))
    else:
        look.execute("delete from unlost_follower where service = ?", (old,))


def _run(look: Look, steps: Steps[T]) -> T:
    execute: Callable[..., list[tuple[object, ...]]] = lambda sql, bindings: look.execute(sql, bindings).fetchall()  # noqa: E731
    return run(steps, execute)
