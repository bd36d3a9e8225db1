"""A whole service, paused, retired and renamed, on a real Kafka with the store in a file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

import test_service_ops as unit
from cli_kit import Shell

QUICK = "session.timeout.ms=6000&heartbeat.interval.ms=300"


@pytest.fixture
def shell(tmp_path: Path, kafka: Any, fresh_prefix: str) -> Shell:
    return unit.shop(tmp_path, UNLOST_BROKER=f"{kafka.url}?prefix={fresh_prefix}.&{QUICK}")


def groups(kafka: Any, prefix: str) -> set[str]:
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})  # kept: else it promises in vain
    listed = admin.list_consumer_groups().result(20)
    assert not listed.errors
    return {g.group_id.removeprefix(f"{prefix}.") for g in listed.valid if g.group_id.startswith(prefix)}


def test_a_paused_service_ends_what_it_has_and_begins_nothing(shell: Shell) -> None:
    unit.check_pause(shell)


def test_a_retired_service_and_its_books(shell: Shell) -> None:
    unit.check_retire(shell)
    again = shell.quick("audit", "--verify", "--json")
    assert again.code == 0, again  # what was removed is what the log has


def test_a_renamed_service_goes_on_where_it_was(shell: Shell, kafka: Any, fresh_prefix: str) -> None:
    unit.check_rename(shell)
    assert {"billing", "invoicing"} <= groups(kafka, fresh_prefix)
    assert shell.quick("doctor").code == 0  # the group of the old name is in nobody's way
    unit.change(shell, "rename", "invoicing", "billing")
    shell.write("shop.py", (shell.folder / "shop.py").read_text().replace('Service("invoicing"', 'Service("billing"'))
    unit.place(shell, "Z1")
    with shell.start("run", "shop") as running:  # what the old group was told long ago is not taken for an older store
        running.says("unlost: ")
        shell.until(lambda s: not s["waiting"] + s["in_flight"])
        assert running.end() == 0
    assert unit.handled(shell, "billing").count("Z1") == 1


def test_what_retention_took_before_is_not_called_removed(tmp_path: Path, kafka: Any, fresh_prefix: str) -> None:
    url = f"{kafka.url}?prefix={fresh_prefix}.&{QUICK}"
    shell = unit.shop(tmp_path, ', retention="1h"', UNLOST_BROKER=url)
    unit.place(shell, *(f"A{n}" for n in range(10)))
    unit.mail_all(shell, 10)
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    for future in admin.delete_records([TopicPartition(f"{fresh_prefix}.order", p, 2) for p in range(2)]).values():
        future.result(20)
    unit.change(shell, "retire", "billing", "--reason", "x")
    found = unit.book(shell)  # it balances, because the App has declared the retention
    assert (found["accepted"], found["expired"], found["removed"], found["waiting"]) == (10, 4, 6, 0)
