"""The kill loop as a test, and the checker against histories made by hand.

`KILLS`, `SECONDS` and `SEED` make it longer, or repeat a failure: `KILLS=3000 SECONDS=1800 pytest tests/crash`.
The seed decides what is done to whom; the machine decides what that hits, so a seed narrows a failure down but does
not repeat it to the instruction. On a failure the whole history stays in the folder that the report names.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from checker import Contract, check
from evidence import Effect, Journal, Note, read

from unlost.testing import sabotage

KILLS = int(os.environ.get("KILLS", "220"))
SECONDS = float(os.environ.get("SECONDS", "240"))
SEED = int(os.environ.get("SEED", "0")) or None
FIGURES = ("kills", "by_kind", "seconds", "drain_seconds", "events", "completions", "audits")


def run_loop(folder: Path, seed: int, kills: int, seconds: float, bug: str = "") -> dict[str, Any]:
    script = Path(__file__).with_name("workload.py")
    arguments = ["--seed", str(seed), "--kills", str(kills), "--seconds", str(seconds)]
    if bug:  # with it there may be no end
        arguments += ["--pace", "0.25", "--drain", "3"]
    done = subprocess.run(
        [sys.executable, str(script), str(folder), *arguments], env=os.environ | {sabotage.VARIABLE: bug},
        capture_output=True, text=True, timeout=seconds + 240,
    )  # fmt: skip
    assert done.stdout, f"seed {seed}, history in {folder}\n{done.stderr}"
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_nothing_is_lost_doubled_or_out_of_order_under_kill_9(tmp_path: Path) -> None:
    seed = SEED or int.from_bytes(os.urandom(3), "big")
    folder = tmp_path / "history"
    report = run_loop(folder, seed, KILLS, SECONDS)
    summary = {name: report[name] for name in FIGURES}
    print(f"kill loop, seed {seed}: {summary}")
    where = f"seed {seed}, history in {folder}"
    assert report["broken"] == [], f"{where}\n{report['broken']}\n{(folder / 'stderr.txt').read_text()[-4000:]}"
    assert report["anomalies"] == [], f"{where}\n" + "\n".join(report["anomalies"][:30])
    assert report["audit"].get("wrong") == [], f"{where}\n{report['audit']}"
    assert report["green"], f"{where}\n{summary}"
    assert report["kills"] >= min(KILLS, 200), f"{where}: too slow\n{summary}"
    assert report["events"] > 5 * report["kills"], f"too little was under way while it was killed: {summary}"
    shutil.rmtree(folder)


def test_the_kill_loop_can_fail(tmp_path: Path) -> None:
    """A transaction whose mark is committed after its rows: random kills find it, and the checker names it."""
    report = run_loop(tmp_path / "history", 11, 40, 30, bug="effect-before-mark")
    assert any(anomaly.startswith("doubled") for anomaly in report["anomalies"]), report


# --- the checker: each anomaly, and what must not be taken for one -------------------------------------------------

ONCE = Contract(service="s", once=True)
LOOSE = Contract(service="s", ordered=False)
SHELF = Contract(service="s", expects=lambda uid: "shelf")


def kinds(notes: Iterable[Note], contract: Contract = ONCE, effects: Iterable[Effect] = ()) -> list[str]:
    return [anomaly.kind for anomaly in check(notes, effects, [contract])]


def published(uid: str, at: int, *, key: str = "k", value: int = 7, batch: str = "") -> list[Note]:
    return [Note("intend", at, uid, key, "", value, batch), Note("acked", at + 1, uid, key)]


def completed(uid: str, at: int, *, key: str = "k", value: int = 7) -> Note:
    return Note("completed", at, uid, key, "s", value)


def test_a_whole_history_has_no_anomaly() -> None:
    notes = [*published("a", 1), completed("a", 3), *published("b", 4), completed("b", 6)]
    assert kinds(notes) == []


def test_an_acknowledged_event_that_nobody_completed_is_lost() -> None:
    assert kinds([*published("a", 1)]) == ["lost"]


def test_an_unknown_outcome_may_appear_or_not() -> None:
    open_ = [Note("intend", 1, "a", "k", "", 7), Note("unknown", 2, "a")]
    assert kinds(open_) == []
    assert kinds([*open_, completed("a", 3)]) == []


def test_what_one_service_saw_is_owed_to_every_other() -> None:
    notes = [Note("intend", 1, "a", "k", "", 7), completed("a", 3)]
    found = check(notes, [], [ONCE, Contract(service="t")])
    assert [(a.kind, a.service) for a in found] == [("lost", "t")]


def test_a_batch_is_accepted_as_a_whole() -> None:
    parts = [Note("intend", 1, uid, "k", "", 7, "batch 1") for uid in ("a", "b")]
    assert kinds(parts) == []
    assert kinds([*parts, completed("a", 3)]) == ["lost"]
    assert kinds([*parts, completed("a", 3), completed("b", 4)]) == []


def test_two_effects_are_doubled_only_where_once_is_promised() -> None:
    notes = published("a", 1)
    twice = [Effect(1, "s", "a", "k", 7), Effect(2, "s", "a", "k", 7)]
    assert kinds(notes, ONCE, twice) == ["doubled"]
    assert kinds(notes, Contract(service="s"), twice) == []


def test_completions_against_the_order_of_publishing_are_inversions() -> None:
    notes = [*published("a", 1), *published("b", 4), completed("b", 6), completed("a", 7)]
    assert kinds(notes) == ["inversion"]
    assert kinds(notes, LOOSE) == []


def test_a_repeat_after_the_first_completion_is_no_inversion() -> None:
    notes = [*published("a", 1), *published("b", 4), completed("a", 6), completed("b", 7), completed("a", 8)]
    assert kinds(notes, Contract(service="s")) == []


def test_publishes_that_overlap_bind_nothing() -> None:
    notes = [
        Note("intend", 1, "a", "k", "", 7), Note("intend", 2, "b", "k", "", 7),
        Note("acked", 3, "a"), Note("acked", 4, "b"), completed("b", 6), completed("a", 7),
    ]  # fmt: skip
    assert kinds(notes) == []


def test_keys_do_not_bind_each_other() -> None:
    notes = [*published("a", 1), *published("b", 4, key="l"), completed("b", 6, key="l"), completed("a", 7)]
    assert kinds(notes) == []


def test_an_inversion_is_seen_across_events_between() -> None:
    notes = [*published("a", 1), *published("b", 4), *published("c", 8)]
    assert kinds([*notes, completed("b", 20), completed("c", 21), completed("a", 22)]) == ["inversion"]


def test_an_effect_without_an_event_is_a_phantom() -> None:
    assert kinds([completed("a", 3)]) == ["phantom"]
    assert kinds([], ONCE, [Effect(1, "s", "a", "k", 7)]) == ["phantom"]


def test_another_key_or_value_is_altered() -> None:
    assert kinds([*published("a", 1), completed("a", 3, value=8)]) == ["altered"]
    assert kinds([*published("a", 1), completed("a", 3, key="l")]) == ["altered"]


def test_what_was_refused_must_not_appear() -> None:
    refused = [Note("intend", 1, "a", "k", "", 7), Note("refused", 2, "a")]
    assert kinds(refused) == []
    assert kinds([*refused, completed("a", 3)]) == ["resurrected"]
    again = [*refused, *published("a", 4)]
    assert kinds([*again, completed("a", 8)]) == []


def test_what_must_be_dead_must_have_been_seen_on_the_shelf() -> None:
    assert kinds(published("a", 1), SHELF) == ["dead without trace"]
    assert kinds([*published("a", 1), Note("shelved", 4, "a", "k", "s", 7)], SHELF) == []


def test_evidence_survives_a_torn_last_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "one")
    journal.note("intend", "a", "k", value=7)
    with journal.path.open("ab") as f:
        f.write(b'["acked",12')
    assert [(note.what, note.uid) for note in read(tmp_path)] == [("intend", "a")]


@pytest.mark.parametrize("count", [20_000])
def test_the_checker_is_linear(count: int) -> None:
    """Twenty thousand events of one key, in the worst order; quadratic work would not come to an end here."""
    notes = [note for n in range(count) for note in published(f"e{n}", 2 * n)]
    notes += [completed(f"e{n}", 10 * count - n) for n in range(count)]
    assert len(kinds(notes)) == count - 1
