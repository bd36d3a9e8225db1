"""What is wrong with a cluster, from what was read of it. Pure: facts in, findings out.

Each check says something in any case, `ok` as well: what is not in its answer was not checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec

from unlost.brokers.findings import Finding, Ours, Severity
from unlost.brokers.kafka.forecast import Forecast, forecast
from unlost.brokers.kafka.settings import MESSAGE_BYTES_MAX, Settings
from unlost.brokers.kafka.topics import Described
from unlost.brokers.port import SURVIVES_ORDER, Saved, Survives
from unlost.config import duration
from unlost.events.topic import Topic

NOTE_MARK = "u1"  # how the notes that services leave beside a position begin (delivery/note.py, a room above this one)
NOTE_BYTES = 4096  # how long they may get
LIBRDKAFKA_MIN = 0x020F0000  # 2.15
WEEK_MINUTES = 7 * 24 * 60
CLOCK_SECONDS = 30.0
PLACES_SHOWN = 5
CONSUMER_HEARTBEAT, DESCRIBE_CLUSTER, OFFSET_DELETE = 68, 60, 47  # numbers of requests
NO_ID = "AAAAAAAAAAAAAAAAAAAAAA"


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


Check = Callable[[Facts, Settings, Ours], Iterable[Finding]]


def check(facts: Facts, settings: Settings, ours: Ours) -> list[Finding]:
    return [finding for one in CHECKS for finding in one(facts, settings, ours)]


# --- the way to the cluster ------------------------------------------------------------------------------


def _library(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    text, number = facts.library
    if number < LIBRDKAFKA_MIN:
        yield Finding(
            severity="error", code="UL4001", what="this release of the Kafka client has bugs that lose events",
            evidence=f"librdkafka {text}, needed is 2.15 or newer", fix='pip install -U "confluent-kafka>=2.15"',
        )  # fmt: skip
    else:
        yield _ok("UL4001", "the client library is new enough", f"librdkafka {text}")


def _options(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    options = {name: value.lower() for name, value in settings.options.items()}
    found = []
    if options.get("enable.ssl.certificate.verification") == "false":
        found.append("enable.ssl.certificate.verification=false: anybody can pretend to be the cluster")
    if options.get("ssl.endpoint.identification.algorithm") == "none":
        found.append(
            "ssl.endpoint.identification.algorithm=none: any certificate of the authority is taken for the cluster's"
        )
    if "group.instance.id" in options:
        found.append(
            "group.instance.id: all processes and services with this URL share one id, and throw each other out"
        )
    if "test.mock.num.brokers" in options:
        found.append("test.mock.num.brokers: a pretended cluster inside the client; nothing is kept")
    for text in found:
        yield Finding(
            severity="error" if text.startswith("test.") else "warning", code="UL4002",
            what=f"a setting in the URL is unsafe: {text}", evidence=f"the broker's URL, {text.partition(':')[0]}",
            fix="leave it out of the URL",
        )  # fmt: skip
    if not found:
        yield _ok(
            "UL4002", "no unsafe setting in the URL; those that a promise rests on are refused anyway",
            "it sets " + (", ".join(sorted(settings.options)) or "nothing"),
        )  # fmt: skip


def _encryption(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    protocol = settings.options.get("security.protocol", "plaintext").upper()
    reached = [*facts.bootstrap.values(), *facts.reached.values()]
    local = bool(reached) and all(r.loopback for r in reached)
    if protocol in ("SSL", "SASL_SSL"):
        yield _ok("UL4003", "the connection is encrypted", f"security.protocol={protocol}")
    elif local:
        yield _ok("UL4003", "the connection does not leave this machine", f"security.protocol={protocol}, loopback")
    else:
        login = ", and the password with them" if protocol == "SASL_PLAINTEXT" else ""
        yield Finding(
            severity="warning", code="UL4003", what=f"events go over the network as plain text{login}",
            evidence=f"security.protocol={protocol}; {_hosts(facts)}",
            fix="give the brokers a listener with TLS, and set security.protocol=SSL (or SASL_SSL) in the URL",
        )  # fmt: skip


def _addresses(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    bad = [(n, facts.reached[n.id]) for n in facts.nodes if n.id in facts.reached and facts.reached[n.id].problem]
    for node, reach in bad:
        yield Finding(
            severity="error", code="UL4004",
            what=f"broker {node.id} names an address that cannot be used from here: {node.host}:{node.port}",
            evidence=f"{reach.problem}; read from the cluster's metadata",
            fix=f"set advertised.listeners of broker {node.id} to an address that its clients can reach (or mend DNS or the firewall)",
        )  # fmt: skip
    if not bad and facts.reached:
        yield _ok("UL4004", "every broker can be reached at the address that it names", _hosts(facts))


def _rights(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    user = settings.options.get("sasl.username", "this client")
    found = 0
    for what in facts.denied:
        found += 1
        yield Finding(
            severity="error", code="UL4005", what=f"{user} has no right to look at {what}",
            evidence="refused by the cluster's authorizer", fix=_acl(settings, "DESCRIBE", what),
        )  # fmt: skip
    reading = None if ours.services is None else {t for topics in ours.services.values() for t in topics}
    for topic in facts.topics.values():
        lacking = {"READ", "WRITE"} - topic.rights
        if lacking:
            found += 1
            needed = "READ" in lacking and (reading is None or topic.name in reading)
            yield Finding(
                severity="error" if needed else "warning", code="UL4005",
                what=f"{user} may not {' or '.join(sorted(lacking)).lower()} the topic {topic.name}",
                evidence=f"authorized operations: {', '.join(sorted(topic.rights)) or 'none'}",
                fix=_acl(settings, sorted(lacking)[0], f"the topic {topic.full}"),
            )  # fmt: skip
    for group in facts.groups.values():
        if "READ" not in group.rights:
            found += 1
            yield Finding(
                severity="error", code="UL4005", what=f"{user} may not take part in the group of {group.name}",
                evidence=f"authorized operations: {', '.join(sorted(group.rights)) or 'none'}",
                fix=_acl(settings, "READ", f"the group {group.full}"),
            )  # fmt: skip
    if facts.rights is not None and "CREATE" not in facts.rights:
        found += 1
        yield Finding(
            severity="note", code="UL4005", what=f"{user} may not make topics everywhere on the cluster",
            evidence=f"authorized operations on the cluster: {', '.join(sorted(facts.rights)) or 'none'}",
            fix="make missing topics as somebody who may, or grant CREATE for the prefix",
        )  # fmt: skip
    if not found:
        yield _ok(
            "UL4005", f"{user} has all rights that are needed", "authorized operations of cluster, topics, groups"
        )


def _clocks(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    ahead = facts.newest_of_brokers
    if ahead is not None and ahead > CLOCK_SECONDS:
        yield Finding(
            severity="warning", code="UL4006",
            what=f"the brokers' clock is at least {span(ahead)} ahead of this machine's",
            evidence="the newest record that a broker wrote (in __consumer_offsets, or with LogAppendTime) is from the future",
            fix="let NTP or chrony set the clocks of all machines",
        )  # fmt: skip
    for name, seconds in facts.newest_of_topics.items():
        if seconds > CLOCK_SECONDS:
            yield Finding(
                severity="warning", code="UL4006",
                what=f"an event on {name} is {span(seconds)} from the future: the clock of a producer, or of this machine, is wrong",
                evidence="the highest timestamp in the topic (CreateTime: the producer's clock)",
                fix="let NTP or chrony set the clocks of all machines; retention and ages are reckoned with these times",
            )  # fmt: skip
    if ahead is None:
        yield Finding(
            severity="note", code="UL4006", what="the clocks of the brokers were not checked",
            evidence="nothing that a broker wrote with its own clock could be read", fix="",
        )  # fmt: skip
    elif ahead <= CLOCK_SECONDS:
        yield _ok(
            "UL4006", "no broker's clock is ahead of this machine's (one that is behind cannot be seen without writing)",
            f"the newest record that a broker wrote is {span(max(0.0, -ahead))} old",
        )  # fmt: skip


def _skipped(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    for text in facts.skipped:
        yield Finding(severity="note", code="UL4007", what=f"not checked: {text}")


# --- the cluster -----------------------------------------------------------------------------------------


def _number(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    count = len(facts.nodes)
    evidence = f"{_count(count, 'broker')} in the cluster's metadata"
    if count >= 3:
        yield _ok("UL4101", "the cluster has the brokers that three copies need", evidence)
    elif count == 2:
        yield Finding(
            severity="warning", code="UL4101",
            what="two brokers keep two copies at most: either one of them is needed for every event, or one copy is enough",
            evidence=evidence, fix="add a third broker, then raise the replication of the topics",
        )  # fmt: skip
    else:
        yield Finding(
            severity="warning", code="UL4101", what="one broker: while it is away nothing can be published or handled, "
            "and what its disk loses is lost",
            evidence=evidence, fix="three brokers on three machines; fine for development",
        )  # fmt: skip


def _version(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    if not facts.apis:
        return
    version = version_of(facts.apis)
    evidence = "the requests that the brokers understand"
    if version in ("2.4", ""):
        yield Finding(
            severity="warning", code="UL4102", what=f"the brokers are {f'Kafka {version} to 2.7' if version else 'older than Kafka 2.4'}: "
            "topics have no ids there, so one that was deleted and made again is not seen",
            evidence=evidence, fix="use Kafka 3 or newer",
        )  # fmt: skip
    else:
        yield _ok("UL4102", f"the brokers are Kafka {version} or newer", evidence)


def version_of(apis: Mapping[int, int]) -> str:
    """The least version of Kafka that understands these requests; empty: older than any that we know apart."""
    for version, request, least in (("4.0", CONSUMER_HEARTBEAT, 1), ("2.8", DESCRIBE_CLUSTER, 0), ("2.4", OFFSET_DELETE, 0)):  # fmt: skip
        if apis.get(request, -1) >= least:
            return version
    return ""


def _group_protocol(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    if settings.consumer_protocol:
        off = [
            (node, config["group.coordinator.rebalance.protocols"])
            for node, config in facts.brokers.items()
            if "consumer" not in config.get("group.coordinator.rebalance.protocols", "consumer").lower().split(",")
        ]
        if off or (facts.apis and CONSUMER_HEARTBEAT not in facts.apis):
            yield Finding(
                severity="error", code="UL4103", what="the URL asks for group.protocol=consumer, and the brokers do not offer it",
                evidence=f"group.coordinator.rebalance.protocols={off[0][1]} on broker {off[0][0]}" if off
                else "the brokers do not know the request ConsumerGroupHeartbeat",
                fix="leave group.protocol out of the URL, or use Kafka 4 with group.coordinator.rebalance.protocols=classic,consumer",
            )  # fmt: skip
            return
        yield _ok("UL4103", "the brokers offer group.protocol=consumer", "the requests that the brokers understand")
        return
    if not facts.brokers:
        return
    wanted = int(settings.options.get("session.timeout.ms", "10000"))
    for node, config in facts.brokers.items():
        low, high = _int(config, "group.min.session.timeout.ms"), _int(config, "group.max.session.timeout.ms")
        if (low is not None and wanted < low) or (high is not None and wanted > high):
            yield Finding(
                severity="error", code="UL4103", what="the brokers refuse members with this session timeout: no service can start",
                evidence=f"session.timeout.ms={wanted}; broker {node} takes {low} to {high} ms "
                "(group.min.session.timeout.ms, group.max.session.timeout.ms)",
                fix=f"put session.timeout.ms={min(max(wanted, low or 0), high or wanted)} into the URL, or change the limits of the brokers",
            )  # fmt: skip
            return
    yield _ok("UL4103", "the brokers take members with our session timeout", f"session.timeout.ms={wanted}")


def _auto_create(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    yield from _cluster_flag(
        facts, "auto.create.topics.enable", "true", "UL4104",
        Finding(
            severity="warning", code="UL4104", what="the cluster makes topics by itself: a wrong name becomes a topic with the "
            "cluster's defaults (one partition, deleted after a week), and nobody is told",
            fix="auto.create.topics.enable=false in the brokers' server.properties (unlost makes its topics itself)",
        ),
        "topics are made on purpose only",
    )  # fmt: skip


def _unclean_default(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    yield from _cluster_flag(
        facts, "unclean.leader.election.enable", "true", "UL4105",
        Finding(
            severity="warning", code="UL4105", what="by the cluster's default a broker that lacks accepted events may become leader, "
            "and they are lost; it holds for every topic that does not say otherwise, and for the positions of groups",
            fix=f"{_tool(settings)} --alter --entity-type brokers --entity-default --add-config unclean.leader.election.enable=false",
        ),
        "only a broker that has everything becomes leader, by default",
    )  # fmt: skip


def _cluster_flag(
    facts: Facts, name: str, bad: str, code: str, finding: Finding, good: str
) -> Iterator[Finding]:  # fmt: skip
    values = {node: config[name] for node, config in facts.brokers.items() if name in config}
    if not values:
        return
    wrong = [node for node, value in values.items() if value == bad]
    if wrong:
        yield msgspec.structs.replace(finding, evidence=f"{name}={bad} on broker {_numbers(wrong)}")
    else:
        yield _ok(code, good, f"{name}={next(iter(values.values()))}")


def _offsets_kept(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    minutes = [m for c in facts.brokers.values() if (m := _int(c, "offsets.retention.minutes")) is not None]
    if not minutes:
        return
    least = min(minutes)
    evidence = f"offsets.retention.minutes={least}"
    if least < WEEK_MINUTES:
        yield Finding(
            severity="warning", code="UL4106", what=f"{span(least * 60)} after its last member has left, the positions of a group are deleted. "
            "Services go on from their store; what else reads them (lag monitors, Kafka's tools) sees none",
            evidence=evidence, fix=f"offsets.retention.minutes={WEEK_MINUTES} or more in the brokers' server.properties",
        )  # fmt: skip
    else:
        yield _ok("UL4106", f"the positions of a group without members are kept for {span(least * 60)}", evidence)


def _offsets_topic(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    topic, count = facts.offsets, len(facts.nodes)
    if topic is None:
        wanted = max((_int(c, "offsets.topic.replication.factor") or 0 for c in facts.brokers.values()), default=0)
        if wanted > count:
            yield Finding(
                severity="error", code="UL4107", what="no group can be formed: the topic of their positions cannot be made",
                evidence=f"offsets.topic.replication.factor={wanted}, and there is {_count(count, 'broker')}",
                fix="start the missing brokers, or set offsets.topic.replication.factor to what there is",
            )  # fmt: skip
        return
    bad = list(_copies(topic, "UL4107", "UL4107", "UL4107"))
    yield from bad
    least = min((len(p.replicas) for p in topic.places.values()), default=0)
    if least < min(3, count):
        bad.append(_ok("UL4107", ""))
        yield Finding(
            severity="warning", code="UL4107", what=f"the positions of groups have {_count(least, 'copy')}: "
            "without the broker that has them, its groups stand still",
            evidence=f"__consumer_offsets has {_count(least, 'copy')}, the cluster has {_count(count, 'broker')}",
            fix="kafka-reassign-partitions.sh for __consumer_offsets, and offsets.topic.replication.factor=3",
        )  # fmt: skip
    if not bad:
        yield _ok(
            "UL4107", "the positions of groups are copied as often as can be", f"{_count(least, 'copy')}, all in sync"
        )


def _racks(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    if len(facts.nodes) < 2:
        return
    racks = {n.id: n.rack for n in facts.nodes}
    known = set(racks.values()) - {""}
    unknown = [n for n, rack in racks.items() if not rack]
    evidence = ", ".join(f"broker {n}: {rack or 'no broker.rack'}" for n, rack in racks.items())
    if not known:
        yield Finding(
            severity="note", code="UL4108", what="no broker says in which rack it is: whether copies share a power supply cannot be seen",
            evidence=evidence, fix="broker.rack=... in the brokers' server.properties, one for each power domain (zone)",
        )  # fmt: skip
        return
    if len(known) == 1 and not unknown:
        yield Finding(
            severity="warning", code="UL4108", what="all brokers are in one rack: one power failure takes every copy",
            evidence=evidence, fix="spread the brokers over racks (zones)",
        )  # fmt: skip
        return
    together = {
        name: places
        for name, topic in facts.topics.items()
        if (places := [
            n for n, p in topic.places.items()
            if len(p.replicas) > 1 and len({racks.get(r, "") for r in p.replicas}) == 1 and racks.get(p.replicas[0])
        ])
    }  # fmt: skip
    for name, places in together.items():
        yield Finding(
            severity="warning", code="UL4108", what=f"all copies of a partition of {name} are in one rack",
            evidence=f"{_places(name, places)}; {evidence}", fix="kafka-reassign-partitions.sh: put the copies on brokers of different racks",
        )  # fmt: skip
    if unknown:
        yield Finding(
            severity="note", code="UL4108", what="some brokers do not say in which rack they are", evidence=evidence,
            fix=f"broker.rack=... in server.properties of broker {_numbers(unknown)}",
        )  # fmt: skip
    elif not together:
        yield _ok("UL4108", "copies are spread over racks", evidence)


def _note_space(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    sizes = [m for c in facts.brokers.values() if (m := _int(c, "offset.metadata.max.bytes")) is not None]
    if not sizes:
        return
    evidence = f"offset.metadata.max.bytes={min(sizes)}"
    if min(sizes) < NOTE_BYTES:
        yield Finding(
            severity="warning", code="UL4109", what="the note beside a position can be larger than the brokers take: "
            "then positions are not saved on the cluster (the store has them)",
            evidence=f"{evidence}, notes have up to {NOTE_BYTES}", fix=f"offset.metadata.max.bytes={NOTE_BYTES} in the brokers' server.properties",
        )  # fmt: skip
    else:
        yield _ok("UL4109", "there is room for the note beside a position", evidence)


# --- topics ----------------------------------------------------------------------------------------------


def _present(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    used = {unit.topic for unit in ours.positions}
    for name in facts.missing:
        if name in used:
            yield Finding(
                severity="error", code="UL4201", what=f"the topic {name} is gone, and services have positions on it",
                evidence=f"the cluster knows no topic {settings.prefix}{name}",
                fix="is it another cluster or prefix than before? What only that topic held is lost",
            )  # fmt: skip
        else:
            yield Finding(
                severity="note", code="UL4201", what=f"the topic {name} is not there yet: it is made when the App starts",
                evidence=f"the cluster knows no topic {settings.prefix}{name}",
            )  # fmt: skip
    if facts.topics:
        yield _ok("UL4201", f"{_count(len(facts.topics), 'topic')} looked at", ", ".join(sorted(facts.topics)))


def _in_sync(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    seen: set[str] = set()
    for topic in facts.topics.values():
        for finding in _copies(topic, "UL4202", "UL4203", "UL4204"):
            seen.add(finding.code)
            yield finding
    if not facts.topics:
        return
    for code, good in (("UL4202", "every partition has a leader"), ("UL4203", "every partition takes events"),
                       ("UL4204", "every copy is in sync")):  # fmt: skip
        if code not in seen:
            yield _ok(code, good, "the cluster's metadata")


def _copies(topic: TopicFacts, leader: str, minimum: str, all_of_them: str) -> Iterator[Finding]:
    """Partitions that are worse off than they should be: each is named once, by its worst trouble."""
    least = topic.there.min_insync if topic.config is not None else 1
    headless, refused, behind = [], [], []
    for n, p in topic.places.items():
        if p.leader is None:
            headless.append(n)
        elif len(p.in_sync) < least:
            refused.append(n)
        elif len(p.in_sync) < len(p.replicas):
            behind.append(n)
    if headless:
        yield Finding(
            severity="error", code=leader, what=f"{topic.name}: {_count(len(headless), 'partition')} without a leader; "
            "nothing can be published to it or read from it",
            evidence=_copies_of(topic, headless), fix=f"start the brokers that have it: {_numbers(_replicas(topic, headless))}",
        )  # fmt: skip
    if refused:
        yield Finding(
            severity="error", code=minimum, what=f"{topic.name}: {_count(len(refused), 'partition')} with fewer copies in sync than "
            "min.insync.replicas; publishing is refused",
            evidence=f"min.insync.replicas={least}; {_copies_of(topic, refused)}",
            fix=f"start the brokers that are away: {_numbers(_away(topic, refused)) or 'more brokers, or lower min.insync.replicas'}",
        )  # fmt: skip
    if behind:
        yield Finding(
            severity="warning", code=all_of_them, what=f"{topic.name}: {_count(len(behind), 'partition')} with copies that are behind or away",
            evidence=_copies_of(topic, behind), fix=f"look at broker {_numbers(_away(topic, behind))}: is it down, slow, or its disk full?",
        )  # fmt: skip


def _replication(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    count = len(facts.nodes)
    wanted = min(3, count)
    few = [t for t in facts.topics.values() if t.there.replication < wanted]
    for topic in few:
        copies = topic.there.replication
        yield Finding(
            severity="error" if copies < 2 else "warning", code="UL4205",
            what=f"{topic.name} has {_count(copies, 'copy')}: "
            + ("with that broker's disk its events are lost" if copies < 2 else "after one failure there is one left"),
            evidence=f"replication factor {copies}, the cluster has {_count(count, 'broker')}",
            fix=f"kafka-reassign-partitions.sh: give each partition of {topic.full} {wanted} replicas",
        )  # fmt: skip
    if facts.topics and not few:
        yield _ok("UL4205", f"every topic has {_count(wanted, 'copy')}, as many as {_count(count, 'broker')} allow" if count < 3
                  else "every topic has three copies or more", "the cluster's metadata")  # fmt: skip


def _min_insync(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    bad = False
    for topic in _readable(facts):
        copies, least = topic.there.replication, topic.there.min_insync
        evidence = f"min.insync.replicas={least}, replication factor {copies}"
        if least > copies:
            bad = True
            yield Finding(
                severity="error", code="UL4206", what=f"{topic.name} demands more copies than it has: nothing is ever accepted",
                evidence=evidence, fix=_alter(settings, topic, f"min.insync.replicas={max(1, min(2, copies))}"),
            )  # fmt: skip
        elif least < 2 <= copies:
            bad = True
            yield Finding(
                severity="warning", code="UL4206", what=f"{topic.name}: an event is accepted when one copy has it; if that broker dies, "
                "it is lost though others were to have it",
                evidence=evidence, fix=_alter(settings, topic, "min.insync.replicas=2"),
            )  # fmt: skip
        elif 2 <= least == copies:
            bad = True
            yield Finding(
                severity="warning", code="UL4206", what=f"{topic.name}: publishing stops as soon as one broker is away",
                evidence=evidence, fix=f"more copies, or {_alter(settings, topic, f'min.insync.replicas={copies - 1}')}",
            )  # fmt: skip
    if not bad and facts.topics:
        yield _ok("UL4206", "every topic demands a sensible number of copies", "min.insync.replicas of the topics")


def _unclean(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    bad = [t for t in _readable(facts) if (t.config or {}).get("unclean.leader.election.enable") == "true"]
    for topic in bad:
        yield Finding(
            severity="error", code="UL4207", what=f"{topic.name}: a broker that lacks accepted events may become leader, and they are lost",
            evidence="unclean.leader.election.enable=true in the topic's settings",
            fix=_alter(settings, topic, "unclean.leader.election.enable=false"),
        )  # fmt: skip
    if not bad and facts.topics:
        yield _ok("UL4207", "only a broker that has everything becomes leader", "unclean.leader.election.enable=false")


_LOSES: dict[Survives, str] = {
    "process death": "a machine that loses power, or its disk, takes the newest events with it",
    "power loss of one machine": "machines that lose power together can take the newest events with them",
    "power loss of all machines": "",
}


def _survives(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    levels: dict[Survives, list[TopicFacts]] = {}
    for topic in _readable(facts):
        levels.setdefault(topic.there.survives, []).append(topic)
    for level, topics in levels.items():
        names = ", ".join(sorted(t.name for t in topics))
        demanded = SURVIVES_ORDER.index(level) < SURVIVES_ORDER.index(ours.survives)
        severity: Severity = "error" if demanded else "warning" if level == "process death" else "ok"
        t = topics[0].there
        yield Finding(
            severity=severity, code="UL4208",
            what=f"an event that was accepted on {names} survives {level}" + (f": {_LOSES[level]}" if severity != "ok" else "")
            + (f". The App demands {ours.survives}" if demanded else ""),
            evidence=f"replication factor {t.replication}, min.insync.replicas={t.min_insync}, "
            f"flush.messages={_flush(t)} ({t.name})",
            fix="three copies with min.insync.replicas=2" + ("" if len(facts.nodes) >= 3 else "; on a single broker: "
            + _alter(settings, topics[0], "flush.messages=1") + " (slow: one fsync per write)")
            if severity != "ok" else "",
        )  # fmt: skip


def _compaction(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    bad = [t for t in _readable(facts) if t.there.compacted]
    for topic in bad:
        yield Finding(
            severity="error", code="UL4209", what=f"{topic.name} is compacted: of the events of a key only the newest is sure to be kept, "
            "the others may vanish unread",
            evidence=f"cleanup.policy={(topic.config or {}).get('cleanup.policy')}", fix=_alter(settings, topic, "cleanup.policy=delete"),
        )  # fmt: skip
    if not bad and facts.topics:
        yield _ok("UL4209", "no topic is compacted", "cleanup.policy=delete")


def _sizes(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    small = [t for t in _readable(facts) if t.there.bytes_max < MESSAGE_BYTES_MAX]
    for topic in small:
        yield Finding(
            severity="note", code="UL4210", what=f"{topic.name} takes events of up to {topic.there.bytes_max:,} bytes; "
            "publishing a larger one is refused",
            evidence=f"max.message.bytes={topic.there.bytes_max}, the largest event has {MESSAGE_BYTES_MAX}",
            fix=_alter(settings, topic, f"max.message.bytes={MESSAGE_BYTES_MAX}"),
        )  # fmt: skip
    if not small and facts.topics:
        yield _ok("UL4210", "every topic takes the largest event", f"max.message.bytes is {MESSAGE_BYTES_MAX} or more")


def _whose_clock(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    stamped = [t.name for t in _readable(facts) if (t.config or {}).get("message.timestamp.type") == "LogAppendTime"]
    if stamped:
        yield Finding(
            severity="note", code="UL4211", what=f"{', '.join(stamped)}: the time in the log is the brokers', not the publishers'",
            evidence="message.timestamp.type=LogAppendTime", fix="nothing, if that is meant",
        )  # fmt: skip
    elif facts.topics:
        yield _ok("UL4211", "the time in the log is the publishers'", "message.timestamp.type=CreateTime")


def _kept(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    forgetting = False
    for topic in _readable(facts):
        there, declared = topic.there, ours.declared.get(topic.name)
        if not there.deletes:
            continue
        if there.limited_in_bytes:
            forgetting = True
            yield Finding(
                severity="warning", code="UL4212", what=f"{topic.name} keeps a number of bytes: a burst can remove events that nobody has "
                "read yet. How full it is cannot be read, so there is no forecast",
                evidence=f"retention.bytes={(topic.config or {}).get('retention.bytes')} for each partition",
                fix=_alter(settings, topic, "retention.bytes=-1"),
            )  # fmt: skip
        if there.retention is not None:
            forgetting = True
            agreed = declared is not None and _seconds(declared.retention) == there.retention
            unsaid = declared is not None and declared.retention is None
            yield Finding(
                severity="warning" if unsaid else "note", code="UL4212",
                what=f"{topic.name} keeps events for {span(there.retention)}, handled or not"
                + ("; the App declares no retention, so it counts on all of them" if unsaid else ""),
                evidence=f"retention.ms={(topic.config or {}).get('retention.ms')}",
                fix="as declared" if agreed else _alter(settings, topic, "retention.ms=-1") + " keeps everything",
            )  # fmt: skip
    if not forgetting and facts.topics:
        yield _ok("UL4212", "no topic forgets events", "retention.ms=-1, retention.bytes=-1")


def _declared(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    same = True
    for name, declared in ours.declared.items():
        topic = facts.topics.get(name)
        if topic is None:
            continue
        differences = list(_differences(declared, topic))
        same = same and not differences
        for severity, what, evidence, fix in differences:
            yield Finding(severity=severity, code="UL4213", what=f"{name} {what}", evidence=evidence, fix=fix)
    if ours.declared and same:
        yield _ok("UL4213", "the topics are as the App declares them", ", ".join(sorted(ours.declared)))


def _differences(declared: Topic, topic: TopicFacts) -> Iterator[tuple[Severity, str, str, str]]:
    there = topic.there
    if there.partitions != declared.partitions:
        yield (
            "error", f"has other partitions than the App declares: the App will not start (it declares {declared.partitions})",
            f"{there.partitions} partitions on the cluster", f"declare partitions={there.partitions}",
        )  # fmt: skip
    for what, wanted, found in (("replication", declared.replication, there.replication),
                                ("min_insync", declared.min_insync, there.min_insync if topic.config is not None else 1024)):  # fmt: skip
        if wanted is not None and found < wanted:
            yield (
                "error", f"has less than the App declares: the App will not start (it declares {what}={wanted})",
                f"{what} is {found} on the cluster", "raise it on the cluster, or declare what there is",
            )  # fmt: skip
    kept = _seconds(declared.retention)
    if topic.config is not None and kept is not None and there.retention != kept:
        yield (
            "warning", f"is declared with a retention of {span(kept)}, and the cluster has another one",
            f"retention.ms={topic.config.get('retention.ms')}", "change one of the two; the cluster's is in force",
        )  # fmt: skip


# --- groups ----------------------------------------------------------------------------------------------


class Standing(NamedTuple):
    """How a service stands on a topic: per partition, what becomes of what waits there."""

    service: str
    topic: TopicFacts
    by: Mapping[int, Forecast]
    beyond: Mapping[int, tuple[int, int]]  # partitions whose position is behind the log's end: position, end


def standings(facts: Facts, ours: Ours) -> Iterator[Standing]:
    places: dict[tuple[str, str], dict[int, int]] = {}
    for group in facts.groups.values():
        for (name, partition), saved in group.saved.items():
            places.setdefault((group.name, name), {})[partition] = saved.position
    for unit, position in ours.positions.items():
        places.setdefault((unit.service, unit.topic), {})[unit.partition] = position
    for (service, name), positions in sorted(places.items()):
        if name not in facts.topics:
            continue
        topic = facts.topics[name]
        retention = topic.there.retention if topic.config is not None and topic.there.deletes else None
        by, beyond = {}, {}
        for partition, position in sorted(positions.items()):
            if (name, partition) not in facts.ranges:
                continue
            low, high = facts.ranges[name, partition]
            unread = facts.unread.get((service, name, partition), Unread())
            by[partition] = forecast(
                low=low, high=high, position=position, age=unread.age, retention=retention, young=unread.young
            )
            if position > high:
                beyond[partition] = (position, high)
        yield Standing(service, topic, by, beyond)


def _lag(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    seen: set[str] = set()
    for s in standings(facts, ours):
        for finding in _lag_of(s, settings):
            seen.add(finding.code)
            yield finding
    if not facts.groups and not ours.positions:
        return
    for code, good in (("UL4301", "retention does not come near an event that waits"),
                       ("UL4302", "no event was removed before it was handled"),
                       ("UL4303", "no position lies behind the end of the log")):  # fmt: skip
        if code not in seen:
            yield _ok(code, good, "positions of services against the logs")


def _lag_of(s: Standing, settings: Settings) -> Iterator[Finding]:
    name, retention = s.topic.name, s.topic.there.retention or 0.0
    waiting = sum(f.waiting for f in s.by.values())
    removed = {n: f.removed for n, f in s.by.items() if f.state == "removed"}
    if removed:
        yield Finding(
            severity="error", code="UL4302", what=f"up to {sum(removed.values()):,} events on {name} were removed before {s.service} had "
            "handled them",
            evidence=f"{_places(name, removed)}: the log begins behind the service's position",
            fix="unlost audit names them as expired once the service has gone on; keep more: "
            + _alter(settings, s.topic, "retention.ms=-1"),
        )  # fmt: skip
    late = {n: f for n, f in s.by.items() if f.state in ("soon", "due")}
    if late:
        left = min((f.left for f in late.values() if f.left is not None), default=retention / 2)
        when = f"in {_hours(left)}" if left else "at any moment"
        old = f"{_hours(retention - left)} old" if left else f"older than {_hours(retention)}"
        yield Finding(
            severity="error", code="UL4301", what=f"retention passes events on {name} that {s.service} has not handled, {when}",
            evidence=f"{_places(name, late)}: the first that waits is {old}, retention.ms is {_hours(retention)}; {waiting:,} wait",
            fix=f"unlost run --service {s.service}, or keep more: {_alter(settings, s.topic, 'retention.ms=-1')}",
        )  # fmt: skip
    in_time = {n: f for n, f in s.by.items() if f.state == "in time"}
    if in_time and not late:
        yield Finding(
            severity="note", code="UL4301", what=f"{sum(f.waiting for f in in_time.values()):,} events on {name} wait for {s.service}; "
            f"retention passes them in {_hours(retention / 2)} at the earliest",
            evidence=f"they are younger than half of retention.ms ({_hours(retention)})", fix=f"unlost run --service {s.service}",
        )  # fmt: skip
    unknown = [n for n, f in s.by.items() if f.state == "unknown"]
    if unknown:
        yield Finding(
            severity="note", code="UL4007", what=f"not checked: how old the events on {name} are that wait for {s.service}",
            evidence=_places(name, unknown),
        )  # fmt: skip
    if s.beyond:
        position, end = next(iter(s.beyond.values()))
        yield Finding(
            severity="error", code="UL4303", what=f"{s.service} has handled more of {name} than the log holds: the log has lost its end, or it "
            "is another log",
            evidence=f"{_places(name, s.beyond)}: position {position}, the log ends at {end}",
            fix="was the topic made again, a broker's disk replaced, or an unclean election held? Events that are published now would be "
            "taken for handled: give the service a new name, or bring the log back",
        )  # fmt: skip


def _present_groups(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    minutes = [m for c in facts.brokers.values() if (m := _int(c, "offsets.retention.minutes")) is not None]
    kept = f"its positions are deleted {span(min(minutes) * 60)} after its last member left" if minutes else ""
    for group in facts.groups.values():
        if group.state == "DEAD" and not group.saved:
            yield Finding(
                severity="note", code="UL4304", what=f"{group.name} has not run on this cluster, or its group was deleted",
                evidence=f"the cluster knows no group {group.full}",
            )  # fmt: skip
        elif not group.members:
            yield Finding(
                severity="note", code="UL4304", what=f"nobody runs {group.name}" + (f"; {kept} (when that was cannot be read)" if kept else ""),
                evidence=f"the group {group.full} is {group.state.lower()}", fix=f"unlost run --service {group.name}",
            )  # fmt: skip
        elif group.state != "STABLE":
            yield Finding(
                severity="note", code="UL4304", what=f"the group of {group.name} is sharing out its partitions just now",
                evidence=f"the group {group.full} is {group.state.lower()}; look again in a minute",
            )  # fmt: skip
        else:
            yield _ok(
                "UL4304", f"{group.name} runs", f"{_count(len(group.members), 'member')} in the group {group.full}"
            )


def _members(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    for group in facts.groups.values():
        if not group.members:
            continue
        topics = {topic for topic, _ in group.saved} | set((ours.services or {}).get(group.name, ()))
        partitions = sum(len(facts.topics[t].places) for t in topics if t in facts.topics)
        if partitions and len(group.members) > partitions:
            yield Finding(
                severity="warning", code="UL4305", what=f"{group.name} has more members than partitions: some have nothing to do",
                evidence=f"{_count(len(group.members), 'member')}, {_count(partitions, 'partition')}",
                fix="run fewer processes; more partitions only with a new topic (the keys would move)",
            )  # fmt: skip
        elif partitions:
            yield _ok("UL4305", f"every member of {group.name} can have a partition", f"{partitions} partitions")
        mine = settings.options.get("client.id", "unlost")
        foreign = sorted({m.client or "no client.id" for m in group.members if m.client != mine})
        assignor = "" if group.consumer_protocol or group.state != "STABLE" else group.assignor
        if foreign or (assignor and assignor != "cooperative-sticky"):
            yield Finding(
                severity="warning", code="UL4306", what=f"somebody else's consumer is in the group of {group.name}: the partitions that it has "
                "are not handled by the service",
                evidence=f"client.id {', '.join(foreign)}" if foreign else f"partition.assignment.strategy={assignor}",
                fix=f"stop it, or give it another group.id than {group.full}",
            )  # fmt: skip
        else:
            yield _ok("UL4306", f"all members of {group.name} are ours", f"client.id {mine}")


CHECKS: Sequence[Check] = (
    _library, _options, _encryption, _addresses, _rights, _clocks,
    _number, _version, _group_protocol, _auto_create, _unclean_default, _offsets_kept, _offsets_topic, _racks, _note_space,
    _present, _in_sync, _replication, _min_insync, _unclean, _survives, _compaction, _sizes, _whose_clock, _kept, _declared,
    _lag, _present_groups, _members, _skipped,
)  # fmt: skip


# --- words -----------------------------------------------------------------------------------------------


def span(seconds: float) -> str:
    """
    >>> span(90), span(3 * 86400)
    ('90 s', '3 days')
    """
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else span(seconds)


def _ok(code: str, what: str, evidence: str = "") -> Finding:
    return Finding(severity="ok", code=code, what=what, evidence=evidence)


def _readable(facts: Facts) -> Iterator[TopicFacts]:
    return (t for t in facts.topics.values() if t.config is not None)


def _count(number: int, noun: str) -> str:
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {noun[:-1] + 'ies' if noun.endswith('y') else noun + 's'}"


def _numbers(ids: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(set(ids))))


def _places(name: str, partitions: Iterable[int]) -> str:
    chosen = sorted(partitions)
    shown = ", ".join(f"{name}/{n}" for n in chosen[:PLACES_SHOWN])
    return shown + (f" and {len(chosen) - PLACES_SHOWN} more" if len(chosen) > PLACES_SHOWN else "")


def _copies_of(topic: TopicFacts, partitions: Sequence[int]) -> str:
    first = topic.places[min(partitions)]
    return (
        f"{_places(topic.name, partitions)}: copies on broker {_numbers(first.replicas)}, in sync {_numbers(first.in_sync) or 'none'}"
    )  # fmt: skip


def _replicas(topic: TopicFacts, partitions: Iterable[int]) -> set[int]:
    return {r for n in partitions for r in topic.places[n].replicas}


def _away(topic: TopicFacts, partitions: Iterable[int]) -> set[int]:
    return {r for n in partitions for r in topic.places[n].replicas if r not in topic.places[n].in_sync}


def _int(config: Mapping[str, str], name: str) -> int | None:
    try:
        return int(config[name])
    except (KeyError, ValueError):
        return None


def _flush(there: Described) -> str:
    value = there.config.get("flush.messages", "")
    return value if value and len(value) < 19 else "never"


def _seconds(retention: str | float | None) -> float | None:
    return None if retention is None else duration(retention)


def _hosts(facts: Facts) -> str:
    return ", ".join(f"{n.host}:{n.port}" for n in facts.nodes)


def _tool(settings: Settings) -> str:
    return f"kafka-configs.sh --bootstrap-server {settings.bootstrap}"


def _alter(settings: Settings, topic: TopicFacts, setting: str) -> str:
    return f"{_tool(settings)} --alter --entity-type topics --entity-name {topic.full} --add-config {setting}"


def _acl(settings: Settings, operation: str, what: str) -> str:
    user = settings.options.get("sasl.username", "NAME")
    kind, _, name = what.removeprefix("the ").partition(" ")
    where = f"--{kind} {name}" if kind in ("topic", "group") and name and " " not in name else "--cluster"
    return f"kafka-acls.sh --bootstrap-server {settings.bootstrap} --add --allow-principal User:{user} --operation {operation} {where}"
