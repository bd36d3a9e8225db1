"""Sabotage: each planted bug of the store in PostgreSQL turns a check red; `test_pg_scenes.py` has the same scene green."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pg_scenes import OWN_SERVER, SCENES, Plays, plays_of

from servers.postgres import Postgres
from unlost.testing import sabotage_postgres

# bug -> (scene, the checks that must all see it)
CAUGHT: dict[str, tuple[str, set[str]]] = {
    "outbox-beside-the-transaction": ("rolled_back", {"ghost", "altered"}),
    "events-after-the-commit": ("web_is_killed_after_its_commit", {"zombie"}),
    "page-by-number": ("commit_out_of_order", {"zombie", "counters"}),
    "claimed-in-any-order": ("relay_dies_before_sending", {"inversion"}),
    "marked-before-receipt": ("relay_dies_before_sending", {"zombie", "counters"}),
    "sent-before-the-claim": ("relay_dies_after_sending", {"unclaimed"}),
    "stale-relay-accepted": ("relay_sleeps_before_confirming", {"ended badly"}),
    "refused-row-holds-nothing": ("relay_is_refused_a_row", {"overtaken", "inversion"}),
    "old-rows-removed": ("rows_wait_for_a_relay", {"lost"}),
    "locks-kept-asleep": ("relay_sleeps_inside_its_commit", {"held up"}),
    "marks-of-all-services": ("two_services", {"lost"}),
    "marks-removed-by-age": ("handler_dies_after_its_commit", {"doubled", "money"}),
    "repeats-not-recognised": ("relay_dies_after_sending", {"doubled"}),
    "mark-before-the-handler": ("killed_in_handler", {"lost"}),
    "mark-after-the-block": ("handler_dies_after_its_commit", {"doubled", "money"}),
    "position-before-the-block": ("handler_dies_before_its_commit", {"lost"}),
    "publishes-after-settling": ("settler_dies_after_its_commit", {"lost"}),
    "stale-epoch-accepted": ("zombie_before_its_transaction", {"stale write"}),
    "lost-answer-is-failure": ("answer_to_settling_is_lost", {"ended"}),
    "lost-answer-is-success": ("settling_never_arrives", {"unsettled"}),
    "number-believed-after-a-crash": ("crash_takes_a_commit_back", {"lost", "unsettled"}),
    "unavailable-is-success": ("serialization_failures", {"lost"}),
    "world-blames-the-event": ("deadlocks", {"shelf"}),
    "load-gives-up": ("store_is_away_when_the_waiting_room_is_read", {"ended badly"}),
    "deaths-not-counted": ("event_kills_its_process", {"shelf"}),
    "restored-backup-welcome": ("backup_is_restored", {"not refused"}),
}


@pytest.fixture(scope="module")
def plays(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, postgres: Postgres
) -> Iterator[Plays]:
    with plays_of(request, tmp_path_factory.mktemp("bugs"), postgres) as found:
        yield found


def test_every_planted_bug_has_a_check_that_sees_it() -> None:
    assert set(CAUGHT) == set(sabotage_postgres.BUGS)
    assert {scene for scene, _ in CAUGHT.values()} <= {*SCENES, *OWN_SERVER}
    assert all(bug.breaks for bug in sabotage_postgres.BUGS.values())


@pytest.mark.parametrize(("bug", "scene"), [(bug, scene) for bug, (scene, _) in CAUGHT.items()])
def test_a_planted_bug_turns_a_check_red(bug: str, scene: str, plays: Plays) -> None:
    assert plays(scene, bug) >= CAUGHT[bug][1]
