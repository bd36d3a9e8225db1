"""A whole service, paused, resumed, retired and renamed: what is said of it holds in real processes, and the books balance."""

from __future__ import annotations

import json
import signal
import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_kit import Shell

from unlost import App, Event, Service, UsageError
from unlost.brokers.embedded.log import EmbeddedLog
from unlost.brokers.embedded.trim import trim
from unlost.events.topic import Unit
from unlost.ops import pages, service_change
from unlost.ops.connect import opened
from unlost.sqlite.file import File
from unlost.store.port import Hold
from unlost.store.services import refused
from unlost.world import World

SHOP = """
import asyncio
from pathlib import Path
from unlost import App, Command, Context, Event, Reject, Retry, RetryLater, Service, Topic

class OrderPlaced(Event, key="order_id"):
    order_id: str

class SendReceipt(Command, queue="receipts"):
    order_id: str

billing = Service("billing", retry=Retry(attempts=1), guarantee="effectively-once")
mailing = Service("mailing")

def note(line: str) -> None:
    with Path("handled").open("a") as file:
        file.write(line + "\\n")

@billing.on(OrderPlaced)
async def charge(order: OrderPlaced) -> None:
    if order.order_id == "dead":
        raise Reject("no")
    if order.order_id == "later":
        raise RetryLater(after=3600)
    if order.order_id == "slow":
        print("in hand", flush=True)
        while not Path("go").exists():
            await asyncio.sleep(0.01)
    note("billing " + order.order_id)

@billing.on(SendReceipt)
async def send(receipt: SendReceipt) -> None: ...

@mailing.on(OrderPlaced)
async def mail(order: OrderPlaced) -> None:
    note("mailing " + order.order_id)

app = App(billing, mailing, topics=[Topic("order", partitions=2{retention}), Topic("receipts", partitions=1)])
"""


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return shop(tmp_path)


def shop(folder: Path, retention: str = "", **env: str) -> Shell:
    shell = Shell(folder)
    shell.env |= env
    shell.write("shop.py", SHOP.replace("{retention}", retention))
    return shell


def place(shell: Shell, *ids: str) -> None:
    lines = "".join(json.dumps({"order_id": id}) + "\n" for id in ids)
    shell.ok("publish", "OrderPlaced", "-", "--app", "shop", stdin=lines)


def handled(shell: Shell, by: str) -> list[str]:
    path = shell.folder / "handled"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.partition(" ")[2] for line in lines if line.startswith(by)]


def service(shell: Shell, name: str = "billing") -> Any:
    result = shell.quick("service", "show", name, "--json")
    assert result.code == 0, result
    return result.json


def book(shell: Shell, name: str = "billing") -> Any:
    """What the audit says of it; the books must balance."""
    result = shell.quick("audit", "--json")
    assert result.code == 0, result
    return next(b for b in result.json["services"] if b["service"] == name)


def change(shell: Shell, *arguments: str) -> Any:
    result = shell.quick("service", *arguments, "--yes", "--json")
    assert result.code == 0, result
    return result.json


def other_done(shell: Shell, count: int) -> None:
    shell.until(lambda s: s["name"] != "mailing" or not s["waiting"] + s["in_flight"])
    assert len(handled(shell, "mailing")) == count


def mail_all(shell: Shell, count: int) -> None:
    """Only `mailing` runs, until it has handled so many."""
    with shell.start("run", "shop", "--service", "mailing") as running:
        running.says("unlost: ")
        other_done(shell, count)
        assert running.end(signal.SIGTERM) == 0


def leave_something(shell: Shell) -> None:
    """Of `billing`: one is done, one dead with one behind it, one retries; two were never received. `mailing` has them all."""
    place(shell, "A1", "dead", "dead", "later")
    with shell.start("run", "shop") as running:
        running.says("unlost: ")
        shell.until(
            lambda s: s["name"] != "billing" or (s["waiting"], s["dead"], s["parked"], s["retrying"]) == (0, 1, 1, 1)
        )
        other_done(shell, 4)
        assert running.end(signal.SIGTERM) == 0
    place(shell, "B1", "B2")
    mail_all(shell, 6)


# --- pause and resume ------------------------------------------------------------------------------------


