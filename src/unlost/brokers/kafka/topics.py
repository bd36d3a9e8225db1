"""What the cluster says of its topics; making those that are missing. Blocking calls: run them in a thread."""

from __future__ import annotations

import contextlib
import logging
import re
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from confluent_kafka import (
    Consumer,
    IsolationLevel,
    KafkaError,
    KafkaException,
    Producer,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, ClusterMetadata, ConfigResource, NewTopic, OffsetSpec, ResourceType

from unlost.brokers.kafka.refusals import sorted_error
from unlost.brokers.kafka.settings import CONNECT_SECONDS, MESSAGE_BYTES_MAX, Settings
from unlost.brokers.port import Survives
from unlost.config import duration
from unlost.errors import OutcomeUnknown, Unavailable, UnlostError, UsageError
from unlost.events import check_name
from unlost.events.topic import Topic, TopicInfo
from unlost.world import REAL

log = logging.getLogger("unlost.kafka")
T = TypeVar("T")

PARTITIONS_MAX = 1024
ADMIN_SECONDS = 20.0
HOPELESS_SECONDS = 2.0
VISIBLE_SECONDS = 10.0  # how long a topic that was just made may take to be seen everywhere
ERRORS_MAX = 100  # that are remembered
ALOUD_SECONDS = 3
_FOREVER = 9_223_372_036_854_775_807
_COUNTS = re.compile(r"\d+/\d+ brokers are down|All broker|^Local: All")  # says nothing about why
_HOPELESS = re.compile(r"SASL authentication|SASL \S+ mechanism|SSL handshake failed|certificate")
_HTTP = str(int.from_bytes(b"HTTP", "big"))  # its first bytes, read as the length of an answer


class Described(msgspec.Struct, frozen=True, kw_only=True):
    """A topic as the cluster describes it, under its own full name there."""

    name: str
    id: str
    partitions: int
    replication: int
    config: dict[str, str]

    @property
    def min_insync(self) -> int:
        return int(self.config.get("min.insync.replicas", 1))

    @property
    def bytes_max(self) -> int:
        return int(self.config.get("max.message.bytes", 1_048_588))

    @property
    def retention(self) -> float | None:
        """Seconds; None: everything is kept (but for a limit in bytes)."""
        millis = int(self.config.get("retention.ms", -1)) if self.deletes else -1
        return None if millis < 0 or millis == _FOREVER else millis / 1000

    @property
    def limited_in_bytes(self) -> bool:
        return int(self.config.get("retention.bytes", -1)) >= 0

    @property
    def compacted(self) -> bool:
        return "compact" in self.config.get("cleanup.policy", "delete")

    @property
    def deletes(self) -> bool:
        return "delete" in self.config.get("cleanup.policy", "delete")

    @property
    def survives(self) -> Survives:
        """What an acknowledgement of all in-sync replicas outlives. Kafka does not fsync before it, unless told to."""
        flushed = int(self.config.get("flush.messages", _FOREVER)) == 1
        unclean = self.config.get("unclean.leader.election.enable", "false") == "true"
        copies = min(self.replication, self.min_insync)
        if flushed and copies >= 2 and not unclean:
            return "power loss of all machines"
        if flushed or (copies >= 2 and not unclean):
            return "power loss of one machine"
        return "process death"


class Cluster:
    """The cluster's administration. Names here are those of the cluster, with the prefix."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._errors: deque[str] = deque(maxlen=ERRORS_MAX)
        try:
            self._admin = AdminClient(settings.client(error_cb=lambda e: self._errors.append(e.str())))
        except KafkaException as e:
            raise _wrong_settings(settings, e) from None
        self._unreadable: set[str] = set()
        self.id = ""
        self.brokers = 0

    @property
    def admin(self) -> AdminClient:
        self._admin.poll(0)  # what waits for this client: a login that needs a new token, or errors
        return self._admin

    def connect(self, seconds: float = CONNECT_SECONDS) -> ClusterMetadata:
        """Finds the cluster; returns what it told then.

        Raises:
            Unavailable: nobody answers there, with the reason as far as it is known.
        """
        self._check_settings()
        end = REAL.monotonic() + seconds
        while True:
            try:
                metadata = self.admin.list_topics(timeout=1.0)
                break
            except KafkaException as e:
                self._admin.poll(0)  # for the reasons: they come by callback
                if REAL.monotonic() > end or (self._hopeless() and REAL.monotonic() > end - seconds + HOPELESS_SECONDS):
                    raise self._unreachable(e) from None
        self.brokers = len(metadata.brokers)
        self.id = metadata.cluster_id or ""
        return metadata

    def names(self, told: ClusterMetadata | None = None) -> list[str]:
        """Every topic under our prefix but the cluster's own; as it is now, or was told before."""
        metadata = told or self._call(lambda: self.admin.list_topics(timeout=ADMIN_SECONDS))
        prefix = self.settings.prefix
        return sorted(n for n in metadata.topics if n.startswith(prefix) and not n.startswith("__"))

    def describe(self, names: Collection[str]) -> dict[str, Described]:
        """Those of these topics that exist."""
        if not names:
            return {}

        def ask() -> dict[str, Any]:
            told = self.admin.describe_topics(TopicCollection(sorted(names)), request_timeout=ADMIN_SECONDS)
            found: dict[str, Any] = {}
            for name, future in told.items():
                try:
                    found[name] = self._wait(future)
                except KafkaException as e:
                    if e.args[0].name() not in ("UNKNOWN_TOPIC_OR_PART", "UNKNOWN_TOPIC_OR_PARTITION", "UNKNOWN_TOPIC"):
                        raise
            return found

        topics = self._patiently(ask, f"describing topic {', '.join(sorted(names))}")
        if not topics:
            return {}
        configs = self.config(ResourceType.TOPIC, topics)
        return {
            name: Described(
                name=name, id=str(t.topic_id), partitions=len(t.partitions),
                replication=min((len(p.replicas) for p in t.partitions), default=0), config=configs.get(name, {}),
            )
            for name, t in topics.items()
        }  # fmt: skip

    def config(self, kind: Any, names: Iterable[str]) -> dict[str, dict[str, str]]:
        """Settings of topics or brokers; empty for those that we may not read."""
        asked = self.admin.describe_configs(
            [ConfigResource(kind, name) for name in names], request_timeout=ADMIN_SECONDS
        )
        found: dict[str, dict[str, str]] = {}
        for resource, future in asked.items():
            try:
                entries = self._wait(future)
            except KafkaException as e:
                if resource.name not in self._unreadable:  # once is enough
                    self._unreadable.add(resource.name)
                    log.warning(
                        "the settings of %s cannot be read, so they are not checked (grant DESCRIBE_CONFIGS): %s",
                        resource.name, e.args[0].str(),
                    )  # fmt: skip
                continue
            found[resource.name] = {name: entry.value for name, entry in entries.items() if entry.value is not None}
        return found

    def ranges(self, topics: Iterable[Described]) -> dict[str, list[tuple[int, int]]]:
        """Per partition the first position and that after the last."""
        chosen = list(topics)
        places = [TopicPartition(t.name, p) for t in chosen for p in range(t.partitions)]
        first = self.offsets(places, OffsetSpec.earliest())
        last = self.offsets(places, OffsetSpec.latest())
        return {
            t.name: [(first[t.name, p], last[t.name, p]) for p in range(t.partitions)] for t in chosen
        }  # fmt: skip

    def offsets(self, places: Sequence[TopicPartition], spec: Any) -> dict[tuple[str, int], int]:
        return {place: offset for place, (offset, _) in self.looked_up(places, spec).items()}

    def looked_up(self, places: Sequence[TopicPartition], spec: Any) -> dict[tuple[str, int], tuple[int, int]]:
        """Per partition the position that was asked for, and the time of its event (milliseconds; -1: not said)."""
        if not places:
            return {}

        def ask() -> dict[tuple[str, int], tuple[int, int]]:
            asked = self.admin.list_offsets(
                dict.fromkeys(places, spec),
                isolation_level=IsolationLevel.READ_COMMITTED,
                request_timeout=ADMIN_SECONDS,
            )
            found = {(place.topic, place.partition): self._wait(f) for place, f in asked.items()}
            return {place: (info.offset, info.timestamp) for place, info in found.items()}

        return self._patiently(ask, "looking up positions")

    def create(self, topics: Sequence[Topic]) -> dict[str, Described]:
        """Makes topics that are missing; one that somebody else makes at the same time is as good. Returns them all."""
        prefix = self.settings.prefix
        wanted = []
        for topic in topics:
            replication = topic.replication or min(3, self.brokers)
            insync = topic.min_insync or (2 if replication >= 3 else 1)
            if insync > replication:
                raise UsageError(
                    "UL1104", f"the topic {topic.name!r} is declared with min_insync={insync}",
                    found=f"it gets {replication} copies, so nothing could ever be published",
                    fix="declare as many replicas, or more",
                )  # fmt: skip
            kept = -1 if topic.retention is None else int(duration(topic.retention) * 1000)
            wanted.append(
                NewTopic(
                    prefix + topic.name, num_partitions=topic.partitions, replication_factor=replication,
                    config={
                        "min.insync.replicas": str(insync),
                        "retention.ms": str(kept),
                        "retention.bytes": "-1",
                        "cleanup.policy": "delete",
                        "unclean.leader.election.enable": "false",
                        "max.message.bytes": str(MESSAGE_BYTES_MAX),
                    },
                )
            )  # fmt: skip
        return self.make(wanted)

    def make(self, wanted: Sequence[NewTopic]) -> dict[str, Described]:
        for name, future in self.admin.create_topics(list(wanted), request_timeout=ADMIN_SECONDS).items():
            try:
                self._wait(future)
            except KafkaException as e:
                if e.args[0].name() != "TOPIC_ALREADY_EXISTS":
                    raise sorted_error(e, f"creating topic {name}") from None
        return self._when_visible({topic.topic for topic in wanted})

    def _when_visible(self, names: set[str]) -> dict[str, Described]:
        """A new topic reaches each broker a moment later, so the next that is asked may know less than the last."""
        end = REAL.monotonic() + VISIBLE_SECONDS
        seen: dict[str, Described] = {}
        while True:
            seen |= self.describe(names - seen.keys())
            if seen.keys() == names:
                return seen
            if REAL.monotonic() > end:
                raise Unavailable(
                    "UL2110", "a topic that was just made cannot be seen yet", found=", ".join(sorted(names - seen.keys())),
                )  # fmt: skip
            REAL.pause(0.05)

    def _wait(self, future: Future[T]) -> T:
        try:
            return future.result(ADMIN_SECONDS + 5)
        except TimeoutError:
            raise OutcomeUnknown(
                "UL2120",
                "nobody can say whether the Kafka cluster did that",
                found="no answer of the client",
                fix="do it again",
            ) from None

    def _call(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except KafkaException as e:
            self._admin.poll(0)
            raise self._unreachable(e) from None

    def _patiently(self, work: Callable[[], T], what: str) -> T:
        """Again while a partition has no leader for the moment, or a connection is cut. For what only asks."""
        end = REAL.monotonic() + ADMIN_SECONDS
        while True:
            try:
                return work()
            except KafkaException as e:
                error = e.args[0]
                if not (error.retriable() or error.name() in ("NOT_LEADER_FOR_PARTITION", "LEADER_NOT_AVAILABLE",
                        "UNKNOWN_TOPIC_OR_PART", "UNKNOWN_LEADER_EPOCH", "FENCED_LEADER_EPOCH", "OFFSET_NOT_AVAILABLE",
                        "_TIMED_OUT", "_TRANSPORT", "_NOENT")) or REAL.monotonic() > end:  # fmt: skip
                    raise sorted_error(e, what) from None
                REAL.pause(0.1)

    def _check_settings(self) -> None:
        """Makes the other kinds of clients once: what one of them would not take is better said now.

        Raises:
            UsageError: it does not.
        """
        try:
            Producer(self.settings.producer(error_cb=_ignore))
            Consumer(self.settings.consumer("unlost-check", error_cb=_ignore)).close()
        except KafkaException as e:
            raise _wrong_settings(self.settings, e) from None

    def _hopeless(self) -> bool:
        """Whether waiting longer is no use: the login or the encryption is wrong."""
        return any(_HOPELESS.search(text) for text in self._errors)

    def _unreachable(self, e: KafkaException) -> UnlostError:
        """What is wrong, as far as the client says it, and what to do."""
        telling = [text for text in self._errors if not _COUNTS.search(text)]
        cause = telling[0] if telling else self._asked_aloud() or e.args[0].str()
        cause = self.settings.without_secrets(cause)
        low = cause.lower()
        where = self.settings.bootstrap
        if re.search(r"SASL authentication|SASL \S+ mechanism", cause):
            named = re.search(r"supported mechanisms: *([A-Z0-9_, -]*)", cause)
            if named is None:
                fix = "check user, password and sasl.mechanism in the broker's URL"
            elif named[1].strip():
                fix = f"the cluster takes one of these: sasl.mechanism={named[1].strip()}"
            else:
                fix = "this server wants no login: leave user and password out of the URL"
            return UsageError("UL1146", f"the Kafka cluster at {where} refused the login", found=cause, fix=fix)
        if "plaintext broker listener" in low or ("ssl_handshake" in low and "disconnected" in low):
            fix = "this server speaks no TLS: security.protocol is PLAINTEXT there, or SASL_PLAINTEXT with a login"
        elif "certificate" in low:
            fix = "ssl.ca.location in the URL names the file with the certificate of the authority that signed the server's"
        elif "ssl handshake" in low:
            fix = "check security.protocol and the ssl settings in the URL"
        elif "refused" in low:
            fix = "is the cluster running, and is this its port?"
        elif "resolve" in low:
            fix = "check the name of the server"
        elif "invalid response size" in low:
            fix = "something else than Kafka answers there; check the port" + (
                " (it speaks HTTP)" if _HTTP in low else ""
            )
        elif "in state up" in low:
            fix = "the server ends the connection: it may want a login (kafka://user:password@… and security.protocol)"
        elif "disconnected" in low:
            fix = "it may speak TLS: security.protocol is SSL there, or SASL_SSL with a login. Else: is it a Kafka server?"
        elif "timed out" in low:
            fix = "it takes the connection and does not answer: is that the port of a Kafka server, and is it well?"
        else:
            fix = "check the URL: kafka://host:9092"
        return Unavailable("UL2100", f"no Kafka cluster answers at {where}", found=cause, fix=fix)

    def _asked_aloud(self) -> str:
        """Some reasons the client only logs: so it is asked once more, with somebody who listens."""
        told = _Told()
        quick = {"api.version.request.timeout.ms": ALOUD_SECONDS * 1000 // 2}
        client = AdminClient(self.settings.client(logger=told.logger, log_level=6, error_cb=_ignore, **quick))
        with contextlib.suppress(KafkaException):
            client.list_topics(timeout=ALOUD_SECONDS)
        client.poll(0)
        return told.reason


class _Told(logging.Handler):
    """Keeps the first reason that a client logs for not being connected."""

    def __init__(self) -> None:
        super().__init__()
        self.reason = ""
        self.logger = logging.Logger("unlost.kafka.aloud", logging.INFO)
        self.logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        kind, _, text = record.getMessage().partition(" ")
        if kind == "FAIL" and not self.reason:
            self.reason = text.partition("]: ")[2] or text


def _ignore(error: KafkaError) -> None:
    """The other client says it."""


def _wrong_settings(settings: Settings, e: KafkaException) -> UsageError:
    files = {name: value for name, value in settings.options.items() if name.endswith(".location")}
    missing = [f"{name}: there is no {value}" for name, value in files.items() if not Path(value).exists()]
    return UsageError(
        "UL1154", "the Kafka client does not take the settings of the URL",
        found=", ".join(missing) or settings.without_secrets(e.args[0].str()),
        fix="https://github.com/confluentinc/librdkafka/blob/master/CONFIGURATION.md lists them",
    )  # fmt: skip


def identity_of(cluster: Cluster) -> str:
    return f"kafka {cluster.id} {cluster.settings.prefix}".strip()


def check_declared(topics: Sequence[Topic]) -> None:
    """What no cluster could give. Raises `UsageError`."""
    for topic in topics:
        check_name("topic", topic.name)
        if not 1 <= topic.partitions <= PARTITIONS_MAX:
            raise UsageError(
                "UL1102", f"the topic {topic.name!r} needs between 1 and {PARTITIONS_MAX} partitions",
                found=str(topic.partitions),
            )  # fmt: skip


def check_against(topic: Topic, there: Described) -> None:
    """Whether a topic that exists is what was declared. Nothing is changed behind anybody's back.

    Raises:
        UsageError: other partitions, or fewer copies than were declared.
    """
    if there.partitions != topic.partitions:
        raise UsageError(
            "UL1103", f"the topic {topic.name!r} has {there.partitions} partitions on the cluster",
            found=f"declared are {topic.partitions}",
            fix=f"declare {there.partitions}: with another number the keys would move to other partitions and lose their order",
        )  # fmt: skip
    for what, declared, found in (
        ("replication", topic.replication, there.replication),
        ("min_insync", topic.min_insync, there.min_insync),
    ):
        if declared is not None and found < declared:
            if what == "min_insync" and not there.config:
                raise UsageError(
                    "UL1104", f"the topic {topic.name!r} is declared with min_insync={declared}",
                    found="this user may not read the topic's settings", fix="grant DESCRIBE_CONFIGS on the topic",
                )  # fmt: skip
            raise UsageError(
                "UL1104", f"the topic {topic.name!r} is declared with {what}={declared}", found=f"the cluster has {found}",
                fix="raise it on the cluster (unlost changes no topic that exists), or declare what there is",
            )  # fmt: skip
    declared_retention = None if topic.retention is None else duration(topic.retention)
    if declared_retention is not None and there.config and there.retention != declared_retention:
        kept = "everything" if there.retention is None else f"{there.retention:g} s"
        log.warning(
            "UL1105: the topic %r is declared with a retention of %g s; the cluster keeps %s, and that stays so",
            topic.name, declared_retention, kept,
        )  # fmt: skip


def info_of(name: str, there: Described, ranges: Sequence[tuple[int, int]]) -> TopicInfo:
    return TopicInfo(
        name=name, id=there.id, partitions=there.partitions, ranges=ranges, retention=there.retention,
        replication=there.replication, min_insync=there.min_insync, survives=there.survives,
    )  # fmt: skip
