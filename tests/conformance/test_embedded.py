"""The embedded broker and its store against the shipped suites. This is all that an adapter's own test file needs."""

from __future__ import annotations

import asyncio
import functools
import tempfile
from pathlib import Path

import pytest

from unlost.sqlite import process
from unlost.testing import BROKER_SCENARIOS, STORE_SCENARIOS, check_broker, check_store
from unlost.testing.conformance import Result
from unlost.testing.conformance_broker import abilities_of
from unlost.testing.promises import Column, table

HUNG_SECONDS = 4.0  # instead of 30: nobody waits that long for a test
DOCS = Path(__file__).parents[2] / "docs"


@functools.cache
def broker_result(name: str) -> Result:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "HEARTBEAT_STALE_SECONDS", HUNG_SECONDS)
        url = f"embedded://{folder}/events.db"
        return asyncio.run(check_broker(url, only=[name], hung_seconds=HUNG_SECONDS))[0]


@functools.cache
def store_result(name: str) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(check_store(f"embedded://{folder}/events.db", only=[name]))[0]


@pytest.mark.parametrize("name", [s.name for s in BROKER_SCENARIOS])
def test_broker(name: str) -> None:
    broker_result(name).confirm()


@pytest.mark.parametrize("name", [s.name for s in STORE_SCENARIOS])
def test_store(name: str) -> None:
    store_result(name).confirm()


def test_the_table_in_the_docs_is_current(tmp_path: Path) -> None:
    """If not: `python -m unlost.testing.promises docs/broker-promises.md`."""
    abilities = asyncio.run(abilities_of(f"embedded://{tmp_path}/events.db"))
    broker = Column("embedded", [broker_result(s.name) for s in BROKER_SCENARIOS], abilities)
    store = Column("embedded", [store_result(s.name) for s in STORE_SCENARIOS])
    assert (DOCS / "broker-promises.md").read_text() == table([broker], [store])
