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


class Child:
    """One process of the proof. It dies with its parent. `prepare` runs in it before its work."""

    prepare: Callable[[], None]

    def __init__(
        self, name: str, log: Path, env: dict[str, str], work: Callable[..., None], args: Sequence[Any]
    ) -> None:
        self.name = name
        self._process = context.Process(
            target=_enter, args=(str(log), env, self.prepare, work, args), name=name, daemon=True
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        self.killed = False

    @property
    def code(self) -> int | None:
        """How it ended; None while it runs."""
        return self._process.exitcode

    def signal(self, number: int) -> None:
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.killed = True
        self.signal(signal.SIGKILL)
        self._process.join(30)

    def end(self, seconds: float = 60) -> int:
        """SIGTERM; returns its exit code."""
        self.signal(signal.SIGTERM)
        return self.wait(seconds)

    def wait(self, seconds: float = 60) -> int:
        self._process.join(seconds)
        if self.code is None:
            raise TimeoutError(f"{self.name} did not end within {seconds:g} s")
        return self.code


def _enter(
    log: str, env: dict[str, str], prepare: Callable[[], None], work: Callable[..., None], args: Sequence[Any]
) -> None:
    os.environ.update(env)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    threading.Thread(target=follow, args=(os.getppid(),), daemon=True).start()
    prepare()
    work(*args)
    sys.stderr.flush()


def follow(parent: int) -> None:
    """Ends this process when its parent has gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(72)
