"""When everything fails, not the events are at fault: then probe, and do not fill the shelf. Pure.

After `DEATHS_IN_A_ROW` events of one handler have spent all their attempts with no success between, its dependency
is taken for down. From then on nothing more of it goes to the shelf for spent attempts and no attempt is counted:
one event at a time is tried, a probe a second, until one succeeds. Rejected and undecodable events still end as always.
"""

from __future__ import annotations

import logging

from unlost.delivery.fate import Dead, Done, Fate, RetryAt

log = logging.getLogger("unlost.outage")

DEATHS_IN_A_ROW = 100
PROBE_SECONDS = 1.0


class Outage:
    """Remembers, per handler of one worker, how many events in a row have spent their attempts."""

    def __init__(self, service: str) -> None:
        self._service = service
        self._deaths: dict[str, int] = {}

    @property
    def suspected(self) -> bool:
        """Whether any handler has had a death since its last success."""
        return bool(self._deaths)

    def lasts(self, handler: str) -> bool:
        return bool(self._deaths) and self._deaths.get(handler, 0) >= DEATHS_IN_A_ROW

    def judge(self, handler: str, fate: Fate, now: int) -> Fate:
        """The fate in the light of what happened to the others. `now` in microseconds."""
        if isinstance(fate, Done):
            self.succeeded(handler)
            return fate
        if isinstance(fate, Dead) and fate.reason == "exhausted":
            self._deaths[handler] = self._deaths.get(handler, 0) + 1
            if self._deaths[handler] == DEATHS_IN_A_ROW:
                log.error(
                    "%s: %d events in a row have failed in %s, the last with: %s. Is something it needs down? From now "
                    "on one event at a time is tried, and none goes to the shelf for that",
                    self._service, DEATHS_IN_A_ROW, handler, fate.error,
                )  # fmt: skip
                return fate
        spent = isinstance(fate, Dead) and fate.reason == "exhausted"
        if self.lasts(handler) and (spent or (isinstance(fate, RetryAt) and fate.spends_attempt)):
            return RetryAt(now + int(PROBE_SECONDS * 1e6), spends_attempt=False)
        return fate

    def succeeded(self, handler: str) -> bool:
        """True if an outage ends with this."""
        over = self.lasts(handler)
        self._deaths.pop(handler, None)
        if over:
            log.warning("%s: %s works again", self._service, handler)
        return over
