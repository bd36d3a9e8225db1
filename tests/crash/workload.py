"""The kill loop: publishers, services and an operator in many processes, killed at any moment, then examined.

`python workload.py FOLDER` runs it and prints a JSON report. The supervisor never opens the broker's file and has
one thread, so that a forked child is as good as a fresh process and costs a few milliseconds. It kills in these ways,
all drawn from one seed: a random process at a random moment; a process 0 to 100 ms after its start, so in the middle
of opening or of a takeover; everything at once; and by crash points, where a process ends itself at the n-th passage
of a named line between receiving an event and acknowledging it. Some are stopped for a while, a few for so long that
they are taken for hung and wake up as zombies; some get SIGTERM and must end cleanly.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import gc
import inspect
import json
import os
import random
import resource
import signal
import sys
import threading
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import apsw
from checker import Contract, Expectation, check
from child import follow
from evidence import Effect, Journal, read

import unlost.delivery.worker as worker_module
import unlost.sqlite.file as file_module
import unlost.sqlite.process as process_module
import unlost.store.delayed as delayed_module
import unlost.store.shelf as shelf_module
import unlost.store.sqlite as store_module
from unlost import App, Command, Context, Event, OutcomeUnknown, Reject, Retry, RetryLater, Service, Topic, Unavailable
from unlost.audit import Books
from unlost.brokers.embedded.group import EmbeddedMember
from unlost.brokers.port import Log
from unlost.delivery.settle import Settler
from unlost.delivery.worker import Worker
from unlost.ops import books as books_module
from unlost.ops import shelf
from unlost.ops.connect import opened
from unlost.sqlite.file import File
from unlost.sqlite.marks import Marks
from unlost.sqlite.transaction import Transaction
from unlost.sqlite.turn import Turn
from unlost.store.port import Records
from unlost.store.sqlite import SqliteStore
from unlost.testing import sabotage

PARTITIONS = 4
TOPICS = [Topic(name, partitions=PARTITIONS) for name in ("main", "echo", "relay", "book", "carry", "press", "recall")]
MOVES_SECONDS = 20.0
HUNG_SECONDS = 2.0  # in this proof a process counts as hung much earlier, so that zombies are made in seconds
SCHEMA = """
create table if not exists effect (
    number integer primary key autoincrement, service text not null, uid text not null, account text not null,
    value integer not null
);
"""


# --- the events, and what must become of them -----------------------------------------------------------------


class Ordered(Event, topic="main", key="account"):
    account: str
    uid: str
    value: int


class Echoed(Event, topic="echo", key="account"):
    account: str
    uid: str
    value: int


class Relayed(Event, topic="relay", key="account"):
    account: str
    uid: str
    value: int


class Booked(Event, topic="book", key="account"):
    account: str
    uid: str
    value: int


class Recalled(Event, topic="recall", key="account"):
    """Leaves a moment after it was published."""

    account: str
    uid: str
    value: int


class Carry(Command, queue="carry", key="account"):
    """For one service, in order per account."""

    account: str
    uid: str
    value: int


class Press(Command, queue="press"):
    """For one service, first in, first out."""

    account: str
    uid: str
    value: int


class Ignored(Event, topic="main", key="account"):
    """No service has a handler for it."""

    account: str


def value_of(uid: str) -> int:
    return zlib.crc32(uid.encode()) & 0xFFFF


def doomed(service: str, uid: str) -> bool:
    """Whether the handler rejects it; the shelf is where it must be seen then."""
    return service in ("strict", "loose") and zlib.crc32(f"{service} {uid}".encode()) % 60 == 0


def curable(service: str, uid: str) -> bool:
    """Half of the rejected are redriven by the operator and then accepted, the others are discarded."""
    return zlib.crc32(f"cure {service} {uid}".encode()) % 2 == 0


def expected(service: str, uid: str) -> Expectation:
    return "shelf" if doomed(service, uid) and not curable(service, uid) else "done"


def recalled(uid: str) -> Expectation:
    return "nothing" if value_of(uid) % 5 or expected("strict", uid) != "done" else "done"


def _contract(service: str, **more: Any) -> Contract:
    return Contract(service=service, expects=functools.partial(expected, service), **more)


CONTRACTS = [
    _contract("plain"),
    _contract("ledger", once=True),
    _contract("thread", once=True),
    Contract(service="relay", expects=lambda uid: "done" if value_of(uid) % 3 else "nothing"),
    _contract("flaky"),
    Contract(service="relay-block", expects=lambda uid: "nothing" if value_of(uid) % 3 else "done", once=True),
    _contract("strict", once=True),
    _contract("loose", ordered=False),  # on_dead="skip" gives the order up
    _contract("sink-echo", once=True),
    _contract("sink-relay", once=True),
    _contract("sink-book", once=True),
    Contract(service="sink-recall", expects=lambda uid: recalled(uid), once=True, ordered=False),
    Contract(service="carrier", expects=lambda uid: "done" if value_of(uid) % 4 == 1 else "nothing", once=True),
    Contract(service="swift", expects=lambda uid: "named", at_most_once=True),
    Contract(service="press", expects=lambda uid: "nothing" if value_of(uid) % 4 else "done"),
]


# --- the services ----------------------------------------------------------------------------------------------


def make_services(journal: Journal, folder: Path, rng: random.Random) -> list[Service]:
    """Each kind of handler that unlost knows; some fail at random, a few reject."""
    quick = Retry(attempts=10_000, first=0.005, factor=2, max=0.02)
    mixed = Retry(attempts=10_000, first=0.02, factor=3, max=0.3)  # the second wait already goes to the waiting room

    plain = Service("plain", retry=quick)
    ledger = Service("ledger", guarantee="effectively-once", retry=quick)
    thread = Service("thread", guarantee="effectively-once", retry=quick, concurrency=4)
    relay = Service("relay", guarantee="effectively-once", retry=quick)
    flaky = Service("flaky", retry=mixed)
    strict = Service("strict", guarantee="effectively-once", retry=mixed)
    loose = Service("loose", on_dead="skip", retry=quick)
    sink = Service("sink", guarantee="effectively-once", retry=quick)
    carrier = Service("carrier", guarantee="effectively-once", retry=quick)
    press = Service("press", retry=quick)
    swift = Service("swift", guarantee="at-most-once")

    def stumble(chance: float) -> None:
        if rng.random() < chance:
            raise ConnectionError("this attempt was meant to fail")

    def done(service: str, event: Any) -> None:
        journal.note("completed", event.uid, event.account, service, event.value)

    async def dawdle() -> None:
        if rng.random() < 0.1:
            await asyncio.sleep(rng.random() * 0.02)

    def judge(service: str, event: Any) -> None:
        if doomed(service, event.uid) and not (folder / "cured" / f"{service} {event.uid}").exists():
            raise Reject("this event was meant to be rejected")

    async def effect(db: Any, service: str, event: Any) -> None:
        await db.execute(
            "insert into effect (service, uid, account, value) values (?, ?, ?, ?)",
            (service, event.uid, event.account, event.value),
        )

    @plain.on(Ordered)
    async def echo(event: Ordered, ctx: Context) -> None:
        ctx.publish(Echoed(account=event.account, uid=event.uid, value=event.value))
        await dawdle()
        stumble(0.02)
        done("plain", event)

    @ledger.on(Ordered)
    async def book(event: Ordered, ctx: Context) -> None:
        await dawdle()
        async with ctx.transaction() as db:
            await effect(db, "ledger", event)
            ctx.publish(Booked(account=event.account, uid=event.uid, value=event.value))
            if event.value % 4 == 1:
                ctx.send(Carry(account=event.account, uid=event.uid, value=event.value))
            stumble(0.01)

    @thread.on(Ordered)
    def work(event: Ordered, ctx: Context) -> None:
        stumble(0.01)
        with ctx.transaction() as db:
            db.execute(
                "insert into effect (service, uid, account, value) values (?, ?, ?, ?)",
                ("thread", event.uid, event.account, event.value),
            )
            if event.value % 4 == 0:
                ctx.send(Press(account=event.account, uid=event.uid, value=event.value))

    @relay.on(Ordered)
    async def pass_on(event: Ordered, ctx: Context) -> None:
        """Some in a transaction, some not: their events must keep the order of the key all the same."""
        stumble(0.02)
        if event.value % 3:
            ctx.publish(Relayed(account=event.account, uid=event.uid, value=event.value))
            await dawdle()
            done("relay", event)
        else:
            async with ctx.transaction() as db:
                await effect(db, "relay-block", event)
                ctx.publish(Relayed(account=event.account, uid=event.uid, value=event.value))

    @flaky.on(Ordered)
    async def fail_often(event: Ordered, ctx: Context) -> None:
        if rng.random() < 0.02:
            raise RetryLater("not now", after=0.15)
        stumble(0.15)
        done("flaky", event)

    @strict.on(Ordered)
    async def judge_strictly(event: Ordered, ctx: Context) -> None:
        judge("strict", event)
        stumble(0.03)
        async with ctx.transaction() as db:
            await effect(db, "strict", event)
            if event.value % 5 == 0:
                later = Recalled(account=event.account, uid=event.uid, value=event.value)
                ctx.publish(later, delay=rng.random() * 0.5)

    @loose.on(Ordered)
    async def judge_loosely(event: Ordered, ctx: Context) -> None:
        judge("loose", event)
        done("loose", event)

    @sink.on(Echoed, Relayed, Booked)
    async def collect(event: Any, ctx: Context) -> None:
        name = {Echoed: "sink-echo", Relayed: "sink-relay", Booked: "sink-book"}[type(event)]
        async with ctx.transaction() as db:
            await effect(db, name, event)

    @sink.on(Recalled)
    async def recall(event: Recalled, ctx: Context) -> None:
        async with ctx.transaction() as db:
            await effect(db, "sink-recall", event)

    @carrier.on(Carry)
    async def carry(command: Carry, ctx: Context) -> None:
        async with ctx.transaction() as db:
            await effect(db, "carrier", command)

    @press.on(Press)
    async def print_it(command: Press) -> None:
        stumble(0.02)
        done("press", command)

    @swift.on(Ordered)
    async def count(event: Ordered) -> None:
        """Mostly one after another; now and then one waits, and the next ones go by their keys."""
        journal.note("completed", event.uid, event.account, "swift", event.value)
        if rng.random() < 0.005:
            await asyncio.sleep(rng.random() * 0.05)

    return [plain, ledger, thread, relay, flaky, strict, loose, sink, carrier, press, swift]


# --- crash points ------------------------------------------------------------------------------------------------

# (owner, function): a process may be armed to end itself before or after the n-th call of one of these
POINTS: list[tuple[Any, str]] = [
    (Transaction, "append"),
    (Transaction, "flush"),
    (Marks, "write"),
    (Marks, "sync"),
    (File, "_commit"),
    (File, "_open"),
    (File, "_register"),
    (process_module.ProcessFile, "__init__"),
    (SqliteStore, "settle_in"),
    (SqliteStore, "give"),
    (SqliteStore, "release"),
    (delayed_module, "take_due"),
    (delayed_module, "put"),
    (store_module, "_take"),
    (store_module, "_shelve"),
    (store_module, "_wait"),
    (store_module, "_enter"),
    (store_module, "_enter_inbox"),
    (shelf_module, "carry_out"),
    (EmbeddedMember, "_join"),
    (EmbeddedMember, "_claim"),
    (EmbeddedMember, "release"),
    (EmbeddedMember, "close"),
    (Worker, "_assigned"),
    (Worker, "_take_in"),
    (Worker, "_give_back"),
    (Worker, "_settle"),
    (Worker, "_retry"),
    (Worker, "_park_queue"),
    (Worker, "_load"),
    (Worker, "_ended_by_transaction"),
    (Worker, "_on_fenced"),
    (Worker, "_drop_queued"),
    (Worker, "_begin_batch"),
    (Worker, "_begin"),
    (store_module, "_abandon"),
    (Settler, "ended"),
    (Settler, "put"),
    (Turn, "next"),
    (Turn, "undo"),
]
RARE = {"_open", "_register", "__init__", "give", "_join", "_claim", "release", "close", "_assigned", "_give_back",
        "_drop_queued", "_abandon", "_on_fenced", "carry_out", "sync", "undo"}  # fmt: skip
STEPS = ("handled", "committing")


def crash_here(journal: Journal, name: str) -> None:
    journal.note("died", name)
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def arm(journal: Journal, owner: Any, name: str, when: str, count: int) -> None:
    """From now on this process ends itself before or after the `count`-th call of `owner.name`."""
    original = getattr(owner, name)
    left = [count]
    label = f"{when} {getattr(owner, '__name__', owner)}.{name}"

    def tick(now: str) -> None:
        if now == when:
            left[0] -= 1
            if left[0] == 0:
                crash_here(journal, label)

    if inspect.iscoroutinefunction(original):

        @functools.wraps(original)
        async def replaced(*args: Any, **kwargs: Any) -> Any:
            tick("before")
            result = await original(*args, **kwargs)
            tick("after")
            return result

    elif inspect.isgeneratorfunction(original):

        @functools.wraps(original)
        def replaced(*args: Any, **kwargs: Any) -> Any:
            tick("before")
            result = yield from original(*args, **kwargs)
            tick("after")
            return result

    else:

        @functools.wraps(original)
        def replaced(*args: Any, **kwargs: Any) -> Any:
            tick("before")
            result = original(*args, **kwargs)
            tick("after")
            return result

    setattr(owner, name, replaced)


def armed_probe(journal: Journal, step: str, count: int) -> Callable[[str, Any], None]:
    left = [count]

    def probe(reached: str, _: Any) -> None:
        if reached == step:
            left[0] -= 1
            if left[0] == 0:
                crash_here(journal, f"at step {step}")

    return probe


def arm_at_random(
    journal: Journal, rng: random.Random, points: Sequence[tuple[Any, str]] = POINTS, rare: Collection[str] = RARE
) -> Callable[[str, Any], None] | None:
    """One crash point for this life, somewhere in its first seconds."""
    choice = rng.randrange(len(points) + 2 * len(STEPS))
    if choice >= len(points):
        return armed_probe(journal, STEPS[choice % 2], 1 + int(rng.expovariate(1 / 60)))
    owner, name = points[choice]
    mean = 2 if name in rare else 60
    arm(journal, owner, name, rng.choice(("before", "after")), 1 + int(rng.expovariate(1 / mean)))
    return None


# --- the processes -------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """What a child process is to be."""

    kind: str
    name: str  # of its line of incarnations
    life: int
    seed: int
    folder: Path
    armed: bool
    rate: float  # events per second, of a publisher
    broker: str = ""  # a URL; empty: the embedded one
    only: tuple[str, ...] = ()  # these services; empty: all

    @property
    def url(self) -> str:
        return self.broker or self.file_url

    @property
    def file_url(self) -> str:
        """The embedded broker, or the store beside another one."""
        return f"embedded://{self.folder}/events.db"

    @property
    def evidence(self) -> Path:
        return self.folder / "evidence"


def run_child(job: Job) -> None:
    sabotage.from_environment()
    process_module.HEARTBEAT_STALE_SECONDS = HUNG_SECONDS
    file_module._HOUSEKEEPING_SECONDS = 0.2
    worker_module.SHORT_WAIT_SECONDS = 0.05
    rng = random.Random(job.seed)
    journal = Journal(job.evidence, f"{job.name}-{job.life:04d}")
    probe = arm_at_random(journal, rng) if job.armed else None
    {"services": services, "publish": publishing, "sync": publishing_sync, "operator": operating}[job.kind](
        job, journal, rng, probe
    )


def services(job: Job, journal: Journal, rng: random.Random, probe: Any) -> None:
    made = make_services(journal, job.folder, rng)
    app = App(
        *(s for s in made if s.name in job.only or not job.only), broker=job.url, topics=TOPICS,
        schema=job.folder / "schema.sql", probe=probe,
    )  # fmt: skip
    app.run()


class Line:
    """One publisher's line of lives: what the lives before this one intended, and what of it they know."""

    def __init__(self, job: Job) -> None:
        self.next: Counter[str] = Counter()
        self.open: dict[str, str] = {}  # account -> the event whose publish has not returned
        self.acked: list[str] = []
        for note in read(job.evidence, f"{job.name}-*.evidence"):
            if note.what == "intend" and not note.batch:
                self.next[note.key] = max(self.next[note.key], int(note.uid.rpartition(":")[2]) + 1)
                self.open[note.key] = note.uid
            elif note.what == "intend":
                self.next["batch"] = max(self.next["batch"], int(note.batch.rpartition(":")[2]) + 1)
            elif note.what == "acked" and self.open.get(note.key) == note.uid:
                del self.open[note.key]

    def event(self, account: str) -> Ordered:
        """The event to publish next: first the one whose outcome nobody knows, under its own id."""
        uid = self.open.get(account)
        if uid is None:
            uid = self.open[account] = f"{account}:{self.next[account]}"
            self.next[account] += 1
        return Ordered(account=account, uid=uid, value=value_of(uid))

    def close(self, account: str) -> None:
        del self.open[account]


