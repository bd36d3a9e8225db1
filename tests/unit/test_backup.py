"""Copies of the embedded file: whole or not there, whoever is killed when; and what is said when one is put back."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import textwrap
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import apsw
import pytest
from cli_kit import Shell

from unlost.brokers.embedded.broker import EmbeddedBroker
from unlost.cli import main as command_line
from unlost.errors import Damaged, Unavailable, UsageError
from unlost.events import Envelope
from unlost.events.topic import Topic
from unlost.ops import backup
from unlost.ops.books import books
from unlost.ops.verify import verify_file
from unlost.sqlite import backup as files
from unlost.sqlite.file import File
from unlost.store.records import FileRecords

SECONDS = 60.0
COMMANDS = (
    ("store backup", "store:backup", "Set right", "[PATH] [OPTIONS]"),
    ("store restore", "store:restore", "Set right", "PATH [OPTIONS]"),
)


def event(n: int, size: int = 200) -> Envelope:
    return Envelope(
        id=f"e{n}",
        source="shop",
        type="T",
        time="2026-01-01T00:00:00Z",
        topic="order",
        key=b"k%d" % n,
        data=b"x" * size,
    )


def publish(file: File, numbers: Sequence[int], size: int = 200) -> None:
    file.write_sync(lambda tx: tx.append([event(n, size) for n in numbers]), SECONDS)


def opened(path: Path) -> File:
    file = File(path)
    asyncio.run(EmbeddedBroker(file).declare([Topic("order", partitions=2)]))
    return file


def url(path: Path) -> str:
    return f"embedded://{path}"


def ids(path: Path) -> set[str]:
    file = File(path)
    try:
        assert verify_file(FileRecords(file)).damages == []
        rows = file.read(lambda c: c.execute("select head from unlost_log").fetchall())
        return {json.loads(head)["id"] for (head,) in rows}
    finally:
        file.close()


def query(path: Path, sql: str) -> list[Any]:
    connection = apsw.Connection(str(path))
    try:
        return list(connection.execute(sql).fetchall())
    finally:
        connection.close()


def restore(path: Path, source: Path, **more: Any) -> backup.Restored:
    given: dict[str, Any] = {"operator": "ada", "reason": "a test", "replace": True, **more}
    return backup.restore(source, url=url(path), **given)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """100 events, in a folder of its own."""
    folder = tmp_path / "live"
    folder.mkdir(mode=0o700)
    file = opened(folder / "events.db")
    publish(file, range(100))
    file.close()
    return folder / "events.db"


# --- making one ------------------------------------------------------------------------------------------


def test_a_backup_is_one_whole_file(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "b"
    found = backup.back_up(target, url=url(path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "live"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    m = found.manifest
    assert sum(r.end - r.start for r in m.positions) == 100 and {r.topic for r in m.positions} == {"order"}
    assert m.store == query(path, "select value from unlost_meta where name = 'store_id'")[0][0]
    assert m.tables["unlost_log"].rows == 100 and m.tables["unlost_topic"].sha256
    assert found.bytes == target.stat().st_size and found.not_in_it == []
    with files.opened_backup(target) as (copy, manifest):
        assert manifest == m
        files.check_backup(copy, manifest, lambda c: backup.lines(verify_file(c)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "live"]  # looking makes nothing


def test_while_others_publish(path: Path, tmp_path: Path) -> None:
    """The copy is one moment: every event that was accepted before it, and of those meanwhile the first so many."""
    file = File(path)
    publish(file, range(100, 3000), 3000)
    accepted: list[int] = []
    stop = threading.Event()

    def go_on() -> None:
        n = 3000
        while not stop.is_set():
            publish(file, [n])
            accepted.append(n)
            n += 1

    thread = threading.Thread(target=go_on)
    steps: list[int] = []

    def said(what: str, done: int, _total: int) -> None:
        if what != "copying":
            return
        if not steps:
            thread.start()
        before = len(accepted)
        while len(accepted) < before + 5:  # those who publish are not held up by a copy that stands between two steps
            assert thread.is_alive()
            stop.wait(0.001)
        steps.append(done)

    try:
        backup.back_up(tmp_path / "b", url=url(path), said=said)
    finally:
        stop.set()
        thread.join()
        file.close()
    assert len(steps) > 1 and len(accepted) >= 5 * len(steps)
    in_it = query(tmp_path / "b", "select count(*) from unlost_log")[0][0]
    assert in_it == 3000  # the snapshot begins before the first step
    assert len(ids(path)) == 3000 + len(accepted)


def test_what_is_refused(path: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.write_text("mine")
    (path.parent / "link").symlink_to(path)
    for target, code in (
        (there, "UL1451"), (tmp_path / "no" / "b", "UL1452"), (path, "UL1454"), (path.parent / "link", "UL1454"),
        (path.with_name("events.db-wal"), "UL1454"), (path.with_name("events.db.marks"), "UL1454"),
        (tmp_path / "live", "UL1451"),
    ):  # fmt: skip
        with pytest.raises(UsageError) as e:
            backup.back_up(target, url=url(path))
        assert e.value.code == code, target
    assert there.read_text() == "mine"
    assert not list(tmp_path.rglob("*.part")) and len(ids(path)) == 100


def test_two_to_one_name(path: Path, tmp_path: Path) -> None:
    refused: list[str] = []

    def second(what: str, _done: int, _total: int) -> None:
        if what == "naming":
            with pytest.raises(Unavailable) as e:
                backup.back_up(tmp_path / "b", url=url(path))
            refused.append(e.value.code)

    backup.back_up(tmp_path / "b", url=url(path), said=second)
    assert refused == ["UL1459"]
    assert len(query(tmp_path / "b", "select 1 from unlost_log")) == 100


def test_a_name_that_is_taken_meanwhile(path: Path, tmp_path: Path) -> None:
    def take(what: str, _done: int, _total: int) -> None:
        if what == "naming":
            (tmp_path / "b").write_text("mine")

    with pytest.raises(UsageError) as e:
        backup.back_up(tmp_path / "b", url=url(path), said=take)
    assert e.value.code == "UL1451" and (tmp_path / "b").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "live"]


def test_a_damaged_file_gets_no_backup(path: Path, tmp_path: Path) -> None:
    query(path, "update unlost_log set crc = crc + 1 where at = 7")
    with pytest.raises(Damaged) as e:
        backup.back_up(tmp_path / "b", url=url(path))
    assert e.value.code == "UL1456" and "order/0:7" in e.value.found
    assert sorted(p.name for p in tmp_path.iterdir()) == ["live"]


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to mount a small disk")
def test_a_really_full_disk(path: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k,mode=700", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(Unavailable) as e:
            backup.back_up(small / "b", url=url(path))
        assert e.value.code == "UL1453" and "needed" in e.value.found
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


CHILD = """
import os, resource, signal, sys
from pathlib import Path
from unlost.errors import UnlostError
from unlost.ops import backup

