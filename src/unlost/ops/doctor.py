"""`unlost doctor`: what could cost events, before it does. Reads a broker and the store beside it; changes neither."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from unlost import config
from unlost.app import App
from unlost.brokers.connect import examiner
from unlost.brokers.embedded.doctor import Registered, check_file, gather, library, look_at_file, registered
from unlost.brokers.findings import SEVERITIES, Examination, Finding, Ours, Severity
from unlost.brokers.port import Saved as Told
from unlost.config import hide_secrets
from unlost.delivery import note
from unlost.errors import Unavailable, UnlostError, UsageError
from unlost.events.topic import Unit
from unlost.ops.connect import NO_FILE, Looking, belongs_to
from unlost.ops.doctor_postgres import check_postgres
from unlost.ops.outbox import HELD_SECONDS, contradictions, status_of
from unlost.ops.verify import Said, Verified, nothing, verify_file, verify_log, verify_tables
from unlost.sqlite.backup import opened_anyway
from unlost.sqlite.file import File
from unlost.store import connect as stores
from unlost.store.port import Hold, Look, Records
from unlost.store.records import FileRecords
from unlost.store.services import decode
from unlost.world import REAL

STUCK_SECONDS = 60.0  # an outbox that a process empties is empty sooner
LOOPBACK = ("127.", "::1", "::ffff:127.")
SHOWN = 5
DAMAGES_SHOWN = 20
VERIFY = "UL1462"  # whether everything that is stored is what was written
MEND_FILE = "stop all processes, keep a copy of the folder, and restore the newest good copy (unlost store restore)"
MEND_SERVER = (
    "stop all services, keep a copy of the database, and restore the newest good one; pg_amcheck looks for more"
)
MEND_LOG = "look at the topic with Kafka's own tools; unlost audit names the events that are missing"
WHY_CLOSED = ("UL4601", "UL4604", "UL4605", "UL4606", "UL4607", "UL4608")  # each of these says why it cannot be opened


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
    """What the store's tables say."""

    path: str
    id: str
    broker: str | None
    units: Mapping[Unit, Saved]
    unsent: int
    oldest: int | None  # when the oldest unsent event was accepted, microseconds
    relay: bool  # whether a living process sends
    streams: Sequence[str] = ()  # what else sends
    refused: bool = False  # the broker has not taken the first of them for long
    contradictions: Sequence[str] = ()  # of the outbox's books
    numbered: bool = False  # it has books
    a_file: bool = True

    @property
    def services(self) -> dict[str, frozenset[str]]:
        found: dict[str, frozenset[str]] = {}
        for unit in self.units:
            found[unit.service] = found.get(unit.service, frozenset()) | {unit.topic}
        return found


def doctor(
    url: str | None = None,
    *,
    services: Collection[str] = (),
    app: App | None = None,
    verify: bool = False,
    said: Said = nothing,
) -> Diagnosis:
    """Examines the broker that `url`, the App or the settings name; of it what the App or the store uses, else all.
    `verify` also reads every row of log and store; `said` hears how far that is.

    Raises:
        Unavailable: the broker does not answer. UsageError: there is no such broker or service.
    """
    broker = config.setting("broker", flag=url, code=app.broker_url if app is not None else None)
    store = config.setting("store", code=app.store_url if app is not None else None)
    decoders = {} if app is None else app.decoders
    looking = Looking(broker, store, decoders)
    try:
        examine = _embedded if looking.embedded else _elsewhere
        return examine(looking, frozenset(services), app, said if verify else None)
    finally:
        looking.close()


