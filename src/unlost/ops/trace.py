"""One flow of events: what caused what, and where each branch of it stands. From the log and the store alone.

Events carry their cause and their correlation (see `events/envelope.py`), so a flow is all events of one correlation.
Finding it looks at the log twice: once for what was asked for, once for the flows that this belongs to. A log that keeps
an index (`Findable`) names the events to be read; another is read from beginning to end. What is neither listed nor proved
(was an event done, or skipped?) is called so, and never guessed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from unlost.brokers.port import Find, Findable, Log, Place
from unlost.errors import Unavailable, UnlostError, UsageError
from unlost.events import Envelope
from unlost.events.topic import Arrival, TopicInfo, Unit
from unlost.ops.connect import ELSEWHERE, Looking
from unlost.ops.shelf import event_of
from unlost.ops.tail import OWN
from unlost.store.port import Attempt, DeadLetter, Look, Process, Records
from unlost.store.postgres.rows import id_bytes, source_text
from unlost.store.progress import Runs
from unlost.store.records import FileRecords
from unlost.world import rfc3339

if TYPE_CHECKING:
    from unlost.delivery.service import Service

FLOWS = 10
FLOWS_MAX = 100
EVENTS_MAX = 1000  # of one flow
PART_MIN = 6  # characters of an id that say which one is meant
NAMED_MAX = 8
PAGE = 500  # events in one look at the log
NEAR = 16  # positions between two events up to which reading all of them is faster than reading twice
ROWS_MAX = 100  # in one statement
_NO_LOG = 2**63 - 1  # of a topic that is gone, the log holds nothing below this

UNSURE = "done or skipped"
_When = tuple[int, tuple[str, int, int]]
FlowId = str | tuple[str, int, int]  # the correlation id; of what is no event its place

_attempts = msgspec.json.Decoder(list[Attempt]).decode
_attempt_map = msgspec.json.Decoder(dict[int, list[Attempt]]).decode


class Branch(msgspec.Struct, frozen=True, kw_only=True):
    """Where an event stands for one service. `state` is one of the books (`skipped(rule)` with its rule), or

    - `done or skipped`: it has an outcome that is counted and not listed, and nothing proves which of the two;
    - `before its start`: the service began behind it; `unaccounted`: it should have an outcome and has none;
    - `not known`: the saved progress is about another topic of this name.

    Times in microseconds since 1970. Attempts of events that are done are not kept.
    """

    service: str
    state: str
    why: str = ""
    since: int | None = None
    due: int | None = None
    attempts: Sequence[Attempt] = ()
    letter: int | None = None  # its number on the shelf
    reason: str = ""
    error: str = ""


class Traced(msgspec.Struct, kw_only=True):
    """An event of a flow, without its data. `id` is empty where its bytes are no event; `problem` says why."""

    topic: str
    partition: int
    position: int
    recorded: int  # microseconds since 1970
    key: bytes | None
    id: str = ""
    source: str = ""
    type: str = ""
    time: str = ""
    correlation: str | None = None
    cause: str | None = None
    problem: str = ""
    in_log: bool = True  # False: the log let go of it, and the store still keeps it
    meant: bool = False  # its id is the one that was asked for
    depth: int = 0  # events above it
    cause_found: bool = True  # False: the flow holds no event of that id
    branches: Sequence[Branch] = ()

    @property
    def place(self) -> tuple[str, int, int]:
        return self.topic, self.partition, self.position


class Flow(msgspec.Struct, frozen=True, kw_only=True):
    """Events of one correlation: each after its cause. `cut`: only the first EVENTS_MAX are here."""

    id: str
    events: Sequence[Traced]
    cut: bool


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """What was found. `by` says what the text that was asked for is: `id`, `key`, `id and key`, `part of an id`."""

    asked: str
    by: str
    flows: Sequence[Flow]  # oldest first
    older: bool  # there are more flows, of which these are the newest
    topics: int
    events_read: int  # that the log holds
    outbox: int  # events that are accepted, and in no log yet
    unknown: str  # why nobody can say where the branches stand; empty: it is said


def trace(here: Looking, text: str, *, limit: int = FLOWS, services: Sequence[Service] | None = None) -> Trace:
    """The flows of an event id or a key, at most the newest `limit`. `services` is the code, where it is at hand: it
    says who has a handler.

    **Guarantee** nothing is changed but the index of the log, where it keeps one; what is found is the same with and
    without. Kept in memory is only what belongs to the flows that are shown. Where log and store are one file, all of it
    is of one moment; elsewhere the log is read first, so that an event may have gone on since.

    Raises:
        UsageError: nothing can be asked for like this, or log and store do not belong together. UnlostError: no event
        has this key or id. Damaged: an event does not match its checksum, or positions are missing. Unavailable: the
        broker does not answer.

    Example:
        >>> with opened("kafka://…") as here:  # doctest: +SKIP
        ...     [e.type for flow in trace(here, "order-1").flows for e in flow.events]
    """
    if not text:
        raise UsageError(
            "UL1351", "a trace begins with a key or an id", found="an empty text", fix="unlost trace order-1"
        )
    if not 1 <= limit <= FLOWS_MAX:
        raise UsageError("UL1352", f"a trace shows 1 to {FLOWS_MAX} flows", found=str(limit))
    records, unknown = _store_of(here)
    log = here.log
    with log.finder() if isinstance(log, Findable) else nullcontext() as find:
        return log.together(lambda: _trace(log, find, records, text, limit, services, unknown))


def _store_of(here: Looking) -> tuple[Records | None, str]:
    """The store, or why it cannot be asked; what the log says is worth something without it."""
    try:
        if here.store is None:
            return None, f"there is no store at {here.place}"
        return here.pair()[0], ""
    except Unavailable as e:
        if here.log_here:
            raise
        _ = here.log  # if it is the broker that does not answer, this says so
        return None, f"{e.what}: {e.found}"
    except UsageError as e:
        if e.code != ELSEWHERE:
            raise
        return None, f"{e.what}: {e.found}"


def _trace(
    log: Log,
    find: Find | None,
    records: Records | None,
    text: str,
    limit: int,
    services: Sequence[Service] | None,
    unknown: str,
) -> Trace:
    infos = log.topics([name for name in log.names() if not name.startswith(OWN)])
    kept = partial(_kept, records, infos)
    search = _Search(text, limit)
    if find is not None:
        count = sum(end - start for info in infos for start, end in info.ranges)
        search.look_at(_found(log, infos, find({text.encode()})), kept())
    if find is None or search.may_be_part:
        count = search.look_at(_everything(log, infos), kept())
    outbox = 0 if records is None else records.read(lambda look: records.accepted(look).events)
    found: dict[FlowId, list[Traced]] = {flow: [] for flow in search.chosen.flows()}
    cut = set[FlowId]()
    if found and find is None:
        cut = _collect(found, chain(_everything(log, infos), kept()), search)
    elif found and find is not None:
        named = find({flow.encode() for flow in found if isinstance(flow, str)})
        alone = (flow for flow in found if not isinstance(flow, str))
        cut = _collect(found, chain(_found(log, infos, chain(named, alone)), kept()), search)
    found = {flow: _tree(events) for flow, events in found.items() if events}  # some may have gone in between
    if not found:
        raise _not_found(text, infos, count, outbox, unknown)
    if records is not None:
        topics = {info.name: info for info in infos}
        records.read(lambda look: _Standing(records, look, topics, services).say(found.values()))
    flows = [
        Flow(id=flow if isinstance(flow, str) else "{}/{}:{}".format(*flow), events=events, cut=flow in cut)
        for flow, events in sorted(found.items(), key=lambda item: min(map(_order, item[1])))
    ]
    return Trace(
        asked=text, by=search.by, flows=flows, older=search.chosen.older, topics=len(infos), events_read=count,
        outbox=outbox, unknown=unknown,
    )  # fmt: skip


def _collect(found: dict[FlowId, list[Traced]], all: Iterable[Traced], search: _Search) -> set[FlowId]:
    """Puts the events of these flows in, by time; returns the flows of which only the first ones are kept."""
    cut = set()

    def shorten(flow: FlowId) -> None:
        if len(found[flow]) > EVENTS_MAX:
            cut.add(flow)
        found[flow] = sorted(found[flow], key=_order)[:EVENTS_MAX]

    for e in all:
        flow = _flow_of(e)
        if flow in found:
            e.meant = search.means(e)
            found[flow].append(e)
            if len(found[flow]) > 2 * EVENTS_MAX:
                shorten(flow)
    for flow in found:
        shorten(flow)
    return cut


def _not_found(text: str, infos: Sequence[TopicInfo], events: int, outbox: int, unknown: str) -> UnlostError:
    names = ", ".join(info.name for info in infos[:NAMED_MAX]) + (", …" if len(infos) > NAMED_MAX else "")
    found = f"{events:,} events searched, in the topics {names}" if infos else "the broker has no topics yet"
    if unknown:
        found += f"; no store was searched: {unknown}"
    elif outbox:
        found += f"; {outbox:,} more wait in the outbox, are in no log yet, and were not searched"
    return UnlostError(
        "UL1350", f"no event has the key or the id {text!r}", found=found,
        fix=f"unlost tail shows keys and ids; of an id its first or last {PART_MIN} characters will do",
    )  # fmt: skip


# --- finding the events ----------------------------------------------------------------------------------------


class _Newest:
    """The flows with the newest events that matched; at most twice as many as are wanted are held."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._last: dict[FlowId, _When] = {}  # its last event that matched
        self.older = False  # some were left out

    def note(self, e: Traced) -> None:
        flow = _flow_of(e)
        self._last[flow] = max(_order(e), self._last.get(flow, _order(e)))
        if len(self._last) > 2 * self._limit:
            self._shrink()

    def _shrink(self) -> None:
        newest = sorted(self._last.items(), key=lambda item: item[1], reverse=True)
        self.older = self.older or len(newest) > self._limit
        self._last = dict(newest[: self._limit])

    def flows(self) -> Sequence[FlowId]:
        self._shrink()
        return list(self._last)


