"""Encryption, login and rights: by the URL alone, and no secret is ever shown."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
)
from kafka_kit import a_store, everything, make_topic, serving, until

from servers.fixtures import require_kafka
from servers.kafka import Kafka
from unlost import App, Context, Event, Service, Topic, Unavailable, UnlostError, UsageError
from unlost.brokers.connect import kafka_log
from unlost.brokers.kafka.settings import SECRETS, parse
from unlost.config import hide_secrets

PLAINTEXT = "security.protocol=SASL_PLAINTEXT"
OAUTH = (
    'org.apache.kafka.common.security.oauthbearer.OAuthBearerLoginModule required unsecuredLoginStringClaim_sub="x";'
)
CANARY = "c4n4ry-s3cr3t"


class OrderPlaced(Event, key="order_id"):
    order_id: str


class OrderPaid(Event, key="paid_id"):
    paid_id: str


@pytest.fixture(scope="module")
def guarded() -> Iterator[Kafka]:
    """Logins of every kind, without encryption; only admin may do anything."""
    require_kafka()
    config = {
        "listener.name.client.sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-256,SCRAM-SHA-512,OAUTHBEARER",
        "listener.name.client.oauthbearer.sasl.jaas.config": OAUTH,
    }
    with Kafka.start(security="sasl_plaintext", acls=True, config=config) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def encrypted() -> Iterator[Kafka]:
    require_kafka()
    with Kafka.start(security="tls") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def both() -> Iterator[Kafka]:
    require_kafka()
    with Kafka.start(security="sasl_ssl") as cluster:
        yield cluster


def url(cluster: Kafka, login: str = "", *more: str) -> str:
    return f"kafka://{login + '@' if login else ''}{cluster.bootstrap}?" + "&".join(more)


async def round_trip(app_url: str, prefix: str) -> App:
    """Publishes, handles, publishes from the handler, and reads as an operator."""
    service, seen = Service("billing"), []

    @service.on(OrderPlaced)
    async def take(order: OrderPlaced, ctx: Context) -> None:
        ctx.publish(OrderPaid(paid_id=order.order_id))

    @service.on(OrderPaid)
    async def note(paid: OrderPaid) -> None:
        seen.append(paid)

    whole = f"{app_url}&prefix={prefix}."
    app = App(service, broker=whole, topics=[Topic("order", partitions=1), Topic("paid", partitions=1)])
    async with serving(app):
        await app.publish(OrderPlaced(order_id="1"))
        await until(lambda: seen)

    def look() -> int:
        log = kafka_log(whole)
        try:
            return len(log.read("order", 0, 0, 10))
        finally:
            log.close()

    assert await asyncio.to_thread(look) == 1
    return app


@pytest.mark.parametrize("mechanism", ["", "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
async def test_login(
    guarded: Kafka, fresh_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mechanism: str
) -> None:
    a_store(monkeypatch, tmp_path)
    more = [f"sasl.mechanism={mechanism}"] if mechanism else []
    await round_trip(url(guarded, "admin:admin-secret", PLAINTEXT, *more), fresh_prefix)


async def test_login_by_token(
    guarded: Kafka, fresh_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Tokens of two seconds: each client must ask for new ones, also those that are rarely used."""
    a_store(monkeypatch, tmp_path)
    config = quote("principal=admin lifeSeconds=2")
    token = [
        "sasl.mechanism=OAUTHBEARER",
        "enable.sasl.oauthbearer.unsecure.jwt=true",
        f"sasl.oauthbearer.config={config}",
    ]
    await round_trip(url(guarded, "", PLAINTEXT, *token), fresh_prefix)
    async with App(broker=url(guarded, "", PLAINTEXT, *token, f"prefix={fresh_prefix}.")) as app:
        await app.publish(OrderPlaced(order_id="2"))
        await asyncio.sleep(3)
        (info,) = await app.broker.topics(["order"])
        assert sum(end - start for start, end in info.ranges) == 2
        await app.publish(OrderPlaced(order_id="3"))
        assert len(await app.broker.read("order", 0, 0, 10)) == 3
    oidc = parse(
        f"kafka://h?{PLAINTEXT}&sasl.mechanism=OAUTHBEARER&sasl.oauthbearer.method=oidc&sasl.oauthbearer.client.id=me"
        f"&sasl.oauthbearer.client.secret={CANARY}%2B/+&sasl.oauthbearer.token.endpoint.url=https://login.example/token"
    ).client()
    assert oidc["sasl.oauthbearer.client.secret"] == f"{CANARY}+/+"
    assert oidc["sasl.oauthbearer.token.endpoint.url"] == "https://login.example/token"
    with pytest.raises(UsageError) as refused:
        parse(f"kafka://h?{PLAINTEXT}&sasl.mechanism=OAUTHBEARER")
    assert refused.value.code == "UL1155" and "oidc" in refused.value.fix


