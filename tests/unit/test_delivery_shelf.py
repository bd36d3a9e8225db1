"""Dead letters: parked and skipped followers, redrive, discard, and what cannot be read."""

from __future__ import annotations

import asyncio

import pytest

from unlost import App, Context, Event, Retry, Service
from unlost.delivery.service import OnDead
from unlost.events import Envelope, seal
from unlost.testing import Running, running


class Placed(Event, key="order_id", topic="order"):
    order_id: str
    n: int = 0


def service_that_fails(on_dead: OnDead, *, first: float = 0) -> tuple[App, Service, list[int], set[int]]:
    """A handler that fails for the numbers in the set."""
    service = Service("s", on_dead=on_dead, retry=Retry(attempts=2, first=first))
    seen: list[int] = []
    bad: set[int] = set()

    @service.on(Placed)
    async def handle(e: Placed) -> None:
        if e.n in bad:
            raise ValueError(f"bad {e.n}")
        seen.append(e.n)

    return App(service), service, seen, bad


async def publish(t: Running, *numbers: int, key: str = "a") -> None:
    await t.publish_all([Placed(order_id=key, n=n) for n in numbers])


@pytest.mark.parametrize("first", [0, 60])
async def test_followers_park_behind_a_dead_letter_and_go_on_in_order_after_a_redrive(first: float) -> None:
    app, service, seen, bad = service_that_fails("park", first=first)
    async with running(app) as t:
        bad.add(1)
        await publish(t, 0, 1, 2, 3)
        await publish(t, *range(100, 110), key="other")
        await t.settled()
        await publish(t, 4, 5)
        await t.settled()
        assert [n for n in seen if n < 100] == [0]
        assert len([n for n in seen if n >= 100]) == 10
        book = t.books.services["s"]
        assert (book.dead, book.parked, book.done) == (1, 4, 11)
        bad.clear()
        await t.redrive(t.dead(service))
        await publish(t, 6)
        await t.settled()
        assert [n for n in seen if n < 100] == list(range(7))
        book = t.books.services["s"]
        assert (book.dead, book.parked, book.done) == (0, 0, 17)


async def test_a_discard_is_an_outcome_and_lets_the_followers_go() -> None:
    app, service, seen, bad = service_that_fails("park")
    async with running(app) as t:
        bad.add(0)
        await publish(t, 0, 1, 2)
        await t.settled()
        assert seen == []
        await t.discard(t.dead(service), reason="a test order")
        await t.settled()
        assert seen == [1, 2]
        book = t.books.services["s"]
        assert (book.removed, book.done, book.dead) == (1, 2, 0)
        rows = t.app.file.read(
            lambda c: c.execute(
                "select action, operator, reason, carried_out is not null from unlost_operation"
            ).fetchall()
        )
        assert rows == [("discard", "test", "a test order", 1)]


async def test_a_redrive_that_fails_again_is_dead_again_and_the_followers_still_wait() -> None:
    app, service, seen, bad = service_that_fails("park")
    async with running(app) as t:
        bad.add(0)
        await publish(t, 0, 1)
        for _ in range(3):
            await t.settled()
            assert seen == []
            letter = t.dead(service)
            assert len(letter.attempts) == 2
            await t.redrive(letter)
        bad.clear()
        await t.settled()
        # the third redrive may have failed before the set was cleared
        for letter in t.dead_letters():
            await t.redrive(letter)
        await t.settled()
        assert seen == [0, 1]


async def test_several_dead_letters_of_one_key_in_a_row() -> None:
    app, service, seen, bad = service_that_fails("park")
    async with running(app) as t:
        bad.update((0, 2))
        await publish(t, 0, 1, 2, 3)
        await t.settled()
        await t.discard(t.dead(service))
        await t.settled()
        assert seen == [1]
        assert t.dead(service).position == 2
        await t.discard(t.dead(service))
        await t.settled()
        assert seen == [1, 3]


async def test_skip_lets_the_key_go_on() -> None:
    app, service, seen, bad = service_that_fails("skip")
    async with running(app) as t:
        bad.update((1, 2))
        await publish(t, 0, 1, 2, 3)
        await t.settled()
        assert seen == [0, 3]
        assert [letter.parks for letter in t.dead_letters(service)] == [False, False]
        bad.clear()
        for letter in t.dead_letters():
            await t.redrive(letter)
        await t.settled()
        assert sorted(seen) == [0, 1, 2, 3]


async def test_dead_letters_and_parked_events_survive_a_restart_and_a_redrive_works_then() -> None:
    app, service, seen, bad = service_that_fails("park")
    async with running(app) as t:
        bad.add(0)
        await publish(t, 0, 1)
        await t.settled()
        await t.scale(0, "s")
        await publish(t, 2)
        await t.scale(1, "s")
        await t.settled()
        assert seen == []
        await t.scale(0, "s")
        bad.clear()
        await t.redrive(t.dead(service))  # nobody owns the partition: it is carried out at once
        assert not t.dead_letters()
        await t.scale(1, "s")
        await t.settled()
        assert seen == [0, 1, 2]


async def test_many_parked_events_come_back_in_order_while_new_ones_arrive() -> None:
    app, service, seen, bad = service_that_fails("park")
    async with running(app) as t:
        bad.add(0)
        await publish(t, *range(300))
        await t.settled()
        bad.clear()
        await t.redrive(t.dead(service))
        for n in range(300, 400):
            await publish(t, n)
        await t.settled()
        assert seen == list(range(400))


