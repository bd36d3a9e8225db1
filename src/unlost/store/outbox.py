"""The outbox in the embedded file: what handlers publish, for a broker whose log is elsewhere.

A row's number follows the order of the commits (SQLite has one writer), so reading on from a number skips nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Sequence
from functools import partial

import apsw
import msgspec

from unlost.events import Envelope, decode_head, encode_head
from unlost.sqlite.file import File
from unlost.sqlite.process import examine
from unlost.sqlite.transaction import Transaction
from unlost.store.port import Lane, Mirrored, Unsent

POLL_SECONDS = 0.2


class _Raw(msgspec.Struct, frozen=True):
    """What the column `raw` says."""

    origin: tuple[str, int]
    headers: Sequence[tuple[str, bytes | None]]


_raw = msgspec.json.Decoder(_Raw).decode


def put(tx: Transaction, envelopes: Sequence[Envelope]) -> None:
    """Puts events into the outbox, in this commit."""
    tx.news = True
    now = tx.world.now()
    for e in envelopes:
        tx.execute(
            "insert into unlost_outbox (topic, key, head, data, added) values (?, ?, ?, ?, ?)",
            (e.topic, e.key, encode_head(e), e.data, now),
        )


def put_raw(tx: Transaction, m: Mirrored) -> None:
    """Puts the copy of a dead letter, in this commit."""
    tx.news = True
    raw = msgspec.json.encode(_Raw(m.origin, m.headers)).decode()
    tx.execute(
        "insert into unlost_outbox (topic, key, head, data, raw, added) values (?, ?, ?, ?, ?, ?)",
        (m.topic, m.key, b"", m.data, raw, tx.world.now()),
    )


class _Emptied:
    """One process at a time empties the outbox of a file; its lock says whether it lives."""

    def __init__(self, file: File) -> None:
        self._file = file
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        file.listen(self._rung)

    async def close(self) -> None:
        self._file.unlisten(self._rung)

    async def claim(self) -> bool:
        me = self._file.process_id
        holder = self._file.read(lambda c: c.execute("select process from unlost_relay").fetchone()[0])
        if holder == me:
            return True
        if holder is not None and self._lives(holder):
            return False

        def work(tx: Transaction) -> bool:
            now = tx.one("select process from unlost_relay")[0]
            if now is not None and now != me and self._lives(now):
                return False
            tx.execute("update unlost_relay set process = ?", (me,))
            return True

        return await self._file.write(work)

    async def give(self) -> None:
        me = self._file.process_id

        def work(tx: Transaction) -> None:
            tx.news = True
            tx.execute("update unlost_relay set process = null where process = ?", (me,))

        await self._file.write(work)

    async def sent(self, numbers: Sequence[int]) -> None:
        def work(tx: Transaction) -> None:
            for number in numbers:
                tx.execute("delete from unlost_outbox where number = ?", (number,))

        await self._file.write(work)

    async def wait(self, seconds: float) -> None:
        """The commits of this process ring at once; for those of others, looking now and then is enough."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(seconds, POLL_SECONDS)):
                await self._news.wait()
        self._news.clear()

    def _rung(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._news.set)

    def _lives(self, process: str) -> bool:
        remains = examine(self._file.run_folder, process)
        return remains.alive and not remains.hung


class SqliteOutbox(_Emptied):
    """The events in it. A row's place in the file is its number: one writer gives them, in the order of the commits."""

    async def next(self, held: Collection[Lane], limit: int) -> Sequence[Unsent]:
        after, chosen = 0, list[Unsent]()
        while not chosen:
            rows = self._file.read(partial(self._page, after, limit))
            if not rows:
                break
            after = rows[-1].number
            chosen = [row for row in rows if row.lane not in held]
        return chosen

    def _page(self, after: int, limit: int, c: apsw.Connection) -> list[Unsent]:
        rows = c.execute(
            "select number, topic, key, head, data from unlost_outbox "
            "where number > ? and raw is null order by number limit ?",
            (after, limit),
        )
        return [
            Unsent(number=number, envelope=decode_head(head, topic=topic, key=key, data=data))
            for number, topic, key, head, data in rows
        ]


class SqliteCopies(_Emptied):
    """The copies of dead letters in it."""

    async def page(self, after: int, limit: int) -> Sequence[Mirrored]:
        rows = self._file.read(
            lambda c: c.execute(
                "select number, topic, key, data, raw from unlost_outbox "
                "where raw is not null and number > ? order by number limit ?",
                (after, limit),
            ).fetchall()
        )
        return [_mirrored(*row) for row in rows]


def _mirrored(number: int, topic: str, key: bytes | None, data: bytes | None, raw: str) -> Mirrored:
    found = _raw(raw)
    return Mirrored(number=number, topic=topic, origin=found.origin, key=key, data=data, headers=found.headers)
