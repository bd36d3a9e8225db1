"""What operators do, where the store is in a real PostgreSQL: what is said is so, and each check has been seen red."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import confluent_kafka.admin  # noqa: F401 - before `Shell.quick`, which forgets what it was the first to import
import msgspec
import psycopg
import pytest

from servers.fixtures import require_postgres
from servers.pgbouncer import PgBouncer
from servers.postgres import Postgres, binaries
from unlost import App, Event, Reject, Retry, Service, Topic, UsageError
from unlost.brokers.embedded.trim import trim
from unlost.brokers.findings import Finding
from unlost.errors import Fenced, OutcomeUnknown, Unavailable, UnlostError
from unlost.events.topic import Arrival, Unit
from unlost.ops import shelf
from unlost.ops import store as migrations
from unlost.ops.books import books, examine_all
from unlost.ops.connect import Looking, opened
from unlost.ops.doctor_postgres import check_postgres
from unlost.sqlite.file import File
from unlost.store import connect as stores
from unlost.store.port import Outcome, Records, Settlement
from unlost.store.postgres import examine as examining
from unlost.store.postgres import migrate as migrating
from unlost.store.postgres import schema
from unlost.store.postgres.facts import Absent, Facts, Held, Table
from unlost.store.postgres.records import PostgresRecords
from unlost.store.postgres.settings import parse
from unlost.store.postgres.store import PostgresStore
from unlost.world import World

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

from cli_kit import Result, Running, Shell

CANARY = "c4n4ry s3cret/%"
SHOP = """
from unlost import App, Context, Event, Reject, Retry, Service, Topic

class OrderPlaced(Event, key="order_id"):
    order_id: str
    total_cents: int

class OrderPaid(Event, key="order_id", topic="payment"):
    order_id: str

billing = Service("billing", retry=Retry(attempts=1), guarantee="effectively-once")

@billing.on(OrderPlaced)
async def charge(order: OrderPlaced, ctx: Context) -> None:
    if not order.total_cents:
        raise Reject("an order of 0.00 cannot be paid")
    async with ctx.transaction():
        ctx.publish(OrderPaid(order_id=order.order_id))

shipping = Service("shipping", retry=Retry(attempts=1))

@shipping.on(OrderPaid)
async def ship(order: OrderPaid) -> None:
    print("shipped", order.order_id, flush=True)

