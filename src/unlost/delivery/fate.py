"""What becomes of a delivery: a value, decided by a pure function."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from unlost.config import duration
from unlost.errors import OutcomeUnknown, Unavailable, Undecodable, UsageError
from unlost.events import UNKNOWN_VERSION
from unlost.store.port import Attempt, Reason

KILLED = "its process was killed"
OURS_SECONDS = 1
ERROR_TEXT_MAX = 2000
STACK_MAX = 8000

# Errors in the program itself: the same code will fail in the same way.
_NEVER_HEALS = (UsageError, NotImplementedError, NameError, ImportError, SyntaxError)


class Reject(Exception):
    """Raised by a handler: this event can never be handled. It goes to the shelf at once, with this reason.

    **Guarantee** it stays there, with its bytes, until somebody redrives or discards it.

    Example:
        >>> raise Reject("an order of 0.00 cannot be paid")
        Traceback (most recent call last):
        ...
        unlost.delivery.fate.Reject: an order of 0.00 cannot be paid
    """


class RetryLater(Exception):
    """Raised by a handler: not now. The event waits `after` (seconds, timedelta or "5m"); no attempt is spent.

    Example:
        >>> RetryLater(after="5m").after
        300.0
    """

    def __init__(self, reason: str = "", *, after: str | float | timedelta) -> None:
        super().__init__(reason)
        self.after = duration(after)


class HandlerTimeout(Exception):
    """The handler did not end within its deadline."""


@dataclass(frozen=True, kw_only=True)
class Retry:
    """How failed deliveries are tried again.

    The wait before attempt n+1 is `first * factor**(n-1)` seconds, at most `max`, less up to `jitter` of itself.
    After `attempts` failures, or at once for the error types in `never_on`, the event goes to the shelf.
    **After a crash** the count goes on where it was saved last; an attempt that a crash cut off counts only when
    nothing else was running.

    Example:
        >>> Retry(attempts=3, first=0.2, factor=2).wait_seconds(2, chance=0.0)
        0.4
    """

    attempts: int = 5
    first: str | float | timedelta = 0.2
    factor: float = 2.0
    max: str | float | timedelta = 60.0
    jitter: float = 0.2
    never_on: tuple[type[BaseException], ...] = ()

    def __post_init__(self) -> None:
        if self.attempts < 1 or duration(self.first) < 0 or self.factor < 1 or not 0 <= self.jitter <= 1:
            raise UsageError(
                "UL1201",
                "Retry needs attempts >= 1, first >= 0, factor >= 1, 0 <= jitter <= 1",
                found=repr(self),
            )

    def wait_seconds(self, failures: int, chance: float) -> float:
        """The wait after this many failures; `chance` in [0, 1) spreads retries that failed together."""
        longest = duration(self.max)
        try:
            wait = min(longest, duration(self.first) * self.factor ** min(failures - 1, 64))
        except OverflowError:
            wait = longest
        return wait * (1 - self.jitter * chance)


@dataclass(frozen=True)
class Done:
    """Handled."""


DONE = Done()


@dataclass(frozen=True)
class RetryAt:
    """To be tried again at `due` (microseconds since 1970)."""

    due: int
    spends_attempt: bool = True


@dataclass(frozen=True)
class Dead:
    """Goes to the shelf."""

    reason: Reason
    error_type: str
    error: str
    stack: str


@dataclass(frozen=True)
class Skip:
    """Not for this handler, by a declared rule."""

    rule: str


@dataclass(frozen=True)
class Abandoned:
    """Begun, not handled to its end, and not tried again: its handler gets events at most once."""

    error: str


Fate = Done | RetryAt | Dead | Skip | Abandoned
"""What becomes of a delivery: the value that `decide` finds, and that is settled in one commit."""


def decide(error: BaseException | None, attempt: int, retry: Retry, *, now: int, chance: float) -> Fate:
    """From the outcome of attempt number `attempt` to its fate. Pure.

    Only a return without an error is success: a cancelled or timed-out handler has failed.
    """
    if error is None:
        return DONE
    if isinstance(error, Reject):
        return _dead("rejected", error)
    if isinstance(error, Undecodable):
        return _dead("unknown_version" if error.code == UNKNOWN_VERSION else "undecodable", error)
    if isinstance(error, RetryLater):
        return RetryAt(now + int(error.after * 1e6), spends_attempt=False)
    if isinstance(error, Unavailable | OutcomeUnknown):
        return RetryAt(now + OURS_SECONDS * 1_000_000, spends_attempt=False)  # our own trouble, not the event's
    if isinstance(error, (*retry.never_on, *_NEVER_HEALS)):
        return _dead("cannot_heal", error)
    if attempt >= retry.attempts:
        return _dead("exhausted", error)
    return RetryAt(now + int(retry.wait_seconds(attempt, chance) * 1e6))


def decide_once(error: BaseException | None) -> Fate:
    """The same for a handler that gets its events at most once, when it had begun: there is no other attempt. Pure."""
    if error is None:
        return DONE
    if isinstance(error, Reject):
        return _dead("rejected", error)
    if isinstance(error, Undecodable):
        return _dead("unknown_version" if error.code == UNKNOWN_VERSION else "undecodable", error)
    return Abandoned(describe(error))


def spent(attempts: Sequence[Attempt], retry: Retry) -> Dead | None:
    """Whether an event comes back with no attempt left: its handler took the process down each time."""
    if len(attempts) < retry.attempts:
        return None
    last = attempts[-1].error
    reason: Reason = "process_killed" if last.startswith(KILLED) else "exhausted"
    return Dead(reason, "", last, "")


def describe(error: BaseException) -> str:
    """One line for the list of attempts."""
    if isinstance(error, asyncio.CancelledError):
        return "CancelledError: the handler was cancelled"
    return f"{type(error).__name__}: {_text(error)}"[:ERROR_TEXT_MAX]


def _text(error: BaseException) -> str:
    """What the error says, as text that can be stored: another failure here would take the worker down."""
    try:
        text = str(error)
    except Exception as e:
        return f"(its text cannot be made: {type(e).__name__})"
    return _storable(text)


def _storable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _dead(reason: Reason, error: BaseException) -> Dead:
    stack = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    if isinstance(error, Undecodable | Reject):
        stack = ""
    return Dead(reason, type(error).__name__, _text(error)[:ERROR_TEXT_MAX], _storable(stack)[-STACK_MAX:])
