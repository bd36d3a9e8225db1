"""The pytest plugin of unlost: a fixture, and an event that was never published fails its test.

It imports nothing of unlost when pytest starts, and does nothing in projects that do not use unlost.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

_FORGOTTEN = ("App.publish", "App.publish_all", "App.accept", "Running.publish", "Running.publish_all")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if "unlost.app" in sys.modules:
        _watch(item.config)


@pytest.fixture
def unlost_running(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """`async with unlost_running(app) as t:`, see `unlost.testing.running`."""
    from unlost.testing import running

    _watch(request.config)
    return running


_watching = pytest.StashKey[bool]()


def _watch(config: pytest.Config) -> None:
    """A publish that was never awaited published nothing: that is an error, not a warning."""
    if config.stash.get(_watching, False):
        return
    config.stash[_watching] = True
    for name in _FORGOTTEN:
        pattern = name.replace(".", r"\.")
        config.addinivalue_line("filterwarnings", rf"error:coroutine '{pattern}' was never awaited:RuntimeWarning")
        config.addinivalue_line(
            "filterwarnings", rf"error:(?s).*coroutine object {pattern} :pytest.PytestUnraisableExceptionWarning"
        )
