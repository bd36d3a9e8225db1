"""`unlost store`: the tables of a store in PostgreSQL."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from unlost import config
from unlost.cli.options import Json, Operator, Why, Yes, confirmed, login
from unlost.cli.say import clean, dim, note, out, print_json
from unlost.config import hide_secrets
from unlost.errors import UsageError
from unlost.ops.store import Plan, check_format, plan
from unlost.ops.store import migrate as run
from unlost.store.connect import is_postgres, store_path


def migrate(
    *,
    store: Annotated[
        str | None, Parameter(name="--store", help="URL of the store: postgresql://… Else UNLOST_STORE, pyproject.")
    ] = None,
    sql: Annotated[
        bool,
        Parameter(name="--sql", negative="", help="Only print the statements, for whoever administers the database."),
    ] = False,
    from_: Annotated[
        str | None,
        Parameter(
            name="--from", help="With --sql: the format of the tables that are there; then nobody looks. 0: none."
        ),
    ] = None,
    role: Annotated[
        str | None, Parameter(name="--role", help="Also give this role the rights that a service needs.")
    ] = None,
    dry_run: Annotated[bool, Parameter(name="--dry-run", negative="", help="Only say what would be done.")] = False,
    reason: Why = "",
    yes: Yes = False,
    operator: Operator = None,
    app: Annotated[str | None, Parameter(name="--app", help="The store that this App names in its code.")] = None,
    json: Json = False,
) -> int:
    """Make the tables of a store in PostgreSQL, or bring them up to date.

    They are in a schema of their own (`unlost`, or `?schema=` of the URL); nothing else is touched. It is one
    transaction, and running it again is harmless. It needs the right to create; services do not: `--role` grants what
    they need. A store in a file makes its tables by itself.

    With `--sql` the statements are printed instead, also where the database cannot be reached from here.

    **Needs** only the store; with `--app` your code says which.

    **Examples**

    - `unlost store migrate --store postgresql://owner@db/shop --role shop_service`
    - `unlost store migrate --sql --role shop_service > migrate.sql` for an administrator
    - `unlost store migrate --dry-run`
    """
    if from_ is not None and not sql:
        raise UsageError("UL1342", "--from goes with --sql", fix="without --sql it is looked which tables are there")
    code = None
    if app is not None:
        from unlost.ops.load import load

        code = load(app).app.store_url
    url = config.setting("store", flag=store, code=code).value
    if not is_postgres(url):
        return _a_file(url, json)
    found = plan(url, role=role or "", found=None if from_ is None else check_format(from_), offline=sql)
    if found.assumed:
        note(
            f"nobody looked at {clean(found.store)}, so this is for one without tables (else say --from): {clean(found.assumed)}"
        )
    if sql and not json:
        out(found.sql.rstrip() or "-- nothing to do")
        return 0
    done = bool(found.sql) and not sql and not dry_run
    if done:
        if found.changes_tables and not yes:
            confirmed("migrate", [clean(_what(found, "would be"))], "change these tables?")
        run(url, role=role or "", operator=operator or login(), reason=reason)
    if json:
        print_json(
            "migrate/1",
            {"store": found.store, "found": found.found, "format": found.format, "role": role, "done": done,
             "dry_run": dry_run, "sql": found.sql if sql or dry_run else None},
        )  # fmt: skip
        return 0
    if not found.sql:
        out(f"nothing to do: the tables of {clean(found.store)} have format {found.format}")
    elif dry_run:
        out(f"{clean(_what(found, 'would be'))}; nothing was changed")
        out(dim("unlost store migrate --sql prints the statements"))
    else:
        out(clean(_what(found, "are")))
    return 0


def _what(found: Plan, verb: str) -> str:
    """`verb`: what becomes of it: `are`, or `would be`."""
    parts = []
    if not found.found:
        parts.append(f"tables of format {found.format} {verb} made")
    elif found.found < found.format:
        parts.append(f"tables of format {found.found} {verb} brought to {found.format}")
    if found.role:
        parts.append(f"the rights of a service {verb} given to {found.role}")
    return f"{found.store}: {', '.join(parts)}"


def _a_file(url: str, json: bool) -> int:
    store_path(url)  # says what is no URL of a store
    if json:
        print_json("migrate/1", {"store": hide_secrets(url), "done": False, "sql": None})
        return 0
    where = hide_secrets(url) if url else "UNLOST_STORE names no other; --store postgresql://…"
    out(f"nothing to do: a store in a file makes its tables by itself ({clean(where)})")
    return 0
