"""`unlost dead`: list, show, redrive, discard."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import apsw
import pytest
from cli_kit import Shell


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    shell = Shell(tmp_path_factory.mktemp("dead"))
    for key, total in (("A1", 0), ("A1", 1), ("A1", 2), ("A\x1b[31m2", 0)):
        shell.place(key, total, *(["id=first"] if (key, total) == ("A1", 0) else []))
    shell.handle_all()
    return shell


@pytest.fixture
def shell(prepared: Shell, tmp_path: Path) -> Shell:
    """A1: dead, with two behind it. A2: dead."""
    shutil.copytree(prepared.folder, tmp_path, dirs_exist_ok=True)
    return Shell(tmp_path)


def counts(shell: Shell) -> tuple[int, int, int, int, int]:
    book = shell.quick("audit", "--json").json["services"][0]
    return book["done"], book["dead"], book["parked"], book["retrying"], book["removed"]


def operations(shell: Shell) -> list[tuple[str, ...]]:
    connection = apsw.Connection(str(shell.database))
    rows = connection.execute("select operator, action, reason, id from unlost_operation order by number").fetchall()
    connection.close()
    return rows


def test_list_and_show(shell: Shell) -> None:
    assert counts(shell) == (0, 2, 2, 0, 0)
    out = shell.quick("dead", "list").out
    assert "A\\x1b[31m2" in out and "2 dead, 2 more events behind them" in out and "cannot be \\x1b[31mpaid" in out
    out = shell.quick("dead", "show", "first").out
    for text in ("order.OrderPlaced", "handler charge", "rejected", "attempt 1", "2 events of its key", "order/3:0"):
        assert text in out, out
    letter = shell.quick("dead", "show", "1", "--json").json["letters"][0]
    assert letter["id"] == "first" and letter["history"][0]["number"] == 1
    assert list(letter) == [
        "number", "service", "handler", "topic", "partition", "position", "id", "source", "type", "key", "trace",
        "reason", "error_type", "error", "attempts", "parks", "parked_behind", "died", "recorded", "request", "stack",
        "history",
    ]  # fmt: skip
    assert "(hidden" in shell("dead", "show", "1", "--data").out  # a process of its own: here classes may be imported
    assert '"email":"***"' in shell.quick("dead", "show", "1", "--data", "--app", "shop").out
    assert '"email":""' in shell.quick("dead", "show", "1", "--raw").out
    assert len(shell.quick("dead", "list", "--key", "A1", "--service", "billing", "--json").json["letters"]) == 1
    assert "the shelf is empty (for reason exhausted)" in shell.quick("dead", "list", "--reason-is", "exhausted").out


def test_a_dry_run_changes_nothing(shell: Shell) -> None:
    assert "2 would be redriven; nothing was changed" in shell.ok("dead", "redrive", "--all", "--dry-run").out
    assert shell.ok("dead", "discard", "--all", "--dry-run", "--json").json["dry_run"] is True
    assert counts(shell) == (0, 2, 2, 0, 0) and operations(shell) == []


def test_discard_lets_the_key_go_on(shell: Shell) -> None:
    result = shell.ok("dead", "discard", "first", "--yes", "--reason", "a test", "--operator", "ann", "--json").json
    assert list(result) == ["schema", "dry_run", "chosen", "carried_out", "pending", "letters"]
    assert (result["schema"], result["carried_out"]) == ("unlost.discard/1", 1)
    assert operations(shell) == [("ann", "discard", "a test", "first")]
    shell.handle_all()
    assert counts(shell) == (2, 1, 0, 0, 1)


def test_redrive_while_a_process_runs(shell: Shell) -> None:
    shell.write("shop.py", (shell.folder / "shop.py").read_text().replace("if not order.total_cents:", "if False:"))
    with shell.start("run", "shop") as running:
        running.says("unlost: billing on")
        assert shell.ok("dead", "redrive", "--key", "A1", "--yes").out == "1 redriven\n"
        running.says("charged A1\ncharged A1\ncharged A1\n")
        assert running.end() == 0
    shell.ok("dead", "redrive", "--reason-is", "rejected", "--yes", USER="bob", LOGNAME="bob")
    assert operations(shell)[1][0] == "bob"
    shell.handle_all()
    assert counts(shell) == (4, 0, 0, 0, 0)
    assert "the shelf is empty" in shell.ok("dead", "list").out


@pytest.mark.slow
def test_what_the_owner_has_not_done_yet_is_incomplete(shell: Shell) -> None:
    with shell.start("run", "shop") as running:
        shell.until(lambda service: service["owned"] == 8)
        running.process.send_signal(signal.SIGSTOP)
        result = shell("dead", "discard", "first", "--yes")
        assert result.code == 5 and "0 discarded" in result.out and "1 requested" in result.err, result
        assert "(discard requested)" in shell.quick("dead", "list").out
        running.process.send_signal(signal.SIGCONT)
        running.says("charged A1\ncharged A1\n")
        assert running.end() == 0
    assert counts(shell) == (2, 1, 0, 0, 1)


def on_a_terminal(shell: Shell, answer: str) -> tuple[int, str]:
    ours, theirs = pty.openpty()
    try:
        with subprocess.Popen(
            [sys.executable, "-m", "unlost", "dead", "redrive", "1"],
            cwd=shell.folder, env=shell.env, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ) as process:  # fmt: skip
            os.write(ours, answer.encode())
            out, err = process.communicate(timeout=30)
            return process.returncode, (out + err).decode()
    finally:
        os.close(ours)
        os.close(theirs)


def test_it_asks_on_a_terminal(shell: Shell) -> None:
    code, text = on_a_terminal(shell, "n\n")
    assert code == 1 and "redrive 1? [y/N]" in text and "UL1334: nothing was changed" in text
    assert counts(shell)[1] == 2
    code, text = on_a_terminal(shell, "y\n")
    assert code == 0 and "1 redriven" in text
    assert counts(shell)[1] == 1


def test_bad_input(shell: Shell) -> None:
    for action in ("redrive", "discard"):
        for arguments, code, exit_code in (
            ([], "UL1332", 2), (["--all", "1"], "UL1332", 2), (["99", "--yes"], "UL1336", 1),
            (["--key", "", "--yes"], "UL1336", 1), (["1"], "UL1333", 2), (["--reason-is", "x", "--yes"], "UL1335", 2),
            (["1", "2"], "UL1300", 2), (["9" * 50, "--yes"], "UL1336", 1), (["-1", "--yes"], "UL1336", 1),
        ):  # fmt: skip
            result = shell.quick("dead", action, *arguments)
            assert (result.code, code in result.err) == (exit_code, True), (arguments, result)
    assert shell("dead", "show").code == 2
    assert shell("dead", "show", "nope").code == 1
    assert counts(shell) == (0, 2, 2, 0, 0) and operations(shell) == []
