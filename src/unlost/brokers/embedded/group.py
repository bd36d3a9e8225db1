"""How the processes of one machine share a service's partitions, with the file as their only meeting place.

The rule is local and needs no leader: every member may own its fair share. Whoever has too much offers the surplus;
whoever has too little takes what is free. Each step is one commit, so two members never take the same partition.
A dead member's partitions are free at once: the kernel has let go of its process file's lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections.abc import Sequence

import apsw

from unlost.brokers.embedded.log import read_partition
from unlost.brokers.port import Ack, Arrivals, Assigned, Change, Lost, Revoked, Saved
from unlost.errors import UsageError
from unlost.events.topic import Unit
from unlost.sqlite.file import File
from unlost.sqlite.process import examine
from unlost.sqlite.transaction import Transaction

POLL_SECONDS = 0.2  # how often peers are looked at, and the log without a doorbell
READ_MAX = 256  # events of one partition in one read


class EmbeddedMember:
    """This process' part in a service. Used from one event loop."""

    def __init__(self, file: File, service: str, topics: Sequence[str], *, store_elsewhere: bool = False) -> None:
        self._file = file
        self._service = service
        self._topics = list(topics)
        self._store_elsewhere = store_elsewhere
        self._wake = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._numbers: dict[Unit, int] = {}  # every unit of the service -> its partition number
        self._owned: set[Unit] = set()
        self._revoking: set[Unit] = set()
        self._next: dict[Unit, int] = {}  # read positions, of units that were sought
        self._paused: set[Unit] = set()
        self._looked = float("-inf")
        self._order: list[Unit] = []
        self._closed = False

    async def open(self) -> None:
        self._numbers = self._file.read(self._read_numbers)
        await self._join()
        self._file.listen(self._notify)
        bell = self._file.bell.socket
        if bell is not None:
            _bells.add(self._loop, self._file, self._wake)

    async def receive(self) -> Sequence[Change]:
        while True:
            if self._closed:  # else it would join again, and hold units that nobody reads
                raise UsageError("UL1115", "this member has left its service", fix="join again for a new one")
            self._wake.clear()
            changes: list[Change] = []
            if self._loop.time() - self._looked >= POLL_SECONDS:
                self._looked = self._loop.time()
                changes.extend(await self._coordinate())
            changes.extend(self._read())
            if changes:
                return changes
            wait = max(0.0, self._looked + POLL_SECONDS - self._loop.time())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):  # `wait_for` can swallow a cancellation (Python 3.11)
                    await self._wake.wait()

    def seek(self, unit: Unit, position: int) -> None:
        if unit in self._owned:
            self._next[unit] = position
            self._wake.set()

    def pause(self, unit: Unit) -> None:
        self._paused.add(unit)

    def resume(self, unit: Unit) -> None:
        self._paused.discard(unit)
        self._wake.set()

    async def ack(self, acks: Sequence[Ack]) -> None:
        """Where the store is not this file, it is told how far trimming may go, and which store it was."""

        def work(tx: Transaction) -> None:
            for unit, position, note in acks:
                tx.execute(
                    "update unlost_follower set position = ?, note = ? "
                    "where service = ? and topic = ? and partition = ?",
                    (position, note, *unit),
                )

        own = [ack for ack in acks if ack.unit in self._owned]
        if own:
            await self._file.write(work)

    async def release(self, units: Sequence[Unit]) -> None:
        process = self._file.process_id

        def work(tx: Transaction) -> None:
            tx.news = True
            for unit in units:
                tx.execute(
                    "update unlost_assignment set process = null "
                    "where service = ? and topic = ? and partition = ? and process = ?",
                    (*unit, process),
                )

        self._forget(units)
        await self._file.write(work)

    async def close(self) -> None:
        self._closed = True
        self._file.unlisten(self._notify)
        _bells.remove(self._loop, self._file, self._wake)
        process = self._file.process_id

        def work(tx: Transaction) -> None:
            tx.news = True
            tx.execute("delete from unlost_member where service = ? and process = ?", (self._service, process))
            tx.execute(
                "update unlost_assignment set process = null where service = ? and process = ?",
                (self._service, process),
            )

        await self._file.write(work)

    # --- the log -----------------------------------------------------------------------------------------

    def _read(self) -> list[Change]:
        ready = [unit for unit in self._order if unit in self._next and unit not in self._paused]
        if not ready:
            return []

        def work(connection: apsw.Connection) -> list[Change]:
            found: list[Change] = []
            for unit in ready:
                events = read_partition(
                    self._file.path, connection, unit.topic, unit.partition,
                    self._numbers[unit], self._next[unit], READ_MAX,
                )  # fmt: skip
                if events:
                    found.append(Arrivals(unit, events))
            return found

        changes = self._file.read(work)
        for change in changes:
            assert isinstance(change, Arrivals)
            self._next[change.unit] = change.events[-1].position + 1
        return changes

    def _notify(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._wake.set)

    # --- the group ---------------------------------------------------------------------------------------

    async def _join(self) -> None:
        process, service = self._file.process_id, self._service

        def work(tx: Transaction) -> None:
            _check_store(tx, service, elsewhere=self._store_elsewhere)
            for topic in self._topics:
                tx.execute(
                    "insert into unlost_member values (?, ?, ?, ?) on conflict do nothing",
                    (service, topic, process, tx.world.now()),
                )
            for unit in self._numbers:
                tx.execute("insert into unlost_assignment values (?, ?, ?, null) on conflict do nothing", tuple(unit))
                if self._store_elsewhere:
                    tx.execute(
                        "insert into unlost_follower values (?, ?, ?, 0, '') on conflict do nothing", tuple(unit)
                    )

        await self._file.write(work)

    async def _coordinate(self) -> list[Change]:
        """Looks at the group and takes one step towards everybody's fair share."""
        if not self._numbers:
            return []
        members, owners = self._file.read(self._read_group)
        me = self._file.process_id
        if any(
            me not in members.get(topic, ()) for topic in self._topics
        ):  # we were taken for dead while we slept: all is somebody else's now
            await self._join()
            lost = sorted(self._owned)
            self._forget(lost)
            return [Lost(lost)] if lost else []
        lost = [unit for unit in self._owned if owners.get(unit) != me]
        if lost:  # told at once: what comes below may fail
            self._forget(lost)
            return [Lost(lost)]
        changes: list[Change] = []
        known = {process for processes in members.values() for process in processes}
        dead = {process for process in known | {o for o in owners.values() if o} if not self._lives(process)}
        wanted, surplus = False, []
        for topic in self._topics:
            units = [unit for unit in sorted(self._numbers) if unit.topic == topic]
            share = _share([m for m in members[topic] if m not in dead], len(units), me, topic)
            mine = [unit for unit in units if unit in self._owned and unit not in self._revoking]
            surplus += mine[share:]
            wanted |= len(mine) < share and any(owners.get(unit) is None for unit in units)
        if dead or wanted:
            taken = await self._file.write(lambda tx: self._claim(tx, dead))
            if taken:
                self._owned.update(taken)
                self._order = sorted(self._owned)
                changes.append(Assigned(taken, self._file.read(lambda c: _saved(c, taken))))
        elif surplus:
            self._revoking.update(surplus)
            self._paused.update(surplus)
            changes.append(Revoked(surplus))
        return changes

    def _claim(self, tx: Transaction, dead: set[str]) -> list[Unit]:
        """Under the write lock: what it saw may be old, so everything is looked at again."""
        me = self._file.process_id
        members, _ = self._read_group(tx.connection)
        if any(me not in members.get(topic, ()) for topic in self._topics):
            return []
        for process in dead:
            if not self._lives(process):
                tx.execute("delete from unlost_member where service = ? and process = ?", (self._service, process))
                tx.execute(
                    "update unlost_assignment set process = null where service = ? and process = ?",
                    (self._service, process),
                )
        members, owners = self._read_group(tx.connection)
        taken: list[Unit] = []
        for topic in self._topics:
            units = [unit for unit in sorted(self._numbers) if unit.topic == topic]
            mine = sum(owners.get(unit) == me for unit in units)
            wanted = _share(members[topic], len(units), me, topic) - mine
            taken += [unit for unit in units if owners.get(unit) is None][: max(0, wanted)]
        for unit in taken:
            tx.execute(
                "update unlost_assignment set process = ? where service = ? and topic = ? and partition = ?",
                (me, *unit),
            )
        return taken

    def _lives(self, process: str) -> bool:
        if process == self._file.process_id:
            return True
        remains = examine(self._file.run_folder, process)
        return remains.alive and not remains.hung

    def _read_group(self, connection: apsw.Connection) -> tuple[dict[str, list[str]], dict[Unit, str | None]]:
        """Who takes part in each topic, the oldest first, and who has what."""
        members: dict[str, list[str]] = {}
        for topic, process in connection.execute(
            "select topic, process from unlost_member where service = ? order by joined, process", (self._service,)
        ):
            members.setdefault(topic, []).append(process)
        rows = connection.execute(
            "select topic, partition, process from unlost_assignment where service = ?", (self._service,)
        )
        owners = {Unit(self._service, topic, partition): process for topic, partition, process in rows}
        return members, {unit: owner for unit, owner in owners.items() if unit in self._numbers}

    def _read_numbers(self, connection: apsw.Connection) -> dict[Unit, int]:
        numbers = {}
        for name, first, partitions in connection.execute(
            "select name, first_number, partitions from unlost_topic order by name"
        ):
            if name in self._topics:
                for partition in range(partitions):
                    numbers[Unit(self._service, name, partition)] = first + partition
        return numbers

    def _forget(self, units: Sequence[Unit]) -> None:
        for unit in units:
            self._owned.discard(unit)
            self._revoking.discard(unit)
            self._paused.discard(unit)
            self._next.pop(unit, None)
        self._order = sorted(self._owned)


