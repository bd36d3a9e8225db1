"""The shelf, for operators: look, ask for a redrive or a discard. The owner of the partition carries it out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

import msgspec

from unlost.errors import UnlostError
from unlost.events import Envelope, decode_head, from_headers, seal
from unlost.events.topic import Decoder, Foreign, Unit
from unlost.sqlite.file import File
from unlost.store import shelf as rows
from unlost.store.port import Attempt, DeadLetter, Look, Records, Request
from unlost.store.records import FileRecords
from unlost.store.steps import run
from unlost.world import REAL, rfc3339

_COLUMNS = (
    "number, service, handler, topic, partition, position, id, source, type, key, trace, reason, error_type, error, "
    "stack, attempts, parks, died, recorded, head, data, request"
)
_BEHIND = (
    "(select count(*) from unlost_waiting w where w.service = s.service and w.topic = s.topic "
    "and w.partition = s.partition and w.key = s.key)"
)
COMMIT_MAX = 500  # letters in one commit: the rows that it locks are not held for long
ROWS_MAX = 100  # in one statement
AGAIN_SECONDS = 0.5  # how often it is looked whether an owner has died
Action = Literal["redrive", "discard"]


Headers = Sequence[tuple[str, bytes | None]]


class _Kept(msgspec.Struct, frozen=True):
    """How the head of a message is kept that is no event of ours (see brokers/kafka/wire.py)."""

    kafkaheaders: Headers


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What became of an operator's request."""

    action: Action
    letters: Sequence[DeadLetter]
    carried_out: int  # at once, because nobody owned the partition
    pending: int  # the owner will do it
    dry_run: bool


def letters(
    records: Records,
    *,
    service: str | None = None,
    number: int | None = None,
    id: str | None = None,
    key: str | None = None,
    reason: str | None = None,
) -> list[DeadLetter]:
    """Dead letters, oldest first. Every given filter must match."""
    wanted = {"service": service, "number": number, "id": id, "reason": reason}
    where = [f"{name} = ?" for name, value in wanted.items() if value is not None]
    bindings: list[object] = [value for value in wanted.values() if value is not None]
    if key is not None:
        where.append("key = ?")
        bindings.append(key.encode())
    sql = f"select {_COLUMNS}, {_BEHIND} from unlost_shelf s {'where ' + ' and '.join(where) if where else ''} order by number"
    return records.read(lambda look: [_letter(row) for row in look.execute(sql, bindings)])


def headers_of(letter: DeadLetter) -> Headers | None:
    """The headers of a message that somebody else wrote, as they came; None: it is an event of ours."""
    try:
        return msgspec.json.decode(letter.head, type=_Kept).kafkaheaders
    except msgspec.MsgspecError:
        return None


def event_of(letter: DeadLetter, decoder: Decoder | None = None) -> Envelope | None:
    """The event on the shelf, or None where its bytes are none. `decoder` is what the App has declared for its topic."""
    kept = headers_of(letter)
    try:
        if kept is None:
            return decode_head(letter.head, topic=letter.topic, key=letter.key, data=letter.data)
        return from_headers(kept, letter.data, topic=letter.topic, key=letter.key, time=rfc3339(letter.recorded))
    except UnlostError:
        return None if kept is None or decoder is None else _decoded(letter, kept, decoder)


def _decoded(letter: DeadLetter, headers: Headers, decoder: Decoder) -> Envelope | None:
    message = Foreign(
        topic=letter.topic, partition=letter.partition, position=letter.position, key=letter.key, value=letter.data,
        headers=headers, recorded=letter.recorded,
    )  # fmt: skip
    try:
        event = decoder(message)
        return None if event is None else seal(event, source="shelf", topic=letter.topic, now=letter.recorded)
    except Exception:
        return None  # user code; why it cannot read the message stands on the shelf


