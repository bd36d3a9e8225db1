"""From a URL to a broker. The only place that names the adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from unlost.brokers.embedded.broker import EmbeddedBroker
from unlost.brokers.embedded.doctor import EmbeddedDoctor
from unlost.brokers.findings import Examiner
from unlost.brokers.port import Broker, Log
from unlost.config import hide_secrets
from unlost.errors import UsageError
from unlost.events.topic import Decoder
from unlost.sqlite.file import File
from unlost.world import REAL, World

if TYPE_CHECKING:
    from unlost.brokers.kafka.broker import KafkaBroker
    from unlost.brokers.kafka.settings import Settings

PLANNED = ("amqp", "amqps", "redis", "rediss")
LIBRDKAFKA_MIN = 0x020F0000  # 2.15


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
            found=hide_secrets(url), fix="three slashes for an absolute path; none for a relative one",
        )  # fmt: skip
    return Path(path)


def connect(url: str, *, world: World = REAL, store_elsewhere: bool = False) -> tuple[Broker, File | None]:
    """The broker behind a URL, not yet opened, and its file if it is the embedded one. Blocks.

    `store_elsewhere`: the store is not in the embedded broker's file.

    Raises:
        UsageError: the URL means nothing here, or the broker's driver is not installed.
    """
    if is_kafka(url):
        return kafka(url), None
    file = File(embedded_path(url), world=world)
    return EmbeddedBroker(file, store_elsewhere=store_elsewhere), file


def is_kafka(url: str) -> bool:
    return url.startswith("kafka:")


def kafka(url: str) -> KafkaBroker:
    """The broker behind a `kafka://` URL, not yet opened."""
    kafka_settings = _driver()
    from unlost.brokers.kafka.broker import KafkaBroker

    return KafkaBroker(kafka_settings(url))


def kafka_log(url: str, decoders: Mapping[str, Decoder] | None = None) -> Log:
    """The log behind a `kafka://` URL, for those who look; `decoders` by topic.

    Raises:
        UsageError: the URL means nothing, or the driver is not installed. Unavailable: nobody answers there.
    """
    kafka_settings = _driver()
    from unlost.brokers.kafka.log import KafkaLog

    return KafkaLog(kafka_settings(url), decoders)


def examiner(url: str) -> Examiner:
    """Who looks a broker over for `unlost doctor`.

    Raises:
        UsageError: the URL means nothing, or the driver is not installed.
    """
    if not is_kafka(url):
        return EmbeddedDoctor(embedded_path(url))
    kafka_settings = _driver(old=True)
    from unlost.brokers.kafka.doctor import KafkaDoctor

    return KafkaDoctor(kafka_settings(url))


def check_kafka(url: str) -> None:
    """
    Raises:
        UsageError: the URL means nothing, or the driver is not installed.
    """
    _driver()(url)


def _driver(*, old: bool = False) -> Callable[[str], Settings]:
    """The driver is an extra: most programs begin without a server. `old` lets one pass that is not safe to work with."""
    try:
        import confluent_kafka
    except ImportError as e:
        raise UsageError(
            "UL1148", "kafka:// needs the client of Kafka", found=str(e), fix='pip install "unlost[kafka]"'
        ) from None
    if not old and int(confluent_kafka.libversion()[1]) < LIBRDKAFKA_MIN:
        raise UsageError(
            "UL1149", "this release of the Kafka client has bugs that lose events", found=str(confluent_kafka.version()),
            fix='pip install -U "confluent-kafka>=2.15"',
        )  # fmt: skip
    from unlost.brokers.kafka.settings import parse

    return parse
