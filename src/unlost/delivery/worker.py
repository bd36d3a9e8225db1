"""One service at work in one process. `deliver` is the whole story of an event; the rest serves it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import heapq
import inspect
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from datetime import datetime, timedelta
from typing import Any, TypeVar

import msgspec

from unlost.brokers.port import Ack, Arrivals, Assigned, Broker, Gone, Lost, Member, Revoked, Saved
from unlost.delivery import note
from unlost.delivery.context import AlreadyHandled, Context
from unlost.delivery.fate import (
    DONE,
    Abandoned,
    Dead,
    Done,
    Fate,
    HandlerTimeout,
    RetryAt,
    RetryLater,
    Skip,
    decide,
    decide_once,
    describe,
    spent,
)  # fmt: skip
from unlost.delivery.lanes import Delivery, Lane, Owned, Plain
from unlost.delivery.later import due_of
from unlost.delivery.outage import PROBE_SECONDS, Outage
from unlost.delivery.service import Handler, Service
from unlost.delivery.settle import Settler
from unlost.delivery.suspicion import Suspicion
from unlost.errors import Damaged, Fenced, Misconfigured, Unavailable, Undecodable, UnlostError, UsageError
from unlost.events import Envelope, Event, content_hash, event_hash, key_of, try_decode
from unlost.events.topic import ERASED, Arrival, Gap, Unit
from unlost.store.port import (
    Attempt,
    Block,
    Death,
    Hands,
    Hold,
    Inbox,
    Known,
    Outcome,
    Settlement,
    State,
    Store,
    SyncBlock,
    Taken,
    Waiting,
)
from unlost.store.services import refused
from unlost.world import REAL, World

log = logging.getLogger("unlost.worker")
T = TypeVar("T")

IN_HAND_MAX = 1024  # events of one unit that are received and not yet durable
IN_HAND_BYTES_MAX = 16 * 1024 * 1024
ASIDE_MAX = 100_000  # events of one unit in the waiting room and on the shelf
SHORT_WAIT_SECONDS = 5.0  # a retry that waits longer is kept in the store, so that the position moves on
SLEEPING_MAX = 256  # keys of one unit that wait in memory
RUNNERS_MAX = 1024
ROUTES_MAX = 10_000  # types of events; whoever makes them up gets no memory
RECENT_MAX = 50_000  # more than a process can have in hand: what is older is in the inbox when it is asked
LOAD_MAX = 64  # rows of the waiting room in one read
REQUESTS_SECONDS = 0.25  # how often operators' requests are looked for
ACK_SECONDS = 1.0  # how often the broker is told how far its log was handled, where it keeps that
AGAIN_SECONDS = 0.5  # between two attempts at what the world refused
WATCH_SECONDS = 0.05  # precision of deadlines
STALLED_SECONDS = 30.0  # a handler so long past its deadline, or outcomes that wait so long for the store, stand still
SAVE_SECONDS = 10.0  # how long a stop waits for the store
CANCEL_AGAIN_SECONDS = 1.0
CANCELLED_SECONDS_MAX = 2.0  # how long a cancelled handler may take to end when the service stops
CANCELS_MAX = 10
LANES_KEPT = 10_000  # of one unit: a key that comes again finds its lane
YIELD_EVERY = 32  # deliveries of one runner before others get their turn
SWIFT_MIN = 8  # events of one unit that are begun in one commit, where none is delivered again
SWIFT_MAX = 128
SWIFT_ROUNDS = 8  # batches of one unit before another one gets the runner
SLOW_SECONDS = 0.002  # per event: handlers that take longer than this do not run one after another
SLOW_AGAIN_SECONDS = 10.0
SPARE_THREADS = 32  # for sync handlers that outlive their deadline: a thread cannot be stopped

Probe = Callable[[str, Delivery], None]


class Worker:
    """Runs one service until it is stopped.

    **Guarantee** an event leaves the service's hands only with a durable outcome.
    **After a crash** another process of the service takes its units and delivers again what was not settled.
    """

    def __init__(
        self,
        service: Service,
        broker: Broker,
        store: Store,
        *,
        world: World = REAL,
        probe: Probe | None = None,
        suspicion: Suspicion | None = None,
        acts_for: str = "",
        through: Callable[[Member], Member] | None = None,
    ) -> None:
        """`acts_for`: it replays what was that service's, with its handlers and in its name; the books are this one's own.
        `through` stands between it and its membership."""
        self.service = service
        self._acts_for = acts_for
        self._through = through
        self.world = world
        self.probe = probe
        self.owned: dict[Unit, Owned] = {}
        self.delivered = 0
        self.hold: Hold | None = None  # paused by an operator: nothing is received, and nothing new is begun
        self._broker = broker
        self._store = store
        self._settler = Settler(store, self._on_durable, self._on_fenced)
        self._keyless: set[tuple[str, str]] = set()  # topics and types whose events came without their key
        self._ready: deque[Lane] = deque()
        self._idle: deque[asyncio.Future[None]] = deque()
        self._running: dict[int, _Running] = {}
        self._active: dict[str, int] = dict.fromkeys((h.name for h in service.handlers.values()), 0)
        self._held: dict[str, deque[Lane]] = {name: deque() for name in self._active}
        self._routes: dict[str | None, tuple[Handler | None, type[Event] | None]] = {}
        self._timers: list[tuple[int, int, Lane]] = []
        self._timer_set = asyncio.Event()
        self._timer_count = 0
        self._suspicion = suspicion or Suspicion()  # one for all services of this process
        self._suspicion.parties.append(self)
        self.joined = asyncio.Event()  # the broker knows where its service is, and keeps what it needs
        self._stopping = False
        self._leaving = asyncio.Event()
        self._tells = not broker.abilities.commits_with_store
        self._outage = Outage(service.name)
        self._member: Member | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._threads: ThreadPoolExecutor | None = None
        self._failure: asyncio.Future[None] | None = None
        self._slow_until = (
            0.0  # until then, handlers that get events at most once are too slow to run one after another
        )
        self._seen_settled = (-1, 0.0)  # how many outcomes were settled when somebody looked, and since when
        self._recent: dict[
            tuple[str, str], tuple[Owned, int]
        ] = {}  # handled by this process lately, perhaps not yet durable

    # --- the story ---------------------------------------------------------------------------------------

    async def deliver(self, d: Delivery, run: _Running) -> None:
        """One attempt to handle one event: decode, deduplicate, handle, decide, settle.

        Dying on any line of it leaves the event unsettled in the log (or in the waiting room), to be delivered
        again; only the store's commit in `settle` (or in the handler's own transaction) ends it.
        """
        if self.probe is not None:
            self.probe("received", d)
        handler, ctx = d.handler, None
        fate: Fate | None = None
        if d.waited and handler is self._none:
            fate = Skip("no handler")
        elif d.arrival.rule:  # by a decoder that was another one when the event came
            fate = Skip(d.arrival.rule)
        elif d.attempts:
            fate = spent(d.attempts, handler.retry)
        error: BaseException | None = None
        if fate is None:
            try:
                event = self._decode(d)
                if handler.turns_away:
                    fate = self._turned_away(d, event)
                if fate is None:
                    if handler.guarantee == "at-most-once" and not d.begun:
                        await self._begin(d)
                    if handler.takes_context:
                        ctx = self._context(d)
                    error = await self._handle(d, event, ctx, run)
            except (Exception, SystemExit, GeneratorExit) as e:
                error = e
        if self.probe is not None:
            self.probe("handled", d)
        if ctx is not None and ctx.transaction_used is not None and ctx.transaction_used.finished:
            failed = await ctx.transaction_used.settled()
            if failed is None:
                self._ended_by_transaction(d, ctx, error)
                return
            error = failed
        elif error is not None and ctx is not None and ctx.transaction_used is not None:
            error = ctx.transaction_used.meaning(error)
        if error is not None and d.looked and ctx is not None and ctx.transaction_used is not None:
            error = await self._look_again(d, error)
        if isinstance(error, AlreadyHandled):
            fate = _repeated(self._inbox(d), error.known, d)
        if isinstance(error, Misconfigured):
            raise error
        if isinstance(error, Fenced):
            self._on_fenced(d.lane.owned)
            return
        if fate is None and d.begun:
            fate = decide_once(error)
        elif fate is None and error is None and not self._outage.suspected:
            fate = DONE  # what `decide` says of no error
        elif fate is None:
            fate = decide(
                error,
                len(d.attempts) + 1,
                handler.retry,
                now=self.world.steady(),
                chance=self.world.random.random(),
            )
            fate = self._outage.judge(handler.name, fate, self.world.steady())
        if fate is DONE and ctx is None and not (d.waited or d.attempts) and handler.guarantee == "at-least-once":
            self._take_from_lane(d)  # nothing follows from it: many such events are settled as one
            owned = d.lane.owned
            owned.put = self._settler.done(owned, d.arrival.position, d.event_hash, d.size)
        else:
            self._settle(d, fate, error, ctx)

    def _decode(self, d: Delivery) -> Any:
        if d.cls is None:
            raise _no_event(d.arrival.problem)
        arrival = d.arrival
        if arrival.simple:
            event = try_decode(arrival.data, d.cls)
            if event is not None:
                return event
        envelope = arrival.envelope
        if envelope is None:
            raise _no_event(arrival.problem)
        return self.service.catalog.decode(envelope, d.cls)

    def _turned_away(self, d: Delivery, event: Any) -> Fate | None:
        """Duplicates, and what the handler's own rule does not want."""
        if d.handler.guarantee == "effectively-once":
            inbox = self._inbox(d)
            known = d.seen if d.seen is not None else self._recall(inbox)
            if known is not None:
                return _repeated(inbox, known, d)
            if self.service.resends is not None and d.arrival.envelope is not None and not d.waited:
                refused = _too_old(d.arrival.envelope, self.service.resends, self.world.now())
                if refused is not None:
                    return refused
        if d.handler.where is not None and not d.handler.where(event):
            return Skip("where")
        return None

    def _context(self, d: Delivery) -> Context:
        envelope = d.arrival.envelope
        assert envelope is not None
        return Context(
            envelope,
            service=self._acts_for or self.service.name,
            handler=d.handler.name,
            attempt=len(d.attempts) + 1,
            now=self.world.now(),
            unit=_DeliveryUnit(self, d),
            replaying=bool(self._acts_for),
        )

    async def _handle(self, d: Delivery, event: Any, ctx: Context | None, run: _Running) -> BaseException | None:
        """Calls the handler; whatever it raises is its outcome. Only our own stopping goes through."""
        handler = d.handler
        args = (event, ctx) if handler.takes_context else (event,)
        if d.waited or self._suspicion.count:
            await self._insist(
                self._store.starting, d.lane.owned.taken, d.position, d.waited, self._suspicion.count > 0
            )
        run.begin(d, self.world.monotonic(), self._suspicion.count > 0)
        if self.probe is not None:
            self.probe("started", d)
        error: BaseException | None = None
        try:
            if handler.is_async:
                await handler.function(*args)
            else:
                await self._in_thread(handler, args)
        except KeyboardInterrupt:
            raise
        except BaseException as e:
            error = e  # whoever cancelled it: that is a failure, not a success
        finally:
            late = run.end()
        return await self._concluded(d, error, late, ctx, run)

    async def _concluded(
        self, d: Delivery, error: BaseException | None, late: bool, ctx: Context | None, run: _Running
    ) -> BaseException | None:
        """What to make of how a handler has ended."""
        handler = d.handler
        if run.cancelled:
            await run.shake_off()
        if error is None and not late and ctx is None:
            return None
        if run.given_up and error is not None:
            if ctx is not None:
                ctx.close("the service stops")
            raise asyncio.CancelledError  # whatever it made of our cancellation is no attempt
        if late and ctx is not None and ctx.waits_for_store:
            error = Unavailable("UL2011", "the deadline passed while the store could not be written", found=str(d))
        elif late:
            error = HandlerTimeout(f"no result within its deadline of {handler.deadline:g} s")
        if ctx is not None:
            ctx.close("its handler has ended" if error is None else f"its attempt failed: {describe(error)}")
        return error

    async def _in_thread(self, handler: Handler, args: tuple[Any, ...]) -> None:
        if self._threads is None:
            width = sum(h.concurrency for h in set(self.service.handlers.values())) + SPARE_THREADS
            self._threads = ThreadPoolExecutor(width, thread_name_prefix=f"unlost-{self.service.name}")
        call = functools.partial(copy_context().run, _caught, handler.function, args)
        result, error = await asyncio.get_running_loop().run_in_executor(self._threads, call)
        if error is not None:
            raise error
        if inspect.isawaitable(result):
            await result
        elif inspect.isgenerator(result) or inspect.isasyncgen(result):
            raise UsageError("UL1214", "a handler is no generator: nothing of it would run", found=handler.name)

    def _settle(self, d: Delivery, fate: Fate, error: BaseException | None, ctx: Context | None) -> None:
        """Hands the outcome to the settler, and moves the lane on."""
        lane, owned = d.lane, d.lane.owned
        outcome = Outcome(
            arrival=d.arrival,
            state="done",
            event_hash=d.event_hash,
            waited=d.waited,
            begun=d.begun,
            attempts=d.attempts,
        )
        if isinstance(fate, Done):
            outcome.publishes = ctx.published if ctx is not None else ()
            if d.handler.guarantee == "effectively-once":
                outcome.inbox = self._inbox(d)
                self._remember(owned, outcome.inbox)
        elif isinstance(fate, Skip):
            outcome.state, outcome.rule = _state_of(fate.rule), fate.rule
        elif isinstance(fate, RetryAt):
            self._retry(d, fate, error, outcome)
            return
        elif isinstance(fate, Abandoned):
            outcome.state = "abandoned"
            log.error("%s:%d %s is abandoned, for its handler %s gets it at most once: %s", owned.unit, d.position,
                      d.arrival.envelope.type if d.arrival.envelope else "", d.handler.name, fate.error)  # fmt: skip
        else:
            if error is not None:
                outcome.attempts = self._with_attempt(d, error)
            parks = d.handler.on_dead == "park" and lane.key is not None and fate.reason != "id_reused" and not d.begun
            outcome.state = "dead"
            outcome.death = Death(
                handler=d.handler.name, reason=fate.reason, error_type=fate.error_type,
                error=fate.error, stack=fate.stack, parks=parks,
            )  # fmt: skip
            log.error(
                "%s:%d %s is dead (%s): %s", owned.unit, d.position,
                d.arrival.envelope.type if d.arrival.envelope else "undecodable bytes", fate.reason, fate.error,
            )  # fmt: skip
            if parks:
                lane.blocked, lane.due = True, None
        self._take_from_lane(d)
        self._put(lane, outcome)
        if lane.blocked:
            self._park_queue(lane)

    def _retry(self, d: Delivery, fate: RetryAt, error: BaseException | None, outcome: Outcome) -> None:
        """A short wait is held in memory; a longer one, or too many, moves the key into the store."""
        lane, owned = d.lane, d.lane.owned
        if error is not None and fate.spends_attempt:
            d.attempts = outcome.attempts = self._with_attempt(d, error)
        wait = (fate.due - self.world.steady()) / 1e6
        if isinstance(error, RetryLater):
            log.info("%s:%d waits %.1f s: %s", owned.unit, d.position, wait, error)
        elif error is not None:
            log.warning("%s:%d attempt %d failed, next in %.1f s: %s", owned.unit, d.position,
                        len(d.attempts), wait, describe(error))  # fmt: skip
        if wait <= SHORT_WAIT_SECONDS and owned.sleeping < SLEEPING_MAX:
            lane.sleeping = True
            owned.sleeping += 1
            lane.due = fate.due
            outcome.state, outcome.due = ("retrying", fate.due) if d.waited else ("attempted", None)
            self._put(lane, outcome)
            self._set_timer(fate.due, lane)
            return
        outcome.state, outcome.due = "retrying", fate.due
        self._take_from_lane(d)
        lane.stored = lane.blocked = True
        lane.due = fate.due
        self._put(lane, outcome)
        self._park_queue(lane)
        self._set_timer(fate.due, lane)

    def _ended_by_transaction(self, d: Delivery, ctx: Context, error: BaseException | None) -> None:
        """The handler's own transaction has settled the delivery; what came after it cannot undo that."""
        self._outage.succeeded(d.handler.name)
        if error is not None:
            log.error("%s: the handler failed after its transaction was committed; the event is done: %s",
                      self.service.name, describe(error), exc_info=error)  # fmt: skip
        self._take_from_lane(d)
        if d.handler.guarantee == "effectively-once":
            self._remember(d.lane.owned, self._inbox(d))
        assert ctx.transaction_used is not None
        outcome = Outcome(arrival=d.arrival, state="done", event_hash=d.event_hash, waited=d.waited, begun=d.begun)
        if ctx.transaction_used.settles:
            self._on_durable(d.lane.owned, outcome)
        elif d.handler.guarantee == "effectively-once":
            self._settler.later(d.lane.owned, outcome)
        else:  # its consequences are durable: the next transaction of the key need not wait for its position
            self._settler.put(d.lane.owned, outcome)

    def _with_attempt(self, d: Delivery, error: BaseException) -> list[Attempt]:
        return [*d.attempts, Attempt(len(d.attempts) + 1, self.world.now(), describe(error))]

    async def _look_again(self, d: Delivery, error: BaseException) -> BaseException:
        """Its transaction began without a look at the inbox: did it fail because the event was handled meanwhile?"""
        d.looked = False
        if d.handler.guarantee != "effectively-once" or isinstance(error, AlreadyHandled | Misconfigured | Fenced):
            return error
        inbox = self._inbox(d)
        with contextlib.suppress(Unavailable):  # the next attempt will ask
            known = (await self._store.seen(self.service.name, [inbox])).get((inbox.source, inbox.id))
            if known is not None:
                return AlreadyHandled(known)
        return error

    def _inbox(self, d: Delivery) -> Inbox:
        e = d.arrival.envelope
        assert e is not None
        return Inbox(e.id, e.source, content_hash(e.type, e.data))

    def _recall(self, inbox: Inbox) -> Known | None:
        """What was handled under a unit that somebody else took may never have been settled: that does not count."""
        owned, content = self._recent.get((inbox.source, inbox.id), (None, None))
        return None if owned is None or owned.gone or content is None else Known(content)

    def _remember(self, owned: Owned, inbox: Inbox) -> None:
        self._recent[inbox.source, inbox.id] = (owned, inbox.content)
        if len(self._recent) > RECENT_MAX:
            del self._recent[next(iter(self._recent))]

    def _reach(self, step: str, d: Delivery) -> None:
        if self.probe is not None:
            self.probe(step, d)

    # --- at most once ------------------------------------------------------------------------------------

    async def _begin(self, d: Delivery) -> None:
        """Makes it durable that the handler gets this event now, and that nobody gets it again.

        Raises:
            Fenced: the unit is not ours any more.
        """
        owned = d.lane.owned
        if d.waited:
            number = self._settler.put(owned, Outcome(arrival=d.arrival, state="begun", waited=True))
        else:
            number = self._settler.begin(owned, [d.position], d.event_hash)
        await self._settler.flush(number)
        if owned.gone:
            raise Fenced("UL2101", f"{owned.unit} is not ours any more", found=f"our epoch was {owned.epoch}")
        d.begun = True

    @functools.cached_property
    def _at_most_once(self) -> bool:
        """Whether no handler here gets an event again: then their events need no lanes, while handlers are quick."""
        handlers = self.service.handlers.values()
        return all(h.guarantee == "at-most-once" and h.is_async for h in handlers)

    def _swift(self, owned: Owned) -> Lane | None:
        """The lane of all keys, if it is to be used for what comes in now. Never beside others, or a key's order is lost."""
        free = owned.swift is None and not (self._slow or owned.in_hand)
        if free and all(lane.empty for lane in owned.lanes.values()):
            owned.lanes.clear()
            owned.swift = Lane(owned, None, swift=True)
        return owned.swift

    async def _run_swift(self, lane: Lane, run: _Running) -> None:
        """Handles the unit's events one after another. A batch of them is begun in one commit while the batch before it is
        in the handlers, so at most two batches are abandoned if the process dies here.

        A handler that waits for something is better served by lanes, where other keys go on: when one takes long, the
        batches in hand are ended here, and what comes after them goes that way.
        """
        owned, size, rounds = lane.owned, SWIFT_MIN, 0
        batch, number = self._begin_batch(lane, size)
        while batch:
            rounds += 1
            others = bool(self._ready) and rounds >= SWIFT_ROUNDS  # that wait for a runner
            following, following_number = ([], 0) if others else self._begin_batch(lane, size)
            await self._settler.flush(number)
            if owned.gone:
                return
            since = REAL.monotonic()
            await self._handle_batch(owned, batch, run)
            if REAL.monotonic() - since > SLOW_SECONDS * len(batch):
                self._slow_until, size = REAL.monotonic() + SLOW_AGAIN_SECONDS, SWIFT_MIN
            else:
                size = min(2 * size, SWIFT_MAX)
            batch, number = following, following_number
            await self._settler.room()
            await asyncio.sleep(0)
        if self._slow and not (owned.draining or owned.gone):
            owned.swift = None
            while lane.queue:
                d = lane.queue.popleft()
                d.lane = owned.lane(d.arrival.key, d.position)
                d.lane.queue.append(d)
                self._start(d.lane)

    @property
    def _slow(self) -> bool:
        return REAL.monotonic() < self._slow_until

    def _begin_batch(self, lane: Lane, size: int) -> tuple[list[Delivery], int]:
        """The lane's next events, and the settler's number: when that is settled, they may be handled."""
        owned, queue = lane.owned, lane.queue
        if self._slow or self._stopping or self.hold or owned.draining or owned.gone or not queue:
            return [], 0
        batch = [queue.popleft() for _ in range(min(size, len(queue)))]
        digest = 0
        for d in batch:
            digest ^= d.event_hash
        return batch, self._settler.begin(owned, [d.arrival.position for d in batch], digest)

    async def _handle_batch(self, owned: Owned, batch: Sequence[Delivery], run: _Running) -> None:
        """Each of them once. What is not plain takes the way of all others."""
        ended: list[int] = []
        size = 0
        assert run.task is not None
        cancelling = run.task.cancelling
        try:
            for d in batch:
                d.begun = True
                handler = d.handler
                event = None
                if d.arrival.simple and d.cls is not None and handler.plain and not d.attempts and self.probe is None:
                    event = try_decode(d.arrival.data, d.cls)
                if event is None:
                    await self.deliver(d, run)
                    continue
                run.hold(d)
                error: BaseException | None = None
                try:
                    await handler.function(event)
                except KeyboardInterrupt:
                    raise
                except BaseException as e:
                    error = e
                if error is not None or cancelling():
                    error = await self._concluded(d, error, run.unwatch(), None, run)
                    if error is not None:
                        self._settle(d, decide_once(error), error, None)
                        continue
                ended.append(d.arrival.position)
                size += d.size
        finally:
            run.unwatch()
            if ended:
                self._settler.ended(owned, ended, size)
            self.delivered += len(batch)

    # --- receiving ---------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Works until `stop`, or until the store or the broker fails for good (then it raises that)."""
        try:
            self._hold(await self._insist(self._store.held, self.service.name))
            member = await self._insist(self._broker.join, self.service.name, sorted(self.service.topics))
        except Unavailable:  # told to leave before it had begun
            return
        self._member = member if self._through is None else self._through(member)
        self.joined.set()
        if self._stopping:  # told to leave while it was joining
            await self._member.close()
            return
        self._failure = asyncio.get_running_loop().create_future()
        self._receiving = self._spawn(self._receive())
        self._settling = self._spawn(self._settler.run())
        for job in (self._keep_time(), self._watch(), self._serve_operators()):
            self._spawn(job)
        if self._tells:
            self._spawn(self._acknowledge())
        runners = sum(handler.concurrency for handler in set(self.service.handlers.values()))
        for _ in range(min(runners, RUNNERS_MAX)):
            self._spawn(self._run_lanes())
        try:
            await self._failure
        except Exception:
            await self._abandon()
            with contextlib.suppress(UnlostError):  # if it cannot say goodbye, others see that it is gone
                await self._member.close()
            raise

    def _spawn(self, job: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task of this worker; if it fails, the worker fails."""
        task = asyncio.create_task(job)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if self._failure is None or (task.cancelled() and (self._stopping or self._failure.done())):
            return
        error = _cancelled_by_others() if task.cancelled() else task.exception()
        if error is not None and not self._failure.done():
            self._failure.set_exception(error)
        elif error is not None:
            log.error("%s: %s", self.service.name, error)

    async def _receive(self) -> None:
        assert self._member is not None
        while True:
            for change in await self._insist(self._member.receive):
                if isinstance(change, Arrivals):
                    self._take_in(change, await self._insist(self._seen, change.events))
                elif isinstance(change, Gone):
                    self._take_gap(change)
                elif isinstance(change, Assigned):
                    await self._assigned(change.units, change.saved)
                elif isinstance(change, Revoked):
                    self._spawn(self._give_back(change.units))
                elif isinstance(change, Lost):
                    for unit in change.units:
                        if unit in self.owned:
                            self._on_lost(self.owned[unit])
            await asyncio.sleep(0)

    async def _insist(self, call: Callable[..., Awaitable[T]], *args: Any) -> T:
        """What the world refuses for now (a full disk) is asked for again: a service goes on by itself."""
        while True:
            try:
                return await call(*args)
            except Unavailable as e:
                if self._stopping and self._member is None:
                    raise
                log.error("%s: trying again in %g s: %s", self.service.name, AGAIN_SECONDS, e)
                await asyncio.sleep(AGAIN_SECONDS)

    async def _assigned(self, units: Sequence[Unit], saved: Mapping[Unit, Saved]) -> None:
        """Fences the owner before us, then takes up where it was saved."""
        assert self._member is not None
        for unit, found in saved.items():
            _check_note(unit, found, self._store.id)
        for unit in units:
            if unit in self.owned:  # what it settles from now on would be fenced, and taken for somebody else's doing
                self._on_lost(self.owned[unit])
        self._timers = [timer for timer in self._timers if not timer[2].owned.gone]
        heapq.heapify(self._timers)
        for taken in await self._insist(self._store.take, units):
            _check_saved(taken, saved.get(taken.unit), self._store.id)
            owned = self.owned[taken.unit] = Owned(taken)
            self._suspicion.change(len(owned.suspects))
            if taken.abandoned:
                log.error(
                    "%s: %d events were begun at most once when their process died, and are abandoned; `unlost audit` "
                    "names them", owned.unit, taken.abandoned,
                )  # fmt: skip
            if owned.suspects:
                log.warning(
                    "%s: %d events were in a handler when their process died; they run first, one at a time",
                    owned.unit, len(owned.suspects),
                )  # fmt: skip
            for key, due in taken.waiting.items():
                lane = owned.lane(key, -1)
                lane.stored, lane.blocked, lane.due = True, True, due
                if due is not None:
                    self._set_timer(due, lane)
            for position, due in taken.keyless.items():
                lane = owned.lane(None, position)
                lane.stored, lane.blocked, lane.due = True, True, due
                self._set_timer(due, lane)
            self._member.resume(taken.unit)  # a pause of before, told when the unit was lost already
            self._member.seek(taken.unit, taken.position)
            self._throttle(owned)

    def _take_in(self, arrivals: Arrivals, seen: Mapping[tuple[str, str], Known]) -> None:
        owned = self.owned.get(arrivals.unit)
        if owned is None or owned.gone or owned.draining:
            return
        owned.read = arrivals.events[-1].position + 1
        self._store.received(owned.taken, owned.read)
        fated, fated_end = owned.taken.fated, owned.fated_end
        swift = self._swift(owned) if self._at_most_once else None
        for arrival in arrivals.events:
            position = arrival.position
            if position < fated_end and position in fated:
                continue
            size = arrival.size
            owned.in_hand += 1
            owned.size += size
            if arrival.type is not None:
                type, digest = arrival.type, arrival.hash
            elif (envelope := arrival.known) is not None:
                type, digest = envelope.type, event_hash(envelope.source, envelope.id)
            else:
                type, digest = None, 0
            handler, cls = self._routes.get(type) or self._route(type)
            if handler is None or arrival.rule:
                rule = arrival.rule or "no handler"
                state = _state_of(rule)
                self._settler.put(owned, Outcome(arrival=arrival, state=state, rule=rule, event_hash=digest))
                continue
            if not arrival.key and cls is not None and (cls.__unlost__.key is not None or cls.__unlost__.is_command):
                arrival = self._with_key(owned.unit, arrival, cls)
            lane = swift if swift is not None else owned.lanes.get(arrival.key) if arrival.key is not None else None
            if lane is None:
                lane = owned.lane(arrival.key, position)
            attempts = owned.attempts.pop(position, ()) if owned.attempts else ()
            suspect = bool(owned.suspects) and position in owned.suspects
            delivery = Delivery(lane, arrival, handler, cls, digest, attempts, size, False, suspect)
            if seen:
                _mark_seen(delivery, seen)
            if lane.blocked:
                self._park(delivery)
            else:
                lane.queue.append(delivery)
                if not (lane.ready or lane.running or lane.sleeping):
                    lane.ready = True
                    self._ready.append(lane)
        self._throttle(owned)
        self.wake()

    def _route(self, type: str | None) -> tuple[Handler | None, type[Event] | None]:
        """Who handles events of this type, and as what; remembered. None stands for bytes that are no event."""
        if type is None:
            found: tuple[Handler | None, Any] = (self._undecodable, None)
        else:
            found = (self.service.handlers.get(type), self.service.catalog.resolve(type))
        if len(self._routes) < ROUTES_MAX:
            self._routes[type] = found
        return found

    def _with_key(self, unit: Unit, arrival: Arrival, cls: type[Event]) -> Arrival:
        """An event that came without the key that its class declares takes its place by the key in its data."""
        envelope = arrival.envelope
        assert envelope is not None
        if (unit.topic, envelope.type) not in self._keyless:
            self._keyless.add((unit.topic, envelope.type))
            log.warning(
                "UL1134: %s:%d (%s) came without its key, so its producer may have put events of one key into several "
                "partitions: their order is not promised. Have the producer send %r as the message's key",
                unit, arrival.position, envelope.type, cls.__unlost__.key or cls.__unlost__.topic,
            )  # fmt: skip
        try:
            key = key_of(self.service.catalog.decode(envelope, cls))
        except UnlostError:
            return arrival  # its delivery will say what is wrong with it
        return msgspec.structs.replace(arrival, key=key, known=msgspec.structs.replace(envelope, key=key))

    def _take_gap(self, gone: Gone) -> None:
        owned = self.owned.get(gone.unit)
        if owned is not None and not (owned.gone or owned.draining):
            self._settler.put(owned, gone.gap)
            owned.read = gone.gap.end
            self._store.received(owned.taken, owned.read)

    async def _seen(self, arrivals: Iterable[Arrival]) -> Mapping[tuple[str, str], Known]:
        """Which of these the inbox knows: one look for the whole batch. The settling commit looks again."""
        if not self._once_types:
            return {}
        wanted = [
            Inbox(a.envelope.id, a.envelope.source, 0)
            for a in arrivals
            if a.envelope is not None and a.envelope.type in self._once_types
        ]
        return await self._store.seen(self.service.name, wanted)

    @functools.cached_property
    def _once_types(self) -> set[str]:
        return {type for type, h in self.service.handlers.items() if h.guarantee == "effectively-once"}

    @functools.cached_property
    def _undecodable(self) -> Handler:
        """Bytes that are no event have no type, so they get the service's own policy."""
        return self._stand_in()

    @functools.cached_property
    def _none(self) -> Handler:
        """For events of the waiting room whose handler is in no release any more."""
        return self._stand_in()

    def _stand_in(self) -> Handler:
        s = self.service
        return Handler(
            name="", function=lambda event: None, takes_context=False, is_async=False, where=None,
            guarantee="at-least-once", on_dead=s.on_dead, deadline=s.deadline, retry=s.retry, concurrency=RUNNERS_MAX,
        )  # fmt: skip

    # --- lanes and runners -------------------------------------------------------------------------------

    def _start(self, lane: Lane) -> None:
        if lane.startable:
            lane.ready = True
            self._ready.append(lane)
            self._wake_runner()

    def _wake_runner(self) -> None:
        while self._idle:
            future = self._idle.popleft()
            if not future.done():
                future.set_result(None)
                return

    def wake(self) -> None:
        for _ in range(len(self._ready)):
            self._wake_runner()

    async def _run_lanes(self) -> None:
        """A runner: takes a lane, delivers its head, puts the lane back. As many as events may be handled at once."""
        run = _Running(self._store.hands())
        self._running[id(run)] = run
        task = asyncio.current_task()
        assert task is not None
        run.task = task
        active = self._active
        count = 0
        while not run.given_up:
            if self._ready and not (self._stopping or self.hold or self._suspicion.count):
                lane: Lane | None = self._ready.popleft()
                lane.ready = False  # type: ignore[union-attr]
            else:
                lane = self._choose()
            if lane is None:
                future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._idle.append(future)
                try:
                    await future
                except asyncio.CancelledError:  # by a timer that a handler has left behind? That is not our end
                    if self._stopping:
                        raise
                    task.uncancel()
                continue
            owned = lane.owned
            lane.running = True
            owned.running += 1
            run.lane = lane
            try:
                if lane.swift:
                    await self._run_swift(lane, run)
                    d = None
                elif lane.stored or lane.loaded or not lane.queue:
                    if lane.stored and not lane.loaded:
                        await self._load(lane)
                    d = lane.head
                else:
                    d = lane.queue[0]
                if d is not None and (owned.gone or owned.draining):
                    self._let_on(d.handler.name)
                elif d is not None and not (self.hold or self._held_back(lane, d)):
                    name = d.handler.name
                    active[name] = active.get(name, 0) + 1
                    try:
                        await self.deliver(d, run)
                        if self._suspicion.count or self._outage.suspected:
                            await self._take_care(name)
                    finally:
                        active[name] -= 1
                        if self._held.get(name):
                            for _ in range(d.handler.concurrency - active[name]):
                                self._let_on(name)
                    self.delivered += 1
            finally:
                run.lane = None
                lane.running = False
                owned.running -= 1
                if owned.draining or self._stopping:
                    self._changed.set()
            if lane.queue or not lane.empty:
                self._start(lane)
            elif not lane.swift and (lane.key is None or len(owned.lanes) > LANES_KEPT):
                owned.drop(lane)
            if self._ready and self._idle:
                self._wake_runner()
            if self._suspicion.count:
                self._suspicion.pass_on()
            count += 1
            if count % YIELD_EVERY == 0:
                await self._settler.room()
                await asyncio.sleep(0)

    def _choose(self) -> Lane | None:
        """The next lane to run. While events are suspected of killing their process, one at a time, those first."""
        if self._stopping or self.hold or not self._ready:
            return None
        if self._suspicion.count:
            lane = self._suspect()
            if self._suspicion.busy() or (lane is None and self._suspicion.elsewhere(self)):
                return None
            if lane is not None:
                self._ready.remove(lane)
                lane.ready = False
                return lane
        lane = self._ready.popleft()
        lane.ready = False
        return lane

    def _suspect(self) -> Lane | None:
        """A lane with a suspect that may run now."""
        for lane in () if self._stopping or self.hold else self._ready:
            if any(d.suspect for d in lane.queue) or any(d.suspect for d in lane.loaded):
                return lane
        return None

    def has_suspect_ready(self) -> bool:
        return self._suspect() is not None

    def busy(self) -> bool:
        return any(run.lane is not None for run in self._running.values())

    def _held_back(self, lane: Lane, d: Delivery) -> bool:
        """Whether the handler has as many events in hand as it may; the lane then waits for one of them."""
        name = d.handler.name
        limit = 1 if self._outage.suspected and self._outage.lasts(name) else d.handler.concurrency
        if self._active.get(name, 0) < limit:
            return False
        self._held[name].append(lane)
        lane.ready = True  # queued: just not with the others
        return True

    async def _take_care(self, name: str) -> None:
        """After a delivery in hard times: suspects run one at a time, and a handler in an outage is only probed."""
        if self._suspicion.count:
            await self._settler.flush()
        if self._outage.lasts(name):  # keeps the handler's only place until the next probe
            await self.world.wait_until(self.world.steady() + int(PROBE_SECONDS * 1e6), self._leaving)

    def _let_on(self, name: str) -> None:
        """A handler has room again: the next lane that waited for that may go."""
        held = self._held.get(name)
        while held:
            lane = held.popleft()
            lane.ready = False
            if lane.startable:
                self._start(lane)
                return

    async def _load(self, lane: Lane) -> None:
        """Reads the lane's next rows of the waiting room; when there are none left, the key is free again."""
        owned = lane.owned
        await self._settler.flush()
        rows = await self._insist(self._store.waiting, owned.unit, lane.key, lane.position, LOAD_MAX)
        if not rows:
            lane.stored = False
            return
        seen = await self._insist(self._seen, [row.arrival for row in rows])
        for row in rows:
            d = self._from_waiting(lane, row)
            _mark_seen(d, seen)
            lane.loaded.append(d)

    def _from_waiting(self, lane: Lane, row: Waiting) -> Delivery:
        arrival, owned = row.arrival, lane.owned
        if arrival.envelope is None:  # today's code may make an event of it
            arrival = self._broker.reread(owned.unit.topic, owned.unit.partition, arrival)
        envelope = arrival.envelope
        handler = self._undecodable if envelope is None else self.service.handlers.get(envelope.type, self._none)
        cls = None if envelope is None else self.service.catalog.resolve(envelope.type)
        return Delivery(
            lane, arrival, handler, cls, 0, list(row.attempts), arrival.size, True, arrival.position in owned.suspects
        )

    def _take_from_lane(self, d: Delivery) -> None:
        if not d.lane.swift:
            (d.lane.loaded if d.waited else d.lane.queue).popleft()

    def _park_queue(self, lane: Lane) -> None:
        """The rest of a blocked key waits behind its head, in the store."""
        lane.loaded.clear()  # these rows are in the waiting room already
        while lane.queue:
            self._park(lane.queue.popleft())

    def _park(self, d: Delivery) -> None:
        d.lane.stored = True
        self._put(d.lane, Outcome(arrival=d.arrival, state="parked", event_hash=d.event_hash, attempts=d.attempts))

    def _put(self, lane: Lane, outcome: Outcome) -> None:
        lane.owned.put = self._settler.put(lane.owned, outcome)

    # --- after settling ----------------------------------------------------------------------------------

    def _on_durable(self, owned: Owned, outcome: Outcome | Gap | Plain) -> None:
        owned.unacked = True
        if isinstance(outcome, Gap):
            return
        if isinstance(outcome, Plain):
            if owned.suspects:
                cleared = owned.suspects.intersection(outcome.positions)
                owned.suspects -= cleared
                self._suspicion.change(-len(cleared))
            owned.in_hand -= len(outcome.positions) + len(outcome.ended)
            owned.size -= outcome.size
            self._believe(owned)
            self._throttle(owned)
            return
        if outcome.arrival.position in owned.suspects:  # it did not take the process down this time
            owned.suspects.discard(outcome.arrival.position)
            self._suspicion.change(-1)
        if outcome.state in ("attempted", "begun"):
            return
        put_aside = outcome.state in ("dead", "retrying", "parked")
        if outcome.waited:
            owned.aside -= 0 if put_aside else 1
        else:
            owned.aside += 1 if put_aside else 0
            owned.in_hand -= 1
            owned.size -= outcome.arrival.size
            self._believe(owned)
        self._throttle(owned)

    def _believe(self, owned: Owned) -> None:
        """Suspects that were only guessed are believed once all that was received has an outcome."""
        if owned.taken.guessed and owned.suspects and not owned.in_hand:
            self._acquit(owned)

    def _throttle(self, owned: Owned) -> None:
        """Back-pressure: at a bound the unit pauses, nothing is dropped; well below it, it goes on."""
        if self._member is None or owned.gone:
            return
        if not owned.paused:
            full = owned.in_hand >= IN_HAND_MAX or owned.size >= IN_HAND_BYTES_MAX
            if full or owned.aside >= ASIDE_MAX or owned.narrow or self.hold:
                owned.paused = True
                self._member.pause(owned.unit)
                if owned.aside >= ASIDE_MAX:
                    log.error("%s pauses: %d events wait or are dead; redrive or discard some", owned.unit, owned.aside)
        elif (
            owned.in_hand < IN_HAND_MAX // 2
            and owned.size < IN_HAND_BYTES_MAX // 2
            and owned.aside < ASIDE_MAX
            and not (owned.narrow or owned.draining or self.hold)
        ):
            owned.paused = False
            self._member.resume(owned.unit)

    def _on_fenced(self, owned: Owned) -> None:
        """The store says that somebody else took the unit; the broker may not know. If that one slept through its own
        replacement it does not keep the unit either, and nobody would have it: so we let go of it there as well."""
        if not owned.gone and not self._stopping and self._member is not None:
            self._spawn(self._insist(self._member.release, [owned.unit]))
        self._on_lost(owned)

    def _on_lost(self, owned: Owned) -> None:
        """Somebody else owns the unit. Its events are theirs; what our handlers still do is not settled."""
        if not owned.gone:
            log.warning("%s was taken by another process (our epoch was %d)", owned.unit, owned.epoch)
        self._forget(owned)

    def _forget(self, owned: Owned) -> None:
        owned.gone = True
        self._acquit(owned)
        if self.owned.get(owned.unit) is owned:
            del self.owned[owned.unit]
        self._changed.set()

    def _acquit(self, owned: Owned) -> None:
        """Its suspects are no longer this process' business."""
        if owned.suspects:
            self._suspicion.change(-len(owned.suspects))
            owned.suspects.clear()

    # --- time --------------------------------------------------------------------------------------------

    def _set_timer(self, due: int, lane: Lane) -> None:
        self._timer_count += 1
        heapq.heappush(self._timers, (due, self._timer_count, lane))
        self._timer_set.set()

    async def _keep_time(self) -> None:
        """Wakes lanes whose time has come: the one clock for retries in memory and in the waiting room."""
        while True:
            self._timer_set.clear()
            now = self.world.steady()
            while self._timers and self._timers[0][0] <= now:
                due, _, lane = heapq.heappop(self._timers)
                if lane.owned.gone or lane.due != due:
                    continue
                lane.due = None
                if lane.sleeping:
                    lane.owned.sleeping -= 1
                lane.sleeping = lane.blocked = False
                self._start(lane)
            if self._timers:
                await self.world.wait_until(self._timers[0][0], self._timer_set)
            else:
                await self._timer_set.wait()

    async def _watch(self) -> None:
        """Ends handlers that are past their deadline."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            now = self.world.monotonic()
            for run in self._running.values():
                run.check(now)

    # --- telling the broker ------------------------------------------------------------------------------

    async def _acknowledge(self) -> None:
        """Tells the broker now and then how far its log was handled. The store knows better, so nothing rests on it."""
        while True:
            await asyncio.sleep(ACK_SECONDS)
            await self._ack([owned for owned in self.owned.values() if not owned.draining])

    async def _ack(self, chosen: Sequence[Owned]) -> None:
        """Position and note of each unit, from one snapshot of what is durable."""
        chosen = [owned for owned in chosen if owned.unacked and not owned.gone]
        if not chosen or self._member is None or not self._tells:
            return
        for owned in chosen:
            owned.unacked = False
        acks = []
        by_unit = {owned.unit: owned for owned in chosen}
        try:
            snapshots = await self._insist(self._store.progress, list(by_unit))
        except BaseException:  # also when the service stops in the middle of it: its last word is still to be said
            for owned in chosen:
                owned.unacked = True
            raise
        for snapshot in snapshots:
            text, share = note.encode(self._store.id, snapshot)
            owned = by_unit[snapshot.unit]
            wide = share >= note.NARROW
            owned.narrow = wide and owned.read >= owned.fated_end  # before that, what is read fills gaps
            if wide:
                owned.unacked = True  # looked at again: it may have become smaller
            self._throttle(owned)
            acks.append(Ack(snapshot.unit, snapshot.position, text))
        await self._member.ack(acks)

    # --- operators ---------------------------------------------------------------------------------------

    async def _serve_operators(self) -> None:
        """Carries out redrives and discards: only the owner may, because it knows what of the key is in hand."""
        while True:
            await asyncio.sleep(REQUESTS_SECONDS)
            if self._stopping:
                continue
            self._hold(await self._insist(self._store.held, self.service.name))
            for request in await self._insist(self._store.requests, self.service.name):
                owned = self.owned.get(request.unit)
                if owned is None or owned.gone or owned.draining:
                    continue
                try:
                    carried_out = await self._insist(self._store.carry_out, request, owned.epoch)
                except Fenced:
                    self._on_fenced(owned)
                    continue
                if carried_out == "no longer wanted" or owned.gone:
                    continue
                lane = owned.lane(request.key, request.position)
                if request.action == "redrive":
                    lane.stored = True
                else:
                    owned.aside -= 1
                    self._throttle(owned)
                if carried_out == "key is free" and lane.due is None:
                    lane.blocked = False
                self._start(lane)
                if lane.empty:
                    owned.drop(lane)

    def _hold(self, hold: Hold | None) -> None:
        """What operators say of the whole service. Paused, it stays in its group, and what is in a handler ends.

        Raises:
            UsageError: it was retired or renamed, while this process waited for a partition.
        """
        if hold is not None and hold.state != "paused":
            raise refused(self.service.name, hold)
        if hold == self.hold:
            return
        log.warning("%s: %s", self.service.name, "it is resumed" if hold is None else hold.said)
        self.hold = hold
        for owned in self.owned.values():
            self._throttle(owned)
        self.wake()
        self._suspicion.pass_on()

    # --- leaving -----------------------------------------------------------------------------------------

    async def _give_back(self, units: Sequence[Unit]) -> None:
        """Hands units to another member: what runs may end, what has not begun is theirs."""
        leaving = [self.owned[unit] for unit in units if unit in self.owned]
        for owned in leaving:
            self._drop_queued(owned)
        while any(owned.running for owned in leaving):
            self._changed.clear()
            await self._changed.wait()
        await self._settler.flush()
        await self._insist(self._store.give, [(o.unit, o.epoch) for o in leaving if not o.gone])
        await self._ack(leaving)
        for owned in leaving:
            self._forget(owned)
        assert self._member is not None
        anew = [unit for unit in units if unit in self.owned]  # lost while we waited, and taken again: that stays
        await self._insist(self._member.release, [unit for unit in units if unit not in anew])

    def _drop_queued(self, owned: Owned) -> None:
        """Keeps only what is in a handler; the queues are still in the log and in the waiting room."""
        owned.draining = True
        for lane in list(owned.lanes.values()):
            running = lane.head if lane.running else None
            lane.queue = deque([running] if running is not None and not running.waited else [])
            lane.loaded = deque([running] if running is not None and running.waited else [])
            lane.stored = False
            lane.blocked = True
            if lane.ready:
                lane.ready = False
                for queue in (self._ready, *self._held.values()):
                    with contextlib.suppress(ValueError):
                        queue.remove(lane)
        for name in self._held:  # one of these lanes may have been the next
            self._let_on(name)

    def trouble(self) -> str:
        """Why it is not at work, in words; empty: it is. For those who look now and then, in its own event loop."""
        if self._member is None or self._failure is None:
            return "it has not joined yet"
        if self._failure.done() or self._stopping:
            return "it ends"
        now, settled = self.world.monotonic(), self._settler.settled
        for run in self._running.values():
            if late := run.late(now, STALLED_SECONDS):
                return late
        if self._settler.idle or settled != self._seen_settled[0]:
            self._seen_settled = (settled, now)
        elif now - self._seen_settled[1] > STALLED_SECONDS:
            return f"its outcomes have waited for the store for more than {STALLED_SECONDS:g} s"
        return ""

    async def stop(self, grace: float = 20.0) -> None:
        """Finishes what is in the handlers' hands, or gives it back; saves; leaves the group.

        **After a crash** in the middle of it, it is as if it had never been called.
        """
        if self._stopping or self._failure is None:
            self._stopping = True
            return
        self._stopping = True
        self._leaving.set()
        self._receiving.cancel()
        for owned in self.owned.values():
            self._drop_queued(owned)
        try:
            async with asyncio.timeout(grace):
                while self.busy():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            log.warning(
                "%s: some handlers did not end within %g s; their events are given back",
                self.service.name,
                grace,
            )
        for run in self._running.values():
            run.given_up = True
        await _end([task for task in self._tasks if task is not self._settling])
        try:
            async with asyncio.timeout(SAVE_SECONDS):
                await self._save()
        except (UnlostError, TimeoutError) as e:
            log.error("%s: not all outcomes could be saved; their events are delivered again: %r", self.service.name, e)
        finally:
            await self._abandon()
            if self._member is not None:
                with contextlib.suppress(UnlostError, TimeoutError):
                    async with asyncio.timeout(SAVE_SECONDS):
                        await self._member.close()
            if not self._failure.done():
                self._failure.set_result(None)

    async def _save(self) -> None:
        """Waits for what is on its way to the store, and says goodbye."""
        flushed = asyncio.ensure_future(self._settler.flush())
        try:
            await asyncio.wait([flushed, self._settling], return_when=asyncio.FIRST_COMPLETED)
        finally:
            flushed.cancel()
        if not self._settling.done():
            await self._store.give([(o.unit, o.epoch) for o in self.owned.values()])
            await self._ack(list(self.owned.values()))

    async def _abandon(self) -> None:
        """Ends all tasks where they are. What they had in hand stays where it was saved last."""
        for run in self._running.values():
            run.given_up = True
        self._stopping = True
        for owned in self.owned.values():
            self._acquit(owned)
        await _end([task for task in self._tasks if task is not asyncio.current_task()])
        for run in self._running.values():
            run.close()
        self._running.clear()
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)


def _state_of(rule: str) -> State:
    """What a rule turned away is skipped; what an operator has erased is removed."""
    return "removed" if rule == ERASED else "skipped"


def _no_event(problem: str) -> Undecodable:
    """A problem may have a code of its own."""
    code, colon, text = problem.partition(": ")
    if colon and code.startswith("UL") and code[2:].isdigit():
        return Undecodable(code, text)
    return Undecodable("UL5010", problem or "these bytes are no event")


def _caught(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, BaseException | None]:
    """What a handler raises in its thread, as a value: a future cannot carry StopIteration or GeneratorExit."""
    try:
        return function(*args), None
    except BaseException as e:
        return None, e


def _check_note(unit: Unit, saved: Saved, store: str) -> None:
    """An owner with another store would begin anew, and handle everything again: that is refused."""
    found = note.decode(saved.note)
    if found is not None and found.store != store:
        raise UsageError(
            "UL1132", f"the progress of {unit.service!r} on {unit.topic}/{unit.partition} is kept in another store",
            found=f"store {found.store} has it up to position {found.position}; ours is {store}",
            fix="point UNLOST_STORE at the store that the other processes of this service use; if that store is gone for good, "
            "delete the consumer group on the cluster, and everything is handled again",
        )  # fmt: skip
    if found is None and saved.note == "" and saved.position > 0:
        log.info(
            "%s: the group's offset %d was not written by unlost; the store's position counts", unit, saved.position
        )


def _check_saved(taken: Taken, saved: Saved | None, store: str) -> None:
    """Acknowledged comes after settled. A store that is behind what was acknowledged has lost something."""
    found = note.decode(saved.note) if saved is not None else None
    if found is not None and found.store == store and found.position > taken.position:
        raise Damaged(
            "UL3023", f"the store is older than what it had saved of {taken.unit}",
            found=f"it is at position {taken.position}, the group was told {found.position}",
            fix="was an old backup restored? Bring the newest copy back. If there is none: delete the consumer group on "
            "the cluster, and what came after the backup is handled again",
        )  # fmt: skip


def _mark_seen(d: Delivery, seen: Mapping[tuple[str, str], Known]) -> None:
    e = d.arrival.envelope
    if seen and e is not None:
        d.seen = seen.get((e.source, e.id))


def _repeated(inbox: Inbox, known: Known, d: Delivery) -> Fate:
    """An event whose id was handled before: a duplicate, or (never to be dropped) another event. At the same place it is
    this very event, whose handler has committed, and which was delivered again because its position was not saved."""
    if known.content == inbox.content:
        unit = d.lane.owned.unit
        return DONE if known.place == (unit.topic, unit.partition, d.position) else Skip("duplicate")
    text = f"another event with the id {inbox.id!r} was handled before, and this one differs from it"
    return Dead("id_reused", "IdReused", text, "")


def _too_old(e: Envelope, seconds: float, now: int) -> Fate | None:
    """Older than its service remembers ids: new, or handled long ago? It is not guessed."""
    if now / 1e6 - e.occurred_at.timestamp() <= seconds:
        return None
    text = f"it occurred at {e.time}, and this service remembers ids for {seconds:g} s: it may have been handled before"
    return Dead("too_old", "", text, "")


def _cancelled_by_others() -> UnlostError:
    """Without this task the service would stand still in silence: better it stops, and all is delivered again."""
    return UsageError(
        "UL1224", "a task of this service was cancelled by somebody else between two deliveries",
        fix="a handler's timers must end with it: use `async with asyncio.timeout(...)`, not `call_later(..., task.cancel)`",
    )  # fmt: skip


async def _end(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancels tasks and waits for their end; not for ever, because a handler may refuse to be cancelled."""
    refusing = set(tasks)
    for _ in range(CANCELS_MAX):
        if not refusing:
            return
        for task in refusing:
            task.cancel()
        _, refusing = await asyncio.wait(refusing, timeout=CANCELLED_SECONDS_MAX / CANCELS_MAX)
    if refusing:
        log.warning("%d handlers do not let themselves be cancelled; their events are given back", len(refusing))


class _Running:
    """What one runner has in hand; noted where it survives `kill -9`."""

    def __init__(self, hands: Hands) -> None:
        self._hands = hands
        self._take_up, self._put_down = hands.take_up, hands.put_down
        self.task: asyncio.Task[None] | None = None
        self.lane: Lane | None = None
        self.given_up = False
        self._delivery: Delivery | None = None
        self._timed: Delivery | None = None  # the one that `_since` is about
        self._since = 0.0
        self._cancelled = 0.0
        self._cancels = 0

    def begin(self, d: Delivery, now: float, alone: bool) -> None:
        self.watch(d, now)
        self._take_up(d.lane.owned.taken.address, d.arrival.position, alone)

    def end(self) -> bool:
        """True if the handler was past its deadline."""
        self._put_down()
        return self.unwatch()

    def watch(self, d: Delivery, now: float) -> None:
        self._since = now
        self._cancels = 0
        self._delivery = self._timed = d

    def hold(self, d: Delivery) -> None:
        """Only its deadline, which begins when it is looked at first: whoever dies with an event in hand that is not
        delivered again need not say so."""
        self._delivery = d

    def unwatch(self) -> bool:
        self._delivery = None
        return self._cancels > 0

    @property
    def cancelled(self) -> bool:
        """Whether somebody cancelled the handler's task: the deadline, or the handler itself."""
        return self.task.cancelling() > 0 and not self.given_up  # type: ignore[union-attr]

    async def shake_off(self) -> None:
        """Cancellations were meant for the handler that has ended: neither the runner nor the next one gets them."""
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0)  # where one that was not delivered yet comes out
        while self.cancelled and self.task is not None:
            self.task.uncancel()

    def check(self, now: float) -> None:
        """Cancels a handler that is past its deadline; again, if it does not listen."""
        d = self._delivery
        if d is None or self.task is None:
            return
        if d is not self._timed:
            self.watch(d, now)
        if now - self._since < d.handler.deadline:
            return
        if self._cancels == 0 or now - self._cancelled >= CANCEL_AGAIN_SECONDS:
            self._cancelled = now
            self._cancels += 1
            self.task.cancel()

    def late(self, now: float, seconds: float) -> str:
        """In words, if its handler goes on so long after its deadline."""
        d = self._delivery
        if d is None or d is not self._timed or now - self._since <= d.handler.deadline + seconds:
            return ""
        return f"the handler {d.handler.name} goes on after its deadline of {d.handler.deadline:g} s"

    def close(self) -> None:
        self._hands.close()


