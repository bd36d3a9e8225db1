"""The data of an event: from a typed object to JSON bytes and back."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from unlost.errors import Undecodable, UsageError
from unlost.events.model import Event, sensitive_fields

if TYPE_CHECKING:
    from unlost.events.envelope import Envelope

MAX_EVENT_BYTES = 4 * 1024 * 1024
"""The largest data of one event. Larger things are stored elsewhere, and the event names the place."""

E = TypeVar("E", bound=Event)

_encode = msgspec.json.Encoder().encode
_decoders: dict[type, msgspec.json.Decoder[Any]] = {}
_PLACE = re.compile(r" - at `(?:key in )?`?\$\.?([^.`\[]*)")


def decoder_of(cls: type[Event]) -> msgspec.json.Decoder[Any]:
    """The cached decoder of a class; raises `UsageError` UL1016 if its annotations cannot be read as data."""
    decoder = _decoders.get(cls)
    if decoder is None:
        try:
            decoder = msgspec.json.Decoder(cls)
        except Exception as error:
            raise UsageError(
                "UL1016",
                f"the fields of {cls.__qualname__} have types that cannot be data",
                found=f"{type(error).__name__}: {error}",
                fix="use types that JSON can carry, defined where the module of the class can see them",
            ) from error
        _decoders[cls] = decoder
    return decoder


def encode_data(event: Event) -> bytes:
    """The data of an event as JSON.

    **Guarantee**: what is returned can be read again by the class of the event.
    Raises `UsageError`: UL1013 when a field has a value that is not of its type, UL1012 when it is too large.
    """
    cls = type(event)
    decoder = _decoders.get(cls) or decoder_of(cls)
    failed: Exception | None = None
    try:
        data = _encode(event)
        # Nothing checks a field's type when an event is created, so it is checked here, before anybody
        # accepts what no handler could ever read.
        decoder.decode(data)
    except MemoryError:
        raise
    except Exception as error:
        failed = error
    if failed is not None:
        raise UsageError(
            "UL1013",
            f"the fields of {cls.__qualname__} do not have values of their types",
            found=_what_is_wrong(failed, cls),
            fix="give each field a value of its declared type; nothing was published",
        )
    if len(data) > MAX_EVENT_BYTES:
        raise UsageError(
            "UL1012",
            f"the data of one event have at most {MAX_EVENT_BYTES} bytes",
            found=f"{len(data)} bytes in {cls.__qualname__}",
            fix="store the large part elsewhere and let the event name the place",
        )
    return data


def decode_data(envelope: Envelope, cls: type[E]) -> E:
    """The typed event in an envelope; unknown fields are ignored.

    Raises `Undecodable`: UL5004 when the data do not fit `cls`, UL5005 when they are too large,
    UL5006 when they are no JSON. The text never shows the value of a `Sensitive` field.
    """
    data = envelope.data
    if data is None:
        raise Undecodable(
            "UL5004",
            f"{envelope.type} has no data",
            found=f"event {envelope.id}",
            fix="a message without a value (a tombstone) is no event of this type; correct the publisher",
        )
    if len(data) > MAX_EVENT_BYTES:
        raise Undecodable("UL5005", f"the data are larger than {MAX_EVENT_BYTES} bytes", found=f"{len(data)} bytes")
    kind = envelope.datacontenttype
    if kind != "application/json" and not is_json(kind):
        raise Undecodable("UL5006", "the data of an event are JSON", found=f"datacontenttype {kind!r}"[:300])
    decoder = _decoders.get(cls) or decoder_of(cls)
    failed: Exception
    try:
        event: E = decoder.decode(data)
        return event
    except MemoryError:
        raise
    except Exception as error:
        failed = error
    # Raised outside the `except`, so that the original error, which may quote data, is not its context.
    raise Undecodable(
        "UL5004",
        f"the data of {envelope.type} do not fit {cls.__qualname__}",
        found=_what_is_wrong(failed, cls),
        fix="correct the class or its publisher, then redrive the event from the shelf",
    )


def try_decode(data: bytes | None, cls: type[E]) -> E | None:
    """The event in plain JSON data; None where `decode_data` has to say what is wrong.

    >>> try_decode(b"no JSON", Event) is None
    True
    """
    try:
        return (_decoders.get(cls) or decoder_of(cls)).decode(data)  # type: ignore[arg-type,no-any-return]
    except MemoryError:
        raise
    except Exception:
        return None


def is_json(content_type: str | None) -> bool:
    """Whether data of this content type are JSON; none said counts as JSON."""
    if content_type is None:
        return True
    kind = content_type.partition(";")[0].strip().lower()
    return kind.endswith(("/json", "+json"))


def _what_is_wrong(error: Exception, cls: type[Event]) -> str:
    if isinstance(error, RecursionError):
        return "the data are nested too deeply"
    text = str(error)
    hidden = sensitive_fields(cls)
    if hidden:
        names = dict(zip(cls.__struct_encode_fields__, cls.__struct_fields__, strict=True))  # type: ignore[attr-defined]
        place = _PLACE.search(text)
        field = place.group(1) if place else ""
        # An error of the user's own checks names no field, and may quote any.
        if names.get(field, field) in hidden:
            return f"a value that is not valid - at `$.{field}`"
        if (not field and not isinstance(error, msgspec.DecodeError)) or error.__cause__ is not None:
            return f"{type(error.__cause__ or error).__name__} in a class with sensitive fields"
    return text[:500] if isinstance(error, msgspec.MsgspecError) else f"{type(error).__name__}: {text}"[:500]
