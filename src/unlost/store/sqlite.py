"""The store in the embedded file: outcomes, inbox, waiting room, shelf, ledger, epochs.

Every function that writes takes the open `Transaction`, so that whatever belongs together is one commit.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import apsw
import msgspec

from unlost.audit import BEGUN
from unlost.errors import Fenced, UnlostError, UsageError, invariant
from unlost.events import Envelope, decode_head, event_hash
from unlost.events.topic import Arrival, Gap, TopicInfo, Unit
from unlost.sqlite import turn
from unlost.sqlite.file import File
from unlost.sqlite.process import ProcessFile, Remains, examine, service_hash
from unlost.sqlite.schema import POSITION_BITS, POSITION_MAX
from unlost.sqlite.transaction import Transaction
from unlost.store import delayed, port, queues, services, shelf
from unlost.store.outbox import SqliteCopies, SqliteOutbox, put_raw
from unlost.store.own_sqlite import own_rules
from unlost.store.port import (
    LISTED,
    Attempt,
    Block,
    Death,
    Inbox,
    Known,
    Mirrored,
    Outcome,
    Request,
    Settlement,
    Snapshot,
    SyncBlock,
    Taken,
    Waiting,
    counted_as,
)
from unlost.store.progress import Progress, Runs
from unlost.store.session_blocks import SessionBlock, SyncSessionBlock
from unlost.store.sessions.connect import of
from unlost.store.steps import Steps, run
from unlost.world import rfc3339

T = TypeVar("T")
_json = msgspec.json
_decode_counts = msgspec.json.Decoder(dict[str, int]).decode
_decode_attempts = msgspec.json.Decoder(list[Attempt]).decode
_decode_attempt_map = msgspec.json.Decoder(dict[int, list[Attempt]]).decode

_NUMBER_BITS = 31
_NUMBER_MASK = (1 << _NUMBER_BITS) - 1
EPOCHS_KEPT = 1000  # of one unit; older owners are forgotten
BLOCK_SECONDS = 0.25  # how long a handler's transaction may hold the file

Publish = Callable[[Transaction, Sequence[Envelope]], object]
Mirror = Callable[[Unit, Outcome], Mirrored | None]


class SqliteStore:
    """A store in one SQLite file. `publish` puts a handler's events where its broker takes them from, in the
    same commit: with the embedded broker that is the log itself."""

    sees_hands = True

    def __init__(self, file: File, publish: Publish, *, broker: str = "", mirror: Mirror | None = None) -> None:
        """`broker` is the identity of a broker that keeps its log elsewhere; empty: the log is in this file.
        `mirror` makes the copy of a dead letter that goes to a topic as well."""
        self.file = file
        self._publish = publish
        self._elsewhere = broker
        self._mirror = mirror
        self.own: dict[str, port.OwnPlace] = {}

    @property
    def id(self) -> str:
        return self.file.store_id

    @property
    def place(self) -> str:
        return f"{self.file.path}{' (made just now)' if self.file.created else ''}"

    @property
    def broken(self) -> UnlostError | None:
        return self.file.broken

    @property
    def on_broken(self) -> Callable[[UnlostError], None] | None:
        return self.file.on_broken

    @on_broken.setter
    def on_broken(self, tell: Callable[[UnlostError], None] | None) -> None:
        self.file.on_broken = tell

    async def open(self) -> None:
        return None

    async def close(self) -> None:
        """The file belongs to whoever opened it."""

    async def prepare(self, schema: str) -> None:
        await self.file.write(lambda tx: _apply_schema(self.file, tx, schema))

    # --- services and ownership --------------------------------------------------------------------------

    async def service_of(self, queue: str) -> str | None:
        return self._look(queues.service_of(queue))

    async def register(self, service: str, policy: dict[str, Any], topics: Sequence[TopicInfo]) -> None:
        text = _json.encode(policy, order="sorted").decode()

        def work(tx: Transaction) -> None:
            _check_broker(tx, self._elsewhere)
            if tx.one("select 1 from unlost_follower where service = ? limit 1", (service,)) is not None:
                raise _progress_elsewhere(service, "in another store")
            if run(services.ended(service), tx.rows):
                return
            run(queues.claim(service, policy.get("queues", ())), tx.rows)
            row = tx.one("select policy from unlost_service where name = ?", (service,))
            if row is None:
                sql = "insert into unlost_service (name, policy, created) values (?, ?, ?)"
                tx.execute(sql, (service, text, tx.world.now()))
            elif row[0] != text:
                _check_policy(tx, self.file.run_folder, service, _json.decode(row[0]), policy)
                tx.execute("update unlost_service set policy = ? where name = ?", (text, service))
            for topic in topics:
                if self._elsewhere:
                    _know(tx, service, topic)
                _pin(tx, service, topic, log_here=not self._elsewhere)

        await self.file.write(work)

    async def take(self, units: Sequence[Unit]) -> Sequence[Taken]:
        owner = self.file.process_id
        remains: dict[str, Remains] = {}

        def look(process: str) -> Remains:
            if process not in remains:
                remains[process] = examine(self.file.run_folder, process)
            return remains[process]

        def work(tx: Transaction) -> list[Taken]:
            run(services.admit({unit.service for unit in units}), tx.rows)
            return [_take(tx, unit, owner, look) for unit in units]

        return await self.file.write(work)

    async def give(self, units: Sequence[tuple[Unit, int]]) -> None:
        def work(tx: Transaction) -> None:
            for unit, epoch in units:
                tx.execute(
                    "update unlost_progress set owner = null, clean = 1 "
                    "where service = ? and topic = ? and partition = ? and epoch = ?",
                    (*unit, epoch),
                )

        await self.file.write(work)

    # --- later -------------------------------------------------------------------------------------------

    async def delay(self, envelopes: Sequence[Envelope]) -> None:
        await self.file.write(lambda tx: run(delayed.put(envelopes, tx.world.now()), tx.rows))

    async def cancel(self, id: str, source: str) -> bool:
        return await self.file.write(lambda tx: run(delayed.cancel(id, source, tx.world.now()), tx.rows))

    async def next_due(self) -> int | None:
        world = self.file.world
        return self._look(delayed.next_due(world.steady(), world.now()))

    async def release(self) -> int:
        def work(tx: Transaction) -> int:
            found = run(delayed.take_due(tx.world.steady(), tx.world.now()), tx.rows)
            if found:
                self._publish(tx, found)
            return len(found)

        return await self.file.write(work)

    # --- settling ----------------------------------------------------------------------------------------

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Unit]:
        def work(tx: Transaction) -> list[Unit]:
            fenced = []
            for settlement in settlements:
                try:
                    self.settle_in(tx, settlement)
                except Fenced:
                    fenced.append(settlement.unit)
            return fenced

        return await self.file.write(work)

    def settle_in(self, tx: Transaction, settlement: Settlement) -> None:
        """Makes outcomes part of an open commit.

        Raises:
            Fenced: a newer owner has the unit; nothing was written.
        """
        unit = settlement.unit
        progress = _load(tx, unit, settlement.epoch)
        attempts: dict[int, Sequence[Attempt] | None] = {}
        for outcome in settlement.outcomes:
            self._settle_one(tx, unit, progress, outcome, attempts)
        if settlement.done:
            progress.settle_done(list(settlement.done), settlement.done_digest)
        if settlement.ended:
            progress.end(list(settlement.ended), "done")
        if settlement.begun:
            progress.begin(list(settlement.begun), settlement.begun_digest)
        for gap in settlement.gaps:
            _pass_over(tx, unit, progress, gap)
        _save(tx, unit, progress, attempts)

    def _settle_one(
        self,
        tx: Transaction,
        unit: Unit,
        progress: Progress,
        o: Outcome,
        attempts: dict[int, Sequence[Attempt] | None],
    ) -> None:
        """The consequence of one outcome, then its place in the books."""
        position = o.arrival.position
        if o.state == "attempted":
            attempts[position] = o.attempts
            return
        if not (o.waited or o.begun) and position in progress.fated:
            invariant(False, f"{unit}:{position} is settled twice")
        if o.waited and not o.begun:
            invariant(_waits(tx, unit, position), f"{unit}:{position} is settled twice: it does not wait any more")
        if o.inbox is not None and not _enter_inbox(tx, unit.service, o.inbox):
            _as_repeated(tx, unit.service, o, o.inbox)
        if o.publishes:
            self._publish_or_delay(tx, o.publishes)
        if o.state == "dead":
            _shelve(tx, unit, o)
            copy = self._mirror(unit, o) if self._mirror is not None else None
            if copy is not None:
                put_raw(tx, copy)
        elif o.state in ("retrying", "parked"):
            _wait(tx, unit, o)
        listed, counted = o.state in LISTED, counted_as(o)
        if o.begun:
            progress.end([position], counted)
        elif o.waited:
            if o.state not in ("retrying", "parked"):
                tx.execute(
                    "delete from unlost_waiting where service = ? and topic = ? and partition = ? and position = ?",
                    (*unit, position),
                )
            if o.state == BEGUN:
                progress.begin_again(position)
            elif counted is not None:
                progress.count(counted, 1)
            if counted is not None:
                tx.execute(
                    "delete from unlost_ledger where service = ? and topic = ? and partition = ? and position = ?",
                    (*unit, position),
                )
                invariant(tx.connection.changes() == 1, f"{unit}:{position} waited, but the ledger did not list it")
        else:
            progress.settle(position, o.event_hash, counted)
            attempts[position] = None
        if listed:
            tx.execute(
                "insert into unlost_ledger values (?, ?, ?, ?, ?, ?, ?) "
                "on conflict do update set state = excluded.state, since = excluded.since",
                (
                    *unit,
                    position,
                    o.state,
                    o.arrival.envelope.id if o.arrival.envelope else "",
                    tx.world.now(),
                ),
            )

    def _publish_or_delay(self, tx: Transaction, envelopes: Sequence[Envelope]) -> None:
        now = [e for e in envelopes if e.due is None]
        if now:
            self._publish(tx, now)
        if len(now) < len(envelopes):
            run(delayed.put([e for e in envelopes if e.due is not None], tx.world.now()), tx.rows)

    # --- a handler's transaction -------------------------------------------------------------------------

    def block(self, session: object = None, deadline_seconds: float | None = None) -> Block:
        if session is not None:
            found = of(session)
            return SessionBlock(found, own_rules(found, self.own), lambda: None)
        return FileBlock(self, deadline_seconds or BLOCK_SECONDS)

    def sync_block(self, session: object = None, deadline_seconds: float | None = None) -> SyncBlock:
        if session is not None:
            found = of(session)
            return SyncSessionBlock(found, own_rules(found, self.own), lambda: None)
        return SyncFileBlock(self, deadline_seconds or BLOCK_SECONDS)

    def hands(self) -> port.Hands:
        return _Hands(self.file.process_file)

    async def starting(self, taken: Taken, position: int, waited: bool, alone: bool) -> None:
        """The process' own file knows already."""

    # --- the outbox --------------------------------------------------------------------------------------

    def outbox(self) -> SqliteOutbox | None:
        return SqliteOutbox(self.file) if self._elsewhere else None

    def copies(self) -> SqliteCopies | None:
        return SqliteCopies(self.file) if self._elsewhere else None

    # --- reading -----------------------------------------------------------------------------------------

    async def seen(self, service: str, events: Iterable[Inbox]) -> dict[tuple[str, str], Known]:
        wanted = [e.id for e in events]
        if not wanted:
            return {}
        marks = ",".join("?" * len(wanted))
        sql = f"select source, id, content from unlost_inbox where service = ? and id in ({marks})"
        rows = self.file.read(lambda c: c.execute(sql, (service, *wanted)).fetchall())
        return {(source, id): Known(content) for source, id, content in rows}

    async def waiting(self, unit: Unit, key: bytes | None, position: int | None, limit: int) -> Sequence[Waiting]:
        where, bindings = ("key = ?", key) if key is not None else ("position = ? and key is null", position)
        sql = (
            "select position, head, key, data, recorded, due, history from unlost_waiting "
            f"where service = ? and topic = ? and partition = ? and {where} order by position limit ?"
        )
        rows = self.file.read(lambda c: c.execute(sql, (*unit, bindings, limit)).fetchall())
        return [
            Waiting(
                arrival=stored_arrival(unit.topic, at, head, key, data, recorded),
                due=due,
                attempts=_decode_attempts(history),
            )
            for at, head, key, data, recorded, due, history in rows
        ]

    async def held(self, service: str) -> port.Hold | None:
        return self._look(services.held(service))

    def _look(self, steps: Steps[T]) -> T:
        return self.file.read(lambda c: run(steps, lambda sql, b: c.execute(sql, b).fetchall()))

    async def requests(self, service: str) -> Sequence[Request]:
        rows = self.file.read(
            lambda c: c.execute(
                "select topic, partition, position, key, request from unlost_shelf "
                "where service = ? and request is not null order by topic, partition, position",
                (service,),
            ).fetchall()
        )
        return [Request(Unit(service, t, p), position, key, action) for t, p, position, key, action in rows]

    def received(self, taken: Taken, position: int) -> None:
        self.file.process_file.read_up_to(taken.address >> _NUMBER_BITS, taken.address & _NUMBER_MASK, position)

    async def progress(self, units: Sequence[Unit]) -> Sequence[Snapshot]:
        sql = (
            "select topic_id, (select count(*) from unlost_progress b where b.service = a.service and b.topic = a.topic), "
            "position, fated, counts, digest from unlost_progress a where service = ? and topic = ? and partition = ?"
        )
        rows = self.file.read(lambda c: [(unit, c.execute(sql, unit).fetchone()) for unit in units])
        return [
            Snapshot(
                unit=unit, topic_id=row[0], partitions=row[1], position=row[2], fated=Runs.decode(row[3]),
                counts=_decode_counts(row[4]), digest=row[5],
            )
            for unit, row in rows
            if row is not None
        ]  # fmt: skip

    async def keep_house(self, starts: Mapping[tuple[str, int], int], resends: Mapping[str, float]) -> None:
        """With the log in this file, its trimming takes the marks along; beside another broker they are kept."""

    async def carry_out(self, request: Request, epoch: int) -> port.CarriedOut:
        def work(tx: Transaction) -> port.CarriedOut:
            _load(tx, request.unit, epoch)
            return run(shelf.carry_out(request, tx.world.now()), tx.rows)

        return await self.file.write(work)


