"""Events read and written by others: Kafka's own tools, plain clients, and the SDK of CloudEvents."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cloudevents.core.bindings.kafka import KafkaMessage, from_kafka, to_binary_event, to_structured_event
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from confluent_kafka import Consumer, ConsumerGroupTopicPartitions, TopicPartition
from confluent_kafka.admin import AdminClient
from kafka_kit import a_store, counts, dead, everything, send, serving, until, url_of

from servers.kafka import Kafka
from unlost import App, Context, Event, Service, Topic
from unlost.delivery import note, worker
from unlost.events import partition_of
from unlost.events.topic import Foreign, Unit
from unlost.ops import shelf
from unlost.store.records import FileRecords

KEYS = ["a", "order-1", "order-2", "Zürich", "日本", "x" * 100, "0", "42", "-1", "customer 7"]


class OrderPlaced(Event, key="order_id"):
    order_id: str
    cents: int


class Noted(Event, topic="note"):
    text: str


def a_service(*, name: str = "billing") -> tuple[Service, list[tuple[OrderPlaced, Context]]]:
    service, got = Service(name), []

    @service.on(OrderPlaced)
    async def take(order: OrderPlaced, ctx: Context) -> None:
        got.append((order, ctx))

    return service, got


async def test_our_events_are_read_by_others(
    kafka: Kafka, fresh_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_store(monkeypatch, tmp_path)
    when = datetime(2026, 3, 4, 5, 6, 7, 80, tzinfo=UTC)
    async with App(broker=url_of(kafka, fresh_prefix), topics=[Topic("order", partitions=3)], name="web-shop") as app:
        receipts = [
            await app.publish(
                OrderPlaced(order_id=key, cents=n), id=f"id-{n}", occurred_at=when, headers={"campaign": f"ü{n}"}
            )
            for n, key in enumerate(KEYS)
        ]
        silent = await app.publish(Noted(text="no key"), id="note-1")
    topic = f"{fresh_prefix}.order"

    # a plain client
    messages = {m.key(): m for m in everything(kafka, topic, len(KEYS))}
    for n, key in enumerate(KEYS):
        m = messages[key.encode()]
        assert (m.partition(), m.offset()) == (receipts[n].partition, receipts[n].position)
        assert m.timestamp()[1] * 1000 == receipts[n].recorded
        assert json.loads(m.value()) == {"order_id": key, "cents": n}
        headers = dict(m.headers())
        assert headers["ce_specversion"] == b"1.0" and headers["content-type"] == b"application/json"
        assert headers["ce_time"] == b"2026-03-04T05:06:07.000080Z" and headers["campaign"] == f"ü{n}".encode()

    # the SDK
    for n, key in enumerate(KEYS):
        m = messages[key.encode()]
        event = from_kafka(KafkaMessage(dict(m.headers()), m.key(), m.value()), JSONFormat())
        assert (event.get_id(), event.get_source(), event.get_type()) == (f"id-{n}", "web-shop", "order.OrderPlaced")
        assert (event.get_subject(), event.get_extension("partitionkey")) == (key, key)
        assert (event.get_time(), event.get_data()) == (when, {"order_id": key, "cents": n})

    # Java's consumer
    printed = await asyncio.to_thread(
        kafka.tool, "kafka-console-consumer", "--topic", topic, "--from-beginning", "--max-messages", str(len(KEYS)),
        "--formatter-property", "print.headers=true", "--formatter-property", "print.key=true",
        "--formatter-property", "print.partition=true",
    )  # fmt: skip
    lines = dict(line.split("\t")[2:4] for line in printed.splitlines() if "\t" in line)
    assert {key: json.loads(value)["cents"] for key, value in lines.items()} == {k: n for n, k in enumerate(KEYS)}
    for n, key in enumerate(KEYS):
        (line,) = [line for line in printed.splitlines() if f"ce_id:id-{n}," in line]
        assert line.startswith(f"Partition:{receipts[n].partition}\t") and f"campaign:ü{n}" in line
        assert (
            f"ce_source:web-shop,ce_type:order.OrderPlaced,ce_time:2026-03-04T05:06:07.000080Z,ce_subject:{key}" in line
        )
    (quiet,) = everything(kafka, f"{fresh_prefix}.note", 1)
    assert quiet.key() is None and quiet.offset() == silent.position


async def test_events_of_others_are_handled(
    kafka: Kafka, fresh_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_store(monkeypatch, tmp_path)
    service, got = a_service()
    app = App(service, broker=url_of(kafka, fresh_prefix), topics=[Topic("order", partitions=3)])
    topic = f"{fresh_prefix}.order"

    def attributes(id: str, key: str) -> dict[str, Any]:
        return {
            "id": id, "source": "/java", "type": "order.OrderPlaced", "specversion": "1.0", "subject": key,
            "time": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), "datacontenttype": "application/json",
            "partitionkey": key, "colour": "red",
        }  # fmt: skip

    async with serving(app):
        binary = to_binary_event(CloudEvent(attributes("bin", "order-1"), {"order_id": "order-1", "cents": 1}))
        structured = to_structured_event(CloudEvent(attributes("str", "order-2"), {"order_id": "order-2", "cents": 2}))
        for m in (binary, structured):
            key = m.key.encode() if isinstance(m.key, str) else m.key
            send(kafka, topic, [(key, m.value, list(m.headers.items()))])
        least = [("ce_specversion", b"1.0"), ("ce_id", b"raw"), ("ce_source", b"c"), ("ce_type", b"order.OrderPlaced")]
        send(kafka, topic, [(b"order-3", b'{"order_id":"order-3","cents":3}', least)])
        # Java's producer, with its own way of choosing the partition
        lines = [
            f"ce_specversion:1.0,ce_id:java-{n},ce_source:java,ce_type:order.OrderPlaced\t{key}\t"
            + json.dumps({"order_id": key, "cents": 100 + n})
            for n, key in enumerate(KEYS)
        ]
        await asyncio.to_thread(
            kafka.tool, "kafka-console-producer", "--topic", topic, "--reader-property", "parse.key=true",
            "--reader-property", "parse.headers=true", input="\n".join(lines) + "\n",
        )  # fmt: skip
        await until(lambda: len(got) == 3 + len(KEYS))
        assert dead(app) == []
    by_id = {ctx.id: (order, ctx) for order, ctx in got}
    assert (by_id["bin"][0].cents, by_id["str"][0].cents, by_id["raw"][0].cents) == (1, 2, 3)
    assert by_id["bin"][1].occurred_at == by_id["str"][1].occurred_at == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert by_id["bin"][1].envelope.extensions == by_id["str"][1].envelope.extensions == {"colour": "red"}
    assert by_id["raw"][1].key == "order-3"
    for n, key in enumerate(KEYS):
        order, ctx = by_id[f"java-{n}"]
        assert (order.order_id, order.cents, ctx.key) == (key, 100 + n, key)
    for m in everything(kafka, topic, 3 + len(KEYS)):
        assert m.partition() == partition_of(m.key() or b"", 3), m.key()


async def test_producers_that_write_no_cloudevents(
    kafka: Kafka, fresh_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_store(monkeypatch, tmp_path)
    service, got = a_service()
    seen: list[Foreign] = []

    def first(message: Foreign) -> Event | None:
        seen.append(message)
        if message.value is None or message.value.startswith(b"#"):
            return None
        order_id, cents = message.value.decode().split(";")
        return OrderPlaced(order_id=order_id, cents=int(cents))

    def mended(message: Foreign) -> Event | None:
        order_id, _, cents = (message.value or b"").decode().partition(" ")
        return None if order_id == "void" else OrderPlaced(order_id=order_id, cents=int(cents))

    def app_with(decoder: Any) -> App:
        return App(service, broker=url_of(kafka, fresh_prefix), topics=[Topic("order", partitions=2, decoder=decoder)])

    topic = f"{fresh_prefix}.order"
    odd = [("trace", b"\xff\x00"), ("trace", b"2"), ("none", None)]
    app = app_with(first)
    async with serving(app):
        send(kafka, topic, [(b"k1", b"a;5", odd), (b"k2", b"# a comment", []), (b"k3", None, [])], partition=0)
        send(kafka, topic, [(b"k4", b"b 7", odd), (b"k5", b"void ", odd), (None, b"\xff\xfe", [])], partition=1)
        await app.publish(OrderPlaced(order_id="ours", cents=9))  # what is a CloudEvent needs no decoder
        await until(lambda: len(got) == 2 and len(dead(app)) == 3)
        await until(lambda: counts(app, "billing").get("skipped:decoder") == 2)
        letters = {letter.data: letter for letter in dead(app)}
    orders = sorted((order.order_id, order.cents, ctx.key) for order, ctx in got)
    assert orders == [("a", 5, "a"), ("ours", 9, "ours")]
    assert len(seen) == 6 and seen[0].headers is not None
    (fed,) = [m for m in seen if m.value == b"a;5"]
    assert (fed.topic, fed.partition, fed.key, list(fed.headers)) == ("order", 0, b"k1", odd)
    assert (letters[b"b 7"].reason, letters[b"b 7"].key) == ("undecodable", b"k4")
    assert "decoder" in letters[b"b 7"].error and "ValueError" in letters[b"b 7"].error
    assert set(letters) == {b"b 7", b"void ", b"\xff\xfe"}

    app = app_with(mended)
    async with serving(app):
        asked = await asyncio.to_thread(
            shelf.ask,
            FileRecords(app.file),
            "redrive",
            list(letters.values()),
            operator="me",
            reason="the decoder was mended",
        )
        assert asked.carried_out == 3
        await until(lambda: len(got) == 3)
        await until(lambda: counts(app, "billing").get("skipped:decoder") == 3 and len(dead(app)) == 1)
        assert (got[-1][0].order_id, got[-1][0].cents) == ("b", 7)
        assert dead(app)[0].data == b"\xff\xfe" and "UnicodeDecodeError" in dead(app)[0].error


async def test_kafkas_own_tool_shows_how_far_we_are(
    kafka: Kafka, fresh_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_store(monkeypatch, tmp_path)
    service, go, done = Service("billing"), asyncio.Event(), []

    @service.on(OrderPlaced)
    async def take(order: OrderPlaced) -> None:
        if order.order_id == "slow":
            await go.wait()
        done.append(order.order_id)

    app = App(service, broker=url_of(kafka, fresh_prefix), topics=[Topic("order", partitions=1)])
    group, topic = f"{fresh_prefix}.billing", f"{fresh_prefix}.order"
    admin = AdminClient({"bootstrap.servers": kafka.internal})

    def committed() -> tuple[int, str]:
        asked = admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions(group)])
        (found,) = asked.values()
        places = found.result(10).topic_partitions
        return (places[0].offset, places[0].metadata or "") if places else (-1, "")

    async with serving(app):
        await app.publish_all([OrderPlaced(order_id=f"first-{n}", cents=1) for n in range(3)])
        await app.publish(OrderPlaced(order_id="slow", cents=1))
        await app.publish_all([OrderPlaced(order_id=f"later-{n}", cents=1) for n in range(6)])
        await until(lambda: len(done) == 9)
        await until(lambda: _done_above(committed()[1]) == 6)
        offset, text = committed()
        (snapshot,) = await app.store.progress([Unit("billing", "order", 0)])
        found = note.decode(text)
        assert found is not None and offset == 3
        assert (found.store, found.position, found.topic) == (app.store.id, 3, snapshot.topic_id)
        assert (found.counts, found.digest) == (snapshot.counts, snapshot.digest)
        assert list(found.done_above()) == [run for run in snapshot.fated if run[0] >= 3] == [(4, 10)]
        shown = await asyncio.to_thread(kafka.tool, "kafka-consumer-groups", "--describe", "--group", group)
        columns = _row(shown, topic)
        assert (columns["CURRENT-OFFSET"], columns["LOG-END-OFFSET"], columns["LAG"]) == ("3", "10", "7")
        assert columns["CLIENT-ID"] == "unlost"
        go.set()
        await until(lambda: committed()[0] == 10)
    shown = await asyncio.to_thread(kafka.tool, "kafka-consumer-groups", "--describe", "--group", group)
    assert _row(shown, topic)["LAG"] == "0"
    consumer = Consumer({"bootstrap.servers": kafka.internal, "group.id": group})  # any client goes on from there
    (place,) = consumer.committed([TopicPartition(topic, 0)], 10)
    consumer.close()
    assert place.offset == 10


async def test_who_stops_in_the_middle_of_an_acknowledgement_still_says_goodbye(
    kafka: Kafka, fresh_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the group would not know how far the store was, and a restored backup could not be told from it."""
    a_store(monkeypatch, tmp_path)
    monkeypatch.setattr(worker, "ACK_SECONDS", 0.05)
    service, done = Service("billing"), []

    @service.on(OrderPlaced)
    async def take(order: OrderPlaced) -> None:
        done.append(order.order_id)

    app = App(service, broker=url_of(kafka, fresh_prefix), topics=[Topic("order", partitions=1)])
    group, topic = f"{fresh_prefix}.billing", f"{fresh_prefix}.order"
    asked = asyncio.Event()
    async with serving(app):
        original = type(app.store).progress

        async def slow_once(self: Any, units: Any) -> Any:
            if not asked.is_set():
                asked.set()
                await asyncio.Event().wait()  # until the service stops
            return await original(self, units)

        monkeypatch.setattr(type(app.store), "progress", slow_once)
        await app.publish_all([OrderPlaced(order_id=f"{n}", cents=1) for n in range(3)])
        await until(asked.is_set)
        await until(lambda: len(done) == 3)
    monkeypatch.undo()
    consumer = Consumer({"bootstrap.servers": kafka.internal, "group.id": group})
    (place,) = consumer.committed([TopicPartition(topic, 0)], 10)
    consumer.close()
    assert place.offset == 3


def _done_above(text: str) -> int:
    found = note.decode(text)
    return 0 if found is None else sum(end - start for start, end in found.done_above())


def _row(shown: str, topic: str) -> dict[str, str]:
    lines = [line.split() for line in shown.splitlines() if line.strip()]
    (head,) = [line for line in lines if line[0] == "GROUP"]
    (row,) = [line for line in lines if len(line) > 1 and line[1] == topic]
    return dict(zip(head, row, strict=False))