def publishing(job: Job, journal: Journal, rng: random.Random, _: Any) -> None:
    """Many accounts at once, one event of an account after the other; and batches; and repeats of old events."""
    asyncio.run(_publishing(job, journal, rng))


async def _publishing(job: Job, journal: Journal, rng: random.Random) -> None:
    accounts = [f"{job.name}:{n}" for n in range(20)]
    line = Line(job)
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    app = App(broker=job.url, topics=TOPICS, name=job.name)

    async def pause(mean: float) -> None:
        try:
            await asyncio.wait_for(stopping.wait(), rng.expovariate(1 / mean))
        except TimeoutError:
            pass

    async def one_account(account: str) -> None:
        while not stopping.is_set():
            event = line.event(account)
            while await attempt(event):
                await pause(0.01)
            line.close(account)
            if rng.random() < 0.03:
                await attempt(event)  # the same id once more: at most a duplicate
            if rng.random() < 0.02:
                await app.publish(Ignored(account=account))
            await pause(len(accounts) / job.rate)

    async def attempt(event: Ordered) -> bool:
        """True if it must be tried again."""
        journal.note("intend", event.uid, event.account, "", event.value)
        hasty = rng.random() < 0.05
        try:
            await app.publish(event, id=event.uid, deadline=0.002 if hasty else 30)
        except OutcomeUnknown:
            journal.note("unknown", event.uid, event.account)
            return True
        except Unavailable:
            journal.note("refused", event.uid, event.account)
            return True
        journal.note("acked", event.uid, event.account)
        return False

    async def batches() -> None:
        while not stopping.is_set():
            batch = f"{job.name}:batch:{line.next['batch']}"
            line.next["batch"] += 1
            events = []
            for n in range(rng.randint(2, 12)):
                account, uid = f"{job.name}:b{n % 3}", f"{batch}:{n}"
                events.append(Ordered(account=account, uid=uid, value=value_of(uid)))
                journal.note("intend", uid, account, "", value_of(uid), batch)
            try:
                await app.publish_all(events)
            except (OutcomeUnknown, Unavailable):
                pass  # it may appear or not, but as a whole
            else:
                for event in events:
                    journal.note("acked", event.uid, event.account)
            await pause(40 / job.rate)

    async with app:
        await asyncio.gather(batches(), *(one_account(account) for account in accounts))


