"""The web app: the order and its event are one commit.

python manage.py runserver
"""

import json

from django.db import connection, transaction
from django.http import HttpRequest, JsonResponse
from django.urls import path
from django.views.decorators.csrf import csrf_exempt

from shop.models import Invoice, Order, OrderPlaced
from unlost import App

app = App(name="shop")


@csrf_exempt
def order(request: HttpRequest, order_id: str) -> JsonResponse:
    total_cents = int(json.loads(request.body)["total_cents"])
    with transaction.atomic(), app.outbox(connection) as outbox:
        Order.objects.update_or_create(id=order_id, defaults={"total_cents": total_cents})
        outbox.publish(OrderPlaced(order_id=order_id, total_cents=total_cents), id=f"{order_id}-placed")
    return JsonResponse({"order_id": order_id}, status=202)


def invoice(request: HttpRequest, order_id: str) -> JsonResponse:
    found = Invoice.objects.filter(order_id=order_id).first()
    return JsonResponse({"total_cents": found and found.total_cents})


urlpatterns = [path("orders/<str:order_id>", order), path("orders/<str:order_id>/invoice", invoice)]
