"""The outbox in a service's own SQLite file, through the standard library's sqlite3 and nothing else.

Two SQLite libraries on one file in one process undo each other's locks (sqlite.org/howtocorrupt.html §2.2.1); so the relay
reads this file with the library that the service writes it with. SQLite has one writer, so the order of the rows is that
of the commits.

**Guarantee** a row is numbered and noted in a commit before it is sent, and leaves when the broker has confirmed it.
**After a crash** of the relay (its lock on the file beside the database is let go) the next one sends it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import sqlite3
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from unlost.errors import Bug, Misconfigured, Unavailable, UsageError
from unlost.events import Envelope, decode_head, encode_head
from unlost.events.topic import Unit
from unlost.store.port import Inbox, Known, Lane, OwnPlace, Settlement, Unsent
from unlost.store.session_blocks import Rules, handled_meanwhile
from unlost.store.sessions.port import AnySession
from unlost.store.steps import Steps, one
from unlost.world import REAL

log = logging.getLogger("unlost.outbox")

POLL_SECONDS = 0.02
BUSY_SECONDS = 5.0
SAFE = ((3, 44, 6), (3, 50, 7), (3, 51, 3))  # releases in which the WAL-reset bug is mended (sqlite.org/wal.html)
TABLES = (
    """create table if not exists unlost_outbox (
    seq integer primary key autoincrement,
    id text not null, aggregatetype text not null, aggregateid blob, type text not null, payload blob,
    head blob not null,                     -- CloudEvents attributes, JSON
    added integer not null                  -- microseconds since 1970
)""",
    """create table if not exists unlost_outbox_status (
    seq integer primary key,                -- of unlost_outbox
    number integer not null unique          -- counts the events that were ever sent, without a gap
)""",
    """create table if not exists unlost_outbox_next (number integer not null)""",
    """insert into unlost_outbox_next select 1 where not exists (select 1 from unlost_outbox_next)""",
    """create table if not exists unlost_inbox (
    service text not null, source text not null, id text not null,
    content integer not null,               -- hash of type and data
    topic text not null, partition integer not null, position integer not null,  -- where the event stood
    primary key (service, source, id)
) without rowid""",
)
_LAST = "select 1 from sqlite_master where type = 'table' and name = 'unlost_inbox'"
# A write that changes nothing takes the file's lock, and waits for it. Whoever has read before may be refused at once.
_LOCK = "delete from unlost_inbox where 0"


def _make_ready() -> Steps[None]:
    """The lock is this transaction's, and the tables are there: a rollback takes back those that were made."""
    try:
        yield _LOCK, ()
    except Exception as e:  # of whichever library
        if "no such table" not in str(e):
            raise
        for statement in TABLES:
            yield statement, ()


_PUT = "insert into unlost_outbox (id, aggregatetype, aggregateid, type, payload, head, added) values (?, ?, ?, ?, ?, ?, ?)"


class OwnSqlite:
    """One such file: the side of those who publish."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            UsageError: the file is one of ours, or cannot be used.
        """
        self.path = path.resolve()
        self._looked = False

    @property
    def ready(self) -> bool:
        return self._looked

    def prepare(self) -> None:
        """Looks whether it is a database, and a safe one, the first time. Blocks."""
        if self._looked:
            return
        try:
            with contextlib.closing(connect(self.path, busy_seconds=0)) as connection:
                mode = connection.execute("pragma journal_mode").fetchone()[0]
        except Unavailable as e:
            if isinstance(e.__cause__, sqlite3.Error) and e.__cause__.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY:
                return  # perhaps by the very transaction that the events are for: another time
            raise
        if mode == "wal" and not _is_safe():
            log.warning(
                "UL1259: SQLite %s, which this Python has, can lose commits of a WAL file that several connections use "
                "(mended in 3.51.3). Set `pragma journal_mode = delete` on %s, or use a newer Python",
                sqlite3.sqlite_version, self.path,
            )  # fmt: skip
        self._looked = True

    def put(self, envelopes: Sequence[Envelope]) -> Steps[None]:
        _check_not_delayed(envelopes)
        yield from _make_ready()
        now = REAL.now()
        for e in envelopes:
            yield _PUT, (e.id, e.topic, e.key, e.type, e.data, encode_head(e), now)

    def woken_after(self, session: AnySession) -> None:
        """The relay looks often enough: looking costs it nothing."""

    def close(self) -> None:
        """It keeps nothing open."""

    def rules(self) -> OwnRules:
        return OwnRules(self)


