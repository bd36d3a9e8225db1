"""`unlost event erase`: what the events of a key say is in no byte any more, and every check holds at every moment."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import apsw
import pytest
from cli_kit import SHOP, Shell
from pyarrow import parquet

from unlost import App, Event, Service, UsageError
from unlost.brokers.embedded.broker import EmbeddedBroker
from unlost.brokers.embedded.log import EmbeddedLog
from unlost.brokers.kafka.log import KafkaLog
from unlost.brokers.port import Erasable
from unlost.events import Envelope, decode_head, encode_head, from_json
from unlost.events.codec import erased_head, is_erased, peek_head
from unlost.events.topic import Topic
from unlost.ops.erase import chosen
from unlost.sqlite.erase import scrub
from unlost.sqlite.file import File
from unlost.sqlite.transaction import Transaction
from unlost.testing import running

KEY, CANARY = "ada.lovelace", "c4n4ry-of-the-data"
WHY = ("--reason", "request 12")
LATE = """
late = Service("late", retry=Retry(attempts=1))

@late.on(OrderPlaced)
async def note(order: OrderPlaced) -> None:
    print("late has", order.order_id, order.email, flush=True)

app = App(billing, late)
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """Of the key: one event that was handled, one dead, two parked behind it, and one that nobody has received."""
    shell = Shell(tmp_path_factory.mktemp("erase"))
    for key, total in ((KEY, 1), ("B1", 1), (KEY, 0), (KEY, 2), (KEY, 3), ("B2", 0)):
        place(shell, key, total)
    shell.handle_all()
    place(shell, KEY, 4)
    place(shell, "B1", 5)
    return shell


@pytest.fixture
def shell(prepared: Shell, tmp_path: Path) -> Shell:
    shutil.copytree(prepared.folder, tmp_path, dirs_exist_ok=True)
    return Shell(tmp_path)


def place(shell: Shell, key: str, total: int) -> None:
    shell.place(key, total, f"email={CANARY}-{key}")


def holding(folder: Path, text: str) -> list[str]:
    """The files in which these bytes are found."""
    return sorted(p.name for p in folder.rglob("*") if p.is_file() and text.encode() in p.read_bytes())


def check_all(shell: Shell) -> dict[str, dict[str, int]]:
    """Everything that looks at what is stored is content; returns the books."""
    audit = shell.quick("audit", "--verify", "--json")
    assert audit.code == 0, audit
    doctor = shell.quick("doctor", "--verify", "--json")
    assert doctor.code == 0, doctor
    return {s["service"]: s for s in audit.json["services"]}


def erase(shell: Shell, *more: str) -> dict[str, object]:
    result = shell.quick("event", "erase", "--key", KEY, *WHY, "--yes", "--json", *more)
    assert result.code == 0, result
    found: dict[str, object] = result.json
    return found


# --- a service that does not run -----------------------------------------------------------------------------------


def test_all_of_it_leaves_and_the_books_balance(shell: Shell) -> None:
    assert holding(shell.folder / ".unlost", f"{CANARY}-{KEY}")
    done = erase(shell)
    assert (done["log"], done["removed"], done["discards"], done["left"]) == (5, 4, 0, [])
    book = check_all(shell)["billing"]
    assert (book["done"], book["removed"], book["dead"], book["parked"], book["waiting"]) == (2, 4, 1, 0, 1)
    assert holding(shell.folder / ".unlost", f"{CANARY}-{KEY}") == []
    assert holding(shell.folder / ".unlost", KEY) == []
    assert holding(shell.folder / ".unlost", f"{CANARY}-B1") == ["events.db"]  # that of others stays
    again = shell.quick("event", "erase", "--key", KEY, *WHY, "--yes")
    assert again.code == 1 and "UL1403" in again.err and KEY not in again.err, again


def test_who_and_why_is_written_down_and_the_key_is_not(shell: Shell) -> None:
    done = erase(shell, "--operator", "grace")
    connection = apsw.Connection(str(shell.database))
    rows = connection.execute(
        "select operator, action, reason, id, carried_out is not null, result from unlost_operation where action = 'erase'"
    ).fetchall()
    connection.close()
    assert [row[:5] for row in rows] == [("grace", "erase", "request 12", done["key"], 1)]
    assert KEY not in str(rows) and '"log":5' in rows[0][5]


