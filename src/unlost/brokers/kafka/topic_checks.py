"""What is wrong with topics: copies, leaders, settings. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from unlost.brokers.findings import Finding, Ours, Severity
from unlost.brokers.kafka.facts import Facts, TopicFacts
from unlost.brokers.kafka.settings import MESSAGE_BYTES_MAX, Settings
from unlost.brokers.kafka.words import (
    alter,
    away,
    copies_of,
    counted,
    fine,
    flush,
    numbers,
    readable,
    replicas_of,
    seconds_of,
    span,
)
from unlost.brokers.port import SURVIVES_ORDER, Survives
from unlost.events.topic import Topic


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
        yield fine("UL4201", f"{counted(len(facts.topics), 'topic')} looked at", ", ".join(sorted(facts.topics)))


def _in_sync(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    seen: set[str] = set()
    for topic in facts.topics.values():
        for finding in copies_in_sync(topic, "UL4202", "UL4203", "UL4204"):
            seen.add(finding.code)
            yield finding
    if not facts.topics:
        return
    for code, good in (("UL4202", "every partition has a leader"), ("UL4203", "every partition takes events"),
                       ("UL4204", "every copy is in sync")):  # fmt: skip
        if code not in seen:
            yield fine(code, good, "the cluster's metadata")


def copies_in_sync(topic: TopicFacts, leader: str, minimum: str, all_of_them: str) -> Iterator[Finding]:
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
            severity="error", code=leader, what=f"{topic.name}: {counted(len(headless), 'partition')} without a leader; "
            "nothing can be published to it or read from it",
            evidence=copies_of(topic, headless), fix=f"start the brokers that have it: {numbers(replicas_of(topic, headless))}",
        )  # fmt: skip
    if refused:
        yield Finding(
            severity="error", code=minimum, what=f"{topic.name}: {counted(len(refused), 'partition')} with fewer copies in sync than "
            "min.insync.replicas; publishing is refused",
            evidence=f"min.insync.replicas={least}; {copies_of(topic, refused)}",
            fix=f"start the brokers that are away: {numbers(away(topic, refused)) or 'more brokers, or lower min.insync.replicas'}",
        )  # fmt: skip
    if behind:
        yield Finding(
            severity="warning", code=all_of_them, what=f"{topic.name}: {counted(len(behind), 'partition')} with copies that are behind or away",
            evidence=copies_of(topic, behind), fix=f"look at broker {numbers(away(topic, behind))}: is it down, slow, or its disk full?",
        )  # fmt: skip


def _replication(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    count = len(facts.nodes)
    wanted = min(3, count)
    few = [t for t in facts.topics.values() if t.there.replication < wanted]
    for topic in few:
        copies = topic.there.replication
        yield Finding(
            severity="error" if copies < 2 else "warning", code="UL4205",
            what=f"{topic.name} has {counted(copies, 'copy')}: "
            + ("with that broker's disk its events are lost" if copies < 2 else "after one failure there is one left"),
            evidence=f"replication factor {copies}, the cluster has {counted(count, 'broker')}",
            fix=f"kafka-reassign-partitions.sh: give each partition of {topic.full} {wanted} replicas",
        )  # fmt: skip
    if facts.topics and not few:
        yield fine(
            "UL4205", "every topic has as many copies as the cluster allows, up to three", f"{counted(count, 'broker')}"
        )


def _min_insync(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    bad = False
    for topic in readable(facts):
        copies, least = topic.there.replication, topic.there.min_insync
        evidence = f"min.insync.replicas={least}, replication factor {copies}"
        if least > copies:
            bad = True
            yield Finding(
                severity="error", code="UL4206", what=f"{topic.name} demands more copies than it has: nothing is ever accepted",
                evidence=evidence, fix=alter(settings, topic, f"min.insync.replicas={max(1, min(2, copies))}"),
            )  # fmt: skip
        elif least < 2 <= copies:
            bad = True
            yield Finding(
                severity="warning", code="UL4206", what=f"{topic.name}: an event is accepted when one copy has it; if that broker dies, "
                "it is lost though others were to have it",
                evidence=evidence, fix=alter(settings, topic, "min.insync.replicas=2"),
            )  # fmt: skip
        elif 2 <= least == copies:
            bad = True
            yield Finding(
                severity="warning", code="UL4206", what=f"{topic.name}: publishing stops as soon as one broker is away",
                evidence=evidence, fix=f"more copies, or {alter(settings, topic, f'min.insync.replicas={copies - 1}')}",
            )  # fmt: skip
    if not bad and facts.topics:
        yield fine("UL4206", "every topic demands a sensible number of copies", "min.insync.replicas of the topics")


def _unclean(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    bad = [t for t in readable(facts) if (t.config or {}).get("unclean.leader.election.enable") == "true"]
    for topic in bad:
        yield Finding(
            severity="error", code="UL4207", what=f"{topic.name}: a broker that lacks accepted events may become leader, and they are lost",
            evidence="unclean.leader.election.enable=true in the topic's settings",
            fix=alter(settings, topic, "unclean.leader.election.enable=false"),
        )  # fmt: skip
    if not bad and facts.topics:
        yield fine("UL4207", "only a broker that has everything becomes leader", "unclean.leader.election.enable=false")


_LOSES: dict[Survives, str] = {
    "process death": "a machine that loses power, or its disk, takes the newest events with it",
    "power loss of one machine": "machines that lose power together can take the newest events with them",
    "power loss of all machines": "",
}


def _survives(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    levels: dict[Survives, list[TopicFacts]] = {}
    for topic in readable(facts):
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
            f"flush.messages={flush(t)} ({t.name})",
            fix="three copies with min.insync.replicas=2" + ("" if len(facts.nodes) >= 3 else "; on a single broker: "
            + alter(settings, topics[0], "flush.messages=1") + " (slow: one fsync per write)")
            if severity != "ok" else "",
        )  # fmt: skip


def _compaction(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    bad = [t for t in readable(facts) if t.there.compacted]
    for topic in bad:
        yield Finding(
            severity="error", code="UL4209", what=f"{topic.name} is compacted: of the events of a key only the newest is sure to be kept, "
            "the others may vanish unread",
            evidence=f"cleanup.policy={(topic.config or {}).get('cleanup.policy')}", fix=alter(settings, topic, "cleanup.policy=delete"),
        )  # fmt: skip
    if not bad and facts.topics:
        yield fine("UL4209", "no topic is compacted", "cleanup.policy=delete")


def _sizes(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    small = [t for t in readable(facts) if t.there.bytes_max < MESSAGE_BYTES_MAX]
    for topic in small:
        yield Finding(
            severity="note", code="UL4210", what=f"{topic.name} takes events of up to {topic.there.bytes_max:,} bytes; "
            "publishing a larger one is refused",
            evidence=f"max.message.bytes={topic.there.bytes_max}, the largest event has {MESSAGE_BYTES_MAX}",
            fix=alter(settings, topic, f"max.message.bytes={MESSAGE_BYTES_MAX}"),
        )  # fmt: skip
    if not small and facts.topics:
        yield fine("UL4210", "every topic takes the largest event", f"max.message.bytes is {MESSAGE_BYTES_MAX} or more")


def _whose_clock(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    stamped = [t.name for t in readable(facts) if (t.config or {}).get("message.timestamp.type") == "LogAppendTime"]
    if stamped:
        yield Finding(
            severity="note", code="UL4211", what=f"{', '.join(stamped)}: the time in the log is the brokers', not the publishers'",
            evidence="message.timestamp.type=LogAppendTime", fix="nothing, if that is meant",
        )  # fmt: skip
    elif facts.topics:
        yield fine("UL4211", "the time in the log is the publishers'", "message.timestamp.type=CreateTime")


def _kept(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    forgetting = False
    for topic in readable(facts):
        there, declared = topic.there, ours.declared.get(topic.name)
        if not there.deletes:
            continue
        if there.limited_in_bytes:
            forgetting = True
            yield Finding(
                severity="warning", code="UL4212", what=f"{topic.name} keeps a number of bytes: a burst can remove events that nobody has "
                "read yet. How full it is cannot be read, so there is no forecast",
                evidence=f"retention.bytes={(topic.config or {}).get('retention.bytes')} for each partition",
                fix=alter(settings, topic, "retention.bytes=-1"),
            )  # fmt: skip
        if there.retention is not None:
            forgetting = True
            agreed = declared is not None and seconds_of(declared.retention) == there.retention
            unsaid = declared is not None and declared.retention is None
            yield Finding(
                severity="warning" if unsaid else "note", code="UL4212",
                what=f"{topic.name} keeps events for {span(there.retention)}, handled or not"
                + ("; the App declares no retention, so it counts on all of them" if unsaid else ""),
                evidence=f"retention.ms={(topic.config or {}).get('retention.ms')}",
                fix="as declared" if agreed else alter(settings, topic, "retention.ms=-1") + " keeps everything",
            )  # fmt: skip
    if not forgetting and facts.topics:
        yield fine("UL4212", "no topic forgets events", "retention.ms=-1, retention.bytes=-1")


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
        yield fine("UL4213", "the topics are as the App declares them", ", ".join(sorted(ours.declared)))


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
    kept = seconds_of(declared.retention)
    if topic.config is not None and kept is not None and there.retention != kept:
        yield (
            "warning", f"is declared with a retention of {span(kept)}, and the cluster has another one",
            f"retention.ms={topic.config.get('retention.ms')}", "change one of the two; the cluster's is in force",
        )  # fmt: skip


TOPIC_CHECKS = (
    _present, _in_sync, _replication, _min_insync, _unclean, _survives, _compaction, _sizes, _whose_clock, _kept, _declared,
)  # fmt: skip
