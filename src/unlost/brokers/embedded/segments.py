"""Files of sorted (hash, place) pairs: what an index of a log is made of. Knows no broker.

A segment is written once and never changed. It says which spans of the log it covers, and whose log that is. Its head and
each of its blocks carry a checksum, checked before anything in them is believed.
**Guarantee** what is read from a segment was written there; anything else raises `Broken`. Nothing is mapped into memory:
a file that somebody cuts off while it is read must not end the process.
**After a crash** a segment is there as a whole, under its own name, or what was written is a `.part` that nobody reads.
Nothing is fsynced: what a power loss takes of it, the checksums tell.
"""

from __future__ import annotations

import os
import struct
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from unlost.world import new_id

HASH, ENTRY = 8, 16  # bytes: a hash, then a place, both big-endian, so that bytes sort as numbers do
BLOCK = 4096  # its entries, zeros, and a checksum over them and its number
PER_BLOCK = (BLOCK - 4) // ENTRY
AT_ONCE = 2  # blocks of each segment in one step of a merge
SPANS_MAX = 1 << 20
_MAGIC = b"unlostX1"
_HEAD = struct.Struct("<8s16sQQ")  # magic, owner, entries, spans
_SPAN = struct.Struct("<QQQ16s")
_CRC = struct.Struct("<I")


