"""A whole service, paused, retired and renamed, where the store is in a real PostgreSQL and the log in the embedded broker."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest

from servers.fixtures import require_postgres
from unlost import App, Event, Service, Topic, UsageError
from unlost.events.topic import Unit
from unlost.ops import store as migrations
from unlost.store.connect import postgres
from unlost.store.port import Hold
from unlost.store.postgres.store import PostgresStore

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

import test_service_ops as unit
from cli_kit import Shell

pytestmark = pytest.mark.usefixtures("needs_postgres")


@pytest.fixture
def needs_postgres() -> None:
    require_postgres()


@pytest.fixture
def shell(tmp_path: Path, database: str) -> Shell:
    migrations.migrate(database, operator="test", reason="")
    return unit.shop(tmp_path, UNLOST_STORE=database)


def rows(shell: Shell, sql: str) -> list[Any]:
    with psycopg.connect(shell.env["UNLOST_STORE"]) as connection:
        return connection.execute(sql).fetchall()


def followers(shell: Shell) -> set[str]:
    """The services whose progress elsewhere the broker's file waits for."""
    file = unit.File(shell.database)
    try:
        return {name for (name,) in file.read(lambda c: c.execute("select service from unlost_follower").fetchall())}
    finally:
        file.close()


def test_a_paused_service_ends_what_it_has_and_begins_nothing(shell: Shell) -> None:
    unit.check_pause(shell)


def test_a_retired_service_and_its_books(shell: Shell) -> None:
    unit.check_retire(shell)
    assert followers(shell) == {"mailing"}
    assert rows(shell, "select action, service, result from unlost.unlost_operation where action = 'retire'") == [
        ("retire", "billing", "5 events removed")
    ]


def test_a_renamed_service_goes_on_where_it_was(shell: Shell) -> None:
    unit.check_rename(shell)
    assert followers(shell) == {"invoicing", "mailing"}


def test_a_repeat_is_recognised_over_a_rename(shell: Shell) -> None:
    unit.test_a_repeat_is_recognised_over_a_rename(shell)


def test_what_a_crash_between_store_and_file_left_undone_is_done_by_the_same_command(shell: Shell) -> None:
    unit.leave_something(shell)
    unit.change(shell, "retire", "billing", "--reason", "x")
    file = unit.File(shell.database)
    file.write_sync(lambda tx: tx.execute("insert into unlost_follower values ('billing', 'order', 0, 1, '')"))
    file.close()
    assert not unit.change(shell, "retire", "billing", "--reason", "x")["changed"]
    assert followers(shell) == {"mailing"}


class Placed(Event, key="order_id", topic="order"):
    order_id: str


async def test_nobody_takes_a_unit_of_a_service_that_is_being_ended(tmp_path: Path, database: str) -> None:
    """Retiring has locked the rows of its units; whoever wants to take one waits for that, and is refused after it."""
    migrations.migrate(database, operator="test", reason="")
    service = Service("billing")

    @service.on(Placed)
    async def charge(order: Placed) -> None: ...

    app = App(service, broker=f"embedded://{tmp_path}/events.db", store=database, topics=[Topic("order", partitions=1)])
    async with app:
        other = PostgresStore(postgres(database), broker=app.broker.identity)
        await other.open()
        hold = Hold(state="retired", since=0, operator="ada")
        with psycopg.connect(database) as ending:
            ending.execute("select 1 from unlost.unlost_progress for update")
            ending.execute("update unlost.unlost_service set hold = %s", (unit.json.dumps(hold_json(hold)),))
            taking = asyncio.create_task(other.take([Unit("billing", "order", 0)]))
            await blocked(database)
            ending.commit()
        with pytest.raises(UsageError) as caught:
            await taking
        assert caught.value.code == "UL1443"
        await other.close()


def hold_json(hold: Hold) -> dict[str, object]:
    return {"state": hold.state, "since": hold.since, "operator": hold.operator}


async def blocked(database: str) -> None:
    """Until somebody waits for a row."""
    async with asyncio.timeout(30), await psycopg.AsyncConnection.connect(database, autocommit=True) as look:
        while True:
            cursor = await look.execute("select count(*) from pg_locks where not granted")
            row = await cursor.fetchone()
            if row is not None and row[0]:
                return
            await asyncio.sleep(0.01)
