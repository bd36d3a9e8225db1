"""Reading what a cluster tells of itself. Nothing is written, joined or committed. Blocking calls.

**Guarantee** what could not be read is in `Facts.skipped` or `Facts.denied`; the checks say so.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import confluent_kafka
from confluent_kafka import Consumer, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource, OffsetSpec, ResourceType

from unlost.brokers.findings import Examination, Ours
from unlost.brokers.kafka.checks import NOTE_MARK, check, version_of
from unlost.brokers.kafka.facts import NO_ID, Facts, GroupFacts, MemberFacts, Node, Place, Reach, TopicFacts, Unread
from unlost.brokers.kafka.ledger import LEDGER
from unlost.brokers.kafka.log import KafkaLog
from unlost.brokers.kafka.refusals import RIGHTS
from unlost.brokers.kafka.settings import Settings
from unlost.brokers.kafka.topics import Cluster, identity_of, info_of
from unlost.brokers.port import Saved
from unlost.errors import UnlostError
from unlost.events.topic import Unit
from unlost.world import REAL

T = TypeVar("T")

ASK_SECONDS = 10.0
HOPELESS_SECONDS = 2.0  # where a broker cannot be reached
TOUCH_SECONDS = 2.0  # for a connection to an address that a broker names
TOUCHED_AT_A_TIME = 8
VERSION_SECONDS = 3.0
READS_MAX = 50  # events whose age is read; of more it is only said that they are older than half of the retention
GROUPS_MAX = 200  # that are looked through for those of ours
NAMED_MAX = 5
OFFSETS = "__consumer_offsets"
_UNKNOWN = ("UNKNOWN_TOPIC_OR_PART", "UNKNOWN_TOPIC_OR_PARTITION", "UNKNOWN_TOPIC", "_UNKNOWN_TOPIC")


class KafkaDoctor:
    """The examiner of a `kafka://` URL."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._cluster = Cluster(settings)
        self._admin = self._cluster.admin
        self._skipped: list[str] = []
        self._denied: list[str] = []
        self._here: set[str] = set()
        self._seconds = ASK_SECONDS

    def close(self) -> None:
        """There is nothing to give back."""

    def open(self) -> str:
        self._told = self._cluster.connect()
        return identity_of(self._cluster)

    def examine(self, ours: Ours) -> Examination:
        facts = self._read(ours)
        groups = facts.groups.values()
        version = version_of(facts.apis)
        return Examination(
            title=("1 broker" if len(facts.nodes) == 1 else f"{len(facts.nodes)} brokers")
            + (f", Kafka {version} or newer" if version else "") + f", cluster {facts.cluster}",
            findings=check(facts, self._settings, ours),
            topics={
                name: info_of(
                    name, topic.there, [facts.ranges.get((name, p), (0, 0)) for p in range(len(topic.places))]
                )
                for name, topic in facts.topics.items()
            },
            services=sorted(set(facts.groups) | set(ours.services or ())),
            saved={g.name: {Unit(g.name, *place): saved for place, saved in g.saved.items()} for g in groups},
            members={g.name: [m.host for m in g.members] for g in groups},
            here=frozenset(self._here),
        )  # fmt: skip

    # --- reading -----------------------------------------------------------------------------------------

    def _read(self, ours: Ours) -> Facts:
        nodes, rights = self._nodes()
        reached = self._reach(nodes)
        if any(reach.problem for reach in reached.values()):
            self._seconds = HOPELESS_SECONDS
        prefix = self._settings.prefix
        everything = (
            name for name in self._cluster.names(self._told) if name != prefix + LEDGER
        )  # compacted on purpose
        names = list(everything) if ours.topics is None else [prefix + t for t in ours.topics]
        topics = self._topics(names)
        offsets = self._topics([OFFSETS]).get(OFFSETS)
        bare = {topic.name: topic for topic in topics.values()}
        groups = self._groups(ours, bare)
        ranges = self._ranges(bare)
        return Facts(
            cluster=self._cluster.id or "without an id",
            library=confluent_kafka.libversion(),
            nodes=nodes,
            bootstrap={s: self._touch(*_split(s), connect=False) for s in self._settings.bootstrap.split(",")},
            reached=reached,
            apis=self._apis(),
            rights=rights,
            brokers=self._brokers(nodes),
            topics=bare,
            missing=sorted(self._bare(n) for n in names if n not in topics and f"the topic {n}" not in self._denied),
            offsets=offsets,
            groups=groups,
            ranges=ranges,
            unread=self._unread(ours, bare, groups, ranges),
            **self._clocks(bare, offsets),
            skipped=self._skipped,
            denied=self._denied,
        )

    def _nodes(self) -> tuple[list[Node], frozenset[str] | None]:
        told = self._ask(
            "the cluster's own description",
            lambda: self._admin.describe_cluster(
                include_authorized_operations=True, request_timeout=self._seconds
            ).result(),
        )
        if told is None:
            return [Node(b.id, b.host or "", b.port, "") for b in self._told.brokers.values()], None
        nodes = sorted(Node(n.id, n.host, n.port, n.rack or "") for n in told.nodes)
        return nodes, _rights(told.authorized_operations)

    def _topics(self, names: Collection[str]) -> dict[str, TopicFacts]:
        """By their names on the cluster."""
        if not names:
            return {}
        told = self._admin.describe_topics(
            TopicCollection(sorted(names)), include_authorized_operations=True, request_timeout=self._seconds
        )
        found: dict[str, Any] = {}
        for name, future in told.items():
            topic = self._ask(f"the topic {name}", future.result, quiet=_UNKNOWN, needed=True)
            if topic is not None:
                found[name] = topic
        configs = self._configs(ResourceType.TOPIC, found, "the settings of topic")
        return {
            name: TopicFacts(
                name=self._bare(name), full=name, id="" if str(t.topic_id) == NO_ID else str(t.topic_id),
                places={
                    p.id: Place(
                        p.leader.id if p.leader is not None and p.leader.id >= 0 else None,
                        tuple(r.id for r in p.replicas), tuple(r.id for r in p.isr),
                    )
                    for p in t.partitions
                },
                config=configs.get(name), rights=_rights(t.authorized_operations),
            )
            for name, t in found.items()
        }  # fmt: skip

    def _brokers(self, nodes: Iterable[Node]) -> dict[int, dict[str, str]]:
        found = {}
        for node in nodes:  # one call each: the broker itself answers
            told = self._configs(ResourceType.BROKER, [str(node.id)], "the settings of broker")
            if str(node.id) in told:
                found[node.id] = told[str(node.id)]
        return found

    def _configs(self, kind: Any, names: Iterable[str], what: str) -> dict[str, dict[str, str]]:
        asked = [ConfigResource(kind, name) for name in names]
        if not asked:
            return {}
        found: dict[str, dict[str, str]] = {}
        failed: dict[str, list[str]] = {}
        for resource, future in self._admin.describe_configs(asked, request_timeout=self._seconds).items():
            try:
                entries = future.result()
                found[resource.name] = {n: e.value for n, e in entries.items() if e.value is not None}
            except KafkaException as e:
                failed.setdefault(e.args[0].str(), []).append(self._bare(resource.name))
        self._skip_all(what, failed)
        return found

    def _groups(self, ours: Ours, topics: Mapping[str, TopicFacts]) -> dict[str, GroupFacts]:
        """By service. Where none were named: those under the prefix that bear a mark of ours."""
        prefix = self._settings.prefix
        if ours.services is not None:
            names = [prefix + service for service in ours.services]
        else:
            told = self._ask(
                "the list of groups", lambda: self._admin.list_consumer_groups(request_timeout=self._seconds).result()
            )
            names = [g.group_id for g in (told.valid if told else ()) if g.group_id.startswith(prefix)]
            for e in told.errors or () if told else ():
                self._skipped.append(f"the groups of a broker: {e}")
            if len(names) > GROUPS_MAX:
                self._skipped.append(
                    f"{len(names) - GROUPS_MAX} of {len(names)} groups (name a service with --service)"
                )
                names = sorted(names)[:GROUPS_MAX]
        if not names:
            return {}
        described = self._admin.describe_consumer_groups(
            sorted(names), include_authorized_operations=True, request_timeout=self._seconds
        )
        found, others = {}, 0
        for name, future in described.items():
            group = self._ask(f"the group {name}", future.result, quiet=("GROUP_ID_NOT_FOUND",), needed=True)
            if group is None and f"the group {name}" in self._denied:
                continue
            facts = self._group(name, group, topics.values())
            if ours.services is None and not self._is_ours(facts):
                others += 1
                continue
            found[facts.name] = facts
        if others:
            text = "1 group that bears" if others == 1 else f"{others} groups that bear"
            self._skipped.append(f"{text} no mark of unlost (name a service with --service to look at it)")
        return found

    def _group(self, name: str, group: Any, topics: Iterable[TopicFacts]) -> GroupFacts:
        told = self._ask(f"the positions of the group {name}", lambda: self._committed(name, topics), needed=True)
        saved = {
            (self._bare(p.topic), p.partition): Saved(p.offset, p.metadata or "")
            for p in told or ()
            if p.offset >= 0 and p.error is None
        }
        return GroupFacts(
            name=self._bare(name), full=name, state="DEAD" if group is None else group.state.name,
            consumer_protocol=group is not None and group.type.name == "CONSUMER",
            assignor="" if group is None else group.partition_assignor or "",
            members=[] if group is None else [MemberFacts(m.client_id, m.host.lstrip("/")) for m in group.members],
            saved=saved, rights=frozenset({"READ"}) if group is None else _rights(group.authorized_operations),
        )  # fmt: skip

    def _committed(self, group: str, topics: Iterable[TopicFacts]) -> list[TopicPartition]:
        """By a consumer that never joins: the same question of an admin client kills the process where the group's
        coordinator is just moving (librdkafka 2.16 passes a group that such a client has not)."""
        places = [TopicPartition(t.full, n) for t in topics for n in t.places]
        if not places:
            return []
        consumer = Consumer(self._settings.consumer(group))
        try:
            return consumer.committed(places, timeout=self._seconds)
        finally:
            consumer.close()

    def _is_ours(self, group: GroupFacts) -> bool:
        mine = self._settings.options.get("client.id", "unlost")
        return any(m.client == mine for m in group.members) or any(
            s.note.startswith(NOTE_MARK) for s in group.saved.values()
        )

    def _ranges(self, topics: Mapping[str, TopicFacts]) -> dict[tuple[str, int], tuple[int, int]]:
        places = _led(topics.values())
        first = self._offsets(places, OffsetSpec.earliest(), "the beginning of")
        last = self._offsets(places, OffsetSpec.latest(), "the end of")
        return {
            (self._bare(topic), partition): (first[topic, partition][0], last[topic, partition][0])
            for topic, partition in first.keys() & last.keys()
        }

    def _offsets(
        self, places: Sequence[TopicPartition], spec: Any, what: str
    ) -> dict[tuple[str, int], tuple[int, int]]:
        """Position and timestamp (milliseconds), each -1 where there is none."""
        if not places:
            return {}
        asked = self._ask(
            what, lambda: self._admin.list_offsets(dict.fromkeys(places, spec), request_timeout=self._seconds)
        )
        found: dict[tuple[str, int], tuple[int, int]] = {}
        failed: dict[str, list[str]] = {}
        for place, future in (asked or {}).items():
            try:
                told = future.result()
                found[place.topic, place.partition] = (told.offset, told.timestamp)
            except KafkaException as e:
                failed.setdefault(e.args[0].str(), []).append(f"{self._bare(place.topic)}/{place.partition}")
        self._skip_all(what, failed)
        return found

    def _unread(
        self, ours: Ours, topics: Mapping[str, TopicFacts], groups: Mapping[str, GroupFacts],
        ranges: Mapping[tuple[str, int], tuple[int, int]],
    ) -> dict[tuple[str, str, int], Unread]:  # fmt: skip
        """How old the first waiting events are, where retention is set: first by the index of times, and those that
        are old by reading them."""
        positions = {(g.name, *place): saved.position for g in groups.values() for place, saved in g.saved.items()}
        positions |= {(u.service, u.topic, u.partition): position for u, position in ours.positions.items()}
        waiting = {
            (service, name, p): position
            for (service, name, p), position in positions.items()
            if name in topics and topics[name].config is not None and topics[name].there.retention is not None
            and ranges.get((name, p), (0, 0))[0] <= position < ranges.get((name, p), (0, 0))[1]
        }  # fmt: skip
        now, found, old = REAL.now(), dict[tuple[str, str, int], Unread](), []
        for name in sorted({key[1] for key in waiting}):
            half = (topics[name].there.retention or 0) / 2
            chosen = sorted({key[2] for key in waiting if key[1] == name})
            young = self._offsets(
                [TopicPartition(topics[name].full, p) for p in chosen],
                OffsetSpec.for_timestamp(max(0, int(now / 1000 - half * 1000))), "the age of what waits on",
            )  # fmt: skip
            for key in (k for k in waiting if k[1] == name and (topics[name].full, k[2]) in young):
                first_young = young[topics[name].full, key[2]][0]
                if first_young >= 0 and waiting[key] >= first_young:
                    found[key] = Unread(young=True)
                else:
                    old.append(key)
        ages = self._ages({key: waiting[key] for key in old[:READS_MAX]}, now)
        return found | {key: Unread(young=False, age=ages.get(key)) for key in old}

    def _ages(self, waiting: Mapping[tuple[str, str, int], int], now: int) -> dict[tuple[str, str, int], float]:
        found = dict[tuple[str, str, int], float]()
        if not waiting:
            return found
        try:
            log = KafkaLog(self._settings)
            try:
                for service in sorted({key[0] for key in waiting}):
                    own = {key[1:]: position for key, position in waiting.items() if key[0] == service}
                    times = log.recorded(own)
                    found |= {(service, *place): (now - micros) / 1e6 for place, micros in times.items()}
            finally:
                log.close()
        except UnlostError as e:
            self._skipped.append(f"the age of waiting events: {e.what} ({e.found})")
        return found

    def _clocks(self, topics: Mapping[str, TopicFacts], offsets: TopicFacts | None) -> dict[str, Any]:
        """The newest times that brokers and publishers wrote: seconds from now, above 0 is in the future."""
        stamped = [t for t in topics.values() if (t.config or {}).get("message.timestamp.type") == "LogAppendTime"]
        by_brokers = [*([offsets] if offsets is not None else []), *stamped]
        others = [t for t in topics.values() if t not in stamped]
        newest = self._offsets(_led([*by_brokers, *others]), OffsetSpec.max_timestamp(), "the newest time on")
        now = REAL.now() / 1e6

        def latest(chosen: Iterable[TopicFacts]) -> float | None:
            names = {t.full for t in chosen}
            times = [millis for (topic, _), (_, millis) in newest.items() if topic in names and millis > 0]
            return max(times) / 1000 - now if times else None

        each = {t.name: latest([t]) for t in others}
        return {
            "newest_of_brokers": latest(by_brokers),
            "newest_of_topics": {name: seconds for name, seconds in each.items() if seconds is not None},
        }

    def _reach(self, nodes: Sequence[Node]) -> dict[int, Reach]:
        with ThreadPoolExecutor(TOUCHED_AT_A_TIME) as pool:
            tried = pool.map(lambda n: self._touch(n.host, n.port), nodes)
            return {node.id: reach for node, reach in zip(nodes, tried, strict=True)}

    def _touch(self, host: str, port: int, *, connect: bool = True) -> Reach:
        """Whether an address can be used from here. Connecting is all that is done."""
        try:
            infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as e:
            return Reach(problem=f"the name cannot be resolved: {e.strerror or e}")
        addresses = tuple(dict.fromkeys(str(info[4][0]) for info in infos))
        loopback = all(a == "::1" or a.startswith(("127.", "::ffff:127.")) for a in addresses)
        problem = ""
        for address in addresses if connect else ():
            try:
                with socket.create_connection((address, port), TOUCH_SECONDS) as tried:
                    self._here.add(str(tried.getsockname()[0]))
                    return Reach(addresses, loopback=loopback)
            except OSError as e:
                problem = f"no connection to {address}: {e.strerror or e}"
        return Reach(addresses, problem, loopback)

    def _apis(self) -> dict[int, int]:
        """Which requests the brokers understand: the client tells that only to its debug log."""
        lines: list[str] = []
        logger = logging.Logger("unlost.kafka.versions")  # outside of the tree: nobody else hears it
        collector = logging.Handler()
        collector.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
        logger.addHandler(collector)
        client = AdminClient(self._settings.client(debug="feature", log_level=7), logger=logger)
        with contextlib.suppress(KafkaException):  # then there are no lines, and that is said below
            client.list_topics(timeout=VERSION_SECONDS)
        end = REAL.monotonic() + VERSION_SECONDS
        while REAL.monotonic() < end and not any("Broker API support" in line for line in lines):
            client.poll(0.05)
        client.poll(0.05)
        found = {}
        for line in lines:
            _, mark, rest = line.partition("ApiKey ")
            if mark and " Versions " in rest:
                name, versions = rest.split(" Versions ", 1)
                found[int(name.rpartition("(")[2].rstrip(")"))] = int(versions.rpartition("..")[2])
        if not found:
            self._skipped.append("the version of the brokers (the client did not tell which requests they understand)")
        return found

    def _ask(
        self, what: str, work: Callable[[], T], quiet: Sequence[str] = (), *, needed: bool = False
    ) -> T | None:  # fmt: skip
        """None if it cannot be had; then it is noted. `needed`: a service could not work without the right to it."""
        try:
            return work()
        except KafkaException as e:
            error = e.args[0]
            if error.name() in RIGHTS and needed:
                self._denied.append(what)
            elif error.name() not in quiet:
                self._skipped.append(f"{what}: {error.str()}")
            return None

    def _skip_all(self, what: str, failed: Mapping[str, Sequence[str]]) -> None:
        """One line for all that failed for the same reason."""
        for error, names in failed.items():
            more = f" and {len(names) - NAMED_MAX} more" if len(names) > NAMED_MAX else ""
            self._skipped.append(f"{what} {', '.join(names[:NAMED_MAX])}{more}: {error}")

    def _bare(self, name: str) -> str:
        return name[len(self._settings.prefix) :] if name.startswith(self._settings.prefix) else name


def _led(topics: Iterable[TopicFacts]) -> list[TopicPartition]:
    """Partitions that can answer."""
    return [TopicPartition(t.full, n) for t in topics for n, place in t.places.items() if place.leader is not None]


def _rights(operations: Iterable[Any] | None) -> frozenset[str]:
    return frozenset(operation.name for operation in operations or ())


def _split(server: str) -> tuple[str, int]:
    host, _, port = server.rpartition(":")
    return host.strip("[]"), int(port)
