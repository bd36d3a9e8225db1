"""`check_broker`: what every broker promises, put to the test through the port alone.

Each scenario works on topics and services of its own, so a real server may be shared. `broker_at(url)` opens the same
data again as another process would; where a process must really die or stop, there is a child process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from unlost.brokers.port import Abilities, Arrivals, Assigned, Broker, Lost, Member, Receipt, Revoked
from unlost.errors import UnlostError, UsageError
from unlost.events import MAX_EVENT_BYTES, MAX_HEAD_BYTES, Envelope
from unlost.events.topic import Arrival, Topic, Unit
from unlost.testing.conformance import (
    Case,
    OpenBroker,
    Result,
    Scenario,
    broker_at,
    chosen,
    envelope,
    expect,
    refused,
    same,
    scenario,
    until,
)
from unlost.world import REAL

HUNG_SECONDS = 30.0  # after how long a member that is stopped, but not dead, is replaced by others
TRIES = 4  # of a promise about time: the best one counts, a busy machine is no defect
NEWS_SECONDS = 1.0  # how long an event may take from a receipt to a waiting member
RECEIVE_BYTES_MAX = 16 * 1024 * 1024  # what one call of `receive` may hand over, of one unit
QUIET_SECONDS = 0.3  # how long nothing must happen, where nothing may happen


class BrokerCase(Case):
    """One run of one scenario over a broker."""

    def __init__(self, url: str, opener: OpenBroker, hung_seconds: float) -> None:
        super().__init__(url)
        self.opener = opener
        self.hung_seconds = hung_seconds

    async def promises(self, ability: str) -> bool:
        return bool(getattr((await self.open()).abilities, ability))

    async def open(self) -> Broker:
        """The broker, opened once more on the same data."""
        return await self._stack.enter_async_context(self.opener(self.url))

    async def topic(self, broker: Broker, partitions: int = 4) -> str:
        name = self.name("topic")
        await broker.declare([Topic(name, partitions=partitions)])
        return name

    async def reader(
        self, broker: Broker, service: str, topics: Sequence[str], *, saved: dict[Unit, int] | None = None,
        owners: Owners | None = None,
    ) -> Reader:  # fmt: skip
        """A member that is at work."""
        reader = Reader(await broker.join(service, topics), saved, owners)
        self._stack.push_async_callback(reader.leave)
        return reader

    async def member(self, service: str, topic: str) -> Any:
        """A member in a child process."""
        return await self.child("member", self.opener, service=service, topics=[topic])


class Owners:
    """Who has which unit, as the members see it: never two at a time."""

    def __init__(self) -> None:
        self.of: dict[Unit, Reader] = {}

    def take(self, reader: Reader, units: Iterable[Unit]) -> None:
        for unit in units:
            expect(unit not in self.of, f"{unit} was given to a second member before the first had released it")
            self.of[unit] = reader

    def give(self, units: Iterable[Unit]) -> None:
        for unit in units:
            self.of.pop(unit, None)


class Reader:
    """Drives a member as a worker does: seeks what it is given, keeps what arrives, gives back when asked.

    `saved` stands for the store: the position after what was received, shared by the members of a service.
    """

    def __init__(self, member: Member, saved: dict[Unit, int] | None, owners: Owners | None = None) -> None:
        self.member = member
        self.owned: set[Unit] = set()
        self.lost: list[Unit] = []
        self.arrived: list[tuple[Unit, Arrival]] = []
        self.largest = 0  # bytes in one call of `receive`
        self._saved = {} if saved is None else saved
        self._owners = owners
        self._left = False
        self._task = asyncio.create_task(self._run())

    @property
    def ids(self) -> list[str]:
        return [a.envelope.id if a.envelope else "" for _, a in self.arrived]

    def of_key(self, key: bytes | None) -> list[str]:
        return [a.envelope.id for _, a in self.arrived if a.key == key and a.envelope is not None]

    def check(self) -> None:
        """Raises what went wrong while receiving."""
        if self._task.done() and not self._task.cancelled():
            self._task.result()

    async def until(self, condition: Callable[[], object], what: str, **limit: float) -> float:
        def met() -> object:
            self.check()
            return condition()

        return await until(met, what, **limit)

    async def until_ids(self, wanted: Iterable[str]) -> None:
        missing = set(wanted)
        await self.until(lambda: missing <= set(self.ids), f"{len(missing)} events arrive")

    async def owns(self, count: int) -> None:
        await self.until(lambda: len(self.owned) == count, f"a member has {count} units, it has {len(self.owned)}")

    async def leave(self) -> None:
        if self._left:
            return
        self._left = True
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if self._owners is not None:
            self._owners.give(self.owned)
        await self.member.close()

    async def _run(self) -> None:
        while True:
            changes = await self.member.receive()
            size = 0
            for change in changes:
                if isinstance(change, Arrivals):
                    size += self._keep(change)
                elif isinstance(change, Assigned):
                    if self._owners is not None:
                        self._owners.take(self, change.units)
                    self.owned.update(change.units)
                    for unit in change.units:
                        self.member.seek(unit, self._saved.get(unit, 0))
                elif isinstance(change, Revoked):
                    self.owned.difference_update(change.units)
                    if self._owners is not None:
                        self._owners.give(change.units)
                    await self.member.release(change.units)
                elif isinstance(change, Lost):
                    self.owned.difference_update(change.units)
                    self.lost.extend(change.units)
            self.largest = max(self.largest, size)

    def _keep(self, change: Arrivals) -> int:
        expect(change.unit in self.owned, f"an event of {change.unit} arrived at a member that does not have it")
        expected = self._saved.get(change.unit, 0)
        for arrival in change.events:
            same(arrival.position, expected, f"the next position of {change.unit}")
            expected += 1
            self.arrived.append((change.unit, arrival))
        self._saved[change.unit] = expected
        return sum(a.size for a in change.events)


BROKER_SCENARIOS: list[Scenario[BrokerCase]] = []
"""What `check_broker` tries, one promise of the broker's port each."""


