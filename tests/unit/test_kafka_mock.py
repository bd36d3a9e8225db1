"""Publisher and member against librdkafka's own mock cluster: three brokers in this process and no JVM."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator
from typing import Any, cast

import pytest
from confluent_kafka import Producer

from unlost.brokers.kafka.member import KafkaMember
from unlost.brokers.kafka.publisher import Call, Publisher, Sent
from unlost.brokers.kafka.settings import Settings, parse
from unlost.brokers.kafka.topics import Cluster, Described
from unlost.brokers.kafka.wire import headers_of
from unlost.brokers.port import Ack, Arrivals, Assigned, Receipt
from unlost.events import partition_of
from unlost.events.topic import Arrival, Unit
from unlost.testing.conformance import envelope

PARTITIONS = 4


@pytest.fixture
def mock() -> Iterator[Settings]:
    cluster = Producer({"test.mock.num.brokers": 3, "bootstrap.servers": "mock", "log_level": 0})
    brokers = cluster.list_topics(timeout=10).brokers.values()
    yield parse("kafka://" + ",".join(f"{b.host}:{b.port}" for b in brokers) + "?session.timeout.ms=6000")
    del cluster


class Said:
    """What the mock cluster cannot answer: it describes no topics. Nothing of what is tested here rests on it."""

    def describe(self, names: Collection[str]) -> dict[str, Described]:
        return {
            name: Described(name=name, id="mock", partitions=PARTITIONS, replication=3, config={}) for name in names
        }


async def publish(publisher: Publisher, count: int) -> list[Receipt]:
    call = Call(asyncio.get_running_loop(), count)
    events = []
    for place in range(count):
        e = envelope("order", key=b"%d" % (place % 50), data=b"%d" % place)
        headers, value = headers_of(e)
        assert e.key is not None
        partition = partition_of(e.key, PARTITIONS)
        events.append(Sent(publisher, call, place, e.id, "order", "order", partition, e.key, value, headers, 100))
    publisher.send(call, events)
    return list(await call.future)


async def test_what_was_confirmed_is_received_in_order(mock: Settings) -> None:
    publisher = Publisher(mock)
    try:
        receipts = [*await publish(publisher, 2000), *await publish(publisher, 1)]
    finally:
        await asyncio.to_thread(publisher.close)
    places = [(r.partition, r.position) for r in receipts]
    for partition in range(PARTITIONS):
        positions = [position for p, position in places if p == partition]
        assert positions == list(range(len(positions))), "receipts in the order of sending, without a gap"

    cluster = cast("Cluster", cast("Any", Said()))
    member = KafkaMember(mock, cluster, "billing", cluster.describe(["order"]), {}, {})
    found: dict[Unit, list[Arrival]] = {}
    try:
        async with asyncio.timeout(30):
            while sum(map(len, found.values())) < len(receipts):
                for change in await member.receive():
                    if isinstance(change, Assigned):
                        assert change.saved == {}, "nothing was saved yet"
                        for unit in change.units:
                            member.seek(unit, 0)
                    elif isinstance(change, Arrivals):
                        found.setdefault(change.unit, []).extend(change.events)
        arrived = {(unit.partition, a.position): a.envelope.id for unit, of in found.items() for a in of if a.envelope}
        assert arrived == {place: r.id for place, r in zip(places, receipts, strict=True)}
        assert all([a.position for a in of] == list(range(len(of))) for of in found.values())
        await member.ack([Ack(unit, len(of), f"note of {unit.partition}") for unit, of in found.items()])
    finally:
        await member.close()

    again = KafkaMember(mock, cluster, "billing", cluster.describe(["order"]), {}, {})
    saved: dict[Unit, tuple[int, str]] = {}
    try:
        async with asyncio.timeout(30):
            while len(saved) < len(found):
                for change in await again.receive():
                    if isinstance(change, Assigned):
                        saved |= change.saved
    finally:
        await again.close()
    assert saved == {unit: (len(of), f"note of {unit.partition}") for unit, of in found.items()}
