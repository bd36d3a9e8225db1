"""From a typed event to its envelope."""

from __future__ import annotations

import re
import uuid
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unlost.errors import Undecodable, UsageError
from unlost.events import (
    UNKNOWN_VERSION,
    Catalog,
    Envelope,
    Event,
    Sensitive,
    content_hash,
    decode_data,
    derived_id,
    event_hash,
    seal,
)

NOW = 1_795_443_060_123_456  # 2026-11-23


class OrderCreated(Event, key="order_id", version=2):
    order_id: str
    total_cents: int
    email: Sensitive[str] = "a@b.c"


class OrderCreatedAgain(Event, key="order_id", type="order.OrderCreated"):
    order_id: str


class OrderTotal(Event, view_of="order.OrderCreated"):
    total_cents: int


class ShopEvent(Event, key="order_id"): ...


class DayEnded(Event, topic="calendar"): ...


class FileSeen(Event, key="name"):
    name: bytes


class Measured(Event, topic="m"):
    value: float | None


class Secret(Event, key="ssn"):
    ssn: Sensitive[str]


class Checked(Event, key="a_id"):
    a_id: str
    pin: Sensitive[str]

    def __post_init__(self) -> None:
        if self.pin == "bad-pin":
            raise ValueError(f"not a good pin: {self.pin}")
        if self.pin == "odd-pin":
            raise KeyError(self.pin)


ORDER = OrderCreated(order_id="A1", total_cents=100)


def sealed(event: Event = ORDER, **said: Any) -> Envelope:
    return seal(event, source="shop", now=NOW, **said)


def refused(code: str, event: Event = ORDER, **said: Any) -> str:
    with pytest.raises(UsageError) as caught:
        sealed(event, **said)
    assert caught.value.code == code
    return str(caught.value)


def with_data(data: bytes | None, **other: Any) -> Envelope:
    return msgspec.structs.replace(sealed(), data=data, **other)


def test_everything_that_a_sealed_event_says() -> None:
    e = sealed(headers={"campaign": "x"}, publisher="shop-1")
    assert uuid.UUID(e.id).version == 7
    assert (e.source, e.type, e.topic, e.key) == ("shop", "order.OrderCreated", "order", b"A1")
    assert (e.subject, e.partitionkey, e.datacontenttype) == ("A1", "A1", "application/json")
    assert e.time == datetime.fromtimestamp(NOW / 1e6, UTC).isoformat().replace("+00:00", "Z")
    assert e.data == b'{"order_id":"A1","total_cents":100,"email":"a@b.c"}'
    assert (e.correlationid, e.causationid, e.eventversion) == (e.id, None, 2)
    assert (e.publisher, e.number, e.recordedtime, e.headers) == ("shop-1", None, None, {"campaign": "x"})
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-01", e.traceparent or "")
    assert sealed().traceparent != sealed().traceparent
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-01", sealed(id="mine").traceparent or "")


def test_a_cause_hands_on_correlation_and_trace() -> None:
    first = sealed(id="first")
    first = msgspec.structs.replace(first, tracestate="a=b")
    second = sealed(cause=first)
    third = sealed(cause=second)
    assert (second.correlationid, second.causationid) == ("first", "first")
    assert (third.correlationid, third.causationid) == ("first", second.id)
    assert first.traceparent == second.traceparent == third.traceparent
    assert third.tracestate == "a=b"
    foreign = msgspec.structs.replace(first, correlationid=None, traceparent=None)
    assert sealed(cause=foreign).correlationid == "first"
    assert sealed(cause=foreign).traceparent is not None


def test_the_time_of_occurrence() -> None:
    there = timezone(timedelta(hours=2))
    when = datetime(2026, 1, 1, 1, 30, tzinfo=there)
    e = sealed(occurred_at=when)
    assert e.time == "2025-12-31T23:30:00.000000Z"
    assert e.occurred_at == when and e.occurred_at.tzinfo is UTC
    refused("UL1010", occurred_at=datetime(2026, 1, 1))
    refused("UL1010", occurred_at=datetime(1, 1, 1, tzinfo=there))
    assert sealed(occurred_at=datetime(900, 1, 1, tzinfo=UTC)).time.startswith("0900-")


