"""The Kafka adapter between its threads: what happens when one of them is late, blocked, or gone. The clients are fakes."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from confluent_kafka import KafkaError, KafkaException, Message, TopicPartition

from unlost import Event, Service
from unlost.brokers.kafka import member as member_module
from unlost.brokers.kafka import publisher as publisher_module
from unlost.brokers.kafka.member import KafkaMember
from unlost.brokers.kafka.publisher import Call, Publisher, Sent
from unlost.brokers.kafka.refusals import sorted_error
from unlost.brokers.kafka.settings import parse
from unlost.brokers.kafka.topics import Described
from unlost.brokers.port import Abilities, Arrivals, Assigned, Change, Gone, Lost
from unlost.delivery import note
from unlost.delivery import worker as worker_module
from unlost.delivery.worker import Worker
from unlost.errors import OutcomeUnknown, Unavailable
from unlost.events import seal
from unlost.events.topic import Arrival, TopicInfo, Unit
from unlost.sqlite.file import File
from unlost.store.connect import store_beside
from unlost.store.port import Outcome, Settlement
from unlost.store.sqlite import SqliteStore

SETTINGS = parse("kafka://nowhere:1")
UNIT = Unit("bill", "orders", 0)


def soon(what: Any, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.005)


# --- publishing ----------------------------------------------------------------------------------------------


class FakeProducer:
    """Confirms what it is allowed to."""

    made: ClassVar[list[FakeProducer]] = []
    failing = 0  # so many more are not made
    confirms = True

    def __init__(self, config: dict[str, Any]) -> None:
        if FakeProducer.failing:
            FakeProducer.failing -= 1
            raise KafkaException(KafkaError(KafkaError._INVALID_ARG, "ssl.ca.location: no such file"))
        self.sent: list[bytes | None] = []
        self._reports: deque[Any] = deque()
        FakeProducer.made.append(self)

    def produce(self, topic: str, value: bytes | None, key: Any, partition: int, report: Any, headers: Any) -> None:
        for name, _ in headers:
            name.encode()
        self.sent.append(value)
        self._reports.append(
            (report, Message(topic=topic, partition=partition, offset=len(self.sent), timestamp=(1, 1)))
        )

    def poll(self, seconds: float) -> int:
        time.sleep(min(seconds, 0.01))
        while FakeProducer.confirms and self._reports:
            report, message = self._reports.popleft()
            report(None, message)
        return 0

    def purge(self) -> None:
        pass


@pytest.fixture
def fake_producer(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeProducer]]:
    monkeypatch.setattr(publisher_module, "Producer", FakeProducer)
    monkeypatch.setattr(publisher_module, "RECREATE_SECONDS", 0.01)
    monkeypatch.setattr(publisher_module, "CLOSE_SECONDS", 0.3)
    FakeProducer.made, FakeProducer.failing, FakeProducer.confirms = [], 0, True
    yield FakeProducer


def call_of(publisher: Publisher, values: Sequence[bytes], header: str = "a") -> tuple[Call, list[Sent]]:
    call = Call(asyncio.get_running_loop(), len(values))
    return call, [
        Sent(publisher, call, n, f"id {v!r}", "t", "t", 0, None, v, [(header, b"")], 10) for n, v in enumerate(values)
    ]


async def test_an_event_loop_that_ends_in_the_middle_of_its_turns_holds_up_no_other(fake_producer: Any) -> None:
    publisher = Publisher(SETTINGS)
    try:
        fake_producer.confirms = False

        async def leave() -> None:
            publisher.send(*call_of(publisher, [b"old"] * 20))
            await asyncio.sleep(0.01)  # its next turn is under way, and never comes

        await asyncio.to_thread(asyncio.run, leave())
        fake_producer.confirms = True
        call, events = call_of(publisher, [b"new"])
        publisher.send(call, events)
        async with asyncio.timeout(3):
            await call.future
    finally:
        await asyncio.to_thread(publisher.close)


async def test_an_event_loop_that_is_blocked_holds_up_no_other(fake_producer: Any) -> None:
    publisher, blocked, go_on = Publisher(SETTINGS), threading.Event(), threading.Event()

    async def block() -> None:
        call, events = call_of(publisher, [b"first"])
        publisher.send(call, events)
        blocked.set()
        go_on.wait(5)
        await call.future

    other = asyncio.create_task(asyncio.to_thread(asyncio.run, block()))
    try:
        await asyncio.to_thread(blocked.wait)
        call, events = call_of(publisher, [b"second"])
        publisher.send(call, events)
        async with asyncio.timeout(3):
            await call.future
        assert fake_producer.made[0].sent == [b"first", b"second"]
    finally:
        go_on.set()
        await other
        await asyncio.to_thread(publisher.close)


async def test_an_event_that_the_client_does_not_take_holds_up_none_behind_it(fake_producer: Any) -> None:
    publisher = Publisher(SETTINGS)
    try:
        bad, events = call_of(publisher, [b"bad"], header="\ud800")
        good, more = call_of(publisher, [b"good"])
        publisher.send(bad, events)
        publisher.send(good, more)
        async with asyncio.timeout(3):
            await good.future
            with pytest.raises(Unavailable):
                await bad.future
    finally:
        await asyncio.to_thread(publisher.close)


async def test_what_was_refused_is_not_sent_again_with_the_next_producer(
    fake_producer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Publisher, "_run", lambda self: None)
    publisher = Publisher(SETTINGS)
    _, events = call_of(publisher, [b"refused", b"fine"])
    for n, event in enumerate(events):
        event.number = n
        publisher._pending[n] = event
    publisher.reports.append((events[0], KafkaError(KafkaError.TOPIC_AUTHORIZATION_FAILED), -1, -1))
    await asyncio.to_thread(publisher._replace, KafkaError(KafkaError._FATAL))
    assert fake_producer.made[1].sent == [b"fine"]


async def test_what_was_refused_for_want_of_rights_is_not_sent_when_they_are_granted(
    fake_producer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Publisher, "_run", lambda self: None)
    publisher = Publisher(SETTINGS)
    call, events = call_of(publisher, [b"refused"])
    publisher.send(call, events)
    await asyncio.to_thread(publisher._replace, KafkaError(KafkaError.CLUSTER_AUTHORIZATION_FAILED))
    later, more = call_of(publisher, [b"granted"])
    publisher.send(later, more)
    await asyncio.sleep(0.05)
    assert call.future.exception() is not None
    assert [p.sent for p in fake_producer.made] == [[], [b"granted"]]


async def test_a_producer_that_cannot_be_made_is_tried_again(fake_producer: Any) -> None:
    publisher = Publisher(SETTINGS)
    try:
        fake_producer.failing = 3
        fake_producer.confirms = False
        call, events = call_of(publisher, [b"x"])
        publisher.send(call, events)
        await asyncio.sleep(0.02)
        publisher._on_error(KafkaError(KafkaError._FATAL))
        await asyncio.to_thread(soon, lambda: len(fake_producer.made) == 2)
        fake_producer.confirms = True
        async with asyncio.timeout(3):
            await call.future
    finally:
        await asyncio.to_thread(publisher.close)


@pytest.mark.parametrize("code", [KafkaError.REQUEST_TIMED_OUT, KafkaError.NOT_ENOUGH_REPLICAS_AFTER_APPEND, KafkaError.UNKNOWN])  # fmt: skip
def test_what_may_have_been_written_is_not_called_refused(code: int) -> None:
    assert isinstance(sorted_error(KafkaError(code), "publishing"), OutcomeUnknown)


# --- receiving -----------------------------------------------------------------------------------------------


class FakeConsumer:
    """A group of one, and a log that the test writes."""

    partitions = 1

    def __init__(self, config: dict[str, Any]) -> None:
        self.come: deque[Message] = deque()
        self.assign: list[TopicPartition] = []
        self.polls = 0
        self.sought: list[int] = []
        self.anew = 0
        self.refuse_seeks = 0
        self.refuse_committed = 0
        self.range: tuple[int, int] | None = (0, 100)
        self.closed = threading.Event()

    def subscribe(self, topics: Any, on_assign: Any, on_revoke: Any, on_lost: Any) -> None:
        self.on_assign, self.assign = on_assign, [TopicPartition("orders", p) for p in range(FakeConsumer.partitions)]

    def poll(self, seconds: float) -> Message | None:
        self.polls += 1
        if self.assign:
            new, self.assign = self.assign, []
            self.on_assign(self, new)
        if self.come:
            return self.come.popleft()
        time.sleep(0.002)
        return None

    def consume(self, count: int, seconds: float) -> list[Message]:
        return [self.come.popleft() for _ in range(min(count, len(self.come)))]

    def committed(self, places: list[TopicPartition], seconds: float) -> list[TopicPartition]:
        if self.refuse_committed:
            self.refuse_committed -= 1
            return [_Failed() for _ in places]  # type: ignore[misc]
        return [TopicPartition(p.topic, p.partition, 7, "a note") for p in places]

    def seek(self, place: TopicPartition) -> None:
        if self.refuse_seeks:
            self.refuse_seeks -= 1
            raise KafkaException(KafkaError(KafkaError._STATE))
        self.sought.append(place.offset)

    def get_watermark_offsets(self, place: Any, seconds: float, cached: bool) -> tuple[int, int]:
        if self.range is None:
            raise KafkaException(KafkaError(KafkaError._TRANSPORT))
        return self.range

    def incremental_assign(self, places: Any) -> None:
        self.anew += 1

    def incremental_unassign(self, places: Any) -> None: ...
    def pause(self, places: Any) -> None: ...
    def resume(self, places: Any) -> None: ...

    def close(self) -> None:
        self.closed.set()


class _Failed:
    topic, partition, offset, metadata = "orders", 0, -1001, None
    error = KafkaError(KafkaError.COORDINATOR_LOAD_IN_PROGRESS)


class FakeCluster:
    def describe(self, names: Any) -> dict[str, Described]:
        return {"orders": ORDERS}


ORDERS = Described(name="orders", id="1", partitions=1, replication=1, config={})


def event_at(position: int) -> Message:
    return Message(topic="orders", partition=0, offset=position, value=b"{}", timestamp=(1, 1))


def error_at(position: int, code: int) -> Message:
    return Message(topic="orders", partition=0, offset=position, error=KafkaError(code))


@pytest.fixture
def fake_consumer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member_module, "Consumer", FakeConsumer)


def a_member() -> tuple[KafkaMember, Any]:
    member = KafkaMember(SETTINGS, FakeCluster(), "bill", {"orders": ORDERS}, {}, {})  # type: ignore[arg-type]
    return member, member._consumer


async def assigned(member: KafkaMember, at: int = 0) -> None:
    changes = await next_changes(member)
    assert isinstance(changes[0], Assigned)
    member.seek(UNIT, at)


async def next_changes(member: KafkaMember, seconds: float = 5) -> Sequence[Change]:
    async with asyncio.timeout(seconds):
        return await member.receive()


async def test_a_seek_that_came_too_early_does_not_undo_the_next_one(
    fake_consumer: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KafkaMember, "_run", lambda self: None)
    member, client = a_member()
    place = ("orders", 0)
    member._assigned.add(place)
    client.refuse_seeks = 1
    member._do_seek(place, 5, 1)
    member._do_seek(place, 9, 2)
    member._late_seeks()
    assert client.sought == [9] and member._fetching == {place: 2}


async def test_no_seek_in_the_middle_of_a_call_of_the_client(
    fake_consumer: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the client has in its hands there was fetched before it, and would be taken for what follows it."""
    monkeypatch.setattr(KafkaMember, "_run", lambda self: None)
    monkeypatch.setattr(member_module, "DRAIN_SECONDS", 0.1)
    member, client = a_member()
    member._assigned |= {("orders", 0), ("orders", 1)}
    member._orders.put(lambda: member._do_seek(("orders", 0), 5, 1))
    member._on_revoke(client, [TopicPartition("orders", 1)])
    assert client.sought == [] and not member._fetching
    member._late_seeks()
    assert client.sought == [5]


