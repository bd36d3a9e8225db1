"""`unlost doctor` on a real broker: each bad state is made, and must be seen."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, ConsumerGroupTopicPartitions, TopicPartition
from confluent_kafka.admin import AdminClient, NewPartitions, NewTopic
from kafka_kit import a_store, make_topic, send, serving, settled, url_of

from servers import kafka as kafka_server
from servers.fixtures import require_kafka
from servers.kafka import Kafka
from servers.process import free_ports
from unlost import App, Event, Service, Topic
from unlost.brokers.findings import CHECKS, Finding
from unlost.events import seal
from unlost.ops.doctor import Diagnosis, doctor
from unlost.sqlite.file import File
from unlost.store import outbox
from unlost.world import REAL


class OrderPlaced(Event, key="order_id", topic="order"):
    order_id: str


def an_app(url: str, **options: Any) -> App:
    billing = Service("billing")

    @billing.on(OrderPlaced)
    async def charge(order: OrderPlaced) -> None:
        pass

    options.setdefault("topics", [Topic("order", partitions=2)])
    return App(billing, broker=url, **options)


def red(found: Diagnosis, code: str, severity: str, text: str = "") -> Finding:
    """The finding of this code that is as bad as said."""
    assert code in CHECKS
    here = [f for f in found.findings if f.code == code]
    matching = [f for f in here if f.severity == severity and text in f.what + f.evidence]
    assert matching, here
    return matching[0]


def admin_of(kafka: Kafka) -> AdminClient:
    return AdminClient({"bootstrap.servers": kafka.internal})


def stand_at(kafka: Kafka, group: str, topic: str, *positions: int) -> None:
    """The committed positions of a group without members, one for each partition."""
    places = [TopicPartition(topic, n, at) for n, at in enumerate(positions)]
    request = [ConsumerGroupTopicPartitions(group, places)]
    admin = admin_of(kafka)  # a client that nobody holds any more answers nothing
    for future in admin.alter_consumer_group_offsets(request).values():
        future.result(20)


async def handled(app: App, count: int = 4) -> None:
    async with serving(app):
        for n in range(count):
            await app.publish(OrderPlaced(order_id=f"A{n}"))
        await settled(app, "billing", "order", count)


@pytest.fixture
def url(kafka: Kafka, fresh_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    a_store(monkeypatch, tmp_path)
    tmp_path.chmod(0o700)
    return url_of(kafka, fresh_prefix)


# --- in order --------------------------------------------------------------------------------------------


async def test_a_service_in_good_order(url: str) -> None:
    app = an_app(url)
    async with serving(app):
        for n in range(4):
            await app.publish(OrderPlaced(order_id=f"A{n}"))
        await settled(app, "billing", "order", 4)
        found = await asyncio.to_thread(doctor, url)
    assert found.count("error") == 0
    assert {f.code for f in found.findings if f.severity != "ok"} <= {"UL4101", "UL4104", "UL4208"}
    assert (found.topics, found.services, found.chosen) == (["order"], ["billing"], "those of the store")
    for code in ("UL4304", "UL4305", "UL4306", "UL4403", "UL4408", "UL4409", "UL4501"):
        red(found, code, "ok")
    assert "Kafka 4.0 or newer" in found.title
    red(found, "UL4101", "warning", "one broker")  # and that is true of this cluster
    red(found, "UL4208", "warning", "survives process death")
    found = doctor(url)
    red(found, "UL4304", "note", "nobody runs billing; its positions are deleted 7 days")
    red(found, "UL4406", "ok", "is kept in this store")


def test_without_store_and_app_all_under_the_prefix_is_looked_at(kafka: Kafka, fresh_prefix: str, url: str) -> None:
    make_topic(kafka, f"{fresh_prefix}.order")
    make_topic(kafka, f"{fresh_prefix}.unlost.ledger", cleanup_policy="compact")
    stand_at(kafka, f"{fresh_prefix}.somebody", f"{fresh_prefix}.order", 0)
    found = doctor(url)
    assert (found.topics, found.services) == (["order"], [])
    red(found, "UL4401", "note", "no store yet")
    red(found, "UL4007", "note", "no mark of unlost")
    assert doctor(url, services=["somebody"]).services == ["somebody"]
    assert not [f for f in found.findings if f.code == "UL4209" and f.severity == "error"]  # the ledger is meant to be


# --- topics ----------------------------------------------------------------------------------------------


def test_a_topic_with_everything_wrong(kafka: Kafka, fresh_prefix: str, url: str) -> None:
    make_topic(
        kafka, f"{fresh_prefix}.order", cleanup_policy="compact,delete", unclean_leader_election_enable="true",
        min_insync_replicas="2", max_message_bytes="1000", message_timestamp_type="LogAppendTime", retention_ms="86400000",
        retention_bytes="1000000",
    )  # fmt: skip
    found = doctor(url)
    assert (
        "--entity-name " + fresh_prefix + ".order --add-config cleanup.policy=delete"
        in red(found, "UL4209", "error").fix
    )
    red(found, "UL4207", "error", "unclean.leader.election.enable=true")
    red(found, "UL4203", "error", "min.insync.replicas=2")
    red(found, "UL4206", "error", "nothing is ever accepted")
    red(found, "UL4208", "warning", "survives process death")
    red(found, "UL4210", "note", "1,000 bytes")
    red(found, "UL4211", "note", "LogAppendTime")
    red(found, "UL4212", "warning", "retention.bytes=1000000")
    red(found, "UL4212", "note", "24 hours")


def test_a_single_broker_that_flushes_survives_more(kafka: Kafka, fresh_prefix: str, url: str) -> None:
    make_topic(kafka, f"{fresh_prefix}.order", flush_messages="1")
    red(doctor(url), "UL4208", "ok", "power loss of one machine")


def test_what_the_app_declares(kafka: Kafka, fresh_prefix: str, url: str) -> None:
    make_topic(kafka, f"{fresh_prefix}.order", partitions=3, retention_ms="3600000")
    declared = [Topic("order", partitions=2, replication=3, retention="2h"), Topic("later")]
    app = an_app(url, topics=declared, survives="power loss of one machine")
    found = doctor(app=app)
    assert found.topics == ["order"] and found.chosen == "those of the App"
    red(found, "UL4213", "error", "it declares 2")
    red(found, "UL4213", "error", "replication=3")
    red(found, "UL4213", "warning", "2 hours")
    red(found, "UL4208", "error", "The App demands power loss of one machine")
    red(found, "UL4201", "note", "later")
    red(found, "UL4212", "note", "60 minutes")
    found = doctor(app=an_app(url, topics=[Topic("order", partitions=3)]))
    red(found, "UL4212", "warning", "declares no retention")
    assert not [f for f in found.findings if f.code == "UL4213" and f.severity != "ok"]


# --- what waits ------------------------------------------------------------------------------------------


def fill(kafka: Kafka, topic: str, ages: Sequence[float], partition: int = 0) -> None:
    for age in ages:
        millis = int((time.time() - age) * 1000)
        send(kafka, topic, [(b"k", b"{}", [])], partition=partition, timestamp=millis)


def test_retention_against_what_waits(kafka: Kafka, fresh_prefix: str, url: str) -> None:
    name = f"{fresh_prefix}.order"
    make_topic(kafka, name, 2, retention_ms="3600000")
    fill(kafka, name, [3000, 2900, 10], 0)
    fill(kafka, name, [5], 1)
    stand_at(kafka, f"{fresh_prefix}.billing", name, 0, 0)
    found = doctor(url, services=["billing"])
    finding = red(found, "UL4301", "error", "retention passes events on order")
    assert "in 10 minutes" in finding.what or "in 9." in finding.what  # 600 s less what this took
    assert "order/0" in finding.evidence and "order/1" not in finding.evidence and "4 wait" in finding.evidence
    stand_at(kafka, f"{fresh_prefix}.billing", name, 2, 0)
    red(doctor(url, services=["billing"]), "UL4301", "note", "2 events on order wait")
    stand_at(kafka, f"{fresh_prefix}.billing", name, 3, 1)
    red(doctor(url, services=["billing"]), "UL4301", "ok")


def test_events_that_were_removed_unread(kafka: Kafka, fresh_prefix: str, url: str) -> None:
    name = f"{fresh_prefix}.order"
    make_topic(kafka, name)
    fill(kafka, name, [5] * 7)
    stand_at(kafka, f"{fresh_prefix}.billing", name, 2)
    admin = admin_of(kafka)
    for future in admin.delete_records([TopicPartition(name, 0, 6)]).values():
        future.result(20)
    red(doctor(url, services=["billing"]), "UL4302", "error", "up to 4 events on order were removed")


def test_a_position_behind_the_end(kafka: Kafka, fresh_prefix: str, url: str) -> None:
    name = f"{fresh_prefix}.order"
    make_topic(kafka, name)
    stand_at(kafka, f"{fresh_prefix}.billing", name, 40)
    red(doctor(url, services=["billing"]), "UL4303", "error", "position 40, the log ends at 0")


def test_an_event_from_the_future(kafka: Kafka, fresh_prefix: str, url: str) -> None:
    name = f"{fresh_prefix}.order"
    make_topic(kafka, name)
    fill(kafka, name, [-1800])
    red(doctor(url), "UL4006", "warning", "from the future")


@contextlib.contextmanager
def members(kafka: Kafka, count: int, group: str, topic: str, **settings: Any) -> Iterator[None]:
    consumers = [
        Consumer({"bootstrap.servers": kafka.internal, "group.id": group, "session.timeout.ms": 6000} | settings)
        for _ in range(count)
    ]
    try:
        end = time.monotonic() + 30
        admin = admin_of(kafka)
        for c in consumers:
            c.subscribe([topic])
        while True:
            for c in consumers:
                c.poll(0.05)
            told = admin.describe_consumer_groups([group])[group].result()
            if len(told.members) == count and told.state.name == "STABLE":
                break
            assert time.monotonic() < end, told.state
        yield
    finally:
        for c in consumers:
            c.close()


def test_members(kafka: Kafka, fresh_prefix: str, url: str) -> None:
    name, group = f"{fresh_prefix}.order", f"{fresh_prefix}.billing"
    make_topic(kafka, name)
    send(kafka, name, [(b"k", b"{}", [])])
    stand_at(kafka, group, name, 0)
    cooperative = {"partition.assignment.strategy": "cooperative-sticky"}
    with members(kafka, 2, group, name, **{"client.id": "unlost"}, **cooperative):
        found = doctor(url)  # without a name: it bears our mark
        assert found.services == ["billing"]
        red(found, "UL4305", "warning", "2 members, 1 partition")
        red(found, "UL4306", "ok")
    with members(kafka, 1, group, name):
        red(doctor(url, services=["billing"]), "UL4306", "warning", "client.id rdkafka")
    with members(kafka, 1, group, name, **{"client.id": "unlost"}):
        red(doctor(url, services=["billing"]), "UL4306", "warning", "partition.assignment.strategy=range")


# --- the store -------------------------------------------------------------------------------------------


async def test_a_topic_that_was_made_again(kafka: Kafka, fresh_prefix: str, url: str) -> None:
    await handled(an_app(url))
    name = f"{fresh_prefix}.order"
    admin = admin_of(kafka)
    admin.delete_topics([name])[name].result(20)
    while name in admin.list_topics(timeout=10).topics:
        await asyncio.sleep(0.05)
    red(doctor(url), "UL4201", "error", "is gone")
    make_topic(kafka, name, 2)
    red(doctor(url), "UL4403", "error", "made again")
    red(doctor(url), "UL4303", "error", "lost its end")


async def test_a_topic_with_more_partitions(kafka: Kafka, fresh_prefix: str, url: str) -> None:
    await handled(an_app(url))
    name = f"{fresh_prefix}.order"
    admin = admin_of(kafka)
    admin.create_partitions([NewPartitions(name, 4)])[name].result(20)
    red(doctor(url), "UL4404", "error", "4 partitions now")


async def test_positions_that_the_cluster_has_forgotten(kafka: Kafka, fresh_prefix: str, url: str) -> None:
    await handled(an_app(url))
    red(doctor(url), "UL4405", "ok")
    group = f"{fresh_prefix}.billing"
    admin = admin_of(kafka)
    admin.delete_consumer_groups([group])[group].result(20)
    red(doctor(url), "UL4405", "warning", "no committed offset for order/")


async def test_another_store(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await handled(an_app(url))
    red(doctor(url), "UL4406", "ok")
    a_store(monkeypatch, tmp_path, "other.db")
    async with an_app(url):  # it is pinned there, and goes no further
        pass
    red(doctor(url), "UL4406", "error", "kept in another store")


async def test_a_store_that_was_put_back(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = an_app(url)
    await handled(app)
    shutil.copytree(tmp_path, tmp_path / "copy")
    await handled(app, 8)
    a_store(monkeypatch, tmp_path / "copy")
    red(doctor(url), "UL4407", "error", "the group was told")


async def test_the_store_of_another_broker(kafka: Kafka, fresh_prefix: str, url: str) -> None:
    await handled(an_app(url))
    red(doctor(url), "UL4402", "ok")
    found = doctor(url_of(kafka, f"{fresh_prefix}-b"))
    red(found, "UL4402", "error", "belongs to another broker")
    assert found.services == []  # its positions mean nothing here


async def test_the_outbox(url: str, tmp_path: Path) -> None:
    await handled(an_app(url))
    red(doctor(url), "UL4409", "ok")
    file = File(tmp_path / "store.db")
    envelope = seal(OrderPlaced(order_id="A9"), source="billing", now=REAL.now())
    file.write_sync(lambda tx: outbox.put(tx, [envelope]))
    file.close()
    red(doctor(url), "UL4409", "error", "1 row in unlost_outbox")


async def test_a_store_that_cannot_be_opened(url: str, tmp_path: Path) -> None:
    await handled(an_app(url))
    with (tmp_path / "store.db").open("r+b") as f:
        f.write(b"\xff" * 4096)
    for end in ("-wal", "-shm"):
        (tmp_path / f"store.db{end}").unlink(missing_ok=True)
    red(doctor(url), "UL4401", "error", "cannot be looked at")


# --- the command -----------------------------------------------------------------------------------------


def run(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("UNLOST_")}
    return subprocess.run(
        [sys.executable, "-m", "unlost", "doctor", *arguments], cwd=folder, env=clean | env, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip


def test_the_command(kafka: Kafka, fresh_prefix: str, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").touch()
    url = f"{kafka.url}?prefix={fresh_prefix}."
    make_topic(kafka, f"{fresh_prefix}.order")
    done = run(tmp_path, "--broker", url)
    assert done.returncode == 0, done
    assert "WARNING  UL4101  one broker" in done.stdout and "UL4001" not in done.stdout
    assert done.stdout.index("WARNING") < done.stdout.index("note     UL4401")
    assert not (tmp_path / ".unlost").exists()  # nothing was made
    assert run(tmp_path, "--strict", UNLOST_BROKER=url).returncode == 1
    make_topic(kafka, f"{fresh_prefix}.bad", cleanup_policy="compact")
    done = run(tmp_path, "--broker", url, "--json")
    told = json.loads(done.stdout)
    assert done.returncode == 1 and told["schema"] == "unlost.doctor/1" and told["errors"] == 1
    assert told["findings"][0]["code"] == "UL4209" and told["topics"] == ["bad", "order"]
    done = run(tmp_path, "--broker", "kafka://127.0.0.1:1")
    assert done.returncode == 4 and "UL2100" in done.stderr
    done = run(tmp_path, "--broker", f"{url}&no.such.setting=1")
    assert done.returncode == 2 and "UL1154" in done.stderr
    (tmp_path / "shop.py").write_text(
        "from unlost import App, Service, Topic\n"
        f"app = App(Service('billing'), broker={url!r}, topics=[Topic('order', partitions=7)])\n"
    )
    done = run(tmp_path, "--app", "shop")
    assert done.returncode == 1 and "UL4213" in done.stdout and "those of the App" in done.stdout
    done = run(tmp_path, "--app", "shop", "--service", "nobody")
    assert done.returncode == 2 and "UL1331" in done.stderr


# --- clusters of their own -------------------------------------------------------------------------------


def my_address() -> str:
    """An address of this machine that is no loopback, or an empty text."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            s.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            return ""
        found = str(s.getsockname()[0])
    return "" if found.startswith("127.") else found


