"""`check_store`: what every store promises, put to the test through the port, with a look at its tables.

"Nothing was written" can only be seen in the tables. So a store comes to the suite as a `StoreRig`, which also does
what in life others do: operators ask for a redrive, a broker takes what handlers publish.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

import msgspec

from unlost.brokers.connect import connect
from unlost.errors import Bug, Fenced, UnlostError, UsageError
from unlost.events import MAX_HEAD_BYTES, Envelope, content_hash, decode_head, event_hash
from unlost.events.topic import Gap, Topic, TopicInfo, Unit
from unlost.sqlite.schema import POSITION_BITS
from unlost.sqlite.transaction import Transaction
from unlost.store.port import Attempt, Block, Death, Inbox, Outcome, Request, Settlement, State, Store, Taken
from unlost.store.progress import Runs
from unlost.store.sqlite import SqliteStore
from unlost.testing.conformance import (
    Case,
    Result,
    Scenario,
    arrival_of,
    chosen,
    envelope,
    expect,
    refused,
    same,
    scenario,
)
from unlost.world import REAL

Row = dict[str, Any]
Tables = dict[str, list[Row]]
MINUTE = 60_000_000
BLOCK_SECONDS = 10.0  # no block of a scenario ends by its deadline, but the one that is meant to
ENDS: tuple[State, ...] = ("done", "skipped", "dead", "retrying", "parked", "removed")
ALL_STATES: tuple[State, ...] = (*ENDS, "attempted")


class StoreRig(Protocol):
    """A store under test, with what the port leaves to others."""

    store: Store

    async def declare(self, topic: str, partitions: int) -> TopicInfo:
        """Makes a topic where the store's services have their positions."""

    async def published(self, topic: str) -> Sequence[Envelope]:
        """What settling has published to a topic: out of the log, or of the outbox."""

    async def ask(self, request: Request) -> None:
        """Notes an operator's request on a dead letter."""

    async def noticed(self) -> None:
        """Returns when the store knows of every process that was killed; a server learns of that a moment later."""

    async def tables(self) -> Tables:
        """Every row of every table that says something durable, by the names of `sqlite/schema.py` without
        `unlost_`. Left out is what changes by itself (counters of commits, lists of processes)."""


OpenStore = Callable[[str], AbstractAsyncContextManager[StoreRig]]


class SqliteRig:
    """The store in the embedded file. It publishes into the log of the same file."""

    LEFT_OUT = ("unlost_commit", "unlost_process", "unlost_member", "unlost_assignment")

    def __init__(self, url: str) -> None:
        self._broker, file = connect(url)
        assert file is not None
        self._file = file
        self.store: Store = SqliteStore(self._file, publish=Transaction.append)

    async def close(self) -> None:
        await asyncio.to_thread(self._file.close)

    async def declare(self, topic: str, partitions: int) -> TopicInfo:
        return (await self._broker.declare([Topic(topic, partitions=partitions)]))[0]

    async def published(self, topic: str) -> Sequence[Envelope]:
        sql = "select head, key, data from unlost_log join unlost_topic on at >> ? between first_number and " \
              "first_number + partitions - 1 where name = ? order by at"  # fmt: skip
        rows = self._file.read(lambda c: c.execute(sql, (POSITION_BITS, topic)).fetchall())
        return [decode_head(head, topic=topic, key=key, data=data) for head, key, data in rows]

    async def ask(self, request: Request) -> None:
        where = "where service = ? and topic = ? and partition = ? and position = ?"
        place = (*request.unit, request.position)

        def work(tx: Transaction) -> None:
            tx.execute(
                "insert into unlost_operation (at, operator, action, reason, service, topic, partition, position, id) "
                f"select ?, 'suite', ?, '', service, topic, partition, position, id from unlost_shelf {where}",
                (tx.world.now(), request.action, *place),
            )
            number = tx.connection.last_insert_rowid()
            tx.execute(f"update unlost_shelf set request = ?, operation = ? {where}", (request.action, number, *place))

        await self._file.write(work)

    async def noticed(self) -> None:
        """The kernel has let go of its lock."""

    async def tables(self) -> Tables:
        def work(connection: Any) -> Tables:
            names = [row[0] for row in connection.execute("select name from sqlite_schema where type = 'table'")]
            found: Tables = {}
            for name in names:
                if name not in self.LEFT_OUT and not name.startswith("sqlite_"):
                    columns = [row[1] for row in connection.execute(f"pragma table_info({name})")]
                    rows = connection.execute(f"select * from {name}")
                    found[name.removeprefix("unlost_")] = [dict(zip(columns, row, strict=True)) for row in rows]
            return found

        return self._file.read(work)


@contextlib.asynccontextmanager
async def store_at(url: str) -> AsyncIterator[SqliteRig]:
    """Opens the store in the file behind an embedded URL, as another process would."""
    rig = await asyncio.to_thread(SqliteRig, url)
    try:
        await rig.store.open()
        yield rig
        await rig.store.close()
    finally:
        await rig.close()


class StoreCase(Case):
    """One run of one scenario over a store."""

    def __init__(self, url: str, opener: OpenStore) -> None:
        super().__init__(url)
        self.opener = opener

    async def open(self) -> StoreRig:
        """The store, opened once more on the same data."""
        return await self._stack.enter_async_context(self.opener(self.url))

    async def owner(self, rig: StoreRig, service: str = "", *, partitions: int = 1) -> Owner:
        """A service on a topic of its own, and its first partition taken."""
        service = service or self.name("service")
        info = await rig.declare(self.name("topic"), partitions)
        await rig.store.register(service, {"on_dead": "park"}, [info])
        owner = Owner(rig, Unit(service, info.name, 0), info)
        await owner.take()
        return owner

    async def promises(self, need: str) -> bool:
        return bool(getattr((await self.open()).store, need))

    async def owner_process(
        self, unit: Unit, *, in_hand: Sequence[int] = (), waited: Sequence[int] = (), alone: bool = False
    ) -> Any:
        """A child process that has taken a unit, with events in its handlers' hands."""
        child = await self.child(
            "owner", self.opener, unit=list(unit), in_hand=list(in_hand), waited=list(waited), alone=alone
        )
        await child.until("taken")
        return child