async def test_polling_goes_on_and_closing_ends_while_a_range_cannot_be_looked_up(fake_consumer: None) -> None:
    member, client = a_member()
    await assigned(member)
    client.range = None
    client.come.append(error_at(0, KafkaError._AUTO_OFFSET_RESET))
    receiving = asyncio.create_task(member.receive())
    await asyncio.sleep(0.5)
    before = client.polls
    await asyncio.sleep(1)
    assert client.polls > before
    receiving.cancel()
    closing = asyncio.create_task(member.close())
    done, _ = await asyncio.wait([closing], timeout=3)
    client.range = (0, 100)
    assert done


async def test_a_read_out_of_range_is_looked_into_though_a_seek_is_under_way(fake_consumer: None) -> None:
    member, client = a_member()
    await assigned(member)
    await asyncio.to_thread(soon, lambda: client.sought)
    anew = client.anew
    client.range = (9, 20)
    client.come += [event_at(0), event_at(3), error_at(1, KafkaError._AUTO_OFFSET_RESET)]
    found = list(await next_changes(member))
    assert [type(c) for c in found] == [Arrivals]
    found = list(await next_changes(member))
    assert isinstance(found[0], Gone) and (found[0].gap.start, found[0].gap.end) == (1, 9)
    await asyncio.to_thread(soon, lambda: client.sought[-1] == 9 and client.anew > anew)
    await member.close()