async def check_broker(
    url: str, open: OpenBroker = broker_at, *, only: Sequence[str] = (), hung_seconds: float = HUNG_SECONDS
) -> list[Result]:
    """Holds a broker to the port's promises, as far as it declares them; returns one result per scenario.

    `open(url)` opens the broker as an async context manager, each time as another process would. It must be a
    function that child processes can import. `url` must lead to data that nothing else uses, or to a server.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> [r.verdict for r in asyncio.run(check_broker(f"embedded://{folder}/events.db", only=["empty_batch"]))]
        ['kept']
    """
    suite = chosen(BROKER_SCENARIOS, only)
    return [await s.check(BrokerCase(url, open, hung_seconds)) for s in suite]


async def abilities_of(url: str, open: OpenBroker = broker_at) -> Abilities:
    async with open(url) as broker:
        return broker.abilities


promise = scenario


def ids_of(events: Iterable[Envelope]) -> list[str]:
    return [e.id for e in events]


def contents(e: Envelope | None) -> dict[str, Any] | None:
    """All that an event says. When the broker took it is the arrival's to say."""
    if e is None:
        return None
    said = msgspec.structs.asdict(e) | {"recordedtime": None}
    # In headers, numbers and truth values travel as text (CloudEvents 1.0, "Type System").
    said["extensions"] = {name: str(v).lower() if isinstance(v, bool) else str(v) for name, v in e.extensions.items()}
    return said


def full_envelope(topic: str) -> Envelope:
    """An event in which no field has its default, so that a field that gets lost is seen."""
    return envelope(
        topic, key=b"\x00key\xff", data='{"total": 12, "name": "Zoë 🙂"}'.encode(), source="shop/ø",
        time="2026-01-02T03:04:05.000006+05:30", subject="order 1 ü", datacontenttype="application/vnd.shop+json",
        dataschema="https://example.com/schema#2", recordedtime="2026-01-02T03:04:05.000007Z", partitionkey="part ß",
        correlationid="correlation-1", causationid="cause-1",
        traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", tracestate="vendor=1,other=two",
        eventversion=7, publisher="publisher-1", number=123_456_789_012,
        extensions={"region": "eu-1", "retries": -3, "flag": True, "text": 'quote " and \\'},
        headers={"campaign": "spring / Ω", "X-Upper": "kept as it is", "empty": ""},
    )  # fmt: skip


# --- what goes in comes out ----------------------------------------------------------------------------------


@promise(BROKER_SCENARIOS)
async def every_field_round_trips(c: BrokerCase) -> None:
    """Every attribute, header and extension, the key's bytes and the data arrive as they were published."""
    broker = await c.open()
    topic = await c.topic(broker)
    sent = full_envelope(topic)
    for field in msgspec.structs.fields(Envelope):
        if not field.required and field.name not in ("due", "by_clock"):  # these do not travel
            expect(getattr(sent, field.name) not in (field.default, {}), f"the scenario gives {field.name} a value")
    bare = envelope(topic, key=None, data=None, datacontenttype=None)
    receipts = await broker.publish([sent, bare])
    reader = await c.reader(broker, c.name("service"), [topic])
    await reader.until_ids([sent.id, bare.id])
    arrived = {a.envelope.id: a for _, a in reader.arrived if a.envelope is not None}
    for wanted, receipt in zip((sent, bare), receipts, strict=True):
        got = arrived[wanted.id]
        same(contents(got.envelope), contents(wanted), "an event as it arrived")
        same((got.key, got.data, got.problem), (wanted.key, wanted.data, ""), "its bytes")
        same(got.recorded, receipt.recorded, "when it was recorded, in the arrival and in the receipt")


@promise(BROKER_SCENARIOS)
async def data_of_any_size(c: BrokerCase) -> None:
    """Data may be absent, empty, a single byte, 1 MiB, or as large as an event may be; each arrives unchanged."""
    broker = await c.open()
    topic = await c.topic(broker, 1)
    noise = REAL.random.randbytes(1024 * 1024)
    wanted = [None, b"", b"\x00", noise, noise[:-1], (noise * 4)[:MAX_EVENT_BYTES]]
    events = [envelope(topic, data=data) for data in wanted]
    await broker.publish(events[:3])
    for event in events[3:]:
        await broker.publish([event])
    reader = await c.reader(broker, c.name("service"), [topic])
    await reader.until_ids(ids_of(events))
    got = [a.data for _, a in reader.arrived]
    expect(got == wanted, f"sizes {[None if d is None else len(d) for d in got]}, or their bytes, are others")


