"""What both sides of the PostgreSQL benchmark share: the tables beside ours, the user's own rows, how clients are driven.

Both sides use psycopg with autocommit and `connection.transaction()`, and one connection per client.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

from common import OrderPlaced, cpu_seconds, order
from psycopg import AsyncConnection, Connection

from unlost import Event

WARM = 30  # transactions of each client before the clock starts
# The raw loops' tables have the columns and the indexes of ours.
TABLES = """
create table shop_order (number bigint generated always as identity primary key,
    order_id text not null, customer text not null, cents bigint not null, note text not null);
create table bill (number bigint generated always as identity primary key, order_id text not null, cents bigint not null);
create table raw_outbox (like unlost.unlost_outbox including all);
create table raw_inbox (like unlost.unlost_inbox including all);
create table raw_progress (like unlost.unlost_progress including all);
"""
BUSINESS = "insert into shop_order (order_id, customer, cents, note) values (%s, %s, %s, %s)"
BILL = "insert into bill (order_id, cents) values (%s, %s)"


class OrderBilled(Event, key="order_id", topic="bill"):
    """What the handler of an order publishes; as large as the order."""

    order_id: str
    customer: str
    cents: int
    note: str


def billed(o: OrderPlaced) -> OrderBilled:
    return OrderBilled(order_id=o.order_id, customer=o.customer, cents=o.cents, note=o.note)


def business(n: int) -> tuple[str, str, int, str]:
    """The user's own row of the `n`-th transaction."""
    o = order(n)
    return o.order_id, o.customer, o.cents, o.note


# --- clients -----------------------------------------------------------------------------------------------------

SyncClient = Callable[[Connection[Any], int], None]  # runs one transaction
AsyncClient = Callable[[AsyncConnection[Any], int], Coroutine[Any, Any, None]]


def drive(kind: str, url: str, clients: int, total: int, sync: SyncClient, asynchronous: AsyncClient) -> dict[str, Any]:
    """`total` transactions by so many clients at once, each as fast as it gets its answers."""
    each = total // clients
    if kind == "async":
        seconds, cpu = asyncio.run(_tasks(url, clients, each, asynchronous))
    elif kind == "threads":
        seconds, cpu = _threads(url, clients, each, sync)
    else:
        seconds, cpu = _processes(url, clients, each, sync)
    return {"seconds": seconds, "cpu": cpu, "events": each * clients}


async def _tasks(url: str, clients: int, each: int, one: AsyncClient) -> tuple[float, float]:
    together = asyncio.Barrier(clients + 1)

    async def client(number: int) -> None:
        async with await AsyncConnection.connect(url, autocommit=True) as connection:
            for n in range(WARM):
                await one(connection, n)
            await together.wait()
            for n in range(number * each, (number + 1) * each):
                await one(connection, n)

    running = [asyncio.create_task(client(number)) for number in range(clients)]
    await together.wait()
    began, cpu = time.monotonic(), cpu_seconds()
    await asyncio.gather(*running)
    return time.monotonic() - began, cpu_seconds() - cpu


def _client(url: str, number: int, each: int, one: SyncClient, together: Any, cpus: Any = None) -> None:
    with Connection.connect(url, autocommit=True) as connection:
        for n in range(WARM):
            one(connection, n)
        together.wait()
        before = cpu_seconds()
        for n in range(number * each, (number + 1) * each):
            one(connection, n)
    if cpus is not None:
        cpus[number] = cpu_seconds() - before


def _threads(url: str, clients: int, each: int, one: SyncClient) -> tuple[float, float]:
    together = threading.Barrier(clients + 1)
    running = [threading.Thread(target=_client, args=(url, n, each, one, together)) for n in range(clients)]
    for thread in running:
        thread.start()
    together.wait()
    began, cpu = time.monotonic(), cpu_seconds()
    for thread in running:
        thread.join()
    return time.monotonic() - began, cpu_seconds() - cpu


def _processes(url: str, clients: int, each: int, one: SyncClient) -> tuple[float, float]:
    """Forked before anything is connected, as servers of web requests do it."""
    fork = multiprocessing.get_context("fork")
    together, cpus = fork.Barrier(clients + 1), fork.Array("d", clients)
    running = [fork.Process(target=_client, args=(url, n, each, one, together, cpus)) for n in range(clients)]
    for process in running:
        process.start()
    together.wait()
    began = time.monotonic()
    for process in running:
        process.join()
    seconds = time.monotonic() - began
    if any(process.exitcode for process in running):
        raise SystemExit("a client failed")
    return seconds, sum(cpus)
