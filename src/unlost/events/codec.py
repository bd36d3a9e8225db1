"""Envelopes as bytes: the stored head, CloudEvents JSON, and Kafka's binary headers.

Whatever is read here may come from anybody. For any bytes the answer is an `Envelope` or `Undecodable`:
UL5001 for what is no CloudEvent, UL5002 for an attribute with a wrong value, UL5005 for too large
or too deep.
"""

from __future__ import annotations

import binascii
import re
from base64 import b64decode, b64encode
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import blake2b
from typing import Any, NamedTuple, NoReturn

import msgspec

from unlost.errors import Undecodable, UsageError
from unlost.events.data import MAX_EVENT_BYTES, decode_data, encode_data, is_json
from unlost.events.envelope import Envelope, event_hash

__all__ = [
    "MAX_EVENT_BYTES",
    "MAX_HEAD_BYTES",
    "decode_data",
    "decode_head",
    "encode_data",
    "encode_head",
    "erased_head",
    "from_headers",
    "from_json",
    "is_erased",
    "to_headers",
    "to_json",
]

MAX_HEAD_BYTES = 64 * 1024
MAX_JSON_BYTES = MAX_EVENT_BYTES * 4 // 3 + 2 * MAX_HEAD_BYTES
CONTENT_TYPE = "content-type"
JSON_TYPE = "application/json"

_RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,12})?(?:Z|[+-]\d\d:\d\d)", re.ASCII)
_ATTRIBUTE = re.compile(r"[a-z0-9]{1,64}", re.ASCII)
_NUMBER = re.compile(r"[0-9]{1,19}", re.ASCII)

_TEXTS = (
    "subject",
    "datacontenttype",
    "dataschema",
    "partitionkey",
    "correlationid",
    "causationid",
    "traceparent",
    "tracestate",
)


class _Head(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True, gc=False):
    """The stored form of the context attributes. `null` as datacontenttype says that there is none."""

    specversion: str
    id: str
    source: str
    type: str
    time: str
    subject: str | None = None
    partitionkey: str | None = None
    correlationid: str | None = None
    causationid: str | None = None
    traceparent: str | None = None
    tracestate: str | None = None
    datacontenttype: str | None = JSON_TYPE
    dataschema: str | None = None
    unlostversion: int = 1
    unlostpublisher: str | None = None
    unlostnumber: int | None = None
    unlostheaders: str | None = None
    unlosterased: str | None = None  # when an operator had everything taken out that says more than this head does


_json = msgspec.json.Encoder().encode
_any = msgspec.json.Decoder().decode
_head = msgspec.json.Decoder(_Head).decode
_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_attributes = msgspec.json.Decoder(dict[str, str | int | bool | None]).decode
_value = msgspec.json.Decoder(str | int | bool | None).decode
_user_headers = msgspec.json.Decoder(dict[str, str]).decode


def _no_event(found: object) -> NoReturn:
    raise Undecodable(
        "UL5001",
        "these bytes are not a CloudEvent",
        found=str(found)[:300],
        fix="look at them on the shelf; whoever wrote them to this topic does not speak CloudEvents 1.0",
    )


def _wrong(name: str, value: object, expected: str) -> NoReturn:
    raise Undecodable(
        "UL5002",
        f"the attribute {name!r} is {expected}"[:300],
        found=repr(value)[:300],
        fix="correct the publisher",
    )


def _too_large(what: str, size: int, most: int) -> NoReturn:
    raise Undecodable("UL5005", f"{what} larger than {most} bytes", found=f"{size} bytes")


def _unreadable(error: Exception) -> NoReturn:
    if isinstance(error, RecursionError):
        raise Undecodable("UL5005", "the JSON is nested too deeply") from None
    _no_event(error)


# ---- the stored head


def encode_head(e: Envelope) -> bytes:
    """The context attributes as one compact JSON object: all but topic, key, data and recordedtime.

    Raises `UsageError` UL1012 if they do not fit into 64 KiB.
    """
    head = _Head(
        "1.0",
        e.id,
        e.source,
        e.type,
        e.time,
        e.subject,
        e.partitionkey,
        e.correlationid,
        e.causationid,
        e.traceparent,
        e.tracestate,
        # omit_defaults compares by identity.
        JSON_TYPE if e.datacontenttype == JSON_TYPE else e.datacontenttype,
        e.dataschema,
        e.eventversion,
        e.publisher,
        e.number,
        _json(e.headers).decode() if e.headers else None,
    )
    raw = _json(head) if not e.extensions else _json(e.extensions | msgspec.to_builtins(head))
    if len(raw) > MAX_HEAD_BYTES:
        raise UsageError(
            "UL1012",
            f"the attributes of an event have at most {MAX_HEAD_BYTES} bytes",
            found=f"{len(raw)} bytes",
        )
    return raw


