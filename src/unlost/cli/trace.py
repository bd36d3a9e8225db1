"""`unlost trace`."""

from __future__ import annotations

import sys
from typing import Annotated, Any

from cyclopts import Parameter

from unlost import config
from unlost.cli.options import BrokerUrl, Json, count, looking, shown_bytes
from unlost.cli.say import bold, clean, dim, key_text, note, out, print_json, warn
from unlost.ops.trace import EVENTS_MAX, FLOWS, FLOWS_MAX, UNSURE, Branch, Flow, Trace, Traced
from unlost.ops.trace import trace as traced
from unlost.world import REAL, rfc3339

ID_WIDTH, ID_END = 20, 12  # of an id that is longer its end is shown: ids of one moment begin alike
DEPTH_MAX = 20  # of indenting
STATE_WIDTH = 19
QUIET = (UNSURE, "skipped(no handler)", "before its start")
LOUD = ("dead", "unaccounted", "unaccountable", "expired", "abandoned")


def trace(
    key_or_id: Annotated[str, Parameter(help="A key, an event's id, or the beginning or end of an id.")],
    /,
    *,
    limit: Annotated[
        int, Parameter(name=["--limit", "-n"], help=f"At most so many flows, the newest. Else {FLOWS}.")
    ] = FLOWS,
    app: Annotated[str | None, Parameter(name="--app", help="Your code: it says which service has a handler.")] = None,
    broker: BrokerUrl = None,
    json: Json = False,
) -> int:
    """Show a whole flow: what caused what, and where each branch stands.

    For each event and each service of its topic: done, waiting, in flight, retrying (attempts, due time), parked, dead
    (why, and how to look), skipped, removed. Data are never shown. What the store does not say is called so: events that
    are done or skipped are counted there, not listed. `--app` tells most of these apart.

    **Takes** milliseconds on the embedded broker, which keeps an index beside its file; on Kafka as long as reading the log.

    **Needs** the broker and the store; with `--app` also your code.

    **Examples**

    - `unlost trace order-00017` an order, by its key or its event's id
    - `unlost trace 00005 -n 3 --app shop` the last three flows of a customer
    - `unlost trace order-00017 --json | jq '.flows[].events[].branches'`
    """
    services = None
    if app is not None:
        from unlost.ops.load import load

        services = load(app).app.services
    with looking(app, broker) as here:
        found = traced(here, key_or_id, limit=limit, services=services)
        name, elsewhere, lost = here.name, here.elsewhere, here.lost
    if json:
        print_json("trace/1", {"broker": name, **_json(found), "elsewhere": elsewhere})
        return 0
    if found.by == "part of an id":
        out(dim(f"no key and no id is {clean(key_or_id)}; these are ids that begin or end so"))
    for n, flow in enumerate(found.flows):
        if n:
            out()
        _print_flow(flow)
    out()
    _print_end(found, app)
    for _, text in lost:
        note(warn(clean(text), sys.stderr))
    if elsewhere:
        note(f"kept in another store (UNLOST_STORE names one at a time): {', '.join(map(clean, elsewhere))}")
    return 0


def _print_flow(flow: Flow) -> None:
    for e in flow.events:
        line = f"{_moment(e.recorded)}  {_indent(e)}{_title(e)}"
        out(bold(line) if e.meant else line)
        pad = " " * (26 + 2 * min(e.depth, DEPTH_MAX) + 2)
        if not e.cause_found:
            out(dim(f"{pad}caused by {clean(e.cause)}, which the log does not hold (any more) in this flow"))
        if not e.in_log:
            out(dim(f"{pad}the log does not hold it any more; the store keeps it"))
        for text, quiet, loud in _lines(e):
            out(pad + (dim(text) if quiet else warn(text) if loud else text))
    if flow.cut:
        out(dim(f"  … and more: only the first {EVENTS_MAX:,} events of this flow are shown"))


def _title(e: Traced) -> str:
    if not e.id:
        return f"(no event: {clean(' '.join(e.problem.split()), 100)})  {key_text(e.key)}  {clean(e.topic)}/{e.partition}:{e.position}"
    return f"{clean(e.type)}  {key_text(e.key)}  {dim(f'{_short(e.id)}  from {clean(e.source)}')}"


def _indent(e: Traced) -> str:
    return "  " * (min(e.depth, DEPTH_MAX) - 1) + "└ " if e.depth else ""


