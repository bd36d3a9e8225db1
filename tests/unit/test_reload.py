"""`unlost run --reload` in real processes: each change starts the code again, a mistake in it ends nothing, no event is lost."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
from cli_kit import SECONDS_MAX, Running, Shell

from unlost import UsageError
from unlost.ops import reload
from unlost.ops.reload import look

SHOP = """
import asyncio, os
from unlost import App, Event, Service

class OrderPlaced(Event, key="order_id"):
    order_id: str

billing = Service("billing")

@billing.on(OrderPlaced)
async def charge(order: OrderPlaced) -> None:
    await asyncio.sleep(0.02)
    print("charged", order.order_id, flush=True)

print("release {release} is %d." % os.getpid(), flush=True)
app = App(billing)
"""


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    shell = Shell(tmp_path)
    release(shell, 1)
    return shell


def release(shell: Shell, number: int) -> None:
    shell.write("shop.py", SHOP.replace("{release}", str(number)))


def pid_of(running: Running, number: int) -> int:
    end = time.monotonic() + SECONDS_MAX
    while (found := re.search(rf"release {number} is (\d+)\.", running.text())) is None:
        assert time.monotonic() < end, running.text()
        time.sleep(0.01)
    return int(found[1])


def starts(running: Running, count: int) -> None:
    """From here on the newest child ends by a signal as it should."""
    end = time.monotonic() + SECONDS_MAX
    while running.text().count("unlost: billing on") < count:
        assert time.monotonic() < end, running.text()
        time.sleep(0.01)


def gone(pid: int) -> None:
    end = time.monotonic() + SECONDS_MAX
    while Path(f"/proc/{pid}").exists() and "zombie" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < end, f"{pid} lives"
        time.sleep(0.01)


def place(shell: Shell, *ids: str) -> None:
    lines = "".join(f'{{"order_id": "{id}"}}\n' for id in ids)
    shell.ok("publish", "OrderPlaced", "-", "--app", "shop", stdin=lines)


def test_each_change_starts_it_again_and_nothing_is_lost(shell: Shell) -> None:
    ids = [f"A{n}" for n in range(150)]
    with shell.start("run", "shop", "--reload") as running:
        before = pid_of(running, 1)
        running.says("unlost: billing on")
        for number in (2, 3, 4):
            place(shell, *ids[(number - 2) * 50 : (number - 1) * 50])
            running.says(f"charged {ids[(number - 2) * 50]}\n")
            release(shell, number)  # while it is at work
            now = pid_of(running, number)
            gone(before)
            before = now
            starts(running, number)
        shell.until(lambda s: not s["waiting"] + s["in_flight"])
        assert running.end(signal.SIGINT) == 0
        gone(before)
    charged = [line.split()[1] for line in running.text().splitlines() if line.startswith("charged ")]
    assert sorted(charged) == sorted(ids), "a clean stop delivers nothing twice"
    audit = shell.quick("audit", "--json")
    assert audit.code == 0 and audit.json["services"][0]["done"] == 150


def test_a_mistake_is_said_and_the_next_change_mends_it(shell: Shell) -> None:
    with shell.start("run", "shop", "--reload") as running:
        pid = pid_of(running, 1)
        running.says("unlost: billing on")
        shell.write("shop.py", "def charge(:\n")
        gone(pid)
        running.says("it starts again when a Python file changes")
        assert "shop.py" in running.text() and "line 1" in running.text() and running.process.poll() is None
        release(shell, 2)
        pid_of(running, 2)
        place(shell, "A1")
        running.says("charged A1")
        assert running.end(signal.SIGTERM) == 0


def test_ctrl_c_ends_it_while_it_waits_for_a_change(shell: Shell) -> None:
    shell.write("shop.py", "1 +\n")
    with shell.start("run", "shop", "--reload") as running:
        running.says("it has ended with code 2")
        assert running.end(signal.SIGINT) == 0


def test_it_takes_the_child_along_when_it_is_killed(shell: Shell) -> None:
    with shell.start("run", "shop", "--reload") as running:
        pid = pid_of(running, 1)
        running.says("unlost: billing on")
        running.process.kill()
        gone(pid)


def test_options_reach_the_child(shell: Shell) -> None:
    with shell.start("run", "shop", "--reload", "--json", "--log", "warning", "--service", "billing") as running:
        running.says('"services":["billing"]')
        running.says("unlost: billing on")
        assert running.end() == 0
    with shell.start("run", "shop", "--reload", "--service", "biling") as running:
        running.says("it has ended with code 2")
        assert "UL1237" in running.text()
        assert running.end() == 0


def test_which_files_are_looked_at(tmp_path: Path) -> None:
    for name in ("a.py", "pkg/b.py", ".venv/c.py", "pkg/__pycache__/d.py", "node_modules/e.py", "f.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    seen = look([tmp_path])
    assert {path.name for path in seen} == {"a.py", "b.py"}
    os.utime(tmp_path / "a.py", ns=(1, 1))
    assert look([tmp_path]) != seen


def test_too_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reload, "FILES_MAX", 1)
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text("")
    with pytest.raises(UsageError) as caught:
        look([tmp_path])
    assert caught.value.code == "UL1420"
