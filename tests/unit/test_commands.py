"""Commands and queues: one service, first in first out, per group where there is a key; wrong verbs and wrong places."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from pathlib import Path

import pytest
from cli_kit import Shell

from unlost import App, Command, Context, Event, Retry, Service, Topic, UsageError
from unlost.events import Envelope, seal
from unlost.testing import running

RECEIPTS = 40


class OrderPaid(Event, key="order_id", topic="shop"):
    order_id: str
    customer: str


class SendReceipt(Command, queue="receipts", key="customer"):
    customer: str
    order_id: str


class PrintLabel(Command, queue="labels"):
    n: int


class ReprintLabel(Command, queue="labels"):
    n: int


def labels(**policy: object) -> tuple[Service, list[int]]:
    service, seen = Service("printer", **policy), []  # type: ignore[arg-type]

    @service.on(PrintLabel)
    async def print_label(command: PrintLabel) -> None:
        await asyncio.sleep(0)  # others would overtake here
        seen.append(command.n)

    return service, seen


def receipts(**policy: object) -> tuple[Service, dict[str, list[str]]]:
    service, seen = Service("mail", **policy), defaultdict(list)  # type: ignore[arg-type]

    @service.on(SendReceipt)
    async def send_receipt(command: SendReceipt) -> None:
        await asyncio.sleep(0)
        seen[command.customer].append(command.order_id)

    return service, seen


# --- order ---------------------------------------------------------------------------------------------------------


async def test_a_queue_without_groups_is_first_in_first_out() -> None:
    service, seen = labels(concurrency=16)
    async with running(App(service)) as t:
        for n in range(RECEIPTS):
            receipt = await t.send(PrintLabel(n=n))
            assert (receipt.topic, receipt.position) == ("labels", n), "all of them stand in one partition"
        await t.settled()
        assert seen == list(range(RECEIPTS))


async def test_commands_of_two_types_share_the_order_of_their_queue() -> None:
    service, seen = labels()

    @service.on(ReprintLabel)
    async def reprint(command: ReprintLabel) -> None:
        seen.append(-command.n)

    async with running(App(service)) as t:
        for n in range(1, 11):
            await t.send(PrintLabel(n=n) if n % 2 else ReprintLabel(n=n))
        await t.settled()
        assert seen == [1, -2, 3, -4, 5, -6, 7, -8, 9, -10]


async def test_each_group_has_an_order_of_its_own_and_groups_do_not_wait_for_one_another() -> None:
    service, seen = Service("mail", concurrency=8), defaultdict(list)
    released = asyncio.Event()

    @service.on(SendReceipt)
    async def send_receipt(command: SendReceipt) -> None:
        if command.customer == "slow":
            await released.wait()
        seen[command.customer].append(command.order_id)
        if sum(map(len, seen.values())) == 2 * RECEIPTS:  # everybody else is through
            released.set()

    async with running(App(service), patience=30.0) as t:
        for n in range(RECEIPTS):
            for customer in ("slow", "a", "b"):
                await t.send(SendReceipt(customer=customer, order_id=str(n)))
        await t.settled()
        assert seen == {customer: [str(n) for n in range(RECEIPTS)] for customer in ("slow", "a", "b")}


async def test_order_stays_when_workers_die_and_others_take_over() -> None:
    service, seen = labels(guarantee="effectively-once")
    async with running(App(service)) as t:
        await t.scale(3, "printer")
        for after in ("received", "started", "handled", "settling", "settled"):
            t.crash(service, after=after)  # type: ignore[arg-type]
            for n in range(10):
                await t.send(PrintLabel(n=n))
            await t.settled()
            first = list(dict.fromkeys(seen))
            assert first == list(range(10)), f"{after}: {seen}"
            seen.clear()
        assert t.deaths("printer") == 5
        assert t.books.services["printer"].done == 50


async def test_what_stands_in_the_queue_without_its_group_takes_its_place() -> None:
    """A producer that does not speak unlost may not know that the queue is the group."""
    service, seen = labels(concurrency=16)
    async with running(App(service, topics=[Topic("labels", partitions=1)])) as t:

        def bare(n: int) -> Envelope:
            sealed = seal(PrintLabel(n=n), source="other", now=1_700_000_000_000_000)
            return Envelope(
                id=sealed.id,
                source="other",
                type=sealed.type,
                time=sealed.time,
                topic="labels",
                key=None,
                data=sealed.data,
            )

        await t.app.accept([bare(n) for n in range(20)])
        await t.settled()
        assert seen == list(range(20))


# --- as events: retry, shelf, once, books --------------------------------------------------------------------------


async def test_a_dead_command_holds_its_queue_until_it_is_redriven() -> None:
    service, seen = labels(retry=Retry(attempts=1))
    jammed = True

    @service.on(ReprintLabel)
    async def reprint(command: ReprintLabel) -> None:
        if jammed:
            raise OSError("paper jam")
        seen.append(-command.n)

    async with running(App(service)) as t:
        await t.send(PrintLabel(n=1))
        await t.send(ReprintLabel(n=2))
        await t.send(PrintLabel(n=3))
        await t.settled()
        assert seen == [1]
        book = t.books.services["printer"]
        assert (book.done, book.dead, book.parked) == (1, 1, 1)
        jammed = False
        await t.redrive(t.dead(service))
        await t.settled()
        assert seen == [1, -2, 3]


async def test_a_command_of_a_handler_leaves_with_the_delivery() -> None:
    shop = Service("shop", retry=Retry(attempts=3, first=0))
    mail, seen = receipts(guarantee="effectively-once")
    tries: list[int] = []

    @shop.on(OrderPaid)
    async def paid(event: OrderPaid, ctx: Context) -> None:
        ctx.send(SendReceipt(customer=event.customer, order_id=event.order_id), headers={"from": "shop"})
        tries.append(ctx.attempt)
        if ctx.attempt < 3:
            raise OSError("not yet")

    async with running(App(shop, mail)) as t:
        t.crash(paid, after="settled")
        await t.publish(OrderPaid(order_id="A1", customer="c"))
        await t.settled()
        assert tries[:3] == [1, 2, 3]
        assert seen == {"c": ["A1"]}
        (command,) = t.envelopes(SendReceipt)
        (event,) = t.envelopes(OrderPaid)
        assert (command.causationid, command.correlationid, command.headers) == (event.id, event.id, {"from": "shop"})
        assert command.type == "receipts.SendReceipt"


async def test_a_command_that_is_sent_again_with_its_id_is_carried_out_once() -> None:
    service, seen = receipts(guarantee="effectively-once")
    async with running(App(service)) as t:
        for _ in range(3):
            await t.send(SendReceipt(customer="c", order_id="A1"), id="receipt-A1")
        await t.settled()
        assert seen == {"c": ["A1"]}
        book = t.books.services["mail"]
        assert (book.accepted, book.done, book.skipped) == (3, 1, {"duplicate": 2})


async def test_a_command_waits_while_its_service_is_away() -> None:
    service, seen = receipts()
    async with running(App(service)) as t:
        await t.scale(0, "mail")
        for n in range(5):
            await t.send(SendReceipt(customer="c", order_id=str(n)))
        assert seen == {} and t.books.services["mail"].waiting == 5
        await t.scale(1, "mail")
        await t.settled()
        assert seen == {"c": ["0", "1", "2", "3", "4"]}


# --- wrong verbs, wrong places -------------------------------------------------------------------------------------


async def test_an_event_is_published_and_a_command_is_sent() -> None:
    service, seen = receipts()
    refused: list[str] = []
    shop = Service("shop")

    @shop.on(OrderPaid)
    async def paid(event: OrderPaid, ctx: Context) -> None:
        for wrong in (
            lambda: ctx.publish(SendReceipt(customer="c", order_id="1")),
            lambda: ctx.send(event),  # type: ignore[arg-type]
        ):
            with pytest.raises(UsageError) as caught:
                wrong()
            refused.append(str(caught.value))

    async with running(App(service, shop)) as t:
        for attempt in (
            t.app.publish(SendReceipt(customer="c", order_id="1")),
            t.app.publish_all([OrderPaid(order_id="A1", customer="c"), SendReceipt(customer="c", order_id="1")]),
            t.app.send(OrderPaid(order_id="A1", customer="c")),  # type: ignore[arg-type]
        ):
            with pytest.raises(UsageError) as caught:
                await attempt
            refused.append(str(caught.value))
        await t.publish(OrderPaid(order_id="A1", customer="c"))
        await t.settled()
        assert len(refused) == 5 and all("UL1017" in text for text in refused)
        assert sum("ctx.send" in text for text in refused) == 3
        assert sum("ctx.publish" in text for text in refused) == 2
        assert seen == {} and t.envelopes(SendReceipt) == []


def test_two_services_for_one_queue_are_refused_in_one_app() -> None:
    one, _ = receipts()
    other = Service("letters")

    @other.on(SendReceipt)
    async def post(command: SendReceipt) -> None: ...

    with pytest.raises(UsageError, match=r"UL1246.*'mail' does it for 'receipts'") as caught:
        App(one, other)
    assert "letters" in str(caught.value)


async def test_two_services_for_one_queue_are_refused_across_processes(tmp_path: Path) -> None:
    url = f"embedded://{tmp_path / 'events.db'}"
    one, _ = receipts()
    async with App(one, broker=url):
        pass
    other = Service("letters")

    @other.on(SendReceipt)
    async def post(command: SendReceipt) -> None: ...

    with pytest.raises(UsageError, match="UL1246"):
        async with App(other, broker=url):
            pass
    same, _ = receipts()
    async with App(same, broker=url) as app:  # the first one is not disturbed
        await app.send(SendReceipt(customer="c", order_id="1"))


async def test_a_service_may_give_a_queue_up(tmp_path: Path) -> None:
    url = f"embedded://{tmp_path / 'events.db'}"
    one, _ = receipts()
    async with App(one, broker=url):
        pass
    without = Service("mail")

    @without.on(OrderPaid)
    async def paid(event: OrderPaid) -> None: ...

    async with App(without, broker=url):
        pass
    other = Service("letters")

    @other.on(SendReceipt)
    async def post(command: SendReceipt) -> None: ...

    async with App(other, broker=url) as app:
        assert await app.store.service_of("receipts") == "letters"


async def test_a_command_that_nobody_carries_out_is_refused(tmp_path: Path) -> None:
    url = f"embedded://{tmp_path / 'events.db'}"
    service, _ = receipts()
    async with App(broker=url, topics=[Topic("receipts")]) as web:
        with pytest.raises(UsageError, match="UL1247"):
            await web.send(SendReceipt(customer="c", order_id="1"))
        assert [r for (info,) in [await web.broker.topics(["receipts"])] for r in info.ranges] == [(0, 0)] * 8
        async with App(service, broker=url):
            pass
        receipt = await web.send(SendReceipt(customer="c", order_id="1"))
        assert receipt.topic == "receipts"


def test_send_sync(tmp_path: Path) -> None:
    service, _ = receipts()
    app = App(service, broker=f"embedded://{tmp_path / 'events.db'}")
    assert app.send_sync(SendReceipt(customer="c", order_id="1"), id="r1").id == "r1"


async def test_send_sync_does_not_block_an_event_loop(tmp_path: Path) -> None:
    app = App(broker=f"embedded://{tmp_path / 'events.db'}")
    with pytest.raises(UsageError, match=r"UL1236.*send_sync"):
        app.send_sync(SendReceipt(customer="c", order_id="1"))


def test_a_queue_is_no_topic() -> None:
    class LabelLost(Event, topic="labels", key="who"):
        who: str

    service, _ = labels()
    with pytest.raises(UsageError, match="UL1226"):
        service.on(LabelLost)(lambda event: None)
    other = Service("other")
    other.on(LabelLost)(lambda event: None)
    with pytest.raises(UsageError, match="UL1226"):
        App(service, other)
    with pytest.raises(UsageError, match="UL1226"):
        other.on(PrintLabel, name="print")(lambda command: None)


COMMANDS = """
from unlost import App, Command, Event, Service

class SendReceipt(Command, queue="receipts", key="customer"):
    customer: str

class OrderPlaced(Event, key="order_id"):
    order_id: str

mail = Service("mail")

@mail.on(SendReceipt)
async def send_receipt(command: SendReceipt) -> None:
    print("sent", command.customer, flush=True)

app = App(mail)
web = App()
"""


def test_from_the_command_line(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    shell.write("shop.py", COMMANDS)
    refused = shell("publish", "SendReceipt", "customer=c", "--app", "shop:web")
    assert refused.code == 2 and "UL1247" in refused.err
    refused = shell("publish", "SendReceipt", "-", "--app", "shop:web", stdin='{"customer": "c"}\n')
    assert refused.code == 1 and "line 1: UL1247" in refused.err
    assert shell.ok("publish", "SendReceipt", "customer=c", "--app", "shop:app").out.endswith(":0\n")
    sent = shell.ok("publish", "SendReceipt", "-", "--app", "shop:web", stdin='{"customer": "c"}\n{"customer": "c"}\n')
    assert sent.out.count("receipts/") == 2
    status = shell.ok("status", "--json").json
    assert "receipts" in str(status)
