"""A dependency that is down must not carry the backlog to the shelf."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from unlost import App, Event, Reject, Retry, Service
from unlost.delivery import outage, worker
from unlost.delivery.fate import Dead, Done, RetryAt
from unlost.testing import running


class OrderPlaced(Event, key="order_id"):
    order_id: str


def test_the_rule_itself() -> None:
    o = outage.Outage("billing")
    dead = Dead("exhausted", "OSError", "refused", "")
    for _ in range(outage.DEATHS_IN_A_ROW):
        assert o.judge("charge", dead, 0) is dead
    assert o.lasts("charge")
    assert o.judge("charge", dead, 5) == RetryAt(5 + int(outage.PROBE_SECONDS * 1e6), spends_attempt=False)
    rejected = Dead("rejected", "Reject", "no", "")
    assert o.judge("charge", rejected, 0) is rejected
    assert not o.lasts("other")
    assert o.judge("charge", Done(), 0) == Done()
    assert not o.lasts("charge")
    assert o.judge("charge", dead, 0) is dead


async def test_an_outage_is_probed_and_then_everything_is_handled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage, "DEATHS_IN_A_ROW", 5)
    monkeypatch.setattr(outage, "PROBE_SECONDS", 0.0)
    monkeypatch.setattr(worker, "PROBE_SECONDS", 0.0)
    service = Service("billing", retry=Retry(attempts=2, first=0), on_dead="skip", concurrency=8)
    down, at_once, most, calls = True, 0, 0, 0
    seen: list[str] = []

    @service.on(OrderPlaced)
    async def charge(order: OrderPlaced) -> None:
        nonlocal at_once, most, calls
        at_once += 1
        calls += 1
        most = max(most, at_once)
        await asyncio.sleep(0)
        at_once -= 1
        if down:
            raise ConnectionRefusedError("the bank is away")
        seen.append(order.order_id)

    async with running(App(service)) as t:
        await t.publish_all([OrderPlaced(order_id=f"o{i}") for i in range(200)])

        async def let_work(until: Callable[[], bool]) -> None:
            async with asyncio.timeout(60):
                while not until():
                    t.advance(0.01)
                    await asyncio.sleep(0.001)

        await let_work(lambda: len(t.dead_letters()) >= 5 and at_once <= 1)
        began, most = calls, 0
        await let_work(lambda: calls >= began + 100)
        assert len(t.dead_letters()) <= 5 + 8  # those in hand when it was noticed
        assert most == 1
        dead = {letter.key for letter in t.dead_letters()}
        down = False
        await t.settled(60)
        assert len(seen) == 200 - len(dead)
        assert {letter.key for letter in t.dead_letters()} == dead


async def test_a_poison_event_among_good_ones_is_no_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage, "DEATHS_IN_A_ROW", 5)
    service = Service("billing", retry=Retry(attempts=1), on_dead="skip", concurrency=1)

    @service.on(OrderPlaced)
    def charge(order: OrderPlaced) -> None:
        if order.order_id.endswith("0"):
            raise ValueError("poison")
        if order.order_id.endswith("5"):
            raise Reject("no")

    async with running(App(service)) as t:
        await t.publish_all([OrderPlaced(order_id=f"o{i}") for i in range(100)])
        await t.settled()
        assert len(t.dead_letters()) == 20
