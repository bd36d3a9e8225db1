"""SQLAlchemy 2: connections and sessions, with any driver for PostgreSQL or SQLite.

The async ones are the sync ones in a greenlet, here as in SQLAlchemy itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal, TypeVar, cast

from sqlalchemy import Connection, String, bindparam, text
from sqlalchemy.exc import StatementError, UnboundExecutionError

from unlost.errors import Misconfigured
from unlost.store.sessions import raw, refuse
from unlost.store.sessions.port import Dialect
from unlost.store.steps import Rows, with_names

T = TypeVar("T")


class SqlAlchemy:
    is_async: Literal[False] = False
    how_to_begin = "use an engine that is not in AUTOCOMMIT"

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self._is_session = hasattr(owner, "flush")  # asked so that programs without the ORM need not import it
        self._bind = _only_bind(owner) if self._is_session else owner
        dialect = self._bind.dialect
        if dialect.name not in ("postgresql", "sqlite"):
            raise Misconfigured(
                "UL1251", "unlost writes to PostgreSQL and SQLite", found=f"SQLAlchemy with the dialect {dialect.name}",
                fix="leave it out: events are then published with `app.publish`, after the commit",
            )  # fmt: skip
        self.dialect = cast(Dialect, dialect.name)
        self.library = f"SQLAlchemy {'session' if self._is_session else 'connection'} ({dialect.driver})"
        self._begun: Any = None

    @property
    def in_transaction(self) -> bool:
        # the transaction of a connection below a session: the session's commit would not end it
        below = isinstance(self._bind, Connection) and self._bind.in_transaction()
        return bool(below or self._owner.in_transaction())

    @property
    def autocommits(self) -> bool:
        connection = self._connection()
        options = dict((self._bind if connection is None else connection).get_execution_options())
        level = options.get("isolation_level") or self._bind.dialect._on_connect_isolation_level
        if level == "AUTOCOMMIT":
            return True
        if connection is None or connection.closed or connection.invalidated:
            return False
        if self.dialect == "postgresql":
            return bool(connection.connection.dbapi_connection.autocommit)
        # before SQLAlchemy's BEGIN nobody can tell: a listener of the program may send the real one
        return bool(connection.in_transaction()) and raw.sqlite_autocommits(connection.connection.driver_connection)

    is_transient = staticmethod(raw.is_transient)

    def execute(self, sql: str, bindings: Sequence[Any] = ()) -> Rows:
        refuse.autocommit(self)
        if self._is_session:
            self._owner.flush()  # the program's rows first, and the errors of its rows where it expects them
        connection = self._open()
        refuse.autocommit(self)  # now everything is known
        if self.dialect == "postgresql":
            return _run(connection, sql, bindings)
        driver = connection.connection.driver_connection
        if not driver.in_transaction:
            connection.exec_driver_sql("begin")  # the library itself would only before some DML
        with raw.plain_text(driver):
            return _run(connection, sql, bindings)

    def begin(self) -> bool:
        if self.in_transaction:
            return False
        self._begun = self._owner.begin()
        return True

    def commit(self) -> None:
        if self._owner.get_transaction() is not self._begun:
            raise refuse.ended(self)
        connection = self._connection()
        if connection is not None and self.dialect == "postgresql" and not connection.invalidated:
            failed = raw.has_failed(connection.connection.driver_connection)
            if failed is None:
                connection.exec_driver_sql("select 1")  # the server says so
            if failed:
                raise refuse.failed(self)
        self._owner.commit()
        self._begun = None

    def rollback(self) -> None:
        if self._begun is not None:
            self._owner.rollback()
        self._begun = None

    def place(self) -> str:
        if self.dialect == "postgresql":
            return ""
        connection = self._connection()
        if connection is not None:
            return _file(connection)
        with self._bind.connect() as connection:  # so that the session need not begin; out of its own pool
            return _file(connection)

    def _open(self) -> Any:
        """The connection that the program's rows go through, with its transaction begun."""
        if not self._is_session:
            if not self._owner.in_transaction():
                self._owner.begin()
            return self._owner
        connection = self._owner.connection(bind_arguments={"bind": self._bind})
        if len(_connections(self._owner)) > 1:
            raise _several("connections in this transaction")
        return connection

    def _connection(self) -> Any:
        """The same as far as it is there already."""
        if isinstance(self._bind, Connection):
            return self._bind
        return next(iter(_connections(self._owner)), None)