class Owner:
    """One process' hold on a unit, and how it settles there."""

    def __init__(self, rig: StoreRig, unit: Unit, info: TopicInfo) -> None:
        self.rig = rig
        self.unit = unit
        self.info = info
        self.taken: Taken
        self.hashes: dict[int, int] = {}

    async def take(self) -> Taken:
        (self.taken,) = await self.rig.store.take([self.unit])
        return self.taken

    async def give(self) -> None:
        await self.rig.store.give([(self.unit, self.taken.epoch)])

    def outcome(self, position: int, state: State, *, key: bytes | None = b"key", id: str = "", **more: Any) -> Outcome:
        """An outcome with everything that its state needs."""
        event = envelope(self.unit.topic, key=key, id=id or f"event-{self.unit.service}-{position}")
        if state == "dead":
            more.setdefault("death", Death(handler="handler", reason="rejected", error_type="Reject", error="no"))
        if state == "skipped":
            more.setdefault("rule", "where")
        if state in ("retrying", "attempted"):
            more.setdefault("attempts", [Attempt(1, REAL.now(), "ValueError: first")])
        if state == "retrying":
            more.setdefault("due", REAL.now() + MINUTE)
        hash = event_hash(event.source, event.id)
        return Outcome(arrival=arrival_of(event, position), state=state, event_hash=hash, **more)

    def settlement(self, *outcomes: Outcome) -> Settlement:
        return Settlement(self.unit, self.taken.epoch, outcomes)

    async def settle(self, *outcomes: Outcome) -> None:
        fenced = await self.rig.store.settle([self.settlement(*outcomes)])
        same(list(fenced), [], "units that were fenced")

    async def done(self, *positions: int) -> None:
        await self.settle(*(self.outcome(position, "done") for position in positions))

    async def rows(self, table: str) -> list[Row]:
        """This unit's rows of a table."""
        place = self.unit._asdict()
        return [r for r in (await self.rig.tables())[table] if {k: r.get(k) for k in place} == place]

    async def ledger(self) -> dict[int, str]:
        return {row["position"]: row["state"] for row in await self.rows("ledger")}

    async def counts(self) -> dict[str, int]:
        (row,) = await self.rows("progress")
        counts: dict[str, int] = msgspec.json.decode(row["counts"])
        return {state: count for state, count in counts.items() if count}


STORE_SCENARIOS: list[Scenario[StoreCase]] = []
"""What `check_store` tries, one promise of the store's port each."""
promise = scenario


async def check_store(url: str, open: OpenStore = store_at, *, only: Sequence[str] = ()) -> list[Result]:
    """Holds a store to the port's promises; returns one result per scenario.

    `open(url)` opens a `StoreRig` as an async context manager, each time as another process would. It must be a
    function that child processes can import.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> [r.verdict for r in asyncio.run(check_store(f"embedded://{folder}/events.db", only=["epochs"]))]
        ['kept']
    """
    return [await s.check(StoreCase(url, open)) for s in chosen(STORE_SCENARIOS, only)]


def inbox(o: Outcome) -> Inbox:
    e = o.arrival.envelope
    assert e is not None
    return Inbox(e.id, e.source, content_hash(e.type, e.data))


async def unchanged(rig: StoreRig, before: Tables, what: str) -> None:
    """Compares every row of every table."""
    after = await rig.tables()
    for name in before.keys() | after.keys():
        same(after.get(name), before.get(name), f"{what}: the table {name}")


# --- services and ownership ----------------------------------------------------------------------------------


@promise(STORE_SCENARIOS)
async def the_start_is_pinned(c: StoreCase) -> None:
    """A service's start on a topic is decided once, for every partition, and registering again does not move it."""
    rig = await c.open()
    owner = await c.owner(rig, partitions=3)
    same([row["partition"] for row in await owner.rows("progress")], [0], "this unit's rows")
    same((owner.taken.position, list(owner.taken.fated)), (0, []), "the start of a new service")
    await owner.done(0, 1, 2)
    again = await c.open()
    await again.store.register(owner.unit.service, {"on_dead": "park"}, [owner.info])
    before = await rig.tables()
    await again.store.register(owner.unit.service, {"on_dead": "park"}, [owner.info])
    await unchanged(rig, before, "registering again")
    same((await owner.take()).position, 3, "the position after registering again")
    units = [Unit(owner.unit.service, owner.unit.topic, p) for p in range(3)]
    same([t.position for t in await again.store.take(units)], [3, 0, 0], "the positions of all partitions")


@promise(STORE_SCENARIOS)
async def another_topic_is_refused(c: StoreCase) -> None:
    """A topic with another number of partitions, or one that was made again, does not get the saved positions."""
    rig = await c.open()
    owner = await c.owner(rig, partitions=2)
    await owner.done(0)
    before = await rig.tables()
    more = msgspec.structs.replace(owner.info, partitions=3, ranges=[(0, 0)] * 3)
    anew = msgspec.structs.replace(owner.info, id="another-id")
    for info, what in ((more, "more partitions"), (anew, "a topic made again")):
        call = rig.store.register(owner.unit.service, {"on_dead": "park"}, [info])
        await refused(call, UsageError, what)
        await unchanged(rig, before, what)


@promise(STORE_SCENARIOS)
async def releases_agree_on_the_order(c: StoreCase) -> None:
    """While a process of a service lives, no release with another `on_dead` may register; afterwards it may,
    however that process ended."""
    rig = await c.open()
    owner = await c.owner(rig)
    service = owner.unit.service
    skipping = {"on_dead": "skip"}
    await refused(rig.store.register(service, skipping, [owner.info]), UsageError, "another on_dead")
    await owner.give()
    await rig.store.register(service, skipping, [owner.info])
    await rig.store.register(service, {"on_dead": "park"}, [owner.info])
    child = await c.owner_process(owner.unit)
    await refused(rig.store.register(service, skipping, [owner.info]), UsageError, "another on_dead")
    await child.kill()
    await rig.store.register(service, skipping, [owner.info])


@promise(STORE_SCENARIOS)
async def one_service_for_a_queue(c: StoreCase) -> None:
    """Commands of a queue are carried out by one service: a second one is refused, until the first has given the queue up."""
    rig = await c.open()
    owner = await c.owner(rig)
    first, queue = owner.unit.service, owner.info.name
    policy = {"on_dead": "park", "queues": [queue, f"{queue}-more"]}
    await rig.store.register(first, policy, [owner.info])
    before = await rig.tables()
    again = await c.open()
    await refused(again.store.register(f"{first}-other", policy, [owner.info]), UsageError, "a second service")
    await unchanged(again, before, "a second service")
    same(await again.store.service_of(queue), first, "who carries out the queue")
    same(await again.store.service_of(f"{queue}-less"), None, "who carries out a queue that nobody has")
    await again.store.register(first, {"on_dead": "park"}, [owner.info])
    await again.store.register(f"{first}-other", policy, [owner.info])
    same(await rig.store.service_of(queue), f"{first}-other", "who carries it out since then")


