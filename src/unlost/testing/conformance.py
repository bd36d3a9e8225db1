"""What the suites `check_broker` and `check_store` are made of: scenarios, their results, and real child processes.

A scenario is one small async function. Its docstring is the promise that it holds an adapter to, in one sentence that
also stands in the docs. An adapter that does not declare the ability which a scenario needs is not held to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import msgspec

from unlost.brokers.connect import connect
from unlost.brokers.port import Broker
from unlost.errors import UnlostError
from unlost.events import Envelope, encode_head
from unlost.events.topic import Arrival
from unlost.world import REAL, new_id, rfc3339

SCENARIO_SECONDS = 60.0  # a scenario that takes longer has hung
UNTIL_SECONDS = 30.0  # how long anything may take to happen, where no promise says less
LOOK_SECONDS = 0.01

C = TypeVar("C", bound="Case")
Verdict = Literal["kept", "not promised", "broken"]
OpenBroker = Callable[[str], AbstractAsyncContextManager[Broker]]


class PromiseBroken(AssertionError):
    """What a scenario saw is not what the port promises."""


def expect(condition: object, what: str) -> None:
    """Unlike `assert`, also under `python -O`: the suites are run by whoever writes an adapter."""
    if not condition:
        raise PromiseBroken(what)


def same(got: object, wanted: object, what: str) -> None:
    if got != wanted:
        raise PromiseBroken(f"{what}\n  wanted: {repr(wanted)[:2000]}\n  got:    {repr(got)[:2000]}")


class Result(NamedTuple):
    """What became of one scenario."""

    name: str
    promise: str
    verdict: Verdict
    reason: str = ""
    error: BaseException | None = None

    def confirm(self) -> None:
        """Raises what the scenario raised, if it is broken."""
        if self.error is not None:
            raise self.error


class Scenario(NamedTuple, Generic[C]):
    """One promise, and how it is put to the test. `needs` names the ability without which it is not promised."""

    name: str
    promise: str
    needs: str
    run: Callable[[C], Awaitable[None]]

    def __str__(self) -> str:
        return self.name

    async def check(self, case: C) -> Result:
        """Runs the scenario on `case`, which is used up by it."""
        try:
            async with asyncio.timeout(SCENARIO_SECONDS), case:
                if self.needs and not await case.promises(self.needs):
                    reason = f"the adapter does not declare `{self.needs}`"
                    return Result(self.name, self.promise, "not promised", reason)
                await self.run(case)
        except Exception as e:
            reason = f"{type(e).__name__}: {e}" if str(e) else f"{type(e).__name__} after {SCENARIO_SECONDS:g} s"
            return Result(self.name, self.promise, "broken", reason, e)
        return Result(self.name, self.promise, "kept")


def scenario(into: list[Scenario[C]], needs: str = "") -> Callable[[Callable[[C], Awaitable[None]]], Scenario[C]]:
    """Puts an async function into a suite."""

    def register(run: Callable[[C], Awaitable[None]]) -> Scenario[C]:
        promise = " ".join((run.__doc__ or "").split())
        made = Scenario(run.__name__, promise, needs, run)
        into.append(made)
        return made

    return register


def chosen(suite: Sequence[Scenario[C]], only: Sequence[str]) -> list[Scenario[C]]:
    """The scenarios with these names; all of them if none is named."""
    unknown = set(only) - {s.name for s in suite}
    expect(not unknown, f"the suite has no scenario {', '.join(sorted(unknown))}")
    return [s for s in suite if not only or s.name in only]


@contextlib.asynccontextmanager
async def broker_at(url: str) -> AsyncIterator[Broker]:
    """Opens the broker behind a URL, as another process would."""
    broker, file = await asyncio.to_thread(connect, url)
    try:
        await broker.open()
        try:
            yield broker
        finally:
            await broker.close()
    finally:
        if file is not None:
            await asyncio.to_thread(file.close)


class Case:
    """One run of one scenario. Ends everything that it began, also child processes."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._stack = AsyncExitStack()
        self._salt = new_id()[-8:]
        self._names = 0

    async def __aenter__(self) -> Case:
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._stack.__aexit__(*error)

    async def promises(self, ability: str) -> bool:
        raise NotImplementedError

    def name(self, stem: str) -> str:
        """A name that nobody else uses: a real server is shared by all scenarios, and by what ran before."""
        self._names += 1
        return f"{stem}-{self._salt}-{self._names}"

    async def child(self, role: str, opener: Callable[..., Any], **args: Any) -> Child:
        """A process of its own, for whatever must really die or really stop. See `conformance_child`."""
        child = Child()
        self._stack.push_async_callback(child.end)
        await child.start({"role": role, "url": self.url, "open": f"{opener.__module__}:{opener.__qualname__}", **args})
        return child


