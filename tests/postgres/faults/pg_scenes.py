"""Short, repeatable scenes on PostgreSQL: each ends at one exact line or statement, not at a random moment.

A scene plays on a real server with child processes, and returns the names of what is wrong: those of the checker,
`audit`, and checks of its own. With no planted bug that is nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest
from evidence import Journal
from patience import Patience
from pg_checker import CREATED, PLACED, SERVICES, kinds
from pg_loop import SERVER, hurry
from pg_shop import INSERT, TOPICS, Meant, chosen, make_services, place, row
from pg_stage import Child, Machine, Stage, stopped
from psycopg import IsolationLevel

import unlost.brokers.embedded.broker as broker_module
import unlost.store.postgres.client as client_module
import unlost.store.postgres.outbox as outbox_module
import unlost.store.postgres.store as store_module
from servers.fixtures import require_postgres
from servers.postgres import Postgres, via
from servers.wire import Wire
from unlost import App, Context, Event, Retry, RetryLater, Service
from unlost.brokers.embedded.broker import EmbeddedBroker
from unlost.demo.orders import Order
from unlost.demo.shop import OrderCreated, PaymentCompleted
from unlost.store.postgres import rows
from unlost.store.postgres.blocks import LentBlock, SyncLentBlock
from unlost.store.postgres.client import Client
from unlost.store.postgres.outbox import PostgresOutbox
from unlost.store.postgres.store import PostgresStore
from unlost.store.session_blocks import SessionBlock, SyncSessionBlock
from unlost.store.sessions.with_psycopg import AsyncPsycopg, Psycopg

HUNG = 1.0
PAIR = ("order", "payment")


# --- in the children ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trap:
    """A line of a child where it ends itself, or waits until it may go on."""

    at: str  # "Class.function", or "sql …": the first statement in which this is found
    when: str = "before"
    act: str = "die"  # or "wait"
    inside: str = ""  # only while this function runs
    nth: int = 1
    label: str = ""  # tells several of one life apart


PLACES = {
    f"{owner.__name__}.{name}": (owner, name)
    for owner, name in (
        (EmbeddedBroker, "publish"),
        (Client, "commit"),
        (PostgresStore, "settle"),
        (PostgresStore, "held"),
        (PostgresOutbox, "claim"),
        (PostgresOutbox, "next"),
        (LentBlock, "_finish"),
        (LentBlock, "_leave"),
        (SyncLentBlock, "finish"),
        (SessionBlock, "_finish"),
        (SyncSessionBlock, "finish"),
        (AsyncPsycopg, "commit"),
        (Psycopg, "commit"),
    )
}
_inside: ContextVar[tuple[str, ...]] = ContextVar("inside", default=())


@dataclass
class Life:
    """What one child process is to be."""

    folder: Path
    name: str
    machine: Machine
    services: tuple[str, ...] = PAIR
    traps: tuple[Trap, ...] = ()
    hung: float = HUNG
    kind: str = ""  # another handler than the shop's, see `_special`
    about: str = ""  # the order that it is about
    attempts: int = 3
    idle: float = 10.0  # how long a process may stand still inside a commit
    fate: float = 60.0  # how long it is asked what became of a commit; nothing of ours waits longer for a connection
    beats: float = 0.3  # seconds between two signs of life
    limit: int = 0  # a broker that takes no larger events, until the file "healed" is there
    deaf: bool = False  # nobody calls the relays
    more: dict[str, Any] = field(default_factory=dict)

    def file(self, what: str) -> Path:
        return self.folder / f"{self.name} {what}"


class Calm(random.Random):
    """Handlers that stumble by chance do not stumble here."""

    def random(self) -> float:
        return 0.99


def live(life: Life) -> None:
    """Serves until SIGTERM."""
    _prepare(life)
    journal = Journal(life.folder / "evidence", f"{life.name}-{os.getpid()}")
    made = {s.name: s for s in make_services(journal, Calm(), life.machine.dsn, **life.more)}
    if life.kind:
        special = SPECIAL[life.kind](life)
        made[special.name] = special
    App(*(made[name] for name in life.services), topics=TOPICS).run()


def _prepare(life: Life) -> None:
    hurry(life.hung)
    client_module.IDLE_SECONDS = life.idle
    client_module.FATE_SECONDS = life.fate
    client_module.OWN_SECONDS = min(client_module.OWN_SECONDS, life.fate)
    store_module.HEARTBEAT_SECONDS = life.beats
    outbox_module.CLAIM_SECONDS = life.beats
    for trap in life.traps:
        _set(life, trap)
    if life.limit:
        _limit(life)
    if life.deaf:
        _replace(Client, "notify", lambda _: _nothing)


async def _nothing(*_: Any) -> None:
    return None


def placing(life: Life, groups: Sequence[Sequence[Order]], mishap: str) -> None:
    """Each group in a transaction of its own."""
    _prepare(life)
    app = App(name="web", topics=TOPICS)
    with contextlib.closing(psycopg.connect(life.machine.dsn, autocommit=True)) as connection:
        for orders in groups:
            try:
                place(app, connection, orders, mishap)
            except Meant:
                pass
    if life.kind == "dies":
        die()


def placing_late(life: Life, orders: Sequence[Order], commits: bool) -> None:
    """A transaction that stays open until it may end."""
    _prepare(life)
    app = App(name="web", topics=TOPICS)
    with psycopg.connect(life.machine.dsn) as connection:
        try:
            with connection.transaction():
                place(app, connection, orders)
                life.file("is open").touch()
                _wait_for(life.file("may end"))
                if not commits:
                    raise Meant
        except Meant:
            pass


def placing_essay(life: Life, order: Order, both: bool = True) -> None:
    """In one transaction: an event that is too large for the broker, and perhaps an order of the same customer."""
    _prepare(life)
    app = App(name="web", topics=TOPICS)
    with psycopg.connect(life.machine.dsn) as connection, connection.transaction():
        with app.outbox(connection) as outbox:
            outbox.publish(EssayWritten(customer_id=order.customer_id, order_id=f"{order.id}-essay", text="x" * 5000))
        if both:
            place(app, connection, [order])


class EssayWritten(Event, topic="shop", key="customer_id"):
    customer_id: str
    order_id: str
    text: str


# --- handlers of another kind


def _kills(life: Life) -> Service:
    """One event takes its process down, every time."""
    payment = Service(
        "payment", guarantee="effectively-once", on_dead="skip", retry=Retry(attempts=life.attempts, first=0.01)
    )

    @payment.on(OrderCreated)
    async def pay(created: OrderCreated, ctx: Context) -> None:
        if created.order_id == life.about:
            with life.file("deaths").open("a") as f:
                f.write(f"{os.getpid()}\n")
            os._exit(9)
        async with ctx.transaction() as db:
            await db.execute(INSERT.replace("%s", "?"), row("payment", created, created.total_cents))

    return payment


def _conflicts(life: Life) -> Service:
    """The transaction of one event cannot be serialized: what it has read is changed before it writes, more often than the
    event has attempts."""
    settlement = Service("settlement", guarantee="effectively-once", retry=Retry(attempts=life.attempts, first=0.01))
    left = [life.attempts + 2]

    @settlement.on(PaymentCompleted)
    async def settle(completed: PaymentCompleted, ctx: Context) -> None:
        async with await psycopg.AsyncConnection.connect(life.machine.dsn) as connection:
            await connection.set_isolation_level(IsolationLevel.SERIALIZABLE)
            async with ctx.transaction(connection):
                await connection.execute("select moved from till where id = 0")
                if completed.order_id == life.about and left[0]:
                    left[0] -= 1
                    await _move_the_till(life)
                    with life.file("conflicts").open("a") as f:
                        f.write("x")
                await connection.execute("update till set moved = moved + 1 where id = 0")
                await connection.execute(INSERT, row("settlement", completed, completed.amount_cents))

    return settlement


async def _move_the_till(life: Life) -> None:
    async with await psycopg.AsyncConnection.connect(life.machine.dsn, autocommit=True) as other:
        await other.execute("update till set moved = moved + 0 where id = 0")


def _deadlocks(life: Life) -> Service:
    """One event's transaction meets another one that holds what it wants and wants what it holds, more often than the
    event has attempts; and it is always the victim."""
    stock = Service("stock", guarantee="effectively-once", retry=Retry(attempts=life.attempts, first=0.01))
    left = [life.attempts + 2]

    @stock.on(PaymentCompleted)
    def move(completed: PaymentCompleted, ctx: Context) -> None:
        with psycopg.connect(life.machine.dsn) as connection, ctx.transaction(connection):
            if completed.order_id == life.about and left[0]:
                left[0] -= 1
                _lock_each_other_out(life, connection)
            for till in (0, 1) if completed.order_id == life.about else (2, 3):
                connection.execute("update till set moved = moved + 1 where id = %s", (till,))
            connection.execute(INSERT, row("stock", completed, completed.amount_cents))

    return stock


def _lock_each_other_out(life: Life, connection: psycopg.Connection[Any]) -> None:
    with psycopg.connect(life.machine.dsn) as other:
        other.execute("set deadlock_timeout = '60s'")  # whoever looks first is the victim
        other.execute("update till set moved = moved where id = 1")
        connection.execute("update till set moved = moved where id = 0")
        thread = threading.Thread(target=lambda: other.execute("update till set moved = moved where id = 0"))
        thread.start()
        try:
            connection.execute("update till set moved = moved where id = 1")
        finally:
            with life.file("conflicts").open("a") as f:
                f.write("x")
            thread.join(30)
            other.rollback()


def _gated(life: Life, service: str, run: Callable[[Service], None]) -> Service:
    made = Service(service, guarantee="effectively-once", retry=Retry(attempts=10_000, first=0.01, factor=1))
    run(made)
    return made


def _gate(life: Life) -> None:
    life.file("is in").touch()
    _wait_for(life.file("may go"))


async def _gate_async(life: Life) -> None:
    life.file("is in").touch()
    while not life.file("may go").exists():
        await asyncio.sleep(0.01)


def _zombie_lent(life: Life) -> Service:
    def run(payment: Service) -> None:
        @payment.on(OrderCreated)
        async def pay(created: OrderCreated, ctx: Context) -> None:
            await _gate_async(life)
            try:
                async with ctx.transaction() as db:
                    await db.execute(INSERT.replace("%s", "?"), row("payment", created, created.total_cents))
            finally:
                life.file("is out").touch()

    return _gated(life, "payment", run)


def _zombie_in_block(life: Life) -> Service:
    """It stands still inside of its transaction."""

    def run(payment: Service) -> None:
        @payment.on(OrderCreated)
        async def pay(created: OrderCreated, ctx: Context) -> None:
            try:
                async with ctx.transaction() as db:
                    await _gate_async(life)
                    await db.execute(INSERT.replace("%s", "?"), row("payment", created, created.total_cents))
            finally:
                life.file("is out").touch()

    return _gated(life, "payment", run)


def _zombie_thread(life: Life) -> Service:
    def run(invoice: Service) -> None:
        @invoice.on(OrderCreated)
        def bill(created: OrderCreated, ctx: Context) -> None:
            _gate(life)
            try:
                with ctx.transaction() as db:
                    db.execute(INSERT.replace("%s", "?"), row("invoice", created, created.total_cents))
            finally:
                life.file("is out").touch()

    return _gated(life, "invoice", run)


def _zombie_session(life: Life) -> Service:
    def run(payment: Service) -> None:
        @payment.on(OrderCreated)
        async def pay(created: OrderCreated, ctx: Context) -> None:
            async with await psycopg.AsyncConnection.connect(life.machine.dsn) as connection:
                try:
                    async with ctx.transaction(connection):
                        await _gate_async(life)
                        await connection.execute(INSERT, row("payment", created, created.total_cents))
                finally:
                    life.file("is out").touch()

    return _gated(life, "payment", run)


def _waits(life: Life) -> Service:
    """One event must wait for a second: it goes into the waiting room."""
    payment = Service("payment", guarantee="effectively-once", retry=Retry(attempts=life.attempts, first=0.01))

    @payment.on(OrderCreated)
    async def pay(created: OrderCreated, ctx: Context) -> None:
        if created.order_id == life.about and not life.file("is there").exists():
            life.file("is there").touch()
            raise RetryLater("not now", after=2.0)
        async with ctx.transaction() as db:
            await db.execute(INSERT.replace("%s", "?"), row("payment", created, created.total_cents))

    return payment


SPECIAL: dict[str, Callable[[Life], Service]] = {
    "kills": _kills,
    "conflicts": _conflicts,
    "deadlocks": _deadlocks,
    "waits": _waits,
    "zombie lent": _zombie_lent,
    "zombie in block": _zombie_in_block,
    "zombie thread": _zombie_thread,
    "zombie session": _zombie_session,
}


# --- traps


def _replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    setattr(owner, name, make(getattr(owner, name)))


def _set(life: Life, trap: Trap) -> None:
    if trap.inside:
        _note_inside(trap.inside)
    left = [trap.nth]

    def sprung(args: Sequence[Any]) -> bool:
        if trap.at.startswith("sql ") and not re.search(trap.at[4:], str(args[1]), re.IGNORECASE):
            return False
        if trap.inside and trap.inside not in _inside.get():
            return False
        left[0] -= 1
        return left[0] == 0

    if trap.at.startswith("sql "):
        _spring(life, trap, psycopg.AsyncCursor, "execute", sprung)
        _spring(life, trap, psycopg.Cursor, "execute", sprung)
    else:
        _spring(life, trap, *PLACES[trap.at], sprung)


def _spring(life: Life, trap: Trap, owner: Any, name: str, sprung: Callable[[Sequence[Any]], bool]) -> None:
    original = getattr(owner, name)

    there, may_go = (life.file(f"{trap.label} {what}".strip()) for what in ("is there", "may go"))

    def reach() -> None:
        there.touch()
        if trap.act == "die":
            die()

    async def replaced_async(*args: Any, **more: Any) -> Any:
        hit = sprung(args)
        if hit and trap.when == "before":
            reach()
            while not may_go.exists():
                await asyncio.sleep(0.005)
        result = await original(*args, **more)
        if hit and trap.when == "after":
            reach()
            while not may_go.exists():
                await asyncio.sleep(0.005)
        return result

    def replaced(*args: Any, **more: Any) -> Any:
        hit = sprung(args)
        if hit and trap.when == "before":
            reach()
            _wait_for(may_go)
        result = original(*args, **more)
        if hit and trap.when == "after":
            reach()
            _wait_for(may_go)
        return result

    setattr(owner, name, replaced_async if asyncio.iscoroutinefunction(original) else replaced)


def _note_inside(label: str) -> None:
    owner, name = PLACES[label]
    original = getattr(owner, name)

    async def noted_async(*args: Any, **more: Any) -> Any:
        token = _inside.set((*_inside.get(), label))
        try:
            return await original(*args, **more)
        finally:
            _inside.reset(token)

    def noted(*args: Any, **more: Any) -> Any:
        token = _inside.set((*_inside.get(), label))
        try:
            return original(*args, **more)
        finally:
            _inside.reset(token)

    setattr(owner, name, noted_async if asyncio.iscoroutinefunction(original) else noted)


def _limit(life: Life) -> None:
    """A fake: the embedded broker takes what every other can take, and this one less."""
    healed, most = life.folder / "healed", broker_module.MAX_EVENT_BYTES
    publish = EmbeddedBroker.publish

    async def limited(self: EmbeddedBroker, envelopes: Any) -> Any:
        broker_module.MAX_EVENT_BYTES = most if healed.exists() else life.limit
        return await publish(self, envelopes)

    EmbeddedBroker.publish = limited  # type: ignore[method-assign]


def _wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.005)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


# --- the director's tools ------------------------------------------------------------------------------------------------


def some(customers: int, orders: int) -> list[Order]:
    """The first orders of some customers, all to be paid, each customer's after the other."""
    by_customer: dict[str, list[Order]] = {}
    for order in chosen(400):
        by_customer.setdefault(order.customer_id, []).append(order)
    whole = [found[:orders] for found in by_customer.values() if len(found) >= orders and all(o.cents for o in found)]
    return [order for found in whole[:customers] for order in found]


