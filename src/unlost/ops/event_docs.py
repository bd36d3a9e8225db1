"""The events of a project as an AsyncAPI 3.1 document and as a page, from the code alone: who listens is known, who
publishes is not."""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from unlost import config
from unlost.app import App
from unlost.errors import UsageError
from unlost.events import Event
from unlost.ops.event import by_type, full_name, is_view, readers_of
from unlost.ops.event_lock import data_of, sent_key
from unlost.ops.event_page import MARK, event_page

ASYNCAPI = "3.1.0"
DOCUMENT, PAGE = "asyncapi.json", "index.html"
_TRAIT = "cloudevents"
_DRAFT = "Made from the code. Who publishes an event, and who reads it in other projects, is not in the code and is not said."

# The headers of an event on the wire, as Kafka's binary mode has them; other brokers keep the same attributes.
_HEADERS: dict[str, tuple[str, str]] = {
    "ce_specversion": ("string", "The version of CloudEvents."),
    "ce_id": ("string", "With the source, the identity of the event: a repeat has the same."),
    "ce_source": ("string", "The App or service that published it."),
    "ce_type": ("string", "What happened: the wire type."),
    "ce_time": ("string", "When it happened, RFC 3339 in UTC."),
    "ce_subject": ("string", "Whom it is about: the key as text."),
    "ce_partitionkey": ("string", "The key, which decides the partition. Events of one key keep their order."),
    "ce_correlationid": ("string", "The id of the event with which the flow began."),
    "ce_causationid": ("string", "The id of the event because of which this one was published."),
    "ce_traceparent": ("string", "W3C trace context."),
    "ce_tracestate": ("string", "W3C trace context."),
    "ce_unlostversion": ("string", "The version of the event's class; absent for version 1."),
    "content-type": ("string", "The format of the data."),
}
_REQUIRED = ["ce_specversion", "ce_id", "ce_source", "ce_type", "ce_time"]


def default_folder() -> Path:
    """`event-docs` beside the nearest pyproject.toml, else here."""
    return (config.project_folder() or Path.cwd()) / "event-docs"


def event_document(app: App, classes: Sequence[type[Event]]) -> dict[str, Any]:
    """The AsyncAPI document of these classes: topics and queues as channels, wire types as their messages, and an
    operation for each service and topic that it receives from.

    **Guarantee** the same code gives the same document, to the byte when it is written. No value of a `Sensitive` field
    is in it, not even its default.

    Raises:
        UsageError: UL1366 the types of a class cannot be described, UL1368 two classes have one wire type.

    Example:
        >>> event_document(App(), [])["channels"]
        {}
    """
    groups = by_type(classes)
    schemas, refs = _schemas(classes)
    messages: dict[str, Any] = {}
    channels: dict[str, Any] = {}
    receives: dict[tuple[str, str], list[tuple[str, dict[str, Any]]]] = {}
    for type, group in groups.items():
        full = [cls for cls in group if not is_view(cls)]
        if len(full) > 1:
            raise UsageError(
                "UL1368", "the document has one class for a wire type",
                found=f"{' and '.join(map(full_name, full))} both say what {type} is",
                fix=f'keep one; let whoever reads it have a view: class ...(Event, view_of="{type}")',
            )  # fmt: skip
        spec = (full or group)[0].__unlost__
        topic = spec.topic or ""
        messages[type] = _message(type, group, full[0] if full else None, refs)
        channel = channels.setdefault(topic, _channel(app, topic, is_queue=spec.is_command))
        channel["messages"][type] = {"$ref": f"#/components/messages/{type}"}
        for reader, cls in readers_of(app, group):
            if reader.service is not None:
                handler = next(s for s in app.services if s.name == reader.service).handlers[type]
                said = {
                    "type": type,
                    "handler": handler.name,
                    "reads": refs[cls]["$ref"],
                    "view": is_view(cls),
                    "guarantee": handler.guarantee,
                    "on_dead": handler.on_dead,
                }
                receives.setdefault((reader.service, topic), []).append((type, said))
    operations = {f"{s}.receive.{topic}": _operation(s, topic, read) for (s, topic), read in sorted(receives.items())}
    title, version = _project(app)
    return {
        "asyncapi": ASYNCAPI,
        "info": {"title": title, "version": version, "description": _DRAFT},
        "defaultContentType": "application/json",
        "channels": dict(sorted(channels.items())),
        "operations": operations,
        "components": {
            "messages": messages,
            "messageTraits": {_TRAIT: _trait()},
            "schemas": dict(sorted(schemas.items())),
        },
    }


