"""`unlost trace` on a real Kafka: what the cluster let go of is found where the store keeps it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

from cli_kit import Shell

SHOP = """
from unlost import App, Context, Event, Reject, Retry, Service, Topic

class OrderPlaced(Event, key="order_id"):
    order_id: str
    total_cents: int

class OrderPaid(Event, key="order_id", topic="payment"):
    order_id: str

billing = Service("billing", retry=Retry(attempts=1))

@billing.on(OrderPlaced)
async def charge(order: OrderPlaced, ctx: Context) -> None:
    if not order.total_cents:
        raise Reject("an order of 0.00 cannot be paid")
    ctx.publish(OrderPaid(order_id=order.order_id))

shipping = Service("shipping")

@shipping.on(OrderPaid)
async def ship(paid: OrderPaid) -> None:
    print("shipped", paid.order_id, flush=True)

app = App(billing, shipping, topics=[Topic("order", partitions=2), Topic("payment", partitions=2)])
"""


@pytest.fixture
def shell(tmp_path: Path, kafka: Any, fresh_prefix: str) -> Shell:
    shell = Shell(tmp_path)
    shell.env["UNLOST_BROKER"] = f"{kafka.url}?prefix={fresh_prefix}.&session.timeout.ms=6000"
    shell.write("shop.py", SHOP)
    return shell


def trace(shell: Shell, text: str) -> list[dict[str, Any]]:
    result = shell.quick("trace", text, "--json")
    assert result.code == 0, result
    return [e for flow in result.json["flows"] for e in flow["events"]]


def states(found: list[dict[str, Any]]) -> list[tuple[str, dict[str, str]]]:
    return [(e["type"], {b["service"]: b["state"] for b in e["branches"]}) for e in found]


def test_a_flow_before_and_after_the_cluster_forgets(shell: Shell, kafka: Any, fresh_prefix: str) -> None:
    lines = "".join(json.dumps({"order_id": id, "total_cents": cents}) + "\n" for id, cents in (("A1", 1), ("bad", 0)))
    shell.ok("publish", "OrderPlaced", "-", "--app", "shop", stdin=lines)
    with shell.start("run", "shop") as running:
        running.says("shipped A1")
        running.says("is dead (rejected)")
        shell.until(lambda s: not s["waiting"] + s["in_flight"])
        assert running.end() == 0

    whole = [("order.OrderPlaced", {"billing": "done"}), ("payment.OrderPaid", {"shipping": "done"})]
    assert states(trace(shell, "A1")) == whole
    (dead,) = trace(shell, "bad")
    assert states([dead]) == [("order.OrderPlaced", {"billing": "dead"})] and dead["in_log"]
    result = shell.quick("trace", "A2")
    assert result.code == 1 and "3 events searched, in the topics order, payment" in result.err

    admin = AdminClient({"bootstrap.servers": kafka.internal})
    places = [TopicPartition(f"{fresh_prefix}.order", partition, -1) for partition in (0, 1)]
    for future in admin.delete_records(places).values():
        future.result(20)
    (paid,) = trace(shell, "A1")  # its cause is gone, and the store does not keep what is done
    assert states([paid]) == whole[1:] and not paid["cause_found"]
    assert "which the log does not hold" in shell.quick("trace", "A1").out
    (kept,) = trace(shell, "bad")
    assert not kept["in_log"] and (kept["id"], kept["branches"]) == (dead["id"], dead["branches"])


def test_without_a_store_the_log_is_still_shown(shell: Shell) -> None:
    shell.ok("publish", "OrderPlaced", "order_id=A1", "total_cents=1", "--app", "shop", "--id", "A1-placed")
    result = shell.quick("trace", "A1", UNLOST_STORE=f"embedded://{shell.folder / 'elsewhere.db'}")
    assert result.code == 0 and "order.OrderPlaced  A1" in result.out
    assert "where the branches stand is not known: there is no store at" in result.err
