"""The user's own connection: the same promises through every library, driver and mode."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import apsw
import asyncpg
import django.db
import psycopg
import psycopg2
import psycopg_pool
import pytest
import session_kit as kit
import sqlalchemy
from django.db import transaction
from django.db.transaction import TransactionManagementError
from django.utils.connection import ConnectionProxy
from psycopg.adapt import Loader
from psycopg.rows import dict_row
from psycopg.types.string import StrDumper
from session_kit import Outside, Program
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from servers.postgres import Postgres
from unlost.errors import StatementFailed, UsageError
from unlost.store.sessions import connect, raw
from unlost.store.sessions.port import SyncSession

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def one_database(postgres: Postgres) -> Iterator[str]:
    """Making a database takes longer than such a test, so there is one for all of them."""
    made = postgres.fresh()
    yield made
    postgres.drop_database(urlsplit(made).path[1:])


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of the database that belongs to the program of this test: a URL, or the path of a file."""
    if getattr(request, "param", None) in kit.SQLITE:
        return str(tmp_path / "program.db")
    found: str = request.getfixturevalue("one_database")
    return found


@pytest.fixture
def outside(url: str) -> Iterator[Outside]:
    made = Outside(url)
    made.sql("drop table if exists note")
    made.sql("create table note (id integer primary key, body text)")
    yield made
    made.close()


@pytest.fixture
def program(request: pytest.FixtureRequest, url: str, outside: Outside) -> Iterator[Program]:
    made: Program = request.param(url).open()
    yield made
    made.close()


def programs(*kinds: type[Program]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("url", "program"), [(kind, kind) for kind in kinds], indirect=True, ids=[kind.__name__ for kind in kinds]
    )


everywhere = programs(*kit.POSTGRES, *kit.SQLITE)
on_postgres = programs(*kit.POSTGRES)
on_sqlite = programs(*kit.SQLITE)


def notes(outside: Outside) -> list[int]:
    return [row[0] for row in outside.sql("select id from note order by id")]


# --- part of the user's transaction ----------------------------------------------------------------------------------


@everywhere
def test_what_we_write_is_there_with_the_users_commit(program: Program, outside: Outside) -> None:
    program.begin()
    program.sql("insert into note (id) values (1)")
    assert program.ours.execute("insert into note (id, body) values (?, ?)", (2, "ours")) == []
    assert notes(outside) == []
    program.commit()
    assert notes(outside) == [1, 2]


@everywhere
def test_and_gone_with_the_users_rollback(program: Program, outside: Outside) -> None:
    program.begin()
    program.ours.execute("insert into note (id) values (?)", (1,))
    program.sql("insert into note (id) values (2)")
    program.rollback()
    assert notes(outside) == []


@everywhere
def test_a_savepoint_takes_it_along(program: Program, outside: Outside) -> None:
    program.begin()
    program.ours.execute("insert into note (id) values (1)")
    program.sql("savepoint part")
    program.ours.execute("insert into note (id) values (2)")
    program.sql("rollback to savepoint part")
    program.commit()
    assert notes(outside) == [1]


@everywhere
def test_no_statement_opens_its_own_transaction(program: Program, outside: Outside) -> None:
    """Also those that sqlite3 by itself would not begin a transaction for."""
    program.begin()
    program.ours.execute("with new (id) as (values (1)) insert into note (id) select id from new")
    program.rollback()
    assert notes(outside) == []


@everywhere
def test_errors_of_the_driver_pass_through(program: Program) -> None:
    program.begin()
    program.ours.execute("insert into note (id) values (1)")
    with pytest.raises(Exception, match=r"(?i)unique") as caught:
        program.ours.execute("insert into note (id) values (1)")
    assert type(caught.value).__module__.partition(".")[0] == program.errors
    assert type(caught.value).__name__ in ("IntegrityError", "UniqueViolation")
    assert not program.ours.is_transient(caught.value)


# --- values ----------------------------------------------------------------------------------------------------------


@on_postgres
def test_values_of_postgres(program: Program) -> None:
    program.begin()
    ours = program.ours
    given = ("it's 100% \\ ü", 7, 2**40, b"\x00\xff", None, None, None)
    sql = "select ?::text, ?::integer, ?::bigint, ?::bytea, ?::text, ?::bigint, ?::bytea"
    rows = ours.execute(sql, given)
    assert rows == [given]
    assert [type(value) for value in rows[0]] == [str, int, int, bytes, *[type(None)] * 3]
    assert type(rows) is list
    assert type(rows[0]) is tuple
    assert ours.execute("select count(*), 'n'::name, 'v'::varchar from note") == [(0, "n", "v")]
    assert ours.execute("select id from note") == []


