"""What travels: the context of an event (CloudEvents 1.0) around its data, and how it is made."""

from __future__ import annotations

from datetime import UTC, datetime
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import msgspec

from unlost.errors import UsageError
from unlost.events.data import encode_data
from unlost.events.model import Event, check_name, key_of, sensitive_fields
from unlost.world import new_id, rfc3339

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_ID = 200
MAX_HEADERS = 64
MAX_HEADER_BYTES = 16 * 1024

_RESERVED_HEADERS = ("ce_", "ce-", "cloudevents", "unlost")
_RESERVED_NAMES = {"content-type", "traceparent", "tracestate"}


class Envelope(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One event as it is accepted, stored and delivered: CloudEvents attributes, key and data bytes.

    `time` is when the fact occurred, `recordedtime` when the broker took it (both RFC 3339).
    `number` counts the events of one `publisher`, without a gap. `due` (microseconds; `by_clock`: a time on the wall, else a
    span that began when it was sealed) is of one that is not to leave yet; it does not travel.
    """

    id: str
    source: str
    type: str
    time: str
    topic: str
    key: bytes | None
    data: bytes | None
    subject: str | None = None
    datacontenttype: str | None = "application/json"
    dataschema: str | None = None
    recordedtime: str | None = None
    partitionkey: str | None = None
    correlationid: str | None = None
    causationid: str | None = None
    traceparent: str | None = None
    tracestate: str | None = None
    eventversion: int = 1
    publisher: str | None = None
    number: int | None = None
    extensions: dict[str, str | int | bool] = {}
    headers: dict[str, str] = {}
    due: int | None = None
    by_clock: bool = False

    @property
    def occurred_at(self) -> datetime:
        """When the fact occurred, in UTC."""
        return datetime.fromisoformat(self.time).astimezone(UTC)

    def __repr__(self) -> str:
        size = "none" if self.data is None else f"{len(self.data)} bytes"
        return (
            f"Envelope(id={self.id!r}, source={self.source!r}, type={self.type!r}, time={self.time!r}, "
            f"topic={self.topic!r}, key={self.key!r}, data: {size})"
        )

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("id", self.id), ("source", self.source), ("type", self.type), ("topic", self.topic)]


def seal(
    event: Event,
    *,
    source: str,
    id: str | None = None,
    occurred_at: datetime | None = None,
    cause: Envelope | None = None,
    headers: Mapping[str, str] | None = None,
    topic: str | None = None,
    publisher: str | None = None,
    command: bool | None = None,
    due: tuple[int, bool] | None = None,
    now: int,
) -> Envelope:
    """Makes the envelope of a typed event: the one place where that happens. `now` is in microseconds.

    `due` is of one that leaves later (see `delivery/later.py`). `command` says what is meant: an order that is sent (True), a fact that is published (False), or either (None).

    With a `cause` the event carries on its correlation and its trace; without one it begins its own.
    **Guarantee**: the data can be read again by the class of the event.
    **After a crash**: nothing existed.
    Raises `UsageError` for whatever no broker could deliver: a view or a base, values of wrong types, an
    empty key, a naive time, an id or headers that are not plain text, too large data.
    """
    cls = type(event)
    if cls not in _publishable:
        check_publishable(cls)
    spec = cls.__unlost__
    if command is not None and command is not spec.is_command:
        raise _wrong_verb(cls)
    key = key_of(event)
    data = encode_data(event)

    if id is None:
        id = new_id()
        trace = id
    else:
        trace = ""
        if not (isinstance(id, str) and 0 < len(id) <= MAX_ID and id.isprintable()):
            raise UsageError("UL1009", f"an event's id has 1 to {MAX_ID} printable characters", found=repr(id)[:250])
    if not (0 < len(source) <= MAX_ID and source.isprintable()):
        raise UsageError(
            "UL1009", f"an event's source has 1 to {MAX_ID} printable characters", found=repr(source)[:250]
        )

    time = rfc3339(now) if occurred_at is None else _occurrence(occurred_at)

    subject = None
    if key is not None:
        try:
            subject = key.decode()
            if not subject.isprintable():
                subject = None  # CloudEvents text has no control characters; the key itself travels as bytes
        except UnicodeDecodeError:
            pass  # no subject then: the key itself travels as bytes

    if cause is None:
        correlation, causation, parent, state = id, None, None, None
    else:
        correlation, causation = cause.correlationid or cause.id, cause.id
        parent, state = cause.traceparent, cause.tracestate
    if parent is None:
        # A uuid7 is time and random bits, and nobody else has it: a trace id for nothing.
        fresh = (trace or new_id()).replace("-", "")
        parent = f"00-{fresh}-{fresh[16:]}-01"

    return Envelope(
        id=id,
        source=source,
        type=spec.type,
        time=time,
        topic=spec.topic or "" if topic is None else check_name("topic", topic),
        key=key,
        data=data,
        subject=subject,
        partitionkey=subject,
        correlationid=correlation,
        causationid=causation,
        traceparent=parent,
        tracestate=state,
        eventversion=spec.version,
        publisher=publisher,
        headers=_checked_headers(headers) if headers else {},
        due=None if due is None else due[0],
        by_clock=due is not None and due[1],
    )


def _wrong_verb(cls: type[Event]) -> UsageError:
    if cls.__unlost__.is_command:
        return UsageError(
            "UL1017", "a command is sent: one service carries it out", found=f"published: {cls.__qualname__}",
            fix="app.send, ctx.send or outbox.send; or make it a fact in the past tense: class …(Event, key=…)",
        )  # fmt: skip
    return UsageError(
        "UL1017", "an event is published: it has happened, and whoever wants to know is told", found=f"sent: {cls.__qualname__}",
        fix="app.publish, ctx.publish or outbox.publish; or make it an order: class …(Command, queue=…)",
    )  # fmt: skip


_publishable: set[type] = set()


def check_publishable(cls: type[Event]) -> None:
    """Raises `UsageError` (UL1008, UL1014) unless events of this class can be published."""
    spec = getattr(cls, "__unlost__", None)
    if spec is None:
        raise UsageError(
            "UL1008",
            "only an Event or a Command can be published",
            found=cls.__qualname__,
            fix=f"class {cls.__name__}(Event, key='...')",
        )
    if spec.abstract:
        raise UsageError(
            "UL1008",
            f"{cls.__qualname__} is a base for events, not an event",
            found=f"topic {spec.topic!r}, key {spec.key!r}, no fields",
            fix="publish a class derived from it",
        )
    if spec.view_of is not None:
        raise UsageError(
            "UL1008",
            f"{cls.__qualname__} is a view: it is read, not published",
            found=f"view_of={spec.view_of!r}",
            fix="publish the event that it is a view of",
        )
    check_key_not_sensitive(cls)
    _publishable.add(cls)


def check_key_not_sensitive(cls: type[Event]) -> None:
    """Raises `UsageError` UL1014 if the key is `Sensitive`: a key is shown wherever an event is named."""
    key = cls.__unlost__.key
    if key is not None and key in sensitive_fields(cls):
        raise UsageError(
            "UL1014",
            f"the key of {cls.__qualname__} is a sensitive field, or the types of its fields are not defined",
            found=f"key={key!r}",
            fix="use a key that may be seen, such as a customer number",
        )


def _occurrence(when: datetime) -> str:
    if when.tzinfo is None or when.utcoffset() is None:
        raise UsageError(
            "UL1010",
            "occurred_at has a time zone",
            found=repr(when),
            fix="datetime.now(UTC), or .replace(tzinfo=...) with the zone that is meant",
        )
    try:
        utc = when.astimezone(UTC)
    except OverflowError:
        raise UsageError("UL1010", "occurred_at lies outside the calendar", found=repr(when)) from None
    return utc.replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"


def _checked_headers(headers: Mapping[str, str]) -> dict[str, str]:
    if len(headers) > MAX_HEADERS:
        raise UsageError("UL1011", f"an event has at most {MAX_HEADERS} headers", found=f"{len(headers)}")
    for name, value in headers.items():
        if not (isinstance(name, str) and isinstance(value, str) and 0 < len(name) <= 200 and name.isprintable()):
            raise UsageError(
                "UL1011", "headers are text; a name has 1 to 200 printable characters", found=repr(name)[:250]
            )
        low = name.lower()
        if low.startswith(_RESERVED_HEADERS) or low in _RESERVED_NAMES:
            raise UsageError(
                "UL1011",
                "this header's name is used by the envelope",
                found=repr(name),
                fix="choose another name",
            )
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UsageError("UL1011", "headers are valid Unicode text", found=f"header {name!a}") from None
    # Counted as they are stored: JSON inside JSON, where a control character takes seven bytes.
    size = len(msgspec.json.encode(msgspec.json.encode(dict(headers)).decode()))
    if size > MAX_HEADER_BYTES:
        raise UsageError(
            "UL1011",
            f"headers have at most {MAX_HEADER_BYTES} bytes together",
            found=f"{size} bytes as stored",
        )
    return dict(headers)


def derived_id(cause: Envelope, handler: str, n: int) -> str:
    """The id of the `n`-th event that `handler` publishes because of `cause`: the same at every repeat."""
    text = f"{cause.source}\0{cause.id}\0{handler}\0{n}"
    number = int.from_bytes(blake2b(text.encode(), digest_size=16, person=b"unlost.derived").digest(), "big")
    number = number & ~(0xF << 76) & ~(0x3 << 62) | (0x8 << 76) | (0x2 << 62)  # RFC 9562: a uuid8
    hexed = f"{number:032x}"
    return f"{hexed[:8]}-{hexed[8:12]}-{hexed[12:16]}-{hexed[16:20]}-{hexed[20:]}"


def event_hash(source: str, id: str) -> int:
    """The identity of an event as a signed 64-bit number; a set of events is the XOR of theirs."""
    digest = blake2b(f"{source}\0{id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def content_hash(type: str, data: bytes | None) -> int:
    """What an event says as a signed 64-bit number: two events of one id must not differ in it."""
    digest = blake2b(type.encode(), digest_size=8)
    digest.update(b"\0" if data is None else b"\0\1")
    digest.update(data or b"")
    return int.from_bytes(digest.digest(), "big", signed=True)
