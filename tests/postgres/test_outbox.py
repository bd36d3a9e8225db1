"""`app.outbox(connection)`: the same promises through every connection, against real servers and a relay at work."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import sqlite3
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import msgspec
import outbox_kit as kit
import psycopg
import pytest
import session_kit
import sqlalchemy
from django.db import transaction
from outbox_kit import Arrivals, Counted, Noted, Placed, Sealed, Shipped, Work, fresh, ids, outbox, until
from session_kit import Outside, Program
from sqlalchemy.orm import Session

from servers.postgres import Postgres
from unlost import App, Event, UsageError
from unlost.events import Envelope, encode_data, from_headers, seal, to_headers
from unlost.store.postgres import migrate
from unlost.store.postgres.door import UNSENT_SECONDS
from unlost.store.postgres.rows import STORED, envelope_of
from unlost.store.postgres.settings import parse

ROOT = Path(__file__).parents[2]
WHEN = datetime(2026, 2, 28, 23, 59, 59, 123456, tzinfo=timezone(timedelta(hours=2)))


class Place(NamedTuple):
    """Where everything is: a service at work, and a web process that never connects its App."""

    postgres: str
    sqlite: str
    broker: str
    arrivals: Arrivals
    web: App

    def app(self, name: str = "web") -> App:
        return App(name=name, store=self.postgres, outboxes=[f"sqlite:///{self.sqlite}"], broker=self.broker)


@pytest.fixture(scope="module")
def place(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("place")
    url = postgres.fresh()
    migrate.migrate(parse(url))
    path = str(folder / "program.db")
    for target in (url, path):
        outside = Outside(target)
        outside.sql("create table note (id text)")
        outside.close()
    arrivals = Arrivals()
    broker = f"embedded://{folder / 'events.db'}"
    work = App(arrivals.service, name="work", store=url, outboxes=[f"sqlite:///{path}"], broker=broker)
    web = App(name="web", store=url, outboxes=[f"sqlite:///{path}"], broker=broker)
    with Work(work):
        yield Place(url, path, broker, arrivals, web)
        until(lambda: not left(url) + left(path), "the outboxes are empty")
    kit.close(web, work)
    assert arrivals.twice() == []
    postgres.drop_database(urlsplit(url).path[1:])


def left(target: str) -> list[Any]:
    """What stands in an outbox."""
    outside = Outside(target)
    try:
        if target.startswith("postgresql:"):
            return outside.sql("select id from unlost.unlost_outbox")
        made = outside.sql("select 1 from sqlite_master where name = 'unlost_outbox'")  # with the first event
        return outside.sql("select id from unlost_outbox") if made else []
    finally:
        outside.close()


@pytest.fixture
def program(request: pytest.FixtureRequest, place: Place) -> Iterator[Program]:
    kind: type[Program] = request.param
    made = kind(place.sqlite if kind.dialect == "sqlite" else place.postgres).open()
    if isinstance(made.connection, sqlite3.Connection):
        made.connection.execute("pragma busy_timeout = 10000")
    yield made
    made.close()


def programs(*kinds: type[Program]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("program", kinds, indirect=True, ids=lambda kind: kind.__name__)


everywhere = programs(*session_kit.POSTGRES, *session_kit.SQLITE)
on_postgres = programs(*session_kit.POSTGRES)


@contextmanager
def in_transaction(program: Program) -> Iterator[str]:
    """The program's own transaction with a row of its own; gives the row's id."""
    row = fresh("row")
    program.begin()
    try:
        program.sql(f"insert into note values ('{row}')")
        yield row
    except BaseException:
        program.rollback()
        raise
    program.commit()


def written(program: Program, row: str) -> bool:
    outside = Outside(program.url)
    try:
        return bool(outside.sql(f"select 1 from note where id = '{row}'"))
    finally:
        outside.close()


# --- what was committed arrives --------------------------------------------------------------------------------------


CASES: dict[str, tuple[Event, Mapping[str, Any]]] = {
    "plain": (Placed(order_id="o1", n=-(2**53) + 1), {}),
    "of another version": (Shipped(order_id="o2", tags=("a", "")), {}),
    "without a key": (Noted(text="{}"), {}),
    "a key that is no text": (Sealed(code=b"\xff\x00\xfe'"), {}),
    "a key with a zero": (Placed(order_id="a\0b"), {}),
    "a key of digits": (Counted(number=0), {}),
    "characters": (Placed(order_id="Zürich ☃ 💸 \u2028", note="\0\x1f\x7f \\u0000 \\ \" ' % ? :x ${y} \ue000 \U0010ffff"), {}),
    "headers": (Placed(order_id="o3"), {"headers": {"campaign": "Grüße, \"%\" '\\' \0", "Empty": "", "x" * 200: "y" * 4000}}),
    "an id and a time": (Placed(order_id="o4"), {"occurred_at": WHEN}),
    "large": (Placed(order_id="o5", note="é\\" * 100_000), {}),
}  # fmt: skip


@everywhere
def test_events_arrive_once_and_intact(program: Program, place: Place) -> None:
    expected: dict[str, Envelope] = {}
    before = datetime.now(UTC)
    with in_transaction(program) as row, outbox(place.web, program) as block:
        for name, (event, more) in CASES.items():
            id = fresh(f"{name} ü")
            block.publish(event, id=id, **more)
            expected[id] = seal(event, source="web", id=id, now=0, **more)
    assert written(program, row)
    came = place.arrivals.of(*expected)
    assert len(came) == len(expected)
    for found in came:
        wanted, case = expected[found.id], found.id
        assert (found.source, found.type, found.topic) == ("web", wanted.type, wanted.topic), case
        assert found.key == wanted.key, case
        assert found.data == wanted.data, case
        assert dict(found.headers) == dict(wanted.headers), case
        assert found.eventversion == wanted.eventversion, case
        assert (found.subject, found.partitionkey) == (wanted.subject, wanted.partitionkey), case
        assert (found.correlationid, found.causationid, found.tracestate) == (found.id, None, None), case
        assert found.traceparent is not None and len(found.traceparent) == 55, case
        if "time" in case:
            assert found.time == wanted.time == "2026-02-28T21:59:59.123456Z"
        else:
            assert before <= found.occurred_at <= datetime.now(UTC), case


@everywhere
@pytest.mark.parametrize("count", [0, 1, 1000])
def test_as_many_as_there_are(program: Program, place: Place, count: int) -> None:
    key = fresh()
    with in_transaction(program) as row, outbox(place.web, program) as block:
        for n in range(count):
            block.publish(Placed(order_id=key, n=n))
    assert written(program, row)
    found = place.arrivals.of_key(key, count)
    assert [json.loads(e.data or b"")["n"] for e in found] == list(range(count))


@everywhere
def test_the_order_of_calls_is_that_of_the_log(program: Program, place: Place) -> None:
    """Over blocks and transactions, for each key."""
    keys = [fresh() for _ in range(5)]
    numbers = iter(range(1000))
    called: dict[str, list[int]] = {key: [] for key in keys}
    for _ in range(4):
        with in_transaction(program):
            for _ in range(2):
                with outbox(place.web, program) as block:
                    for _ in range(3):
                        for key in keys:
                            called[key].append(n := next(numbers))
                            block.publish(Placed(order_id=key, n=n))
    for key in keys:
        found = place.arrivals.of_key(key, 24)
        assert [json.loads(e.data or b"")["n"] for e in found] == called[key]


# --- what was not committed does not ---------------------------------------------------------------------------------


def fence(place: Place, program: Program, key: str) -> list[Envelope]:
    """All events of this key, after one that was published now has come."""
    id = fresh("fence")
    with in_transaction(program), outbox(place.web, program) as block:
        block.publish(Placed(order_id=key), id=id)
    place.arrivals.of(id)
    return [e for e in place.arrivals.of_key(key, 1) if e.id != id]


@everywhere
def test_a_rollback_leaves_no_event(program: Program, place: Place) -> None:
    key = fresh()
    with pytest.raises(KeyError), in_transaction(program) as row:
        with outbox(place.web, program) as block:
            block.publish(Placed(order_id=key))
        raise KeyError(row)
    assert not written(program, row)
    assert fence(place, program, key) == []


@everywhere
def test_an_exception_in_the_block_leaves_no_event(program: Program, place: Place) -> None:
    """Also if somebody catches it, and commits."""
    key = fresh()
    with in_transaction(program) as row, pytest.raises(KeyError), outbox(place.web, program) as block:
        block.publish(Placed(order_id=key))
        raise KeyError
    assert written(program, row)
    assert fence(place, program, key) == []


@everywhere
def test_a_savepoint_takes_its_block_along(program: Program, place: Place) -> None:
    key, kept, gone = fresh(), fresh("kept"), fresh("gone")
    with in_transaction(program) as row:
        program.sql("savepoint one")
        with outbox(place.web, program) as block:
            block.publish(Placed(order_id=key), id=gone)
        program.sql("rollback to savepoint one")
        program.sql("savepoint two")
        with outbox(place.web, program) as block:
            block.publish(Placed(order_id=key), id=kept)
        program.sql("release savepoint two")
    assert written(program, row)
    assert ids(fence(place, program, key)) == [kept]


@everywhere
def test_two_blocks_in_one_transaction(program: Program, place: Place) -> None:
    """The second fails; the first stands, and so does one inside of another."""
    key = fresh()
    with in_transaction(program):
        with outbox(place.web, program) as first:
            first.publish(Placed(order_id=key, n=2))
            with outbox(place.web, program) as inner:
                inner.publish(Placed(order_id=key, n=1))
        with pytest.raises(KeyError), outbox(place.web, program) as second:
            second.publish(Placed(order_id=key, n=9))
            raise KeyError
        with outbox(place.web, program) as third:
            third.publish(Placed(order_id=key, n=3))
    assert [json.loads(e.data or b"")["n"] for e in fence(place, program, key)] == [1, 2, 3]


@programs(session_kit.Psycopg, session_kit.AsyncAlchemySession, session_kit.Sqlite3)
def test_a_block_that_is_used_again_begins_anew(program: Program, place: Place) -> None:
    """What a failed block had is not in the next one."""
    key = fresh()
    made = place.web.outbox(program.connection)

    def use(n: int, fails: bool) -> None:
        block = made
        if program.ours.is_async:
            program.run(block.__aenter__())
            block.publish(Placed(order_id=key, n=n))
            program.run(block.__aexit__(KeyError if fails else None, KeyError() if fails else None, None))
            return
        with contextlib.suppress(KeyError), block:
            block.publish(Placed(order_id=key, n=n))
            if fails:
                raise KeyError

    for n, fails in enumerate((True, False, False, True, False)):
        with in_transaction(program):
            use(n, fails)
    assert [json.loads(e.data or b"")["n"] for e in fence(place, program, key)] == [1, 2, 4]


# --- how it is used wrongly ------------------------------------------------------------------------------------------


@everywhere
def test_outside_the_block_nothing_can_be_published(program: Program, place: Place) -> None:
    block = place.web.outbox(program.connection)
    with pytest.raises(UsageError, match="UL1255"):
        block.publish(Placed(order_id="a"))
    with in_transaction(program), outbox(place.web, program) as block:
        pass
    with pytest.raises(UsageError, match="UL1255"):
        block.publish(Placed(order_id="a"))


@everywhere
def test_an_event_that_cannot_be_published_is_refused_by_the_call(program: Program, place: Place) -> None:
    key = fresh()
    with in_transaction(program), outbox(place.web, program) as block:
        for event, more, code in [
            (Placed(order_id=""), {}, "UL1006"),
            (Placed(order_id=key, n="x"), {}, "UL1013"),  # type: ignore[arg-type]
            (Placed(order_id=key, note="x" * 5_000_000), {}, "UL1012"),
            (Placed(order_id=key), {"id": ""}, "UL1009"),
            (Placed(order_id=key), {"headers": {"ce_id": "x"}}, "UL1011"),
            (Placed(order_id=key), {"headers": {"a": "x" * 20_000}}, "UL1011"),
            (Placed(order_id=key), {"occurred_at": datetime(2026, 1, 1)}, "UL1010"),
        ]:
            with pytest.raises(UsageError, match=code):
                block.publish(event, **more)
        block.publish(Placed(order_id=key), id=key)
    assert ids(fence(place, program, key)) == [key]


@everywhere
def test_with_and_async_with(program: Program, place: Place) -> None:
    made = place.web.outbox(program.connection)
    program.begin()
    with pytest.raises(UsageError, match=r"UL1252(.|\n)*do: +(async )?with app.outbox") as refused:
        if program.ours.is_async:
            with made:
                raise AssertionError
        asyncio.run(made.__aenter__())
    assert ("async with" in refused.value.fix) is program.ours.is_async


@everywhere
def test_autocommit_is_refused(program: Program, place: Place) -> None:
    other = type(program)(program.url).open(autocommit=True)
    try:
        if not other.ours.autocommits:
            pytest.skip("its autocommit is seen by the first statement only")
        with pytest.raises(UsageError, match=r"UL1256(.|\n)*do: ") as refused, outbox(place.web, other):
            raise AssertionError
        assert other.ours.library in str(refused.value)
    finally:
        other.close()


ENDS = [
    kind
    for kind in (*session_kit.POSTGRES, *session_kit.SQLITE)
    if not kind.__name__.endswith(("Django", "Block", "PsycopgPipeline"))  # there the library itself forbids it
]


@programs(*ENDS)
@pytest.mark.parametrize("way", ["commit", "rollback"])
@pytest.mark.parametrize("begun", ["by a statement", "in the block", "not at all"])
def test_a_transaction_that_ends_inside_the_block_is_refused(
    program: Program, place: Place, way: str, begun: str
) -> None:
    """Its events would stand in the next transaction, which nobody may commit: data without their event."""
    key = fresh()
    if begun == "by a statement":
        program.begin()
        program.sql(f"insert into note values ('{key}')")
    elif "Explicit" in type(program).__name__ or "AsyncPsycopgPipeline" in type(program).__name__:
        program.begin()
    with pytest.raises(UsageError, match=r"UL1269(.|\n)*events not written: 1"), outbox(place.web, program) as block:
        block.publish(Placed(order_id=key))
        if begun == "in the block":
            program.sql(f"insert into note values ('{key}')")
        getattr(program, way)()
    program.rollback()
    assert fence(place, program, key) == []


def test_the_transaction_comes_first(place: Place) -> None:
    """The other way round, the events would come after its commit."""
    engine = sqlalchemy.create_engine(session_kit.engine_url(place.postgres, "psycopg"))
    refused = pytest.raises(sqlalchemy.exc.InvalidRequestError, match="already begun")
    with Session(engine) as session, refused, place.web.outbox(session), session.begin():
        raise AssertionError
    engine.dispose()
    with psycopg.connect(place.postgres) as c, place.web.outbox(c) as block, c.transaction():  # its savepoint
        block.publish(Placed(order_id="a"), id=(id := fresh()))
    place.arrivals.of(id)


# --- the columns, as Debezium's outbox event router reads them -------------------------------------------------------


def connector() -> dict[str, str]:
    """The configuration in docs/outbox.md."""
    text = (ROOT / "docs" / "outbox.md").read_text()
    found = re.search(r"```properties\n(.*?)```", text, re.S)
    assert found is not None
    return dict(line.split("=", 1) for line in found[1].splitlines() if line and not line.startswith("#"))


def routed(program: Program, id: str) -> tuple[str, bytes | None, bytes, list[tuple[str, bytes | None]]]:
    """What the router makes of a row: topic, key, value and headers. Columns that are null become headers without a value;
    numbers become text, by the StringConverter."""
    router = "transforms.outbox."
    settings = connector()
    placed = [field.split(":") for field in settings[router + "table.fields.additional.placement"].split(",")]
    columns = ["aggregatetype", "aggregateid", "payload", *(column for column, *_ in placed)]
    shown = ", ".join(f"{column}::text" for column in columns)
    (row,) = program.ours.execute(f"select {shown} from unlost.unlost_outbox where id = ?", (id,))
    topic, key, payload, *rest = row
    assert settings[router + "route.topic.replacement"] == "${routedByValue}"
    assert {placement for _, placement, *_ in placed} == {"header"}
    headers = [("id", id.encode())]
    headers += [
        (more[-1] if more else column, None if v is None else v.encode())
        for (column, _, *more), v in zip(placed, rest, strict=True)
    ]
    dropped = settings["transforms.plain.headers"].split(",")
    return topic, None if key is None else key.encode(), payload.encode(), [h for h in headers if h[0] not in dropped]


@on_postgres
@pytest.mark.parametrize("together", [False, True], ids=["one by one", "in one block"])
def test_the_columns_are_those_of_debezium(program: Program, place: Place, together: bool) -> None:
    """By value: `id`, `aggregatetype`, `aggregateid`, `type`, `payload`; and with the documented configuration the headers
    are those that our own relay gives to Kafka."""
    sent: dict[str, tuple[str, Envelope]] = {}
    with in_transaction(program):
        with contextlib.ExitStack() as blocks:
            block = blocks.enter_context(outbox(place.web, program)) if together else None
            for name, (event, more) in CASES.items():
                id = fresh(name.replace(" ", "-"))
                sent[id] = name, seal(event, source="web", id=id, now=0, **more)
                if block is not None:
                    block.publish(event, id=id, **more)
                else:
                    with outbox(place.web, program) as alone:
                        alone.publish(event, id=id, **more)
        for id, (name, sealed) in sent.items():
            (row,) = program.ours.execute(
                f"select {STORED.replace('s.number', 'o.seq')} from unlost.unlost_outbox o where id = ?", (id,)
            )
            envelope = envelope_of(row)
            made = {"time": envelope.time, "traceparent": envelope.traceparent}  # each time anew
            assert envelope == msgspec.structs.replace(sealed, **made), name
            columns = "id, aggregatetype, aggregateid, type, payload::text"
            (row,) = program.ours.execute(f"select {columns} from unlost.unlost_outbox where id = ?", (id,))
            text = sealed.key is None or ("key that is no" not in name and "zero" not in name)
            key = None if sealed.key is None else sealed.key.decode() if text else sealed.key.hex()
            assert row == (id, sealed.topic, key, sealed.type, encode_data(CASES[name][0]).decode())

            topic, raw_key, value, headers = routed(program, id)
            ours, data = to_headers(envelope)
            assert value == data
            theirs = {name: value for name, value in headers if value is not None}
            wanted = dict(ours)
            if envelope.eventversion == 1:
                wanted["ce_unlostversion"] = b"1"
            if envelope.headers:
                assert json.loads(theirs.pop("ce_unlostheaders")) == envelope.headers
                for header in envelope.headers:
                    del wanted[header]
            assert theirs == wanted, name
            read = from_headers(headers, value, topic=topic, key=raw_key)
            assert read == (envelope if text else msgspec.structs.replace(envelope, key=(key or "").encode())), name
    place.arrivals.of(*sent)


# --- when nobody sends -----------------------------------------------------------------------------------------------


def test_a_web_process_is_warned_when_no_relay_lives(database: str, caplog: pytest.LogCaptureFixture) -> None:
    """Once something has waited for a while. It is no error: nothing is lost."""
    migrate.migrate(parse(database))
    name = urlsplit(database).path[1:]
    with psycopg.connect(database, autocommit=True) as outside:
        for first in (True, False):
            app = App(name="web", store=database)  # another process, which looks for the first time
            with psycopg.connect(database) as connection, app.outbox(connection) as block:
                block.publish(Placed(order_id="a"))
            door = app._doors[database]
            until(
                lambda door=door: not getattr(door, "_open", None) and getattr(door, "_warned", 0) > 0, "it has looked"
            )
            kit.close(app)
            if first:
                assert "UL1257" not in caplog.text
            outside.execute(
                "update unlost.unlost_outbox set added = now() - make_interval(secs => %s)", (UNSENT_SECONDS + 60,)
            )
    (record,) = [r for r in caplog.records if "UL1257" in r.getMessage()]
    assert record.levelno == logging.WARNING
    text = record.getMessage()
    assert name in text and "Nothing is lost" in text and "unlost run" in text
    assert (urlsplit(database).password or "?") not in text


def test_it_is_not_warned_while_a_relay_lives(database: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Even if something waits: the relay may have its reasons."""
    migrate.migrate(parse(database))
    hub = App(name="relay", store=database, broker=f"embedded://{tmp_path / 'events.db'}")
    with Work(hub), psycopg.connect(database, autocommit=True) as outside:
        until(lambda: outside.execute("select 1 from unlost.unlost_process where relays").fetchall(), "the relay lives")
        web = App(name="web", store=database)
        with psycopg.connect(database) as connection, web.outbox(connection) as block:
            block.publish(Placed(order_id="a"))
            outside.execute(
                "insert into unlost.unlost_outbox (shard, aggregatetype, id, type, ce_source, ce_time, added) "
                "values (99, 'x', 'x', 'x', 'x', 'x', now() - interval '1 day')"
            )  # in no shard: it stays
        until(lambda: getattr(web._doors[database], "_warned", 0) > 0, "it has looked")
        kit.close(web)
    assert "UL1257" not in caplog.text


