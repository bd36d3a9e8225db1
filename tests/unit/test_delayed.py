"""Events and commands that leave later: never early, never lost, never twice; and taken back in time."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from unlost import App, Command, Context, Event, OutcomeUnknown, Service, UsageError
from unlost.delivery.later import Releaser, due_of
from unlost.ops.connect import opened
from unlost.store.sqlite import SqliteStore
from unlost.testing import running
from unlost.world import REAL, World


class Placed(Event, key="order_id", topic="order"):
    order_id: str


class Reminded(Event, key="order_id", topic="reminder"):
    order_id: str
    n: int = 0


class SendReceipt(Command, queue="receipts", key="order_id"):
    order_id: str
    n: int = 0


def counting() -> tuple[App, list[tuple[str, int]]]:
    service, seen = Service("s"), []

    @service.on(Reminded)
    async def note(e: Reminded) -> None:
        seen.append(("reminded", e.n))

    @service.on(SendReceipt)
    async def receipt(c: SendReceipt) -> None:
        seen.append(("receipt", c.n))

    return App(service), seen


async def test_it_leaves_when_its_time_has_come_and_not_before() -> None:
    app, seen = counting()
    async with running(app) as t:
        start = t.clock.now()
        later = await t.publish(Reminded(order_id="a", n=3), delay=3600)
        at = datetime.fromtimestamp(start / 1e6, UTC) + timedelta(seconds=60)
        await t.send(SendReceipt(order_id="a", n=1), at=at)
        await t.publish(Reminded(order_id="a", n=0))
        await t.publish(Reminded(order_id="a", n=2), delay=timedelta(minutes=2))
        assert later.due == start + 3_600_000_000 and (later.partition, later.position) == (-1, -1)
        await t.until(lambda: ("reminded", 0) in seen)
        t.advance(59.999)
        assert await t.app.store.release() == 0 and seen == [("reminded", 0)], "a millisecond early is too early"
        t.advance(0.001)
        await t.until(lambda: ("receipt", 1) in seen)
        assert seen == [("reminded", 0), ("receipt", 1)]
        await t.settled()
        assert seen == [("reminded", 0), ("receipt", 1), ("reminded", 2), ("reminded", 3)]
        assert t.clock.now() >= start + 3_600_000_000
        assert t.books.services["s"].done == 4


async def test_what_a_handler_delays_leaves_with_its_success_and_can_be_cancelled() -> None:
    service, seen, ids = Service("s"), [], {}
    attempts = 0

    @service.on(Placed)
    async def place(e: Placed, ctx: Context) -> None:
        nonlocal attempts
        attempts += 1
        ids[e.order_id] = ctx.publish(Reminded(order_id=e.order_id), delay=600)
        ctx.send(SendReceipt(order_id=e.order_id), delay=10)
        if attempts == 1:
            raise ValueError("once more")

    @service.on(Reminded)
    async def note(e: Reminded) -> None:
        seen.append(e.order_id)

    @service.on(SendReceipt)
    async def receipt(c: SendReceipt, ctx: Context) -> None:
        seen.append(f"receipt {c.order_id}")
        if c.order_id == "b":
            assert await app.cancel(ids["b"], source="s")
            assert not await app.cancel(ids["b"], source="s"), "twice"
            assert not await app.cancel(ids["a"]), "that one is of the service, not of the app"

    app = App(service)
    async with running(app) as t:
        await t.publish(Placed(order_id="a"))
        await t.publish(Placed(order_id="b"))
        await t.settled()
        assert sorted(seen) == ["a", "receipt a", "receipt b"] and attempts == 3
        rows = t.app.file.read(lambda c: c.execute("select operator, action, id from unlost_operation").fetchall())
        assert rows == [("s", "cancel", ids["b"])], "no event ends without being written down"
        assert [e.id for e in t.envelopes(Reminded)] == [ids["a"]], "it keeps its id"


async def test_the_same_id_twice_is_one_and_a_cancelled_one_may_be_sent_again() -> None:
    app, seen = counting()
    async with running(app) as t:
        for n in (1, 2):
            await t.send(SendReceipt(order_id="a", n=n), id="receipt-a", delay=10)
        await t.settled()
        assert seen == [("receipt", 1)]
        receipt = await t.send(SendReceipt(order_id="a", n=3), id="receipt-b", delay=10)
        assert await app.cancel(receipt) and not await app.cancel(receipt)
        await t.send(SendReceipt(order_id="a", n=4), id="receipt-b", delay=20)
        await t.settled()
        assert seen == [("receipt", 1), ("receipt", 4)]
        assert not await app.cancel("receipt-b"), "it has left"


class Jumping(World):
    """A machine whose clock on the wall is set while the program runs."""

    jumped = 0

    def now(self) -> int:
        return super().now() + self.jumped


@pytest.mark.parametrize("hours", [-5, 5])
async def test_a_clock_that_is_set_moves_a_time_and_not_a_span(tmp_path: Path, hours: int) -> None:
    world, url = Jumping(), f"embedded://{tmp_path}/events.db"
    app = App(broker=url, world=world)
    async with app:
        wall = datetime.fromtimestamp(world.now() / 1e6, UTC)
        await app.publish(Reminded(order_id="span"), delay=3 * 3600)
        await app.publish(Reminded(order_id="time"), at=wall + timedelta(hours=3))
        world.jumped = hours * 3_600_000_000
        due = await app.store.next_due()
        assert due is not None
        left = (due - world.steady()) / 3.6e9
        assert await app.store.release() == (1 if hours > 0 else 0)
        assert left == pytest.approx(-2 if hours > 0 else 3, abs=0.01)
        released = app.file.read(lambda c: [key for (key,) in c.execute("select key from unlost_log")])
        assert released == [] or released == [b"time"]


DIE = """
import asyncio, os, signal, sys
from pathlib import Path
sys.path.insert(0, {folder!r})
from test_delayed import Reminded
from unlost import App
from unlost.sqlite.transaction import Transaction
from unlost.sqlite.marks import Marks

