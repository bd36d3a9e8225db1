"""The servers of the tests do what their tests rely on: data survive a kill, a cut reply is not a lost event."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from servers import fixtures, kafka, shared
from servers.kafka import Kafka

SECONDS = 30
QUICK = {"reconnect.backoff.ms": 50, "reconnect.backoff.max.ms": 200, "log_level": 0}


@pytest.fixture(scope="module")
def own() -> Iterator[Kafka]:
    """A broker behind its proxy, for this file alone."""
    fixtures.require_kafka()
    with Kafka.start(proxied=True) as cluster:
        yield cluster


def make_topic(cluster: Kafka, topic: str, partitions: int = 1) -> None:
    admin = AdminClient({"bootstrap.servers": cluster.internal, **QUICK})
    for done in admin.create_topics([NewTopic(topic, partitions)]).values():
        done.result(SECONDS)


def publish(cluster: Kafka, topic: str, *values: str, **settings: Any) -> list[KafkaError | None]:
    """What the broker said to each; an error is an event of unknown fate."""
    said: list[KafkaError | None] = []
    producer = Producer({**cluster.client(), **QUICK, "acks": "all", **settings})
    for value in values:
        producer.produce(topic, value, on_delivery=lambda error, _: said.append(error))
    assert producer.flush(SECONDS) == 0
    return said


def stored(cluster: Kafka, topic: str, **settings: Any) -> list[str]:
    """Everything in partition 0 of a topic, read past the proxy."""
    consumer = Consumer({"bootstrap.servers": cluster.internal, **QUICK, "group.id": "unused", **settings})
    try:
        part = TopicPartition(topic, 0, 0)
        _, end = consumer.get_watermark_offsets(part, timeout=SECONDS)
        consumer.assign([part])
        found: list[Message] = []
        deadline = time.monotonic() + SECONDS
        while len(found) < end and time.monotonic() < deadline:
            found += consumer.consume(end - len(found), timeout=1)
        return [(message.value() or b"").decode() for message in found]
    finally:
        consumer.close()


def test_data_survive_kill_and_restart(own: Kafka, fresh_prefix: str) -> None:
    topic = f"{fresh_prefix}-orders"
    make_topic(own, topic)
    assert publish(own, topic, "a", "b") == [None, None]
    own.kill()
    with pytest.raises(RuntimeError, match="does not run"):
        own.stop()
    own.restart()
    assert publish(own, topic, "c") == [None]
    assert stored(own, topic) == ["a", "b", "c"]


def test_a_lost_reply_is_not_a_lost_event(own: Kafka, fresh_prefix: str) -> None:
    make_topic(own, fresh_prefix)
    fault = own.proxy.cut_after_request("Produce")
    (error,) = publish(own, fresh_prefix, "once", retries=0)
    assert error is not None
    fault.wait()
    assert (fault.fired, own.proxy.cut["after Produce"]) == (1, 1)
    assert stored(own, fresh_prefix) == ["once"]


def test_a_dropped_request_never_arrives(own: Kafka, fresh_prefix: str) -> None:
    make_topic(own, fresh_prefix)
    own.proxy.drop_before_request("Produce", match=b"an apple")
    assert publish(own, fresh_prefix, "a pear") == [None]
    (error,) = publish(own, fresh_prefix, "an apple", retries=0)
    assert error is not None
    assert stored(own, fresh_prefix) == ["a pear"]


def test_retries_after_a_cut_make_one_event_with_idempotence_and_two_without(own: Kafka, fresh_prefix: str) -> None:
    make_topic(own, fresh_prefix)
    own.proxy.cut_after_request("Produce")
    assert publish(own, fresh_prefix, "one", **{"enable.idempotence": True}) == [None]
    own.proxy.cut_after_request("Produce")
    assert publish(own, fresh_prefix, "two", **{"enable.idempotence": False}) == [None]
    assert stored(own, fresh_prefix) == ["one", "two", "two"]


def test_down_blackhole_and_delay(own: Kafka, fresh_prefix: str) -> None:
    make_topic(own, fresh_prefix)
    admin = AdminClient({**own.client(), **QUICK})
    admin.list_topics(timeout=SECONDS)
    for fault in (own.proxy.down, own.proxy.blackhole):
        fault()
        with pytest.raises(KafkaException):
            admin.list_topics(timeout=1)
        own.proxy.up()
        admin.list_topics(timeout=SECONDS)
    own.proxy.delay(0.3)
    began = time.monotonic()
    admin.list_topics(timeout=SECONDS)
    own.proxy.delay(0)
    assert time.monotonic() - began >= 0.3


def test_a_stopped_broker_answers_again(own: Kafka) -> None:
    admin = AdminClient({**own.client(), **QUICK})
    admin.list_topics(timeout=SECONDS)
    own.stop()
    with pytest.raises(KafkaException):
        admin.list_topics(timeout=1)
    own.cont()
    own.wait_ready()


def test_an_api_nobody_knows_is_an_error(own: Kafka) -> None:
    with pytest.raises(ValueError, match="no request is called 'Produced'"):
        own.proxy.cut_after_request("Produced")


def test_the_tools_of_kafka(kafka: Kafka, fresh_prefix: str) -> None:
    kafka.tool("kafka-topics", "--create", "--topic", fresh_prefix, "--partitions", "2")
    kafka.tool("kafka-console-producer", "--topic", fresh_prefix, input="hello\n")
    reading = ("--topic", fresh_prefix, "--from-beginning", "--max-messages", "1", "--group", fresh_prefix)
    assert kafka.tool("kafka-console-consumer", *reading) == "hello\n"
    assert fresh_prefix in kafka.tool("kafka-consumer-groups", "--list")


def test_the_shared_broker_cannot_be_killed(kafka: Kafka) -> None:
    if os.environ.get("UNLOST_TEST_KAFKA"):
        pytest.skip("another broker is given")
    with pytest.raises(RuntimeError, match="shared by all tests"):
        kafka.kill()


def test_the_shared_broker_ends_with_its_last_user(tmp_path: Path) -> None:
    fixtures.require_kafka()
    with shared.join(tmp_path) as first, shared.join(tmp_path) as second:
        assert first == second
        Kafka.at(first, "").wait_ready()
    deadline = time.monotonic() + SECONDS
    while shared._keeper_lives(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not shared._keeper_lives(tmp_path)
    with pytest.raises(KafkaException):
        AdminClient({"bootstrap.servers": first, **QUICK}).list_topics(timeout=1)


def test_a_broker_ends_with_its_owner(tmp_path: Path) -> None:
    fixtures.require_kafka()
    owner = subprocess.Popen(
        [sys.executable, kafka.__file__], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    bootstrap = owner.stdout.readline().strip().removeprefix("kafka://")
    Kafka.at(bootstrap, "").wait_ready()
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    with pytest.raises(KafkaException):
        AdminClient({"bootstrap.servers": bootstrap, **QUICK}).list_topics(timeout=1)


def test_security_and_rights(fresh_prefix: str) -> None:
    fixtures.require_kafka()
    with Kafka.start(security="sasl_ssl", acls=True) as cluster:
        make_topic(cluster, fresh_prefix)
        with pytest.raises(KafkaException):
            AdminClient({**cluster.client(password="wrong"), **QUICK}).list_topics(timeout=2)
        (error,) = publish(cluster, fresh_prefix, "a", **{"message.timeout.ms": 3000})
        assert error is not None
        rights = ("--add", "--allow-principal", "User:alice", "--producer", "--topic", fresh_prefix)
        cluster.tool("kafka-acls", *rights)
        for mechanism in ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"):
            assert publish(cluster, fresh_prefix, "b", **cluster.client(mechanism=mechanism)) == [None]
        assert stored(cluster, fresh_prefix) == ["b", "b", "b"]


@pytest.mark.slow
def test_three_brokers_lose_nothing_when_one_is_killed(fresh_prefix: str) -> None:
    fixtures.require_kafka()
    with Kafka.start(3) as cluster:
        make_topic(cluster, fresh_prefix)
        cluster.wait_in_sync()
        assert publish(cluster, fresh_prefix, "a") == [None]
        leader = AdminClient(cluster.client()).list_topics(fresh_prefix, timeout=SECONDS).topics[fresh_prefix]
        n = leader.partitions[0].leader
        cluster.kill(n)
        assert publish(cluster, fresh_prefix, "b") == [None]
        cluster.restart(n)
        cluster.wait_in_sync()
        assert stored(cluster, fresh_prefix) == ["a", "b"]


@pytest.mark.parametrize(("ci", "outcome"), [("", pytest.skip.Exception), ("true", pytest.fail.Exception)])
def test_where_no_kafka_can_be_had(monkeypatch: pytest.MonkeyPatch, ci: str, outcome: type[BaseException]) -> None:
    monkeypatch.setattr(fixtures, "available", lambda: "no java on the path")
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match="no Kafka: no java on the path"):
        fixtures.require_kafka()


def test_a_given_cluster_is_used_and_not_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNLOST_TEST_KAFKA", "example:9092")
    with Kafka.start() as given:
        assert given.url == "kafka://example:9092"
        with pytest.raises(RuntimeError, match="was given by UNLOST_TEST_KAFKA"):
            given.kill()