@pytest.mark.parametrize("id", ["", "x" * 201, "a\nb", "a\0", "\ud800", 7])
def test_ids_that_are_refused(id: Any) -> None:
    refused("UL1009", id=id)


def test_ids_that_are_taken() -> None:
    assert sealed(id="order-A1-created").id == "order-A1-created"
    assert sealed(id="x" * 200).id


@pytest.mark.parametrize("source", ["", "a\0b", "x" * 201])
def test_sources_that_are_refused(source: str) -> None:
    with pytest.raises(UsageError, match="UL1009"):
        seal(ORDER, source=source, now=NOW)


@pytest.mark.parametrize(
    "headers",
    [
        {"ce_id": "x"},
        {"Content-Type": "x"},
        {"traceparent": "x"},
        {"": "x"},
        {"a\n": "x"},
        {"a": 1},
        {1: "a"},
        {"a": "\ud800"},
        {"\ud800": "a"},
        {"a": "x" * 20_000},
        {"a": "\x01" * 5_000},
        {str(i): "" for i in range(65)},
    ],
)
def test_headers_that_are_refused(headers: Any) -> None:
    refused("UL1011", headers=headers)


def test_keys_that_are_no_text_travel_as_bytes_only() -> None:
    assert sealed(FileSeen(name=b"\xff")).subject is None
    assert sealed(FileSeen(name=b"\xff")).key == b"\xff"
    assert sealed(OrderCreated(order_id="a\nb", total_cents=1)).subject is None
    assert sealed(DayEnded()).key is None and sealed(DayEnded()).data == b"{}"


def test_what_no_handler_could_read_is_not_accepted() -> None:
    text = refused("UL1013", OrderCreated(order_id="A1", total_cents="much"))  # type: ignore[arg-type]
    assert "$.total_cents" in text
    text = refused("UL1013", OrderCreated(order_id="A1", total_cents=1, email=4711))  # type: ignore[arg-type]
    assert "4711" not in text and "email" in text
    refused("UL1013", OrderCreated(order_id="A1", total_cents=object()))  # type: ignore[arg-type]
    refused("UL1012", OrderCreated(order_id="A1", total_cents=1, email="x" * 4_200_000))


def test_what_is_no_event_of_its_own_is_not_accepted() -> None:
    refused("UL1008", OrderTotal(total_cents=1))
    refused("UL1008", ShopEvent())
    refused("UL1008", object())  # type: ignore[arg-type]
    refused("UL1014", Secret(ssn="1"))
    refused("UL1006", OrderCreated(order_id="", total_cents=1))
    refused("UL1001", topic="no topic")
    assert sealed(topic="replay").topic == "replay"


def test_neither_data_nor_headers_are_in_the_repr() -> None:
    e = sealed(headers={"token": "canary"})
    assert "a@b.c" not in repr(e) and "canary" not in repr(e) and "A1" in repr(e)
    assert "a@b.c" not in str(e.__rich_repr__())


def test_hashes_fit_a_signed_column_and_tell_things_apart() -> None:
    assert event_hash("shop", "1") == event_hash("shop", "1") != event_hash("sho", "p1")
    assert content_hash("t", None) != content_hash("t", b"") != content_hash("t", b"\1")
    assert -(2**63) <= event_hash("shop", "1") < 2**63


@given(st.text(), st.text(), st.binary())
def test_hashes_have_64_bits(a: str, b: str, data: bytes) -> None:
    if a.isprintable() and b.isprintable():
        assert -(2**63) <= event_hash(a, b) < 2**63
        assert -(2**63) <= content_hash(a, data) < 2**63


def test_derived_ids_are_the_same_at_every_repeat() -> None:
    e = sealed(id="one")
    assert derived_id(e, "charge", 0) == derived_id(e, "charge", 0)
    ids = {derived_id(sealed(id=i), h, n) for i in ("one", "two") for h in ("a", "b") for n in range(20)}
    assert len(ids) == 80
    assert all(uuid.UUID(i).version == 8 and uuid.UUID(i).variant == uuid.RFC_4122 for i in ids)


# ---- data


