"""Child processes and folders that do not outlive the process that made them, however that ends."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

# The shell is the parent of the server and waits for it; its helper waits for the end of standard input, which comes
# when the owner closes it or dies, even by kill -9. Nobody signals a process that was already waited for.
_KEEPER = """
exec 3<&0
"$@" >>"$0" 2>&1 </dev/null 3<&- &
server=$!
(read -r word <&3; kill -9 $server) >/dev/null 2>&1 &
helper=$!
exec 3<&-
echo $server
exec >/dev/null 2>&1
wait $server
code=$?
kill -9 $helper
wait $helper
exit $code
"""


class Child:
    """A running server; its output goes to `log`. It gets SIGKILL when this process ends in any way."""

    def __init__(self, command: list[str], log: Path) -> None:
        self._keeper = subprocess.Popen(
            ["sh", "-c", _KEEPER, str(log), *command],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        assert self._keeper.stdout is not None
        self.pid = int(self._keeper.stdout.readline())
        self._keeper.stdout.close()

    def running(self) -> bool:
        return self._keeper.poll() is None

    def signal(self, number: int) -> None:
        """Send a signal. Does nothing when the process has ended."""
        if self.running():
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                pass  # it ended between the two lines

    def wait(self, seconds: float) -> bool:
        """Whether it ended within this time."""
        try:
            self._keeper.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.signal(signal.SIGKILL)
        self._keeper.wait()
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()


class Folder:
    """A temporary folder. Those whose owner was killed are removed when the next one is made."""

    def __init__(self, prefix: str) -> None:
        for old in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
            _sweep(old)
        self.path = Path(tempfile.mkdtemp(prefix=prefix))
        self._lock = os.open(self.path / "owner", os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _sweep(folder: Path) -> None:
    try:
        owner = folder / "owner"
        if time.time() - owner.stat().st_mtime < 60:
            return  # perhaps its lock is just being taken
        lock = os.open(owner, os.O_RDWR)
    except OSError:
        return  # not ours, or somebody else is faster
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass  # its owner lives
    finally:
        os.close(lock)


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on, outside the range from which outgoing connections get theirs.

    So a server can be ended and started again on its port, and nobody takes it in between.
    """
    found: list[int] = []
    for port in random.sample(range(16_000, 32_000), 2_000):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError("no free ports between 16000 and 32000")
