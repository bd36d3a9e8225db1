"""Everything at once, from a seed: retries, dead letters, crashes at all steps, processes that come and go.

What is published or written in the handler's transaction must be there once for every event that was handled,
whatever the guarantee, and in the order of the key. A failing seed is repeated with `-k "seed-17"`.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from pathlib import Path

import pytest

from unlost import App, Context, Event, Reject, Retry, RetryLater, Service
from unlost.events import seal
from unlost.testing import Running, running
from unlost.testing.mortal import ProcessKilled

EVENTS = 150
KEYS = 12
STEPS = ("received", "started", "handled", "settling", "committing", "settled")


class Placed(Event, key="order_id", topic="order"):
    order_id: str
    n: int


class Billed(Event, key="order_id", topic="bill"):
    order_id: str
    n: int


async def tell(seed: int, schema: Path) -> None:
    rng = random.Random(seed)
    way = rng.choice(["publish", "transaction", "sync transaction"])
    guarantee = rng.choice(["at-least-once", "effectively-once"])
    service = Service(
        "s", guarantee=guarantee, on_dead="park", concurrency=rng.choice([1, 4, 32]),
        retry=Retry(attempts=50, first=rng.choice([0, 0.5, 20]), max=60),
    )  # fmt: skip
    mind = {n: rng.random() for n in range(EVENTS)}
    tries: Counter[int] = Counter()
    healed = False
    twice = rng.sample(range(EVENTS), 15) if guarantee == "effectively-once" else []

    def trouble(e: Placed) -> None:
        """Decides from the event and the number of calls, so that every handling of it comes to an end."""
        tries[e.n] += 1
        if mind[e.n] < 0.06 and not healed:
            raise Reject("not today")
        if mind[e.n] < 0.25 and tries[e.n] < 4:
            raise ValueError("again")
        if mind[e.n] < 0.35 and tries[e.n] < 3:
            raise RetryLater(after=rng.choice([0, 1, 30]))

    if way == "sync transaction":

        @service.on(Placed)
        def handle(e: Placed, ctx: Context) -> None:
            trouble(e)
            with ctx.transaction() as db:
                db.execute("insert into effect values (?, ?)", (e.order_id, e.n))
                ctx.publish(Billed(order_id=e.order_id, n=e.n))

    else:

        @service.on(Placed)
        async def handle_async(e: Placed, ctx: Context) -> None:
            await asyncio.sleep(0)
            trouble(e)
            if way == "publish":
                ctx.publish(Billed(order_id=e.order_id, n=e.n))
                return
            async with ctx.transaction() as db:
                await db.execute("insert into effect values (?, ?)", (e.order_id, e.n))
                ctx.publish(Billed(order_id=e.order_id, n=e.n))

    app = App(service, schema=schema)
    async with running(app, seed=seed) as t:
        for _ in range(rng.randrange(12)):
            t.crash(service, after=rng.choice(STEPS), times=1)

        async def publish() -> None:
            n = 0
            while n < EVENTS:
                size = min(rng.randrange(1, 30), EVENTS - n)
                batch = [
                    seal(Placed(order_id=f"k{i % KEYS}", n=i), source="web", id=f"e{i}", now=t.clock.now())
                    for i in range(n, n + size)
                ]
                await app.accept([copy for e in batch for copy in [e] * (2 if int(e.id[1:]) in twice else 1)])
                n += size
                await asyncio.sleep(rng.choice([0, 0.005]))

        publishing = asyncio.create_task(publish())
        for _ in range(rng.randrange(4)):
            await t.scale(rng.randrange(0, 4))
            t.advance(rng.choice([0, 1, 10]))
            await asyncio.sleep(rng.choice([0, 0.02]))
        await publishing
        await t.scale(rng.randrange(1, 3))
        await t.settled(40)
        healed = True
        rejected = {n for n in mind if mind[n] < 0.06}
        while letters := t.dead_letters():
            assert {letter.reason for letter in letters} == {"not today"}
            if rng.random() < 0.5:
                t.crash(service, after=rng.choice(STEPS), times=1)
            for letter in letters:
                await t.redrive(letter)
            await t.settled(40)
        check(t, way, rejected, twice)


def check(t: Running, way: str, rejected: set[int], twice: list[int]) -> None:
    billed = [(e.order_id, e.n) for e in t.published(Billed)]
    assert sorted(n for _, n in billed) == list(range(EVENTS)), f"{len(rejected)} were on the shelf for a while"
    for key in {key for key, _ in billed}:
        mine = [n for k, n in billed if k == key]
        assert mine == sorted(mine), key
    if way != "publish":
        rows = t.db("select id, n from effect order by rowid")
        assert sorted(n for _, n in rows) == list(range(EVENTS))
        for key in {key for key, _ in rows}:
            mine = [n for k, n in rows if k == key]
            assert mine == sorted(mine), key
    book = t.books.services["s"]
    assert (book.done, book.skipped.get("duplicate", 0)) == (EVENTS, len(twice))
    assert book.unaccounted == 0 and t.books.balanced


@pytest.mark.parametrize("seed", range(5), ids=lambda n: f"seed-{n}")
async def test_a_story(seed: int, tmp_path: Path) -> None:
    schema = tmp_path / "schema.sql"
    schema.write_text("create table if not exists effect (id text, n int)")
    await tell(seed, schema)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5, 100), ids=lambda n: f"seed-{n}")
async def test_more_stories(seed: int, tmp_path: Path) -> None:
    schema = tmp_path / "schema.sql"
    schema.write_text("create table if not exists effect (id text, n int)")
    await tell(seed, schema)


def test_a_killed_process_is_no_exception_that_handlers_catch() -> None:
    assert not issubclass(ProcessKilled, Exception)
