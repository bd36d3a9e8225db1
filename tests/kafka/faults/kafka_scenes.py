"""Short, repeatable scenes on Kafka: each ends at one exact line or state, not at a random moment.

A scene plays on a real broker with child processes, and returns the names of what is wrong: the checker's anomalies,
`audit`, and checks of its own. With no planted bug that is nothing. Where no real fault can bring a client into a
state, the child's client is a fake at the narrowest seam (`Life.client`), and the scene says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checker import Contract
from confluent_kafka import (
    ConsumerGroupTopicPartitions,
    KafkaError,
    KafkaException,
    Producer,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import NewPartitions, NewTopic
from evidence import Journal, read
from kafka_books import Unit, admin
from kafka_stage import Child, Stage, stopped
from patience import Patience
from workload import Echoed, Ordered, value_of

import unlost.brokers.kafka.member as member_module
import unlost.delivery.relay as relay_module
import unlost.delivery.worker as worker_module
import unlost.sqlite.process as process_module
from unlost import App, Context, OutcomeUnknown, Retry, Service, Topic
from unlost.brokers.kafka.broker import KafkaBroker
from unlost.brokers.kafka.member import KafkaMember
from unlost.events import seal
from unlost.events.codec import to_headers
from unlost.ops import shelf
from unlost.sqlite.file import File
from unlost.sqlite.marks import Marks
from unlost.store.records import FileRecords
from unlost.store.sqlite import SqliteStore
from unlost.testing import sabotage

INSERT = "insert into effect (service, uid, account, value) values (?, ?, ?, ?)"
ONCE = Contract(service="bill", once=True)
AGAIN = Contract(service="note")


@dataclass
class Life:
    """What one child process is to be."""

    folder: Path
    name: str
    partitions: int = 1
    services: tuple[str, ...] = ("bill",)
    gate: str = ""  # handlers of events that end so wait for the file `<name> may go`
    failing: str = ""  # handlers of this account fail
    client: str = ""  # a fake of the narrowest kind, see `_fake_client`
    dies: str = ""  # where it ends itself
    drain: float = 10.0  # how long a partition may take to be handed back
    slow: float = 0.0  # seconds of each handler
    holds: bool = False  # its store is slow until the files `<name> may settle` and `<name> may take` are there

    def file(self, what: str) -> Path:
        return self.folder / f"{self.name} {what}"


# --- in the children ------------------------------------------------------------------------------------------------


def _hurry(life: Life) -> None:
    worker_module.ACK_SECONDS = 0.1
    worker_module.SHORT_WAIT_SECONDS = 60.0
    member_module.CHECK_SECONDS = 0.5
    member_module.DRAIN_SECONDS = life.drain
    relay_module.AGAIN_SECONDS = 0.1
    process_module.HEARTBEAT_STALE_SECONDS = 1.0
    if life.client:
        _fake_client(life.client)
    if life.holds:
        _hold_first_commit(life)
    if life.dies == "while relaying":
        _die_while_relaying()
    elif life.dies == "after settling":
        _die_after_settling()


def topics(partitions: int) -> list[Topic]:
    return [Topic("main", partitions=partitions), Topic("echo", partitions=1)]


def live(life: Life) -> None:
    """Serves until SIGTERM."""
    _hurry(life)
    journal = Journal(life.folder / "evidence", f"{life.name}-{os.getpid()}")
    quick = Retry(attempts=10_000, first=0.2, factor=1)
    bill = Service("bill", guarantee="effectively-once", retry=quick)
    note = Service("note", retry=quick)
    relay = Service("relay", guarantee="effectively-once", retry=quick)
    ship = Service("ship", guarantee="effectively-once", retry=quick)

    async def before(event: Any) -> None:
        if life.gate and event.uid.endswith(life.gate):
            life.file("is in").touch()
            with life.file("has in hand").open("a") as f:
                f.write(f"{event.uid}\n")
            while not life.file("may go").exists():
                await asyncio.sleep(0.01)
        if life.failing and event.account == life.failing:
            raise ConnectionError("this handler fails")
        if life.slow:
            await asyncio.sleep(life.slow)

    @bill.on(Ordered)
    async def charge(event: Ordered, ctx: Context) -> None:
        await before(event)
        try:
            async with ctx.transaction() as db:
                await db.execute(INSERT, ("bill", event.uid, event.account, event.value))
        finally:
            if life.gate and event.uid.endswith(life.gate):
                life.file("is out").touch()

    @note.on(Ordered)
    async def write_down(event: Ordered) -> None:
        await before(event)
        journal.note("completed", event.uid, event.account, "note", event.value)

    @relay.on(Ordered)
    async def pass_on(event: Ordered, ctx: Context) -> None:
        """Every other event in a transaction: their order must be kept all the same."""
        await before(event)
        if int(event.uid.partition(":")[2]) % 2:
            try:
                async with ctx.transaction():
                    ctx.publish(Echoed(account=event.account, uid=event.uid, value=event.value))
            finally:
                if event.uid.endswith(life.gate or "-"):
                    life.file("is out").touch()
        else:
            ctx.publish(Echoed(account=event.account, uid=event.uid, value=event.value))

    @ship.on(Echoed)
    async def send(event: Echoed, ctx: Context) -> None:
        async with ctx.transaction() as db:
            await db.execute(INSERT, ("ship", event.uid, event.account, event.value))

    chosen = [s for s in (bill, note, relay, ship) if s.name in life.services]
    App(*chosen, topics=topics(life.partitions), schema=life.folder / "schema.sql").run()


def publish(life: Life, uids: Sequence[str]) -> None:
    """One after the other. With `life.dies`, the process ends when the last one is acknowledged."""
    _hurry(life)
    journal = Journal(life.folder / "evidence", f"{life.name}-{os.getpid()}")

    async def work() -> None:
        async with App(topics=topics(life.partitions), name="shop") as app:
            for uid in uids:
                event = ordered(uid)
                journal.note("intend", uid, event.account, "", event.value)
                await app.publish(event, id=uid)
                journal.note("acked", uid, event.account)
            if life.dies:
                die()

    asyncio.run(work())


def publish_through_failure(life: Life, uids: Sequence[str]) -> None:
    """All at once; while they wait for their reports the producer fails for good.

    A fake: the client's callback is told of a fatal error, for no broker can be made to cause one at a given moment.
    The old producer is emptied by it, as after a real one.
    """
    _hurry(life)
    journal = Journal(life.folder / "evidence", f"{life.name}-{os.getpid()}")

    async def one(app: App, uid: str) -> None:
        event = ordered(uid)
        journal.note("intend", uid, event.account, "", event.value)
        try:
            await app.publish(event, id=uid, deadline=5)
        except OutcomeUnknown:
            journal.note("unknown", uid, event.account)
        else:
            journal.note("acked", uid, event.account)

    async def work() -> None:
        async with App(topics=topics(life.partitions), name="shop") as app:
            await one(app, uids[0])
            rest = [asyncio.create_task(one(app, uid)) for uid in uids[1:]]
            await asyncio.sleep(0)
            broker = app.broker
            assert isinstance(broker, KafkaBroker)
            publisher = broker._publisher
            assert publisher is not None
            while len(publisher._pending) < len(rest):
                await asyncio.sleep(0)
            publisher._on_error(KafkaError(KafkaError._FATAL, "planted", True))
            await asyncio.gather(*rest)

    asyncio.run(work())


def _fake_client(kind: str) -> None:
    """`skips`: once, the client leaves out the message at position 5 and hands over the next ones, some at a time.

    When the member has seen the hole and asks for it again, one more read of the old kind is already under way.
    """
    real, go_to = member_module.Consumer, KafkaMember._go_to
    asked = threading.Event()

    def noted(self: KafkaMember, *where: Any) -> None:
        go_to(self, *where)
        if Skips.beyond:
            asked.set()

    class Skips(real):  # type: ignore[misc,valid-type]
        left = 1
        beyond = False  # whether one was handed over that follows the hole

        def poll(self, timeout: float = -1) -> Any:
            if Skips.beyond:
                asked.wait(3)
                asked.set()
            return self._filter([m for m in (super().poll(timeout),) if m is not None], one=True)

        def consume(self, num_messages: int = 1, timeout: float = -1) -> Any:
            return self._filter(super().consume(min(num_messages, 3), timeout), one=False)

        def _filter(self, messages: list[Any], *, one: bool) -> Any:
            kept = []
            for m in messages:
                if m.error() is None and m.offset() == 5 and self.left:
                    self.left -= 1
                else:
                    kept.append(m)
                    Skips.beyond |= m.error() is None and m.offset() > 5
            return (kept[0] if kept else None) if one else kept

    assert kind == "skips"
    member_module.Consumer = Skips  # type: ignore[misc]
    KafkaMember._go_to = noted  # type: ignore[method-assign]


def _hold_first_commit(life: Life) -> None:
    """A fake: a store that is slow at two moments, the first commit and the second taking of partitions."""
    settle = SqliteStore.settle
    first = True

    async def held(self: SqliteStore, settlements: Any) -> Any:
        nonlocal first
        if first:
            first = False
            life.file("settles").touch()
            while not life.file("may settle").exists():
                await asyncio.sleep(0.01)
        return await settle(self, settlements)

    take = SqliteStore.take
    times = 0

    async def taking(self: SqliteStore, units: Any) -> Any:
        nonlocal times
        times += 1
        if times == 2:
            life.file("takes").touch()
            while not life.file("may take").exists():
                await asyncio.sleep(0.01)
        return await take(self, units)

    SqliteStore.settle = held  # type: ignore[method-assign]
    SqliteStore.take = taking  # type: ignore[method-assign]


def _die_while_relaying() -> None:
    """At the door of the broker with rows of the outbox in hand, and nothing sent yet."""

    async def dying(self: KafkaBroker, envelopes: Any) -> Any:
        die()

    KafkaBroker.publish = dying  # type: ignore[method-assign]


def _die_after_settling() -> None:
    """When the first commit that settles something is durable, and nobody has been told of it."""
    settle_in, mark = SqliteStore.settle_in, Marks.write
    reached = threading.Event()

    def noted(self: SqliteStore, *args: Any, **more: Any) -> Any:
        reached.set()
        return settle_in(self, *args, **more)

    def write(self: Marks, commit: int) -> None:
        mark(self, commit)
        if reached.is_set():
            die()

    SqliteStore.settle_in = noted  # type: ignore[method-assign]
    Marks.write = write  # type: ignore[method-assign]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


# --- the director's tools ---------------------------------------------------------------------------------------------


def ordered(uid: str) -> Ordered:
    return Ordered(account=uid.partition(":")[0], uid=uid, value=value_of(uid))


def names(account: str, start: int, end: int) -> list[str]:
    return [f"{account}:{n}" for n in range(start, end)]


class Scene(Stage):
    """A stage on which one scene is played, perhaps with a planted bug in its children."""

    def __init__(self, folder: Path, bootstrap: str, prefix: str, bug: str | None = None) -> None:
        super().__init__(folder, bootstrap, prefix, options="session.timeout.ms=1000&heartbeat.interval.ms=200")
        self.bug = bug
        self.found: set[str] = set()
        self._patience = Patience(self._marks, hurried=bool(bug))
        self._journal = self.journal("director")
        self._watching = threading.Event()

    @property
    def env(self) -> dict[str, str]:
        return {sabotage.VARIABLE: self.bug or ""}

    def life(self, name: str, **more: Any) -> tuple[Child, Life]:
        life = Life(self.folder, name, **more)
        self._patience.begin()
        return self.begin(name, live, life, env=self.env), life

    def publish(
        self, uids: Sequence[str], *, partitions: int = 1, work: Callable[..., None] = publish, **more: Any
    ) -> int:
        life = Life(self.folder, "publisher", partitions=partitions, **more)
        return self.begin("publisher", work, life, uids, env=self.env).wait()

    def soon(self, holds: Callable[[], Any]) -> bool:
        """Waits for a condition that a planted bug may prevent."""
        return self._patience.soon(holds)

    def _marks(self) -> tuple[int, ...]:
        """They change with whatever a child says, notes or does."""
        files = [self.log, *sorted(self.evidence.iterdir())]
        return (*(path.stat().st_size for path in files if path.exists()), len(self.effects()))

    def all_done(self, service: str, uids: Sequence[str]) -> bool:
        return self.soon(lambda: set(self.completed(service)) >= set(uids))

    def settled(self) -> bool:
        return self.soon(self.drained)

    def finish(self, child: Child) -> None:
        """It must leave cleanly."""
        if child.end() != 0:
            self.found.add("ended badly")

    def refused(self, child: Child, *codes: str) -> None:
        """The child must end by itself and say why."""
        if not self.soon(lambda: child.code is not None):
            self.found.add("not refused")
        elif child.code == 0 or not any(code in self.said() for code in codes):
            self.found.add("refused without its reason")

    def quiet(self) -> None:
        """Waits until nothing is written for a moment: who is stopped in the middle of a commit holds everybody up."""
        before, since = None, time.monotonic()
        while time.monotonic() - since < 0.4:
            now = (self.positions(), [path.stat().st_mtime_ns for path in self.folder.glob("events.db-wal")])
            if now != before:
                before, since = now, time.monotonic()
            time.sleep(0.05)

    def wait_file(self, path: Path) -> None:
        self.until(path.exists, 30, path.name)

    def judge(self, *contracts: Contract, expired: dict[str, set[int]] | None = None) -> set[str]:
        for line in (lines := self.verdict(contracts, expired=expired)):
            self.found.add(line.partition(":")[0])
        (self.folder / "verdict.txt").write_text("\n".join(lines))
        return self.found

    def raw(self, events: Sequence[tuple[str, bool]], *, id: str) -> None:
        """A transactional producer that is not ours: each run of events is committed (True) or aborted."""
        producer = Producer(
            {"bootstrap.servers": self.bootstrap, "transactional.id": f"{self.prefix}{id}", "log_level": 0}
        )
        producer.init_transactions(30)
        at = 0
        while at < len(events):
            commit = events[at][1]
            producer.begin_transaction()
            run = []
            while at < len(events) and events[at][1] == commit:
                run.append(ordered(events[at][0]))
                at += 1
            for event in run:
                headers, value = to_headers(
                    seal(event, source="java", id=event.uid, topic="main", now=1_700_000_000_000_000)
                )
                if commit:
                    self._journal.note("intend", event.uid, event.account, "", event.value)
                producer.produce(self.prefix + "main", value, event.account.encode(), partition=0, headers=headers)
            producer.flush(30)
            producer.commit_transaction(30) if commit else producer.abort_transaction(30)
            for event in run if commit else ():
                self._journal.note("acked", event.uid, event.account)

    @contextlib.contextmanager
    def file(self) -> Iterator[File]:
        """The store, as an operator's tool opens it."""
        file = File(self.store, check_tail=False)
        try:
            yield file
        finally:
            file.close()

    def epochs(self) -> int:
        """How often a partition was taken."""
        with self.file() as file:
            return int(file.read(lambda c: c.execute("select count(*) from unlost_epoch").fetchone()[0]))

    # --- what must hold at every moment --------------------------------------------------------------------------

    def watch(self) -> Callable[[], None]:
        """Looks all the time at what the group was told; the returned function ends that, with a last look."""
        end = threading.Event()
        highest: dict[Unit, int] = {}

        def look() -> None:
            try:
                if self.committed_ahead():
                    self.found.add("told ahead")
                for unit, (offset, note) in self.told().items():
                    if offset < highest.get(unit, 0):
                        self.found.add("told back")
                    highest[unit] = max(offset, highest.get(unit, 0))
                    if note is not None and (note.position != offset or _torn(note)):
                        self.found.add("torn note")
            except KafkaException:  # groups come into being only now
                pass

        def run() -> None:
            while not end.wait(0.02):
                look()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()

        def stop() -> None:
            end.set()
            thread.join()
            look()

        return stop


