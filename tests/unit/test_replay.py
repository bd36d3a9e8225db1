"""`unlost replay`: what was chosen is delivered again, exactly as promised, whatever dies meanwhile; and nothing else moves."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from cli_kit import Shell
from hypothesis import given, settings
from hypothesis import strategies as st

from unlost import App, Command, Context, Event, Reject, Retry, Service, Topic, UsageError
from unlost.brokers.embedded.log import EmbeddedLog
from unlost.brokers.embedded.trim import trim
from unlost.brokers.port import Place
from unlost.events.topic import Arrival
from unlost.ops import shelf
from unlost.ops.connect import Looking, opened
from unlost.ops.replay import begin, carry_out
from unlost.ops.replay_end import cancel
from unlost.ops.replay_member import BURST_SECONDS, Pace
from unlost.ops.replay_plan import Asked, bound, plan
from unlost.ops.replay_state import Replay, Tally, find, replays, same, unfinished
from unlost.sqlite.file import File
from unlost.store.records import FileRecords
from unlost.testing import running
from unlost.testing.kit import Running
from unlost.world import rfc3339

KILLS = 6


class Placed(Event, key="order_id", topic="order"):
    order_id: str
    n: int


class Paid(Event, key="order_id", topic="order"):
    order_id: str
    n: int


class Thanked(Event, key="order_id", topic="thanks"):
    order_id: str
    n: int


class Ship(Command, queue="shipments", key="order_id"):
    order_id: str


class Note:
    """What a handler saw of one delivery."""

    def __init__(self, event: Any, ctx: Context) -> None:
        self.order_id, self.n = event.order_id, getattr(event, "n", 0)
        self.id, self.replaying, self.idempotency_key = ctx.id, ctx.replaying, ctx.idempotency_key
        self.attempt = ctx.attempt


class Shop:
    """An App whose handlers note what they get, and what they are told to do."""

    def __init__(self, **service: Any) -> None:
        self.notes: list[Note] = []
        self.thanked: list[str] = []
        self.reject: Callable[[Note], bool] = lambda note: False
        self.after: Callable[[Note], None] = lambda note: None
        self.billing = Service("billing", **{"retry": Retry(attempts=1), **service})
        self.crm = Service("crm", guarantee="effectively-once")
        self.billing.on(Placed)(self.charge)
        self.billing.on(Paid)(self.close)
        self.crm.on(Thanked)(self.thank)
        topics = [Topic("order", partitions=3, retention="1h"), Topic("thanks", partitions=2)]
        self.app = App(self.billing, self.crm, topics=topics)

    async def charge(self, event: Placed, ctx: Context) -> None:
        note = Note(event, ctx)
        if self.reject(note):
            raise Reject("not today")
        self.notes.append(note)
        ctx.publish(Thanked(order_id=event.order_id, n=event.n))
        self.after(note)

    async def close(self, event: Paid, ctx: Context) -> None:
        self.notes.append(Note(event, ctx))

    async def thank(self, event: Thanked, ctx: Context) -> None:
        self.thanked.append(ctx.id)

    @property
    def replayed(self) -> list[Note]:
        return [note for note in self.notes if note.replaying]


@contextmanager
def looking_at(app: App) -> Iterator[Looking]:
    with opened(app.broker_url, store=app.store_url) as here:
        yield here


def begun(app: App, service: str = "billing", **asked: Any) -> Replay:
    with looking_at(app) as here:
        found = plan(here, app, Asked(service=service, **asked))
        return begin(here, app.chosen([service])[0], found, operator="ada", reason="test")


@asynccontextmanager
async def ticking(t: Running) -> AsyncIterator[None]:
    """The virtual clock goes on by itself: a rate is measured with it."""

    async def tick() -> None:
        while True:
            await asyncio.sleep(0.002)
            t.advance(0.01)

    task = asyncio.create_task(tick())
    try:
        yield
    finally:
        task.cancel()


async def replayed(app: App, service: str = "billing", **asked: Any) -> Tally:
    return await carry_out(app, await asyncio.to_thread(lambda: begun(app, service, **asked)))


async def fill(t: Running, orders: int = 12) -> None:
    for n in range(orders):
        await t.publish((Placed if n % 3 else Paid)(order_id=f"o{n % 4}", n=n))
    await t.settled()


def log_of(app: App, topic: str = "order") -> dict[Place, list[Arrival]]:
    """All that the log holds: read apart from what is tested."""
    log = EmbeddedLog(app.file)
    return {
        (info.name, p): list(log.read(info.name, p, start, 10_000))
        for info in log.topics([topic])
        for p, (start, _) in enumerate(info.ranges)
    }


def positions(app: App, service: str) -> list[tuple[Any, ...]]:
    sql = "select topic, partition, position, fated, counts, digest, epoch from unlost_progress where service = ? order by 1, 2"
    return app.file.read(lambda c: c.execute(sql, (service,)).fetchall())


def check_order(notes: list[Any], logged: dict[Place, list[Arrival]]) -> None:
    """First deliveries of a key follow the log."""
    place = {a.envelope.id: (where, a.position) for where, all in logged.items() for a in all if a.envelope}
    last: dict[Any, int] = {}
    seen = set()
    for note in notes:
        id, key = (note["id"], note["key"]) if isinstance(note, dict) else (note.id, note.order_id)
        if id in seen:
            continue
        seen.add(id)
        where, position = place[id]
        assert last.get((where, key), -1) < position, f"{id} came after a later event of {key}"
        last[where, key] = position


# --- what is delivered -----------------------------------------------------------------------------------


async def test_all_of_it_comes_again_marked_in_order_with_its_ids_and_the_service_does_not_move() -> None:
    shop = Shop()
    async with running(shop.app) as t:
        await fill(t)
        first, before = list(shop.notes), positions(shop.app, "billing")
        tally = await replayed(shop.app)
        assert (tally.events, tally.done, tally.left, tally.complete) == (12, 12, 0, True)
        assert not any(note.replaying for note in first)
        assert Counter(n.id for n in shop.replayed) == Counter(n.id for n in first)
        assert {n.id: n.idempotency_key for n in shop.replayed} == {n.id: n.idempotency_key for n in first}
        check_order(shop.replayed, log_of(shop.app))
        assert positions(shop.app, "billing") == before
        book = t.books.services["billing.replay-1"]
        assert (book.accepted, book.done, book.waiting) == (12, 12, 0)


async def test_what_its_handlers_publish_has_the_ids_of_the_first_time_so_that_effectively_once_drops_it() -> None:
    shop = Shop()
    async with running(shop.app) as t:
        await fill(t)
        thanked = list(shop.thanked)
        await replayed(shop.app)
        await t.settled()
        logged = [(e.id, e.source, e.causationid) for e in t.envelopes(Thanked)]
        assert len(logged) == 2 * len(thanked) and Counter(logged) == Counter(2 * sorted(set(logged)))
        assert {source for _, source, _ in logged} == {"billing"}
        assert shop.thanked == thanked
        assert t.books.services["crm"].skipped == {"duplicate": len(thanked)}


async def test_events_that_come_after_it_began_are_not_part_of_it() -> None:
    shop = Shop()
    async with running(shop.app) as t:
        await fill(t)
        replay = await asyncio.to_thread(lambda: begun(shop.app))
        await fill(t)
        assert (await carry_out(shop.app, replay)).complete
        await fill(t)
        assert len(shop.replayed) == 12
        book = t.books.services[replay.name]
        assert (book.accepted, book.done, book.waiting, book.unaccounted) == (12, 12, 0, 0)


async def test_it_holds_trimming_back_while_it_is_open_and_not_when_it_has_finished() -> None:
    shop = Shop()
    async with running(shop.app) as t:
        await fill(t)
        replay = await asyncio.to_thread(lambda: begun(shop.app))
        t.advance(7200)
        assert await trim(shop.app.file) == 0
        assert (await carry_out(shop.app, replay)).complete
        await fill(t)
        t.advance(7200)
        assert await trim(shop.app.file) > 12
        assert t.books.balanced


async def test_at_most_once_comes_once_in_a_replay() -> None:
    shop = Shop(guarantee="at-most-once", retry=None)
    async with running(shop.app) as t:
        await fill(t)
        assert (await replayed(shop.app)).done == 12
        assert sorted(n.n for n in shop.replayed) == list(range(12))


async def test_effectively_once_is_refused_unless_it_is_asked_for_or_goes_into_a_new_one() -> None:
    shop = Shop(guarantee="effectively-once")
    async with running(shop.app) as t:
        await fill(t)
        with pytest.raises(UsageError, match="effectively once, and would be repeated") as caught:
            await replayed(shop.app)
        assert caught.value.code == "UL1416" and not shop.replayed
        assert replays(FileRecords(shop.app.file)) == []
        assert (await replayed(shop.app, again=True)).done == 12
        assert (await replayed(shop.app, into="rebuilt")).done == 12
        assert Counter(n.n for n in shop.replayed) == dict.fromkeys(range(12), 2)
        with pytest.raises(UsageError) as caught:
            await replayed(shop.app, into="rebuilt")
        assert caught.value.code == "UL1411"


async def test_an_old_event_is_not_too_old_for_a_replay() -> None:
    """`resends` is about producers that send again, not about operators."""
    shop = Shop(guarantee="effectively-once", resends="1h")
    async with running(shop.app) as t:
        await fill(t)
        t.advance(7200)
        assert (await replayed(shop.app, again=True)).done == 12
        assert t.dead_letters() == []


async def test_what_where_turns_away_is_skipped_again() -> None:
    picky = Service("picky")
    seen = []

    @picky.on(Placed, where=lambda order: order.n % 2 == 0)
    async def take(order: Placed, ctx: Context) -> None:
        seen.append((order.n, ctx.replaying))

    app = App(picky, topics=[Topic("order", partitions=3)])
    async with running(app) as t:
        await fill(t)
        tally = await replayed(app, "picky")
        assert (tally.events, tally.done, tally.skipped, tally.complete) == (8, 4, {"where": 4}, True)
        assert sorted(n for n, again in seen if again) == [2, 4, 8, 10]


async def test_a_cancel_that_died_in_the_middle_is_ended_by_the_same_command(monkeypatch: pytest.MonkeyPatch) -> None:
    shop = Shop()
    async with running(shop.app) as t:
        await fill(t)
        replay = await asyncio.to_thread(lambda: begun(shop.app))

        def end() -> Tally:
            with looking_at(shop.app) as here:
                return cancel(here, replay.name, operator="bob")

        class KilledError(BaseException):
            pass

        def die(*_: object) -> None:
            raise KilledError

        with monkeypatch.context() as patch:
            patch.setattr("unlost.ops.replay_end._rest", die)
            with pytest.raises(KilledError):
                await asyncio.to_thread(end)
        assert [x.replay.name for x in unfinished(FileRecords(shop.app.file))] == [replay.name]
        assert (await asyncio.to_thread(end)).removed == 12
        assert t.books.services[replay.name].removed == 12 and t.books.balanced


async def test_a_command_is_carried_out_again_only_when_that_is_asked_for() -> None:
    shipped = []
    shipping = Service("shipping")

    @shipping.on(Ship)
    async def ship(command: Ship, ctx: Context) -> None:
        shipped.append((command.order_id, ctx.replaying))

    app = App(shipping)
    async with running(app) as t:
        await t.send(Ship(order_id="a"))
        await t.settled()
        for asked in ({}, {"into": "other"}):
            with pytest.raises(UsageError, match="a command is an order") as caught:
                await replayed(app, "shipping", **asked)
            assert caught.value.code == "UL1416"
        assert (await replayed(app, "shipping", again=True)).done == 1
        assert shipped == [("a", False), ("a", True)]


# --- filters ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Shop, Looking, dict[Place, list[Arrival]]]]:
    """A log of 90 events that a service has handled."""
    shop = Shop()
    shop.app.broker_url = shop.app.store_url = f"embedded://{tmp_path_factory.mktemp('filled')}/events.db"

    async def make() -> dict[Place, list[Arrival]]:
        async with shop.app:
            for n in range(90):
                await shop.app.publish((Placed if n % 3 else Paid)(order_id=f"o{n % 7}", n=n))
            return log_of(shop.app)

    logged = asyncio.run(make())
    with looking_at(shop.app) as here:
        yield shop, here, logged


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_what_is_chosen_is_what_a_plain_filter_of_the_log_gives(
    filled: tuple[Shop, Looking, dict[Place, list[Arrival]]], data: st.DataObject
) -> None:
    shop, here, logged = filled
    times = sorted(a.recorded for all in logged.values() for a in all)
    types = data.draw(st.sampled_from([(), ("Placed",), ("order.Paid",), ("Placed", "Paid")]))
    key = data.draw(st.sampled_from([None, "o1", "o6"]))
    low, high = sorted(data.draw(st.tuples(st.sampled_from(times), st.sampled_from(times))))
    places = {
        p: sorted(data.draw(st.tuples(*[st.integers(0, len(logged[p]))] * 2)))
        for p in data.draw(st.sets(st.sampled_from(sorted(logged)), max_size=2))
    }
    by_time = data.draw(st.booleans()) and low < high
    start: tuple[str, ...] = (
        (rfc3339(low),) if by_time else tuple(f"{t}/{p}:{at}" for (t, p), (at, _) in places.items())
    )
    end: tuple[str, ...] = (rfc3339(high),) if by_time else tuple(f"{t}/{p}:{at}" for (t, p), (_, at) in places.items())
    expected: dict[Place, set[int]] = defaultdict(set)
    for place, all in logged.items():
        for a in all:
            e = a.envelope
            assert e is not None
            if by_time:
                inside = low <= a.recorded < high
            else:
                inside = not places or (place in places and places[place][0] <= a.position < places[place][1])
            named = not types or e.type.rpartition(".")[2] in {name.rpartition(".")[2] for name in types}
            if inside and named and (key is None or a.key == key.encode()):
                expected[place].add(a.position)
    asked = Asked(service="billing", types=types, key=key, start=start, end=end)
    if not expected:
        with pytest.raises(UsageError) as caught:
            plan(here, shop.app, asked)
        assert caught.value.code == "UL1414"
        return
    found = plan(here, shop.app, asked)
    chosen = {
        (part.topic, part.partition): {
            a.position for a in logged[part.topic, part.partition]
            if part.start <= a.position < part.end and found.choice.wants(a)
        }
        for part in found.parts
    }  # fmt: skip
    assert {place: at for place, at in chosen.items() if at} == expected
    assert {(p.topic, p.partition): p.events for p in found.parts if p.events} == {
        k: len(v) for k, v in expected.items()
    }
    assert sum(kind.events for kind in found.kinds) == found.events


async def test_what_is_not_chosen_is_skipped_and_counted() -> None:
    shop = Shop()
    async with running(shop.app) as t:
        await fill(t, 24)
        tally = await replayed(shop.app, types=("Placed",), key="o1")
        wanted = [n for n in range(24) if n % 4 == 1 and n % 3]
        assert [n.n for n in shop.replayed] == wanted
        assert (tally.events, tally.done, tally.skipped) == (len(wanted), len(wanted), {})
        book = t.books.services["billing.replay-1"]
        assert book.done == len(wanted)
        assert set(book.skipped) <= {"not replayed"} and book.accepted == book.done + sum(book.skipped.values())


# --- what is gone ----------------------------------------------------------------------------------------


async def test_what_the_log_does_not_hold_any_more_is_named_and_the_rest_comes_only_if_asked_for() -> None:
    shop = Shop()
    async with running(shop.app) as t:
        await fill(t)
        t.advance(7200)
        await fill(t)
        assert await trim(shop.app.file) > 0
        left = {a.envelope.id for all in log_of(shop.app).values() for a in all if a.envelope}
        assert 0 < len(left) < 24
        gone = [(where, all[0].position) for where, all in log_of(shop.app).items() if all and all[0].position]
        with pytest.raises(UsageError) as caught:
            await replayed(shop.app)
        assert caught.value.code == "UL1413"
        for (topic, partition), low in gone:
            assert f"{topic}/{partition}: positions 0 to {low - 1}" in caught.value.found
        assert not shop.replayed
        tally = await replayed(shop.app, what_is_left=True)
        assert {n.id for n in shop.replayed} == left and tally.complete


# --- going on --------------------------------------------------------------------------------------------


async def test_it_is_paused_listed_and_goes_on_by_its_name_or_by_the_same_request() -> None:
    shop = Shop()
    async with running(shop.app) as t:
        await fill(t, 40)
        shop.after = lambda note: shop.app.stop() if note.replaying and note.n > 3 else None
        replay = await asyncio.to_thread(lambda: begun(shop.app, types=("Placed",)))
        async with ticking(t):
            halted = await carry_out(shop.app, replay, rate=50.0)
        assert not halted.finished and halted.left > 0
        records = FileRecords(shop.app.file)
        assert [(x.replay.name, x.tally.left, x.running) for x in unfinished(records)] == [
            (replay.name, halted.left, [])
        ]
        assert same(records, Asked(service="billing", types=("Placed",))) == replay
        assert same(records, Asked(service="billing")) is None
        shop.after = lambda note: None
        ended = await carry_out(shop.app, find(records, replay.name))
        assert ended.complete and ended.done == ended.events
        assert Counter(n.n for n in shop.replayed) == Counter(n for n in range(40) if n % 3)
        assert unfinished(records) == []
        with pytest.raises(UsageError) as caught:
            find(records, replay.name)
        assert caught.value.code == "UL1417"
        [row] = shop.app.file.read(
            lambda c: c.execute(
                "select operator, action, reason, carried_out is not null from unlost_operation"
            ).fetchall()
        )
        assert row == ("ada", "replay", "test", 1)


async def test_what_is_dead_stays_on_its_shelf_and_is_served_when_it_is_redriven() -> None:
    shop = Shop()
    async with running(shop.app) as t:
        await fill(t)
        shop.reject = lambda note: note.replaying and note.n == 1
        tally = await replayed(shop.app)
        assert tally.finished and not tally.complete and tally.dead == 1 and tally.parked == 2  # o1: 1, 5, 9
        records = FileRecords(shop.app.file)
        [letter] = shelf.letters(records, service="billing.replay-1")
        await fill(t)
        book = t.books.services["billing.replay-1"]
        assert (book.dead, book.parked, book.waiting, book.unaccounted) == (1, 2, 0, 0)
        shop.reject = lambda note: False
        await asyncio.to_thread(
            lambda: shelf.ask(records, "redrive", [letter], operator="ada", reason="", wait_seconds=5.0)
        )
        tally = await carry_out(shop.app, find(records, "billing.replay-1"))
        assert tally.complete and tally.done == 12
        assert [n.n for n in shop.replayed if n.order_id == "o1"] == [1, 5, 9]
        assert t.books.services["billing.replay-1"].accepted == 12


async def test_a_cancelled_one_counts_what_is_left_as_removed() -> None:
    shop = Shop()
    async with running(shop.app) as t:
        await fill(t, 40)
        shop.reject = lambda note: note.replaying and note.n == 1
        shop.after = lambda note: shop.app.stop() if note.replaying and note.n > 3 else None
        replay = await asyncio.to_thread(lambda: begun(shop.app, types=("Placed",)))
        async with ticking(t):
            halted = await carry_out(shop.app, replay, rate=50.0)
        assert not halted.finished

        def end() -> Tally:
            with looking_at(shop.app) as here:
                return cancel(here, replay.name, operator="bob", reason="enough")

        tally = await asyncio.to_thread(end)
        assert (
            tally.done == halted.done and tally.done + tally.removed == tally.events and tally.left == tally.dead == 0
        )
        book = t.books.services[replay.name]
        assert (book.done, book.removed, book.waiting) == (tally.done, tally.removed, 0)
        assert t.books.balanced and unfinished(FileRecords(shop.app.file)) == []
        assert positions(shop.app, "billing") and shelf.letters(FileRecords(shop.app.file)) == []


async def test_one_that_is_being_carried_out_is_not_cancelled() -> None:
    shop = Shop()
    async with running(shop.app) as t:
        await fill(t)
        replay = await asyncio.to_thread(lambda: begun(shop.app))
        going = asyncio.create_task(carry_out(shop.app, replay, rate=4.0))
        await t.until(lambda: shop.replayed)

        def end() -> Tally:
            with looking_at(shop.app) as here:
                return cancel(here, replay.name, operator="bob")

        with pytest.raises(UsageError) as caught:
            await asyncio.to_thread(end)
        assert caught.value.code == "UL1418"
        shop.app.stop()
        halted = await going
        assert not halted.finished
        async with ticking(t):
            assert (await carry_out(shop.app, replay, rate=1e6)).complete


# --- the rate --------------------------------------------------------------------------------------------


@given(st.floats(0.1, 1000.0), st.lists(st.tuples(st.floats(0.0, 2.0), st.integers(1, 50)), min_size=1, max_size=40))
def test_never_more_than_the_rate_and_one_burst(rate: float, steps: list[tuple[float, int]]) -> None:
    """In every span of time, by counting."""
    pace, now = Pace(rate, 0.0), 0.0
    out: list[float] = []
    for pause, tries in steps:
        now += pause
        out += [now for _ in range(tries) if pace.take(now)]
    burst = max(1.0, rate * BURST_SECONDS)
    for i, since in enumerate(out):
        for j in range(i, len(out)):
            assert j - i + 1 <= (out[j] - since) * rate + burst + 1e-6


@given(st.floats(0.1, 1000.0), st.integers(1, 200))
def test_who_waits_as_long_as_it_says_gets_one_each_time(rate: float, count: int) -> None:
    pace, now = Pace(rate, 0.0), 0.0
    for _ in range(count):
        now += pace.seconds() * (1 + 1e-9) + 1e-9
        assert pace.take(now)


async def test_with_a_rate_everything_comes_as_well_in_order() -> None:
    shop = Shop()
    async with running(shop.app) as t:
        await fill(t, 60)
        replay = await asyncio.to_thread(lambda: begun(shop.app))
        going = asyncio.create_task(carry_out(shop.app, replay, rate=20.0))
        await t.until(lambda: shop.replayed)
        for _ in range(10):
            before = len(shop.replayed)
            t.advance(0.25)
            await t.until(lambda before=before: len(shop.replayed) > before)  # type: ignore[misc]
            await asyncio.sleep(0.02)
            assert len(shop.replayed) <= before + 5 + 2
        async with ticking(t):
            assert (await going).done == 60
        assert sorted(n.n for n in shop.replayed) == list(range(60))
        check_order(shop.replayed, log_of(shop.app))


# --- real processes --------------------------------------------------------------------------------------

SHOP = """
import asyncio, json, os
from unlost import App, Context, Event, Retry, Service, Topic

