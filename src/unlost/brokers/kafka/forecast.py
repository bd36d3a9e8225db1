"""When retention reaches events that nobody has handled yet. Pure."""

from __future__ import annotations

from typing import Literal, NamedTuple

HALF = 0.5  # below this share of the retention it is an alarm

State = Literal["nothing waits", "kept", "in time", "soon", "due", "removed", "unknown"]


class Forecast(NamedTuple):
    """`left`: seconds until retention may remove the first waiting event; None where that cannot be said."""

    state: State
    waiting: int = 0
    removed: int = 0
    left: float | None = None


def forecast(
    *, low: int, high: int, position: int, age: float | None, retention: float | None, young: bool | None = None
) -> Forecast:
    """What becomes of the events of a partition from `position` on.

    `age` (seconds) is that of the event at `position`, None if it was not read; `young`: whether it is known to be
    younger than half of the retention. Kafka removes whole segments, so it may come later than said, never earlier.

    Example:
        >>> forecast(low=0, high=9, position=4, age=3000.0, retention=3600.0)
        Forecast(state='soon', waiting=5, removed=0, left=600.0)
    """
    waiting = max(0, high - max(low, position))
    if position < low:
        return Forecast("removed", waiting, low - position)
    if not waiting:
        return Forecast("nothing waits")
    if retention is None:
        return Forecast("kept", waiting)
    if young:
        return Forecast("in time", waiting)
    if age is None:
        return Forecast("unknown" if young is None else "soon", waiting)
    left = retention - age
    if left <= 0:
        return Forecast("due", waiting, 0, 0.0)
    return Forecast("soon" if left < retention * HALF else "in time", waiting, 0, left)
