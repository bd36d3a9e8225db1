"""`unlost doctor`: what could cost events, before it does. Reads a broker and the store beside it; changes neither."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import apsw
import msgspec

from unlost import config
from unlost.app import App
from unlost.brokers.connect import embedded_path, examiner, is_kafka
from unlost.brokers.embedded.doctor import library, look_at_file
from unlost.brokers.findings import SEVERITIES, Examination, Finding, Ours, Severity
from unlost.config import hide_secrets
from unlost.delivery import note
from unlost.errors import Unavailable, UnlostError, UsageError
from unlost.events.topic import Unit
from unlost.ops.connect import Looking, belongs_to
from unlost.sqlite.file import File
from unlost.sqlite.process import examine
from unlost.store.connect import store_path
from unlost.world import REAL

STUCK_SECONDS = 60.0  # an outbox that a process empties is empty sooner
LOOPBACK = ("127.", "::1", "::ffff:127.")
SHOWN = 5


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True):
    """Findings, the worst first; `chosen` says how the topics and services were chosen."""

    broker: str
    title: str
    store: str
    chosen: str
    topics: Sequence[str]
    services: Sequence[str]
    findings: Sequence[Finding]

    def count(self, severity: str) -> int:
        return sum(f.severity == severity for f in self.findings)


class Saved(NamedTuple):
    """A unit of progress, as the store has it."""

    topic_id: str
    start: int
    position: int


class StoreFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What the store's file says."""

    path: str
    id: str
    broker: str | None
    units: Mapping[Unit, Saved]
    unsent: int
    oldest: int | None  # when the oldest unsent event was accepted, microseconds
    relay: bool  # whether a living process sends

    @property
    def services(self) -> dict[str, frozenset[str]]:
        found: dict[str, frozenset[str]] = {}
        for unit in self.units:
            found[unit.service] = found.get(unit.service, frozenset()) | {unit.topic}
        return found


def doctor(url: str | None = None, *, services: Collection[str] = (), app: App | None = None) -> Diagnosis:
    """Examines the broker that `url`, the App or the settings name; of it what the App or the store uses, else all.

    Raises:
        Unavailable: the broker does not answer. UsageError: there is no such broker or service.
    """
    setting = config.setting("broker", flag=url, code=app.broker_url if app is not None else None)
    if is_kafka(setting.value):
        stored = config.setting("store", code=app.store_url if app is not None else None)
        looking = Looking(setting.value, store_path(stored.value), stored.source)
    else:
        looking = Looking(setting.value, embedded_path(setting.value), setting.source)
    try:
        return _embedded(looking) if looking.embedded else _elsewhere(looking, frozenset(services), app)
    finally:
        looking.close()


def _embedded(looking: Looking) -> Diagnosis:
    try:
        _ = looking.file
        opens = _ok("UL4401", f"{looking.path} opens, with all that was acknowledged")
    except UsageError:
        raise
    except UnlostError as e:
        opens = _cannot_open(e)
    found = examiner(looking.url).examine(Ours())
    return _diagnosis(looking, found, "", [opens, *found.findings])


def _elsewhere(looking: Looking, services: frozenset[str], app: App | None) -> Diagnosis:
    doctor = examiner(looking.url)
    try:
        identity = doctor.open()
        findings: list[Finding] = []
        file = _store(looking, findings)
        store = None if file is None else read_store(file)
        if store is not None and store.broker not in (None, identity):
            findings.append(_another_broker(store, identity))
            file = store = None
        ours, chosen = _ours(services, app, store)
        examination = doctor.examine(ours)
        if file is not None:  # once more: a service that runs has gone on, and the group must not seem to be ahead
            findings += check_store(read_store(file), examination, REAL.now())
        if looking.path.exists():
            findings += [*library(), *look_at_file(looking.path)]
        return _diagnosis(looking, examination, chosen, [*examination.findings, *findings])
    finally:
        doctor.close()


def _diagnosis(looking: Looking, examination: Examination, chosen: str, findings: Sequence[Finding]) -> Diagnosis:
    return Diagnosis(
        broker=hide_secrets(looking.name), title=examination.title, chosen=chosen, topics=sorted(examination.topics),
        services=examination.services, store=str(looking.path),
        findings=sorted(findings, key=lambda f: (SEVERITIES.index(f.severity), f.code)),
    )  # fmt: skip


