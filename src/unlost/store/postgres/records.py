"""The tables in PostgreSQL as operators look at them: one blocking connection, which takes part in nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec
import psycopg
from psycopg import Connection

from unlost.errors import OutcomeUnknown
from unlost.events.topic import Unit
from unlost.store.port import Accepted, Look, Process, Relaying, Shard
from unlost.store.postgres.client import Client, statement, told
from unlost.store.postgres.outbox import HUNG_SECONDS
from unlost.store.postgres.rows import units_of
from unlost.store.postgres.schema import SHARDS, quoted
from unlost.store.postgres.settings import Settings
from unlost.store.postgres.startup import check
from unlost.world import REAL

T = TypeVar("T")
LOCK_SECONDS = 10.0  # a process that stands still may hold a row for good; then nothing was written, and that is said
_reads = msgspec.json.Decoder(list[tuple[str, str, int, int]]).decode


class _NoRows:
    """Of a statement that returns none: the driver would refuse to be asked."""

    def fetchone(self) -> None:
        return None

    def fetchall(self) -> list[tuple[Any, ...]]:
        return []

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return iter(())


_NO_ROWS = _NoRows()


class _Look:
    """One transaction."""

    def __init__(self, connection: Connection[Any], schema: str) -> None:
        self._connection = connection
        self._schema = schema

    def execute(self, sql: str, bindings: Sequence[Any] = ()) -> Any:
        cursor = self._connection.execute(statement(sql, self._schema), bindings)
        return cursor if cursor.description is not None else _NO_ROWS


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
            self._connection.execute(f"set lock_timeout = '{LOCK_SECONDS:g}s'")
        self._look = _Look(self._connection, quoted(settings.schema))
        self._inside = False

    @property
    def place(self) -> str:
        return self.settings.shown

    def read(self, work: Callable[[Look], T]) -> T:
        return self._in("begin isolation level repeatable read read only", work)

    def write(self, work: Callable[[Look], T]) -> T:
        return self._in("begin isolation level read committed read write; set local synchronous_commit = on", work)

    def _in(self, begin: str, work: Callable[[Look], T]) -> T:
        if self._inside:
            return work(self._look)
        with told(self.settings):
            self._connection.execute(begin)
            self._inside = True
            try:
                result = work(self._look)
                self._commit()
            except BaseException:
                if not self._connection.closed:
                    self._connection.rollback()
                raise
            finally:
                self._inside = False
        return result

    def _commit(self) -> None:
        try:
            self._connection.execute("commit")
        except psycopg.OperationalError as e:
            if e.sqlstate is not None and not e.sqlstate.startswith("57"):
                raise  # the server says that it did not commit
            raise OutcomeUnknown(
                "UL2014", "nobody can say whether a commit to the store happened", found=f"{self.settings.shown}: the connection was lost",
                fix="look before you do it again",
            ) from e  # fmt: skip

    def processes(self, look: Look) -> dict[str, Process]:
        """Whether one lives is what the server says of its session."""
        rows = look.execute(
            "select p.id, p.pid, p.host, p.read, l.objid is not null, p.seen < now() - make_interval(secs => ?) "
            "from unlost_process p left join pg_locks l on l.objid = p.number and l.locktype = 'advisory' "
            "and l.classid = ?::integer and l.objsubid = 2 and l.granted "
            "and l.database = (select oid from pg_database where datname = current_database())",
            (HUNG_SECONDS, self.settings.lock_class),
        )
        return {
            id: Process(
                id, pid, host, alive, alive and late, {Unit(s, t, p): at for s, t, p, at in _reads(read)} if alive else {}
            )
            for id, pid, host, read, alive, late in rows
        }  # fmt: skip

    def take_over(self, look: Look, units: Collection[Unit]) -> list[Unit]:
        """Their rows are locked, in the order in which everybody locks them."""
        owners = look.execute(
            "select p.service, p.topic, p.partition, p.owner "
            "from unnest(?::text[], ?::text[], ?::integer[]) as u(service, topic, partition) "
            "join unlost_progress p using (service, topic, partition) "
            "order by p.service, p.topic, p.partition for update of p",
            units_of(units),
        ).fetchall()
        living = {id for id, process in self.processes(look).items() if process.alive}
        free = [Unit(*unit) for *unit, owner in owners if owner not in living]
        look.execute(
            "update unlost_progress p set epoch = p.epoch + 1 "
            "from unnest(?::text[], ?::text[], ?::integer[]) as u(service, topic, partition) "
            "where p.service = u.service and p.topic = u.topic and p.partition = u.partition",
            units_of(free),
        )
        return free

    def accepted(self, look: Look) -> Accepted:
        events, copies, age, in_hands, held = look.execute(
            "select o.events, c.copies, extract(epoch from now() - least(o.oldest, c.oldest))::float8, s.in_hands, "
            "extract(epoch from now() - s.oldest)::float8 "
            "from (select count(*) as events, min(added) as oldest from unlost_outbox) o, "
            "(select count(*) as copies, min(added) as oldest from unlost_copy) c, "
            "(select count(*) as in_hands, min(claimed) as oldest from unlost_outbox_status) s"
        ).fetchone()
        shards = look.execute(
            "select n.n, coalesce(r.next, 0) - 1, coalesce(r.confirmed, 0), coalesce(s.in_hands, 0), coalesce(s.vanished, 0), "
            f"r.process from generate_series(0, {SHARDS - 1}) as n(n) left join unlost_relay r on r.shard = n.n "
            "left join (select s.shard, count(*) as in_hands, count(*) filter (where o.seq is null) as vanished "
            "from unlost_outbox_status s left join unlost_outbox o on o.seq = s.seq group by s.shard) s on s.shard = n.n "
            "order by n.n"
        ).fetchall()
        living = {id: p for id, p in self.processes(look).items() if p.alive and not p.hung}
        owners = [row[5] for row in shards if row[5] in living]
        return Accepted(
            events, copies, None if age is None else max(0.0, age), in_hands, held,
            [Relaying(living[id].pid, living[id].host, owners.count(id)) for id in sorted(set(owners))],
            len(shards) - len(owners), [Shard(*row[:5]) for row in shards], self._streams(look),
        )  # fmt: skip

    def _streams(self, look: Look) -> list[str]:
        """Logical replication of the outbox, as Debezium reads it."""
        rows = look.execute(
            "select slot_name from pg_replication_slots where active and slot_type = 'logical' and database = current_database() "
            "and exists (select 1 from pg_publication_tables where schemaname = ? and tablename = 'unlost_outbox') order by 1",
            (self.settings.schema,),
        )
        return [str(name) for (name,) in rows]

    def size(self, look: Look) -> int:
        row = look.execute(
            "select coalesce(sum(pg_total_relation_size(c.oid)), 0)::bigint from pg_class c "
            "join pg_namespace n on n.oid = c.relnamespace "
            "where n.nspname = ? and c.relkind = 'r' and c.relname like 'unlost\\_%'",
            (self.settings.schema,),
        ).fetchone()
        return int(row[0])

    def now(self) -> int:
        return REAL.now()

    def close(self) -> None:
        self._connection.close()
