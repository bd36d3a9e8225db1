"""Where in the log a key, an id or a correlation stands, without reading the log.

Segments (see `segments.py`) in the folder `events.db.index` beside the log, built after the fact: publishing writes
nothing for it. It holds 64-bit hashes and no text, so whoever asks reads the events and looks.
**Guarantee** `find` names every place of the log as it is at that moment: what no believable segment covers it reads. The
index is only a cache, and may be deleted at any time. A segment is believed if its checksums hold and the log still says,
of the last event of each of its spans, what it said when the span was read: so neither a segment of another file nor one
of a newer copy of this one is.
**After a crash** of a builder at any line the old segments are there, or the new one, or for a moment both.
"""

from __future__ import annotations

import heapq
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from hashlib import blake2b
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import apsw
import msgspec

from unlost.brokers.embedded.rows import harmed, missing
from unlost.brokers.embedded.segments import HASH, Broken, Segment, Span, without
from unlost.events import decode_head
from unlost.sqlite import guards
from unlost.sqlite.file import File
from unlost.sqlite.schema import POSITION_BITS, POSITION_MAX
from unlost.sqlite.transaction import row_crc

SLICE = 200  # rows of the log in one read
LOOKS_MAX = 5  # at a folder whose segments are being replaced
ASKED_MAX = 500  # rows in one statement
_STAMP = struct.Struct(">qq")  # digest and time of an event: with all events before it, they are unlike any other's


class _Head(msgspec.Struct, gc=False):
    id: str = ""
    correlationid: str | None = None


_head = msgspec.json.Decoder(_Head).decode


class Part(NamedTuple):
    """A partition as the log has it now."""

    topic: str
    partition: int
    start: int
    end: int


Parts = Mapping[int, Part]


class Index:
    """The index of one file, for those who look into it. `indexer.py` builds it."""

    def __init__(self, file: File) -> None:
        self.file = file
        self.folder = guards.beside(file.path, "index")
        self.owner = blake2b(file.store_id.encode(), digest_size=16).digest()
        self._empty = blake2b(digest_size=HASH, person=self.owner)  # the same text has another hash in another file

    @contextmanager
    def opened(self) -> Iterator[Sequence[Segment]]:
        """The segments as they are now. Those that are none are left out."""
        with ExitStack() as stack:
            for _ in range(LOOKS_MAX):
                found, gone = [], False
                for path in sorted(self.folder.glob("*.segment")):
                    try:
                        segment = Segment(path, self.owner)
                    except FileNotFoundError:  # merged into another that this look may have missed
                        gone = True
                    except Broken:
                        remove(path)
                    except OSError:
                        pass  # no rights, say: what it covers is read in the log
                    else:
                        stack.callback(segment.close)
                        found.append(segment)
                if not gone:
                    break
            yield found

    def find(self, segments: Sequence[Segment], texts: Collection[bytes]) -> Iterator[tuple[str, int, int]]:
        """Places of all events that have one of these as key, id or correlation, in order, and of a few others.
        `segments` were opened before what the file shows now.

        Raises:
            Damaged: an event that must be read for it is damaged or missing.
        """
        wanted = {self._hash(text) for text in texts}
        parts, believed = self.believed(segments)
        unread = without(spans_of(parts), (span for segment in believed for span in segment.spans))
        streams = [self._places(segment, hash, parts) for segment in believed for hash in wanted]
        for at, _ in groupby(heapq.merge(*streams, self._scan(unread, parts, wanted))):
            part = parts.get(at >> POSITION_BITS)
            if part is not None and part.start <= at & POSITION_MAX < part.end:
                yield part.topic, part.partition, at & POSITION_MAX

    def _places(self, segment: Segment, hash: bytes, parts: Parts) -> Iterator[int]:
        last = -1
        try:
            for at in segment.places(hash):
                yield at
                last = at
        except (Broken, OSError):  # thrown away; what it has not said is read in the log
            remove(segment.path)
            ahead = [span for span in still_there(segment.spans, parts) if last_of(span) > last]
            yield from (at for at in self._scan(ahead, parts, {hash}) if at > last)

    def _scan(self, spans: Sequence[Span], parts: Parts, wanted: Collection[bytes]) -> Iterator[int]:
        for span in spans:
            for at, hashes in self.read(span, parts[span.number]):
                if not hashes.isdisjoint(wanted):
                    yield at

    def believed(self, segments: Sequence[Segment]) -> tuple[Parts, list[Segment]]:
        """The log as it is now, and the segments that are of it. Spans that it has let go of do not matter."""

        def work(c: apsw.Connection) -> tuple[Parts, list[Segment]]:
            parts = parts_of(c)
            there = {segment.path: still_there(segment.spans, parts) for segment in segments}
            stamps = stamps_of(c, sorted({last_of(span) for spans in there.values() for span in spans}))
            return parts, [s for s in segments if all(stamps.get(last_of(p)) == p.stamp for p in there[s.path])]

        return self.file.read(work)

    def _hash(self, text: bytes) -> bytes:
        hash = self._empty.copy()
        hash.update(text)
        return hash.digest()

    def _hashes(self, key: bytes | None, head: bytes) -> set[bytes]:
        try:
            h = _head(head)
        except Exception:
            h = _other_head(head)
        texts = {h.id.encode(), (h.correlationid or h.id).encode()} if h.id else set()
        return {self._hash(text) for text in (texts if key is None else texts | {key})}

    def read(self, span: Span, part: Part) -> Iterator[tuple[int, set[bytes]]]:
        """Address and hashes of each event of a span, but for those that are trimmed meanwhile."""
        low, path, place = span.number << POSITION_BITS, self.file.path, f"{part.topic}/{part.partition}"
        at = span.start
        while at < span.end:
            start, rows = self.file.read(partial(_rows, low=low, start=at, end=span.end))
            at = max(at, start)
            for address, head, key, data, recorded, digest, crc in rows:
                if address != low + at:
                    raise missing(path, place, at - 1, address - low)
                if crc != row_crc(address, head, key, data, recorded, digest):
                    raise harmed(path, place, at)
                yield address, self._hashes(key, head)
                at += 1
            if not rows and at < span.end:
                raise missing(path, place, at - 1, span.end)


