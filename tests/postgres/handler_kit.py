"""Sessions as handlers open them: one for each delivery, out of an engine or a pool where their library has one."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import psycopg
import session_kit
import sqlalchemy
from psycopg_pool import AsyncConnectionPool, ConnectionPool
from session_kit import engine_url
from sqlalchemy.ext import asyncio as async_alchemy
from sqlalchemy.orm import Session, scoped_session, sessionmaker

Insert = Callable[[str], Any]


class Sessions:
    """What a handler has at hand. `sql` runs a statement on an open session, as its library wants it."""

    dialect = "postgresql"
    is_async = False

    def __init__(self, url: str) -> None:
        self.url = url
        self.start()

    def start(self) -> None: ...

    def open(self) -> Any:
        raise NotImplementedError

    def sql(self, session: Any, text: str) -> Any:
        return session.execute(text)

    def close(self) -> Any: ...


# --- sync ------------------------------------------------------------------------------------------------------------


class Psycopg(Sessions):
    def open(self) -> Any:
        return psycopg.connect(self.url)


class PsycopgAutocommit(Sessions):
    def open(self) -> Any:
        return psycopg.connect(self.url, autocommit=True)


class PsycopgPool(Sessions):
    def start(self) -> None:
        self.pool = ConnectionPool(self.url, min_size=0, max_size=4, open=True)

    def open(self) -> Any:
        return self.pool.connection()

    def close(self) -> None:
        self.pool.close()


class Alchemy(Sessions):
    driver = "psycopg"

    def start(self) -> None:
        self.engine = sqlalchemy.create_engine(engine_url(self.url, self.driver))

    def open(self) -> Any:
        return self.engine.connect()

    def sql(self, session: Any, text: str) -> Any:
        return session.execute(sqlalchemy.text(text))

    def close(self) -> None:
        self.engine.dispose()


class AlchemySession(Alchemy):
    def open(self) -> Any:
        return Session(self.engine)


class ScopedSession(Alchemy):
    def start(self) -> None:
        super().start()
        self.scoped = scoped_session(sessionmaker(self.engine))

    @contextmanager
    def open(self) -> Iterator[Any]:
        try:
            yield self.scoped
        finally:
            self.scoped.remove()


class AlchemyPsycopg2(Alchemy):
    driver = "psycopg2"


class Django(Sessions):
    def start(self) -> None:
        self.alias = session_kit.django_connection(self.url, self.dialect).alias

    @contextmanager
    def open(self) -> Iterator[Any]:
        connection = session_kit.django.db.connections[self.alias]  # that of this thread
        try:
            yield connection
        finally:
            connection.close()

    def sql(self, session: Any, text: str) -> Any:
        with session.cursor() as cursor:
            cursor.execute(text)


class Sqlite3(Sessions):
    dialect = "sqlite"

    @contextmanager
    def open(self) -> Iterator[Any]:
        with contextlib.closing(sqlite3.connect(self.url, timeout=10)) as connection:
            yield connection


class Sqlite3Explicit(Sqlite3):
    @contextmanager
    def open(self) -> Iterator[Any]:
        with contextlib.closing(sqlite3.connect(self.url, timeout=10, isolation_level=None)) as connection:
            yield connection


class SqliteAlchemy(Alchemy):
    dialect = "sqlite"
    driver = "pysqlite"


class SqliteAlchemySession(AlchemySession):
    dialect = "sqlite"
    driver = "pysqlite"


class SqliteDjango(Django):
    dialect = "sqlite"


# --- async -----------------------------------------------------------------------------------------------------------


class AsyncSessions(Sessions):
    is_async = True

    async def sql(self, session: Any, text: str) -> Any:
        return await session.execute(text)

    async def close(self) -> None: ...


class AsyncPsycopg(AsyncSessions):
    @asynccontextmanager
    async def open(self) -> AsyncIterator[Any]:
        async with await psycopg.AsyncConnection.connect(self.url) as connection:
            yield connection


class AsyncPsycopgPool(AsyncSessions):
    def start(self) -> None:
        self.pool = AsyncConnectionPool(self.url, min_size=0, max_size=4, open=False)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Any]:
        await self.pool.open()
        async with self.pool.connection() as connection:
            yield connection

    async def close(self) -> None:
        await self.pool.close()


class AsyncAlchemy(AsyncSessions):
    driver = "asyncpg"

    def start(self) -> None:
        self.engine = async_alchemy.create_async_engine(engine_url(self.url, self.driver))

    def open(self) -> Any:
        return self.engine.connect()

    async def sql(self, session: Any, text: str) -> Any:
        return await session.execute(sqlalchemy.text(text))

    async def close(self) -> None:
        await self.engine.dispose()


class AsyncAlchemySession(AsyncAlchemy):
    def open(self) -> Any:
        return async_alchemy.AsyncSession(self.engine)


class AsyncAlchemyPsycopg(AsyncAlchemy):
    driver = "psycopg"


class AsyncAlchemySessionPsycopg(AsyncAlchemySession):
    driver = "psycopg"


SYNC: list[type[Sessions]] = [
    Psycopg, PsycopgAutocommit, PsycopgPool, Alchemy, AlchemySession, ScopedSession, AlchemyPsycopg2, Django,
]  # fmt: skip
ASYNC: list[type[Sessions]] = [
    AsyncPsycopg, AsyncPsycopgPool, AsyncAlchemy, AsyncAlchemySession, AsyncAlchemyPsycopg, AsyncAlchemySessionPsycopg,
]  # fmt: skip
SQLITE: list[type[Sessions]] = [Sqlite3, Sqlite3Explicit, SqliteAlchemy, SqliteAlchemySession, SqliteDjango]
