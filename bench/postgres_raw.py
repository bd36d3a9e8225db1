"""The raw loops on PostgreSQL: psycopg, the same statements and rows, and the broker's own API below the relay's.

They do none of our other work. Each has its own tables, with the columns and indexes of ours (`postgres_shared.TABLES`),
and works on the rows that unlost has just written there, or on the events of the same log.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import msgspec
from common import OrderPlaced, Stopwatch, answer
from postgres_shared import BILL, BUSINESS, billed, business, drive
from psycopg import AsyncConnection, Connection
from psycopg_pool import AsyncConnectionPool

from unlost.brokers.connect import connect
from unlost.events import Envelope
from unlost.events.topic import Topic

BATCH = 1000  # of the relay: as ours
COLUMNS = (
    "shard", "aggregatetype", "aggregateid", "id", "type", "payload", "ce_source", "ce_time", "ce_subject", "ce_partitionkey",
    "ce_correlationid", "ce_causationid", "ce_traceparent", "ce_tracestate", "ce_unlostversion", "headers", "rawkey",
)  # fmt: skip
_NAMES = ", ".join(COLUMNS)
_AS_TEXT = _NAMES.replace("payload", "payload::text").replace("headers", "headers::text")
INSERT_OUTBOX = f"insert into raw_outbox ({_NAMES}) values ({', '.join(['%s'] * len(COLUMNS))})"
ROWS = f"select {_AS_TEXT} from unlost.unlost_outbox order by seq limit %s"


async def one_row(connection: AsyncConnection[Any]) -> tuple[Any, ...]:
    row = await (await connection.execute(ROWS, (1,))).fetchone()
    assert row is not None
    return tuple(row)


# --- publishing --------------------------------------------------------------------------------------------------


def measure_publish(url: str, kind: str, clients: int, total: int) -> None:
    """The user's transaction with one plain insert more: the rows are ready-made."""
    with Connection.connect(url, autocommit=True) as connection:
        rows = connection.execute(ROWS, (total,)).fetchall()

    def sync(connection: Connection[Any], n: int) -> None:
        with connection.transaction():
            connection.execute(BUSINESS, business(n))
            connection.execute(INSERT_OUTBOX, rows[n % len(rows)])

    async def asynchronous(connection: AsyncConnection[Any], n: int) -> None:
        async with connection.transaction():
            await connection.execute(BUSINESS, business(n))
            await connection.execute(INSERT_OUTBOX, rows[n % len(rows)])

    answer(drive(kind, url, clients, total, sync, asynchronous))


# --- relaying ----------------------------------------------------------------------------------------------------


def envelope_of(row: tuple[Any, ...]) -> Envelope:
    (_, topic, key, id, type, data, source, time, subject, partitionkey, correlation, cause, parent, state, version, _, _) = (
        row
    )  # fmt: skip
    return Envelope(
        id=id, source=source, type=type, time=time, topic=topic, key=key.encode(), data=data.encode(), subject=subject,
        partitionkey=partitionkey, correlationid=correlation, causationid=cause, traceparent=parent, tracestate=state,
        eventversion=version,
    )  # fmt: skip


async def measure_relay(url: str, broker_url: str, total: int) -> None:
    """Claim, publish with confirmation, delete, commit: a transaction that is open while the broker works."""
    broker, file = connect(broker_url, store_elsewhere=True)
    await broker.open()
    await broker.declare([Topic("order")])
    claim = f"select seq, {_AS_TEXT} from raw_outbox order by seq limit {BATCH} for update skip locked"
    count = 0
    async with await AsyncConnection.connect(url, autocommit=True) as connection:
        watch = Stopwatch()
        while True:
            async with connection.transaction():
                rows = await (await connection.execute(claim)).fetchall()
                if not rows:
                    break
                await broker.publish([envelope_of(row[1:]) for row in rows])
                await connection.execute("delete from raw_outbox where seq = any(%s)", ([row[0] for row in rows],))
            count += len(rows)
        result: dict[str, Any] = watch.stop()
    if count != total:
        raise SystemExit(f"{count} of {total} events")
    await broker.close()
    if file is not None:
        file.close()
    answer(result | {"events": total})