app = App(billing, shipping, topics=[Topic("order", partitions=2), Topic("payment", partitions=2)])
"""
CURED = SHOP.replace("if not order.total_cents:", "if False:")


class Placed(Event, key="order_id", topic="order", type="order.OrderPlaced"):
    order_id: str
    total_cents: int = 1


@pytest.fixture
def store(database: str) -> str:
    """The URL of a store that nobody has used yet."""
    migrations.migrate(database, operator="test", reason="")
    return database


@pytest.fixture
def shell(tmp_path: Path, store: str) -> Shell:
    """A folder with a shop on the embedded broker, whose store is in PostgreSQL."""
    return shop(tmp_path, store)


def shop(folder: Path, store: str, **env: str) -> Shell:
    shell = Shell(folder)
    shell.write("shop.py", SHOP)
    shell.env |= {"UNLOST_STORE": store} | env
    return shell


def place(shell: Shell, *ids: str, cents: int = 1) -> None:
    lines = "".join(json.dumps({"order_id": id, "total_cents": cents}) + "\n" for id in ids)
    shell.ok("publish", "OrderPlaced", "-", "--app", "shop", stdin=lines)


def until(holds: Callable[[], Any], what: str = "", seconds: float = 30.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, f"it did not happen: {what}"
        time.sleep(0.01)
    return found


@contextmanager
def at_work(shell: Shell, *arguments: str) -> Iterator[Running]:
    with shell.start("run", "shop", *arguments) as running:
        running.says("unlost: ")  # from here on it ends by a signal as it should
        yield running


def idle(shell: Shell) -> bool:
    found = shell.quick("status", "--json")
    return found.code == 0 and not found.json["outbox"]["events"] and all(
        not s["waiting"] + s["in_flight"] + s["retrying"] + s["requested"] and s["next_retry"] is None
        for s in found.json["services"]
    )  # fmt: skip


def work(shell: Shell, *arguments: str) -> None:
    """Runs the shop until nothing waits any more."""
    with at_work(shell, *arguments) as running:
        until(lambda: idle(shell), "idle")
        assert running.end(signal.SIGTERM) == 0


def sql(url: str, statement: str, *bindings: Any) -> list[tuple[Any, ...]]:
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement, bindings or None)
        return cursor.fetchall() if cursor.description is not None else []


def stop_still(running: Running, url: str) -> None:
    """SIGSTOP between two transactions: one that is open would hold its rows."""

    def stopped() -> bool:
        running.process.send_signal(signal.SIGSTOP)
        open_ones = "select 1 from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid() and xact_start is not null"  # fmt: skip
        if not sql(url, open_ones):
            return True
        running.process.send_signal(signal.SIGCONT)
        return False

    until(stopped)


@contextmanager
def looking(shell: Shell) -> Iterator[Looking]:
    broker = shell.env.get("UNLOST_BROKER", f"embedded://{shell.database}")
    with opened(broker, store=shell.env["UNLOST_STORE"]) as here:
        yield here


@contextmanager
def recorded(url: str) -> Iterator[Records]:
    records = stores.records(url)
    try:
        yield records
    finally:
        records.close()


def book(shell: Shell, service: str = "billing") -> dict[str, Any]:
    found = shell.quick("audit", "--json").json
    return next(b for b in found["services"] if b["service"] == service)


# --- looking ---------------------------------------------------------------------------------------------------------


def test_the_shop_as_operators_see_it(shell: Shell) -> None:
    place(shell, *(f"A{n}" for n in range(6)))
    place(shell, "bad", cents=0)
    place(shell, "bad")
    status = shell.quick("status")
    assert "nobody runs it" in status.out and "outbox  empty" in status.out, status
    work(shell)
    status = shell.quick("status", "--json").json
    by_name = {s["name"]: s for s in status["services"]}
    assert {k: by_name["billing"][k] for k in ("waiting", "parked", "dead", "alive", "owned")} == {
        "waiting": 0, "parked": 1, "dead": 1, "alive": 0, "owned": 0,
    }  # fmt: skip
    assert by_name["shipping"]["units"][0]["end"] is not None
    assert status["broker"] == str(shell.database) and status["path"].startswith("postgresql://postgres:***@")
    assert status["bytes"] > 100_000 and status["outbox"]["shards"] == 16 and status["outbox"]["relays"] == []
    assert status["elsewhere"] == status["lost"] == [] and "books" not in status["outbox"]
    result = shell.quick("audit", "--verify")
    assert result.code == 0 and "every stored event matches its checksum" in result.out, result
    assert "cannot be verified" not in result.out and "UNACCOUNTED" in result.out
    assert {k: book(shell)[k] for k in ("accepted", "done", "dead", "parked")} == {
        "accepted": 8, "done": 6, "dead": 1, "parked": 1,
    }  # fmt: skip
    assert book(shell, "shipping")["done"] == 6
    topics = {t["name"]: t for t in shell.quick("topic", "list", "--json").json["topics"]}
    assert topics["order"]["services"] == ["billing"] and topics["payment"]["events"] == 6
    assert len(shell.quick("tail", "--from", "start").out.splitlines()) == 14
    listed = shell.quick("dead", "list", "--json").json["letters"]
    assert [(x["key"], x["reason"], x["parked_behind"]) for x in listed] == [("bad", "rejected", 1)]
    shown = shell.quick("dead", "show", str(listed[0]["number"]), "--data", "--app", "shop")
    assert shown.code == 0 and '"total_cents":0' in shown.out, shown
    assert shell.quick("dead", "list", "--reason-is", "exhausted", "--json").json["letters"] == []
    assert len(shell.quick("dead", "list", "--key", "bad", "--service", "billing", "--json").json["letters"]) == 1


def test_processes_that_run_are_seen(shell: Shell) -> None:
    with at_work(shell) as one, at_work(shell, "--service", "billing") as two:
        until(lambda: [s["alive"] for s in shell.quick("status", "--json").json["services"]] == [2, 1], "both")
        found = shell.quick("status", "--json").json
        pids = {p["pid"] for s in found["services"] for p in s["processes"]}
        assert pids == {one.process.pid, two.process.pid}
        until(lambda: shell.quick("status", "--json").json["services"][0]["owned"] == 2, "who has what")
        until(
            lambda: sum(r["shards"] for r in shell.quick("status", "--json").json["outbox"]["relays"]) == 16, "relays"
        )
        stop_still(one, shell.env["UNLOST_STORE"])
        sql(shell.env["UNLOST_STORE"], "update unlost.unlost_process set seen = now() - interval '1 hour' where pid = %s", one.process.pid)  # fmt: skip
        with recorded(shell.env["UNLOST_STORE"]) as records:
            hung = {p.pid: p.hung for p in records.read(records.processes).values()}
        assert hung == {one.process.pid: True, two.process.pid: False}
        one.process.send_signal(signal.SIGCONT)
        two.process.send_signal(signal.SIGKILL)
        two.process.wait()
        until(lambda: shell.quick("status", "--json").json["services"][0]["alive"] == 1, "the dead one is gone")
        assert one.end(signal.SIGTERM) == 0


def test_a_command_takes_as_many_statements_for_much_as_for_little(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(shell, "A", "B", cents=0)
    work(shell)
    asked: list[str] = []
    original = PostgresRecords.read

    def read(self: PostgresRecords, do: Any) -> Any:
        class Counting:
            def __init__(self, look: Any) -> None:
                self._look = look

            def execute(self, text: str, bindings: Sequence[Any] = ()) -> Any:
                asked.append(text)
                return self._look.execute(text, bindings)

        return original(self, lambda look: do(Counting(look)))

    monkeypatch.setattr(PostgresRecords, "read", read)

    def statements() -> list[int]:
        counts = []
        for command in (["status"], ["audit"], ["dead", "list"], ["topic", "list"]):
            asked.clear()
            assert shell.quick(*command).code == 0
            counts.append(len(asked))
        return counts

    few = statements()
    place(shell, *(f"C{n}" for n in range(60)), cents=0)
    shell.write(
        "shop.py", SHOP.replace("app = App(billing, shipping,", "app = App(billing, shipping, Service('third'),")
    )
    work(shell)
    assert len(shell.quick("dead", "list", "--json").json["letters"]) == 62
    assert statements() == few
    assert max(few) < 25, few


class Later(World):
    """Whose clock can be moved on."""

    later = 0

    def now(self) -> int:
        return super().now() + self.later


def test_the_digest_of_a_log_whose_beginning_was_trimmed(tmp_path: Path, store: str) -> None:
    """A service that begins behind position 0 has no digest of what was before: the store does not note it."""

    async def fill() -> None:
        url = f"embedded://{tmp_path / 'events.db'}"
        topics = [Topic("order", partitions=1, retention=1)]
        early, late = Service("early"), Service("late")

        @early.on(Placed)
        @late.on(Placed)
        async def take(_: Placed) -> None:
            return None

        first = App(early, broker=url, store=store, topics=topics, world=world)
        async with first:
            await first.publish_all([Placed(order_id=f"A{n}") for n in range(9)])
            serving = asyncio.create_task(first.serve())
            await asyncio.to_thread(until, lambda: told(first.file, "early", 9))
            first.stop()
            await serving
            world.later = 3_600_000_000
            assert await trim(first.file) == 8
        second = App(early, late, broker=url, store=store, topics=topics, world=world)
        async with second:
            await second.publish_all([Placed(order_id=f"B{n}") for n in range(4)])
            serving = asyncio.create_task(second.serve())
            await asyncio.to_thread(until, lambda: told(second.file, "late", 13))
            second.stop()
            await serving

    def told(file: File, service: str, position: int) -> bool:
        rows = file.read(
            lambda c: c.execute("select position from unlost_follower where service = ?", (service,)).fetchall()
        )
        return rows == [(position,)]

    async def trim_again() -> None:
        file = File(tmp_path / "events.db", world=world)
        assert await trim(file)
        file.close()

    world = Later()
    asyncio.run(fill())
    with opened(f"embedded://{tmp_path / 'events.db'}", store=store) as here:
        records, log = here.pair()
        examined = examine_all(records, log=log)
        assert examined.books.balanced, examined.books
        assert {name: b.done for name, b in examined.books.services.items()} == {"early": 13, "late": 5}
        assert examined.unverified == []
        sql(store, "update unlost.unlost_progress set digest = digest + 1")
        found = books(records, log=log).findings
        assert ["digests differ" in text for text in found] == [True, True], "what can be compared, is"
    world.later *= 2
    asyncio.run(trim_again())
    with opened(f"embedded://{tmp_path / 'events.db'}", store=store) as here:
        again = examine_all(*here.pair()[:1], log=here.log)
        assert [text.partition(":")[0] for text in again.books.findings] == ["early order/0"]
        assert [text.partition(":")[0] for text in again.unverified] == ["late order/0"], "its beginning was trimmed"


# --- an audit that is red when it must be ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("update unlost.unlost_progress set fated = '', counts = '{}', digest = 0 where service = 'shipping'", "passed over"),
        ("delete from unlost.unlost_progress where service = 'shipping'", "all of its saved progress is gone"),
        ("delete from unlost.unlost_progress where service = 'billing' and partition = 0", "billing order/0: its saved progress is gone"),
        ("delete from unlost.unlost_shelf", "not on the shelf"),
        ("delete from unlost.unlost_waiting", "not in the waiting room"),
        ("delete from unlost.unlost_ledger where state = 'parked'", "the ledger does not list it"),
        ("update unlost.unlost_progress set digest = digest + 1 where counts <> '{}'", "digests differ"),
        ("update unlost.unlost_progress set counts = '{\"done\":100}' where counts <> '{}'", "more outcomes are counted"),
        ("update unlost.unlost_progress set topic_id = 'another'", "deleted and made again"),
        ("delete from unlost.unlost_progress where partition = 1", "the service has positions on 1"),
    ],
)  # fmt: skip
def test_harm_done_to_the_tables_is_found(shell: Shell, harm: str, said: str) -> None:
    place(shell, *(f"A{n}" for n in range(6)))
    place(shell, "bad", cents=0)
    place(shell, "bad")
    work(shell)
    assert shell.quick("audit").code == 0
    sql(shell.env["UNLOST_STORE"], harm)
    result = shell.quick("audit")
    assert result.code == 3 and said in result.out, result


def test_all_is_gone_and_the_broker_remembers(shell: Shell) -> None:
    """The store was emptied, or an empty backup came back: what the embedded broker was told still says so."""
    place(shell, "A")
    work(shell)
    for table in ("progress", "service", "epoch"):
        sql(shell.env["UNLOST_STORE"], f"delete from unlost.unlost_{table}")
    result = shell.quick("audit")
    assert result.code == 3 and "the broker was told of its progress in this store, and it is gone" in result.out, (
        result
    )
    assert "it is gone" in shell.quick("status").out


IN_HANDS = """
with event as (
    insert into unlost.unlost_outbox (shard, aggregatetype, aggregateid, id, type, payload, ce_source, ce_time)
    values (3, 'order', 'k', 'e1', 'order.OrderPlaced', '{}', 'x', '2026-01-01T00:00:00Z') returning seq
), moved as (update unlost.unlost_relay set next = next + 1 where shard = 3 returning next - 1 as number)
insert into unlost.unlost_outbox_status (seq, shard, number) select seq, 3, number from event, moved
"""


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("delete from unlost.unlost_outbox_status", "a row left the outbox without the broker's receipt; 1 were numbered, 0 are confirmed, 0 are in hands"),
        ("delete from unlost.unlost_outbox", "a row left the outbox without the broker's receipt; of the 1 in hands 1 are not there"),
        ("update unlost.unlost_relay set confirmed = 1 where shard = 3", "more is confirmed than was sent"),
        ("delete from unlost.unlost_relay where shard = 3", "more is confirmed than was sent"),
    ],
)  # fmt: skip
def test_a_row_that_left_the_outbox_without_a_receipt(shell: Shell, harm: str, said: str) -> None:
    place(shell, "A")
    work(shell)
    sql(shell.env["UNLOST_STORE"], IN_HANDS)
    result = shell.quick("audit")
    assert result.code == 0 and "1 event accepted and not in the log yet" in result.out, result
    sql(shell.env["UNLOST_STORE"], harm)
    result = shell.quick("audit")
    assert result.code == 3 and "outbox, part 3: " in result.out and said in " ".join(result.out.split()), result
    found = shell.quick("doctor", "--json").json["findings"]
    red([Finding(**f) for f in found], "UL4410", "error", "part 3")


# --- the outbox ------------------------------------------------------------------------------------------------------


def accept(shell: Shell, *ids: str) -> None:
    """Puts events into the outbox, as a web process without a relay does."""
    program = f"""
        import asyncio, os, psycopg
        from shop import app, OrderPlaced

        async def main():
            async with app:
                with psycopg.connect(os.environ["UNLOST_STORE"]) as connection, app.outbox(connection) as outbox:
                    for id in {ids!r}:
                        outbox.publish(OrderPlaced(order_id=id, total_cents=1))

        asyncio.run(main())
    """
    shell.write("web.py", program)
    done = subprocess.run(
        [sys.executable, "web.py"], cwd=shell.folder, env=shell.env, capture_output=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr.decode()


def test_what_waits_in_the_outbox_is_shown(shell: Shell) -> None:
    place(shell, "A")
    work(shell)
    accept(shell, "B1", "B2", "B3")
    url = shell.env["UNLOST_STORE"]
    sql(
        url,
        "update unlost.unlost_outbox set added = now() - interval '10 minutes' where seq = (select min(seq) from unlost.unlost_outbox)",
    )
    found = shell.quick("status", "--json").json["outbox"]
    assert (found["events"], found["orphaned"], found["in_hands"], found["refused"]) == (3, 16, 0, False)
    assert 600 <= found["age"] < 660 and found["oldest"] is not None
    line = "outbox  3 events accepted and not in the log yet, the oldest for 10 m; nobody sends them: unlost run"
    assert line in shell.quick("status").out
    result = shell.quick("audit")
    assert result.code == 0 and line in result.out, "what is in no log yet is in nobody's books, and not lost"
    assert shell.quick("audit", "--json").json["outbox"]["events"] == 3
    red(diagnosed(shell), "UL4409", "error", "no process sends them")
    work(shell)
    assert shell.quick("status", "--json").json["outbox"]["events"] == 0 and book(shell)["done"] == 4
    red(diagnosed(shell), "UL4409", "ok")


def test_what_the_broker_does_not_take_is_shown(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relay that lives, and the first event in its hands is not confirmed for a minute."""
    url = shell.env["UNLOST_STORE"]
    with at_work(shell) as running:
        until(lambda: shell.quick("status", "--json").json["outbox"]["orphaned"] == 0, "the relay")
        stop_still(running, shell.env["UNLOST_STORE"])
        sql(url, IN_HANDS)
        sql(url, "update unlost.unlost_outbox_status set claimed = now() - interval '61 seconds'")
        sql(url, "update unlost.unlost_outbox set added = now() - interval '62 seconds'")
        found = shell.quick("status", "--json").json["outbox"]
        assert found["refused"] and found["in_hands"] == 1 and found["relays"][0]["pid"] == running.process.pid
        assert "the broker has not taken the first of them" in shell.quick("status").out
        red(diagnosed(shell), "UL4409", "warning", "not confirmed for 60 s")
        sql(url, "update unlost.unlost_relay set process = null where shard < 4")
        assert "nobody sends 4 of its 16 parts yet" in shell.quick("status").out
        sql(url, "update unlost.unlost_process set seen = now() - interval '1 minute'")
        found = shell.quick("status", "--json").json["outbox"]
        assert (found["relays"], found["orphaned"]) == ([], 16), "others would take its place"
        running.process.send_signal(signal.SIGCONT)
        running.process.kill()