def neighbours() -> tuple[Order, Order]:
    """Orders of two customers whose events are in the same part of the outbox."""
    firsts = some(60, 1)
    shard = {order.id: rows.shard_of("shop", order.customer_id.encode(), "") for order in firsts}
    return next((a, b) for a in firsts for b in firsts if a.id < b.id and shard[a.id] == shard[b.id])


class Scene(Stage):
    """A stage on which one scene is played, perhaps with a planted bug in its children."""

    def __init__(self, folder: Path, postgres: Postgres, bug: str | None = None, **more: Any) -> None:
        super().__init__(folder, postgres.fresh(), bug=bug or "", **more)
        self.postgres = postgres
        self.found: set[str] = set()
        self._patience = Patience(self._marks, hurried=bool(bug))

    def life(self, name: str, *, machine: Machine | None = None, **more: Any) -> tuple[Child, Life]:
        life = Life(self.folder, name, machine or self.machine(), **more)
        self._patience.begin()
        return self.begin(name, life.machine, live, life), life

    def place(self, groups: Sequence[Sequence[Order]] | Sequence[Order], mishap: str = "", **more: Any) -> int:
        """In a life of its own; without groups each order is a transaction."""
        transactions = [[g] if isinstance(g, Order) else list(g) for g in groups]
        life = Life(self.folder, f"web-{len(self.children)}", more.pop("machine", None) or self.machine(), **more)
        return self.begin(life.name, life.machine, placing, life, transactions, mishap).wait()

    def soon(self, holds: Callable[[], Any]) -> bool:
        """Waits for a condition that a planted bug may prevent."""
        return self._patience.soon(holds)

    def _marks(self) -> tuple[int, ...]:
        """They change with whatever a child says, notes, reaches or does."""
        notes = [path.stat().st_size for path in sorted(self.evidence.iterdir())]
        return (*notes, len(list(self.folder.iterdir())), self.said().count("unlost: "), len(self.effects()))

    def reached(self, life: Life, what: str = "is there") -> bool:
        if self.soon(life.file(what).exists):
            return True
        self.found.add("not reached")
        return False

    def started(self, count: int) -> None:
        """So many processes have begun to serve."""
        self.until(lambda: self.said().count("unlost: ") >= count, what="their start")

    def quiet(self, open_: int) -> None:
        """Until nothing is under way but what a trap holds up, which are so many open transactions: whoever is stopped in
        the middle of a commit of the broker's file holds everybody up."""
        end = time.monotonic() + (10 if self.bug else 40)
        since, before = time.monotonic(), None
        while time.monotonic() - since < 0.3:
            busy = self.sql(
                "select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid() "
                "and state <> 'idle'"
            )
            now = (busy == [(open_,)], [path.stat().st_mtime_ns for path in self.folder.glob("events.db-wal")])
            if now != before or not now[0]:
                since, before = time.monotonic(), now
            if time.monotonic() > end:
                self.found.add("never quiet")
                return
            time.sleep(0.02)

    def held(self) -> list[tuple[Any, ...]]:
        """The transaction that a trap holds up: the oldest, when it has been quiet; others come and go beside it."""
        return self.sql(
            "select pid, xact_start from pg_stat_activity where state = 'idle in transaction' "
            "and datname = current_database() order by xact_start limit 1"
        )

    @contextlib.contextmanager
    def asleep(self, child: Child, *, open_: int) -> Iterator[None]:
        """SIGSTOP for the time of the block, at a quiet moment."""
        self.quiet(open_)
        with stopped(child):
            yield

    def done(self, orders: Sequence[Order], *services: str) -> bool:
        """Whether each order has had its effect in each of these services."""
        wanted = {(service, order.id) for service in services for order in orders}
        return self.soon(lambda: {(e.service, e.order_id) for e in self.effects()} >= wanted)

    def settled(self) -> bool:
        if self.soon(lambda: not self.open_work()):
            return True
        self.found.add("unsettled")
        return False

    def finish(self, *children: Child) -> None:
        """They must leave cleanly."""
        for child in children:
            try:
                code = child.end(15 if self.bug else 60)
            except TimeoutError:
                child.kill()
                code = child.code or 0
            if code not in (0, -signal.SIGTERM, 128 + signal.SIGTERM):  # before it began to serve
                self.found.add("ended badly")
                with self.log.open("a") as log:
                    log.write(f"{child.name} ended with {code}\n")

    def refused(self, child: Child, code: str) -> None:
        """The child must end by itself and say why."""
        if not self.soon(lambda: child.code is not None):
            self.found.add("not refused")
        elif child.code == 0 or code not in self.said():
            self.found.add("refused without its reason")

    def judge(self, orders: Sequence[Order], *services: str, **more: Any) -> set[str]:
        chosen_services = [name for name in services if name in SERVICES]
        lines = self.verdict(orders, chosen_services, **more)
        self.found |= kinds(lines)
        (self.folder / "verdict.txt").write_text("\n".join(lines))
        return self.found

    def placed_in_log(self) -> list[str]:
        """The orders in the sequence of the log, with repeats."""
        return [e.data["order_id"] for e in self.logged() if e.name == PLACED]

    def repeats(self) -> int:
        log = self.logged()
        return len(log) - len({e.id for e in log})


