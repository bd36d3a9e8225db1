"""Processes on a real Kafka, made to be killed, and what is found afterwards.

Children come from a fork server that has imported everything and has one thread, so each is as good as a fresh
process (the client of Kafka has threads, which no fork survives) and costs some milliseconds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import apsw
from checker import Contract, check
from child import Child as Process
from child import context
from evidence import Effect, Journal, read
from kafka_books import Note, Unit, balance, noted, positions
from workload import SCHEMA, effects, note_named

from unlost.ops import books as books_module
from unlost.ops.connect import opened
from unlost.testing import sabotage, sabotage_kafka

# what makes a member be missed soon, and still lets a busy machine of two cores breathe
QUICK = "session.timeout.ms=1500&heartbeat.interval.ms=300"

context.set_forkserver_preload(
    ["pytest", "apsw", "confluent_kafka.admin", "unlost", "unlost.ops.shelf", "unlost.brokers.kafka.broker"]
)


def _plant() -> None:
    for bug in os.environ.get(sabotage.VARIABLE, "").split("+"):  # two lines may guard the same
        os.environ[sabotage.VARIABLE] = bug
        if not sabotage_kafka.from_environment():
            sabotage.from_environment()


class Child(Process):
    prepare = staticmethod(_plant)


class Stage:
    """A folder with a store and evidence, a cluster, and children that come and go."""

    def __init__(
        self,
        folder: Path,
        bootstrap: str,
        prefix: str,
        *,
        options: str = QUICK,
        store: str = "events.db",
        inside: str = "",
    ) -> None:
        """`inside`: bootstrap servers for those who look, where what children use is cut and closed."""
        self.folder = folder
        self.bootstrap = bootstrap
        self.inside = inside or bootstrap
        self.prefix = f"{prefix}."
        self.options = options
        self.store = folder / store
        self.children: list[Child] = []
        (folder / "evidence").mkdir(parents=True, exist_ok=True)
        (folder / "schema.sql").write_text(SCHEMA)
        self.log = folder / "stderr.txt"

    @property
    def url(self) -> str:
        return f"kafka://{self.bootstrap}?prefix={self.prefix}" + (f"&{self.options}" if self.options else "")

    @property
    def evidence(self) -> Path:
        return self.folder / "evidence"

    def begin(self, name: str, work: Callable[..., None], *args: Any, env: dict[str, str] | None = None) -> Child:
        """Starts a child that calls `work(*args)`, a function at the top of a module."""
        chosen = {"UNLOST_STORE": f"embedded://{self.store}", "UNLOST_BROKER": self.url, **(env or {})}
        child = Child(name, self.log, chosen, work, args)
        self.children.append(child)
        return child

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self.children:
            child.signal(signal.SIGCONT)
            child.kill()

    def journal(self, name: str) -> Journal:
        return Journal(self.evidence, name)

    # --- looking ------------------------------------------------------------------------------------------------

    def said(self) -> str:
        """What the children have printed."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def until(self, holds: Callable[[], Any], seconds: float = 60, what: str = "") -> Any:
        """Waits for a condition; its value is returned."""
        end = time.monotonic() + seconds
        while True:
            if value := holds():
                return value
            if time.monotonic() > end:
                raise TimeoutError(f"waited {seconds:g} s in vain for {what or holds}\n{self.said()[-3000:]}")
            time.sleep(0.02)

    def completed(self, service: str) -> list[str]:
        """What handlers say to have done, in the order of their files; and the rows of their transactions."""
        return [n.uid for n in read(self.evidence) if n.what == "completed" and n.service == service] + [
            e.uid for e in self.effects() if e.service == service
        ]

    def effects(self) -> list[Effect]:
        try:
            return list(effects(self.folder, self.store.name)) if self.store.exists() else []
        except apsw.SQLError:  # no process has got so far as to make the table
            return []

    def positions(self) -> dict[Unit, int]:
        return positions(self.store)

    def open_work(self) -> list[str]:
        """What is still to be done, as the store and the log say; whether that is true is for the checker to say."""
        return balance(self.store, self.inside, self.prefix, whole=False)

    def drained(self) -> bool:
        return not self.open_work()

    def told(self) -> dict[Unit, tuple[int, Note | None]]:
        """What the groups were told of all units that the store knows."""
        return noted(self.inside, self.prefix, self.positions())

    def committed_ahead(self) -> list[str]:
        """Offsets that the cluster was told beyond what the store has settled. The cluster is asked first."""
        told = self.told()
        settled = self.positions()
        return [
            f"{unit}: the group was told {offset}, the store is at {settled[unit]}"
            for unit, (offset, _) in told.items()
            if offset > settled[unit]
        ]

    def verdict(self, contracts: Sequence[Contract], *, expired: dict[str, set[int]] | None = None) -> list[str]:
        """Everything that is wrong: the checker's anomalies, and books that do not balance.

        `expired`: per service the positions (of one partition) that the product must name as expired, and no others.
        """
        with opened(f"kafka://{self.inside}?prefix={self.prefix}", store=f"embedded://{self.store}") as looking:
            records, log = looking.pair()
            note_named(books_module.books(records, log=log), log, self.folder)
        found = [str(a) for a in check(read(self.evidence), self.effects(), contracts, atomic_batches=False)]
        found += [f"audit: {line}" for line in balance(self.store, self.inside, self.prefix)]
        return found + [f"product audit: {line}" for line in self.audit(expired or {})]

    def audit(self, expired: dict[str, set[int]]) -> list[str]:
        """What `unlost audit` finds, with every event of the log read again."""
        url = f"kafka://{self.inside}?prefix={self.prefix}"
        with opened(url, store=f"embedded://{self.store}") as looking:
            records, log = looking.pair()
            books = books_module.books(records, log=log)
            found = [
                *books.findings,
                *books.unaccountable,
                *map(str, books.missing),
                *books_module.verify(records, log=log),
            ]
            found += [str(r) for r in books.ranges if r.kind != "expired"]
            named: dict[str, set[int]] = {}
            for r in books.ranges:
                named.setdefault(r.service, set()).update(range(r.start, r.end))
            if named != {service: positions for service, positions in expired.items() if positions}:
                found.append(f"named as expired are {named}, and {expired} are")
            if books.unaccounted:
                found.append(f"{books.unaccounted} events are unaccounted for")
            return found


@contextlib.contextmanager
def stopped(child: Child) -> Iterator[None]:
    """SIGSTOP for the time of the block."""
    child.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        child.signal(signal.SIGCONT)
