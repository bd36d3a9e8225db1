"""Outcomes of publishing: a receipt, surely not, nobody knows, never."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest

from unlost import App, Context, Event, OutcomeUnknown, Service, UsageError
from unlost.testing import running


class Placed(Event, key="order_id", topic="order"):
    order_id: str
    n: int = 0


class Billed(Event, key="order_id", topic="bill"):
    order_id: str


def blocked_writer(app: App) -> tuple[threading.Event, threading.Event]:
    """The file's writer stands still, as on a disk that hangs, until the second event is set."""
    inside, release = threading.Event(), threading.Event()

    def work(tx) -> None:
        inside.set()
        release.wait(20)

    threading.Thread(target=lambda: app.file.write_sync(work), daemon=True).start()
    inside.wait(10)
    return inside, release


async def test_a_receipt_says_where_the_event_stands() -> None:
    async with running(App()) as t:
        receipts = await t.publish_all([Placed(order_id="a", n=n) for n in range(5)])
        again = await t.publish(Placed(order_id="a", n=5), id="mine")
        assert len({r.partition for r in receipts}) == 1
        assert [r.position for r in (*receipts, again)] == list(range(6))
        assert again.id == "mine" and again.topic == "order" and again.recorded == t.clock.now()
        assert [e.n for e in t.published(Placed)] == list(range(6))
        assert await t.publish_all([]) == []


@pytest.mark.parametrize("deadline", [0.1, timedelta(milliseconds=100)])
async def test_a_deadline_leaves_the_outcome_unknown_and_the_same_id_is_safe(deadline) -> None:
    service, seen = Service("s", guarantee="effectively-once"), []

    @service.on(Placed)
    async def handle(e: Placed) -> None:
        seen.append(e.n)

    async with running(App(service)) as t:
        _, release = blocked_writer(t.app)
        with pytest.raises(OutcomeUnknown, match="with the same id") as caught:
            await t.app.publish(Placed(order_id="a"), id="once", deadline=deadline)
        assert "once" in str(caught.value) and caught.value.exit_code == 5
        release.set()
        await t.app.publish(Placed(order_id="a"), id="once")
        await t.settled()
        assert len(t.published(Placed)) == 2 and seen == [0]


async def test_a_cancelled_publish_leaves_the_outcome_unknown() -> None:
    async with running(App()) as t:
        _, release = blocked_writer(t.app)
        task = asyncio.create_task(t.app.publish(Placed(order_id="a")))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(OutcomeUnknown):
            await task
        release.set()


async def test_publishing_without_a_connection_is_a_usage_error(tmp_path: Path) -> None:
    app = App(broker=f"embedded://{tmp_path}/events.db")
    with pytest.raises(UsageError, match="UL1239"):
        await app.publish(Placed(order_id="a"))
    async with app:
        await app.publish(Placed(order_id="a"))
    with pytest.raises(UsageError, match="UL1239"):
        await app.publish(Placed(order_id="a"))
    async with app:  # may be entered again
        assert (await app.publish(Placed(order_id="a"))).position == 1


async def test_a_batch_is_all_or_none() -> None:
    async with running(App()) as t:
        with pytest.raises(UsageError):
            await t.publish_all([Placed(order_id="a"), Placed(order_id=""), Placed(order_id="b")])
        assert t.envelopes() == []


async def test_publish_sync_is_refused_inside_an_event_loop() -> None:
    async with running(App()) as t:
        with pytest.raises(UsageError, match="UL1236"):
            t.app.publish_sync(Placed(order_id="a"))
        await asyncio.to_thread(t.app.publish_sync, Placed(order_id="b"))
        assert [e.order_id for e in t.published(Placed)] == ["b"]


async def test_publish_sync_from_sync_handlers_and_threads() -> None:
    service = Service("s")
    app = App(service)

    @service.on(Placed)
    def handle(e: Placed) -> None:
        app.publish_sync(Billed(order_id=e.order_id))

    async with running(app) as t:
        await t.publish_all([Placed(order_id=f"o{n}") for n in range(20)])
        threads = [
            threading.Thread(target=app.publish_sync, args=(Placed(order_id=f"t{n}"),), daemon=True) for n in range(5)
        ]
        for thread in threads:
            thread.start()
        await t.until(lambda: not any(thread.is_alive() for thread in threads))
        await t.settled()
        assert len(t.published(Billed)) == 25


