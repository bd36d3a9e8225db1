"""One broker for all test processes of this user: whoever comes first has it started, and it ends after the last.

Each process holds a shared lock for as long as it uses the broker. The kernel lets go of it however the process ends;
when the keeper can have the lock for itself alone, nobody is left.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from servers import jars
from servers.kafka import Kafka

START_SECONDS = 180
PLACE = Path(tempfile.gettempdir()) / f"unlost-shared-kafka-{jars.VERSION}-{os.getuid()}"


@contextmanager
def join(place: Path = PLACE) -> Iterator[str]:
    """The bootstrap servers of the shared broker, which lives at least as long as this block."""
    place.mkdir(mode=0o700, exist_ok=True)
    with (place / "starting").open("w") as starting, (place / "users").open("w") as users:
        fcntl.flock(starting, fcntl.LOCK_EX)
        fcntl.flock(users, fcntl.LOCK_SH)  # waits while a keeper is about to leave
        if not _keeper_lives(place):
            _start_keeper(place)
        bootstrap = (place / "bootstrap").read_text()
        fcntl.flock(starting, fcntl.LOCK_UN)
        yield bootstrap


def _keeper_lives(place: Path) -> bool:
    if not (place / "bootstrap").exists():
        return False
    with (place / "keeper").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _start_keeper(place: Path) -> None:
    (place / "bootstrap").unlink(missing_ok=True)
    with (place / "log").open("w") as log:
        keeper = subprocess.Popen(
            [sys.executable, __file__, str(place)], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    deadline = time.monotonic() + START_SECONDS
    while not (place / "bootstrap").exists():
        if keeper.poll() is not None or time.monotonic() > deadline:
            raise jars.CannotStartError(f"the shared Kafka did not start\n{(place / 'log').read_text()[-4000:]}")
        time.sleep(0.05)
    keeper.returncode = 0  # it outlives this process and nobody waits for it; Popen would warn about that


def keep(place: Path) -> None:
    """Run the broker until nobody uses it."""
    with (place / "keeper").open("a") as alive, (place / "users").open("a") as users:
        fcntl.flock(alive, fcntl.LOCK_EX)
        with Kafka.start() as kafka:
            fresh = place / "bootstrap.new"
            fresh.write_text(kafka.bootstrap)
            fresh.rename(place / "bootstrap")
            while not _nobody_left(users):
                time.sleep(0.5)
            (place / "bootstrap").unlink()
            fcntl.flock(users, fcntl.LOCK_UN)  # only now may the next one look whether there is a keeper


def _nobody_left(users: object) -> bool:
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)  # type: ignore[arg-type]
    except BlockingIOError:
        return False
    return True


if __name__ == "__main__":
    keep(Path(sys.argv[1]))
