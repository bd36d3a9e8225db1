"""Small things that only show on a real Kafka when something else happens at the same time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from typing import Any

import pytest
from kafka_kit import make_topic, send, url_of

from unlost import Topic
from unlost.brokers.kafka.broker import KafkaBroker
from unlost.brokers.kafka.log import KafkaLog
from unlost.brokers.kafka.settings import parse
from unlost.brokers.kafka.topics import Cluster, Described


def test_who_reads_on_while_the_log_grows_is_not_told_that_it_ends(kafka: Any, fresh_prefix: str) -> None:
    make_topic(kafka, f"{fresh_prefix}.t")
    log = KafkaLog(parse(url_of(kafka, fresh_prefix)))
    try:
        send(kafka, f"{fresh_prefix}.t", [(b"k", b"{}", [])] * 20, partition=0)
        assert [a.position for a in log.read("t", 0, 0, 10)] == list(range(10))
        time.sleep(0.5)  # the client has seen the end of it
        send(kafka, f"{fresh_prefix}.t", [(b"k", b"{}", [])] * 10, partition=0)
        assert [a.position for a in log.read("t", 0, 10, 10)] == list(range(10, 20))
        assert [a.position for a in log.read("t", 0, 20, 1)] == [20]
    finally:
        log.close()


def test_a_new_topic_that_the_next_broker_does_not_know_yet(
    kafka: Any, fresh_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each question may go to another broker. (A fake: every second answer is that of one who knows nothing.)"""
    describe = Cluster.describe
    asked = 0

    def forgetful(self: Cluster, names: Collection[str]) -> dict[str, Described]:
        nonlocal asked
        asked += 1
        return describe(self, names) if asked % 2 == 0 else {}

    monkeypatch.setattr(Cluster, "describe", forgetful)

    async def declare() -> list[str]:
        broker = KafkaBroker(parse(url_of(kafka, fresh_prefix)))
        await broker.open()
        try:
            return [info.name for info in await broker.declare([Topic("one"), Topic("two")])]
        finally:
            await broker.close()

    assert asyncio.run(declare()) == ["one", "two"]