# --- scenes: the web's transactions ----------------------------------------------------------------------------------------


def commit_out_of_order(scene: Scene) -> set[str]:
    """A transaction takes its number first and commits last; what came after it was sent long ago."""
    early, late = neighbours()
    life = Life(scene.folder, "late", scene.machine())
    web = scene.begin("late", life.machine, placing_late, life, [early], True)
    scene.until(life.file("is open").exists)
    one, _ = scene.life("one")
    scene.place([late])
    scene.done([late], "payment")
    scene.settled()
    life.file("may end").touch()
    web.wait()
    scene.done([early], "payment")
    scene.settled()
    scene.finish(one)
    return scene.judge([early, late], *PAIR)


def rolled_back(scene: Scene) -> set[str]:
    """Transactions that are rolled back whole, or to a savepoint, or whose process dies before their commit."""
    orders = some(3, 3)
    one, _ = scene.life("one")
    scene.place(orders[:3], "rolled back")
    scene.place(orders[3:6], "savepoint")
    life = Life(scene.folder, "late", scene.machine())
    web = scene.begin("late", life.machine, placing_late, life, [orders[6]], True)
    scene.until(life.file("is open").exists)
    web.kill()
    scene.place(orders)
    scene.done(orders, "payment")
    scene.settled()
    scene.finish(one)
    return scene.judge(orders, *PAIR)


