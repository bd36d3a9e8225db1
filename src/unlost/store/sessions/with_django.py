"""Django's database connections."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal, cast

from django.db import OperationalError, connections, transaction  # type: ignore[import-untyped]

from unlost.errors import Misconfigured
from unlost.store.sessions import raw, refuse
from unlost.store.sessions.port import Dialect
from unlost.store.steps import Rows, with_percent


class Django:
    library = "Django"
    is_async: Literal[False] = False
    how_to_begin = "open a transaction: with transaction.atomic():"

    def __init__(self, connection: Any) -> None:
        if connection.vendor not in ("postgresql", "sqlite"):
            raise Misconfigured(
                "UL1251", "unlost writes to PostgreSQL and SQLite", found=f"Django with {connection.display_name}",
                fix="leave it out: events are then published with `app.publish`, after the commit",
            )  # fmt: skip
        self.dialect = cast(Dialect, connection.vendor)
        self._connection = connection
        self._atomic: Any = None

    @property
    def in_transaction(self) -> bool:
        return bool(self._connection.in_atomic_block) or raw.is_open(self._connection.connection)

    @property
    def autocommits(self) -> bool:
        if self.in_transaction:
            return False
        connected = self._connection.connection is not None
        return bool(self._connection.autocommit if connected else self._connection.settings_dict["AUTOCOMMIT"])

    is_transient = staticmethod(raw.is_transient)

    def execute(self, sql: str, bindings: Sequence[Any] = ()) -> Rows:
        refuse.autocommit(self)
        if self.dialect == "sqlite" and not self.in_transaction:
            self._run("begin")  # the library itself would only before some DML
        return self._run(sql, bindings)

    def begin(self) -> bool:
        if self.in_transaction:
            return False
        if connections[self._connection.alias] is not self._connection:
            raise Misconfigured(
                "UL1275", "a connection of Django is used in the thread that it belongs to", found="another thread",
                fix="take django.db.connection where it is used",
            )  # fmt: skip
        atomic = transaction.atomic(using=self._connection.alias)
        atomic.__enter__()  # from here on, Django itself refuses commit() and rollback()
        self._atomic = atomic
        return True

    def commit(self) -> None:
        connection = self._connection
        if not connection.in_atomic_block:
            raise refuse.ended(self)
        if connection.connection is None or connection.closed_in_transaction:
            raise OperationalError("the connection was closed before the commit")
        if connection.needs_rollback or raw.has_failed(connection.connection):
            raise refuse.failed(self)
        atomic, self._atomic = self._atomic, None
        atomic.__exit__(None, None, None)
        if not connection.autocommit:
            try:
                connection.commit()
            except BaseException:
                connection.rollback()
                raise

    def rollback(self) -> None:
        atomic, self._atomic = self._atomic, None
        if atomic is None:
            return
        atomic.__exit__(RuntimeError, RuntimeError(), None)
        if not self._connection.autocommit:
            self._connection.rollback()

    def place(self) -> str:
        if self.dialect == "postgresql":
            return ""
        return next(str(row[2]) for row in self._run("pragma database_list") if row[1] == "main")

    def _run(self, sql: str, bindings: Sequence[Any] = ()) -> Rows:
        with self._connection.cursor() as cursor:
            driver = self._connection.connection
            with raw.plain_text(driver) if self.dialect == "sqlite" else nullcontext():
                cursor.execute(*((with_percent(sql), tuple(bindings)) if bindings else (sql,)))
                return raw.plain(cursor.fetchall()) if cursor.description else []
