"""The log as operators look at it: no group, no commit, blocking calls."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import OffsetSpec

from unlost.brokers.kafka.ledger import KafkaLedger
from unlost.brokers.kafka.refusals import sorted_error
from unlost.brokers.kafka.settings import Settings
from unlost.brokers.kafka.topics import Cluster, identity_of, info_of
from unlost.brokers.kafka.wire import received
from unlost.brokers.port import Ledger, Place
from unlost.errors import Unavailable
from unlost.events.topic import Arrival, Decoder, TopicInfo
from unlost.world import REAL

T = TypeVar("T")
READ_SECONDS = 20.0
GROUP = "unlost-look"  # a consumer must name one; it is never joined


class KafkaLog:
    """**Guarantee** `read` hands over every event that the log holds from a position on, in order."""

    forgets = True  # retention asks nobody

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

    @property
    def identity(self) -> str:
        return identity_of(self._cluster)

    def together(self, work: Callable[[], T]) -> T:
        return work()

    def names(self) -> Sequence[str]:
        return [name[len(self._settings.prefix) :] for name in self._cluster.names()]

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
                self._settings.consumer(
                    self._settings.prefix + GROUP, **{"queued.min.messages": 1000, "fetch.wait.max.ms": 10}
                )
            )
        low, high = consumer.get_watermark_offsets(place, READ_SECONDS, cached=False)
        start = max(start, low)
        if start >= high or limit <= 0:
            return []
        fresh = self._at != (place.topic, place.partition, start)
        if fresh:
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
                        if fresh or (m.offset() or 0) >= high:
                            at = high
                        else:  # seen when the log ended there
                            consumer.assign([TopicPartition(place.topic, place.partition, at)])
                            fresh = True
                        continue
                    if error.code() == KafkaError._AUTO_OFFSET_RESET:  # retention has moved on in the meantime
                        return found
                    raise KafkaException(error)
                position = m.offset() or 0
                if position < at:
                    continue
                at = position + 1
                found.append(received(m, topic, self._decoders.get(topic)))
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

    def ends(self, places: Collection[Place]) -> Mapping[Place, int]:
        prefix = self._settings.prefix
        found = self._cluster.offsets([TopicPartition(prefix + t, p) for t, p in places], OffsetSpec.latest())
        return {(name[len(prefix) :], partition): end for (name, partition), end in found.items()}

    def recorded(self, places: Mapping[Place, int]) -> Mapping[Place, int]:
        """One fetch for all of them."""
        prefix = self._settings.prefix
        wanted = {(prefix + topic, partition): position for (topic, partition), position in places.items()}
        chosen = [TopicPartition(*place) for place in wanted]
        first = self._cluster.offsets(chosen, OffsetSpec.earliest())
        last = self._cluster.offsets(chosen, OffsetSpec.latest())
        wanted = {place: max(at, first[place]) for place, at in wanted.items() if max(at, first[place]) < last[place]}
        found: dict[Place, int] = {}
        if not wanted:
            return found
        consumer = Consumer(
            self._settings.consumer(prefix + GROUP, **{"queued.min.messages": 1, "fetch.message.max.bytes": 1})
        )
        try:
            consumer.assign([TopicPartition(*place, at) for place, at in wanted.items()])
            end = REAL.monotonic() + READ_SECONDS
            while wanted and REAL.monotonic() < end:
                for m in consumer.consume(100, 0.1) or ():
                    place = (m.topic() or "", m.partition() or 0)
                    error = m.error()
                    if error is None:
                        found.setdefault((place[0][len(prefix) :], place[1]), max(0, m.timestamp()[1]) * 1000)
                    elif error.code() not in (KafkaError._PARTITION_EOF, KafkaError._AUTO_OFFSET_RESET):
                        raise sorted_error(error, "looking up times")
                    if wanted.pop(place, None) is not None:
                        consumer.incremental_unassign([TopicPartition(*place)])
        except KafkaException as e:
            raise sorted_error(e, "looking up times") from None
        finally:
            consumer.close()
        return found

    def spans(self, topics: Sequence[TopicInfo]) -> Mapping[str, tuple[int, int]]:
        prefix = self._settings.prefix
        places = [TopicPartition(prefix + t.name, p) for t in topics for p in range(t.partitions)]
        first = self._cluster.looked_up(places, OffsetSpec.for_timestamp(0))
        last = self._cluster.looked_up(places, OffsetSpec.max_timestamp())
        found = {}
        for t in topics:
            own = [(prefix + t.name, p) for p in range(t.partitions)]
            oldest = [first[place][1] for place in own if first[place][1] >= 0]
            newest = [last[place][1] for place in own if last[place][1] >= 0]
            if oldest and newest:
                found[t.name] = (min(oldest) * 1000, max(newest) * 1000)
        return found

    def holes(self, topic: str, partition: int) -> Sequence[tuple[int, int]]:
        return ()  # markers of transactions take positions as well

    def digest(
        self, topic: str, partition: int, start: int, before: int | None, runs: Sequence[tuple[int, int]]
    ) -> int | None:
        return None

    def verify(self, limit: int) -> Sequence[str]:
        return ()  # the client checks the checksum of whatever it reads

    def ledger(self) -> Ledger | None:
        return KafkaLedger(self._settings, self._cluster)

    def wait(self, seconds: float) -> None:
        REAL.pause(min(seconds, 0.2))

    def close(self) -> None:
        if self._consumer is not None:
            self._consumer.close()
            self._consumer = None
