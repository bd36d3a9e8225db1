"""The servers of the tests do what their tests rely on: data survive a kill, a cut reply is not a lost event."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from servers import fixtures, kafka, process, shared
from servers import postgres as postgres_server
from servers.kafka import Kafka
from servers.pgbouncer import PgBouncer
from servers.postgres import Postgres, via
from servers.wire import Wire

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


def test_a_shared_server_ends_with_its_last_user(tmp_path: Path) -> None:
    fixtures.require_kafka()
    fixtures.require_postgres(own=True)
    for kind, answers in (("kafka", kafka_answers), ("postgres", postgres_answers)):
        place = tmp_path / kind
        with shared.join(kind, place) as first, shared.join(kind, place) as second:
            assert first == second
            until(lambda first=first, answers=answers: answers(first))  # type: ignore[misc]
        until(lambda place=place: not shared._keeper_lives(place))  # type: ignore[misc]
        assert not answers(first)


def kafka_answers(bootstrap: str) -> bool:
    try:
        AdminClient({"bootstrap.servers": bootstrap, **QUICK}).list_topics(timeout=1)
    except KafkaException:
        return False
    return True


def postgres_answers(url: str) -> bool:
    try:
        psycopg.connect(url, connect_timeout=2).close()
    except psycopg.OperationalError:
        return False
    return True


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


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
def test_where_no_server_can_be_had(monkeypatch: pytest.MonkeyPatch, ci: str, outcome: type[BaseException]) -> None:
    monkeypatch.setattr(fixtures, "available", lambda: "no java on the path")
    monkeypatch.setattr(postgres_server, "available", lambda own: "no postgres on the path")
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match="no Kafka: no java on the path"):
        fixtures.require_kafka()
    with pytest.raises(outcome, match="no PostgreSQL: no postgres on the path"):
        fixtures.require_postgres()


def test_a_given_cluster_is_used_and_not_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNLOST_TEST_KAFKA", "example:9092")
    with Kafka.start() as given:
        assert given.url == "kafka://example:9092"
        with pytest.raises(RuntimeError, match="was given by UNLOST_TEST_KAFKA"):
            given.kill()


# --- PostgreSQL -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    """A PostgreSQL for this file alone."""
    fixtures.require_postgres(own=True)
    with Postgres.start(own=True, settings={"application_name": "it's set"}) as started:
        yield started


@pytest.fixture
def rows(server: Postgres) -> Iterator[str]:
    """The URL of a database of it with an empty table `rows`."""
    url = server.fresh()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE TABLE rows (n int)")
    yield url
    server.drop_database(urlsplit(url).path[1:])


def connected(url: str) -> psycopg.Connection[tuple[Any, ...]]:
    return psycopg.connect(url, autocommit=True, connect_timeout=SECONDS)


def add(url: str, *numbers: int) -> None:
    with connected(url) as connection:
        for n in numbers:
            connection.execute("INSERT INTO rows VALUES (%s)", (n,))


def kept(url: str) -> list[int]:
    with connected(url) as connection:
        return [n for (n,) in connection.execute("SELECT n FROM rows ORDER BY n")]


def test_what_the_server_promises(server: Postgres) -> None:
    def shown(key: str) -> str:
        ((value,),) = server.sql(f"SHOW {key}")
        return str(value)

    assert shown("fsync") == shown("synchronous_commit") == shown("full_page_writes") == "on"
    assert (shown("listen_addresses"), shown("unix_socket_directories")) == ("127.0.0.1", "")
    assert (shown("server_encoding"), shown("max_connections")) == ("UTF8", "200")
    with socket.socket() as other, pytest.raises(ConnectionRefusedError):
        other.connect(("127.0.0.2", server.port))


@pytest.mark.parametrize("end", [Postgres.kill, Postgres.immediate_stop, Postgres.stop])
def test_what_was_committed_survives_and_nothing_else(
    server: Postgres, rows: str, end: Callable[[Postgres], None]
) -> None:
    add(rows, 1, 2)
    with psycopg.connect(rows) as connection:
        connection.execute("INSERT INTO rows VALUES (3)")
        family = process.children(server.pid)
        end(server)
        process.wait_ended(family, seconds=0)
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    with pytest.raises(RuntimeError, match="does not run"):
        server.freeze()
    assert not postgres_answers(rows)
    server.start_again()
    assert kept(rows) == [1, 2]


def test_it_starts_again_when_the_last_process_has_let_go_of_the_data(server: Postgres, rows: str) -> None:
    add(rows, 1)
    with connected(rows) as connection:
        backend = connection.info.backend_pid
        os.kill(backend, signal.SIGSTOP)
        process.wait_stopped([backend])
        os.kill(server.pid, signal.SIGKILL)
        before = len(server.log())
        starting = threading.Thread(target=server.start_again)
        starting.start()
        try:
            until(lambda: "is still in use" in server.log()[before:])
        finally:
            os.kill(backend, signal.SIGCONT)
            starting.join()
    assert kept(rows) == [1]


def test_a_frozen_server_answers_again(server: Postgres, rows: str) -> None:
    with connected(rows) as connection:
        server.freeze()
        assert not postgres_answers(rows)
        answers: list[Any] = []
        asking = threading.Thread(target=lambda: answers.extend(connection.execute("SELECT 1")))
        asking.start()
        asking.join(0.2)
        assert asking.is_alive()
        server.go_on()
        asking.join()
        assert answers == [(1,)]
        server.freeze()
        server.kill()
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    server.start_again()


def test_an_older_backup(server: Postgres, rows: str, tmp_path: Path) -> None:
    add(rows, 1)
    with pytest.raises(RuntimeError, match="stop\\(\\) it first"):
        server.backup(tmp_path / "backup")
    server.kill()
    server.backup(tmp_path / "backup")
    server.start_again()
    add(rows, 2)
    server.stop()
    server.restore(tmp_path / "backup")
    server.start_again()
    assert kept(rows) == [1]


def test_passwords_are_checked(server: Postgres) -> None:
    server.sql("CREATE ROLE alice LOGIN PASSWORD 'al:ce @/%'")
    connected(server.url(user="alice", password="al:ce @/%")).close()
    for user, password in (("alice", "wrong"), ("alice", ""), ("postgres", "postgres"), ("nobody", "x")):
        with pytest.raises(psycopg.OperationalError, match=r"authentication failed|no password supplied"):
            connected(server.url(user=user, password=password))


def test_clients_are_put_out(server: Postgres, rows: str) -> None:
    with connected(rows) as one, connected(rows) as two, connected(server.url()) as other:
        assert server.terminate_backends("pid = %s", one.info.backend_pid) == 1
        assert server.terminate_backends(database=urlsplit(rows).path[1:]) == 1
        for connection in (one, two):
            with pytest.raises(psycopg.errors.AdminShutdown):
                connection.execute("SELECT 1")
        other.execute("SELECT 1")
        assert server.terminate_backends() == 1


def test_a_server_that_does_not_start_says_why() -> None:
    fixtures.require_postgres(own=True)
    with pytest.raises(RuntimeError, match="unrecognized configuration parameter"):
        Postgres.start(settings={"no_such_setting": "1"})


def test_a_server_ends_with_its_owner() -> None:
    fixtures.require_postgres(own=True)
    owner = subprocess.Popen(
        [sys.executable, postgres_server.__file__], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    url = owner.stdout.readline().strip()
    with connected(url) as connection:
        backend = connection.info.backend_pid
        os.kill(backend, signal.SIGSTOP)  # even what cannot notice that the others are gone
        owner.send_signal(signal.SIGKILL)
        owner.communicate()
        process.wait_ended([backend])
    until(lambda: not postgres_answers(url))


def test_a_database_of_ones_own(postgres: Postgres, database: str) -> None:
    with connected(database) as connection:
        connection.execute("CREATE TABLE here (n int)")
    another = postgres.fresh()
    with connected(another) as connection:
        assert connection.execute("SELECT to_regclass('here')").fetchall() == [(None,)]
        postgres.drop_database(urlsplit(another).path[1:])  # although it is in use
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        connected(another)


def test_the_shared_server_cannot_be_broken(postgres: Postgres) -> None:
    breaking = (Postgres.kill, Postgres.stop, Postgres.freeze, Postgres.start_again, Postgres.terminate_backends)
    for verb in breaking:
        with pytest.raises(RuntimeError, match=r"shared by all tests|was given by"):
            verb(postgres)


def test_a_given_server_is_used_and_not_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNLOST_TEST_POSTGRES", "postgresql://root:secret@example/?sslmode=require")
    with Postgres.start() as given:
        assert given.url("shop") == "postgresql://root:secret@example/shop?sslmode=require"
        assert given.url(user="a b", password="@") == "postgresql://a%20b:%40@example/postgres?sslmode=require"
        with pytest.raises(RuntimeError, match="was given by UNLOST_TEST_POSTGRES"):
            given.kill()


# --- between clients and PostgreSQL -----------------------------------------------------------------------------------


@pytest.fixture
def wire(postgres: Postgres) -> Iterator[Wire]:
    with Wire.to(postgres.host, postgres.port) as laid:
        yield laid


def test_a_wire_that_is_cut(wire: Wire, database: str) -> None:
    with connected(via(database, wire.port)) as connection:
        assert wire.connections == 1
        wire.cut()
        assert wire.connections == 0
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    connected(via(database, wire.port)).close()


def test_a_wire_that_refuses(wire: Wire, database: str) -> None:
    with connected(via(database, wire.port)) as connection:
        wire.refuse()
        with pytest.raises(psycopg.OperationalError, match="refused"):
            connected(via(database, wire.port))
        connection.execute("SELECT 1")
        wire.accept()
        connected(via(database, wire.port)).close()


def test_a_wire_to_nobody() -> None:
    (port,) = process.free_ports(1)
    with Wire.to("127.0.0.1", port) as wire:
        assert not postgres_answers(f"postgresql://127.0.0.1:{wire.port}/")


@pytest.mark.parametrize(("hold", "arrives"), [(Wire.hang, False), (Wire.hold_replies, True)])
def test_a_commit_of_unknown_fate(wire: Wire, database: str, hold: Callable[[Wire], None], arrives: bool) -> None:
    with connected(database) as direct:
        direct.execute("CREATE TABLE rows (n int)")
        with connected(via(database, wire.port)) as connection:
            hold(wire)
            errors: list[BaseException] = []
            working = threading.Thread(target=lambda: errors.append(failure(connection)))
            working.start()
            if arrives:
                until(lambda: direct.execute("SELECT n FROM rows").fetchall())
            else:
                working.join(0.2)
            assert working.is_alive()
            wire.cut()
            working.join()
            assert isinstance(errors[0], psycopg.OperationalError)
        assert bool(kept(database)) == arrives


def failure(connection: psycopg.Connection[Any]) -> BaseException:
    try:
        connection.execute("INSERT INTO rows VALUES (1)")
    except psycopg.Error as error:
        return error
    return AssertionError("it was answered")


def test_a_wire_that_goes_on_loses_nothing(wire: Wire, database: str) -> None:
    with connected(via(database, wire.port)) as connection:
        connection.execute("CREATE TABLE rows (n int)")
        wire.hang()
        working = threading.Thread(target=connection.execute, args=("INSERT INTO rows VALUES (1)",))
        working.start()
        working.join(0.2)
        assert working.is_alive()
        wire.go_on()
        working.join()
    assert kept(database) == [1]


def test_a_pooler_shares_connections_between_transactions(
    pgbouncer: PgBouncer, pgbouncer_session: PgBouncer, database: str
) -> None:
    for bouncer, shares in ((pgbouncer, True), (pgbouncer_session, False)):
        with connected(bouncer.via(database)) as one, connected(bouncer.via(database)) as two:
            asked = "SELECT pg_backend_pid()"
            assert (one.execute(asked).fetchone() == two.execute(asked).fetchone()) == shares


def test_a_pooler_checks_passwords(pgbouncer: PgBouncer, postgres: Postgres, database: str) -> None:
    user = f"user_{uuid.uuid4().hex[:12]}"
    postgres.sql(f"CREATE ROLE {user} LOGIN PASSWORD 'secret'")
    name = urlsplit(database).path[1:]
    with connected(pgbouncer.via(postgres.url(name, user=user, password="secret"))) as connection:
        assert connection.execute("SELECT current_user").fetchone() == (user,)
    with pytest.raises(psycopg.OperationalError, match="authentication failed"):
        connected(pgbouncer.via(postgres.url(name, user=user, password="wrong")))
    postgres.sql(f"DROP ROLE {user}")


def test_a_pooler_that_is_killed(postgres: Postgres, database: str) -> None:
    fixtures.require_pgbouncer()
    with PgBouncer.start(postgres.url()) as bouncer:
        with connected(bouncer.via(database)) as connection:
            bouncer.kill()
            with pytest.raises(psycopg.OperationalError):
                connection.execute("SELECT 1")
        assert not postgres_answers(bouncer.via(database))
        bouncer.start_again()
        connected(bouncer.via(database)).close()
