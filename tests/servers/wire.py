"""A TCP connection that a test can cut, hang and refuse, for any protocol: it lies between a client and a server.

It has a thread of its own and its verbs may be called from any other; each returns when it is done.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Coroutine
from typing import Any

from servers.process import free_ports

CHUNK_BYTES = 1 << 16


class Wire:
    """One listening port of this machine, `port`, that leads to a server."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._target = host, port
        (self.port,) = free_ports(1)
        self._server: asyncio.Server | None = None
        self._links: dict[asyncio.Task[None], tuple[asyncio.StreamWriter, ...]] = {}
        self._loop = asyncio.new_event_loop()
        self._requests, self._replies = asyncio.Event(), asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_forever, name="wire", daemon=True)
        self._thread.start()

    @classmethod
    def to(cls, host: str, port: int) -> Wire:
        wire = cls(host, port)
        try:
            wire.accept()
            wire.go_on()
        except BaseException:
            wire.close()
            raise
        return wire

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def connections(self) -> int:
        """How many clients are connected through it."""
        return len(self._links)

    def cut(self) -> None:
        """Reset every connection, to both sides; what was under way is lost. New ones may come."""
        self._do(self._cut())

    def refuse(self) -> None:
        """Refuse new connections, until `accept()`; those that are there stay."""
        self._do(self._close_door())

    def accept(self) -> None:
        self._do(self._open_door())

    def hang(self) -> None:
        """Deliver nothing in either direction and keep every connection open, until `go_on()` delivers what waited."""
        self._do(self._pass(requests=False, replies=False))

    def hold_replies(self) -> None:
        """Deliver requests and keep their replies, until `go_on()`; then `cut()` leaves the client in the dark."""
        self._do(self._pass(requests=True, replies=False))

    def go_on(self) -> None:
        self._do(self._pass(requests=True, replies=True))

    def close(self) -> None:
        if self._loop.is_closed():
            return
        self.refuse()
        self.cut()
        self._do(last_turns())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # --- in the thread --------------------------------------------------------------------------------------------

    def _do(self, verb: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(verb, self._loop).result(30)

    async def _pass(self, *, requests: bool, replies: bool) -> None:
        for gate, is_open in ((self._requests, requests), (self._replies, replies)):
            if is_open:
                gate.set()
            else:
                gate.clear()

    async def _open_door(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)

    async def _close_door(self) -> None:
        server, self._server = self._server, None
        if server:
            await stop_listening(server)

    async def _cut(self) -> None:
        tasks = list(self._links)
        for task in tasks:
            for writer in self._links[task]:
                reset(writer)
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._server is None:  # it came in while the door was being closed
            reset(writer)
            return
        task = asyncio.current_task()
        assert task is not None
        self._links[task] = (writer,)
        try:
            await self._link(task, reader, writer)
        except asyncio.CancelledError:
            pass  # by _cut, which has reset both sides and waits for the end of this task
        finally:
            del self._links[task]

    async def _link(self, task: asyncio.Task[None], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection(self._host, self._target)
            self._links[task] = (writer, back)
            async with asyncio.TaskGroup() as both:
                both.create_task(_copy(reader, back, self._requests))
                both.create_task(_copy(there, writer, self._replies))
            writer.close()
            back.close()
        except* OSError:  # the server does not listen, or one side has reset the connection
            for end in self._links[task]:
                reset(end)


async def stop_listening(server: asyncio.Server) -> None:
    """Connections that it has just accepted come in first: asyncio would forget to close them otherwise."""
    loop = asyncio.get_running_loop()
    for listening in server.sockets:
        loop.remove_reader(listening.fileno())
    await asyncio.sleep(0)
    server.close()


async def last_turns() -> None:
    """Of a loop whose doors are closed: what came in meanwhile is reset, and every transport gets its turn to close."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.gather(*others, return_exceptions=True)
    for _ in range(3):
        await asyncio.sleep(0)


async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter, gate: asyncio.Event) -> None:
    """Everything from one side to the other, and its end as well."""
    while chunk := await source.read(CHUNK_BYTES):
        await gate.wait()
        sink.write(chunk)
        await sink.drain()
    await gate.wait()
    sink.write_eof()


def reset(writer: asyncio.StreamWriter) -> None:
    """End a connection with RST instead of FIN."""
    raw = writer.get_extra_info("socket")
    if raw is not None and raw.fileno() >= 0:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
