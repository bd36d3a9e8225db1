"""mypy and pyright understand events: they accept what is right and find what is wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MISTAKES = {n for n, line in enumerate((HERE / "bad.py").read_text().splitlines(), 1) if "# mistake" in line}


@cache
def run(*command: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"MYPYPATH": str(ROOT / "src"), "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, env=env, cwd=HERE, timeout=120
    )


def mypy_lines() -> dict[str, set[int]]:
    done = run("mypy", "--strict", "--config-file=", "--python-version=3.11", "good.py", "bad.py")
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = re.findall(r"^(\w+)\.py:(\d+): error", done.stdout, re.M)
    return {name: {int(n) for file, n in found if file == name} for name in ("good", "bad")}


def pyright_lines() -> dict[str, set[int]]:
    try:
        done = run("pyright", "--outputjson", "--pythonpath", sys.executable, "good.py", "bad.py")
        report = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError) as error:
        pytest.skip(f"pyright cannot run here (it downloads node): {error!r}"[:300])
    found = [
        (Path(d["file"]).stem, d["range"]["start"]["line"] + 1)
        for d in report["generalDiagnostics"]
        if d["severity"] == "error"
    ]
    return {name: {n for file, n in found if file == name} for name in ("good", "bad")}


def test_mypy() -> None:
    assert len(MISTAKES) == 7
    assert mypy_lines() == {"good": set(), "bad": MISTAKES}


def test_pyright() -> None:
    assert pyright_lines() == {"good": set(), "bad": MISTAKES}
