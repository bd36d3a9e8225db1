"""Event-driven services for Python in which no event is lost, and it can be proved."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unlost import testing as testing
    from unlost.app import App
    from unlost.brokers.port import Broker, Receipt
    from unlost.delivery.context import Context
    from unlost.delivery.fate import Fate, Reject, Retry, RetryLater
    from unlost.delivery.outbox import Outbox
    from unlost.delivery.service import Guarantee, Service
    from unlost.errors import OutcomeUnknown, Unavailable, UnlostError, UsageError
    from unlost.events import Command, Event, Sensitive, upcast
    from unlost.events.topic import Topic
    from unlost.store.port import Store

__version__ = "0.1.0"

__all__ = [
    "App",
    "Broker",
    "Command",
    "Context",
    "Event",
    "Fate",
    "Guarantee",
    "Outbox",
    "OutcomeUnknown",
    "Receipt",
    "Reject",
    "Retry",
    "RetryLater",
    "Sensitive",
    "Service",
    "Store",
    "Topic",
    "Unavailable",
    "UnlostError",
    "UsageError",
    "__version__",
    "upcast",
]

# Each name is imported when it is first used: the pytest plugin and the command line load this package in programs
# that may need nothing of it.
_WHERE = {
    "App": "app",
    "Broker": "brokers.port",
    "Command": "events",
    "Context": "delivery.context",
    "Event": "events",
    "Fate": "delivery.fate",
    "Guarantee": "delivery.service",
    "Outbox": "delivery.outbox",
    "OutcomeUnknown": "errors",
    "Receipt": "brokers.port",
    "Reject": "delivery.fate",
    "Retry": "delivery.fate",
    "RetryLater": "delivery.fate",
    "Sensitive": "events",
    "Service": "delivery.service",
    "Store": "store.port",
    "Topic": "events.topic",
    "Unavailable": "errors",
    "UnlostError": "errors",
    "UsageError": "errors",
    "upcast": "events",
}


def __getattr__(name: str) -> Any:
    if name == "testing":
        return import_module("unlost.testing")
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"unlost.{_WHERE[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
