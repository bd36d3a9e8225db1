"""Event-driven services for Python in which no event is lost, and it can be proved."""

from unlost.app import App
from unlost.brokers.port import Broker, Receipt
from unlost.delivery.context import Context
from unlost.delivery.fate import Fate, Reject, Retry, RetryLater
from unlost.delivery.service import Guarantee, Service
from unlost.errors import OutcomeUnknown, Unavailable, UnlostError, UsageError
from unlost.events import Command, Event, Sensitive
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
]
