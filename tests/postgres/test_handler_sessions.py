"""`ctx.transaction(session)`: rows, events and the mark in one commit, through every session that handlers may have."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import handler_kit
import psycopg
import psycopg_pool
import pytest
import session_kit
import sqlalchemy
from handler_kit import ASYNC, SQLITE, SYNC, Sessions
from outbox_kit import Work, fresh, until
from session_kit import Outside
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from servers.postgres import Postgres
from unlost import App, Context, Event, Retry, Service, UsageError
from unlost.delivery.lanes import Delivery
from unlost.delivery.service import Guarantee
from unlost.errors import Misconfigured
from unlost.store.postgres import migrate
from unlost.store.postgres.settings import parse

ROOT = Path(__file__).parents[2]


class Place(NamedTuple):
    store: str
    broker: str
    sqlite: str


@pytest.fixture(scope="module")
def place(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One store, one broker and one SQLite file: tests have services and topics of their own."""
    folder = tmp_path_factory.mktemp("place")
    url = postgres.fresh()
    migrate.migrate(parse(url))
    path = str(folder / "program.db")
    for target in (url, path):
        outside = Outside(target)
        outside.sql("create table note (topic text not null, id text not null)")
        outside.close()
    yield Place(url, f"embedded://{folder / 'events.db'}", path)
    postgres.drop_database(urlsplit(url).path[1:])


class Crash(BaseException):
    """The process ends here, as far as the rest of the world can tell."""


class Scene:
    """A service with one handler that writes a row and publishes, and what came of it."""

    def __init__(self, place: Place, kind: type[Sessions], guarantee: Guarantee = "effectively-once") -> None:
        self.place = place
        self.kind = kind
        self.name = fresh(kind.__name__.lower())
        self.calls: list[str] = []
        self.fail_on: set[str] = set()  # once each, inside the block
        self.guarantee = guarantee
        topic = self.name

        class Ordered(Event, key="key", topic=topic):
            order_id: str
            key: str = "k"

        class Paid(Event, key="order_id", topic=topic + ".paid"):
            order_id: str

        self.Ordered, self.Paid = Ordered, Paid
        self.sessions = kind(place.sqlite if kind.dialect == "sqlite" else place.store)

    def service(self) -> Service:
        service = Service(self.name, guarantee=self.guarantee, retry=Retry(attempts=2, first=0))
        sessions = self.sessions

        async def handle(order: Any, ctx: Context) -> None:
            self.calls.append(order.order_id)
            async with sessions.open() as session, ctx.transaction(session) as db:
                assert db is session
                await sessions.sql(db, self._insert(order.order_id))
                ctx.publish(self.Paid(order_id=order.order_id))
                self._perhaps_fail(order.order_id)

        def handle_sync(order: Any, ctx: Context) -> None:
            self.calls.append(order.order_id)
            with sessions.open() as session, ctx.transaction(session) as db:
                assert db is session
                sessions.sql(db, self._insert(order.order_id))
                ctx.publish(self.Paid(order_id=order.order_id))
                self._perhaps_fail(order.order_id)

        service.on(self.Ordered, name="handle")(handle if sessions.is_async else handle_sync)
        return service

    def _insert(self, id: str) -> str:
        return f"insert into note values ('{self.name}', '{id}')"

    def _perhaps_fail(self, id: str) -> None:
        if id in self.fail_on:
            self.fail_on.remove(id)
            raise ValueError(id)

    def app(self, *more: Service, probe: Any = None, store: str | None = None) -> App:
        outboxes = [f"sqlite:///{self.place.sqlite}"] if self.kind.dialect == "sqlite" else []
        return App(
            self.service(), *more, broker=self.place.broker, store=self.place.store if store is None else store,
            outboxes=outboxes, probe=probe,
        )  # fmt: skip

    def work(self, app: App) -> Work:
        return Work(app, self.sessions.close if self.sessions.is_async else None)

    def rows(self) -> Counter[str]:
        outside = Outside(self.sessions.url)
        try:
            return Counter(id for (id,) in outside.sql(f"select id from note where topic = '{self.name}'"))
        finally:
            outside.close()

    def counts(self) -> Counter[str]:
        """How its events ended, as the books have it."""
        found: Counter[str] = Counter()
        for (counts,) in self.look("select counts from unlost.unlost_progress where service = '{name}'"):
            found.update(json.loads(counts))
        for table in ("ledger", "shelf", "waiting"):
            ((count,),) = self.look(f"select count(*) from unlost.unlost_{table} where service = '{{name}}'")
            found[table] += count
        return +found

    def look(self, sql: str) -> list[Any]:
        outside = Outside(self.place.store)
        try:
            return outside.sql(sql.format(name=self.name))
        finally:
            outside.close()

    def end(self) -> None:
        if not self.sessions.is_async:
            self.sessions.close()


