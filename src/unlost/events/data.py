"""The data of an event: from a typed object to JSON bytes and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from unlost.errors import Undecodable, UsageError
from unlost.events.model import Event, sensitive_fields

if TYPE_CHECKING:
    from unlost.events.envelope import Envelope

MAX_EVENT_BYTES = 4 * 1024 * 1024
"""The largest data of one event. Larger things are stored elsewhere, and the event names the place."""

E = TypeVar("E", bound=Event)

Codec = tuple[Callable[[Any], bytes], Callable[[bytes], Any]]
_codecs: dict[type, Codec] = {}
_first: dict[type, Callable[[bytes], Any]] = {}  # what reads plain data of version 1, for classes of that version


def codec_of(cls: type[Event]) -> Codec:
    """The cached writer and reader of a class; raises `UsageError` UL1016 if its annotations cannot be read as data."""
    codec = _codecs.get(cls)
    if codec is None:
        form = cls.__unlost_form__
        try:
            codec = form.writer(cls), form.reader(cls)
        except Exception as error:
            raise UsageError(
                "UL1016",
                f"the fields of {cls.__qualname__} have types that cannot be data",
                found=f"{type(error).__name__}: {error}",
                fix="use types that JSON can carry, defined where the module of the class can see them",
            ) from error
        _codecs[cls] = codec
        _first[cls] = codec[1] if cls.__unlost__.version == 1 else _older
    return codec


def _older(_data: bytes) -> None:
    """An event older than its class is the catalog's to read."""


def encode_data(event: Event) -> bytes:
    """The data of an event as JSON.

    **Guarantee**: what is returned can be read again by the class of the event.
    Raises `UsageError`: UL1013 when a field has a value that is not of its type, UL1012 when it is too large.
    """
    cls = type(event)
    write, read = _codecs.get(cls) or codec_of(cls)
    failed: Exception | None = None
    try:
        data = write(event)
        # Nothing checks a field's type when an event is created, so it is checked here, before anybody
        # accepts what no handler could ever read.
        read(data)
    except MemoryError:
        raise
    except Exception as error:
        failed = error
    if failed is not None:
        raise UsageError(
            "UL1013",
            f"the fields of {cls.__qualname__} do not have values of their types",
            found=what_is_wrong(failed, cls),
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
    data = json_of(envelope)
    _, read = _codecs.get(cls) or codec_of(cls)
    failed: Exception
    try:
        event: E = read(data)
        return event
    except MemoryError:
        raise
    except Exception as error:
        failed = error
    # Raised outside the `except`, so that the original error, which may quote data, is not its context.
    raise Undecodable(
        "UL5004",
        f"the data of {envelope.type} do not fit {cls.__qualname__}",
        found=what_is_wrong(failed, cls),
        fix="correct the class or its publisher, then redrive the event from the shelf",
    )


def json_of(envelope: Envelope) -> bytes:
    """The data of an envelope, if they are there and said to be JSON.

    Raises `Undecodable`: UL5004 when there are none, UL5005 when they are too large, UL5006 when they are something else.
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
    return data


def try_decode(data: bytes | None, cls: type[E]) -> E | None:
    """The event in plain JSON data of version 1; None where `Catalog.decode` has to say what is wrong, or to bring it up
    to the version of its class.

    >>> try_decode(b"no JSON", Event) is None
    True
    """
    try:
        if cls not in _first:
            codec_of(cls)
        return _first[cls](data)  # type: ignore[arg-type,no-any-return]
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


def what_is_wrong(error: Exception, cls: type[Event]) -> str:
    """What was found where data do not fit a class, without the value of a `Sensitive` field."""
    if isinstance(error, RecursionError):
        return "the data are nested too deeply"
    return cls.__unlost_form__.explain(error, cls, sensitive_fields(cls))