@on_postgres
def test_lists_of_postgres(program: Program) -> None:
    program.begin()
    sql = "select a, b, c from unnest(?::text[], ?::bigint[], ?::bytea[]) as t (a, b, c)"
    texts = ["a", None, 'x,y{"}\\', ""]
    numbers = [1, 2**40, None, -1]
    binaries = [b"\x00", None, b"", b"{}\\,"]
    rows = program.ours.execute(sql, (texts, numbers, binaries))
    assert rows == list(zip(texts, numbers, binaries, strict=True))
    assert {type(v) for row in rows for v in row} == {str, int, bytes, type(None)}
    assert program.ours.execute(sql, ([None], [None], [None])) == [(None, None, None)]
    assert program.ours.execute(sql, ([], [], [])) == []


@on_postgres
def test_text_becomes_json(program: Program) -> None:
    program.begin()
    text = '{"a": "it\'s 5%", "b": [1, null]}'
    rows = program.ours.execute("select (?::json)::text, ?::jsonb ->> 'a', ?::json is null", (text, text, None))
    assert rows == [(text, "it's 5%", True)]


@on_postgres
def test_the_same_statement_with_other_kinds_of_values(program: Program) -> None:
    program.begin()
    sql = "select ?::text, ?::bigint"
    for given in [("a", 1), (None, None), ("b", 2**40), (None, 3), ("c", None)] * 3:
        assert program.ours.execute(sql, given) == [given]


@on_sqlite
def test_values_of_sqlite(program: Program) -> None:
    program.begin()
    given = ("it's 100% \\ ü", 7, 2**40, b"\x00\xff", None)
    rows = program.ours.execute("select ?, ?, ?, ?, ?", given)
    assert rows == [given]
    assert [type(value) for value in rows[0]] == [str, int, int, bytes, type(None)]
    assert type(rows) is list
    assert type(rows[0]) is tuple
    assert program.ours.execute("select id from note") == []


@everywhere
def test_what_is_no_placeholder_stays(program: Program) -> None:
    program.begin()
    sql = """
        select '?', '5%', '%s', '%%', ':x', '{"a":1}', 'it''s ?', 17 % 5, 'a' as "odd ?%:" -- ? : %s
             /* ? */"""
    expected = ("?", "5%", "%s", "%%", ":x", '{"a":1}', "it's ?", 2, "a")
    assert program.ours.execute(sql) == [expected]
    assert program.ours.execute(sql + ", cast(? as text)", ("%s ? :y",)) == [(*expected, "%s ? :y")]


@on_postgres
def test_casts_with_colons(program: Program) -> None:
    program.begin()
    sql = "select '1:2'::text || ?::text, (array[1, 2, 3])[2:3]::text, '5%'::text like ?::text"
    assert program.ours.execute(sql, ("::x", "_%")) == [("1:2::x", "{2,3}", True)]


# --- autocommit ------------------------------------------------------------------------------------------------------


@everywhere
def test_autocommit_is_refused(program: Program, url: str, outside: Outside) -> None:
    other = type(program)(url).open(autocommit=True)
    try:
        assert other.ours.autocommits
        assert not other.ours.in_transaction
        with pytest.raises(UsageError, match=r"UL1270(.|\n)*do: ") as refused:
            other.ours.execute("insert into note (id) values (1)")
        assert other.ours.library in str(refused.value)
        assert notes(outside) == []
    finally:
        other.close()


@everywhere
def test_an_open_transaction_does_not_autocommit(program: Program) -> None:
    program.begin()
    assert not program.ours.autocommits
    program.sql("insert into note (id) values (1)")
    assert program.ours.in_transaction
    assert not program.ours.autocommits
    program.commit()
    assert not program.ours.in_transaction


# --- its end ---------------------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("way", ["commit", "rollback", "close"])
def test_its_end_is_seen_from_another_thread(program: Program, way: str) -> None:
    program.begin()
    ours = program.ours
    ours.execute("insert into note (id) values (1)")
    seen: list[bool] = []
    over = threading.Event()

    def watch() -> None:
        while not over.is_set() or not seen or seen[-1]:
            seen.append(ours.in_transaction)
            time.sleep(0.001)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    time.sleep(0.02)
    getattr(program, way)()
    over.set()
    thread.join(10)
    assert not thread.is_alive()
    assert seen[0]
    assert not seen[-1]
    assert sorted(seen, reverse=True) == seen


