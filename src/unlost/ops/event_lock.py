"""`unlost.events.lock`: what the events of a project looked like when it was last agreed, in a file that is versioned
with the code."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from unlost import config
from unlost.errors import UnlostError, UsageError
from unlost.events import Event, steps_of
from unlost.ops.event_shape import Field, Object, object_of

NAME = "unlost.events.lock"
FORMAT = 1
UPDATE = "unlost event check --update"
_BACK = "take the file as it was committed (or delete it, which forgets its history), then: " + UPDATE

Kind = Literal["event", "command"]


class Locked(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """One wire type. For a command, `topic` is its queue. `gone`: the code no longer has it, the log may. `upcasts_from`:
    the oldest version that an upcaster brings up; None where there is none."""

    class_: str = msgspec.field(name="class")
    kind: Kind
    topic: str
    key: str | None
    version: int
    fields: dict[str, Field]
    closed: bool = False
    gone: bool = False
    upcasts_from: int | None = None
    digest: str = ""

    @property
    def data(self) -> Object:
        return Object(self.fields, self.closed)


class _File(msgspec.Struct, forbid_unknown_fields=True):
    format: int
    events: dict[str, Locked]


class _Format(msgspec.Struct):
    format: int


def lock_path(given: str | None = None) -> Path:
    """The file that was named, else the one beside the nearest pyproject.toml, else here."""
    return Path(given) if given is not None else (config.project_folder() or Path.cwd()) / NAME


def data_of(cls: type[Event]) -> Object:
    """The fields of a class as data.

    Raises:
        UsageError: UL1366, its types cannot be described.
    """
    try:
        return object_of(cls)
    except Exception as e:
        raise UsageError(
            "UL1366", f"the fields of {cls.__qualname__} have types that cannot be data", found=f"{type(e).__name__}: {e}",
            fix="use types that JSON can carry, defined where the module of the class can see them",
        ) from e  # fmt: skip


def sent_names(cls: type[Event]) -> tuple[str, ...]:
    """The fields, by the names under which they are sent."""
    return tuple(cls.__unlost_form__.names(cls).values())


def sent_key(cls: type[Event]) -> str | None:
    """The key's field, by the name under which it is sent."""
    return cls.__unlost_form__.names(cls).get(cls.__unlost__.key or "")


def locked(cls: type[Event]) -> Locked:
    """What the lock says of a class as it is now."""
    spec, data, steps = cls.__unlost__, data_of(cls), steps_of(cls)
    return Locked(
        class_=cls.__qualname__, kind="command" if spec.is_command else "event", topic=spec.topic or "", key=sent_key(cls),
        version=spec.version, fields=data.fields, closed=data.closed, upcasts_from=steps[0].version if steps else None,
    )  # fmt: skip


def read_lock(path: Path) -> dict[str, Locked] | None:
    """What is locked, by wire type; None if there is no such file.

    Raises:
        UsageError: UL1361 it is no lock, UL1362 it was changed by hand, UL1363 a newer release wrote it, UL1364 it cannot be read.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as e:
        raise _unusable(path, e) from e
    try:
        format = msgspec.json.decode(raw, type=_Format).format
        if format > FORMAT:
            raise UsageError(
                "UL1363", f"{path} was written by a newer release of unlost", found=f"format {format}; this one knows {FORMAT}",
                fix="install that release; nothing was changed",
            )  # fmt: skip
        if format < 1:
            raise UsageError("UL1361", f"{path} is no lock of events", found=f"format {format}", fix=_BACK)
        events = msgspec.json.decode(raw, type=_File).events
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as e:
        conflict = b"<<<<<<<" in raw
        found = "an unfinished merge" if conflict else str(e)[:200]
        raise UsageError("UL1361", f"{path} is no lock of events", found=found, fix=_BACK) from None
    edited = [type for type, event in events.items() if event.digest != _digest(type, event)]
    if edited:
        raise UsageError(
            "UL1362", f"{path} was changed by hand", found=f"the digest does not fit: {', '.join(edited[:5])[:200]}", fix=_BACK
        )  # fmt: skip
    return events


def merged(old: Mapping[str, Locked], new: Mapping[str, Locked]) -> dict[str, Locked]:
    """The next lock: what the code has now, and what only the log can still have, as `gone`."""
    result = {type: msgspec.structs.replace(event, gone=True) for type, event in old.items()}
    for type, event in new.items():
        result[type] = _with_history(old[type], event) if type in old else event
    return result


def _with_history(old: Locked, new: Locked) -> Locked:
    fields = {name: msgspec.structs.replace(field, gone=True) for name, field in old.fields.items()}
    for name, field in new.fields.items():
        before = old.fields.get(name)
        later = before is None or before.gone or before.added_later
        fields[name] = msgspec.structs.replace(field, added_later=later and not field.required)
    return msgspec.structs.replace(new, fields=fields)


def lock_bytes(events: Mapping[str, Locked]) -> bytes:
    """The file: sorted, and two lines of difference where one thing differs."""
    sealed = {type: msgspec.structs.replace(event, digest=_digest(type, event)) for type, event in events.items()}
    text = msgspec.json.encode(_File(FORMAT, sealed), order="sorted")
    return msgspec.json.format(text, indent=2) + b"\n"


def write_lock(path: Path, events: Mapping[str, Locked]) -> bool:
    """Writes the lock, whole or not at all. False if it says the same already.

    Raises:
        UsageError: UL1364, the file cannot be written.
    """
    raw = lock_bytes(events)
    path = path.resolve()
    beside = path.with_name(path.name + ".new")
    try:
        if path.is_file() and path.read_bytes() == raw:
            return False
        beside.write_bytes(raw)
        beside.replace(path)
    except OSError as e:
        raise _unusable(path, e) from e
    return True


def _digest(type: str, event: Locked) -> str:
    text = msgspec.json.encode([type, msgspec.structs.replace(event, digest="")], order="sorted")
    return hashlib.sha256(text).hexdigest()[:16]


def _unusable(path: Path, e: OSError) -> UnlostError:
    return UsageError(
        "UL1364", f"the lock {path} cannot be used", found=e.strerror or str(e), fix="name a file with --lock, or correct its rights"
    )  # fmt: skip