def test_a_service_that_begins_later_gets_none_of_it(shell: Shell) -> None:
    erase(shell)
    shell.write("shop.py", SHOP.replace("app = App(billing)\n", LATE))
    with shell.start("run", "shop") as runs:
        runs.says("unlost: ")
        shell.until(lambda s: not s["waiting"] + s["in_flight"])
        assert runs.end(signal.SIGTERM) == 0
        assert KEY not in runs.text() and f"late has B1 {CANARY}-B1" in runs.text(), runs.text()
    books = check_all(shell)
    assert books["late"]["removed"] == 5 and books["late"]["done"] == 3, books["late"]
    assert books["billing"]["skipped"] == {} and books["billing"]["removed"] == 4


def test_what_would_be_done_is_said_first(shell: Shell) -> None:
    before = shell.quick("audit", "--json").out
    said = shell.quick("event", "erase", "--key", KEY, *WHY, "--dry-run")
    assert said.code == 0 and "5 events of the key to be erased in the log" in said.out, said
    assert "billing has not handled 4: 1 waiting, 2 parked, 1 dead; these are removed" in said.out, said
    assert "backups and other exports" in said.out and "nothing was changed" in said.out
    found = shell.quick("event", "erase", "--key", KEY, *WHY, "--dry-run", "--json").json
    assert found["log"] == 5 and found["services"][0]["dead"] == 1 and found["dry_run"] is True
    assert shell.quick("audit", "--json").out == before
    nobody = shell.quick("event", "erase", "--key", KEY, *WHY)
    assert nobody.code == 2 and "UL1333" in nobody.err
    assert holding(shell.folder / ".unlost", f"{CANARY}-{KEY}") != []


def test_only_of_a_type_or_a_topic(shell: Shell) -> None:
    none = shell.quick("event", "erase", "--key", KEY, *WHY, "--yes", "--type", "OrderShipped")
    assert none.code == 1 and "UL1403" in none.err and "the type OrderShipped" in none.err
    none = shell.quick("event", "erase", "--key", KEY, *WHY, "--yes", "--topic", "customer")
    assert none.code == 1 and "the topic customer" in none.err
    assert erase(shell, "--type", "OrderPlaced", "--topic", "order")["log"] == 5


def test_bad_input(shell: Shell) -> None:
    for arguments, code in ((("--key", "", *WHY), "UL1400"), (("--key", KEY, "--reason", " "), "UL1401")):
        result = shell.quick("event", "erase", *arguments, "--yes")
        assert result.code == 2 and code in result.err, result
    assert shell.quick("event", "erase", "--key", KEY).code == 2  # a reason is asked for
    with pytest.raises(UsageError):
        chosen("")


def test_those_who_look_at_the_log_see_what_is_left(shell: Shell) -> None:
    erase(shell)
    seen = shell.quick("tail", "--from", "start", "--data", "--app", "shop")
    assert seen.code == 0 and seen.out.count(" order/") == 8 and KEY not in seen.out, seen
    out = shell.quick("store", "export", "--format", "jsonl", "--to", str(shell.folder / "history"))
    assert out.code == 0, out
    rows = read_all(shell.folder / "history")
    assert len(rows) == 8 and sum(row["key"] is row["data"] is None for row in rows) == 5


def test_a_copy_of_the_file_can_be_made_and_read_afterwards(shell: Shell) -> None:
    erase(shell)
    made = shell.quick("store", "backup", str(shell.folder / "copy.db"))
    assert made.code == 0, made
    assert KEY.encode() not in (shell.folder / "copy.db").read_bytes()


DELAYED = """
import asyncio, sys
from shop import OrderPlaced, app

async def main():
    async with app:
        await app.publish(OrderPlaced(order_id=sys.argv[1], total_cents=1, email=sys.argv[2]), delay=3600)

asyncio.run(main())
"""


