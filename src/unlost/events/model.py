"""What a user declares: typed facts (`Event`) and orders (`Command`).

The class says everything that must not change by accident: topic, key, wire type, version.
"""

from __future__ import annotations

import enum
import re
import types
import typing
import uuid
from collections.abc import Mapping
from dataclasses import is_dataclass
from datetime import date, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar, dataclass_transform

import msgspec

from unlost.errors import UsageError
from unlost.events.form import MSGSPEC, Form

MAX_NAME = 200
MAX_KEY_BYTES = 4096

_NAME = re.compile(r"[A-Za-z0-9._-]{1,200}", re.ASCII)

T = TypeVar("T")


class _SensitiveMark:
    def __repr__(self) -> str:
        return "sensitive"


SENSITIVE = _SensitiveMark()

Sensitive = Annotated[T, SENSITIVE]
"""Marks a field whose value is shown to nobody but the handler: `email: Sensitive[str]`.

Type checkers know it as `T`. In repr, logs, errors and the command line it reads `***`.
"""


class EventSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a class declared, resolved; found as `cls.__unlost__`. For a command, `topic` is its queue."""

    topic: str | None = None
    key: str | None = None
    type: str = ""
    version: int = 1
    view_of: str | None = None
    past_tense: bool = True
    is_command: bool = False
    abstract: bool = True


def check_name(what: str, name: str) -> str:
    """Returns a topic's, queue's or type's name, or raises `UsageError` UL1001 when it cannot be one."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or not name.strip("."):
        raise UsageError(
            "UL1001",
            f"a {what} is named with 1 to {MAX_NAME} letters, digits, '.', '_' or '-'",
            found=repr(name)[:250],
            fix=f"choose another name for the {what}"
            + (", for example with type='...' on the class" if what == "wire type" else ""),
        )
    if what != "wire type" and name.startswith(("__", "unlost.")):
        raise UsageError(
            "UL1001",
            f"a {what} does not begin with '__' or 'unlost.'; those are kept for unlost itself",
            found=repr(name),
            fix=f"choose another name for the {what}",
        )
    return name


def _topic_of_key(key: str) -> str:
    return key.removesuffix("_id") or key


def resolve(
    name: str,
    bases: list[EventSpec],
    fields: tuple[str, ...],
    said: Mapping[str, Any],
) -> EventSpec:
    """The declaration of a class from its own keywords and those of its bases. Pure."""
    is_command = any(base.is_command for base in bases)
    place, other = ("queue", "topic") if is_command else ("topic", "queue")
    if said[other] is not None:
        raise UsageError(
            "UL1004",
            f"{'a command has a queue' if is_command else 'an event has a topic'}, not a {other}",
            found=f"class {name}({other}={said[other]!r})",
            fix=f"write {place}={said[other]!r}" + ("" if is_command else ", or derive from Command"),
        )
    version = said["version"]
    if type(version) is not int or not 1 <= version < 2**31:
        raise UsageError("UL1004", "version= is a whole number from 1", found=f"class {name}(version={version!r})")
    view_of = said["view_of"] or next((base.view_of for base in bases if base.view_of), None)
    if view_of is not None and said["type"] is not None and said["type"] != view_of:
        raise UsageError(
            "UL1004",
            "a view has the wire type of the event that it reads",
            found=f"class {name}(type={said['type']!r}, view_of={view_of!r})",
            fix="leave type= out",
        )

    key = said["key"] or next((base.key for base in bases if base.key), None)
    if key is not None and fields and key not in fields:
        if view_of is None or said["key"] is not None:
            raise UsageError(
                "UL1002",
                f"the key of {name} is none of its fields",
                found=f"key={key!r}; fields: {', '.join(fields)}",
                fix="name one of the fields as key=, or add the field",
            )
        key = None  # a view reads what it needs, and the key need not be part of it

    topic = said[place] or _inherited_topic(bases, key)
    if topic is None and view_of is not None:
        topic = view_of.rpartition(".")[0] or None
    if topic is None and key is not None and not is_command:
        topic = _topic_of_key(key)
    if topic is None and (fields or key or view_of):
        raise UsageError(
            "UL1003",
            f"{name} has no {place}",
            found=f"fields: {', '.join(fields) or 'none'}",
            fix=f"class {name}(Command, queue='...')"
            if is_command
            else f"class {name}(Event, key='...') with whom it is about, or topic='...' for no order",
        )
    if topic is not None:
        check_name(place, topic)
    wire = view_of or said["type"] or (f"{topic}.{name}" if topic else "")
    if wire:
        check_name("wire type", wire)
    inherited = all(base.past_tense for base in bases)
    return EventSpec(
        topic=topic,
        key=key,
        type=wire,
        version=version,
        view_of=view_of,
        past_tense=inherited if said["past_tense"] is None else bool(said["past_tense"]),
        is_command=is_command,
        abstract=topic is None or (not fields and key is not None),
    )


