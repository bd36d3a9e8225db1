"""`unlost event erase`, where the log is in a file and the store in a real PostgreSQL."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import confluent_kafka.admin  # noqa: F401 - before `Shell.quick`, which forgets what it was the first to import
import psycopg
import pytest

from unlost.ops import store as migrations

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

from cli_kit import SHOP, Shell

KEY, CANARY = "ada.lovelace", "c4n4ry-of-the-data"
WHY = ("--reason", "request 12")


@pytest.fixture
def shell(tmp_path: Path, database: str) -> Shell:
    """Of the key: one event that was handled, one dead, one parked behind it, and one that nobody has received."""
    migrations.migrate(database, operator="test", reason="")
    shell = Shell(tmp_path)
    shell.env |= {"UNLOST_STORE": database}
    shell.write("shop.py", SHOP)
    for key, total in ((KEY, 1), ("B1", 1), (KEY, 0), (KEY, 2)):
        shell.place(key, total, f"email={CANARY}-{key}")
    shell.handle_all()
    shell.place(KEY, 3, f"email={CANARY}-{KEY}")
    return shell


def rows(shell: Shell, statement: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(shell.env["UNLOST_STORE"], autocommit=True) as connection:
        return connection.execute(statement).fetchall()  # type: ignore[call-overload,no-any-return]


def in_tables(shell: Shell) -> list[str]:
    """The tables of the store in which the key or the canary is found."""
    tables = rows(shell, "select relname from pg_class where relnamespace = 'unlost'::regnamespace and relkind = 'r'")
    found = []
    for (table,) in tables:
        text = str(rows(shell, f"select t::text from unlost.{table} t"))
        if any(word in text or word.encode().hex() in text for word in (KEY, f"{CANARY}-{KEY}")):
            found.append(table)
    return sorted(found)


def book(shell: Shell) -> dict[str, Any]:
    audit, doctor = shell.quick("audit", "--verify", "--json"), shell.quick("doctor", "--verify", "--json")
    assert (audit.code, doctor.code) == (0, 0), (audit, doctor)
    found: dict[str, Any] = audit.json["services"][0]
    return found


def test_nothing_of_it_is_left_in_the_tables_and_in_the_file(shell: Shell) -> None:
    assert in_tables(shell) == ["unlost_shelf", "unlost_waiting"]
    said = shell.quick("event", "erase", "--key", KEY, *WHY, "--dry-run").out
    assert "billing has not handled 3: 1 waiting, 1 parked, 1 dead; these are removed" in said, said
    assert "PostgreSQL keeps deleted rows until VACUUM" in said
    done = shell.quick("event", "erase", "--key", KEY, *WHY, "--yes", "--json")
    assert done.code == 0 and (done.json["log"], done.json["removed"]) == (4, 3), done
    assert in_tables(shell) == []
    for path in (shell.folder / ".unlost").rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path
    after = book(shell)
    assert (after["done"], after["removed"], after["waiting"]) == (2, 3, 0), after
    shell.handle_all()
    assert book(shell)["removed"] == 3


def test_a_service_at_work_discards_and_skips(shell: Shell) -> None:
    with shell.start("run", "shop") as runs:
        runs.says("unlost: ")
        shell.until(lambda s: not s["waiting"] + s["in_flight"])
        done = shell("event", "erase", "--key", KEY, *WHY, "--yes")
        assert done.code == 0 and "1 dead letter to be discarded by processes at work" in done.out, done
        assert runs.end(signal.SIGTERM) == 0
    after = book(shell)
    # what was parked went on when the letter was gone, and was handled
    assert (after["done"], after["removed"], after["waiting"], after["parked"]) == (4, 1, 0, 0), after
    assert in_tables(shell) == []


OUTBOX = """
import os, sys
import psycopg
from shop import OrderPlaced, app

with psycopg.connect(os.environ["UNLOST_STORE"]) as connection, app.outbox(connection) as outbox:
    outbox.publish(OrderPlaced(order_id=sys.argv[1], total_cents=1, email=sys.argv[2]))
"""


def test_what_stands_in_the_outbox_is_erased_when_it_has_left_it(shell: Shell) -> None:
    script = [sys.executable, "-c", OUTBOX, KEY, f"{CANARY}-{KEY}"]
    subprocess.run(script, cwd=shell.folder, env=shell.env, check=True, timeout=30)
    first = shell("event", "erase", "--key", KEY, *WHY, "--yes")
    assert first.code == 5 and "the outbox holds 1 of its events" in first.err, first
    assert in_tables(shell) == ["unlost_outbox"]
    with shell.start("run", "shop") as runs:
        runs.says("unlost: ")
        last = shell("event", "erase", "--key", KEY, *WHY, "--yes")
        assert last.code == 0 and "1 event erased in the log" in last.out, last
        assert runs.end(signal.SIGTERM) == 0
    assert in_tables(shell) == []
    assert book(shell)["removed"] == 3
    open = rows(shell, "select count(*) from unlost.unlost_operation where action = 'erase' and carried_out is null")
    assert open == [(0,)]
