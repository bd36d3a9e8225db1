"""The shop of this proof, on real orders: a web front, services with every kind of transaction, and who holds them up.

The web front writes an order and its event in one transaction of its own. Some transactions are rolled back on purpose
(whole, or to a savepoint), some stay open while later ones commit. A customer's orders are placed one after the other,
each after the commit of the one before; what a commit became whose answer was lost, the table says.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import signal
import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from datetime import time as midnight
from pathlib import Path
from typing import Any

import psycopg
from evidence import Journal
from pg_stage import Machine
from psycopg import AsyncConnection, Connection, IsolationLevel
from psycopg_pool import AsyncConnectionPool

from unlost import App, Context, Reject, Retry, Service, Topic, Unavailable
from unlost.demo.orders import Order, read_orders
from unlost.demo.shop import OrderCreated, OrderPlaced, PaymentCompleted, ShopEvent

PARTITIONS = 4
TOPICS = [Topic("shop", partitions=PARTITIONS)]
TILLS = 8
REMINDED_SECONDS = 0.25
QUICK = Retry(attempts=10_000, first=0.01, factor=2, max=0.2)
INSERT = "insert into effect (service, order_id, customer_id, day, cents) values (%s, %s, %s, %s, %s)"
PLACE = "insert into shop_order (order_id, customer_id, day, cents) values (%s, %s, %s, %s) on conflict do nothing returning 1"
AWAY = (psycopg.OperationalError, psycopg.InterfaceError, Unavailable)
SETTLE = (
    "insert into settlement values (%s, %s, 1) on conflict (day) do update "
    "set cents = settlement.cents + excluded.cents, orders = settlement.orders + 1"
)


class DeadlinePassed(ShopEvent):
    asked_at: float  # seconds since 1970, when the handler asked for it


def chosen(count: int) -> list[Order]:
    """Real orders: of customers who came back three times or more, first those who once had an order for nothing."""
    by_customer: dict[str, list[Order]] = defaultdict(list)
    for order in read_orders():
        by_customer[order.customer_id].append(order)
    groups = [orders for orders in by_customer.values() if 3 <= len(orders) <= 30]
    groups.sort(key=lambda orders: (all(order.cents for order in orders), -len(orders), orders[0].number))
    free, paid = groups[: count // 40], groups[count // 40 :]
    found: list[Order] = []
    for orders in itertools.chain(free, paid):
        if len(found) >= count:
            break
        found += orders
    return found


# --- the services ----------------------------------------------------------------------------------------------------


def make_services(journal: Journal, rng: random.Random, dsn: str, *, concurrency: int = 8) -> list[Service]:
    """One for each way to write: with the settling commit, in a lent transaction (async and in threads), in one of the
    service's own (async at each level of isolation, and sync with locks in any sequence), and not at all. One asks for
    an event that comes later, one gets its events at most once."""
    once: dict[str, Any] = {"guarantee": "effectively-once", "retry": QUICK, "concurrency": concurrency}
    order = Service("order", **once)
    payment = Service("payment", on_dead="skip", **once)
    invoice = Service("invoice", **once)
    settlement = Service("settlement", **once)
    stock = Service("stock", **once)
    notification = Service("notification", retry=QUICK)
    reminder = Service("reminder", **once)
    letter = Service("letter", retry=QUICK)
    tally = Service("tally", guarantee="at-most-once")
    sessions = Sessions(dsn)

    def stumble(chance: float) -> None:
        if rng.random() < chance:
            raise ConnectionError("this attempt was meant to fail")

    async def dawdle() -> None:
        if rng.random() < 0.1:
            await asyncio.sleep(rng.random() * 0.02)

    @order.on(OrderPlaced)
    async def create(placed: OrderPlaced, ctx: Context) -> None:
        ctx.publish(
            OrderCreated(
                customer_id=placed.customer_id, order_id=placed.order_id, ordered_on=placed.ordered_on,
                total_cents=placed.total_cents,
            )
        )  # fmt: skip
        await dawdle()
        stumble(0.02)

    @payment.on(OrderCreated)
    async def pay(created: OrderCreated, ctx: Context) -> None:
        if created.total_cents == 0:
            raise Reject("an order of 0.00 cannot be paid")
        await dawdle()
        async with ctx.transaction() as db:
            await db.execute(INSERT.replace("%s", "?"), row("payment", created, created.total_cents))
            ctx.publish(
                PaymentCompleted(
                    customer_id=created.customer_id, order_id=created.order_id, ordered_on=created.ordered_on,
                    amount_cents=created.total_cents,
                )
            )  # fmt: skip
            stumble(0.02)

    @invoice.on(OrderCreated)
    def bill(created: OrderCreated, ctx: Context) -> None:
        stumble(0.02)
        with ctx.transaction() as db:
            db.execute(INSERT.replace("%s", "?"), row("invoice", created, created.total_cents))

    @settlement.on(PaymentCompleted)
    async def settle(completed: PaymentCompleted, ctx: Context) -> None:
        """The transactions of one day are in each other's way, and some cannot be serialized."""
        async with sessions.of_the_pool() as connection, ctx.transaction(connection):
            await connection.execute(SETTLE, (completed.ordered_on.isoformat(), completed.amount_cents))
            await connection.execute(INSERT, row("settlement", completed, completed.amount_cents))
            stumble(0.02)

    @stock.on(PaymentCompleted)
    def move(completed: PaymentCompleted, ctx: Context) -> None:
        """Two rows in any sequence: some of these transactions lock each other out."""
        with sessions.of_this_thread() as connection, ctx.transaction(connection):
            for till in rng.sample(range(TILLS), 2):
                connection.execute("update till set moved = moved + 1 where id = %s", (till,))
            connection.execute(INSERT, row("stock", completed, completed.amount_cents))

    @notification.on(PaymentCompleted)
    async def write(completed: PaymentCompleted) -> None:
        stumble(0.05)
        journal.note("completed", completed.order_id, completed.customer_id, "notification", completed.amount_cents)

    @reminder.on(PaymentCompleted)
    async def remind(completed: PaymentCompleted, ctx: Context) -> None:
        async with ctx.transaction() as db:
            await db.execute(INSERT.replace("%s", "?"), row("reminder", completed, completed.amount_cents))
            due = DeadlinePassed(
                customer_id=completed.customer_id, order_id=completed.order_id, asked_at=time.time()
            )  # fmt: skip
            ctx.publish(due, delay=REMINDED_SECONDS)
            stumble(0.02)

    @letter.on(DeadlinePassed)
    async def send(due: DeadlinePassed) -> None:
        late_ms = int((time.time() - due.asked_at - REMINDED_SECONDS) * 1000)
        journal.note("completed", due.order_id, due.customer_id, "letter", late_ms)

    @tally.on(PaymentCompleted)
    async def count(completed: PaymentCompleted) -> None:
        journal.note("delivered", completed.order_id, completed.customer_id, "tally")
        await dawdle()

    return [order, payment, invoice, settlement, stock, notification, reminder, letter, tally]


