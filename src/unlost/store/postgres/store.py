"""The store in PostgreSQL: one for several machines, and in the database of the service itself.

**Guarantee** as every store (see `store/port.py`). A handler's transaction holds its own rows, its events and the mark that
the event is handled; its position is settled right after it, in a commit that many share. Until then the mark says where
the event stood, so that it is known again when it comes back.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec
import psycopg

from unlost.errors import OutcomeUnknown, Unavailable, UnlostError, UsageError
from unlost.events import Envelope
from unlost.events.topic import TopicInfo, Unit
from unlost.store import delayed, queues, services, shelf
from unlost.store.own_sqlite import own_rules
from unlost.store.port import (
    Block,
    CarriedOut,
    Hands,
    Hold,
    Inbox,
    Known,
    Mirrored,
    Outcome,
    OwnPlace,
    Request,
    Settlement,
    Snapshot,
    SyncBlock,
    Taken,
    Waiting,
)
from unlost.store.postgres import rows
from unlost.store.postgres.blocks import (
    LentBlock,
    StoreRules,
    SyncLentBlock,
    close_threads_connections,
)
from unlost.store.postgres.client import ASK_AGAIN_SECONDS, Client, Listener
from unlost.store.postgres.outbox import PostgresCopies, PostgresOutbox
from unlost.store.postgres.settings import Settings
from unlost.store.postgres.startup import check
from unlost.store.progress import Runs
from unlost.store.session_blocks import Rules, SessionBlock, SyncSessionBlock
from unlost.store.sessions.connect import of
from unlost.store.sessions.port import AnySession
from unlost.store.steps import Steps, one
from unlost.world import REAL, World, end, new_id

log = logging.getLogger("unlost.store")
_json = msgspec.json
_decode_counts = msgspec.json.Decoder(dict[str, int]).decode

HEARTBEAT_SECONDS = 2.0
DEATH_SECONDS = 3.0  # after `kill -9` the server may take so long to notice
LOOK_AGAIN_SECONDS = 0.1
FORGET_SECONDS = 86_400  # the row of a process that lives no more
_LATER_TOKEN = -1  # … and while what is due is released
_TOKEN = 0  # of the advisory locks: taken while a service registers


class StillRunning(UsageError):
    """Or not any more: the server learns of a death a moment after it."""


class PostgresStore:
    """One process' hold of a store in PostgreSQL. Used from one event loop."""

    sees_hands = False

    def __init__(
        self,
        settings: Settings,
        *,
        broker: str,
        mirror: Callable[[Unit, Outcome], Mirrored | None] | None = None,
        world: World = REAL,
    ) -> None:
        self.settings = settings
        self.world = world
        self.process_id = new_id()
        self.on_broken: Callable[[UnlostError], None] | None = None
        self.client = Client(settings)
        self.number = 0  # of this process: its advisory lock
        self.relays = False
        self.sends_copies = False
        self.sends_all = False
        self.own: dict[str, OwnPlace] = {}
        self._broker = broker
        self._mirror = mirror
        self._id = ""
        self._listener = Listener(self.client, lambda: self.number)
        self._read: dict[Unit, int] = {}
        self._heart: asyncio.Task[None] | None = None
        self._waking: asyncio.Task[None] | None = None

    # --- what it is --------------------------------------------------------------------------------------

    @property
    def id(self) -> str:
        return self._id

    @property
    def place(self) -> str:
        return self.settings.shown

    @property
    def broken(self) -> UnlostError | None:
        """A server that is away comes back; nothing here is lost for good."""
        return None

    async def open(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._id = await check(self.client)
        await self.client.open()
        try:
            await self.client.commit(lambda: rows.broker(self._broker))
            await self._sign_on()
            await self._listener.open()
        except BaseException:
            await self.close()
            raise
        self._heart = asyncio.create_task(self._beat(), name="unlost-heartbeat")

    async def _sign_on(self) -> None:
        def steps() -> Steps[int]:
            yield (
                "delete from unlost_process p where seen < now() - make_interval(secs => ?) and number not in "
                f"({_LIVING}) and id not in (select owner from unlost_progress where owner is not null)",
                (FORGET_SECONDS, self.settings.lock_class),
            )
            row = yield from one(
                "insert into unlost_process (id, pid, host, started, relays, read) values (?, ?, ?, ?, ?, '[]') "
                "on conflict (id) do update set seen = now() returning number",
                (self.process_id, os.getpid(), socket.gethostname(), self.world.now(), self.relays),
            )
            return int(row[0])

        self.number = await self.client.commit(steps)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            try:
                if not await self.client.commit(self._heartbeat):
                    await self._sign_on()  # taken for dead long ago
            except UnlostError as e:
                log.warning("no heartbeat could be written; it is tried again: %s", e)

    def _heartbeat(self) -> Steps[bool]:
        read = _json.encode([(*unit, at) for unit, at in self._read.items()]).decode()
        found = yield (
            "update unlost_process set seen = now(), relays = ?, read = ? where id = ? returning 1",
            (self.relays, read, self.process_id),
        )
        return bool(found)

    async def close(self) -> None:
        """Says goodbye; if that fails, the lock of the session that ends says it."""
        await end(*(task for task in (self._heart, self._waking) if task is not None))
        with contextlib.suppress(UnlostError, TimeoutError):
            async with asyncio.timeout(2.0):
                await self.client.commit(self._sign_off)
        await self._listener.close()
        await self.client.close()
        close_threads_connections(self.settings)

    def _sign_off(self) -> Steps[None]:
        yield "delete from unlost_process where id = ?", (self.process_id,)

    async def prepare(self, schema: str) -> None:
        """In the store's database, where the role may make tables."""
        digest = hashlib.sha256(schema.encode()).hexdigest()

        def steps() -> Steps[None]:
            yield "select pg_advisory_xact_lock(?, ?)", (self.settings.lock_class, _TOKEN)
            row = yield from one("select value from unlost_meta where name = 'schema'")
            if row is not None and row[0] == digest:
                return
            try:
                yield schema, ()
            except psycopg.Error as e:
                raise UsageError(
                    "UL1235", "the schema of this App cannot be applied", found=str(e).strip().partition("\n")[0],
                    fix="write statements that PostgreSQL understands; or make your tables yourself, and leave schema= out",
                ) from e  # fmt: skip
            yield (
                "insert into unlost_meta values ('schema', ?) on conflict (name) do update set value = excluded.value",
                (digest,),
            )

        await self.client.commit(steps)

    # --- services and ownership --------------------------------------------------------------------------

    async def service_of(self, queue: str) -> str | None:
        return await self.client.read(queues.service_of(queue))

    async def register(self, service: str, policy: dict[str, Any], topics: Sequence[TopicInfo]) -> None:
        text = _json.encode(policy, order="sorted").decode()

        def steps() -> Steps[None]:
            yield "select pg_advisory_xact_lock(?, ?)", (self.settings.lock_class, _TOKEN)
            ended = yield from services.ended(service)
            if ended:
                return
            yield from queues.claim(service, policy.get("queues", ()))
            row = yield from one("select policy from unlost_service where name = ?", (service,))
            if row is None:
                sql = "insert into unlost_service (name, policy, created) values (?, ?, ?)"
                yield sql, (service, text, self.world.now())
            elif row[0] != text:
                yield from self._check_policy(service, _json.decode(row[0]), policy)
                yield "update unlost_service set policy = ? where name = ?", (text, service)
            for topic in topics:
                yield from rows.pin(service, topic)

        end = asyncio.get_running_loop().time() + DEATH_SECONDS
        while True:
            try:
                await self.client.commit(steps)
                return
            except StillRunning:
                if asyncio.get_running_loop().time() > end:
                    raise
            await asyncio.sleep(LOOK_AGAIN_SECONDS)

    def _check_policy(self, service: str, old: dict[str, Any], new: dict[str, Any]) -> Steps[None]:
        """Old and new releases of a service may run side by side, but not with another order policy."""
        if old["on_dead"] == new["on_dead"]:
            return
        living = yield from self._living()
        owners = yield (
            "select distinct owner from unlost_progress where service = ? and owner is not null", (service,),
        )  # fmt: skip
        if any(owner in living for (owner,) in owners):
            raise StillRunning(
                "UL1131", f"the service {service!r} is running with on_dead={old['on_dead']!r}",
                found=f"this release says on_dead={new['on_dead']!r}",
                fix="stop the old release first: both at once would break the order of keys",
            )  # fmt: skip

    def _living(self) -> Steps[set[str]]:
        found = yield f"select id from unlost_process where number in ({_LIVING})", (self.settings.lock_class,)
        return {id for (id,) in found} | {self.process_id}

    async def take(self, units: Sequence[Unit]) -> Sequence[Taken]:
        def steps() -> Steps[list[Taken]]:
            living = yield from self._living()
            found = {}
            chosen = {unit.service for unit in units}
            yield from services.admit(chosen)
            for unit in sorted(units):
                found[unit] = yield from rows.take(unit, self.process_id, os.getpid(), living, self.world.now())
            yield from services.admit(chosen)  # whoever has ended it meanwhile had locked these rows
            return [found[unit] for unit in units]

        return await self.client.commit(steps)

    async def give(self, units: Sequence[tuple[Unit, int]]) -> None:
        def steps() -> Steps[None]:
            for unit, epoch in sorted(units):
                yield (
                    f"update unlost_progress set owner = null, clean = 1 where {rows.UNIT} and epoch = ?",
                    (*unit, epoch),
                )

        for unit, _ in units:
            self._read.pop(unit, None)
        await self.client.commit(steps)

    # --- later -------------------------------------------------------------------------------------------

    async def delay(self, envelopes: Sequence[Envelope]) -> None:
        await self.client.commit(lambda: rows.put(envelopes))

    async def cancel(self, id: str, source: str) -> bool:
        return await self.client.commit(lambda: delayed.cancel(id, source, self.world.now()))

    async def next_due(self) -> int | None:
        return await self.client.read(delayed.next_due(self.world.steady(), self.world.now()))

    async def release(self) -> int:
        def steps() -> Steps[int]:
            (mine,) = yield from one("select pg_try_advisory_xact_lock(?, ?)", (self.settings.lock_class, _LATER_TOKEN))
            found = []
            if mine:  # one at a time, or later ones could be put before earlier ones
                found = yield from delayed.take_due(self.world.steady(), self.world.now())
                yield from rows.put(found)
            return len(found)

        released = await self.client.commit(steps)
        if released:
            self.wake()
        return released

    # --- settling ----------------------------------------------------------------------------------------

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Unit]:
        def steps() -> Steps[list[Unit]]:
            fenced = yield from rows.settle(settlements, self.world.now(), self._mirror)
            return fenced

        try:
            fenced = await self.client.commit(steps)
        except OutcomeUnknown as e:
            if not await self._happened(settlements):
                raise Unavailable(
                    "UL2012", "a commit to the store did not happen", found=str(e), fix="it is tried again"
                ) from e
            fenced = []
        if any(o.publishes or o.state == "dead" for s in settlements for o in s.outcomes):
            self.wake()
        return fenced

    async def _happened(self, settlements: Sequence[Settlement]) -> bool:
        """Whether they are settled. Asked until somebody answers: a guess would settle twice, or not at all."""
        while True:
            try:
                return await self.client.read(rows.happened(settlements))
            except Unavailable as e:
                log.warning("whether a commit happened cannot be read now; asking again: %s", e)
                await asyncio.sleep(ASK_AGAIN_SECONDS)

    def block(self, session: object = None, deadline_seconds: float | None = None) -> Block:
        if session is None:
            return LentBlock(self.client, self.wake, deadline_seconds)
        found = of(session)
        return SessionBlock(found, self._rules(found), self.wake)

    def sync_block(self, session: object = None, deadline_seconds: float | None = None) -> SyncBlock:
        if session is None:
            return SyncLentBlock(self.settings, self._wake_from_thread, deadline_seconds)
        found = of(session)
        return SyncSessionBlock(found, self._rules(found), self._wake_from_thread)

    def _rules(self, session: AnySession) -> Rules:
        if session.dialect == "postgresql":
            return StoreRules(self.settings, self._id)
        return own_rules(session, self.own)

    def hands(self) -> Hands:
        return _NO_HANDS

    async def starting(self, taken: Taken, position: int, waited: bool, alone: bool) -> None:
        if waited or alone:
            await self.client.commit(lambda: rows.starting(taken.unit, taken.epoch, position, waited, alone))

    # --- the outbox --------------------------------------------------------------------------------------

    def outbox(self) -> PostgresOutbox:
        return PostgresOutbox(self.client, self._listener, self)

    def copies(self) -> PostgresCopies:
        return PostgresCopies(self.client, self)

    def wake(self) -> None:
        """Tells the relays that there is something to send: by a call to all machines, unless it is for nobody but us.
        Calls that come together are one."""
        if self.sends_all:
            self._listener.ring()
        elif self._waking is None or self._waking.done():
            self._waking = asyncio.create_task(self._notify())

    def _wake_from_thread(self) -> None:
        with contextlib.suppress(RuntimeError):  # that loop has ended: they look now and then anyway
            self._loop.call_soon_threadsafe(self.wake)

    async def _notify(self) -> None:
        with contextlib.suppress(UnlostError):  # they look now and then anyway
            await self.client.notify()

    # --- reading -----------------------------------------------------------------------------------------

    async def seen(self, service: str, events: Iterable[Inbox]) -> Mapping[tuple[str, str], Known]:
        marks = list(events)
        return await self.client.read(rows.seen(service, marks)) if marks else {}

    async def waiting(self, unit: Unit, key: bytes | None, position: int | None, limit: int) -> Sequence[Waiting]:
        return await self.client.read(rows.waiting(unit, key, position, limit))

    async def held(self, service: str) -> Hold | None:
        return await self.client.read(services.held(service))

    async def requests(self, service: str) -> Sequence[Request]:
        def steps() -> Steps[list[Request]]:
            found = yield (
                "select topic, partition, position, key, request from unlost_shelf "
                "where service = ? and request is not null order by topic, partition, position",
                (service,),
            )
            return [Request(Unit(service, t, p), at, None if k is None else bytes(k), a) for t, p, at, k, a in found]

        return await self.client.read(steps())

    def received(self, taken: Taken, position: int) -> None:
        self._read[taken.unit] = position

    async def progress(self, units: Sequence[Unit]) -> Sequence[Snapshot]:
        def steps() -> Steps[list[Snapshot]]:
            found = yield (
                "select p.service, p.topic, p.partition, p.topic_id, (select count(*) from unlost_progress b "
                "where b.service = p.service and b.topic = p.topic), p.position, p.fated, p.counts, p.digest "
                "from unnest(?::text[], ?::text[], ?::integer[]) as u(service, topic, partition) "
                "join unlost_progress p using (service, topic, partition)",
                rows.units_of(units),
            )
            return [
                Snapshot(
                    unit=Unit(service, topic, partition), topic_id=id, partitions=count, position=position,
                    fated=Runs.decode(bytes(fated)), counts=_decode_counts(counts), digest=digest,
                )
                for service, topic, partition, id, count, position, fated, counts, digest in found
            ]  # fmt: skip

        return await self.client.read(steps())

    async def keep_house(self, starts: Mapping[tuple[str, int], int], resends: Mapping[str, float]) -> None:
        moved = {place: start for place, start in starts.items() if start > 0}
        while moved and await self.client.commit(lambda: rows.forget(moved, resends)) == rows.FORGET_MAX:
            pass  # there may be more: in small commits, so that nobody waits for them

    async def carry_out(self, request: Request, epoch: int) -> CarriedOut:
        def steps() -> Steps[CarriedOut]:
            row = yield from one(f"select epoch from unlost_progress where {rows.UNIT} for update", request.unit)
            if row is None or row[0] != epoch:
                raise rows.fenced(request.unit, row and row[0], epoch)
            carried_out = yield from shelf.carry_out(request, self.world.now())
            return carried_out

        return await self.client.commit(steps)


# The numbers of processes whose session lives, as of now: the server lets go of their locks however they end.
_LIVING = (
    "select objid::bigint from pg_locks where locktype = 'advisory' and classid = ?::integer and objsubid = 2 and granted "
    "and database = (select oid from pg_database where datname = current_database())"
)


class _NoHands:
    """What runs is noted in the tables, where it must be (see `starting`): another machine cannot read our files."""

    def take_up(self, address: int, position: int, alone: bool) -> None:
        return None

    def put_down(self) -> None:
        return None

    def close(self) -> None:
        return None


_NO_HANDS = _NoHands()
