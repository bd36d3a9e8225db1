"""What a review line by line found: each test is a way in which an event got lost, stuck, doubled or wrongly shelved."""

from __future__ import annotations

import asyncio
import dataclasses
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unlost import App, Context, Event, Retry, RetryLater, Service, UsageError
from unlost.brokers.embedded.broker import EmbeddedBroker
from unlost.brokers.embedded.group import EmbeddedMember
from unlost.brokers.embedded.trim import trim
from unlost.brokers.port import Revoked
from unlost.delivery import outage, worker
from unlost.delivery.fate import describe
from unlost.errors import Unavailable
from unlost.events import seal
from unlost.events.topic import Topic
from unlost.ops.books import books, gather
from unlost.ops.shelf import letters
from unlost.sqlite.file import File
from unlost.sqlite.turn import Block
from unlost.store.records import FileRecords
from unlost.store.sqlite import SqliteStore
from unlost.testing import running
from unlost.world import REAL


class Placed(Event, key="order_id", topic="order"):
    order_id: str
    n: int = 0


class Paid(Event, key="order_id", topic="payment"):
    order_id: str


async def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


# --- accepted and gone -------------------------------------------------------------------------------------------


async def test_declaring_a_topic_does_not_drop_what_its_neighbours_in_the_commit_publish(tmp_path: Path) -> None:
    file = File(tmp_path / "events.db")
    try:
        broker = EmbeddedBroker(file)
        await broker.declare([Topic("order", partitions=1)])
        envelopes = [seal(Placed(order_id="a", n=n), source="app", now=REAL.now()) for n in range(3)]
        go = threading.Event()
        held = file.submit(lambda tx: go.wait(10))  # what is asked for meanwhile shares the next commit
        before = file.submit(lambda tx: tx.append(envelopes[:2]))
        declared = asyncio.create_task(broker.declare([Topic("order", partitions=1, retention="30d")]))
        await asyncio.sleep(0)
        after = file.submit(lambda tx: tx.append(envelopes[2:]))
        go.set()
        await asyncio.gather(held, before, declared, after)
        there = await broker.read("order", 0, 0, 100)
        assert [a.envelope.id for a in there if a.envelope] == [e.id for e in envelopes]
    finally:
        file.close()


async def test_a_mark_stays_while_a_duplicate_of_its_event_has_not_been_handled() -> None:
    """Retention is the horizon of deduplication: a resend within it is recognised, however late it is handled."""
    service, seen = Service("s", guarantee="effectively-once", retry=Retry(attempts=1)), []

    @service.on(Placed)
    async def handle(e: Placed) -> None:
        seen.append(e.n)
        if e.n == 1:
            raise ValueError("to the shelf: what comes after it waits")

    app = App(service, topics=[Topic("order", partitions=1, retention="10s")])
    async with running(app) as t:
        await t.publish(Placed(order_id="a", n=0), id="same")
        await t.settled()
        t.advance(6)
        await t.publish(Placed(order_id="a", n=1))
        await t.publish(Placed(order_id="a", n=0), id="same")
        await t.settled()
        await t.scale(0)  # what a process remembers by itself is gone
        await t.scale(1)
        t.advance(6)
        await trim(t.app.file)
        await t.discard(t.dead(handle))
        await t.settled()
        assert seen == [0, 1]
        t.advance(60)
        await t.publish(Placed(order_id="a", n=2))
        await t.settled()
        t.advance(60)
        assert await trim(t.app.file) > 0, "nothing is open any more: old events go"
        assert t.books.balanced


# --- what a handler may do to its worker ---------------------------------------------------------------------------


async def test_a_handler_that_cancels_its_own_task_does_not_take_the_runner_away() -> None:
    service, seen = Service("s", concurrency=1, retry=Retry(attempts=1), on_dead="skip"), []

    @service.on(Placed)
    async def handle(e: Placed) -> None:
        seen.append(e.n)
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0, "the last event's cancellation is not this one's"
        if e.n < 3:
            task.cancel()

    async with running(App(service)) as t:
        for n in range(5):
            await t.publish(Placed(order_id="a", n=n))
            await t.settled(20)
        assert seen == [0, 1, 2, 3, 4]
        assert not t.dead_letters(), "it returned, so it was done"


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize("error", [Mute(), ValueError("bytes of a file name: \udcff"), ValueError("nul \0")], ids=type)
async def test_an_error_whose_text_cannot_be_made_or_stored_is_a_failure_like_any_other(error: Exception) -> None:
    service = Service("s", retry=Retry(attempts=2, first=0))

    @service.on(Placed)
    async def handle(e: Placed) -> None:
        raise error

    async with running(App(service)) as t:
        await t.publish(Placed(order_id="a"))
        await t.settled(20)
        letter = t.dead(handle)
        assert letter.error_type == type(error).__name__
        assert len(letter.attempts) == 2
        describe(error).encode()