def test_something_else_may_send_what_stands_there(tmp_path: Path) -> None:
    """Debezium in place of our relay reads the table through logical replication."""
    require_postgres(own=True)
    with Postgres.start(settings={"wal_level": "logical"}, own=True) as server:
        url = server.fresh()
        migrations.migrate(url, operator="test", reason="")
        shell = shop(tmp_path, url)
        place(shell, "A")
        sql(url, IN_HANDS)
        assert "nobody sends them" in shell.quick("status").out
        sql(url, "create publication outbox for table unlost.unlost_outbox")
        command = [
            str(binaries() / "pg_recvlogical"),
            "-d",
            url,
            "--slot",
            "debezium",
            "--create-slot",
            "--start",
            "-P",
            "pgoutput",
        ]
        command += ["-o", "proto_version=1", "-o", "publication_names=outbox", "-f", os.devnull]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as reader:
            until(lambda: shell.quick("status", "--json").json["outbox"]["streams"] == ["debezium"], "it reads")
            assert "the replication slot debezium reads them" in shell.quick("status").out
            red(diagnosed(shell), "UL4409", "note", "debezium")
            reader.terminate()
        until(lambda: "nobody sends them" in shell.quick("status").out, "it has stopped")


# --- the shelf -------------------------------------------------------------------------------------------------------


def test_a_letter_is_brought_back_by_whoever_has_its_partition(shell: Shell) -> None:
    place(shell, "bad", cents=0)
    place(shell, "bad")
    place(shell, "worse", cents=0)
    work(shell)
    shell.write("shop.py", CURED)
    with at_work(shell) as running:
        until(lambda: shell.quick("status", "--json").json["services"][0]["owned"] == 2, "its owner")
        result = shell.quick("dead", "redrive", "--key", "bad", "--yes", "--reason", "cured", "--operator", "ann")
        assert result.code == 0 and "1 redriven" in result.out, result
        until(lambda: idle(shell), "handled")
        assert shell.quick("dead", "discard", "--key", "worse", "--yes").code == 0
        assert running.end(signal.SIGTERM) == 0
    found = book(shell)
    assert (found["done"], found["removed"], found["dead"], found["parked"]) == (2, 1, 0, 0), found
    rows = sql(shell.env["UNLOST_STORE"], "select operator, action, reason, carried_out is not null from unlost.unlost_operation order by number")  # fmt: skip
    assert rows[1] == ("ann", "redrive", "cured", True) and rows[2][1] == "discard"
    assert shell.quick("audit").code == 0


