"""`make bench-postgres`: how fast unlost is on PostgreSQL, measured beside hand-written loops on one server in the same run.

    python bench/postgres_run.py            about six minutes; writes bench/RESULTS-POSTGRES.md
    python bench/postgres_run.py --quick    about two minutes, small sizes; prints only
    python bench/postgres_run.py --only relay,once

The server is the project's own (tests/servers/postgres.py), with fsync on; so is Kafka, where one can be had. Ours and the
raw loop take turns (A/B/A/B), each pair gives one ratio, and the median of the ratios is what counts. No test depends on it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psycopg
from common import EVENT_BYTES, HERE, KEYS, call, run
from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic
from kafka_run import kafka_version, row, speed
from postgres_shared import TABLES
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
    table,
    timed,
)

sys.path.insert(0, str(ROOT / "tests"))
from servers import kafka as kafka_server
from servers import postgres as postgres_server
from unlost.store.postgres import migrate
from unlost.store.postgres.settings import parse

Pair = tuple[dict[str, Any], dict[str, Any]]
PARTS = ("publish", "relay", "once", "latency", "growth")
# What a database of this size is given by whoever sets it up; everything that makes it safe stays as it is.
SERVER = {
    "shared_buffers": "1GB", "maintenance_work_mem": "512MB", "max_wal_size": "8GB", "checkpoint_timeout": "15min",
    "max_connections": "200",
}  # fmt: skip
PUBLISHERS = {
    "threads 1": ("threads", 1, "one client"),
    "threads 16": ("threads", 16, "16 threads"),
    "processes 16": ("processes", 16, "16 processes"),
    "async 1": ("async", 1, "one client, async"),
    "async 16": ("async", 16, "16 tasks, async"),
}
HANDLERS = {
    "apart 1": ("apart", 1, "`ctx.transaction()`, one at a time, relayed by others"),
    "apart 16": ("apart", 16, "`ctx.transaction()`, 16 at a time, relayed by others"),
    "plain 1": ("plain", 1, "`ctx.transaction()`, one at a time"),
    "plain 16": ("plain", 16, "`ctx.transaction()`, 16 at a time"),
    "session 1": ("session", 1, "`ctx.transaction(connection)`, one at a time"),
    "session 16": ("session", 16, "`ctx.transaction(connection)`, 16 at a time"),
}
PEERS = ("ordered", "parallel")
PACKAGES = ("faststream[kafka]", "asyncpg", "faststream-outbox")
LATENCY_MS = 5.0

# Marks of events that were settled long ago. Their ids are random (those of derived events are), or begin with the time.
IDS = {
    "random": "decode(md5(n::text), 'hex')",
    "ordered": "decode(lpad(to_hex(1700000000000 + n / 10), 12, '0') || substr(md5(n::text), 13), 'hex')",
}
FILL = (
    "insert into unlost.unlost_inbox (content, position, unit, at, service, source, id) "
    "select n, -n, 1 + n % 8, 1700000000, 'billing', 'app', {id} from generate_series(1::bigint, {rows}) n"
)


class Bench:
    """One run. Every pair gets a database of its own, every measurement its own processes."""

    def __init__(self, base: Path, server: Any, kafka: Any, why_not: str, *, quick: bool, only: list[str]) -> None:
        self.base = base
        self.server = server
        self.kafka = kafka
        self.why_not = why_not
        self.only = only
        self.rounds = 3
        self.transactions = {1: 300, 16: 1600} if quick else {1: 1000, 16: 6400}
        self.backlog = 5_000 if quick else 20_000
        self.events = {1: 200, 16: 1000} if quick else {1: 800, 16: 4000}
        self.samples = 40 if quick else 150
        self.marks = 300_000 if quick else 10_000_000
        self.sized = 100_000 if quick else 1_000_000
        self.peer_events = 500 if quick else 3000
        self.publish: dict[str, list[Pair]] = {name: [] for name in PUBLISHERS}
        self.relay: dict[str, list[Pair]] = {"embedded": [], "kafka": []}
        self.once: dict[str, list[Pair]] = {name: [] for name in HANDLERS}
        self.latency: dict[str, Results] = {"embedded": [], "kafka": []}
        self.growth: dict[str, Results] = {"empty": [], "ordered": [], "random": []}
        self.sizes: dict[str, list[int]] = {}
        self.left: list[int] = []
        self.peers: dict[str, Results] = {name: [] for name in PEERS}
        self.not_installed = ""
        self.prefix = f"bench-{os.getpid()}-{int(time.time())}-"
        self.count = 0
        self.others: float | None = None

    # --- all of it -------------------------------------------------------------------------------------------

    def run(self) -> None:
        others = _Others(
            self.server.pid, [] if self.kafka is None else [n.child.pid for n in self.kafka._nodes.values()]
        )
        with contextlib.ExitStack() as stack:
            grown = stack.enter_context(self._grown()) if "growth" in self.only else {}
            for number in range(self.rounds):
                say(f"round {number + 1} of {self.rounds}")
                for part in self.only:
                    if part == "growth":
                        self._growth(grown)
                    else:
                        getattr(self, f"_{part}")()
        self.others = others.share()

    @property
    def disturbed(self) -> bool:
        return self.others is not None and self.others > DISTURBED

    def _publish(self) -> None:
        for name, (kind, clients, _) in PUBLISHERS.items():
            with self._place() as (url, broker):
                total = self.transactions[clients]
                ours = call("postgres_ours.py", "publish", url, broker, kind, clients, total)
                self.publish[name].append((ours, call("postgres_raw.py", "publish", url, kind, clients, total)))

    def _relay(self) -> None:
        for name in self._brokers():
            with self._place(name) as (url, broker):
                call("postgres_ours.py", "fill", url, broker, self.backlog)
                ours = call("postgres_ours.py", "relay", url, broker, self.backlog)
                raw = call(
                    "postgres_raw.py",
                    "relay",
                    url,
                    self._broker(name, Path(broker.rpartition("/")[0][11:])),
                    self.backlog,
                )
                self.relay[name].append((ours, raw))
                self.left = self._sizes_of(url, "unlost_outbox", "unlost_outbox_status", "unlost_relay")
        if self.kafka is not None and not self.not_installed:
            for kind in PEERS:
                with self._place() as (url, _):
                    topic = f"{self.prefix}{kind}-{len(self.peers[kind])}"
                    self._make_topic(topic)
                    self.peers[kind].append(
                        run(PEERS_PYTHON, "postgres_peers.py", url, self.kafka.bootstrap, topic, self.peer_events, kind)
                    )
                    self._check_topic(topic, self.peer_events)

    def _once(self) -> None:
        for name, (kind, concurrency, _) in HANDLERS.items():
            with self._place() as (url, broker):
                total = self.events[concurrency]
                ours = call("postgres_ours.py", "once", url, broker, kind, concurrency, total)
                self.once[name].append((ours, call("postgres_raw.py", "once", url, broker, concurrency, total)))

    def _latency(self) -> None:
        for name in self._brokers():
            with self._place(name) as (url, broker):
                self.latency[name].append(call("postgres_ours.py", "latency", url, broker, self.samples))

    def _growth(self, grown: dict[str, tuple[str, str]]) -> None:
        for name, (url, broker) in grown.items():
            ids = "random" if name == "random" else "ordered"
            self.growth[name].append(
                call("postgres_ours.py", "once", url, broker, "plain", 16, self.events[16] // 2, ids)
            )

    # --- an inbox that has grown -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def _grown(self) -> Iterator[dict[str, tuple[str, str]]]:
        """Databases that stay: one whose inbox is empty, two with ten million marks."""
        with contextlib.ExitStack() as stack:
            places = {name: stack.enter_context(self._place()) for name in self.growth}
            say(f"filling two inboxes with {self.marks:,} rows each")
            filling = [threading.Thread(target=self._fill, args=(name, places[name][0])) for name in IDS]
            for thread in filling:
                thread.start()
            for thread in filling:
                thread.join()
            self.server.sql("checkpoint")
            if len(self.sizes) != len(IDS):
                raise SystemExit("an inbox could not be filled")
            yield places

    def _fill(self, name: str, url: str) -> None:
        """First as it fills in life, for the sizes; then the rest without indexes, which are made anew: that is faster."""
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(FILL.format(id=IDS[name], rows=self.sized))
            found = self._sizes_of(url, "unlost_inbox", "unlost_inbox_pkey", "unlost_inbox_place", whole=False)
            connection.execute("truncate unlost.unlost_inbox")
            connection.execute("alter table unlost.unlost_inbox drop constraint unlost_inbox_pkey")
            connection.execute("drop index unlost.unlost_inbox_place")
            connection.execute(FILL.format(id=IDS[name], rows=self.marks))
            connection.execute("alter table unlost.unlost_inbox add primary key (service, id, source)")
            connection.execute("create index unlost_inbox_place on unlost.unlost_inbox (unit, position)")
            connection.execute("vacuum analyze unlost.unlost_inbox")
        self.sizes[name] = found

    def _sizes_of(self, url: str, *names: str, whole: bool = True) -> list[int]:
        with psycopg.connect(url, autocommit=True) as connection:
            if whole:
                for name in names:
                    connection.execute(f"vacuum unlost.{name}")
            size = "pg_total_relation_size" if whole else "pg_relation_size"
            found = [
                connection.execute(f"select {size}(%s::regclass)", (f"unlost.{name}",)).fetchone() for name in names
            ]
            return [int(f[0]) for f in found if f]

    # --- places ----------------------------------------------------------------------------------------------

    def _brokers(self) -> list[str]:
        return ["embedded"] if self.kafka is None else ["embedded", "kafka"]

    @contextlib.contextmanager
    def _place(self, broker: str = "embedded") -> Iterator[tuple[str, str]]:
        """An empty database with our tables and those of the raw loops, and an empty broker."""
        url = self.server.fresh()
        folder = Path(tempfile.mkdtemp(dir=self.base))
        try:
            migrate.migrate(parse(url))
            with psycopg.connect(url, autocommit=True) as connection:
                connection.execute(TABLES)
            yield url, self._broker(broker, folder)
        finally:
            shutil.rmtree(folder)
            self.server.drop_database(url.rpartition("/")[2].partition("?")[0])

    def _broker(self, name: str, folder: Path) -> str:
        self.count += 1
        if name == "kafka":
            return f"{self.kafka.url}?prefix={self.prefix}{self.count}."
        return f"embedded://{folder}/events-{self.count}.db"

    def _make_topic(self, name: str) -> None:
        admin = AdminClient({"bootstrap.servers": self.kafka.bootstrap, "log_level": 0})
        for future in admin.create_topics([NewTopic(name, 8, 1)]).values():
            future.result()

    def _check_topic(self, name: str, total: int) -> None:
        consumer = Consumer({"bootstrap.servers": self.kafka.bootstrap, "group.id": name})
        found = sum(consumer.get_watermark_offsets(TopicPartition(name, n))[1] for n in range(8))
        consumer.close()
        if found < total:
            raise SystemExit(f"Kafka has {found} of {total} events")

    def install_peers(self) -> None:
        failed = install_peers(PACKAGES)
        self.not_installed = "; ".join(f"{package}: {why}" for package, why in failed.items())


class _Others(Others):
    """PostgreSQL works in many processes, all children of one; what those that have ended took is in the parent's books."""

    def __init__(self, postmaster: int, also: list[int]) -> None:
        self._postmaster = postmaster
        super().__init__(also)

    def _ours(self) -> float:
        return super()._ours() + family_seconds(self._postmaster)


