"""The balance itself: pure, on hand-made evidence, and against a model that knows the truth."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from unlost.audit import Evidence, Listed, Passed, reconcile
from unlost.store.progress import Runs


def evidence(**changes: Any) -> Evidence:
    """Ten events: 0-4 done, 5 skipped, 6 dead, 7 parked, 8-9 not reached yet."""
    fields: dict[str, Any] = {
        "service": "billing", "topic": "order", "partition": 0, "start": 0, "log_start": 0, "end": 10, "log_gaps": [],
        "position": 8, "fated": [(0, 8)], "counts": {"done": 5, "skipped:where": 1}, "digest": 77, "log_digest": 77,
        "listed": [Listed(6, "dead", "six"), Listed(7, "parked", "seven")],
        "on_shelf": frozenset({6}), "in_waiting_room": frozenset({7}), "read": 9,
    }  # fmt: skip
    return Evidence(**(fields | changes))


def test_balanced_books_say_where_everything_is() -> None:
    books = reconcile([evidence()])
    book = books.services["billing"]
    assert books.balanced
    assert (book.accepted, book.done, book.skipped, book.dead, book.parked) == (10, 5, {"where": 1}, 1, 1)
    assert (book.in_flight, book.waiting, book.unaccounted) == (1, 1, 0)


def test_an_event_that_was_passed_over_is_named() -> None:
    books = reconcile([evidence(fated=[(0, 3), (4, 8)], counts={"done": 4, "skipped:where": 1})])
    assert [m.position for m in books.missing] == [3]
    assert "passed over" in books.missing[0].why
    assert books.unaccounted == 1
    assert not books.balanced


def test_a_dead_letter_that_is_not_on_the_shelf_is_named() -> None:
    books = reconcile([evidence(on_shelf=frozenset())])
    assert [(m.position, "not on the shelf" in m.why) for m in books.missing] == [(6, True)]
    assert books.services["billing"].dead == 0


def test_a_parked_event_that_is_not_in_the_waiting_room_is_named() -> None:
    books = reconcile([evidence(in_waiting_room=frozenset())])
    assert [m.position for m in books.missing] == [7]


def test_an_event_that_vanished_from_the_log_is_named() -> None:
    books = reconcile([evidence(log_gaps=[(8, 9)])])
    assert [m.position for m in books.missing] == [8]
    assert books.findings
    assert books.services["billing"].waiting == 1


def test_a_log_that_ends_before_the_saved_position_has_lost_its_tail() -> None:
    books = reconcile([evidence(end=5, position=12, fated=[(0, 8)])])
    assert {m.position for m in books.missing} == {8, 9, 10, 11}


def test_a_loss_that_a_duplicate_would_hide_shows_in_the_digest() -> None:
    books = reconcile([evidence(log_digest=78)])
    assert books.unaccounted == 0
    assert not books.balanced
    assert "digests differ" in books.findings[0]


def test_outcomes_that_were_never_counted_are_unaccounted() -> None:
    books = reconcile([evidence(counts={"done": 3, "skipped:where": 1})])
    assert books.unaccounted == books.unnamed == 2


def test_positions_without_an_event_were_never_accepted() -> None:
    books = reconcile([evidence(counts={"done": 3, "skipped:where": 1, "void": 2})])
    book = books.services["billing"]
    assert books.balanced
    assert (book.accepted, book.done, book.dead, book.parked, book.in_flight, book.waiting) == (8, 3, 1, 1, 1, 1)


def test_what_a_log_let_go_of_is_named_and_balances_only_if_that_was_declared() -> None:
    for kind, declared, balanced in (
        ("expired", True, True), ("expired", False, False), ("unaccountable", True, False), ("unaccountable", False, False),
    ):  # fmt: skip
        passed = [Passed(2, 5, kind, "it is gone", declared)]
        books = reconcile([evidence(counts={"done": 2, "skipped:where": 1}, passed=passed, forgets=True)])
        book = books.services["billing"]
        assert books.balanced is balanced and books.unaccounted == 0
        assert (book.accepted, book.done, book.expired + book.unaccountable) == (10, 2, 3)
        assert (book.expired, book.unaccountable) == ((3, 0) if kind == "expired" else (0, 3))
        assert [str(r) for r in books.ranges] == ["billing order/0, positions 2 to 4: it is gone"]


def test_what_expired_while_nobody_ran_is_named_before_it_is_settled() -> None:
    gone = evidence(end=30, log_start=20, read=0, forgets=True)
    books = reconcile([gone])
    book = books.services["billing"]
    assert not books.balanced and books.missing == []
    assert [(r.start, r.end, r.kind, r.declared) for r in books.ranges] == [(8, 20, "expired", False)]
    assert (book.accepted, book.expired, book.waiting, book.in_flight, book.unaccounted) == (30, 12, 10, 0, 0)
    assert "not settled yet" in books.ranges[0].why and "declares no retention" in books.ranges[0].why
    assert reconcile([evidence(end=30, log_start=20, read=0, forgets=True, declared=True)]).balanced
    in_hand = reconcile([evidence(end=30, log_start=20, read=15, forgets=True)]).services["billing"]
    assert (in_hand.in_flight, in_hand.expired, in_hand.waiting) == (7, 5, 10)


def test_a_log_that_forgets_nothing_has_no_excuse() -> None:
    books = reconcile([evidence(end=30, log_start=20, read=0)])
    assert [m.position for m in books.missing] == list(range(8, 20))


def test_a_range_that_is_listed_and_has_no_outcome_is_a_finding() -> None:
    books = reconcile([evidence(passed=[Passed(8, 9, "expired", "gone", True)], forgets=True)])
    assert any("listed as expired, but have no outcome" in finding for finding in books.findings)


def test_what_was_seen_while_looking_is_a_finding() -> None:
    assert not reconcile([evidence()], findings=["the topic is another one"]).balanced


def test_counting_twice_is_a_finding() -> None:
    books = reconcile([evidence(counts={"done": 6, "skipped:where": 1})])
    assert books.findings
    assert not books.balanced


def test_a_kept_event_that_is_not_listed_is_a_finding() -> None:
    books = reconcile([evidence(on_shelf=frozenset({2, 6}))])
    assert any("does not list it" in finding for finding in books.findings)


def test_a_trimmed_log_is_no_loss() -> None:
    books = reconcile([evidence(log_start=4)])
    assert books.balanced


def test_a_log_trimmed_past_an_open_event_is_a_loss() -> None:
    books = reconcile([evidence(log_start=9)])
    assert [m.position for m in books.missing] == [8]


def test_a_service_that_began_later_is_not_asked_for_what_was_before() -> None:
    books = reconcile([evidence(start=5, fated=[(5, 8)], counts={"done": 0, "skipped:where": 1})])
    assert books.balanced
    assert books.services["billing"].accepted == 5


@st.composite
def histories(draw: st.DrawFn) -> tuple[Evidence, set[int]]:
    """A random true history, and then a random set of lost events hidden in the evidence."""
    end = draw(st.integers(0, 60))
    states = [
        draw(st.sampled_from(["done", "skipped", "dead", "parked", "retrying", "removed", ""])) for _ in range(end)
    ]
    fated, counts = Runs(), {"done": 0, "skipped:where": 0}
    listed, shelf, room = [], set(), set()
    lost = set()
    for position, state in enumerate(states):
        if not state:
            continue
        if state in ("done", "skipped"):
            counts["done" if state == "done" else "skipped:where"] += 1
        else:
            listed.append(Listed(position, state, str(position)))
            keep = not (state != "removed" and draw(st.booleans()))
            if not keep:
                lost.add(position)
            elif state == "dead":
                shelf.add(position)
            elif state != "removed":
                room.add(position)
        fated.add(position)
    position = fated.first_gap(0)
    passed = draw(st.integers(0, 5))
    moved = min(end, position + passed)
    lost |= {p for p in range(position, moved) if p not in fated}
    return (
        Evidence(
            service="s", topic="t", partition=0, start=0, log_start=0, end=end, log_gaps=[], position=moved,
            fated=list(fated), counts=counts, digest=0, log_digest=0, listed=listed, on_shelf=frozenset(shelf),
            in_waiting_room=frozenset(room), read=draw(st.integers(0, end)),
        ),
        lost,
    )  # fmt: skip


@given(histories())
def test_exactly_the_lost_events_are_named_and_the_rest_adds_up(case: tuple[Evidence, set[int]]) -> None:
    e, lost = case
    books = reconcile([e])
    assert {m.position for m in books.missing} == lost
    book = books.services["s"]
    parts = (
        book.done + sum(book.skipped.values()) + book.dead + book.parked + book.retrying + book.removed
        + book.in_flight + book.waiting + book.unaccounted
    )  # fmt: skip
    assert parts == book.accepted == e.end
    assert book.waiting >= 0
    assert book.in_flight >= 0