# --- other places ----------------------------------------------------------------------------------------------------


def test_postgres_beside_a_store_in_a_file(database: str, tmp_path: Path) -> None:
    """Without UNLOST_STORE: the App names the database, and its relay looks there as well."""
    migrate.migrate(parse(database))
    arrivals, broker = Arrivals(), f"embedded://{tmp_path / 'events.db'}"
    web = App(name="web", store="", broker=broker, outboxes=[database])
    with Work(App(arrivals.service, store="", broker=broker, outboxes=[database])):
        sent = []
        for _ in range(3):
            with psycopg.connect(database) as connection, web.outbox(connection) as block:
                for _ in range(3):
                    block.publish(Placed(order_id="a"), id=fresh())
                    sent.append(block._events[-1].id)
        assert ids(arrivals.of(*sent)) == sent
        until(lambda: not left(database), "all are confirmed")
    assert arrivals.twice() == []
    kit.close(web)


@pytest.mark.parametrize("kind", [session_kit.Psycopg, session_kit.Sqlite3], ids=lambda kind: kind.__name__)
def test_relays_come_and_go(kind: type[Program], database: str, tmp_path: Path) -> None:
    """What one has not sent when it ends, the others send; nothing comes twice, and the order of a key is kept."""
    migrate.migrate(parse(database))
    path, broker = tmp_path / "program.db", f"embedded://{tmp_path / 'events.db'}"

    def app(*services: Any) -> App:
        return App(*services, name="web", store=database, broker=broker, outboxes=[f"sqlite:///{path}"])

    arrivals, web = Arrivals(), app()
    program = kind(database if kind.dialect == "postgresql" else str(path)).open()
    if isinstance(program.connection, sqlite3.Connection):
        program.connection.execute("pragma busy_timeout = 10000")
    numbers = iter(range(1000))

    def publish() -> None:
        for _ in range(5):
            program.begin()
            with outbox(web, program) as block:
                for _ in range(20):
                    block.publish(Placed(order_id="a", n=next(numbers)))
            program.commit()

    publish()  # before anybody is there
    with Work(app(arrivals.service)) as first:
        publish()
        with Work(app()) as second:
            publish()
            with Work(app()):
                publish()
                second.stop()
                publish()
            publish()
        first.stop()
    publish()
    with Work(app(arrivals.service)):
        found = arrivals.of_key("a", 700)
    assert [json.loads(e.data or b"")["n"] for e in found] == list(range(700))
    program.close()
    kit.close(web)


