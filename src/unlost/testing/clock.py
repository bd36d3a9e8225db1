"""Time that moves only when a test moves it."""

from __future__ import annotations

import asyncio
import threading

from unlost.world import REAL, World


class VirtualWorld(World):
    """Starts at the real time (or at `start`, microseconds since 1970) and then stands still until `advance`.

    Random choices come from `seed`, so a retry waits equally long in every run.

    Example:
        >>> world = VirtualWorld(start=0)
        >>> world.advance(1.5)
        >>> world.now()
        1500000
    """

    def __init__(self, seed: int = 0, *, start: int | None = None) -> None:
        super().__init__(seed)
        self._now = REAL.now() if start is None else start
        self._began = self._now
        self._lock = threading.Lock()
        self._sleepers: list[tuple[int, asyncio.Event, asyncio.AbstractEventLoop]] = []

    def now(self) -> int:
        return self._now

    def steady(self) -> int:
        return self._now

    def monotonic(self) -> float:
        return (self._now - self._began) / 1e6

    async def wait_until(self, due: int, wake: asyncio.Event) -> None:
        """Returns when the clock has been moved to `due`, or `wake` is set: the clock sets it, too."""
        sleeper = (due, wake, asyncio.get_running_loop())
        with self._lock:
            if due <= self._now:
                return
            self._sleepers.append(sleeper)
        try:
            await wake.wait()
        finally:
            with self._lock:
                if sleeper in self._sleepers:
                    self._sleepers.remove(sleeper)

    def advance(self, seconds: float) -> None:
        self.advance_to(self._now + round(seconds * 1e6))

    def advance_to(self, when: int) -> None:
        """Moves the clock (never back) and wakes whoever is due."""
        with self._lock:
            self._now = max(self._now, when)
            due = [s for s in self._sleepers if s[0] <= self._now]
            self._sleepers = [s for s in self._sleepers if s[0] > self._now]
        for _, wake, loop in due:
            loop.call_soon_threadsafe(wake.set)
