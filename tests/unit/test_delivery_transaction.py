"""`ctx.transaction()`: rows, events and the mark "handled" in one commit, or nothing of it."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from unlost import App, Context, Event, Retry, Service, UsageError
from unlost.delivery.service import Guarantee
from unlost.testing import running
from unlost.testing.mortal import Step

GUARANTEES = pytest.mark.parametrize("guarantee", ["at-least-once", "effectively-once"])


class Placed(Event, key="order_id", topic="order"):
    order_id: str
    n: int = 0


class Paid(Event, key="order_id", topic="payment"):
    order_id: str


@pytest.fixture
def schema(tmp_path: Path) -> Path:
    path = tmp_path / "schema.sql"
    path.write_text("create table if not exists payment (id text, n int)")
    return path


PAY = "insert into payment values (?, ?)"
ALL = "select id, n from payment order by rowid"


@GUARANTEES
async def test_rows_and_events_are_committed_together(schema: Path, guarantee: Guarantee) -> None:
    service = Service("s", guarantee=guarantee)

    @service.on(Placed)
    async def pay(e: Placed, ctx: Context) -> None:
        async with ctx.transaction() as db:
            assert await db.execute("select count(*) from payment") is not None
            await db.execute(PAY, (e.order_id, e.n))
            ctx.publish(Paid(order_id=e.order_id))

    async with running(App(service, schema=schema)) as t:
        await t.publish_all([Placed(order_id=f"o{n % 7}", n=n) for n in range(100)])
        await t.settled()
        assert sorted(n for _, n in t.db(ALL)) == list(range(100))
        for key in {f"o{n}" for n in range(7)}:
            mine = [n for id, n in t.db(ALL) if id == key]
            assert mine == sorted(mine)
        assert len(t.published(Paid)) == 100
        assert t.books.services["s"].done == 100


@GUARANTEES
async def test_an_exception_inside_rolls_all_of_it_back(schema: Path, guarantee: Guarantee) -> None:
    service = Service("s", guarantee=guarantee, retry=Retry(attempts=3, first=0))

    @service.on(Placed)
    async def pay(e: Placed, ctx: Context) -> None:
        async with ctx.transaction() as db:
            await db.execute(PAY, (e.order_id, ctx.attempt))
            ctx.publish(Paid(order_id=e.order_id))
            if ctx.attempt < 3:
                raise ValueError("inside")

    async with running(App(service, schema=schema)) as t:
        await t.publish(Placed(order_id="a"))
        await t.settled()
        assert t.db(ALL) == [("a", 3)]
        assert len(t.published(Paid)) == 1


async def test_a_handler_that_swallows_the_error_of_its_block_publishes_nothing_of_it(schema: Path) -> None:
    service = Service("s")

    @service.on(Placed)
    async def pay(e: Placed, ctx: Context) -> None:
        ctx.publish(Paid(order_id="before"))
        try:
            async with ctx.transaction() as db:
                await db.execute(PAY, (e.order_id, 1))
                ctx.publish(Paid(order_id="inside"))
                raise ValueError("inside")
        except ValueError:
            ctx.publish(Paid(order_id="after"))

    async with running(App(service, schema=schema)) as t:
        await t.publish(Placed(order_id="a"))
        await t.settled()
        assert t.db(ALL) == []
        assert [e.order_id for e in sorted(t.published(Paid), key=lambda e: e.order_id)] == ["after", "before"]
        assert len({e.id for e in t.envelopes(Paid)}) == 2


async def test_what_happens_after_the_commit_cannot_undo_it(schema: Path) -> None:
    service, attempts = Service("s"), []

    @service.on(Placed)
    async def pay(e: Placed, ctx: Context) -> None:
        attempts.append(ctx.attempt)
        async with ctx.transaction() as db:
            await db.execute(PAY, (e.order_id, 1))
        with pytest.raises(UsageError, match="UL1222"):
            ctx.publish(Paid(order_id="late"))
        raise ValueError("after")

    async with running(App(service, schema=schema)) as t:
        await t.publish(Placed(order_id="a"))
        await t.settled()
        assert attempts == [1] and t.db(ALL) == [("a", 1)]
        assert t.books.services["s"].done == 1 and not t.dead_letters()


async def test_events_published_before_the_block_leave_with_it(schema: Path) -> None:
    service = Service("s", retry=Retry(attempts=1))

    @service.on(Placed)
    async def pay(e: Placed, ctx: Context) -> None:
        ctx.publish(Paid(order_id=e.order_id))
        async with ctx.transaction() as db:
            await db.execute(PAY, (e.order_id, 1))
            if e.n:
                raise ValueError("no")

    async with running(App(service, schema=schema)) as t:
        await t.publish_all([Placed(order_id="a"), Placed(order_id="b", n=1)])
        await t.settled()
        assert [e.order_id for e in t.published(Paid)] == ["a"]
        assert t.dead(pay).key == b"b"


async def test_a_block_that_takes_too_long_is_rolled_back_and_tried_again(schema: Path) -> None:
    service, errors = Service("s", retry=Retry(attempts=3, first=0)), []

    @service.on(Placed)
    async def pay(e: Placed, ctx: Context) -> None:
        try:
            async with ctx.transaction() as db:
                await db.execute(PAY, (e.order_id, ctx.attempt))
                ctx.publish(Paid(order_id=e.order_id))
                if ctx.attempt < 3:
                    await asyncio.sleep(0.6)
        except Exception as error:
            errors.append(str(error)[:6])
            raise

    async with running(App(service, schema=schema)) as t:
        await t.publish(Placed(order_id="a"))
        await t.settled()
        assert errors == ["UL1205", "UL1205"]
        assert t.db(ALL) == [("a", 3)] and len(t.published(Paid)) == 1


async def test_a_late_block_cannot_be_made_good_by_swallowing_its_error(schema: Path) -> None:
    service = Service("s", retry=Retry(attempts=2, first=0))

    @service.on(Placed)
    async def pay(e: Placed, ctx: Context) -> None:
        try:
            async with ctx.transaction() as db:
                await db.execute(PAY, (e.order_id, ctx.attempt))
                await asyncio.sleep(0.6)
        except Exception:
            pass

    async with running(App(service, schema=schema)) as t:
        await t.publish(Placed(order_id="a"))
        await t.settled()
        assert t.db(ALL) == []
        assert t.dead(pay).error.startswith("UL1205")


async def test_one_slow_block_does_not_harm_the_others(schema: Path) -> None:
    service = Service("s", retry=Retry(attempts=2, first=0), concurrency=20)

    @service.on(Placed)
    async def pay(e: Placed, ctx: Context) -> None:
        async with ctx.transaction() as db:
            await db.execute(PAY, (e.order_id, e.n))
            if e.n == 7 and ctx.attempt == 1:
                await asyncio.sleep(0.5)

    async with running(App(service, schema=schema)) as t:
        await t.publish_all([Placed(order_id=f"o{n}", n=n) for n in range(20)])
        await t.settled()
        assert sorted(n for _, n in t.db(ALL)) == list(range(20))


async def test_a_delivery_has_one_block(schema: Path) -> None:
    service = Service("s")

    @service.on(Placed)
    async def pay(e: Placed, ctx: Context) -> None:
        block = ctx.transaction()
        with pytest.raises(UsageError, match="UL1221"):
            ctx.transaction()
        async with block as db:
            await db.execute(PAY, (e.order_id, 1))
        with pytest.raises(UsageError):
            ctx.transaction()

    async with running(App(service, schema=schema)) as t:
        await t.publish(Placed(order_id="a"))
        await t.settled()
        assert t.db(ALL) == [("a", 1)] and not t.dead_letters()


async def test_only_db_may_be_used_inside_a_block(schema: Path) -> None:
    service, codes, kept = Service("s"), [], []
    app = App(service, schema=schema)

    @service.on(Placed)
    async def pay(e: Placed, ctx: Context) -> None:
        async with ctx.transaction() as db:
            for call in (app.publish(Paid(order_id="x")), app.publish_all([Paid(order_id="x")])):
                try:
                    await call
                except UsageError as error:
                    codes.append(error.code)
            task = asyncio.create_task(app.publish(Paid(order_id="x")))
            codes.append(getattr((await asyncio.gather(task, return_exceptions=True))[0], "code", None))
            for sql in ("delete from unlost_log", "commit", "pragma synchronous=0", "attach 'x' as y", "no sql"):
                try:
                    await db.execute(sql)
                except Exception as error:
                    codes.append(getattr(error, "code", type(error).__name__))
            await db.execute(PAY, (e.order_id, 1))
            kept.append(db)
        await app.publish(Paid(order_id="outside"))

    async with running(app) as t:
        await t.publish(Placed(order_id="a"))
        await t.settled()
        assert codes == ["UL1223"] * 3 + ["UL1203"] * 4 + ["UL1206"]
        assert t.db(ALL) == [("a", 1)]
        assert [e.order_id for e in t.published(Paid)] == ["outside"]
        with pytest.raises(UsageError, match="UL1204"):
            await kept[0].execute(PAY, ("late", 1))


async def test_sync_handlers_use_with(schema: Path) -> None:
    service, codes = Service("s", guarantee="effectively-once", retry=Retry(attempts=3, first=0)), []
    app = App(service, schema=schema)

    @service.on(Placed)
    def pay(e: Placed, ctx: Context) -> None:
        with ctx.transaction() as db:
            db.execute(PAY, (e.order_id, e.n))
            ctx.publish(Paid(order_id=e.order_id))
            try:
                app.publish_sync(Paid(order_id="x"))
            except UsageError as error:
                codes.append(error.code)
            if e.n == 1 and ctx.attempt == 1:
                raise ValueError("inside")
            if e.n == 2 and ctx.attempt == 1:
                time.sleep(0.5)

    async with running(app) as t:
        await t.publish_all([Placed(order_id=f"o{n}", n=n) for n in range(10)])
        await t.settled()
        assert sorted(n for _, n in t.db(ALL)) == list(range(10))
        assert sorted(e.order_id for e in t.published(Paid)) == sorted(f"o{n}" for n in range(10))
        assert set(codes) == {"UL1223"}


async def test_a_deadline_inside_a_block_rolls_it_back(schema: Path) -> None:
    service = Service("s", deadline=5, retry=Retry(attempts=2, first=0))

    @service.on(Placed)
    async def pay(e: Placed, ctx: Context) -> None:
        async with ctx.transaction() as db:
            await db.execute(PAY, (e.order_id, ctx.attempt))
            if ctx.attempt == 1:
                await asyncio.Event().wait()

    async with running(App(service, schema=schema), patience=0.05) as t:
        await t.publish(Placed(order_id="a"))
        await t.settled()
        assert t.db(ALL) == [("a", 2)]


@GUARANTEES
@pytest.mark.parametrize("step", ["received", "started", "settling", "committing", "settled", "handled"])
async def test_a_crash_at_any_step_leaves_one_row_and_one_event(schema: Path, guarantee: Guarantee, step: Step) -> None:
    """The block's commit is the end of the delivery, also without the inbox: the position moves with the rows."""
    service = Service("s", guarantee=guarantee)

    @service.on(Placed)
    async def pay(e: Placed, ctx: Context) -> None:
        async with ctx.transaction() as db:
            await db.execute(PAY, (e.order_id, e.n))
            ctx.publish(Paid(order_id=e.order_id))

    async with running(App(service, schema=schema)) as t:
        t.crash(pay, after=step, times=3)
        await t.publish_all([Placed(order_id=f"o{n % 5}", n=n) for n in range(20)])
        await t.settled()
        assert t.deaths(service) == 3
        assert sorted(n for _, n in t.db(ALL)) == list(range(20))
        assert len(t.published(Paid)) == 20
        assert t.books.services["s"].done == 20