verb, stage, live, target, limit = sys.argv[1:]
if int(limit):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

def said(what, done, total):
    if int(limit) and what == "copying":
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    if what == stage:
        os.kill(os.getpid(), signal.SIGKILL)

try:
    if verb == "backup":
        backup.back_up(Path(target), url=f"embedded://{live}", said=said)
    else:
        backup.restore(Path(target), url=f"embedded://{live}", operator="ada", reason="r", replace=True, said=said)
except UnlostError as e:
    print(e.code, e.what)
    sys.exit(e.exit_code)
"""


def child(verb: str, stage: str, live: Path, target: Path, limit: int = 0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CHILD), verb, stage, str(live), str(target), str(limit)],
        capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip


def test_a_disk_that_takes_no_more(path: Path, tmp_path: Path) -> None:
    """The writes themselves fail, half-way: a limit of the kernel on this process' files."""
    file = File(path)
    publish(file, range(100, 10_000), 1000)
    file.close()
    assert path.stat().st_size > 8_000_000
    done = child("backup", "", path, tmp_path / "b", limit=6_000_000)
    assert done.returncode == 4 and done.stdout.startswith("UL1453"), done
    assert sorted(p.name for p in tmp_path.iterdir()) == ["live"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    assert len(ids(path)) == 10_000


@pytest.mark.parametrize(
    "stage", ["copying", "checking", "checking unlost_log", "checking unlost_ledger", "naming", "done"]
)
def test_killed_while_it_backs_up(path: Path, tmp_path: Path, stage: str) -> None:
    target = tmp_path / "b"
    done = child("backup", stage, path, target)
    assert done.returncode == -signal.SIGKILL, done
    if stage == "done":
        with files.opened_backup(target) as (copy, manifest):
            files.check_backup(copy, manifest, lambda c: backup.lines(verify_file(c)))
        target.unlink()
    else:
        assert not target.exists() and (tmp_path / "b.part").exists()
        if stage != "naming":  # only its name is missing then
            with pytest.raises(UsageError) as e:
                restore(path, tmp_path / "b.part")
            assert e.value.code == "UL1455"
    assert len(ids(path)) == 100
    backup.back_up(target, url=url(path))  # over what was left
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "live"]


