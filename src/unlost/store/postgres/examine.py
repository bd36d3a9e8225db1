"""Looks a database over for `unlost doctor`: one connection for a moment, and nothing is changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
from psycopg import Connection

from unlost.store.postgres.client import statement, told
from unlost.store.postgres.facts import Absent, Facts, Held, Table
from unlost.store.postgres.outbox import HUNG_SECONDS
from unlost.store.postgres.schema import RIGHTS, TABLES, quoted
from unlost.store.postgres.settings import Settings, explained
from unlost.world import REAL

LONG_SECONDS = 300.0  # a transaction that is open for so long is worth a word
ASKED = (
    "fsync", "full_page_writes", "synchronous_commit", "autovacuum", "idle_session_timeout", "statement_timeout",
    "idle_in_transaction_session_timeout", "transaction_timeout", "max_connections", "superuser_reserved_connections",
)  # fmt: skip
_PROBE = "unlost.probe"


def examine(settings: Settings) -> Facts:
    """
    Raises:
        UsageError: it does not let us in. Unavailable: nobody answers.
    """
    with told(settings), Connection.connect(settings.conninfo, autocommit=True) as connection:
        return _Examiner(connection, settings).facts()


class _Examiner:
    def __init__(self, connection: Connection[Any], settings: Settings) -> None:
        self._connection = connection
        self._settings = settings
        self._schema = quoted(settings.schema)

    def _rows(self, sql: str, *bindings: Any) -> list[tuple[Any, ...]]:
        return self._connection.execute(statement(sql, self._schema), bindings).fetchall()

    def _row(self, sql: str, *bindings: Any) -> tuple[Any, ...]:
        return self._rows(sql, *bindings)[0]

    def facts(self) -> Facts:
        info = self._connection.info
        version, text, replica, read_only, role, encoding = self._row(
            "select current_setting('server_version_num')::integer, current_setting('server_version'), pg_is_in_recovery(), "
            "current_setting('default_transaction_read_only') = 'on', current_user, current_setting('server_encoding')"
        )
        before = REAL.now()
        (theirs,) = self._row("select (extract(epoch from clock_timestamp()) * 1000000)::bigint")
        after = REAL.now()
        rows = self._rows("select name, setting, source from pg_settings where name = any(?)", list(ASKED))
        host = info.host
        found = Facts(
            shown=self._settings.shown, schema=self._settings.schema, role=role, version=version, version_text=text,
            encoding=encoding, replica=replica, read_only=read_only,
            settings={name: (value, source) for name, value, source in rows},
            encrypted=bool(self._connection.pgconn.ssl_in_use),
            remote=bool(host) and not host.startswith(("/", "127.")) and host not in ("localhost", "::1"),
            ahead=(theirs - (before + after) / 2) / 1e6, blur=(after - before) / 2e6, unread={},
        )  # fmt: skip
        self._try(found, "poolers", self._pooler)
        self._try(found, "open transactions", self._held)
        self._try(found, "connections", self._connections)
        self._try(found, "tables", self._tables)
        if found.there and not found.missing:
            for what, look in (
                ("dead rows", self._dead_rows), ("the outbox's sequence", self._sequence), ("the inbox", self._inbox),
                ("processes", self._absent),
            ):  # fmt: skip
                self._try(found, what, look)
        return found

    def _try(self, found: Facts, what: str, look: Callable[[Facts], None]) -> None:
        """A check that the role may not make, or that this server does not know, is said to be unread."""
        try:
            look(found)
        except psycopg.Error as e:
            if self._connection.broken:
                raise
            found.unread[what] = str(explained(e, self._settings)).partition("\n")[0]

    def _pooler(self, found: Facts) -> None:
        """Whether two connections of ours are one session, or one of them several."""
        with Connection.connect(self._settings.conninfo, autocommit=True) as other:
            mark = f"{id(self)}"
            self._connection.execute(f"select set_config('{_PROBE}', %s, false)", (mark,))
            for _ in range(3):
                theirs = other.execute(f"select current_setting('{_PROBE}', true)").fetchone()
                ours = self._connection.execute(f"select current_setting('{_PROBE}', true)").fetchone()
                found.pooler |= theirs == (mark,) or ours != (mark,)

    def _held(self, found: Facts) -> None:
        rows = self._rows(
            "select pid, usename, application_name, state, extract(epoch from now() - xact_start)::float8 "
            "from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid() "
            "and xact_start < now() - make_interval(secs => ?) order by xact_start",
            LONG_SECONDS,
        )
        held = [
            Held(f"session {pid} of {role} ({name or 'no name'}), {state}", age) for pid, role, name, state, age in rows
        ]
        rows = self._rows(
            "select gid, extract(epoch from now() - prepared)::float8 from pg_prepared_xacts "
            "where database = current_database() and prepared < now() - make_interval(secs => ?) order by prepared",
            LONG_SECONDS,
        )
        found.held = [*held, *(Held(f"the prepared transaction {gid!r}", age) for gid, age in rows)]
        (found.hidden,) = self._row(
            "select count(*) from pg_stat_activity "
            "where datname = current_database() and query = '<insufficient privilege>'"
        )

    def _connections(self, found: Facts) -> None:
        (used, own, here, reserved, most, role_limit, database_limit) = self._row(
            "select count(*), count(*) filter (where a.usename = current_user), "
            "count(*) filter (where a.datname = current_database()), "
            "current_setting('superuser_reserved_connections')::integer, current_setting('max_connections')::integer, "
            "(select case when rolsuper then -1 else rolconnlimit end from pg_roles where rolname = current_user), "
            "(select datconnlimit from pg_database where datname = current_database()) "
            "from pg_stat_activity a where a.datname is not null"
        )
        limits = [(used, most - reserved, "max_connections, without those reserved for superusers")]
        if role_limit >= 0:
            limits.append((own, role_limit, f"connection limit of the role {found.role}"))
        if database_limit >= 0:
            limits.append((here, database_limit, "connection limit of the database"))
        found.used, found.limit, found.limit_of = max(limits, key=lambda of: of[0] / max(1, of[1]))

    def _tables(self, found: Facts) -> None:
        there = {
            name
            for (name,) in self._rows(
                "select c.relname from pg_class c join pg_namespace n on n.oid = c.relnamespace "
                "where n.nspname = ? and c.relkind = 'r' and c.relname like 'unlost\\_%'",
                self._settings.schema,
            )
        }
        found.there = bool(there)
        found.missing = sorted({f"unlost_{name}" for name in TABLES} - there)
        if not there:
            return
        found.lacking = self._rights()
        if "unlost_meta" in there and ("unlost_meta", "select") not in found.lacking:
            rows = self._rows("select value from unlost_meta where name = 'format'")
            found.format = str(rows[0][0]) if rows else "none"

    def _rights(self) -> list[tuple[str, str]]:
        (usage,) = self._row("select has_schema_privilege(?, 'usage')", self._settings.schema)
        if not usage:
            return [(f"schema {self._settings.schema}", "usage"), ("unlost_meta", "select")]
        return [
            (table, right)
            for table, right in self._rows(
                "select c.relname, r from pg_class c join pg_namespace n on n.oid = c.relnamespace, unnest(?::text[]) r "
                "where n.nspname = ? and c.relkind = 'r' and c.relname = any(?) and not has_table_privilege(c.oid, r) "
                "order by 1, 2",
                list(RIGHTS), self._settings.schema, [f"unlost_{name}" for name in TABLES],
            )
        ]  # fmt: skip

    def _dead_rows(self, found: Facts) -> None:
        rows = self._rows(
            "select s.relname, s.n_live_tup, s.n_dead_tup, coalesce(c.reloptions, '{}'::text[]) from pg_stat_user_tables s "
            "join pg_class c on c.oid = s.relid where s.schemaname = ? and s.relname like 'unlost\\_%'",
            self._settings.schema,
        )
        on = found.settings.get("autovacuum", ("on", ""))[0] == "on"
        found.tables = {
            name: Table(live, dead, on and not {"autovacuum_enabled=false", "autovacuum_enabled=off"} & set(options))
            for name, live, dead, options in rows
        }

    def _sequence(self, found: Facts) -> None:
        rows = self._rows(
            "select seqcache from pg_sequence where seqrelid = pg_get_serial_sequence(?, 'seq')::regclass",
            f"{self._schema}.unlost_outbox",
        )
        found.cache = int(rows[0][0]) if rows else 1

    def _inbox(self, found: Facts) -> None:
        rows, size = self._row(
            "select greatest(reltuples, 0)::bigint, pg_total_relation_size(oid) from pg_class where oid = ?::regclass",
            f"{self._schema}.unlost_inbox",
        )
        found.inbox = (rows, size)

    def _absent(self, found: Facts) -> None:
        """Of processes that said goodbye there is no row."""
        rows = self._rows(
            "select p.pid, p.host, extract(epoch from now() - p.seen)::float8, l.objid is not null, "
            "(select count(*) from unlost_progress u where u.owner = p.id) "
            "from unlost_process p left join pg_locks l on l.objid = p.number and l.locktype = 'advisory' "
            "and l.classid = ?::integer and l.objsubid = 2 and l.granted "
            "and l.database = (select oid from pg_database where datname = current_database()) "
            "where p.seen < now() - make_interval(secs => ?) order by p.seen",
            self._settings.lock_class, HUNG_SECONDS,
        )  # fmt: skip
        found.absent = [Absent(*row) for row in rows]
