"""The tables of the file, and its format version. One place; everything else only reads and writes rows.

All names start with `unlost_`, so that a service may keep its own tables in the same file
(that is what makes "my rows, my events and my progress in one commit" possible).

A log row's address `at` is `number << 40 | position`, where `number` counts partitions over all topics:
one b-tree, appended at one place per partition, and a range scan is a partition's log in order.
"""

from __future__ import annotations

APPLICATION_ID = 0x554E4C53  # "UNLS"
FORMAT = 4
POSITION_BITS = 40
POSITION_MAX = (1 << POSITION_BITS) - 1

BASE = """
create table unlost_meta (
    name text primary key,
    value text not null
) without rowid;

-- one row: how many groups have been committed. The marks file beside this one must never be ahead of it.
create table unlost_commit (n integer not null);

create table unlost_process (
    id text primary key,
    slot integer not null unique,           -- its place in the marks file
    pid integer not null, host text not null, boot text not null, started integer not null
) without rowid;

create table unlost_topic (
    name text primary key,
    id text not null unique,
    first_number integer not null unique,   -- its partitions are first_number .. first_number + partitions - 1
    partitions integer not null check (partitions between 1 and 1024),
    retention integer,                      -- seconds, null: keep everything
    created integer not null
) without rowid;

create table unlost_log (
    at integer primary key,
    head blob not null,                     -- CloudEvents attributes, JSON
    key blob, data blob,
    recorded integer not null,              -- microseconds since 1970
    digest integer not null,                -- XOR of the event hashes of this partition up to and with this row
    crc integer not null
);

create table unlost_service (
    name text primary key,
    policy text not null,                   -- JSON: what other releases of this service must agree with
    created integer not null
) without rowid;

-- which processes take part in a service, and which partitions each of them has (the embedded broker's groups)
create table unlost_member (
    service text not null, topic text not null, process text not null, joined integer not null,
    primary key (service, topic, process)
) without rowid;
create table unlost_assignment (
    service text not null, topic text not null, partition integer not null,
    process text,
    primary key (service, topic, partition)
) without rowid;

-- the unit of progress
create table unlost_progress (
    service text not null, topic text not null, partition integer not null,
    topic_id text not null,
    start integer not null,                 -- pinned when the service first saw the topic
    start_digest integer not null,          -- the log's digest of all before it
    owner text, epoch integer not null default 0,
    clean integer not null default 1,       -- 0 while somebody owns it: a takeover then follows a crash
    position integer not null,              -- everything below has an outcome
    fated blob not null,                    -- runs of positions that have an outcome, see store/progress.py
    counts text not null,                   -- JSON: how many ended as done and as skipped, by rule
    digest integer not null,                -- XOR of the event hashes of everything fated
    attempts text not null default '{}',    -- JSON: failed attempts of events that are retried in memory
    primary key (service, topic, partition)
) without rowid;
create index unlost_progress_owner on unlost_progress (owner);

-- who owned a unit of progress, when: where a missing event was last seen
create table unlost_epoch (
    service text not null, topic text not null, partition integer not null, epoch integer not null,
    process text not null, pid integer not null, taken integer not null, position integer not null,
    unclean integer not null,
    primary key (service, topic, partition, epoch)
) without rowid;

create table unlost_inbox (  -- kept as long as the log holds the event
    service text not null, id text not null, source text not null,
    content integer not null,               -- hash of type and data: the same id with another content is no duplicate
    primary key (service, id, source)
) without rowid;

-- the ledger's list: every event that did not end as done or skipped, one by one
create table unlost_ledger (
    service text not null, topic text not null, partition integer not null, position integer not null,
    state text not null check (state in ('retrying', 'parked', 'dead', 'removed', 'abandoned', 'expired')),
    id text not null, since integer not null,
    primary key (service, topic, partition, position)
) without rowid;

-- the waiting room: events that must wait, in order per key; `due` wakes the first of a key
create table unlost_waiting (
    service text not null, topic text not null, partition integer not null, position integer not null,
    key blob,
    due integer,                            -- null: waits for the event before it, or for an operator
    attempt integer not null,               -- how many attempts have failed
    history text not null,                  -- JSON: the failed attempts
    head blob not null, data blob, recorded integer not null,
    primary key (service, topic, partition, position)
) without rowid;
create index unlost_waiting_key on unlost_waiting (service, topic, partition, key, position);
create index unlost_waiting_due on unlost_waiting (due) where due is not null;

-- dead letters stand here until somebody redrives or discards them
create table unlost_shelf (
    number integer primary key autoincrement,
    service text not null, topic text not null, partition integer not null, position integer not null,
    handler text not null,
    id text not null, source text not null, type text not null, key blob, trace text,
    reason text not null, error_type text not null, error text not null, stack text not null,
    attempts text not null,                 -- JSON: each with its time and error
    parks integer not null,                 -- 1: the rest of the key waits behind it
    died integer not null,
    head blob not null, data blob, recorded integer not null,
    request text check (request in ('redrive', 'discard')), operation integer,
    unique (service, topic, partition, position)
);
create index unlost_shelf_request on unlost_shelf (service) where request is not null;
create index unlost_shelf_id on unlost_shelf (id);

-- what operators asked for, and whether it was carried out
create table unlost_operation (
    number integer primary key autoincrement,
    at integer not null, operator text not null, action text not null, reason text not null,
    service text not null, topic text not null, partition integer not null, position integer not null,
    id text not null,
    carried_out integer, result text
);
"""

# What came after a format that has been in use: by the format it came with.
LATER = {
    2: """
-- positions of another broker's log that hold no event (any more), one row per range
create table unlost_gap (
    service text not null, topic text not null, partition integer not null,
    start integer not null, "end" integer not null,
    kind text not null check (kind in ('expired', 'unaccountable')), why text not null, since integer not null,
    declared integer not null default 0,    -- 1: a retention was declared, so an expired event is no surprise
    primary key (service, topic, partition, start)
) without rowid;

-- events that were accepted here, and that the broker has not confirmed yet: in the order of their commits
create table unlost_outbox (
    number integer primary key autoincrement,
    topic text not null, key blob, head blob not null, data blob,
    raw text,                               -- JSON: not an event, but a mirrored dead letter: its origin and headers
    added integer not null
);
create index unlost_outbox_raw on unlost_outbox (number) where raw is not null;

-- which process empties the outbox: one row
create table unlost_relay (process text);
insert into unlost_relay values (null);
""",
    3: """
-- services whose progress is kept in a store elsewhere: how far they are, and what says which store that is
create table unlost_follower (
    service text not null, topic text not null, partition integer not null,
    position integer not null, note text not null,
    primary key (service, topic, partition)
) without rowid;
""",
    4: """
-- those of `fated` that a handler has in hand which gets its events at most once: runs, see store/progress.py
alter table unlost_progress add column begun blob not null default x'';
alter table unlost_service add column hold text;  -- JSON: paused, retired or renamed by an operator; null: it may work

-- events and commands that are to leave later, see store/delayed.py
create table unlost_delayed (
    number integer primary key autoincrement,
    due integer not null,                   -- microseconds since 1970
    by_clock integer not null,              -- 1: a time on the wall was named; 0: a span
    source text not null, id text not null,
    topic text not null, key blob, head blob not null, data blob, added integer not null,
    unique (source, id)
);
create index unlost_delayed_due on unlost_delayed (by_clock, due);
""",
}
TABLES = BASE + "".join(LATER.values())
RETIRED = "select name from unlost_service where json_extract(hold, '$.state') = 'retired'"  # they hold nothing back