# --- as the libraries want to be used --------------------------------------------------------------------------------


def test_the_blocks_of_sqlalchemy(place: Place) -> None:
    engine = sqlalchemy.create_engine(session_kit.engine_url(place.postgres, "psycopg"))
    key = fresh()
    with Session(engine) as session, session.begin(), place.web.outbox(session) as first:
        first.publish(Placed(order_id=key, n=1))
        with contextlib.suppress(KeyError), session.begin_nested(), place.web.outbox(session) as gone:
            gone.publish(Placed(order_id=key, n=8))
            raise KeyError
        nested = session.begin_nested()
        with place.web.outbox(session) as gone:
            gone.publish(Placed(order_id=key, n=9))
        nested.rollback()
        with session.begin_nested(), place.web.outbox(session) as second:
            second.publish(Placed(order_id=key, n=0))
    engine.dispose()
    assert [json.loads(e.data or b"")["n"] for e in place.arrivals.of_key(key, 2)] == [0, 1]


def test_the_blocks_of_django(place: Place) -> None:
    made = session_kit.django_connection(place.postgres, "postgresql")
    key = fresh()
    with transaction.atomic(using=made.alias):
        with contextlib.suppress(KeyError), transaction.atomic(using=made.alias), place.web.outbox(made) as gone:
            gone.publish(Placed(order_id=key, n=8))
            raise KeyError
        with contextlib.suppress(KeyError), transaction.atomic(using=made.alias):
            with place.web.outbox(made) as gone:
                gone.publish(Placed(order_id=key, n=9))
            raise KeyError
        with transaction.atomic(using=made.alias), place.web.outbox(made) as block:
            block.publish(Placed(order_id=key, n=0))
        transaction.on_commit(lambda: None, using=made.alias)
    made.close()
    assert [json.loads(e.data or b"")["n"] for e in place.arrivals.of_key(key, 1)] == [0]


