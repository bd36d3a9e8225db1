"""Settling: the consequence first, the acknowledgement last. Outcomes of many deliveries share one commit.

**Guarantee** an outcome is reported as durable only after the store has said so.
**After a crash** outcomes that were still in this buffer do not exist; their events are delivered again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from unlost.delivery.lanes import Owned
from unlost.errors import Unavailable
from unlost.events.topic import Gap
from unlost.store.port import Outcome, Settlement, Store

log = logging.getLogger("unlost.settle")

RETRY_SECONDS = 0.5
BUFFER_MAX = 5000  # outcomes that wait for their commit; beyond it, runners wait


class Settler:
    """Collects outcomes and commits them, in order, as fast as the store can."""

    def __init__(
        self,
        store: Store,
        durable: Callable[[Owned, Outcome | Gap], None],
        fenced: Callable[[Owned], None],
    ) -> None:
        self._store = store
        self._durable = durable
        self._fenced = fenced
        self._pending: list[tuple[Owned, Outcome | Gap]] = []
        self._work = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._put = 0
        self._settled = 0
        self._waiters: list[tuple[int, asyncio.Future[None]]] = []

    @property
    def full(self) -> bool:
        return len(self._pending) >= BUFFER_MAX

    def put(self, owned: Owned, outcome: Outcome | Gap) -> int:
        """Takes an outcome, or positions that hold no event; the number is for `flush`."""
        self._pending.append((owned, outcome))
        self._put += 1
        self._work.set()
        if self.full:
            self._room.clear()
        return self._put

    async def room(self) -> None:
        await self._room.wait()

    async def flush(self, number: int | None = None) -> None:
        """Returns when everything that was put (up to `number`) is durable, or was fenced."""
        wanted = self._put if number is None else number
        if self._settled >= wanted:
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append((wanted, future))
        await future

    async def run(self) -> None:
        """Until cancelled. Raises what the store raises, but for `Unavailable`: then it tries the same again."""
        while True:
            await self._work.wait()
            self._work.clear()
            batch, self._pending = self._pending, []
            self._room.set()
            by_unit: dict[int, tuple[Owned, list[Outcome | Gap]]] = {}
            for owned, outcome in batch:
                by_unit.setdefault(id(owned), (owned, []))[1].append(outcome)
            live = [(owned, outcomes) for owned, outcomes in by_unit.values() if not owned.gone]
            if live:
                fenced = set(await self._commit([_settlement(o, outcomes) for o, outcomes in live]))
                for owned, outcomes in live:
                    if owned.unit in fenced:
                        self._fenced(owned)
                        continue
                    for outcome in outcomes:
                        self._durable(owned, outcome)
            self._settled += len(batch)
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


def _settlement(owned: Owned, settled: Sequence[Outcome | Gap]) -> Settlement:
    outcomes = [o for o in settled if isinstance(o, Outcome)]
    if len(outcomes) == len(settled):
        return Settlement(owned.unit, owned.epoch, outcomes)
    return Settlement(owned.unit, owned.epoch, outcomes, [g for g in settled if isinstance(g, Gap)])
