"""`unlost trace`: a flow is shown whole, each branch stands where the books say, and nothing is guessed."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apsw
import msgspec
import pytest
from cli_kit import Result, Shell

from unlost.brokers.embedded import indexer
from unlost.errors import UnlostError
from unlost.ops import trace as ops
from unlost.ops.connect import opened
from unlost.ops.trace import Traced

SHOP = """
import asyncio
from unlost import App, Context, Event, Reject, Retry, RetryLater, Sensitive, Service

class OrderPlaced(Event, key="order_id"):
    order_id: str
    what: str = "pay"
    email: Sensitive[str] = "s3cret@x"

class OrderNoted(Event, key="order_id"):
    order_id: str

class OrderPaid(Event, key="customer_id"):
    customer_id: str

class OrderShipped(Event, key="customer_id"):
    customer_id: str

billing = Service("billing", retry=Retry(attempts=3, first=3600, max=3600))
shipping = Service("shipping", guarantee="effectively-once")
tax = Service("tax")
mail = Service("mail")
stock = Service("stock", guarantee="effectively-once")
diary = Service("diary")
fraud = Service("fraud")

@billing.on(OrderPlaced)
async def charge(order: OrderPlaced, ctx: Context) -> None:
    if order.what == "reject":
        raise Reject("an order of 0.00 cannot be \\x1b[31mpaid")
    if order.what == "fail":
        raise ValueError("the bank is closed")
    if order.what == "hang":
        print("in the handler", flush=True)
        await asyncio.sleep(3600)
    ctx.publish(OrderPaid(customer_id="c1"))

@shipping.on(OrderPaid)
async def ship(paid: OrderPaid, ctx: Context) -> None:
    ctx.publish(OrderShipped(customer_id=paid.customer_id))

@tax.on(OrderPlaced, where=lambda order: False)
async def declare(order: OrderPlaced) -> None: ...

@mail.on(OrderShipped)
async def write(shipped: OrderShipped) -> None: ...

@stock.on(OrderPlaced)
async def reserve(order: OrderPlaced) -> None: ...

@diary.on(OrderPlaced, OrderNoted)
async def write_down(event: OrderPlaced | OrderNoted) -> None: ...

@fraud.on(OrderPlaced, where=lambda order: order.what == "pay")
async def look_into(order: OrderPlaced) -> None: ...