# --- what may succeed when it is tried again -------------------------------------------------------------------------


@on_postgres
def test_a_serialization_failure_is_transient(program: Program, outside: Outside) -> None:
    outside.sql("insert into note (id, body) values (1, 'old')")
    program.begin()
    program.sql("set transaction isolation level serializable")
    assert program.ours.execute("select body from note where id = ?", (1,)) == [("old",)]
    outside.sql("update note set body = 'new'")
    with pytest.raises(Exception, match="could not serialize") as caught:
        program.ours.execute("update note set body = ? where id = 1", ("ours",))
    assert program.ours.is_transient(caught.value)
    assert program.ours.in_transaction  # it has failed, and waits for its rollback


@on_postgres
def test_a_lock_that_is_held_is_transient(program: Program, outside: Outside) -> None:
    outside.sql("insert into note (id) values (1)")
    outside.sql("begin")
    outside.sql("select id from note for update")
    program.begin()
    with pytest.raises(Exception, match="could not obtain lock") as caught:
        program.ours.execute("select id from note for update nowait")
    assert program.ours.is_transient(caught.value)
    outside.sql("rollback")


@on_postgres
def test_a_connection_that_was_ended_is_transient(program: Program, outside: Outside) -> None:
    program.begin()
    ours = program.ours
    ((pid,),) = ours.execute("select pg_backend_pid()")
    outside.sql(f"select pg_terminate_backend({pid}, 10000)")
    with pytest.raises(Exception) as caught:
        ours.execute("select 1")
    assert ours.is_transient(caught.value)


@on_sqlite
def test_a_locked_file_is_transient(program: Program, outside: Outside) -> None:
    outside.sql("begin immediate")
    program.begin()
    program.sql("pragma busy_timeout = 10")
    with pytest.raises(Exception, match="locked") as caught:
        program.ours.execute("insert into note (id) values (1)")
    assert program.ours.is_transient(caught.value)
    outside.sql("rollback")


CONNECTING = [kit.Psycopg, kit.AsyncPsycopg, *(c for c in kit.POSTGRES if issubclass(c, kit.Alchemy)), kit.Django]


@pytest.mark.parametrize("kind", CONNECTING, ids=lambda kind: kind.__name__)
def test_a_server_that_is_not_there_is_transient(kind: type[Program]) -> None:
    program = kind("postgresql://postgres:x@127.0.0.1:1/nothing")
    try:
        with pytest.raises(Exception) as caught:
            program.open().ours.begin()
            program.ours.execute("select 1")
        assert raw.is_transient(caught.value)
    finally:
        program.close()


@pytest.mark.parametrize("state", ["40001", "40P01", "55P03", "57P01", "57P02", "57P03", "08006", "53300", "25P03"])
def test_states_that_pass(state: str) -> None:
    class Told(Exception):
        sqlstate = state

    assert raw.is_transient(Told())


@pytest.mark.parametrize("state", ["23505", "42P01", "25P02", "57014", "57P04", "40002", "22001"])
def test_states_that_do_not(state: str) -> None:
    assert not raw.is_transient(psycopg.errors.lookup(state)())


def test_errors_of_the_program_are_not_transient() -> None:
    looped = ValueError()
    looped.__cause__ = KeyError()
    looped.__cause__.__cause__ = looped
    assert not any(map(raw.is_transient, [looped, ConnectionResetError("of an API"), TimeoutError(), OSError()]))
    assert not raw.is_transient(sqlite3.OperationalError("no such table"))


# --- a transaction of ours -------------------------------------------------------------------------------------------


@everywhere
def test_our_own_transaction(program: Program, outside: Outside) -> None:
    ours = program.ours
    assert ours.begin() is True
    assert ours.in_transaction
    assert ours.begin() is False
    program.sql("insert into note (id) values (1)")
    ours.execute("insert into note (id) values (2)")
    assert notes(outside) == []
    ours.commit()
    assert not ours.in_transaction
    assert notes(outside) == [1, 2]

    assert ours.begin() is True
    program.sql("insert into note (id) values (3)")
    ours.execute("insert into note (id) values (4)")
    ours.rollback()
    ours.rollback()
    assert not ours.in_transaction
    assert notes(outside) == [1, 2]

    assert ours.begin() is True
    ours.commit()
    assert not ours.in_transaction


@everywhere
def test_we_do_not_begin_in_the_users_transaction(program: Program, outside: Outside) -> None:
    program.begin()
    program.sql("insert into note (id) values (1)")
    ours = program.ours
    assert ours.begin() is False
    ours.rollback()
    program.commit()
    assert notes(outside) == [1]