@promise(BROKER_SCENARIOS)
async def keys_of_any_bytes(c: BrokerCase) -> None:
    """A key is any bytes, also zero bytes and what is no text; no key is not an empty key."""
    broker = await c.open()
    topic = await c.topic(broker)
    keys = [None, b"\x00", b"\x00\x00", b"a\x00b", b"a\x00c", b"\xff\xfe\x80", "käse".encode(), b"'; --", b"%s\n\t", b"k" * 1000,
            bytes(range(256))]  # fmt: skip
    events = [envelope(topic, key=key) for key in keys]
    receipts = await broker.publish(events)
    reader = await c.reader(broker, c.name("service"), [topic])
    await reader.until_ids(ids_of(events))
    arrived = {a.envelope.id: (unit.partition, a.key) for unit, a in reader.arrived if a.envelope is not None}
    for event, receipt in zip(events, receipts, strict=True):
        same(arrived[event.id], (receipt.partition, event.key), "partition and key of an event")


@promise(BROKER_SCENARIOS)
async def empty_batch(c: BrokerCase) -> None:
    """Publishing nothing is allowed, and says nothing."""
    broker = await c.open()
    same(list(await broker.publish([])), [], "receipts of nothing")


@promise(BROKER_SCENARIOS)
async def large_batch(c: BrokerCase) -> None:
    """A batch of thousands gets one receipt per event, in the order given, and arrives whole."""
    broker = await c.open()
    topics = [await c.topic(broker, 3), await c.topic(broker, 1)]
    events = [envelope(topics[i % 2], key=b"%d" % (i % 37)) for i in range(5000)]
    receipts = await broker.publish(events)
    same([(r.id, r.topic) for r in receipts], [(e.id, e.topic) for e in events], "receipts")
    reader = await c.reader(broker, c.name("service"), topics)
    await reader.until_ids(ids_of(events))
    same(len(reader.arrived), len(events), "the number of events")


@promise(BROKER_SCENARIOS)
async def topic_that_nobody_declared(c: BrokerCase) -> None:
    """Publishing to a topic that nobody has declared makes it: what has a receipt can be received."""
    broker = await c.open()
    topic = c.name("topic")
    event = envelope(topic)
    await broker.publish([event])
    expect(topic in [t.name for t in await broker.topics()], "the topic exists after its first event")
    reader = await c.reader(broker, c.name("service"), [topic])
    await reader.until_ids([event.id])


@promise(BROKER_SCENARIOS)
async def many_topics(c: BrokerCase) -> None:
    """A hundred topics are declared at once, and one member receives from all of them."""
    broker = await c.open()
    wanted = [Topic(c.name("topic"), partitions=1 + i % 3) for i in range(100)]
    infos = await broker.declare(wanted)
    same([(i.name, i.partitions) for i in infos], [(t.name, t.partitions) for t in wanted], "topics as declared")
    expect(len({i.id for i in infos}) == len(infos), "each topic has its own id")
    events = [envelope(t.name) for t in wanted]
    await broker.publish(events)
    reader = await c.reader(broker, c.name("service"), [t.name for t in wanted])
    await reader.until_ids(ids_of(events))


@promise(BROKER_SCENARIOS)
async def declaring_again(c: BrokerCase) -> None:
    """Declaring the same topic again, also from two processes at once, changes nothing and finds the same topic."""
    one, two = await c.open(), await c.open()
    topic = Topic(c.name("topic"), partitions=5)
    first, second = await asyncio.gather(one.declare([topic]), two.declare([topic]))
    again = await two.declare([topic])
    expect(first[0].id == second[0].id == again[0].id, "one topic has one id")
    expect(again[0].id, "a topic has an id")


@promise(BROKER_SCENARIOS)
async def another_number_of_partitions(c: BrokerCase) -> None:
    """A topic that exists with another number of partitions is refused, and nothing of that call is done."""
    one, two = await c.open(), await c.open()
    old, new = Topic(c.name("topic"), partitions=3), Topic(c.name("topic"), partitions=2)
    (before,) = await one.declare([old])
    for broker in (one, two):
        await refused(broker.declare([new, Topic(old.name, partitions=4)]), UsageError, "another number of partitions")
    topics = {t.name: t for t in await two.topics()}
    same((topics[old.name].id, topics[old.name].partitions), (before.id, 3), "the topic that existed")
    expect(new.name not in topics, "nothing else of a refused declaration is done")
    for partitions in (0, -1, 1_000_000):
        await refused(
            one.declare([Topic(c.name("topic"), partitions=partitions)]), UsageError, f"{partitions} partitions"
        )
    await refused(one.declare([Topic("no good\nname")]), UsageError, "a name that is none")


