"""What attacks on the running system have found: each is a test now."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from unlost import App, Event, Reject, Service, Topic, UnlostError, UsageError
from unlost.ops import shelf
from unlost.ops.books import books
from unlost.sqlite.file import File
from unlost.store.port import DeadLetter
from unlost.store.records import FileRecords


class Placed(Event, key="order_id", topic="order"):
    order_id: str
    n: int = 0


async def until(true: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + 20
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(f"waited in vain for: {what}")
        await asyncio.sleep(0.01)


def done(file: File) -> int:
    return books(FileRecords(file)).services["s"].done


async def test_a_unit_that_a_zombie_took_and_left_is_taken_again(tmp_path: Path) -> None:
    """A process that is replaced between its assignment and its `take` fences its successor when it wakes up, and
    then leaves the unit: its successor is the only one whom the broker still names as its owner."""
    service = Service("s")

    @service.on(Placed)
    async def handle(_: Placed) -> None:
        pass

    app = App(service, broker=f"embedded://{tmp_path}/events.db", topics=[Topic("order", partitions=2)])
    async with app:
        serving = asyncio.create_task(app.serve())
        await app.publish_all([Placed(order_id=f"o{n}") for n in range(20)])
        await until(lambda: done(app.file) == 20, "the first events")
        await app.file.write(lambda tx: tx.execute("update unlost_progress set epoch = epoch + 1").fetchall())
        await app.publish_all([Placed(order_id=f"o{n}") for n in range(20)])
        await until(lambda: done(app.file) == 40, "the events after the fencing")
        app.stop()
        await serving
        assert books(FileRecords(app.file)).balanced


async def test_many_tasks_that_enter_an_app_at_once_share_its_connection(tmp_path: Path) -> None:
    app = App(broker=f"embedded://{tmp_path}/events.db")
    files: set[File] = set()
    all_in = asyncio.Barrier(10)

    async def one(n: int) -> None:
        async with app:
            files.add(app.file)
            await all_in.wait()
            await app.publish(Placed(order_id="a", n=n))

    async with asyncio.TaskGroup() as group:
        for n in range(10):
            group.create_task(one(n))
    assert len(files) == 1
    for file in files:
        with pytest.raises(UsageError):  # and the last one has closed it
            file.write_sync(lambda tx: None)


def test_publish_sync_is_refused_after_a_fork(tmp_path: Path) -> None:
    app = App(broker=f"embedded://{tmp_path}/events.db")
    app.publish_sync(Placed(order_id="a"))

    def child(answer: Connection) -> None:
        try:
            app.publish_sync(Placed(order_id="a"))
        except UnlostError as e:
            answer.send(e.code)
        os._exit(0)

    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(theirs,))
    process.start()
    try:
        assert ours.poll(20), "the child waits for a thread that only its parent has"
        assert ours.recv() == "UL1113"
    finally:
        process.kill()
        process.join()
    app.publish_sync(Placed(order_id="a"))


def test_publish_sync_that_cannot_connect_leaves_no_thread(tmp_path: Path) -> None:
    (tmp_path / "events.db").mkdir()
    app = App(broker=f"embedded://{tmp_path}/events.db")
    before = threading.active_count()
    for _ in range(5):
        with pytest.raises(UnlostError):
            app.publish_sync(Placed(order_id="a"))
    end = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.active_count() == before


async def test_more_letters_are_asked_for_than_a_statement_has_variables(tmp_path: Path) -> None:
    service = Service("s")

    @service.on(Placed)
    async def handle(_: Placed) -> None:
        raise Reject("no")

    app = App(service, broker=f"embedded://{tmp_path}/events.db")
    async with app:
        serving = asyncio.create_task(app.serve())
        await app.publish(Placed(order_id="a"))
        await until(lambda: books(FileRecords(app.file)).services["s"].dead == 1, "the dead letter")
        letters: list[DeadLetter] = shelf.letters(FileRecords(app.file)) * 300_000
        assert shelf._pending(FileRecords(app.file), letters) == []
        app.stop()
        await serving


async def test_a_timer_that_a_handler_forgot_does_not_take_the_service_down(tmp_path: Path) -> None:
    """It cancels the runner's task when that waits for work: a service without runners would stand still in silence."""
    service = Service("s", concurrency=1)

    @service.on(Placed)
    async def handle(_: Placed) -> None:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().call_later(0.02, task.cancel)
        asyncio.get_running_loop().call_later(0.03, cancelled.set)

    app = App(service, broker=f"embedded://{tmp_path}/events.db")
    async with app:
        serving = asyncio.create_task(app.serve())
        for n in range(3):
            cancelled = asyncio.Event()
            await app.publish(Placed(order_id="a", n=n))
            await until(lambda n=n: done(app.file) == n + 1, "the event after the cancelled one")
            await cancelled.wait()
        app.stop()
        await serving


async def test_a_service_of_which_somebody_cancels_a_task_stops_loudly(tmp_path: Path) -> None:
    app = App(Service("s"), broker=f"embedded://{tmp_path}/events.db")
    async with app:
        serving = asyncio.create_task(app.serve())
        await until(lambda: app._workers and app._workers[0]._tasks, "the service")
        next(task for task in app._workers[0]._tasks if "_keep_time" in repr(task)).cancel()
        with pytest.raises(UsageError, match="UL1224"):
            await serving


def test_threads_that_open_a_file_at_once_are_no_second_library(tmp_path: Path) -> None:
    """One looks at the file while another one begins to use it: a look of ours at a file in use would drop its locks."""
    refused: list[BaseException] = []

    def opens(path: Path, start: threading.Barrier) -> None:
        start.wait(20)
        try:
            File(path).close()
        except BaseException as e:
            refused.append(e)

    for round in range(30):
        start = threading.Barrier(4)
        threads = [threading.Thread(target=opens, args=(tmp_path / f"{round}.db", start)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert refused == []
