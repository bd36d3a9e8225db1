"""The tables in PostgreSQL as operators look at them: one blocking connection, which takes part in nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec
from psycopg import Connection

from unlost.events.topic import Unit
from unlost.store.port import Look, Process
from unlost.store.postgres.client import Client, statement, told
from unlost.store.postgres.schema import quoted
from unlost.store.postgres.settings import Settings
from unlost.store.postgres.startup import check
from unlost.world import REAL, World

T = TypeVar("T")
_reads = msgspec.json.Decoder(list[tuple[str, str, int, int]]).decode


class _Look:
    """One transaction."""

    def __init__(self, connection: Connection[Any], schema: str, world: World) -> None:
        self._connection = connection
        self._schema = schema
        self.world = world

    def execute(self, sql: str, bindings: Sequence[Any] = ()) -> Any:
        return self._connection.execute(statement(sql, self._schema), bindings or None)


class PostgresRecords:
    def __init__(self, settings: Settings) -> None:
        """
        Raises:
            UsageError: the tables are not there, or not ours. Unavailable: nobody answers.
        """
        self.settings = settings
        with ThreadPoolExecutor(1) as thread:  # an event loop of its own: there may be one here
            self.id = thread.submit(lambda: asyncio.run(check(Client(settings)))).result()
        with told(settings):
            self._connection = Connection.connect(settings.conninfo, autocommit=True)
        self._look = _Look(self._connection, quoted(settings.schema), REAL)
        self._inside = False

    @property
    def place(self) -> str:
        return self.settings.shown

    def read(self, work: Callable[[Look], T]) -> T:
        return self._in("begin isolation level repeatable read read only", work)

    def write(self, work: Callable[[Look], T]) -> T:
        return self._in("begin isolation level read committed read write", work)

    def _in(self, begin: str, work: Callable[[Look], T]) -> T:
        if self._inside:
            return work(self._look)
        with told(self.settings):
            self._connection.execute(begin)
            self._inside = True
            try:
                result = work(self._look)
                self._connection.execute("commit")
            except BaseException:
                if not self._connection.closed:
                    self._connection.rollback()
                raise
            finally:
                self._inside = False
        return result

    def process(self, look: Look, id: str) -> Process | None:
        """Whether it lives is what the server says of its session."""
        row = look.execute(
            "select pid, host, read, exists (select 1 from pg_locks l where l.locktype = 'advisory' "
            "and l.classid = ?::integer and l.objid = p.number and l.objsubid = 2 and l.granted "
            "and l.database = (select oid from pg_database where datname = current_database())) "
            "from unlost_process p where id = ?",
            (self.settings.lock_class, id),
        ).fetchone()
        if row is None:
            return None
        pid, host, read, alive = row
        return Process(id, pid, host, bool(alive), {Unit(s, t, p): at for s, t, p, at in _reads(read)} if alive else {})

    def close(self) -> None:
        self._connection.close()
