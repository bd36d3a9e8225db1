"""Past events delivered again: a replay is a service of its own beside the one whose handlers it uses.

It has a name of its own (`billing.replay-1`, or the one of `--into`), positions of its own that are pinned where it begins,
and so books, shelf and waiting room of its own. Lanes, retries, fencing and takeover are those of every service. What was
asked for stands in the commit that pins the positions, in the row of `unlost_operation` that records the operator; so it
can be carried on by its name alone, on any machine.

**Guarantee** every event of the plan gets an outcome in the books of the replay, in the order of its key; no position of
the service itself changes.
**After a crash** at any moment the replay is not there at all, or goes on where its positions are saved.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections.abc import Callable, Sequence

import msgspec

from unlost.app import App
from unlost.brokers.connect import is_kafka, kafka_log
from unlost.brokers.embedded.log import EmbeddedLog
from unlost.brokers.port import Log, Member
from unlost.delivery.service import Service
from unlost.delivery.worker import Worker
from unlost.errors import UsageError
from unlost.events.topic import Unit
from unlost.ops.connect import Looking
from unlost.ops.replay_end import finish
from unlost.ops.replay_member import Pace, ReplayMember
from unlost.ops.replay_plan import Plan
from unlost.ops.replay_state import UNITS, Kept, Replay, Tally, run_in, tally_of, text_of
from unlost.store import connect as stores
from unlost.store import services
from unlost.store.port import Look, Records
from unlost.store.records import FileRecords

LOOK_SECONDS = 0.25  # how often its progress is looked at
LAST_LOOK_SECONDS = 0.02  # the same when the last event was handed out
NUMBERS_MAX = 10_000  # replays of one service


# --- beginning -------------------------------------------------------------------------------------------


def begin(
    looking: Looking, service: Service, plan: Plan, *, operator: str, reason: str = "", rate: float | None = None
) -> Replay:
    """Writes down what was asked for, and pins the positions: one commit.

    **After a crash** it has begun or it has not. From then on the log keeps what it needs, where a log can be told so.

    Raises:
        UsageError: what must happen once would be repeated; or the log has let go of something since it was planned.
    """
    refused = refusal(plan, service)
    if refused is not None:
        raise refused
    records, log = looking.pair()
    infos = {info.name: info for info in log.topics({part.topic for part in plan.parts})}
    digests = [log.digest(p.topic, p.partition, 0, 0, [(0, p.start)]) if p.start else 0 for p in plan.parts]
    policy = {
        "on_dead": service.on_dead, "topics": len(infos),
        "retained": sorted(name for name, info in infos.items() if info.retention is not None),
    }  # fmt: skip
    kept = Kept(plan=plan, rate=rate)

    def work(look: Look) -> Replay:
        now = records.now()
        name = _enter(look, plan, msgspec.json.encode(policy, order="sorted").decode(), now)
        for part, digest in zip(plan.parts, digests, strict=True):
            look.execute(
                "insert into unlost_progress (service, topic, partition, topic_id, start, start_digest, position, fated, "
                "counts, digest) values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (name, part.topic, part.partition, part.topic_id, part.start, digest or 0, part.start, b"", "{}", 0),
            )
        (number,) = look.execute(
            "insert into unlost_operation (at, operator, action, reason, service, topic, partition, position, id, result) "
            "values (?, ?, 'replay', ?, ?, '', 0, 0, '', ?) returning number",
            (now, operator, reason, name, text_of(kept)),
        ).fetchall()[0]
        return Replay(
            name=name, number=number, kept=kept, operator=operator, reason=reason, begun=now, ended=None
        )  # fmt: skip

    begun = records.write(work)
    _check_still_there(log, begun, records)
    return begun


def refusal(found: Plan, service: Service) -> UsageError | None:
    """Why it is not done unless it is asked for with `--again`: what must happen once would happen twice."""
    if found.asked.again:
        return None
    repeated: dict[str, list[str]] = {}
    for kind in found.kinds:
        cls, handler = service.catalog.resolve(kind.type), service.handlers.get(kind.type)
        if cls is None or handler is None:
            continue
        if cls.__unlost__.is_command:
            repeated.setdefault("a command is an order, and would be carried out again", []).append(kind.type)
        elif handler.guarantee == "effectively-once" and found.asked.into is None:
            repeated.setdefault("effectively once, and would be repeated", []).append(kind.type)
    if not repeated:
        return None
    return UsageError(
        "UL1416", f"what {found.asked.service} does once would be repeated",
        found="; ".join(f"{', '.join(sorted(set(types)))}: {why}" for why, types in repeated.items()),
        fix="--again if that is wanted (then once in this replay); --type for the others only; for events --into NEW",
    )  # fmt: skip


def _enter(look: Look, plan: Plan, policy: str, now: int) -> str:
    """The replay's row among the services, under a name that nobody has had."""
    used = {n for (n,) in look.execute("select service from unlost_operation where action = 'replay'").fetchall()}
    names = (
        [plan.asked.into] if plan.asked.into else (f"{plan.asked.service}.replay-{n}" for n in range(1, NUMBERS_MAX))
    )
    for name in names:
        if name not in used and look.execute(
            "insert into unlost_service (name, policy, created) values (?, ?, ?) on conflict (name) do nothing returning name",
            (name, policy, now),
        ).fetchall():  # fmt: skip
            return name
    raise UsageError(
        "UL1411", f"--into names a service that is new, and {plan.asked.into!r} is known", found="it has run with this store",
        fix="another name; one that goes on after an interruption: unlost replay --resume NAME",
    )  # fmt: skip