def started(monkeypatch: pytest.MonkeyPatch, shown: str, **settings: str) -> Kafka:
    """A broker that names another address than the one that it is found at."""
    require_kafka()
    client, inside, control, *_ = ports = free_ports(4)
    monkeypatch.setattr(kafka_server, "free_ports", lambda _: ports)
    config = {key.replace("_", "."): value for key, value in settings.items()} | {
        "listeners": f"CLIENT://:{client},INTERNAL://127.0.0.1:{inside},CONTROLLER://127.0.0.1:{control}",
        "advertised.listeners": f"CLIENT://{shown}:{client},INTERNAL://127.0.0.1:{inside}",
    }
    return Kafka.start(1, config=config)


def test_a_cluster_with_bad_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    a_store(monkeypatch, tmp_path)
    address = my_address()
    settings = {
        "unclean_leader_election_enable": "true", "offsets_retention_minutes": "60", "offset_metadata_max_bytes": "100",
        "group_min_session_timeout_ms": "20000", "group_coordinator_rebalance_protocols": "classic",
        "offsets_topic_replication_factor": "3", "log_message_timestamp_type": "LogAppendTime",
    }  # fmt: skip
    with started(monkeypatch, address or "127.0.0.1", **settings) as kafka:
        found = doctor(kafka.url)
        if address:
            red(found, "UL4003", "warning", "plain text")
        red(found, "UL4104", "warning", "auto.create.topics.enable=true on broker 1")
        red(found, "UL4105", "warning", "unclean.leader.election.enable=true on broker 1")
        red(found, "UL4106", "warning", "offsets.retention.minutes=60")
        red(found, "UL4107", "error", "offsets.topic.replication.factor=3")
        red(found, "UL4109", "warning", "offset.metadata.max.bytes=100")
        red(found, "UL4103", "error", "broker 1 takes 20000")
        red(found, "UL4006", "note", "not checked")
        red(doctor(f"{kafka.url}?group.protocol=consumer"), "UL4103", "error", "rebalance.protocols=classic")
        make_topic(kafka, "order")
        send(kafka, "order", [(b"k", b"{}", [])])
        red(doctor(kafka.url), "UL4006", "ok")  # now there is a time that the broker gave