class FileBlock:
    """A block that has its turn in the writer's open commit (see `sqlite/turn.py`)."""

    settles = True

    def __init__(self, store: SqliteStore, deadline_seconds: float) -> None:
        self._store = store
        loop = asyncio.get_running_loop()
        self._opened: asyncio.Future[None] = loop.create_future()
        self._committed: asyncio.Future[None] = loop.create_future()
        self._block = turn.Block(_teller(loop, self._opened), _teller(loop, self._committed), deadline_seconds)

    async def begin(self, unit: Unit, epoch: int, inbox: Inbox | None, looked: bool = False) -> Known | None:
        self._store.file.submit_block(self._block)
        try:
            await self._opened
            known: Known | None = self._block.run(lambda tx: _enter(tx, unit, epoch, inbox))
            return known
        except BaseException:
            self._block.abort()
            raise

    async def execute(self, sql: str, bindings: Any = ()) -> list[tuple[Any, ...]]:
        return self._block.execute(sql, bindings)

    async def finish(self, settlement: Settlement) -> None:
        try:
            self._block.finish(lambda tx: self._store.settle_in(tx, settlement))
        except BaseException as e:
            _set(self._committed, e)
            raise
        await asyncio.shield(self._committed)

    async def settled(self) -> BaseException | None:
        try:
            await asyncio.shield(self._committed)
        except asyncio.CancelledError:
            raise
        except BaseException as e:
            return e
        return None

    async def abort(self) -> None:
        self._block.abort()

    def is_transient(self, error: BaseException) -> bool:
        return False  # what the writer has to say comes in our own words