def web_is_killed_after_its_commit(scene: Scene) -> set[str]:
    """Data and events are one commit: a process that dies right after it owes nothing."""
    orders = some(2, 2)
    if scene.place(orders, kind="dies") != -signal.SIGKILL:
        scene.found.add("not killed")
    one, _ = scene.life("one")
    scene.done(orders, "payment")
    scene.settled()
    scene.finish(one)
    return scene.judge(orders, *PAIR)


def long_transactions(scene: Scene) -> set[str]:
    """Beside everything stand transactions with old numbers, old snapshots and rows of the outbox: what commits after them
    does not wait for them."""
    orders = some(4, 2)
    held, never = orders[-1], some(5, 1)[-1]
    lives = [Life(scene.folder, f"late-{n}", scene.machine()) for n in range(2)]
    webs = [
        scene.begin(life.name, life.machine, placing_late, life, [order], commits)
        for life, order, commits in zip(lives, (held, never), (True, False), strict=True)
    ]
    for life in lives:
        scene.until(life.file("is open").exists)
    with psycopg.connect(scene.dsn) as old:
        old.isolation_level = IsolationLevel.REPEATABLE_READ
        old.execute("select pg_current_xact_id(), count(*) from unlost.unlost_outbox")
        one, _ = scene.life("one")
        scene.place(orders[:-1])
        if not scene.done(orders[:-1], "payment"):
            scene.found.add("held up")
        for life in lives:
            life.file("may end").touch()
        for web in webs:
            web.wait()
        scene.done([held], "payment")
        scene.settled()
        scene.finish(one)
    return scene.judge(orders, *PAIR)


# --- scenes: relays ----------------------------------------------------------------------------------------------------------


def relay_dies_before_sending(scene: Scene) -> set[str]:
    """It has claimed rows, and dies at the broker's door."""
    orders = some(4, 2)
    scene.place(orders)
    one, life = scene.life("one", traps=(Trap("EmbeddedBroker.publish"),))
    scene.reached(life)
    one.wait()
    two, _ = scene.life("two")
    scene.done(orders, "payment")
    scene.settled()
    scene.finish(two)
    return scene.judge(orders, *PAIR)


def relay_dies_after_sending(scene: Scene) -> set[str]:
    """The broker has the events, the outbox does not know. They are sent again, and have no effect again. Whatever was
    sent had been noted as in the relay's hands before."""
    orders = some(4, 2)
    scene.place(orders)
    one, life = scene.life("one", traps=(Trap("EmbeddedBroker.publish", "after"),))
    scene.reached(life)
    one.wait()
    in_log = {e.id for e in scene.logged()}
    unclaimed = scene.sql(
        "select o.id from unlost.unlost_outbox o left join unlost.unlost_outbox_status s on s.seq = o.seq where s.seq is null"
    )
    if in_log & {id for (id,) in unclaimed}:
        scene.found.add("unclaimed")
    two, _ = scene.life("two")
    scene.done(orders, "payment")
    scene.settled()
    if not scene.repeats():
        scene.found.add("nothing was sent again")
    scene.finish(two)
    return scene.judge(orders, *PAIR)


def relay_sleeps_with_events_in_hand(scene: Scene) -> set[str]:
    """It stands still for longer than its lease, with a batch on its way to the broker; another one takes its place and
    goes on. When it wakes up it sends the batch once more: the log repeats, and no first occurrence is out of order."""
    orders = some(3, 4)
    scene.place(orders[::4] + orders[1::4])
    one, life = scene.life("one", traps=(Trap("EmbeddedBroker.publish", act="wait"),))
    scene.reached(life)
    with scene.asleep(one, open_=0):
        two, _ = scene.life("two")
        scene.place(orders[2::4])
        if not scene.done(orders[::4] + orders[1::4] + orders[2::4], "payment"):
            scene.found.add("not replaced")
        life.file("may go").touch()
    scene.place(orders[3::4])
    scene.done(orders, "payment")
    scene.settled()
    if not scene.repeats():
        scene.found.add("nothing was sent again")
    scene.finish(one, two)
    return scene.judge(orders, *PAIR)