class AsyncSqlAlchemy:
    is_async: Literal[True] = True

    def __init__(self, owner: Any, sync: Any) -> None:
        self._owner = owner
        self._inner = inner = SqlAlchemy(sync)
        self.library = inner.library
        self.dialect = inner.dialect
        self.how_to_begin = inner.how_to_begin

    @property
    def in_transaction(self) -> bool:
        return self._inner.in_transaction

    @property
    def autocommits(self) -> bool:
        return self._inner.autocommits

    is_transient = staticmethod(raw.is_transient)

    async def execute(self, sql: str, bindings: Sequence[Any] = ()) -> Rows:
        return await self._run(lambda: self._inner.execute(sql, bindings))

    async def begin(self) -> bool:
        return await self._run(self._inner.begin)

    async def commit(self) -> None:
        await self._run(self._inner.commit)

    async def rollback(self) -> None:
        await self._run(self._inner.rollback)

    async def place(self) -> str:
        return await self._run(self._inner.place)

    async def _run(self, work: Callable[[], T]) -> T:
        return cast(T, await self._owner.run_sync(lambda _: work()))


def _only_bind(session: Any) -> Any:
    """The one engine or connection of a session: rows and events must be in one database."""
    binds = [session.bind, *(getattr(session, "binds", None) or getattr(session, "_Session__binds", {})).values()]
    binds = [bind for bind in binds if bind is not None]
    if len({bind.engine for bind in binds}) > 1:
        raise _several("engines")
    try:
        return session.get_bind()
    except UnboundExecutionError as e:
        if binds:
            return binds[0]
        raise Misconfigured(
            "UL1271", "rows and events go into one database", found="a session without an engine",
            fix="bind it, or pass the connection that the rows go through: session.connection(bind_arguments=…)",
        ) from e  # fmt: skip


def _several(what: str) -> Misconfigured:
    return Misconfigured(
        "UL1271", "rows and events go into one database", found=f"a session with several {what}",
        fix="pass the connection that the rows go through: session.connection(bind_arguments=…)",
    )  # fmt: skip


def _connections(session: Any) -> set[Any]:
    """What the session's transaction has opened; nothing is opened by asking."""
    transaction = session.get_transaction()
    return set() if transaction is None else {entry[0] for entry in transaction._connections.values()}


def _file(connection: Any) -> str:
    """Asks the driver, because SQLAlchemy would begin a transaction."""
    cursor = connection.connection.dbapi_connection.cursor()
    try:
        with raw.plain_text(connection.connection.driver_connection):
            cursor.execute("pragma database_list")
            return next(str(row[2]) for row in cursor.fetchall() if row[1] == "main")
    finally:
        cursor.close()


def _run(connection: Any, sql: str, bindings: Sequence[Any]) -> Rows:
    clause = _clause(sql, tuple([isinstance(value, str) for value in bindings]))
    try:
        result = connection.execute(clause, {f"p{i}": value for i, value in enumerate(bindings)})
        return raw.plain(result) if result.returns_rows else []
    except StatementError as e:
        e.hide_parameters = True  # events are nothing for logs
        raise


@lru_cache(maxsize=1000)
def _clause(sql: str, texts: Sequence[bool]) -> Any:
    """Text is declared as such: asyncpg would hand it to the program's codec where the statement casts it to json."""
    clause = text(with_names(sql)[0])
    return clause.bindparams(*[bindparam(f"p{i}", type_=String()) for i, is_text in enumerate(texts) if is_text])