def _torn(note: Any) -> bool:
    """In these scenes each event ends as counted, so the counts must say as many as position and done-set do."""
    return note.done is not None and sum(note.counts.values()) != note.position + len(note.done_above())


# --- the scenes: groups and their offsets -----------------------------------------------------------------------------


def polled_is_not_processed(scene: Scene) -> set[str]:
    """Parallel Consumer #826: much is polled, little is handled; a second member comes; the first is killed. At no
    moment may the group have been told more than what was handled."""
    uids = [u for a in "abcd" for u in names(a, 0, 25)]
    scene.publish(uids, partitions=4)
    one, _ = scene.life("one", partitions=4, services=("bill", "note"), slow=0.02)
    stop = scene.watch()
    scene.soon(lambda: len(scene.completed("note")) > 5)
    two, _ = scene.life("two", partitions=4, services=("bill", "note"), slow=0.01)
    scene.soon(lambda: len(scene.completed("note")) > 30)
    one.kill()
    scene.all_done("note", uids)
    scene.all_done("bill", uids)
    scene.settled()
    stop()
    scene.finish(two)
    return scene.judge(ONCE, AGAIN)


def stale_entry(scene: Scene) -> set[str]:
    """Parallel Consumer #875/#909: 1 member, 2, 1 again, while events of the first ownership are still in their
    handlers. What comes back under a new epoch must be delivered, though the old deliveries are still there."""
    accounts = "abcd"
    uids = [u for a in accounts for u in names(a, 0, 4)]
    scene.publish(uids, partitions=4)
    one, life = scene.life("one", partitions=4, gate=":1", drain=0.3)
    held = life.file("has in hand")
    scene.soon(lambda: held.exists() and len(set(held.read_text().split())) == len(accounts))
    owners = scene.epochs()
    two, _ = scene.life("two", partitions=4, gate=":1", drain=0.3)
    scene.soon(lambda: scene.epochs() > owners)  # some are the second one's now; the first one's handlers go on
    owners = scene.epochs()
    scene.soon((scene.folder / "two has in hand").exists)
    two.kill()
    scene.soon(lambda: scene.epochs() > owners)  # and come back
    scene.soon(lambda: "they run first" in scene.said())  # what "two" had in hand; the stale ones are not done yet
    life.file("may go").touch()
    scene.all_done("bill", uids)
    scene.settled()
    scene.finish(one)
    return scene.judge(ONCE)


