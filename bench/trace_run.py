"""`make bench-trace`: how fast `unlost trace` finds a key, and what its index costs -> bench/RESULTS-TRACE.md.

    python bench/trace_run.py                 with 1 and with 10 million events, about six minutes and 6 GB of disk
    python bench/trace_run.py --quick         200,000 events; prints only
    python bench/trace_run.py --millions 1 3

The log is filled by the product's own append, in large commits; then a process of its own builds the index. A trace is
the whole work of the command but the start of the interpreter: opening broker and store, searching, and saying where each
branch stands. Keys and ids are drawn at random; a key has four events, spread over 200,000.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import platform
import random
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common import HERE, Stopwatch, answer, run
from report import ROOT, Others, median, memory, percentile, processor, say, spread, table

from unlost import App, Event, Service
from unlost.brokers.embedded.index import Index
from unlost.brokers.embedded.indexer import Indexer
from unlost.events import Envelope
from unlost.ops import trace as ops
from unlost.ops.connect import opened
from unlost.sqlite.file import File
from unlost.sqlite.transaction import Transaction
from unlost.world import REAL, new_id, rfc3339

BATCH = 20_000
PER_KEY, SPREAD = 4, 200_000
BUSY_EVERY = 1000  # one event in so many has the key "busy"
TRACES = 200
COLD = 20
SCANNED = SPREAD  # events of the log that is read without an index
SERVED, AT_ONCE, ROUNDS = 60_000, 500, 3
BAR_MS = 100


class OrderPlaced(Event, key="order_id"):
    order_id: str
    cents: int


def key(n: int) -> str:
    if n % BUSY_EVERY == 0:
        return "busy"
    return f"order-{n // SPREAD}-{n % SPREAD * 7919 % (SPREAD // PER_KEY)}"


def url(folder: Path) -> str:
    return f"embedded://{folder}/events.db"


# --- one process each --------------------------------------------------------------------------------------------------


def fill(folder: Path, begin: int, end: int) -> None:
    """With what publishing does inside its commit (`Transaction.append`), many events at a time: making events out of
    classes would take most of the run."""
    file = File(folder / "events.db")
    gc.freeze()
    watch = Stopwatch()
    for first in range(begin, end, BATCH):
        now = rfc3339(REAL.now())
        some = [envelope(n, now) for n in range(first, min(first + BATCH, end))]
        file.write_sync(partial(append, envelopes=some))
    found = watch.stop()
    file.close()
    answer(found | {"bytes": (folder / "events.db").stat().st_size})


def envelope(n: int, now: str) -> Envelope:
    name = key(n)
    data = f'{{"order_id":"{name}","cents":{n}}}'.encode()
    return Envelope(
        id=new_id(), source="bench", type="order.OrderPlaced", time=now, topic="order", key=name.encode(), data=data
    )  # fmt: skip


def append(tx: Transaction, envelopes: Sequence[Envelope]) -> None:
    tx.append(envelopes)


def build(folder: Path) -> None:
    file = File(folder / "events.db")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    watch, steps, began = Stopwatch(), [], time.monotonic()
    for _ in Indexer(file).grow():
        steps.append(time.monotonic() - began)
        began = time.monotonic()
    found = watch.stop()
    paths = list(Index(file).folder.iterdir())
    file.close()
    steps.sort()
    answer(
        found
        | {
            "bytes": sum(path.stat().st_size for path in paths), "segments": len(paths),
            "step": percentile(steps, 99) * 1000, "step_max": steps[-1] * 1000,
            "memory": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
        }
    )  # fmt: skip


def traces(folder: Path, events: int, what: str, count: int) -> None:
    """Milliseconds of each."""
    chance = random.Random(events)
    ids = [] if what != "id" else some_ids(folder, count)
    found = []
    for n in range(count + 1):
        text = "busy"
        if what == "id":
            text = ids[n % len(ids)]
        elif what != "busy":
            text = key(chance.randrange(events // BUSY_EVERY) * BUSY_EVERY + 1)
        if what == "cold":
            forget(folder)
        began = time.perf_counter()
        with opened(url(folder)) as here:
            if what == "no index":
                ops.Findable = ()  # type: ignore[misc,assignment]
            flows = ops.trace(here, text).flows
        took = (time.perf_counter() - began) * 1000
        wanted = 1 if what == "id" else ops.FLOWS if what == "busy" else PER_KEY - 1
        if len(flows) < wanted:
            raise SystemExit(f"{text} has {len(flows)} flows, not {wanted}")
        if n or count == 1:  # the first one of a process imports and prepares
            found.append(took)
    answer({"ms": found})


def some_ids(folder: Path, count: int) -> list[str]:
    chance = random.Random(count)
    with opened(url(folder)) as here:
        [info] = here.log.topics(["order"])
        found = []
        for _ in range(count):
            partition = chance.randrange(info.partitions)
            start, end = info.ranges[partition]
            envelope = here.log.read("order", partition, chance.randrange(start, end), 1)[0].envelope
            found.append("" if envelope is None else envelope.id)
        return found


def forget(folder: Path) -> None:
    """The system lets go of what it keeps of these files in memory."""
    for path in (folder / "events.db", *(folder / "events.db.index").iterdir()):
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def serve(folder: Path, indexed: bool) -> None:
    """Publishes and handles in one process, while the index is built beside it, or is not."""
    seen, all_seen = 0, asyncio.Event()
    service = Service("bench")

    @service.on(OrderPlaced)
    async def handle(placed: OrderPlaced) -> None:
        nonlocal seen
        seen += 1
        if seen == SERVED:
            all_seen.set()

    if not indexed:
        Indexer.keep = lambda self: asyncio.sleep(3600)  # type: ignore[method-assign,assignment]
    app = App(service, broker=url(folder))
    late: list[float] = []

    async def tick() -> None:
        while True:
            began = REAL.monotonic()
            await asyncio.sleep(0.001)
            late.append((REAL.monotonic() - began - 0.001) * 1000)

    async def work() -> None:
        ready = asyncio.Event()
        serving = asyncio.create_task(app.serve(ready=ready.set))
        await ready.wait()
        ticking = asyncio.create_task(tick())
        watch = Stopwatch()
        for n in range(0, SERVED, AT_ONCE):
            await app.publish_all([OrderPlaced(order_id=key(i), cents=i) for i in range(n, n + AT_ONCE)])
        published = time.monotonic() - watch.began
        await all_seen.wait()
        found = watch.stop()
        ticking.cancel()
        app.stop()
        await serving
        covered = sum(path.stat().st_size for path in (folder / "events.db.index").glob("*"))
        answer(
            found
            | {
                "events": SERVED,
                "publish": published,
                "late": percentile(late, 99),
                "late_max": max(late),
                "index": covered,
            }
        )

    asyncio.run(work())


# --- all of it ---------------------------------------------------------------------------------------------------------


def ask(*arguments: object) -> dict[str, Any]:
    return run(sys.executable, "trace_run.py", *arguments, timeout=1800)


def measure(base: Path, sizes: Sequence[int], rounds: int) -> str:
    others = Others()
    served: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for n in range(rounds):
        for indexed in (True, False) if n % 2 else (False, True):
            say(f"serving, round {n + 1} of {rounds}")
            folder = base / f"serve-{n}-{indexed}"
            folder.mkdir()
            served[indexed].append(ask("serve", folder, int(indexed)))
    say(f"{SCANNED:,} events are searched without an index")
    short, long = base / "short", base / "long"
    short.mkdir()
    long.mkdir()
    ask("fill", short, 0, SCANNED)
    scan = median(ask("trace", short, SCANNED, "no index", 1)["ms"])
    before, found = 0, []
    for events in sizes:
        say(f"to {events:,} events")
        one: dict[str, Any] = {"events": events, "more": events - before, "fill": ask("fill", long, before, events)}
        one["build"] = ask("build", long)
        for what, count in (("key", TRACES), ("id", TRACES), ("cold", COLD), ("busy", 3)):
            one[what] = ask("trace", long, events, what, count)["ms"]
        found.append(one)
        before = events
    return report(found, scan, served, others.share())


def report(
    found: Sequence[dict[str, Any]], scan: float, served: dict[bool, list[dict[str, Any]]], others: float | None
) -> str:
    traced, built = [], []
    for one in found:
        millions, build = one["events"] / 1e6, one["build"]
        for what, text in (
            ("key", f"a key with {PER_KEY} events"), ("id", "an id"),
            ("cold", "such a key, after the system has let go of all files"),
            ("busy", f"a key with {one['events'] // BUSY_EVERY:,} events: all are read, {ops.FLOWS} flows are shown"),
        ):  # fmt: skip
            p99 = f"{percentile(one[what], 99):,.1f} ms" if len(one[what]) >= TRACES else ""
            traced.append(
                [f"{millions:g} million", text, f"{median(one[what]):,.1f} ms", p99, f"{max(one[what]):,.1f} ms"]
            )
        built.append(
            [
                f"{millions:g} million", f"{build['bytes'] / millions / 1e6:.1f} MB", str(build["segments"]),
                f"{build['bytes'] / one['fill']['bytes']:.1%}", f"{build['cpu'] / one['more'] * 1e6:.1f} s",
                f"{build['seconds'] / one['more'] * 1e6:.1f} s", f"{build['memory']:.0f} MB",
                f"{build['step']:.1f} ms", f"{build['step_max']:.1f} ms",
            ]
        )  # fmt: skip
    p99 = percentile(found[-1]["key"], 99)
    events, bytes = found[-1]["events"], found[-1]["fill"]["bytes"] / found[-1]["events"]
    ours, without = served[True], served[False]
    pairs = list(zip(without, ours, strict=True))
    costs = [
        ["publish", spread([a["publish"] / b["publish"] for a, b in pairs])],
        ["publish and handle", spread([a["seconds"] / b["seconds"] for a, b in pairs])],
        ["processor time, without / with", spread([a["cpu"] / b["cpu"] for a, b in pairs])],
    ]
    late = [
        [name, f"{median([r['late'] for r in results]):.1f} ms", f"{median([r['late_max'] for r in results]):.1f} ms"]
        for name, results in (("with building", ours), ("without", without))
    ]
    return f"""# The index behind `unlost trace`

