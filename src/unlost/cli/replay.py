"""`unlost replay`: past events delivered again."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter

from unlost import config
from unlost.app import App
from unlost.cli.options import (
    AppName,
    BrokerUrl,
    Json,
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
from unlost.cli.run import log_to_stderr
from unlost.cli.say import bold, clean, clean_lines, note, out, print_json
from unlost.errors import Damaged, OutcomeUnknown, UsageError
from unlost.ops.connect import Looking, opened
from unlost.ops.load import load
from unlost.ops.replay import begin, carry_out, refusal
from unlost.ops.replay_end import cancel as cancel_one
from unlost.ops.replay_plan import Asked, Plan, plan
from unlost.ops.replay_state import Listed, Replay, Tally, find, same, unfinished
from unlost.world import REAL, rfc3339

LINE_SECONDS = 10.0  # between two lines of progress where there is no terminal


def replay(
    *,
    service: Annotated[
        str | None, Parameter(name=["--service", "-s"], help="Whose handlers get the events again.")
    ] = None,
    type: Annotated[
        list[str] | None,
        Parameter(name="--type", negative="", help="Only these wire types or classes; may be repeated."),
    ] = None,
    key: Annotated[str | None, Parameter(name="--key", help="Only this key.")] = None,
    from_: Annotated[
        list[str] | None,
        Parameter(
            name="--from", negative="", help="A time, 2h (ago), or TOPIC/PARTITION:POSITION, which may be repeated."
        ),
    ] = None,
    to: Annotated[
        list[str] | None, Parameter(name="--to", negative="", help="The same: the first that is not replayed.")
    ] = None,
    into: Annotated[str | None, Parameter(name="--into", help="The replay's own name; it must be new.")] = None,
    again: Annotated[
        bool, Parameter(name="--again", negative="", help="Also what is handled effectively once, and commands.")
    ] = False,
    what_is_left: Annotated[
        bool, Parameter(name="--what-is-left", negative="", help="Although part of it is not in the log any more.")
    ] = False,
    rate: Annotated[float | None, Parameter(name="--rate", help="At most so many events per second.")] = None,
    dry_run: Annotated[
        bool, Parameter(name="--dry-run", negative="", help="Only say what would be delivered.")
    ] = False,
    resume: Annotated[str | None, Parameter(name="--resume", help="Go on with the replay of this name.")] = None,
    cancel: Annotated[str | None, Parameter(name="--cancel", help="End the replay of this name for good.")] = None,
    list_: Annotated[bool, Parameter(name="--list", negative="", help="Show those that have not finished.")] = False,
    reason: Why = "",
    yes: Yes = False,
    operator: Operator = None,
    app: AppName = None,
    broker: BrokerUrl = None,
    json: Json = False,
) -> int:
    """Deliver past events to a service's handlers again.

    They keep their ids; `ctx.replaying` is true. The service goes on with live events meanwhile, and its positions do not
    move: a replay has a name (`billing.replay-1`) and books of its own. The order of a key holds within the replay.

    Ctrl-C pauses it; the same command again, or `--resume`, goes on there. It ends with code 5 while something is dead, or
    left.

    **Needs** your code, the broker and the store; `--list` and `--cancel` only the last two.

    **Examples**

    - `unlost replay --service billing --from 2h --dry-run --app shop`
    - `unlost replay --service billing --type OrderPlaced --key A1 --app shop --reason "wrong rate"`
    - `unlost replay --resume billing.replay-1 --app shop`
    """
    asked = service is not None
    if sum([asked, resume is not None, cancel is not None, list_]) != 1:
        raise UsageError(
            "UL1419", "say what to replay", found="--service, --resume, --cancel or --list: one of them",
            fix="unlost replay --service billing --from 2h --dry-run --app shop",
        )  # fmt: skip
    if not asked and (type or key is not None or from_ or to or into or again or what_is_left):
        raise UsageError(
            "UL1419", "what a replay delivers is fixed when it begins", found="a filter without --service",
            fix="leave the filters out; for others begin a new one",
        )  # fmt: skip
    if rate is not None and not (math.isfinite(rate) and rate > 0):
        raise UsageError("UL1419", "--rate is a number of events per second", found=str(rate), fix="--rate 100")
    who = operator or login()
    if list_:
        return _list(app, broker, json)
    if cancel is not None:
        return _cancel(cancel, who, reason, dry_run, yes, app, broker, json)
    loaded = load(app, broker=broker)
    with _looking_with(loaded.app) as here:
        if resume is not None:
            found = find(here.records, resume)
        else:
            assert service is not None
            serves = loaded.app.chosen([service])[0]
            wanted = Asked(
                service=service, types=tuple(type or ()), key=key, start=tuple(from_ or ()), end=tuple(to or ()), into=into,
                again=again, what_is_left=what_is_left,
            )  # fmt: skip
            before = same(here.records, wanted)
            if before is not None:
                found = before
            else:
                planned = plan(here, loaded.app, wanted)
                if dry_run:
                    return _say_plan(planned, loaded.app, json)
                refused = refusal(planned, serves)
                if refused is not None:
                    raise refused
                if not yes:
                    confirmed("replay", _plan_lines(planned), f"deliver {count(planned.events, 'event')} again?")
                found = begin(here, serves, planned, operator=who, reason=reason, rate=rate)
    if dry_run:
        if json:
            print_json("replay/1", {"state": "open", "name": found.name})
        else:
            out(f"it would go on with {clean(found.name)}; nothing was changed")
        return 0
    return _run(loaded.app, found, rate, json)


def _run(app: App, found: Replay, rate: float | None, json: bool) -> int:
    log_to_stderr("warning" if config.setting("log").source == "default" else None)
    note(
        f"{clean(found.name)}: {count(found.kept.plan.events, 'event')} of {clean(found.kept.plan.asked.service)}; Ctrl-C pauses it"
    )
    progress = _Progress(found.name)
    tally = app.until_signal(lambda: carry_out(app, found, rate=rate, tell=progress))
    progress.end()
    if json:
        print_json("replay/1", {"state": _state(tally), "name": found.name, **_tally_json(tally)})
    else:
        out(_result(found.name, tally))
        if not tally.finished:
            note(f"go on: unlost replay --resume {clean(found.name)} --app …")
        elif tally.dead:
            note(
                f"unlost dead list --service {clean(found.name)}; redriven ones: unlost replay --resume {clean(found.name)}"
            )
    if tally.unaccounted:
        return Damaged.exit_code
    return 0 if tally.complete else OutcomeUnknown.exit_code


class _Progress:
    """Says how far it is: on a terminal in one line that changes."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._first: tuple[float, int] | None = None
        self._said = REAL.monotonic()
        self._live = sys.stderr.isatty()

    def __call__(self, tally: Tally) -> None:
        now, gone = REAL.monotonic(), tally.events - tally.left
        if self._first is None:
            self._first = (now, gone)
        seconds = now - self._first[0]
        speed = (gone - self._first[1]) / seconds if seconds > 0 else 0.0
        line = f"{gone:,} of {tally.events:,}"
        if speed:
            line += f"   {speed:,.0f} events/s   {span(tally.left / speed)} left"
        if self._live:
            sys.stderr.write(f"\r\x1b[K{clean(self._name)}  {line}")
            sys.stderr.flush()
        elif now - self._said >= LINE_SECONDS:
            self._said = now
            note(f"{clean(self._name)}  {line}")

    def end(self) -> None:
        if self._live:
            sys.stderr.write("\r\x1b[K")


