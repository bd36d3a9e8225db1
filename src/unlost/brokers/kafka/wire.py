"""Events as Kafka messages: CloudEvents' Kafka binding, and what others write.

Messages are read in one of four ways: binary CloudEvents (ours), structured CloudEvents, through the topic's
declared decoder, or not at all; the last keep their bytes and go to the shelf.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from confluent_kafka import Message

from unlost.errors import Undecodable, UnlostError, UsageError
from unlost.events import MAX_EVENT_BYTES, MAX_HEAD_BYTES, Envelope, from_headers, seal, to_headers
from unlost.events.codec import peek
from unlost.events.topic import Arrival, Decoder, Foreign
from unlost.world import rfc3339

Headers = Sequence[tuple[str, bytes | None]]

_TOMBSTONE = str(
    Undecodable(
        "UL5007", "a message without a value (a tombstone) is no event",
        fix="if they are meant to be there: Topic(..., decoder=...) with a function that returns None for them",
    )
)  # fmt: skip


class _Raw(msgspec.Struct, frozen=True):
    """A message's headers as they were, kept where its bytes are kept: another decoder may read them one day."""

    kafkaheaders: Headers


_raw = msgspec.json.Decoder(_Raw).decode


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


def received(m: Message, topic: str, decoder: Decoder | None) -> Arrival:
    """What a message of our topic is to us. Never raises for what it holds."""
    headers: Any = m.headers() or ()
    found = peek(headers)
    value: Any = m.value()
    if found is not None and (value is None or len(value) <= MAX_EVENT_BYTES):
        return Arrival(m.offset(), None, m.timestamp()[1] * 1000, None, m.key(), value, "", "", topic, *found)  # type: ignore[arg-type]
    return arrival_of(
        topic, m.partition() or 0, m.offset() or 0, m.timestamp()[1], m.key(), value, headers, decoder
    )  # fmt: skip


def arrival_of(
    topic: str, partition: int, position: int, millis: int, key: bytes | None, value: bytes | None, headers: Headers,
    decoder: Decoder | None,
) -> Arrival:  # fmt: skip
    """What a message is to us. Never raises for what it holds."""
    recorded = millis * 1000
    found = peek(headers)
    if found is not None and (value is None or len(value) <= MAX_EVENT_BYTES):
        return Arrival(position, None, recorded, None, key, value, "", "", topic, *found)
    if decoder is not None and not _cloudevent(headers):
        message = Foreign(
            topic=topic, partition=partition, position=position, key=key, value=value, headers=headers,
            recorded=recorded,
        )  # fmt: skip
        return _decoded(message, decoder, _keep(headers))
    try:
        envelope = from_headers(headers, value, topic=topic, key=key, time=rfc3339(recorded))
    except Undecodable as e:
        why = str(e) if value is not None or _cloudevent(headers) else _TOMBSTONE
        return Arrival(position, None, recorded, _keep(headers), key, value, why)
    # Structured, or headers that would not come back byte for byte: they are kept as they are.
    as_is = envelope.data is value and envelope.recordedtime is None and _same(to_headers(envelope)[0], headers)
    return Arrival(position, envelope, recorded, None if as_is else _keep(headers), envelope.key, value)


def original_headers(arrival: Arrival) -> Headers:
    """The headers that a message came with."""
    if arrival.layout is not None:
        return list(zip(arrival.layout.names, arrival.values, strict=True))
    kept = None if arrival.head is None else _kept(arrival.head)
    if kept is not None:
        return kept
    if arrival.envelope is None:
        return ()
    return to_headers(msgspec.structs.replace(arrival.envelope, recordedtime=None))[0]


def reread(topic: str, partition: int, arrival: Arrival, decoder: Decoder | None) -> Arrival:
    """An arrival that was kept as raw bytes, as today's code sees it."""
    headers = None if arrival.head is None else _kept(arrival.head)
    if headers is None:
        return arrival
    return arrival_of(
        topic, partition, arrival.position, arrival.recorded // 1000, arrival.key, arrival.data, headers, decoder
    )


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


def _same(ours: Sequence[tuple[str, bytes]], headers: Headers) -> bool:
    return len(ours) == len(headers) and set(ours) == set(headers)


def _keep(headers: Headers) -> bytes:
    return msgspec.json.encode(_Raw(headers))


def _kept(head: bytes) -> Headers | None:
    try:
        return _raw(head).kafkaheaders
    except msgspec.MsgspecError:
        return None  # a head of ours