def test_killed_when_it_had_its_name(path: Path, tmp_path: Path) -> None:
    """Both names are of one file then: the next backup must not write into it."""
    target = tmp_path / "b"
    backup.back_up(target, url=url(path))
    (tmp_path / "c.part").hardlink_to(target)
    before = target.read_bytes()
    backup.back_up(tmp_path / "c", url=url(path))
    assert target.read_bytes() == before and not (tmp_path / "c.part").exists()


# --- putting one back ------------------------------------------------------------------------------------


@pytest.fixture
def copy(path: Path, tmp_path: Path) -> Path:
    """A backup of the 100 events; 50 more were accepted after it."""
    backup.back_up(tmp_path / "b", url=url(path))
    file = File(path)
    publish(file, range(100, 150))
    file.close()
    return tmp_path / "b"


def test_what_is_missing_is_named(path: Path, copy: Path) -> None:
    old = query(path, "select value from unlost_meta where name = 'store_id'")[0][0]
    ends = {
        r[0]: r[1] for r in query(path, "select at >> 40, max(at & ((1 << 40) - 1)) + 1 from unlost_log group by 1")
    }
    looked = restore(path, copy, dry_run=True)
    assert not looked.done and looked.aside is None and len(ids(path)) == 150
    found = restore(path, copy)
    assert found.done and found.aside is not None
    assert (
        found.missing.events == 50
        and found.missing.commits
        and found.missing.commits >= 1
        and not found.missing.unknown
    )
    assert {(r.partition, r.end) for r in found.missing.positions} == set(ends.items())
    assert ids(path) == {f"e{n}" for n in range(100)}
    assert ids(Path(found.aside) / "events.db") == {f"e{n}" for n in range(150)}
    meta = dict(query(path, "select name, value from unlost_meta"))
    assert meta["store_id"] == found.store != old and "backup" not in meta
    rows = query(path, "select operator, action, reason, topic, partition, position, result from unlost_operation")
    assert rows[0][:3] == ("ada", "restore", "a test") and "not in the backup: 50 events" in rows[0][6]
    first = min(found.missing.positions, key=lambda r: r.partition)
    assert rows[1][3:] == (
        "order",
        first.partition,
        first.start,
        f"positions {first.start} to {first.end - 1} are missing",
    )
    assert query(path, "select n from unlost_commit")[0][0] > found.manifest.commit + (found.missing.commits or 0)


def test_it_can_be_published_to_again(path: Path, copy: Path) -> None:
    restore(path, copy)
    file = File(path)
    publish(file, range(200, 210))
    file.close()
    assert len(ids(path)) == 110


def test_an_old_copy_put_there_by_hand_is_noticed(path: Path, copy: Path) -> None:
    for end in ("-wal", "-shm"):
        path.with_name(path.name + end).unlink(missing_ok=True)
    path.write_bytes(copy.read_bytes())
    with pytest.raises(Damaged) as e:
        File(path)
    assert e.value.code == "UL3002"


def test_where_only_the_marks_are_left(path: Path, copy: Path) -> None:
    for end in ("", "-wal", "-shm"):
        path.with_name(path.name + end).unlink(missing_ok=True)
    found = restore(path, copy, replace=False)
    assert found.missing.commits and "but for the marks" in found.missing.unknown and found.missing.positions == []
    assert len(ids(path)) == 100


def test_where_the_old_file_cannot_be_read(path: Path, copy: Path) -> None:
    for end in ("-wal", "-shm"):
        path.with_name(path.name + end).unlink(missing_ok=True)
    wreck = b"\x00" * 8192
    path.write_bytes(wreck)
    found = restore(path, copy)
    assert "cannot be read" in backup.brief(found.missing) or found.missing.unknown
    assert found.missing.commits and found.aside is not None
    assert (Path(found.aside) / "events.db").read_bytes() == wreck and len(ids(path)) == 100


def test_into_an_empty_place(path: Path, copy: Path, tmp_path: Path) -> None:
    fresh = tmp_path / "other" / "events.db"
    found = restore(fresh, copy, replace=False)
    assert found.aside is None and not found.replaces and len(ids(fresh)) == 100