def test_what_is_delayed_never_leaves(shell: Shell) -> None:
    for key in (KEY, "B1"):
        script = [sys.executable, "-c", DELAYED, key, f"{CANARY}-{key}"]
        subprocess.run(script, cwd=shell.folder, env=shell.env, check=True, timeout=30)
    assert "1 delayed event: cancelled" in shell.quick("event", "erase", "--key", KEY, *WHY, "--dry-run").out
    assert erase(shell)["cancelled"] == 1
    assert holding(shell.folder / ".unlost", KEY) == []
    connection = apsw.Connection(str(shell.database))
    assert connection.execute("select key from unlost_delayed").fetchall() == [(b"B1",)]
    connection.close()


def test_somebody_is_asked(shell: Shell) -> None:
    for answer, code in (("n\n", 1), ("y\n", 0)):
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "unlost", "event", "erase", "--key", KEY, *WHY],
            cwd=shell.folder, env=shell.env, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        os.close(theirs)
        os.write(ours, answer.encode())
        out, err = process.communicate(timeout=30)
        os.close(ours)
        assert process.returncode == code, (out, err)
        assert "billing has not handled 4" in err and "erase this for good? [y/N]" in err
    assert "5 events erased in the log; 4 outcomes of services removed" in out


# --- a service that runs ---------------------------------------------------------------------------------------------

BUSY = SHOP.replace(
    "    if not order.total_cents:",
    """    import asyncio, pathlib
    if order.total_cents == 9:
        print("has it in hand", flush=True)
        while not pathlib.Path("let-go").exists():
            await asyncio.sleep(0.01)
    if not order.total_cents:""",
)


def test_a_service_at_work_ends_what_it_has_and_skips_the_rest(shell: Shell) -> None:
    shell.write("shop.py", BUSY)
    with shell.start("run", "shop") as runs:
        shell.until(lambda s: not s["waiting"] + s["in_flight"])
        place(shell, KEY, 9)  # behind a dead letter: parked
        place(shell, "B7", 9)
        runs.says("has it in hand")
        stop = threading.Event()

        def load() -> None:
            n = 0
            while not stop.is_set():
                lines = "".join(f'{{"order_id": "L{n}-{i}", "total_cents": 1}}\n' for i in range(50))
                shell.ok("publish", "OrderPlaced", "-", "--app", "shop", stdin=lines)
                n += 1

        loading = threading.Thread(target=load)
        loading.start()
        try:
            first = shell("event", "erase", "--key", KEY, *WHY, "--yes")
            # the dead letter was discarded by its owner; then what was parked came into the handler's hands
            assert first.code == 5 and "not done yet: billing order/" in first.err, first
            assert "1 dead letter to be discarded by processes at work" in first.out, first
            check_all(shell)
            (shell.folder / "let-go").touch()
            shell.until(lambda s: not s["dead"] or s["dead"] == 1)
            assert shell("event", "erase", "--key", KEY, *WHY, "--yes").code == 0
        finally:
            stop.set()
            loading.join()
        assert runs.end(signal.SIGTERM) == 0
    book = check_all(shell)["billing"]
    assert book["removed"] == 1 and book["dead"] == 1, book
    assert holding(shell.folder / ".unlost", f"{CANARY}-{KEY}") == []


def test_what_a_handler_has_that_gets_it_at_most_once(tmp_path: Path) -> None:
    """It has its place in the books already, and may still come to the shelf with all that it says."""
    shell = Shell(tmp_path)
    shell.write(
        "shop.py",
        BUSY.replace("attempts=1)", "attempts=1), guarantee='at-most-once'").replace("if not order", "if order"),
    )
    place(shell, KEY, 9)
    with shell.start("run", "shop") as runs:
        runs.says("has it in hand")
        first = shell("event", "erase", "--key", KEY, *WHY, "--yes")
        assert first.code == 5 and "has 1 of its events before it" in first.err, first
        (shell.folder / "let-go").touch()
        runs.says("is dead (rejected)")
        assert shell("event", "erase", "--key", KEY, *WHY, "--yes").code == 0
        assert runs.end(signal.SIGTERM) == 0
    assert check_all(shell)["billing"]["removed"] == 1
    assert holding(shell.folder / ".unlost", KEY) == []


class Moved(Event, key="who"):
    who: str
    to: str


