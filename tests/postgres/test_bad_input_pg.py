"""Databases as they should not be, and people as they are: what is refused, what is said, and that nothing is lost by it.

Every error says what was expected, what was found and what to do; users see no traceback, and nobody sees a password.
"""

from __future__ import annotations

import asyncio
import gc
import io
import logging
import os
import secrets
import socket
import sqlite3
import subprocess
import sys
import textwrap
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import outbox_kit as kit
import psycopg
import pytest
import session_kit
import sqlalchemy
from outbox_kit import Arrivals, Noted, Placed, Work, fresh, ids, until
from psycopg import sql
from sqlalchemy.orm import Session

from servers.pgbouncer import PgBouncer
from servers.postgres import Postgres
from unlost import App, Context, Event, Reject, Retry, Service, Unavailable, UnlostError, UsageError
from unlost.delivery.service import Guarantee
from unlost.events import Envelope, seal
from unlost.store.postgres import migrate
from unlost.store.postgres.schema import FORMAT, PUBLISHES
from unlost.store.postgres.settings import parse

CANARY = "c4n4ry-S3cret"


class Made:
    """What a test has: databases, roles and a broker's file of its own, and Apps over them."""

    def __init__(self, postgres: Postgres, folder: Path) -> None:
        self.postgres = postgres
        self.folder = folder
        self.broker = f"embedded://{folder / 'events.db'}"
        self.apps: list[App] = []
        self._databases: list[str] = []
        self._roles: list[str] = []

    def database(self, tables: bool = True, schema: str = "") -> str:
        url = self.postgres.fresh()
        self._databases.append(urlsplit(url).path[1:])
        if schema:
            url += f"?schema={schema}"
        if tables:
            migrate.migrate(parse(url))
        return url

    def role(self, url: str, *grants: str) -> str:
        """A role of its own with these rights; returns the URL with which it logs in."""
        name = fresh("role").replace("-", "_")
        self._roles.append(name)
        self.sql(url, f"create role {name} login password '{CANARY}'")
        for grant in grants:
            self.sql(url, grant.format(role=name))
        parts = urlsplit(url)
        return parts._replace(netloc=f"{name}:{CANARY}@{parts.hostname}:{parts.port}").geturl()

    def sql(self, url: str, statement: str) -> list[Any]:
        return self.postgres.sql(statement, database=urlsplit(url).path[1:])

    def app(self, *services: Service, store: str, **more: Any) -> App:
        app = App(*services, store=store, broker=more.pop("broker", self.broker), **more)
        self.apps.append(app)
        return app

    def end(self) -> None:
        kit.close(*self.apps)
        for name in self._databases:
            self.postgres.drop_database(name)
        for name in self._roles:
            self.postgres.sql(f"drop role {name}")


@pytest.fixture
def made(postgres: Postgres, tmp_path: Path) -> Iterator[Made]:
    here = Made(postgres, tmp_path)
    yield here
    here.end()


def enter(app: App) -> None:
    """Connects, as a start does."""

    async def main() -> None:
        async with app:
            pass

    asyncio.run(main())


def refused(app: App) -> UnlostError:
    """What a start ends with."""
    with pytest.raises(UnlostError) as caught:
        enter(app)
    check_text(caught.value)
    return caught.value


def check_text(error: UnlostError) -> None:
    """Expected, found, what to do; and no secrets anywhere in it or behind it."""
    assert error.code.startswith("UL") and error.what and error.found and error.fix, str(error)
    whole = "".join(traceback.format_exception(error)) + repr(error) + repr(error.args)
    assert CANARY not in whole


def publish(app: App, url: str, **more: Any) -> None:
    """As a web request does."""
    with psycopg.connect(url, **more) as connection, app.outbox(connection) as outbox:
        outbox.publish(Placed(order_id="a"), id=fresh())


# --- what is there at the start --------------------------------------------------------------------------------------


def no_tables(made: Made) -> tuple[str, str]:
    return made.database(tables=False), "unlost store migrate makes them"


def newer(made: Made) -> tuple[str, str]:
    url = made.database()
    made.sql(url, f"update unlost.unlost_meta set value = '{FORMAT + 1}' where name = 'format'")
    return url, "pip install -U unlost"


def older(made: Made) -> tuple[str, str]:
    url = made.database()
    made.sql(url, "update unlost.unlost_meta set value = '0' where name = 'format'")
    return url, "unlost store migrate brings them up to date"


def foreign_tables(made: Made) -> tuple[str, str]:
    url = made.database(tables=False)
    made.sql(url, "create schema unlost")
    made.sql(url, "create table unlost.unlost_outbox (id integer)")
    return url, "name another schema (?schema=…)"


def a_table_is_missing(made: Made) -> tuple[str, str]:
    url = made.database()
    made.sql(url, "drop table unlost.unlost_gap")
    return url, "name another schema (?schema=…)"