# --- effectively-once handlers -----------------------------------------------------------------------------------

ENTER = (
    "select p.epoch, i.content from raw_progress p "
    "left join raw_inbox i on i.service = %s and i.source = %s and i.id = %s "
    "where p.service = %s and p.topic = %s and p.partition = %s"
)
MARK = "insert into raw_inbox (content, position, unit, service, source, id) values (%s, %s, %s, %s, %s, %s)"


async def events_of(broker_url: str, total: int) -> list[tuple[int, int, Envelope]]:
    """The last events of the log, partition by partition, with their places."""
    broker, file = connect(broker_url, store_elsewhere=True)
    await broker.open()
    (info,) = await broker.topics(["order"])
    found = []
    for partition, (start, end) in enumerate(info.ranges):
        position = start
        while position < end:
            arrivals = await broker.read("order", partition, position, 1000)
            found += [(partition, a.position, a.envelope) for a in arrivals if a.envelope is not None]
            position = arrivals[-1].position + 1
    await broker.close()
    if file is not None:
        file.close()
    return found[-total:]


async def measure_once(url: str, broker_url: str, concurrency: int, total: int) -> None:
    """What somebody would write by hand, statement by statement."""
    events = await events_of(broker_url, total)
    decode = msgspec.json.Decoder(OrderPlaced).decode
    async with (
        AsyncConnectionPool(url, min_size=concurrency, open=False, kwargs={"autocommit": True}) as pool,
        await AsyncConnection.connect(url, autocommit=True) as connection,
    ):
        await pool.wait()
        await connection.execute("truncate raw_progress, raw_outbox")
        await connection.execute(
            "insert into raw_progress overriding system value select * from unlost.unlost_progress"
        )
        cursor = await connection.execute(
            "select partition, number, epoch from raw_progress where service = 'billing' and topic = 'order'"
        )
        units = {partition: (number, epoch) for partition, number, epoch in await cursor.fetchall()}
        await connection.execute("delete from raw_inbox where position >= 0")
        queue = iter(events)

        async def worker() -> None:
            for partition, position, e in queue:
                event, (unit, epoch), id = decode(e.data or b""), units[partition], bytes.fromhex(e.id.replace("-", ""))
                async with pool.connection() as c, c.transaction():
                    cursor = await c.execute(ENTER, ("billing", e.source, id, "billing", "order", partition))
                    row = await cursor.fetchone()
                    if row is None or row[0] != epoch or row[1] is not None:
                        raise SystemExit(f"not ours, or handled before: {row}")
                    await c.execute(BILL, (event.order_id, event.cents))
                    await c.execute(MARK, (0, position, unit, "billing", e.source, id))
                    data = msgspec.json.encode(billed(event)).decode()
                    await c.execute(
                        INSERT_OUTBOX,
                        (
                            position % 16, "bill", event.order_id, e.id, "order.billed", data, "billing", e.time, event.order_id,
                            None, e.id, e.id, None, None, 1, None, None,
                        ),
                    )  # fmt: skip

        watch = Stopwatch()
        await asyncio.gather(*(worker() for _ in range(concurrency)))
        result: dict[str, Any] = watch.stop()
        found = await (await connection.execute("select count(*) from raw_inbox where position >= 0")).fetchone()
        if found is None or found[0] != total:
            raise SystemExit(f"{found} of {total} marks")
    answer(result | {"events": total})


def main() -> None:
    mode, url, *rest = sys.argv[1:]
    if mode == "publish":
        measure_publish(url, rest[0], int(rest[1]), int(rest[2]))
    elif mode == "relay":
        asyncio.run(measure_relay(url, rest[0], int(rest[1])))
    elif mode == "once":
        asyncio.run(measure_once(url, rest[0], int(rest[1]), int(rest[2])))
    else:
        raise SystemExit(f"no such mode: {mode}")


if __name__ == "__main__":
    main()
