"""The tables of a store in a file, as operators look at them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from unlost.events.topic import Unit
from unlost.sqlite.file import File
from unlost.sqlite.process import examine, service_hash
from unlost.store.port import Look, Process

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

    def process(self, look: Look, id: str) -> Process | None:
        """Whether it lives is what the kernel says of its lock."""
        row = look.execute("select pid, host from unlost_process where id = ?", (id,)).fetchone()
        pid, host = row if row is not None else (0, "")
        if id == self.file.process_id:
            return Process(id, pid, host, True, {})
        found = examine(self.file.run_folder, id)
        if row is None and not found.alive:
            return None
        read: dict[Unit, int] = {}
        if found.alive and found.read:
            units = look.execute(
                "select p.service, p.topic, p.partition, t.first_number from unlost_progress p "
                "join unlost_topic t on t.name = p.topic where p.owner = ?",
                (id,),
            )
            for service, topic, partition, first in units:
                at = found.read.get((service_hash(service), first + partition))
                if at is not None:
                    read[Unit(service, topic, partition)] = at
        return Process(id, pid, host, found.alive, read)

    def close(self) -> None:
        """The file belongs to whoever opened it."""
