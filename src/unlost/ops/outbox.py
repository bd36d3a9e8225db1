"""What is accepted in the store and not in the log yet. Nothing of it is lost; a relay must live to send it."""

from __future__ import annotations

import apsw
import msgspec

from unlost.sqlite.file import File
from unlost.sqlite.process import examine


class OutboxStatus(msgspec.Struct, frozen=True, kw_only=True):
    """`oldest` in microseconds since 1970; `relay` is the process that sends, if one lives."""

    events: int
    copies: int  # of dead letters, for a topic that others read
    oldest: int | None
    relay: int | None

    @property
    def stands_still(self) -> bool:
        return bool(self.events or self.copies) and self.relay is None


def outbox(file: File) -> OutboxStatus:
    return file.read(lambda c: outbox_in(file, c))


def outbox_in(file: File, c: apsw.Connection) -> OutboxStatus:
    events, copies, oldest = c.execute(
        "select count(*) filter (where raw is null), count(*) filter (where raw is not null), min(added) from unlost_outbox"
    ).fetchone()
    row = c.execute("select r.process, p.pid from unlost_relay r join unlost_process p on p.id = r.process").fetchone()
    relay = None
    if row is not None and examine(file.run_folder, row[0]).alive:
        relay = row[1]
    return OutboxStatus(events=events, copies=copies, oldest=oldest, relay=relay)
