"""How findings on a cluster say things."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from unlost.brokers.findings import Finding
from unlost.brokers.kafka.facts import Facts, TopicFacts
from unlost.brokers.kafka.settings import Settings
from unlost.brokers.kafka.topics import Described
from unlost.config import duration

PLACES_SHOWN = 5


def span(seconds: float) -> str:
    """
    >>> span(90), span(3 * 86400)
    ('90 s', '3 days')
    """
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else span(seconds)


def fine(code: str, what: str, evidence: str = "") -> Finding:
    return Finding(severity="ok", code=code, what=what, evidence=evidence)


def readable(facts: Facts) -> Iterator[TopicFacts]:
    return (t for t in facts.topics.values() if t.config is not None)


def counted(number: int, noun: str) -> str:
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {noun[:-1] + 'ies' if noun.endswith('y') else noun + 's'}"


def numbers(ids: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(set(ids))))


def places_of(name: str, partitions: Iterable[int]) -> str:
    chosen = sorted(partitions)
    shown = ", ".join(f"{name}/{n}" for n in chosen[:PLACES_SHOWN])
    return shown + (f" and {len(chosen) - PLACES_SHOWN} more" if len(chosen) > PLACES_SHOWN else "")


def copies_of(topic: TopicFacts, partitions: Sequence[int]) -> str:
    first = topic.places[min(partitions)]
    return (
        f"{places_of(topic.name, partitions)}: copies on broker {numbers(first.replicas)}, in sync {numbers(first.in_sync) or 'none'}"
    )  # fmt: skip


def replicas_of(topic: TopicFacts, partitions: Iterable[int]) -> set[int]:
    return {r for n in partitions for r in topic.places[n].replicas}


def away(topic: TopicFacts, partitions: Iterable[int]) -> set[int]:
    return {r for n in partitions for r in topic.places[n].replicas if r not in topic.places[n].in_sync}


def number(config: Mapping[str, str], name: str) -> int | None:
    try:
        return int(config[name])
    except (KeyError, ValueError):
        return None


def flush(there: Described) -> str:
    value = there.config.get("flush.messages", "")
    return value if value and len(value) < 19 else "never"


def seconds_of(retention: str | float | None) -> float | None:
    return None if retention is None else duration(retention)


def hosts(facts: Facts) -> str:
    return ", ".join(f"{n.host}:{n.port}" for n in facts.nodes)


def tool(settings: Settings) -> str:
    return f"kafka-configs.sh --bootstrap-server {settings.bootstrap}"


def alter(settings: Settings, topic: TopicFacts, setting: str) -> str:
    return f"{tool(settings)} --alter --entity-type topics --entity-name {topic.full} --add-config {setting}"


def acl(settings: Settings, operation: str, what: str) -> str:
    user = settings.options.get("sasl.username", "NAME")
    kind, _, name = what.removeprefix("the ").partition(" ")
    where = f"--{kind} {name}" if kind in ("topic", "group") and name and " " not in name else "--cluster"
    return f"kafka-acls.sh --bootstrap-server {settings.bootstrap} --add --allow-principal User:{user} --operation {operation} {where}"
