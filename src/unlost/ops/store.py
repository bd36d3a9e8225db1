"""The tables of a store in PostgreSQL: made, brought up to date, or printed for whoever administers the database."""

from __future__ import annotations

import msgspec

from unlost.errors import Unavailable, UnlostError, UsageError
from unlost.store import connect as stores
from unlost.store.postgres.schema import FORMAT

NO_DATABASE = (
    "UL1166",
    "UL1167",
)  # it does not let us in, or is not there yet: its administrator may still want the script


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be done. `sql` is one transaction, and empty where there is nothing to do."""

    store: str
    found: int  # the format of the tables that are there; 0: there are none
    format: int  # that of this release
    role: str  # gets the rights of a service
    sql: str
    assumed: str = ""  # why it was not looked

    @property
    def changes_tables(self) -> bool:
        """Whether tables are changed that are there already."""
        return 0 < self.found < self.format


def plan(url: str, *, role: str = "", found: int | None = None, offline: bool = False) -> Plan:
    """What brings this store to the format of this release. `found` says the format of its tables, and nobody looks;
    `offline` takes it for empty where nobody answers.

    Raises:
        UsageError: the tables are foreign, or of a newer release. Unavailable: nobody answers.
    """
    settings = stores.postgres(url)
    from unlost.store.postgres import migrate

    assumed = ""
    if found is None:
        try:
            found = migrate.found(settings)
        except UnlostError as e:
            if not offline or not (isinstance(e, Unavailable) or e.code in NO_DATABASE):
                raise
            found, assumed = 0, f"{e.what}: {e.found}"
    sql = migrate.script(settings, found, role)
    return Plan(store=settings.shown, found=found, format=FORMAT, role=role, sql=sql, assumed=assumed)


def migrate(url: str, *, role: str = "", operator: str, reason: str) -> tuple[int, int]:
    """Does it, and records who has done it; returns the formats before and after.

    **After a crash** it happened or it did not; running it again is harmless.

    Raises:
        UsageError: the tables are foreign or newer, or a right is missing. Unavailable: nobody answers.
    """
    settings = stores.postgres(url)
    from unlost.store.postgres.migrate import migrate as run

    return run(settings, role, operator=operator, reason=reason)


def check_format(text: str) -> int:
    """
    Raises:
        UsageError: it is no format that there was.
    """
    if not (text.isascii() and text.isdigit() and int(text) <= FORMAT):
        raise UsageError(
            "UL1341", "--from is the format of the tables that are there", found=repr(text), fix=f"0 (there are none) to {FORMAT}",
        )  # fmt: skip
    return int(text)
