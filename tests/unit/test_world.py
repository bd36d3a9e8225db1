"""The door to time, chance and ids."""

from __future__ import annotations

import asyncio
import time
import uuid

import pytest

from unlost.world import REAL, World, new_id, rfc3339


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
