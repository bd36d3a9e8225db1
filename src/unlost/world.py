"""The only door to nondeterminism: time, waiting, randomness and ids.

Everything that depends on the clock or on chance asks a `World`. Real programs use `REAL`;
`unlost.testing.running` puts a virtual clock in its place, so that a retry in an hour is tested at once.
A tidy test forbids `time`, `random` and `uuid` calls elsewhere.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

CANCEL_AGAIN_SECONDS = 1.0


class World:
    """Real time, real randomness.

    `now` is wall-clock time in microseconds since 1970 (what people read and what is stored);
    `steady` is the same when the program starts, and then never jumps (what waits are measured with, so that a
    clock that is set back an hour delays no retry); `monotonic` is seconds since some moment.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.random = random.Random(seed)
        self._start = time.time_ns() // 1000 - time.monotonic_ns() // 1000

    def now(self) -> int:
        return time.time_ns() // 1000

    def steady(self) -> int:
        return self._start + time.monotonic_ns() // 1000

    def monotonic(self) -> float:
        return time.monotonic()

    def pause(self, seconds: float) -> None:
        """Blocks this thread."""
        time.sleep(seconds)

    async def wait_until(self, due: int, wake: asyncio.Event) -> None:
        """Returns when `steady` reaches `due` (microseconds) or `wake` is set, whichever is first."""
        seconds = (due - self.steady()) / 1e6
        if seconds <= 0:
            return
        try:
            async with asyncio.timeout(seconds):  # `wait_for` can swallow a cancellation (Python 3.11)
                await wake.wait()
        except TimeoutError:
            return


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancels tasks until they have ended, whatever they made of it. Once is not enough for one that goes on after errors of
    the world: a connection that fails in that moment may say so in the place of the cancellation."""
    left: set[asyncio.Task[Any]] = {task for task in tasks if not task.done()}
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=CANCEL_AGAIN_SECONDS)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # seen: who ends a task does not want to know


class Deadlines:
    """Time limits of many short calls in one event loop: one timer looks at all of them now and then.

    A limit does what `asyncio.timeout` does at a fraction of its cost, and ends the call up to `LOOK_SECONDS` late.

    Example:
        limit = deadlines.start(30)
        try:
            await something()
        except asyncio.CancelledError:
            if limit.passed(): ...  # it was our limit, not somebody else's cancellation
        finally:
            limit.end()
    """

    LOOK_SECONDS = 0.1

    def __init__(self) -> None:
        self._live: set[Limit] = set()
        self._timer: asyncio.TimerHandle | None = None

    def start(self, seconds: float) -> Limit:
        """Limits the calling task from now on."""
        task = asyncio.current_task()
        assert task is not None
        limit = Limit(self._live, task, time.monotonic() + seconds)
        self._live.add(limit)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self.LOOK_SECONDS, self._look)
        return limit

    def _look(self) -> None:
        now = time.monotonic()
        for limit in self._live:
            if now >= limit.when and not limit.late:
                limit.late = True
                limit.task.cancel()
        again = bool(self._live)
        self._timer = asyncio.get_running_loop().call_later(self.LOOK_SECONDS, self._look) if again else None


class Limit:
    __slots__ = ("_cancelling", "_live", "late", "task", "when")

    def __init__(self, live: set[Limit], task: asyncio.Task[Any], when: float) -> None:
        self._live = live
        self.task = task
        self.when = when
        self.late = False
        self._cancelling = task.cancelling()

    def passed(self) -> bool:
        """After a CancelledError: was it this limit, and nobody else?"""
        if not self.late:
            return False
        self.late = False
        return self.task.uncancel() <= self._cancelling

    def end(self) -> None:
        self._live.discard(self)
        if self.late:  # cancelled, but the call had its answer already
            self.task.uncancel()


REAL = World()

_id_lock = threading.Lock()
_last_id = 0
_BITS_DRAWN = 256  # a system call for each id would give the interpreter lock away each time
_bits, _bits_left = "", 0
_VARIANT = {digit: "89ab"[int(digit, 16) & 3] for digit in "0123456789abcdef"}  # its two bits, and two of chance


def _after_fork() -> None:
    global _id_lock, _bits_left
    _id_lock = threading.Lock()
    _bits_left = 0


os.register_at_fork(after_in_child=_after_fork)


def new_id() -> str:
    """A uuid7 as text, strictly increasing within a process (RFC 9562 §6.2, method 3: a wider clock).

    48 bits of milliseconds, 12 bits of sub-millisecond time and 62 random bits; when the clock stands
    still or goes back, the last value plus one is used. A fork starts the child with random bits of its own.
    """
    global _last_id, _bits, _bits_left
    micros = time.time_ns() // 1000
    millis, rest = divmod(micros, 1000)
    stamp = (millis << 12) | (rest << 2)
    with _id_lock:
        if stamp <= _last_id:
            stamp = _last_id + 1
        _last_id = stamp
        if not _bits_left:
            _bits, _bits_left = os.urandom(8 * _BITS_DRAWN).hex(), _BITS_DRAWN
        _bits_left -= 1
        bits = _bits[16 * _bits_left : 16 * _bits_left + 16]
    clock = f"{stamp:015x}"
    return f"{clock[:8]}-{clock[8:12]}-7{clock[12:]}-{_VARIANT[bits[0]]}{bits[1:4]}-{bits[4:]}"


def rfc3339(micros: int) -> str:
    """`2026-11-23T14:11:00.123456Z` from microseconds since 1970."""
    seconds, rest = divmod(micros, 1_000_000)
    return f"{_second(seconds)}.{rest:06d}Z"


@lru_cache(maxsize=64)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def boot_id() -> str:
    """Names this start of the machine; process ids and monotonic times mean nothing across it."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as f:  # noqa: PTH123
            return f.read().strip()
    except OSError:
        return f"boot-{int(time.time() - time.monotonic()) // 60}"
