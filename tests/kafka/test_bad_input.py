"""Wrong addresses, wrong declarations, wrong messages: one clear error each, soon, and nothing is lost."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from kafka_kit import a_store, counts, dead, everything, make_topic, send, serving, settled, until, url_of

from servers.fixtures import require_kafka
from servers.kafka import Kafka
from unlost import App, Context, Event, Service, Topic, Unavailable, UnlostError, UsageError
from unlost.ops import shelf
from unlost.store.records import FileRecords


class OrderPlaced(Event, key="order_id"):
    order_id: str
    note: str = ""


class OrderPaid(Event, key="order_id", topic="paid"):
    order_id: str
    note: str = ""


def handled_by(**options: Any) -> tuple[Service, list[tuple[str, Context]]]:
    service, got = Service("billing", **options), []

    @service.on(OrderPlaced)
    async def take(order: OrderPlaced, ctx: Context) -> None:
        got.append((order.order_id, ctx))

    return service, got


async def refusal(app: App) -> tuple[UnlostError, float]:
    """What connecting fails with, and after how many seconds."""
    began = time.monotonic()
    with pytest.raises(UnlostError) as error:
        async with app:
            pass
    return error.value, time.monotonic() - began


# --- addresses


@contextmanager
def a_port(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """Somebody else's server."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    peer, _ = server.accept()
                except OSError:
                    return
                kept.append(peer)
                threading.Thread(target=talk, args=(peer,), daemon=True).start()

        def talk(peer: socket.socket) -> None:
            try:
                answer(peer)
            except OSError:
                pass  # the other side has gone

        kept: list[socket.socket] = []
        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        for peer in kept:
            peer.close()


def speak_http(peer: socket.socket) -> None:
    peer.recv(1000)
    peer.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
    peer.close()


