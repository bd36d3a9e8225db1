"""Trimming the log of topics that declare a retention. Without one, everything is kept.

**Guarantee** only events that every service of the topic has finished with are removed: never one that is
unhandled, parked or dead. Their inbox marks go with them, so retention is also how long a resend with the same id is
recognised: an event is kept until all that came within the retention after it has been handled.
**After a crash** a trim is one commit: it happened or it did not.
"""

from __future__ import annotations

from collections.abc import Callable

from unlost.events import decode_head
from unlost.sqlite.file import File
from unlost.sqlite.schema import POSITION_BITS, POSITION_MAX, RETIRED
from unlost.sqlite.transaction import Transaction

TRIM_ROWS_MAX = 500  # rows of one commit, so that nobody waits for it


async def trim(file: File) -> int:
    """Removes what may go; returns how many events that were."""
    units = file.read(
        lambda c: c.execute(
            "select name, first_number, partitions, retention from unlost_topic where retention is not null"
        ).fetchall()
    )
    removed = 0
    for topic, first, partitions, retention in units:
        for partition in range(partitions):
            while True:
                step = await file.write(_step(topic, partition, first + partition, retention))
                removed += step
                if step < TRIM_ROWS_MAX:
                    break
    return removed


def _step(topic: str, partition: int, number: int, retention: int) -> Callable[[Transaction], int]:
    def work(tx: Transaction) -> int:
        low = number << POSITION_BITS
        last = tx.one("select max(at) from unlost_log where at between ? and ?", (low, low | POSITION_MAX))[0]
        if last is None:
            return 0
        finished = low + _finished(tx, topic, partition)
        limit = min(last, finished)  # the last row stays: it holds the position
        oldest_open = tx.one("select recorded from unlost_log where at = ?", (finished,))
        now = tx.world.now() if oldest_open is None else min(tx.world.now(), oldest_open[0])
        cutoff = now - retention * 1_000_000
        rows = tx.execute(
            "select at, head, recorded from unlost_log where at between ? and ? order by at limit ?",
            (low, limit - 1, TRIM_ROWS_MAX),
        ).fetchall()
        old = []
        for at, head, recorded in rows:
            if recorded >= cutoff:
                break
            old.append((at, head))
        services = [
            row[0] for row in tx.execute("select distinct service from unlost_progress where topic = ?", (topic,))
        ]
        for at, head in old:
            e = decode_head(head, topic=topic, key=None, data=None)
            for service in services:
                tx.execute(
                    "delete from unlost_inbox where service = ? and id = ? and source = ?", (service, e.id, e.source)
                )
            tx.execute("delete from unlost_log where at = ?", (at,))
        return len(old)

    return work


def _finished(tx: Transaction, topic: str, partition: int) -> int:
    """The first position that some service has not finished with."""
    return int(
        tx.one(
            "select min(p) from (select position as p from unlost_progress where topic = ?1 and partition = ?2 "
            f"and service not in ({RETIRED}) "
            "union all select position from unlost_follower where topic = ?1 and partition = ?2 "
            "union all select position from unlost_waiting where topic = ?1 and partition = ?2 "
            "union all select position from unlost_shelf where topic = ?1 and partition = ?2 "
            "union all select ?3)",
            (topic, partition, POSITION_MAX),
        )[0]
    )
