"""A process of a proof that has real servers around it: begun as a fork of a small server, killed, ended, waited for."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

context = multiprocessing.get_context("forkserver")
_LOST = 255  # what multiprocessing says when it cannot read a status; no process of a proof ends with it


class Child:
    """One process of the proof. It dies with its parent. `prepare` runs in it before its work."""

    prepare: Callable[[], None]

    def __init__(
        self, name: str, log: Path, env: dict[str, str], work: Callable[..., None], args: Sequence[Any]
    ) -> None:
        self.name = name
        self._log = log
        self._process = context.Process(
            target=_enter, args=(str(log), env, self.prepare, work, args), name=name, daemon=True
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        self.killed = False

    @property
    def code(self) -> int | None:
        """How it ended; None while it runs. Seen once, under load: the way by which the fork server says so was gone. Then
        what the process itself noted counts, and without a note it was killed."""
        code = self._process.exitcode
        if code != _LOST:
            return code
        if self._runs():
            return None
        noted = _note_of(self._log, self.pid)
        return int(noted.read_text()) if noted.exists() else -signal.SIGKILL

    def _runs(self) -> bool:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        return False

    def signal(self, number: int) -> None:
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.killed = True
        self.signal(signal.SIGKILL)
        self.wait(30)

    def end(self, seconds: float = 60) -> int:
        """SIGTERM; returns its exit code."""
        self.signal(signal.SIGTERM)
        return self.wait(seconds)

    def wait(self, seconds: float = 60) -> int:
        end = time.monotonic() + seconds
        self._process.join(seconds)
        while (code := self.code) is None:
            if time.monotonic() > end:
                raise TimeoutError(f"{self.name} did not end within {seconds:g} s")
            time.sleep(0.02)
        return code


def _enter(
    log: str, env: dict[str, str], prepare: Callable[[], None], work: Callable[..., None], args: Sequence[Any]
) -> None:
    os.environ.update(env)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    threading.Thread(target=follow, args=(os.getppid(),), daemon=True).start()
    code = 1
    try:
        prepare()
        work(*args)
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        raise
    finally:
        sys.stderr.flush()
        _note_of(Path(log), os.getpid()).write_text(str(code))


def _note_of(log: Path, pid: int) -> Path:
    return log.with_name(f"{log.name}.{pid}")


def follow(parent: int) -> None:
    """Ends this process when its parent has gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(72)
