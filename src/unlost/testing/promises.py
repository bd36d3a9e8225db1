"""The table "which promise holds on which broker", from the results of the suites.

`python -m unlost.testing.promises docs/broker-promises.md` checks the embedded broker and its store and writes the
table; every URL given after the file is checked too, as a broker or (`postgresql://…`, with the tables made) as a store,
and gets a column of its own.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from unlost.brokers.port import Abilities
from unlost.store.connect import is_postgres
from unlost.testing.conformance import Result
from unlost.testing.conformance_broker import abilities_of, check_broker
from unlost.testing.conformance_store import check_store

ABILITIES = {
    "ordered": "one order per key",
    "replayable": "the log can be read again from any position",
    "delayed": "can hold an event back until a time",
    "atomic_batches": "a batch is accepted whole or not at all",
    "commits_with_store": "publishing and settling can be one commit",
}


class Column(NamedTuple):
    """One adapter and what became of its scenarios."""

    name: str
    results: Sequence[Result]
    abilities: Abilities | None = None


def table(brokers: Sequence[Column], stores: Sequence[Column]) -> str:
    """The document. The same results give the same text."""
    lines = [
        "# Which promise holds on which broker",
        "",
        "Made by `unlost.testing.promises` from the results of `check_broker` and `check_store`; a test compares it with",
        "new results. *kept*: seen to hold. *not promised*: the adapter does not declare the ability that this needs. What",
        "survives a power cut is proved apart, by the crash-state harness; on Kafka it follows from the topic's replication.",
        "",
        "## What brokers declare",
        "",
        _row(["", *(c.name for c in brokers)]),
        _rule(len(brokers)),
        _row(["an accepted event survives", *(c.abilities.survives if c.abilities else "" for c in brokers)]),
    ]
    for ability, words in ABILITIES.items():
        lines.append(_row([words, *("yes" if getattr(c.abilities, ability, False) else "no" for c in brokers)]))
    for words, field in (("a dead", "death_seconds"), ("a leaving", "leave_seconds")):
        times = (f"{getattr(c.abilities, field):g} s" if c.abilities else "" for c in brokers)
        lines.append(_row([f"{words} member's partitions are others' within", *times]))
    for title, columns in (("What brokers promise", brokers), ("What stores promise", stores)):
        lines += [
            "",
            f"## {title}",
            "",
            _row(["promise", *(c.name for c in columns), "scenario"]),
            _rule(len(columns) + 1),
        ]
        for scenarios in zip(*(c.results for c in columns), strict=True):
            verdicts = [f"**{r.verdict}**" if r.verdict == "broken" else r.verdict for r in scenarios]
            lines.append(_row([scenarios[0].promise, *verdicts, f"`{scenarios[0].name}`"]))
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _rule(columns: int) -> str:
    return "|" + "---|" * (columns + 1)


async def embedded_columns() -> tuple[Column, Column]:
    """The embedded broker and its store, each in a new folder."""
    with tempfile.TemporaryDirectory() as folder:
        url = f"embedded://{folder}/broker/events.db"
        broker = Column("embedded", await check_broker(url), await abilities_of(url))
        return broker, Column("file", await check_store(f"embedded://{folder}/store/events.db"))


async def broker_column(url: str) -> Column:
    abilities = await abilities_of(url)
    return Column(abilities.name, await check_broker(url), abilities)


async def store_column(url: str) -> Column:
    from unlost.testing.postgres_rig import postgres_at  # its driver is an extra

    return Column("postgresql", await check_store(url, postgres_at))


async def all_columns(urls: Sequence[str]) -> tuple[list[Column], list[Column]]:
    broker, store = await embedded_columns()
    databases = [url for url in urls if is_postgres(url)]
    return (
        [broker, *[await broker_column(url) for url in urls if url not in databases]],
        [store, *[await store_column(url) for url in databases]],
    )


def main(out: Path, urls: Sequence[str]) -> int:
    brokers, stores = asyncio.run(all_columns(urls))
    out.write_text(table(brokers, stores))
    broken = [(c.name, r) for c in (*brokers, *stores) for r in c.results if r.verdict == "broken"]
    for name, result in broken:
        print(f"{name}: {result.name}: {result.reason}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m unlost.testing.promises FILE [URL]...")
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
