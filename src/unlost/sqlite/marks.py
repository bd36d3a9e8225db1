"""The marks file: what each process has acknowledged, kept outside the database.

A process writes the number of its last group commit here after the commit and before anybody is told.
The file is fsynced once a second, so it may lag behind, but never lead: a mark above the database's own
counter says that the database has lost its tail (a deleted `-wal`, a restored old copy, a lying disk).
"""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

_ENTRY = struct.Struct("<16sQI4x")  # first 16 bytes of the store's id, commit number, crc32 of both
SLOTS_MAX = 4096


class Marks:
    """One process' place in the marks file."""

    def __init__(self, path: Path, store_id: str, slot: int) -> None:
        self._tag = store_id.encode()[:16]
        self._offset = slot * _ENTRY.size
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._unsynced = False

    def write(self, commit: int) -> None:
        body = self._tag + commit.to_bytes(8, "little")
        os.pwrite(self._fd, _ENTRY.pack(self._tag, commit, zlib.crc32(body)), self._offset)
        self._unsynced = True

    def sync(self) -> None:
        if self._unsynced:
            self._unsynced = False
            os.fsync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            self.sync()
            os.close(self._fd)
            self._fd = -1


def read_marks(path: Path) -> list[tuple[str, int]]:
    """All valid entries as (first 16 characters of the store id, commit). Torn entries prove nothing and are left out."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return []
    found = []
    for at in range(0, len(raw) - _ENTRY.size + 1, _ENTRY.size):
        tag, commit, crc = _ENTRY.unpack_from(raw, at)
        if crc == zlib.crc32(tag + commit.to_bytes(8, "little")) and tag.strip(b"\0"):
            found.append((tag.decode("ascii", "replace"), commit))
    return found
