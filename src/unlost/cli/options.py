"""What several commands have in common: options, and words for people."""

from __future__ import annotations

import base64
import getpass
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import msgspec
from cyclopts import Parameter

from unlost.cli.say import note
from unlost.errors import Damaged, UnlostError, UsageError

if TYPE_CHECKING:
    from unlost.ops.connect import Looking

AppName = Annotated[
    str | None,
    Parameter(name="--app", help="Where your App is: module, module:attribute or file.py. Else UNLOST_APP, pyproject."),
]
BrokerUrl = Annotated[
    str | None,
    Parameter(name="--broker", help="URL of the broker. Else UNLOST_BROKER, pyproject, .unlost/events.db."),
]
OfApp = Annotated[str | None, Parameter(name="--app", help="Look at the broker that this App names in its code.")]
Json = Annotated[bool, Parameter(name="--json", negative="", help="One JSON object instead of text.")]
Why = Annotated[str, Parameter(name="--reason", help="Why you do it; kept in the records.")]
DryRun = Annotated[bool, Parameter(name="--dry-run", negative="", help="Only say what would be done.")]
Yes = Annotated[bool, Parameter(name=["--yes", "-y"], negative="", help="Do not ask.")]
Operator = Annotated[
    str | None, Parameter(name="--operator", help="Who you are, for the records. Else your login name.")
]
JsonLines = Annotated[bool, Parameter(name="--json", negative="", help="One JSON object per line instead of text.")]


@contextmanager
def looking(app: str | None, broker: str | None) -> Iterator[Looking]:
    """The broker, for commands that only look: the one of the flag, else what the code of an App says that was named
    with `--app`. What is stored there and cannot be understood is damage.

    Raises:
        Damaged: a row is not as unlost writes it.
    """
    from unlost.ops.connect import opened

    url, store, decoders = broker, None, None
    if app is not None:
        from unlost.ops.load import load

        found = load(app).app  # also without need of its URL: whoever names an App wants it imported
        url, store = broker if broker is not None else found.broker_url, found.store_url
        decoders = found.decoders
    with opened(url, store=store, decoders=decoders) as here:
        try:
            yield here
        except (LookupError, TypeError, ValueError, OverflowError, msgspec.MsgspecError) as e:
            raise Damaged(
                "UL3011", f"{here.place} holds something that cannot be understood", found=f"{type(e).__name__}: {e}",
                fix="stop all processes, keep a copy of the folder, and restore the newest good copy",
            ) from e  # fmt: skip


def confirmed(action: str, lines: Sequence[str], question: str) -> None:
    """Asks before something is changed.

    Raises:
        UsageError: nobody can be asked. UnlostError: the answer was no.
    """
    if not sys.stdin.isatty():
        raise UsageError(
            "UL1333", f"{action} changes something, and nobody can be asked here",
            fix="look at it with --dry-run, then add --yes",
        )  # fmt: skip
    for line in lines:
        note(line)
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UnlostError("UL1334", "nothing was changed")


def login() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return f"uid {os.getuid()}"


def aligned(rows: Sequence[Sequence[str]], *, left: str) -> list[str]:
    """Columns of text; `left` has a letter per column: l to the left, r to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if side == "l" else cell.rjust(width)
            for side, cell, width in zip(left, row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def count(number: int, noun: str) -> str:
    """
    >>> count(1, "event"), count(2000, "event")
    ('1 event', '2,000 events')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def span(seconds: float) -> str:
    """How long, in the largest unit that says something: `14 s`, `3 h`."""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{int(seconds // size)} {unit}"
    return f"{int(max(0, seconds))} s"


def shown_bytes(name: str, value: bytes | None) -> dict[str, str | None]:
    """For JSON: as text where it is text, else under another name as base64, so that it says exactly what is stored."""
    if value is None:
        return {name: None}
    try:
        return {name: value.decode()}
    except UnicodeDecodeError:
        return {f"{name}_base64": base64.b64encode(value).decode()}