def clean_stop(scene: Scene) -> set[str]:
    """A service is told to stop while it has events in its queues."""
    uids = [u for a in "abcd" for u in names(a, 0, 10)]
    scene.publish(uids, partitions=2)
    one, _ = scene.life("one", partitions=2, services=("note",), slow=0.05)
    scene.soon(lambda: len(scene.completed("note")) > 3)
    scene.finish(one)
    two, _ = scene.life("two", partitions=2, services=("note",))
    scene.all_done("note", uids)
    scene.settled()
    scene.finish(two)
    return scene.judge(AGAIN)


def one_snapshot(scene: Scene) -> set[str]:
    """Parallel Consumer #894: position and note come from one snapshot, under load, with holes above the position."""
    uids = [u for n in range(60) for u in (f"a:{n}", f"b:{n}", f"c:{n}", f"d:{n}")]
    scene.publish(uids)
    one, _ = scene.life("one", services=("bill", "note"), slow=0.005)
    stop = scene.watch()
    scene.all_done("bill", uids)
    scene.all_done("note", uids)
    scene.settled()
    stop()
    scene.finish(one)
    return scene.judge(ONCE, AGAIN)


def lost_partitions(scene: Scene) -> set[str]:
    """librdkafka #5604: a member sleeps through its session; its partitions are another's, which goes on. When it
    wakes up it says nothing of them to the group, and settles nothing."""
    uids = [u for a in "abcd" for u in names(a, 0, 6)]
    scene.publish(uids, partitions=2)
    one, life = scene.life("one", partitions=2, gate="a:3")
    scene.wait_file(life.file("is in"))
    scene.soon(lambda: len(scene.completed("bill")) >= 15)
    stop = scene.watch()
    scene.quiet()
    with stopped(one):
        two, _ = scene.life("two", partitions=2)
        scene.all_done("bill", uids)
        scene.settled()
        life.file("may go").touch()
    scene.soon(life.file("is out").exists)
    scene.publish(names("e", 0, 3), partitions=2)
    scene.all_done("bill", [*uids, *names("e", 0, 3)])
    scene.settled()
    time.sleep(4.0 if scene.bug else 0.5)  # time for a commit that must not come
    stop()
    scene.finish(one)
    scene.finish(two)
    return scene.judge(ONCE)


