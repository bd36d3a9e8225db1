"""A process that can die inside a test, as `kill -9` would have it.

Each service of a test gets its own file handle, process file, lock and marks, so that the others and the file
cannot tell it from a process. When it dies, its lock is let go, what it had in its hands stays noted, nothing of it
is settled or released any more, and its tasks end where they stand.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from unlost.brokers.embedded import group
from unlost.brokers.embedded.broker import EmbeddedBroker
from unlost.brokers.embedded.group import EmbeddedMember
from unlost.delivery.lanes import Delivery
from unlost.delivery.service import Handler, Service
from unlost.delivery.worker import Worker
from unlost.events import Envelope
from unlost.events.topic import Arrival, TopicInfo, Unit
from unlost.sqlite.file import File
from unlost.sqlite.process import ProcessFile
from unlost.sqlite.transaction import Transaction
from unlost.store.port import (
    Block,
    CarriedOut,
    Hands,
    Hold,
    Inbox,
    Known,
    Outcome,
    Request,
    Settlement,
    Snapshot,
    SyncBlock,
    Taken,
    Waiting,
)
from unlost.store.sqlite import SqliteStore

if TYPE_CHECKING:
    from pathlib import Path

    from unlost.world import World

Step = Literal["received", "started", "handled", "committing", "settling", "settled"]
BURIAL_SECONDS = 5.0


class ProcessKilled(BaseException):
    """Ends whatever a killed process was doing. Nobody should catch it."""


class CrashPoint:
    """Where a process is to die: `times` times, after `step`, on an event of one handler or of any."""

    def __init__(self, service: str, handler: str | None, step: Step, times: int) -> None:
        self.service = service
        self.handler = handler
        self.step = step
        self.times = times

    def __repr__(self) -> str:
        return f"crash {self.handler or self.service} after {self.step}, {self.times} to come"

    def hit(self, service: str, handler: str, step: str) -> bool:
        if self.times < 1 or self.step != step or self.service != service or self.handler not in (None, handler):
            return False
        self.times -= 1
        return True


class MortalProcess:
    """One service in a process of its own. `start` it again after its death, as a supervisor would."""

    def __init__(self, service: Service, path: Path, world: World, points: list[CrashPoint]) -> None:
        self.service = service
        self.deaths = 0
        self.reads: dict[int, int] = {}  # partition number -> next position to read
        self.dead = False
        self.error: BaseException | None = None
        self.worker: Worker | None = None
        self._path = path
        self._world = world
        self._points = points
        self._died = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._file: File | None = None
        self._broker: _MortalBroker | None = None
        self._life: asyncio.Task[None] | None = None
        self._leaving = False

    async def start(self) -> None:
        """Returns when it takes part in the service."""
        self._life = asyncio.create_task(self._live(), name=f"unlost-process-{self.service.name}")
        while not self._life.done() and not self.joined:
            await asyncio.wait({self._life}, timeout=0.002)

    @property
    def joined(self) -> bool:
        return not self.dead and self.worker is not None and self.worker._failure is not None

    async def _live(self) -> None:
        """Starts the worker, and again after each death, until it is told to leave."""
        try:
            while not self._leaving:
                await self._open()
                assert self.worker is not None
                work = asyncio.create_task(self.worker.run())
                death = asyncio.create_task(self._died.wait())
                await asyncio.wait({work, death}, return_when=asyncio.FIRST_COMPLETED)
                death.cancel()
                if not self.dead:
                    await work
                    return
                await self._bury(work)
        except BaseException as e:
            if not isinstance(e, asyncio.CancelledError):
                self.error = e
            raise

    async def _open(self) -> None:
        file = await asyncio.to_thread(File, self._path, world=self._world)
        self.dead = False
        self._died.clear()
        self.reads = {}
        file.process_file = _MortalFile(file.process_file, self)
        self._file = file
        self._broker = _MortalBroker(EmbeddedBroker(file))
        store = _MortalStore(SqliteStore(file, publish=Transaction.append), self)
        self.worker = Worker(self.service, self._broker, store, world=self._world, probe=self._probe)  # type: ignore[arg-type]

    def die(self) -> None:
        """From now on nothing of this process reaches the file. May be called from any thread."""
        if self.dead or self._file is None:
            return
        self.dead = True
        self.deaths += 1
        assert isinstance(self._file.process_file, _MortalFile)
        self._file.process_file.die()
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._died.set)

    async def _bury(self, work: asyncio.Task[None]) -> None:
        assert self.worker is not None and self._file is not None and self._broker is not None
        ending = asyncio.ensure_future(self.worker._abandon())
        await asyncio.wait({ending}, timeout=BURIAL_SECONDS)
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        for member in self._broker.members:  # without leaving the group: only this event loop forgets it
            self._file.unlisten(member._notify)
            group._bells.remove(member._loop, self._file, member._wake)
        await asyncio.to_thread(self._file.close)
        self.worker = self._file = None

    async def leave(self, grace: float) -> None:
        """A clean stop."""
        self._leaving = True
        life = self._life
        if life is None:
            return
        while not life.done():
            if self.joined and self.worker is not None:
                await self.worker.stop(grace)
                break
            await asyncio.wait({life}, timeout=0.002)
        await asyncio.gather(life, return_exceptions=True)
        if self._file is not None:
            await asyncio.to_thread(self._file.close)
            self._file = None

    # --- where it may die --------------------------------------------------------------------------------

    def _probe(self, step: str, d: Delivery) -> None:
        self.reach(step, d.handler)

    def reach(self, step: str, handler: Handler) -> None:
        if not self.dead and any(point.hit(self.service.name, handler.name, step) for point in self._points):
            self.die()
        if self.dead:
            raise ProcessKilled(f"{self.service.name} was killed after {handler.name!r} had {step}")

    def reach_outcomes(self, step: str, settlements: Sequence[Settlement]) -> None:
        for settlement in settlements:
            for outcome in settlement.outcomes:
                handler = self._handler(outcome)
                if handler is not None:
                    self.reach(step, handler)

    def _handler(self, o: Outcome) -> Handler | None:
        if o.state in ("attempted", "parked") or o.arrival.envelope is None:
            return None
        return self.service.handlers.get(o.arrival.envelope.type)

    def check(self) -> None:
        if self.dead:
            raise ProcessKilled(f"{self.service.name} was killed")

    async def alive(self) -> None:
        """A dead process does nothing more, for ever."""
        if self.dead:
            await self._loop.create_future()


class _MortalFile(ProcessFile):
    """The process' own file. After its death the lock is free and the content stays as it was."""

    def __init__(self, real: ProcessFile, process: MortalProcess) -> None:
        self.path = real.path
        self._real = real
        self._process = process
        self._over = False

    def die(self) -> None:
        self._over = True
        self._real.forget_child()

    def beat(self) -> None:
        if not self._over:
            with contextlib.suppress(ValueError):  # closed by `die` in this very moment
                self._real.beat()

    def take_cell(self) -> int:
        return -1 if self._over else self._real.take_cell()

    def give_cell(self, cell: int) -> None:
        if not self._over:
            self._real.give_cell(cell)

    def started(self, cell: int, address: int, position: int, alone: bool) -> None:
        if not self._over:
            self._real.started(cell, address, position, alone)

    def clear(self, cell: int) -> None:
        if not self._over:
            self._real.clear(cell)

    def read_up_to(self, service: int, number: int, position: int) -> None:
        if not self._over:
            self._process.reads[number] = position
            self._real.read_up_to(service, number, position)

    def forget_child(self) -> None:
        self._real.forget_child()

    def close(self, *, keep: bool = False) -> None:
        if not self._over:
            self._real.close(keep=keep)


