"""The embedded broker whose services keep their progress in another store: what it is told, and what it does with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from unlost import UsageError
from unlost.brokers.embedded.broker import EmbeddedBroker
from unlost.brokers.embedded.group import EmbeddedMember
from unlost.brokers.embedded.trim import trim
from unlost.brokers.port import Ack, Assigned
from unlost.events.topic import Topic, Unit
from unlost.sqlite.file import File
from unlost.store.connect import store_beside
from unlost.testing.conformance import envelope
from unlost.world import World

SECOND = 1_000_000


class LaterWorld(World):
    """A day ahead, so that everything is older than its retention."""

    ahead = 0

    def now(self) -> int:
        return super().now() + self.ahead


@asynccontextmanager
async def broker_in(path: Path, world: World | None = None) -> AsyncIterator[EmbeddedBroker]:
    file = await asyncio.to_thread(lambda: File(path / "events.db", world=world or World()))
    try:
        yield EmbeddedBroker(file, store_elsewhere=True)
    finally:
        await asyncio.to_thread(file.close)


async def assigned(member: EmbeddedMember) -> Assigned:
    while True:
        for change in await member.receive():
            if isinstance(change, Assigned):
                return change


async def test_what_it_was_told_comes_back_with_the_partition(tmp_path: Path) -> None:
    unit = Unit("billing", "order", 0)
    async with broker_in(tmp_path) as broker:
        assert not broker.abilities.commits_with_store
        await broker.declare([Topic("order", partitions=1)])
        member = await broker.join("billing", ["order"])
        first = await assigned(member)
        assert first.saved[unit] == (0, "")
        await member.ack([Ack(unit, 7, "note of a store")])
        await member.close()
    async with broker_in(tmp_path) as broker:
        member = await broker.join("billing", ["order"])
        assert (await assigned(member)).saved[unit] == (7, "note of a store")
        await member.close()


async def test_a_unit_that_is_not_ours_is_not_told(tmp_path: Path) -> None:
    unit = Unit("billing", "order", 0)
    async with broker_in(tmp_path) as broker:
        await broker.declare([Topic("order", partitions=1)])
        member = await broker.join("billing", ["order"])
        await assigned(member)
        await member.release([unit])
        await member.ack([Ack(unit, 7, "late")])
        assert broker.file.read(lambda c: c.execute("select position from unlost_follower").fetchall()) == [(0,)]
        await member.close()


async def test_trimming_never_passes_what_the_other_store_has_not_handled(tmp_path: Path) -> None:
    world = LaterWorld()
    unit = Unit("billing", "order", 0)
    async with broker_in(tmp_path, world) as broker:
        await broker.declare([Topic("order", partitions=1, retention=60)])
        member = await broker.join("billing", ["order"])
        await assigned(member)
        await broker.publish([envelope("order", id=str(n)) for n in range(10)])
        world.ahead = 86_400 * SECOND
        assert await trim(broker.file) == 0, "nothing was handled yet"
        await member.ack([Ack(unit, 4, "")])
        await trim(broker.file)
        left = await broker.read("order", 0, 0, 100)
        assert left[0].position <= 4
        assert [a.position for a in left if a.position >= 4] == [4, 5, 6, 7, 8, 9]
        await member.close()


@pytest.mark.parametrize("elsewhere_first", [True, False])
async def test_progress_is_kept_in_one_place_for_good(tmp_path: Path, elsewhere_first: bool) -> None:
    """A service that changed its store would begin anew, and handle everything again."""
    async with broker_in(tmp_path) as elsewhere:
        (info,) = await elsewhere.declare([Topic("order", partitions=1)])
        here = EmbeddedBroker(elsewhere.file)
        if elsewhere_first:
            member = await elsewhere.join("billing", ["order"])
            await member.close()
            store = store_beside(here.file, log_here=True, broker=here.identity)
            with pytest.raises(UsageError, match="UL1135"):
                await store.register("billing", {"on_dead": "park"}, [info])
            with pytest.raises(UsageError, match="UL1135"):
                await here.join("billing", ["order"])
            member = await elsewhere.join("billing", ["order"])  # nothing was changed
            await member.close()
        else:
            store = store_beside(elsewhere.file, log_here=True, broker=here.identity)
            await store.register("billing", {"on_dead": "park"}, [info])
            with pytest.raises(UsageError, match="UL1135"):
                await elsewhere.join("billing", ["order"])
