"""`unlost demo` on a real Kafka: the same shop, the same kills, the same proof."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from unlost.demo.orders import per_day, read_orders
from unlost.sqlite.process import examine

SECONDS_MAX = 300.0


def unlost(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    plain = {k: v for k, v in os.environ.items() if not k.startswith("UNLOST_")}
    return subprocess.run(
        [sys.executable, "-m", "unlost", *arguments],
        cwd=folder, env=plain | env, capture_output=True, text=True, timeout=SECONDS_MAX, check=False,
    )  # fmt: skip


def alive(folder: Path) -> bool:
    run = folder / "unlost-demo" / ".unlost" / "store.db.run"
    return any(examine(run, path.stem).alive for path in run.glob("*.process"))


@pytest.fixture
def url(kafka: Any, fresh_prefix: str) -> str:
    return f"{kafka.url}?prefix={fresh_prefix}."


def test_the_shop_under_kills(tmp_path: Path, url: str) -> None:
    orders = read_orders(800)
    run = unlost(tmp_path, "demo", "--orders", "800", "--kill", "2", "--json", UNLOST_BROKER=url)
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads(run.stdout)
    verdict, free = result["verdict"], [order.id for order in orders if not order.cents]
    assert len(result["kills"]) == 2
    assert all(kill["in_hands"] == kill["delivered_again"] for kill in result["kills"])
    assert verdict["in_file_cents"] == verdict["settled_cents"] == sum(order.cents for order in orders)
    assert verdict["days_agreeing"] == verdict["days"] == len(per_day(orders))
    assert (verdict["dead"], verdict["inversions"], verdict["settled_twice"]) == (free, 0, [])
    assert (result["unaccounted"], result["balanced"]) == (0, True)
    assert result["books"]["order"]["done"] == 800
    assert not alive(tmp_path)
    folder = tmp_path / "unlost-demo"
    own = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["unlost"]["broker"]
    assert own.startswith(url.rpartition("prefix=")[0]) and "unlost-demo-" in own
    audit = unlost(folder, "audit", "--verify", "--json")
    assert audit.returncode == 0 and json.loads(audit.stdout)["unverified"] == [], audit.stderr
    assert len(unlost(folder, "tail", "-n", "5").stdout.splitlines()) == 5


def test_what_its_user_reads(tmp_path: Path, url: str) -> None:
    run = unlost(tmp_path, "demo", "--orders", "50", "--kill", "0", "--broker", url)
    assert run.returncode == 0, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    assert lines[1].startswith(f"broker  {url}unlost-demo-") and "in-sync replicas" in lines[1]
    assert lines[2] == "store   ./unlost-demo/.unlost/store.db"
    assert "Nothing was lost." in run.stdout and "* stay on the cluster" in lines[-1]


def test_a_classic_bug_is_named_by_the_audit(tmp_path: Path, url: str) -> None:
    run = unlost(tmp_path, "demo", "--orders", "800", "--kill", "2", "--break", "ack-first", "--broker", url)
    assert run.returncode == 3, run.stdout + run.stderr
    assert "\nUNACCOUNTED " in run.stdout and "last seen in the hands of " in run.stdout
    assert "Nothing was lost" not in run.stdout and not alive(tmp_path)
