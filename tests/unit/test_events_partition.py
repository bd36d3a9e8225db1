"""The same partition as every Kafka client computes."""

from __future__ import annotations

import random

import pytest
from confluent_kafka import Producer

from unlost.events import murmur2, partition_of


@pytest.mark.parametrize(
    ("key", "signed"),
    [  # from Kafka's own UtilsTest.testMurmur2
        (b"21", -973932308),
        (b"foobar", -790332482),
        (b"a-little-bit-long-string", -985981536),
        (b"a-little-bit-longer-string", -1486304829),
        (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
        (b"abc", 479470107),
    ],
)
def test_known_values(key: bytes, signed: int) -> None:
    assert murmur2(key) == signed & 0xFFFF_FFFF
    for partitions in (1, 8, 7, 1000):
        assert partition_of(key, partitions) == (signed & 0x7FFF_FFFF) % partitions


def test_as_librdkafka_does() -> None:
    chance = random.Random(7)
    keys = [chance.randbytes(chance.randrange(1, 40)) for _ in range(300)] + [f"order-{n}".encode() for n in range(100)]
    found: dict[bytes, int] = {}

    def delivered(error: object, message: object) -> None:
        assert error is None
        found[message.key()] = message.partition()  # type: ignore[attr-defined]

    producer = Producer(
        {
            "test.mock.num.brokers": 1,
            "partitioner": "murmur2_random",
            "linger.ms": 1,
            "log_level": 0,
        }
    )
    for key in keys:
        producer.produce("orders", key=key, value=b"", on_delivery=delivered)
    assert producer.flush(10) == 0
    partitions = len(producer.list_topics("orders", timeout=5).topics["orders"].partitions)
    assert partitions > 1
    assert found == {key: partition_of(key, partitions) for key in keys}