@promise(STORE_SCENARIOS)
async def epochs(c: StoreCase) -> None:
    """Each `take` begins a new epoch, in whichever process; only the newest may settle; `give` of an old one does
    nothing."""
    one, two = await c.open(), await c.open()
    first = await c.owner(one)
    second = Owner(two, first.unit, first.info)
    await second.take()
    expect(second.taken.epoch > first.taken.epoch, "a later epoch is larger")
    same(list(await one.store.settle([first.settlement(first.outcome(0, "done"))])), [first.unit], "fenced units")
    await first.give()
    await second.done(0)
    same([row["owner"] is not None for row in await second.rows("progress")], [True], "that there is an owner")
    await second.give()
    same([(r["owner"], r["clean"]) for r in await second.rows("progress")], [(None, 1)], "after it was given back")
    third = await first.take()
    expect(third.epoch > second.taken.epoch, "a later epoch is larger")
    same(third.position, 1, "the position that the next owner gets")
    same([row["epoch"] for row in await first.rows("epoch")], sorted({r["epoch"] for r in await first.rows("epoch")}),
         "each epoch is listed once")  # fmt: skip


# --- settling ------------------------------------------------------------------------------------------------


@promise(STORE_SCENARIOS)
async def every_outcome_in_one_commit(c: StoreCase) -> None:
    """One call settles outcomes of every kind: positions, counts, ledger, shelf, waiting room, inbox, attempts and
    the published events, for several units."""
    rig = await c.open()
    owner, other, topic = await c.owner(rig), await c.owner(rig), c.name("topic")
    first = [envelope(topic, key=b"a", id="published-1"), envelope(topic, key=b"a", id="published-2")]
    done = owner.outcome(0, "done", publishes=first)
    done.inbox = inbox(done)
    parked = owner.outcome(4, "parked")
    outcomes = [
        done, owner.outcome(1, "skipped", rule="no handler"), owner.outcome(2, "dead"), owner.outcome(3, "retrying", key=b"3"),
        parked, owner.outcome(5, "attempted", key=b"5"), owner.outcome(6, "done", key=b"6"),
    ]  # fmt: skip
    fenced = await rig.store.settle([owner.settlement(*outcomes), other.settlement(other.outcome(0, "done"))])
    same(list(fenced), [], "fenced units")
    same(await owner.counts(), {"done": 2, "skipped:no handler": 1}, "counts")
    same(await owner.ledger(), {2: "dead", 3: "retrying", 4: "parked"}, "ledger")
    same([e.id for e in await rig.published(topic)], ["published-1", "published-2"], "published events")
    same([e.data for e in await rig.published(topic)], [e.data for e in first], "their data")
    same([row["position"] for row in await owner.rows("shelf")], [2], "shelf")
    same(sorted(row["position"] for row in await owner.rows("waiting")), [3, 4], "waiting room")
    taken = await owner.take()
    same((taken.position, list(taken.fated)), (5, [(0, 5), (6, 7)]), "position and fated")
    same({p: [a.error for a in past] for p, past in taken.attempts.items()}, {5: ["ValueError: first"]}, "attempts")
    same((await other.take()).position, 1, "the other unit's position")
    hashes = 0
    for outcome in outcomes:
        if outcome.state != "attempted":
            hashes ^= outcome.event_hash
    (row,) = await owner.rows("progress")
    same(row["digest"], hashes, "the digest of everything that is fated")


@promise(STORE_SCENARIOS)
async def a_dead_letter_is_complete(c: StoreCase) -> None:
    """The shelf keeps the reason, the error, every attempt, the place, the key and the original bytes of an event."""
    rig = await c.open()
    owner = await c.owner(rig)
    attempts = [
        Attempt(1, 1_700_000_000_000_000, "ValueError: one"),
        Attempt(2, 1_700_000_000_000_001, "KeyError: 'two'"),
    ]
    death = Death(
        handler="charge", reason="exhausted", error_type="KeyError", error="'two' \x00 ü", stack="Traceback …"
    )
    outcome = owner.outcome(0, "dead", key=b"\x00\xff", death=death, attempts=attempts)
    await owner.settle(outcome)
    (row,) = await owner.rows("shelf")
    a, e = outcome.arrival, outcome.arrival.envelope
    assert e is not None
    wanted = {
        "handler": "charge", "reason": "exhausted", "error_type": "KeyError", "error": row["error"], "stack": "Traceback …",
        "position": 0, "id": e.id, "source": e.source, "type": e.type, "key": a.key, "head": a.head, "data": a.data,
        "recorded": a.recorded, "parks": 1, "request": None,
    }  # fmt: skip
    same({name: row[name] for name in wanted}, wanted, "the dead letter")
    expect(row["error"] in ("'two' \x00 ü", "'two' ␀ ü"), "the error's text, with a stand-in for what cannot be stored")
    same(msgspec.json.decode(row["attempts"], type=list[Attempt]), attempts, "its attempts")


@promise(STORE_SCENARIOS)
async def many_handled_at_once(c: StoreCase) -> None:
    """Events that were handled and have no other consequence may be settled as a list of positions: in any order,
    beside outcomes of other kinds, once each, and only by the owner."""
    rig = await c.open()
    owner = await c.owner(rig)
    hashes = {position: owner.outcome(position, "done").event_hash for position in range(20)}

    async def settle(positions: Sequence[int], *outcomes: Outcome) -> Sequence[Unit]:
        digest = 0
        for position in positions:
            digest ^= hashes[position]
        return await rig.store.settle(
            [Settlement(owner.unit, owner.taken.epoch, outcomes, done=list(positions), done_digest=digest)]
        )

    same(list(await settle([7, 3, 4, 9, 0], owner.outcome(1, "dead"))), [], "units that were fenced")
    same(await owner.counts(), {"done": 5}, "counts")
    (row,) = await owner.rows("progress")
    same((row["position"], list(Runs.decode(row["fated"]))), (2, [(0, 2), (3, 5), (7, 8), (9, 10)]), "progress")
    before = await rig.tables()
    for positions in ([5, 3], [1], [9], [6, 6]):
        await refused(settle(positions), Bug, f"positions {positions}, of which one has an outcome")
        await unchanged(rig, before, f"refusing {positions}")
    same(list(await settle([2, 5, 6, 8])), [], "units that were fenced")
    (row,) = await owner.rows("progress")
    wanted = owner.outcome(1, "dead").event_hash
    for position in range(10):
        wanted ^= hashes[position] if position != 1 else 0
    same((row["position"], row["digest"]), (10, wanted), "position and digest")
    before = await rig.tables()
    await (await c.open()).store.take([owner.unit])
    before = await rig.tables()
    same(list(await settle([11])), [owner.unit], "fenced units")
    await unchanged(rig, before, "settling under an older epoch")


