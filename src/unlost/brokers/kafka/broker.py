"""The Kafka broker: the distributed engine of the same port.

**Guarantee** a published event has been taken by all in-sync replicas; what that survives follows from the topic's
replication and is shown (`TopicInfo.survives`). Nothing here rests on Kafka's transactions.
**After a crash** of a process its partitions are others' when the group's session times out; the store says from
where they go on, and fences the one that comes back.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Collection, Sequence

from confluent_kafka import KafkaException

from unlost.brokers.kafka.log import KafkaLog
from unlost.brokers.kafka.member import KafkaMember
from unlost.brokers.kafka.publisher import Call, Publisher, Sent
from unlost.brokers.kafka.refusals import sorted_error
from unlost.brokers.kafka.settings import Settings
from unlost.brokers.kafka.topics import Cluster, Described, check_against, check_declared, identity_of, info_of
from unlost.brokers.kafka.wire import headers_of, original_headers, reread
from unlost.brokers.port import SURVIVES_ORDER, Abilities, Original, Receipt, Survives
from unlost.errors import UnlostError, UsageError
from unlost.events import MAX_EVENT_BYTES, Envelope, partition_of
from unlost.events.topic import Arrival, Decoder, Topic, TopicInfo, Unit

BATCH_BYTES = 1_000_000  # librdkafka's own limit for a batch
HEADER_BYTES = 16  # what a header costs beside its text, at most
SESSION_SECONDS = 10.0


class KafkaBroker:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.cluster = Cluster(settings)
        self._publisher: Publisher | None = None
        self._narrow: dict[int, Publisher] = {}  # by their largest batch
        self._low: dict[str, int] = {}  # topics that take no batch of the usual size
        self._starting = threading.Lock()
        self._reading = threading.Lock()  # another one: who publishes waits for no read
        self._known: dict[str, Described] = {}  # by our names
        self._decoders: dict[str, Decoder] = {}
        self._retained: dict[str, bool] = {}  # topics of which this App has declared how long they are kept
        self._declared: set[str] = set()
        self._turn = itertools.count()
        self._log: KafkaLog | None = None
        self._mirroring = asyncio.Lock()
        self._closed = False

    # --- the port ----------------------------------------------------------------------------------------

    @property
    def abilities(self) -> Abilities:
        levels = [self._known[name].survives for name in self._declared if name in self._known]
        survives: Survives = min(levels, key=SURVIVES_ORDER.index, default="process death")
        session = float(self.settings.options.get("session.timeout.ms", SESSION_SECONDS * 1000)) / 1000
        if self.settings.consumer_protocol:
            session = 45.0
        return Abilities(
            name="kafka", survives=survives, ordered=True, replayable=True, delayed=False, atomic_batches=False,
            commits_with_store=False, death_seconds=session + 8, leave_seconds=8.0,
        )  # fmt: skip

    @property
    def identity(self) -> str:
        return identity_of(self.cluster)

    async def open(self) -> None:
        try:
            await asyncio.to_thread(self.cluster.connect)
        except KafkaException as e:
            raise sorted_error(e, "connecting") from None

    async def close(self) -> None:
        self._closed = True
        for publisher in (self._publisher, *self._narrow.values()):
            if publisher is not None:
                await asyncio.to_thread(publisher.close)
        if self._log is not None:
            await asyncio.to_thread(self._log.close)
            self._log = None

    async def declare(self, topics: Sequence[Topic]) -> Sequence[TopicInfo]:
        check_declared(topics)
        return await asyncio.to_thread(self._declare, topics)

    async def publish(self, envelopes: Sequence[Envelope]) -> Sequence[Receipt]:
        if not envelopes:
            return []
        known = self._known
        if any(e.topic not in known for e in envelopes):
            missing = {e.topic for e in envelopes} - known.keys()
            for e in envelopes:
                headers_of(e)  # a batch that is refused makes no topic
            await asyncio.to_thread(self._find_or_make, sorted(missing))
        publisher = self._publisher or self._start_publisher()
        call = Call(asyncio.get_running_loop(), len(envelopes))
        if not self._low:
            publisher.send(call, [self._sent(publisher, call, place, e) for place, e in enumerate(envelopes)])
            return await call.future
        groups: dict[Publisher, list[Sent]] = {}
        for place, e in enumerate(envelopes):
            publisher = self._publisher_for(e.topic)
            groups.setdefault(publisher, []).append(self._sent(publisher, call, place, e))
        for publisher, events in groups.items():
            publisher.send_or_refuse(call, events)
        return await call.future

    async def mirror(
        self,
        topic: str,
        key: bytes | None,
        data: bytes | None,
        headers: Sequence[tuple[str, bytes | None]],
        origin: tuple[str, int],
    ) -> None:
        async with self._mirroring:  # those that wait for the topic go on in the order in which they came
            if topic not in self._known:
                source = self._known.get(origin[0])
                await asyncio.to_thread(
                    self._find_or_make, [topic], Topic("").partitions if source is None else source.partitions
                )
        there, partition = self._known[topic], origin[1]
        if partition >= there.partitions:
            partition = next(self._turn) % there.partitions if key is None else partition_of(key, there.partitions)
        publisher = self._publisher_for(topic)
        call = Call(asyncio.get_running_loop(), 1)
        size = len(data or b"") + len(key or b"") + 1024
        publisher.send(
            call,
            [Sent(publisher, call, 0, "a dead letter", topic, there.name, partition, key, data, list(headers), size)],
        )
        try:
            await call.future
        except UnlostError:
            self._known.pop(topic, None)  # it may have been deleted: the next try looks
            raise

    def original(self, unit: Unit, arrival: Arrival) -> Original:
        prefix = self.settings.prefix
        there = self._known.get(unit.topic)
        stamped = "CreateTime" if there is None else there.config.get("message.timestamp.type", "CreateTime")
        return Original(prefix + unit.topic, prefix + unit.service, original_headers(arrival), stamped)

    def check(self, envelope: Envelope) -> None:
        if envelope.topic in self._known:
            self._sizes(envelope)

    async def join(self, service: str, topics: Sequence[str]) -> KafkaMember:
        await asyncio.to_thread(self._find_or_make, [t for t in topics if t not in self._known])
        prefix = self.settings.prefix
        chosen = {prefix + name: self._known[name] for name in topics}
        return KafkaMember(self.settings, self.cluster, service, chosen, self._decoders, self._retained)

    async def keep_house(self) -> None:
        """The cluster keeps its own house."""

    async def topics(self, names: Collection[str] | None = None) -> Sequence[TopicInfo]:
        return await asyncio.to_thread(self._topics, names)

    async def read(self, topic: str, partition: int, start: int, limit: int) -> Sequence[Arrival]:
        return await asyncio.to_thread(self._read, topic, partition, start, limit)

    def reread(self, topic: str, partition: int, arrival: Arrival) -> Arrival:
        return reread(topic, partition, arrival, self._decoders.get(topic))

    # --- the rest ----------------------------------------------------------------------------------------

    def _sent(self, publisher: Publisher, call: Call, place: int, e: Envelope) -> Sent:
        there, headers, value, size = self._sizes(e)
        key = e.key
        partition = next(self._turn) % there.partitions if key is None else partition_of(key, there.partitions)
        return Sent(publisher, call, place, e.id, e.topic, there.name, partition, key, value, headers, size)

    def _sizes(self, e: Envelope) -> tuple[Described, list[tuple[str, bytes]], bytes | None, int]:
        headers, value = headers_of(e)
        there = self._known[e.topic]
        size = (len(value) if value is not None else 0) + (len(e.key) if e.key is not None else 0) + 1024
        if value is not None and len(value) > MAX_EVENT_BYTES:
            raise UsageError(
                "UL1012", f"an event has at most {MAX_EVENT_BYTES} bytes", found=f"{len(value)} bytes in {e.id}",
                fix="put the large part elsewhere, and a reference to it into the event",
            )  # fmt: skip
        if size > there.bytes_max // 2:
            whole = size + sum(len(n) + len(v) + HEADER_BYTES for n, v in headers)
            if whole > there.bytes_max:
                raise UsageError(
                    "UL1012", f"the topic {e.topic!r} takes messages of at most {there.bytes_max} bytes on this cluster",
                    found=f"{whole} bytes in {e.id}",
                    fix="put the large part elsewhere and a reference into the event, or raise max.message.bytes of the topic",
                )  # fmt: skip
        return there, headers, value, size

    def _start_publisher(self) -> Publisher:
        with self._starting:
            if self._closed:
                raise UsageError("UL1114", "this broker is closed", fix="use it inside `async with app:`")
            if self._publisher is None:
                self._publisher = Publisher(self.settings)
            return self._publisher

    def _publisher_for(self, topic: str) -> Publisher:
        """The cluster measures a batch as if it were one message, so topics with a low limit have their own producer."""
        limit = self._low.get(topic)
        if limit is None:
            return self._publisher or self._start_publisher()
        with self._starting:
            if self._closed:
                raise UsageError("UL1114", "this broker is closed", fix="use it inside `async with app:`")
            if limit not in self._narrow:
                self._narrow[limit] = Publisher(self.settings, batch_bytes=limit)
            return self._narrow[limit]

    def _declare(self, topics: Sequence[Topic]) -> list[TopicInfo]:
        prefix = self.settings.prefix
        there = self.cluster.describe([prefix + t.name for t in topics])
        for topic in topics:
            if prefix + topic.name in there:
                check_against(topic, there[prefix + topic.name])
        missing = [t for t in topics if prefix + t.name not in there]
        if missing:
            there |= self.cluster.create(missing)
            for topic in missing:
                check_against(topic, there[prefix + topic.name])  # somebody else may have been faster
        for topic in topics:
            self._declared.add(topic.name)
            self._retained[topic.name] = topic.retention is not None
            if topic.decoder is not None:
                self._decoders[topic.name] = topic.decoder
        infos = {info.name: info for info in self._infos(there)}
        return [infos[topic.name] for topic in topics]

    def _find_or_make(self, names: Sequence[str], partitions: int = Topic("").partitions) -> None:
        if not names:
            return
        prefix = self.settings.prefix
        there = self.cluster.describe([prefix + name for name in names])
        missing = [Topic(name, partitions) for name in names if prefix + name not in there]
        if missing:
            check_declared(missing)
            there |= self.cluster.create(missing)
        self._remember(there)

    def _remember(self, there: dict[str, Described]) -> None:
        for full, found in there.items():
            name = full[len(self.settings.prefix) :]
            self._known[name] = found
            if found.bytes_max < BATCH_BYTES:
                self._low.setdefault(name, found.bytes_max)  # for good: a topic keeps its producer, and so its order

    def _infos(self, there: dict[str, Described]) -> list[TopicInfo]:
        self._remember(there)
        ranges = self.cluster.ranges(there.values())
        return [
            info_of(name[len(self.settings.prefix) :], found, ranges[name]) for name, found in sorted(there.items())
        ]

    def _topics(self, names: Collection[str] | None) -> list[TopicInfo]:
        prefix = self.settings.prefix
        full = self.cluster.names() if names is None else [prefix + name for name in names]
        return self._infos(self.cluster.describe(full))

    def _read(self, topic: str, partition: int, start: int, limit: int) -> Sequence[Arrival]:
        with self._reading:
            if self._log is None:
                self._log = KafkaLog(self.settings, self._decoders)
            return self._log.read(topic, partition, start, limit)