app = App(billing, shipping, tax, mail, stock, diary, fraud)
"""


class Shop(Shell):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.write("shop.py", SHOP)

    def orders(self, *orders: tuple[str, str], app: str = "shop") -> None:
        lines = "".join(json.dumps({"order_id": key, "what": what}) + "\n" for key, what in orders)
        self.ok("publish", "OrderPlaced", "-", "--app", app, stdin=lines)

    def order(self, key: str, id: str) -> None:
        self.ok("publish", "OrderPlaced", f"order_id={key}", "--id", id, "--app", "shop")

    def note(self, key: str) -> None:
        self.ok("publish", "OrderNoted", f"order_id={key}", "--app", "shop")

    def run(self) -> None:
        """Until nothing can be done any more but what waits for an hour, or for an operator."""
        with self.start("run", "shop") as running:
            running.says("unlost: ")
            self.until(lambda s: not s["waiting"] + s["in_flight"])
            assert running.end(signal.SIGTERM) == 0

    def trace(self, *arguments: str) -> Any:
        result = self.quick("trace", *arguments, "--json")
        assert result.code == 0, result
        return result.json

    def branches(self, *arguments: str) -> dict[tuple[str, str], dict[str, Any]]:
        """By event type and service; for flows that have each type once."""
        found = {}
        for flow in self.trace(*arguments)["flows"]:
            for e in flow["events"]:
                for b in e["branches"]:
                    assert (e["type"], b["service"]) not in found
                    found[e["type"], b["service"]] = b
        return found

    def sql(self, *statements: str) -> None:
        connection = apsw.Connection(str(self.database))
        for statement in statements:
            connection.execute(statement)
        connection.close()


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """One order of each kind has been through it. Only looked at."""
    shop = Shop(tmp_path_factory.mktemp("trace"))
    shop.order("good-1", "order-0001-placed")
    shop.orders(("zero-1", "reject"), ("zero-1", "pay"), ("late-1", "fail"))
    shop.note("good-1")
    shop.run()
    return shop


@pytest.fixture(params=["index", "everything is read"])
def used(history: Shop, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Shop:
    """All is found in segments, or the log is one without an index."""
    if request.param == "index":
        monkeypatch.setattr(indexer, "TAIL_MAX", 1)
        monkeypatch.setattr(indexer, "BATCH", 2)
    else:
        monkeypatch.setattr(ops, "Findable", ())
    return history


def test_a_flow_is_shown_from_its_first_event_on_each_after_its_cause(used: Shop) -> None:
    (flow,) = used.trace("order-0001-placed")["flows"]
    assert [(e["type"], e["depth"], e["key"]) for e in flow["events"]] == [
        ("order.OrderPlaced", 0, "good-1"),
        ("customer.OrderPaid", 1, "c1"),
        ("customer.OrderShipped", 2, "c1"),
    ]
    ids = [e["id"] for e in flow["events"]]
    assert [e["causationid"] for e in flow["events"]] == [None, ids[0], ids[1]]
    assert [e["meant"] for e in flow["events"]] == [True, False, False]
    assert flow["id"] == "order-0001-placed" and not flow["cut"]


def test_whichever_of_its_events_is_named_the_flow_is_the_same(used: Shop) -> None:
    whole = used.trace("order-0001-placed")["flows"][0]["events"]
    for e in whole:
        found = used.trace(e["id"])
        assert found["by"] == "id"
        assert [other["id"] for other in found["flows"][0]["events"]] == [other["id"] for other in whole]
        assert [other["id"] for other in found["flows"][0]["events"] if other["meant"]] == [e["id"]]


def test_a_key_shows_all_flows_that_begin_or_pass_there(used: Shop) -> None:
    begins = used.trace("good-1")
    assert begins["by"] == "key" and begins["older"] is False
    assert [flow["events"][0]["type"] for flow in begins["flows"]] == [
        "order.OrderPlaced",
        "order.OrderNoted",
    ]
    passes = used.trace("c1")
    assert [flow["id"] for flow in passes["flows"]] == ["order-0001-placed"]
    assert passes["flows"][0]["events"][0]["key"] == "good-1"


def test_the_beginning_or_the_end_of_an_id_will_do(used: Shop) -> None:
    paid = used.trace("order-0001-placed")["flows"][0]["events"][1]
    for part in ("order-0001", "001-placed", paid["id"][:13], paid["id"][-12:], "…" + paid["id"][-12:]):
        found = used.trace(part)
        assert found["by"] == "part of an id" and [flow["id"] for flow in found["flows"]] == ["order-0001-placed"], part
    shown = used.quick("trace", "order-0001")
    assert "no key and no id is order-0001" in shown.out
    assert "…" + paid["id"][-12:] in shown.out
    assert used.quick("trace", "order").code == 1  # too short to mean one


def test_where_each_branch_stands(used: Shop) -> None:
    good = used.branches("order-0001-placed")
    assert good["order.OrderPlaced", "billing"]["state"] == "done"  # it has published what came of it
    assert good["order.OrderPlaced", "stock"]["state"] == "done"  # it has the mark "handled" of it
    assert good["customer.OrderPaid", "shipping"]["state"] == "done"
    assert good["customer.OrderShipped", "mail"]["state"] == "done or skipped"  # counted, not listed, and no mark
    late = used.branches("late-1")["order.OrderPlaced", "billing"]
    assert late["state"] == "retrying" and late["due"] > late["attempts"][0]["at"]
    assert [(a["number"], a["error"]) for a in late["attempts"]] == [(1, "ValueError: the bank is closed")]


def test_a_dead_event_says_why_and_how_to_look(used: Shop) -> None:
    first, second = used.trace("zero-1")["flows"]
    (dead,) = [b for b in first["events"][0]["branches"] if b["service"] == "billing"]
    assert (dead["state"], dead["reason"]) == ("dead", "rejected") and "cannot be" in dead["error"]
    (parked,) = [b for b in second["events"][0]["branches"] if b["service"] == "billing"]
    assert parked["state"] == "parked" and f"behind dead letter {dead['dead_letter']}" in parked["why"]
    text = used.quick("trace", "zero-1").out  # the shell refuses escape characters by itself
    assert f"unlost dead show {dead['dead_letter']}" in text
    assert "rejected: an order of 0.00 cannot be \\x1b[31mpaid" in text
    assert used.quick("dead", "show", str(dead["dead_letter"])).code == 0


def test_what_only_one_rule_can_have_done_is_said(used: Shop) -> None:
    """`tax` turned away all orders, and one event it has no handler for."""
    assert used.branches("late-1")["order.OrderPlaced", "tax"]["state"] == "skipped(where)"
    noted = used.trace("good-1")["flows"][1]["events"][0]
    assert {b["service"]: b["state"] for b in noted["branches"]} == {
        "billing": "done or skipped", "stock": "done or skipped", "tax": "skipped(no handler or where)",
        "diary": "done", "fraud": "done or skipped",
    }  # fmt: skip


def test_the_code_tells_done_from_skipped(used: Shop) -> None:
    found = used.branches("order-0001-placed", "--app", "shop")
    assert found["customer.OrderShipped", "mail"]["state"] == "done"
    assert found["customer.OrderPaid", "mail"]["state"] == "skipped(no handler)"
    for flow in used.trace("zero-1", "--app", "shop")["flows"]:  # which of the two it turned away, its code cannot say
        assert {b["service"]: b["state"] for b in flow["events"][0]["branches"]}["fraud"] == "done or skipped"
    assert "--app YOUR_APP" in used.quick("trace", "order-0001-placed").out
    assert "--app" not in used.quick("trace", "order-0001-placed", "--app", "shop").out


def test_what_the_books_count_is_what_the_branches_say(used: Shop) -> None:
    """Every state that is listed one by one is found again through the keys of the log."""
    keys = {e["key"] for e in used.quick("tail", "--from", "start", "--json").lines}
    flows = {flow["id"]: flow for key in keys for flow in used.trace(key)["flows"]}
    states = [(b["service"], b["state"]) for flow in flows.values() for e in flow["events"] for b in e["branches"]]
    for book in used.quick("audit", "--json").json["services"]:
        for state in ("dead", "retrying", "parked", "waiting", "in_flight", "removed"):
            assert states.count((book["service"], state.replace("_", " "))) == book[state], (book["service"], state)
    events = sum(len(flow["events"]) for flow in flows.values())
    assert events == used.trace("good-1")["events_read"]


def test_data_are_never_shown(used: Shop) -> None:
    for arguments in (("zero-1",), ("zero-1", "--json"), ("zero-1", "--app", "shop", "--json")):
        assert "s3cret" not in used.quick("trace", *arguments).out


def test_what_is_not_there_is_an_error_that_says_what_was_searched(used: Shop) -> None:
    result = used.quick("trace", "nobody\x1b[31m")
    assert result.code == 1 and result.out == ""
    assert "UL1350" in result.err and "7 events searched, in the topics customer, order" in result.err
    assert used.quick("trace", "nobody", "--json").json["code"] == "UL1350"
    assert_usage(used.quick("trace", ""), "UL1351")
    assert_usage(used.quick("trace", "good-1", "-n", "0"), "UL1352")
    assert_usage(used.quick("trace", "good-1", "-n", "1000000"), "UL1352")


def assert_usage(result: Result, code: str) -> None:
    assert result.code == 2 and code in result.err, result


def test_the_index_is_used_where_there_is_one(history: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("order-0001-placed", "zero-1", "c1", "order-0001")
    whole = [history.trace(text) for text in asked]
    monkeypatch.setattr(ops, "Findable", ())
    assert [history.trace(text) for text in asked] == whole
    monkeypatch.undo()
    monkeypatch.setattr(ops, "_everything", lambda *_: pytest.fail("everything was read"))
    assert [history.trace(text) for text in asked[:3]] == whole[:3]


def test_of_many_flows_the_newest_are_shown(used: Shop) -> None:
    found = used.trace("zero-1", "-n", "1")
    everything = used.trace("zero-1")["flows"]
    assert found["older"] is True and found["flows"] == everything[1:]
    assert "older flows are not shown" in used.quick("trace", "zero-1", "-n", "1").out


def test_small_pages_and_statements_find_the_same(used: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ("order-0001-placed", "zero-1", "c1")
    whole = [used.trace(key) for key in keys]
    monkeypatch.setattr(ops, "PAGE", 1)
    monkeypatch.setattr(ops, "ROWS_MAX", 1)
    assert [used.trace(key) for key in keys] == whole


def test_a_flow_that_is_too_long_says_so(used: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = used.trace("order-0001-placed")["flows"][0]["events"]
    for size in (1, 2):
        monkeypatch.setattr(ops, "EVENTS_MAX", size)
        (flow,) = used.trace("order-0001-placed")["flows"]
        assert flow["cut"] is True and [e["id"] for e in flow["events"]] == [e["id"] for e in whole[:size]]
        assert "and more" in used.quick("trace", "order-0001-placed").out


def test_before_any_service_has_run(shop: Shop) -> None:
    shop.write("front.py", SHOP.replace("App(billing, shipping, tax, mail, stock, diary, fraud)", "App()"))
    shop.orders(("first-1", "pay"), app="front")
    result = shop.quick("trace", "first-1")
    assert result.code == 0 and "order.OrderPlaced  first-1" in result.out
    assert "no service has been on its topic" in result.out
    assert "no broker file" in Shop(shop.folder / "empty").quick("trace", "first-1").err


def test_what_waits_says_for_whom(shop: Shop) -> None:
    shop.orders(("done-1", "pay"))
    shop.run()
    shop.orders(("wait-1", "pay"))
    waiting = shop.branches("wait-1")["order.OrderPlaced", "billing"]
    assert waiting["state"] == "waiting" and "unlost run --service billing" in waiting["why"]


def test_what_is_in_a_handler_says_in_whose_hands(shop: Shop) -> None:
    shop.orders(("hang-1", "hang"))
    with shop.start("run", "shop") as running:
        running.says("in the handler")
        found = shop.branches("hang-1")["order.OrderPlaced", "billing"]
        assert found["state"] == "in flight" and f"pid {running.process.pid} " in found["why"]
        running.process.kill()


def test_what_an_operator_did_is_said_with_the_name(shop: Shop) -> None:
    shop.orders(("gone-1", "reject"), ("back-1", "reject"))
    shop.run()
    for action, id in (("discard", "gone-1"), ("redrive", "back-1")):
        said = ("--reason", f"why {action}", "--operator", "ada")
        assert shop.quick("dead", action, "--key", id, "--yes", *said).code == 0
    gone = shop.branches("gone-1")["order.OrderPlaced", "billing"]
    assert gone["state"] == "removed" and "discarded by ada" in gone["why"] and gone["why"].endswith("why discard")
    back = shop.branches("back-1")["order.OrderPlaced", "billing"]
    assert back["state"] == "retrying" and "redriven by ada" in back["why"]
    shop.write("shop.py", SHOP.replace('"reject"', '"never"'))
    shop.run()
    back = shop.branches("back-1")["order.OrderPlaced", "billing"]
    assert back["state"] == "done" and "redriven by ada" in back["why"]


def test_an_id_that_was_published_twice_is_not_guessed_about(shop: Shop) -> None:
    for _ in range(2):
        shop.order("twice-1", "the-same-id")
    shop.note("twice-1")
    shop.run()
    (flow,) = shop.trace("the-same-id")["flows"]
    states = [
        b for e in flow["events"] for b in e["branches"] if e["id"] == "the-same-id" and b["service"] == "billing"
    ]
    assert [b["state"] for b in states] == ["done or skipped"] * 2
    assert all("2 events of this id" in b["why"] for b in states)


@pytest.mark.parametrize(
    ("statement", "key", "state"),
    [
        ("delete from unlost_shelf", "zero-1", "unaccounted"),
        ("delete from unlost_waiting", "late-1", "unaccounted"),
        ("update unlost_progress set fated = x''", "good-1", "unaccounted"),
        ("update unlost_progress set topic_id = 'another'", "good-1", "not known"),
        ("update unlost_progress set start = 100", "good-1", "before its start"),
    ],
)
def test_evidence_that_is_gone_or_about_something_else(
    used: Shop, tmp_path: Path, statement: str, key: str, state: str
) -> None:
    shutil.copytree(used.folder, tmp_path / "harmed")
    harmed = Shop(tmp_path / "harmed")
    assert state not in states(harmed, key)
    harmed.sql(statement)
    assert state in states(harmed, key)


def states(shop: Shop, key: str) -> list[str]:
    """Of the first event, for billing."""
    branches = shop.trace(key)["flows"][0]["events"][0]["branches"]
    return [b["state"] for b in branches if b["service"] == "billing"]


def test_what_the_log_let_go_of_is_found_where_the_store_keeps_it(used: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after Kafka's retention: the log begins behind them."""
    monkeypatch.setattr(ops, "ROWS_MAX", 1)
    ids = {key: [flow["id"] for flow in used.trace(key)["flows"]] for key in ("zero-1", "late-1")}
    with without_the_log(used) as here:
        for key, flows in ids.items():
            found = ops.trace(here, key).flows
            assert [flow.id for flow in found] == flows
            events = [e for flow in found for e in flow.events]
            assert all(not e.in_log and e.type == "order.OrderPlaced" for e in events)
            states = [b.state for e in events for b in e.branches if b.service == "billing"]
            assert states == {"zero-1": ["dead", "parked"], "late-1": ["retrying"]}[key]
        with pytest.raises(UnlostError, match="UL1350"):
            ops.trace(here, "good-1")


