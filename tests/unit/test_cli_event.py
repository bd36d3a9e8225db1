"""`unlost event list`, `check`, `usage`: what there is, what a change breaks, who reads what."""

from __future__ import annotations

import enum
import json
import re
import types
from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypedDict, TypeVar
from uuid import UUID

import msgspec
import pytest
from cli_kit import Result, Shell

from unlost import App, Event, UsageError
from unlost.ops.event import event_list, event_usage
from unlost.ops.event_check import Checked, check
from unlost.ops.event_lock import lock_bytes, locked, read_lock
from unlost.ops.event_shape import Field, Object, Shape, problems, shape_of, shown

ROOT = Path(__file__).resolve().parents[2]

# --- can one type be read as another? Asked of msgspec itself, with values ------------------------------------


class Size(enum.Enum):
    SMALL = "small"
    LARGE = "large"


class MoreSizes(enum.Enum):
    SMALL = "small"
    LARGE = "large"
    HUGE = "huge"


class Grade(enum.IntEnum):
    ONE = 1
    TWO = 2


class Line(msgspec.Struct):
    sku: str
    cents: int
    note: str = ""


class Short(msgspec.Struct):
    sku: str


class Tree(msgspec.Struct):
    sku: str
    parts: list[Tree] = []


class LooseTree(msgspec.Struct):
    sku: str | None
    parts: list[LooseTree] = []


class Sealed(msgspec.Struct, forbid_unknown_fields=True):
    sku: str


class SealedCash(msgspec.Struct, forbid_unknown_fields=True):
    cents: int
    euros: int = 0


class Sparing(msgspec.Struct, omit_defaults=True):
    sku: str
    cents: int = 0


class Cash(msgspec.Struct, tag="cash"):
    cents: int


class Card(msgspec.Struct, tag="card"):
    number: str


class Row(msgspec.Struct, array_like=True):
    sku: str
    cents: int


class Pair(NamedTuple):
    sku: str
    cents: int


class Loose(TypedDict, total=False):
    sku: str


T = TypeVar("T")


class Page(msgspec.Struct, Generic[T]):
    items: list[T]


MOMENT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
LINE = Line("a", 1)
SAMPLES: list[tuple[Any, list[Any]]] = [
    (Any, [1, "a", None, {"sku": "a"}]),
    (None, [None]),
    (bool, [True]),
    (int, [-7, 0, 10**12]),
    (float, [-0.5, 2.0]),
    (Decimal, [Decimal("1.5"), Decimal("-1.2345678")]),
    (str, ["", "?", "longer text"]),
    (bytes, [b"x"]),
    (datetime, [MOMENT, MOMENT.replace(tzinfo=None)]),
    (Annotated[datetime, msgspec.Meta(tz=True)], [MOMENT]),
    (date, [date(2026, 1, 2)]),
    (time, [time(3, 4)]),
    (timedelta, [timedelta(days=400, seconds=5)]),
    (UUID, [UUID(int=5)]),
    (Size, [Size.SMALL, Size.LARGE]),
    (MoreSizes, list(MoreSizes)),
    (Literal["small"], ["small"]),
    (Literal["small", 1, None], ["small", 1, None]),
    (Grade, list(Grade)),
    (int | None, [3, None]),
    (str | None, ["", None]),
    (int | str, [3, ""]),
    (Annotated[int, msgspec.Meta(ge=0)], [0, 10**12]),
    (Annotated[int, msgspec.Meta(gt=0, lt=10)], [1, 9]),
    (Annotated[int, msgspec.Meta(ge=5, le=8, multiple_of=5)], [5]),
    (Annotated[float, msgspec.Meta(gt=0)], [0.5, 1e9]),
    (Annotated[str, msgspec.Meta(min_length=1)], ["b", "a" * 99]),
    (Annotated[str, msgspec.Meta(max_length=5)], ["", "small"]),
    (Annotated[str, msgspec.Meta(pattern="^a")], ["a", "a" * 99]),
    (list[int], [[], [1]]),
    (set[int], [{1}]),
    (tuple[float, ...], [(0.5,), ()]),
    (tuple[int, int], [(1, 2)]),
    (tuple[int, str], [(1, "a")]),
    (Annotated[list[int], msgspec.Meta(min_length=2)], [[1, 2], [1, 2, 3]]),
    (dict[str, int], [{}, {"sku": 1}]),
    (dict[str, int | None], [{"sku": None}]),
    (dict[int, str], [{1: "a"}]),
    (dict[str, Any], [{"sku": 1, "a": "x"}]),
    (Line, [LINE]),
    (Short, [Short("a")]),
    (Tree, [Tree("a", [Tree("b", [Tree("c")])])]),
    (LooseTree, [LooseTree(None, [LooseTree("b", [LooseTree(None)])])]),
    (Sealed, [Sealed("a")]),
    (SealedCash, [SealedCash(1)]),
    (Sparing, [Sparing("a"), Sparing("a", 5)]),
    (Loose, [{}, {"sku": "a"}]),
    (Row, [Row("a", 1)]),
    (Pair, [Pair("a", 1)]),
    (Cash, [Cash(1)]),
    (Cash | Card, [Cash(1), Card("4")]),
    (Card | Cash | None, [Cash(1), Card("4"), None]),
    (Page[int], [Page([1])]),
    (Page[str], [Page(["a"])]),
    (list[Line], [[LINE]]),
    (list[Line | None], [[LINE, None]]),
]
SHAPES: list[Shape] = [shape_of(msgspec.inspect.type_info(hint)) for hint, _ in SAMPLES]


