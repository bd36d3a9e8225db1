"""Erasure: what the events of one key say leaves log, store and file; that there were events stays, and the books balance.

An event is erased in two steps. First it gets its end in the store: in every service that no process works for, what is
unhandled, waits or is dead becomes `removed`. What a living process has in its hands is its own: dead letters are
discarded by it (as `unlost dead discard` does), everything else ends by being handled. Then its row in the log is emptied,
never before, so that the copies of an event in the store say the same as the log, or are gone. Whoever reads such a row
later, a running service or one that begins in a year, counts it as removed.
**After a crash** of any of this the same call goes on: what is left is found by its key.
"""

from __future__ import annotations

from base64 import b64decode
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from hashlib import blake2b
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from unlost.brokers.port import Erasable, Findable, Place
from unlost.errors import UnlostError, UsageError
from unlost.events import decode_head, event_hash
from unlost.events.topic import Unit
from unlost.ops import export, shelf
from unlost.ops.connect import Looking
from unlost.ops.pages import stretch
from unlost.ops.tail import OWN
from unlost.sqlite.erase import scrub
from unlost.sqlite.file import File
from unlost.store import delayed
from unlost.store.port import Look
from unlost.store.progress import Progress, Runs
from unlost.store.records import FileRecords
from unlost.store.steps import run
from unlost.world import REAL

BATCH = 200  # events in one commit
ASKED_MAX = 100  # in one statement
WAIT_SECONDS = 10.0  # for what living processes have in their hands
AGAIN_SECONDS = 0.1
REMOVED = "removed"

Said = Callable[[int, int], None]  # erased in the log, of how many


class Concerned(msgspec.Struct, kw_only=True):
    """What a service has not handled of the key. `runs`: a living process has some of its partitions."""

    service: str
    runs: bool = False
    waiting: int = 0
    in_flight: int = 0
    retrying: int = 0
    parked: int = 0
    dead: int = 0

    @property
    def unhandled(self) -> int:
        return self.waiting + self.in_flight + self.retrying + self.parked + self.dead


class Survey(msgspec.Struct, kw_only=True):
    """What would be erased. `outbox` and `delayed`: accepted, and in no log yet."""

    log: int
    services: Sequence[Concerned]
    outbox: int
    delayed: int
    exported: int  # rows in the exports that were named
    notes: Sequence[str]  # what cannot be reached from here

    @property
    def anything(self) -> bool:
        return bool(self.log or self.services or self.outbox or self.delayed or self.exported)


class Erased(msgspec.Struct, frozen=True, kw_only=True):
    """What became of it. `left` says in words what is still to be done: the same call goes on with it."""

    key: str  # its hash, as `unlost_operation` has it
    log: int
    removed: int  # outcomes: events of services
    discards: int  # dead letters that living processes were asked to discard
    cancelled: int  # of those that were delayed
    exported: int  # rows in the exports that were named
    left: Sequence[str]
    notes: Sequence[str]


class Chosen(NamedTuple):
    """The events that are meant."""

    key: bytes
    topics: frozenset[str]
    types: frozenset[str]

    def wants(self, topic: str, type: str) -> bool:
        named = not self.types or type in self.types or type.rpartition(".")[2] in self.types
        return named and (not self.topics or topic in self.topics)


class _Event(NamedTuple):
    id: str
    hash: int


class _Standing(NamedTuple):
    """How far a service is in one partition. `read`: how far its living owner has received; `begun`: what a handler has in
    hand that gets its events at most once."""

    position: int
    fated: Runs
    begun: Runs
    read: int

    def lacks(self, position: int) -> bool:
        """Whether this event has no outcome yet."""
        return position >= self.position and position not in self.fated

    def holds(self, position: int) -> bool:
        """Whether a living process has this event before it."""
        return position < self.read and (position in self.begun or self.lacks(position))


_Events = dict[Place, dict[int, _Event]]  # by topic and partition, by position
_Kept = dict[Unit, dict[int, str]]  # on the shelf and in the waiting room: position -> state


