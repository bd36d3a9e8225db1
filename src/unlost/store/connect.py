"""From a URL to a store. The only place that names the stores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from unlost.config import default_path, hide_secrets
from unlost.errors import UsageError
from unlost.sqlite.file import File
from unlost.sqlite.transaction import Transaction
from unlost.store import outbox
from unlost.store.own_sqlite import OwnSqlite
from unlost.store.port import Records
from unlost.store.records import FileRecords
from unlost.store.sqlite import Mirror, SqliteStore

if TYPE_CHECKING:
    from unlost.store.postgres.door import PostgresDoor
    from unlost.store.postgres.facts import Facts
    from unlost.store.postgres.settings import Settings

    Place = PostgresDoor | OwnSqlite


def is_postgres(url: str) -> bool:
    return url.partition(":")[0] in ("postgresql", "postgres")


def store_path(url: str) -> Path:
    """The file of a store that stands beside a broker: `embedded:///path/store.db`; empty: beside pyproject.toml.

    Raises:
        UsageError: the URL means something else.
    """
    if not url:
        return default_path().with_name("store.db")
    parts = urlsplit(url)
    path = unquote(parts.path)
    if parts.scheme != "embedded" or parts.netloc or parts.query or not path:
        raise UsageError(
            "UL1141", "a store URL looks like embedded:///path/store.db or postgresql://user@host/database",
            found=hide_secrets(url), fix="three slashes for an absolute path; none for a relative one",
        )  # fmt: skip
    return Path(path)


def store_beside(file: File, *, log_here: bool, broker: str, mirror: Mirror | None = None) -> SqliteStore:
    """The store in a file: events that handlers publish go into the log, if that is in the same file, else into the
    outbox."""
    if log_here:
        return SqliteStore(file, Transaction.append)
    return SqliteStore(file, outbox.put, broker=broker, mirror=mirror)


def postgres(url: str) -> Settings:
    """What a `postgresql://` URL says.

    Raises:
        UsageError: it cannot be read, or the driver is not installed.
    """
    try:
        import psycopg
        import psycopg_pool
    except ImportError as e:
        raise UsageError(
            "UL1156", "postgresql:// needs the driver of PostgreSQL", found=str(e), fix='pip install "unlost[postgres]"'
        ) from None
    del psycopg, psycopg_pool
    from unlost.store.postgres.settings import parse

    return parse(url)


def place_of(url: str) -> Place:
    """The outbox behind a URL, on the side of those who publish: `postgresql://…` or `sqlite:///path/shop.db`.

    Raises:
        UsageError: the URL means nothing here.
    """
    if is_postgres(url):
        settings = postgres(url)
        from unlost.store.postgres.door import PostgresDoor

        return PostgresDoor(settings)
    return OwnSqlite(sqlite_path(url))


def store_id(url: str) -> str:
    """Of the store in the database behind a `postgresql://` URL; "" where there is none. Blocks."""
    settings = postgres(url)
    from unlost.store.postgres.migrate import store_id as look

    return look(settings)


def sqlite_path(url: str) -> Path:
    """The file of a `sqlite:///path/shop.db` URL, which is the service's own.

    Raises:
        UsageError: it is none.
    """
    parts = urlsplit(url)
    path = unquote(parts.path)
    if parts.scheme != "sqlite" or parts.netloc or parts.query or path in ("", "/"):
        raise UsageError(
            "UL1261", "an outbox of your own is postgresql://user@host/database or sqlite:///path/shop.db",
            found=hide_secrets(url), fix="three slashes for a path from here, four for an absolute one (as in SQLAlchemy)",
        )  # fmt: skip
    return Path(path[1:]).resolve()


def records(url: str) -> Records:
    """The tables behind a `postgresql://` URL, for those who look.

    Raises:
        UsageError: they are not there, or not ours. Unavailable: nobody answers.
    """
    settings = postgres(url)
    from unlost.store.postgres.records import PostgresRecords

    return PostgresRecords(settings)


def examine(url: str) -> Facts:
    """What can be seen of the database behind a `postgresql://` URL, whether it is a store or not.

    Raises:
        UsageError: it does not let us in. Unavailable: nobody answers.
    """
    settings = postgres(url)
    from unlost.store.postgres.examine import examine as look

    return look(settings)


__all__ = [
    "FileRecords", "is_postgres", "place_of", "postgres", "records", "sqlite_path", "store_beside", "store_path",
]  # fmt: skip
