"""The books: every accepted event is in exactly one state, and whatever is not is named. Pure.

For one (service, topic, partition) the log says which positions were accepted, the saved progress says which of
them have an outcome (`fated`) and from where delivery goes on (`position`), and the ledger lists one by one all
that did not end as done or skipped. The sentence that must hold:

    accepted = waiting + in flight + retrying + parked + done + dead + skipped + expired + abandoned + removed
               + unaccountable + UNACCOUNTED,  and UNACCOUNTED is 0.

Where the log is another program's, some of its positions never held an event (they are void, and not accepted), its
retention may remove events unread (expired), and it may be unable to say what it held (unaccountable). Those ranges
are named; the books balance with them only where a retention was declared.

`reconcile` is used by the tests, the command line and the demo alike. It trusts no single number: what was counted
is compared with what is listed, and the saved digest with the digest of the log.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

BEGUN = "begun"  # counted so while a handler that gets its events at most once has them in hand
LISTED = ("retrying", "parked", "dead", "removed", "abandoned", "expired")


class Listed(msgspec.Struct, frozen=True):
    """A line of the ledger's list."""

    position: int
    state: str
    id: str


class Passed(msgspec.Struct, frozen=True):
    """Positions [start, end) that were passed over with a reason, as the store remembers it."""

    start: int
    end: int
    kind: str  # expired or unaccountable
    why: str
    declared: bool  # the App had declared a retention


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """All that is known of one unit at one instant."""

    service: str
    topic: str
    partition: int
    start: int  # where the service began
    log_start: int  # the first position that the log holds
    end: int  # after the last position that the log holds
    log_gaps: Sequence[tuple[int, int]]  # positions between these that the log does not hold
    position: int
    fated: Sequence[tuple[int, int]]
    counts: dict[str, int]
    digest: int
    log_digest: int | None  # of the fated positions, as the log has it; None where it cannot be known
    listed: Sequence[Listed]
    on_shelf: frozenset[int]
    in_waiting_room: frozenset[int]
    read: int  # how far a living owner has read; below `position` if there is none
    passed: Sequence[Passed] = ()
    forgets: bool = False  # the log lets go of events by its own rules, handled or not
    declared: bool = False  # the App declares a retention for this topic


class Missing(msgspec.Struct, frozen=True, kw_only=True):
    """An accepted event without a state, and how that shows."""

    service: str
    topic: str
    partition: int
    position: int
    why: str


class Range(msgspec.Struct, frozen=True, kw_only=True):
    """Accepted events that got no outcome by handling, because the log does not hold them any more."""

    service: str
    topic: str
    partition: int
    start: int
    end: int
    kind: str  # expired or unaccountable
    why: str
    declared: bool

    @property
    def tolerated(self) -> bool:
        """Whether somebody has said that the log may forget such events."""
        return self.kind == "expired" and self.declared

    def __str__(self) -> str:
        positions = (
            f"position {self.start}" if self.end == self.start + 1 else f"positions {self.start} to {self.end - 1}"
        )
        return f"{self.service} {self.topic}/{self.partition}, {positions}: {self.why}"


class Book(msgspec.Struct, kw_only=True):
    """One service's books over all its topics."""

    service: str
    accepted: int = 0
    done: int = 0
    skipped: dict[str, int] = msgspec.field(default_factory=dict)
    dead: int = 0
    retrying: int = 0
    parked: int = 0
    in_flight: int = 0
    waiting: int = 0
    removed: int = 0
    abandoned: int = 0
    expired: int = 0
    unaccountable: int = 0
    unaccounted: int = 0

    @property
    def concerns(self) -> int:
        """Accepted events but for those that no handler of the service wants."""
        return self.accepted - self.skipped.get("no handler", 0)

    @property
    def open(self) -> int:
        """Events that will still change their state without an operator."""
        return self.waiting + self.in_flight + self.retrying


