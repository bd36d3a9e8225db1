"""unlost, measured through its public surface. Each mode runs in processes of its own.

Nothing is switched off: receipts come after the fsync, positions are durable before they count, and at the end
the log and the positions are compared with what was published.
"""

from __future__ import annotations

import asyncio
import json
import os
import struct
import sys
import threading
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import apsw
from common import (
    EVENT_BYTES,
    PUBLISHERS,
    OrderPlaced,
    PlaceOrder,
    Stopwatch,
    answer,
    command,
    order,
    pragmas_of,
    start,
)

from unlost import App, Context, Service

WARM = 2000  # events before the clock starts
DEADLINE_SECONDS = 60.0
STAMP = struct.Struct("<q")


def app_on(folder: Path, *services: Service, **more: Any) -> App:
    return App(*services, broker=f"embedded://{folder}/events.db", **more)


def commits(app: App) -> int:
    return int(app.file.read(lambda c: c.execute("select n from unlost_commit").fetchone())[0])


def settled(app: App) -> int:
    """How many events have a durable outcome. (Those that are begun at most once have none yet.)"""
    sql = "select sum(position - coalesce(json_extract(counts, '$.begun'), 0)) from unlost_progress"
    return int(app.file.read(lambda c: c.execute(sql).fetchone())[0] or 0)


async def until_settled(app: App, count: int, pause: float = 0.001) -> None:
    end = time.monotonic() + DEADLINE_SECONDS
    while settled(app) < count:
        if time.monotonic() > end:
            raise SystemExit(f"only {settled(app)} of {count} events were settled in {DEADLINE_SECONDS:g} s")
        await asyncio.sleep(pause)


async def publish(app: App, first: int, total: int, publishers: int, kind: str = "event") -> None:
    """A closed loop: each publisher sends its next event when the one before is durable."""

    async def one(number: int) -> None:
        for n in range(first + number, first + total, publishers):
            await (app.send(command(n)) if kind == "command" else app.publish(order(n)))

    await asyncio.gather(*(one(number) for number in range(publishers)))


async def publish_in_batches(app: App, first: int, total: int, batch: int) -> None:
    """Two callers of `publish_all`, so that one prepares its batch while that of the other is written."""

    async def one(number: int) -> None:
        for n in range(first + number * batch, first + total, 2 * batch):
            await app.publish_all([order(i) for i in range(n, min(n + batch, first + total))])

    await asyncio.gather(one(0), one(1))


async def warm_up(app: App, kind: str = "event") -> None:
    if kind == "command":
        await publish(app, 0, WARM, PUBLISHERS, kind)
        return
    await app.publish_all([order(n) for n in range(WARM)])


def check_log(app: App, total: int) -> dict[str, Any]:
    """The log holds what was published, at the size that was promised."""

    def look(c: apsw.Connection) -> dict[str, Any]:
        count, least, most, row = c.execute(
            "select count(*), min(length(data)), max(length(data)), "
            "avg(length(head) + length(key) + length(data)) from unlost_log"
        ).fetchone()
        if (count, least, most) != (total, EVENT_BYTES, EVENT_BYTES):
            raise SystemExit(f"expected {total} events of {EVENT_BYTES} bytes, found {count} of {least} to {most}")
        return {"row_bytes": row, "pragmas": pragmas_of(c)}

    return app.file.read(look)


# --- publish -----------------------------------------------------------------------------------------------------


async def measure_publish(folder: Path, total: int, publishers: int) -> None:
    async with app_on(folder) as app:
        await warm_up(app)
        await publish(app, WARM, publishers * 5, publishers)
        before = commits(app)
        watch = Stopwatch()
        await publish(app, WARM + publishers * 5, total, publishers)
        result: dict[str, Any] = watch.stop()
        result |= {"events": total, "commits": commits(app) - before, "warm": WARM + publishers * 5}
        result |= check_log(app, WARM + publishers * 5 + total)
    answer(result)


# --- two processes: publish, handle, durable position ----------------------------------------------------------


def counting(expected: list[int], kind: str = "event") -> tuple[Service, list[asyncio.Event]]:
    """A service with a handler that only counts; each event is set when so many have been handled."""
    service = Service("billing")
    reached = [asyncio.Event() for _ in expected]
    seen = 0

    @service.on(PlaceOrder if kind == "command" else OrderPlaced)
    async def handle(event: Any) -> None:
        nonlocal seen
        seen += 1
        if seen in expected:
            reached[expected.index(seen)].set()

    return service, reached


