"""A neighbour's outbox on PostgreSQL, for information. Runs under `.venv-bench`, which has it and not unlost.

faststream-outbox relays to Kafka as its documentation shows (a stacked decorator). The clock runs from the start of the
broker until its table is empty: a row leaves it when Kafka has confirmed the event.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from importlib.metadata import version
from typing import Any

from faststream.kafka import KafkaBroker
from faststream_outbox import OutboxBroker, make_outbox_table
from sqlalchemy import MetaData, func, select
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

DEADLINE_SECONDS = 120.0
NOTE = "x" * 128
SETTINGS = {
    # max_workers, fetch_batch_size, terminal_flush_batch_size
    "ordered": (1, 1000, 100, "max_workers=1, which keeps the order; terminal_flush_batch_size=100"),
    "parallel": (16, 1000, 100, "max_workers=16, which gives the order up; terminal_flush_batch_size=100"),
}


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def measure(url: str, bootstrap: str, topic: str, total: int, kind: str) -> dict[str, Any]:
    workers, fetch, flush, text = SETTINGS[kind]
    metadata = MetaData()
    table = make_outbox_table(metadata, table_name=f"faststream_{kind}")
    engine = create_async_engine(url.replace("postgresql://", "postgresql+asyncpg://"), pool_size=workers + 2)
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
    broker = OutboxBroker(engine, outbox_table=table, logger=None)
    kafka = KafkaBroker(bootstrap, acks="all", enable_idempotence=True, logger=None)
    publisher = kafka.publisher(topic)

    @publisher
    @broker.subscriber("orders", max_workers=workers, fetch_batch_size=fetch, terminal_flush_batch_size=flush)
    async def relay(body: dict[str, Any]) -> dict[str, Any]:
        return body

    await kafka.connect()
    await broker.connect()
    for first in range(0, total, 1000):
        async with AsyncSession(engine) as session, session.begin():
            for n in range(first, min(first + 1000, total)):
                order = {
                    "order_id": f"o-{n % 1000:04d}",
                    "customer": f"c-{n % 700:06d}",
                    "cents": 10**9 + n,
                    "note": NOTE,
                }
                await broker.publish(order, queue="orders", session=session)
    began, cpu = time.monotonic(), cpu_seconds()
    await kafka.start()
    await broker.start()
    async with engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        while await connection.scalar(select(func.count()).select_from(table)):
            if time.monotonic() - began > DEADLINE_SECONDS:
                raise SystemExit(f"not done in {DEADLINE_SECONDS:g} s")
            await asyncio.sleep(0.01)
    seconds, cpu = time.monotonic() - began, cpu_seconds() - cpu
    await broker.stop()
    await kafka.stop()
    await engine.dispose()
    return {
        "name": "faststream-outbox", "version": version("faststream-outbox"), "events": total, "seconds": seconds,
        "cpu": cpu, "settings": f"fetch_batch_size={fetch}, {text}; Kafka with acks=all and idempotence",
    }  # fmt: skip


def main() -> None:
    url, bootstrap, topic, total, kind = sys.argv[1:]
    result = asyncio.run(measure(url, bootstrap, topic, int(total), kind))
    sys.stdout.write("\n" + json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
