"""Attempts: backoff, jitter, waiting in memory and in the store, order per key, and what never heals."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from unlost import App, Context, Event, Reject, Retry, RetryLater, Service
from unlost.delivery.fate import Dead, Done, RetryAt, decide
from unlost.errors import UsageError
from unlost.testing import Running, running


class Placed(Event, key="order_id", topic="order"):
    order_id: str
    n: int = 0


def waits(t: Running, times: list[int]) -> list[float]:
    return [(b - a) / 1e6 for a, b in itertools.pairwise(times)]


async def test_backoff_grows_by_the_factor_up_to_the_maximum() -> None:
    service, times = Service("s", retry=Retry(attempts=6, first=1, factor=2, max=5, jitter=0)), []
    app = App(service)

    @service.on(Placed)
    async def handle(e: Placed) -> None:
        times.append(app.world.now())
        raise ValueError("no")

    async with running(app) as t:
        await t.publish(Placed(order_id="a"))
        await t.settled()
        assert waits(t, times) == [1, 2, 4, 5, 5]
        letter = t.dead(handle)
        assert (letter.reason, letter.error_type, letter.error) == ("exhausted", "ValueError", "no")
        assert [a.number for a in letter.attempts] == [1, 2, 3, 4, 5, 6]
        assert waits(t, [a.at for a in letter.attempts]) == [1, 2, 4, 5, 5]
        assert "raise ValueError" in letter.stack


async def test_jitter_shortens_waits_and_spreads_them() -> None:
    service, times = Service("s", retry=Retry(attempts=2, first=10, jitter=0.5), concurrency=50), {}
    app = App(service)

    @service.on(Placed)
    async def handle(e: Placed, ctx: Context) -> None:
        times.setdefault(e.order_id, []).append(app.world.now())
        if ctx.attempt == 1:
            raise ValueError("once")

    async with running(app) as t:
        await t.publish_all([Placed(order_id=f"o{i}") for i in range(30)])
        await t.settled()
    found = [(b - a) / 1e6 for a, b in times.values()]
    assert all(5 <= wait <= 10 for wait in found)
    assert len({round(wait, 3) for wait in found}) > 20


@pytest.mark.parametrize("first", [0, 0.2, 4, 60, 7200])
@pytest.mark.parametrize("guarantee", ["at-least-once", "effectively-once"])
async def test_a_failing_event_is_tried_until_it_succeeds(first: float, guarantee) -> None:
    """Short waits stay in memory, long ones in the waiting room: no difference to see."""
    attempts: list[int] = []
    service = Service("s", guarantee=guarantee, retry=Retry(attempts=4, first=first, factor=1, max=first))
    app = App(service)

    @service.on(Placed)
    async def handle(e: Placed, ctx: Context) -> None:
        attempts.append(ctx.attempt)
        if ctx.attempt < 4:
            raise ValueError("not yet")

    async with running(app) as t:
        begin = t.clock.now()
        await t.publish(Placed(order_id="a"))
        await t.settled()
        assert attempts == [1, 2, 3, 4]
        assert (t.clock.now() - begin) / 1e6 >= 3 * first * 0.8
        assert t.books.services["s"].done == 1


async def test_a_long_wait_lets_the_position_move_on_and_is_in_the_books_as_retrying() -> None:
    service = Service("s", retry=Retry(attempts=3, first=100, max=100))
    app = App(service)
    held = True

    @service.on(Placed)
    async def handle(e: Placed) -> None:
        if e.order_id == "bad" and held:
            raise ValueError("later")

    async with running(app) as t:
        await t.publish_all([Placed(order_id="bad"), *(Placed(order_id=f"o{i}") for i in range(50))])

        def book():
            return t.books.services["s"]

        await t.until(lambda: book().retrying == 1 and book().done == 50)
        assert t.app.file.read(
            lambda c: c.execute("select count(*) from unlost_waiting where due is not null").fetchone()
        ) == (1,)
        held = False
        await t.settled()
        assert (book().retrying, book().done) == (0, 51)


@pytest.mark.parametrize("first", [0.1, 30])
async def test_a_key_keeps_its_order_under_retry_while_other_keys_go_on(first: float) -> None:
    seen: dict[str, list[int]] = {}
    order: list[str] = []
    service = Service("s", retry=Retry(attempts=5, first=first, jitter=0))
    app = App(service)

    @service.on(Placed)
    async def handle(e: Placed, ctx: Context) -> None:
        if e.order_id == "slow" and e.n % 3 == 0 and ctx.attempt < 3:
            raise ValueError("again")
        seen.setdefault(e.order_id, []).append(e.n)
        order.append(e.order_id)

    async with running(app) as t:
        events = [Placed(order_id=key, n=n) for n in range(10) for key in ("slow", "a", "b")]
        await t.publish_all(events)
        await t.settled()
    assert seen == {key: list(range(10)) for key in ("slow", "a", "b")}
    assert order.index("slow") >= 20, "the other keys did not wait for the slow one"


async def test_events_that_arrive_behind_a_waiting_one_wait_too() -> None:
    seen: list[int] = []
    service = Service("s", retry=Retry(attempts=5, first=60, jitter=0))
    app = App(service)

    @service.on(Placed)
    async def handle(e: Placed, ctx: Context) -> None:
        if e.n == 0 and ctx.attempt < 3:
            raise ValueError("again")
        seen.append(e.n)

    async with running(app) as t:
        await t.publish(Placed(order_id="a", n=0))
        await t.until(lambda: t.books.services["s"].retrying == 1)
        await t.publish_all([Placed(order_id="a", n=n) for n in range(1, 200)])  # more than one read of waiting rows
        await t.until(lambda: t.books.services["s"].parked == 199)
        await t.settled()
    assert seen == list(range(200))


async def test_keyless_events_have_no_order_and_do_not_wait_for_each_other() -> None:
    class Noted(Event, topic="note"):
        n: int

    seen: list[int] = []
    service = Service("s", retry=Retry(attempts=5, first=60))
    app = App(service)

    @service.on(Noted)
    async def handle(e: Noted, ctx: Context) -> None:
        if e.n < 5 and ctx.attempt < 3:
            raise ValueError("again")
        if e.n == 5:
            raise Reject("never")
        seen.append(e.n)

    async with running(app) as t:
        await t.publish_all([Noted(n=n) for n in range(40)])
        await t.settled()
        assert sorted(seen) == [n for n in range(40) if n != 5]
        assert set(seen[-5:]) == {0, 1, 2, 3, 4}
        assert t.dead(handle).key is None
        assert not t.dead(handle).parks


async def test_retry_later_waits_and_spends_no_attempt() -> None:
    service, attempts = Service("s", retry=Retry(attempts=2)), []
    app = App(service)

    @service.on(Placed)
    async def handle(e: Placed, ctx: Context) -> None:
        attempts.append((ctx.attempt, app.world.now()))
        if len(attempts) < 20:
            raise RetryLater("closed", after="1h" if len(attempts) % 2 else 0)

    async with running(app) as t:
        await t.publish(Placed(order_id="a"))
        await t.settled()
        assert len(attempts) == 20
        assert {number for number, _ in attempts} == {1}
        assert attempts[1][1] - attempts[0][1] == 3600 * 1_000_000
        assert t.books.services["s"].done == 1


async def test_reject_goes_to_the_shelf_at_once() -> None:
    service, calls = Service("s"), []
    app = App(service)

    @service.on(Placed)
    async def handle(e: Placed) -> None:
        calls.append(e)
        raise Reject("an order of 0.00 cannot be paid")

    async with running(app) as t:
        await t.publish(Placed(order_id="a"))
        await t.settled()
        letter = t.dead(handle)
        assert (letter.reason, letter.error_type, len(calls)) == ("an order of 0.00 cannot be paid", "Reject", 1)
        assert letter.key == b"a" and letter.trace and letter.data == b'{"order_id":"a","n":0}'


async def test_errors_that_cannot_heal_go_to_the_shelf_at_once() -> None:
    class Declined(Exception):
        pass

    class ForGood(Declined):
        pass

    service, calls = Service("s", retry=Retry(never_on=(Declined,))), []
    app = App(service)

    @service.on(Placed)
    async def handle(e: Placed, ctx: Context) -> None:
        calls.append(e.order_id)
        if e.order_id == "declined":
            raise ForGood("no money")
        if e.order_id == "name":
            undefined  # type: ignore[name-defined]  # noqa: B018, F821
        if e.order_id == "import":
            import not_there  # type: ignore[import-not-found]  # noqa: F401
        if e.order_id == "misuse":
            ctx.publish("text")  # type: ignore[arg-type]

    async with running(app) as t:
        await t.publish_all([Placed(order_id=o) for o in ("declined", "name", "import", "misuse", "good")])
        await t.settled()
        letters = {letter.key: letter for letter in t.dead_letters(handle)}
        assert {key: letter.reason for key, letter in letters.items()} == dict.fromkeys(
            (b"declined", b"name", b"import", b"misuse"), "cannot_heal"
        )
        assert len(calls) == 5
        assert t.books.services["s"].done == 1


async def test_where_turns_away_and_counts_it() -> None:
    service, seen = Service("s", retry=Retry(attempts=2, first=0)), []
    app = App(service)

    @service.on(Placed, where=lambda e: 10 // e.n > 1)
    async def handle(e: Placed) -> None:
        seen.append(e.n)

    async with running(app) as t:
        await t.publish_all([Placed(order_id=f"o{n}", n=n) for n in range(10)])
        await t.settled()
        assert sorted(seen) == [1, 2, 3, 4, 5]
        assert t.books.services["s"].skipped == {"where": 4}
        assert t.dead(handle).error_type == "ZeroDivisionError"  # a rule that fails is no answer


async def test_attempts_are_counted_on_across_a_clean_restart() -> None:
    service, attempts = Service("s", retry=Retry(attempts=4, first=3, factor=1, jitter=0)), []
    app = App(service)

    @service.on(Placed)
    async def handle(e: Placed, ctx: Context) -> None:
        attempts.append(ctx.attempt)
        raise ValueError("no")

    async with running(app) as t:
        await t.publish(Placed(order_id="a"))
        while len(attempts) < 2:
            t.advance(0.1)
            await asyncio.sleep(0.002)
        await t.scale(0, "s")
        await t.scale(1, "s")
        await t.settled()
        assert attempts == [1, 2, 3, 4]
        assert len(t.dead(handle).attempts) == 4


def test_decide_is_pure_and_only_a_return_is_success() -> None:
    retry = Retry(attempts=2, first=1, jitter=0)
    assert decide(None, 1, retry, now=0, chance=0) == Done()
    assert decide(asyncio.CancelledError(), 1, retry, now=0, chance=0) == RetryAt(1_000_000)
    assert decide(SystemExit(0), 1, retry, now=0, chance=0) == RetryAt(1_000_000)
    dead = decide(ValueError("x"), 2, retry, now=0, chance=0)
    assert isinstance(dead, Dead) and dead.reason == "exhausted"


@pytest.mark.parametrize("wrong", [{"attempts": 0}, {"first": -1}, {"factor": 0.5}, {"jitter": 2}, {"first": "soon"}])
def test_a_wrong_policy_is_refused(wrong) -> None:
    with pytest.raises(UsageError):
        Retry(**wrong)