def relay_sleeps_before_confirming(scene: Scene) -> set[str]:
    """It stands still in the commit that takes out what it has sent and claims the next, before it looks at its epoch."""
    orders = some(4, 2)
    scene.place(orders[::2])
    one, life = scene.life("one", traps=(Trap("sql select shard, process, epoch from", act="wait", nth=2),), idle=60.0)
    scene.reached(life)
    with scene.asleep(one, open_=1):
        two, _ = scene.life("two")
        scene.place(orders[1::2])
        if not scene.done(orders, "payment"):
            scene.found.add("not replaced")
        life.file("may go").touch()
    scene.settled()
    time.sleep(0.5)  # for what must not come
    scene.finish(one, two)
    return scene.judge(orders, *PAIR)


def relay_sleeps_inside_its_commit(scene: Scene) -> set[str]:
    """It stands still with the rows of all relays locked: the others must not wait until it wakes up."""
    orders = some(4, 2)
    one, life = scene.life(
        "one", traps=(Trap("sql from .*unlost_relay r order by r.shard for update", "after", "wait", nth=3),), idle=1.0
    )
    scene.reached(life)
    with scene.asleep(one, open_=1):
        two, _ = scene.life("two")
        scene.place(orders)
        if not scene.done(orders, "payment"):
            scene.found.add("held up")
        life.file("may go").touch()
    scene.settled()
    scene.finish(one, two)
    return scene.judge(orders, *PAIR)


def relay_is_refused_a_row(scene: Scene) -> set[str]:
    """An event is too large for the broker: it stays, and holds its own key and no other. When the broker takes it, what
    was behind it follows in order."""
    orders = some(4, 3)
    held, free = orders[:3], orders[3:]
    one, _ = scene.life("one", limit=1000)
    writing = Life(scene.folder, "essay", scene.machine())
    scene.begin("essay", writing.machine, placing_essay, writing, held[0]).wait()
    scene.place([*held[1:], *free])
    if not scene.done(free, "payment"):
        scene.found.add("held up")
    if set(scene.placed_in_log()) & {order.id for order in held}:
        scene.found.add("overtaken")
    (scene.folder / "healed").touch()
    scene.done(orders, "payment")
    scene.settled()
    mine = [
        e.data["order_id"]
        for e in scene.logged()
        if e.key == held[0].customer_id.encode() and e.name in (PLACED, "EssayWritten")
    ]
    if mine != [f"{held[0].id}-essay", *(order.id for order in held)]:
        scene.found.add("inversion")
    scene.finish(one)
    return scene.judge(orders, *PAIR)


def rows_wait_for_a_relay(scene: Scene) -> set[str]:
    """Nobody sends for a while; what is old is no less owed."""
    orders = some(4, 2)
    scene.place(orders)
    one, life = scene.life("one", traps=(Trap("EmbeddedBroker.publish", act="wait"),))
    scene.reached(life)
    time.sleep(2.0)
    life.file("may go").touch()
    scene.done(orders, "payment")
    scene.settled()
    scene.finish(one)
    return scene.judge(orders, *PAIR)


def nobody_calls_the_relays(scene: Scene) -> set[str]:
    """No NOTIFY arrives: they look by themselves."""
    orders = some(4, 3)
    one, _ = scene.life("one", deaf=True)
    scene.place(orders, deaf=True)
    scene.done(orders, "payment")
    scene.settled()
    scene.finish(one)
    return scene.judge(orders, *PAIR)


# --- scenes: handlers and settling ---------------------------------------------------------------------------------------------


def handler_dies_before_its_commit(scene: Scene) -> set[str]:
    """Everything of a handler's transaction was written, and nothing was committed: lent and own, async and in threads."""
    return _dies_at_the_commit(scene, "before")


def handler_dies_after_its_commit(scene: Scene) -> set[str]:
    """Rows, mark and events are durable, the position is not: the event comes again, and has no effect again."""
    return _dies_at_the_commit(scene, "after")


def _dies_at_the_commit(scene: Scene, when: str) -> set[str]:
    before = when == "before"  # a lent connection sends its last statement and the commit in one trip
    traps = {
        "payment": Trap("sql ^commit$" if before else "LentBlock._leave", inside="LentBlock._finish"),
        "invoice": Trap("sql ^commit$", when, inside="SyncLentBlock.finish"),
        "settlement": Trap("AsyncPsycopg.commit", when, inside="SessionBlock._finish"),
        "stock": Trap("Psycopg.commit", when, inside="SyncSessionBlock.finish"),
    }
    orders = some(2, 2)
    scene.place(orders)
    first, _ = scene.life(
        "first", services=("order",)
    )  # and sends all of it: a second copy could stand in for what is lost
    scene.settled()
    scene.finish(first)
    for name, trap in traps.items():
        child, life = scene.life(f"dying-{name}", services=(name,), traps=(trap,))
        if scene.reached(life):
            child.wait()
        child.kill()
        if name == "payment":  # what comes after it needs what it publishes
            calm, _ = scene.life("calm", services=PAIR)
            scene.done(orders, "payment")
            scene.settled()
            scene.finish(calm)
    last, _ = scene.life("last", services=("order", *traps))
    scene.done(orders, *traps)
    scene.settled()
    scene.finish(last)
    return scene.judge(orders, "order", *traps)


def settler_dies_after_its_commit(scene: Scene) -> set[str]:
    """The first commit that settles something is durable, and the process dies. What was published must be in it."""
    orders = some(2, 2)
    scene.place(orders)
    trap = Trap("Client.commit", "after", inside="PostgresStore.settle")
    one, life = scene.life("one", services=("order",), traps=(trap,))
    scene.reached(life)
    one.wait()
    two, _ = scene.life("two")
    scene.done(orders, "payment")
    scene.settled()
    scene.finish(two)
    return scene.judge(orders, *PAIR)


def killed_in_handler(scene: Scene) -> set[str]:
    """A process dies in the middle of a handler, with its transaction open."""
    orders = some(2, 2)
    scene.place(orders)
    one, life = scene.life("one", kind="zombie in block")
    scene.reached(life, "is in")
    one.kill()
    two, _ = scene.life("two")
    scene.done(orders, "payment")
    scene.settled()
    scene.finish(two)
    return scene.judge(orders, *PAIR)


def two_services(scene: Scene) -> set[str]:
    """Each of two services handles every event, in its own process."""
    orders = some(3, 2)
    scene.place(orders)
    one, _ = scene.life("one", services=PAIR)
    scene.done(orders, "payment")
    scene.settled()
    two, _ = scene.life("two", services=("order", "invoice"))
    scene.done(orders, "invoice")
    scene.settled()
    scene.finish(one, two)
    return scene.judge(orders, *PAIR, "invoice")