def decode_head(
    head: bytes, *, topic: str, key: bytes | None, data: bytes | None, recordedtime: str | None = None
) -> Envelope:
    """The envelope of a stored row. Raises `Undecodable` for anything but a valid head."""
    if len(head) > MAX_HEAD_BYTES:
        _too_large("the head is", len(head), MAX_HEAD_BYTES)
    try:
        h = _head(head)
    except MemoryError:
        raise
    except Exception:
        return _from_other_head(head, topic, key, data, recordedtime)
    if (
        h.specversion != "1.0"
        or not (h.id and h.source and h.type)
        or not (h.id.isprintable() and h.source.isprintable() and h.type.isprintable())
        or not 1 <= h.unlostversion < 2**31
        or (h.unlostnumber is not None and not 0 <= h.unlostnumber < 2**63)
    ):
        return _from_other_head(head, topic, key, data, recordedtime)  # says what is wrong
    _check_time("time", h.time)
    return Envelope(
        id=h.id,
        source=h.source,
        type=h.type,
        time=h.time,
        topic=topic,
        key=key,
        data=data,
        subject=h.subject,
        datacontenttype=h.datacontenttype,
        dataschema=h.dataschema,
        recordedtime=recordedtime,
        partitionkey=h.partitionkey,
        correlationid=h.correlationid,
        causationid=h.causationid,
        traceparent=h.traceparent,
        tracestate=h.tracestate,
        eventversion=h.unlostversion,
        publisher=h.unlostpublisher,
        number=h.unlostnumber,
        headers=_read_headers(h.unlostheaders) if h.unlostheaders else {},
    )


def peek_head(head: bytes) -> tuple[str, int, bool] | None:
    """Type, `event_hash`, and whether it is version 1 in JSON, of a stored row: if `decode_head` is sure to make an envelope
    of it. None: ask that one.

    >>> peek_head(b'{"specversion":"1.0","id":"1","source":"a","type":"t","time":"2026-01-02T03:04:05.000006Z"}')[0]
    't'
    """
    try:
        h = _head(head)
        _check_time("time", h.time)
    except Exception:
        return None
    id, source, type = h.id, h.source, h.type
    if (
        len(head) > MAX_HEAD_BYTES or h.specversion != "1.0" or not (id and source and type) or h.unlostheaders
        or not (id.isprintable() and source.isprintable() and type.isprintable())
        or not 1 <= h.unlostversion < 2**31 or h.unlostnumber is not None or h.unlosterased is not None
    ):  # fmt: skip
        return None
    return type, event_hash(source, id), h.unlostversion == 1 and h.datacontenttype == JSON_TYPE


def erased_head(head: bytes, time: str) -> bytes:
    """What is left of a stored head when its event is erased: what digests, deduplication and the books need. `time` says
    when, as RFC 3339 writes it.

    Raises `Undecodable` for anything but a valid head.

    >>> head = b'{"specversion":"1.0","id":"1","source":"a","type":"t","time":"2026-01-02T03:04:05Z","subject":"ada"}'
    >>> is_erased(head), is_erased(erased_head(head, "2026-02-02T03:04:05Z"))
    (False, True)
    """
    e = decode_head(head, topic="", key=None, data=None)
    return _json(
        _Head(
            "1.0", e.id, e.source, e.type, e.time, datacontenttype=None, unlostversion=e.eventversion, unlosterased=time
        )
    )


def is_erased(head: bytes) -> bool:
    """Whether this is what `erased_head` has left. No other event has that attribute: from outside it is not taken."""
    if b'"unlosterased"' not in head:
        return False
    try:
        return _head(head).unlosterased is not None
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return False