async def test_app_publish_inside_a_handler_is_a_publish_of_its_own() -> None:
    """It is durable before the handler ends, and stays if the handler then fails: `ctx.publish` is the other one."""
    service = Service("s")
    app = App(service, name="shop")

    @service.on(Placed)
    async def handle(e: Placed, ctx: Context) -> None:
        await app.publish(Billed(order_id=e.order_id))
        raise NotImplementedError

    async with running(app) as t:
        await t.publish(Placed(order_id="a"))
        await t.settled()
        assert t.dead(handle)
        [envelope] = t.envelopes(Billed)
        assert envelope.source == "shop" and envelope.causationid is None


SCRIPT = """
import sys, threading
from unlost import App, Event

class Placed(Event, key="order_id", topic="order"):
    order_id: str

app = App(broker=f"embedded://{sys.argv[1]}/events.db")
ids = []
threads = [threading.Thread(target=lambda n=n: ids.append(app.publish_sync(Placed(order_id=f"o{n}")).id)) for n in range(8)]
for t in threads: t.start()
for t in threads: t.join()
print(*ids)
print(app.publish_sync(Placed(order_id="last")).id)
"""


def test_publish_sync_in_a_script_connects_by_itself_and_the_script_ends(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, str(tmp_path)],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert len(set(done.stdout.split())) == 9


def test_close_ends_what_publish_sync_has_begun_and_the_next_call_connects_again(tmp_path: Path) -> None:
    app, before = App(broker=f"embedded://{tmp_path}/events.db"), set(threading.enumerate())
    app.close()  # nothing has begun
    for n in range(2):
        with contextlib.closing(app):
            assert app.publish_sync(Placed(order_id="a")).position == n
            assert set(threading.enumerate()) > before
        assert set(threading.enumerate()) <= before and app.loop is None


def test_a_call_that_is_under_way_when_another_thread_closes_has_its_answer(tmp_path: Path) -> None:
    app, receipts = App(broker=f"embedded://{tmp_path}/events.db"), []
    first = app.publish_sync(Placed(order_id="a"))
    _, release = blocked_writer(app)
    assert app.loop is not None
    before = len(asyncio.all_tasks(app.loop))
    calling = threading.Thread(target=lambda: receipts.append(app.publish_sync(Placed(order_id="a"))), daemon=True)
    calling.start()
    while len(asyncio.all_tasks(app.loop)) == before:
        time.sleep(0.001)
    closing = threading.Thread(target=app.close, daemon=True)
    closing.start()
    release.set()
    for thread in (calling, closing):
        thread.join(30)
        assert not thread.is_alive()
    assert [r.position for r in (first, *receipts)] == [0, 1]


async def test_close_leaves_a_connection_alone_that_others_use() -> None:
    async with running(App()) as t:
        await asyncio.to_thread(t.app.publish_sync, Placed(order_id="a"))
        t.app.close()
        assert (await t.app.publish(Placed(order_id="b"))).id


async def test_many_publishers_at_once_get_receipts_of_their_own() -> None:
    async with running(App()) as t:

        async def publish(k: int) -> None:
            for n in range(20):
                receipt = await t.publish(Placed(order_id=f"k{k}", n=n))
                assert receipt.topic == "order"

        await asyncio.gather(*(publish(k) for k in range(50)))
        events = t.published(Placed)
        assert len(events) == 1000
        for k in range(50):
            assert [e.n for e in events if e.order_id == f"k{k}"] == list(range(20))


async def test_time_of_recording_is_the_clock_of_the_test() -> None:
    async with running(App()) as t:
        first = await t.publish(Placed(order_id="a"))
        t.advance(3600)
        second = await t.publish(Placed(order_id="a"))
        assert second.recorded - first.recorded == 3600 * 1_000_000
        assert abs(first.recorded / 1e6 - time.time()) < 60