async def test_a_member_that_reads_an_erased_row_skips_it() -> None:
    service, had = Service("post"), list[str]()

    @service.on(Moved)
    async def note(event: Moved) -> None:
        had.append(f"{event.who} {event.to}")

    async with running(App(service)) as t:
        await t.scale(0, "post")
        for n in range(3):
            await t.publish(Moved(who="ada", to=f"street {n}"))
            await t.publish(Moved(who="bob", to=f"street {n}"))
        log = EmbeddedLog(t.app.broker.file)  # type: ignore[attr-defined]
        for info in log.topics():
            for partition, (start, end) in enumerate(info.ranges):
                await asyncio.to_thread(log.erase, info.name, partition, range(start, end), b"ada")
        await t.scale(1, "post")
        await t.settled()
        assert had == ["bob street 0", "bob street 1", "bob street 2"]
        assert t.books.services["post"].removed == 3


# --- killed in the middle ----------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
import unlost.ops.erase
from unlost.cli.main import main
from unlost.sqlite.file import File

unlost.ops.erase.BATCH = 1
die_after, commits, write = int(sys.argv[1]), 0, File.write_sync

def counted(self, work, timeout=60.0):
    global commits
    result = write(self, work, timeout)
    commits += 1
    if commits == die_after:
        os.kill(os.getpid(), signal.SIGKILL)
    return result