def publishing_sync(job: Job, journal: Journal, rng: random.Random, _: Any) -> None:
    """Code without an event loop, in three threads."""
    line = Line(job)
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    app = App(broker=job.url, topics=TOPICS, name=job.name)

    def one_account(account: str, dice: random.Random) -> None:
        while not stopping.is_set():
            event = line.event(account)
            journal.note("intend", event.uid, account, "", event.value)
            try:
                app.publish_sync(event, id=event.uid)
            except OutcomeUnknown:
                journal.note("unknown", event.uid, account)
                continue
            except Unavailable:
                journal.note("refused", event.uid, account)
                continue
            journal.note("acked", event.uid, account)
            line.close(account)
            stopping.wait(dice.expovariate(job.rate / 3))

    threads = [
        threading.Thread(target=one_account, args=(f"{job.name}:{n}", random.Random(rng.random())), daemon=True)
        for n in range(3)
    ]
    for thread in threads:
        thread.start()
    while not stopping.wait(0.1):
        pass
    for thread in threads:
        thread.join(10)


def operating(job: Job, journal: Journal, rng: random.Random, _: Any) -> None:
    """Looks at the shelf like a person: cures what can be cured and redrives it, discards the rest."""
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    (job.folder / "cured").mkdir(exist_ok=True)
    path = job.folder / "events.db"
    while not (path.exists() and path.stat().st_size) and not stopping.is_set():
        stopping.wait(0.05)
    if stopping.is_set():
        return
    audited = 0.0
    with opened(job.url, store=job.file_url) as looking:
        records = looking.records
        while not stopping.wait(rng.random() * 0.2):
            operate_once(records, job.folder, journal)
            if (
                time.monotonic() - audited > 1.0 and not job.broker
            ):  # the books must balance at every instant, not only at the end
                audited = time.monotonic()
                books = books_module.books(records)
                journal.note(
                    "audited" if books.balanced else "unbalanced", str([*books.missing, *books.findings])[:500]
                )


