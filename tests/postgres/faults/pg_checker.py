"""The independent checker of the shop on PostgreSQL: from its rows, the broker's log and the file of orders to what is wrong.

Pure, and linear but for one sort per customer. It knows two of unlost's promises and none of its code: a row and its
event are one (no data without event, no event without data), and what follows from an event happens once, in the order
of its key. What it needs of unlost's own tables (counters, the shelf) comes as plain numbers and names.

Every line begins with the kind of what is wrong: `zombie` (data without event), `ghost` (event without data), `lost`,
`doubled`, `inversion`, `altered`, `phantom`, `money`, `shelf`, `counters`, `marks`, `torn`, `unplaced`, `foreign`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

PLACED, CREATED, COMPLETED = "OrderPlaced", "OrderCreated", "PaymentCompleted"
# service -> the event that it handles, and whether an order that cannot be paid is one for it
SERVICES = {
    "order": (PLACED, True),
    "payment": (CREATED, False),
    "invoice": (CREATED, True),
    "settlement": (COMPLETED, False),
    "stock": (COMPLETED, False),
    "reminder": (COMPLETED, False),
}
TABLELESS = {"order"}  # what it does is to publish
ANY_ORDER = {"letter"}  # its events come when they are due


class InFile(Protocol):
    """An order of the file. A customer's orders were placed one after the other, in the sequence of their numbers."""

    @property
    def id(self) -> str: ...
    @property
    def number(self) -> int: ...
    @property
    def customer_id(self) -> str: ...
    @property
    def day(self) -> Any: ...
    @property
    def items(self) -> int: ...
    @property
    def cents(self) -> int: ...


class Ordered(NamedTuple):
    """A committed row of the web front."""

    number: int
    order_id: str
    customer_id: str
    day: str
    cents: int


class Effect(NamedTuple):
    """A row that a handler's transaction left; within one customer their numbers follow the commits."""

    number: int
    service: str
    order_id: str
    customer_id: str
    day: str
    cents: int


class Logged(NamedTuple):
    topic: str
    partition: int
    position: int
    id: str
    type: str
    key: bytes | None
    data: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.type.rpartition(".")[2]


class Counters(NamedTuple):
    shards: Sequence[tuple[int, int, int]]  # number, next, confirmed
    outbox: int
    hands: int
    waiting: int
    marks: Mapping[str, int]
    days: Mapping[str, tuple[int, int]]  # cents and orders, added up by the settlement handlers
    moved: int
    dead: Sequence[tuple[str, str, str]]  # service, reason, order


class Found(NamedTuple):
    orders: Sequence[Ordered]
    log: Sequence[Logged]
    effects: Sequence[Effect]
    counters: Counters


def check(
    expected: Sequence[InFile],
    found: Found,
    services: Collection[str] = tuple(SERVICES),
    *,
    told: Mapping[str, Sequence[str]] | None = None,
    dead: Collection[tuple[str, str, str]] = (),
    complete: bool = True,
) -> list[str]:
    """All that is wrong with a finished run in which these services took part.

    `told`: per service without a table, the orders that it completed, in the sequence of time. `dead`: what must be on
    the shelf beside the orders that cannot be paid. `complete`: every expected order must have been placed.
    """
    by_id = {order.id: order for order in expected}
    rows = {row.order_id: row for row in found.orders}
    wrong = list(_rows(by_id, rows, complete))
    wrong += _pairs(by_id, rows, found.log)
    wrong += _derived(found.log)
    killed = {(service, order_id) for service, _, order_id in dead}
    for service in services:
        _, unpayable_too = SERVICES[service]
        wanted = {
            r.order_id for r in rows.values() if (r.cents or unpayable_too) and (service, r.order_id) not in killed
        }
        if service not in TABLELESS:
            mine = [e for e in found.effects if e.service == service]
            wrong += _effects(service, wanted, mine, rows)
            wrong += _inversions(f"effects of {service}", ((e.order_id, e.customer_id) for e in mine), by_id)
        marked = found.counters.marks.get(service, 0)
        if marked != len(wanted):
            wrong.append(f"marks: {service} has {marked} marks for {len(wanted)} events")
    for service, done in (told or {}).items():
        wanted = {r.order_id for r in rows.values() if r.cents}
        wrong += [f"lost: {service} never completed {id}" for id in sorted(wanted - set(done))]
        if service not in ANY_ORDER:
            wrong += _inversions(
                f"completions of {service}", ((id, rows[id].customer_id) for id in done if id in rows), by_id
            )
    for name in (PLACED, CREATED, COMPLETED):
        seen = ((e.data["order_id"], e.data["customer_id"]) for e in found.log if e.name == name)
        wrong += _inversions(f"{name} in the log", seen, by_id)
    if "settlement" in services:
        wrong += _money(rows.values(), found.counters.days)
    if "stock" in services:
        times = sum(e.service == "stock" for e in found.effects)
        if found.counters.moved != 2 * times:
            wrong.append(f"torn: the tills were moved {found.counters.moved} times by {times} transactions of two each")
    if "payment" in services:
        unpayable = {("payment", "rejected", r.order_id) for r in rows.values() if not r.cents}
        wrong += _shelf(unpayable | set(dead), set(found.counters.dead))
    else:
        wrong += _shelf(set(dead), set(found.counters.dead))
    return wrong + list(_counters(found))


