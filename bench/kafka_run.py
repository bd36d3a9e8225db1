"""`make bench-kafka`: how fast unlost on Kafka is, measured beside raw loops and neighbours on one broker in the same run.

    python bench/kafka_run.py            under ten minutes; writes bench/RESULTS-KAFKA.md
    python bench/kafka_run.py --quick    about two minutes, fewer rounds; prints only
    python bench/kafka_run.py --long     with ten million events

The broker is the project's own (tests/servers/kafka.py); `--kafka kafka://host:port` names another one. Ours, the raw
loop and the neighbours take turns (A/B/C/A/B/C), each round gives one ratio, and the median of the ratios is what
counts. No test depends on it.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

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

try:
    import confluent_kafka
    from confluent_kafka.admin import AdminClient, NewTopic
except ImportError:
    raise SystemExit('the benchmark needs the client of Kafka: pip install "unlost[kafka]"') from None

PARTITIONS = 8
PEERS = {
    "quix": 1.0,
    "faststream-ack": 0.01,
    "faststream-batch": 0.2,
    "faststream-default": 0.1,
}  # share of the backlog
PACKAGES = ("quixstreams", "faststream[kafka]")
HANDLERS = 32
LINGER = 0  # of the raw producer, in ms: what is fastest here, and what ours has

Pair = tuple[dict[str, Any], dict[str, Any]]


class Bench:
    """One run. Every measurement gets an empty folder, processes and topics of its own; all read one backlog."""

    def __init__(self, base: Path, url: str, *, quick: bool, long: bool) -> None:
        self.base = base
        self.url = url
        self.bootstrap = url.removeprefix("kafka://").partition("?")[0]
        self.quick = quick
        self.rounds = 3 if quick else 5
        self.backlog = 100_000 if quick else 300_000
        self.events = 30_000 if quick else 100_000
        self.samples = 100 if quick else 300
        self.sizes = [10_000, 100_000] if quick else [10_000, 100_000, 1_000_000]
        if long:
            self.sizes.append(10_000_000)
        self.prefix = f"bench-{os.getpid()}-{int(time.time())}-"
        self.count = 0
        self.digest = 0
        self.filled = 0
        self.ends: list[int] = []
        self.consume: list[Pair] = []
        self.peers: dict[str, Results] = {name: [] for name in PEERS}
        self.swift: list[Pair] = []
        self.queue: list[Pair] = []
        self.publish: list[Pair] = []
        self.one: list[Pair] = []
        self.latency: dict[int, list[Pair]] = {1: [], 2: []}
        self.lanes: list[Pair] = []
        self.flat: dict[int, list[Pair]] = {}
        self.stalled: dict[str, dict[str, Any]] = {}
        self.not_installed: dict[str, str] = {}
        self.others: float | None = None

    # --- all of it -------------------------------------------------------------------------------------------

    def run(self, also: Sequence[int]) -> None:
        """All rounds; `also` are the processes of the broker, which are no disturbance."""
        others = Others(also)
        try:
            self._sizes([n for n in self.sizes if n <= self.backlog])
            self._fill(self.backlog)
            for number in range(self.rounds):
                say(f"round {number + 1} of {self.rounds}")
                self._round()
            for stalls in ("one", "all"):
                self.stalled[stalls] = self._ours("stall", self._shared(), stalls)
            self._sizes([n for n in self.sizes if n > self.backlog])
        finally:
            self._remove_topics()
        self.others = others.share() if also else None

    @property
    def disturbed(self) -> bool:
        return self.others is not None and self.others > DISTURBED

    def _round(self) -> None:
        self.consume.append((self._consume(), self._raw_consume()))
        self.swift.append((self._consume("at-most-once"), self.consume[-1][0]))
        self.queue.append((self._work("command"), self._work("event")))
        for name, share in PEERS.items():
            if name not in self.not_installed:
                self.peers[name].append(self._peer(name, int(self.backlog * share)))
        self._publish()
        for processes in (1, 2):
            self._latency(processes)
        self.lanes.append((self._ours("lanes", self._own()[0], 3000), self._ours("sequential", self._shared(), 100)))

    def _sizes(self, sizes: Sequence[int]) -> None:
        for size in sizes:
            say(f"a backlog of {size:,}")
            self._fill(size)
            rounds = 3 if size <= 1_000_000 else 1
            self.flat[size] = [(self._consume(), self._raw_consume()) for _ in range(rounds)]

    # --- the parts -------------------------------------------------------------------------------------------

    def _fill(self, total: int) -> None:
        if total > self.filled:
            found = self._ours("fill", self._shared(), self.filled, total - self.filled)
            self.digest ^= found["digest"]
            self.filled, self.ends = total, found["ends"]

    def _consume(self, guarantee: str = "at-least-once") -> dict[str, Any]:
        return self._ours("consume", self._shared(), self.filled, self.digest, guarantee)

    def _work(self, kind: str) -> dict[str, Any]:
        return self._ours("work", self._own()[0], self.events, kind)

    def _raw_consume(self) -> dict[str, Any]:
        return call("kafka_raw.py", "consume", self.bootstrap, f"{self.prefix}backlog.order", self.filled)

    def _peer(self, name: str, total: int) -> dict[str, Any]:
        return run(PEERS_PYTHON, "kafka_peers.py", name, self.bootstrap, f"{self.prefix}backlog.order", total)

    def _publish(self) -> None:
        url, ours, raw = self._own("order")
        published = self._ours("publish", url, self.events)
        self.publish.append(
            (published, call("kafka_raw.py", "publish", self.bootstrap, ours, raw, published["warm"], LINGER))
        )
        url, ours, raw = self._own("order")
        self.one.append(
            (self._ours("one", url, self.samples), call("kafka_raw.py", "one", self.bootstrap, ours, raw, self.samples))
        )

    def _latency(self, processes: int) -> None:
        url, ours, raw = self._own("order")
        self.latency[processes].append(
            (
                self._ours("latency", url, self.samples, processes),
                call("kafka_raw.py", "latency", self.bootstrap, ours, raw, self.samples, processes),
            )
        )

    def _ours(self, mode: str, url: str, *args: object) -> dict[str, Any]:
        with self._folder() as folder:
            return run(sys.executable, "kafka_ours.py", mode, folder, url, *args, timeout=1800)

    # --- places ----------------------------------------------------------------------------------------------

    def _shared(self) -> str:
        return f"{self.url}?prefix={self.prefix}backlog."

    def _own(self, topic: str = "") -> tuple[str, str, str]:
        """A URL with a prefix of its own, its topic, and an empty topic of the same shape for the raw loop."""
        self.count += 1
        prefix = f"{self.prefix}{self.count}."
        ours, raw = f"{prefix}{topic}", f"{self.prefix}{self.count}-raw.{topic}"
        if topic:
            self._admin(lambda admin: admin.create_topics([NewTopic(raw, PARTITIONS, 1)]))
        return f"{self.url}?prefix={prefix}", ours, raw

    def _admin(self, work: Any) -> None:
        admin = AdminClient({"bootstrap.servers": self.bootstrap, "log_level": 0})  # it must outlive its answers
        for future in work(admin).values():
            future.result()

    def _remove_topics(self) -> None:
        """Nothing is left behind on a broker that is somebody's."""
        admin = AdminClient({"bootstrap.servers": self.bootstrap, "log_level": 0})
        ours = [name for name in admin.list_topics(timeout=10).topics if name.startswith(self.prefix)]
        if ours:
            self._admin(lambda admin: admin.delete_topics(ours))

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        folder = Path(tempfile.mkdtemp(dir=self.base))
        try:
            yield folder
        finally:
            shutil.rmtree(folder)

    def install_peers(self) -> None:
        failed = install_peers(PACKAGES)
        for name in PEERS:
            for package, why in failed.items():
                if package.startswith(name.partition("-")[0]):
                    self.not_installed[name] = why