def lost_while_settling(scene: Scene) -> set[str]:
    """A member loses its partitions while outcomes wait for a slow store (a fake), and finds itself the first to take
    them again. What its old handlers still commit must not overtake what was dropped."""
    uids = names("a", 0, 4)
    scene.publish(["b:0"])
    one, life = scene.life("one", services=("relay",), holds=True, gate="a:1")
    scene.wait_file(life.file("settles"))
    scene.publish(uids)
    scene.wait_file(life.file("is in"))  # the event before it waits for its commit
    scene.quiet()
    with stopped(one):
        time.sleep(2.5)  # longer than its session
    scene.wait_file(life.file("takes"))  # it has lost them, and is about to have them again
    life.file("may go").touch()
    time.sleep(0.3)  # until its handler stands before its transaction
    life.file("may settle").touch()
    scene.wait_file(life.file("is out"))
    life.file("may take").touch()
    two, _ = scene.life("two", services=("relay", "ship"))
    scene.all_done("ship", ["b:0", *uids])
    scene.settled()
    scene.finish(one)
    scene.finish(two)
    return scene.judge(Contract(service="ship", once=True))


def partial_batch(scene: Scene) -> set[str]:
    """FastStream: one partition's failure must not be acknowledged by the success of others in the same batch."""
    accounts = ("a", "b", "c", "d", "e", "f")
    uids = [u for n in range(5) for u in (f"{a}:{n}" for a in accounts)]
    scene.publish(uids, partitions=4)
    one, _ = scene.life("one", partitions=4, services=("bill", "note"), failing="a")
    stop = scene.watch()
    others = [u for u in uids if not u.startswith("a:")]
    scene.all_done("bill", others)
    scene.all_done("note", others)
    one.kill()
    two, _ = scene.life("two", partitions=4, services=("bill", "note"))
    scene.all_done("bill", uids)
    scene.all_done("note", uids)
    scene.settled()
    stop()
    scene.finish(two)
    return scene.judge(ONCE, AGAIN)


