"""A process' own file: alive as long as its lock is held, and what it had in its hands when it was not.

The kernel gives up a `flock` at the instant a process ends, however it ends: that is how others see a death
at once, without a timeout. The content is memory-mapped, so noting "handler starts on this event" costs less
than a microsecond and yet survives `kill -9` (the page cache belongs to the kernel). It need not survive power
loss: after that nobody asks who had been running.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from unlost.world import REAL, boot_id

_HEADER = struct.Struct("<8sQd")  # magic, hash of the boot id, heartbeat on the monotonic clock
_CELL = struct.Struct("<qqq")  # address of the unit, position + 1 (0: empty), 1 if it was the only one running
_READ = struct.Struct("<qqq")  # service hash, partition number, next position to read
_MAGIC = b"unlostP1"
CELLS_MAX = 1024
READS_MAX = 2048
_CELLS_AT = 64
_READS_AT = _CELLS_AT + CELLS_MAX * _CELL.size
_SIZE = _READS_AT + READS_MAX * _READ.size
HEARTBEAT_STALE_SECONDS = 30.0


@dataclass(frozen=True)
class Remains:
    """What another process' file says: is it alive, is it hung, what was running, how far had it read."""

    alive: bool
    hung: bool
    running: dict[tuple[int, int], bool]  # (address of the unit, position) -> was the only one running
    read: dict[tuple[int, int], int]  # (service hash, partition number) -> next position to read


def service_hash(service: str) -> int:
    return zlib.crc32(service.encode())


class ProcessFile:
    """This process' file. Create it while holding the file's write lock (see `sweep`)."""

    def __init__(self, folder: Path, process: str) -> None:
        self.path = folder / f"{process}.process"
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.write(fd, bytes(_SIZE)) < _SIZE:  # really taken: on a full disk a hole in a map kills the process
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            self._map = mmap.mmap(fd, _SIZE)
        except OSError:
            self.path.unlink(missing_ok=True)
            os.close(fd)
            raise
        self._fd = fd
        self._free_cells = list(range(CELLS_MAX - 1, -1, -1))
        self._reads: dict[tuple[int, int], int] = {}
        self.beat()

    def beat(self) -> None:
        _HEADER.pack_into(self._map, 0, _MAGIC, _boot_hash(), REAL.monotonic())

    def take_cell(self) -> int:
        """A place for one runner; -1 when all are taken (then its events are simply never suspected)."""
        return self._free_cells.pop() if self._free_cells else -1

    def give_cell(self, cell: int) -> None:
        if cell >= 0:
            self.clear(cell)
            self._free_cells.append(cell)

    def started(self, cell: int, address: int, position: int, alone: bool) -> None:
        if cell >= 0:
            _CELL.pack_into(self._map, _CELLS_AT + cell * _CELL.size, address, position + 1, alone)

    def clear(self, cell: int) -> None:
        if cell >= 0:
            _CELL.pack_into(self._map, _CELLS_AT + cell * _CELL.size, 0, 0, 0)

    def read_up_to(self, service: int, number: int, position: int) -> None:
        place = self._reads.setdefault((service, number), len(self._reads))
        if place < READS_MAX:
            _READ.pack_into(self._map, _READS_AT + place * _READ.size, service, number, position)

    def forget_child(self) -> None:
        """In a forked child: drop the inherited descriptors (the map has its own), else the child would keep the
        parent alive."""
        if self._fd >= 0:
            self._map.close()
            os.close(self._fd)
            self._fd = -1

    def close(self, *, keep: bool = False) -> None:
        """Lets go of the lock. `keep` leaves the file for others to read, as after a death."""
        if self._fd >= 0:
            if not keep:
                self.path.unlink(missing_ok=True)
            self._map.close()
            os.close(self._fd)
            self._fd = -1


def examine(folder: Path, process: str) -> Remains:
    """Looks at another process' file; never blocks. A file that is not there belongs to nobody alive."""
    try:
        fd = os.open(folder / f"{process}.process", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return Remains(alive=False, hung=False, running={}, read={})
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two who look must not see each other
            alive = False
        except BlockingIOError:
            alive = True
        raw = os.pread(fd, _SIZE, 0)
    finally:
        os.close(fd)
    if len(raw) < _SIZE or raw[:8] != _MAGIC:
        return Remains(alive=alive, hung=False, running={}, read={})
    _, boot, beat = _HEADER.unpack_from(raw, 0)
    hung = alive and boot == _boot_hash() and REAL.monotonic() - beat > HEARTBEAT_STALE_SECONDS
    running = {}
    if boot != _boot_hash():  # written by chance, before the machine went down
        return Remains(alive=alive, hung=False, running={}, read={})
    for cell in _CELL.iter_unpack(raw[_CELLS_AT:_READS_AT]):
        if cell[1]:
            running[cell[0], cell[1] - 1] = bool(cell[2])
    read = {(service, number): at for service, number, at in _READ.iter_unpack(raw[_READS_AT:]) if service}
    return Remains(alive=alive, hung=hung, running=running, read=read)


def sweep(folder: Path, keep: set[str]) -> None:
    """Removes the files of the dead that nobody needs any more. Call it while holding the write lock."""
    for path in folder.glob("*.process"):
        if path.stem not in keep and not examine(folder, path.stem).alive:
            path.unlink(missing_ok=True)


def _boot_hash() -> int:
    return zlib.crc32(boot_id().encode())
