"""Publishing: an idempotent producer, and what was handed to it until the cluster has confirmed it.

Who asks the client for its reports? A thread of ours, when they are few and far between. While they come at once, the
event loop that publishes, in its own turns: each report that a second thread takes costs two changes of the
interpreter's lock. (Asking in a loop after a rest would be slower: it keeps a processor from those who must wake up.)

**Guarantee** an event is reported as accepted only with the cluster's delivery report (all in-sync replicas) in
hand. Events leave in the order of the calls. When the producer fails for good, a new one takes its place and gets
all that is unconfirmed, in the same order: at most duplicates.
**After a crash** nobody was told of what had no report yet; it may be in the log or not.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from confluent_kafka import KafkaError, KafkaException, Producer

from unlost.brokers.kafka.refusals import missing_rights, sorted_error
from unlost.brokers.kafka.settings import Settings
from unlost.brokers.port import Receipt
from unlost.errors import OutcomeUnknown, PartlyPublished, Unavailable, UnlostError, UsageError
from unlost.sqlite.guards import after_fork
from unlost.world import REAL

log = logging.getLogger("unlost.kafka")

PENDING_MAX = 200_000  # events that wait for the cluster
PENDING_BYTES_MAX = 256 * 1024 * 1024
BATCH_MAX = 400_000  # events of one call: the client holds half a million
BYTES_SPARED = 32 * 1024 * 1024
POLL_SECONDS = 0.1
CLOSE_SECONDS = 10.0
RECREATE_SECONDS = 0.5  # between two producers, when each fails at once
SILENT_SECONDS = 20.0  # after how long without an answer it is said that there is none

HOT_SECONDS = 0.001  # an event that is sent so soon after the last report finds everybody awake
SPIN_SECONDS = 0.0005  # how long the event loop then asks in each of its turns, although nothing comes
PARK_SECONDS = 0.002  # when no event loop has asked for so long, the thread does
BUSY = 16  # from so many events on their way on, it goes on asking afterwards,
TURN_SECONDS = 0.001  # once in so long
STALL_SECONDS = 0.05  # a loop that does not ask for so long is blocked: the thread asks again

Reports = deque[tuple["Sent", "KafkaError | None", int, int]]


class Call:
    """One call of `publish`: done when each of its events has an outcome."""

    __slots__ = ("failed", "future", "left", "loop", "receipts")

    def __init__(self, loop: asyncio.AbstractEventLoop, count: int) -> None:
        self.loop = loop
        self.future: asyncio.Future[Sequence[Receipt]] = loop.create_future()
        self.left = count
        self.receipts: list[Receipt | None] = [None] * count
        self.failed: dict[int, UnlostError] = {}

    def end(self) -> None:
        if self.future.done():
            return
        if not self.failed:
            self.future.set_result(self.receipts)  # type: ignore[arg-type]
            return
        errors = list(self.failed.values())
        if len(errors) == len(self.receipts) and len({type(e) for e in errors}) == 1:
            self.future.set_exception(errors[0])
            return
        self.future.set_exception(
            PartlyPublished(
                "UL2121", f"{len(errors)} of {len(self.receipts)} events of a batch were not accepted for sure",
                found=str(errors[0]), fix="publish the failed ones again with the same ids",
                receipts=self.receipts, failed=self.failed,
            )
        )  # fmt: skip


class Sent(msgspec.Struct, eq=False, gc=False):
    """One event on its way, with all that is needed to send it again."""

    publisher: Publisher
    call: Call
    place: int
    id: str
    topic: str
    topic_there: str  # its name on the cluster
    partition: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes | None]]
    size: int
    number: int = 0
    again: bool = False  # an earlier producer may have sent it

    def reported(self, error: KafkaError | None, message: Any) -> None:
        """The delivery report, in the producer's thread."""
        if error is None:
            self.publisher.reports.append((self, None, message.offset(), message.timestamp()[1]))
        else:
            self.publisher.reports.append((self, error, -1, -1))


