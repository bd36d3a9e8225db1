"""Real PostgreSQL on this machine, ended with the test that started it.

`python tests/servers/postgres.py [--set KEY=VALUE]` runs one until Ctrl-C and prints its URL. Its binaries are those of
`PGBIN`, else Debian's newest, else those on the path. `UNLOST_TEST_POSTGRES=postgresql://…` names a superuser's server
to use instead. Port, data and log are a server's own, so several can run at the same time.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from servers import process
from servers.process import CannotStartError, Child, Folder, free_ports

GIVEN = "UNLOST_TEST_POSTGRES"
VERSION_MIN = 14
SECONDS = 60

_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "200",
    "fsync": "on",  # this and the next are promises under test
    "synchronous_commit": "on",
    "dynamic_shared_memory_type": "mmap",  # in the folder of the data, so that a kill leaves nothing elsewhere
    "timezone": "UTC",
    "log_line_prefix": "%m [%p] %u@%d ",
}


@functools.cache
def available(*, own: bool = False) -> str | None:
    """Why no PostgreSQL can be had here, or None; with `own`, why none can be started, given or not."""
    if os.environ.get(GIVEN) and not own:
        return None
    try:
        version()
        process.unprivileged()
    except CannotStartError as why:
        return str(why)
    return None


@functools.cache
def binaries() -> Path:
    """The folder with `postgres` and `initdb`."""
    named = os.environ.get("PGBIN")
    debian = [path for path in Path("/usr/lib/postgresql").glob("*/bin") if (path / "postgres").exists()]
    on_path = shutil.which("postgres")
    if named:
        found = Path(named)
    elif debian:
        found = max(debian, key=lambda path: int(re.sub(r"\D", "", path.parent.name) or 0))
    elif on_path:
        found = Path(on_path).resolve().parent
    else:
        raise CannotStartError("no postgres in /usr/lib/postgresql or on the path; install it, or set PGBIN")
    for program in ("postgres", "initdb"):
        if not (found / program).exists():
            raise CannotStartError(f"no {program} in {found}")
    return found


@functools.cache
def version() -> int:
    """The major version of the server that would be started."""
    done = subprocess.run([binaries() / "postgres", "--version"], capture_output=True, text=True)
    found = re.search(r"\d+", done.stdout)
    if found is None or int(found[0]) < VERSION_MIN:
        said = done.stdout.strip() or done.stderr.strip()
        raise CannotStartError(f"PostgreSQL {VERSION_MIN} or newer is needed, {binaries()} has: {said}")
    return int(found[0])


class Postgres:
    """A server. Made by `Postgres.start()`, ended by `with` or `remove()`. Passwords are really checked."""

    def __init__(self, url: str, *, foreign: str = "") -> None:
        parts = urlsplit(url)
        self._netloc, self._query = parts.netloc, parts.query
        self.host, self.port = parts.hostname or "127.0.0.1", parts.port or 5432
        self._foreign = foreign
        self._folder: Folder | None = None
        self._user = None if foreign else process.unprivileged()
        self._child: Child | None = None
        self._frozen: list[int] = []
        self._owner = os.getpid()

    @classmethod
    def start(cls, *, settings: Mapping[str, str] = {}, own: bool = False) -> Postgres:
        """Start a server and wait until it answers; `settings` go into postgresql.conf.

        A server named by `UNLOST_TEST_POSTGRES` is taken when there are no settings; with `own` it never is.
        """
        given = os.environ.get(GIVEN)
        if given and not (settings or own):
            return cls(given, foreign=f"was given by {GIVEN}; unset it to have one started")
        version()
        (port,) = free_ports(1)
        postgres = cls(f"postgresql://postgres:{secrets.token_hex(16)}@127.0.0.1:{port}")
        try:
            postgres._initialise(settings)
            postgres._launch()
        except BaseException:
            postgres.remove()
            raise
        return postgres

    @classmethod
    def at(cls, url: str, foreign: str) -> Postgres:
        """A server that is not ours to kill; `foreign` says why not."""
        return cls(url, foreign=foreign)

    def __enter__(self) -> Postgres:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def remove(self) -> None:
        """End it at once and remove its data. Does nothing in a forked child, whose server it is not."""
        if os.getpid() != self._owner or self._folder is None:
            return
        atexit.unregister(self.remove)
        if self._child:
            if not self._frozen:
                self._child.signal(signal.SIGQUIT)
                self._child.wait(10)
            if self._child.running():
                self.kill()
            self._child.kill()
        self._folder.remove()
        self._folder = None

    # --- using it -------------------------------------------------------------------------------------------------

    def url(self, database: str = "postgres", *, user: str | None = None, password: str = "") -> str:
        """The URL of a database: the superuser's, or that of another user."""
        netloc = self._netloc
        if user is not None:
            netloc = f"{quote(user, safe='')}:{quote(password, safe='')}@{netloc.rpartition('@')[2]}"
        query = f"?{self._query}" if self._query else ""
        return f"postgresql://{netloc}/{quote(database, safe='')}{query}"

    def sql(self, statement: str, *args: Any, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Run a statement as the superuser, each in a transaction and a connection of its own, and return its rows."""
        import psycopg

        with psycopg.connect(self.url(database), autocommit=True, connect_timeout=30) as connection:
            cursor = connection.execute(statement, args or None)
            return cursor.fetchall() if cursor.description else []

    def create_database(self, name: str) -> str:
        """Make a database and return its URL."""
        self.sql(f"CREATE DATABASE {_quoted(name)}")
        return self.url(name)

    def fresh(self) -> str:
        """The URL of a new, empty database that no other test has."""
        return self.create_database(f"test_{uuid.uuid4().hex[:12]}")

    def drop_database(self, name: str) -> None:
        """Remove a database, also while somebody is connected to it."""
        self.sql(f"DROP DATABASE IF EXISTS {_quoted(name)} WITH (FORCE)")

    def log(self) -> str:
        """What the server has printed so far."""
        return self._log.read_text(errors="replace")

    # --- faults ---------------------------------------------------------------------------------------------------

    def terminate_backends(self, where: str = "true", *args: Any, database: str | None = None) -> int:
        """End the clients' connections, all or those of a database, and say how many.

        `where` is a condition on pg_stat_activity, with `%s` for each argument. A shared server wants a database.
        """
        if database is None:
            self._ours()
        asked = f"""
            SELECT count(*) FILTER (WHERE pg_terminate_backend(pid, 30000)) FROM pg_stat_activity
            WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()
            AND (%s::text IS NULL OR datname = %s) AND ({where})"""
        ((count,),) = self.sql(asked, database, database, *args)
        return int(count)

    def kill(self) -> None:
        """SIGKILL to the server and all its processes at the same moment, and wait for their end."""
        child = self._running()
        self.freeze()
        others, self._frozen = self._frozen, []
        for pid in others:
            os.kill(pid, signal.SIGKILL)
        process.wait_ended(others)
        child.kill()

    def immediate_stop(self) -> None:
        """SIGQUIT: every process ends without finishing anything; the next start recovers from the log."""
        self._end(signal.SIGQUIT)

    def stop(self) -> None:
        """SIGINT: connections are ended, what was not committed is rolled back, and the data are written."""
        self._end(signal.SIGINT)

    def start_again(self) -> None:
        """Start it on the same data and port, and wait until it answers; stopped first if it runs."""
        self._ours()
        if self._child and self._child.running():
            self.stop()
        self._launch()

    def freeze(self) -> None:
        """SIGSTOP to the server and all its processes: it keeps its connections and does not answer."""
        child = self._running()
        child.signal(signal.SIGSTOP)
        process.wait_stopped([child.pid])  # from here on it starts no more
        self._frozen = process.children(child.pid)
        for pid in self._frozen:
            os.kill(pid, signal.SIGSTOP)
        process.wait_stopped(self._frozen)

    def go_on(self) -> None:
        child = self._running()
        for pid in self._frozen:
            os.kill(pid, signal.SIGCONT)
        self._frozen = []
        child.signal(signal.SIGCONT)

    def backup(self, folder: Path) -> None:
        """Copy the data into a folder that does not exist yet; the server must have ended, in whichever way."""
        self._ended("be copied")
        shutil.copytree(self._data, folder, symlinks=True)

    def restore(self, folder: Path) -> None:
        """Put a backup in the place of the data; the server must have ended."""
        self._ended("be replaced")
        _free_shared_memory(self._path)
        shutil.rmtree(self._data)
        shutil.copytree(folder, self._data, symlinks=True)
        (self._data / "postmaster.pid").unlink(missing_ok=True)  # of a process that ended long ago
        if self._user:
            for path in (self._data, *self._data.rglob("*")):
                os.chown(path, self._user.pw_uid, self._user.pw_gid, follow_symlinks=False)

    @property
    def pid(self) -> int:
        """The process that all others of this server are children of."""
        return self._running().pid

    # --- inside ---------------------------------------------------------------------------------------------------

    @property
    def _path(self) -> Path:
        if self._folder is None:
            self._ours()
            raise RuntimeError("this PostgreSQL was removed; start another one")
        return self._folder.path

    @property
    def _data(self) -> Path:
        return self._path / "data"

    @property
    def _log(self) -> Path:
        return self._path / "log"

    def _ours(self) -> None:
        if self._foreign:
            at = f"{self.host}:{self.port}"
            raise RuntimeError(f"the PostgreSQL at {at} {self._foreign}: its processes are not ours")

    def _running(self) -> Child:
        self._ours()
        if self._child is None or not self._child.running():
            raise RuntimeError("this PostgreSQL does not run; start_again() starts it")
        return self._child

    def _ended(self, purpose: str) -> None:
        self._ours()
        if self._child and self._child.running():
            raise RuntimeError(f"the data of a running PostgreSQL cannot {purpose}: stop() it first")

    def _initialise(self, settings: Mapping[str, str]) -> None:
        self._folder = Folder("unlost-postgres-", _free_shared_memory)
        atexit.register(self.remove)
        password = self._path / "password"
        password.write_text(urlsplit(self.url()).password or "")
        if self._user:
            for path in (self._path, password):
                os.chown(path, self._user.pw_uid, self._user.pw_gid)
        command = [str(binaries() / "initdb"), "--pgdata", str(self._data), "--username=postgres"]
        command += ["--auth=scram-sha-256", "--pwfile", str(password), "--encoding=UTF8", "--locale=C", "--no-sync"]
        done = subprocess.run(process.as_user(self._user, command), capture_output=True, text=True, cwd=self._path)
        if done.returncode:
            raise RuntimeError(f"initdb did not make {self._data}\n{done.stdout}{done.stderr}")
        password.unlink()
        with (self._data / "postgresql.conf").open("a") as conf:
            for key, value in (_SETTINGS | dict(settings)).items():
                escaped = value.replace("'", "''")
                conf.write(f"{key} = '{escaped}'\n")

    def _launch(self) -> None:
        deadline = time.monotonic() + SECONDS
        while not self._came_up(deadline):
            if time.monotonic() > deadline:
                raise TimeoutError(f"PostgreSQL is not ready after {SECONDS} s\n{self.log()[-4000:]}")
            time.sleep(0.05)

    def _came_up(self, deadline: float) -> bool:
        """Start it once; False when processes of a killed one have not let go of the data yet."""
        if self._child:
            self._child.kill()
        seen = len(self.log()) if self._log.exists() else 0
        command = [str(binaries() / "postgres"), "-D", str(self._data), "-p", str(self.port)]
        self._child = Child(process.as_user(self._user, command), self._log, self._path)
        self._frozen = []
        while self._child.running() and time.monotonic() < deadline:
            if self._ready():
                return True
            time.sleep(0.02)
        if not self._child.running() and "is still in use" not in self.log()[seen:]:
            raise RuntimeError(f"PostgreSQL ended by itself\n{self.log()[-4000:]}")
        return False

    def _ready(self) -> bool:
        """Whether it says so in its own file, whose first line is its process and whose eighth is how it is."""
        try:
            lines = (self._data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        assert self._child
        return len(lines) >= 8 and lines[0] == str(self._child.pid) and lines[7].strip() == "ready"

    def _end(self, number: int) -> None:
        child = self._running()
        if self._frozen:
            self.go_on()
        child.signal(number)
        if not child.wait(SECONDS):
            raise TimeoutError(f"PostgreSQL did not end within {SECONDS} s\n{self.log()[-2000:]}")
        child.kill()


def _free_shared_memory(folder: Path) -> None:
    """What a killed server leaves in the kernel for its next start on the same data, when there will be none."""
    try:
        lines = (folder / "data" / "postmaster.pid").read_text().splitlines()
    except OSError:
        return  # it ended by itself
    if len(lines) >= 7 and len(found := lines[6].split()) == 2:
        subprocess.run(["ipcrm", "-M", found[0]], capture_output=True)


def via(url: str, port: int) -> str:
    """The same URL through a port of this machine, where a `Wire` or a `PgBouncer` listens."""
    parts = urlsplit(url)
    login = parts.netloc.rpartition("@")[0]
    return parts._replace(netloc=f"{login}@127.0.0.1:{port}").geturl()


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs PostgreSQL until Ctrl-C.")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for postgresql.conf")
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    settings = dict(setting.split("=", 1) for setting in chosen.set)
    began = time.monotonic()
    with Postgres.start(settings=settings, own=True) as postgres:
        print(postgres.url(), flush=True)
        took = time.monotonic() - began
        print(f"ready after {took:.1f} s; files in {postgres._path}; Ctrl-C ends it", file=sys.stderr)
        try:
            signal.pause()
        except KeyboardInterrupt:
            pass  # the end that was asked for


if __name__ == "__main__":
    main()