class _Search:
    """Which flows are meant: those of this id or key; where there is none, those of ids that begin or end so."""

    def __init__(self, text: str, limit: int) -> None:
        self._text = text
        self._key = text.encode()
        self._part = text.removeprefix("…")  # as a shortened id is printed
        self._exact, self._similar = _Newest(limit), _Newest(limit)
        self._by: set[str] = set()

    def look_at(self, *all: Iterable[Traced]) -> int:
        """Returns how many of them the log holds."""
        count = 0
        for e in chain(*all):
            count += e.in_log
            self._look_at(e)
        return count

    @property
    def may_be_part(self) -> bool:
        """No id and no key is this, and the text is long enough for a part of an id."""
        return not self._by and len(self._part) >= PART_MIN

    def _look_at(self, e: Traced) -> None:
        is_id, is_key = self._text in (e.id, e.correlation), e.key == self._key
        self._by |= {"id"} if is_id else set()
        self._by |= {"key"} if is_key else set()
        if is_id or is_key:
            self._exact.note(e)
        elif not self._by and self._resembles(e):
            self._similar.note(e)

    def _resembles(self, e: Traced) -> bool:
        return len(self._part) >= PART_MIN and (e.id.startswith(self._part) or e.id.endswith(self._part))

    @property
    def by(self) -> str:
        return " and ".join(sorted(self._by)) or "part of an id"

    @property
    def chosen(self) -> _Newest:
        return self._exact if self._by else self._similar

    def means(self, e: Traced) -> bool:
        return e.id == self._text if self._by else self._resembles(e)


