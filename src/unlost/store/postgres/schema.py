"""The tables in PostgreSQL, their version, and the rights that a service needs. One place, as in `sqlite/schema.py`.

They live in a schema of their own (`unlost`, or what the URL says), under the same names as in the file, so that what
operators ask is asked in the same words. Times are microseconds since 1970, as everywhere.

The outbox has the columns of Debezium's outbox event router (`id`, `aggregatetype`, `aggregateid`, `type`, `payload`), and
a column for each attribute of CloudEvents, named as its Kafka header. Its rows are only ever inserted by those who
publish, and deleted when a broker has confirmed them; what happens in between stands in a second table.
"""

from __future__ import annotations

from unlost.errors import UsageError

FORMAT = 2
SHARDS = 16  # parts of an outbox that relays share; a key is in one of them

# `{s}` is the quoted name of the schema.
CREATE = """
create table {s}.unlost_meta (
    name text primary key,
    value text not null
);

create table {s}.unlost_process (
    id text primary key,
    number integer generated always as identity unique,  -- its session holds an advisory lock of this number while it lives
    pid integer not null, host text not null, started bigint not null,
    seen timestamptz not null default now(),  -- its heartbeat, by the clock of the server
    relays boolean not null default false,    -- it sends what stands in the outbox
    read text not null default '[]'           -- JSON: how far it has read its units, as of its heartbeat
);

create table {s}.unlost_service (
    name text primary key,
    policy text not null,                     -- JSON: what other releases of this service must agree with
    created bigint not null
);

-- the unit of progress
create table {s}.unlost_progress (
    service text not null, topic text not null, partition integer not null,
    number integer generated always as identity unique,
    topic_id text not null,
    start bigint not null,                    -- pinned when the service first saw the topic
    start_digest bigint not null,             -- 0: a log elsewhere has no digest
    owner text, epoch bigint not null default 0,
    clean integer not null default 1,         -- 0 while somebody owns it: a takeover then follows a crash
    position bigint not null,                 -- everything below has an outcome
    fated bytea not null,                     -- runs of positions that have an outcome, see store/progress.py
    counts text not null,                     -- JSON: how many ended as done and as skipped, by rule
    digest bigint not null,                   -- XOR of the event hashes of everything fated
    attempts text not null default '{{}}',      -- JSON: failed attempts of events that are retried in memory
    deaths integer not null default 0,        -- owners that died one after another at this position
    died_at bigint not null default -1,
    alone bigint,                             -- this event runs alone: if its process dies now, it was its fault
    primary key (service, topic, partition)
) with (fillfactor = 50);
create index unlost_progress_owner on {s}.unlost_progress (owner);

-- who owned a unit of progress, when: where a missing event was last seen
create table {s}.unlost_epoch (
    service text not null, topic text not null, partition integer not null, epoch bigint not null,
    process text not null, pid integer not null, taken bigint not null, position bigint not null,
    unclean integer not null,
    primary key (service, topic, partition, epoch)
);

-- what was handled, effectively once; the place says whether an event that comes again is a duplicate, or the very
-- one whose position was not saved
create table {s}.unlost_inbox (
    content bigint not null,                  -- hash of type and data: the same id with another content is no duplicate
    position bigint not null, unit integer not null,  -- where it stood; of unlost_progress.number
    at integer not null default extract(epoch from now())::integer,  -- when it was handled, in seconds
    service text not null, source text not null,
    id bytea not null,                        -- a UUID as its 16 bytes; any other text behind a zero byte
    primary key (service, id, source)
);
create index unlost_inbox_place on {s}.unlost_inbox (unit, position);  -- marks go when the log has let go of the event

-- the ledger's list: every event that did not end as done or skipped, one by one
create table {s}.unlost_ledger (
    service text not null, topic text not null, partition integer not null, position bigint not null,
    state text not null check (state in ('retrying', 'parked', 'dead', 'removed', 'abandoned', 'expired')),
    id text not null, since bigint not null,
    primary key (service, topic, partition, position)
);

-- the waiting room: events that must wait, in order per key; `due` wakes the first of a key
create table {s}.unlost_waiting (
    service text not null, topic text not null, partition integer not null, position bigint not null,
    key bytea,
    due bigint,                               -- null: waits for the event before it, or for an operator
    attempt integer not null,                 -- how many attempts have failed
    history text not null,                    -- JSON: the failed attempts
    head bytea not null, data bytea, recorded bigint not null,
    running integer not null default 0,       -- 1: in a handler; 2: alone in one
    primary key (service, topic, partition, position)
);
-- of a key its hash: those of others may be larger than what an index takes
create index unlost_waiting_key on {s}.unlost_waiting (service, topic, partition, sha256(key), position);
create index unlost_waiting_due on {s}.unlost_waiting (due) where due is not null;

-- dead letters stand here until somebody redrives or discards them
create table {s}.unlost_shelf (
    number bigint generated always as identity primary key,
    service text not null, topic text not null, partition integer not null, position bigint not null,
    handler text not null,
    id text not null, source text not null, type text not null, key bytea, trace text,
    reason text not null, error_type text not null, error text not null, stack text not null,
    attempts text not null,                   -- JSON: each with its time and error
    parks integer not null,                   -- 1: the rest of the key waits behind it
    died bigint not null,
    head bytea not null, data bytea, recorded bigint not null,
    request text check (request in ('redrive', 'discard')), operation bigint,
    unique (service, topic, partition, position)
);
create index unlost_shelf_request on {s}.unlost_shelf (service) where request is not null;
create index unlost_shelf_id on {s}.unlost_shelf using hash (id);

-- what operators asked for, and whether it was carried out
create table {s}.unlost_operation (
    number bigint generated always as identity primary key,
    at bigint not null, operator text not null, action text not null, reason text not null,
    service text not null, topic text not null, partition integer not null, position bigint not null,
    id text not null,
    carried_out bigint, result text
);

-- positions of a broker's log that hold no event (any more), one row per range
create table {s}.unlost_gap (
    service text not null, topic text not null, partition integer not null,
    start bigint not null, "end" bigint not null,
    kind text not null check (kind in ('expired', 'unaccountable')), why text not null, since bigint not null,
    declared integer not null default 0,      -- 1: a retention was declared, so an expired event is no surprise
    primary key (service, topic, partition, start)
);

-- events that were accepted in a transaction here, and that the broker has not confirmed yet
create table {s}.unlost_outbox (
    seq bigint generated always as identity primary key,  -- no order of commits: nobody may read on from a number
    shard smallint not null,                  -- which part of the outbox its key is in
    aggregatetype text not null,              -- the topic
    aggregateid text,                         -- the key as text; null: it has none
    id text not null,
    type text not null,
    payload json,                             -- `json` keeps the text as it is, `jsonb` does not
    ce_specversion text not null default '1.0',
    ce_source text not null, ce_time text not null,
    ce_subject text, ce_partitionkey text,
    ce_correlationid text, ce_causationid text, ce_traceparent text, ce_tracestate text,
    ce_unlostversion integer not null default 1,
    contenttype text not null default 'application/json',
    headers json,                             -- of the user
    rawkey bytea,                             -- a key that is no text, as it is; `aggregateid` shows it in hex
    added timestamptz not null default clock_timestamp()
) with (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000);

-- which events of the outbox are in whose hands: numbered before they are sent, gone when they are confirmed
create table {s}.unlost_outbox_status (
    seq bigint primary key,                   -- of unlost_outbox
    shard smallint not null,
    number bigint not null,                   -- counts the events of one shard that were ever sent, without a gap
    claimed timestamptz not null default now(),
    unique (shard, number)
) with (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000);

-- who sends which part of the outbox; the epoch fences whoever slept through its replacement
create table {s}.unlost_relay (
    shard smallint primary key,
    process text, epoch bigint not null default 0,
    next bigint not null default 1,           -- the next number
    confirmed bigint not null default 0       -- how many the broker has confirmed: next - 1 = confirmed + those in hands
) with (fillfactor = 50);
insert into {s}.unlost_relay (shard) select generate_series(0, 15);

-- copies of dead letters on their way to topics that others read
create table {s}.unlost_copy (
    number bigint generated always as identity primary key,
    topic text not null, key bytea, data bytea,
    raw text not null,                        -- JSON: where the letter came from, and the headers of the copy
    added timestamptz not null default now()
);
"""

