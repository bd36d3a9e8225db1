"""A fifth service joins the running shop, and nobody else changes a line."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import unlost
from unlost import App
from unlost.demo import run as demo
from unlost.demo.orders import Order, as_they_came, read_orders
from unlost.demo.processes import Processes
from unlost.ops.books import books
from unlost.sqlite.file import File
from unlost.store.records import FileRecords

LOYALTY = Path(__file__).parents[2] / "examples" / "loyalty"
SOURCE = Path(unlost.__file__).parents[1]


def start_loyalty(url: str) -> subprocess.Popen[bytes]:
    """In its own folder, with nothing of the project but unlost to import."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("UNLOST_", "PYTHON"))}
    environment |= {"UNLOST_BROKER": url, "PYTHONPATH": str(SOURCE), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.Popen([sys.executable, "-m", "unlost", "run"], cwd=LOYALTY, env=environment)


def points(orders: list[Order]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for order in orders:
        if order.cents:
            total[order.customer_id] += order.cents // 100
    return dict(total)


def done(file: File, service: str) -> int:
    book = books(FileRecords(file)).services.get(service)
    return 0 if book is None else book.done


async def until_done(file: File, service: str, number: int) -> None:
    async with asyncio.timeout(60):
        while done(file, service) < number:
            await asyncio.sleep(0.05)


def test_it_knows_only_a_wire_name() -> None:
    text = (LOYALTY / "loyalty.py").read_text()
    assert "shop.PaymentCompleted" in text
    assert "unlost.demo" not in text


async def test_it_catches_up_from_history_and_goes_on(tmp_path: Path) -> None:
    orders = as_they_came(read_orders(1500))
    early, late = orders[:1000], orders[1000:]
    url = f"embedded://{tmp_path}/.unlost/events.db"
    web = App(name="web", broker=url, schema=Path(demo.__file__).with_name("schema.sql"))
    shop = Processes(tmp_path, url, None)
    loyalty = None
    try:
        async with web:
            for service in ("order", "payment", "notification", "settlement"):
                shop.start(service)
            await web.accept([order.placed() for order in early])
            await until_done(web.file, "settlement", sum(1 for order in early if order.cents))

            loyalty = start_loyalty(url)
            await web.accept([order.placed() for order in late])
            payable = sum(1 for order in orders if order.cents)
            for service in ("loyalty", "notification", "settlement"):
                await until_done(web.file, service, payable)

            await asyncio.to_thread(shop.stop)
            loyalty.terminate()
            assert await asyncio.to_thread(loyalty.wait, 30) == 0
            found = web.file.read(lambda c: dict(c.execute("select customer_id, points from points")))
            assert found == points(orders)
            balanced = books(FileRecords(web.file))
            assert balanced.balanced, (balanced.missing[:3], balanced.findings)
            assert balanced.services["loyalty"].done == payable
            assert balanced.services.keys() == {"order", "payment", "notification", "settlement", "loyalty"}
    finally:
        shop.stop(grace=5)
        if loyalty is not None and loyalty.poll() is None:
            loyalty.kill()
            loyalty.wait()
