"""Opening a broker to look at it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from unlost import config
from unlost.brokers.connect import check_kafka, embedded_path, is_kafka, kafka_log
from unlost.brokers.embedded.log import EmbeddedLog
from unlost.brokers.port import Log
from unlost.config import hide_secrets
from unlost.errors import UsageError
from unlost.events.topic import Decoder
from unlost.sqlite import guards
from unlost.sqlite.file import File
from unlost.store.connect import store_path


class Looking:
    """A broker and the store beside it, for those who look. Each is opened when it is first asked for.

    With the embedded broker both are one file. `name` is the broker for people, without secrets; `place` is where
    its events or its progress are kept: the path of the file.
    """

    def __init__(self, url: str, path: Path, source: str, decoders: Mapping[str, Decoder] | None = None) -> None:
        self.url = url
        self.path = path
        self.embedded = not is_kafka(url)
        self.name = str(path) if self.embedded else hide_secrets(url)
        self._source = source
        self._decoders = decoders
        self._file: File | None = None
        self._log: Log | None = None

    @property
    def file(self) -> File:
        """
        Raises:
            UsageError: there is none. Looking does not make one.
        """
        if self._file is None:
            what, fix = f"there is no store at {self.path}", "change to the project's folder, or set UNLOST_STORE"
            code, found = (
                "UL1302",
                f"from {self._source}; the broker is {self.name}, which keeps the log and no progress",
            )
            if self.embedded:
                what, fix = (
                    f"there is no broker file at {self.path}",
                    "change to the project's folder, or set UNLOST_BROKER",
                )
                code, found = "UL1301", f"from {self._source}"
            _must_exist(self.path, code, what, found, fix)
            file = File(self.path, check_tail=False)
            self._file = file
            if self.embedded and (other := belongs_to(file)) is not None:
                raise UsageError(
                    "UL1303", f"{self.path} is the store beside another broker", found=other,
                    fix=f"--broker kafka://…, and UNLOST_STORE=embedded://{self.path.absolute()}",
                )  # fmt: skip
        return self._file

    @property
    def store(self) -> File | None:
        """The same, or None where nobody has made it yet."""
        with suppress(PermissionError):  # opening it says that better
            if not self.embedded and not _is_there(self.path):
                return None
        return self.file

    @property
    def log(self) -> Log:
        """
        Raises:
            Unavailable: the broker does not answer. UsageError: the store belongs to another broker.
        """
        if self._log is None:
            self._log = EmbeddedLog(self.file) if self.embedded else kafka_log(self.url, self._decoders)
        return self._log

    def decoder(self, topic: str) -> Decoder | None:
        """What the App that was named has declared for this topic."""
        return (self._decoders or {}).get(topic)

    def pair(self) -> tuple[File, Log]:
        """Both, sure to belong together.

        Raises:
            UsageError: the saved positions are those of another broker; they mean nothing on this one.
        """
        file, log = self.file, self.log
        if not self.embedded:
            known = belongs_to(file)
            if known is not None and known != log.identity:
                raise UsageError(
                    "UL1133", "this store belongs to another broker", found=f"{self.path} was used with {known}, this is {log.identity}",
                    fix="name the broker that it was used with (--broker), or another store (UNLOST_STORE)",
                )  # fmt: skip
        return file, log

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
        if self._file is not None:
            self._file.close()


@contextmanager
def opened(
    url: str | None = None, *, store: str | None = None, decoders: Mapping[str, Decoder] | None = None
) -> Iterator[Looking]:
    """The broker, for as long as the block lasts. Makes nothing: neither a file nor a topic. `store` and `decoders` (by
    topic) are what an App says in its code.

    Raises:
        UsageError: the URL means nothing here, or there is no such file.
    """
    setting = config.setting("broker", flag=url)
    if is_kafka(setting.value):
        check_kafka(setting.value)
        beside = config.setting("store", code=store)
        looking = Looking(setting.value, store_path(beside.value), beside.source, decoders)
    else:
        looking = Looking(setting.value, embedded_path(setting.value), setting.source)
    try:
        if looking.embedded:
            _ = looking.file  # every look begins here
        yield looking
    finally:
        looking.close()


def belongs_to(file: File) -> str | None:
    """The broker that keeps the log of this store elsewhere; None: it is the embedded broker's own file."""
    row = file.read(lambda c: c.execute("select value from unlost_meta where name = 'broker'").fetchone())
    return None if row is None else str(row[0])


def _must_exist(path: Path, code: str, what: str, found: str, fix: str) -> None:
    with suppress(PermissionError):  # opening it says that better
        if not _is_there(path):
            raise UsageError(code, what, found=found, fix=f"start a service first (unlost run), {fix}")
        if path.is_file() and path.stat().st_size == 0 and not guards.beside(path, "marks").exists():
            raise UsageError(
                code, f"{path} is empty: no broker has been here", found=found,
                fix="start a service first (unlost run), or set UNLOST_BROKER",
            )  # fmt: skip


def _is_there(path: Path) -> bool:
    return path.exists() or guards.beside(path, "marks").exists()