def _flow_of(e: Traced) -> FlowId:
    return e.correlation or e.id or e.place


def _everything(log: Log, infos: Sequence[TopicInfo]) -> Iterator[Traced]:
    """All events of the log as it was when its topics were looked up."""
    for info in infos:
        for partition, (start, end) in enumerate(info.ranges):
            at = start
            while at < end:
                arrivals = log.read(info.name, partition, at, min(PAGE, end - at))
                if not arrivals:
                    break
                for a in arrivals:
                    yield _arrived(info.name, partition, a)
                at = arrivals[-1].position + 1


def _found(log: Log, infos: Sequence[TopicInfo], places: Iterable[tuple[str, int, int]]) -> Iterator[Traced]:
    """The events at these places, as far as the log of these topics holds them. Those that stand near each other are read
    together, where they come in order."""
    ranges = {(info.name, n): bounds for info in infos for n, bounds in enumerate(info.ranges)}
    near: list[tuple[str, int, int]] = []

    def read() -> Iterator[Traced]:
        if near:
            topic, partition, first = near[0]
            wanted, last = {position for _, _, position in near}, near[-1][2]
            at = first
            while at <= last and (arrivals := log.read(topic, partition, at, last - at + 1)):
                for a in arrivals:
                    if a.position in wanted:
                        yield _arrived(topic, partition, a)
                at = arrivals[-1].position + 1
            near.clear()

    for place in places:
        start, end = ranges.get(place[:2], (0, 0))
        if start <= place[2] < end:
            if near and not (
                near[-1][:2] == place[:2] and 0 < place[2] - near[-1][2] <= NEAR and place[2] - near[0][2] < PAGE
            ):
                yield from read()
            near.append(place)
    yield from read()