class OrderPlaced(Event, key="order_id"):
    order_id: str
    n: int

def note(kind: str, order: OrderPlaced, ctx: Context) -> None:
    line = {"kind": kind, "id": ctx.id, "key": order.order_id, "n": order.n, "replaying": ctx.replaying, "pid": os.getpid()}
    with open("notes", "a") as f:
        f.write(json.dumps(line) + "\\n")

billing = Service("billing", retry=Retry(attempts=100))
ledger = Service("ledger", retry=Retry(attempts=100), guarantee="effectively-once")

@billing.on(OrderPlaced)
async def charge(order: OrderPlaced, ctx: Context) -> None:
    if ctx.replaying:
        await asyncio.sleep(0.004)
    note("charged", order, ctx)

@ledger.on(OrderPlaced)
async def book(order: OrderPlaced, ctx: Context) -> None:
    if ctx.replaying:
        await asyncio.sleep(0.004)
    async with ctx.transaction() as db:
        await db.execute("insert into entry (id, replaying) values (?, ?)", (ctx.id, ctx.replaying))
        note("booked", order, ctx)

app = App(billing, ledger, topics=[Topic("order", partitions=3)], schema="schema.sql")
"""
ORDERS, KEYS = 300, 20


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    shell = Shell(tmp_path)
    shell.write("shop.py", SHOP)
    shell.write("schema.sql", "create table if not exists entry (id text not null, replaying integer not null);")
    return shell


def place(shell: Shell, first: int, count: int) -> None:
    lines = "".join(json.dumps({"order_id": f"k{n % KEYS}", "n": n}) + "\n" for n in range(first, first + count))
    shell.ok("publish", "OrderPlaced", "-", "--app", "shop", stdin=lines)


def noted(shell: Shell, *, replaying: bool, kind: str = "charged") -> list[dict[str, Any]]:
    path = shell.folder / "notes"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [x for x in lines if x["replaying"] == replaying and x["kind"] == kind]


def read_log(shell: Shell) -> dict[Place, list[Arrival]]:
    file = File(shell.database)
    try:
        log = EmbeddedLog(file)
        return {("order", p): list(log.read("order", p, 0, 10_000)) for p in range(3)}
    finally:
        file.close()


def saved(shell: Shell, service: str) -> list[tuple[Any, ...]]:
    file = File(shell.database)
    try:
        sql = "select partition, position, counts, digest, epoch from unlost_progress where service = ? order by 1"
        return file.read(lambda c: c.execute(sql, (service,)).fetchall())
    finally:
        file.close()


def killed_in_the_middle(shell: Shell, kind: str, *arguments: str) -> None:
    """Begins the same replay again and again, and kills it each time when it has done some more."""
    for n in range(KILLS):
        with shell.start("replay", *arguments, "--yes", "--app", "shop") as process:
            wanted = len(noted(shell, replaying=True, kind=kind)) + 5 + 7 * n
            end = time.monotonic() + 30
            while len(noted(shell, replaying=True, kind=kind)) < wanted:
                assert process.process.poll() is None, process.text()
                assert time.monotonic() < end, process.text()
                time.sleep(0.002)
            os.kill(process.process.pid, signal.SIGKILL)
            assert process.process.wait(30) == -signal.SIGKILL


@pytest.mark.slow
def test_killed_many_times_every_event_comes_at_least_once_and_in_order(shell: Shell) -> None:
    place(shell, 0, ORDERS)
    shell.handle_all()
    before, logged = saved(shell, "billing"), read_log(shell)
    killed_in_the_middle(shell, "charged", "--service", "billing")
    assert [x["name"] for x in shell.ok("replay", "--list", "--json").json["replays"]] == ["billing.replay-1"]
    ended = shell.ok("replay", "--service", "billing", "--yes", "--app", "shop", "--json").json
    assert (ended["state"], ended["name"], ended["events"], ended["done"]) == (
        "complete",
        "billing.replay-1",
        ORDERS,
        ORDERS,
    )
    notes = noted(shell, replaying=True)
    assert {x["id"] for x in notes} == {a.envelope.id for all in logged.values() for a in all if a.envelope}
    assert len({x["pid"] for x in notes}) == KILLS + 1
    check_order(notes, logged)
    assert saved(shell, "billing") == before
    audited = shell.ok("audit", "--json").json["services"]
    found = {s["service"]: (s["accepted"], s["done"], s["unaccounted"]) for s in audited}
    assert found["billing"] == found["billing.replay-1"] == (ORDERS, ORDERS, 0)


@pytest.mark.slow
def test_killed_many_times_effects_in_a_transaction_happen_once_per_replay(shell: Shell) -> None:
    place(shell, 0, ORDERS)
    shell.handle_all()
    before, logged = saved(shell, "ledger"), read_log(shell)
    killed_in_the_middle(shell, "booked", "--service", "ledger", "--again")
    shell.ok("replay", "--resume", "ledger.replay-1", "--app", "shop")
    file = File(shell.database)
    try:
        entries = file.read(lambda c: c.execute("select id, replaying from entry").fetchall())
    finally:
        file.close()
    ids = sorted(a.envelope.id for all in logged.values() for a in all if a.envelope)
    assert sorted(id for id, replaying in entries if replaying) == ids
    assert sorted(id for id, replaying in entries if not replaying) == ids
    check_order(noted(shell, replaying=True, kind="booked"), logged)
    assert saved(shell, "ledger") == before
    assert shell("audit").code == 0


@pytest.mark.slow
def test_live_traffic_goes_on_meanwhile_and_two_processes_share_a_replay(shell: Shell) -> None:
    place(shell, 0, ORDERS)
    shell.handle_all()
    with shell.start("run", "shop") as live:
        live.says("unlost: ")
        arguments = ("replay", "--service", "billing", "--rate", "100", "--yes", "--app", "shop")
        with shell.start(*arguments) as one:
            while not noted(shell, replaying=True):
                assert one.process.poll() is None, one.text()
                time.sleep(0.002)
            with shell.start(*arguments) as two:
                place(shell, ORDERS, 100)
                assert {one.process.wait(60), two.process.wait(60)} == {0}, one.text() + two.text()
        shell.until(lambda s: not s["waiting"] + s["in_flight"])
        assert live.end(signal.SIGTERM) == 0
    logged = read_log(shell)
    again, direct = noted(shell, replaying=True), noted(shell, replaying=False)
    assert Counter(x["n"] for x in again) == dict.fromkeys(range(ORDERS), 1)
    assert len({x["pid"] for x in again}) == 2
    assert Counter(x["n"] for x in direct) == dict.fromkeys(range(ORDERS + 100), 1)
    for notes in (again, direct):
        check_order(notes, logged)
    found = {
        s["service"]: (s["done"], s["waiting"], s["unaccounted"]) for s in shell.ok("audit", "--json").json["services"]
    }
    assert found["billing"] == (ORDERS + 100, 0, 0) and found["billing.replay-1"] == (ORDERS, 0, 0)


@pytest.mark.slow
def test_ctrl_c_pauses_it(shell: Shell) -> None:
    place(shell, 0, 40)
    shell.handle_all()
    with shell.start("replay", "--service", "billing", "--rate", "20", "--yes", "--app", "shop") as process:
        while not noted(shell, replaying=True):
            assert process.process.poll() is None, process.text()
            time.sleep(0.002)
        assert process.end(signal.SIGINT) == 5
        assert "unlost replay --resume billing.replay-1" in process.text()
    [listed] = shell.ok("replay", "--list", "--json").json["replays"]
    assert listed["done"] + listed["left"] == 40 and listed["left"] > 0 and listed["running"] == []
    shell.ok("replay", "--resume", "billing.replay-1", "--rate", "100000", "--app", "shop")
    assert Counter(x["n"] for x in noted(shell, replaying=True)) == dict.fromkeys(range(40), 1)


# --- what is said ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A shop that has handled three orders."""
    shell = Shell(tmp_path_factory.mktemp("told"))
    for id in ("A1", "A2", "A3"):
        shell.place(id)
    shell.handle_all()
    return shell


