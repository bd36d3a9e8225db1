"""Effectively-once, ids, and what a handler publishes."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest

from unlost import App, Context, Event, Retry, Service
from unlost.delivery.service import Guarantee
from unlost.events import Envelope, seal
from unlost.testing import running


class Placed(Event, key="order_id", topic="order"):
    order_id: str
    n: int = 0


class Billed(Event, key="order_id", topic="bill"):
    order_id: str
    n: int = 0


class Noted(Event, topic="note"):
    n: int


def sealed(event: Event, id: str, source: str = "web") -> Envelope:
    return seal(event, source=source, id=id, now=1_700_000_000_000_000)


@pytest.mark.parametrize("gap", ["one batch", "one after the other", "after a restart"])
async def test_the_same_event_twice_is_handled_once(gap: str) -> None:
    service, seen = Service("s", guarantee="effectively-once"), []

    @service.on(Placed)
    async def handle(e: Placed, ctx: Context) -> None:
        seen.append(e.n)
        ctx.publish(Billed(order_id=e.order_id))

    async with running(App(service)) as t:
        twice = [sealed(Placed(order_id="a", n=1), "id-1"), sealed(Placed(order_id="a", n=1), "id-1")]
        if gap == "one batch":
            await t.app.accept(twice)
        else:
            await t.app.accept(twice[:1])
            await t.settled()
            if gap == "after a restart":
                await t.scale(0, "s")
                await t.scale(1, "s")
            await t.app.accept(twice[1:])
        await t.settled()
        assert seen == [1]
        assert len(t.published(Billed)) == 1
        assert t.books.services["s"].skipped == {"duplicate": 1}


async def test_without_that_guarantee_the_same_event_twice_is_handled_twice() -> None:
    service, seen = Service("s"), []

    @service.on(Placed)
    async def handle(e: Placed) -> None:
        seen.append(e.n)

    async with running(App(service)) as t:
        await t.app.accept([sealed(Placed(order_id="a"), "id-1"), sealed(Placed(order_id="a"), "id-1")])
        await t.settled()
        assert seen == [0, 0]


@pytest.mark.parametrize("transaction", [False, True])
@pytest.mark.parametrize("other_key", [False, True])
async def test_another_event_under_a_used_id_is_no_duplicate_but_a_dead_letter(
    transaction: bool, other_key: bool
) -> None:
    """Also when both are in hand at the same time, in different partitions."""
    service, seen = Service("s", guarantee="effectively-once"), []
    both = asyncio.Event()

    @service.on(Placed)
    async def handle(e: Placed, ctx: Context) -> None:
        seen.append(e.n)
        if other_key:
            if len(seen) == 2:
                both.set()
            await both.wait()
        if transaction:
            async with ctx.transaction():
                pass

    async with running(App(service)) as t:
        keys = ("a", "d") if other_key else ("a", "a")
        await t.app.accept([sealed(Placed(order_id=k, n=i), "id-1") for i, k in enumerate(keys)])
        await t.settled()
        letter = t.dead()
        assert letter.reason == "id_reused" and not letter.parks
        assert t.books.services["s"].done == 1
        await t.publish(Placed(order_id=keys[1], n=9))  # the key goes on
        await t.settled()
        assert seen[-1] == 9


async def test_one_id_from_two_sources_is_two_events() -> None:
    service, seen = Service("s", guarantee="effectively-once"), []

    @service.on(Placed)
    async def handle(e: Placed) -> None:
        seen.append(e.n)

    async with running(App(service)) as t:
        await t.app.accept(
            [sealed(Placed(order_id="a", n=1), "1", "web"), sealed(Placed(order_id="a", n=2), "1", "shop")]
        )
        await t.settled()
        assert seen == [1, 2]


@pytest.mark.parametrize("guarantee", ["at-least-once", "effectively-once"])
async def test_published_events_leave_with_success_in_the_order_of_the_calls(guarantee: Guarantee) -> None:
    service = Service("s", guarantee=guarantee, retry=Retry(attempts=3, first=0))

    @service.on(Placed)
    async def handle(e: Placed, ctx: Context) -> None:
        for n in range(5):
            ctx.publish(Billed(order_id=e.order_id, n=n))
        if ctx.attempt < 3:
            raise ValueError("after publishing")

    async with running(App(service)) as t:
        await t.publish(Placed(order_id="a"))
        await t.settled()
        assert [e.n for e in t.published(Billed)] == [0, 1, 2, 3, 4]


async def test_nothing_leaves_from_a_handler_that_fails_for_good() -> None:
    service = Service("s", retry=Retry(attempts=2, first=0))

    @service.on(Placed)
    async def handle(e: Placed, ctx: Context) -> None:
        ctx.publish(Billed(order_id=e.order_id))
        raise ValueError("no")

    async with running(App(service)) as t:
        await t.publish(Placed(order_id="a"))
        await t.settled()
        assert t.dead(handle) and not t.published(Billed)


async def test_ids_are_derived_and_the_envelope_carries_the_cause_on() -> None:
    service, keys, source = Service("billing", retry=Retry(attempts=3, first=0)), [], []
    when = datetime(2026, 1, 2, tzinfo=UTC)

    @service.on(Placed)
    async def handle(e: Placed, ctx: Context) -> None:
        keys.append(ctx.idempotency_key)
        source.append((ctx.id, ctx.key, ctx.headers, ctx.attempt, ctx.occurred_at))
        ctx.publish(Billed(order_id=e.order_id), headers={"campaign": "x"}, occurred_at=when)
        ctx.publish(Billed(order_id=e.order_id))
        if ctx.attempt < 3:
            raise ValueError("again")

    async def once() -> list[Envelope]:
        async with running(App(service)) as t:
            await t.publish(Placed(order_id="a"), id="order-a", headers={"h": "1"}, occurred_at=when)
            await t.settled()
            return t.envelopes(Billed)

    first, second = await once(), await once()
    assert len(set(keys)) == 1, "the same for all attempts, and for the same event in another run"
    assert [e.id for e in first] == [e.id for e in second] and len({e.id for e in first}) == 2
    assert keys[0] not in [e.id for e in first]
    assert source[0] == ("order-a", "a", {"h": "1"}, 1, when)
    for e in first:
        assert (e.source, e.correlationid, e.causationid) == ("billing", "order-a", "order-a")
        assert e.traceparent is not None
    assert first[0].headers == {"campaign": "x"} and first[0].occurred_at == when


async def test_two_handlers_of_one_event_get_different_keys_and_ids() -> None:
    one, two, keys = Service("one"), Service("two"), []
    for service in (one, two):

        @service.on(Placed)
        async def handle(e: Placed, ctx: Context) -> None:
            keys.append(ctx.idempotency_key)
            ctx.publish(Billed(order_id=e.order_id))

    async with running(App(one, two)) as t:
        await t.publish(Placed(order_id="a"))
        await t.settled()
        assert len(set(keys)) == 2
        assert len({e.id for e in t.envelopes(Billed)}) == 2


async def test_a_chain_of_services_handles_each_event_once_each() -> None:
    """What a repeat publishes has the same id, so the next service recognises it."""
    first, second = Service("first"), Service("second", guarantee="effectively-once")
    seen: list[int] = []
    app = App(first, second)

    @first.on(Placed)
    async def bill(e: Placed, ctx: Context) -> None:
        ctx.publish(Billed(order_id=e.order_id, n=e.n))

    @second.on(Billed)
    async def note(e: Billed) -> None:
        seen.append(e.n)

    async with running(app) as t:
        for _ in range(3):  # a publisher that repeats itself, with the same id
            await t.publish(Placed(order_id="a", n=1), id="x")
        await t.settled()
        assert seen == [1]
        assert t.books.services["second"].skipped == {"duplicate": 2}


async def test_what_cannot_be_published_is_the_handlers_error_at_the_call() -> None:
    service, codes = Service("s"), []

    @service.on(Placed)
    async def handle(e: Placed, ctx: Context) -> None:
        for wrong in (Billed(order_id=""), Billed(order_id=5), "no event"):  # type: ignore[arg-type]
            try:
                ctx.publish(wrong)  # type: ignore[arg-type]
            except Exception as error:
                codes.append(type(error).__name__)

    async with running(App(service)) as t:
        await t.publish(Placed(order_id="a"))
        await t.settled()
        assert codes == ["UsageError"] * 3
        assert t.books.services["s"].done == 1


async def test_a_context_kept_beyond_its_delivery_can_do_nothing() -> None:
    service, kept = Service("s"), []

    @service.on(Placed)
    async def handle(e: Placed, ctx: Context) -> None:
        kept.append(ctx)

    async with running(App(service)) as t:
        await t.publish(Placed(order_id="a"))
        await t.settled()
        for act in (lambda: kept[0].publish(Billed(order_id="a")), lambda: kept[0].transaction()):
            with pytest.raises(Exception, match="UL1222"):
                act()


async def test_one_handler_for_several_types_and_a_self_publishing_service() -> None:
    service, seen = Service("s"), []

    @service.on(Placed, Noted)
    async def handle(e: Placed | Noted, ctx: Context) -> None:
        seen.append((type(e).__name__, e.n))
        if isinstance(e, Placed):
            ctx.publish(Noted(n=e.n + 1))

    async with running(App(service)) as t:
        await t.publish(Placed(order_id="a", n=1))
        await t.settled()
        assert seen == [("Placed", 1), ("Noted", 2)]


async def test_keyless_duplicates_are_recognised_in_any_partition() -> None:
    service, seen = Service("s", guarantee="effectively-once"), []

    @service.on(Noted)
    async def handle(e: Noted, ctx: Context) -> None:
        seen.append(e.n)
        ctx.publish(Billed(order_id="a", n=e.n))

    async with running(App(service)) as t:
        for _ in range(5):
            await t.publish(Noted(n=1), id="once")
        await t.settled()
        assert len(t.published(Billed)) == 1
        assert t.books.services["s"].skipped == {"duplicate": 4}
