"""Neighbours on SQLite, for information. Runs under `.venv-bench`, which has them and not unlost.

Each is used as its own documentation says for data that must survive power loss, by one process: first all puts
by one caller, then the handling of all of them with a function that does nothing.
"""

from __future__ import annotations

import json
import resource
import sqlite3
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

PAYLOAD = "x" * 186  # with its quotes and field name as JSON: 200 bytes
DEADLINE_SECONDS = 60.0


def measured(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock and seconds of the processor."""
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    work()
    seconds, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        if time.monotonic() > end:
            raise SystemExit(f"not done in {DEADLINE_SECONDS:g} s")
        time.sleep(0.002)


def huey(folder: Path, total: int) -> dict[str, Any]:
    from huey import SqliteHuey

    queue = SqliteHuey("bench", filename=str(folder / "huey.db"), fsync=True, results=False, strict_fifo=True)
    seen: list[None] = []

    @queue.task()
    def handle(note: str) -> None:
        seen.append(None)

    def put() -> None:
        for _ in range(total):
            handle(PAYLOAD)

    def work() -> None:
        consumer.start()
        wait_for(lambda: len(seen) == total)

    puts = measured(put)
    consumer = queue.create_consumer(workers=1, periodic=False, initial_delay=0.001, max_delay=0.01)
    handled = measured(work)
    consumer.stop(graceful=True)
    return report("huey", puts, handled, total, "SqliteHuey(fsync=True): a task leaves the file before it runs")


def persist_queue(folder: Path, total: int) -> dict[str, Any]:
    import persistqueue
    from persistqueue.serializers import json as as_json

    queue = persistqueue.SQLiteAckQueue(str(folder), auto_commit=True, serializer=as_json)

    def put() -> None:
        for _ in range(total):
            queue.put({"note": PAYLOAD})

    def work() -> None:
        for _ in range(total):
            queue.ack(queue.get(block=False))

    puts, handled = measured(put), measured(work)
    if queue.acked_count() != total:
        raise SystemExit("not all were acknowledged")
    return report("persist-queue", puts, handled, total, "SQLiteAckQueue(auto_commit=True): get, then ack")


def dbos(folder: Path, total: int) -> dict[str, Any]:
    from dbos import DBOS

    path = folder / "dbos.sqlite"
    DBOS(config={"name": "bench", "system_database_url": f"sqlite:///{path}", "log_level": "ERROR"})
    seen: list[None] = []

    @DBOS.workflow()
    def handle(note: str) -> None:
        seen.append(None)

    DBOS.launch()
    DBOS.register_queue("bench", polling_interval_sec=0.01)

    def finished() -> bool:
        if len(seen) < total:
            return False
        with sqlite3.connect(path) as connection:
            found = connection.execute("select count(*) from workflow_status where status = 'SUCCESS'").fetchone()
        connection.close()
        return bool(found[0] >= total)

    def put() -> None:
        for _ in range(total):
            DBOS.enqueue_workflow("bench", handle, PAYLOAD)

    began = time.monotonic()
    puts = measured(put)
    rest = measured(lambda: wait_for(finished))
    whole = time.monotonic() - began
    DBOS.destroy()
    return report(
        "DBOS", puts, (whole, puts[1] + rest[1]), total, "workflow on a queue polled every 10 ms; puts included"
    )


def report(
    name: str, puts: tuple[float, float], handled: tuple[float, float], total: int, settings: str
) -> dict[str, Any]:
    return {
        "name": name, "version": version(name), "sqlite": sqlite3.sqlite_version, "settings": settings, "events": total,
        "put_rate": total / puts[0], "put_cpu": puts[1] / total,
        "handle_rate": total / handled[0], "handle_cpu": handled[1] / total,
    }  # fmt: skip


def main() -> None:
    name, folder, total = sys.argv[1:]
    result = {"huey": huey, "persist-queue": persist_queue, "dbos": dbos}[name](Path(folder), int(total))
    sys.stdout.write("\n" + json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
