"""What is written beside an acknowledged position, for whoever takes the partition next. Pure.

The store is the authority on progress. The note says which store that is, so that an owner with another store is
refused; and it carries the set of events that are done above the position, and the counts, so that the group's own
record says no less than the books. All of it comes from one snapshot of the store.

Encoding: `u1` and base64 of a flag byte and a MessagePack array, deflated where that is shorter. Where the done-set
does not fit any more it is left out: then the next reader knows less, and nothing is lost by that.
"""

from __future__ import annotations

import zlib
from base64 import urlsafe_b64decode, urlsafe_b64encode

import msgspec

from unlost.store.port import Snapshot
from unlost.store.progress import Runs

NOTE_MAX = 4096  # characters: the default of `offset.metadata.max.bytes`
COUNTS_MAX = 512  # bytes
NARROW = 0.75  # from this share on, a unit takes only what makes its done-set smaller
_MAGIC = "u1"
_PLAIN, _DEFLATED = b"\0", b"\1"


class Note(msgspec.Struct, frozen=True, array_like=True):
    """What a note says."""

    store: str
    topic: str
    partitions: int
    position: int
    digest: int
    counts: dict[str, int]
    done: bytes | None  # runs above the position, relative to it; None: they did not fit

    def done_above(self) -> Runs:
        runs = Runs.decode(self.done or b"")
        return Runs((self.position + a, self.position + b) for a, b in runs)


_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(Note).decode


def encode(store: str, snapshot: Snapshot) -> tuple[str, float]:
    """The note, and how much of its space it would fill with the whole done-set (above 1: that was left out)."""
    at = snapshot.position
    done = Runs((a - at, b - at) for a, b in snapshot.fated if a >= at).encode()
    counts = snapshot.counts
    if len(_pack(counts)) > COUNTS_MAX:
        counts = {"all": sum(counts.values())}
    note = Note(store, snapshot.topic_id, snapshot.partitions, at, snapshot.digest, counts, done)
    text = _text(note)
    share = len(text) / NOTE_MAX
    if share > 1:
        text = _text(msgspec.structs.replace(note, done=None))
    return text, share


def decode(text: str) -> Note | None:
    """None if it is no note of ours, or of a release that writes them in another way."""
    if not text.startswith(_MAGIC):
        return None
    try:
        raw = urlsafe_b64decode(text[len(_MAGIC) :])
        body = raw[1:]
        if raw[:1] == _DEFLATED:
            body = zlib.decompressobj().decompress(body, 1 << 20)
        return _unpack(body)
    except (ValueError, zlib.error, msgspec.MsgspecError):
        return None


def _text(note: Note) -> str:
    raw = _pack(note)
    packed = zlib.compress(raw, 6)
    body = _DEFLATED + packed if len(packed) < len(raw) else _PLAIN + raw
    return _MAGIC + urlsafe_b64encode(body).decode()