def _embedded(looking: Looking, services: frozenset[str], app: App | None, verify: Said | None) -> Diagnosis:
    findings: list[Finding] = []
    found, chosen = Examination(title="embedded", findings=[]), ""
    opens = _broker_file(looking, findings)
    if opens is not None:
        found = examiner(looking.url).examine(Ours())
    sound = looking.postgres and _server(looking, findings)
    if opens is not None and verify is not None:
        found.findings[:] = [f for f in found.findings if f.code != "UL4510"]
        read = FileRecords(looking.file) if opens else looking.broker_path
        findings += _read_through(lambda: _verify_file(read, verify), looking.name)
    if opens:
        records = _tables(looking, findings) if sound or not looking.postgres else None
        if records is not None:
            findings += _holds(records)
        if records is not None and looking.elsewhere:
            findings.append(_others(looking))
        if records is not None and looking.postgres:
            store = read_store(records)
            if store.broker not in (None, looking.log.identity):
                findings.append(_another_broker(store, looking.log.identity))
            else:
                ours, chosen = _ours(services, app, store)
                _see_group(looking, found, ours)
                findings += check_store(store, found, REAL.now(), EMBEDDED)
            if verify is not None:
                findings += _read_through(lambda: verify_tables(records, said=verify), looking.place, MEND_SERVER)
    return _diagnosis(looking, found, chosen, [*findings, *found.findings])


def _broker_file(looking: Looking, findings: list[Finding]) -> bool | None:
    """Whether it opens; None: there is none yet, which matters only where it is the store as well."""
    before = registered(looking.broker_path)
    try:
        _ = looking.file
    except UsageError as e:
        if not looking.postgres or e.code != NO_FILE:
            raise
        findings.append(
            Finding(
                severity="note", code="UL4401", what="there is no broker file yet: what only it can tell was not checked",
                evidence=looking.name, fix="start a service, or name the one that they use with UNLOST_BROKER",
            )
        )  # fmt: skip
        return None
    except UnlostError as e:
        findings.append(_cannot_open(e))
        return False
    findings.append(_ok("UL4401", f"{looking.broker_path} opens, with all that was acknowledged"))
    findings += _look_into(looking.file, before)
    return True


def _look_into(file: File, before: Sequence[Registered]) -> list[Finding]:
    try:
        return check_file(gather(file, before))
    except UnlostError as e:
        return [_cannot_open(e)]


def _see_group(looking: Looking, found: Examination, ours: Ours) -> None:
    """What the embedded broker was told of the store's progress."""
    found.topics = {t.name: t for t in looking.log.topics() if ours.topics is None or t.name in ours.topics}
    found.services = sorted(ours.services or ())

    def work(look: Look) -> None:
        for service, topic, partition, position, text in look.execute(
            "select service, topic, partition, position, note from unlost_follower"
        ):
            if service in found.services:
                found.saved[service][Unit(service, topic, partition)] = Told(position, text)

    found.saved = {service: {} for service in found.services}
    looking.file.read(work)


def _elsewhere(looking: Looking, services: frozenset[str], app: App | None, verify: Said | None) -> Diagnosis:
    doctor = examiner(looking.url)
    try:
        identity = doctor.open()
        findings: list[Finding] = []
        before = [] if looking.postgres else registered(looking.store_path)
        records = _store(looking, findings)
        store = None if records is None else read_store(records)
        if store is not None and store.broker not in (None, identity):
            findings.append(_another_broker(store, identity))
            records = store = None
        ours, chosen = _ours(services, app, store)
        examination = doctor.examine(ours)
        if records is not None:  # once more: a service that runs has gone on, and the group must not seem to be ahead
            findings += [*check_store(read_store(records), examination, REAL.now()), *_holds(records)]
        if isinstance(records, FileRecords):
            findings += _look_into(records.file, before)
        if verify is not None:
            findings += _verify_elsewhere(looking, records, ours.topics, verify)
        if not looking.postgres and looking.store_path.exists():
            findings += [*library(), *look_at_file(looking.store_path)]
        return _diagnosis(looking, examination, chosen, [*examination.findings, *findings])
    finally:
        doctor.close()


def _verify_elsewhere(
    looking: Looking, records: Records | None, topics: Collection[str] | None, said: Said
) -> Iterator[Finding]:
    """The log is read through its port, the store by what it is."""
    yield from _read_through(lambda: verify_log(looking.log, topics, said=said), looking.name, MEND_LOG)
    if isinstance(records, FileRecords):
        yield from _read_through(lambda: _verify_file(records, said), looking.place)
    elif not looking.postgres and looking.store_path.exists():
        yield from _read_through(lambda: _verify_file(looking.store_path, said), looking.place)
    elif records is not None:
        yield from _read_through(lambda: verify_tables(records, said=said), looking.place, MEND_SERVER)