async def test_a_cancelled_request_leaves_nothing_or_all(place: Place) -> None:
    key = fresh()

    async def request() -> None:
        async with await psycopg.AsyncConnection.connect(place.postgres) as connection:
            await connection.execute("insert into note values (%s)", (key,))
            async with place.web.outbox(connection) as block:
                block.publish(Placed(order_id=key))
                inside.set()
                await asyncio.sleep(30)

    inside = asyncio.Event()
    task = asyncio.create_task(request())
    await inside.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()
    program = session_kit.Psycopg(place.postgres).open()
    assert not written(program, key)
    assert await asyncio.to_thread(fence, place, program, key) == []
    program.close()


# --- processes and threads -------------------------------------------------------------------------------------------

FEW = [
    session_kit.Psycopg,
    session_kit.AsyncAlchemySession,
    session_kit.AlchemySession,
    session_kit.Django,
    session_kit.Sqlite3,
    session_kit.SqliteDjango,
]


@pytest.mark.parametrize("kind", FEW, ids=lambda kind: kind.__name__)
def test_from_threads(kind: type[Program], place: Place) -> None:
    """Each with a connection of its own, all through one App, which all of them use for the first time."""
    web, keys = place.app("threads"), [fresh() for _ in range(8)]
    at_once = threading.Barrier(len(keys))

    def publish(key: str) -> None:
        program = kind(place.sqlite if kind.dialect == "sqlite" else place.postgres).open()
        try:
            if isinstance(program.connection, sqlite3.Connection):
                program.connection.execute("pragma busy_timeout = 10000")
            at_once.wait()
            for n in range(5):
                with in_transaction(program), outbox(web, program) as block:
                    block.publish(Placed(order_id=key, n=n))
        finally:
            program.close()

    with ThreadPoolExecutor(len(keys)) as pool:
        list(pool.map(publish, keys))
    for key in keys:
        assert [json.loads(e.data or b"")["n"] for e in place.arrivals.of_key(key, 5)] == list(range(5))
    kit.close(web)


