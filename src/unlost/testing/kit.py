"""`async with unlost.testing.running(app) as t:` the real thing on a smaller disk.

The embedded broker in a temporary folder, every service of the app in a process of its own (as far as files and
locks can tell), and a clock that only the test moves. At the end the books are checked.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import apsw
import msgspec

from unlost.app import App
from unlost.audit import Books
from unlost.brokers.embedded.log import read_partition
from unlost.brokers.port import Receipt
from unlost.delivery.later import Releaser
from unlost.delivery.service import Handler, Service
from unlost.delivery.worker import CANCEL_AGAIN_SECONDS, Worker
from unlost.errors import UsageError
from unlost.events import Command, Envelope, Event, decode_data
from unlost.events.topic import Unit
from unlost.ops import shelf
from unlost.ops.books import books, name_missing
from unlost.sqlite.schema import POSITION_BITS, POSITION_MAX
from unlost.store.port import DeadLetter
from unlost.store.records import FileRecords
from unlost.testing.clock import VirtualWorld
from unlost.testing.mortal import CrashPoint, MortalProcess, Step

log = logging.getLogger("unlost.testing")
E = TypeVar("E", bound=Event)

LOOK_SECONDS = 0.002  # how often `settled` looks
GRACE_SECONDS = 5.0  # how long handlers may go on at the end of the block


@contextlib.asynccontextmanager
async def running(
    app: App,
    *,
    services: Sequence[str] | None = None,
    check_books: bool = True,
    seed: int = 0,
    patience: float = 1.0,
) -> AsyncIterator[Running]:
    """Runs the app's services in a temporary folder, in virtual time, until the block ends.

    Broker and store are one embedded file, whatever the App says: no server is asked. Handlers that use a session of their
    own (`ctx.transaction(session)`) need their database, and are tested with it.

    - `services`: only these; by default all.
    - `check_books`: at the end every accepted event must be accounted for (AssertionError naming the missing ones).
    - `seed`: of everything random, so that waits are the same in every run.
    - `patience`: real seconds after which `settled` takes a handler that does not move for a hanging one, and moves
      the clock to its deadline.

    Example:
        >>> async def test_charges() -> None:
        ...     async with running(app) as t:
        ...         await t.publish(OrderPlaced(order_id="A1"))
        ...         await t.settled()
    """
    if app._entered:
        raise UsageError("UL1290", "this App is connected already", fix="give `running` an App that nobody has entered")
    folder = Path(tempfile.mkdtemp(prefix="unlost-test-"))
    before = app.world, app.broker_url, app.store_url, app.outboxes
    databases = [service.database for service in app.services]
    world = VirtualWorld(seed)
    app.world = world
    app.broker_url = app.store_url = f"embedded://{folder / 'events.db'}"  # whatever UNLOST_STORE says
    app.outboxes = ()
    for service in app.services:
        service.database = ""
    try:
        async with app:
            t = Running(app, world, folder, patience)
            releasing = asyncio.create_task(Releaser(app.store, world, poll_seconds=LOOK_SECONDS).run())
            grace = GRACE_SECONDS
            try:
                await t.scale(1, *(s.name for s in app.chosen(services)))
                yield t
            except BaseException:
                grace = 0.1
                raise
            finally:
                await t._leave(grace)
                releasing.cancel()
                await asyncio.gather(releasing, return_exceptions=True)
            t._check_alive()
            if check_books:
                t.check_books()
    finally:
        app.world, app.broker_url, app.store_url, app.outboxes = before
        for service, database in zip(app.services, databases, strict=True):
            service.database = database
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


class Running:
    """The handle of a running test: publish, wait, crash, look. Made by `running(app)`.

    Example:
        >>> async def test_nothing_is_lost() -> None:
        ...     async with running(app) as t:
        ...         await t.settled()
        ...         assert t.books.unaccounted == 0
    """

    def __init__(self, app: App, world: VirtualWorld, folder: Path, patience: float) -> None:
        self.app = app
        self.clock = world
        self.folder = folder
        self._patience = patience
        self._points: list[CrashPoint] = []
        self._processes: dict[str, list[MortalProcess]] = {}

    # --- doing -------------------------------------------------------------------------------------------

    async def publish(
        self,
        event: Event,
        *,
        id: str | None = None,
        occurred_at: datetime | None = None,
        headers: Mapping[str, str] | None = None,
        delay: float | timedelta | None = None,
        at: datetime | None = None,
    ) -> Receipt:
        """The same as `app.publish`."""
        return await self.app.publish(event, id=id, occurred_at=occurred_at, headers=headers, delay=delay, at=at)

    async def send(
        self,
        command: Command,
        *,
        id: str | None = None,
        headers: Mapping[str, str] | None = None,
        delay: float | timedelta | None = None,
        at: datetime | None = None,
    ) -> Receipt:
        """The same as `app.send`."""
        return await self.app.send(command, id=id, headers=headers, delay=delay, at=at)

    async def publish_all(self, events: Sequence[Event]) -> Sequence[Receipt]:
        """The same as `app.publish_all`."""
        return await self.app.publish_all(events)

    def advance(self, seconds: float) -> None:
        """Moves the clock. Whatever is due then happens as soon as the event loop gets its turn."""
        self.clock.advance(seconds)

    def crash(self, what: Callable[..., Any] | Service | str, after: Step = "handled", times: int = 1) -> None:
        """The process of this handler (function or name) or service will be killed, and started again.

        `after` says at which step of an event: `received` (before the handler), `started` (in its hands), `handled`
        (before its outcome is settled), `committing` (at the end of its own transaction, which is rolled back),
        `settling` (before the outcome's commit), `settled` (durable, but nobody was told). `times`: so often.
        """
        if after not in ("received", "started", "handled", "committing", "settling", "settled"):
            raise UsageError("UL1291", "unknown crash point", found=repr(after))
        service, handler = self._find(what)
        self._points.append(CrashPoint(service, handler.name if handler else None, after, times))

    async def scale(self, processes: int, *services: str) -> None:
        """From now on each of these services (all by default) has so many processes."""
        for name in services or tuple(self._processes):
            service = self.app.chosen([name])[0]
            have = self._processes.setdefault(name, [])
            while len(have) < processes:
                process = MortalProcess(service, self.app.file.path, self.clock, self._points)
                have.append(process)
                await process.start()
            leaving = have[processes:]
            del have[processes:]
            await asyncio.gather(*(process.leave(GRACE_SECONDS) for process in leaving))

    async def redrive(self, letter: DeadLetter, reason: str = "test") -> None:
        """Asks for a dead letter to be handled again; `settled` waits for it."""
        await self._ask("redrive", letter, reason)

    async def discard(self, letter: DeadLetter, reason: str = "test") -> None:
        """Asks for a dead letter to be removed; `settled` waits for it."""
        await self._ask("discard", letter, reason)

    async def _ask(self, action: shelf.Action, letter: DeadLetter, reason: str) -> None:
        records = self._records
        await asyncio.to_thread(
            lambda: shelf.ask(records, action, [letter], operator="test", reason=reason, wait_seconds=0.0)
        )

    # --- waiting -----------------------------------------------------------------------------------------

    async def settled(self, timeout: float = 10.0) -> None:
        """Goes on until everything is done that can be done without an operator.

        Whenever only the clock could bring things forward, it is moved to the next due time, also of what is delayed. Dead letters, and what
        is parked behind them, may remain. `timeout` is in real seconds.

        Raises:
            TimeoutError: something is stuck; the text names it.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        seen, since = None, loop.time()
        while True:
            self._check_alive()
            state = self.app.file.read(self._look)  # no await until the workers were looked at: one instant
            busy = self._busy()
            if not busy and state.finished:
                return
            if not busy and state.caught_up(self._read_positions()):
                later = await self.app.store.next_due()
                due = min((d for d in (self._next_due(), later) if d is not None), default=None)
                if due is not None and due > self.clock.steady():
                    self.clock.advance_to(due)
            mark = (state, self.clock.now(), self._signature())
            if mark != seen:
                seen, since = mark, loop.time()
            elif busy and loop.time() - since >= self._patience:
                hanging = [d for d in (self._next_deadline(), self._next_due()) if d is not None]
                if hanging:
                    self.clock.advance_to(min(hanging))
            if loop.time() > end:
                raise TimeoutError(f"not settled within {timeout:g} s: {self._describe(state)}")
            await asyncio.sleep(LOOK_SECONDS)

    async def until(self, condition: Callable[[], object], timeout: float = 10.0) -> None:
        """Waits, in real time, until the condition holds; the clock stands still.

        Raises:
            TimeoutError: it did not come to hold.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        while not condition():
            self._check_alive()
            if loop.time() > end:
                raise TimeoutError(f"it did not happen within {timeout:g} s")
            await asyncio.sleep(LOOK_SECONDS)

    def _look(self, c: apsw.Connection) -> _State:
        """What the file says is still to be done, in one snapshot."""
        behind: dict[Unit, tuple[int, int, int]] = {}
        topics = dict(c.execute("select name, first_number from unlost_topic").fetchall())
        for service, topic, partition, position in c.execute(
            "select service, topic, partition, position from unlost_progress"
        ).fetchall():
            if service not in self._processes:
                continue
            number = topics[topic] + partition
            low = number << POSITION_BITS
            last = c.execute("select max(at) from unlost_log where at between ? and ?", (low, low | POSITION_MAX))
            top = last.fetchone()[0]
            end = 0 if top is None else top - low + 1
            if position < end:
                behind[Unit(service, topic, partition)] = (number, position, end)
        waiting = c.execute(
            "select service, topic, partition, position, attempt from unlost_waiting w where not exists "
            "(select 1 from unlost_shelf s where s.parks = 1 and s.service = w.service and s.topic = w.topic "
            "and s.partition = w.partition and s.key = w.key) order by 1, 2, 3, 4"
        ).fetchall()
        requests = c.execute("select count(*) from unlost_shelf where request is not null").fetchone()[0]
        mine = tuple(row for row in waiting if row[0] in self._processes)
        delayed = c.execute("select count(*) from unlost_delayed").fetchone()[0]
        return _State(tuple(behind.items()), mine, requests, delayed)

    def _workers(self) -> list[Worker]:
        return [p.worker for ps in self._processes.values() for p in ps if p.worker is not None]

    def _busy(self) -> bool:
        """Whether anybody has something in hand that goes on without the clock."""
        for processes in self._processes.values():
            for p in processes:
                if not p.joined or p.worker is None:
                    return True
                if p.worker._ready or p.worker._settler._settled < p.worker._settler._put:
                    return True
                if any(run.lane is not None for run in p.worker._running.values()):
                    return True
        return False

    def _read_positions(self) -> dict[tuple[str, int], int | None]:
        """How far each partition was read; None where its reader is full and reads no further."""
        found: dict[tuple[str, int], int | None] = {}
        for name, processes in self._processes.items():
            for p in processes:
                found.update({(name, number): position for number, position in p.reads.items()})
                for owned in p.worker.owned.values() if p.worker is not None else ():
                    if owned.paused:
                        found[name, owned.taken.address & 0x7FFF_FFFF] = None
        return found

    def _next_due(self) -> int | None:
        times = [
            due
            for worker in self._workers()
            for due, _, lane in worker._timers
            if lane.due == due and not lane.owned.gone
        ]
        first = min(times, default=None)
        return None if first is None or first <= self.clock.now() else first  # due already: it is being woken

    def _next_deadline(self) -> int | None:
        """When the first of the handlers in progress is past its deadline."""
        seconds = [
            run._cancelled + CANCEL_AGAIN_SECONDS if run._cancels else run._since + run._delivery.handler.deadline
            for worker in self._workers()
            for run in worker._running.values()
            if run._delivery is not None
        ]
        if not seconds:
            return None
        return self.clock.now() + max(0, round((min(seconds) - self.clock.monotonic()) * 1e6)) + 1

    def _signature(self) -> tuple[object, ...]:
        return tuple((w.delivered, w._settler._settled, len(w._ready), len(w.owned)) for w in self._workers())

    def _check_alive(self) -> None:
        for name, processes in self._processes.items():
            for p in processes:
                if p.error is not None:
                    raise AssertionError(f"the service {name} has stopped: {p.error!r}") from p.error

    def _describe(self, state: _State) -> str:
        parts = [f"{unit} is at {at} of {end}" for unit, (_, at, end) in state.behind]
        parts += [f"{s} {t}/{p}:{n} waits for its next attempt" for s, t, p, n, _ in state.waiting]
        for worker in self._workers():
            for run in worker._running.values():
                if run._delivery is not None:
                    d = run._delivery
                    parts.append(
                        f"the handler {d.handler.name!r} of {worker.service.name} has {d.lane.owned.unit.topic}/"
                        f"{d.lane.owned.unit.partition}:{d.position} in hand (attempt {len(d.attempts) + 1})"
                    )
        parts += [f"the process of {n} is dead" for n, ps in self._processes.items() for p in ps if p.dead]
        if state.requests:
            parts.append(f"{state.requests} requests of operators are open")
        return "; ".join(parts[:20]) or "handlers are still busy"

    # --- looking -----------------------------------------------------------------------------------------

    @property
    def books(self) -> Books:
        """The books as they are now."""
        return books(self._records)

    def check_books(self) -> None:
        """
        Raises:
            AssertionError: events are unaccounted for; it names them.
        """
        found = self.books
        if found.balanced:
            return
        names = [
            f"{m.service} {m.topic}/{m.partition}:{m.position} {m.type} {m.id}: {m.why}; last seen {m.last_seen}"
            for m in name_missing(self._records, found.missing, 20)
        ]
        text = "\n  ".join([*names, *found.findings[:20], *found.unaccountable[:20]])
        raise AssertionError(f"the books do not balance: {found.unaccounted} events are unaccounted for\n  {text}")

    def dead_letters(self, what: Callable[..., Any] | Service | str | None = None) -> list[DeadLetter]:
        """What is on the shelf, oldest first: all, or those of one handler or service.

        The `reason` of a rejected event is the sentence that the handler gave to `Reject`; of any other its kind,
        such as `exhausted`.
        """
        found = [
            msgspec.structs.replace(letter, reason=letter.error) if letter.reason == "rejected" else letter
            for letter in shelf.letters(self._records)
        ]
        if what is None:
            return found
        service, handler = self._find(what)
        return [
            letter
            for letter in found
            if letter.service == service and (handler is None or letter.handler == handler.name)
        ]

    def dead(self, what: Callable[..., Any] | Service | str | None = None) -> DeadLetter:
        """The only dead letter (of this handler or service).

        Raises:
            AssertionError: there is none, or more than one.
        """
        found = self.dead_letters(what)
        if len(found) != 1:
            lines = "".join(f"\n  {x.service} {x.type} {x.key!r}: {x.reason}: {x.error}" for x in found)
            raise AssertionError(f"expected one dead letter, found {len(found)}{lines}")
        return found[0]

    def envelopes(self, cls: type[Event] | None = None) -> list[Envelope]:
        """What the log holds (of one event type), in the order of recording; per key that is the order of the log."""
        wanted = None if cls is None else cls.__unlost__.type
        found = self.app.file.read(lambda c: _read_log(self.app.file.path, c))
        return [e for e in found if wanted is None or e.type == wanted]

    def published(self, cls: type[E]) -> list[E]:
        """The events of this type that the log holds, decoded."""
        return [decode_data(envelope, cls) for envelope in self.envelopes(cls)]

    def db(self, sql: str, bindings: Any = ()) -> list[tuple[Any, ...]]:
        """Rows of your own tables (`App(schema=...)`)."""
        return self.app.file.read(lambda c: c.execute(sql, bindings).fetchall())

    def deaths(self, service: str | Service) -> int:
        """How often processes of this service were killed."""
        name = service.name if isinstance(service, Service) else service
        return sum(p.deaths for p in self._processes.get(name, ()))

    @property
    def _records(self) -> FileRecords:
        return FileRecords(self.app.file)

    def _find(self, what: Callable[..., Any] | Service | str) -> tuple[str, Handler | None]:
        if isinstance(what, Service):
            return what.name, None
        for service in self.app.services:
            for handler in service.handlers.values():
                if handler.function is what or handler.name == what:
                    return service.name, handler
        for service in self.app.services:
            if service.name == what:
                return service.name, None
        raise UsageError(
            "UL1292", "this App has no such handler or service", found=repr(what),
            fix="give the handler's function or name, or the Service",
        )  # fmt: skip

    async def _leave(self, grace: float) -> None:
        leaving = [p for processes in self._processes.values() for p in processes]
        await asyncio.gather(*(process.leave(grace) for process in leaving))


class _State(NamedTuple):
    behind: tuple[tuple[Unit, tuple[int, int, int]], ...]  # unit -> partition number, position, end of the log
    waiting: tuple[tuple[Any, ...], ...]
    requests: int
    delayed: int

    @property
    def finished(self) -> bool:
        return not (self.behind or self.waiting or self.requests or self.delayed)

    def caught_up(self, read: dict[tuple[str, int], int | None]) -> bool:
        """Whether everything that the log holds is in somebody's hands."""
        for unit, (number, _, end) in self.behind:
            position = read.get((unit.service, number), 0)
            if position is not None and position < end:
                return False
        return self.requests == 0


def _read_log(path: Path, c: apsw.Connection) -> list[Envelope]:
    found: list[tuple[int, int, int, Envelope]] = []
    for name, first, partitions in c.execute("select name, first_number, partitions from unlost_topic").fetchall():
        for number in range(first, first + partitions):
            at = 0
            while events := read_partition(path, c, name, number - first, number, at, 1000):
                found += [(a.recorded, number, a.position, a.envelope) for a in events if a.envelope is not None]
                at = events[-1].position + 1
    return [envelope for *_, envelope in sorted(found, key=lambda row: row[:3])]
