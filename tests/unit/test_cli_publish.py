"""`unlost publish`: one event, and lines from stdin."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli_kit import Shell


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    shell = Shell(tmp_path)
    shell.env["UNLOST_APP"] = "shop"
    return shell


def stored(shell: Shell) -> list[dict[str, object]]:
    return shell.ok("tail", "--from", "start", "--raw", "--json").lines


def test_a_receipt_says_where_the_event_stands(shell: Shell) -> None:
    result = shell.ok("publish", "OrderPlaced", "order_id=A1", "total_cents=10", 'tags=["a", "b"]', "id=one")
    assert result.out == "one  order/3:0\n"
    assert f"made {shell.database}" in result.err
    again = shell.ok("publish", "order.OrderPlaced", "order_id=A1", "total_cents=10", "--json")
    assert "made" not in again.err
    receipt = again.json
    assert list(receipt) == ["schema", "id", "topic", "partition", "position", "recorded"]
    assert (receipt["schema"], receipt["topic"], receipt["position"]) == ("unlost.receipt/1", "order", 1)
    first = stored(shell)[0]
    assert json.loads(str(first["data"])) == {"order_id": "A1", "total_cents": 10, "email": "", "tags": ["a", "b"]}
    assert first["id"] == "one"


def test_time_and_headers(shell: Shell) -> None:
    shell.ok(
        "publish", "OrderPlaced", "order_id=A1", "total_cents=1", "--occurred-at", "2020-02-03T04:05:06+01:00",
        "--header", "campaign=x=y", "--id", "one",
    )  # fmt: skip
    assert stored(shell)[0]["time"] == "2020-02-03T03:05:06.000000Z"


BAD = [
    (["OrderPlcd"], "UL1322", "did you mean OrderPlaced"),
    (["OrderPlaced"], "UL1325", "order_id=... total_cents=..."),
    (["OrderPlaced", "order_id=1", "total_cents=ten"], "UL1326", "Expected `int`"),
    (["OrderPlaced", "order_id=1", "total_cents=1", "total_cent=1"], "UL1324", "did you mean total_cents?"),
    (["OrderPlaced", "order_id"], "UL1323", "field=value"),
    (["OrderPlaced", "order_id=1", "order_id=2"], "UL1323", "twice"),
    (["OrderPlaced", "order_id=", "total_cents=1"], "UL1006", "empty"),
    (["OrderPlaced", "order_id=1", "total_cents=1", "id="], "UL1009", "id"),
    (["OrderPlaced", "order_id=1", "total_cents=1", "id=a", "--id", "b"], "UL1323", "twice"),
    (["OrderPlaced", "order_id=1", "total_cents=1", "--header", "x"], "UL1323", "name=value"),
    (["OrderPlaced", "order_id=1", "total_cents=1", "--occurred-at", "then"], "UL1320", "'then'"),
    (["OrderPlaced", "order_id=1", "total_cents=1", "tags=x"], "UL1326", "tags"),
    (["OrderPlaced", "-", "--id", "x"], "UL1329", "lines"),
    (["-", "order_id=1"], "UL1329", "lines"),
    ([], "UL1300", "unlost publish --help"),
]


@pytest.mark.parametrize(("arguments", "code", "text"), BAD, ids=[" ".join(b[0]) or "nothing" for b in BAD])
def test_bad_input_is_refused_and_nothing_is_made(shell: Shell, arguments: list[str], code: str, text: str) -> None:
    result = shell("publish", *arguments)
    assert result.code == 2 and code in result.err and text in result.err, result
    assert not shell.database.exists()


def test_an_error_as_json(shell: Shell) -> None:
    found = shell("publish", "OrderPlcd", "--json").json
    assert list(found) == ["schema", "code", "what", "found", "fix"]
    assert (found["schema"], found["code"]) == ("unlost.error/1", "UL1322")


def test_a_sensitive_value_is_not_repeated(shell: Shell) -> None:
    shell.write(
        "secret.py",
        """
        from unlost import App, Event, Sensitive
        class CardAdded(Event, key="id"):
            id: str
            card: Sensitive[int]
        app = App()
        """,
    )
    for result in (
        shell("publish", "CardAdded", "id=1", "card=s3cret", "--app", "secret"),
        shell("publish", "CardAdded", "-", "--app", "secret", stdin='{"id": "1", "card": "s3cret"}\n'),
    ):
        assert result.code and "UL1326" in result.err and "s3cret" not in result.err, result


def test_lines_are_acknowledged_one_by_one_and_bad_ones_refused(shell: Shell) -> None:
    lines = [
        '{"order_id": "A1", "total_cents": 1}', "garbage", "", '{"order_id": "A2", "total_cents": "x"}', "[]", "\xff",
        '{"order_id": "A3", "total_cents": 1, "totl": 1}', '{"order_id": "A4", "total_cents": 1}', "[" * 5000,
    ]  # fmt: skip
    result = shell("publish", "OrderPlaced", "-", "--json", stdin="\n".join(lines))
    assert result.code == 1
    by_line = {line["line"]: line for line in result.lines}
    assert {n: line["schema"] for n, line in by_line.items()} == {
        1: "unlost.receipt/1", 2: "unlost.refused/1", 4: "unlost.refused/1", 5: "unlost.refused/1",
        6: "unlost.refused/1", 7: "unlost.refused/1", 8: "unlost.receipt/1", 9: "unlost.refused/1",
    }  # fmt: skip
    assert "line 7: UL1324" in result.err and "2 events published, 6 lines refused" in result.err
    assert [e["key"] for e in stored(shell)] == ["A1", "A4"]


def test_full_lines_bring_type_id_time_and_headers(shell: Shell) -> None:
    good = {
        "type": "order.OrderPlaced", "data": {"order_id": "A1", "total_cents": 1}, "id": "one",
        "time": "2020-01-01T00:00:00Z", "headers": {"a": "b"},
    }  # fmt: skip
    bad = [
        {"type": "Nope", "data": {}}, {"data": {}}, {"type": "OrderPlaced"}, good | {"id": 1}, good | {"time": "x"},
        good | {"headers": {"unlost": "x"}}, good | {"key": "x"}, good | {"time": "2020-01-01T00:00:00"},
        good | {"data": None}, good | {"type": "order.OrderPlaced\x1b[31m"},
    ]  # fmt: skip
    result = shell("publish", "-", stdin="\n".join(json.dumps(line) for line in [good, *bad]))
    assert result.code == 1 and result.out == "one  order/3:0\n", result
    assert f"1 event published, {len(bad)} lines refused" in result.err
    assert (
        stored(shell)[0]["time"] == "2020-01-01T00:00:00Z" or stored(shell)[0]["time"] == "2020-01-01T00:00:00.000000Z"
    )


def test_many_lines_in_order(shell: Shell) -> None:
    lines = [json.dumps({"order_id": f"k{n % 3}", "total_cents": n}) for n in range(3000)]
    result = shell.ok("publish", "OrderPlaced", "-", stdin="\n".join(lines) + "\n")
    assert len(result.out.splitlines()) == 3000
    totals: dict[object, list[int]] = {}
    for e in stored(shell):
        totals.setdefault(e["key"], []).append(json.loads(str(e["data"]))["total_cents"])
    assert {key: sorted(found) == found for key, found in totals.items()} == {"k0": True, "k1": True, "k2": True}


def test_a_slow_source_gets_its_receipt_at_once(shell: Shell) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "unlost", "publish", "OrderPlaced", "-"],
        cwd=shell.folder, env=shell.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    with process:
        for n in range(3):
            process.stdin.write(f'{{"order_id": "A1", "total_cents": {n}}}\n')
            process.stdin.flush()
            assert process.stdout.readline().endswith(f"order/3:{n}\n")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "3 events published" in err and "Traceback" not in err


def test_without_an_app(shell: Shell) -> None:
    del shell.env["UNLOST_APP"]
    assert "UL1310" in shell("publish", "OrderPlaced").err


def test_two_classes_of_one_name(shell: Shell) -> None:
    shell.write(
        "two.py",
        """
        from unlost import App, Event
        class a:
            class Placed(Event, key="id"): id: str
        class b:
            class Placed(Event, key="id", topic="b"): id: str
        app = App()
        """,
    )
    result = shell("publish", "Placed", "id=1", "--app", "two")
    assert result.code == 2 and "UL1321" in result.err and "b.Placed, id.Placed" in result.err, result
    shell.ok("publish", "b.Placed", "id=1", "--app", "two")


def test_a_reader_who_leaves_does_not_stop_the_publishing(shell: Shell) -> None:
    lines = "".join(f'{{"order_id": "A{n}", "total_cents": 1}}\n' for n in range(2000))
    command = f"{sys.executable} -m unlost publish OrderPlaced - --app shop | head -1"
    done = subprocess.run(
        ["sh", "-c", command], cwd=shell.folder, input=lines, capture_output=True, text=True, timeout=60
    )
    assert "2,000 events published" in done.stderr, done
    assert len(done.stdout.splitlines()) == 1
