"""With the store in PostgreSQL: what leaves later, and handlers that get their events at most once."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import psycopg
import pytest
from outbox_kit import Work, until

from unlost import App, Command, Context, Event, Service, UsageError
from unlost.events.topic import Arrival, Unit
from unlost.store.port import Outcome, Settlement
from unlost.store.postgres import migrate, rows, schema
from unlost.store.postgres.settings import parse
from unlost.store.postgres.store import PostgresStore
from unlost.testing.postgres_rig import postgres_at


class Placed(Event, key="order_id", topic="order"):
    order_id: str


class Remind(Command, queue="reminders", key="order_id"):
    order_id: str


class Pinged(Event, key="host", topic="ping"):
    host: str
    n: int


def one(url: str, sql: str) -> Any:
    with psycopg.connect(url) as connection:
        row = connection.execute(sql).fetchone()
    assert row is not None
    return row[0]


@pytest.mark.parametrize("in_transaction", [False, True])
def test_what_leaves_later(database: str, tmp_path: Path, in_transaction: bool) -> None:
    migrate.migrate(parse(database))
    service, seen = Service("shop", guarantee="effectively-once"), list[str]()

    @service.on(Placed)
    async def place(e: Placed, ctx: Context) -> None:
        if in_transaction:
            async with ctx.transaction() as db:
                await db.execute("select 1")
                ctx.send(Remind(order_id=e.order_id), delay=0.2)
        else:
            ctx.send(Remind(order_id=e.order_id), delay=0.2)

    @service.on(Remind)
    async def remind(c: Remind) -> None:
        seen.append(c.order_id)

    url = f"embedded://{tmp_path / 'events.db'}"
    app = App(service, broker=url, store=database)
    web = App(broker=url, store=database, name="web")
    with contextlib.closing(web), Work(app):
        with psycopg.connect(database) as connection:
            with connection.transaction(), web.outbox(connection) as outbox:
                outbox.publish(Placed(order_id="a"))
                outbox.publish(Placed(order_id="b"), delay=0.3)
                taken_back = outbox.publish(Placed(order_id="c"), delay=3600, id="place-c")
            with pytest.raises(RuntimeError), connection.transaction(), web.outbox(connection) as outbox:
                outbox.publish(Placed(order_id="d"), delay=0.1)
                raise RuntimeError("rolled back")
        assert taken_back == "place-c" and web.cancel_sync("place-c") and not web.cancel_sync("place-c")
        until(lambda: sorted(seen) == ["a", "b"], "both reminders")
        until(lambda: one(database, "select count(*) from unlost.unlost_outbox") == 0, "the outbox is empty")
    assert one(database, "select count(*) from unlost.unlost_delayed") == 0
    assert one(database, "select count(*) from unlost.unlost_operation where action = 'cancel'") == 1


def test_at_most_once(database: str, tmp_path: Path) -> None:
    migrate.migrate(parse(database))
    service, seen = Service("map", guarantee="at-most-once"), list[int]()

    @service.on(Pinged)
    async def draw(e: Pinged) -> None:
        seen.append(e.n)
        if e.n == 7:
            raise ConnectionError("away")

    url = f"embedded://{tmp_path / 'events.db'}"
    publisher = App(broker=url, store=database)
    with contextlib.closing(publisher), Work(App(service, broker=url, store=database)):
        for n in range(40):
            publisher.publish_sync(Pinged(host=f"h{n % 5}", n=n))
        until(lambda: one(database, "select sum(position) from unlost.unlost_progress") == 40, "all are begun")
        until(lambda: one(database, "select sum(length(begun)) from unlost.unlost_progress") == 0, "all have ended")
    assert sorted(seen) == list(range(40))
    with psycopg.connect(database) as connection:
        counts = connection.execute("select counts from unlost.unlost_progress where topic = 'ping'").fetchall()
        listed = connection.execute("select state from unlost.unlost_ledger").fetchall()
    assert sum(json.loads(text).get("done", 0) for (text,) in counts) == 39 and listed == [("abandoned",)]


def test_tables_of_the_first_format_are_brought_up_to_date(database: str, tmp_path: Path) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("create schema unlost")
        connection.execute(schema.CREATE.format(s=schema.quoted("unlost")))
        connection.execute("insert into unlost.unlost_meta values ('format', '1'), ('store_id', 'the-first')")
        connection.execute(
            "insert into unlost.unlost_progress (service, topic, partition, topic_id, start, start_digest, position, fated, "
            "counts, digest) values ('old', 'ping', 0, 'x', 0, 0, 0, '', '{}', 0)"
        )
    with pytest.raises(UsageError, match="UL1159"):
        App(broker=f"embedded://{tmp_path / 'events.db'}", store=database).publish_sync(Pinged(host="a", n=1))
    assert (
        migrate.migrate(parse(database)) == (1, schema.FORMAT) and migrate.migrate(parse(database))[0] == schema.FORMAT
    )
    assert one(database, "select value from unlost.unlost_meta where name = 'store_id'") == "the-first"
    assert one(database, "select begun from unlost.unlost_progress where service = 'old'") == b""
    with contextlib.closing(App(broker=f"embedded://{tmp_path / 'events.db'}", store=database)) as app:
        receipt = app.publish_sync(Pinged(host="a", n=1), delay=60)
    assert receipt.due and one(database, "select count(*) from unlost.unlost_delayed") == 1


async def test_whether_a_commit_of_what_was_begun_is_there(database: str) -> None:
    """Its answer was lost: the rows say whether it happened, so that it is not settled twice, and not left out."""
    migrate.migrate(parse(database))
    async with postgres_at(database) as rig:
        info = await rig.declare("ping", 1)
        unit = Unit("map", "ping", 0)
        await rig.store.register("map", {"on_dead": "park"}, [info])
        (taken,) = await rig.store.take([unit])

        async def there(settlement: Settlement) -> bool:
            assert isinstance(rig.store, PostgresStore)
            return await rig.store.client.read(rows.happened([settlement]))

        begun = Settlement(unit, taken.epoch, [], begun=[0, 1, 2], begun_digest=7)
        ended = Settlement(unit, taken.epoch, [], ended=[0])
        failed = Settlement(
            unit, taken.epoch, [Outcome(arrival=Arrival(1, None, 0, b"", None, None), state="abandoned", begun=True)]
        )
        for settlement in (begun, ended, failed):
            assert not await there(settlement)
            assert list(await rig.store.settle([settlement])) == []
            assert await there(settlement)
