"""Taking part in a consumer group: one thread polls for as long as we are a member, the event loop does the rest.

**Guarantee** between what `seek` named and what is handed over nothing is left out: each position is an event or
part of a gap that is named (`Gone`). A jump in the positions is believed only when reading again shows the same.
A partition that is taken from us is handed back first, within `DRAIN_SECONDS`; one that was lost is never committed.
**After a crash** the group gives our partitions to others when the session times out.

Two threads, one rule each: the poll thread alone touches the consumer, the event loop alone touches positions.
Between them go `_inbox` (what happened, in order) and `_orders` (what to do, in order). A seek makes a new token, and
messages carry the token they were fetched under, so what was fetched before a seek is never taken for what follows it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from confluent_kafka import OFFSET_END, Consumer, KafkaError, KafkaException, Message, TopicPartition

from unlost.brokers.kafka.refusals import sorted_error
from unlost.brokers.kafka.settings import Settings
from unlost.brokers.kafka.topics import Cluster, Described
from unlost.brokers.kafka.wire import received
from unlost.brokers.port import Ack, Arrivals, Assigned, Change, Gone, Lost, Revoked, Saved
from unlost.errors import Damaged, OutcomeUnknown, Unavailable, UnlostError, UsageError
from unlost.events.topic import Arrival, Decoder, Gap, Unit
from unlost.world import REAL

log = logging.getLogger("unlost.kafka")

POLL_SECONDS = 0.05
BATCH = 500  # messages of one call to the client
TAKE_BYTES = 8 * 1024 * 1024  # what one `receive` hands over
BACKLOG_MAX = 2000  # messages that the event loop has not taken yet
BACKLOG_BYTES_MAX = 32 * 1024 * 1024
HELD_MAX = 2000  # messages of a paused unit, before the client is told to pause it too
HELD_BYTES_MAX = 16 * 1024 * 1024
STALL_SECONDS = 0.5  # an event loop that takes nothing for so long is blocked: partitions pause, polling goes on
COMMIT_SECONDS = 3.0  # how long a partition's way to another member waits for the group's offsets
DRAIN_SECONDS = 10.0  # how long a revoked partition may take to be handed back
AGAIN_SECONDS = 1.0  # until a unit that we let go of, but still have, is offered to us again
CHECK_SECONDS = 3.0  # how often it is checked that the topics are still the same
ASK_SECONDS = 10.0
SILENT_SECONDS = 20.0

Place = tuple[str, int]  # topic as the cluster names it, partition


class _Batch(NamedTuple):
    tokens: Mapping[Place, int]
    messages: deque[Message]


class _Range(NamedTuple):
    """What the log really holds, looked up after a read out of range."""

    place: Place
    token: int
    low: int
    high: int


class _State:
    """A partition of ours, as the event loop sees it."""

    __slots__ = ("bad", "decoder", "fresh", "held", "held_bytes", "jumped", "live", "name", "next", "paused", "place", "stopped", "token", "unit")  # fmt: skip

    def __init__(self, unit: Unit, place: Place, decoder: Decoder | None) -> None:
        self.unit = unit
        self.place = place
        self.name = unit.topic
        self.decoder = decoder
        self.next: int | None = None  # None: not sought yet, or on its way to another member
        self.token = 0
        self.live = False  # messages of the batch in hand were fetched under this token
        self.fresh: list[Arrival] = []
        self.paused = False
        self.held: deque[Message] = deque()  # what has come while it was paused
        self.held_bytes = 0
        self.stopped = False  # paused in the client as well
        self.jumped: int | None = None  # a jump was seen here, and is read again
        self.bad = ""  # the client could not read something


class KafkaMember:
    """This process' part in a service. Used from one event loop."""

    def __init__(
        self, settings: Settings, cluster: Cluster, service: str, topics: Mapping[str, Described],
        decoders: Mapping[str, Decoder], retained: Mapping[str, bool],
    ) -> None:  # fmt: skip
        self._settings = settings
        self._cluster = cluster
        self._service = service
        self._topics = dict(topics)  # by their names on the cluster
        self._decoders = decoders
        self._retained = retained
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._inbox: deque[_Batch | _Range | Change | BaseException] = deque()
        # the event loop's
        self._states: dict[Place, _State] = {}
        self._paused: set[Place] = set()
        self._token = 0
        self._closed = False
        # the poll thread's
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._assigned: set[Place] = set()
        self._fetching: dict[Place, int] = {}  # the token of the last seek that was carried out
        self._quiet: set[Place] = set()  # must stay paused
        self._news: list[Place] = []  # assigned, and not announced yet
        self._again: list[tuple[float, Place]] = []
        self._seeks: list[tuple[Place, int, int]] = []  # those that came too early
        self._look_ups: list[tuple[Place, int]] = []  # reads that were out of range
        self._handing_back = False  # in the middle of a call of the client: messages of before may be in its hands
        self._halted: set[Place] = set()  # out of range: the client reads no more of them, wherever it is sent
        self._posted = self._posted_bytes = 0
        self._taken = self._taken_bytes = 0  # (written by the event loop)
        self._room = threading.Event()
        self._ended = asyncio.Event()
        self._blocked_since: float | None = None
        self._all_paused = False
        self._checked = REAL.monotonic()
        self._checking = False
        self._gone: set[str] = set()  # topics that the last check did not find
        self._closing = threading.Event()
        self._handed_back: set[Place] = set()
        self._trouble = ""
        self._trouble_since: float | None = None
        self._said = 0.0
        self._fatal: KafkaError | None = None
        self._consumer = self._make()
        self._thread = threading.Thread(target=self._run, name=f"unlost-kafka-{service}", daemon=True)
        self._thread.start()

    # --- the port ----------------------------------------------------------------------------------------

    async def receive(self) -> Sequence[Change]:
        while True:
            if self._closed:
                raise UsageError("UL1115", "this member has left its service", fix="join again for a new one")
            self._wake.clear()
            changes = self._take()
            if changes:
                return changes
            await self._wake.wait()

    def seek(self, unit: Unit, position: int) -> None:
        state = self._states.get(self._place(unit))
        if state is None:
            return
        state.held.clear()
        state.held_bytes = 0
        state.jumped = None
        state.stopped = False
        self._go_to(state, position)

    def pause(self, unit: Unit) -> None:
        place = self._place(unit)
        self._paused.add(place)
        if place in self._states:
            self._states[place].paused = True

    def resume(self, unit: Unit) -> None:
        place = self._place(unit)
        self._paused.discard(place)
        if place in self._states:
            self._states[place].paused = False
        self._wake.set()

    async def ack(self, acks: Sequence[Ack]) -> None:
        known = [(self._states[place], a) for a in acks if (place := self._place(a.unit)) in self._states]
        if known:
            places = [TopicPartition(*state.place, a.position, a.note) for state, a in known]
            leaving = self._closed or any(state.next is None for state, _ in known)
            await self._order(lambda: self._commit(places, wait=leaving), wait=leaving)

    async def release(self, units: Sequence[Unit]) -> None:
        places = [self._place(unit) for unit in units]
        for place in places:
            self._forget(place)
        await self._order(lambda: self._let_go(places), wait=False)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._wake.set()
        self._closing.set()
        self._room.set()
        await asyncio.to_thread(self._thread.join)

    # --- the event loop's side ---------------------------------------------------------------------------

    def _take(self) -> list[Change]:
        """What has happened since, as far as one call may hand over."""
        changes: list[Change] = []
        size = 0
        for state in [s for s in self._states.values() if s.held and not s.paused]:
            size += self._unhold(state, changes)
        while self._inbox and size < TAKE_BYTES:
            item = self._inbox[0]
            if isinstance(item, _Batch):
                if self._nobody_wants_more():
                    break
                size += self._read(item, changes)
                if item.messages:
                    break
                self._inbox.popleft()
            elif isinstance(item, BaseException):
                if changes:
                    break  # what came before it first
                raise self._inbox.popleft()  # type: ignore[misc]
            else:
                self._inbox.popleft()
                if isinstance(item, _Range):
                    self._on_range(item, changes)
                else:
                    self._on_change(item)
                    changes.append(item)
        return changes

    def _nobody_wants_more(self) -> bool:
        """All of our units are paused, and nothing but events waits: then they wait where they are."""
        return (
            bool(self._states)
            and all(state.paused for state in self._states.values())
            and all(isinstance(item, _Batch) for item in self._inbox)
        )

    def _on_change(self, change: Change) -> None:
        if isinstance(change, Assigned):
            for unit in change.units:
                place = self._place(unit)
                state = self._states[place] = _State(unit, place, self._decoders.get(unit.topic))
                state.paused = place in self._paused
        elif isinstance(change, Revoked):
            for unit in change.units:
                if state_of := self._states.get(self._place(unit)):
                    state_of.next = None  # nothing more of it arrives
                    state_of.held.clear()
        elif isinstance(change, Lost):
            for unit in change.units:
                self._forget(self._place(unit))

    def _read(self, batch: _Batch, changes: list[Change]) -> int:
        """Messages as arrivals, until all are read or it is enough for one call. Returns bytes."""
        messages, tokens, states = batch.messages, batch.tokens, self._states
        for state in states.values():
            state.live = state.next is not None and tokens.get(state.place) == state.token
        touched: list[_State] = []
        size = taken = 0
        before = len(messages)
        while messages and size < TAKE_BYTES:
            m = messages.popleft()
            length = len(m)
            taken += length
            found = states.get((m.topic(), m.partition()))  # type: ignore[arg-type]
            if m.error() is not None and not self._is_end(m):
                self._on_message_error(m, found)
                continue
            if found is None or not found.live:
                continue  # fetched before it was taken from us, or before a seek
            if found.paused or found.held:
                self._hold(found, m, length)
                continue
            if not found.fresh:
                touched.append(found)
            self._accept(found, m, changes)
            size += length
        for state in touched:
            self._hand_over(state, changes)
        self._taken += before - len(messages)
        self._taken_bytes += taken
        self._room.set()
        return size

    def _accept(self, state: _State, m: Message, changes: list[Change]) -> None:
        """Takes the next message of a partition."""
        position = m.offset()
        if position != state.next:
            assert position is not None and state.next is not None
            if position < state.next or not self._jump(state, position, changes):
                return
            if m.error() is not None:
                return  # the end, for now
        elif m.error() is not None:
            return
        state.fresh.append(received(m, state.name, state.decoder))
        state.next = position + 1  # type: ignore[operator]

    def _hand_over(self, state: _State, changes: list[Change]) -> None:
        if state.fresh:
            changes.append(Arrivals(state.unit, state.fresh))
            state.fresh = []

    def _hold(self, state: _State, m: Message, length: int) -> None:
        """A paused unit's events wait here: telling the client each time would throw away what it has fetched."""
        state.held.append(m)
        state.held_bytes += length
        if not state.stopped and (len(state.held) > HELD_MAX or state.held_bytes > HELD_BYTES_MAX):
            state.stopped = True
            self._orders.put(lambda: self._be_quiet(state.place))

    def _unhold(self, state: _State, changes: list[Change]) -> int:
        size, state.live = 0, state.next is not None
        while state.held and size < TAKE_BYTES and state.live:
            m = state.held.popleft()
            size += len(m)
            self._accept(state, m, changes)
        self._hand_over(state, changes)
        state.held_bytes -= size
        if not state.live:  # it jumped: all is read again
            state.held.clear()
            state.held_bytes = 0
        if state.held:
            self._wake.set()  # there is more
        elif state.stopped:
            state.stopped = False
            self._orders.put(lambda: self._unquiet(state.place))
        return size

    def _jump(self, state: _State, position: int, changes: list[Change]) -> bool:
        """A jump in the positions is real if a second read from the same position shows it too."""
        expected = state.next
        assert expected is not None
        if not self._topics[state.place[0]].compacted and state.jumped != expected:
            state.jumped = expected
            state.live = False
            self._go_to(state, expected)
            return False
        state.jumped = None
        self._hand_over(state, changes)
        changes.append(Gone(state.unit, self._gap(state, expected, position)))
        state.next = position
        return True

    def _gap(self, state: _State, start: int, end: int) -> Gap:
        if state.bad:
            bad, state.bad = state.bad, ""
            return Gap(start, end, "unaccountable", bad)
        if self._topics[state.place[0]].compacted:
            return Gap(
                start, end, "unaccountable", "the topic is compacted: what was here may have been removed unread"
            )
        return Gap(start, end, "void", "markers of transactions")

    def _is_end(self, m: Message) -> bool:
        error = m.error()
        return error is not None and error.code() == KafkaError._PARTITION_EOF

    def _on_message_error(self, m: Message, state: _State | None) -> None:
        error = m.error()
        assert error is not None
        code = error.code()
        if code in (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE):
            # also when a seek is under way: the client may have stopped for good before it, and will not say so twice
            place = (m.topic() or "", m.partition() or 0)
            if state is None or state.next is None:
                self._orders.put(lambda: self._halt(place))
            else:
                token = state.token
                self._orders.put(lambda: self._look_ups.append((place, token)))
        elif code in (KafkaError._BAD_MSG, KafkaError.INVALID_MSG, KafkaError._BAD_COMPRESSION):
            if state is not None:
                state.bad = f"the client could not read it: {error.str()}"
            log.error("%s/%s: %s", m.topic(), m.partition(), error.str())
        elif code in (
            KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_PARTITION, KafkaError._UNKNOWN_TOPIC,
            KafkaError.UNKNOWN_TOPIC_ID,
        ):  # fmt: skip
            self._orders.put(self._check_topics)
        elif code in (
            KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.GROUP_AUTHORIZATION_FAILED,
        ) or error.fatal():  # fmt: skip
            self._inbox.append(sorted_error(error, f"reading for {self._service}"))
            self._wake.set()
        else:
            log.warning("%s: %s", self._service, error.str())

    def _on_range(self, found: _Range, changes: list[Change]) -> None:
        state = self._states.get(found.place)
        if state is None or state.token != found.token or state.next is None:
            return
        expected, unit = state.next, state.unit
        if expected > found.high:
            raise Damaged(
                "UL3021", f"the log of {unit.topic}/{unit.partition} ends before what {self._service!r} has handled",
                found=f"it ends at {found.high}, the next position is {expected}: the cluster has lost events that it had accepted",
                fix="see its brokers' logs for an unclean election or a lost disk; `unlost audit` says what was handled",
            )  # fmt: skip
        if expected < found.low:
            declared = self._retained.get(unit.topic, False)
            why = "retention removed them before they were handled" + (
                "" if declared else "; this App declares no retention"
            )
            log.error("%s: positions %d to %d are gone: %s", unit, expected, found.low - 1, why)
            changes.append(Gone(unit, Gap(expected, found.low, "expired", why, declared)))
            state.next = found.low
        self._go_to(state, state.next)

    def _go_to(self, state: _State, position: int) -> None:
        self._token += 1
        token = state.token = self._token
        state.next = position
        state.live = False
        place = state.place
        self._orders.put(lambda: self._do_seek(place, position, token))

    def _forget(self, place: Place) -> None:
        self._states.pop(place, None)
        self._paused.discard(place)

    def _place(self, unit: Unit) -> Place:
        return (self._settings.prefix + unit.topic, unit.partition)

    def _unit(self, place: Place) -> Unit:
        return Unit(self._service, place[0][len(self._settings.prefix) :], place[1])

    async def _order(self, work: Callable[[], None], *, wait: bool) -> None:
        """Has the poll thread do something; with `wait`, raises what it raises."""
        if not wait:
            self._orders.put(work)
            return
        future: asyncio.Future[None] = self._loop.create_future()

        def told(error: BaseException | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

        def job() -> None:
            error: BaseException | None = None
            try:
                work()
            except UnlostError as e:
                error = e
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(told, error)

        self._orders.put(job)
        ended = asyncio.create_task(self._ended.wait())
        try:
            both: list[asyncio.Future[Any]] = [future, ended]
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
        if future.done():
            future.result()

    # --- the poll thread's side --------------------------------------------------------------------------

    def _run(self) -> None:
        """The poll thread. A client that fails is replaced; what stops the service is told, and ends it."""
        try:
            while not self._closing.is_set():
                try:
                    self._take_part()
                except KafkaException as e:
                    error = sorted_error(e, f"reading for {self._service}")
                    if not isinstance(error, Unavailable | OutcomeUnknown):
                        raise error from None
                    log.error("%s: the Kafka client failed and is replaced: %s", self._service, error)
                    self._start_anew()
        except BaseException as e:  # also a bug of ours: the service stops, and all is delivered again
            self._post(e)
        finally:
            self._closing.set()
            with contextlib.suppress(KafkaException, UnlostError):
                self._obey()
            with contextlib.suppress(KafkaException, RuntimeError):
                self._consumer.close()
            with contextlib.suppress(RuntimeError):  # that loop has ended
                self._loop.call_soon_threadsafe(self._ended.set)

    def _take_part(self) -> None:
        """Polls for as long as we are a member."""
        consumer = self._consumer
        consumer.subscribe(
            sorted(self._topics), on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
        )
        while not self._closing.is_set():
            if self._fatal is not None:
                raise KafkaException(self._fatal)
            self._obey()
            self._late_seeks()
            self._late_look_ups()
            self._watch()
            if self._is_full():
                continue
            first = consumer.poll(POLL_SECONDS)
            if first is not None:
                messages = deque(consumer.consume(BATCH - 1, 0))
                messages.appendleft(first)
                self._post_messages(messages)
            self._announce()

    def _start_anew(self) -> None:
        """A new client in place of one that failed. What we had is lost to us: others may have it already."""
        self._fatal = None
        lost = set(self._assigned)
        self._news = []
        self._drop(lost)
        if lost:
            self._post(Lost([self._unit(p) for p in sorted(lost)]))
        with contextlib.suppress(KafkaException, RuntimeError):
            self._consumer.close()
        while not self._closing.wait(AGAIN_SECONDS):
            try:
                self._consumer = self._make()
                return
            except KafkaException as e:
                log.error("%s: no new Kafka client can be made yet: %s", self._service, e.args[0].str())

    def _make(self) -> Consumer:
        group = self._settings.prefix + self._service
        return Consumer(self._settings.consumer(group, error_cb=self._on_error, on_commit=self._on_commit))

    def _post(self, item: _Batch | _Range | Change | BaseException) -> None:
        self._inbox.append(item)
        with contextlib.suppress(RuntimeError):  # that loop has ended
            self._loop.call_soon_threadsafe(self._wake.set)

    def _post_messages(self, messages: deque[Message]) -> None:
        self._posted += len(messages)
        self._posted_bytes += sum(map(len, messages))
        self._post(_Batch(self._fetching, messages))

    def _obey(self) -> None:
        with contextlib.suppress(queue.Empty):
            for _ in range(self._orders.qsize()):  # those that are there now: polling must go on
                self._orders.get_nowait()()

    def _is_full(self) -> bool:
        """Whether the event loop has enough to do. Polling must go on even then, or the group would throw us out."""
        if self._posted - self._taken < BACKLOG_MAX and self._posted_bytes - self._taken_bytes < BACKLOG_BYTES_MAX:
            self._blocked_since = None
            if self._all_paused:
                self._all_paused = False
                self._client_resume([p for p in self._assigned if p in self._fetching and p not in self._quiet])
            return False
        now = REAL.monotonic()
        if self._blocked_since is None:
            self._blocked_since = now
        if now - self._blocked_since > STALL_SECONDS and not self._all_paused:
            self._all_paused = True
            self._client_pause(self._assigned)
        if self._all_paused:
            message = self._consumer.poll(POLL_SECONDS)  # for the sake of the group
            if message is not None:
                self._post_messages(deque([message]))
        else:
            self._room.clear()
            self._room.wait(POLL_SECONDS)
        self._announce()
        return True

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """From the end and paused: nothing is fetched before `seek`, and no saved offset is asked for."""
        places = [(p.topic, p.partition) for p in partitions]
        consumer.incremental_assign([TopicPartition(*place, OFFSET_END) for place in places])
        self._client_pause(places)
        self._assigned.update(places)
        self._news += places

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        places = {(p.topic, p.partition) for p in partitions}
        self._news = [p for p in self._news if p not in places]
        announced = places & self._assigned - set(self._handed_back)
        if announced and not self._closing.is_set():
            self._handed_back.clear()
            self._post(Revoked([self._unit(p) for p in sorted(announced)]))
            end = REAL.monotonic() + DRAIN_SECONDS
            self._handing_back = True
            try:
                while not announced <= self._handed_back and REAL.monotonic() < end and not self._closing.is_set():
                    with contextlib.suppress(queue.Empty):
                        self._orders.get(timeout=0.02)()
            finally:
                self._handing_back = False
            if late := announced - self._handed_back:
                log.warning("%s: %d partitions are taken from us with handlers still at work", self._service, len(late))
                self._post(Lost([self._unit(p) for p in sorted(late)]))
        self._drop(places)
        consumer.incremental_unassign([TopicPartition(*p) for p in sorted(places)])

    def _on_lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        places = {(p.topic, p.partition) for p in partitions}
        self._news = [p for p in self._news if p not in places]
        self._post(Lost([self._unit(p) for p in sorted(places)]))
        self._drop(places)
        consumer.incremental_unassign([TopicPartition(*p) for p in sorted(places)])

    def _drop(self, places: set[Place]) -> None:
        self._assigned -= places
        self._quiet -= places
        self._halted -= places
        self._handed_back -= places
        self._fetching = {p: t for p, t in self._fetching.items() if p not in places}
        self._seeks = [s for s in self._seeks if s[0] not in places]
        self._look_ups = [s for s in self._look_ups if s[0] not in places]
        self._again = [a for a in self._again if a[1] not in places]

    def _announce(self) -> None:
        """Tells of new partitions, with what the group remembers of them."""
        now = REAL.monotonic()
        self._news += [place for due, place in self._again if due <= now and place in self._assigned]
        self._again = [(due, place) for due, place in self._again if due > now]
        if not self._news:
            return
        self._check_topics()
        places = [TopicPartition(*p) for p in self._news]
        try:
            committed = self._consumer.committed(places, ASK_SECONDS)
            for p in committed:
                if p.error is not None:  # the owner before us may have left a note there: nothing begins without it
                    raise KafkaException(p.error)
        except KafkaException as e:
            error = e.args[0]
            if error.name() in ("GROUP_AUTHORIZATION_FAILED", "TOPIC_AUTHORIZATION_FAILED") or error.fatal():
                raise
            log.warning("%s: the group's offsets cannot be read yet: %s", self._service, error.str())
            return  # again in the next turn
        self._news = [p for p in self._news if p in self._assigned]
        saved = {
            self._unit((p.topic, p.partition)): Saved(p.offset, p.metadata or "") for p in committed if p.offset >= 0
        }
        self._post(Assigned([self._unit(p) for p in self._news], saved))
        self._handed_back -= set(self._news)
        self._news = []

    def _do_seek(self, place: Place, position: int, token: int) -> None:
        if place not in self._assigned or token < self._fetching.get(place, 0):
            return  # a later one was faster
        if self._handing_back:
            self._seeks.append((place, position, token))
            return
        self._quiet.discard(place)
        target = TopicPartition(*place, position)
        try:
            if place in self._halted:
                self._assign_anew(target)
                self._halted.discard(place)
            if not self._all_paused:
                self._consumer.resume([target])
            self._consumer.seek(target)
        except KafkaException as e:
            if e.args[0].code() in (KafkaError._STATE, KafkaError._TIMED_OUT, KafkaError._PREV_IN_PROGRESS):
                self._seeks.append((place, position, token))  # the client is not so far yet
                return
            raise
        self._fetching = {**self._fetching, place: token}

    def _assign_anew(self, target: TopicPartition) -> None:
        with contextlib.suppress(KafkaException):  # it is the second try
            self._consumer.incremental_unassign([target])
        self._consumer.incremental_assign([target])
        if self._all_paused:
            self._client_pause([(target.topic, target.partition)])

    def _late_seeks(self) -> None:
        seeks, self._seeks = self._seeks, []
        for seek in seeks:
            self._do_seek(*seek)

    def _be_quiet(self, place: Place) -> None:
        if place in self._assigned:
            self._quiet.add(place)
            self._client_pause([place])

    def _unquiet(self, place: Place) -> None:
        self._quiet.discard(place)
        if place in self._assigned and not self._all_paused:
            self._client_resume([place])

    def _let_go(self, places: Sequence[Place]) -> None:
        """The worker has let go of them; those that the group still says are ours come back after a moment."""
        self._handed_back.update(p for p in places if p in self._assigned)
        still = [p for p in places if p in self._assigned]
        for place in still:
            self._be_quiet(place)
            self._again.append((REAL.monotonic() + AGAIN_SECONDS, place))

    def _commit(self, places: list[TopicPartition], *, wait: bool) -> None:
        mine = [p for p in places if (p.topic, p.partition) in self._assigned]
        if not mine:
            return
        if wait:  # beside us: a coordinator that does not answer must not hold up the others of the group
            committing = threading.Thread(target=self._commit_now, args=(mine, True), daemon=True)
            committing.start()
            committing.join(COMMIT_SECONDS)
        else:
            self._commit_now(mine, False)

    def _commit_now(self, places: list[TopicPartition], wait: bool) -> None:
        try:
            if wait:
                self._consumer.commit(offsets=places, asynchronous=False)
            else:
                self._consumer.commit(offsets=places)
        except (KafkaException, RuntimeError) as e:  # the store has it all: this is for those who look at the group
            log.info("%s: the group's offsets were not saved: %s", self._service, e)

    def _on_commit(self, error: KafkaError | None, _places: list[TopicPartition]) -> None:
        if error is not None:
            log.info("%s: the group's offsets were not saved: %s", self._service, error.str())

    def _client_pause(self, places: Any) -> None:
        with contextlib.suppress(KafkaException):  # taken from us at this moment
            self._consumer.pause([TopicPartition(*p) for p in places])

    def _client_resume(self, places: Any) -> None:
        with contextlib.suppress(KafkaException):
            self._consumer.resume([TopicPartition(*p) for p in places])

    def _halt(self, place: Place) -> None:
        if place in self._assigned:
            self._halted.add(place)

    def _late_look_ups(self) -> None:
        look_ups, self._look_ups = self._look_ups, []
        for look_up in look_ups:
            if not self._closing.is_set():
                self._look_up(*look_up)

    def _look_up(self, place: Place, token: int) -> None:
        """A read was out of range: is the topic another one now, or has its log moved on?"""
        if place not in self._assigned:
            return
        self._halt(place)
        with contextlib.suppress(Unavailable, OutcomeUnknown):
            self._compare(self._topics | self._cluster.describe([place[0]]))
        try:
            low, high = self._consumer.get_watermark_offsets(TopicPartition(*place), ASK_SECONDS, cached=False)
        except KafkaException as e:
            log.warning("%s/%d: its range cannot be looked up yet: %s", *place, e.args[0].str())
            self._closing.wait(0.2)
            self._look_ups.append((place, token))
            return
        self._post(_Range(place, token, low, high))

    def _watch(self) -> None:
        if self._loop.is_closed():  # nobody is there any more: what is ours is for others
            self._closing.set()
        now = REAL.monotonic()
        if now - self._checked > CHECK_SECONDS:
            self._checked = now
            self._check_topics()
        if self._trouble_since is not None and now - self._trouble_since > 0 and now - self._said > SILENT_SECONDS:
            self._said = now
            self._trouble_since = None
            where = self._settings.bootstrap
            log.error("%s: the Kafka cluster at %s cannot be reached: %s", self._service, where, self._trouble)

    def _check_topics(self) -> None:
        """Looks, beside the polling, whether the topics are still those that our positions belong to."""
        self._checked = REAL.monotonic()
        if not self._checking:
            self._checking = True
            threading.Thread(target=self._describe, name="unlost-kafka-look", daemon=True).start()

    def _describe(self) -> None:
        try:
            found = self._cluster.describe(list(self._topics))
        except UnlostError as e:
            log.warning("%s: the topics cannot be checked now: %s", self._service, e.what)
        except Exception as e:
            log.warning("%s: the topics cannot be checked now: %r", self._service, e)
        else:
            self._orders.put(lambda: self._compare(found))
        finally:
            self._checking = False

    def _compare(self, found: Mapping[str, Described]) -> None:
        """A topic that was made again, or given more partitions, is not the one that our positions belong to.

        Raises:
            Damaged: so it is; the service stops.
        """
        gone = self._topics.keys() - found.keys()
        if gone and gone != self._gone:  # one broker may know less than the others for a moment
            self._gone = gone
            self._checked = REAL.monotonic() - CHECK_SECONDS + AGAIN_SECONDS
            return
        self._gone = gone
        for name, known in self._topics.items():
            there = found.get(name)
            short = name[len(self._settings.prefix) :]
            if there is None:
                raise Damaged(
                    "UL3022", f"the topic {short!r} is gone from the Kafka cluster", found=f"it had the id {known.id}",
                    fix="whoever deleted it also deleted events; see `unlost audit`",
                )  # fmt: skip
            if there.id != known.id:
                raise Damaged(
                    "UL3020", f"the topic {short!r} was deleted and made again while {self._service!r} was reading it",
                    found=f"its id is {there.id}, it was {known.id}",
                    fix="the saved positions mean nothing on it: `unlost audit` says what was handled; rename the service to read the new one",
                )  # fmt: skip
            if there.partitions != known.partitions:
                raise UsageError(
                    "UL1130", f"the topic {short!r} was given other partitions while {self._service!r} was reading it",
                    found=f"{there.partitions}, it had {known.partitions}",
                    fix="keys have moved between partitions, so their order is not known: make a new topic, and rename the service",
                )  # fmt: skip

    def _on_error(self, error: KafkaError) -> None:
        if error.code() in (KafkaError._ALL_BROKERS_DOWN, KafkaError._TRANSPORT, KafkaError._RESOLVE, KafkaError._SSL,
                            KafkaError._AUTHENTICATION):  # fmt: skip
            if error.code() != KafkaError._ALL_BROKERS_DOWN or not self._trouble:
                self._trouble = error.str()
            if error.code() == KafkaError._ALL_BROKERS_DOWN:
                self._trouble_since = REAL.monotonic()
        elif error.fatal():
            self._fatal = error
        else:
            log.info("%s: %s", self._service, error.str())
