"""The topic `unlost.ledger`: the books, kept beside the log. It is compacted: of each key the last statement stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import NewTopic

from unlost.brokers.kafka.refusals import sorted_error
from unlost.brokers.kafka.settings import Settings
from unlost.brokers.kafka.topics import Cluster, Described
from unlost.brokers.port import Entry
from unlost.errors import OutcomeUnknown, Unavailable, UnlostError, UsageError
from unlost.world import REAL

LEDGER = "unlost.ledger"
PARTITIONS = 1  # statements are few, and whoever reads them wants them all
WRITE_SECONDS = 30.0
READ_SECONDS = 30.0


class KafkaLedger:
    def __init__(self, settings: Settings, cluster: Cluster) -> None:
        self._settings = settings
        self._cluster = cluster
        self.name = settings.prefix + LEDGER

    def write(self, statements: Mapping[str, bytes]) -> None:
        """
        Raises:
            UsageError: the topic is there and not compacted; it would grow for ever, or forget.
            OutcomeUnknown: some may be missing. Writing them again is safe.
        """
        self._make()
        errors: list[UnlostError] = []

        def told(error: KafkaError | None, _: Any) -> None:
            if error is not None:
                errors.append(sorted_error(error, f"writing to {self.name}"))

        producer = Producer(self._settings.producer(**{"message.timeout.ms": int(WRITE_SECONDS * 1000)}))
        try:
            for key, value in statements.items():
                producer.produce(self.name, key=key.encode(), value=value, on_delivery=told)
                producer.poll(0)
            left = producer.flush(WRITE_SECONDS + 1)
        except (KafkaException, BufferError) as e:
            raise OutcomeUnknown(
                "UL2122", "not all statements may be in the ledger", found=str(e), fix="write them again"
            ) from None
        if errors:
            raise errors[0]
        if left:
            raise OutcomeUnknown(
                "UL2122", "not all statements may be in the ledger", found=f"{left} without an answer within {WRITE_SECONDS:g} s",
                fix="write them again",
            )  # fmt: skip

    def read(self) -> Sequence[Entry]:
        there = self._describe()
        if there is None:
            return []
        (ranges,) = self._cluster.ranges([there]).values()
        todo = {partition: end for partition, (start, end) in enumerate(ranges) if end > start}
        last: dict[bytes, Entry] = {}
        keyless: list[Entry] = []
        if not todo:
            return []
        consumer = Consumer(self._settings.consumer(self._settings.prefix + "unlost-look"))
        try:
            consumer.assign([TopicPartition(self.name, p, ranges[p][0]) for p in todo])
            limit = REAL.monotonic() + READ_SECONDS
            while todo:
                for m in consumer.consume(500, 0.2) or ():
                    partition, error = m.partition() or 0, m.error()
                    if error is not None:
                        if error.code() != KafkaError._PARTITION_EOF:
                            raise sorted_error(error, f"reading {self.name}")
                        todo.pop(partition, None)
                        continue
                    entry = Entry(m.key() or b"", m.value(), f"{LEDGER}/{partition}:{m.offset()}")
                    if m.key() is None:
                        keyless.append(entry)
                    else:
                        last[entry.key] = entry
                    limit = REAL.monotonic() + READ_SECONDS
                    if (m.offset() or 0) + 1 >= todo.get(partition, 0):
                        todo.pop(partition, None)
                if REAL.monotonic() > limit:
                    raise Unavailable(
                        "UL2102", f"{self.name} cannot be read now", found=f"no answer for {READ_SECONDS:g} s"
                    )
        except KafkaException as e:
            raise sorted_error(e, f"reading {self.name}") from None
        finally:
            consumer.close()
        return [*last.values(), *keyless]

    def _describe(self) -> Described | None:
        return self._cluster.describe([self.name]).get(self.name)

    def _make(self) -> None:
        there = self._describe()
        if there is None:
            self._create()
            there = self._describe()
        if there is not None and there.config and (not there.compacted or there.deletes):
            raise UsageError(
                "UL1106", f"the topic {self.name!r} must be compacted, and nothing else may remove from it",
                found=f"cleanup.policy={there.config.get('cleanup.policy', 'delete')}",
                fix=f"kafka-configs --alter --entity-type topics --entity-name {self.name} --add-config cleanup.policy=compact",
            )  # fmt: skip

    def _create(self) -> None:
        copies = min(3, max(1, self._cluster.brokers))
        topic = NewTopic(
            self.name, num_partitions=PARTITIONS, replication_factor=copies,
            config={
                "cleanup.policy": "compact",
                "min.insync.replicas": "2" if copies >= 3 else "1",
                "unclean.leader.election.enable": "false",
            },
        )  # fmt: skip
        self._cluster.make([topic])
