"""App: services, a broker and a store together. The only thing that holds connections."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from unlost import config
from unlost.brokers.connect import connect, is_kafka
from unlost.brokers.port import SURVIVES_ORDER, Broker, Receipt, Survives
from unlost.delivery.context import check_outside_block
from unlost.delivery.later import Releaser, due_of
from unlost.delivery.mirror import Mirror, MirrorRelay, check_template
from unlost.delivery.outbox import Outbox, Place
from unlost.delivery.relay import Relay
from unlost.delivery.service import Service
from unlost.delivery.suspicion import Suspicion
from unlost.delivery.worker import Probe, Worker
from unlost.errors import OutcomeUnknown, UnlostError, UsageError
from unlost.events import Command, Envelope, Event, check_name, seal
from unlost.events.topic import Decoder, Topic, TopicInfo
from unlost.sqlite.file import File
from unlost.sqlite.guards import after_fork
from unlost.store.connect import is_postgres, place_of, postgres, sqlite_path, store_beside, store_id, store_path
from unlost.store.own_sqlite import OwnSqlite, OwnSqliteOutbox
from unlost.store.port import Outbox as SomeOutbox
from unlost.store.port import Store
from unlost.store.queues import two_for_one
from unlost.store.sessions.port import AnySession
from unlost.world import REAL, Deadlines, World, end

if TYPE_CHECKING:
    from unlost.store.postgres.store import PostgresStore

log = logging.getLogger("unlost.app")
T = TypeVar("T")

PUBLISH_SECONDS = 30.0
STOP_SECONDS = 20.0
HOUSE_SECONDS = 60.0
GC_DEFAULT = (700, 10, 10)  # Python 3.11 and 3.12
GC_EVERY = 20_000
RELAY_SECONDS = 5.0  # how long a stop waits for the outbox; what is left then is sent by the next process


class App:
    """Services over a broker.

    - `broker`: a URL; without it `UNLOST_BROKER`, `[tool.unlost]` in pyproject.toml, or the embedded file
      `.unlost/events.db` beside the nearest pyproject.toml.
    - `store`: where the store stands that remembers what became of each event, for brokers other than the embedded one:
      a URL; without it `UNLOST_STORE`, pyproject.toml, or `.unlost/store.db` beside it.
    - `outboxes`: URLs of databases of your own that have an outbox beside that of the store: `sqlite:///shop.db`, or
      `postgresql://…` where the store is something else.
    - `relay`: False leaves what stands in the store's outbox to something else that sends it (Debezium).
    - `topics`: topics with other than 8 partitions, or with a retention.
    - `schema`: a file with the `create table` statements of your own tables in the embedded file
      (its path is relative to the module that makes the App).
    - `name`: the source of events that are published outside handlers; part of their identity.
    - `survives`: what an accepted event must survive; an App is refused a broker that promises less.
    - `mirror_dead`: the name of a topic that gets a copy of each dead letter as well, for tools that read it there:
      `"{topic}.DLT"` or `"{topic}-dlt"`, say; `{service}` may be in it too. The shelf stays what counts. Not with the
      embedded broker.

    Example:
        >>> app = App(Service("billing"), topics=[Topic("order", partitions=32)])
    """

    def __init__(
        self,
        *services: Service,
        broker: str | None = None,
        store: str | None = None,
        outboxes: Sequence[str] = (),
        relay: bool = True,
        topics: Sequence[Topic] = (),
        schema: str | Path | None = None,
        name: str = "app",
        survives: Survives = "process death",
        mirror_dead: str | None = None,
        world: World = REAL,
        probe: Probe | None = None,
    ) -> None:
        for service in services:
            if not isinstance(service, Service):
                raise UsageError(
                    "UL1230", "an App is made of services", found=repr(service), fix="App(billing, shipping)"
                )
        names = [service.name for service in services]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise UsageError("UL1231", "each service of an App has its own name", found=f"twice: {', '.join(twice)}")
        if survives not in SURVIVES_ORDER:
            raise UsageError("UL1232", f"survives is one of: {', '.join(SURVIVES_ORDER)}", found=repr(survives))
        self.services = services
        self.name = check_name("source", name)
        self._check_queues_of(services)
        self._queues: set[str] = set()  # that a service is known for
        self.topics = {topic.name: topic for topic in topics}
        self.world = world
        self.probe = probe
        self.url = ""
        self.broker_url = broker
        self.store_url = store
        self.outboxes = tuple(outboxes)
        self.relay = relay
        self._doors: dict[str, Place] = {}
        self._schema = _schema_text(schema, sys._getframe(1).f_globals.get("__file__"))
        self._survives = survives
        self._mirror_dead = mirror_dead
        if mirror_dead is not None:
            check_template(mirror_dead)
            if not relay:
                raise UsageError(
                    "UL1264", "copies of dead letters are sent by the relay", found="relay=False, mirror_dead=" + repr(mirror_dead),
                    fix="leave one of them out",
                )  # fmt: skip
        self._broker: Broker | None = None
        self._hubs: list[PostgresStore] = []  # outboxes in other databases than the store's
        self._store: Store | None = None
        self._file: File | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._portal: _Portal | None = None
        self._portal_lock = threading.Lock()
        self._pid = 0  # of the process that connected
        self._entered = 0
        self._entering = threading.Lock()
        self._deadlines = Deadlines()
        self._workers: list[Worker] = []
        self._stop: asyncio.Event | None = None

    @staticmethod
    def _check_queues_of(services: Sequence[Service]) -> None:
        queues: dict[str, str] = {}
        for service in services:
            for queue in sorted(service.queues):
                if queue in queues:
                    raise two_for_one(queue, queues[queue], service.name)
                queues[queue] = service.name
        for service in services:
            for topic in sorted(service.topics - service.queues):
                if topic in queues:
                    raise UsageError(
                        "UL1226", f"{topic!r} is a queue of commands, which are for one service",
                        found=f"{service.name} has a handler for events of a topic of that name",
                        fix="give the events another topic, or the commands another queue",
                    )  # fmt: skip

    def __repr__(self) -> str:
        return f"App({', '.join(service.name for service in self.services)})"

    # --- connecting --------------------------------------------------------------------------------------

    async def __aenter__(self) -> App:
        """Connects; runs no service."""
        async with self._gate():
            if self._store is None:
                await self._connect()
            self._entered += 1
        return self

    async def __aexit__(self, *error: object) -> None:
        self._entered -= 1
        async with self._gate():
            if self._entered == 0:
                await self._disconnect()

    @contextlib.asynccontextmanager
    async def _gate(self) -> AsyncIterator[None]:
        """Who enters while another one is still connecting, perhaps in another event loop, shares that connection."""
        while not self._entering.acquire(blocking=False):  # noqa: ASYNC110 - no lock of asyncio serves two event loops
            await asyncio.sleep(0.005)
        try:
            yield
        finally:
            self._entering.release()

    async def _connect(self) -> None:
        for service in self.services:
            service.catalog.check_steps()
        self.url = config.setting("broker", code=self.broker_url).value
        store_url = config.setting("store", code=self.store_url).value
        elsewhere = is_postgres(store_url)
        if store_url and store_url != self.url and self.url.startswith("embedded:") and not elsewhere:
            raise UsageError(
                "UL1233", "the embedded broker keeps everything in its own file, or in PostgreSQL",
                found=f"store {config.hide_secrets(store_url)}", fix="leave UNLOST_STORE empty, or postgresql://…",
            )  # fmt: skip
        if elsewhere:
            postgres(store_url)  # says what is wrong with it before anything is made
        broker, file = await asyncio.to_thread(connect, self.url, world=self.world, store_elsewhere=elsewhere)
        store: Store | None = None
        hubs: list[PostgresStore] = []
        try:
            await broker.open()
            if file is None and not elsewhere:
                file = await asyncio.to_thread(File, store_path(store_url), world=self.world)
            infos = await self._declare(broker)
            if SURVIVES_ORDER.index(broker.abilities.survives) < SURVIVES_ORDER.index(self._survives):
                raise UsageError(
                    "UL1234", f"this App demands that an accepted event survives {self._survives}",
                    found=f"the {broker.abilities.name} broker promises {broker.abilities.survives}",
                    fix="use a replicated broker, or demand less",
                )  # fmt: skip
            log_here = broker.abilities.commits_with_store
            mirror = None if self._mirror_dead is None else Mirror(self._mirror_dead, broker, self.services)
            if elsewhere:
                store = await _postgres_store(store_url, broker, mirror, self.world)
            else:
                assert file is not None
                store = store_beside(file, log_here=log_here, broker=broker.identity, mirror=mirror)
                await store.open()
            await self._open_outboxes(hubs, store, store_url, broker)
            for service in self.services:
                await _check_database(service, store)
            for service in self.services:
                retained = [
                    t for t in sorted(service.topics) if t in self.topics and self.topics[t].retention is not None
                ]
                policy = {"on_dead": service.on_dead, "topics": len(service.topics), "retained": retained}
                if service.queues:
                    policy["queues"] = sorted(service.queues)
                await store.register(service.name, policy, [infos[t] for t in sorted(service.topics)])
            if self._schema:
                await store.prepare(self._schema)
        except BaseException:
            await broker.close()
            for opened in (*hubs, *([store] if store is not None else ())):
                await opened.close()
            if file is not None:
                await asyncio.to_thread(file.close)
            raise
        self._broker, self._store, self._file, self._hubs = broker, store, file, hubs
        self._loop = asyncio.get_running_loop()
        self._pid = os.getpid()
        self._deadlines = Deadlines()  # the timer of an event loop that has ended would never ring

    async def _open_outboxes(self, hubs: list[PostgresStore], store: Store, store_url: str, broker: Broker) -> None:
        """Those that the App names besides the store's own."""
        for url in self.outboxes:
            if not is_postgres(url):
                place = OwnSqlite(sqlite_path(url))
                await asyncio.to_thread(place.prepare)
                store.own[str(place.path)] = place
            elif url != store_url:
                hubs.append(await _postgres_store(url, broker, None, self.world))

    async def _declare(self, broker: Broker) -> dict[str, TopicInfo]:
        """What this App says about its topics must be so; where it says nothing, a topic may be as it is."""
        named = {name for service in self.services for name in service.topics} - set(self.topics)
        there = await broker.topics(named)
        missing = named - {info.name for info in there}
        declared = await broker.declare([*self.topics.values(), *(Topic(name) for name in sorted(missing))])
        return {info.name: info for info in (*there, *declared)}

    async def _disconnect(self) -> None:
        file, self._file = self._file, None
        store, self._store = self._store, None
        hubs, self._hubs = self._hubs, []
        if self._broker is not None:
            await self._broker.close()
        for hub in (*hubs, *([store] if store is not None else ())):
            await hub.close()
        for door in self._doors.values():
            door.close()
        self._broker = self._loop = None
        if file is not None:
            await asyncio.to_thread(file.close)

    @property
    def file(self) -> File:
        """The embedded file (or that of the store beside another broker), while connected."""
        if self._file is None:
            raise _not_connected()
        return self._file

    @property
    def broker(self) -> Broker:
        if self._broker is None:
            raise _not_connected()
        return self._broker

    @property
    def store(self) -> Store:
        if self._store is None:
            raise _not_connected()
        return self._store

    @property
    def decoders(self) -> dict[str, Decoder]:
        """How messages of topics that others write are read, by topic."""
        return {name: topic.decoder for name, topic in self.topics.items() if topic.decoder is not None}

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop that it is connected in; None: it is not."""
        return self._loop

    @property
    def workers(self) -> Sequence[Worker]:
        """Those that run the services now."""
        return self._workers

    @property
    def stopping(self) -> bool:
        return self._stop is not None and self._stop.is_set()

    # --- publishing --------------------------------------------------------------------------------------

    async def publish(
        self,
        event: Event,
        *,
        id: str | None = None,
        occurred_at: datetime | None = None,
        headers: Mapping[str, str] | None = None,
        delay: float | timedelta | None = None,
        at: datetime | None = None,
        deadline: float | timedelta = PUBLISH_SECONDS,
    ) -> Receipt:
        """Publishes one event and returns when it is durable.

        With `delay` (seconds or timedelta) or `at` (a time with its zone) it stands in the store until then, and a running
        App with this store releases it; `cancel` takes it back before that. It leaves never early, and in the order of the
        due times; a change of the machine's clock moves `at`, and does not move `delay` while a process lives.

        **Guarantee** the receipt proves that the event survives what the broker declares.
        **After a crash** before the return, or after `OutcomeUnknown`, publish again with the same id: at most a
        duplicate, which effectively-once handlers never see.

        Raises:
            Unavailable: surely not accepted; retrying is safe.
            OutcomeUnknown: the deadline passed, or the call was cancelled.
            UsageError: the event cannot be published; it never will be.
        """
        now = self.world.now()
        envelope = seal(
            event, source=self.name, id=id, occurred_at=occurred_at, headers=headers, command=False,
            due=due_of(self.world, delay, at), now=now,
        )  # fmt: skip
        return (await self._accept([envelope], deadline))[0]

    async def send(
        self,
        command: Command,
        *,
        id: str | None = None,
        headers: Mapping[str, str] | None = None,
        delay: float | timedelta | None = None,
        at: datetime | None = None,
        deadline: float | timedelta = PUBLISH_SECONDS,
    ) -> Receipt:
        """Sends a command to the one service that carries it out, and returns when it is durable in its queue; with `delay`
        or `at` in the store, until it is due (see `publish`).

        It waits there while that service is away. Commands of one key are carried out one after another, in the order in
        which they were sent; those of a class without a key are one such group.

        **Guarantee** as for `publish`: the receipt proves that it survives what the broker declares.
        **After a crash** before the return, or after `OutcomeUnknown`, send it again with the same id: an effectively-once
        handler carries it out once.

        Raises:
            Unavailable: surely not accepted; retrying is safe.
            OutcomeUnknown: the deadline passed, or the call was cancelled.
            UsageError: the command cannot be sent, or no service has ever been there for its queue.

        Example:
            >>> await app.send(SendReceipt(customer_id="c-7"), id="receipt-A1")  # doctest: +SKIP
        """
        envelope = seal(
            command, source=self.name, id=id, headers=headers, command=True, due=due_of(self.world, delay, at),
            now=self.world.now(),
        )  # fmt: skip
        await self.check_queue(envelope.topic)
        return (await self._accept([envelope], deadline))[0]

    async def cancel(self, delayed: Receipt | str, *, source: str | None = None) -> bool:
        """Takes back an event or a command that is delayed; False: it is too late, it has left (or never was).

        `delayed` is its receipt or its id. One that a handler has published comes from its service: `source="billing"`.

        **Guarantee** after True it never leaves; that it was cancelled is written down with its id.
        **After a crash** before the return it was cancelled or not; asking again is harmless.

        Raises:
            Unavailable: surely not cancelled. OutcomeUnknown: nobody can say.

        Example:
            >>> receipt = await app.send(RemindCustomer(customer_id="c-7"), delay=86_400)  # doctest: +SKIP
            >>> await app.cancel(receipt)  # doctest: +SKIP
            True
        """
        id = delayed.id if isinstance(delayed, Receipt) else delayed
        if not isinstance(id, str):
            raise UsageError("UL1285", "cancel takes a receipt or an id", found=repr(delayed))
        for store in (self.store, *self._hubs):
            if await store.cancel(id, self.name if source is None else source):
                return True
        return False

    def cancel_sync(self, delayed: Receipt | str, *, source: str | None = None) -> bool:
        """The same as `cancel` for code without an event loop."""
        return self._blocking(lambda: self.cancel(delayed, source=source), "cancel")

    async def check_queue(self, queue: str) -> None:
        """Where it can be known that nobody has ever carried out the commands of a queue, that is a mistake in a name."""
        if queue in self._queues or any(queue in service.queues for service in self.services):
            return
        if not self.broker.abilities.commits_with_store and not is_postgres(self.store_setting):
            return  # the store beside this broker is that of this machine: services of others are not in it
        if await self.store.service_of(queue) is None:
            raise UsageError(
                "UL1247", f"no service carries out the commands of the queue {queue!r}", found="nothing was sent",
                fix="start the service that has a handler for them once; from then on they wait for it while it is away",
            )  # fmt: skip
        self._queues.add(queue)

    async def publish_all(
        self,
        events: Sequence[Event],
        *,
        ids: Sequence[str] | None = None,
        deadline: float | timedelta = PUBLISH_SECONDS,
    ) -> Sequence[Receipt]:
        """Publishes events as one durable batch: all or none. Receipts come in the order of the events.

        With `ids`, one for each event, the batch can be published again after `OutcomeUnknown`.
        """
        if ids is not None and len(ids) != len(events):
            raise UsageError("UL1240", "publish_all takes one id for each event", found=f"{len(ids)} for {len(events)}")
        now = self.world.now()
        sealed = [
            seal(event, source=self.name, id=None if ids is None else ids[n], command=False, now=now)
            for n, event in enumerate(events)
        ]
        return await self._accept(sealed, deadline)

    def publish_sync(
        self,
        event: Event,
        *,
        id: str | None = None,
        occurred_at: datetime | None = None,
        headers: Mapping[str, str] | None = None,
        delay: float | timedelta | None = None,
        at: datetime | None = None,
        deadline: float | timedelta = PUBLISH_SECONDS,
    ) -> Receipt:
        """The same as `publish` for code without an event loop: scripts, sync views, sync handlers.

        Connects by itself if need be, and stays connected until `close` or the end of the process.
        """
        return self._blocking(
            lambda: self.publish(
                event, id=id, occurred_at=occurred_at, headers=headers, delay=delay, at=at, deadline=deadline
            ),
            "publish",
        )

    def send_sync(
        self,
        command: Command,
        *,
        id: str | None = None,
        headers: Mapping[str, str] | None = None,
        delay: float | timedelta | None = None,
        at: datetime | None = None,
        deadline: float | timedelta = PUBLISH_SECONDS,
    ) -> Receipt:
        """The same as `send` for code without an event loop."""
        return self._blocking(
            lambda: self.send(command, id=id, headers=headers, delay=delay, at=at, deadline=deadline), "send"
        )

    def close(self) -> None:
        """Ends the connection that `publish_sync`, `send_sync` or `cancel_sync` has made, if one has; the next call
        connects again. Where the process ends anyway, nobody needs it.

        **Guarantee** what these calls returned is durable, closed or not. A connection that `async with` or `serve` uses as
        well stays.
        """
        with self._portal_lock:
            if self._portal is not None and self._entered == 1 and os.getpid() == self._pid:
                portal, self._portal = self._portal, None
                portal.close(self)

    def _blocking(self, call: Callable[[], Coroutine[Any, Any, T]], verb: str) -> T:
        check_outside_block()
        try:
            running: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is not None:
            raise UsageError(
                "UL1236", f"{verb}_sync would block this event loop", fix=f"inside async code: await app.{verb}(…)"
            )
        if self._loop is not None and os.getpid() != self._pid:
            raise after_fork()  # the thread that would answer is the parent's
        loop = self._loop or self._own_loop()
        return asyncio.run_coroutine_threadsafe(call(), loop).result()

    def outbox(self, connection: object) -> Outbox:
        """Events in a transaction of yours, outside of handlers: a web request, a script.

        `connection` is a connection or session of psycopg, SQLAlchemy 2, Django or sqlite3, inside its transaction; sync
        ones with `with`, async ones with `async with`. Works in processes that run no service, and without `async with
        app`; a running App sends.

        **Guarantee** what you write and the events are committed together, or not at all.
        **After a crash** before the commit nothing happened; after it, the events are sent by whichever relay lives.

        Raises:
            UsageError: an unknown kind of connection; no transaction; a database that no relay looks at.

        Example:
            async with session.begin(), app.outbox(session) as outbox:
                session.add(order)
                outbox.publish(OrderPlaced(order_id=order.id))
        """
        return Outbox(connection, self._door, source=self.name, world=self.world)

    @property
    def store_setting(self) -> str:
        """The URL of the store, or empty; whoever named it."""
        return self._store_from_outside if self.store_url is None else self.store_url

    @cached_property
    def _store_from_outside(self) -> str:
        return config.setting("store").value

    def _door(self, session: AnySession, path: str) -> Place:
        """The outbox of a session's database."""
        if session.dialect == "sqlite":
            known = {str(sqlite_path(url)): url for url in self.outboxes if not is_postgres(url)}
            url = known.get(str(Path(path).resolve())) if path else None
        else:
            store = self.store_setting
            url = next((u for u in (store, *self.outboxes) if is_postgres(u)), None)
        if url is None:
            found = path or "a database in memory"
            if session.dialect == "postgresql":
                found = f"the store is {config.hide_secrets(store) or 'a file'}, and no other PostgreSQL is named"
            raise UsageError(
                "UL1262", "no relay looks at this database: its events would stay in it", found=found,
                fix="UNLOST_STORE=postgresql://… if it is the store's; else App(outboxes=['sqlite:///path/shop.db']) or "
                "App(outboxes=['postgresql://…'])",
            )  # fmt: skip
        # no lock: a fork may come at any time
        return self._doors.get(url) or self._doors.setdefault(url, place_of(url))

    async def accept(self, envelopes: Sequence[Envelope]) -> Sequence[Receipt]:
        """Publishes ready-made envelopes (for tools; programs publish typed events)."""
        return await self._accept(envelopes, PUBLISH_SECONDS)

    async def _accept(self, envelopes: Sequence[Envelope], deadline: float | timedelta) -> Sequence[Receipt]:
        check_outside_block()
        broker = self.broker
        if not envelopes:
            return []
        seconds = deadline.total_seconds() if isinstance(deadline, timedelta) else deadline
        ours = asyncio.get_running_loop() is self._loop
        limit = (self._deadlines if ours else Deadlines()).start(seconds)
        try:
            if any(e.due is not None for e in envelopes):
                return await self._delay(envelopes)
            return await broker.publish(envelopes)
        except asyncio.CancelledError:
            late = limit.passed()
            raise _outcome_unknown(
                envelopes, f"no answer within {seconds:g} s" if late else "the call was cancelled"
            ) from None
        finally:
            limit.end()

    async def _delay(self, envelopes: Sequence[Envelope]) -> Sequence[Receipt]:
        for envelope in envelopes:
            self.broker.check(envelope)
        await self.store.delay(envelopes)
        now = self.world.now()
        return [Receipt(id=e.id, topic=e.topic, partition=-1, position=-1, recorded=now, due=e.due) for e in envelopes]

    def _own_loop(self) -> asyncio.AbstractEventLoop:
        with self._portal_lock:
            if self._portal is None:
                self._portal = _Portal(self)
            return self._portal.loop

    # --- running -----------------------------------------------------------------------------------------

    async def serve(self, services: Sequence[str] | None = None, *, ready: Callable[[], None] | None = None) -> None:
        """Runs the services (all, or those named) inside another program, until `stop` or a failure."""
        chosen = self.chosen(services)
        async with self:
            suspicion = Suspicion()
            workers = [
                Worker(
                    service, self.broker, self.store, world=self.world, probe=self.probe, suspicion=suspicion,
                )
                for service in chosen
            ]  # fmt: skip
            await self.work(workers, ready=ready)

    async def work(self, workers: Sequence[Worker], *, ready: Callable[[], None] | None = None) -> None:
        """Runs these, while connected, until `stop` or a failure; with all that a running App does beside its services."""
        self._stop = asyncio.Event()
        self._workers = list(workers)
        tasks = [asyncio.create_task(worker.run(), name=f"unlost-{worker.service.name}") for worker in workers]
        stop = asyncio.create_task(self._stop.wait())
        broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.store.on_broken = _report_to(broken)
        waited_for: list[asyncio.Future[Any]] = [*tasks, stop, broken]
        house = asyncio.create_task(self._keep_house(workers))
        relays = not self.broker.abilities.commits_with_store or self._hubs or self.store.own
        relaying = asyncio.create_task(self._relay()) if relays else None
        later = [asyncio.create_task(Releaser(s, self.world).run()) for s in (self.store, *self._hubs)]
        waited_for += later
        if relaying is not None:
            waited_for.append(relaying)
        try:
            if ready is not None:
                ready()
            await asyncio.wait(waited_for, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await asyncio.gather(*(worker.stop(STOP_SECONDS) for worker in workers), return_exceptions=True)
            await end(stop, house, *later)
            tasks += later
            if relaying is not None:
                await _stop_relaying(relaying)
                tasks.append(relaying)
            if tasks:
                await asyncio.wait(tasks, timeout=STOP_SECONDS)
                await end(*tasks)  # one that still joins a group that does not answer
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            self._workers = []
        for error in (*ended, self.store.broken):
            if isinstance(error, BaseException) and not isinstance(error, asyncio.CancelledError):
                raise error

    async def _relay(self) -> None:
        """Empties the outboxes, as long as the services run, sharing that with other processes; then once more."""
        found = [self.store.outbox() if self.relay else None, *(hub.outbox() for hub in self._hubs)]
        outboxes: list[SomeOutbox] = [outbox for outbox in found if outbox is not None]
        outboxes += [OwnSqliteOutbox(place) for place in self.store.own.values() if isinstance(place, OwnSqlite)]
        copies = self.store.copies()
        relays: list[Relay | MirrorRelay] = [Relay(outbox, self.broker) for outbox in outboxes]
        if copies is not None:
            relays.append(MirrorRelay(copies, self.broker))
        running = [asyncio.create_task(relay.run()) for relay in relays]
        try:
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for failed in [task for task in running if task.done()]:
                await failed
        except asyncio.CancelledError:  # what the last handlers have published
            if not any(task.done() for task in running):
                ours = [await outbox.claim() for outbox in outboxes]
                last = [relay for relay, our in zip(relays, [*ours, any(ours)], strict=False) if our]
                await asyncio.gather(*(relay.finish(RELAY_SECONDS) for relay in last))
        finally:
            await end(*running)
            for outbox in outboxes:
                with contextlib.suppress(UnlostError):  # others see that we are gone
                    await outbox.give()
                await outbox.close()
            if copies is not None:
                await copies.close()

    async def _keep_house(self, workers: Sequence[Worker]) -> None:
        """Nothing is trimmed before the broker knows where each service is."""
        for worker in workers:
            await worker.joined.wait()
        while True:
            try:
                await self.broker.keep_house()
                if not self.broker.abilities.commits_with_store:
                    topics = {topic for service in self.services for topic in service.topics}
                    infos = await self.broker.topics(topics)
                    starts = {(t.name, n): start for t in infos for n, (start, _) in enumerate(t.ranges)}
                    await self.store.keep_house(starts, {s.name: s.resends or 0.0 for s in self.services})
            except UnlostError as e:
                log.error("housekeeping failed; it is tried again: %s", e)
            await asyncio.sleep(HOUSE_SECONDS)

    def stop(self) -> None:
        """Asks `serve` to finish: handlers in progress end or are given back, nothing is dropped."""
        if self._stop is not None:
            self._stop.set()

    def run(self, services: Sequence[str] | None = None) -> None:
        """Runs the services until SIGTERM or Ctrl-C, then finishes what is in hand and leaves."""
        self.until_signal(lambda: self.serve(services, ready=lambda: self._announce(services)))

    def until_signal(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Runs this in an event loop of its own, where SIGTERM and Ctrl-C mean `stop`."""

        async def main() -> T:
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._signalled, number)
            return await work()

        _collect_less()
        return asyncio.run(main())

    def _signalled(self, number: int) -> None:
        if self._stop is None or self._stop.is_set():
            os._exit(128 + number)  # the second time: at once; nothing is lost by that either
        self.stop()

    def _announce(self, services: Sequence[str] | None) -> None:
        names = ", ".join(service.name for service in self.chosen(services))
        where = self.store.place
        if is_kafka(self.url):
            where = f"{config.hide_secrets(self.url)}, store {where}"
        elif not self.broker.abilities.commits_with_store:
            where = f"{self.file.path}, store {where}"
        print(f"unlost: {names} on {where}", file=sys.stderr, flush=True)

    def chosen(self, names: Sequence[str] | None = None) -> list[Service]:
        """The services of these names, or all.

        Raises:
            UsageError: there is no such service.
        """
        known = {service.name: service for service in self.services}
        for name in names or ():
            if name not in known:
                raise UsageError(
                    "UL1237", f"this App has no service {name!r}", found=f"it has {', '.join(known) or 'none'}"
                )
        return [known[name] for name in names] if names else list(self.services)


def _collect_less() -> None:
    """In a process of our own: what was imported is not looked through again, and thousands of events in hand are
    normal. Left alone where somebody has set it."""
    if gc.get_threshold() == GC_DEFAULT:
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_EVERY, *GC_DEFAULT[1:])


async def _stop_relaying(relaying: asyncio.Task[None]) -> None:
    relaying.cancel()
    await asyncio.wait([relaying])


class _Portal:
    """An event loop in its own thread, for `publish_sync` in programs that have none."""

    def __init__(self, app: App) -> None:
        self.loop = asyncio.new_event_loop()
        started: concurrent.futures.Future[None] = concurrent.futures.Future()

        async def connect() -> None:
            try:
                await app.__aenter__()
            except BaseException as e:
                await self.loop.shutdown_default_executor()
                self.loop.stop()
                started.set_exception(e)
            else:
                started.set_result(None)

        def run() -> None:
            asyncio.set_event_loop(self.loop)
            connecting = self.loop.create_task(connect())
            self.loop.run_forever()
            del connecting
            self.loop.close()  # it could not connect, or is not needed any more: the next call makes another one

        self.thread = threading.Thread(target=run, name="unlost-portal", daemon=True)
        self.thread.start()
        started.result()

    def close(self, app: App) -> None:
        async def leave() -> None:
            calls = asyncio.all_tasks() - {asyncio.current_task()}  # of other threads, which wait for their answers
            try:
                await app.__aexit__()
            finally:
                if calls:
                    await asyncio.wait(calls, timeout=STOP_SECONDS)
                    await end(*calls)
                await self.loop.shutdown_default_executor()

        try:
            asyncio.run_coroutine_threadsafe(leave(), self.loop).result()
        finally:
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join()


async def _postgres_store(url: str, broker: Broker, mirror: Mirror | None, world: World) -> PostgresStore:
    settings = postgres(url)
    from unlost.store.postgres.store import PostgresStore

    store = PostgresStore(settings, broker=broker.identity, mirror=mirror, world=world)
    await store.open()
    return store


async def _check_database(service: Service, store: Store) -> None:
    """Effects once means: the handlers' rows and the mark "handled" are one commit. So they are one database."""
    once = [h.name for h in service.handlers.values() if h.guarantee == "effectively-once"]
    if not service.database or not once:
        return
    if not is_postgres(service.database):
        if str(sqlite_path(service.database)) in store.own:
            return
        found = "a SQLite file that this App does not know"
        fix = f"App(outboxes=[{service.database!r}]): inbox and outbox are in that file then"
    else:
        id = await asyncio.to_thread(store_id, service.database)
        if id == store.id:
            return
        found = f"its data are in {config.hide_secrets(service.database)} ({'store ' + id if id else 'no tables of unlost'})"
        fix = "point UNLOST_STORE at the service's database, or use at-least-once and an idempotency key"
    raise UsageError(
        "UL1263", f"{service.name!r} has effectively-once handlers whose database is not the store's", found=f"{found}; the store is "
        f"{store.place}", fix=fix,
    )  # fmt: skip


def _report_to(future: asyncio.Future[None]) -> Callable[[UnlostError], None]:
    loop = future.get_loop()

    def set_once() -> None:
        if not future.done():
            future.set_result(None)

    def report(_error: UnlostError) -> None:
        with contextlib.suppress(RuntimeError):  # that loop has ended: nobody serves any more
            loop.call_soon_threadsafe(set_once)

    return report


def _schema_text(schema: str | Path | None, module_file: str | None) -> str:
    if schema is None:
        return ""
    path = Path(schema)
    if not path.is_absolute() and module_file:
        path = Path(module_file).resolve().parent / path
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError("UL1238", "the schema file cannot be read", found=str(e)) from e


def _not_connected() -> UsageError:
    return UsageError("UL1239", "this App is not connected", fix="use it inside `async with app:`")


def _outcome_unknown(envelopes: Sequence[Envelope], found: str) -> OutcomeUnknown:
    ids = ", ".join(e.id for e in envelopes[:3]) + (" …" if len(envelopes) > 3 else "")
    return OutcomeUnknown(
        "UL2020", "nobody can say whether the event was accepted", found=f"{found}; id {ids}",
        fix="publish it again with the same id: at most a duplicate, which effectively-once handlers never see",
    )  # fmt: skip