def zombie_before_its_transaction(scene: Scene) -> set[str]:
    """A stopped owner is replaced, wakes up in its handler, and begins its transaction."""
    return _zombie(scene, "zombie lent", open_=0)


def zombie_inside_its_transaction(scene: Scene) -> set[str]:
    """The same with a transaction that was open before it fell asleep."""
    return _zombie(scene, "zombie in block", open_=1)


def zombie_in_a_thread(scene: Scene) -> set[str]:
    return _zombie(scene, "zombie thread", open_=0)


def zombie_with_a_session_of_its_own(scene: Scene) -> set[str]:
    return _zombie(scene, "zombie session", open_=1)


def _zombie(scene: Scene, kind: str, open_: int) -> set[str]:
    orders = some(1, 1)
    services = ("order", "invoice" if kind == "zombie thread" else "payment")
    scene.place(orders)
    old, slept = scene.life("old", kind=kind, services=services)
    scene.reached(slept, "is in")
    with scene.asleep(old, open_=open_):
        new, life = scene.life("new", kind=kind, services=services)
        scene.reached(life, "is in")
        slept.file("may go").touch()
    scene.reached(slept, "is out")
    time.sleep(0.2)
    if scene.effects():
        scene.found.add("stale write")
    life.file("may go").touch()
    scene.done(orders, services[1])
    scene.settled()
    scene.finish(old, new)
    return scene.judge(orders, *services)


def settler_sleeps_inside_its_commit(scene: Scene) -> set[str]:
    """An owner stands still with the rows of its units locked: whoever replaces it must not wait until it wakes up. Then it
    wakes up, and settles nothing."""
    orders = some(4, 2)
    scene.place(orders)
    trap = Trap("sql insert into .*unlost_inbox", act="wait", inside="PostgresStore.settle")
    one, life = scene.life("one", services=("order",), traps=(trap,), idle=1.0)
    scene.reached(life)
    with scene.asleep(one, open_=1):
        two, _ = scene.life("two")
        if not scene.done(orders, "payment"):
            scene.found.add("held up")
        life.file("may go").touch()
    scene.settled()
    scene.finish(one, two)
    return scene.judge(orders, *PAIR)


def serialization_failures(scene: Scene) -> set[str]:
    """A transaction at SERIALIZABLE fails more often than its event has attempts: that is not the event's fault."""
    return _conflicting(scene, "conflicts", "settlement")


def deadlocks(scene: Scene) -> set[str]:
    return _conflicting(scene, "deadlocks", "stock")


def _conflicting(scene: Scene, kind: str, service: str) -> set[str]:
    orders = some(3, 2)
    one, life = scene.life("one", services=(*PAIR, service), kind=kind, about=orders[2].id, attempts=2)
    scene.place(orders)
    scene.done(orders, service)
    scene.settled()
    if not scene.found and len(life.file("conflicts").read_text()) < 4:
        scene.found.add("no conflict")
    scene.finish(one)
    return scene.judge(orders, *PAIR) | _effects_of(scene, service, orders)


def _effects_of(scene: Scene, service: str, orders: Sequence[Order]) -> set[str]:
    ids = [e.order_id for e in scene.effects(service)]
    wrong = set()
    if set(ids) != {order.id for order in orders}:
        wrong.add("lost")
    if len(ids) != len(set(ids)):
        wrong.add("doubled")
    return wrong


def pool_of_one(scene: Scene) -> set[str]:
    """Many handlers, and one connection for all of them."""
    orders = some(24, 2)
    one, _ = scene.life("one", machine=scene.machine(pool=1), more={"concurrency": 64})
    scene.place([orders[n : n + 6] for n in range(0, len(orders), 6)])
    scene.done(orders, "payment")
    scene.settled()
    scene.finish(one)
    return scene.judge(orders, *PAIR)


def event_kills_its_process(scene: Scene) -> set[str]:
    """An event takes its process down whenever it is handled. Others go on, and after a bounded number of deaths it is on
    the shelf: two until it is under suspicion, then one for each of its attempts."""
    orders = some(6, 2)
    victim = orders[0]
    before, _ = scene.life("before", services=("order",))
    scene.place(orders)
    scene.soon(
        lambda: (
            sum(e.name == CREATED for e in scene.logged()) == len(orders)
            and not scene.sql("select 1 from unlost.unlost_outbox")
        )
    )
    scene.finish(before)
    child, life = scene.life("mortal", services=("payment",), kind="kills", about=victim.id, attempts=3)

    def over() -> bool:
        nonlocal child
        if child.code is not None:
            child, _ = scene.life("mortal", services=("payment",), kind="kills", about=victim.id, attempts=3)
        return bool(scene.sql("select 1 from unlost.unlost_shelf")) and not scene.open_work()

    scene.soon(over)
    died = len(life.file("deaths").read_text().split()) if life.file("deaths").exists() else 0
    if not 3 <= died <= 6:
        scene.found.add(f"{died} deaths")
    last, _ = scene.life("last", services=("order",))
    scene.settled()
    scene.finish(child, last)
    return scene.judge(orders, *PAIR, dead=[("payment", "process_killed", victim.id)])


# --- scenes: what the network and the server do --------------------------------------------------------------------------------


LENT = Trap("sql ^commit$", act="wait", inside="LentBlock._finish")
SETTLING = Trap("sql ^commit$", act="wait", inside="PostgresStore.settle")
RELAYING = Trap("sql ^commit$", act="wait", inside="PostgresOutbox.next")


def answer_to_a_handlers_commit_is_lost(scene: Scene) -> set[str]:
    """The server commits, and the answer never arrives."""
    return _commit_is_lost(scene, LENT, "payment", arrives=True)


def answer_to_a_threads_commit_is_lost(scene: Scene) -> set[str]:
    trap = Trap("sql ^commit$", act="wait", inside="SyncLentBlock.finish")
    return _commit_is_lost(scene, trap, "invoice", arrives=True)


def answer_to_a_sessions_commit_is_lost(scene: Scene) -> set[str]:
    trap = Trap("AsyncPsycopg.commit", act="wait", inside="SessionBlock._finish")
    return _commit_is_lost(scene, trap, "settlement", arrives=True)


def handlers_commit_never_arrives(scene: Scene) -> set[str]:
    return _commit_is_lost(scene, LENT, "payment", arrives=False)


def answer_to_settling_is_lost(scene: Scene) -> set[str]:
    return _commit_is_lost(scene, SETTLING, "payment", arrives=True)


def settling_never_arrives(scene: Scene) -> set[str]:
    return _commit_is_lost(scene, SETTLING, "payment", arrives=False)


