"""Fixtures for tests that need a real Kafka: `pytest_plugins = ["servers.fixtures"]`, or import what you need.

Without one such tests are skipped, and the reason is shown; where `CI=true` they fail.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator
from typing import NoReturn

import pytest

from servers import shared
from servers.jars import CannotStartError
from servers.kafka import GIVEN, Kafka, available


def require_kafka() -> None:
    """Skip the test, or fail it in CI, where no Kafka can be had. For tests that start their own."""
    reason = available()
    if reason is not None:
        missing(f"no Kafka: {reason}")


def missing(reason: str) -> NoReturn:
    """The rule for servers that cannot be had."""
    if os.environ.get("CI", "").lower() in ("true", "1"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def kafka() -> Iterator[Kafka]:
    """One plain broker, shared by all tests and all processes: use `fresh_prefix`, and start your own to break it."""
    require_kafka()
    if os.environ.get(GIVEN):
        yield Kafka.start()
        return
    try:
        joined = shared.join()
        bootstrap = joined.__enter__()
    except CannotStartError as why:
        missing(str(why))
    try:
        yield Kafka.at(bootstrap, "is shared by all tests; use Kafka.start() to break one")
    finally:
        joined.__exit__(None, None, None)


@pytest.fixture
def fresh_prefix(request: pytest.FixtureRequest) -> str:
    """The beginning of names of topics and groups that no other test has."""
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")[:40]
    return f"{name}-{uuid.uuid4().hex[:8]}"
