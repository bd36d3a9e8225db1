"""Copies of the embedded file, and putting one back: what each holds, what is missing after it, who did it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from unlost import config
from unlost.errors import UnlostError, UsageError
from unlost.ops.connect import Looking
from unlost.ops.verify import Verified, verify_file
from unlost.sqlite import backup as files
from unlost.sqlite import guards
from unlost.sqlite.backup import Manifest, Range, Said
from unlost.sqlite.marks import read_marks
from unlost.store.port import Look
from unlost.store.records import FileRecords
from unlost.world import REAL, new_id, rfc3339

SERVER_FIX = (
    "pg_dump -Fc or pg_basebackup copies it; after its restore unlost doctor checks the tables (UL4607), the books of the outbox "
    "(UL4410), and whether the store is older than what the broker was told (UL4407)"
)


Epochs = dict[tuple[Any, ...], int]  # by service, topic, partition


class Backup(msgspec.Struct, frozen=True, kw_only=True):
    """A backup that was made. `not_in_it` says what else this installation needs."""

    path: str
    source: str
    bytes: int
    manifest: Manifest
    not_in_it: Sequence[str]


class Again(msgspec.Struct, frozen=True, kw_only=True):
    """A unit whose saved position goes back: its events from `position` to `was` are delivered again."""

    service: str
    topic: str
    partition: int
    position: int
    was: int


class Missing(msgspec.Struct, frozen=True, kw_only=True):
    """What the replaced file held, or had acknowledged, and the backup does not."""

    positions: Sequence[Range]  # events of the log
    again: Sequence[Again]
    outbox: int  # events that were accepted, and are in neither the backup nor, as far as is known here, the broker
    commits: int | None  # acknowledged after the backup; None: not known
    unknown: str = ""  # why it is not known which events those are

    @property
    def events(self) -> int:
        return sum(r.end - r.start for r in self.positions) + self.outbox


class Restored(msgspec.Struct, frozen=True, kw_only=True):
    """What was put back, or with `done` false would be."""

    path: str
    backup: str
    manifest: Manifest
    missing: Missing
    done: bool
    replaces: bool  # there is a file now
    aside: str | None  # where the replaced file is
    store: str  # its id from now on
    notes: Sequence[str]


def back_up(
    target: Path | None = None, *, url: str | None = None, store: str | None = None, said: Said = lambda *_: None
) -> Backup:
    """Copies the embedded file while services run, reads the copy through, and gives it its name.

    **Guarantee** the copy is the file as it was at one moment, whole, on the disk, and 0600.
    **After a crash** there is no file of that name, or it is whole; `PATH.part` may be left and is never taken for a backup.

    Raises:
        UsageError: there is no such file, the target is there, or its folder is not. Unavailable: no room. Damaged: the file is.
    """
    looking = Looking(config.setting("broker", flag=url), config.setting("store", code=store))
    try:
        source = _place(looking)
        records = FileRecords(looking.file) if looking.embedded else looking.records
        assert isinstance(records, FileRecords)
        now = REAL.now()
        stamp = rfc3339(now)[:19].replace(":", "").replace("-", "")
        chosen = target or source.with_name(f"{source.stem}-{stamp}.backup")
        manifest = files.back_up(records.file.path, chosen, now=now, check=_check(said), said=said)
        return Backup(
            path=str(chosen), source=str(source), bytes=chosen.stat().st_size, manifest=manifest,
            not_in_it=_elsewhere(looking),
        )  # fmt: skip
    finally:
        looking.close()


def restore(
    backup: Path, *, operator: str, reason: str, replace: bool = False, dry_run: bool = False, url: str | None = None,
    store: str | None = None, said: Said = lambda *_: None,
) -> Restored:  # fmt: skip
    """Puts a backup into the place of the configured file; says, and records in it, what it does not hold.

    **Guarantee** nothing is overwritten: a file that is there is moved aside, whole, and only with `replace`. The epochs go
    on above all that were given, and a file with a log gets a new identity: whoever knew the one before is refused.
    **After a crash** the old file is there, or the new one, or the marks refuse a start; run it again.

    Raises:
        UsageError: no backup, no reason, processes use the file, or one is there. Damaged: the backup is not whole.
    """
    if not reason.strip() and not dry_run:
        raise UsageError(
            "UL1464",
            "a restore needs a reason: it stands in the records of the file from then on",
            fix='--reason "why"',
        )
    looking = Looking(config.setting("broker", flag=url), config.setting("store", code=store))
    path = _place(looking).resolve()
    now = REAL.now()
    with files.opened_backup(backup) as (copy, manifest):
        _must_fit(looking, backup, manifest)
        said("checking", 0, 0)
        files.check_backup(copy, manifest, _check(said))
        with files.taken(path) as old:
            missing, epochs, known, other = _compare(path, old, copy, manifest)
            log_here = manifest.broker is None
            identity = new_id() if log_here else manifest.store
            result = Restored(
                path=str(path), backup=str(backup), manifest=manifest, missing=missing, done=False, replaces=old.there,
                aside=None, store=identity, notes=[*_notes(copy, log_here), *other, *(f"not in it: {text}" for text in _elsewhere(looking))],
            )  # fmt: skip
            if dry_run:
                return result
            if old.there and not replace:
                raise UsageError(
                    "UL1458", f"there is a file at {path}, and a restore overwrites nothing", found=brief(missing),
                    fix="look at it with --dry-run; --replace moves the old file aside, whole, into a folder beside it",
                )  # fmt: skip

            def renew(look: Look) -> None:
                _renew(look, manifest, epochs, identity, known)
                _record(look, result, operator, reason, now)

            aside = files.put_back(path, copy, old, renew=renew, check=_check(said), now=now, said=said)
    return msgspec.structs.replace(result, done=True, aside=None if aside is None else str(aside))


# --- which file, and what is not in it -------------------------------------------------------------------


def _place(looking: Looking) -> Path:
    """
    Raises:
        UsageError: neither the log nor the store is a file of ours.
    """
    if looking.embedded:
        return looking.broker_path
    if looking.postgres:
        raise UsageError(
            "UL1450", "there is no file here to copy or to put back: the store is in PostgreSQL, the events are in Kafka",
            found=f"{looking.place}, {looking.name}", fix=SERVER_FIX,
        )  # fmt: skip
    return looking.store_path


def _elsewhere(looking: Looking) -> list[str]:
    if not looking.embedded:
        return [
            f"the events themselves: they are in {looking.name}; the file has progress, shelf, waiting room, inbox and outbox"
        ]
    if looking.postgres:
        return [f"the store in {looking.place} (progress, shelf, inbox, outbox); the file has the log. {SERVER_FIX}"]
    return []


def _must_fit(looking: Looking, backup: Path, manifest: Manifest) -> None:
    if looking.embedded == (manifest.broker is None):
        return
    raise UsageError(
        "UL1463", f"{backup} does not belong here",
        found=f"it is the store beside {manifest.broker}" if manifest.broker else "it is the file of an embedded broker, with its log",
        fix="name the broker that it was used with (--broker kafka://…)" if manifest.broker
        else "--broker embedded:///path/events.db: the place where it was",
    )  # fmt: skip


def _notes(copy: files.Copy, log_here: bool) -> list[str]:
    if not log_here:
        return [
            "where the group on the cluster was told of later positions, services refuse to start (UL3023); unlost doctor names them "
            "(UL4407), with the way out"
        ]
    followers = copy.read(lambda c: c.execute("select distinct service from unlost_follower order by 1").fetchall())
    if not followers:
        return []
    names = ", ".join(name for (name,) in followers)
    return [
        f"the progress of {names} is in a store elsewhere, which will not start with the restored log (UL1133): positions are given again"
    ]


def _check(said: Said) -> Callable[[files.Copy], Sequence[str]]:
    def check(copy: files.Copy) -> Sequence[str]:
        found = verify_file(copy, said=lambda what, rows: said(f"checking {what}", rows, 0))
        return lines(found)

    return check


def lines(found: Verified) -> list[str]:
    """The errors among the damages."""
    bad = [f"{d.place or d.table}: {d.what}" for d in found.damages if d.severity == "error"]
    return bad + ([f"and {found.more} more"] if found.more and bad else [])


# --- what is missing after it ----------------------------------------------------------------------------


def _compare(
    path: Path, old: files.Old, copy: files.Copy, manifest: Manifest
) -> tuple[Missing, Epochs, int, list[str]]:
    """What is missing, the epochs that were given, the highest commit that is known, and what else is to be said."""
    marked = max(
        (commit for tag, commit in read_marks(guards.beside(path, "marks")) if tag == manifest.store[:16]), default=0
    )
    found = Missing(positions=[], again=[], outbox=0, commits=max(0, marked - manifest.commit))
    known, epochs, notes, why = max(marked, manifest.commit), Epochs(), list[str](), old.why
    if old.copy is not None:
        try:
            found, epochs, commit, store = old.copy.read(lambda look: _beyond(look, copy, manifest))
            known = max(known, commit)
            if store != manifest.store:
                notes.append(f"the file that is there has another id ({store}) than the backup ({manifest.store})")
            if marked > commit:
                why = f"it ends with commit {commit}, and {marked} had been acknowledged"
        except (UnlostError, TypeError) as e:  # damaged: that is what a restore is for
            why = e.what + (f": {e.found}" if e.found else "") if isinstance(e, UnlostError) else str(e)
    elif not old.there and marked > manifest.commit:
        why = "it is gone, but for the marks of what was acknowledged"
    return msgspec.structs.replace(found, commits=known - manifest.commit, unknown=why), epochs, known, notes


def _beyond(look: Any, copy: files.Copy, manifest: Manifest) -> tuple[Missing, Epochs, int, str]:
    store = look.execute("select value from unlost_meta where name = 'store_id'").fetchone()[0]
    commit = look.execute("select n from unlost_commit").fetchone()[0]
    ends = {(r.topic, r.partition): r.end for r in manifest.positions}
    lost = [
        Range(topic=r.topic, partition=r.partition, start=start, end=r.end)
        for r in files.ranges(look)
        if (start := max(r.start, ends.get((r.topic, r.partition), 0))) < r.end
    ]
    epochs, positions = _progress(look)
    again = [
        Again(service=service, topic=topic, partition=partition, position=at, was=positions[service, topic, partition])
        for (service, topic, partition), at in copy.read(_progress)[1].items()
        if at < positions.get((service, topic, partition), 0)
    ]
    last = copy.read(_last_number)
    outbox = look.execute("select count(*) from unlost_outbox where raw is null and number > ?", (last,)).fetchone()[0]
    return Missing(positions=lost, again=again, outbox=outbox, commits=None), epochs, commit, store


def _progress(look: Look) -> tuple[Epochs, Epochs]:
    """Epoch and position of each unit."""
    rows = look.execute(
        "select service, topic, partition, epoch, position from unlost_progress order by 1, 2, 3"
    ).fetchall()
    return {tuple(row[:3]): row[3] for row in rows}, {tuple(row[:3]): row[4] for row in rows}


def _last_number(look: Look) -> int:
    """The highest that a row of the outbox has had: SQLite gives none of them twice."""
    row = look.execute("select seq from sqlite_sequence where name = 'unlost_outbox'").fetchone()
    return 0 if row is None else int(row[0])


# --- what a restored file goes on with -------------------------------------------------------------------


def _renew(look: Look, manifest: Manifest, epochs: Epochs, identity: str, known: int) -> None:
    """Nobody of before has anything here: no process, no partition, no epoch that still counts."""
    for table in ("unlost_process", "unlost_member"):
        look.execute(f"delete from {table}")
    look.execute("update unlost_assignment set process = null")
    look.execute("update unlost_relay set process = null")
    look.execute(
        "update unlost_progress set epoch = epoch + 1, owner = case when owner is not null then ? end", (new_id(),)
    )  # a unit that was owned still counts as left by a crash
    for unit, epoch in epochs.items():
        look.execute(
            "update unlost_progress set epoch = max(epoch, ?) where service = ? and topic = ? and partition = ?",
            (epoch + 1, *unit),
        )
    look.execute("update unlost_commit set n = ?", (known + 1,))
    look.execute("update unlost_meta set value = ? where name = 'store_id'", (identity,))
    look.execute("delete from unlost_meta where name = 'backup'")


def _record(look: Look, found: Restored, operator: str, reason: str, now: int) -> None:
    """One line for the restore, and one for each range of positions that is missing."""
    missing = found.missing
    summary = f"backup of {found.manifest.time}, commit {found.manifest.commit}; store {found.manifest.store} is now {found.store}; {brief(missing)}"
    places = [
        ("", 0, 0, summary),
        *(
            (r.topic, r.partition, r.start, f"positions {r.start} to {r.end - 1} are missing")
            for r in missing.positions
        ),
    ]
    for topic, partition, position, text in places:
        look.execute(
            "insert into unlost_operation (at, operator, action, reason, service, topic, partition, position, id, carried_out, result) "
            "values (?, ?, 'restore', ?, '', ?, ?, ?, '', ?, ?)",
            (now, operator, reason, topic, partition, position, now, text),
        )  # fmt: skip


def brief(missing: Missing) -> str:
    """What is missing, in one line."""
    parts = []
    again = sum(a.was - a.position for a in missing.again)
    if missing.events:
        parts.append(f"accepted, and not in the backup: {_count(missing.events, 'event')}")
    if again:
        parts.append(f"handled, and delivered again: {_count(again, 'event')}")
    if missing.commits:
        parts.append(f"acknowledged after it: {_count(missing.commits, 'commit')} of any kind")
    if missing.unknown:
        parts.append(f"of the file that was there not everything is known: {missing.unknown}")
    return "; ".join(parts) or "nothing is missing, as far as is known"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
