"""Deaths: at every step, with work in hand, again and again; suspects; owners that slept through their replacement."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from unlost import App, Context, Event, Retry, Service
from unlost.delivery.service import Guarantee
from unlost.ops.books import books
from unlost.ops.shelf import letters
from unlost.sqlite.file import File
from unlost.store.records import FileRecords
from unlost.testing import running
from unlost.testing.mortal import Step

STEPS = pytest.mark.parametrize("step", ["received", "started", "handled", "settling", "settled"])
GUARANTEES = pytest.mark.parametrize("guarantee", ["at-least-once", "effectively-once"])


class Placed(Event, key="order_id", topic="order"):
    order_id: str
    n: int = 0


class Billed(Event, key="order_id", topic="bill"):
    order_id: str
    n: int = 0


def billing(guarantee: Guarantee) -> tuple[App, Service]:
    service = Service("s", guarantee=guarantee, retry=Retry(attempts=5, first=0.1))

    @service.on(Placed)
    async def bill(e: Placed, ctx: Context) -> None:
        await asyncio.sleep(0)
        ctx.publish(Billed(order_id=e.order_id, n=e.n))

    return App(service), service


@GUARANTEES
@STEPS
async def test_a_crash_at_any_step_loses_nothing_and_publishes_once(step: Step, guarantee: Guarantee) -> None:
    app, service = billing(guarantee)
    async with running(app) as t:
        t.crash(service, after=step, times=4)
        await t.publish_all([Placed(order_id=f"o{n % 6}", n=n) for n in range(60)])
        await t.settled()
        assert t.deaths(service) == 4
        billed = t.published(Billed)
        assert sorted(e.n for e in billed) == list(range(60)), "published with the mark handled, or not at all"
        for key in {e.order_id for e in billed}:
            mine = [e.n for e in billed if e.order_id == key]
            assert mine == sorted(mine)
        assert t.books.services["s"].done == 60


@GUARANTEES
@STEPS
async def test_a_crash_at_any_step_of_a_retry_and_of_a_dead_letter(step: Step, guarantee: Guarantee) -> None:
    service, seen = Service("s", guarantee=guarantee, retry=Retry(attempts=9, first=60, jitter=0)), []
    failures = Counter()

    @service.on(Placed)
    async def handle(e: Placed, ctx: Context) -> None:
        failures[e.n] += 1
        if e.n == 3 or (e.n == 1 and failures[1] < 3):
            raise ValueError("again")
        seen.append(e.n)

    async with running(App(service)) as t:
        for _ in range(5):
            t.crash(service, after=step)
        await t.publish_all([Placed(order_id="a", n=n) for n in range(5)])
        await t.settled()
        assert t.deaths(service) == 5
        letter = t.dead(handle)
        assert letter.key == b"a" and letter.position == 3
        await t.discard(letter)
        await t.settled()
        assert list(dict.fromkeys(seen)) == [0, 1, 2, 4]


@STEPS
async def test_a_crash_in_the_middle_of_a_redrive(step: Step) -> None:
    service, seen, bad = Service("s", retry=Retry(attempts=5)), [], {0}

    @service.on(Placed)
    async def handle(e: Placed) -> None:
        if e.n in bad:
            raise NotImplementedError("bad")
        seen.append(e.n)

    async with running(App(service)) as t:
        await t.publish_all([Placed(order_id="a", n=n) for n in range(4)])
        await t.settled()
        bad.clear()
        t.crash(service, after=step, times=3)
        await t.redrive(t.dead(handle))
        await t.settled()
        assert list(dict.fromkeys(seen)) == [0, 1, 2, 3] and seen[-1] == 3
        assert t.deaths(service) >= 1  # all four may be settled in one commit
        assert t.books.services["s"].done == 4


async def test_what_else_was_in_hand_when_a_process_died_is_delivered_again_one_at_a_time() -> None:
    service, together, most, calls = Service("s", concurrency=8), 0, 0, Counter()
    first = asyncio.Event()

    @service.on(Placed)
    async def handle(e: Placed) -> None:
        nonlocal together, most
        calls[e.n] += 1
        together += 1
        most = max(most, together)
        try:
            if not first.is_set():
                await asyncio.Event().wait()
            await asyncio.sleep(0.001)
        finally:
            together -= 1

    async with running(App(service)) as t:
        await t.publish_all([Placed(order_id=f"o{n}", n=n) for n in range(8)])
        await t.until(lambda: together == 8)
        process = t._processes["s"][0]
        process.die()
        await t.until(lambda: together == 0)
        first.set()
        most = 0
        await t.settled()
        assert calls == dict.fromkeys(range(8), 2)
        assert most == 1, "any of them may have killed the process"
        await t.publish_all([Placed(order_id=f"o{n}", n=n + 10) for n in range(8)])
        await t.settled()
        assert most > 1, "afterwards they run side by side again"


async def test_two_processes_one_dies_the_other_takes_over() -> None:
    app, service = billing("effectively-once")
    async with running(app) as t:
        await t.scale(2)
        t.crash(service, after="handled", times=3)
        for n in range(0, 100, 10):
            await t.publish_all([Placed(order_id=f"o{i % 9}", n=i) for i in range(n, n + 10)])
            await asyncio.sleep(0)
        await t.settled()
        assert sorted(e.n for e in t.published(Billed)) == list(range(100))


async def test_an_owner_that_slept_through_its_replacement_writes_nothing() -> None:
    """The first is stopped inside its handler (as SIGSTOP would), a second one takes its units, the first wakes up."""
    service, entered, release, runs = Service("s", guarantee="effectively-once"), asyncio.Event(), asyncio.Event(), []
    app = App(service)

    @service.on(Placed)
    async def bill(e: Placed, ctx: Context) -> None:
        runs.append(e.n)
        ctx.publish(Billed(order_id=e.order_id, n=len(runs)))
        if len(runs) == 1:
            entered.set()
            await release.wait()

    async with running(app) as t:
        await t.publish(Placed(order_id="a"))
        await entered.wait()
        sleeper = t._workers()[0]
        # what the others do to a process that they take for dead
        await app.file.write(lambda tx: tx.execute("delete from unlost_member").fetchall())
        await app.file.write(lambda tx: tx.execute("update unlost_assignment set process = null").fetchall())
        units = list(sleeper.owned)
        taken = await app.store.take(units)
        assert {x.epoch for x in taken} == {2}
        release.set()
        await t.until(lambda: all(o.epoch != 1 for o in sleeper.owned.values()))
        await t.settled()  # it joined anew and took the units back: as a new owner
        assert runs == [0, 0]
        assert [e.n for e in t.published(Billed)] == [2], "what it had decided as the old owner is void"
        assert t.books.services["s"].done == 1


# --- the real thing: kill -9 from inside a handler -------------------------------------------------------------

PROGRAM = """
import asyncio, os, sys
from unlost import App, Event, Retry, Service

