"""What the processes of a proof did, in their own words: files that survive `kill -9` and know nothing of unlost.

Each process appends to a file of its own, one JSON line per note, with one `write` to a descriptor opened with
O_APPEND: what was written before a kill is there after it. Intentions are noted before the step, results after it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

What = Literal[
    "intend",
    "acked",
    "unknown",
    "refused",
    "delivered",
    "completed",
    "shelved",
    "died",
    "audited",
    "unbalanced",
    "named",
]


class Note(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """One line. `at` is nanoseconds on the machine's monotonic clock, which all processes share."""

    what: What
    at: int
    uid: str  # the event's name in the workload, carried in its data; not the id that unlost knows
    key: str = ""
    service: str = ""
    value: int = 0
    batch: str = ""  # of an intention: accepted as a whole or not at all


class Effect(msgspec.Struct, frozen=True, array_like=True):
    """A row that a handler's transaction left in the user's table, in the order of the commits."""

    number: int
    service: str
    uid: str
    key: str
    value: int


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Note).decode


class Journal:
    """This process' file. Safe to use from several threads."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}.evidence"
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def note(self, what: What, uid: str, key: str = "", service: str = "", value: int = 0, batch: str = "") -> None:
        line = _encode(Note(what, time.monotonic_ns(), uid, key, service, value, batch))
        os.write(self._fd, line + b"\n")


def read(folder: Path, pattern: str = "*.evidence") -> Iterator[Note]:
    """Every whole line of every file. A torn last line was never finished: its step had no witness."""
    for path in sorted(folder.glob(pattern)):
        lines = path.read_bytes().split(b"\n")
        for line in lines[:-1]:
            yield _decode(line)
