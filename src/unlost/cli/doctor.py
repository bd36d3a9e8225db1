"""`unlost doctor`: what could cost events, and what to do about it."""

from __future__ import annotations

import sys
from typing import Annotated

import msgspec
from cyclopts import Parameter

from unlost.brokers.findings import Finding
from unlost.cli.options import AppName, BrokerUrl, Json, count
from unlost.cli.say import bold, clean, dim, out, print_json, warn
from unlost.ops.doctor import VERIFY, Diagnosis
from unlost.ops.doctor import doctor as examine

BAD, LOSS = 1, 3
WORDS = {"error": "ERROR", "warning": "WARNING", "note": "note", "ok": "ok"}


def doctor(
    *,
    service: Annotated[
        list[str] | None,
        Parameter(name=["--service", "-s"], negative="", help="Only this service; may be given again."),
    ] = None,
    verify: Annotated[
        bool,
        Parameter(
            name="--verify", negative="", help="Also read every row that is stored, and check it. Takes its time."
        ),
    ] = False,
    strict: Annotated[bool, Parameter(name="--strict", negative="", help="Warnings fail too.")] = False,
    all: Annotated[bool, Parameter(name="--all", negative="", help="Also list what is in order.")] = False,
    app: AppName = None,
    broker: BrokerUrl = None,
    json: Json = False,
) -> int:
    """Look for what could cost events: in the broker, its settings, the groups and the store.

    Nothing is changed, and nothing is published. Each finding has a code, what was read, and what to do.
    It ends with 1 if there is an error (with `--strict` also for a warning), with 3 if `--verify` finds damage, with 4 if
    the broker does not answer.

    `--verify` reads the log and the store from end to end: checksums, positions without a gap, events that must be
    decodable, the pages of the file. The first damaged places are named. Services may run meanwhile.

    **Needs** only the broker; with `--app` it also compares it with what your code declares.

    **Examples**

    - `unlost doctor`
    - `unlost doctor --app shop --strict` before a release
    - `unlost doctor --verify` after trouble with a disk
    - `unlost doctor --json | jq '.findings[] | select(.severity == "error")'`
    """
    loaded = None
    if app is not None:
        from unlost.ops.load import load

        loaded = load(app).app
    found = examine(broker, services=service or (), app=loaded, verify=verify, said=_said)
    if verify and sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")
    code = BAD if found.count("error") or (strict and found.count("warning")) else 0
    if any(f.code == VERIFY and f.severity == "error" for f in found.findings):
        code = LOSS
    if json:
        print_json(
            "doctor/1",
            {
                "broker": found.broker, "title": found.title, "store": found.store, "chosen": found.chosen,
                "topics": found.topics, "services": found.services, "errors": found.count("error"),
                "warnings": found.count("warning"), "findings": msgspec.to_builtins(found.findings),
            },
        )  # fmt: skip
        return code
    _print(found, all)
    return code


def _said(what: str, rows: int) -> None:
    """How far --verify is, in one line on a terminal."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[Kreading {clean(what)}: {rows:,} rows" if rows else f"\r\x1b[Kreading {clean(what)}")
        sys.stderr.flush()


def _print(found: Diagnosis, everything: bool) -> None:
    out(f"broker  {clean(found.broker)}   {clean(found.title)}")
    if found.topics or found.services:
        looked_at = f"{count(len(found.topics), 'topic')} and {count(len(found.services), 'service')}"
        out(f"looked at {looked_at}: {clean(found.chosen)}")
    out()
    for finding in found.findings:
        if finding.severity != "ok" or everything:
            _print_one(finding)
    out(
        f"{count(found.count('error'), 'error')}, {count(found.count('warning'), 'warning')}, "
        f"{count(found.count('note'), 'note')}; {found.count('ok')} in order" + ("" if everything else dim(" (--all)"))
    )


def _print_one(f: Finding) -> None:
    word = f"{WORDS[f.severity]:<8}"
    shown = {"error": warn, "warning": bold, "ok": dim}.get(f.severity, str)(word)
    out(f"{shown} {f.code}  {clean(f.what)}")
    if f.evidence:
        out(f"         found: {clean(f.evidence)}")
    if f.fix:
        out(f"         do:    {clean(f.fix)}")
