"""The audit of a real file, before and after somebody has harmed it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import apsw
import pytest

from unlost import App, Event, Reject, Retry, Service, Topic
from unlost.brokers.embedded.trim import trim
from unlost.errors import Damaged
from unlost.ops.books import books, name_missing, verify
from unlost.ops.connect import opened
from unlost.sqlite.schema import POSITION_BITS
from unlost.store.records import FileRecords
from unlost.testing import Running, running


class OrderPlaced(Event, key="order_id"):
    order_id: str
    n: int = 0


def shop(**policy: object) -> App:
    service = Service("billing", guarantee="effectively-once", retry=Retry(attempts=1))

    @service.on(OrderPlaced, on_dead="skip")
    def charge(order: OrderPlaced) -> None:
        if order.n < 0:
            raise Reject("a negative order")

    return App(service, topics=[Topic("order", partitions=2, **policy)])  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def filled(app: App) -> AsyncIterator[Running]:
    async with running(app, check_books=False) as t:
        await t.publish_all([OrderPlaced(order_id=f"o{i % 7}", n=i) for i in range(1, 101)])
        await t.publish_all([OrderPlaced(order_id="bad", n=-1) for _ in range(3)])
        await t.settled()
        yield t


async def harm(t: Running, *statements: str) -> None:
    """Another program changes the file."""
    other = apsw.Connection(str(t.folder / "events.db"))
    other.set_busy_timeout(5000)
    for sql in statements:
        other.execute(sql)
    other.close()


async def test_the_books_balance() -> None:
    async with filled(shop()) as t:
        found = books(FileRecords(t.app.file))
        assert found.balanced
        book = found.services["billing"]
        assert (book.accepted, book.done, book.dead) == (103, 100, 3)
        assert verify(FileRecords(t.app.file)) == []


async def test_a_position_that_was_moved_on_is_named() -> None:
    async with filled(shop()) as t:
        await harm(t, "update unlost_progress set fated = x'', counts = '{}', digest = 0 where partition = 0")
        found = books(FileRecords(t.app.file))
        assert found.unaccounted > 0
        named = name_missing(FileRecords(t.app.file), found.missing)
        assert named[0].id
        assert named[0].key
        assert "billing" in named[0].last_seen


async def test_a_row_that_vanished_from_the_log_is_found() -> None:
    async with filled(shop()) as t:
        address = t.app.file.read(lambda c: c.execute("select max(at) from unlost_log").fetchone()[0]) - 3
        await harm(t, f"delete from unlost_log where at = {address}")
        found = books(FileRecords(t.app.file))
        assert not found.balanced
        assert any("missing from the log" in finding for finding in found.findings)


async def test_a_dead_letter_that_vanished_is_named() -> None:
    async with filled(shop()) as t:
        await harm(t, "delete from unlost_shelf where number = 2")
        found = books(FileRecords(t.app.file))
        assert found.unaccounted == 1
        (named,) = name_missing(FileRecords(t.app.file), found.missing)
        assert named.key == "bad"
        assert "not on the shelf" in named.why


async def test_a_changed_event_is_found_by_verify_and_refused_by_readers() -> None:
    async with filled(shop()) as t:
        await harm(t, 'update unlost_log set data = \'{"order_id":"o1","n":9}\' where at = 5')
        assert any("checksum" in problem for problem in verify(FileRecords(t.app.file)))
        with pytest.raises(Damaged):
            await t.app.broker.read("order", 0, 0, 100)


async def test_events_of_another_log_show_in_the_digest() -> None:
    async with filled(shop()) as t:
        await harm(t, "update unlost_progress set digest = digest + 1 where partition = 1")
        assert any("digests differ" in finding for finding in books(FileRecords(t.app.file)).findings)


async def test_retention_removes_only_what_everybody_has_finished_with() -> None:
    async with filled(shop(retention="1h")) as t:
        assert await trim(t.app.file) == 0  # nothing is old enough
        t.advance(7200)
        shelved = t.app.file.read(lambda c: c.execute("select partition, min(position) from unlost_shelf").fetchone())
        removed = await trim(t.app.file)
        assert removed > 0
        topic = next(i for i in await t.app.broker.topics() if i.name == "order")
        start, end = topic.ranges[shelved[0]]
        assert start <= shelved[1] < end  # the dead letter holds the trimming back
        assert all(first < last for first, last in topic.ranges)
        found = books(FileRecords(t.app.file))
        assert found.balanced, found.findings
        # an id that left with its event is a new event again; one that stayed is still a duplicate
        await t.publish(OrderPlaced(order_id="o1", n=5))
        await t.settled()
        assert books(FileRecords(t.app.file)).services["billing"].done == 101


async def test_a_service_that_starts_after_a_trim_begins_with_what_is_left() -> None:
    app = shop(retention="1h")
    async with filled(app) as t:
        t.advance(7200)
        await trim(t.app.file)
        late = Service("late")
        seen: list[int] = []

        @late.on(OrderPlaced)
        def handle(order: OrderPlaced) -> None:
            seen.append(order.n)

        url = f"embedded://{t.folder / 'events.db'}"
        second = App(late, broker=url, topics=[Topic("order", partitions=2, retention="1h")])
        async with second:
            rows = second.file.read(
                lambda c: c.execute("select start, start_digest from unlost_progress where service = 'late'").fetchall()
            )
            assert any(start > 0 for start, _ in rows)
            assert books(FileRecords(second.file)).balanced


def test_looking_never_makes_a_file(tmp_path: Path) -> None:
    from unlost import UsageError

    with pytest.raises(UsageError, match="UL1301"), opened(f"embedded://{tmp_path / 'none.db'}"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_addresses_do_not_overlap() -> None:
    assert POSITION_BITS == 40


async def test_saved_progress_that_vanished_is_no_empty_balance() -> None:
    async with filled(shop()) as t:
        await harm(t, "delete from unlost_progress")
        found = books(FileRecords(t.app.file))
        assert not found.balanced
        assert any("saved progress is gone" in line for line in found.unaccountable)
