"""Health of one process for those who restart it and send it work: `GET /live` and `GET /ready`.

The server has a thread and an event loop of its own, so that it answers also when the event loop of the services does
not; then it says so. It only looks: nothing is changed by a request.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import ipaddress
import json
import logging
import os
import socket
import threading
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping
from typing import Any, NamedTuple, TypeVar

import msgspec

from unlost.app import App
from unlost.errors import UnlostError, UsageError
from unlost.ops.outbox import OutboxStatus, status_of
from unlost.store.connect import is_postgres
from unlost.store.connect import records as records_at
from unlost.store.port import Hold, Look, Records
from unlost.store.records import FileRecords
from unlost.world import REAL

log = logging.getLogger("unlost.health")
T = TypeVar("T")

ANSWER_SECONDS = 2.0  # an event loop that does not answer within it stands still
STORE_SECONDS = 5.0
FRESH_SECONDS = 0.5  # answers are shared: whoever asks more often puts no load on the store
REQUEST_SECONDS = 5.0
REQUEST_BYTES_MAX = 8192
HEADERS_MAX = 64
CONNECTIONS_MAX = 32
LOOPBACK = "127.0.0.1"


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """`said` is for people: what was found, without secrets."""

    name: str
    ok: bool
    said: str


class Address(NamedTuple):
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def address(text: str, source: str = "") -> Address:
    """`8080` (on loopback), `host:8080` or `[::1]:8080`.

    Raises:
        UsageError: it is none of these.

    Example:
        >>> address("8080"), str(address("[::1]:8080"))
        (Address(host='127.0.0.1', port=8080), '[::1]:8080')
    """
    host, colon, port = text.strip().rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""
        port = ""  # IPv6 without its brackets: nobody can say where the port begins
    number = int(port) if port.isascii() and port.isdigit() and len(port) <= 5 else -1
    if not 0 <= number <= 65535 or (colon and not host) or any(c.isspace() or c == "/" for c in host):
        raise UsageError(
            "UL1430", "the address of the health checks is a port, or host:port",
            found=repr(text) + (f" from {source}" if source else ""),
            fix="8080 listens on this machine alone, 0.0.0.0:8080 on all its addresses, [::1]:8080 is IPv6",
        )  # fmt: skip
    return Address(host or LOOPBACK, number)


class Health:
    """Serves the health of an App that runs in this process, over HTTP.

    **Guarantee** a request changes nothing, and none can hold up the services.
    **After a crash** nothing of it is left; the port is free.

    Example:
        with Health(app, address("8080")):
            app.run()
    """

    def __init__(self, app: App, where: Address) -> None:
        """Takes the port.

        Raises:
            UsageError: it is taken, or the address is not one of this machine.
        """
        self._checks = _Checks(app)
        self._socket = _listen(where)
        host, port = self._socket.getsockname()[:2]
        self.address = Address(host, port)
        self._loopback = ipaddress.ip_address(host.partition("%")[0]).is_loopback
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = threading.Event()
        self._leave = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="unlost-health", daemon=True)
        self._open = 0  # connections

    def __enter__(self) -> Health:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        with contextlib.suppress(RuntimeError):  # it has ended by itself, and said why
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._leave.set)
        self._thread.join(ANSWER_SECONDS)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception:
            log.exception("the health checks have failed; the services go on")
        finally:
            self._checks.close()
            self._socket.close()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        server = await asyncio.start_server(self._connected, sock=self._socket, limit=REQUEST_BYTES_MAX)
        if not self._stop.is_set():
            await self._leave.wait()
        server.close()

    # --- one request -------------------------------------------------------------------------------------

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, one request, one answer."""
        self._open += 1
        try:
            if self._open <= CONNECTIONS_MAX:
                async with asyncio.timeout(REQUEST_SECONDS):
                    request = await _read_request(reader)
                status, members = await self._answer(request)
                async with asyncio.timeout(REQUEST_SECONDS):
                    writer.write(_response(status, members))
                    await writer.drain()
        except _Refused as e:
            writer.write(_response(e.status, {"error": e.why}))
        except (OSError, EOFError):
            pass  # whoever asked has gone, or takes for ever to ask
        finally:
            self._open -= 1
            writer.close()

    async def _answer(self, request: _Request) -> tuple[int, dict[str, Any]]:
        if self._loopback and not _names_loopback(request.host):
            raise _Refused(403, "on loopback the Host header must name this machine")
        ask: Callable[[], Awaitable[list[Check]]] | None = {
            "/live": self._checks.live, "/ready": self._checks.ready
        }.get(request.path)  # fmt: skip
        if ask is None:
            raise _Refused(404, "there are /live and /ready")
        if request.method != "GET":
            raise _Refused(405, "GET is all that there is")
        found = await ask()
        ok = all(check.ok for check in found)
        return 200 if ok else 503, {
            "ok": ok, "checks": {check.name: {"ok": check.ok, "said": check.said} for check in found}
        }  # fmt: skip


