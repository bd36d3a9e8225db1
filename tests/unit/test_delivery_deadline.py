"""Handlers that hang, swallow cancellation, end the program, live in threads, or are no handlers at all."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest

from unlost import App, Context, Event, Retry, Service, UsageError
from unlost.delivery import worker as worker_module
from unlost.delivery.worker import Worker
from unlost.testing import running


class Placed(Event, key="order_id", topic="order"):
    order_id: str
    n: int = 0


def app_of(service: Service) -> App:
    return App(service)


async def test_a_hanging_async_handler_fails_at_its_deadline_and_is_tried_again() -> None:
    service, attempts = Service("s", deadline=30, retry=Retry(attempts=3, first=0)), []

    @service.on(Placed)
    async def handle(e: Placed, ctx: Context) -> None:
        attempts.append(ctx.attempt)
        if ctx.attempt < 3:
            await asyncio.Event().wait()

    async with running(app_of(service), patience=0.2) as t:
        begin = t.clock.now()
        await t.publish(Placed(order_id="a"))
        await t.settled()
        assert attempts == [1, 2, 3]
        assert 60 <= (t.clock.now() - begin) / 1e6 < 62


async def test_a_handler_that_always_hangs_ends_on_the_shelf() -> None:
    service = Service("s", deadline="5s", retry=Retry(attempts=2, first=0))

    @service.on(Placed)
    async def handle(e: Placed) -> None:
        await asyncio.Event().wait()

    async with running(app_of(service), patience=0.1) as t:
        await t.publish(Placed(order_id="a"))
        await t.settled()
        letter = t.dead(handle)
        assert (letter.reason, letter.error_type) == ("exhausted", "HandlerTimeout")
        assert "5 s" in letter.error


async def test_a_handler_that_swallows_cancellation_is_cancelled_again_and_has_failed() -> None:
    service, swallowed = Service("s", deadline=5, retry=Retry(attempts=1)), []

    @service.on(Placed)
    async def handle(e: Placed) -> None:
        for _ in range(3):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                swallowed.append(1)
        # it returns as if all were well: too late all the same

    async with running(app_of(service), patience=0.1) as t:
        await t.publish(Placed(order_id="a"))
        await t.settled()
        assert len(swallowed) == 3
        assert t.dead(handle).error_type == "HandlerTimeout"
        await t.publish(Placed(order_id="b"))  # the runner was not harmed
        await t.settled()
        assert len(t.dead_letters(handle)) == 2


async def test_a_handler_that_never_gives_in_does_not_keep_the_service_from_stopping(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_module, "CANCELLED_SECONDS_MAX", 0.2)
    service, over, done = Service("s", deadline=600), threading.Event(), []

    @service.on(Placed)
    async def handle(e: Placed) -> None:
        if e.n:
            done.append(e.n)
            return
        while not over.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                continue

    async with running(app_of(service), check_books=False) as t:
        await t.publish(Placed(order_id="a"))
        worker = t._workers()[0]
        await t.until(lambda: any(run._delivery for run in worker._running.values()))
        await asyncio.wait_for(worker.stop(grace=0.1), 10)
        over.set()
        await t.until(lambda: len(asyncio.all_tasks()) <= 2)
        assert t.books.unaccounted == 0
        assert t.books.services["s"].done == 0


async def test_a_cancelled_error_inside_a_handler_is_a_failure_not_a_success() -> None:
    service, attempts = Service("s", retry=Retry(attempts=2, first=0)), []

    @service.on(Placed)
    async def handle(e: Placed, ctx: Context) -> None:
        attempts.append(ctx.attempt)
        task = asyncio.ensure_future(asyncio.Event().wait())
        task.cancel()
        await task

    async with running(app_of(service)) as t:
        await t.publish(Placed(order_id="a"))
        await t.settled()
        assert attempts == [1, 2]
        assert t.dead(handle).error_type == "CancelledError"


@pytest.mark.parametrize("how", ["async", "thread"])
@pytest.mark.parametrize(
    "error", [SystemExit(1), asyncio.CancelledError(), GeneratorExit(), BaseException("x"), StopIteration("y"), StopAsyncIteration()],
    ids=lambda e: type(e).__name__,
)  # fmt: skip
async def test_whatever_a_handler_raises_is_its_own_failure(how: str, error: BaseException) -> None:
    service = Service("s", retry=Retry(attempts=2, first=0), deadline=5)
    good: list[str] = []

    if how == "async":

        @service.on(Placed)
        async def handle(e: Placed) -> None:
            if e.n == 0:
                raise error
            good.append(e.order_id)

    else:

        @service.on(Placed)
        def handle(e: Placed) -> None:  # type: ignore[no-redef]
            if e.n == 0:
                raise error
            good.append(e.order_id)

    async with running(app_of(service), patience=0.2) as t:
        await t.publish_all([Placed(order_id="a"), Placed(order_id="b", n=1)])
        await t.settled()
        letter = t.dead("handle")
        assert letter.reason == "exhausted" and letter.key == b"a"
        assert good == ["b"]


async def test_inner_timeouts_and_task_groups_of_a_handler_are_its_own() -> None:
    service, log = Service("s", deadline=5, retry=Retry(attempts=2, first=0)), []

    @service.on(Placed)
    async def handle(e: Placed, ctx: Context) -> None:
        try:
            async with asyncio.timeout(0.01):
                await asyncio.Event().wait()
        except TimeoutError:
            log.append("inner")
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.sleep(0))
            if ctx.attempt == 1:
                group.create_task(asyncio.Event().wait())  # type: ignore[arg-type]

    async with running(app_of(service), patience=0.3) as t:
        await t.publish(Placed(order_id="a"))
        await t.settled()
        assert log == ["inner", "inner"]
        assert t.books.services["s"].done == 1


# --- threads -------------------------------------------------------------------------------------------------


async def test_sync_handlers_run_in_threads_side_by_side() -> None:
    service, names = Service("s", concurrency=4), set()
    together = threading.Barrier(4)

    @service.on(Placed)
    def handle(e: Placed) -> None:
        names.add(threading.current_thread().name)
        together.wait(10)

    async with running(app_of(service)) as t:
        await t.publish_all([Placed(order_id=f"o{n}") for n in range(4)])
        await t.settled()
        assert len(names) == 4 and threading.current_thread().name not in names


async def test_a_hanging_sync_handler_fails_at_its_deadline_and_can_write_nothing_later() -> None:
    service, release = Service("s", deadline=5, retry=Retry(attempts=2, first=0)), threading.Event()
    late: list[object] = []

    @service.on(Placed)
    def handle(e: Placed, ctx: Context) -> None:
        if ctx.attempt > 1:
            return
        release.wait(20)
        for act in (lambda: ctx.publish(Placed(order_id="late")), lambda: ctx.transaction()):
            try:
                act()
            except UsageError as error:
                late.append(error.code)

    async with running(app_of(service), patience=0.2) as t:
        await t.publish(Placed(order_id="a"))
        await t.settled()
        assert t.books.services["s"].done == 1
        release.set()
        await t.until(lambda: len(late) == 2)
        assert late == ["UL1222", "UL1222"]
        assert len(t.published(Placed)) == 1


async def test_a_coroutine_from_a_sync_function_is_awaited() -> None:
    service, seen = Service("s", retry=Retry(attempts=1)), []

    async def inner(e: Placed) -> None:
        await asyncio.sleep(0)
        if e.n:
            raise ValueError("inner")
        seen.append(e.order_id)

    service.on(Placed, name="outer")(lambda e: inner(e))

    async with running(app_of(service)) as t:
        await t.publish_all([Placed(order_id="a"), Placed(order_id="b", n=1)])
        await t.settled()
        assert seen == ["a"]
        assert t.dead("outer").error == "inner"


async def test_callable_objects_and_methods_are_handlers() -> None:
    seen: list[str] = []

    class Keeper:
        async def __call__(self, e: Placed) -> None:
            seen.append("object")

        async def method(self, e: Placed, ctx: Context) -> None:
            seen.append("method")

    one, two = Service("one"), Service("two")
    one.on(Placed)(Keeper())
    two.on(Placed)(Keeper().method)
    async with running(App(one, two)) as t:
        await t.publish(Placed(order_id="a"))
        await t.settled()
    assert sorted(seen) == ["method", "object"]


def test_generators_are_no_handlers() -> None:
    service = Service("s")
    with pytest.raises(UsageError, match="UL1214"):

        @service.on(Placed)
        def handle(e: Placed) -> Iterator[None]:
            yield

    with pytest.raises(UsageError, match="UL1214"):

        @service.on(Placed)
        async def handle_too(e: Placed):  # type: ignore[no-untyped-def]
            yield


async def test_a_generator_that_hides_is_a_failure_not_a_success() -> None:
    service = Service("s")
    service.on(Placed, name="hidden")(lambda e: (x for x in ()))  # type: ignore[arg-type, return-value]
    async with running(app_of(service)) as t:
        await t.publish(Placed(order_id="a"))
        await t.settled()
        assert t.dead("hidden").reason == "cannot_heal"


async def test_deadlines_hold_in_real_time_too() -> None:
    """The same without the kit's clock."""
    service = Service("s", deadline=0.2, retry=Retry(attempts=2, first=0))

    @service.on(Placed)
    async def handle(e: Placed) -> None:
        await asyncio.sleep(60)

    async with running(app_of(service)) as t:
        worker = Worker(service, t.app.broker, t.app.store)
        await t.scale(0, "s")
        task = asyncio.create_task(worker.run())
        await t.publish(Placed(order_id="a"))
        begin = time.monotonic()
        await t.until(t.dead_letters)
        assert 0.4 <= time.monotonic() - begin < 10
        await worker.stop()
        await task
