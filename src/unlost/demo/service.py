"""One service of the shop in its own process: `unlost run unlost.demo.shop --service NAME`, and a notebook.

The notebook holds what the service was given to handle, as a witness that is none of unlost's tables: one fixed-size
line per delivery, written before the handler runs.
"""

from __future__ import annotations

import os
import signal
import struct
import sys
import threading
from collections import Counter
from pathlib import Path

from unlost.delivery.lanes import Delivery
from unlost.demo.shop import app
from unlost.errors import UnlostError

_LINE = struct.Struct("<IQ")  # partition, position
Place = tuple[int, int]


class Notebook:
    """Written with one system call per line: `kill -9` cannot take back what the kernel has."""

    def __init__(self, folder: Path, service: str, pid: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._fd = os.open(notebook_path(folder, service, pid), flags, 0o600)

    def note(self, step: str, d: Delivery) -> None:
        if step == "started":
            os.write(self._fd, _LINE.pack(d.lane.owned.unit.partition, d.position))


def notebook_path(folder: Path, service: str, pid: int) -> Path:
    return folder / f"{service}-{pid}.notes"


def read_notes(path: Path) -> Counter[Place]:
    """How often each event was given to this process; empty while it has not begun."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return Counter()
    whole = len(raw) // _LINE.size * _LINE.size
    return Counter(_LINE.iter_unpack(raw[:whole]))


def main(service: str, notes: str) -> int:
    if os.environ.get("UNLOST_BREAK"):
        from unlost.testing import sabotage

        sabotage.from_environment()
    app.probe = Notebook(Path(notes), service, os.getpid()).note
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    try:
        app.run([service])
    except UnlostError as e:
        print(e, file=sys.stderr)
        return e.exit_code
    return 0


def _leave_with_parent() -> None:
    """The demo holds the other end of this pipe: however it ends, nothing of it stays behind."""
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
