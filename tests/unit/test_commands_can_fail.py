"""A check that cannot fail is a defect: each bug of `tests/planted/plants.py` turns the test red that it names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLANTED = ROOT / "tests" / "planted"
sys.path.insert(0, str(PLANTED))

from plants import PLANTS  # noqa: E402

sys.path.remove(str(PLANTED))


def play(bug: str, test: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, (str(PLANTED), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-n0", "-p", "no:cacheprovider", "-W",
         "ignore::pytest.PytestAssertRewriteWarning", test], cwd=ROOT, timeout=300,
        env=os.environ | {"PLANTED_BUG": bug, "PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("bug", PLANTS)
def test_a_planted_bug_turns_its_test_red(bug: str) -> None:
    """Red, and not broken: pytest ran it, and an assertion or the program itself objected."""
    done = play(bug, PLANTS[bug].test)
    assert done.returncode == 1 and "\nFAILED " in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]


def test_each_of_them_is_told_apart() -> None:
    assert all(plant.breaks and (ROOT / plant.test.partition("::")[0]).exists() for plant in PLANTS.values())
    assert len({(plant.place, plant.test) for plant in PLANTS.values()}) == len(PLANTS)
