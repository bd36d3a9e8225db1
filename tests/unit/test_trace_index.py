"""The index of the log: it finds what a plain scan finds, whatever becomes of its files, and of those who build it."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from random import Random

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unlost import App, Event, Service
from unlost.brokers.embedded import index as index_module
from unlost.brokers.embedded import indexer, segments
from unlost.brokers.embedded.index import Index
from unlost.brokers.embedded.indexer import Indexer
from unlost.brokers.embedded.log import EmbeddedLog
from unlost.errors import Damaged, Unavailable, UnlostError
from unlost.events import Envelope
from unlost.ops import trace as ops
from unlost.ops.connect import opened
from unlost.ops.trace import Trace, trace
from unlost.sqlite.file import File
from unlost.sqlite.schema import POSITION_BITS, POSITION_MAX
from unlost.sqlite.transaction import Transaction, row_crc

TEXTS = tuple(f"t{n}" for n in range(6))
Found = list[tuple[str, int, int]]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)


def make_small(patch: pytest.MonkeyPatch) -> None:
    """A few events fill a segment, a few entries a block, and two segments are merged."""
    patch.setattr(indexer, "TAIL_MAX", 2)
    patch.setattr(indexer, "BATCH", 4)
    patch.setattr(indexer, "FANOUT_BITS", 1)
    patch.setattr(indexer, "STEP", 2)
    patch.setattr(index_module, "SLICE", 3)
    patch.setattr(index_module, "ASKED_MAX", 2)
    patch.setattr(segments, "BLOCK", 4 + 3 * segments.ENTRY)
    patch.setattr(segments, "PER_BLOCK", 3)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[File]:
    file = File(tmp_path / "events.db")
    yield file
    file.close()


def event(id: str, key: str | None = None, correlation: str | None = None, topic: str = "order") -> Envelope:
    return Envelope(
        id=id, source="test", type="t", time="2026-01-01T00:00:00Z", topic=topic, data=b"{}",
        key=None if key is None else key.encode(), correlationid=correlation,
    )  # fmt: skip


def put(file: File, events: Sequence[Envelope], partitions: int = 2) -> None:
    def work(tx: Transaction) -> None:
        tx.topic_defaults |= {e.topic: (partitions, None) for e in events}
        tx.append(events)

    file.write_sync(work)


def some(chance: Random, count: int) -> list[Envelope]:
    """Keys, ids and correlations are of the same few texts, so that one is found as several."""
    return [
        event(
            chance.choice((*TEXTS, f"e{chance.random()}")), chance.choice((None, *TEXTS)), chance.choice((None, *TEXTS)),
            chance.choice(("order", "customer")),
        )
        for _ in range(count)
    ]  # fmt: skip


def build(file: File) -> None:
    for _ in Indexer(file).grow():
        pass


def names(file: File) -> set[str]:
    return {path.name for path in Index(file).folder.glob("*")}


def plain(file: File, text: str) -> Found:
    """All of the log is read, by the door that operators use."""
    log, found = EmbeddedLog(file), []
    for info in log.topics():
        for partition, (start, end) in enumerate(info.ranges):
            at = start
            while at < end:
                for a in log.read(info.name, partition, at, 100):
                    e = a.envelope
                    if a.key == text.encode() or (e is not None and text in (e.id, e.correlationid)):
                        found.append((info.name, partition, a.position))
                    at = a.position + 1
    return sorted(found)


def look(file: File, text: str) -> Found:
    """Without building."""
    index = Index(file)
    with index.opened() as there:
        return sorted(index.find(there, {text.encode()}))


def check(file: File) -> None:
    for text in TEXTS:
        assert look(file, text) == plain(file, text), text


def trim(file: File, chance: Random) -> None:
    """As `trim.py` does it: from the front, and the last event of a partition stays."""

    def work(tx: Transaction) -> None:
        for number in range(4):
            low = number << POSITION_BITS
            positions = [
                at
                for (at,) in tx.rows(
                    "select at from unlost_log where at between ? and ? order by at", (low, low | POSITION_MAX)
                )
            ]
            if len(positions) > 1:
                tx.execute("delete from unlost_log where at between ? and ?", (low, chance.choice(positions[:-1])))

    file.write_sync(work)


def spoil(file: File, chance: Random) -> None:
    """One byte of one segment, or its end, or something that is none at all."""
    paths = sorted(Index(file).folder.glob("*.segment"))
    if paths:
        path = chance.choice(paths)
        raw = bytearray(path.read_bytes())
        n = chance.randrange(len(raw))
        raw[n] ^= 1 << chance.randrange(8)
        path.write_bytes(raw[:n] if chance.random() < 0.3 else raw)
    elif Index(file).folder.exists():
        (Index(file).folder / "nothing.segment").write_bytes(b"x" * chance.randrange(100))


def lose(file: File, chance: Random) -> None:
    folder = Index(file).folder
    for path in sorted(folder.glob("*")):
        if chance.random() < 0.5:
            path.unlink()
    if chance.random() < 0.3:
        shutil.rmtree(folder, ignore_errors=True)


def give_up(file: File, chance: Random) -> None:
    """A builder that ends in the middle."""
    with closing(Indexer(file).grow()) as steps:
        for _ in range(chance.randrange(8)):
            next(steps, None)


def strange(file: File, chance: Random) -> None:
    """Heads as others write them, and some that are no event."""
    heads = (
        b"nothing", b"{}", b'{"id":5}',
        b'{"specversion":"1.0","id":"t1","source":"s","type":"t","time":"2026-01-01T00:00:00Z","other":5}',
        b'{"specversion":"1.0","id":"t1","id":"t2","source":"s","type":"t","time":"2026-01-01T00:00:00Z"}',
        b'{"specversion":"1.0","id":"\\u0074\\u0033","source":"s","type":"t","time":"2026-01-01T00:00:00Z","correlationid":"t4"}',
    )  # fmt: skip

    def work(tx: Transaction) -> None:
        tx.topic_defaults["order"] = (2, None)
        [stands] = tx.append([event("e", chance.choice(TEXTS))])
        tx.flush()
        at = (tx.topic("order").first_number + stands.partition) << POSITION_BITS | stands.position
        key, data, recorded, digest = tx.one("select key, data, recorded, digest from unlost_log where at = ?", (at,))
        head = chance.choice(heads)
        tx.execute(
            "update unlost_log set head = ?, crc = ? where at = ?",
            (head, row_crc(at, head, key, data, recorded, digest), at),
        )

    file.write_sync(work)


ACTIONS: dict[str, Callable[[File, Random], None]] = {
    "put": lambda file, chance: put(file, some(chance, chance.randrange(1, 16))),
    "build": lambda file, chance: build(file),
    "trim": trim, "spoil": spoil, "lose": lose, "give up": give_up, "strange": strange,
}  # fmt: skip


LIFE = st.lists(st.sampled_from(["put", "put", "build", "build", *ACTIONS]), min_size=3, max_size=10)
SEED = st.integers(0, 2**32)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(actions=LIFE, seed=SEED)
def test_whatever_happens_it_finds_what_a_plain_scan_finds(actions: Sequence[str], seed: int) -> None:
    live(actions, seed)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(actions=LIFE, seed=SEED)
def test_whatever_happens_in_many_lives(actions: Sequence[str], seed: int) -> None:
    live(actions, seed)


def live(actions: Sequence[str], seed: int) -> None:
    chance = Random(seed)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        file = File(Path(folder) / "events.db")
        try:
            put(file, some(chance, 10))
            for action in actions:
                ACTIONS[action](file, chance)
                check(file)
            build(file)
            check(file)
            assert not [name for name in names(file) if not name.endswith(".segment")]
        finally:
            file.close()


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=SEED, limit=st.integers(1, 5))
def test_a_trace_is_the_same_with_and_without(seed: int, limit: int) -> None:
    chance = Random(seed)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        path = Path(folder) / "events.db"
        file = File(path)
        try:
            put(file, some(chance, 60))
            put(file, [event(f"a-longer-id-{n}", "k", f"flow-{n % 3}") for n in range(9)])
            if chance.random() < 0.5:
                trim(file, chance)
        finally:
            file.close()
        asked = (*TEXTS, "k", "flow-1", "a-longer-id-4", "a-longer", "er-id-5", "…ger-id-5", "nobody", "nobody-at-all")
        found = [traced(path, text, limit) for text in asked]
        assert (path.parent / "events.db.index").exists()
        patch.setattr(ops, "Findable", ())  # as if the log had no index
        for text, one in zip(asked, found, strict=True):
            assert one == traced(path, text, limit), text
        assert any(isinstance(one, bytes) for one in found) and any(isinstance(one, str) for one in found)


def traced(path: Path, text: str, limit: int) -> bytes | str:
    with opened(f"embedded://{path}") as here:
        try:
            found: Trace = trace(here, text, limit=limit)
        except UnlostError as e:
            return str(e)
        return msgspec.json.encode(found)


def test_texts_of_one_hash_are_told_apart(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Index, "_hash", lambda self, text: bytes(8))
    put(file, [event("a", "k1"), event("b", "k2"), event("c", "k3")] * 5)
    build(file)
    assert len(look(file, "k1")) == 15  # whoever asks reads them and looks
    with opened(f"embedded://{file.path}") as here:
        assert {e.key for flow in trace(here, "k1").flows for e in flow.events} == {b"k1"}


def test_publishing_writes_no_index_and_a_short_log_needs_none(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexer, "TAIL_MAX", 100)
    put(file, some(Random(1), 99))
    build(file)
    assert not Index(file).folder.exists()
    put(file, some(Random(2), 1))
    assert not Index(file).folder.exists()
    build(file)
    assert names(file)
    check(file)


def test_the_number_of_segments_grows_slowly_and_everything_is_in_them(file: File) -> None:
    put(file, some(Random(3), 500))
    build(file)
    index = Index(file)
    with index.opened() as there:
        assert 1 <= len(there) <= 10
        assert sum(s.events for s in there) >= 500 - indexer.TAIL_MAX
    assert index.folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in index.folder.iterdir()} == {0o600}
    check(file)


def test_any_byte_of_a_segment_may_be_wrong(file: File) -> None:
    put(file, some(Random(4), 30))
    build(file)
    expected = {text: plain(file, text) for text in TEXTS}
    path = max(Index(file).folder.iterdir(), key=lambda path: path.stat().st_size)
    whole = path.read_bytes()
    for n in range(0, len(whole), 3):
        path.write_bytes(whole[:n] + bytes([whole[n] ^ 0x10]) + whole[n + 1 :])
        assert {text: look(file, text) for text in TEXTS} == expected, n
    for n in range(0, len(whole), 7):
        path.write_bytes(whole[:n])
        assert {text: look(file, text) for text in TEXTS} == expected, n
        assert not path.exists(), n  # thrown away


def test_a_segment_of_another_file_is_thrown_away(file: File, tmp_path: Path) -> None:
    other = File(tmp_path / "other.db")
    put(other, some(Random(5), 50))
    build(other)
    put(file, some(Random(6), 50))
    shutil.copytree(Index(other).folder, Index(file).folder)
    other.close()
    check(file)
    assert not names(file)


def test_an_older_copy_of_the_log_does_not_believe_the_newer_index(tmp_path: Path) -> None:
    """Restored from a backup, it goes on with other events at the same positions."""
    path = tmp_path / "events.db"
    file = File(path)
    put(file, some(Random(7), 40))
    build(file)
    file.close()
    shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-copy")
    file = File(path)
    put(file, some(Random(8), 60))
    build(file)
    file.close()
    newer = tmp_path / "events.db.index"
    older = tmp_path.parent / f"{tmp_path.name}-copy"
    shutil.rmtree(older / "events.db.index")
    shutil.copytree(newer, older / "events.db.index")
    file = File(older / "events.db")
    try:
        check(file)
        put(file, some(Random(9), 200))
        check(file)
        build(file)
        check(file)
    finally:
        file.close()


def test_of_several_builders_one_works(file: File) -> None:
    put(file, some(Random(10), 60))
    with closing(Indexer(file).grow()) as first:
        next(first)
        assert list(Indexer(file).grow()) == []
        check(file)
    assert len(list(Indexer(file).grow())) > 10
    check(file)


def test_the_folder_is_deleted_in_the_middle(file: File) -> None:
    put(file, some(Random(11), 200))
    expected = {text: plain(file, text) for text in TEXTS}
    for harm in (remove_all, cut_all):
        build(file)
        index = Index(file)
        with index.opened() as there:
            assert there
            found = {text: index.find(there, {text.encode()}) for text in TEXTS}
            begun = {text: [next(places)] for text, places in found.items()}
            harm(index.folder)
            for text, places in found.items():
                assert sorted([*begun[text], *places]) == expected[text], text
        check(file)


def remove_all(folder: Path) -> None:
    shutil.rmtree(folder)


def cut_all(folder: Path) -> None:
    for path in folder.iterdir():
        os.truncate(path, path.stat().st_size // 2)


def test_a_builder_whose_folder_is_deleted_gives_up_and_the_next_begins_anew(file: File) -> None:
    put(file, some(Random(12), 100))
    with closing(Indexer(file).grow()) as steps:
        for _ in range(5):
            next(steps)
        remove_all(Index(file).folder)
        with pytest.raises(FileNotFoundError):
            list(steps)
    build(file)
    assert names(file)
    check(file)


def test_what_is_trimmed_while_it_is_read_is_no_damage(file: File) -> None:
    put(file, some(Random(13), 100))
    with closing(Indexer(file).grow()) as steps:
        for n, _ in enumerate(steps):
            if n % 3 == 0:
                trim(file, Random(n))
    check(file)


def test_what_is_trimmed_falls_out(file: File) -> None:
    put(file, some(Random(14), 300))
    build(file)
    file.write_sync(lambda tx: [tx.execute("delete from unlost_log where at & ? < 70", (POSITION_MAX,)), None][1])
    put(file, some(Random(15), 40))
    build(file)
    check(file)
    live = sum(end - start for info in EmbeddedLog(file).topics() for start, end in info.ranges)
    with Index(file).opened() as there:
        assert sum(s.events for s in there) <= 2 * live < 300
        at = [int.from_bytes(e[segments.HASH :]) & POSITION_MAX for s in there for piece in s.pieces() for e in piece]
    assert at and sum(position < 70 for position in at) < len(at) / 2


@pytest.mark.parametrize(
    ("statement", "code"),
    [
        ("update unlost_log set key = x'00' where at & 1099511627775 = 9", "UL3004"),
        ("delete from unlost_log where at & 1099511627775 = 9", "UL3005"),
    ],
)
def test_a_damaged_log_is_said_and_not_indexed(file: File, statement: str, code: str) -> None:
    put(file, some(Random(16), 60))
    file.write_sync(lambda tx: [tx.execute(statement), None][1])
    with pytest.raises(Damaged, match=code):
        build(file)
    with pytest.raises(Damaged, match=code):
        look(file, "nobody")


async def test_a_running_service_builds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class ThingMade(Event, key="thing_id"):
        thing_id: str

    seen: list[str] = []
    service = Service("stock")

    @service.on(ThingMade)
    async def handle(thing: ThingMade) -> None:
        seen.append(thing.thing_id)

    monkeypatch.setattr(indexer, "TICK_SECONDS", 0.01)
    app = App(service, broker=f"embedded://{tmp_path}/events.db")
    serving = asyncio.create_task(app.serve())
    async with App(broker=f"embedded://{tmp_path}/events.db") as web:
        await web.publish_all([ThingMade(thing_id=TEXTS[n % 6]) for n in range(100)])
        async with asyncio.timeout(60):
            while len(seen) < 100 or missing(web.file) >= indexer.TAIL_MAX:
                await asyncio.sleep(0.01)
        check(web.file)
        app.stop()
        await serving
        assert [task.get_name() for task in asyncio.all_tasks() if task.get_name() == "unlost-index"] == []
        assert all(name.endswith(".segment") for name in names(web.file))


def missing(file: File) -> int:
    with Index(file).opened() as there:
        return 100 - sum(s.events for s in there)


async def test_where_no_index_can_be_written_it_is_said_and_events_are_found(file: File) -> None:
    put(file, some(Random(17), 50))
    Index(file).folder.write_bytes(b"something else")
    with pytest.raises(Unavailable, match="UL1353"):
        await Indexer(file).keep()
    with EmbeddedLog(file).finder() as find:
        assert sorted(find({b"t1"})) == plain(file, "t1")


# --- processes -----------------------------------------------------------------------------------------------------

BUILDER = """
import shutil
import sys
from pathlib import Path
from random import Random
from unlost.brokers.embedded import indexer
from unlost.brokers.embedded.index import Index
from unlost.sqlite.file import File
indexer.TAIL_MAX, indexer.BATCH, indexer.FANOUT_BITS, indexer.STEP = 2, 4, 1, 2
file = File(Path(sys.argv[1]), check_tail=False)
folder = Index(file).folder
chance = Random(int(sys.argv[2]))
while True:
    try:
        for _ in indexer.Indexer(file).grow():
            print(".", end="", flush=True)
    except FileNotFoundError:
        pass  # the other one has deleted the folder
    for path in folder.glob("*.segment"):
        if chance.random() < 0.5:
            path.unlink(missing_ok=True)
    if "folder" in sys.argv and chance.random() < 0.2:
        shutil.rmtree(folder, ignore_errors=True)
