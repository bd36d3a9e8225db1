"""Planted bugs of the store in PostgreSQL, beside those of `sabotage`: each safety line of it can be broken on purpose.

They are in a module of their own because its driver is an extra. Most of these mistakes have been made in real outboxes
and inboxes; the others are what a line of ours is there to prevent.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psycopg

import unlost.delivery.worker as worker_module
import unlost.store.postgres.rows as rows
from unlost.delivery.fate import DONE, Fate
from unlost.delivery.lanes import Delivery, Lane
from unlost.delivery.outbox import Outbox
from unlost.delivery.relay import Relay
from unlost.delivery.worker import Worker
from unlost.errors import Unavailable
from unlost.events import Envelope
from unlost.events.topic import Unit
from unlost.store.port import Inbox, Outcome, Settlement, Unsent
from unlost.store.postgres.blocks import LentBlock
from unlost.store.postgres.client import Client, Connection, _configure
from unlost.store.postgres.door import PostgresDoor
from unlost.store.postgres.outbox import PostgresOutbox
from unlost.store.postgres.store import PostgresStore
from unlost.store.session_blocks import SessionBlock, SyncSessionBlock
from unlost.store.steps import Rows, Steps, run, with_percent
from unlost.testing.sabotage import VARIABLE, Bug, _replace
from unlost.world import REAL

BUGS: dict[str, Bug] = {}


def from_environment() -> bool:
    """Applies the bug that `UNLOST_BREAK` names, if it is one of these."""
    bug = BUGS.get(os.environ.get(VARIABLE, ""))
    if bug is not None:
        bug.apply()
    return bug is not None


def _bug(name: str, breaks: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def register(apply: Callable[[], None]) -> Callable[[], None]:
        BUGS[name] = Bug(name, breaks, apply)
        return apply

    return register


def _rewritten(
    steps: Steps[Any],
    text: Callable[[str], str] = lambda t: t,
    answer: Callable[[str, Rows], Rows] = lambda t, rows: rows,
) -> Steps[Any]:
    """The same steps, with other statements, or with other rows in answer to them."""
    try:
        statement = next(steps)
        while True:
            found = yield text(statement[0]), statement[1]
            statement = steps.send(answer(statement[0], found))
    except StopIteration as end:
        return end.value


# --- the web's transaction -----------------------------------------------------------------------------------------


@_bug("outbox-beside-the-transaction", "events of app.outbox are committed by a connection of their own, at once")
def _outbox_beside() -> None:
    def leave(self: Outbox, kind: object, error: BaseException | None, trace: object) -> None:
        self._open = False
        if error is None and isinstance(self._place, PostgresDoor):
            _put_elsewhere(self._place, self._events)

    _replace(Outbox, "__exit__", lambda _: leave)


@_bug(
    "events-after-the-commit", "events of app.outbox are written after the user's commit: two writes, and no one commit"
)
def _events_after_the_commit() -> None:
    def leave(self: Outbox, kind: object, error: BaseException | None, trace: object) -> None:
        self._open = False
        place, session, events = self._place, self._session, self._events
        if error is None and isinstance(place, PostgresDoor):
            threading.Thread(target=_put_when_ended, args=(place, session, events), daemon=True).start()

    def _put_when_ended(place: PostgresDoor, session: Any, events: Sequence[Envelope]) -> None:
        while session.in_transaction:
            REAL.pause(0.001)
        REAL.pause(0.2)
        _put_elsewhere(place, events)

    _replace(Outbox, "__exit__", lambda _: leave)


def _put_elsewhere(place: PostgresDoor, events: Sequence[Envelope]) -> None:
    with psycopg.connect(place._settings.conninfo) as connection:

        def execute(text: str, bindings: Sequence[Any]) -> Rows:
            cursor = connection.execute(with_percent(text), bindings)
            return cursor.fetchall() if cursor.description else []

        run(place.put(events), execute)


# --- the relay -----------------------------------------------------------------------------------------------------


@_bug("page-by-number", "the relay reads on from the highest number that it has seen; who commits late is passed over")
def _page_by_number() -> None:
    def make(original: Callable[..., str]) -> Any:
        def unclaimed(self: PostgresOutbox, held: Any) -> str:
            return f"{original(self, held)} and o.seq > {highest[0]}"

        return unclaimed

    def remember(original: Callable[..., Any]) -> Any:
        async def next_(self: PostgresOutbox, *args: Any) -> Sequence[Unsent]:
            found: Sequence[Unsent] = await original(self, *args)
            highest[0] = max([highest[0], *(row.number for row in found)])
            return found

        return next_

    highest = [0]
    _replace(PostgresOutbox, "_unclaimed", make)
    _replace(PostgresOutbox, "next", remember)


@_bug("claimed-in-any-order", "what a relay claims is sent in the order in which the database happens to return it")
def _claimed_in_any_order() -> None:
    def make(original: Callable[..., Steps[Any]]) -> Any:
        def steps(*args: Any) -> Steps[Any]:
            found = yield from original(*args)
            return list(reversed(found))

        return steps

    _replace(PostgresOutbox, "_confirm_and_claim", make)


@_bug("marked-before-receipt", "rows leave the outbox before the broker has confirmed them")
def _marked_before_receipt() -> None:
    def make(original: Callable[..., Any]) -> Any:
        async def send(self: Relay, sent: Sequence[Unsent]) -> Any:
            await self._outbox.sent([row.number for row in sent])
            await self._outbox.next(self._held, 0)
            return await original(self, sent)

        return send

    _replace(Relay, "_send", make)


@_bug("sent-before-the-claim", "rows are sent first, and noted as in the relay's hands afterwards")
def _sent_before_the_claim() -> None:
    claim = PostgresOutbox.next

    async def next_(self: PostgresOutbox, held: Any, limit: int) -> Sequence[Unsent]:
        def steps() -> Steps[list[Unsent]]:
            found = yield (
                f"select {rows.STORED} from unlost_outbox o left join unlost_outbox_status s on s.seq = o.seq "
                f"where o.seq in (select o.seq {self._unclaimed(held)}) order by o.seq limit {limit:d}",
                self._which(held),
            )
            return [Unsent(number=row[0], envelope=rows.envelope_of(row)) for row in found]

        return await self._client.read(steps())

    def make(original: Callable[..., Any]) -> Any:
        async def sent(self: PostgresOutbox, numbers: Sequence[int]) -> None:
            while numbers and not set(numbers) <= set(self._hands):
                await claim(self, (), 1000)
            await original(self, numbers)
            await claim(self, (), 0)

        return sent

    _replace(PostgresOutbox, "next", lambda _: next_)
    _replace(PostgresOutbox, "sent", make)


@_bug("stale-relay-accepted", "a relay that slept through its replacement claims and confirms on")
def _stale_relay_accepted() -> None:
    def make(original: Callable[..., Steps[Any]]) -> Any:
        def steps(self: PostgresOutbox, *args: Any) -> Steps[Any]:
            mine = dict(self._epochs)

            def answer(text: str, found: Rows) -> Rows:
                if not text.startswith("select shard, process, epoch"):
                    return found
                return [(shard, self._store.process_id, mine[shard]) for shard, _, _ in found]

            return _rewritten(original(self, *args), answer=answer)

        return steps

    _replace(PostgresOutbox, "_confirm_and_claim", make)


@_bug("refused-row-holds-nothing", "later events of a key are sent past one that the broker refuses")
def _refused_row_holds_nothing() -> None:
    _replace(Relay, "_failed", lambda _: lambda self, row, receipt, error: receipt is None)


@_bug("old-rows-removed", "rows of the outbox are removed when they are old, sent or not")
def _old_rows_removed() -> None:
    def make(original: Callable[..., Steps[bool]]) -> Any:
        def heartbeat(self: PostgresStore) -> Steps[bool]:
            for table, column in (("unlost_outbox_status", "claimed"), ("unlost_outbox", "added")):
                yield f"delete from {table} where {column} < now() - interval '1 second'", ()
            alive = yield from original(self)
            return alive

        return heartbeat

    _replace(PostgresStore, "_heartbeat", make)


@_bug("locks-kept-asleep", "a process that stands still inside a commit keeps its locks for as long as it likes")
def _locks_kept_asleep() -> None:
    async def configure(self: Client, connection: Connection) -> None:
        await _configure(connection)
        cursor = await connection.execute("select stats_reset from pg_stat_bgwriter")
        self._lives[connection] = await cursor.fetchone()

    _replace(Client, "_configure_own", lambda _: configure)


# --- the inbox -----------------------------------------------------------------------------------------------------


@_bug("marks-of-all-services", "what one service has handled is taken for handled by every other")
def _marks_of_all_services() -> None:
    def make(original: Callable[..., Steps[Any]]) -> Any:
        return lambda *args: _rewritten(
            original(*args), lambda text: text.replace("i.service = ?", "?::text is not null")
        )

    _replace(rows, "seen", make)
    _replace(rows, "entry", make)


@_bug("marks-removed-by-age", "marks are removed when they are old, whatever may still come again")
def _marks_removed_by_age() -> None:
    def make(original: Callable[..., Any]) -> Any:
        async def take(self: PostgresStore, units: Sequence[Unit]) -> Any:
            def steps() -> Steps[None]:
                yield "delete from unlost_inbox", ()  # a day old, as it were

            await self.client.commit(steps)
            return await original(self, units)

        return take

    _replace(PostgresStore, "take", make)


@_bug("repeats-not-recognised", "nobody looks whether an event was handled before")
def _repeats_not_recognised() -> None:
    def seen(service: str, events: Sequence[Inbox]) -> Steps[dict[Any, Any]]:
        yield from ()
        return {}

    def deduplicate(settlements: Sequence[Settlement], numbers: Mapping[Unit, int]) -> Steps[None]:
        yield from ()

    _replace(rows, "seen", lambda _: seen)
    _replace(rows, "entry", _unmarked)
    _replace(rows, "_ending", _without_mark)
    _replace(rows, "_deduplicate", lambda _: deduplicate)
    _replace(Worker, "_recall", lambda _: lambda self, inbox: None)


def _unmarked(original: Callable[..., Steps[Any]]) -> Any:
    """A transaction begins without a look at the inbox."""
    return lambda unit, mark: original(unit, None)


def _without_mark(original: Callable[[Settlement], Any]) -> Any:
    """A transaction ends without the mark."""

    def ending(settlement: Settlement) -> Any:
        for o in settlement.outcomes:
            o.inbox = None
        return original(settlement)

    return ending


# --- what belongs into one commit ------------------------------------------------------------------------------------


@_bug("mark-before-the-handler", "the mark that an event is handled is committed before its handler runs")
def _mark_before_the_handler() -> None:
    def make(original: Callable[..., Any]) -> Any:
        async def handle(self: Worker, d: Delivery, *args: Any) -> Any:
            if d.handler.guarantee == "effectively-once":
                mark, unit, store = self._inbox(d), d.lane.owned.unit, self._store
                assert isinstance(store, PostgresStore)

                def steps() -> Steps[None]:
                    yield (
                        "insert into unlost_inbox (content, position, unit, service, source, id) "
                        "select ?, ?, number, ?, ?, ? from unlost_progress "
                        f"where {rows.UNIT} on conflict do nothing",
                        (mark.content, d.position, unit.service, mark.source, rows.id_bytes(mark.id), *unit),
                    )

                await store.client.commit(steps)
            return await original(self, d, *args)

        return handle

    _replace(Worker, "_handle", make)
    _replace(rows, "entry", _unmarked)


@_bug("mark-after-the-block", "a handler's transaction commits its rows, and the mark comes in another commit")
def _mark_after_the_block() -> None:
    _replace(rows, "_ending", _without_mark)


@_bug("position-before-the-block", "the position is settled before the handler's transaction is committed")
def _position_before_the_block() -> None:
    def make(original: Callable[..., Any]) -> Any:
        async def finish(self: LentBlock, settlement: Settlement) -> None:
            (o,) = settlement.outcomes
            early = Outcome(arrival=o.arrival, state="done", event_hash=o.event_hash, waited=o.waited)
            first = Settlement(settlement.unit, settlement.epoch, [early])
            await self._client.commit(lambda: rows.settle([first], REAL.now()))
            await original(self, settlement)

        return finish

    _replace(LentBlock, "finish", make)


@_bug(
    "publishes-after-settling", "what a handler publishes is put into the outbox after its position, in another commit"
)
def _publishes_after_settling() -> None:
    def make(original: Callable[..., Any]) -> Any:
        async def settle(self: PostgresStore, settlements: Sequence[Settlement]) -> Any:
            later: list[Envelope] = []
            for o in (o for s in settlements for o in s.outcomes):
                later.extend(o.publishes)
                o.publishes = ()
            fenced = await original(self, settlements)
            if later:
                await self.client.commit(lambda: rows.put(later))
                self.wake()
            return fenced

        return settle

    _replace(PostgresStore, "settle", make)


@_bug("stale-epoch-accepted", "whoever owned a partition once may still settle, though another process has it now")
def _stale_epoch_accepted() -> None:
    def entered(original: Callable[..., Any]) -> Any:
        return lambda unit, epoch, row: original(unit, epoch, (row[0], epoch, *row[2:]))

    def ending(original: Callable[[Settlement], Any]) -> Any:
        def replaced(settlement: Settlement) -> Any:
            text, *rest = original(settlement)
            return (text.replace("and epoch = ?", "and epoch >= ?"), *rest)

        return replaced

    def settle(original: Callable[..., Steps[Any]]) -> Any:
        def steps(settlements: Sequence[Settlement], *args: Any) -> Steps[Any]:
            epochs = {s.unit: s.epoch for s in settlements}

            def answer(text: str, found: Rows) -> Rows:
                if not text.startswith("select p.service, p.topic, p.partition, p.number, p.epoch"):
                    return found
                return [(*row[:4], epochs[Unit(*row[:3])], *row[5:]) for row in found]

            return _rewritten(original(settlements, *args), answer=answer)

        return steps

    _replace(rows, "entered", entered)
    _replace(rows, "_ending", ending)
    _replace(rows, "settle", settle)


# --- what an answer, or the lack of one, means ---------------------------------------------------------------------


@_bug("lost-answer-is-failure", "a commit whose answer was lost is taken for one that did not happen")
def _lost_answer_is_failure() -> None:
    _replace(Client, "_happened", lambda _: _no)


@_bug("lost-answer-is-success", "a commit whose answer was lost is taken for one that happened")
def _lost_answer_is_success() -> None:
    _replace(Client, "_happened", lambda _: _yes)


async def _no(*_: Any) -> bool:
    return False


async def _yes(*_: Any) -> bool:
    return True


@_bug("number-believed-after-a-crash", "a transaction's number is believed to be its own after the server has crashed")
def _number_believed_after_a_crash() -> None:
    def make(original: Callable[..., Any]) -> Any:
        async def configure(self: Client, connection: Connection) -> None:
            await original(self, connection)
            self._lives[connection] = "always the same"

        return configure

    _replace(Client, "_configure_own", make)


@_bug("unavailable-is-success", "a transaction that the world refused counts as done")
def _unavailable_is_success() -> None:
    def make(original: Callable[..., Fate]) -> Any:
        def decide(error: BaseException | None, *args: Any, **more: Any) -> Fate:
            return DONE if isinstance(error, Unavailable) else original(error, *args, **more)

        return decide

    _replace(worker_module, "decide", make)


@_bug("world-blames-the-event", "serialization failures and deadlocks of a handler's own statements spend its attempts")
def _world_blames_the_event() -> None:
    for block in (SessionBlock, SyncSessionBlock):
        _replace(block, "is_transient", lambda _: lambda self, error: False)


@_bug("load-gives-up", "a service ends when its waiting room cannot be read for a moment")
def _load_gives_up() -> None:
    def make(original: Callable[..., Any]) -> Any:
        async def load(self: Worker, lane: Lane) -> None:
            async def once(call: Callable[..., Any], *args: Any) -> Any:
                return await call(*args)

            self._insist = once  # type: ignore[method-assign]
            try:
                await original(self, lane)
            finally:
                del self._insist

        return load

    _replace(Worker, "_load", make)


# --- who comes after a death, and after a restore --------------------------------------------------------------------


@_bug("deaths-not-counted", "nobody counts how often a process died at the same event")
def _deaths_not_counted() -> None:
    rows.DEATHS_MIN = 1_000_000


@_bug("restored-backup-welcome", "a store that is behind what the broker was told goes on")
def _restored_backup_welcome() -> None:
    _replace(worker_module, "_check_saved", lambda _: lambda *args: None)