# --- the tables --------------------------------------------------------------------------------------------------


def verdict(b: Bench, passed: bool) -> str:
    return "disturbed" if b.disturbed else "pass" if passed else "fail"


def row(b: Bench, name: str, ours: str, other: str, target: float, ratios: list[float], least: bool) -> list[str]:
    found = median(ratios)
    return [
        name, ours, other, f"{'≥' if least else '≤'} {target:g}", spread(ratios),
        verdict(b, found >= target if least else found <= target),
    ]  # fmt: skip


def speed(result: dict[str, Any]) -> float:
    return float(result["events"] / result["seconds"])


def against(b: Bench, name: str, what: str, target: float) -> list[str]:
    """Our consuming beside a neighbour's, round by round."""
    label = f"consume, beside {what}"
    theirs = b.peers[name]
    if not theirs:
        return [label, "", "", f"≥ {target:g}", f"not measured: {b.not_installed.get(name, '')}", ""]
    ratios = [speed(ours) / speed(their) for (ours, _), their in zip(b.consume, theirs, strict=True)]
    ours = rate([ours for ours, _ in b.consume])
    return row(b, label, f"{ours:,.0f}/s", f"{rate(theirs):,.0f}/s", target, ratios, True)


def pairs(b: Bench, name: str, found: list[Pair], target: float) -> list[str]:
    ratios = [speed(ours) / speed(raw) for ours, raw in found]
    ours, raw = rate([ours for ours, _ in found]), rate([raw for _, raw in found])
    return row(b, name, f"{ours:,.0f}/s", f"{raw:,.0f}/s", target, ratios, True)