def operate_once(records: Records, folder: Path, journal: Journal) -> int:
    letters = shelf.letters(records)
    for letter in letters:
        if letter.request is not None:
            continue
        event = json.loads(letter.data or b"{}")
        uid = event.get("uid", "")
        journal.note("shelved", uid, event.get("account", ""), letter.service, event.get("value", 0))
        cure = curable(letter.service, uid) or not doomed(letter.service, uid)
        if cure:
            (folder / "cured" / f"{letter.service} {uid}").touch()
        action: shelf.Action = "redrive" if cure else "discard"
        shelf.ask(records, action, [letter], operator="the proof", reason="as decided", wait_seconds=0)
    return len(letters)


# --- the supervisor --------------------------------------------------------------------------------------------------


@dataclass
class Child:
    job: Job
    pid: int
    started: float
    resume_at: float | None = None  # while it is stopped
    killed: bool = False


@dataclass
class Report:
    seed: int
    kills: int = 0
    by_kind: Counter[str] = field(default_factory=Counter)
    crash_points: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    drain_seconds: float = 0.0
    events: int = 0
    completions: int = 0
    anomalies: list[str] = field(default_factory=list)
    audits: int = 0  # during the run
    audit: dict[str, Any] = field(default_factory=dict)  # after it
    broken: list[str] = field(default_factory=list)  # processes that ended in a way that nobody asked for

    @property
    def green(self) -> bool:
        return not (self.anomalies or self.broken or self.audit.get("wrong") or not self.audit)


