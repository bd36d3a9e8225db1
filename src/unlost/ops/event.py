"""The events of a project: which there are, and who reads what of them. From the code alone: it does not tell who
publishes, or what other projects read."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import msgspec

from unlost.app import App
from unlost.events import Event, check_past_tense, steps_of
from unlost.ops.event_lock import Locked, data_of, sent_key, sent_names
from unlost.ops.event_shape import Object, Problem, problems
from unlost.ops.publish import event_classes


class Reader(msgspec.Struct, frozen=True, kw_only=True):
    """A service that reads a wire type by the full class or by a view, and its handler. A view that no service handles has
    neither."""

    service: str | None
    handler: str | None
    view: str | None

    def __str__(self) -> str:
        if self.view is None:
            return str(self.service)
        return (
            f"view {self.view}, which no service handles"
            if self.service is None
            else f"{self.service} (view {self.view})"
        )


class Listed(msgspec.Struct, frozen=True, kw_only=True):
    """One event or command class. For a command, `topic` is its queue. Where the code has only views of a wire type,
    `name` and `version` are None."""

    type: str
    kind: Literal["event", "command"]
    name: str | None
    topic: str
    key: str | None
    version: int | None
    views: list[str]
    readers: list[Reader]


Kind = Literal["backward", "forward", "identity", "renamed", "privacy", "view", "name", "queue", "twice"]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """Something that breaks, for whom of this App, and what to do. `field` is empty where it is about the whole class."""

    kind: Kind
    type: str
    name: str
    field: str
    what: str
    hurts: list[str]
    fix: str


class FieldUse(msgspec.Struct, frozen=True, kw_only=True):
    """Who reads a field. `added` says whether it came since the lock; None where there is no lock."""

    name: str
    is_key: bool
    added: bool | None
    by_view: list[Reader]
    by_all: list[Reader]


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """One wire type: its fields with their readers. `name` is None, and `fields` is empty, where the code has only views."""

    type: str
    name: str | None
    fields: list[FieldUse]
    wrong: list[Finding]


def project_classes(app: App) -> list[type[Event]]:
    """Every event and command class that the App has brought in, views too, by wire type and name. A class that others
    derive from is a base, and left out, where its name is no fact (or order) and no service handles it."""
    classes = event_classes()
    bases = {base for cls in classes if not is_view(cls) for base in cls.__mro__[1:]}
    handled = {cls for service in app.services for cls in service.catalog.known.values()}
    facts = [cls for cls in classes if cls in handled or cls not in bases or check_past_tense(cls) is None]
    return sorted(facts, key=lambda cls: (cls.__unlost__.type, full_name(cls)))


def event_list(app: App, classes: Sequence[type[Event]]) -> list[Listed]:
    """All events and commands: class, topic, key, version, views, and which services of the App listen.

    Example:
        >>> event_list(App(), [])
        []
    """
    found = []
    for type, group in by_type(classes).items():
        views = [cls for cls in group if is_view(cls)]
        full = [cls for cls in group if not is_view(cls)]
        for cls in full or views[:1]:
            spec = cls.__unlost__
            readers = [r for r, read in readers_of(app, group) if r.service and (read is cls or is_view(read))]
            found.append(
                Listed(
                    type=type, kind="command" if spec.is_command else "event", name=full_name(cls) if full else None,
                    topic=spec.topic or "", key=spec.key, version=spec.version if full else None,
                    views=[full_name(view) for view in views], readers=readers,
                )
            )  # fmt: skip
    return found


def event_usage(app: App, classes: Sequence[type[Event]], lock: Mapping[str, Locked] | None) -> list[Usage]:
    """Which service reads which field, and what views want that is not there. A handler of the full class reads all.

    Raises:
        UsageError: UL1366, the types of a class cannot be described.

    Example:
        >>> event_usage(App(), [], None)
        []
    """
    found = []
    for type, group in by_type(classes).items():
        before = (lock or {}).get(type)
        readers = readers_of(app, group)
        wrong = view_findings(app, group, before)
        full = [cls for cls in group if not is_view(cls)]
        for cls in full:
            fields = [
                FieldUse(
                    name=name,
                    is_key=name == sent_key(cls),
                    added=None if lock is None else before is None or name not in _had(before),
                    by_view=[r for r, read in readers if is_view(read) and name in sent_names(read)],
                    by_all=[r for r, read in readers if read is cls],
                )
                for name in sent_names(cls)
            ]
            found.append(Usage(type=type, name=full_name(cls), fields=fields, wrong=wrong if cls is full[0] else []))
        if not full:
            found.append(Usage(type=type, name=None, fields=[], wrong=wrong))
    return found


# ---- classes and who reads them


def full_name(cls: type[Event]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def is_view(cls: type[Event]) -> bool:
    return cls.__unlost__.view_of is not None


def by_type(classes: Sequence[type[Event]]) -> dict[str, list[type[Event]]]:
    groups: dict[str, list[type[Event]]] = {}
    for cls in classes:
        groups.setdefault(cls.__unlost__.type, []).append(cls)
    return groups


def readers_of(app: App, group: Sequence[type[Event]]) -> list[tuple[Reader, type[Event]]]:
    """Who reads the classes of one wire type, with the class; then the views that nobody handles."""
    type = group[0].__unlost__.type
    found = []
    for service in app.services:
        cls = service.catalog.resolve(type)
        if cls is not None:
            view = cls.__qualname__ if is_view(cls) else None
            found.append((Reader(service=service.name, handler=service.handlers[type].name, view=view), cls))
    read = [cls for _, cls in found]
    left = [cls for cls in group if is_view(cls) and cls not in read]
    return found + [(Reader(service=None, handler=None, view=cls.__qualname__), cls) for cls in left]


def _had(before: Locked) -> set[str]:
    return {name for name, field in before.fields.items() if not field.gone}


# ---- views


def view_findings(app: App, group: Sequence[type[Event]], before: Locked | None) -> list[Finding]:
    """What the views of one wire type cannot read: of the event as the code has it, and of older ones in the log."""
    full = [cls for cls in group if not is_view(cls)]
    event = data_of(full[0]) if len(full) == 1 else None
    found = []
    for cls in group:
        if is_view(cls):
            hurts = [str(reader) for reader, read in readers_of(app, group) if read is cls]
            for field, what, fix in _wrong(data_of(cls), event, _as_read(cls, before)):
                finding = Finding(
                    kind="view", type=cls.__unlost__.type, name=cls.__qualname__, field=field, what=what, hurts=hurts, fix=fix
                )  # fmt: skip
                found.append(finding)
    return found


def _as_read(view: type[Event], before: Locked | None) -> Locked | None:
    """The log as a view gets to read it: what its upcasters bring up is not what was written."""
    steps = steps_of(view)
    if before is None or not steps or before.version < steps[0].version:
        return before
    if before.version < view.__unlost__.version:
        return None
    fields = {name: msgspec.structs.replace(field, added_later=False) for name, field in before.fields.items()}
    return msgspec.structs.replace(before, fields=fields)


def _wrong(view: Object, event: Object | None, before: Locked | None) -> Iterator[tuple[str, str, str]]:
    """Field, what is wrong, what to do."""
    told = set()
    if event is not None:
        absent = view.fields.keys() - event.fields.keys()
        for name in sorted(absent):
            if before is not None and name in before.fields and not view.fields[name].required:
                continue  # the log has it
            near = difflib.get_close_matches(name, list(event.fields), n=1)
            yield name, f"the view reads {name}, which the event does not have", (
                f"did you mean {near[0]}?" if near else f"the event has {', '.join(sorted(event.fields))}"
            )  # fmt: skip
            told.add(name)
        for problem in problems(view, event):
            if problem.field not in absent:
                yield problem.path, _unread(problem, "the event"), _correction(problem)
                told.add(problem.field)
        for name in sorted(view.fields.keys() & event.fields.keys()):
            if event.fields[name].sensitive and not view.fields[name].sensitive:
                yield (
                    name,
                    f"the view shows {name}, which is Sensitive in the event",
                    "make it Sensitive in the view too",
                )
    if before is not None:
        for problem in problems(view, before.data):
            if problem.field not in told:
                yield problem.path, _unread(problem, "events that may be in the log"), _correction(problem)


def _unread(problem: Problem, of: str) -> str:
    if problem.kind == "missing":
        return f"the view needs {problem.path}, and {of} may lack it"
    if problem.kind == "unknown":
        return f"the view refuses fields that it does not know, and {of} may have {problem.path}"
    at = problem.path or "the whole"
    return f"the view reads {at} as {problem.reads}, and {of} may have {problem.written} there"


def _correction(problem: Problem) -> str:
    if problem.kind == "missing":
        return f"give {problem.path} a default in the view"
    if problem.kind == "unknown":
        return "take forbid_unknown_fields off the view"
    return "let the view have a type that reads both"
