"""What a class declares, and what it is refused for."""

from __future__ import annotations

import enum
import uuid
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import msgspec
import pytest

from unlost.errors import UsageError
from unlost.events import (
    Command,
    Event,
    NamingWarning,
    Sensitive,
    check_past_tense,
    key_of,
    redacted,
    sensitive_fields,
)
from unlost.events.model import EventMeta  # type: ignore[attr-defined]


class OrderCreated(Event, key="order_id"):
    order_id: str
    customer_id: str
    total_cents: int
    email: Sensitive[str]


class ShopEvent(Event, topic="shop", key="customer_id"): ...


class BasketFilled(ShopEvent):
    customer_id: str


class OrderTotal(Event, view_of="order.OrderCreated"):
    total_cents: int


class SendReceipt(Command, queue="receipts", key="customer_id"):
    customer_id: str


class Address(msgspec.Struct):
    street: Sensitive[str]


class Moved(Event, key="who_id"):
    who_id: str
    to: Address
    phones: list[Sensitive[str]] | None = None
    note: str = ""


def make(name: str, fields: dict[str, Any], base: type = Event, **said: Any) -> Any:
    return EventMeta(name, (base,), {"__annotations__": fields, "__module__": __name__}, **said)


def refused(code: str, name: str, fields: dict[str, Any], base: type = Event, **said: Any) -> str:
    with pytest.raises(UsageError) as caught:
        make(name, fields, base, **said)
    assert caught.value.code == code
    return str(caught.value)


def test_topic_and_wire_type_follow_from_the_key() -> None:
    spec = OrderCreated.__unlost__
    assert (spec.topic, spec.key, spec.type, spec.version) == ("order", "order_id", "order.OrderCreated", 1)
    assert not spec.abstract and not spec.is_command
    assert make("A", {"sku": str}, key="sku").__unlost__.topic == "sku"
    assert make("A", {"_id": str}, key="_id").__unlost__.topic == "_id"


def test_a_base_hands_down_topic_and_key() -> None:
    assert ShopEvent.__unlost__.abstract
    spec = BasketFilled.__unlost__
    assert (spec.topic, spec.key, spec.type, spec.abstract) == (
        "shop",
        "customer_id",
        "shop.BasketFilled",
        False,
    )


def test_a_topic_that_was_said_is_inherited_and_one_that_followed_gives_way_to_another_key() -> None:
    fields = {"order_id": str, "customer_id": str}
    assert make("X", fields, ShopEvent, key="order_id").__unlost__.topic == "shop"
    base = make("OrderBase", {}, key="order_id")
    assert base.__unlost__.abstract
    assert make("X", fields, base).__unlost__.topic == "order"
    assert make("X", fields, base, key="customer_id").__unlost__.topic == "customer"


def test_own_words_win() -> None:
    spec = make("A", {"a_id": str}, key="a_id", topic="t", type="old.Name", version=3).__unlost__
    assert (spec.topic, spec.type, spec.version) == ("t", "old.Name", 3)
    below = make("B", {}, make("A", {"a_id": str}, key="a_id", type="old.Name", version=3)).__unlost__
    assert (below.type, below.version) == ("a.B", 1)


def test_a_view_has_the_type_that_it_reads_and_only_its_fields() -> None:
    spec = OrderTotal.__unlost__
    assert (spec.topic, spec.type, spec.view_of, spec.key) == (
        "order",
        "order.OrderCreated",
        "order.OrderCreated",
        None,
    )
    assert make("V", {"x": int}, ShopEvent, view_of="a.b.C").__unlost__.topic == "shop"
    assert make("V", {"x": int}, view_of="a.b.C").__unlost__.topic == "a.b"
    refused("UL1004", "V", {"x": int}, view_of="a.B", type="a.C")
    refused("UL1003", "V", {"x": int}, view_of="NoTopic")


def test_an_event_without_fields_needs_only_a_topic() -> None:
    spec = make("DayEnded", {}, topic="calendar").__unlost__
    assert (spec.abstract, spec.type) == (False, "calendar.DayEnded")
    assert make("Base", {}).__unlost__.abstract


