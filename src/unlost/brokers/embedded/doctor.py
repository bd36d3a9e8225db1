"""What can be seen of a file of ours: from outside (library, disk, rights), and in it (growth, clock, who holds what back).

`gather` reads, the checks are pure. A file is the embedded broker's, or the store beside another broker.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import apsw
import msgspec

from unlost.brokers.findings import Examination, Finding, Ours, Severity
from unlost.errors import UnlostError
from unlost.sqlite import process
from unlost.sqlite.backup import openers
from unlost.sqlite.file import File
from unlost.sqlite.guards import NETWORK, SQLITE_MIN, beside, explained, file_system, persist_wal
from unlost.sqlite.schema import POSITION_BITS, POSITION_MAX, RETIRED
from unlost.world import boot_id, rfc3339

FREE_BYTES_MIN = 64 * 1024 * 1024
FREE_BYTES_LOW = 1024 * 1024 * 1024
DAYS_LOW, DAYS_MIN = 30.0, 3.0  # until the disk is full
WAL_BYTES_MAX = 64 * 1024 * 1024  # four times what it has when it is written back
CLOCK_SECONDS = 5.0
RECENT_ROWS = 200  # of each partition, to see how large its events are and how fast they come
FORECAST_SECONDS_MIN = 3600.0  # a shorter time says nothing about a day
IN_MEMORY = ("tmpfs", "ramfs")
LAYER = ("overlay", "aufs")
ROW_BYTES = 40  # of a row beside its texts
SHOWN = 5


class EmbeddedDoctor:
    def __init__(self, path: Path) -> None:
        self._path = path

    def open(self) -> str:
        return ""

    def close(self) -> None:
        """Nothing was opened."""

    def examine(self, ours: Ours) -> Examination:
        said = Finding(
            severity="note", code="UL4510",
            what="not every row was read",
            evidence="the ends of each partition were, and what services are at", fix="unlost doctor --verify reads and checks everything",
        )  # fmt: skip
        return Examination(title="embedded", findings=[*library(), *look_at_file(self._path), said])


def library() -> Iterator[Finding]:
    found = tuple(int(part) for part in apsw.sqlite_lib_version().split("."))
    bad = found < SQLITE_MIN
    yield Finding(
        severity="error" if bad else "ok", code="UL4501",
        what="this SQLite can lose committed data (its WAL-reset bug)" if bad else "SQLite is new enough",
        evidence=f"SQLite {apsw.sqlite_lib_version()}, needed is {'.'.join(map(str, SQLITE_MIN))}",
        fix='pip install -U "apsw>=3.51.3"' if bad else "",
    )  # fmt: skip


def look_at_file(path: Path) -> Iterator[Finding]:
    """Where a file of ours stands; it is not opened."""
    kind = file_system(path.parent.resolve())
    severity: Severity = "ok"
    what, fix = f"{path} is on a local disk", ""
    if kind.startswith(NETWORK):
        severity, fix = "error", "put the file on a local disk"
        what = f"{path} is on a network file system, where SQLite's locks do not work"
    elif kind in IN_MEMORY:
        severity, fix = "error", "put the file on a disk"
        what = f"{path} is in memory: every accepted event is gone when the machine restarts"
    elif kind in LAYER:
        severity, fix = "note", "if this is a container, put the file on a volume that outlives it"
        what = f"{path} is in the layer of a container, and goes with it"
    yield Finding(
        severity=severity, code="UL4502", what=what, evidence=f"the file system is {kind}", fix=fix
    )  # fmt: skip
    yield _space(path)
    yield _rights(path)


def _space(path: Path) -> Finding:
    free = shutil.disk_usage(path.parent).free
    full = free < FREE_BYTES_MIN
    low = free < FREE_BYTES_LOW
    return Finding(
        severity="error" if full else "warning" if low else "ok", code="UL4503",
        what=f"the disk under {path} is {'full' if full else 'nearly full'}: then nothing more is accepted" if low
        else f"there is room under {path}",
        evidence=f"{free / 1e9:.1f} GB are free", fix="free some space" if low else "",
    )  # fmt: skip


def _rights(path: Path) -> Finding:
    mode, folder = stat.S_IMODE(path.stat().st_mode), stat.S_IMODE(path.parent.stat().st_mode)
    others = mode & 0o077
    writers = folder & 0o022 and not folder & stat.S_ISVTX
    return Finding(
        severity="warning" if others or writers else "ok", code="UL4504",
        what=f"other users can reach {path}, with every event in it" if others
        else f"other users can put files into {path.parent}" if writers else f"only its owner can reach {path}",
        evidence=f"the file has {mode:04o}, its folder {folder:04o}",
        fix=f"chmod 600 {path}" if others else f"chmod 700 {path.parent}" if writers else "",
    )  # fmt: skip


# --- what is in it -----------------------------------------------------------------------------------------


class Registered(NamedTuple):
    """A process that had the file open when it was looked at."""

    id: str
    pid: int
    host: str
    boot: str
    alive: bool


class Held(NamedTuple):
    """The first event that a service needs of a partition."""

    service: str
    topic: str
    partition: int
    position: int
    waits: int  # events from there to the end of the log
    recorded: int  # when it came, microseconds
    retention: int | None  # of the topic, seconds
    on_shelf: bool  # a dead letter, or one that waits for its time: not simply unread


class FileFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What was read of a file. Times in microseconds, sizes in bytes."""

    path: str
    now: int
    free: int
    wal: int
    newest: int | None  # the newest time that anybody has written
    per_day: float | None  # how fast the log grows where no retention is declared; None: too young to say
    log_here: bool
    held: Sequence[Held]
    living: frozenset[str]  # services that a living process takes part in
    registered: Sequence[Registered]
    here: tuple[str, str]  # host and boot of this process
    others: Mapping[int, str]  # pids that have it open and are not of unlost, with their names
    libraries: Mapping[int, Sequence[str]]  # by pid of another process of unlost: SQLite libraries beside ours


