"""What the data of an event look like on the wire, as plain data, and whether one look can be read as another. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_origin

import msgspec
from msgspec import inspect
from msgspec.structs import StructConfig

from unlost.events import Event, sensitive_fields


class Limited(
    msgspec.Struct, frozen=True, tag_field="kind", tag="limited", omit_defaults=True, forbid_unknown_fields=True
):
    """A plain type, narrowed. `of` is one of the names of `PLAIN`."""

    of: str
    ge: int | float | None = None
    gt: int | float | None = None
    le: int | float | None = None
    lt: int | float | None = None
    multiple_of: int | float | None = None
    min_length: int | None = None
    max_length: int | None = None
    pattern: str | None = None
    tz: bool | None = None


class OneOf(msgspec.Struct, frozen=True, tag_field="kind", tag="one of", forbid_unknown_fields=True):
    """An enum or a Literal: its values as they are sent."""

    values: list[int | str]


class Items(msgspec.Struct, frozen=True, tag_field="kind", tag="list", omit_defaults=True, forbid_unknown_fields=True):
    """A list, a set or a tuple of any length: all are lists on the wire."""

    items: Shape
    min_length: int | None = None
    max_length: int | None = None


class Fixed(msgspec.Struct, frozen=True, tag_field="kind", tag="tuple", forbid_unknown_fields=True):
    items: list[Shape]


class Map(msgspec.Struct, frozen=True, tag_field="kind", tag="map", omit_defaults=True, forbid_unknown_fields=True):
    keys: Shape
    values: Shape
    min_length: int | None = None
    max_length: int | None = None


class AnyOf(msgspec.Struct, frozen=True, tag_field="kind", tag="any of", forbid_unknown_fields=True):
    types: list[Shape]


class Again(msgspec.Struct, frozen=True, tag_field="kind", tag="again", forbid_unknown_fields=True):
    """An object inside itself: the one so many levels further out."""

    levels: int


class Field(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """`omitted`: it may be left out when it is sent. `added_later`: events from before it may be in the log.
    `gone`: the class no longer has it, but events that do may be in the log."""

    type: Shape
    required: bool
    sensitive: bool = False
    omitted: bool = False
    added_later: bool = False
    gone: bool = False


class Object(
    msgspec.Struct, frozen=True, tag_field="kind", tag="object", omit_defaults=True, forbid_unknown_fields=True
):
    """Named fields. `closed`: its reader refuses fields that it does not know."""

    fields: dict[str, Field]
    closed: bool = False
    tag: dict[str, int | str] | None = None


Shape = str | Limited | OneOf | Items | Fixed | Map | AnyOf | Again | Object

PLAIN: dict[Any, str] = {
    inspect.AnyType: "any", inspect.RawType: "any", inspect.NoneType: "none", inspect.BoolType: "bool",
    inspect.IntType: "int", inspect.FloatType: "float", inspect.StrType: "str", inspect.BytesType: "bytes",
    inspect.ByteArrayType: "bytes", inspect.MemoryViewType: "bytes", inspect.DateTimeType: "datetime",
    inspect.DateType: "date", inspect.TimeType: "time", inspect.TimeDeltaType: "timedelta", inspect.UUIDType: "uuid",
    inspect.DecimalType: "decimal",
}  # fmt: skip
# What else a reader takes and understands: 1 as a float, a time as its text.
_READS = {
    "float": {"int"},
    "decimal": {"int", "float"},
    "str": {"datetime", "date", "time", "timedelta", "uuid", "decimal"},
}
_LIMITS = ("ge", "gt", "le", "lt", "multiple_of", "min_length", "max_length", "pattern", "tz")


# ---- from a class


def object_of(cls: type[Event]) -> Object:
    """The fields of an event class, by the names under which they are sent."""
    form = cls.__unlost_form__
    shape = shape_of(inspect.type_info(form.twin(cls)))
    assert isinstance(shape, Object)
    hidden = sensitive_fields(cls)
    fields = {
        sent: msgspec.structs.replace(shape.fields[sent], sensitive=name in hidden)
        for name, sent in form.names(cls).items()
    }
    return msgspec.structs.replace(shape, fields=fields)


def shape_of(info: inspect.Type, within: tuple[type, ...] = ()) -> Shape:
    """One type as data; `within` are the objects that it is in."""
    match info:
        case inspect.Metadata():
            return shape_of(info.type, within)
        case inspect.UnionType():
            return _union([shape_of(part, within) for part in info.types])
        case inspect.EnumType():
            return OneOf(_sorted({member.value for member in info.cls}))
        case inspect.LiteralType():
            values = _sorted({v for v in info.values if v is not None})
            parts: list[Shape] = [OneOf(values)] if values else []
            return _union([*parts, "none"] if None in info.values else parts)
        case inspect.TupleType():
            return Fixed([shape_of(part, within) for part in info.item_types])
        case inspect.NamedTupleType():
            return Fixed([shape_of(field.type, within) for field in info.fields])
        case inspect.StructType() | inspect.DataclassType() | inspect.TypedDictType():
            return _object(info, within)
    if isinstance(info, inspect.CollectionType):
        return Items(shape_of(info.item_type, within), info.min_length, info.max_length)
    if hasattr(info, "key_type"):  # a dict, frozen or not
        some: Any = info
        keys, values_of = shape_of(some.key_type, within), shape_of(some.value_type, within)
        return Map(keys, values_of, some.min_length, some.max_length)
    of = PLAIN.get(type(info), "any")  # a type of the user's own: nothing is known of it
    limits = {name: value for name in _LIMITS if (value := getattr(info, name, None)) is not None}
    if of == "int":  # one way to say the same
        if "gt" in limits:
            limits["ge"] = max(limits.pop("gt") + 1, limits.get("ge", float("-inf")))
        if "lt" in limits:
            limits["le"] = min(limits.pop("lt") - 1, limits.get("le", float("inf")))
    return Limited(of, **limits) if limits else of


def _object(info: Any, within: tuple[type, ...]) -> Shape:
    in_a_list = getattr(info, "array_like", False)
    if info.cls in within:
        around = within[within.index(info.cls) :]
        return "any" if in_a_list else Again(sum(not _in_a_list(cls) for cls in around))
    inner = (*within, info.cls)
    if in_a_list:
        return Fixed([shape_of(field.type, inner) for field in info.fields])
    config = _config(info.cls)
    omits = config is not None and config.omit_defaults
    fields = {}
    for field in info.fields:
        unset = (
            field.default is msgspec.NODEFAULT and field.default_factory is msgspec.NODEFAULT
        )  # UNSET, or a key less
        fields[field.encode_name] = Field(
            type=shape_of(field.type, inner),
            required=field.required,
            omitted=not field.required and (omits or unset),
        )
    tag = getattr(info, "tag", None)
    return Object(fields, getattr(info, "forbid_unknown_fields", False), None if tag is None else {info.tag_field: tag})


def _in_a_list(cls: Any) -> bool:
    config = _config(cls)
    return config is not None and config.array_like


def _config(cls: Any) -> StructConfig | None:
    return getattr(get_origin(cls) or cls, "__struct_config__", None)  # `Page[int]` hides it


def _union(parts: Sequence[Shape]) -> Shape:
    flat = [inner for part in parts for inner in (part.types if isinstance(part, AnyOf) else [part])]
    if len(flat) == 1:
        return flat[0]
    return AnyOf(sorted(flat, key=lambda part: (part == "none", msgspec.json.encode(part))))


def _sorted(values: set[Any]) -> list[int | str]:
    return sorted(values, key=lambda value: (isinstance(value, str), value))


# ---- for people


def shown(shape: Shape) -> str:
    """
    >>> shown(AnyOf(["str", "none"]))
    'str | None'
    """
    match shape:
        case str():
            return "None" if shape == "none" else shape
        case Limited():
            said = {name: value for name in _LIMITS if (value := getattr(shape, name)) is not None}
            return f"{shape.of}({', '.join(f'{name}={value}' for name, value in said.items())})"
        case OneOf():
            return " | ".join(msgspec.json.encode(value).decode() for value in shape.values)
        case Items():
            return f"list[{shown(shape.items)}]{_length(shape)}"
        case Fixed():
            return f"tuple[{', '.join(map(shown, shape.items))}]"
        case Map():
            return f"dict[{shown(shape.keys)}, {shown(shape.values)}]{_length(shape)}"
        case AnyOf():
            return " | ".join(map(shown, shape.types))
        case Again():
            return "itself"
        case Object():
            return "{" + ", ".join(f"{n}: {shown(f.type)}" for n, f in sorted(shape.fields.items()) if not f.gone) + "}"


def _length(shape: Items | Map) -> str:
    said = {"min_length": shape.min_length, "max_length": shape.max_length}
    text = ", ".join(f"{name}={value}" for name, value in said.items() if value is not None)
    return f"({text})" if text else ""


# ---- reading one as another


class Problem(msgspec.Struct, frozen=True):
    """Why data cannot be read. `path` is the place within the data, `field` the field that it begins with."""

    path: str
    kind: Literal["missing", "type", "unknown"]
    reads: str = ""
    written: str = ""

    @property
    def field(self) -> str:
        return self.path.partition(".")[0].partition("[")[0]


def problems(reader: Object, writer: Object, *, history: bool = False) -> list[Problem]:
    """What of the data that `writer` may write `reader` cannot read.

    `history`: the log may hold events that are older than the defaults of `writer`, without those fields.

    Example:
        >>> one = Object({"n": Field("int", True)})
        >>> problems(Object({"n": Field("float", True)}), one), [p.kind for p in problems(one, Object({}))]
        ([], ['missing'])
    """
    return list(dict.fromkeys(_compare(reader, writer, "", (), (), history, frozenset())))


_Stack = tuple[Object, ...]


def _compare(
    r: Shape, w: Shape, path: str, rs: _Stack, ws: _Stack, history: bool, seen: frozenset[tuple[int, int]]
) -> Iterator[Problem]:
    """`rs` and `ws` are the objects around, for those that are in themselves; pairs in `seen` are being compared."""
    if isinstance(r, Again):
        rs, r = rs[: -r.levels], rs[-r.levels]
    if isinstance(w, Again):
        ws, w = ws[: -w.levels], ws[-w.levels]
    if r == "any":
        return

    def inner(r: Shape, w: Shape, path: str = path) -> Iterator[Problem]:
        return _compare(r, w, path, rs, ws, history, seen)

    match r, w:
        case _, AnyOf():
            for part in w.types:
                yield from inner(r, part)
        case OneOf(), OneOf():
            unknown = [value for value in w.values if value not in r.values]
            if unknown:
                yield Problem(path, "type", shown(r), shown(OneOf(unknown)))
        case AnyOf(), OneOf() if len(w.values) > 1:
            for value in w.values:
                yield from inner(r, OneOf([value]))
        case AnyOf(), _:
            tried = [(part, list(inner(part, w))) for part in r.types]
            if all(found for _, found in tried):
                alike = [found for part, found in tried if type(part) is type(w) and not isinstance(w, str)]
                yield from alike[0] if len(alike) == 1 else [Problem(path, "type", shown(r), shown(w))]
        case Object(), Object():
            if (id(r), id(w)) not in seen:
                yield from _compare_objects(r, w, path, (*rs, r), (*ws, w), history, seen | {(id(r), id(w))})
        case Map(), Object():
            yield from inner(r.keys, OneOf(sorted([*w.fields, *(w.tag or ())])), f"{path}.keys")
            for tag in (w.tag or {}).values():
                yield from inner(r.values, OneOf([tag]), path)
            for name, field in w.fields.items():
                yield from _compare(r.values, field.type, _join(path, name), rs, (*ws, w), history, seen)
        case Map(), Map() if _holds(r, w):
            if r.keys != "str":
                yield from inner(r.keys, w.keys, f"{path}.keys")
            yield from inner(r.values, w.values, f"{path}[]")
        case Items(), Items() if _holds(r, w):
            yield from inner(r.items, w.items, f"{path}[]")
        case Items(), Fixed() if _holds(r, Items("any", len(w.items), len(w.items))):
            for n, item in enumerate(w.items):
                yield from inner(r.items, item, f"{path}[{n}]")
        case Fixed(), Fixed() if len(r.items) == len(w.items):
            for n, (mine, other) in enumerate(zip(r.items, w.items, strict=True)):
                yield from inner(mine, other, f"{path}[{n}]")
        case _ if not _reads_plain(r, w):
            yield Problem(path, "type", shown(r), shown(w))


def _compare_objects(
    r: Object, w: Object, path: str, rs: _Stack, ws: _Stack, history: bool, seen: frozenset[tuple[int, int]]
) -> Iterator[Problem]:
    if r.tag is not None and r.tag != w.tag:
        yield Problem(
            path, "type", f"an object tagged {r.tag}", f"one tagged {w.tag}" if w.tag else "one without a tag"
        )
    known = {name: field for name, field in r.fields.items() if not field.gone}
    for name, mine in known.items():
        other = w.fields.get(name)
        lacks = other is None or other.omitted or other.added_later or other.gone or (history and not other.required)
        if mine.required and lacks:
            yield Problem(_join(path, name), "missing", shown(mine.type))
        if other is not None:
            yield from _compare(mine.type, other.type, _join(path, name), rs, ws, history, seen)
    if r.closed:
        if r.tag is None:
            yield from (Problem(_join(path, name), "unknown") for name in w.tag or ())
        for name in sorted(w.fields.keys() - known.keys()):
            if not (w.fields[name].gone and w.closed):
                yield Problem(_join(path, name), "unknown")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _reads_plain(r: Shape, w: Shape) -> bool:
    if isinstance(w, OneOf):
        return all(_reads_plain(r, _of_value(value)) for value in w.values)
    if not isinstance(r, str | Limited) or not isinstance(w, str | Limited):
        return False
    mine, other = (x if isinstance(x, Limited) else Limited(x) for x in (r, w))
    return (mine.of == other.of or other.of in _READS.get(mine.of, ())) and _holds(mine, other)


def _of_value(value: int | str) -> Limited:
    if isinstance(value, str):
        return Limited("str", min_length=len(value), max_length=len(value))
    return Limited("int", ge=value, le=value)


def _holds(r: Limited | Items | Map, w: Limited | Items | Map) -> bool:
    """Whether what is within the limits of `w` is within those of `r`."""
    if isinstance(r, Limited) and isinstance(w, Limited):
        low, high = _most(w.ge, w.gt, max), _most(w.le, w.lt, min)
        if r.ge is not None and (low is None or low < r.ge):
            return False
        if r.gt is not None and (low is None or low < r.gt or (low == r.gt and w.gt != low)):
            return False
        if r.le is not None and (high is None or high > r.le):
            return False
        if r.lt is not None and (high is None or high > r.lt or (high == r.lt and w.lt != high)):
            return False
        if r.multiple_of is not None and (w.multiple_of is None or w.multiple_of % r.multiple_of):
            return False
        if r.pattern not in (None, w.pattern) or r.tz not in (None, w.tz):
            return False
    if r.min_length and (w.min_length or 0) < r.min_length:
        return False
    return r.max_length is None or (w.max_length is not None and w.max_length <= r.max_length)


def _most(one: float | None, other: float | None, which: Any) -> float | None:
    said = [value for value in (one, other) if value is not None]
    return which(said) if said else None
