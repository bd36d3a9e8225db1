"""The store in PostgreSQL as `check_store` wants it: `check_store("postgresql://…", postgres_at)`."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Sequence

from unlost.events import Envelope
from unlost.events.topic import TopicInfo
from unlost.store.port import Request, Store
from unlost.store.postgres.rows import STORED, envelope_of
from unlost.store.postgres.settings import parse
from unlost.store.postgres.store import PostgresStore
from unlost.store.steps import Steps, one
from unlost.testing.conformance_store import Row, Tables
from unlost.world import REAL, new_id


class PostgresRig:
    """What handlers publish goes into the outbox of the same database."""

    LEFT_OUT = ("unlost_process",)

    def __init__(self, url: str) -> None:
        self._real = PostgresStore(parse(url), broker="conformance")
        self.store: Store = self._real

    async def declare(self, topic: str, partitions: int) -> TopicInfo:
        return TopicInfo(name=topic, id=new_id(), partitions=partitions, ranges=[(0, 0)] * partitions)

    async def published(self, topic: str) -> Sequence[Envelope]:
        def steps() -> Steps[list[Envelope]]:
            rows = yield (
                f"select {STORED.replace('s.number', 'o.seq')} from unlost_outbox o where aggregatetype = ? order by seq",
                (topic,),
            )
            return [envelope_of(row) for row in rows]

        return await self._real.client.read(steps())

    async def ask(self, request: Request) -> None:
        place = (*request.unit, request.position)

        def steps() -> Steps[None]:
            where = "where service = ? and topic = ? and partition = ? and position = ?"
            (number,) = yield from one(
                "insert into unlost_operation (at, operator, action, reason, service, topic, partition, position, id) "
                f"select ?, 'suite', ?, '', service, topic, partition, position, id from unlost_shelf {where} "
                "returning number",
                (REAL.now(), request.action, *place),
            )
            yield f"update unlost_shelf set request = ?, operation = ? {where}", (request.action, number, *place)

        await self._real.client.commit(steps)

    async def noticed(self) -> None:
        async with asyncio.timeout(10):
            while not all(_lives(pid) for pid in await self._real.client.read(self._pids())):  # noqa: ASYNC110 - nobody rings
                await asyncio.sleep(0.01)

    def _pids(self) -> Steps[list[int]]:
        living = yield from self._real._living()
        rows = yield "select pid from unlost_process where id = any(?::text[])", (sorted(living),)
        return [pid for (pid,) in rows]

    async def tables(self) -> Tables:
        """Ours, and those that the scenarios made; but what identities and clocks fill in is left out."""
        found: Tables = {}
        schema = self._real.settings.schema

        def names() -> Steps[list[tuple[str, str]]]:
            rows = yield (
                "select n.nspname, c.relname from pg_class c join pg_namespace n on n.oid = c.relnamespace "
                "where c.relkind = 'r' and n.nspname in (?, 'public')",
                (schema,),
            )
            return [(s, name) for s, name in rows if name not in self.LEFT_OUT]

        for where, name in await self._real.client.read(names()):

            def rows(where: str = where, name: str = name) -> Steps[list[Row]]:
                columns = yield (
                    "select column_name from information_schema.columns where table_schema = ? and table_name = ? "
                    "order by ordinal_position",
                    (where, name),
                )
                order = ", ".join(str(n + 1) for n in range(min(4, len(columns))))
                values = yield f'select * from "{where}"."{name}" order by {order}', ()
                return [dict(zip([c for (c,) in columns], row, strict=True)) for row in values]

            found[name.removeprefix("unlost_")] = await self._real.client.read(rows())
        return found


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@contextlib.asynccontextmanager
async def postgres_at(url: str) -> AsyncIterator[PostgresRig]:
    """Opens the store as another process would. Its tables are there: `unlost store migrate`."""
    rig = PostgresRig(url)
    await rig.store.open()
    try:
        yield rig
    finally:
        await rig.store.close()