def test_a_letter_is_brought_back_where_nobody_lives(shell: Shell) -> None:
    place(shell, "bad", cents=0)
    place(shell, "bad")
    with at_work(shell) as running:
        until(lambda: shell.quick("dead", "list", "--json").json["letters"], "the dead letter")
        until(lambda: idle(shell), "its follower")
        running.process.kill()
        running.process.wait()
    before = epochs(shell)
    dry = shell.quick("dead", "redrive", "--all", "--dry-run")
    assert dry.code == 0 and "1 would be redriven; nothing was changed" in dry.out, dry
    asked = shell.quick("dead", "redrive", "--all", "--yes", "--json").json
    assert (asked["carried_out"], asked["pending"]) == (1, 0), "nobody has to be waited for"
    after = epochs(shell)
    assert sum(after.values()) == sum(before.values()) + 1, "whoever comes back is fenced"
    assert shell.quick("audit").code == 0
    shell.write("shop.py", CURED)
    work(shell)
    assert (book(shell)["done"], book(shell)["dead"]) == (2, 0)
    assert "there is no dead letter" in shell.quick("dead", "redrive", "1", "--yes").err


def epochs(shell: Shell) -> dict[tuple[str, int], int]:
    rows = sql(shell.env["UNLOST_STORE"], "select service, partition, epoch from unlost.unlost_progress")
    return {(service, partition): epoch for service, partition, epoch in rows}


def test_an_owner_that_stands_still_is_not_gone_past(shell: Shell) -> None:
    """It may have events of the key in its hands. When it dies, who asked does it at once."""
    place(shell, "bad", cents=0)
    with at_work(shell) as running:
        until(lambda: shell.quick("dead", "list", "--json").json["letters"], "the dead letter")
        stop_still(running, shell.env["UNLOST_STORE"])
        with looking(shell) as here:
            (letter,) = shelf.letters(here.records)
            asked = shelf.ask(
                here.records, "redrive", [letter], operator="ann", reason="", wait_seconds=0.2, group=here.file
            )
            assert (asked.carried_out, asked.pending) == (0, 1)
            assert shelf.letters(here.records)[0].request == "redrive"
            killer = threading.Timer(0.3, running.process.kill)
            killer.start()
            asked = shelf.ask(
                here.records, "discard", [letter], operator="ann", reason="", wait_seconds=20, group=here.file
            )
            assert (asked.carried_out, asked.pending) == (1, 0)
            killer.join()
    assert book(shell)["removed"] == 1


def test_whoever_is_about_to_take_a_partition_is_asked(shell: Shell) -> None:
    """The embedded broker has given it away, the store does not know yet."""
    place(shell, "bad", cents=0)
    work(shell)
    other = File(shell.database, check_tail=False)  # a process that lives
    try:
        give = "update unlost_assignment set process = ? where service = 'billing'"
        other.write_sync(lambda tx: tx.execute(give, (other.process_id,)) and None)
        join = "insert into unlost_member values ('billing', 'order', ?, 1)"
        other.write_sync(lambda tx: tx.execute(join, (other.process_id,)) and None)
        (process,) = shell.quick("status", "--json").json["services"][0]["processes"]
        assert (process["alive"], process["partitions"]) == (True, 2)
        with looking(shell) as here:
            letters = shelf.letters(here.records)
            asked = shelf.ask(
                here.records, "discard", letters, operator="ann", reason="", wait_seconds=0.1, group=here.file
            )
            assert asked.pending == 1
            other.write_sync(lambda tx: tx.execute(give, (None,)) and None)
            asked = shelf.ask(
                here.records, "discard", letters, operator="ann", reason="", wait_seconds=0.1, group=here.file
            )
            assert asked.carried_out == 1
    finally:
        other.close()