def _lines(e: Traced) -> list[tuple[str, bool, bool]]:
    """One for each state, with all services that are in it and what there is to say; whether it is quiet or loud."""
    services: dict[tuple[str, str, str], list[str]] = {}
    for b in sorted(e.branches, key=lambda b: b.state in QUIET):
        services.setdefault((b.state, _first(b), _more(b)), []).append(clean(b.service))
    lines = []
    for (state, first, more), names in services.items():
        quiet, loud = state in QUIET, state in LOUD
        lines.append(
            (f"{clean(state):<{STATE_WIDTH}}  {', '.join(names)}" + (f"  {first}" if first else ""), quiet, loud)
        )
        if more:
            lines.append((" " * (STATE_WIDTH + 2) + more, quiet, False))
    return lines


def _first(b: Branch) -> str:
    """What matters most of it: why it died, or when it goes on."""
    if b.reason:
        return clean(" ".join(f"{b.reason}: {b.error}".split()), 200)
    if b.due is not None:
        return "due now" if b.due <= REAL.now() else f"next at {_moment(b.due)}"
    return ""


def _more(b: Branch) -> str:
    parts = []
    if b.attempts:
        last = b.attempts[-1]
        said = "" if b.reason else f" (the last {_moment(last.at)}: {' '.join(last.error.split())})"
        parts.append(f"{count(len(b.attempts), 'attempt')} failed{said}")
    if b.state == "dead" and b.since is not None:
        parts.append(f"died {_moment(b.since)}")
    if b.why:
        parts.append(b.why)
    if b.letter is not None:
        parts.append(f"unlost dead show {b.letter}")
    return clean("; ".join(parts), 300)


def _print_end(found: Trace, app: str | None) -> None:
    events = [e for flow in found.flows for e in flow.events]
    states = {b.state for e in events for b in e.branches}
    if found.older:
        out(dim(f"older flows are not shown: --limit {min(2 * len(found.flows), FLOWS_MAX)}"))
    if UNSURE in states:
        text = "done or skipped: the store counts these and does not list them"
        code = clean(config.setting("app").value) or "YOUR_APP"
        out(dim(text + ("" if app else f"; --app {code} says which service has a handler")))
    if found.unknown:
        note(f"where the branches stand is not known: {clean(found.unknown)}")
    elif any(not e.branches for e in events):
        out(dim("an event without a line under it: no service has been on its topic"))
    if found.outbox:
        out(
            warn(
                f"{count(found.outbox, 'event')} in the outbox and in no log yet; whether they belong here is not known"
            )
        )
    flows, read = count(len(found.flows), "flow"), count(found.events_read, "event")
    out(dim(f"{count(len(events), 'event')} in {flows}; the log has {read} in {count(found.topics, 'topic')}"))


def _short(id: str) -> str:
    text = clean(id)
    return text if len(text) <= ID_WIDTH else "…" + clean(id[-ID_END:])


def _moment(micros: int) -> str:
    return rfc3339(micros)[:23] + "Z"


def _json(found: Trace) -> dict[str, Any]:
    return {
        "asked": found.asked, "by": found.by, "older": found.older, "topics": found.topics,
        "events_read": found.events_read, "outbox": found.outbox, "unknown": found.unknown or None,
        "flows": [
            {"id": flow.id, "cut": flow.cut, "events": [_event_json(e) for e in flow.events]} for flow in found.flows
        ],
    }  # fmt: skip


def _event_json(e: Traced) -> dict[str, Any]:
    return {
        "topic": e.topic, "partition": e.partition, "position": e.position, "recorded": rfc3339(e.recorded),
        **shown_bytes("key", e.key), "id": e.id or None, "source": e.source or None, "type": e.type or None,
        "time": e.time or None, "correlationid": e.correlation, "causationid": e.cause, "depth": e.depth,
        "cause_found": e.cause_found, "in_log": e.in_log, "meant": e.meant, "problem": e.problem or None,
        "branches": [_branch_json(b) for b in e.branches],
    }  # fmt: skip


def _branch_json(b: Branch) -> dict[str, Any]:
    return {
        "service": b.service, "state": b.state, "why": b.why or None, "since": _time(b.since), "due": _time(b.due),
        "attempts": [{"number": a.number, "at": rfc3339(a.at), "error": a.error} for a in b.attempts],
        "dead_letter": b.letter, "reason": b.reason or None, "error": b.error or None,
    }  # fmt: skip


def _time(micros: int | None) -> str | None:
    return None if micros is None else rfc3339(micros)
