"""How long a scene waits for what a planted bug may prevent: as long as anything moves, on a busy machine too."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

LONGEST_SECONDS = 60.0
STILL_SECONDS = 5.0


class Patience:
    """`marks` change with whatever a child says, notes or does. `hurried`: something is planted, so it may never come."""

    def __init__(self, marks: Callable[[], Any], *, hurried: bool) -> None:
        self._marks = marks
        self._hurried = hurried
        self._still = STILL_SECONDS
        self._before = marks()

    def begin(self) -> None:
        """A child begins: until it has said or done its first thing, nothing is late."""
        self._before = self._marks()

    def soon(self, holds: Callable[[], Any]) -> bool:
        end = time.monotonic() + LONGEST_SECONDS
        marks, since = self._before, time.monotonic()
        while not holds():
            now = time.monotonic()
            if (found := self._marks()) != marks:
                marks, since = found, now
            if now > end or (self._hurried and marks != self._before and now - since > self._still):
                if self._hurried:  # it has come to light: what follows will not come either
                    self._still = 1.0
                return False
            time.sleep(0.03)
        return True