def delays(b: Bench, name: str, found: list[Pair], key: str, target: float) -> list[str]:
    ratios = [median(ours[key]) / median(raw[key]) for ours, raw in found]
    ours, raw = median([median(o[key]) for o, _ in found]), median([median(r[key]) for _, r in found])
    return row(b, name, f"{ours:,.0f} µs", f"{raw:,.0f} µs", target, ratios, False)


def flat_row(b: Bench) -> list[str]:
    costs = {size: cpu([ours for ours, _ in found]) for size, found in b.flat.items()}
    least, most = min(costs), max(costs)
    return [
        f"processor time per event, {most:,} events beside {least:,}", f"{costs[most]:.1f} µs", f"{costs[least]:.1f} µs",
        "≤ 1.25", f"**{costs[most] / costs[least]:.2f}**", verdict(b, costs[most] <= 1.25 * costs[least]),
    ]  # fmt: skip


def targets(b: Bench) -> str:
    return table(
        ["", "unlost", "the other", "target", "ratio: median (least to most)", ""],
        [
            pairs(b, "consume, beside the raw poll loop", b.consume, 0.6),
            against(b, "quix", "Quix Streams", 1.0),
            against(b, "faststream-ack", "FastStream, safe", 8.0),
            pairs(b, f"publish, {PUBLISHERS} publishers, one event per call", b.publish, 0.5),
            pairs(b, f"queue: {PUBLISHERS} senders → handle → durable, beside the same with events", b.queue, 0.8),
            pairs(b, "at-most-once beside at-least-once, the backlog", b.swift, 1.5),
            delays(b, "publish call → receipt, one by one, p50", b.one, "times", 1.5),
            delays(b, "publish call → handler start, p50, one process", b.latency[1], "start", 2.0),
            delays(b, "publish call → handler start, p50, two processes", b.latency[2], "start", 2.0),
            pairs(b, f"{HANDLERS} slow handlers on one partition, beside one at a time", b.lanes, 25.0),
            flat_row(b),
        ],
    )


def work(b: Bench) -> str:
    ours, raw = [o for o, _ in b.consume], [r for _, r in b.consume]
    sent, raw_sent = [o for o, _ in b.publish], [r for _, r in b.publish]
    rows = [
        ["unlost, consume", f"{rate(ours):,.0f}/s", f"{cpu(ours):.1f} µs", "until all positions are durable in the store"],
        ["raw poll loop", f"{rate(raw):,.0f}/s", f"{cpu(raw):.1f} µs", "`consume(500)`, `json.loads`; nothing is saved"],
    ]  # fmt: skip
    for name, results in b.peers.items():
        if results:
            r = results[0]
            label = f"{r['name']} {r['version']}"
            rows.append([label, f"{rate(results):,.0f}/s", f"{cpu(results):.1f} µs", r["settings"]])
        else:
            rows.append([name, "", "", f"not measured: {b.not_installed.get(name, '')}"])
    rows += [
        [f"unlost, publish, {PUBLISHERS} publishers", f"{rate(sent):,.0f}/s", f"{cpu(sent):.1f} µs", "each call returns its receipt"],
        ["raw producer", f"{rate(raw_sent):,.0f}/s", f"{cpu(raw_sent):.1f} µs",
         f"enable.idempotence, acks=all, linger.ms={LINGER}, delivery reports, the same messages ready-made"],
    ]  # fmt: skip
    return table(["", "events", "processor time per event", "how"], rows)


def sizes(b: Bench) -> str:
    rows = []
    for size, found in sorted(b.flat.items()):
        ours, raw = [o for o, _ in found], [r for _, r in found]
        rows.append(
            [
                f"{size:,}", f"{rate(ours):,.0f}/s", f"{cpu(ours):.1f} µs", f"{cpu(raw):.1f} µs",
                f"{median([o['memory'] for o in ours]):,.0f} MB",
            ]
        )  # fmt: skip
    return table(["backlog", "unlost", "processor time per event", "of the raw loop", "memory at the end"], rows)


def stalls(b: Bench) -> str:
    names = {"one": "the handler of one key of 1,000 never returns", "all": "no handler returns"}
    return table(
        ["", "handled meanwhile", "memory before", "at most", "growth"],
        [
            [text, f"{r['seen']:,}", f"{r['before']:.0f} MB", f"{r['most']:.0f} MB", f"{r['growth']:.0f} MB"]
            for r, text in ((b.stalled[kind], text) for kind, text in names.items())
        ],
    )


