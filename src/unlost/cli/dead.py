"""`unlost dead`: the shelf. Looking, bringing back, throwing away."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, get_args

from cyclopts import Parameter

from unlost import config
from unlost.cli.options import (
    AppName,
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
    shown_bytes,
    span,
)
from unlost.cli.say import bold, clean, clean_lines, dim, key_text, note, out, print_json, warn
from unlost.errors import OutcomeUnknown, UnlostError, UsageError
from unlost.events.topic import Decoder
from unlost.ops.load import load
from unlost.ops.publish import shown_data
from unlost.ops.shelf import Action, Asked, ask, event_of, headers_of, letters
from unlost.store.port import DeadLetter, Reason, Records
from unlost.world import REAL, rfc3339

SHOWN_MAX = 1000
REASONS = get_args(Reason)

Which = Annotated[str | None, Parameter(help="The letter's number, or the event's id.")]
Key = Annotated[str | None, Parameter(name="--key", help="Those of this key.")]
OfService = Annotated[str | None, Parameter(name=["--service", "-s"], help="Those of this service.")]
ReasonIs = Annotated[str | None, Parameter(name="--reason-is", help=f"Those that died so: {', '.join(REASONS)}.")]
All = Annotated[bool, Parameter(name="--all", negative="", help="All that are on the shelf.")]


def dead_list(
    *,
    key: Key = None,
    service: OfService = None,
    reason_is: ReasonIs = None,
    app: OfApp = None,
    broker: BrokerUrl = None,
    json: Json = False,
) -> int:
    """List the dead letters.

    A dead letter is an event that could not be handled.

    **Needs** only the store.

    **Examples**

    - `unlost dead list --service billing`
    - `unlost dead list --reason-is rejected --json`
    """
    with looking(app, broker) as here:
        found = _find(here.records, None, key, service, reason_is)
        name = here.name
    if json:
        print_json("dead/1", {"broker": name, "letters": [_letter_json(letter) for letter in found]})
        return 0
    if not found:
        out(f"the shelf is empty{_matching(key, service, reason_is)}: {clean(name)}")
        return 0
    for line in _table(found[:SHOWN_MAX]):
        out(line)
    if len(found) > SHOWN_MAX:
        out(f"… and {len(found) - SHOWN_MAX:,} more (--json has them all)")
    behind = sum({(x.service, x.topic, x.partition, x.key): x.parked_behind for x in found}.values())
    out()
    out(f"{len(found):,} dead" + (f", {count(behind, 'more event')} behind them" if behind else ""))
    out(dim(f"unlost dead show {found[0].number} · unlost dead redrive {found[0].number} · unlost dead discard …"))
    return 0


def dead_show(
    which: Which,
    /,
    *,
    data: Annotated[
        bool, Parameter(name="--data", negative="", help="Show the data; needs your code to know what is sensitive.")
    ] = False,
    raw: Annotated[
        bool, Parameter(name="--raw", negative="", help="Show the data as stored, sensitive or not.")
    ] = False,
    app: AppName = None,
    broker: BrokerUrl = None,
    json: Json = False,
) -> int:
    """Show a dead letter: why it died, each attempt, where it stands.

    **Needs** the store; with `--data` also your code.

    **Examples**

    - `unlost dead show 3`
    - `unlost dead show 3 --data --app hello`
    """
    if data and app is None and config.setting("app").value:
        load()
    show = "raw" if raw else "data" if data else "none"
    with looking(app, broker) as here:
        found = _find(here.records, which, None, None, None)
        if json:
            whole = [_letter_json(letter, show, whole=True, decoder=here.decoder(letter.topic)) for letter in found]
            print_json("dead/1", {"letters": whole})
            return 0 if found else 1
        if not found:
            raise _none(which)
        for letter in found:
            _print_letter(letter, show, here.decoder(letter.topic))
    return 0


def redrive(
    which: Which = None,
    /,
    *,
    key: Key = None,
    service: OfService = None,
    reason_is: ReasonIs = None,
    all: All = False,
    dry_run: DryRun = False,
    reason: Why = "",
    yes: Yes = False,
    operator: Operator = None,
    app: OfApp = None,
    broker: BrokerUrl = None,
    json: Json = False,
) -> int:
    """Have dead letters handled again.

    What waits behind them goes on. Correct the handler first. The order per key is kept. The process that has the partition carries it out; without
    one it is done at once and handled when the service runs again.

    **Needs** only the store.

    **Examples**

    - `unlost dead redrive 3 --reason "card service is back"`
    - `unlost dead redrive --service billing --reason-is exhausted --dry-run`
    """
    return _act("redrive", which, key, service, reason_is, all, dry_run, reason, yes, operator, app, broker, json)


def discard(
    which: Which = None,
    /,
    *,
    key: Key = None,
    service: OfService = None,
    reason_is: ReasonIs = None,
    all: All = False,
    dry_run: DryRun = False,
    reason: Why = "",
    yes: Yes = False,
    operator: Operator = None,
    app: OfApp = None,
    broker: BrokerUrl = None,
    json: Json = False,
) -> int:
    """Give dead letters up; the books count them as removed.

    The service will never handle them. What waits behind them goes on. The event stays in the log; this cannot be undone.

    **Needs** only the store.

    **Examples**

    - `unlost dead discard 3 --reason "test order"`
    - `unlost dead discard --key A1 --dry-run`
    """
    return _act("discard", which, key, service, reason_is, all, dry_run, reason, yes, operator, app, broker, json)


def _act(
    action: Action,
    which: str | None,
    key: str | None,
    service: str | None,
    reason_is: str | None,
    all: bool,
    dry_run: bool,
    reason: str,
    yes: bool,
    operator: str | None,
    app: str | None,
    broker: str | None,
    json: bool,
) -> int:
    chosen_by = [which, key, service, reason_is]
    if all == any(value is not None for value in chosen_by):
        raise UsageError(
            "UL1332", f"say which dead letters to {action}" if not all else "--all means all: leave the other filters out",
            fix=f"unlost dead {action} NUMBER, --key, --service, --reason-is, or --all; look first: unlost dead list",
        )  # fmt: skip
    who = operator or login()
    with looking(app, broker) as here:
        records = here.records
        found = _find(records, which, key, service, reason_is)
        if not found:
            if json:
                print_json(
                    f"{action}/1",
                    _asked_json(Asked(action=action, letters=[], carried_out=0, pending=0, dry_run=dry_run)),
                )
                return 1
            raise _none(which)
        if not dry_run and not yes:
            shown = _table(found[:10]) + ([f"… and {len(found) - 10:,} more"] if len(found) > 10 else [])
            confirmed(action, shown, f"{action} {len(found):,}?")
        group = here.file if here.embedded and not here.log_here else None
        asked = ask(records, action, found, operator=who, reason=reason, dry_run=dry_run, group=group)
    incomplete = OutcomeUnknown.exit_code if asked.pending else 0
    if json:
        print_json(f"{action}/1", _asked_json(asked))
        return incomplete
    done = {"redrive": "redriven", "discard": "discarded"}[action]
    if dry_run:
        for line in _table(asked.letters[:SHOWN_MAX]):
            out(line)
        out(f"{len(found):,} would be {done}; nothing was changed")
        return 0
    out(f"{asked.carried_out:,} {done}")
    for letter in found if action == "redrive" else ():
        if not letter.parks:
            note(f"the later events of its key went on without {letter.number}: it is handled out of their order")
    if asked.pending:
        note(f"{asked.pending:,} requested: the process that has them will do it as soon as it can")
    return incomplete


def _find(
    records: Records, which: str | None, key: str | None, service: str | None, reason_is: str | None
) -> list[DeadLetter]:
    if reason_is is not None and reason_is not in REASONS:
        raise UsageError("UL1335", f"a reason is one of {', '.join(REASONS)}", found=repr(reason_is))
    number = int(which) if which is not None and which.isascii() and which.isdigit() and len(which) < 19 else None
    found = letters(
        records, service=service, number=number, key=key, reason=reason_is, id=None if number is not None else which
    )
    if not found and number is not None:
        found = letters(records, service=service, id=which, key=key, reason=reason_is)  # an id that looks like a number
    return found


def _none(which: str | None) -> UnlostError:
    what = "no dead letter matches" if which is None else f"there is no dead letter {which!r}"
    return UnlostError("UL1336", what, fix="unlost dead list shows them all")


def _matching(key: str | None, service: str | None, reason_is: str | None) -> str:
    parts = [
        f"{name} {clean(value)}"
        for name, value in (("key", key), ("service", service), ("reason", reason_is))
        if value is not None
    ]
    return f" (for {', '.join(parts)})" if parts else ""


def _table(found: Sequence[DeadLetter]) -> list[str]:
    now = REAL.now()
    rows = [
        [
            str(x.number), clean(x.service, 20), clean(x.type.rpartition(".")[2], 24), clean(key_text(x.key), 20),
            x.reason + (" (" + x.request + " requested)" if x.request else ""), span((now - x.died) / 1e6),
            clean(" ".join(x.error.split()), 60),
        ]
        for x in found
    ]  # fmt: skip
    return aligned([["No", "service", "type", "key", "reason", "died", "error"], *rows], left="rllllrl")


def _print_letter(x: DeadLetter, show: str, decoder: Decoder | None) -> None:
    headers = headers_of(x)
    out(bold(f"{x.number}  {clean(x.type) or '(no event)'}  {key_text(x.key)}"))
    lines = [
        ("service", f"{x.service}, handler {x.handler}"),
        ("died", f"{rfc3339(x.died)}, {x.reason}"),
        ("error", f"{x.error_type}: {x.error}" if x.error_type else x.error),
        (
            "event",
            f"{x.id} from {x.source}, recorded {rfc3339(x.recorded)}"
            if x.id
            else f"a message of others, recorded {rfc3339(x.recorded)}",
        ),
        ("log", f"{x.topic}/{x.partition}:{x.position}"),
        ("trace", x.trace or "-"),
        ("behind it", f"{count(x.parked_behind, 'event')} of its key" if x.parks else "nothing waits: its key goes on"),
    ]
    if x.request:
        lines.append(("requested", f"{x.request}; the process that has the partition will do it"))
    for name, text in lines:
        out(f"  {name:<10} {clean(' '.join(text.split()))}")
    for attempt in x.attempts:
        out(f"  attempt {attempt.number:<2} {rfc3339(attempt.at)}  {clean(' '.join(attempt.error.split()))}")
    for line in x.stack.rstrip().splitlines():
        out(dim(f"    {clean(line)}"))
    if headers is not None and show != "raw":
        out(f"  {'headers':<10} {len(headers)}, {len(x.data or b''):,} bytes of data (--raw shows them)")
    if show == "raw":
        for name, value in headers or ():
            text = "(none)" if value is None else value.decode("utf-8", "backslashreplace")
            out(f"  header     {clean(name)}: {clean(text)}")
        out("  data       " + ("(none)" if x.data is None else clean(x.data.decode("utf-8", "backslashreplace"))))
    if show == "data":
        import msgspec

        data = _data(x, decoder)
        hidden = warn("(hidden: your code has no class that reads it; --raw shows it)")
        out("  data       " + (hidden if data is None else clean_lines(msgspec.json.encode(data).decode())))
    out()


def _data(x: DeadLetter, decoder: Decoder | None) -> dict[str, Any] | None:
    envelope = event_of(x, decoder)
    return None if envelope is None else shown_data(envelope)


def _letter_json(
    x: DeadLetter, show: str = "none", *, whole: bool = False, decoder: Decoder | None = None
) -> dict[str, Any]:
    members: dict[str, Any] = {
        "number": x.number, "service": x.service, "handler": x.handler, "topic": x.topic, "partition": x.partition,
        "position": x.position, "id": x.id, "source": x.source, "type": x.type, **shown_bytes("key", x.key),
        "trace": x.trace, "reason": x.reason, "error_type": x.error_type, "error": x.error, "attempts": len(x.attempts),
        "parks": x.parks, "parked_behind": x.parked_behind, "died": rfc3339(x.died), "recorded": rfc3339(x.recorded),
        "request": x.request,
    }  # fmt: skip
    if whole:
        members["stack"] = x.stack
        members["history"] = [{"number": a.number, "at": rfc3339(a.at), "error": a.error} for a in x.attempts]
    if show == "raw":
        headers = headers_of(x)
        if headers is not None:
            members["headers"] = [{"name": name, **shown_bytes("value", value)} for name, value in headers]
        members |= shown_bytes("data", x.data)
    elif show == "data":
        members["data"] = _data(x, decoder)
    return members


def _asked_json(asked: Asked) -> dict[str, Any]:
    return {
        "dry_run": asked.dry_run, "chosen": len(asked.letters), "carried_out": asked.carried_out,
        "pending": asked.pending, "letters": [_letter_json(letter) for letter in asked.letters],
    }  # fmt: skip
