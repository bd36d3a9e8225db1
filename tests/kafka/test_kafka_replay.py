"""`unlost replay` on a real Kafka, and with the store in PostgreSQL: the same promises through the ports."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import confluent_kafka.admin  # noqa: F401 - before `Shell.quick`, which forgets what it was the first to import
import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient

from unlost.ops import store as migrations

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

from cli_kit import Shell

ORDERS, KEYS, KILLS = 60, 7, 2
SHOP = """
import asyncio, json, os
from unlost import App, Context, Event, Retry, Service, Topic

class OrderPlaced(Event, key="order_id"):
    order_id: str
    n: int

billing = Service("billing", retry=Retry(attempts=100))

@billing.on(OrderPlaced)
async def charge(order: OrderPlaced, ctx: Context) -> None:
    if ctx.replaying:
        await asyncio.sleep(0.03)
    with open("notes", "a") as f:
        f.write(json.dumps({"n": order.n, "key": order.order_id, "replaying": ctx.replaying}) + "\\n")

app = App(billing, topics=[Topic("order", partitions=2)])
"""


@pytest.fixture
def shell(tmp_path: Path, kafka: Any, fresh_prefix: str) -> Shell:
    """A folder with a shop, on a cluster of which it uses its own part."""
    shell = Shell(tmp_path)
    shell.env["UNLOST_BROKER"] = f"{kafka.url}?prefix={fresh_prefix}.&session.timeout.ms=6000"
    shell.write("shop.py", SHOP)
    return shell


def place(shell: Shell) -> None:
    lines = "".join(json.dumps({"order_id": f"k{n % KEYS}", "n": n}) + "\n" for n in range(ORDERS))
    shell.ok("publish", "OrderPlaced", "-", "--app", "shop", stdin=lines)


def noted(shell: Shell, *, replaying: bool) -> list[dict[str, Any]]:
    path = shell.folder / "notes"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [x for x in lines if x["replaying"] == replaying]


def killed_and_carried_on(shell: Shell) -> None:
    """Killed in the middle, then to the end; then the handlers' own notes are compared with what was published."""
    place(shell)
    shell.handle_all()
    before = shell.quick("service", "show", "billing", "--json").json["units"]
    for n in range(KILLS):
        with shell.start("replay", "--service", "billing", "--yes", "--app", "shop") as process:
            wanted, end = len(noted(shell, replaying=True)) + 3 + 5 * n, time.monotonic() + 40
            while len(noted(shell, replaying=True)) < wanted:
                assert process.process.poll() is None and time.monotonic() < end, process.text()
                time.sleep(0.002)
            os.kill(process.process.pid, signal.SIGKILL)
            process.process.wait(30)
    [open_one] = shell.quick("replay", "--list", "--json").json["replays"]
    assert open_one["name"] == "billing.replay-1" and open_one["left"] > 0
    ended = shell.ok("replay", "--resume", "billing.replay-1", "--app", "shop", "--json").json
    assert (ended["state"], ended["done"], ended["unaccounted"]) == ("complete", ORDERS, 0)
    again = noted(shell, replaying=True)
    assert {x["n"] for x in again} == set(range(ORDERS))
    assert Counter(x["n"] for x in noted(shell, replaying=False)) == dict.fromkeys(range(ORDERS), 1)
    for key in {x["key"] for x in again}:
        firsts = list(dict.fromkeys(x["n"] for x in again if x["key"] == key))
        assert firsts == sorted(firsts)
    after = shell.quick("service", "show", "billing", "--json").json["units"]
    assert [(u["partition"], u["position"]) for u in after] == [(u["partition"], u["position"]) for u in before]
    found = {
        s["service"]: (s["accepted"], s["done"], s["unaccounted"]) for s in shell.ok("audit", "--json").json["services"]
    }
    assert found == {"billing": (ORDERS, ORDERS, 0), "billing.replay-1": (ORDERS, ORDERS, 0)}
    assert shell.quick("replay", "--list", "--json").json["replays"] == []


def test_on_kafka(shell: Shell) -> None:
    killed_and_carried_on(shell)


def test_on_kafka_with_the_store_in_postgresql(shell: Shell, database: str) -> None:
    migrations.migrate(database, operator="test", reason="")
    shell.env["UNLOST_STORE"] = database
    killed_and_carried_on(shell)


def test_filters_a_cancelled_one_and_what_retention_has_removed(shell: Shell, kafka: Any, fresh_prefix: str) -> None:
    place(shell)
    shell.handle_all()
    shell.ok("replay", "--service", "billing", "--key", "k3", "--yes", "--app", "shop")
    assert [x["n"] for x in noted(shell, replaying=True)] == [n for n in range(ORDERS) if n % KEYS == 3]
    with shell.start("replay", "--service", "billing", "--rate", "5", "--yes", "--app", "shop") as process:
        while len(noted(shell, replaying=True)) < ORDERS // KEYS + 3:
            assert process.process.poll() is None, process.text()
            time.sleep(0.002)
        assert process.end(signal.SIGINT) == 5
    ended = shell.ok("replay", "--cancel", "billing.replay-2", "--yes", "--json").json
    assert ended["removed"] > 0 and ended["done"] + ended["removed"] == ORDERS
    assert shell("audit").code == 0
    client = AdminClient({"bootstrap.servers": kafka.internal})
    for future in client.delete_records([TopicPartition(f"{fresh_prefix}.order", 0, 5)]).values():
        future.result(20)
    result = shell("replay", "--service", "billing", "--yes", "--app", "shop")
    assert result.code == 2 and result.err.startswith("UL1413") and "order/0: positions 0 to 4" in result.err, result
    result = shell("replay", "--service", "billing", "--what-is-left", "--dry-run", "--json", "--app", "shop")
    assert (result.json["events"], result.json["gone"]) == (ORDERS - 5, ["order/0: positions 0 to 4"])
