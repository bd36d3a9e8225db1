"""The file in use: groups, blocks, failing disks, forks, several processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest

from unlost.brokers.embedded.broker import EmbeddedBroker
from unlost.errors import Damaged, OutcomeUnknown, StatementFailed, Unavailable, UnlostError, UsageError
from unlost.events import Envelope
from unlost.events.topic import Topic
from unlost.sqlite import file as file_module
from unlost.sqlite.file import File
from unlost.sqlite.process import examine
from unlost.sqlite.transaction import Transaction
from unlost.sqlite.turn import Block, BlockExpired
from unlost.testing.powerloss import Disk, Op

SECONDS = 20.0  # how long a test waits for something that must happen


def event(id: str, size: int = 200, topic: str = "order") -> Envelope:
    return Envelope(
        id=id, source="shop", type="T", time="2026-01-01T00:00:00Z", topic=topic, key=b"k", data=b"x" * size
    )


def publish(file: File, id: str, size: int = 200) -> None:
    file.write_sync(lambda tx: tx.append([event(id, size)]), SECONDS)


def declare(file: File) -> None:
    asyncio.run(EmbeddedBroker(file).declare([Topic("order", partitions=1)]))


def ids(file: File) -> list[str]:
    found = asyncio.run(EmbeddedBroker(file).read("order", 0, 0, 100_000))
    assert [a.position for a in found] == list(range(len(found)))
    return [a.envelope.id for a in found if a.envelope is not None]


def until(true: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.005)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[File]:
    file = File(tmp_path / "events.db")
    declare(file)
    yield file
    file.close()


# --- groups -----------------------------------------------------------------------------------------------------


class Waiter:
    """Keeps the writer busy, so that what is submitted meanwhile becomes one group."""

    def __init__(self, file: File) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=file.write_sync, args=(self.hold, SECONDS))
        self.thread.start()
        assert self.begun.wait(SECONDS)

    def hold(self, tx: Transaction) -> None:
        self.begun.set()
        assert self.go.wait(SECONDS)

    def release(self) -> None:
        self.go.set()
        self.thread.join(SECONDS)


async def together(file: File, *works: Callable[[Transaction], Any]) -> list[Any]:
    """Runs all of them in one group, and proves that it was one commit."""
    waiter = Waiter(file)
    tasks = [asyncio.ensure_future(file.write(work)) for work in works]
    await asyncio.sleep(0)
    before = file._commits
    waiter.release()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert file._commits == before + 2, "the waiter's commit and one more"
    return results


def test_one_that_fails_harms_no_other(file: File) -> None:
    def fails_before(tx: Transaction) -> None:
        raise UsageError("UL9999", "no", fix="no")

    def fails_after(tx: Transaction) -> None:
        tx.append([event("never")])
        raise ValueError("half-way")

    def fails_in_sql(tx: Transaction) -> None:
        tx.append([event("never either")])
        tx.execute("insert into unlost_commit values (null)")

    def fails_between(tx: Transaction) -> None:
        tx.append([event("nor this"), None])  # type: ignore[list-item]

    works = [
        lambda tx: tx.append([event("a")]), fails_before, lambda tx: tx.append([event("b")]), fails_after,
        fails_in_sql, fails_between, lambda tx: tx.append([event("c"), event("d")]),
    ]  # fmt: skip
    results = asyncio.run(together(file, *works))
    assert [r[0].position for r in (results[0], results[2], results[6])] == [0, 1, 2]
    assert [type(r) for r in (results[1], results[3], results[4], results[5])] == [
        UsageError, ValueError, apsw.ConstraintError, AttributeError,
    ]  # fmt: skip
    assert ids(file) == ["a", "b", "c", "d"]


def test_a_caller_that_was_cancelled_harms_no_other(file: File) -> None:
    async def main() -> None:
        waiter = Waiter(file)
        first = asyncio.ensure_future(file.write(lambda tx: tx.append([event("a")])))
        second = asyncio.ensure_future(file.write(lambda tx: tx.append([event("b")])))
        await asyncio.sleep(0)
        first.cancel()
        waiter.release()
        await second
        with pytest.raises(asyncio.CancelledError):
            await first

    asyncio.run(main())
    assert ids(file) == ["a", "b"], "cancelled means unknown, and here it was accepted"


def test_closing_finishes_what_is_queued(tmp_path: Path) -> None:
    file = File(tmp_path / "events.db")
    declare(file)

    async def main() -> list[Any]:
        waiter = Waiter(file)
        tasks = [asyncio.ensure_future(file.write(lambda tx, n=n: tx.append([event(f"e{n}")]))) for n in range(50)]
        await asyncio.sleep(0)
        closer = threading.Thread(target=file.close)
        closer.start()
        waiter.release()
        closer.join(SECONDS)
        return await asyncio.gather(*tasks)

    assert len(asyncio.run(main())) == 50
    file.close()
    for use in (lambda: publish(file, "x"), lambda: file.read(lambda c: None)):
        with pytest.raises(UsageError) as caught:
            use()
        assert caught.value.code == "UL1114"
    again = File(tmp_path / "events.db")
    assert ids(again) == [f"e{n}" for n in range(50)]
    again.close()


def test_writers_and_a_closer_at_once_leave_nobody_waiting(tmp_path: Path) -> None:
    for _ in range(5):
        file = File(tmp_path / "events.db")
        declare(file)
        ended: list[str] = []

        def writer(file: File = file, ended: list[str] = ended) -> None:
            try:
                while True:
                    publish(file, "e")
            except UsageError as e:
                ended.append(e.code)

        threads = [threading.Thread(target=writer) for _ in range(4)]
        for thread in threads:
            thread.start()
        file.close()
        for thread in threads:
            thread.join(SECONDS)
        assert ended == ["UL1114"] * 4


# --- blocks -----------------------------------------------------------------------------------------------------


class Lent:
    """A block as `ctx.transaction()` uses it, from this thread."""

    def __init__(self, file: File, seconds: float = SECONDS) -> None:
        self.awake, self.over = threading.Event(), threading.Event()
        self.refused: BaseException | None = None
        self.failed: BaseException | None = None
        self.block = Block(self._wake, self._committed, seconds)
        file.submit_block(self.block)

    def _wake(self, error: BaseException | None) -> None:
        self.refused = error
        self.awake.set()

    def _committed(self, error: BaseException | None) -> None:
        self.failed = error
        self.over.set()

    def begin(self) -> Block:
        assert self.awake.wait(SECONDS)
        if self.refused is not None:
            raise self.refused
        return self.block

    def finish(self) -> None:
        self.block.finish(lambda tx: None)
        assert self.over.wait(SECONDS)
        if self.failed is not None:
            raise self.failed


def run(file: File, *statements: str) -> None:
    lent = Lent(file)
    block = lent.begin()
    try:
        for sql in statements:
            block.execute(sql)
    except BaseException:
        block.abort()
        raise
    lent.finish()


def rows(file: File, sql: str) -> list[Any]:
    return file.read(lambda c: c.execute(sql).fetchall())


@pytest.fixture
def mine(file: File) -> File:
    run(file, "create table mine (n integer primary key)")
    return file


def test_a_block_is_one_commit_with_its_events(mine: File) -> None:
    lent = Lent(mine)
    block = lent.begin()
    block.execute("insert into mine values (?)", (1,))
    assert block.execute("select n from mine") == [(1,)]
    block.run(lambda tx: tx.append([event("a")]))
    assert rows(mine, "select * from mine") == [], "not before the commit"
    assert ids(mine) == []
    lent.finish()
    assert rows(mine, "select * from mine") == [(1,)]
    assert ids(mine) == ["a"]


def test_a_block_that_gives_up_leaves_nothing(mine: File) -> None:
    lent = Lent(mine)
    block = lent.begin()
    block.execute("insert into mine values (1)")
    block.run(lambda tx: tx.append([event("a")]))
    block.abort()
    block.abort()
    with pytest.raises(UsageError) as caught:
        block.execute("insert into mine values (2)")
    assert caught.value.code == "UL1204"
    publish(mine, "b")
    assert rows(mine, "select * from mine") == []
    assert ids(mine) == ["b"]


@pytest.mark.parametrize(
    "sql",
    [
        "insert into unlost_commit values (7)",
        "delete from UNLOST_log",
        "select * from unlost_log",
        "drop table unlost_inbox",
        "create trigger t after insert on unlost_log begin select 1; end",
        "with x as (select at from unlost_log) select * from x",
        "pragma synchronous = 0",
        "pragma user_version",
        "attach database ':memory:' as other",
        "commit",
        "rollback",
        "begin immediate",
        "end",
        "savepoint mine",
        "release unlost_part",
        "rollback to unlost_part",
        "select 1; commit",
        "select value from unlost_meta where name = 'store_id'",  # prepared by us before, so it is in the cache
    ],
)
def test_a_block_may_not_touch_what_is_ours(mine: File, sql: str) -> None:
    lent = Lent(mine)
    block = lent.begin()
    block.execute("insert into mine values (1)")
    with pytest.raises(UsageError) as caught:
        block.execute(sql)
    assert caught.value.code == "UL1203"
    block.execute("insert into mine values (2)")
    lent.finish()
    assert rows(mine, "select * from mine") == [(1,), (2,)]
    assert rows(mine, "select count(*) from unlost_commit") == [(1,)]
    publish(mine, "a")
    assert ids(mine) == ["a"]


def test_a_view_or_trigger_is_no_way_around(mine: File) -> None:
    with pytest.raises(UsageError):
        run(mine, "create view v as select * from unlost_log", "select * from v")
    with pytest.raises(UsageError):
        run(
            mine,
            "create trigger t after insert on mine begin delete from unlost_log; end",
            "insert into mine values (1)",
        )
    assert rows(mine, "select name from sqlite_schema where type in ('view', 'trigger')") == []


def test_a_block_that_takes_too_long_is_rolled_back(mine: File) -> None:
    lent = Lent(mine, 0.05)
    block = lent.begin()
    block.execute("insert into mine values (1)")
    publish(mine, "after it")  # waits for the block to be over
    with pytest.raises(BlockExpired) as caught:
        block.execute("insert into mine values (2)")
    assert caught.value.code == "UL1205"
    with pytest.raises(BlockExpired):
        block.finish(lambda tx: None)
    block.abort()
    assert rows(mine, "select * from mine") == []
    assert ids(mine) == ["after it"]


ENDLESS = "with recursive c(x) as (select 1 union all select x + 1 from c) select max(x) from c"


@pytest.mark.parametrize("sql", [ENDLESS, f"insert into mine {ENDLESS}"])
def test_a_statement_that_never_ends_is_ended(mine: File, sql: str) -> None:
    """SQLite rolls the whole commit back when a writing statement is interrupted: the others are done again."""

    async def main() -> None:
        waiter = Waiter(mine)
        before = asyncio.ensure_future(mine.write(lambda tx: tx.append([event("a")])))
        await asyncio.sleep(0)
        slow, other = Lent(mine, 0.1), Lent(mine)
        after = asyncio.ensure_future(mine.write(lambda tx: tx.append([event("b")])))
        await asyncio.sleep(0)
        waiter.release()
        block = await asyncio.to_thread(slow.begin)
        with pytest.raises(UnlostError):
            await asyncio.to_thread(block.execute, sql)
        block.abort()
        with contextlib.suppress(Unavailable):  # it may be told to come again; then nothing of it is there
            (await asyncio.to_thread(other.begin)).execute("insert into mine values (5)")
            await asyncio.to_thread(other.finish)
        assert [p[0].position for p in await asyncio.gather(before, after)] == [0, 1]

    asyncio.run(main())
    assert ids(mine) == ["a", "b"]
    run(mine, "insert into mine values (9)")
    assert (9,) in rows(mine, "select * from mine")


@pytest.mark.parametrize("go_on", [True, False])
def test_a_block_that_ends_the_commit_harms_no_other(mine: File, go_on: bool) -> None:
    """`or rollback` rolls back more than the block: nothing may be half there, and no other may notice."""
    run(mine, "insert into mine values (1)")

    async def main() -> None:
        waiter = Waiter(mine)
        before = asyncio.ensure_future(mine.write(lambda tx: tx.append([event("a")])))
        await asyncio.sleep(0)
        first, bad, last = Lent(mine), Lent(mine), Lent(mine)
        after = asyncio.ensure_future(mine.write(lambda tx: tx.append([event("b")])))
        await asyncio.sleep(0)
        waiter.release()
        block = await asyncio.to_thread(first.begin)
        block.execute("insert into mine values (2)")
        block.finish(lambda tx: None)
        block = await asyncio.to_thread(bad.begin)
        block.execute("insert into mine values (3)")
        with pytest.raises(StatementFailed, match="ConstraintError"):
            block.execute("insert or rollback into mine values (1)")
        if go_on:  # it would be a commit of its own
            with pytest.raises(UnlostError):
                block.execute("insert into mine values (4)")
            with pytest.raises(UnlostError):
                block.finish(lambda tx: None)
        else:
            block.abort()
        assert [p[0].position for p in await asyncio.gather(before, after)] == [0, 1]
        assert await asyncio.to_thread(first.over.wait, SECONDS)
        assert isinstance(first.failed, Unavailable), "its handler tries again"
        with pytest.raises(Unavailable):
            await asyncio.to_thread(last.begin)

    asyncio.run(main())
    assert ids(mine) == ["a", "b"]
    assert rows(mine, "select * from mine") == [(1,)]
    run(mine, "insert into mine values (2)")


def test_a_block_whose_loop_is_gone_stops_nobody(mine: File) -> None:
    def gone(error: BaseException | None) -> None:
        raise RuntimeError("Event loop is closed")

    mine.submit_block(Block(gone, gone, SECONDS))
    finished = Block(lambda error: None, gone, SECONDS)
    mine.submit_block(finished)
    until(lambda: finished.state == "open", "the block begins")
    finished.finish(lambda tx: None)
    publish(mine, "a")
    assert ids(mine) == ["a"]


# --- failing disks ----------------------------------------------------------------------------------------------


class Space:
    """A disk with room for so many bytes; a write over it is refused as a full disk does."""

    def __init__(self, disk: Disk, left: int) -> None:
        self.left = left
        disk.before = self.check

    def check(self, op: Op) -> None:
        if op.kind == "write" and op.data:
            if len(op.data) > self.left:
                raise apsw.FullError("disk full")
            self.left -= len(op.data)


@pytest.mark.parametrize("room", [0, 20, 30, 4000, 4200, 9000, 12_500, 20_000, 40_000, 60_000])
def test_a_full_disk_acknowledges_nothing_and_goes_on_later(tmp_path: Path, room: int) -> None:
    with Disk() as disk:
        file = disk.open(tmp_path / "live" / "events.db")
        declare(file)
        publish(file, "first")
        space = Space(disk, room)
        acknowledged, refused = ["first"], 0
        for n in range(12):
            try:
                publish(file, f"e{n}", 3000)
            except Unavailable as e:
                assert e.code == "UL2001"
                assert "free some space" in e.fix
                refused += 1
                assert ids(file) == acknowledged, "nothing that was refused is there"
            else:
                acknowledged.append(f"e{n}")
        assert refused
        assert file.broken is None
        full = disk.mark()
        space.left = 1 << 30
        publish(file, "after")
        assert ids(file) == [*acknowledged, "after"]
        file.close()
        disk.before = None
        for seed in range(6):  # a power cut while the disk was full
            after = File(disk.materialise(full, seed, tmp_path / f"full{seed}"))
            assert ids(after) == acknowledged
            after.close()
        again = disk.open(tmp_path / "live" / "events.db")
        assert ids(again) == [*acknowledged, "after"]
        again.close()


def test_a_full_disk_in_a_block(tmp_path: Path) -> None:
    with Disk() as disk:
        file = disk.open(tmp_path / "events.db")
        declare(file)
        run(file, "create table mine (n integer primary key, text)")
        space = Space(disk, 0)
        for size in (10, 3_000_000, 12_000_000):  # the last ones do not fit into SQLite's cache
            with pytest.raises(Unavailable) as caught:
                run(file, f"insert into mine values (1, zeroblob({size}))", "insert into mine values (2, 'x')")
            assert caught.value.code == "UL2001"
            with pytest.raises(Unavailable):
                publish(file, "no")
        space.left = 1 << 30
        publish(file, "a")
        run(file, "insert into mine values (1, 'x')")
        assert ids(file) == ["a"]
        assert rows(file, "select n from mine") == [(1,)]
        file.close()


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to mount a small disk")
def test_a_really_full_disk(tmp_path: Path) -> None:
    """The same without a stand-in: a file system of 400 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k,mode=700", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        file = File(place / "events.db")
        declare(file)
        acknowledged = []
        ballast = place / "ballast"
        ballast.write_bytes(bytes(100_000))
        refused = 0
        for n in range(300):
            try:
                publish(file, f"e{n}", 2000)
                acknowledged.append(f"e{n}")
            except Unavailable as e:
                assert e.code == "UL2001"
                refused += 1
                if refused == 3:
                    ballast.unlink()
                if refused == 6:
                    break
        assert refused == 6
        assert ids(file) == acknowledged
        file.close()
        with contextlib.suppress(Unavailable):
            again = File(place / "events.db")
            assert ids(again) == acknowledged
            again.close()
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("nth", [1, 2])
def test_a_failed_sync_is_unknown_and_stops_the_file(tmp_path: Path, nth: int) -> None:
    with Disk() as disk:
        path = tmp_path / "events.db"
        file = disk.open(path)
        declare(file)
        publish(file, "a")
        told: list[UnlostError] = []
        file.on_broken = told.append
        seen = 0

        def fail(op: Op) -> None:
            nonlocal seen
            if op.kind.startswith("sync") and op.name.endswith("-wal"):
                seen += 1
                if seen >= nth:
                    raise apsw.IOError("input/output error")

        disk.before = fail
        for n in range(1, nth):
            publish(file, f"good{n}")
        with pytest.raises(OutcomeUnknown) as caught:
            publish(file, "unknown")
        assert caught.value.code == "UL2003"
        assert caught.value.exit_code == 5
        assert told == [file.broken]
        disk.before = None  # as after fsyncgate: the next sync would say that all is well
        for use in (lambda: publish(file, "no"), lambda: ids(file), lambda: file.submit_block(Lent.__new__(Lent))):
            with pytest.raises(OutcomeUnknown):
                use()  # type: ignore[no-untyped-call]
        file.close()
        again = disk.open(path)
        good = ["a", *(f"good{n}" for n in range(1, nth))]
        assert ids(again) in (good, [*good, "unknown"])
        publish(again, "b")
        assert ids(again)[-1] == "b"
        again.close()


