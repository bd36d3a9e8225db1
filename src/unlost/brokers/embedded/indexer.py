"""Building the index of the log, after the fact and in small steps (see `index.py`).

New events become a small segment; eight segments of a size become one of the next size. So a log of any length has a few
dozen segments, and each event is written about once for each power of eight. What the log has trimmed falls out when its
segment is merged, or more than half of it is trimmed.
**After a crash** at any line the old segments are there, or the new one, or for a moment both: a segment that others cover
is removed.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import chain, groupby

from unlost.brokers.embedded.index import Index, Parts, last_of, parts_of, spans_of, stamps_of, still_there
from unlost.brokers.embedded.segments import Broken, Segment, Span, joined, merge, without, write
from unlost.errors import Unavailable
from unlost.sqlite.file import File
from unlost.sqlite.schema import POSITION_BITS, POSITION_MAX
from unlost.world import REAL

TAIL_MAX = 2000  # so few events are read faster than they are worth a segment
BATCH = 4096  # events of a new segment
FANOUT_BITS = 3  # eight segments of a size become one of the next
STEP = 200  # events
TICK_SECONDS = 2.0
REST = 3.0  # of the time that a step took: a quarter of a processor at most goes into building
_PLACE = struct.Struct(">Q").pack


class Indexer:
    """Builds the index of one file. Of several only one works at a time."""

    def __init__(self, file: File) -> None:
        self._file = file
        self._index = Index(file)
        self._folder = self._index.folder
        self._enough = 0  # before the log has grown to this, there is nothing to do

    async def keep(self) -> None:
        """Builds for as long as it is not cancelled, in steps of a few milliseconds with rests between them.

        Raises:
            Damaged: the log is. Unavailable: the folder cannot be written.
        """
        while True:
            try:
                with closing(self.grow()) as steps:
                    began = REAL.monotonic()
                    for _ in steps:
                        await asyncio.sleep((REAL.monotonic() - began) * REST)
                        began = REAL.monotonic()
            except FileNotFoundError:
                pass  # somebody has deleted the folder: from the beginning, at the next turn
            except OSError as e:
                raise Unavailable(
                    "UL1353", f"the index of the log cannot be written: {self._folder}", found=str(e),
                    fix="make room, or let us write there; unlost trace works without it, and takes longer",
                ) from None  # fmt: skip
            await asyncio.sleep(TICK_SECONDS)

    def grow(self) -> Generator[None, None, None]:
        """Brings the index up to the end of the log, but for `TAIL_MAX` events; does nothing while somebody else does.
        A step takes a few milliseconds; it may be given up after any.

        Raises:
            Damaged: an event of the log is damaged or missing. OSError: the folder cannot be written.
        """
        parts = self._file.read(parts_of)
        if _size(spans_of(parts)) < TAIL_MAX or sum(p.end for p in parts.values()) < self._enough:
            return
        self._folder.mkdir(mode=0o700, exist_ok=True)
        with self._alone() as alone:
            working = alone
            if alone:
                for path in self._folder.glob("*.part"):  # of a builder that has died
                    path.unlink(missing_ok=True)
            while working:
                with self._usable() as (parts, segments):
                    covered = [span for segment in segments for span in segment.spans]
                    missing = without(spans_of(parts), covered)
                    merging = _thin(segments, parts) or _alike(segments)
                    if merging:
                        yield from self._merge(merging, parts)
                    elif _size(missing) >= TAIL_MAX:
                        yield from self._add(missing, parts)
                    else:
                        self._enough = sum(p.end for p in parts.values()) - _size(missing) + TAIL_MAX
                        working = False

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Whether we are the only builder. The lock is on the folder: who deletes it, lets go of it."""
        fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True
        finally:
            os.close(fd)

    @contextmanager
    def _usable(self) -> Iterator[tuple[Parts, Sequence[Segment]]]:
        """The segments that are worth something; the others are removed."""
        with self._index.opened() as segments:
            parts, believed = self._index.believed(segments)
            good: list[Segment] = []
            for segment in sorted(believed, key=lambda s: s.events, reverse=True):
                there = still_there(segment.spans, parts)
                if without(there, (span for other in good for span in other.spans)):  # not trimmed, and in no other
                    good.append(segment)
            for path in {s.path for s in segments} - {s.path for s in good}:
                path.unlink(missing_ok=True)
            yield parts, good

    def _add(self, missing: Iterable[Span], parts: Parts) -> Iterator[None]:
        spans, room = [], BATCH
        for span in missing:
            if room:
                spans.append(span._replace(end=min(span.end, span.start + room)))
                room -= spans[-1].end - spans[-1].start
        found: list[bytes] = []
        events = chain.from_iterable(self._index.read(span, parts[span.number]) for span in spans)
        for n, (at, hashes) in enumerate(events, 1):
            place = _PLACE(at)
            found += [hash + place for hash in hashes]
            if n % STEP == 0:
                yield
        stamps = self._file.read(lambda c: stamps_of(c, [last_of(span) for span in spans]))
        if all(last_of(span) in stamps for span in spans):  # else it was trimmed under our hands
            spans = [span._replace(stamp=stamps[last_of(span)]) for span in spans]
            yield from write(self._folder, self._index.owner, spans, [sorted(found)])

    def _merge(self, segments: Sequence[Segment], parts: Parts) -> Iterator[None]:
        spans = joined(span for segment in segments for span in segment.spans)
        there = still_there(spans, parts)
        keep = None if there == spans else _keep(parts)
        try:
            yield from write(self._folder, self._index.owner, there, merge(segments, keep))
        except Broken as e:  # its events are read again
            e.path.unlink(missing_ok=True)
            return
        for segment in segments:
            segment.path.unlink(missing_ok=True)


def _keep(parts: Parts) -> Callable[[int], bool]:
    """Whether the log may still hold a place."""
    starts = {number: part.start for number, part in parts.items()}
    return lambda at: at & POSITION_MAX >= starts.get(at >> POSITION_BITS, POSITION_MAX)


def _thin(segments: Sequence[Segment], parts: Parts) -> Sequence[Segment]:
    """One that is mostly about what the log has trimmed: it is written again without."""
    return next(([s] for s in segments if 2 * _size(still_there(s.spans, parts)) < s.events), ())


def _alike(segments: Sequence[Segment]) -> Sequence[Segment]:
    """The smallest segments of which there are too many of one size."""

    def size(segment: Segment) -> int:
        return ((segment.events // BATCH).bit_length() + FANOUT_BITS - 1) // FANOUT_BITS

    by_size = groupby(sorted(segments, key=size), key=size)
    groups = (list(group) for _, group in by_size)
    return next((group for group in groups if len(group) >= 1 << FANOUT_BITS), ())


def _size(spans: Iterable[Span]) -> int:
    return sum(span.end - span.start for span in spans)
