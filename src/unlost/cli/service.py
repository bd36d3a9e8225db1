"""`unlost service`: the services that run on a broker, or have run on it: looking, and what is done with a whole one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter

from unlost.cli.options import (
    BrokerUrl,
    DryRun,
    Json,
    OfApp,
    Operator,
    Why,
    Yes,
    aligned,
    confirmed,
    count,
    login,
    looking,
    span,
)
from unlost.cli.say import bold, clean, clean_lines, note, out, print_json, warn
from unlost.errors import Unavailable, UsageError
from unlost.ops import service_change
from unlost.ops.connect import Looking
from unlost.ops.service import Owner, ServiceView, service, services
from unlost.ops.service_change import Change
from unlost.ops.status import ProcessStatus, Status
from unlost.world import REAL, rfc3339

Name = Annotated[str, Parameter(help="The service, as `unlost service list` calls it.")]


def service_list(*, app: OfApp = None, broker: BrokerUrl = None, json: Json = False) -> int:
    """List the services: who runs them, what they read, and how far behind they are.

    **Needs** only the broker and the store.

    **Examples**

    - `unlost service list`
    - `unlost service list --json | jq '.services[] | select(.running == 0) | .name'`
    """
    with looking(app, broker) as here:
        found = services(here)
    if json:
        members = [{k: v for k, v in _json(view).items() if k != "units"} for view in found.services]
        print_json("services/1", {**_where(found.status), "services": members})
        return _code(found.status)
    if not found.services:
        out("no service has run on it yet: unlost run")
    else:
        titles = ["SERVICE", "running", "partitions", "waiting", "dead", "on dead", "reads"]
        rows = [
            [
                clean(v.status.name), _running(v), f"{v.status.owned} of {v.status.partitions}",
                f"{v.status.waiting:,}", f"{v.status.dead:,}", clean(v.status.on_dead), _reads(v),
            ]
            for v in found.services
        ]  # fmt: skip
        for line in aligned([titles, *rows], left="lrrrrll"):
            out(line)
        now = REAL.now()
        for v in found.services:
            if v.status.hold is not None:
                out(f"{bold(clean(v.status.name))}: {clean(v.status.hold)}")
            if not v.status.alive:
                out(f"{bold(clean(v.status.name))}: nobody runs it; {_last_sign(v, now)}")
    _say_unreachable(found.status)
    return _code(found.status)


def service_show(name: Name, *, app: OfApp = None, broker: BrokerUrl = None, json: Json = False) -> int:
    """Show one service: its processes, what it has registered, and each of its partitions.

    A partition has the process that took it last and has not left it; `gone` is one that died and that nobody has
    followed yet. `waiting` counts the events of the log that have not been given to a handler.

    **Needs** only the broker and the store.

    **Examples**

    - `unlost service show billing`
    - `unlost service show billing --json | jq '.units[] | select(.owner == null)'`
    """
    with looking(app, broker) as here:
        view, status = service(here, name)
    if json:
        print_json("service/1", {**_where(status), **_json(view)})
        return _code(status)
    now, s = REAL.now(), view.status
    facts = [
        ["service", clean(s.name)],
        ["since", f"{rfc3339(view.created)[:19]}Z, {_ago(view.created, now)}"],
        ["on dead", clean(s.on_dead)],
        ["reads", _reads(view)],
        ["run by", ", ".join(map(_process, s.processes)) if s.alive else f"nobody; {_last_sign(view, now)}"],
        ["next retry", "-" if s.next_retry is None else f"{rfc3339(s.next_retry)[:19]}Z"],
    ]
    if s.hold is not None:
        facts.insert(1, ["held", clean(s.hold)])
    for line in aligned(facts, left="ll"):
        out(line)
    if view.partitions:
        out()
        titles = ["PARTITION", "position", "waiting", "in flight", "retrying", "parked", "dead", "for", "owner"]
        rows = [
            [
                clean(f"{p.topic}/{p.partition}"), f"{p.position:,}", f"{p.waiting:,}", f"{p.in_flight:,}",
                f"{p.retrying:,}", f"{p.parked:,}", f"{p.dead:,}",
                "-" if p.owner is None or p.owner.since is None else span(max(0, now - p.owner.since) / 1e6),
                _owner(p.owner),
            ]
            for p in view.partitions
        ]  # fmt: skip
        for line in aligned([titles, *rows], left="lrrrrrrrl"):
            out(line)
    for todo in s.todo:
        out(f"{bold(clean(s.name))}: {clean(todo)}")
    _say_unreachable(status)
    return _code(status)


def pause(
    name: Name,
    *,
    reason: Why = "",
    dry_run: DryRun = False,
    yes: Yes = False,
    operator: Operator = None,
    app: OfApp = None,
    broker: BrokerUrl = None,
    json: Json = False,
) -> int:
    """Pause a service: in no process it begins anything new, until it is resumed.

    What is in its handlers comes to its end. Events are accepted as before and wait; other services go on. It is paused
    across restarts; its processes notice it within a second.

    **Needs** only the store.

    **Examples**

    - `unlost service pause billing --reason "card service is away"`
    """

    def act(here: Looking, dry: bool) -> Change:
        return service_change.pause(here, name, operator=operator or login(), reason=reason, dry_run=dry)

    return _change(act, f"pause {name}?", dry_run, yes, app, broker, json)


def resume(
    name: Name,
    *,
    reason: Why = "",
    dry_run: DryRun = False,
    yes: Yes = False,
    operator: Operator = None,
    app: OfApp = None,
    broker: BrokerUrl = None,
    json: Json = False,
) -> int:
    """Let a service work again that was paused or retired.

    It goes on where it was. One that was retired handles what came since then; if the log has let go of some of that, it
    is refused.

    **Needs** only the store; with the embedded broker its log as well.

    **Examples**

    - `unlost service resume billing`
    """

    def act(here: Looking, dry: bool) -> Change:
        return service_change.resume(here, name, operator=operator or login(), reason=reason, dry_run=dry)

    return _change(act, f"resume {name}?", dry_run, yes, app, broker, json)


def retire(
    name: Name,
    *,
    reason: Why = "",
    dry_run: DryRun = False,
    yes: Yes = False,
    operator: Operator = None,
    app: OfApp = None,
    broker: BrokerUrl = None,
    json: Json = False,
) -> int:
    """End a service that will never come back; the books count what it had not handled as removed.

    It no longer holds trimming back. Its waiting events and dead letters are removed; the events stay in the log. Stop
    its processes first.

    **Needs** the store and the broker.

    **Examples**

    - `unlost service retire billing --dry-run`
    - `unlost service retire billing --reason "invoicing does it now"`
    """
    if not (reason or dry_run):
        raise UsageError(
            "UL1449", "retiring a service needs a reason; it is kept in the records", fix=f'unlost service retire {name} --reason "…"'
        )  # fmt: skip

    def act(here: Looking, dry: bool) -> Change:
        return service_change.retire(here, name, operator=operator or login(), reason=reason, dry_run=dry)

    return _change(act, f"retire {name}?", dry_run, yes, app, broker, json)


def rename(
    old: Annotated[str, Parameter(help="The service, as `unlost service list` calls it.")],
    new: Annotated[str, Parameter(help="Its new name.")],
    *,
    reason: Why = "",
    dry_run: DryRun = False,
    yes: Yes = False,
    operator: Operator = None,
    app: OfApp = None,
    broker: BrokerUrl = None,
    json: Json = False,
) -> int:
    """Give a service another name, with all that is kept of it.

    Its positions, what waits, its dead letters, its books and what it has handled go on under the new name. Stop its
    processes, rename, start the code with the new name. A start with the old one is refused.

    **Needs** only the store.

    **Examples**

    - `unlost service rename billing invoicing --reason "as the team calls it"`
    """

    def act(here: Looking, dry: bool) -> Change:
        return service_change.rename(here, old, new, operator=operator or login(), reason=reason, dry_run=dry)

    return _change(act, f"rename {old} to {new}?", dry_run, yes, app, broker, json)


def _change(
    act: Callable[[Looking, bool], Change],
    question: str,
    dry_run: bool,
    yes: bool,
    app: str | None,
    broker: str | None,
    json: bool,
) -> int:
    with looking(app, broker) as here:
        found = act(here, True)  # says also what is wrong with it
        if not dry_run:
            if not yes:
                confirmed(found.action, [_would(found)], clean(question))
            found = act(here, False)
    if json:
        print_json(f"service-{found.action}/1", msgspec.to_builtins(found))
        return 0
    done = {"pause": "paused", "resume": "resumed", "retire": "retired", "rename": "renamed"}[found.action]
    name, to = bold(clean(found.service)), f" to {clean(found.to)}" if found.to else ""
    if dry_run:
        out(f"{_would(found)}; nothing was changed")
    elif not found.changed:
        out(f"{name}: nothing to do; " + (clean(found.hold) if found.hold else "nothing holds it"))
    else:
        removed = found.unhandled + found.aside
        out(f"{name} is {done}{to}" + (f"; {count(removed, 'event')} removed" if found.action == "retire" else ""))
    return 0


def _would(found: Change) -> str:
    name = clean(found.service)
    if found.action == "retire" and (found.unhandled or found.aside or found.partitions):
        return (
            f"{name} would be retired: {count(found.unhandled, 'event')} of the log not handled, {found.aside:,} waiting in "
            "the store or dead would be removed"
        )
    if found.action == "rename":
        kept = f"{count(found.partitions, 'partition')}, {found.aside:,} waiting in the store or dead"
        return f"{name} would be renamed to {clean(found.to)} ({kept})"
    now = clean(found.hold) if found.hold else "nothing holds it"
    return f"{found.action} {name}: at the moment {now}"


def _last_sign(view: ServiceView, now: int) -> str:
    """Since when nobody runs it is not known exactly: a process that dies writes nothing down."""
    if view.last_sign is None:
        return "it has taken no partition yet"
    return f"the last sign of it is from {rfc3339(view.last_sign)[:19]}Z, {_ago(view.last_sign, now)}"


def _ago(micros: int, now: int) -> str:
    return f"{span(max(0, now - micros) / 1e6)} ago"


def _running(view: ServiceView) -> str:
    hung = sum(p.hung for p in view.status.processes)
    return f"{view.status.alive} ({hung} hung)" if hung else str(view.status.alive)


def _reads(view: ServiceView) -> str:
    return ", ".join(f"queue {clean(t)}" if t in view.queues else clean(t) for t in view.topics) or "nothing"


def _process(p: ProcessStatus) -> str:
    state = "" if p.alive and not p.hung else " (hung)" if p.alive else " (gone)"
    return f"pid {p.pid}{_on(p.host)}{state} with {count(p.partitions, 'partition')}"


def _owner(owner: Owner | None) -> str:
    if owner is None:
        return "nobody"
    state = "" if owner.alive and not owner.hung else " (hung)" if owner.alive else " (gone)"
    return f"pid {owner.pid}{_on(owner.host)}{state}"


def _on(host: str) -> str:
    return f" on {clean(host)}" if host else ""


def _where(status: Status) -> dict[str, Any]:
    return {
        "broker": status.broker, "store": status.path, "unreachable": status.unreachable, "elsewhere": status.elsewhere
    }  # fmt: skip


def _json(view: ServiceView) -> dict[str, Any]:
    s = view.status
    partitions = msgspec.to_builtins(view.partitions)
    for found in partitions:
        if found["owner"] is not None:
            found["owner"]["since"] = _time(found["owner"]["since"])
    return {
        "name": s.name, "created": _time(view.created), "last_sign": _time(view.last_sign), "running": s.alive,
        "processes": msgspec.to_builtins(s.processes), "on_dead": s.on_dead, "topics": view.topics,
        "queues": view.queues, "hold": s.hold, "partitions": s.partitions, "owned": s.owned, "waiting": s.waiting,
        "in_flight": s.in_flight, "retrying": s.retrying, "parked": s.parked, "dead": s.dead,
        "oldest": _time(s.oldest), "next_retry": _time(s.next_retry), "todo": s.todo, "units": partitions,
    }  # fmt: skip


def _time(micros: int | None) -> str | None:
    return None if micros is None else rfc3339(micros)


def _say_unreachable(status: Status) -> None:
    if status.elsewhere:
        note(f"kept in another store (UNLOST_STORE names one at a time): {', '.join(map(clean, status.elsewhere))}")
    if status.unreachable is not None:
        note(warn("the broker does not answer; this is what the store knows", sys.stderr))
        note(clean_lines(status.unreachable))


def _code(status: Status) -> int:
    return 0 if status.unreachable is None else Unavailable.exit_code