async def test_wrong_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_kafka()  # (for its client)
    a_store(monkeypatch, tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = closed.getsockname()[1]
    with a_port(speak_http) as http, a_port(lambda peer: None) as silent:
        expected = {
            f"kafka://127.0.0.1:{nobody}": "is the cluster running",
            "kafka://no-such-host.invalid": "check the name of the server",
            f"kafka://127.0.0.1:{http}": "it speaks HTTP",
            f"kafka://127.0.0.1:{silent}": "does not answer",
        }
        found = await asyncio.gather(*(refusal(App(broker=broker)) for broker in expected))
    for (broker, fix), (error, seconds) in zip(expected.items(), found, strict=True):
        assert (type(error), error.code) == (Unavailable, "UL2100"), str(error)
        assert fix in error.fix and error.found, str(error)
        assert broker[len("kafka://") :].partition(":")[0] in error.what
        assert seconds < 25


@pytest.mark.parametrize(
    ("broker", "code", "text"),
    [
        ("kafka://", "UL1142", "names its servers"),
        ("kafka://host:none", "UL1142", "host:port"),
        ("kafka://host:99999", "UL1142", "host:port"),
        ("kafka://host/topic", "UL1142", "names its servers"),
        ("kafka+ssl://host", "UL1141", "looks like"),
        ("kafka://host?group.protocol=share", "UL1144", "classic or consumer"),
        ("kafka://host?group.protocol=consumer&session.timeout.ms=6000", "UL1144", "the cluster decides"),
        ("kafka://host?acks=1", "UL1143", "a promise rests on it"),
        ("kafka://host?request.required.acks=0", "UL1143", "a promise rests on it"),
        ("kafka://host?enable.auto.commit=true", "UL1143", "a promise rests on it"),
        ("kafka://host?enable.idempotence=false", "UL1143", "a promise rests on it"),
        ("kafka://host?auto.offset.reset=latest", "UL1143", "a promise rests on it"),
        ("kafka://host?message.timeout.ms=1000", "UL1143", "a promise rests on it"),
        ("kafka://host?isolation.level=read_uncommitted", "UL1143", "a promise rests on it"),
        ("kafka://host?transactional.id=x", "UL1143", "a promise rests on it"),
        ("kafka://host?group.id=x", "UL1143", "a promise rests on it"),
        ("kafka://host?partitioner=random", "UL1143", "a promise rests on it"),
        ("kafka://host?no.such.setting=1", "UL1154", "does not take"),
        ("kafka://host?linger.ms=abc", "UL1154", "does not take"),
        ("kafka://host?fetch.min.bytes=-1", "UL1154", "does not take"),
        ("kafka://host?prefix=a b.", "UL1001", "letters"),
    ],
)
async def test_urls_that_cannot_be_meant(
    broker: str, code: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_kafka()
    a_store(monkeypatch, tmp_path)
    error, seconds = await refusal(App(broker=broker))
    assert (type(error), error.code) == (UsageError, code) and text in error.what, str(error)
    assert error.fix and seconds < 5


def test_without_the_client_of_kafka(tmp_path: Path) -> None:
    """The extra is not installed."""
    (tmp_path / "confluent_kafka.py").write_text("raise ImportError('No module named confluent_kafka')\n")
    (tmp_path / "shop.py").write_text(
        "from unlost import App, Event, Service\n"
        "class OrderPlaced(Event, key='order_id'):\n    order_id: str\n"
        "billing = Service('billing')\n"
        "@billing.on(OrderPlaced)\nasync def charge(order: OrderPlaced) -> None: ...\n"
        "app = App(billing)\n"
    )
    env = dict(os.environ, PYTHONPATH=str(tmp_path), UNLOST_BROKER="kafka://host")
    for arguments in (["run", "shop"], ["publish", "order.OrderPlaced", "order_id=1", "--app", "shop"]):
        done = subprocess.run(
            [sys.executable, "-m", "unlost", *arguments],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert done.returncode == 2 and "UL1148" in done.stderr, done.stderr
        assert 'pip install "unlost[kafka]"' in done.stderr and "Traceback" not in done.stderr


# --- declarations


async def test_topics_that_are_not_what_was_declared(
    kafka: Kafka, fresh_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    a_store(monkeypatch, tmp_path)
    make_topic(kafka, f"{fresh_prefix}.order", 2, retention_ms="3600000")
    service, _ = handled_by()
    broker = url_of(kafka, fresh_prefix)
    cases = [
        (Topic("order", partitions=5), "UL1103", "declare 2"),
        (Topic("order", partitions=1), "UL1103", "declare 2"),
        (Topic("order", partitions=2, replication=3), "UL1104", "raise it on the cluster"),
        (Topic("order", partitions=2, min_insync=2), "UL1104", "raise it on the cluster"),
        (Topic("fresh", replication=3), "UL1147", "so that the cluster can give it"),
        (Topic("fresh", replication=1, min_insync=2), "UL1104", "as many replicas"),
        (Topic("fresh", partitions=0), "UL1102", ""),
        (Topic("fresh", partitions=5000), "UL1102", ""),
        (Topic("no spaces"), "UL1001", "another name"),
        (Topic(".."), "UL1001", "another name"),
    ]
    for topic, code, fix in cases:
        error, seconds = await refusal(App(service, broker=broker, topics=[topic]))
        assert error.code == code and fix in error.fix and error.found, str(error)
        assert isinstance(error, UsageError) and seconds < 10
    error, _ = await refusal(App(broker=url_of(kafka, f"{fresh_prefix}.{'p' * 80}"), topics=[Topic("x" * 180)]))
    assert (type(error), error.code) == (UsageError, "UL1147")  # a name that only the cluster refuses
    async with App(service, broker=broker, topics=[Topic("order", partitions=2, retention="30d")]) as app:
        assert "UL1105" in caplog.text and "the cluster keeps 3600 s" in caplog.text
        assert "fresh" not in {info.name for info in await app.broker.topics()}
    error, _ = await refusal(App(service, broker=broker, survives="power loss of one machine"))
    assert error.code == "UL1234" and "process death" in error.found


async def test_members_that_do_not_agree(
    kafka: Kafka, fresh_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_store(monkeypatch, tmp_path)
    broker = url_of(kafka, fresh_prefix)
    service, got = handled_by()
    app = App(service, broker=broker)
    async with serving(app):
        await app.publish_all([OrderPlaced(order_id=str(n)) for n in range(20)])
        await until(lambda: len(got) == 20)
        other, _ = handled_by(on_dead="skip")
        error, _ = await refusal(App(other, broker=broker))
        assert error.code == "UL1131" and "on_dead='park'" in error.what, str(error)
        await asyncio.sleep(1.2)  # the group is told
        a_store(monkeypatch, tmp_path, "another.db")
        service, again = handled_by()
        with pytest.raises(UsageError) as refused:
            async with serving(App(service, broker=broker)) as task:
                await asyncio.wait([task], timeout=25)
        assert refused.value.code == "UL1132" and "UNLOST_STORE" in refused.value.fix
        assert not again
        a_store(monkeypatch, tmp_path)
        await app.publish(OrderPlaced(order_id="on it goes"))
        await until(lambda: len(got) == 21)
    error, _ = await refusal(App(service, broker=url_of(kafka, f"{fresh_prefix}.else")))
    assert error.code == "UL1133"  # the same store, another place on the cluster


# --- sizes


async def test_events_that_are_too_large(
    kafka: Kafka, fresh_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_store(monkeypatch, tmp_path)
    for topic in ("order", "paid"):
        make_topic(kafka, f"{fresh_prefix}.{topic}", 2, max_message_bytes="20000")
    service, got = Service("billing", on_dead="skip"), []

    @service.on(OrderPlaced)
    async def take(order: OrderPlaced, ctx: Context) -> None:
        if order.order_id == "grows":
            ctx.publish(OrderPaid(order_id=order.order_id, note="x" * 30_000))
        got.append(order.order_id)

    @service.on(OrderPaid)
    async def paid(event: OrderPaid) -> None: ...

    app = App(service, broker=url_of(kafka, fresh_prefix))
    async with serving(app):
        for size in (20_000, 100_000, 5_000_000):
            with pytest.raises(UsageError) as error:
                await app.publish(OrderPlaced(order_id="large", note="x" * size))
            assert (error.value.code == "UL1012" and "reference" in error.value.fix) or size > 4_000_000
        await app.publish(OrderPlaced(order_id="grows"))
        # many small ones at once: together they are larger than what the topic takes in one piece
        many = [OrderPlaced(order_id=f"{n % 7}", note="x" * 900) for n in range(200)]
        assert len(await app.publish_all(many)) == 200
        await until(lambda: len(got) == 200 and len(dead(app)) == 1)
        (letter,) = dead(app)
        assert (letter.reason, letter.key) == ("cannot_heal", b"grows") and "UL1012" in letter.error
    messages = everything(kafka, f"{fresh_prefix}.order", 201)
    assert len(messages) == 201


# --- messages


def ce(id: bytes | None, *more: tuple[str, bytes | None]) -> list[tuple[str, bytes | None]]:
    return [("ce_specversion", b"1.0"), ("ce_id", id), ("ce_source", b"x"), ("ce_type", b"order.OrderPlaced"), *more]


async def test_odd_messages_are_handled_or_shelved(
    kafka: Kafka, fresh_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    a_store(monkeypatch, tmp_path)
    service, got = handled_by(on_dead="skip")
    app = App(service, broker=url_of(kafka, fresh_prefix), topics=[Topic("order", partitions=2)])
    good = b'{"order_id":"o"}'
    fine: dict[str, tuple[bytes | None, list[tuple[str, bytes | None]]]] = {
        "odd bytes": (b"k", [("x", b"\xff"), ("x", b"y"), ("", b"no name"), ("n", None)]),
        "many": (b"k", [(f"h{n}", b"v") for n in range(2000)]),
        "other case": (b"k", [("CE_Subject", b"s"), ("Content-Type", b"application/json; charset=utf-8")]),
        "large key": (b"k" * 20_000, []),
        "key of no text": (b"\xff\x00", []),
    }
    bad: dict[str, tuple[bytes | None, list[tuple[str, bytes | None]], str]] = {
        "no headers": (good, [], "UL5001"),
        "tombstone": (None, [], "UL5007"),
        "tombstone with headers": (None, ce(b"1"), "UL5004"),
        "id twice": (good, ce(b"1", ("ce_id", b"2")), "UL5002"),
        "id empty": (good, ce(b""), "UL5002"),
        "id null": (good, ce(None), "UL5002"),
        "id of no text": (good, ce(b"\xff"), "UL5002"),
        "id with control characters": (good, ce(b"\x1b[31m"), "UL5002"),
        "no time": (good, ce(b"1", ("ce_time", b"yesterday")), "UL5002"),
        "huge headers": (good, ce(b"1", ("big", b"x" * 100_000)), "UL5005"),
        "another version": (good, [("ce_specversion", b"2.0"), *ce(b"1")[1:]], "UL5001"),
        "avro": (good, [("content-type", b"application/cloudevents+avro")], "UL5001"),
        "no JSON": (b"\xff{", [("content-type", b"application/cloudevents+json")], "UL5001"),
        "deep JSON": (b"[" * 100_000, [("content-type", b"application/cloudevents+json")], "UL5001"),
        "other data": (b'{"id": 3}', ce(b"1"), "UL5004"),
        "text": (good, ce(b"1", ("content-type", b"text/plain")), "UL5006"),
    }
    async with serving(app):
        topic = f"{fresh_prefix}.order"
        send(kafka, topic, [(key, good, ce(name.encode(), *headers)) for name, (key, headers) in fine.items()])
        send(kafka, topic, [(name.encode(), value, headers) for name, (value, headers, _) in bad.items()])
        await settled(app, "billing", "order", len(fine) + len(bad))
        letters = {(letter.key or b"").decode(): letter for letter in dead(app)}
        assert counts(app, "billing") == {"done": len(fine)}
    assert {ctx.id for _, ctx in got} == set(fine)
    (odd,) = [ctx for _, ctx in got if ctx.id == "odd bytes"]
    assert odd.headers == {"x": "y", "": "no name", "n": ""}
    assert set(letters) == set(bad)
    sent = {(m.key() or b"").decode(errors="replace"): m for m in everything(kafka, topic, len(fine) + len(bad))}
    for name, (value, _, code) in bad.items():
        letter = letters[name]
        assert letter.reason == "undecodable" and letter.error.startswith(code), (name, letter.error)
        assert letter.data == value == sent[name].value()
        assert "\n  do:" in letter.error or code in ("UL5005", "UL5006"), letter.error
    assert "Traceback" not in caplog.text and "\x1b" not in caplog.text.replace("'ctl", "")


async def test_events_without_the_key_that_they_declare(
    kafka: Kafka, fresh_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They take their place by the key in their data, and it is said once what cannot be promised."""
    a_store(monkeypatch, tmp_path)
    service, got = Service("billing"), []

    @service.on(OrderPlaced)
    async def take(order: OrderPlaced, ctx: Context) -> None:
        await asyncio.sleep(0.02 if order.note == "1" else 0)
        if order.note == "bad":
            raise UsageError("UL0", "as it happens")
        got.append((order.order_id, order.note, ctx.key))

    app = App(service, broker=url_of(kafka, fresh_prefix), topics=[Topic("order", partitions=1)])
    async with serving(app):
        for key, order_id, note in (
            (None, "a", "1"), (None, "b", "1"), (b"a", "a", "2"), (None, "a", "3"), (b"", "b", "2"),
            (None, "c", "bad"), (None, "c", "after"), (b"c", "c", "last"),
        ):  # fmt: skip
            value = b'{"order_id":"%s","note":"%s"}' % (order_id.encode(), note.encode())
            send(kafka, f"{fresh_prefix}.order", [(key, value, ce(f"{order_id}{note}".encode()))])
        await until(lambda: len(got) == 5 and len(dead(app)) == 1)
        await until(lambda: dead(app)[0].parked_behind == 2)  # whatever their key was on the wire
        assert [note for order_id, note, _ in got if order_id == "a"] == ["1", "2", "3"]
        assert [note for order_id, note, _ in got if order_id == "b"] == ["1", "2"]
        assert {key for _, _, key in got} == {"a", "b"}
        assert caplog.text.count("UL1134") == 1 and "order.OrderPlaced" in caplog.text
        await asyncio.to_thread(
            shelf.ask, FileRecords(app.file), "discard", dead(app), operator="me", reason="it must go on"
        )
        await until(lambda: len(got) == 7)
    assert got[-2:] == [("c", "after", "c"), ("c", "last", "c")]


# --- while it runs


async def test_a_cluster_that_goes_away_is_said_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    require_kafka()
    a_store(monkeypatch, tmp_path)
    service, got = handled_by()
    caplog.set_level(logging.WARNING)
    with Kafka.start() as cluster:
        app = App(service, broker=f"{cluster.url}?session.timeout.ms=6000")
        async with serving(app):
            await app.publish(OrderPlaced(order_id="before"))
            await until(lambda: len(got) == 1)
            caplog.clear()
            cluster.kill()
            began = time.monotonic()
            publishing = asyncio.create_task(app.publish(OrderPlaced(order_id="meanwhile"), deadline=60))
            await until(lambda: "cannot be reached" in caplog.text, 30)
            assert "billing" in caplog.text and cluster.bootstrap in caplog.text
            assert time.monotonic() - began < 30 and not publishing.done()
            await asyncio.to_thread(cluster.restart)
            await publishing
            await app.publish(OrderPlaced(order_id="after"))
            await until(lambda: {order_id for order_id, _ in got} == {"before", "meanwhile", "after"}, 40)
    assert "Traceback" not in caplog.text