def offsets_are_moved(scene: Scene) -> set[str]:
    """Somebody deletes the group, then moves its offsets to the beginning, then to the end: the store's position
    counts, so nothing is skipped and nothing repeated."""
    uids = names("a", 0, 10)
    scene.publish(uids[:4])
    at = Unit("bill", "main", 0)
    group = scene.prefix + "bill"
    for done, change in ((4, "delete"), (6, "beginning"), (8, "end"), (10, None)):
        child, _ = scene.life("one")
        scene.all_done("bill", uids[:done])
        scene.settled()
        scene.finish(child)
        if scene.told().get(at, (None,))[0] != done:
            scene.found.add("not told")
        if change is None:
            break
        scene.publish(uids[done : done + 2])
        if change == "delete":
            for future in admin(scene.bootstrap).delete_consumer_groups([group]).values():
                future.result(20)
        else:
            place = TopicPartition(scene.prefix + "main", 0, done + 2 if change == "end" else 0)
            asked = admin(scene.bootstrap).alter_consumer_group_offsets([ConsumerGroupTopicPartitions(group, [place])])
            for future in asked.values():
                future.result(20)
    return scene.judge(ONCE)


# --- the scenes: what happens to the log -------------------------------------------------------------------------------


def retention_eats(scene: Scene) -> set[str]:
    """Retention removes unread events: first while nobody reads, then under a member that sleeps. Exactly these are
    named as expired, in both services; all others are handled."""
    uids = names("a", 0, 40)
    scene.publish(uids[:5])
    one, _ = scene.life("one", services=("bill", "note"))
    scene.all_done("bill", uids[:5])
    scene.all_done("note", uids[:5])
    scene.settled()
    scene.finish(one)
    scene.publish(uids[5:20])
    _delete_records(scene, 12)
    one, _ = scene.life("one", services=("bill", "note"))
    scene.all_done("bill", uids[12:20])
    scene.all_done("note", uids[12:20])
    scene.settled()
    scene.quiet()
    with stopped(one):
        scene.publish(uids[20:35])
        _delete_records(scene, 30)
    scene.publish(uids[35:])
    scene.all_done("bill", uids[35:])
    scene.all_done("note", uids[35:])
    scene.settled()
    scene.finish(one)
    with scene.file() as file:
        gaps = file.read(
            lambda c: c.execute('select service, start, "end", kind from unlost_gap order by service, start').fetchall()
        )
    # what a member had fetched before it fell asleep it still hands over; what is named must be what was not handled
    eaten: dict[str, set[int]] = {service: set() for service in ("bill", "note")}
    for service, start, end, kind in gaps:
        eaten[service] |= set(range(start, end))
        if kind != "expired":
            scene.found.add("not named")
    for service in ("bill", "note"):
        missing = {n for n, uid in enumerate(uids) if uid not in set(scene.completed(service))}
        if missing != eaten[service] or not set(range(5, 12)) <= missing:
            scene.found.add("not named")

    def gone(service: str) -> Contract:
        expects = {uids[n]: "nothing" for n in eaten[service]}
        return Contract(service=service, once=service == "bill", expects=lambda uid: expects.get(uid, "done"))  # type: ignore[arg-type, return-value]

    return scene.judge(gone("bill"), gone("note"), expired=eaten)