def _verify_file(where: FileRecords | Path, said: Said) -> Verified:
    """A path: of a file that cannot be opened as it should."""
    if isinstance(where, FileRecords):
        return verify_file(where, said=said)
    with opened_anyway(where) as what_is_left:
        return verify_file(what_is_left, said=said)


def _read_through(read: Callable[[], Verified], place: str, mend: str = MEND_FILE) -> Iterator[Finding]:
    """A finding for each of the first damaged places."""
    try:
        found = read()
    except UnlostError as e:
        yield Finding(
            severity="warning" if isinstance(e, Unavailable) else "error", code=VERIFY, what=f"{place} could not be read to its end: {e.what} ({e.code})", evidence=e.found, fix=e.fix,
        )  # fmt: skip
        return
    for d in found.damages[:DAMAGES_SHOWN]:
        yield Finding(
            severity=d.severity, code=VERIFY, what=f"{d.place or d.table} {'' if d.place else 'are damaged: '}{d.what}", evidence=f"{d.table} in {place}",
            fix=mend if d.severity == "error" else "unlost tail and unlost trace show what stands there",
        )  # fmt: skip
    more = found.more + max(0, len(found.damages) - DAMAGES_SHOWN)
    rows = ", ".join(f"{name} {number:,}" for name, number in sorted(found.rows.items()) if number)
    if more:
        yield Finding(
            severity="error" if any(d.severity == "error" for d in found.damages) else "warning", code=VERIFY,
            what=f"{more:,} more places in {place} are not named here", fix="unlost audit names the events that are missing",
        )  # fmt: skip
    if found.empty:
        yield Finding(
            severity="note", code=VERIFY, what=f"{found.empty:,} positions of the log hold no event",
            evidence="markers of transactions, compacted, or unreadable to this client", fix="unlost audit tells which of them a service has passed",
        )  # fmt: skip
    if not found.damages:
        yield _ok(VERIFY, f"everything in {place} was read, and is what was written", rows or "there are no rows")


