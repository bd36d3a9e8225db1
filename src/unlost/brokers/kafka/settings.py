"""What a `kafka://` URL means, and the client settings on which the guarantees rest."""

from __future__ import annotations

import logging
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec

from unlost.errors import UsageError
from unlost.events import MAX_EVENT_BYTES, MAX_HEAD_BYTES, check_name

LOG = logging.getLogger("unlost.kafka.client")
MESSAGE_BYTES_MAX = MAX_EVENT_BYTES + 2 * MAX_HEAD_BYTES  # value, attributes and headers of one event
CONNECT_SECONDS = 10.0
SECRETS = ("sasl.password", "ssl.key.password", "ssl.keystore.password", "ssl.key.pem", "sasl.oauthbearer.client.secret",
           "sasl.oauthbearer.config", "sasl.oauthbearer.assertion.private.key.passphrase",
           "sasl.oauthbearer.assertion.private.key.pem")  # fmt: skip

# Settings that carry a promise. Another value in the URL is refused, not overridden in silence.
OURS: dict[str, Any] = {
    "enable.auto.commit": False,
    "enable.auto.offset.store": False,
    "auto.offset.reset": "error",
    "check.crcs": True,
    "enable.idempotence": True,
    "acks": "all",
    "message.timeout.ms": 0,
    "enable.partition.eof": True,
    "isolation.level": "read_committed",
    "partition.assignment.strategy": "cooperative-sticky",
    "allow.auto.create.topics": False,
    "enable.gapless.guarantee": False,
}
_OTHER_NAMES = {"request.required.acks": "acks", "delivery.timeout.ms": "message.timeout.ms"}
_REFUSED = ("transactional.id", "group.id", "group.instance.id", "bootstrap.servers", "metadata.broker.list", "max.in.flight",
            "max.in.flight.requests.per.connection", "retries", "message.send.max.retries", "partitioner")  # fmt: skip
_CONSUMER_ONLY = {"session.timeout.ms", "heartbeat.interval.ms", "group.protocol",
                  "group.remote.assignor", "max.poll.interval.ms", "fetch.wait.max.ms", "fetch.min.bytes",
                  "fetch.max.bytes", "queued.min.messages", "queued.max.messages.kbytes",
                  "max.partition.fetch.bytes", "fetch.message.max.bytes", "fetch.error.backoff.ms", "fetch.queue.backoff.ms"}  # fmt: skip
_PRODUCER_ONLY = {"linger.ms", "queue.buffering.max.ms", "batch.size", "batch.num.messages", "compression.type",
                  "compression.codec", "compression.level", "queue.buffering.max.messages",
                  "queue.buffering.max.kbytes", "sticky.partitioning.linger.ms"}  # fmt: skip

EXAMPLE = "kafka://host:9092,host2:9092?prefix=staging."


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """A cluster as a URL names it. `prefix` goes before every topic and group, so that environments may share one."""

    bootstrap: str
    prefix: str = ""
    consumer_protocol: bool = False  # KIP-848: the cluster assigns partitions
    options: dict[str, str] = {}

    def __repr__(self) -> str:  # never a secret
        return f"Settings({self.bootstrap!r}, prefix={self.prefix!r}, options: {', '.join(sorted(self.options)) or 'none'})"

    def without_secrets(self, text: str) -> str:
        """What the client says, as it may be shown: it quotes settings that it does not take."""
        for name in SECRETS:
            value = self.options.get(name)
            if value:
                text = text.replace(value, "***")
        return text

    def client(self, **more: Any) -> dict[str, Any]:
        """For an admin client, and the base of the others."""
        shared = {k: v for k, v in self.options.items() if k not in _CONSUMER_ONLY and k not in _PRODUCER_ONLY}
        return {
            "bootstrap.servers": self.bootstrap,
            "client.id": "unlost",
            "log_level": 0,  # what matters comes through callbacks
            "logger": LOG,  # and nothing by itself to stderr
            "socket.keepalive.enable": True,
            "broker.address.family": "any",
            "reconnect.backoff.max.ms": 2000,
            "retry.backoff.max.ms": 1000,
            **shared,
            **more,
        }

    def producer(self, **more: Any) -> dict[str, Any]:
        chosen = {k: v for k, v in self.options.items() if k in _PRODUCER_ONLY}
        return self.client(
            **{
                "enable.idempotence": True,
                "acks": "all",
                "message.timeout.ms": 0,  # nothing that is queued ever times out in silence
                "linger.ms": 0,  # while a request is under way the next batch fills by itself
                "message.max.bytes": MESSAGE_BYTES_MAX + 1024 * 1024,
                "queue.buffering.max.messages": 500_000,
                "queue.buffering.max.kbytes": 512 * 1024,
                **chosen,
                **more,
            }
        )

    def consumer(self, group: str, **more: Any) -> dict[str, Any]:
        chosen = {k: v for k, v in self.options.items() if k in _CONSUMER_ONLY}
        classic: dict[str, Any] = {
            "session.timeout.ms": 10_000,
            "heartbeat.interval.ms": 1_000,
            "partition.assignment.strategy": "cooperative-sticky",
        }
        return self.client(
            **{
                "group.id": group,
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "auto.offset.reset": "error",
                "enable.partition.eof": True,
                "check.crcs": True,
                "isolation.level": "read_committed",
                "allow.auto.create.topics": False,
                "fetch.message.max.bytes": 1024 * 1024,  # of one partition in one answer; a larger event comes alone
                "queued.min.messages": 2000,
                "fetch.queue.backoff.ms": 10,
                "fetch.wait.max.ms": 100,
                "queued.max.messages.kbytes": 32_768,
                **({"group.protocol": "consumer"} if self.consumer_protocol else classic),
                **chosen,
                **more,
            }
        )