@on_postgres
def test_an_error_that_was_caught_is_no_commit(program: Program, outside: Outside) -> None:
    """PostgreSQL answers COMMIT with ROLLBACK then, and the drivers say nothing."""
    ours = program.ours
    assert ours.begin()
    ours.execute("insert into note (id) values (1)")
    with pytest.raises(Exception, match="unique"):
        program.sql("insert into note (id) values (1)")
        ours.execute("select 1")  # in pipeline mode it comes out here
    with pytest.raises(Exception, match=r"UL1272|aborted") as refused:
        ours.commit()
    assert isinstance(refused.value, StatementFailed) or "asyncpg" in ours.library
    ours.rollback()
    assert not ours.in_transaction
    assert notes(outside) == []


@everywhere
def test_somebody_else_ends_our_transaction(program: Program, outside: Outside) -> None:
    ours = program.ours
    assert ours.begin()
    program.sql("insert into note (id) values (1)")
    try:
        program.run(program.connection.commit())
    except (psycopg.ProgrammingError, TransactionManagementError):
        ours.rollback()  # the library forbids it
        assert notes(outside) == []
        return
    program.sql("insert into note (id) values (2)")
    with pytest.raises(UsageError, match="UL1273"):
        ours.commit()
    ours.rollback()
    assert not ours.in_transaction


@on_postgres
def test_a_commit_on_a_lost_connection_fails(program: Program, outside: Outside) -> None:
    ours = program.ours
    assert ours.begin()
    ((pid,),) = ours.execute("select pg_backend_pid()")
    ours.execute("insert into note (id) values (1)")
    outside.sql(f"select pg_terminate_backend({pid}, 10000)")
    program.run(asyncio.sleep(0.05))  # a driver in the event loop may notice it before we ask
    with pytest.raises(Exception) as caught:
        ours.commit()
    assert ours.is_transient(caught.value)
    ours.rollback()
    assert notes(outside) == []


@on_postgres
def test_a_commit_after_the_loss_was_caught_fails(program: Program, outside: Outside) -> None:
    ours = program.ours
    assert ours.begin()
    ((pid,),) = ours.execute("select pg_backend_pid()")
    outside.sql(f"select pg_terminate_backend({pid}, 10000)")
    for use in (lambda: ours.execute("select 1"), ours.commit):
        with pytest.raises(Exception):  # noqa: B017
            use()
    ours.rollback()


@everywhere
def test_its_place(program: Program, url: str) -> None:
    place = "" if program.dialect == "postgresql" else str(Path(url).resolve())
    assert program.ours.place() == place
    assert not program.ours.in_transaction  # asking has begun nothing
    program.begin()
    program.ours.execute("select 1")
    assert program.ours.place() == place
    assert program.ours.dialect == program.dialect
    assert program.ours.is_async is ("Async" in type(program).__name__ or "Aio" in type(program).__name__)


# --- psycopg ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cursor", [psycopg.ClientCursor, psycopg.RawCursor, psycopg.Cursor])
@pytest.mark.parametrize("kind", [psycopg.Connection, psycopg.AsyncConnection])
def test_what_the_program_has_registered_is_not_for_us(kind: Any, cursor: Any, database: str) -> None:
    class Shouting(StrDumper):
        def dump(self, obj: str) -> bytes:
            return b"SHOUTED"

    class Odd(Loader):
        def load(self, data: Any) -> object:
            return object()

    program = (kit.Psycopg if kind is psycopg.Connection else kit.AsyncPsycopg)(database).open()
    try:
        adapters = program.connection.adapters
        for type_ in (str, int, bytes, list):
            adapters.register_dumper(type_, Shouting)
        for name in ("text", "int2", "int4", "int8", "bytea", "json", "jsonb", "name"):
            adapters.register_loader(name, Odd)
        program.connection.row_factory = dict_row
        program.connection.cursor_factory = cursor
        sql = "select ?::text, ?::bigint, ?::bytea, ?::json, cardinality(?::text[]), ?::jsonb"
        given = ("a", 1, b"b", '{"a": 1}', ["x", None], "[1]")
        assert program.ours.execute(sql, given) == [("a", 1, b"b", '{"a": 1}', 2, "[1]")]
    finally:
        program.close()