@pytest.mark.parametrize("error", [SystemExit(3), GeneratorExit()])
async def test_whatever_a_rule_raises_is_the_failure_of_its_event(error: BaseException) -> None:
    service = Service("s", retry=Retry(attempts=2, first=0))

    def wanted(e: Placed) -> bool:
        raise error

    @service.on(Placed, where=wanted)
    async def handle(e: Placed) -> None: ...

    async with running(App(service)) as t:
        await t.publish(Placed(order_id="a"))
        await t.settled(20)
        assert t.dead(handle).error_type == type(error).__name__


@pytest.mark.parametrize("after", [float("inf"), float("nan"), 1e300])
async def test_a_wait_that_is_no_time_is_refused(after: float) -> None:
    with pytest.raises(UsageError):
        RetryLater(after=after)
    service = Service("s")

    @service.on(Placed)
    async def handle(e: Placed) -> None:
        raise RetryLater(after=after)

    async with running(App(service)) as t:
        await t.publish(Placed(order_id="a"))
        await t.settled(20)
        assert t.dead(handle).reason == "cannot_heal"


def test_a_steep_retry_ends_at_its_longest_wait() -> None:
    assert Retry(attempts=1000, factor=1e10, max=7, jitter=0).wait_seconds(500, chance=0.0) == 7


# --- our own trouble is not the event's ------------------------------------------------------------------------------


