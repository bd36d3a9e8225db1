"""What is accepted in the store and not in the log yet. Nothing of it is lost; a relay must live to send it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from unlost.store.port import Accepted, Look, Records, Relaying, Shard
from unlost.world import REAL

HELD_SECONDS = 60.0  # what a relay has had in hands for so long the broker does not take


class OutboxStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Events that are accepted in a transaction, and not in the log yet."""

    events: int
    copies: int  # of dead letters, for a topic that others read
    oldest: int | None  # when it was accepted, microseconds since 1970
    age: float | None  # of the oldest, in seconds
    in_hands: int  # events that a relay has sent, or is about to send
    refused: bool  # the broker has not taken the first of these for a minute
    relays: Sequence[Relaying]  # living processes that send
    shards: int  # into how many parts it is divided
    orphaned: int  # parts that no living process sends
    streams: Sequence[str] = ()  # what else reads it, in place of our relays: replication slots
    books: Sequence[Shard] = ()  # of each part, where the store keeps them

    @property
    def stands_still(self) -> bool:
        return bool(self.events or self.copies) and not self.relays and not self.streams


class Delayed(msgspec.Struct, frozen=True, kw_only=True):
    """Events and commands that wait in the store for their time."""

    events: int
    first: int | None  # when the first of them is due, microseconds since 1970
    overdue: bool  # it should have left a while ago: no process with this store runs services


def delayed_of(records: Records, look: Look) -> Delayed:
    events, first = look.execute("select count(*), min(due) from unlost_delayed").fetchone()
    return Delayed(
        events=events, first=first, overdue=first is not None and records.now() > first + int(HELD_SECONDS * 1e6)
    )


def outbox(records: Records) -> OutboxStatus:
    return records.read(lambda look: status_of(records, look))


def status_of(records: Records, look: Look) -> OutboxStatus:
    return shown(records.accepted(look), REAL.now())


def shown(found: Accepted, now: int) -> OutboxStatus:
    return OutboxStatus(
        events=found.events, copies=found.copies, age=found.age,
        oldest=None if found.age is None else now - round(found.age * 1e6), in_hands=found.in_hands,
        refused=found.held is not None and found.held > HELD_SECONDS and bool(found.relays), relays=found.relays,
        shards=max(1, len(found.shards)), orphaned=found.orphaned, streams=found.streams, books=found.shards,
    )  # fmt: skip


def contradictions(found: OutboxStatus) -> Iterator[str]:
    """What an outbox that numbers its events must not say: every number is confirmed by the broker, or still in hands."""
    for shard in found.books:
        left = shard.sent - shard.confirmed - shard.in_hands
        if left:
            what = (
                "a row left the outbox without the broker's receipt" if left > 0 else "more is confirmed than was sent"
            )
            yield (
                f"outbox, part {shard.number}: {what}; {shard.sent} were numbered, {shard.confirmed} are confirmed, "
                f"{shard.in_hands} are in hands"
            )
        if shard.vanished:
            yield (
                f"outbox, part {shard.number}: a row left the outbox without the broker's receipt; of the "
                f"{shard.in_hands} in hands {shard.vanished} are not there any more"
            )