def _listen(where: Address) -> socket.socket:
    try:
        family, _, _, _, place = socket.getaddrinfo(
            where.host, where.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(place[:2], family=family, backlog=CONNECTIONS_MAX)
    except (OSError, UnicodeError) as e:
        number = getattr(e, "errno", None) or 0  # below 0: a name that means no address
        raise UsageError(
            "UL1431", f"the health checks cannot listen on {where}", found=os.strerror(number) if number > 0 else str(e),
            fix="is another process there (every process needs a port of its own)? Choose another: --http or UNLOST_HTTP",
        ) from None  # fmt: skip


# --- the least of HTTP that is needed ------------------------------------------------------------------------


class _Refused(Exception):
    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status
        self.why = why


class _Request(NamedTuple):
    method: str
    path: str
    host: str


_REASONS = {
    200: "OK", 400: "Bad Request", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed",
    431: "Request Header Fields Too Large", 503: "Service Unavailable",
}  # fmt: skip


async def _read_request(reader: asyncio.StreamReader) -> _Request:
    """A body is not read.

    Raises:
        _Refused: what came is no request, or too much.
    """
    try:
        head = (await reader.readuntil(b"\r\n\r\n"))[:-4]
    except asyncio.LimitOverrunError:
        raise _Refused(431, f"a request has at most {REQUEST_BYTES_MAX} bytes") from None
    lines = head.decode("latin-1").split("\r\n")
    words = lines[0].split(" ")
    if len(words) != 3 or words[2] not in ("HTTP/1.0", "HTTP/1.1") or not words[1].startswith("/"):
        raise _Refused(400, "this is no request of HTTP/1.1")
    if len(lines) > HEADERS_MAX:
        raise _Refused(431, f"a request has at most {HEADERS_MAX} headers")
    hosts = []
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip():
            raise _Refused(400, "a header is a name, a colon and a value")
        if name.lower() == "host":
            hosts.append(value.strip())
    if len(hosts) > 1 or (not hosts and words[2] == "HTTP/1.1"):
        raise _Refused(400, "a request has one Host header")
    return _Request(words[0], words[1].partition("?")[0], hosts[0] if hosts else "")


def _names_loopback(host: str) -> bool:
    """A page of another site that has its name point here sends that name (DNS rebinding)."""
    name = host.partition("]")[0][1:] if host.startswith("[") else host.partition(":")[0]
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _response(status: int, members: dict[str, Any]) -> bytes:
    body = json.dumps(members).encode() + b"\n"
    head = [
        f"HTTP/1.1 {status} {_REASONS[status]}", "Content-Type: application/json", f"Content-Length: {len(body)}",
        "Cache-Control: no-store", "X-Content-Type-Options: nosniff", "Connection: close",
        *(["Allow: GET"] if status == 405 else []),
    ]  # fmt: skip
    return "\r\n".join([*head, "", ""]).encode() + body


# --- the checks ----------------------------------------------------------------------------------------------


class _State(NamedTuple):
    """Of one service in this process, as its event loop sees it."""

    topics: frozenset[str]
    owned: int  # partitions
    wrong: str  # why it is not at work; empty: it is
    hold: Hold | None  # an operator has paused it: it is as it should be, and does nothing


class _Checks:
    """What an App's process looks like from a thread beside it."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._records: Records | None = None
        self._reader: threading.Thread | None = None
        self._asking = asyncio.Lock()
        self._last: tuple[float, list[Check]] | None = None

    async def live(self) -> list[Check]:
        return [await self._event_loop()]

    async def ready(self) -> list[Check]:
        async with self._asking:
            if self._last is None or REAL.monotonic() - self._last[0] > FRESH_SECONDS:
                found = await self._look()
                self._last = (REAL.monotonic(), found)
            return self._last[1]

    async def _look(self) -> list[Check]:
        loop, app = await self._event_loop(), self._app
        started = Check(name="started", ok=False, said="the services do not run yet, or have ended")
        if not loop.ok:
            return [loop]
        if app.loop is None or not app.workers:
            return [loop, started]
        said = "the services stop" if app.stopping else "the services run"
        started = Check(name="started", ok=not app.stopping, said=said)
        states = await self._asked(self._inside(self._states(), ANSWER_SECONDS))
        if isinstance(states, str):
            return [loop, msgspec.structs.replace(started, ok=False, said=states)]
        store = await self._asked(self._inside(app.store.service_of(""), STORE_SECONDS))  # as the services ask it
        answers = store is None
        found = [loop, started, Check(name="store", ok=answers, said="it answers" if answers else str(store))]
        relays = not app.broker.abilities.commits_with_store  # then what handlers publish goes through the outbox
        idle = {name: state.topics for name, state in states.items() if not (state.wrong or state.owned)}
        tables: tuple[dict[str, int], OutboxStatus | None] | str = ({}, None)
        if not answers:
            tables = "the store does not answer"
        elif idle or relays:
            tables = await self._asked(self._in_thread(lambda: _read(self._tables(), idle, relays)))
        for name, state in states.items():
            found.append(_service(name, state, tables if isinstance(tables, str) else tables[0].get(name, 0)))
        if relays:
            found.append(_outbox(tables if isinstance(tables, str) else tables[1], app.relay))
        return found

    async def _event_loop(self) -> Check:
        """That of the services."""
        if self._app.loop is None:
            return Check(name="event loop", ok=True, said="the App connects, or has ended")
        try:
            await self._inside(asyncio.sleep(0), ANSWER_SECONDS)
        except (TimeoutError, RuntimeError):
            said = f"no answer within {ANSWER_SECONDS:g} s: does a handler block it?"
            return Check(name="event loop", ok=False, said=said)
        return Check(name="event loop", ok=True, said="it answers")

    async def _states(self) -> dict[str, _State]:
        """Runs in the event loop of the services."""
        return {
            worker.service.name: _State(
                frozenset(worker.service.topics), len(worker.owned), worker.trouble(), worker.hold
            )
            for worker in self._app.workers
        }

    # --- ways to ask -------------------------------------------------------------------------------------

    async def _inside(self, call: Coroutine[Any, Any, T], seconds: float) -> T:
        """Runs it in the event loop of the services."""
        try:
            loop = self._app.loop
            if loop is None:
                raise RuntimeError("the services have ended")
            future = asyncio.run_coroutine_threadsafe(call, loop)
        except RuntimeError:  # also: it is closed
            call.close()
            raise
        async with asyncio.timeout(seconds):
            return await asyncio.wrap_future(future)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """A thread that the end of the process does not wait for; one at a time, however often it is asked."""
        if self._reader is not None and self._reader.is_alive():
            raise TimeoutError
        future = concurrent.futures.Future[T]()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as e:
                future.set_exception(e)

        self._reader = threading.Thread(target=run, name="unlost-health-reader", daemon=True)
        self._reader.start()
        async with asyncio.timeout(STORE_SECONDS):
            return await asyncio.shield(asyncio.wrap_future(future))

    def _tables(self) -> Records:
        """The store's tables: in its file, or over a connection of our own, made again when it was lost."""
        url = self._app.store_setting
        if not is_postgres(url):
            return FileRecords(self._app.file)
        if self._records is None:
            self._records = records_at(url)
        return self._records

    async def _asked(self, call: Coroutine[Any, Any, T]) -> T | str:
        """What it returns, or in words why there is no answer."""
        try:
            return await call
        except TimeoutError:
            return "no answer in time"
        except UnlostError as e:
            self.close()
            return f"{e.code}: {e.what}"
        except Exception as e:  # what cannot be checked is no good sign, and no reason to stop checking
            self.close()
            log.warning("a check of this process' health has failed: %r", e)
            return f"it cannot be checked ({type(e).__name__})"

    def close(self) -> None:
        found, self._records = self._records, None
        if found is not None:
            with contextlib.suppress(Exception):  # it is lost already
                found.close()


def _service(name: str, state: _State, free: int | str) -> Check:
    """It works on partitions, or waits for some in an orderly way: others have them all."""
    name = f"service {name}"
    if state.wrong:
        return Check(name=name, ok=False, said=state.wrong)
    if state.hold is not None:
        return Check(name=name, ok=True, said=state.hold.said)
    if state.owned:
        return Check(name=name, ok=True, said=f"it has {state.owned} partitions")
    if isinstance(free, str):
        return Check(name=name, ok=False, said=f"it has no partition: {free}")
    if free:
        return Check(name=name, ok=False, said=f"it has no partition yet, and nobody has {free} of them")
    return Check(name=name, ok=True, said="it waits for a partition; others have them all")


def _outbox(found: OutboxStatus | str | None, ours: bool) -> Check:
    """Where our relays do not send it (`relay=False`), something else must, once there is anything in it."""
    if not isinstance(found, OutboxStatus):
        return Check(name="outbox", ok=False, said=found or "not known")
    if found.relays or found.streams:
        return Check(name="outbox", ok=True, said="somebody sends it")
    waits = found.events or found.copies
    if waits or ours:
        return Check(name="outbox", ok=False, said=f"nobody sends it; {waits} events are in it")
    return Check(name="outbox", ok=True, said="empty")


def _read(
    records: Records, idle: Mapping[str, Collection[str]], relays: bool
) -> tuple[dict[str, int], OutboxStatus | None]:
    """How many partitions of each of these services no living process has, of the topics that it reads; the outbox."""

    def work(look: Look) -> tuple[dict[str, int], OutboxStatus | None]:
        living = {id for id, process in records.processes(look).items() if process.alive}
        free = dict.fromkeys(idle, 0)
        for service, topic, owner in look.execute("select service, topic, owner from unlost_progress"):
            if topic in idle.get(service, ()):
                free[service] += owner not in living
        return free, status_of(records, look) if relays else None

    return records.read(work)