@pytest.mark.slow
def test_an_address_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    a_store(monkeypatch, tmp_path)
    with started(monkeypatch, "no-such-host.invalid") as kafka:
        found = doctor(kafka.url)
        red(found, "UL4004", "error", "no-such-host.invalid")


def test_rights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    require_kafka()
    a_store(monkeypatch, tmp_path)
    with Kafka.start(1, security="sasl_plaintext", acls=True) as kafka:
        make_topic(kafka, "order")
        url = f"kafka://alice:alice-secret@{kafka.bootstrap}?security.protocol=SASL_PLAINTEXT"
        app = an_app(url, topics=[Topic("order", partitions=1)])
        found = doctor(app=app)
        assert "--operation DESCRIBE --topic order" in red(found, "UL4005", "error", "the topic order").fix
        red(found, "UL4005", "error", "the group billing")
        assert not [f for f in found.findings if f.code == "UL4201" and "not there" in f.what]
        alice = ["--add", "--allow-principal", "User:alice"]
        kafka.tool("kafka-acls", *alice, "--operation", "DESCRIBE", "--topic", "order")
        found = doctor(app=app)
        red(found, "UL4005", "error", "alice may not read or write the topic order")
        red(found, "UL4007", "note", "the settings of topic order")
        red(found, "UL4007", "note", "the settings of broker 1")
        kafka.tool("kafka-acls", *alice, "--operation", "READ", "--operation", "WRITE", "--topic", "order")
        kafka.tool("kafka-acls", *alice, "--operation", "READ", "--group", "billing")
        found = doctor(app=app)
        assert not [f for f in found.findings if "may not read" in f.what or "take part" in f.what]
        red(found, "UL4005", "note", "may not make topics")