def registered(path: Path) -> list[Registered]:
    """Whom the file lists. To be asked before it is opened: opening strikes off the dead."""
    found: list[Registered] = []
    if not path.exists() or not path.stat().st_size:
        return found
    with contextlib.suppress(UnlostError), explained(path):  # opening it says better what is wrong
        connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
        persist_wal(connection)
        try:
            for id, pid, host, boot in connection.execute("select id, pid, host, boot from unlost_process").fetchall():
                alive = process.examine(beside(path, "run"), id).alive
                found.append(Registered(id, pid, host, boot, alive))
        finally:
            connection.close(True)
    return found


def gather(file: File, before: Sequence[Registered]) -> FileFacts:
    """Reads the ends of each partition and the small tables. `before`: who was registered before it was opened."""
    now = file.world.now()
    wal = file.path.with_name(f"{file.path.name}-wal")
    ours = {os.getpid(), *(r.pid for r in before if r.alive)}
    log_here, newest, per_day, held, members = file.read(lambda c: _read(c, now))
    alive = {r.id for r in before if r.alive}
    return FileFacts(
        path=str(file.path), now=now, free=shutil.disk_usage(file.path.parent).free, wal=wal.stat().st_size if wal.exists() else 0,
        newest=newest, per_day=per_day, log_here=log_here, held=held, living=frozenset(s for s, id in members if id in alive),
        registered=before, here=(socket.gethostname(), boot_id()),
        others={pid: _name_of(pid) for pid in openers(file.path) if pid not in ours},
        libraries={pid: found for pid in sorted(ours - {os.getpid()}) if (found := _libraries(pid))},
    )  # fmt: skip


def _read(c: apsw.Connection, now: int) -> tuple[bool, int | None, float | None, list[Held], list[tuple[str, str]]]:
    log_here = c.execute("select 1 from unlost_meta where name = 'broker'").fetchone() is None
    topics = c.execute("select name, first_number, partitions, retention from unlost_topic order by name").fetchall()
    rates: list[float] = []
    times: list[int] = []
    held: list[Held] = []
    for name, first, partitions, retention in topics if log_here else ():
        for partition in range(partitions):
            low = (first + partition) << POSITION_BITS
            rows = c.execute(
                "select at, recorded, length(head) + coalesce(length(key), 0) + coalesce(length(data), 0) from unlost_log "
                "where at between ? and ? order by at desc limit ?",
                (low, low | POSITION_MAX, RECENT_ROWS),
            ).fetchall()
            if not rows:
                continue
            times.append(max(recorded for _, recorded, _ in rows))
            if retention is None and (rate := _rate(c, low, rows, now)) is not None:
                rates.append(rate)
            held += _held(c, name, partition, low, rows[0][0] - low + 1, retention)
    others = "select max(taken) from unlost_epoch union all select max(created) from unlost_service"
    times += [row[0] for row in c.execute(others).fetchall() if row[0] is not None]
    members = c.execute(
        "select service, process from unlost_member union select service, owner from unlost_progress where owner is not null"
    ).fetchall()
    return log_here, max(times, default=None), sum(rates) if rates else None, held, members


