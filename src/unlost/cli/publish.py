"""`unlost publish`."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from cyclopts import Parameter

from unlost.app import App
from unlost.brokers.connect import is_kafka
from unlost.brokers.port import Receipt
from unlost.cli.options import AppName, BrokerUrl, JsonLines, count
from unlost.cli.say import clean, clean_lines, nobody_reads, note, out, print_json, red
from unlost.errors import PartlyPublished, UnlostError, UsageError
from unlost.events import Envelope, Event, seal
from unlost.ops.load import load
from unlost.ops.publish import LINE_BYTES_MAX, build, event_classes, find_class, read_line, split_fields
from unlost.ops.tail import moment
from unlost.world import REAL, rfc3339

BATCH_MAX = 500
_CHUNK = 1 << 18


def publish(
    type: Annotated[
        str, Parameter(allow_leading_hyphen=True, help="Wire type or class name; or - for lines from stdin.")
    ],
    /,
    *fields: Annotated[
        str, Parameter(allow_leading_hyphen=True, help="field=value, or - for lines of bare data from stdin.")
    ],
    id: Annotated[
        str | None, Parameter(help="Id of the event; publishing it again with the same id is recognised.")
    ] = None,
    occurred_at: Annotated[str | None, Parameter(help="When it happened: RFC 3339, or 10m (ago).")] = None,
    header: Annotated[
        list[str] | None, Parameter(name="--header", negative="", help="name=value; may be given again.")
    ] = None,
    app: AppName = None,
    broker: BrokerUrl = None,
    json: JsonLines = False,
) -> int:
    """Publish an event, or one per line of stdin.

    A command is sent in the same way. Values are checked against the class in your code. Prints the receipt: the event's id and its place in the log;
    when you see it, the event is durable. From stdin, each line is acknowledged when it is durable; a line that is no
    event is refused with its number, the others go on, and the command ends with 1.

    **Needs** your code and the broker.

    **Examples**

    - `unlost publish OrderPlaced order_id=A1 total_cents=1999 --app hello`
    - `unlost publish OrderPlaced - < orders.ndjson` reads bare data: `{"order_id": "A1", "total_cents": 1999}`
    - `unlost publish - < events.ndjson` reads `{"type": "order.OrderPlaced", "data": {...}, "id": "A1-placed"}`; lines
      with an id can safely be sent again
    """
    lines = type == "-" or fields == ("-",)
    if lines and (id is not None or occurred_at is not None or header or (type == "-" and fields)):
        raise UsageError(
            "UL1329", "lines from stdin bring their own fields, id, time and headers",
            fix='write them into the line: {"type": ..., "data": {...}, "id": ..., "headers": {...}}',
        )  # fmt: skip
    loaded = load(app, broker=broker)
    for line in loaded.notes:
        note(clean_lines(line))
    if lines:
        return _Lines(loaded.app, None if type == "-" else find_class(type), json).run()
    cls = find_class(type)
    envelope = _one(loaded.app, cls, list(fields), id, occurred_at, header or [])
    with asyncio.Runner() as runner:
        receipt = runner.run(_accept_one(loaded.app, envelope, cls.__unlost__.is_command))
    _acknowledge(receipt, json)
    return 0


def _one(
    app: App, cls: type[Event], fields: list[str], id: str | None, occurred_at: str | None, header: list[str]
) -> Envelope:
    values, field_id = split_fields(cls, fields)
    if id is not None and field_id is not None:
        raise UsageError("UL1323", "the id is given twice", found=f"id={field_id} and --id {id}")
    headers = {}
    for text in header:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError("UL1323", "a header is given as name=value", found=repr(text)[:100])
        headers[name] = value
    when = None
    if occurred_at is not None:
        from datetime import UTC, datetime, timedelta

        when = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=moment(occurred_at))
    event = build(cls, values)
    return seal(
        event, source=app.name, id=field_id if id is None else id, occurred_at=when, headers=headers, now=REAL.now()
    )


async def _accept_one(app: App, envelope: Envelope, is_command: bool) -> Receipt:
    async with app:
        _say_if_made(app)
        if is_command:
            await app.check_queue(envelope.topic)
        return (await app.accept([envelope]))[0]


def _say_if_made(app: App) -> None:
    try:
        file = app.file
    except UsageError:
        return  # broker and store are servers: nothing is made here
    if file.created:
        note(f"made {'the store ' if is_kafka(app.url) else ''}{clean(file.path)}")


class _Lines:
    """Events from stdin. What has come in is published as one batch, so that a slow source does not wait for its
    receipts and a fast one does not pay for each line."""

    def __init__(self, app: App, cls: type[Event] | None, as_json: bool) -> None:
        self._app = app
        self._cls = cls
        self._json = as_json
        # queues of which it is not known yet that a service is there for them
        self._unchecked = {c.__unlost__.topic for c in event_classes() if c.__unlost__.is_command}
        self._number = 0
        self._accepted = 0
        self._refused = 0

    def run(self) -> int:
        with asyncio.Runner() as runner:
            runner.run(self._app.__aenter__())
            _say_if_made(self._app)
            try:
                for lines in _chunks():
                    for start in range(0, len(lines), BATCH_MAX):
                        self._publish(runner, lines[start : start + BATCH_MAX])
            finally:
                self._summary()
                runner.run(self._app.__aexit__(None, None, None))
        return 1 if self._refused else 0

    def _publish(self, runner: asyncio.Runner, lines: list[bytes]) -> None:
        batch: list[tuple[int, Envelope]] = []
        for raw in lines:
            self._number += 1
            if not raw.strip():
                continue
            try:
                if len(raw) > LINE_BYTES_MAX:
                    raise UsageError("UL1327", f"a line has at most {LINE_BYTES_MAX} bytes")
                envelope = read_line(raw, self._cls, source=self._app.name, now=REAL.now())
                self._app.broker.check(envelope)
                if envelope.topic in self._unchecked:
                    runner.run(self._app.check_queue(envelope.topic))
                    self._unchecked.remove(envelope.topic)
                batch.append((self._number, envelope))
            except UnlostError as e:
                self._refuse(e, self._number)
        if batch:
            failed: PartlyPublished | None = None
            try:
                receipts: Sequence[Any] = runner.run(self._app.accept([envelope for _, envelope in batch]))
            except PartlyPublished as e:
                receipts, failed = e.receipts, e
            self._accepted += sum(receipt is not None for receipt in receipts)
            try:
                for (number, _), receipt in zip(batch, receipts, strict=True):
                    if receipt is not None:
                        _acknowledge(receipt, self._json, number)
                sys.stdout.flush()
            except (
                BrokenPipeError
            ):  # whoever read the receipts has left; the rest of the input is published all the same
                nobody_reads()
            if failed is not None:
                for place, error in sorted(failed.failed.items()):
                    self._refuse(error, batch[place][0])
                raise failed

    def _refuse(self, e: UnlostError, number: int) -> None:
        self._refused += 1
        if self._json:
            members = {"line": number, "code": e.code, "what": e.what, "found": e.found, "fix": e.fix}
            print_json("refused/1", members)
        note(red(clean_lines(f"line {number}: {e}")))

    def _summary(self) -> None:
        refused = f", {count(self._refused, 'line')} refused" if self._refused else ""
        note(f"{count(self._accepted, 'event')} published{refused}")


def _chunks() -> Iterator[list[bytes]]:
    """Whole lines as they come in. An endless line is cut, so that it is refused and not collected in memory."""
    rest = b""
    while chunk := _read():
        if b"\n" not in chunk:
            rest = (rest + chunk)[: LINE_BYTES_MAX + 1]
            continue
        *lines, rest = (rest + chunk).split(b"\n")
        yield lines
    if rest:
        yield [rest]


def _read() -> bytes:
    try:
        return os.read(0, _CHUNK)
    except OSError as e:
        raise UsageError("UL1338", "there is nothing to read on stdin", found=str(e)) from e


def _acknowledge(receipt: Receipt, as_json: bool, line: int | None = None) -> None:
    if as_json:
        members = {
            "id": receipt.id, "topic": receipt.topic, "partition": receipt.partition, "position": receipt.position,
            "recorded": rfc3339(receipt.recorded),
        }  # fmt: skip
        print_json("receipt/1", members if line is None else {"line": line, **members}, flush=line is None)
    else:
        out(f"{clean(receipt.id)}  {receipt.topic}/{receipt.partition}:{receipt.position}")