class SyncFileBlock:
    """The same, from a thread."""

    settles = True

    def __init__(self, store: SqliteStore, deadline_seconds: float) -> None:
        self._store = store
        self._opened = threading.Event()
        self._committed = threading.Event()
        self._refused: BaseException | None = None
        self._failed: BaseException | None = None
        self._block = turn.Block(self._wake, self._end, deadline_seconds)

    def _wake(self, error: BaseException | None) -> None:
        self._refused = error
        self._opened.set()

    def _end(self, error: BaseException | None) -> None:
        self._failed = error
        self._committed.set()

    def begin(self, unit: Unit, epoch: int, inbox: Inbox | None, looked: bool = False) -> Known | None:
        self._store.file.submit_block(self._block)
        self._opened.wait()
        if self._refused is not None:
            raise self._refused
        try:
            known: Known | None = self._block.run(lambda tx: _enter(tx, unit, epoch, inbox))
            return known
        except BaseException:
            self._block.abort()
            raise

    def execute(self, sql: str, bindings: Any = ()) -> list[tuple[Any, ...]]:
        return self._block.execute(sql, bindings)

    def finish(self, settlement: Settlement) -> None:
        try:
            self._block.finish(lambda tx: self._store.settle_in(tx, settlement))
        except BaseException as e:
            self._end(e)
            raise
        failed = self.settled()
        if failed is not None:
            raise failed

    def settled(self) -> BaseException | None:
        self._committed.wait()
        return self._failed

    def abort(self) -> None:
        self._block.abort()

    def is_transient(self, error: BaseException) -> bool:
        return False