def readable(reader: Shape, writer: Shape) -> bool:
    return not problems(Object({"x": Field(reader, True)}), Object({"x": Field(writer, True)}))


def decodes(hint: Any, value: Any) -> bool:
    try:
        msgspec.json.decode(msgspec.json.encode(value), type=hint)
    except msgspec.ValidationError:
        return False
    return True


# What msgspec would take, and we do not vouch for: it would be something else (base64), or nobody wants to rely on it.
CAUTIOUS = {
    *(
        ("str(min_length=1)", text)
        for text in ("decimal", "date", "time", "datetime", "datetime(tz=True)", "timedelta")
    ),
    *(("str(min_length=1)", text) for text in ("uuid", "str(pattern=^a)")),
    ("str", "bytes"),
    ("str | None", "bytes"),
    ("int | str", "bytes"),
    ("str(min_length=1)", "bytes"),
    ("str(max_length=5)", "bytes"),
    ("bytes", "timedelta"),
    ("{sku: str}", "dict[int, str]"),
    ("{parts: list[itself], sku: str | None}", "dict[str, int | None]"),
    ("{cents: int}", "{cents: int, euros: int}"),
    ("{cents: int}", "{cents: int, note: str, sku: str}"),  # one that should be tagged, without its tag
}


@pytest.mark.parametrize("n", range(len(SAMPLES)), ids=[shown(shape)[:40] for shape in SHAPES])
def test_a_type_is_readable_exactly_where_msgspec_reads_all_its_values(n: int) -> None:
    hint, reader = SAMPLES[n][0], SHAPES[n]
    wrong = {}
    for (_, values), writer in zip(SAMPLES, SHAPES, strict=True):
        said, true = readable(reader, writer), all(decodes(hint, value) for value in values)
        if said != true and (shown(reader), shown(writer)) not in CAUTIOUS:
            wrong[shown(writer)] = said
    assert wrong == {}


# --- what a change of a class breaks --------------------------------------------------------------------------


def project(body: str, services: str = "billing.on(OrderPlaced)(lambda o: None)") -> tuple[App, list[type[Event]]]:
    """A module with these classes, and an App with the services billing, mail and stock."""
    module = types.ModuleType("shop")
    text = f"""
import enum
from typing import *
import msgspec
from unlost import *
{body}
billing, mail, stock = Service("billing"), Service("mail"), Service("stock")
app = App(billing, mail, stock)
{services}
"""
    exec(compile(text, "shop.py", "exec", dont_inherit=True), module.__dict__)
    classes = [
        value
        for value in dict.fromkeys(v for v in vars(module).values() if isinstance(v, type))
        if issubclass(value, Event) and not value.__unlost__.abstract
    ]
    return module.__dict__["app"], sorted(classes, key=lambda cls: (cls.__unlost__.type, cls.__name__))


def placed(*fields: str, said: str = "", name: str = "OrderPlaced") -> str:
    lines = "".join(f"    {field}\n" for field in ("order_id: str", *fields))
    return f'class {name}(Event, topic="order", key="order_id"{said}):\n{lines}'


def compared(tmp_path: Path, old: str, new: str, services: str | None = None) -> Checked:
    """What `check` says of `new` where `old` is in the lock; and that after `--update` nothing of it is said again."""
    lock = tmp_path / "lock"
    more = {} if services is None else {"services": services}
    check(*project(old, **more), lock, update=True)
    before = lock.read_bytes()
    found = check(*project(new, **more), lock)
    assert lock.read_bytes() == before
    assert check(*project(new, **more), lock, update=True).written == (found.changes != [])
    after = check(*project(new, **more), lock)
    assert after.changes == []
    by_itself = ("view", "name", "queue", "twice")
    assert [f for f in after.findings if f.kind not in by_itself] == []
    return found