def _arrived(topic: str, partition: int, a: Arrival) -> Traced:
    e = Traced(topic=topic, partition=partition, position=a.position, recorded=a.recorded, key=a.key, problem=a.problem)
    return _fill(e, a.envelope)


def _fill(e: Traced, envelope: Envelope | None) -> Traced:
    if envelope is not None:
        e.id, e.source, e.type, e.time = envelope.id, envelope.source, envelope.type, envelope.time
        e.correlation, e.cause = envelope.correlationid, envelope.causationid
    return e


def _kept(records: Records | None, infos: Sequence[TopicInfo]) -> Iterator[Traced]:
    """Dead letters and waiting events that the log does not hold any more."""
    if records is None:
        return
    begins = {(info.name, n): start for info in infos for n, (start, _) in enumerate(info.ranges)}
    for topic, partition in records.read(_kept_places):
        begin, at = begins.get((topic, partition), _NO_LOG), -1
        while begin > 0 and (
            page := records.read(partial(_kept_page, place=(topic, partition), after=at, before=begin))
        ):
            yield from page
            at = page[-1].position


def _kept_places(look: Look) -> list[tuple[str, int]]:
    sql = "select topic, partition from unlost_shelf union select topic, partition from unlost_waiting"
    return [(topic, partition) for topic, partition in look.execute(sql)]


def _kept_page(look: Look, *, place: Place, after: int, before: int) -> list[Traced]:
    """Each once, however many services keep it."""
    of_place = "where topic = ? and partition = ? and position > ? and position < ?"
    bounds = (*place, after, before)
    positions = look.execute(
        f"select position from unlost_shelf {of_place} union select position from unlost_waiting {of_place} "
        f"order by position limit {ROWS_MAX}",
        (*bounds, *bounds),
    ).fetchall()
    found = []
    for (position,) in positions:
        one = (*place, position)
        key, head, data, recorded = look.execute(
            "select key, head, data, recorded from unlost_shelf where topic = ? and partition = ? and position = ? union all "
            "select key, head, data, recorded from unlost_waiting where topic = ? and partition = ? and position = ? limit 1",
            (*one, *one),
        ).fetchone()
        found.append(_stored(*one, key, head, data, recorded))
    return found


def _stored(
    topic: str, partition: int, position: int, key: bytes | None, head: bytes, data: bytes | None, recorded: int
) -> Traced:
    as_letter = DeadLetter(  # the shelf knows how to read what the two keep
        number=0, service="", handler="", topic=topic, partition=partition, position=position, id="", source="", type="",
        key=key, trace=None, reason="", error_type="", error="", stack="", attempts=(), parks=False, parked_behind=0,
        died=0, recorded=recorded, head=bytes(head), data=data, request=None,
    )  # fmt: skip
    envelope = event_of(as_letter)
    problem = "" if envelope is not None else "its bytes are no event"
    e = Traced(
        topic=topic, partition=partition, position=position, recorded=recorded, key=key, problem=problem, in_log=False
    )
    return _fill(e, envelope)


# --- what caused what ------------------------------------------------------------------------------------------


