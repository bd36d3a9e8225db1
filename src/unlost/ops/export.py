"""History out: the events of the log as files for tools of others; it goes on where it ended."""

from __future__ import annotations

import difflib
import fcntl
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from hashlib import blake2b
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import msgspec

from unlost.brokers.port import Log, Place
from unlost.errors import Damaged, UnlostError, UsageError
from unlost.events.topic import Arrival, TopicInfo
from unlost.ops.publish import shown_fields
from unlost.ops.tail import OWN, moment
from unlost.world import rfc3339

Format = Literal["jsonl", "parquet"]
MANIFEST = "manifest.json"
EVENTS = "events"  # the folder in the folder: events/TOPIC/PARTITION-START-END.FORMAT
FORMAT = 1  # of the manifest
EVENTS_MAX = 100_000  # in one file, which is made in memory
BYTES_MAX = 64 * 1024 * 1024  # of stored attributes and data, likewise
SCAN_MAX = 1_000_000  # positions after which progress is written down, also where no event matched
PAGE = 4096  # events in one read, fewer where they are large
PAGE_BYTES = 16 * 1024 * 1024
_PART = ".part"
_NAME = re.compile(r"\d{5}-\d{15}-\d{15}\.(jsonl|parquet)")
_CODE = re.compile(r"UL\d{4}")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


COLUMNS = (
    "id", "source", "type", "topic", "partition", "position", "key", "key_raw", "time", "recorded", "subject",
    "correlationid", "causationid", "traceparent", "version", "headers", "data", "data_raw", "problem",
)  # fmt: skip
"""One event as it is written, the same in both formats. `key` and `data` are text (`data` is JSON); `data_raw` is what is
no JSON. `problem` says why bytes of the log are no event; then they have no id."""

_REPEATED = ("source", "type", "topic", "partition", "version", "key", "key_raw", "subject", "headers")

Row = tuple[Any, ...]  # a value per column; times in microseconds since 1970


class Moment(msgspec.Struct, frozen=True):
    """A time as it was typed, and what it meant then: `10m` means the same moment when the export goes on."""

    said: str
    micros: int


class Filters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which events are wanted. Nothing said: all. Types are wire types or class names; times are those of recording, the
    first inclusive, the second not."""

    topics: list[str] = []
    types: list[str] = []
    key: str | None = None
    since: Moment | None = None
    until: Moment | None = None


class Range(NamedTuple):
    """Positions [start, end) of a partition."""

    topic: str
    partition: int
    start: int
    end: int

    def __str__(self) -> str:
        return f"{self.topic}/{self.partition}:{self.start}-{self.end - 1}"


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One file: all events of the range that were wanted."""

    name: str
    range: Range
    events: int
    bytes: int


