"""What is refused when a file is opened: each with its code, its reason and a way out."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import apsw
import pytest

from unlost.brokers.embedded.broker import EmbeddedBroker
from unlost.errors import Damaged, Unavailable, UnlostError, UsageError
from unlost.sqlite import file as file_module
from unlost.sqlite import guards
from unlost.sqlite.file import File
from unlost.sqlite.guards import beside
from unlost.sqlite.schema import FORMAT

NOBODY = 65534


def make(path: Path, events: int = 30, *, clean: bool = True) -> list[str]:
    """A file with acknowledged events; not `clean`: as `kill -9` leaves it, with everything in the WAL."""
    script = f"""
        import asyncio, os
        from pathlib import Path
        from unlost.brokers.embedded.broker import EmbeddedBroker
        from unlost.events import Envelope
        from unlost.events.topic import Topic
        from unlost.sqlite.file import File

        async def main():
            file = File(Path({str(path)!r}))
            broker = EmbeddedBroker(file)
            await broker.declare([Topic("order", partitions=2)])
            for n in range({events}):
                await broker.publish([
                    Envelope(id=f"e{{n}}", source="shop", type="T", time="2026-01-01T00:00:00Z", topic="order",
                             key=b"%d" % n, data=b"x" * 400)
                ])
            if {clean}:
                file.close()
            os._exit(0)

        asyncio.run(main())
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=60)
    return [f"e{n}" for n in range(events)]


def read_all(path: Path) -> set[str]:
    """Opens as every program does, and reads every event with all checks."""
    file = File(path)
    try:
        broker = EmbeddedBroker(file)
        found = set()
        for topic in asyncio.run(broker.topics()):
            for partition in range(topic.partitions):
                events = asyncio.run(broker.read(topic.name, partition, 0, 10_000))
                found |= {a.envelope.id for a in events if a.envelope is not None}
        return found
    finally:
        file.close()


def refused(path: Path, kind: type[UnlostError], code: str, *words: str) -> UnlostError:
    """Opening raises this, says why and what to do, and leaves nothing open behind it."""
    with pytest.raises(kind) as caught:
        File(path)
    error = caught.value
    assert (type(error), error.code) == (kind, code), str(error)
    assert error.what and error.fix
    for word in words:
        assert word in str(error), str(error)
    assert not [fd for fd in open_descriptors() if str(fd).startswith(str(path))], "something was left open"
    return error


def open_descriptors() -> list[Path]:
    folder = Path("/proc/self/fd")
    found = []
    for fd in folder.iterdir() if folder.is_dir() else ():
        try:
            found.append(fd.readlink())
        except OSError:
            continue
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.db"


# --- the place ------------------------------------------------------------------------------------------------


def test_an_old_sqlite_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apsw, "sqlite_lib_version", lambda: "3.51.2")
    refused(path, UsageError, "UL1120", "3.51.2", "3.51.3", "pip install")
    assert not path.exists()


@pytest.mark.parametrize("version", ["3.51.3", "3.54.1", "4.0.0"])
def test_a_good_sqlite_is_taken(path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(apsw, "sqlite_lib_version", lambda: version)
    File(path).close()


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "ceph"])
def test_a_network_file_system_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(guards, "file_system", lambda folder: kind)
    refused(path, UsageError, "UL1121", kind, "local disk")
    assert not path.exists()


def test_the_file_system_of_a_folder_is_known() -> None:
    if Path("/proc/self/mounts").exists():
        assert guards.file_system(Path("/proc")) == "proc"
        assert guards.file_system(Path("/proc/self")) == "proc"


# --- a second library -------------------------------------------------------------------------------------------


def test_another_library_may_not_open_our_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = File(path)
    other = path.with_name("other.db")
    link = path.with_name("link.db")
    link.symlink_to(path)
    monkeypatch.chdir(path.parent)
    names = [str(path), "events.db", path, bytes(path), link, "./../" + path.parent.name + "/events.db"]
    for name in names:
        with pytest.raises(UsageError) as caught:
            sqlite3.connect(name)
        assert caught.value.code == "UL1122"
    for uri in (f"file:{path}", f"file:{path}?mode=ro", f"file://{path}", f"file:{path.parent}/%65vents.db"):
        with pytest.raises(UsageError) as caught:
            sqlite3.connect(uri, uri=True)
        assert caught.value.code == "UL1122"
    sqlite3.connect(other).close()
    sqlite3.connect(":memory:").close()
    again = File(path)
    file.close()
    with pytest.raises(UsageError):  # still open once
        sqlite3.connect(path)
    again.close()
    sqlite3.connect(path).close()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are seen in /proc only")
