"""A real Kafka against the shipped suite, with both ways of sharing partitions."""

from __future__ import annotations

import asyncio

import pytest
from servers.kafka import Kafka

from unlost.testing import BROKER_SCENARIOS, check_broker

SESSION_MS = 6000  # the least that a cluster allows unless it is told otherwise
HUNG_SECONDS = SESSION_MS / 1000 + 2


@pytest.mark.parametrize("name", [s.name for s in BROKER_SCENARIOS])
def test_broker(name: str, kafka: Kafka) -> None:
    url = f"{kafka.url}?session.timeout.ms={SESSION_MS}"
    asyncio.run(check_broker(url, only=[name], hung_seconds=HUNG_SECONDS))[0].confirm()


@pytest.mark.parametrize(
    "name", ["a_new_service_sees_history", "seeking", "pausing", "members_share", "nothing_is_lost_while_members_change"]
)
def test_the_clusters_own_assignment(name: str, kafka: Kafka) -> None:
    """`group.protocol=consumer` (KIP-848): the same promises, where who has what is decided by the cluster."""
    url = f"{kafka.url}?group.protocol=consumer"
    asyncio.run(check_broker(url, only=[name], hung_seconds=HUNG_SECONDS))[0].confirm()
