"""Power loss: whatever was acknowledged is in every set of files that a power cut could leave.

A workload runs once on a recording disk. Then, for many moments and seeds, the surviving files are built, opened by
the real `File`, and read by a second implementation: Python's own sqlite3 and a model of thirty lines. The tables
must be exactly those after some number of operations, at least as many as had been acknowledged, and at most as many
as had been asked for: so nothing is lost, nothing is half done, nothing is invented.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import json
import random
import shutil
import sqlite3
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from unlost.brokers.embedded.broker import EmbeddedBroker
from unlost.brokers.port import Receipt
from unlost.errors import UnlostError
from unlost.events import Envelope, content_hash, event_hash
from unlost.events.topic import Arrival, Topic, Unit
from unlost.sqlite import file as file_module
from unlost.sqlite.file import File
from unlost.sqlite.transaction import Transaction
from unlost.sqlite.turn import Block
from unlost.store.port import Attempt, Death, Inbox, Outcome, Request, Settlement
from unlost.store.sqlite import SqliteStore
from unlost.testing.powerloss import Disk

BITS = 40
SEEDS_AT_AN_ACKNOWLEDGEMENT = 3
SAMPLE = 260


# --- the model: what the tables must say ---------------------------------------------------------------------


class Model:
    """The same books, kept in plain dictionaries."""

    def __init__(self) -> None:
        self.topics: dict[str, int] = {}
        self.log: dict[tuple[str, int], list[tuple[str, bytes | None, bytes | None]]] = {}
        self.services: set[str] = set()
        self.epochs: dict[Unit, int] = {}
        self.fated: dict[Unit, set[int]] = {}
        self.counts: dict[Unit, dict[str, int]] = {}
        self.digest: dict[Unit, int] = {}
        self.trying: dict[Unit, dict[str, int]] = {}
        self.inbox: set[tuple[str, str]] = set()
        self.ledger: dict[tuple[Unit, int], tuple[str, str]] = {}
        self.waiting: dict[tuple[Unit, int], tuple[bytes | None, int]] = {}
        self.shelf: dict[tuple[Unit, int], tuple[str, str, str | None]] = {}
        self.operations: dict[int, bool] = {}
        self.sales: dict[str, int] = {}

    def declare(self, name: str, partitions: int) -> None:
        self.topics[name] = partitions
        for p in range(partitions):
            self.log[name, p] = []

    def register(self, service: str) -> None:
        self.services.add(service)
        for topic, p in self.log:
            unit = Unit(service, topic, p)
            self.epochs[unit], self.fated[unit], self.counts[unit] = 0, set(), {}
            self.digest[unit], self.trying[unit] = 0, {}

    def publish(self, receipts: list[Receipt], envelopes: list[Envelope]) -> None:
        for r, e in zip(receipts, envelopes, strict=True):
            rows = self.log[r.topic, r.partition]
            assert r.position == len(rows), "positions have no gap"
            rows.append((e.id, e.key, e.data))

    def settle(self, unit: Unit, o: Outcome) -> None:
        at, place = o.arrival.position, (unit, o.arrival.position)
        assert o.arrival.envelope is not None
        id = o.arrival.envelope.id
        if o.state == "attempted":
            self.trying[unit][str(at)] = len(o.attempts)
            return
        if not o.waited:
            self.fated[unit].add(at)
            self.digest[unit] ^= o.event_hash
            self.trying[unit].pop(str(at), None)
        if o.inbox is not None:
            self.inbox.add((unit.service, o.inbox.id))
        self.waiting.pop(place, None)
        if o.state in ("done", "skipped"):
            word = "done" if o.state == "done" else f"skipped:{o.rule}"
            self.counts[unit][word] = self.counts[unit].get(word, 0) + 1
            self.ledger.pop(place, None)
            return
        self.ledger[place] = (o.state, id)
        if o.state == "dead":
            assert o.death is not None
            self.shelf[place] = (o.death.reason, id, None)
        else:
            self.waiting[place] = (o.arrival.key, len(o.attempts))

    def ask(self, request: Request, number: int) -> None:
        place = (request.unit, request.position)
        reason, id, _ = self.shelf[place]
        self.shelf[place] = (reason, id, request.action)
        self.operations[number] = False

    def carry_out(self, request: Request, number: int) -> None:
        place = (request.unit, request.position)
        _, id, _ = self.shelf.pop(place)
        if request.action == "redrive":
            self.waiting[place] = (request.key, 0)
        self.ledger[place] = ("retrying" if request.action == "redrive" else "removed", id)
        self.operations[number] = True

    def tables(self) -> dict[str, Any]:
        """In the form of `read_tables`."""
        return {
            "topics": self.topics,
            "log": {f"{t}/{p}": rows for (t, p), rows in self.log.items() if rows},
            "services": self.services,
            "progress": {
                u: (
                    self.epochs[u], _low(self.fated[u]), sorted(self.fated[u]), self.counts[u],
                    self.digest[u], self.trying[u],
                )
                for u in self.epochs
            },
            "inbox": self.inbox, "ledger": self.ledger, "waiting": self.waiting, "shelf": self.shelf,
            "operations": self.operations, "sales": self.sales,
        }  # fmt: skip


def _low(fated: set[int]) -> int:
    low = 0
    while low in fated:
        low += 1
    return low


def read_tables(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The tables as Python's own SQLite reads them, and what is wrong with them in themselves."""
    wrong: list[str] = []
    db = sqlite3.connect(path)
    try:
        check = db.execute("pragma integrity_check").fetchall()
        if check != [("ok",)]:
            wrong.append(f"integrity_check: {check[:3]}")
        if not db.execute("select 1 from sqlite_schema where name = 'unlost_log'").fetchone():
            return {}, wrong
        names, topics = {}, {}
        for name, first, partitions in db.execute("select name, first_number, partitions from unlost_topic"):
            topics[name] = partitions
            names.update({first + p: f"{name}/{p}" for p in range(partitions)})
        log: dict[str, list[Any]] = {}
        digests: dict[str, int] = {}
        for at, head, key, data, recorded, digest, crc in db.execute("select * from unlost_log order by at"):
            where, position = names[at >> BITS], at & ((1 << BITS) - 1)
            rows = log.setdefault(where, [])
            if position != len(rows):
                wrong.append(f"a gap in {where} before {position}")
            meta = json.loads(head)
            text = f"{meta['source']}\0{meta['id']}".encode()
            digests[where] = digests.get(where, 0) ^ int.from_bytes(
                hashlib.blake2b(text, digest_size=8).digest(), "big", signed=True
            )
            if digest != digests[where]:
                wrong.append(f"the digest of {where}:{position} is not that of the events before it")
            whole = struct.pack("<3q", at, recorded, digest) + head + (key or b"") + (data or b"")
            if crc != zlib.crc32(whole):
                wrong.append(f"the checksum of {where}:{position} is wrong")
            rows.append((meta["id"], key, data))
        progress = {}
        for s, t, p, epoch, position, fated, counts, digest, attempts in db.execute(
            "select service, topic, partition, epoch, position, fated, counts, digest, attempts from unlost_progress"
        ):
            tried = {at: len(past) for at, past in json.loads(attempts).items()}
            progress[Unit(s, t, p)] = (epoch, position, _positions(fated), json.loads(counts), digest, tried)

        def places(sql: str) -> dict[tuple[Unit, int], tuple[Any, ...]]:
            return {(Unit(*row[:3]), row[3]): row[4:] for row in db.execute(sql)}

        place = "service, topic, partition, position"
        has_sales = db.execute("select 1 from sqlite_schema where name = 'sales'").fetchone()
        return {
            "topics": topics,
            "log": log,
            "services": {r[0] for r in db.execute("select name from unlost_service")},
            "progress": progress,
            "inbox": set(db.execute("select service, id from unlost_inbox")),
            "ledger": places(f"select {place}, state, id from unlost_ledger"),
            "waiting": places(f"select {place}, key, attempt from unlost_waiting"),
            "shelf": places(f"select {place}, reason, id, request from unlost_shelf"),
            "operations": dict(db.execute("select number, carried_out is not null from unlost_operation")),
            "sales": dict(db.execute("select id, cents from sales")) if has_sales else {},
        }, wrong
    finally:
        db.close()