def _delete_records(scene: Scene, before: int) -> None:
    place = TopicPartition(scene.prefix + "main", 0, before)
    for future in admin(scene.bootstrap).delete_records([place]).values():
        future.result(20)


def topic_is_another(scene: Scene) -> set[str]:
    """The topic is deleted and made again under a service that reads it: it halts, and who starts then is refused.

    No message says which topic it is of, so what the client hands over of the new one before the service looks at
    its topics again (`CHECK_SECONDS`) is handled; nothing is after that."""
    scene.publish(names("a", 0, 5))
    one, _ = scene.life("one")
    scene.all_done("bill", names("a", 0, 5))
    scene.settled()
    scene.quiet()
    with stopped(one):  # it wakes up to a log that is longer than the old one
        _remake(scene)
    scene.refused(one, "UL3020", "UL3022")
    handled = scene.completed("bill")
    two, _ = scene.life("two")
    scene.refused(two, "UL1130")
    for child in (one, two):
        child.kill()
    if scene.completed("bill") != handled:
        scene.found.add("phantom")
    return scene.found


def _remake(scene: Scene) -> None:
    name = scene.prefix + "main"
    client = admin(scene.bootstrap)
    before = _topic_id(scene)
    client.delete_topics([name])[name].result(20)

    def made() -> bool:
        try:
            client.create_topics([NewTopic(name, 1, 1)])[name].result(20)
        except KafkaException as e:  # not gone yet
            if e.args[0].code() == KafkaError.TOPIC_ALREADY_EXISTS:
                return False
            raise
        return True

    scene.until(made, 20)
    scene.until(lambda: _topic_id(scene) not in ("", before), 20)  # until then the broker still writes to the old one
    producer = Producer({"bootstrap.servers": scene.bootstrap, "log_level": 0})
    for n in range(8):  # so that its positions look like a continuation
        event = ordered(f"z:{n}")
        headers, value = to_headers(seal(event, source="other", id=event.uid, topic="main", now=1_700_000_000_000_000))
        producer.produce(name, value, b"z", headers=headers)
    producer.flush(20)


def _topic_id(scene: Scene) -> str:
    name = scene.prefix + "main"
    try:
        return str(admin(scene.bootstrap).describe_topics(TopicCollection([name]))[name].result(20).topic_id)
    except KafkaException:
        return ""


def partitions_are_added(scene: Scene) -> set[str]:
    """More partitions move keys: a service that reads the topic halts, and so does one that starts."""
    scene.publish(names("a", 0, 5))
    one, _ = scene.life("one")
    scene.all_done("bill", names("a", 0, 5))
    scene.settled()
    name = scene.prefix + "main"
    admin(scene.bootstrap).create_partitions([NewPartitions(name, 3)])[name].result(20)
    scene.refused(one, "UL1130")
    two, _ = scene.life("two")
    scene.refused(two, "UL1130", "UL1103")
    three, _ = scene.life("three", partitions=3)  # who declares the new number is refused by the store
    scene.refused(three, "UL1130")
    return scene.found


