"""Bugs for what operators do and what is kept beside the log, each with the test that must turn red with it.

They are laid over every process of that test, whatever it starts: see `sitecustomize.py`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Plant:
    """`place` is what is replaced: a module, then a name in it, perhaps of a class."""

    breaks: str
    place: str
    make: Callable[[Any], Any]
    test: str

    def apply(self) -> None:
        path, _, name = self.place.partition(":")
        owner: Any = importlib.import_module(path)
        *classes, last = name.split(".")
        for part in classes:
            owner = getattr(owner, part)
        setattr(owner, last, self.make(getattr(owner, last)))


def nothing(_: Any) -> Any:
    return lambda *args, **more: None


def no_steps(result: Any = None) -> Callable[[Any], Any]:
    """Statements that are not run."""

    def make(_: Any) -> Any:
        def steps(*args: Any, **more: Any) -> Any:
            return result
            yield

        return steps

    return make


def _half(original: Any) -> Any:
    return lambda *args, **more: list(original(*args, **more))[1:]


PLANTS = {
    "cancel-keeps": Plant(
        "what was cancelled leaves all the same", "unlost.store.delayed:cancel", no_steps(True),
        "tests/unit/test_delayed.py::test_the_same_id_twice_is_one_and_a_cancelled_one_may_be_sent_again",
    ),
    "upcast-skipped": Plant(
        "events of older versions are read without their upcasters", "unlost.events.catalog:bring_up",
        lambda _: lambda envelope, steps: envelope,
        "tests/unit/test_upcast.py::test_each_version_is_read_by_the_class_of_today",
    ),
    "replay-wants-everything": Plant(
        "a replay delivers what was not chosen", "unlost.ops.replay_plan:Choice.wants", lambda _: lambda self, a: True,
        "tests/unit/test_replay.py::test_what_is_not_chosen_is_skipped_and_counted",
    ),
    "replay-has-no-end": Plant(
        "a replay goes on to events that came after it began", "unlost.ops.replay_member:ReplayMember._end",
        lambda original: lambda self, unit: original(self, unit) + 1,
        "tests/unit/test_replay.py::test_events_that_come_after_it_began_are_not_part_of_it",
    ),
    "erase-keeps-data": Plant(
        "the rows of the log keep what they say", "unlost.sqlite.erase:erased_head", lambda _: lambda head, time: head,
        "tests/unit/test_erase.py::test_all_of_it_leaves_and_the_books_balance",
    ),
    "erase-keeps-bytes": Plant(
        "the file is not written anew, so its pages keep the bytes", "unlost.sqlite.erase:scrub", lambda _: lambda file: "",
        "tests/unit/test_erase.py::test_no_byte_is_left_where_pages_were_split_and_rows_deleted",
    ),
    "erase-uncounted": Plant(
        "what nobody had handled is erased, and gets no outcome", "unlost.ops.erase:_settle",
        lambda _: lambda look, unit, events, now: 0,
        "tests/unit/test_erase.py::test_all_of_it_leaves_and_the_books_balance",
    ),
    "erased-is-delivered": Plant(
        "an erased event reaches handlers as if it were one", "unlost.events.codec:is_erased",
        lambda _: lambda head: False,
        "tests/unit/test_erase.py::test_a_member_that_reads_an_erased_row_skips_it",
    ),
    "backup-unchecked": Plant(
        "a backup that has changed is put back", "unlost.sqlite.backup:check_backup", nothing,
        "tests/unit/test_backup.py::test_a_backup_that_has_changed",
    ),
    "restore-names-nothing": Plant(
        "what a restored backup lacks is not said", "unlost.ops.backup:_beyond",
        lambda original: lambda look, copy, manifest: (
            lambda found: (type(found[0])(positions=[], again=[], outbox=0, commits=None), *found[1:])
        )(original(look, copy, manifest)),
        "tests/unit/test_backup.py::test_what_is_missing_is_named",
    ),
    "verify-reads-over": Plant(
        "doctor --verify does not look at the rows of the log", "unlost.ops.verify:_check_row", nothing,
        "tests/unit/test_verify.py::test_a_flipped_bit",
    ),
    "index-believes": Plant(
        "the index of trace is believed whatever the log shows", "unlost.brokers.embedded.index:Index.believed",
        lambda original: lambda self, segments: (original(self, segments)[0], list(segments)),
        "tests/unit/test_trace_index.py::test_an_older_copy_of_the_log_does_not_believe_the_newer_index",
    ),
    "index-forgets": Plant(
        "the index of trace leaves places out", "unlost.brokers.embedded.segments:Segment.places", _half,
        "tests/unit/test_trace_index.py::test_the_number_of_segments_grows_slowly_and_everything_is_in_them",
    ),
    "pause-ignored": Plant(
        "workers do not look whether their service is paused", "unlost.delivery.worker:Worker._hold", nothing,
        "tests/unit/test_service_ops.py::test_a_paused_service_ends_what_it_has_and_begins_nothing",
    ),
    "retire-uncounted": Plant(
        "what waits or is dead of a retired service is left where it is", "unlost.store.services:remove_kept", no_steps(0),
        "tests/unit/test_service_ops.py::test_a_retired_service_and_its_books",
    ),
    "rename-forgets-inbox": Plant(
        "a renamed service does not know any more what it has handled", "unlost.store.services:TABLES",
        lambda tables: tuple(name for name in tables if name != "inbox"),
        "tests/unit/test_service_ops.py::test_a_repeat_is_recognised_over_a_rename",
    ),
    "export-leaves-out": Plant(
        "an export lacks the first event of each piece that it reads", "unlost.ops.export:_Rows.of", _half,
        "tests/unit/test_cli_export.py::test_every_event_of_the_log_once",
    ),
}  # fmt: skip
