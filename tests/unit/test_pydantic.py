"""A pydantic event is an event wherever an `unlost.Event` is one, and its bytes are the same."""

# ruff: noqa: RUF012
# (both libraries copy the defaults)

from __future__ import annotations

import enum
import json
import re
import subprocess
import sys
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, Optional
from uuid import UUID

import msgspec
import pydantic
import pytest
from cli_kit import SHOP, Shell
from hypothesis import given
from hypothesis import strategies as st

import unlost.pydantic
from unlost import App, Context, Retry, Sensitive, Service, UsageError, upcast
from unlost.errors import Undecodable
from unlost.events import (
    Catalog,
    Envelope,
    Event,
    check_past_tense,
    decode_data,
    encode_data,
    key_of,
    redacted,
    seal,
    sensitive_fields,
)
from unlost.ops.event import project_classes
from unlost.ops.event_check import check
from unlost.ops.event_lock import locked
from unlost.ops.event_shape import object_of
from unlost.ops.publish import build, shown_data
from unlost.testing import running


class Size(enum.Enum):
    SMALL = "small"
    LARGE = "large"


class Line(pydantic.BaseModel):
    sku: str
    cents: int = 0


class TwinLine(msgspec.Struct):
    sku: str
    cents: int = 0


class Everything(unlost.pydantic.Event, key="order_id", type="order.Everything", past_tense=False):
    order_id: str
    whole: int = 0
    real: float = 0.0
    yes: bool = False
    raw: bytes = b""
    price: Decimal = Decimal(0)
    at: datetime = datetime(2026, 1, 2, tzinfo=UTC)
    day: date = date(2026, 1, 2)
    clock: time = time(3, 4)
    span: timedelta = timedelta(0)
    uid: UUID = UUID(int=5)
    size: Size = Size.SMALL
    word: Literal["a", "b"] = "a"
    perhaps: str | None = None
    old_style: Optional[int] = None  # noqa: UP045 - both ways of saying it
    lines: list[Line] = []
    by_name: dict[str, Line] = {}
    numbers: dict[int, str] = {}
    pair: tuple[int, str] = (1, "x")
    many: tuple[int, ...] = ()
    limited: Annotated[int, pydantic.Field(ge=0, lt=10)] = 1
    text: Annotated[str, pydantic.Field(min_length=1, max_length=5)] = "t"
    each: list[Annotated[int, pydantic.Field(gt=0)]] = []
    from_field: int = pydantic.Field(default=1, ge=1, alias="fromField")


class TwinEverything(Event, key="order_id", type="order.Everything", past_tense=False):
    order_id: str
    whole: int = 0
    real: float = 0.0
    yes: bool = False
    raw: bytes = b""
    price: Decimal = Decimal(0)
    at: datetime = datetime(2026, 1, 2, tzinfo=UTC)
    day: date = date(2026, 1, 2)
    clock: time = time(3, 4)
    span: timedelta = timedelta(0)
    uid: UUID = UUID(int=5)
    size: Size = Size.SMALL
    word: Literal["a", "b"] = "a"
    perhaps: str | None = None
    old_style: int | None = None
    lines: list[TwinLine] = []
    by_name: dict[str, TwinLine] = {}
    numbers: dict[int, str] = {}
    pair: tuple[int, str] = (1, "x")
    many: tuple[int, ...] = ()
    limited: Annotated[int, msgspec.Meta(ge=0, lt=10)] = 1
    text: Annotated[str, msgspec.Meta(min_length=1, max_length=5)] = "t"
    each: list[Annotated[int, msgspec.Meta(gt=0)]] = []
    from_field: Annotated[int, msgspec.Meta(ge=1)] = msgspec.field(default=1, name="fromField")


class OrderCreated(unlost.pydantic.Event, key="order_id", version=2):
    order_id: str
    total_cents: pydantic.NonNegativeInt
    email: Sensitive[str] = ""


class OrderTotal(unlost.pydantic.Event, view_of="order.OrderCreated", version=2):
    total_cents: int


class OrderPaid(unlost.pydantic.Event, key="order_id"):
    order_id: str
    email: Sensitive[str] = ""


class SendReceipt(unlost.pydantic.Command, queue="receipts"):
    order_id: str


@upcast(OrderCreated, from_version=1)
def in_cents(data: dict[str, Any]) -> dict[str, Any]:
    return {"order_id": data["order_id"], "total_cents": round(data["total"] * 100)}


