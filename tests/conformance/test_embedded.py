"""The embedded broker and its store against the shipped suites. This is all that an adapter's own test file needs."""

from __future__ import annotations

import asyncio
import functools
import tempfile

import pytest

from unlost.sqlite import process
from unlost.testing import BROKER_SCENARIOS, STORE_SCENARIOS, check_broker, check_store
from unlost.testing.conformance import Result

HUNG_SECONDS = 4.0  # instead of 30: nobody waits that long for a test


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