class Supervisor:
    def __init__(self, folder: Path, *, seed: int, kills: int, seconds: float, pace: float, drain: float) -> None:
        self.folder = folder
        self.rng = random.Random(seed)
        self.report = Report(seed)
        self.kills = kills
        self.end = time.monotonic() + seconds
        self.pace = pace
        self.drain = drain
        self.rate = max(8.0, min(40.0, 40.0 * 300 / seconds))  # a long run keeps its history in memory at the end, too
        self.children: dict[str, Child] = {}
        self.lives: Counter[str] = Counter()
        self.lines = {
            "services-0": "services", "services-1": "services", "services-2": "services",
            "publisher-0": "publish", "publisher-1": "publish", "script-0": "sync", "operator-0": "operator",
        }  # fmt: skip
        (folder / "evidence").mkdir(parents=True)
        (folder / "schema.sql").write_text(SCHEMA)
        self.log = os.open(folder / "stderr.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def start(self, name: str, *, armed: bool) -> None:
        self.lives[name] += 1
        kind = self.lines[name]
        job = Job(kind, name, self.lives[name], self.rng.getrandbits(32), self.folder, armed, self.rate)
        pid = fork(lambda: run_child(job), self.log)
        self.children[name] = Child(job, pid, time.monotonic())

    def run(self) -> Report:
        begun = time.monotonic()
        gc.freeze()
        try:
            for name in self.lines:
                self.start(name, armed=False)
            while self.report.kills < self.kills and time.monotonic() < self.end:
                self._act()
                self._tend(self.rng.expovariate(1 / self.pace))
            self.report.seconds = time.monotonic() - begun
            self._finish()
        finally:
            for child in self.children.values():
                os.kill(child.pid, signal.SIGKILL)
                os.waitpid(child.pid, 0)
        self.report.drain_seconds = time.monotonic() - begun - self.report.seconds
        return self.report

    def _act(self) -> None:
        """One thing that goes wrong."""
        names = [name for name, child in self.children.items() if child.resume_at is None]
        if not names:
            return
        # services are where most can break
        name = self.rng.choices(names, [4 if n.startswith("services") else 1 for n in names])[0]
        dice = self.rng.random()
        if dice < 0.62:
            self._kill(name, "at any moment")
        elif dice < 0.82:
            self._kill(name, "at any moment")
            self._tend(0.0)
            self._tend(self.rng.random() * 0.1)
            if name in self.children and self.children[name].resume_at is None:
                self._kill(name, "while starting")
        elif dice < 0.85:
            for each in names:
                self._kill(each, "everything at once")
        elif dice < 0.92:
            self._stop(name, self.rng.random() * 0.4)
        elif dice < 0.935:
            self._stop(name, HUNG_SECONDS + 0.5 + self.rng.random())
        else:
            self.report.by_kind["SIGTERM"] += 1
            os.kill(self.children[name].pid, signal.SIGTERM)

    def _kill(self, name: str, kind: str) -> None:
        child = self.children[name]
        if not child.killed:
            child.killed = True
            self.report.by_kind[kind] += 1
            os.kill(child.pid, signal.SIGKILL)

    def _stop(self, name: str, seconds: float) -> None:
        self.report.by_kind["zombie" if seconds > HUNG_SECONDS else "SIGSTOP"] += 1
        os.kill(self.children[name].pid, signal.SIGSTOP)
        self.children[name].resume_at = time.monotonic() + seconds

    def _tend(self, seconds: float, *, restart: bool = True) -> None:
        """Lets time pass, while what has ended is started again."""
        until = time.monotonic() + seconds
        while True:
            for name, child in list(self.children.items()):
                if child.resume_at is not None and time.monotonic() >= child.resume_at:
                    child.resume_at = None
                    os.kill(child.pid, signal.SIGCONT)
                self._reap(name, child, restart)
            left = until - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(left, 0.005))

    def _reap(self, name: str, child: Child, restart: bool) -> None:
        pid, status = os.waitpid(child.pid, os.WNOHANG)
        if pid == 0:
            return
        del self.children[name]
        code = os.waitstatus_to_exitcode(status)
        if code == -signal.SIGKILL:
            self.report.kills += 1
            if not child.killed:
                self.report.by_kind["crash point"] += 1
        elif code not in (0, -signal.SIGTERM, 128 + signal.SIGTERM):
            self.report.broken.append(f"{name} ended with {code}; see stderr.txt")
        if restart:
            self.start(name, armed=self.lines[name] != "operator" and self.rng.random() < 0.5)

    def _finish(self) -> None:
        """No more kills: what was published is worked off, everybody leaves cleanly, then the books are opened."""
        for child in self.children.values():
            os.kill(child.pid, signal.SIGCONT)
        for name in list(self.children):
            self._end(name, signal.SIGTERM if self.children[name].job.kind in ("publish", "sync") else signal.SIGKILL)
        for name, kind in self.lines.items():
            if kind in ("services", "operator"):
                self.start(name, armed=False)
        watcher = fork(lambda: wait_for_drain(self.folder, self.drain), self.log)
        while os.waitpid(watcher, os.WNOHANG)[0] == 0:
            self._tend(0.05, restart=False)
        for name in list(self.children):
            self._end(name, signal.SIGTERM)
        os.waitpid(fork(lambda: audit(self.folder), self.log), 0)
        found = self.folder / "audit.json"
        self.report.audit = json.loads(found.read_text()) if found.exists() else {}
        self._check()

    def _end(self, name: str, number: int) -> None:
        child = self.children.pop(name)
        os.kill(child.pid, number)
        code = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
        if code == -signal.SIGKILL:
            self.report.kills += 1
        elif code not in (0, -signal.SIGTERM):
            self.report.broken.append(f"{name} ended with {code} after its SIGTERM; see stderr.txt")

    def _check(self) -> None:
        notes = list(read(self.folder / "evidence"))
        rows = list(effects(self.folder))
        self.report.events = len({note.uid for note in notes if note.what == "acked"})
        self.report.completions = sum(note.what == "completed" for note in notes) + len(rows)
        self.report.crash_points = Counter(note.uid for note in notes if note.what == "died")
        self.report.anomalies = [str(a) for a in check(notes, rows, CONTRACTS)]
        self.report.audits = sum(note.what == "audited" for note in notes)
        self.report.broken += [f"unbalanced while running: {n.uid}" for n in notes if n.what == "unbalanced"]