Written by `make bench-trace`. An embedded log of small events ({bytes:.0f} bytes of the file each).

## One trace

Everything but the start of the interpreter: opening broker and store, searching, saying where each branch stands.
Wanted: a key among 10 million events in under {BAR_MS} ms. Among {events / 1e6:g} million: **{
        "pass" if p99 < BAR_MS else "fail"
    }** (p99 {p99:.1f} ms).

{table(["events in the log", "asked for", "p50", "p99", "most"], traced)}

Without an index the log is read twice: {scan / 1000:.1f} s for {SCANNED:,} events, which is {
        scan / 1000 / SCANNED * 1e6:.0f} s per million.

## The index

Size and building are per million events; here an event has two hashes (key and id), one that a handler has published has three.

{
        table(
            [
                "events in the log",
                "size",
                "segments",
                "of the log's file",
                "processor time",
                "time, without rests",
                "memory",
                "a step, p99",
                "most",
            ],
            built,
        )
    }

## What it costs those who publish and handle

Publishing writes nothing for it. A running service builds it beside its work, with a quarter of a processor at most:
{SERVED:,} events in calls of {
        AT_ONCE
    }, published and handled in one process; pairs of runs with and without building take turns.
A ratio below 1 is slower with it: median (least to most).

{table(["", "with building / without"], costs)}

How late the event loop is, which is what the steps of building add to a delivery:

{table(["", "p99", "most"], late)}

## Machine

- {processor()}, {os.cpu_count()} cores, {memory()}; {platform.system()} {platform.release()}
- Python {platform.python_version()}, unlost {version("unlost")}
- {
        "how much other programs took is not known"
        if others is None
        else f"{others:.0%} of the processors' time went to other programs and the system"
    }
"""


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--millions", type=int, nargs="+", default=[1, 10], help="of events, ascending")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench", help="where the files are made")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as base:
        sizes = [SPREAD] if options.quick else [1_000_000 * n for n in options.millions]
        text = measure(Path(base), sizes, 2 if options.quick else ROUNDS)
    print(text)
    if not options.quick:
        (HERE / "RESULTS-TRACE.md").write_text(text)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["fill", folder, begin, end]:
            fill(Path(folder), int(begin), int(end))
        case ["build", folder]:
            build(Path(folder))
        case ["trace", folder, events, what, count]:
            traces(Path(folder), int(events), what, int(count))
        case ["serve", folder, indexed]:
            serve(Path(folder), bool(int(indexed)))
        case arguments:
            main(arguments)