async def test_many_letters_are_few_commits_and_no_owner_comes_between(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service("billing", retry=Retry(attempts=1))
    count, cured = 1203, False

    @service.on(Placed, on_dead="skip", concurrency=64)
    async def charge(_: Placed) -> None:
        if not cured:
            raise Reject("no")

    app = App(
        service, broker=f"embedded://{tmp_path / 'events.db'}", store=store, topics=[Topic("order", partitions=4)]
    )
    async with app:
        for n in range(0, count, 401):
            await app.publish_all([Placed(order_id=f"A{i}") for i in range(n, min(count, n + 401))])
        serving = asyncio.create_task(app.serve())
        records = await asyncio.to_thread(stores.records, store)
        await asyncio.to_thread(until, lambda: len(shelf.letters(records)) == count, "all are dead")
        app.stop()
        await serving
        commits: list[str] = []
        original = PostgresRecords.write
        monkeypatch.setattr(PostgresRecords, "write", lambda self, do: (commits.append(""), original(self, do))[1])
        found = shelf.letters(records)
        asked = await asyncio.to_thread(shelf.ask, records, "redrive", found, operator="ann", reason="cured")
        assert (asked.carried_out, asked.pending, len(commits)) == (count, 0, 3)
        operations = dict(sql(store, "select id, carried_out from unlost.unlost_operation where action = 'redrive'"))
        assert set(operations) == {letter.id for letter in found} and all(operations.values())
        cured = True
        serving = asyncio.create_task(app.serve())
        await asyncio.to_thread(
            until, lambda: books(records, log=_log(app)).services["billing"].done == count, "all are done"
        )
        app.stop()
        await serving
        assert books(records, log=_log(app)).balanced
        records.close()


def _log(app: App) -> Any:
    from unlost.brokers.embedded.log import EmbeddedLog

    return EmbeddedLog(app.file)


async def test_an_owner_that_slept_is_fenced_by_an_operator(tmp_path: Path, store: str) -> None:
    unit = Unit("billing", "order", 0)
    owner = PostgresStore(parse(store), broker="kafka c")
    await owner.open()
    try:
        from unlost.events.topic import TopicInfo

        topic = TopicInfo(name="order", id="t", partitions=1, ranges=[(0, 0)])
        await owner.register("billing", {"on_dead": "park"}, [topic])
        (taken,) = await owner.take([unit])
        with recorded(store) as records:
            assert records.write(lambda look: records.take_over(look, [unit])) == [], "it lives"
            sql(
                store, "update unlost.unlost_process set number = default"
            )  # its session is lost: another lock is looked for
            assert records.write(lambda look: records.take_over(look, [unit])) == [unit]
        settlement = Settlement(
            unit, taken.epoch, [Outcome(arrival=Arrival(0, None, 0, b"", None, None), state="done")]
        )
        assert await owner.settle([settlement]) == [unit], "its epoch is over"
        with pytest.raises(Fenced):
            await owner.carry_out(shelf.Request(unit, 0, None, "redrive"), taken.epoch)
    finally:
        await owner.close()


def test_a_commit_whose_end_was_not_seen_is_not_called_a_failure(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with recorded(store) as records:
        assert isinstance(records, PostgresRecords)

        def lose(_: Any) -> None:
            sql(
                store,
                "select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid() and datname = current_database()",
            )

        with pytest.raises(OutcomeUnknown, match="UL2014"):
            records.write(lose)
        with pytest.raises(Unavailable):
            records.read(lambda look: look.execute("select 1"))


def test_a_row_that_somebody_holds_for_good_is_not_waited_for_for_ever(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(shell, "bad", cents=0)
    work(shell)
    monkeypatch.setattr("unlost.store.postgres.records.LOCK_SECONDS", 0.2)
    with psycopg.connect(shell.env["UNLOST_STORE"]) as connection:
        connection.execute("update unlost.unlost_progress set epoch = epoch + 1")
        result = shell.quick("dead", "discard", "--all", "--yes")
        assert result.code == 4 and "UL2012" in result.err and "lock timeout" in result.err, result
        connection.rollback()
    assert shell.quick("dead", "list", "--json").json["letters"][0]["request"] is None, "surely nothing was written"
    assert shell.quick("dead", "discard", "--all", "--yes").code == 0


def test_what_an_operator_has_done_is_on_the_disk(store: str) -> None:
    """Whatever the role's default says."""
    user = urlsplit(store).username
    sql(store, f'alter role "{user}" in database "{urlsplit(store).path[1:]}" set synchronous_commit = off')
    with recorded(store) as records:
        show = "select current_setting('synchronous_commit'), current_setting('transaction_isolation')"
        assert records.write(lambda look: look.execute(show).fetchone()) == ("on", "read committed")
        assert records.read(lambda look: look.execute(show).fetchone()) == ("off", "repeatable read")
        with pytest.raises(UnlostError):
            records.read(lambda look: look.execute("delete from unlost_shelf"))
        assert records.read(lambda look: records.read(lambda inner: inner is look)), (
            "a read inside of a read is the same"
        )


# --- which store -----------------------------------------------------------------------------------------------------


def test_books_that_are_kept_elsewhere_are_not_called_empty(shell: Shell, postgres: Postgres) -> None:
    place(shell, "A", "B")
    work(shell)
    store = shell.env["UNLOST_STORE"]
    for command in (["status"], ["audit"], ["dead", "list"], ["dead", "redrive", "--all", "--yes"]):
        result = shell.quick(*command, UNLOST_STORE="")
        assert result.code == 2 and "UL1304" in result.err and "UNLOST_STORE" in result.err, result
        assert "billing, shipping" in result.err
    assert shell.quick("tail", UNLOST_STORE="").code == 0, "the log is here"
    topics = shell.quick("topic", "list", UNLOST_STORE="")
    assert topics.code == 0 and "kept in another store" in topics.err and "nobody" not in topics.out, topics
    red(diagnosed(shell, UNLOST_STORE=""), "UL4401", "error", "UL1304")
    other = f"{store}?schema=other"
    migrations.migrate(other, operator="test", reason="")
    result = shell.quick("status", UNLOST_STORE=other)
    assert result.code == 2 and "UL1304" in result.err and "schema=other" in result.err, result
    assert shell.quick("status").code == 0


def test_a_store_in_the_file_is_not_called_empty_either(tmp_path: Path, store: str) -> None:
    shell = shop(tmp_path, store)
    with shell.start("run", "shop", UNLOST_STORE="") as running:
        running.says("unlost: ")
        assert running.end(signal.SIGTERM) == 0
    result = shell.quick("audit")
    assert result.code == 2 and "UL1304" in result.err and "leave UNLOST_STORE empty" in result.err, result
    assert shell.quick("audit", UNLOST_STORE="").code == 0


def test_services_of_one_broker_with_stores_of_their_own(shell: Shell) -> None:
    """Each sees its own, and says whose it does not see."""
    other = f"{shell.env['UNLOST_STORE']}?schema=other"
    migrations.migrate(other, operator="test", reason="")
    text = SHOP.replace("App(billing, shipping,", "App({},")
    shell.write("one.py", text.format("billing"))
    shell.write("two.py", text.format("shipping"))
    shell.ok("publish", "OrderPlaced", "order_id=A", "total_cents=1", "--app", "one")
    for name, url in (("one", shell.env["UNLOST_STORE"]), ("two", other)):
        with shell.start("run", name, UNLOST_STORE=url) as running:
            running.says("unlost: ")

            def quiet(url: str = url) -> bool:
                found = shell.quick("status", "--json", UNLOST_STORE=url)
                return (
                    found.code == 0
                    and all(s["waiting"] + s["in_flight"] == 0 for s in found.json["services"])
                    and not found.json["outbox"]["events"]
                )

            until(quiet)
            assert running.end(signal.SIGTERM) == 0
    for url, own, foreign in ((shell.env["UNLOST_STORE"], "billing", "shipping"), (other, "shipping", "billing")):
        found = shell.quick("audit", "--json", UNLOST_STORE=url)
        assert found.code == 0 and [b["service"] for b in found.json["services"]] == [own], found
        assert found.json["elsewhere"] == [foreign]
        assert shell.quick("status", "--json", UNLOST_STORE=url).json["elsewhere"] == [foreign]
        assert (
            f"kept in another store (UNLOST_STORE names one at a time): {foreign}"
            in shell.quick("status", UNLOST_STORE=url).err
        )
        red(diagnosed(shell, UNLOST_STORE=url), "UL4401", "note", foreign)


def test_a_store_of_another_broker(shell: Shell) -> None:
    place(shell, "A")
    work(shell)
    another = Shell(shell.folder / "another") if (shell.folder / "another").mkdir() is None else shell
    another.place("X")
    result = shell.quick("audit", "--broker", f"embedded://{another.database}")
    assert result.code == 2 and ("UL1133" in result.err or "UL1304" in result.err), result
    found = diagnosed(shell, "--broker", f"embedded://{another.database}")
    assert any((f.code == "UL4402" and f.severity == "error") or "UL1304" in f.what for f in found), found


def test_a_server_that_does_not_answer(shell: Shell) -> None:
    place(shell, "A")
    away = "postgresql://ann:secret@127.0.0.1:9/shop"
    for command in (["status"], ["audit"], ["dead", "list"]):
        result = shell.quick(*command, UNLOST_STORE=away)
        assert result.code == 4 and "UL2012" in result.err and "secret" not in result.err, result
    topics = shell.quick("topic", "list", UNLOST_STORE=away)
    assert topics.code == 0 and "who reads them is not known" in topics.err, topics
    assert shell.quick("tail", UNLOST_STORE=away).code == 0
    result = shell.quick("doctor", UNLOST_STORE=away)
    assert result.code == 1 and "UL2012" in result.out, result


# --- unlost store migrate --------------------------------------------------------------------------------------------


def test_migrate_makes_the_tables_and_records_who_did(tmp_path: Path, database: str) -> None:
    shell = shop(tmp_path, database)
    assert "UL1160" in shell.quick("run", "shop").err
    dry = shell.quick("store", "migrate", "--dry-run")
    assert dry.code == 0 and "would be made; nothing was changed" in dry.out, dry
    assert sql(database, "select count(*) from pg_namespace where nspname = 'unlost'") == [(0,)]
    done = shell.quick("store", "migrate", "--reason", "first release", "--operator", "ann")
    assert done.code == 0 and f"tables of format {schema.FORMAT} are made" in done.out, done
    row = sql(database, "select operator, action, reason, result from unlost.unlost_operation")
    assert row == [("ann", "migrate", "first release", f"format 0 to {schema.FORMAT}")]
    again = shell.quick("store", "migrate", "--json")
    assert again.code == 0 and again.json["schema"] == "unlost.migrate/1" and again.json["done"] is False
    assert list(again.json) == ["schema", "store", "found", "format", "role", "done", "dry_run", "sql"]
    assert len(sql(database, "select 1 from unlost.unlost_operation")) == 1
    place(shell, "A")
    work(shell)


def test_a_role_gets_what_a_service_needs_and_no_more(
    tmp_path: Path, database: str, postgres: Postgres, role: str
) -> None:
    service = as_role(postgres, database, role)
    shell = shop(tmp_path, service)
    refused = shell.quick("store", "migrate")
    assert refused.code == 2 and "UL1162" in refused.err, refused
    assert shell.quick("store", "migrate", "--store", database, "--role", role).code == 0
    place(shell, "A")
    place(shell, "bad", cents=0)
    work(shell)
    assert shell.quick("dead", "discard", "--all", "--yes").code == 0 and shell.quick("audit").code == 0
    red(diagnosed(shell), "UL4608", "ok")
    with pytest.raises(UsageError, match="UL1167"):
        migrations.migrate(database, role="nobody-knows", operator="x", reason="")


@pytest.fixture
def role(postgres: Postgres) -> Iterator[str]:
    """A role without rights, that may only log in."""
    name = f"role_{os.getpid()}_{time.monotonic_ns()}"
    postgres.sql(f"create role {name} login password 'secret'")
    yield name
    for (database,) in postgres.sql("select datname from pg_database where datallowconn and datname <> 'template0'"):
        try:
            postgres.sql(f"drop owned by {name}", database=database)
        except psycopg.Error:  # of another test, and going away
            continue
    try:
        postgres.sql(f"drop role {name}")
    except psycopg.Error:  # something of it is left in a database that is going away
        postgres.sql(f"alter role {name} nologin")


def as_role(postgres: Postgres, database: str, role: str) -> str:
    return postgres.url(urlsplit(database).path[1:], user=role, password="secret")


def test_a_schema_that_is_there_needs_no_right_to_make_one(database: str, postgres: Postgres, role: str) -> None:
    """As on servers of others: the role owns a schema, and may not make any."""
    sql(database, f"create schema shop authorization {role}")
    url = f"{as_role(postgres, database, role)}?schema=shop"
    assert migrations.migrate(url, operator="ann", reason="") == (0, schema.FORMAT)
    with recorded(url) as records:
        assert records.id


def test_the_script_for_an_administrator(tmp_path: Path, database: str, postgres: Postgres, role: str) -> None:
    shell = shop(tmp_path, database)
    printed = shell.quick("store", "migrate", "--sql", "--role", role)
    assert printed.code == 0 and printed.out.startswith("begin;") and printed.out.rstrip().endswith("commit;"), printed
    assert sql(database, "select count(*) from pg_namespace where nspname = 'unlost'") == [(0,)], "it only prints"
    sql(database, printed.out.replace("begin;", "").replace("commit;", ""))
    assert shell.quick("store", "migrate").out.startswith("nothing to do")
    assert shell.quick("store", "migrate", "--sql").out == "-- nothing to do\n"
    work_as = shop(tmp_path, as_role(postgres, database, role))
    place(work_as, "A")
    work(work_as)
    for url in (
        "postgresql://ann:secret@127.0.0.1:9/shop",
        as_role(postgres, database, role).replace(":secret@", ":wrong@"),
    ):
        away = shell.quick("store", "migrate", "--sql", "--store", url)
        assert away.code == 0 and "create table" in away.out and "nobody looked" in away.err, away
        assert "secret" not in away.err + away.out and "wrong" not in away.err + away.out
        assert shell.quick("store", "migrate", "--store", url).code in (2, 4)
        known = shell.quick("store", "migrate", "--sql", "--store", url, "--from", str(schema.FORMAT))
        assert known.code == 0 and known.out == "-- nothing to do\n" and not known.err, known
    for wrong in (["--from", "0"], ["--sql", "--from", "9"], ["--sql", "--from", "x"]):
        result = shell.quick("store", "migrate", *wrong)
        assert result.code == 2 and ("UL1341" in result.err or "UL1342" in result.err), result


def test_a_file_needs_no_migration(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    for env in ({}, {"UNLOST_STORE": "embedded:///x/store.db"}):
        result = shell.quick("store", "migrate", **env)
        assert result.code == 0 and "nothing to do: a store in a file makes its tables by itself" in result.out
    assert shell.quick("store", "migrate", "--sql", "--json").json["done"] is False
    assert "UL1141" in shell.quick("store", "migrate", "--store", "postgresq://db/shop").err
    assert "store" in shell.quick("--help").out and "--role" in shell.quick("store", "migrate", "--help").out


def test_an_upgrade_is_asked_for(tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next format, as a release to come will have it."""
    newer = schema.FORMAT + 1
    shell = shop(tmp_path, store)
    for module in (schema, migrating, migrations):
        monkeypatch.setattr(module, "FORMAT", newer)
    monkeypatch.setitem(schema.LATER, newer, "alter table {s}.unlost_shelf add column weight integer;")
    refused = shell.quick("store", "migrate")
    assert refused.code == 2 and "UL1333" in refused.err, refused
    assert (
        f"tables of format {newer - 1} would be brought to {newer}" in shell.quick("store", "migrate", "--dry-run").out
    )
    assert "add column weight" in shell.quick("store", "migrate", "--sql").out
    done = shell.quick("store", "migrate", "--yes")
    assert done.code == 0 and f"are brought to {newer}" in done.out, done
    assert sql(store, "select value from unlost.unlost_meta where name = 'format'") == [(str(newer),)]
    monkeypatch.undo()
    result = shell.quick("store", "migrate")
    assert result.code == 2 and "UL1158" in result.err, "this release does not know it"
    red(diagnosed(shell, "--broker", "embedded:none.db"), "UL4607", "error", "newer release")


def test_tables_of_others_are_left_alone(tmp_path: Path, database: str) -> None:
    sql(database, "create schema unlost; create table unlost.unlost_outbox (x integer)")
    result = shop(tmp_path, database).quick("store", "migrate", "--yes")
    assert result.code == 2 and "UL1161" in result.err, result
    assert sql(database, "select count(*) from pg_class where relname like 'unlost%' and relkind = 'r'") == [(1,)]


# --- unlost doctor ---------------------------------------------------------------------------------------------------


def red(found: Sequence[Finding], code: str, severity: str, text: str = "") -> Finding:
    """The finding of this code that is as bad as said."""
    for f in found:
        if f.code == code and f.severity == severity and text in f"{f.what} {f.evidence} {f.fix}":
            assert severity in ("ok", "note") or f.fix, f
            return f
    raise AssertionError(f"no {severity} {code} with {text!r} in {[f for f in found if f.code == code] or found}")


def diagnosed(shell: Shell, *arguments: str, **env: str) -> list[Finding]:
    result = shell.quick("doctor", "--json", *arguments, **env)
    assert result.code in (0, 1), result
    return [Finding(**f) for f in result.json["findings"]]


def examined(url: str) -> list[Finding]:
    return check_postgres(stores.examine(url))


def facts(**changes: Any) -> Facts:
    """A server in good order."""
    good = Facts(
        shown="postgresql://db/shop", schema="unlost", role="shop", version=150000, version_text="15.0", encoding="UTF8",
        replica=False, read_only=False, settings={}, encrypted=True, remote=True, pooler=False, ahead=0.0, blur=0.0, there=True,
        format=str(schema.FORMAT), limit=100, tables={"unlost_outbox": Table(10, 10, True)},
    )  # fmt: skip
    return msgspec.structs.replace(good, **changes)


def test_a_store_in_good_order(shell: Shell) -> None:
    place(shell, "A")
    work(shell)
    result = shell.quick("doctor", "--all")
    assert result.code == 0 and "0 errors, 0 warnings" in result.out, result
    codes = {f.code for f in diagnosed(shell)}
    assert {f"UL46{n:02}" for n in range(1, 18)} - {"UL4618"} <= codes and {
        "UL4402",
        "UL4409",
        "UL4410",
        "UL4406",
    } <= codes
    assert not [f for f in check_postgres(facts()) if f.severity != "ok"]


def test_before_anything_was_started(tmp_path: Path, database: str) -> None:
    shell = shop(tmp_path, database)
    found = diagnosed(shell)
    red(found, "UL4607", "error", "unlost store migrate")
    red(found, "UL4401", "note", "no broker file yet")
    migrations.migrate(database, operator="test", reason="")
    assert shell.quick("doctor").code == 0
    assert not shell.database.exists(), "looking makes nothing"


def test_a_server_that_forgets() -> None:
    require_postgres(own=True)
    with Postgres.start(settings={"fsync": "off", "full_page_writes": "off", "autovacuum": "off", "synchronous_commit": "off"}, own=True) as server:  # fmt: skip
        url = server.fresh()
        migrations.migrate(url, operator="test", reason="")
        found = examined(url)
        red(found, "UL4602", "error", "fsync = off")
        red(found, "UL4602", "error", "full_page_writes = off")
        red(found, "UL4603", "warning", "configuration file")
        red(found, "UL4613", "warning", "autovacuum is off")


def test_settings_of_a_role_and_of_a_database(store: str) -> None:
    name, user = urlsplit(store).path[1:], urlsplit(store).username
    sql(store, f'alter database "{name}" set synchronous_commit = off')
    red(examined(store), "UL4603", "warning", "database")
    sql(store, f'alter role "{user}" in database "{name}" set synchronous_commit = on')
    red(examined(store), "UL4603", "ok", "database user")
    sql(store, f'alter database "{name}" set idle_session_timeout = 5000')
    red(examined(store), "UL4617", "warning", "idle_session_timeout = 5000")
    sql(store, f'alter database "{name}" set statement_timeout = 100')
    red(examined(store), "UL4617", "warning", "statement_timeout = 100")
    sql(store, f'alter database "{name}" set default_transaction_read_only = on')
    red(examined(store), "UL4604", "error", "read-only")


def test_a_replica_and_an_old_server() -> None:
    red(check_postgres(facts(replica=True)), "UL4604", "error", "replica")
    red(check_postgres(facts(version=120000, version_text="12")), "UL4601", "error", "12")
    red(check_postgres(facts(version=130022)), "UL4601", "warning", "no corrections")
    red(check_postgres(facts(encrypted=False)), "UL4609", "warning", "plain text")
    red(check_postgres(facts(encrypted=False, remote=False)), "UL4609", "ok")
    red(check_postgres(facts(format="")), "UL4607", "error", "format: unknown")


def test_a_pooler_that_shares_sessions(store: str, pgbouncer: PgBouncer) -> None:
    red(examined(pgbouncer.via(store)), "UL4605", "error", "pooler")


def test_a_database_in_another_encoding(postgres: Postgres) -> None:
    name = f"latin_{os.getpid()}"
    postgres.sql(f"create database {name} encoding 'LATIN1' lc_collate 'C' lc_ctype 'C' template template0")
    try:
        red(examined(postgres.url(name)), "UL4606", "error", "LATIN1")
    finally:
        postgres.drop_database(name)


def test_tables_that_are_not_all_there(store: str) -> None:
    sql(store, "drop table unlost.unlost_copy")
    red(examined(store), "UL4607", "error", "unlost_copy")
    sql(store, "update unlost.unlost_meta set value = '0' where name = 'format'")
    assert any(f.code == "UL4607" and f.severity == "error" for f in examined(store))


def test_rights_that_are_missing(store: str, postgres: Postgres, role: str) -> None:
    url = as_role(postgres, store, role)
    red(examined(url), "UL4608", "error", "usage on schema unlost")
    migrations.migrate(store, role=role, operator="test", reason="")
    sql(store, f"revoke delete, update on unlost.unlost_outbox from {role}")
    found = examined(url)
    fix = red(found, "UL4608", "error", "delete on unlost_outbox, update on unlost_outbox").fix
    assert f"--role {role}" in fix
    red(found, "UL4607", "ok")
    red(found, "UL4610", "ok")


def test_what_a_role_may_not_see_is_said(
    store: str, postgres: Postgres, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    migrations.migrate(store, role=role, operator="test", reason="")
    with psycopg.connect(store):
        red(examined(as_role(postgres, store, role)), "UL4612", "note", "pg_read_all_stats")
    monkeypatch.setattr(examining._Examiner, "_dead_rows", lambda self, found: self._rows("select 1 from pg_authid"))
    found = examined(as_role(postgres, store, role))
    red(found, "UL4618", "note", "not checked: dead rows")
    assert not [f for f in found if f.code == "UL4613"], "a check that was not made never counts as passed"


def test_transactions_that_are_open_for_long(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    red(examined(store), "UL4612", "ok")
    monkeypatch.setattr(examining, "LONG_SECONDS", 0.0)
    with psycopg.connect(f"{store}?application_name=forgotten") as connection:
        connection.execute("select 1")
        red(examined(store), "UL4612", "warning", "forgotten")
    red(check_postgres(facts(held=[Held("the prepared transaction 'x'", 400)])), "UL4612", "warning", "400 s")


def test_dead_rows(store: str) -> None:
    sql(store, "alter table unlost.unlost_outbox set (autovacuum_enabled = false)")
    red(examined(store), "UL4613", "warning", "nobody cleans unlost_outbox")
    many = {"unlost_outbox": Table(5, 2_000_000, True), "unlost_progress": Table(5, 5, True)}
    red(check_postgres(facts(tables=many)), "UL4613", "warning", "2,000,000 dead rows")
    red(
        check_postgres(facts(tables={"unlost_progress": Table(5, 200_000, True)})),
        "UL4613",
        "warning",
        "unlost_progress",
    )


def test_a_sequence_that_hands_out_numbers_in_advance(store: str) -> None:
    red(examined(store), "UL4614", "ok")
    sql(store, "alter table unlost.unlost_outbox alter column seq set cache 20")
    red(examined(store), "UL4614", "error", "cache 20")


def test_connections_that_run_out(store: str, postgres: Postgres, role: str) -> None:
    migrations.migrate(store, role=role, operator="test", reason="")
    sql(store, f"alter role {role} connection limit 3")
    red(examined(as_role(postgres, store, role)), "UL4610", "ok")
    url = as_role(postgres, store, role)
    with psycopg.connect(url), psycopg.connect(url):
        found = examined(url)
        red(found, "UL4610", "warning", f"3 of 3 are used (connection limit of the role {role})")
        red(found, "UL4618", "note", "not checked: poolers")
    red(check_postgres(facts(used=90, limit=100, limit_of="max_connections")), "UL4610", "warning", "90 of 100")


def test_clocks_inbox_and_processes() -> None:
    red(check_postgres(facts(ahead=40.0, blur=1.0)), "UL4611", "warning", "40 s ahead")
    red(check_postgres(facts(ahead=-40.0, blur=1.0)), "UL4611", "warning", "40 s behind")
    red(check_postgres(facts(ahead=40.0, blur=20.0)), "UL4611", "ok")
    red(check_postgres(facts(inbox=(10**9, 10**11))), "UL4615", "note", "100,000 MB")
    red(check_postgres(facts(absent=[Absent(7, "h", 99.0, True, 3)])), "UL4616", "warning", "pid 7 on h, for 99 s")
    red(
        check_postgres(facts(absent=[Absent(7, "h", 99.0, False, 3)])),
        "UL4616",
        "warning",
        "nobody has taken its partitions",
    )
    red(check_postgres(facts(absent=[Absent(7, "h", 99.0, False, 0)])), "UL4616", "ok")


def test_the_clock_is_really_compared(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert abs(stores.examine(store).ahead) < 5
    real = examining.REAL.now
    monkeypatch.setattr(examining.REAL, "now", lambda: real() - 100_000_000)
    red(examined(store), "UL4611", "warning", "100 s ahead")


def test_a_process_that_stands_still_and_one_that_died(shell: Shell) -> None:
    place(shell, "A")
    url = shell.env["UNLOST_STORE"]
    with at_work(shell) as running:
        until(lambda: shell.quick("status", "--json").json["services"][0]["owned"] == 2, "its owner")
        stop_still(running, shell.env["UNLOST_STORE"])
        sql(url, "update unlost.unlost_process set seen = now() - interval '1 minute'")
        red(examined(url), "UL4616", "warning", f"pid {running.process.pid}")
        running.process.kill()
        running.process.wait()
        until(lambda: any("has died" in f.what for f in examined(url) if f.code == "UL4616"), "its session is gone")


def test_an_older_store_came_back(shell: Shell) -> None:
    place(shell, "A", "B")
    work(shell)
    found = diagnosed(shell)
    red(found, "UL4406", "ok")
    sql(shell.env["UNLOST_STORE"], "update unlost.unlost_progress set position = 0 where service = 'billing'")
    fix = red(diagnosed(shell), "UL4407", "error", "the broker's file was told").fix
    assert "kafka" not in fix
    file = File(shell.database, check_tail=False)
    file.write_sync(lambda tx: tx.execute("delete from unlost_follower where service = 'shipping'") and None)
    file.close()
    red(diagnosed(shell), "UL4405", "warning", "unlost_follower")


# --- secrets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["in the URL", "as a parameter", "in a file"])
def test_no_command_shows_a_password(tmp_path: Path, store: str, postgres: Postgres, role: str, how: str) -> None:
    migrations.migrate(store, role=role, operator="test", reason="")
    sql(store, f"alter role {role} password '{CANARY}'")
    parts = urlsplit(store)
    host = parts.netloc.rpartition("@")[2]
    secret = quote(CANARY, safe="")
    url = f"postgresql://{role}:{secret}@{host}{parts.path}"
    if how == "as a parameter":
        url = f"postgresql://{host}{parts.path}?user={role}&password={secret}"
    shell = shop(tmp_path, url)
    if how == "in a file":
        del shell.env["UNLOST_STORE"]
        shell.env["UNLOST_STORE_FILE"] = str(shell.write("secret.txt", url + "\n"))
    said: list[str] = []

    def run(*arguments: str, code: int | None = 0, **env: str) -> Result:
        result = shell.quick(*arguments, **env)
        assert code is None or result.code == code, result
        said.append(result.out + result.err)
        return result

    place(shell, "A")
    place(shell, "bad", cents=0)
    with at_work(shell) as running:
        until(lambda: shell.quick("dead", "list", "--json").json["letters"], "handled")
        assert running.end(signal.SIGTERM) == 0
        said.append(running.text())
        assert "***" in running.text() or how == "as a parameter", running.text()
    for command in (
        ["status"],
        ["audit"],
        ["dead", "list"],
        ["doctor", "--all"],
        ["topic", "list"],
        ["config"],
        ["tail"],
    ):
        run(*command)
        run(*command, "--json")
    run("dead", "discard", "--all", "--yes")
    run("config", "--app", "shop")
    run("store", "migrate")
    run("store", "migrate", "--sql", "--role", "x")
    wrong = url.replace(secret, f"{secret}-wrong")
    away = url.replace(host, "127.0.0.1:9")
    words = f"host=127.0.0.1 user={role} password='{CANARY}' dbname=x"
    broken = url.replace(parts.path, "")
    for bad in (
        wrong,
        away,
        broken,
        f"{url}{'&' if '?' in url else '?'}schema=1",
        url.replace("postgresql", "postgresq"),
        words,
    ):
        for command in (
            ["status"],
            ["audit", "--json"],
            ["doctor", "--json"],
            ["store", "migrate"],
            ["run", "shop"],
            ["store", "migrate", "--sql"],
            ["config"],
        ):
            env = (
                {"UNLOST_STORE": bad} if how != "in a file" else {"UNLOST_STORE_FILE": str(shell.write("bad.txt", bad))}
            )
            run(*command, code=None, **env)
    for text in said:
        for shape in (CANARY, secret, CANARY.split()[0]):
            assert shape not in text, text


# --- with Kafka ------------------------------------------------------------------------------------------------------


def test_kafka_with_a_store_in_postgresql(tmp_path: Path, store: str, kafka: Any, fresh_prefix: str) -> None:
    broker = f"{kafka.url}?prefix={fresh_prefix}.&session.timeout.ms=6000"
    shell = shop(tmp_path, store, UNLOST_BROKER=broker)
    place(shell, *(f"A{n}" for n in range(4)))
    place(shell, "bad", cents=0)
    place(shell, "bad")
    work(shell)
    found = shell.quick("audit", "--json").json
    assert found["balanced"] and {b["service"]: b["done"] for b in found["services"]} == {"billing": 4, "shipping": 4}
    result = shell.quick("audit", "--verify", "--export")
    assert result.code == 0 and "statements written" in result.out and "compared with what was counted" in result.out, (
        result
    )
    diagnosis = diagnosed(shell)
    for code in ("UL4402", "UL4403", "UL4406", "UL4410", "UL4601"):
        red(diagnosis, code, "ok")
    assert not [f for f in diagnosis if f.code in ("UL4408", "UL4501")], "a store for several machines is no file"
    shell.write("shop.py", CURED)
    asked = shell.quick("dead", "redrive", "--all", "--yes", "--json").json
    assert (asked["carried_out"], asked["pending"]) == (1, 0)
    accept(shell, "B1")
    assert shell.quick("status", "--json").json["outbox"]["events"] == 1
    work(shell)
    assert (book(shell)["done"], book(shell)["dead"], book(shell)["parked"]) == (7, 0, 0)
    sql(store, "delete from unlost.unlost_progress where service = 'shipping' and partition = 1")
    assert shell.quick("audit").code == 3
    another = shell.quick("status", UNLOST_BROKER=f"{kafka.url}?prefix=another-{fresh_prefix}.")
    assert another.code == 2 and "UL1133" in another.err, another
    topics = shell.quick("topic", "list", "--json", UNLOST_STORE=f"{store}?schema=none")
    assert topics.code == 0 and topics.json["topics"][0]["services"] == []
