"""Progress of one (service, topic, partition): what has an outcome, and from where to go on. Pure.

`position` says where delivery resumes: everything below it has an outcome. `fated` records, on its own, which
positions really got one. In a correct system `position` is the end of the first run of `fated`; keeping both
lets the audit name every event that was passed over without an outcome.

Encoding of runs: unsigned LEB128 varints, alternating "gap before the run" and "length of the run".
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator

from unlost.audit import BEGUN
from unlost.errors import Damaged, invariant


class Runs:
    """A set of positions, kept as sorted, disjoint, non-adjacent half-open runs."""

    __slots__ = ("_ends", "_starts")

    def __init__(self, runs: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        for start, end in runs:
            self._starts.append(start)
            self._ends.append(end)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(zip(self._starts, self._ends, strict=True))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Runs) and self._starts == other._starts and self._ends == other._ends

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Runs({list(self)})"

    def __len__(self) -> int:
        """How many positions, not how many runs."""
        return sum(self._ends) - sum(self._starts)

    def __contains__(self, position: int) -> bool:
        i = bisect_right(self._starts, position) - 1
        return i >= 0 and position < self._ends[i]

    def add(self, position: int) -> bool:
        """Adds one; False if it was in already."""
        starts, ends = self._starts, self._ends
        i = bisect_right(starts, position) - 1
        if i >= 0 and position < ends[i]:
            return False
        joins_left = i >= 0 and ends[i] == position
        joins_right = i + 1 < len(starts) and starts[i + 1] == position + 1
        if joins_left and joins_right:
            ends[i] = ends.pop(i + 1)
            starts.pop(i + 1)
        elif joins_left:
            ends[i] = position + 1
        elif joins_right:
            starts[i + 1] = position
        else:
            starts.insert(i + 1, position)
            ends.insert(i + 1, position + 1)
        return True

    def add_range(self, start: int, end: int) -> int:
        """Adds all of [start, end) that is not in yet; returns how many that were."""
        missing = list(self.gaps(start, end))
        if not missing:
            return 0
        kept = [(a, b) for a, b in self if b < start or a > end]
        touching = [(a, b) for a, b in self if not (b < start or a > end)]
        joined = (min([start, *(a for a, _ in touching)]), max([end, *(b for _, b in touching)]))
        runs = sorted([*kept, joined])
        self._starts, self._ends = [a for a, _ in runs], [b for _, b in runs]
        return sum(b - a for a, b in missing)

    def add_many(self, positions: list[int]) -> int:
        """Adds positions in any order, in one pass; returns how many were not in yet."""
        if not positions:
            return 0
        positions.sort()
        fresh: list[list[int]] = []
        last = -2
        for position in positions:
            if position == last + 1:
                fresh[-1][1] = position + 1
            elif position != last:
                fresh.append([position, position + 1])
            last = position
        if len(fresh) == 1 and self._starts and self._ends[-1] == fresh[0][0]:  # the next ones, in order
            self._ends[-1] = fresh[0][1]
            return fresh[0][1] - fresh[0][0]
        before = len(self)
        starts: list[int] = []
        ends: list[int] = []
        for start, end in sorted([*([a, b] for a, b in self), *fresh]):
            if ends and start <= ends[-1]:
                ends[-1] = max(ends[-1], end)
            else:
                starts.append(start)
                ends.append(end)
        self._starts, self._ends = starts, ends
        return len(self) - before

    def remove_many(self, positions: list[int]) -> int:
        """Takes positions out; returns how many were in."""
        before, gone = len(self), Runs()
        gone.add_many(positions)
        left = [kept for start, end in self for kept in gone.gaps(start, end)]
        self._starts, self._ends = [a for a, _ in left], [b for _, b in left]
        return before - len(self)

    def first_gap(self, start: int) -> int:
        """The first position at or above `start` that is not in."""
        i = bisect_right(self._starts, start) - 1
        return self._ends[i] if i >= 0 and start < self._ends[i] else start

    def gaps(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The runs that are not in, within [start, end)."""
        at = start
        for run_start, run_end in self:
            if run_end <= at:
                continue
            if run_start >= end:
                break
            if run_start > at:
                yield at, run_start
            at = run_end
        if at < end:
            yield at, end

    def encode(self) -> bytes:
        out, at = bytearray(), 0
        for start, end in self:
            _put(out, start - at)
            _put(out, end - start)
            at = end
        return bytes(out)

    @classmethod
    def decode(cls, raw: bytes) -> Runs:
        numbers, value, shift = [], 0, 0
        for byte in raw:
            value |= (byte & 0x7F) << shift
            if byte & 0x80:
                shift += 7
            else:
                numbers.append(value)
                value = shift = 0
        if shift or len(numbers) % 2:
            raise Damaged("UL3010", "a saved progress cannot be read", found=raw[:40].hex(), fix="run: unlost audit")
        runs = cls()
        at = 0
        for gap, length in zip(numbers[::2], numbers[1::2], strict=True):
            start = at + gap
            at = start + length
            runs._starts.append(start)
            runs._ends.append(at)
        return runs