# --- what a receipt proves -----------------------------------------------------------------------------------


@promise(BROKER_SCENARIOS, needs="replayable")
async def a_receipt_is_true(c: BrokerCase) -> None:
    """At the place that a receipt names stands that event, for every process, as soon as there is the receipt."""
    one, two = await c.open(), await c.open()
    topic = await c.topic(one)
    before = REAL.now()
    for round in range(20):
        events = [envelope(topic, key=b"%d" % i) for i in range(round + 1)]
        for receipt in await one.publish(events):
            (found,) = await two.read(topic, receipt.partition, receipt.position, 1)
            same(
                found.envelope and found.envelope.id, receipt.id, f"the event at {receipt.partition}:{receipt.position}"
            )
            same((found.position, found.recorded), (receipt.position, receipt.recorded), "its place and time")
            expect(abs(receipt.recorded - before) < 3600e6, "the time in a receipt is microseconds since 1970")


@promise(BROKER_SCENARIOS)
async def accepted_events_survive_kill_9(c: BrokerCase) -> None:
    """What a publisher got receipts for is there after `kill -9` of the publisher."""
    broker = await c.open()
    topic = await c.topic(broker)
    child = await c.child("publisher", c.opener, topic=topic, name="p", batches=0, size=7, keys=5)
    await child.until("receipts", 20)
    await child.kill()
    receipts = [r for batch in child.heard("receipts") for r in batch]
    reader = await c.reader(broker, c.name("service"), [topic])
    await reader.until_ids(id for id, _, _ in receipts)
    places = {a.envelope.id: [u.partition, a.position] for u, a in reader.arrived if a.envelope is not None}
    same([places[id] for id, _, _ in receipts], [place for _, *place in receipts], "where the events stand")


@promise(BROKER_SCENARIOS, needs="atomic_batches")
async def a_batch_is_whole_after_kill_9(c: BrokerCase) -> None:
    """`kill -9` in the middle of publishing leaves whole batches only: all events of one, or none."""
    broker = await c.open()
    topic = await c.topic(broker)
    size = 200
    for number in range(3):
        child = await c.child("publisher", c.opener, topic=topic, name=f"p{number}", batches=0, size=size, keys=11)
        await child.until("receipts", 2 + number)
        await asyncio.sleep(REAL.random.random() * 0.02)
        await child.kill()
    reader = await c.reader(broker, c.name("service"), [topic])
    ends = {Unit("", topic, p): end for p, (_, end) in enumerate((await _topic(broker, topic)).ranges)}
    await reader.until(lambda: len(reader.arrived) >= sum(ends.values()), "everything in the log arrives")
    batches: dict[str, int] = {}
    for id in reader.ids:
        batch = id.rpartition(":")[0]
        batches[batch] = batches.get(batch, 0) + 1
    expect(set(batches.values()) == {size}, f"batches of {size} were found with {sorted(set(batches.values()))} events")


@promise(BROKER_SCENARIOS)
async def a_bad_event_refuses_its_batch(c: BrokerCase) -> None:
    """A batch with an event that cannot be encoded is refused whole, and its neighbours are not harmed."""
    broker = await c.open()
    topic = await c.topic(broker)
    bad = envelope(topic, headers={"large": "x" * (MAX_HEAD_BYTES + 1)})
    good: list[Envelope] = []
    topics: set[str] = set()
    for before in range(1, 6):
        for size in range(1, 6):
            # To a new topic as well: whatever a broker does for a topic's first event must be undone. Side by side
            # with others, so that they share a commit where there are shared commits.
            fresh = [c.name("topic"), c.name("topic")]
            topics.update(fresh)
            unlucky = [envelope(fresh[0]), *(envelope(fresh[1], key=b"%d" % i) for i in range(size)), bad]
            at = REAL.random.randrange(size)
            unlucky_too = [envelope(topic) for _ in range(size)]
            neighbours = [[envelope(topic, key=b"%d" % i)] for i in range(3)]
            neighbours.append([envelope(topic) for _ in range(before)])
            good += [event for batch in neighbours for event in batch]
            await asyncio.gather(
                *(broker.publish(batch) for batch in neighbours),
                refused(broker.publish(unlucky), UsageError, "an event with too large headers"),
                refused(broker.publish([*unlucky_too[:at], bad, *unlucky_too[at:]]), UsageError, "the same"),
            )
    reader = await c.reader(broker, c.name("service"), [topic])
    await reader.until_ids(ids_of(good))
    await asyncio.sleep(QUIET_SECONDS)
    same(sorted(reader.ids), sorted(ids_of(good)), "the events in the log")
    for info in await broker.topics():
        if info.name in topics:
            same([end - start for start, end in info.ranges], [0] * info.partitions, "events of refused batches")