@pytest.mark.parametrize("step", ["settling", "committing", "settled", "started"])
async def test_a_crash_of_a_sync_block(schema: Path, step: Step) -> None:
    service = Service("s", guarantee="effectively-once")

    @service.on(Placed)
    def pay(e: Placed, ctx: Context) -> None:
        with ctx.transaction() as db:
            db.execute(PAY, (e.order_id, e.n))
            ctx.publish(Paid(order_id=e.order_id))

    async with running(App(service, schema=schema)) as t:
        t.crash(pay, after=step, times=2)
        await t.publish_all([Placed(order_id=f"o{n % 5}", n=n) for n in range(20)])
        await t.settled()
        assert sorted(n for _, n in t.db(ALL)) == list(range(20))
        assert len(t.published(Paid)) == 20


async def test_a_retry_at_once_never_overtakes_the_record_of_the_attempt_before(schema: Path) -> None:
    """From the waiting room, with a wait of nothing: the books must not find the event twice."""
    service = Service("s", retry=Retry(attempts=50, first=0), concurrency=50)
    again = {"on": True}

    @service.on(Placed)
    async def pay(e: Placed, ctx: Context) -> None:
        if again["on"]:
            raise __import__("unlost").RetryLater(after=60)  # into the waiting room
        if ctx.attempt < 6:
            raise ValueError("again, at once")
        async with ctx.transaction() as db:
            await db.execute(PAY, (e.order_id, e.n))

    async with running(App(service, schema=schema)) as t:
        await t.publish_all([Placed(order_id=f"o{n}", n=n) for n in range(100)])
        await t.until(lambda: t.books.services["s"].retrying == 100)
        again["on"] = False
        await t.settled(30)
        assert sorted(n for _, n in t.db(ALL)) == list(range(100))
        assert t.books.services["s"].done == 100