class Broken(Exception):
    """The file is no segment, not one of this log, or not as it was written."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(path, why)
        self.path = path


class Span(NamedTuple):
    """Positions [start, end) of a part of the log. `stamp` is what the log said of the last of them."""

    number: int
    start: int
    end: int
    stamp: bytes = bytes(16)


class Segment:
    """An open segment. Several threads and processes may read it; whoever removes it meanwhile does no harm."""

    def __init__(self, path: Path, owner: bytes) -> None:
        """
        Raises:
            Broken: it is not a whole segment of this owner. OSError: it is gone, say.
        """
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.spans, self.entries, self._begin = _read_head(path, self._fd, owner)
        except BaseException:
            os.close(self._fd)
            raise
        self._blocks = -(-self.entries // PER_BLOCK)

    @property
    def events(self) -> int:
        return sum(span.end - span.start for span in self.spans)

    def places(self, hash: bytes) -> Iterator[int]:
        """Where it says that this hash stands, in ascending order."""
        low, high = 0, self._blocks
        while low < high:
            middle = (low + high) // 2
            if self._block(middle)[-ENTRY : HASH - ENTRY] < hash:
                low = middle + 1
            else:
                high = middle
        for number in range(low, self._blocks):
            block = self._block(number)
            first = bisect_left(range(0, len(block), ENTRY), hash, key=lambda at: block[at : at + HASH])
            for at in range(first * ENTRY, len(block), ENTRY):
                if block[at : at + HASH] != hash:
                    return
                yield int.from_bytes(block[at + HASH : at + ENTRY])

    def pieces(self) -> Iterator[list[bytes]]:
        """All entries, a few blocks at a time."""
        for number in range(0, self._blocks, AT_ONCE):
            some = b"".join(self._block(n) for n in range(number, min(number + AT_ONCE, self._blocks)))
            yield [some[at : at + ENTRY] for at in range(0, len(some), ENTRY)]

    def _block(self, number: int) -> bytes:
        """Its entries."""
        raw = os.pread(self._fd, BLOCK, self._begin + number * BLOCK)
        if len(raw) != BLOCK or _CRC.pack(zlib.crc32(raw[:-4], number)) != raw[-4:]:
            raise Broken(self.path, f"block {number} does not match its checksum")
        return raw[: min(PER_BLOCK, self.entries - number * PER_BLOCK) * ENTRY]

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _read_head(path: Path, fd: int, owner: bytes) -> tuple[Sequence[Span], int, int]:
    """Spans, entries, and where the blocks begin."""
    raw = os.pread(fd, _HEAD.size, 0)
    if len(raw) != _HEAD.size:
        raise Broken(path, "it is too short")
    magic, whose, entries, count = _HEAD.unpack(raw)
    if magic != _MAGIC or whose != owner or count > SPANS_MAX:
        raise Broken(path, "it is not a segment of this log")
    size = _HEAD.size + count * _SPAN.size
    raw = os.pread(fd, size + 4, 0)
    if len(raw) != size + 4 or _CRC.pack(zlib.crc32(raw[:-4])) != raw[-4:]:
        raise Broken(path, "its head does not match its checksum")
    begin = size + 4
    if os.fstat(fd).st_size != begin + -(-entries // PER_BLOCK) * BLOCK:
        raise Broken(path, "it has another size than its head says")
    return [Span(*fields) for fields in _SPAN.iter_unpack(raw[_HEAD.size : -4])], entries, begin


def write(folder: Path, owner: bytes, spans: Sequence[Span], pieces: Iterable[list[bytes]]) -> Iterator[None]:
    """Makes a segment of sorted pieces, a step for each. It is there when the last step is done; given up before, it
    leaves nothing."""
    part = folder / f"{new_id()}.part"
    begin = _HEAD.size + len(spans) * _SPAN.size + 4
    try:
        with open(part, "xb", opener=lambda path, flags: os.open(path, flags | os.O_CLOEXEC, 0o600)) as file:
            file.write(bytes(begin))
            entries, blocks, rest = 0, 0, b""
            for piece in pieces:
                entries += len(piece)
                rest += b"".join(piece)
                whole = len(rest) // (PER_BLOCK * ENTRY)
                for n in range(whole):
                    file.write(_sealed(rest[n * PER_BLOCK * ENTRY : (n + 1) * PER_BLOCK * ENTRY], blocks + n))
                blocks, rest = blocks + whole, rest[whole * PER_BLOCK * ENTRY :]
                yield
            if rest:
                file.write(_sealed(rest, blocks))
            head = _HEAD.pack(_MAGIC, owner, entries, len(spans)) + b"".join(_SPAN.pack(*span) for span in spans)
            file.seek(0)
            file.write(head + _CRC.pack(zlib.crc32(head)))
        part.rename(part.with_suffix(".segment"))
    finally:
        part.unlink(missing_ok=True)


def _sealed(entries: bytes, number: int) -> bytes:
    raw = entries.ljust(BLOCK - 4, b"\0")
    return raw + _CRC.pack(zlib.crc32(raw, number))


def merge(segments: Sequence[Segment], keep: Callable[[int], bool] | None = None) -> Iterator[list[bytes]]:
    """The entries of all, sorted, in pieces; of those whose place is not to be kept, none. Holds a few blocks of each.

    Raises:
        Broken: one of them is not as it was written.
    """
    streams = [(segment.pieces(), list[bytes]()) for segment in segments]
    while True:
        for pieces, ahead in streams:
            if not ahead:
                ahead += next(pieces, [])
        last = [ahead[-1] for _, ahead in streams if ahead]
        if not last:
            return
        limit, found = min(last), list[bytes]()
        for _, ahead in streams:
            count = bisect_right(ahead, limit)
            found += ahead[:count]
            del ahead[:count]
        found.sort()
        yield found if keep is None else [e for e in found if keep(int.from_bytes(e[HASH:]))]


def joined(spans: Iterable[Span]) -> list[Span]:
    """The same positions in as few spans as there can be, in order."""
    found: list[Span] = []
    for span in sorted(spans):
        last = found[-1] if found else None
        if last is None or last.number != span.number or last.end < span.start:
            found.append(span)
        elif span.end > last.end:
            found[-1] = span._replace(start=last.start)
    return found


def without(whole: Iterable[Span], covered: Iterable[Span]) -> list[Span]:
    """What is left of `whole`, in order."""
    by_number: dict[int, list[Span]] = {}
    for span in joined(covered):
        by_number.setdefault(span.number, []).append(span)
    found = []
    for span in sorted(whole):
        at = span.start
        for c in by_number.get(span.number, ()):
            if at < min(c.start, span.end):
                found.append(Span(span.number, at, min(c.start, span.end)))
            at = max(at, c.end)
        if at < span.end:
            found.append(Span(span.number, at, span.end))
    return found
