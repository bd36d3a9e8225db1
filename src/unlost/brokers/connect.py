"""From a URL to a broker. The only place that names the adapters."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from unlost.brokers.embedded.broker import EmbeddedBroker
from unlost.brokers.port import Broker
from unlost.errors import UsageError
from unlost.sqlite.file import File
from unlost.world import REAL, World

PLANNED = ("kafka", "amqp", "amqps", "redis", "rediss")


def embedded_path(url: str) -> Path:
    """The file that an embedded URL means: `embedded:///var/shop/events.db` (or `embedded:events.db`, relative).

    Raises:
        UsageError: the URL names another kind of broker, or none that is known.
    """
    scheme, _, _ = url.partition(":")
    if scheme in PLANNED:
        raise UsageError(
            "UL1140", f"this release has no adapter for {scheme}:// brokers",
            fix="use the embedded broker: leave UNLOST_BROKER empty, or embedded:///path/events.db",
        )  # fmt: skip
    parts = urlsplit(url)
    path = unquote(parts.path)
    if parts.scheme != "embedded" or parts.netloc or parts.query or not path:
        raise UsageError(
            "UL1141", "a broker URL looks like embedded:///path/events.db",
            found=_without_password(url), fix="three slashes for an absolute path; none for a relative one",
        )  # fmt: skip
    return Path(path)


def connect(url: str, *, world: World = REAL) -> tuple[Broker, File]:
    """Opens the broker behind a URL; the file is where the store of the same App lives."""
    file = File(embedded_path(url), world=world)
    return EmbeddedBroker(file), file


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    if parts.password:
        return url.replace(parts.password, "***")
    return url