def _order(e: Traced) -> _When:
    """By time; events of one batch have the same."""
    return e.recorded, e.place


def _tree(events: Sequence[Traced]) -> list[Traced]:
    """Each event after its cause, oldest first. Of events with one id the first is the cause; whoever says to be its
    own cause is shown at the top."""
    first: dict[str, Traced] = {}
    for e in events:
        if e.id:
            first.setdefault(e.id, e)
    effects: dict[tuple[str, int, int] | None, list[Traced]] = defaultdict(list)
    for e in events:
        cause = first.get(e.cause) if e.cause else None
        e.cause_found = not e.cause or cause is not None
        effects[None if cause is None else cause.place].append(e)
    shown: dict[tuple[str, int, int], Traced] = {}

    def show(roots: Sequence[Traced]) -> None:
        ahead = [(e, 0) for e in reversed(roots)]
        while ahead:
            e, depth = ahead.pop()
            if e.place not in shown:
                shown[e.place], e.depth = e, depth
                ahead += [(effect, depth + 1) for effect in reversed(effects[e.place])]

    show(effects[None])
    for e in events:
        if e.place not in shown:  # a circle: forged, or written by another program
            show([e])
    return list(shown.values())


# --- where each branch stands ----------------------------------------------------------------------------------


class _Saved(NamedTuple):
    """A unit of progress."""

    topic_id: str
    start: int
    position: int
    fated: Runs
    counts: dict[str, int]
    attempts: dict[int, list[Attempt]]  # of events that are retried in memory
    owner: Process | None
    read: int


_Place = tuple[Unit, int]  # and the position


class _Waits(NamedTuple):
    key: bytes | None
    due: int | None
    attempts: Sequence[Attempt]


class _Letter(NamedTuple):
    number: int
    reason: str
    error_type: str
    error: str
    attempts: Sequence[Attempt]
    parks: bool
    died: int
    request: str | None


class _Operation(NamedTuple):
    action: str
    operator: str
    reason: str
    at: int


