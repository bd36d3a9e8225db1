"""Reading the log: every row is checked before anybody sees it."""

from __future__ import annotations

from pathlib import Path

import apsw

from unlost.errors import Damaged
from unlost.events import decode_head
from unlost.events.topic import Arrival
from unlost.sqlite.schema import POSITION_BITS, POSITION_MAX
from unlost.sqlite.transaction import row_crc
from unlost.world import rfc3339

READ_BYTES_MAX = 8 * 1024 * 1024


def read_partition(
    path: Path, connection: apsw.Connection, topic: str, partition: int, number: int, start: int, limit: int
) -> list[Arrival]:
    """Up to `limit` events from `start` on.

    Raises:
        Damaged: a row does not match its checksum, or positions are missing. Nothing is skipped in silence.
    """
    base = number << POSITION_BITS
    found: list[Arrival] = []
    expected = base + start
    size = 0
    rows = connection.execute(
        "select at, head, key, data, recorded, digest, crc from unlost_log where at between ? and ? order by at limit ?",
        (base + start, base | POSITION_MAX, limit),
    )
    try:
        for at, head, key, data, recorded, digest, crc in rows:
            if at != expected:
                raise Damaged(
                    "UL3005", f"{path}: events of {topic}/{partition} are missing from the log",
                    found=f"after position {expected - base - 1} comes {at - base}", fix="run: unlost audit",
                )  # fmt: skip
            if crc != row_crc(at, head, key, data, recorded, digest):
                raise Damaged(
                    "UL3004", f"{path} is damaged: the event at {topic}/{partition}:{at - base} does not match its checksum",
                    fix="stop all processes, keep a copy of the folder, and restore the newest good copy",
                )  # fmt: skip
            expected += 1
            try:
                envelope, problem = (
                    decode_head(head, topic=topic, key=key, data=data, recordedtime=rfc3339(recorded)),
                    "",
                )
            except Exception as e:
                envelope, problem = None, str(e)
            found.append(Arrival(at - base, envelope, recorded, head, key, data, problem))
            size += len(head) + len(data or b"")
            if size > READ_BYTES_MAX:
                break
    finally:
        rows.close()  # a traceback would keep it open, and with it an old snapshot of the file
    return found
