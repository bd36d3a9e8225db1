"""The test kit itself: its clock, what it waits for, what it says when it is stuck, and the pytest plugin."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from unlost import App, Context, Event, Retry, Service, UsageError
from unlost.testing import VirtualWorld, running


class Placed(Event, key="order_id", topic="order"):
    order_id: str
    n: int = 0


def make() -> tuple[App, Service]:
    service = Service("s", retry=Retry(attempts=2, first=0))

    @service.on(Placed)
    async def handle(e: Placed, ctx: Context) -> None:
        if e.n < 0:
            raise ValueError("negative")

    return App(service), service


# --- the clock -----------------------------------------------------------------------------------------------


async def test_the_clock_stands_still_until_it_is_moved() -> None:
    world = VirtualWorld(start=1_000_000)
    assert (world.now(), world.monotonic()) == (1_000_000, 0.0)
    wake = asyncio.Event()
    waiting = asyncio.create_task(world.wait_until(3_000_000, wake))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    world.advance(1)
    await asyncio.sleep(0.01)
    assert not waiting.done()
    world.advance(1)
    await asyncio.wait_for(waiting, 5)
    assert (world.now(), world.monotonic()) == (3_000_000, 2.0)
    await world.wait_until(2_000_000, asyncio.Event())  # past: at once
    world.advance_to(5)
    assert world.now() == 3_000_000, "never back"


async def test_wake_ends_a_wait_early() -> None:
    world, wake = VirtualWorld(), asyncio.Event()
    waiting = asyncio.create_task(world.wait_until(world.now() + 10**9, wake))
    await asyncio.sleep(0)
    wake.set()
    await asyncio.wait_for(waiting, 5)


async def test_a_retry_in_a_week_is_tested_at_once() -> None:
    service, seen = Service("s", retry=Retry(attempts=2, first="7d", max="7d", jitter=0)), []

    @service.on(Placed)
    async def handle(e: Placed, ctx: Context) -> None:
        seen.append(ctx.attempt)
        if ctx.attempt == 1:
            raise ValueError("next week")

    async with running(App(service)) as t:
        begin = t.clock.now()
        await t.publish(Placed(order_id="a"))
        await t.settled()
        assert seen == [1, 2]
        assert t.clock.now() - begin == 7 * 86400 * 1_000_000


async def test_advance_moves_one_step_only() -> None:
    service, seen = Service("s", retry=Retry(attempts=5, first=60, factor=1, jitter=0)), []

    @service.on(Placed)
    async def handle(e: Placed) -> None:
        seen.append(1)
        raise ValueError("again")

    async with running(App(service)) as t:
        await t.publish(Placed(order_id="a"))
        for expected in (1, 2, 3):
            await t.until(lambda n=expected: len(seen) == n and t.books.services["s"].retrying == 1 and not t._busy())
            t.advance(59)
            await asyncio.sleep(0.01)
            assert len(seen) == expected
            t.advance(1)
        await t.settled()
        assert len(seen) == 5


async def test_waits_are_the_same_for_the_same_seed() -> None:
    async def once(seed: int) -> int:
        app, _ = make()
        app.services[0].handlers.clear()
        service = app.services[0]
        service.retry = Retry(attempts=4, first=10, jitter=1)

        @service.on(Placed)
        async def handle(e: Placed) -> None:
            raise ValueError("no")

        async with running(app, seed=seed) as t:
            begin = t.clock.now()
            await t.publish(Placed(order_id="a"))
            await t.settled()
            return t.clock.now() - begin

    assert await once(1) == await once(1) != await once(2)


# --- what it says --------------------------------------------------------------------------------------------


async def test_what_is_stuck_is_named() -> None:
    service, gate = Service("s"), asyncio.Event()

    @service.on(Placed)
    async def slow(e: Placed) -> None:
        await gate.wait()

    async with running(App(service), patience=60) as t:
        await t.publish(Placed(order_id="a"))
        with pytest.raises(
            TimeoutError, match=r"s order/\d is at 0 of 1; the handler 'slow' of s has order/\d:0 in hand"
        ):
            await t.settled(timeout=0.2)
        gate.set()
        await t.settled()


async def test_a_missing_event_fails_the_test_and_is_named() -> None:
    app, _ = make()
    with pytest.raises(
        AssertionError, match=r"1 events are unaccounted for[\s\S]*order.Placed lost-one: it was passed over"
    ):
        async with running(app) as t:
            await t.publish(Placed(order_id="a"), id="lost-one")
            await t.settled()
            await t.scale(0, "s")
            await app.file.write(
                lambda tx: tx.execute("update unlost_progress set fated = x'', counts = '{}', digest = 0").fetchall()
            )
    async with running(app, check_books=False) as t:
        await t.publish(Placed(order_id="a"))
        await t.settled()
        await t.scale(0, "s")
        await app.file.write(lambda tx: tx.execute("update unlost_progress set fated = x'', digest = 0").fetchall())
        assert t.books.unaccounted == 1


async def test_a_failure_in_the_block_is_the_failure_that_is_seen() -> None:
    app, _ = make()
    with pytest.raises(ZeroDivisionError):
        async with running(app) as t:
            await t.publish(Placed(order_id="a"))
            raise ZeroDivisionError


async def test_dead_wants_exactly_one() -> None:
    app, service = make()
    async with running(app) as t:
        with pytest.raises(AssertionError, match="found 0"):
            t.dead(service)
        await t.publish_all([Placed(order_id="a", n=-1), Placed(order_id="b", n=-1)])
        await t.settled()
        with pytest.raises(AssertionError, match=r"found 2[\s\S]*negative"):
            t.dead("handle")
        with pytest.raises(UsageError, match="UL1292"):
            t.dead("nobody")
        with pytest.raises(UsageError, match="UL1291"):
            t.crash(service, after="lunch")  # type: ignore[arg-type]


async def test_an_app_can_be_run_again_and_is_left_as_it_was() -> None:
    app, _ = make()
    world, url = app.world, app.broker_url
    folders = []
    for _ in range(3):
        async with running(app) as t:
            folders.append(t.folder)
            assert t.envelopes() == []
            await t.publish(Placed(order_id="a"))
            await t.settled()
    assert (app.world, app.broker_url) == (world, url)
    assert not any(folder.exists() for folder in folders)
    async with running(app):
        with pytest.raises(UsageError, match="UL1290"):
            async with running(app):
                pass


async def test_no_server_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNLOST_STORE", "postgresql://nobody@127.0.0.1:9/shop")
    app, *_ = make()
    async with running(app) as t:
        await t.publish(Placed(order_id="a"))
        await t.settled()
        assert t.books.balanced


async def test_only_chosen_services_run() -> None:
    one, two, seen = Service("one"), Service("two"), []
    for service in (one, two):

        @service.on(Placed)
        async def handle(e: Placed, ctx: Context) -> None:
            seen.append(ctx.service)

    async with running(App(one, two), services=["two"]) as t:
        await t.publish(Placed(order_id="a"))
        await t.settled()
        assert seen == ["two"]
        assert t.books.services["one"].waiting == 1


async def test_crashes_of_one_handler_leave_the_others_alone() -> None:
    one, two, seen = Service("one"), Service("two"), []

    @one.on(Placed)
    async def first(e: Placed) -> None:
        seen.append("one")

    @two.on(Placed)
    async def second(e: Placed) -> None:
        seen.append("two")

    async with running(App(one, two)) as t:
        t.crash(first, after="handled", times=2)
        await t.publish(Placed(order_id="a"))
        await t.settled()
        assert (t.deaths(one), t.deaths("two")) == (2, 0)
        assert sorted(seen) == ["one", "one", "one", "two"]


# --- the plugin ----------------------------------------------------------------------------------------------

USER_TESTS = """
import asyncio
from unlost import App, Event, Service

