"""psycopg 3, sync and async."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal

import psycopg
from psycopg.adapt import AdaptersMap
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row
from psycopg.types.array import ListDumper
from psycopg.types.numeric import IntDumper, IntLoader
from psycopg.types.string import ByteaLoader, BytesBinaryDumper, StrDumperUnknown, TextLoader

from unlost.store.sessions import raw, refuse
from unlost.store.sessions.port import Dialect
from unlost.store.steps import Rows, with_percent


class _Psycopg:
    dialect: Dialect = "postgresql"

    def __init__(self, connection: Any, cursor: Any) -> None:
        self._connection = connection
        self._cursor = cursor  # of psycopg's own kind, whatever the program's are
        self._block: Any = None  # psycopg's own, so that it refuses commit() and rollback() inside

    @property
    def in_transaction(self) -> bool:
        return self._status in raw.IN_TRANSACTION

    @property
    def autocommits(self) -> bool:
        return bool(self._connection.autocommit and self._status == TransactionStatus.IDLE)

    is_transient = staticmethod(raw.is_transient)

    @property
    def _status(self) -> int:
        return int(self._connection.pgconn.transaction_status)

    def _pipeline(self) -> Any:
        """In pipeline mode: a part of it, which begins when all results are there and ends when ours are."""
        return self._connection.pipeline() if self._connection.pgconn.pipeline_status else nullcontext()


class Psycopg(_Psycopg):
    library = "psycopg"
    is_async: Literal[False] = False
    how_to_begin = "open a transaction: with connection.transaction():"

    def __init__(self, connection: Any) -> None:
        super().__init__(connection, _Cursor(connection, row_factory=tuple_row))

    def execute(self, sql: str, bindings: Sequence[Any] = ()) -> Rows:
        with self._pipeline():
            refuse.autocommit(self)
            self._cursor.execute(*_for_percent(sql, bindings))
        return self._cursor.fetchall() if self._cursor.description else []

    def begin(self) -> bool:
        with self._pipeline():
            if self.in_transaction:
                return False
        block = self._connection.transaction()
        block.__enter__()
        self._block = block
        return True

    def commit(self) -> None:
        with self._pipeline():
            _check_open(self, self._status)
        block, self._block = self._block, None
        block.__exit__(None, None, None)

    def rollback(self) -> None:
        block, self._block = self._block, None
        if block is not None:
            block.__exit__(psycopg.Rollback, psycopg.Rollback(), None)

    def place(self) -> str:
        return ""


class AsyncPsycopg(_Psycopg):
    library = "psycopg (async)"
    is_async: Literal[True] = True
    how_to_begin = "open a transaction: async with connection.transaction():"

    def __init__(self, connection: Any) -> None:
        super().__init__(connection, _AsyncCursor(connection, row_factory=tuple_row))

    async def execute(self, sql: str, bindings: Sequence[Any] = ()) -> Rows:
        async with self._pipeline():
            refuse.autocommit(self)
            await self._cursor.execute(*_for_percent(sql, bindings))
        return await self._cursor.fetchall() if self._cursor.description else []

    async def begin(self) -> bool:
        async with self._pipeline():
            if self.in_transaction:
                return False
        block = self._connection.transaction()
        await block.__aenter__()
        self._block = block
        return True

    async def commit(self) -> None:
        async with self._pipeline():
            _check_open(self, self._status)
        block, self._block = self._block, None
        await block.__aexit__(None, None, None)

    async def rollback(self) -> None:
        block, self._block = self._block, None
        if block is not None:
            await block.__aexit__(psycopg.Rollback, psycopg.Rollback(), None)

    async def place(self) -> str:
        return ""


def _for_percent(sql: str, bindings: Sequence[Any]) -> tuple[Any, ...]:
    return (with_percent(sql), bindings) if bindings else (sql,)


def _check_open(session: Psycopg | AsyncPsycopg, status: int) -> None:
    """psycopg's block ends without a word when the transaction has failed or the connection is gone."""
    if status == TransactionStatus.INERROR:
        raise refuse.failed(session)
    if status == TransactionStatus.UNKNOWN:
        raise psycopg.OperationalError("the connection was lost before the commit")
    if status == TransactionStatus.IDLE:
        raise refuse.ended(session)


def _plain() -> AdaptersMap:
    """On our cursors values go and come as psycopg does it by itself, whatever the program has registered."""
    adapters = AdaptersMap(psycopg.adapters)
    adapters.register_dumper(str, StrDumperUnknown)
    adapters.register_dumper(int, IntDumper)
    adapters.register_dumper(bytes, BytesBinaryDumper)
    adapters.register_dumper(list, ListDumper)
    for name in ("text", "varchar", "bpchar", "name", "json", "jsonb"):
        adapters.register_loader(name, TextLoader)
    for name in ("int2", "int4", "int8"):
        adapters.register_loader(name, IntLoader)
    adapters.register_loader("bytea", ByteaLoader)
    return adapters


_PLAIN = _plain()


class _Cursor(psycopg.Cursor[tuple[Any, ...]]):
    adapters = _PLAIN  # of all of them: making a map for each takes longer than a statement


class _AsyncCursor(psycopg.AsyncCursor[tuple[Any, ...]]):
    adapters = _PLAIN
