"""`unlost doctor --verify`: each damage is planted in a real file, and named by its place."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import apsw
import pytest
from cli_kit import Shell

from unlost.brokers.embedded.broker import EmbeddedBroker
from unlost.brokers.embedded.log import EmbeddedLog
from unlost.events import Envelope, event_hash
from unlost.events.topic import Topic
from unlost.ops import verify
from unlost.ops.verify import Damage, verify_file, verify_log, verify_tables
from unlost.sqlite.file import File
from unlost.sqlite.transaction import Transaction, row_crc
from unlost.store.progress import Runs
from unlost.store.records import FileRecords

ROWS = 40


def event(n: int, size: int = 300) -> Envelope:
    data = f"data-of-{n:05d}-".encode().ljust(size, b"x")
    return Envelope(
        id=f"e{n}", source="shop", type="T", time="2026-01-01T00:00:00Z", topic="order", key=b"k", data=data
    )


def made(path: Path, rows: int = ROWS, size: int = 300) -> None:
    """One topic, one partition, and a service that has handled the first half."""
    file = File(path)
    asyncio.run(EmbeddedBroker(file).declare([Topic("order", partitions=1)]))
    for start in range(0, rows, 500):
        events = [event(n, size) for n in range(start, min(rows, start + 500))]
        file.write_sync(partial(Transaction.append, envelopes=events))
    id = file.read(lambda c: c.execute("select id from unlost_topic").fetchone()[0])
    half = rows // 2
    file.write_sync(
        lambda tx: (
            tx.execute(
                "insert into unlost_progress (service, topic, partition, topic_id, start, start_digest, position, fated, counts, digest) "
                "values ('billing', 'order', 0, ?, 0, 0, ?, ?, ?, 0)",
                (id, half, Runs([(0, half)]).encode(), '{"done": %d}' % half),  # noqa: UP031
            )
            and None
        )
    )
    file.close()
    edit(path)


def edit(path: Path, *statements: str) -> None:
    """Somebody else writes into it."""
    connection = apsw.Connection(str(path))
    for statement in statements:
        connection.execute(statement)
    connection.execute("pragma wal_checkpoint(truncate)")
    connection.close()


def read_through(path: Path) -> list[Damage]:
    file = File(path, check_tail=False)
    try:
        return list(verify_file(FileRecords(file)).damages)
    finally:
        file.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "events.db"
    made(found)
    return found


def only(found: list[Damage], place: str, what: str) -> Damage:
    assert len(found) == 1, found
    assert found[0].place == place and what in found[0].what, found
    return found[0]


# --- a file in order -------------------------------------------------------------------------------------


def test_a_file_in_order(path: Path) -> None:
    file = File(path)
    heard: dict[str, int] = {}
    found = verify_file(FileRecords(file), said=heard.__setitem__)
    file.close()
    assert found.damages == [] and found.more == 0
    assert found.rows["unlost_log"] == ROWS and found.rows["unlost_progress"] == 1
    assert heard["unlost_log"] == ROWS and "pages and indexes" in heard


def test_memory_is_bounded(tmp_path: Path) -> None:
    made(tmp_path / "events.db", 6000, 5000)
    file = File(tmp_path / "events.db")
    tracemalloc.start()
    try:
        found = verify_file(FileRecords(file))
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        file.close()
    assert found.damages == [] and found.rows["unlost_log"] == 6000
    assert most < 10_000_000  # of 30,000,000


def test_what_is_trimmed_meanwhile_is_no_damage(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "BATCH", 4)
    file = File(path)
    file.write_sync(lambda tx: tx.execute("update unlost_topic set retention = 1") and None)
    trimmed: list[str] = []

    def trim(table: str, rows: int) -> None:
        if table == "unlost_log" and rows == 8 and not trimmed:
            trimmed.append(table)
            file.write_sync(lambda tx: tx.execute("delete from unlost_log where at < 15") and None)

    found = verify_file(FileRecords(file), said=trim)
    file.close()
    assert trimmed and found.damages == []
    assert found.rows["unlost_log"] == ROWS - 7


def test_what_is_published_and_handled_meanwhile_is_no_damage(path: Path) -> None:
    file = File(path)
    published: list[str] = []

    def publish(table: str, rows: int) -> None:
        if table == "unlost_log" and not published:
            published.append(table)
            file.write_sync(lambda tx: tx.append([event(ROWS)]))
            file.write_sync(lambda tx: tx.execute("update unlost_progress set position = ?", (ROWS + 1,)) and None)

    found = verify_file(FileRecords(file), said=publish)
    file.close()
    assert published and found.damages == []


# --- damages of the log ----------------------------------------------------------------------------------


def test_a_flipped_bit(path: Path) -> None:
    raw = path.read_bytes()
    assert raw.count(b"data-of-00007-")
    path.write_bytes(raw.replace(b"data-of-00007-", b"data-of-00006-"))  # also where a split page has left an old copy
    damage = only(read_through(path), "order/0:7", "checksum")
    assert damage.table == "unlost_log" and damage.severity == "error"


def test_a_row_in_the_middle_is_gone(path: Path) -> None:
    edit(path, "delete from unlost_log where at in (9, 10)")
    only(read_through(path), "order/0:9", "positions 9 to 10 are missing")


def test_the_first_rows_are_gone(path: Path) -> None:
    edit(path, "delete from unlost_log where at < 3")
    assert only(read_through(path), "order/0:0", "no retention is declared").severity == "warning"
    edit(path, "update unlost_progress set position = 1, fated = x'0001'")
    assert (
        only(read_through(path), "order/0:0", "positions below 3 are missing, and billing is at 1").severity == "error"
    )


def test_the_last_rows_are_gone(path: Path) -> None:
    edit(path, "delete from unlost_log where at >= 15")
    only(read_through(path), "order/0:15", "billing has handled up to 19")


def test_a_row_that_is_no_event(path: Path) -> None:
    connection = apsw.Connection(str(path))
    key, data, recorded, digest = connection.execute(
        "select key, data, recorded, digest from unlost_log where at = 5"
    ).fetchone()
    crc = row_crc(5, b"{", key, data, recorded, digest)
    connection.execute("update unlost_log set head = ?, crc = ? where at = 5", (b"{", crc))
    connection.close()
    only(read_through(path), "order/0:5", "no event that can be decoded")


def test_a_row_that_was_exchanged(path: Path) -> None:
    """With a checksum of its own, but for another event."""
    connection = apsw.Connection(str(path))
    head, key, data, recorded, digest = connection.execute(
        "select head, key, data, recorded, digest from unlost_log where at = 5"
    ).fetchone()
    head = head.replace(b'"e5"', b'"e6"')
    crc = row_crc(5, head, key, data, recorded, digest)
    connection.execute("update unlost_log set head = ?, crc = ? where at = 5", (head, crc))
    connection.close()
    assert event_hash("shop", "e5") != event_hash("shop", "e6")
    only(read_through(path), "order/0:5", "does not continue the digests")


def test_rows_of_no_topic(path: Path) -> None:
    edit(path, "update unlost_log set at = 1000 << 40 where at = 39")
    only(read_through(path), f"row {1000 << 40}", "1 rows belong to no topic")


def test_a_page_that_cannot_be_read(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    page = raw.index(b"data-of-00030-") // 4096 * 4096
    before = [n for n in range(ROWS) if f"data-of-{n:05d}-".encode() in raw[page : page + 4096]]
    raw[page : page + 4096] = b"\xff" * 4096
    path.write_bytes(raw)
    found = read_through(path)
    assert any(d.table == "pages" for d in found)
    named = [d for d in found if d.table == "unlost_log"]
    assert named[0].place == f"order/0:{min(before)}" and "cannot be read from here on" in named[0].what, found


def test_damages_are_counted_beyond_those_that_are_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "NAMED_MAX", 3)
    edit(path, "update unlost_log set crc = crc + 1 where at < 10")
    file = File(path, check_tail=False)
    found = verify_file(FileRecords(file))
    file.close()
    assert [d.place for d in found.damages] == ["order/0:0", "order/0:1", "order/0:2"] and found.more == 7


# --- the other tables ------------------------------------------------------------------------------------

SHELF = (
    "insert into unlost_shelf (service, topic, partition, position, handler, id, source, type, key, reason, error_type, error, "
    "stack, attempts, parks, died, head, data, recorded) select 'billing', 'order', 0, at, 'charge', 'e', 'shop', 'T', key, 'x', "
    "'', '', '', '[]', 0, 0, head, data, recorded from unlost_log where at = 4"
)
WAITING = (
    "insert into unlost_waiting (service, topic, partition, position, key, due, attempt, history, head, data, recorded) "
    "select 'billing', 'order', 0, at, key, 0, 1, '[]', head, data, recorded from unlost_log where at = 6"
)
OUTBOX = "insert into unlost_outbox (topic, key, head, data, added) select 'order', key, head, data, 0 from unlost_log where at = 6"


def test_copies_in_order(path: Path) -> None:
    edit(path, SHELF, WAITING, OUTBOX)
    assert read_through(path) == []


@pytest.mark.parametrize(
    ("statements", "place", "what"),
    [
        ([SHELF, "update unlost_shelf set data = x'00'"], "order/0:4 (number 1)", "not the event that the log has"),
        ([SHELF, "update unlost_shelf set attempts = '['"], "order/0:4 (number 1)", "attempts cannot be decoded"),
        ([SHELF, "delete from unlost_log where at < 5"], "order/0:4 (number 1)", "not in the log"),
        ([WAITING, "update unlost_waiting set key = x'00'"], "order/0:6 (billing)", "not the event that the log has"),
        ([WAITING, "update unlost_waiting set head = x'00'"], "order/0:6 (billing)", "no event that can be decoded"),
        ([OUTBOX, "update unlost_outbox set head = x'7b'"], "order, number 1", "cannot be decoded"),
        ([OUTBOX, "update unlost_outbox set raw = '['"], "order, number 1", "cannot be decoded"),
        (["update unlost_progress set fated = x'ff'"], "billing order/0", "cannot be decoded"),
        (["update unlost_progress set start = 30"], "billing order/0", "before its start"),
        (["insert into unlost_inbox values ('billing', '', 'shop', 1)"], "billing ", "no mark of an event"),
        (
            ["insert into unlost_ledger values ('billing', 'order', 0, 1, 'dead', x'00', 0)"], "order/0:1 (billing)", "no line of the ledger",
        ),
    ],
)  # fmt: skip
def test_damages_of_the_store(path: Path, statements: list[str], place: str, what: str) -> None:
    edit(path, *statements)
    found = read_through(path)
    assert any(d.place == place and what in d.what and d.severity == "error" for d in found), found


def test_an_undecodable_dead_letter_is_none(path: Path) -> None:
    """It stands on the shelf because nobody could decode it."""
    edit(path, SHELF, "update unlost_shelf set head = x'00', reason = 'undecodable'")
    assert [d.what for d in read_through(path)] == ["is not the event that the log has at this place"]


def test_an_index_that_lacks_a_row(path: Path) -> None:
    edit(
        path, SHELF, "pragma writable_schema = on",
        "update sqlite_schema set sql = 'create index unlost_shelf_id on unlost_shelf (source)' where name = 'unlost_shelf_id'",
    )  # fmt: skip
    assert any("SQLite says" in d.what and "unlost_shelf_id" in d.what for d in read_through(path))


# --- what works through the ports ------------------------------------------------------------------------


@pytest.fixture
def opened(path: Path) -> Iterator[Callable[[], File]]:
    files: list[File] = []

    def open() -> File:
        files.append(File(path, check_tail=False))
        return files[-1]

    yield open
    for file in files:
        file.close()


def test_a_log_through_its_port(path: Path, opened: Callable[[], File]) -> None:
    edit(path, "delete from unlost_log where at in (9, 10)")
    found = verify_log(EmbeddedLog(opened()))
    assert [d.place for d in found.damages] == ["order/0:9", "order/0:9"] or "order/0:0" in found.damages[0].place
    assert any("positions 9 to 10 are missing" in d.what for d in found.damages)


def test_a_log_through_its_port_in_order(opened: Callable[[], File], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "BATCH", 7)
    found = verify_log(EmbeddedLog(opened()))
    assert found.damages == [] and found.rows == {"log": ROWS} and found.empty == 0


def test_an_event_of_the_log_that_cannot_be_decoded(path: Path, opened: Callable[[], File]) -> None:
    test_a_row_that_is_no_event(path)
    found = verify_log(EmbeddedLog(opened()))
    assert only(list(found.damages), "order/0:5", "no event that can be decoded").severity == "warning"


def test_the_tables_of_a_store_without_its_log(path: Path, opened: Callable[[], File]) -> None:
    edit(path, SHELF, WAITING, "update unlost_waiting set head = x'00'")
    found = verify_tables(FileRecords(opened()))
    assert found.rows["unlost_shelf"] == 1
    only(list(found.damages), "order/0:6 (billing)", "no event that can be decoded")


# --- the command -----------------------------------------------------------------------------------------


def test_the_command_names_the_place_and_ends_with_3(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    shell.place("A1")
    shell.handle_all()
    whole = shell.quick("doctor", "--verify", "--all")
    assert (
        whole.code == 0 and "UL1462" in whole.out and "is what was written" in whole.out and "UL4510" not in whole.out
    )
    edit(shell.database, "update unlost_log set crc = crc + 1")
    assert shell.quick("doctor").code == 0  # it does not read everything
    result = shell.quick("doctor", "--verify")
    assert result.code == 3 and "does not match its checksum" in result.out
    found = shell.quick("doctor", "--verify", "--json")
    assert found.code == 3
    bad = [f for f in found.json["findings"] if f["code"] == "UL1462"]
    assert len(bad) == 1 and bad[0]["severity"] == "error" and bad[0]["what"].startswith("order/")


@pytest.mark.parametrize("pages", [1, 4, 15])
def test_a_file_that_was_cut_off(tmp_path: Path, pages: int) -> None:
    shell = Shell(tmp_path)
    made(tmp_path / "events.db", 100, 1000)
    raw = (tmp_path / "events.db").read_bytes()
    assert len(raw) > 20 * 4096
    (tmp_path / "events.db").write_bytes(raw[: len(raw) - pages * 4096])
    result = shell.quick("doctor", "--verify", "--broker", f"embedded://{tmp_path}/events.db")
    assert result.code == 3 and "UL1462" in result.out and "from here on" in result.out, result