@promise(STORE_SCENARIOS)
async def begun_at_most_once(c: StoreCase) -> None:
    """An event that was begun at most once is not delivered again: it ends once, or the next owner lists it as abandoned,
    after a crash and after a clean stop."""
    rig = await c.open()
    owner = await c.owner(rig)
    hashes = {position: owner.outcome(position, "done").event_hash for position in range(10)}

    async def settle(*outcomes: Outcome, begun: Sequence[int] = (), ended: Sequence[int] = ()) -> Sequence[Unit]:
        digest = 0
        for position in begun:
            digest ^= hashes[position]
        settlement = Settlement(
            owner.unit, owner.taken.epoch, outcomes, begun=list(begun), begun_digest=digest, ended=list(ended)
        )
        return await rig.store.settle([settlement])

    same(list(await settle(owner.outcome(8, "retrying", key=b"8"), begun=[0, 1, 2, 3, 4, 5, 6])), [], "fenced units")
    same(await owner.counts(), {"begun": 7}, "counts of what was begun")
    (row,) = await owner.rows("progress")
    same((row["position"], list(Runs.decode(row["begun"]))), (7, [(0, 7)]), "position, and what was begun")
    same(list(await settle(owner.outcome(8, "begun", key=b"8", waited=True))), [], "fenced units")
    same((await owner.ledger(), await owner.rows("waiting")), ({}, []), "what waited and was begun")
    await settle(
        owner.outcome(2, "done", begun=True, publishes=[envelope(c.name("topic"))]), owner.outcome(3, "abandoned", begun=True),
        owner.outcome(4, "dead", begun=True), owner.outcome(5, "skipped", begun=True), ended=[0, 1], begun=[7],
    )  # fmt: skip
    counts = {"begun": 3, "done": 3, "skipped:where": 1}
    same((await owner.counts(), await owner.ledger()), (counts, {3: "abandoned", 4: "dead"}), "the books")
    before = await rig.tables()
    for ended in ([0], [9], [6, 6]):
        await refused(settle(ended=ended), Bug, f"the end of {ended}, of which one is not begun")
        await unchanged(rig, before, f"refusing the end of {ended}")
    await refused(settle(begun=[9, 2]), Bug, "beginning one that has an outcome")
    await unchanged(rig, before, "refusing to begin again")
    taken = await owner.take()
    same((taken.abandoned, taken.position, list(taken.fated)), (3, 9, [(0, 9)]), "what the next owner gets")
    listed = dict.fromkeys((3, 6, 7, 8), "abandoned") | {4: "dead"}
    same((await owner.counts(), await owner.ledger()), ({"done": 3, "skipped:where": 1}, listed), "the books")
    (row,) = await owner.rows("progress")
    wanted = 0
    for position in range(9):
        wanted ^= hashes[position]
    same((row["digest"], list(Runs.decode(row["begun"]))), (wanted, []), "digest, and what is begun")
    await owner.give()
    same((await owner.take()).abandoned, 0, "what the owner after it gets")
    late = Settlement(owner.unit, taken.epoch, [], ended=[6])
    same(list(await rig.store.settle([late])), [owner.unit], "fenced units")


@promise(STORE_SCENARIOS)
async def gaps_are_written_down(c: StoreCase) -> None:
    """Positions that hold no event get their outcome too: counted where none was ever there, listed with range and
    reason where one was lost; what has an outcome already keeps it."""
    rig = await c.open()
    owner = await c.owner(rig)
    await owner.settle(owner.outcome(3, "done"), owner.outcome(5, "dead"))

    async def pass_over(*gaps: Gap) -> None:
        same(list(await rig.store.settle([Settlement(owner.unit, owner.taken.epoch, [], gaps)])), [], "fenced units")

    await pass_over(Gap(0, 7, "expired", "retention"), Gap(8, 10, "void", "markers"))
    (row,) = await owner.rows("progress")
    same((row["position"], list(Runs.decode(row["fated"]))), (7, [(0, 7), (8, 10)]), "progress")
    same(await owner.counts(), {"done": 1, "void": 2}, "counts")
    lines = [(r["start"], r["end"], r["kind"], r["why"]) for r in await owner.rows("gap")]
    same(
        lines, [(0, 3, "expired", "retention"), (4, 5, "expired", "retention"), (6, 7, "expired", "retention")], "gaps"
    )
    same(await owner.ledger(), {5: "dead"}, "the ledger")
    before = await owner.rows("gap")
    await pass_over(Gap(0, 7, "unaccountable", "again"))
    same(await owner.rows("gap"), before, "gaps that were known")
    (snapshot,) = await rig.store.progress([owner.unit])
    same((snapshot.position, list(snapshot.fated)), (7, [(0, 7), (8, 10)]), "the snapshot for the broker's note")
    same(
        (snapshot.topic_id, snapshot.partitions, snapshot.counts),
        (owner.info.id, 1, {"done": 1, "void": 2}),
        "the rest of it",
    )


@promise(STORE_SCENARIOS)
async def out_of_order_and_restart(c: StoreCase) -> None:
    """Outcomes may come in any order; whoever opens the store again goes on at the first event without one, and
    knows of the others."""
    order = [5, 3, 9, 0, 4, 1, 7]
    rig = await c.open()
    owner = await c.owner(rig)
    known: set[int] = set()
    for position in order:
        await owner.done(position)
        known.add(position)
        owner = Owner(await c.open(), owner.unit, owner.info)
        taken = await owner.take()
        same({p for run in taken.fated for p in range(*run)}, known, "what has an outcome")
        same(taken.position, next(i for i in range(20) if i not in known), "the position")
    await owner.done(2, 6)
    await owner.done(8)
    same(((await owner.take()).position, await owner.counts()), (10, {"done": 10}), "position and counts")


@promise(STORE_SCENARIOS)
async def fenced_writes_nothing(c: StoreCase) -> None:
    """A settlement of an older epoch writes nothing at all, whatever the outcome; others of the same call are kept."""
    rig = await c.open()
    old, other = await c.owner(rig), await c.owner(rig)
    await old.settle(old.outcome(0, "retrying", key=b"0"), old.outcome(1, "dead", key=b"1"))
    late = old.taken
    await old.take()
    topic, at = c.name("topic"), 0
    for state in ALL_STATES:
        for waited in (False, True):
            before = await rig.tables()
            stale = Owner(rig, old.unit, old.info)
            stale.taken = late
            outcome = stale.outcome(0 if waited else 7, state, key=b"0", publishes=[envelope(topic)], waited=waited)
            outcome.inbox = inbox(outcome)
            same(list(await rig.store.settle([stale.settlement(outcome)])), [old.unit], f"fenced, {state}")
            await unchanged(rig, before, f"a fenced {state}")
            outcomes = [stale.settlement(outcome), other.settlement(other.outcome(at, "done"))]
            same(list(await rig.store.settle(outcomes)), [old.unit], f"fenced beside another, {state}")
            at += 1
    same((await other.take()).position, at, "what the other has settled")
    same(await old.ledger(), {0: "retrying", 1: "dead"}, "the ledger of the fenced unit")


