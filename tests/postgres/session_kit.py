"""Programs with a database connection of their own, each as its library wants it used."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import sqlite3
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import unquote, urlsplit

import django
import django.db
import sqlalchemy
from django.conf import settings
from django.db import transaction
from sqlalchemy.ext import asyncio as async_alchemy
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from unlost.store.sessions import connect

try:
    import psycopg
except ImportError:
    pass  # one test takes it away
HAS_AIOSQLITE = importlib.util.find_spec("aiosqlite") is not None


class Program:
    """What a program does with its connection, by the words of the library. `url` is a PostgreSQL URL or a path."""

    dialect = "postgresql"
    errors = ""  # the package whose errors its user expects

    def __init__(self, url: str) -> None:
        self.url = url
        self.connection: Any = None
        self._runner = asyncio.Runner()
        self._closed = False
        self._ends: list[Callable[[], Any]] = []

    def open(self, *, autocommit: bool = False) -> Program:
        raise NotImplementedError

    def begin(self) -> None: ...

    def commit(self) -> None:
        self.run(self.connection.commit())

    def rollback(self) -> None:
        self.run(self.connection.rollback())

    def sql(self, statement: str) -> None:
        self.run(self.connection.execute(statement))

    @property
    def ours(self) -> Call:
        return Call(self)

    def run(self, value: Any) -> Any:
        """The value, awaited where it is to be awaited."""
        if not inspect.isawaitable(value):
            return value

        async def awaited() -> Any:
            return await value

        return self._runner.run(awaited())

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with suppress(Exception):  # the server may have ended the connection
            self.rollback()
        while self._ends:
            with suppress(Exception):
                self.run(self._ends.pop()())
        self._runner.close()


class Call:
    """unlost's session on the program's connection, without the difference between sync and async."""

    def __init__(self, program: Program) -> None:
        self.session = connect.of(program.connection)
        self._program = program

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.session, name)
        if not callable(found) or name == "is_transient":
            return found
        return lambda *args: self._program.run(found(*args))


# --- psycopg ---------------------------------------------------------------------------------------------------------


class Psycopg(Program):
    errors = "psycopg"

    def open(self, *, autocommit: bool = False) -> Program:
        self.connection = psycopg.connect(self.url, autocommit=autocommit)
        self._ends.append(self.connection.close)
        return self


class PsycopgBlock(Psycopg):
    """In autocommit mode, as much as possible in blocks."""

    block: Any = None

    def open(self, *, autocommit: bool = False) -> Program:
        return super().open(autocommit=True)

    def begin(self) -> None:
        self.block = self.connection.transaction()
        self.block.__enter__()

    def commit(self) -> None:
        self.block, block = None, self.block
        block.__exit__(None, None, None)

    def rollback(self) -> None:
        self.block, block = None, self.block
        if block is not None:
            block.__exit__(psycopg.Rollback, psycopg.Rollback(), None)


class PsycopgPipeline(PsycopgBlock):
    def open(self, *, autocommit: bool = False) -> Program:
        super().open()
        pipeline = self.connection.pipeline()
        pipeline.__enter__()
        self._ends.append(lambda: pipeline.__exit__(None, None, None))
        return self


class PsycopgImplicitPipeline(Psycopg):
    def open(self, *, autocommit: bool = False) -> Program:
        super().open(autocommit=autocommit)
        pipeline = self.connection.pipeline()
        pipeline.__enter__()
        self._ends.append(lambda: pipeline.__exit__(None, None, None))
        return self


class AsyncPsycopg(Program):
    errors = "psycopg"

    def open(self, *, autocommit: bool = False) -> Program:
        self.connection = self.run(psycopg.AsyncConnection.connect(self.url, autocommit=autocommit))
        self._ends.append(self.connection.close)
        return self


class AsyncPsycopgPipeline(AsyncPsycopg):
    def open(self, *, autocommit: bool = False) -> Program:
        super().open(autocommit=autocommit)
        pipeline = self.connection.pipeline()
        self.run(pipeline.__aenter__())
        self._ends.append(lambda: pipeline.__aexit__(None, None, None))
        return self


# --- SQLAlchemy ------------------------------------------------------------------------------------------------------


class Alchemy(Program):
    errors = "sqlalchemy"
    driver = "psycopg"
    as_session = False

    def open(self, *, autocommit: bool = False) -> Program:
        self.engine = self.make_engine(autocommit)
        self.connection = self.make(self.engine)
        return self

    def make_engine(self, autocommit: bool) -> Any:
        options: dict[str, Any] = {"isolation_level": "AUTOCOMMIT"} if autocommit else {}
        engine = sqlalchemy.create_engine(engine_url(self.url, self.driver), **options)
        self._ends.append(engine.dispose)
        return engine

    def make(self, engine: Any) -> Any:
        made = Session(engine) if self.as_session else engine.connect()
        self._ends.append(made.close)
        return made

    def sql(self, statement: str) -> None:
        self.run(self.connection.execute(sqlalchemy.text(statement)))


class AlchemySession(Alchemy):
    as_session = True


class ScopedSession(Alchemy):
    def make(self, engine: Any) -> Any:
        made = scoped_session(sessionmaker(engine))
        self._ends.append(made.remove)
        return made


class AsyncAlchemy(Alchemy):
    driver = "asyncpg"

    def make_engine(self, autocommit: bool) -> Any:
        options: dict[str, Any] = {"isolation_level": "AUTOCOMMIT"} if autocommit else {}
        engine = async_alchemy.create_async_engine(engine_url(self.url, self.driver), **options)
        self._ends.append(engine.dispose)
        return engine

    def make(self, engine: Any) -> Any:
        made = async_alchemy.AsyncSession(engine) if self.as_session else self.run(engine.connect().start())
        self._ends.append(made.close)
        return made


class AsyncAlchemySession(AsyncAlchemy):
    as_session = True


class AsyncScopedSession(AsyncAlchemy):
    def make(self, engine: Any) -> Any:
        made = async_alchemy.async_scoped_session(async_alchemy.async_sessionmaker(engine), lambda: 1)
        self._ends.append(made.remove)
        return made


def engine_url(url: str, driver: str) -> str:
    if "sqlite" in driver:
        return f"sqlite+{driver}:///{url}"
    return url.replace("postgresql://", f"postgresql+{driver}://")


# --- Django ----------------------------------------------------------------------------------------------------------


class Django(Program):
    errors = "django"
    block: Any = None

    def open(self, *, autocommit: bool = False) -> Program:
        self.connection = django_connection(self.url, self.dialect)
        self._ends.append(self.connection.close)
        return self

    def begin(self) -> None:
        self.block = transaction.atomic(using=self.connection.alias)
        self.block.__enter__()

    def commit(self) -> None:
        self.block, block = None, self.block
        block.__exit__(None, None, None)

    def rollback(self) -> None:
        self.block, block = None, self.block
        if block is not None:
            block.__exit__(ValueError, ValueError(), None)

    def sql(self, statement: str) -> None:
        with self.connection.cursor() as cursor:
            cursor.execute(statement)


class DjangoNoAutocommit(Django):
    def open(self, *, autocommit: bool = False) -> Program:
        super().open()
        if not autocommit:
            self.connection.set_autocommit(False)
        return self

    def begin(self) -> None: ...

    def commit(self) -> None:
        self.connection.commit()

    def rollback(self) -> None:
        self.connection.rollback()


_aliases = iter(range(10_000))


def django_connection(url: str, dialect: str, **options: Any) -> Any:
    """A connection as `connections[…]` gives it."""
    if not settings.configured:
        settings.configure(DATABASES={}, USE_TZ=True)
        django.setup()
    if dialect == "sqlite":
        one: dict[str, Any] = {"ENGINE": "django.db.backends.sqlite3", "NAME": url}
    else:
        parts = urlsplit(url)
        one = {
            "ENGINE": "django.db.backends.postgresql", "NAME": unquote(parts.path[1:]), "HOST": parts.hostname,
            "PORT": parts.port, "USER": unquote(parts.username or ""), "PASSWORD": unquote(parts.password or ""),
        }  # fmt: skip
    alias = f"test{next(_aliases)}"
    known = django.db.connections
    known.settings.update(known.configure_settings({"default": {}, alias: one | options}))
    return known[alias]


# --- sqlite3 ---------------------------------------------------------------------------------------------------------


class Sqlite3(Program):
    """Implicit transactions, as they are by default."""

    dialect = "sqlite"
    errors = "sqlite3"

    def open(self, *, autocommit: bool = False) -> Program:
        self.connection = sqlite3.connect(self.url, isolation_level=None if autocommit else "DEFERRED", timeout=0.1)
        self._ends.append(self.connection.close)
        return self


class Sqlite3Explicit(Sqlite3):
    def open(self, *, autocommit: bool = False) -> Program:
        return super().open(autocommit=True)

    def begin(self) -> None:
        self.sql("begin")


class SqliteAlchemy(Alchemy):
    dialect = "sqlite"
    driver = "pysqlite"


class SqliteAlchemySession(SqliteAlchemy):
    as_session = True


class AiosqliteSession(AsyncAlchemySession):
    dialect = "sqlite"
    driver = "aiosqlite"


class SqliteDjango(Django):
    dialect = "sqlite"


class SqliteDjangoNoAutocommit(DjangoNoAutocommit):
    dialect = "sqlite"


def above(cls: type[Alchemy], driver: str) -> type[Alchemy]:
    return type(f"{cls.__name__}{driver.title()}", (cls,), {"driver": driver})


POSTGRES: list[type[Program]] = [
    Psycopg,
    PsycopgBlock,
    PsycopgPipeline,
    PsycopgImplicitPipeline,
    AsyncPsycopg,
    AsyncPsycopgPipeline,
    Alchemy,
    above(Alchemy, "psycopg2"),
    AlchemySession,
    above(AlchemySession, "psycopg2"),
    ScopedSession,
    AsyncAlchemy,
    above(AsyncAlchemy, "psycopg"),
    AsyncAlchemySession,
    above(AsyncAlchemySession, "psycopg"),
    AsyncScopedSession,
    Django,
    DjangoNoAutocommit,
]
SQLITE: list[type[Program]] = [
    Sqlite3,
    Sqlite3Explicit,
    SqliteAlchemy,
    SqliteAlchemySession,
    SqliteDjango,
    SqliteDjangoNoAutocommit,
    *([AiosqliteSession] if HAS_AIOSQLITE else []),
]


class Outside:
    """Somebody else who looks at the same database."""

    def __init__(self, url: str) -> None:
        if url.startswith("postgresql:"):
            self._connection: Any = psycopg.connect(url, autocommit=True, options="-c lock_timeout=20s")
        else:
            self._connection = sqlite3.connect(url, isolation_level=None, timeout=0.1)

    def sql(self, statement: str) -> list[Any]:
        cursor = self._connection.execute(statement)
        return cursor.fetchall() if cursor.description else []

    def close(self) -> None:
        self._connection.close()