def row(service: str, event: Any, cents: int) -> tuple[str, str, str, str, int]:
    return (service, event.order_id, event.customer_id, event.ordered_on.isoformat(), cents)


class Sessions:
    """Connections of the services' own, as a program has them: one pool, and one for each thread."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._pool: AsyncConnectionPool[AsyncConnection[Any]] | None = None
        self._own = threading.local()

    @contextlib.asynccontextmanager
    async def of_the_pool(self) -> Any:
        pool = self._pool
        if pool is None:
            pool = self._pool = AsyncConnectionPool(
                self._dsn, min_size=0, max_size=6, open=False, timeout=3, reconnect_timeout=1, configure=_some_level
            )
            await pool.open()
        async with pool.connection() as connection:
            yield connection

    @contextlib.contextmanager
    def of_this_thread(self) -> Iterator[Connection[Any]]:
        connection = getattr(self._own, "connection", None)
        if connection is None or connection.closed:
            connection = self._own.connection = psycopg.connect(self._dsn, connect_timeout=5)
        try:
            yield connection
        except BaseException:
            connection.close()
            raise


async def _some_level(connection: AsyncConnection[Any]) -> None:
    levels = (IsolationLevel.SERIALIZABLE, IsolationLevel.REPEATABLE_READ, IsolationLevel.READ_COMMITTED)
    await connection.set_isolation_level(random.choices(levels, (2, 1, 3))[0])


# --- the web front ---------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """What a child process is to be."""

    kind: str
    name: str  # of its line of incarnations
    life: int
    seed: int
    folder: Path  # of the evidence
    machine: Machine
    armed: bool = False
    orders: int = 0  # how many are taken from the file
    part: tuple[int, int] = (0, 1)  # which of the web processes this is
    pace: float = 0.3  # seconds between two orders of a customer, on the average

    @property
    def through(self) -> Path:
        """There when a web process has placed all of its orders."""
        return self.folder / f"{self.name} is through"

    @property
    def hurry(self) -> bool:
        """Whether what is left is to be placed without rest."""
        return (self.folder / "hurry").exists()


def placed(order: Order, *, items: int | None = None) -> OrderPlaced:
    return OrderPlaced(
        customer_id=order.customer_id, order_id=order.id, ordered_on=order.day,
        items=order.items if items is None else items, total_cents=order.cents,
    )  # fmt: skip


def event_id(order: Order) -> str:
    return f"{order.id}-placed"


def when(order: Order) -> datetime:
    return datetime.combine(order.day, midnight(), UTC)


class Baskets:
    """The customers of one web process, each with what is still to be placed."""

    def __init__(self, job: Job, rng: random.Random) -> None:
        self.job, self.rng = job, rng
        mine, of = job.part
        with psycopg.connect(job.machine.dsn, autocommit=True, connect_timeout=10) as connection:
            done = {id for (id,) in connection.execute("select order_id from shop_order")}
        self.left: dict[str, list[Order]] = defaultdict(list)
        for order in chosen(job.orders):
            if zlib.crc32(order.customer_id.encode()) % of == mine and order.id not in done:
                self.left[order.customer_id].append(order)

    def end(self) -> None:
        """Says so if everything is placed."""
        if not any(self.left.values()):
            self.job.through.touch()

    def next(self, left: list[Order]) -> list[Order]:
        """One order, or two in one transaction."""
        return left[: 2 if self.rng.random() < 0.1 else 1]

    def rest(self) -> float:
        return 0.0 if self.job.hurry else self.rng.expovariate(1 / self.job.pace)

    def linger(self) -> float:
        """How long a transaction stays open before it commits, while later ones do."""
        dice = self.rng.random()
        return 0.0 if dice > 0.2 or self.job.hurry else self.rng.random() * (1.5 if dice < 0.03 else 0.3)

    def mishap(self) -> str:
        dice = self.rng.random()
        return "rolled back" if dice < 0.06 else "savepoint" if dice < 0.12 else ""


class Meant(Exception):
    """A transaction that was meant to fail."""


def place(
    app: App, connection: Connection[Any], orders: Sequence[Order], mishap: str = "", linger: float = 0.0
) -> None:
    """Rows and events in one transaction."""
    with connection.transaction():
        fresh = [order for order in orders if connection.execute(PLACE, _row(order)).fetchone()]
        if mishap == "savepoint":
            with contextlib.suppress(Meant), connection.transaction():
                with app.outbox(connection) as outbox:
                    _publish_ghosts(outbox, orders)
                raise Meant
        if mishap == "rolled back":
            with app.outbox(connection) as outbox:
                _publish_ghosts(outbox, orders)
            raise Meant
        with app.outbox(connection) as outbox:
            for order in fresh:
                outbox.publish(placed(order), id=event_id(order), occurred_at=when(order))
        time.sleep(linger)


async def place_async(
    app: App, connection: AsyncConnection[Any], orders: Sequence[Order], mishap: str = "", linger: float = 0.0
) -> None:
    async with connection.transaction():
        fresh = [order for order in orders if await (await connection.execute(PLACE, _row(order))).fetchone()]
        if mishap == "savepoint":
            with contextlib.suppress(Meant):
                async with connection.transaction():
                    async with app.outbox(connection) as outbox:
                        _publish_ghosts(outbox, orders)
                    raise Meant
        if mishap == "rolled back":
            async with app.outbox(connection) as outbox:
                _publish_ghosts(outbox, orders)
            raise Meant
        async with app.outbox(connection) as outbox:
            for order in fresh:
                outbox.publish(placed(order), id=event_id(order), occurred_at=when(order))
        await asyncio.sleep(linger)


def _publish_ghosts(outbox: Any, orders: Sequence[Order]) -> None:
    """What nobody may ever see: some with the id that the real one will have, and another content."""
    for order in orders:
        outbox.publish(placed(order, items=-1), id=event_id(order))
        ghost = placed(order)
        outbox.publish(type(ghost)(**{**_fields(ghost), "order_id": f"{order.id}-never"}))


def _fields(event: Any) -> dict[str, Any]:
    return {name: getattr(event, name) for name in event.__struct_fields__}


def _row(order: Order) -> tuple[str, str, str, int]:
    return (order.id, order.customer_id, order.day.isoformat(), order.cents)


def web_sync(job: Job, journal: Journal, rng: random.Random) -> None:
    """Code without an event loop, in threads: psycopg's plain connections."""
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    baskets = Baskets(job, rng)
    queue = list(baskets.left.values())
    app = App(name="web", topics=TOPICS)

    def serve(dice: random.Random) -> None:
        connection: Connection[Any] | None = None
        mine: list[list[Order]] = []
        while not stopping.is_set():
            while len(mine) < 4 and queue:
                mine.append(queue.pop())
            if not mine:
                return
            left = dice.choice(mine)
            orders, mishap = baskets.next(left), baskets.mishap()
            try:
                if connection is None or connection.closed:
                    connection = psycopg.connect(job.machine.dsn, autocommit=dice.random() < 0.5, connect_timeout=5)
                place(app, connection, orders, mishap, baskets.linger())
            except Meant:
                continue
            except AWAY:
                if connection is not None:
                    connection.close()
                stopping.wait(0.05)
                continue
            del left[: len(orders)]
            mine = [left for left in mine if left]
            stopping.wait(baskets.rest() / 4)

    _in_threads(4, serve, rng, stopping)
    baskets.end()