def _from_other_head(
    head: bytes, topic: str, key: bytes | None, data: bytes | None, recordedtime: str | None
) -> Envelope:
    """A head with extensions of others, or one that is wrong."""
    try:
        attributes: dict[str, Any] = _attributes(head)
    except MemoryError:
        raise
    except Exception as error:
        _unreadable(error)
    attributes.setdefault("datacontenttype", JSON_TYPE)
    return _build(attributes, topic=topic, key=key, data=data, recordedtime=recordedtime)


# ---- one validation for every form


def _build(
    attributes: dict[str, Any],
    *,
    topic: str,
    key: bytes | None,
    data: bytes | None,
    recordedtime: str | None = None,
    time: str | None = None,
    headers: dict[str, str] | None = None,
) -> Envelope:
    """The envelope from attributes of any origin; `attributes` is used up."""
    if attributes.pop("specversion", None) != "1.0":
        _no_event("no specversion 1.0")
    if data is not None and len(data) > MAX_EVENT_BYTES:
        _too_large("the data are", len(data), MAX_EVENT_BYTES)
    recorded = _time(attributes, "recordedtime") or recordedtime
    occurred = _time(attributes, "time") or recorded or time
    if occurred is None:
        _wrong("time", None, "missing, and nothing else says when this event occurred")
    own_headers = _text(attributes, "unlostheaders")
    known: dict[str, Any] = {
        "id": _name(attributes, "id"),
        "source": _name(attributes, "source"),
        "type": _name(attributes, "type"),
        "publisher": _text(attributes, "unlostpublisher"),
        "number": _number(attributes, "unlostnumber", 0, 2**63),
        "eventversion": _number(attributes, "unlostversion", 1, 2**31) or 1,
        "headers": (headers or {}) | (_read_headers(own_headers) if own_headers else {}),
    }
    for name in _TEXTS:
        known[name] = _text(attributes, name)
    attributes.pop("unlostkey", None)  # means something to `from_json` only, which has taken it
    attributes.pop("unlosterased", None)  # the log alone says so, of its own rows
    # What is left is of others.
    for name, value in attributes.items():
        if not _ATTRIBUTE.fullmatch(name) or name == "data":
            _wrong(name, value, "not allowed: a name has only a-z and 0-9")
        if type(value) is int and not -(2**31) <= value < 2**31:
            _wrong(name, value, "a whole number of 32 bits")
    extensions = {name: value for name, value in attributes.items() if value is not None}
    return Envelope(
        **known, time=occurred, topic=topic, key=key, data=data, recordedtime=recorded, extensions=extensions
    )


def _name(attributes: dict[str, Any], name: str) -> str:
    value = attributes.pop(name, None)
    if not (isinstance(value, str) and value and value.isprintable()):
        _wrong(name, value, "printable text, and not empty")
    return value


def _time(attributes: dict[str, Any], name: str) -> str | None:
    value = _text(attributes, name)
    if value is not None:
        _check_time(name, value)
    return value


def _text(attributes: dict[str, Any], name: str) -> str | None:
    value = attributes.pop(name, None)
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        _wrong(name, value, "text")
    return value


def _number(attributes: dict[str, Any], name: str, least: int, end: int) -> int | None:
    value = attributes.pop(name, None)
    if value is None:
        return None
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = int(value)
    if type(value) is not int or not least <= value < end:
        _wrong(name, value, f"a whole number from {least} to {end - 1}")
    return value


@lru_cache(maxsize=64)
def is_second(text: str) -> bool:
    try:
        return bool(_RFC3339.fullmatch(text + "Z")) and bool(datetime.fromisoformat(text))
    except ValueError:
        return False


def _check_time(name: str, text: str) -> None:
    # As `seal` writes it: many events share a second, so only the fraction is looked at each time.
    if len(text) == 27 and text[26] == "Z" and text[19] == "." and text.isascii() and text[20:26].isdigit():
        if is_second(text[:19]):
            return
        _wrong(name, text, "a time as RFC 3339 writes it")
    try:
        if _RFC3339.fullmatch(text):
            when = datetime.fromisoformat(text)
            if text[-1] != "Z":
                when.astimezone(UTC)
            return
    except (ValueError, OverflowError):
        pass  # said below, together with what else may be wrong with it
    _wrong(name, text, "a time as RFC 3339 writes it")


def _base64(name: str, text: str) -> bytes:
    try:
        return b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        _wrong(name, text, "base64")


