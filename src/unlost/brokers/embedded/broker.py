"""The embedded broker: a partitioned log in one SQLite file, shared by the processes of one machine.

**Guarantee** a published event survives power loss of the machine: its receipt comes after the fsync of its commit.
**After a crash** of any process at any line the file holds whole commits only; the events that a dead process had
in its hands are delivered again by whoever takes its partitions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from typing import Any

import apsw
import msgspec

from unlost.brokers.embedded.group import EmbeddedMember
from unlost.brokers.embedded.indexer import Indexer
from unlost.brokers.embedded.log import SURVIVES, read_partition, read_topics
from unlost.brokers.embedded.publisher import Publisher
from unlost.brokers.embedded.trim import trim
from unlost.brokers.port import Abilities, Original, Receipt
from unlost.config import duration
from unlost.errors import UsageError
from unlost.events import MAX_EVENT_BYTES, Envelope, check_name
from unlost.events.topic import Arrival, Topic, TopicInfo, Unit
from unlost.sqlite.file import File
from unlost.sqlite.transaction import Transaction
from unlost.world import end

PARTITIONS_MAX = 1024


class EmbeddedBroker:
    abilities = Abilities(
        name="embedded",
        survives=SURVIVES,
        ordered=True,
        replayable=True,
        delayed=False,
        atomic_batches=True,
        commits_with_store=True,
    )

    def __init__(self, file: File, *, store_elsewhere: bool = False) -> None:
        """`store_elsewhere`: positions, inbox and shelf are not in this file; it is told how far they are (`ack`)."""
        self.file = file
        if store_elsewhere:
            self.abilities = msgspec.structs.replace(self.abilities, commits_with_store=False)
        self._publisher: Publisher | None = None
        self._indexing: asyncio.Task[None] | None = None  # runs from the first `keep_house` on

    async def open(self) -> None:
        return None

    async def close(self) -> None:
        indexing, self._indexing = self._indexing, None
        if indexing is not None:
            await end(indexing)  # only a cache: why it ended is no matter any more

    async def declare(self, topics: Sequence[Topic]) -> Sequence[TopicInfo]:
        wanted = [(t.name, t.partitions, None if t.retention is None else int(duration(t.retention))) for t in topics]
        for name, partitions, _ in wanted:
            check_name("topic", name)
            if not 1 <= partitions <= PARTITIONS_MAX:
                raise UsageError(
                    "UL1102",
                    f"the topic {name!r} needs between 1 and {PARTITIONS_MAX} partitions",
                    found=str(partitions),
                )
        known = {t.name: t for t in await self.topics()}
        if any(
            name not in known or known[name].partitions != partitions or known[name].retention != retention
            for name, partitions, retention in wanted
        ):
            await self.file.write(lambda tx: _declare(tx, wanted))
            known = {t.name: t for t in await self.topics()}
        return [known[name] for name, _, _ in wanted]

    async def publish(self, envelopes: Sequence[Envelope]) -> Sequence[Receipt]:
        for e in envelopes:
            if e.data is not None and len(e.data) > MAX_EVENT_BYTES:
                raise UsageError(
                    "UL1012", f"an event has at most {MAX_EVENT_BYTES} bytes", found=f"{len(e.data)} bytes in {e.id}",
                    fix="put the large part elsewhere, and a reference to it into the event",
                )  # fmt: skip
        publisher = self._publisher
        if publisher is None or publisher.loop is not asyncio.get_running_loop():
            # Several event loops on one broker are rare; each call then makes its own, which is as right, and slower.
            publisher = self._publisher = Publisher(self.file, asyncio.get_running_loop())
        return await publisher.publish(envelopes)

    async def join(self, service: str, topics: Sequence[str]) -> EmbeddedMember:
        member = EmbeddedMember(self.file, service, topics, store_elsewhere=not self.abilities.commits_with_store)
        await member.open()
        return member

    async def keep_house(self) -> None:
        await trim(self.file)
        if self._indexing is not None and self._indexing.done():
            indexing, self._indexing = self._indexing, None
            await indexing  # says why it has ended
        if self._indexing is None:
            self._indexing = asyncio.create_task(Indexer(self.file).keep(), name="unlost-index")

    @property
    def identity(self) -> str:
        return f"embedded {self.file.store_id}"

    async def mirror(
        self,
        topic: str,
        key: bytes | None,
        data: bytes | None,
        headers: Sequence[tuple[str, bytes | None]],
        origin: tuple[str, int],
    ) -> None:
        raise NotImplementedError("the shelf of the embedded broker is its own mirror")

    def original(self, unit: Unit, arrival: Arrival) -> Original:
        return Original(unit.topic, unit.service, ())

    def check(self, envelope: Envelope) -> None:
        """Whatever `seal` makes can be stored."""

    def reread(self, topic: str, partition: int, arrival: Arrival) -> Arrival:
        return arrival

    async def topics(self, names: Collection[str] | None = None) -> Sequence[TopicInfo]:
        found = self.file.read(read_topics)
        return found if names is None else [info for info in found if info.name in names]

    async def read(self, topic: str, partition: int, start: int, limit: int) -> Sequence[Arrival]:
        def work(connection: apsw.Connection) -> list[Arrival]:
            row = connection.execute(
                "select first_number, partitions from unlost_topic where name = ?", (topic,)
            ).fetchone()
            if row is None or not 0 <= partition < row[1]:
                return []
            return read_partition(
                self.file.path, connection, topic, partition, row[0] + partition, max(0, start), limit
            )

        return self.file.read(work)


def _declare(tx: Transaction, wanted: Sequence[tuple[str, int, Any]]) -> None:
    rows = {row[0]: row[1] for row in tx.execute("select name, partitions from unlost_topic")}
    for name, partitions, _ in wanted:
        if rows.get(name, partitions) != partitions:
            raise UsageError(
                "UL1103", f"the topic {name!r} has {rows[name]} partitions; that cannot be changed",
                found=f"declared are {partitions}",
                fix=f"declare {rows[name]}: with another number the keys would move to other partitions and lose their order",
            )  # fmt: skip
    for name, partitions, retention in wanted:
        if name in rows:
            tx.execute("update unlost_topic set retention = ? where name = ?", (retention, name))
        tx.topic_defaults[name] = (partitions, retention)
        if name not in rows:
            tx.create_topic(name, partitions, retention)
    tx.forget_topics()
