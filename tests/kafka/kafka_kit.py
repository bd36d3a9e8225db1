"""Small helpers for tests on a real Kafka: an App at work, and plain clients beside it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from confluent_kafka import Consumer, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from unlost import App
from unlost.ops import shelf
from unlost.store.port import DeadLetter
from unlost.store.records import FileRecords

QUICK = "session.timeout.ms=6000&heartbeat.interval.ms=300"
Headers = Sequence[tuple[str, bytes | None]]


def url_of(kafka: Any, prefix: str, more: str = QUICK) -> str:
    return f"{kafka.url}?prefix={prefix}.&{more}"


def a_store(monkeypatch: Any, folder: Path, name: str = "store.db") -> None:
    monkeypatch.setenv("UNLOST_STORE", f"embedded://{folder / name}")


@contextlib.asynccontextmanager
async def serving(app: App) -> AsyncIterator[asyncio.Task[None]]:
    """The App's services at work; what they fail with comes out at the end."""
    ready = asyncio.Event()
    task = asyncio.create_task(app.serve(ready=ready.set))
    started = asyncio.create_task(ready.wait())
    await asyncio.wait([task, started], return_when=asyncio.FIRST_COMPLETED)
    started.cancel()
    try:
        if not task.done():
            yield task
        else:
            await task
    finally:
        app.stop()
        await task


async def until(what: Callable[[], Any], seconds: float = 20) -> Any:
    """Waits for something to be true, and returns it."""
    end = time.monotonic() + seconds
    while not (found := what()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds:g} s: {what.__name__}")
        await asyncio.sleep(0.02)
    return found


async def settled(app: App, service: str, topic: str, total: int, seconds: float = 20) -> None:
    """Waits until so many positions of a topic have an outcome."""

    def outcomes() -> bool:
        rows = app.file.read(
            lambda c: c.execute(
                "select counts from unlost_progress where service = ? and topic = ?", (service, topic)
            ).fetchall()
        )
        return sum(sum(json.loads(r[0]).values()) for r in rows) + len(dead(app)) >= total

    await until(outcomes, seconds)


def dead(app: App) -> list[DeadLetter]:
    return shelf.letters(FileRecords(app.file))


def counts(app: App, service: str) -> dict[str, int]:
    """How many events of a service ended how."""
    found: dict[str, int] = {}
    rows = app.file.read(
        lambda c: c.execute("select counts from unlost_progress where service = ?", (service,)).fetchall()
    )
    for (text,) in rows:
        for name, n in json.loads(text).items():
            found[name] = found.get(name, 0) + n
    return found


def make_topic(kafka: Any, name: str, partitions: int = 1, **config: str) -> None:
    admin = AdminClient({"bootstrap.servers": kafka.internal})
    named = {key.replace("_", "."): value for key, value in config.items()}
    for future in admin.create_topics([NewTopic(name, partitions, 1, config=named)]).values():
        future.result(20)


def send(kafka: Any, topic: str, messages: Sequence[tuple[bytes | None, bytes | None, Headers]], **where: Any) -> None:
    """Messages of somebody who knows nothing of us: key, value, headers."""
    producer = Producer({"bootstrap.servers": kafka.internal, "partitioner": "murmur2_random"})
    for key, value, headers in messages:
        producer.produce(topic, value, key, headers=list(headers), **where)
    assert producer.flush(20) == 0


def everything(kafka: Any, topic: str, count: int, seconds: float = 20) -> list[Message]:
    """The first `count` messages of a topic, read by a plain client."""
    consumer = Consumer({"bootstrap.servers": kafka.internal, "group.id": "look", "enable.auto.commit": False})
    try:
        end = time.monotonic() + seconds
        found: list[Message] = []
        while True:
            partitions = consumer.list_topics(topic, timeout=10).topics[topic]
            if partitions.partitions and partitions.error is None:
                break
            assert time.monotonic() < end, f"no topic {topic}"
            time.sleep(0.1)
        consumer.assign([TopicPartition(topic, p, 0) for p in partitions.partitions])
        while len(found) < count:
            assert time.monotonic() < end, f"{len(found)} of {count} messages in {topic}"
            message = consumer.poll(0.2)
            if message is not None and message.error() is None:
                found.append(message)
        return sorted(found, key=lambda m: (m.partition() or 0, m.offset() or 0))
    finally:
        consumer.close()
