"""THE BOOKS as a table, for the command line and the demo alike. Plain text; colour only where it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from unlost.audit import Book, Books
from unlost.ops.books import Named

_BOLD, _RED, _OFF = "\x1b[1m", "\x1b[1;31m", "\x1b[0m"
NAMED_SHOWN = 10
WIDTH_MAX = 80


def books_table(
    books: Books,
    *,
    services: Iterable[str] | None = None,
    everything: bool = False,
    color: bool = False,
) -> str:
    """One line per service; each line adds up. States that no service has are left out, but for the usual ones.

    `everything` adds the events that a service has no handler for; without it only what concerns it is counted.
    """
    chosen = [books.services[name] for name in (books.services if services is None else services)]
    columns = [
        (title, numbers)
        for title, usual, numbers in _columns(chosen, everything)
        if usual or any(numbers)
    ]  # fmt: skip
    names = ["THE BOOKS", *(book.service for book in chosen)]
    cells = [[title, *(f"{n:,}" for n in numbers)] for title, numbers in columns]
    widths = [max(map(len, column)) for column in cells]
    gap = 3 if max(map(len, names)) + sum(w + 3 for w in widths) <= 80 else 2
    name_width = max(*map(len, names), min(20, 80 - sum(w + gap for w in widths)))
    if name_width + sum(w + gap for w in widths) > WIDTH_MAX:
        return _turned(chosen, columns, color)
    lines = []
    for row in range(len(names)):
        line = names[row].ljust(name_width)
        for column, width in zip(cells, widths, strict=True):
            text = " " * gap + column[row].rjust(width)
            bad = row > 0 and column[0] == "UNACCOUNTED" and column[row] != "0"
            line += f"{_RED}{text}{_OFF}" if color and bad else text
        lines.append(f"{_BOLD}{line}{_OFF}" if color and row == 0 else line)
    return "\n".join(lines)


def _turned(chosen: Sequence[Book], columns: Sequence[tuple[str, list[int]]], color: bool) -> str:
    """Too many states for one line: a line per state and a column per service, as many as fit beside each other."""
    titles = ["THE BOOKS", *(title for title, _ in columns)]
    left = max(map(len, titles))
    cells = [
        [book.service, *(f"{numbers[i]:,}" for _, numbers in columns)] for i, book in enumerate(chosen)
    ]  # fmt: skip
    blocks: list[list[list[str]]] = [[]]
    width = left
    for cell in cells:
        width += 3 + max(map(len, cell))
        if width > WIDTH_MAX and blocks[-1]:
            blocks.append([])
            width = left + 3 + max(map(len, cell))
        blocks[-1].append(cell)
    lines: list[str] = []
    for block in blocks:
        if lines:
            lines.append("")
        for row, title in enumerate(titles):
            line = title.ljust(left)
            for cell in block:
                text = "   " + cell[row].rjust(max(map(len, cell)))
                bad = title == "UNACCOUNTED" and cell[row] != "0"
                line += f"{_RED}{text}{_OFF}" if color and bad else text
            lines.append(f"{_BOLD}{line}{_OFF}" if color and row == 0 else line)
    return "\n".join(lines)


def _columns(chosen: Sequence[Book], everything: bool) -> list[tuple[str, bool, list[int]]]:
    """Title, whether it is always shown, and a number per service."""
    rules = sorted({rule for book in chosen for rule in book.skipped if everything or rule != "no handler"})
    return [
        ("accepted", True, [book.accepted if everything else book.concerns for book in chosen]),
        ("done", True, [book.done for book in chosen]),
        *((f"skipped ({rule})", False, [book.skipped.get(rule, 0) for book in chosen]) for rule in rules),
        ("dead", True, [book.dead for book in chosen]),
        ("parked", False, [book.parked for book in chosen]),
        ("retrying", False, [book.retrying for book in chosen]),
        ("waiting", True, [book.waiting for book in chosen]),
        ("in flight", True, [book.in_flight for book in chosen]),
        ("removed", False, [book.removed for book in chosen]),
        ("abandoned", False, [book.abandoned for book in chosen]),
        ("expired", False, [book.expired for book in chosen]),
        ("unaccountable", False, [book.unaccountable for book in chosen]),
        ("UNACCOUNTED", True, [book.unaccounted for book in chosen]),
    ]


def missing_lines(books: Books, named: Sequence[Named], *, shown: int = NAMED_SHOWN) -> list[str]:
    """What does not balance, by name: the first missing events with where they were last seen, then the findings."""
    lines = []
    if books.unaccounted:
        lines.append(f"UNACCOUNTED {books.unaccounted:,}")
    for m in named[:shown]:
        lines += [*_named(m), f"      last seen {safe(m.last_seen)}"]
    rest = books.unaccounted - min(len(named), shown)
    if rest > 0:
        lines.append(f"  … and {rest:,} more")
    lines.extend(f"finding: {safe(text)}" for text in books.findings[:shown])
    if len(books.findings) > shown:
        lines.append(f"  … and {len(books.findings) - shown:,} findings more")
    lines.extend(f"unaccountable: {safe(text)}" for text in books.unaccountable)
    ranges = sorted(books.ranges, key=lambda found: found.tolerated)  # what nobody has declared comes first
    lines.extend(f"{found.kind}: {safe(str(found))}" for found in ranges[:shown])
    if len(ranges) > shown:
        lines.append(f"  … and {len(ranges) - shown:,} ranges more")
    return lines


def abandoned_lines(books: Books, named: Sequence[Named], *, shown: int = NAMED_SHOWN) -> list[str]:
    """What handlers that get their events at most once did not bring to an end, by name."""
    if not books.abandoned:
        return []
    lines = [f"abandoned {len(books.abandoned):,}: begun at most once, and not ended by a crash or an error"]
    for m in named[:shown]:
        lines += _named(m)
    rest = len(books.abandoned) - min(len(named), shown)
    return [*lines, f"  … and {rest:,} more"] if rest > 0 else lines


def _named(m: Named) -> list[str]:
    what = f"{m.type or 'an event'} {m.id or '(its id is not known)'}"
    return [
        f"  {safe(what)}" + (f"  key {safe(m.key)}" if m.key is not None else ""),
        f"      {m.service} {m.topic}/{m.partition}:{m.position}: {m.why}",
    ]


def safe(text: str) -> str:
    """Text from events, with control characters escaped: no event may steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
