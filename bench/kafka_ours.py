"""unlost on Kafka, measured through its public surface. Each mode runs in processes of its own.

Nothing is switched off: receipts come after the cluster's confirmation, positions are durable in the store before
they count, and at the end the log, the positions, the counts and the digest of the handled events are compared with
what was published.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from common import KEYS, PUBLISHERS, OrderPlaced, PlaceOrder, Stopwatch, answer, order, start
from ours import DEADLINE_SECONDS, STAMP, publish, stamping, unless_it_fails, until_settled

from unlost import App, Event, Service
from unlost.events import event_hash

TOPIC = "order"
PAUSE_SECONDS = 0.002  # between two samples of a closed loop
SLEEP_SECONDS = 0.01  # of a slow handler
RUNNERS = 32
STALL_SECONDS = 8.0  # how long the memory of a stalled service is watched
_64 = (1 << 64) - 1


class JobPlaced(Event, key="order_id", topic="job"):
    order_id: str
    cents: int
    note: str


def app_on(folder: Path, url: str, *services: Service, **more: Any) -> App:
    os.environ["UNLOST_STORE"] = f"embedded://{folder}/store.db"
    return App(*services, broker=url, **more)


async def ends(app: App, topic: str = TOPIC) -> list[int]:
    """The end of each partition of the log."""
    (info,) = await app.broker.topics([topic])
    return [high for _, high in info.ranges]


def check_books(app: App, total: int, high: list[int], digest: int | None = None) -> None:
    """The store says that all are done, up to the end of each partition, and that they are those that were published."""
    rows = app.file.read(
        lambda c: c.execute("select partition, position, counts, digest from unlost_progress").fetchall()
    )
    positions, done, found = {}, 0, 0
    for partition, position, counts, part in rows:
        positions[partition] = position
        for state, count in json.loads(counts).items():
            if state != "done":
                raise SystemExit(f"{count} events of partition {partition} are {state}")
            done += count
        found ^= part
    if [positions[n] for n in range(len(high))] != high or done != total or sum(high) != total:
        raise SystemExit(f"the books do not balance: {total} events, ends {high}, positions {positions}, {done} done")
    if digest is not None and (found ^ digest) & _64:
        raise SystemExit("the events that are done are not those that were published")


# --- the contents of the topic ---------------------------------------------------------------------------------


async def fill(folder: Path, url: str, first: int, total: int) -> None:
    """Publishes `total` events from the `first` on, with receipts; the digest is the set of their ids."""
    batch, callers, digest = 500, 4, 0

    async with app_on(folder, url, counting(0)[0]) as app:

        async def one(number: int) -> None:
            nonlocal digest
            for n in range(first + number * batch, first + total, callers * batch):
                for receipt in await app.publish_all([order(i) for i in range(n, min(n + batch, first + total))]):
                    digest ^= event_hash(app.name, receipt.id)

        await asyncio.gather(*(one(number) for number in range(callers)))
        high = await ends(app)
        if sum(high) != first + total:
            raise SystemExit(f"{first + total} events were published, the log holds {sum(high)}")
    answer({"digest": digest, "ends": high})


# --- consume -----------------------------------------------------------------------------------------------------


def counting(
    total: int, kind: str = "event", guarantee: Any = "at-least-once"
) -> tuple[Service, list[Stopwatch], asyncio.Event]:
    """A service with a handler that does nothing; the watch starts with its first event."""
    service = Service(f"billing-{time.time_ns()}", guarantee=guarantee)  # a group of its own on the cluster
    watch: list[Stopwatch] = []
    done = asyncio.Event()
    seen = 0

    @service.on(PlaceOrder if kind == "command" else OrderPlaced)
    async def handle(event: OrderPlaced | PlaceOrder) -> None:
        nonlocal seen
        seen += 1
        if seen == 1:
            watch.append(Stopwatch())
        if seen == total:
            done.set()

    return service, watch, done


async def measure_consume(folder: Path, url: str, total: int, digest: int, guarantee: str) -> None:
    """A backlog: from the first event handled to the durable position of all."""
    service, watch, done = counting(total, guarantee=guarantee)
    async with app_on(folder, url, service) as app:
        task = asyncio.create_task(app.serve())
        await unless_it_fails(task, done.wait(), DEADLINE_SECONDS + total / 5000)
        await until_settled(app, total)
        result: dict[str, Any] = watch[0].stop()
        result |= {"events": total, "memory": resident()}
        high = await ends(app)
        app.stop()
        await task
        check_books(app, total, high, digest)
    answer(result)


async def measure_work(folder: Path, url: str, total: int, kind: str) -> None:
    """From the first call, one for each, to the durable position of all, in one process."""
    topic = "orders" if kind == "command" else TOPIC
    warm = PUBLISHERS * 20
    service, _, done = counting(warm + total, kind)
    async with app_on(folder, url, service) as app:
        task = asyncio.create_task(app.serve())
        await publish(app, 0, warm, PUBLISHERS, kind)
        await until_settled(app, warm)
        watch = Stopwatch()
        await publish(app, warm, total, PUBLISHERS, kind)
        await unless_it_fails(task, done.wait(), DEADLINE_SECONDS)
        await until_settled(app, warm + total)
        result: dict[str, Any] = watch.stop()
        high = await ends(app, topic)
        app.stop()
        await task
        check_books(app, warm + total, high)
    answer(result | {"events": total})


# --- publish -----------------------------------------------------------------------------------------------------


async def measure_publish(folder: Path, url: str, total: int) -> None:
    """A closed loop: each publisher sends its next event when the one before is confirmed."""
    async with app_on(folder, url, counting(0)[0]) as app:
        warm = PUBLISHERS * 20
        await publish(app, 0, warm, PUBLISHERS)
        watch = Stopwatch()
        await publish(app, warm, total, PUBLISHERS)
        result: dict[str, Any] = watch.stop()
        high = await ends(app)
        if sum(high) != warm + total:
            raise SystemExit(f"{warm + total} receipts, and the log holds {sum(high)} events")
    answer(result | {"events": total, "warm": warm})


async def measure_one(folder: Path, url: str, samples: int) -> None:
    """One publisher: the time of each call."""
    async with app_on(folder, url, counting(0)[0]) as app:
        warm = 200
        await publish(app, 0, warm, 1)
        times = []
        for n in range(samples):
            began = time.monotonic_ns()
            await app.publish(order(n))
            times.append((time.monotonic_ns() - began) / 1000)
        high = await ends(app)
        if sum(high) != warm + samples:
            raise SystemExit(f"{warm + samples} receipts, and the log holds {sum(high)} events")
    answer({"times": times})


# --- latency -----------------------------------------------------------------------------------------------------


async def consume_stamping(folder: Path, url: str, write_to: int) -> None:
    async with app_on(folder, url, stamping(write_to)) as app:
        task = asyncio.create_task(app.serve())
        await asyncio.to_thread(sys.stdin.read)
        app.stop()
        await task
        high = await ends(app)
        check_books(app, sum(high), high)


async def measure_latency(folder: Path, url: str, samples: int, processes: int) -> None:
    """One event at a time, each sent when the one before is settled."""
    stamps, write_to = os.pipe()
    os.set_inheritable(write_to, True)
    arrived: asyncio.Queue[int] = asyncio.Queue()

    def read() -> None:
        for (at,) in STAMP.iter_unpack(os.read(stamps, STAMP.size * 1024)):
            arrived.put_nowait(at)

    asyncio.get_running_loop().add_reader(stamps, read)
    async with app_on(folder, url, stamping(write_to)) as app:
        if processes == 2:
            other = start("kafka_ours.py", "stamp", folder, url, write_to, stdin=-1, close_fds=False)
        else:
            task = asyncio.create_task(app.serve())
        warm = 2000
        for n in range(0, warm, 500):
            await app.publish_all([order(i) for i in range(n, n + 500)])
        for _ in range(warm):
            await asyncio.wait_for(arrived.get(), DEADLINE_SECONDS)
        await until_settled(app, warm)
        publishes, starts = [], []
        for n in range(samples):
            began = time.monotonic_ns()
            await app.publish(order(n))
            publishes.append((time.monotonic_ns() - began) / 1000)
            starts.append((await asyncio.wait_for(arrived.get(), DEADLINE_SECONDS) - began) / 1000)
            await until_settled(app, warm + n + 1, 0.0005)
            await asyncio.sleep(PAUSE_SECONDS)
        if processes == 2:
            assert other.stdin is not None
            other.stdin.close()
            if await asyncio.to_thread(other.wait) != 0:
                raise SystemExit("the consumer failed")
        else:
            app.stop()
            await task
        high = await ends(app)
        check_books(app, warm + samples, high)
    answer({"publish": publishes, "start": starts})


# --- slow handlers, one partition ------------------------------------------------------------------------------


async def measure_lanes(folder: Path, url: str, total: int) -> None:
    """Handlers that wait, many keys, one partition: how many are at work at once; the order of each key is checked."""
    from unlost import Topic

    service = Service(f"slow-{time.time_ns()}", concurrency=RUNNERS)
    last: dict[str, int] = {}
    done = asyncio.Event()
    seen = running = most = 0
    watch: list[Stopwatch] = []
    busy: set[str] = set()

    @service.on(JobPlaced)
    async def handle(event: JobPlaced) -> None:
        nonlocal seen, running, most
        if not watch:
            watch.append(Stopwatch())
        if event.order_id in busy or last.get(event.order_id, -1) >= event.cents:
            raise SystemExit(f"the order of the key {event.order_id} is broken")
        busy.add(event.order_id)
        running += 1
        most = max(most, running)
        await asyncio.sleep(SLEEP_SECONDS)
        running -= 1
        busy.discard(event.order_id)
        last[event.order_id] = event.cents
        seen += 1
        if seen == total:
            done.set()

    async with app_on(folder, url, service, topics=[Topic("job", partitions=1)]) as app:
        for n in range(0, total, 500):
            await app.publish_all(
                [
                    JobPlaced(order_id=f"o-{i % KEYS:04d}", cents=i, note="x" * 160)
                    for i in range(n, min(n + 500, total))
                ]
            )
        task = asyncio.create_task(app.serve())
        await unless_it_fails(task, done.wait())
        await until_settled(app, total)
        result: dict[str, Any] = watch[0].stop()
        app.stop()
        await task
        check_books(app, total, await ends(app, "job"))
    if last != {f"o-{k:04d}": max(range(k, total, KEYS)) for k in range(min(KEYS, total))}:
        raise SystemExit("not every key ended with its last event")
    answer(result | {"events": total, "most": most})


async def measure_sequential(total: int) -> None:
    """One at a time: what the same handlers need without us."""
    watch = Stopwatch()
    for _ in range(total):
        await asyncio.sleep(SLEEP_SECONDS)
    answer(watch.stop() | {"events": total})


# --- memory ------------------------------------------------------------------------------------------------------


def resident() -> float:
    """Memory of this process, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