class OwnRules:
    """A handler's transaction in this file: the mark and the events are in it; position and books are in the store."""

    def __init__(self, place: OwnSqlite) -> None:
        self._place = place

    def text(self, sql: str) -> str:
        return sql

    def enter(self, unit: Unit, epoch: int, inbox: Inbox | None) -> Steps[Known | None]:
        yield from _make_ready()
        if inbox is None:
            return None
        row = yield from one(
            "select content, topic, partition, position from unlost_inbox where service = ? and source = ? and id = ?",
            (unit.service, inbox.source, inbox.id),
        )
        return None if row is None else Known(row[0], (row[1], row[2], row[3]))

    def finish(self, settlement: Settlement) -> Steps[None]:
        """The mark is unique: of two owners of one unit, of which one has slept, only one commits."""
        unit = settlement.unit
        (o,) = settlement.outcomes
        if o.inbox is not None:
            mark = o.inbox
            found = yield (
                "insert into unlost_inbox values (?, ?, ?, ?, ?, ?, ?) on conflict do nothing returning 1",
                (unit.service, mark.source, mark.id, mark.content, unit.topic, unit.partition, o.arrival.position),
            )
            if not found:
                raise handled_meanwhile(f"{unit}:{o.arrival.position}")
        yield from self._place.put(o.publishes)

    def meaning(self, error: Exception) -> Exception | None:
        return None


def own_rules(session: AnySession, places: Mapping[str, OwnPlace]) -> Rules:
    """The rules of the user's own file that this session is on.

    Raises:
        Misconfigured: it is a database that takes no part in this App.
    """
    if session.dialect == "sqlite" and not session.is_async:
        place = places.get(str(Path(session.place()).resolve()))
        if place is not None:
            rules: Rules = place.rules()
            return rules
    raise Misconfigured(
        "UL1220", "ctx.transaction(session) needs a session in the store's database, or in a SQLite file that the App knows",
        found=f"a {session.dialect} session ({session.library}); known: {', '.join(places) or 'none'}",
        fix="UNLOST_STORE=postgresql://… for data in PostgreSQL; App(outboxes=['sqlite:///path/shop.db']) for a SQLite file of "
        "your own; or ctx.transaction() without an argument",
    )  # fmt: skip


def _is_safe() -> bool:
    found = sqlite3.sqlite_version_info
    return found >= SAFE[-1] or any(found[:2] == safe[:2] and found >= safe for safe in SAFE)


def connect(path: Path, busy_seconds: float = BUSY_SECONDS) -> sqlite3.Connection:
    """A connection of ours to a file of the user's.

    Raises:
        UsageError: it is no database. Unavailable: it cannot be opened now.
    """
    try:
        connection = sqlite3.connect(path, timeout=busy_seconds, isolation_level=None, check_same_thread=False)
        connection.execute("pragma synchronous = full")
        connection.execute("select count(*) from sqlite_master").fetchone()
    except sqlite3.DatabaseError as e:
        if "not a database" in str(e):
            raise UsageError("UL1260", f"{path} is no SQLite database", found=str(e), fix="name another file") from e
        raise Unavailable(
            "UL2016", "your SQLite file cannot be opened", found=f"{path}: {e}", fix="is the folder there, and may it be written?"
        ) from e  # fmt: skip
    return connection


