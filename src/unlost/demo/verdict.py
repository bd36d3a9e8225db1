"""What came of it: the shop's own tables, the letters and the notebooks, against the file of orders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from unlost.demo.orders import Order, per_day
from unlost.demo.service import Place
from unlost.ops import shelf
from unlost.store.port import Look, Records


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """Computed from the file of orders and from what the services did; unlost's own books have no part in it."""

    in_file_cents: int
    settled_cents: int
    days: int
    days_agreeing: int  # in money and in number
    unsettled: list[str]  # orders that should have been settled, and were not
    settled_twice: list[str]
    foreign: list[str]  # settled, but not payable or not in the file
    inversions: int  # orders of a customer that were settled after a later one
    dead: list[str]  # orders on the shelf
    not_on_shelf: list[str]  # orders that cannot be paid, and are not on the shelf
    dead_wrongly: int  # dead letters that are not one of these orders
    unsent: list[str]  # payments without a letter
    letters_twice: int  # letters that were sent again under the same idempotency key
    delivered_again: int  # deliveries that came again after a kill
    tried_again: int  # deliveries that the same process began again

    @property
    def agrees(self) -> bool:
        return (
            self.in_file_cents == self.settled_cents
            and self.days == self.days_agreeing
            and not (self.unsettled or self.settled_twice or self.foreign or self.unsent or self.not_on_shelf)
            and self.inversions == self.dead_wrongly == 0
        )


def compare(
    orders: Sequence[Order], records: Records, letters: Path, notes: Mapping[str, Sequence[Counter[Place]]]
) -> Verdict:
    """`notes`: per service the notebooks of its processes, in the sequence of their lives."""
    payable = {order.id for order in orders if order.cents}
    unpayable = {order.id for order in orders if not order.cents}
    expected = per_day(orders)
    by_day, settled = records.read(_read_tables)
    times = Counter(id for id, _ in settled)
    dead, strangers = _dead_orders(records)
    sent = _sent(letters)
    again = tried = 0
    for books in notes.values():
        given: Counter[Place] = Counter()
        for book in books:
            again += sum(1 for place in book if place in given)
            tried += book.total() - len(book)
            given.update(book)
    return Verdict(
        in_file_cents=sum(order.cents for order in orders),
        settled_cents=sum(cents for cents, _ in by_day.values()),
        days=len(expected),
        days_agreeing=sum(1 for day, sums in expected.items() if by_day.get(day) == sums),
        unsettled=sorted(payable - times.keys()),
        settled_twice=sorted(id for id, n in times.items() if n > 1),
        foreign=sorted(times.keys() - payable) + sorted(by_day.keys() - expected.keys()),
        inversions=_inversions(settled),
        dead=sorted(dead),
        not_on_shelf=sorted(unpayable - set(dead)),
        dead_wrongly=strangers + len(dead) - len(set(dead) & unpayable),
        unsent=sorted(payable - {order_id for _, order_id in sent}),
        letters_twice=sent.total() - len(sent),
        delivered_again=again,
        tried_again=tried,
    )


def _read_tables(look: Look) -> tuple[dict[str, tuple[int, int]], list[tuple[str, str]]]:
    days = {day: (cents, number) for day, cents, number in look.execute("select day, cents, orders from settlement")}
    rows = look.execute("select order_id, customer_id from settled_order order by customer_id, number").fetchall()
    return days, [(order_id, customer_id) for order_id, customer_id in rows]


def _dead_orders(records: Records) -> tuple[list[str], int]:
    """Orders that payment put on the shelf, and how many dead letters are something else."""
    dead, strangers = [], 0
    for letter in shelf.letters(records):
        if letter.service == "payment" and letter.reason == "rejected" and letter.data is not None:
            dead.append(str(msgspec.json.decode(letter.data)["order_id"]))
        else:
            strangers += 1
    return dead, strangers


def _sent(letters: Path) -> Counter[tuple[str, str]]:
    """How often each letter was sent, by idempotency key and order."""
    if not letters.exists():
        return Counter()
    lines = (line.split() for line in letters.read_text().splitlines())
    return Counter((key, order_id) for key, order_id, _ in lines)


def _inversions(settled: Sequence[tuple[str, str]]) -> int:
    latest: dict[str, str] = {}
    inversions = 0
    for order_id, customer_id in settled:
        if order_id < latest.get(customer_id, ""):
            inversions += 1
        latest[customer_id] = max(order_id, latest.get(customer_id, ""))
    return inversions
