"""Scenes on Kafka, and planted bugs: each turns a check red, and the same scene without it is green.

One by itself: `pytest tests/kafka/faults/test_scenes.py -k retention`. A scene that fails leaves its history behind.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from kafka_scenes import SCENES, Scene

from servers.kafka import Kafka
from unlost.testing import sabotage, sabotage_kafka

AT_ONCE = 4
Plays = Callable[[str, str | None], set[str]]


def play(name: str, bug: str | None, folder: Path, bootstrap: str) -> set[str]:
    with Scene(folder, bootstrap, f"{name[:20]}-{uuid.uuid4().hex[:8]}", bug) as scene:
        return SCENES[name](scene)


@pytest.fixture(scope="module")
def plays(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, kafka: Kafka) -> Iterator[Plays]:
    """Plays the scenes that were asked for, some at a time: they mostly wait."""
    chosen = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    wanted = [(item.callspec.params["scene"], item.callspec.params.get("bug")) for item in chosen]
    folder = tmp_path_factory.mktemp("scenes")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        results = {
            (scene, bug): pool.submit(play, scene, bug, folder / f"{scene} {bug}", kafka.bootstrap)
            for scene, bug in wanted
        }
        yield lambda scene, bug: results[scene, bug].result()


# bug -> (scene, the checks that must all see it)
CAUGHT: dict[str, tuple[str, set[str]]] = {
    "told-when-received": ("polled-is-not-processed", {"told ahead"}),
    "told-when-lost": ("lost-partitions", {"told back"}),
    "note-of-another-snapshot": ("one-snapshot", {"torn note"}),
    "group-offset-counts": ("offsets-are-moved", {"lost"}),
    "other-store-welcome": ("another-store", {"not refused"}),
    "older-store-welcome": ("older-store", {"not refused"}),
    "topics-unchecked": ("topic-is-another", {"not refused"}),
    "lost-unit-commits": ("lost-while-settling", {"inversion"}),
    "reset-to-latest": ("retention-eats", {"lost"}),
    "out-of-range-skipped": ("retention-eats", {"audit"}),
    "expired-not-listed": ("retention-eats", {"audit"}),
    "jump-at-first-sight": ("client-skips", {"lost", "audit"}),
    "stale-batches-taken": ("client-skips", {"lost", "audit"}),
    "uncommitted-read": ("markers", {"phantom"}),
    "marked-before-receipt": ("killed-while-relaying", {"lost"}),
    "accepted-when-handed-over": ("publisher-killed", {"lost"}),
    "not-sent-again": ("producer-fails", {"unanswered"}),
}
# bugs of both brokers that must be seen here as well
SHARED: dict[str, tuple[str, set[str]]] = {
    "stale-epoch-accepted+lost-unit-commits": ("zombie", {"stale write"}),
    "ack-first": ("polled-is-not-processed", {"lost"}),
    "commit-highest-seen": ("partial-batch", {"lost", "audit"}),
    "skip-undecodable": ("poison", {"dead without trace"}),
    "publishes-after-ack": ("killed-after-commit", {"lost"}),
    "stop-drops-queue": ("clean-stop", {"lost"}),
}


def test_every_planted_bug_has_a_check_that_sees_it() -> None:
    assert set(CAUGHT) == set(sabotage_kafka.BUGS)
    assert {bug for bugs in SHARED for bug in bugs.split("+")} <= {*sabotage.BUGS, *sabotage_kafka.BUGS}
    assert all(bug.breaks for bug in sabotage_kafka.BUGS.values())


@pytest.mark.parametrize("scene", SCENES)
def test_scene(scene: str, plays: Plays) -> None:
    assert plays(scene, None) == set()


@pytest.mark.parametrize(("bug", "scene"), [(bug, scene) for bug, (scene, _) in {**CAUGHT, **SHARED}.items()])
def test_a_planted_bug_turns_a_check_red(bug: str, scene: str, plays: Plays) -> None:
    assert plays(scene, bug) >= {**CAUGHT, **SHARED}[bug][1]