def test_a_pipeline_in_autocommit_is_no_transaction(url: str, outside: Outside) -> None:
    """Its statements are one transaction until the next sync, whose time nobody knows."""
    with psycopg.connect(url, autocommit=True) as connection, connection.pipeline():
        connection.execute("insert into note (id) values (1)")
        with pytest.raises(UsageError, match="UL1270"):
            connect.of(connection).execute("insert into note (id) values (2)")
    assert notes(outside) == [1]


def test_two_phases(url: str, outside: Outside) -> None:
    with psycopg.connect(url) as connection:
        connection.tpc_begin(connection.xid(1, "a", "b"))
        connect.of(connection).execute("insert into note (id) values (1)")
        connection.tpc_commit()
    assert notes(outside) == [1]


# --- SQLAlchemy ------------------------------------------------------------------------------------------------------


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"
    id: Mapped[int] = mapped_column(primary_key=True)
    body: Mapped[str | None]


class Other(Base):
    __tablename__ = "other"
    id: Mapped[int] = mapped_column(primary_key=True)


@pytest.fixture
def engine(url: str, outside: Outside) -> Iterator[Any]:
    made = sqlalchemy.create_engine(kit.engine_url(url, "psycopg"))
    yield made
    made.dispose()


def ours(connection: object) -> SyncSession:
    made = connect.of(connection)
    assert not made.is_async
    return made


def test_pending_objects_come_first(engine: Any, outside: Outside) -> None:
    with Session(engine, autoflush=False) as session:
        session.add(Note(id=1))
        assert ours(session).execute("select id from note") == [(1,)]
        ours(session).execute("insert into note (id) values (2)")
        session.add(Note(id=2))
        with pytest.raises(sqlalchemy.exc.IntegrityError, match="note"):
            ours(session).execute("insert into note (id) values (3)")
        with pytest.raises(sqlalchemy.exc.PendingRollbackError):
            ours(session).execute("insert into note (id) values (4)")
        session.rollback()
    assert notes(outside) == []


def test_a_nested_transaction_of_a_session_takes_it_along(engine: Any, outside: Outside) -> None:
    with Session(engine) as session, session.begin():
        with session.begin_nested():
            ours(session).execute("insert into note (id) values (1)")
        nested = session.begin_nested()
        ours(session).execute("insert into note (id) values (2)")
        assert ours(session).in_transaction
        nested.rollback()
    assert notes(outside) == [1]


def test_a_session_on_a_connection(engine: Any, outside: Outside) -> None:
    with engine.connect() as connection, Session(connection) as session:
        session.add(Note(id=1))
        ours(session).execute("insert into note (id) values (2)")
        session.commit()
    assert notes(outside) == [1, 2]


@pytest.mark.parametrize("mode", ["conditional_savepoint", "create_savepoint", "control_fully"])
def test_a_session_in_somebody_elses_transaction(engine: Any, outside: Outside, mode: Any) -> None:
    """Its commit may end only a part of that, so it is none of ours to begin and commit."""
    with engine.connect() as connection, Session(connection, join_transaction_mode=mode) as session:
        connection.begin()
        assert ours(session).in_transaction
        assert ours(session).begin() is False
        ours(session).execute("insert into note (id) values (1)")
        session.rollback()
        connection.rollback()
        assert not ours(session).in_transaction
    assert notes(outside) == []


def test_the_data_of_events_are_not_in_errors(engine: Any) -> None:
    with Session(engine) as session:
        ours(session).execute("insert into note (id, body) values (?, ?)", (1, "secret"))
        with pytest.raises(sqlalchemy.exc.IntegrityError) as caught:
            ours(session).execute("insert into note (id, body) values (?, ?)", (1, "secret"))
    assert "secret" not in str(caught.value)


def test_a_session_with_several_engines_is_refused(engine: Any, url: str) -> None:
    second = sqlalchemy.create_engine("sqlite://")
    for several in [Session(engine, binds={Other: second}), Session(binds={Note: engine, Other: second})]:
        with several as session, pytest.raises(UsageError, match=r"UL1271(.|\n)*session\.connection"):
            connect.of(session)
    with Session(binds={Note: engine, Other: engine}) as session:
        assert ours(session).execute("select 1") == [(1,)]
    with Session(engine, binds={Other: engine}) as session:
        assert ours(session).execute("select 1") == [(1,)]
    with Session() as session, pytest.raises(UsageError, match="UL1271"):
        connect.of(session)
    second.dispose()


