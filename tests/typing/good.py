"""What type checkers accept. Run by test_typing.py, never imported."""

from typing import Any, assert_type

import pydantic

import unlost.pydantic
from unlost import Context, Service, upcast
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


@upcast(OrderCreated, from_version=1)
def with_email(data: dict[str, Any]) -> dict[str, Any]:
    return {**data, "email": "nobody"}


assert_type(with_email({}), dict[str, Any])


class OrderPaid(unlost.pydantic.Event, key="order_id"):
    order_id: str
    cents: int = pydantic.Field(ge=0)
    email: Sensitive[str] = "nobody"


class SendBill(unlost.pydantic.Command, queue="bills"):
    order_id: str


paid = OrderPaid(order_id="A1", cents=3)
assert_type(paid.email, str)
assert_type(key_of(paid), bytes | None)
assert_type(paid.model_dump(), dict[str, Any])
billing = Service("billing")


@billing.on(OrderPaid)
async def bill(event: OrderPaid, ctx: Context) -> None:
    ctx.publish(event)
    ctx.send(SendBill(order_id=event.order_id))
