"""`unlost tail`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter

from unlost import config
from unlost.cli.options import AppName, BrokerUrl, JsonLines, looking, shown_bytes
from unlost.cli.say import clean, dim, interrupted, key_text, note, out, print_json
from unlost.errors import UsageError
from unlost.ops.load import load
from unlost.ops.publish import shown_data
from unlost.ops.tail import Seen, Tail, moment
from unlost.world import rfc3339

LAST = 20


def tail(
    type: Annotated[str | None, Parameter(help="Only this wire type, or this class name.")] = None,
    /,
    *,
    key: Annotated[str | None, Parameter(help="Only this key.")] = None,
    from_: Annotated[
        str | None, Parameter(name="--from", help="From this time on: 2026-11-23T14:00Z, 10m (ago), or start.")
    ] = None,
    follow: Annotated[
        bool, Parameter(name=["--follow", "-f"], negative="", help="Wait for more events, until Ctrl-C.")
    ] = False,
    limit: Annotated[
        int | None, Parameter(name=["--limit", "-n"], help=f"At most so many. Without --from: the last {LAST}.")
    ] = None,
    data: Annotated[
        bool, Parameter(name="--data", negative="", help="Show the data; needs your code to know what is sensitive.")
    ] = False,
    raw: Annotated[
        bool, Parameter(name="--raw", negative="", help="Show the data as stored, sensitive or not.")
    ] = False,
    app: AppName = None,
    broker: BrokerUrl = None,
    json: JsonLines = False,
) -> int:
    """Show events as they stand in the log.

    A line has the time of recording, wire type, key, place in the log and id. Data are shown only when asked for:
    with `--data` fields that your code calls `Sensitive` read `***`. Looking takes nothing from anybody.

    **Needs** the broker; with `--data` also your code.

    **Examples**

    - `unlost tail -f` shows the last 20 events, then those that come
    - `unlost tail OrderPlaced --key A1 --from 10m --data --app hello`
    - `unlost tail --from start --json | jq .type` reads the whole log
    """
    if limit is not None and limit < 0:
        raise UsageError("UL1330", "a limit is not negative", found=str(limit))
    since = None if from_ is None else moment(from_)
    show = "raw" if raw else "data" if data else "none"
    if show == "data" and app is None and config.setting("app").value:
        load()
    with looking(app, broker) as here:
        source = Tail(here.log, type=type, key=key)
        source.stopped = interrupted.is_set
        shown = 0
        try:
            for seen in _events(source, since, follow, limit):
                (_print_json if json else _print_line)(seen, show)
                shown += 1
                if follow:
                    sys.stdout.flush()
        except KeyboardInterrupt:
            return 0 if follow else 130  # Ctrl-C is how following ends
        if not shown and not json:
            what = " ".join(filter(None, [type or "", f"with key {key}" if key is not None else ""]))
            note(f"no events {clean(what)}".rstrip() + f" in {clean(here.name)}")
    return 0


def _events(source: Tail, since: int | None, follow: bool, limit: int | None) -> Iterator[Seen]:
    if since is None:
        yield from source.last(LAST if limit is None else limit)
        if follow:
            yield from source.follow()
        return

    def all() -> Iterator[Seen]:
        yield from source.since(since)
        if follow:
            yield from source.follow()

    yield from islice(all(), limit)


def _print_line(seen: Seen, show: str) -> None:
    (topic, partition), a = seen
    when = rfc3339(a.recorded)[:23] + "Z"
    place = f"{topic}/{partition}:{a.position}"
    if a.envelope is None:
        out(f"{when}  (no event: {clean(' '.join(a.problem.split()), 100)})  {key_text(a.key)}  {place}")
        if show == "raw":
            out("    " + clean((a.data or b"").decode("utf-8", "backslashreplace")))
        return
    e = a.envelope
    out(f"{when}  {clean(e.type)}  {key_text(a.key)}  {dim(place + '  ' + clean(e.id))}")
    if show == "raw":
        out("    " + clean((e.data or b"").decode("utf-8", "backslashreplace")))
    elif show == "data":
        data = shown_data(e)
        hidden = "(hidden: your code has no class for it; --raw shows it)"
        out("    " + (hidden if data is None else clean(msgspec.json.encode(data).decode())))


def _print_json(seen: Seen, show: str) -> None:
    (topic, partition), a = seen
    e = a.envelope
    members: dict[str, Any] = {
        "topic": topic, "partition": partition, "position": a.position, "recorded": rfc3339(a.recorded),
        **shown_bytes("key", a.key),
    }  # fmt: skip
    if e is None:
        members["problem"] = a.problem
    else:
        members |= {
            "id": e.id, "source": e.source, "type": e.type, "version": e.eventversion, "time": e.time,
            "correlationid": e.correlationid, "causationid": e.causationid, "traceparent": e.traceparent,
        }  # fmt: skip
        if show == "data":
            members["data"] = shown_data(e)
    if show == "raw":
        members |= shown_bytes("data", a.data)
    print_json("event/1", members, flush=False)
