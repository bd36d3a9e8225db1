"""What a database must be to be a store. Looked at before anything is written, and refused with the way out."""

from __future__ import annotations

import logging
from typing import Any

from unlost.errors import UsageError
from unlost.store.postgres.client import Client, Connection, told
from unlost.store.postgres.schema import FORMAT, RIGHTS, TABLES, newer
from unlost.store.postgres.settings import Settings

log = logging.getLogger("unlost.store")

VERSION_MIN = 130000
_PROBE = "unlost.probe"


async def check(client: Client) -> str:
    """Returns the store's id.

    Raises:
        UsageError: this database cannot be our store, as it is. Unavailable: nobody answers.
    """
    one = await client.connect()
    try:
        two = await client.connect()
        try:
            with told(client.settings):
                await _check_pooler(one, two, client.settings)
                await _check_server(one, client.settings)
                return await _check_tables(one, client.settings)
        finally:
            await two.close()
    finally:
        await one.close()


async def _value(connection: Connection, sql: str, *bindings: Any) -> Any:
    cursor = await connection.execute(sql, bindings or None)
    row = await cursor.fetchone()
    return row[0] if row else None


async def _check_pooler(one: Connection, two: Connection, settings: Settings) -> None:
    """Two connections of ours must be two sessions of the server: we listen in one, and hold a lock in it."""
    mark = f"{id(one)}"
    await one.execute(f"select set_config('{_PROBE}', %s, false)", (mark,))
    for _ in range(3):
        mixed = await _value(two, f"select current_setting('{_PROBE}', true)") == mark
        moved = await _value(one, f"select current_setting('{_PROBE}', true)") != mark
        if mixed or moved:
            raise UsageError(
                "UL1164", "the store needs sessions of its own", found=f"{settings.shown} is a pooler that shares sessions "
                "between its clients (transaction or statement mode)",
                fix="connect the services directly, or through a pool in session mode; app.outbox(connection) works "
                "through any pooler",
            )  # fmt: skip


async def _check_server(connection: Connection, settings: Settings) -> None:
    version = int(await _value(connection, "show server_version_num"))
    if version < VERSION_MIN:
        raise UsageError(
            "UL1165", "the store needs PostgreSQL 13 or newer", found=await _value(connection, "show server_version"),
            fix="use a newer server",
        )  # fmt: skip
    if await _value(connection, "select pg_is_in_recovery()"):
        raise UsageError(
            "UL1163", "this server is a read-only replica", found=settings.shown,
            fix="name the primary; with several hosts: ?target_session_attrs=read-write",
        )  # fmt: skip
    if await _value(connection, "show default_transaction_read_only") == "on":
        raise UsageError(
            "UL1163", "transactions are read-only here", found="default_transaction_read_only = on",
            fix="alter role … set default_transaction_read_only = off (or the database)",
        )  # fmt: skip
    encoding = await _value(connection, "show server_encoding")
    if encoding != "UTF8":
        raise UsageError(
            "UL1165", "the store needs a database in UTF-8", found=f"its encoding is {encoding}",
            fix="create database … encoding 'UTF8' template template0",
        )  # fmt: skip
    for name in ("fsync", "full_page_writes"):
        if await _value(connection, f"show {name}") == "off":
            log.warning(
                "UL1169: the server of the store runs with %s = off: what it acknowledges does not survive a power loss", name
            )  # fmt: skip


async def _check_tables(connection: Connection, settings: Settings) -> str:
    schema = settings.schema
    cursor = await connection.execute(
        "select c.relname from pg_class c join pg_namespace n on n.oid = c.relnamespace where n.nspname = %s "
        "and c.relkind = 'r' and c.relname like 'unlost\\_%%'",
        (schema,),
    )
    there = {name for (name,) in await cursor.fetchall()}
    missing = sorted({f"unlost_{name}" for name in TABLES} - there)
    if not there:
        raise UsageError(
            "UL1160", "there are no tables of unlost", found=f"schema {schema!r} of {settings.shown}",
            fix="unlost store migrate makes them (unlost store migrate --sql prints the statements)",
        )  # fmt: skip
    if "unlost_meta" in missing:
        raise foreign(schema, f"its tables are {', '.join(sorted(there))}, without unlost_meta")
    await check_rights(connection, settings)
    cursor = await connection.execute(f'select name, value from "{schema}".unlost_meta')
    meta: dict[str, str] = dict(await cursor.fetchall())
    found = meta.get("format", "")
    if not found.isdigit() or not meta.get("store_id"):
        raise foreign(schema, f"unlost_meta says format {found!r} and store id {meta.get('store_id')!r}")
    if int(found) > FORMAT:
        raise newer(schema, int(found))
    if int(found) < FORMAT:
        raise UsageError(
            "UL1159", f"the tables in the schema {schema!r} are of an older release of unlost",
            found=f"format {found}, this release needs {FORMAT}", fix="unlost store migrate brings them up to date",
        )  # fmt: skip
    if missing:
        raise foreign(schema, f"missing: {', '.join(missing)}")
    return meta["store_id"]


def foreign(schema: str, found: str) -> UsageError:
    return UsageError(
        "UL1161", f"the tables in the schema {schema!r} are not (all) those of unlost", found=found,
        fix="name another schema (?schema=…), or restore the one that was there",
    )  # fmt: skip


async def check_rights(connection: Connection, settings: Settings) -> None:
    """
    Raises:
        UsageError: the role lacks rights; says which.
    """
    user = await _value(connection, "select current_user")
    if not await _value(connection, "select has_schema_privilege(%s, 'usage')", settings.schema):
        raise _rights(settings, user, f"usage on schema {settings.schema}")
    cursor = await connection.execute(
        "select c.relname, r from pg_class c join pg_namespace n on n.oid = c.relnamespace, unnest(%s::text[]) r "
        "where n.nspname = %s and c.relkind = 'r' and c.relname = any(%s) and not has_table_privilege(c.oid, r)",
        (list(RIGHTS), settings.schema, [f"unlost_{name}" for name in TABLES]),
    )
    lacking = await cursor.fetchall()
    if lacking:
        raise _rights(settings, user, ", ".join(f"{right} on {table}" for table, right in lacking[:4]))


def _rights(settings: Settings, user: str, found: str) -> UsageError:
    return UsageError(
        "UL1162", f"the role {user!r} lacks rights in the store", found=found,
        fix=f"unlost store migrate --sql --role {user} prints them",
    )  # fmt: skip
