"""Fixtures for tests that need a real server: `pytest_plugins = ["servers.fixtures"]`, or import what you need.

Without one such tests are skipped, and the reason is shown; where `CI=true` they fail.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn
from urllib.parse import urlsplit

import pytest

from servers import pgbouncer as pgbouncer_server
from servers import postgres as postgres_server
from servers import shared
from servers.kafka import GIVEN, Kafka, available
from servers.pgbouncer import PgBouncer
from servers.postgres import Postgres
from servers.process import CannotStartError


def require_kafka() -> None:
    """Skip the test, or fail it in CI, where no Kafka can be had. For tests that start their own."""
    reason = available()
    if reason is not None:
        missing(f"no Kafka: {reason}")


def require_postgres(*, own: bool = False) -> None:
    """Skip the test, or fail it in CI, where no PostgreSQL can be had; with `own`, where none can be started."""
    reason = postgres_server.available(own=own)
    if reason is not None:
        missing(f"no PostgreSQL: {reason}")


def require_pgbouncer() -> None:
    reason = pgbouncer_server.available()
    if reason is not None:
        missing(f"no PgBouncer: {reason}")


def missing(reason: str) -> NoReturn:
    """The rule for servers that cannot be had."""
    if os.environ.get("CI", "").lower() in ("true", "1"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@contextmanager
def _joined(kind: str) -> Iterator[str]:
    """The address of the server of this kind that all tests share."""
    joined = shared.join(kind)
    try:
        address = joined.__enter__()
    except CannotStartError as why:
        missing(str(why))
    try:
        yield address
    finally:
        joined.__exit__(None, None, None)


@pytest.fixture(scope="session")
def kafka() -> Iterator[Kafka]:
    """One plain broker, shared by all tests and all processes: use `fresh_prefix`, and start your own to break it."""
    require_kafka()
    if os.environ.get(GIVEN):
        yield Kafka.start()
        return
    with _joined("kafka") as bootstrap:
        yield Kafka.at(bootstrap, "is shared by all tests; use Kafka.start() to break one")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """One server, shared by all tests and all processes: use `database`, and start your own to break it."""
    require_postgres()
    if os.environ.get(postgres_server.GIVEN):
        yield Postgres.start()
        return
    with _joined("postgres") as url:
        yield Postgres.at(url, "is shared by all tests; use Postgres.start(own=True) to break one")


@pytest.fixture
def database(postgres: Postgres) -> Iterator[str]:
    """The URL of a database that is empty, and gone after the test."""
    url = postgres.fresh()
    yield url
    postgres.drop_database(urlsplit(url).path[1:])


@pytest.fixture(scope="session")
def pgbouncer(postgres: Postgres) -> Iterator[PgBouncer]:
    """A pooler that gives each transaction another connection: `pgbouncer.via(database)`."""
    require_pgbouncer()
    with PgBouncer.start(postgres.url()) as bouncer:
        yield bouncer


@pytest.fixture(scope="session")
def pgbouncer_session(postgres: Postgres) -> Iterator[PgBouncer]:
    """A pooler that gives each client a connection of its own until it leaves."""
    require_pgbouncer()
    with PgBouncer.start(postgres.url(), "session") as bouncer:
        yield bouncer


@pytest.fixture
def fresh_prefix(request: pytest.FixtureRequest) -> str:
    """The beginning of names of topics and groups that no other test has."""
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")[:40]
    return f"{name}-{uuid.uuid4().hex[:8]}"
