"""Dead letters copied to a topic: for tools of others, never in the way of the shelf."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import apsw
import pytest
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType
from kafka_kit import a_store, counts, dead, everything, make_topic, send, serving, until, url_of

from servers.kafka import Kafka
from unlost import App, Context, Event, Reject, Retry, Service, Topic, UsageError
from unlost.delivery import mirror as mirror_module
from unlost.store import sqlite
from unlost.store.records import FileRecords


class OrderPlaced(Event, key="order_id"):
    order_id: str
    cents: int


class OrderPaid(Event, key="order_id"):
    order_id: str


class ParcelSent(Event, key="parcel_id"):
    parcel_id: str


def a_service(name: str = "billing") -> tuple[Service, list[str]]:
    """Takes money: nothing for 0 cents, and it breaks at 13."""
    service, paid = Service(name, on_dead="skip"), []

    @service.on(OrderPlaced, retry=Retry(attempts=2, first=0.01))
    async def take(order: OrderPlaced, ctx: Context) -> None:
        if order.cents == 0:
            raise Reject("nothing to pay")
        if order.cents == 13:
            raise ZeroDivisionError("thirteen")
        ctx.publish(OrderPaid(order_id=order.order_id))
        paid.append(order.order_id)

    return service, paid


def headers_of(message: Any) -> dict[str, bytes | None]:
    return dict(message.headers())


async def test_a_copy_has_what_tools_of_others_read(
    kafka: Kafka, fresh_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_store(monkeypatch, tmp_path)
    service, paid = a_service()
    app = App(
        service,
        broker=url_of(kafka, fresh_prefix),
        topics=[Topic("order", partitions=3)],
        mirror_dead="{topic}.DLT",
    )
    foreign = [("odd", b"\xff\xfe"), ("odd", b"again"), ("none", None), ("empty", b"")]
    async with serving(app):
        receipt = await app.publish(OrderPlaced(order_id="a", cents=0), headers={"campaign": "x"})
        broken = await app.publish(OrderPlaced(order_id="b", cents=13))
        send(kafka, f"{fresh_prefix}.order", [(b"\x00key\xff", b"not an event", foreign)], partition=2)
        await app.publish(OrderPlaced(order_id="c", cents=1))
        copies = await asyncio.to_thread(everything, kafka, f"{fresh_prefix}.order.DLT", 3)
        await until(lambda: len(dead(app)) == 3 and paid == ["c"])
    originals = {(m.partition(), m.offset()): m for m in everything(kafka, f"{fresh_prefix}.order", 5)}
    letters = {(letter.partition, letter.position): letter for letter in dead_of(tmp_path)}
    assert len(copies) == 3
    for copy in copies:
        found = headers_of(copy)
        place = (
            int.from_bytes(found["kafka_dlt-original-partition"] or b"", "big"),
            int.from_bytes(found["kafka_dlt-original-offset"] or b"", "big"),
        )
        original, letter = originals[place], letters[place]
        assert (copy.key(), copy.value(), copy.partition()) == (original.key(), original.value(), original.partition())
        assert copy.headers()[: len(original.headers())] == original.headers()
        assert found["kafka_dlt-original-topic"] == f"{fresh_prefix}.order".encode()
        assert len(found["kafka_dlt-original-partition"] or b"") == 4
        assert found["kafka_dlt-original-timestamp"] == original.timestamp()[1].to_bytes(8, "big")
        assert found["kafka_dlt-original-timestamp-type"] == b"CreateTime"
        assert found["kafka_dlt-original-consumer-group"] == f"{fresh_prefix}.billing".encode()
        assert found["kafka_dlt-exception-message"] == letter.error.encode()
        assert found["__dlq.errors.topic"] == found["kafka_dlt-original-topic"]
        assert (found["__dlq.errors.partition"], found["__dlq.errors.offset"]) == (b"%d" % place[0], b"%d" % place[1])
        assert found["__dlq.errors.group"] == found["kafka_dlt-original-consumer-group"]
        assert found["__dlq.errors.delivery.count"] == found["unlost-attempts"] == b"%d" % len(letter.attempts)
        assert found["unlost-reason"] == letter.reason.encode()
        assert found["unlost-service"] == b"billing"
    by_place = {(c.partition(), headers_of(c)["unlost-reason"]): headers_of(c) for c in copies}
    rejected = by_place[receipt.partition, b"rejected"]
    assert (rejected["unlost-handler"], rejected["campaign"]) == (b"take", b"x")
    assert rejected["unlost-error"] == b"Reject: nothing to pay"
    spent = by_place[broken.partition, b"exhausted"]
    assert spent["kafka_dlt-exception-fqcn"] == b"ZeroDivisionError"
    assert b"thirteen" in (spent["kafka_dlt-exception-stacktrace"] or b"")
    assert spent["__dlq.errors.delivery.count"] == b"2"
    assert by_place[2, b"undecodable"]["unlost-handler"] == b""


def dead_of(folder: Path) -> list[Any]:
    from unlost.ops import shelf
    from unlost.sqlite.file import File

    file = File(folder / "store.db")
    try:
        return shelf.letters(FileRecords(file))
    finally:
        file.close()


async def test_a_copy_that_fails_waits_and_holds_up_nothing(
    kafka: Kafka, fresh_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mirror_module, "AGAIN_SECONDS", 0.2)
    a_store(monkeypatch, tmp_path)
    service, paid = a_service()
    parcels = Service("parcels", on_dead="skip")

    @parcels.on(ParcelSent)
    async def refuse(parcel: ParcelSent) -> None:
        raise Reject("no")

    make_topic(kafka, f"{fresh_prefix}.order.DLT", 1, max_message_bytes="200")
    url = url_of(kafka, fresh_prefix)
    app = App(service, parcels, broker=url, mirror_dead="{topic}.DLT")
    async with serving(app):
        for n in range(3):
            await app.publish(OrderPlaced(order_id=f"bad-{n}", cents=0))
        await until(lambda: len(dead(app)) == 3)
        await app.publish(OrderPlaced(order_id="good", cents=5))
        await app.publish(ParcelSent(parcel_id="p"))
        await until(lambda: paid == ["good"])
        await asyncio.to_thread(everything, kafka, f"{fresh_prefix}.parcel.DLT", 1)
        await until(lambda: counts(app, "billing").get("skipped:no handler") == 1)  # what `good` led to has left
        assert len(dead(app)) == 4
        await until(lambda: app.file.read(lambda c: c.execute("select count(*) from unlost_outbox").fetchone()[0]) == 3)
        await until(lambda: "a copy of a dead letter cannot be sent now" in caplog.text)
    assert "UL1012" in caplog.text
    admin = AdminClient({"bootstrap.servers": kafka.internal})
    larger = ConfigResource(
        ResourceType.TOPIC,
        f"{fresh_prefix}.order.DLT",
        incremental_configs=[ConfigEntry("max.message.bytes", "100000", incremental_operation=AlterConfigOpType.SET)],
    )
    for future in admin.incremental_alter_configs([larger]).values():
        future.result(20)
    async with serving(App(service, parcels, broker=url)) as _:  # copies are no longer made; those that wait are sent
        copies = await asyncio.to_thread(everything, kafka, f"{fresh_prefix}.order.DLT", 3)
    assert {m.key() for m in copies} == {b"bad-0", b"bad-1", b"bad-2"}
    assert all(m.partition() == 0 for m in copies)  # the partition that they came from is not there


async def test_shelf_and_copy_are_one_commit(
    kafka: Kafka, fresh_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    a_store(monkeypatch, tmp_path)
    service, _ = a_service()
    app = App(service, broker=url_of(kafka, fresh_prefix), mirror_dead="{topic}-dlt")
    real, failures = sqlite.put_raw, [apsw.FullError("no space")]

    def put(tx: Any, copy: Any) -> None:
        if failures:
            raise failures.pop()
        real(tx, copy)

    monkeypatch.setattr(sqlite, "put_raw", put)
    async with serving(app):
        await app.publish(OrderPlaced(order_id="a", cents=0))
        await until(lambda: len(dead(app)) == 1)
        copies = await asyncio.to_thread(everything, kafka, f"{fresh_prefix}.order-dlt", 1)
        assert not failures and len(copies) == 1
        monkeypatch.setattr(app.broker, "original", lambda unit, arrival: 1 / 0)
        await app.publish(OrderPlaced(order_id="b", cents=0))
        await until(lambda: len(dead(app)) == 2)  # a copy that cannot be made is no reason not to shelve
    assert "no copy of it could be made" in caplog.text


async def test_a_topic_that_was_deleted_is_made_again(
    kafka: Kafka, fresh_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_store(monkeypatch, tmp_path)
    service, _ = a_service()
    app = App(service, broker=url_of(kafka, fresh_prefix), mirror_dead="{topic}.DLT.{service}")
    name = f"{fresh_prefix}.order.DLT.billing"
    async with serving(app):
        await app.publish(OrderPlaced(order_id="a", cents=0))
        first = await asyncio.to_thread(everything, kafka, name, 1)
        assert [m.key() for m in first] == [b"a"]
        topics = await app.broker.topics(["order.DLT.billing", "order"])
        assert {info.partitions for info in topics} == {8}


@pytest.mark.parametrize(
    "template", ["{topic}", "dead letters", "", "{0}", "{partition}.DLT", "{topic", "{topic.name}", "{topic!x}"]
)
def test_templates_that_name_no_topic_are_refused(template: str) -> None:
    with pytest.raises(UsageError) as refused:
        App(mirror_dead=template)
    assert refused.value.code.startswith("UL1")
    assert "{topic" not in refused.value.found or refused.value.fix


async def test_what_cannot_be_mirrored_is_refused_at_the_start(
    kafka: Kafka, fresh_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    service, _ = a_service()
    with pytest.raises(UsageError) as refused:
        async with App(service, broker=f"embedded://{tmp_path}/events.db", mirror_dead="{topic}.DLT"):
            pass
    assert refused.value.code == "UL1242" and "unlost dead list" in refused.value.fix
    a_store(monkeypatch, tmp_path)

    class LetterRead(Event, topic="order.DLT"):
        text: str

    reader = Service("reader")

    @reader.on(LetterRead)
    async def read(letter: LetterRead) -> None: ...

    with pytest.raises(UsageError) as refused:
        async with App(service, reader, broker=url_of(kafka, fresh_prefix), mirror_dead="{topic}.DLT"):
            pass
    assert refused.value.code == "UL1243" and "order.DLT" in refused.value.found
