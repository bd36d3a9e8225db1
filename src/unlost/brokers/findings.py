"""What a look at a broker found: the verb of `unlost doctor`, beside the port.

A finding's code names the check, its severity what came of it. What was not read is said to be unread: a check that
was not made never counts as passed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import msgspec

from unlost.brokers.port import Saved, Survives
from unlost.events.topic import Topic, TopicInfo, Unit

Severity = Literal["error", "warning", "note", "ok"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note", "ok")

CHECKS = {
    # the way to the cluster
    "UL4001": "the version of the client library",
    "UL4002": "settings in the broker's URL",
    "UL4003": "encryption on the way",
    "UL4004": "the addresses that the brokers name",
    "UL4005": "the rights of this user",
    "UL4006": "clocks",
    "UL4007": "what could not be read, and so was not checked",
    # the cluster
    "UL4101": "the number of brokers",
    "UL4102": "the version of the brokers",
    "UL4103": "how groups are formed",
    "UL4104": "topics that make themselves",
    "UL4105": "the cluster's default for unclean elections",
    "UL4106": "how long the positions of a group are kept",
    "UL4107": "the topic that holds the positions of groups",
    "UL4108": "racks",
    "UL4109": "the space for a note beside a position",
    # topics
    "UL4201": "whether the topic is there",
    "UL4202": "leaders of partitions",
    "UL4203": "whether publishing is possible: copies in sync against the least that is demanded",
    "UL4204": "copies in sync against all copies",
    "UL4205": "the number of copies",
    "UL4206": "min.insync.replicas",
    "UL4207": "unclean elections",
    "UL4208": "what an accepted event survives",
    "UL4209": "compaction",
    "UL4210": "the size of a message",
    "UL4211": "whose clock is in the log",
    "UL4212": "how long events are kept",
    "UL4213": "the topic against what the App declares",
    # groups
    "UL4301": "retention against events that wait",
    "UL4302": "events that were removed unread",
    "UL4303": "positions against the end of the log",
    "UL4304": "whether the group has members",
    "UL4305": "members against partitions",
    "UL4306": "members that are not ours",
    # the store
    "UL4401": "whether the store can be opened",
    "UL4402": "whether the store belongs to this broker",
    "UL4403": "topics that were made again",
    "UL4404": "topics with another number of partitions",
    "UL4405": "positions that the group has forgotten",
    "UL4406": "whether the group's progress is kept in this store",
    "UL4407": "a store that is older than what the group was told",
    "UL4408": "members on other machines",
    "UL4409": "the outbox",
    "UL4410": "the books of the outbox",
    # a file of ours
    "UL4501": "the version of SQLite",
    "UL4502": "the file system",
    "UL4503": "room on the disk",
    "UL4504": "who may read the file",
    "UL4510": "what is checked of the embedded broker",
    # a store in PostgreSQL
    "UL4601": "the version of the server",
    "UL4602": "fsync and full_page_writes",
    "UL4603": "synchronous_commit",
    "UL4604": "whether the server takes writes",
    "UL4605": "poolers",
    "UL4606": "the encoding",
    "UL4607": "the tables and their format",
    "UL4608": "the rights of the role",
    "UL4609": "encryption on the way",
    "UL4610": "connections",
    "UL4611": "clocks",
    "UL4612": "transactions that are open for long",
    "UL4613": "dead rows",
    "UL4614": "the numbers of the outbox",
    "UL4615": "the size of the inbox",
    "UL4616": "processes without a sign of life",
    "UL4617": "limits that end sessions and statements",
    "UL4618": "what could not be read, and so was not checked",
}


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One result of one check."""

    severity: Severity
    code: str  # which check, see `CHECKS`
    what: str
    evidence: str = ""  # the value, and where it was read
    fix: str = ""  # the command or the setting


class Ours(msgspec.Struct, frozen=True, kw_only=True):
    """Which part of a broker is to be looked at. None: all that is under the broker's prefix."""

    topics: frozenset[str] | None = None
    services: Mapping[str, frozenset[str]] | None = None  # with the topics that each reads, as far as they are known
    positions: Mapping[Unit, int] = {}  # what the store says: it goes before what the group was told
    declared: Mapping[str, Topic] = {}
    survives: Survives = "process death"  # what the App demands


class Examination(msgspec.Struct, kw_only=True):
    """What was found, and what the store is to be compared with. All names are ours, without the prefix."""

    title: str
    findings: list[Finding]
    topics: dict[str, TopicInfo] = {}
    services: list[str] = []
    saved: dict[str, dict[Unit, Saved]] = {}  # by service; a service whose group could not be read is not in it
    members: dict[str, list[str]] = {}  # by service: the host of each member
    here: frozenset[str] = frozenset()  # addresses of this machine, as far as they are known


class Examiner(Protocol):
    """Looks at a broker without changing anything."""

    def open(self) -> str:
        """Finds the broker, and returns its identity.

        Raises:
            Unavailable: it does not answer at all.
        """

    def examine(self, ours: Ours) -> Examination:
        """Blocks for some seconds."""

    def close(self) -> None: ...


def worst(findings: Sequence[Finding]) -> Severity:
    """
    >>> worst([Finding(severity="note", code="UL4001", what=""), Finding(severity="ok", code="UL4001", what="")])
    'note'
    """
    return min((f.severity for f in findings), key=SEVERITIES.index, default="ok")