@promise(STORE_SCENARIOS)
async def settled_twice_is_refused(c: StoreCase) -> None:
    """An event gets one outcome: a second one is refused, in the same call, in a later one, and after it waited."""
    rig = await c.open()
    owner = await c.owner(rig)
    await owner.settle(owner.outcome(0, "done"), owner.outcome(1, "dead"), owner.outcome(2, "retrying", key=b"2"))
    await owner.settle(owner.outcome(2, "done", key=b"2", waited=True))
    before = await rig.tables()
    for state in ENDS:
        twice = [
            [owner.outcome(0, state)],  # below the position
            [owner.outcome(1, state)],
            [owner.outcome(5, "done"), owner.outcome(5, state)],
            [owner.outcome(2, state, key=b"2", waited=True)],  # it does not wait any more
            [owner.outcome(9, state, waited=True)],  # it never waited
        ]
        for outcomes in twice:
            call = rig.store.settle([owner.settlement(*outcomes)])
            await refused(call, Bug, f"{state} after another outcome, {outcomes[-1].arrival.position}")
            await unchanged(rig, before, f"a second outcome, {state}")
    await owner.done(3)


@promise(STORE_SCENARIOS)
async def all_or_nothing(c: StoreCase) -> None:
    """When one outcome of a call cannot be written, nothing of that call is; calls beside it are not harmed."""
    rig = await c.open()
    owner, other = await c.owner(rig), await c.owner(rig)
    topic = c.name("topic")
    bad = envelope(topic, headers={"large": "x" * (MAX_HEAD_BYTES + 1)})
    before = await rig.tables()
    for at in range(5):
        outcomes = [owner.outcome(i, state, key=b"%d" % i, publishes=[envelope(topic)]) for i, state in
                    enumerate(ENDS)]  # fmt: skip
        outcomes[0].inbox = inbox(outcomes[0])
        outcomes[at].publishes = [envelope(topic), bad]
        await refused(rig.store.settle([owner.settlement(*outcomes)]), UsageError, "an event that cannot be written")
        await unchanged(rig, before, f"a call that failed at its outcome {at}")
    failing = [rig.store.settle([owner.settlement(owner.outcome(0, "done", publishes=[bad]))]) for _ in range(3)]
    fine = [
        rig.store.settle([other.settlement(other.outcome(i, "done", publishes=[envelope(topic)]))]) for i in range(6)
    ]
    ends = await asyncio.gather(fine[0], failing[0], *fine[1:4], *failing[1:], *fine[4:], return_exceptions=True)
    same(sum(isinstance(e, UsageError) for e in ends), 3, "calls that failed")
    same(((await other.take()).position, (await owner.take()).position), (6, 0), "positions")
    same(len(await rig.published(topic)), 6, "published events")


@promise(STORE_SCENARIOS)
async def two_processes_settle_at_once(c: StoreCase) -> None:
    """Settlements of different units from several processes do not disturb each other."""
    rigs = [await c.open() for _ in range(3)]
    owners = [await c.owner(rig) for rig in rigs]

    async def work(owner: Owner) -> None:
        for position in range(40):
            await owner.done(position)

    await asyncio.gather(*(work(owner) for owner in owners))
    same([(await owner.take()).position for owner in owners], [40] * 3, "positions")


# --- duplicates ----------------------------------------------------------------------------------------------


@promise(STORE_SCENARIOS)
async def the_inbox_knows_what_was_handled(c: StoreCase) -> None:
    """The inbox knows an event by service, source and id, with its content; other services and sources are others."""
    rig = await c.open()
    owner, other = await c.owner(rig), await c.owner(rig)
    outcome = owner.outcome(0, "done", id="event-1")
    outcome.inbox = mark = inbox(outcome)
    asked = [mark, Inbox("event-2", mark.source, 0), Inbox(mark.id, "other source", 0)]
    same(await rig.store.seen(owner.unit.service, asked), {}, "what was seen before")
    await owner.settle(outcome)
    again = await c.open()
    for store in (rig.store, again.store):
        seen = await store.seen(owner.unit.service, asked)
        same({name: known.content for name, known in seen.items()}, {(mark.source, mark.id): mark.content}, "seen")
        same(await store.seen(other.unit.service, asked), {}, "what another service has seen")
        same(await store.seen(owner.unit.service, []), {}, "what was seen of nothing")
    elsewhere = other.outcome(0, "done", id="event-1")
    elsewhere.inbox = inbox(elsewhere)
    await other.settle(elsewhere)
    same(await other.counts(), {"done": 1}, "the outcome in the other service")


@promise(STORE_SCENARIOS)
async def a_repeated_event_has_no_effect(c: StoreCase) -> None:
    """An event that was handled before is counted as a duplicate, and what it would publish is not published."""
    rig = await c.open()
    owner, topic = await c.owner(rig), c.name("topic")
    for position in range(2):
        outcome = owner.outcome(position, "done", id="the-same", publishes=[envelope(topic)])
        outcome.inbox = inbox(outcome)
        await owner.settle(outcome)
    same(await owner.counts(), {"done": 1, "skipped:duplicate": 1}, "counts")
    same(len(await rig.published(topic)), 1, "published events")
    same((await owner.take()).position, 2, "the position")


@promise(STORE_SCENARIOS)
async def a_reused_id_is_not_a_duplicate(c: StoreCase) -> None:
    """Another event under a used id is never dropped: it goes to the shelf, and its key does not wait for it."""
    rig = await c.open()
    owner, topic = await c.owner(rig), c.name("topic")
    first = owner.outcome(0, "done", id="the-same")
    first.inbox = inbox(first)
    second = owner.outcome(1, "done", id="the-same", publishes=[envelope(topic)])
    second.inbox = msgspec.structs.replace(inbox(second), content=5)
    await owner.settle(first)
    await owner.settle(second)
    (row,) = await owner.rows("shelf")
    same((row["position"], row["reason"], row["parks"]), (1, "id_reused", 0), "the dead letter")
    same(await owner.ledger(), {1: "dead"}, "ledger")
    same((await owner.take()).waiting, {}, "keys that wait")
    same(list(await rig.published(topic)), [], "published events")


# --- the waiting room and the shelf --------------------------------------------------------------------------