def _diagnosis(looking: Looking, examination: Examination, chosen: str, findings: Sequence[Finding]) -> Diagnosis:
    return Diagnosis(
        broker=hide_secrets(looking.name), title=examination.title, chosen=chosen, topics=sorted(examination.topics),
        services=examination.services, store=looking.place,
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


def _store(looking: Looking, findings: list[Finding]) -> Records | None:
    """The store of a broker that keeps its log elsewhere."""
    if looking.postgres:
        return _tables(looking, findings) if _server(looking, findings) else None
    try:
        records = looking.store
    except UnlostError as e:
        findings.append(_cannot_open(e))
        return None
    if records is None:
        findings.append(
            Finding(
                severity="note",
                code="UL4401",
                what="there is no store yet: what only it can tell was not checked",
                evidence=looking.place,
                fix="name the one that the services use with UNLOST_STORE, or start a service",
            )
        )  # fmt: skip
    else:
        findings.append(_ok("UL4401", f"{looking.place} opens, with all that was acknowledged"))
    return records


def _server(looking: Looking, findings: list[Finding]) -> bool:
    """Looks PostgreSQL over; whether its tables can be asked as well. What is wrong with it says more than that they
    cannot be opened."""
    try:
        found = check_postgres(stores.examine(looking.store_url))
    except UnlostError as e:
        findings.append(_cannot_open(e, worst="error"))
        return False
    findings += found
    return not any(f.severity == "error" and f.code in WHY_CLOSED for f in found)


def _tables(looking: Looking, findings: list[Finding]) -> Records | None:
    try:
        records = looking.records
    except UnlostError as e:
        findings.append(_cannot_open(e, worst="error"))
        return None
    if looking.postgres:
        findings.append(_ok("UL4401", f"{looking.place} can be looked at"))
    return records


def read_store(records: Records) -> StoreFacts:
    def work(look: Look) -> StoreFacts:
        rows = look.execute(
            "select service, topic, partition, topic_id, start, position from unlost_progress"
        ).fetchall()
        outbox = status_of(records, look)
        ended = {name for name, hold in _held(look).items() if hold.state == "retired"}
        return StoreFacts(
            path=records.place, id=records.id, broker=belongs_to(records), unsent=outbox.events + outbox.copies,
            oldest=outbox.oldest, units={Unit(*row[:3]): Saved(*row[3:]) for row in rows if row[0] not in ended}, relay=bool(outbox.relays),
            streams=outbox.streams, refused=outbox.refused, contradictions=list(contradictions(outbox)), numbered=bool(outbox.books),
            a_file=isinstance(records, FileRecords),
        )  # fmt: skip

    return records.read(work)


def _held(look: Look) -> dict[str, Hold]:
    rows = look.execute("select name, hold from unlost_service where hold is not null order by name")
    return {name: hold for name, text in rows if (hold := decode(text)) is not None}


def _holds(records: Records) -> Iterator[Finding]:
    """Services that do nothing because an operator has said so."""
    for name, hold in records.read(_held).items():
        if hold.state != "renamed":
            yield Finding(
                severity="note", code="UL4304", what=f"the service {name} is {hold.state}: its handlers get nothing", evidence=hold.said,
                fix=f"unlost service resume {name}, when it is to work again",
            )  # fmt: skip


class Words(NamedTuple):
    """How the copy of the positions is called that the broker keeps."""

    who: str
    told: str
    note: str
    loses: str
    forgotten: str
    keep: str
    forget: str


KAFKA = Words(
    "the cluster", "the group", "the group's note", "the service goes on from its store, but lag monitors and Kafka's tools see none",
    "the group was deleted, or empty for longer than offsets.retention.minutes", "; then keep it running, or raise offsets.retention.minutes",
    "delete the group on the cluster (kafka-consumer-groups.sh --delete --group …)",
)  # fmt: skip
EMBEDDED = Words(
    "the broker's file", "the broker's file", "its note", "a retention may remove events of it unread",
    "somebody has removed rows of unlost_follower", "", "give the service another name",
)  # fmt: skip


def check_store(store: StoreFacts, seen: Examination, now: int, words: Words = KAFKA) -> list[Finding]:
    """The store against what was seen of the broker. `now` in microseconds."""
    return [
        _ok("UL4402", "the store belongs to this broker", store.broker or "no service has run on it yet"),
        *_topics(store, seen), *_positions(store, seen, words), *_notes(store, seen, words), *_hosts(store, seen), *_outbox(store, now),
        *_numbers(store),
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
                evidence="partitions of the broker's topic against unlost_progress in the store",
                fix="make a topic with the old number and move the events, or give the service a new name",
            )  # fmt: skip
    if not bad and units:
        yield _ok(
            "UL4403", "the topics are those that the store has positions on", "their ids and numbers of partitions"
        )


def _positions(store: StoreFacts, seen: Examination, words: Words) -> Iterator[Finding]:
    """Only of groups that could be read, and that nobody is about to acknowledge for."""
    for service, saved in seen.saved.items():
        handled = [u for u, s in store.units.items() if u.service == service and s.position > s.start]
        gone = sorted(u for u in handled if u not in saved and u.topic in seen.topics)
        if gone and not seen.members.get(service):
            yield Finding(
                severity="warning", code="UL4405", what=f"{words.who} has forgotten positions of {service}; {words.loses}",
                evidence=f"no committed offset for {_named(gone)}: {words.forgotten}",
                fix=f"unlost run --service {service} saves them again{words.keep}",
            )  # fmt: skip
        elif handled and not gone:
            yield _ok("UL4405", f"{words.who} knows the positions of {service}", f"{len(saved)} committed offsets")


def _notes(store: StoreFacts, seen: Examination, words: Words) -> Iterator[Finding]:
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
                evidence=f"{words.note} on {_named(foreign)} is of store {theirs.store} (position {theirs.position}), "
                f"{store.path} is {store.id}",
                fix=f"point UNLOST_STORE at the store that the other processes use; if it is gone for good, {words.forget}, "
                "and everything is handled again",
            )  # fmt: skip
        if ahead:
            yield Finding(
                severity="error", code="UL4407", what=f"the store is older than what it had saved of {service}",
                evidence=f"{_named(ahead)}: it is at {store.units[ahead[0]].position}, {words.told} was told {notes[ahead[0]].position}",
                fix=f"was an old backup restored? Bring the newest copy back. If there is none, {words.forget}, and what came "
                "after the backup is handled again",
            )  # fmt: skip
        if notes and not foreign and not ahead:
            yield _ok(
                "UL4406", f"the progress of {service} is kept in this store", f"the notes beside {len(notes)} positions"
            )


