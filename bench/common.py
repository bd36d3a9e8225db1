"""What both sides of the benchmark share: the event, the clock, and how a program is measured."""

from __future__ import annotations

import itertools
import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import apsw

from unlost import Command, Event
from unlost.sqlite.guards import persist_wal
from unlost.sqlite.schema import TABLES

HERE = Path(__file__).resolve().parent
EVENT_BYTES = 200
KEYS = 1000
PUBLISHERS = 100
PRAGMAS = ("journal_mode", "synchronous", "page_size", "wal_autocheckpoint", "mmap_size", "cell_size_check")


class OrderPlaced(Event, key="order_id"):
    order_id: str
    customer: str
    cents: int
    note: str


class PlaceOrder(Command, queue="orders", key="order_id"):
    order_id: str
    customer: str
    cents: int
    note: str


_NOTE = "x" * 128


def order(n: int) -> OrderPlaced:
    """The `n`-th event: 200 bytes of data, one of 1,000 keys."""
    return OrderPlaced(
        order_id=f"o-{n % KEYS:04d}", customer=f"c-{n % 700:06d}", cents=1_000_000_000 + n, note=_NOTE
    )  # fmt: skip


def command(n: int) -> PlaceOrder:
    """The same as a command."""
    return PlaceOrder(
        order_id=f"o-{n % KEYS:04d}", customer=f"c-{n % 700:06d}", cents=1_000_000_000 + n, note=_NOTE
    )  # fmt: skip


def cpu_seconds() -> float:
    """Processor time of this process so far, all threads, user and system."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class Stopwatch:
    """Wall-clock and processor time of a part of the program. `time.monotonic` is the same clock in all processes."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self._cpu = cpu_seconds()

    def stop(self) -> dict[str, float]:
        return {"seconds": time.monotonic() - self.began, "cpu": cpu_seconds() - self._cpu}


def connect(path: Path, pragmas: dict[str, Any]) -> apsw.Connection:
    """A raw connection with the settings that were read off a file of unlost."""
    connection = apsw.Connection(str(path))
    for name, value in pragmas.items():
        connection.pragma(name, value)
        if connection.pragma(name) != value:
            raise SystemExit(f"the raw loop did not get {name}={value}")
    persist_wal(connection)
    return connection


def pragmas_of(connection: apsw.Connection) -> dict[str, Any]:
    """The settings under which unlost writes; the benchmark refuses to measure without durability."""
    found = {name: connection.pragma(name) for name in PRAGMAS}
    if found["journal_mode"] != "wal" or found["synchronous"] != 2:
        raise SystemExit(f"this file is not durable: {found}")
    return found


def make_log(path: Path, pragmas: dict[str, Any]) -> apsw.Connection:
    """An empty file with the tables of unlost, for the raw loops."""
    connection = connect(path, pragmas)
    connection.execute("begin immediate")
    connection.execute(TABLES)
    connection.execute("commit")
    return connection


def chunks(total: int, commits: int) -> list[tuple[int, int]]:
    """`total` rows in so many commits, as even as can be."""
    bounds = [round(i * total / commits) for i in range(commits + 1)]
    return [(a, b) for a, b in itertools.pairwise(bounds) if b > a]


def call(program: str, *args: object) -> dict[str, Any]:
    """Runs a program of this folder in a process of its own and reads its last line as JSON."""
    return run(sys.executable, program, *args)


def run(python: str | Path, program: str, *args: object, timeout: float = 180.0) -> dict[str, Any]:
    done = subprocess.run(
        [str(python), str(HERE / program), *map(str, args)],
        capture_output=True, text=True, timeout=timeout, check=False, env=_environment(),
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"{program} {' '.join(map(str, args))}\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def start(program: str, *args: object, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, str(HERE / program), *map(str, args)], env=_environment(), **options)


def answer(result: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()


def _environment() -> dict[str, str]:
    """Nothing of the user's own settings may change what is measured."""
    return {name: value for name, value in os.environ.items() if not re.match(r"UNLOST_", name)}