def family_seconds(parent: int) -> float:
    """Processor time of a process, its living children, and those that it has seen end."""
    total = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(path.parent.name) == parent:
                total += sum(map(int, fields[11:15]))
            elif int(fields[1]) == parent:
                total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


# --- the tables --------------------------------------------------------------------------------------------------


def pair_row(b: Bench, name: str, found: list[Pair], target: float) -> list[str]:
    ratios = [speed(ours) / speed(raw) for ours, raw in found]
    ours, raw = rate([ours for ours, _ in found]), rate([raw for _, raw in found])
    return row(b, name, f"{ours:,.0f}/s", f"{raw:,.0f}/s", target, ratios, True)


def latency_row(b: Bench, name: str, results: Results) -> list[str]:
    """Beside what nobody can do without: the commit, and the broker."""
    ours = [median(r["start"]) / 1000 for r in results]
    parts = [(median(r["commit"]) + median(r["probe"])) / 1000 for r in results]
    more = [a - c for a, c in zip(ours, parts, strict=True)]
    found = median(more)
    verdict = "disturbed" if b.disturbed else "pass" if found <= LATENCY_MS else "fail"
    return [
        f"`app.outbox` block and commit → handler start, p50, {name}", f"{median(ours):.1f} ms", f"{median(parts):.1f} ms",
        f"≤ + {LATENCY_MS:g} ms", f"**+ {found:.1f} ms** ({min(more):.1f} to {max(more):.1f})", verdict,
    ]  # fmt: skip