class _MortalBroker:
    """Only remembers the members that a worker made."""

    def __init__(self, real: EmbeddedBroker) -> None:
        self.abilities = real.abilities
        self.members: list[EmbeddedMember] = []
        self._real = real

    def check(self, envelope: Envelope) -> None:
        self._real.check(envelope)

    def reread(self, topic: str, partition: int, arrival: Arrival) -> Arrival:
        return self._real.reread(topic, partition, arrival)

    async def join(self, service: str, topics: Sequence[str]) -> EmbeddedMember:
        member = await self._real.join(service, topics)
        self.members.append(member)
        return member


class _MortalStore:
    """The store of one process: silent after its death."""

    sees_hands = True

    def __init__(self, real: SqliteStore, process: MortalProcess) -> None:
        self._real = real
        self._process = process

    @property
    def id(self) -> str:
        return self._real.id

    async def open(self) -> None:
        await self._real.open()

    async def close(self) -> None:
        await self._real.close()

    async def service_of(self, queue: str) -> str | None:
        return await self._real.service_of(queue)

    async def register(self, service: str, policy: dict[str, Any], topics: Sequence[TopicInfo]) -> None:
        await self._real.register(service, policy, topics)

    async def take(self, units: Sequence[Unit]) -> Sequence[Taken]:
        await self._process.alive()
        return await self._real.take(units)

    async def give(self, units: Sequence[tuple[Unit, int]]) -> None:
        await self._process.alive()
        await self._real.give(units)

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Unit]:
        await self._process.alive()
        self._process.reach_outcomes("settling", settlements)
        fenced = await self._real.settle(settlements)
        self._process.reach_outcomes("settled", settlements)
        return fenced

    def block(self, session: object = None) -> _MortalBlock:
        self._process.check()
        return _MortalBlock(self._real.block(session), self._process)

    def sync_block(self, session: object = None) -> _MortalSyncBlock:
        self._process.check()
        return _MortalSyncBlock(self._real.sync_block(session), self._process)

    def hands(self) -> Hands:
        return self._real.hands()

    async def starting(self, taken: Taken, position: int, waited: bool, alone: bool) -> None:
        await self._real.starting(taken, position, waited, alone)

    async def seen(self, service: str, events: Iterable[Inbox]) -> Mapping[tuple[str, str], Known]:
        await self._process.alive()
        return await self._real.seen(service, events)

    async def waiting(self, unit: Unit, key: bytes | None, position: int | None, limit: int) -> Sequence[Waiting]:
        await self._process.alive()
        return await self._real.waiting(unit, key, position, limit)

    async def held(self, service: str) -> Hold | None:
        await self._process.alive()
        return await self._real.held(service)

    async def requests(self, service: str) -> Sequence[Request]:
        await self._process.alive()
        return await self._real.requests(service)

    def received(self, taken: Taken, position: int) -> None:
        self._real.received(taken, position)

    async def progress(self, units: Sequence[Unit]) -> Sequence[Snapshot]:
        return await self._real.progress(units)

    async def keep_house(self, starts: Mapping[tuple[str, int], int], resends: Mapping[str, float]) -> None:
        await self._real.keep_house(starts, resends)

    async def carry_out(self, request: Request, epoch: int) -> CarriedOut:
        await self._process.alive()
        return await self._real.carry_out(request, epoch)