def ask(
    records: Records,
    action: Action,
    chosen: Sequence[DeadLetter],
    *,
    operator: str,
    reason: str,
    dry_run: bool = False,
    wait_seconds: float = 5.0,
    group: File | None = None,
) -> Asked:
    """Records the request with the operator's name, and has it carried out.

    Where a process of the service lives, it does it (only it knows what of the key is in hand); where none does, it
    is done here, as the owner for a moment. `group` is the file of an embedded broker whose store is elsewhere: it knows
    who is about to take a unit. **After a crash** of either the request stands, and the next owner carries it out; it is
    never done twice, because it takes the letter off the shelf in the same commit.
    """
    if dry_run or not chosen:
        return Asked(action=action, letters=chosen, carried_out=0, pending=0, dry_run=dry_run)
    at_work = None if group is None else FileRecords(group)

    def carry_out(some: Sequence[DeadLetter], operations: bool) -> None:
        busy = {} if at_work is None else at_work.read(at_work.assigned)

        def work(look: Look) -> None:
            if operations:
                _record(look, action, some, operator, reason, records.now())
            _without_owner(records, look, action, some, busy)

        records.write(work)

    for n in range(0, len(chosen), COMMIT_MAX):
        carry_out(chosen[n : n + COMMIT_MAX], True)
    left = _pending(records, chosen)
    end, again = REAL.monotonic() + wait_seconds, REAL.monotonic() + AGAIN_SECONDS
    while left and REAL.monotonic() < end:
        REAL.pause(0.05)
        if REAL.monotonic() > again:  # its owner may have died
            carry_out(left[:COMMIT_MAX], False)
            again = REAL.monotonic() + AGAIN_SECONDS
        left = _pending(records, left)
    return Asked(action=action, letters=chosen, carried_out=len(chosen) - len(left), pending=len(left), dry_run=False)


def _record(look: Look, action: str, chosen: Sequence[DeadLetter], operator: str, reason: str, now: int) -> None:
    for n in range(0, len(chosen), ROWS_MAX):
        some = {(x.service, x.topic, x.partition, x.position): x for x in chosen[n : n + ROWS_MAX]}
        written = look.execute(
            "insert into unlost_operation (at, operator, action, reason, service, topic, partition, position, id) values "
            + ", ".join(["(?, ?, ?, ?, ?, ?, ?, ?, ?)"] * len(some))
            + " returning service, topic, partition, position, number",
            [value for place, x in some.items() for value in (now, operator, action, reason, *place, x.id)],
        ).fetchall()
        look.execute(
            f"with asked(letter, operation) as (values {', '.join(['(cast(? as bigint), cast(? as bigint))'] * len(some))}) "
            "update unlost_shelf set request = ?, operation = asked.operation from asked where number = asked.letter",
            [*(value for *place, number in written for value in (some[tuple(place)].number, number)), action],
        )  # fmt: skip


def _without_owner(
    records: Records, look: Look, action: Action, chosen: Sequence[DeadLetter], busy: Collection[Unit]
) -> None:
    """Carries out what concerns units that no living process has. The new epoch fences whoever comes back."""
    units = {Unit(letter.service, letter.topic, letter.partition) for letter in chosen}
    free = set(records.take_over(look, units - set(busy)))
    now = records.now()
    for letter in chosen:
        unit = Unit(letter.service, letter.topic, letter.partition)
        if unit in free:
            request = Request(unit, letter.position, letter.key, action)
            run(rows.carry_out(request, now), lambda sql, bindings: look.execute(sql, bindings).fetchall())


def _pending(records: Records, chosen: Sequence[DeadLetter]) -> list[DeadLetter]:
    """Those whose request nobody has carried out yet."""
    asked = records.read(
        lambda look: {number for (number,) in look.execute("select number from unlost_shelf where request is not null")}
    )
    return [letter for letter in chosen if letter.number in asked]


def _letter(row: Sequence[Any]) -> DeadLetter:
    *values, behind = row
    fields = dict(zip(_COLUMNS.split(", "), values, strict=True))
    fields["attempts"] = msgspec.json.decode(fields["attempts"], type=list[Attempt])
    fields["parks"] = bool(fields["parks"])
    return DeadLetter(**fields, parked_behind=behind if fields["parks"] else 0)
