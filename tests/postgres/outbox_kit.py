"""An App at work in a thread of its own, and what arrives at its services: the other side of `app.outbox`."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, TypeVar
from uuid import uuid4

from session_kit import Program

from unlost import App, Context, Event, Outbox, Service
from unlost.events import Envelope

SECONDS = 30.0
T = TypeVar("T")


class Placed(Event, key="order_id", topic="order"):
    order_id: str
    n: int = 0
    note: str = ""


class Shipped(Event, key="order_id", topic="order", version=3):
    order_id: str
    tags: tuple[str, ...] = ()


class Sealed(Event, key="code", topic="seal"):
    code: bytes


class Noted(Event, topic="note"):
    text: str


class Counted(Event, key="number", topic="count"):
    number: int


KINDS: tuple[type[Event], ...] = (Placed, Shipped, Sealed, Noted, Counted)


def fresh(word: str = "o") -> str:
    """A key or an id that nobody else has."""
    return f"{word}-{uuid4().hex[:12]}"


def until(holds: Callable[[], T], what: str = "", seconds: float = SECONDS) -> T:
    """Waits until something is so; returns what it was."""
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, f"it did not happen within {seconds:g} s: {what}"
        time.sleep(0.005)
    return found


class Work:
    """`app.serve()` in a thread, until the block ends; `at_end` is awaited in its event loop, however it ends."""

    def __init__(self, app: App, at_end: Callable[[], Awaitable[object]] | None = None) -> None:
        self.app = app
        self._at_end = at_end
        self.error: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="work")

    def __enter__(self) -> Work:
        self._thread.start()
        until(lambda: self._ready.is_set() or not self._thread.is_alive(), "the App is ready")
        if self.error is not None:
            self._thread.join()
            raise self.error
        return self

    def _run(self) -> None:
        async def main() -> None:
            self._loop = asyncio.get_running_loop()
            try:
                await self.app.serve(ready=self._ready.set)
            finally:
                if self._at_end is not None:
                    await self._at_end()

        try:
            asyncio.run(main())
        except BaseException as e:
            self.error = e

    def call(self, awaitable: Any) -> Any:
        """Something to be awaited in the App's own event loop."""
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(awaitable, self._loop).result(SECONDS)

    def ended(self) -> BaseException | None:
        """After it has ended by itself: why."""
        self._thread.join(SECONDS)
        assert not self._thread.is_alive(), "it goes on"
        return self.error

    def stop(self) -> None:
        with contextlib.suppress(RuntimeError):  # its loop has ended
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self.app.stop)
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()

    def __exit__(self, kind: object, *_: object) -> None:
        self.stop()
        if kind is None and self.error is not None:
            raise self.error


class Arrivals:
    """A service that takes everything, in the order in which it comes."""

    def __init__(self, name: str = "arrivals") -> None:
        self.service = Service(name)
        self.envelopes: list[Envelope] = []
        self._changed = threading.Condition()
        for cls in KINDS:
            self.service.on(cls, name=cls.__name__)(self._take)

    async def _take(self, event: Any, ctx: Context) -> None:
        with self._changed:
            self.envelopes.append(ctx.envelope)
            self._changed.notify_all()

    def of(self, *ids: str) -> list[Envelope]:
        """These events, when all have come; in the order in which they came."""
        wanted = set(ids)
        with self._changed:
            came = self._changed.wait_for(lambda: wanted <= {e.id for e in self.envelopes}, SECONDS)
            missing = wanted - {e.id for e in self.envelopes}
            assert came, f"{len(missing)} of {len(wanted)} have not come: {sorted(missing)[:3]}"
            return [e for e in self.envelopes if e.id in wanted]

    def of_key(self, key: str, count: int) -> list[Envelope]:
        """The events of this key, when so many have come."""
        raw = key.encode()
        with self._changed:
            came = self._changed.wait_for(lambda: sum(e.key == raw for e in self.envelopes) >= count, SECONDS)
            found = [e for e in self.envelopes if e.key == raw]
            assert came, f"{len(found)} of {count} have come"
            return found

    def twice(self) -> list[str]:
        return [id for id, count in Counter(e.id for e in self.envelopes).items() if count > 1]


@contextlib.contextmanager
def outbox(app: App, program: Program) -> Iterator[Outbox]:
    """`with app.outbox(…)` or `async with`, as the program's connection wants it."""
    made = app.outbox(program.connection)
    if not program.ours.is_async:
        with made as block:
            yield block
        return
    block = program.run(made.__aenter__())
    try:
        yield block
    except BaseException as e:
        program.run(made.__aexit__(type(e), e, e.__traceback__))
        raise
    program.run(made.__aexit__(None, None, None))


def close(*apps: App) -> None:
    """Ends what Apps have opened for `app.outbox` that were never entered; programs leave that to their end."""
    for app in apps:
        for door in app._doors.values():
            door.close()


def ids(envelopes: Sequence[Envelope]) -> list[str]:
    return [e.id for e in envelopes]