class _Standing:
    """Looks up, from one snapshot of the store, where events stand."""

    def __init__(
        self, records: Records, look: Look, topics: Mapping[str, TopicInfo], services: Sequence[Service] | None
    ) -> None:
        self._records = records
        self._look = look
        self._topics = topics
        self._code = {service.name: service for service in services or ()}
        self._saved: dict[Unit, _Saved] = {}
        self._readers: dict[Place, list[str]] = defaultdict(list)
        self._listed: dict[_Place, tuple[str, int]] = {}  # state, since
        self._waiting: dict[_Place, _Waits] = {}
        self._shelf: dict[_Place, _Letter] = {}
        self._operations: dict[_Place, _Operation] = {}  # the last that was carried out
        self._gaps: dict[_Place, tuple[str, str]] = {}  # kind, why
        self._marks: set[tuple[str, str, str]] = set()  # service, source, id
        self._holders: dict[tuple[Unit, bytes | None], tuple[int, int] | None] = {}  # number and position on the shelf

    def say(self, flows: Iterable[Sequence[Traced]]) -> None:
        """Fills in the branches of each event."""
        flows = list(flows)
        places: dict[Place, list[Traced]] = defaultdict(list)
        for e in (e for events in flows for e in events):
            places[e.topic, e.partition].append(e)
        self._load(places)
        for place, found in places.items():
            for n in range(0, len(found), ROWS_MAX):
                self._list(place, found[n : n + ROWS_MAX])
        for events in flows:
            published = {(e.cause, e.source) for e in events}
            copies = Counter(e.id for e in events)
            for e in events:
                e.branches = [
                    self._branch(e, service, published, copies) for service in self._readers[e.topic, e.partition]
                ]

    # What is kept of the units, and of the events that are listed one by one.

    def _load(self, places: Iterable[Place]) -> None:
        wanted = set(places)
        processes = self._records.processes(self._look)
        for service, topic, partition, topic_id, start, position, fated, counts, attempts, owner in self._look.execute(
            "select service, topic, partition, topic_id, start, position, fated, counts, attempts, owner "
            "from unlost_progress order by service, topic, partition"
        ):
            if (topic, partition) not in wanted:
                continue
            unit, process = Unit(service, topic, partition), processes.get(owner)
            alive = process if process is not None and process.alive else None
            self._readers[topic, partition].append(service)
            self._saved[unit] = _Saved(
                topic_id, start, position, Runs.decode(bytes(fated)), msgspec.json.decode(counts, type=dict[str, int]),
                _attempt_map(attempts), alive, 0 if alive is None else alive.read.get(unit, 0),
            )  # fmt: skip

    def _list(self, place: Place, events: Sequence[Traced]) -> None:
        """Reads what is said of these events one by one."""
        positions = [e.position for e in events]
        where = f"topic = ? and partition = ? and position in ({', '.join('?' * len(positions))})"
        bindings = (*place, *positions)
        for service, position, state, since in self._look.execute(
            f"select service, position, state, since from unlost_ledger where {where}", bindings
        ):
            self._listed[Unit(service, *place), position] = state, since
        for service, position, key, due, history in self._look.execute(
            f"select service, position, key, due, history from unlost_waiting where {where}", bindings
        ):
            self._waiting[Unit(service, *place), position] = _Waits(key, due, _attempts(history))
        for service, position, number, reason, error_type, error, attempts, parks, died, request in self._look.execute(
            "select service, position, number, reason, error_type, error, attempts, parks, died, request "
            f"from unlost_shelf where {where}",
            bindings,
        ):
            self._shelf[Unit(service, *place), position] = _Letter(
                number, reason, error_type, error, _attempts(attempts), bool(parks), died, request
            )
        for service, position, action, operator, reason, at in self._look.execute(
            "select service, position, action, operator, reason, carried_out from unlost_operation "
            f"where {where} and carried_out is not null order by number",
            bindings,
        ):
            self._operations[Unit(service, *place), position] = _Operation(action, operator, reason, at)
        for service, start, end, kind, why in self._look.execute(
            'select service, start, "end", kind, why from unlost_gap where topic = ? and partition = ? and start <= ? and "end" > ?',
            (*place, max(positions), min(positions)),
        ):
            for position in positions:
                if start <= position < end:
                    self._gaps[Unit(service, *place), position] = kind, why
        self._read_marks(place, events)

    def _read_marks(self, place: Place, events: Sequence[Traced]) -> None:
        """The marks "handled" of services that keep some (effectively once)."""
        in_bytes = not isinstance(self._records, FileRecords)  # how a store in PostgreSQL writes ids and sources
        by_source: dict[str, list[str]] = defaultdict(list)
        for e in events:
            if e.id:
                by_source[e.source].append(e.id)
        for service in self._readers[place]:
            for source, ids in by_source.items():
                stored = {id_bytes(id) if in_bytes else id: id for id in ids}
                rows = self._look.execute(
                    "select id from unlost_inbox where service = ? and source = ? "
                    f"and id in ({', '.join('?' * len(stored))})",
                    (service, source_text(source) if in_bytes else source, *stored),
                )
                for (id,) in rows:
                    self._marks.add((service, source, stored[bytes(id) if in_bytes else id]))

    # What it means.

    def _branch(
        self, e: Traced, service: str, published: Collection[tuple[str | None, str]], copies: Mapping[str, int]
    ) -> Branch:
        unit = Unit(service, e.topic, e.partition)
        saved, place = self._saved[unit], (unit, e.position)
        info = self._topics.get(e.topic)
        if e.in_log and (info is None or info.id != saved.topic_id):
            why = "the topic was deleted and made again; the saved progress is about the one before"
            return Branch(service=service, state="not known", why=why)
        if place in self._listed:
            return self._one_by_one(service, place, *self._listed[place])
        if e.position < saved.start:
            return Branch(service=service, state="before its start", why=f"its books begin at position {saved.start}")
        if e.position in saved.fated:
            if place in self._gaps:
                kind, why = self._gaps[place]
                return Branch(service=service, state=kind, why=why)
            return self._settled(e, service, place, published, copies)
        if e.position < saved.position:
            return Branch(
                service=service, state="unaccounted", why="it was passed over without an outcome: unlost audit"
            )
        attempts, owner = saved.attempts.get(e.position, ()), saved.owner
        if owner is None:
            why = f"no living process has its partition: unlost run --service {service}"
            return Branch(service=service, state="waiting", attempts=attempts, why=why)
        who = f"pid {owner.pid} on {owner.host}" + (", which gives no sign of life" if owner.hung else "")
        if e.position < saved.read:
            return Branch(service=service, state="in flight", attempts=attempts, why=f"in the hands of {who}")
        return Branch(service=service, state="waiting", attempts=attempts, why=f"in the log; its partition has {who}")

    def _one_by_one(self, service: str, place: _Place, state: str, since: int) -> Branch:
        letter, waits, operation = self._shelf.get(place), self._waiting.get(place), self._operations.get(place)
        if state == "dead" and letter is not None:
            why = "the later events of its key wait behind it" if letter.parks else "its key goes on without it"
            if letter.request:
                why = f"{letter.request} requested; {why}"
            return Branch(
                service=service, state=state, since=letter.died, attempts=letter.attempts, letter=letter.number,
                reason=letter.reason, error=letter.error if letter.reason == "rejected" else _error(letter), why=why,
            )  # fmt: skip
        if state in ("retrying", "parked") and waits is not None:
            why = self._behind(place, waits.key) if state == "parked" else _by(operation, "redrive")
            return Branch(
                service=service, state=state, since=since, due=waits.due, attempts=waits.attempts, why=why
            )  # fmt: skip
        if state in ("dead", "retrying", "parked"):
            room = "on the shelf" if state == "dead" else "in the waiting room"
            why = f"the ledger lists it as {state}, but it is not {room}: unlost audit"
            return Branch(service=service, state="unaccounted", since=since, why=why)
        return Branch(service=service, state=state, since=since, why=_by(operation, "discard"))

    def _behind(self, place: _Place, key: bytes | None) -> str:
        """What holds up the key of a parked event."""
        unit, position = place
        if (unit, key) not in self._holders:
            self._holders[unit, key] = self._look.execute(
                "select number, position from unlost_shelf where service = ? and topic = ? and partition = ? and key = ? "
                "and parks = 1 order by position limit 1",
                (*unit, key),
            ).fetchone()
        holder = self._holders[unit, key]
        if holder is None or holder[1] > position:
            return "behind an earlier event of its key"
        return f"behind dead letter {holder[0]}: unlost dead show {holder[0]}"

    def _settled(
        self,
        e: Traced,
        service: str,
        place: _Place,
        published: Collection[tuple[str | None, str]],
        copies: Mapping[str, int],
    ) -> Branch:
        """It has an outcome, which is counted and not listed: which one, as far as something proves it."""
        why = _by(self._operations.get(place), "redrive")
        kinds = sorted(k for k, n in self._saved[place[0]].counts.items() if n and k != "void")
        rules = [k.partition(":")[2] for k in kinds if k != "done"]
        if kinds and not rules:
            return Branch(service=service, state="done", why=why)
        if rules and rules == [k.partition(":")[2] for k in kinds]:
            return Branch(service=service, state=f"skipped({' or '.join(rules)})", why=why)
        once = copies[e.id] == 1
        if e.id and once and ((e.id, service) in published or (service, e.source, e.id) in self._marks):
            return Branch(service=service, state="done", why=why)
        if e.id and service in self._code:
            handler = self._code[service].handlers.get(e.type)
            if handler is None:
                return Branch(service=service, state="skipped(no handler)", why=why)
            if not handler.turns_away:
                return Branch(service=service, state="done", why=why)
        if e.id and not once:
            why = "; ".join(
                filter(None, (why, f"the flow has {copies[e.id]} events of this id: a duplicate is skipped"))
            )
        return Branch(service=service, state=UNSURE, why=why)


def _error(letter: _Letter) -> str:
    return f"{letter.error_type}: {letter.error}" if letter.error_type else letter.error


def _by(operation: _Operation | None, action: str) -> str:
    """Who did this to it."""
    if operation is None or operation.action != action:
        return ""
    done = {"redrive": "redriven", "discard": "discarded"}[action]
    return f"{done} by {operation.operator} at {rfc3339(operation.at)}" + (
        f": {operation.reason}" if operation.reason else ""
    )
