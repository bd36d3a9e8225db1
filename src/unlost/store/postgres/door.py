"""The outbox in PostgreSQL on the side of those who publish: statements for their transaction, and a call to the relays
after its commit.

The call comes from a connection of its own, never from the user's transaction (a NOTIFY in there would make all commits of
the server queue up); calls that come together are one. If it is missed, the relays look now and then anyway.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Sequence

from psycopg import Connection

from unlost.errors import UnlostError
from unlost.events import Envelope
from unlost.store.postgres import rows
from unlost.store.postgres.client import statement, told
from unlost.store.postgres.outbox import HUNG_SECONDS, LIVES
from unlost.store.postgres.schema import quoted
from unlost.store.postgres.settings import Settings
from unlost.store.sessions.port import AnySession
from unlost.store.steps import Steps, in_schema
from unlost.world import REAL

log = logging.getLogger("unlost.outbox")

LOOK_SECONDS = 0.0005  # when it is looked whether a transaction has ended; then less and less often
SELDOM_SECONDS = 0.005
CALL_SECONDS = 0.005  # from one call to the next, for those that come together are one
CALLING = 0.2  # no more of the time is spent on calls
OPEN_MAX = 32  # transactions that are looked at; a busy connection is in its next one whenever it is
LONG_SECONDS = 0.5  # a transaction that is open longer is found by the relays themselves
IDLE_SECONDS = 10.0  # then the thread ends
WARN_SECONDS = 60.0
UNSENT_SECONDS = 5.0  # so long something may wait before the lack of a relay is worth a word


class PostgresDoor:
    """For all threads and event loops of a process."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._schema = quoted(settings.schema)
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()  # of the thread and what it looks at: held for no longer than that takes
        self._talking = threading.Lock()  # of the connection
        self._bell = threading.Event()  # there is something to look at
        self._store_id = ""
        self._open: deque[tuple[AnySession, float]] = deque()
        self._thread: threading.Thread | None = None
        self._connection: Connection[tuple[object, ...]] | None = None
        self._warned = float("-inf")

    @property
    def ready(self) -> bool:
        return bool(self._store_id) and self._pid == os.getpid()

    def prepare(self) -> None:
        """Learns which store this is. Asks the server the first time. Blocks."""
        if self.ready:
            return
        if self._pid != os.getpid():  # a fork of a server process: connections and threads are the parent's
            self._begin_anew()
        with self._talking:
            if self._store_id:
                return
            with told(self._settings):
                cursor = self._connected().execute(
                    statement("select value from unlost_meta where name = 'store_id'", self._schema)
                )
                row = cursor.fetchone()
            self._store_id = str(row[0]) if row else "?"

    def _connected(self) -> Connection[tuple[object, ...]]:
        if self._connection is None or self._connection.closed or self._connection.broken:
            # through a pooler that shares sessions as well, where a prepared statement would be in another one
            self._connection = Connection.connect(self._settings.conninfo, autocommit=True, prepare_threshold=None)
        return self._connection

    def put(self, envelopes: Sequence[Envelope]) -> Steps[None]:
        steps = rows.put(envelopes, self._store_id)
        try:
            text, bindings = next(steps)
            while True:
                found = yield in_schema(text, self._schema), bindings
                text, bindings = steps.send(found)
        except StopIteration:
            return

    def woken_after(self, session: AnySession) -> None:
        with self._lock:
            self._open.append((session, REAL.monotonic()))
            if self._thread is None:
                self._thread = threading.Thread(target=self._call, name="unlost-outbox", daemon=True)
                self._thread.start()
            first = len(self._open) == 1
        if first:
            self._bell.set()

    def _call(self) -> None:
        """Looks at the transactions that hold events, and calls when some of them have ended."""
        while True:
            rang = self._bell.wait(IDLE_SECONDS)
            self._bell.clear()
            with self._lock:
                if not rang and not self._open:
                    self._thread = None
                    return
            wait = LOOK_SECONDS
            while self._open:
                REAL.pause(wait)
                wait = min(wait * 1.5, SELDOM_SECONDS)
                if self._has_ended():
                    began = REAL.monotonic()
                    self._notify()
                    REAL.pause(max(CALL_SECONDS, (REAL.monotonic() - began) / CALLING))
                    wait = LOOK_SECONDS

    def _has_ended(self) -> bool:
        now, ended = REAL.monotonic(), False
        for _ in range(len(self._open)):
            session, since = self._open.popleft()
            if len(self._open) >= OPEN_MAX:
                ended = True
            elif now - since <= LONG_SECONDS:
                if session.in_transaction:
                    self._open.append((session, since))
                else:
                    ended = True
        return ended

    def _notify(self) -> None:
        try:
            with told(self._settings), self._talking:
                connection = self._connected()
                connection.execute("select pg_notify(%s, '')", (self._settings.channel,))
                if REAL.monotonic() - self._warned > WARN_SECONDS:
                    self._warn(connection)
        except UnlostError as e:
            log.debug("the relays could not be called; they look now and then anyway: %s", e)

    def _warn(self, connection: Connection[tuple[object, ...]]) -> None:
        """Where only web processes run, nobody sends."""
        self._warned = REAL.monotonic()
        cursor = connection.execute(
            statement(
                f"select exists (select 1 from unlost_process q where q.relays and {LIVES.format(process='q.id')}), "
                "(select extract(epoch from now() - added)::double precision from unlost_outbox order by seq limit 1)",
                self._schema,
            ),
            (self._settings.lock_class, HUNG_SECONDS),
        )
        row = cursor.fetchone()
        assert row is not None
        lives, age = row
        if not lives and isinstance(age, float) and age > UNSENT_SECONDS:
            log.warning(
                "UL1257: nobody sends what stands in the outbox of %s; the oldest event waits for %.0f s. Nothing is lost. "
                "Start a relay: `unlost run APP` (any running App of this store sends)",
                self._settings.shown, age,
            )  # fmt: skip

    def __del__(self) -> None:
        self.close()  # an App that was never entered is never left

    def close(self) -> None:
        if self._pid != os.getpid():
            return  # after a fork: the connection is the parent's, and so may be whoever holds the lock
        with self._talking:
            if self._connection is not None:
                self._connection.close()
            self._connection = None