@promise(STORE_SCENARIOS)
async def waiting_in_order(c: StoreCase) -> None:
    """The waiting room keeps the order of each key, wakes a key by its first event's due time, and knows events
    without a key one by one."""
    rig = await c.open()
    owner = await c.owner(rig)
    soon, later = REAL.now() + MINUTE, REAL.now() + 2 * MINUTE
    await owner.settle(
        owner.outcome(0, "retrying", key=b"a\x00", due=soon), owner.outcome(2, "parked", key=b"a\x00"),
        owner.outcome(1, "retrying", key=b"a", due=later), owner.outcome(4, "parked", key=b"a\x00"),
        owner.outcome(3, "retrying", key=None, due=later), owner.outcome(5, "retrying", key=None, due=soon),
        owner.outcome(6, "dead", key=b"dead"), owner.outcome(7, "parked", key=b"dead"),
    )  # fmt: skip
    taken = await owner.take()
    same(taken.waiting, {b"a\x00": soon, b"a": later, b"dead": None}, "keys that wait")
    same(taken.keyless, {3: later, 5: soon}, "events without a key that wait")
    store = (await c.open()).store
    rows = await store.waiting(owner.unit, b"a\x00", None, 10)
    same([(w.arrival.position, w.due) for w in rows], [(0, soon), (2, None), (4, None)], "the events of one key")
    same([len(w.attempts) for w in rows], [1, 0, 0], "their attempts")
    event = rows[0].arrival
    wanted = owner.outcome(0, "retrying", key=b"a\x00").arrival
    same(
        (event.key, event.data, event.envelope and event.envelope.id),
        (wanted.key, wanted.data, wanted.envelope and wanted.envelope.id),
        "an event that waits",
    )
    same([w.arrival.position for w in await store.waiting(owner.unit, b"a\x00", None, 2)], [0, 2], "the first two")
    same([w.arrival.position for w in await store.waiting(owner.unit, None, 5, 9)], [5], "one without a key")
    same(list(await store.waiting(owner.unit, b"unknown", None, 9)), [], "events of a key that does not wait")


@promise(STORE_SCENARIOS)
async def waiting_comes_to_an_end(c: StoreCase) -> None:
    """An event of the waiting room may fail again and keeps its place, or gets its outcome and leaves it."""
    rig = await c.open()
    owner, topic = await c.owner(rig), c.name("topic")
    await owner.settle(*(owner.outcome(i, "retrying", key=b"%d" % i) for i in range(4)))
    (before,) = await owner.rows("progress")
    past = [Attempt(1, 1, "one"), Attempt(2, 2, "two")]
    await owner.settle(owner.outcome(0, "retrying", key=b"0", due=77, attempts=past, waited=True))
    (row,) = await rig.store.waiting(owner.unit, b"0", None, 9)
    same((row.due, list(row.attempts)), (77, past), "an event that failed again")
    await owner.settle(
        owner.outcome(1, "done", key=b"1", waited=True, publishes=[envelope(topic)]),
        owner.outcome(2, "dead", key=b"2", waited=True),
        owner.outcome(3, "skipped", key=b"3", waited=True),
    )
    same(await owner.ledger(), {0: "retrying", 2: "dead"}, "ledger")
    same(await owner.counts(), {"done": 1, "skipped:where": 1}, "counts")
    same([r["position"] for r in await owner.rows("waiting")], [0], "who still waits")
    same(len(await rig.published(topic)), 1, "published events")
    (after,) = await owner.rows("progress")
    for name in ("position", "fated", "digest"):
        same(after[name], before[name], f"{name}, when an event leaves the waiting room")
    same(list(Runs.decode(after["fated"])), [(0, 4)], "what is fated")


@promise(STORE_SCENARIOS)
async def delayed_until_due(c: StoreCase) -> None:
    """What is delayed leaves when it is due, once, in the order of the due times, also if a handler delayed it, in its own
    transaction or not; the same id twice is one; what was cancelled never leaves, and that is written down."""
    rig, other = await c.open(), await c.open()
    owner, topic = await c.owner(rig), c.name("topic")
    now = REAL.steady()

    def event(id: str, due: int, *, by_clock: bool = False) -> Envelope:
        return msgspec.structs.replace(envelope(topic, id=f"{topic}-{id}"), due=due, by_clock=by_clock)

    async def left() -> list[str]:
        return [e.id.removeprefix(f"{topic}-") for e in await rig.published(topic)]

    late, twice = event("late", now + 60 * MINUTE), event("twice", now - 2)
    await rig.store.delay([late, twice, event("first", now - MINUTE, by_clock=True)])
    await other.store.delay([event("twice", now + MINUTE)])
    same(await left(), [], "what has left before it was released")
    due = await other.store.next_due()
    expect(due is not None and due < now, "the first is due")
    same((await other.store.release(), await rig.store.release()), (2, 0), "how many were released")
    same(await left(), ["first", "twice"], "what has left")
    expect((await rig.store.next_due() or 0) > now, "the next one is due later")
    same(await other.store.cancel(late.id, "another source"), False, "cancelling what another source has delayed")
    same([await store.cancel(late.id, late.source) for store in (other.store, rig.store)], [True, False], "cancelling")
    rows = [(r["action"], r["operator"]) for r in (await rig.tables())["operation"] if r["id"] == late.id]
    same((rows, await rig.store.next_due()), ([("cancel", late.source)], None), "what is written down of it")
    await owner.settle(
        owner.outcome(0, "done", publishes=[event("by a handler", now - 1), envelope(topic, id=f"{topic}-now")])
    )
    block = begin(owner)
    async with block:
        await block.finish(owner.settlement(owner.outcome(1, "done", publishes=[event("in a block", now)])))
    same(await left(), ["first", "twice", "now"], "what leaves with the outcome")
    same((await rig.store.release(), await rig.store.release()), (2, 0), "how many were released")
    same(await left(), ["first", "twice", "now", "by a handler", "in a block"], "what has left")


@promise(STORE_SCENARIOS)
async def attempts_are_remembered(c: StoreCase) -> None:
    """Failed attempts of an event that is still in hand come to the next owner, and are forgotten with its outcome."""
    rig = await c.open()
    owner = await c.owner(rig)
    past = [Attempt(1, 5, "one")]
    await owner.settle(owner.outcome(0, "attempted", attempts=past), owner.outcome(1, "attempted", attempts=past))
    past = [*past, Attempt(2, 6, "two")]
    await owner.settle(owner.outcome(0, "attempted", attempts=past))
    taken = await owner.take()
    same((taken.position, len(taken.fated)), (0, 0), "progress")
    same({p: list(found) for p, found in taken.attempts.items()}, {0: past, 1: past[:1]}, "attempts")
    await owner.done(0)
    same(list((await owner.take()).attempts), [1], "events with attempts")