def _read_headers(text: str) -> dict[str, str]:
    try:
        return _user_headers(text)
    except MemoryError:
        raise
    except Exception:
        _wrong("unlostheaders", text, "a JSON object of texts")


def _wire_attributes(e: Envelope) -> dict[str, str | int | bool]:
    """All attributes but data and datacontenttype, with CloudEvents' names, types and limits."""
    attributes: dict[str, str | int | bool | None] = {
        **e.extensions,
        "specversion": "1.0",
        "id": e.id,
        "source": e.source,
        "type": e.type,
        "time": e.time,
        "subject": e.subject,
        "dataschema": e.dataschema,
        "recordedtime": e.recordedtime,
        "partitionkey": e.partitionkey,
        "correlationid": e.correlationid,
        "causationid": e.causationid,
        "traceparent": e.traceparent,
        "tracestate": e.tracestate,
        "unlostversion": e.eventversion if e.eventversion != 1 else None,
        "unlostpublisher": e.publisher,
        # CloudEvents' integers have 32 bits; this one may outgrow them, so it is text on the wire.
        "unlostnumber": None if e.number is None else str(e.number),
    }
    return {name: value for name, value in attributes.items() if value is not None}


# ---- CloudEvents JSON


def to_json(e: Envelope) -> bytes:
    """The event in CloudEvents' JSON format: `data` as they are if they are JSON, else `data_base64`."""
    members: dict[str, Any] = dict(_wire_attributes(e))
    if e.datacontenttype is not None:
        members["datacontenttype"] = e.datacontenttype
    if e.headers:
        members["unlostheaders"] = _json(e.headers).decode()
    if e.key is not None and (e.partitionkey is None or e.partitionkey.encode() != e.key):
        members["unlostkey"] = b64encode(e.key).decode()
    if e.data is not None:
        if e.datacontenttype is not None and is_json(e.datacontenttype) and _stays_json(e.data):
            members["data"] = msgspec.Raw(e.data)
        else:
            members["data_base64"] = b64encode(e.data).decode()
    return _json(members)


def _stays_json(data: bytes) -> bool:
    """Whether data come back byte for byte when they are put into a JSON object. A `null` would not."""
    if data != data.strip() or data == b"null":
        return False
    try:
        _any(data)
    except MemoryError:
        raise
    except Exception:
        return False
    return True


def from_json(raw: bytes, *, topic: str, key: bytes | None = None, time: str | None = None) -> Envelope:
    """The envelope from CloudEvents' JSON format; its key is that of the event unless `key` says otherwise.

    `time` (the broker's) stands in for an event that says no time. Raises `Undecodable`.
    """
    if len(raw) > MAX_JSON_BYTES:
        _too_large("the event is", len(raw), MAX_JSON_BYTES)
    try:
        members = _members(raw)
        sent, encoded = members.pop("data", None), members.pop("data_base64", None)
        attributes: dict[str, Any] = {name: _value(value) for name, value in members.items()}
        if sent is not None:
            _any(sent)
            if bytes(sent) == b"null":
                sent = None
        base64 = _value(encoded) if encoded is not None else None
    except MemoryError:
        raise
    except Exception as error:
        _unreadable(error)
    if sum(len(name) + len(value) for name, value in members.items()) > MAX_HEAD_BYTES:
        _too_large("the attributes are", len(raw), MAX_HEAD_BYTES)
    data: bytes | None = None
    if base64 is not None:
        if sent is not None or not isinstance(base64, str):
            _wrong("data_base64", "", "text, and never beside data")
        data = _base64("data_base64", base64)
    elif sent is not None:
        data = bytes(sent)
        kind = attributes.setdefault("datacontenttype", JSON_TYPE)
        if isinstance(kind, str) and not is_json(kind) and data.startswith(b'"'):
            data = _any(data).encode()  # a text that is no JSON stands in the string itself
    sent_key = _text(attributes, "unlostkey")
    if key is None:
        if sent_key is not None:
            key = _base64("unlostkey", sent_key)
        elif isinstance(partitionkey := attributes.get("partitionkey"), str):
            key = partitionkey.encode() or None
    return _build(attributes, topic=topic, key=key, data=data, time=time)


# ---- Kafka's binary mode


_VERSION = ("ce_specversion", b"1.0")
_JSON_HEADER = (CONTENT_TYPE, JSON_TYPE.encode())


