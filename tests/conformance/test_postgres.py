"""The store in a real PostgreSQL against the shipped suite: the same as for the file."""

from __future__ import annotations

import asyncio

import pytest

from unlost.store.postgres import migrate
from unlost.store.postgres.settings import parse
from unlost.testing import STORE_SCENARIOS, check_store
from unlost.testing.postgres_rig import postgres_at


@pytest.mark.parametrize("name", [s.name for s in STORE_SCENARIOS])
def test_store(name: str, database: str) -> None:
    migrate.migrate(parse(database))
    (result,) = asyncio.run(check_store(database, postgres_at, only=[name]))
    result.confirm()
    assert result.verdict == ("not promised" if name == "suspects_after_kill_9" else "kept")
