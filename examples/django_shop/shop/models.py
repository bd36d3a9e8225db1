from django.db import models

from unlost import Event


class OrderPlaced(Event, key="order_id"):
    order_id: str
    total_cents: int


class Order(models.Model):
    id = models.CharField(primary_key=True, max_length=40)
    total_cents = models.IntegerField()


class Invoice(models.Model):
    order = models.OneToOneField(Order, models.PROTECT, primary_key=True)
    total_cents = models.IntegerField()