class Manifest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What the folder holds and how far it has come; written anew after each file."""

    broker: str
    files_are: Format
    with_sensitive: bool
    filters: Filters
    topics: dict[str, str] = {}  # name -> id
    shown: dict[str, bool] = {}  # type -> whether its data are in the files
    next: dict[str, dict[int, int]] = {}  # topic -> partition -> position to go on from
    gone: list[Range] = []
    files: list[Part] = []


class Exported(msgspec.Struct, kw_only=True):
    """What one run has done. `all_events` and `all_files` are those of the folder."""

    events: int = 0
    files: int = 0
    bytes: int = 0
    all_events: int = 0
    all_files: int = 0
    resumed: bool = False
    left_out: dict[str, int] = {}  # why data are not in the files -> of how many events
    gone: list[Range] = []  # what the log had no longer
    empty: int = 0  # positions that never were events of anybody, or that compaction took


def filters(
    *,
    topics: Sequence[str] = (),
    types: Sequence[str] = (),
    key: str | None = None,
    since: str | None = None,
    until: str | None = None,
) -> Filters:
    """The filters from what was typed; times as `unlost tail` takes them.

    Raises:
        UsageError: a time is none, or the first is not before the second.

    >>> filters(types=["OrderPlaced"], since="2026-11-23T14:00:00Z").since.micros
    1795442400000000
    """
    first, last = (None if text is None else Moment(text, moment(text)) for text in (since, until))
    if first is not None and last is not None and first.micros >= last.micros:
        raise UsageError(
            "UL1388", "--from lies before --until", found=f"from {rfc3339(first.micros)} until {rfc3339(last.micros)}",
            fix="exchange them, or leave one out",
        )  # fmt: skip
    return Filters(topics=sorted(set(topics)), types=sorted(set(types)), key=key, since=first, until=last)


def export(
    log: Log,
    folder: Path,
    *,
    format: Format,
    wanted: Filters | None = None,
    with_sensitive: bool = False,
) -> Exported:
    """Writes what the log holds now, and an earlier run has not written, into files in this folder.

    **Guarantee** a file is there under its name only when it is whole and on the disk. Over any number of runs each event
    that the filters want is in the files once; of positions that the log has no longer, the range is named.
    **After a crash** the same call goes on after the last file that the manifest names; what stands beside it is removed.

    Raises:
        UsageError: the folder belongs to something else, the manifest does not fit this call (nothing is changed then), or
        pyarrow is missing. Damaged: the log is not the one that it was. Unavailable: the broker does not answer.
        UnlostError: the folder cannot be written to.
    """
    wanted = wanted or Filters()
    write = writer_of(format)
    topics = _topics(log, wanted.topics)
    fresh = Manifest(broker=log.identity, files_are=format, with_sensitive=with_sensitive, filters=wanted)
    with explained(folder), alone(folder):
        found = read_manifest(folder)
        manifest = fresh if found is None else found
        if found is not None:
            _check(folder, found, fresh, topics)
            _sweep(folder, found)
        run = _Run(log, folder, manifest, write)
        run.result.resumed = found is not None
        if found is None:
            run.save()
        for topic in topics:
            for partition in range(topic.partitions):
                run.place(topic, partition)
        return run.end()


class _Run:
    """One run over all places, one after another."""

    def __init__(self, log: Log, folder: Path, manifest: Manifest, write: _Write) -> None:
        self.result = Exported()
        self._log = log
        self._folder = folder
        self._manifest = manifest
        self._write = write
        self._left_out: Counter[str] = Counter()
        self._rows = _Rows(manifest, self._left_out)

    def place(self, topic: TopicInfo, partition: int) -> None:
        """All that is new in one partition."""
        first, end = topic.ranges[partition]
        known = self._manifest.next.get(topic.name, {}).get(partition)
        if known is not None and end < known:
            raise Damaged(
                "UL1389", f"{topic.name}/{partition} ends before what was exported from it", found=f"its end is {end}, exported up to {known}",
                fix="run: unlost doctor; the files hold what the log has lost. Export what there is into another folder",
            )  # fmt: skip
        since = self._manifest.filters.since
        at = known or 0
        if known is None and since is not None:
            start = self._log.at(topic.name, partition, since.micros)
            at = start if start > first else 0  # what is gone may have been wanted
        self._manifest.topics[topic.name] = topic.id
        start, rows, size, gone = at, list[Row](), 0, list[Range]()
        pace = PAGE // 16
        while at < end:
            limit = min(pace, EVENTS_MAX - len(rows), end - at)
            page = [a for a in self._log.read(topic.name, partition, at, limit) if a.position < end]
            if not page or page[0].position > at or page[-1].position - page[0].position >= len(page):
                at = self._gap(topic, partition, at, end, page, gone)
            if page:
                at = page[-1].position + 1
                rows += self._rows.of((topic.name, partition), page)
                read = sum([len(a.data or b"") + len(a.head or b"") for a in page])
                size += read
                pace = max(1, min(PAGE, PAGE_BYTES * len(page) // (read + 1)))
            if len(rows) >= EVENTS_MAX or size >= BYTES_MAX or at - start >= SCAN_MAX or at >= end:
                self._note(topic, Range(topic.name, partition, start, at), rows, gone)
                start, rows, size, gone = at, [], 0, []

    def _gap(
        self, topic: TopicInfo, partition: int, at: int, end: int, page: Sequence[Arrival], gone: list[Range]
    ) -> int:
        """Positions that the log says nothing of, and where to go on if the page is empty."""
        first = page[0].position if page else end
        there = self._log.topics([topic.name])
        lowest = there[0].ranges[partition][0] if there else at
        lost = max(at, min(first, lowest))
        if lost > at:
            gone.append(Range(topic.name, partition, at, lost))
        if page:
            self.result.empty += page[-1].position + 1 - lost - len(page)
        elif lost == at:  # nothing is gone, and nothing more to come
            self.result.empty += end - at
            return end
        return lost

    def _note(self, topic: TopicInfo, range: Range, rows: list[Row], gone: list[Range]) -> None:
        """The file first, then the manifest that names it."""
        there = self._log.topics([topic.name])
        if not there or there[0].id != topic.id:
            raise _recreated(topic.name, topic.id, there[0].id if there else "no topic")
        manifest = self._manifest
        if rows:
            kind = manifest.files_are
            name = f"{EVENTS}/{topic.name}/{range.partition:05d}-{range.start:015d}-{range.end:015d}.{kind}"
            path = self._folder / name
            _make_folder(path.parent)
            with whole(path) as file:
                self._write(file, rows)
                size = file.tell()
            manifest.files.append(Part(name=name, range=range, events=len(rows), bytes=size))
        manifest.gone += gone
        manifest.next.setdefault(topic.name, {})[range.partition] = range.end
        self.save()
        self.result.gone += gone
        if rows:
            self.result.events += len(rows)
            self.result.files += 1
            self.result.bytes += size

    def save(self) -> None:
        body = msgspec.json.encode(self._manifest)
        document = Document(format=FORMAT, sum=sum_of(body), export=msgspec.Raw(body))
        with whole(self._folder / MANIFEST) as file:
            file.write(msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n")

    def end(self) -> Exported:
        self.result.left_out = dict(sorted(self._left_out.items()))
        self.result.all_events = sum(part.events for part in self._manifest.files)
        self.result.all_files = len(self._manifest.files)
        return self.result


# ---- rows


_any = msgspec.json.Decoder().decode
_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode  # values keep their text: no number is rounded
_encode = msgspec.json.Encoder().encode


class _Rows:
    """Makes rows of those arrivals that are wanted, without what nobody may see."""

    def __init__(self, manifest: Manifest, left_out: Counter[str]) -> None:
        wanted = manifest.filters
        self._since = None if wanted.since is None else wanted.since.micros
        self._until = None if wanted.until is None else wanted.until.micros
        self._key = None if wanted.key is None else wanted.key.encode()
        self._types = frozenset(wanted.types)
        self._all = self._since is None and self._until is None and self._key is None and not self._types
        self._with_sensitive = manifest.with_sensitive
        self._shown_types = manifest.shown
        self._left_out = left_out
        self._fields: dict[str, frozenset[str] | None] = {}

    def of(self, place: Place, arrivals: Sequence[Arrival]) -> list[Row]:
        if not self._all:
            arrivals = [a for a in arrivals if self._wants(a)]
        row = self._row
        return [row(place, a) for a in arrivals]

    def _wants(self, a: Arrival) -> bool:
        if self._since is not None and a.recorded < self._since:
            return False
        if self._until is not None and a.recorded >= self._until:
            return False
        if self._key is not None and a.key != self._key:
            return False
        if not self._types:
            return True
        e = a.envelope
        return e is not None and (e.type in self._types or e.type.rpartition(".")[2] in self._types)

    def _row(self, place: Place, a: Arrival) -> Row:
        topic, partition = place
        e = a.envelope
        raw_key = a.key if e is None else e.key
        try:
            key = None if raw_key is None else raw_key.decode()
        except UnicodeDecodeError:
            key = None  # then only `key_raw` has it
        if e is None:
            data_raw = a.data if self._with_sensitive else None
            if a.data is not None and data_raw is None:
                self._left_out["bytes that are no event"] += 1
            problem = (a.problem or a.rule or "no event").encode(errors="backslashreplace").decode()
            if not self._with_sensitive:  # a decoder's error may quote what it has read
                code = _CODE.match(a.problem)
                problem = code.group() if code else a.rule or "no event"
            return (
                None, None, None, topic, partition, a.position, key, raw_key, None, a.recorded, None, None, None, None,
                None, None, None, data_raw, problem,
            )  # fmt: skip
        data, data_raw = (None, None) if e.data is None else self._data(e.type, e.data)
        return (
            e.id, e.source, e.type, topic, partition, a.position, key, raw_key, _micros(e.time), a.recorded, e.subject,
            e.correlationid, e.causationid, e.traceparent, e.eventversion,
            _encode(e.headers).decode() if e.headers else None, data, data_raw, None,
        )  # fmt: skip

    def _data(self, type: str, raw: bytes) -> tuple[str | None, bytes | None]:
        if self._with_sensitive:
            return (None, raw) if _json(raw) is _NO_JSON else (raw.decode(), None)
        try:
            shown = self._fields[type]
        except KeyError:
            shown = self._fields[type] = shown_fields(type)
            self._shown_types[type] = shown is not None
        if shown is None:
            self._left_out[f"data of {type}: your code has no class for it"] += 1
            return None, None
        value = _json(raw)
        if not isinstance(value, dict):
            self._left_out[f"data of {type} that are no JSON object"] += 1
            return None, None
        if shown.issuperset(value):
            return raw.decode(), None
        return _encode({name: v if name in shown else "***" for name, v in _members(raw).items()}).decode(), None


_NO_JSON = object()


def _json(raw: bytes) -> Any:
    try:
        return _any(raw)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return _NO_JSON


def _micros(time: str) -> int:
    """Microseconds since 1970. Times as unlost writes them share their second with many others."""
    if len(time) == 27 and time[26] == "Z":
        return _second(time[:19]) + int(time[20:26])
    return (datetime.fromisoformat(time) - _EPOCH) // timedelta(microseconds=1)


@lru_cache(maxsize=1024)
def _second(text: str) -> int:
    return int((datetime.fromisoformat(text + "Z") - _EPOCH).total_seconds()) * 1_000_000


# ---- files of a format

_Write = Callable[[BinaryIO, list[Row]], None]


def writer_of(format: Format) -> _Write:
    return _write_jsonl if format == "jsonl" else _parquet_writer()


def _write_jsonl(file: BinaryIO, rows: list[Row]) -> None:
    """Bytes are base64, times RFC 3339 in UTC."""
    line = msgspec.json.Encoder().encode_into
    buffer = bytearray()
    for row in rows:
        members = dict(zip(COLUMNS, row, strict=True))
        for name in ("time", "recorded"):
            members[name] = None if members[name] is None else _shown_time(members[name])
        line(members, buffer)
        file.write(buffer)
        file.write(b"\n")


def _shown_time(micros: int) -> str:
    return rfc3339(micros) if micros >= 0 else (_EPOCH + timedelta(microseconds=micros)).isoformat()


def _parquet_writer() -> _Write:
    try:
        pa, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError:
        raise UsageError(
            "UL1380", "files in Parquet need pyarrow, which is not installed here",
            fix='pip install "unlost[parquet]", or --format jsonl',
        ) from None  # fmt: skip
    text, raw, time = pa.string(), pa.binary(), pa.timestamp("us", tz="UTC")
    other = {
        "partition": pa.int32(), "position": pa.int64(), "version": pa.int32(), "time": time, "recorded": time,
        "key_raw": raw, "data_raw": raw,
    }  # fmt: skip
    schema = pa.schema([(name, other.get(name, text)) for name in COLUMNS])

    def batch(rows: list[Row]) -> Any:
        columns = [pa.array(values, field.type) for values, field in zip(zip(*rows, strict=True), schema, strict=True)]
        return pa.RecordBatch.from_arrays(columns, schema=schema)

    def write(file: BinaryIO, rows: list[Row]) -> None:
        made = pa.BufferOutputStream()
        table = pa.Table.from_batches([batch(rows[n : n + PAGE]) for n in range(0, len(rows), PAGE)], schema)
        parquet.write_table(table, made, compression="zstd", use_dictionary=list(_REPEATED))
        file.write(made.getvalue())

    return write


# ---- the folder


class Document(msgspec.Struct, kw_only=True):
    format: int
    sum: str  # of `export`; it tells a manifest that somebody has edited
    export: msgspec.Raw


def sum_of(body: bytes) -> str:
    return blake2b(msgspec.json.format(body, indent=-1), digest_size=16).hexdigest()


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest, or None in a folder where nothing is yet.

    Raises:
        UsageError: the folder holds something else, or the manifest is not as it was written.
    """
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        others = sorted(p.name for p in folder.iterdir() if p.name != MANIFEST + _PART)
        if others:
            raise UsageError(
                "UL1381", f"{folder} is not empty, and no export made it", found=f"{', '.join(others[:5])}, and no {MANIFEST}",
                fix="export into a new folder",
            ) from None  # fmt: skip
        return None
    wrong = "no manifest of an export"
    try:
        document = msgspec.json.decode(text, type=Document)
        if document.format != FORMAT:
            raise UsageError(
                "UL1385", f"{path} cannot be gone on with", found=f"format {document.format}; this release writes {FORMAT}",
                fix="use the release that wrote it, or export into a new folder",
            )  # fmt: skip
        wrong = "it was changed since it was written"
        if sum_of(bytes(document.export)) == document.sum:
            return msgspec.json.decode(document.export, type=Manifest)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        pass  # said below
    raise UsageError(
        "UL1385", f"{path} cannot be gone on with", found=wrong, fix="put the old one back, or export into a new folder"
    )


