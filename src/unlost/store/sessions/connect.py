"""From the user's connection or session to its adapter. The only place that names the adapters.

No library is imported that the program has not imported itself: a connection is recognised by the names of its classes.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from typing import Any

from unlost.errors import Misconfigured
from unlost.store.sessions.port import AsyncSession, SyncSession

_KNOWN = (
    "a connection of psycopg 3, a connection or session of SQLAlchemy 2 (PostgreSQL or SQLite), "
    "a connection of Django, or one of sqlite3; sync or async"
)

# beginning of the names of a class -> what to do; the first that fits
_WAYS_OUT = (
    ("apsw.", "use the standard library's sqlite3: two SQLite libraries on one file undo each other's locks"),
    ("sqlalchemy.engine.base.Engine", "open a connection first: with engine.begin() as connection:"),
    ("sqlalchemy.ext.asyncio.engine.AsyncEngine", "open a connection first: async with engine.begin() as connection:"),
    ("sqlalchemy.orm.session.sessionmaker", "open a session first: with Session.begin() as session:"),
    ("sqlalchemy.ext.asyncio.session.async_sessionmaker", "open a session: async with Session.begin() as session:"),
    ("sqlalchemy.ext.asyncio.engine.AsyncConnection", "start it first: async with engine.begin() as connection:"),
    ("sqlalchemy.", "pass the connection or the session itself"),
    ("psycopg_pool.", "open a connection first: with pool.connection() as connection:"),
    ("psycopg.", "pass the connection itself"),
    ("psycopg2.", "use psycopg 3, or SQLAlchemy or Django above psycopg2"),
    ("asyncpg.", "use SQLAlchemy above asyncpg, or psycopg's AsyncConnection"),
    ("aiosqlite.", "use SQLAlchemy above aiosqlite, or sqlite3"),
    ("sqlite3.", "pass the connection itself"),
    ("django.db.utils.ConnectionHandler", 'pass one of them: connections["default"]'),
    ("contextlib.", "enter it first: with … as connection:"),
)


def of(connection: object) -> SyncSession | AsyncSession:
    """Its adapter.

    Raises:
        Misconfigured: it is none of what is supported, or belongs to several databases.
    """
    found: Any = connection
    kinds: set[type] = {type(connection), connection.__class__}  # a proxy claims to be something else as well
    names = {name for kind in kinds for name in _names(kind)}
    if "psycopg.Connection" in names:
        from unlost.store.sessions.with_psycopg import Psycopg

        return Psycopg(found)
    if "psycopg.AsyncConnection" in names:
        from unlost.store.sessions.with_psycopg import AsyncPsycopg

        return AsyncPsycopg(found)
    if {"sqlalchemy.orm.scoping.scoped_session", "sqlalchemy.ext.asyncio.scoping.async_scoped_session"} & names:
        return of(found())  # the session of this thread or task: later it may be read from another
    if {"sqlalchemy.engine.base.Connection", "sqlalchemy.orm.session.Session"} & names:
        from unlost.store.sessions.with_sqlalchemy import SqlAlchemy

        return SqlAlchemy(found)
    if "sqlalchemy.ext.asyncio.session.AsyncSession" in names:
        from unlost.store.sessions.with_sqlalchemy import AsyncSqlAlchemy

        return AsyncSqlAlchemy(found, found.sync_session)
    if "sqlalchemy.ext.asyncio.engine.AsyncConnection" in names and found.sync_connection is not None:
        from unlost.store.sessions.with_sqlalchemy import AsyncSqlAlchemy

        return AsyncSqlAlchemy(found, found.sync_connection)
    if "django.utils.connection.ConnectionProxy" in names:
        return of(found._connections[found._alias])  # that of this thread
    if "django.db.backends.base.base.BaseDatabaseWrapper" in names:
        from unlost.store.sessions.with_django import Django

        return Django(found)
    if "sqlite3.Connection" in names:
        from unlost.store.sessions.with_sqlite3 import Sqlite3

        return Sqlite3(found)
    raise Misconfigured(
        "UL1251", f"unlost writes through {_KNOWN}", found=_described(found), fix=_way_out(found, names)
    )  # fmt: skip


@lru_cache(maxsize=100)
def _names(kind: type) -> frozenset[str]:
    """The names of a class and of what it is derived from."""
    return frozenset(f"{cls.__module__}.{cls.__qualname__}" for cls in getattr(kind, "__mro__", ()))


def _described(found: object) -> str:
    if found is None:
        return "None"
    if isinstance(found, type):
        return f"the class {found.__module__}.{found.__qualname__}, not an object of it"
    return f"{type(found).__module__}.{type(found).__qualname__}"


def _way_out(found: object, names: Collection[str]) -> str:
    for beginning, way in _WAYS_OUT:
        if any(name.startswith(beginning) for name in names):
            return way
    return "pass the connection or session that your rows go through"