def answer_to_a_relay_is_lost(scene: Scene) -> set[str]:
    """The commit with which a relay claims, and takes out what it has sent."""
    return _commit_is_lost(scene, RELAYING, "payment", arrives=True)


def relays_commit_never_arrives(scene: Scene) -> set[str]:
    return _commit_is_lost(scene, RELAYING, "payment", arrives=False)


def _commit_is_lost(scene: Scene, trap: Trap, service: str, *, arrives: bool) -> set[str]:
    """The connection ends between a commit and its answer, or before it has arrived. The process finds out what became of
    it, and goes on."""
    orders = some(3, 2)
    services = (*PAIR, service) if service not in PAIR else PAIR
    with Wire.to(scene.postgres.host, scene.postgres.port) as wire:
        machine = scene.machine(dsn=via(scene.dsn, wire.port))
        scene.place(orders[::2])
        one, life = scene.life("one", machine=machine, services=services, hung=60.0, traps=(trap,))
        scene.reached(life)
        scene.quiet(1)
        held = scene.held()
        if arrives:
            wire.hold_replies()
        else:
            wire.hang()
        life.file("may go").touch()
        if arrives:  # and is carried out
            scene.until(lambda: scene.held() != held)
        else:
            time.sleep(0.2)
        wire.cut()
        wire.go_on()
        scene.place(orders[1::2])
        scene.done(orders, service)
        scene.settled()
        if one.code is not None:
            scene.found.add("ended")
        scene.finish(one)
    return scene.judge(orders, *services)


def server_is_unreachable_for_longer_than_it_is_asked(scene: Scene) -> set[str]:
    """The answer to a settling commit is lost, and nobody can ask what became of it before the process gives up asking."""
    orders = some(3, 2)
    with Wire.to(scene.postgres.host, scene.postgres.port) as wire:
        scene.place(orders[::2])
        machine = scene.machine(dsn=via(scene.dsn, wire.port))
        one, life = scene.life("one", machine=machine, hung=60.0, traps=(SETTLING,), fate=0.5)
        scene.reached(life)
        scene.quiet(1)
        held = scene.held()
        wire.hold_replies()
        life.file("may go").touch()
        scene.until(lambda: scene.held() != held)
        wire.refuse()
        wire.cut()
        wire.go_on()
        time.sleep(3.0)
        wire.accept()
        scene.place(orders[1::2])
        scene.done(orders, "payment")
        scene.settled()
        scene.finish(one)
    return scene.judge(orders, *PAIR)


def store_is_away_when_the_waiting_room_is_read(scene: Scene) -> set[str]:
    """An event waits in the store; when its time comes, the store cannot be reached. The service waits for it."""
    orders = some(3, 2)
    with Wire.to(scene.postgres.host, scene.postgres.port) as wire:
        machine = scene.machine(dsn=via(scene.dsn, wire.port))
        one, life = scene.life("one", machine=machine, kind="waits", about=orders[0].id, hung=60.0, fate=0.5)
        scene.place(orders[:1])  # nothing else that could be on its way to the store
        scene.reached(life)
        scene.soon(lambda: scene.sql("select 1 from unlost.unlost_waiting"))
        wire.refuse()
        wire.cut()
        time.sleep(3.0)
        wire.accept()
        scene.place(orders[1:])
        scene.done(orders, "payment")
        scene.settled()
        scene.finish(one)
    return scene.judge(orders, *PAIR)


def store_is_away_when_a_service_begins(scene: Scene) -> set[str]:
    """The App has opened its store; when its first service asks what operators want of it, the server is gone."""
    orders = some(3, 1)
    with Wire.to(scene.postgres.host, scene.postgres.port) as wire:
        machine = scene.machine(dsn=via(scene.dsn, wire.port))
        trap = Trap("PostgresStore.held", act="wait")
        one, life = scene.life("one", machine=machine, hung=60.0, traps=(trap,), fate=0.5)
        scene.reached(life)
        wire.refuse()
        wire.cut()
        life.file("may go").touch()
        time.sleep(1.0)
        wire.accept()
        scene.place(orders)
        scene.done(orders, "payment")
        scene.settled()
        scene.finish(one)
    return scene.judge(orders, *PAIR)


def sessions_are_ended(scene: Scene) -> set[str]:
    """pg_terminate_backend for all sessions, again and again, while orders are placed and handled."""
    orders = some(8, 4)
    one, _ = scene.life("one", services=(*PAIR, "invoice", "settlement", "stock"))
    two, _ = scene.life("two", services=(*PAIR, "invoice", "settlement", "stock"))
    scene.started(2)
    ended = 0
    for n in range(4):
        scene.place(orders[n::4])
        ended += scene.postgres.terminate_backends(database=scene.database)
    scene.done(orders, "payment", "invoice", "settlement", "stock")
    scene.settled()
    if ended < 8:
        scene.found.add("nothing was ended")
    scene.finish(one, two)
    return scene.judge(orders, *PAIR, "invoice", "settlement", "stock")


def server_is_away(scene: Scene) -> set[str]:
    """The server ends at once in the middle of everything, and is away for five seconds. Nobody restarts the services."""
    orders = some(12, 4)
    everybody = (*PAIR, "invoice", "settlement", "stock")
    children = [scene.life(name, services=everybody)[0] for name in ("one", "two")]
    scene.place(orders[::4] + orders[1::4])
    scene.started(2)
    scene.soon(lambda: len(scene.effects()) > 5)
    scene.postgres.immediate_stop()
    time.sleep(5.0)
    scene.postgres.start_again()
    back = time.monotonic()
    scene.place(orders[2::4] + orders[3::4])
    scene.done(orders, *everybody[1:])
    scene.settled()
    print(f"server_is_away: everything was handled {time.monotonic() - back:.1f} s after it came back")
    if any(child.code is not None for child in children):
        scene.found.add("ended")
    scene.finish(*children)
    return scene.judge(orders, *everybody)


def crash_takes_a_commit_back(scene: Scene) -> set[str]:
    """A settling commit never arrives, the server crashes, and gives the transaction's number to another one, which commits.
    That must not be taken for the answer."""
    orders = some(1, 2)
    with Wire.to(scene.postgres.host, scene.postgres.port) as wire:
        scene.place(orders)
        traps = (Trap("Client.commit", act="wait", inside="PostgresStore.settle", label="before"), SETTLING)
        machine = scene.machine(dsn=via(scene.dsn, wire.port))
        one, life = scene.life("one", machine=machine, services=("order",), hung=60.0, beats=60.0, traps=traps)
        scene.reached(life, "before is there")
        scene.quiet(0)  # no other commit writes the log of the server from here on, and its own is not written
        life.file("before may go").touch()
        scene.reached(life)
        wire.refuse()  # a connection of which nothing arrives would hold up the end of the server
        wire.hang()
        life.file("may go").touch()
        scene.postgres.immediate_stop()
        wire.cut()
        scene.postgres.start_again()
        for _ in range(100):
            scene.sql("select pg_current_xact_id()")
        wire.accept()
        wire.go_on()
        two, _ = scene.life("two", services=("payment",))
        scene.done(orders, "payment")
        scene.settled()
        scene.finish(one, two)
    return scene.judge(orders, *PAIR)


