"""How event classes become data and are read again. The one place that knows what library a class is made with."""

from __future__ import annotations

import re
import typing
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from unlost.events.model import Event

_encode = msgspec.json.Encoder().encode
_PLACE = re.compile(r" - at `(?:key in )?`?\$\.?([^.`\[]*)")


class Form:
    """Classes of msgspec; `unlost.pydantic` has a form of its own. Found as `cls.__unlost_form__`."""

    def names(self, cls: type[Event]) -> dict[str, str]:
        """The fields in order, each with the name under which it is sent."""
        fields: tuple[str, ...] = cls.__struct_fields__  # type: ignore[attr-defined]
        sent: tuple[str, ...] = cls.__struct_encode_fields__  # type: ignore[attr-defined]
        return dict(zip(fields, sent, strict=True))

    def hints(self, cls: type[Event]) -> dict[str, Any]:
        """The type of each field, with its marks."""
        return typing.get_type_hints(cls, include_extras=True)

    def reader(self, cls: type[Event]) -> Callable[[bytes], Any]:
        """The function that makes an event of JSON."""
        return msgspec.json.Decoder(cls).decode

    def writer(self, cls: type[Event]) -> Callable[[Event], bytes]:
        """The function that makes JSON of an event."""
        return _encode

    def builtins(self, event: Event) -> dict[str, Any]:
        """The data as they would stand in JSON."""
        data: dict[str, Any] = msgspec.to_builtins(event, str_keys=True)
        return data

    def twin(self, cls: type[Event]) -> type[msgspec.Struct]:
        """A class of msgspec with the same fields, for those who look at types."""
        return cls  # type: ignore[return-value]

    def explain(self, error: Exception, cls: type[Event], hidden: frozenset[str]) -> str:
        """What a reader or writer found wrong, without a value of a field that is hidden."""
        text = str(error)
        if hidden:
            python = {sent: name for name, sent in self.names(cls).items()}
            place = _PLACE.search(text)
            field = place.group(1) if place else ""
            # An error of the user's own checks names no field, and may quote any.
            if python.get(field, field) in hidden:
                return f"a value that is not valid - at `$.{field}`"
            if (not field and not isinstance(error, msgspec.DecodeError)) or error.__cause__ is not None:
                return f"{type(error.__cause__ or error).__name__} in a class with sensitive fields"
        return text[:500] if isinstance(error, msgspec.MsgspecError) else f"{type(error).__name__}: {text}"[:500]


MSGSPEC = Form()