def a_column_is_missing(made: Made) -> tuple[str, str]:
    url = made.database()
    made.sql(url, "alter table unlost.unlost_process drop column seen")
    return url, "unlost store migrate"


def no_format(made: Made) -> tuple[str, str]:
    url = made.database()
    made.sql(url, "delete from unlost.unlost_meta where name = 'store_id'")
    return url, "restore the one that was there"


def no_rights(made: Made) -> tuple[str, str]:
    url = made.database()
    return made.role(url), "unlost store migrate --sql --role "


def a_right_is_missing(made: Made) -> tuple[str, str]:
    url = made.database()
    usage = "grant usage on schema unlost to {role}"
    tables = "grant select, insert, update, delete on all tables in schema unlost to {role}"
    return made.role(url, usage, tables, "revoke delete on unlost.unlost_inbox from {role}"), "--role role_"


def read_only(made: Made) -> tuple[str, str]:
    url = made.database()
    made.sql(url, f"alter database {urlsplit(url).path[1:]} set default_transaction_read_only = on")
    return url, "default_transaction_read_only = off"


def not_utf8(made: Made) -> tuple[str, str]:
    name = fresh("latin").replace("-", "_")
    made.postgres.sql(f"create database {name} encoding 'LATIN1' template template0 locale 'C'")
    made._databases.append(name)
    return made.postgres.url(name), "encoding 'UTF8' template template0"


def no_such_database(made: Made) -> tuple[str, str]:
    return made.postgres.url("nowhere"), "create it; unlost store migrate"


def wrong_password(made: Made) -> tuple[str, str]:
    url = made.role(made.database())
    return url.replace(CANARY, CANARY + "x"), "check user and password"


def nobody_listens(made: Made) -> tuple[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return f"postgresql://ann:{CANARY}@127.0.0.1:{port}/shop", "is the server there"


DATABASES: dict[Callable[[Made], tuple[str, str]], str] = {
    no_tables: "UL1160",
    newer: "UL1158",
    older: "UL1159",
    foreign_tables: "UL1161",
    a_table_is_missing: "UL1161",
    a_column_is_missing: "UL1160",
    no_format: "UL1161",
    no_rights: "UL1162",
    a_right_is_missing: "UL1162",
    read_only: "UL1163",
    not_utf8: "UL1165",
    no_such_database: "UL1167",
    wrong_password: "UL1166",
    nobody_listens: "UL2012",
}


@pytest.mark.parametrize("make", DATABASES, ids=lambda make: make.__name__)
def test_what_is_no_store_is_refused_at_the_start(make: Callable[[Made], tuple[str, str]], made: Made) -> None:
    url, fix = make(made)
    error = refused(made.app(Arrivals().service, store=url))
    assert error.code == DATABASES[make]
    assert fix in error.fix
    assert isinstance(error, Unavailable if make is nobody_listens else UsageError)


NO_OUTBOX = [no_tables, foreign_tables, no_rights, no_such_database, wrong_password, nobody_listens]


@pytest.mark.parametrize("make", NO_OUTBOX, ids=lambda make: make.__name__)
def test_app_outbox_refuses_it_too(make: Callable[[Made], tuple[str, str]], made: Made) -> None:
    """The transaction that it would have been part of goes on."""
    url, fix = make(made)
    app = made.app(store=url)
    own = made.postgres.url(made._databases[0] if make not in (no_such_database, nobody_listens) else "postgres")
    with psycopg.connect(own) as connection:
        connection.execute("create temporary table row (id integer)")
        with pytest.raises(UnlostError) as caught, app.outbox(connection) as outbox:
            outbox.publish(Placed(order_id="a"))
        connection.execute("insert into row values (1)")
        connection.commit()
        assert connection.execute("select * from row").fetchall() == [(1,)]
    check_text(caught.value)
    assert (caught.value.code, fix in caught.value.fix) == (DATABASES[make], True) or make is foreign_tables


URLS = {
    "postgresql://": "UL1157",
    "postgresql://host": "UL1157",
    "postgresql://host/": "UL1157",
    "postgresql://host/shop?port=here": "UL1157",
    "postgresql://[::1/shop": "UL1157",
    "postgresql://host/shop?nonsense=1": "UL1157",
    "postgresql://host/shop?pool=0": "UL1157",
    "postgresql://host/shop?pool=many": "UL1157",
    "postgresql://host/shop?schema=": "UL1157",
    'postgresql://host/shop?schema="a"': "UL1157",
    "postgresql://host/shop?schema=a;drop%20table%20b": "UL1157",
    "postgresql://host/shop?schema=a.b": "UL1157",
    "postgresql://host/shop?schema=" + "x" * 64: "UL1157",
    "postgresql://host/shop?schema=größe": "UL1157",
    "postgresql://host/shop?connect_timeout=soon": "UL1157",
    "postgresql://host/shop?sslmode=perhaps": "UL1157",
    "postgresql://host/shop%00": "UL1157",
    "postgres:shop": "UL1157",
    "mysql://host/shop": "UL1233",
    "sqlite:///shop.db": "UL1233",
    "shop.db": "UL1233",
}


@pytest.mark.parametrize("url", URLS)
def test_urls_that_mean_nothing(url: str, made: Made) -> None:
    secret = url.replace("://host", f"://ann:{CANARY}@127.0.0.1:1")
    error = refused(made.app(store=secret))
    assert error.code == URLS[url]
    app, failed = made.app(store=secret), pytest.raises(UnlostError)
    with psycopg.connect(made.postgres.url()) as connection, failed as caught, app.outbox(connection):
        raise AssertionError
    check_text(caught.value)
    assert caught.value.code == ("UL1262" if URLS[url] == "UL1233" else URLS[url])
    if not secret.startswith("postgres"):
        return
    with pytest.raises(UnlostError) as caught:
        migrate.migrate(parse(secret))
    check_text(caught.value)


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("mysql://ann:{canary}@host/shop", "UL1261"),
        ("sqlite://shop.db", "UL1261"),
        ("sqlite:///", "UL1261"),
        ("sqlite:///shop.db?password={canary}", "UL1261"),
        ("sqlite:////nowhere/at/all/shop.db", "UL2016"),
        ("sqlite:///{folder}/text", "UL1260"),
        ("sqlite:///{folder}", "UL2016"),
        ("postgresql://ann:{canary}@127.0.0.1:1/shop", "UL2012"),
    ],
)
def test_outboxes_that_mean_nothing(url: str, code: str, made: Made) -> None:
    (made.folder / "text").write_text("no database\n" * 100)
    given = url.format(canary=CANARY, folder=made.folder)
    app = App(outboxes=[given], broker=made.broker, store="")
    error = refused(app)
    assert error.code == code


