"""Which replays there are, and how far each is: from the store alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal, TypeVar

import msgspec

from unlost.errors import UsageError
from unlost.ops.replay_plan import NOT_REPLAYED, Asked, Plan
from unlost.store.port import Look, Records
from unlost.store.steps import Steps, run

T = TypeVar("T")
UNITS = "select topic, partition, position, fated, counts, digest, begun, owner from unlost_progress where service = ? order by 1, 2"


class Tally(msgspec.Struct, kw_only=True):
    """What became of the events of a replay so far. Counts of events."""

    events: int  # that were chosen
    done: int = 0
    skipped: dict[str, int] = msgspec.field(default_factory=dict)  # by rule, of those that were chosen
    dead: int = 0
    parked: int = 0
    retrying: int = 0
    removed: int = 0
    abandoned: int = 0
    expired: int = 0  # the log let go of them meanwhile
    left: int = 0  # without an outcome
    unaccounted: int = 0
    finished: bool = False  # nothing more happens without an operator

    @property
    def complete(self) -> bool:
        return self.finished and not (
            self.left + self.dead + self.parked + self.abandoned + self.expired + self.unaccounted
        )


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """What stands in `unlost_operation.result`."""

    plan: Plan
    rate: float | None = None
    state: Literal["open", "finished", "cancelled"] = "open"
    tally: Tally | None = None  # when it ended


class Replay(msgspec.Struct, frozen=True, kw_only=True):
    """One that has begun. Times in microseconds since 1970."""

    name: str
    number: int  # of the operation
    kept: Kept
    operator: str
    reason: str
    begun: int
    ended: int | None


class Listed(msgspec.Struct, frozen=True, kw_only=True):
    replay: Replay
    tally: Tally
    running: Sequence[int]  # ids of the processes that have partitions of it


# --- finding ---------------------------------------------------------------------------------------------


def replays(records: Records) -> list[Replay]:
    """All that have ever begun, the oldest first."""
    rows = records.read(
        lambda look: look.execute(
            "select number, at, operator, reason, service, carried_out, result from unlost_operation "
            "where action = 'replay' order by number"
        ).fetchall()
    )
    found = []
    for number, at, operator, reason, name, ended, text in rows:
        try:
            kept = msgspec.json.decode(text or "", type=Kept)
        except msgspec.MsgspecError:
            continue  # it was ended by other means (`unlost service retire`), which wrote its own words there
        found.append(
            Replay(name=name, number=number, kept=kept, operator=operator, reason=reason, begun=at, ended=ended)
        )
    return found


def find(records: Records, name: str) -> Replay:
    """One that can go on: it has not finished, or some of its events are dead or wait.

    Raises:
        UsageError: there is none of that name.
    """
    open_ones = unfinished(records)
    for listed in open_ones:
        if listed.replay.name == name:
            return listed.replay
    raise UsageError(
        "UL1417", f"there is no replay {name!r} that could go on", found=", ".join(x.replay.name for x in open_ones) or "none is open",
        fix="unlost replay --list",
    )  # fmt: skip


def same(records: Records, asked: Asked) -> Replay | None:
    """The one that was begun with the same request, and has not ended."""
    for replay in replays(records):
        if replay.ended is None and replay.kept.plan.asked == asked:
            return replay
    return None


def unfinished(records: Records) -> list[Listed]:
    """Those that have not ended, or have left something on the shelf."""

    def work(look: Look) -> list[Listed]:
        processes = records.processes(look)
        found = []
        for replay in replays(records):
            if replay.kept.state == "cancelled":
                continue
            tally = tally_of(look, replay)
            if replay.ended is not None and not tally.dead + tally.parked + tally.retrying:
                continue
            owners = {row[7] for row in look.execute(UNITS, (replay.name,)).fetchall()}
            living = [processes[id].pid for id in owners if id in processes and processes[id].alive]
            found.append(Listed(replay=replay, tally=tally, running=sorted(living)))
        return found

    return records.read(work)


def tally_of(look: Look, replay: Replay) -> Tally:
    """From one snapshot of the store."""
    name, plan = replay.name, replay.kept.plan
    tally = Tally(events=plan.events)
    counts: Counter[str] = Counter()
    rows = look.execute(UNITS, (name,)).fetchall()
    positions = len(rows) == len(plan.parts)
    for topic, partition, position, _, text, *_more in rows:
        counts.update(msgspec.json.decode(text, type=dict[str, int]))
        end = plan.ends.get((topic, partition), 0)
        positions &= position >= end
    for state, count in look.execute(
        "select state, count(*) from unlost_ledger where service = ? group by state", (name,)
    ).fetchall():
        setattr(tally, state, count)
    for start, end in look.execute('select start, "end" from unlost_gap where service = ?', (name,)).fetchall():
        tally.expired += end - start
    tally.done = counts["done"]
    tally.removed += counts["removed"]
    for state, count in counts.items():
        rule = state.partition(":")[2]
        if rule and rule not in (NOT_REPLAYED, "no handler"):
            tally.skipped[rule] = count
    ended = tally.done + sum(tally.skipped.values()) + tally.dead + tally.parked + tally.retrying
    tally.left = max(0, tally.events - ended - tally.removed - tally.abandoned - tally.expired)
    tally.finished = positions and not counts["begun"] and not _moves(look, name)
    return tally


def _moves(look: Look, name: str) -> bool:
    """Whether something waits that goes on without an operator, or an operator's request is to be carried out."""
    row = look.execute(
        "select (select count(*) from unlost_waiting w where w.service = ? and not exists (select 1 from unlost_shelf s "
        "where s.service = w.service and s.topic = w.topic and s.partition = w.partition and s.key = w.key and s.parks = 1)) "
        "+ (select count(*) from unlost_shelf where service = ? and request is not null)",
        (name, name),
    ).fetchone()
    return bool(row[0])


def text_of(kept: Kept) -> str:
    return msgspec.json.encode(kept).decode()


def run_in(look: Look, steps: Steps[T]) -> T:
    return run(steps, lambda sql, bindings: look.execute(sql, bindings).fetchall())
