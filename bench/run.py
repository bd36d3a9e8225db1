"""`make bench`: how fast unlost is, measured beside raw loops on the same disk in the same run.

    python bench/run.py            about four minutes; writes bench/RESULTS.md
    python bench/run.py --quick    under a minute; prints only

Figures per second belong to a machine and to an hour; ratios last longer. So ours and the raw loop take turns
(A/B/A/B), each pair gives one ratio, and the median of the ratios is what counts. No test depends on it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import apsw
from common import EVENT_BYTES, HERE, KEYS, PUBLISHERS, call, run
from report import (
    DISTURBED,
    PEERS_PYTHON,
    ROOT,
    Others,
    Results,
    cells,
    cpu,
    install_peers,
    median,
    memory,
    processor,
    rate,
    say,
    spread,
    table,
    timed,
)

from unlost.sqlite.guards import file_system

PEERS = {"huey": 3000, "persist-queue": 3000, "dbos": 200}  # name, events
BATCH = 100  # events in one publish_all
SMALL_BATCH = 20
MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs", "overlay")


class Bench:
    """One run. Every measurement gets an empty folder and processes of its own."""

    def __init__(self, base: Path, *, quick: bool) -> None:
        self.base = base
        self.rounds = 3 if quick else 7
        self.events = 8_000 if quick else 30_000
        self.samples = 60 if quick else 200
        self.quick = quick
        self.publish: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.two: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.two_small: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.two_single: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.latency: dict[int, Results] = {1: [], 2: []}
        self.alone: Results = []
        self.once: dict[str, Results] = {"plain": [], "at-most-once": [], "inbox": [], "transaction": []}
        self.queue: Results = []
        self.peers: dict[str, Results] = {name: [] for name in PEERS}
        self.not_installed: dict[str, str] = {}
        self.others: float | None = None  # share of the processors' time that was not ours

    def run(self) -> None:
        """All rounds, and how much of the machine other programs took meanwhile."""
        others = Others()
        self._rounds()
        self.others = others.share()

    @property
    def disturbed(self) -> bool:
        return self.others is not None and self.others > DISTURBED

    def _rounds(self) -> None:
        for number in range(self.rounds):
            say(f"round {number + 1} of {self.rounds}")
            self.publish.append(self._pair("publish", self.events, PUBLISHERS))
            self.two.append(self._pair("two", self.events, BATCH))
            self.two_small.append(self._pair("two", self.events, SMALL_BATCH))
            self.two_single.append(self._pair("two", self.events, 1))
            self.queue.append(self._ours("two", self.events, 1, "command"))
            for kind in ("plain", "at-most-once"):
                self.once[kind].append(self._ours("once", 4 * self.events, kind))
            for processes in (1, 2):
                self.latency[processes].append(self._ours("latency", self.samples, processes))
            if number < 3:
                self._for_information()

    def _pair(self, mode: str, *args: object) -> tuple[dict[str, Any], dict[str, Any]]:
        """A, then B on the rows that A wrote."""
        with self._folder() as folder:
            ours = call("ours.py", mode, folder, *args)
            return ours, call("raw.py", mode, folder, json.dumps(ours))

    def _ours(self, mode: str, *args: object) -> dict[str, Any]:
        with self._folder() as folder:
            return call("ours.py", mode, folder, *args)

    def _for_information(self) -> None:
        self.alone.append(self._ours("publish", self.events // 10, 1))
        for kind, total in (("inbox", self.events), ("transaction", self.events // 6)):
            self.once[kind].append(self._ours("once", total, kind))
        if self.quick:
            return
        for name, total in PEERS.items():
            if name not in self.not_installed:
                with self._folder() as folder:
                    self.peers[name].append(run(PEERS_PYTHON, "peers.py", name, folder, total))

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        folder = Path(tempfile.mkdtemp(dir=self.base))
        try:
            yield folder
        finally:
            shutil.rmtree(folder)

    def install_peers(self) -> None:
        self.not_installed = install_peers(PEERS)


# --- the tables --------------------------------------------------------------------------------------------------


def verdict(b: Bench, passed: bool) -> str:
    return "disturbed" if b.disturbed else "pass" if passed else "fail"


def ratio_row(b: Bench, name: str, pairs: list[tuple[dict[str, Any], dict[str, Any]]], target: float) -> list[str]:
    ratios = [raw["seconds"] / ours["seconds"] for ours, raw in pairs]
    found = median(ratios)
    return [
        name, f"{rate([ours for ours, _ in pairs]):,.0f}/s", f"{rate([raw for _, raw in pairs]):,.0f}/s",
        f"≥ {target:g}", spread(ratios),
        verdict(b, found >= target),
    ]  # fmt: skip


def own_row(b: Bench, name: str, ours: Results, other: Results, target: float) -> list[str]:
    """One way of ours beside another, in the same rounds."""
    ratios = [(o["events"] / o["seconds"]) / (t["events"] / t["seconds"]) for o, t in zip(ours, other, strict=True)]
    found = median(ratios)
    return [
        name,
        f"{rate(ours):,.0f}/s",
        f"{rate(other):,.0f}/s",
        f"≥ {target:g}",
        spread(ratios),
        verdict(b, found >= target),
    ]


def latency_row(b: Bench, name: str, results: Results, target: float) -> list[str]:
    ratios = [median(r["start"]) / median(r["disk"]) for r in results]
    found = median(ratios)
    return [
        name, f"{median([median(r['start']) for r in results]):,.0f} µs",
        f"{median([median(r['disk']) for r in results]):,.0f} µs",
        f"≤ {target:g}", spread(ratios),
        verdict(b, found <= target),
    ]  # fmt: skip


def targets(b: Bench) -> str:
    return table(
        ["", "unlost", "raw", "target", "ratio: median (least to most)", ""],
        [
            ratio_row(b, f"publish, {PUBLISHERS} publishers, one event per call", b.publish, 0.3),
            ratio_row(b, f"two processes, `publish_all` of {BATCH} → handle → durable position", b.two, 0.3),
            ratio_row(
                b, f"two processes, `publish_all` of {SMALL_BATCH} → handle → durable position", b.two_small, 0.3
            ),
            ratio_row(b, f"two processes, {PUBLISHERS} publishers → handle → durable position", b.two_single, 0.3),
            own_row(
                b,
                f"queue: {PUBLISHERS} senders → handle → durable, beside the same with events",
                b.queue,
                [ours for ours, _ in b.two_single],
                0.8,
            ),
            own_row(b, "at-most-once beside at-least-once, a backlog", b.once["at-most-once"], b.once["plain"], 1.5),
            latency_row(b, "publish call → handler start, p50, one process", b.latency[1], 4.0),
            latency_row(b, "publish call → handler start, p50, two processes", b.latency[2], 4.0),
        ],
    )


def same_work(b: Bench) -> str:
    def per(results: Results, name: str) -> str:
        return f"{median([r['events'] / r[name] for r in results]):.0f}"

    ours, raw = [o for o, _ in b.publish], [r for _, r in b.publish]
    ours2, raw2 = [o for o, _ in b.two], [r for _, r in b.two]
    return table(
        ["", "unlost", "raw"],
        [
            ["rows per commit: publish", per(ours, "commits"), per(raw, "commits")],
            ["rows per commit: two processes, publishing", per(ours2, "publish_commits"), per(raw2, "publish_commits")],
            ["rows per commit: two processes, handling", per(ours2, "handle_commits"), per(raw2, "handle_commits")],
            ["bytes of a row", f"{ours[0]['row_bytes']:.0f}", "the same rows"],
            ["processor time per event: publish", f"{cpu(ours):.1f} µs", f"{cpu(raw):.1f} µs"],
            ["… two processes, publishing", f"{cpu(ours2, 'publish_cpu'):.1f} µs", f"{cpu(raw2, 'publish_cpu'):.1f} µs"],
            ["… two processes, handling", f"{cpu(ours2, 'handle_cpu'):.1f} µs", f"{cpu(raw2, 'handle_cpu'):.1f} µs"],
        ],
    )  # fmt: skip


def latencies(b: Bench) -> str:
    rows = []
    for processes, results in b.latency.items():
        for name, what in (("publish", "publish call → receipt"), ("start", "publish call → handler start")):
            values = [v for r in results for v in r[name]]
            rows.append([f"{what}, {'one process' if processes == 1 else 'two processes'}", *cells(values)])
    rows.append(["4 KiB pwrite + fdatasync", *cells([v for r in (*b.latency[1], *b.latency[2]) for v in r["disk"]])])
    return table(["", "p50", "p95", "p99"], rows)


def information(b: Bench) -> str:
    ours, none = [o for o, _ in b.publish], ""
    rows = [
        ["unlost, 100 publishers", f"{rate(ours):,.0f}/s", f"{cpu(ours):.0f} µs", none, none, "receipt after fsync"],
        ["unlost, one publisher", f"{rate(b.alone):,.0f}/s", f"{cpu(b.alone):.0f} µs", none, none, "the same"],
    ]
    for kind, what in (
        ("at-most-once", "unlost, at-most-once"),
        ("plain", "unlost, at-least-once"),
        ("inbox", "unlost, effectively-once"),
        ("transaction", "unlost, effectively-once, `ctx.transaction()` with a row of its own"),
    ):
        results = b.once[kind]
        each = median([r["events"] / r["commits"] for r in results])
        note = f"a backlog, until all positions are durable; {each:.0f} events per commit"
        rows.append([what, none, none, f"{rate(results):,.0f}/s", f"{cpu(results):.0f} µs", note])
    for name, results in b.peers.items():
        if name in b.not_installed:
            rows.append([name, none, none, none, none, f"not measured: {b.not_installed[name]}"])
        elif results:
            r = results[0]
            rows.append(
                [
                    f"{r['name']} {r['version']}",
                    f"{median([x['put_rate'] for x in results]):,.0f}/s",
                    f"{median([x['put_cpu'] for x in results]) * 1e6:.0f} µs",
                    f"{median([x['handle_rate'] for x in results]):,.0f}/s",
                    f"{median([x['handle_cpu'] for x in results]) * 1e6:.0f} µs",
                    r["settings"],
                ]
            )
    return table(["", "publish", "processor time", "handle", "processor time", "how"], rows)


def machine(b: Bench) -> str:
    ours = b.publish[0][0]
    lines = [
        f"{processor()}, {os.cpu_count()} cores, {memory()}; {platform.system()} {platform.release()}, "
        f"{file_system(b.base.resolve())}",
        f"Python {platform.python_version()}, unlost {version('unlost')}, SQLite {apsw.sqlite_lib_version()} "
        f"(apsw {version('apsw')}), msgspec {version('msgspec')}",
        "both sides: " + ", ".join(f"{name}={value}" for name, value in ours["pragmas"].items()),
    ]
    found = [r[0]["sqlite"] for r in b.peers.values() if r]
    if b.others is not None:
        lines.append(f"{b.others:.0%} of the processors' time went to other programs and the system")
    if found:
        lines.append(f"the neighbours use Python's own SQLite {found[0]}")
    return "\n".join(f"- {line}" for line in lines)


def document(b: Bench) -> str:
    warning = ""
    if b.disturbed:
        warning = f"""
