"""Three planted mistakes. Both type checkers must find each; run by test_typing.py, never imported."""

from unlost.events import Event


class OrderCreated(Event, key="order_id"):
    order_id: str
    total_cents: int


class OrderPaid(Event, keyy="order_id"):  # mistake: misspelt
    order_id: str


order = OrderCreated("A1", total_cents=3)  # mistake: positional
order.total_cents = 4  # mistake: frozen
