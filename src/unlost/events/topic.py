"""Where events stand: topics, their partitions, and the unit of progress over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from unlost.events.envelope import Envelope


class Topic(msgspec.Struct, frozen=True):
    """A named, partitioned log. Its number of partitions is fixed when it is created.

    `retention` (seconds, or text such as "30d") lets the log forget handled events of that age; without it
    everything is kept. No retention ever removes an event that a service has not finished with.

    Example:
        >>> Topic("order", partitions=32, retention="30d").partitions
        32
    """

    name: str
    partitions: int = 8
    retention: str | float | None = None


class TopicInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A topic as the broker has it. `id` changes when a topic is deleted and made again."""

    name: str
    id: str
    partitions: int
    ranges: Sequence[tuple[int, int]]  # per partition: first position, position after the last
    retention: float | None = None


class Unit(NamedTuple):
    """The unit of progress."""

    service: str
    topic: str
    partition: int

    def __str__(self) -> str:
        return f"{self.service} {self.topic}/{self.partition}"


class Arrival(msgspec.Struct, frozen=True, gc=False):
    """An event as it was received. `envelope` is None when its bytes are no event; `problem` says why."""

    position: int
    envelope: Envelope | None
    recorded: int
    head: bytes
    key: bytes | None
    data: bytes | None
    problem: str = ""

    @property
    def size(self) -> int:
        return len(self.head) + len(self.data or b"") + len(self.key or b"")
