"""Events as Kafka messages: CloudEvents' Kafka binding, and what others write.

Messages are read in one of four ways: binary CloudEvents (ours), structured CloudEvents, through the topic's
declared decoder, or not at all; the last keep their bytes and go to the shelf.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from confluent_kafka import Message

from unlost.errors import Undecodable, UnlostError, UsageError
from unlost.events import MAX_HEAD_BYTES, Envelope, from_headers, seal, to_headers
from unlost.events.codec import is_second
from unlost.events.topic import Arrival, Decoder, Foreign
from unlost.world import rfc3339

Headers = Sequence[tuple[str, bytes | None]]

_FIELDS = {
    "ce_id": "id",
    "ce_source": "source",
    "ce_type": "type",
    "ce_time": "time",
    "ce_subject": "subject",
    "ce_partitionkey": "partitionkey",
    "ce_correlationid": "correlationid",
    "ce_causationid": "causationid",
    "ce_traceparent": "traceparent",
    "content-type": "datacontenttype",
}
_HEAD_MAX = 4096  # beyond it the strict reader decides


class _Raw(msgspec.Struct, frozen=True):
    """A message's headers as they were, kept where its bytes are kept: another decoder may read them one day."""

    kafkaheaders: list[tuple[str, str | None]]


_raw = msgspec.json.Decoder(_Raw).decode


def headers_in(m: Message) -> Headers:
    return m.headers() or ()  # type: ignore[return-value]  # (its stub knows more forms than there are)


def headers_of(e: Envelope) -> tuple[list[tuple[str, bytes]], bytes | None]:
    """The event in binary mode.

    Raises:
        UsageError: its attributes are larger than any reader takes.
    """
    headers, value = to_headers(e)
    if e.headers or e.extensions or len(headers) > 16:
        size = sum(len(name) + len(text) for name, text in headers)
        if size > MAX_HEAD_BYTES:
            raise UsageError(
                "UL1012", f"the attributes of an event have at most {MAX_HEAD_BYTES} bytes", found=f"{size} bytes"
            )
    return headers, value


def arrival_of(
    topic: str, partition: int, position: int, millis: int, key: bytes | None, value: bytes | None, headers: Headers,
    decoder: Decoder | None,
) -> Arrival:  # fmt: skip
    """What a message is to us. Never raises for what it holds."""
    envelope = _ours(topic, key, value, headers, millis)
    recorded = millis * 1000
    if envelope is not None:
        return Arrival(position, envelope, recorded, None, key, value)
    raw = _keep(headers)
    try:
        if decoder is not None and not _cloudevent(headers):
            message = Foreign(
                topic=topic, partition=partition, position=position, key=key, value=value, headers=headers,
                recorded=recorded,
            )  # fmt: skip
            return _decoded(message, decoder, raw)
        found = from_headers(headers, value, topic=topic, key=key, time=rfc3339(recorded))
    except Undecodable as e:
        return Arrival(position, None, recorded, raw, key, value, str(e))
    if found.data is not value:  # structured: the event's data are not the message's value
        return Arrival(position, found, recorded, raw, found.key, value)
    return Arrival(position, found, recorded, None, found.key, value)


def reread(topic: str, partition: int, arrival: Arrival, decoder: Decoder | None) -> Arrival:
    """An arrival that was kept as raw bytes, as today's code sees it."""
    if arrival.head is None:
        return arrival
    try:
        kept = _raw(arrival.head)
        headers = [(name, None if value is None else b64decode(value)) for name, value in kept.kafkaheaders]
    except (msgspec.MsgspecError, ValueError):
        return arrival
    return arrival_of(
        topic, partition, arrival.position, arrival.recorded // 1000, arrival.key, arrival.data, headers, decoder
    )


def _ours(topic: str, key: bytes | None, value: bytes | None, headers: Headers, millis: int) -> Envelope | None:
    """The short way for what we write ourselves. None: somebody more careful must look."""
    fields: dict[str, Any] = {}
    plain = None
    version = None
    size = 0
    try:
        for name, raw in headers:
            size += len(raw)  # type: ignore[arg-type]
            field = _FIELDS.get(name)
            if field is not None:
                if field in fields or not raw:
                    return None
                fields[field] = raw.decode()
            elif name == "ce_specversion":
                version = raw
            elif name[:3] == "ce_" or name.lower()[:3] == "ce_" or name.lower() == "content-type":
                return None
            else:
                if plain is None:
                    plain = {}
                plain[name] = raw.decode(errors="backslashreplace")  # type: ignore[union-attr]
        if version != b"1.0" or size > _HEAD_MAX or (value is not None and len(value) > 65536):
            return None
        id, source, type, time = fields["id"], fields["source"], fields["type"], fields["time"]
        if not (id and source and type and id.isprintable() and source.isprintable() and type.isprintable()):
            return None
        if (
            len(time) != 27
            or time[26] != "Z"
            or time[19] != "."
            or not time[20:26].isdigit()
            or not is_second(time[:19])
        ):
            return None
        kind = fields.get("datacontenttype")
        if kind is None:
            fields["datacontenttype"] = None
        elif kind != "application/json" and "cloudevents" in kind.lower():
            return None
    except (TypeError, AttributeError, KeyError, UnicodeDecodeError):
        return None
    if plain:
        fields["headers"] = plain
    return Envelope(topic=topic, key=key, data=value, recordedtime=rfc3339(millis * 1000), **fields)


def _cloudevent(headers: Headers) -> bool:
    for name, value in headers:
        low = name.lower()
        if low == "ce_specversion" or (
            low == "content-type" and (value or b"").lower().startswith(b"application/cloudevents")
        ):
            return True
    return False


def _decoded(message: Foreign, decoder: Decoder, raw: bytes) -> Arrival:
    """What the topic's decoder makes of it. Its errors are the message's: the bytes are kept, and can be redriven."""
    try:
        event = decoder(message)
        if event is None:
            return Arrival(message.position, None, message.recorded, raw, message.key, message.value, rule="decoder")
        envelope = seal(
            event, source=f"kafka:{message.topic}", id=f"{message.topic}/{message.partition}:{message.position}",
            topic=message.topic, now=message.recorded,
        )  # fmt: skip
    except UnlostError as e:
        return _unreadable(message, raw, str(e))
    except Exception as e:
        return _unreadable(message, raw, f"the decoder of topic {message.topic!r} failed: {type(e).__name__}: {e}")
    return Arrival(message.position, envelope, message.recorded, raw, envelope.key, message.value)


def _unreadable(message: Foreign, raw: bytes, why: str) -> Arrival:
    return Arrival(message.position, None, message.recorded, raw, message.key, message.value, why)


def _keep(headers: Iterable[tuple[str, bytes | None]]) -> bytes:
    return msgspec.json.encode(
        _Raw([(name, None if value is None else b64encode(value).decode()) for name, value in headers])
    )
