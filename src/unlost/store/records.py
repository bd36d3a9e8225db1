"""The tables of a store in a file, as operators look at them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TypeVar

from unlost.events.topic import Unit
from unlost.sqlite.file import File
from unlost.sqlite.process import Remains, examine, service_hash
from unlost.store.port import Accepted, Look, Process, Relaying

T = TypeVar("T")


class FileRecords:
    def __init__(self, file: File) -> None:
        self.file = file

    @property
    def id(self) -> str:
        return self.file.store_id

    @property
    def place(self) -> str:
        return str(self.file.path)

    def read(self, work: Callable[[Look], T]) -> T:
        return self.file.read(work)

    def write(self, work: Callable[[Look], T]) -> T:
        return self.file.write_sync(work)

    def processes(self, look: Look) -> dict[str, Process]:
        """Whether one lives is what the kernel says of its lock."""
        rows = {id: (pid, host) for id, pid, host in look.execute("select id, pid, host from unlost_process")}
        units: dict[str, list[tuple[Unit, int]]] = {}
        for owner, service, topic, partition, first in look.execute(
            "select p.owner, p.service, p.topic, p.partition, t.first_number from unlost_progress p "
            "left join unlost_topic t on t.name = p.topic where p.owner is not null"
        ):
            units.setdefault(owner, []).append((Unit(service, topic, partition), (first or 0) + partition))
        found = {}
        for id in {*rows, *units}:
            remains = self._remains(id)
            if id not in rows and not remains.alive:
                continue
            read = {
                unit: at
                for unit, number in units.get(id, ())
                if (at := remains.read.get((service_hash(unit.service), number))) is not None
            }
            pid, host = rows.get(id, (0, ""))
            found[id] = Process(id, pid, host, remains.alive, remains.hung, read if remains.alive else {})
        return found

    def _remains(self, id: str) -> Remains:
        return Remains(True, False, {}, {}) if id == self.file.process_id else examine(self.file.run_folder, id)

    def assigned(self, look: Look) -> dict[Unit, str]:
        """Units that a living process has, or is about to take, as the embedded broker's group says."""
        rows = look.execute(
            "select service, topic, partition, process from unlost_assignment where process is not null"
        )
        found = {Unit(service, topic, partition): process for service, topic, partition, process in rows}
        living = {process for process in set(found.values()) if self._remains(process).alive}
        return {unit: process for unit, process in found.items() if process in living}

    def take_over(self, look: Look, units: Collection[Unit]) -> list[Unit]:
        """A file has one writer: nothing has to be locked."""
        assigned = self.assigned(look)
        owners = {
            Unit(service, topic, partition): owner
            for service, topic, partition, owner in look.execute(
                "select service, topic, partition, owner from unlost_progress"
            )
        }
        living = {owner for owner in set(owners.values()) if owner is not None and self._remains(owner).alive}
        free = [unit for unit in units if unit in owners and owners[unit] not in living and unit not in assigned]
        for unit in free:
            look.execute(
                "update unlost_progress set epoch = epoch + 1 where service = ? and topic = ? and partition = ?", unit
            )
        return free

    def accepted(self, look: Look) -> Accepted:
        events, copies, oldest = look.execute(
            "select count(*) filter (where raw is null), count(*) filter (where raw is not null), min(added) "
            "from unlost_outbox"
        ).fetchone()
        row = look.execute(
            "select r.process, p.pid, p.host from unlost_relay r join unlost_process p on p.id = r.process"
        ).fetchone()
        relays = [Relaying(row[1], row[2], 1)] if row is not None and self._remains(row[0]).alive else []
        age = None if oldest is None else max(0.0, (self.now() - oldest) / 1e6)
        return Accepted(events, copies, age, 0, None, relays, 0 if relays else 1, ())

    def size(self, look: Look) -> int:
        path = self.file.path
        return sum(p.stat().st_size for p in (path, path.with_name(path.name + "-wal")) if p.exists())

    def now(self) -> int:
        return self.file.world.now()

    def close(self) -> None:
        """The file belongs to whoever opened it."""