def check_pause(shell: Shell) -> None:
    """In two processes: what is in a handler ends, nothing new begins (not what was received behind it either), others go
    on, and a restart changes nothing."""
    with shell.start("run", "shop") as one, shell.start("run", "shop") as two:
        one.says("unlost: ")
        two.says("unlost: ")
        shell.until(lambda s: len(s["processes"]) == 2 and all(p["partitions"] for p in s["processes"]))
        place(shell, "slow", "slow")
        shell.until(lambda s: s["name"] != "billing" or s["in_flight"] == 2)
        said = change(shell, "pause", "billing", "--reason", "card service is away", "--operator", "ada")
        assert said["changed"] and said["hold"].endswith("by ada: card service is away")
        for running in (one, two):
            running.says("card service is away")
        place(shell, *(f"A{n}" for n in range(20)))
        other_done(shell, 22)
        (shell.folder / "go").touch()
        shell.until(lambda s: s["name"] != "billing" or s["in_flight"] == 1)
        assert two.end(signal.SIGTERM) == one.end(signal.SIGTERM) == 0
        assert handled(shell, "billing") == ["slow"]
    place(shell, "B1")
    with shell.start("run", "shop") as running:
        running.says("unlost: ")
        other_done(shell, 23)
        shell.until(lambda s: s["name"] != "billing" or (s["owned"], s["waiting"]) == (3, 22))
        assert handled(shell, "billing") == ["slow"]
        assert change(shell, "resume", "billing")["changed"]
        running.says("it is resumed")
        shell.until(lambda s: not s["waiting"] + s["in_flight"])
        assert running.end(signal.SIGTERM) == 0
    assert sorted(handled(shell, "billing")) == sorted(["slow", "slow", "B1", *(f"A{n}" for n in range(20))])
    assert book(shell)["done"] == 23


def test_a_paused_service_ends_what_it_has_and_begins_nothing(shell: Shell) -> None:
    check_pause(shell)


def test_everybody_says_that_a_service_is_paused(shell: Shell) -> None:
    place(shell, "A1")
    change(shell, "pause", "billing", "--operator", "ada", "--reason", "why\x1b[31m not")
    assert service(shell)["hold"].startswith("paused since 2")
    for command in (["status"], ["service", "list"], ["service", "show", "billing"], ["doctor"]):
        result = shell.quick(*command)
        assert "by ada: why" in result.out and "paused" in result.out, result
    again = change(shell, "pause", "billing", "--operator", "bob")
    assert not again["changed"] and "by ada" in again["hold"]
    assert "nothing to do" in shell.quick("service", "resume", "mailing", "--yes").out


def test_pausing_asks_first_and_is_recorded(shell: Shell) -> None:
    place(shell, "A1")
    refused = shell.quick("service", "pause", "billing")
    assert refused.code == 2 and "UL1333" in refused.err
    dry = shell.quick("service", "pause", "billing", "--dry-run")
    assert dry.code == 0 and "nothing was changed" in dry.out and service(shell)["hold"] is None
    change(shell, "pause", "billing", "--operator", "ada", "--reason", "why")
    change(shell, "resume", "billing", "--operator", "bob")
    assert operations(shell) == [("pause", "ada", "why", "billing"), ("resume", "bob", "", "billing")]


def operations(shell: Shell) -> list[tuple[str, ...]]:
    file = File(shell.database)
    try:
        sql = "select action, operator, reason, service from unlost_operation order by number"
        return [tuple(row) for row in file.read(lambda c: c.execute(sql).fetchall())]
    finally:
        file.close()


@pytest.mark.parametrize("verb", ["pause", "resume", "retire"])
def test_a_name_that_nobody_has(shell: Shell, verb: str) -> None:
    place(shell, "A1")
    result = shell.quick("service", verb, "biling", "--reason", "x", "--yes")
    assert result.code == 2 and "UL1440" in result.err and "billing, mailing" in result.err


# --- retire ----------------------------------------------------------------------------------------------


def check_retire(shell: Shell) -> None:
    leave_something(shell)
    dry = shell.quick("service", "retire", "billing", "--dry-run", "--json").json
    assert (dry["unhandled"], dry["aside"], dry["changed"]) == (2, 3, False)
    said = change(shell, "retire", "billing", "--reason", "invoicing does it", "--operator", "ada")
    assert (said["unhandled"], said["aside"], said["changed"]) == (2, 3, True)
    found = book(shell)
    assert (found["accepted"], found["done"], found["removed"]) == (6, 1, 5)
    assert found["waiting"] == found["dead"] == found["parked"] == found["retrying"] == 0
    place(shell, "C1", "C2")  # not for it
    assert book(shell) == found
    assert book(shell, "mailing")["waiting"] == 2
    shown = service(shell)
    assert shown["waiting"] == shown["dead"] == 0 and shown["hold"].startswith("retired since") and not shown["queues"]
    assert shell.quick("dead", "list", "--json").json["letters"] == []
    again = change(shell, "retire", "billing", "--reason", "again")
    assert not again["changed"] and "invoicing does it" in again["hold"]
    refused = shell("run", "shop")
    assert refused.code == 2 and "UL1443" in refused.err and "unlost service resume billing" in refused.err
    mail_all(shell, 8)


def test_a_retired_service_and_its_books(shell: Shell) -> None:
    check_retire(shell)
    kinds = [row[0] for row in operations(shell)]
    assert kinds == ["retire"]


