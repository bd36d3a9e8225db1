"""`unlost service list` and `show`, and `unlost status --watch`: what they say is so, from the store and broker alone."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_kit import SECONDS_MAX, Running, Shell

from servers.fixtures import require_postgres
from servers.postgres import Postgres

SHOP = """
import asyncio
from unlost import App, Command, Event, Reject, Retry, RetryLater, Service, Topic

class OrderPlaced(Event, key="order_id"):
    order_id: str
    total_cents: int

class SendReceipt(Command, queue="receipts"):
    order_id: str

billing = Service("billing", retry=Retry(attempts=1))
mailing = Service("mailing", on_dead="skip")

@billing.on(OrderPlaced)
async def charge(order: OrderPlaced) -> None:
    if order.order_id == "dead":
        raise Reject("no")
    if order.order_id == "later":
        raise RetryLater(after=3600)
    if order.order_id == "slow":
        print("in hand", flush=True)
        await asyncio.sleep(600)

@mailing.on(SendReceipt)
async def send(receipt: SendReceipt) -> None: ...

app = App(billing, mailing, topics=[Topic("order", partitions=3), Topic("receipts", partitions=1)])
"""
UNIT = [
    "topic", "partition", "owner", "position", "end", "waiting", "in_flight", "retrying", "parked", "dead",
]  # fmt: skip
COUNTS = ("waiting", "in_flight", "retrying", "parked", "dead")


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return shop(tmp_path)


def shop(folder: Path) -> Shell:
    shell = Shell(folder)
    shell.write("shop.py", SHOP)
    return shell


def place(shell: Shell, *ids: str) -> None:
    lines = "".join(json.dumps({"order_id": id, "total_cents": 1}) + "\n" for id in ids)
    shell.ok("publish", "OrderPlaced", "-", "--app", "shop", stdin=lines)


def show(shell: Shell, name: str = "billing") -> Any:
    result = shell.quick("service", "show", name, "--json")
    assert result.code == 0, result
    return result.json


def at_work(shell: Shell, *arguments: str) -> Running:
    running = shell.start("run", "shop", *arguments)
    running.says("unlost: ")
    return running


def check_numbers(shell: Shell) -> Any:
    """A service that stands in two fates: dead with one behind it, retrying, in hand; the numbers add up."""
    place(shell, "A1", "A2", "dead", "dead", "later", "slow", "slow")
    with at_work(shell) as running:
        running.says("in hand")
        shell.until(
            lambda s: s["name"] != "billing" or (s["dead"], s["parked"], s["retrying"], s["in_flight"]) == (1, 1, 1, 2)
        )
        found = show(shell)
        assert {name: found[name] for name in COUNTS} == {
            "waiting": 0, "in_flight": 2, "retrying": 1, "parked": 1, "dead": 1,
        }  # fmt: skip
        for name in COUNTS:
            assert sum(unit[name] for unit in found["units"]) == found[name], name
        assert [(unit["topic"], unit["partition"]) for unit in found["units"]] == [("order", n) for n in range(3)]
        for unit in found["units"]:
            owner = unit["owner"]
            assert (owner["pid"], owner["alive"], owner["hung"]) == (running.process.pid, True, False)
            assert owner["host"] == os.uname().nodename and found["created"] <= owner["since"] <= found["last_sign"]
            assert unit["position"] + unit["waiting"] + unit["in_flight"] <= unit["end"]
        running.process.kill()
    return found


def test_the_numbers_of_a_service_and_of_its_partitions(shell: Shell) -> None:
    found = check_numbers(shell)
    assert list(found) == [
        "schema", "broker", "store", "unreachable", "elsewhere", "name", "created", "last_sign", "running", "processes",
        "on_dead", "topics", "queues", "hold", "partitions", "owned", "waiting", "in_flight", "retrying", "parked", "dead",
        "oldest", "next_retry", "todo", "units",
    ]  # fmt: skip
    assert found["schema"] == "unlost.service/1" and list(found["units"][0]) == UNIT
    assert found["next_retry"] is not None and found["oldest"] is not None


def test_what_a_service_has_registered(shell: Shell) -> None:
    place(shell, "A1")
    mailing = show(shell, "mailing")
    assert (mailing["on_dead"], mailing["topics"], mailing["queues"]) == ("skip", ["receipts"], ["receipts"])
    billing = show(shell)
    assert (billing["on_dead"], billing["topics"], billing["queues"]) == ("park", ["order"], [])
    text = shell.quick("service", "show", "mailing").out
    assert "reads       queue receipts" in text and "on dead     skip" in text


def test_nobody_runs_it_and_since_when(shell: Shell) -> None:
    place(shell, "A1")
    never = show(shell)
    assert (never["running"], never["last_sign"], never["waiting"]) == (0, None, 1)
    assert all(unit["owner"] is None for unit in never["units"])
    assert "billing: nobody runs it; it has taken no partition yet" in shell.quick("service", "list").out
    shell.handle_all()
    left = show(shell)
    assert left["running"] == 0 and left["last_sign"] is not None and left["waiting"] == 0
    assert all(unit["owner"] is None for unit in left["units"])  # it left in peace
    text = shell.quick("service", "show", "billing").out
    assert f"run by      nobody; the last sign of it is from {left['last_sign'][:19]}Z" in text


def test_a_process_that_was_killed_is_gone(shell: Shell) -> None:
    place(shell, "slow")
    with at_work(shell) as running:
        running.says("in hand")
        running.process.kill()
        running.process.wait()
        found = show(shell)
        owners = {(u["owner"]["pid"], u["owner"]["alive"]) for u in found["units"]}
        assert owners == {(running.process.pid, False)} and found["running"] == 0
        assert (found["waiting"], found["in_flight"]) == (1, 0)  # it is delivered again
        assert f"pid {running.process.pid} (gone)" in shell.quick("service", "show", "billing").out


def test_two_processes_share_it(shell: Shell) -> None:
    place(shell, "A1")
    with at_work(shell) as one, at_work(shell) as other:
        pids = {one.process.pid, other.process.pid}
        shell.until(lambda s: sorted(p["partitions"] for p in s["processes"]) in ([1, 2], [0, 1]))
        assert {unit["owner"]["pid"] for unit in show(shell)["units"]} == pids
        mailing = show(shell, "mailing")
        assert {p["pid"] for p in mailing["processes"]} == pids and mailing["running"] == 2  # one of them waits
        assert one.end(signal.SIGTERM) == 0 and other.end(signal.SIGTERM) == 0


def test_the_list(shell: Shell) -> None:
    place(shell, "A1")
    found = shell.quick("service", "list", "--json")
    assert found.code == 0 and found.json["schema"] == "unlost.services/1"
    assert [s["name"] for s in found.json["services"]] == ["billing", "mailing"]
    assert "units" not in found.json["services"][0] and found.json["services"][0]["waiting"] == 1
    text = shell.quick("service", "list").out
    assert text.splitlines()[0].split() == [
        "SERVICE",
        "running",
        "partitions",
        "waiting",
        "dead",
        "on",
        "dead",
        "reads",
    ]
    assert all(len(line) <= 100 for line in text.splitlines())


def test_what_is_not_there_is_said(shell: Shell) -> None:
    for command in (["list"], ["show", "billing"]):
        nothing = shell.quick("service", *command)
        assert nothing.code == 2 and "UL1301" in nothing.err, nothing
    shell.write("empty.py", "from unlost import App, Topic\napp = App(topics=[Topic('order', partitions=3)])\n")
    shell.write(
        "made.py", "import asyncio, empty\nasync def main():\n    async with empty.app: pass\nasyncio.run(main())\n"
    )
    subprocess.run([sys.executable, "made.py"], cwd=shell.folder, env=shell.env, check=True, capture_output=True)
    assert shell.quick("service", "list").out == "no service has run on it yet: unlost run\n"
    place(shell, "A1")
    missing = shell.quick("service", "show", "biling\x1b[31m")
    assert missing.code == 2 and "UL1440" in missing.err and "it has billing, mailing" in missing.err
    assert shell.quick("service", "show", "biling", "--json").json["code"] == "UL1440"


# --- status --watch --------------------------------------------------------------------------------------


def test_watching_prints_one_status_after_another(shell: Shell) -> None:
    place(shell, "A1")
    with shell.start("status", "--watch", "0.1") as running:
        running.says("every 0.1 s until Ctrl-C\n\nbroker")
        assert running.end() == 0
        assert "\x1b" not in running.text() and "billing" in running.text()


def test_watching_as_json_is_a_line_per_look(shell: Shell) -> None:
    place(shell, "A1")
    with shell.start("status", "--watch", "100ms", "--json") as running:
        running.says('}\n{"schema":"unlost.status/1","time"')
        place(shell, "A2")
        running.says('"waiting":2')
        assert running.end(signal.SIGINT) == 0
        looks = [json.loads(line) for line in running.text().splitlines()]
    assert [look["services"][0]["waiting"] for look in (looks[0], looks[-1])] == [1, 2]
    assert looks[0]["time"] < looks[-1]["time"]


def test_watching_in_a_terminal_repaints(shell: Shell) -> None:
    place(shell, "A1")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "unlost", "status", "--watch", "0.1"],
        cwd=shell.folder, env=shell.env | {"TERM": "xterm"}, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE,
    )  # fmt: skip
    os.close(theirs)
    said = b""
    try:
        while said.count(b"\x1b[H\x1b[2J") < 3:
            said += os.read(ours, 65536)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=SECONDS_MAX)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert process.returncode == 0 and err == b""
    assert all(b"billing" in page for page in said.split(b"\x1b[H\x1b[2J")[1:3])


@pytest.mark.parametrize(
    ("value", "code"), [("0.01", "UL1442"), ("0", "UL1442"), ("soon", "UL1150"), ("-1", "UL1150")]
)  # fmt: skip
def test_how_often_is_checked(shell: Shell, value: str, code: str) -> None:
    result = shell.quick("status", "--watch", value)
    assert result.code == 2 and code in result.err, result


def test_watching_nothing_ends_as_status_does(shell: Shell) -> None:
    result = shell.quick("status", "--watch")
    assert result.code == 2 and "UL1301" in result.err


# --- with servers ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_with_the_store_in_postgres(shell: Shell, database: str) -> None:
    shell.env["UNLOST_STORE"] = database
    shell.ok("store", "migrate", "--yes")
    check_numbers(shell)
    assert "billing" in shell.ok("service", "list").out
    del shell.env["UNLOST_STORE"]
    result = shell.quick("service", "show", "billing")
    assert result.code == 2 and "UL1304" in result.err  # its progress is elsewhere


@pytest.mark.slow
def test_watching_goes_on_when_the_store_is_back(shell: Shell) -> None:
    require_postgres(own=True)
    with Postgres.start(own=True) as postgres:
        shell.env["UNLOST_STORE"] = postgres.fresh()
        shell.ok("store", "migrate", "--yes")
        place(shell, "A1")
        with shell.start("status", "--watch", "0.1", "--json") as running:
            running.says('"waiting":1')
            postgres.stop()
            running.says("UL2")
            postgres.start_again()
            place(shell, "A2")
            running.says('"waiting":2')
            assert running.end() == 0


@pytest.mark.slow
def test_on_kafka(shell: Shell, kafka: Any, fresh_prefix: str) -> None:
    pytest.importorskip("confluent_kafka.admin")  # before `Shell.quick`, which forgets what it was the first to import
    shell.env["UNLOST_BROKER"] = f"{kafka.url}?prefix={fresh_prefix}."
    check_numbers(shell)
    shell.env["UNLOST_BROKER"] = "kafka://127.0.0.1:9"
    away = shell.quick("service", "show", "billing", "--json")
    assert away.code == 4 and away.json["unreachable"] and away.json["dead"] == 1
    assert all(unit["end"] is None for unit in away.json["units"])