def _ours(services: frozenset[str], app: App | None, store: StoreFacts | None) -> tuple[Ours, str]:
    """Which topics and services are looked at: those of the App, else those of the store, else all that are there."""
    positions = {} if store is None else {unit: saved.position for unit, saved in store.units.items()}
    known: Mapping[str, frozenset[str]] | None = None
    more: frozenset[str] = frozenset()
    chosen = "all under the prefix of the broker's URL"
    if app is not None:
        known = {s.name: frozenset(s.topics) for s in app.services}
        more, chosen = frozenset(app.topics), "those of the App"
        if unknown := services - set(known):
            raise UsageError(
                "UL1331", f"the App has no service {min(unknown)!r}", found=", ".join(sorted(known)) or "none"
            )
    elif store is not None and store.units:
        known, chosen = store.services, "those of the store"
    if services:
        chosen = "those named with --service"
        known = {name: (known or {}).get(name, frozenset()) for name in services}
        positions = {unit: at for unit, at in positions.items() if unit.service in services}
        more = frozenset()
    topics = None if known is None else more | {topic for read in known.values() for topic in read}
    declared = {} if app is None else {name: t for name, t in app.topics.items() if topics is None or name in topics}
    ours = Ours(
        topics=topics or None, services=known, declared=declared,
        positions={unit: at for unit, at in positions.items() if topics is None or unit.topic in topics},
        survives="process death" if app is None else app._survives,
    )  # fmt: skip
    return ours, chosen


# --- the store -------------------------------------------------------------------------------------------


def _store(looking: Looking, findings: list[Finding]) -> File | None:
    try:
        file = looking.store
    except UnlostError as e:
        findings.append(_cannot_open(e))
        return None
    if file is None:
        findings.append(
            Finding(
                severity="note",
                code="UL4401",
                what="there is no store yet: what only it can tell was not checked",
                evidence=str(looking.path),
                fix="name the one that the services use with UNLOST_STORE, or start a service",
            )
        )  # fmt: skip
    else:
        findings.append(_ok("UL4401", f"{looking.path} opens, with all that was acknowledged"))
    return file


def read_store(file: File) -> StoreFacts:
    def work(c: apsw.Connection) -> StoreFacts:
        rows = c.execute("select service, topic, partition, topic_id, start, position from unlost_progress").fetchall()
        unsent, oldest = c.execute("select count(*), min(added) from unlost_outbox").fetchone()
        relay = c.execute("select process from unlost_relay").fetchone()
        return StoreFacts(
            path=str(file.path), id=file.store_id, broker=belongs_to(file), unsent=unsent, oldest=oldest,
            units={Unit(*row[:3]): Saved(*row[3:]) for row in rows},
            relay=relay is not None and relay[0] is not None and examine(file.run_folder, relay[0]).alive,
        )  # fmt: skip

    return file.read(work)


def check_store(store: StoreFacts, seen: Examination, now: int) -> list[Finding]:
    """The store against what was seen of the broker. `now` in microseconds."""
    return [
        _ok("UL4402", "the store belongs to this broker", store.broker or "no service has run on it yet"),
        *_topics(store, seen), *_positions(store, seen), *_notes(store, seen), *_hosts(store, seen), *_outbox(store, now),
    ]  # fmt: skip


def _topics(store: StoreFacts, seen: Examination) -> Iterator[Finding]:
    units: dict[tuple[str, str], list[str]] = {}
    for unit, saved in store.units.items():
        units.setdefault((unit.service, unit.topic), []).append(saved.topic_id)
    bad = False
    for (service, name), ids in sorted(units.items()):
        topic = seen.topics.get(name)
        if topic is None or service not in seen.services:
            continue
        if topic.id and ids[0] != topic.id:
            bad = True
            yield Finding(
                severity="error", code="UL4403", what=f"the topic {name} was deleted and made again: the positions of {service} are those of "
                "the old one, and the service will not start",
                evidence=f"its id is {topic.id}, the store has {ids[0]}",
                fix="bring the old topic back if it can be had; else give the service a new name: it then begins at the first event",
            )  # fmt: skip
        elif len(ids) != topic.partitions:
            bad = True
            yield Finding(
                severity="error", code="UL4404", what=f"the topic {name} has {topic.partitions} partitions now, {service} has its positions on "
                f"{len(ids)}: keys have moved, and the service will not start",
                evidence="partitions on the cluster against unlost_progress in the store",
                fix="make a topic with the old number and move the events, or give the service a new name",
            )  # fmt: skip
    if not bad and units:
        yield _ok(
            "UL4403", "the topics are those that the store has positions on", "their ids and numbers of partitions"
        )


def _positions(store: StoreFacts, seen: Examination) -> Iterator[Finding]:
    """Only of groups that could be read, and that nobody is about to acknowledge for."""
    for service, saved in seen.saved.items():
        handled = [u for u, s in store.units.items() if u.service == service and s.position > s.start]
        gone = sorted(u for u in handled if u not in saved and u.topic in seen.topics)
        if gone and not seen.members.get(service):
            yield Finding(
                severity="warning", code="UL4405", what=f"the cluster has forgotten positions of {service}; the service goes on from its store, "
                "but lag monitors and Kafka's tools see none",
                evidence=f"no committed offset for {_named(gone)}: the group was deleted, or empty for longer than offsets.retention.minutes",
                fix=f"unlost run --service {service} saves them again; then keep it running, or raise offsets.retention.minutes",
            )  # fmt: skip
        elif handled and not gone:
            yield _ok("UL4405", f"the cluster knows the positions of {service}", f"{len(saved)} committed offsets")


