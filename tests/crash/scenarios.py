"""Short, repeatable scenes for the planted bugs: each ends at one exact line, not at a random moment.

`python scenarios.py SCENE FOLDER` plays one, with the bug that `UNLOST_BREAK` names, and prints what the checks found:
the independent checker's anomalies, `audit` if the books do not balance, `halted` if a process stopped itself.
Every life is a forked child; it ends where the scene says, by SIGKILL, and the next one takes over.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checker import Contract, check
from evidence import Effect, Journal, read
from workload import SCHEMA, fork, note_named, value_of

import unlost.brokers.embedded.broker as broker_module
import unlost.delivery.worker as worker_module
import unlost.sqlite.file as file_module
import unlost.sqlite.process as process_module
import unlost.store.delayed as delayed_module
from unlost import App, Context, Event, Reject, Retry, Service, Topic
from unlost.events import seal
from unlost.ops import books as books_module
from unlost.ops import shelf
from unlost.ops.connect import opened
from unlost.sqlite.file import File
from unlost.sqlite.marks import Marks
from unlost.sqlite.transaction import Transaction
from unlost.sqlite.turn import Block
from unlost.store.records import FileRecords
from unlost.store.sqlite import SqliteStore
from unlost.testing import sabotage
from unlost.testing.powerloss import Disk

# how long a life waits for its end: with a planted bug it may never come, without one it comes soon
PATIENCE = 1.5 if os.environ.get(sabotage.VARIABLE) else 15.0
TOPICS = [Topic("main", partitions=1), Topic("next", partitions=1)]


class Ordered(Event, topic="main", key="account"):
    account: str
    uid: str
    value: int


class Shipped(Event, topic="next", key="account"):
    account: str
    uid: str
    value: int


class Scene:
    """A folder with a broker, evidence, and lives that follow one another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = f"embedded://{folder}/events.db"
        self.halted: list[str] = []
        self.found: set[str] = set()
        self.count = 0
        (folder / "evidence").mkdir(parents=True)
        (folder / "schema.sql").write_text(SCHEMA)
        self.log = os.open(folder / "stderr.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def begin(self, work: Callable[[Journal], None]) -> int:
        self.count += 1
        name = f"life-{self.count}"

        def life() -> None:
            worker_module.SHORT_WAIT_SECONDS = 0.25
            file_module._HOUSEKEEPING_SECONDS = 0.1
            process_module.HEARTBEAT_STALE_SECONDS = 1.0
            sabotage.from_environment()
            work(Journal(self.folder / "evidence", name))

        return fork(life, self.log)

    def end(self, pid: int) -> None:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code not in (0, -signal.SIGKILL):
            self.halted.append(f"a process ended with {code}")

    def life(self, work: Callable[[Journal], None]) -> None:
        self.end(self.begin(work))

    def app(self, *services: Service, **more: Any) -> App:
        return App(*services, broker=self.url, topics=TOPICS, schema=self.folder / "schema.sql", name="shop", **more)

    def publish(self, *uids: str) -> None:
        """In a life of its own, one after the other. A name is `account:number`."""

        async def work(journal: Journal) -> None:
            async with self.app() as app:
                for uid in uids:
                    event = ordered(uid)
                    journal.note("intend", uid, event.account, "", event.value)
                    await app.publish(event, id=uid)
                    journal.note("acked", uid, event.account)

        self.life(lambda journal: asyncio.run(work(journal)))

    def serve(self, until: Callable[[File], bool], *services: Service, clean: bool = False) -> None:
        """In this life: runs services until the condition holds or patience ends; then dies (or leaves cleanly)."""

        async def main() -> None:
            app = self.app(*services)
            async with app:
                task = asyncio.create_task(app.serve())
                end = time.monotonic() + PATIENCE
                while not task.done() and time.monotonic() < end and not until(app.file):
                    await asyncio.sleep(0.01)
                if not clean and not task.done():
                    os.kill(os.getpid(), signal.SIGKILL)
                app.stop()
                await task

        asyncio.run(main())

    def all_done(self, service: str, *uids: str) -> Callable[[File], bool]:
        """Whether our own evidence has a completion, or an effect, of each of these."""

        def holds(file: File) -> bool:
            done = {n.uid for n in read(self.folder / "evidence") if (n.what, n.service) == ("completed", service)}
            done |= {row[0] for row in file.read(lambda c: c.execute(EFFECTS_OF, (service,)).fetchall())}
            return done >= set(uids)

        return holds

    def operate(self, cure: Callable[[str], bool]) -> None:
        def work(journal: Journal) -> None:
            with opened(self.url) as looking:
                file = looking.file
                for letter in shelf.letters(FileRecords(file)):
                    data = json.loads(letter.data) if letter.reason != "undecodable" and letter.data else {}
                    uid = data.get("uid", letter.id)
                    key = (letter.key or b"").decode()
                    journal.note("shelved", uid, key, letter.service, data.get("value", value_of(uid)))
                    if cure(uid):
                        (self.folder / f"cured {uid}").touch()
                        shelf.ask(
                            FileRecords(file), "redrive", [letter], operator="ann", reason="cured", wait_seconds=0
                        )

        self.life(work)

    def verdict(self, *contracts: Contract) -> set[str]:
        """What the checker and the audit say, each in a process of its own."""

        def examine(_: Journal) -> None:
            with opened(self.url) as looking:
                file = looking.file
                books = books_module.books(FileRecords(file))
                if not books.balanced:
                    (self.folder / "audit-red").touch()
                note_named(books, looking.log, self.folder)
                rows = file.read(lambda c: c.execute(ALL_EFFECTS).fetchall())
            found = {a.kind for a in check(read(self.folder / "evidence"), [Effect(*row) for row in rows], contracts)}
            (self.folder / "found.json").write_text(json.dumps(sorted(found)))

        self.life(examine)
        found = set(json.loads((self.folder / "found.json").read_text()))
        return found | ({"audit"} if (self.folder / "audit-red").exists() else set())


EFFECTS_OF = "select uid from effect where service = ?"
ALL_EFFECTS = "select number, service, uid, account, value from effect order by number"
INSERT = "insert into effect (service, uid, account, value) values (?, ?, ?, ?)"


def ordered(uid: str) -> Ordered:
    return Ordered(account=uid.partition(":")[0], uid=uid, value=value_of(uid))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def names(account: str, count: int) -> list[str]:
    return [f"{account}:{n}" for n in range(count)]


# --- the scenes --------------------------------------------------------------------------------------------------


def killed_in_handler(scene: Scene) -> set[str]:
    """A handler's process dies in the middle of it, with events in its hands; the next process goes on."""
    uids = [*names("a", 5), *names("b", 5)]
    scene.publish(*uids)

    def life(journal: Journal, deadly: bool) -> None:
        bill = Service("bill", guarantee="effectively-once", concurrency=1)

        @bill.on(Ordered)
        async def handle(event: Ordered) -> None:
            if deadly and event.uid == "a:2":
                die()
            journal.note("completed", event.uid, event.account, "bill", event.value)

        scene.serve(scene.all_done("bill", *uids), bill)

    scene.life(lambda j: life(j, True))
    scene.life(lambda j: life(j, False))
    return scene.verdict(Contract(service="bill"))


def slow_head(scene: Scene) -> set[str]:
    """An event waits for its retry while others of its partition are settled; then the process dies."""
    uids = [*names("a", 1), *names("b", 4)]
    scene.publish(*uids)

    def life(journal: Journal, failing: bool) -> None:
        worker_module.SHORT_WAIT_SECONDS = 60.0
        bill = Service("bill", retry=Retry(first=30))

        @bill.on(Ordered)
        async def handle(event: Ordered) -> None:
            if failing and event.uid == "a:0":
                raise ConnectionError("not yet")
            journal.note("completed", event.uid, event.account, "bill", event.value)

        def others_settled(file: File) -> bool:
            return books_module.books(FileRecords(file)).services["bill"].done == 4

        scene.serve(others_settled if failing else scene.all_done("bill", *uids), bill)

    scene.life(lambda j: life(j, True))
    scene.life(lambda j: life(j, False))
    return scene.verdict(Contract(service="bill"))


def zombie(scene: Scene) -> set[str]:
    """A stopped owner is replaced, wakes up in the middle of its handler, and tries to commit."""
    scene.publish("a:0")

    def life(journal: Journal, me: str) -> None:
        bill = Service("bill")

        @bill.on(Ordered)
        async def handle(event: Ordered, ctx: Context) -> None:
            (scene.folder / f"{me} is in").touch()
            while not (scene.folder / f"{me} may go").exists():
                await asyncio.sleep(0.005)
            try:
                async with ctx.transaction() as db:
                    await db.execute(INSERT, ("bill", event.uid, event.account, event.value))
            finally:
                (scene.folder / f"{me} is out").touch()

        def settled(file: File) -> bool:
            return (scene.folder / f"{me} is out").exists() and books_module.books(FileRecords(file)).services[
                "bill"
            ].done == 1

        global PATIENCE
        PATIENCE = 10.0
        scene.serve(settled, bill, clean=me == "new")

    old = scene.begin(lambda j: life(j, "old"))
    wait_for(scene.folder / "old is in")
    os.kill(old, signal.SIGSTOP)
    new = scene.begin(lambda j: life(j, "new"))
    wait_for(scene.folder / "new is in")
    (scene.folder / "old may go").touch()
    os.kill(old, signal.SIGCONT)
    wait_for(scene.folder / "old is out")

    def look(_: Journal) -> None:
        with opened(scene.url) as looking:
            if looking.file.read(lambda c: c.execute(ALL_EFFECTS).fetchall()):
                (scene.folder / "stale").touch()

    scene.life(look)
    (scene.folder / "new may go").touch()
    scene.end(new)
    os.kill(old, signal.SIGKILL)
    scene.end(old)
    if (scene.folder / "stale").exists():
        scene.found.add("stale write")
    return scene.verdict(Contract(service="bill", once=True))


def wait_for(path: Path) -> None:
    end = time.monotonic() + 20
    while not path.exists():
        if time.monotonic() > end:
            raise TimeoutError(f"waited in vain for: {path.name}")
        time.sleep(0.005)


def dead_and_redriven(scene: Scene) -> set[str]:
    """An event is rejected, its followers wait; its process dies; it is cured and redriven; all are handled in order."""
    uids = names("a", 5)
    scene.publish(*uids)

    def life(journal: Journal, last: bool) -> None:
        bill = Service("bill")

        @bill.on(Ordered)
        async def handle(event: Ordered) -> None:
            if event.uid == "a:1" and not (scene.folder / "cured a:1").exists():
                raise Reject("not before it is cured")
            journal.note("completed", event.uid, event.account, "bill", event.value)

        def set_aside(file: File) -> bool:
            book = books_module.books(FileRecords(file)).services["bill"]
            return book.done == 1 and book.dead == 1 and book.parked == 3

        scene.serve(scene.all_done("bill", *uids) if last else set_aside, bill)

    scene.life(lambda j: life(j, False))
    scene.operate(lambda uid: True)
    scene.life(lambda j: life(j, True))
    return scene.verdict(Contract(service="bill"))


def troubles(scene: Scene) -> set[str]:
    """One handler hangs, one raises, one fails for longer, and some bytes are no event of the declared type."""
    uids = [*names("hang", 2), *names("raise", 3), *names("long", 3)]
    scene.publish(*uids)

    async def garbage(journal: Journal) -> None:
        async with scene.app() as app:
            sealed = seal(ordered("bad:0"), source="shop", id="bad:0", now=app.world.now())
            journal.note("intend", "bad:0", "bad", "", value_of("bad:0"))
            await app.accept(
                [type(sealed)(**{**{f: getattr(sealed, f) for f in sealed.__struct_fields__}, "data": b"{"})]
            )
            journal.note("acked", "bad:0", "bad")

    scene.life(lambda j: asyncio.run(garbage(j)))

    def life(journal: Journal) -> None:
        bill = Service("bill", deadline=0.1, retry=Retry(first=0.02, factor=1, jitter=0))
        tried: dict[str, int] = {}

        @bill.on(Ordered)
        async def handle(event: Ordered) -> None:
            tried[event.uid] = attempt = tried.get(event.uid, 0) + 1
            if event.uid == "hang:0" and attempt == 1:
                await asyncio.sleep(60)
            if event.uid == "raise:0" and attempt == 1:
                raise ConnectionError("once")
            if event.uid == "long:0" and attempt == 1:
                worker_module.SHORT_WAIT_SECONDS = 0.0  # from now on each wait is a long one
                raise ConnectionError("once")
            journal.note("completed", event.uid, event.account, "bill", event.value)

        scene.serve(scene.all_done("bill", *uids), bill, clean=True)

    scene.life(life)
    scene.operate(lambda uid: False)
    return scene.verdict(Contract(service="bill", expects=lambda uid: "shelf" if uid == "bad:0" else "done"))


def killed_after_commit(scene: Scene) -> set[str]:
    """The process dies right after the first commit that settles something. What was published must be in it."""
    uids = names("a", 3)
    scene.publish(*uids)

    def life(journal: Journal, deadly: bool) -> None:
        relay = Service("relay", guarantee="effectively-once", concurrency=1)
        ship = Service("ship", guarantee="effectively-once")
        if deadly:
            die_at_the_mark_after(SqliteStore, "settle_in")

        @relay.on(Ordered)
        async def handle(event: Ordered, ctx: Context) -> None:
            ctx.publish(Shipped(account=event.account, uid=event.uid, value=event.value))

        @ship.on(Shipped)
        async def take(event: Shipped, ctx: Context) -> None:
            async with ctx.transaction() as db:
                await db.execute(INSERT, ("ship", event.uid, event.account, event.value))

        scene.serve(scene.all_done("ship", *uids), relay, ship)

    scene.life(lambda j: life(j, True))
    scene.life(lambda j: life(j, False))
    return scene.verdict(Contract(service="ship", once=True))


def killed_after_block(scene: Scene) -> set[str]:
    """The process dies right after the commit of a handler's transaction, before anybody is told."""
    uids = names("a", 3)
    scene.publish(*uids)

    def life(journal: Journal, deadly: bool) -> None:
        bill = Service("bill", guarantee="effectively-once")
        if deadly:
            die_at_the_mark_after(Block, "finish")

        @bill.on(Ordered)
        async def handle(event: Ordered, ctx: Context) -> None:
            async with ctx.transaction() as db:
                await db.execute(INSERT, ("bill", event.uid, event.account, event.value))

        scene.serve(scene.all_done("bill", *uids), bill)

    scene.life(lambda j: life(j, True))
    scene.life(lambda j: life(j, False))
    return scene.verdict(Contract(service="bill", once=True))


def die_at_the_mark_after(owner: Any, name: str) -> None:
    """The mark is written when a commit is durable and before anybody is told of it."""
    original, mark = getattr(owner, name), Marks.write
    reached = threading.Event()

    def noted(*args: Any, **kwargs: Any) -> Any:
        reached.set()
        return original(*args, **kwargs)

    def write(self: Marks, commit: int) -> None:
        mark(self, commit)
        if reached.is_set():
            die()

    setattr(owner, name, noted)
    Marks.write = write  # type: ignore[method-assign]


def two_services(scene: Scene) -> set[str]:
    """Each of two services handles every event."""
    uids = names("a", 3)
    scene.publish(*uids)

    def life(journal: Journal) -> None:
        services = [Service("one", guarantee="effectively-once"), Service("two", guarantee="effectively-once")]
        for service in services:

            def register(service: Service) -> None:
                @service.on(Ordered)
                async def handle(event: Ordered) -> None:
                    journal.note("completed", event.uid, event.account, service.name, event.value)

            register(service)
        one, two = (scene.all_done(s.name, *uids) for s in services)
        scene.serve(one, services[0], clean=True)
        scene.serve(two, services[1], clean=True)

    scene.life(life)
    return scene.verdict(Contract(service="one"), Contract(service="two"))


def clean_stop(scene: Scene) -> set[str]:
    """A service is told to stop while it has events in its queues."""
    uids = [*names("a", 5), *names("b", 5)]
    scene.publish(*uids)

    def life(journal: Journal, slow: bool) -> None:
        bill = Service("bill", concurrency=1)
        begun = threading.Event()

        @bill.on(Ordered)
        async def handle(event: Ordered) -> None:
            begun.set()
            if slow:
                await asyncio.sleep(0.1)
            journal.note("completed", event.uid, event.account, "bill", event.value)

        scene.serve((lambda _: begun.is_set()) if slow else scene.all_done("bill", *uids), bill, clean=True)

    scene.life(lambda j: life(j, True))
    scene.life(lambda j: life(j, False))
    return scene.verdict(Contract(service="bill"))


def cut_off(scene: Scene) -> set[str]:
    """A handler that gets its events at most once takes its process down; the next one goes on behind what was begun."""
    uids = names("a", 30)
    scene.publish(*uids)

    def life(journal: Journal, deadly: bool) -> None:
        count = Service("count", guarantee="at-most-once")

        @count.on(Ordered)
        async def handle(event: Ordered) -> None:
            journal.note("completed", event.uid, event.account, "count", event.value)
            if deadly and event.uid == "a:3":
                die()

        scene.serve(all_behind, count)

    def all_behind(file: File) -> bool:
        sql = "select coalesce(sum(position), 0), coalesce(sum(length(begun)), 0) from unlost_progress"
        return bool(file.read(lambda c: c.execute(sql).fetchone()) == (len(uids), 0))

    scene.life(lambda j: life(j, True))
    scene.life(lambda j: life(j, False))
    return scene.verdict(Contract(service="count", expects=lambda uid: "named", at_most_once=True))


def later(scene: Scene) -> set[str]:
    """Events that leave later, and what their handler delays in turn; whoever releases them is killed in between."""
    uids = names("a", 5)

    async def publish(journal: Journal) -> None:
        async with scene.app() as app:
            for n, uid in enumerate(uids):
                event = ordered(uid)
                journal.note("intend", uid, event.account, "", event.value)
                await app.publish(event, id=uid, delay=0.05 * n)
                journal.note("acked", uid, event.account)

    scene.life(lambda journal: asyncio.run(publish(journal)))

    def life(journal: Journal, deadly: bool) -> None:
        bill, ship = Service("bill"), Service("ship")

        @bill.on(Ordered)
        async def handle(event: Ordered, ctx: Context) -> None:
            journal.note("completed", event.uid, event.account, "bill", event.value)
            ctx.publish(Shipped(account=event.account, uid=event.uid, value=event.value), delay=0.2)

        @ship.on(Shipped)
        async def send(event: Shipped) -> None:
            journal.note("completed", event.uid, event.account, "ship", event.value)

        if deadly:
            take_due = delayed_module.take_due

            def dying(steady: int, wall: int) -> Any:
                found = yield from take_due(steady, wall)
                if found:
                    die()
                return found

            delayed_module.take_due = dying
        scene.serve(scene.all_done("ship", *uids), bill, ship)

    scene.life(lambda j: life(j, True))
    scene.life(lambda j: life(j, False))
    once = [Contract(service=service, at_most_once=True) for service in ("bill", "ship")]
    return scene.verdict(*once)


def publisher_killed(scene: Scene) -> set[str]:
    """A publisher dies before the commit that holds its event; whatever it was told must be true."""
    scene.publish("a:0")

    def life(journal: Journal) -> None:
        flush = Transaction.flush
        acked = threading.Event()

        def dying(self: Transaction) -> None:
            if self._rows:
                acked.wait(0.5)  # time for a premature acknowledgement
                die()
            flush(self)

        async def work() -> None:
            async with scene.app() as app:
                Transaction.flush = dying  # type: ignore[method-assign]
                event = ordered("a:1")
                journal.note("intend", event.uid, event.account, "", event.value)
                await app.publish(event, id=event.uid)
                journal.note("acked", event.uid, event.account)
                acked.set()
                await asyncio.sleep(10)

        asyncio.run(work())

    scene.life(life)

    def serving(journal: Journal) -> None:
        bill = Service("bill")

        @bill.on(Ordered)
        async def handle(event: Ordered) -> None:
            journal.note("completed", event.uid, event.account, "bill", event.value)

        scene.serve(scene.all_done("bill", "a:0"), bill, clean=True)

    scene.life(serving)
    return scene.verdict(Contract(service="bill"))


def power_cut(scene: Scene) -> set[str]:
    """The power goes right after an acknowledgement."""

    def life(_: Journal) -> None:
        with Disk() as disk:
            file = disk.open(scene.folder / "disk" / "events.db")
            broker = broker_module.EmbeddedBroker(file)

            async def work() -> int:
                await broker.declare(TOPICS)
                for uid in names("a", 5):
                    await broker.publish([seal(ordered(uid), source="shop", id=uid, now=file.world.now())])
                return disk.mark()

            acknowledged = asyncio.run(work())
            lost = 0
            for seed in range(12):
                survivor = disk.materialise(acknowledged, seed=seed, folder=scene.folder / f"after-{seed}")
                try:
                    again = File(survivor)
                    lost += again.read(lambda c: c.execute("select count(*) from unlost_log").fetchone()[0]) != 5
                    again.close()
                except Exception:
                    lost += 1
            file.close()
            if lost:
                (scene.folder / "power").touch()

    scene.life(life)
    return {"power loss"} if (scene.folder / "power").exists() else set()


SCENES: dict[str, Callable[[Scene], set[str]]] = {
    scene.__name__.replace("_", "-"): scene
    for scene in (
        killed_in_handler,
        slow_head,
        zombie,
        dead_and_redriven,
        troubles,
        killed_after_commit,
        killed_after_block,
        two_services,
        clean_stop,
        cut_off,
        later,
        publisher_killed,
        power_cut,
    )
}


def main() -> int:
    name, folder = sys.argv[1], Path(sys.argv[2])
    scene = Scene(folder)
    found = SCENES[name](scene) | scene.found | ({"halted"} if scene.halted else set())
    print(json.dumps(sorted(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
