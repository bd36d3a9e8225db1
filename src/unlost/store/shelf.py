"""The shelf in the tables of a store: the same statements for every database."""

from __future__ import annotations

from unlost.errors import invariant
from unlost.store.port import CarriedOut, Request
from unlost.store.steps import Steps, one


def carry_out(request: Request, now: int) -> Steps[CarriedOut]:
    """Redrives or discards one dead letter. Whoever runs this owns the unit, and has made sure of it in this commit."""
    unit, place = request.unit, (*request.unit, request.position)
    row = yield from one(
        "select number, key, head, data, recorded, request, operation from unlost_shelf "
        "where service = ? and topic = ? and partition = ? and position = ?",
        place,
    )
    if row is None or row[5] != request.action:
        return "no longer wanted"
    number, key, head, data, recorded, action, operation = row
    yield "delete from unlost_shelf where number = ?", (number,)
    if action == "redrive":
        yield (
            "insert into unlost_waiting (service, topic, partition, position, key, due, attempt, history, head, data, "
            "recorded) values (?, ?, ?, ?, ?, ?, 0, '[]', ?, ?, ?)",
            (*place, key, now, head, data, recorded),
        )
    listed = yield (
        "update unlost_ledger set state = ?, since = ? "
        "where service = ? and topic = ? and partition = ? and position = ? returning position",
        ("retrying" if action == "redrive" else "removed", now, *place),
    )
    invariant(len(listed) == 1, f"{unit}:{request.position} was on the shelf, but the ledger did not list it")
    yield "update unlost_operation set carried_out = ? where number = ?", (now, operation)
    behind = yield from one(
        "select 1 from unlost_shelf where service = ? and topic = ? and partition = ? and key = ? and parks = 1",
        (*unit, key),
    )
    return "key still parked" if behind else "key is free"