def test_an_outbox_that_cannot_be_opened_leaves_nothing_behind(made: Made) -> None:
    """Of several, the first was open already."""
    good, bad = made.database(), made.database(tables=False)
    error = refused(App(outboxes=[good, bad], broker=made.broker, store=""))
    assert error.code == "UL1160"
    gc.collect()  # a connection that nobody closed would say so here
    name = urlsplit(good).path[1:]
    until(lambda: not made.postgres.sql("select 1 from pg_stat_activity where datname = %s", name), "all have left")


# --- the password ----------------------------------------------------------------------------------------------------

SHOP = """
    from unlost import App, Context, Event, Service

    class OrderPlaced(Event, key="order_id"):
        order_id: str

    billing = Service("billing", guarantee="effectively-once")

    @billing.on(OrderPlaced)
    async def charge(order: OrderPlaced, ctx: Context) -> None:
        async with ctx.transaction() as db:
            await db.execute("select 1")
        print("charged", order.order_id, flush=True)

    app = App(billing, name="shop")
"""


class Shell:
    """`unlost` in a folder with `shop.py`."""

    def __init__(self, made: Made, store: str) -> None:
        self.folder = made.folder
        (self.folder / "shop.py").write_text(textwrap.dedent(SHOP))
        kept = {k: v for k, v in os.environ.items() if not k.startswith("UNLOST_")}
        self.env = {**kept, "UNLOST_BROKER": made.broker, "UNLOST_STORE": store, "UNLOST_LOG": "debug", "TERM": "dumb"}

    def __call__(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "unlost", *arguments], cwd=self.folder, env={**self.env, **env},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert "Traceback" not in done.stdout + done.stderr, done.stderr
        assert CANARY not in done.stdout + done.stderr
        return done


@pytest.mark.parametrize(
    "make", [no_tables, wrong_password, read_only, a_right_is_missing, nobody_listens], ids=lambda m: m.__name__
)
def test_unlost_run_says_it_and_ends(make: Callable[[Made], tuple[str, str]], made: Made) -> None:
    url, fix = make(made)
    done = Shell(made, url)("run", "shop")
    assert done.returncode == (4 if make is nobody_listens else 2), done.stderr
    assert DATABASES[make] in done.stderr
    assert "found: " in done.stderr and "do:    " in done.stderr
    assert fix in " ".join(done.stderr.split())
    assert done.stdout == ""


def test_a_service_with_the_wrong_session_ends_with_exit_code_2(made: Made) -> None:
    """The event stays where it is; what is said is for people."""
    url, other = made.database(), made.database()
    shell = Shell(made, url)
    text = textwrap.dedent(SHOP).replace(
        "ctx.transaction()", "await psycopg.AsyncConnection.connect(URL) as c, ctx.transaction(c)"
    )
    (made.folder / "shop.py").write_text(f"import psycopg\nURL = {other!r}\n{text}")
    published = shell("publish", "OrderPlaced", "order_id=A1", "--app", "shop")
    assert published.returncode == 0, published.stderr
    done = shell("run", "shop")
    assert done.returncode == 2, done.stderr
    assert "UL1253" in done.stderr and "do:    " in done.stderr
    assert made.sql(url, "select count(*) from unlost.unlost_shelf") == [(0,)]
    assert made.sql(url, "select sum(position)::integer from unlost.unlost_progress") == [(0,)]


