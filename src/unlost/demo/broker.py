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
from unlost.store.connect import is_postgres
from unlost.world import new_id

SESSION_MS = 6000  # after so long a killed process is given up: the least that a cluster takes by default


class Place(NamedTuple):
    """Broker and store of one run. `store` is None where the broker's own file is the store."""

    url: str
    store: str | None
    prefix: str = ""

    @property
    def on_kafka(self) -> bool:
        return is_kafka(self.url)

    @property
    def on_postgres(self) -> bool:
        return self.store is not None and is_postgres(self.store)

    @property
    def shown(self) -> str:
        return hide_secrets(self.url)

    @property
    def store_shown(self) -> str:
        return hide_secrets(self.store or "")

    @property
    def has_secrets(self) -> bool:
        return self.shown != self.url or self.store_shown != (self.store or "")

    @property
    def patience(self) -> float:
        """How many times longer than in a folder it takes until a dead process is given up."""
        return 3.0 if self.on_kafka else 1.5 if self.on_postgres else 1.0


def place(folder: Path, flag: str | None, store_flag: str | None = None) -> Place:
    """The broker and the store that flags or environment name, if they are a Kafka cluster and a PostgreSQL database; else
    files in the folder. What a pyproject.toml says is not asked: a demo makes nothing where nobody has told it to.

    Raises:
        UsageError: a flag names something else, or a driver is missing.
    """
    if flag is not None and not is_kafka(flag):
        raise UsageError(
            "UL1396", "--broker names a Kafka cluster here", found=hide_secrets(flag),
            fix="leave it out: then the demo keeps everything in its own folder",
        )  # fmt: skip
    if store_flag is not None and not is_postgres(store_flag):
        raise UsageError(
            "UL1398", "--store names a PostgreSQL database here", found=hide_secrets(store_flag),
            fix="leave it out: then the demo keeps everything in its own folder",
        )  # fmt: skip
    name = f"unlost-demo-{new_id()[-8:]}."
    url, store = flag or _from_environment("broker"), store_flag or _from_environment("store")
    own_store = with_own_schema(store, name) if is_postgres(store) else None
    if not is_kafka(url):
        return Place(f"embedded://{quote(str(broker_path(folder)))}", own_store, name if own_store else "")
    check_kafka(url)
    own, prefix = with_own_prefix(url, name)
    check_kafka(own)
    return Place(own, own_store or f"embedded://{quote(str(store_path(folder)))}", prefix)


def _from_environment(name: str) -> str:
    variable = f"UNLOST_{name.upper()}"
    found = any(os.environ.get(v) for v in (variable, f"{variable}_FILE"))
    return config.setting(name).value if found else ""


def with_own_schema(url: str, name: str) -> str:
    """The URL of the same database, where the tables of one run have a schema of their own: ours, and the shop's.

    Example:
        >>> with_own_schema("postgresql://host/db?sslmode=require", "unlost-demo-1.")
        'postgresql://host/db?sslmode=require&schema=unlost_demo_1&options=-csearch_path%3Dunlost_demo_1'
    """
    schema = name.rstrip(".").replace("-", "_")
    front, _, query = url.partition("?")
    kept = [part for part in query.split("&") if part and part.partition("=")[0] not in ("schema", "options")]
    return f"{front}?{'&'.join([*kept, f'schema={schema}', f'options=-csearch_path%3D{schema}'])}"


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