def _check_still_there(log: Log, begun: Replay, records: Records) -> None:
    """Until its positions were pinned, nothing held the log back."""
    if log.forgets:
        return
    ranges = {info.name: info.ranges for info in log.topics({part.topic for part in begun.kept.plan.parts})}
    for part in begun.kept.plan.parts:
        if part.start < part.end and part.start < ranges[part.topic][part.partition][0]:
            records.write(lambda look: _forget(look, begun))
            raise UsageError(
                "UL1413", "part of what is to be replayed is not in the log any more", found=f"{part.topic}/{part.partition}: it was "
                f"trimmed up to position {ranges[part.topic][part.partition][0]} at this moment", fix="give the command again",
            )  # fmt: skip


def _forget(look: Look, begun: Replay) -> None:
    """One that nobody has taken a partition of: as if it had not begun."""
    look.execute("delete from unlost_progress where service = ?", (begun.name,))
    look.execute("delete from unlost_service where name = ?", (begun.name,))
    look.execute("delete from unlost_operation where number = ?", (begun.number,))


# --- carrying out ----------------------------------------------------------------------------------------


async def carry_out(
    app: App, replay: Replay, *, rate: float | None = None, tell: Callable[[Tally], None] = lambda tally: None
) -> Tally:
    """Runs it in this process until everything has an outcome or `app.stop()`; several processes may share it.

    **Guarantee** when `finished`, each event of the plan is counted or listed in the books of the replay, and they balance.
    **After a crash** it goes on where it was saved.

    Raises:
        UsageError: the App has no such service or handler any more.
    """
    service, plan = acting(app, replay), replay.kept.plan
    async with app:
        records, log = await asyncio.to_thread(_opened, app)
        try:
            await asyncio.to_thread(records.write, lambda look: _take_up(look, replay))
            chosen = rate if rate is not None else replay.kept.rate
            pace = None if chosen is None else Pace(chosen, app.world.monotonic())
            members: list[ReplayMember] = []

            def through(member: Member) -> Member:
                members.append(
                    ReplayMember(member, plan.ends, plan.choice, service.handlers, pace, app.world.monotonic)
                )
                return members[-1]

            worker = Worker(
                service, app.broker, app.store, world=app.world, probe=app.probe, acts_for=plan.asked.service,
                through=through,
            )  # fmt: skip
            over = asyncio.Event()
            watching = asyncio.create_task(_watch(app, records, replay, worker, members, pace, tell, over))
            try:
                await app.work([worker])
            finally:
                over.set()  # it is not cancelled: its thread may be reading
                ended = (await asyncio.gather(watching, return_exceptions=True))[0]
            if isinstance(ended, Exception):
                raise ended
            tally = await asyncio.to_thread(lambda: records.read(lambda look: tally_of(look, replay)))
            if tally.finished:
                group = None if app.broker.abilities.commits_with_store or is_kafka(app.url) else app.file
                await asyncio.to_thread(finish, records, log, replay, tally, group)
            return tally
        finally:
            await asyncio.to_thread(log.close)
            await asyncio.to_thread(records.close)


def acting(app: App, replay: Replay) -> Service:
    """The service under the replay's name: its handlers, for the types that were chosen.

    Raises:
        UsageError: the App has no such service, or no handler for what is replayed.
    """
    plan = replay.kept.plan
    service = app.chosen([plan.asked.service])[0]
    types = {kind.type for kind in plan.kinds if kind.type}
    missing = types - set(service.handlers)
    if missing:
        raise UsageError(
            "UL1412", f"{service.name} has no handler for {', '.join(map(repr, sorted(missing)))}",
            found=f"it handles {', '.join(sorted(service.handlers))}", fix="bring it back, or: unlost replay --cancel " + replay.name,
        )  # fmt: skip
    acts = copy.copy(service)
    acts.name = replay.name
    acts.handlers = {type: handler for type, handler in service.handlers.items() if type in types}
    acts.topics = {part.topic for part in plan.parts}
    acts.queues = set()
    acts.resends = None  # that an event is old, and comes again, is meant
    return acts


async def _watch(
    app: App, records: Records, replay: Replay, worker: Worker, members: Sequence[ReplayMember], pace: Pace | None,
    tell: Callable[[Tally], None], over: asyncio.Event,
) -> None:  # fmt: skip
    """Looks how far it is, and stops the App when it has finished."""

    def look_at(look: Look) -> tuple[Tally, set[Unit]]:
        return tally_of(look, replay), set() if pace is None else _open_units(look, replay)

    try:
        while not over.is_set():
            tally, open_units = await asyncio.to_thread(records.read, look_at)
            tell(tally)
            if tally.finished:
                return
            if pace is not None and open_units:
                pace.share = max(len(open_units & set(worker.owned)), 1) / len(open_units)
            drained = bool(members) and members[-1].drained
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LAST_LOOK_SECONDS if drained else LOOK_SECONDS):
                    await over.wait()
    finally:
        app.stop()


def _open_units(look: Look, replay: Replay) -> set[Unit]:
    ends = replay.kept.plan.ends
    rows = look.execute(UNITS, (replay.name,)).fetchall()
    return {Unit(replay.name, t, p) for t, p, position, *_ in rows if position < ends.get((t, p), 0)}


def _take_up(look: Look, replay: Replay) -> None:
    """One that has ended, but for what is on its shelf, works again."""
    hold = run_in(look, services.held(replay.name))
    if hold is not None and hold.state == "retired":
        run_in(look, services.put(replay.name, None))


def _opened(app: App) -> tuple[Records, Log]:
    """Store and log of an App that is connected, as operators look at them."""
    records = stores.records(app.store_setting) if stores.is_postgres(app.store_setting) else FileRecords(app.file)
    if not is_kafka(app.url):
        return records, EmbeddedLog(app.file)
    return records, kafka_log(app.url, app.decoders)