@pytest.mark.slow
def test_three_brokers_of_which_one_dies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    require_kafka()
    a_store(monkeypatch, tmp_path)
    with Kafka.start(3, config={"broker.rack": "cellar"}) as kafka:
        admin = admin_of(kafka)
        strict = {"min.insync.replicas": "3"}
        topics = [
            NewTopic("good", 3, 3), NewTopic("strict", 1, 3, config=strict), NewTopic("two", 1, replica_assignment=[[1, 2]]),
            NewTopic("one", 1, replica_assignment=[[3]]),
        ]  # fmt: skip
        for future in admin.create_topics(topics).values():
            future.result(20)
        kafka.wait_in_sync()
        found = doctor(kafka.url)
        red(found, "UL4101", "ok")
        red(found, "UL4108", "warning", "one rack")
        red(found, "UL4204", "ok")
        red(found, "UL4205", "error", "one has 1 copy")
        red(found, "UL4205", "warning", "two has 2 copies")
        red(found, "UL4206", "warning", "strict: publishing stops")
        red(found, "UL4208", "ok", "good")
        kafka.kill(3)
        end = time.monotonic() + 60
        while any(f.code == "UL4202" and f.severity == "ok" for f in doctor(kafka.url).findings):
            assert time.monotonic() < end
        found = doctor(kafka.url)
        red(found, "UL4202", "error", "one: 1 partition without a leader")
        red(found, "UL4203", "error", "strict: 1 partition with fewer copies")
        assert "3" in red(found, "UL4204", "warning", "good: 3 partitions with copies that are behind").fix
        red(found, "UL4101", "warning", "two brokers")