class _DeliveryUnit:
    """The delivery's side of `ctx.transaction()`: inbox mark and settlement inside the user's commit."""

    def __init__(self, worker: Worker, d: Delivery) -> None:
        self._worker = worker
        self._d = d

    def check(self, envelope: Envelope) -> None:
        self._worker._broker.check(envelope)

    def due(self, delay: float | timedelta | None, at: datetime | None) -> tuple[int, bool] | None:
        return due_of(self._worker.world, delay, at)

    async def before_block(self) -> None:
        """The key's earlier outcomes first: a block that overtook them would break the order of what they publish,
        and could find its own event's last attempt still on its way."""
        owned = self._d.lane.owned
        await self._worker._settler.flush(owned.put)
        if owned.gone:  # then those were dropped; the store may not know yet, for nobody has taken the unit
            raise Fenced("UL2101", f"{owned.unit} is not ours any more", found=f"our epoch was {owned.epoch}")

    def block(self, session: object) -> Block:
        return self._worker._store.block(session)

    def sync_block(self, session: object) -> SyncBlock:
        return self._worker._store.sync_block(session)

    async def begin(self, block: Block) -> None:
        known = await block.begin(*self._entry(), self._d.looked)
        if known is not None:
            await block.abort()
            raise AlreadyHandled(known)

    def begin_sync(self, block: SyncBlock) -> None:
        known = block.begin(*self._entry(), self._d.looked)
        if known is not None:
            block.abort()
            raise AlreadyHandled(known)

    def _entry(self) -> tuple[Unit, int, Inbox | None]:
        owned, d = self._d.lane.owned, self._d
        once = d.handler.guarantee == "effectively-once"
        return owned.unit, owned.epoch, self._worker._inbox(d) if once else None

    def outcome(self, publishes: list[Envelope]) -> Settlement:
        d, owned = self._d, self._d.lane.owned
        outcome = Outcome(
            arrival=d.arrival,
            state="done",
            event_hash=d.event_hash,
            waited=d.waited,
            begun=d.begun,
            publishes=publishes,
        )
        if d.handler.guarantee == "effectively-once":
            outcome.inbox = self._worker._inbox(d)
        self._worker._reach("committing", d)
        return Settlement(owned.unit, owned.epoch, [outcome])