def _check_store(tx: Transaction, service: str, *, elsewhere: bool) -> None:
    """A service's progress is kept in one place, for good."""
    if elsewhere:
        found = tx.one("select 1 from unlost_progress where service = ? limit 1", (service,))
    else:
        found = tx.one("select 1 from unlost_follower where service = ? limit 1", (service,))
    if found is not None:
        where = "in the broker's own file" if elsewhere else "in another store"
        raise UsageError(
            "UL1135", f"the progress of {service!r} is kept {where}",
            found="another UNLOST_STORE than the service began with",
            fix="go back to it; or give the service another name, and it begins anew with all that the log holds",
        )  # fmt: skip


def _saved(c: apsw.Connection, units: Sequence[Unit]) -> dict[Unit, Saved]:
    """What a store elsewhere has told of these units."""
    sql = "select position, note from unlost_follower where service = ? and topic = ? and partition = ?"
    rows = [(unit, c.execute(sql, unit).fetchone()) for unit in units]
    return {unit: Saved(*row) for unit, row in rows if row is not None}


def _share(members: Sequence[str], units: int, me: str, topic: str) -> int:
    """How many of a topic's units are `me`'s: the same number for all, and one more for some. Topic by topic, because
    another release of the service may have other topics; who has one more depends on the topic, so that they even out."""
    each, rest = divmod(units, len(members))
    place = (members.index(me) + zlib.crc32(topic.encode())) % len(members)
    return each + (1 if place < rest else 0)


class _Bells:
    """One reader of the doorbell per event loop and file, waking every member in it."""

    def __init__(self) -> None:
        self._wakes: dict[tuple[int, int], set[asyncio.Event]] = {}

    def add(self, loop: asyncio.AbstractEventLoop, file: File, wake: asyncio.Event) -> None:
        wakes = self._wakes.setdefault((id(loop), id(file)), set())
        if not wakes and file.bell.socket is not None:

            def rung() -> None:
                file.bell.drain()
                for event in wakes:
                    event.set()

            loop.add_reader(file.bell.socket, rung)
        wakes.add(wake)

    def remove(self, loop: asyncio.AbstractEventLoop, file: File, wake: asyncio.Event) -> None:
        wakes = self._wakes.get((id(loop), id(file)))
        if wakes is None:
            return
        wakes.discard(wake)
        if not wakes:
            del self._wakes[id(loop), id(file)]
            if file.bell.socket is not None:
                loop.remove_reader(file.bell.socket)


_bells = _Bells()