class Child:
    """A real process beside ours. It says JSON lines and hears words."""

    def __init__(self) -> None:
        self.said: list[dict[str, Any]] = []
        self._process: asyncio.subprocess.Process | None = None
        self._listening: asyncio.Task[None] | None = None

    async def start(self, task: dict[str, Any]) -> None:
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)  # noqa: PTH109
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "unlost.testing.conformance_child", msgspec.json.encode(task).decode(),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=1 << 26,
            env=os.environ | {"PYTHONPATH": path},
        )  # fmt: skip
        self._listening = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        async for line in self._process.stdout:
            if line.endswith(b"\n"):  # the last line of a killed process may be cut off
                self.said.append(msgspec.json.decode(line))

    def heard(self, word: str) -> list[Any]:
        """Everything that the child said under this word."""
        return [line[word] for line in self.said if word in line]

    async def until(self, word: str, count: int = 1, seconds: float = UNTIL_SECONDS) -> list[Any]:
        """What the child said under this word, when it has said it `count` times."""
        assert self._listening is not None
        listening = self._listening
        await until(
            lambda: len(self.heard(word)) >= count or listening.done(), f"a child says {word!r} {count} times", seconds
        )
        heard = self.heard(word)
        expect(len(heard) >= count, f"a child ended before it said {word!r} {count} times")
        return heard

    def tell(self, word: str) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(word.encode() + b"\n")

    def stop(self) -> None:
        """Stops it where it stands, as a machine does that is suspended."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    async def kill(self) -> None:
        """`kill -9`; returns when it is dead and everything that it had said was heard."""
        assert self._process is not None and self._listening is not None
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
        await self._listening

    async def wait(self) -> int:
        """Its exit code, when it has ended by itself."""
        assert self._process is not None and self._listening is not None
        async with asyncio.timeout(UNTIL_SECONDS):
            code = await self._process.wait()
            await self._listening
        return code

    async def end(self) -> None:
        if self._process is not None and self._listening is not None:
            await self.kill()


async def until(condition: Callable[[], object], what: str, seconds: float = UNTIL_SECONDS) -> float:
    """Waits for a condition and returns how long that took, in seconds."""
    began = REAL.monotonic()
    while not condition():
        if REAL.monotonic() - began > seconds:
            raise PromiseBroken(f"did not happen within {seconds:g} s: {what}")
        await asyncio.sleep(LOOK_SECONDS)
    return REAL.monotonic() - began


async def refused(call: Awaitable[object], kind: type[UnlostError], what: str) -> UnlostError:
    """The error of a call that must be refused in this way. Anything else is a broken promise."""
    try:
        await call
    except kind as e:
        return e
    except Exception as e:
        raise PromiseBroken(f"{what}: wanted {kind.__name__}, got {type(e).__name__}: {e}") from e
    raise PromiseBroken(f"{what}: nothing was refused")


def envelope(topic: str, key: bytes | None = b"key", data: bytes | None = b"{}", **attributes: Any) -> Envelope:
    """A small event of its own identity."""
    given = {"id": new_id(), "source": "conformance", "type": "test.Happened", "time": rfc3339(REAL.now())} | attributes
    return Envelope(topic=topic, key=key, data=data, **given)


def arrival_of(event: Envelope, position: int) -> Arrival:
    """The event as a broker would hand it over."""
    return Arrival(position, event, REAL.now(), encode_head(event), event.key, event.data)