def to_headers(e: Envelope) -> tuple[list[tuple[str, bytes]], bytes | None]:
    """The event in Kafka's binary mode: `ce_` headers, `content-type`, the user's headers, and the value."""
    if e.extensions or e.dataschema or e.recordedtime or e.publisher or e.number is not None or e.eventversion != 1:
        headers = [
            (f"ce_{name}", (str(value).lower() if isinstance(value, bool) else str(value)).encode())
            for name, value in _wire_attributes(e).items()
        ]
    else:  # what most events are
        headers = [
            _VERSION, ("ce_id", e.id.encode()), ("ce_source", e.source.encode()), ("ce_type", e.type.encode()),
            ("ce_time", e.time.encode()),
        ]  # fmt: skip
        if e.subject is not None:
            headers.append(("ce_subject", e.subject.encode()))
        if e.partitionkey is not None:
            headers.append(("ce_partitionkey", e.partitionkey.encode()))
        if e.correlationid is not None:
            headers.append(("ce_correlationid", e.correlationid.encode()))
        if e.causationid is not None:
            headers.append(("ce_causationid", e.causationid.encode()))
        if e.traceparent is not None:
            headers.append(("ce_traceparent", e.traceparent.encode()))
        if e.tracestate is not None:
            headers.append(("ce_tracestate", e.tracestate.encode()))
    if e.datacontenttype == JSON_TYPE:
        headers.append(_JSON_HEADER)
    elif e.datacontenttype is not None:
        headers.append((CONTENT_TYPE, e.datacontenttype.encode()))
    if e.headers:
        headers.extend((name, value.encode()) for name, value in e.headers.items())
    return headers, e.data


def from_headers(
    headers: Iterable[tuple[str, bytes | None]],
    data: bytes | None,
    *,
    topic: str,
    key: bytes | None,
    time: str | None = None,
) -> Envelope:
    """The envelope from a Kafka message in binary or structured mode.

    `time` (the broker's) stands in for an event that says no time. Headers of others that are not UTF-8
    are kept with escapes; of several with one name the last is taken. Raises `Undecodable`.
    """
    attributes: dict[str, Any] = {}
    plain: dict[str, str] = {}
    size = 0
    for name, value in headers:
        size += len(name) + len(value or b"")
        if size > MAX_HEAD_BYTES:
            _too_large("the headers are", size, MAX_HEAD_BYTES)
        low = name.lower()
        if not (low.startswith("ce_") or low == CONTENT_TYPE):
            plain[name] = (value or b"").decode(errors="backslashreplace")
            continue
        attribute = "datacontenttype" if low == CONTENT_TYPE else low[3:]
        if attribute in attributes or (attribute == "datacontenttype" and low != CONTENT_TYPE):
            _wrong(attribute, name, "given once")
        try:
            attributes[attribute] = (value or b"").decode()
        except UnicodeDecodeError:
            _wrong(attribute, value, "valid UTF-8")
    kind = str(attributes.get("datacontenttype", "")).strip().lower()
    if not kind.startswith("application/cloudevents"):
        return _build(attributes, topic=topic, key=key, data=data, time=time, headers=plain)
    if kind.partition(";")[0].strip() != "application/cloudevents+json" or data is None:
        _no_event(f"content type {kind!r}")
    envelope = from_json(data, topic=topic, key=key, time=time)
    return msgspec.structs.replace(envelope, headers=plain | envelope.headers) if plain else envelope


# ---- the short way: what we write ourselves is read by its layout


class Layout(NamedTuple):
    """Where things stand in a message whose headers have these names."""

    names: tuple[str, ...]
    version: int
    id: int
    source: int
    type: int
    time: int
    kind: int  # of content-type; -1: there is none
    revision: int  # of ce_unlostversion; -1: there is none
    texts: tuple[tuple[int, str], ...]
    plain: tuple[tuple[int, str], ...]


_LAYOUTS_MAX = 1024
_PEEK_BYTES_MAX = 4096  # of all headers; what is larger is read with more care
_layouts: dict[tuple[str, ...], Layout | None] = {}
_UNKNOWN: Any = object()


