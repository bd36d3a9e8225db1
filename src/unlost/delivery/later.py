"""Later: what was published or sent with `delay=` or `at=` leaves when its time has come.

**Guarantee** nothing leaves early, and all of it leaves while a process with this store runs services.
**After a crash** what was not released is released by the next process: being released is one commit.
"""

from __future__ import annotations

import asyncio
import logging
from datetime import datetime, timedelta

from unlost.errors import OutcomeUnknown, Unavailable, UsageError
from unlost.store.port import Store
from unlost.world import World

log = logging.getLogger("unlost.later")

POLL_SECONDS = 0.5  # what others have delayed is seen so late at most
AGAIN_SECONDS = 1.0
LONGEST_SECONDS = 10 * 366 * 86400


def due_of(world: World, delay: float | timedelta | None, at: datetime | None) -> tuple[int, bool] | None:
    """When it is due (microseconds), and whether a time was named; None: now.

    Raises:
        UsageError: both are given, or something that is no time to wait for.
    """
    if delay is None and at is None:
        return None
    if delay is not None and at is not None:
        raise UsageError(
            "UL1280", "an event is delayed by `delay` or until `at`, not by both", found=f"{delay!r}, {at!r}"
        )
    if at is not None:
        if not isinstance(at, datetime) or at.tzinfo is None:
            raise UsageError(
                "UL1281", "`at` is a datetime with its time zone", found=repr(at), fix="datetime(2026, 12, 24, 18, tzinfo=UTC)"
            )  # fmt: skip
        due, by_clock = int(at.timestamp() * 1e6), True
    else:
        seconds = delay.total_seconds() if isinstance(delay, timedelta) else delay
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds >= 0:
            raise UsageError("UL1282", "`delay` is a number of seconds or a timedelta, not negative", found=repr(delay))
        due, by_clock = world.steady() + int(min(seconds, 2 * LONGEST_SECONDS) * 1e6), False
    if due > world.steady() + LONGEST_SECONDS * 1_000_000:
        raise UsageError("UL1283", "an event is delayed by ten years at most", found=repr(delay if at is None else at))
    return due, by_clock


class Releaser:
    """Releases what one store has delayed. Several processes may do it at once."""

    def __init__(self, store: Store, world: World, *, poll_seconds: float = POLL_SECONDS) -> None:
        self._store = store
        self._world = world
        self._poll = poll_seconds

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                wait = await self._round()
            except (Unavailable, OutcomeUnknown) as e:
                log.error("what was delayed cannot be released now; it stays where it is, and is tried again: %s", e)
                wait = AGAIN_SECONDS
            await asyncio.sleep(wait)

    async def _round(self) -> float:
        """One look; how long until the next, in seconds."""
        due = await self._store.next_due()
        if due is None:
            return self._poll
        left = (due - self._world.steady()) / 1e6
        if left > 0:
            return min(left, self._poll)
        released = await self._store.release()
        return 0.0 if released else self._poll  # another process has them