def _list(app: str | None, broker: str | None, json: bool) -> int:
    with looking(app, broker) as here:
        found = unfinished(here.records)
    if json:
        print_json("replays/1", {"replays": [_listed_json(x) for x in found]})
        return 0
    if not found:
        out("no replay is open")
        return 0
    now = REAL.now()
    rows = [
        [
            clean(x.replay.name), _where(x), f"{x.tally.events - x.tally.left:,} of {x.tally.events:,}", f"{x.tally.dead:,}",
            f"{span(max(0, now - x.replay.begun) / 1e6)} ago by {clean(x.replay.operator)}", clean(x.replay.reason, 40),
        ]
        for x in found
    ]  # fmt: skip
    for line in aligned([["REPLAY", "state", "events", "dead", "begun", "reason"], *rows], left="llrrll"):
        out(line)
    return 0


def _cancel(
    name: str, who: str, reason: str, dry_run: bool, yes: bool, app: str | None, broker: str | None, json: bool
) -> int:
    with looking(app, broker) as here:
        found = next((x for x in unfinished(here.records) if x.replay.name == name), None)
        if found is None:
            find(here.records, name)
        assert found is not None
        kept = found.tally.left + found.tally.dead + found.tally.parked + found.tally.retrying
        if dry_run:
            if json:
                print_json("replay/1", {"state": "open", "name": name, **_tally_json(found.tally)})
            else:
                out(f"{count(kept, 'event')} would be removed; nothing was changed")
            return 0
        if not yes:
            confirmed("cancel", [], f"end {clean(name)}, and remove {count(kept, 'event')} from it?")
        tally = cancel_one(here, name, operator=who, reason=reason)
    if json:
        print_json("replay/1", {"state": "cancelled", "name": name, **_tally_json(tally)})
    else:
        out(_result(name, tally))
    return 0


