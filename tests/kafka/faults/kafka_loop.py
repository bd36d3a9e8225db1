"""The loop of faults on Kafka: the publishers, services and operator of tests/crash, and what goes wrong around them.

What is done to whom is drawn from one seed, with the weights of the scenario. Processes die at any moment, right
after their start, all at once, or at the n-th passage of a named line; they are stopped for less or more than their
session; members come and go; brokers die and come back; connections are cut between a request and its reply.
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

import workload
from confluent_kafka import ElectionType
from evidence import Journal, read
from kafka_books import admin
from kafka_stage import QUICK, Child, Stage
from workload import CONTRACTS, Job, operating, publishing, publishing_sync

import unlost.brokers.kafka.member as member_module
import unlost.delivery.relay as relay_module
import unlost.delivery.worker as worker_module
import unlost.sqlite.file as file_module
import unlost.sqlite.process as process_module
import unlost.store.outbox as outbox_module
import unlost.store.shelf as shelf_module
import unlost.store.sqlite as store_module
from servers.kafka import Kafka
from unlost import App, OutcomeUnknown, Unavailable
from unlost.brokers.kafka.member import KafkaMember
from unlost.brokers.kafka.publisher import Publisher
from unlost.delivery.relay import Relay
from unlost.delivery.settle import Settler
from unlost.delivery.worker import Worker
from unlost.sqlite.file import File
from unlost.store.outbox import SqliteOutbox
from unlost.store.sqlite import SqliteStore

SESSION_SECONDS = 1.5
HUNG_SECONDS = 2.0
COULD_NOT_START = 75  # without its cluster a program does not start, and says so; whoever runs it starts it again
ZOMBIE_SECONDS = 3.5  # longer than a session, and than a process may stand still

# (owner, function): a process may be armed to end itself before or after the n-th call of one of these
POINTS: list[tuple[Any, str]] = [
    (File, "_commit"),
    (SqliteStore, "settle_in"),
    (SqliteStore, "give"),
    (SqliteStore, "progress"),
    (store_module, "_take"),
    (store_module, "_shelve"),
    (store_module, "_wait"),
    (store_module, "_enter"),
    (store_module, "_enter_inbox"),
    (shelf_module, "carry_out"),
    (outbox_module, "put"),
    (SqliteOutbox, "claim"),
    (SqliteOutbox, "sent"),
    (SqliteOutbox, "next"),
    (Relay, "_round"),
    (Relay, "_send"),
    (Publisher, "send"),
    (Publisher, "_produce"),
    (Publisher, "_take_reports"),
    (KafkaMember, "seek"),
    (KafkaMember, "ack"),
    (KafkaMember, "release"),
    (KafkaMember, "close"),
    (KafkaMember, "_take"),
    (KafkaMember, "_commit"),
    (KafkaMember, "_on_assign"),
    (KafkaMember, "_on_revoke"),
    (KafkaMember, "_announce"),
    (KafkaMember, "_do_seek"),
    (Worker, "_assigned"),
    (Worker, "_take_in"),
    (Worker, "_give_back"),
    (Worker, "_settle"),
    (Worker, "_ack"),
    (Worker, "_retry"),
    (Worker, "_park_queue"),
    (Worker, "_load"),
    (Worker, "_ended_by_transaction"),
    (Worker, "_on_lost"),
    (Worker, "_drop_queued"),
    (Settler, "put"),
]
RARE = {"give", "progress", "carry_out", "seek", "ack", "release", "close", "_commit", "_on_assign", "_on_revoke",
        "_do_seek", "_assigned", "_give_back", "_ack", "_on_lost", "_drop_queued", "claim"}  # fmt: skip


def run_child(job: Job) -> None:
    process_module.HEARTBEAT_STALE_SECONDS = HUNG_SECONDS
    file_module._HOUSEKEEPING_SECONDS = 0.2
    worker_module.SHORT_WAIT_SECONDS = 0.05
    worker_module.ACK_SECONDS = 0.2
    relay_module.AGAIN_SECONDS = 0.1
    member_module.DRAIN_SECONDS = 3.0
    rng = random.Random(job.seed)
    journal = Journal(job.evidence, f"{job.name}-{job.life:04d}")
    probe = workload.arm_at_random(journal, rng, POINTS, RARE) if job.armed else None
    run = {"services": workload.services, "publish": publishing, "sync": publishing_sync, "operator": operating}
    started = _tell_when_started(App)
    try:
        run[job.kind](job, journal, rng, probe)
    except (Unavailable, OutcomeUnknown):
        if job.kind == "services" and started:
            raise  # a service goes on by itself
        traceback.print_exc()
        sys.exit(COULD_NOT_START)


def _tell_when_started(app: type[App]) -> list[bool]:
    """Filled when the services of this process begin."""
    started: list[bool] = []
    announce = app._announce

    def noted(self: App, services: Any) -> None:
        started.append(True)
        announce(self, services)

    app._announce = noted  # type: ignore[method-assign]
    return started


@dataclass
class Report:
    seed: int
    kills: int = 0
    by_kind: Counter[str] = field(default_factory=Counter)
    crash_points: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    drain_seconds: float = 0.0
    away: float = 0.0  # seconds until a killed broker answered again
    events: int = 0
    completions: int = 0
    looks: int = 0  # comparisons of what the group was told with what the store has
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        head = f"seed {self.seed}: {self.kills} kills in {self.seconds:.0f} s, drained in {self.drain_seconds:.0f} s, "
        tail = f"{self.events} events, {self.completions} completions, {self.looks} looks"
        return f"{head}{tail}; {dict(self.by_kind)}; points: {dict(self.crash_points)}"


class Loop:
    """`weights` says how often each kind of fault comes; the names are those of the methods below."""

    def __init__(
        self, stage: Stage, seed: int, weights: dict[str, float], *, seconds: float, kills: int = 1_000_000,
        pace: float = 0.5, rate: float = 30.0, only: Sequence[str] = (), processes: int = 3, armed: float = 0.5,
        kafka: Kafka | None = None, drain: float = 40.0, least: Mapping[str, int] | None = None,
    ) -> None:  # fmt: skip
        """`least`: what must have happened how often before it ends. `drain`: for how many seconds nothing may move in the end, while something is left to do."""
        self.stage = stage
        self.rng = random.Random(seed)
        self.report = Report(seed)
        self.weights = weights
        self.kills, self.seconds, self.pace, self.rate = kills, seconds, pace, rate
        self.only = tuple(only)
        self.armed = armed
        self.kafka = kafka
        self.drain = drain
        self.least = dict(least or {})
        self.services = [f"services-{n}" for n in range(processes)]
        self.kinds = dict.fromkeys(self.services, "services") | {
            "publisher-0": "publish", "publisher-1": "publish", "script-0": "sync", "operator-0": "operator",
        }  # fmt: skip
        self.children: dict[str, Child] = {}
        self.lives: Counter[str] = Counter()
        self.resume: dict[str, float] = {}
        self.later: list[tuple[float, Callable[[], None]]] = []

    # --- faults --------------------------------------------------------------------------------------------------

    def kill(self) -> None:
        self._kill(self._somebody(), "at any moment")

    def kill_early(self) -> None:
        name = self._somebody()
        self._kill(name, "at any moment")
        self._tend(self.rng.random() * 1.0)
        if name in self.children and name not in self.resume:
            self._kill(name, "while starting")

    def kill_all(self) -> None:
        for name in list(self.children):
            self._kill(name, "everything at once")

    def pause(self) -> None:
        self._stop(self._somebody(), self.rng.random() * 0.6)

    def zombie(self) -> None:
        self._stop(self.rng.choice(self.services), ZOMBIE_SECONDS + self.rng.random())

    def leave(self) -> None:
        name = self._somebody()
        if name in self.children:
            self.report.by_kind["SIGTERM"] += 1
            self.children[name].signal(signal.SIGTERM)

    def broker_kill(self) -> None:
        assert self.kafka is not None
        self.report.by_kind["broker killed"] += 1
        self.kafka.kill()
        self._tend(self.rng.random() * 2)
        begun = time.monotonic()
        self.kafka.restart()
        self.report.away += time.monotonic() - begun

    def broker_pause(self) -> None:
        assert self.kafka is not None
        self.report.by_kind["broker stopped"] += 1
        self.kafka.stop()
        self._tend(self.rng.random() * 3)
        self.kafka.cont()

    def broker_loss(self) -> None:
        """One of several: the others go on without it."""
        assert self.kafka is not None
        n = self.rng.choice(list(self.kafka._nodes))
        self.report.by_kind["broker lost"] += 1
        self.kafka.kill(n)
        self._tend(1 + self.rng.random() * 6)
        self.kafka.restart(n)
        self.kafka.wait_in_sync()

    def broker_freeze(self) -> None:
        """One of several stands still for longer than its session with the controller, and comes back."""
        assert self.kafka is not None
        n = self.rng.choice(list(self.kafka._nodes))
        self.report.by_kind["broker frozen"] += 1
        self.kafka.stop(n)
        self._tend(1 + self.rng.random() * 9)
        self.kafka.cont(n)
        self.kafka.wait_ready()
        self.kafka.wait_in_sync()

    def leader_change(self) -> None:
        """The leaders go to the replicas that are preferred, which they are not after a loss; and by moving them on."""
        assert self.kafka is not None
        self.report.by_kind["leaders moved"] += 1
        n = self.rng.choice(list(self.kafka._nodes))
        self.kafka.end(n)  # it hands its leaderships over before it ends
        self.kafka.restart(n)
        self.kafka.wait_in_sync()
        with contextlib.suppress(Exception):  # "none was needed" is an error to the client
            admin(self.kafka.internal).elect_leaders(ElectionType.PREFERRED).result(20)

    def cut(self) -> None:
        """The broker does what was asked, and its reply is lost."""
        assert self.kafka is not None
        api = self.rng.choice(CUTS)
        self.report.by_kind[f"cut after {api}"] += 1
        if self.rng.random() < 0.7:
            self.kafka.proxy.cut_after_request(api, times=self.rng.randint(1, 3))
        else:
            self.kafka.proxy.drop_before_request(api, times=self.rng.randint(1, 3))

    def net_down(self) -> None:
        assert self.kafka is not None
        self.report.by_kind["network down"] += 1
        self.kafka.proxy.down()
        self._tend(self.rng.random() * 2.5)
        self.kafka.proxy.up()

    def swallow(self) -> None:
        assert self.kafka is not None
        self.report.by_kind["black hole"] += 1
        self.kafka.proxy.blackhole()
        self._tend(self.rng.random() * 2.5)
        self.kafka.proxy.up()

    # --- the run -------------------------------------------------------------------------------------------------

    def run(self) -> Report:
        begun = time.monotonic()
        for name in self.kinds:
            self._start(name, armed=False)
        names, weights = list(self.weights), list(self.weights.values())
        self._until_it_flows()
        begun, looked = time.monotonic(), time.monotonic()
        while self.report.kills < self.kills:
            late = time.monotonic() - begun - self.seconds
            lacking = [kind for kind, count in self.least.items() if self.report.by_kind[kind] < count]
            if late > 0 and (not lacking or late > 60):
                break
            getattr(self, self.rng.choices(names, weights)[0] if late < 0 else VERBS[lacking[0]])()
            self._tend(self.rng.expovariate(1 / self.pace))
            if time.monotonic() - looked > 3:
                self._look()
                looked = time.monotonic()
        self.report.seconds = time.monotonic() - begun
        self._finish()
        self.report.drain_seconds = time.monotonic() - begun - self.report.seconds
        return self.report

    def _until_it_flows(self) -> None:
        """Faults begin when there is something to break."""
        end = time.monotonic() + 60
        while not self.stage.effects():
            self._tend(0.1)
            if time.monotonic() > end:
                raise TimeoutError(f"nothing was handled within 60 s\n{self.stage.said()[-3000:]}")

    def _look(self) -> None:
        """At no moment may the group have been told more than the store has."""
        try:
            self.report.wrong += self.stage.committed_ahead()
            self.report.looks += 1
        except Exception as e:  # the broker may be away just now
            print(f"could not look: {e!r}", file=sys.stderr)

    def _start(self, name: str, *, armed: bool) -> None:
        self.lives[name] += 1
        job = Job(
            self.kinds[name], name, self.lives[name], self.rng.getrandbits(32), self.stage.folder, armed, self.rate,
            broker=self.stage.url, only=self.only,
        )  # fmt: skip
        self.children[name] = self.stage.begin(f"{name}-{job.life}", run_child, job)

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

    def _tend(self, seconds: float, *, restart: bool = True) -> None:
        """Lets time pass, while what has ended is started again."""
        until = time.monotonic() + seconds
        while True:
            for name, child in list(self.children.items()):
                if name in self.resume and time.monotonic() >= self.resume[name]:
                    del self.resume[name]
                    child.signal(signal.SIGCONT)
                if child.code is not None:
                    self._ended(name, child, restart)
            left = until - time.monotonic()
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
        elif child.code == COULD_NOT_START and self.kafka is not None:
            self.report.by_kind["could not start"] += 1
        elif child.code not in (0, -signal.SIGTERM, 128 + signal.SIGTERM):
            self.report.wrong.append(f"{name} ended with {child.code}; see {self.stage.log}")
        if restart:
            self._start(name, armed=self.kinds[name] != "operator" and self.rng.random() < self.armed)

    def _finish(self) -> None:
        """No more faults: what was published is worked off, everybody leaves cleanly, then the books are opened."""
        if self.kafka is not None and "proxy" in self.kafka.__dict__:
            for fault in self.kafka.proxy._faults:
                fault.cancel()
        for child in self.children.values():
            child.signal(signal.SIGCONT)
        self.resume.clear()
        for name, kind in self.kinds.items():
            if kind in ("publish", "sync"):
                self._leave(name)
            elif name in self.children and self.rng.random() < 0.5:
                self.children[name].kill()
        self._tend(0, restart=False)
        for name, kind in self.kinds.items():
            if kind in ("services", "operator") and name not in self.children:
                self._start(name, armed=False)
        moved, before = time.monotonic(), 0
        while not self.stage.drained() and time.monotonic() < moved + self.drain:
            self._tend(0.2, restart=True)
            now = sum(self.stage.positions().values())
            if now != before:
                moved, before = time.monotonic(), now
        for name in list(self.children):
            self._leave(name)
        notes = list(read(self.stage.evidence))
        self.report.events = len({note.uid for note in notes if note.what == "acked"})
        self.report.completions = sum(note.what == "completed" for note in notes) + len(self.stage.effects())
        self.report.crash_points = Counter(note.uid for note in notes if note.what == "died")
        self.report.wrong += self.stage.verdict(self.contracts())

    def contracts(self) -> list[Any]:
        return [c for c in CONTRACTS if not self.only or NEEDS.get(c.service, {c.service}) <= set(self.only)]

    def _leave(self, name: str) -> None:
        child = self.children.pop(name, None)
        if child is None:
            return
        code = child.end(60)
        if code == COULD_NOT_START and self.kafka is not None:
            self.report.by_kind["could not start"] += 1
        elif code not in (0, -signal.SIGTERM, -signal.SIGKILL):
            self.report.wrong.append(f"{name} ended with {code} after its SIGTERM; see {self.stage.log}")


SERVICES = ("plain", "ledger", "thread", "relay", "flaky", "strict", "loose", "sink", "carrier", "press", "swift")
NEEDS = {  # which services a contract is about, where its name does not say it
    "relay-block": {"relay"},
    "sink-echo": {"plain", "sink"},
    "sink-relay": {"relay", "sink"},
    "sink-book": {"ledger", "sink"},
    "carrier": {"ledger", "carrier"},
    "press": {"thread", "press"},
    "sink-recall": {"strict", "sink"},
}
CUTS = ("Produce", "Fetch", "OffsetCommit", "JoinGroup", "SyncGroup", "Heartbeat", "OffsetFetch", "FindCoordinator",
        "Metadata", "InitProducerId", "ListOffsets", "LeaveGroup")  # fmt: skip
VERBS = {"at any moment": "kill", "broker killed": "broker_kill", "zombie": "zombie", "SIGTERM": "leave"}
KILLS = {"kill": 6, "kill_early": 2, "kill_all": 0.3, "pause": 0.7, "leave": 0.6}


def play(
    folder: Path, bootstrap: str, prefix: str, weights: dict[str, float], *, kafka: Kafka | None = None,
    options: str | None = None, **more: Any,
) -> Report:  # fmt: skip
    """One run, and its report; raises what is wrong, with the seed and the folder to look into."""
    seed = int(os.environ.get("SEED", "0")) or int.from_bytes(os.urandom(3), "big")
    inside = "" if kafka is None else kafka.internal
    with Stage(folder, bootstrap, prefix, options=QUICK if options is None else options, inside=inside) as stage:
        kills = int(os.environ.get("KILLS", "1000000"))
        report = Loop(stage, seed, weights, kafka=kafka, kills=kills, **more).run()
        print(report)
        assert not report.wrong, "\n".join(
            [f"{report}", f"history in {folder}", *report.wrong[:30], stage.said()[-3000:]]
        )
    return report


if __name__ == "__main__":
    import argparse
    import uuid

    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("bootstrap")
    parser.add_argument("--seconds", type=float, default=30)
    a = parser.parse_args()
    play(a.folder, a.bootstrap, f"hand-{uuid.uuid4().hex[:6]}", KILLS, seconds=a.seconds)
