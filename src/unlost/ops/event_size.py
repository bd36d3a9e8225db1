"""How large events are, by what the log holds: the newest of each topic, not all."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import msgspec

from unlost.brokers.port import Log
from unlost.ops.pages import stretch

NEWEST = 1000  # events of each topic that are looked at


class Size(msgspec.Struct, frozen=True, kw_only=True):
    """The data of one type, in bytes, among the newest events."""

    type: str
    events: int
    mean: int
    largest: int
    largest_at: str  # topic/partition:position


def sizes(log: Log, topics: Collection[str]) -> list[Size]:
    """The largest on average first. Topics that the log does not have are left out.

    Raises:
        Unavailable: the broker does not answer.
    """
    found: dict[str, list[tuple[int, str]]] = {}
    for topic in log.topics(topics):
        each = -(-NEWEST // topic.partitions)
        for partition, (start, end) in enumerate(topic.ranges):
            for a in stretch(log, topic.name, partition, max(start, end - each), end):
                if a.envelope is not None and a.data is not None:
                    place = f"{topic.name}/{partition}:{a.position}"
                    found.setdefault(a.envelope.type, []).append((len(a.data), place))
    return sorted(_summed(found), key=lambda s: (-s.mean, s.type))


def _summed(found: Mapping[str, list[tuple[int, str]]]) -> list[Size]:
    summed = []
    for type, each in found.items():
        largest, place = max(each)
        mean = round(sum(size for size, _ in each) / len(each))
        summed.append(Size(type=type, events=len(each), mean=mean, largest=largest, largest_at=place))
    return summed
