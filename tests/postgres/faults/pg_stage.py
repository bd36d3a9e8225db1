"""Processes on a real PostgreSQL, made to be killed, and what is found afterwards by those who look.

Children come from a fork server that has imported everything and has one thread, so each is as good as a fresh process
and costs some milliseconds. Whoever looks uses plain psycopg and plain SQLite, and none of the product's code.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import apsw
import psycopg
from child import Child as Process
from child import context
from evidence import Journal
from pg_checker import Counters, Effect, Found, Logged, Ordered, check

from unlost.__main__ import main
from unlost.sqlite.schema import POSITION_BITS
from unlost.store.postgres import migrate
from unlost.store.postgres.settings import parse
from unlost.testing import sabotage

TABLES = """
create table shop_order (
    number bigint generated always as identity, order_id text primary key, customer_id text not null, day text not null,
    cents integer not null
);
-- nothing is unique in here: what took effect twice must be seen, not refused
create table effect (
    number bigint generated always as identity, service text not null, order_id text not null, customer_id text not null,
    day text not null, cents integer not null
);
create table settlement (day text primary key, cents bigint not null, orders integer not null);
create table till (id integer primary key, moved bigint not null);
insert into till select n, 0 from generate_series(0, 7) n;
"""

context.set_forkserver_preload(
    [
        "pytest",
        "apsw",
        "psycopg_pool",
        "unlost",
        "unlost.cli.look",
        "unlost.demo.shop",
        "unlost.store.postgres.store",
        "unlost.testing.sabotage",
    ]
)


def _prepare() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(name)s: %(message)s")
    logging.getLogger("psycopg").setLevel(logging.ERROR)
    plant(os.environ.get(sabotage.VARIABLE, ""))


class Child(Process):
    prepare = staticmethod(_prepare)


def _command(*words: str) -> None:
    """What somebody types after `unlost`."""
    sys.argv = ["unlost", *words]
    sys.exit(main())


def plant(bugs: str) -> None:
    """Lays planted bugs over this process; two lines may guard the same, so there may be two."""
    from unlost.testing import sabotage_postgres

    for bug in filter(None, bugs.split("+")):
        os.environ[sabotage.VARIABLE] = bug
        if not sabotage_postgres.from_environment():
            sabotage.from_environment()


class Machine(NamedTuple):
    """Where processes run: its own folder, which no other machine sees, and how they reach the servers."""

    folder: Path
    broker: str
    dsn: str
    pool: int = 10

    @property
    def store(self) -> str:
        return f"{self.dsn}{'&' if '?' in self.dsn else '?'}pool={self.pool}"


class Stage:
    """A database with the tables of unlost and of a shop, a broker, evidence, and children that come and go."""

    def __init__(self, folder: Path, dsn: str, *, bug: str = "", kafka: tuple[str, str] | None = None) -> None:
        """`dsn` is of those who look, whatever children are put through. `kafka`: bootstrap servers and a prefix; without
        it the broker is the embedded one, in this folder."""
        self.folder = folder
        self.dsn = dsn
        self.bug = bug
        self.kafka = kafka
        self.children: list[Child] = []
        self.evidence = folder / "evidence"
        self.evidence.mkdir(parents=True, exist_ok=True)
        self.log = folder / "stderr.txt"
        self.file = folder / "events.db"
        migrate.migrate(parse(dsn))
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(TABLES)

    def machine(self, name: str = "", *, dsn: str = "", pool: int = 10, options: str = "") -> Machine:
        """With Kafka each machine has a folder of its own; `options` are for the client of Kafka."""
        if self.kafka is None:
            return Machine(self.folder, f"embedded://{self.file}", dsn or self.dsn, pool)
        folder = self.folder / (name or "machine")
        folder.mkdir(exist_ok=True)
        bootstrap, prefix = self.kafka
        return Machine(folder, f"kafka://{bootstrap}?prefix={prefix}{options}", dsn or self.dsn, pool)

    def begin(self, name: str, machine: Machine, work: Callable[..., None], *args: Any) -> Child:
        """Starts a child that calls `work(*args)`, a function at the top of a module."""
        env = {"UNLOST_BROKER": machine.broker, "UNLOST_STORE": machine.store, sabotage.VARIABLE: self.bug}
        child = Child(name, self.log, env, work, args)
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

    # --- looking --------------------------------------------------------------------------------------------------

    @property
    def database(self) -> str:
        return urlsplit(self.dsn).path[1:]

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

    def sql(self, statement: str, *args: Any) -> list[tuple[Any, ...]]:
        """A statement of its own transaction; connecting is tried again while the server is away."""
        end = time.monotonic() + 30
        while True:
            try:
                with psycopg.connect(self.dsn, autocommit=True, connect_timeout=10) as connection:
                    cursor = connection.execute(statement, args or None)
                    return cursor.fetchall() if cursor.description else []
            except psycopg.OperationalError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)

    def effects(self, service: str = "") -> list[Effect]:
        rows = self.sql("select number, service, order_id, customer_id, day, cents from effect order by number")
        found = [Effect(*row) for row in rows]
        return [e for e in found if e.service == service] if service else found

    def orders(self) -> list[Ordered]:
        rows = self.sql("select number, order_id, customer_id, day, cents from shop_order order by number")
        return [Ordered(*row) for row in rows]

    def logged(self) -> list[Logged]:
        """Every event of the broker's log, in the order of each partition, by a plain reader."""
        if self.kafka is None:
            try:
                return list(embedded_log(self.file)) if self.file.exists() else []
            except apsw.SQLError:  # no process has got so far as to make its tables
                return []
        from pg_kafka import kafka_log

        return kafka_log(*self.kafka)

    def ends(self) -> dict[tuple[str, int], int]:
        """The position after the last event of each partition."""
        if self.kafka is None:
            return embedded_ends(self.file) if self.file.exists() else {}
        from pg_kafka import kafka_ends

        return kafka_ends(*self.kafka)

    def open_work(self) -> list[str]:
        """What is still to be done, as the tables say; whether that is true is for the checker to say."""
        if not self.sql("select 1 from unlost.unlost_progress limit 1"):
            return ["nobody has begun"]
        found = [
            f"{count} rows of {table}"
            for table in ("unlost_outbox", "unlost_outbox_status", "unlost_waiting", "unlost_delayed")
            for ((count,),) in (self.sql(f"select count(*) from unlost.{table}"),)
            if count
        ]
        ends = self.ends()
        for service, topic, partition, position in self.sql(
            "select service, topic, partition, position from unlost.unlost_progress"
        ):
            end = ends.get((topic, partition), 0)
            if position < end:
                found.append(f"{service} is at {position} of {end} in {topic}/{partition}")
        return found

    def counters(self) -> Counters:
        shards = self.sql("select shard, next, confirmed from unlost.unlost_relay order by shard")
        (outbox,), (hands,), (waiting,) = (
            self.sql(f"select count(*) from unlost.{table}")[0]
            for table in ("unlost_outbox", "unlost_outbox_status", "unlost_waiting")
        )
        shelf = self.sql("select service, reason, convert_from(data, 'UTF8') from unlost.unlost_shelf")
        marks = dict(self.sql("select service, count(*) from unlost.unlost_inbox group by service"))
        days = {day: (int(cents), n) for day, cents, n in self.sql("select day, cents, orders from settlement")}
        ((moved,),) = self.sql("select sum(moved)::bigint from till")
        return Counters(
            shards=shards, outbox=outbox, hands=hands, waiting=waiting, marks=marks, days=days, moved=moved,
            dead=[(service, reason, json.loads(data)["order_id"]) for service, reason, data in shelf],
        )  # fmt: skip

    def verdict(self, expected: Sequence[Any], services: Sequence[str], **more: Any) -> list[str]:
        """Everything that is wrong: what the checker says, and what `unlost audit` says."""
        found = Found(orders=self.orders(), log=self.logged(), effects=self.effects(), counters=self.counters())
        return [*check(expected, found, services, **more), *self.audit()]

    def audit(self) -> list[str]:
        """`unlost audit --json`, as anybody would run it, in a process of its own."""
        said = self.folder / "audit.json"
        said.unlink(missing_ok=True)
        env = {"UNLOST_BROKER": self.machine().broker, "UNLOST_STORE": self.dsn, sabotage.VARIABLE: ""}
        code = Child("audit", said, env, _command, ("audit", "--json")).wait(120)
        return [f"audit: exit {code}: {said.read_text()[-4000:]}"] if code else []

    def abandoned(self, service: str) -> tuple[list[str], int]:
        """The ids that the last audit named as cut off, and how many more there are."""
        said = json.loads((self.folder / "audit.json").read_text())
        return [m["id"] for m in said["abandoned"] if m["service"] == service], said["abandoned_more"]