class Books(msgspec.Struct, kw_only=True):
    services: dict[str, Book]
    missing: list[Missing]
    unnamed: int  # unaccounted events of which not even the position is known
    findings: list[str]  # contradictions that are no missing event: the evidence itself was changed
    unaccountable: list[str]  # what cannot be known, and why
    ranges: list[Range] = msgspec.field(default_factory=list)  # what expired, or cannot be accounted for
    abandoned: list[Missing] = msgspec.field(default_factory=list)  # begun at most once, and not ended: it may be lost

    @property
    def unaccounted(self) -> int:
        return sum(book.unaccounted for book in self.services.values())

    @property
    def balanced(self) -> bool:
        tolerated = all(found.tolerated for found in self.ranges)
        return self.unaccounted == 0 and not self.findings and not self.unaccountable and tolerated


def reconcile(evidence: Iterable[Evidence], unaccountable: Sequence[str] = (), findings: Sequence[str] = ()) -> Books:
    """Balances the books of all units; `unaccountable` says what no evidence was left of, `findings` what was seen to
    be wrong while the evidence was gathered.

    Example:
        >>> reconcile([]).balanced
        True
    """
    books = Books(services={}, missing=[], unnamed=0, findings=list(findings), unaccountable=list(unaccountable))
    for e in evidence:
        book = books.services.setdefault(e.service, Book(service=e.service))
        _balance(e, book, books)
    return books


def _balance(e: Evidence, book: Book, books: Books) -> None:
    where = f"{e.service} {e.topic}/{e.partition}"
    end = max(e.end, max((b for _, b in e.fated), default=e.start), e.position)
    void = e.counts.get("void", 0)
    accepted = end - e.start - void
    fated = sum(b - a for a, b in e.fated)
    missing: dict[int, str] = {}
    passed = _pass_over(e, where, book, books)
    forgotten = _forget(e, book, books)

    # passed over: delivery goes on behind it, and it has no outcome
    for a, b in _gaps(e.fated, e.start, min(e.position, end)):
        for position in range(a, b):
            missing[position] = "it was passed over: the position moved on, but it got no outcome"

    # the log itself does not hold it any more
    lost = [*e.log_gaps, (max(e.end, e.start), end)]
    if e.log_start > e.start and not e.forgets:
        lost.append((e.start, e.log_start))
    for a, b in lost:
        for position in range(max(a, e.start), b):
            if not _in(e.fated, position):
                missing.setdefault(position, "the log does not hold it any more, and it got no outcome")
    gone = sum(b - a for a, b in e.log_gaps if b > e.start) + end - max(e.end, e.start)
    if gone:
        books.findings.append(f"{where}: {gone} positions are missing from the log itself")

    # listed as being somewhere where it is not
    states = dict.fromkeys(LISTED, 0)
    listed = set()
    for line in e.listed:
        listed.add(line.position)
        if not _in(e.fated, line.position):
            books.findings.append(f"{where}:{line.position} is listed as {line.state}, but has no outcome")
            continue
        place = {"dead": e.on_shelf, "retrying": e.in_waiting_room, "parked": e.in_waiting_room}.get(line.state)
        if place is not None and line.position not in place:
            room = "on the shelf" if line.state == "dead" else "in the waiting room"
            missing[line.position] = f"the ledger lists it as {line.state}, but it is not {room}"
        else:
            states[line.state] += 1
            if line.state == "abandoned":
                books.abandoned.append(_abandoned(e, line.position))
    for position in sorted((e.on_shelf | e.in_waiting_room) - listed):
        books.findings.append(f"{where}:{position} is kept, but the ledger does not list it")

    # counted against the positions that have an outcome
    counted = sum(e.counts.values())
    unnamed = fated - counted - passed - len([line for line in e.listed if _in(e.fated, line.position)])
    if unnamed < 0:
        books.findings.append(f"{where}: {-unnamed} more outcomes are counted than positions have one")
    if e.log_digest is not None and e.log_digest != e.digest:
        books.findings.append(f"{where}: the events in the log are not those that got an outcome (digests differ)")

    unfated = end - e.start - fated - forgotten - sum(1 for p in missing if not _in(e.fated, p))
    in_flight = 0
    if e.read > e.position:
        below = min(e.read, end)
        in_flight = sum(b - a for a, b in _gaps(e.fated, e.position, below))  # also what expired in somebody's hands
        in_flight -= sum(1 for p in missing if e.position <= p < below and not _in(e.fated, p))
    begun = e.counts.get(BEGUN, 0)  # they have their outcome in the log's sense: nobody gets them again

    book.accepted += accepted
    book.done += e.counts.get("done", 0)
    for name, count in e.counts.items():
        if name.startswith("skipped:"):
            rule = name.partition(":")[2]
            book.skipped[rule] = book.skipped.get(rule, 0) + count
        elif name == "removed":  # many at once: its service was retired
            book.removed += count
        elif name not in ("done", "void", BEGUN):
            books.findings.append(f"{where}: an unknown state is counted: {name}")
    for state, count in states.items():
        setattr(book, state, getattr(book, state) + count)
    book.in_flight += in_flight + begun
    book.waiting += unfated - in_flight
    book.unaccounted += len(missing) + max(0, unnamed)
    books.unnamed += max(0, unnamed)
    books.missing.extend(
        Missing(service=e.service, topic=e.topic, partition=e.partition, position=position, why=why)
        for position, why in sorted(missing.items())
    )