def document_bytes(document: Mapping[str, Any]) -> bytes:
    """The document as it is written: indented, one thing a line."""
    return msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"


def write_docs(folder: Path, document: Mapping[str, Any]) -> list[Path]:
    """Writes `asyncapi.json` and `index.html`, each whole or not at all, and says which of them changed.

    **After a crash** either file is the old one or the new one; run it again.

    Raises:
        UsageError: UL1367 the folder cannot be written, UL1369 a file there is somebody else's.
    """
    wanted = {DOCUMENT: document_bytes(document), PAGE: event_page(document).encode("utf-8", "backslashreplace")}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        had = {name: _ours(folder / name) for name in wanted}
        changed = [folder / name for name, raw in wanted.items() if had[name] != raw]
        for path in changed:
            beside = path.with_name(path.name + ".new")
            beside.write_bytes(wanted[path.name])
            beside.replace(path)
    except OSError as e:
        raise UsageError(
            "UL1367", f"the documents cannot be written to {folder}", found=e.strerror or str(e),
            fix="name a folder with --out that you may write to",
        ) from e  # fmt: skip
    return changed


def _ours(path: Path) -> bytes | None:
    """What is in the file, if we wrote it; None where there is none."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    if (MARK if path.name == PAGE else _DRAFT).encode() not in raw:
        raise UsageError(
            "UL1369", f"{path} is there already, and was not written by unlost event docs", found=f"{len(raw)} bytes",
            fix="name another folder with --out, or move that file away; nothing was changed",
        )  # fmt: skip
    return raw


def _project(app: App) -> tuple[str, str]:
    """Title and version: those of the project, as far as pyproject.toml has them."""
    folder = config.project_folder()
    try:
        table = tomllib.loads((folder / "pyproject.toml").read_text()).get("project", {}) if folder else {}
    except (OSError, ValueError):  # what is wrong there is for others to say; the App has a name
        table = {}
    return str(table.get("name") or app.name), str(table.get("version") or "unversioned")


# ---- parts of the document


def _channel(app: App, topic: str, *, is_queue: bool) -> dict[str, Any]:
    declared = app.topics.get(topic)
    channel: dict[str, Any] = {"address": topic, "title": topic}
    channel["summary"] = "A queue: each command is carried out by one service." if is_queue else "A topic."
    channel["messages"] = {}
    if declared is not None:
        channel["bindings"] = {"kafka": {"partitions": declared.partitions, "bindingVersion": "0.5.0"}}
    channel["x-unlost"] = {"kind": "queue" if is_queue else "topic"}
    if declared is not None and declared.retention is not None:
        channel["x-unlost"]["retention"] = str(declared.retention)
    return channel


def _message(
    type: str, group: Sequence[type[Event]], full: type[Event] | None, refs: Mapping[Any, Any]
) -> dict[str, Any]:
    views = [cls for cls in group if is_view(cls)]
    cls = full or views[0]
    spec = cls.__unlost__
    said: dict[str, Any] = {"kind": "command" if spec.is_command else "event"}
    message: dict[str, Any] = {"name": type, "title": cls.__qualname__ if full else type}
    if full is None:
        message["description"] = "Not in this code, only views of it: an event has at least the fields that they read."
    elif _doc(full):
        message["description"] = _doc(full)
    message["contentType"] = "application/json"
    properties: dict[str, Any] = {"ce_type": {"const": type}}
    if full is not None:
        said |= {"class": full_name(full), "version": spec.version, "key": sent_key(full)}
        said["sensitive"] = sorted(name for name, field in data_of(full).fields.items() if field.sensitive)
        if spec.version != 1:
            properties["ce_unlostversion"] = {"const": str(spec.version)}
        key = sent_key(full)
        message["payload"] = refs[full]
    else:
        key = next(filter(None, map(sent_key, views)), None)
        message["payload"] = {"allOf": [refs[view] for view in views]}
    message["headers"] = {"type": "object", "properties": properties}
    if key is not None:
        binding = {"key": {"type": "string", "description": f"{key}, as text"}, "bindingVersion": "0.5.0"}
        message["bindings"] = {"kafka": binding}
    message["traits"] = [{"$ref": f"#/components/messageTraits/{_TRAIT}"}]
    said["views"] = [{"class": full_name(view), "reads": refs[view]["$ref"]} for view in views]
    message["x-unlost"] = said
    return message


def _operation(service: str, topic: str, read: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    return {
        "action": "receive",
        "channel": {"$ref": f"#/channels/{topic}"},
        "title": f"{service} receives from {topic}",
        "messages": [{"$ref": f"#/channels/{topic}/messages/{type}"} for type, _ in read],
        "x-unlost": {"service": service, "handlers": [said for _, said in read]},
    }


def _trait() -> dict[str, Any]:
    headers = {name: {"type": kind, "description": what} for name, (kind, what) in _HEADERS.items()}
    headers["ce_specversion"]["const"] = "1.0"
    headers["ce_time"]["format"] = "date-time"
    return {
        "summary": "CloudEvents 1.0, binary mode, as Kafka has it. Headers of your own stand beside them.",
        "headers": {"type": "object", "required": _REQUIRED, "properties": headers},
        "correlationId": {"location": "$message.header#/ce_correlationid"},
    }


# ---- schemas


def _schemas(classes: Sequence[type[Event]]) -> tuple[dict[str, Any], dict[type[Event], dict[str, str]]]:
    """The schemas of all classes and of what is in them, and where each class has its own."""
    shapes = {cls: data_of(cls) for cls in classes}
    twins = [cls.__unlost_form__.twin(cls) for cls in classes]
    at, found = msgspec.json.schema_components(
        twins, schema_hook=lambda kind: {"title": kind.__name__}, ref_template="#/components/schemas/{name}"
    )
    schemas = {name: _draft_7(schema) for name, schema in found.items()}
    refs: dict[type[Event], dict[str, str]] = {}
    for cls, ref in zip(classes, at, strict=True):
        refs[cls] = {"$ref": str(ref["$ref"])}
        schema = schemas[ref["$ref"].rpartition("/")[2]]
        for name in (name for name, field in shapes[cls].fields.items() if field.sensitive):
            schema["properties"][name] = _hidden(schema["properties"][name])
        if is_view(cls):
            schema["x-unlost-view-of"] = cls.__unlost__.type
    return schemas, refs


def _hidden(field: Mapping[str, Any]) -> dict[str, Any]:
    shown = {name: value for name, value in field.items() if name != "default"}
    if "$ref" in shown:  # nothing may stand beside a reference
        shown = {"allOf": [{"$ref": shown.pop("$ref")}], **shown}
    return shown | {"x-unlost-sensitive": True}


def _draft_7(schema: Any) -> Any:
    """AsyncAPI's schemas are those of draft 7: a tuple has its types in `items`, a discriminator is one name, and a
    reference stands alone."""
    if isinstance(schema, list):
        return [_draft_7(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    new = dict(_members(schema))
    if "$ref" in new and len(new) > 1:
        new = {"allOf": [{"$ref": new.pop("$ref")}], **new}
    return new


def _members(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in schema.items():
        if name in ("default", "const", "enum", "examples"):
            yield name, value  # data, no schema
        elif name == "properties":
            yield name, {field: _draft_7(inner) for field, inner in value.items()}
        elif name == "prefixItems":
            yield "items", _draft_7(value)
            yield "additionalItems", False
        elif name == "items" and "prefixItems" in schema:
            continue
        elif name == "discriminator":
            yield name, value["propertyName"]
        else:
            yield name, _draft_7(value)


def _doc(cls: type[Event]) -> str:
    return inspect.cleandoc(cls.__dict__.get("__doc__") or "")
