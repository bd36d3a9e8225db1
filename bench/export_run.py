"""`make bench-export`: how fast `unlost store export` is, beside a raw loop on the same log in the same run.

    python bench/export_run.py            about a minute; prints only
    python bench/export_run.py --quick    fewer events and rounds

The raw loop selects the rows of the log, takes the attributes apart and hands the same columns to pyarrow; it checks
nothing, redacts nothing and cannot be resumed. Ours and the raw loop take turns in processes of their own, each pair gives
one ratio, and the median of the ratios is what counts. No test depends on it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import apsw
import msgspec
from common import Stopwatch, answer, call, order
from report import Others, cpu, rate, say, spread, table

from unlost import App
from unlost.ops.connect import opened
from unlost.ops.export import COLUMNS, EVENTS_MAX, export
from unlost.sqlite.schema import POSITION_BITS, POSITION_MAX

try:
    import pyarrow as pa
    from pyarrow import parquet
except ImportError:
    raise SystemExit('the benchmark needs pyarrow: pip install "unlost[parquet]"') from None

BATCH = 2000
RATE = 200_000  # events per second that the design asks for, or else RATIO
RATIO = 0.5


class Head(msgspec.Struct, gc=False):
    """What the raw loop reads of an event's attributes."""

    id: str
    source: str
    type: str
    time: str
    subject: str | None = None
    correlationid: str | None = None
    causationid: str | None = None
    traceparent: str | None = None
    unlostversion: int = 1
    unlostheaders: str | None = None


async def fill(folder: Path, events: int) -> None:
    async with App(name="bench", broker=f"embedded://{folder}/events.db") as app:
        for n in range(0, events, BATCH):
            await app.publish_all([order(i) for i in range(n, min(n + BATCH, events))])


def ours(folder: Path, to: Path, format: str) -> int:
    with opened(f"embedded://{folder}/events.db") as here:
        return export(here.log, to, format=format).events  # type: ignore[arg-type]


def raw(folder: Path, to: Path) -> int:
    """Whole partitions, in files of as many events as ours."""
    to.mkdir()
    connection = apsw.Connection(f"{folder}/events.db", flags=apsw.SQLITE_OPEN_READONLY)
    [(topic, first, partitions)] = connection.execute("select name, first_number, partitions from unlost_topic")
    events = 0
    for partition in range(partitions):
        low = (first + partition) << POSITION_BITS
        rows = connection.execute(
            "select at, head, key, data, recorded from unlost_log where at between ? and ? order by at",
            (low, low | POSITION_MAX),
        )
        found: list[tuple[Any, ...]] = []
        for row in rows:
            found.append(row)
            if len(found) == EVENTS_MAX:
                events += write(to / f"{partition}-{events}.parquet", topic, partition, low, found)
                found = []
        if found:
            events += write(to / f"{partition}-{events}.parquet", topic, partition, low, found)
    return events


def write(path: Path, topic: str, partition: int, low: int, rows: Sequence[tuple[Any, ...]]) -> int:
    decode = msgspec.json.Decoder(Head).decode
    at, heads, keys, data, recorded = zip(*rows, strict=True)
    h = [decode(head) for head in heads]
    time = pa.timestamp("us", tz="UTC")
    columns = [
        pa.array([x.id for x in h]), pa.array([x.source for x in h]), pa.array([x.type for x in h]),
        pa.array([topic] * len(h)), pa.array([partition] * len(h), pa.int32()), pa.array([a - low for a in at], pa.int64()),
        pa.array([key.decode() for key in keys]), pa.array(keys, pa.binary()),
        pa.array([datetime.fromisoformat(x.time) for x in h], time), pa.array(recorded, time),
        pa.array([x.subject for x in h], pa.string()), pa.array([x.correlationid for x in h], pa.string()),
        pa.array([x.causationid for x in h], pa.string()), pa.array([x.traceparent for x in h], pa.string()),
        pa.array([x.unlostversion for x in h], pa.int32()), pa.array([x.unlostheaders for x in h], pa.string()),
        pa.array([d.decode() for d in data], pa.string()), pa.nulls(len(h), pa.binary()), pa.nulls(len(h), pa.string()),
    ]  # fmt: skip
    with path.open("wb") as file:
        parquet.write_table(pa.Table.from_arrays(columns, names=list(COLUMNS)), file, compression="zstd")
        file.flush()
        os.fsync(file.fileno())
    return len(h)


def one(mode: str, folder: Path, to: Path) -> None:
    watch = Stopwatch()
    events = raw(folder, to) if mode == "raw" else ours(folder, to, mode)
    answer({"events": events} | watch.stop())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    events, rounds = (100_000, 3) if options.quick else (400_000, 5)
    found: dict[str, list[dict[str, Any]]] = {"raw": [], "parquet": [], "jsonl": []}
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as base:
        folder = Path(base)
        say(f"{events:,} events are published")
        asyncio.run(fill(folder, events))
        others = Others()
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            for mode in found:
                found[mode].append(call("export_run.py", mode, folder, folder / f"{mode}-{number}"))
        share = others.share()
    wrong = {mode: [r["events"] for r in results] for mode, results in found.items()}
    if any(n != events for numbers in wrong.values() for n in numbers):
        raise SystemExit(f"not all of {events} events were written: {wrong}")
    ratios = {
        mode: [a["seconds"] / b["seconds"] for a, b in zip(found["raw"], found[mode], strict=True)] for mode in found
    }
    rows = [[mode, f"{rate(r):,.0f}/s", f"{cpu(r):.1f} µs", spread(ratios[mode])] for mode, r in found.items()]
    print(table(["written", "events", "processor time per event", "ratio to raw"], rows))
    print(f"\nwanted of parquet: {RATE:,}/s, or a ratio of {RATIO:g}", end="")
    print("" if share is None else f"; other programs took {share:.0%} of the machine")


if __name__ == "__main__":
    if len(sys.argv) == 4:
        one(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
