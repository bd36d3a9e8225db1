"""`make bench-replay`: how fast a replay is beside the service itself on the same backlog -> bench/RESULTS-REPLAY.md.

    python bench/replay_run.py                 100,000 events, 5 rounds, about four minutes
    python bench/replay_run.py --quick         20,000 events, 3 rounds; prints only

A service with one handler, at least once, that does nothing, handles a backlog in a process of its own; then the same
handlers get the same events by a replay in another process. Both are measured from joining to the last durable outcome,
and both in turn, each round with a new log. Planning (reading the log once, to say what will come) is shown apart: it is
over before the replay begins.
"""

from __future__ import annotations

import argparse
import asyncio
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import HERE, OrderPlaced, Stopwatch, answer, order, run
from report import ROOT, Others, cpu, memory, processor, rate, say, spread, table

from unlost import App, Context, Service, Topic
from unlost.events import Envelope, seal
from unlost.ops.connect import opened
from unlost.ops.replay import begin, carry_out
from unlost.ops.replay_plan import Asked, plan
from unlost.sqlite.file import File
from unlost.store.port import Look
from unlost.store.records import FileRecords
from unlost.world import REAL

EVENTS, ROUNDS = 100_000, 5
QUICK_EVENTS, QUICK_ROUNDS = 20_000, 3
BATCH = 10_000
LOOK_SECONDS = 0.02
BAR = 0.9


def app_of(folder: Path, context: bool) -> App:
    service = Service("bench")
    if context:

        @service.on(OrderPlaced)
        async def with_context(placed: OrderPlaced, ctx: Context) -> None:
            pass
    else:

        @service.on(OrderPlaced)
        async def handle(placed: OrderPlaced) -> None:
            pass

    return App(service, broker=f"embedded://{folder}/events.db", topics=[Topic("order", partitions=8)])


def fill(folder: Path, events: int, context: bool) -> None:
    """With what publishing does inside its commit, many events at a time."""

    async def make() -> None:
        async with app_of(folder, context):
            pass

    asyncio.run(make())
    file = File(folder / "events.db")
    for first in range(0, events, BATCH):
        some = [sealed(n) for n in range(first, min(first + BATCH, events))]
        file.write_sync(lambda tx, some=some: tx.append(some))  # type: ignore[misc]
    file.close()
    answer({})


def sealed(n: int) -> Envelope:
    return seal(order(n), source="bench", command=False, now=REAL.now())


def settled(look: Look) -> int:
    """Events of the service with a durable outcome: with one handler and no failure, those below its positions."""
    return int(look.execute("select sum(position) from unlost_progress where service = 'bench'").fetchone()[0] or 0)


def live(folder: Path, events: int, context: bool) -> None:
    app = app_of(folder, context)

    async def work() -> dict[str, float]:
        async with app:
            records = FileRecords(app.file)
            watch = Stopwatch()
            serving = asyncio.create_task(app.serve())
            while await asyncio.to_thread(records.read, settled) < events:  # noqa: ASYNC110 - the store rings for nobody
                await asyncio.sleep(LOOK_SECONDS)
            found = watch.stop()
            app.stop()
            await serving
            return found

    answer(app.until_signal(work) | {"events": events})


def replay(folder: Path, events: int, context: bool) -> None:
    app = app_of(folder, context)
    began = time.monotonic()
    with opened(app.broker_url) as here:
        planned = plan(here, app, Asked(service="bench"))
        took = time.monotonic() - began
        begun = begin(here, app.services[0], planned, operator="bench")
    done: dict[str, float] = {}

    async def work() -> None:
        async with app:
            watch = Stopwatch()
            tally = await carry_out(
                app, begun, tell=lambda tally: done.update(watch.stop()) if tally.finished else None
            )
            if tally.done != events or not tally.complete:
                raise SystemExit(f"{tally}")

    app.until_signal(work)
    answer(done | {"events": events, "planning": took})


def ask(*arguments: object) -> dict[str, Any]:
    return run(sys.executable, "replay_run.py", *arguments, timeout=1800)


def measure(events: int, rounds: int) -> str:
    others, base = Others(), ROOT / "build" / "bench"
    base.mkdir(parents=True, exist_ok=True)
    rows = []
    for context, text in ((False, "handle(event)"), (True, "handle(event, ctx)")):
        found: dict[str, list[dict[str, Any]]] = {"live": [], "replay": []}
        for n in range(rounds):
            say(f"{text}, round {n + 1} of {rounds}")
            with tempfile.TemporaryDirectory(dir=base) as name:
                ask("fill", name, events, int(context))
                for what, results in found.items():
                    results.append(ask(what, name, events, int(context)))
        pairs = list(zip(found["live"], found["replay"], strict=True))
        ratios = [b["events"] / b["seconds"] / (a["events"] / a["seconds"]) for a, b in pairs]
        costs = [a["cpu"] / b["cpu"] for a, b in pairs]
        planning = rate([{"events": r["events"], "seconds": r["planning"]} for r in found["replay"]])
        rows.append(
            [
                text, f"{rate(found['live']):,.0f}", f"{rate(found['replay']):,.0f}", spread(ratios),
                f"{cpu(found['live']):.0f} µs", f"{cpu(found['replay']):.0f} µs", spread(costs), f"{planning:,.0f}",
                "pass" if sorted(ratios)[len(ratios) // 2] >= BAR else "fail",
            ]
        )  # fmt: skip
    return f"""# The speed of a replay

Written by `make bench-replay`. {events:,} events of 200 bytes in 8 partitions, {rounds} rounds; both in turn, medians. Wanted: at
least {BAR:g} of the speed at which the service itself handles the same backlog.

{table(["handler", "live, events/s", "replay, events/s", "replay / live", "processor time, live", "replay", "live / replay", "planning, events/s", ""], rows)}

Planning reads the log once before anything begins, to say how many events of which types will come.

{processor()}, {memory()}, Python {platform.python_version()}; other programs had {others.share() or 0:.0%} of the processors.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    text = measure(QUICK_EVENTS, QUICK_ROUNDS) if arguments.quick else measure(EVENTS, ROUNDS)
    sys.stdout.write(text)
    if not arguments.quick:
        (HERE / "RESULTS-REPLAY.md").write_text(text)


if __name__ == "__main__":
    if len(sys.argv) == 5:
        part = {"fill": fill, "live": live, "replay": replay}[sys.argv[1]]
        part(Path(sys.argv[2]), int(sys.argv[3]), bool(int(sys.argv[4])))
    else:
        main()