def chosen(key: str, *, topics: Collection[str] = (), types: Collection[str] = ()) -> Chosen:
    """
    Raises:
        UsageError: no key is empty.

    Example:
        >>> chosen("c-7", types=["CustomerMoved"]).wants("customer", "customer.CustomerMoved")
        True
    """
    if not key:
        raise UsageError(
            "UL1400", "events are erased by their key", found="an empty text", fix="unlost event erase --key c-7"
        )
    return Chosen(key.encode(), frozenset(topics), frozenset(types))


def survey(here: Looking, what: Chosen, *, store_only: bool = False, exports: Sequence[Path] = ()) -> Survey:
    """Looks at what would be erased; changes nothing but the index of the log, where it keeps one.

    Raises:
        UsageError: the broker's log cannot be changed, and `store_only` was not said; a folder is no export. Damaged: an
        event is not as it was written. Unavailable: broker or store do not answer.
    """
    return _Eraser(here, what, store_only, exports).survey()


def erase(
    here: Looking,
    what: Chosen,
    *,
    operator: str,
    reason: str,
    store_only: bool = False,
    exports: Sequence[Path] = (),
    wait_seconds: float = WAIT_SECONDS,
    said: Said | None = None,
) -> Erased:
    """Erases these events, also in the exports that are named, and waits up to `wait_seconds` for what living processes have in their hands.

    **Guarantee** with an empty `left`: in the log and in the tables of the store nothing is left of these events but id,
    source, type, version and time, and a hash of what they said where an inbox has one; in a broker's own file no byte.
    The books balance before, after, and at every commit between.
    **After a crash** the same call goes on.

    Raises:
        UsageError: no reason was given, the broker's log cannot be changed, or a folder is no export. UnlostError: no event has this key. Damaged:
        an event is not as it was written. Unavailable, OutcomeUnknown: from the store; the same call goes on.

    Example:
        >>> with opened() as here:  # doctest: +SKIP
        ...     erase(here, chosen("c-7"), operator="ada", reason="request 12 of the customer").left
        []
    """
    if not reason.strip():
        raise UsageError("UL1401", "an erasure needs a reason: it is kept in the records", fix='--reason "request 12"')
    return _Eraser(here, what, store_only, exports).erase(
        operator, reason, wait_seconds, said or (lambda _done, _of: None)
    )


