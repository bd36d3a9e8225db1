"""Dead letters, copied to a topic for tools of others. The shelf is what counts; the copies are for those who look there.

A copy has the key, the value and the headers of the message that died, and three families of headers more: those of
Spring Kafka (`kafka_dlt-…`), those of Kafka's share groups (`__dlq.errors.…`, KIP-1191) and our own (`unlost-…`).

**Guarantee** a copy is written in the commit that shelves the letter, and leaves the outbox only with the broker's
receipt. It never holds anything up: no event waits for it, and no other copy.
**After a crash** a copy that was sent and not yet marked is sent again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import string
from collections.abc import Sequence

from unlost.brokers.port import Broker
from unlost.delivery.service import Service
from unlost.errors import UnlostError, UsageError
from unlost.events import check_name
from unlost.events.topic import Unit
from unlost.store.port import Copies, Mirrored, Outcome

log = logging.getLogger("unlost.mirror")

UNDER_WAY_MAX = 1000
PAGE = 1000
AGAIN_SECONDS = 2.0  # between two attempts with one copy
CLAIM_SECONDS = 0.2
SAY_SECONDS = 20.0
_FIELDS = {"topic", "service"}

Headers = list[tuple[str, bytes | None]]


def check_template(template: str) -> None:
    """
    Raises:
        UsageError: no names of topics come from it, or the copies would go where the events come from.
    """
    try:
        fields = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
        if not fields <= _FIELDS:
            raise ValueError(f"it names {', '.join(sorted(map(repr, fields - _FIELDS)))}")
        name = template.format(topic="t", service="s")
        if name == "t":
            raise ValueError("a dead letter would go back to the topic it came from")
    except (ValueError, IndexError, AttributeError, TypeError) as e:
        raise UsageError(
            "UL1241", "mirror_dead is the name of a topic, in which {topic} and {service} stand for the letter's own",
            found=f"{template!r}: {e}", fix='mirror_dead="{topic}.DLT"',
        ) from None  # fmt: skip
    check_name("topic", name)


class Mirror:
    """Makes the copy of a dead letter."""

    def __init__(self, template: str, broker: Broker, services: Sequence[Service]) -> None:
        """
        Raises:
            UsageError: this broker has no topics for others to read, or a service would read what it mirrors.
        """
        if broker.abilities.commits_with_store:
            raise UsageError(
                "UL1242", "mirror_dead is for brokers whose topics other tools read", found=f"the {broker.abilities.name} broker",
                fix="leave it out: `unlost dead list` shows the shelf",
            )  # fmt: skip
        self._template = template
        self._broker = broker
        read = {topic for service in services for topic in service.topics}
        for service in services:
            for topic in service.topics:
                name = check_name("topic", self._name(topic, service.name))
                if name in read:
                    raise UsageError(
                        "UL1243", "a dead letter would be copied to a topic that this App reads", found=f"{topic} -> {name}",
                        fix='name topics that are for nothing else: mirror_dead="{topic}.DLT"',
                    )  # fmt: skip

    def __call__(self, unit: Unit, o: Outcome) -> Mirrored | None:
        try:
            return Mirrored(
                topic=self._name(unit.topic, unit.service), origin=(unit.topic, unit.partition),
                key=o.arrival.key, data=o.arrival.data, headers=self._headers(unit, o),
            )  # fmt: skip
        except Exception as e:  # the shelf must get its letter whatever becomes of the copy
            log.error("%s:%d is on the shelf, but no copy of it could be made: %r", unit, o.arrival.position, e)
            return None

    def _name(self, topic: str, service: str) -> str:
        return self._template.format(topic=topic, service=service)

    def _headers(self, unit: Unit, o: Outcome) -> Headers:
        a, death = o.arrival, o.death
        assert death is not None
        came = self._broker.original(unit, a)
        place = {
            "kafka_dlt-original-topic": came.topic.encode(),
            "kafka_dlt-original-partition": unit.partition.to_bytes(4, "big"),
            "kafka_dlt-original-offset": a.position.to_bytes(8, "big"),
            "kafka_dlt-original-timestamp": (a.recorded // 1000).to_bytes(8, "big"),
            "kafka_dlt-original-timestamp-type": came.stamped.encode(),
            "kafka_dlt-original-consumer-group": came.group.encode(),
        }
        why = {
            "kafka_dlt-exception-fqcn": (death.error_type or death.reason).encode(),
            "kafka_dlt-exception-message": death.error.encode(),
            "kafka_dlt-exception-stacktrace": death.stack.encode(),
            "__dlq.errors.topic": came.topic.encode(),
            "__dlq.errors.partition": b"%d" % unit.partition,
            "__dlq.errors.offset": b"%d" % a.position,
            "__dlq.errors.group": came.group.encode(),
            "__dlq.errors.delivery.count": b"%d" % len(o.attempts),
            "__dlq.errors.message": f"{death.reason}: {death.error}".encode(),
            "unlost-reason": death.reason.encode(),
            "unlost-service": unit.service.encode(),
            "unlost-handler": death.handler.encode(),
            "unlost-attempts": b"%d" % len(o.attempts),
            "unlost-error": f"{death.error_type}: {death.error}".strip(": ").encode(),
        }
        # A letter that was one before keeps the place it came from first, as with Spring, and only its last error.
        known = {name for name, _ in came.headers}
        headers: Headers = [(name, value) for name, value in came.headers if name not in why]
        headers += [(name, value) for name, value in place.items() if name not in known]
        headers += why.items()
        return headers


class MirrorRelay:
    """Sends the copies of one store, as long as no other process does."""

    def __init__(self, copies: Copies, broker: Broker) -> None:
        self._copies = copies
        self._broker = broker
        self._under_way: dict[int, asyncio.Task[None]] = {}
        self._rest: dict[int, float] = {}  # copies that failed, and when each is tried again
        self._sent: set[int] = set()
        self._after = 0
        self._news = False  # this time round, a copy was seen that has not failed
        self._said = float("-inf")
        self.emptied = asyncio.Event()  # set while nothing is left but what failed

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                try:
                    if not await self._copies.claim():
                        await asyncio.sleep(CLAIM_SECONDS)
                        continue
                    await self._round()
                except UnlostError as e:
                    self._say(e)
                await self._copies.wait(CLAIM_SECONDS)
        finally:
            for task in self._under_way.values():
                task.cancel()

    async def _round(self) -> None:
        """The next page of what is there, and round again: so those that fail for long do not hide the others."""
        if self._sent:
            sent = list(self._sent)
            await self._copies.sent(sent)
            self._sent.difference_update(sent)
        if self._after == 0:
            self._news = False
        rows = await self._copies.page(self._after, PAGE)
        if not rows and self._after == 0:
            self._rest.clear()
        self._after = rows[-1].number if len(rows) == PAGE else 0
        now = asyncio.get_running_loop().time()
        for row in rows:
            number = row.number
            self._news = self._news or number not in self._rest
            rests = number in self._under_way or number in self._sent or now < self._rest.get(number, 0)
            if not rests and len(self._under_way) < UNDER_WAY_MAX:
                self._under_way[number] = asyncio.create_task(self._send(row))
        if self._after == 0 and not self._news and not self._under_way:
            self.emptied.set()

    async def _send(self, row: Mirrored) -> None:
        try:
            await self._broker.mirror(row.topic, row.key, row.data, row.headers, row.origin)
        except Exception as e:  # whatever it is: the other copies go on
            self._rest[row.number] = asyncio.get_running_loop().time() + AGAIN_SECONDS
            self._say(e)
        else:
            self._rest.pop(row.number, None)
            self._sent.add(row.number)
        finally:
            del self._under_way[row.number]

    def _say(self, error: Exception) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._said > SAY_SECONDS:
            self._said = now
            text = error if isinstance(error, UnlostError) else repr(error)
            log.error("a copy of a dead letter cannot be sent now; it is tried again, and the shelf has it: %s", text)

    async def finish(self, seconds: float) -> None:
        """Gives what is left a last chance."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                self._after = 0
                self.emptied.clear()
                await self.emptied.wait()