@promise(BROKER_SCENARIOS)
async def a_cancelled_publish_harms_nobody(c: BrokerCase) -> None:
    """A publish that is cancelled may have happened or not; others go on, and nothing is there twice or torn."""
    broker = await c.open()
    topic = await c.topic(broker)
    calls: dict[str, asyncio.Task[Sequence[Receipt]]] = {}
    for i in range(300):
        event = envelope(topic, key=b"%d" % (i % 7))
        calls[event.id] = asyncio.create_task(broker.publish([event]))
        if i % 10 == 9:
            await asyncio.sleep(0)
            for call in list(calls.values())[-10::2]:
                call.cancel()
    outcomes = await asyncio.gather(*calls.values(), return_exceptions=True)
    accepted = {id for id, outcome in zip(calls, outcomes, strict=True) if not isinstance(outcome, BaseException)}
    expect(
        all(isinstance(o, asyncio.CancelledError) for o in outcomes if isinstance(o, BaseException)),
        "nothing else failed",
    )
    last = envelope(topic)
    await broker.publish([last])
    reader = await c.reader(broker, c.name("service"), [topic])
    await reader.until_ids({*accepted, last.id})
    expect(set(reader.ids) <= {*calls, last.id}, "nothing is there that nobody published")
    same(len(set(reader.ids)), len(reader.ids), "events that are there once")


@promise(BROKER_SCENARIOS)
async def closing_while_busy(c: BrokerCase) -> None:
    """A broker that is closed in the middle of many publishes gives each of them a receipt that is true, or an
    error of ours; none hangs, and what was accepted is there."""
    name, accepted, refusals = c.name("topic"), list[str](), 0
    async with c.opener(c.url) as broker:
        await broker.declare([Topic(name)])

        async def publish(i: int) -> None:
            nonlocal refusals
            event = envelope(name, key=b"%d" % i)
            await asyncio.sleep(i % 17 / 1000)
            try:
                await broker.publish([event])
            except UnlostError:
                refusals += 1
            else:
                accepted.append(event.id)

        calls = [asyncio.create_task(publish(i)) for i in range(300)]
        await until(lambda: accepted, "the first event is accepted")
    done, hanging = await asyncio.wait(calls, timeout=10)
    for call in hanging:
        call.cancel()
    expect(not hanging, f"{len(hanging)} calls never ended")
    for call in done:
        call.result()
    same(len(accepted) + refusals, 300, "calls with an outcome")
    again = await c.open()
    reader = await c.reader(again, c.name("service"), [name])
    await reader.until_ids(accepted)


# --- order ---------------------------------------------------------------------------------------------------


@promise(BROKER_SCENARIOS, needs="ordered")
async def one_order_per_key(c: BrokerCase) -> None:
    """Events of one key arrive in the order of publishing: within a batch, and from call to call, whichever
    process makes it."""
    brokers = [await c.open(), await c.open()]
    topic = await c.topic(brokers[0])
    published: dict[bytes, list[str]] = {}

    async def publish(keys: Sequence[bytes]) -> None:
        for round in range(25):
            batch = [envelope(topic, key=keys[i % len(keys)]) for i in range(1 + round % 9)]
            for event in batch:
                assert event.key is not None
                published.setdefault(event.key, []).append(event.id)
            await brokers[round % 2].publish(batch)

    reader = await c.reader(await c.open(), c.name("service"), [topic])
    await asyncio.gather(*(publish([b"%d/%d" % (p, k) for k in range(3)]) for p in range(8)))
    await reader.until_ids(id for ids in published.values() for id in ids)
    for key, wanted in published.items():
        same(reader.of_key(key), wanted, f"the order of {key!r}")


@promise(BROKER_SCENARIOS, needs="ordered")
async def a_key_stays_in_its_partition(c: BrokerCase) -> None:
    """All processes put a key into the same partition, and events without a key are spread."""
    one, two = await c.open(), await c.open()
    topic = await c.topic(one, 5)
    places: dict[bytes | None, set[int]] = {}
    for broker in (one, two):
        events = [envelope(topic, key=key) for key in [*(b"%d" % i for i in range(50)), *[None] * 50]]
        REAL.random.shuffle(events)
        for event, receipt in zip(events, await broker.publish(events), strict=True):
            places.setdefault(event.key, set()).add(receipt.partition)
    spread = places.pop(None)
    expect(len(spread) > 1, "events without a key are spread over the partitions")
    expect(all(len(found) == 1 for found in places.values()), "each key has one partition")
    same(set.union(*places.values()), set(range(5)), "the partitions in use")


@promise(BROKER_SCENARIOS, needs="replayable")
async def positions_have_no_gaps(c: BrokerCase) -> None:
    """While several processes publish at once, each partition's positions are given once each, without a gap."""
    broker = await c.open()
    topic = await c.topic(broker, 3)
    children = [
        await c.child("publisher", c.opener, topic=topic, name=f"p{i}", batches=25, size=1 + i * 4, keys=6)
        for i in range(3)
    ]
    reader = await c.reader(broker, c.name("service"), [topic])
    for child in children:
        same(await child.wait(), 0, "a publisher's exit code")
    receipts = [r for child in children for batch in child.heard("receipts") for r in batch]
    same(len(receipts), 25 * (1 + 5 + 9), "the number of receipts")
    await reader.until_ids(id for id, _, _ in receipts)
    info = await _topic(broker, topic)
    for partition, (start, end) in enumerate(info.ranges):
        given = sorted(position for _, p, position in receipts if p == partition)
        same(given, list(range(start, end)), f"the positions of partition {partition}")
    placed = {(u.partition, a.position): a.envelope.id for u, a in reader.arrived if a.envelope is not None}
    same({(p, at): id for id, p, at in receipts}, placed, "what stands where")