def test_a_session_that_routes_is_refused_when_its_rows_went_elsewhere(engine: Any, outside: Outside) -> None:
    second = sqlalchemy.create_engine(engine.url)

    class Routing(Session):
        def get_bind(self, mapper: Any = None, **more: Any) -> Any:
            return second if mapper is not None else engine

    with Routing() as session:
        session.add(Note(id=1))
        with pytest.raises(UsageError, match="UL1271"):
            ours(session).execute("insert into note (id) values (2)")
        session.rollback()
    with Routing() as session:
        session.add(Note(id=1))
        session.flush()
        rows_go_here = session.connection(bind_arguments={"mapper": Note})
        ours(rows_go_here).execute("insert into note (id) values (2)")
        session.commit()
    second.dispose()
    assert notes(outside) == [1, 2]


def test_ways_to_autocommit_with_sqlalchemy(engine: Any, url: str, outside: Outside) -> None:
    hidden = sqlalchemy.create_engine(engine.url, connect_args={"autocommit": True})
    level = {"isolation_level": "AUTOCOMMIT"}
    with engine.connect().execution_options(**level) as connection:
        assert ours(connection).autocommits
        with Session(connection) as session:
            assert ours(session).autocommits
    with Session(engine.execution_options(**level)) as session:
        assert ours(session).autocommits
    with Session(engine) as session:
        session.connection(execution_options=level)
        assert ours(session).autocommits
    with Session(hidden) as session:
        assert not ours(session).autocommits  # nobody can tell yet
        with pytest.raises(UsageError, match="UL1270"):
            ours(session).execute("insert into note (id) values (1)")
        assert ours(session).autocommits
    declared = sqlalchemy.create_engine(engine.url, **level)
    with declared.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
        assert ours(connection).execute("select 1") == [(1,)]
        assert not ours(connection).autocommits
    for made in (hidden, declared):
        made.dispose()
    assert notes(outside) == []


def test_sqlite_without_implicit_transactions_below_sqlalchemy(tmp_path: Path) -> None:
    path = tmp_path / "program.db"
    engine = sqlalchemy.create_engine(f"sqlite:///{path}", connect_args={"isolation_level": None})
    outside = Outside(str(path))
    outside.sql("create table note (id integer primary key, body text)")
    with Session(engine) as session, pytest.raises(UsageError, match="UL1270"):
        ours(session).execute("insert into note (id) values (1)")
    sqlalchemy.event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    with Session(engine) as session, session.begin():  # as SQLAlchemy's manual recommends
        ours(session).execute("insert into note (id) values (2)")
        assert notes(outside) == []
    assert notes(outside) == [2]
    engine.dispose()
    outside.close()


@pytest.mark.parametrize("program", [kit.AsyncAlchemySession], indirect=True)
def test_codecs_of_asyncpg_are_not_for_us(program: Any) -> None:
    async def register() -> None:
        connection = await program.connection.connection()
        driver = (await connection.get_raw_connection()).driver_connection
        for name in ("json", "jsonb"):
            await driver.set_type_codec(name, encoder=json.dumps, decoder=json.loads, schema="pg_catalog")

    program.run(register())
    text = '{"a": 1}'
    rows = program.ours.execute("select (?::json)::text, (?::jsonb)::text, ?::jsonb -> 'a' = '1'", (text, text, text))
    assert rows == [(text, text, True)]


# --- Django ----------------------------------------------------------------------------------------------------------


def test_a_connection_of_django_that_is_not_open_yet(url: str) -> None:
    assert ours(kit.django_connection(url, "postgresql")).autocommits
    assert not ours(kit.django_connection(url, "postgresql", AUTOCOMMIT=False)).autocommits


def test_the_proxy_means_the_connection_of_this_thread(url: str, outside: Outside) -> None:
    made = kit.django_connection(url, "postgresql")
    session = ours(ConnectionProxy(django.db.connections, made.alias))
    with transaction.atomic(using=made.alias):
        session.execute("insert into note (id) values (1)")
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(lambda: session.in_transaction).result() is True
    made.close()
    assert notes(outside) == [1]


def test_an_atomic_block_that_django_will_roll_back(url: str, outside: Outside) -> None:
    made = kit.django_connection(url, "postgresql")
    session = ours(made)
    assert session.begin()
    session.execute("insert into note (id) values (1)")
    transaction.set_rollback(True, using=made.alias)
    with pytest.raises(TransactionManagementError):
        session.execute("insert into note (id) values (2)")
    with pytest.raises(StatementFailed, match="UL1272"):
        session.commit()
    session.rollback()
    assert session.begin()
    session.execute("insert into note (id) values (3)")
    made.close()
    with pytest.raises(django.db.OperationalError):
        session.commit()
    session.rollback()
    assert not session.in_transaction
    assert notes(outside) == []


