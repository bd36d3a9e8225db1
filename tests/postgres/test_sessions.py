"""The user's own connection: the same promises through every library, driver and mode."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apsw
import asyncpg
import django.db
import psycopg
import psycopg2
import psycopg_pool
import pytest
import session_kit as kit
import sqlalchemy
from psycopg.types.json import set_json_dumps
from session_kit import Outside, Program
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from unlost.errors import StatementFailed, UsageError
from unlost.store.sessions import connect

Make = Callable[[type[Program]], Program]

TABLE = "create table note (id integer primary key, body text)"


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of the database that belongs to the program of this test."""
    kind = getattr(request, "param", None)
    return kit.new_file(tmp_path) if kind in kit.SQLITE else request.getfixturevalue("database")


@pytest.fixture
def outside(url: str) -> Iterator[Outside]:
    made = Outside(url)
    made.sql(TABLE)
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
        select '?', '5%', '%s', ':x', '{"a":1}', 'it''s ?', 17 % 5, cast('7' as integer) -- ? : %s
             , 'a' as "odd ?%:" /* ? */"""
    expected = ("?", "5%", "%s", ":x", '{"a":1}', "it's ?", 2, 7, "a")
    assert program.ours.execute(sql) == [expected]
    assert program.ours.execute(sql + ", ?", (1,) if program.dialect == "sqlite" else ("1",)) in (
        [(*expected, 1)], [(*expected, "1")],
    )  # fmt: skip


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
        with pytest.raises(UsageError, match=r"UL1252(.|\n)*do: ") as refused:
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
def test_a_deadlock_and_a_lock_that_is_held_are_transient(program: Program, outside: Outside) -> None:
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
    with pytest.raises(Exception) as caught:  # noqa: B017, PT011: each driver has its own
        ours.execute("select 1")
    assert ours.is_transient(caught.value)
    with pytest.raises(Exception) as again:  # noqa: B017, PT011
        ours.execute("select 1")
    assert isinstance(again.value, Exception)


@on_sqlite
def test_a_locked_file_is_transient(program: Program, outside: Outside) -> None:
    outside.sql("begin immediate")
    program.begin()
    program.sql("pragma busy_timeout = 10")
    with pytest.raises(Exception, match="locked") as caught:
        program.ours.execute("insert into note (id) values (1)")
    assert program.ours.is_transient(caught.value)
    outside.sql("rollback")


@pytest.mark.parametrize(
    "kind", [kit.Psycopg, kit.AsyncPsycopg, *(c for c in kit.POSTGRES if issubclass(c, kit.Alchemy)), kit.Django]
)
def test_a_server_that_is_not_there_is_transient(kind: type[Program]) -> None:
    program = kind("postgresql://postgres:x@127.0.0.1:1/nothing")
    try:
        with pytest.raises(Exception) as caught:  # noqa: B017, PT011
            program.open().ours.begin()
            program.ours.execute("select 1")
        from unlost.store.sessions import raw

        assert raw.is_transient(caught.value)
    finally:
        program.close()


def test_errors_of_the_program_are_not_transient() -> None:
    from unlost.store.sessions import raw

    looped = ValueError()
    looped.__cause__ = KeyError()
    looped.__cause__.__cause__ = looped
    assert not any(map(raw.is_transient, [looped, ConnectionResetError("of an API"), TimeoutError(), OSError()]))


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
    with pytest.raises(Exception, match="unique"):  # noqa: PT012
        program.sql("insert into note (id) values (1)")
        program.run(program.connection.pipeline().__aenter__() if isinstance(program, kit.AsyncPsycopg) else None)
        ours.execute("select 1")
    with pytest.raises(Exception) as refused:  # noqa: B017, PT011
        ours.commit()
    assert isinstance(refused.value, StatementFailed) or "aborted" in str(refused.value)
    ours.rollback()
    assert not ours.in_transaction
    assert notes(outside) == []


@everywhere
def test_somebody_else_ends_our_transaction(program: Program, outside: Outside) -> None:
    ours = program.ours
    assert ours.begin()
    program.sql("insert into note (id) values (1)")
    end = program.connection.commit
    try:
        program.run(end())
    except Exception:
        ours.rollback()  # the library forbids it by itself
        return
    program.sql("insert into note (id) values (2)")
    with pytest.raises(UsageError, match="UL1255"):
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
    with pytest.raises(Exception) as caught:  # noqa: B017, PT011
        ours.commit()
    assert ours.is_transient(caught.value)
    ours.rollback()
    assert notes(outside) == []


@everywhere
def test_its_place(program: Program, url: str) -> None:
    assert program.ours.place() == ("" if program.dialect == "postgresql" else str(Path(url).resolve()))
    assert program.ours.dialect == program.dialect
    assert program.ours.is_async is ("Async" in type(program).__name__ or "Aio" in type(program).__name__)