def test_a_file_that_another_library_has_open_is_refused(path: Path) -> None:
    make(path, 3)
    other = sqlite3.connect(path)
    with pytest.raises(UsageError) as caught:
        File(path)
    assert caught.value.code == "UL1122"
    assert "another process" in caught.value.fix
    other.close()
    assert len(read_all(path)) == 3


# --- another file than ours -------------------------------------------------------------------------------------


def test_a_foreign_sqlite_file_is_refused_and_left_alone(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute("create table mine (x)")
    db.commit()
    db.close()
    refused(path, UsageError, "UL1111", "not one of unlost")
    db = sqlite3.connect(path)
    assert db.execute("select name from sqlite_schema").fetchall() == [("mine",)]
    db.close()


def test_a_newer_format_is_refused(path: Path) -> None:
    make(path, 3)
    db = sqlite3.connect(path)
    db.execute(f"pragma user_version = {FORMAT + 1}")
    db.close()
    refused(path, UsageError, "UL1112", f"file format {FORMAT + 1}", "pip install -U unlost")


def test_an_older_format_is_brought_up_to_date(path: Path) -> None:
    make(path, 3)
    db = sqlite3.connect(path)
    for table in ("unlost_gap", "unlost_outbox", "unlost_relay", "unlost_follower", "unlost_delayed"):
        db.execute(f"drop table {table}")
    db.execute("alter table unlost_progress drop column begun")
    db.execute("alter table unlost_service drop column hold")
    db.execute("pragma user_version = 1")
    db.commit()
    db.close()
    make(path, 2)
    db = sqlite3.connect(path)
    assert db.execute("pragma user_version").fetchone() == (FORMAT,)
    assert db.execute("select process from unlost_relay").fetchall() == [(None,)]
    assert db.execute("select begun from unlost_progress").fetchall() == []
    assert db.execute("select count(*) from unlost_log").fetchone() == (5,)
    db.close()


@pytest.mark.parametrize("content", [b"hello, world\n" * 50, b"\0" * 8192, random.Random(1).randbytes(8192)])
def test_a_file_of_something_else_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    refused(path, UsageError, "UL1111", "choose another path")
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path], "nothing is put beside a file that is not ours"


def test_a_file_of_ours_whose_header_is_gone_is_damaged(path: Path) -> None:
    make(path, 3)
    path.write_bytes(b"hello, world\n" * 50)
    path.with_name("events.db-wal").unlink()  # it holds the first page, too
    refused(path, Damaged, "UL3004")


def test_an_empty_file_becomes_a_new_one(path: Path) -> None:
    path.touch()
    file = File(path)
    assert file.created
    file.close()


def test_a_folder_in_its_place_is_refused(path: Path) -> None:
    path.mkdir()
    refused(path, UsageError, "UL1123")


def test_another_stores_file_is_refused(path: Path, tmp_path: Path) -> None:
    make(path, 5)
    make(tmp_path / "b" / "events.db", 9)
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    shutil.copy(tmp_path / "b" / "events.db", path)
    refused(path, Damaged, "UL3003", "events.db.marks")


def test_an_older_copy_is_refused(path: Path, tmp_path: Path) -> None:
    make(path, 5)
    shutil.copy(path, tmp_path / "backup")
    make(path, 5)
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    shutil.copy(tmp_path / "backup", path)
    error = refused(path, Damaged, "UL3002", "newest copy", "events.db.marks")
    assert error.exit_code == 3
    beside(path, "marks").unlink()  # the way out that it names
    assert len(read_all(path)) == 5


# --- damage -------------------------------------------------------------------------------------------------------


def copy_of(folder: Path, to: Path) -> Path:
    if to.exists():
        shutil.rmtree(to)
    to.mkdir()
    for name in folder.glob("events.*"):
        if name.suffix != ".lock" and name.is_file():
            shutil.copy(name, to / name.name)
    (to / "events.db-shm").unlink(missing_ok=True)
    return to / "events.db"