def test_nobody_sees_the_password(made: Made, caplog: pytest.LogCaptureFixture) -> None:
    """Whether it is right or wrong: in no output, log, error or repr; nor in what `unlost config` says."""
    caplog.set_level(logging.DEBUG)
    url = made.database()
    everything = ("grant usage on schema unlost to {role}", "grant all on all tables in schema unlost to {role}")
    right = made.role(url, *everything)
    wrong = right.replace(CANARY, CANARY + "-wrong")
    shell = Shell(made, right)
    config = shell("config")
    assert ":***@" in config.stdout
    secret = made.folder / "secret"
    secret.write_text(right)
    from_file = shell("config", UNLOST_STORE="", UNLOST_STORE_FILE=str(secret))
    assert ":***@" in from_file.stdout
    for store in (right, wrong):
        for command in (
            ["status"],
            ["doctor"],
            ["store", "migrate", "--dry-run"],
            ["publish", "OrderPlaced", "order_id=A", "--app", "shop"],
        ):
            shell(*command, UNLOST_STORE=store)

    app = made.app(Arrivals().service, store=right)
    with Work(app) as work, psycopg.connect(url) as connection:
        with app.outbox(connection) as outbox:
            outbox.publish(Placed(order_id="a"), id=(id := fresh()))
        connection.commit()
        until(lambda: not made.sql(url, "select 1 from unlost.unlost_outbox"), id)
        for thing in (
            app,
            app.store,
            app.store.place,
            app.outbox(connection),
            parse(right),
            parse(right).shown,
            work.app.url,
        ):
            assert CANARY not in repr(thing) + str(thing)
        made.postgres.terminate_backends("usename like 'role_%%'", database=urlsplit(url).path[1:])
        work.call(app.publish(Placed(order_id="b")))
    refused(made.app(store=wrong))
    assert CANARY not in caplog.text
    assert any(record.name.startswith("unlost") for record in caplog.records), "nothing was logged: this proves nothing"


# --- rights ----------------------------------------------------------------------------------------------------------


def test_a_role_that_only_publishes(made: Made) -> None:
    """With the rights that the documentation names, and no other."""
    url = made.database()
    grants = ["grant usage on schema unlost to {role}", "grant select on unlost.unlost_outbox to {role}"]
    grants += [f"grant {right} on unlost.unlost_{table} to {{role}}" for table, right in PUBLISHES.items()]
    grants += ["create table public.row (id text)", "grant insert on public.row to {role}"]
    web = made.role(url, *grants)
    arrivals = Arrivals()
    app = made.app(store=web, name="web")
    with Work(made.app(arrivals.service, store=url)):
        with psycopg.connect(web) as connection, app.outbox(connection) as outbox:
            connection.execute("insert into row values ('a')")
            outbox.publish(Placed(order_id="a"), id=(one := fresh()))
        many = [fresh() for _ in range(10)]
        with psycopg.connect(web) as connection, app.outbox(connection) as outbox:
            for id in many:
                outbox.publish(Noted(text=id), id=id)
        assert len(arrivals.of(one, *many)) == 11
    assert refused(made.app(arrivals.service, store=web)).code == "UL1162"
    for statement in ("delete from unlost.unlost_outbox", "insert into unlost.unlost_meta values ('a', 'b')"):
        with psycopg.connect(web) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(statement)


def test_the_rights_that_the_script_gives_are_enough(made: Made) -> None:
    """For a service, and, with the lines of the comment, for a process that only publishes."""
    url = made.database(tables=False)
    service, web = made.role(url), made.role(url)
    for role in (service, web):
        made.sql(
            url, migrate.script(parse(url), found=0 if role is service else FORMAT, role=urlsplit(role).username or "")
        )
    text = migrate.script(parse(url), role=urlsplit(web).username or "")
    made.sql(url, f"revoke all on all tables in schema unlost from {urlsplit(web).username}")
    for line in text.splitlines():
        if line.startswith("--   grant "):
            made.sql(url, line.removeprefix("--   "))
    arrivals = Arrivals()
    with Work(made.app(arrivals.service, store=service)):
        app = made.app(store=web)
        with psycopg.connect(web) as connection, app.outbox(connection) as outbox:
            outbox.publish(Placed(order_id="a"), id=(id := fresh()))
        arrivals.of(id)


# --- poolers ---------------------------------------------------------------------------------------------------------


