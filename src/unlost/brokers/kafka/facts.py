"""What can be read of a cluster, as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from unlost.brokers.kafka.topics import Described
from unlost.brokers.port import Saved

NO_ID = "AAAAAAAAAAAAAAAAAAAAAA"  # of a topic on a broker that gives none


class Node(NamedTuple):
    id: int
    host: str
    port: int
    rack: str


class Reach(NamedTuple):
    """Trying the address that a broker names."""

    addresses: tuple[str, ...] = ()
    problem: str = ""
    loopback: bool = False


class Place(NamedTuple):
    """A partition and its copies, as numbers of brokers."""

    leader: int | None
    replicas: tuple[int, ...]
    in_sync: tuple[int, ...]


class TopicFacts(msgspec.Struct, frozen=True, kw_only=True):
    name: str  # ours
    full: str
    id: str
    places: Mapping[int, Place]
    config: Mapping[str, str] | None  # None: it could not be read
    rights: frozenset[str]

    @property
    def there(self) -> Described:
        replication = min((len(p.replicas) for p in self.places.values()), default=0)
        config = dict(self.config or {})
        return Described(
            name=self.full, id=self.id, partitions=len(self.places), replication=replication, config=config
        )


class MemberFacts(NamedTuple):
    client: str
    host: str


class GroupFacts(msgspec.Struct, frozen=True, kw_only=True):
    name: str  # ours: the service
    full: str
    state: str
    consumer_protocol: bool
    assignor: str
    members: Sequence[MemberFacts]
    saved: Mapping[tuple[str, int], Saved]  # by topic (ours) and partition
    rights: frozenset[str]


class Unread(NamedTuple):
    """An event that waits first in its partition: is it younger than half of the retention, and how old (seconds)?"""

    young: bool | None = None
    age: float | None = None


class Facts(msgspec.Struct, kw_only=True):
    """Everything that was read. None or absent: it could not be."""

    cluster: str
    library: tuple[str, int]
    nodes: Sequence[Node]
    bootstrap: Mapping[str, Reach]
    reached: Mapping[int, Reach]
    apis: Mapping[int, int]  # number of a request -> the newest version of it
    rights: frozenset[str] | None
    brokers: Mapping[int, Mapping[str, str]]
    topics: Mapping[str, TopicFacts]  # by our names
    missing: Sequence[str]
    offsets: TopicFacts | None  # the topic of the groups' positions
    groups: Mapping[str, GroupFacts]
    ranges: Mapping[tuple[str, int], tuple[int, int]]
    unread: Mapping[tuple[str, str, int], Unread]  # by service, topic, partition
    newest_of_brokers: float | None  # seconds from now; above 0: in the future
    newest_of_topics: Mapping[str, float]
    skipped: Sequence[str]  # what could not be read, and why
    denied: Sequence[str]