class Progress:
    """The saved state of one unit, and the only way to change it."""

    __slots__ = ("begun", "counts", "digest", "fated", "position")

    def __init__(
        self, position: int, fated: Runs, counts: dict[str, int], digest: int, begun: Runs | None = None
    ) -> None:
        self.position = position
        self.fated = fated
        self.counts = counts
        self.digest = digest
        self.begun = (
            Runs() if begun is None else begun
        )  # those of `fated` that are in the hands of a handler that gets them once

    def settle(self, position: int, event_hash: int, counted_as: str | None) -> None:
        """Gives a position its outcome. `counted_as` is None where the ledger lists the event one by one."""
        invariant(position >= self.position, f"position {position} has an outcome already")
        invariant(self.fated.add(position), f"position {position} has an outcome already")
        self.digest ^= event_hash
        if counted_as is not None:
            self.count(counted_as, 1)
        self.position = self.fated.first_gap(self.position)

    def settle_done(self, positions: list[int], digest: int) -> None:
        """Many events that were handled, with the XOR of their hashes."""
        self._add(positions, digest, "done")

    def begin(self, positions: list[int], digest: int) -> None:
        """Many events that are about to be handled, and will not be delivered again whatever happens."""
        self._add(positions, digest, BEGUN)
        self.begun.add_many(positions)

    def begin_again(self, position: int) -> None:
        """The same for an event that waited in the store: it has its place in the books already."""
        self.begun.add(position)
        self.count(BEGUN, 1)

    def end(self, positions: list[int], counted_as: str | None) -> None:
        """What became of events that were begun. `counted_as` is None where the ledger lists them one by one."""
        invariant(
            self.begun.remove_many(positions) == len(positions),
            f"of {len(positions)} positions from {min(positions)} on, one was not begun",
        )
        self.count(BEGUN, -len(positions))
        if not self.counts[BEGUN]:
            del self.counts[BEGUN]
        if counted_as is not None:
            self.count(counted_as, len(positions))

    def abandon(self) -> list[int]:
        """Whoever had begun them is gone: nobody knows whether they were handled. Returns their positions."""
        positions = [position for start, end in self.begun for position in range(start, end)]
        if positions:
            self.end(list(positions), None)
        return positions

    def _add(self, positions: list[int], digest: int, state: str) -> None:
        invariant(
            min(positions) >= self.position and self.fated.add_many(positions) == len(positions),
            f"of {len(positions)} positions from {min(positions)} on, one has an outcome already",
        )
        self.digest ^= digest
        self.count(state, len(positions))
        self.position = self.fated.first_gap(self.position)

    def pass_over(self, start: int, end: int) -> list[tuple[int, int]]:
        """Gives every position of [start, end) that has none its outcome: there is no event. Returns those."""
        missing = list(self.fated.gaps(max(start, self.position), end))
        self.fated.add_range(max(start, self.position), end)
        self.position = self.fated.first_gap(self.position)
        return missing

    def count(self, state: str, change: int) -> None:
        self.counts[state] = self.counts.get(state, 0) + change


def _put(out: bytearray, value: int) -> None:
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