def test_a_pooler_that_shares_sessions(made: Made, pgbouncer: PgBouncer) -> None:
    """The store refuses it. `app.outbox` works through it, both for the program's connection and for ours."""
    url = made.database()
    arrivals = Arrivals()
    pooled = pgbouncer.via(url)
    error = refused(made.app(arrivals.service, store=pooled))
    assert error.code == "UL1164" and "app.outbox(connection) works through any pooler" in error.fix
    with Work(made.app(arrivals.service, store=url)):
        app, sent = made.app(store=pooled, name="web"), []
        engine = sqlalchemy.create_engine(
            session_kit.engine_url(pooled, "psycopg"), connect_args={"prepare_threshold": None}
        )
        for n in range(12):
            sent.append(fresh())
            if n % 2:
                with psycopg.connect(pooled, prepare_threshold=None) as connection, app.outbox(connection) as outbox:
                    outbox.publish(Placed(order_id="a", n=n), id=sent[-1])
            else:
                with Session(engine) as session, session.begin(), app.outbox(session) as outbox:
                    outbox.publish(Placed(order_id="a", n=n), id=sent[-1])
            arrivals.of(sent[-1])
        engine.dispose()
        assert ids(arrivals.of(*sent)) == sent


def test_the_relays_are_called_through_any_pooler(
    made: Made, pgbouncer: PgBouncer, caplog: pytest.LogCaptureFixture
) -> None:
    """Each call may go through another session of the server, where nothing has been prepared."""
    caplog.set_level(logging.DEBUG, "unlost.outbox")
    url = made.database()
    app = made.app(store=pgbouncer.via(url), name="web")
    heard = 0
    with psycopg.connect(url, autocommit=True) as listener, psycopg.connect(pgbouncer.via(url)) as other:
        listener.execute(sql.SQL("listen {}").format(sql.Identifier(parse(url).channel)))
        for n in range(12):
            if n % 2:
                other.execute("select 1")  # keeps a session of the server for itself
            publish(app, url)
            heard += len(list(listener.notifies(timeout=10, stop_after=1)))
            other.rollback()
    assert heard == 12
    assert "could not be called" not in caplog.text


def test_a_pooler_in_session_mode(made: Made, pgbouncer_session: PgBouncer) -> None:
    url = pgbouncer_session.via(made.database())
    arrivals = Arrivals()
    with Work(made.app(arrivals.service, store=url)):
        app = made.app(store=url)
        with psycopg.connect(url) as connection, app.outbox(connection) as outbox:
            outbox.publish(Placed(order_id="a"), id=(id := fresh()))
        arrivals.of(id)


# --- schemas, stores and brokers -------------------------------------------------------------------------------------


def test_two_services_in_one_database_with_two_schemas(made: Made) -> None:
    """Capitals and names of our own tables are no trouble; neither sees anything of the other."""
    first = made.database(schema="Billing")
    second = first.replace("=Billing", "=unlost_outbox")
    migrate.migrate(parse(second))
    one, two = Arrivals("one"), Arrivals("two")
    brokers = [f"embedded://{made.folder / name}.db" for name in ("one", "two")]
    with (
        Work(made.app(one.service, store=first, broker=brokers[0])),
        Work(made.app(two.service, store=second, broker=brokers[1])),
    ):
        sent = {}
        for store, broker in zip((first, second), brokers, strict=True):
            app = made.app(store=store, broker=broker)
            with psycopg.connect(first.partition("?")[0]) as connection, app.outbox(connection) as outbox:
                outbox.publish(Placed(order_id="a"), id=fresh(store[-3:]))
                outbox.publish(Placed(order_id="a"), id=(sent.setdefault(store, fresh(store[-3:]))))
        assert len(one.of(sent[first])) == len(two.of(sent[second])) == 1
        until(lambda: len(one.envelopes) + len(two.envelopes) == 4, "all have come")
    assert {e.id[:3] for e in one.envelopes} == {"ing"}
    assert {e.id[:3] for e in two.envelopes} == {"box"}


def test_one_store_for_several_services(made: Made) -> None:
    """In one App, and in two that run side by side."""
    url = made.database()
    one, two, three = Arrivals("one"), Arrivals("two"), Arrivals("three")
    with Work(made.app(one.service, two.service, store=url)), Work(made.app(three.service, store=url)):
        app = made.app(store=url)
        with psycopg.connect(url) as connection, app.outbox(connection) as outbox:
            outbox.publish(Placed(order_id="a"), id=(id := fresh()))
        for service in (one, two, three):
            assert len(service.of(id)) == 1
    done = made.sql(
        url, "select service, sum((counts::json ->> 'done')::integer) from unlost.unlost_progress group by 1 order by 1"
    )
    assert done == [("one", 1), ("three", 1), ("two", 1)]


