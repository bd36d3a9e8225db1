"""How the command line speaks: text that cannot hurt a terminal, one JSON object, errors on stderr."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping
from typing import Any, TextIO

import msgspec

from unlost.errors import UnlostError

# Control characters, and those that change the direction of text or hide in it: a stored event must not be able
# to move the cursor, set the title of the window or reverse what an operator reads.
_CONTROL = {n: f"\\x{n:02x}" for n in (*range(0x20), *range(0x7F, 0xA0))}
_BIDI = {n: f"\\u{n:04x}" for n in (0x200B, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A), 0xFEFF)}
_ESCAPES = (
    _CONTROL | _BIDI | {0x0A: "\\n", 0x0D: "\\r", 0x09: "\\t"} | {n: f"\\u{n:04x}" for n in range(0xD800, 0xE000)}
)
_LINES = {n: text for n, text in _ESCAPES.items() if n != 0x0A}


interrupted = threading.Event()


def interrupt(_signal: int, _frame: object) -> None:
    """Ctrl-C. The exception may be lost (Python drops those raised in a finalizer); the event is not."""
    interrupted.set()
    raise KeyboardInterrupt


def clean(text: object, width: int = 0) -> str:
    """One line of harmless text; longer than `width` (if given), it is cut with an ellipsis.

    Example:
        >>> clean("a\\x1b[31mb")
        'a\\\\x1b[31mb'
    """
    line = str(text).translate(_ESCAPES)
    return line if not width or len(line) <= width else line[: width - 1] + "…"


def clean_lines(text: object) -> str:
    """Harmless text that keeps its line breaks."""
    return str(text).translate(_LINES)


def key_text(key: bytes | None) -> str:
    """A key as people read it; bytes that are no text are shown as escapes, no key as a dash."""
    return "-" if key is None else clean(key.decode("utf-8", "backslashreplace"))


def out(line: str = "") -> None:
    _write(sys.stdout, line)


def nobody_reads() -> None:
    """From now on what is said on stdout goes nowhere: its reader has left."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def note(line: str) -> None:
    """Something beside the result: progress, warnings, hints."""
    _write(sys.stderr, line)


def _write(stream: TextIO, line: str) -> None:
    try:
        stream.write(line + "\n")
    except UnicodeEncodeError:  # a terminal of another encoding
        encoding = stream.encoding or "ascii"
        stream.write(line.encode(encoding, "replace").decode(encoding) + "\n")


def print_json(schema: str, members: Mapping[str, Any], *, flush: bool = True) -> None:
    """One line of JSON that says its own schema. Times are RFC 3339, keys and texts are not escaped for terminals
    but by JSON itself."""
    out(msgspec.json.encode({"schema": f"unlost.{schema}", **members}, enc_hook=str).decode())
    if flush:
        sys.stdout.flush()


def print_error(e: UnlostError, *, as_json: bool) -> None:
    if as_json:
        print_json("error/1", {"code": e.code, "what": e.what, "found": e.found, "fix": e.fix})
    note(red(clean_lines(e)))


def red(text: str) -> str:
    return _coloured(sys.stderr, "31", text)


def bold(text: str, stream: TextIO | None = None) -> str:
    return _coloured(stream or sys.stdout, "1", text)


def dim(text: str, stream: TextIO | None = None) -> str:
    return _coloured(stream or sys.stdout, "2", text)


def warn(text: str, stream: TextIO | None = None) -> str:
    return _coloured(stream or sys.stdout, "1;31", text)


def coloured(stream: TextIO) -> bool:
    if os.environ.get("NO_COLOR"):
        return False
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _coloured(stream: TextIO, style: str, text: str) -> str:
    return f"\x1b[{style}m{text}\x1b[0m" if coloured(stream) else text
