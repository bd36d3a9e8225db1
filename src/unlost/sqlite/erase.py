"""Erasing what events of the log say, so that no byte of it is left in the file.

A row keeps its address, its time, and of its head what `erased_head` leaves: positions stay without a gap, and the chain of
digests, which is made of ids and sources, goes on over it.
**Guarantee** after `scrub` has returned an empty text, what was erased or deleted before is in no byte of the file or its
WAL. SQLite leaves old bytes in unused parts of pages (a page was split, a row deleted), so the file is written anew.
**After a crash** a batch of rows was erased or not, and the file was written anew or not.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import apsw

from unlost.events.codec import erased_head
from unlost.sqlite import guards, process
from unlost.sqlite.file import BUSY_MS, File
from unlost.sqlite.schema import POSITION_BITS
from unlost.sqlite.transaction import LogRow, Transaction, row_crc
from unlost.world import rfc3339

SHARED_BYTES_MAX = 64 * 1024 * 1024  # a larger file is not written anew while others use it: they would wait too long
LOCK_SECONDS = 10.0


def erase_rows(
    tx: Transaction, path: Path, topic: str, partition: int, number: int, positions: Collection[int], key: bytes
) -> int:
    """In this commit; returns how many of these were events of this key.

    Raises:
        Damaged: one of them is not as it was written. Nothing was changed.
    """
    rows = []
    for position in sorted(positions):
        sql = "select at, head, key, data, recorded, digest, crc from unlost_log where at = ?"
        raw = tx.one(sql, (number << POSITION_BITS | position,))
        if raw is None or raw[2] != key:
            continue  # trimmed or erased meanwhile
        row = LogRow(*raw)
        if not row.intact():
            raise guards.damaged(path, f"the event at {topic}/{partition}:{position} does not match its checksum")
        rows.append(row)
    time = rfc3339(tx.world.now())
    with _overwriting(tx.connection):
        for row in rows:
            head = erased_head(row.head, time)
            crc = row_crc(row.at, head, None, None, row.recorded, row.digest)
            sql = "update unlost_log set head = ?, key = null, data = null, crc = ? where at = ?"
            tx.execute(sql, (head, crc, row.at))
    return len(rows)


@contextmanager
def _overwriting(connection: apsw.Connection) -> Iterator[None]:
    """SQLite puts zeros where a row was, for as long as this lasts."""
    connection.pragma("secure_delete", True)
    try:
        yield
    finally:
        connection.pragma("secure_delete", False)


def scrub(file: File) -> str:
    """Writes the file anew without what was ever deleted, and empties its WAL. Returns why it could not be done now; empty:
    it is done. Whoever wants to write meanwhile waits; a large file is left alone while other processes use it.

    Raises:
        Unavailable: the disk is full or fails. Damaged: the file is.
    """
    with guards.explained(file.path):
        size = file.path.stat().st_size
        if size > SHARED_BYTES_MAX and (others := _others(file)):
            return f"{others} other processes use the file, and at {size:,} bytes they would wait too long for it"
        fd = guards.open_lock(guards.beside(file.path, "lock"))
        try:
            guards.lock_within(fd, LOCK_SECONDS, file.path)
            return _write_anew(file)
        finally:
            os.close(fd)


def _others(file: File) -> int:
    known = [id for (id,) in file.read(lambda c: c.execute("select id from unlost_process").fetchall())]
    return sum(id != file.process_id and process.examine(file.run_folder, id).alive for id in known)


def _write_anew(file: File) -> str:
    connection = apsw.Connection(str(file.path), flags=apsw.SQLITE_OPEN_READWRITE, vfs=file.vfs or None)
    try:
        connection.set_busy_timeout(BUSY_MS)
        connection.pragma("synchronous", 2)
        if guards.DARWIN:
            connection.pragma("fullfsync", 1)
            connection.pragma("checkpoint_fullfsync", 1)
        guards.persist_wal(connection)
        connection.execute("vacuum")
        connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    except apsw.BusyError:
        return "somebody reads an old state of the file (a database browser, a backup, an export?)"
    finally:
        connection.close()
    return ""