# --- reading -------------------------------------------------------------------------------------------------


@promise(BROKER_SCENARIOS, needs="replayable")
async def a_new_service_sees_history(c: BrokerCase) -> None:
    """A service that joins later receives everything from the beginning of the log."""
    broker = await c.open()
    topic = await c.topic(broker)
    events = [envelope(topic, key=b"%d" % i) for i in range(700)]
    await broker.publish(events)
    await (await c.reader(broker, c.name("service"), [topic])).until_ids(ids_of(events))
    await (await c.reader(broker, c.name("service"), [topic])).until_ids(ids_of(events))


@promise(BROKER_SCENARIOS, needs="replayable")
async def seeking(c: BrokerCase) -> None:
    """After `seek`, the next event of that unit is the one at that position: back, forward, and at the end, where
    it waits for the event that will stand there."""
    broker = await c.open()
    topic = await c.topic(broker, 2)
    events = [envelope(topic, key=None) for _ in range(1000)]
    await broker.publish(events)
    ends = [end for _, end in (await _topic(broker, topic)).ranges]
    member = await broker.join(c.name("service"), [topic])
    c._stack.push_async_callback(member.close)
    units: list[Unit] = []
    early = 0
    while len(units) < 2:
        for change in await member.receive():
            units += change.units if isinstance(change, Assigned) else []
            early += isinstance(change, Arrivals)
    same(early, 0, "arrivals before the first seek")

    async def next_of(unit: Unit) -> int:
        while True:
            for change in await member.receive():
                if isinstance(change, Arrivals) and change.unit == unit:
                    return change.events[0].position

    unit = sorted(units)[0]
    for position in (0, ends[0] - 1, 7, 7, ends[0] // 2, 0, 299):
        member.seek(unit, position)
        same(await next_of(unit), position, "the first event after a seek")
    member.seek(unit, ends[0])
    waiting = asyncio.create_task(next_of(unit))
    await asyncio.sleep(QUIET_SECONDS)
    expect(not waiting.done(), "at the end there is nothing yet")
    await broker.publish([envelope(topic, key=None) for _ in range(4)])
    async with asyncio.timeout(10):
        same(await waiting, ends[0], "the first event after a seek to the end")


@promise(BROKER_SCENARIOS)
async def pausing(c: BrokerCase) -> None:
    """A paused unit stays its member's and is silent, while others go on; after `resume` nothing of it is missing."""
    broker = await c.open()
    topic = await c.topic(broker, 2)
    reader = await c.reader(broker, c.name("service"), [topic])
    await reader.owns(2)
    paused, other = sorted(reader.owned)
    reader.member.pause(paused)
    events: list[Envelope] = []
    for _ in range(5):
        batch = [envelope(topic, key=None) for _ in range(20)]
        await broker.publish(batch)
        events += batch
    await reader.until(lambda: sum(u == other for u, _ in reader.arrived) == 50, "the other unit goes on")
    await asyncio.sleep(QUIET_SECONDS)
    same([a.position for u, a in reader.arrived if u == paused], [], "arrivals of a paused unit")
    same(reader.owned, {paused, other}, "the member's units")
    reader.member.resume(paused)
    await reader.until_ids(ids_of(events))


@promise(BROKER_SCENARIOS)
async def back_pressure(c: BrokerCase) -> None:
    """A member that is slow keeps what is its own: one call hands over a bounded amount of a unit, the rest waits, in order."""
    broker = await c.open()
    topic = await c.topic(broker, 1)
    service = c.name("service")
    events = [envelope(topic, data=b"x" * 1024 * 1024) for _ in range(40)]
    for event in events:
        await broker.publish([event])
    reader = await c.reader(broker, service, [topic])
    await reader.owns(1)
    (unit,) = reader.owned
    for _ in range(20):
        reader.member.pause(unit)
        await asyncio.sleep(0.01)
        reader.member.resume(unit)
    await reader.until_ids(ids_of(events))
    same(reader.ids, ids_of(events), "the order")
    expect(reader.largest <= RECEIVE_BYTES_MAX, f"one call of `receive` handed over {reader.largest} bytes")


@promise(BROKER_SCENARIOS)
async def news_travel_at_once(c: BrokerCase) -> None:
    """A member that waits hears of an event that another process publishes, without being asked to poll."""
    broker, other = await c.open(), await c.open()
    topic = await c.topic(broker)
    reader = await c.reader(broker, c.name("service"), [topic])
    await reader.owns(4)
    took = []
    for _ in range(TRIES):
        event = envelope(topic)
        await other.publish([event])
        took.append(await reader.until(lambda id=event.id: id in reader.ids, "an event arrives"))  # type: ignore[misc]
    expect(min(took) < NEWS_SECONDS, f"an event took {min(took):.2f} s at best")


@promise(BROKER_SCENARIOS, needs="replayable")
async def reading_ranges(c: BrokerCase) -> None:
    """`read` returns the events from a position on, at most so many, and nothing beyond the end."""
    broker = await c.open()
    topic = await c.topic(broker, 2)
    events = [envelope(topic, key=b"one key") for _ in range(600)]
    receipts = await broker.publish(events)
    partition = receipts[0].partition
    ranges = (await _topic(broker, topic)).ranges
    same((ranges[partition], ranges[1 - partition]), ((0, 600), (0, 0)), "the ranges of the topic")
    for start, limit in ((0, 1), (0, 600), (0, 10_000), (599, 5), (600, 5), (10_000, 5), (250, 100)):
        found: list[Arrival] = []
        while len(found) < limit and (
            part := await broker.read(topic, partition, start + len(found), limit - len(found))
        ):
            found += part
        wanted = [(i, events[i].id) for i in range(start, min(start + limit, 600))]
        same([(a.position, a.envelope and a.envelope.id) for a in found], wanted, f"{limit} events from {start} on")
    same(list(await broker.read(topic, 1 - partition, 0, 10)), [], "an empty partition")


# --- members -------------------------------------------------------------------------------------------------


@promise(BROKER_SCENARIOS)
async def services_beside_each_other(c: BrokerCase) -> None:
    """Each service receives every event, whatever the others do."""
    one, two = await c.open(), await c.open()
    topic = await c.topic(one)
    readers = [await c.reader(broker, c.name("service"), [topic]) for broker in (one, one, two)]
    events = [envelope(topic, key=b"%d" % i) for i in range(100)]
    await one.publish(events[:50])
    await readers[0].until_ids(ids_of(events[:50]))
    await readers[0].leave()
    await two.publish(events[50:])
    for reader in readers[1:]:
        await reader.until_ids(ids_of(events))
        same(len(reader.ids), 100, "the number of events of one service")


@promise(BROKER_SCENARIOS)
async def members_share(c: BrokerCase) -> None:
    """Members share a service's units evenly as they join and leave; each unit has one member at a time."""
    owners, saved = Owners(), dict[Unit, int]()
    brokers = [await c.open() for _ in range(3)]
    topic, service = await c.topic(brokers[0], 8), c.name("service")
    readers: list[Reader] = []
    for broker, shares in zip(brokers, ([8], [4, 4], [3, 3, 2]), strict=True):
        readers.append(await c.reader(broker, service, [topic], saved=saved, owners=owners))
        await _shared(readers, shares)
    await readers[1].leave()
    await _shared([readers[0], readers[2]], [4, 4])
    await readers[0].leave()
    await _shared([readers[2]], [8])
    same(len(owners.of), 8, "units with an owner")


@promise(BROKER_SCENARIOS)
async def nothing_is_lost_while_members_change(c: BrokerCase) -> None:
    """While members come and go under load, every event is received, and the order of each key is kept."""
    owners, saved = Owners(), dict[Unit, int]()
    brokers = [await c.open() for _ in range(3)]
    topic, service = await c.topic(brokers[0], 6), c.name("service")
    published: list[Envelope] = []
    stop = asyncio.Event()

    async def publish() -> None:
        while not stop.is_set():
            batch = [envelope(topic, key=b"%d" % (i % 12)) for i in range(10)]
            await brokers[0].publish(batch)
            published.extend(batch)
            await asyncio.sleep(0.005)

    publishing = asyncio.create_task(publish())
    readers = [await c.reader(brokers[0], service, [topic], saved=saved, owners=owners)]
    for round in range(3):
        readers += [await c.reader(b, service, [topic], saved=saved, owners=owners) for b in brokers[1:]]
        await _shared([readers[0], *readers[-2:]], [2, 2, 2])
        await readers[-1 - round % 2].leave()
        await asyncio.sleep(REAL.random.random() * 0.2)
        await readers[-2 + round % 2].leave()
    stop.set()
    await publishing
    wanted = set(ids_of(published))

    def received() -> set[str]:
        for reader in readers:
            reader.check()
        return {id for reader in readers for id in reader.ids}

    await until(lambda: wanted <= received(), "every event is received")
    for reader in readers:
        order = {e.id: i for i, e in enumerate(published)}
        for key in {e.key for e in published}:
            places = [order[id] for id in reader.of_key(key)]
            same(places, sorted(places), f"the order of {key!r} at one member")


@promise(BROKER_SCENARIOS)
async def closing_a_member_while_it_waits(c: BrokerCase) -> None:
    """A member that is closed while it waits in `receive` leaves for good: others get its units and keep them."""
    one, two = await c.open(), await c.open()
    topic, service = await c.topic(one, 4), c.name("service")
    member = await one.join(service, [topic])
    got: list[Unit] = []
    while not got:
        got += [u for change in await member.receive() if isinstance(change, Assigned) for u in change.units]
    waiting = asyncio.create_task(_wait_on(member))
    await asyncio.sleep(0.05)
    await member.close()
    other = await c.reader(two, service, [topic])
    try:
        await other.owns(4)
        await asyncio.sleep(3 * QUIET_SECONDS)
        other.check()
        same(len(other.owned), 4, "units of the member that is left")
    finally:
        waiting.cancel()
        (outcome,) = await asyncio.gather(waiting, return_exceptions=True)
    expect(isinstance(outcome, UnlostError | asyncio.CancelledError), f"the waiting call ended with {outcome!r}")


# --- death, stops ---------------------------------------------------------------------------------------------


@promise(BROKER_SCENARIOS)
async def redelivery_after_kill_9(c: BrokerCase) -> None:
    """What a killed member had received and nobody saved is received again by whoever takes its units."""
    broker = await c.open()
    topic, service = await c.topic(broker, 4), c.name("service")
    events = [envelope(topic, key=b"%d" % i) for i in range(200)]
    await broker.publish(events)
    child = await c.member(service, topic)
    await until(lambda: _arrived_at(child) >= set(ids_of(events)), "the first member receives everything")
    reader = await c.reader(broker, service, [topic])
    await reader.owns(2)
    await child.kill()
    await reader.owns(4)
    await reader.until_ids(ids_of(events))


@promise(BROKER_SCENARIOS)
async def takeover_after_kill_9(c: BrokerCase) -> None:
    """The units of a killed process are another member's within the time that the broker declares."""
    await _takeover(c, (await c.open()).abilities.death_seconds, kill=True)


@promise(BROKER_SCENARIOS)
async def takeover_after_a_clean_stop(c: BrokerCase) -> None:
    """The units of a process that stopped cleanly are another member's within the time that the broker declares."""
    await _takeover(c, (await c.open()).abilities.leave_seconds, kill=False)


@promise(BROKER_SCENARIOS)
async def a_stopped_owner_is_replaced_and_told(c: BrokerCase) -> None:
    """A member that is stopped, not dead, is replaced; when it wakes up it is told that its units are lost, and it
    may take part again."""
    broker = await c.open()
    topic, service = await c.topic(broker, 4), c.name("service")
    child = await c.member(service, topic)
    await until(lambda: len(_units(child, "assigned")) == 4, "the child has all units")
    reader = await c.reader(broker, service, [topic])
    await reader.owns(2)
    first = len(_units(child, "assigned")) - len(_units(child, "revoked"))
    same(first, 2, "units of the child")
    child.stop()
    await reader.until(lambda: len(reader.owned) == 4, "the stopped member is replaced", seconds=3 * c.hung_seconds)
    events = [envelope(topic, key=b"%d" % i) for i in range(40)]
    await broker.publish(events)
    await reader.until_ids(ids_of(events))
    child.go_on()
    await until(lambda: len(_units(child, "lost")) == 2, "the member that woke up is told what it lost")
    await reader.owns(2)
    await until(lambda: len(_units(child, "assigned")) == 6, "the member that woke up takes part again")
    owned: set[Unit] = set()
    for line in child.said:
        for unit in (Unit(*unit) for unit in line.get("assigned", [])):
            owned.add(unit)
        owned.difference_update(Unit(*unit) for word in ("revoked", "lost") for unit in line.get(word, []))
        if "arrived" in line:
            expect(Unit(*line["arrived"][0]) in owned, "a unit's events arrive between Assigned and Revoked or Lost")


# --- parts of scenarios --------------------------------------------------------------------------------------


async def _topic(broker: Broker, name: str) -> Any:
    return next(t for t in await broker.topics() if t.name == name)


async def _shared(readers: Sequence[Reader], shares: Sequence[int]) -> None:
    def even() -> bool:
        for reader in readers:
            reader.check()
        return sorted(len(r.owned) for r in readers) == sorted(shares)

    await until(even, f"{len(readers)} members share the units as {shares}")


async def _wait_on(member: Member) -> None:
    while True:
        await member.receive()


def _arrived_at(child: Any) -> set[str]:
    return {id for _, events in child.heard("arrived") for _, id in events}


def _units(child: Any, word: str) -> list[Unit]:
    return [Unit(*unit) for units in child.heard(word) for unit in units]


async def _takeover(c: BrokerCase, within: float, *, kill: bool) -> None:
    broker = await c.open()
    topic, service = await c.topic(broker, 4), c.name("service")
    reader = await c.reader(broker, service, [topic])
    await reader.owns(4)
    took = []
    for _ in range(TRIES):
        child = await c.member(service, topic)
        await reader.owns(2)
        await until(lambda child=child: len(_units(child, "assigned")) == 2, "the child has its share")  # type: ignore[misc]
        began = REAL.monotonic()
        if kill:
            await child.kill()
        else:
            child.tell("leave")
        await reader.owns(4)
        took.append(REAL.monotonic() - began)
        if took[-1] < within:
            return
        if not kill:
            same(await child.wait(), 0, "the exit code of a member that left")
    expect(False, f"within {within:g} s: the takeovers took {', '.join(f'{t:.2f} s' for t in took)}")
