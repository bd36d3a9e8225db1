"""Publishing from one event loop: the calls of one turn of the loop share one operation of the file.

A hundred handlers of web requests that publish at the same time cost one trip to the writer thread, not a hundred.
**Guarantee** each call gets its own answer: if the events of one cannot be stored, only that call fails.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import chain

from unlost.brokers.port import Receipt
from unlost.errors import UnlostError
from unlost.events import Envelope
from unlost.sqlite.file import File
from unlost.sqlite.transaction import Appended, Transaction

_Calls = list[tuple[Sequence[Envelope], "asyncio.Future[list[Receipt]]"]]


class Publisher:
    """Collects the calls of one event loop."""

    def __init__(self, file: File, loop: asyncio.AbstractEventLoop) -> None:
        self._file = file
        self.loop = loop
        self._calls: _Calls = []

    def publish(self, envelopes: Sequence[Envelope]) -> asyncio.Future[list[Receipt]]:
        if not self._calls:
            self.loop.call_soon(self._send)
        future: asyncio.Future[list[Receipt]] = self.loop.create_future()
        self._calls.append((envelopes, future))
        return future

    def _send(self) -> None:
        calls, self._calls = self._calls, []
        self._submit(calls)

    def _submit(self, calls: _Calls) -> None:
        def work(tx: Transaction) -> list[Appended]:
            return tx.append(chain.from_iterable(envelopes for envelopes, _ in calls))

        try:
            written = self._file.submit(work)
        except UnlostError as e:
            _fail(calls, e)
            return
        written.add_done_callback(lambda done: self._answer(calls, done))

    def _answer(self, calls: _Calls, done: asyncio.Future[list[Appended]]) -> None:
        error = done.exception()
        if error is None:
            places = iter(done.result())
            for envelopes, future in calls:
                receipts = [
                    Receipt(id=e.id, topic=e.topic, partition=partition, position=position, recorded=recorded)
                    for e, (partition, position, recorded) in zip(envelopes, places, strict=False)
                ]
                if not future.done():
                    future.set_result(receipts)
        elif len(calls) > 1 and not self._file.broken:  # one of them is to blame: each by itself, in the same order
            for call in calls:
                self._submit([call])
        else:
            _fail(calls, error)


def _fail(calls: _Calls, error: BaseException) -> None:
    for _, future in calls:
        if not future.done():
            future.set_exception(error)
