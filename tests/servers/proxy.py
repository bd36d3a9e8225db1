"""A proxy between Kafka clients and brokers that knows where a request ends, so that a test can cut exactly there.

It changes no byte; brokers have to advertise its ports (`Kafka.start(proxied=True)`). It has a thread of its own and
its verbs may be called from any other; `broker=None` means all brokers.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from servers.wire import last_turns, reset, stop_listening

QUEUED_MAX = 1_000
"""Requests of one connection that may wait for their delay."""

APIS = {
    0: "Produce", 1: "Fetch", 2: "ListOffsets", 3: "Metadata", 8: "OffsetCommit", 9: "OffsetFetch",
    10: "FindCoordinator", 11: "JoinGroup", 12: "Heartbeat", 13: "LeaveGroup", 14: "SyncGroup", 15: "DescribeGroups",
    16: "ListGroups", 17: "SaslHandshake", 18: "ApiVersions", 19: "CreateTopics", 20: "DeleteTopics",
    21: "DeleteRecords", 22: "InitProducerId", 23: "OffsetForLeaderEpoch", 24: "AddPartitionsToTxn",
    25: "AddOffsetsToTxn", 26: "EndTxn", 28: "TxnOffsetCommit", 29: "DescribeAcls", 30: "CreateAcls", 31: "DeleteAcls",
    32: "DescribeConfigs", 33: "AlterConfigs", 35: "DescribeLogDirs", 36: "SaslAuthenticate", 37: "CreatePartitions",
    42: "DeleteGroups", 43: "ElectLeaders", 44: "IncrementalAlterConfigs", 45: "AlterPartitionReassignments",
    46: "ListPartitionReassignments", 47: "OffsetDelete", 60: "DescribeCluster", 61: "DescribeProducers",
    65: "DescribeTransactions", 66: "ListTransactions", 68: "ConsumerGroupHeartbeat", 69: "ConsumerGroupDescribe",
    71: "GetTelemetrySubscriptions", 72: "PushTelemetry", 75: "DescribeTopicPartitions",
}  # fmt: skip
"""The requests of the protocol by their number; others are shown as the number."""


@dataclass(eq=False)
class Fault:
    """A cut that waits for its request. It ends the connection with a reset, so also what else was under way on it."""

    api: str
    after: bool
    broker: int | None
    left: int
    match: bytes
    fired: int = 0
    _once: threading.Event = field(default_factory=threading.Event)

    def wait(self, seconds: float = 30) -> None:
        """Until it has hit for the first time."""
        if not self._once.wait(seconds):
            raise TimeoutError(f"no {self.api} came within {seconds} s")

    def cancel(self) -> None:
        self.left = 0

    def _fire(self) -> None:
        self.fired += 1
        self._once.set()


class _Cut(Exception):
    """This connection is to be reset."""


class Proxy:
    """One listening port per broker: `Proxy({1: (listening port, broker's port)})`."""

    def __init__(self, routes: Mapping[int, tuple[int, int]]) -> None:
        self.seen: Counter[str] = Counter()
        """Requests that came, by API."""
        self.cut: Counter[str] = Counter()
        """What was cut: "after Produce", "before Fetch", …; "down" counts connections ended or refused by down()."""
        self._faults: list[Fault] = []
        self._routes = {n: _Route(self, n, *ports) for n, ports in routes.items()}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="kafka proxy", daemon=True)
        self._thread.start()
        try:
            self.up()
        except BaseException:
            self.close()
            raise

    def port(self, n: int) -> int:
        return self._routes[n].port

    def cut_after_request(self, api: str, *, broker: int | None = None, times: int = 1, match: bytes = b"") -> Fault:
        """Let the broker do the next such request, then drop its reply and reset the connection.

        `match` are bytes the request must contain. Returns at once; `Fault.wait()` waits until it has hit.
        """
        return self._arm(Fault(api, True, broker, times, match))

    def drop_before_request(self, api: str, *, broker: int | None = None, times: int = 1, match: bytes = b"") -> Fault:
        """Reset the connection when the next such request comes; the broker never sees it."""
        return self._arm(Fault(api, False, broker, times, match))

    def down(self, broker: int | None = None) -> None:
        """Reset every connection and refuse new ones, until `up()`."""
        self._each(broker, _Route.close)

    def up(self, broker: int | None = None) -> None:
        """The end of `down()` and of `blackhole()`. What a black hole has swallowed is gone: its connections are reset."""
        self._each(broker, _Route.open)

    def blackhole(self, broker: int | None = None) -> None:
        """Take every byte and new connections, and deliver nothing in either direction, until `up()`."""

        async def swallow(route: _Route) -> None:
            route.swallows = True

        self._each(broker, swallow)

    def delay(self, seconds: float, broker: int | None = None) -> None:
        """Let every request reach its broker this much later; requests do not wait for one another. 0 ends it."""

        async def slow(route: _Route) -> None:
            route.delay = seconds

        self._each(broker, slow)

    def close(self) -> None:
        if self._loop.is_closed():
            return
        self._each(None, _Route.close)
        asyncio.run_coroutine_threadsafe(last_turns(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _arm(self, fault: Fault) -> Fault:
        if fault.api not in APIS.values():
            raise ValueError(f"no request is called {fault.api!r}; known: {', '.join(APIS.values())}")
        self._faults.append(fault)
        return fault

    def _pick(self, api: str, broker: int, body: bytes) -> Fault | None:
        for fault in self._faults:
            if fault.left and fault.api == api and fault.broker in (None, broker) and fault.match in body:
                fault.left -= 1
                return fault
        return None

    def _each(self, broker: int | None, verb: Callable[..., object]) -> None:
        async def run() -> None:
            for route in self._routes.values() if broker is None else [self._routes[broker]]:
                await verb(route)  # type: ignore[misc]

        asyncio.run_coroutine_threadsafe(run(), self._loop).result(30)


class _Route:
    """The way to one broker."""

    def __init__(self, proxy: Proxy, number: int, port: int, target: int) -> None:
        self.proxy, self.number, self.port, self.target = proxy, number, port, target
        self.swallows = False
        self.delay = 0.0
        self._server: asyncio.Server | None = None
        self._links: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def open(self) -> None:
        if self.swallows:
            await self._reset_all()
            self.swallows = False
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, limit=1 << 20)

    async def close(self) -> None:
        server, self._server = self._server, None
        if server:
            await stop_listening(server)
        await self._reset_all()

    async def _reset_all(self) -> None:
        tasks = list(self._links)
        self.proxy.cut["down"] += len(tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._server is None:  # it came in while the door was being closed
            reset(writer)
            return
        task = asyncio.current_task()
        assert task is not None
        self._links[task] = writer
        try:
            await self._link(reader, writer)
        except asyncio.CancelledError:
            reset(writer)  # by _reset_all, which waits for the end of this task
        finally:
            del self._links[task]

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while self.swallows:
            if not await reader.read(1 << 16):
                writer.close()
                return
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self.target, limit=1 << 20)
        except OSError:
            reset(writer)  # the broker does not listen
            return
        link = _Link(self, reader, writer, there, back)
        with contextlib.closing(writer), contextlib.closing(back):  # also if a reset comes while they are being ended
            tasks = [asyncio.create_task(part()) for part in (link.requests, link.deliver, link.replies)]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
                link.give_back()
                ends = await asyncio.gather(*tasks, return_exceptions=True)
                if any(isinstance(end, _Cut) for end in ends):
                    reset(writer)


class _Link:
    """One connection of a client, and the one to the broker that belongs to it."""

    def __init__(
        self,
        route: _Route,
        client: asyncio.StreamReader,
        to_client: asyncio.StreamWriter,
        broker: asyncio.StreamReader,
        to_broker: asyncio.StreamWriter,
    ) -> None:
        self._route, self._proxy = route, route.proxy
        self._client, self._to_client = client, to_client
        self._broker, self._to_broker = broker, to_broker
        self._queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(QUEUED_MAX)
        self._doomed: dict[int, Fault] = {}

    async def requests(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            frame = await _frame(self._client)
            if self._route.swallows:
                continue
            key, _, correlation = struct.unpack_from(">hhi", frame, 4)
            api = APIS.get(key, str(key))
            self._proxy.seen[api] += 1
            fault = self._proxy._pick(api, self._route.number, frame)
            if fault and fault.after:
                self._doomed[correlation] = fault
            elif fault:
                self._proxy.cut[f"before {api}"] += 1
                fault._fire()
                raise _Cut
            await self._queue.put((clock() + self._route.delay, frame))

    async def deliver(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            due, frame = await self._queue.get()
            if due > clock():
                await asyncio.sleep(due - clock())
            if not self._route.swallows:
                self._to_broker.write(frame)
                await self._to_broker.drain()

    async def replies(self) -> None:
        while True:
            frame = await _frame(self._broker)
            if self._route.swallows:
                continue
            (correlation,) = struct.unpack_from(">i", frame, 4)
            fault = self._doomed.pop(correlation, None)
            if fault:
                self._proxy.cut[f"after {fault.api}"] += 1
                fault._fire()
                raise _Cut
            self._to_client.write(frame)
            await self._to_client.drain()

    def give_back(self) -> None:
        """Faults whose reply never came may hit another request."""
        for fault in self._doomed.values():
            fault.left += 1


async def _frame(reader: asyncio.StreamReader) -> bytes:
    """One message with its length before it."""
    head = await reader.readexactly(4)
    return head + await reader.readexactly(int.from_bytes(head, "big"))
