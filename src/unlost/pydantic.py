"""Events for teams whose models are pydantic: everything that works with `unlost.Event` works with these."""

from __future__ import annotations

import functools
import operator
import types
import typing
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, dataclass_transform

import msgspec

from unlost import events
from unlost.errors import UsageError
from unlost.events.form import Form
from unlost.events.model import EventSpec, adopt, resolve, shown_fields

try:
    import pydantic
except ImportError as error:
    raise UsageError(
        "UL1377", "unlost.pydantic needs pydantic", found=str(error), fix='pip install "unlost[pydantic]"'
    ) from None

__all__ = ["Command", "Event"]

_FIXED = {"frozen": True, "hide_input_in_errors": True}
_SAID = ("key", "topic", "queue", "type", "version", "view_of", "past_tense")
_LIMITS = ("ge", "gt", "le", "lt", "multiple_of", "min_length", "max_length", "pattern")
_OWN_TEXT = ("value_error", "assertion_error")


class PydanticForm(Form):
    """Read by pydantic; written by msgspec, so that the bytes are those of the same event as an `unlost.Event`."""

    def names(self, cls: type[Any]) -> dict[str, str]:
        return {name: field.serialization_alias or name for name, field in cls.__pydantic_fields__.items()}

    def hints(self, cls: type[Any]) -> dict[str, Any]:
        if not cls.__pydantic_fields_complete__:
            cls.model_rebuild()
        return {name: _hint(field) for name, field in cls.__pydantic_fields__.items()}

    def reader(self, cls: type[Any]) -> Callable[[bytes], Any]:
        if not cls.__pydantic_complete__:
            cls.model_rebuild()
        read: Callable[[bytes], Any] = cls.__pydantic_validator__.validate_json
        return read

    def writer(self, cls: type[Any]) -> Callable[[Any], bytes]:
        to_python = cls.__pydantic_serializer__.to_python
        encode = msgspec.json.Encoder(enc_hook=_other).encode
        return lambda event: encode(to_python(event, by_alias=True))

    def builtins(self, event: Any) -> dict[str, Any]:
        data: dict[str, Any] = msgspec.to_builtins(event.model_dump(by_alias=True), str_keys=True, enc_hook=_other)
        return data

    def twin(self, cls: type[Any]) -> type[msgspec.Struct]:
        twin: type[msgspec.Struct] = _twin(cls)
        return twin

    def explain(self, error: Exception, cls: type[Any], hidden: frozenset[str]) -> str:
        if not isinstance(error, pydantic.ValidationError):
            return f"{type(error).__name__} in a class with sensitive fields" if hidden else _line(error)
        sent = self.names(cls)
        names = hidden | {sent[name] for name in hidden}
        said = []
        for found in error.errors(include_url=False, include_context=False, include_input=False):
            place = ".".join(map(str, found["loc"]))
            text = found["msg"]
            if found["loc"] and found["loc"][0] in names:
                place, text = str(found["loc"][0]), "a value that is not valid"
            elif hidden and found["type"] in _OWN_TEXT:  # a check of the user's own may quote any field
                text = "a check of the class refuses it"
            elif found["type"] == "union_tag_invalid":  # the one text of pydantic that quotes what was given
                text = "Input tag is none of those that are expected"
            said.append(f"{text} - at `$.{place}`" if place else text)
        return "; ".join(said)[:500]


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def _other(value: object) -> Any:
    """What msgspec cannot write and pydantic can, such as a URL."""
    if isinstance(value, pydantic.SecretStr | pydantic.SecretBytes | pydantic.Secret):
        raise TypeError(f"{type(value).__name__} is sent as stars; the type of such a field is Sensitive[str]")
    if isinstance(value, pydantic.BaseModel):
        return value.model_dump(by_alias=True)
    from pydantic_core import to_jsonable_python

    return to_jsonable_python(value)


if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass

    @dataclass_transform(
        frozen_default=True, kw_only_default=True, field_specifiers=(pydantic.Field, pydantic.PrivateAttr)
    )
    class _Frozen(ModelMetaclass): ...

    class Event(pydantic.BaseModel, events.Event, metaclass=_Frozen):
        """A fact as a pydantic model: immutable, named in the past tense, with the keywords of `unlost.Event`.

        Its constraints are checked when it is made and when it is read; fields that it does not know are ignored when it
        is read, so that an older reader meets newer events. Where a type is nothing to msgspec (an `EmailStr`, say),
        `unlost event check` knows that the field is there and not what may be in it.

        **Guarantee** the bytes of an event are those of the same fields in an `unlost.Event`.

        Raises:
            UsageError: UL1001 to UL1004, the class cannot be an event; UL1378, it could be changed or would show values.
            pydantic.ValidationError: the values are not valid; the error does not show them.

        Example:
            >>> class OrderPlaced(Event, key="order_id"):
            ...     order_id: str
            ...     total_cents: pydantic.NonNegativeInt
            >>> OrderPlaced.__unlost__.type
            'order.OrderPlaced'
        """

        def __init_subclass__(
            cls,
            *,
            key: str | None = None,
            topic: str | None = None,
            type: str | None = None,
            version: int = 1,
            view_of: str | None = None,
            past_tense: bool | None = None,
        ) -> None: ...

    class Command(Event, events.Command):
        """An order to do something, to exactly one service; otherwise as `Event` here and `unlost.Command`."""

        def __init_subclass__(
            cls,
            *,
            queue: str | None = None,
            key: str | None = None,
            type: str | None = None,
            version: int = 1,
            view_of: str | None = None,
            past_tense: bool | None = None,
        ) -> None: ...

