"""Bytes and back: round trips, agreement with the CloudEvents SDK, and hostile input."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable
from datetime import UTC
from typing import Any

import msgspec
import pytest
from cloudevents.core.bindings import kafka
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from hypothesis import given, settings
from hypothesis import strategies as st

from unlost.errors import Undecodable
from unlost.events import (
    Envelope,
    Event,
    decode_head,
    encode_head,
    event_hash,
    from_headers,
    from_json,
    peek_head,
    seal,
    to_headers,
    to_json,
)
from unlost.events.topic import Arrival
from unlost.world import rfc3339

NOW = 1_795_443_060_123_456


class OrderCreated(Event, key="order_id", version=2):
    order_id: str
    total_cents: int


printable = st.text(
    st.characters(exclude_categories=("Cs", "Cc", "Zs", "Zl", "Zp", "Cn", "Co", "Cf")),
    min_size=1,
    max_size=30,
)
optional = st.none() | printable
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
times = st.datetimes(timezones=st.just(UTC)).map(lambda t: t.isoformat().replace("+00:00", "Z"))
data = (
    st.none()
    | st.binary(max_size=60)
    | st.recursive(st.none() | st.integers(-9, 9) | texts, st.lists).map(lambda v: json.dumps(v).encode())
)
names = st.from_regex(r"x[a-z0-9]{0,18}", fullmatch=True)
user_names = st.from_regex(r"h-[A-Za-z0-9-]{0,18}", fullmatch=True)


@st.composite
def envelopes(draw: st.DrawFn) -> Envelope:
    partitionkey = draw(optional)
    return Envelope(
        id=draw(printable),
        source=draw(printable),
        type=draw(printable),
        time=draw(times),
        topic="t",
        key=draw(st.none() | st.binary(min_size=1, max_size=9) | st.just((partitionkey or "k").encode())),
        data=draw(data),
        subject=draw(optional),
        datacontenttype=draw(st.sampled_from(["application/json", None, "text/plain", "application/x+json"])),
        dataschema=draw(optional),
        recordedtime=draw(st.none() | times),
        partitionkey=partitionkey,
        correlationid=draw(optional),
        causationid=draw(optional),
        traceparent=draw(optional),
        tracestate=draw(optional),
        eventversion=draw(st.integers(1, 2**31 - 1)),
        publisher=draw(optional),
        number=draw(st.none() | st.integers(0, 2**63 - 1)),
        extensions=draw(st.dictionaries(names, texts | st.integers(-(2**31), 2**31 - 1) | st.booleans(), max_size=3)),
        headers=draw(st.dictionaries(user_names, texts, max_size=3)),
    )


@given(envelopes())
def test_a_head_comes_back(e: Envelope) -> None:
    head = encode_head(e)
    assert decode_head(head, topic=e.topic, key=e.key, data=e.data, recordedtime=e.recordedtime) == e


@given(
    envelopes().map(encode_head) | st.binary(max_size=60),
    st.none() | st.tuples(st.integers(0, 300), st.binary(min_size=1, max_size=3)),
)
def test_what_is_looked_over_is_what_is_read(head: bytes, harm: tuple[int, bytes] | None) -> None:
    """A row that `peek_head` vouches for is an event, the very one that `decode_head` makes of it."""
    if harm is not None:
        at = harm[0] % (len(head) + 1)
        head = head[:at] + harm[1] + head[at + len(harm[1]) :]
    peeked = peek_head(head)
    if peeked is None:
        return
    e = decode_head(head, topic="t", key=None, data=None)
    simple = e.eventversion == 1 and e.datacontenttype == "application/json"
    assert peeked == (e.type, event_hash(e.source, e.id), simple)
    lazy = Arrival(0, None, 0, head, None, None, "", "", "t", *peeked)
    assert lazy.envelope == msgspec.structs.replace(e, recordedtime=rfc3339(0))


def test_an_ordinary_row_is_looked_over() -> None:
    head = encode_head(seal(OrderCreated(order_id="a", total_cents=1), source="web", now=NOW))
    assert peek_head(head) is not None and peek_head(head.replace(b"2026-", b"2O26-")) is None
    assert json.loads(head)["specversion"] == "1.0"


@given(envelopes())
def test_json_comes_back(e: Envelope) -> None:
    if e.key is None and e.partitionkey is not None:
        e = msgspec.structs.replace(e, key=e.partitionkey.encode())
    assert from_json(to_json(e), topic="t") == e


@given(envelopes())
def test_headers_come_back(e: Envelope) -> None:
    as_text = {n: str(v).lower() if isinstance(v, bool) else str(v) for n, v in e.extensions.items()}
    headers, value = to_headers(e)
    assert from_headers(headers, value, topic="t", key=e.key) == msgspec.structs.replace(e, extensions=as_text)


def test_the_head_is_compact_and_names_attributes_as_cloudevents_does() -> None:
    e = seal(OrderCreated(order_id="A1", total_cents=1), source="shop", now=NOW, id="i", headers={"a": "b"})
    e = msgspec.structs.replace(e, number=7, publisher="p")
    head = json.loads(encode_head(e))
    assert "data" not in head and "datacontenttype" not in head and "dataschema" not in head
    assert head["unlostversion"] == 2 and head["unlostnumber"] == 7 and head["unlostpublisher"] == "p"
    assert json.loads(head["unlostheaders"]) == {"a": "b"}
    assert all(name.isalnum() and name.islower() and len(name) <= 20 for name in head)


# ---- the SDK is another pair of eyes

ATTRIBUTES = ("id", "source", "type", "subject", "datacontenttype", "dataschema")
EXTENSIONS = ("partitionkey", "correlationid", "causationid", "traceparent", "tracestate", "unlostpublisher")


def sample(**said: Any) -> Envelope:
    e = seal(
        OrderCreated(order_id="Ä1", total_cents=5),
        source="/shop",
        now=NOW,
        headers={"h-a": "ö"},
        publisher="p",
    )
    return msgspec.structs.replace(e, number=2**40, extensions={"region": "eu"}, tracestate="a=b", **said)


def agrees(theirs: Any, e: Envelope) -> None:
    got = theirs.get_attributes()
    for name in ATTRIBUTES:
        assert got.get(name) == getattr(e, name), name
    for name in EXTENSIONS:
        assert got.get(name) == getattr(e, name.removeprefix("unlost")), name
    assert theirs.get_time() == e.occurred_at
    assert (got["region"], got["unlostnumber"], str(got["unlostversion"])) == ("eu", str(2**40), "2")


def test_the_sdk_reads_our_json() -> None:
    e = sample()
    theirs = JSONFormat().read(None, to_json(e))
    agrees(theirs, e)
    assert theirs.get_data() == {"order_id": "Ä1", "total_cents": 5}
    binary = sample(data=b"\xff\x00", datacontenttype="application/x-thing")
    assert JSONFormat().read(None, to_json(binary)).get_data() == b"\xff\x00"


def test_we_read_the_sdks_json() -> None:
    e = sample()
    again = from_json(JSONFormat().write(JSONFormat().read(None, to_json(e))), topic="order")
    assert again.data is not None and e.data is not None
    assert json.loads(again.data) == json.loads(e.data)
    assert again.occurred_at == e.occurred_at
    assert msgspec.structs.replace(again, data=e.data, time=e.time) == e
    theirs = CloudEvent({"type": "t", "source": "/s", "id": "1", "datacontenttype": "application/x"}, b"\xff")
    assert from_json(JSONFormat().write(theirs), topic="t").data == b"\xff"
    words = CloudEvent({"type": "t", "source": "/s", "id": "1", "datacontenttype": "text/plain"}, "plain words")
    assert from_json(JSONFormat().write(words), topic="t").data == b"plain words"


def test_the_sdk_reads_our_kafka_headers() -> None:
    e = sample()
    headers, value = to_headers(e)
    assert value is not None
    agrees(kafka.from_binary_event(kafka.KafkaMessage(dict(headers), e.key, value)), e)


def test_we_read_the_sdks_kafka_messages() -> None:
    theirs = JSONFormat().read(None, to_json(sample(headers={})))
    for message in (kafka.to_binary_event(theirs), kafka.to_structured_event(theirs)):
        assert isinstance(message.key, str)
        got = from_headers(list(message.headers.items()), message.value, topic="order", key=message.key.encode())
        agrees(theirs, got)
        assert got.data is not None and json.loads(got.data) == {"order_id": "Ä1", "total_cents": 5}
        assert (got.number, got.eventversion, got.key) == (2**40, 2, "Ä1".encode())


# ---- foreign habits

MINIMAL = {"specversion": "1.0", "id": "1", "source": "/s", "type": "t", "time": "2026-11-23T14:11:00Z"}


def read(**said: Any) -> Envelope:
    return from_json(json.dumps(MINIMAL | said).encode(), topic="t")


def test_an_event_that_says_no_time_takes_the_brokers() -> None:
    raw = json.dumps({k: v for k, v in MINIMAL.items() if k != "time"}).encode()
    assert from_json(raw, topic="t", time="2026-01-01T00:00:00Z").time == "2026-01-01T00:00:00Z"
    with pytest.raises(Undecodable, match="UL5002"):
        from_json(raw, topic="t")


def test_json_data_of_others() -> None:
    assert read(data={"a": 1}).datacontenttype == "application/json"
    assert read(data=None).data is None
    assert read(data_base64="AA==").datacontenttype is None
    assert read(data_base64=None).data is None
    assert read(data="words", datacontenttype="text/plain").data == b"words"
    assert read(data="words").data == b'"words"'
    assert read(subject=None).subject is None and read(tracestate="").tracestate is None
    assert read(partitionkey="k").key == b"k"


def test_user_headers_of_others_are_kept() -> None:
    headers = [*to_headers(sample())[0], ("raw", b"\xff"), ("none", None), ("two", b"1"), ("two", b"2")]
    got = from_headers(headers, b"{}", topic="t", key=None).headers
    assert got == {"h-a": "ö", "raw": "\\xff", "none": "", "two": "2"}


def test_a_tombstone_has_no_data() -> None:
    assert from_headers(to_headers(sample())[0], None, topic="t", key=b"k").data is None


# ---- hostile bytes


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ({"specversion": "0.3"}, "UL5001"),
        ({"specversion": None}, "UL5001"),
        ({"id": ""}, "UL5002"),
        ({"id": 7}, "UL5002"),
        ({"id": "a\0b"}, "UL5002"),
        ({"source": "a\nb"}, "UL5002"),
        ({"type": None}, "UL5002"),
        ({"time": "yesterday"}, "UL5002"),
        ({"time": "2026-11-23"}, "UL5002"),
        ({"time": "2026-11-23T14:11:00"}, "UL5002"),
        ({"time": "2026-13-23T14:11:00Z"}, "UL5002"),
        ({"time": "20261123T141100Z"}, "UL5002"),
        ({"time": "2026-02-30T14:11:00.123456Z"}, "UL5002"),
        ({"time": "2026-W47-1T14:11:00.123456Z"}, "UL5002"),
        ({"time": "2026-11-23T14:11:00.12345٣Z"}, "UL5002"),
        ({"time": "0001-01-01T00:00:00+23:59"}, "UL5002"),
        ({"time": 5}, "UL5002"),
        ({"subject": 5}, "UL5002"),
        ({"Big": "x"}, "UL5002"),
        ({"a_b": "x"}, "UL5002"),
        ({"x": 1.5}, "UL5001"),
        ({"x": {}}, "UL5001"),
        ({"x": 2**40}, "UL5002"),
        ({"x": 2**400}, "UL5002"),
        ({"unlostversion": 0}, "UL5002"),
        ({"unlostversion": True}, "UL5002"),
        ({"unlostversion": 2**31}, "UL5002"),
        ({"unlostnumber": "-1"}, "UL5002"),
        ({"unlostnumber": "9" * 19}, "UL5002"),
        ({"unlostnumber": "٣"}, "UL5002"),
        ({"unlostheaders": "[]"}, "UL5002"),
        ({"unlostheaders": "[" * 50_000}, "UL5002"),
    ],
)
def test_wrong_attributes(said: dict[str, Any], code: str) -> None:
    raw = json.dumps(MINIMAL | said).encode()
    readers: list[Callable[[], Envelope]] = [
        lambda: from_json(raw, topic="t"),
        lambda: decode_head(raw, topic="t", key=None, data=None),
    ]
    for reader in readers:
        with pytest.raises(Undecodable) as caught:
            reader()
        assert caught.value.code == code


@pytest.mark.parametrize(
    "said",
    [
        {"data_base64": "!"},
        {"data_base64": "ä"},
        {"data_base64": 5},
        {"data": 1, "data_base64": "AA=="},
        {"unlostkey": "!"},
    ],
)
def test_wrong_data(said: dict[str, Any]) -> None:
    with pytest.raises(Undecodable):
        read(**said)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[]",
        b"\xff",
        b"[" * 1_000_000,
        b'{"a":' * 1_000_000,
        json.dumps(MINIMAL).encode()[:-1] + b',"data":' + b"[" * 1_000_000,
        json.dumps(MINIMAL).encode()[:-1] + b',"data":"\xff"}',
        json.dumps(MINIMAL | {"data_base64": b64encode(bytes(4 * 1024 * 1024 + 1)).decode()}).encode(),
        json.dumps(MINIMAL | {"x": "x" * 70_000}).encode(),
        b" " * 6_000_000,
    ],
    ids=range(11),
)
def test_wrong_bytes(raw: bytes) -> None:
    with pytest.raises(Undecodable):
        from_json(raw, topic="t")
    with pytest.raises(Undecodable):
        decode_head(raw, topic="t", key=None, data=None)


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda c: st.lists(c) | st.dictionaries(st.text(), c),
    max_leaves=4,
)
known = [
    "data",
    "data_base64",
    "subject",
    "unlostkey",
    "unlostheaders",
    "unlostnumber",
    "recordedtime",
    "partitionkey",
]
hostile_members = st.dictionaries(st.sampled_from([*MINIMAL, *known]) | st.text(), json_values | texts, max_size=4)


def only_undecodable(reader: Any) -> None:
    try:
        got = reader()
    except Undecodable:
        return
    assert isinstance(got, Envelope)
    assert got.occurred_at.tzinfo is not None
    repr(got)
    encode_head(got)
    to_headers(got)
    assert from_json(to_json(got), topic="t").id == got.id


@settings(max_examples=300)
@given(hostile_members | st.none(), st.binary())
def test_hostile_json(members: dict[str, Any] | None, junk: bytes) -> None:
    raw = junk if members is None else json.dumps(MINIMAL | members).encode()
    only_undecodable(lambda: from_json(raw, topic="t"))
    only_undecodable(lambda: decode_head(raw, topic="t", key=None, data=junk))


header_names = st.sampled_from([*(f"ce_{name}" for name in [*MINIMAL, *known]), "content-type", "CE_ID"]) | st.text()
header_values = (
    st.none() | st.binary() | texts.map(str.encode) | st.sampled_from([b"application/cloudevents+json", b"9" * 5000])
)


@settings(max_examples=300)
@given(
    st.lists(st.tuples(header_names, header_values), max_size=5),
    st.none() | st.binary(),
    st.none() | st.binary(),
)
def test_hostile_headers(more: list[tuple[str, bytes | None]], value: bytes | None, key: bytes | None) -> None:
    said = {name for name, _ in more}
    base = [(f"ce_{n}", v.encode()) for n, v in MINIMAL.items() if f"ce_{n}" not in said]
    only_undecodable(lambda: from_headers([*base, *more], value, topic="t", key=key))


def test_a_header_given_twice_or_too_many() -> None:
    headers = to_headers(sample())[0]
    for more in (
        [("ce_id", b"2")],
        [("CE_ID", b"2")],
        [("ce_datacontenttype", b"x")],
        [("x", bytes(70_000))],
    ):
        with pytest.raises(Undecodable):
            from_headers([*headers, *more], b"{}", topic="t", key=None)
    for kind in (b"application/cloudevents-batch+json", b"application/cloudevents+avro"):
        with pytest.raises(Undecodable, match="UL5001"):
            from_headers([("content-type", kind)], b"[]", topic="t", key=None)
    with pytest.raises(Undecodable, match="UL5001"):
        from_headers([], b"{}", topic="t", key=None)