def short(found: Checked) -> list[str]:
    return [f"{f.kind} {f.field}".rstrip() for f in found.findings]


LINE_CLASS = "class Line(msgspec.Struct):\n    sku: str\n    cents: int{}\n"
SIZES = 'class Size(enum.Enum):\n    SMALL = "s"\n    LARGE = "l"\n{}'
CHANGES: list[tuple[str, str, str, list[str]]] = [
    ("nothing", placed("a: int"), placed("a: int"), []),
    ("another order", placed("a: int", "b: str"), placed("b: str", "a: int"), []),
    ("with a default", placed(), placed("a: int = 0"), []),
    ("without a default", placed(), placed("a: int"), ["backward a"]),
    ("default taken away", placed("a: int = 0"), placed("a: int"), ["backward a"]),
    ("default given", placed("a: int"), placed("a: int = 0"), []),
    ("default given, and left out", placed("a: int"), placed("a: int = 0", said=", omit_defaults=True"), ["forward a"]),
    ("unset", placed("a: int"), placed("a: int | msgspec.UnsetType = msgspec.UNSET"), ["forward a"]),
    ("required removed", placed("a: int"), placed(), ["forward a"]),
    ("default removed", placed("a: int = 0"), placed(), []),
    ("int to float", placed("a: int"), placed("a: float"), ["forward a"]),
    ("float to int", placed("a: float"), placed("a: int"), ["backward a"]),
    ("may be None", placed("a: str"), placed("a: str | None"), ["forward a"]),
    ("not None any more", placed("a: str | None"), placed("a: str"), ["backward a"]),
    ("str to int", placed("a: str"), placed("a: int"), ["backward a", "forward a"]),
    ("list to set", placed("a: list[int]"), placed("a: set[int]"), []),
    ("a tighter limit", placed("a: int"), placed("a: Annotated[int, msgspec.Meta(ge=0)]"), ["backward a"]),
    ("a looser limit", placed("a: Annotated[int, msgspec.Meta(ge=1)]"), placed("a: Annotated[int, msgspec.Meta(gt=-1)]"), ["forward a"]),
    ("one more member", SIZES.format("") + placed("a: Size"), SIZES.format('    HUGE = "h"\n') + placed("a: Size"), ["forward a"]),
    ("one member less", placed('a: Literal["s", "l"]'), placed('a: Literal["s"]'), ["backward a"]),
    ("an enum for a Literal", placed('a: Literal["s", "l"]'), SIZES.format("") + placed("a: Size"), []),
    ("nested, with a default", LINE_CLASS.format("") + placed("a: list[Line]"), LINE_CLASS.format("\n    n: int = 0") + placed("a: list[Line]"), []),
    ("nested, required", LINE_CLASS.format("") + placed("a: list[Line]"), LINE_CLASS.format("\n    n: int") + placed("a: list[Line]"), ["backward a[].n"]),
    ("nested, removed", LINE_CLASS.format("\n    n: int") + placed("a: dict[str, Line]"), LINE_CLASS.format("") + placed("a: dict[str, Line]"), ["forward a[].n"]),
    ("unknown fields refused", placed("a: int = 0"), placed(said=", forbid_unknown_fields=True"), ["backward a"]),
    ("unknown fields were refused", placed(said=", forbid_unknown_fields=True"), placed("a: int = 0"), ["forward a"]),
    ("renamed, a word in common", placed("total_cents: int"), placed("amount_cents: int"), ["renamed total_cents"]),
    ("renamed on the wire", placed("total_cents: int", "net_cents: int"), placed("total_cents: int", "net_cents: int", said=', rename={"total_cents": "totalCents", "net_cents": "netCents"}'), ["renamed net_cents", "renamed total_cents"]),
    ("renamed, with defaults", placed("a: int = 0"), placed("b: int = 0"), ["renamed a"]),
    ("renamed, the same on the wire", placed("a: int"), placed('b: int = msgspec.field(name="a")'), []),
    ("another type, another name", placed("a: int = 0"), placed('b: str = ""'), []),
    ("no longer Sensitive", placed("a: Sensitive[str]"), placed("a: str"), ["privacy a"]),
    ("now Sensitive", placed("a: str"), placed("a: Sensitive[str]"), []),
    ("version raised", placed(), placed(said=", version=2"), []),
    ("version lowered", placed(said=", version=2"), placed(), ["identity"]),
    ("another key", placed("a: str"), placed("a: str").replace('key="order_id"', 'key="a"'), ["identity"]),
    ("another topic", placed(), placed(said=', type="order.OrderPlaced"').replace('topic="order"', 'topic="shop"'), ["identity"]),
    ("another wire type", placed(), placed(said=', type="order.Placed"'), ["identity"]),
    ("another class name", placed("a: int"), placed("a: int", name="OrderMade") + "OrderPlaced = OrderMade\n", ["identity"]),
    ("another class name, the same type", placed(), placed(name="OrderMade", said=', type="order.OrderPlaced"') + "OrderPlaced = OrderMade\n", []),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "kinds"), [c[1:] for c in CHANGES], ids=[c[0] for c in CHANGES])