class Placed(Event, key="order_id", topic="order"):
    order_id: str
    n: int = 0

service = Service("s", retry=Retry(attempts=3, first=0), concurrency=8)

@service.on(Placed)
async def handle(e: Placed) -> None:
    print(f"{e.order_id} {e.n}", file=open(sys.argv[1] + "/log", "a"))
    if e.order_id == "poison":
        os.kill(os.getpid(), 9)
    await asyncio.sleep(0.01)

app = App(service, broker=f"embedded://{sys.argv[1]}/events.db")

async def main():
    async with app:
        if sys.argv[2] == "publish":
            await app.publish_all([Placed(order_id=o, n=n) for n in range(5) for o in ("a", "b", "poison", "c", "d")])
        else:
            await app.serve()

asyncio.run(main())
"""


def test_an_event_that_kills_its_process_ends_on_the_shelf(tmp_path: Path) -> None:
    """With innocent events in hand beside it: they must not be blamed, and not be lost."""
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    argv = [sys.executable, str(script), str(tmp_path)]
    subprocess.run([*argv, "publish"], check=True, timeout=30)

    def finished(file: File) -> bool:
        book = books(FileRecords(file)).services["s"]
        return book.done == 20 and book.dead == 1 and book.parked == 4

    deaths, end = 0, time.monotonic() + 60
    process = subprocess.Popen([*argv, "serve"])
    file = File(tmp_path / "events.db")
    try:
        while not finished(file):
            assert time.monotonic() < end, books(FileRecords(file))
            if process.poll() is not None:
                assert process.returncode == -9
                deaths += 1
                process = subprocess.Popen([*argv, "serve"])
            time.sleep(0.01)
        [letter] = letters(FileRecords(file))
        assert (letter.reason, letter.key) == ("process_killed", b"poison")
        assert "its process was killed" in letter.error
        assert len(letter.attempts) == 3
        assert deaths == 4, "once in company, then three times alone"
        assert books(FileRecords(file)).unaccounted == 0
    finally:
        process.terminate()
        process.wait(20)
        file.close()
    log = Counter(line.split()[0] for line in (tmp_path / "log").read_text().splitlines())
    assert log["poison"] == 4


def test_a_terminated_process_gives_back_and_another_goes_on(tmp_path: Path) -> None:
    """SIGTERM during work: nothing is dropped, nothing is done twice, and the exit code says so."""
    script = tmp_path / "program.py"
    script.write_text(
        PROGRAM.replace('"poison", ', "").replace("range(5)", "range(50)").replace("await app.serve()", "pass")
        + "\nif sys.argv[2] == 'serve':\n    app.run()\n"
    )
    argv = [sys.executable, str(script), str(tmp_path)]
    subprocess.run([*argv, "publish"], check=True, timeout=30)
    log = tmp_path / "log"

    def lines() -> int:
        return len(log.read_text().splitlines()) if log.exists() else 0

    end = time.monotonic() + 60
    stops = 0
    while lines() < 200:
        before = lines()
        process = subprocess.Popen([*argv, "serve"], stderr=subprocess.DEVNULL)
        while lines() < min(200, before + 30):
            assert time.monotonic() < end
            time.sleep(0.002)
        process.terminate()
        assert process.wait(20) == 0
        stops += 1
    assert stops > 3
    seen = [tuple(line.split()) for line in log.read_text().splitlines()]
    assert len(seen) == len(set(seen)) == 200
    for key in "abcd":
        assert [int(n) for k, n in seen if k == key] == list(range(50))


def test_the_program_above_prints_nothing_odd(tmp_path: Path) -> None:
    """A worker that starts and stops at once leaves in peace."""
    script = tmp_path / "program.py"
    script.write_text(
        PROGRAM.replace(
            "await app.serve()", "app.stop(); task = asyncio.create_task(app.serve(ready=app.stop)); await task"
        )
    )
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "serve"], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "events.db").exists()