def test_a_retired_service_goes_on_where_it_was_when_it_is_resumed(shell: Shell) -> None:
    leave_something(shell)
    change(shell, "retire", "billing", "--reason", "x")
    place(shell, "C1", "C2")
    assert change(shell, "resume", "billing")["changed"]
    shell.handle_all()
    assert handled(shell, "billing") == ["A1", "C1", "C2"] or handled(shell, "billing") == ["A1", "C2", "C1"]
    found = book(shell)
    assert (found["accepted"], found["done"], found["removed"]) == (8, 3, 5)


def test_a_service_that_runs_is_not_retired_and_not_renamed(shell: Shell) -> None:
    place(shell, "A1")
    with shell.start("run", "shop") as running:
        running.says("unlost: ")
        shell.until(lambda s: s["owned"] == s["partitions"])
        for command in (["retire", "billing", "--reason", "x"], ["rename", "billing", "invoicing"]):
            for more in (["--yes"], ["--dry-run"]):
                result = shell.quick("service", *command, *more)
                assert result.code == 2 and "UL1445" in result.err and str(running.process.pid) in result.err
        assert running.end(signal.SIGTERM) == 0
    shell.handle_all()
    assert book(shell)["done"] == 1


def test_retiring_needs_a_reason(shell: Shell) -> None:
    place(shell, "A1")
    result = shell.quick("service", "retire", "billing", "--yes")
    assert result.code == 2 and "UL1449" in result.err
    assert service(shell)["hold"] is None


async def test_a_retired_service_holds_no_trimming_back(tmp_path: Path) -> None:
    shell = shop(tmp_path, ", retention=1")
    place(shell, *(f"A{n}" for n in range(10)))
    mail_all(shell, 10)
    file = File(shell.database, world=Tomorrow())
    try:
        assert await trim(file) == 0  # billing has handled none of them
        change(shell, "retire", "billing", "--reason", "x")
        assert await trim(file) == 8
        assert logged(file) == 2  # the last of each partition stays
        found = book(shell)
        assert (found["accepted"], found["removed"]) == (10, 10)
        verified = shell.quick("doctor", "--verify", "--json")
        assert verified.code == 0, verified
        place(shell, *(f"B{n}" for n in range(10)))
        mail_all(shell, 20)
        await trim(file)
        assert logged(file) == 2
        assert book(shell) == found
    finally:
        file.close()
    refused = shell.quick("service", "resume", "billing", "--yes")
    assert refused.code == 2 and "UL1447" in refused.err and "another name" in refused.err
    assert service(shell)["hold"].startswith("retired")


def logged(file: File) -> int:
    return int(file.read(lambda c: c.execute("select count(*) from unlost_log").fetchone()[0]))


class Tomorrow(World):
    def now(self) -> int:
        return super().now() + 86_400_000_000


# --- rename ----------------------------------------------------------------------------------------------


def renamed_code(shell: Shell) -> None:
    shell.write("shop.py", (shell.folder / "shop.py").read_text().replace('Service("billing"', 'Service("invoicing"'))


def check_rename(shell: Shell) -> None:
    leave_something(shell)
    before = book(shell)
    dry = shell.quick("service", "rename", "billing", "invoicing", "--dry-run", "--json").json
    assert (dry["changed"], dry["partitions"], dry["aside"]) == (False, 3, 3)
    assert change(shell, "rename", "billing", "invoicing", "--operator", "ada")["changed"]
    assert book(shell, "invoicing") == before | {"service": "invoicing"}
    assert [s["service"] for s in shell.quick("audit", "--json").json["services"]] == ["invoicing", "mailing"]
    refused = shell("run", "shop")
    assert refused.code == 2 and "UL1444" in refused.err and "renamed to 'invoicing'" in refused.err
    shown = shell.quick("service", "show", "billing")
    assert shown.code == 2 and "UL1444" in shown.err
    assert not change(shell, "rename", "billing", "invoicing")["changed"]
    renamed_code(shell)
    with shell.start("run", "shop") as running:
        running.says("unlost: ")
        shell.until(lambda s: not s["waiting"] + s["in_flight"])
        assert running.end(signal.SIGTERM) == 0
    assert sorted(handled(shell, "billing")) == ["A1", "B1", "B2"]  # none of them twice
    found = book(shell, "invoicing")
    assert (found["done"], found["dead"], found["parked"], found["retrying"]) == (3, 1, 1, 1)


def test_a_renamed_service_goes_on_where_it_was(shell: Shell) -> None:
    check_rename(shell)


def test_a_repeat_is_recognised_over_a_rename(shell: Shell) -> None:
    shell.ok("publish", "OrderPlaced", "order_id=A1", "--id", "one", "--app", "shop")
    shell.handle_all()
    change(shell, "rename", "billing", "invoicing")
    renamed_code(shell)
    shell.ok("publish", "OrderPlaced", "order_id=A1", "--id", "one", "--app", "shop")
    shell.handle_all()
    assert handled(shell, "billing") == ["A1"] and book(shell, "invoicing")["skipped"] == {"duplicate": 1}


