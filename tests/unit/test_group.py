"""How the processes of a service share its partitions."""

from __future__ import annotations

import asyncio
from pathlib import Path

from unlost import App, Event, Service


class OrderPlaced(Event, key="order_id"):
    order_id: str


class ParcelSent(Event, key="parcel_id"):
    parcel_id: str


async def until(holds: object, seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not holds():  # type: ignore[operator]
            await asyncio.sleep(0.02)


def release(path: Path, seen: list[str], *types: type[Event]) -> App:
    service = Service("shipping")
    for cls in types:

        @service.on(cls, name=f"on-{cls.__name__}")
        def handle(event: Event) -> None:
            seen.append(str(getattr(event, "order_id", None) or getattr(event, "parcel_id", None)))

    return App(service, broker=f"embedded://{path / 'e.db'}")


async def test_releases_with_other_topics_leave_no_partition_alone(tmp_path: Path) -> None:
    """An old release beside a newer one that reads one more topic: every event of either topic is handled."""
    seen: list[str] = []
    old, new = release(tmp_path, seen, OrderPlaced), release(tmp_path, seen, OrderPlaced, ParcelSent)
    running = [asyncio.create_task(app.serve()) for app in (old, new)]
    async with App(broker=f"embedded://{tmp_path / 'e.db'}") as web:
        await web.publish_all([OrderPlaced(order_id=f"o{n}") for n in range(100)])
        await web.publish_all([ParcelSent(parcel_id=f"p{n}") for n in range(100)])
        await until(lambda: len(set(seen)) == 200)

        def free() -> int:
            sql = "select count(*) from unlost_assignment where process is null"
            return int(web.file.read(lambda c: c.execute(sql).fetchone()[0]))

        await until(lambda: free() == 0)
        for app in (old, new):
            app.stop()
        await asyncio.gather(*running)
