"""Where events stand: topics, their partitions, and the unit of progress over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import msgspec

from unlost.events.codec import Layout, decode_head, encode_head, read_peeked
from unlost.events.envelope import Envelope
from unlost.events.model import Event
from unlost.world import rfc3339

ERASED = "erased"  # the rule by which an event is nobody's business whose content an operator has erased


class Foreign(msgspec.Struct, frozen=True, kw_only=True):
    """A message of a producer that does not write CloudEvents, as a topic's decoder gets it."""

    topic: str
    partition: int
    position: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes | None]]
    recorded: int  # microseconds since 1970


Decoder = Callable[[Foreign], Event | None]


class Topic(msgspec.Struct, frozen=True):
    """A named, partitioned log. Its number of partitions is fixed when it is created.

    - `retention` (seconds, or text such as "30d") lets the log forget events of that age; without it everything is
      kept. The embedded log never forgets an event that a service has not finished with; Kafka does, and then it is
      named as expired.
    - `replication` and `min_insync` (replicas) say how many copies a broker of several machines keeps, and how many
      must have an event before it is accepted. Without them: three and two, or what the cluster has.
    - `decoder` makes events of what producers write that do not know unlost or CloudEvents. It returns an event, or
      None for a message that is nothing to anybody (`skipped(decoder)`).

    Example:
        >>> Topic("order", partitions=32, retention="30d").partitions
        32
    """

    name: str
    partitions: int = 8
    retention: str | float | None = None
    replication: int | None = None
    min_insync: int | None = None
    decoder: Decoder | None = None


class TopicInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A topic as the broker has it. `id` changes when a topic is deleted and made again."""

    name: str
    id: str
    partitions: int
    ranges: Sequence[tuple[int, int]]  # per partition: first position, position after the last
    retention: float | None = None
    replication: int = 1
    min_insync: int = 1
    survives: str = ""  # what an event accepted on this topic survives; empty: what the broker says


class Unit(NamedTuple):
    """The unit of progress."""

    service: str
    topic: str
    partition: int

    def __str__(self) -> str:
        return f"{self.service} {self.topic}/{self.partition}"


class Gap(msgspec.Struct, frozen=True):
    """Positions [start, end) of a log that hold no event (any more).

    - `void`: no event was ever there (a marker of a transaction);
    - `expired`: the broker's retention removed them unread;
    - `unaccountable`: nobody can say what was there (compaction, a damaged log).

    `declared`: the App has declared a retention for the topic, so that an expired event is no loss that nobody wanted.
    """

    start: int
    end: int
    kind: Literal["void", "expired", "unaccountable"]
    why: str = ""
    declared: bool = False


class Arrival(msgspec.Struct, gc=False):
    """An event as it was received. `envelope` is None when its bytes are no event; `problem` says why.

    - `head` is how its attributes are stored beside `data`; None: as `encode_head` writes the envelope.
    - `rule` is the declared rule by which it is nobody's business (`skipped`).
    - `type`, `hash`, `simple`, `values` and `layout` are what `codec.peek` or `codec.peek_head` has found and vouched for.
      Most handlers never ask for the envelope, so it is made when somebody does.
    """

    position: int
    known: Envelope | None
    recorded: int
    head: bytes | None
    key: bytes | None
    data: bytes | None
    problem: str = ""
    rule: str = ""
    topic: str = ""
    type: str | None = None
    hash: int = 0
    simple: bool = False  # version 1, and JSON
    values: tuple[bytes, ...] = ()
    layout: Layout | None = None

    @property
    def envelope(self) -> Envelope | None:
        if self.known is None and self.type is not None:
            recorded = rfc3339(self.recorded)
            if self.layout is not None:
                self.known = read_peeked(
                    self.values, self.layout, self.data, topic=self.topic, key=self.key, recordedtime=recorded
                )
            elif self.head is not None:
                self.known = decode_head(
                    self.head, topic=self.topic, key=self.key, data=self.data, recordedtime=recorded
                )
        return self.known

    @property
    def size(self) -> int:
        return (len(self.data) if self.data is not None else 0) + (len(self.head) if self.head is not None else 0)

    @property
    def stored_head(self) -> bytes:
        """The attributes in the form in which they are kept."""
        if self.head is not None:
            return self.head
        envelope = self.envelope
        return b"" if envelope is None else encode_head(envelope)
