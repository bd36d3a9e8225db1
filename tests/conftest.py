"""Runs `async def` tests: each in an event loop of its own, with a time limit."""

from __future__ import annotations

import asyncio
import inspect

import pytest

pytest_plugins = ["servers.fixtures"]

SECONDS = 120.0


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}

    async def limited() -> None:
        async with asyncio.timeout(SECONDS):
            await pyfuncitem.obj(**arguments)

    asyncio.run(limited())
    return True