def _inherited_topic(bases: list[EventSpec], key: str | None) -> str | None:
    """A base's topic; but one that only followed from the base's key gives way to another key."""
    for base in bases:
        if base.topic is None:
            continue
        derived = base.key is not None and base.topic == _topic_of_key(base.key) and not base.view_of
        if not (derived and key is not None and key != base.key):
            return base.topic
    return None


_kin: dict[type, tuple[type, ...]] = {}


def adopt(base: type[Event], cls: type) -> None:
    """Lets a base class made with another library count as derived from `Event` or `Command`."""
    _kin[base] = (*_kin.get(base, ()), cls)


def roots() -> list[type[Event]]:
    """`Event`, and what counts as derived from it."""
    return [Event, *_kin.get(Event, ())]


if TYPE_CHECKING:

    @dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(msgspec.field,))
    class Event:
        """A fact, typed and immutable, named in the past tense.

        Fields are typed, and given by name. The class says the `key` (whom the fact is about: facts with
        one key keep their order) and with it the topic; `type=` keeps the wire type when a class is renamed.
        Raises `UsageError` when the class cannot be an event.

        **Guarantee** two events of one key, published one after the other, are handled in that order by each service.

        Example:
            >>> class OrderPlaced(Event, key="order_id"):  # topic "order", wire type "order.OrderPlaced"
            ...     order_id: str
            ...     total_cents: int
            >>> OrderPlaced(order_id="A1", total_cents=1250)
            OrderPlaced(order_id='A1', total_cents=1250)
        """

        __unlost__: ClassVar[EventSpec]
        __unlost_form__: ClassVar[Form]

        def __init_subclass__(
            cls,
            *,
            key: str | None = None,
            topic: str | None = None,
            type: str | None = None,
            version: int = 1,
            view_of: str | None = None,
            past_tense: bool | None = None,
            rename: str | Mapping[str, str] | None = None,
            omit_defaults: bool = False,
            forbid_unknown_fields: bool = False,
            gc: bool = True,
            cache_hash: bool = False,
        ) -> None: ...

    class Command(Event):
        """An order to do something, to exactly one service; named in the imperative.

        A command waits in a `queue`, first in, first out; with a `key`, each key is a group with an order of its own.

        **Guarantee** one service carries it out; while that service is away, it waits in its queue.

        Example:
            >>> class SendReceipt(Command, queue="receipts", key="customer_id"):
            ...     customer_id: str
            >>> SendReceipt(customer_id="c7")
            SendReceipt(customer_id='c7')
        """

        def __init_subclass__(
            cls,
            *,
            queue: str | None = None,
            key: str | None = None,
            type: str | None = None,
            version: int = 1,
            view_of: str | None = None,
            past_tense: bool | None = None,
            rename: str | Mapping[str, str] | None = None,
            omit_defaults: bool = False,
            forbid_unknown_fields: bool = False,
            gc: bool = True,
            cache_hash: bool = False,
        ) -> None: ...

