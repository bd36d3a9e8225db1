"""Opening a broker to look at it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from unlost import config
from unlost.brokers.connect import embedded_path
from unlost.errors import UsageError
from unlost.sqlite.file import File
from unlost.sqlite.guards import beside


@contextmanager
def opened(url: str | None = None) -> Iterator[File]:
    """The broker's file, for as long as the block lasts. Never makes one: looking must not create.

    Raises:
        UsageError: there is no file there.
    """
    setting = config.setting("broker", flag=url)
    path = embedded_path(setting.value)
    with suppress(PermissionError):  # opening it says that better
        if not path.exists() and not beside(path, "marks").exists():
            raise UsageError(
                "UL1301", f"there is no broker file at {path}", found=f"from {setting.source}",
                fix="start a service first (unlost run), change to the project's folder, or set UNLOST_BROKER",
            )  # fmt: skip
        if path.is_file() and path.stat().st_size == 0 and not beside(path, "marks").exists():
            raise UsageError(
                "UL1301", f"{path} is empty: no broker has been here", found=f"from {setting.source}",
                fix="start a service first (unlost run), or set UNLOST_BROKER",
            )  # fmt: skip
    file = File(path, check_tail=False)
    try:
        yield file
    finally:
        file.close()