def _abandoned(e: Evidence, position: int) -> Missing:
    why = "its handler gets it at most once, and did not come to its end"
    return Missing(service=e.service, topic=e.topic, partition=e.partition, position=position, why=why)


def _pass_over(e: Evidence, where: str, book: Book, books: Books) -> int:
    """The ranges that were passed over with a reason; how many positions they are."""
    count = 0
    for p in e.passed:
        size = p.end - p.start
        if sum(b - a for a, b in _gaps(e.fated, p.start, p.end)):
            books.findings.append(
                f"{where}: positions {p.start} to {p.end - 1} are listed as {p.kind}, but have no outcome"
            )
            continue
        count += size
        if p.kind == "expired":
            book.expired += size
        else:
            book.unaccountable += size
        books.ranges.append(_range(e, p.start, p.end, p.kind, p.why, p.declared))
    return count


def _forget(e: Evidence, book: Book, books: Books) -> int:
    """What a log that forgets has let go of while nobody had it in hand, and what no owner has noticed yet."""
    if not e.forgets or e.log_start <= e.position:
        return 0
    count = 0
    for a, b in _gaps(e.fated, max(e.position, e.read), e.log_start):
        count += b - a
        why = "retention removed them before they were handled (not settled yet: no owner has been there)"
        books.ranges.append(
            _range(e, a, b, "expired", why if e.declared else f"{why}; the App declares no retention", e.declared)
        )
    book.expired += count
    return count


def _range(e: Evidence, start: int, end: int, kind: str, why: str, declared: bool) -> Range:
    return Range(
        service=e.service, topic=e.topic, partition=e.partition, start=start, end=end, kind=kind, why=why,
        declared=declared,
    )  # fmt: skip


def _gaps(runs: Sequence[tuple[int, int]], start: int, end: int) -> Iterable[tuple[int, int]]:
    at = start
    for a, b in runs:
        if b <= at:
            continue
        if a >= end:
            break
        if a > at:
            yield at, a
        at = b
    if at < end:
        yield at, end


def _in(runs: Sequence[tuple[int, int]], position: int) -> bool:
    low, high = 0, len(runs)
    while low < high:
        middle = (low + high) // 2
        if runs[middle][1] <= position:
            low = middle + 1
        else:
            high = middle
    return low < len(runs) and runs[low][0] <= position