def _check(folder: Path, found: Manifest, fresh: Manifest, topics: Sequence[TopicInfo]) -> None:
    """Whether this call may go on with what is there. Changes nothing."""
    old, new = found.filters, fresh.filters
    differ = [
        f"{name}: it has {_said(was)}, asked for {_said(now)}"
        for name, was, now, same in (
            ("broker", found.broker, fresh.broker, found.broker == fresh.broker),
            ("--format", found.files_are, fresh.files_are, found.files_are == fresh.files_are),
            ("--with-sensitive", found.with_sensitive, fresh.with_sensitive, found.with_sensitive == fresh.with_sensitive),
            ("--topic", old.topics, new.topics, old.topics == new.topics),
            ("--type", old.types, new.types, old.types == new.types),
            ("--key", old.key, new.key, old.key == new.key),
            ("--from", old.since, new.since, _same(old.since, new.since)),
            ("--until", old.until, new.until, _same(old.until, new.until)),
        )
        if not same
    ]  # fmt: skip
    if differ:
        raise UsageError(
            "UL1383", f"{folder} holds another export", found="; ".join(differ),
            fix="repeat the command that made it, or export into a new folder",
        )  # fmt: skip
    for type, shown in found.shown.items():
        # Files with the data of a type and files without them would read as one history.
        if shown != (shown_fields(type) is not None):
            raise UsageError(
                "UL1383", f"{folder} holds another export",
                found=f"your code had {'a' if shown else 'no'} class for {type} then, and has {'none' if shown else 'one'} now",
                fix="name the same App (--app), or export into a new folder",
            )  # fmt: skip
    for topic in topics:
        if (id := found.topics.get(topic.name, topic.id)) != topic.id:
            raise _recreated(topic.name, id, topic.id)
    for part in found.files:
        path = folder / part.name
        size = path.stat().st_size if path.is_file() else None
        if size != part.bytes:
            raise UsageError(
                "UL1385", f"{folder / MANIFEST} cannot be gone on with",
                found=f"{part.name} is not there" if size is None else f"{part.name} has {size} bytes, and had {part.bytes}",
                fix="put the file back, or export into a new folder",
            )  # fmt: skip