# What came after a format that has been in use: by the format it came with.
LATER = {
    2: """
-- those of `fated` that a handler has in hand which gets its events at most once: runs, see store/progress.py
alter table {s}.unlost_progress add column begun bytea not null default '';
alter table {s}.unlost_service add column hold text;  -- JSON: paused, retired or renamed by an operator; null: it may work

-- events and commands that are to leave later, see store/delayed.py
create table {s}.unlost_delayed (
    number bigint generated always as identity primary key,
    due bigint not null,                      -- microseconds since 1970
    by_clock integer not null,                -- 1: a time on the wall was named; 0: a span
    source text not null, id text not null,
    topic text not null, key bytea, head bytea not null, data bytea, added bigint not null,
    unique (source, id)
);
create index unlost_delayed_due on {s}.unlost_delayed (by_clock, due);
""",
}

TABLES = (
    "meta", "process", "service", "progress", "epoch", "inbox", "ledger", "waiting", "shelf", "operation", "gap", "outbox",
    "outbox_status", "relay", "copy", "delayed",
)  # fmt: skip
# What a service's role needs besides the tables of its own. A role that only publishes needs PUBLISHES.
RIGHTS = ("select", "insert", "update", "delete")
PUBLISHES = {"meta": "select", "outbox": "insert", "delayed": "insert", "relay": "select", "process": "select"}

GRANTS = """
-- rights of the role that services log in as; it needs no right to create anything
grant usage on schema {s} to {role};
grant select, insert, update, delete on all tables in schema {s} to {role};
-- a role that only publishes (a web process with app.outbox) needs less:
--   grant usage on schema {s} to {role};
--   grant select on {s}.unlost_meta, {s}.unlost_relay, {s}.unlost_process, {s}.unlost_outbox to {role};
--   grant insert on {s}.unlost_outbox, {s}.unlost_delayed to {role};
"""


def quoted(schema: str) -> str:
    return '"' + schema.replace('"', '""') + '"'


def statements(schema: str, found: int) -> list[str]:
    """What brings a schema from format `found` (0: it is not there) to this release's, in one transaction."""
    s = quoted(schema)
    if found > FORMAT:
        raise newer(schema, found)
    wanted = [] if found else [CREATE]
    wanted += [text for n, text in LATER.items() if n > found]
    parts = [f"create schema if not exists {s};"] if not found else []
    parts += [text.format(s=s) for text in wanted]
    if found == 0:
        parts.append(
            f"insert into {s}.unlost_meta values ('format', '{FORMAT}'), ('store_id', gen_random_uuid()::text);"
        )
    elif found < FORMAT:
        parts.append(f"update {s}.unlost_meta set value = '{FORMAT}' where name = 'format';")
    return parts if found < FORMAT else []


def newer(schema: str, found: int) -> UsageError:
    return UsageError(
        "UL1158", f"the tables in the schema {schema!r} are of a newer release of unlost",
        found=f"format {found}, this release knows up to {FORMAT}", fix="pip install -U unlost",
    )  # fmt: skip
