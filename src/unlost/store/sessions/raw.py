"""What a driver's connection says about itself. Told by its attributes, so that no driver has to be imported.

Nothing here talks to the database, and everything but `plain_text` may be called from any thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

# libpq's PGTransactionStatusType, which psycopg and psycopg2 pass on
_ACTIVE, _OPEN, _FAILED = 1, 2, 3
IN_TRANSACTION = (_ACTIVE, _OPEN, _FAILED)

_SQLITE_BUSY, _SQLITE_LOCKED = 5, 6
_SQLITE_LEGACY = -1  # sqlite3.LEGACY_TRANSACTION_CONTROL, from Python 3.12 on; before, the only way

_TRANSIENT = {
    "40001",  # serialization_failure
    "40P01",  # deadlock_detected
    "55P03",  # lock_not_available
    "57P01",  # admin_shutdown
    "57P02",  # crash_shutdown
    "57P03",  # cannot_connect_now
    "57P05",  # idle_session_timeout
    "25P03",  # idle_in_transaction_session_timeout
}
_TRANSIENT_CLASSES = {
    "08",  # connection exceptions
    "53",  # insufficient resources
}
_CAUSES_MAX = 10


def is_open(raw: Any) -> bool:
    """Whether a transaction is open on a connection of psycopg, psycopg2, sqlite3 or aiosqlite."""
    try:
        if hasattr(raw, "in_transaction"):
            return bool(raw.in_transaction)
        return raw.info.transaction_status in IN_TRANSACTION
    except Exception:  # the connection is closed
        return False


def has_failed(raw: Any) -> bool | None:
    """Whether a transaction of PostgreSQL waits for its rollback; None where the driver does not say (asyncpg)."""
    info = getattr(raw, "info", None)
    return None if info is None else bool(info.transaction_status == _FAILED)


def sqlite_autocommits(raw: Any) -> bool:
    """Whether a statement would commit by itself: no transaction is open, and the library begins none."""
    if raw.in_transaction:
        return False
    mode = getattr(raw, "autocommit", _SQLITE_LEGACY)
    return raw.isolation_level is None if mode == _SQLITE_LEGACY else bool(mode)


@contextmanager
def plain_text(raw: Any) -> Iterator[None]:
    """Lets text of SQLite come as `str`, whatever the program has chosen for its own."""
    given = raw.text_factory
    raw.text_factory = str
    try:
        yield
    finally:
        raw.text_factory = given


def plain(rows: Iterable[Iterable[Any]]) -> list[tuple[Any, ...]]:
    """Rows of whatever kind, as tuples; binary data as bytes."""
    return [tuple([bytes(v) if isinstance(v, memoryview) else v for v in row]) for row in rows]


def is_transient(error: BaseException) -> bool:
    """Looks through what SQLAlchemy (`orig`) and Django (`__cause__`) have wrapped around the driver's error."""
    seen: BaseException | None = error
    for _ in range(_CAUSES_MAX):
        if seen is None:
            return False
        if _says_transient(seen):
            return True
        seen = getattr(seen, "orig", None) or seen.__cause__
    return False


def _says_transient(error: BaseException) -> bool:
    if getattr(error, "connection_invalidated", False):  # SQLAlchemy knows each driver's words for a lost connection
        return True
    sqlite = getattr(error, "sqlite_errorcode", None)
    if sqlite is not None:
        return sqlite & 0xFF in (_SQLITE_BUSY, _SQLITE_LOCKED)
    state = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    if state is not None:
        return state in _TRANSIENT or state[:2] in _TRANSIENT_CLASSES
    # libpq gives no code when the connection was lost or could not be made
    family = type(error).__mro__
    if any(cls.__module__.partition(".")[0] in ("psycopg", "psycopg2") for cls in family):
        return any(cls.__name__ == "OperationalError" for cls in family) or "connection already closed" in str(error)
    return isinstance(error, OSError) and _of_asyncpg(error)


def _of_asyncpg(error: BaseException) -> bool:
    """asyncpg lets the socket's own error out when it cannot connect."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__", "").startswith("asyncpg."):
            return True
        trace = trace.tb_next
    return False