def sealed(event: Event, **changed: Any) -> Envelope:
    return msgspec.structs.replace(seal(event, source="test", now=1), **changed)


# --- on the wire --------------------------------------------------------------------------------------------------

TEXT = st.text(max_size=5)
LINES = st.builds(dict, sku=TEXT, cents=st.integers(-9, 9))
VALUES = st.fixed_dictionaries(
    {"order_id": st.text(st.characters(codec="utf-8"), min_size=1)},
    optional={
        "whole": st.integers(-(2**63), 2**64 - 1),
        "real": st.floats(allow_nan=False, allow_infinity=False),
        "yes": st.booleans(),
        "raw": st.binary(max_size=9),
        "price": st.decimals(allow_nan=False, allow_infinity=False, places=2, min_value=-(10**9), max_value=10**9),
        "at": st.datetimes(timezones=st.just(UTC)),
        "day": st.dates(),
        "clock": st.times(),
        "span": st.timedeltas(timedelta(days=-999), timedelta(days=999)),
        "uid": st.uuids(),
        "size": st.sampled_from(Size),
        "word": st.sampled_from(["a", "b"]),
        "perhaps": st.none() | TEXT,
        "old_style": st.none() | st.integers(0, 9),
        "lines": st.lists(LINES, max_size=2),
        "by_name": st.dictionaries(TEXT, LINES, max_size=2),
        "numbers": st.dictionaries(st.integers(-9, 9), TEXT, max_size=2),
        "pair": st.tuples(st.integers(0, 9), TEXT),
        "many": st.lists(st.integers(0, 9)).map(tuple),
        "limited": st.integers(0, 9),
        "text": st.text(min_size=1, max_size=5),
        "each": st.lists(st.integers(1, 9), max_size=2),
        "from_field": st.integers(1, 9),
    },
)


@given(VALUES)
def test_the_bytes_are_those_of_the_twin_and_each_reads_the_other(values: dict[str, Any]) -> None:
    one = Everything(**values)
    of_twin = dict(values)
    if "lines" in values:
        of_twin["lines"] = [TwinLine(**line) for line in values["lines"]]
    if "by_name" in values:
        of_twin["by_name"] = {name: TwinLine(**line) for name, line in values["by_name"].items()}
    other = TwinEverything(**of_twin)
    assert encode_data(one) == encode_data(other)
    assert decode_data(sealed(other), Everything) == one
    assert decode_data(sealed(one), TwinEverything) == other
    assert key_of(one) == key_of(other)
    assert redacted(one) == redacted(other)


def test_the_lock_says_the_same_of_both() -> None:
    assert object_of(Everything) == object_of(TwinEverything)
    assert locked(OrderCreated).fields["email"].sensitive
    assert locked(OrderCreated).upcasts_from == 1


@given(st.binary(max_size=60))
def test_whatever_the_bytes_are_the_answer_is_an_event_or_undecodable(data: bytes) -> None:
    try:
        assert isinstance(decode_data(sealed(OrderPaid(order_id="a"), data=data), OrderPaid), OrderPaid)
    except Undecodable as error:
        assert error.code.startswith("UL5")


@pytest.mark.parametrize("data", [b"[" * 5000, b'{"order_id":' * 5000, b"\xff", b"", b'{"order_id":"\\ud800"}'])
def test_deep_and_broken_data_are_undecodable(data: bytes) -> None:
    with pytest.raises(Undecodable):
        decode_data(sealed(OrderPaid(order_id="a"), data=data), OrderPaid)


def test_a_newer_event_with_more_fields_is_read_by_an_older_class() -> None:
    envelope = sealed(OrderPaid(order_id="a"), data=b'{"order_id":"a","later":1}')
    assert decode_data(envelope, OrderPaid) == OrderPaid(order_id="a")


def test_an_event_that_could_not_be_read_again_is_not_published() -> None:
    for event in (
        OrderCreated.model_construct(order_id="a", total_cents=-1),
        OrderCreated.model_construct(order_id="a"),
        OrderCreated(order_id="a", total_cents=1).model_copy(update={"total_cents": "x"}),
        OrderCreated(order_id="a", total_cents=1).model_copy(update={"email": object()}),
        type("Hidden", (unlost.pydantic.Event,), {"__annotations__": {"pin": pydantic.SecretStr}}, topic="t")(pin="1"),
        type("Real", (unlost.pydantic.Event,), {"__annotations__": {"n": float}}, topic="t")(n=float("nan")),
    ):
        with pytest.raises(UsageError) as caught:
            encode_data(event)
        assert caught.value.code == "UL1013" and caught.value.found


