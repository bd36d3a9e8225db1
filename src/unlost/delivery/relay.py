"""Relaying: from the outbox of the store to a broker that keeps its log elsewhere.

**Guarantee** a row leaves the outbox only with the broker's receipt in hand, and rows of one key leave in the order
of their commits: a row that fails holds up its own key, and no other. (What the broker would refuse is refused where
it is published; for a row that fails all the same, later ones of its key in the same batch may have left before.)
**After a crash** rows that were sent and not yet marked are sent again, with the same ids: never zero times.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence

from unlost.brokers.port import Broker
from unlost.errors import OutcomeUnknown, PartlyPublished, Unavailable, UnlostError
from unlost.store.port import Lane, Outbox, Unsent

log = logging.getLogger("unlost.relay")

BATCH = 1000
AGAIN_SECONDS = 0.5
CLAIM_SECONDS = 0.2
HELD_KEYS_MAX = 1000  # keys with a row that fails; beyond it nothing is sent until one of them succeeds
SAY_SECONDS = 20.0


class Relay:
    """Sends what one outbox holds: all of it, or the part that this process has of it."""

    def __init__(self, outbox: Outbox, broker: Broker) -> None:
        self._outbox = outbox
        self._broker = broker
        self._held: dict[Lane, int] = {}  # lanes that wait: their first row that failed
        self._look_again = 0.0
        self._said = float("-inf")
        self.emptied = asyncio.Event()  # set while nothing is left to send

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                if not await self._outbox.claim():
                    await asyncio.sleep(CLAIM_SECONDS)
                    continue
                if not await self._round():
                    await self._outbox.wait(CLAIM_SECONDS)
            except (Unavailable, OutcomeUnknown) as e:
                self._say("the outbox cannot be emptied now; nothing of it is lost, and it is tried again: %s", e)
                await asyncio.sleep(AGAIN_SECONDS)

    async def _round(self) -> bool:
        """One batch. False: there is nothing to do for now."""
        loop = asyncio.get_running_loop()
        if self._held and loop.time() >= self._look_again:
            self._held.clear()  # each gets another chance, in order
        full = len(self._held) > HELD_KEYS_MAX
        chosen = [] if full else await self._outbox.next(self._held, BATCH)
        if not chosen:
            if not self._held:
                self.emptied.set()
            return False
        self.emptied.clear()
        sent = await self._send(chosen)
        if sent:
            await self._outbox.sent(sent)
        return True  # if all were refused, it is the turn of other lanes at once

    async def _send(self, rows: Sequence[Unsent]) -> list[int]:
        """The numbers of those that the broker has confirmed."""
        try:
            await self._broker.publish([row.envelope for row in rows])
        except PartlyPublished as e:
            return [
                row.number for row, receipt in zip(rows, e.receipts, strict=True) if not self._failed(row, receipt, e)
            ]
        except (Unavailable, OutcomeUnknown):
            raise
        except UnlostError as e:
            if len(rows) > 1:  # one of them is to blame: each by itself, in the same order
                return await self._send_one_by_one(rows)
            self._failed(rows[0], None, e)
            return []
        return [row.number for row in rows]

    async def _send_one_by_one(self, rows: Sequence[Unsent]) -> list[int]:
        sent: list[int] = []
        for row in rows:
            if row.lane not in self._held:
                sent += await self._send([row])
        return sent

    def _failed(self, row: Unsent, receipt: object, error: UnlostError) -> bool:
        """Holds the lane of a row that was not accepted."""
        if receipt is not None:
            return False
        self._held.setdefault(row.lane, row.number)
        self._look_again = asyncio.get_running_loop().time() + AGAIN_SECONDS
        self._say("an event of the outbox was refused; it stays there, and its key waits behind it: %s", error)
        return True

    def _say(self, text: str, error: UnlostError) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._said > SAY_SECONDS:
            self._said = now
            log.error(text, error)

    async def finish(self, seconds: float) -> None:
        """Gives what is left a last chance; it is not lost without one."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                self.emptied.clear()
                await self.emptied.wait()