def die(*a):
    os.kill(os.getpid(), signal.SIGKILL)

if {where!r} == "in the commit":
    Transaction.append = die

async def main():
    async with App(broker={url!r}) as app:
        if {where!r} == "accepted":
            for n in range(5):
                await app.publish(Reminded(order_id="a", n=n), id=f"r-{{n}}", delay=0.01 * n)
            die()
        if {where!r} == "after the commit":
            Marks.write = die
        while True:
            await app.store.release()
asyncio.run(main())
"""


def test_it_survives_kill_9_of_whoever_accepted_or_releases_it(tmp_path: Path) -> None:
    url = f"embedded://{tmp_path}/events.db"

    def lives(where: str) -> int:
        code = DIE.format(folder=str(Path(__file__).parent), url=url, where=where)
        return subprocess.run([sys.executable, "-c", code], timeout=60).returncode

    def places() -> tuple[list[str], list[str]]:
        with opened(url) as here:
            delayed = here.records.read(
                lambda look: look.execute("select id from unlost_delayed order by due").fetchall()
            )
            (topic,) = [t for t in here.log.topics(None) if t.name == "reminder"] or [None]
            ranges = topic.ranges if topic is not None else []
            log = [a for p, (start, _) in enumerate(ranges) for a in here.log.read("reminder", p, start, 100)]
            return [id for (id,) in delayed], [a.envelope.id for a in log if a.envelope]

    ids = [f"r-{n}" for n in range(5)]
    assert lives("accepted") == -9 and places() == (ids, [])
    assert lives("in the commit") == -9 and places() == (ids, [])
    assert lives("after the commit") == -9
    delayed, log = places()
    assert sorted(delayed + log) == ids and log == ids[: len(log)], "in one of the places, in the order of their times"

    async def rest() -> None:
        async with App(broker=url) as app:
            await app.store.release()

    asyncio.run(rest())
    assert places() == ([], ids)


async def test_two_who_release_at_once_release_each_once(tmp_path: Path) -> None:
    url = f"embedded://{tmp_path}/events.db"
    async with App(broker=url) as one, App(broker=url) as two:
        for n in range(200):
            await one.publish(Reminded(order_id=f"o{n % 7}", n=n), delay=0)
        tasks = [asyncio.create_task(Releaser(a.store, REAL, poll_seconds=0.001).run()) for a in (one, two)]
        while await one.store.next_due() is not None:
            await asyncio.sleep(0.001)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert one.file.read(lambda c: c.execute("select count(*) from unlost_log").fetchone()) == (200,)


async def test_a_store_that_fails_for_a_moment_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    app, seen = counting()
    release, failures = SqliteStore.release, 0

    async def failing(self: SqliteStore) -> int:
        nonlocal failures
        failures += 1
        if failures == 1:
            raise OutcomeUnknown("UL2020", "nobody can say whether it was released")
        return await release(self)

    monkeypatch.setattr(SqliteStore, "release", failing)
    monkeypatch.setattr("unlost.delivery.later.AGAIN_SECONDS", 0.001)
    async with running(app) as t:
        await t.publish(Reminded(order_id="a", n=7), delay=60)
        await t.settled()
        assert seen == [("reminded", 7)] and failures > 1


@pytest.mark.parametrize(
    ("delay", "at", "code"),
    [
        (1, datetime(2030, 1, 1, tzinfo=UTC), "UL1280"),
        (None, datetime(2030, 1, 1), "UL1281"),
        (None, "tomorrow", "UL1281"),
        (-1, None, "UL1282"),
        ("5m", None, "UL1282"),
        (float("nan"), None, "UL1282"),
        (True, None, "UL1282"),
        (1e12, None, "UL1283"),
        (None, datetime(9999, 1, 1, tzinfo=UTC), "UL1283"),
    ],
)
def test_what_is_no_time_to_wait_for_is_refused(delay: object, at: object, code: str) -> None:
    with pytest.raises(UsageError, match=code):
        due_of(REAL, delay, at)  # type: ignore[arg-type]


async def test_what_could_never_be_accepted_is_refused_before_it_waits(tmp_path: Path) -> None:
    async with App(broker=f"embedded://{tmp_path}/events.db") as app:
        with pytest.raises(UsageError, match="UL1247"):
            await app.send(SendReceipt(order_id="a"), delay=10)
        with pytest.raises(UsageError, match="UL1285"):
            await app.cancel(None)  # type: ignore[arg-type]
        assert await app.store.next_due() is None