def _recreated(topic: str, then: str, now: str) -> UsageError:
    return UsageError(
        "UL1384", f"the topic {topic} is not the one that was exported", found=f"it had the id {then}, now {now}",
        fix="it was deleted and made again: export it into a new folder",
    )  # fmt: skip


def _same(old: Moment | None, new: Moment | None) -> bool:
    if old is None or new is None:
        return old is new
    return old.said == new.said or old.micros == new.micros


def _said(value: object) -> str:
    if isinstance(value, Moment):
        return value.said
    if isinstance(value, list):
        return ", ".join(value) or "all"
    return {None: "none", True: "yes", False: "no"}.get(value, str(value))  # type: ignore[call-overload,no-any-return]


def _topics(log: Log, names: Sequence[str]) -> Sequence[TopicInfo]:
    there = [name for name in log.names() if not name.startswith(OWN)]
    for name in names:
        if name not in there:
            near = difflib.get_close_matches(name, there, n=3)
            raise UsageError(
                "UL1382", f"there is no topic {name!r}", found=f"there are {', '.join(there[:12]) or 'none'}",
                fix=f"did you mean {' or '.join(near)}?" if near else "unlost topic list",
            )  # fmt: skip
    return log.topics(sorted(names or there))


def _sweep(folder: Path, manifest: Manifest) -> None:
    """Removes what a run that was killed has left beside the manifest."""
    known = {part.name for part in manifest.files}
    for path in (folder / EVENTS).glob("*/*"):
        name = path.relative_to(folder).as_posix()
        if _NAME.fullmatch(path.name.removesuffix(_PART)) and name not in known:
            path.unlink()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """The folder for one run; it is made if need be."""
    _make_folder(folder)
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                "UL1386", f"another export is writing into {folder}", fix="wait for it, or take another folder"
            ) from None
        yield
    finally:
        os.close(fd)


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise UnlostError(
            "UL1387", f"the files cannot be written to {folder}", found=str(e),
            fix="make room or name a folder that you may write to; the same command goes on with what is there",
        ) from e  # fmt: skip


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A file that has its name only when it is whole and on the disk."""
    part = path.with_name(path.name + _PART)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    _sync(path.parent)


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
        _sync(folder.parent)


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
