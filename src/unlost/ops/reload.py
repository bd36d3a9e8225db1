"""`unlost run --reload`, for development: runs a command in a child, and again whenever a Python file has changed.

**Guarantee** the child is asked to end as by SIGTERM, and the next one starts when it has: what it had in hand is settled or
given back, and nothing is lost by it. **After a crash** of this process the child ends as by SIGTERM.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import FrameType

from unlost.errors import UsageError
from unlost.world import REAL

LOOK_SECONDS = 1.0  # how often the files are looked at
SETTLE_SECONDS = 0.1  # an editor or a checkout writes several: until two looks see the same
SETTLES_MAX = 50
FILES_MAX = 20_000
_NOT_OURS = {"__pycache__", "node_modules", "site-packages", "venv", "build", "dist"}

_LIFELINE = "UNLOST_RELOAD_FD"

Seen = dict[Path, tuple[int, int]]  # time of the last change, and size


class Reloader:
    """Runs `command` until Ctrl-C or SIGTERM. One per process, in its main thread.

    Example:
        >>> Reloader([sys.executable, "-m", "unlost", "run", "shop"], [Path.cwd()], print).run()  # doctest: +SKIP
    """

    def __init__(self, command: Sequence[str], folders: Iterable[Path], say: Callable[[str], None]) -> None:
        self._command = list(command)
        self._folders = list(folders)
        self._say = say
        self._news = queue.SimpleQueue[int]()  # a signal's number, or 0: the child has ended
        self._child: subprocess.Popen[bytes] | None = None
        self._ours, self._held = os.pipe()  # children read from it, and find its end when this process has died

    def run(self) -> int:
        """Returns the exit code of the last child.

        Raises:
            UsageError: these are too many files to be looked at again and again.
        """
        before = {n: signal.signal(n, self._signalled) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            return self._watch()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if self._child is not None and self._child.poll() is None:
                self._child.terminate()

    def _signalled(self, number: int, _frame: FrameType | None) -> None:
        self._news.put(number)

    def _watch(self) -> int:
        seen = look(self._folders)
        stopping = changed = False
        self._start()
        while True:
            try:
                number = self._news.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                number = 0
            if number:
                stopping = True
                self._tell(number)
            ended = self._child is not None and self._child.poll() is not None
            if stopping and (ended or self._child is None):
                return 0 if self._child is None else _code(self._child)
            if ended and not changed:
                assert self._child is not None
                self._say(
                    f"unlost: it has ended with code {_code(self._child)}; it starts again when a Python file changes"
                )
                self._child = None
            if not (stopping or changed) and (now := look(self._folders)) != seen:
                seen, changed = self._settled(now), True
                self._say("unlost: Python files have changed; starting again")
                self._tell(signal.SIGTERM)
            if changed and (self._child is None or self._child.poll() is not None):
                changed = False
                self._start()

    def _settled(self, seen: Seen) -> Seen:
        for _ in range(SETTLES_MAX):
            REAL.pause(SETTLE_SECONDS)
            now = look(self._folders)
            if now == seen:
                break
            seen = now
        return seen

    def _start(self) -> None:
        """In a process group of its own: the Ctrl-C of a terminal comes to us, and we hand it on once."""
        env = os.environ | {_LIFELINE: str(self._ours)}
        child = self._child = subprocess.Popen(self._command, process_group=0, pass_fds=[self._ours], env=env)

        def wait() -> None:
            child.wait()
            self._news.put(0)

        threading.Thread(target=wait, name="unlost-reload", daemon=True).start()

    def _tell(self, number: int) -> None:
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)


def end_with_parent() -> None:
    """In a child of a `Reloader`: whatever becomes of that, this process does not outlive it. Harmless in any other."""
    number = os.environ.pop(_LIFELINE, "")
    if not number.isdigit():
        return

    def wait() -> None:
        os.read(int(number), 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="unlost-parent", daemon=True).start()


def look(folders: Iterable[Path]) -> Seen:
    """The Python files below these folders, but for hidden folders and those of others."""
    seen: Seen = {}
    for folder in folders:
        for place, folders_in_it, files in os.walk(folder):
            folders_in_it[:] = [name for name in folders_in_it if name[0] != "." and name not in _NOT_OURS]
            for name in files:
                if not name.endswith(".py"):
                    continue
                path = Path(place, name)
                try:
                    found = path.stat()
                except OSError:  # gone between the two calls: the next look sees that
                    continue
                seen[path] = (found.st_mtime_ns, found.st_size)
                if len(seen) > FILES_MAX:
                    raise UsageError(
                        "UL1420", f"--reload looks at {FILES_MAX:,} Python files at most", found=f"more than that in {folder}",
                        fix="start it in the folder of your project",
                    )  # fmt: skip
    return seen


def _code(child: subprocess.Popen[bytes]) -> int:
    code = child.returncode
    return 128 - code if code < 0 else code
