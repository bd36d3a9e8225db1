"""`unlost store`: the tables of a store in PostgreSQL, copies of the embedded file, and the history of the log as files."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter

from unlost import config
from unlost.cli.options import AppName, BrokerUrl, DryRun, Json, Operator, Why, Yes, confirmed, count, login, looking
from unlost.cli.say import clean, dim, note, out, print_json, warn
from unlost.config import hide_secrets
from unlost.errors import UsageError
from unlost.ops import backup as copies
from unlost.ops import export as history
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
    dry_run: DryRun = False,
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


def export(
    *,
    format: Annotated[history.Format, Parameter(name="--format", help="What the files are.")],
    to: Annotated[Path, Parameter(name="--to", help="The folder; it is made. The same command goes on there.")],
    topic: Annotated[
        list[str] | None, Parameter(name="--topic", negative="", help="Only this topic; may be given again.")
    ] = None,
    type: Annotated[
        list[str] | None,
        Parameter(name="--type", negative="", help="Only this wire type or class name; may be given again."),
    ] = None,
    key: Annotated[str | None, Parameter(name="--key", help="Only this key.")] = None,
    from_: Annotated[
        str | None, Parameter(name="--from", help="Recorded at this time or later: 2026-11-23T14:00Z, or 10m (ago).")
    ] = None,
    until: Annotated[str | None, Parameter(name="--until", help="Recorded before this time.")] = None,
    with_sensitive: Annotated[
        bool, Parameter(name="--with-sensitive", negative="", help="Write all data as stored, sensitive or not.")
    ] = False,
    app: AppName = None,
    broker: BrokerUrl = None,
    json: Json = False,
) -> int:
    """Write the events of the log into files, for DuckDB, polars, pandas and the like.

    A file holds a range of positions of one partition, and is there only when it is whole. A run that was killed goes on
    where it ended when you repeat the command, and a later run adds only what is new.

    Fields that your code calls `Sensitive`, or does not know, read `***`; data of types for which your code has no class
    are left out, and the end says so. `--with-sensitive` writes everything. Looking takes nothing from anybody.

    **Needs** the broker, and your code to know what is sensitive. For Parquet: pip install "unlost[parquet]".

    **Examples**

    - `unlost store export --format parquet --to history --app shop`
    - `unlost store export --format jsonl --to paid --type PaymentCompleted --from 2026-11-01 --until 2026-12-01`
    """
    wanted = history.filters(topics=topic or (), types=type or (), key=key, since=from_, until=until)
    if not with_sensitive and app is None and config.setting("app").value:
        from unlost.ops.load import load

        load()
    with looking(app, broker) as here:
        found = history.export(here.log, to, format=format, wanted=wanted, with_sensitive=with_sensitive)
    if json:
        print_json(
            "export/1",
            {
                "folder": str(to), "format": format, "with_sensitive": with_sensitive, "resumed": found.resumed,
                "events": found.events, "files": found.files, "bytes": found.bytes, "all_events": found.all_events,
                "all_files": found.all_files, "left_out": found.left_out, "empty": found.empty,
                "gone": [r._asdict() for r in found.gone],
            },
        )  # fmt: skip
        return 0
    written = f"{count(found.events, 'event')} in {count(found.files, 'file')}, {found.bytes:,} bytes"
    out(f"{written}, written to {clean(to)}")
    if found.resumed:
        out(f"with those of earlier runs: {count(found.all_events, 'event')} in {count(found.all_files, 'file')}")
    for range in found.gone:
        out(warn(f"gone: the log no longer has {clean(range)}"))
    if found.empty:
        out(f"{count(found.empty, 'position')} held no event (markers of transactions, or compacted)")
    for reason, number in found.left_out.items():
        out(f"left out: {clean(reason)} ({count(number, 'event')})")
    if found.left_out:
        out(dim("--app names your code; --with-sensitive writes everything"))
    return 0


def backup(
    path: Annotated[
        Path | None, Parameter(help="Where the backup goes; nothing may be there. Else beside the file, with the time.")
    ] = None,
    /,
    *,
    app: Annotated[
        str | None, Parameter(name="--app", help="The broker and store that this App names in its code.")
    ] = None,
    broker: BrokerUrl = None,
    json: Json = False,
) -> int:
    """Copy the embedded file while services run, and read the copy through.

    The backup is one file: the log and all progress, as they were at one moment. It gets its name only when it is whole,
    checked and on the disk. Nobody who writes has to wait for it.

    A store in PostgreSQL and the events in Kafka are copied with the tools of those servers; it says so.

    **Needs** only the file; with `--app` your code says which.

    **Examples**

    - `unlost store backup /mnt/other-disk/shop.backup`
    - `unlost store backup --json | jq -r .path`
    """
    url, store = _named(app, broker)
    found = copies.back_up(path, url=url, store=store, said=_progress("backup"))
    if json:
        print_json(
            "backup/1",
            {"path": found.path, "source": found.source, "bytes": found.bytes, "not_in_it": found.not_in_it,
             "manifest": msgspec.to_builtins(found.manifest)},
        )  # fmt: skip
        return 0
    m = found.manifest
    log = f", {count(sum(r.end - r.start for r in m.positions), 'event')}" if m.broker is None else ""
    out(f"{clean(found.path)}: {found.bytes:,} bytes{log}, commit {m.commit}, {m.time}")
    for text in found.not_in_it:
        out(warn(f"not in it: {clean(text)}"))
    if path is None:
        out(dim("it is on the same disk as the file: copy it to another one"))
    return 0


def restore(
    path: Annotated[Path, Parameter(help="The backup.")],
    /,
    *,
    replace: Annotated[
        bool,
        Parameter(
            name="--replace", negative="", help="Move the file that is there aside, whole, into a folder beside it."
        ),
    ] = False,
    dry_run: Annotated[
        bool, Parameter(name="--dry-run", negative="", help="Only check, and say what would be missing.")
    ] = False,
    reason: Why = "",
    yes: Yes = False,
    operator: Operator = None,
    app: Annotated[
        str | None, Parameter(name="--app", help="The broker and store that this App names in its code.")
    ] = None,
    broker: BrokerUrl = None,
    json: Json = False,
) -> int:
    """Put a backup into the place of the embedded file, and say what it does not hold.

    The backup is read through before and after it is copied. Nothing is overwritten, and nothing happens while a process
    has the file open. What was accepted after the backup is named, as positions of the log, and written into the restored
    file with your name and your reason.

    **Needs** only the place; stop all services before.

    **Examples**

    - `unlost store restore shop.backup --dry-run`
    - `unlost store restore shop.backup --replace --reason "the disk failed"`
    """
    url, store = _named(app, broker)
    said = _progress("restore")
    who = operator or login()
    if not dry_run and not yes:
        look = copies.restore(path, operator=who, reason=reason, dry_run=True, url=url, store=store, said=said)
        if look.replaces and not replace:
            yes = True  # it is refused, with what would be missing
        else:
            confirmed("restore", [clean(f"{look.path}: {copies.brief(look.missing)}")], "restore it?")
    found = copies.restore(
        path, operator=who, reason=reason, replace=replace, dry_run=dry_run, url=url, store=store, said=said
    )
    if json:
        print_json(
            "restore/1",
            {**msgspec.to_builtins(found), "operator": who, "reason": reason, "events_missing": found.missing.events},
        )
        return 0
    _print_restored(found)
    return 0


def _print_restored(found: copies.Restored) -> None:
    verb = "is" if found.done else "would be"
    out(f"{clean(found.path)} {verb} what it was at {found.manifest.time} (commit {found.manifest.commit})")
    if found.aside:
        out(f"the file that was there is in {clean(found.aside)}")
    for r in found.missing.positions:
        out(
            warn(
                f"missing: {clean(r.topic)}/{r.partition}, positions {r.start} to {r.end - 1} ({count(r.end - r.start, 'event')})"
            )
        )
    if found.missing.outbox:
        out(warn(f"missing: {count(found.missing.outbox, 'event')} of the outbox"))
    for a in found.missing.again:
        out(
            f"delivered again: {clean(a.service)} {clean(a.topic)}/{a.partition}, positions {a.position} to {a.was - 1}"
        )
    out(clean(copies.brief(found.missing)))
    for text in found.notes:
        out(warn(clean(text)))
    if not found.done:
        out(dim("nothing was changed"))


def _named(app: str | None, broker: str | None) -> tuple[str | None, str | None]:
    """The URLs of broker and store: the flag goes before what an App says."""
    if app is None:
        return broker, None
    from unlost.ops.load import load

    found = load(app).app
    return broker if broker is not None else found.broker_url, found.store_url


def _progress(verb: str) -> Callable[[str, int, int], None]:
    """One line on a terminal, and nothing elsewhere."""
    shown = sys.stderr.isatty()

    def said(what: str, done: int, total: int) -> None:
        if shown and what == "done":
            sys.stderr.write("\r\x1b[K")
        elif shown:
            part = f" {done:,}" + (f" of {total:,}" if total else "") if done else ""
            sys.stderr.write(f"\r\x1b[K{verb}: {clean(what)}{part}")
        if shown:
            sys.stderr.flush()

    return said