class Placed(Event, key="order_id", topic="order"):
    order_id: str

service = Service("s")
seen = []

@service.on(Placed)
async def handle(e: Placed) -> None:
    seen.append(e.order_id)

app = App(service)

def test_good(unlost_running):
    async def story():
        async with unlost_running(app) as t:
            await t.publish(Placed(order_id="a"))
            await t.settled()
            assert seen == ["a"]
    asyncio.run(story())

def test_forgotten(unlost_running):
    async def story():
        async with unlost_running(app) as t:
            app.publish(Placed(order_id="a"))
    asyncio.run(story())

def test_forgotten_too():
    async def story():
        app.publish_all([Placed(order_id="a")])
    asyncio.run(story())

def test_foreign_warnings_stay_warnings():
    async def other(): ...
    other()
"""


def run_pytest(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    (folder / "pytest.ini").write_text("[pytest]\n")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *args, str(folder)],
        capture_output=True, text=True, timeout=60, check=False, cwd=folder,
    )  # fmt: skip


def test_a_publish_that_was_never_awaited_fails_its_test(tmp_path: Path) -> None:
    (tmp_path / "test_user.py").write_text(USER_TESTS)
    done = run_pytest(tmp_path)
    assert "2 failed, 2 passed" in done.stdout, done.stdout
    assert "FAILED test_user.py::test_forgotten " in done.stdout or "::test_forgotten\n" in done.stdout
    assert "App.publish" in done.stdout


def test_the_plugin_imports_nothing_of_unlost_by_itself(tmp_path: Path) -> None:
    (tmp_path / "test_other.py").write_text(
        textwrap.dedent("""
        import sys
        def test_nothing():
            loaded = sorted(m for m in sys.modules if m.split(".")[0] in ("apsw", "msgspec") or m.startswith("unlost."))
            assert loaded in ([], ["unlost.testing", "unlost.testing.plugin"]), loaded
        """)
    )
    done = run_pytest(tmp_path)
    assert done.returncode == 0, done.stdout
