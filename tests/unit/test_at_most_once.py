"""At most once: begun before it is handled, never repeated; what did not come to its end is counted and named."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from unlost import App, Context, Event, Reject, Retry, Service, UsageError
from unlost.delivery import worker as worker_module
from unlost.delivery.service import Guarantee
from unlost.events import seal
from unlost.events.partition import partition_of
from unlost.ops.shelf import letters
from unlost.store.records import FileRecords
from unlost.testing import running
from unlost.testing.mortal import Step

BOUND = 2 * worker_module.SWIFT_MAX  # of one partition


class Pinged(Event, key="host", topic="ping"):
    host: str
    n: int = 0


class Seen(Event, key="host", topic="seen"):
    host: str
    n: int


class Counted(Event, key="host", topic="ping"):
    host: str
    n: int


def in_partition(number: int) -> str:
    names = (f"h{n}" for n in range(1000))
    return next(name for name in names if partition_of(name.encode(), 8) == number)


def pings(count: int, hosts: int = 6) -> list[Event]:
    return [Pinged(host=f"h{n % hosts}", n=n) for n in range(count)]


@pytest.mark.parametrize("step", ["received", "started", "handled", "settling", "settled"])
@pytest.mark.parametrize("publishes", [False, True])
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a handler that gets everything"])
async def test_a_crash_at_any_step_repeats_nothing_and_names_what_it_cut_off(
    step: Step, publishes: bool, beside: bool
) -> None:
    service, seen = Service("s", guarantee="at-most-once"), Counter[int]()

    if publishes:

        @service.on(Pinged)
        async def handle(e: Pinged, ctx: Context) -> None:
            seen[e.n] += 1
            ctx.publish(Seen(host=e.host, n=e.n))

    else:

        @service.on(Pinged)
        async def count(e: Pinged) -> None:
            seen[e.n] += 1

    if beside:

        @service.on(Counted, guarantee="at-least-once")
        async def other(e: Counted) -> None:
            await asyncio.sleep(0)

    async with running(App(service)) as t:
        t.crash(service, after=step, times=4)
        await t.publish_all(pings(600, hosts=50))
        if beside:
            await t.publish_all([Counted(host=f"h{n}", n=n) for n in range(6)])
        await t.settled()
        assert 1 <= t.deaths(service) <= 4
        book = t.books.services["s"]
        assert set(seen.values()) <= {1}, "something was handled twice"
        assert book.done + book.abandoned == 600 + (6 if beside else 0) and t.books.unaccounted == 0
        named = {m.position for m in t.books.abandoned}
        assert len(t.books.abandoned) == book.abandoned <= 4 * 8 * BOUND and (named or not book.abandoned)
        assert 600 - len(seen) <= book.abandoned, "an event was lost without a name"
        if publishes:
            assert {e.n for e in t.published(Seen)} <= set(seen)


async def test_a_failure_is_not_tried_again_and_holds_nobody_up() -> None:
    service, seen = Service("s", guarantee="at-most-once", retry=Retry(attempts=9)), []

    @service.on(Pinged)
    async def handle(e: Pinged) -> None:
        seen.append(e.n)
        if e.n % 5 == 1:
            raise ConnectionError("away")
        if e.n % 5 == 2:
            raise Reject("never")

    async with running(App(service)) as t:
        await t.publish_all(pings(20, hosts=1))
        await t.settled()
        assert seen == list(range(20)), "each once, and in the order of the key"
        book = t.books.services["s"]
        assert (book.done, book.abandoned, book.dead, book.parked) == (12, 4, 4, 0)
        assert [m.position for m in t.books.abandoned] == [1, 6, 11, 16]
        shelved = letters(FileRecords(t.app.file))
        assert [(letter.reason, letter.error, letter.parks) for letter in shelved] == [("rejected", "never", False)] * 4


async def test_what_it_does_not_want_is_skipped_and_what_it_cannot_read_is_dead() -> None:
    service, seen = Service("s", guarantee="at-most-once"), []

    @service.on(Pinged, where=lambda e: e.n % 2 == 0)
    async def handle(e: Pinged) -> None:
        seen.append(e.n)

    async with running(App(service)) as t:
        await t.publish_all(pings(10))
        good = seal(Pinged(host="h", n=1), source="web", id="bad", now=1_700_000_000_000_000)
        await t.app.accept([msgspec.structs.replace(good, data=b'{"host": 7}')])
        await t.settled()
        book = t.books.services["s"]
        assert sorted(seen) == [0, 2, 4, 6, 8] and book.skipped == {"where": 5} and (book.done, book.dead) == (5, 1)


async def test_handlers_that_wait_run_side_by_side_once_that_is_known() -> None:
    service, at_once, most = Service("s", guarantee="at-most-once", concurrency=16), 0, 0

    @service.on(Pinged)
    async def handle(e: Pinged) -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0.02)
        at_once -= 1

    async with running(App(service)) as t:
        await t.publish_all(pings(400, hosts=100))
        await t.settled()
        assert t.books.services["s"].done == 400
        assert most > 8, "as many as there are partitions, and no more"


async def test_a_busy_partition_does_not_keep_the_only_runner() -> None:
    service, seen = Service("s", guarantee="at-most-once", concurrency=1), []

    @service.on(Pinged)
    async def handle(e: Pinged) -> None:
        seen.append(e.n)
        await asyncio.sleep(0)  # meanwhile more of it comes in

    async with running(App(service)) as t:
        await t.scale(0, "s")
        await t.publish_all([Pinged(host=in_partition(0), n=0)] * 4000)
        await t.publish(Pinged(host=in_partition(7), n=1))
        await t.scale(1, "s")
        await t.settled()
        assert len(seen) == 4001 and seen.index(1) < 2000


async def test_a_clean_stop_abandons_nothing() -> None:
    service, seen = Service("s", guarantee="at-most-once"), Counter[int]()
    enough = asyncio.Event()

    @service.on(Pinged)
    async def handle(e: Pinged) -> None:
        seen[e.n] += 1
        if len(seen) == 500:
            enough.set()
        if len(seen) % 50 == 0:
            await asyncio.sleep(0)

    async with running(App(service)) as t:
        await t.publish_all(pings(3000, hosts=50))
        await enough.wait()
        await t.scale(0, "s")
        book = t.books.services["s"]
        assert book.abandoned == 0 and book.in_flight == 0 and book.done == len(seen)
        await t.scale(2, "s")
        await t.settled()
        assert t.books.services["s"].done == 3000 and set(seen.values()) == {1}


async def test_the_handlers_own_transaction_ends_it(tmp_path: Path) -> None:
    (tmp_path / "schema.sql").write_text("create table if not exists seen (n integer primary key);")
    service = Service("s", guarantee="at-most-once")

    @service.on(Pinged)
    async def handle(e: Pinged, ctx: Context) -> None:
        async with ctx.transaction() as db:
            await db.execute("insert into seen values (?)", (e.n,))
            ctx.publish(Seen(host=e.host, n=e.n))
            if e.n == 3:
                raise ValueError("no")

    async with running(App(service, schema=tmp_path / "schema.sql")) as t:
        await t.publish_all(pings(10))
        await t.settled()
        book = t.books.services["s"]
        assert (book.done, book.abandoned) == (9, 1)
        rows = t.db("select n from seen order by n")
        assert [n for (n,) in rows] == [0, 1, 2, 4, 5, 6, 7, 8, 9] and len(t.published(Seen)) == 9


def test_a_retry_policy_of_its_own_is_refused() -> None:
    service = Service("s")
    with pytest.raises(UsageError, match="UL1216") as refused:
        service.on(Pinged, guarantee="at-most-once", retry=Retry(attempts=3))(lambda e: None)
    assert "at-least-once" in str(refused.value)


async def test_handlers_in_threads_and_events_that_waited_before() -> None:
    """A service that was at least once, with an event in the waiting room, becomes at most once."""
    seen, away = [], True

    def service(guarantee: Guarantee) -> Service:
        made = Service("s", guarantee=guarantee, retry=Retry(attempts=9, first=600, max=600, jitter=0))

        @made.on(Pinged)
        def handle(e: Pinged) -> None:
            seen.append(e.n)
            if away:
                raise ConnectionError("away")

        return made

    async with running(App(service("at-least-once"))) as t:
        await t.publish(Pinged(host="h", n=1))
        await t.until(lambda: t.db("select count(*) from unlost_waiting") == [(1,)])
        await t.publish(Pinged(host="h", n=2))
        await t.until(lambda: t.db("select count(*) from unlost_waiting") == [(2,)])
        await t.scale(0, "s")
        away = False
        t.app.services = (service("at-most-once"),)
        await t.scale(1, "s")
        await t.publish(Pinged(host="h", n=3))
        await t.settled()
        assert seen == [1, 1, 2, 3] and t.books.services["s"].done == 3
