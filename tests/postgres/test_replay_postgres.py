"""`unlost replay` with the store in a real PostgreSQL beside the embedded broker."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import apsw
import psycopg
import pytest

from unlost.ops import store as migrations

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

from cli_kit import Shell

ORDERS = 40
SHOP = """
import asyncio, os
from unlost import App, Context, Event, Retry, Service, Topic

class OrderPlaced(Event, key="order_id"):
    order_id: str
    n: int

billing = Service("billing", guarantee="effectively-once", retry=Retry(attempts=100))

@billing.on(OrderPlaced)
async def charge(order: OrderPlaced, ctx: Context) -> None:
    if ctx.replaying:
        await asyncio.sleep(0.03)
    async with ctx.transaction() as db:
        await db.execute("insert into entry (id, n, replaying) values (?, ?, ?)", (ctx.id, order.n, ctx.replaying))

app = App(billing, topics=[Topic("order", partitions=2)])
"""


@pytest.fixture
def shell(tmp_path: Path, database: str) -> Shell:
    migrations.migrate(database, operator="test", reason="")
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("create table entry (at serial, id text, n integer, replaying boolean)")
    shell = Shell(tmp_path)
    shell.env["UNLOST_STORE"] = database
    shell.write("shop.py", SHOP)
    return shell


def entries(database: str, replaying: bool) -> list[int]:
    with psycopg.connect(database) as connection:
        return [n for (n,) in connection.execute("select n from entry where replaying = %s order by at", (replaying,))]


def test_killed_and_carried_on_each_effect_happens_once_per_replay(shell: Shell, database: str) -> None:
    lines = "".join(json.dumps({"order_id": f"k{n % 5}", "n": n}) + "\n" for n in range(ORDERS))
    shell.ok("publish", "OrderPlaced", "-", "--app", "shop", stdin=lines)
    shell.handle_all()
    assert shell("replay", "--service", "billing", "--yes", "--app", "shop").err.startswith("UL1416")
    for n in range(2):
        with shell.start("replay", "--service", "billing", "--again", "--yes", "--app", "shop") as process:
            wanted, end = len(entries(database, True)) + 3 + 5 * n, time.monotonic() + 40
            while len(entries(database, True)) < wanted:
                assert process.process.poll() is None and time.monotonic() < end, process.text()
                time.sleep(0.005)
            os.kill(process.process.pid, signal.SIGKILL)
            process.process.wait(30)
    ended = shell.ok("replay", "--resume", "billing.replay-1", "--app", "shop", "--json").json
    assert (ended["state"], ended["done"], ended["unaccounted"]) == ("complete", ORDERS, 0)
    again: list[Any] = entries(database, True)
    assert sorted(again) == list(range(ORDERS)) == sorted(entries(database, False))
    for key in range(5):
        assert [n for n in again if n % 5 == key] == list(range(key, ORDERS, 5))
    found = {
        s["service"]: (s["accepted"], s["done"], s["unaccounted"]) for s in shell.ok("audit", "--json").json["services"]
    }
    assert found == {"billing": (ORDERS, ORDERS, 0), "billing.replay-1": (ORDERS, ORDERS, 0)}
    file = apsw.Connection(str(shell.database), flags=apsw.SQLITE_OPEN_READONLY)
    assert file.execute("select distinct service from unlost_follower").fetchall() == [
        ("billing",)
    ]  # holds nothing back
    file.close()


def test_a_cancelled_one_leaves_nothing_behind(shell: Shell, database: str) -> None:
    lines = "".join(json.dumps({"order_id": f"k{n % 5}", "n": n}) + "\n" for n in range(ORDERS))
    shell.ok("publish", "OrderPlaced", "-", "--app", "shop", stdin=lines)
    shell.handle_all()
    with shell.start(
        "replay", "--service", "billing", "--into", "rebuilt", "--rate", "5", "--yes", "--app", "shop"
    ) as process:
        while not entries(database, True):
            assert process.process.poll() is None, process.text()
            time.sleep(0.005)
        assert process.end(signal.SIGINT) == 5
    done = len(entries(database, True))
    ended = shell.ok("replay", "--cancel", "rebuilt", "--yes", "--json").json
    assert (ended["done"], ended["removed"]) == (done, ORDERS - done)
    assert shell("audit").code == 0
    assert shell.quick("replay", "--list", "--json").json["replays"] == []