def _positions(raw: bytes) -> list[int]:
    """Reads the runs of positions; written from the description, not from the code."""
    numbers, shift, value = [], 0, 0
    for byte in raw:
        value, shift = value | (byte & 127) << shift, shift + 7
        if byte < 128:
            numbers.append(value)
            shift = value = 0
    found: list[int] = []
    at = 0
    for gap, length in zip(numbers[::2], numbers[1::2], strict=True):
        found.extend(range(at + gap, at + gap + length))
        at += gap + length
    return found


# --- the workload ---------------------------------------------------------------------------------------------


class Step(NamedTuple):
    what: str
    asked: int
    acknowledged: int
    tables: dict[str, Any]


class Workload:
    """Real code on a recording disk; notes the place in the log at which each step was acknowledged."""

    def __init__(self, disk: Disk, folder: Path, seed: int, kind: type[File]) -> None:
        self.disk = disk
        self.path = folder / "events.db"
        self.kind = kind
        self.chance = random.Random(seed)
        self.model = Model()
        self.steps: list[Step] = [Step("nothing", 0, 0, copy.deepcopy(self.model.tables()))]
        self.noticed, self.landed = threading.Event(), threading.Event()
        self.landed.set()
        self.made = 0

    def open(self) -> None:
        self.file = self.disk.open(self.path, self.kind)
        self.other = self.disk.open(self.path, self.kind)  # as another process has it
        self.file.workload = self.other.workload = self  # type: ignore[attr-defined]
        self.broker = EmbeddedBroker(self.file)
        self.store = SqliteStore(self.file, lambda tx, envelopes: tx.append(envelopes))

    def close(self) -> None:
        self.other.close()
        self.file.close()

    def acknowledge(self, what: str, asked: int, acknowledged: int) -> None:
        self.steps.append(Step(what, asked, acknowledged, copy.deepcopy(self.model.tables())))

    async def do(self, what: str, work: Any) -> Any:
        asked = self.disk.mark()
        self.noticed.clear()
        result = await work
        self.last = (what, asked, self.disk.mark())
        self.noticed.set()
        assert self.landed.wait(10)
        return result

    async def step(self, what: str, work: Any, change: Callable[[Any], None]) -> Any:
        result = await self.do(what, work)
        change(result)
        self.acknowledge(*self.last)
        return result

    def events(self, topic: str, n: int, keys: int = 5) -> list[Envelope]:
        made = []
        for _ in range(n):
            self.made += 1
            size = self.chance.choice((0, 20, 200, 200, 3000, 9000))
            key = f"k{self.chance.randrange(keys)}".encode() if self.chance.random() < 0.9 else None
            made.append(
                Envelope(
                    id=f"e{self.made}", source="shop", type="Happened", time="2026-01-01T00:00:00Z", topic=topic,
                    key=key, data=self.chance.randbytes(size) if size else None,
                )
            )  # fmt: skip
        return made

    async def publish(self, topic: str, n: int, broker: EmbeddedBroker | None = None) -> None:
        envelopes = self.events(topic, n)
        await self.step(
            f"publish {n} to {topic}",
            (broker or self.broker).publish(envelopes),
            lambda receipts: self.model.publish(list(receipts), envelopes),
        )

    async def publish_together(self, topic: str, callers: int) -> None:
        """Several callers at once: one commit for all. Each part is a step of its own, in the order of the calls."""
        batches = [self.events(topic, 2) for _ in range(callers)]
        receipts = await self.do("together", asyncio.gather(*(self.broker.publish(b) for b in batches)))
        for batch, places in zip(batches, receipts, strict=True):
            self.model.publish(list(places), batch)
            self.acknowledge(*self.last)

    def unfated(self, unit: Unit) -> list[int]:
        rows = self.model.log[unit.topic, unit.partition]
        return [p for p in range(len(rows)) if p not in self.model.fated[unit]]

    async def arrivals(self, unit: Unit, positions: list[int]) -> list[Arrival]:
        if not positions:
            return []
        found = await self.broker.read(unit.topic, unit.partition, positions[0], 1000)
        return [a for a in found if a.position in positions]

    def decide(self, a: Arrival) -> Outcome:
        assert a.envelope is not None
        tried = [Attempt(1, 1, "ValueError: no")]
        hashed = event_hash(a.envelope.source, a.envelope.id)
        match self.chance.randrange(9):
            case 0:
                return Outcome(arrival=a, state="skipped", rule="no handler", event_hash=hashed)
            case 1:
                return Outcome(arrival=a, state="retrying", event_hash=hashed, due=5, attempts=tried)
            case 2:
                return Outcome(arrival=a, state="parked", event_hash=hashed)
            case 3 | 4:
                death = Death(handler="h", reason="exhausted", error_type="ValueError", error="no", stack="s" * 900)
                return Outcome(arrival=a, state="dead", event_hash=hashed, death=death, attempts=tried)
            case 5:
                return Outcome(arrival=a, state="attempted", event_hash=hashed, attempts=tried)
            case _:
                return Outcome(arrival=a, state="done", event_hash=hashed, inbox=inbox_of(a.envelope))

    async def settle(self, unit: Unit, n: int) -> None:
        open_ones = self.unfated(unit)
        chosen = sorted(self.chance.sample(open_ones, min(n, len(open_ones))))
        outcomes = [self.decide(a) for a in await self.arrivals(unit, chosen)]
        if outcomes:
            await self.step(
                f"settle {len(outcomes)} of {unit}",
                self.store.settle([Settlement(unit, self.model.epochs[unit], outcomes)]),
                lambda fenced: [self.model.settle(unit, o) for o in outcomes if not fenced] and None,
            )

    async def settle_waiting(self, unit: Unit) -> None:
        """The first event of the waiting room is done at last."""
        here = sorted(p for u, p in self.model.waiting if u == unit)
        if not here:
            return
        key = self.model.waiting[unit, here[0]][0]
        (waiting, *_) = await self.store.waiting(unit, key, here[0], 1)
        a = waiting.arrival
        assert a.envelope is not None
        o = Outcome(arrival=a, state="done", waited=True, inbox=inbox_of(a.envelope))
        await self.step(
            f"settle waiting {unit}:{a.position}",
            self.store.settle([Settlement(unit, self.model.epochs[unit], [o])]),
            lambda _: self.model.settle(unit, o),
        )

    async def block(self, unit: Unit) -> None:
        """A row of the user, an event of the handler, the inbox mark and the position: one commit."""
        first = await self.arrivals(unit, self.unfated(unit)[:1])
        if not first:
            return
        a, out, cents = first[0], self.events("invoice", 2), self.chance.randrange(10_000)
        assert a.envelope is not None
        sale = a.envelope.id
        o = Outcome(arrival=a, state="done", event_hash=event_hash("shop", sale), inbox=inbox_of(a.envelope))
        settlement = Settlement(unit, self.model.epochs[unit], [o])

        def body(block: Block) -> list[Receipt]:
            block.execute("create table if not exists sales (id text primary key, cents integer)")
            block.execute("insert into sales values (?, ?)", (sale, cents))
            places = block.run(lambda tx: tx.append(out))
            block.finish(lambda tx: self.store.settle_in(tx, settlement))
            return [
                Receipt(id=e.id, topic=e.topic, partition=p.partition, position=p.position, recorded=p.recorded)
                for e, p in zip(out, places, strict=True)
            ]

        def change(receipts: list[Receipt]) -> None:
            self.model.sales[sale] = cents
            self.model.publish(receipts, out)
            self.model.settle(unit, o)

        await self.step(f"block of {unit}:{a.position}", run_block(self.file, body), change)

    async def operate(self, action: Any) -> None:
        """An operator asks for a dead letter; the owner of its unit carries it out."""
        free = [place for place, row in self.model.shelf.items() if row[2] is None]
        if not free:
            return
        unit, position = self.chance.choice(sorted(free))
        number = len(self.model.operations) + 1
        key = self.model.log[unit.topic, unit.partition][position][1]
        request = Request(unit, position, key, action)

        def ask(tx: Transaction) -> None:
            tx.execute(
                "insert into unlost_operation values (?, 1, 'ann', ?, 'why not', ?, ?, ?, ?, 'x', null, null)",
                (number, action, *unit, position),
            )
            tx.execute(
                "update unlost_shelf set request = ?, operation = ? "
                "where service = ? and topic = ? and partition = ? and position = ?",
                (action, number, *unit, position),
            )

        await self.step(f"ask {action}", self.file.write(ask), lambda _: self.model.ask(request, number))
        assert request in await self.store.requests(unit.service)
        await self.step(
            action,
            self.store.carry_out(request, self.model.epochs[unit]),
            lambda _: self.model.carry_out(request, number),
        )

    async def take(self, units: list[Unit]) -> None:
        def change(_: Any) -> None:
            for unit in units:
                self.model.epochs[unit] += 1

        await self.step("take", self.store.take(units), change)

    async def run(self, rounds: int) -> None:
        self.open()
        topics = [Topic("order", partitions=2), Topic("invoice", partitions=1)]

        def declared(_: Any) -> None:
            for t in topics:
                self.model.declare(t.name, t.partitions)

        infos = await self.step("declare", self.broker.declare(topics), declared)
        await self.step(
            "register",
            self.store.register("billing", {"on_dead": "park"}, infos),
            lambda _: self.model.register("billing"),
        )
        units = [Unit("billing", "order", 0), Unit("billing", "order", 1), Unit("billing", "invoice", 0)]
        await self.take(units)
        for round in range(rounds):
            await self.publish("order", self.chance.choice((1, 2, 5, 40)))
            await self.publish("order", 2, EmbeddedBroker(self.other))
            await self.publish_together("order", 3)
            for unit in units:
                await self.settle(unit, self.chance.choice((1, 3, 9)))
            await self.block(self.chance.choice(units[:2]))
            await self.operate(self.chance.choice(("redrive", "discard")))
            await self.settle_waiting(self.chance.choice(units))
            if round == rounds // 2:  # all leave, and a new process comes
                self.close()
                self.open()
                await self.take(units)
        self.close()


