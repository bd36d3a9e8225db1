"""Neighbours on Kafka. Runs under `.venv-bench`, which has them and not unlost.

They read the topic that unlost reads. The clock runs from the first event handled to the last one handled (what they
commit after that is not counted); then it is checked that the group's offsets are where they should be.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from importlib.metadata import version
from typing import Any

from confluent_kafka import Consumer, TopicPartition

DEADLINE_SECONDS = 120.0


class Watch:
    """From the first event to the `total`-th."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.seen = 0
        self.began = self.ended = 0.0
        self.cpu = 0.0

    def note(self, count: int = 1) -> bool:
        """True when that was the last."""
        if self.seen == 0:
            self.began, self.cpu = time.monotonic(), _cpu()
        before, self.seen = self.seen, self.seen + count
        if before < self.total <= self.seen:
            self.ended, self.cpu = time.monotonic(), _cpu() - self.cpu
            return True
        return False


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def committed(bootstrap: str, group: str, topic: str) -> int:
    """The sum of the group's offsets."""
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": group})
    partitions = consumer.list_topics(topic, 10).topics[topic].partitions
    found = consumer.committed([TopicPartition(topic, n) for n in partitions], 10)
    consumer.close()
    return sum(max(0, p.offset) for p in found)


def quix(bootstrap: str, topic: str, total: int, group: str) -> tuple[Watch, str]:
    from quixstreams import Application

    watch = Watch(total)
    app = Application(
        broker_address=bootstrap, consumer_group=group, auto_offset_reset="earliest", loglevel="ERROR",
        auto_create_topics=False, processing_guarantee="at-least-once",
    )  # fmt: skip
    frame = app.dataframe(app.topic(topic, value_deserializer="json"))

    def handle(value: Any) -> None:
        watch.note()

    frame.update(handle)
    app.run(count=total, timeout=DEADLINE_SECONDS, collect=False)
    return watch, "pass-through dataframe, at-least-once, a commit every 5 s (their default)"


def faststream(bootstrap: str, topic: str, total: int, group: str, kind: str) -> tuple[Watch, str]:
    from faststream import AckPolicy, FastStream
    from faststream.kafka import KafkaBroker, KafkaMessage

    watch = Watch(total)
    broker = KafkaBroker(bootstrap, logger=None)
    app = FastStream(broker, logger=None)

    def note(count: int = 1) -> None:
        if watch.note(count):
            app.exit()

    if kind == "default":

        @broker.subscriber(topic, group_id=group, auto_offset_reset="earliest")
        async def handle(body: dict[str, Any]) -> None:
            note()

        text = "as it comes: the offset may be committed before the event is handled"
    elif kind == "ack":

        @broker.subscriber(topic, group_id=group, auto_offset_reset="earliest", ack_policy=AckPolicy.MANUAL)
        async def handle_and_ack(body: dict[str, Any], message: KafkaMessage) -> None:
            note()
            await message.ack()

        text = "ack_policy=MANUAL, `await message.ack()` after each event"
    else:

        @broker.subscriber(
            topic, group_id=group, auto_offset_reset="earliest", ack_policy=AckPolicy.MANUAL, batch=True,
            max_records=500,
        )  # fmt: skip
        async def handle_batch(bodies: list[dict[str, Any]], message: KafkaMessage) -> None:
            note(len(bodies))
            await message.ack()

        text = "batch=True: a handler of up to 500 events, `await message.ack()` after it"

    async def run() -> None:
        async with asyncio.timeout(DEADLINE_SECONDS):
            await app.run()

    asyncio.run(run())
    return watch, text + "; logger=None"


def main() -> None:
    name, bootstrap, topic, total = sys.argv[1:]
    group = f"{topic}-{name}-{time.time_ns()}"
    if name == "quix":
        package = "quixstreams"
        watch, text = quix(bootstrap, topic, int(total), group)
    else:
        package = "faststream"
        watch, text = faststream(bootstrap, topic, int(total), group, name.removeprefix("faststream-"))
    if not watch.ended:
        raise SystemExit(f"{name} handled {watch.seen} of {total} events")
    saved = committed(bootstrap, group, topic)
    result = {
        "name": package, "version": version(package), "settings": text, "events": watch.total,
        "seconds": watch.ended - watch.began, "cpu": watch.cpu, "seen": watch.seen, "saved": saved,
    }  # fmt: skip
    sys.stdout.write("\n" + json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
