"""`unlost trace`, where the store is in a real PostgreSQL: the same branches, from its tables."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import confluent_kafka.admin  # noqa: F401 - before `Shell.quick`, which forgets what it was the first to import
import psycopg
import pytest

from unlost.ops import store as migrations
from unlost.ops.trace import UNSURE

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

from cli_kit import Shell

SHOP = """
from unlost import App, Context, Event, Reject, Retry, Service

class OrderPlaced(Event, key="order_id"):
    order_id: str
    what: str = "pay"

class OrderPaid(Event, key="order_id"):
    order_id: str

billing = Service("billing", retry=Retry(attempts=3, first=3600, max=3600))
shipping = Service("shipping", guarantee="effectively-once")

@billing.on(OrderPlaced)
async def charge(order: OrderPlaced, ctx: Context) -> None:
    if order.what == "reject":
        raise Reject("an order of 0.00 cannot be paid")
    if order.what == "fail":
        raise ValueError("the bank is closed")
    ctx.publish(OrderPaid(order_id=order.order_id))

@shipping.on(OrderPlaced)
async def pack(order: OrderPlaced) -> None: ...

mail = Service("mail")

@mail.on(OrderPaid)
async def write(paid: OrderPaid) -> None:
    print("paid", paid.order_id, flush=True)

app = App(billing, shipping, mail)
"""


@pytest.fixture
def shell(tmp_path: Path, database: str) -> Shell:
    migrations.migrate(database, operator="test", reason="")
    shell = Shell(tmp_path)
    shell.write("shop.py", SHOP)
    shell.env["UNLOST_STORE"] = database
    return shell


def test_where_each_branch_stands(shell: Shell, database: str) -> None:
    orders = [("good-1", "pay"), ("zero-1", "reject"), ("zero-1", "pay"), ("late-1", "fail")]
    lines = "".join(json.dumps({"order_id": key, "what": what}) + "\n" for key, what in orders)
    shell.ok("publish", "OrderPlaced", "-", "--app", "shop", stdin=lines)
    shell.ok("publish", "OrderPlaced", "order_id=good-2", "--id", "order-0002-placed", "--app", "shop")
    with shell.start("run", "shop") as running:
        running.says("paid good-1")
        running.says("paid good-2")
        shell.until(lambda s: not s["waiting"] + s["in_flight"])
        assert running.end(signal.SIGTERM) == 0

    good, other = events(shell, "good-1"), events(shell, "order-0002-placed")
    # `shipping` has skipped the second, and has the mark "handled" of the first: of an id that is a UUID, or a text
    for placed, paid in (good, other):
        assert (placed["type"], paid["type"], paid["depth"]) == ("order.OrderPlaced", "order.OrderPaid", 1)
        assert state_of(placed) == {"billing": "done", "shipping": "done", "mail": UNSURE}
        assert state_of(paid) == {"billing": UNSURE, "shipping": UNSURE, "mail": UNSURE}
    dead, parked = events(shell, "zero-1")
    assert [state_of(e)["billing"] for e in (dead, parked)] == ["dead", "parked"]
    assert [state_of(e)["shipping"] for e in (dead, parked)] == ["done", "done"]
    (late,) = events(shell, "late-1")
    (retrying,) = [b for b in late["branches"] if b["service"] == "billing"]
    assert retrying["state"] == "retrying" and retrying["due"] > retrying["attempts"][0]["at"]
    assert retrying["attempts"][0]["error"] == "ValueError: the bank is closed"
    assert "unlost dead show" in shell.quick("trace", "zero-1").out

    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("delete from unlost.unlost_shelf")
    assert state_of(events(shell, "zero-1")[0])["billing"] == "unaccounted"


def events(shell: Shell, text: str) -> list[dict[str, Any]]:
    result = shell.quick("trace", text, "--json")
    assert result.code == 0, result
    return [e for flow in result.json["flows"] for e in flow["events"]]


def state_of(e: dict[str, Any]) -> dict[str, str]:
    return {b["service"]: b["state"] for b in e["branches"]}
