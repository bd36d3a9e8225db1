"""What the store writes in PostgreSQL, statement by statement, whoever runs it (see `store/steps.py`).

Many rows go out in one statement (`unnest` of arrays): settling a thousand events takes as many round trips as one.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any, overload

import msgspec

from unlost.audit import BEGUN
from unlost.errors import Fenced, UsageError, invariant
from unlost.events import Envelope, decode_head, encode_head
from unlost.events.topic import Arrival, Gap, TopicInfo, Unit
from unlost.store.port import (
    LISTED,
    Attempt,
    Death,
    Inbox,
    Known,
    Mirrored,
    Outcome,
    Settlement,
    Taken,
    Waiting,
    counted_as,
)
from unlost.store.postgres.schema import SHARDS
from unlost.store.progress import Progress, Runs
from unlost.store.session_blocks import handled_meanwhile
from unlost.store.steps import Rows, Statement, Steps, one
from unlost.world import REAL, rfc3339

_json = msgspec.json
_decode_counts = msgspec.json.Decoder(dict[str, int]).decode
_decode_attempts = msgspec.json.Decoder(list[Attempt]).decode
_decode_attempt_map = msgspec.json.Decoder(dict[int, list[Attempt]]).decode
_decode_headers = msgspec.json.Decoder(dict[str, str]).decode

UNIT = "service = ? and topic = ? and partition = ?"
_UNITS = "unnest(?::text[], ?::text[], ?::integer[]) as u(service, topic, partition)"
EPOCHS_KEPT = 1000
SUSPECTS_MAX = 1280  # more than a dead owner can have had in hand of one unit
DEATHS_MIN = 2  # so many owners died at the same position: from now on its events run one at a time
JSON = "application/json"


def insert(table: str, columns: Mapping[str, str], rows: Sequence[Sequence[Any]], then: str = "") -> Steps[Rows]:
    """All rows in one statement; `columns` are names with their types."""
    if not rows:
        return []
    arrays = ", ".join(f"?::{kind}[]" for kind in columns.values())
    names = ", ".join(columns)
    found = yield (
        f"insert into {table} ({names}) select * from unnest({arrays}) {then}",
        [list(column) for column in zip(*rows, strict=True)],
    )
    return found


def units_of(units: Iterable[Unit]) -> tuple[list[str], list[str], list[int]]:
    chosen = list(units)
    return [u.service for u in chosen], [u.topic for u in chosen], [u.partition for u in chosen]


# --- the inbox -------------------------------------------------------------------------------------------------

INDEXED_MAX = 1000  # bytes
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)


def id_bytes(id: str) -> bytes:
    """An event's id in the inbox: a UUID takes 16 bytes instead of 36.

    >>> id_bytes("018f3f6e-8d2a-7c3e-9b1a-2f6d5c4b3a29").hex(), id_bytes("order-1")
    ('018f3f6e8d2a7c3e9b1a2f6d5c4b3a29', b'\\x00order-1')
    """
    if _UUID.fullmatch(id):
        return bytes.fromhex(id.replace("-", ""))
    raw = id.encode()
    return b"\0" + raw if len(raw) <= INDEXED_MAX else b"\1" + blake2b(raw, digest_size=32).digest()


def source_text(source: str) -> str:
    """Its source there. What others have made may be larger than what an index takes: then a hash stands for it."""
    raw = source.encode()
    return source if len(raw) <= INDEXED_MAX else f"blake2b:{blake2b(raw, digest_size=32).hexdigest()}"


def seen(service: str, events: Sequence[Inbox]) -> Steps[dict[tuple[str, str], Known]]:
    by_id = {(source_text(e.source), id_bytes(e.id)): (e.source, e.id) for e in events}
    if not by_id:
        return {}
    rows = yield (
        "select i.source, i.id, i.content, p.topic, p.partition, i.position "
        "from unnest(?::text[], ?::bytea[]) as u(source, id) "
        "join unlost_inbox i on i.service = ? and i.source = u.source and i.id = u.id "
        "left join unlost_progress p on p.number = i.unit",
        ([source for source, _ in by_id], [id for _, id in by_id], service),
    )
    return {
        by_id[source, bytes(id)]: Known(content, (topic, partition, position))
        for source, id, content, topic, partition, position in rows
    }


FORGET_MAX = 5000


def forget(starts: Mapping[tuple[str, int], int], resends: Mapping[str, float]) -> Steps[int]:
    """Removes marks of events that the log does not hold any more; returns how many, at most FORGET_MAX. While anything of
    a service waits or is dead, all of its marks stay: what is parked or redriven may be a copy of a handled event."""
    rows = yield (
        "delete from unlost_inbox d using (select i.service, i.source, i.id "
        "from unnest(?::text[], ?::integer[], ?::bigint[]) as u(topic, partition, start) "
        "cross join unnest(?::text[], ?::double precision[]) as s(service, seconds) "
        "join unlost_progress p on p.service = s.service and p.topic = u.topic and p.partition = u.partition "
        "join unlost_inbox i on i.unit = p.number and i.position < u.start and i.at < extract(epoch from now()) - s.seconds "
        "where not exists (select 1 from unlost_waiting w where w.service = s.service) "
        "and not exists (select 1 from unlost_shelf d where d.service = s.service) "
        f"limit {FORGET_MAX}) f where d.service = f.service and d.source = f.source and d.id = f.id returning 1",
        (
            [topic for topic, _ in starts], [partition for _, partition in starts], list(starts.values()),
            list(resends), list(resends.values()),
        ),
    )  # fmt: skip
    return len(rows)


_INBOX = {
    "content": "bigint", "position": "bigint", "unit": "integer", "service": "text", "source": "text", "id": "bytea",
}  # fmt: skip


# --- the outbox ------------------------------------------------------------------------------------------------

OUTBOX = {
    "shard": "smallint", "aggregatetype": "text", "aggregateid": "text", "id": "text", "type": "text", "payload": "text",
    "ce_source": "text", "ce_time": "text", "ce_subject": "text", "ce_partitionkey": "text", "ce_correlationid": "text",
    "ce_causationid": "text", "ce_traceparent": "text", "ce_tracestate": "text", "ce_unlostversion": "integer",
    "headers": "text", "rawkey": "bytea",
}  # fmt: skip
_AS_JSON = ("payload", "headers")
_OUTBOX_ONE = f"insert into unlost_outbox ({', '.join(OUTBOX)}) select " + ", ".join(
    f"?::{'json' if name in _AS_JSON else kind}" for name, kind in OUTBOX.items()
)
_OUTBOX_MANY = (
    f"insert into unlost_outbox ({', '.join(OUTBOX)}) select "
    + ", ".join(f"{name}::json" if name in _AS_JSON else f"u.{name}" for name in OUTBOX)
    + f" from unnest({', '.join(f'?::{kind}[]' for kind in OUTBOX.values())}) as u({', '.join(OUTBOX)})"
)
# On a connection of the user's: nothing is put into another database than the one that relays look at.
_HERE = "m.name = 'store_id' and m.value = ?::text returning seq"
_ONE_HERE = f"{_OUTBOX_ONE} from unlost_meta m where {_HERE}"
_MANY_HERE = f"{_OUTBOX_MANY}, unlost_meta m where {_HERE}"


def put(envelopes: Sequence[Envelope], store_id: str = "") -> Steps[None]:
    """Puts events into the outbox, in the order of the calls: one statement, in whoever's transaction it is. With
    `store_id` only into the outbox of that store.

    Raises:
        UsageError: this database has another store, or none.
    """
    rows = [_outbox_row(e) for e in envelopes if e.due is None]
    later = [e for e in envelopes if e.due is not None]
    if later:
        yield from _put_later(later, store_id)
    if not rows:
        return
    columns: Sequence[Any] = rows[0] if len(rows) == 1 else [list(column) for column in zip(*rows, strict=True)]
    if not store_id:
        yield _OUTBOX_ONE if len(rows) == 1 else _OUTBOX_MANY, columns
        return
    written = yield _ONE_HERE if len(rows) == 1 else _MANY_HERE, (*columns, store_id)
    if len(written) != len(rows):
        raise _another_store()


def _another_store() -> UsageError:
    return UsageError(
        "UL1253", "this connection is not to the database that the relays look at", found="its outbox is that of another store",
        fix="use a connection to the database of UNLOST_STORE; an App publishes through one outbox in PostgreSQL",
    )  # fmt: skip


_LATER = {
    "due": "bigint", "by_clock": "integer", "source": "text", "id": "text", "topic": "text", "key": "bytea", "head": "bytea",
    "data": "bytea", "added": "bigint",
}  # fmt: skip
_LATER_MANY = (
    f"insert into unlost_delayed ({', '.join(_LATER)}) select u.* from "
    f"unnest({', '.join(f'?::{kind}[]' for kind in _LATER.values())}) as u({', '.join(_LATER)})"
)


def _later_columns(envelopes: Sequence[Envelope]) -> list[list[Any]]:
    for e in envelopes:
        _outbox_row(e)  # where it goes then: what cannot be put there is refused now
    now = REAL.now()
    rows = [(e.due, int(e.by_clock), e.source, e.id, e.topic, e.key, encode_head(e), e.data, now) for e in envelopes]
    return [list(column) for column in zip(*rows, strict=True)]


def _put_later(envelopes: Sequence[Envelope], store_id: str) -> Steps[None]:
    """Those that are to leave later. The same id of the same source twice is one: the first counts."""
    if store_id:
        here = yield from one("select 1 from unlost_meta where name = 'store_id' and value = ?", (store_id,))
        if here is None:
            raise _another_store()
    yield f"{_LATER_MANY} on conflict do nothing", _later_columns(envelopes)


def shard_of(topic: str, key: bytes | None, id: str) -> int:
    return zlib.crc32(topic.encode() + b"\0" + (key if key is not None else id.encode())) % SHARDS


def _outbox_row(e: Envelope) -> tuple[Any, ...]:
    if e.extensions or e.dataschema or e.datacontenttype != JSON or e.publisher or e.data is None:
        raise UsageError(
            "UL1168", "an outbox in PostgreSQL takes JSON events", found=f"{e.id}: {e.datacontenttype}, {e.extensions or 'no data'}",
            fix="publish typed events; whatever else goes to the broker itself",
        )  # fmt: skip
    if e.headers:
        encode_head(e)  # says what is too large
    text: str | None = None
    raw: bytes | None = None
    if e.key is not None:
        try:
            text = e.key.decode()
        except UnicodeDecodeError:
            text, raw = e.key.hex(), e.key
        if "\0" in text:
            text, raw = e.key.hex(), e.key
    return (
        shard_of(e.topic, e.key, e.id), e.topic, text, e.id, e.type, e.data.decode(), e.source, e.time,
        *map(_shown, (e.subject, e.partitionkey, e.correlationid, e.causationid, e.traceparent, e.tracestate)), e.eventversion,
        _json.encode(e.headers).decode() if e.headers else None, raw,
    )  # fmt: skip


STORED = (
    "o.seq, o.shard, s.number, o.aggregatetype, o.aggregateid, o.rawkey, o.id, o.type, o.payload::text, o.ce_source, o.ce_time, "
    "o.ce_subject, o.ce_partitionkey, o.ce_correlationid, o.ce_causationid, o.ce_traceparent, o.ce_tracestate, "
    "o.ce_unlostversion, o.headers::text"
)


def envelope_of(row: tuple[Any, ...]) -> Envelope:
    """The event of an outbox row, as `put` had it."""
    (_, _, _, topic, key, raw, id, type, data, source, time, subject, partitionkey, correlation, cause, parent, state,
     version, headers) = row  # fmt: skip
    return Envelope(
        id=id, source=source, type=type, time=time, topic=topic,
        key=bytes(raw) if raw is not None else None if key is None else key.encode(), data=data.encode(), subject=subject,
        partitionkey=partitionkey, correlationid=correlation, causationid=cause, traceparent=parent, tracestate=state,
        eventversion=version, headers=_decode_headers(headers) if headers else {},
    )  # fmt: skip


# --- settling --------------------------------------------------------------------------------------------------


class _Plan:
    """What a commit of outcomes will write. Pure: rows come in from the statements, and go out as lists."""

    def __init__(self, waits: set[tuple[Unit, int]], now: int) -> None:
        self.now = now
        self.waits = waits  # what stands in the waiting room
        self.publishes: list[Envelope] = []
        self.copies: list[Mirrored] = []
        self.shelf: list[tuple[Any, ...]] = []
        self.waiting: dict[tuple[Unit, int], tuple[Any, ...]] = {}
        self.waited: set[tuple[Unit, int]] = set()  # leave the waiting room
        self.ledger: dict[tuple[Unit, int], tuple[str, str]] = {}
        self.unlisted: set[tuple[Unit, int]] = set()  # leave the ledger's list
        self.gaps: list[tuple[Any, ...]] = []

    def settle(self, unit: Unit, progress: Progress, o: Outcome) -> None:
        """The consequence of one outcome, then its place in the books."""
        a, place = o.arrival, (unit, o.arrival.position)
        listed, counted = o.state in LISTED, counted_as(o)
        self.publishes.extend(o.publishes)
        if o.waited and not o.begun:
            invariant(place in self.waits, f"{unit}:{a.position} is settled twice: it does not wait any more")
        if o.state == "dead":
            self.shelf.append(_shelf_row(unit, o, self.now))
        if o.state in ("retrying", "parked"):
            self.waits.add(place)
            self.waited.discard(place)
            self.waiting[place] = (
                *unit, a.position, a.key, o.due, len(o.attempts), _text(o.attempts), a.stored_head, a.data, a.recorded,
            )  # fmt: skip
        elif o.waited and not o.begun:
            self.waits.discard(place)
            self.waiting.pop(place, None)
            self.waited.add(place)
        if o.begun:
            progress.end([a.position], counted)
        elif o.waited:
            if o.state == BEGUN:
                progress.begin_again(a.position)
            elif counted is not None:
                progress.count(counted, 1)
            if counted is not None:
                self.ledger.pop(place, None)
                self.unlisted.add(place)
        else:
            progress.settle(a.position, o.event_hash, counted)
        if listed:
            self.ledger[place] = (o.state, a.envelope.id if a.envelope else "")
            self.unlisted.discard(place)

    def pass_over(self, unit: Unit, progress: Progress, gap: Gap) -> None:
        for start, end in progress.pass_over(gap.start, gap.end):
            if gap.kind == "void":
                progress.count("void", end - start)
            else:
                self.gaps.append((*unit, start, end, gap.kind, gap.why, self.now, int(gap.declared)))

    def write(self) -> Steps[None]:
        yield from put(self.publishes)
        yield from insert(
            "unlost_copy", {"topic": "text", "key": "bytea", "data": "bytea", "raw": "text"},
            [(m.topic, m.key, m.data, _raw(m)) for m in self.copies],
        )  # fmt: skip
        yield from insert("unlost_shelf", _SHELF, self.shelf)
        if self.waited:
            yield from _delete("unlost_waiting", self.waited)
        yield from insert(
            "unlost_waiting", _WAITING, list(self.waiting.values()),
            "on conflict (service, topic, partition, position) do update "
            "set due = excluded.due, attempt = excluded.attempt, history = excluded.history, running = 0",
        )  # fmt: skip
        if self.unlisted:
            gone = yield from _delete("unlost_ledger", self.unlisted)
            invariant(len(gone) == len(self.unlisted), "what waited was in the ledger's list")
        yield from insert(
            "unlost_ledger", _LEDGER,
            [(*unit, position, state, id, self.now) for (unit, position), (state, id) in self.ledger.items()],
            "on conflict (service, topic, partition, position) do update set state = excluded.state, since = excluded.since",
        )  # fmt: skip
        yield from insert("unlost_gap", _GAP, self.gaps)


_PLACE = {"service": "text", "topic": "text", "partition": "integer", "position": "bigint"}
_LEDGER = {**_PLACE, "state": "text", "id": "text", "since": "bigint"}
_WAITING = {
    **_PLACE, "key": "bytea", "due": "bigint", "attempt": "integer", "history": "text", "head": "bytea", "data": "bytea",
    "recorded": "bigint",
}  # fmt: skip
_GAP = {
    "service": "text", "topic": "text", "partition": "integer", "start": "bigint", '"end"': "bigint", "kind": "text",
    "why": "text", "since": "bigint", "declared": "integer",
}  # fmt: skip
_SHELF = {
    **_PLACE, "handler": "text", "id": "text", "source": "text", "type": "text", "key": "bytea", "trace": "text",
    "reason": "text", "error_type": "text", "error": "text", "stack": "text", "attempts": "text", "parks": "integer",
    "died": "bigint", "head": "bytea", "data": "bytea", "recorded": "bigint",
}  # fmt: skip


def _shelf_row(unit: Unit, o: Outcome, now: int) -> tuple[Any, ...]:
    a, death, e = o.arrival, o.death, o.arrival.envelope
    invariant(death is not None, "a dead letter has a reason")
    assert death is not None
    return (
        *unit, a.position, death.handler, e.id if e else "", e.source if e else "", e.type if e else "", a.key,
        _shown(e.traceparent) if e else None, death.reason, *(_shown(t) for t in (death.error_type, death.error, death.stack)),
        _text(o.attempts), int(death.parks), now, a.stored_head, a.data, a.recorded,
    )  # fmt: skip


@overload
def _shown(text: str) -> str: ...
@overload
def _shown(text: str | None) -> str | None: ...
def _shown(text: str | None) -> str | None:
    """What people read of an error, and what anybody may have put into an attribute: PostgreSQL's text has no NUL, so its
    symbol stands for it."""
    return text and text.replace("\0", "␀")


def _text(attempts: Sequence[Attempt]) -> str:
    return _json.encode(attempts).decode()


def _raw(m: Mirrored) -> str:
    return _json.encode({"origin": m.origin, "headers": m.headers}).decode()


def _delete(table: str, places: Iterable[tuple[Unit, int]]) -> Steps[Rows]:
    chosen = list(places)
    rows = yield (
        f"delete from {table} t using unnest(?::text[], ?::text[], ?::integer[], ?::bigint[]) "
        "as u(service, topic, partition, position) where t.service = u.service and t.topic = u.topic "
        "and t.partition = u.partition and t.position = u.position returning t.position",
        (*units_of(unit for unit, _ in chosen), [position for _, position in chosen]),
    )
    return rows


def settle(settlements: Sequence[Settlement], now: int, mirror: Any = None) -> Steps[list[Unit]]:
    """Makes outcomes part of the open transaction; returns the units that were fenced. The rows of all units are locked
    first, always in the same order."""
    units = sorted({s.unit for s in settlements})
    rows = yield (
        "select p.service, p.topic, p.partition, p.number, p.epoch, p.position, p.fated, p.counts, p.digest, p.attempts, "
        f"p.alone, p.begun from {_UNITS} join unlost_progress p using (service, topic, partition) "
        "order by p.service, p.topic, p.partition for update of p",
        units_of(units),
    )
    saved = {Unit(*row[:3]): row[3:] for row in rows}
    fenced = [s.unit for s in settlements if s.unit not in saved or saved[s.unit][1] != s.epoch]
    valid = [s for s in settlements if s.unit in saved and saved[s.unit][1] == s.epoch]
    if not valid:
        return fenced
    yield from _deduplicate(valid, {unit: row[0] for unit, row in saved.items()})
    plan = _Plan((yield from _waiting_now(valid)), now)
    changed: dict[Unit, tuple[Progress, dict[int, Sequence[Attempt] | None]]] = {}
    for s in valid:
        row = saved[s.unit]
        if s.unit not in changed:
            changed[s.unit] = (_progress(row), {})
        progress, attempts = changed[s.unit]
        for o in s.outcomes:
            if o.state == "attempted":
                attempts[o.arrival.position] = o.attempts
                continue
            if not (o.waited or o.begun):
                invariant(o.arrival.position not in progress.fated, f"{s.unit}:{o.arrival.position} is settled twice")
                attempts[o.arrival.position] = None
            plan.settle(s.unit, progress, o)
            if o.state == "dead" and mirror is not None and (copy := mirror(s.unit, o)) is not None:
                plan.copies.append(copy)
        if s.done:
            progress.settle_done(list(s.done), s.done_digest)
        if s.ended:
            progress.end(list(s.ended), "done")
        if s.begun:
            progress.begin(list(s.begun), s.begun_digest)
        for gap in s.gaps:
            plan.pass_over(s.unit, progress, gap)
    yield from plan.write()
    yield from _save(changed, saved)
    return fenced


def _progress(row: Sequence[Any]) -> Progress:
    """From the columns that `settle` asks for."""
    return Progress(row[2], Runs.decode(bytes(row[3])), _decode_counts(row[4]), row[5], Runs.decode(bytes(row[8])))


def happened(settlements: Sequence[Settlement]) -> Steps[bool]:
    """Whether a commit of these outcomes is there: nobody else gives them an outcome under their epoch, and a commit is
    there as a whole, so one trace of it tells. Without any trace it may be repeated: nothing in it could then differ."""
    rows = yield (
        f"select p.service, p.topic, p.partition, p.epoch, p.fated, p.begun from {_UNITS} "
        "join unlost_progress p using (service, topic, partition)",
        units_of({s.unit for s in settlements}),
    )
    saved = {Unit(*row[:3]): (row[3], Runs.decode(bytes(row[4])), Runs.decode(bytes(row[5]))) for row in rows}
    for s in settlements:
        epoch, fated, begun = saved.get(s.unit, (None, Runs(), Runs()))
        fresh = [o.arrival.position for o in s.outcomes if o.state != "attempted" and not (o.waited or o.begun)]
        ended = [o.arrival.position for o in s.outcomes if o.begun]
        if epoch == s.epoch and (fresh or s.done or s.begun):
            return (*fresh, *s.done, *s.begun)[0] in fated
        if epoch == s.epoch and (ended or s.ended):
            return (*ended, *s.ended)[0] not in begun
    left = [
        (s.unit, o.arrival.position)
        for s in settlements
        for o in s.outcomes
        if o.waited and o.state not in ("retrying", "parked", "attempted") and saved.get(s.unit, (None,))[0] == s.epoch
    ]
    if not left:
        return False
    waits = yield from _waiting_now(settlements)
    return left[0] not in waits


def _save(
    changed: Mapping[Unit, tuple[Progress, dict[int, Sequence[Attempt] | None]]], saved: Mapping[Unit, Sequence[Any]]
) -> Steps[None]:
    rows = []
    for unit, (progress, attempts) in changed.items():
        number, stored, alone = saved[unit][0], saved[unit][6], saved[unit][7]
        if attempts and (stored != "{}" or any(attempts.values())):
            kept: dict[int, Sequence[Attempt]] = dict(_decode_attempt_map(stored))
            for position, history in attempts.items():
                if history:
                    kept[position] = history
                else:
                    kept.pop(position, None)
            stored = _json.encode(kept).decode()
        counts = _json.encode(progress.counts).decode()
        still_alone = None if alone in attempts else alone  # it has come through
        begun = progress.begun.encode()
        rows.append(
            (number, progress.position, progress.fated.encode(), begun, counts, progress.digest, stored, still_alone)
        )
    yield (
        "update unlost_progress p set position = u.position, fated = u.fated, begun = u.begun, counts = u.counts, "
        "digest = u.digest, attempts = u.attempts, alone = u.alone "
        "from unnest(?::integer[], ?::bigint[], ?::bytea[], ?::bytea[], ?::text[], ?::bigint[], ?::text[], ?::bigint[]) "
        "as u(number, position, fated, begun, counts, digest, attempts, alone) where p.number = u.number",
        [list(column) for column in zip(*rows, strict=True)],
    )


def _deduplicate(settlements: Sequence[Settlement], numbers: Mapping[Unit, int]) -> Steps[None]:
    """Marks events as handled. Those that were handled before become duplicates, without effect."""
    marked: dict[tuple[str, str, bytes], list[tuple[Settlement, Outcome, Inbox]]] = {}
    for s in settlements:
        for o in s.outcomes:
            if o.inbox is not None:
                mark = o.inbox
                marked.setdefault((s.unit.service, source_text(mark.source), id_bytes(mark.id)), []).append(
                    (s, o, mark)
                )
    if not marked:
        return
    rows = [
        (found[0][2].content, found[0][1].arrival.position, numbers[found[0][0].unit], *name)
        for name, found in sorted(marked.items())
    ]
    fresh = yield from insert("unlost_inbox", _INBOX, rows, "on conflict do nothing returning service, source, id")
    new = {(service, source, bytes(id)) for service, source, id in fresh}
    known: dict[tuple[str, str, bytes], Known] = {}
    asked: dict[str, list[Inbox]] = {}
    for name, found in marked.items():
        if name not in new:
            asked.setdefault(name[0], []).append(found[0][2])
    for service, marks in asked.items():
        before = yield from seen(service, marks)
        known.update({(service, source_text(source), id_bytes(id)): k for (source, id), k in before.items()})
    for name, found in marked.items():
        if name in new:
            s, o, mark = found[0]
            known[name] = Known(mark.content, (s.unit.topic, s.unit.partition, o.arrival.position))
        for s, o, mark in found[1:] if name in new else found:
            _as_repeated(s.unit, o, mark, known[name])


def _as_repeated(unit: Unit, o: Outcome, mark: Inbox, known: Known) -> None:
    """The id was handled before: by the transaction of this very delivery; or it is a duplicate; or (never to be dropped)
    another event under a used id."""
    o.inbox, o.publishes = None, ()
    if known.content != mark.content:
        o.state, o.death = "dead", _id_reused(mark)
    elif known.place != (unit.topic, unit.partition, o.arrival.position):
        o.state, o.rule = "skipped", "duplicate"


def _id_reused(mark: Inbox) -> Death:
    return Death(
        handler="", reason="id_reused", error_type="IdReused", parks=False,
        error=f"another event with the id {mark.id!r} of {mark.source!r} was handled before; this one differs from it",
    )  # fmt: skip


def _waiting_now(settlements: Sequence[Settlement]) -> Steps[set[tuple[Unit, int]]]:
    """Which of those that came from the waiting room still stand there."""
    asked = [(s.unit, o.arrival.position) for s in settlements for o in s.outcomes if o.waited]
    if not asked:
        return set()
    rows = yield (
        "select w.service, w.topic, w.partition, w.position "
        "from unnest(?::text[], ?::text[], ?::integer[], ?::bigint[]) as u(service, topic, partition, position) "
        "join unlost_waiting w using (service, topic, partition, position)",
        (*units_of(unit for unit, _ in asked), [position for _, position in asked]),
    )
    return {(Unit(service, topic, partition), position) for service, topic, partition, position in rows}


# --- a handler's transaction -----------------------------------------------------------------------------------


def enter(unit: Unit, epoch: int, mark: Inbox | None) -> Steps[Known | None]:
    """Is the unit still ours, and what does the inbox know of the event?"""
    row = yield from entry(unit, mark)
    return entered(unit, epoch, row)


_ENTRY = (
    "from unlost_meta m left join unlost_progress p on p.service = ? and p.topic = ? and p.partition = ?{} "
    "where m.name = 'store_id'"
)
_ENTRY_ANY = "select m.value, p.epoch, null " + _ENTRY.format("")
_ENTRY_ONCE = "select m.value, p.epoch, i.content, w.topic, w.partition, i.position " + _ENTRY.format(
    " left join unlost_inbox i on i.service = ? and i.source = ? and i.id = ? left join unlost_progress w on w.number = i.unit"
)


def entry(unit: Unit, mark: Inbox | None) -> Steps[Sequence[Any]]:
    """The store's id, the unit's epoch, and what the inbox knows: one statement, for `entered`."""
    if mark is None:
        row = yield from one(_ENTRY_ANY, unit)
    else:
        row = yield from one(_ENTRY_ONCE, (*unit, unit.service, source_text(mark.source), id_bytes(mark.id)))
    return row or (None, None, None)


def entered(unit: Unit, epoch: int, row: Sequence[Any]) -> Known | None:
    if row[1] != epoch:
        raise fenced(unit, row[1], epoch)
    return None if row[2] is None else Known(row[2], (row[3], row[4], row[5]))


_MARK = (
    "mark as (insert into unlost_inbox (content, position, unit, service, source, id) "
    "select ?::bigint, ?::bigint, number, ?::text, ?::text, ?::bytea from owned on conflict do nothing returning 1)"
)
_EVENT = f"events as ({_OUTBOX_ONE} from owned)"
_EVENTS = f"events as ({_OUTBOX_MANY}, owned)"


def finish(settlement: Settlement) -> Steps[None]:
    """The mark "handled" and the events, as the last statement of the handler's transaction. Its position is settled
    afterwards: until then the mark says where the event stood.

    Two owners of one unit (one has slept through its replacement) may come here with the same event: the mark is unique,
    so one of them fails. Every event of a key is marked before the next one is, whoever does it.
    """
    (o,) = settlement.outcomes
    text, marks, bindings = _ending(settlement)
    owned, marked = yield from one(f"{text} select (select count(*) from owned), {marks}", bindings)
    if not owned:
        raise fenced(settlement.unit, None, settlement.epoch)
    if not marked:
        raise handled_meanwhile(f"{settlement.unit}:{o.arrival.position}")


def finish_or_fail(settlement: Settlement) -> Statement:
    """The same as a statement that fails (it divides by zero) where `finish` raises: the commit goes out with it in one
    trip, and does not happen then."""
    text, marks, bindings = _ending(settlement)
    return f"{text} select 1 / (select count(*) from owned) / {marks}", bindings


def _ending(settlement: Settlement) -> tuple[str, str, list[Any]]:
    unit = settlement.unit
    (o,) = settlement.outcomes
    parts = [f"owned as (select number from unlost_progress where {UNIT} and epoch = ?)"]
    bindings: list[Any] = [*unit, settlement.epoch]
    if o.inbox is not None:
        mark = o.inbox
        parts.append(_MARK)
        bindings += (mark.content, o.arrival.position, unit.service, source_text(mark.source), id_bytes(mark.id))
    events = [_outbox_row(e) for e in o.publishes if e.due is None]
    later = [e for e in o.publishes if e.due is not None]
    if later:
        parts.append(f"later as ({_LATER_MANY}, owned on conflict do nothing)")
        bindings += _later_columns(later)
    if len(events) == 1:
        parts.append(_EVENT)
        bindings += events[0]
    elif events:
        parts.append(_EVENTS)
        bindings += [list(column) for column in zip(*events, strict=True)]
    return f"with {', '.join(parts)}", "(select count(*) from mark)" if o.inbox is not None else "1", bindings


def fenced(unit: Unit, found: int | None, epoch: int) -> Fenced:
    return Fenced("UL2101", f"{unit} has another owner now", found=f"epoch {found or '-'}, ours was {epoch}")


# --- services and ownership ------------------------------------------------------------------------------------


def broker(identity: str) -> Steps[None]:
    """Positions saved with one broker mean nothing on another: a store belongs to one, for good."""
    yield "insert into unlost_meta values ('broker', ?) on conflict do nothing", (identity,)
    (known,) = yield from one("select value from unlost_meta where name = 'broker'")
    if known != identity:
        raise UsageError(
            "UL1133", "this store belongs to another broker", found=f"it was used with {known}, this is {identity}",
            fix="give each broker its own store (another schema: ?schema=…), or go back to the broker it was used with",
        )  # fmt: skip


def pin(service: str, topic: TopicInfo) -> Steps[None]:
    """A service's start on a topic is decided once, when it first sees it: at the log's first event."""
    rows = yield (
        "select partition, topic_id from unlost_progress where service = ? and topic = ?", (service, topic.name),
    )  # fmt: skip
    if rows:
        if any(id != topic.id for _, id in rows) or len(rows) != topic.partitions:
            raise UsageError(
                "UL1130", f"the topic {topic.name!r} is not the one that {service!r} has its positions on",
                found=f"id {topic.id} with {topic.partitions} partitions; saved are {len(rows)} partitions of id {rows[0][1]}",
                fix="it was deleted and made again, or given other partitions: bring the old one back, or rename the service",
            )  # fmt: skip
        return
    starts = [topic.ranges[partition][0] for partition in range(topic.partitions)]
    yield from insert(
        "unlost_progress",
        {
            "service": "text", "topic": "text", "partition": "integer", "topic_id": "text", "start": "bigint",
            "start_digest": "bigint", "position": "bigint", "fated": "bytea", "counts": "text", "digest": "bigint",
        },
        [(service, topic.name, p, topic.id, start, 0, start, b"", "{}", 0) for p, start in enumerate(starts)],
    )  # fmt: skip


def take(unit: Unit, owner: str, pid: int, living: set[str], now: int) -> Steps[Taken]:
    """Makes `owner` the one who may settle this unit. `living` are the processes that live."""
    row = yield from one(
        "select epoch, owner, clean, position, fated, attempts, number, deaths, died_at, alone, counts, digest, begun "
        "from unlost_progress "
        f"where {UNIT} for update",
        unit,
    )
    invariant(row is not None, f"{unit} was registered before it was taken")
    epoch, before, clean, position, fated, attempts, number, deaths, died_at, alone, counts, digest, begun = row
    epoch += 1
    unclean = not clean and before is not None
    died = unclean and before not in living
    done, history = Runs.decode(bytes(fated)), _decode_attempt_map(attempts)
    suspects: set[int] = set()
    guessed = False
    if died:
        deaths = deaths + 1 if died_at == position else 1
        died_at = position
        if alone is not None and alone not in done:
            past = history.setdefault(alone, [])
            past.append(Attempt(len(past) + 1, now, _KILLED))
            suspects.add(alone)
        suspects |= yield from _suspects_that_waited(unit, now)
        if deaths >= DEATHS_MIN:
            guessed = True
            at = position
            while len(suspects) < SUSPECTS_MAX:
                if at not in done:
                    suspects.add(at)
                at += 1
    elif clean:
        deaths, died_at = 0, -1
    yield (
        "update unlost_progress set epoch = ?, owner = ?, clean = 0, attempts = ?, deaths = ?, died_at = ?, alone = null "
        "where number = ?",
        (epoch, owner, _json.encode(history).decode(), deaths, died_at, number),
    )
    yield (
        "insert into unlost_epoch values (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (*unit, epoch, owner, pid, now, position, int(unclean)),
    )
    yield f"delete from unlost_epoch where {UNIT} and epoch <= ?", (*unit, epoch - EPOCHS_KEPT)
    abandoned = 0
    if begun:
        progress = Progress(position, done, _decode_counts(counts), digest, Runs.decode(bytes(begun)))
        abandoned = yield from _abandon(unit, number, progress, now)
    waiting, keyless = yield from _waiting_keys(unit)
    (aside,) = yield from one(
        f"select count(*) from unlost_ledger where {UNIT} and state in ('retrying', 'parked', 'dead')", unit
    )
    return Taken(
        unit=unit, epoch=epoch, address=number, position=position, fated=done, attempts=history, suspects=suspects,
        waiting=waiting, keyless=keyless, aside=aside, guessed=guessed, abandoned=abandoned,
    )  # fmt: skip


def _abandon(unit: Unit, number: int, progress: Progress, now: int) -> Steps[int]:
    """Events that the owner before had begun to handle at most once, and of which nobody knows more, are listed."""
    positions = progress.abandon()
    yield from insert("unlost_ledger", _LEDGER, [(*unit, position, "abandoned", "", now) for position in positions])
    yield (
        "update unlost_progress set begun = ''::bytea, counts = ? where number = ?",
        (_json.encode(progress.counts).decode(), number),
    )
    return len(positions)


_KILLED = "its process was killed (or hung) while it handled only this event"


def _suspects_that_waited(unit: Unit, now: int) -> Steps[set[int]]:
    """Events of the waiting room that were in a handler; one that ran alone has spent an attempt."""
    rows = yield f"select position, history, running from unlost_waiting where {UNIT} and running > 0", unit
    for position, history, running in rows:
        past = _decode_attempts(history)
        if running == 2:
            past.append(Attempt(len(past) + 1, now, _KILLED))
        yield (
            f"update unlost_waiting set history = ?, attempt = ?, running = 0 where {UNIT} and position = ?",
            (_text(past), len(past), *unit, position),
        )
    return {position for position, _, _ in rows}


def _waiting_keys(unit: Unit) -> Steps[tuple[dict[bytes, int | None], dict[int, int]]]:
    """Per key the time when its first waiting event is due, None while a dead letter is before it."""
    waiting: dict[bytes, int | None] = {}
    keyless: dict[int, int] = {}
    rows = yield (
        f"select distinct on (key) key, position, due from unlost_waiting where {UNIT} and key is not null "
        "order by key, position",
        unit,
    )
    for key, _, due in rows:
        waiting[bytes(key)] = due or 0
    rows = yield f"select position, due from unlost_waiting where {UNIT} and key is null", unit
    for position, due in rows:
        keyless[position] = due or 0
    rows = yield f"select distinct key from unlost_shelf where {UNIT} and parks = 1 and key is not null", unit
    for (key,) in rows:
        waiting[bytes(key)] = None
    return waiting, keyless


def starting(unit: Unit, epoch: int, position: int, waited: bool, alone: bool) -> Steps[None]:
    """Notes what is about to run, where nothing else would tell after a death."""
    if waited:
        yield (
            "update unlost_waiting w set running = ? from unlost_progress p "
            "where p.service = w.service and p.topic = w.topic and p.partition = w.partition and p.epoch = ? "
            "and w.service = ? and w.topic = ? and w.partition = ? and w.position = ?",
            (2 if alone else 1, epoch, *unit, position),
        )
    elif alone:
        yield f"update unlost_progress set alone = ? where {UNIT} and epoch = ?", (position, *unit, epoch)


def waiting(unit: Unit, key: bytes | None, position: int | None, limit: int) -> Steps[list[Waiting]]:
    bindings: list[Any]
    if key is not None:  # the index has its hash
        where, bindings = "key = ?::bytea and sha256(key) = sha256(?::bytea)", [key, key]
    else:
        where, bindings = "position = ?::bigint and key is null", [position]
    rows = yield (
        "select position, head, key, data, recorded, due, history from unlost_waiting "
        f"where {UNIT} and {where} order by position limit {limit:d}",
        (*unit, *bindings),
    )
    return [
        Waiting(
            arrival=stored_arrival(unit.topic, at, bytes(head), _bytes(key), _bytes(data), recorded), due=due,
            attempts=_decode_attempts(history),
        )
        for at, head, key, data, recorded, due, history in rows
    ]  # fmt: skip


def stored_arrival(
    topic: str, position: int, head: bytes, key: bytes | None, data: bytes | None, recorded: int
) -> Arrival:
    """An arrival from stored columns; bytes that are no event keep their place and say why."""
    try:
        known = decode_head(head, topic=topic, key=key, data=data, recordedtime=rfc3339(recorded))
    except Exception as e:
        return Arrival(position, None, recorded, head, key, data, str(e))
    return Arrival(position, known, recorded, head, key, data)


def _bytes(value: Any) -> bytes | None:
    return None if value is None else bytes(value)