def test_what_a_change_breaks(tmp_path: Path, old: str, new: str, kinds: list[str]) -> None:
    found = compared(tmp_path, old, new)
    assert short(found) == kinds
    assert found.breaks == bool(kinds)
    assert all(finding.hurts == ["billing"] for finding in found.findings if finding.field)
    assert all(finding.what and finding.fix for finding in found.findings)


def test_an_event_that_comes_and_goes(tmp_path: Path) -> None:
    both, one = placed() + placed("a: int", name="OrderPaid"), placed()
    assert short(compared(tmp_path, one, both)) == []
    gone = compared(tmp_path, both, one)
    assert [(f.kind, f.type) for f in gone.findings] == [("identity", "order.OrderPaid")]
    back = check(*project(placed() + placed("a: str", name="OrderPaid")), tmp_path / "lock")
    assert short(back) == ["backward a", "forward a"], "the log still has the old ones"


def test_a_field_that_comes_back_must_fit_what_the_log_has(tmp_path: Path) -> None:
    compared(tmp_path, placed("a: int = 0"), placed())
    lock = tmp_path / "lock"
    assert short(check(*project(placed('a: str = ""')), lock)) == ["backward a"]
    assert short(check(*project(placed("a: int = 0")), lock)) == []
    assert short(check(*project(placed("a: int")), lock)) == ["backward a"]


def test_events_between_have_no_field_that_was_away(tmp_path: Path) -> None:
    compared(tmp_path, placed("a: int"), placed())
    assert short(check(*project(placed("a: int")), tmp_path / "lock")) == ["backward a"]


def test_a_raised_version_says_who_is_late(tmp_path: Path) -> None:
    found = compared(tmp_path, placed(), placed(said=", version=2"))
    assert any("billing" in change.what and "on the shelf" in change.what for change in found.changes)


def test_another_wire_type_is_told_how_to_keep_its_history(tmp_path: Path) -> None:
    found = compared(tmp_path, placed(), placed().replace('topic="order"', 'topic="shop"'))
    (finding,) = found.findings
    assert finding.fix.startswith("say type='order.OrderPlaced', topic='order' on OrderPlaced")
    found = compared(tmp_path, placed("a: int"), placed("a: int", name="OrderMade"), services="")
    assert found.findings[0].fix.startswith("say type='order.OrderPlaced' on OrderMade")


TOTAL = 'class OrderTotal(Event, view_of="order.OrderPlaced"):\n    {}\n'
MAIL_READS = "mail.on(OrderTotal)(lambda o: None)"


@pytest.mark.parametrize(
    ("old", "event", "view", "kinds"),
    [
        ("a: int", "a: int", "a: int", []),
        ("a: int", "a: int", "a: float", []),
        ("a: int", "a: int", "b: int", ["view b"]),
        ("a: int", "a: int", "b: int = 0", ["view b"]),
        ("a: int", "a: int", "a: str", ["view a"]),
        ("a: str", "a: Sensitive[str]", "a: str", ["view a"]),
        ("b: int = 0", "b: int = 0; a: int = 0", "a: int", ["view a"]),
        ("b: int = 0", "b: int = 0; a: int = 0", "a: int = 0", []),
        ("a: int = 0; b: int", "b: int", "a: int = 0", []),
        ("a: int", "b: str = ''", "a: int", ["forward a", "view a"]),
    ],
)
def test_views_must_be_able_to_read_new_and_old_events(
    tmp_path: Path, old: str, event: str, view: str, kinds: list[str]
) -> None:
    found = compared(tmp_path, placed(old), placed(event) + TOTAL.format(view), services="")
    assert short(found) == kinds
    assert all(f.hurts == ["view OrderTotal, which no service handles"] for f in found.findings)
    handled = check(*project(placed(event) + TOTAL.format(view), MAIL_READS), tmp_path / "lock")
    assert all(f.hurts == ["mail (view OrderTotal)"] for f in handled.findings)


def test_a_view_needs_a_default_for_what_came_later(tmp_path: Path) -> None:
    compared(tmp_path, placed(), placed("a: int = 0"))
    for need, kinds in (("a: int", ["view a"]), ("a: int = 0", [])):
        found = check(*project(placed("a: int = 0") + TOTAL.format(need), MAIL_READS), tmp_path / "lock")
        assert short(found) == kinds


