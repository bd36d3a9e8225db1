"""The independent checker: from what the processes noted and what their tables hold to a list of anomalies. Pure.

It knows none of unlost's tables and none of its words for states. It knows three kinds of witnesses: publishers
(intended, acknowledged, unknown, refused), handlers (delivered, completed, and rows in the user's own table), and an
operator (seen on the shelf). One pass, and one sort per key.

An event counts as accepted when its publish returned, or when anybody has seen it; an unknown outcome alone proves
nothing either way. The parts of a batch are accepted together or not at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from evidence import Effect, Note

Kind = Literal["lost", "dead without trace", "doubled", "inversion", "phantom", "altered", "resurrected"]
Expectation = Literal["done", "shelf", "either", "nothing", "named"]


@dataclass(frozen=True, kw_only=True)
class Contract:
    """What one service owes. `expects` says, per event, how it must end there:

    `done`: completed; `shelf`: seen on the shelf; `either` of the two; `nothing`: the service does not want it; `named`:
    completed, or named by those who keep the books as cut off, and then perhaps completed as well.
    """

    service: str
    expects: Callable[[str], Expectation] = lambda uid: "done"
    once: bool = False  # its effects are in the user's table, each at most once
    at_most_once: bool = False  # it is delivered no more often than it was published
    ordered: bool = True


class Anomaly(NamedTuple):
    kind: Kind
    service: str
    uid: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.service} {self.uid}: {self.text}"


@dataclass
class _Published:
    key: str
    value: int
    batch: str
    intended: int  # when it was intended first
    acked: int | None = None  # when it was acknowledged first
    refused: bool = False
    open: int = 0  # intentions whose outcome is not "refused"


@dataclass
class _Served:
    """What one service did: the first completion of each event, in order, and how often."""

    first: dict[str, int] = field(default_factory=dict)
    times: Counter[str] = field(default_factory=Counter)
    shelved: set[str] = field(default_factory=set)
    named: set[str] = field(default_factory=set)


def check(
    notes: Iterable[Note], effects: Iterable[Effect], contracts: Sequence[Contract], *, atomic_batches: bool = True
) -> list[Anomaly]:
    """All anomalies of a finished run. Linear but for one sort per key."""
    published: dict[str, _Published] = {}
    served = {contract.service: _Served() for contract in contracts}
    found: list[Anomaly] = []
    seen: set[str] = set()

    def witness(service: str, uid: str, key: str, value: int) -> None:
        event = published.get(uid)
        if event is None:
            found.append(Anomaly("phantom", service, uid, "nobody ever published it"))
            return
        seen.add(uid)
        if (key, value) != (event.key, event.value):
            text = f"published as {event.key!r} {event.value}, arrived as {key!r} {value}"
            found.append(Anomaly("altered", service, uid, text))

    handled: list[Note] = []
    for note in notes:
        if note.what == "intend":
            event = published.setdefault(note.uid, _Published(note.key, note.value, note.batch, note.at))
            event.intended = min(event.intended, note.at)
            event.open += 1
        elif note.what in ("acked", "refused"):
            event = published[note.uid]
            if note.what == "refused":
                event.open -= 1
                event.refused = True
            else:
                event.acked = note.at if event.acked is None else min(event.acked, note.at)
        elif note.what in ("delivered", "completed", "shelved", "named"):
            handled.append(note)  # the publisher's file may be read later than this one
    for note in handled:
        witness(note.service, note.uid, note.key, note.value)
        service = served.get(note.service)
        if service is None:
            continue
        if note.what == "completed":
            service.first[note.uid] = min(service.first.get(note.uid, note.at), note.at)
            service.times[note.uid] += 1
        elif note.what == "shelved":
            service.shelved.add(note.uid)
        elif note.what == "named":
            service.named.add(note.uid)
    for effect in effects:
        witness(effect.service, effect.uid, effect.key, effect.value)
        service = served[effect.service]
        service.first.setdefault(effect.uid, effect.number)
        service.times[effect.uid] += 1

    whole = {published[uid].batch for uid in seen if published[uid].batch} if atomic_batches else set()
    for uid, event in published.items():
        if uid in seen and event.acked is None and event.refused and event.open == 0:
            found.append(Anomaly("resurrected", "", uid, "every publish of it was refused, and yet it was delivered"))
    accepted = [
        uid for uid, event in published.items() if event.acked is not None or uid in seen or event.batch in whole
    ]
    for contract in contracts:
        service = served[contract.service]
        found.extend(_owed(contract, service, accepted, published))
        if contract.once:
            for uid, times in service.times.items():
                if times > 1:
                    found.append(Anomaly("doubled", contract.service, uid, f"it took effect {times} times"))
        if contract.at_most_once:
            for uid, times in service.times.items():
                if uid in published and times > published[uid].open:
                    text = f"it was delivered {times} times, and published {published[uid].open} times"
                    found.append(Anomaly("doubled", contract.service, uid, text))
        if contract.ordered:
            found.extend(_inversions(contract, service, published))
    return found


def _owed(
    contract: Contract, service: _Served, accepted: Sequence[str], published: dict[str, _Published]
) -> Iterable[Anomaly]:
    for uid in accepted:
        wanted = contract.expects(uid)
        if wanted == "nothing" or (wanted in ("done", "either", "named") and uid in service.first):
            continue
        if wanted == "named" and uid in service.named:
            continue
        if wanted in ("done", "named"):
            how = "acknowledged" if published[uid].acked is not None else "accepted, for others saw it"
            yield Anomaly(
                "lost", contract.service, uid, f"{how}, and never completed" + (", nor named" * (wanted == "named"))
            )
        elif uid not in service.shelved:
            yield Anomaly("dead without trace", contract.service, uid, "not completed, and never seen on the shelf")


def _inversions(contract: Contract, service: _Served, published: dict[str, _Published]) -> Iterable[Anomaly]:
    """A key's first completions against the order in which they were published. Two publishes bind only if the first
    had returned before the second began; so each event is compared with the latest intention completed before it."""
    by_key: dict[str, list[tuple[int, str]]] = {}
    for uid, at in service.first.items():
        event = published.get(uid)
        if event is not None:
            by_key.setdefault(event.key, []).append((at, uid))
    for completions in by_key.values():
        completions.sort()
        latest, by = -1, ""
        for _, uid in completions:
            event = published[uid]
            if event.acked is not None and event.acked < latest:
                yield Anomaly("inversion", contract.service, uid, f"completed after {by}, though published before it")
            if event.intended > latest:
                latest, by = event.intended, uid