else:

    class Event(pydantic.BaseModel):
        """A fact as a pydantic model: immutable, named in the past tense, with the keywords of `unlost.Event`.

        Its constraints are checked when it is made and when it is read; fields that it does not know are ignored when it
        is read, so that an older reader meets newer events. Where a type is nothing to msgspec (an `EmailStr`, say),
        `unlost event check` knows that the field is there and not what may be in it.

        **Guarantee** the bytes of an event are those of the same fields in an `unlost.Event`.

        Raises:
            UsageError: UL1001 to UL1004, the class cannot be an event; UL1378, it could be changed or would show values.
            pydantic.ValidationError: the values are not valid; the error does not show them.

        Example:
            >>> class OrderPlaced(Event, key="order_id"):
            ...     order_id: str
            ...     total_cents: pydantic.NonNegativeInt
            >>> OrderPlaced.__unlost__.type
            'order.OrderPlaced'
        """

        model_config = pydantic.ConfigDict(
            **_FIXED, extra="ignore", validate_by_name=True, validate_by_alias=True, val_json_bytes="base64"
        )
        __unlost__: ClassVar[EventSpec] = EventSpec()
        __unlost_form__: ClassVar[Form] = PydanticForm()

        def __init_subclass__(cls, **said):
            """The keywords are taken when pydantic has found the fields."""

        @classmethod
        def __pydantic_init_subclass__(cls, **said):
            unknown = said.keys() - set(_SAID)
            if unknown:
                raise UsageError(
                    "UL1004", f"class {cls.__name__} has a keyword that is not known", found=", ".join(sorted(unknown)),
                    fix=f"the keywords are {', '.join(_SAID)} (topic for an Event, queue for a Command) and those of pydantic",
                )  # fmt: skip
            loose = [name for name, value in _FIXED.items() if cls.model_config.get(name) is not value]
            if loose:
                raise UsageError(
                    "UL1378", "an event cannot be changed, and its errors show no values",
                    found=f"model_config of {cls.__name__}: {', '.join(f'{n}={cls.model_config.get(n)}' for n in loose)}",
                    fix=f"leave {' and '.join(loose)} out of it",
                )  # fmt: skip
            if "__unlost__" not in cls.__dict__:
                declared = [base.__unlost__ for base in cls.__bases__ if hasattr(base, "__unlost__")]
                given = {name: said.get(name) for name in _SAID} | {"version": said.get("version", 1)}
                cls.__unlost__ = resolve(cls.__name__, declared, tuple(cls.__pydantic_fields__), given)

        def __repr_args__(self):
            return shown_fields(self)

    class Command(Event):
        """An order to do something, to exactly one service; otherwise as `Event` here and `unlost.Command`."""

        __unlost__: ClassVar[EventSpec] = EventSpec(is_command=True)

    adopt(events.Event, Event)
    adopt(events.Command, Command)


# ---- the same fields in a class of msgspec

_twins: dict[type, Any] = {}


def _twin(cls: type[Any]) -> Any:
    if cls not in _twins:
        _twins[cls] = Any  # for a model inside itself
        fields = []
        for name, field in cls.__pydantic_fields__.items():
            default = {} if field.is_required() else {"default_factory": _nothing}
            sent = field.serialization_alias or name
            fields.append((name, _readable(_plain(_hint(field))), msgspec.field(name=sent, **default)))
        closed = cls.model_config.get("extra") == "forbid"
        _twins[cls] = msgspec.defstruct(cls.__name__, fields, kw_only=True, forbid_unknown_fields=closed)
    return _twins[cls]


def _nothing() -> Any:
    return msgspec.UNSET  # what is not given stays away


def _hint(field: Any) -> Any:
    return functools.reduce(lambda hint, mark: Annotated[hint, mark], field.metadata, field.annotation)


def _plain(hint: Any) -> Any:
    """A type as msgspec has it; limits that pydantic says in its own way are said in its."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _limited(_plain(parts[0]), hint.__metadata__)
    if origin in (typing.Union, types.UnionType):
        return functools.reduce(operator.or_, map(_plain, parts))
    if origin is not None and origin is not typing.Literal and parts:
        try:
            return origin[tuple(part if part is ... else _plain(part) for part in parts)]
        except TypeError:
            return Any
    if isinstance(hint, type) and issubclass(hint, pydantic.BaseModel):
        return _twin(hint)
    return hint


def _limited(inner: Any, marks: tuple[Any, ...]) -> Any:
    limits: dict[str, Any] = {}
    for mark in marks:
        for part in getattr(mark, "metadata", [mark]):  # those of a `Field(...)` are in it
            said = {name: getattr(part, name, None) for name in _LIMITS}
            limits |= {name: value for name, value in said.items() if isinstance(value, int | float | str)}
    try:
        limited = Annotated[inner, msgspec.Meta(**limits)]
        msgspec.inspect.type_info(limited)
    except (TypeError, ValueError):
        return inner  # limits of another kind, on a Decimal say
    return limited


def _readable(hint: Any) -> Any:
    try:
        msgspec.json.Decoder(hint)
    except Exception:
        return Any  # nothing is known of it here
    return hint
