"""What a replay is to deliver: the request in the operator's words, and what it comes to in the log.

The log is read once from the chosen start to the chosen end: so it is known how many events of which types there are
before anything begins, and where the first and the last of each partition stand. These two places are what is kept; events
that come later are not part of the replay.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from unlost.app import App
from unlost.brokers.port import Log, Place
from unlost.delivery.service import Service
from unlost.errors import UsageError
from unlost.events import partition_of
from unlost.events.topic import Arrival, TopicInfo
from unlost.ops.connect import Looking
from unlost.ops.pages import stretch
from unlost.ops.service import service as registered
from unlost.ops.tail import moment
from unlost.world import REAL, rfc3339

NOT_REPLAYED = "not replayed"  # the rule by which an event is skipped that the replay was not asked for
NAMED_MAX = 10
_PLACE = re.compile(r"(.+)/(\d{1,5}):(\d{1,18})")


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """A replay in the operator's words."""

    service: str
    types: tuple[str, ...] = ()
    key: str | None = None
    start: tuple[str, ...] = ()
    end: tuple[str, ...] = ()
    into: str | None = None
    again: bool = False
    what_is_left: bool = False


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """Which events are wanted of those between the first and the last. Pure. Times in microseconds since 1970."""

    types: frozenset[str] | None = None  # wire types; None: all
    key: bytes | None = None
    since: int | None = None
    until: int | None = None

    @property
    def everything(self) -> bool:
        return self.types is None and self.key is None and self.since is None and self.until is None

    def wants(self, a: Arrival) -> bool:
        """
        >>> Choice(until=10).wants(Arrival(0, None, 9, None, None, None)), Choice(until=9).wants(Arrival(0, None, 9, None, None, None))
        (True, False)
        """
        return (
            (self.types is None or type_of(a) in self.types)
            and (self.key is None or a.key == self.key)
            and (self.since is None or a.recorded >= self.since)
            and (self.until is None or a.recorded < self.until)
        )


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One partition: from its first wanted event to behind its last; the same twice where there is none."""

    topic: str
    topic_id: str
    partition: int
    start: int
    end: int
    events: int


class Kind(msgspec.Struct, kw_only=True):
    """The events of one type in one topic. `first` and `last`: when they were recorded, in microseconds since 1970."""

    topic: str
    type: str  # empty: bytes that are no event
    events: int
    first: int
    last: int


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    asked: Asked
    choice: Choice
    parts: Sequence[Part]
    kinds: Sequence[Kind]
    gone: Sequence[str] = ()  # what the log does not hold any more, in words

    @property
    def events(self) -> int:
        return sum(part.events for part in self.parts)

    @property
    def ends(self) -> Mapping[Place, int]:
        return {(part.topic, part.partition): part.end for part in self.parts}


class _Bound(NamedTuple):
    """`--from` or `--to`: a time, or places, or neither."""

    micros: int | None
    places: Mapping[Place, int]


def plan(looking: Looking, app: App, asked: Asked) -> Plan:
    """Reads the log for it. Changes nothing.

    Raises:
        UsageError: no such service, type, place or time; nothing matches; what was asked for is not there any more.
    """
    service = app.chosen([asked.service])[0]
    registered(looking, asked.service)
    if asked.into is not None:
        _check_new(looking, app, asked.into)
    types = _types(service, asked.types)
    start, end = bound(asked.start, "--from"), bound(asked.end, "--to")
    if start.micros is not None and end.micros is not None and start.micros >= end.micros:
        raise UsageError(
            "UL1410", "--from comes before --to",
            found=f"from {rfc3339(start.micros)} to {rfc3339(end.micros)}", fix="--to names the first that is not replayed",
        )  # fmt: skip
    log = looking.pair()[1]
    infos = {info.name: info for info in log.topics(_topics(service, types))}
    key = None if asked.key is None else asked.key.encode()
    chosen = _places(infos, start, end, key)
    _check_places(infos, [*start.places.items(), *end.places.items()])
    gone = list(_gone(infos, log, chosen, start))
    if gone and not asked.what_is_left:
        raise UsageError(
            "UL1413", "part of what is to be replayed is not in the log any more", found=_some(gone),
            fix="--what-is-left replays the rest; or name another --from",
        )  # fmt: skip
    choice = Choice(types=None if not asked.types else frozenset(types), key=key, since=start.micros, until=end.micros)
    kinds: dict[tuple[str, str], Kind] = {}
    parts = []
    for info in infos.values():
        for partition, (low, high) in enumerate(info.ranges):
            place = (info.name, partition)
            first = last = high
            count = 0
            if place in chosen:
                at = log.at(*place, start.micros) if start.micros is not None else start.places.get(place, low)
                first, last, count = _read(
                    log, place, max(at, low), end.places.get(place, high), choice, service, kinds
                )
            parts.append(
                Part(
                    topic=info.name, topic_id=info.id, partition=partition, start=first, end=last, events=count
                )
            )  # fmt: skip
    found = Plan(asked=asked, choice=choice, parts=parts, kinds=[kinds[k] for k in sorted(kinds)], gone=gone)
    if not found.events:
        raise UsageError(
            "UL1414", f"there is nothing to replay for {asked.service}", found=_words(asked),
            fix="look what the log holds: unlost tail --from start",
        )  # fmt: skip
    return found


def bound(texts: Sequence[str], option: str) -> _Bound:
    """
    Raises:
        UsageError: neither a time, nor a duration, nor places; or several times.
    """
    places: dict[Place, int] = {}
    micros = None
    for text in texts:
        match = _PLACE.fullmatch(text)
        if match is not None:
            places[match[1], int(match[2])] = int(match[3])
            continue
        try:
            found = moment(text)
        except UsageError as e:
            raise UsageError(
                "UL1410", f"{option} is a time, how long ago, or TOPIC/PARTITION:POSITION", found=repr(text),
                fix="write 2026-11-23T14:00:00Z, 2h, or order/3:120",
            ) from e  # fmt: skip
        if micros is not None or places:
            raise UsageError(
                "UL1410", f"{option} is one time, or places", found=" ".join(texts), fix="leave one of them out"
            )
        micros = found
    if micros is not None and places:
        raise UsageError(
            "UL1410", f"{option} is one time, or places", found=" ".join(texts), fix="leave one of them out"
        )
    return _Bound(micros, places)


def type_of(a: Arrival) -> str | None:
    if a.type is not None:
        return a.type
    return None if a.known is None else a.known.type


def _types(service: Service, wanted: Sequence[str]) -> set[str]:
    """Wire types of handlers, by their own name or that of the class."""
    if not wanted:
        return set(service.handlers)
    found = set()
    for name in wanted:
        known = {
            wire
            for wire in service.handlers
            if name in (wire, wire.rpartition(".")[2], getattr(service.catalog.resolve(wire), "__name__", ""))
        }
        if not known:
            raise UsageError(
                "UL1412", f"{service.name} has no handler for {name!r}", found=f"it handles {', '.join(sorted(service.handlers))}",
                fix="name one of these, by its wire type or its class",
            )  # fmt: skip
        found |= known
    return found


def _topics(service: Service, types: set[str]) -> set[str]:
    classes = [service.catalog.resolve(type) for type in types]
    return {str(cls.__unlost__.topic) for cls in classes if cls is not None}


def _check_new(looking: Looking, app: App, name: str) -> None:
    Service(name)  # says what is wrong with it
    taken = {s.name for s in app.services} | set(
        looking.records.read(lambda look: [n for (n,) in look.execute("select name from unlost_service")])
    )
    if name in taken:
        raise UsageError(
            "UL1411", f"--into names a service that is new, and {name!r} is known", found=", ".join(sorted(taken)),
            fix="another name; one that goes on after an interruption: unlost replay --resume NAME",
        )  # fmt: skip


def _places(infos: Mapping[str, TopicInfo], start: _Bound, end: _Bound, key: bytes | None) -> set[Place]:
    """All partitions; once places are named, only these; of a key, only its own."""
    found = {(info.name, n) for info in infos.values() for n in range(info.partitions)}
    named = {*start.places, *end.places}
    if named:
        found &= named
    if key is not None:
        found = {(t, n) for t, n in found if partition_of(key, infos[t].partitions) == n}
    return found


def _check_places(infos: Mapping[str, TopicInfo], named: Sequence[tuple[Place, int]]) -> None:
    for (topic, partition), position in named:
        info = infos.get(topic)
        if info is None or partition >= info.partitions or position > info.ranges[partition][1]:
            if info is None:
                there = f"it reads {', '.join(sorted(infos)) or 'no topic that exists'}"
            elif partition >= info.partitions:
                there = f"{topic} has partitions 0 to {info.partitions - 1}"
            else:
                there = f"{topic}/{partition} ends at {info.ranges[partition][1]}"
            raise UsageError(
                "UL1415", f"{topic}/{partition}:{position} is no place that the service could read", found=there,
                fix="unlost topic show, or unlost tail, names places",
            )  # fmt: skip


def _gone(infos: Mapping[str, TopicInfo], log: Log, chosen: set[Place], start: _Bound) -> Sequence[str]:
    """What lies behind the chosen start and before the first that the log holds."""
    found = []
    for topic, partition in sorted(chosen):
        info = infos[topic]
        low, high = info.ranges[partition]
        wanted = start.places.get((topic, partition), 0)
        if start.micros is not None:
            if low == 0 or _surely_held(info, start.micros) or _older(log, (topic, partition), low, high, start.micros):
                continue
            text = "recorded before its first that is left; how many of them since then is not known"
            found.append(f"{topic}/{partition}: of positions 0 to {low - 1} those {text}")
        elif wanted < low:
            found.append(f"{topic}/{partition}: positions {wanted} to {low - 1}")
    return found


def _surely_held(info: TopicInfo, micros: int) -> bool:
    return info.retention is not None and micros >= REAL.now() - int(info.retention * 1e6)


def _older(log: Log, place: Place, low: int, high: int, micros: int) -> bool:
    """Whether an event from before that time is still there: then all that came after it are."""
    first = log.recorded({place: low}).get(place)
    return low < high and first is not None and first < micros


def _read(
    log: Log, place: Place, start: int, end: int, choice: Choice, service: Service, kinds: dict[tuple[str, str], Kind]
) -> tuple[int, int, int]:
    """First wanted position, the position after the last, and how many there are."""
    first: int | None = None
    last = count = 0
    everything = choice.everything
    for a in stretch(log, *place, start, end):
        type = type_of(a)
        unhandled = type is not None and type not in service.handlers
        if a.rule or unhandled or not (everything or choice.wants(a)):
            continue
        if first is None:
            first = a.position
        last = a.position + 1
        count += 1
        kind = kinds.get((place[0], type or ""))
        if kind is None:
            kinds[place[0], type or ""] = Kind(
                topic=place[0], type=type or "", events=1, first=a.recorded, last=a.recorded
            )
        else:
            kind.events += 1
            kind.first, kind.last = min(kind.first, a.recorded), max(kind.last, a.recorded)
    return (end, end, 0) if first is None else (first, last, count)


def _words(asked: Asked) -> str:
    parts = [
        *(f"--type {t}" for t in asked.types), *([] if asked.key is None else [f"--key {asked.key}"]),
        *(f"--from {t}" for t in asked.start), *(f"--to {t}" for t in asked.end),
    ]  # fmt: skip
    return (
        f"no event of its topics matches {' '.join(parts)}"
        if parts
        else "its topics hold no event that it has a handler for"
    )


def _some(lines: Sequence[str]) -> str:
    more = [f"… and {len(lines) - NAMED_MAX} more partitions"] if len(lines) > NAMED_MAX else []
    return "\n".join([*lines[:NAMED_MAX], *more])