File.write_sync = counted
sys.exit(main(["event", "erase", "--key", sys.argv[2], "--reason", "request 12", "--yes"]))
"""


def test_killed_after_any_commit_it_goes_on(prepared: Shell, tmp_path: Path) -> None:
    died = 0
    for n in range(1, 40):
        folder = tmp_path / str(n)
        shutil.copytree(prepared.folder, folder)
        shell = Shell(folder)
        ended = subprocess.run(
            [sys.executable, "-c", KILLED, str(n), KEY], cwd=folder, env=shell.env, capture_output=True, check=False
        )
        if ended.returncode == 0:
            break
        assert ended.returncode == -signal.SIGKILL, ended
        died += 1
        check_all(shell)
        again = shell.quick("event", "erase", "--key", KEY, *WHY, "--yes")
        ended_before = again.code == 1 and "UL1403" in again.err  # nothing was left to be done
        assert again.code == 0 or ended_before, again
        book = check_all(shell)["billing"]
        assert (book["done"], book["removed"], book["waiting"]) == (2, 4, 1), (n, book)
        assert holding(folder / ".unlost", f"{CANARY}-{KEY}") == holding(folder / ".unlost", KEY) == [], n
    assert died >= 6, died


# --- bytes -------------------------------------------------------------------------------------------------------------


def event(n: int, key: str, size: int) -> Envelope:
    data = f"{CANARY}-{key}-{n:05d}".encode().ljust(size, b"x")
    return Envelope(
        id=f"e{n}", source="shop", type="T", time="2026-01-01T00:00:00Z", topic="order", key=key.encode(), data=data,
        subject=key, partitionkey=key, headers={"who": key}, extensions={"who": key},
    )  # fmt: skip


def test_no_byte_is_left_where_pages_were_split_and_rows_deleted(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    file = File(path)
    asyncio.run(EmbeddedBroker(file).declare([Topic("order", partitions=4)]))
    for n in range(0, 3000, 20):
        events = [event(m, KEY if m % 7 == 0 else f"k{m % 11}", 50 + m * 37 % 5000) for m in range(n, n + 20)]
        file.write_sync(partial(Transaction.append, envelopes=events))
    log = EmbeddedLog(file)
    with log.finder() as find:  # more than it takes for a segment: from here on there is an index
        places = list(find({KEY.encode()}))
    segments = list((tmp_path / "events.db.index").glob("*.segment"))
    assert segments and isinstance(log, Erasable)
    erased = 0
    for topic, partition, position in places:
        erased += log.erase(topic, partition, [position], KEY.encode())
    assert erased == len([n for n in range(3000) if n % 7 == 0])
    edit = apsw.Connection(str(path))
    edit.execute("pragma wal_checkpoint(truncate)")
    edit.close()
    assert holding(tmp_path, KEY) == ["events.db"]  # SQLite alone leaves bytes of pages that were split
    assert scrub(file) == ""
    assert holding(tmp_path, KEY) == [] and path.with_name("events.db-wal").stat().st_size == 0
    with log.finder() as find:
        left = [log.read(*place, 1)[0] for place in find({KEY.encode()})]
    assert all(a.key is None and a.data is None and a.rule == "erased" for a in left)
    assert log.verify(10) == [] and [log.holes("order", p) for p in range(4)] == [[]] * 4
    with log.finder() as find:  # by its id it is still found
        assert [log.read(*place, 1)[0].envelope.id for place in find({b"e7"})] == ["e7"]  # type: ignore[union-attr]
    file.close()


def test_a_large_file_is_left_alone_while_others_use_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unlost.sqlite.erase.SHARED_BYTES_MAX", 1)
    one = File(tmp_path / "events.db")
    assert scrub(one) == ""
    script = "import sys; from pathlib import Path; from unlost.sqlite.file import File; f = File(Path(sys.argv[1])); print(1, flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(one.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdout.readline() == "1\n"
    assert "1 other processes use the file" in scrub(one)
    other.communicate("\n", timeout=30)
    assert scrub(one) == ""
    one.close()


def test_whoever_reads_an_old_state_holds_the_wal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unlost.sqlite.erase.BUSY_MS", 20)
    file = File(tmp_path / "events.db")
    reader = apsw.Connection(str(file.path))
    reader.execute("begin; select count(*) from unlost_log").fetchall()
    assert "somebody reads an old state" in scrub(file)
    reader.execute("commit")
    reader.close()
    assert scrub(file) == "" and file.path.with_name("events.db-wal").stat().st_size == 0
    file.close()


# --- exports -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_rows_of_exports_lose_what_they_say(shell: Shell, format: str) -> None:
    out = ("store", "export", "--format", format, "--to", "history", "--with-sensitive")
    history = shell.folder / "history"
    assert shell(*out).code == 0
    before = read_all(history)
    arguments = ("event", "erase", "--key", KEY, *WHY, "--export", "history")
    assert "5 rows in exports" in shell(*arguments, "--dry-run").out and read_all(history) == before
    done = shell(*arguments, "--yes")
    assert done.code == 0 and "5 rows erased in exports" in done.out, done
    after = read_all(history)
    assert [row["id"] for row in after] == [row["id"] for row in before] and len(after) == 8
    erased = [row for row, had in zip(after, before, strict=True) if had["key"] == KEY]
    assert len(erased) == 5 and all(
        row["key"] is row["data"] is row["subject"] is None and row["type"] and row["time"] for row in erased
    )
    assert [row for row in after if row["key"]] == [row for row in before if row["key"] != KEY]
    assert holding(history, KEY) == []
    place(shell, "B9", 1)
    assert "1 event in 1 file" in shell(*out).out  # it goes on: the manifest is right
    late = shell(*arguments, "--yes")  # an export that somebody has found later
    assert late.code == 0 and "0 rows erased in exports" in late.out, late


def read_all(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for path in sorted((folder / "events").glob("*/*")):
        if path.suffix == ".jsonl":
            rows += map(json.loads, path.read_text().splitlines())
        else:
            rows += parquet.read_table(path).to_pylist()
    return rows


def test_a_folder_that_is_no_export(shell: Shell) -> None:
    result = shell.quick("event", "erase", "--key", KEY, *WHY, "--yes", "--export", str(shell.folder))
    assert result.code == 2 and "UL1404" in result.err, result


# --- the mark ----------------------------------------------------------------------------------------------------------


def test_what_is_left_of_a_head() -> None:
    before = event(1, KEY, 60)
    head = erased_head(encode_head(before), "2026-02-02T00:00:00Z")
    after = decode_head(head, topic="order", key=None, data=None)
    assert (after.id, after.source, after.type, after.time) == (before.id, before.source, before.type, before.time)
    assert KEY.encode() not in head and is_erased(head) and peek_head(head) is None
    assert not is_erased(b'{"unlosterased": 1}') and not is_erased(encode_head(before))


def test_nobody_outside_can_say_that_an_event_is_erased() -> None:
    raw = b'{"specversion":"1.0","id":"1","source":"a","type":"t","time":"2026-01-02T03:04:05Z","unlosterased":"yes"}'
    e = from_json(raw, topic="order")
    assert e.extensions == {} and not is_erased(encode_head(e))


def test_kafka_lacks_the_ability() -> None:
    assert issubclass(EmbeddedLog, Erasable) and not issubclass(KafkaLog, Erasable)
