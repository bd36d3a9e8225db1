"""The loop of faults on PostgreSQL: the shop of `pg_shop` at work, and what goes wrong around it.

What is done to whom is drawn from one seed, with the weights of the scenario. Processes die at any moment, right after
their start, a machine of them at once, or at the n-th passage of a named line or statement; they are stopped for less or
more than their lease; the server ends at once and comes back, ends sessions, or loses the answers to what it has done.
All along, handlers' transactions cannot be serialized or lock each other out, the pool is smaller than the number of
handlers, and transactions stay open while later ones commit.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
from evidence import Journal, read
from pg_checker import at_most_once
from pg_shop import TOPICS, Job, chosen, make_services, sleeper, web_async, web_sync
from pg_stage import Child, Machine, Stage
from workload import arm_at_random

import unlost.delivery.relay as relay_module
import unlost.delivery.settle as settle_module
import unlost.delivery.worker as worker_module
import unlost.sqlite.file as file_module
import unlost.sqlite.process as process_module
import unlost.store.postgres.outbox as outbox_module
import unlost.store.postgres.store as store_module
from servers.postgres import Postgres, via
from servers.wire import Wire
from unlost import App, OutcomeUnknown, Unavailable
from unlost.brokers.embedded.group import EmbeddedMember
from unlost.delivery.fate import Fate, RetryAt
from unlost.delivery.later import Releaser
from unlost.delivery.relay import Relay
from unlost.delivery.settle import Settler
from unlost.delivery.worker import Worker
from unlost.sqlite.file import File
from unlost.store.postgres.blocks import LentBlock, SyncLentBlock
from unlost.store.postgres.client import Client, Listener
from unlost.store.postgres.door import PostgresDoor
from unlost.store.postgres.outbox import PostgresOutbox
from unlost.store.postgres.store import PostgresStore
from unlost.store.session_blocks import SessionBlock, SyncSessionBlock
from unlost.testing.sabotage import _replace

HUNG_SECONDS = 2.0  # in this proof a process counts as hung much earlier, so that zombies are made in seconds
ZOMBIE_SECONDS = 3.5
COULD_NOT_START = 75  # without its database a program does not start, and says so; whoever runs it starts it again
EARLY_MS = 5  # between the clock of the process that asked, and the one that handled, on one machine
IN_DOUBT = 76  # the server crashed while it answered to a commit, and nobody can say what became of that: begin anew
SERVER = {"deadlock_timeout": "100ms", "max_connections": "120", "log_min_messages": "fatal"}

# (owner, function): a process may be armed to end itself before or after the n-th call of one of these
POINTS: list[tuple[Any, str]] = [
    (psycopg.AsyncConnection, "execute"),  # begin, commit, and what users run in a lent transaction
    (psycopg.AsyncCursor, "execute"),  # our statements
    (psycopg.Cursor, "execute"),  # the same in threads
    (Client, "commit"),
    (Client, "_happened"),
    (Client, "notify"),
    (Listener, "_connect"),
    (PostgresStore, "settle"),
    (PostgresStore, "take"),
    (PostgresStore, "give"),
    (PostgresStore, "starting"),
    (PostgresStore, "seen"),
    (PostgresStore, "waiting"),
    (PostgresOutbox, "claim"),
    (PostgresOutbox, "_take_up"),
    (PostgresOutbox, "next"),
    (PostgresOutbox, "sent"),
    (PostgresOutbox, "give"),
    (PostgresDoor, "_notify"),
    (LentBlock, "begin"),
    (LentBlock, "_finish"),
    (LentBlock, "abort"),
    (SyncLentBlock, "begin"),
    (SyncLentBlock, "finish"),
    (SessionBlock, "begin"),
    (SessionBlock, "_finish"),
    (SyncSessionBlock, "begin"),
    (SyncSessionBlock, "finish"),
    (Relay, "_round"),
    (Relay, "_send"),
    (File, "_commit"),
    (EmbeddedMember, "_claim"),
    (EmbeddedMember, "ack"),
    (Worker, "_assigned"),
    (Worker, "_take_in"),
    (Worker, "_give_back"),
    (Worker, "_retry"),
    (Worker, "_load"),
    (Worker, "_ended_by_transaction"),
    (Worker, "_on_fenced"),
    (Settler, "put"),
    (Worker, "_begin"),
    (Releaser, "_round"),
]
RARE = {"_happened", "_connect", "take", "give", "starting", "waiting", "claim", "_take_up", "abort", "_claim", "ack",
        "_assigned", "_give_back", "_on_fenced", "_load"}  # fmt: skip


def hurry(hung: float = HUNG_SECONDS) -> None:
    """What takes its time in life takes less of it in this process."""
    process_module.HEARTBEAT_STALE_SECONDS = hung
    file_module._HOUSEKEEPING_SECONDS = 0.2
    worker_module.SHORT_WAIT_SECONDS = 0.05
    worker_module.ACK_SECONDS = 0.2
    worker_module.AGAIN_SECONDS = 0.1
    relay_module.AGAIN_SECONDS = 0.3
    _replace(worker_module, "decide", _soon)
    store_module.HEARTBEAT_SECONDS = 0.3
    outbox_module.CLAIM_SECONDS = 0.3
    outbox_module.HUNG_SECONDS = hung  # type: ignore[assignment]


def _soon(original: Callable[..., Fate]) -> Any:
    """What the world has refused is tried again after a tenth of a second."""

    def decide(error: BaseException | None, *args: Any, now: int, **more: Any) -> Fate:
        fate = original(error, *args, now=now, **more)
        if isinstance(error, Unavailable | OutcomeUnknown) and isinstance(fate, RetryAt):
            return RetryAt(now + 100_000, spends_attempt=False)
        return fate

    return decide


def run_child(job: Job) -> None:
    hurry()
    settle_module.LATER_SECONDS = 0.3  # how long the mark of a handled event is there before its position
    rng = random.Random(job.seed)
    journal = Journal(job.folder / "evidence", f"{job.name}-{job.life:04d}")
    probe = arm_at_random(journal, rng, POINTS, RARE) if job.armed else None
    started: list[bool] = []
    try:
        if job.kind == "services":
            _announced(started)
            App(*make_services(journal, rng, job.machine.dsn), topics=TOPICS, probe=probe).run()
        else:
            {"web": web_sync, "web-async": web_async, "sleeper": sleeper}[job.kind](job, journal, rng)
    except (Unavailable, OutcomeUnknown, psycopg.OperationalError) as e:
        traceback.print_exc()
        if not started:
            sys.exit(COULD_NOT_START)
        if isinstance(e, OutcomeUnknown) and e.code == "UL2014":
            sys.exit(IN_DOUBT)
        raise  # a service goes on by itself


def _announced(started: list[bool]) -> None:
    """Filled when the services of this process begin."""
    announce = App._announce

    def noted(self: App, services: Any) -> None:
        started.append(True)
        announce(self, services)

    App._announce = noted  # type: ignore[method-assign]


@dataclass
class Report:
    seed: int
    kills: int = 0
    by_kind: Counter[str] = field(default_factory=Counter)
    crash_points: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    drain_seconds: float = 0.0
    away: float = 0.0  # seconds until the server answered again
    orders: int = 0
    effects: int = 0
    abandoned: int = 0  # cut off in the service that gets its events at most once, and named
    repeats: int = 0  # events that stand in the log more than once
    deadlocks: int = 0
    rollbacks: int = 0
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        head = f"seed {self.seed}: {self.kills} kills in {self.seconds:.0f} s, drained in {self.drain_seconds:.0f} s, "
        work = f"{self.orders} orders, {self.effects} effects, {self.repeats} events sent again, {self.abandoned} abandoned, "
        tail = f"{self.deadlocks} deadlocks, {self.rollbacks} rollbacks; {dict(self.by_kind)}; "
        return f"{head}{work}{tail}points: {dict(self.crash_points)}"


class Loop:
    """`weights` says how often each kind of fault comes; the names are those of the methods below."""

    def __init__(
        self, stage: Stage, postgres: Postgres, wire: Wire, machines: Sequence[Machine], seed: int,
        weights: Mapping[str, float], *, seconds: float, orders: int, pace: float = 0.5, armed: float = 0.5,
        processes: int = 3, drain: float = 40.0, least: Mapping[str, int] | None = None,
    ) -> None:  # fmt: skip
        """`least`: what must have happened how often before it ends. `drain`: for how many seconds nothing may move in
        the end, while something is left to do."""
        self.stage, self.postgres, self.wire = stage, postgres, wire
        self.rng = random.Random(seed)
        self.report = Report(seed)
        self.weights = weights
        self.seconds, self.orders, self.pace, self.armed, self.drain = seconds, orders, pace, armed, drain
        self.least = dict(least or {})
        self.machines = machines
        self.services = [f"services-{n}" for n in range(processes)]
        self.kinds = dict.fromkeys(self.services, "services") | {
            "web-0": "web", "web-1": "web-async", "sleeper-0": "sleeper",
        }  # fmt: skip
        self.where = {name: machines[n % len(machines)] for n, name in enumerate(self.kinds)}
        self.children: dict[str, Child] = {}
        self.lives: Counter[str] = Counter()
        self.resume: dict[str, float] = {}

    # --- faults --------------------------------------------------------------------------------------------------

    def kill(self) -> None:
        self._kill(self._somebody(), "at any moment")

    def kill_early(self) -> None:
        name = self._somebody()
        self._kill(name, "at any moment")
        self._tend(self.rng.random() * 0.7)
        if name in self.children and name not in self.resume:
            self._kill(name, "while starting")

    def kill_machine(self) -> None:
        """Everything on it at once, and nothing of it comes back for a while."""
        machine = self.rng.choice(self.machines)
        gone = [name for name in self.children if self.where[name] is machine]
        for name in gone:
            self._kill(name, "a machine at once")
        self._tend(self.rng.random() * 2, but=gone)

    def pause(self) -> None:
        self._stop(self._somebody(), self.rng.random() * 0.6)

    def zombie(self) -> None:
        self._stop(self.rng.choice(self.services), ZOMBIE_SECONDS + self.rng.random())

    def leave(self) -> None:
        name = self._somebody()
        if name in self.children:
            self.report.by_kind["SIGTERM"] += 1
            self.children[name].signal(signal.SIGTERM)

    def server_stops(self) -> None:
        """Every process of it ends without finishing anything; the next start recovers from the log."""
        self._server("server stopped at once", self.postgres.immediate_stop)

    def server_killed(self) -> None:
        self._server("server killed", self.postgres.kill)

    def _server(self, kind: str, end: Callable[[], None]) -> None:
        self.report.by_kind[kind] += 1
        end()
        self._tend(self.rng.random() * 2)
        begun = time.monotonic()
        self.postgres.start_again()
        self.report.away += time.monotonic() - begun

    def terminate(self) -> None:
        """pg_terminate_backend for some, or for all."""
        share = self.rng.choice((0.1, 0.3, 1.0))
        with contextlib.suppress(psycopg.OperationalError):  # it may be starting just now
            ended = self.postgres.terminate_backends("random() < %s", share, database=self.stage.database)
            self.report.by_kind["sessions ended"] += ended

    def answers_lost(self) -> None:
        """What was asked is done, its answers are lost."""
        self.report.by_kind["answers lost"] += 1
        self.wire.hold_replies()
        self._tend(0.01 + self.rng.random() * 0.05)
        self.wire.cut()
        self.wire.go_on()

    def cut(self) -> None:
        """What was asked never arrives."""
        self.report.by_kind["requests lost"] += 1
        self.wire.hang()
        self._tend(self.rng.random() * 0.05)
        self.wire.cut()
        self.wire.go_on()

    def unreachable(self) -> None:
        self.report.by_kind["unreachable"] += 1
        self.wire.refuse()
        self.wire.cut()
        self._tend(self.rng.random() * 2)
        self.wire.accept()

    # --- the run -------------------------------------------------------------------------------------------------

    def run(self) -> Report:
        for name in self.kinds:
            self._start(name, armed=False)
        names, weights = list(self.weights), list(self.weights.values())
        self._until_it_flows()
        begun = time.monotonic()
        while True:
            late = time.monotonic() - begun - self.seconds
            lacking = [kind for kind, count in self.least.items() if self.report.by_kind[kind] < count]
            if late > 0 and (not lacking or late > 60):
                break
            getattr(self, self.rng.choices(names, weights)[0] if late < 0 else VERBS[lacking[0]])()
            self._tend(self.rng.expovariate(1 / self.pace))
        self.report.seconds = time.monotonic() - begun
        self._finish()
        self.report.drain_seconds = time.monotonic() - begun - self.report.seconds
        self._judge()
        return self.report

    def _until_it_flows(self) -> None:
        """Faults begin when there is something to break."""
        end = time.monotonic() + 60
        while not self.stage.effects("stock"):
            self._tend(0.1)
            if time.monotonic() > end:
                raise TimeoutError(f"nothing was handled within 60 s\n{self.stage.said()[-3000:]}")

    def _start(self, name: str, *, armed: bool) -> None:
        self.lives[name] += 1
        kind = self.kinds[name]
        job = Job(
            kind, name, self.lives[name], self.rng.getrandbits(32), self.stage.folder, self.where[name], armed,
            self.orders, (int(name == "web-1"), 2), 16 * self.seconds / self.orders,
        )  # fmt: skip
        self.children[name] = self.stage.begin(f"{name}-{job.life}", self.where[name], run_child, job)

    def _somebody(self) -> str:
        names = [name for name in self.children if name not in self.resume] or list(self.children)
        return self.rng.choices(names, [4 if n in self.services else 1 for n in names])[0]

    def _kill(self, name: str, kind: str) -> None:
        child = self.children.get(name)
        if child is not None and not child.killed:
            child.killed = True
            self.report.by_kind[kind] += 1
            child.signal(signal.SIGKILL)

    def _stop(self, name: str, seconds: float) -> None:
        if name in self.children and name not in self.resume:
            self.report.by_kind["zombie" if seconds > ZOMBIE_SECONDS else "SIGSTOP"] += 1
            self.children[name].signal(signal.SIGSTOP)
            self.resume[name] = time.monotonic() + seconds

    def _tend(self, seconds: float, *, restart: bool = True, but: Sequence[str] = ()) -> None:
        """Lets time pass, while what has ended is started again, `but` these only at the end of it."""
        until = time.monotonic() + seconds
        late = dict.fromkeys(but, True)
        while True:
            left = until - time.monotonic()
            for name, child in list(self.children.items()):
                if name in self.resume and time.monotonic() >= self.resume[name]:
                    del self.resume[name]
                    child.signal(signal.SIGCONT)
                if child.code is not None and not (name in late and left > 0):
                    self._ended(name, child, restart)
            if left <= 0:
                return
            time.sleep(min(left, 0.01))

    def _ended(self, name: str, child: Child, restart: bool) -> None:
        del self.children[name]
        self.resume.pop(name, None)
        if child.code == -signal.SIGKILL:
            self.report.kills += 1
            if not child.killed:
                self.report.by_kind["crash point"] += 1
        elif child.code == COULD_NOT_START:
            self.report.by_kind["could not start"] += 1
        elif (
            child.code == IN_DOUBT
            and self.report.by_kind["server stopped at once"] + self.report.by_kind["server killed"]
        ):
            self.report.by_kind["commit in doubt"] += 1
        elif child.code not in (0, -signal.SIGTERM, 128 + signal.SIGTERM):
            self.report.wrong.append(f"ended: {name} with {child.code}; see {self.stage.log}")
        if restart and not (self.stage.folder / f"{name} is through").exists():
            self._start(name, armed=self.rng.random() < self.armed)

    def _placed(self) -> bool:
        webs = [name for name, kind in self.kinds.items() if kind.startswith("web")]
        return all((self.stage.folder / f"{name} is through").exists() for name in webs)

    def _finish(self) -> None:
        """No more faults: the rest is placed and worked off, everybody leaves cleanly, then the books are opened."""
        for child in self.children.values():
            child.signal(signal.SIGCONT)
        self.resume.clear()
        self.armed = 0.0
        (self.stage.folder / "hurry").touch()
        self._leave("sleeper-0")
        for name in self.services:  # some go on as they are, and must have come through
            if name in self.children and self.rng.random() < 0.3:
                self._kill(name, "at any moment")
        moved, before = time.monotonic(), None
        while True:
            self._tend(0.2)
            now = (self.stage.sql("select sum(position) from unlost.unlost_progress"), self._placed())
            if now != before:
                moved, before = time.monotonic(), now
            if (self._placed() and not self.stage.open_work()) or time.monotonic() > moved + self.drain:
                break
        for name in list(self.children):
            self._leave(name)

    def _leave(self, name: str) -> None:
        child = self.children.pop(name, None)
        if child is None:
            return
        code = child.end(60)
        if code not in (0, -signal.SIGTERM, -signal.SIGKILL):
            self.report.wrong.append(f"ended: {name} with {code} after its SIGTERM; see {self.stage.log}")

    def _judge(self) -> None:
        notes = list(read(self.stage.evidence))
        by_time = sorted(notes, key=lambda n: n.at)
        told = {
            service: [n.uid for n in by_time if n.service == service and n.what == "completed"]
            for service in ("notification", "letter")
        }
        log = self.stage.logged()
        self.report.orders = len(self.stage.orders())
        self.report.effects = len(self.stage.effects())
        self.report.repeats = len(log) - len({e.id for e in log})
        self.report.crash_points = Counter(note.uid for note in notes if note.what == "died")
        ((self.report.deadlocks, self.report.rollbacks),) = self.stage.sql(
            "select deadlocks, xact_rollback from pg_stat_database where datname = current_database()"
        )
        self.report.wrong += self.stage.open_work()
        self.report.wrong += self.stage.verdict(
            chosen(self.orders), ("order", "payment", "invoice", "settlement", "stock", "reminder"), told=told
        )
        self.report.wrong += [f"early: {n}" for n in notes if n.service == "letter" and n.value < -EARLY_MS]
        tallied = [n.uid for n in notes if n.service == "tally"]
        named, more = self.stage.abandoned("tally")
        self.report.abandoned = len(named) + more
        self.report.wrong += at_most_once(tallied, named, log, more)


VERBS = {
    "at any moment": "kill", "zombie": "zombie", "SIGTERM": "leave", "server stopped at once": "server_stops", "server killed": "server_killed",
    "sessions ended": "terminate", "answers lost": "answers_lost", "requests lost": "cut", "a machine at once": "kill_machine",
}  # fmt: skip
FAULTS = {
    "kill": 6, "kill_early": 1.5, "kill_machine": 0.4, "pause": 0.7, "zombie": 1, "leave": 0.7, "server_stops": 0.8,
    "server_killed": 0.5, "terminate": 1.2, "answers_lost": 1.5, "cut": 1, "unreachable": 0.5,
}  # fmt: skip


def play(
    folder: Path, postgres: Postgres, weights: Mapping[str, float] = FAULTS, *, kafka: tuple[str, str] | None = None,
    options: str = "", machines: int = 1, bug: str = "", **more: Any,
) -> Report:  # fmt: skip
    """One run, and its report; raises what is wrong, with the seed and the folder to look into."""
    seed = int(os.environ.get("SEED", "0")) or int.from_bytes(os.urandom(3), "big")
    dsn = postgres.fresh()
    with Wire.to(postgres.host, postgres.port) as wire, Stage(folder, dsn, kafka=kafka, bug=bug) as stage:
        through = via(dsn, wire.port)
        places = [stage.machine(f"machine-{n}", dsn=through, pool=2, options=options) for n in range(machines)]
        report = Loop(stage, postgres, wire, places, seed, weights, **more).run()
        print(report)
        if report.wrong:
            where = f"history in {folder}"
            raise AssertionError("\n".join([f"{report}", where, *report.wrong[:40], stage.said()[-3000:]]))
    return report


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--orders", type=int, default=400)
    parser.add_argument("--bug", default="")
    a = parser.parse_args()
    with Postgres.start(settings=SERVER, own=True) as server:
        play(a.folder, server, seconds=a.seconds, orders=a.orders, bug=a.bug)
