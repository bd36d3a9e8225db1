"""Real PgBouncer in front of a PostgreSQL, in the mode of transactions or of sessions, ended with its test.

`python tests/servers/pgbouncer.py postgresql://… [--mode session]` runs one until Ctrl-C and prints its URL.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import unquote, urlsplit

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from servers import process
from servers.postgres import via
from servers.process import CannotStartError, Child, Folder, free_ports

Mode = Literal["transaction", "session"]
SECONDS = 30


@functools.cache
def available() -> str | None:
    """Why no PgBouncer can be had here, or None."""
    try:
        _binary()
        process.unprivileged()
    except CannotStartError as why:
        return str(why)
    return None


def _binary() -> str:
    found = shutil.which("pgbouncer", path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin")))
    if found is None:
        raise CannotStartError("no pgbouncer on the path; install it (Debian: pgbouncer)")
    return found


class PgBouncer:
    """A pooler. Made by `PgBouncer.start()`, ended by `with` or `remove()`.

    Every user and every database of the server can be had through `via(url)`; passwords are really checked.
    """

    def __init__(self, url: str, mode: Mode) -> None:
        self._behind = url
        self.mode: Mode = mode
        (self.port,) = free_ports(1)
        self._user = process.unprivileged()
        self._folder: Folder | None = None
        self._child: Child | None = None
        self._owner = os.getpid()

    @classmethod
    def start(cls, url: str, mode: Mode = "transaction", *, settings: Mapping[str, str] = {}) -> PgBouncer:
        """Start one in front of the server of a superuser's URL; `settings` go into the section [pgbouncer]."""
        _binary()
        bouncer = cls(url, mode)
        try:
            bouncer._configure(settings)
            bouncer.start_again()
        except BaseException:
            bouncer.remove()
            raise
        return bouncer

    def __enter__(self) -> PgBouncer:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def remove(self) -> None:
        """End it at once. Does nothing in a forked child, whose pooler it is not."""
        if os.getpid() != self._owner:
            return
        atexit.unregister(self.remove)
        if self._child:
            self._child.kill()
        if self._folder:
            self._folder.remove()
            self._folder = None

    def via(self, url: str) -> str:
        """A URL of the server behind it, led through it."""
        return via(url, self.port)

    def kill(self) -> None:
        """SIGKILL, and wait for the end: the connections to both sides are gone."""
        assert self._child
        self._child.kill()

    def start_again(self) -> None:
        """Start it on the same port, and wait until it listens; killed first if it runs."""
        if self._child:
            self._child.kill()
        command = [_binary(), str(self._path / "ini")]
        self._child = Child(process.as_user(self._user, command), self._path / "log", self._path)
        deadline = time.monotonic() + SECONDS
        while not self._listens():
            if not self._child.running() or time.monotonic() > deadline:
                raise RuntimeError(f"PgBouncer did not start\n{self.log()[-4000:]}")
            time.sleep(0.02)

    def log(self) -> str:
        """What it has printed so far."""
        return (self._path / "log").read_text(errors="replace")

    # --- inside ---------------------------------------------------------------------------------------------------

    @property
    def _path(self) -> Path:
        if self._folder is None:
            raise RuntimeError("this PgBouncer was removed; start another one")
        return self._folder.path

    def _configure(self, settings: Mapping[str, str]) -> None:
        self._folder = Folder("unlost-pgbouncer-")
        atexit.register(self.remove)
        behind = urlsplit(self._behind)
        user, password = unquote(behind.username or "postgres"), unquote(behind.password or "")
        chosen = {
            "listen_addr": "127.0.0.1",
            "listen_port": str(self.port),
            "unix_socket_dir": "",
            "pool_mode": self.mode,
            "auth_type": "scram-sha-256",
            "auth_file": str(self._path / "users"),
            "auth_user": user,  # asks the server for the secrets of all other users
            "admin_users": user,
            "max_client_conn": "500",
        } | dict(settings)
        lines = ["[databases]", f"* = host={behind.hostname} port={behind.port or 5432}", "[pgbouncer]"]
        lines += [f"{key} = {value}" for key, value in chosen.items()]
        (self._path / "ini").write_text("\n".join(lines) + "\n")
        quoted = (part.replace('"', '""') for part in (user, password))
        (self._path / "users").write_text(" ".join(f'"{part}"' for part in quoted) + "\n")
        if self._user:
            for path in (self._path, self._path / "ini", self._path / "users"):
                os.chown(path, self._user.pw_uid, self._user.pw_gid)
        for name in ("ini", "users"):
            (self._path / name).chmod(0o600)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs PgBouncer until Ctrl-C.")
    parser.add_argument("url", help="a superuser's, of the server that it is put in front of")
    parser.add_argument("--mode", choices=get_args(Mode), default="transaction")
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with PgBouncer.start(chosen.url, chosen.mode) as bouncer:
        print(bouncer.via(chosen.url), flush=True)
        print(f"mode {bouncer.mode}; files in {bouncer._path}; Ctrl-C ends it", file=sys.stderr)
        try:
            signal.pause()
        except KeyboardInterrupt:
            pass  # the end that was asked for


if __name__ == "__main__":
    main()