def test_a_store_belongs_to_one_broker(made: Made) -> None:
    url = made.database()
    enter(made.app(Arrivals().service, store=url))
    error = refused(made.app(Arrivals().service, store=url, broker=f"embedded://{made.folder / 'other.db'}"))
    assert error.code == "UL1133"
    assert "another schema: ?schema=…" in error.fix
    error = refused(App(outboxes=[url], broker=f"embedded://{made.folder / 'third.db'}", store=""))
    assert error.code == "UL1133"


@pytest.mark.parametrize("first", ["PostgreSQL", "the file"])
def test_a_service_does_not_change_its_store(first: str, made: Made) -> None:
    """It would begin anew, and handle everything again."""
    stores = [made.database(), ""] if first == "PostgreSQL" else ["", made.database()]
    arrivals = Arrivals()
    with Work(made.app(arrivals.service, store=stores[0])) as work:
        work.call(work.app.publish(Placed(order_id="a"), id="a"))
        arrivals.of("a")
    with pytest.raises(UsageError) as caught, Work(made.app(Arrivals().service, store=stores[1])) as work:
        work.ended()
    check_text(caught.value)
    assert caught.value.code == "UL1135"
    other = Arrivals("another")  # which has never been here
    with Work(made.app(other.service, store=stores[1])) as work:
        other.of("a")


def test_a_service_does_not_move_to_another_database(made: Made) -> None:
    first, second = made.database(), made.database()
    arrivals = Arrivals()
    with Work(made.app(arrivals.service, store=first)) as work:
        work.call(work.app.publish(Placed(order_id="a"), id="a"))
        arrivals.of("a")
    with pytest.raises(UsageError) as caught, Work(made.app(Arrivals().service, store=second)) as work:
        work.ended()
    check_text(caught.value)
    assert caught.value.code in ("UL1132", "UL1135")


def test_the_embedded_broker_has_no_store_in_another_file(made: Made) -> None:
    assert refused(made.app(store=f"embedded://{made.folder / 'store.db'}")).code == "UL1233"


# --- tables of the user's --------------------------------------------------------------------------------------------


def schema(made: Made, text: str) -> Path:
    path = made.folder / "schema.sql"
    path.write_text(text)
    return path


def test_the_schema_of_an_app(made: Made) -> None:
    """Made once, by whoever comes first; `?` and `%` are what they are in PostgreSQL; changed, it is applied again."""
    url = made.database()
    text = """
        create table if not exists payment (id text check (id like '%'), cents integer check (cents % 1 = 0), data jsonb);
        create index if not exists payment_data on payment (id) where data ? 'a';
        comment on table payment is 'unlost_outbox ? %s';
    """
    for _ in range(2):
        enter(made.app(store=url, schema=schema(made, text)))
    enter(made.app(store=url, schema=schema(made, text + "alter table payment add column paid timestamptz;")))
    columns = made.sql(
        url, "select column_name from information_schema.columns where table_name = 'payment' order by 1"
    )
    assert columns == [("cents",), ("data",), ("id",), ("paid",)]

    class Paid(Event, key="order_id", topic="paid"):
        order_id: str

    service, seen = Service("payment", guarantee="effectively-once"), list[Any]()

    @service.on(Paid)
    async def pay(event: Paid, ctx: Context) -> None:
        async with ctx.transaction() as db:
            await db.execute("insert into payment values (?, 7)", (event.order_id,))
            seen.extend(await db.execute("select cents % 4, '{\"a\": 1}'::jsonb ? 'a' from payment where id like 'o%'"))

    app = made.app(service, store=url)
    with Work(app) as work:
        work.call(app.publish(Paid(order_id="o1")))
        until(lambda: seen == [(3, True)], "it is handled")


@pytest.mark.parametrize("statement", ["create table (", "select 1/0", "insert into nowhere values (1)"])
def test_a_schema_that_is_wrong(statement: str, made: Made) -> None:
    url = made.database()
    error = refused(made.app(store=url, schema=schema(made, f"create table early (id integer); {statement};")))
    assert error.code == "UL1235"
    assert made.sql(url, "select to_regclass('early')") == [(None,)]


def test_a_schema_without_the_right_to_create(made: Made) -> None:
    url = made.database()
    role = made.role(
        url, "grant usage on schema unlost to {role}", "grant all on all tables in schema unlost to {role}"
    )
    error = refused(made.app(store=role, schema=schema(made, "create table mine (id integer)")))
    assert error.code == "UL1235"
    assert "make your tables yourself" in error.fix


# --- connections -----------------------------------------------------------------------------------------------------


def test_a_connection_to_another_database(made: Made) -> None:
    """It is seen before anything is written there; the transaction fails, with all that is in it."""
    url, other, bare = made.database(), made.database(), made.database(tables=False)
    app = made.app(store=url)
    with pytest.raises(UsageError) as caught:
        publish(app, other)
    check_text(caught.value)
    assert caught.value.code == "UL1253"
    assert made.sql(other, "select count(*) from unlost.unlost_outbox") == [(0,)]
    with pytest.raises((UsageError, psycopg.Error), match=r"UL1253|unlost_outbox"):
        publish(app, bare)