@pytest.mark.parametrize("what", ["write", "sync"])
def test_a_mark_that_cannot_be_written_stops_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Without marks a lost tail would not be noticed: no acknowledgement goes out without them."""
    monkeypatch.setattr(file_module, "_HOUSEKEEPING_SECONDS", 0.01)
    with Disk() as disk:
        file = disk.open(tmp_path / "events.db")
        declare(file)
        publish(file, "a")

        def fail(op: Op) -> None:
            if op.name.endswith(".marks") and op.kind == what:
                raise OSError(5, "Input/output error")

        disk.before = fail
        if what == "write":
            with pytest.raises(OutcomeUnknown):
                publish(file, "b")
        else:
            with contextlib.suppress(OutcomeUnknown):
                publish(file, "b")
            until(lambda: file.broken is not None, "housekeeping notices")
        with pytest.raises(OutcomeUnknown):
            publish(file, "c")
        disk.before = None
        file.close()
        again = File(tmp_path / "events.db")
        assert ids(again)[0] == "a"
        again.close()


def test_a_failing_read_is_an_error_of_ours(tmp_path: Path) -> None:
    with Disk() as disk:
        file = disk.open(tmp_path / "events.db")
        declare(file)

        def fail(connection: apsw.Connection) -> None:
            raise apsw.CorruptError("database disk image is malformed")

        with pytest.raises(Damaged):
            file.read(fail)
        publish(file, "a")
        assert ids(file) == ["a"], "one failed read leaves no open snapshot behind"
        file.close()


# --- several processes --------------------------------------------------------------------------------------------


def python(script: str, **more: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True,
        **more,
    )  # fmt: skip


WRITER = """
import asyncio, sys
from pathlib import Path
from unlost.brokers.embedded.broker import EmbeddedBroker
from unlost.events import Envelope
from unlost.sqlite.file import File

