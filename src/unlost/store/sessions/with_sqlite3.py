"""The standard library's sqlite3."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from unlost.errors import Misconfigured
from unlost.store.sessions import raw, refuse
from unlost.store.sessions.port import Dialect
from unlost.store.steps import Rows

# A savepoint right after BEGIN is gone as soon as somebody ends the transaction, also when another one has begun since.
_GUARD = "unlost_begun"


class Sqlite3:
    library = "sqlite3"
    dialect: Dialect = "sqlite"
    is_async: Literal[False] = False
    how_to_begin = 'open a transaction: connection.execute("begin immediate")'

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._begun = False

    @property
    def in_transaction(self) -> bool:
        return raw.is_open(self._connection)

    @property
    def autocommits(self) -> bool:
        with _its_thread():
            return raw.sqlite_autocommits(self._connection)

    is_transient = staticmethod(raw.is_transient)

    def execute(self, sql: str, bindings: Sequence[Any] = ()) -> Rows:
        with _its_thread():
            refuse.autocommit(self)
            if not self._connection.in_transaction:
                self._run(f"begin {self._connection.isolation_level}")  # the library itself would only before some DML
            return self._run(sql, bindings)

    def begin(self) -> bool:
        with _its_thread():
            if getattr(self._connection, "autocommit", None) is False:
                raise Misconfigured(
                    "UL1274", "the block begins a transaction and ends it",
                    found="sqlite3.connect(autocommit=False), where one is always open and nobody sees its beginning",
                    fix="sqlite3.connect(autocommit=True) or isolation_level=None: the block is the transaction",
                )  # fmt: skip
            if self._connection.in_transaction:
                return False
            self._run("begin immediate")  # it will write; a later change of mind would fail where others write
            self._begun = True
            self._run(f"savepoint {_GUARD}")
            return True

    def commit(self) -> None:
        with _its_thread():
            try:
                self._run(f"release {_GUARD}")
            except sqlite3.OperationalError as e:
                raise refuse.ended(self) from e
            self._run("commit")
            self._begun = False

    def rollback(self) -> None:
        with _its_thread():
            if self._begun and self._connection.in_transaction:
                self._run("rollback")
            self._begun = False

    def place(self) -> str:
        with _its_thread():
            return next(str(row[2]) for row in self._run("pragma database_list") if row[1] == "main")

    def _run(self, sql: str, bindings: Sequence[Any] = ()) -> Rows:
        cursor = self._connection.cursor()
        try:
            cursor.row_factory = None
            with raw.plain_text(self._connection):
                return raw.plain(cursor.execute(sql, bindings))
        finally:
            cursor.close()


@contextmanager
def _its_thread() -> Iterator[None]:
    """Says what to do where the connection belongs to another thread."""
    try:
        yield
    except sqlite3.ProgrammingError as e:
        if "thread" not in str(e):
            raise
        raise Misconfigured(
            "UL1275", "a connection of sqlite3 is used in the thread that opened it", found=str(e),
            fix="open it where it is used (sync handlers run in threads), or with check_same_thread=False",
        ) from e  # fmt: skip
