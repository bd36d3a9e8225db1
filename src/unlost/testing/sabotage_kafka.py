"""Planted bugs of the path through Kafka, beside those of `sabotage`: each safety line of it can be broken on purpose.

They are in a module of their own because Kafka's client is an extra. Most of these mistakes have been made in real
programs; the others are what a line of ours is there to prevent.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import unlost.delivery.worker as worker_module
import unlost.store.sqlite as store_module
from unlost.brokers.kafka.member import KafkaMember, _State
from unlost.brokers.kafka.publisher import Call, Publisher, Sent
from unlost.brokers.kafka.settings import Settings
from unlost.brokers.port import Ack, Arrivals, Change, Receipt, Saved
from unlost.delivery import note
from unlost.delivery.lanes import Owned
from unlost.delivery.relay import Relay
from unlost.delivery.worker import Worker
from unlost.events.topic import Unit
from unlost.store.port import Unsent
from unlost.testing.sabotage import VARIABLE, Bug, _replace

BUGS: dict[str, Bug] = {}


def from_environment() -> bool:
    """Applies the bug that `UNLOST_BREAK` names, if it is one of these."""
    bug = BUGS.get(os.environ.get(VARIABLE, ""))
    if bug is not None:
        bug.apply()
    return bug is not None


def _bug(name: str, breaks: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def register(apply: Callable[[], None]) -> Callable[[], None]:
        BUGS[name] = Bug(name, breaks, apply)
        return apply

    return register


# --- what the group is told --------------------------------------------------------------------------------------


@_bug("told-when-received", "the group is told of events when they are received, before they are settled")
def _told_when_received() -> None:
    def make(original: Callable[..., None]) -> Any:
        def take_in(self: Worker, arrivals: Arrivals, *known: Any) -> None:
            original(self, arrivals, *known)
            assert self._member is not None
            told = Ack(arrivals.unit, arrivals.events[-1].position + 1, "")
            self._spawn(self._member.ack([told]))

        return take_in

    _replace(Worker, "_take_in", make)


@_bug("told-when-lost", "a member commits what it knew of partitions that are another's now")
def _told_when_lost() -> None:
    known: dict[Unit, Ack] = {}

    def remember(original: Callable[..., Any]) -> Any:
        async def ack(self: KafkaMember, acks: Sequence[Ack]) -> None:
            for a in acks:
                known.setdefault(a.unit, a)  # of the time before
            await original(self, acks)

        return ack

    def make(original: Callable[[Worker, Owned], None]) -> Any:
        def on_lost(self: Worker, owned: Owned) -> None:
            original(self, owned)
            member = self._member
            assert isinstance(member, KafkaMember)
            if owned.unit in known:
                a = known[owned.unit]
                self._spawn(_late(member, a))

        return on_lost

    async def _late(member: KafkaMember, a: Ack) -> None:
        from confluent_kafka import KafkaException, TopicPartition

        place = TopicPartition(*member._place(a.unit), a.position, a.note)
        for _ in range(20):  # the group lets nobody commit while it is rebalanced
            await asyncio.sleep(0.1)
            try:
                await asyncio.to_thread(member._consumer.commit, offsets=[place], asynchronous=False)
            except KafkaException:  # not yet
                continue
            return

    _replace(KafkaMember, "ack", remember)
    _replace(Worker, "_on_lost", make)


@_bug("note-of-another-snapshot", "position and note come from two looks at the store")
def _note_of_another_snapshot() -> None:
    def make(original: Callable[..., Any]) -> Any:
        before: dict[Unit, Any] = {}

        def encode(store: str, snapshot: Any) -> Any:
            older, before[snapshot.unit] = before.get(snapshot.unit, snapshot), snapshot
            return original(store, older)

        return encode

    _replace(note, "encode", make)


@_bug("group-offset-counts", "a service goes on where the group's offset says, not where its store does")
def _group_offset_counts() -> None:
    def make(original: Callable[..., Any]) -> Any:
        async def assigned(self: Worker, units: Sequence[Unit], saved: Mapping[Unit, Saved]) -> None:
            member = self._member
            assert isinstance(member, KafkaMember)
            seek = member.seek
            member.seek = lambda unit, position: seek(unit, saved[unit].position if unit in saved else position)  # type: ignore[method-assign]
            await original(self, units, saved)

        return assigned

    _replace(Worker, "_assigned", make)


# --- who may read what ---------------------------------------------------------------------------------------------


@_bug("other-store-welcome", "nobody looks in which store the group's progress is kept")
def _other_store_welcome() -> None:
    _replace(worker_module, "_check_note", lambda _: lambda *args: None)


@_bug("older-store-welcome", "a store that is behind what the group was told goes on")
def _older_store_welcome() -> None:
    _replace(worker_module, "_check_saved", lambda _: lambda *args: None)


@_bug("topics-unchecked", "a topic that was made again under its reader, or given more partitions, is read on")
def _topics_unchecked() -> None:
    _replace(KafkaMember, "_check_topics", lambda _: lambda self: None)


@_bug("lost-unit-commits", "handlers of a partition that was lost commit on, as long as nobody has taken it")
def _lost_unit_commits() -> None:
    async def before_block(self: Any) -> None:
        await self._worker._settler.flush(self._d.lane.owned.put)

    _replace(worker_module._DeliveryUnit, "before_block", lambda _: before_block)


# --- what is read ------------------------------------------------------------------------------------------------------


@_bug("reset-to-latest", "auto.offset.reset=latest: what is out of range begins at the end")
def _reset_to_latest() -> None:
    def make(original: Callable[..., dict[str, Any]]) -> Any:
        def consumer(self: Settings, group: str, **more: Any) -> dict[str, Any]:
            return original(self, group, **more) | {"auto.offset.reset": "latest"}

        return consumer

    _replace(Settings, "consumer", make)


@_bug("out-of-range-skipped", "positions that are out of range are skipped, and nobody is told")
def _out_of_range_skipped() -> None:
    def make(original: Callable[..., None]) -> Any:
        return lambda self, found, changes: original(self, found, list[Change]())

    _replace(KafkaMember, "_on_range", make)


@_bug("expired-not-listed", "positions that retention removed are passed over, and not listed")
def _expired_not_listed() -> None:
    def make(_: Callable[..., None]) -> Any:
        return lambda tx, unit, progress, gap: progress.pass_over(gap.start, gap.end)

    _replace(store_module, "_pass_over", make)


@_bug("jump-at-first-sight", "a jump in the positions is taken for a gap at first sight")
def _jump_at_first_sight() -> None:
    def make(original: Callable[..., bool]) -> Any:
        def jump(self: KafkaMember, state: _State, *args: Any) -> bool:
            state.jumped = state.next
            return original(self, state, *args)

        return jump

    _replace(KafkaMember, "_jump", make)


@_bug("stale-batches-taken", "what was fetched before a seek is taken for what follows it")
def _stale_batches_taken() -> None:
    def make(original: Callable[..., int]) -> Any:
        def read(self: KafkaMember, batch: Any, changes: list[Change]) -> int:
            now = {place: state.token for place, state in self._states.items()}
            return original(self, batch._replace(tokens=now), changes)

        return read

    _replace(KafkaMember, "_read", make)


@_bug("uncommitted-read", "isolation.level=read_uncommitted: what a transaction aborted is delivered")
def _uncommitted_read() -> None:
    def make(original: Callable[..., dict[str, Any]]) -> Any:
        def consumer(self: Settings, group: str, **more: Any) -> dict[str, Any]:
            return original(self, group, **more) | {"isolation.level": "read_uncommitted"}

        return consumer

    _replace(Settings, "consumer", make)


# --- what is sent ------------------------------------------------------------------------------------------------------


@_bug("marked-before-receipt", "the relay takes rows out of the outbox before the broker has confirmed them")
def _marked_before_receipt() -> None:
    def make(original: Callable[..., Any]) -> Any:
        async def send(self: Relay, rows: Sequence[Unsent]) -> Any:
            await self._outbox.sent([row.number for row in rows])
            return await original(self, rows)

        return send

    _replace(Relay, "_send", make)


@_bug("accepted-when-handed-over", "publish returns when the client has the event, before its delivery report")
def _accepted_when_handed_over() -> None:
    def make(original: Callable[..., None]) -> Any:
        def send(self: Publisher, call: Call, events: Sequence[Sent]) -> None:
            original(self, call, events)
            if not call.future.done():
                call.future.set_result(
                    [Receipt(id=e.id, topic=e.topic, partition=e.partition, position=0, recorded=0) for e in events]
                )

        return send

    _replace(Publisher, "send", make)


@_bug("not-sent-again", "what waited for a producer that failed is not sent with the next one")
def _not_sent_again() -> None:
    def make(original: Callable[[Publisher, Any], None]) -> Any:
        def replace(self: Publisher, error: Any) -> None:
            pending, self._pending = self._pending, {}
            original(self, error)
            self._pending = pending

        return replace

    _replace(Publisher, "_replace", make)
