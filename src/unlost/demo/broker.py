"""Where a run of the demo keeps its log: in its own folder, or on a Kafka cluster, under names of its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl, quote

from unlost import UsageError, config
from unlost.brokers.connect import check_kafka, is_kafka
from unlost.config import hide_secrets
from unlost.demo.folder import broker_path, store_path
from unlost.world import new_id

SESSION_MS = 6000  # after so long a killed process is given up: the least that a cluster takes by default


class Place(NamedTuple):
    """The broker of one run. `store` is None where the broker's own file is the store."""

    url: str
    store: str | None
    prefix: str = ""

    @property
    def on_kafka(self) -> bool:
        return self.store is not None

    @property
    def shown(self) -> str:
        return hide_secrets(self.url)

    @property
    def has_secrets(self) -> bool:
        return self.shown != self.url

    @property
    def patience(self) -> float:
        """How many times longer than in a folder it takes until a dead process is given up."""
        return 3.0 if self.on_kafka else 1.0


def place(folder: Path, flag: str | None) -> Place:
    """The broker that the flag or the environment names, if that is a Kafka cluster; else a file in the folder. What a
    pyproject.toml says is not asked: a demo makes no topics on a cluster that nobody has named for it.

    Raises:
        UsageError: the flag names something else than a Kafka cluster, or the driver is missing.
    """
    if flag is not None and not is_kafka(flag):
        raise UsageError(
            "UL1396", "--broker names a Kafka cluster here", found=hide_secrets(flag),
            fix="leave it out: then the demo keeps everything in its own folder",
        )  # fmt: skip
    url = flag
    if url is None and any(os.environ.get(name) for name in ("UNLOST_BROKER", "UNLOST_BROKER_FILE")):
        url = config.setting("broker").value
    if url is None or not is_kafka(url):
        return Place(f"embedded://{quote(str(broker_path(folder)))}", None)
    check_kafka(url)
    own, prefix = with_own_prefix(url, f"unlost-demo-{new_id()[-8:]}.")
    check_kafka(own)
    return Place(own, f"embedded://{quote(str(store_path(folder)))}", prefix)


def with_own_prefix(url: str, name: str) -> tuple[str, str]:
    """The URL of the same cluster, with names of one run, and takeovers that do not take long.

    Example:
        >>> with_own_prefix("kafka://host?prefix=test.", "demo-1.")
        ('kafka://host?prefix=test.demo-1.&session.timeout.ms=6000', 'test.demo-1.')
    """
    front, _, query = url.partition("?")
    said = parse_qsl(query, keep_blank_values=True)
    prefix = next((value for key, value in said if key == "prefix"), "") + name
    kept = [part for part in query.split("&") if part and not part.startswith("prefix=")]
    named = {key for key, _ in said}
    kept.append(f"prefix={prefix}")
    if not {"session.timeout.ms", "group.protocol"} & named:
        kept.append(f"session.timeout.ms={SESSION_MS}")
    return f"{front}?{'&'.join(kept)}", prefix