def growth_row(b: Bench, name: str, what: str) -> list[str]:
    ratios = [speed(full) / speed(empty) for full, empty in zip(b.growth[name], b.growth["empty"], strict=True)]
    return row(
        b, f"effectively-once with {b.marks:,} settled marks, {what} ids, beside an empty inbox",
        f"{rate(b.growth[name]):,.0f}/s", f"{rate(b.growth['empty']):,.0f}/s", 0.8, ratios, True,
    )  # fmt: skip


def targets(b: Bench) -> str:
    rows = [
        pair_row(b, f"`app.outbox` in a transaction, {what}", b.publish[name], 0.75)
        for name, (_, _, what) in PUBLISHERS.items()
        if b.publish[name]
    ]
    rows += [pair_row(b, f"emptying an outbox to {n}", b.relay[n], 0.5) for n in b.relay if b.relay[n]]
    rows += [
        pair_row(b, f"effectively-once, {what}", b.once[name], 0.6)
        for name, (_, _, what) in HANDLERS.items()
        if b.once[name]
    ]
    rows += [latency_row(b, name, results) for name, results in b.latency.items() if results]
    if b.growth["empty"]:
        rows += [growth_row(b, "ordered", "time-ordered"), growth_row(b, "random", "random")]
    return table(["", "unlost", "by hand", "target", "ratio: median (least to most)", ""], rows)