def test_a_connection_of_django_from_another_thread(url: str) -> None:
    session = ours(kit.django_connection(url, "postgresql"))
    with ThreadPoolExecutor(1) as pool, pytest.raises(UsageError, match="UL1275"):
        pool.submit(session.begin).result()


def test_django_above_psycopg2(url: str, outside: Outside) -> None:
    """Django takes psycopg 3 where it can be imported; here it cannot."""
    text = f"""
        import sys
        sys.modules["psycopg"] = None
        import session_kit as kit
        from django.db import transaction
        from unlost.store.sessions import connect

        made = kit.django_connection({url!r}, "postgresql")
        ours = connect.of(made)
        assert ours.autocommits
        with transaction.atomic(using=made.alias):
            assert type(made.connection).__module__ == "psycopg2.extensions"
            given = ("a %", 2**40, b"\\x00", None)
            assert ours.execute("select ?::text, ?::bigint, ?::bytea, ?::bytea", given) == [given]
            lists = (["a", None], [1, None], [b"\\x00", None])
            rows = ours.execute("select * from unnest(?::text[], ?::bigint[], ?::bytea[])", lists)
            assert rows == list(zip(*lists)), rows
            assert ours.execute("select '5%', '%%'") == [("5%", "%%")]
            assert ours.execute("select (?::json)::text", ('{{"a": 1}}',)) == [('{{"a": 1}}',)]
            assert ours.in_transaction
        made.set_autocommit(False)
        assert not ours.in_transaction and not ours.autocommits
        assert ours.begin()
        ours.execute("insert into note (id) values (1)")
        ours.commit()
        ours.execute("insert into note (id) values (2)")
        assert ours.in_transaction
        made.close()
        assert not ours.in_transaction
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(text)], capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0, done.stderr
    assert notes(outside) == [1]


# --- sqlite3 ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> str:
    return str(tmp_path / "program.db")


def test_factories_of_the_program_are_not_for_us(file: str) -> None:
    with closing(sqlite3.connect(file)) as connection:
        connection.text_factory = bytes
        connection.row_factory = lambda cursor, row: {"first": row[0]}
        rows = ours(connection).execute("select 'a', x'00'")
        assert rows == [("a", b"\x00")]
        assert type(rows[0]) is tuple
        assert ours(connection).place() == str(Path(file).resolve())
        assert connection.text_factory is bytes
    with closing(sqlite3.connect(":memory:")) as connection:
        assert ours(connection).place() == ""
    memory = sqlalchemy.create_engine("sqlite://")
    with Session(memory) as session:
        assert ours(session).place() == ""
    with memory.connect() as alchemy, Session(alchemy) as session:
        assert ours(alchemy).place() == ours(session).place() == ""
    memory.dispose()


def test_a_connection_of_another_thread(file: str) -> None:
    with closing(sqlite3.connect(file)) as connection, ThreadPoolExecutor(1) as pool:
        for use in (lambda s: s.execute("select 1"), lambda s: s.begin(), lambda s: s.place()):
            with pytest.raises(UsageError, match=r"UL1275(.|\n)*check_same_thread"):
                pool.submit(use, ours(connection)).result()
        assert pool.submit(lambda: ours(connection).in_transaction).result() is False


def test_a_commit_that_finds_the_file_locked_can_be_rolled_back(file: str) -> None:
    outside = Outside(file)
    outside.sql("create table note (id integer primary key)")
    with closing(sqlite3.connect(file, timeout=0.05)) as connection:
        session = ours(connection)
        assert session.begin()
        session.execute("insert into note values (1)")
        outside.sql("begin")
        outside.sql("select * from note")
        with pytest.raises(sqlite3.OperationalError, match="locked") as caught:
            session.commit()
        assert session.is_transient(caught.value)
        session.rollback()
        assert not session.in_transaction
    outside.close()


@pytest.mark.skipif(sys.version_info < (3, 12), reason="sqlite3.connect(autocommit=…) came with Python 3.12")
def test_the_autocommit_of_newer_pythons(file: str) -> None:
    modern: Any = sqlite3.connect
    outside = Outside(file)
    outside.sql("create table note (id integer primary key)")
    with closing(modern(file, autocommit=True)) as connection:
        session = ours(connection)
        assert session.autocommits
        assert session.begin()
        session.execute("insert into note values (1)")
        assert notes(outside) == []
        session.commit()
        assert session.begin()
        session.execute("insert into note values (2)")
        session.rollback()
        assert not session.in_transaction
    with closing(modern(file, autocommit=False)) as connection:
        session = ours(connection)
        assert session.in_transaction
        assert not session.autocommits
        session.execute("insert into note values (3)")
        assert notes(outside) == [1]
        connection.commit()
        with pytest.raises(UsageError, match="UL1274"):
            session.begin()
    assert notes(outside) == [1, 3]
    outside.close()


# --- what is refused -------------------------------------------------------------------------------------------------


def test_what_is_no_connection_is_refused_with_the_way_out(url: str, outside: Outside) -> None:
    sync, coroutine = sqlalchemy.create_engine("sqlite://"), create_async_engine(kit.engine_url(url, "asyncpg"))
    sqlite, apsw_connection = sqlite3.connect(":memory:"), apsw.Connection(":memory:")
    two, three = psycopg2.connect(url), psycopg.connect(url)
    pool = psycopg_pool.ConnectionPool(url, open=False)
    loop = asyncio.Runner()
    driver = loop.run(asyncpg.connect(url))
    cases: list[tuple[object, str, str]] = [
        (None, "None", "pass the connection or session"),
        (url, "builtins.str", "pass the connection or session"),
        (Session, "the class sqlalchemy.orm.session.Session", "not an object of it"),
        (sync, "sqlalchemy.engine.base.Engine", "with engine.begin() as connection:"),
        (coroutine, "AsyncEngine", "async with engine.begin() as connection:"),
        (coroutine.connect(), "AsyncConnection", "start it first"),
        (sync.begin(), "contextlib", "enter it first"),
        (sessionmaker(sync), "sessionmaker", "with Session.begin() as session:"),
        (async_sessionmaker(coroutine), "async_sessionmaker", "async with Session.begin() as session:"),
        (sync.pool, "sqlalchemy.pool", "the connection or the session itself"),
        (pool, "psycopg_pool", "with pool.connection() as connection:"),
        (three.cursor(), "psycopg.Cursor", "the connection itself"),
        (two, "psycopg2.extensions.connection", "psycopg 3"),
        (two.cursor(), "psycopg2.extensions.cursor", "psycopg 3"),
        (driver, "asyncpg.connection.Connection", "SQLAlchemy above asyncpg"),
        (sqlite.cursor(), "sqlite3.Cursor", "the connection itself"),
        (apsw_connection, "apsw.Connection", "undo each other's locks"),
        (django.db.connections, "ConnectionHandler", 'connections["default"]'),
        (kit.django_connection("", "", ENGINE="django.db.backends.dummy"), "Django with", "app.publish"),
        (Session(unknown_engine()), "dialect mysql", "app.publish"),
    ]
    for given, found, fix in cases:
        with pytest.raises(UsageError, match="UL1251") as refused:
            connect.of(given)
        assert found in refused.value.found, given
        assert fix in refused.value.fix + refused.value.found, given
    for end in (two, three, sqlite, apsw_connection):
        end.close()
    loop.run(driver.close())
    loop.close()


def unknown_engine() -> Any:
    driver = SimpleNamespace(paramstyle="pyformat", __name__="MySQLdb", version_info=(2, 2, 0), __version__="2.2.0")
    return sqlalchemy.create_engine("mysql://", module=driver)


def test_a_proxy_that_says_what_it_stands_for(file: str) -> None:
    """As tracing libraries wrap connections."""

    class Proxy:
        def __init__(self, wrapped: Any) -> None:
            self.wrapped = wrapped

        @property  # type: ignore[misc]
        def __class__(self) -> type:
            return type(self.wrapped)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.wrapped, name)

    with closing(sqlite3.connect(file)) as connection:
        assert ours(Proxy(connection)).execute("select ?", (1,)) == [(1,)]


def test_nothing_is_imported_that_the_program_has_not() -> None:
    text = """
        import sys
        import unlost.store.sessions.connect as connect
        drivers = {"psycopg", "psycopg2", "sqlalchemy", "django", "asyncpg", "sqlite3"}
        assert not drivers & set(sys.modules), drivers & set(sys.modules)
        import sqlite3
        connection = sqlite3.connect(":memory:")
        assert connect.of(connection).library == "sqlite3"
        connection.close()
        assert drivers & set(sys.modules) == {"sqlite3"}
        import sqlalchemy
        with sqlalchemy.create_engine("sqlite://").connect() as connection:
            connect.of(connection).execute("select 1")
        assert "sqlalchemy.orm" not in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(text)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