def _in_threads(
    count: int, work: Callable[[random.Random], None], rng: random.Random, stopping: threading.Event
) -> None:
    threads = [
        threading.Thread(target=work, args=(random.Random(rng.random()),), daemon=True, name=f"web-{n}")
        for n in range(count)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) and not stopping.wait(0.1):
        pass
    for thread in threads:
        thread.join(10)


def web_async(job: Job, journal: Journal, rng: random.Random) -> None:
    asyncio.run(_web_async(job, rng))


async def _web_async(job: Job, rng: random.Random) -> None:
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    baskets = Baskets(job, rng)
    queue = list(baskets.left.values())
    app = App(name="web", topics=TOPICS)

    async def pause(seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await stopping.wait()

    async def customer() -> None:
        connection: AsyncConnection[Any] | None = None
        while queue and not stopping.is_set():
            left = queue.pop()
            while left and not stopping.is_set():
                orders, mishap = baskets.next(left), baskets.mishap()
                try:
                    if connection is None or connection.closed:
                        connection = await AsyncConnection.connect(job.machine.dsn, connect_timeout=5)
                    await place_async(app, connection, orders, mishap, baskets.linger())
                except Meant:
                    continue
                except AWAY:
                    if connection is not None:
                        await connection.close()
                    await pause(0.05)
                    continue
                del left[: len(orders)]
                await pause(baskets.rest())
        if connection is not None:
            await connection.close()

    await asyncio.gather(*(customer() for _ in range(12)))
    baskets.end()


def sleeper(job: Job, journal: Journal, rng: random.Random) -> None:
    """Long transactions beside all that: with a number and a snapshot from long ago, and nothing to say."""
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    app = App(name="web", topics=TOPICS)
    while not stopping.is_set():
        with contextlib.suppress(*AWAY), psycopg.connect(job.machine.dsn, connect_timeout=5) as connection:
            connection.isolation_level = IsolationLevel.REPEATABLE_READ
            connection.execute("select pg_current_xact_id(), count(*) from shop_order")
            with app.outbox(connection) as outbox:
                _publish_ghosts(outbox, rng.sample(chosen(job.orders), 3))
            stopping.wait(1 + 2 * rng.random())
            connection.rollback()
