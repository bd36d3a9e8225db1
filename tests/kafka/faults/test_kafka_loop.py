"""Scenarios of the loop, each by itself: `pytest tests/kafka/faults/test_kafka_loop.py -k zombies`.

`KILLS`, `SECONDS` and `SEED` make one longer, or repeat a failure. The seed decides what is done to whom; the machine
decides what that hits.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from kafka_loop import KILLS, Report, play

from servers.fixtures import require_kafka
from servers.kafka import Kafka

SECONDS = float(os.environ.get("SECONDS", "12"))
LONG = SECONDS > 60
SOME = ("plain", "ledger", "relay", "strict", "sink", "carrier", "swift")  # each kind of handler; a long run has all

# who manages a group by KIP-848 decides how soon a member is missed, not its client
QUICK_GROUPS = {"group.consumer.session.timeout.ms": "1500", "group.consumer.heartbeat.interval.ms": "300"}


def loop(
    folder: Path, weights: dict[str, float], prefix: str, bootstrap: str, *, least: Mapping[str, int] | None = None,
    kafka: Kafka | None = None, options: str | None = None, processes: int = 3, pace: float = 0.5,
) -> Report:  # fmt: skip
    report = play(
        folder / "history", bootstrap, prefix, weights, kafka=kafka, options=options, seconds=SECONDS,
        only=() if LONG else SOME, processes=processes, pace=pace, rate=12.0 if LONG else 30.0, least=least,
    )  # fmt: skip
    assert report.events > 8 * SECONDS, f"too little was under way: {report}"
    for kind, count in (least or {}).items():
        assert report.by_kind[kind] >= count, f"too little was done: {report}"
    shutil.rmtree(folder / "history")
    return report


def test_kills(kafka: Kafka, fresh_prefix: str, tmp_path: Path) -> None:
    """1: kill -9 of consumers and publishers, at any moment and at named lines."""
    report = loop(tmp_path, KILLS, fresh_prefix, kafka.bootstrap, least={"at any moment": math.ceil(SECONDS / 2)})
    assert report.kills >= SECONDS / 2, f"too slow: {report}"


def test_zombies(kafka: Kafka, fresh_prefix: str, tmp_path: Path) -> None:
    """3: processes sleep through their session and their replacement, and wake up."""
    weights = {"zombie": 4, "pause": 1, "kill": 1}
    loop(tmp_path, weights, fresh_prefix, kafka.bootstrap, least={"zombie": 3})


def test_rebalance_storm(kafka: Kafka, fresh_prefix: str, tmp_path: Path) -> None:
    """5: members come and go all the time."""
    weights = {"leave": 4, "kill": 1}
    loop(tmp_path, weights, fresh_prefix, kafka.bootstrap, least={"SIGTERM": 5}, processes=4)


def test_rebalance_storm_of_the_new_protocol(fresh_prefix: str, tmp_path: Path) -> None:
    """5, with the groups of KIP-848."""
    require_kafka()
    with Kafka.start(config=QUICK_GROUPS) as kafka:
        weights = {"leave": 4, "kill": 1, "zombie": 0.7}
        loop(
            tmp_path, weights, fresh_prefix, kafka.bootstrap, options="group.protocol=consumer", processes=4,
            least={"SIGTERM": 5},
        )  # fmt: skip


def test_broker_is_killed(fresh_prefix: str, tmp_path: Path) -> None:
    """2: kill -9 of the broker under load, and of the processes around it."""
    require_kafka()
    with Kafka.start() as kafka:
        weights = {"broker_kill": 2, "broker_pause": 1, "kill": 2, "pause": 1}
        loop(tmp_path, weights, fresh_prefix, kafka.bootstrap, kafka=kafka, least={"broker killed": 2})


def test_network_is_cut(fresh_prefix: str, tmp_path: Path) -> None:
    """4: requests whose reply is lost, requests that never arrive, connections that end, and silence."""
    require_kafka()
    with Kafka.start(proxied=True) as kafka:
        weights = {"cut": 12, "net_down": 1, "swallow": 0.7, "kill": 1, "leave": 0.5}
        loop(tmp_path, weights, fresh_prefix, kafka.bootstrap, kafka=kafka, pace=0.25)
        assert kafka.proxy.cut.total() > SECONDS, kafka.proxy.cut


@pytest.mark.slow
def test_brokers_are_lost(fresh_prefix: str, tmp_path: Path) -> None:
    """6: three brokers, three copies, two in sync: one is killed, frozen, or hands its leaderships over."""
    require_kafka()
    with Kafka.start(3) as kafka:
        weights = {"broker_loss": 3, "broker_freeze": 2, "leader_change": 1, "kill": 3, "pause": 1, "zombie": 1}
        loop(tmp_path, weights, fresh_prefix, kafka.bootstrap, kafka=kafka)