@given(
    st.text(min_size=1).filter(lambda t: len(t.encode("utf-8", "surrogatepass")) <= 4096),
    st.integers(-(2**63), 2**63),
)
def test_data_come_back(order_id: str, total: int) -> None:
    try:
        event = OrderCreated(order_id=order_id, total_cents=total)
        e = sealed(event)
    except UsageError:
        assert any("\ud800" <= c <= "\udfff" for c in order_id)
        return
    assert decode_data(e, OrderCreated) == event


@given(st.binary() | st.text().map(str.encode))
def test_hostile_data_are_undecodable_and_nothing_else(data: bytes) -> None:
    with pytest.raises(Undecodable):
        decode_data(with_data(data), OrderCreated)


@pytest.mark.parametrize(
    "data",
    [b"[" * 1_000_000, b'{"x":' * 1_000_000, b'{"order_id":"a","total_cents":1,"email":' + b"[" * 99_999],
)
def test_deep_data_do_not_end_the_process(data: bytes) -> None:
    with pytest.raises(Undecodable):
        decode_data(with_data(data), OrderCreated)


def test_reasons() -> None:
    def code(e: Envelope) -> str:
        with pytest.raises(Undecodable) as caught:
            decode_data(e, OrderCreated)
        return caught.value.code

    assert code(with_data(None)) == "UL5004"
    assert code(with_data(b"{}")) == "UL5004"
    assert code(with_data(b" " * (4 * 1024 * 1024 + 1))) == "UL5005"
    assert code(with_data(b"{}", datacontenttype="application/avro")) == "UL5006"
    good = b'{"order_id":"a","total_cents":1,"unknown":{}}'
    for kind in (None, "application/json; charset=utf-8", "text/json", "application/vnd.shop+JSON"):
        assert decode_data(with_data(good, datacontenttype=kind), OrderCreated).total_cents == 1


@pytest.mark.parametrize("value", ['"bad-pin"', '"odd-pin"', "123456"])
def test_errors_do_not_quote_sensitive_values(value: str) -> None:
    e = with_data(b'{"a_id":"x","pin":%s}' % value.encode())
    with pytest.raises(Undecodable) as caught:
        decode_data(e, Checked)
    assert value.strip('"') not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__context__ is None


# ---- the catalog


def test_a_catalog_finds_the_class_of_a_type() -> None:
    catalog = Catalog([OrderCreated, DayEnded])
    catalog.add(OrderCreated)
    assert catalog.resolve("order.OrderCreated") is OrderCreated
    assert catalog.resolve("order.Other") is None
    assert dict(catalog.known) == {"order.OrderCreated": OrderCreated, "calendar.DayEnded": DayEnded}


def test_a_catalog_refuses() -> None:
    for second in (OrderCreatedAgain, OrderTotal):
        with pytest.raises(UsageError, match="UL1015"):
            Catalog([OrderCreated, second])
    for wrong, code in ((ShopEvent, "UL1008"), (int, "UL1008"), (Secret, "UL1014")):
        with pytest.raises(UsageError, match=code):
            Catalog([wrong])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="UL1016"):

        class Odd(Event, topic="t"):
            what: NowhereDefined  # type: ignore[name-defined]  # noqa: F821

        Catalog([Odd])


def test_versions() -> None:
    catalog = Catalog([OrderCreated])
    for version in (1, 2):
        assert catalog.decode(msgspec.structs.replace(sealed(), eventversion=version), OrderCreated) == ORDER
    newer = msgspec.structs.replace(sealed(), eventversion=3)
    with pytest.raises(Undecodable) as caught:
        catalog.decode(newer, OrderCreated)
    assert caught.value.code == UNKNOWN_VERSION == "UL5003"
    assert Catalog([OrderTotal]).decode(newer, OrderTotal) == OrderTotal(total_cents=100)


def test_a_number_that_is_none_is_refused_where_it_would_be_lost() -> None:
    class Weighed(Event, topic="m"):
        value: float

    with pytest.raises(UsageError, match="UL1013"):
        sealed(Weighed(value=float("nan")))  # JSON has no NaN: it would arrive as null
    assert sealed(Measured(value=None)).data == b'{"value":null}'