def test_a_command_has_a_queue() -> None:
    spec = SendReceipt.__unlost__
    assert (spec.topic, spec.type, spec.is_command) == ("receipts", "receipts.SendReceipt", True)
    assert "queue=" in refused("UL1003", "Do", {"a": str}, Command, key="a")
    refused("UL1004", "Do", {"a": str}, Command, topic="x")
    assert "Command" in refused("UL1004", "Done", {"a": str}, queue="x")


def test_what_is_refused_names_the_way_out() -> None:
    assert "order_id, total" in refused("UL1002", "A", {"order_id": str, "total": int}, key="orderid")
    refused("UL1003", "A", {"a": str})
    assert "keyy" in refused("UL1004", "A", {"a": str}, keyy="a")
    for version in (0, -1, "2", True, 2**31):
        refused("UL1004", "A", {"a": str}, key="a", version=version)
    struct: dict[str, Any]
    for struct in ({"array_like": True}, {"frozen": False}, {"kw_only": False}, {"tag": True}):
        refused("UL1004", "A", {"a": str}, key="a", **struct)


@pytest.mark.parametrize("name", ["", " ", "a b", "ä", "x" * 201, "a/b", "a\n", "__x", "unlost.x", ".", "..", 7])
def test_names_are_checked(name: Any) -> None:
    if name != "":
        refused("UL1001", "A", {"a": str}, topic=name)
        refused("UL1001", "A", {"a": str}, Command, queue=name)
    if name and not str(name).startswith(("__", "unlost")):
        refused("UL1001", "A", {"a": str}, key="a", type=name)
    assert make("A", {"a": str}, topic="x" * 190).__unlost__.topic
    assert "type=" in refused("UL1001", "Größe", {"a": str}, key="a")


def test_events_are_immutable_equal_by_value_and_made_by_name() -> None:
    a = BasketFilled(customer_id="c")
    assert a == BasketFilled(customer_id="c") and hash(a) == hash(BasketFilled(customer_id="c"))
    with pytest.raises(AttributeError):
        a.customer_id = "d"  # type: ignore[misc]
    with pytest.raises(TypeError):
        BasketFilled("c")  # type: ignore[call-arg]


def test_fields_may_be_called_as_attributes_of_the_envelope_are() -> None:
    cls = make("A", {"id": str, "time": str, "type": str, "key": str, "topic": str}, key="id")
    assert key_of(cls(id="1", time="t", type="x", key="k", topic="p")) == b"1"


class Colour(enum.Enum):
    RED = "red"
    FOUR = 4


class Level(enum.IntEnum):
    HIGH = 9


class Text(str):
    __slots__ = ()


UUID = uuid.UUID("01890a5d-ac96-774b-bcce-b302099a8057")


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ("ü", "ü".encode()),
        (Text("t"), b"t"),
        (42, b"42"),
        (-1, b"-1"),
        (0, b"0"),
        (b"\x00\xff", b"\x00\xff"),
        (bytearray(b"x"), b"x"),
        (UUID, str(UUID).encode()),
        (Colour.RED, b"red"),
        (Colour.FOUR, b"4"),
        (Level.HIGH, b"9"),
        (Decimal("1.50"), b"1.50"),
        (date(2026, 11, 23), b"2026-11-23"),
        (datetime(2026, 11, 23, tzinfo=UTC), b"2026-11-23T00:00:00+00:00"),
    ],
)
def test_keys_of_all_types(value: Any, key: bytes) -> None:
    assert key_of(make("A", {"k": Any}, key="k")(k=value)) == key


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ("", "UL1006"),
        (None, "UL1006"),
        (b"", "UL1006"),
        ("x" * 4097, "UL1006"),
        (True, "UL1007"),
        (1.5, "UL1007"),
        ([1], "UL1007"),
        ("\ud800", "UL1007"),
        (Text("\ud800"), "UL1007"),
    ],
)
def test_what_cannot_be_a_key(value: Any, code: str) -> None:
    with pytest.raises(UsageError) as caught:
        key_of(make("A", {"k": Any}, key="k")(k=value))
    assert caught.value.code == code


def test_no_key_declared_is_no_key() -> None:
    assert key_of(make("A", {"k": str}, topic="t")(k="")) is None


