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