def at_most_once(
    delivered: Sequence[str], named: Collection[str], log: Sequence[Logged], unnamed: int = 0
) -> Iterator[str]:
    """What is wrong with a service that gets payments at most once. `delivered`: the order of each call of its handler;
    `named`: the ids of events that the books call abandoned; `unnamed`: how many more they only count."""
    there = [e for e in log if e.name == COMPLETED]
    published = Counter(e.data["order_id"] for e in there)
    times = Counter(delivered)
    for id, n in times.items():
        if n > published[id]:
            yield f"doubled: {id} was delivered {n} times at most once, and stands in the log {published[id]} times"
    known = {e.data["order_id"] for e in there if e.id in named}
    missing = sorted(published.keys() - times.keys() - known)
    for id in missing if len(missing) > unnamed else ():
        yield f"lost: {id} was not delivered at most once, and nobody names it"


def kinds(wrong: Iterable[str]) -> set[str]:
    return {line.partition(":")[0] for line in wrong}


def _rows(by_id: Mapping[str, InFile], rows: Mapping[str, Ordered], complete: bool) -> Iterator[str]:
    for id, order in by_id.items():
        row = rows.get(id)
        if row is None:
            if complete:
                yield f"unplaced: {id} is in the file, and there is no row of it"
        elif (row.customer_id, row.day, row.cents) != (order.customer_id, order.day.isoformat(), order.cents):
            yield f"foreign: {id} is another order in the file: {row}"
    for id in rows.keys() - by_id.keys():
        yield f"foreign: {id} is not in the file"


def _pairs(by_id: Mapping[str, InFile], rows: Mapping[str, Ordered], log: Sequence[Logged]) -> Iterator[str]:
    """Each row has its event, each event its row, and they say the same."""
    events: dict[str, Logged] = {}
    for e in log:
        if e.name != PLACED:
            continue
        id = e.data["order_id"]
        row = rows.get(id)
        if row is None:
            yield f"ghost: {e.id} at {e.partition}/{e.position} is about {id}, of which there is no row"
            continue
        events[id] = e
        data = e.data
        said = (
            e.id,
            data["customer_id"],
            data["ordered_on"],
            data["total_cents"],
            data["items"],
            (e.key or b"").decode(),
        )
        items = by_id[id].items if id in by_id else data["items"]
        if said != (f"{id}-placed", row.customer_id, row.day, row.cents, items, row.customer_id):
            yield f"altered: {id} is {row}, and its event says {said}"
    for id in rows.keys() - events.keys():
        yield f"zombie: {id} was committed, and there is no event of it"


def _derived(log: Sequence[Logged]) -> Iterator[str]:
    """What a handler published again has the id that it had before, and stands in the same partition."""
    ids: dict[tuple[str, str], set[tuple[str, str, int]]] = defaultdict(set)
    for e in log:
        ids[e.name, e.data["order_id"]].add((e.id, e.topic, e.partition))
    for (name, order), known in ids.items():
        if len(known) > 1:
            yield f"doubled: there are {len(known)} events {name} of {order}: {sorted(known)}"


def _effects(service: str, wanted: set[str], mine: Sequence[Effect], rows: Mapping[str, Ordered]) -> Iterator[str]:
    times = Counter(e.order_id for e in mine)
    for id in sorted(wanted - times.keys()):
        yield f"lost: {id} had no effect in {service}"
    for id, n in times.items():
        if n > 1:
            yield f"doubled: {id} took effect {n} times in {service}"
    for e in mine:
        row = rows.get(e.order_id)
        if row is None or e.order_id not in wanted:
            yield f"phantom: {e}"
        elif (e.customer_id, e.day, e.cents) != (row.customer_id, row.day, row.cents):
            yield f"altered: {e} is about {row}"


def _inversions(where: str, sequence: Iterable[tuple[str, str]], by_id: Mapping[str, InFile]) -> Iterator[str]:
    """First occurrences against the sequence in which a customer placed the orders; repeats are no inversion."""
    latest: dict[str, int] = {}
    seen: set[str] = set()
    for id, customer in sequence:
        if id in seen or id not in by_id:
            continue
        seen.add(id)
        number = by_id[id].number
        if number < latest.get(customer, -1):
            yield f"inversion: {where}: {id} comes after a later order of its customer"
        latest[customer] = max(number, latest.get(customer, -1))


def _money(rows: Iterable[Ordered], days: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    expected: dict[str, tuple[int, int]] = {}
    for row in rows:
        if row.cents:
            cents, n = expected.get(row.day, (0, 0))
            expected[row.day] = (cents + row.cents, n + 1)
    for day in sorted(expected.keys() | days.keys()):
        if expected.get(day) != days.get(day):
            yield f"money: {day}: settled are {days.get(day)} (cents, orders), the file says {expected.get(day)}"


def _shelf(expected: set[tuple[str, str, str]], there: set[tuple[str, str, str]]) -> Iterator[str]:
    """An event that was sent twice may be rejected twice."""
    for entry in sorted(expected - there):
        yield f"shelf: {entry} is not on it"
    for entry in sorted(there - expected):
        yield f"shelf: {entry} should not be on it"


def _counters(found: Found) -> Iterator[str]:
    """Everything was sent: what was ever numbered is confirmed, and what was confirmed is in the log, each once."""
    c = found.counters
    for shard, next_, confirmed in c.shards:
        if next_ - 1 != confirmed:
            yield f"counters: shard {shard} has numbered {next_ - 1}, and {confirmed} are confirmed"
    for what, count in (("in the outbox", c.outbox), ("in the hands of relays", c.hands), ("waiting", c.waiting)):
        if count:
            yield f"counters: {count} events are {what}"
    confirmed, ids = sum(row[2] for row in c.shards), len({e.id for e in found.log})
    if confirmed != ids:
        yield f"counters: {confirmed} events were confirmed, and the log has {ids}"
