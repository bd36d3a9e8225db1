"""Making the tables, and bringing those of older releases up to date. The only place that needs the right to create.

**Guarantee** a migration is one transaction. **After a crash** it happened or it did not; running it again is harmless.
"""

from __future__ import annotations

import psycopg
from psycopg import Connection

from unlost.errors import UsageError
from unlost.store.postgres.client import told
from unlost.store.postgres.schema import FORMAT, GRANTS, quoted, statements
from unlost.store.postgres.settings import Settings
from unlost.store.postgres.startup import foreign
from unlost.world import REAL


def script(settings: Settings, found: int = 0, role: str = "") -> str:
    """What a database administrator would run: from format `found` (0: nothing is there) to this release's."""
    parts = statements(settings.schema, found)
    grants = GRANTS.format(s=quoted(settings.schema), role=quoted(role)) if role else ""
    body = "\n".join(part.strip() for part in parts)
    return f"begin;\n{body}\n{grants}commit;\n" if body or grants else ""


def found(settings: Settings) -> int:
    """The format of the tables that are there, 0 without any.

    Raises:
        UsageError: they are not ours, or of a newer release. Unavailable: nobody answers.
    """
    with told(settings), Connection.connect(settings.conninfo, autocommit=True) as connection:
        return _found(connection, settings)


def store_id(settings: Settings) -> str:
    """Of the store that is there; "" without any."""
    with told(settings), Connection.connect(settings.conninfo, autocommit=True) as connection:
        if _found(connection, settings) == 0:
            return ""
        table = psycopg.sql.Identifier(settings.schema, "unlost_meta")
        row = connection.execute(
            psycopg.sql.SQL("select value from {} where name = 'store_id'").format(table)
        ).fetchone()
        return str(row[0]) if row else ""


def _found(connection: Connection[tuple[object, ...]], settings: Settings) -> int:
    schema = settings.schema
    rows = connection.execute(
        "select c.relname from pg_class c join pg_namespace n on n.oid = c.relnamespace "
        "where n.nspname = %s and c.relkind in ('r', 'v', 'm', 'p') and c.relname like 'unlost\\_%%'",
        (schema,),
    ).fetchall()
    if not rows:
        return 0
    if ("unlost_meta",) not in rows:
        raise foreign(schema, "there are tables that start with unlost_, and unlost_meta is not among them")
    row = connection.execute(
        psycopg.sql.SQL("select value from {}.unlost_meta where name = 'format'").format(psycopg.sql.Identifier(schema))
    ).fetchone()
    if row is None or not str(row[0]).isdigit():
        raise foreign(schema, "unlost_meta does not say their format")
    format = int(str(row[0]))
    statements(schema, format)  # says if it is newer
    return format


def migrate(settings: Settings, role: str = "", *, operator: str = "", reason: str = "") -> tuple[int, int]:
    """Runs what is missing, in one transaction; returns the formats before and after. `role` gets the rights of a service.
    Who has done it is recorded in the same transaction.

    Raises:
        UsageError: the tables are foreign or newer, or the right to create is missing. Unavailable: nobody answers.
    """
    with told(settings), Connection.connect(settings.conninfo, autocommit=True) as connection:
        with connection.transaction():
            connection.execute(
                "select pg_advisory_xact_lock(%s, 0)", (settings.lock_class,)
            )  # two at once: one after the other
            before = _found(connection, settings)
            there = connection.execute("select 1 from pg_namespace where nspname = %s", (settings.schema,)).fetchone()
            try:
                for part in statements(settings.schema, before):
                    if there and part.startswith("create schema"):
                        continue  # its owner may lack the right to make one
                    connection.execute(part)
                if role:
                    connection.execute(GRANTS.format(s=quoted(settings.schema), role=quoted(role)))
                if before != FORMAT or role:
                    _record(connection, settings, before, role, operator, reason)
            except psycopg.errors.InsufficientPrivilege as e:
                raise UsageError(
                    "UL1162", "making the tables needs more rights than this role has", found=str(e).strip().partition("\n")[0],
                    fix="run it as the owner of the database, or hand the output of unlost store migrate --sql to its administrator",
                ) from e  # fmt: skip
            except psycopg.errors.UndefinedObject as e:
                raise UsageError(
                    "UL1167", "there is no such database or role", found=str(e).strip().partition("\n")[0],
                    fix=f"create role {quoted(role)} login password …",
                ) from e  # fmt: skip
        return before, FORMAT


def _record(
    connection: Connection[tuple[object, ...]], settings: Settings, before: int, role: str, operator: str, reason: str
) -> None:
    now = REAL.now()
    done = f"format {before} to {FORMAT}" + (f", rights for {role}" if role else "")
    connection.execute(
        psycopg.sql.SQL(
            "insert into {}.unlost_operation (at, operator, action, reason, service, topic, partition, position, id, "
            "carried_out, result) values (%s, %s, 'migrate', %s, '', '', 0, 0, '', %s, %s)"
        ).format(psycopg.sql.Identifier(settings.schema)),
        (now, operator, reason, now, done),
    )
