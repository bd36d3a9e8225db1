"""Events of older versions reach the classes of today, or the shelf with the upcaster's name; their bytes never change."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unlost import App, Command, Context, Event, Retry, Sensitive, Service, UsageError, upcast
from unlost.errors import Undecodable
from unlost.events import Catalog, Envelope, seal, steps_of, try_decode
from unlost.events.model import EventMeta  # type: ignore[attr-defined]
from unlost.ops.event import view_findings
from unlost.ops.event_check import Checked, check
from unlost.testing import Running, running

Data = dict[str, Any]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "changing-events.md"


class OldPriced(Event, key="sku", type="sku.Priced"):
    sku: str
    price: float  # euros


class MiddlePriced(Event, key="sku", type="sku.Priced", version=2):
    sku: str
    cents: int


class Priced(Event, key="sku", type="sku.Priced", version=3):
    sku: str
    cents: int
    currency: str
    note: str = ""


@upcast(Priced, from_version=1)
def in_cents(data: Data) -> Data:
    return {"sku": data["sku"], "cents": round(data["price"] * 100)}


@upcast(Priced, from_version=2)
def with_currency(data: Data) -> Data:
    data["currency"] = "EUR"  # its own copy: nobody else sees it
    return data


class PriceSeen(Event, view_of="sku.Priced", topic="sku", version=3):
    cents: int
    currency: str


class CentsSeen(Event, view_of="sku.Priced", topic="sku", version=2):
    cents: int


class RawSeen(Event, view_of="sku.Priced", topic="sku"):
    sku: str
    price: float = 0.0
    cents: int = 0


class OldSendBill(Command, queue="bills", type="bills.SendBill"):
    to: str


class SendBill(Command, queue="bills", version=2):
    address: str


@upcast(SendBill, from_version=1)
def to_address(data: Data) -> Data:
    return {"address": data["to"]}


def sealed(event: Event, **changed: Any) -> Envelope:
    return msgspec.structs.replace(seal(event, source="test", now=1), **changed)


def make(name: str, version: int = 1, fields: dict[str, type] | None = None, **said: Any) -> Any:
    space = {"__annotations__": fields or {"sku": str}, "__module__": __name__}
    return EventMeta(name, (Event,), space, version=version, **{"key": "sku"} | said)


# --- decoding -----------------------------------------------------------------------------------------------------

OLD = OldPriced(sku="a", price=1.25)


@pytest.mark.parametrize(
    ("cls", "event", "read"),
    [
        (Priced, OLD, Priced(sku="a", cents=125, currency="EUR")),
        (Priced, MiddlePriced(sku="a", cents=7), Priced(sku="a", cents=7, currency="EUR")),
        (Priced, Priced(sku="a", cents=7, currency="USD"), Priced(sku="a", cents=7, currency="USD")),
        (PriceSeen, OLD, {"cents": 125, "currency": "EUR"}),
        (PriceSeen, Priced(sku="a", cents=7, currency="USD"), {"cents": 7, "currency": "USD"}),
        (CentsSeen, OLD, {"cents": 125}),
        (CentsSeen, Priced(sku="a", cents=7, currency="USD"), {"cents": 7}),
        (RawSeen, OLD, {"sku": "a", "price": 1.25, "cents": 0}),
        (SendBill, OldSendBill(to="x"), SendBill(address="x")),
    ],
)
def test_each_version_is_read_by_the_class_of_today(cls: type[Event], event: Event, read: object) -> None:
    found = Catalog([cls]).decode(sealed(event), cls)
    assert isinstance(found, cls)
    assert (found if isinstance(read, Event) else msgspec.to_builtins(found)) == read


def test_the_short_way_to_an_event_is_for_version_1_of_a_class() -> None:
    assert try_decode(b'{"sku":"a","price":1.5}', OldPriced) == OldPriced(sku="a", price=1.5)
    assert try_decode(b'{"sku":"a","cents":1,"currency":"EUR"}', Priced) is None
    assert try_decode(b'{"cents":1,"currency":"EUR"}', PriceSeen) is None


def test_a_newer_version_keeps_its_rule() -> None:
    with pytest.raises(Undecodable) as caught:
        Catalog([Priced]).decode(sealed(OLD, eventversion=4), Priced)
    assert caught.value.code == "UL5003"


def test_versions_before_the_first_step_are_given_to_it_as_they_are() -> None:
    cls = make("Raised", 3)
    upcast(cls, from_version=2)(lambda data: data | {"sku": data["sku"] + "!"})
    assert Catalog([cls]).decode(sealed(make("Raised")(sku="a")), cls).sku == "a!"


def test_without_a_step_an_older_version_is_read_as_it_is() -> None:
    cls = make("Compatible", 2)
    assert steps_of(cls) == ()
    assert Catalog([cls]).decode(sealed(make("Compatible")(sku="a")), cls).sku == "a"


class Secret(Event, key="sku", version=2):
    sku: str
    email: Sensitive[str] = ""


def _raises(data: Data) -> Data:
    raise ValueError(f"cannot use {data}")


@pytest.mark.parametrize(
    ("function", "code", "said"),
    [
        (_raises, "UL1375", "ValueError in _raises, line "),
        (lambda data: data["nothing"], "UL1375", "KeyError"),
        (lambda data: None, "UL1375", "returned nothing"),
        (lambda data: [1], "UL1375", "returned a list, not a dict"),
        (lambda data: {"sku": object()}, "UL1375", "what is no JSON"),
        (lambda data: {}, "UL1376", "missing required field"),
        (lambda data: {"sku": "a", "email": ["canary"]}, "UL1376", "a value that is not valid - at `$.email`"),
    ],
)
def test_an_upcaster_that_fails_is_named_and_no_data_are_shown(function: Any, code: str, said: str) -> None:
    cls = EventMeta("Bad", (Secret,), {"__annotations__": {}, "__module__": __name__}, version=2)
    function.__name__ = "broken_step"
    upcast(cls, from_version=1)(function)
    envelope = sealed(Secret(sku="a", email="canary"), eventversion=1, type=cls.__unlost__.type)
    with pytest.raises(Undecodable) as caught:
        Catalog([cls]).decode(envelope, cls)
    text = str(caught.value)
    assert caught.value.code == code
    assert said in text and "broken_step (1 → 2)" in text
    assert "canary" not in text and caught.value.__cause__ is None and caught.value.__context__ is None


@pytest.mark.parametrize("data", [b"[1]", b"no", b"\xff", b"[" * 5000, b"3", b"null"])
def test_data_that_are_no_object_do_not_reach_an_upcaster(data: bytes) -> None:
    with pytest.raises(Undecodable) as caught:
        Catalog([Priced]).decode(sealed(OLD, data=data), Priced)
    assert caught.value.code == "UL5004"


@given(st.binary(max_size=60), st.integers(1, 3))
def test_whatever_the_bytes_are_the_answer_is_an_event_or_undecodable(data: bytes, version: int) -> None:
    try:
        assert isinstance(Catalog([Priced]).decode(sealed(OLD, data=data, eventversion=version), Priced), Priced)
    except Undecodable as error:
        assert error.code.startswith("UL")


# --- what is refused ----------------------------------------------------------------------------------------------


def refused(code: str, do: Callable[[], object]) -> str:
    with pytest.raises(UsageError) as caught:
        do()
    assert caught.value.code == code
    assert caught.value.found and caught.value.fix
    return str(caught.value)


@pytest.mark.parametrize("version", [0, -1, 3, 4, True, "1", 1.0])
def test_a_step_is_below_the_version_of_the_class(version: Any) -> None:
    assert "3" in refused("UL1370", lambda: upcast(Priced, from_version=version))


def test_only_an_event_class_has_steps() -> None:
    refused("UL1370", lambda: upcast(dict, from_version=1))  # type: ignore[type-var]
    refused("UL1370", lambda: upcast(Event, from_version=1))


def test_an_upcaster_is_a_plain_function() -> None:
    async def later(data: Data) -> Data:
        return data

    refused("UL1371", lambda: upcast(make("Later", 2), from_version=1)(later))  # type: ignore[type-var]
    refused("UL1371", lambda: upcast(make("Nothing", 2), from_version=1)(None))  # type: ignore[type-var]


def test_a_step_is_claimed_once() -> None:
    cls = make("Twice", 2)
    upcast(cls, from_version=1)(in_cents)
    upcast(cls, from_version=1)(in_cents)  # the same function: nothing new
    text = refused("UL1372", lambda: upcast(cls, from_version=1)(with_currency))
    assert "in_cents" in text and "with_currency" in text
    assert [str(step) for step in steps_of(cls)] == ["in_cents (1 → 2)"]


@pytest.mark.parametrize(
    ("steps", "missing"), [((1, 3), "none from 2"), ((1, 2), "none from 3"), ((2,), "none from 3")]
)
async def test_an_app_does_not_start_with_a_missing_step(steps: tuple[int, ...], missing: str) -> None:
    cls = make("Holes", 4)
    service = Service("s")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")

        @service.on(cls)
        async def handle(event: Any) -> None: ...

    for version in steps:
        upcast(cls, from_version=version)(lambda data: data)
    app = App(service)
    with pytest.raises(UsageError) as caught:
        async with running(app):
            pass
    assert caught.value.code == "UL1373" and missing in str(caught.value)


def test_a_view_takes_no_step_that_two_classes_have() -> None:
    for _ in range(2):
        upcast(make("Doubled", 2), from_version=1)(lambda data: data)
    view = make("DoubledSeen", 2, key=None, view_of="sku.Doubled")
    refused("UL1374", lambda: steps_of(view))
    upcast(view, from_version=1)(in_cents)
    assert [step.function for step in steps_of(view)] == [in_cents]


def test_a_view_of_an_event_of_another_project_has_its_own_steps() -> None:
    view = make("FarSeen", 2, key=None, view_of="far.Away")
    upcast(view, from_version=1)(lambda data: {"sku": data["id"]})
    assert Catalog([view]).decode(sealed(OLD, data=b'{"id":"a"}'), view).sku == "a"


# --- delivery -----------------------------------------------------------------------------------------------------


async def publish_raw(t: Running, *envelopes: Envelope) -> None:
    await t.app.broker.publish(envelopes)


async def test_old_events_are_handled_in_order_by_class_view_and_command() -> None:
    whole, seen, raw, bills = (
        Service("whole", guarantee="effectively-once"),
        Service("seen"),
        Service("raw"),
        Service("b"),
    )
    got: list[object] = []

    @whole.on(Priced, where=lambda e: e.currency == "EUR")
    async def take(event: Priced, ctx: Context) -> None:
        got.append(event)

    @seen.on(PriceSeen)
    def see(event: PriceSeen) -> None:
        got.append((event.cents, event.currency))

    @raw.on(RawSeen)
    async def see_raw(event: RawSeen) -> None:
        got.append((event.price, event.cents))

    @bills.on(SendBill)
    async def send(command: SendBill) -> None:
        got.append(command)

    async with running(App(whole, seen, raw, bills)) as t:
        await publish_raw(t, sealed(OLD), sealed(MiddlePriced(sku="a", cents=7)), sealed(OldSendBill(to="x")))
        await t.publish(Priced(sku="a", cents=9, currency="EUR"))
        await t.settled()
        assert [e.cents for e in got if isinstance(e, Priced)] == [125, 7, 9]
        assert [e for e in got if isinstance(e, tuple) and isinstance(e[1], str)] == [
            (125, "EUR"),
            (7, "EUR"),
            (9, "EUR"),
        ]
        assert [e for e in got if isinstance(e, tuple) and isinstance(e[1], int)] == [(1.25, 0), (0.0, 7), (0.0, 9)]
        assert SendBill(address="x") in got
        assert t.books.unaccounted == 0


async def test_a_failing_upcaster_shelves_the_event_and_parks_its_key_until_a_corrected_one_redrives() -> None:
    cls = make("Repaired", 2, topic="repairs")
    broken = [True]

    @upcast(cls, from_version=1)
    def repair(data: Data) -> Data:
        if broken:
            raise RuntimeError("not yet")
        return {"sku": data["sku"] + "!"}

    service = Service("s", retry=Retry(attempts=3))
    seen: list[str] = []

    @service.on(cls)
    async def handle(event: Any) -> None:
        seen.append(event.sku)

    old = make("Repaired", topic="repairs")
    async with running(App(service)) as t:
        envelope = sealed(old(sku="a"))
        await publish_raw(t, envelope)
        await t.publish(cls(sku="a"))
        await publish_raw(t, sealed(old(sku="a")))
        await t.settled()
        letter = t.dead(service)
        assert letter.reason == "undecodable"
        assert "repair (1 → 2)" in letter.error and "RuntimeError" in letter.error
        assert letter.data == envelope.data
        book = t.books.services["s"]
        assert (book.dead, book.parked, book.done) == (1, 2, 0)
        broken.clear()
        await t.redrive(letter)
        await t.settled()
        assert seen == ["a!", "a", "a!"]
        assert [e.data for e in t.envelopes(cls)] == [b'{"sku":"a"}'] * 3
        assert t.books.unaccounted == 0


# --- the lock -----------------------------------------------------------------------------------------------------


def checked(folder: Path, *classes: type[Event], update: bool = False) -> Checked:
    return check(App(), classes, folder / "lock", update=update)


def test_a_change_that_an_upcaster_bridges_is_no_break_for_new_readers(tmp_path: Path) -> None:
    checked(tmp_path, OldPriced, update=True)
    alone = EventMeta("Priced", (Event,), {"__annotations__": {"sku": str, "cents": int}}, key="sku", version=3)
    assert "backward" in {f.kind for f in checked(tmp_path, alone).findings}
    found = checked(tmp_path, Priced)
    assert "backward" not in {f.kind for f in found.findings}
    said = [change.what for change in found.changes]
    assert "version: 1 → 3" in said
    assert "upcaster in_cents (1 → 2): events of version 1 in the log are brought up by it" in said
    assert "upcaster with_currency (2 → 3): events of version 2 in the log are brought up by it" in said
    # releases that still run do not become newer by it
    assert {f.field for f in found.findings if f.kind == "forward"} == {"price"}
    assert not checked(tmp_path, Priced, update=True).breaks
    again = checked(tmp_path, Priced)
    assert (again.changes, again.findings) == ([], [])


def test_a_step_that_does_not_begin_at_the_locked_version_bridges_nothing(tmp_path: Path) -> None:
    checked(tmp_path, make("Jumped"), update=True)
    cls = EventMeta("Jumped", (Event,), {"__annotations__": {"sku": str, "cents": int}}, key="sku", version=3)
    upcast(cls, from_version=2)(lambda data: data)
    assert "cents" in {f.field for f in checked(tmp_path, cls).findings if f.kind == "backward"}


def test_an_upcaster_that_goes_away_is_a_break(tmp_path: Path) -> None:
    checked(tmp_path, Priced, update=True)
    bare = EventMeta("Priced", (Event,), {"__annotations__": Priced.__annotations__, "note": ""}, key="sku", version=3)
    [finding] = checked(tmp_path, bare).findings
    assert finding.kind == "backward" and "events of version 1 to 2" in finding.what
    assert not checked(tmp_path, bare, update=True).breaks
    assert checked(tmp_path, bare).findings == []


def test_a_view_is_compared_with_what_it_gets_to_read(tmp_path: Path) -> None:
    checked(tmp_path, OldPriced, update=True)
    found = checked(tmp_path, Priced, PriceSeen, CentsSeen)
    assert [f for f in found.findings if f.kind == "view"] == []
    raw = EventMeta("RawCents", (Event,), {"__annotations__": {"cents": int}}, view_of="sku.Priced", topic="sku")
    assert [f.name for f in checked(tmp_path, Priced, raw).findings if f.kind == "view"] == ["RawCents"]
    checked(tmp_path, Priced, update=True)
    assert [f for f in checked(tmp_path, Priced, PriceSeen).findings if f.kind == "view"] == []
    assert view_findings(App(), [Priced, PriceSeen], None) == []


# --- the page about it --------------------------------------------------------------------------------------------


async def test_the_program_of_the_page_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there: dict[str, Any] = {"__name__": "shop"}
    program = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)[0]
    exec(compile(program, "page", "exec", dont_inherit=True), there)
    old = make("OrderPlaced", key="order_id", fields={"order_id": str, "total": float})
    async with running(there["app"]) as t:
        await publish_raw(t, sealed(old(order_id="a", total=1.5)))
        await t.publish(there["OrderPlaced"](order_id="a", total_cents=7, currency="USD"))
        await t.settled()
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if "charged" in line] == ["charged 150 EUR", "charged 7 USD"]
    assert [line for line in said if "added" in line] == ["added 150", "added 7"]

    checked(tmp_path, old, update=True)
    changes = [f"{c.type}  {c.what}" for c in checked(tmp_path, there["OrderPlaced"]).changes]
    shown = re.findall(r"```\n(order.OrderPlaced.*?)```", PAGE.read_text(), re.S)[0].splitlines()
    assert len(shown) == 2 and set(shown) <= set(changes)