def another_store(scene: Scene) -> set[str]:
    """A second member with another store would begin anew: it is refused, and the first goes on."""
    uids = names("a", 0, 10)
    scene.publish(uids[:5])
    one, _ = scene.life("one")
    scene.all_done("bill", uids[:5])
    scene.settled()
    scene.soon(lambda: scene.told().get(Unit("bill", "main", 0), (None,))[0] == 5)
    one.kill()  # its partition is free for the other one
    env = scene.env | {"UNLOST_STORE": f"embedded://{scene.folder}/other.db"}
    two = scene.begin("two", live, Life(scene.folder, "two"), env=env)
    scene.refused(two, "UL1132")
    two.kill()
    scene.publish(uids[5:])
    one, _ = scene.life("one")
    scene.all_done("bill", uids)
    scene.settled()
    scene.finish(one)
    return scene.judge(ONCE)


def older_store(scene: Scene) -> set[str]:
    """An old copy of the store comes back: the group knows better, and the service halts."""
    uids = names("a", 0, 10)
    for done, copy in ((5, True), (10, False)):
        scene.publish(uids[done - 5 : done])
        one, _ = scene.life("one")
        scene.all_done("bill", uids[:done])
        scene.settled()
        scene.finish(one)
        if copy:
            shutil.copytree(
                scene.folder,
                scene.folder.with_name(scene.folder.name + " copy"),
                ignore=shutil.ignore_patterns("evidence", "*.run"),
            )
    for path in scene.folder.glob("events.db*"):
        if path.is_file():
            path.unlink()
    for path in scene.folder.with_name(scene.folder.name + " copy").glob("events.db*"):
        shutil.copy(path, scene.folder / path.name)
    two, _ = scene.life("two")
    scene.refused(two, "UL3023")
    return scene.found


# --- the scenes: what is in the log --------------------------------------------------------------------------------------


def markers(scene: Scene) -> set[str]:
    """A transactional producer commits and aborts: gaps are void, aborted events are never delivered."""
    scene.publish(names("a", 0, 2))
    scene.raw(
        [(u, True) for u in names("b", 0, 3)] + [(u, False) for u in names("x", 0, 4)] + [(u, True) for u in names("b", 3, 5)]
        + [("y:0", False)],
        id="one",
    )  # fmt: skip
    one, _ = scene.life("one", services=("bill", "note"))
    uids = [*names("a", 0, 2), *names("b", 0, 5)]
    scene.all_done("bill", uids)
    scene.raw([(u, False) for u in names("x", 4, 6)] + [("b:5", True)], id="two")
    scene.publish(names("a", 2, 4))
    uids += ["b:5", *names("a", 2, 4)]
    scene.all_done("bill", uids)
    scene.all_done("note", uids)
    scene.settled()
    scene.finish(one)
    return scene.judge(ONCE, AGAIN)


def poison(scene: Scene) -> set[str]:
    """Bytes that are no event, tombstones, and messages without a key, among events: the first are seen on the shelf,
    nothing stops, nothing is dropped."""
    uids = names("a", 0, 3)
    scene.publish(uids)
    topic = scene.prefix + "main"
    producer = Producer({"bootstrap.servers": scene.bootstrap, "log_level": 0})

    def head(uid: str, **change: Any) -> list[tuple[str, bytes | None]]:
        headers, _ = to_headers(seal(ordered(uid), source="java", id=uid, topic="main", now=1_700_000_000_000_000))
        return [*((n, v) for n, v in headers if n not in change), *((n, v) for n, v in change.items() if v)]

    _, whole = to_headers(seal(ordered("b:0"), source="java", id="b:0", topic="main", now=1_700_000_000_000_000))
    bad: list[tuple[bytes | None, bytes | None, Any]] = [
        (b"\xff\xfe\x00garbage", b"k1", None),
        (None, b"k2", None),  # a tombstone of somebody else
        (None, None, None),
        (b"{", b"k3", head("p:0")),
        (b'{"account": 1}', b"k4", head("p:1")),
        (None, b"k5", head("p:2")),  # a tombstone with our attributes
        (whole, b"\xff\x00", head("p:3", ce_specversion=b"9.9")),
        (whole, b"k6", head("p:4", ce_id=b"\xff\xff")),
        (whole, b"k7", [("ce_id", None), ("ce_id", b"x"), ("\u0000", b"")]),
        (b"x" * 100_000, b"k8", None),
    ]
    for value, key, headers in bad:
        producer.produce(topic, value, key, partition=0, headers=headers)
    event = ordered("b:0")
    scene._journal.note("intend", "b:0", "b", "", event.value)
    producer.produce(topic, whole, None, partition=0, headers=head("b:0"))  # an event without a key
    producer.flush(20)
    scene._journal.note("acked", "b:0", "b")
    uids.append("b:0")
    scene.publish(names("a", 3, 5))
    uids += names("a", 3, 5)
    one, _ = scene.life("one", services=("bill", "note"))
    scene.all_done("bill", uids)
    scene.all_done("note", uids)
    scene.soon(lambda: all(at == len(uids) + len(bad) for at in scene.positions().values()))
    with scene.file() as file:
        letters = shelf.letters(FileRecords(file))
        by_service = Counter(letter.service for letter in letters)
        if by_service != {"bill": len(bad), "note": len(bad)} or any(x.reason != "undecodable" for x in letters):
            scene.found.add("dead without trace")
        shelf.ask(FileRecords(file), "discard", letters, operator="ann", reason="poison", wait_seconds=20)
    scene.settled()
    scene.finish(one)
    return scene.judge(ONCE, AGAIN)


