"""The services as processes: started, killed with `kill -9`, started again, and in the end all gone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from unlost.demo.service import Place, notebook_path, read_notes

SERVICES = ("order", "payment", "notification", "settlement")
STARTS_AGAIN_MAX = 3  # of a service that ends by itself


class Processes:
    """Only ever touches processes that it started itself, by their pid."""

    def __init__(self, folder: Path, url: str, bug: str | None, store: str | None = None) -> None:
        self._folder = folder
        self.notes = folder / "notes"
        self.notes.mkdir(exist_ok=True)
        self._environment = {k: v for k, v in os.environ.items() if not k.startswith("UNLOST_")}
        self._environment["UNLOST_BROKER"] = url
        if store is not None:
            self._environment["UNLOST_STORE"] = store
        if bug is not None:
            self._environment["UNLOST_BREAK"] = bug
        if "PYTHONPATH" in os.environ:  # the services run in another folder
            paths = os.environ["PYTHONPATH"].split(os.pathsep)
            self._environment["PYTHONPATH"] = os.pathsep.join(str(Path(path).resolve()) for path in paths)
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._pids: dict[str, list[int]] = {service: [] for service in SERVICES}
        self._ended_alone: Counter[str] = Counter()

    def start(self, service: str) -> int:
        """In a session of its own: Ctrl-C is meant for the demo, which then ends its services."""
        with (self.notes / f"{service}.log").open("ab") as words:
            process = subprocess.Popen(
                [sys.executable, "-m", "unlost.demo.service", service, str(self.notes)],
                cwd=self._folder, env=self._environment, start_new_session=True,
                stdin=subprocess.PIPE, stdout=words, stderr=words,
            )  # fmt: skip
        self._running[service] = process
        self._pids[service].append(process.pid)
        return process.pid

    def pid(self, service: str) -> int:
        return self._running[service].pid

    def kill(self, service: str) -> None:
        """`kill -9`; returns when the process is gone."""
        process = self._running[service]
        process.kill()
        process.wait()

    def look_after(self) -> None:
        """Starts again what ended by itself, a few times."""
        for service, process in list(self._running.items()):
            if process.poll() is not None and self._ended_alone[service] < STARTS_AGAIN_MAX:
                self._ended_alone[service] += 1
                self.start(service)

    @property
    def given_up(self) -> bool:
        """A service ended by itself too often to be started again."""
        return any(
            self._ended_alone[service] >= STARTS_AGAIN_MAX and process.poll() is not None
            for service, process in self._running.items()
        )

    def given(self, service: str, pid: int) -> Counter[Place]:
        """What a process was given to handle."""
        return read_notes(notebook_path(self.notes, service, pid))

    def all_notes(self) -> dict[str, list[Counter[Place]]]:
        return {service: [self.given(service, pid) for pid in pids] for service, pids in self._pids.items()}

    def troubles(self) -> list[str]:
        """What services said that ended by themselves."""
        found = []
        for service, times in self._ended_alone.items():
            log = (self.notes / f"{service}.log").read_text(errors="replace").splitlines()
            words = next((line for line in reversed(log) if line.strip()), "nothing")
            found.append(f"{service} ended by itself, {times} times; its last words: {words}")
        return found

    def stop(self, grace: float = 30.0) -> None:
        """SIGTERM to all; whoever has not left after `grace` seconds gets SIGKILL."""
        for process in self._running.values():
            if process.poll() is None:
                process.terminate()
        end = time.monotonic() + grace
        for process in self._running.values():
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdin is not None:
                process.stdin.close()
        self._running.clear()
