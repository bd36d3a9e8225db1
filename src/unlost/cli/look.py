"""Looking at a broker: `status`, `audit`, `topic list`, `config`. None of them changes anything."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter

from unlost.audit import Book, Books
from unlost.cli.options import AppName, BrokerUrl, Json, OfApp, aligned, count, looking, span
from unlost.cli.say import bold, clean, coloured, dim, note, out, print_json, warn
from unlost.errors import Damaged
from unlost.ops import books as ledger
from unlost.ops.settings import hide_secrets, settings
from unlost.ops.status import ServiceStatus
from unlost.ops.status import status as look_at
from unlost.ops.table import books_table, missing_lines
from unlost.ops.topics import topics
from unlost.world import REAL, rfc3339

LOSS = Damaged.exit_code


def status(*, app: OfApp = None, broker: BrokerUrl = None, json: Json = False) -> int:
    """Show how each service is doing, and what to do next.

    **Needs** only the broker.

    **Examples**

    - `unlost status`
    - `unlost status --json | jq '.services[] | select(.dead > 0)'`
    """
    with looking(app, broker) as file:
        found = look_at(file)
    now = REAL.now()
    if json:
        print_json("status/1", _status_json(msgspec.to_builtins(found), found.services))
        return 0
    out(f"broker  {clean(found.path)}   {_size(found.bytes)}")
    out()
    if found.services:
        columns = ["SERVICE", "running", "partitions", "waiting", "oldest", "in flight", "retrying", "parked", "dead"]
        rows = [
            [
                clean(s.name), _alive(s), f"{s.owned} of {s.partitions}", f"{s.waiting:,}", _age(s.oldest, now),
                f"{s.in_flight:,}", f"{s.retrying:,}", f"{s.parked:,}", f"{s.dead:,}",
            ]
            for s in found.services
        ]  # fmt: skip
        for line in aligned([columns, *rows], left="lrrrrrrrr"):
            out(line)
        for s in found.services:
            for todo in s.todo:
                out(f"{bold(clean(s.name))}: {clean(todo)}")
    else:
        out("no service has run on it yet: unlost run")
    out()
    events = sum(t.events for t in found.topics)
    out(f"{count(len(found.topics), 'topic')}, {count(events, 'event')}: unlost topic list")
    return 0


def _alive(s: ServiceStatus) -> str:
    hung = sum(p.hung for p in s.processes)
    return f"{s.alive} ({hung} hung)" if hung else str(s.alive)


def _status_json(members: dict[str, Any], services: Sequence[ServiceStatus]) -> dict[str, Any]:
    for found, s in zip(members["services"], services, strict=True):
        found["alive"] = s.alive
        found["oldest"], found["next_retry"] = _time(s.oldest), _time(s.next_retry)
    for topic in members["topics"]:
        topic["oldest"], topic["newest"] = _time(topic["oldest"]), _time(topic["newest"])
    return members


def audit(
    *,
    service: Annotated[
        list[str] | None,
        Parameter(name=["--service", "-s"], negative="", help="Only this service; may be given again."),
    ] = None,
    all: Annotated[
        bool, Parameter(name="--all", negative="", help="Also count the events that no handler wants.")
    ] = False,
    verify: Annotated[
        bool, Parameter(name="--verify", negative="", help="Also read every stored event and check its checksum.")
    ] = False,
    app: OfApp = None,
    broker: BrokerUrl = None,
    json: Json = False,
) -> int:
    """Balance the books: is every accepted event accounted for?

    For each service: accepted = done + dead + waiting + in flight + ... + UNACCOUNTED, and UNACCOUNTED must be 0.
    If it is not, the missing events are named with where they were last seen, and the command ends with 3.
    Safe at any time, also while services run.

    **Needs** only the broker.

    **Examples**

    - `unlost audit`
    - `unlost audit --verify` also reads and checks every stored event
    - `unlost audit --json | jq .unaccounted`
    """
    with looking(app, broker) as file:
        found = ledger.books(file, service)
        named = ledger.name_missing(file, found.missing)
        problems = ledger.verify(file) if verify else []
        path = file.path
    code = 0 if found.balanced and not problems else LOSS
    if json:
        print_json(
            "audit/1",
            {
                "broker": str(path), "balanced": found.balanced, "unaccounted": found.unaccounted,
                "services": [_book_json(book) for book in found.services.values()],
                "missing": [_missing_json(m) for m in named], "missing_more": found.unaccounted - len(named),
                "findings": found.findings, "unaccountable": found.unaccountable,
                "verified": verify, "damaged": problems,
            },
        )  # fmt: skip
        return code
    _print_books(found, named, all)
    for problem in problems:
        out(warn(f"damaged: {clean(problem)}"))
    if verify and not problems:
        out("every stored event matches its checksum")
    if code:
        note(warn("the books do not balance" if not found.balanced else "stored events are damaged", sys.stderr))
    out(dim(f"broker {clean(path)}"))
    return code


def _print_books(found: Books, named: Sequence[ledger.Named], everything: bool) -> None:
    if not found.services:
        out("no service has run on this broker yet; there is nothing to balance")
        return
    out(books_table(found, everything=everything, color=coloured(sys.stdout)))
    for line in missing_lines(found, named):
        out(warn(line) if line.startswith("UNACCOUNTED") else line)


def _book_json(book: Book) -> dict[str, Any]:
    return {**msgspec.to_builtins(book), "concerns": book.concerns}


def _missing_json(m: ledger.Named) -> dict[str, Any]:
    return {**msgspec.to_builtins(m), "recorded": _time(m.recorded)}


def topic_list(*, app: OfApp = None, broker: BrokerUrl = None, json: Json = False) -> int:
    """List the topics: partitions, events, and who reads them.

    **Needs** only the broker.

    **Example**

    - `unlost topic list`
    """
    with looking(app, broker) as file:
        found = topics(file)
        path = file.path
    if json:
        rows = [{**msgspec.to_builtins(t), "oldest": _time(t.oldest), "newest": _time(t.newest)} for t in found]
        print_json("topics/1", {"broker": str(path), "topics": rows})
        return 0
    if not found:
        out(f"no topics in {clean(path)}")
        return 0
    now = REAL.now()
    rows_of_text = [
        [
            clean(t.name), str(t.partitions), f"{t.events:,}", _age(t.newest, now),
            "all" if t.retention is None else span(t.retention), ", ".join(map(clean, t.services)) or "nobody",
        ]
        for t in found
    ]  # fmt: skip
    for line in aligned([["TOPIC", "partitions", "events", "newest", "kept", "read by"], *rows_of_text], left="lrrrrl"):
        out(line)
    return 0


def show_config(*, app: AppName = None, broker: BrokerUrl = None, json: Json = False) -> int:
    """Show each setting and where it comes from. Secrets are hidden.

    **Needs** nothing; with `--app` it also says what your code sets.

    **Examples**

    - `unlost config`
    - `unlost config --app hello --json`
    """
    found = settings(app=app, broker=broker)
    if app is not None and broker is None:
        from unlost.ops.load import load

        url = load(app).app.broker_url
        if url is not None:
            found = [
                msgspec.structs.replace(v, value=hide_secrets(url), source="code") if v.name == "broker" else v
                for v in found
            ]
    if json:
        print_json("config/1", {"settings": msgspec.to_builtins(found)})
        return 0
    for line in aligned([[v.name, clean(v.value) or "-", v.source] for v in found], left="lll"):
        out(line)
    return 0


# --- words for people ------------------------------------------------------------------------------------


def _time(micros: int | None) -> str | None:
    return None if micros is None else rfc3339(micros)


def _age(micros: int | None, now: int) -> str:
    return "-" if micros is None else span(max(0, now - micros) / 1e6)


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1000
    raise AssertionError
