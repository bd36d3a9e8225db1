"""The doorbell: one datagram says "something was committed", so that nobody has to poll.

It carries no meaning of its own: a lost ring costs one polling interval, never an event. Where unix datagrams
do not exist, or another container shares the file but not the socket folder, polling alone does the work.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import tempfile
from pathlib import Path

from unlost.world import REAL

_TICK_NS = 100_000_000


def bell_folder(database: Path) -> Path:
    """A short path (a socket's path holds about 100 bytes), private to this user, one per database file."""
    name = hashlib.blake2b(str(database).encode(), digest_size=8).hexdigest()
    return Path(tempfile.gettempdir()) / f"unlost-{os.getuid()}" / name


class Bell:
    """This process' bell, and the way to ring all others of the same file."""

    def __init__(self, database: Path, process: str) -> None:
        self._folder = bell_folder(database)
        self._own = self._folder / process[-12:]
        self._others: list[str] = []
        self._seen = -1
        self.socket: socket.socket | None = None
        self._out: socket.socket | None = None
        if not hasattr(socket, "AF_UNIX"):
            return
        try:
            for folder in (self._folder.parent, self._folder):
                folder.mkdir(mode=0o700, exist_ok=True)
                if folder.stat().st_uid != os.getuid():
                    return
            self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self.socket.setblocking(False)
            self.socket.bind(str(self._own))
            self._out = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._out.setblocking(False)
        except OSError:
            self.close()  # no bell here: everybody polls

    def ring(self) -> None:
        if self._out is None:
            return
        try:
            changed = self._folder.stat().st_mtime_ns
            if changed != self._seen:
                # A bell made in the same tick as this look would not show in the time of the folder: look again then.
                self._seen = changed if REAL.now() * 1000 - changed > _TICK_NS else -1
                own = self._own.name
                self._others = [str(p) for p in self._folder.iterdir() if p.name != own]
        except OSError:
            return  # the folder is gone: everybody polls
        for other in self._others:
            try:
                self._out.sendto(b"!", other)
            except ConnectionRefusedError:
                with contextlib.suppress(OSError):
                    Path(other).unlink()  # its process is dead
            except OSError:
                continue  # a full buffer is a bell that already rings

    def drain(self) -> None:
        """Takes all rings that have come in."""
        if self.socket is None:
            return
        with contextlib.suppress(OSError):
            while self.socket.recv(64):
                pass

    def close(self) -> None:
        for sock in (self.socket, self._out):
            if sock is not None:
                sock.close()
        if self.socket is not None:
            self._own.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # others are still there
                self._folder.rmdir()
        self.socket = self._out = None
