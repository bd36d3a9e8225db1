"""What is wrong with a cluster, from what was read of it. Pure: facts in, findings out.

Each check says something in any case, `ok` as well: what is not in its answer was not checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import msgspec

from unlost.brokers.findings import Finding, Ours
from unlost.brokers.kafka.facts import Facts
from unlost.brokers.kafka.group_checks import GROUP_CHECKS
from unlost.brokers.kafka.settings import Settings
from unlost.brokers.kafka.topic_checks import TOPIC_CHECKS, copies_in_sync
from unlost.brokers.kafka.words import acl, counted, fine, hosts, number, numbers, places_of, span, tool

NOTE_MARK = "u1"  # how the notes that services leave beside a position begin (delivery/note.py, a room above this one)
NOTE_BYTES = 4096  # how long they may get
LIBRDKAFKA_MIN = 0x020F0000  # 2.15
WEEK_MINUTES = 7 * 24 * 60
CLOCK_SECONDS = 30.0
CONSUMER_HEARTBEAT, DESCRIBE_CLUSTER, OFFSET_DELETE = 68, 60, 47  # numbers of requests


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
        yield fine("UL4001", "the client library is new enough", f"librdkafka {text}")


def _options(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    options = {name: value.lower() for name, value in settings.options.items()}
    found = []
    if options.get("enable.ssl.certificate.verification") == "false":
        found.append("enable.ssl.certificate.verification=false: anybody can pretend to be the cluster")
    if options.get("ssl.endpoint.identification.algorithm") == "none":
        found.append(
            "ssl.endpoint.identification.algorithm=none: any certificate of the authority is taken for the cluster's"
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
        yield fine(
            "UL4002", "no unsafe setting in the URL; those that a promise rests on are refused anyway",
            "it sets " + (", ".join(sorted(settings.options)) or "nothing"),
        )  # fmt: skip


def _encryption(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    protocol = settings.options.get("security.protocol", "plaintext").upper()
    reached = [*facts.bootstrap.values(), *facts.reached.values()]
    local = bool(reached) and all(r.loopback for r in reached)
    if protocol in ("SSL", "SASL_SSL"):
        yield fine("UL4003", "the connection is encrypted", f"security.protocol={protocol}")
    elif local:
        yield fine("UL4003", "the connection does not leave this machine", f"security.protocol={protocol}, loopback")
    else:
        login = ", and the password with them" if protocol == "SASL_PLAINTEXT" else ""
        yield Finding(
            severity="warning", code="UL4003", what=f"events go over the network as plain text{login}",
            evidence=f"security.protocol={protocol}; {hosts(facts)}",
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
        yield fine("UL4004", "every broker can be reached at the address that it names", hosts(facts))


def _rights(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    user = settings.options.get("sasl.username", "this client")
    found = 0
    for what in facts.denied:
        found += 1
        yield Finding(
            severity="error", code="UL4005", what=f"{user} has no right to look at {what}",
            evidence="refused by the cluster's authorizer", fix=acl(settings, "DESCRIBE", what),
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
                fix=acl(settings, sorted(lacking)[0], f"the topic {topic.full}"),
            )  # fmt: skip
    for group in facts.groups.values():
        if "READ" not in group.rights:
            found += 1
            yield Finding(
                severity="error", code="UL4005", what=f"{user} may not take part in the group of {group.name}",
                evidence=f"authorized operations: {', '.join(sorted(group.rights)) or 'none'}",
                fix=acl(settings, "READ", f"the group {group.full}"),
            )  # fmt: skip
    if facts.rights is not None and "CREATE" not in facts.rights:
        found += 1
        yield Finding(
            severity="note", code="UL4005", what=f"{user} may not make topics everywhere on the cluster",
            evidence=f"authorized operations on the cluster: {', '.join(sorted(facts.rights)) or 'none'}",
            fix="make missing topics as somebody who may, or grant CREATE for the prefix",
        )  # fmt: skip
    if not found:
        yield fine(
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
        yield fine(
            "UL4006", "no broker's clock is ahead of this machine's (one that is behind cannot be seen without writing)",
            f"the newest record that a broker wrote is {span(max(0.0, -ahead))} old",
        )  # fmt: skip


def _skipped(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    for text in facts.skipped:
        yield Finding(severity="note", code="UL4007", what=f"not checked: {text}")


# --- the cluster -----------------------------------------------------------------------------------------


def _brokers(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    count = len(facts.nodes)
    evidence = f"{counted(count, 'broker')} in the cluster's metadata"
    if count >= 3:
        yield fine("UL4101", "the cluster has the brokers that three copies need", evidence)
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
        yield fine("UL4102", f"the brokers are Kafka {version} or newer", evidence)


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
        yield fine("UL4103", "the brokers offer group.protocol=consumer", "the requests that the brokers understand")
        return
    if not facts.brokers:
        return
    wanted = int(settings.options.get("session.timeout.ms", "10000"))
    for node, config in facts.brokers.items():
        low, high = number(config, "group.min.session.timeout.ms"), number(config, "group.max.session.timeout.ms")
        if (low is not None and wanted < low) or (high is not None and wanted > high):
            yield Finding(
                severity="error", code="UL4103", what="the brokers refuse members with this session timeout: no service can start",
                evidence=f"session.timeout.ms={wanted}; broker {node} takes {low} to {high} ms "
                "(group.min.session.timeout.ms, group.max.session.timeout.ms)",
                fix=f"put session.timeout.ms={min(max(wanted, low or 0), high or wanted)} into the URL, or change the limits of the brokers",
            )  # fmt: skip
            return
    yield fine("UL4103", "the brokers take members with our session timeout", f"session.timeout.ms={wanted}")


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
            fix=f"{tool(settings)} --alter --entity-type brokers --entity-default --add-config unclean.leader.election.enable=false",
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
        yield msgspec.structs.replace(finding, evidence=f"{name}={bad} on broker {numbers(wrong)}")
    else:
        yield fine(code, good, f"{name}={next(iter(values.values()))}")


def _offsets_kept(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    minutes = [m for c in facts.brokers.values() if (m := number(c, "offsets.retention.minutes")) is not None]
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
        yield fine("UL4106", f"the positions of a group without members are kept for {span(least * 60)}", evidence)


def _offsets_topic(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    topic, count = facts.offsets, len(facts.nodes)
    if topic is None:
        wanted = max((number(c, "offsets.topic.replication.factor") or 0 for c in facts.brokers.values()), default=0)
        if wanted > count:
            yield Finding(
                severity="error", code="UL4107", what="no group can be formed: the topic of their positions cannot be made",
                evidence=f"offsets.topic.replication.factor={wanted}, and there is {counted(count, 'broker')}",
                fix="start the missing brokers, or set offsets.topic.replication.factor to what there is",
            )  # fmt: skip
        return
    bad = list(copies_in_sync(topic, "UL4107", "UL4107", "UL4107"))
    yield from bad
    least = min((len(p.replicas) for p in topic.places.values()), default=0)
    if least < min(3, count):
        bad.append(fine("UL4107", ""))
        yield Finding(
            severity="warning", code="UL4107", what=f"the positions of groups have {counted(least, 'copy')}: "
            "without the broker that has them, its groups stand still",
            evidence=f"__consumer_offsets has {counted(least, 'copy')}, the cluster has {counted(count, 'broker')}",
            fix="kafka-reassign-partitions.sh for __consumer_offsets, and offsets.topic.replication.factor=3",
        )  # fmt: skip
    if not bad:
        yield fine(
            "UL4107", "the positions of groups are copied as often as can be", f"{counted(least, 'copy')}, all in sync"
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
            evidence=f"{places_of(name, places)}; {evidence}", fix="kafka-reassign-partitions.sh: put the copies on brokers of different racks",
        )  # fmt: skip
    if unknown:
        yield Finding(
            severity="note", code="UL4108", what="some brokers do not say in which rack they are", evidence=evidence,
            fix=f"broker.rack=... in server.properties of broker {numbers(unknown)}",
        )  # fmt: skip
    elif not together:
        yield fine("UL4108", "copies are spread over racks", evidence)


def _note_space(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    sizes = [m for c in facts.brokers.values() if (m := number(c, "offset.metadata.max.bytes")) is not None]
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
        yield fine("UL4109", "there is room for the note beside a position", evidence)


CHECKS: Sequence[Check] = (
    _library, _options, _encryption, _addresses, _rights, _clocks,
    _brokers, _version, _group_protocol, _auto_create, _unclean_default, _offsets_kept, _offsets_topic, _racks, _note_space,
    *TOPIC_CHECKS, *GROUP_CHECKS, _skipped,
)  # fmt: skip