class Publisher:
    """The one producer of a broker. `send` may be called from any event loop."""

    def __init__(self, settings: Settings, *, batch_bytes: int | None = None) -> None:
        self._settings = settings
        self._more = {} if batch_bytes is None else {"batch.size": batch_bytes}
        self._lock = threading.Lock()
        self._pending: dict[int, Sent] = {}  # in the order of sending
        self._bytes = 0
        self._count = 0
        self._closed = False
        self._pid = os.getpid()
        self._fatal: KafkaError | None = None
        self._refused = False  # the producer was not let in; there is none until somebody publishes
        self._trouble = ""
        self._answered = self._asked = REAL.monotonic()  # the last report; when something began to wait for one
        self._warned = 0.0
        self.reports: Reports = deque()
        self._outgoing: list[Sent] = []  # pending, and not handed to the client yet
        self._turning = False  # an event loop has a turn ahead of it (changed under the lock only)
        self._turns = 0  # the number of its chain of turns: what is left of an older one does nothing
        self._turned = 0.0  # when it did so last
        self._moved = 0.0  # when something was sent or confirmed last
        self._hot = False
        self._calm = threading.Event()  # the thread asks
        self._calm.set()
        self._producer = self._make()
        self._thread = threading.Thread(target=self._run, name="unlost-kafka-publisher", daemon=True)
        self._thread.start()

    def send(self, call: Call, events: Sequence[Sent]) -> None:
        """Hands events over, all or none.

        Raises:
            Unavailable: too many wait for the cluster already; nothing of this call was handed over.
        """
        with self._lock:
            if os.getpid() != self._pid:
                raise after_fork()  # the thread that would hear of it is the parent's
            if self._closed:
                raise UsageError("UL1114", "this broker is closed", fix="use it inside `async with app:`")
            size = sum(e.size for e in events)
            if len(events) > BATCH_MAX or size > 2 * PENDING_BYTES_MAX - BYTES_SPARED:
                raise UsageError(
                    "UL1244", f"a batch for Kafka has at most {BATCH_MAX} events, and 480 MB",
                    found=f"{len(events)} events, {size // 1_000_000} MB", fix="publish it in several batches",
                )  # fmt: skip
            if self._pending and (
                len(self._pending) + len(events) > PENDING_MAX or self._bytes + size > PENDING_BYTES_MAX
            ):
                raise Unavailable(
                    "UL2111", "too many events wait for the Kafka cluster already; nothing was accepted",
                    found=f"{len(self._pending)} events, {self._bytes // 1_000_000} MB" + (f"; {self._trouble}" if self._trouble else ""),
                    fix="publish more slowly, or see why the cluster does not answer",
                )  # fmt: skip
            if not self._pending:
                self._asked = REAL.monotonic()
            if self._refused:
                self._producer, self._refused = self._make(), False
            self._bytes += size
            for event in events:
                self._count += 1
                event.number = self._count
                self._pending[event.number] = event
            self._outgoing.extend(events)
            if not self._turning:
                self._turning = True
                self._turned = self._moved = REAL.monotonic()
                self._hot = self._moved - self._answered < HOT_SECONDS
                self._turns += 1
                call.loop.call_soon(self._turn, call.loop, self._turns)

    def _turn(self, loop: asyncio.AbstractEventLoop, chain: int) -> None:
        """Once in a turn of the event loop: hands over what its calls have brought, together; and as long as there is
        much to confirm, takes what has been confirmed."""
        with self._lock:
            if chain != self._turns:
                return  # we came late, and somebody else has it
            now = self._turned = REAL.monotonic()
            if self._outgoing:
                self._hand_over()
                self._moved = now
            spins = self._hot and now - self._moved < SPIN_SECONDS
            if not self._pending or self._fatal is not None or self._closed:
                self._turning = False
                return
            if not spins and len(self._pending) < BUSY:
                self._turning = False
                self._calm.set()  # the thread waits for the rest
                return
            self._calm.clear()
        self._poll(0)
        if self.reports:
            self._moved, self._hot = now, True
            self._take_reports(loop)
            loop.call_soon(self._turn, loop, chain)
        elif spins:
            loop.call_soon(self._turn, loop, chain)
        else:
            loop.call_later(TURN_SECONDS, self._turn, loop, chain)

    def _hand_over(self) -> None:
        outgoing, self._outgoing = self._outgoing, []
        for event in outgoing:
            self._produce(event)

    def _take_over(self) -> None:
        """From an event loop that does not come to its turn: it is blocked, or has ended. Others may be waiting."""
        if self._turning and REAL.monotonic() - self._turned > STALL_SECONDS:
            with self._lock:
                self._turns += 1
                self._turning = False
                self._hand_over()
                self._calm.set()

    def send_or_refuse(self, call: Call, events: Sequence[Sent]) -> None:
        """The same for a call of which another part may be under way: a refusal is the outcome of these events."""
        try:
            self.send(call, events)
        except UnlostError as e:
            _resolve([(event, e, None) for event in events])

    def close(self) -> None:
        """Waits for what is under way; what has no answer then is unknown."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        end = REAL.monotonic() + CLOSE_SECONDS
        while self._pending and REAL.monotonic() < end:
            REAL.pause(0.01)
        self._thread.join()
        with self._lock:
            left, self._pending = list(self._pending.values()), {}
            self._producer.purge()
        error = OutcomeUnknown(
            "UL2122", "the broker was closed before the Kafka cluster answered", found=self._trouble,
            fix="publish again with the same id",
        )  # fmt: skip
        self._tell([(event, error, None) for event in left])

    # --- the producer's thread ----------------------------------------------------------------------------

    def _make(self) -> Producer:
        """
        Raises:
            UnlostError: the client does not start: a file that its settings name is gone, or there are no threads left.
        """
        try:
            return Producer(self._settings.producer(error_cb=self._on_error, **self._more))
        except KafkaException as e:
            raise sorted_error(e, "making a producer") from None

    def _produce(self, e: Sent) -> None:
        try:
            self._producer.produce(
                e.topic_there,
                e.value,
                e.key,
                e.partition,
                e.reported,
                headers=e.headers,  # type: ignore[arg-type]
            )
        except KafkaException as failed:  # refused at once: too large for the client, a topic known to be missing
            self.reports.append((e, failed.args[0], -1, -1))
        except BufferError:  # our bounds are tighter, so this comes only with a producer that does not work
            self.reports.append((e, KafkaError(KafkaError._QUEUE_FULL), -1, -1))
        except Exception as failed:  # not even a message for the client: those behind it are not to blame
            self.reports.append((e, KafkaError(KafkaError._INVALID_ARG, repr(failed)), -1, -1))

    def _run(self) -> None:
        while True:
            if not self._calm.wait(PARK_SECONDS):
                rested = REAL.monotonic() - self._turned
                if rested < (STALL_SECONDS if self._turning else PARK_SECONDS):
                    self._say_if_silent()
                    continue
                self._calm.set()
            self._take_over()
            self._poll(POLL_SECONDS if self._calm.is_set() else 0)
            if self._fatal is not None:
                self._replace(self._fatal)
            if self.reports:
                self._take_reports()
            elif self._closed and (not self._pending or self._silent() > CLOSE_SECONDS):
                return
            self._say_if_silent()

    def _take_reports(self, here: asyncio.AbstractEventLoop | None = None) -> None:
        """Tells the callers; those of the event loop `here`, which we are in, at once."""
        answers: list[tuple[Sent, UnlostError | None, Receipt | None]] = []
        with self._lock:
            while self.reports:  # the other thread may add to it at this moment
                event, error, offset, millis = self.reports.popleft()
                if error is not None and _producer_failed(error) and not self._closed:
                    self._fatal = self._fatal or error
                    continue  # it stays pending, and goes out again with the next producer
                if self._pending.pop(event.number, None) is None:
                    continue  # answered before: it was sent twice
                self._bytes -= event.size
                if error is None:
                    answers.append((event, None, Receipt(
                        id=event.id, topic=event.topic, partition=event.partition, position=offset,
                        recorded=millis * 1000,
                    )))  # fmt: skip
                else:
                    answers.append((event, sorted_error(error, f"publishing {event.id} to {event.topic}"), None))
        self._answered = REAL.monotonic()
        if here is not None and all(event.call.loop is here for event, _, _ in answers):
            _resolve(answers)
        else:
            self._tell(answers)

    def _poll(self, seconds: float) -> None:
        if self._refused:
            threading.Event().wait(seconds)
            return
        try:
            self._producer.poll(seconds)
        except KafkaException as e:  # what fails for good comes out here, and not by the callback
            self._fatal = e.args[0]

    def _replace(self, error: KafkaError) -> None:
        """A new producer for one that failed for good, and everything unconfirmed again, in order."""
        with self._lock:
            old = self._producer
            self._poll(0)  # what is confirmed already is not sent again
            answered = set()  # with success or without: what is refused must not get there after all
            for _ in range(len(self.reports)):  # in place: an event loop may add to it at this moment
                report = self.reports.popleft()
                if report[1] is None or not _producer_failed(report[1]):
                    self.reports.append(report)
                    answered.add(report[0].number)
            left = [event for number, event in self._pending.items() if number not in answered]
            if missing_rights(error):
                self._fatal = None
                self._outgoing.clear()
                self._refuse(left, error)
            else:
                log.error(
                    "the Kafka producer failed for good (%s); a new one sends %d events again, in order: at most duplicates",
                    error.str(), len(left),
                )  # fmt: skip
                try:
                    self._producer = self._make()
                except UnlostError as e:
                    self._fatal = error  # for the next try
                    log.error("no new Kafka producer can be made; it is tried again: %s", e)
                else:
                    self._fatal = None
                    self._outgoing.clear()
                    for event in left:
                        event.again = True
                        self._produce(event)
        old.purge()
        threading.Event().wait(RECREATE_SECONDS)

    def _refuse(self, events: Sequence[Sent], error: KafkaError) -> None:
        """The next producer would be refused as well, until somebody has granted the rights: with the next event
        it is tried."""
        self._refused = True
        why = sorted_error(error, "publishing")
        unknown = OutcomeUnknown(
            "UL2120", "nobody can say whether the Kafka cluster did that", found=f"sent before, and then refused: {why.found}",
            fix="grant the rights, and publish again with the same id",
        )  # fmt: skip
        for event in events:
            del self._pending[event.number]
            self._bytes -= event.size
        self._tell([(event, unknown if event.again else why, None) for event in events])

    def _on_error(self, error: KafkaError) -> None:
        if error.fatal() or error.code() == KafkaError._FATAL:
            self._fatal = error
            return
        self._trouble = error.str()

    def _silent(self) -> float:
        """For how many seconds there has been no report of what waits for one."""
        return REAL.monotonic() - max(self._answered, self._asked)

    def _say_if_silent(self) -> None:
        now = REAL.monotonic()
        if self._pending and self._silent() > SILENT_SECONDS and now - self._warned > SILENT_SECONDS:
            self._warned = now
            log.error(
                "no answer of the Kafka cluster for %d s; %d events wait for it: %s",
                self._silent(), len(self._pending), self._trouble or "no reason is known",
            )  # fmt: skip

    def _tell(self, answers: Sequence[tuple[Sent, UnlostError | None, Receipt | None]]) -> None:
        """One hop per event loop, not per event."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Sent, UnlostError | None, Receipt | None]]] = {}
        for answer in answers:
            by_loop.setdefault(answer[0].call.loop, []).append(answer)
        for loop, chosen in by_loop.items():
            _in_loop(loop, _resolve, chosen)


def _producer_failed(error: KafkaError) -> bool:
    """Whether the event is not to blame: it was in a producer that failed, or was emptied."""
    return error.fatal() or error.code() in (
        KafkaError._FATAL, KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT, KafkaError._DESTROY,
        KafkaError._STATE, KafkaError._FENCED,
    )  # fmt: skip


def _resolve(answers: Sequence[tuple[Sent, UnlostError | None, Receipt | None]]) -> None:
    for event, error, receipt in answers:
        call = event.call
        if error is not None:
            call.failed[event.place] = error
        else:
            call.receipts[event.place] = receipt
        call.left -= 1
        if call.left == 0:
            call.end()


def _in_loop(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: Any) -> None:
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:
        return  # that loop has ended: nobody waits any more
