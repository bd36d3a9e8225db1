"""For tests of programs that use unlost, and for whoever writes an adapter.

Each name is imported when it is first used: pytest loads this package for the plugin, also in projects without unlost.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unlost.testing.clock import VirtualWorld
    from unlost.testing.conformance_broker import BROKER_SCENARIOS, check_broker
    from unlost.testing.conformance_store import STORE_SCENARIOS, check_store
    from unlost.testing.kit import Running, running

_WHERE = {
    "BROKER_SCENARIOS": "conformance_broker",
    "STORE_SCENARIOS": "conformance_store",
    "Running": "kit",
    "VirtualWorld": "clock",
    "check_broker": "conformance_broker",
    "check_store": "conformance_store",
    "running": "kit",
}

__all__ = ["BROKER_SCENARIOS", "STORE_SCENARIOS", "Running", "VirtualWorld", "check_broker", "check_store", "running"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
