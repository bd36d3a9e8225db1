"""Child processes and folders that do not outlive the process that made them, however that ends."""

from __future__ import annotations

import fcntl
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

# The shell is the parent of the server and waits for it; its helper waits for the end of standard input, which comes
# when the owner closes it or dies, even by kill -9. Nobody signals a process that was already waited for. The server
# is stopped while its own children are counted, so that it makes no more; they may be stopped already and die too.
_KEEPER = """
exec 3<&0
"$@" >>"$0" 2>&1 </dev/null 3<&- &
server=$!
(read -r word <&3
kill -STOP $server
ps -A -o pid= -o ppid= | while read -r child parent; do [ "$parent" = $server ] && kill -9 "$child"; done
kill -9 $server) >/dev/null 2>&1 &
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


class CannotStartError(RuntimeError):
    """A server cannot be had on this machine; the text says why."""


class Child:
    """A running server; its output goes to `log`. It and its children get SIGKILL when this process ends in any way."""

    def __init__(self, command: list[str], log: Path, folder: Path | None = None) -> None:
        self._keeper = subprocess.Popen(
            ["sh", "-c", _KEEPER, str(log), *command],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, cwd=folder,
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


def children(parent: int) -> list[int]:
    """The processes a process has started; they stay the same only while it is stopped."""
    return [pid for pid, of, _ in _processes() if of == parent]


def wait_stopped(pids: Iterable[int], seconds: float = 30) -> None:
    """Until each of them is stopped or has ended: a signal is not yet its effect."""
    _wait_states(set(pids), "TZ", seconds)


def wait_ended(pids: Iterable[int], seconds: float = 30) -> None:
    _wait_states(set(pids), "Z", seconds)


def _wait_states(pids: set[int], wanted: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while late := {pid: state for pid, _, state in _processes() if pid in pids and state not in wanted}:
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {seconds} s these processes are in another state than {wanted}: {late}")
        time.sleep(0.01)


def _processes() -> list[tuple[int, int, str]]:
    """The number of every process, that of its parent, and its state: R, S, D, T (stopped), Z (ended), …"""
    done = subprocess.run(["ps", "-A", "-o", "pid=", "-o", "ppid=", "-o", "stat="], capture_output=True, text=True)
    rows = (line.split() for line in done.stdout.splitlines())
    return [(int(pid), int(parent), state[0]) for pid, parent, state in rows]


def unprivileged() -> pwd.struct_passwd | None:
    """The user for servers that refuse to run as root, or None where this process is not root."""
    if os.geteuid():
        return None
    if not shutil.which("setpriv"):
        raise CannotStartError("it does not run as root, and setpriv is missing: run the tests as another user")
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        why = "it does not run as root, and there is no user postgres: make it, or run the tests as another user"
        raise CannotStartError(why) from None


def as_user(user: pwd.struct_passwd | None, command: list[str]) -> list[str]:
    """The command that becomes this user first; the process stays the same one."""
    if user is None:
        return command
    return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups", *command]


class Folder:
    """A temporary folder. Those whose owner was killed are removed when the next one is made.

    `forget` comes before a folder goes, to remove what a server has left elsewhere.
    """

    def __init__(self, prefix: str, forget: Callable[[Path], None] = lambda _: None) -> None:
        for old in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
            _sweep(old, forget)
        self._forget = forget
        self.path = Path(tempfile.mkdtemp(prefix=prefix))
        self._lock = os.open(self.path / "owner", os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def remove(self) -> None:
        self._forget(self.path)
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _sweep(folder: Path, forget: Callable[[Path], None]) -> None:
    try:
        owner = folder / "owner"
        if time.time() - owner.stat().st_mtime < 60:
            return  # perhaps its lock is just being taken
        lock = os.open(owner, os.O_RDWR)
    except OSError:
        return  # not ours, or somebody else is faster
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        forget(folder)
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
