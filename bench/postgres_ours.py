"""unlost on PostgreSQL, measured through its public surface. Each mode runs in processes of its own.

Nothing is switched off: a transaction counts when it is committed, an event when its position is durable, a row of the
outbox when its confirmation is; and at the end what is in the tables and in the log is compared with what was published.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from common import OrderPlaced, Stopwatch, answer, order, start
from ours import DEADLINE_SECONDS, STAMP, stamping, unless_it_fails
from postgres_raw import INSERT_OUTBOX, one_row
from postgres_shared import BILL, BUSINESS, billed, business, drive
from psycopg import AsyncConnection, Connection
from psycopg_pool import AsyncConnectionPool

from unlost import App, Context, Event, Service, Topic
from unlost.brokers.port import Arrivals, Assigned

LOOK_SECONDS = 0.004
BATCH = 1000


class Probed(Event, key="n", topic="probe"):
    n: str


def app_on(url: str, broker: str, *services: Service, pool: int = 16, relay: bool = True) -> App:
    topics = [Topic("order"), Topic("bill"), Topic("probe")]
    return App(*services, broker=broker, store=f"{url}?pool={pool}", relay=relay, topics=topics)


async def number(connection: AsyncConnection[Any], sql: str, *bindings: object) -> int:
    cursor = await connection.execute(sql, bindings or None)
    row = await cursor.fetchone()
    return int(row[0] or 0) if row else 0


SETTLED = "select sum(position) from unlost.unlost_progress where service = 'billing'"
CONFIRMED = "select sum(confirmed) from unlost.unlost_relay"


async def until(connection: AsyncConnection[Any], sql: str, count: int, pause: float = LOOK_SECONDS) -> None:
    end = time.monotonic() + DEADLINE_SECONDS
    while (found := await number(connection, sql)) < count:
        if time.monotonic() > end:
            raise SystemExit(f"{found} of {count} after {DEADLINE_SECONDS:g} s: {sql}")
        await asyncio.sleep(pause)


async def ends(app: App, topic: str) -> int:
    (info,) = await app.broker.topics([topic])
    return sum(high for _, high in info.ranges)


# --- publishing in a transaction of one's own --------------------------------------------------------------------


def measure_publish(url: str, broker: str, kind: str, clients: int, total: int) -> None:
    app = app_on(url, broker)

    def sync(connection: Connection[Any], n: int) -> None:
        with connection.transaction():
            connection.execute(BUSINESS, business(n))
            with app.outbox(connection) as outbox:
                outbox.publish(order(n))

    async def asynchronous(connection: AsyncConnection[Any], n: int) -> None:
        async with connection.transaction():
            await connection.execute(BUSINESS, business(n))
            async with app.outbox(connection) as outbox:
                outbox.publish(order(n))

    answer(drive(kind, url, clients, total, sync, asynchronous))


# --- relaying ----------------------------------------------------------------------------------------------------


def fill(url: str, broker: str, total: int) -> None:
    """A backlog: events that were committed while nobody sent them."""
    app = app_on(url, broker)
    with Connection.connect(url, autocommit=True) as connection:
        for first in range(0, total, BATCH):
            with connection.transaction(), app.outbox(connection) as outbox:
                for n in range(first, min(first + BATCH, total)):
                    outbox.publish(order(n))
        connection.execute(
            "insert into raw_outbox overriding system value select * from unlost.unlost_outbox order by seq"
        )
        connection.execute("vacuum analyze raw_outbox")
        connection.execute("vacuum analyze unlost.unlost_outbox")
    answer({})


async def measure_relay(url: str, broker: str, total: int) -> None:
    """From the start of the relay until the last confirmation is durable."""
    async with app_on(url, broker) as app, await AsyncConnection.connect(url, autocommit=True) as connection:
        watch: list[Stopwatch] = []
        task = asyncio.create_task(app.serve(ready=lambda: watch.append(Stopwatch())))
        await unless_it_fails(task, until(connection, CONFIRMED, total))
        result: dict[str, Any] = watch[0].stop()
        left = await number(connection, "select count(*) from unlost.unlost_outbox")
        app.stop()
        await task
        if left or await ends(app, "order") != total:
            raise SystemExit(f"{left} rows are left, and the log has {await ends(app, 'order')} of {total} events")
    answer(result | {"events": total})


# --- effectively-once handlers -----------------------------------------------------------------------------------


async def measure_once(url: str, broker: str, kind: str, concurrency: int, total: int, ids: str = "ordered") -> None:
    """A backlog of the embedded log, from the first handler's start to the durable position of all. Goes on where the
    run before it on this database has ended."""
    service = Service("billing", guarantee="effectively-once", concurrency=concurrency)
    watch: list[Stopwatch] = []
    handled = asyncio.Event()
    seen = 0
    own = AsyncConnectionPool(url, min_size=1, max_size=concurrency, open=False, kwargs={"autocommit": True})

    def note() -> None:
        nonlocal seen
        seen += 1
        if seen == total:
            handled.set()

    if kind != "session":

        @service.on(OrderPlaced)
        async def bill(event: OrderPlaced, ctx: Context) -> None:
            if not watch:
                watch.append(Stopwatch())
            async with ctx.transaction() as db:
                await db.execute("insert into bill (order_id, cents) values (?, ?)", (event.order_id, event.cents))
                ctx.publish(billed(event))
            note()

    else:

        @service.on(OrderPlaced)
        async def bill_with_session(event: OrderPlaced, ctx: Context) -> None:
            if not watch:
                watch.append(Stopwatch())
            async with own.connection() as connection, ctx.transaction(connection):
                await connection.execute(BILL, (event.order_id, event.cents))
                ctx.publish(billed(event))
            note()

    async with (
        app_on(url, broker, service, pool=concurrency, relay=kind != "apart") as app,
        await AsyncConnection.connect(url, autocommit=True) as connection,
        own,
    ):
        before = await number(connection, SETTLED)
        bills = await number(connection, "select count(*) from bill")
        marks = await number(connection, "select count(*) from unlost.unlost_inbox where position >= 0")
        for first in range(0, total, BATCH):
            events = [order(n) for n in range(first, min(first + BATCH, total))]
            await app.publish_all(events, ids=[str(uuid.uuid4()) for _ in events] if ids == "random" else None)
        task = asyncio.create_task(app.serve())
        await unless_it_fails(task, handled.wait())
        await until(connection, SETTLED, before + total)
        result: dict[str, Any] = watch[0].stop()
        app.stop()
        await task
        found = {
            "bills": await number(connection, "select count(*) from bill") - bills,
            "marks": await number(connection, "select count(*) from unlost.unlost_inbox where position >= 0") - marks,
            "published": await number(connection, CONFIRMED)
            + await number(connection, "select count(*) from unlost.unlost_outbox") - before,
        }  # fmt: skip
        if set(found.values()) != {total}:
            raise SystemExit(f"of {total} events: {found}")
    answer(result | {"events": total})


# --- latency -----------------------------------------------------------------------------------------------------


async def consume_stamping(url: str, broker: str, write_to: int, probe_to: int) -> None:
    """The other process: a service, and beside it a bare member of the broker that says when a probe was received."""
    async with app_on(url, broker, stamping(write_to)) as app:
        task = asyncio.create_task(app.serve())
        member = await app.broker.join("probe", ["probe"])

        async def receive() -> None:
            while True:
                for change in await member.receive():
                    if isinstance(change, Arrivals):
                        at = time.monotonic_ns()
                        for _ in change.events:
                            os.write(probe_to, STAMP.pack(at))
                    elif isinstance(change, Assigned):
                        for unit in change.units:
                            member.seek(unit, 0)

        receiving = asyncio.create_task(receive())
        await asyncio.to_thread(sys.stdin.read)
        receiving.cancel()
        await asyncio.gather(receiving, return_exceptions=True)
        await member.close()
        app.stop()
        await task


def _stamps() -> tuple[int, Callable[[], Awaitable[int]]]:
    read_from, write_to = os.pipe()
    os.set_inheritable(write_to, True)
    arrived: asyncio.Queue[int] = asyncio.Queue()

    def read() -> None:
        for (at,) in STAMP.iter_unpack(os.read(read_from, STAMP.size * 1024)):
            arrived.put_nowait(at)

    asyncio.get_running_loop().add_reader(read_from, read)
    return write_to, lambda: asyncio.wait_for(arrived.get(), DEADLINE_SECONDS)


async def measure_latency(url: str, broker: str, samples: int) -> None:
    """In turns, one at a time: a transaction with `app.outbox` until the handler starts in the other process; the same
    transaction with a plain insert until it is committed; an event of the broker until a bare member has it."""
    write_to, started = _stamps()
    probe_to, received = _stamps()
    async with app_on(url, broker) as app, await AsyncConnection.connect(url, autocommit=True) as connection:
        other = start("postgres_ours.py", "stamp", url, broker, write_to, probe_to, stdin=-1, close_fds=False)

        async def ours(n: int) -> float:
            began = time.monotonic_ns()
            async with connection.transaction():
                await connection.execute(BUSINESS, business(n))
                async with app.outbox(connection) as outbox:
                    outbox.publish(order(n))
            committed.append((time.monotonic_ns() - began) / 1000)
            return (await started() - began) / 1000

        async def commit(n: int) -> float:
            began = time.monotonic_ns()
            async with connection.transaction():
                await connection.execute(BUSINESS, business(n))
                await connection.execute(INSERT_OUTBOX, row)
            return (time.monotonic_ns() - began) / 1000

        async def probe(n: int) -> float:
            began = time.monotonic_ns()
            await app.publish(Probed(n=str(n % 1000)))
            return (await received() - began) / 1000

        async with connection.transaction(force_rollback=True):  # a row as ours is, for the plain insert
            async with app.outbox(connection) as outbox:
                outbox.publish(order(0))
            row = await one_row(connection)
        committed: list[float] = []
        warm = 50
        times: dict[str, list[float]] = {"start": [], "commit": [], "probe": []}
        for n in range(warm + samples):
            times["start"].append(await ours(n))
            await until(connection, CONFIRMED, n + 1, 0.002)
            await until(connection, SETTLED, n + 1, 0.002)
            times["commit"].append(await commit(n))
            times["probe"].append(await probe(n))
            await asyncio.sleep(0.003)
        assert other.stdin is not None
        other.stdin.close()
        if await asyncio.to_thread(other.wait) != 0:
            raise SystemExit("the consumer failed")
    answer({name: values[warm:] for name, values in times.items()} | {"ours_commit": committed[warm:]})


def main() -> None:
    mode, url, broker, *rest = sys.argv[1:]
    if mode == "publish":
        measure_publish(url, broker, rest[0], int(rest[1]), int(rest[2]))
    elif mode == "fill":
        fill(url, broker, int(rest[0]))
    elif mode == "relay":
        asyncio.run(measure_relay(url, broker, int(rest[0])))
    elif mode == "once":
        asyncio.run(measure_once(url, broker, rest[0], int(rest[1]), int(rest[2]), *rest[3:]))
    elif mode == "latency":
        asyncio.run(measure_latency(url, broker, int(rest[0])))
    elif mode == "stamp":
        asyncio.run(consume_stamping(url, broker, int(rest[0]), int(rest[1])))
    else:
        raise SystemExit(f"no such mode: {mode}")


if __name__ == "__main__":
    main()