def _say_plan(planned: Plan, app: App, json: bool) -> int:
    refused = refusal(planned, app.chosen([planned.asked.service])[0])
    if json:
        kinds = [{**msgspec.to_builtins(k), "first": rfc3339(k.first), "last": rfc3339(k.last)} for k in planned.kinds]
        members = {
            "state": "planned", "service": planned.asked.service, "events": planned.events, "kinds": kinds,
            "parts": msgspec.to_builtins([p for p in planned.parts if p.events]), "gone": planned.gone,
            "refused": None if refused is None else refused.code,
        }  # fmt: skip
        print_json("replay/1", members)
        return 0
    for line in _plan_lines(planned):
        out(line)
    out(
        f"{count(planned.events, 'event')} would be delivered to {clean(planned.asked.service)} again; nothing was changed"
    )
    if refused is not None:
        note(clean_lines(refused))
    return 0


def _plan_lines(planned: Plan) -> list[str]:
    rows = [
        [
            clean(k.topic),
            clean(k.type) or "(no event)",
            f"{k.events:,}",
            f"{rfc3339(k.first)[:19]}Z",
            f"{rfc3339(k.last)[:19]}Z",
        ]
        for k in planned.kinds
    ]
    lines = aligned([["TOPIC", "type", "events", "first", "last"], *rows], left="llrll")
    return lines + [f"gone: {clean(line)}" for line in planned.gone]


def _result(name: str, tally: Tally) -> str:
    parts = [f"{tally.done:,} done"]
    parts += [f"{n:,} skipped ({clean(rule)})" for rule, n in sorted(tally.skipped.items())]
    for state in ("dead", "parked", "retrying", "removed", "abandoned", "expired", "left"):
        if number := getattr(tally, state):
            parts.append(f"{number:,} {state}")
    if tally.unaccounted:
        parts.append(bold(f"{tally.unaccounted:,} UNACCOUNTED: unlost audit"))
    return f"{clean(name)}: of {count(tally.events, 'event')} {', '.join(parts)}"


def _state(tally: Tally) -> str:
    return "paused" if not tally.finished else "complete" if tally.complete else "incomplete"


def _where(x: Listed) -> str:
    if x.running:
        return f"running, pid {', '.join(map(str, x.running))}"
    return "paused" if x.replay.ended is None else "ended"


def _tally_json(tally: Tally) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.to_builtins(tally)
    return found


def _listed_json(x: Listed) -> dict[str, Any]:
    return {
        "name": x.replay.name, "service": x.replay.kept.plan.asked.service, "operator": x.replay.operator,
        "reason": x.replay.reason, "begun": rfc3339(x.replay.begun),
        "ended": None if x.replay.ended is None else rfc3339(x.replay.ended), "running": x.running,
        "asked": msgspec.to_builtins(x.replay.kept.plan.asked), **_tally_json(x.tally),
    }  # fmt: skip


@contextmanager
def _looking_with(app: App) -> Iterator[Looking]:
    """At the broker and the store of this App."""
    with opened(app.broker_url, store=app.store_url, decoders=app.decoders) as here:
        yield here