class _Eraser:
    def __init__(self, here: Looking, what: Chosen, store_only: bool, exports: Sequence[Path]) -> None:
        self._here = here
        self._what = what
        self._exports = [_Export(folder, what) for folder in exports]
        self._records, self._log = here.pair()
        self._group = FileRecords(here.file) if here.embedded and not here.log_here else None
        self._erasable: Erasable | None = None
        if not store_only:
            if not isinstance(self._log, Erasable):
                raise _unchangeable(here.name)
            self._erasable = self._log

    # --- looking -------------------------------------------------------------------------------------------------

    def survey(self) -> Survey:
        events = self._find()
        kept, outbox, later = self._records.read(lambda look: (self._kept(look), self._outbox(look), self._later(look)))
        return Survey(
            log=_size(events), services=self._records.read(lambda look: self._concerned(look, events, kept)),
            outbox=outbox, delayed=len(later), exported=sum(e.erase(dry_run=True) for e in self._exports),
            notes=self._notes(),
        )  # fmt: skip

    def _find(self) -> _Events:
        """The events of the key that the log holds; none where it cannot be changed."""
        if self._erasable is None:
            return {}
        log, found = self._log, _Events()

        def work() -> None:
            for info in log.topics([name for name in log.names() if not name.startswith(OWN)]) if find is None else ():
                for partition, (start, end) in enumerate(info.ranges):
                    self._note(found, (info.name, partition), stretch(log, info.name, partition, start, end))
            for topic, partition, position in find({self._what.key}) if find is not None else ():
                self._note(found, (topic, partition), log.read(topic, partition, position, 1))

        with log.finder() if isinstance(log, Findable) else nullcontext() as find:
            log.together(work)
        return found

    def _note(self, found: _Events, place: Place, arrivals: Iterable[Any]) -> None:
        for a in arrivals:
            e = a.envelope
            if a.key == self._what.key and e is not None and self._what.wants(place[0], e.type):
                found.setdefault(place, {})[a.position] = _Event(e.id, event_hash(e.source, e.id))

    def _kept(self, look: Look) -> _Kept:
        """Copies in the store, of all services."""
        found: _Kept = defaultdict(dict)
        key = self._what.key
        for *unit, position, type in look.execute(
            "select service, topic, partition, position, type from unlost_shelf where key = ?", (key,)
        ).fetchall():
            if self._what.wants(unit[1], type):
                found[Unit(*unit)][position] = "dead"
        for *unit, position, state, head in look.execute(
            "select w.service, w.topic, w.partition, w.position, l.state, w.head from unlost_waiting w "
            "join unlost_ledger l on l.service = w.service and l.topic = w.topic and l.partition = w.partition "
            "and l.position = w.position where w.key = ?",
            (key,),
        ).fetchall():
            if self._what.wants(unit[1], _type_of(bytes(head))):
                found[Unit(*unit)][position] = state
        return found

    def _outbox(self, look: Look) -> int:
        if isinstance(self._records, FileRecords):
            rows = look.execute(
                "select topic, head, raw from unlost_outbox where key = ?", (self._what.key,)
            ).fetchall()
            return sum(self._what.wants(topic, "" if raw else _type_of(bytes(head))) for topic, head, raw in rows)
        text = self._what.key.decode()
        rows = look.execute(
            "select aggregatetype, type from unlost_outbox where aggregateid = ? and rawkey is null or rawkey = ?",
            (text, self._what.key),
        ).fetchall()
        copies = look.execute("select topic from unlost_copy where key = ?", (self._what.key,)).fetchall()
        return sum(self._what.wants(*row) for row in rows) + sum(self._what.wants(t, "") for (t,) in copies)

    def _later(self, look: Look) -> list[tuple[str, str]]:
        """Id and source of those that are delayed."""
        rows = look.execute("select id, source, topic, head from unlost_delayed where key = ?", (self._what.key,))
        return [
            (id, source)
            for id, source, topic, head in rows.fetchall()
            if self._what.wants(topic, _type_of(bytes(head)))
        ]

    def _concerned(self, look: Look, events: _Events, kept: _Kept) -> list[Concerned]:
        found: dict[str, Concerned] = {}
        living = self._living(look)
        for unit, stands in self._progress(look, {topic for topic, _ in events}).items():
            of = events.get((unit.topic, unit.partition), {})
            in_flight = sum(map(stands.holds, of))
            waiting = sum(stands.lacks(p) and not stands.holds(p) for p in of)
            if in_flight or waiting:
                c = found.setdefault(unit.service, Concerned(service=unit.service))
                c.in_flight += in_flight
                c.waiting += waiting
                c.runs |= unit in living
        for unit, positions in kept.items():
            c = found.setdefault(unit.service, Concerned(service=unit.service))
            c.runs |= unit in living
            for state in positions.values():
                setattr(c, state, getattr(c, state) + 1)
        return [found[name] for name in sorted(found)]

    def _progress(self, look: Look, topics: Collection[str]) -> dict[Unit, _Standing]:
        """Of all units of these topics."""
        processes = self._records.processes(look)
        found = {}
        for *names, owner, position, fated, begun in look.execute(
            "select service, topic, partition, owner, position, fated, begun from unlost_progress"
        ).fetchall():
            unit = Unit(*names)
            if unit.topic in topics:
                process = processes.get(owner)
                read = process.read.get(unit, 0) if process is not None and process.alive else 0
                found[unit] = _Standing(position, Runs.decode(bytes(fated)), Runs.decode(bytes(begun)), read)
        return found

    def _living(self, look: Look) -> set[Unit]:
        """Units that a living process has, or is about to take."""
        processes = self._records.processes(look)
        rows = look.execute("select service, topic, partition, owner from unlost_progress where owner is not null")
        found = {Unit(*unit) for *unit, owner in rows.fetchall() if (p := processes.get(owner)) is not None and p.alive}
        if isinstance(self._records, FileRecords):
            found |= set(self._records.assigned(look))
        return found | self._busy()

    def _busy(self) -> set[Unit]:
        """The embedded broker knows who is about to take a unit, also if the store is elsewhere."""
        return set() if self._group is None else set(self._group.read(self._group.assigned))

    def _notes(self) -> list[str]:
        notes = []
        if self._erasable is None:
            notes.append(
                "the log of this broker keeps its events: let its retention remove them, delete the records before a position, or "
                "write tombstones into a compacted topic"
            )
        if self._here.elsewhere:
            names = ", ".join(self._here.elsewhere)
            notes.append(f"the progress of {names} is in another store: run this there as well (UNLOST_STORE)")
        if not isinstance(self._records, FileRecords):
            notes.append(
                "PostgreSQL keeps deleted rows until VACUUM, and its backups, replicas and WAL archive for longer"
            )
        notes += [note for e in self._exports for note in e.notes()]
        notes.append(
            "backups and other exports that were made before still hold the data, and so do your own tables and logs"
        )
        return notes

    # --- erasing -------------------------------------------------------------------------------------------------

    def erase(self, operator: str, reason: str, wait_seconds: float, said: Said) -> Erased:
        events = self._find()
        begun = self._begin(operator, reason, bool(events))
        total, log, removed, cancelled, discards = _size(events), 0, 0, 0, set[tuple[Unit, int]]()
        end = REAL.monotonic() + wait_seconds
        open: _Events = {place: dict(positions) for place, positions in events.items()}
        while True:
            cancelled += self._cancel()
            for place, positions in _batches(open):
                removed += self._remove({place: positions})
                free = positions.keys() - self._in_hands(place, positions)
                if self._erasable is not None and free:
                    log += self._erasable.erase(*place, free, self._what.key)
                    for position in free:
                        del open[place][position]
                    said(log, total)
            removed += self._remove_kept()
            discards |= self._discard(operator, reason)
            left = self._left(open, events)
            if not left:  # what has left an outbox meanwhile, or was published, is in the log now
                for place, positions in self._find().items():
                    events.setdefault(place, {}).update(positions)
                    open.setdefault(place, {}).update(positions)
                total, left = log + _size(open), self._left(open, events)
            if not left or REAL.monotonic() > end:
                break
            REAL.pause(AGAIN_SECONDS)
        exported = sum(e.erase() for e in self._exports)
        if not left:
            left = self._scrub()
        result = {"log": log, "removed": removed, "discards": len(discards), "cancelled": cancelled}
        result |= {"exported": exported, "left": len(left)}
        self._end(begun, result, done=not left)
        return Erased(
            key=self._hash, log=log, removed=removed, discards=len(discards), cancelled=cancelled, exported=exported, left=left,
            notes=self._notes(),
        )  # fmt: skip

    @property
    def _hash(self) -> str:
        """Stands for the key in the records: it may be a person's."""
        digest = blake2b(self._what.key, digest_size=16, key=self._records.id.encode()[:64]).hexdigest()
        return f"key:{digest}"

    def _begin(self, operator: str, reason: str, in_log: bool) -> int:
        """Writes down who erases, before anything is erased.

        Raises:
            UnlostError: there is nothing to erase, and no erasure of this key that was not brought to its end.
        """

        def work(look: Look) -> int:
            open = look.execute(
                "select 1 from unlost_operation where action = 'erase' and id = ? and carried_out is null",
                (self._hash,),
            ).fetchone()
            if not (in_log or open or self._exports or self._kept(look) or self._outbox(look) or self._later(look)):
                raise _nothing(self._what, self._here.name)
            row = look.execute(
                "insert into unlost_operation (at, operator, action, reason, service, topic, partition, position, id) "
                "values (?, ?, 'erase', ?, '', '', 0, 0, ?) returning number",
                (self._records.now(), operator, reason, self._hash),
            ).fetchone()
            return int(row[0])

        return self._records.write(work)

    def _end(self, number: int, result: Mapping[str, int], *, done: bool) -> None:
        text = msgspec.json.encode(result).decode()

        def work(look: Look) -> None:
            look.execute("update unlost_operation set result = ? where number = ?", (text, number))
            if done:  # also those that were killed before
                look.execute(
                    "update unlost_operation set carried_out = ? where action = 'erase' and id = ? and carried_out is null",
                    (self._records.now(), self._hash),
                )

        self._records.write(work)

    def _cancel(self) -> int:
        """Those that are delayed never leave."""

        def work(look: Look) -> int:
            def execute(sql: str, bindings: Sequence[Any]) -> Any:
                return look.execute(sql, bindings).fetchall()

            now = self._records.now()
            return sum(run(delayed.cancel(id, source, now), execute) for id, source in self._later(look)[:BATCH])

        cancelled = 0
        while self._records.read(self._later):
            cancelled += self._records.write(work)
        return cancelled

    def _remove(self, events: _Events) -> int:
        """In services that no process works for: they end here."""
        busy = self._busy()

        def work(look: Look) -> int:
            rows = look.execute("select service, topic, partition from unlost_progress").fetchall()
            units = {unit for row in rows if (unit := Unit(*row))[1:] in events} - busy
            now = self._records.now()
            return sum(
                _settle(look, unit, events[unit.topic, unit.partition], now)
                for unit in self._records.take_over(look, units)
            )

        return self._records.write(work) if events else 0

    def _remove_kept(self) -> int:
        """The same for copies in the store whose events the log does not hold any more, or keeps."""
        kept, busy, removed = self._records.read(self._kept), self._busy(), 0
        for unit, positions in kept.items():
            for some in () if unit in busy else _parts(sorted(positions), BATCH):

                def work(look: Look, unit: Unit = unit, some: Sequence[int] = some) -> int:
                    free = self._records.take_over(look, {unit})
                    return _take_out(look, unit, some, self._records.now()) if free else 0

                removed += self._records.write(work)
        return removed

    def _discard(self, operator: str, reason: str) -> set[tuple[Unit, int]]:
        """Dead letters of living processes: they are asked, once."""
        letters = [
            letter
            for letter in shelf.letters(self._records, key=self._what.key.decode())
            if letter.request != "discard" and self._what.wants(letter.topic, letter.type)
        ]
        group = None if self._group is None else self._group.file
        shelf.ask(self._records, "discard", letters, operator=operator, reason=reason, wait_seconds=0, group=group)
        return {(Unit(x.service, x.topic, x.partition), x.position) for x in letters}

    def _in_hands(self, place: Place, positions: Collection[int]) -> set[int]:
        """Those that wait or are dead somewhere, or that a living process has read and not ended."""

        def work(look: Look) -> set[int]:
            found = {p for unit, kept in self._kept(look).items() if unit[1:] == place for p in kept}
            for unit, stands in self._progress(look, {place[0]}).items():
                if unit[1:] == place:
                    found |= set(filter(stands.holds, positions))
            return found

        return self._records.read(work)

    def _left(self, open: _Events, events: _Events) -> list[str]:
        """What is still to be done, in words. What was emptied must also have an end in every service at work: its process
        may have read it before, and would put it on the shelf with all that it said."""

        def work(look: Look) -> list[str]:
            kept, living = self._kept(look), self._living(look)
            said = []
            for unit, stands in self._progress(look, {topic for topic, _ in events}).items():
                of = events.get((unit.topic, unit.partition), {}) if unit in living else {}
                count = sum(stands.lacks(p) or stands.holds(p) for p in of)
                if count:
                    said.append(f"{unit}: a process at work has {count} of its events before it")
            for unit, positions in kept.items():
                states = ", ".join(sorted(set(positions.values())))
                said.append(f"{unit}: {len(positions)} of its events are kept for a process at work ({states})")
            if outbox := self._outbox(look):
                said.append(f"the outbox holds {outbox} of its events; they are erased when they have left it")
            return said

        left = self._records.read(work)
        if not left and (count := _size(open)) and self._erasable is not None:
            left.append(f"the log holds {count} of its events")
        return left

    def _scrub(self) -> list[str]:
        files: list[File] = []
        if self._here.embedded and self._erasable is not None:
            files.append(self._here.file)
        if isinstance(self._records, FileRecords) and self._records.file not in files:
            files.append(self._records.file)
        return [f"old bytes are still in {file.path}: {why}" for file in files if (why := scrub(file))]


