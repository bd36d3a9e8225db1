"""Sabotage: each planted bug turns a check red, and the same scene without it is green."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from scenarios import SCENES

from unlost.testing import sabotage

AT_ONCE = 4

# bug -> (scene, the checks that must all see it)
CAUGHT: dict[str, tuple[str, set[str]]] = {
    "ack-first": ("killed-in-handler", {"lost", "audit"}),
    "mark-before-effect": ("killed-in-handler", {"lost"}),
    "start-at-latest": ("killed-in-handler", {"lost"}),
    "commit-highest-seen": ("slow-head", {"lost", "audit"}),
    "stale-epoch-accepted": ("zombie", {"stale write"}),
    "shelf-not-durable": ("dead-and-redriven", {"lost", "audit"}),
    "redrive-drops": ("dead-and-redriven", {"lost", "audit"}),
    "waiting-room-forgotten": ("dead-and-redriven", {"lost"}),
    "parked-key-forgotten": ("dead-and-redriven", {"inversion"}),
    "cancelled-is-success": ("troubles", {"lost"}),
    "swallow-exceptions": ("troubles", {"lost"}),
    "skip-undecodable": ("troubles", {"dead without trace"}),
    "retry-not-durable": ("troubles", {"lost", "audit"}),
    "keys-in-parallel": ("troubles", {"inversion"}),
    "publishes-after-ack": ("killed-after-commit", {"lost"}),
    "effect-before-mark": ("killed-after-block", {"doubled"}),
    "inbox-without-service": ("two-services", {"lost"}),
    "stop-drops-queue": ("clean-stop", {"lost"}),
    "begins-when-handled": ("cut-off", {"doubled"}),
    "cut-off-not-listed": ("cut-off", {"lost", "audit"}),
    "delayed-not-durable": ("later", {"lost"}),
    "release-drops": ("later", {"lost"}),
    "released-again": ("later", {"doubled"}),
    "ack-before-commit": ("publisher-killed", {"lost"}),
    "sync-normal": ("power-cut", {"power loss"}),
}


def play(scene: str, folder: Path, bug: str | None) -> set[str]:
    env = {k: v for k, v in os.environ.items() if k != sabotage.VARIABLE} | ({sabotage.VARIABLE: bug} if bug else {})
    script = Path(__file__).with_name("scenarios.py")
    done = subprocess.run(
        [sys.executable, str(script), scene, str(folder)], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


Plays = Callable[[str, str | None], set[str]]


@pytest.fixture(scope="module")
def plays(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plays]:
    """Plays the scenes that were asked for, some at a time: they mostly wait."""
    chosen = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    wanted: list[tuple[str, str | None]] = []
    for item in chosen:
        bug, scene = item.callspec.params.get("bug"), item.callspec.params.get("scene")
        wanted.append((scene or CAUGHT[bug][0], bug))
    folder = tmp_path_factory.mktemp("scenes")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        results = {(scene, bug): pool.submit(play, scene, folder / f"{scene} {bug}", bug) for scene, bug in wanted}
        yield lambda scene, bug: results[scene, bug].result()


def test_every_planted_bug_has_a_check_that_sees_it() -> None:
    assert set(CAUGHT) == set(sabotage.BUGS)
    assert {scene for scene, _ in CAUGHT.values()} == set(SCENES)
    assert all(bug.breaks for bug in sabotage.BUGS.values())


@pytest.mark.parametrize("scene", SCENES)
def test_without_a_bug_the_scene_is_green(scene: str, plays: Plays) -> None:
    assert plays(scene, None) == set()


@pytest.mark.parametrize("bug", CAUGHT)
def test_a_planted_bug_turns_a_check_red(bug: str, plays: Plays) -> None:
    scene, expected = CAUGHT[bug]
    assert plays(scene, bug) >= expected
