"""What operators do with a whole service: hold it, end it, give it another name. The same statements for every database.

The hold of a service is one value of its row: whoever takes a unit of it, or works on some, looks there.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from unlost.errors import UsageError, invariant
from unlost.events.topic import Unit
from unlost.store.port import Hold
from unlost.store.progress import Progress
from unlost.store.steps import Steps, one

# every table with a column `service` that says whose row it is; `unlost_operation` keeps the name of its time
TABLES = ("progress", "epoch", "inbox", "ledger", "waiting", "shelf", "gap")
_UNIT = "service = ? and topic = ? and partition = ?"


def decode(hold: str | None) -> Hold | None:
    return None if hold is None else msgspec.json.decode(hold, type=Hold)


def held(service: str) -> Steps[Hold | None]:
    """None: nothing is known against its working."""
    row = yield from one("select hold from unlost_service where name = ?", (service,))
    return None if row is None else decode(row[0])


def ended(service: str) -> Steps[bool]:
    """Whether it has nothing to register for: an operator has ended it, or given it another name."""
    hold = yield from held(service)
    return hold is not None and hold.state != "paused"


def admit(services: Collection[str]) -> Steps[None]:
    """In the commit in which somebody takes units of these services.

    Raises:
        UsageError: an operator has ended one of them, or given it another name.
    """
    for service in sorted(set(services)):
        hold = yield from held(service)
        if hold is not None and hold.state != "paused":
            raise refused(service, hold)


def refused(service: str, hold: Hold) -> UsageError:
    if hold.state == "renamed":
        return UsageError(
            "UL1444", f"the service {service!r} was renamed to {hold.to!r}", found=hold.said,
            fix=f"run the code that calls it {hold.to!r}; back: unlost service rename {hold.to} {service}",
        )  # fmt: skip
    return UsageError(
        "UL1443", f"the service {service!r} is retired", found=hold.said,
        fix=f"take it out of the App, or run the others (--service); back: unlost service resume {service}",
    )  # fmt: skip


def put(service: str, hold: Hold | None) -> Steps[None]:
    text = None if hold is None else msgspec.json.encode(hold).decode()
    rows = yield "update unlost_service set hold = ? where name = ? returning name", (text, service)
    invariant(len(rows) == 1, f"{service} has a row of its own")


def give_queues_up(service: str) -> Steps[None]:
    """Another service may carry out their commands from now on."""
    row = yield from one("select policy from unlost_service where name = ?", (service,))
    policy = {name: value for name, value in msgspec.json.decode(row[0]).items() if name != "queues"}
    text = msgspec.json.encode(policy, order="sorted").decode()
    yield "update unlost_service set policy = ? where name = ?", (text, service)


def remove_kept(service: str, now: int) -> Steps[int]:
    """What waits or is dead is removed; returns how many events that were."""
    listed = yield (
        "update unlost_ledger set state = 'removed', since = ? "
        "where service = ? and state in ('retrying', 'parked', 'dead') returning position",
        (now, service),
    )
    yield "delete from unlost_waiting where service = ?", (service,)
    yield "delete from unlost_shelf where service = ?", (service,)
    yield (
        "update unlost_operation set carried_out = ?, result = 'the service was retired' "
        "where service = ? and carried_out is null",
        (now, service),
    )
    return len(listed)


def save(unit: Unit, progress: Progress, abandoned: Sequence[int], now: int) -> Steps[None]:
    """The last progress of a unit that nobody has: whoever runs this has taken it over in this commit."""
    for position in abandoned:
        yield "insert into unlost_ledger values (?, ?, ?, ?, 'abandoned', '', ?)", (*unit, position, now)
    yield (
        "update unlost_progress set position = ?, fated = ?, counts = ?, digest = ?, begun = ?, attempts = '{}', "
        f"owner = null, clean = 1 where {_UNIT}",
        (
            progress.position, progress.fated.encode(), msgspec.json.encode(progress.counts).decode(), progress.digest,
            progress.begun.encode(), *unit,
        ),
    )  # fmt: skip


def expired(unit: Unit, start: int, end: int, declared: bool, now: int) -> Steps[None]:
    why = "retention removed them before they were handled, and before the service was retired"
    yield (
        "insert into unlost_gap values (?, ?, ?, ?, ?, 'expired', ?, ?, ?)",
        (*unit, start, end, why, now, int(declared)),
    )


def has_worked(service: str) -> Steps[bool]:
    """Whether anything is kept of it that a start has not made: it has had a partition once."""
    row = yield from one("select 1 from unlost_progress where service = ? and epoch > 0 limit 1", (service,))
    for table in TABLES[1:]:
        row = row or (yield from one(f"select 1 from unlost_{table} where service = ? limit 1", (service,)))
    return row is not None


def move(old: str, new: str, hold: Hold) -> Steps[None]:
    """All that is of `old` becomes `new`'s; `hold` stays behind, so that the old name does not begin anew. Nothing of
    `new` is there but what its first start has made."""
    row = yield from one("select policy, created, hold from unlost_service where name = ?", (old,))
    yield "delete from unlost_progress where service = ?", (new,)
    yield "delete from unlost_service where name = ?", (new,)
    yield "insert into unlost_service (name, policy, created, hold) values (?, ?, ?, ?)", (new, *row)
    for table in TABLES:
        yield f"update unlost_{table} set service = ? where service = ?", (new, old)
    yield "update unlost_service set policy = '{}' where name = ?", (old,)
    yield from put(old, hold)


def record(service: str, action: str, operator: str, reason: str, result: str, now: int) -> Steps[None]:
    yield (
        "insert into unlost_operation (at, operator, action, reason, service, topic, partition, position, id, carried_out, "
        "result) values (?, ?, ?, ?, ?, '', 0, 0, '', ?, ?)",
        (now, operator, action, reason, service, now, result),
    )