"""


def start(file: File, *arguments: object) -> subprocess.Popen[bytes]:
    """Builds, over and over, and deletes some of what it has built; says a dot for each step."""
    return subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(file.path), *map(str, arguments)], stdout=subprocess.PIPE
    )


def test_builders_are_killed_at_any_moment(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # blocks as the processes write them
    monkeypatch.setattr(indexer, "TAIL_MAX", 2)
    put(file, some(Random(18), 300))
    expected = {text: plain(file, text) for text in TEXTS}
    chance = Random(19)
    for number in range(12):
        with start(file, number) as process:
            assert process.stdout is not None
            wanted = chance.randrange(1, 600)
            assert len(process.stdout.read(wanted)) == wanted
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stdout.close()
        assert {text: look(file, text) for text in TEXTS} == expected, number
    build(file)
    assert {text: look(file, text) for text in TEXTS} == expected
    assert all(name.endswith(".segment") for name in names(file))


def test_two_processes_build_and_delete_while_others_publish_and_look(
    file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    put(file, some(Random(20), 100))
    builders = [start(file, number, "folder") for number in (1, 2)]
    try:
        for process in builders:
            assert process.stdout is not None and process.stdout.read(1) == b"."
        for number in range(25):
            put(file, some(Random(number), 10))
            check(file)
        assert [process.poll() for process in builders] == [None, None]
    finally:
        for process in builders:
            process.kill()
            process.communicate()
    build(file)
    check(file)
