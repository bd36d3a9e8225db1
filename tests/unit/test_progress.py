"""Progress: runs of positions against a plain set, their bytes, and settling in any order."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unlost.errors import Bug, Damaged
from unlost.store.progress import Progress, Runs

positions = st.lists(st.integers(0, 60), max_size=80)


def build(chosen: list[int]) -> Runs:
    runs = Runs()
    for position in chosen:
        runs.add(position)
    return runs


@given(positions)
def test_runs_are_a_set(chosen: list[int]) -> None:
    runs, model = Runs(), set()
    for position in chosen:
        assert runs.add(position) is (position not in model)
        model.add(position)
    assert len(runs) == len(model)
    assert [p for start, end in runs for p in range(start, end)] == sorted(model)
    assert all(p in runs for p in model)
    assert not any(p in runs for p in range(62) if p not in model)
    pairs = list(runs)
    assert all(start < end for start, end in pairs)
    assert all(end < start for (_, end), (start, _) in pairwise(pairs)), "never adjacent"
    assert runs == Runs(pairs)


@given(positions, st.integers(0, 62), st.integers(0, 62))
def test_gaps_are_what_is_missing(chosen: list[int], start: int, end: int) -> None:
    runs, model = build(chosen), set(chosen)
    gaps = list(runs.gaps(start, end))
    assert [p for a, b in gaps for p in range(a, b)] == [p for p in range(start, end) if p not in model]
    assert all(a < b for a, b in gaps)
    assert runs.first_gap(start) == next(p for p in range(start, 200) if p not in model)


@given(st.lists(st.integers(0, 1 << 40), max_size=30))
def test_bytes_say_the_same(chosen: list[int]) -> None:
    runs = build(chosen)
    again = Runs.decode(runs.encode())
    assert again == runs
    assert again.encode() == runs.encode()


@given(positions, positions)
def test_what_is_taken_out_is_not_in(chosen: list[int], taken: list[int]) -> None:
    runs, model = build(chosen), set(chosen)
    assert runs.remove_many(list(taken)) == len(model & set(taken))
    assert [p for start, end in runs for p in range(start, end)] == sorted(model - set(taken))


@given(st.permutations(range(8)), st.sets(st.integers(0, 7)))
def test_what_was_begun_ends_once_or_is_abandoned(order: list[int], handled: set[int]) -> None:
    progress = Progress(0, Runs(), {}, 0)
    for position in order:
        progress.begin([position], 1 << position)
    assert (progress.position, progress.digest, progress.counts) == (8, 255, {"begun": 8}), "nobody gets them again"
    if handled:
        progress.end(sorted(handled), "done")
        with pytest.raises(Bug):
            progress.end([min(handled)], "done")
    with pytest.raises(Bug):
        progress.begin([3], 0)
    assert progress.abandon() == sorted(set(range(8)) - handled) and progress.abandon() == []
    assert progress.counts == ({"done": len(handled)} if handled else {}) and progress.position == 8


def test_a_long_run_is_short_in_bytes() -> None:
    assert len(Runs([(0, 1_000_000), (1_000_001, 1 << 39)]).encode()) < 20


@pytest.mark.parametrize("raw", [b"\x80", b"\x01", b"\x00\x01\x80", b"\x00\x01\x02"])
def test_bytes_that_are_cut_are_refused(raw: bytes) -> None:
    with pytest.raises(Damaged) as refused:
        Runs.decode(raw)
    assert refused.value.code == "UL3010"


@given(st.permutations(range(20)), st.integers(0, 5))
def test_the_position_is_the_end_of_the_first_run(order: list[int], start: int) -> None:
    """From whatever start and in whatever order: the position passes over no event without an outcome."""
    progress = Progress(start, Runs(), {}, 0)
    settled: set[int] = set()
    for position in (start + p for p in order):
        progress.settle(position, 1 << position, "done" if position % 2 else None)
        settled.add(position)
        expected = start
        while expected in settled:
            expected += 1
        assert progress.position == expected
        assert progress.digest == sum(1 << p for p in settled)
        assert progress.counts.get("done", 0) == sum(p % 2 for p in settled)
        assert {p for a, b in progress.fated for p in range(a, b)} == settled
    assert progress.position == start + 20


def test_no_position_gets_two_outcomes() -> None:
    progress = Progress(5, Runs(), {}, 0)
    progress.settle(7, 0, "done")
    for position in (7, 4):
        with pytest.raises(Bug):
            progress.settle(position, 0, "done")
    progress.settle(5, 0, "done")
    with pytest.raises(Bug):
        progress.settle(5, 0, "done")
    assert (progress.position, progress.counts) == (6, {"done": 2})


def test_counts_move_between_states() -> None:
    progress = Progress(0, Runs(), {"done": 1}, 0)
    progress.count("done", 2)
    progress.count("skipped:rule", 1)
    assert progress.counts == {"done": 3, "skipped:rule": 1}
