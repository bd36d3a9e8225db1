"""The log as operators look at it: no group, no commit, blocking calls."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import OffsetSpec

from unlost.brokers.kafka.refusals import sorted_error
from unlost.brokers.kafka.settings import Settings
from unlost.brokers.kafka.topics import Cluster, info_of
from unlost.brokers.kafka.wire import arrival_of, headers_in
from unlost.errors import Unavailable
from unlost.events.topic import Arrival, Decoder, TopicInfo
from unlost.world import REAL

READ_SECONDS = 20.0
GROUP = "unlost-look"  # a consumer must name one; it is never joined


class KafkaLog:
    """**Guarantee** `read` hands over every event that the log holds from a position on, in order."""

    def __init__(self, settings: Settings, decoders: Mapping[str, Decoder] | None = None) -> None:
        self._settings = settings
        self._decoders = decoders or {}
        self._cluster = Cluster(settings)
        self._cluster.connect()
        self._consumer: Consumer | None = None
        self._at: tuple[str, int, int] | None = None  # where the consumer stands

    @property
    def cluster(self) -> Cluster:
        return self._cluster

    def topics(self, names: Collection[str] | None = None) -> Sequence[TopicInfo]:
        prefix = self._settings.prefix
        full = self._cluster.names() if names is None else [prefix + name for name in names]
        found = self._cluster.describe(full)
        ranges = self._cluster.ranges(found.values())
        return [info_of(name[len(prefix) :], there, ranges[name]) for name, there in sorted(found.items())]

    def read(self, topic: str, partition: int, start: int, limit: int) -> Sequence[Arrival]:
        name = self._settings.prefix + topic
        place = TopicPartition(name, partition)
        try:
            return self._read(topic, place, start, limit)
        except KafkaException as e:
            error = e.args[0]
            if error.code() in (
                KafkaError._UNKNOWN_PARTITION,
                KafkaError.UNKNOWN_TOPIC_OR_PART,
                KafkaError._UNKNOWN_TOPIC,
            ):
                return []
            raise sorted_error(error, f"reading {topic}/{partition}") from None

    def _read(self, topic: str, place: TopicPartition, start: int, limit: int) -> list[Arrival]:
        consumer = self._consumer
        if consumer is None:
            consumer = self._consumer = Consumer(
                self._settings.consumer(self._settings.prefix + GROUP, **{"queued.min.messages": 1000, "fetch.wait.max.ms": 10})
            )
        low, high = consumer.get_watermark_offsets(place, READ_SECONDS, cached=False)
        start = max(start, low)
        if start >= high or limit <= 0:
            return []
        if self._at != (place.topic, place.partition, start):
            consumer.assign([TopicPartition(place.topic, place.partition, start)])
        self._at = None
        found: list[Arrival] = []
        end = REAL.monotonic() + READ_SECONDS
        at = start
        while len(found) < limit and at < high:
            for m in consumer.consume(min(500, limit - len(found)), 0.1) or ():
                error = m.error()
                if error is not None:
                    if error.code() == KafkaError._PARTITION_EOF:
                        at = high
                        continue
                    if error.code() == KafkaError._AUTO_OFFSET_RESET:  # retention has moved on in the meantime
                        return found
                    raise KafkaException(error)
                position = m.offset() or 0
                at = position + 1
                found.append(
                    arrival_of(
                        topic, place.partition, position, max(0, m.timestamp()[1]), m.key(), m.value(), headers_in(m),
                        self._decoders.get(topic),
                    )
                )  # fmt: skip
                end = REAL.monotonic() + READ_SECONDS
            if REAL.monotonic() > end:
                raise Unavailable(
                    "UL2102", f"{topic}/{place.partition} cannot be read now", found=f"no answer for {READ_SECONDS:g} s at {at}",
                    fix="try again; does the partition have a leader?",
                )  # fmt: skip
        if at < high:
            self._at = (place.topic, place.partition, at)
        return found

    def at(self, topic: str, partition: int, micros: int) -> int:
        place = TopicPartition(self._settings.prefix + topic, partition)
        found = self._cluster.offsets([place], OffsetSpec.for_timestamp(max(0, micros // 1000)))
        position = found[place.topic, partition]
        if position >= 0:
            return position
        return self._cluster.offsets([place], OffsetSpec.latest())[place.topic, partition]

    def wait(self, seconds: float) -> None:
        REAL.pause(min(seconds, 0.2))

    def close(self) -> None:
        if self._consumer is not None:
            self._consumer.close()
            self._consumer = None
