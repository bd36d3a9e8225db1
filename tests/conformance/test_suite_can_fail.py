"""A check that cannot fail is a defect: each of these bugs is planted into the real adapter and must turn a scenario red."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from unlost.brokers.embedded import broker as broker_module
from unlost.brokers.embedded import log as log_module
from unlost.brokers.embedded.broker import EmbeddedBroker
from unlost.brokers.embedded.group import EmbeddedMember
from unlost.brokers.port import Receipt
from unlost.errors import Fenced
from unlost.events import Envelope, decode_head
from unlost.sqlite import transaction as transaction_module
from unlost.sqlite.process import Remains
from unlost.sqlite.turn import Guard, Turn
from unlost.store import delayed as delayed_module
from unlost.store import queues as queues_module
from unlost.store import sqlite as store_module
from unlost.store.port import Settlement
from unlost.store.progress import Progress
from unlost.store.sqlite import SqliteStore
from unlost.testing import check_broker, check_store

Patch = pytest.MonkeyPatch
_publish = EmbeddedBroker.publish


def keys_lose_zero_bytes(patch: Patch) -> None:
    async def publish(self: EmbeddedBroker, envelopes: Sequence[Envelope]) -> Sequence[Receipt]:
        return await _publish(self, [msgspec.structs.replace(e, key=e.key and e.key.rstrip(b"\0")) for e in envelopes])

    patch.setattr(EmbeddedBroker, "publish", publish)


def headers_get_lost(patch: Patch) -> None:
    decode = log_module.decode_head
    patch.setattr(log_module, "decode_head", lambda *a, **k: msgspec.structs.replace(decode(*a, **k), headers={}))


def batches_are_written_one_by_one(patch: Patch) -> None:
    async def publish(self: EmbeddedBroker, envelopes: Sequence[Envelope]) -> Sequence[Receipt]:
        return [receipt for e in envelopes for receipt in await _publish(self, [e])]

    patch.setattr(EmbeddedBroker, "publish", publish)


def batches_are_turned_round(patch: Patch) -> None:
    async def publish(self: EmbeddedBroker, envelopes: Sequence[Envelope]) -> Sequence[Receipt]:
        return list(await _publish(self, list(envelopes)[::-1]))[::-1]

    patch.setattr(EmbeddedBroker, "publish", publish)


def receipts_come_before_the_commit(patch: Patch) -> None:
    tasks = []

    async def publish(self: EmbeddedBroker, envelopes: Sequence[Envelope]) -> Sequence[Receipt]:
        tasks.append(asyncio.ensure_future(_publish(self, envelopes)))
        return [Receipt(id=e.id, topic=e.topic, partition=0, position=0, recorded=0) for e in envelopes]

    patch.setattr(EmbeddedBroker, "publish", publish)


def each_process_has_its_own_partitioning(patch: Patch) -> None:
    turns = iter(range(1_000_000))
    patch.setattr(transaction_module, "partition_of", lambda key, partitions: next(turns) % partitions)


def other_partitions_are_accepted(patch: Patch) -> None:
    patch.setattr(broker_module, "_declare", lambda tx, wanted: None)


def seek_is_off_by_one(patch: Patch) -> None:
    seek = EmbeddedMember.seek
    patch.setattr(EmbeddedMember, "seek", lambda self, unit, position: seek(self, unit, position + 1))


def pause_does_nothing(patch: Patch) -> None:
    patch.setattr(EmbeddedMember, "pause", lambda self, unit: None)


def everybody_claims_everything(patch: Patch) -> None:
    def claim(self: EmbeddedMember, tx: Any, dead: set[str]) -> list[Any]:
        return [unit for unit in self._numbers if unit not in self._owned]

    patch.setattr(EmbeddedMember, "_claim", claim)


def a_closed_member_joins_again(patch: Patch) -> None:
    patch.setattr(EmbeddedMember, "_closed", property(lambda self: False, lambda self, value: None), raising=False)


def a_stale_epoch_is_accepted(patch: Patch) -> None:
    load = store_module._load

    def lenient(tx: Any, unit: Any, epoch: int) -> Progress:
        try:
            return load(tx, unit, epoch)
        except Fenced:
            sql = "select epoch from unlost_progress where service = ? and topic = ? and partition = ?"
            return load(tx, unit, tx.one(sql, unit)[0])

    patch.setattr(store_module, "_load", lenient)


def the_shelf_is_not_written(patch: Patch) -> None:
    patch.setattr(store_module, "_shelve", lambda tx, unit, o: None)


def the_inbox_is_not_written(patch: Patch) -> None:
    patch.setattr(store_module, "_enter_inbox", lambda tx, service, inbox: True)


def a_reused_id_is_dropped(patch: Patch) -> None:
    def as_repeated(tx: Any, service: str, o: Any, inbox: Any) -> None:
        o.inbox, o.publishes, o.state, o.rule = None, (), "skipped", "duplicate"

    patch.setattr(store_module, "_as_repeated", as_repeated)


def the_position_follows_the_highest(patch: Patch) -> None:
    settle = Progress.settle

    def highest(self: Progress, position: int, event_hash: int, counted_as: str | None) -> None:
        settle(self, position, event_hash, counted_as)
        self.position = position + 1

    patch.setattr(Progress, "settle", highest)


def attempts_are_not_saved(patch: Patch) -> None:
    save = store_module._save
    patch.setattr(store_module, "_save", lambda tx, unit, progress, changed: save(tx, unit, progress, {}))


def each_outcome_is_its_own_commit(patch: Patch) -> None:
    settle = SqliteStore.settle

    async def one_by_one(self: SqliteStore, settlements: Sequence[Settlement]) -> Sequence[Any]:
        fenced: list[Any] = []
        for s in settlements:
            for outcome in s.outcomes:
                fenced += await settle(self, [Settlement(s.unit, s.epoch, [outcome])])
        return fenced

    patch.setattr(SqliteStore, "settle", one_by_one)


def what_waited_may_end_twice(patch: Patch) -> None:
    patch.setattr(store_module, "_waits", lambda tx, unit, position: True)


def the_dead_count_as_running(patch: Patch) -> None:
    patch.setattr(store_module, "examine", lambda *a: Remains(alive=True, hung=False, running={}, read={}))


def nobody_is_suspected(patch: Patch) -> None:
    patch.setattr(store_module, "_suspect", lambda *a: False)


def an_aborted_block_stays(patch: Patch) -> None:
    patch.setattr(Turn, "undo", lambda self, block: self.next())


def users_may_touch_the_books(patch: Patch) -> None:
    patch.setattr(Guard, "__call__", lambda self, *a: 0)


def queues_are_for_everybody(patch: Patch) -> None:
    patch.setattr(queues_module, "claim", lambda service, queues: iter(()))


def begun_is_forgotten(patch: Patch) -> None:
    patch.setattr(Progress, "abandon", lambda self: [])


def begun_is_delivered_again(patch: Patch) -> None:
    patch.setattr(Progress, "begin", lambda self, positions, digest: None)


def delayed_leave_at_once(patch: Patch) -> None:
    patch.setattr(SqliteStore, "_publish_or_delay", lambda self, tx, envelopes: self._publish(tx, envelopes))


def delayed_are_forgotten(patch: Patch) -> None:
    patch.setattr(SqliteStore, "_publish_or_delay", lambda self, tx, envelopes: None)


def what_is_released_stays(patch: Patch) -> None:
    def take_due(steady: int, wall: int) -> Any:
        rows = yield "select topic, key, head, data from unlost_delayed where due <= ? order by due", (steady,)
        return [decode_head(head, topic=topic, key=key, data=data) for topic, key, head, data in rows]

    patch.setattr(delayed_module, "take_due", take_due)


BROKER_BUGS: list[tuple[Callable[[Patch], None], str]] = [
    (keys_lose_zero_bytes, "keys_of_any_bytes"),
    (headers_get_lost, "every_field_round_trips"),
    (batches_are_written_one_by_one, "a_bad_event_refuses_its_batch"),
    (batches_are_turned_round, "one_order_per_key"),
    (receipts_come_before_the_commit, "a_receipt_is_true"),
    (each_process_has_its_own_partitioning, "a_key_stays_in_its_partition"),
    (other_partitions_are_accepted, "another_number_of_partitions"),
    (seek_is_off_by_one, "seeking"),
    (pause_does_nothing, "pausing"),
    (everybody_claims_everything, "members_share"),
    (a_closed_member_joins_again, "closing_a_member_while_it_waits"),
]
STORE_BUGS: list[tuple[Callable[[Patch], None], str]] = [
    (a_stale_epoch_is_accepted, "fenced_writes_nothing"),
    (a_stale_epoch_is_accepted, "a_block_of_an_older_owner"),
    (the_shelf_is_not_written, "a_dead_letter_is_complete"),
    (the_inbox_is_not_written, "a_repeated_event_has_no_effect"),
    (a_reused_id_is_dropped, "a_reused_id_is_not_a_duplicate"),
    (the_position_follows_the_highest, "out_of_order_and_restart"),
    (attempts_are_not_saved, "attempts_are_remembered"),
    (each_outcome_is_its_own_commit, "all_or_nothing"),
    (what_waited_may_end_twice, "settled_twice_is_refused"),
    (the_dead_count_as_running, "releases_agree_on_the_order"),
    (nobody_is_suspected, "suspects_after_kill_9"),
    (an_aborted_block_stays, "a_block_that_ends_badly_leaves_nothing"),
    (users_may_touch_the_books, "a_block_cannot_touch_the_books"),
    (delayed_leave_at_once, "delayed_until_due"),
    (delayed_are_forgotten, "delayed_until_due"),
    (what_is_released_stays, "delayed_until_due"),
    (begun_is_forgotten, "begun_at_most_once"),
    (begun_is_delivered_again, "begun_at_most_once"),
    (queues_are_for_everybody, "one_service_for_a_queue"),
]


@pytest.mark.parametrize(("bug", "scenario"), BROKER_BUGS)
def test_a_broken_broker_is_found(
    bug: Callable[[Patch], None], scenario: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    bug(monkeypatch)
    (result,) = asyncio.run(check_broker(f"embedded://{tmp_path}/events.db", only=[scenario]))
    assert (result.name, result.verdict) == (scenario, "broken"), result.reason


@pytest.mark.parametrize(("bug", "scenario"), STORE_BUGS)
def test_a_broken_store_is_found(
    bug: Callable[[Patch], None], scenario: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    bug(monkeypatch)
    (result,) = asyncio.run(check_store(f"embedded://{tmp_path}/events.db", only=[scenario]))
    assert (result.name, result.verdict) == (scenario, "broken"), result.reason


def test_what_is_not_declared_is_not_promised(tmp_path: Path, monkeypatch: Patch) -> None:
    abilities = msgspec.structs.replace(EmbeddedBroker.abilities, replayable=False)
    monkeypatch.setattr(EmbeddedBroker, "abilities", abilities)
    seek_is_off_by_one(monkeypatch)
    (result,) = asyncio.run(check_broker(f"embedded://{tmp_path}/events.db", only=["seeking"]))
    assert (result.verdict, result.error) == ("not promised", None)