class _MortalBlock:
    """A block of a process that may die at its end: before the commit, or when only nobody was told of it."""

    def __init__(self, real: Block, process: MortalProcess) -> None:
        self._real = real
        self._process = process
        self._killed: ProcessKilled | None = None
        self.execute = real.execute
        self.abort = real.abort
        self.is_transient = real.is_transient
        self.settles = real.settles

    async def begin(self, unit: Unit, epoch: int, inbox: Inbox | None, looked: bool = False) -> Known | None:
        began = await self._real.begin(unit, epoch, inbox, looked)
        if self._process.dead:
            await self._real.abort()
        self._process.check()
        return began

    async def finish(self, settlement: Settlement) -> None:
        try:
            self._process.reach_outcomes("settling", [settlement])
            await self._real.finish(settlement)
            self._process.reach_outcomes("settled", [settlement])
        except ProcessKilled as e:  # ends the handler: it will never know
            self._killed = e
            await self._real.abort()
            raise

    async def settled(self) -> BaseException | None:
        return self._killed or await self._real.settled()


class _MortalSyncBlock:
    def __init__(self, real: SyncBlock, process: MortalProcess) -> None:
        self._real = real
        self._process = process
        self._killed: ProcessKilled | None = None
        self.execute = real.execute
        self.abort = real.abort
        self.is_transient = real.is_transient
        self.settles = real.settles

    def begin(self, unit: Unit, epoch: int, inbox: Inbox | None, looked: bool = False) -> Known | None:
        began = self._real.begin(unit, epoch, inbox, looked)
        if self._process.dead:
            self._real.abort()
        self._process.check()
        return began

    def finish(self, settlement: Settlement) -> None:
        try:
            self._process.reach_outcomes("settling", [settlement])
            self._real.finish(settlement)
            self._process.reach_outcomes("settled", [settlement])
        except ProcessKilled as e:
            self._killed = e
            self._real.abort()
            raise

    def settled(self) -> BaseException | None:
        return self._killed or self._real.settled()