def test_types_of_pydantic_that_msgspec_does_not_know_travel_too(tmp_path: Path) -> None:
    class PageSeen(unlost.pydantic.Event, topic="pages"):
        url: pydantic.HttpUrl
        tree: Tree

    event = PageSeen(url="https://a.example/x", tree=Tree(children=[Tree()]))  # type: ignore[arg-type]
    assert json.loads(encode_data(event)) == {"url": "https://a.example/x", "tree": {"children": [{"children": []}]}}
    assert decode_data(sealed(event), PageSeen) == event
    assert object_of(PageSeen).fields["url"].type == "any"


class Tree(pydantic.BaseModel):
    children: list[Tree] = []


# --- the class ----------------------------------------------------------------------------------------------------


def test_it_is_an_event_with_the_same_declaration() -> None:
    assert issubclass(OrderCreated, Event) and isinstance(OrderPaid(order_id="a"), Event)
    assert not issubclass(Line, Event) and not isinstance(Line(sku="a"), Event)
    assert issubclass(SendReceipt, unlost.Command) and not issubclass(OrderPaid, unlost.Command)
    spec = OrderCreated.__unlost__
    assert (spec.topic, spec.key, spec.type, spec.version) == ("order", "order_id", "order.OrderCreated", 2)
    assert SendReceipt.__unlost__.topic == "receipts" and SendReceipt.__unlost__.is_command
    assert OrderTotal.__unlost__.view_of == "order.OrderCreated"


def test_a_base_hands_down_topic_and_key() -> None:
    class ShopEvent(unlost.pydantic.Event, topic="shop", key="customer_id"): ...

    class BasketFilled(ShopEvent):
        customer_id: str

    assert ShopEvent.__unlost__.abstract and BasketFilled.__unlost__.type == "shop.BasketFilled"


def test_names_are_checked_as_with_others() -> None:
    class CreateOrder(unlost.pydantic.Event, topic="t"):
        n: int = 0

    warning = check_past_tense(CreateOrder)
    assert warning is not None and "UL1005" in warning
    assert check_past_tense(OrderCreated) is None