@pytest.fixture
def scene(request: pytest.FixtureRequest, place: Place) -> Iterator[Scene]:
    made = Scene(place, request.param)
    yield made
    made.end()


def scenes(*kinds: type[Sessions]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("scene", kinds, indirect=True, ids=lambda kind: kind.__name__)


everywhere = scenes(*SYNC, *ASYNC, *SQLITE)


def arrivals_of(scene: Scene) -> tuple[Service, list[str]]:
    """Another service, which takes what the handler publishes."""
    service, came = Service(scene.name + ".after"), list[str]()

    @service.on(scene.Paid)
    async def take(event: Any, ctx: Context) -> None:
        came.append(event.order_id)

    return service, came


# --- one commit ------------------------------------------------------------------------------------------------------


@everywhere
def test_rows_events_and_mark_are_one_commit(scene: Scene) -> None:
    """Also for events that come again, and for a handler that fails inside its block at first."""
    after, came = arrivals_of(scene)
    orders = [fresh() for _ in range(10)]
    scene.fail_on = set(orders[3:6])
    app = scene.app(after)
    with scene.work(app) as work:
        for order in orders:
            work.call(app.publish(scene.Ordered(order_id=order), id=order))
        for order in orders[:5]:  # a producer that never heard of its success
            work.call(app.publish(scene.Ordered(order_id=order), id=order))
        until(lambda: scene.counts().total() == 15, "all are settled")
        until(lambda: len(came) == 10, "what was published has come")
    assert scene.rows() == Counter(orders)
    assert Counter(came) == Counter(orders)
    assert scene.counts() == {"done": 10, "skipped:duplicate": 5}
    assert Counter(scene.calls) == Counter(orders) + Counter(orders[3:6])


@everywhere
def test_a_crash_between_commit_and_settling(scene: Scene) -> None:
    """The event comes again. It is done, and nothing of it happens a second time; it is no duplicate either."""
    order, after = fresh(), fresh()

    def probe(step: str, d: Delivery) -> None:
        if step == "handled" and d.arrival.envelope is not None and d.arrival.envelope.topic == scene.name:
            raise Crash

    app = scene.app(probe=probe)
    with pytest.raises(Crash), scene.work(app) as work:
        work.call(app.publish(scene.Ordered(order_id=order), id=order))
        work.ended()
    assert scene.rows() == {order: 1}
    assert scene.counts() == {}, "it has been settled: this is no crash in between"

    scene.end()
    scene.sessions = scene.kind(scene.sessions.url)  # as another process would
    service, came = arrivals_of(scene)
    app = scene.app(service)
    with scene.work(app) as work:
        work.call(app.publish(scene.Ordered(order_id=order), id=after))  # another event of the same key
        until(lambda: scene.counts().total() == 2, "both are settled")
        until(lambda: len(came) == 2, "what was published has come")
    assert scene.rows() == {order: 2}
    assert came == [order, order]
    assert scene.counts() == {"done": 2}


@scenes(handler_kit.Psycopg, handler_kit.AsyncPsycopg, handler_kit.Sqlite3)
def test_at_least_once_is_what_it_says(scene: Scene) -> None:
    """Rows and events are one commit all the same; but there is no mark."""
    scene.guarantee = "at-least-once"
    after, came = arrivals_of(scene)
    order, bad = fresh(), fresh()
    scene.fail_on = {bad}
    app = scene.app(after)
    with scene.work(app) as work:
        for id in (order, order, bad):
            work.call(app.publish(scene.Ordered(order_id=id), id=id))
        until(lambda: scene.counts().total() == 3 and len(came) == 3, "all are settled")
    assert scene.rows() == {order: 2, bad: 1}
    assert scene.counts() == {"done": 3}


@pytest.mark.parametrize("kind", SQLITE, ids=lambda kind: kind.__name__)
def test_a_file_of_ones_own_and_no_server(kind: type[Sessions], place: Place, tmp_path: Path) -> None:
    """Broker and store are the embedded file; rows, marks and events are in the service's own."""
    path = tmp_path / "shop.db"
    own = Place("", f"embedded://{tmp_path / 'events.db'}", str(path))
    scene = Scene(own, kind)
    outside = Outside(str(path))
    outside.sql("create table note (topic text not null, id text not null)")
    after, came = arrivals_of(scene)
    app = scene.app(after)
    orders = [fresh() for _ in range(5)]
    scene.fail_on = {orders[2]}

    def counts() -> Counter[str]:
        found: Counter[str] = Counter()
        for (text,) in app.file.read(
            lambda c: c.execute("select counts from unlost_progress where service = ?", (scene.name,)).fetchall()
        ):
            found.update(json.loads(text))
        return +found

    with scene.work(app) as work:
        for order in (*orders, *orders[:2]):
            work.call(app.publish(scene.Ordered(order_id=order), id=order))
        until(lambda: counts() == {"done": 5, "skipped:duplicate": 2}, "all are settled")
        until(lambda: len(came) == 5 and not outside.sql("select 1 from unlost_outbox"), "what was published has come")
    assert scene.rows() == Counter(orders) and Counter(came) == Counter(orders)
    assert len(outside.sql("select 1 from unlost_inbox")) == 5
    outside.close()
    scene.end()


CHILD = """
    import os, signal, sys
    import handler_kit
    from unlost import App, Context, Event, Service

    class Ordered(Event, key="order_id", topic="kill"):
        order_id: str

    class Paid(Event, key="order_id", topic="kill.paid"):
        order_id: str

    kind, url, store, broker = sys.argv[1:5]
    sessions = getattr(handler_kit, kind)(url)
    service = Service("kill", guarantee="effectively-once")

    async def handle(order: Ordered, ctx: Context) -> None:
        async with sessions.open() as session, ctx.transaction(session) as db:
            await sessions.sql(db, f"insert into note values ('kill', '{order.order_id}')")
            ctx.publish(Paid(order_id=order.order_id))

    def handle_sync(order: Ordered, ctx: Context) -> None:
        with sessions.open() as session, ctx.transaction(session) as db:
            sessions.sql(db, f"insert into note values ('kill', '{order.order_id}')")
            ctx.publish(Paid(order_id=order.order_id))

    service.on(Ordered, name="handle")(handle if sessions.is_async else handle_sync)

    def kill(step, delivery):
        if step == "handled" and sys.argv[5] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)

    outboxes = ["sqlite:///" + url] if sessions.dialect == "sqlite" else []
    app = App(service, store=store, broker=broker, outboxes=outboxes, probe=kill)
    app.run()
"""


@pytest.mark.parametrize(
    ("kind", "beside"),
    [
        (handler_kit.AsyncAlchemySession, "PostgreSQL"),
        (handler_kit.Django, "PostgreSQL"),
        (handler_kit.Sqlite3, "PostgreSQL"),
        (handler_kit.Sqlite3, "the embedded file"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_kill_9_between_commit_and_settling(kind: type[Sessions], beside: str, database: str, tmp_path: Path) -> None:
    """The same in earnest: the process is gone with all that it knew."""
    migrate.migrate(parse(database))
    url = str(tmp_path / "own.db") if kind.dialect == "sqlite" else database
    store = database if beside == "PostgreSQL" else ""
    broker = f"embedded://{tmp_path / 'events.db'}"
    outside = Outside(url)
    outside.sql("create table note (topic text not null, id text not null)")

    class Ordered(Event, key="order_id", topic="kill"):
        order_id: str

    def start(mode: str) -> subprocess.Popen[bytes]:
        path = os.pathsep.join([str(Path(__file__).parent), str(ROOT / "tests")])
        environment = {k: v for k, v in os.environ.items() if not k.startswith("UNLOST_")} | {"PYTHONPATH": path}
        command = [sys.executable, "-c", textwrap.dedent(CHILD), kind.__name__, url, store, broker, mode]
        return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)

    async def publish(id: str) -> None:
        async with App(broker=broker, store=store) as app:
            await app.publish(Ordered(order_id=id), id=id)

    asyncio.run(publish("a"))
    child = start("kill")
    assert child.wait(30) == -signal.SIGKILL
    assert outside.sql("select id from note") == [("a",)]
    child = start("live")
    try:
        asyncio.run(publish("b"))
        until(lambda: outside.sql("select id from note where id = 'b'"), "the next one is handled")
        until(lambda: not outside.sql(f"select 1 from {'' if kind.dialect == 'sqlite' else 'unlost.'}unlost_outbox"))
    finally:
        child.terminate()
        assert child.wait(30) == 0
    assert outside.sql("select id from note order by id") == [("a",), ("b",)]
    counts = Counter[str]()
    if store:
        db = Outside(store)
        rows = db.sql("select counts from unlost.unlost_progress where service = 'kill'")
        db.close()
    else:
        with closing(sqlite3.connect(tmp_path / "events.db")) as file:  # nobody else has it open
            rows = file.execute("select counts from unlost_progress where service = 'kill'").fetchall()
    for (found,) in rows:
        counts.update(json.loads(found))
    assert counts == {"done": 2}
    outside.close()


# --- what no event can be handled with: the service stops, every event stays where it is -----------------------------


class Refused(NamedTuple):
    error: UsageError
    counts: Counter[str]


def refused(
    place: Place,
    handler: Callable[..., Any],
    *,
    outboxes: tuple[str, ...] = (),
    store: str | None = None,
    at_end: Any = None,
) -> Refused:
    """How a service ends whose handler is this one, after one event; and what was written of the event."""
    name = fresh("refused")

    class Ordered(Event, key="order_id", topic=name):
        order_id: str

    service = Service(name, guarantee="effectively-once", retry=Retry(attempts=1))
    service.on(Ordered, name="handle")(handler)
    app = App(service, broker=place.broker, store=place.store if store is None else store, outboxes=outboxes)
    with pytest.raises(UsageError) as caught, Work(app, at_end) as work:
        work.call(app.publish(Ordered(order_id="a")))
        work.ended()
    scene = Scene(place, handler_kit.Psycopg)
    scene.name = name
    ((positions,),) = scene.look("select sum(position)::integer from unlost.unlost_progress where service = '{name}'")
    assert positions in (0, None)
    return Refused(caught.value, scene.counts())


@pytest.fixture
def elsewhere(postgres: Postgres) -> Iterator[str]:
    """Another database, with tables of unlost or without."""
    url = postgres.fresh()
    yield url
    postgres.drop_database(urlsplit(url).path[1:])


@pytest.mark.parametrize("kind", [*SYNC, *ASYNC], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("tables", [False, True], ids=["without tables", "with another store"])
def test_the_wrong_database(kind: type[Sessions], tables: bool, place: Place, elsewhere: str) -> None:
    if tables:
        migrate.migrate(parse(elsewhere))
    sessions = kind(elsewhere)

    async def handle(order: Event, ctx: Context) -> None:
        async with sessions.open() as session, ctx.transaction(session):
            raise AssertionError("it is let in")

    def handle_sync(order: Event, ctx: Context) -> None:
        with sessions.open() as session, ctx.transaction(session):
            raise AssertionError("it is let in")

    if sessions.is_async:
        found = refused(place, handle, at_end=sessions.close)
    else:
        found = refused(place, handle_sync)
        sessions.close()
    assert isinstance(found.error, Misconfigured)
    assert found.error.code == "UL1253"
    assert ("has no tables of unlost" in found.error.found) is not tables
    assert "UNLOST_STORE" in found.error.fix
    assert found.counts == {}


@pytest.mark.parametrize("kind", SQLITE, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("store", ["PostgreSQL", "the embedded file"])
def test_a_file_that_the_app_does_not_know(kind: type[Sessions], store: str, place: Place, tmp_path: Path) -> None:
    sessions = kind(str(tmp_path / "own.db"))

    def handle(order: Event, ctx: Context) -> None:
        with sessions.open() as session, ctx.transaction(session):
            raise AssertionError("it is let in")

    own = place if store == "PostgreSQL" else place._replace(broker=f"embedded://{tmp_path / 'events.db'}")
    found = refused(own, handle, store=None if store == "PostgreSQL" else "")
    sessions.close()
    assert isinstance(found.error, Misconfigured)
    assert found.error.code == "UL1220"
    assert "App(outboxes=['sqlite:///" in found.error.fix
    assert found.counts == {}


def test_a_database_in_memory(place: Place) -> None:
    def handle(order: Event, ctx: Context) -> None:
        with closing(sqlite3.connect(":memory:")) as connection, ctx.transaction(connection):
            raise AssertionError("it is let in")

    assert refused(place, handle, outboxes=(f"sqlite:///{place.sqlite}",)).error.code == "UL1220"


def test_postgres_beside_a_store_in_a_file(place: Place, tmp_path: Path, database: str) -> None:
    """Its outbox is known to the App; but the books are not in it, so no handler's effect can be marked there."""
    migrate.migrate(parse(database))

    def handle(order: Event, ctx: Context) -> None:
        with psycopg.connect(database) as connection, ctx.transaction(connection):
            raise AssertionError("it is let in")

    own = place._replace(broker=f"embedded://{tmp_path / 'events.db'}")
    found = refused(own, handle, store="", outboxes=(database,))
    assert isinstance(found.error, Misconfigured)
    assert found.error.code == "UL1220"
    assert "UNLOST_STORE=postgresql://" in found.error.fix


def test_wrong_kinds_of_sessions(place: Place) -> None:
    """Each is said with the way out; the service stops, because the next event would fail in the same way."""
    engine = sqlalchemy.create_engine(session_kit.engine_url(place.store, "psycopg"))
    async_engine = create_async_engine(session_kit.engine_url(place.store, "psycopg"))
    pool = psycopg_pool.ConnectionPool(place.store, open=False)

    async def sync_in_async(order: Event, ctx: Context) -> None:
        with psycopg.connect(place.store) as connection:
            async with ctx.transaction(connection):
                raise AssertionError

    def async_in_sync(order: Event, ctx: Context) -> None:
        session = AsyncSession(async_engine)
        with ctx.transaction(session):
            raise AssertionError

    async def begun_already(order: Event, ctx: Context) -> None:
        async with AsyncSession(async_engine) as session:
            await session.execute(sqlalchemy.text("select 1"))
            async with ctx.transaction(session):
                raise AssertionError

    def begun_already_sync(order: Event, ctx: Context) -> None:
        with psycopg.connect(place.store) as connection:
            connection.execute("select 1")
            with ctx.transaction(connection):
                raise AssertionError

    def an_engine(order: Event, ctx: Context) -> None:
        with ctx.transaction(engine):
            raise AssertionError

    async def an_async_engine(order: Event, ctx: Context) -> None:
        async with ctx.transaction(async_engine):
            raise AssertionError

    def a_pool(order: Event, ctx: Context) -> None:
        with ctx.transaction(pool):
            raise AssertionError

    async def a_url(order: Event, ctx: Context) -> None:
        async with ctx.transaction(place.store):
            raise AssertionError

    for handler, code, says in [
        (sync_in_async, "UL1252", "an async handler needs a session that is async"),
        (async_in_sync, "UL1252", "a sync handler needs a session that is sync"),
        (begun_already, "UL1254", "one is open on this session already"),
        (begun_already_sync, "UL1254", "read before the block with another one"),
        (an_engine, "UL1251", "with engine.begin() as connection:"),
        (an_async_engine, "UL1251", "async with engine.begin() as connection:"),
        (a_pool, "UL1251", "with pool.connection() as connection:"),
        (a_url, "UL1251", "builtins.str"),
    ]:
        found = refused(place, handler, at_end=async_engine.dispose)
        assert isinstance(found.error, Misconfigured), handler.__name__
        assert (found.error.code, found.counts) == (code, {}), handler.__name__
        assert says in str(found.error), handler.__name__
        assert "postgresql://" not in str(found.error), handler.__name__
    engine.dispose()


def test_a_stopped_service_goes_on_when_it_is_set_right(place: Place, elsewhere: str) -> None:
    """What it had refused is handled then, in order."""
    scene = Scene(place, handler_kit.Psycopg)
    scene.sessions = handler_kit.Psycopg(elsewhere)
    app = scene.app()
    with pytest.raises(Misconfigured), scene.work(app) as work:
        work.call(app.publish_all([scene.Ordered(order_id=f"{key}{n}", key=key) for n in range(3) for key in "ab"]))
        work.ended()
    assert scene.counts() == {}
    scene.sessions = handler_kit.Psycopg(place.store)
    scene.calls.clear()
    app = scene.app()
    with scene.work(app):
        until(lambda: scene.counts()["done"] == 6, "all are handled")
    assert scene.counts() == {"done": 6}
    for key in ("a", "b"):
        assert [call for call in scene.calls if call[0] == key] == [f"{key}{n}" for n in range(3)]


# --- errors inside the block -----------------------------------------------------------------------------------------


@scenes(
    handler_kit.Psycopg, handler_kit.AlchemySession, handler_kit.Django, handler_kit.AsyncPsycopg, handler_kit.Sqlite3
)
def test_whoever_ends_the_transaction_in_the_block_is_told(scene: Scene) -> None:
    """Nothing of it counts as handled: the event goes to the shelf."""
    sessions = scene.sessions
    original = sessions.sql

    def sql(session: Any, text: str) -> Any:
        made = original(session, text)

        async def awaited() -> None:
            await made
            await session.commit()

        if inspect.isawaitable(made):
            return awaited()
        return session.commit()

    sessions.sql = sql  # type: ignore[method-assign]
    order = fresh()
    app = scene.app()
    with scene.work(app) as work:
        work.call(app.publish(scene.Ordered(order_id=order), id=order))
        until(lambda: scene.counts()["shelf"], "it is on the shelf")
    ((error, reason),) = scene.look("select error, reason from unlost.unlost_shelf where service = '{name}'")
    assert reason in ("cannot_heal", "exhausted"), error
    assert any(word in error for word in ("ended by unlost", "can't be", "forbidden", "Explicit commit")), error
    assert not scene.look("select 1 from unlost.unlost_inbox where service = '{name}'"), "it counts as handled"


@scenes(handler_kit.Psycopg, handler_kit.AsyncAlchemySession, handler_kit.Django)
def test_a_lost_connection_costs_no_attempt(scene: Scene, postgres: Postgres) -> None:
    """The transaction is rolled back by the server; the event is tried again by itself."""
    ended = threading.Event()

    def sql(session: Any, text: str, original: Any = scene.sessions.sql) -> Any:
        if not ended.is_set():
            ended.set()
            postgres.terminate_backends(
                "application_name <> 'unlost' and state = 'idle in transaction'", database=urlsplit(scene.place.store).path[1:]
            )  # fmt: skip
        return original(session, text)

    scene.sessions.sql = sql  # type: ignore[method-assign]
    order = fresh()
    app = scene.app()
    with scene.work(app) as work:
        work.call(app.publish(scene.Ordered(order_id=order), id=order))
        until(lambda: scene.counts()["done"], "it is handled")
    assert ended.is_set()
    assert scene.rows() == {order: 1}
    assert scene.calls == [order, order]
    assert scene.counts() == {"done": 1}
