"""What type checkers accept. Run by test_typing.py, never imported."""

from typing import assert_type

from unlost.events import Catalog, Command, Event, Sensitive, decode_data, key_of, seal


class OrderCreated(Event, key="order_id", version=2):
    order_id: str
    total_cents: int
    email: Sensitive[str] = "nobody"


class ShopEvent(Event, topic="shop", key="customer_id"): ...


class BasketFilled(ShopEvent):
    customer_id: str
    items: int = 1


class OrderTotal(Event, view_of="order.OrderCreated"):
    total_cents: int


class Ping(Event, topic="pings", type="ping.v1", past_tense=False, rename="camel", forbid_unknown_fields=True):
    id: str


class SendReceipt(Command, queue="receipts", key="customer_id"):
    customer_id: str


event = OrderCreated(order_id="A1", total_cents=3, email="a@b.c")
assert_type(event.email, str)
assert_type(event.total_cents, int)
assert_type(BasketFilled(customer_id="c").items, int)
assert_type(key_of(SendReceipt(customer_id="c")), bytes | None)
envelope = seal(event, source="shop", now=0)
assert_type(decode_data(envelope, OrderTotal), OrderTotal)
assert_type(Catalog([OrderCreated, SendReceipt]).decode(envelope, OrderCreated), OrderCreated)
