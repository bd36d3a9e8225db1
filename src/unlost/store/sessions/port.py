"""The user's own connection, through one small protocol.

A service that keeps its data in its own database hands us the connection or session that it works with, and what we
write becomes part of its transaction. `connect.of(connection)` finds the adapter; there is one for psycopg (sync and
async), SQLAlchemy 2 (connection and session, sync and async), Django's connection, and the standard library's sqlite3.

Every adapter keeps four rules: it never commits or rolls back what it did not begin; it never opens a connection of
its own; no statement of ours runs where it would be committed by itself; and errors of the driver go through as they
are, because they belong to the user's transaction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

from unlost.store.steps import Rows

Dialect = Literal["postgresql", "sqlite"]


class Session(Protocol):
    """What every adapter has. Nothing here talks to the database."""

    @property
    def library(self) -> str:
        """What people know it by: "psycopg", "SQLAlchemy session (asyncpg)", …"""

    @property
    def dialect(self) -> Dialect: ...

    @property
    def how_to_begin(self) -> str:
        """What to do where `autocommits` holds."""

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open at this moment; a closed connection is in none.

        It may be read from any thread, so it is also how we learn that the user's transaction has ended, committed or
        not. Another one may have begun since: who looks now and then may miss the end of the first. With
        `sqlite3.connect(autocommit=False)` there is always a transaction, and its end is never seen."""

    @property
    def autocommits(self) -> bool:
        """Whether a statement that runs now would be committed by itself, so that what we write would belong to
        nothing. Where neither this nor `in_transaction` holds, the next statement opens a transaction.

        It is read in the thread that uses the connection. A transaction that has failed and waits for its rollback is
        still open; the driver refuses every statement in it."""

    def is_transient(self, error: BaseException) -> bool:
        """Whether the same transaction may succeed when it is tried again: a serialization failure, a deadlock, a lost
        connection, a server that shuts down."""


class SyncSession(Session, Protocol):
    @property
    def is_async(self) -> Literal[False]: ...

    def execute(self, sql: str, bindings: Sequence[Any] = ()) -> Rows:
        """Runs one statement (placeholders `?`) inside the user's transaction; its rows, none if it has none.

        Raises:
            UsageError: the connection is in autocommit mode; nothing has run.
        """

    def begin(self) -> bool:
        """Begins a transaction if none is open; whether it did. Only `ctx.transaction(session)` begins and ends one."""

    def commit(self) -> None:
        """Commits what `begin` has begun. Where it raises, `rollback` comes next.

        Raises:
            StatementFailed: an earlier error was caught in the block, so nothing of it can be committed.
            UsageError: somebody else has ended the transaction.
        """

    def rollback(self) -> None:
        """Rolls back what `begin` has begun, if it is still there."""

    def place(self) -> str:
        """Of a SQLite database: the absolute path of its file, "" in memory. Of others: "". Begins no transaction."""


class AsyncSession(Session, Protocol):
    """The same, awaited."""

    @property
    def is_async(self) -> Literal[True]: ...

    async def execute(self, sql: str, bindings: Sequence[Any] = ()) -> Rows: ...

    async def begin(self) -> bool: ...

    async def commit(self) -> None: ...

    async def rollback(self) -> None: ...

    async def place(self) -> str: ...


AnySession = SyncSession | AsyncSession