@pytest.mark.parametrize("kind", FEW, ids=lambda kind: kind.__name__)
def test_from_forked_children(kind: type[Program], place: Place) -> None:
    """As servers fork their workers: the parent has used the App already, and goes on with it."""
    url = place.sqlite if kind.dialect == "sqlite" else place.postgres
    text = f"""
        import os, sqlite3, sys, threading
        import session_kit as kit
        import outbox_kit
        from unlost import App

        app = App(name="forks", store={place.postgres!r}, outboxes=["sqlite:///" + {place.sqlite!r}])

        def publish(key):
            program = kit.{kind.__name__}({url!r}).open()
            if isinstance(program.connection, sqlite3.Connection):
                program.connection.execute("pragma busy_timeout = 10000")
            program.begin()
            with outbox_kit.outbox(app, program) as block:
                block.publish(outbox_kit.Placed(order_id=key), id=key)
            program.commit()
            program.close()

        key = sys.argv[1]
        publish(key + "-before")
        for child in range(3):
            if os.fork() == 0:
                publish(f"{{key}}-{{child}}a")
                publish(f"{{key}}-{{child}}b")
                os._exit(0)
        publish(key + "-after")
        for child in range(3):
            assert os.wait()[1] == 0
        publish(key + "-end")
    """
    key = fresh()
    done = python(text, key)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    wanted = [f"{key}-{n}{part}" for n in range(3) for part in "ab"] + [
        f"{key}-{w}" for w in ("before", "after", "end")
    ]
    assert len(place.arrivals.of(*wanted)) == len(wanted)


def test_from_a_process_that_ends_at_once(place: Place) -> None:
    """It has no broker, no services and no time to wait for anything; its App is not connected."""
    text = f"""
        import sys
        import psycopg
        from outbox_kit import Placed
        from unlost import App

        app = App(name="script", store={place.postgres!r})
        with psycopg.connect({place.postgres!r}) as connection, app.outbox(connection) as outbox:
            outbox.publish(Placed(order_id="script"), id=sys.argv[1])
    """
    id = fresh()
    done = python(text, id)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (found,) = place.arrivals.of(id)
    assert found.source == "script"


def python(text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(
        [str(Path(__file__).parent), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text), *arguments], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
