"""The service: the invoice and the mark "handled" are one commit.

unlost run
"""

import os

import django
from django.db import connection

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "shop.settings")
django.setup()

from shop.models import Invoice, OrderPlaced  # noqa: E402 - models need the settings
from unlost import App, Context, Service  # noqa: E402

billing = Service("billing", guarantee="effectively-once")


@billing.on(OrderPlaced)
def send_invoice(order: OrderPlaced, ctx: Context) -> None:
    with ctx.transaction(connection):  # begins and commits, as atomic() does
        Invoice.objects.create(order_id=order.order_id, total_cents=order.total_cents)


app = App(billing)