**Disturbed: other programs took {b.others:.0%} of the processors' time. These ratios say nothing about the targets;
run it again on a quiet machine.**
"""
    return f"""# Speed
{warning}
Written by `make bench`. {b.rounds} rounds; ours and the raw loop take turns on one disk; medians.
Events have {EVENT_BYTES} bytes of data and one of {KEYS:,} keys. Nothing is switched off: a receipt comes after the fsync,
a position counts when it is durable, and each run ends with a comparison of what was published with what is there.

## Targets

{targets(b)}

- The raw loops are in `bench/raw.py`: apsw, the same tables, settings and rows (those that unlost has just written, in
  its order), as many rows per commit as unlost had. They do none of its other work.
- Publish: a closed loop, each publisher sends its next event when the one before is durable.
- Two processes: from the first call until the position of the last event is durable in the other process. The raw
  loop has a writer and a reader that decodes the data, under the same lock file.
- Handler start: one event at a time, sent when the one before is settled; between two of them one 4 KiB `pwrite` +
  `fdatasync` over an allocated file on the same disk.

## The same work

{same_work(b)}

## Latency

{latencies(b)}

## For information

{information(b)}

The neighbours run in one process with one caller, as their own documentation shows; unlost's group commit needs
concurrent callers, so its line with one publisher is the one to compare with their publish column.

## Machine

{machine(b)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute, without the neighbours; prints only")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench", help="where the files are made")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    kind = file_system(options.folder.resolve())
    if kind in MEMORY_FILE_SYSTEMS:
        say(
            f"warning: {kind} is memory, or hides the disk; fsync may cost nothing there. Give --folder on a real disk."
        )
    bench = Bench(options.folder, quick=options.quick)
    timed(bench.install_peers if not options.quick else lambda: None)
    seconds = timed(bench.run)
    text = document(bench)
    print(text)
    if not options.quick:
        (HERE / "RESULTS.md").write_text(text)
    say(f"{seconds:.0f} s" + ("" if options.quick else f", written to {HERE.name}/RESULTS.md"))


if __name__ == "__main__":
    main()