def inbox_of(e: Envelope) -> Inbox:
    return Inbox(e.id, e.source, content_hash(e.type, e.data))


async def run_block(file: File, body: Callable[[Block], Any]) -> Any:
    """What `ctx.transaction()` does with a block: waits for its turn, runs, waits for the commit."""
    loop = asyncio.get_running_loop()
    awake: asyncio.Future[None] = loop.create_future()
    over: asyncio.Future[None] = loop.create_future()

    def settle(future: asyncio.Future[None], error: BaseException | None) -> None:
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    block = Block(
        lambda error: loop.call_soon_threadsafe(settle, awake, error) and None,
        lambda error: loop.call_soon_threadsafe(settle, over, error) and None,
        10.0,
    )
    file.submit_block(block)
    await awake
    result = body(block)
    await over
    return result


# --- the check ------------------------------------------------------------------------------------------------


class Finding(NamedTuple):
    kind: str  # lost, invented, half done, damaged, refused
    crash_at: int
    seed: int
    text: str


def check_state(work: Workload, crash_at: int, seed: int, folder: Path) -> list[Finding]:
    """Builds one state, opens it with the real code, and reads it with other code."""

    def finding(kind: str, text: str) -> list[Finding]:
        return [Finding(kind, crash_at, seed, text)]

    path = work.disk.materialise(crash_at, seed, folder)
    try:
        file = File(path)
    except UnlostError as e:
        return finding("refused", str(e))
    file.close()
    tables, wrong = read_tables(path)
    if wrong:
        return finding("damaged", "; ".join(wrong))
    acknowledged = max(i for i, s in enumerate(work.steps) if s.acknowledged <= crash_at)
    asked = max(i for i, s in enumerate(work.steps) if s.asked <= crash_at)
    found = [i for i, s in enumerate(work.steps) if s.tables == tables]
    if not found:
        return finding("half done", f"between {work.steps[acknowledged].what} and {work.steps[asked].what}")
    if max(found) < acknowledged:
        return finding("lost", f"{work.steps[acknowledged].what}: the file ends after {work.steps[max(found)].what}")
    if min(found) > asked:
        return finding("invented", f"{work.steps[min(found)].what}, after {work.steps[asked].what} was asked")
    return []