def peek(
    headers: Sequence[tuple[str, bytes | None]],
) -> tuple[str, int, bool, tuple[bytes, ...], Layout] | None:
    """Type, `event_hash`, whether it is version 1 in JSON, and what `read_peeked` needs, of a message in binary mode:
    if the envelope is sure to be the one that `from_headers` makes. None: ask that one.

    >>> peek([("ce_specversion", b"1.0"), ("ce_id", b"1"), ("ce_source", b"a"), ("ce_type", b"t"),
    ...       ("ce_time", b"2026-01-02T03:04:05.000006Z")])[0]
    't'
    """
    if not headers:
        return None
    names: Any
    values: Any
    names, values = zip(*headers, strict=True)
    layout = _layouts.get(names, _UNKNOWN)
    if layout is _UNKNOWN:
        layout = _learn(names)
    if layout is None:
        return None
    try:
        joined = b"".join(values)
    except TypeError:  # a header without a value
        return None
    id, source, type, time = values[layout.id], values[layout.source], values[layout.type], values[layout.time]
    kind = values[layout.kind] if layout.kind >= 0 else b""
    revision = values[layout.revision] if layout.revision >= 0 else b"1"
    if (
        len(joined) > _PEEK_BYTES_MAX or not joined.isascii() or not (id + source + type).decode().isprintable()
        or not (id and source and type) or values[layout.version] != b"1.0"
        or len(time) != 27 or time[26:] != b"Z" or not time[20:26].isdigit() or not _is_second_of(time[:20])
        or (kind != b"application/json" and b"cloudevents" in kind.lower())
        or (revision != b"1" and not (revision.isdigit() and len(revision) < 9 and int(revision) > 0))
    ):  # fmt: skip
        return None
    begun = _begun(source).copy()  # what `event_hash` makes, from where the source ends
    begun.update(id)
    digest = int.from_bytes(begun.digest(), "big", signed=True)
    return type.decode(), digest, kind == b"application/json" and revision == b"1", values, layout


@lru_cache(maxsize=1024)
def _begun(source: bytes) -> Any:
    return blake2b(source + b"\0", digest_size=8)


@lru_cache(maxsize=256)
def _is_second_of(text: bytes) -> bool:
    return text[19:] == b"." and is_second(text[:19].decode())


def read_peeked(
    values: tuple[bytes, ...], layout: Layout, data: bytes | None, *, topic: str, key: bytes | None, recordedtime: str
) -> Envelope:
    """The envelope of a message that `peek` has vouched for."""
    texts = [value.decode() for value in values]
    return Envelope(
        id=texts[layout.id], source=texts[layout.source], type=texts[layout.type], time=texts[layout.time],
        topic=topic, key=key, data=data, recordedtime=recordedtime,
        datacontenttype=(texts[layout.kind] or None) if layout.kind >= 0 else None,
        eventversion=int(texts[layout.revision]) if layout.revision >= 0 else 1,
        headers={name: texts[i] for i, name in layout.plain},
        **{name: texts[i] for i, name in layout.texts if texts[i]},  # type: ignore[arg-type]
    )  # fmt: skip


def _learn(names: tuple[str, ...]) -> Layout | None:
    """The layout of these names, or None if there is anything about them that needs care."""
    at: dict[str, int] = {}
    texts: list[tuple[int, str]] = []
    plain: list[tuple[int, str]] = []
    own = {"ce_specversion", "ce_id", "ce_source", "ce_type", "ce_time", "ce_unlostversion", CONTENT_TYPE}
    sure = len(set(names)) == len(names)
    for i, name in enumerate(names):
        low = name.lower()
        if name in own:
            at[name] = i
        elif name.startswith("ce_") and name[3:] in _TEXTS and name != "ce_datacontenttype":
            texts.append((i, name[3:]))
        elif low.startswith("ce_") or low == CONTENT_TYPE:
            sure = False
        else:
            plain.append((i, name))
    layout = None
    if sure and {"ce_specversion", "ce_id", "ce_source", "ce_type", "ce_time"} <= set(at):
        layout = Layout(
            names, at["ce_specversion"], at["ce_id"], at["ce_source"], at["ce_type"], at["ce_time"],
            at.get(CONTENT_TYPE, -1), at.get("ce_unlostversion", -1), tuple(texts), tuple(plain),
        )  # fmt: skip
    if len(_layouts) >= _LAYOUTS_MAX:  # somebody makes up names
        _layouts.clear()
    _layouts[names] = layout
    return layout