def _rate(c: apsw.Connection, low: int, rows: Sequence[tuple[int, int, int]], now: int) -> float | None:
    """Bytes per day of a partition: over all of its time, or lately if that is more."""
    size = sum(row[2] + ROW_BYTES for row in rows) / len(rows)
    first = c.execute(
        "select at, recorded from unlost_log where at between ? and ? order by at limit 1", (low, low | POSITION_MAX)
    ).fetchone()
    spans = [(rows[0][0] - first[0] + 1, now - first[1]), (len(rows), now - rows[-1][1])]
    rates = [n * size / (micros / 86400e6) for n, micros in spans if micros >= FORECAST_SECONDS_MIN * 1e6]
    return max(rates, default=None)


def _held(c: apsw.Connection, topic: str, partition: int, low: int, end: int, retention: int | None) -> list[Held]:
    """What each service needs first of a partition, of what it has not done."""
    found = []
    for service, position, on_shelf in c.execute(
        f"select service, position, 0 from unlost_progress where topic = ?1 and partition = ?2 and service not in ({RETIRED}) "
        "union all select service, position, 0 from unlost_follower where topic = ?1 and partition = ?2 "
        "union all select service, min(position), 1 from unlost_waiting where topic = ?1 and partition = ?2 group by service "
        "union all select service, min(position), 1 from unlost_shelf where topic = ?1 and partition = ?2 group by service",
        (topic, partition),
    ).fetchall():
        row = c.execute(
            "select recorded from unlost_log where at between ? and ? order by at limit 1",
            (low + position, low | POSITION_MAX),
        ).fetchone()
        if row is not None and position < end:
            found.append(Held(service, topic, partition, position, end - position, row[0], retention, bool(on_shelf)))
    return found


