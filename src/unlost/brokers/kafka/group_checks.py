"""How services stand on the log: what waits, what was removed, who takes part. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from unlost.brokers.findings import Finding, Ours
from unlost.brokers.kafka.facts import Facts, TopicFacts, Unread
from unlost.brokers.kafka.forecast import Forecast, forecast
from unlost.brokers.kafka.settings import Settings
from unlost.brokers.kafka.words import alter, counted, fine, hours, number, places_of, span


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
            yield fine(code, good, "positions of services against the logs")


def _lag_of(s: Standing, settings: Settings) -> Iterator[Finding]:
    name, retention = s.topic.name, s.topic.there.retention or 0.0
    waiting = sum(f.waiting for f in s.by.values())
    removed = {n: f.removed for n, f in s.by.items() if f.state == "removed"}
    if removed:
        yield Finding(
            severity="error", code="UL4302", what=f"up to {sum(removed.values()):,} events on {name} were removed before {s.service} had "
            "handled them",
            evidence=f"{places_of(name, removed)}: the log begins behind the service's position",
            fix="unlost audit names them as expired once the service has gone on; keep more: "
            + alter(settings, s.topic, "retention.ms=-1"),
        )  # fmt: skip
    late = {n: f for n, f in s.by.items() if f.state in ("soon", "due")}
    if late:
        left = min((f.left for f in late.values() if f.left is not None), default=retention / 2)
        when = f"in {hours(left)}" if left else "at any moment"
        old = f"{hours(retention - left)} old" if left else f"older than {hours(retention)}"
        yield Finding(
            severity="error", code="UL4301", what=f"retention passes events on {name} that {s.service} has not handled, {when}",
            evidence=f"{places_of(name, late)}: the first that waits is {old}, retention.ms is {hours(retention)}; {waiting:,} wait",
            fix=f"unlost run --service {s.service}, or keep more: {alter(settings, s.topic, 'retention.ms=-1')}",
        )  # fmt: skip
    in_time = {n: f for n, f in s.by.items() if f.state == "in time"}
    if in_time and not late:
        yield Finding(
            severity="note", code="UL4301", what=f"{sum(f.waiting for f in in_time.values()):,} events on {name} wait for {s.service}; "
            f"retention passes them in {hours(retention / 2)} at the earliest",
            evidence=f"they are younger than half of retention.ms ({hours(retention)})", fix=f"unlost run --service {s.service}",
        )  # fmt: skip
    unknown = [n for n, f in s.by.items() if f.state == "unknown"]
    if unknown:
        yield Finding(
            severity="note", code="UL4007", what=f"not checked: how old the events on {name} are that wait for {s.service}",
            evidence=places_of(name, unknown),
        )  # fmt: skip
    if s.beyond:
        position, end = next(iter(s.beyond.values()))
        yield Finding(
            severity="error", code="UL4303", what=f"{s.service} has handled more of {name} than the log holds: the log has lost its end, or it "
            "is another log",
            evidence=f"{places_of(name, s.beyond)}: position {position}, the log ends at {end}",
            fix="was the topic made again, a broker's disk replaced, or an unclean election held? Events that are published now would be "
            "taken for handled: give the service a new name, or bring the log back",
        )  # fmt: skip


def _present_groups(facts: Facts, settings: Settings, ours: Ours) -> Iterator[Finding]:
    minutes = [m for c in facts.brokers.values() if (m := number(c, "offsets.retention.minutes")) is not None]
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
            yield fine(
                "UL4304", f"{group.name} runs", f"{counted(len(group.members), 'member')} in the group {group.full}"
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
                evidence=f"{counted(len(group.members), 'member')}, {counted(partitions, 'partition')}",
                fix="run fewer processes; more partitions only with a new topic (the keys would move)",
            )  # fmt: skip
        elif partitions:
            yield fine("UL4305", f"every member of {group.name} can have a partition", f"{partitions} partitions")
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
            yield fine("UL4306", f"all members of {group.name} are ours", f"client.id {mine}")


GROUP_CHECKS = (_lag, _present_groups, _members)