def latencies(b: Bench) -> str:
    rows = [
        ["unlost, publish call → receipt", *cells([v for o, _ in b.one for v in o["times"]])],
        ["raw, `produce` → delivery report", *cells([v for _, r in b.one for v in r["times"]])],
    ]
    for processes, found in b.latency.items():
        where = "one process" if processes == 1 else "two processes"
        rows.append(
            [f"unlost, publish call → handler start, {where}", *cells([v for o, _ in found for v in o["start"]])]
        )
        rows.append([f"raw, `produce` → `poll` returns it, {where}", *cells([v for _, r in found for v in r["start"]])])
    return table(["", "p50", "p95", "p99"], rows)


def machine(b: Bench) -> str:
    lines = [
        f"{processor()}, {os.cpu_count()} cores, {memory()}; {platform.system()} {platform.release()}; "
        "broker, publishers and consumers on this machine",
        f"Apache Kafka {kafka_version()}, one broker; Python {platform.python_version()}, unlost {version('unlost')}, "
        f"confluent-kafka {version('confluent-kafka')} (librdkafka {confluent_kafka.libversion()[0]})",
    ]
    if b.others is None:
        lines.append("how much of the processors' time went to other programs is not known: the broker was given")
    else:
        lines.append(f"{b.others:.0%} of the processors' time went to other programs and the system")
    return "\n".join(f"- {line}" for line in lines)


def kafka_version() -> str:
    from servers import jars

    return str(jars.VERSION)


def document(b: Bench) -> str:
    warning = ""
    if b.disturbed:
        warning = f"""
**Disturbed: other programs took {b.others:.0%} of the processors' time. These ratios say nothing about the targets;
run it again on a quiet machine.**
"""
    return f"""# Speed on Kafka
{warning}
Written by `make bench-kafka`. {b.rounds} rounds; ours, the raw loop and the neighbours take turns on one broker; medians.
Events have {EVENT_BYTES} bytes of data, one of {KEYS:,} keys, and our headers; all read the same topic of {PARTITIONS} partitions.
Nothing is switched off: a receipt comes after the cluster's confirmation, a position counts when it is durable in the
store, and each run ends with a comparison of what was published with what is in the log and in the books.

## Targets

{targets(b)}

- The raw loops are in `bench/kafka_raw.py`: confluent-kafka, the same messages. They do none of our other work.
- Consume: a backlog of {b.backlog:,} events, at-least-once, from the first event handled until the positions of all are
  durable. The raw loop saves nothing. The neighbours' clock stops with their last event handled, before they commit.
- Queue: commands and events in turn, sent and handled in one process.
- Publish: a closed loop, each publisher sends its next event when the one before is confirmed; the raw producer keeps
  its queue full. One by one: linger.ms=0 on both sides.
- Handler start: one event at a time, the next when the one before is settled (raw: seen and confirmed).
- Slow handlers: {HANDLERS} at a time, 10 ms each, {KEYS:,} keys, one partition; the order of each key is checked.

## The same work

{work(b)}

FastStream with `batch=True` calls one handler for up to 500 events, so it is shown, and not compared.

## Latency

{latencies(b)}

## Cost by size

{sizes(b)}

## Memory under stalled handlers

A backlog of {b.backlog:,} events, watched for 8 seconds.

{stalls(b)}

## Machine

{machine(b)}
"""


# --- the broker --------------------------------------------------------------------------------------------------


@contextmanager
def broker(given: str | None) -> Iterator[tuple[str, list[int]]]:
    """The URL of a broker, and its processes if they are ours."""
    sys.path.insert(0, str(ROOT / "tests"))
    if given:
        yield given.partition("?")[0], []
        return
    from servers import kafka

    why = kafka.available()
    if why is not None:
        raise SystemExit(
            f"no Kafka can be had here, so nothing was measured: {why}\nname one: --kafka kafka://host:port"
        )
    try:
        cluster = kafka.Kafka.start()
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        raise SystemExit(f"Kafka did not start, so nothing was measured: {error}") from None
    with cluster:
        yield cluster.url, [node.child.pid for node in cluster._nodes.values() if node.child]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and events; prints only")
    parser.add_argument("--long", action="store_true", help="with ten million events")
    parser.add_argument("--kafka", help="kafka://host:port of a broker to use; else one is started")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench", help="where the stores are made")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    with broker(options.kafka) as (url, processes):
        bench = Bench(options.folder, url, quick=options.quick, long=options.long)
        bench.install_peers()
        seconds = timed(lambda: bench.run(processes))
        text = document(bench)
    print(text)
    if not options.quick:
        (HERE / "RESULTS-KAFKA.md").write_text(text)
    say(f"{seconds:.0f} s" + ("" if options.quick else f", written to {HERE.name}/RESULTS-KAFKA.md"))


if __name__ == "__main__":
    main()
