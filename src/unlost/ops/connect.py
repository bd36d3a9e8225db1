"""Opening a broker and its store to look at them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from unlost import config
from unlost.brokers.connect import check_kafka, embedded_path, is_kafka, kafka_log
from unlost.brokers.embedded.log import EmbeddedLog
from unlost.brokers.port import Log
from unlost.config import Setting, hide_secrets
from unlost.delivery import note
from unlost.errors import UsageError, invariant
from unlost.events.topic import Decoder, Unit
from unlost.sqlite import guards
from unlost.sqlite.file import File
from unlost.store import connect as stores
from unlost.store.port import Look, Records
from unlost.store.records import FileRecords

NO_FILE = "UL1301"
_NO_TABLES = "UL1160"
ELSEWHERE = "UL1304"


class Looking:
    """A broker and the store of its services, for those who look. Each is opened when it is first asked for.

    With the embedded broker both are one file, unless the store is in PostgreSQL. `name` is the broker for people,
    without secrets; `place` is where the store is.
    """

    def __init__(self, broker: Setting, store: Setting, decoders: Mapping[str, Decoder] | None = None) -> None:
        """
        Raises:
            UsageError: one of the URLs means nothing here.
        """
        self.url = broker.value
        self.embedded = not is_kafka(broker.value)
        self.postgres = stores.is_postgres(store.value)
        self.log_here = self.embedded and not self.postgres  # log and store are one file
        self.elsewhere: Sequence[str] = ()  # services of the embedded broker whose progress is in another store
        self.lost: Sequence[
            tuple[str, str]
        ] = ()  # services that have told it of progress in this one, and what is gone of it
        self._source = broker.source
        self.store_url = store.value
        self._store = store
        self._decoders = decoders
        self._file: File | None = None
        self._own: File | None = None  # of a store beside Kafka
        self._records: Records | None = None
        self._log: Log | None = None
        if self.embedded:
            self.broker_path = embedded_path(broker.value)
            self.name = str(self.broker_path)
        else:
            self.name = hide_secrets(broker.value)
        if self.postgres:
            self.place = hide_secrets(store.value)
        else:
            self.store_path = self.broker_path if self.embedded else stores.store_path(store.value)
            self.place = str(self.store_path)

    @property
    def file(self) -> File:
        """The embedded broker's own.

        Raises:
            UsageError: there is none. Looking does not make one.
        """
        invariant(self.embedded, "only the embedded broker has a file of its own")
        if self._file is None:
            _must_exist(
                self.broker_path, NO_FILE, f"there is no broker file at {self.broker_path}", f"from {self._source}",
                "change to the project's folder, or set UNLOST_BROKER",
            )  # fmt: skip
            file = File(self.broker_path, check_tail=False)
            self._file = file
            if (other := belongs_to(FileRecords(file))) is not None:
                raise UsageError(
                    "UL1303", f"{self.broker_path} is the store beside another broker", found=other,
                    fix=f"--broker kafka://…, and UNLOST_STORE=embedded://{self.broker_path.absolute()}",
                )  # fmt: skip
        return self._file

    @property
    def records(self) -> Records:
        """The store's tables.

        Raises:
            UsageError: there are none, or those of the services are elsewhere. Unavailable: nobody answers.
        """
        if self._records is None:
            self._records = self._open()
            if self.embedded:
                self._compare(self._records)
        return self._records

    @property
    def store(self) -> Records | None:
        """The same, or None where nobody has made it yet."""
        if self.postgres:
            try:
                return self.records
            except UsageError as e:
                if e.code == _NO_TABLES:
                    return None
                raise
        with suppress(PermissionError):  # opening it says that better
            if not self.embedded and not _is_there(self.store_path):
                return None
        return self.records

    def _open(self) -> Records:
        if self.postgres:
            return stores.records(self._store.value)
        if self.embedded:
            return FileRecords(self.file)
        _must_exist(
            self.store_path, "UL1302", f"there is no store at {self.store_path}",
            f"from {self._store.source}; the broker is {self.name}, which keeps the log and no progress",
            "change to the project's folder, or set UNLOST_STORE",
        )  # fmt: skip
        self._own = File(self.store_path, check_tail=False)
        return FileRecords(self._own)

    def _compare(self, records: Records) -> None:
        """The services that the embedded broker knows with those of this store.

        Raises:
            UsageError: none of them keeps its progress here.
        """
        here = records.read(_units)
        own, followers = self.file.read(lambda c: (_units(c), _followers(c)))
        lost = {unit for unit, store in followers.items() if store == records.id} - here
        known = _services(here | lost)
        others = _services({*followers, *(own if self.postgres else ())}) - known
        if others and not known:
            in_file = others <= _services(own)
            raise UsageError(
                ELSEWHERE, "the progress of these services is kept in another store",
                found=f"{', '.join(sorted(others))}; UNLOST_STORE ({self._store.source}) "
                + (f"names {self.place}" if self.postgres else "names no other than the broker's own file"),
                fix="leave UNLOST_STORE empty: their progress is in the broker's own file" if in_file
                else "UNLOST_STORE=postgresql://…: the URL that the services use",
            )  # fmt: skip
        self.elsewhere = sorted(others)
        self.lost = [
            (u.service, f"{u}: the broker was told of its progress in this store, and it is gone") for u in sorted(lost)
        ]

    @property
    def log(self) -> Log:
        """
        Raises:
            Unavailable: the broker does not answer. UsageError: there is none.
        """
        if self._log is None:
            self._log = EmbeddedLog(self.file) if self.embedded else kafka_log(self.url, self._decoders)
        return self._log

    def decoder(self, topic: str) -> Decoder | None:
        """What the App that was named has declared for this topic."""
        return (self._decoders or {}).get(topic)

    def pair(self) -> tuple[Records, Log]:
        """Both, sure to belong together.

        Raises:
            UsageError: the saved positions are those of another broker; they mean nothing on this one.
        """
        records, log = self.records, self.log
        if not self.log_here:
            known = belongs_to(records)
            if known is not None and known != log.identity:
                raise UsageError(
                    "UL1133", "this store belongs to another broker", found=f"{self.place} was used with {known}, this is {log.identity}",
                    fix="name the broker that it was used with (--broker), or another store (UNLOST_STORE)",
                )  # fmt: skip
        return records, log

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
        if self._records is not None:
            self._records.close()
        for file in (self._file, self._own):
            if file is not None:
                file.close()


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
    looking = Looking(setting, config.setting("store", code=store), decoders)
    try:
        if looking.embedded:
            _ = looking.file  # every look begins here
        yield looking
    finally:
        looking.close()


def belongs_to(records: Records) -> str | None:
    """The broker that keeps the log of this store elsewhere; None: it is the embedded broker's own file."""
    row = records.read(lambda look: look.execute("select value from unlost_meta where name = 'broker'").fetchone())
    return None if row is None else str(row[0])


def log_of(records: Records) -> Log:
    """The log in the same file."""
    invariant(isinstance(records, FileRecords), "only a store that is a file has a log")
    assert isinstance(records, FileRecords)
    return EmbeddedLog(records.file)


def _units(look: Look) -> set[Unit]:
    return {Unit(*row) for row in look.execute("select service, topic, partition from unlost_progress")}


def _followers(look: Look) -> dict[Unit, str]:
    """Units of the embedded broker whose progress is elsewhere, and the id of the store that has told it of them."""
    found: dict[Unit, str] = {}
    for *unit, text in look.execute("select service, topic, partition, note from unlost_follower"):
        said = note.decode(text)
        found[Unit(*unit)] = "" if said is None else said.store
    return found


def _services(units: Collection[Unit]) -> set[str]:
    return {unit.service for unit in units}


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
