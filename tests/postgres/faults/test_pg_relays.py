"""How relays share an outbox in PostgreSQL, step by step, and what a commit is believed to have become: two stores in one
event loop stand for two processes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

import unlost.store.postgres.outbox as outbox_module
from unlost import Event
from unlost.delivery.relay import Relay
from unlost.events import Envelope, seal
from unlost.store.postgres import migrate, rows
from unlost.store.postgres.outbox import PostgresOutbox
from unlost.store.postgres.schema import SHARDS
from unlost.store.postgres.settings import parse
from unlost.store.postgres.store import PostgresStore
from unlost.store.steps import Steps

KEYS = 64  # enough for each part of the outbox to have some


class Placed(Event, topic="shop", key="customer"):
    customer: str


def events(number: int) -> list[Envelope]:
    return [
        seal(Placed(customer=f"c{n}"), source="web", id=f"c{n}-{number}", now=1_700_000_000_000_000)
        for n in range(KEYS)
    ]


@contextlib.asynccontextmanager
async def stores(url: str, count: int = 2) -> AsyncIterator[list[PostgresStore]]:
    migrate.migrate(parse(url))
    found = [PostgresStore(parse(url), broker="the same") for _ in range(count)]
    async with contextlib.AsyncExitStack() as stack:
        for store in found:
            await store.open()
            stack.push_async_callback(store.close)
        yield found


async def put(store: PostgresStore, number: int) -> None:
    await store.client.commit(lambda: rows.put(events(number)))


async def claim(outbox: PostgresOutbox) -> int:
    """A claim that does not wait for its time; how many parts it has then."""
    outbox._looked = float("-inf")
    await outbox.claim()
    return len(outbox._epochs)


async def take(outbox: PostgresOutbox) -> list[str]:
    """The next batch, as if it had been sent."""
    batch = await outbox.next((), 1000)
    await outbox.sent([row.number for row in batch])
    return [row.envelope.id for row in batch]


async def counters(store: PostgresStore) -> tuple[Any, ...]:
    def steps() -> Steps[tuple[Any, ...]]:
        found = yield (
            "select sum(next - 1)::bigint, sum(confirmed)::bigint, (select count(*) from unlost_outbox), "
            "(select count(*) from unlost_outbox_status) from unlost_relay",
            (),
        )
        return found[0]

    return await store.client.read(steps())


async def test_a_part_is_given_up_together_with_what_is_confirmed_of_it(database: str) -> None:
    """Else its next relay would send again what was sent, and find it gone when it confirms that."""
    async with stores(database) as (one, two):
        a, b = one.outbox(), two.outbox()
        assert await claim(a) == SHARDS
        await put(one, 1)
        assert len(await take(a)) == KEYS
        assert await claim(b) == 0
        assert await claim(a) == SHARDS // 2
        assert await claim(b) == SHARDS // 2
        assert await take(b) == []
        assert await take(a) == []
        assert await counters(one) == (KEYS, KEYS, 0, 0)


async def test_who_has_lost_one_part_forgets_nothing_of_the_others(database: str) -> None:
    async with stores(database) as (one, two):
        a = one.outbox()
        assert await claim(a) == SHARDS
        await put(one, 1)
        assert len(await take(a)) == KEYS

        def steal() -> Steps[None]:
            yield "update unlost_relay set process = ?, epoch = epoch + 1 where shard = 3", (two.process_id,)

        await two.client.commit(steal)
        assert await take(a) == []  # fenced
        assert await claim(a) == SHARDS - 1
        again = await take(a)
        assert 0 < len(again) < KEYS
        await claim(a)
        stolen = KEYS - len(again)
        assert await counters(one) == (KEYS, KEYS - stolen, stolen, stolen)


async def test_relays_share_under_load(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second relay gets its parts although the first one always has something to send."""
    monkeypatch.setattr(outbox_module, "CLAIM_SECONDS", 0.1)

    class Slow:
        async def publish(self, envelopes: Sequence[Envelope]) -> None:
            await asyncio.sleep(0.02)

    async with stores(database, 3) as (one, two, web):
        a, b = one.outbox(), two.outbox()

        async def load() -> None:
            for number in range(10_000):
                await put(web, number)
                web.wake()

        jobs = [asyncio.create_task(load()), asyncio.create_task(Relay(a, Slow()).run())]  # type: ignore[arg-type]
        try:
            while len(a._epochs) < SHARDS:
                await asyncio.sleep(0.02)
            jobs.append(asyncio.create_task(Relay(b, Slow()).run()))  # type: ignore[arg-type]
            async with asyncio.timeout(20):
                while (len(a._epochs), len(b._epochs)) != (SHARDS // 2, SHARDS // 2):
                    await asyncio.sleep(0.02)
            assert not any(job.done() for job in jobs)
        finally:
            for job in jobs:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)