async def test_encryption(
    encrypted: Kafka, both: Kafka, fresh_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_store(monkeypatch, tmp_path)
    own = encrypted.folder / "tls"
    ca, certificate = f"ssl.ca.location={own}/ca.pem", f"ssl.certificate.location={own}/alice.pem"
    await round_trip(url(encrypted, "", "security.protocol=SSL", ca), f"{fresh_prefix}.a")
    a_store(monkeypatch, tmp_path, "2.db")
    key = f"ssl.key.location={own}/alice.key"
    await round_trip(url(encrypted, "", "security.protocol=SSL", ca, certificate, key), f"{fresh_prefix}.b")
    a_store(monkeypatch, tmp_path, "3.db")  # a login without anything else means SASL_SSL and PLAIN
    await round_trip(url(both, "alice:alice-secret", f"ssl.ca.location={both.ca}"), fresh_prefix)


async def refused_by(app_url: str) -> tuple[UnlostError, float]:
    began = time.monotonic()
    with pytest.raises(UnlostError) as error:
        async with App(broker=app_url):
            pass
    return error.value, time.monotonic() - began


async def test_doors_that_do_not_fit(
    guarded: Kafka, encrypted: Kafka, kafka: Kafka, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_store(monkeypatch, tmp_path)
    ca = f"ssl.ca.location={encrypted.ca}"
    login = f"alice:{CANARY}"
    cases: dict[str, tuple[str, type[UnlostError], str, str]] = {
        "TLS to plaintext": (url(kafka, "", "security.protocol=SSL", ca), Unavailable, "UL2100", "speaks no TLS"),
        "TLS and a login to plaintext": (url(kafka, login, ca), Unavailable, "UL2100", "speaks no TLS"),
        "plaintext to TLS": (url(encrypted), Unavailable, "UL2100", "may speak TLS"),
        "another authority": (url(encrypted, "", "security.protocol=SSL"), Unavailable, "UL2100", "ssl.ca.location"),
        "no authority": (
            url(encrypted, "", "security.protocol=SSL", "ssl.ca.location=/nowhere/ca.pem"),
            UsageError, "UL1154", "lists them",
        ),
        "a login where none is": (url(kafka, login, PLAINTEXT), UsageError, "UL1146", "wants no login"),
        "no login": (url(guarded), Unavailable, "UL2100", "may want a login"),
        "wrong password": (url(guarded, login, PLAINTEXT), UsageError, "UL1146", "check user, password"),
        "wrong password, SCRAM": (
            url(guarded, login, PLAINTEXT, "sasl.mechanism=SCRAM-SHA-512"), UsageError, "UL1146", "check user, password",
        ),
        "unknown mechanism": (url(guarded, login, PLAINTEXT, "sasl.mechanism=RIDDLE"), UsageError, "UL1154", "lists"),
    }  # fmt: skip
    found = await asyncio.gather(*(refused_by(case[0]) for case in cases.values()))
    for (name, (_, kind, code, fix)), (error, seconds) in zip(cases.items(), found, strict=True):
        assert (type(error), error.code) == (kind, code), (name, str(error))
        assert fix in error.fix, (name, str(error))
        assert error.found and CANARY not in str(error), name
        assert seconds < 25, name


async def test_a_mechanism_that_the_cluster_does_not_know(
    both: Kafka, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_store(monkeypatch, tmp_path)
    ca = f"ssl.ca.location={both.ca}"
    token = [
        "sasl.mechanism=OAUTHBEARER",
        "enable.sasl.oauthbearer.unsecure.jwt=true",
        "sasl.oauthbearer.config=principal%3Da",
    ]
    error, _ = await refused_by(url(both, "", "security.protocol=SASL_SSL", ca, *token))
    assert error.code == "UL1146" and "SCRAM-SHA-512" in error.fix, str(error)


# --- rights


class Rights:
    def __init__(self, cluster: Kafka, user: str = "alice") -> None:
        self._admin = AdminClient({"bootstrap.servers": cluster.internal})
        self._user = user

    def grant(self, kind: Any, name: str, *operations: Any, exact: bool = False) -> None:
        pattern = ResourcePatternType.LITERAL if exact else ResourcePatternType.PREFIXED
        bindings = [
            AclBinding(kind, name, pattern, f"User:{self._user}", "*", operation, AclPermissionType.ALLOW)
            for operation in operations
        ]
        for future in self._admin.create_acls(bindings).values():
            future.result(10)


async def test_missing_rights_are_said_and_lose_nothing(
    guarded: Kafka, fresh_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    a_store(monkeypatch, tmp_path)
    rights, p = Rights(guarded), fresh_prefix
    service, got = Service("billing"), []

    @service.on(OrderPlaced)
    async def take(order: OrderPlaced, ctx: Context) -> None:
        ctx.publish(OrderPaid(paid_id=order.order_id))
        got.append(order.order_id)

    app_url = url(guarded, "alice:alice-secret", PLAINTEXT, f"prefix={p}.")

    async def refused(doing: str) -> None:
        """The service ends with the error, soon."""
        began = time.monotonic()
        with pytest.raises(UsageError) as error:
            async with serving(App(service, broker=app_url)) as task:
                await asyncio.wait([task], timeout=25)
        assert error.value.code == "UL1145" and doing in error.value.found, str(error.value)
        assert "grant" in error.value.fix and time.monotonic() - began < 20

    await refused(f"describing topic {p}.order")
    rights.grant(ResourceType.TOPIC, f"{p}.", AclOperation.DESCRIBE)
    await refused(f"creating topic {p}.order")
    make_topic(guarded, f"{p}.order", 2)
    await refused("Group authorization failed")
    rights.grant(ResourceType.GROUP, f"{p}.", AclOperation.READ)
    await refused("reading for billing")  # the topic
    rights.grant(ResourceType.TOPIC, f"{p}.", AclOperation.READ)
    caplog.clear()
    app = App(service, broker=app_url)
    async with serving(app):
        for _ in range(2):  # (a user who may write nowhere does not even get the number of a producer)
            began = time.monotonic()
            with pytest.raises(UsageError) as error:
                await app.publish(OrderPlaced(order_id="refused"))
            assert error.value.code == "UL1145" and "publishing" in error.value.found, str(error.value)
            assert time.monotonic() - began < 5
        rights.grant(ResourceType.TOPIC, f"{p}.order", AclOperation.WRITE, exact=True)
        await until(lambda: _published(app, "accepted"))
        await until(lambda: got == ["accepted"])
        waiting = "select count(*) from unlost_outbox"
        await until(lambda: "creating topic" in caplog.text)  # for what the handler published
        assert app.file.read(lambda c: c.execute(waiting).fetchone()[0]) == 1
        assert "UL1145" in caplog.text and caplog.text.count("cannot be read, so they are not checked") <= 2
        rights.grant(ResourceType.TOPIC, f"{p}.paid", AclOperation.WRITE, AclOperation.CREATE, exact=True)
        await until(lambda: app.file.read(lambda c: c.execute(waiting).fetchone()[0]) == 0)
    (paid,) = everything(guarded, f"{p}.paid", 1)
    assert paid.key() == b"accepted"


def _published(app: App, order_id: str) -> bool:
    """Rights take a moment to reach every part of a broker."""
    task: asyncio.Task[Any] | None = getattr(app, "_test_publish", None)
    if task is None or (task.done() and isinstance(task.exception(), UsageError)):
        task = asyncio.ensure_future(app.publish(OrderPlaced(order_id=order_id), id=order_id))
        app._test_publish = task  # type: ignore[attr-defined]
    return task.done() and task.exception() is None


async def test_settings_that_may_not_be_read(
    guarded: Kafka, fresh_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_store(monkeypatch, tmp_path)
    Rights(guarded).grant(ResourceType.TOPIC, f"{fresh_prefix}.", AclOperation.DESCRIBE)
    make_topic(guarded, f"{fresh_prefix}.order", 1)
    app = App(
        broker=url(guarded, "alice:alice-secret", PLAINTEXT, f"prefix={fresh_prefix}."),
        topics=[Topic("order", partitions=1, min_insync=2)],
    )
    with pytest.raises(UsageError) as error:
        async with app:
            pass
    assert error.value.code == "UL1104" and "DESCRIBE_CONFIGS" in error.value.fix


# --- secrets


URLS = [
    f"kafka://alice:{CANARY}@host:1,other:2?prefix=a.",
    f"kafka://alice:{CANARY}/x@host:1",
    f"kafka://alice:x/{CANARY}@host:1",
    f"kafka://alice:x?{CANARY}@host:1",
    f"kafka://alice:x#{CANARY}@host:1",
    f"kafka://alice:x@{CANARY}@host:1",
    f"kafka://al:{CANARY}:x@host:1?security.protocol=SASL_PLAINTEXT",
    f"kafka://host:1?security.protocol=SASL_PLAINTEXT&sasl.mechanism=PLAIN&sasl.username=a@b&sasl.password={CANARY}",
    f"kafka://host:1?security.protocol=SSL&ssl.key.pem={CANARY}",
    f"kafka://host:1?security.protocol=SSL&ssl.key.location=/k&ssl.key.password={CANARY}",
    f"kafka://host:1?security.protocol=SSL&ssl.keystore.location=/k&ssl.keystore.password={CANARY}",
    f"kafka://host:1?sasl.mechanism=OAUTHBEARER&sasl.oauthbearer.client.secret={CANARY}",
    f"kafka://host:1?sasl.mechanism=OAUTHBEARER&sasl.oauthbearer.config={CANARY}",
    f"kafka:/alice:{CANARY}@host:1",
    f"kafka+ssl://alice:{CANARY}@host:1",
    f"kafka://alice:{CANARY}@",
    f"kafka://alice:{CANARY}@host:port",
    f"kafka://alice:{CANARY}@host:1/topic",
]  # fmt: skip


@pytest.mark.parametrize("secret_url", URLS)
def test_no_part_of_a_secret_is_shown(secret_url: str) -> None:
    assert CANARY not in hide_secrets(f"broker {secret_url} it is")
    try:
        settings = parse(secret_url)
    except UnlostError as error:
        assert CANARY not in str(error) + repr(error)
        return
    assert CANARY not in repr(settings) + str(settings)
    (name,) = set(settings.options) & set(SECRETS)
    secret = settings.options[name]
    assert CANARY in secret and secret not in settings.without_secrets(f"the value {secret} is wrong")


def test_what_is_no_secret_stays_readable() -> None:
    for plain in (
        "kafka://h1:9092,h2:9093?prefix=a.",
        "kafka://h:9092?security.protocol=SASL_SSL&sasl.username=a@b",
        "kafka://h1:1,h2:2?sasl.username=a@b",
        "embedded:///var/shop/events.db",
    ):
        assert hide_secrets(plain) == plain
    assert hide_secrets("kafka://ann:12345@h:1?sasl.username=a@b") == "kafka://ann:***@h:1?sasl.username=a@b"


PROGRAM = """
import logging
from unlost import App, Event, Service

class OrderPlaced(Event, key="order_id"):
    order_id: str

billing = Service("billing")

@billing.on(OrderPlaced)
async def charge(order: OrderPlaced) -> None:
    raise RuntimeError("as it happens")

app = App(billing)
"""


def test_the_canary_stays_silent(guarded: Kafka, fresh_prefix: str, tmp_path: Path) -> None:
    """Whole programs, with everything that is printed, on good days and bad ones."""
    (tmp_path / "shop.py").write_text(PROGRAM)
    (tmp_path / "pyproject.toml").write_text("[tool.unlost]\n")
    secret = tmp_path / "broker-url"
    rights = Rights(guarded)
    rights.grant(ResourceType.TOPIC, f"{fresh_prefix}.", AclOperation.ALL)
    rights.grant(ResourceType.GROUP, f"{fresh_prefix}.", AclOperation.ALL)
    env = dict(
        os.environ, UNLOST_BROKER_FILE=str(secret), UNLOST_LOG="debug", UNLOST_DEBUG="1",
        UNLOST_STORE=f"embedded://{tmp_path}/store.db",
    )  # fmt: skip
    env.pop("UNLOST_BROKER", None)

    def cli(*arguments: str, code: int | None = 0, seconds: float = 40) -> str:
        command = [sys.executable, "-m", "unlost", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=seconds)
        assert code is None or done.returncode == code, (arguments, done.stdout, done.stderr)
        return done.stdout + done.stderr

    wrong = url(guarded, f"alice:{CANARY}", PLAINTEXT, f"prefix={fresh_prefix}.")
    secret.write_text(wrong + "\n")
    said = cli("config") + cli("config", "--json")
    assert "alice:***@" in said and "UNLOST_BROKER_FILE" in said
    said += cli("run", "shop", code=2)
    assert "UL1146" in said
    said += cli("publish", "order.OrderPlaced", "order_id=1", "--app", "shop", "--json", code=2)
    secret.write_text(f"kafka://alice:{CANARY}?x@{guarded.bootstrap}")
    said += cli("run", "shop", code=2) + cli("config")
    secret.write_text(f"kafka://{guarded.bootstrap}?security.protocol=SASL_SSL&ssl.key.pem={CANARY}")
    said += cli("run", "shop", code=2)
    assert CANARY not in said and "Traceback" not in said

    (tmp_path / "store.db").unlink(missing_ok=True)
    right = url(
        guarded, "alice:alice-secret", PLAINTEXT, f"prefix={fresh_prefix}.", "debug=security,conf", "log_level=7"
    )
    secret.write_text(right)
    said = cli("publish", "order.OrderPlaced", "order_id=1", "--app", "shop")
    printed = tmp_path / "printed"
    with printed.open("w") as out_file:
        running = subprocess.Popen(
            [sys.executable, "-m", "unlost", "run", "shop"],
            cwd=tmp_path, env=env, stdout=out_file, stderr=subprocess.STDOUT,
        )  # fmt: skip
    end = time.monotonic() + 30
    while "as it happens" not in printed.read_text() and time.monotonic() < end:
        time.sleep(0.1)
    running.terminate()
    running.wait(30)
    out = printed.read_text()
    assert "RuntimeError: as it happens" in out and "alice:***@" in out
    assert "alice-secret" not in said + out


async def test_objects_and_logs_keep_the_secret(
    guarded: Kafka, fresh_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    a_store(monkeypatch, tmp_path)
    app = await round_trip(url(guarded, "admin:admin-secret", PLAINTEXT), fresh_prefix)
    async with app:
        broker: Any = app.broker
        texts = [
            repr(app),
            repr(broker),
            broker.identity,
            repr(broker.settings),
            repr(app.store),
            repr(broker.abilities),
        ]
    assert "admin-secret" not in caplog.text + " ".join(texts)
