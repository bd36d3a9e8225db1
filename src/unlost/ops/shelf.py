"""The shelf, for operators: look, ask for a redrive or a discard. The owner of the partition carries it out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import apsw
import msgspec

from unlost.errors import UnlostError
from unlost.events import Envelope, decode_head, from_headers, seal
from unlost.events.topic import Decoder, Foreign, Unit
from unlost.sqlite.file import File
from unlost.sqlite.process import examine
from unlost.sqlite.transaction import Transaction
from unlost.store import shelf as shelf_rows
from unlost.store.port import Attempt, DeadLetter, Request
from unlost.store.steps import run
from unlost.world import REAL, rfc3339

_COLUMNS = (
    "number, service, handler, topic, partition, position, id, source, type, key, trace, reason, error_type, error, "
    "stack, attempts, parks, died, recorded, head, data, request"
)
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
    file: File,
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
    sql = f"select {_COLUMNS} from unlost_shelf {'where ' + ' and '.join(where) if where else ''} order by number"
    return file.read(lambda c: [_letter(c, row) for row in c.execute(sql, bindings).fetchall()])


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
    file: File,
    action: Action,
    chosen: Sequence[DeadLetter],
    *,
    operator: str,
    reason: str,
    dry_run: bool = False,
    wait_seconds: float = 5.0,
) -> Asked:
    """Records the request with the operator's name, and has it carried out.

    Where a process of the service lives, it does it (only it knows what of the key is in hand); where none does, it
    is done here, as the owner for a moment. **After a crash** of either the request stands, and the next owner
    carries it out; it is never done twice, because it takes the letter off the shelf in the same commit.
    """
    if dry_run or not chosen:
        return Asked(action=action, letters=chosen, carried_out=0, pending=0, dry_run=dry_run)
    file.write_sync(lambda tx: _record(tx, action, chosen, operator, reason))
    done = file.write_sync(lambda tx: _without_owner(file, tx, action, chosen))
    if done < len(chosen):
        end = REAL.monotonic() + wait_seconds
        while REAL.monotonic() < end and _pending(file, chosen):
            REAL.pause(0.05)
    pending = _pending(file, chosen)
    return Asked(action=action, letters=chosen, carried_out=len(chosen) - pending, pending=pending, dry_run=False)


def _record(tx: Transaction, action: str, chosen: Sequence[DeadLetter], operator: str, reason: str) -> None:
    for letter in chosen:
        _record_one(tx, action, letter, operator, reason)


def _record_one(tx: Transaction, action: str, letter: DeadLetter, operator: str, reason: str) -> None:
    tx.execute(
        "insert into unlost_operation (at, operator, action, reason, service, topic, partition, position, id) "
        "values (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            tx.world.now(), operator, action, reason,
            letter.service, letter.topic, letter.partition, letter.position, letter.id,
        ),
    )  # fmt: skip
    operation = tx.connection.last_insert_rowid()
    tx.execute(
        "update unlost_shelf set request = ?, operation = ? where number = ?", (action, operation, letter.number)
    )


def _without_owner(file: File, tx: Transaction, action: Action, chosen: Sequence[DeadLetter]) -> int:
    """Carries out what concerns units that no living process owns. The new epoch fences whoever comes back."""
    done = 0
    for letter in chosen:
        unit = Unit(letter.service, letter.topic, letter.partition)
        owner, epoch = tx.one(
            "select owner, epoch from unlost_progress where service = ? and topic = ? and partition = ?", unit
        )
        assigned = tx.one(
            "select process from unlost_assignment where service = ? and topic = ? and partition = ?", unit
        )
        owners = {process for process in (owner, assigned and assigned[0]) if process}
        if any(examine(file.run_folder, process).alive for process in owners):
            continue
        if owner is None:
            tx.execute(
                "update unlost_progress set epoch = ? where service = ? and topic = ? and partition = ?",
                (epoch + 1, *unit),
            )
        request = Request(unit, letter.position, letter.key, action)
        steps = shelf_rows.carry_out(request, tx.world.now())
        done += run(steps, lambda sql, bindings: tx.execute(sql, bindings).fetchall()) != "no longer wanted"
    return done


def _pending(file: File, chosen: Sequence[DeadLetter]) -> int:
    numbers = msgspec.json.encode([letter.number for letter in chosen]).decode()  # SQL variables would be too few
    sql = "select count(*) from unlost_shelf where request is not null and number in (select value from json_each(?))"
    return int(file.read(lambda c: c.execute(sql, (numbers,)).fetchone()[0]))


def _letter(c: apsw.Connection, row: tuple[Any, ...]) -> DeadLetter:
    fields = dict(zip(_COLUMNS.split(", "), row, strict=True))
    behind = c.execute(
        "select count(*) from unlost_waiting where service = ? and topic = ? and partition = ? and key = ?",
        (fields["service"], fields["topic"], fields["partition"], fields["key"]),
    ).fetchone()[0]
    fields["attempts"] = msgspec.json.decode(fields["attempts"], type=list[Attempt])
    fields["parks"] = bool(fields["parks"])
    return DeadLetter(**fields, parked_behind=behind if fields["parks"] else 0)