def parse(url: str) -> Settings:
    """Reads a URL such as `kafka://user:secret@host:9092,host2:9092?prefix=staging.&security.protocol=SASL_SSL`.

    Every other parameter is a setting of librdkafka, taken as it is.

    Raises:
        UsageError: it is no such URL, or it sets what a promise rests on.
    """
    scheme, _, rest = url.partition("://")
    authority, _, query = rest.partition("?")
    authority = authority.partition("#")[0].rstrip("/")
    login, _, hosts = authority.rpartition("@")
    if scheme != "kafka" or not hosts or "/" in hosts:
        raise UsageError("UL1142", "the URL of a Kafka cluster names its servers", fix=EXAMPLE)
    if not login and ":" in hosts and "@" in rest and not _is_server(hosts.split(",")[0]):
        raise UsageError(
            "UL1142", "the URL has a user, and then something that ends it too early",
            fix="write special characters of a password in their coded form: ? is %3F, # is %23, / is %2F, @ is %40, % is %25",
        )  # fmt: skip
    servers = [_server(host) for host in hosts.split(",")]
    options = dict(_pairs(query))
    prefix = options.pop("prefix", "")
    if prefix:
        check_name("topic", prefix.rstrip(".") or ".")
    if login:
        user, _, password = login.partition(":")
        options.setdefault("sasl.username", unquote(user))
        options.setdefault("sasl.password", unquote(password))
        options.setdefault("sasl.mechanism", options.pop("sasl.mechanisms", "PLAIN"))
        options.setdefault("security.protocol", "SASL_SSL")
    _check_tokens(options)
    protocol = options.get("group.protocol", "classic").lower()
    if protocol not in ("classic", "consumer"):
        raise UsageError(
            "UL1144",
            "group.protocol is classic or consumer",
            found=protocol,
            fix="leave it out: classic works everywhere",
        )
    if protocol == "consumer":
        for name in ("session.timeout.ms", "heartbeat.interval.ms"):
            if name in options:
                raise UsageError(
                    "UL1144", f"with group.protocol=consumer the cluster decides on {name}",
                    fix=f"leave {name} out of the URL; the cluster has group.consumer.{name}",
                )  # fmt: skip
    return Settings(
        bootstrap=",".join(servers), prefix=prefix, consumer_protocol=protocol == "consumer", options=options
    )


def _check_tokens(options: dict[str, str]) -> None:
    """Without a source of tokens the client would wait for one for ever."""
    if options.get("sasl.mechanism", options.get("sasl.mechanisms", "")).upper() != "OAUTHBEARER":
        return
    if options.get("sasl.oauthbearer.method", "").lower() == "oidc":
        return
    if options.get("enable.sasl.oauthbearer.unsecure.jwt", "").lower() not in ("true", "1"):
        raise UsageError(
            "UL1155", "sasl.mechanism=OAUTHBEARER must know where its tokens come from",
            fix="sasl.oauthbearer.method=oidc, with sasl.oauthbearer.client.id, sasl.oauthbearer.client.secret and "
            "sasl.oauthbearer.token.endpoint.url",
        )  # fmt: skip


def _pairs(query: str) -> list[tuple[str, str]]:
    pairs = []
    for name, value in parse_qsl(query.replace("+", "%2B"), keep_blank_values=True):  # a plus in a secret is a plus
        known = _OTHER_NAMES.get(name, name)
        if name in _REFUSED:
            raise UsageError(
                "UL1143", f"{name} is not yours to set: a promise rests on it", fix="leave it out of the URL"
            )
        if known in OURS and str(OURS[known]).lower() != value.lower() and not (known == "acks" and value == "-1"):
            raise UsageError(
                "UL1143", f"{name} is {str(OURS[known]).lower()} here: a promise rests on it", found=f"{name}={value}",
                fix="leave it out of the URL",
            )  # fmt: skip
        if known not in OURS:
            pairs.append((name, value))
    return pairs


def _server(text: str) -> str:
    if not _is_server(text):
        host = text.partition(":")[0]  # what follows may be part of a password
        raise UsageError("UL1142", "a server is host:port", found=repr(host)[:100] + " and no port", fix=EXAMPLE)
    parts = urlsplit(f"//{text}")
    host = parts.hostname or ""
    return f"{f'[{host}]' if ':' in host else host}:{parts.port or 9092}"


def _is_server(text: str) -> bool:
    try:
        parts = urlsplit(f"//{text}")
        return bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False