@contextlib.contextmanager
def stopped(child: Child) -> Iterator[None]:
    """SIGSTOP for the time of the block."""
    child.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        child.signal(signal.SIGCONT)


# --- the embedded broker's log, read by SQLite alone -----------------------------------------------------------------


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[apsw.Connection]:
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    connection.set_busy_timeout(10_000)
    try:
        connection.execute("begin")  # one snapshot
        yield connection
    finally:
        connection.close()


def embedded_log(path: Path) -> Iterator[Logged]:
    with _reading(path) as c:
        places = {
            first + n: (name, n)
            for name, first, partitions in c.execute("select name, first_number, partitions from unlost_topic")
            for n in range(partitions)
        }
        for at, head, key, data in c.execute("select at, head, key, data from unlost_log order by at"):
            said = json.loads(head)
            topic, partition = places[at >> POSITION_BITS]
            position = at & ((1 << POSITION_BITS) - 1)
            yield Logged(topic, partition, position, said["id"], said["type"], key, json.loads(data))


def embedded_ends(path: Path) -> dict[tuple[str, int], int]:
    with _reading(path) as c:
        ends = {}
        for name, first, partitions in c.execute("select name, first_number, partitions from unlost_topic").fetchall():
            for n in range(partitions):
                low = (first + n) << POSITION_BITS
                (last,) = c.execute(
                    "select max(at) from unlost_log where at >= ? and at < ?", (low, low + (1 << POSITION_BITS))
                ).fetchone()  # fmt: skip
                ends[name, n] = 0 if last is None else last - low + 1
        return ends
