"""A real Kafka against the shipped suite, with both ways of sharing partitions, and the table in the docs."""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path

import pytest
from test_embedded import broker_result, store_result
from test_postgres import postgres_result

from servers.kafka import Kafka
from servers.postgres import Postgres
from unlost.testing import BROKER_SCENARIOS, STORE_SCENARIOS, check_broker
from unlost.testing.conformance import Result
from unlost.testing.conformance_broker import abilities_of
from unlost.testing.promises import Column, table

SESSION_MS = 6000  # the least that a cluster allows unless it is told otherwise
HUNG_SECONDS = SESSION_MS / 1000 + 2
DOCS = Path(__file__).parents[2] / "docs"


@functools.cache
def kafka_result(name: str, url: str) -> Result:
    return asyncio.run(check_broker(url, only=[name], hung_seconds=HUNG_SECONDS))[0]


@pytest.mark.parametrize("name", [s.name for s in BROKER_SCENARIOS])
def test_broker(name: str, kafka: Kafka) -> None:
    kafka_result(name, f"{kafka.url}?session.timeout.ms={SESSION_MS}").confirm()


@pytest.mark.parametrize(
    "name",
    ["a_new_service_sees_history", "seeking", "pausing", "members_share", "nothing_is_lost_while_members_change"],
)
def test_the_clusters_own_assignment(name: str, kafka: Kafka) -> None:
    """`group.protocol=consumer` (KIP-848): the same promises, where who has what is decided by the cluster."""
    kafka_result(name, f"{kafka.url}?group.protocol=consumer").confirm()


def test_the_table_in_the_docs_is_current(tmp_path: Path, kafka: Kafka, postgres: Postgres) -> None:
    """If not: `python tests/conformance/test_kafka.py`, which starts the servers for it."""
    url = f"{kafka.url}?session.timeout.ms={SESSION_MS}"
    assert (DOCS / "broker-promises.md").read_text() == current(tmp_path, url, postgres)


def current(folder: Path, url: str, postgres: Postgres) -> str:
    embedded = asyncio.run(abilities_of(f"embedded://{folder}/events.db"))
    brokers = [
        Column("embedded", [broker_result(s.name) for s in BROKER_SCENARIOS], embedded),
        Column(
            "kafka, one node", [kafka_result(s.name, url) for s in BROKER_SCENARIOS], asyncio.run(abilities_of(url))
        ),
    ]
    stores = [
        Column("file", [store_result(s.name) for s in STORE_SCENARIOS]),
        Column("postgresql", [postgres_result(s.name, postgres) for s in STORE_SCENARIOS]),
    ]
    return table(brokers, stores)


if __name__ == "__main__":
    import tempfile

    with Kafka.start() as cluster, Postgres.start() as server, tempfile.TemporaryDirectory() as temporary:
        text = current(Path(temporary), f"{cluster.url}?session.timeout.ms={SESSION_MS}", server)
        (DOCS / "broker-promises.md").write_text(text)