def test_what_a_restore_refuses(path: Path, copy: Path, tmp_path: Path) -> None:
    def refused(code: str, source: Path = copy, **more: Any) -> str:
        with pytest.raises(UsageError) as e:
            restore(path, source, **more)
        assert e.value.code == code
        return e.value.found

    refused("UL1464", reason=" ")
    refused("UL1455", tmp_path / "none")
    refused("UL1455", path)  # a live file is no backup
    text = tmp_path / "text"
    text.write_text("no backup")
    refused("UL1455", text)
    assert "50 events" in refused("UL1458", replace=False)
    query(copy, "pragma user_version = 1000")
    refused("UL1465")
    assert len(ids(path)) == 150


def test_while_somebody_has_it_open(path: Path, copy: Path) -> None:
    file = File(path)
    with pytest.raises(UsageError) as e:
        restore(path, copy)
    assert e.value.code == "UL1457"
    publish(file, [999])
    file.close()
    held = subprocess.Popen(
        [sys.executable, "-c", "import sys; f = open(sys.argv[1]); print('open', flush=True); sys.stdin.read()", str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert held.stdout is not None and held.stdout.readline() == b"open\n"
        with pytest.raises(UsageError) as e:
            restore(path, copy)
        assert e.value.code == "UL1457" and str(held.pid) in e.value.found
    finally:
        held.communicate()
    assert len(ids(path)) == 151


@pytest.mark.parametrize(
    "change",
    [
        "update unlost_topic set created = created + 1", "delete from unlost_log where at = 49", "update unlost_commit set n = n + 1",
        "update unlost_log set crc = 0 where at = 5", "insert into unlost_service (name, policy, created) values ('x', '{}', 0)",
    ],
)  # fmt: skip
def test_a_backup_that_has_changed(path: Path, copy: Path, change: str) -> None:
    query(copy, change)
    with pytest.raises(Damaged) as e:
        restore(path, copy)
    assert e.value.code == "UL1456" and len(ids(path)) == 150


@pytest.mark.parametrize(
    "stage",
    [
        "copying",
        "checking",
        "checking unlost_log",
        "renewed",
        "moved .db",
        "moved .db-wal",
        "cleared",
        "placed",
        "done",
    ],
)
def test_killed_while_it_restores(path: Path, copy: Path, stage: str) -> None:
    """The old file whole, or the new one whole, or a refused start; and it can be run again."""
    done = child("restore", stage, path, copy)
    assert done.returncode == -signal.SIGKILL, done
    refused = {"moved .db": "UL3001", "moved .db-wal": "UL3001", "cleared": "UL3001", "placed": "UL3003"}
    if stage in refused:
        with pytest.raises(Damaged) as e:
            File(path)
        assert e.value.code == refused[stage]
    else:
        assert len(ids(path)) == (100 if stage == "done" else 150)
    assert len(ids(copy_of(copy))) == 100
    restore(path, copy)
    assert len(ids(path)) == 100 and not path.with_name("events.db.restoring").exists()
    olds = [len(query(p, "select 1 from unlost_log")) for p in sorted(path.parent.glob("*.replaced-*/events.db"))]
    assert max(olds) == 150


def copy_of(source: Path) -> Path:
    """Opening a file as a broker changes it."""
    target = source.with_name("opened") / "events.db"
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(source.read_bytes())
    return target


# --- services --------------------------------------------------------------------------------------------


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    known = {path for path, *_ in command_line._COMMANDS}
    missing = tuple(entry for entry in COMMANDS if entry[0] not in known)
    monkeypatch.setattr(command_line, "_COMMANDS", command_line._COMMANDS + missing)
    return Shell(tmp_path)


def test_a_service_goes_on_after_it(shell: Shell) -> None:
    """What was handled after the backup is handled again, the owners of before are fenced, the books balance."""
    shell.place("A1")
    shell.handle_all()
    target = shell.folder / "b"
    made = shell.quick("store", "backup", str(target), "--json")
    assert made.code == 0 and made.json["schema"] == "unlost.backup/1" and made.json["path"] == str(target), made
    shell.place("A1")
    shell.place("A2")
    shell.handle_all()
    epochs = dict(query(shell.database, "select partition, epoch from unlost_progress"))
    result = shell.quick("store", "restore", str(target), "--reason", "r", "--replace", "--yes", "--operator", "ada")
    assert result.code == 0 and "missing: order/" in result.out and "delivered again: billing order/" in result.out, (
        result
    )
    after = dict(query(shell.database, "select partition, epoch from unlost_progress"))
    assert epochs.keys() == after.keys() and all(after[p] > epochs[p] for p in epochs)
    assert query(shell.database, "select * from unlost_process") == []
    shell.place("A3")
    shell.handle_all()
    audit = shell.quick("audit", "--json")
    assert audit.code == 0, audit
    assert shell.quick("doctor", "--verify").code == 0


def test_the_commands(shell: Shell) -> None:
    assert shell.quick("store", "backup").code == 2  # there is no file, and none is made
    assert not shell.database.exists()
    shell.place("A1")
    made = shell.quick("store", "backup")
    assert made.code == 0 and "1 event" in made.out and "copy it to another one" in made.out, made
    target = next(shell.database.parent.glob("*.backup"))
    again = shell.quick("store", "backup", str(target))
    assert again.code == 2 and "UL1451" in again.err
    look = shell.quick("store", "restore", str(target), "--dry-run", "--json")
    assert look.code == 0 and look.json["done"] is False and look.json["events_missing"] == 0, look
    assert "nothing was changed" in shell.quick("store", "restore", str(target), "--dry-run").out
    assert "UL1464" in shell.quick("store", "restore", str(target), "--yes", "--replace").err
    assert "UL1458" in shell.quick("store", "restore", str(target), "--reason", "r").err
    no_one = shell.quick("store", "restore", str(target), "--reason", "r", "--replace")
    assert no_one.code == 2 and "UL1333" in no_one.err, no_one  # nobody can be asked


KAFKA = "kafka://localhost:1"


def test_what_is_elsewhere_is_said(shell: Shell) -> None:
    both = {"UNLOST_STORE": "postgresql://u:s3cret@localhost:1/shop"}
    for verb in (("backup",), ("restore", "b", "--reason", "r", "--yes")):
        result = shell.quick("store", *verb, UNLOST_BROKER=KAFKA, **both)
        assert result.code == 2 and "UL1450" in result.err and "pg_dump" in result.err and "s3cret" not in result.err, (
            result
        )
    shell.place("A1")
    result = shell.quick("store", "backup", "b", **both)
    assert result.code == 0 and "not in it: the store in postgresql://" in result.out and "s3cret" not in result.out, (
        result
    )


def test_the_store_beside_kafka(shell: Shell, tmp_path: Path) -> None:
    """Its id stays: by it the notes on the cluster say that the store is older (UL3023)."""
    place = tmp_path / "store.db"
    file = File(place)
    file.write_sync(lambda tx: tx.execute("insert into unlost_meta values ('broker', 'kafka c')") and None)
    id = file.store_id
    env = {"UNLOST_BROKER": KAFKA, "UNLOST_STORE": url(place)}
    file.close()
    made = shell.quick("store", "backup", "b", **env)
    assert made.code == 0 and "not in it: the events themselves" in made.out, made
    file = File(place)
    file.write_sync(
        lambda tx: tx.execute("insert into unlost_outbox (topic, head, added) values ('order', x'00', 0)") and None
    )
    file.close()
    shell.place("A1")
    wrong = shell.quick("store", "restore", "b", "--reason", "r", "--replace", "--yes")
    assert wrong.code == 2 and "UL1463" in wrong.err and "kafka c" in wrong.err, wrong
    result = shell.quick("store", "restore", "b", "--reason", "r", "--replace", "--yes", **env)
    assert result.code == 0 and "missing: 1 event of the outbox" in result.out and "UL3023" in result.out, result
    file = File(place)
    assert file.store_id == id
    file.close()


def test_books_after_a_backup_of_a_running_service(shell: Shell) -> None:
    """A backup taken while a service runs, restored elsewhere: its books balance, and nothing of it is owned."""
    for n in range(5):
        shell.place(f"A{n}")
    with shell.start("run", "shop") as running:
        shell.until(lambda s: s["waiting"] == 0)
        made = shell.quick("store", "backup", "b")
        assert made.code == 0, made
        assert running.end(signal.SIGTERM) == 0
    other = shell.folder / "elsewhere" / "events.db"
    result = shell.quick("store", "restore", "b", "--reason", "r", "--yes", UNLOST_BROKER=url(other))
    assert result.code == 0, result
    file = File(other)
    found = books(FileRecords(file))
    owned = file.read(
        lambda c: c.execute("select count(*) from unlost_assignment where process is not null").fetchone()[0]
    )
    file.close()
    assert found.balanced
    assert owned == 0