def test_a_database_that_no_relay_looks_at(made: Made) -> None:
    path = made.folder / "shop.db"
    cases: list[tuple[App, Any]] = [
        (App(store="", broker=made.broker), psycopg.connect(made.postgres.url())),
        (App(store=made.postgres.url(), broker=made.broker), sqlite3.connect(path)),
        (App(store="", broker=made.broker, outboxes=[f"sqlite:///{made.folder}/other.db"]), sqlite3.connect(path)),
        (App(store="", broker=made.broker, outboxes=[f"sqlite:///{path}"]), sqlite3.connect(":memory:")),
    ]
    for app, connection in cases:
        with closing(connection), pytest.raises(UsageError) as caught, app.outbox(connection):
            raise AssertionError
        check_text(caught.value)
        assert caught.value.code == "UL1262"


def test_what_is_no_connection(made: Made) -> None:
    engine = sqlalchemy.create_engine(session_kit.engine_url(made.postgres.url(), "psycopg"))
    app = made.app(store=made.postgres.url())
    for thing in (None, made.postgres.url(), object(), engine, psycopg.Connection, io.BytesIO(), [1], app):
        with pytest.raises(UsageError) as caught:
            app.outbox(thing)
        assert caught.value.code == "UL1251"
        assert caught.value.found and caught.value.fix
        assert (urlsplit(made.postgres.url()).password or "?") not in str(caught.value)
    engine.dispose()


# --- effects once ----------------------------------------------------------------------------------------------------


def test_a_request_that_is_sent_again(made: Made) -> None:
    """With the id of the request, the effect happens once, although the events are two."""
    url = made.database()
    made.sql(url, "create table effect (id text)")

    class Ordered(Event, key="order_id", topic="ordered"):
        order_id: str

    def service(name: str, guarantee: Guarantee) -> Service:
        made_here = Service(name, guarantee=guarantee)

        @made_here.on(Ordered)
        async def handle(event: Ordered, ctx: Context) -> None:
            async with ctx.transaction() as db:
                await db.execute("insert into effect values (?)", (f"{name} {event.order_id}",))

        return made_here

    web = made.app(store=url, name="web")

    def request(order: str, text: str = "") -> None:
        with psycopg.connect(url) as connection, web.outbox(connection) as outbox:
            outbox.publish(Ordered(order_id=order + text), id=f"{order}-placed")

    with Work(made.app(service("once", "effectively-once"), service("twice", "at-least-once"), store=url)):
        for order in ("a", "b", "a", "a", "b"):
            request(order)
        request("c")
        until(lambda: made.sql(url, "select 1 from effect where id = 'once c'"), "the last one is handled")
        until(lambda: len(made.sql(url, "select 1 from effect where id like 'twice%%'")) == 6, "and for the other one")
        request("c", "!")  # the same id for another event: never dropped
        until(
            lambda: made.sql(url, "select 1 from unlost.unlost_shelf where reason = 'id_reused'"), "it is on the shelf"
        )
    effects = Counter(id for (id,) in made.sql(url, "select id from effect"))
    assert {id: count for id, count in effects.items() if id.startswith("once")} == {
        "once a": 1,
        "once b": 1,
        "once c": 1,
    }
    assert effects["twice a"] == 3 and effects["twice b"] == 2


def test_effects_once_want_the_database_of_the_store(made: Made) -> None:
    """Where a service says which database is its own, that is checked before anything is handled."""
    url, other, bare = made.database(), made.database(), made.database(tables=False)

    def app(database: str, guarantee: Guarantee = "effectively-once", **more: Any) -> App:
        service = Service("payment", guarantee=guarantee, database=database)
        service.on(Placed)(lambda event: None)
        return made.app(service, store=more.pop("store", url), **more)

    for database in (other, bare, f"sqlite:///{made.folder}/shop.db"):
        error = refused(app(database))
        assert error.code == "UL1263"
    assert refused(app(url, store="", broker=f"embedded://{made.folder}/a.db")).code == "UL1263"
    enter(app(url))
    enter(app(other, "at-least-once"))
    file = f"sqlite:///{made.folder}/shop.db"
    enter(app(file, outboxes=[file]))


# --- events as others make them --------------------------------------------------------------------------------------