def backup_is_restored(scene: Scene) -> set[str]:
    """An older backup takes the place of the database: the broker remembers what it was told, and the service stops."""
    return _backup_is_restored(scene)


def _backup_is_restored(scene: Scene) -> set[str]:
    orders = some(4, 4)
    one, _ = scene.life("one")
    scene.place(orders[:8])
    scene.done(orders[:8], "payment")
    scene.settled()
    scene.finish(one)
    scene.postgres.stop()
    backup = scene.folder / "backup"
    scene.postgres.backup(backup)
    scene.postgres.start_again()
    two, _ = scene.life("two")
    scene.place(orders[8:])
    scene.done(orders, "payment")
    scene.settled()
    scene.finish(two)
    scene.postgres.stop()
    scene.postgres.restore(backup)
    scene.postgres.start_again()
    three, _ = scene.life("three")
    scene.refused(three, "UL3023")
    return scene.found


SCENES: dict[str, Callable[[Scene], set[str]]] = {
    scene.__name__: scene
    for scene in (
        commit_out_of_order,
        rolled_back,
        web_is_killed_after_its_commit,
        long_transactions,
        relay_dies_before_sending,
        relay_dies_after_sending,
        relay_sleeps_with_events_in_hand,
        relay_sleeps_before_confirming,
        relay_sleeps_inside_its_commit,
        relay_is_refused_a_row,
        rows_wait_for_a_relay,
        nobody_calls_the_relays,
        handler_dies_before_its_commit,
        handler_dies_after_its_commit,
        settler_dies_after_its_commit,
        killed_in_handler,
        two_services,
        zombie_before_its_transaction,
        zombie_inside_its_transaction,
        zombie_in_a_thread,
        zombie_with_a_session_of_its_own,
        settler_sleeps_inside_its_commit,
        serialization_failures,
        deadlocks,
        pool_of_one,
        event_kills_its_process,
        answer_to_a_handlers_commit_is_lost,
        answer_to_a_threads_commit_is_lost,
        answer_to_a_sessions_commit_is_lost,
        handlers_commit_never_arrives,
        answer_to_settling_is_lost,
        settling_never_arrives,
        answer_to_a_relay_is_lost,
        relays_commit_never_arrives,
        server_is_unreachable_for_longer_than_it_is_asked,
        store_is_away_when_the_waiting_room_is_read,
        store_is_away_when_a_service_begins,
        sessions_are_ended,
    )
}
# they need a server of their own, to end it
OWN_SERVER: dict[str, Callable[[Scene], set[str]]] = {
    scene.__name__: scene for scene in (server_is_away, crash_takes_a_commit_back, backup_is_restored)
}
LAZY = {"wal_writer_delay": "10s", "wal_writer_flush_after": "1GB"}  # so that a crash takes back what it can


def backup_is_restored_beside_kafka(
    folder: Path, postgres: Postgres, bootstrap: str, prefix: str, bug: str | None
) -> set[str]:
    """What the group was told is in the note beside its offset."""
    with (
        Postgres.start(settings=SERVER, own=True) as own,
        Scene(folder / "scene", own, bug, kafka=(bootstrap, prefix)) as scene,
    ):
        return _backup_is_restored(scene)


def kafka_refuses_a_row(folder: Path, postgres: Postgres, bootstrap: str, prefix: str, bug: str | None) -> set[str]:
    """A topic takes no message as large as this one: it stays in the outbox and holds its own key, and no other."""
    with Scene(folder / "scene", postgres, bug, kafka=(bootstrap, prefix)) as scene:
        orders = some(4, 3)
        held, free = orders[:3], orders[3:]
        one, _ = scene.life("one")
        scene.started(1)
        _allow(bootstrap, f"{prefix}shop", 2000)
        writing = Life(scene.folder, "essay", scene.machine())
        scene.begin("essay", writing.machine, placing_essay, writing, held[0], False).wait()
        scene.soon(lambda: "it stays there" in scene.said())
        scene.place([*held, *free])
        if not scene.done(free, "payment"):
            scene.found.add("held up")
        if set(scene.placed_in_log()) & {order.id for order in held}:
            scene.found.add("overtaken")
        _allow(bootstrap, f"{prefix}shop", 1_048_588)
        scene.done(orders, "payment")
        scene.settled()
        scene.finish(one)
        return scene.judge(orders, *PAIR)


def _allow(bootstrap: str, topic: str, size: int) -> None:
    from confluent_kafka.admin import AlterConfigOpType, ConfigEntry, ConfigResource
    from kafka_books import admin

    entry = ConfigEntry("max.message.bytes", str(size), incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ConfigResource.Type.TOPIC, topic, incremental_configs=[entry])
    for done in admin(bootstrap).incremental_alter_configs([resource]).values():
        done.result(30)


KAFKA: dict[str, Callable[[Path, Postgres, str, str, str | None], set[str]]] = {
    scene.__name__: scene for scene in (backup_is_restored_beside_kafka, kafka_refuses_a_row)
}


# --- many at a time --------------------------------------------------------------------------------------------------------------

AT_ONCE = 4
Plays = Callable[[str, str | None], set[str]]


def play_scene(name: str, bug: str | None, folder: Path, postgres: Postgres) -> set[str]:
    if name in SCENES:
        with Scene(folder, postgres, bug) as scene:
            return SCENES[name](scene)
    require_postgres(own=True)
    with Postgres.start(settings=SERVER | LAZY, own=True) as own, Scene(folder, own, bug) as scene:
        return OWN_SERVER[name](scene)


@contextlib.contextmanager
def plays_of(request: pytest.FixtureRequest, folder: Path, postgres: Postgres) -> Iterator[Plays]:
    """Plays the scenes that were asked for, some at a time: they mostly wait."""
    chosen_items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    wanted = [(item.callspec.params["scene"], item.callspec.params.get("bug")) for item in chosen_items]
    wanted = [(scene, bug) for scene, bug in wanted if scene not in KAFKA]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        results = {
            (scene, bug): pool.submit(play_scene, scene, bug, folder / f"{scene} {bug or ''}".strip(), postgres)
            for scene, bug in wanted
        }
        yield lambda scene, bug: results[scene, bug].result()
