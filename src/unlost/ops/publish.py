"""Publishing by hand: classes by name, fields from text, lines of JSON."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec

from unlost.errors import UsageError
from unlost.events import Envelope, Event, check_publishable, redacted, seal, sensitive_fields
from unlost.events.data import codec_of, what_is_wrong
from unlost.events.model import roots

LINE_BYTES_MAX = 16 * 1024 * 1024
_MEMBERS = ("type", "data", "id", "time", "headers")


def event_classes() -> list[type[Event]]:
    """Every event class that has been imported, views too."""
    found: dict[type[Event], None] = {}
    todo = roots()
    while todo:
        for cls in todo.pop().__subclasses__():
            if cls not in found:
                found[cls] = None
                todo.append(cls)
    return [cls for cls in found if not cls.__unlost__.abstract]


def find_class(name: str) -> type[Event]:
    """The class that is published under a wire type or a class name.

    Raises:
        UsageError: none has it, or several do.
    """
    classes = [cls for cls in event_classes() if cls.__unlost__.view_of is None]
    found = [cls for cls in classes if cls.__unlost__.type == name] or [cls for cls in classes if cls.__name__ == name]
    if len(found) == 1:
        check_publishable(found[0])
        codec_of(found[0])
        return found[0]
    types = sorted({cls.__unlost__.type for cls in found or classes})
    if found:
        raise UsageError(
            "UL1321", f"several classes are named {name}", found=", ".join(f"{c.__module__}.{c.__qualname__}" for c in found),
            fix=f"say which by its wire type: {', '.join(types)}" if len(types) > 1 else "give each its own type=",
        )  # fmt: skip
    near = difflib.get_close_matches(name, [*types, *(c.__name__ for c in classes)], n=3)
    raise UsageError(
        "UL1322", f"your code has no event {name!r}", found=f"it has {', '.join(types[:12]) or 'no events'}",
        fix=f"did you mean {' or '.join(near)}?" if near else "",
    )  # fmt: skip


def split_fields(cls: type[Event], texts: Sequence[str]) -> tuple[dict[str, str], str | None]:
    """`field=value` texts, and the event's id if `id=` is given and the class has no such field."""
    fields: dict[str, str] = {}
    names = _names(cls)
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(
                "UL1323", "a field is given as field=value", found=repr(text)[:100], fix=f"fields of {cls.__name__}: {_list(cls)}"
            )  # fmt: skip
        if name not in names and name != "id":
            near = difflib.get_close_matches(name, list(names), n=1)
            raise UsageError(
                "UL1324", f"{cls.__name__} has no field {name!r}", found=f"it has {_list(cls)}",
                fix=f"did you mean {near[0]}?" if near else "",
            )  # fmt: skip
        if name in fields:
            raise UsageError("UL1323", f"the field {name} is given twice")
        fields[name] = value
    id = None if "id" in names else fields.pop("id", None)
    return fields, id


def build(cls: type[Event], fields: Mapping[str, str]) -> Event:
    """An event from texts, each converted by the type of its field: JSON where the type is not plain.

    Raises:
        UsageError: a field is missing, or its text is not of its type.
    """
    twin = cls.__unlost_form__.twin(cls)
    hints = typing.get_type_hints(twin, include_extras=True)
    values = {}
    for given, text in fields.items():
        name = _names(cls)[given]
        values[name] = _convert(cls, name, text, hints[name])
    missing = [f.name for f in msgspec.structs.fields(twin) if f.required and f.name not in values]
    if missing:
        raise UsageError(
            "UL1325", f"{cls.__name__} needs {', '.join(missing)}", found=f"given: {', '.join(fields) or 'nothing'}",
            fix=" ".join(f"{name}=..." for name in missing),
        )  # fmt: skip
    names = cls.__unlost_form__.names(cls)
    return _typed(cls, {names[name]: msgspec.to_builtins(value, str_keys=True) for name, value in values.items()})


def _convert(cls: type[Event], name: str, text: str, hint: Any) -> Any:
    problem = ""
    try:
        return msgspec.convert(text, hint, strict=False)
    except msgspec.ValidationError as e:
        problem = str(e)
    try:
        return msgspec.json.decode(text, type=hint)
    except msgspec.ValidationError as e:
        problem = str(e) if text.startswith(("[", "{")) else problem
    except (msgspec.MsgspecError, RecursionError, UnicodeEncodeError):
        pass  # the first problem says more
    if name in sensitive_fields(cls):
        raise UsageError("UL1326", f"the value of {name} is not valid")
    raise UsageError("UL1326", f"the value of {name} is not valid", found=f"{problem}: {text[:80]!r}")


