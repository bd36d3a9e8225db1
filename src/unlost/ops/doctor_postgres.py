"""What the facts of a store in PostgreSQL mean: the checks of `unlost doctor`. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from unlost.brokers.findings import Finding, Severity
from unlost.store.postgres.facts import Facts
from unlost.store.postgres.schema import FORMAT

VERSION_MIN, VERSION_OLDEST_KEPT = 130000, 140000  # what we need, and what the PostgreSQL project still mends
CLOCK_SECONDS = 30.0
CONNECTIONS_SHARE = 0.8
# Each has its own kind of life: rows of the outbox come and go all the time, units of progress are few.
DEAD_MAX = {"unlost_outbox": 1_000_000, "unlost_outbox_status": 1_000_000, "unlost_progress": 100_000}
INBOX_BYTES = 10_000_000_000
STATEMENT_MS = 30_000  # a limit below it ends statements of ours on a slow day
SHOWN = 5


def check_postgres(facts: Facts) -> list[Finding]:
    """Every check, the worst of each first."""
    return [
        *_version(facts), *_durable(facts), *_synchronous(facts), *_primary(facts), *_pooler(facts), *_encoding(facts),
        *_tables(facts), *_rights(facts), *_encryption(facts), *_connections(facts), *_clock(facts), *_held(facts),
        *_dead_rows(facts), *_sequence(facts), *_inbox(facts), *_absent(facts), *_limits(facts), *_unread(facts),
    ]  # fmt: skip


def _version(facts: Facts) -> Iterator[Finding]:
    evidence = f"server_version {facts.version_text}"
    if facts.version < VERSION_MIN:
        yield _bad("error", "UL4601", "the store needs PostgreSQL 13 or newer", evidence, "use a newer server")
    elif facts.version < VERSION_OLDEST_KEPT:
        yield _bad(
            "warning",
            "UL4601",
            "this release of PostgreSQL gets no corrections any more",
            evidence,
            "upgrade the server",
        )
    else:
        yield _ok("UL4601", "the server is new enough", evidence)


def _durable(facts: Facts) -> Iterator[Finding]:
    off = [name for name in ("fsync", "full_page_writes") if _setting(facts, name) == "off"]
    for name in off:
        yield _bad(
            "error", "UL4602", f"{name} is off: after a power loss the database can be damaged, and what was acknowledged gone",
            f"{name} = off, from {_source(facts, name)}", f"alter system set {name} = on; select pg_reload_conf()",
        )  # fmt: skip
    if not off:
        yield _ok("UL4602", "what the server writes survives a power loss", "fsync and full_page_writes are on")


def _synchronous(facts: Facts) -> Iterator[Finding]:
    value = _setting(facts, "synchronous_commit")
    evidence = f"synchronous_commit = {value}, from {_source(facts, 'synchronous_commit')}"
    if value == "off":
        yield _bad(
            "warning", "UL4603", "commits return before they are on the disk: events that app.outbox() put into your own transactions "
            "can be lost, with their rows",
            f"{evidence}; connections of unlost itself set it to on",
            f'alter role "{facts.role}" set synchronous_commit = on (and those of the programs that publish)',
        )  # fmt: skip
    else:
        yield _ok("UL4603", "a commit is on the disk before it returns", evidence)


def _primary(facts: Facts) -> Iterator[Finding]:
    if facts.replica:
        yield _bad(
            "error", "UL4604", "this server is a read-only replica: services will not start with it", "pg_is_in_recovery()",
            "name the primary; with several hosts: ?target_session_attrs=read-write",
        )  # fmt: skip
    elif facts.read_only:
        yield _bad(
            "error", "UL4604", "transactions are read-only here: services will not start with it", "default_transaction_read_only = on",
            f'alter role "{facts.role}" set default_transaction_read_only = off (or the database)',
        )  # fmt: skip
    else:
        yield _ok("UL4604", "the server takes writes", "pg_is_in_recovery() is false")


def _pooler(facts: Facts) -> Iterator[Finding]:
    if "poolers" in facts.unread:
        return
    if facts.pooler:
        yield _bad(
            "error", "UL4605", "a pooler shares its sessions between its clients: services will not start with it",
            f"two connections to {facts.shown} were not two sessions",
            "connect the services directly, or through a pool in session mode; app.outbox(connection) works through any pooler",
        )  # fmt: skip
    else:
        yield _ok("UL4605", "each connection is a session of its own", "looked at with two connections")


def _encoding(facts: Facts) -> Iterator[Finding]:
    if facts.encoding != "UTF8":
        yield _bad(
            "error", "UL4606", "the database is not in UTF-8: services will not start with it", f"server_encoding = {facts.encoding}",
            "create database … encoding 'UTF8' template template0",
        )  # fmt: skip
    else:
        yield _ok("UL4606", "the database is in UTF-8", "server_encoding = UTF8")


def _tables(facts: Facts) -> Iterator[Finding]:
    found = int(facts.format) if facts.format.isdigit() else 0
    if "tables" in facts.unread or ("unlost_meta", "select") in facts.lacking:
        return  # said there
    if not facts.there:
        yield _bad(
            "error", "UL4607", "there are no tables of unlost", f"schema {facts.schema!r}",
            "unlost store migrate makes them (unlost store migrate --sql prints the statements)",
        )  # fmt: skip
    elif facts.missing or not found:
        missing = ", ".join(facts.missing) or "none is missing"
        yield _bad(
            "error", "UL4607", f"the tables in the schema {facts.schema!r} are not (all) those of unlost",
            f"missing: {missing}; format: {facts.format or 'unknown'}",
            "name another schema (?schema=…), or restore the one that was there",
        )  # fmt: skip
    elif found < FORMAT:
        yield _bad(
            "error", "UL4607", "the tables are of an older release of unlost: services will not start with them",
            f"format {found}, this release needs {FORMAT}", "unlost store migrate brings them up to date",
        )  # fmt: skip
    elif found > FORMAT:
        yield _bad(
            "error", "UL4607", "the tables are of a newer release of unlost", f"format {found}, this release knows up to {FORMAT}",
            "pip install -U unlost",
        )  # fmt: skip
    else:
        yield _ok("UL4607", "the tables are those of this release", f"format {found} in the schema {facts.schema!r}")


def _rights(facts: Facts) -> Iterator[Finding]:
    if facts.lacking:
        named = ", ".join(f"{right} on {table}" for table, right in facts.lacking[:SHOWN])
        more = f" and {len(facts.lacking) - SHOWN} more" if len(facts.lacking) > SHOWN else ""
        yield _bad(
            "error", "UL4608", f"the role {facts.role!r} lacks rights: services will not start with it", f"{named}{more}",
            f"unlost store migrate --sql --role {facts.role} prints the statements that grant them",
        )  # fmt: skip
    elif facts.there and "tables" not in facts.unread:
        yield _ok("UL4608", f"the role {facts.role!r} has all rights that a service needs", "has_table_privilege()")


def _encryption(facts: Facts) -> Iterator[Finding]:
    if facts.encrypted:
        yield _ok("UL4609", "the connection is encrypted", "TLS")
    elif not facts.remote:
        yield _ok("UL4609", "the connection does not leave this machine", "no TLS, loopback or a socket")
    else:
        yield _bad(
            "warning", "UL4609", "events go to the store over the network as plain text", f"no TLS to {facts.shown}",
            "turn ssl on at the server, and put sslmode=verify-full into the URL",
        )  # fmt: skip


def _connections(facts: Facts) -> Iterator[Finding]:
    if "connections" in facts.unread:
        return
    evidence = f"{facts.used} of {facts.limit} are used ({facts.limit_of})"
    if facts.used >= facts.limit * CONNECTIONS_SHARE:
        yield _bad(
            "warning", "UL4610", "the connections of the server are nearly used up: then services cannot write, and wait", evidence,
            "let fewer programs connect, lower pool= in UNLOST_STORE (a process takes up to 6, and pool= for its handlers), or raise the limit",
        )  # fmt: skip
    else:
        yield _ok("UL4610", "there are connections left", evidence)


def _clock(facts: Facts) -> Iterator[Finding]:
    off = abs(facts.ahead)
    evidence = f"{facts.ahead:+.1f} s, to {max(facts.blur, 0.05):.1f} s exactly"
    if off - facts.blur > CLOCK_SECONDS:
        yield _bad(
            "warning", "UL4611", f"the server's clock is {off:,.0f} s {'ahead of' if facts.ahead > 0 else 'behind'} this machine's", evidence,
            "let NTP or chrony set the clocks of all machines; due times and ages are reckoned with them",
        )  # fmt: skip
    else:
        yield _ok("UL4611", "the clocks of the server and of this machine agree", evidence)


def _held(facts: Facts) -> Iterator[Finding]:
    if "open transactions" in facts.unread:
        return
    for held in facts.held[:SHOWN]:
        yield _bad(
            "warning", "UL4612", "a transaction is open for long: what is deleted meanwhile stays on the disk, and the outbox gets slow",
            f"{held.what}, for {held.seconds:,.0f} s; {len(facts.held)} of them" if len(facts.held) > 1 else f"{held.what}, for {held.seconds:,.0f} s",
            "end it (commit, rollback, or select pg_terminate_backend(pid)); idle_in_transaction_session_timeout ends forgotten ones",
        )  # fmt: skip
    if facts.hidden:
        yield _bad(
            "note", "UL4612", "transactions of other roles were not looked at", f"{facts.hidden} sessions in pg_stat_activity",
            f'grant pg_read_all_stats to "{facts.role}", or run this as a role that has it',
        )  # fmt: skip
    elif not facts.held:
        yield _ok("UL4612", "no transaction is open for long", "pg_stat_activity, pg_prepared_xacts")


def _dead_rows(facts: Facts) -> Iterator[Finding]:
    bad = False
    for name, most in DEAD_MAX.items():
        table = facts.tables.get(name)
        if table is None:
            continue
        if not table.cleaned:
            bad = True
            yield _bad(
                "warning", "UL4613", f"nobody cleans {name}: autovacuum is off, and it grows with every event",
                f"{table.dead:,} dead rows, {table.live:,} live", f"alter system set autovacuum = on; alter table … {name} reset (autovacuum_enabled)",
            )  # fmt: skip
        elif table.dead > most and table.dead > table.live:
            bad = True
            yield _bad(
                "warning", "UL4613", f"{name} is full of dead rows: every look at it reads past them",
                f"{table.dead:,} dead rows, {table.live:,} live",
                f"is a transaction open for long (UL4612)? Else: vacuum {name}, and let autovacuum work more often (autovacuum_vacuum_cost_delay = 0)",
            )  # fmt: skip
    if not bad and facts.tables:
        dead = {name: facts.tables[name].dead for name in DEAD_MAX if name in facts.tables}
        yield _ok("UL4613", "dead rows are cleaned", ", ".join(f"{name}: {n:,}" for name, n in dead.items()))


def _sequence(facts: Facts) -> Iterator[Finding]:
    if facts.cache > 1:
        yield _bad(
            "error", "UL4614", "sessions take numbers of the outbox in advance: a later event of a key can get a lower number, and be sent first",
            f"the sequence of unlost_outbox.seq has cache {facts.cache}", "alter table … unlost_outbox alter column seq set cache 1",
        )  # fmt: skip
    elif facts.there and not facts.missing and "the outbox's sequence" not in facts.unread:
        yield _ok("UL4614", "numbers of the outbox are given one at a time", "cache 1")


def _inbox(facts: Facts) -> Iterator[Finding]:
    rows, size = facts.inbox
    evidence = f"about {rows:,} marks, {size / 1e6:,.0f} MB"
    if size > INBOX_BYTES:
        yield _bad(
            "note", "UL4615", "the inbox is large; looking into it may need the disk", evidence,
            "say how long the same event may come again (Service(resends=…)): older marks are removed then",
        )  # fmt: skip
    elif facts.tables:
        yield _ok("UL4615", "the inbox is small enough", evidence)


def _absent(facts: Facts) -> Iterator[Finding]:
    hung = [p for p in facts.absent if p.alive]
    dead = [p for p in facts.absent if not p.alive and p.units]
    for p in hung[:SHOWN]:
        yield _bad(
            "warning", "UL4616", "a process is connected and gives no sign of life: its event loop stands still, or it is stopped",
            f"pid {p.pid} on {p.host}, for {p.seconds:,.0f} s, with {p.units} partitions",
            "look at it there: a handler that blocks the event loop? Killing it loses nothing",
        )  # fmt: skip
    for p in dead[:SHOWN]:
        yield _bad(
            "warning", "UL4616", "a process has died, and nobody has taken its partitions", f"pid {p.pid} on {p.host}, {p.seconds:,.0f} s ago, "
            f"with {p.units} partitions", "unlost run",
        )  # fmt: skip
    if not hung and not dead and facts.tables and "processes" not in facts.unread:
        yield _ok("UL4616", "every process gives signs of life", "unlost_process and pg_locks")


def _limits(facts: Facts) -> Iterator[Finding]:
    bad = False
    for name, most in (
        ("idle_session_timeout", None),
        ("transaction_timeout", STATEMENT_MS),
        ("statement_timeout", STATEMENT_MS),
    ):
        value = _setting(facts, name)
        ms = int(value) if value.isdigit() else 0
        if ms and (most is None or ms < most):
            bad = True
            yield _bad(
                "warning", "UL4617", "the server ends sessions that only listen: processes seem dead again and again, and lose their partitions"
                if most is None else "the server ends statements of ours that take long, and they are begun again",
                f"{name} = {ms} ms, from {_source(facts, name)}", f'alter role "{facts.role}" set {name} = 0',
            )  # fmt: skip
    if not bad:
        yield _ok("UL4617", "no limit of the server ends our sessions", "idle_session_timeout, statement_timeout")


def _unread(facts: Facts) -> Iterator[Finding]:
    for what, why in sorted(facts.unread.items()):
        yield _bad("note", "UL4618", f"not checked: {what}", why, "run it as a role that may look at it")


def _setting(facts: Facts, name: str) -> str:
    return facts.settings.get(name, ("", ""))[0]


def _source(facts: Facts, name: str) -> str:
    """Where PostgreSQL says that a value comes from: `configuration file`, `database`, `user` …"""
    return facts.settings.get(name, ("", "default"))[1]


def _bad(severity: Severity, code: str, what: str, evidence: str, fix: str) -> Finding:
    return Finding(severity=severity, code=code, what=what, evidence=evidence, fix=fix)


def _ok(code: str, what: str, evidence: str = "") -> Finding:
    return Finding(severity="ok", code=code, what=what, evidence=evidence)