def _notes(store: StoreFacts, seen: Examination) -> Iterator[Finding]:
    for service, saved in seen.saved.items():
        notes = {unit: found for unit, s in saved.items() if (found := note.decode(s.note)) is not None}
        foreign = sorted(unit for unit, found in notes.items() if found.store != store.id)
        ahead = sorted(
            unit for unit, found in notes.items()
            if found.store == store.id and unit in store.units and found.position > store.units[unit].position
        )  # fmt: skip
        if foreign:
            theirs = notes[foreign[0]]
            yield Finding(
                severity="error", code="UL4406", what=f"the progress of {service} is kept in another store: with this one it will not start",
                evidence=f"the group's note on {_named(foreign)} is of store {theirs.store} (position {theirs.position}), "
                f"{store.path} is {store.id}",
                fix="point UNLOST_STORE at the store that the other processes use; if it is gone for good, delete the group on the cluster "
                "(kafka-consumer-groups.sh --delete --group …), and everything is handled again",
            )  # fmt: skip
        if ahead:
            yield Finding(
                severity="error", code="UL4407", what=f"the store is older than what it had saved of {service}",
                evidence=f"{_named(ahead)}: it is at {store.units[ahead[0]].position}, the group was told {notes[ahead[0]].position}",
                fix="was an old backup restored? Bring the newest copy back. If there is none, delete the group on the cluster, and what came "
                "after the backup is handled again",
            )  # fmt: skip
        if notes and not foreign and not ahead:
            yield _ok(
                "UL4406", f"the progress of {service} is kept in this store", f"the notes beside {len(notes)} positions"
            )


def _hosts(store: StoreFacts, seen: Examination) -> Iterator[Finding]:
    """A store in a file serves one machine. Addresses are those that the brokers see."""
    for service, hosts in seen.members.items():
        here = {host for host in hosts if host in seen.here or host.startswith(LOOPBACK)}
        others = sorted(set(hosts) - here)
        if others:
            yield Finding(
                severity="warning", code="UL4408", what=f"{service} runs on other machines too, and its store is a file on this one",
                evidence=f"members from {', '.join(others)}; {store.path}",
                fix="run all processes of a service on the machine that has the store (several containers that share its folder are "
                "one machine); another store than this one is refused",
            )  # fmt: skip
        elif hosts:
            yield _ok("UL4408", f"all members of {service} run on this machine", ", ".join(sorted(here)))


def _outbox(store: StoreFacts, now: int) -> Iterator[Finding]:
    if not store.unsent or store.oldest is None:
        yield _ok("UL4409", "the outbox is empty", store.path)
        return
    age = max(0.0, (now - store.oldest) / 1e6)
    rows = "1 row" if store.unsent == 1 else f"{store.unsent:,} rows"
    evidence = f"{rows} in unlost_outbox, the oldest is {age:,.0f} s old"
    if not store.relay:
        yield Finding(
            severity="error", code="UL4409", what="events that handlers published wait in the outbox, and no process sends them",
            evidence=f"{evidence}; no living process has the relay", fix="unlost run: any process of this store sends them",
        )  # fmt: skip
    elif age > STUCK_SECONDS:
        yield Finding(
            severity="warning", code="UL4409", what="events wait in the outbox for long, though a process sends them", evidence=evidence,
            fix="look at the log of the running service: does the cluster refuse one of them (size, rights, copies in sync)?",
        )  # fmt: skip
    else:
        yield _ok("UL4409", "the outbox is being emptied", evidence)


def _another_broker(store: StoreFacts, identity: str) -> Finding:
    return Finding(
        severity="error", code="UL4402", what="the store belongs to another broker: services will not start with it",
        evidence=f"{store.path} was used with {store.broker}, this is {identity}",
        fix="name the broker that it was used with (--broker), or give this one its own store (UNLOST_STORE)",
    )  # fmt: skip


def _cannot_open(e: UnlostError) -> Finding:
    severity: Severity = "warning" if isinstance(e, Unavailable) else "error"
    return Finding(
        severity=severity, code="UL4401", what=f"the store cannot be looked at: {e.what} ({e.code})", evidence=e.found,
        fix=e.fix,
    )  # fmt: skip


def _ok(code: str, what: str, evidence: str = "") -> Finding:
    return Finding(severity="ok", code=code, what=what, evidence=evidence)


def _named(units: Sequence[Unit]) -> str:
    shown = ", ".join(f"{u.topic}/{u.partition}" for u in units[:SHOWN])
    return shown + (f" and {len(units) - SHOWN} more" if len(units) > SHOWN else "")