@pytest.mark.parametrize(
    ("code", "said", "space"),
    [
        ("UL1002", {"key": "nothing"}, {}),
        ("UL1003", {}, {}),
        ("UL1004", {"key": "n", "keyy": "n"}, {}),
        ("UL1004", {"key": "n", "version": 0}, {}),
        ("UL1004", {"queue": "q"}, {}),
        ("UL1378", {"key": "n", "frozen": False}, {}),
        ("UL1378", {"key": "n"}, {"model_config": pydantic.ConfigDict(hide_input_in_errors=False)}),
    ],
)
def test_a_class_that_cannot_be_an_event_is_refused(code: str, said: dict[str, Any], space: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        type("Made", (unlost.pydantic.Event,), {"__annotations__": {"n": int}, "__module__": __name__} | space, **said)
    assert caught.value.code == code


def test_it_cannot_be_changed() -> None:
    with pytest.raises(pydantic.ValidationError):
        OrderPaid(order_id="a").order_id = "b"  # type: ignore[misc]


# --- what may not be seen -----------------------------------------------------------------------------------------


class Checked(unlost.pydantic.Event, key="order_id"):
    order_id: str
    email: Sensitive[pydantic.NonNegativeInt] = pydantic.Field(default=0, alias="eMail")
    inner: list[Inner] = []
    n: int = 0

    @pydantic.field_validator("n")
    @classmethod
    def quotes(cls, value: int, info: pydantic.ValidationInfo) -> int:
        if value:
            raise ValueError(f"with {info.data}")
        return value


class Inner(pydantic.BaseModel):
    street: Sensitive[str]


def test_sensitive_values_are_shown_nowhere() -> None:
    assert sensitive_fields(Checked) == {"email", "inner"}
    event = Checked(order_id="a", email=4711, inner=[Inner(street="canary")])
    for text in (repr(event), str(event), f"{[event]}", str(redacted(event)), str(list(event.__rich_repr__()))):
        assert "4711" not in text and "canary" not in text and "***" in text
    assert redacted({"eMail": 1, "order_id": "a"}, Checked) == {"eMail": "***", "order_id": "a"}
    assert shown_data(sealed(event)) == {"order_id": "a", "eMail": "***", "inner": "***", "n": 0}


@pytest.mark.parametrize(
    "data",
    [
        {"order_id": "a", "eMail": "canary"},
        {"order_id": "a", "eMail": -4711},
        {"order_id": "a", "inner": [{"street": ["canary"]}]},
        {"order_id": "a", "inner": "canary"},
        {"order_id": "a", "eMail": 4711, "n": 1},
        {"eMail": 4711},
        {"order_id": ["canary"]},
        "canary",
    ],
)
def test_an_error_says_what_is_wrong_and_no_value(data: Any) -> None:
    event = Checked(order_id="a")
    with pytest.raises(Undecodable) as caught:
        decode_data(sealed(event, data=json.dumps(data).encode()), Checked)
    assert caught.value.code == "UL5004" and caught.value.found
    assert "canary" not in str(caught.value) and "4711" not in str(caught.value)
    assert caught.value.__context__ is None
    if isinstance(data, dict) and "n" not in data:  # that check quotes on purpose
        with pytest.raises(pydantic.ValidationError) as refused:
            Checked(**data)
        assert "canary" not in str(refused.value) and "4711" not in str(refused.value)


class Card(pydantic.BaseModel):
    kind: Literal["card"]


class Cash(pydantic.BaseModel):
    kind: Literal["cash"]


class Tendered(unlost.pydantic.Event, key="order_id"):
    order_id: str
    by: Annotated[Card | Cash, pydantic.Field(discriminator="kind")] | None = None


def test_a_tag_that_is_not_known_is_not_quoted() -> None:
    event = Tendered(order_id="a", by=Cash(kind="cash"))
    assert decode_data(sealed(event), Tendered) == event
    with pytest.raises(Undecodable) as caught:
        decode_data(sealed(event, data=b'{"order_id":"a","by":{"kind":"canary"}}'), Tendered)
    assert "canary" not in str(caught.value) and "$.by" in caught.value.found


def test_constraints_are_told_with_their_place() -> None:
    with pytest.raises(Undecodable) as caught:
        decode_data(
            sealed(OrderCreated(order_id="a", total_cents=0), data=b'{"order_id":"a","total_cents":-1}'), OrderCreated
        )
    assert "greater than or equal to 0 - at `$.total_cents`" in caught.value.found


def test_fields_whose_types_are_not_there_yet_are_not_shown() -> None:
    class Later(unlost.pydantic.Event, topic="t"):
        email: NotYet  # type: ignore[name-defined] # noqa: F821

    assert sensitive_fields(Later) == {"email"}
    with pytest.raises(UsageError) as caught:
        Catalog([Later])
    assert caught.value.code == "UL1016"


# --- delivery -----------------------------------------------------------------------------------------------------


async def test_it_is_published_handled_shelved_and_redriven() -> None:
    orders, totals, receipts = Service("orders", guarantee="effectively-once"), Service("totals"), Service("receipts")
    paid = Service("paid", retry=Retry(attempts=1))
    seen: list[object] = []
    fails = [True]

    @orders.on(OrderCreated, where=lambda o: o.total_cents > 0)
    async def take(order: OrderCreated, ctx: Context) -> None:
        seen.append(order)
        ctx.publish(OrderPaid(order_id=order.order_id, email=order.email))
        ctx.send(SendReceipt(order_id=order.order_id))

    @totals.on(OrderTotal)
    def add(total: OrderTotal) -> None:
        seen.append(total.total_cents)

    @paid.on(OrderPaid)
    async def pay(event: OrderPaid) -> None:
        if fails:
            raise RuntimeError(f"no: {event!r}")
        seen.append(event)

    @receipts.on(SendReceipt)
    async def send(command: SendReceipt) -> None:
        seen.append(command)

    async with running(App(orders, totals, paid, receipts)) as t:
        await t.publish(OrderCreated(order_id="a", total_cents=5, email="canary"))
        await t.publish(OrderCreated(order_id="free", total_cents=0))
        old = sealed(OrderCreated(order_id="b", total_cents=1), data=b'{"order_id":"b","total":1.5}', eventversion=1)
        await t.app.broker.publish([old])
        await t.settled()
        letters = t.dead_letters()
        assert [letter.reason for letter in letters] == ["exhausted", "exhausted"]
        assert all("canary" not in letter.error + letter.stack for letter in letters)
        assert any("OrderPaid(order_id='a', email=***)" in letter.error for letter in letters)
        assert OrderCreated(order_id="a", total_cents=5, email="canary") in seen
        assert OrderCreated(order_id="b", total_cents=150) in seen
        assert sorted(n for n in seen if isinstance(n, int)) == [0, 5, 150]
        fails.clear()
        for letter in letters:
            if letter.service == "paid":
                await t.redrive(letter)
        await t.settled()
        assert OrderPaid(order_id="a", email="canary") in seen and SendReceipt(order_id="a") in seen
        assert t.books.unaccounted == 0


async def test_what_breaks_a_constraint_goes_to_the_shelf() -> None:
    service = Service("s")

    @service.on(OrderCreated)
    async def take(order: OrderCreated) -> None:
        raise AssertionError("not to be handled")

    async with running(App(service)) as t:
        bad = sealed(OrderCreated(order_id="a", total_cents=1), data=b'{"order_id":"a","total_cents":-4711}')
        await t.app.broker.publish([bad])
        await t.settled()
        letter = t.dead(service)
        assert letter.reason == "undecodable" and "greater than or equal to 0" in letter.error
        assert "4711" not in letter.error and letter.data == bad.data


# --- operators ----------------------------------------------------------------------------------------------------


def test_the_lock_finds_what_a_change_breaks(tmp_path: Path) -> None:
    def made(**fields: Any) -> Any:
        return type("Grown", (unlost.pydantic.Event,), {"__annotations__": fields, "__module__": __name__}, topic="t")

    check(App(), [made(a=int)], tmp_path / "lock", update=True)
    assert check(App(), [made(a=int)], tmp_path / "lock").changes == []
    assert {f.kind for f in check(App(), [made(a=int, b=str)], tmp_path / "lock").findings} == {"backward"}
    narrower = made(a=Annotated[int, pydantic.Field(ge=0)])
    assert {f.kind for f in check(App(), [narrower], tmp_path / "lock").findings} == {"backward"}
    assert OrderCreated in project_classes(App())


def test_it_is_built_from_texts() -> None:
    made = build(Everything, {"order_id": "5", "whole": "5", "lines": '[{"sku": "a"}]', "fromField": "3"})
    assert made == Everything(order_id="5", whole=5, lines=[Line(sku="a")], from_field=3)
    with pytest.raises(UsageError) as caught:
        build(Everything, {"order_id": "5", "limited": "10"})
    assert caught.value.code == "UL1326"
    with pytest.raises(UsageError) as caught:
        build(OrderCreated, {"order_id": "5"})
    assert caught.value.code == "UL1325"


def test_the_command_line_knows_it(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    text = SHOP.replace("class OrderPlaced(Event", "import unlost.pydantic\n\nclass OrderPlaced(unlost.pydantic.Event")
    shell.write("shop.py", text)
    shell.ok("publish", "OrderPlaced", "order_id=a", "total_cents=5", "email=canary", 'tags=["x"]', "--app", "shop")
    refused = shell("publish", "OrderPlaced", "order_id=a", "total_cents=x", "--app", "shop")
    assert refused.code == 2 and "UL1326" in refused.err
    shown = shell.ok("tail", "--data", "--json", "--app", "shop")
    assert shown.lines[0]["data"] == {"order_id": "a", "total_cents": 5, "email": "***", "tags": ["x"]}
    assert "shop.OrderPlaced" in shell.ok("event", "list", "--app", "shop").out
    assert shell("event", "check", "--update", "--app", "shop").code == 0


def test_without_pydantic_the_error_says_what_to_install() -> None:
    code = "import sys; sys.modules['pydantic'] = None\nimport unlost.pydantic"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "UL1377" in done.stderr and 'pip install "unlost[pydantic]"' in done.stderr


def test_the_models_of_the_page_are_events() -> None:
    there: dict[str, Any] = {"__name__": "shop"}
    page = Path(__file__).resolve().parents[2] / "docs" / "changing-events.md"
    program = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)[1]
    exec(compile(program, "page", "exec", dont_inherit=True), there)
    event = there["OrderPaid"](order_id="a", cents=1, email="canary")
    assert "canary" not in repr(event) and decode_data(sealed(event), there["OrderPaid"]) == event
    assert key_of(there["SendReceipt"](order_id="a")) == b"a"