def test_there_and_back_again(shell: Shell) -> None:
    place(shell, "A1")
    change(shell, "pause", "billing", "--operator", "ada")
    change(shell, "rename", "billing", "invoicing")
    assert "paused" in service(shell, "invoicing")["hold"]  # that goes with it
    change(shell, "rename", "invoicing", "billing")
    change(shell, "resume", "billing")
    shell.handle_all()
    assert handled(shell, "billing") == ["A1"]


def test_new_code_that_was_there_before_the_rename(shell: Shell) -> None:
    """A publisher with the new code registers the new name: as long as it has not worked, it is not in the way."""
    text = (shell.folder / "shop.py").read_text()
    shell.write("shop.py", text.replace("@billing.on(SendReceipt)", ""))  # a queue would have two services
    place(shell, "A1")
    shell.handle_all()
    renamed_code(shell)
    place(shell, "A2")
    assert change(shell, "rename", "billing", "invoicing")["changed"]
    shell.handle_all()
    assert handled(shell, "billing") == ["A1", "A2"]


@pytest.mark.parametrize("new", ["mailing", "billing", "bill ing", ""])
def test_names_that_are_not_free_or_not_valid(shell: Shell, new: str) -> None:
    place(shell, "A1")
    shell.handle_all()
    result = shell.quick("service", "rename", "billing", new, "--yes")
    assert result.code == 2 and ("UL1446" if "ing" in new and " " not in new else "UL1") in result.err
    assert book(shell)["done"] == 1


async def test_nobody_takes_a_partition_of_a_service_that_was_ended(tmp_path: Path) -> None:
    """Also not a process that was there before, and waited for one."""
    service = Service("billing")

    @service.on(Placed)
    async def charge(order: Placed) -> None: ...

    url = f"embedded://{tmp_path}/events.db"
    async with App(service, broker=url) as app:
        with opened(url) as looking:
            service_change.retire(looking, "billing", operator="ada", reason="x")
        with pytest.raises(UsageError) as caught:
            await app.store.take([Unit("billing", "order", 0)])
    assert caught.value.code == "UL1443"


class Placed(Event, key="order_id", topic="order"):
    order_id: str


@pytest.mark.parametrize(("state", "said"), [("retired", "UL1443"), ("renamed", "UL1444")])
def test_what_a_refusal_says(state: Any, said: str) -> None:
    error: Callable[..., UsageError] = refused
    found = error("billing", Hold(state=state, since=0, operator="ada", reason="why", to="x"))
    assert found.code == said and "by ada: why" in str(found)


def test_a_log_that_has_no_digests_is_read_to_retire_a_service(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Kafka. The audit then compares what was read with the digests that this log has after all."""
    leave_something(shell)
    with monkeypatch.context() as patched:
        patched.setattr(EmbeddedLog, "digest", lambda *_: None)
        patched.setattr(pages, "PAGE", 1)
        said = change(shell, "retire", "billing", "--reason", "x")
    assert (said["unhandled"], said["aside"]) == (2, 3)
    assert book(shell)["removed"] == 5


def test_a_paused_service_is_ready(shell: Shell) -> None:
    """It is as an operator wants it: whoever restarts it or sends it no work would not help."""
    place(shell, "A1")
    change(shell, "pause", "billing", "--operator", "ada")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with shell.start("run", "shop", "--http", str(port)) as running:
        running.says("unlost: billing")
        shell.until(lambda s: s["owned"] == s["partitions"])
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=30) as answer:
            checks = json.load(answer)["checks"]
        assert checks["service billing"]["said"].startswith("paused since 2")
        assert checks["service mailing"]["said"] == "it has 2 partitions"
        assert running.end(signal.SIGTERM) == 0


def test_a_paused_service_does_not_answer_for_others(shell: Shell) -> None:
    """An event that was in a handler when its process was killed runs alone. While its service is paused it does not run,
    and the other services of the process do not wait for it."""
    place(shell, "slow")
    with shell.start("run", "shop", "--service", "billing") as running:
        running.says("in hand")
        running.process.kill()
        running.process.wait()
    change(shell, "pause", "billing")
    place(shell, "A1", "A2")
    with shell.start("run", "shop") as running:
        running.says("unlost: ")
        other_done(shell, 3)
        assert handled(shell, "billing") == []
        (shell.folder / "go").touch()
        change(shell, "resume", "billing")
        shell.until(lambda s: not s["waiting"] + s["in_flight"])
        assert running.end(signal.SIGTERM) == 0
    assert sorted(handled(shell, "billing")) == ["A1", "A2", "slow"]