class Trouble:
    """Makes calls fail as on a full disk, until it is over."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        self.on, self.hits = True, 0
        original = getattr(owner, name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            if self.on:
                self.hits += 1
                raise Unavailable("UL2001", "the disk is full; nothing was accepted")
            return await original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize("call", ["take", "carry_out", "_claim"])
async def test_a_full_disk_stops_no_service(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    service, seen = Service("s", retry=Retry(attempts=1)), []

    @service.on(Placed)
    async def handle(e: Placed) -> None:
        seen.append(e.n)
        if call == "carry_out" and seen == [0]:
            raise ValueError("once")

    monkeypatch.setattr(worker, "AGAIN_SECONDS", 0.01, raising=False)
    trouble = Trouble(monkeypatch, *((EmbeddedMember, "_coordinate") if call == "_claim" else (SqliteStore, call)))
    if call == "carry_out":
        trouble.on = False
    async with running(App(service)) as t:
        await t.publish_all([Placed(order_id="a", n=n) for n in range(3)])
        if call == "carry_out":
            await until(lambda: t.dead_letters())
            trouble.on = True
            asked = asyncio.create_task(t.redrive(t.dead(handle)))
            await until(lambda: trouble.hits > 1)
            trouble.on = False
            await asked
        else:
            await until(lambda: trouble.hits > 1)
            trouble.on = False
        await t.settled(20)
        assert seen[-3:] == [0, 1, 2]


async def test_a_full_disk_does_not_keep_a_service_from_stopping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, seen = Service("s"), []

    @service.on(Placed)
    async def handle(e: Placed) -> None:
        seen.append(e.n)

    monkeypatch.setattr(worker, "SAVE_SECONDS", 0.5)
    trouble = Trouble(monkeypatch, SqliteStore, "settle")
    app = App(service, broker=f"embedded://{tmp_path / 'events.db'}")
    async with app:
        serving = asyncio.create_task(app.serve())
        await app.publish(Placed(order_id="a"))
        await until(lambda: trouble.hits)
        app.stop()
        await asyncio.wait_for(serving, 20)
        trouble.on = False
        members = app.file.read(lambda c: c.execute("select count(*) from unlost_member").fetchone())
        assert members == (0,), "it must not hold partitions that it does not serve any more"
        serving = asyncio.create_task(app.serve())
        await until(lambda: len(seen) == 2)
        app.stop()
        await serving
        assert books(FileRecords(app.file)).services["s"].done == 1


@pytest.mark.parametrize("is_async", [True, False])
async def test_a_deadline_that_passed_while_the_file_was_not_to_be_had_spends_no_attempt(
    tmp_path: Path, is_async: bool
) -> None:
    service, calls = Service("s", deadline=0.2, retry=Retry(attempts=1)), []
    app = App(service, broker=f"embedded://{tmp_path / 'events.db'}")
    busy, over = threading.Event(), threading.Event()

    def hold(tx: Any) -> None:  # as a stopped process does that holds the write lock
        busy.set()
        over.wait(10)

    def called() -> None:
        calls.append(1)
        if len(calls) == 1:
            asyncio.run_coroutine_threadsafe(app.file.write(hold), loop)
        elif len(calls) == 2:
            over.set()

    async def pay(e: Placed, ctx: Context) -> None:
        called()
        await until(busy.is_set)
        async with ctx.transaction():
            ctx.publish(Paid(order_id=e.order_id))

    def pay_sync(e: Placed, ctx: Context) -> None:
        called()
        busy.wait(10)
        with ctx.transaction():
            ctx.publish(Paid(order_id=e.order_id))

    service.on(Placed)(pay if is_async else pay_sync)
    loop = asyncio.get_running_loop()
    async with app:
        serving = asyncio.create_task(app.serve())
        await app.publish(Placed(order_id="a"))
        await until(lambda: books(FileRecords(app.file)).services["s"].done or letters(FileRecords(app.file)))
        assert not letters(FileRecords(app.file))
        app.stop()
        await serving


# --- outages, owners, rooms ---------------------------------------------------------------------------------------


def test_a_block_that_is_given_up_while_it_is_opened_does_not_hold_the_file_for_ever(tmp_path: Path) -> None:
    file = File(tmp_path / "events.db")

    class Slow(Block):
        """Gives itself up at the worst moment: between the look at its state and the change of it."""

        @property
        def state(self) -> str:
            return self._state

        @state.setter
        def state(self, new: str) -> None:
            if new == "withdrawn" and threading.current_thread() is not file._thread:
                opened.wait(0.5)
            self._state = new

    opened = threading.Event()
    block = Slow(lambda error: opened.set(), lambda error: None, 0.25)
    try:
        aborting = threading.Thread(target=block.abort)
        aborting.start()
        file.submit_block(block)
        aborting.join(20)
        file.write_sync(lambda tx: tx.one("select 1"), timeout=5)
    finally:
        file.close()


async def test_events_that_come_back_without_an_attempt_left_do_not_keep_up_an_outage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They were not tried, so they say nothing about what the handler needs."""
    monkeypatch.setattr(outage, "DEATHS_IN_A_ROW", 3)
    service, seen = Service("s", retry=Retry(attempts=5, first=60, jitter=0)), []

    @service.on(Placed)
    async def handle(e: Placed) -> None:
        seen.append(e.n)
        raise OSError("away")

    async with running(App(service)) as t:
        await t.publish_all([Placed(order_id=f"o{n}", n=n) for n in range(6)])
        await t.until(lambda: len(t.db("select 1 from unlost_waiting where attempt = 1")) == 6)
        await t.scale(0)
        service.handlers["order.placed" if "order.placed" in service.handlers else next(iter(service.handlers))] = (
            dataclasses.replace(next(iter(service.handlers.values())), retry=Retry(attempts=1))
        )
        await t.scale(1)
        await t.settled(20)
        assert len(t.dead_letters()) == 6 and len(seen) == 6


async def test_a_turn_that_was_given_to_a_lane_that_leaves_goes_to_the_next() -> None:
    service, seen, gate = Service("s", concurrency=1), [], asyncio.Event()

    @service.on(Placed)
    async def handle(e: Placed) -> None:
        seen.append(e.order_id)
        await gate.wait()

    @service.on(Paid, concurrency=8)
    async def other(e: Paid) -> None: ...

    async with running(App(service)) as t:
        await t.publish_all([Placed(order_id=f"o{n}") for n in range(40)])
        (w,) = t._workers()
        await t.until(lambda: len(seen) == 1 and len(w._held["handle"]) == 39)
        w._let_on("handle")  # the turn has come of the first of them; before a runner takes it up,
        leaving = w._ready[0].owned  # its unit is wanted back
        w._drop_queued(leaving)
        assert w._ready and w._ready[0].owned is not leaving
        gate.set()
        await t.until(lambda: not w._held["handle"])
        await t.scale(0)
        await t.scale(1)
        await t.settled(20)
        assert len(set(seen)) == 40


