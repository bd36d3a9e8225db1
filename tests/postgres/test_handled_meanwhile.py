"""A handler's transaction begins without a look at the inbox. What was handled or taken over since its event came in must
be found at its end, and count neither as an attempt nor as a dead letter."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from pathlib import Path
from typing import Any

import psycopg
import pytest
from outbox_kit import SECONDS, Work, until

from unlost import App, Context, Event, Retry, Service
from unlost.store.postgres import migrate
from unlost.store.postgres.settings import parse

COPIES = 2


class Reported(Event, topic="report"):
    """Without a key: copies of one id may be handled side by side."""

    text: str


class Filed(Event, topic="file", key="text"):
    text: str


def books(url: str, service: str) -> dict[str, int]:
    with psycopg.connect(url) as connection:
        rows = connection.execute(
            "select counts from unlost.unlost_progress where service = %s and topic = 'report'", (service,)
        ).fetchall()
    total: dict[str, int] = {}
    for (counts,) in rows:
        for state, n in json.loads(counts).items():
            total[state] = total.get(state, 0) + n
    return total


def one(url: str, sql: str) -> Any:
    with psycopg.connect(url) as connection:
        row = connection.execute(sql).fetchone()
    assert row is not None
    return row[0]


@pytest.mark.parametrize("in_thread", [False, True], ids=["async", "sync"])
@pytest.mark.parametrize("unique", [False, True], ids=["by the mark", "by the user's own key"])
def test_two_copies_side_by_side(database: str, tmp_path: Path, in_thread: bool, unique: bool) -> None:
    """Both are in the handler before one of them has committed. One attempt only: a second one would hide a mistake."""
    migrate.migrate(parse(database))
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(f"create table filed (text text {'primary key' if unique else ''})")
    service = Service("archive", guarantee="effectively-once", retry=Retry(attempts=1))
    calls: list[int] = []
    together, inside = threading.Barrier(COPIES), asyncio.Semaphore(COPIES)

    def meet() -> None:
        if len(calls) <= COPIES:
            together.wait(SECONDS)

    if in_thread:

        @service.on(Reported)
        def file_in_thread(event: Reported, ctx: Context) -> None:
            calls.append(ctx.attempt)
            meet()
            with ctx.transaction() as db:
                db.execute("insert into filed values (?)", (event.text,))
                ctx.publish(Filed(text=event.text))

    else:

        @service.on(Reported)
        async def file_it(event: Reported, ctx: Context) -> None:
            calls.append(ctx.attempt)
            async with inside:
                await asyncio.to_thread(meet)
            async with ctx.transaction() as db:
                await db.execute("insert into filed values (?)", (event.text,))
                ctx.publish(Filed(text=event.text))

    url = f"embedded://{tmp_path / 'events.db'}"
    publisher = App(broker=url, store=database)
    with contextlib.closing(publisher), Work(App(service, broker=url, store=database)):
        for _ in range(COPIES):
            publisher.publish_sync(Reported(text="a"), id="report-a")
        until(lambda: sum(books(database, "archive").values()) == COPIES, "both have an outcome")
        until(lambda: one(database, "select count(*) from unlost.unlost_outbox") == 0, "the outbox is empty")
    assert books(database, "archive") == {"done": 1, "skipped:duplicate": 1}
    assert calls == [1, 1]
    assert one(database, "select count(*) from filed") == 1
    assert one(database, "select count(*) from unlost.unlost_shelf") == 0
    assert one(database, "select coalesce(sum(confirmed), 0) from unlost.unlost_relay") == 1, "events of the block"


async def test_a_unit_that_was_taken_over_writes_nothing(database: str, tmp_path: Path) -> None:
    """The epoch is read by the last statement of the transaction."""
    migrate.migrate(parse(database))
    with psycopg.connect(database, autocommit=True) as outside:
        outside.execute("create table filed (text text)")
        service = Service("archive", guarantee="effectively-once", retry=Retry(attempts=1))
        calls: list[str] = []

        @service.on(Reported)
        async def file_it(event: Reported, ctx: Context) -> None:
            calls.append(event.text)
            async with ctx.transaction() as db:
                await db.execute("insert into filed values (?)", (event.text,))
                if len(calls) == 1:
                    outside.execute("update unlost.unlost_progress set epoch = epoch + 1 where service = 'archive'")

        url = f"embedded://{tmp_path / 'events.db'}"
        async with App(service, broker=url, store=database) as app:
            await app.publish(Reported(text="a"))
            task = asyncio.create_task(app.serve())
            async with asyncio.timeout(SECONDS):
                while sum(books(database, "archive").values()) == 0:
                    await asyncio.sleep(0.01)
            app.stop()
            await task
        assert calls == ["a", "a"], "it was delivered again, under a new epoch"
        assert one(database, "select count(*) from filed") == 1
