"""Planted bugs: classic mistakes, each of which some check must turn red. A check that cannot fail is no check.

Nothing in production code knows of them: they are patches, laid over this process when it starts, by those entry
points only that call `from_environment()` (the demo's services and the workers of the proofs).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import unlost.delivery.worker as worker_module
import unlost.store.delayed as delayed
import unlost.store.shelf as shelf_module
import unlost.store.sqlite as store_module
from unlost.brokers.embedded.broker import EmbeddedBroker
from unlost.brokers.port import Arrivals, Change, Member, Receipt
from unlost.delivery.fate import Done, Fate, HandlerTimeout, Reject, Skip
from unlost.delivery.lanes import Delivery, Lane, Owned
from unlost.delivery.worker import Worker
from unlost.errors import Undecodable, UsageError
from unlost.events import Envelope, decode_head
from unlost.events.topic import TopicInfo, Unit
from unlost.sqlite.file import File, _Operation
from unlost.sqlite.transaction import Transaction
from unlost.store.port import Inbox, Outcome, Settlement
from unlost.store.progress import Progress
from unlost.store.sqlite import FileBlock, SqliteStore

VARIABLE = "UNLOST_BREAK"


@dataclass(frozen=True)
class Bug:
    """One planted bug. `breaks` says what is wrong; `apply` lays it over this process, for good."""

    name: str
    breaks: str
    apply: Callable[[], None]
    only_embedded: str = ""  # why it makes no sense with a broker of its own log
    not_in_shop: str = ""  # why the demo would not show it


BUGS: dict[str, Bug] = {}


def from_environment() -> None:
    """Applies the bug that `UNLOST_BREAK` names, if it names one.

    Raises:
        UsageError: there is no such bug.
    """
    name = os.environ.get(VARIABLE)
    if not name:
        return
    if name not in BUGS:
        raise UsageError("UL1395", f"there is no planted bug named {name!r}", found=f"there are {', '.join(BUGS)}")
    BUGS[name].apply()


def _bug(
    name: str, breaks: str, only_embedded: str = "", not_in_shop: str = ""
) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def register(apply: Callable[[], None]) -> Callable[[], None]:
        BUGS[name] = Bug(name, breaks, apply, only_embedded, not_in_shop)
        return apply

    return register


def _replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    setattr(owner, name, make(getattr(owner, name)))


_THIS_UNIT = "where service = ? and topic = ? and partition = ?"


# --- the position ----------------------------------------------------------------------------------------------


def _position_may_lead(advance: bool) -> None:
    def settle(self: Progress, position: int, event_hash: int, counted_as: str | None) -> None:
        self.fated.add(position)
        self.digest ^= event_hash
        if counted_as is not None:
            self.count(counted_as, 1)
        self.position = max(self.fated.first_gap(self.position), position + 1 if advance else 0)

    def settle_done(self: Progress, positions: list[int], digest: int) -> None:
        for position in positions:
            settle(self, position, 0, "done")
        self.digest ^= digest

    _replace(Progress, "settle", lambda _: settle)
    _replace(Progress, "settle_done", lambda _: settle_done)


@_bug("ack-first", "the position is saved when events are received, before they are handled")
def _ack_first() -> None:
    _position_may_lead(advance=False)

    class Hasty:
        """A member that acknowledges what it hands over."""

        def __init__(self, member: Member, file: File) -> None:
            self._member = member
            self._file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self._member, name)

        async def receive(self) -> Sequence[Change]:
            changes = await self._member.receive()
            received = [change for change in changes if isinstance(change, Arrivals)]

            def save(tx: Transaction) -> None:
                for unit, events in received:
                    sql = f"update unlost_progress set position = max(position, ?) {_THIS_UNIT}"
                    tx.execute(sql, (events[-1].position + 1, *unit))

            if received:
                await self._file.write(save)
            return changes

    def make(original: Callable[[Worker], Awaitable[None]]) -> Any:
        async def receive(self: Worker) -> None:
            assert isinstance(self._store, SqliteStore) and self._member is not None
            self._member = Hasty(self._member, self._store.file)
            await original(self)

        return receive

    _replace(Worker, "_receive", make)


@_bug("commit-highest-seen", "the position jumps behind the highest settled event, over those that are still open")
def _commit_highest_seen() -> None:
    _position_may_lead(advance=True)


@_bug("start-at-latest", "a new service begins at the end of the log; what was accepted before is not for it")
def _start_at_latest() -> None:
    def make(original: Callable[..., None]) -> Any:
        def pin(tx: Transaction, service: str, topic: TopicInfo, **where: bool) -> None:
            known = tx.one("select 1 from unlost_progress where service = ? and topic = ?", (service, topic.name))
            original(tx, service, topic, **where)
            for partition, (_, end) in enumerate(topic.ranges if known is None else ()):
                unit = (service, topic.name, partition)
                tx.execute(f"update unlost_progress set position = ?, start = ? {_THIS_UNIT}", (end, end, *unit))

        return pin

    _replace(store_module, "_pin", make)


# --- ownership ---------------------------------------------------------------------------------------------------


@_bug("stale-epoch-accepted", "whoever owned a partition once may still settle, though another process has it now")
def _stale_epoch_accepted() -> None:
    def current(tx: Transaction, unit: Unit) -> int:
        return int(tx.one(f"select epoch from unlost_progress {_THIS_UNIT}", unit)[0])

    _replace(store_module, "_load", lambda load: lambda tx, unit, epoch: load(tx, unit, current(tx, unit)))
    _replace(
        store_module, "_enter", lambda enter: lambda tx, unit, epoch, inbox: enter(tx, unit, current(tx, unit), inbox)
    )


@_bug("waiting-room-forgotten", "a new owner does not look into the waiting room and at the parked keys")
def _waiting_room_forgotten() -> None:
    _replace(store_module, "_waiting_keys", lambda _: lambda tx, unit: ({}, {}))


@_bug("stop-drops-queue", "a clean stop settles as done what was received and had not begun")
def _stop_drops_queue() -> None:
    def make(original: Callable[[Worker, Owned], None]) -> Any:
        def drop(self: Worker, owned: Owned) -> None:
            for lane in owned.lanes.values():
                for d in lane.queue:
                    if not (lane.running and d is lane.head):
                        outcome = Outcome(arrival=d.arrival, state="done", event_hash=d.event_hash)
                        self._settler.put(owned, outcome)
            original(self, owned)

        return drop

    _replace(Worker, "_drop_queued", make)


# --- what a handler's end means ------------------------------------------------------------------------------------


def _decided(instead: Callable[[BaseException | None], Fate | None]) -> None:
    def make(original: Callable[..., Fate]) -> Any:
        def decide(error: BaseException | None, *args: Any, **kwargs: Any) -> Fate:
            return instead(error) or original(error, *args, **kwargs)

        return decide

    _replace(worker_module, "decide", make)


@_bug("cancelled-is-success", "a handler that was cancelled, or ran out of time, counts as done")
def _cancelled_is_success() -> None:
    _decided(lambda e: Done() if isinstance(e, asyncio.CancelledError | HandlerTimeout) else None)


@_bug("swallow-exceptions", "an exception in a handler is logged, and the event counts as done")
def _swallow_exceptions() -> None:
    _decided(lambda e: Done() if isinstance(e, Exception) and not isinstance(e, Reject) else None)


@_bug("skip-undecodable", "bytes that cannot be read are skipped")
def _skip_undecodable() -> None:
    _decided(lambda e: Skip("undecodable") if isinstance(e, Undecodable) else None)


# --- the shelf, the waiting room, the order of a key -----------------------------------------------------------------


@_bug("shelf-not-durable", "a dead letter is acknowledged, but not written to the shelf")
def _shelf_not_durable() -> None:
    _replace(store_module, "_shelve", lambda _: lambda tx, unit, outcome: None)


@_bug("retry-not-durable", "an event that waits for a late retry is acknowledged, but not written to the waiting room")
def _retry_not_durable() -> None:
    _replace(store_module, "_wait", lambda _: lambda tx, unit, outcome: None)


@_bug("redrive-drops", "a redrive takes the event off the shelf and puts it nowhere")
def _redrive_drops() -> None:
    def make(original: Callable[..., Any]) -> Any:
        def carry_out(request: Any, now: int) -> Any:
            result = yield from original(request, now)
            where = (*request.unit, request.position)
            yield f"delete from unlost_waiting {_THIS_UNIT} and position = ?", where
            return result

        return carry_out

    _replace(shelf_module, "carry_out", make)


@_bug("parked-key-forgotten", "the followers of a dead letter do not wait behind it")
def _parked_key_forgotten() -> None:
    def make(original: Callable[..., None]) -> Any:
        def settle(self: Worker, d: Delivery, *args: Any) -> None:
            d.handler = dataclasses.replace(d.handler, on_dead="skip")
            original(self, d, *args)

        return settle

    _replace(Worker, "_settle", make)


@_bug("keys-in-parallel", "events of one key are handled side by side")
def _keys_in_parallel() -> None:
    def make(original: Callable[[Owned, bytes | None, int], Lane]) -> Any:
        return lambda self, key, position: original(self, None, position)

    _replace(Owned, "lane", make)


# --- what belongs into one commit --------------------------------------------------------------------------------------


@_bug("publishes-after-ack", "what a handler publishes is written after its position, in another commit")
def _publishes_after_ack() -> None:
    def make(original: Callable[..., Any]) -> Any:
        async def settle(self: SqliteStore, settlements: Sequence[Settlement]) -> Any:
            later: list[Envelope] = []
            for outcome in (o for s in settlements for o in s.outcomes):
                later.extend(outcome.publishes)
                outcome.publishes = ()
            fenced = await original(self, settlements)
            if later:
                await self.file.write(lambda tx: self._publish(tx, later))
            return fenced

        return settle

    _replace(SqliteStore, "settle", make)


@_bug("effect-before-mark", "a transaction's rows are committed first, the mark that the event is handled afterwards")
def _effect_before_mark() -> None:
    async def finish(self: FileBlock, settlement: Settlement) -> None:
        store = self._store
        self._block.finish(lambda tx: None)
        later = _Operation(lambda tx: store.settle_in(tx, settlement), concurrent.futures.Future(), None)
        store.file._submit(later)
        await asyncio.shield(self._committed)

    _replace(FileBlock, "finish", lambda _: finish)


@_bug("mark-before-effect", "the inbox mark is committed before the handler runs")
def _mark_before_effect() -> None:
    def make(original: Callable[..., Any]) -> Any:
        async def handle(self: Worker, d: Delivery, *args: Any) -> Any:
            if d.handler.guarantee == "effectively-once":
                inbox, store = self._inbox(d), self._store
                assert isinstance(store, SqliteStore)
                await store.file.write(lambda tx: _mark(tx, self.service.name, inbox))
            return await original(self, d, *args)

        return handle

    def _mark(tx: Transaction, service: str, inbox: Inbox) -> None:
        row = (service, inbox.id, inbox.source, inbox.content)
        tx.execute("insert into unlost_inbox values (?, ?, ?, ?) on conflict do nothing", row)

    _replace(Worker, "_handle", make)
    _replace(store_module, "_enter_inbox", lambda _: lambda tx, service, inbox: True)
    _replace(store_module, "_enter", lambda enter: lambda tx, unit, epoch, inbox: enter(tx, unit, epoch, None))


@_bug("inbox-without-service", "services share the marks of handled events: what one has handled, no other sees")
def _inbox_without_service() -> None:
    shared = "all"
    _replace(store_module, "_enter_inbox", lambda f: lambda tx, service, inbox: f(tx, shared, inbox))
    _replace(store_module, "_as_repeated", lambda f: lambda tx, service, o, inbox: f(tx, shared, o, inbox))
    _replace(SqliteStore, "seen", lambda f: lambda self, service, events: f(self, shared, events))


@_bug(
    "ack-before-commit",
    "publish returns its receipt before the commit",
    only_embedded="there the broker's receipt comes from the cluster, and no commit of ours is part of it",
)
def _ack_before_commit() -> None:
    async def publish(self: EmbeddedBroker, envelopes: Sequence[Envelope]) -> Sequence[Receipt]:
        task = asyncio.ensure_future(self.file.write(lambda tx: tx.append(envelopes)))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        now = self.file.world.now()
        return [Receipt(id=e.id, topic=e.topic, partition=0, position=0, recorded=now) for e in envelopes]

    _replace(EmbeddedBroker, "publish", lambda _: publish)


_ALL_COUNTS = "none of its handlers is at-most-once"
_NOTHING_LATER = "nothing in it is delayed"


@_bug(
    "begins-when-handled",
    "at most once: that a handler has an event becomes durable when it has handled it",
    not_in_shop=_ALL_COUNTS,
)
def _begins_when_handled() -> None:
    def end(self: Progress, positions: list[int], counted_as: str | None) -> None:
        self.fated.add_many(list(positions))
        self.position = self.fated.first_gap(self.position)
        if counted_as is not None:
            self.count(counted_as, len(positions))

    _replace(Progress, "begin", lambda _: lambda self, positions, digest: None)
    _replace(Progress, "end", lambda _: end)


@_bug(
    "cut-off-not-listed",
    "at most once: what a dead process had begun is not listed as abandoned",
    not_in_shop=_ALL_COUNTS,
)
def _cut_off_not_listed() -> None:
    def make(original: Callable[[Progress], list[int]]) -> Any:
        def abandon(self: Progress) -> list[int]:
            original(self)
            return []

        return abandon

    _replace(Progress, "abandon", make)


# --- later -----------------------------------------------------------------------------------------------------


@_bug("delayed-not-durable", "what a handler publishes with a delay is kept in no table", not_in_shop=_NOTHING_LATER)
def _delayed_not_durable() -> None:
    _replace(delayed, "put", lambda _: lambda envelopes, now: iter(()))


@_bug("release-drops", "what is due is taken out of its table, and put nowhere", not_in_shop=_NOTHING_LATER)
def _release_drops() -> None:
    def make(original: Callable[[int, int], Any]) -> Any:
        def take_due(steady: int, wall: int) -> Any:
            yield from original(steady, wall)
            return []

        return take_due

    _replace(delayed, "take_due", make)


@_bug("released-again", "what was released stays in its table", not_in_shop=_NOTHING_LATER)
def _released_again() -> None:
    def take_due(steady: int, wall: int) -> Any:
        rows = yield "select topic, key, head, data from unlost_delayed where due <= ? order by due", (steady,)
        return [decode_head(head, topic=topic, key=key, data=data) for topic, key, head, data in rows]

    _replace(delayed, "take_due", lambda _: take_due)


@_bug("sync-normal", "SQLite runs with synchronous=NORMAL: a commit is not synced to the disk")
def _sync_normal() -> None:
    def make(original: Callable[[File], Any]) -> Any:
        def connect(self: File) -> Any:
            connection = original(self)
            connection.pragma("synchronous", 1)
            return connection

        return connect

    _replace(File, "_connect", make)