# --- what cannot be read -------------------------------------------------------------------------------------


def raw(n: int, *, type: str = "order.Placed", data: bytes | None = b'{"order_id":"a","n":1}', version: int = 1):
    return Envelope(
        id=f"raw-{n}", source="elsewhere", type=type, time="2026-01-01T00:00:00Z", topic="order", key=b"a",
        data=data, eventversion=version,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\xff\x00 no json", "undecodable"),
        (b"", "undecodable"),
        (None, "undecodable"),
        (b'{"n": 1}', "undecodable"),
        (b'{"order_id": 7, "n": "x"}', "undecodable"),
        (b"[" * 10000, "undecodable"),
    ],
)
async def test_undecodable_bytes_go_to_the_shelf_with_their_bytes(data: bytes | None, reason: str) -> None:
    app, service, seen, _ = service_that_fails("park")
    async with running(app) as t:
        await app.accept([raw(1, data=data)])
        await publish(t, 5)
        await t.settled()
        letter = t.dead(service)
        assert (letter.reason, letter.data, letter.id) == (reason, data, "raw-1")
        assert seen == []  # of the same key: it waits
        await t.discard(letter)
        await t.settled()
        assert seen == [5]


async def test_a_head_that_is_no_event_goes_to_the_shelf_and_survives_a_redrive() -> None:
    app, _service, seen, _ = service_that_fails("park")
    async with running(app) as t:
        await publish(t, 1)
        await t.settled()

        def damage(tx) -> None:  # a foreign writer with another idea of a head
            from unlost.sqlite.transaction import row_crc

            [appended] = tx.append([raw(1)])
            tx.flush()
            at = tx.topic("order").first_number + appended.partition << 40 | appended.position
            _, key, data, recorded, _digest = tx.one(
                "select head, key, data, recorded, digest from unlost_log where at = ?", (at,)
            )
            head = b"\x00garbage"
            before = tx.one("select digest from unlost_log where at = ?", (at - 1,))[0]
            crc = row_crc(at, head, key, data, recorded, before)
            tx.execute("update unlost_log set head = ?, digest = ?, crc = ? where at = ?", (head, before, crc, at))
            tx.forget()

        await app.file.write(damage)
        await t.settled()
        letter = t.dead()
        assert (letter.reason, letter.head) == ("undecodable", b"\x00garbage")
        await t.redrive(letter)
        await t.settled()
        assert t.dead().reason == "undecodable"
        await t.discard(t.dead())
        await publish(t, 2)
        await t.settled()
        assert seen == [1, 2]


async def test_a_newer_version_goes_to_the_shelf_as_such() -> None:
    app, service, _, _ = service_that_fails("park")
    async with running(app) as t:
        await app.accept([raw(1, version=2)])
        await t.settled()
        assert t.dead(service).reason == "unknown_version"


async def test_an_unknown_type_is_skipped_by_rule() -> None:
    app, _, seen, _ = service_that_fails("park")
    async with running(app) as t:
        await app.accept([raw(1, type="order.Teleported", data=b"\xff")])
        await publish(t, 1)
        await t.settled()
        assert seen == [1]
        assert t.books.services["s"].skipped == {"no handler": 1}


async def test_one_bad_event_in_a_batch_harms_no_neighbour() -> None:
    app, service, seen, _ = service_that_fails("skip")
    async with running(app) as t:
        good = [seal(Placed(order_id=f"o{n}", n=n), source="x", now=t.clock.now()) for n in range(50)]
        good[25] = raw(1, data=b"\xff")
        await app.accept(good)
        await t.settled()
        assert sorted(seen) == [n for n in range(50) if n != 25]
        assert len(t.dead_letters(service)) == 1


async def test_requests_are_carried_out_once_even_if_asked_twice() -> None:
    app, service, seen, bad = service_that_fails("park")
    async with running(app) as t:
        bad.add(0)
        await publish(t, 0)
        await t.settled()
        letter = t.dead(service)
        bad.clear()
        await asyncio.gather(t.redrive(letter), t.redrive(letter), t.discard(letter))
        await t.settled()
        book = t.books.services["s"]
        assert book.done + book.removed == 1 and len(seen) == book.done


async def test_a_handler_taken_out_of_a_release_leaves_a_rule_behind() -> None:
    app, service, _, bad = service_that_fails("park")
    async with running(app) as t:
        bad.add(0)
        await publish(t, 0, 1)
        await t.settled()
        await t.scale(0, "s")
        handler = service.handlers.pop("order.Placed")
        other = Service("s2")
        assert handler.name == "handle" and other.name == "s2"
        try:
            service.handlers["order.Other"] = handler
            await t.scale(1, "s")
            await t.redrive(t.dead())
            await t.settled()
            assert t.books.services["s"].skipped == {"no handler": 2}
        finally:
            service.handlers["order.Placed"] = handler


async def test_the_context_counts_attempts_from_one_after_a_redrive() -> None:
    service, attempts = Service("s", retry=Retry(attempts=2, first=0)), []
    app = App(service)

    @service.on(Placed)
    async def handle(e: Placed, ctx: Context) -> None:
        attempts.append(ctx.attempt)
        raise ValueError("no")

    async with running(app) as t:
        await publish(t, 0)
        await t.settled()
        await t.redrive(t.dead(handle))
        await t.settled()
        assert attempts == [1, 2, 1, 2]