def test_a_view_of_an_event_of_others_is_not_judged(tmp_path: Path) -> None:
    app, classes = project(TOTAL.format("a: int"), MAIL_READS)
    assert check(app, classes, tmp_path / "lock", update=True).findings == []
    assert [(u.name, u.fields) for u in event_usage(app, classes, None)] == [(None, [])]
    assert [(e.name, e.version, str(e.readers[0])) for e in event_list(app, classes)] == [
        (None, None, "mail (view OrderTotal)")
    ]


def test_what_is_wrong_by_itself_cannot_be_agreed_to(tmp_path: Path) -> None:
    text = placed(name="CreateOrder") + (
        'class SendReceipt(Command, queue="receipts"):\n    n: int\nclass ReceiptSent(Command, queue="receipts"):\n    n: int\n'
    )
    late = "billing.on(SendReceipt)(lambda c: None); mail.on(SendReceipt)(lambda c: None)"
    with pytest.warns(match="UL1005"):
        app, classes = project(text, late + "; stock.on(ReceiptSent)(lambda c: None)")
    for update in (True, False):
        found = check(app, classes, tmp_path / "lock", update=update)
        assert [(f.kind, f.name) for f in found.findings] == [
            ("name", "CreateOrder"),
            ("name", "ReceiptSent"),
            ("queue", "receipts"),
        ]
        assert found.findings[2].hurts == ["billing", "mail", "stock"]
        assert found.breaks


