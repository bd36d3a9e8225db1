"""`unlost tail`: what it shows, and what it must not show."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli_kit import Shell


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    shell = Shell(tmp_path_factory.mktemp("tail"))
    lines = [f'{{"order_id": "A{n % 5}", "total_cents": {n}, "email": "s3cret@x"}}' for n in range(40)]
    shell.ok("publish", "OrderPlaced", "-", "--app", "shop", stdin="\n".join(lines))
    shell.ok("publish", "OrderShipped", "order_id=A1", "--app", "shop")
    shell.place("A\x1b]0;title\x07\u202e", 7)
    return shell


def test_the_last_20_oldest_first(shell: Shell) -> None:
    lines = shell.quick("tail").out.splitlines()
    assert len(lines) == 20
    assert lines == sorted(lines, key=lambda line: line.split()[0])
    assert len(shell.quick("tail", "-n", "3").out.splitlines()) == 3
    assert shell.quick("tail", "-n", "0").out == ""
    assert len(shell.quick("tail", "-n", "1000").out.splitlines()) == 42


def test_from_start_is_the_whole_log_in_order(shell: Shell) -> None:
    found = shell.quick("tail", "--from", "start", "--json").lines
    assert len(found) == 42
    places: dict[tuple[str, int], list[int]] = {}
    for e in found:
        places.setdefault((e["topic"], e["partition"]), []).append(e["position"])
    assert all(positions == list(range(len(positions))) for positions in places.values())
    assert shell.quick("tail", "--from", "start", "-n", "5", "--json").lines == found[:5]
    assert shell.quick("tail", "--from", "2h", "--json").lines == found
    assert shell.quick("tail", "--from", "2999-01-01").out == ""


def test_filters(shell: Shell) -> None:
    assert len(shell.quick("tail", "--key", "A1", "-n", "100").out.splitlines()) == 9
    assert len(shell.quick("tail", "OrderShipped").out.splitlines()) == 1
    assert len(shell.quick("tail", "order.OrderShipped", "--key", "A1", "--from", "start").out.splitlines()) == 1
    nothing = shell.quick("tail", "Nope", "--key", "x")
    assert nothing.out == "" and "no events Nope with key x" in nothing.err


def test_the_schema(shell: Shell) -> None:
    e = shell.quick("tail", "OrderShipped", "--json").lines[0]
    assert list(e) == [
        "schema", "topic", "partition", "position", "recorded", "key", "id", "source", "type", "version", "time",
        "correlationid", "causationid", "traceparent",
    ]  # fmt: skip
    assert e["schema"] == "unlost.event/1" and e["type"] == "order.OrderShipped" and e["key"] == "A1"


def test_control_characters_do_not_reach_the_terminal(shell: Shell) -> None:
    line = shell.quick("tail", "-n", "1", "--raw").out  # the shell itself refuses any escape character
    assert "A\\x1b]0;title\\x07\\u202e" in line
    assert shell.quick("tail", "-n", "1", "--json").lines[0]["key"] == "A\x1b]0;title\x07\u202e"


def test_data_are_shown_only_as_far_as_the_code_allows(shell: Shell) -> None:
    assert "s3cret" not in shell.quick("tail", "--from", "start").out
    hidden = shell("tail", "--from", "start", "--data").out
    assert "s3cret" not in hidden and "(hidden: your code has no class for it; --raw shows it)" in hidden
    redacted = shell.quick("tail", "--from", "start", "--data", "--app", "shop").out
    assert '"email":"***"' in redacted and '"total_cents":39' in redacted and "s3cret" not in redacted
    assert "s3cret" not in shell.quick("tail", "--from", "start", "--data", "--json", UNLOST_APP="shop").out
    assert "s3cret" in shell.quick("tail", "--from", "start", "--raw").out


def test_a_view_shows_only_what_it_knows(shell: Shell) -> None:
    shell.write(
        "views.py",
        """
        from unlost import App, Event
        class Total(Event, view_of="order.OrderPlaced"):
            total_cents: int
        app = App()
        """,
    )
    out = shell.quick("tail", "OrderPlaced", "--data", "--app", "views").out
    assert '"total_cents":39' in out and '"email":"***"' in out and "s3cret" not in out


def test_follow_shows_what_comes_and_ends_with_ctrl_c(shell: Shell, tmp_path: Path) -> None:
    own = Shell(tmp_path)
    own.place("A1")
    with own.start("tail", "--follow") as running:
        running.says("A1")
        own.place("A2")
        running.says("A2")
        own.write(
            "late.py",
            "from unlost import App, Event\nclass LateCome(Event, key='k', past_tense=False):\n    k: str\napp = App()\n",
        )
        own.ok("publish", "LateCome", "k=new-topic", "--app", "late")
        running.says("new-topic")
        assert running.end() == 0
    with own.start("tail", "--follow", "--from", "start", "-n", "2") as running:
        assert running.process.wait(30) == 0  # the limit counts also while following


def test_a_reader_that_leaves_is_no_error(shell: Shell) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "unlost", "tail", "--from", "start", "--raw", "--follow"],
        cwd=shell.folder, env=shell.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        shell.place("A9")
        assert process.wait(30) == 0
        assert process.stderr.read() == b""


def test_ctrl_c_while_it_starts(shell: Shell) -> None:
    for _ in range(3):
        with shell.start("tail", "-f") as running:
            code = running.end(signal.SIGINT)
            assert code in (0, 130, -signal.SIGINT)  # the last: before Python was there


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--from", "yesterday"], "UL1320"), (["--from", "99999999999d"], "UL1320"), (["--from", ""], "UL1320"),
        (["-n", "-1"], "UL1330"), (["-n", "x"], "UL1300"), (["A", "B"], "UL1300"), (["--broker", "x"], "UL1141"),
    ],
)  # fmt: skip
def test_bad_input(shell: Shell, arguments: list[str], code: str) -> None:
    result = shell.quick("tail", *arguments)
    assert result.code == 2 and code in result.err, result
