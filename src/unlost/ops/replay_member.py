"""A replay's part in its group: the membership of a service, that ends where the replay ends, passes what is not wanted
with a rule, and hands out no more than its rate.

**Guarantee** every event below the end of its partition is handed out, in the order of the log, none from there on.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from unlost.brokers.port import Ack, Arrivals, Change, Gone, Lost, Member, Place, Revoked
from unlost.events.topic import Arrival, Unit
from unlost.ops.replay_plan import NOT_REPLAYED, Choice, type_of

BURST_SECONDS = 0.1  # after a rest, so much of a second's events may go out at once


class Pace:
    """How many events may go out: `rate` a second, times the `share` that this process has of what is left. Pure.

    Example:
        >>> pace = Pace(10, now=0.0)
        >>> pace.take(0.0), pace.take(0.0), round(pace.seconds(), 3), pace.take(0.2)
        (True, False, 0.1, True)
    """

    def __init__(self, rate: float, now: float) -> None:
        self.rate = rate
        self.share = 1.0
        self._room = 1.0
        self._at = now

    def take(self, now: float) -> bool:
        """Whether one more may go out now."""
        rate = self.rate * self.share
        self._room = min(self._room + (now - self._at) * rate, max(1.0, rate * BURST_SECONDS))
        self._at = now
        if self._room < 1.0:
            return False
        self._room -= 1.0
        return True

    def seconds(self) -> float:
        """Until the next one."""
        return max(0.0, 1.0 - self._room) / max(self.rate * self.share, 1e-6)


class ReplayMember:
    """Stands between a worker and its membership (`brokers/port.py: Member`). Used from one event loop."""

    def __init__(
        self,
        member: Member,
        ends: Mapping[Place, int],
        choice: Choice,
        handled: Collection[str],
        pace: Pace | None,
        clock: Callable[[], float],
    ) -> None:
        self._member = member
        self._ends = ends
        self._wants = None if choice.everything else choice.wants
        self._handled = handled
        self._pace = pace
        self._clock = clock
        self._paused: set[Unit] = set()  # by the worker
        self._ended: set[Unit] = set()
        self._held: dict[Unit, deque[Arrival]] = {}  # received, and not handed out yet
        self._receiving: asyncio.Future[Sequence[Change]] | None = None
        self._wake = asyncio.Event()
        self.assigned: set[Unit] = set()

    @property
    def drained(self) -> bool:
        """Whether all that this process has of it was handed out."""
        return self.assigned <= self._ended and not self._held

    async def receive(self) -> Sequence[Change]:
        while True:
            received = await self._member.receive() if self._pace is None else await self._receive_slowly()
            changes = [change for found in received if (change := self._passed(found)) is not None]
            changes += self._due()
            if changes:
                return changes

    async def _receive_slowly(self) -> Sequence[Change]:
        """Until something was received, or the next event that is held may go out. What receives is never cancelled: what
        it had taken would be lost to us."""
        assert self._pace is not None
        if self._receiving is None:
            self._receiving = asyncio.ensure_future(self._member.receive())
        self._wake.clear()
        waking = asyncio.ensure_future(self._wake.wait())
        held = any(unit not in self._paused for unit in self._held)
        either: set[asyncio.Future[Any]] = {self._receiving, waking}
        try:
            await asyncio.wait(
                either,
                timeout=self._pace.seconds() if held else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            waking.cancel()
        if not self._receiving.done():
            return ()
        received, self._receiving = self._receiving, None
        return received.result()

    def _passed(self, change: Change) -> Change | None:
        if isinstance(change, Arrivals):
            return self._chosen(change)
        if isinstance(change, Gone):
            if change.gap.end >= self._end(change.unit):
                self._finish(change.unit)
        elif isinstance(change, Revoked | Lost):
            for unit in change.units:
                self._forget(unit)
        else:
            self.assigned.update(change.units)
        return change

    def _chosen(self, arrivals: Arrivals) -> Arrivals | None:
        unit, events = arrivals.unit, arrivals.events
        end = self._end(unit)
        if events[-1].position >= end:
            events = [a for a in events if a.position < end]
        if arrivals.events[-1].position >= end - 1:
            self._finish(unit)
        if not events:
            return None
        if self._wants is not None:
            for a in events:
                if not (a.rule or self._wants(a)):
                    a.rule = NOT_REPLAYED
        if self._pace is None:
            return Arrivals(unit, events)
        self._held.setdefault(unit, deque()).extend(events)
        self._member.pause(unit)
        return None

    def _due(self) -> list[Change]:
        """What is held and may go out now; events that no handler gets take no place in the rate."""
        found: list[Change] = []
        if self._pace is None:
            return found
        now = self._clock()
        for unit, held in list(self._held.items()):
            if unit in self._paused:
                continue
            out: list[Arrival] = []
            while held and (not self._delivers(held[0]) or self._pace.take(now)):
                out.append(held.popleft())
            if out:
                found.append(Arrivals(unit, out))
            if not held:
                del self._held[unit]
                if unit not in self._ended:
                    self._member.resume(unit)
        return found

    def _delivers(self, a: Arrival) -> bool:
        type = type_of(a)
        return not a.rule and (type is None or type in self._handled)

    def _end(self, unit: Unit) -> int:
        return self._ends.get((unit.topic, unit.partition), 0)

    def _finish(self, unit: Unit) -> None:
        self._ended.add(unit)
        self._member.pause(unit)

    def _forget(self, unit: Unit) -> None:
        self.assigned.discard(unit)
        self._paused.discard(unit)
        self._ended.discard(unit)
        self._held.pop(unit, None)

    def seek(self, unit: Unit, position: int) -> None:
        """Nothing arrives of a unit that was not sought: at its end, nothing has to."""
        self._held.pop(unit, None)
        self._ended.discard(unit)
        self._paused.discard(unit)
        if position >= self._end(unit):
            self._ended.add(unit)
        else:
            self._member.seek(unit, position)

    def pause(self, unit: Unit) -> None:
        self._paused.add(unit)
        self._member.pause(unit)

    def resume(self, unit: Unit) -> None:
        self._paused.discard(unit)
        if unit in self._held:
            self._wake.set()
        elif unit not in self._ended:
            self._member.resume(unit)

    async def ack(self, acks: Sequence[Ack]) -> None:
        await self._member.ack(acks)

    async def release(self, units: Sequence[Unit]) -> None:
        for unit in units:
            self._forget(unit)
        await self._member.release(units)

    async def close(self) -> None:
        if self._receiving is not None:
            self._receiving.cancel()
            await asyncio.gather(self._receiving, return_exceptions=True)
        await self._member.close()
