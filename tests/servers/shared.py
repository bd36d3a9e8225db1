"""One server of a kind for all test processes of this user: the first has it started, and it ends after the last.

Each process holds a shared lock for as long as it uses the server. The kernel lets go of it however the process ends;
when the keeper can have the lock for itself alone, nobody is left.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from servers import jars, postgres
from servers.kafka import Kafka
from servers.postgres import Postgres
from servers.process import CannotStartError

START_SECONDS = 180


@contextmanager
def _kafka() -> Iterator[str]:
    with Kafka.start() as server:
        yield server.bootstrap


@contextmanager
def _postgres() -> Iterator[str]:
    with Postgres.start(own=True) as server:
        yield server.url()


class Kind(NamedTuple):
    """A server that can be shared: what tells old ones from new ones, and how one runs and where."""

    version: Callable[[], object]
    run: Callable[[], AbstractContextManager[str]]


KINDS = {
    "kafka": Kind(lambda: jars.VERSION, _kafka),
    "postgres": Kind(postgres.version, _postgres),
}


@contextmanager
def join(kind: str, place: Path | None = None) -> Iterator[str]:
    """The address of the shared server of this kind, which lives at least as long as this block."""
    if place is None:
        place = Path(tempfile.gettempdir()) / f"unlost-shared-{kind}-{KINDS[kind].version()}-{os.getuid()}"
    place.mkdir(mode=0o700, exist_ok=True)
    with (place / "starting").open("w") as starting, (place / "users").open("w") as users:
        fcntl.flock(starting, fcntl.LOCK_EX)
        fcntl.flock(users, fcntl.LOCK_SH)  # waits while a keeper is about to leave
        if not _keeper_lives(place):
            _start_keeper(kind, place)
        address = (place / "address").read_text()
        fcntl.flock(starting, fcntl.LOCK_UN)
        yield address


def _keeper_lives(place: Path) -> bool:
    if not (place / "address").exists():
        return False
    with (place / "keeper").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _start_keeper(kind: str, place: Path) -> None:
    (place / "address").unlink(missing_ok=True)
    with (place / "log").open("w") as log:
        keeper = subprocess.Popen(
            [sys.executable, __file__, kind, str(place)], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    deadline = time.monotonic() + START_SECONDS
    while not (place / "address").exists():
        if keeper.poll() is not None or time.monotonic() > deadline:
            raise CannotStartError(f"the shared {kind} did not start\n{(place / 'log').read_text()[-4000:]}")
        time.sleep(0.05)
    keeper.returncode = 0  # it outlives this process and nobody waits for it; Popen would warn about that


def keep(kind: str, place: Path) -> None:
    """Run the server until nobody uses it."""
    with (place / "keeper").open("a") as alive, (place / "users").open("a") as users:
        fcntl.flock(alive, fcntl.LOCK_EX)
        with KINDS[kind].run() as address:
            fresh = place / "address.new"
            fresh.write_text(address)
            fresh.rename(place / "address")
            while not _nobody_left(users):
                time.sleep(0.5)
            (place / "address").unlink()
            fcntl.flock(users, fcntl.LOCK_UN)  # only now may the next one look whether there is a keeper


def _nobody_left(users: object) -> bool:
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)  # type: ignore[arg-type]
    except BlockingIOError:
        return False
    return True


if __name__ == "__main__":
    keep(sys.argv[1], Path(sys.argv[2]))