else:
    _PASSED_ON = {"rename", "omit_defaults", "forbid_unknown_fields", "gc", "cache_hash"}

    class EventMeta(msgspec.StructMeta):
        """Takes the class keywords; StructMeta would refuse them in `__init_subclass__`."""

        def __new__(
            mcls,
            name,
            bases,
            namespace,
            *,
            key=None,
            topic=None,
            queue=None,
            type=None,
            version=1,
            view_of=None,
            past_tense=None,
            **struct,
        ):
            unknown = struct.keys() - _PASSED_ON
            if unknown:
                raise UsageError(
                    "UL1004",
                    f"class {name} has a keyword that is not known",
                    found=", ".join(sorted(unknown)),
                    fix="the keywords are key, topic (a Command: queue), type, version, view_of, past_tense, "
                    + ", ".join(sorted(_PASSED_ON)),
                )
            # frozen and kw_only are not inherited from a Struct's base.
            cls = super().__new__(mcls, name, bases, namespace, frozen=True, kw_only=True, **struct)
            if "__unlost__" not in namespace:
                said = {
                    "key": key,
                    "topic": topic,
                    "queue": queue,
                    "type": type,
                    "version": version,
                    "view_of": view_of,
                    "past_tense": past_tense,
                }
                declared = [base.__unlost__ for base in bases if isinstance(base, EventMeta)]
                cls.__unlost__ = resolve(name, declared, cls.__struct_fields__, said)
            return cls

        def __subclasscheck__(cls, other):
            return super().__subclasscheck__(other) or any(issubclass(other, kin) for kin in _kin.get(cls, ()))

        def __instancecheck__(cls, value):
            return super().__instancecheck__(value) or (cls in _kin and issubclass(type(value), cls))

    class Event(msgspec.Struct, metaclass=EventMeta):
        """A fact, typed and immutable, named in the past tense.

        Fields are typed, and given by name. The class says the `key` (whom the fact is about: facts with
        one key keep their order) and with it the topic; `type=` keeps the wire type when a class is renamed.
        Raises `UsageError` when the class cannot be an event.

        **Guarantee** two events of one key, published one after the other, are handled in that order by each service.

        Example:
            >>> class OrderPlaced(Event, key="order_id"):  # topic "order", wire type "order.OrderPlaced"
            ...     order_id: str
            ...     total_cents: int
            >>> OrderPlaced(order_id="A1", total_cents=1250)
            OrderPlaced(order_id='A1', total_cents=1250)
        """

        __unlost__: ClassVar[EventSpec] = EventSpec()
        __unlost_form__: ClassVar[Form] = MSGSPEC

        def __repr__(self):
            return f"{type(self).__qualname__}({', '.join(f'{k}={v!r}' for k, v in shown_fields(self))})"

        def __rich_repr__(self):
            return iter(shown_fields(self))

    class Command(Event):
        """An order to do something, to exactly one service; named in the imperative.

        A command waits in a `queue`, first in, first out; with a `key`, each key is a group with an order of its own.

        **Guarantee** one service carries it out; while that service is away, it waits in its queue.

        Example:
            >>> class SendReceipt(Command, queue="receipts", key="customer_id"):
            ...     customer_id: str
            >>> SendReceipt(customer_id="c7")
            SendReceipt(customer_id='c7')
        """

        __unlost__: ClassVar[EventSpec] = EventSpec(is_command=True)


# ---- sensitive fields

_sensitive: dict[type, frozenset[str]] = {}


class _Stars:
    def __repr__(self) -> str:
        return "***"


def shown_fields(event: Event) -> list[tuple[str, object]]:
    """Names and values for a repr."""
    hidden = sensitive_fields(type(event))
    fields = event.__unlost_form__.names(type(event))
    return [(name, _Stars() if name in hidden else getattr(event, name)) for name in fields]


def sensitive_fields(cls: type[Event]) -> frozenset[str]:
    """The fields of `cls` that are, or contain, something `Sensitive`.

    When annotations cannot be resolved, every field counts as sensitive: rather too little is shown.
    """
    known = _sensitive.get(cls)
    if known is not None:
        return known
    fields = cls.__unlost_form__.names(cls)
    try:
        hints = cls.__unlost_form__.hints(cls)
    except Exception:
        return frozenset(fields)
    found = _sensitive[cls] = frozenset(name for name in fields if _hides(hints[name], {cls}))
    return found


