"""Events and commands that are to leave later: where they stand until then. Statements for every store.

**Guarantee** what was delayed stands here from the commit that accepted it until the commit that puts it into the log (or
the outbox, where the log is elsewhere), or until it was cancelled, which is recorded.
**After a crash** it stands in one of these places, never in both and never in none.

`due` is in microseconds since 1970. Where a span was given (`delay=`) it is compared with a clock that does not jump while
a process lives; where a time was given (`at=`, `by_clock`), with the clock on the wall.
"""

from __future__ import annotations

from collections.abc import Sequence

from unlost.events import Envelope, decode_head, encode_head
from unlost.store.steps import Steps, one

BATCH = 500  # in one commit


def put(envelopes: Sequence[Envelope], now: int) -> Steps[None]:
    """The same id of the same source twice is one: the first counts."""
    for e in envelopes:
        yield (
            "insert into unlost_delayed (due, by_clock, source, id, topic, key, head, data, added) "
            "values (?, ?, ?, ?, ?, ?, ?, ?, ?) on conflict do nothing",
            (e.due, int(e.by_clock), e.source, e.id, e.topic, e.key, encode_head(e), e.data, now),
        )


def cancel(id: str, source: str, now: int) -> Steps[bool]:
    """Whether it still stood here. The cancellation is written down in the same commit."""
    gone = yield "delete from unlost_delayed where source = ? and id = ? returning topic", (source, id)
    for (topic,) in gone:
        yield (
            "insert into unlost_operation (at, operator, action, reason, service, topic, partition, position, id, "
            "carried_out, result) values (?, ?, 'cancel', 'cancelled before its time', '', ?, 0, 0, ?, ?, 'cancelled')",
            (now, source, topic, id, now),
        )
    return bool(gone)


def take_due(steady: int, wall: int) -> Steps[list[Envelope]]:
    """Takes out those whose time has come, the earliest first: for whoever puts them elsewhere in the same commit."""
    rows = yield (
        "select number, topic, key, head, data from unlost_delayed "
        f"where by_clock = 0 and due <= ? or by_clock = 1 and due <= ? order by due, number limit {BATCH}",
        (steady, wall),
    )
    found = []
    for number, topic, key, head, data in rows:
        yield "delete from unlost_delayed where number = ?", (number,)
        key, data = (None if value is None else bytes(value) for value in (key, data))
        found.append(decode_head(bytes(head), topic=topic, key=key, data=data))
    return found


def next_due(steady: int, wall: int) -> Steps[int | None]:
    """When the next one is due, on the steady clock; None: nothing waits."""
    row = yield from one(
        "select min(case when by_clock = 0 then due end), min(case when by_clock = 1 then due end) from unlost_delayed"
    )
    span, time = row
    times = [*([span] if span is not None else []), *([time - wall + steady] if time is not None else [])]
    return min(times, default=None)
