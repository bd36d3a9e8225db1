"""What every command has in common: help with an example, exit codes, and no traceback, whatever is typed."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from cli_kit import Shell

from unlost import __version__
from unlost.cli import main as cli
from unlost.cli.say import clean, clean_lines, key_text

COMMANDS = [path for path, *_ in cli._COMMANDS]


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_page_with_an_example(shell: Shell, command: str) -> None:
    page = shell.quick(*command.split(), "--help").out
    assert f"Usage: unlost {command}" in page
    assert "Example" in page and f"unlost {command.split()[0]}" in page.split("Example", 1)[1]
    assert "Needs" in page, "it says whether it needs your code or only the broker"
    assert all(len(line) <= 80 for line in page.splitlines())
    assert "--json" in page
    assert shell.quick(*command.split(), "-h").out == page


def test_the_first_page_lists_them(shell: Shell) -> None:
    page = shell.ok().out
    assert shell.quick("--help").out == page
    for command in {c.split()[0] for c in COMMANDS}:
        assert f"│ {command} " in page
    assert "unlost demo" in page
    assert shell.ok("--version").out.strip() == __version__
    for noun in ("dead", "topic"):
        assert "Commands" in shell.quick(noun).out


@pytest.mark.parametrize("arguments", [["nope"], ["dead", "nope"], ["topic", "list", "x"], ["--nope"], ["runn"], [""]])
def test_unknown_words(shell: Shell, arguments: list[str]) -> None:
    result = shell.quick(*arguments)
    assert result.code == 2 and "UL1300" in result.err, result


def test_an_unforeseen_failure_is_short(
    shell: Shell, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(tokens: object) -> None:
        raise RuntimeError("bad \x1b[31m")

    monkeypatch.setattr(cli, "commands", fails)
    monkeypatch.delenv("UNLOST_DEBUG", raising=False)
    assert cli.main(["status"]) == 1
    err = capsys.readouterr().err
    assert "UL9000" in err and "UNLOST_DEBUG=1" in err and "Traceback" not in err and "\x1b" not in err
    monkeypatch.setenv("UNLOST_DEBUG", "1")
    assert cli.main(["status", "--json"]) == 1
    found = capsys.readouterr()
    assert "Traceback" in found.err and "\x1b" not in found.err
    assert json.loads(found.out)["code"] == "UL9000"


@pytest.mark.parametrize("arguments", [["--orders", "0"], ["--orders", "x"], ["--kill", "-1"], ["--seed", "x"]])
def test_bad_numbers_for_the_demo(shell: Shell, arguments: list[str]) -> None:
    before = sorted(shell.folder.iterdir())
    result = shell.quick("demo", *arguments)
    assert result.code == 2 and ("UL1337" in result.err or "UL1300" in result.err), result
    assert sorted(shell.folder.iterdir()) == before


def test_closed_streams(shell: Shell) -> None:
    shell.place("A1")
    for redirect in (">&-", "2>&-", "<&-", ">&- 2>&- <&-"):
        done = subprocess.run(
            ["sh", "-c", f"{sys.executable} -m unlost status {redirect}"], cwd=shell.folder, env=shell.env,
            capture_output=True, check=False, timeout=30,
        )  # fmt: skip
        assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert shell.ok("audit", "--verify").code == 0


def test_a_full_disk_behind_stdout_is_an_error(shell: Shell) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    shell.place("A1")
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run(
            [sys.executable, "-m", "unlost", "tail"], cwd=shell.folder, env=shell.env, stdout=full,
            stderr=subprocess.PIPE, check=False, timeout=30,
        )  # fmt: skip
    assert done.returncode == 1 and b"Traceback" not in done.stderr, done


def test_escapes() -> None:
    assert (
        clean("a\x1b[31m\x07\x9b\r\n\tb\u202e\u2066\ud800é日")
        == "a\\x1b[31m\\x07\\x9b\\r\\n\\tb\\u202e\\u2066\\ud800é日"
    )
    assert clean_lines("a\nb\x1b") == "a\nb\\x1b"
    assert clean("abcdef", 4) == "abc…"
    assert key_text(b"\xff\x1b") == "\\xff\\x1b" and key_text(None) == "-"


WORDS = [
    *(word for c in COMMANDS if c not in ("demo", "run") for word in c.split()), "--json", "--app", "--broker", "--key",
    "--service", "--all", "--yes", "--dry-run", "--limit", "--from", "--data", "--raw", "-n", "-s", "-", "--", "shop",
    "OrderPlaced", "order_id=A1", "total_cents=1", "=", "1", "-1", "", " ", "\x1b[31m", "é", "\udcff", "a=b", "[]", "*",
    "--no-json", "--json=x", "-nn", "--limit=", "x" * 5000, "%s", "{}", "../..", "/", ":", "embedded:x.db",
]  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_nothing_that_is_typed_gives_a_traceback(
    seed: int, shell: Shell, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In this process, because it is hundreds of commands: exit codes are known ones, and nothing is UL9000."""
    monkeypatch.chdir(shell.folder)
    for name in [name for name in os.environ if name.startswith("UNLOST_")]:
        monkeypatch.delenv(name)
    shell.place("A1")
    stdin = os.open(os.devnull, os.O_RDONLY)
    saved = os.dup(0)
    os.dup2(stdin, 0)
    chance = random.Random(seed)
    try:
        for _ in range(100):
            first = chance.choice(COMMANDS[2:]).split()
            tokens = first + [chance.choice(WORDS) for _ in range(chance.randrange(5))]
            code = cli.main(tokens)
            found = capfd.readouterr()
            assert code in (0, 1, 2), (tokens, found)
            assert "UL9000" not in found.err and "Traceback" not in found.err, (tokens, found)
            assert "\x1b" not in found.out + found.err, (tokens, found)
    finally:
        os.dup2(saved, 0)
        os.close(saved)
        os.close(stdin)
        sys.modules.pop("shop", None)