@promise(STORE_SCENARIOS)
async def redrive(c: StoreCase) -> None:
    """A redrive moves a dead letter into the waiting room, due now, before those that wait behind it; once only,
    and only by the owner."""
    rig = await c.open()
    owner = await c.owner(rig)
    await owner.settle(owner.outcome(0, "dead"), owner.outcome(1, "parked"), owner.outcome(2, "dead", key=b"x"))
    request = Request(owner.unit, 0, b"key", "redrive")
    same(list(await rig.store.requests(owner.unit.service)), [], "requests before")
    same(await rig.store.carry_out(request, owner.taken.epoch), "no longer wanted", "without a request")
    await rig.ask(request)
    same(list(await (await c.open()).store.requests(owner.unit.service)), [request], "requests")
    before = await rig.tables()
    await refused(rig.store.carry_out(request, owner.taken.epoch - 1), Fenced, "an older owner")
    await unchanged(rig, before, "a fenced redrive")
    began = REAL.now()
    same(await rig.store.carry_out(request, owner.taken.epoch), "key is free", "the redrive")
    rows = await rig.store.waiting(owner.unit, b"key", None, 9)
    same([w.arrival.position for w in rows], [0, 1], "the key's events that wait")
    expect(rows[0].due is not None and began - MINUTE < rows[0].due <= REAL.now(), "the redriven event is due now")
    same((rows[0].arrival.data, list(rows[0].attempts)), (b"{}", []), "its data and attempts")
    same(await owner.ledger(), {0: "retrying", 1: "parked", 2: "dead"}, "ledger")
    same(await rig.store.carry_out(request, owner.taken.epoch), "no longer wanted", "a second time")
    taken = await owner.take()
    same(taken.waiting, {b"key": rows[0].due, b"x": None}, "keys that wait")
    await owner.settle(owner.outcome(0, "dead", waited=True))
    same((await owner.take()).waiting[b"key"], None, "after it died again, its key")


@promise(STORE_SCENARIOS)
async def discard(c: StoreCase) -> None:
    """A discarded dead letter is accounted for as removed, and its key goes on behind it, unless another one of
    its dead letters stands there."""
    rig = await c.open()
    owner = await c.owner(rig)
    await owner.settle(owner.outcome(0, "dead"), owner.outcome(1, "dead"), owner.outcome(2, "parked"))
    for position, result in ((0, "key still parked"), (1, "key is free")):
        request = Request(owner.unit, position, b"key", "discard")
        await rig.ask(request)
        same(await rig.store.carry_out(request, owner.taken.epoch), result, f"the discard of {position}")
    same(await owner.ledger(), {0: "removed", 1: "removed", 2: "parked"}, "ledger")
    same(await owner.rows("shelf"), [], "shelf")
    same(list(await rig.store.requests(owner.unit.service)), [], "requests")
    taken = await owner.take()
    due = taken.waiting[b"key"]
    expect(due is not None and due <= REAL.now(), "the key may go on")
    carried_out = [row["carried_out"] for row in await owner.rows("operation")]
    expect(len(carried_out) == 2 and all(carried_out), "what operators asked for is on record")


# --- a handler's own transaction -----------------------------------------------------------------------------


class OpenBlock:
    """A block as `ctx.transaction()` has it; entering waits for its turn."""

    def __init__(self, owner: Owner, mark: Inbox | None, deadline_seconds: float) -> None:
        self.block: Block = owner.rig.store.block(None, deadline_seconds)
        self._entry = (owner.unit, owner.taken.epoch, mark)
        self.new = False

    async def __aenter__(self) -> OpenBlock:
        async with asyncio.timeout(10):
            self.new = await self.block.begin(*self._entry) is None
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.block.abort()

    async def finish(self, settlement: Settlement) -> None:
        async with asyncio.timeout(10):
            await self.block.finish(settlement)
            same(await self.block.settled(), None, "the commit's error")


def begin(owner: Owner, mark: Inbox | None = None, deadline_seconds: float = BLOCK_SECONDS) -> OpenBlock:
    return OpenBlock(owner, mark, deadline_seconds)


async def finished(owner: Owner, block: Block, o: Outcome) -> int:
    """Where the unit stands after a block: some stores settle the position with it, others in a commit of its own."""
    if not block.settles:
        o.inbox, o.publishes = None, ()
        await owner.settle(o)
    return (await owner.take()).position


@promise(STORE_SCENARIOS)
async def a_block_is_one_commit(c: StoreCase) -> None:
    """A handler's rows, its events, the inbox mark (and, where the store can, the outcome) become durable together."""
    rig = await c.open()
    owner, topic = await c.owner(rig), c.name("topic")
    outcome = owner.outcome(0, "done", publishes=[envelope(topic)])
    mark = outcome.inbox = inbox(outcome)
    before = await rig.tables()
    async with begin(owner, mark) as b:
        same(b.new, True, "a new event")
        await b.block.execute("create table mine (n integer, text text)")
        await b.block.execute("insert into mine values (?, ?)", (1, "one"))
        same(await b.block.execute("select n, text from mine where text <> '?'"), [(1, "one")], "what it reads")
        await unchanged(rig, before, "before the end of a block")
        await b.finish(owner.settlement(outcome))
    tables = await rig.tables()
    same(tables["mine"], [{"n": 1, "text": "one"}], "the handler's rows")
    same(len(await rig.published(topic)), 1, "published events")
    same((await finished(owner, b.block, outcome), await owner.counts()), (1, {"done": 1}), "progress")
    same(len(await rig.published(topic)), 1, "published events")
    async with begin(owner, mark) as b:
        same(b.new, False, "an event handled before")
    known = (await rig.store.seen(owner.unit.service, [mark]))[mark.source, mark.id]
    same(known.content, mark.content, "inbox")
    expect(known.place in (None, (owner.unit.topic, owner.unit.partition, 0)), "the inbox remembers the right place")


@promise(STORE_SCENARIOS)
async def a_block_that_ends_badly_leaves_nothing(c: StoreCase) -> None:
    """An aborted block leaves nothing behind, also not if its settling fails; the next one has its turn."""
    rig = await c.open()
    owner, topic = await c.owner(rig), c.name("topic")
    bad = envelope(topic, headers={"large": "x" * (MAX_HEAD_BYTES + 1)})
    before = await rig.tables()
    async with begin(owner) as b:
        await b.block.execute("create table gone (n integer)")
        await b.block.abort()
        await b.block.abort()
        await refused(b.block.execute("select 1"), UnlostError, "a block that is over")
    await unchanged(rig, before, "an aborted block")
    async with begin(owner) as b:
        await b.block.execute("create table gone (n integer)")
        end = owner.settlement(owner.outcome(0, "done", publishes=[envelope(topic), bad]))
        await refused(b.block.finish(end), UnlostError, "an outcome that cannot be written")
        expect(await b.block.settled() is not None, "it is known not to be durable")
    await unchanged(rig, before, "a block whose outcome was refused")
    last = owner.outcome(0, "done")
    async with begin(owner) as b:
        await b.finish(owner.settlement(last))
    expect("gone" not in await rig.tables(), "the aborted block left nothing")
    same(await finished(owner, b.block, last), 1, "the position")


