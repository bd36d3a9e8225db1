"""A fifth service of the shop: a point for every whole dollar. It knows nothing of the shop but a wire name.

Added while the shop is running, it begins with the first payment ever made and catches up; nobody else has to
change a line, or even to notice.
"""

from unlost import App, Context, Event, Service


class OrderPaid(Event, view_of="shop.PaymentCompleted"):
    """What we read of the shop's event. What else is in it does not concern us."""

    customer_id: str
    amount_cents: int


loyalty = Service("loyalty", guarantee="effectively-once")


@loyalty.on(OrderPaid)
async def give_points(paid: OrderPaid, ctx: Context) -> None:
    async with ctx.transaction() as db:
        await db.execute(
            "insert into points values (?, ?) on conflict do update set points = points + excluded.points",
            (paid.customer_id, paid.amount_cents // 100),
        )


app = App(loyalty, schema="schema.sql", name="loyalty")
