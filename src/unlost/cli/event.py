"""`unlost event`: the events of a project, who reads them, and what a change would break."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter

from unlost.app import App
from unlost.cli.options import (
    AppName,
    BrokerUrl,
    DryRun,
    Json,
    OfApp,
    Operator,
    Yes,
    aligned,
    confirmed,
    count,
    login,
    looking,
)
from unlost.cli.say import bold, clean, dim, note, out, print_json, warn
from unlost.errors import OutcomeUnknown, UsageError
from unlost.ops import erase as erasing
from unlost.ops.event import FieldUse, Finding, event_list, event_usage, project_classes
from unlost.ops.event_check import AGREED_BY_UPDATE, Checked, check, compare
from unlost.ops.event_docs import DOCUMENT, PAGE, default_folder, event_document, write_docs
from unlost.ops.event_lock import UPDATE, lock_path, read_lock
from unlost.ops.event_size import Size
from unlost.ops.event_size import sizes as event_sizes
from unlost.ops.load import load

LockFile = Annotated[
    str | None, Parameter(name="--lock", help="The lock. Else unlost.events.lock beside the nearest pyproject.toml.")
]
Old = Annotated[str | None, Parameter(help="A lock to begin with, instead of the code.")]
New = Annotated[str | None, Parameter(help="The lock to compare it with.")]
Sizes = Annotated[
    bool, Parameter(name="--sizes", negative="", help="Also how large each type is, by the newest events in the log.")
]
Out = Annotated[
    str | None, Parameter(name="--out", help="The folder. Else event-docs beside the nearest pyproject.toml.")
]
Update = Annotated[
    bool, Parameter(name="--update", negative="", help="Write the lock afterwards: what has changed is agreed.")
]


def list_events(*, app: AppName = None, json: Json = False) -> int:
    """List the events and commands of your code: type, topic, key, version, and which services listen.

    Who publishes an event is not known from the code, nor what other projects read.

    **Needs** your code; no broker.

    **Example**

    - `unlost event list --app hello`
    """
    loaded = _load(app)
    found = event_list(loaded, project_classes(loaded))
    if json:
        print_json("events/1", {"events": msgspec.to_builtins(found)})
        return 0
    if not found:
        out("the App and what it imports have no events")
        return 0
    rows = [["TYPE", "topic or queue", "key", "version", "listening"]]
    for e in found:
        listening = ", ".join(map(str, e.readers)) or "nobody in this App"
        version = "-" if e.version is None else str(e.version)
        place = f"{e.topic} (queue)" if e.kind == "command" else e.topic
        rows.append([clean(e.type), clean(place), clean(e.key or "-"), version, clean(listening)])
    lines = aligned(rows, left="lllrl")
    out(lines[0])
    for e, line in zip(found, lines[1:], strict=True):
        out(line)
        out(dim(f"  {clean(e.name) if e.name else 'not in this code, only views of it'}"))
        for view in e.views:
            out(dim(f"  view {clean(view)}"))
    out()
    out(f"{count(len(found), 'type')}. Who publishes them, and who reads them elsewhere, is not known from the code.")
    return 0


def check_events(
    old: Old = None,
    new: New = None,
    /,
    *,
    update: Update = False,
    lock: LockFile = None,
    app: AppName = None,
    json: Json = False,
) -> int:
    """Say what has changed since the lock, and which change breaks a reader; or what changed from one lock to another.

    The lock (`unlost.events.lock`, to be committed) has the fields of each event and command as they were agreed. What
    breaks: a class that cannot read what is in the log, a release still running that cannot read what the new one
    publishes, a topic, key, type or version by which history is lost. Also: names that do not say what happened or is to
    be done, queues with two services, views of what is not there; these cannot be agreed to. Ends with 1 if something
    breaks.

    **Needs** your code, or two locks; no broker. `--update` writes the lock, nothing else.

    **Examples**

    - `unlost event check --update` the first time, and whenever a change is meant
    - `unlost event check` in CI
    - `unlost event check v1.lock v2.lock` what changed between two releases
    """
    if old is not None:
        if new is None or update or lock is not None or app is not None:
            raise UsageError(
                "UL1379", "two locks are compared with each other, and with nothing else", found=f"{old} and {new or 'no second one'}",
                fix="unlost event check OLD NEW",
            )  # fmt: skip
        found = compare(Path(old), Path(new))
    else:
        loaded = _load(app)
        found = check(loaded, project_classes(loaded), lock_path(lock), update=update)
    code = 1 if found.breaks else 0
    if json:
        print_json("event-check/1", {**msgspec.to_builtins(found), "breaks": found.breaks})
        return code
    _print_checked(found)
    return code


def usage(
    *,
    sizes: Sizes = False,
    lock: LockFile = None,
    app: AppName = None,
    broker: BrokerUrl = None,
    json: Json = False,
) -> int:
    """Say which service reads which field, which fields nobody asks for, and which events are the biggest.

    A handler whose parameter is a view reads the view's fields; one of the full class reads all. With a lock, fields that
    were added since are marked. With `--sizes` the newest events of each topic say how large each type is. Ends with 1 if
    a view cannot read its event.

    **Needs** your code; with `--sizes` the broker as well.

    **Examples**

    - `unlost event usage --app hello`
    - `unlost event usage --app hello --sizes` the biggest events first
    """
    path = lock_path(lock)
    before = read_lock(path)
    loaded = _load(app)
    found = event_usage(loaded, project_classes(loaded), before)
    wrong = [finding for event in found for finding in event.wrong]
    biggest = _sizes(loaded, app, broker) if sizes else None
    if json:
        members = {"lock": None if before is None else str(path), "events": msgspec.to_builtins(found)}
        print_json("event-usage/1", members if biggest is None else members | {"sizes": msgspec.to_builtins(biggest)})
        return 1 if wrong else 0
    for event in found:
        out(bold(clean(event.type)) + ("" if event.name else "  not in this code, only views of it"))
        if event.fields:
            for line in aligned([[clean(f.name), _read_by(f), _remark(f)] for f in event.fields], left="lll"):
                out(f"  {line}")
    _print_findings(wrong, agreed=False)
    if biggest is not None:
        _print_sizes(biggest)
    out()
    unread = sum(not f.by_view and not f.is_key for event in found for f in event.fields)
    out(f"{count(len(found), 'type')}, {count(unread, 'field')} that no view names, keys not counted")
    if before is None:
        note(f"what has been added is not known without a lock: {UPDATE}")
    return 1 if wrong else 0


def docs(*, out_folder: Out = None, app: AppName = None, json: Json = False) -> int:
    """Write what your events are for others to read: an AsyncAPI 3.1 document and a page.

    `asyncapi.json` has topics and queues, the events and commands on them with the schema of their data, and which
    services receive them, also by views. `index.html` is the same for people; it needs no network and no script.
    The same code gives the same bytes, so both may be committed. Who publishes is not known from the code.

    **Needs** your code; no broker.

    **Example**

    - `unlost event docs --app hello --out docs/events`
    """
    loaded = _load(app)
    folder = default_folder() if out_folder is None else Path(out_folder)
    document = event_document(loaded, project_classes(loaded))
    changed = write_docs(folder, document)
    types, channels = len(document["components"]["messages"]), len(document["channels"])
    if json:
        files = {"document": str(folder / DOCUMENT), "page": str(folder / PAGE)}
        print_json(
            "event-docs/1", {**files, "changed": [str(path) for path in changed], "types": types, "channels": channels}
        )
        return 0
    for name in (DOCUMENT, PAGE):
        out(f"{clean(folder / name)}  {'written' if folder / name in changed else 'says the same already'}")
    out(f"{count(types, 'type')} on {count(channels, 'channel')}")
    return 0


def erase(
    *,
    key: Annotated[str, Parameter(name="--key", help="The events of this key.")],
    reason: Annotated[str, Parameter(name="--reason", help="Why you do it; kept in the records.")],
    topic: Annotated[
        list[str] | None, Parameter(name="--topic", negative="", help="Only those of this topic. May be repeated.")
    ] = None,
    type: Annotated[
        list[str] | None, Parameter(name="--type", negative="", help="Only those of this type. May be repeated.")
    ] = None,
    store_only: Annotated[
        bool, Parameter(name="--store-only", negative="", help="Leave the log: it cannot be changed on Kafka.")
    ] = False,
    export: Annotated[
        list[str] | None,
        Parameter(name="--export", negative="", help="Also in this folder of `unlost store export`. May be repeated."),
    ] = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    operator: Operator = None,
    app: OfApp = None,
    broker: BrokerUrl = None,
    json: Json = False,
) -> int:
    """Erase what the events of a key say: personal data leaves log, shelf and waiting room.

    Id, source, type, version and time stay, so that positions, checks and books hold. What a service that does not run
    has not handled is counted as removed; a running service ends what it has in hand, and the rest counts as removed.
    Backups and exports made before keep the data, and on Kafka the log does. Ends with 5 if something is still to be done:
    the same command goes on.

    **Needs** only broker and store.

    **Examples**

    - `unlost event erase --key c-7 --reason "request 12" --dry-run`
    - `unlost event erase --key c-7 --reason "request 12" --yes`
    """
    what = erasing.chosen(key, topics=topic or (), types=type or ())
    exports = [Path(folder) for folder in export or ()]
    with looking(app, broker) as here:
        if dry_run or not yes:
            seen = erasing.survey(here, what, store_only=store_only, exports=exports)
            if dry_run:
                return _print_survey(seen, as_json=json)
            if seen.anything:
                confirmed("erase", _survey_lines(seen), "erase this for good?")

        def said(done: int, of: int) -> None:
            if of > erasing.BATCH:
                note(f"erased {done:,} of {of:,}")

        done = erasing.erase(
            here, what, operator=operator or login(), reason=reason, store_only=store_only, exports=exports, said=said
        )  # fmt: skip
    code = OutcomeUnknown.exit_code if done.left else 0
    if json:
        print_json("event-erase/1", {**msgspec.to_builtins(done), "dry_run": False})
        return code
    out(f"{count(done.log, 'event')} erased in the log; {count(done.removed, 'outcome')} of services removed")
    if done.discards:
        out(f"{count(done.discards, 'dead letter')} to be discarded by processes at work")
    if done.cancelled:
        out(f"{count(done.cancelled, 'delayed event')} cancelled")
    if exports:
        out(f"{count(done.exported, 'row')} erased in exports")
    for line in done.notes:
        note(clean(line))
    for line in done.left:
        note(warn(f"not done yet: {clean(line)}"))
    if done.left:
        note("the same command goes on; a service that is stopped holds nothing up")
    return code


def _print_survey(seen: erasing.Survey, *, as_json: bool) -> int:
    if as_json:
        print_json("event-erase/1", {**msgspec.to_builtins(seen), "dry_run": True})
        return 0
    for line in _survey_lines(seen):
        out(line)
    out("nothing was changed")
    return 0


def _survey_lines(seen: erasing.Survey) -> list[str]:
    lines = [f"{count(seen.log, 'event')} of the key to be erased in the log"]
    for c in seen.services:
        parts = [
            f"{number:,} {state}"
            for number, state in (
                (c.waiting, "waiting"), (c.in_flight, "in flight"), (c.retrying, "retrying"), (c.parked, "parked"),
                (c.dead, "dead"),
            )
            if number
        ]  # fmt: skip
        end = (
            "it runs: what it has before it ends by being handled, what is dead is discarded, the rest counts as removed"
            if c.runs
            else "these are removed"
        )
        lines.append(f"  {clean(c.service)} has not handled {c.unhandled:,}: {', '.join(parts)}; {end}")
    if seen.outbox:
        lines.append(f"  {count(seen.outbox, 'event')} in the outbox: erased when they have left it")
    if seen.delayed:
        lines.append(f"  {count(seen.delayed, 'delayed event')}: cancelled")
    if seen.exported:
        lines.append(f"  {count(seen.exported, 'row')} in exports")
    return lines + [clean(line) for line in seen.notes]


def _load(app: str | None) -> App:
    return load(app).app  # what it warned of is a name: `check` says it as a finding


def _read_by(f: FieldUse) -> str:
    readers = [*map(str, f.by_view), *(f"{reader} (all)" for reader in f.by_all)]
    return clean(", ".join(readers)) or "nobody"


def _remark(f: FieldUse) -> str:
    said = ["key"] * f.is_key
    if not f.by_view and not f.is_key:
        said.append("only by those that read all" if f.by_all else "unread")
    if f.added:
        wanted = ", ".join(clean(reader.view) for reader in f.by_view)
        said.append("added since the lock" + (f", wanted by {wanted}" if wanted else ", no view wants it"))
    return "; ".join(said)


def _sizes(loaded: App, app: str | None, broker: str | None) -> list[Size]:
    topics = {cls.__unlost__.topic or "" for cls in project_classes(loaded)}
    with looking(app, broker) as here:
        return event_sizes(here.log, topics)


def _print_sizes(found: Sequence[Size]) -> None:
    out()
    if not found:
        out("the log has none of these events yet")
        return
    rows = [["BYTES OF DATA", "on average", "the largest", "", "events looked at"]]
    rows += [[clean(s.type), f"{s.mean:,}", f"{s.largest:,}", dim(clean(s.largest_at)), f"{s.events:,}"] for s in found]
    for line in aligned(rows, left="lrrlr"):
        out(line)


def _print_checked(found: Checked) -> None:
    if found.changes:
        out("SINCE THE LOCK" if not found.agreed else "CHANGED")
        for change in found.changes:
            place = f"{change.type}.{change.field}" if change.field else change.type
            out(f"  {clean(place)}  {clean(change.what)}")
        out()
    _print_findings(found.findings, agreed=found.agreed)
    if found.agreed:
        out(f"{clean(found.lock)} {'written: commit it with the code' if found.written else 'says the same already'}")
    elif found.findings:
        out(warn(count(len(found.findings), "finding")))
    elif found.changes:
        out(f"nothing breaks; {UPDATE} brings the lock up to date")
    else:
        out("nothing has changed, nothing breaks")


def _print_findings(findings: Sequence[Finding], *, agreed: bool) -> None:
    titles = {
        "backward": "OLD EVENTS CANNOT BE READ", "forward": "OLD RELEASES CANNOT READ NEW EVENTS", "identity": "HISTORY IS LOST",
        "renamed": "RENAMED", "privacy": "SHOWN", "view": "VIEW", "name": "NAME", "queue": "QUEUE", "twice": "TWICE",
    }  # fmt: skip
    for finding in findings:
        place = clean(f"{finding.name}.{finding.field}" if finding.field else finding.name)
        known = agreed and finding.kind in AGREED_BY_UPDATE
        out(f"{warn(titles[finding.kind])}{' (agreed)' if known else ''}  {place}  {dim(clean(finding.type))}")
        out(f"  {clean(finding.what)}")
        if finding.hurts or finding.kind in AGREED_BY_UPDATE:
            out(f"  hurts  {clean(', '.join(finding.hurts)) or 'nobody in this App, perhaps readers elsewhere'}")
        out(f"  do     {clean(finding.fix)}")