def work(b: Bench) -> str:
    rows = []
    named = [
        *((f"`app.outbox`, {PUBLISHERS[n][2]}", found) for n, found in b.publish.items()),
        *((f"relay to {n}", found) for n, found in b.relay.items()),
        *((f"effectively-once, {HANDLERS[n][2]}", found) for n, found in b.once.items()),
    ]
    for name, found in named:
        if found:
            ours, raw = [o for o, _ in found], [r for _, r in found]
            rows.append([name, f"{cpu(ours):.0f} µs", f"{cpu(raw):.0f} µs"])
    return table(["processor time of the client per event", "unlost", "by hand"], rows)


def neighbours(b: Bench) -> str:
    rows = []
    if b.relay["kafka"]:
        ours = [o for o, _ in b.relay["kafka"]]
        rows.append(
            ["unlost", f"{rate(ours):,.0f}/s", f"{cpu(ours):.0f} µs", "order per key kept, numbered before it is sent"]
        )
        raw = [r for _, r in b.relay["kafka"]]
        rows.append(
            ["by hand", f"{rate(raw):,.0f}/s", f"{cpu(raw):.0f} µs", "one relay; a transaction open while Kafka works"]
        )
    for results in b.peers.values():
        if results:
            r = results[0]
            rows.append(
                [f"{r['name']} {r['version']}", f"{rate(results):,.0f}/s", f"{cpu(results):.0f} µs", r["settings"]]
            )
    if not rows:
        return f"Not measured: no Kafka can be had here ({b.why_not})."
    if b.not_installed:
        rows.append(["faststream-outbox", "", "", f"not measured: {b.not_installed}"])
    return table(["relay to Kafka", "events", "processor time per event", "how"], rows)


def latencies(b: Bench) -> str:
    rows = []
    for name, results in b.latency.items():
        for key, what in (
            ("start", "`app.outbox` block and commit → handler start"),
            ("ours_commit", "… of that until it is committed"),
            ("commit", "the same transaction with a plain insert"),
            ("probe", "publish → received by a bare member of the broker"),
        ):
            values = [v for r in results for v in r[key]]
            if values:
                rows.append([f"{what}, {name}", *cells(values)])
    return table(["", "p50", "p95", "p99"], rows)


def sizes(b: Bench) -> str:
    rows = [
        [f"inbox, per million events, {'time-ordered' if name == 'ordered' else 'random'} ids",
         *(f"{size / b.sized:.0f} MB" for size in (found[0], found[1], found[2]))]
        for name, found in sorted(b.sizes.items())
    ]  # fmt: skip
    text = table(["", "table", "primary key", "index by place"], rows) if rows else ""
    if b.left:
        outbox, status, relay = (f"{size / 1000:,.0f} kB" for size in b.left)
        text += (
            f"\n\nAfter {b.backlog:,} events went through it, and a vacuum: outbox {outbox}, status {status}, relay {relay} "
            "with their indexes. Progress has one row per service and partition, whatever the number of events."
        )
    return text