async def test_the_end_that_is_seen_while_a_unit_is_paused_is_not_forgotten(
    fake_consumer: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeConsumer, "partitions", 2)  # where all are paused, nothing is even looked at
    member, client = a_member()
    await assigned(member)
    await asyncio.to_thread(soon, lambda: client.sought)
    member.pause(UNIT)
    client.come += [event_at(0), error_at(2, KafkaError._PARTITION_EOF)]
    receiving = asyncio.create_task(next_changes(member))
    await asyncio.sleep(0.2)
    member.resume(UNIT)
    assert [type(c) for c in await receiving] == [Arrivals]
    await asyncio.to_thread(soon, lambda: client.sought == [0, 1])  # the jump behind it is looked at again
    client.come.append(error_at(2, KafkaError._PARTITION_EOF))
    (gone,) = await next_changes(member)
    assert isinstance(gone, Gone) and (gone.gap.start, gone.gap.end, gone.gap.kind) == (1, 2, "void")
    await member.close()


async def test_nothing_begins_without_the_note_of_the_owner_before(
    fake_consumer: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = FakeConsumer.__init__

    def begin(self: FakeConsumer, config: Any) -> None:
        began(self, config)
        self.refuse_committed = 2

    monkeypatch.setattr(FakeConsumer, "__init__", begin)
    member, _ = a_member()
    (change,) = await next_changes(member)
    assert isinstance(change, Assigned) and change.saved[UNIT].note == "a note"
    await member.close()


async def test_a_member_whose_event_loop_has_ended_leaves_the_group(fake_consumer: None) -> None:
    clients = []

    async def vanish() -> None:
        _, client = a_member()
        clients.append(client)
        await asyncio.sleep(0.05)

    await asyncio.to_thread(asyncio.run, vanish())
    assert await asyncio.to_thread(clients[0].closed.wait, 3)


# --- the worker beside it ------------------------------------------------------------------------------------


class OrderPlaced(Event, key="order_id", topic="orders"):
    order_id: str


class FakeMember:
    def __init__(self) -> None:
        self.changes: asyncio.Queue[Sequence[Change]] = asyncio.Queue()
        self.paused: set[Unit] = set()
        self.sought: list[int] = []
        self.released: list[Unit] = []

    async def receive(self) -> Sequence[Change]:
        return await self.changes.get()

    def seek(self, unit: Unit, position: int) -> None:
        self.sought.append(position)

    def pause(self, unit: Unit) -> None:
        self.paused.add(unit)

    def resume(self, unit: Unit) -> None:
        self.paused.discard(unit)

    async def ack(self, acks: Any) -> None: ...

    async def release(self, units: Sequence[Unit]) -> None:
        self.released += units

    async def close(self) -> None: ...


class FakeBroker:
    abilities = Abilities(
        name="fake", survives="process death", ordered=True, replayable=True, delayed=False, atomic_batches=False,
        commits_with_store=False,
    )  # fmt: skip

    def __init__(self) -> None:
        self.member = FakeMember()

    async def join(self, service: str, topics: Sequence[str]) -> FakeMember:
        return self.member


class Stage:
    """A worker with a store of its own, and a member that the test plays."""

    def __init__(self, folder: Path) -> None:
        self.file = File(folder / "store.db")
        self.store: SqliteStore = store_beside(self.file, log_here=False, broker="fake")
        self.broker = FakeBroker()
        self.member = self.broker.member
        self.service = Service("bill")
        self.go = asyncio.Event()
        self.handled: list[str] = []

        @self.service.on(OrderPlaced, concurrency=4)
        async def take(order: OrderPlaced) -> None:
            await self.go.wait()
            self.handled.append(order.order_id)

    async def __aenter__(self) -> Stage:
        info = TopicInfo(
            name="orders", id="1", partitions=1, ranges=[(0, 0)], retention=None, replication=1, min_insync=1,
            survives="process death",
        )  # fmt: skip
        await self.store.register("bill", {"on_dead": "park", "topics": 1, "retained": []}, [info])
        self.worker = Worker(self.service, self.broker, self.store)  # type: ignore[arg-type]
        return self

    def start(self) -> None:
        self.running = asyncio.create_task(self.worker.run())

    async def __aexit__(self, *error: object) -> None:
        self.go.set()
        await self.worker.stop(5)
        await self.running
        self.file.close()

    async def until(self, what: Any) -> None:
        async with asyncio.timeout(5):
            while not what():
                await asyncio.sleep(0.01)


def arrivals(start: int, end: int) -> Arrivals:
    events = []
    for position in range(start, end):
        e = seal(OrderPlaced(order_id=f"o{position}"), source="test", id=f"e{position}", now=1)
        events.append(Arrival(position, e, 1, None, e.key, e.data))
    return Arrivals(UNIT, events)


async def test_a_pause_that_came_after_the_loss_does_not_outlive_it(tmp_path: Path) -> None:
    async with Stage(tmp_path) as stage:
        stage.start()
        stage.member.changes.put_nowait([Assigned([UNIT])])
        await stage.until(lambda: len(stage.member.sought) == 1)
        # The member knows of the loss when the worker, still with the events before it, finds that it has enough.
        stage.member.changes.put_nowait([arrivals(0, worker_module.IN_HAND_MAX), Lost([UNIT])])
        await stage.until(lambda: not stage.worker.owned)
        assert stage.member.paused
        stage.member.changes.put_nowait([Assigned([UNIT])])
        await stage.until(lambda: len(stage.member.sought) == 2)
        assert not stage.member.paused


async def test_a_unit_that_is_assigned_anew_is_not_let_go_of_for_its_own_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Stage(tmp_path) as stage:
        stage.start()
        stage.member.changes.put_nowait([Assigned([UNIT])])
        await stage.until(lambda: stage.member.sought)
        stage.member.changes.put_nowait([arrivals(0, 1)])
        await stage.until(stage.worker.busy)
        take = stage.store.take

        async def slow(units: Sequence[Unit]) -> Any:
            taken = await take(units)
            stage.go.set()  # what the owner of before settles now is fenced
            await stage.until(lambda: stage.handled)
            await asyncio.sleep(0.2)
            return taken

        monkeypatch.setattr(stage.store, "take", slow)
        stage.member.changes.put_nowait([Assigned([UNIT])])
        await stage.until(lambda: len(stage.member.sought) == 2)
        assert stage.member.released == []


async def test_a_done_set_that_is_wide_from_before_does_not_stop_the_events_that_fill_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(note, "NARROW", 0.001)
    monkeypatch.setattr(worker_module, "ACK_SECONDS", 0.02)
    async with Stage(tmp_path) as stage:
        (before,) = await stage.store.take([UNIT])
        done = [Outcome(arrival=a, state="done") for a in arrivals(9, 10).events]
        await stage.store.settle([Settlement(UNIT, before.epoch, done)])
        await stage.store.give([(UNIT, before.epoch)])
        stage.go.set()
        stage.start()
        stage.member.changes.put_nowait([Assigned([UNIT])])
        await stage.until(lambda: stage.member.sought)
        stage.member.changes.put_nowait([arrivals(0, 1)])
        await stage.until(lambda: stage.handled)
        await asyncio.sleep(0.2)
        assert not stage.member.paused
        stage.member.changes.put_nowait([arrivals(1, 12)])
        await stage.until(lambda: stage.member.paused)  # from here on it would become larger