def test_attributes_that_postgres_cannot_store_as_text(made: Made) -> None:
    """Anybody may put a zero into a header. It holds up nothing: not the handler that publishes, not the shelf."""
    url = made.database()
    arrivals, service = Arrivals("after"), Service("hostile", retry=Retry(attempts=1))

    class Sent(Event, key="id", topic="hostile"):
        id: str
        how: str

    @service.on(Sent)
    async def handle(event: Sent, ctx: Context) -> None:
        ctx.publish(Placed(order_id=event.id))
        if event.how == "fails":
            raise ValueError("a\0b")
        if event.how == "in a transaction":
            async with ctx.transaction():
                pass

    app = made.app(service, arrivals.service, store=url)
    cases = [
        msgspec.structs.replace(
            seal(Sent(id=f"{attribute} {how}", how=how), source="x", id=fresh(), now=0), **{attribute: "a\0b"}
        )
        for attribute in (
            "correlationid",
            "causationid",
            "traceparent",
            "tracestate",
            "subject",
            "partitionkey",
            "dataschema",
        )
        for how in ("returns", "fails", "in a transaction")
    ]
    with Work(app) as work:
        work.call(app.accept(cases))
        for case in cases:
            if b"fails" not in (case.key or b""):
                (came,) = arrivals.of_key((case.key or b"").decode(), 1)
                assert came.causationid == case.id
        until(
            lambda: made.sql(url, "select count(*) from unlost.unlost_shelf") == [(7,)], "the others are on the shelf"
        )
        assert work.error is None


@pytest.mark.parametrize("what", ["id", "source", "key"])
def test_what_is_larger_than_an_index_takes(what: str, made: Made) -> None:
    """Ids, sources and keys of others may be long. They are handled, retried, shelved and recognised as any other."""
    url = made.database()
    service = Service("large", guarantee="effectively-once", retry=Retry(attempts=2, first=60))
    seen: list[str] = []

    class Sent(Event, key="id", topic="large"):
        id: str
        how: str

    @service.on(Sent)
    async def handle(event: Sent, ctx: Context) -> None:
        seen.append(event.how)
        if event.how == "waits":
            raise ValueError
        if event.how == "is rejected":
            raise Reject("no")
        if event.how == "in a transaction":
            async with ctx.transaction():
                pass

    def event(how: str) -> Envelope:
        sealed = seal(Sent(id=how, how=how), source="x", id=fresh(), now=0)
        large = f"{how} {secrets.token_urlsafe(6000)}"  # so much that no compression helps
        return msgspec.structs.replace(sealed, **{what: large.encode() if what == "key" else large})

    cases = [event(how) for how in ("returns", "in a transaction", "is rejected", "waits")]
    again = [msgspec.structs.replace(case) for case in cases[:2]]
    app = made.app(service, store=url)
    with Work(app) as work:
        work.call(app.accept(cases))
        until(lambda: made.sql(url, "select count(*) from unlost.unlost_shelf") == [(1,)], "one is on the shelf")
        until(lambda: made.sql(url, "select count(*) from unlost.unlost_waiting") == [(1,)], "one waits")
        work.call(app.accept(again))
        until(lambda: "duplicate" in str(made.sql(url, "select counts from unlost.unlost_progress")), "they are known")
        made.sql(url, "update unlost.unlost_waiting set due = 0")
    with Work(made.app(service, store=url)) as work:
        until(
            lambda: made.sql(url, "select count(*) from unlost.unlost_shelf") == [(2,)], "it has come back, and failed"
        )
    assert sorted(seen) == ["in a transaction", "is rejected", "returns", "waits", "waits"]
    assert sorted(made.sql(url, f"select length({what}) > 6000 from unlost.unlost_shelf")) == [(True,), (True,)]


# --- when the database goes away -------------------------------------------------------------------------------------


def test_the_database_goes_away_and_comes_back(tmp_path: Path) -> None:
    """Services wait, requests fail with their own transaction, and nothing is lost or done twice."""
    with Postgres.start(own=True) as postgres:
        made = Made(postgres, tmp_path)
        url = made.database()
        made.sql(url, "create table effect (id text)")
        service = Service("effects", guarantee="effectively-once")

        @service.on(Placed)
        async def handle(event: Placed, ctx: Context) -> None:
            async with ctx.transaction() as db:
                await db.execute("insert into effect values (?)", (event.order_id,))

        web, sent = made.app(store=url), []

        def request() -> None:
            order = fresh()
            with psycopg.connect(url, connect_timeout=5) as connection, web.outbox(connection) as outbox:
                outbox.publish(Placed(order_id=order))
            sent.append(order)

        def handled() -> bool:
            return len(made.sql(url, "select 1 from effect")) >= len(sent)

        app = made.app(service, store=url)
        with Work(app) as work:
            request()
            until(handled, "the first one")
            postgres.immediate_stop()
            with pytest.raises(psycopg.OperationalError):
                request()
            direct = fresh()
            work.call(app.publish(Placed(order_id=direct)))  # the broker is not that database
            sent.append(direct)
            postgres.start_again()
            until(lambda: _works(request), "requests succeed again")
            until(handled, "all of them")
            assert work.error is None
        assert Counter(id for (id,) in made.sql(url, "select id from effect")) == Counter(sent)
        kit.close(web)


def _works(call: Callable[[], None]) -> bool:
    try:
        call()
    except (psycopg.OperationalError, Unavailable):
        return False
    return True
