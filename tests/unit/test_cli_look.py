"""`unlost status`, `audit`, `topic list`, `config`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import apsw
import pytest
from cli_kit import Shell


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    shell = Shell(tmp_path_factory.mktemp("look"))
    shell.place("A1")
    shell.place("A2", 0)
    shell.ok("publish", "OrderShipped", "order_id=A1", "--app", "shop")
    shell.handle_all()
    return shell


@pytest.fixture
def used(prepared: Shell, tmp_path: Path) -> Shell:
    """Three events: one done, one dead, one that nobody wants."""
    shutil.copytree(prepared.folder, tmp_path, dirs_exist_ok=True)
    return Shell(tmp_path)


def harm(shell: Shell, sql: str) -> None:
    connection = apsw.Connection(str(shell.database))
    connection.execute(sql)
    connection.close()


LOOKING = [
    ["status"], ["audit"], ["audit", "--verify"], ["tail"], ["topic", "list"], ["dead", "list"], ["dead", "show", "1"],
    ["dead", "redrive", "1", "--yes"],
]  # fmt: skip


@pytest.mark.parametrize("arguments", LOOKING, ids=" ".join)
def test_looking_never_makes_a_file(shell: Shell, arguments: list[str]) -> None:
    before = sorted(shell.folder.iterdir())
    for more in ([], ["--json"]):
        result = shell.quick(*arguments, *more)
        assert result.code == 2
        assert f"UL1301: there is no broker file at {shell.database}" in result.err
    assert sorted(p for p in shell.folder.iterdir() if p.name != "__pycache__") == before


# --- status ----------------------------------------------------------------------------------------------


def test_status_says_what_to_do(shell: Shell) -> None:
    shell.place("A1", 0)
    shell.place("A1", 5)
    shell.place("A2", 5)
    out = shell.ok("status").out
    assert "billing: nobody runs it: unlost run --service billing" in out
    assert str(shell.database) in out and "1 topic, 3 events" in out
    assert all(len(line) <= 80 for line in out.splitlines()[1:])
    with shell.start("run", "shop") as running:
        running.says("charged A2")
        running.says("is dead (rejected)")
        found = shell.ok("status", "--json").json
        service = found["services"][0]
        assert (service["alive"], service["owned"], service["partitions"]) == (1, 8, 8)
        assert service["processes"][0]["pid"] == running.process.pid
        assert running.end() == 0
    out = shell.ok("status").out
    assert "billing: 1 dead (1 more wait behind them): unlost dead list --service billing" in out
    assert "nobody runs it" not in out


def test_status_sees_what_a_killed_process_had(shell: Shell) -> None:
    shell.write(
        "slow.py",
        """
        import asyncio
        from unlost import App, Event, Service
        class OrderPlaced(Event, key="order_id"):
            order_id: str
        s = Service("s")
        @s.on(OrderPlaced)
        async def handle(order: OrderPlaced) -> None:
            print("in hand", flush=True)
            await asyncio.sleep(600)
        app = App(s)
        """,
    )
    shell.ok("publish", "OrderPlaced", "order_id=A1", "--app", "slow")
    with shell.start("run", "slow") as running:
        running.says("in hand")
        s = shell.ok("status", "--json").json["services"][0]
        assert (s["in_flight"], s["waiting"], s["alive"]) == (1, 0, 1)
        assert s["oldest"] is not None
        running.process.kill()
        running.process.wait()
    s = shell.ok("status", "--json").json["services"][0]
    assert (s["in_flight"], s["waiting"], s["alive"]) == (0, 1, 0)
    assert "nobody runs it" in s["todo"][0]


STATUS_SERVICE = [
    "name", "on_dead", "processes", "partitions", "owned", "waiting", "in_flight", "retrying", "parked", "dead",
    "oldest", "next_retry", "requested", "hold", "retired", "todo", "units", "alive",
]  # fmt: skip


def test_the_schemas_are_stable(used: Shell) -> None:
    shell = used
    status = shell.quick("status", "--json").json
    assert list(status) == [
        "schema",
        "path",
        "bytes",
        "services",
        "topics",
        "broker",
        "outbox",
        "delayed",
        "unreachable",
        "elsewhere",
        "lost",
    ]
    assert status["schema"] == "unlost.status/1" and (status["outbox"], status["unreachable"]) == (None, None)
    assert list(status["services"][0]) == STATUS_SERVICE
    unit = next(u for u in status["services"][0]["units"] if u["highest_seen"])
    assert list(unit) == [
        "topic", "partition", "highest_seen", "highest_succeeded", "highest_sequential", "incompletes", "end",
    ]  # fmt: skip
    assert unit["highest_seen"] == unit["highest_sequential"] == unit["end"] and unit["incompletes"] == 0
    topics = shell.quick("topic", "list", "--json").json
    assert list(topics) == ["schema", "broker", "topics"] and topics["schema"] == "unlost.topics/1"
    assert list(topics["topics"][0]) == [
        "name",
        "id",
        "partitions",
        "events",
        "oldest",
        "newest",
        "retention",
        "services",
        "replication",
        "min_insync",
        "survives",
    ]
    audit = shell.quick("audit", "--json").json
    assert list(audit) == [
        "schema", "broker", "balanced", "unaccounted", "services", "missing", "missing_more", "abandoned",
        "abandoned_more", "findings",        "unaccountable", "verified", "damaged", "ranges", "unverified", "outbox", "delayed", "exported", "elsewhere",
    ]  # fmt: skip
    assert audit["schema"] == "unlost.audit/1"
    config = shell.quick("config", "--json").json
    assert list(config) == ["schema", "settings"] and list(config["settings"][0]) == [
        "name",
        "value",
        "source",
        "meaning",
    ]
    dead = shell.quick("dead", "list", "--json").json
    assert list(dead) == ["schema", "broker", "letters"] and dead["schema"] == "unlost.dead/1"


# --- audit -----------------------------------------------------------------------------------------------


def test_balanced_books(used: Shell) -> None:
    shell = used
    lines = shell.ok("audit").out.splitlines()
    assert lines[0].split() == ["THE", "BOOKS", "accepted", "done", "dead", "waiting", "in", "flight", "UNACCOUNTED"]
    assert lines[1].split() == ["billing", "2", "1", "1", "0", "0", "0"]
    everything = shell.ok("audit", "--all", "--verify").out
    assert "skipped (no handler)" in everything and "every stored event matches its checksum" in everything
    assert all(len(line) <= 80 for line in everything.splitlines() if not line.startswith("broker"))
    assert shell.ok("audit", "--service", "billing", "--json").json["services"][0]["concerns"] == 2
    result = shell("audit", "--service", "biling")
    assert result.code == 2 and "UL1331" in result.err


def test_a_loss_is_named_with_3(shell: Shell) -> None:
    """Somebody takes a row from the shelf behind our back: the ledger knows of it."""
    lines = [f'{{"order_id": "A{n}", "total_cents": 0}}' for n in range(12)]
    shell.ok("publish", "OrderPlaced", "-", "--app", "shop", stdin="\n".join(lines))
    shell.handle_all()
    harm(shell, "delete from unlost_shelf where number != 1")
    result = shell("audit")
    assert result.code == 3
    assert "UNACCOUNTED 11" in result.out and "… and 1 more" in result.out
    assert "order.OrderPlaced" in result.out and "last seen in the hands of billing (pid " in result.out
    assert result.out.count("it is not on the shelf") == 10
    assert "the books do not balance" in result.err
    found = shell("audit", "--json")
    assert found.code == 3 and found.json["unaccounted"] == 11 and len(found.json["missing"]) == 11
    assert list(found.json["missing"][0]) == [
        "service", "topic", "partition", "position", "why", "id", "type", "key", "source", "recorded", "last_seen",
    ]  # fmt: skip


def test_a_changed_event_is_found_by_verify(used: Shell) -> None:
    shell = used
    harm(shell, "update unlost_log set data = '{}'")
    assert shell.ok("audit").code == 0
    result = shell("audit", "--verify")
    assert result.code == 3 and "damaged: order/" in result.out and "does not match its checksum" in result.out
    assert shell("audit", "--verify", "--json").json["damaged"]
    tail = shell("tail")
    assert tail.code == 3 and "UL3004" in tail.err


def test_events_missing_from_the_log(shell: Shell) -> None:
    lines = [f'{{"order_id": "A1", "total_cents": {n + 1}}}' for n in range(5)]
    shell.ok("publish", "OrderPlaced", "-", "--app", "shop", stdin="\n".join(lines))
    shell.handle_all()
    harm(shell, "delete from unlost_log where at % 16 in (1, 2)")
    result = shell("audit")
    assert result.code == 3 and "missing from the log" in result.out


@pytest.mark.parametrize(
    "sql",
    [
        "delete from unlost_topic",
        "delete from unlost_ledger",
        "delete from unlost_log",
        "drop table unlost_ledger",
        "update unlost_progress set counts = 'x'",
        "update unlost_progress set fated = x'ff'",
        "update unlost_progress set position = 'x'",
        "update unlost_progress set position = position + 5",
    ],
)
def test_whatever_is_done_to_the_tables_is_a_loss_and_no_crash(used: Shell, sql: str) -> None:
    harm(used, sql)
    result = used.quick("audit")
    assert result.code == 3 and "UL9000" not in result.err, result


@pytest.mark.parametrize(
    "sql",
    [
        "update unlost_shelf set attempts = 'x'",
        "update unlost_shelf set died = 9223372036854775807",
        "update unlost_shelf set head = x'00', data = x'00'",
        "update unlost_service set policy = 'x'",
        "delete from unlost_topic",
    ],
)
def test_no_command_breaks_down_on_stored_nonsense(used: Shell, sql: str) -> None:
    harm(used, sql)
    for arguments in (["status"], ["dead", "list"], ["dead", "show", "1", "--data"], ["topic", "list"], ["tail"]):
        result = used.quick(*arguments)
        assert result.code in (0, 3) and "UL9000" not in result.err, (arguments, result)


# --- what may be wrong with the file ---------------------------------------------------------------------


def broken(shell: Shell, how: str) -> None:
    data = shell.database.read_bytes()
    wal = shell.database.with_name("events.db-wal")
    if how == "empty":
        shell.database.write_bytes(b"")
    elif how == "gone":
        shell.database.unlink()
    elif how == "truncated":
        wal.unlink()
        shell.database.write_bytes(data[: len(data) // 2])
    elif how == "garbage":
        wal.unlink()
        shell.database.write_bytes(b"garbage " * 1000)
    elif how == "page":
        harm(shell, "pragma wal_checkpoint(truncate)")
        data = shell.database.read_bytes()
        shell.database.write_bytes(data[:4096] + os.urandom(len(data) - 4096))


@pytest.mark.parametrize("how", ["empty", "gone", "truncated", "garbage", "page"])
def test_a_damaged_file_is_said_by_every_command(used: Shell, how: str) -> None:
    shell = used
    broken(shell, how)
    for arguments in (["status"], ["audit"], ["tail"], ["dead", "list"], ["topic", "list"], ["audit", "--json"]):
        result = shell.quick(*arguments)
        assert result.code == 3, (arguments, result)
        assert "UL300" in result.err, (arguments, result)


def test_other_files_and_places(shell: Shell) -> None:
    shell.place("A1")
    newer = shell.folder / "newer"
    shutil.copytree(shell.folder / ".unlost", newer)
    connection = apsw.Connection(str(newer / "events.db"))
    connection.pragma("user_version", 99)
    connection.close()
    foreign = shell.folder / "foreign.db"
    connection = apsw.Connection(str(foreign))
    connection.execute("create table t (x)")
    connection.close()
    wrong: list[tuple[str, str]] = [
        (f"embedded://{newer}/events.db", "UL1112"), (f"embedded://{foreign}", "UL1111"), ("redis://host", "UL1140"),
        ("nonsense", "UL1141"), ("embedded://host/path", "UL1141"), (f"embedded://{shell.folder}", "UL"),
        ("embedded:///nowhere/at/all.db", "UL1301"), ("http://ann:s3cret@host/", "UL1141"),
    ]  # fmt: skip
    for url, code in wrong:
        result = shell.quick("status", "--broker", url)
        assert result.code == 2 and code in result.err and "s3cret" not in result.err, (url, result)
        assert shell.quick("audit", UNLOST_BROKER=url).code == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(shell: Shell) -> None:
    shell.place("A1")
    folder = shell.database.parent
    for path in (*folder.iterdir(), folder):
        path.chmod(0o500 if path.is_dir() else 0o400)
    try:
        result = shell("status")
        assert result.code == 2 and "UL1123" in result.err
    finally:
        folder.chmod(0o700)


def test_a_file_where_a_folder_should_be(shell: Shell) -> None:
    shell.write("plain", "x")
    url = f"embedded://{shell.folder}/plain/events.db"
    for arguments in (
        ["status"],
        ["run", "shop"],
        ["publish", "OrderPlaced", "order_id=1", "total_cents=1", "--app", "shop"],
    ):
        result = shell(*arguments, "--broker", url)
        assert result.code == 2 and "UL" in result.err, result


# --- topics, config --------------------------------------------------------------------------------------


def test_topics(shell: Shell) -> None:
    shell.place("A1")
    lines = shell.ok("topic", "list").out.splitlines()
    assert (
        lines[0].split()[0] == "TOPIC" and lines[1].split()[:3] == ["order", "8", "1"] and lines[1].endswith("billing")
    )


def values(result: Any) -> dict[str, tuple[str, str]]:
    return {s["name"]: (s["value"], s["source"]) for s in result.json["settings"]}


def test_config_says_where_a_value_is_from(shell: Shell) -> None:
    assert values(shell.quick("config", "--json"))["broker"] == (f"embedded://{shell.database}", "default")
    shell.write("pyproject.toml", '[tool.unlost]\nbroker = "embedded:///a.db"\nlog = "debug"\n')
    found = values(shell.quick("config", "--json", UNLOST_BROKER="kafka://ann:s3cret@host/?ssl_password=s3cret2"))
    assert found["broker"] == ("kafka://ann:***@host/?ssl_password=***", "environment UNLOST_BROKER")
    assert found["log"] == ("debug", "pyproject.toml [tool.unlost]")
    assert values(shell.quick("config", "--json", "--broker", "x"))["broker"] == ("x", "flag --broker")
    shell.write("coded.py", "from unlost import App\napp = App(broker='embedded:///coded.db')\n")
    assert values(shell.quick("config", "--json", "--app", "coded"))["broker"] == ("embedded:///coded.db", "code")
    assert "embedded:///coded.db" not in shell.quick("status", "--app", "coded").out
    assert "/coded.db" in shell.quick("status", "--app", "coded").err
    shell.write("pyproject.toml", "[tool.unlost]\nbrokr = 1\n")
    assert "UL1153" in shell.quick("config").err
    shell.write("pyproject.toml", "[tool.")
    assert "UL1152" in shell.quick("config").err