class OwnSqliteOutbox:
    """The side of the relay. One process at a time has it: by the kernel's lock on a file beside the database."""

    def __init__(self, place: OwnSqlite) -> None:
        self._path = place.path
        self._connection = connect(place.path)
        self._lock_fd = -1
        self._version = -1
        self._confirmed: list[int] = []

    async def claim(self) -> bool:
        if self._lock_fd < 0:
            path = self._path.with_name(f"{self._path.name}.relay")
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                return False
            self._lock_fd = fd
        return True

    async def next(self, held: Collection[Lane], limit: int) -> Sequence[Unsent]:
        return await asyncio.to_thread(self._next, held, limit)

    def _next(self, held: Collection[Lane], limit: int) -> list[Unsent]:
        try:
            if self._confirmed:
                self._in_one(self._confirm)
            if self._connection.execute(_LAST).fetchone() is None:
                return []  # nobody has published here yet
            after, chosen = 0, list[Unsent]()
            while not chosen:
                rows = self._page(after, limit)
                if not rows:
                    return []
                after = rows[-1].number
                chosen = [row for row in rows if row.lane not in held]
            self._in_one(lambda: self._number(chosen))
            return chosen
        except sqlite3.Error as e:
            raise Unavailable(
                "UL2016", "your SQLite file cannot be written now", found=f"{self._path}: {e}", fix="it is tried again"
            ) from e  # fmt: skip

    def _page(self, after: int, limit: int) -> list[Unsent]:
        rows = self._connection.execute(
            "select seq, aggregatetype, aggregateid, payload, head from unlost_outbox where seq > ? order by seq limit ?",
            (after, limit),
        ).fetchall()
        return [
            Unsent(number=seq, envelope=decode_head(head, topic=topic, key=key, data=data))
            for seq, topic, key, data, head in rows
        ]

    def _number(self, rows: Sequence[Unsent]) -> None:
        execute = self._connection.execute
        known = {
            seq for (seq,) in execute("select seq from unlost_outbox_status where seq <= ?", (rows[-1].number,)).fetchall()
        }  # fmt: skip
        fresh = [row.number for row in rows if row.number not in known]
        (number,) = execute("select number from unlost_outbox_next").fetchone()
        self._connection.executemany(
            "insert into unlost_outbox_status values (?, ?)", [(seq, number + n) for n, seq in enumerate(fresh)]
        )
        execute("update unlost_outbox_next set number = ?", (number + len(fresh),))

    def _confirm(self) -> None:
        numbers = [(n,) for n in self._confirmed]
        gone = self._connection.executemany("delete from unlost_outbox_status where seq = ?", numbers).rowcount
        if gone != len(numbers):
            raise Bug("UL9001", "what was sent had been numbered", found=f"{gone} of {len(numbers)}")
        self._connection.executemany("delete from unlost_outbox where seq = ?", numbers)

    def _in_one(self, work: Any) -> None:
        self._connection.execute("begin immediate")
        try:
            work()
            self._connection.execute("commit")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("rollback")
            raise
        if work == self._confirm:
            self._confirmed.clear()

    async def sent(self, numbers: Sequence[int]) -> None:
        self._confirmed.extend(numbers)

    async def wait(self, seconds: float) -> None:
        """Until somebody has committed: SQLite counts that, and asking costs a few microseconds."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while loop.time() < end:
            (version,) = self._connection.execute("pragma data_version").fetchone()
            if version != self._version:
                self._version = version
                return
            await asyncio.sleep(POLL_SECONDS)

    async def give(self) -> None:
        if self._confirmed:
            await asyncio.to_thread(self._in_one, self._confirm)
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    async def close(self) -> None:
        self._connection.close()


def _check_not_delayed(envelopes: Sequence[Envelope]) -> None:
    if any(e.due is not None for e in envelopes):
        raise UsageError(
            "UL1284", "an outbox in a SQLite file of your own lacks the ability to delay events", found=f"{envelopes[0].type}",
            fix="use `await app.publish(…, delay=…)` or ctx.publish in a handler without a session; or keep your data in the "
            "store's database",
        )  # fmt: skip
