"""Reading a stretch of the log, page by page."""

from __future__ import annotations

from collections.abc import Iterator

from unlost.brokers.port import Log
from unlost.events.topic import Arrival

PAGE = 500  # events in one look at the log


def stretch(log: Log, topic: str, partition: int, start: int, end: int) -> Iterator[Arrival]:
    """What the log holds at positions [start, end), in order. Positions may be missing, where another program keeps it.

    Raises:
        Damaged: an event is not as it was written. Unavailable: the broker does not answer.
    """
    at = start
    while at < end and (arrivals := log.read(topic, partition, at, min(PAGE, end - at))):
        at = arrivals[-1].position + 1
        for a in arrivals:
            if a.position < end:
                yield a