@contextmanager
def without_the_log(shop: Shop) -> Iterator[Any]:
    """The same store, beside a log that has let go of every event."""
    with opened(f"embedded://{shop.database}") as here:
        log = here.log
        topics = log.topics
        log.topics = lambda names=None: [  # type: ignore[method-assign]
            msgspec.structs.replace(t, ranges=[(end, end) for _, end in t.ranges]) for t in topics(names)
        ]
        yield here


def event(n: int, id: str, cause: str | None = None) -> Traced:
    return Traced(topic="t", partition=0, position=n, recorded=n, key=None, id=id, cause=cause)


def test_causes_that_make_a_circle_or_are_missing_lose_no_event() -> None:
    events = [
        event(0, "a", "b"), event(1, "b", "a"), event(2, "c", "c"), event(3, "d", "nobody"), event(4, "e", "d"),
        event(5, "d"), event(6, ""),
    ]  # fmt: skip
    shown = ops._tree(events)
    assert sorted(e.position for e in shown) == list(range(7))
    depths = {e.position: e.depth for e in shown}
    assert depths == {0: 0, 1: 1, 2: 0, 3: 0, 4: 1, 5: 0, 6: 0}
    assert [e.position for e in shown if not e.cause_found] == [3]


def test_a_chain_as_deep_as_a_flow_may_be() -> None:
    shown = ops._tree([event(n, str(n), str(n - 1) if n else None) for n in range(ops.EVENTS_MAX)])
    assert [e.depth for e in shown] == list(range(ops.EVENTS_MAX))
