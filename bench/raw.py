"""The raw loops that unlost is compared with: apsw and nothing else.

They get what unlost had: the same tables, the rows that it wrote, in its order, in as many commits as it needed,
under the same settings. They do none of its work: no envelope, no checksum, no checks, no books, no receipts.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
from pathlib import Path
from typing import Any

import apsw
import msgspec
from common import Stopwatch, answer, chunks, connect, make_log, start

from unlost.sqlite.schema import POSITION_BITS, POSITION_MAX

INSERT = "insert into unlost_log (at, head, key, data, recorded, digest, crc) values (?, ?, ?, ?, ?, ?, ?)"
SELECT = (
    "select at, head, key, data, recorded, digest, crc from unlost_log where at between ? and ? order by at limit ?"
)
POSITION = "update raw_position set position = position + ? where partition = ?"
PARTITIONS = 8
READ_MAX = 256  # rows of one partition in one read


def rows_of(source: Path) -> list[tuple[Any, ...]]:
    """What unlost wrote, in the order in which it was appended."""
    connection = apsw.Connection(str(source), flags=apsw.SQLITE_OPEN_READONLY)
    rows: list[tuple[Any, ...]] = connection.execute(
        "select at, head, key, data, recorded, digest, crc from unlost_log order by recorded, at"
    ).fetchall()
    connection.close()
    return rows


def insert(connection: apsw.Connection, rows: list[tuple[Any, ...]]) -> None:
    connection.execute("begin immediate")
    connection.executemany(INSERT, rows)
    connection.execute("commit")


# --- publish -----------------------------------------------------------------------------------------------------


def measure_publish(folder: Path, plan: dict[str, Any]) -> None:
    rows, warm = rows_of(folder / "events.db"), plan["warm"]
    connection = make_log(folder / "raw.db", plan["pragmas"])
    insert(connection, rows[:warm])
    parts = [rows[warm + a : warm + b] for a, b in chunks(len(rows) - warm, plan["commits"])]
    watch = Stopwatch()
    for part in parts:
        insert(connection, part)
    result: dict[str, Any] = watch.stop()
    count = connection.execute("select count(*) from unlost_log").fetchone()[0]
    answer(result | {"events": count - warm, "commits": len(parts)})


# --- two processes -----------------------------------------------------------------------------------------------


def measure_two(folder: Path, plan: dict[str, Any]) -> None:
    """The writer. One byte in a pipe after each commit is the doorbell of the reader."""
    rows, warm = rows_of(folder / "events.db"), plan["warm"]
    path = folder / "raw.db"
    connection = make_log(path, plan["pragmas"])
    lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    connection.execute("create table raw_position (partition integer primary key, position integer not null)")
    connection.executemany("insert into raw_position values (?, 0)", [(n,) for n in range(PARTITIONS)])
    parts = [rows[warm + a : warm + b] for a, b in chunks(len(rows) - warm, plan["publish_commits"])]
    reader = start("raw.py", "read", folder, json.dumps(plan), stdin=-1, stdout=-1)
    assert reader.stdin is not None and reader.stdout is not None
    bell = reader.stdin.fileno()
    insert(connection, rows[:warm])
    os.write(bell, b"!")
    reader.stdout.readline()
    watch = Stopwatch()
    for part in parts:
        fcntl.flock(lock, fcntl.LOCK_EX)
        insert(connection, part)
        fcntl.flock(lock, fcntl.LOCK_UN)
        os.write(bell, b"!")
    own = watch.stop()
    theirs = json.loads(reader.stdout.readline())
    reader.stdin.close()
    if reader.wait() != 0:
        raise SystemExit("the raw reader failed")
    done = connection.execute("select sum(position) from raw_position").fetchone()[0]
    if done != len(rows):
        raise SystemExit(f"the raw reader stands at {done} of {len(rows)}")
    answer(
        {
            "events": len(rows) - warm, "seconds": theirs["ended"] - watch.began, "cpu": own["cpu"] + theirs["cpu"],
            "publish_cpu": own["cpu"], "handle_cpu": theirs["cpu"],
            "publish_seconds": own["seconds"], "publish_commits": len(parts), "handle_commits": theirs["commits"],
        }
    )  # fmt: skip


def read(folder: Path, plan: dict[str, Any]) -> None:
    """The reader. Each of its commits is for as many rows as a commit of unlost was: it waits for them."""
    path = folder / "raw.db"
    connection = connect(path, plan["pragmas"])
    reading = connect(path, plan["pragmas"])
    lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    decode = msgspec.json.Decoder().decode
    positions = [0] * PARTITIONS

    first = 0

    def one_read(most: int) -> int:
        nonlocal first
        got = [0] * PARTITIONS
        reading.execute("begin")
        for partition in (*range(first, PARTITIONS), *range(first)):
            base, left = partition << POSITION_BITS, min(READ_MAX, most - sum(got))
            if left == 0:
                break
            for row in reading.execute(SELECT, (base + positions[partition], base | POSITION_MAX, left)):
                decode(row[3])
                got[partition] += 1
        reading.execute("commit")
        first = partition  # nobody is starved
        fcntl.flock(lock, fcntl.LOCK_EX)
        connection.execute("begin immediate")
        for partition, count in enumerate(got):
            if count:
                connection.execute(POSITION, (count, partition))
                positions[partition] += count
        connection.execute("commit")
        fcntl.flock(lock, fcntl.LOCK_UN)
        return sum(got)

    os.read(0, 4096)
    while sum(positions) < plan["warm"]:
        one_read(plan["warm"] - sum(positions))
    total = plan["events"]
    ready = [b for _, b in chunks(total, plan["publish_commits"])]
    each = max(1, total // plan["handle_commits"])
    commits = rings = done = 0
    answer({"ready": True})
    watch = Stopwatch()
    while done < total:
        while rings < len(ready) and (rings == 0 or ready[rings - 1] < min(done + each, total)):
            rings += len(os.read(0, 4096))
        done += one_read(min(each, total - done))
        commits += 1
    ended = watch.stop()
    answer({"ended": watch.began + ended["seconds"], "commits": commits, **ended})
    os.read(0, 1)


def main() -> None:
    mode, folder, plan = sys.argv[1:]
    {"publish": measure_publish, "two": measure_two, "read": read}[mode](Path(folder), json.loads(plan))


if __name__ == "__main__":
    main()