async def measure_stall(folder: Path, url: str, stalls: str) -> None:
    """Handlers that never return, over a backlog: `all` of them, or those of `one` key."""
    service = Service(f"stalled-{time.time_ns()}", deadline="1h")
    seen = 0
    for_ever = asyncio.Event()

    @service.on(OrderPlaced)
    async def handle(event: OrderPlaced) -> None:
        nonlocal seen
        seen += 1
        if stalls == "all" or event.order_id == "o-0000":
            await for_ever.wait()

    async with app_on(folder, url, service) as app:
        before = resident()
        task = asyncio.create_task(app.serve())
        most = before
        end = time.monotonic() + STALL_SECONDS
        while time.monotonic() < end:
            await asyncio.sleep(0.1)
            most = max(most, resident())
            if task.done():
                await task
        answer({"before": before, "most": most, "growth": most - before, "seen": seen})
        sys.stdout.flush()
        os._exit(0)  # as a crash would be: the handlers never return


def main() -> None:
    mode, folder, url, *rest = sys.argv[1:]
    path, values = Path(folder), [int(text) if text.lstrip("-").isdigit() else text for text in rest]
    jobs = {
        "fill": fill, "consume": measure_consume, "work": measure_work, "publish": measure_publish, "one": measure_one,
        "latency": measure_latency, "stamp": consume_stamping, "lanes": measure_lanes, "stall": measure_stall,
    }  # fmt: skip
    if mode == "sequential":
        asyncio.run(measure_sequential(*values))
    else:
        asyncio.run(jobs[mode](path, url, *values))


if __name__ == "__main__":
    main()
