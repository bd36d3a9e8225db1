"""Which events may have killed a process: they run one at a time, so that the next death says whose fault it was.

The process is shared by all services of an App. While one of them has such an event, none of the others starts a
handler beside it: else an innocent event would answer for its neighbour, and end on the shelf.
"""

from __future__ import annotations

from typing import Protocol


class Party(Protocol):
    """One service at work in this process (the worker)."""

    def busy(self) -> bool:
        """Whether it has an event in hand."""

    def has_suspect_ready(self) -> bool: ...

    def wake(self) -> None:
        """It may go on: whoever waited for its turn looks again."""


class Suspicion:
    """The suspects of one process, over all of its services."""

    def __init__(self) -> None:
        self.count = 0
        self.parties: list[Party] = []

    def change(self, by: int) -> None:
        self.count += by
        if self.count == 0:
            self.pass_on()

    def busy(self) -> bool:
        return any(party.busy() for party in self.parties)

    def elsewhere(self, me: Party) -> bool:
        """Whether another service has a suspect to run, which then goes first."""
        return any(party is not me and party.has_suspect_ready() for party in self.parties)

    def pass_on(self) -> None:
        for party in self.parties:
            party.wake()