def _hides(hint: Any, seen: set[Any]) -> bool:
    if typing.get_origin(hint) is Annotated and SENSITIVE in hint.__metadata__:
        return True
    if isinstance(hint, typing.TypeVar | types.NoneType) or hint is Any:
        return False
    if any(_hides(part, seen) for part in typing.get_args(hint)):
        return True
    kind = typing.get_origin(hint) or hint
    if not isinstance(kind, type) or kind in seen:
        return False
    model = getattr(kind, "__pydantic_fields__", None)
    if not (issubclass(kind, msgspec.Struct) or is_dataclass(kind) or hasattr(kind, "__total__") or model):
        return False
    seen.add(kind)
    if any(SENSITIVE in field.metadata for field in (model or {}).values()):  # it resolves the marks of its own
        return True
    try:
        inner = typing.get_type_hints(kind, include_extras=True)
    except Exception:
        return True
    return any(_hides(part, seen) for part in inner.values())


def redacted(event_or_data: Event | Mapping[str, Any], cls: type[Event] | None = None) -> dict[str, Any]:
    """The data of an event as a dict, with `***` in place of what is `Sensitive`.

    redacted({"order_id": "A1", "email": "a@b.c"}, OrderCreated)  # {"order_id": "A1", "email": "***"}
    """
    data: Mapping[str, Any]
    if isinstance(event_or_data, Event):
        cls = cls or type(event_or_data)
        data = event_or_data.__unlost_form__.builtins(event_or_data)
    else:
        data = event_or_data
    if cls is None:
        raise UsageError("UL1008", "redacted() of a dict needs the event class", found="cls is None")
    hidden = sensitive_fields(cls)
    hidden |= {sent for name, sent in cls.__unlost_form__.names(cls).items() if name in hidden}
    return {name: "***" if name in hidden else value for name, value in data.items()}


# ---- the key


def key_of(event: Event) -> bytes | None:
    """The key of an event as bytes, the same on every broker; None if its class declares no key. A command without a key
    has that of its queue: all of them are one group, first in, first out.

    Text is UTF-8, a whole number decimal, an enum its value; UUID, Decimal, date and time are their text.
    Raises `UsageError` UL1006 for an empty key or one above 4 KiB, UL1007 for a value that is no key.
    """
    spec = event.__unlost__
    name = spec.key
    if name is None:
        return spec.topic.encode() if spec.is_command and spec.topic else None
    value = getattr(event, name)
    try:
        key = value.encode() if type(value) is str else _key_bytes(event, name, value)
    except UnicodeEncodeError:
        raise _no_key(event, name, "text that is not valid Unicode") from None
    if not key:
        raise UsageError(
            "UL1006",
            f"the key of {type(event).__name__} is empty",
            found=f"{name} is empty",
            fix="an event is about somebody: give the key a value, or declare topic= and no key",
        )
    if len(key) > MAX_KEY_BYTES:
        raise UsageError("UL1006", f"a key has at most {MAX_KEY_BYTES} bytes", found=f"{name} has {len(key)} bytes")
    return key


def _key_bytes(event: Event, name: str, value: object) -> bytes:
    match value:
        case None:
            return b""
        case enum.Enum():
            return _key_bytes(event, name, value.value)
        case bytes() | bytearray() | memoryview():
            return bytes(value)
        case bool() | float():
            pass
        case str():
            return str.encode(value)
        case datetime():
            return value.isoformat().encode()
        case int() | uuid.UUID() | Decimal() | date():
            return str(value).encode()
        case _:
            pass
    raise _no_key(event, name, f"a value of type {type(value).__name__}")


def _no_key(event: Event, name: str, found: str) -> UsageError:
    return UsageError(
        "UL1007",
        f"{type(event).__name__}.{name} cannot be a key",
        found=found,
        fix="a key is str, int, bytes, UUID, an enum, Decimal, date or datetime",
    )
