"""How a replay ends: its books are closed, by itself or by an operator. It is retired then: nothing that comes is for it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

import msgspec

from unlost.brokers.port import Log
from unlost.errors import UsageError
from unlost.events import event_hash
from unlost.events.topic import Unit
from unlost.ops.books import books
from unlost.ops.connect import Looking
from unlost.ops.pages import stretch
from unlost.ops.replay_plan import NOT_REPLAYED, type_of
from unlost.ops.replay_state import UNITS, Replay, Tally, find, run_in, tally_of, text_of
from unlost.sqlite.file import File
from unlost.store import services
from unlost.store.port import Hold, Look, Records
from unlost.store.progress import Progress, Runs
from unlost.store.records import FileRecords


def finish(records: Records, log: Log, replay: Replay, tally: Tally, group: File | None) -> None:
    """Its books are closed: from now on nothing that comes is for it, and it holds nothing back but what is on its shelf.
    Where another process has partitions of it still, that one does it. `group`: as in `shelf.ask`."""
    book = books(records, [replay.name], log=log)
    tally.unaccounted = book.unaccounted
    if tally.unaccounted:
        return

    busy = () if group is None else FileRecords(group).read(FileRecords(group).assigned)

    def work(look: Look) -> bool:
        free = is_free(records, look, replay, busy)
        if free:
            close(look, records, replay, replay.operator, "its replay has ended", "finished", tally)
        return free

    if records.write(work) and group is not None:
        FileRecords(group).write(lambda look: leave_group(look, replay.name))


def cancel(looking: Looking, name: str, *, operator: str, reason: str = "") -> Tally:
    """Ends one: what it has not delivered, and what it has on its shelf, is counted as removed.

    **After a crash** it has ended, or the same command ends it.

    Raises:
        UsageError: there is no such replay, or a process carries it out.
    """
    records, log = looking.pair()
    replay = find(records, name)
    busy: Collection[Unit] = ()
    if looking.embedded and not looking.log_here:
        group = FileRecords(looking.file)
        busy = group.read(group.assigned)

    def fence(look: Look) -> list[Any]:
        if not is_free(records, look, replay, busy):
            raise UsageError(
                "UL1418", f"a process carries the replay {name!r} out", found="it has partitions of it",
                fix="stop it (Ctrl-C), then give the command again",
            )  # fmt: skip
        hold = Hold(state="retired", since=records.now(), operator=operator, reason=reason)
        run_in(look, services.put(name, hold))  # nobody can take a partition of it from here on
        return list(look.execute(UNITS, (name,)).fetchall())

    rows = records.write(fence)
    rests = [_rest(log, replay, *row[:7]) for row in rows]

    def work(look: Look) -> Tally:
        now = records.now()
        for unit, progress, abandoned, expired in rests:
            run_in(look, services.save(unit, progress, abandoned, now))
            for start, end in expired:
                run_in(look, services.expired(unit, start, end, False, now))
        run_in(look, services.remove_kept(name, now))
        tally = tally_of(look, replay)
        close(look, records, replay, operator, reason, "cancelled", tally)
        return tally

    tally = records.write(work)
    if looking.embedded and not looking.log_here:
        FileRecords(looking.file).write(lambda look: leave_group(look, name))
    return tally


Rest = tuple[Unit, Progress, Sequence[int], Sequence[tuple[int, int]]]


def _rest(
    log: Log, replay: Replay, topic: str, partition: int, position: int, fated: bytes, counts: str, digest: int, begun: bytes
) -> Rest:  # fmt: skip
    """Gives every event up to the end of the replay its last outcome."""
    plan = replay.kept.plan
    progress = Progress(
        position, Runs.decode(bytes(fated)), msgspec.json.decode(counts, type=dict[str, int]), digest, Runs.decode(bytes(begun))
    )  # fmt: skip
    types = {kind.type for kind in plan.kinds}
    abandoned = progress.abandon()
    end = max(plan.ends.get((topic, partition), position), max((b for _, b in progress.fated), default=position))
    first = log.topics([topic])[0].ranges[partition][0]
    expired = progress.pass_over(position, min(first, end)) if first > position else []
    for a in stretch(log, topic, partition, progress.position, end):
        if a.position not in progress.fated:
            hash = 0 if a.envelope is None else event_hash(a.envelope.source, a.envelope.id)
            rule = a.rule or ("" if plan.choice.wants(a) else NOT_REPLAYED)
            rule = rule or ("" if (type_of(a) or "") in types else "no handler")
            progress.settle(a.position, hash, f"skipped:{rule}" if rule else "removed")
    void = sum(b - a for a, b in progress.pass_over(progress.position, end))  # there never was an event
    if void:
        progress.count("void", void)
    return Unit(replay.name, topic, partition), progress, abandoned, expired


def is_free(records: Records, look: Look, replay: Replay, busy: Collection[Unit]) -> bool:
    """Whether no living process has any of it; who comes back is fenced."""
    units = {Unit(replay.name, row[0], row[1]) for row in look.execute(UNITS, (replay.name,)).fetchall()}
    return not units & set(busy) and len(records.take_over(look, units)) == len(units)


def close(
    look: Look, records: Records, replay: Replay, operator: str, reason: str, state: Literal["finished", "cancelled"],
    tally: Tally,
) -> None:  # fmt: skip
    now = records.now()
    run_in(look, services.put(replay.name, Hold(state="retired", since=now, operator=operator, reason=reason)))
    kept = msgspec.structs.replace(replay.kept, state=state, tally=tally)
    look.execute(
        "update unlost_operation set carried_out = ?, result = ? where number = ?", (now, text_of(kept), replay.number)
    )
    if isinstance(records, FileRecords):
        leave_group(look, replay.name)


def leave_group(look: Look, name: str) -> None:
    """The embedded broker remembers nothing of its processes, nor how far a store elsewhere was."""
    for table in ("member", "assignment", "follower"):
        look.execute(f"delete from unlost_{table} where service = ?", (name,))
