"""The door to time, chance and ids."""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
import uuid
from pathlib import Path

import pytest

from unlost.sqlite.guards import open_lock
from unlost.world import REAL, Deadlines, World, end, new_id, rfc3339


def test_ids_are_uuid7_and_increase() -> None:
    ids = [new_id() for _ in range(5000)]
    assert ids == sorted(ids)
    assert len(set(ids)) == len(ids)
    parsed = uuid.UUID(ids[0])
    assert parsed.version == 7
    assert parsed.variant == uuid.RFC_4122
    assert abs((parsed.int >> 80) - time.time() * 1000) < 5000


def test_times_read_as_rfc3339() -> None:
    assert rfc3339(0) == "1970-01-01T00:00:00.000000Z"
    assert rfc3339(1_700_000_000_123_456) == "2023-11-14T22:13:20.123456Z"


def test_a_clock_that_is_set_back_moves_no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    before = world.steady()
    monkeypatch.setattr(time, "time_ns", lambda: 0)
    assert world.now() == 0
    assert before <= world.steady() < before + 60_000_000


async def test_waiting_ends_at_its_time_or_when_it_is_woken() -> None:
    wake = asyncio.Event()
    async with asyncio.timeout(10):
        await REAL.wait_until(REAL.steady() + 1000, wake)
        await REAL.wait_until(REAL.steady() - 1, wake)
        asyncio.get_running_loop().call_soon(wake.set)
        await REAL.wait_until(REAL.steady() + 3_600_000_000, wake)


async def test_a_limit_ends_a_call_and_leaves_other_cancellations_alone() -> None:
    deadlines = Deadlines()
    limit = deadlines.start(0.01)
    with pytest.raises(asyncio.CancelledError):
        await asyncio.sleep(30)
    assert limit.passed()
    limit.end()
    await asyncio.sleep(0)  # nothing of it is left

    async def cancelled_by_somebody() -> bool:
        inner = deadlines.start(30)
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            return inner.passed()
        finally:
            inner.end()
        return True

    task = asyncio.create_task(cancelled_by_somebody())
    await asyncio.sleep(0)
    task.cancel()
    assert await task is False


def test_deadlines_work_in_a_second_event_loop(tmp_path: Path) -> None:
    from unlost import App, Event, OutcomeUnknown

    class OrderPlaced(Event, key="order_id"):
        order_id: str

    app = App(broker=f"embedded://{tmp_path / 'e.db'}")

    async def late() -> None:
        async with app:
            await app.publish(OrderPlaced(order_id="a"))
            lock = open_lock(tmp_path / "e.db.lock")
            fcntl.flock(lock, fcntl.LOCK_EX)  # as a process that was stopped inside a commit
            try:
                with pytest.raises(OutcomeUnknown, match=r"no answer within 0\.2 s"):
                    await app.publish(OrderPlaced(order_id="b"), deadline=0.2)
            finally:
                os.close(lock)

    asyncio.run(late())
    asyncio.run(late())


async def test_a_task_that_does_not_listen_the_first_time_is_ended() -> None:
    refused = 0

    async def stubborn() -> None:
        nonlocal refused
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                refused += 1
                if refused == 2:
                    raise

    async def failing() -> None:
        raise ValueError("before anybody asked")

    tasks = [asyncio.create_task(stubborn()), asyncio.create_task(failing())]
    await asyncio.sleep(0)
    await end(*tasks)
    assert refused == 2 and all(task.done() for task in tasks)
