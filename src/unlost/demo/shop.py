"""The shop: four services that know the events, and not each other.

    OrderPlaced → order → OrderCreated → payment → PaymentRequested, PaymentConfirmed, PaymentApproved (or
    PaymentDeclined), PaymentCompleted → settlement

and one order to do something: payment sends SendReceipt to the queue that notification works off.

Each runs as its own process: `unlost run unlost.demo.shop --service payment`.
"""

from datetime import date

from unlost import App, Command, Context, Event, Reject, Service
from unlost.demo import mail

CARD_LIMIT_CENTS = 5_000_00  # no real order of the file reaches it


# The facts. All are about a customer, so all events of one customer keep one order.


class ShopEvent(Event, topic="shop", key="customer_id"):
    customer_id: str
    order_id: str


class OrderPlaced(ShopEvent):
    ordered_on: date
    items: int
    total_cents: int


class OrderCreated(ShopEvent):
    ordered_on: date
    total_cents: int


class PaymentRequested(ShopEvent):
    amount_cents: int


class PaymentConfirmed(ShopEvent):
    amount_cents: int


class PaymentApproved(ShopEvent):
    amount_cents: int


class PaymentDeclined(ShopEvent):
    reason: str


class PaymentCompleted(ShopEvent):
    ordered_on: date
    amount_cents: int


# An order to do something, for one service; those of one customer are carried out one after another.


class SendReceipt(Command, queue="receipts", key="customer_id"):
    customer_id: str
    order_id: str
    amount_cents: int


# The services.

order = Service("order", guarantee="effectively-once")

# An order that cannot be paid is nobody's fault but its own: the customer's other orders go on past it.
payment = Service("payment", guarantee="effectively-once", on_dead="skip", concurrency=64)

# A letter leaves the house, and no transaction reaches it there: at least once, with a key by which to know a second copy.
notification = Service("notification", guarantee="at-least-once")

settlement = Service("settlement", guarantee="effectively-once", concurrency=64)


@order.on(OrderPlaced)
async def create_order(placed: OrderPlaced, ctx: Context) -> None:
    who = {"customer_id": placed.customer_id, "order_id": placed.order_id}
    ctx.publish(OrderCreated(**who, ordered_on=placed.ordered_on, total_cents=placed.total_cents))


@payment.on(OrderCreated)
async def take_payment(created: OrderCreated, ctx: Context) -> None:
    if created.total_cents == 0:
        raise Reject("an order of 0.00 cannot be paid")
    who = {"customer_id": created.customer_id, "order_id": created.order_id}
    amount = created.total_cents
    approved = amount <= CARD_LIMIT_CENTS
    async with ctx.transaction() as db:
        state = "approved" if approved else "declined"
        await db.execute("insert into payment values (?, ?, ?, ?)", (*who.values(), amount, state))
        ctx.publish(PaymentRequested(**who, amount_cents=amount))
        ctx.publish(PaymentConfirmed(**who, amount_cents=amount))
        if approved:
            ctx.publish(PaymentApproved(**who, amount_cents=amount))
            ctx.publish(PaymentCompleted(**who, amount_cents=amount, ordered_on=created.ordered_on))
            ctx.send(SendReceipt(**who, amount_cents=amount))
        else:
            ctx.publish(PaymentDeclined(**who, reason="above the limit of the card"))


@notification.on(SendReceipt)
async def send_receipt(command: SendReceipt, ctx: Context) -> None:
    mail.send(command.order_id, f"{command.amount_cents / 100:.2f}", key=ctx.idempotency_key)


@settlement.on(PaymentCompleted)
async def settle(completed: PaymentCompleted, ctx: Context) -> None:
    day, cents = completed.ordered_on.isoformat(), completed.amount_cents
    async with ctx.transaction() as db:
        await db.execute(
            "insert into settlement values (?, ?, 1) "
            "on conflict (day) do update set cents = settlement.cents + excluded.cents, orders = settlement.orders + 1",
            (day, cents),
        )
        await db.execute(
            "insert into settled_order (order_id, customer_id, day, cents, number) "
            "select ?, ?, ?, ?, coalesce(max(number), 0) + 1 from settled_order where customer_id = ?",
            (completed.order_id, completed.customer_id, day, cents, completed.customer_id),
        )


app = App(order, payment, notification, settlement, schema="schema.sql", name="shop")