@promise(STORE_SCENARIOS)
async def a_block_of_an_older_owner(c: StoreCase) -> None:
    """A block of an older owner is fenced when it begins, and again when it ends."""
    rig = await c.open()
    old = await c.owner(rig)
    late = old.taken
    async with begin(old) as b:
        await b.block.execute("create table gone (n integer)")
        stale = Settlement(old.unit, late.epoch - 1, [old.outcome(0, "done")])
        await refused(b.block.finish(stale), Fenced, "finishing")
    before = await rig.tables()
    new = Owner(rig, old.unit, old.info)
    await new.take()
    expect("gone" not in await rig.tables(), "the fenced block left nothing")
    before = await rig.tables()
    await refused(begin(old).__aenter__(), Fenced, "beginning")
    await unchanged(rig, before, "a fenced block")


@promise(STORE_SCENARIOS)
async def a_block_that_takes_too_long(c: StoreCase) -> None:
    """A block that is open longer than its deadline is rolled back, and others go on."""
    rig = await c.open()
    owner, other = await c.owner(rig), await c.owner(rig)
    before = await rig.tables()
    async with begin(owner, None, 0.05) as b:
        await b.block.execute("create table gone (n integer)")
        waiting = asyncio.create_task(other.done(0))
        async with asyncio.timeout(10):
            await waiting
        await asyncio.sleep(0.1)
        await refused(b.block.execute("insert into gone values (1)"), UnlostError, "using it")
        await refused(b.block.finish(owner.settlement(owner.outcome(0, "done"))), UnlostError, "finishing it")
    expect("gone" not in await rig.tables(), "the expired block left nothing")
    same(
        await owner.rows("progress"),
        [r for r in before["progress"] if r["service"] == owner.unit.service],
        "its unit",
    )
    same((await other.take()).position, 1, "what another settled meanwhile")


@promise(STORE_SCENARIOS)
async def a_block_cannot_touch_the_books(c: StoreCase) -> None:
    """A handler's statements reach its own tables only: not ours, and not the commit itself."""
    rig = await c.open()
    owner = await c.owner(rig)
    await owner.done(0)
    before = await rig.tables()
    for sql in ("delete from unlost_progress", "update UNLOST_ledger set state = 'dead'", "commit", "rollback",
                "select * from unlost_topic", "drop table unlost_topic", "pragma user_version = 7", "savepoint a",
                "create trigger t after insert on unlost_log begin select 1; end"):  # fmt: skip
        async with begin(owner) as b:
            await refused(b.block.execute(sql), UnlostError, sql)
    await unchanged(rig, before, "statements that were refused")
    await owner.done(1)


# --- death, stops --------------------------------------------------------------------------------------------


@promise(STORE_SCENARIOS)
async def settled_survives_kill_9(c: StoreCase) -> None:
    """What a process was told is settled is settled after `kill -9` of it; the next owner learns that it did not
    leave cleanly."""
    rig = await c.open()
    owner = await c.owner(rig)
    await owner.give()
    child = await c.owner_process(owner.unit)
    for position in (0, 2, 3):
        child.tell(str(position))
    await child.until("settled", 3)
    await child.kill()
    taken = await owner.take()
    same((taken.position, list(taken.fated)), (1, [(0, 1), (2, 4)]), "progress")
    same([row["unclean"] for row in await owner.rows("epoch")], [0, 0, 1], "which epochs followed a crash")


@promise(STORE_SCENARIOS)
async def a_paused_owner_is_fenced(c: StoreCase) -> None:
    """An owner that is stopped while another one takes its unit cannot write when it wakes up."""
    rig = await c.open()
    owner = await c.owner(rig)
    child = await c.owner_process(owner.unit)
    child.tell("0")
    await child.until("settled")
    child.stop()
    child.tell("1")
    taken = await owner.take()
    same(taken.position, 1, "the position that the new owner gets")
    await owner.done(1)
    before = await rig.tables()
    child.go_on()
    heard = await child.until("settled", 2)
    same(heard[1], {"position": 1, "fenced": True}, "what the one that woke up was told")
    await unchanged(rig, before, "an owner that woke up")


@promise(STORE_SCENARIOS)
async def an_event_that_kills_is_found(c: StoreCase) -> None:
    """An event whose process dies again and again is under suspicion after two deaths; each death while it ran alone has
    spent one of its attempts, in the log as in the waiting room. Who moved on, or left cleanly, is not suspected."""
    rig = await c.open()
    owner = await c.owner(rig)
    for _ in range(2):
        child = await c.owner_process(owner.unit, in_hand=[0, 2])
        await child.kill()
        await rig.noticed()
        taken = await owner.take()
    expect({0, 2} <= taken.suspects, f"0 and 2 are suspects after two deaths; they are {sorted(taken.suspects)[:9]}")
    for number in (1, 2):
        child = await c.owner_process(owner.unit, in_hand=[0], alone=True)
        await child.kill()
        await rig.noticed()
        taken = await owner.take()
        expect(0 in taken.suspects, "0 is a suspect")
        same({p: len(a) for p, a in taken.attempts.items()}, {0: number}, "a lonely suspect")
    await owner.settle(owner.outcome(0, "dead"), owner.outcome(4, "retrying", key=b"4"))
    await owner.give()
    same((await owner.take()).suspects, set(), "suspects after a clean end")
    child = await c.owner_process(owner.unit, in_hand=[4], waited=[4], alone=True)
    await child.kill()
    await rig.noticed()
    same((await owner.take()).suspects, {4}, "a suspect of the waiting room")
    (row,) = await rig.store.waiting(owner.unit, b"4", None, 9)
    same(len(row.attempts), 2, "its attempts")
    await owner.done(1)
    child = await c.owner_process(owner.unit)
    await child.kill()
    await rig.noticed()
    same((await owner.take()).suspects, set(), "suspects when nothing was in hand")


@scenario(STORE_SCENARIOS, needs="sees_hands")
async def suspects_after_kill_9(c: StoreCase) -> None:
    """After `kill -9` the next owner knows which events were in a handler; one that was there alone has spent an
    attempt. What was settled, or left cleanly, is under no suspicion."""
    rig = await c.open()
    owner = await c.owner(rig)
    await owner.settle(owner.outcome(3, "done"), owner.outcome(4, "retrying", key=b"4"))
    child = await c.owner_process(owner.unit, in_hand=[0, 2, 3, 4])
    await child.kill()
    taken = await owner.take()
    same((taken.suspects, taken.attempts), ({0, 2, 4}, {}), "suspects and their attempts")
    same((await owner.take()).suspects, set(), "suspects after a takeover from a living process")
    for number in (1, 2):
        child = await c.owner_process(owner.unit, in_hand=[0], alone=True)
        await child.kill()
        taken = await owner.take()
        same((taken.suspects, {p: len(a) for p, a in taken.attempts.items()}), ({0}, {0: number}), "a lonely suspect")
    child = await c.owner_process(owner.unit, in_hand=[4], alone=True)
    await child.kill()
    same((await owner.take()).suspects, {4}, "a suspect of the waiting room")
    (row,) = await rig.store.waiting(owner.unit, b"4", None, 9)
    same(len(row.attempts), 2, "its attempts")
