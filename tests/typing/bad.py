"""Planted mistakes. Both type checkers must find each; run by test_typing.py, never imported."""

from typing import Any

import unlost.pydantic
from unlost import upcast
from unlost.events import Event


class OrderCreated(Event, key="order_id"):
    order_id: str
    total_cents: int


class OrderPaid(Event, keyy="order_id"):  # mistake: misspelt
    order_id: str


order = OrderCreated("A1", total_cents=3)  # mistake: positional
order.total_cents = 4  # mistake: frozen


class OrderShipped(unlost.pydantic.Event, key="order_id", version=2):
    order_id: str


shipped = OrderShipped("A1")  # mistake: positional
shipped.order_id = "A2"  # mistake: frozen


@upcast(OrderShipped)  # mistake: from which version?
def from_nowhere(data: dict[str, Any]) -> dict[str, Any]:
    return data


@upcast(OrderShipped, from_version=1)  # mistake: returns nothing
def to_nothing(data: dict[str, Any]) -> None: ...
