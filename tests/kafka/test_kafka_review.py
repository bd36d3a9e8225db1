"""Small things about the log of a real Kafka that only show when it grows while somebody looks."""

from __future__ import annotations

import time
from typing import Any

from kafka_kit import make_topic, send, url_of

from unlost.brokers.kafka.log import KafkaLog
from unlost.brokers.kafka.settings import parse


def test_who_reads_on_while_the_log_grows_is_not_told_that_it_ends(kafka: Any, fresh_prefix: str) -> None:
    make_topic(kafka, f"{fresh_prefix}.t")
    log = KafkaLog(parse(url_of(kafka, fresh_prefix)))
    try:
        send(kafka, f"{fresh_prefix}.t", [(b"k", b"{}", [])] * 20, partition=0)
        assert [a.position for a in log.read("t", 0, 0, 10)] == list(range(10))
        time.sleep(0.5)  # the client has seen the end of it
        send(kafka, f"{fresh_prefix}.t", [(b"k", b"{}", [])] * 10, partition=0)
        assert [a.position for a in log.read("t", 0, 10, 10)] == list(range(10, 20))
        assert [a.position for a in log.read("t", 0, 20, 1)] == [20]
    finally:
        log.close()