def test_two_classes_of_one_wire_type(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    check(*project(placed()), lock, update=True)
    before = lock.read_bytes()
    twice = project(placed() + placed(name="OrderAlsoPlaced", said=', type="order.OrderPlaced"'))
    assert short(check(*twice, lock)) == ["twice"]
    with pytest.raises(UsageError) as e:
        check(*twice, lock, update=True)
    assert e.value.code == "UL1365" and lock.read_bytes() == before


# --- the lock -------------------------------------------------------------------------------------------------


def test_the_lock_is_sorted_and_knows_what_it_needs(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    check(*project(placed("z: int", "a: Sensitive[str] = ''") + placed(name="OrderPaid")), lock, update=True)
    first = lock.read_bytes()
    saved = json.loads(first)
    assert saved["format"] == 1 and list(saved["events"]) == ["order.OrderPaid", "order.OrderPlaced"]
    assert saved["events"]["order.OrderPlaced"] | {"digest": ""} == {
        "class": "OrderPlaced", "digest": "", "kind": "event", "topic": "order", "key": "order_id", "version": 1,
        "fields": {
            "a": {"type": "str", "required": False, "sensitive": True}, "order_id": {"type": "str", "required": True},
            "z": {"type": "int", "required": True},
        },
    }  # fmt: skip
    turned = check(*project(placed(name="OrderPaid") + placed("a: Sensitive[str] = ''", "z: int")), lock, update=True)
    assert not turned.written and lock.read_bytes() == first
    assert not (tmp_path / "lock.new").exists()


def test_whatever_a_class_can_hold_can_be_locked_and_read(tmp_path: Path) -> None:
    samples = Object({f"f{n}": Field(shape, True) for n, shape in enumerate(SHAPES)})
    _, (cls,) = project(placed())
    entry = msgspec.structs.replace(locked(cls), fields=samples.fields)
    lock = tmp_path / "lock"
    lock.write_bytes(lock_bytes({"order.OrderPlaced": entry}))
    read = read_lock(lock)
    assert read is not None and read["order.OrderPlaced"].data == samples
    assert problems(read["order.OrderPlaced"].data, samples) == []


def spoilt(raw: bytes) -> Iterator[tuple[str, bytes]]:
    yield "UL1361", b""
    yield "UL1361", b"\xff\xfe"
    yield "UL1361", b"[1]"
    yield "UL1361", b"[" * 100_000
    yield "UL1361", b"<<<<<<< HEAD\n" + raw
    yield "UL1361", raw.replace(b'"format": 1', b'"format": 0')
    yield "UL1361", raw.replace(b'"format": 1', b'"format": "1"')
    yield "UL1361", raw.replace(b'"version": 1', b'"version": 1, "colour": 2')
    yield "UL1361", raw.replace(b'"type": "int"', b'"type": {"kind": "wish"}')
    yield "UL1362", raw.replace(b'"version": 1', b'"version": 2')
    yield "UL1362", raw.replace(b'"type": "int"', b'"type": "str"')
    yield "UL1363", raw.replace(b'"format": 1', b'"format": 2')
    yield "UL1363", b'{"format": 7, "services": []}'


def test_a_lock_that_cannot_be_trusted_is_refused_and_not_changed(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    code = project(placed("a: int"))
    check(*code, lock, update=True)
    good = lock.read_bytes()
    for expected, raw in spoilt(good):
        assert raw != good
        lock.write_bytes(raw)
        for update in (False, True):
            with pytest.raises(UsageError) as e:
                check(*code, lock, update=update)
            assert e.value.code == expected, raw[:60]
            assert e.value.found and e.value.fix
        assert lock.read_bytes() == raw


def test_entries_of_different_branches_can_be_merged(tmp_path: Path) -> None:
    """What a merge of two locks gives, each with one more event, is a lock."""
    lock = tmp_path / "lock"
    check(*project(placed() + placed(name="OrderPaid")), lock, update=True)
    one = json.loads(lock.read_bytes())
    lock.unlink()
    check(*project(placed() + placed(name="OrderSent")), lock, update=True)
    other = json.loads(lock.read_bytes())
    lock.write_text(json.dumps({"format": 1, "events": one["events"] | other["events"]}))
    both = check(*project(placed() + placed(name="OrderPaid") + placed(name="OrderSent")), lock)
    assert (both.changes, both.findings) == ([], [])


def test_a_place_where_no_lock_can_be(tmp_path: Path) -> None:
    code = project(placed())
    for path in (tmp_path, tmp_path / "nowhere" / "lock"):
        with pytest.raises(UsageError) as e:
            check(*code, path, update=True)
        assert e.value.code == "UL1364"
    with pytest.raises(UsageError) as e:
        check(*code, tmp_path / "nowhere" / "lock")
    assert e.value.code == "UL1360" and "--update" in e.value.fix


# --- who reads what -------------------------------------------------------------------------------------------


def test_usage_names_readers_of_each_field_and_what_was_added(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    check(*project(placed("a: int", "b: int = 0")), lock, update=True)
    text = placed("a: int", "b: int = 0", "c: str = ''") + TOTAL.format("a: int; c: str = ''")
    app, classes = project(text, MAIL_READS + "; stock.on(OrderPlaced)(lambda o: None)")
    (usage,) = event_usage(app, classes, read_lock(lock))
    seen = {f.name: (f.is_key, f.added, [str(r) for r in f.by_view], [str(r) for r in f.by_all]) for f in usage.fields}
    view = ["mail (view OrderTotal)"]
    assert seen == {
        "order_id": (True, False, [], ["stock"]), "a": (False, False, view, ["stock"]),
        "b": (False, False, [], ["stock"]), "c": (False, True, view, ["stock"]),
    }  # fmt: skip
    assert usage.wrong == []
    (unknown,) = event_usage(app, classes, None)
    assert {f.added for f in unknown.fields} == {None}


def test_usage_finds_a_view_of_a_field_that_is_not_there() -> None:
    app, classes = project(placed("total_cents: int") + TOTAL.format("total_cent: int"), MAIL_READS)
    (usage,) = event_usage(app, classes, None)
    assert [(f.field, f.fix) for f in usage.wrong] == [("total_cent", "did you mean total_cents?")]


# --- the command line -----------------------------------------------------------------------------------------

MORE = """
from shop import *
from unlost import Command
class PlacedTotal(Event, view_of="order.OrderPlaced"):
    total_cents: int
class SendReceipt(Command, queue="receipts", key="customer_id"):
    customer_id: str
mail = Service("mail")
mail.on(PlacedTotal, name="add")(lambda o: None)
mail.on(SendReceipt, name="send")(lambda c: None)
app = App(billing, mail)
"""


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    shell = Shell(tmp_path)
    shell.write("pyproject.toml", "")
    shell.write("more.py", MORE)
    shell.env["UNLOST_APP"] = "more"
    return shell


def failed(result: Result, code: int, text: str) -> None:
    assert result.code == code and text in result.out + result.err, result


def test_list(shell: Shell) -> None:
    lines = shell.ok("event", "list").out.splitlines()
    assert lines[0].split() == ["TYPE", "topic", "or", "queue", "key", "version", "listening"]
    assert re.fullmatch(r"order.OrderPlaced +order +order_id +1  billing, mail \(view PlacedTotal\)", lines[1])
    assert lines[2:4] == ["  shop.OrderPlaced", "  view more.PlacedTotal"]
    assert re.fullmatch(r"order.OrderShipped +order +order_id +1  nobody in this App", lines[4])
    assert re.fullmatch(r"receipts.SendReceipt +receipts \(queue\) +customer_id +1  mail", lines[6])
    assert "Who publishes them" in lines[-1]
    found = shell.ok("event", "list", "--json").json
    assert found["schema"] == "unlost.events/1"
    assert [(e["type"], e["kind"], e["key"], e["views"]) for e in found["events"]] == [
        ("order.OrderPlaced", "event", "order_id", ["more.PlacedTotal"]), ("order.OrderShipped", "event", "order_id", []),
        ("receipts.SendReceipt", "command", "customer_id", []),
    ]  # fmt: skip
    assert found["events"][0]["readers"][1] == {"service": "mail", "handler": "add", "view": "PlacedTotal"}


def test_check_from_the_first_lock_to_a_break(shell: Shell) -> None:
    failed(shell("event", "check"), 2, "UL1360")
    lock = shell.folder / "unlost.events.lock"
    assert not lock.exists()
    assert f"{lock} written" in shell.ok("event", "check", "--update").out
    text = (shell.folder / "shop.py").read_text()
    shell.write("shop.py", text.replace("total_cents: int", "total_cents: str"))
    broken = shell("event", "check")
    failed(broken, 1, "OLD EVENTS CANNOT BE READ  OrderPlaced.total_cents  order.OrderPlaced")
    assert "order.OrderPlaced.total_cents  int, required → str, required" in broken.out
    assert "hurts  billing" in broken.out and "VIEW  PlacedTotal.total_cents" in broken.out
    as_json = shell("event", "check", "--json")
    assert as_json.code == 1
    found = as_json.json
    assert (found["schema"], found["breaks"], found["agreed"]) == ("unlost.event-check/1", True, False)
    assert [(f["kind"], f["field"]) for f in found["findings"]] == [
        ("backward", "total_cents"), ("forward", "total_cents"), ("view", "total_cents")
    ]  # fmt: skip
    failed(shell("event", "check", "--update"), 1, "VIEW")  # the view is still wrong
    shell.write("more.py", MORE.replace("total_cents: int", "total_cents: str"))
    assert shell.ok("event", "check").out == "nothing has changed, nothing breaks\n"


def test_check_of_another_lock_from_a_folder_below(shell: Shell) -> None:
    shell.ok("event", "check", "--update", "--lock", "mine.lock")
    assert [p.name for p in shell.folder.glob("*.lock")] == ["mine.lock"]
    assert str(shell.folder) not in (shell.folder / "mine.lock").read_text()
    (shell.folder / "mine.lock").write_text("{}")
    failed(shell("event", "check", "--lock", "mine.lock"), 2, "UL1361")
    failed(shell("event", "usage", "--lock", "mine.lock"), 2, "UL1361")
    assert not shell.database.exists(), "none of it needs a broker"


def test_a_base_with_fields_is_no_event_and_what_derives_from_an_event_is_one(shell: Shell) -> None:
    shell.write(
        "based.py",
        """
        from unlost import *
        class ShopEvent(Event, topic="shop", key="order_id"):
            order_id: str
        class OrderPlaced(ShopEvent):
            pass
        class GiftPlaced(OrderPlaced):
            pass
        class CreateOrder(ShopEvent):
            pass
        app = App()
        """,
    )
    found = shell.ok("event", "list", "--app", "based", "--json").json
    assert [e["type"] for e in found["events"]] == ["shop.CreateOrder", "shop.GiftPlaced", "shop.OrderPlaced"]
    failed(shell("event", "check", "--update", "--app", "based"), 1, "NAME  CreateOrder")


def test_usage(shell: Shell) -> None:
    result = shell.ok("event", "usage")
    assert "without a lock" in result.err
    assert re.search(r"total_cents +mail \(view PlacedTotal\), billing \(all\)\n", result.out)
    assert re.search(r"email +billing \(all\) +only by those that read all\n", result.out)
    assert re.search(r"OrderShipped\n  order_id +nobody +key\n", result.out)
    shell.ok("event", "check", "--update")
    text = (shell.folder / "shop.py").read_text()
    shell.write("shop.py", text.replace("total_cents: int", "total_cents: int\n    gift: bool = False"))
    assert re.search(r"gift .*added since the lock, no view wants it\n", shell.ok("event", "usage").out)
    shell.write("more.py", MORE.replace("total_cents: int", "total_cent: int"))
    found = shell("event", "usage", "--json")
    failed(found, 1, "did you mean total_cents?")
    assert found.code == 1 and found.json["schema"] == "unlost.event-usage/1"
    assert found.json["events"][0]["wrong"][0]["field"] == "total_cent"


def test_a_class_that_cannot_be_data(shell: Shell) -> None:
    shell.write(
        "odd.py",
        "from unlost import *\nclass A(Event, key='id'):\n    id: str\n    x: int | bytes | str\napp = App()\n",
    )
    failed(shell("event", "check", "--update", "--app", "odd"), 2, "UL1366")


def test_the_page_about_it_is_true(shell: Shell) -> None:
    text = (ROOT / "docs" / "event-hygiene.md").read_text()
    shell.write("hello.py", re.findall(r"```python\n(.*?)```", text, re.S)[0])
    commands = set(re.findall(r"`unlost (event [a-z]+(?: --update)?)`", text))
    assert commands == {"event list", "event usage", "event check", "event check --update"}
    said = {}
    for command in sorted(commands, reverse=True):  # --update first: it makes the lock
        said[command] = shell.ok(*command.split(), "--app", "hello").out
    assert re.search(r"total_cents +statistics \(view OrderTotal\), billing \(all\)\n", said["event usage"])
    assert said["event check"] == "nothing has changed, nothing breaks\n"


# --- two locks, and sizes --------------------------------------------------------------------------------------

RELEASES = {
    "v1": """
from unlost import App, Event, Service
class OrderPlaced(Event, key="order_id"):
    order_id: str
    cents: int
    note: str = ""
class OrderLost(Event, key="order_id"):
    order_id: str
billing = Service("billing")
@billing.on(OrderPlaced)
async def bill(e: OrderPlaced) -> None: ...
app = App(billing)
""",
    "v2": """
from unlost import App, Event, Service
class OrderPlaced(Event, key="order_id"):
    order_id: str
    euros: float
    currency: str = "EUR"
class OrderShipped(Event, key="order_id"):
    order_id: str
billing = Service("billing")
@billing.on(OrderPlaced)
async def bill(e: OrderPlaced) -> None: ...
app = App(billing)
""",
}


def test_two_locks_say_what_changed_between_two_releases(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    for name, text in RELEASES.items():
        shell.write(f"shop_{name}.py", text)
        shell.ok("event", "check", "--update", "--app", f"shop_{name}", "--lock", f"{name}.lock")
        (shell.folder / f"shop_{name}.py").unlink()  # no code is needed
    found = shell.quick("event", "check", "v1.lock", "v2.lock")
    assert found.code == 1
    assert "order.OrderPlaced.currency  added" in found.out and "order.OrderPlaced.cents  removed" in found.out
    assert "order.OrderLost  gone from the code" in found.out and "order.OrderShipped  new" in found.out
    assert "OLD EVENTS CANNOT BE READ" in found.out and "OLD RELEASES CANNOT READ NEW EVENTS" in found.out
    same = shell.quick("event", "check", "v2.lock", "v2.lock", "--json").json
    assert (same["changes"], same["breaks"]) == ([], False)
    for arguments, code in (
        (["v1.lock"], "UL1379"),
        (["v1.lock", "v2.lock", "--update"], "UL1379"),
        (["v1.lock", "no.lock"], "UL1360"),
    ):
        refused = shell.quick("event", "check", *arguments)
        assert refused.code == 2 and code in refused.err
    (shell.folder / "v2.lock").write_text((shell.folder / "v2.lock").read_text().replace("euros", "pounds"))
    assert "UL1362" in shell.quick("event", "check", "v1.lock", "v2.lock").err


def test_the_biggest_events_by_what_the_log_holds(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    shell.write("shop.py", RELEASES["v1"])
    nothing = shell.quick("event", "usage", "--sizes", "--app", "shop")
    assert nothing.code == 2 and "UL1301" in nothing.err
    lines = [{"type": "OrderPlaced", "data": {"order_id": f"o{n}", "cents": 1, "note": "x" * n}} for n in (10, 500, 30)]
    lines.append({"type": "OrderLost", "data": {"order_id": "o1"}})
    shell.ok("publish", "-", "--app", "shop", stdin="\n".join(map(json.dumps, lines)))
    found = shell.quick("event", "usage", "--sizes", "--app", "shop", "--json").json["sizes"]
    bare = len(json.dumps({"order_id": "o10", "cents": 1, "note": ""}, separators=(",", ":")))
    assert [(s["type"], s["events"], s["largest"]) for s in found] == [
        ("order.OrderPlaced", 3, bare + 500 + 1), ("order.OrderLost", 1, len('{"order_id":"o1"}')),
    ]  # fmt: skip
    assert found[0]["mean"] == round((3 * bare + 540 + 1) / 3) and found[0]["largest_at"].startswith("order/")
    text = shell.quick("event", "usage", "--sizes", "--app", "shop").out
    assert text.index("BYTES OF DATA") < text.index("order.OrderPlaced", text.index("BYTES OF DATA"))