def read_line(raw: bytes, cls: type[Event] | None, *, source: str, now: int) -> Envelope:
    """An envelope from one line: `{"type": ..., "data": {...}}`, or the bare data where the class is known.

    `id`, `time` and `headers` may stand beside `type`: whoever gives ids may send the same lines again.

    Raises:
        UsageError: it is no such line.
    """
    try:
        line = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as e:
        raise UsageError("UL1327", "a line is one JSON object", found=str(e)[:200]) from None
    if not isinstance(line, dict):
        raise UsageError("UL1327", "a line is one JSON object", found=f"a {type(line).__name__}")
    if cls is not None:
        return seal(_typed(cls, line), source=source, now=now)
    unknown = sorted(set(line) - set(_MEMBERS))
    if unknown or not isinstance(line.get("type"), str) or "data" not in line:
        raise UsageError(
            "UL1328", 'a line is {"type": ..., "data": {...}}, with id, time and headers if you like',
            found=f"unknown: {', '.join(unknown)[:200]}" if unknown else f"members: {', '.join(line)[:200] or 'none'}",
            fix="for lines that are bare data, name the type: unlost publish TYPE -",
        )  # fmt: skip
    try:
        rest = msgspec.convert({k: line[k] for k in ("id", "time", "headers") if line.get(k) is not None}, _Rest)
    except msgspec.ValidationError as e:
        raise UsageError("UL1328", "id is text, time is RFC 3339, headers are texts", found=str(e)) from None
    event = _typed(find_class(line["type"]), line["data"])
    return seal(event, source=source, id=rest.id, occurred_at=rest.time, headers=rest.headers, now=now)


class _Rest(msgspec.Struct):
    id: str | None = None
    time: datetime | None = None
    headers: dict[str, str] | None = None


def _typed(cls: type[Event], data: object) -> Event:
    names = set(cls.__unlost_form__.names(cls).values())
    if isinstance(data, dict) and (unknown := sorted(set(data) - names)):
        raise UsageError(
            "UL1324", f"{cls.__name__} has no field {unknown[0]!r}", found=f"it has {_list(cls)}"
        )  # a misspelt name would be dropped in silence
    problem = ""
    try:
        event: Event = codec_of(cls)[1](msgspec.json.encode(data))
        return event
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError) as e:
        problem = what_is_wrong(e, cls)
    raise UsageError("UL1326", f"the data do not fit {cls.__name__}", found=problem)


def shown_data(envelope: Envelope) -> dict[str, Any] | None:
    """The data of an event for people, or None where your code has no class for it.

    A field is shown when a class that has been imported has it and no class says that it is `Sensitive`.
    """
    shown = shown_fields(envelope.type)
    if shown is None or envelope.data is None:
        return None
    try:
        data = msgspec.json.decode(envelope.data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None
    if not isinstance(data, dict):
        return None
    return {name: value if name in shown else "***" for name, value in data.items()}


def shown_fields(type: str) -> frozenset[str] | None:
    """The fields of this wire type that may be seen: a class that has been imported has them, and none says that they
    are `Sensitive`. None: your code has no class for it.

    >>> shown_fields("nobody.KnowsThis") is None
    True
    """
    classes = [cls for cls in event_classes() if cls.__unlost__.type == type]
    if not classes:
        return None
    known: set[str] = set()
    hidden: set[str] = set()
    for cls in classes:
        wire = list(cls.__unlost_form__.names(cls).values())
        known.update(wire)
        hidden.update(name for name, value in redacted(dict.fromkeys(wire, ""), cls).items() if value == "***")
    return frozenset(known - hidden)


def _names(cls: type[Event]) -> dict[str, str]:
    """Python names and wire names -> Python name."""
    names = cls.__unlost_form__.names(cls)
    return {sent: name for name, sent in names.items()} | {name: name for name in names}


def _list(cls: type[Event]) -> str:
    return ", ".join(_listed(cls)) or "no fields"


def _listed(cls: type[Event]) -> Iterator[str]:
    for f in msgspec.structs.fields(cls.__unlost_form__.twin(cls)):
        yield f.encode_name if f.required else f"[{f.encode_name}]"
