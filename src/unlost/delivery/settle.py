"""Settling: the consequence first, the acknowledgement last. Outcomes of many deliveries share one commit.

**Guarantee** an outcome is reported as durable only after the store has said so.
**After a crash** outcomes that were still in this buffer do not exist; their events are delivered again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from unlost.delivery.lanes import Owned, Plain
from unlost.errors import Unavailable
from unlost.events.topic import Gap
from unlost.store.port import Outcome, Settlement, Store

log = logging.getLogger("unlost.settle")

RETRY_SECONDS = 0.5
BUFFER_MAX = 5000  # outcomes that wait for their commit; beyond it, runners wait
LATER_SECONDS = 0.05  # how long an outcome that is known to be durable waits for others


class Settler:
    """Collects outcomes and commits them, in order, as fast as the store can."""

    def __init__(
        self,
        store: Store,
        durable: Callable[[Owned, Outcome | Gap | Plain], None],
        fenced: Callable[[Owned], None],
    ) -> None:
        self._store = store
        self._durable = durable
        self._fenced = fenced
        self._pending: list[tuple[Owned, Outcome | Gap]] = []
        self._work = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._plain: list[Owned] = []  # with events that were handled and have no other consequence
        self._waiting = 0  # outcomes that wait for their commit
        self._alarm: asyncio.TimerHandle | None = None
        self._put = 0
        self._settled = 0
        self._waiters: list[tuple[int, asyncio.Future[None]]] = []

    @property
    def settled(self) -> int:
        """How many outcomes are durable, or were fenced."""
        return self._settled

    @property
    def idle(self) -> bool:
        return self._settled == self._put

    @property
    def full(self) -> bool:
        """Whether runners should wait in `room`."""
        return self._waiting >= BUFFER_MAX

    def put(self, owned: Owned, outcome: Outcome | Gap) -> int:
        """Takes an outcome, or positions that hold no event; the number is for `flush`."""
        self._pending.append((owned, outcome))
        return self._count()

    def later(self, owned: Owned, outcome: Outcome) -> None:
        """The same for an event whose mark is durable, so that nothing is handled again without its position: many of
        these share a commit."""
        self._pending.append((owned, outcome))
        self._waiting += 1
        self._put += 1
        if self._alarm is None:
            self._alarm = asyncio.get_running_loop().call_later(LATER_SECONDS, self._work.set)

    def done(self, owned: Owned, position: int, event_hash: int, size: int) -> int:
        """The same for an event that was handled and has no other consequence: the common case, at little cost."""
        plain = owned.plain or self._plain_of(owned)
        plain.positions.append(position)
        plain.digest ^= event_hash
        plain.size += size
        return self._count()

    def begin(self, owned: Owned, positions: Sequence[int], digest: int) -> int:
        """These are about to be handled, at most once: they may be handled when the number is settled."""
        plain = self._plain_of(owned)
        plain.begun.extend(positions)
        plain.begun_digest ^= digest
        return self._count()

    def ended(self, owned: Owned, positions: Sequence[int], size: int) -> int:
        """They were begun, and handled; nothing else follows from it."""
        plain = self._plain_of(owned)
        plain.ended.extend(positions)
        plain.size += size
        return self._count()

    def _plain_of(self, owned: Owned) -> Plain:
        if owned.plain is None:
            owned.plain = Plain()
            self._plain.append(owned)
        return owned.plain

    def _count(self) -> int:
        self._work.set()
        self._waiting += 1
        self._put += 1
        return self._put

    async def room(self) -> None:
        while self.full:
            self._work.set()
            self._room.clear()
            await self._room.wait()

    async def flush(self, number: int | None = None) -> None:
        """Returns when everything that was put (up to `number`) is durable, or was fenced."""
        wanted = self._put if number is None else number
        if self._settled >= wanted:
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append((wanted, future))
        self._work.set()
        await future

    async def run(self) -> None:
        """Until cancelled. Raises what the store raises, but for `Unavailable`: then it tries the same again."""
        while True:
            await self._work.wait()
            self._work.clear()
            if self._alarm is not None:
                self._alarm.cancel()
                self._alarm = None
            batch, self._pending = self._pending, []
            plain_owners, self._plain = self._plain, []
            count, self._waiting = self._waiting, 0
            self._room.set()
            by_unit: dict[int, tuple[Owned, list[Outcome | Gap], Plain | None]] = {}
            for owned in plain_owners:
                by_unit[id(owned)] = (owned, [], owned.plain)
                owned.plain = None
            for owned, outcome in batch:
                by_unit.setdefault(id(owned), (owned, [], None))[1].append(outcome)
            live = [entry for entry in by_unit.values() if not entry[0].gone]
            if live:
                fenced = set(await self._commit([_settlement(*entry) for entry in live]))
                for owned, outcomes, plain in live:
                    if owned.unit in fenced:
                        self._fenced(owned)
                        continue
                    if plain is not None:
                        self._durable(owned, plain)
                    for outcome in outcomes:
                        self._durable(owned, outcome)
            self._settled += count
            self._wake()

    async def _commit(self, settlements: list[Settlement]) -> list[object]:
        while True:
            try:
                return list(await self._store.settle(settlements))
            except Unavailable as e:
                log.error("nothing can be settled, so nothing is acknowledged; trying again: %s", e)
                await asyncio.sleep(RETRY_SECONDS)

    def _wake(self) -> None:
        due = [f for n, f in self._waiters if n <= self._settled]
        self._waiters = [(n, f) for n, f in self._waiters if n > self._settled]
        for future in due:
            if not future.done():
                future.set_result(None)


def _settlement(owned: Owned, settled: Sequence[Outcome | Gap], plain: Plain | None) -> Settlement:
    return Settlement(
        owned.unit, owned.epoch,
        [o for o in settled if isinstance(o, Outcome)],
        [g for g in settled if isinstance(g, Gap)],
        *((plain.positions, plain.digest, plain.begun, plain.begun_digest, plain.ended) if plain is not None else ()),
    )  # fmt: skip