def moments(work: Workload, seed: int, sample: int) -> Iterator[tuple[int, int]]:
    """Around each acknowledgement and just before it, and at a sample of all other moments."""
    chance = random.Random(seed)
    for n, step in enumerate(work.steps):
        for offset in (0, -1):
            yield max(0, step.acknowledged + offset), n
        for extra in range(SEEDS_AT_AN_ACKNOWLEDGEMENT - 1):
            yield step.acknowledged, 1000 + n * 10 + extra
    for _ in range(sample):
        yield chance.randrange(len(work.disk.log) + 1), chance.randrange(1 << 20)


class SmallWal(File):
    """The same file with a checkpoint every few pages, so that the WAL is reset many times."""

    def _connect(self) -> Any:
        connection = super()._connect()
        connection.pragma("wal_autocheckpoint", 24)
        return connection


@pytest.fixture
def fast_folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is such a place: what is built here need not survive anything."""
    shm = Path("/dev/shm")
    if not shm.is_dir():
        yield tmp_path
        return
    folder = shm / f"unlost-{tmp_path.parent.name}-{tmp_path.name}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def prove(
    folder: Path, *, seed: int, rounds: int, sample: int, kind: type[File] = SmallWal
) -> tuple[int, list[Finding]]:
    with Disk() as disk:
        work = Workload(disk, folder / "live", seed, kind)
        asyncio.run(work.run(rounds))
        findings: list[Finding] = []
        states = 0
        for crash_at, state_seed in moments(work, seed, sample):
            where = folder / "state"
            findings.extend(check_state(work, crash_at, state_seed, where))
            shutil.rmtree(where)
            states += 1
        return states, findings


@pytest.mark.parametrize("seed", [1, 2])
def test_no_power_cut_loses_anything_acknowledged(fast_folder: Path, seed: int) -> None:
    states, findings = prove(fast_folder, seed=seed, rounds=8, sample=SAMPLE)
    assert findings == []
    assert states >= 500


@pytest.mark.slow
def test_no_moment_at_all_loses_anything(fast_folder: Path) -> None:
    """Every boundary between two operations of the disk, each with another seed."""
    with Disk() as disk:
        work = Workload(disk, fast_folder / "live", 9, SmallWal)
        asyncio.run(work.run(4))
        for crash_at in range(disk.mark() + 1):
            assert check_state(work, crash_at, 5000 + crash_at, fast_folder / "state") == []
            shutil.rmtree(fast_folder / "state")


# --- planted bugs: a check that cannot fail is no check ---------------------------------------------------------


class Unsynced(SmallWal):
    """Planted: `synchronous=NORMAL`, which does not sync the WAL at a commit."""

    def _connect(self) -> Any:
        connection = super()._connect()
        connection.pragma("synchronous", 1)
        return connection


class Hasty(SmallWal):
    """Planted: the callers are told before the commit. Both sides wait for each other, so that the order is sure."""

    def _commit(self, group: list[Any]) -> None:
        super()._commit(group)
        self.workload.landed.set()

    def _run_operations(self, part: Any) -> None:
        super()._run_operations(part)
        if self.workload.model.services:
            self.workload.landed.clear()
            file_module._tell(part, None)
            assert self.workload.noticed.wait(10)


class TwoCommits(SmallWal):
    """Planted: what belongs together is committed in two parts."""

    last = -1

    def _run_operations(self, part: Any) -> None:
        super()._run_operations(part)
        self._tx.flush()
        half = self._writer.execute("select max(at) from unlost_log").fetchone()[0]
        if half is None or half == self.last:
            return
        self.last = half
        row = self._writer.execute("delete from unlost_log where at = ? returning *", (half,)).fetchone()
        self._writer.execute("commit")
        self._writer.execute("begin immediate")
        self._writer.execute("insert into unlost_log values (?, ?, ?, ?, ?, ?, ?)", row)


class MarkFirst(SmallWal):
    """Planted: the mark is written before the commit; it can then accuse a file that lost nothing."""

    def _run_operations(self, part: Any) -> None:
        self._marks.write(self._commits + 1)
        super()._run_operations(part)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(Unsynced, "lost"), (Hasty, "lost"), (TwoCommits, "half done"), (MarkFirst, "refused")],
)
def test_a_planted_bug_turns_the_proof_red(fast_folder: Path, kind: type[File], expected: str) -> None:
    _, findings = prove(fast_folder, seed=2, rounds=2, sample=60, kind=kind)
    assert expected in {f.kind for f in findings}


def test_the_disk_is_repeatable_and_really_loses(tmp_path: Path) -> None:
    with Disk() as disk:
        work = Workload(disk, tmp_path / "live", 3, SmallWal)
        asyncio.run(work.run(3))
        end = disk.mark()
        assert disk.survivors(end, 7) == disk.survivors(end, 7)
        live = {p.name: p.read_bytes() for p in work.path.parent.iterdir() if p.suffix in (".db", ".marks", ".db-wal")}
        kinds = {op.kind for op in disk.log}
        assert kinds >= {"write", "truncate", "sync", "sync folder"}, kinds
        assert {op.name for op in disk.log} >= {"events.db", "events.db-wal", "events.db.marks"}
        different = sum(disk.survivors(at, 1) != disk.survivors(at, 2) for at in range(0, end, 7))
        assert different > 20, "most moments have more than one outcome"
        resets = [op for op in disk.log if op.name.endswith("-wal") and op.kind == "write" and op.at == 0]
        assert len(resets) >= 3, "the WAL was reset"
        whole = [disk.survivors(end, seed) for seed in range(20)]
        assert any(files["events.db"] == live["events.db"] for files in whole)
