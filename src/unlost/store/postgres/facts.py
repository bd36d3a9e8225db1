"""What `unlost doctor` reads of a store in PostgreSQL. Values only: what they mean is said in `ops/doctor_postgres.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec


class Held(NamedTuple):
    """Who keeps old rows alive: a transaction that is open for long, or a prepared one."""

    what: str
    seconds: float


class Table(NamedTuple):
    """What the server has counted; its numbers are estimates."""

    live: int
    dead: int
    cleaned: bool  # autovacuum may clean it


class Absent(NamedTuple):
    """A process that the store knows, and that gives no sign of life."""

    pid: int
    host: str
    seconds: float
    alive: bool  # its session is there
    units: int  # that it had


class Facts(msgspec.Struct, kw_only=True):
    """`unread`: what could not be asked, and why. Times in seconds."""

    shown: str
    schema: str
    role: str
    # the server
    version: int
    version_text: str
    encoding: str
    replica: bool
    read_only: bool
    settings: Mapping[str, tuple[str, str]]  # name -> value as this role gets it, and where that was said
    encrypted: bool
    remote: bool  # it is on another machine
    pooler: bool = False
    ahead: float  # its clock, of this machine's
    blur: float  # how exactly that is known
    # the tables
    there: bool = False
    format: str = ""
    missing: Sequence[str] = ()
    lacking: Sequence[tuple[str, str]] = ()  # rights: table, right
    cache: int = 1  # numbers that a session takes from the outbox's sequence at once
    tables: Mapping[str, Table] = {}
    inbox: tuple[int, int] = (0, 0)  # rows, bytes
    absent: Sequence[Absent] = ()
    # what goes on
    held: Sequence[Held] = ()
    hidden: int = 0  # sessions of others, of which this role sees nothing
    used: int = 0  # connections
    limit: int = 0  # that this role can have, with those of everybody else
    limit_of: str = ""
    unread: dict[str, str] = {}
