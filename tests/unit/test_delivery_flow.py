"""Limits: concurrency, back-pressure; stopping without dropping; several processes, threads and event loops."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from unlost import App, Context, Event, Service
from unlost.brokers.embedded.group import READ_MAX
from unlost.delivery.worker import IN_HAND_MAX
from unlost.events.topic import Topic
from unlost.ops.books import books
from unlost.store.records import FileRecords
from unlost.testing import Running, running


class Placed(Event, key="order_id", topic="order"):
    order_id: str
    n: int = 0


class Sent(Event, key="order_id", topic="mail"):
    order_id: str
    n: int = 0


async def until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        await asyncio.sleep(0.002)


# --- limits --------------------------------------------------------------------------------------------------


async def test_each_handler_keeps_its_own_limit_and_none_starves() -> None:
    service, now, most, done = Service("s", concurrency=50), Counter(), Counter(), Counter()

    async def work(name: str) -> None:
        now[name] += 1
        most[name] = max(most[name], now[name])
        await asyncio.sleep(0.002)
        now[name] -= 1
        done[name] += 1

    @service.on(Placed, concurrency=2)
    async def narrow(e: Placed) -> None:
        await work("narrow")

    @service.on(Sent, concurrency=10)
    async def wide(e: Sent) -> None:
        await work("wide")

    async with running(App(service)) as t:
        await t.publish_all([Placed(order_id=f"o{n}", n=n) for n in range(100)])
        await t.publish_all([Sent(order_id=f"o{n}", n=n) for n in range(100)])
        await t.settled()
        assert most == {"narrow": 2, "wide": 10}
        assert done == {"narrow": 100, "wide": 100}


async def test_a_limit_of_one_runs_one_at_a_time() -> None:
    service, inside = Service("s", concurrency=1), []

    @service.on(Placed)
    async def handle(e: Placed) -> None:
        inside.append(1)
        assert len(inside) == 1
        await asyncio.sleep(0)
        inside.pop()

    async with running(App(service)) as t:
        await t.publish_all([Placed(order_id=f"o{n}") for n in range(100)])
        await t.settled()
        assert t.books.services["s"].done == 100


async def test_what_is_in_hand_stays_below_its_bound_and_nothing_is_lost() -> None:
    service, seen, gate, most = Service("s", concurrency=64), Counter(), asyncio.Event(), 0

    @service.on(Placed)
    async def handle(e: Placed) -> None:
        await gate.wait()
        seen[e.n] += 1

    app = App(service, topics=[Topic("order", partitions=2)])
    async with running(app) as t:
        worker = t._workers()[0]

        def look() -> None:
            nonlocal most
            most = max(most, *(o.in_hand for o in worker.owned.values()), 0)

        for start in range(0, 20_000, 2_000):
            await t.publish_all([Placed(order_id=f"o{n % 300}", n=n) for n in range(start, start + 2_000)])
            look()
        await until(lambda: all(o.paused for o in worker.owned.values()))
        look()
        gate.set()
        while sum(seen.values()) < 20_000:
            look()
            await asyncio.sleep(0)
        await t.settled(30)
        assert IN_HAND_MAX <= most < IN_HAND_MAX + READ_MAX
        assert seen == dict.fromkeys(range(20_000), 1)
        assert t.books.services["s"].done == 20_000


async def test_a_busy_key_does_not_starve_the_others() -> None:
    service, order = Service("s", concurrency=2), []

    @service.on(Placed)
    async def handle(e: Placed) -> None:
        order.append(e.order_id)
        await asyncio.sleep(0)

    async with running(App(service, topics=[Topic("order", partitions=1)])) as t:
        await t.publish_all([Placed(order_id="busy", n=n) for n in range(200)] + [Placed(order_id="other")])
        await t.settled()
        assert order.index("other") < 50


async def test_a_lane_that_waits_for_room_and_loses_its_unit_does_not_use_up_the_room() -> None:
    service, seen, gate = Service("s"), [], asyncio.Event()

    @service.on(Placed, concurrency=1)
    async def narrow(e: Placed) -> None:
        seen.append(e.n)
        await gate.wait()

    @service.on(Sent, concurrency=10)
    async def wide(e: Sent) -> None: ...

    async with running(App(service, topics=[Topic("order", partitions=64)])) as t:
        worker = t._workers()[0]
        receipts = []
        for n in range(3):
            receipts.append(await t.publish(Placed(order_id=f"o{n}", n=n)))
            await t.until(lambda n=n: len(seen) + len(worker._held["narrow"]) == n + 1)
        assert len({r.partition for r in receipts}) == 3
        worker._on_fenced(next(o for unit, o in worker.owned.items() if unit.partition == receipts[1].partition))
        gate.set()
        await t.until(lambda: 2 in seen)


# --- stopping ------------------------------------------------------------------------------------------------


async def test_a_clean_stop_finishes_what_runs_and_gives_back_the_rest() -> None:
    service, started, finished, gate = Service("s", concurrency=4), [], [], asyncio.Event()

    @service.on(Placed)
    async def handle(e: Placed) -> None:
        started.append(e.n)
        await gate.wait()
        finished.append(e.n)

    async with running(App(service)) as t:
        await t.publish_all([Placed(order_id=f"o{n}", n=n) for n in range(50)])
        await until(lambda: len(started) == 4)
        stopping = asyncio.create_task(t.scale(0, "s"))
        await until(lambda: t.app.file.read(lambda c: True) and not t._processes["s"])
        gate.set()
        await stopping
        assert sorted(finished) == sorted(started) and len(started) == 4
        book = t.books.services["s"]
        assert (book.done, book.waiting, book.unaccounted) == (4, 46, 0)
        await t.scale(1, "s")
        await t.settled()
        assert sorted(finished) == list(range(50))
        assert t.app.file.read(lambda c: c.execute("select max(unclean) from unlost_epoch").fetchone()) == (0,)


async def test_a_handler_that_does_not_end_in_time_is_given_back() -> None:
    service, calls = Service("s"), []

    @service.on(Placed)
    async def handle(e: Placed, ctx: Context) -> None:
        calls.append(ctx.attempt)
        if len(calls) == 1:
            await asyncio.Event().wait()

    async with running(App(service)) as t:
        await t.publish(Placed(order_id="a"))
        await until(lambda: calls)
        worker = t._workers()[0]
        await worker.stop(grace=0.05)
        await t.scale(0, "s")
        assert t.books.services["s"].done == 0
        await t.scale(1, "s")
        await t.settled()
        assert calls == [1, 1], "being stopped is no failure of the handler"


async def test_stop_and_start_again_and_again_while_events_arrive() -> None:
    service, seen = Service("s"), []

    @service.on(Placed)
    async def handle(e: Placed) -> None:
        await asyncio.sleep(0.001)
        seen.append(e.n)

    async with running(App(service)) as t:

        async def publish() -> None:
            for n in range(300):
                await t.publish(Placed(order_id=f"o{n % 20}", n=n))

        publishing = asyncio.create_task(publish())
        for _ in range(6):
            await t.scale(0, "s")
            await t.scale(1, "s")
            await asyncio.sleep(0.01)
        await publishing
        await t.settled()
        assert sorted(seen) == list(range(300))


async def test_serve_can_be_stopped_at_any_moment(tmp_path: Path) -> None:
    """Also before it has taken part."""
    service, seen = Service("s"), []

    @service.on(Placed)
    async def handle(e: Placed) -> None:
        seen.append(e.n)

    app = App(service, broker=f"embedded://{tmp_path}/events.db")
    async with app:
        await app.publish(Placed(order_id="a"))
        for turns in range(40):
            task = asyncio.create_task(app.serve(ready=app.stop if turns == 0 else None))
            for _ in range(turns):
                await asyncio.sleep(0)
            await until(lambda task=task: task.done() or (app._stop is not None and not app._stop.is_set()))
            app.stop()
            await asyncio.wait_for(task, 10)
        task = asyncio.create_task(app.serve())
        await until(lambda: seen)
        app.stop()
        await task
        assert books(FileRecords(app.file)).unaccounted == 0


async def test_a_service_whose_worker_fails_says_so_and_leaves(tmp_path: Path) -> None:
    service = Service("s")

    @service.on(Placed)
    async def handle(e: Placed) -> None: ...

    app = App(service, broker=f"embedded://{tmp_path}/events.db")
    async with app:
        task = asyncio.create_task(app.serve())
        await until(lambda: app._workers and app._workers[0].owned)

        def damage(tx) -> None:
            tx.append([])
            tx.execute("insert into unlost_log select at + 1, head, key, data, recorded, digest, 7 from unlost_log")

        await app.publish(Placed(order_id="a"))
        await app.file.write(damage)
        with pytest.raises(Exception, match="UL3004"):
            await asyncio.wait_for(task, 10)
        assert app.file.read(lambda c: c.execute("select count(*) from unlost_member").fetchone()) == (0,)


# --- several processes, loops and threads --------------------------------------------------------------------


async def test_processes_join_and_leave_while_events_arrive() -> None:
    service, seen = Service("s", guarantee="effectively-once"), []

    @service.on(Placed)
    async def handle(e: Placed, ctx: Context) -> None:
        await asyncio.sleep(0.001)
        seen.append((e.order_id, e.n))
        ctx.publish(Sent(order_id=e.order_id, n=e.n))

    async with running(App(service)) as t:

        async def publish() -> None:
            for n in range(400):
                await t.publish(Placed(order_id=f"o{n % 25}", n=n))

        publishing = asyncio.create_task(publish())
        for count in (2, 3, 1, 3, 2):
            await t.scale(count)
            await settle_shares(t, count)
        await publishing
        await t.settled()
        assert sorted(n for _, n in seen) == list(range(400)), "clean hand-overs repeat nothing"
        for key in {key for key, _ in seen}:
            mine = [n for k, n in seen if k == key]
            assert mine == sorted(mine)
        sent = t.published(Sent)
        assert sorted(e.n for e in sent) == list(range(400))
        for key in {e.order_id for e in sent}:
            mine = [e.n for e in sent if e.order_id == key]
            assert mine == sorted(mine)


async def settle_shares(t: Running, count: int) -> None:
    """Until every process has its fair share of the 8 partitions."""
    shares = {8: [8], 4: [4, 4], 3: [2, 3, 3]}[-(-8 // count)]
    await until(lambda: sorted(len(w.owned) for w in t._workers()) == shares)


async def test_one_key_is_never_in_two_processes_at_once_while_it_is_retried_and_moved() -> None:
    service, inside, clashes, done = Service("s"), Counter(), [], Counter()

    @service.on(Placed)
    async def handle(e: Placed, ctx: Context) -> None:
        inside[e.order_id] += 1
        if inside[e.order_id] > 1:
            clashes.append(e)
        await asyncio.sleep(0.001)
        inside[e.order_id] -= 1
        if ctx.attempt == 1 and e.n % 3 == 0:
            raise ValueError("again")
        done[e.n] += 1

    async with running(App(service)) as t:
        await t.publish_all([Placed(order_id=f"o{n % 40}", n=n) for n in range(400)])
        for count in (3, 1, 2, 3, 1):
            await t.scale(count)
            for _ in range(10):
                t.advance(0.05)
                await asyncio.sleep(0.02)
        await t.settled(20)
        assert not clashes
        assert done == dict.fromkeys(range(400), 1)


def test_two_apps_in_two_threads_share_a_service(tmp_path: Path) -> None:
    """Each with an event loop of its own; one of them publishes, too."""
    url = f"embedded://{tmp_path}/events.db"
    seen: list[tuple[str, str, int]] = []

    def program(name: str, ready: threading.Barrier, stop: threading.Event, apps: list[App]) -> None:
        service = Service("s", guarantee="effectively-once")

        @service.on(Placed)
        async def handle(e: Placed) -> None:
            seen.append((name, e.order_id, e.n))

        async def main() -> None:
            app = App(service, broker=url)
            apps.append(app)
            async with app:
                task = asyncio.create_task(app.serve())
                await until(lambda: app._workers and len(app._workers[0].owned) == 4)
                await asyncio.to_thread(ready.wait, 20)
                for n in range(100):
                    await app.publish(Placed(order_id=f"{name}{n % 10}", n=n))
                await until(lambda: len(seen) >= 200)
                stop.set()
                app.stop()
                await task

        asyncio.run(main())

    ready, stop, apps = threading.Barrier(2), threading.Event(), []
    threads = [threading.Thread(target=program, args=(name, ready, stop, apps)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(seen) == 200 and {name for name, _, _ in seen} == {"a", "b"}
    for key in {key for _, key, _ in seen}:
        assert [n for _, k, n in seen if k == key] == sorted(n for _, k, n in seen if k == key)


async def test_two_services_see_every_event_each_at_their_own_pace() -> None:
    fast, slow, seen, gate = Service("fast"), Service("slow"), Counter(), asyncio.Event()

    @fast.on(Placed)
    async def quick(e: Placed) -> None:
        seen["fast"] += 1

    @slow.on(Placed)
    async def late(e: Placed) -> None:
        await gate.wait()
        seen["slow"] += 1

    async with running(App(fast, slow)) as t:
        await t.publish_all([Placed(order_id=f"o{n}") for n in range(100)])
        await until(lambda: seen["fast"] == 100)
        assert seen["slow"] == 0
        gate.set()
        await t.settled()
        assert seen == {"fast": 100, "slow": 100}