# --- the scenes: publishing and relaying -----------------------------------------------------------------------------------


def publisher_killed(scene: Scene) -> set[str]:
    """A publisher dies at the moment it is told that its event is accepted. (Its client waits before it sends.)"""
    scene.options += "&linger.ms=400"
    scene.publish(names("a", 0, 2), dies="when acknowledged")
    one, _ = scene.life("one")
    scene.all_done("bill", names("a", 0, 2))
    scene.settled()
    scene.finish(one)
    return scene.judge(ONCE)


def producer_fails(scene: Scene) -> set[str]:
    """The producer fails for good while events wait for their reports: the next one sends them."""
    uids = [f"{a}:0" for a in "abcdefghij"]
    scene.options += "&linger.ms=400"
    scene.publish(uids, work=publish_through_failure)
    if any(n.what == "unknown" for n in read(scene.evidence)):
        scene.found.add("unanswered")
    one, _ = scene.life("one")
    scene.all_done("bill", uids)
    scene.settled()
    scene.finish(one)
    return scene.judge(ONCE)


def killed_while_relaying(scene: Scene) -> set[str]:
    """A process dies with rows of the outbox in its hands, before the broker has them."""
    uids = names("a", 0, 4)
    scene.publish(uids)
    one, _ = scene.life("one", services=("relay",), dies="while relaying")
    scene.soon(lambda: one.code is not None)
    two, _ = scene.life("two", services=("relay", "ship"))
    scene.all_done("ship", uids)
    scene.settled()
    scene.finish(two)
    return scene.judge(Contract(service="ship", once=True))


def killed_after_commit(scene: Scene) -> set[str]:
    """A process dies right after the commit that settles an event. What its handler published must be in it."""
    uids = names("a", 0, 4)
    scene.publish(uids)
    one, _ = scene.life("one", services=("relay",), dies="after settling")
    scene.soon(lambda: one.code is not None)
    two, _ = scene.life("two", services=("relay", "ship"))
    scene.all_done("ship", uids)
    scene.settled()
    scene.finish(two)
    return scene.judge(Contract(service="ship", once=True))


def client_skips(scene: Scene) -> set[str]:
    """The client leaves a message out (a fake: no broker can make it do so on demand; it has happened, see the loss
    map). A jump is believed only when reading again shows the same."""
    uids = names("a", 0, 40)
    scene.publish(uids)
    one, _ = scene.life("one", client="skips")
    scene.all_done("bill", uids)
    scene.settled()
    scene.finish(one)
    return scene.judge(ONCE)


def zombie(scene: Scene) -> set[str]:
    """A stopped owner is replaced, wakes up in the middle of its handler, and tries to commit."""
    scene.publish(["a:0", "a:1"])
    one, old = scene.life("one", gate="a:0")
    scene.wait_file(old.file("is in"))
    scene.quiet()
    with stopped(one):
        two, new = scene.life("two", gate="a:0")
        scene.wait_file(new.file("is in"))
        old.file("may go").touch()
    scene.wait_file(old.file("is out"))
    if scene.effects():
        scene.found.add("stale write")
    new.file("may go").touch()
    scene.all_done("bill", ["a:0", "a:1"])
    scene.settled()
    scene.finish(two)
    one.kill()
    return scene.judge(ONCE)


SCENES: dict[str, Callable[[Scene], set[str]]] = {
    scene.__name__.replace("_", "-"): scene
    for scene in (
        polled_is_not_processed,
        stale_entry,
        clean_stop,
        one_snapshot,
        lost_partitions,
        lost_while_settling,
        partial_batch,
        offsets_are_moved,
        retention_eats,
        topic_is_another,
        partitions_are_added,
        another_store,
        older_store,
        markers,
        poison,
        publisher_killed,
        producer_fails,
        killed_while_relaying,
        killed_after_commit,
        client_skips,
        zombie,
    )
}
