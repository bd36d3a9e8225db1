"""Looking at a broker: `status`, `audit`, `topic list`, `config`. None of them changes anything."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter

from unlost import config
from unlost.audit import Book, Books
from unlost.cli.options import AppName, BrokerUrl, Json, OfApp, aligned, count, looking, span
from unlost.cli.say import bold, clean, clean_lines, coloured, dim, interrupted, note, out, print_json, warn
from unlost.errors import Damaged, Unavailable, UnlostError, UsageError
from unlost.ops import books as ledger
from unlost.ops import ledger as statements
from unlost.ops.connect import ELSEWHERE, Looking
from unlost.ops.outbox import Delayed, OutboxStatus
from unlost.ops.settings import hide_secrets, settings
from unlost.ops.status import ServiceStatus, Status, TopicStatus
from unlost.ops.status import look as look_at
from unlost.ops.table import abandoned_lines, books_table, missing_lines
from unlost.ops.topics import topics
from unlost.store.port import Records
from unlost.world import REAL, rfc3339

LOSS = Damaged.exit_code
WATCH_SECONDS = 2.0
WATCH_SECONDS_MIN = 0.1
CLEAR = "\x1b[H\x1b[2J"  # home, and everything away


def status(
    *,
    watch: Annotated[
        str | bool,
        Parameter(name="--watch", negative="", help="Look again every 2 seconds, or as often as it says: --watch 10s."),
    ] = False,
    app: OfApp = None,
    broker: BrokerUrl = None,
    json: Json = False,
) -> int:
    """Show how each service is doing, and what to do next.

    With `--watch` it goes on until Ctrl-C: in a terminal in one place, else one status after another; with `--json` one
    line for each look. A store that does not answer for a while is asked again.

    **Needs** only the broker and the store.

    **Examples**

    - `unlost status`
    - `unlost status --watch`
    - `unlost status --json | jq '.services[] | select(.dead > 0)'`
    """
    if watch is not False:
        return _watch(WATCH_SECONDS if watch is True else _interval(watch), app, broker, json)
    with looking(app, broker) as here:
        return _show_status(look_at(here), json)


def _interval(text: str) -> float:
    seconds = config.duration(text)
    if seconds < WATCH_SECONDS_MIN:
        raise UsageError(
            "UL1442", f"a look takes its time: --watch takes {WATCH_SECONDS_MIN:g} seconds or more", found=repr(text)
        )
    return seconds


def _watch(seconds: float, app: str | None, broker: str | None, json: bool) -> int:
    """Looks until Ctrl-C, which is how it ends."""
    repaint = not json and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    looked = False
    try:
        while True:
            try:
                with looking(app, broker) as here:
                    while True:
                        found = look_at(here)
                        if repaint:
                            sys.stdout.write(CLEAR)
                        elif looked and not json:
                            out()
                        looked = True
                        _show_status(found, json, many=True)
                        if not json:
                            out(dim(f"{rfc3339(REAL.now())[:19]}Z, every {seconds:g} s until Ctrl-C"))
                        sys.stdout.flush()
                        if interrupted.wait(seconds):
                            return 0
            except Unavailable as e:
                if not looked:
                    raise
                note(warn(clean_lines(e), sys.stderr))
            if interrupted.wait(seconds):
                return 0
    except KeyboardInterrupt:
        return 0


def _show_status(found: Status, json: bool, *, many: bool = False) -> int:
    """Once, or as one of many."""
    now = REAL.now()
    timed = {"time": rfc3339(now)} if many else {}
    code = 0 if found.unreachable is None else Unavailable.exit_code
    if json:
        print_json("status/1", {**timed, **_status_json(msgspec.to_builtins(found), found)})
        return code
    if found.broker == found.path:
        out(f"broker  {clean(found.path)}   {_size(found.bytes)}")
    else:
        out(f"broker  {clean(found.broker)}")
        out(f"store   {clean(found.path)}   {_size(found.bytes)}")
    _print_elsewhere(found.elsewhere)
    for text in found.lost:
        out(warn(clean(text)))
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
    if found.outbox is not None:
        _print_gauges(found.services)
        out()
        for line in _outbox_lines(found.outbox):
            out(line)
    if found.unreachable is None:
        if found.outbox is None:
            out()
        for line in _delayed_lines(found.delayed):
            out(line)
        events = sum(t.events for t in found.topics)
        out(f"{count(len(found.topics), 'topic')}, {count(events, 'event')}: unlost topic list")
    else:
        note(warn("the broker does not answer; this is what the store knows", sys.stderr))
        note(clean_lines(found.unreachable))
    return code


def _print_elsewhere(services: Sequence[str]) -> None:
    if services:
        note(f"kept in another store (UNLOST_STORE names one at a time): {', '.join(map(clean, services))}")


def _print_gauges(services: Sequence[ServiceStatus]) -> None:
    """How far each service is, over all its partitions; each partition by itself: --json."""
    rows = [
        [
            clean(s.name),
            *(f"{sum(getattr(u, gauge) for u in s.units):,}" for gauge in ("highest_seen", "highest_succeeded")),
            f"{sum(u.highest_sequential for u in s.units):,}", f"{sum(u.incompletes for u in s.units):,}",
        ]
        for s in services
    ]  # fmt: skip
    if rows:
        out()
        for line in aligned([["PROGRESS", "seen", "succeeded", "sequential", "incomplete"], *rows], left="lrrrr"):
            out(line)


def _outbox_lines(o: OutboxStatus) -> list[str]:
    if not o.events and not o.copies:
        return ["outbox  empty"]
    copies = (
        f", {count(o.copies, 'copy') if o.copies == 1 else f'{o.copies:,} copies'} of dead letters" if o.copies else ""
    )
    age = "-" if o.age is None else span(o.age)
    line = f"outbox  {count(o.events, 'event')} accepted and not in the log yet{copies}, the oldest for {age}"
    if o.stands_still:
        return [warn(f"{line}; nobody sends them: unlost run")]
    if not o.relays:
        return [f"{line}; no relay of ours runs, the replication slot {clean(', '.join(o.streams))} reads them"]
    pids = ", ".join(f"pid {r.pid}" + (f" on {clean(r.host)}" if o.shards > 1 else "") for r in o.relays)
    lines = [f"{line}; {pids} {'sends' if len(o.relays) == 1 else 'send'} them"]
    if o.refused:
        lines.append(
            warn("        the broker has not taken the first of them for a minute: does it refuse one, or is it away?")
        )
    if o.orphaned:
        lines.append(f"        nobody sends {o.orphaned} of its {o.shards} parts yet")
    return lines


def _delayed_lines(d: Delayed) -> list[str]:
    if not d.events:
        return []
    line = f"delayed {count(d.events, 'event')} in the store, in no log yet; the first is due at {_time(d.first)}"
    return [warn(f"{line}, and nobody releases them: unlost run")] if d.overdue else [line]


def _alive(s: ServiceStatus) -> str:
    hung = sum(p.hung for p in s.processes)
    return f"{s.alive} ({hung} hung)" if hung else str(s.alive)


def _status_json(members: dict[str, Any], status: Status) -> dict[str, Any]:
    if status.outbox is not None:
        members["outbox"] = _outbox_json(status.outbox)
    members["delayed"] = _delayed_json(status.delayed)
    for found, s in zip(members["services"], status.services, strict=True):
        found["alive"] = s.alive
        found["oldest"], found["next_retry"] = _time(s.oldest), _time(s.next_retry)
    for topic in members["topics"]:
        topic["oldest"], topic["newest"] = _time(topic["oldest"]), _time(topic["newest"])
    return members


def _delayed_json(d: Delayed) -> dict[str, Any]:
    return {"events": d.events, "first": _time(d.first), "overdue": d.overdue}


def _outbox_json(o: OutboxStatus) -> dict[str, Any]:
    members = {**msgspec.to_builtins(o), "oldest": _time(o.oldest), "relays": [r._asdict() for r in o.relays]}
    del members["books"]  # where they do not balance, a finding says so
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
    export: Annotated[
        bool, Parameter(name="--export", negative="", help="Also write the books to the topic unlost.ledger (Kafka).")
    ] = False,
    app: OfApp = None,
    broker: BrokerUrl = None,
    json: Json = False,
) -> int:
    """Balance the books: is every accepted event accounted for?

    For each service: accepted = done + dead + waiting + in flight + ... + UNACCOUNTED, and UNACCOUNTED must be 0.
    If it is not, the missing events are named with where they were last seen, and the command ends with 3.
    Safe at any time, also while services run.

    On Kafka the log's offsets say what was accepted, so that events of other producers are counted as well; what the
    log let go of unread is named. `--verify` reads what was handled once more and compares it with what was counted.

    Events that wait in the outbox of a store are in no log yet, and in nobody's books; they are shown beside them. In
    PostgreSQL what leaves the outbox is numbered: a row that went without the broker's receipt is a finding.

    **Needs** only the broker and the store.

    **Examples**

    - `unlost audit`
    - `unlost audit --verify` also reads and checks every stored event
    - `unlost audit --json | jq .unaccounted`
    """
    with looking(app, broker) as here:
        records, log = here.pair()
        place = statements.place(log) if export else None
        examined = ledger.examine_all(
            records, service, log=log, read_again=verify and not here.embedded, lost=here.lost
        )
        found, waiting = examined.books, examined.outbox
        named = ledger.name_missing(records, found.missing, log=log)
        cut_off = ledger.name_missing(records, found.abandoned, log=log)
        problems = ledger.verify(records, log=log) if verify else []
        written = 0 if place is None else statements.export(records, place, service)
        elsewhere, others = not here.log_here, here.elsewhere
        reads_again, name, store = not here.embedded, here.name, here.place
    code = 0 if found.balanced and not problems else LOSS
    if json:
        print_json(
            "audit/1",
            {
                "broker": name, "balanced": found.balanced, "unaccounted": found.unaccounted,
                "services": [_book_json(book) for book in found.services.values()],
                "missing": [_missing_json(m) for m in named], "missing_more": found.unaccounted - len(named),
                "abandoned": [_missing_json(m) for m in cut_off], "abandoned_more": len(found.abandoned) - len(cut_off),
                "findings": found.findings, "unaccountable": found.unaccountable,
                "verified": verify, "damaged": problems, "ranges": found.ranges, "unverified": examined.unverified,
                "outbox": _outbox_json(waiting) if elsewhere else None, "delayed": _delayed_json(examined.delayed),
                "exported": written if place is not None else None, "elsewhere": others,
            },
        )  # fmt: skip
        return code
    _print_books(found, named, all)
    for line in abandoned_lines(found, cut_off):
        out(line)
    for problem in problems:
        out(warn(f"damaged: {clean(problem)}"))
    for line in _delayed_lines(examined.delayed):
        out(line)
    if elsewhere and (waiting.events or waiting.copies):
        for line in _outbox_lines(waiting):
            out(line)
    if verify and not problems and not reads_again:
        out("every stored event matches its checksum")
    if verify and reads_again:
        out(f"read again: the events of {count(examined.compared, 'partition')} compared with what was counted")
    for text in examined.unverified if verify else ():
        out(f"cannot be verified: {clean(text)}")
    if place is not None:
        out(f"{count(written, 'statement')} written to {clean(place.name)}")
    if code:
        note(warn("the books do not balance" if not found.balanced else "stored events are damaged", sys.stderr))
    _print_elsewhere(others)
    out(dim(f"broker {clean(name)}" + (f"   store {clean(store)}" if elsewhere else "")))
    return code


def _print_books(found: Books, named: Sequence[ledger.Named], everything: bool) -> None:
    if found.services:
        out(books_table(found, everything=everything, color=coloured(sys.stdout)))
    elif found.balanced:
        out("no service has run on this broker yet; there is nothing to balance")
    for line in missing_lines(found, named):
        out(warn(line) if line.startswith("UNACCOUNTED") else line)


def _book_json(book: Book) -> dict[str, Any]:
    return {**msgspec.to_builtins(book), "concerns": book.concerns}


def _missing_json(m: ledger.Named) -> dict[str, Any]:
    return {**msgspec.to_builtins(m), "recorded": _time(m.recorded)}


def topic_list(*, app: OfApp = None, broker: BrokerUrl = None, json: Json = False) -> int:
    """List the topics: partitions, events, and who reads them.

    On Kafka also how many replicas each has, how many of them must have an event before it is accepted, and what an
    accepted event survives by that.

    **Needs** only the broker; who reads them stands in the store.

    **Example**

    - `unlost topic list`
    """
    with looking(app, broker) as here:
        store, why = _store(here)
        found = topics(store, log=here.log)
        replicated, name = not here.embedded, here.name
    if json:
        rows = [{**msgspec.to_builtins(t), "oldest": _time(t.oldest), "newest": _time(t.newest)} for t in found]
        print_json("topics/1", {"broker": name, "topics": rows})
        return 0
    if not found:
        out(f"no topics in {clean(name)}")
        return 0
    now = REAL.now()
    nobody = "?" if why else "nobody"
    if why:
        note(f"who reads them is not known: {why}")
    if replicated:
        for line in _replicated(found, now, nobody):
            out(line)
        return 0
    rows_of_text = [
        [
            clean(t.name), str(t.partitions), f"{t.events:,}", _age(t.newest, now),
            "all" if t.retention is None else span(t.retention), ", ".join(map(clean, t.services)) or nobody,
        ]
        for t in found
    ]  # fmt: skip
    for line in aligned([["TOPIC", "partitions", "events", "newest", "kept", "read by"], *rows_of_text], left="lrrrrl"):
        out(line)
    return 0


def _store(here: Looking) -> tuple[Records | None, str]:
    """The store, or why it cannot be asked."""
    try:
        return here.store, f"there is no store at {clean(here.place)}" if here.store is None else ""
    except UnlostError as e:
        if isinstance(e, Unavailable) or e.code == ELSEWHERE:
            return None, clean(f"{e.what}: {e.found}")
        raise


def _replicated(found: Sequence[TopicStatus], now: int, nobody: str) -> list[str]:
    rows = [
        [
            clean(t.name), str(t.partitions), f"{t.events:,}", _age(t.newest, now),
            "all" if t.retention is None else span(t.retention), f"{t.replication}, min {t.min_insync}",
            clean(t.survives), ", ".join(map(clean, t.services)) or nobody,
        ]
        for t in found
    ]  # fmt: skip
    titles = ["TOPIC", "partitions", "positions", "newest", "kept", "replicas", "survives", "read by"]
    return aligned([titles, *rows], left="lrrrrlll")


def show_config(*, app: AppName = None, broker: BrokerUrl = None, json: Json = False) -> int:
    """Show each setting and where it comes from. Secrets are hidden.

    **Needs** nothing; with `--app` it also says what your code sets.

    **Examples**

    - `unlost config`
    - `unlost config --app hello --json`
    """
    found = settings(app=app, broker=broker)
    if app is not None:
        from unlost.ops.load import load

        loaded = load(app).app
        code = {"broker": None if broker is not None else loaded.broker_url, "store": loaded.store_url}
        found = [
            v
            if (said := code.get(v.name)) is None
            else msgspec.structs.replace(v, value=hide_secrets(said), source="code")
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