def effects(folder: Path, name: str = "events.db") -> Iterator[Effect]:
    """The user's own table, read through a fresh connection."""
    connection = apsw.Connection(str(folder / name), flags=apsw.SQLITE_OPEN_READONLY)
    connection.set_busy_timeout(5000)
    try:
        for row in connection.execute("select number, service, uid, account, value from effect order by number"):
            yield Effect(*row)
    finally:
        connection.close()


def wait_for_drain(folder: Path, seconds: float) -> None:
    """Returns when the product says that nothing is left to do; whether that is true is for the checker to say. A slow
    machine gets more time, as long as things move."""
    end = time.monotonic() + seconds
    least: int | None = None
    with opened(f"embedded://{folder}/events.db") as looking:
        records = looking.records
        while time.monotonic() < end:
            left = sum(b.open + b.dead + b.parked for b in books_module.books(records).services.values())
            left += records.read(lambda look: look.execute("select count(*) from unlost_delayed").fetchone()[0])
            if not left:
                return
            if least is None or left < least:
                least, end = left, max(end, time.monotonic() + min(seconds, MOVES_SECONDS))
            time.sleep(0.1)


def audit(folder: Path) -> None:
    with opened(f"embedded://{folder}/events.db") as looking:
        records = looking.records
        books = books_module.books(records)
        note_named(books, looking.log, folder)
        wrong = [*books.findings, *books.unaccountable, *books_module.verify(records)]
        wrong += [str(missing) for missing in books.missing]
        if books.unaccounted:
            wrong.append(f"{books.unaccounted} unaccounted")
        figures = {name: {"accepted": b.accepted, "done": b.done, "open": b.open} for name, b in books.services.items()}
        (folder / "audit.json").write_text(json.dumps({"wrong": wrong, "books": figures}))


