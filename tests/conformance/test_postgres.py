"""The store in a real PostgreSQL against the shipped suite: the same as for the file."""

from __future__ import annotations

import asyncio
import functools

import pytest

from servers.postgres import Postgres
from unlost.store.postgres import migrate
from unlost.store.postgres.settings import parse
from unlost.testing import STORE_SCENARIOS, check_store
from unlost.testing.conformance import Result
from unlost.testing.postgres_rig import postgres_at


@functools.cache
def postgres_result(name: str, server: Postgres) -> Result:
    url = server.fresh()
    migrate.migrate(parse(url))
    (result,) = asyncio.run(check_store(url, postgres_at, only=[name]))
    server.drop_database(url.rpartition("/")[2])
    return result


@pytest.mark.parametrize("name", [s.name for s in STORE_SCENARIOS])
def test_store(name: str, postgres: Postgres) -> None:
    result = postgres_result(name, postgres)
    result.confirm()
    assert result.verdict == ("not promised" if name == "suspects_after_kill_9" else "kept")