def test_a_dry_run_says_what_would_come_and_begins_nothing(told: Shell) -> None:
    result = told.quick("replay", "--service", "billing", "--dry-run", "--app", "shop")
    assert result.code == 0 and "3 events would be delivered to billing again; nothing was changed" in result.out
    found = told.quick("replay", "--service", "billing", "--key", "A2", "--dry-run", "--json", "--app", "shop").json
    assert (found["state"], found["events"], len(found["parts"])) == ("planned", 1, 1)
    assert [(k["topic"], k["type"], k["events"]) for k in found["kinds"]] == [("order", "order.OrderPlaced", 1)]
    assert told.quick("replay", "--list", "--json").json["replays"] == []
    assert [s["service"] for s in told.quick("audit", "--json").json["services"]] == ["billing"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--service", "nobody"], "UL1237", "this App has no service 'nobody'"),
        (["--service", "billing", "--type", "Nothing"], "UL1412", "it handles order.OrderPlaced"),
        (["--service", "billing", "--key", "A9"], "UL1414", "no event of its topics matches --key A9"),
        (["--service", "billing", "--from", "yesterday"], "UL1410", "order/3:120"),
        (["--service", "billing", "--to", "12 parsecs"], "UL1410", "'12 parsecs'"),
        (["--service", "billing", "--from", "2h", "--from", "order/0:0"], "UL1410", "one time, or places"),
        (["--service", "billing", "--from", "1h", "--to", "2h"], "UL1410", "--from comes before --to"),
        (["--service", "billing", "--from", "order/99:0"], "UL1415", "order has partitions 0 to 7"),
        (["--service", "billing", "--from", "nowhere/0:0"], "UL1415", "it reads order"),
        (["--service", "billing", "--to", "order/0:99"], "UL1415", "order/0 ends at"),
        (["--service", "billing", "--into", "billing"], "UL1411", "is known"),
        (["--service", "billing", "--into", "no spaces"], "UL1210", "letters, digits"),
        (["--service", "billing", "--rate", "0"], "UL1419", "events per second"),
        (["--service", "billing", "--rate", "nan"], "UL1419", "events per second"),
        (["--service", "billing"], "UL1333", "--yes"),
        ([], "UL1419", "say what to replay"),
        (["--list", "--key", "A1"], "UL1419", "fixed when it begins"),
        (["--resume", "billing.replay-7"], "UL1417", "none is open"),
        (["--cancel", "billing.replay-7", "--yes"], "UL1417", "none is open"),
    ],
)  # fmt: skip
def test_a_mistake_is_explained_and_changes_nothing(told: Shell, arguments: list[str], code: str, says: str) -> None:
    result = told.quick("replay", *arguments, "--app", "shop")
    assert result.code == 2 and result.err.startswith(code) and says in result.err, result
    assert told.quick("replay", "--list", "--json").json["replays"] == []


def test_a_service_that_has_not_run_has_nothing_to_replay(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    assert shell.quick("replay", "--service", "billing", "--yes", "--app", "shop").err.startswith("UL1301")
    shell.place("A1")  # whoever connects registers the services of its App
    shell.write("other.py", (shell.folder / "shop.py").read_text().replace('Service("billing"', 'Service("newcomer"'))
    result = shell.quick("replay", "--service", "newcomer", "--yes", "--app", "other")
    assert result.code == 2 and result.err.startswith("UL1440"), result


@given(st.text(max_size=30))
def test_whatever_is_typed_as_a_bound_is_one_or_is_refused(text: str) -> None:
    try:
        found = bound([text], "--from")
    except UsageError as e:
        assert e.code == "UL1410" and repr(text) in e.found
    else:
        assert (found.micros is None) == bool(found.places)