def remove(path: Path) -> None:
    with suppress(OSError):  # no rights: then it is left out, every time
        path.unlink(missing_ok=True)


def _other_head(head: bytes) -> _Head:
    """Of an event with attributes of another type than ours; of bytes that are no event, nothing."""
    try:
        envelope = decode_head(head, topic="", key=None, data=None)
    except Exception:
        return _Head()
    return _Head(envelope.id, envelope.correlationid)


def parts_of(c: apsw.Connection) -> Parts:
    found = {}
    for topic, first, partitions in c.execute("select name, first_number, partitions from unlost_topic").fetchall():
        for n in range(partitions):
            low = (first + n) << POSITION_BITS
            start, end = c.execute(
                "select (select min(at) from unlost_log where at between ?1 and ?2), "
                "(select max(at) from unlost_log where at between ?1 and ?2)",
                (low, low | POSITION_MAX),
            ).fetchone()
            if start is not None:
                found[first + n] = Part(topic, n, start - low, end - low + 1)
    return found


def _rows(c: apsw.Connection, *, low: int, start: int, end: int) -> tuple[int, list[tuple[Any, ...]]]:
    """The first position of the partition, and some rows."""
    (first,) = c.execute(
        "select min(at) from unlost_log where at between ? and ?", (low, low | POSITION_MAX)
    ).fetchone()
    rows = c.execute(
        "select at, head, key, data, recorded, digest, crc from unlost_log where at >= ? and at < ? order by at limit ?",
        (low + start, low + end, SLICE),
    ).fetchall()
    return end if first is None else first - low, rows


def stamps_of(c: apsw.Connection, places: Sequence[int]) -> dict[int, bytes]:
    """What the log says of the events at these addresses."""
    found = {}
    for n in range(0, len(places), ASKED_MAX):
        some = places[n : n + ASKED_MAX]
        marks = ",".join("?" * len(some))
        for at, digest, recorded in c.execute(
            f"select at, digest, recorded from unlost_log where at in ({marks})", some
        ):
            found[at] = _STAMP.pack(digest, recorded)
    return found


def spans_of(parts: Parts) -> list[Span]:
    return [Span(number, part.start, part.end) for number, part in sorted(parts.items())]


def still_there(spans: Iterable[Span], parts: Parts) -> list[Span]:
    """Without what the log has let go of."""
    starts = {number: part.start for number, part in parts.items()}
    return [
        span._replace(start=max(span.start, start))
        for span in spans
        if span.end > (start := starts.get(span.number, POSITION_MAX))
    ]


def last_of(span: Span) -> int:
    """The address of its last event."""
    return span.number << POSITION_BITS | (span.end - 1)
