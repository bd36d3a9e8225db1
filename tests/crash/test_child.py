"""How a process of a proof ended is known, even when the fork server cannot say so any more."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from child import Child


def nothing() -> None:
    pass


class Plain(Child):
    prepare = staticmethod(nothing)


def ends(code: int, when: str) -> None:
    while not Path(when).exists():
        time.sleep(0.005)
    sys.exit(code)


@pytest.mark.parametrize("lost", [False, True])
def test_how_it_ended(tmp_path: Path, lost: bool) -> None:
    go, log = tmp_path / "go", tmp_path / "log.txt"
    children = [Plain("child", log, {}, ends, (code, str(go))) for code in (0, 3)]
    killed = Plain("killed", log, {}, ends, (0, str(tmp_path / "never")))
    for child in (*children, killed) if lost else ():
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, child._process.sentinel)
        os.close(null)
    assert [child.code for child in (*children, killed)] == [None, None, None]
    go.touch()
    assert [child.wait(20) for child in children] == [0, 3]
    killed.kill()
    assert killed.code == -signal.SIGKILL