async def test_a_topic_that_only_some_members_know_is_shared_by_them(tmp_path: Path) -> None:
    """A rolling deploy: the old release does not know the new topic, and does not take its share of it."""
    files = [File(tmp_path / "events.db"), File(tmp_path / "events.db")]
    brokers = [EmbeddedBroker(file) for file in files]
    await brokers[0].declare([Topic("old"), Topic("new")])
    members = [await brokers[0].join("s", ["old"]), await brokers[1].join("s", ["old", "new"])]

    async def serve(member: EmbeddedMember) -> None:
        while True:
            for change in await member.receive():
                if isinstance(change, Revoked):
                    await member.release(change.units)

    tasks = [asyncio.create_task(serve(member)) for member in members]
    sql = "select topic, process, count(*) from unlost_assignment group by 1, 2 order by 1, 3"

    def shares() -> dict[str, list[tuple[str | None, int]]]:
        found: dict[str, list[tuple[str | None, int]]] = {"old": [], "new": []}
        for topic, process, count in files[0].read(lambda c: c.execute(sql).fetchall()):
            found[topic].append((process, count))
        return found

    try:
        await until(lambda: shares()["new"] == [(files[1].process_id, 8)] and len(shares()["old"]) == 2)
        await until(lambda: all(process for shared in shares().values() for process, _ in shared))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for member in members:
            await member.close()
        for file in files:
            file.close()


POISON = """
import asyncio, os, sys
from unlost import App, Event, Retry, Service
from unlost.ops.books import books, gather
from unlost.store.records import FileRecords

class Placed(Event, key="order_id", topic="order"):
    order_id: str

slow, bad = (Service(name, retry=Retry(attempts=3, first=0.01)) for name in ("slow", "bad"))

@slow.on(Placed, name="slow")
async def take_long(e: Placed) -> None:
    await asyncio.sleep(0.3)

@bad.on(Placed, name="bad")
async def kill(e: Placed) -> None:
    await asyncio.sleep(0.1)
    os._exit(9)

async def main() -> None:
    app = App(slow, bad, broker="embedded://" + sys.argv[1])
    async with app:
        serving = asyncio.create_task(app.serve())
        if len(sys.argv) > 2:
            await app.publish(Placed(order_id="a"))
        while True:
            await asyncio.sleep(0.01)
            found = books(FileRecords(app.file)).services
            if all(b.done + b.dead == 1 for b in found.values()):
                break
        print({name: (b.done, b.dead) for name, b in sorted(found.items())})
        app.stop()
        await serving

asyncio.run(main())
"""


def test_a_service_does_not_answer_for_its_neighbour_that_kills_their_process(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(POISON)
    command = [sys.executable, str(script), str(tmp_path / "events.db")]
    for times in range(8):
        ended = subprocess.run(
            [*command, *(["publish"] if not times else [])], capture_output=True, text=True, timeout=60
        )
        if ended.returncode != 9:
            break
    assert ended.stdout.strip() == "{'bad': (0, 1), 'slow': (1, 0)}", ended.stderr


async def test_the_digest_of_a_trimmed_log_is_still_compared(tmp_path: Path) -> None:
    """Also where the last event with an outcome has been trimmed, and only those behind it are left."""
    service = Service("s")

    @service.on(Placed)
    async def handle(e: Placed) -> None: ...

    app = App(service, topics=[Topic("order", partitions=1, retention="10s")])
    async with running(app) as t:
        await t.publish_all([Placed(order_id="a", n=n) for n in range(3)])
        await t.settled()
        await t.scale(0)
        t.advance(60)
        await t.publish(Placed(order_id="a", n=3))
        assert await trim(t.app.file) == 3
        (evidence,) = gather(FileRecords(t.app.file))
        assert evidence.log_digest == evidence.digest
        await t.scale(1)
        await t.settled()