def _libraries(pid: int) -> list[str]:
    """SQLite libraries that a process has loaded and that are not ours (Linux; of processes of this user)."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return []
    paths = {Path(line.split(maxsplit=5)[5]) for line in lines if line.count("/")}
    return sorted(str(p) for p in paths if "sqlite" in p.name and "apsw" not in p.parts)


def _name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "?"


def check_file(facts: FileFacts) -> list[Finding]:
    """What the facts mean. Pure."""
    return [
        *_growth(facts), *_wal(facts), *_libraries_beside(facts), *_clock(facts), *_machines(facts), *_retention(facts),
        *_silent(facts),
    ]  # fmt: skip


def _growth(facts: FileFacts) -> Iterator[Finding]:
    if not facts.log_here:
        return
    if facts.per_day is None:
        yield _fine(
            "UL4503", "how fast the log grows cannot be said yet", "no topic without a retention has an hour of events"
        )
        return
    days = facts.free / facts.per_day
    evidence = f"about {facts.per_day / 1e6:,.1f} MB a day by the times in the log, {facts.free / 1e9:.1f} GB are free: {days:,.0f} days"
    if days < DAYS_LOW:
        yield Finding(
            severity="error" if days < DAYS_MIN else "warning", code="UL4503", what="the log will fill the disk soon, and then nothing is accepted",
            evidence=evidence, fix='declare a retention (Topic("…", retention="90d")), or move the file to a larger disk',
        )  # fmt: skip
    else:
        yield _fine("UL4503", "at this pace the log does not fill the disk soon", evidence)


def _wal(facts: FileFacts) -> Iterator[Finding]:
    named = ", ".join(f"pid {pid} ({name})" for pid, name in list(facts.others.items())[:SHOWN])
    evidence = f"the WAL has {facts.wal / 1e6:,.1f} MB" + (f"; open in {named}" if named else "")
    if facts.wal > WAL_BYTES_MAX:
        yield Finding(
            severity="warning", code="UL1460", what="the WAL does not shrink: something reads one old state of the file for long", evidence=evidence,
            fix="end what reads it (a database browser, a forgotten transaction, a backup tool); commits then write it back",
        )  # fmt: skip
    elif facts.others:
        yield Finding(
            severity="note", code="UL1460", what="a program that is not of unlost has the file open", evidence=evidence,
            fix="close it when it is not needed: it can keep the WAL from shrinking, and a lock of it stops all publishing",
        )  # fmt: skip
    else:
        yield _fine("UL1460", "the WAL is small, and nobody holds it back", evidence)


def _libraries_beside(facts: FileFacts) -> Iterator[Finding]:
    if facts.libraries:
        pid, found = next(iter(facts.libraries.items()))
        yield Finding(
            severity="note", code="UL1461", what="a second SQLite library is loaded where the file is open: it must never open the same file",
            evidence=f"pid {pid}: {', '.join(found[:SHOWN])}",
            fix="nothing, as long as it opens other files only: sqlite3.connect() on this one is refused (UL1122)",
        )  # fmt: skip
    else:
        yield _fine(
            "UL1461", "no second SQLite library is loaded in the processes that have the file open", "/proc/…/maps"
        )


def _clock(facts: FileFacts) -> Iterator[Finding]:
    if facts.newest is None:
        return
    ahead = (facts.newest - facts.now) / 1e6
    evidence = f"the newest time in the file is {rfc3339(facts.newest)}, now it is {rfc3339(facts.now)}"
    if ahead > CLOCK_SECONDS:
        yield Finding(
            severity="warning", code="UL4006", what=f"the clock of this machine was set back: the file has times that are {ahead:,.0f} s ahead",
            evidence=evidence, fix="let NTP or chrony set the clock; retention, due times and ages are wrong until then",
        )  # fmt: skip
    else:
        yield _fine("UL4006", "the clock is not behind what the file has seen", evidence)


def _machines(facts: FileFacts) -> Iterator[Finding]:
    host, boot = facts.here
    other = [r for r in facts.registered if r.boot != boot and r.host != host]
    named = ", ".join(f"pid {r.pid} on {r.host}" for r in other[:SHOWN])
    if any(r.alive for r in other):
        yield Finding(
            severity="error", code="UL4408", what="processes of another machine have this file open: SQLite's locks do not reach there",
            evidence=named, fix="run all processes on the machine that has the disk; several machines need Kafka and PostgreSQL",
        )  # fmt: skip
    elif other:
        yield Finding(
            severity="warning", code="UL4408", what="processes of another machine, or of this one before it got another name, have not closed the file",
            evidence=f"{named}; this is {host}, started since",
            fix="is the folder shared between machines? Then stop the others; if not, this is over now",
        )  # fmt: skip
    else:
        yield _fine("UL4408", "only this machine has the file", f"{len(facts.registered)} processes were registered")


def _retention(facts: FileFacts) -> Iterator[Finding]:
    """Trimming waits for the slowest: nothing expires unread, the disk pays."""
    late = [h for h in facts.held if h.retention is not None and facts.now - h.recorded > h.retention * 1_000_000]
    for service, some in _by_service(late):
        first = min(some, key=lambda h: h.recorded)
        days = (facts.now - first.recorded) / 86400e6
        evidence = f"{first.topic}/{first.partition}:{first.position} came {days:,.1f} days ago, retention is {first.retention or 0:,} s; {len(some)} places"
        if first.on_shelf:
            fix = f"unlost dead list --service {service}: redrive or discard what stands there"
        elif service in facts.living:
            fix = f"unlost service show {service}: more processes, or faster handlers"
        else:
            fix = f"unlost run --service {service}; one that will never run again is to be retired"
        yield Finding(
            severity="warning", code="UL4301", what=f"{service} holds trimming back: events that are past their retention are kept for it",
            evidence=evidence, fix=fix,
        )  # fmt: skip
    if not late and facts.log_here:
        yield _fine(
            "UL4301", "no event is past its retention and still needed", "a retention never takes what is not handled"
        )


def _silent(facts: FileFacts) -> Iterator[Finding]:
    waiting = [h for h in facts.held if not h.on_shelf and h.service not in facts.living]
    for service, some in _by_service(waiting):
        oldest = min(h.recorded for h in some)
        yield Finding(
            severity="note", code="UL4304", what=f"nobody runs {service}, and events wait for it",
            evidence=f"{sum(h.waits for h in some):,} events, the oldest of {rfc3339(oldest)}",
            fix=f"unlost run --service {service}",
        )  # fmt: skip
    if not waiting and facts.log_here:
        yield _fine("UL4304", "every service for which events wait is run by somebody", "registered processes")


def _by_service(held: Sequence[Held]) -> Iterator[tuple[str, list[Held]]]:
    for service in sorted({h.service for h in held}):
        yield service, [h for h in held if h.service == service]


def _fine(code: str, what: str, evidence: str) -> Finding:
    return Finding(severity="ok", code=code, what=what, evidence=evidence)
