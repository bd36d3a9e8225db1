"""`unlost demo` as its user runs it: processes, `kill -9`, planted bugs, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unlost.demo.orders import per_day, read_orders
from unlost.sqlite.process import examine
from unlost.testing import sabotage

SECONDS_MAX = 120.0
# Ctrl-C must work also where the tests themselves were started with it switched off (as shells do in the background).
PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from unlost.demo.run import main
orders, kills, seed, bug, as_json = sys.argv[1:]
sys.exit(main(orders, int(kills), int(seed), bug or None, None, bool(as_json)))
"""


def command(orders: int, kills: int, *, seed: int = 42, bug: str = "", as_json: bool = False) -> list[str]:
    return [sys.executable, "-c", PROGRAM, str(orders), str(kills), str(seed), bug, "json" if as_json else ""]


def demo(folder: Path, *arguments: int, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments, **options), cwd=folder, capture_output=True, text=True, timeout=SECONDS_MAX
    )


def found(run: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert run.stdout, run.stderr
    result: dict[str, Any] = json.loads(run.stdout)
    return result


def alive(folder: Path) -> bool:
    """Whether any process has the demo's file open."""
    run = folder / "unlost-demo" / ".unlost" / "events.db.run"
    return any(examine(run, path.stem).alive for path in run.glob("*.process"))


def wait_for(condition: Callable[[], object], what: str, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(0.01)


def test_the_books_balance_after_kills_and_agree_with_the_file(tmp_path: Path) -> None:
    orders = read_orders(2000)
    run = demo(tmp_path, len(orders), 4, as_json=True)
    result = found(run)
    assert run.returncode == result["exit_code"] == 0, run.stdout
    assert result["schema"] == "unlost.demo/1"
    assert len(result["kills"]) == 4
    assert all(kill["in_hands"] == kill["delivered_again"] for kill in result["kills"])
    verdict, free = result["verdict"], [order.id for order in orders if not order.cents]
    assert verdict["in_file_cents"] == verdict["settled_cents"] == sum(order.cents for order in orders)
    assert verdict["days_agreeing"] == verdict["days"] == len(per_day(orders))
    assert verdict["dead"] == free != []
    assert (verdict["inversions"], verdict["settled_twice"], result["unaccounted"]) == (0, [], 0)
    assert result["books"]["payment"]["dead"] == len(free)
    assert result["books"]["settlement"]["done"] == len(orders) - len(free)
    assert not alive(tmp_path)


def test_what_its_user_reads(tmp_path: Path) -> None:
    run = demo(tmp_path, 300, 1)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stderr == "", "no moving line where there is no terminal"
    for words in (
        "300 real orders · 4 services, each its own process · 1 × kill -9 · seed 42",
        "./unlost-demo/.unlost/events.db",
        "kill -9",
        "delivered again",
        "THE BOOKS",
        "THE MONEY   in the file $",
        "none was counted twice. Order per customer: 0 inversions.",
        "Nothing was lost. Do not take our word for it:",
    ):
        assert words in run.stdout
    assert "\x1b" not in run.stdout
    assert (tmp_path / "unlost-demo" / "pyproject.toml").exists()
    again = demo(tmp_path, 50, 0)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "the events of the earlier demo there are gone" in again.stdout


@pytest.mark.parametrize("bug", ["ack-first", "commit-highest-seen", "shelf-not-durable"])
def test_a_classic_bug_is_named_by_the_audit(bug: str, tmp_path: Path) -> None:
    assert bug in sabotage.BUGS
    run = demo(tmp_path, 2000, 5, bug=bug)
    assert run.returncode == 3, run.stdout + run.stderr
    assert "UNACCOUNTED 0" not in run.stdout
    assert "\nUNACCOUNTED " in run.stdout
    assert "last seen in the hands of " in run.stdout
    assert "Nothing was lost" not in run.stdout
    assert not alive(tmp_path)


@pytest.mark.parametrize("moment", ["starting", "working"])
def test_ctrl_c_ends_everything(moment: str, tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(5000, 0), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    letters = tmp_path / "unlost-demo" / "letters.txt"
    notes = tmp_path / "unlost-demo" / "notes"
    wait_for(notes.exists if moment == "starting" else letters.exists, "the demo begins")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=SECONDS_MAX)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert not alive(tmp_path)


def test_no_service_outlives_a_demo_that_was_killed(tmp_path: Path) -> None:
    process = subprocess.Popen(command(5000, 0), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for((tmp_path / "unlost-demo" / "letters.txt").exists, "the shop is at work")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_for(lambda: not alive(tmp_path), "its services leave")
