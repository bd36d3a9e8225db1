"""What a `postgresql://` URL says, and what the driver's errors mean."""

from __future__ import annotations

import re
import zlib
from urllib.parse import unquote

import msgspec
import psycopg
from psycopg import conninfo
from psycopg_pool import PoolTimeout, TooManyRequests

from unlost.config import hide_secrets
from unlost.errors import Bug, StatementFailed, Unavailable, UnlostError, UsageError

SCHEMA = "unlost"
POOL = 10
CONNECT_SECONDS = 10
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}", re.ASCII)
_OURS = ("schema", "pool")
# A server that is not asked whether it is still there may be gone for hours before anybody notices.
_DEFAULTS = {
    "connect_timeout": str(CONNECT_SECONDS), "keepalives_idle": "20", "keepalives_interval": "5", "keepalives_count": "3",
    "tcp_user_timeout": "30000", "application_name": "unlost",
}  # fmt: skip


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Where a store is. `conninfo` has the password; `shown` has not."""

    conninfo: str
    shown: str
    schema: str
    pool: int

    def __repr__(self) -> str:
        return f"Settings({self.shown})"

    @property
    def lock_class(self) -> int:
        """Names the store among the advisory locks of its database."""
        return zlib.crc32(f"unlost {self.schema}".encode()) & 0x7FFFFFFF

    @property
    def channel(self) -> str:
        """On which those who wait are woken."""
        return f"unlost_{self.schema}"[:63]


def parse(url: str) -> Settings:
    """
    Raises:
        UsageError: it cannot be read.

    Example:
        >>> parse("postgresql://ann:s3cret@db.example/shop?schema=events&pool=20")
        Settings(postgresql://ann:***@db.example/shop?schema=events&pool=20)
    """
    front, _, query = url.partition("?")
    said = [part.partition("=") for part in query.split("&") if part]
    own = {key: unquote(value) for key, _, value in said if key in _OURS}
    rest = "&".join(f"{key}={value}" for key, _, value in said if key not in _OURS)  # as it is: in there + is no space
    schema, pool = own.get("schema", SCHEMA), own.get("pool", str(POOL))
    if not _NAME.fullmatch(schema):
        raise _wrong(url, f"schema={schema!r}", "a schema's name has letters, digits and _, at most 63")
    if not pool.isdigit() or not 1 <= int(pool) <= 1000:
        raise _wrong(url, f"pool={pool!r}", "pool is how many connections handlers may use at the same time: 1 to 1000")
    try:
        found = conninfo.conninfo_to_dict(f"{front}?{rest}" if rest else front)
        text = conninfo.make_conninfo("", **{**_DEFAULTS, **found})
    except psycopg.Error as e:
        raise _wrong(url, str(e).strip().partition("\n")[0], "postgresql://user:password@host:5432/database") from None
    if not found.get("dbname"):
        raise _wrong(url, "no database", "postgresql://user:password@host:5432/database")
    return Settings(conninfo=text, shown=hide_secrets(url), schema=schema, pool=int(pool))


def _wrong(url: str, found: str, fix: str) -> UsageError:
    return UsageError(
        "UL1157", f"this store URL cannot be read: {hide_secrets(url)}", found=hide_secrets(found), fix=fix
    )


def explained(e: BaseException, settings: Settings) -> BaseException:
    """What an error of the driver means to whoever waits. Others come back as they are."""
    if isinstance(e, UnlostError) or not isinstance(e, psycopg.Error | PoolTimeout | TooManyRequests | OSError):
        return e
    text = _first_line(e)
    state = getattr(e, "sqlstate", None) or ""
    if isinstance(e, PoolTimeout | TooManyRequests):
        return Unavailable(
            "UL2013", "no connection to the store was free in time", found=f"{settings.shown}: {text}",
            fix="it is tried again; if it stays so: is the server there, does it take more connections, is pool= too small?",
        )  # fmt: skip
    if "authentication failed" in text or "no pg_hba.conf entry" in text or "no password supplied" in text:
        return UsageError(
            "UL1166", "PostgreSQL does not let us in", found=f"{settings.shown}: {text}",
            fix="check user and password of UNLOST_STORE (or the file that UNLOST_STORE_FILE names), and pg_hba.conf",
        )  # fmt: skip
    if re.search(r'(database|role) "[^"]*" does not exist', text):
        return UsageError(
            "UL1167", "there is no such database or role", found=f"{settings.shown}: {text}",
            fix="create it; unlost store migrate makes our tables in it, and nothing else",
        )  # fmt: skip
    if not state and re.search(r"\b(invalid|bad value for)\b.*(value|number|connect_timeout)", text):
        return UsageError(
            "UL1157", "this store URL cannot be used", found=f"{settings.shown}: {text}",
            fix="postgresql://user:password@host:5432/database, and options as libpq knows them",
        )  # fmt: skip
    if state == "42501":
        return UsageError(
            "UL1162", "a right is missing in the store", found=f"{settings.shown}: {text}",
            fix="unlost store migrate --sql --role NAME prints the rights that a service needs",
        )  # fmt: skip
    if state in ("42P01", "3F000", "42703"):
        return UsageError(
            "UL1160", "the tables of unlost are not there (any more)", found=f"{settings.shown}: {text}",
            fix="unlost store migrate makes them",
        )  # fmt: skip
    if (
        state[:2] in ("40", "08", "53", "57", "58")
        or state in ("55P03", "25006", "25P03")
        or (isinstance(e, psycopg.OperationalError | psycopg.InterfaceError | OSError) and not state)
    ):
        return Unavailable(
            "UL2012", "the store cannot be written now", found=f"{settings.shown}: {text}",
            fix="it is tried again; if it stays so: is the server there, and is it the one that takes writes?",
        )  # fmt: skip
    if state == "25P02":
        return StatementFailed(
            "UL1272", "an earlier statement of this transaction failed, so nothing of it can be committed", found=settings.shown,
            fix="let it fail, or write statements that cannot (on conflict do nothing)",
        )  # fmt: skip
    return Bug(
        "UL9004", "PostgreSQL refused a statement of ours; nothing was written", found=f"{type(e).__name__}: {text}",
        fix="please report this",
    )  # fmt: skip


def _first_line(e: BaseException) -> str:
    """Servers put details of rows on the lines that follow."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return hide_secrets(lines[0])[:300] if lines else type(e).__name__
