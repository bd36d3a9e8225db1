"""The orders: real ones, from the file inside the package. What is true of them is computed here, never written down."""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime, time
from decimal import Decimal
from importlib import resources
from typing import NamedTuple

from unlost.demo.shop import OrderPlaced
from unlost.events import Envelope, seal
from unlost.world import REAL


class Order(NamedTuple):
    number: int  # its line in the file, from 1
    customer_id: str
    day: date
    items: int
    cents: int

    @property
    def id(self) -> str:
        return f"order-{self.number:05d}"

    def placed(self) -> Envelope:
        """What the web front publishes. Its id follows from the order, so publishing it twice is at most a duplicate."""
        event = OrderPlaced(
            customer_id=self.customer_id, order_id=self.id, ordered_on=self.day, items=self.items, total_cents=self.cents
        )  # fmt: skip
        when = datetime.combine(self.day, time(), UTC)
        return seal(event, source="web", id=f"{self.id}-placed", occurred_at=when, now=REAL.now())


def read_orders(limit: int | None = None) -> list[Order]:
    """The first orders of the file, or all."""
    packed = (resources.files("unlost.demo") / "data" / "cdnow-orders.csv.gz").read_bytes()
    lines = gzip.decompress(packed).decode().splitlines()[1:]
    return [_order(number, line) for number, line in enumerate(lines[:limit], 1)]


def as_they_came(orders: Iterable[Order]) -> list[Order]:
    """In the sequence of their days: the file is sorted by customer. Each customer's own orders keep their sequence."""
    return sorted(orders, key=lambda order: order.day)


def per_day(orders: Sequence[Order]) -> dict[str, tuple[int, int]]:
    """Cents and number of the orders that can be paid."""
    days: dict[str, tuple[int, int]] = {}
    for order in orders:
        if order.cents:
            cents, number = days.get(order.day.isoformat(), (0, 0))
            days[order.day.isoformat()] = (cents + order.cents, number + 1)
    return days


def _order(number: int, line: str) -> Order:
    customer_id, day, items, dollars = line.split(",")
    return Order(number, customer_id, date.fromisoformat(day), int(items), int(Decimal(dollars) * 100))
