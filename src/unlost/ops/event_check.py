"""Whether the events of a project changed so that somebody cannot read them any more: against the lock, and by their
names, queues and views."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from unlost.app import App
from unlost.errors import UsageError
from unlost.events import Event, check_past_tense, steps_of
from unlost.ops.event import Finding, Kind, Reader, by_type, full_name, is_view, readers_of, view_findings
from unlost.ops.event_lock import UPDATE, Locked, locked, merged, read_lock, sent_names, write_lock
from unlost.ops.event_shape import Field, Problem, Shape, problems, shown

AGREED_BY_UPDATE: tuple[Kind, ...] = ("backward", "forward", "identity", "renamed", "privacy")
_OR_UPCAST = "or raise version= with an @upcast"
_AGREE = f"if it is meant so: {UPDATE}"


class Change(msgspec.Struct, frozen=True, kw_only=True):
    type: str
    field: str
    what: str


class Checked(msgspec.Struct, frozen=True, kw_only=True):
    """`changes` is what differs from the lock; `findings` is what of it breaks, and what is wrong by itself. `agreed`: the
    lock has been brought up to date, and `written` says whether that changed the file."""

    lock: str
    agreed: bool
    written: bool
    changes: list[Change]
    findings: list[Finding]

    @property
    def breaks(self) -> bool:
        """Whether something breaks that the lock cannot agree to, or has not."""
        return any(not (self.agreed and finding.kind in AGREED_BY_UPDATE) for finding in self.findings)


_Readers = Sequence[tuple[Reader, type[Event]]]


def check(app: App, classes: Sequence[type[Event]], path: Path, *, update: bool = False) -> Checked:
    """Compares the classes with the lock, and looks at their names, queues and views. `update` then writes the lock: what
    differed is agreed.

    **Guarantee** without `update`, and where it raises, no file is changed.
    **After a crash** the lock is the old one or the new one, whole.

    Raises:
        UsageError: UL1360 there is no lock; UL1361 to UL1364 it cannot be used; UL1365 two classes have one wire type;
            UL1366 the types of a class cannot be described; UL1373, UL1374 its upcasters do not lead to its version.
    """
    old = read_lock(path)
    if old is None and not update:
        raise UsageError(
            "UL1360", "there is no lock to compare the events with", found=f"no file {path}",
            fix=f"{UPDATE} makes it; commit it with the code",
        )  # fmt: skip
    before = old or {}
    groups = by_type(classes)
    full = {type: [cls for cls in group if not is_view(cls)] for type, group in groups.items()}
    twice = [_twice(type, two) for type, two in full.items() if len(two) > 1]
    if twice and update:
        raise UsageError("UL1365", "the lock holds one class for a wire type", found=twice[0].what, fix=twice[0].fix)
    now = {type: locked(one[0]) for type, one in full.items() if len(one) == 1}
    compared = sorted((before.keys() | now.keys()) - {finding.type for finding in twice})
    changes: list[Change] = []
    findings: list[Finding] = []
    for type in compared:
        readers = readers_of(app, groups[type]) if type in groups else []
        changes += _changes(type, before.get(type), now.get(type), readers)
        changes += _upcasts(type, before.get(type), full.get(type, []))
        findings += _broken(type, before, now, readers)
    findings += [*twice, *_names(classes), *_queues(app)]
    after = merged(before, now) if update else before
    for type, group in groups.items():
        findings += view_findings(app, group, after.get(type))
    written = update and write_lock(path, after)
    return Checked(lock=str(path), agreed=update, written=written, changes=changes, findings=findings)


def compare(old: Path, new: Path) -> Checked:
    """What changed from one lock to another, and what of it breaks. Needs no code: who reads what is not known then.

    Raises:
        UsageError: UL1360 a lock is not there; UL1361 to UL1364 it cannot be used.
    """
    before = _lock_at(old)
    now = {type: _as_code(event) for type, event in _lock_at(new).items() if not event.gone}
    changes: list[Change] = []
    findings: list[Finding] = []
    for type in sorted(before.keys() | now.keys()):
        changes += _changes(type, before.get(type), now.get(type), ())
        findings += _broken(type, before, now, ())
    return Checked(lock=str(old), agreed=False, written=False, changes=changes, findings=findings)


def _as_code(event: Locked) -> Locked:
    """Without what a lock remembers of the past."""
    return msgspec.structs.replace(
        event, fields={name: field for name, field in event.fields.items() if not field.gone}
    )


def _lock_at(path: Path) -> dict[str, Locked]:
    found = read_lock(path)
    if found is None:
        raise UsageError("UL1360", "there is no lock to compare with", found=f"no file {path}", fix="name two locks")
    return found


# ---- what the code says by itself


def _twice(type: str, two: Sequence[type[Event]]) -> Finding:
    return Finding(
        kind="twice", type=type, name=two[0].__qualname__, field="", hurts=[],
        what=f"{' and '.join(map(full_name, two))} both say what {type} is",
        fix=f'keep one; let whoever reads it have a view: class ...(Event, view_of="{type}")',
    )  # fmt: skip


def _names(classes: Sequence[type[Event]]) -> Iterator[Finding]:
    for cls in classes:
        warning = check_past_tense(cls)
        if warning is not None:
            what, _, fix = warning.removeprefix("UL1005: ").partition("; ")
            yield Finding(
                kind="name", type=cls.__unlost__.type, name=cls.__qualname__, field="", what=what, hurts=[],
                fix=f'{fix}; after renaming, type="{cls.__unlost__.type}" keeps its history',
            )  # fmt: skip


def _queues(app: App) -> Iterator[Finding]:
    """An App refuses two services for a queue when it is made; a handler may have been added since."""
    for queue in sorted({queue for service in app.services for queue in service.queues}):
        services = [service.name for service in app.services if queue in service.queues]
        if len(services) > 1:
            yield Finding(
                kind="queue", type=queue, name=queue, field="", hurts=services,
                what=f"{len(services)} services handle the queue {queue}, and exactly one may",
                fix=f"move the handlers to {services[0]}, or send an event: any number of services may handle it",
            )  # fmt: skip


# ---- what differs from the lock


def _changes(type: str, old: Locked | None, new: Locked | None, readers: _Readers) -> Iterator[Change]:
    def change(what: str, field: str = "") -> Change:
        return Change(type=type, field=field, what=what)

    if old is None or new is None:
        if old is None:
            yield change("new")
        elif not old.gone:
            yield change("gone from the code")
        return
    if old.gone:
        yield change("back in the code")
    for what, was, is_ in (
        ("class", old.class_, new.class_), ("kind", old.kind, new.kind), ("key", old.key, new.key),
        (_place(new), old.topic, new.topic), ("version", old.version, new.version),
    ):  # fmt: skip
        if was != is_:
            yield change(f"{what}: {was or 'none'} → {is_ or 'none'}")
    if new.version > old.version:
        late = [str(reader) for reader, _ in readers if reader.view is None]
        yield change(
            f"releases of {', '.join(late) or 'others'} that know only version {old.version} put version {new.version} on the "
            "shelf: deploy them first, or redrive afterwards"
        )
    if old.closed != new.closed:
        yield change("unknown fields are refused" if new.closed else "unknown fields are ignored")
    for name in sorted(old.fields.keys() | new.fields.keys()):
        one, other = old.fields.get(name), new.fields.get(name)
        if one is None or one.gone:
            if other is not None:
                yield change(f"added: {_field(other)}", name)
        elif other is None:
            yield change(f"removed: {_field(one)}", name)
        elif _field(one) != _field(other):
            yield change(f"{_field(one)} → {_field(other)}", name)


def _upcasts(type: str, old: Locked | None, full: Sequence[type[Event]]) -> Iterator[Change]:
    steps = steps_of(full[0]) if full else ()
    if old is None or not steps:
        return
    came = [step for step in steps if old.upcasts_from is None or not old.upcasts_from <= step.version < old.version]
    for step in came:
        what = f"upcaster {step}: events of version {step.version} in the log are brought up by it"
        yield Change(type=type, field="", what=what)


def _field(field: Field) -> str:
    said = [shown(field.type), "required" if field.required else "default"]
    return ", ".join(said + ["omitted"] * field.omitted + ["Sensitive"] * field.sensitive)


# ---- what of it breaks


def _broken(type: str, before: Mapping[str, Locked], now: Mapping[str, Locked], readers: _Readers) -> Iterator[Finding]:
    old, new = before.get(type), now.get(type)
    if old is None or (new is None and old.gone):
        return
    if new is None:
        yield _vanished(type, old, before, now, readers)
        return
    full = [str(reader) for reader, _ in readers if reader.view is None]
    yield from _identity(type, old, new, [str(reader) for reader, _ in readers], full)

    def finding(kind: Kind, field: str, what: str, hurts: list[str], fix: str) -> Finding:
        return Finding(kind=kind, type=type, name=new.class_, field=field, what=what, hurts=hurts, fix=fix)

    if old.upcasts_from is not None and (new.upcasts_from is None or new.upcasts_from > old.upcasts_from):
        last = old.version if new.upcasts_from is None else new.upcasts_from
        some = f"version {old.upcasts_from}" + (f" to {last - 1}" if last - 1 > old.upcasts_from else "")
        yield finding(
            "backward", "", f"the upcaster from version {old.upcasts_from} is gone, and the log may have events of {some}", full,
            f"keep it; if no such event is left: {UPDATE}",
        )  # fmt: skip
    bridged = _bridges(old, new)
    renamed = {} if bridged else _renamed(old, new)
    for one, other in renamed.items():
        yield finding(
            "renamed", one, f"{one} looks renamed to {other}: what the log has under {one} would not be read", full,
            f'keep the name that is sent: {other} = msgspec.field(name="{one}"). If they are two facts: {UPDATE}',
        )  # fmt: skip
    told = renamed.keys() | set(renamed.values())
    for problem in [] if bridged else problems(new.data, old.data, history=True):
        if problem.field not in told:
            what, fix = _backward(problem)
            yield finding("backward", problem.path, what, full, fix)
    for problem in problems(old.data, new.data):
        if problem.field not in told:
            what, fix = _forward(problem)
            views = [str(r) for r, cls in readers if r.view is not None and problem.field in sent_names(cls)]
            yield finding("forward", problem.path, what, full + views, fix)
    for name, field in new.fields.items():
        if not field.sensitive and name in old.fields and old.fields[name].sensitive:
            yield finding(
                "privacy", name, f"{name} is no longer Sensitive: its values show in logs, errors and commands", full,
                f"make it Sensitive again; {_AGREE}",
            )  # fmt: skip


def _bridges(old: Locked, new: Locked) -> bool:
    """Whether an upcaster brings up what was written until now: then it is not the class that reads it."""
    return old.version < new.version and new.upcasts_from is not None and new.upcasts_from <= old.version


def _backward(problem: Problem) -> tuple[str, str]:
    """A new release of a reader meets what is in the log."""
    path = problem.path
    if problem.kind == "missing":
        return f"{path} is required now, and the log may have events without it", f"give {path} a default, {_OR_UPCAST}"
    if problem.kind == "unknown":
        return f"the class refuses {path}, which events in the log have", "take forbid_unknown_fields off the class"
    return (
        f"{path or 'the whole'} is {problem.reads}, and events in the log have {problem.written}",
        f"let it read both ({problem.reads} | {problem.written}), add a field of another name, {_OR_UPCAST}",
    )


def _forward(problem: Problem) -> tuple[str, str]:
    """A release that is still running meets what the new one publishes."""
    path = problem.path
    if problem.kind == "missing":
        return (
            f"{path} is not always sent any more, and the releases before need it",
            f"keep sending it; or deploy readers that can do without it first, then {UPDATE}",
        )
    if problem.kind == "unknown":
        return (
            f"{path} is new, and the releases before refuse unknown fields",
            f"deploy readers that ignore it first, then {UPDATE}",
        )
    return (
        f"{path or 'the whole'} may be {problem.written}, and the releases before read {problem.reads}",
        f"deploy the readers first, then {UPDATE}; or add a field of another name",
    )


def _identity(type: str, old: Locked, new: Locked, everybody: list[str], full: list[str]) -> Iterator[Finding]:
    place = _place(old)

    def finding(what: str, hurts: list[str], fix: str) -> Finding:
        return Finding(kind="identity", type=type, name=new.class_, field="", what=what, hurts=hurts, fix=fix)

    if old.kind != new.kind:
        yield finding(f"it was {_a(old.kind)} and is {_a(new.kind)}", everybody, "give the new one another name")
    elif old.topic != new.topic:
        yield finding(
            f"its {place} was {old.topic} and is {new.topic}: its history stays in {old.topic}", everybody,
            f"say {place}={old.topic!r}; {_AGREE}",
        )  # fmt: skip
    if old.key != new.key:
        yield finding(
            f"its key was {old.key or 'none'} and is {new.key or 'none'}: old and new events of one key have no order", everybody,
            f"say key={old.key!r}, or let it be a new event; {_AGREE}" if old.key else f"take key= away; {_AGREE}",
        )  # fmt: skip
    if new.version < old.version:
        yield finding(
            f"its version was {old.version} and is {new.version}: events of version {old.version} in the log go to the shelf",
            full, f"say version={old.version}, or a higher one",
        )  # fmt: skip


def _vanished(
    type: str, old: Locked, before: Mapping[str, Locked], now: Mapping[str, Locked], readers: _Readers
) -> Finding:
    fresh = {t: event for t, event in now.items() if t not in before or before[t].gone}
    alike = [t for t, event in fresh.items() if event.class_ == old.class_] or [
        t for t, event in fresh.items() if _types(event) == _types(old)
    ]
    what = f"{old.class_} is gone, and its events are still in the log"
    fix = f"if nobody needs them any more, or another project has the class now: {UPDATE}"
    if len(alike) == 1:
        other = now[alike[0]]
        what = (
            f"its wire type is now {alike[0]} (class {other.class_}): what the log has under {type} is read by nobody"
        )
        same = "" if other.topic == old.topic else f", {_place(old)}={old.topic!r}"
        fix = f"say type={type!r}{same} on {other.class_}; if it is another event: {UPDATE}"
    hurts = [str(reader) for reader, _ in readers]
    return Finding(kind="identity", type=type, name=old.class_, field="", what=what, hurts=hurts, fix=fix)


def _types(event: Locked) -> dict[str, Shape]:
    return {name: field.type for name, field in event.fields.items() if not field.gone}


def _place(event: Locked) -> str:
    return "topic" if event.kind == "event" else "queue"


def _a(kind: str) -> str:
    return f"an {kind}" if kind == "event" else f"a {kind}"


def _renamed(old: Locked, new: Locked) -> dict[str, str]:
    """Fields that went away, with the one that seems to have come in their place: there is no other choice, the type is
    the same, and so is a word of the name, or else nobody would notice because the new one has a default."""
    went = {name: field for name, field in old.fields.items() if not field.gone and name not in new.fields}
    came = {name: field for name, field in new.fields.items() if name not in old.fields}
    pairs: dict[str, str] = {}
    for alike in (_same_name, _common_word, _unnoticed):
        fits = {
            one: [other for other in came if went[one].type == came[other].type and alike(one, other, came[other])]
            for one in went
        }
        for one, others in fits.items():
            if len(others) == 1 and sum(others[0] in theirs for theirs in fits.values()) == 1:
                pairs[one] = others[0]
                del went[one], came[others[0]]
    return pairs


def _same_name(one: str, other: str, _field: Field) -> bool:
    return one.replace("_", "").lower() == other.replace("_", "").lower()


def _common_word(one: str, other: str, _field: Field) -> bool:
    return not set(one.lower().split("_")).isdisjoint(other.lower().split("_"))


def _unnoticed(_one: str, _other: str, field: Field) -> bool:
    return not field.required