def test_sensitive_fields_are_shown_nowhere() -> None:
    event = OrderCreated(order_id="A1", customer_id="c", total_cents=5, email="secret@x")
    assert "secret" not in repr(event) and "A1" in repr(event)
    assert "secret" not in str(list(event.__rich_repr__()))  # type: ignore[attr-defined]
    assert sensitive_fields(OrderCreated) == {"email"}
    assert redacted(event)["email"] == "***" and redacted(event)["order_id"] == "A1"
    assert redacted({"email": "secret", "other": 1}, OrderCreated) == {"email": "***", "other": 1}
    assert sensitive_fields(Moved) == {"to", "phones"}
    assert sensitive_fields(BasketFilled) == frozenset()
    with pytest.raises(UsageError):
        redacted({"email": "secret"})


def test_sensitive_fields_are_redacted_under_their_name_on_the_wire() -> None:
    cls = make("A", {"a_id": str, "e_mail": Sensitive[str]}, key="a_id", rename="camel")
    assert redacted({"aId": "1", "eMail": "secret"}, cls) == {"aId": "1", "eMail": "***"}


def test_annotations_that_cannot_be_resolved_hide_everything() -> None:
    cls = make("A", {"a": "NowhereDefined", "b": "int"}, topic="t")
    assert sensitive_fields(cls) == {"a", "b"}


def words_of(text: str) -> list[str]:
    return text.split()


FACTS = words_of(
    """
    OrderCreated PaymentSent InvoicePaid HouseBuilt UserLeft ParcelLost OrderShipped UserLoggedIn
    CheckedOut ItemAddedToCart PaymentFailedTwice PriceSet StockPut MailRead RoleWithdrawn
    LineAddedManually OrderCreatedEvent OrderPlacedV2 EmailBounced PaymentDeclined SeatTaken
    ShipmentBegun TicketSold KeyChosen BidWon HTTPRequestSent PaymentOverdrawn GoodsBought
    PasswordForgotten ContractSigned VoteCast ServerWentOffline ShopShut MoneyRefunded SeedPlanted
    FeedPublished UserBorn JobRun CardStolen StockRanOut
    """
)

NO_FACTS = words_of(
    """
    CreateOrder SendMail Order PaymentRequest PaidOrder Feed NewsFeed SpeedLimit OrderNeed UserSignup
    EmbedVideo SetPrice Payment OrderCreation Proceed SeedBed CurrentStatus
    """
)

ORDERS = words_of(
    """
    SendReceipt CreateOrder SetPrice PutStock ReadMail EmbedVideo MentionUser ProvisionServer RingBell
    CutRope FeedAnimals Proceed IncrementCounter SplitOrder FindCustomer CommentPost PingServer RunJob
    SeedDatabase
    """
)

NO_ORDERS = words_of(
    """
    OrderCreated ReceiptSent SentReceipt SendingReceipt PaymentRequest CreationOfOrder PaidInvoice
    InvoicePaid NotificationSend
    """
)


@pytest.mark.parametrize("name", FACTS)
def test_reads_as_a_fact(name: str) -> None:
    assert check_past_tense(make(name, {"a": str}, topic="t")) is None


@pytest.mark.parametrize("name", NO_FACTS)
def test_does_not_read_as_a_fact(name: str) -> None:
    text = check_past_tense(make(name, {"a": str}, topic="t"))
    assert text is not None and text.startswith("UL1005: ") and name in text


@pytest.mark.parametrize("name", ORDERS)
def test_reads_as_an_order(name: str) -> None:
    assert check_past_tense(make(name, {"a": str}, Command, queue="q")) is None


@pytest.mark.parametrize("name", NO_ORDERS)
def test_does_not_read_as_an_order(name: str) -> None:
    text = check_past_tense(make(name, {"a": str}, Command, queue="q"))
    assert text is not None and "imperative" in text


def test_bases_views_and_those_who_opt_out_are_not_looked_at() -> None:
    assert check_past_tense(ShopEvent) is None
    assert check_past_tense(OrderTotal) is None
    quiet = make("Ping", {"a": str}, topic="t", past_tense=False)
    assert check_past_tense(quiet) is None
    assert check_past_tense(make("Pong", {}, quiet)) is None
    assert check_past_tense(make("Pong", {}, quiet, past_tense=True)) is not None
    assert issubclass(NamingWarning, UserWarning)