def _hosts(store: StoreFacts, seen: Examination) -> Iterator[Finding]:
    """A store in a file serves one machine. Addresses are those that the brokers see."""
    for service, hosts in seen.members.items() if store.a_file else ():
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
    place = "unlost_outbox" if store.a_file else "unlost_outbox and unlost_copy"
    rows = "1 row" if store.unsent == 1 else f"{store.unsent:,} rows"
    evidence = f"{rows} in {place}, the oldest is {age:,.0f} s old"
    if not store.relay and store.streams:
        yield Finding(
            severity="note", code="UL4409", what="events stand in the outbox, and something else than our relay reads it; what that has sent is "
            "not known here", evidence=f"{evidence}; active replication slots: {', '.join(store.streams)}",
            fix="with Debezium: delete old rows now and then; what has arrived, unlost audit counts",
        )  # fmt: skip
    elif not store.relay:
        yield Finding(
            severity="error", code="UL4409", what="accepted events wait in the outbox, and no process sends them",
            evidence=f"{evidence}; no living process has the relay", fix="unlost run: any process of this store sends them",
        )  # fmt: skip
    elif age > STUCK_SECONDS:
        refused = f"; the first in hands is not confirmed for {HELD_SECONDS:g} s" if store.refused else ""
        yield Finding(
            severity="warning", code="UL4409", what="events wait in the outbox for long, though a process sends them", evidence=evidence + refused,
            fix="look at the log of the running service: does the cluster refuse one of them (size, rights, copies in sync)?",
        )  # fmt: skip
    else:
        yield _ok("UL4409", "the outbox is being emptied", evidence)


def _numbers(store: StoreFacts) -> Iterator[Finding]:
    for text in store.contradictions[:SHOWN]:
        yield Finding(
            severity="error", code="UL4410", what="the books of the outbox do not balance: events may never have reached the broker",
            evidence=text, fix="did somebody delete rows of unlost_outbox, or restore a part of the database? Bring the newest whole copy back",
        )  # fmt: skip
    if store.numbered and not store.contradictions:
        yield _ok(
            "UL4410",
            "the books of the outbox balance",
            "each number that was given is confirmed, or in a relay's hands",
        )


def _others(looking: Looking) -> Finding:
    return Finding(
        severity="note", code="UL4401", what="services of this broker whose progress is in another store were not checked",
        evidence=", ".join(looking.elsewhere), fix="run it again with the UNLOST_STORE of each",
    )  # fmt: skip


def _another_broker(store: StoreFacts, identity: str) -> Finding:
    return Finding(
        severity="error", code="UL4402", what="the store belongs to another broker: services will not start with it",
        evidence=f"{store.path} was used with {store.broker}, this is {identity}",
        fix="name the broker that it was used with (--broker), or give this one its own store (UNLOST_STORE)",
    )  # fmt: skip


def _cannot_open(e: UnlostError, worst: Severity = "warning") -> Finding:
    """A file that another program holds for a moment is no error; a server that does not answer stops the services."""
    severity: Severity = worst if isinstance(e, Unavailable) else "error"
    return Finding(
        severity=severity, code="UL4401", what=f"the store cannot be looked at: {e.what} ({e.code})", evidence=e.found,
        fix=e.fix,
    )  # fmt: skip


def _ok(code: str, what: str, evidence: str = "") -> Finding:
    return Finding(severity="ok", code=code, what=what, evidence=evidence)


def _named(units: Sequence[Unit]) -> str:
    shown = ", ".join(f"{u.topic}/{u.partition}" for u in units[:SHOWN])
    return shown + (f" and {len(units) - SHOWN} more" if len(units) > SHOWN else "")
