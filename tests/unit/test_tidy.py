"""Rules that matter live in a test: where time and chance come from, and what may not be swallowed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import unlost
from unlost.delivery import service as service_module
from unlost.store.port import State

SOURCE = Path(unlost.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

# name -> why it may look at the clock or at chance by itself
OWN_CLOCK = {
    "world.py": "it is the door",
    "testing": "measures real time on purpose",
    "demo": "a program like a user's: shows elapsed time and throws dice for its kills",
    "cli": "shows elapsed time",
}


def _nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text()))


def _room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0]


def clock_uses(path: Path) -> list[str]:
    modules = {"time", "random", "uuid", "secrets"}
    found = []
    for node in _nodes(path):
        of_types = path.name == "model.py"  # it names the type UUID, as a type of keys
        if isinstance(node, ast.Import) and modules & {alias.name for alias in node.names} and not of_types:
            found.append(f"{path.name}:{node.lineno}")
        if isinstance(node, ast.ImportFrom) and node.module in modules and {a.name for a in node.names} != {"UUID"}:
            found.append(f"{path.name}:{node.lineno}")
        if isinstance(node, ast.Attribute) and node.attr in ("now", "utcnow", "today"):
            value = node.value
            if isinstance(value, ast.Name) and value.id in ("datetime", "date"):
                found.append(f"{path.name}:{node.lineno}")
    return found


def swallowed(path: Path) -> list[str]:
    """Handlers that do nothing, without a comment that says why."""
    lines = path.read_text().splitlines()
    found = []
    for node in _nodes(path):
        if not isinstance(node, ast.ExceptHandler):
            continue
        if all(isinstance(b, ast.Pass | ast.Continue) for b in node.body):
            text = " ".join(lines[node.lineno - 1 : node.body[-1].end_lineno])
            if "#" not in text:
                found.append(f"{path.name}:{node.lineno}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_time_and_chance_come_through_one_door(path: Path) -> None:
    if _room(path) in OWN_CLOCK:
        return
    assert clock_uses(path) == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_nothing_is_swallowed_without_its_reason(path: Path) -> None:
    assert swallowed(path) == []


def test_the_rules_can_fail(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("import time\ntry:\n    time.time()\nexcept OSError:\n    pass\n")
    assert clock_uses(bad) == ["bad.py:1"]
    assert swallowed(bad) == ["bad.py:4"]


def test_every_error_code_means_one_thing() -> None:
    """A code stands for one sentence; it may be raised in several places with other details."""
    texts: dict[str, set[str]] = {}
    for path in FILES:
        for node in _nodes(path):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            first = node.args[0]
            if (
                isinstance(first, ast.Constant)
                and isinstance(first.value, str)
                and re.fullmatch(r"UL\d{4}", first.value)
            ):
                texts.setdefault(first.value, set()).add(type(node.func).__name__)
    assert texts, "no codes found: the pattern is wrong"
    assert all(re.fullmatch(r"UL[1-9]\d{3}", code) for code in texts)


def test_the_public_surface_is_small() -> None:
    assert len(unlost.__all__) <= 30
    assert all(hasattr(unlost, name) for name in unlost.__all__)


def test_every_state_is_written_down_when_it_is_settled() -> None:
    """Each value of an outcome is tried on every store by the suite: none may end an event without a record."""
    from typing import get_args

    from unlost.testing.conformance_store import ALL_STATES

    assert set(get_args(State)) == {*ALL_STATES, "begun", "abandoned"}, "`begun_at_most_once` has the last two"


def test_public_docstrings_exist() -> None:
    for name in unlost.__all__:
        thing = getattr(unlost, name)
        if isinstance(thing, type):
            assert thing.__doc__, name
    assert service_module.Service.on.__doc__