class _Export:
    """A folder that `unlost store export` has written."""

    def __init__(self, folder: Path, what: Chosen) -> None:
        """
        Raises:
            UsageError: it is none.
        """
        self._folder, self._what = folder, what
        if not (folder / export.MANIFEST).is_file():
            raise UsageError(
                "UL1404", f"no export made {folder}", found=f"no {export.MANIFEST} in it",
                fix="name the folder that --to named when it was exported",
            )  # fmt: skip

    def notes(self) -> list[str]:
        manifest = export.read_manifest(self._folder)
        if manifest is None or manifest.filters.key is None or manifest.filters.key.encode() != self._what.key:
            return []
        return [
            f"{self._folder / export.MANIFEST} names the key, for it is an export of this key alone: delete the folder"
        ]

    def erase(self, *, dry_run: bool = False) -> int:
        """Returns how many rows that were. A file and its size in the manifest change one after the other: if this is killed
        between, the next call makes the same file, and no export goes on before."""
        with export.explained(self._folder), export.alone(self._folder):
            manifest = export.read_manifest(self._folder)
            assert manifest is not None
            erased = 0
            for n, part in enumerate(manifest.files):
                path = self._folder / part.name
                if not path.is_file():
                    continue  # its next run says so
                count, whole = _without(path, manifest.files_are, self._what)
                erased += count
                if count and not dry_run:
                    manifest.files[n] = msgspec.structs.replace(part, bytes=len(whole))
                    self._save(manifest)
                    with export.whole(path) as file:
                        file.write(whole)
        return erased

    def _save(self, manifest: export.Manifest) -> None:
        body = msgspec.json.encode(manifest)
        document = export.Document(format=export.FORMAT, sum=export.sum_of(body), export=msgspec.Raw(body))
        with export.whole(self._folder / export.MANIFEST) as file:
            file.write(msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n")


_SAYING = ("key", "key_raw", "subject", "correlationid", "causationid", "traceparent", "headers", "data", "data_raw", "problem")  # fmt: skip
_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_NULL = msgspec.Raw(b"null")


def _without(path: Path, format: export.Format, what: Chosen) -> tuple[int, bytes]:
    """The rows of an exported file that are meant, and the file without what they say."""
    return _lines_without(path, what) if format == "jsonl" else _table_without(path, what)


def _means(what: Chosen, key: str | None, raw: bytes | None, topic: str, type: str | None) -> bool:
    return what.key == (raw if key is None else key.encode()) and what.wants(topic, type or "")


def _lines_without(path: Path, what: Chosen) -> tuple[int, bytes]:
    count, whole = 0, bytearray()
    for line in path.read_bytes().splitlines(keepends=True):
        members = _members(line)
        key, raw, topic, type = (msgspec.json.decode(members[n]) for n in ("key", "key_raw", "topic", "type"))
        if _means(what, key, None if raw is None else b64decode(raw), topic, type):
            count += 1
            line = msgspec.json.encode(members | dict.fromkeys(_SAYING, _NULL)) + b"\n"
        whole += line
    return count, bytes(whole)


def _table_without(path: Path, what: Chosen) -> tuple[int, bytes]:
    write = export.writer_of("parquet")  # says what is missing
    table = import_module("pyarrow.parquet").read_table(BytesIO(path.read_bytes()))
    columns = {name: table[name].to_pylist() for name in export.COLUMNS if name not in ("time", "recorded")}
    columns |= {name: table[name].cast("int64").to_pylist() for name in ("time", "recorded")}
    named = zip(*(columns[name] for name in ("key", "key_raw", "topic", "type")), strict=True)
    meant = [_means(what, *row) for row in named]
    for name in _SAYING:
        columns[name] = [None if gone else value for value, gone in zip(columns[name], meant, strict=True)]
    whole = BytesIO()
    write(whole, list(zip(*(columns[name] for name in export.COLUMNS), strict=True)))
    return meant.count(True), whole.getvalue()


def _settle(look: Look, unit: Unit, events: Mapping[int, _Event], now: int) -> int:
    """Gives these events their end in a unit that was taken over in this commit; returns how many had none."""
    position, fated, digest, attempts = look.execute(
        "select position, fated, digest, attempts from unlost_progress where service = ? and topic = ? and partition = ?",
        unit,
    ).fetchone()
    progress = Progress(position, Runs.decode(bytes(fated)), {}, digest)
    ended = [p for p in sorted(events) if p < position or p in progress.fated]
    open = [p for p in sorted(events) if p >= position and p not in progress.fated]
    for p in open:
        progress.settle(p, events[p].hash, None)
        look.execute(
            "insert into unlost_ledger (service, topic, partition, position, state, id, since) values (?, ?, ?, ?, ?, ?, ?)",
            (*unit, p, REMOVED, events[p].id, now),
        )
    if open:
        left = {p: a for p, a in msgspec.json.decode(attempts, type=dict[int, Any]).items() if p not in open}
        look.execute(
            "update unlost_progress set position = ?, fated = ?, digest = ?, attempts = ? "
            "where service = ? and topic = ? and partition = ?",
            (progress.position, progress.fated.encode(), progress.digest, msgspec.json.encode(left).decode(), *unit),
        )
    return len(open) + _take_out(look, unit, ended, now)


def _take_out(look: Look, unit: Unit, positions: Collection[int], now: int) -> int:
    """The same for those that wait or are dead; of others nothing is changed."""
    count = 0
    for some in _parts(sorted(positions), ASKED_MAX):
        places = f"service = ? and topic = ? and partition = ? and position in ({', '.join('?' * len(some))})"
        gone = [
            p
            for table in ("unlost_waiting", "unlost_shelf")
            for (p,) in look.execute(
                f"delete from {table} where {places} returning position", (*unit, *some)
            ).fetchall()
        ]
        for p in gone:
            look.execute(
                "update unlost_ledger set state = ?, since = ? "
                "where service = ? and topic = ? and partition = ? and position = ?",
                (REMOVED, now, *unit, p),
            )
        count += len(gone)
    return count


def _batches(events: _Events) -> Iterator[tuple[Place, dict[int, _Event]]]:
    for place, positions in list(events.items()):
        for some in _parts(sorted(positions), BATCH):
            yield place, {p: positions[p] for p in some}


def _parts(all: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for n in range(0, len(all), size):
        yield all[n : n + size]


def _size(events: _Events) -> int:
    return sum(map(len, events.values()))


def _type_of(head: bytes) -> str:
    """Empty where these bytes are no event."""
    try:
        return decode_head(head, topic="", key=None, data=None).type
    except UnlostError:
        return ""


def _unchangeable(name: str) -> UsageError:
    return UsageError(
        "UL1402", "this broker lacks the ability to erase: what its log holds cannot be changed", found=name,
        fix="a topic's retention removes its events in time; records before a position can be deleted (kafka-delete-records), and "
        "a compacted topic forgets a key after a tombstone; --store-only erases what the store keeps (shelf, waiting room)",
    )  # fmt: skip


def _nothing(what: Chosen, name: str) -> UnlostError:
    where = " and ".join(
        [*(f"the topic {t}" for t in sorted(what.topics)), *(f"the type {t}" for t in sorted(what.types))]
    )
    return UnlostError(
        "UL1403", "no event has this key" + (f" in {where}" if where else ""), found=f"{name} was searched, and its store",
        fix="a key is compared letter by letter: unlost tail shows them; what was erased before has none",
    )  # fmt: skip