def note_named(books: Books, log: Log, folder: Path) -> None:
    """What the books name as cut off, by what the events say."""
    journal = Journal(folder / "evidence", "books")
    for m in books.abandoned:
        (arrival,) = log.read(m.topic, m.partition, m.position, 1)
        event = json.loads(arrival.data or b"{}")
        journal.note("named", event.get("uid", ""), event.get("account", ""), m.service, event.get("value", 0))


def fork(work: Callable[[], None], log: int) -> int:
    """A child process that does `work`; it dies with its parent."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.dup2(log, 2)
        watch = threading.Thread(target=follow, args=(parent,), daemon=True)
        watch.start()
        work()
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 71
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=int(os.environ.get("SEED", "1")))
    parser.add_argument("--kills", type=int, default=int(os.environ.get("KILLS", "200")))
    parser.add_argument("--seconds", type=float, default=float(os.environ.get("SECONDS", "240")))
    parser.add_argument("--pace", type=float, default=0.5, help="mean seconds between two acts of violence")
    parser.add_argument("--drain", type=float, default=90.0, help="seconds for what is left when the killing is over")
    a = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    supervisor = Supervisor(a.folder, seed=a.seed, kills=a.kills, seconds=a.seconds, pace=a.pace, drain=a.drain)
    report = supervisor.run()
    print(json.dumps({**report.__dict__, "green": report.green}, indent=1))
    return 0 if report.green else 1


if __name__ == "__main__":
    sys.exit(main())