def lost_in_silence(path: Path, acknowledged: set[str]) -> set[str]:
    """What is missing without anybody saying so. Raises whatever is not an error of ours."""
    try:
        return acknowledged - read_all(path)
    except UnlostError as e:
        assert e.what and e.fix
        assert e.exit_code in (2, 3), str(e)
        return set()


@pytest.mark.parametrize("clean", [True, False])
def test_a_file_cut_at_any_length_is_noticed(path: Path, tmp_path: Path, clean: bool) -> None:
    acknowledged = set(make(path, clean=clean))
    wal = path.with_name(path.name + "-wal")
    for victim in (path, wal):
        size = victim.stat().st_size
        lengths = {0, 1, 16, 50, 99, 100, 512, 4095, 4096, 4097, size - 1, size // 2, size - 4096}
        lengths |= set(range(0, size, max(4096, size // 12 // 4096 * 4096)))
        for length in sorted(n for n in lengths if 0 <= n < size):
            copy = copy_of(path.parent, tmp_path / "cut")
            with (copy.parent / victim.name).open("r+b") as f:
                f.truncate(length)
            assert lost_in_silence(copy, acknowledged) == set(), f"{victim.name} cut at {length}"


def test_an_empty_file_with_marks_is_a_loss(path: Path) -> None:
    make(path, 5)
    os.truncate(path, 0)
    error = refused(path, Damaged, "UL3001", "empty")
    assert error.exit_code == 3
    path.unlink()
    refused(path, Damaged, "UL3001", "gone")


def test_a_deleted_hot_wal_is_a_loss(path: Path) -> None:
    make(path, clean=False)
    path.with_name(path.name + "-wal").unlink()
    path.with_name(path.name + "-shm").unlink()
    with pytest.raises(Damaged) as caught:
        File(path)
    assert caught.value.code in ("UL3001", "UL3002", "UL3004")
    assert caught.value.exit_code == 3


def test_random_damage_never_loses_in_silence(path: Path, tmp_path: Path) -> None:
    """Bytes changed, pages zeroed: opening and reading either says so with an error of ours, or all is there."""
    acknowledged = set(make(path, 60))
    path.with_name(path.name + "-wal").write_bytes(b"")
    size = path.stat().st_size
    chance = random.Random(5)
    noticed = 0
    for n in range(60):
        copy = copy_of(path.parent, tmp_path / "hurt")
        raw = bytearray(copy.read_bytes())
        at = chance.randrange(100) if n < 15 else chance.randrange(size)
        if n % 3 == 0:
            at -= at % 4096
            raw[at : at + 4096] = bytes(len(raw[at : at + 4096]))
        else:
            for i in range(at, min(size, at + chance.choice((1, 4, 64)))):
                raw[i] ^= chance.randrange(1, 256)
        copy.write_bytes(raw)
        try:
            assert read_all(copy) == acknowledged, f"damage {n} at {at}"
        except UnlostError as e:
            assert e.what and e.fix
            noticed += 1
    assert noticed > 10


def test_a_changed_event_is_named_when_opening(path: Path) -> None:
    make(path, 5)
    db = sqlite3.connect(path)
    db.execute("update unlost_log set data = ? where at = (select max(at) from unlost_log)", (b"y" * 400,))
    db.commit()
    db.close()
    refused(path, Damaged, "UL3004", "order/1:", "checksum")


def test_a_missing_event_is_named_when_opening(path: Path) -> None:
    make(path, 12)
    db = sqlite3.connect(path)
    db.execute("delete from unlost_log where at = (select max(at) - 1 from unlost_log)")
    db.commit()
    db.close()
    refused(path, Damaged, "UL3004", "order/1:", "missing")


def test_missing_tables_are_damage(path: Path) -> None:
    make(path, 3)
    db = sqlite3.connect(path)
    db.execute("drop table unlost_meta")
    db.commit()
    db.close()
    refused(path, Damaged, "UL3004")


# --- rights and locks -----------------------------------------------------------------------------------------------


def as_nobody(path: Path) -> str:
    """What a user without rights is told. Its own process: rights cannot be dropped and taken back here."""
    script = f"""
        import os
        from pathlib import Path
        from unlost.errors import UnlostError
        from unlost.sqlite.file import File
        os.setgroups([])
        os.setgid({NOBODY})
        os.setuid({NOBODY})
        try:
            File(Path({str(path)!r})).close()
        except UnlostError as e:
            print(e.code, e.exit_code, e.fix)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A folder that others can reach, unlike those of pytest."""
    with tempfile.TemporaryDirectory() as outer:
        Path(outer).chmod(0o755)
        yield Path(outer) / "place"


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become nobody")
@pytest.mark.parametrize("name", ["events.db", "events.db.lock", "events.db.marks", "events.db.run", "."])
def test_missing_rights_are_explained(open_place: Path, name: str) -> None:
    place = open_place
    path = place / "events.db"
    make(path, 3)
    for item in (place, *place.rglob("*")):
        os.chown(item, NOBODY, NOBODY)
    assert as_nobody(path) == "", "with all rights it opens"
    victim = place / name
    os.chown(victim, 0, 0)
    victim.chmod(0o500 if victim.is_dir() else 0o400)
    if name == ".":
        beside(path, "lock").unlink()
    said = as_nobody(path)
    assert said.startswith("UL1123 2 check the owner"), said


def hold_locked(path: Path, begin: str) -> subprocess.Popen[str]:
    script = f"""
        import sqlite3, sys
        db = sqlite3.connect({str(path)!r}, isolation_level=None)
        {begin}
        print("held", flush=True)
        sys.stdin.read()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize(
    "begin",
    [
        "db.execute('begin exclusive')",
        "db.execute('pragma locking_mode = exclusive'); db.execute('begin exclusive'); "
        "db.execute('update unlost_commit set n = n'); db.execute('commit')",
    ],
)
def test_a_file_locked_by_another_program_is_explained(path: Path, monkeypatch: pytest.MonkeyPatch, begin: str) -> None:
    monkeypatch.setattr(file_module, "BUSY_MS", 50)
    acknowledged = set(make(path, 3))
    holder = hold_locked(path, begin)
    try:
        error = refused(path, Unavailable, "UL2002", "close it")
        assert error.exit_code == 4
    finally:
        holder.communicate("")
    assert read_all(path) == acknowledged


def test_a_held_write_lock_is_explained(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_module, "OPEN_SECONDS_MAX", 0.05)
    make(path, 3)
    lock = guards.open_lock(beside(path, "lock"))
    guards.lock_within(lock, 1, path)
    with pytest.raises(Unavailable, match=r"(?s)UL2010.*SIGSTOP"):
        File(path)
    os.close(lock)
    assert len(read_all(path)) == 3


def test_everything_is_private(path: Path) -> None:
    file = File(path)
    try:
        for item in (path, *path.parent.glob("events*"), *(beside(path, "run")).iterdir()):
            assert item.stat().st_mode & 0o077 == 0, item
    finally:
        file.close()


def test_a_new_folder_is_private_and_ignored_by_git(tmp_path: Path) -> None:
    file = File(tmp_path / ".unlost" / "events.db")
    file.close()
    assert (tmp_path / ".unlost").stat().st_mode & 0o077 == 0
    assert (tmp_path / ".unlost" / ".gitignore").read_text() == "*\n"


def test_a_link_is_followed_for_everything(path: Path, tmp_path: Path) -> None:
    """Else the marks of one name would not protect the file under its other name."""
    real = tmp_path / "real" / "events.db"
    make(real, 3)
    path.symlink_to(real)
    file = File(path)
    assert file.path == real
    assert file.marks_path == beside(real, "marks")
    file.close()


def test_the_wal_stays_when_we_leave(path: Path) -> None:
    File(path).close()
    assert path.with_name(path.name + "-wal").exists()


def test_each_setting_is_read_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A SQLite that does not take a setting is no place for an acknowledged event."""
    original: Callable[..., object] = apsw.Connection.pragma

    class Stubborn(apsw.Connection):
        def pragma(self, name: str, value: object = None, **more: object) -> object:
            if name == "synchronous" and value is not None:
                value = 1
            return original(self, name, value, **more) if value is not None else original(self, name, **more)

    monkeypatch.setattr(file_module.apsw, "Connection", Stubborn)
    refused(path, UsageError, "UL1110", "synchronous")


def test_events_are_not_lost_by_any_refusal(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    acknowledged = set(make(path, 10, clean=False))
    monkeypatch.setattr(apsw, "sqlite_lib_version", lambda: "3.50.0")
    refused(path, UsageError, "UL1120")
    monkeypatch.undo()
    assert read_all(path) == acknowledged