def _teller(loop: asyncio.AbstractEventLoop, future: asyncio.Future[None]) -> Callable[[BaseException | None], None]:
    """Tells a future of the event loop, from any thread."""
    return lambda error: _ignore(loop.call_soon_threadsafe(_set, future, error))


def _ignore(_handle: object) -> None:
    return None


def _set(future: asyncio.Future[None], error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
        future.exception()  # seen: whoever asks gets it, and nobody has to


class _Hands:
    """One cell of this process' own file."""

    def __init__(self, file: ProcessFile) -> None:
        self._file = file
        self._cell = file.take_cell()
        self.take_up = partial(file.started, self._cell)
        self.put_down = partial(file.clear, self._cell)

    def close(self) -> None:
        self._file.give_cell(self._cell)
        self.take_up = partial(self._file.started, -1)
        self.put_down = partial(self._file.clear, -1)


# --- the parts, each inside the caller's commit --------------------------------------------------------------


def stored_arrival(
    topic: str, position: int, head: bytes, key: bytes | None, data: bytes | None, recorded: int
) -> Arrival:
    """An arrival from stored columns; bytes that are no event keep their place and say why."""
    try:
        return Arrival(
            position,
            decode_head(head, topic=topic, key=key, data=data, recordedtime=rfc3339(recorded)),
            recorded,
            head,
            key,
            data,
        )
    except Exception as e:
        return Arrival(position, None, recorded, head, key, data, str(e))


def _check_policy(tx: Transaction, processes: Path, service: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Old and new releases of a service may run side by side, but not with another order policy."""
    if old["on_dead"] == new["on_dead"]:
        return
    running = [
        row[0]
        for row in tx.execute(
            "select distinct owner from unlost_progress where service = ? and owner is not null", (service,)
        )
        if examine(processes, row[0]).alive  # a dead one left its name behind
    ]
    if running:
        raise UsageError(
            "UL1131", f"the service {service!r} is running with on_dead={old['on_dead']!r}",
            found=f"this release says on_dead={new['on_dead']!r}",
            fix="stop the old release first: both at once would break the order of keys",
        )  # fmt: skip


def _check_broker(tx: Transaction, identity: str) -> None:
    """Positions saved with one broker mean nothing on another: a store belongs to one, for good."""
    row = tx.one("select value from unlost_meta where name = 'broker'")
    if row is not None:
        known = row[0]
    elif not identity:
        return
    elif tx.one("select 1 from unlost_progress limit 1") is not None:
        known = ""
    else:
        tx.execute("insert into unlost_meta values ('broker', ?)", (identity,))
        return
    if known != identity:
        raise UsageError(
            "UL1133", "this store belongs to another broker", found=f"it was used with {known or 'the embedded broker'}, this is "
            f"{identity or 'the embedded broker'}",
            fix="give each broker its own store (UNLOST_STORE=embedded:///path/store.db), or go back to the broker it was used with",
        )  # fmt: skip


def _progress_elsewhere(service: str, where: str) -> UsageError:
    """A service's progress is kept in one place, for good: with another store it would handle everything again."""
    return UsageError(
        "UL1135", f"the progress of {service!r} is kept {where}", found="another UNLOST_STORE than the service began with",
        fix="go back to it; or give the service another name, and it begins anew with all that the log holds",
    )  # fmt: skip


def _know(tx: Transaction, service: str, topic: TopicInfo) -> None:
    """A topic of a log elsewhere gets its numbers here. One that was made again takes the place of one that no
    service has positions on."""
    row = tx.one("select id, partitions from unlost_topic where name = ?", (topic.name,))
    if row is not None and row != (topic.id, topic.partitions):
        if tx.one("select 1 from unlost_progress where topic = ?", (topic.name,)) is not None:
            rows = tx.one("select count(*) from unlost_progress where topic = ? and service = ?", (topic.name, service))
            raise _another_topic(service, topic, rows[0] or row[1], row[0])
        tx.execute("delete from unlost_topic where name = ?", (topic.name,))
        tx.forget_topics()
        row = None
    if row is None:
        tx.create_topic(
            topic.name, topic.partitions, None if topic.retention is None else int(topic.retention), topic.id
        )


def _another_topic(service: str, topic: TopicInfo, partitions: int, id: str) -> UsageError:
    return UsageError(
        "UL1130", f"the topic {topic.name!r} is not the one that {service!r} has its positions on",
        found=f"id {topic.id} with {topic.partitions} partitions; saved are {partitions} partitions of id {id}",
        fix="it was deleted and made again, or given other partitions: bring the old one back, or rename the service",
    )  # fmt: skip


def _pass_over(tx: Transaction, unit: Unit, progress: Progress, gap: Gap) -> None:
    """Positions that hold no event (any more) get their outcome as well, and a line in the books if one was lost."""
    for start, end in progress.pass_over(gap.start, gap.end):
        if gap.kind == "void":
            progress.count("void", end - start)
        else:
            tx.execute(
                "insert into unlost_gap values (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*unit, start, end, gap.kind, gap.why, tx.world.now(), gap.declared),
            )


def _pin(tx: Transaction, service: str, topic: TopicInfo, *, log_here: bool) -> None:
    """A service's start on a topic is decided once, when it first sees it: at the log's first event."""
    rows = tx.execute(
        "select partition, topic_id from unlost_progress where service = ? and topic = ?",
        (service, topic.name),
    ).fetchall()
    if rows:
        if any(topic_id != topic.id for _, topic_id in rows) or len(rows) != topic.partitions:
            raise _another_topic(service, topic, len(rows), rows[0][1])
        return
    first_number = tx.topic(topic.name).first_number
    for partition in range(topic.partitions):
        start, digest = log_start(tx, first_number + partition) if log_here else (topic.ranges[partition][0], 0)
        tx.execute(
            "insert into unlost_progress (service, topic, partition, topic_id, start, start_digest, position, fated, "
            "counts, digest) values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (service, topic.name, partition, topic.id, start, digest, start, b"", "{}", 0),
        )


def log_start(tx: Transaction, number: int) -> tuple[int, int]:
    """The first position that a partition of the log still holds, and the digest of all before it."""
    low = number << POSITION_BITS
    row = tx.one(
        "select at, digest, head from unlost_log where at between ? and ? order by at limit 1",
        (low, low | POSITION_MAX),
    )
    if row is None:
        return 0, 0
    e = decode_head(row[2], topic="", key=None, data=None)
    return row[0] - low, row[1] ^ event_hash(e.source, e.id)


def _load(tx: Transaction, unit: Unit, epoch: int) -> Progress:
    row = tx.one(
        "select epoch, position, fated, counts, digest, begun from unlost_progress "
        "where service = ? and topic = ? and partition = ?",
        unit,
    )
    if row is None or row[0] != epoch:
        raise _fenced(unit, row and row[0], epoch)
    return Progress(row[1], Runs.decode(row[2]), _decode_counts(row[3]), row[4], Runs.decode(row[5]))


def _save(tx: Transaction, unit: Unit, progress: Progress, changed: dict[int, Sequence[Attempt] | None]) -> None:
    attempts = None
    if changed:
        stored = tx.one("select attempts from unlost_progress where service = ? and topic = ? and partition = ?", unit)[
            0
        ]
        if stored != "{}" or any(changed.values()):
            kept: dict[int, Sequence[Attempt]] = dict(_decode_attempt_map(stored))
            for position, history in changed.items():
                if history:
                    kept[position] = history
                else:
                    kept.pop(position, None)
            attempts = _json.encode(kept).decode()
    tx.execute(
        "update unlost_progress set position = ?, fated = ?, counts = ?, digest = ?, begun = ?, "
        "attempts = coalesce(?, attempts) where service = ? and topic = ? and partition = ?",
        (
            progress.position,
            progress.fated.encode(),
            _json.encode(progress.counts).decode(),
            progress.digest,
            progress.begun.encode(),
            attempts,
            *unit,
        ),
    )


def _enter(tx: Transaction, unit: Unit, epoch: int, inbox: Inbox | None) -> Known | None:
    """The beginning of a handler's transaction: is the unit still ours, and what does the inbox know of the event?"""
    row = tx.one("select epoch from unlost_progress where service = ? and topic = ? and partition = ?", unit)
    if row is None or row[0] != epoch:
        raise _fenced(unit, row and row[0], epoch)
    if inbox is None:
        return None
    sql = "select content from unlost_inbox where service = ? and id = ? and source = ?"
    found = tx.one(sql, (unit.service, inbox.id, inbox.source))
    return None if found is None else Known(found[0])


def _fenced(unit: Unit, found: int | None, epoch: int) -> Fenced:
    return Fenced("UL2101", f"{unit} has another owner now", found=f"epoch {found or '-'}, ours was {epoch}")


def _apply_schema(file: File, tx: Transaction, text: str) -> None:
    """Runs the user's schema when it is new or has changed, under the same limits as any user statement."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    row = tx.one("select value from unlost_meta where name = 'schema'")
    if row is not None and row[0] == digest:
        return
    file.guard.user_code = True
    try:
        tx.execute(text)
    except apsw.Error as e:
        raise UsageError(
            "UL1235", "the schema of this App cannot be applied", found=str(e),
            fix="write `create table if not exists ...`; names that start with unlost_ are taken",
        ) from e  # fmt: skip
    finally:
        file.guard.user_code = False
    tx.execute("insert or replace into unlost_meta values ('schema', ?)", (digest,))


def _enter_inbox(tx: Transaction, service: str, inbox: Inbox) -> bool:
    """False if the event was handled before."""
    tx.execute(
        "insert into unlost_inbox values (?, ?, ?, ?) on conflict do nothing",
        (service, inbox.id, inbox.source, inbox.content),
    )
    return bool(tx.connection.changes() == 1)


def _as_repeated(tx: Transaction, service: str, o: Outcome, inbox: Inbox) -> None:
    """The id was handled before: a duplicate, or (never to be dropped) another event under a used id."""
    (content,) = tx.one(
        "select content from unlost_inbox where service = ? and id = ? and source = ?",
        (service, inbox.id, inbox.source),
    )
    o.inbox, o.publishes = None, ()
    if content == inbox.content:
        o.state, o.rule = "skipped", "duplicate"
    else:
        o.state, o.death = "dead", id_reused("", inbox)


def id_reused(handler: str, inbox: Inbox) -> Death:
    return Death(
        handler=handler, reason="id_reused", error_type="IdReused", parks=False,
        error=f"another event with the id {inbox.id!r} of {inbox.source!r} was handled before; this one differs from it",
    )  # fmt: skip


def _waits(tx: Transaction, unit: Unit, position: int) -> bool:
    sql = "select 1 from unlost_waiting where service = ? and topic = ? and partition = ? and position = ?"
    return tx.one(sql, (*unit, position)) is not None


def _wait(tx: Transaction, unit: Unit, o: Outcome) -> None:
    a = o.arrival
    tx.execute(
        "insert into unlost_waiting values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) "
        "on conflict do update set due = excluded.due, attempt = excluded.attempt, history = excluded.history",
        (
            *unit,
            a.position,
            a.key,
            o.due,
            len(o.attempts),
            _json.encode(o.attempts).decode(),
            a.stored_head,
            a.data,
            a.recorded,
        ),
    )


def _shelve(tx: Transaction, unit: Unit, o: Outcome) -> None:
    a, death = o.arrival, o.death
    invariant(death is not None, "a dead letter has a reason")
    assert death is not None
    e = a.envelope
    tx.execute(
        "insert into unlost_shelf (service, topic, partition, position, handler, id, source, type, key, trace, reason, "
        "error_type, error, stack, attempts, parks, died, head, data, recorded) "
        "values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            *unit, a.position, death.handler,
            e.id if e else "", e.source if e else "", e.type if e else "", a.key, e.traceparent if e else None,
            death.reason, death.error_type, death.error, death.stack, _json.encode(o.attempts).decode(),
            death.parks, tx.world.now(), a.stored_head, a.data, a.recorded,
        ),
    )  # fmt: skip


def _take(tx: Transaction, unit: Unit, owner: str, look: Callable[[str], Remains]) -> Taken:
    row = tx.one(
        "select epoch, owner, clean, position, fated, attempts, topic_id, begun from unlost_progress "
        "where service = ? and topic = ? and partition = ?",
        unit,
    )
    invariant(row is not None, f"{unit} was registered before it was taken")
    epoch, before, clean, position, fated, attempts, topic_id, begun = row
    topic = tx.topic(unit.topic)
    if topic.id != topic_id:
        raise UsageError(
            "UL1130", f"the topic {unit.topic!r} is not the one that {unit.service!r} has its positions on",
            found=f"id {topic.id}, saved is {topic_id}", fix="bring the old one back, or rename the service",
        )  # fmt: skip
    epoch += 1
    unclean = not clean and before is not None
    address = _address(unit, topic.first_number)
    done, history = Runs.decode(fated), _decode_attempt_map(attempts)
    suspects: set[int] = set()
    if unclean:
        for (where, at), alone in look(before).running.items():
            if where == address and _suspect(tx, unit, at, alone, at in done, history):
                suspects.add(at)
    tx.execute(
        "update unlost_progress set epoch = ?, owner = ?, clean = 0, attempts = ? "
        "where service = ? and topic = ? and partition = ?",
        (epoch, owner, _json.encode(history).decode(), *unit),
    )
    abandoned = _abandon(tx, unit, epoch) if begun else 0
    pid = tx.one("select pid from unlost_process where id = ?", (owner,))
    tx.execute(
        "insert into unlost_epoch values (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (*unit, epoch, owner, pid[0] if pid else 0, tx.world.now(), position, unclean),
    )
    tx.execute(
        "delete from unlost_epoch where service = ? and topic = ? and partition = ? and epoch <= ?",
        (*unit, epoch - EPOCHS_KEPT),
    )
    waiting, keyless = _waiting_keys(tx, unit)
    aside = tx.one(
        "select count(*) from unlost_ledger where service = ? and topic = ? and partition = ? "
        "and state in ('retrying', 'parked', 'dead')",
        unit,
    )[0]
    return Taken(
        unit=unit, epoch=epoch, address=address, position=position, fated=done, attempts=history, suspects=suspects,
        waiting=waiting, keyless=keyless, aside=aside, abandoned=abandoned,
    )  # fmt: skip


def _abandon(tx: Transaction, unit: Unit, epoch: int) -> int:
    """Events that the owner before had begun to handle at most once, and of which nobody knows more, are listed."""
    progress = _load(tx, unit, epoch)
    positions = progress.abandon()
    for position in positions:
        row = (*unit, position, "abandoned", "", tx.world.now())
        tx.execute("insert into unlost_ledger values (?, ?, ?, ?, ?, ?, ?)", row)
    _save(tx, unit, progress, {})
    return len(positions)


def _address(unit: Unit, first_number: int) -> int:
    """Names a unit in a process' own file: 32 bits of the service, 31 of the partition's number."""
    return service_hash(unit.service) << _NUMBER_BITS | (first_number + unit.partition)


def _suspect(
    tx: Transaction, unit: Unit, position: int, alone: bool, fated: bool, history: dict[int, list[Attempt]]
) -> bool:
    """An event that was in a handler when its process died. If it was there alone, that counts as an attempt,
    written before it is delivered again: so a handler that kills its process comes to an end."""
    attempt = "its process was killed (or hung) while it handled only this event"
    if not fated:
        if alone:
            past = history.setdefault(position, [])
            past.append(Attempt(len(past) + 1, tx.world.now(), attempt))
        return True
    row = tx.one(
        "select history from unlost_waiting where service = ? and topic = ? and partition = ? and position = ?",
        (*unit, position),
    )
    if row is None:
        return False  # settled: it only had not put the event down yet
    if alone:
        past = _decode_attempts(row[0])
        past.append(Attempt(len(past) + 1, tx.world.now(), attempt))
        tx.execute(
            "update unlost_waiting set history = ?, attempt = ? "
            "where service = ? and topic = ? and partition = ? and position = ?",
            (_json.encode(past).decode(), len(past), *unit, position),
        )
    return True


def _waiting_keys(tx: Transaction, unit: Unit) -> tuple[dict[bytes, int | None], dict[int, int]]:
    """Per key the time when its first waiting event is due, None while a dead letter is before it."""
    waiting: dict[bytes, int | None] = {}
    keyless: dict[int, int] = {}
    for key, position, due in tx.execute(
        "select key, position, due from unlost_waiting where service = ? and topic = ? and partition = ? "
        "order by position desc",
        unit,
    ):
        if key is None:
            keyless[position] = due or 0
        else:
            waiting[key] = due or 0
    for (key,) in tx.execute(
        "select distinct key from unlost_shelf "
        "where service = ? and topic = ? and partition = ? and parks = 1 and key is not null",
        unit,
    ):
        waiting[key] = None
    return waiting, keyless