async def main(name, batches):
    file = File(Path({path!r}))
    broker = EmbeddedBroker(file)
    print("open", flush=True)
    sys.stdin.readline()
    for n in range(batches):
        made = [Envelope(id=f"{{name}}-{{n}}-{{i}}", source="shop", type="T", time="2026-01-01T00:00:00Z",
                         topic="order", key=b"k", data=b"x") for i in range(3)]
        places = await broker.publish(made)
        print(*(f"{{e.id}}@{{p.position}}" for e, p in zip(made, places)), flush=True)
    file.close()

asyncio.run(main({name!r}, {batches}))
"""


def test_processes_that_write_at_once_share_the_positions(file: File) -> None:
    writers = [python(WRITER.format(path=str(file.path), name=name, batches=60)) for name in "abc"]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "open\n"
    said = {}
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for n in range(60):
        publish(file, f"me-{n}")
    for writer in writers:
        out, _ = writer.communicate(timeout=60)
        assert writer.returncode == 0
        said.update({id: int(at) for id, at in (pair.split("@") for pair in out.split())})
    found = ids(file)
    assert len(found) == 60 + 3 * 60 * 3
    assert {id: at for at, id in enumerate(found) if not id.startswith("me")} == said
    for name in ("a", "b", "c", "me"):
        own = [id for id in found if id.startswith(f"{name}-")]
        assert own == sorted(own, key=lambda id: [int(part) for part in id.split("-")[1:]]), "the order of each"


def test_a_forked_child_is_refused_and_the_parent_goes_on(tmp_path: Path) -> None:
    script = """
        import os
        from pathlib import Path
        from unlost.errors import UnlostError
        from unlost.sqlite.file import File

        path = Path({path!r})
        file = File(path)
        more = File(path.with_name("other.db"))
        child = os.fork()
        if child == 0:
            codes = []
            for use in (
                lambda: file.write_sync(lambda tx: None, 5),
                lambda: file.read(lambda c: None),
                lambda: File(path),
                lambda: File(path.parent / ".." / "x" / "events.db"),
            ):
                try:
                    use()
                    codes.append("-")
                except UnlostError as e:
                    codes.append(e.code)
            file.close()
            third = File(path.with_name("third.db"))  # nobody had this one open
            third.write_sync(lambda tx: None, 5)
            third.close()
            print(*codes, flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        print(file.write_sync(lambda tx: tx.one("select n from unlost_commit")[0], 5) > 0)
        file.close()
        more.close()
        File(path).close()
    """
    process = python(script.format(path=str(tmp_path / "x" / "events.db")))
    out, _ = process.communicate(timeout=60)
    assert out.split("\n")[:2] == ["UL1113 UL1113 UL1113 UL1113", "True"]
    assert process.returncode == 0


def test_a_forked_child_does_not_keep_its_parent_alive(tmp_path: Path) -> None:
    """The death of a process is seen by its lock; a child that inherited the lock would hide it."""
    script = """
        import os, sys
        from pathlib import Path
        from unlost.sqlite.file import File

        file = File(Path({path!r}))
        child = os.fork()
        if child == 0:
            sys.stdin.read()
            os._exit(0)
        print(file.process_id, flush=True)
        os.kill(os.getpid(), 9)
    """
    process = python(script.format(path=str(tmp_path / "events.db")))
    assert process.stdout is not None
    name = process.stdout.readline().strip()
    assert process.wait(60) == -signal.SIGKILL
    assert name
    until(lambda: not examine(tmp_path / "events.db.run", name).alive, "the child lets go as soon as it runs")
    file = File(tmp_path / "events.db")  # and its write lock is free
    file.close()
    process.communicate()


def test_a_new_process_takes_the_place_of_a_dead_one(tmp_path: Path) -> None:
    script = """
        import os
        from pathlib import Path
        from unlost.sqlite.file import File
        File(Path({path!r}))
        os.kill(os.getpid(), 9)
    """
    for _ in range(3):
        process = python(script.format(path=str(tmp_path / "events.db")))
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
    file = File(tmp_path / "events.db")
    assert rows(file, "select count(*), max(slot) from unlost_process") == [(1, 0)]
    assert [p.stem for p in (tmp_path / "events.db.run").glob("*.process")] == [file.process_id]
    file.close()
