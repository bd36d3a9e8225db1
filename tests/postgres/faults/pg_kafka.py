"""The log of a real Kafka, as a plain client reads it."""

from __future__ import annotations

import json

from confluent_kafka import OFFSET_BEGINNING, Consumer, TopicPartition
from kafka_books import admin, ends
from pg_checker import Logged

SECONDS = 30.0


def _places(bootstrap: str, prefix: str) -> list[tuple[str, int]]:
    topics = admin(bootstrap).list_topics(timeout=SECONDS).topics
    return [(name, n) for name, found in topics.items() if name.startswith(prefix) for n in found.partitions]


def kafka_ends(bootstrap: str, prefix: str) -> dict[tuple[str, int], int]:
    """By the topics' names without the prefix."""
    found = ends(bootstrap, _places(bootstrap, prefix))
    return {(topic.removeprefix(prefix), n): end for (topic, n), end in found.items()}


def kafka_log(bootstrap: str, prefix: str) -> list[Logged]:
    """Every event, in the order of each partition."""
    places = _places(bootstrap, prefix)
    last = ends(bootstrap, places)
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap, "group.id": "proof", "enable.auto.commit": False, "log_level": 0,
            "auto.offset.reset": "earliest", "enable.partition.eof": True,
        }
    )  # fmt: skip
    found: list[Logged] = []
    try:
        open_ = {place for place in places if last[place] > 0}
        consumer.assign([TopicPartition(*place, OFFSET_BEGINNING) for place in open_])
        idle = 0
        while open_:
            messages = consumer.consume(1000, 1.0)
            idle = 0 if messages else idle + 1
            if idle > SECONDS:
                raise TimeoutError(f"these cannot be read to their end: {sorted(open_)}")
            for m in messages:
                place = (m.topic(), m.partition())
                if m.error() is not None:
                    if m.error().name() == "_PARTITION_EOF" and m.offset() >= last[place]:
                        open_.discard(place)
                    continue
                said = {name: value.decode() for name, value in m.headers() or ()}
                topic = m.topic().removeprefix(prefix)
                found.append(
                    Logged(
                        topic, m.partition(), m.offset(), said["ce_id"], said["ce_type"], m.key(), json.loads(m.value())
                    )
                )
    finally:
        consumer.close()
    return sorted(found, key=lambda e: (e.topic, e.partition, e.position))