async def unless_it_fails(
    task: asyncio.Task[None], waited_for: Coroutine[Any, Any, object], seconds: float = DEADLINE_SECONDS
) -> None:
    """Waits for something that the services bring about; if they fail, so does this."""
    waiting = asyncio.ensure_future(waited_for)
    done, _ = await asyncio.wait({task, waiting}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    if waiting not in done:
        if task.done():
            await task
        raise SystemExit("the service " + ("ended" if task.done() else f"was not done in {seconds:g} s"))


def end_with_parent() -> None:
    """Nobody is left behind: standard input ends when the process that started this one does."""

    def wait() -> None:
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


async def consume(folder: Path, total: int, kind: str) -> None:
    end_with_parent()
    service, (warmed, finished) = counting([WARM, WARM + total], kind)
    async with app_on(folder, service) as app:
        task = asyncio.create_task(app.serve())
        await unless_it_fails(task, warmed.wait())
        await until_settled(app, WARM)
        watch = Stopwatch()
        answer({"ready": True})
        await unless_it_fails(task, finished.wait())
        await until_settled(app, WARM + total)
        answer({"ended": time.monotonic(), **watch.stop()})
        app.stop()
        await task


async def measure_two(folder: Path, total: int, batch: int, kind: str) -> None:
    service, _ = counting([], kind)  # declares the topic; served by the other process only
    own = 0

    def count() -> None:
        nonlocal own
        own += 1

    async with app_on(folder, service) as app:
        other = start("ours.py", "consume", folder, total, kind, stdin=-1, stdout=-1)
        assert other.stdout is not None
        await warm_up(app, kind)
        await asyncio.to_thread(other.stdout.readline)
        before = commits(app)
        app.file.listen(count)
        watch = Stopwatch()
        if batch > 1:
            await publish_in_batches(app, WARM, total, batch)
        else:
            await publish(app, WARM, total, PUBLISHERS, kind)
        published: dict[str, Any] = watch.stop()
        theirs = json.loads(await asyncio.to_thread(other.stdout.readline))
        result = {
            "events": total, "warm": WARM, "seconds": theirs["ended"] - watch.began,
            "publish_seconds": published["seconds"], "cpu": published["cpu"] + theirs["cpu"],
            "publish_cpu": published["cpu"], "handle_cpu": theirs["cpu"],
            "publish_commits": own, "handle_commits": max(1, commits(app) - before - own),
        }  # fmt: skip
        if await asyncio.to_thread(other.wait) != 0:
            raise SystemExit("the consumer failed")
        if settled(app) != WARM + total:
            raise SystemExit(f"{settled(app)} of {WARM + total} events have an outcome")
        result |= check_log(app, WARM + total)
    answer(result)


# --- latency ---------------------------------------------------------------------------------------------------


class Disk:
    """4 KiB written over and fsynced, on the same disk: what nobody can be faster than."""

    BLOCK, BLOCKS = 4096, 1024

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.write(self._fd, b"\1" * (self.BLOCK * self.BLOCKS))
        os.fsync(self._fd)
        self._turn = 0

    def write(self) -> float:
        self._turn = (self._turn + 1) % self.BLOCKS
        block = os.urandom(self.BLOCK)
        began = time.monotonic_ns()
        os.pwrite(self._fd, block, self._turn * self.BLOCK)
        getattr(os, "fdatasync", os.fsync)(self._fd)
        return (time.monotonic_ns() - began) / 1000


def stamping(write_to: int) -> Service:
    """Tells when the handler starts: the first thing it does is to look at the clock."""
    service = Service("billing")

    @service.on(OrderPlaced)
    async def handle(event: OrderPlaced) -> None:
        os.write(write_to, STAMP.pack(time.monotonic_ns()))

    return service


async def consume_stamping(folder: Path, write_to: int) -> None:
    service = stamping(write_to)
    async with app_on(folder, service) as app:
        task = asyncio.create_task(app.serve())
        await asyncio.to_thread(sys.stdin.read)
        app.stop()
        await task


async def measure_latency(folder: Path, samples: int, processes: int) -> None:
    """One event at a time, each sent when the one before is settled; between two of them one write of the disk."""
    stamps, write_to = os.pipe()
    os.set_inheritable(write_to, True)
    disk = Disk(folder / "disk")
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[int] = asyncio.Queue()

    def read() -> None:
        for (at,) in STAMP.iter_unpack(os.read(stamps, STAMP.size * 1024)):
            arrived.put_nowait(at)

    loop.add_reader(stamps, read)
    async with app_on(folder, stamping(write_to)) as app:
        if processes == 2:
            other = start("ours.py", "stamp", folder, write_to, stdin=-1, close_fds=False)
        else:
            task = asyncio.create_task(app.serve())
        warm = 8000  # the write-ahead log has been filled once, as in any program that runs for a while
        for n in range(0, warm, 1000):
            await app.publish_all([order(i) for i in range(n, n + 1000)])
        for _ in range(warm):
            await asyncio.wait_for(arrived.get(), DEADLINE_SECONDS)
        await until_settled(app, warm)
        publishes, starts, writes = [], [], []
        for n in range(samples):
            began = time.monotonic_ns()
            await app.publish(order(n))
            publishes.append((time.monotonic_ns() - began) / 1000)
            starts.append((await asyncio.wait_for(arrived.get(), DEADLINE_SECONDS) - began) / 1000)
            await until_settled(app, warm + n + 1, 0.0005)
            writes.append(disk.write())
        if processes == 2:
            assert other.stdin is not None
            other.stdin.close()
            if await asyncio.to_thread(other.wait) != 0:
                raise SystemExit("the consumer failed")
        else:
            app.stop()
            await task
        check_log(app, warm + samples)
    answer({"publish": publishes, "start": starts, "disk": writes})


# --- effectively-once, for information ------------------------------------------------------------------------


async def measure_once(folder: Path, total: int, kind: str) -> None:
    """A backlog, handled by one process under one of the guarantees; with `transaction` each handler writes a row."""
    guarantees: dict[str, Any] = {"plain": "at-least-once", "at-most-once": "at-most-once"}
    service = Service("billing", guarantee=guarantees.get(kind, "effectively-once"))
    expected = total
    handled = asyncio.Event()
    seen = 0

    if kind == "transaction":

        @service.on(OrderPlaced)
        async def bill(event: OrderPlaced, ctx: Context) -> None:
            nonlocal seen
            async with ctx.transaction() as db:
                await db.execute("insert into bill values (?, ?)", (event.order_id, event.cents))
            seen += 1
            if seen == expected:
                handled.set()
    else:

        @service.on(OrderPlaced)
        async def note(event: OrderPlaced) -> None:
            nonlocal seen
            seen += 1
            if seen == expected:
                handled.set()

    schema = folder / "schema.sql"
    schema.write_text("create table if not exists bill (order_id text not null, cents integer not null);")
    async with app_on(folder, service, schema=schema) as app:
        for n in range(0, total, 1000):
            await app.publish_all([order(i) for i in range(n, min(n + 1000, total))])
        before = commits(app)
        watch = Stopwatch()
        task = asyncio.create_task(app.serve())
        await unless_it_fails(task, handled.wait())
        await until_settled(app, total)
        result: dict[str, Any] = watch.stop()
        result |= {"events": total, "commits": commits(app) - before}
        app.stop()
        await task
        rows = app.file.read(lambda c: c.execute("select count(*) from bill").fetchone())[0]
        if rows != (total if kind == "transaction" else 0):
            raise SystemExit(f"{rows} effects of {total} events")
    answer(result)


def main() -> None:
    mode, folder, *rest = sys.argv[1:]
    path = Path(folder)
    if mode == "publish":
        asyncio.run(measure_publish(path, int(rest[0]), int(rest[1])))
    elif mode == "two":
        asyncio.run(measure_two(path, int(rest[0]), int(rest[1]), rest[2] if len(rest) > 2 else "event"))
    elif mode == "consume":
        asyncio.run(consume(path, int(rest[0]), rest[1]))
    elif mode == "latency":
        asyncio.run(measure_latency(path, int(rest[0]), int(rest[1])))
    elif mode == "stamp":
        asyncio.run(consume_stamping(path, int(rest[0])))
    elif mode == "once":
        asyncio.run(measure_once(path, int(rest[0]), rest[1]))
    else:
        raise SystemExit(f"no such mode: {mode}")


if __name__ == "__main__":
    main()