def machine(b: Bench) -> str:
    settings = ", ".join(f"{name}={value}" for name, value in SERVER.items())
    (found,) = b.server.sql("show server_version")[0]
    fsync = [
        f"{name}={b.server.sql(f'show {name}')[0][0]}" for name in ("fsync", "synchronous_commit", "full_page_writes")
    ]
    lines = [
        f"{processor()}, {os.cpu_count()} cores, {memory()}; {platform.system()} {platform.release()}; servers and clients "
        "on this machine",
        f"PostgreSQL {found}: {', '.join(fsync)}; {settings}",
        f"Python {platform.python_version()}, unlost {version('unlost')}, psycopg {version('psycopg')} (binary), "
        f"psycopg-pool {version('psycopg-pool')}"
        + (f"; Apache Kafka {kafka_version()}, one broker" if b.kafka is not None else ""),
    ]
    if b.others is not None:
        lines.append(f"{b.others:.0%} of the processors' time went to other programs and the system")
    return "\n".join(f"- {line}" for line in lines)


def document(b: Bench) -> str:
    warning = ""
    if b.disturbed:
        warning = f"""
**Disturbed: other programs took {b.others:.0%} of the processors' time. These ratios say nothing about the targets;
run it again on a quiet machine.**
"""
    return f"""# Speed on PostgreSQL
{warning}
Written by `make bench-postgres`. {b.rounds} rounds; ours and the loop written by hand take turns on one server; medians.
Events have {EVENT_BYTES} bytes of data and one of {KEYS:,} keys. Nothing is switched off: the server runs with fsync, a
transaction counts when it is committed, an event when its position is durable, a row of the outbox when its confirmation
is; and each run ends with a comparison of what was published with what is in the tables and in the log.

## Targets

{targets(b)}

- The loops written by hand are in `bench/postgres_raw.py`: psycopg, tables with the columns and indexes of ours, the same
  rows. They do none of our other work.
- `app.outbox`: one row of the user's and one event in a transaction; by hand with one plain insert of a ready-made row.
  One connection per client; nobody relays meanwhile.
- Emptying: a backlog of {b.backlog:,} events, from the start of the relay until the last confirmation is durable. By hand:
  `select … limit 1000 for update skip locked`, publish with confirmation, delete, commit; one relay, no numbers.
- Effectively-once: a backlog of the embedded log; each handler inserts a row and publishes an event, and the process
  relays those meanwhile, but for the lines that say otherwise. Until the position of the last is durable. By hand: begin,
  check of epoch and inbox, the row, the mark, the event, commit, over a pool of as many connections; no positions, no
  relay.
- Handler start: one event at a time, the next when the one before is settled; publisher and service are two processes.
  Beside the sum of two medians: the same transaction with a plain insert until it is committed, and an event of the broker
  until a bare member of it has it.
- Settled marks: filled by SQL with the indexes made after it; then the same runs on each of the three databases in turn,
  16 at a time.
- With 16 clients both sides are bound by the processors. Making an event (id, JSON, envelope, 18 columns) takes 18 µs by
  itself and 60 to 100 µs between 16 clients on two cores, and the loop by hand makes none; with nothing but that added to
  it, it reaches 0.75 to 0.8. On the user's own connection a transaction asks which database it is in, and takes five trips
  where a connection of ours takes three.

## The same work

{work(b)}

## Neighbours

{neighbours(b)}

## Latency

{latencies(b)}

## Size on the disk

{sizes(b)}

## Machine

{machine(b)}
"""


# --- the servers -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def servers() -> Iterator[tuple[Any, Any, str]]:
    """PostgreSQL, and Kafka or why there is none."""
    why = postgres_server.available(own=True)
    if why is not None:
        raise SystemExit(f"no PostgreSQL can be had here, so nothing was measured: {why}")
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(postgres_server.Postgres.start(own=True, settings=SERVER))
        why = kafka_server.available() or ""
        cluster = None
        if not why:
            try:
                cluster = stack.enter_context(kafka_server.Kafka.start())
            except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                why = str(error)
        yield server, cluster, why


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes; prints only")
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}; prints only")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench", help="where the logs are made")
    options = parser.parse_args()
    only = options.only.split(",")
    if set(only) - set(PARTS):
        parser.error(f"--only takes {', '.join(PARTS)}")
    options.folder.mkdir(parents=True, exist_ok=True)
    with servers() as (server, cluster, why):
        bench = Bench(options.folder, server, cluster, why, quick=options.quick, only=only)
        if cluster is not None and "relay" in only:
            bench.install_peers()
        seconds = timed(bench.run)
        text = document(bench)
    print(text)
    whole = not options.quick and only == list(PARTS)
    if whole:
        (HERE / "RESULTS-POSTGRES.md").write_text(text)
    say(f"{seconds:.0f} s" + (f", written to {HERE.name}/RESULTS-POSTGRES.md" if whole else ""))


if __name__ == "__main__":
    main()
