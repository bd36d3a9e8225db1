"""The AsyncAPI document of a project as one page: no script, nothing from elsewhere, every text escaped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import msgspec

MARK = '<meta name="generator" content="unlost event docs">'
_LIMITS = {
    "minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<", "multipleOf": "a multiple of",
    "minLength": "length ≥", "maxLength": "length ≤", "minItems": "items ≥", "maxItems": "items ≤", "pattern": "matches",
}  # fmt: skip
# What would move or hide text in a browser: control characters, and those that change its direction.
_HARMLESS = {n: f"\\x{n:02x}" for n in (*range(0x09), 0x0B, 0x0C, *range(0x0E, 0x20), *range(0x7F, 0xA0))} | {
    n: f"\\u{n:04x}" for n in (0x200B, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A), 0xFEFF)
}

_STYLE = """
:root { color-scheme: light dark; --line: #d5d9de; --dim: #59636e; --mark: #0b61a4; --soft: #f3f5f7; --hide: #9a3412; }
@media (prefers-color-scheme: dark) {
  :root { --line: #3a424b; --dim: #9aa5b1; --mark: #78b7ec; --soft: #1d2329; --hide: #fdba74; }
  body { background: #14181c; color: #e4e8ec; }
}
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 56rem; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: .5rem 0 0; } h2 { margin-top: 2.5rem; border-bottom: 2px solid var(--line); }
h3, h4 { margin-bottom: .2rem; } a { color: var(--mark); } code { font: .9em ui-monospace, monospace; }
nav ul { columns: 16rem; padding-left: 1.2rem; } .dim { color: var(--dim); } p { margin: .4rem 0; } .text { white-space: pre-line; }
table { border-collapse: collapse; width: 100%; margin: .6rem 0 1rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--line); }
th { color: var(--dim); font-weight: 600; font-size: .85rem; }
.tag { background: var(--soft); border: 1px solid var(--line); border-radius: .3rem; padding: 0 .35rem; font-size: .8rem; white-space: nowrap; }
.hide { color: var(--hide); border-color: currentColor; }
@media (max-width: 32rem) {
  thead { display: none; } tr { display: block; padding: .4rem 0; border-bottom: 1px solid var(--line); }
  td { display: block; border: 0; padding: 0 0 0 .8rem; } td:first-child { padding-left: 0; } td:empty { display: none; }
}
"""


def event_page(document: Mapping[str, Any]) -> str:
    """An AsyncAPI document, as `event_document` makes it, for people.

    Example:
        >>> "<script" in event_page({"info": {"title": "shop", "version": "1", "description": ""}, "channels": {},
        ...     "operations": {}, "components": {"messages": {}, "schemas": {}, "messageTraits": {}}})
        False
    """
    return "\n".join(_page(document)) + "\n"


def _page(document: Mapping[str, Any]) -> Iterator[str]:
    info, parts = document["info"], document["components"]
    title = _text(f"{info['title']} {info['version']}")
    yield f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{MARK}'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>Events of {title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>"
    yield f"<h1>Events of {_text(info['title'])}</h1>"
    yield f'<p class="dim">{_text(info["version"])} · AsyncAPI {_text(document.get("asyncapi", ""))}</p>'
    yield f"<p>{_text(info['description'])}</p>"
    yield "<nav><ul>"
    for name, channel in document["channels"].items():
        yield f"<li>{_link(f'channel-{name}', name)}{' (queue)' if channel['x-unlost']['kind'] == 'queue' else ''}<ul>"
        yield from (f"<li>{_link(f'type-{type}', type)}</li>" for type in channel["messages"])
        yield "</ul></li>"
    yield "</ul></nav>"
    own = {m["payload"]["$ref"] for m in parts["messages"].values() if "$ref" in m["payload"]}
    for name, channel in document["channels"].items():
        yield from _channel(name, channel, document)
    rest = {name: s for name, s in parts["schemas"].items() if f"#/components/schemas/{name}" not in own}
    if rest:
        yield "<h2>Views, and what events contain</h2>"
    for name, schema in rest.items():
        yield f'<h3 id="{_text(f"schema-{name}")}">{_text(name)}</h3>'
        if "x-unlost-view-of" in schema:
            yield f"<p>A view of {_link('type-' + schema['x-unlost-view-of'], schema['x-unlost-view-of'])}: only what it reads.</p>"
        yield from _schema(schema)
    for trait in parts["messageTraits"].values():
        yield f"<h2>Headers</h2>\n<p>{_text(trait['summary'])}</p>"
        yield from _schema(trait["headers"])
    yield "</body>\n</html>"


def _channel(name: str, channel: Mapping[str, Any], document: Mapping[str, Any]) -> Iterator[str]:
    kind = channel["x-unlost"]["kind"]
    yield f'<section>\n<h2 id="{_text(f"channel-{name}")}">{_text(name)} <span class="tag">{_text(kind)}</span></h2>'
    said = [f"{channel['bindings']['kafka']['partitions']} partitions"] if "bindings" in channel else []
    said += [f"retention {channel['x-unlost']['retention']}"] if "retention" in channel["x-unlost"] else []
    if said:
        yield f'<p class="dim">{_text(", ".join(said))}</p>'
    for type in channel["messages"]:
        yield from _message(type, document)
    yield "</section>"


def _message(type: str, document: Mapping[str, Any]) -> Iterator[str]:
    message = document["components"]["messages"][type]
    said = message["x-unlost"]
    at = message["payload"].get("$ref")
    yield f'<article>\n<h3 id="{_text(f"type-{type}")}">{_text(message["title"])} <span class="tag">{_text(said["kind"])}</span></h3>'
    facts = [f"type <code>{_text(type)}</code>"]
    if "class" in said:
        key = f"key <code>{_text(said['key'])}</code>" if said["key"] else "no key"
        facts += [key, f"version {said['version']}", f"class <code>{_text(said['class'])}</code>"]
    yield f'<p class="dim">{" · ".join(facts)}</p>'
    if "description" in message:
        yield f'<p class="text">{_text(message["description"])}</p>'
    if at is not None:
        name = at.rpartition("/")[2]
        yield f'<div id="{_text(f"schema-{name}")}">'
        yield from _schema(document["components"]["schemas"][name], key=said.get("key"), described=True)
        yield "</div>"
    readers = [
        (operation["x-unlost"]["service"], handler)
        for operation in document["operations"].values()
        for handler in operation["x-unlost"]["handlers"]
        if handler["type"] == type
    ]
    views = {view["reads"] for view in said["views"]} - {handler["reads"] for _, handler in readers}
    rows = [
        (
            f"<strong>{_text(service)}</strong>",
            f"<code>{_text(handler['handler'])}</code>",
            _reference(handler["reads"]) if handler["view"] else "all fields",
            _text(f"{handler['guarantee']}, on_dead {handler['on_dead']}"),
        )
        for service, handler in readers
    ]
    rows += [("nobody in this App", "", _reference(view), "") for view in sorted(views)]
    if rows:
        yield "<h4>Received by</h4>"
        yield from _table(("service", "handler", "reads", "guarantee"), rows)
    else:
        yield '<p class="dim">Nobody in this App receives it.</p>'
    yield "</article>"


def _schema(schema: Mapping[str, Any], *, key: str | None = None, described: bool = False) -> Iterator[str]:
    if "description" in schema and not described:
        yield f'<p class="text">{_text(schema["description"])}</p>'
    if not schema.get("properties"):
        yield f"<p>{'no fields' if schema.get('type') == 'object' else _type(schema)}</p>"
        return
    rows = []
    for name, field in schema["properties"].items():
        tags = ["key"] * (name == key) + ["required"] * (name in schema.get("required", ()))
        remarks = [f'<span class="tag">{tag}</span>' for tag in tags]
        if field.get("x-unlost-sensitive"):
            remarks.append('<span class="tag hide">sensitive</span>')
        if "default" in field:
            remarks.append(f"default <code>{_value(field['default'])}</code>")
        if "description" in field:
            remarks.append(f"<span>{_text(field['description'])}</span>")
        rows.append((f"<code>{_text(name)}</code>", _type(field), " ".join(remarks)))
    yield from _table(("field", "type", ""), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"<table>\n<thead><tr>{''.join(f'<th>{_text(cell)}</th>' for cell in head)}</tr></thead>\n<tbody>"
    yield from (f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    yield "</tbody>\n</table>"


def _type(schema: Any) -> str:
    """A type in one line, as HTML."""
    if not isinstance(schema, dict):
        return "anything" if schema is True or schema is None else "nothing"
    if "$ref" in schema:
        return _reference(schema["$ref"])
    for name, between in (("allOf", " and "), ("anyOf", " or "), ("oneOf", " or ")):
        if name in schema:
            return between.join(map(_type, schema[name]))
    if "const" in schema or "enum" in schema:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        return " or ".join(f"<code>{_value(value)}</code>" for value in values)
    kind, items = schema.get("type"), schema.get("items")
    if kind == "array":
        inside = ", ".join(map(_type, items)) if isinstance(items, list) else _type(items)
        text = f"{'tuple' if isinstance(items, list) else 'array'} of {inside}"
    elif kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        text = f"map to {_type(schema['additionalProperties'])}"
    else:
        text = _text(schema.get("format") or kind or schema.get("title") or "anything")
    limits = [f"{sign} {schema[name]}" for name, sign in _LIMITS.items() if name in schema]
    return text + (f" ({_text(', '.join(limits))})" if limits else "")


def _reference(ref: str) -> str:
    name = ref.rpartition("/")[2]
    return _link(f"schema-{name}", name)


def _link(anchor: str, text: str) -> str:
    return f'<a href="#{_text(anchor)}">{_text(text)}</a>'


def _value(value: Any) -> str:
    return _text(msgspec.json.encode(value).decode())


def _text(text: object) -> str:
    return escape(str(text).translate(_HARMLESS))
