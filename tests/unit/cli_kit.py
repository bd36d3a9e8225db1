"""The real command line in a folder of its own."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unlost.cli.main import main

SECONDS_MAX = 30.0

SHOP = """
from unlost import App, Event, Reject, Retry, Sensitive, Service

class OrderPlaced(Event, key="order_id"):
    order_id: str
    total_cents: int
    email: Sensitive[str] = ""
    tags: list[str] = []

class OrderShipped(Event, key="order_id"):
    order_id: str

billing = Service("billing", retry=Retry(attempts=1))

@billing.on(OrderPlaced)
async def charge(order: OrderPlaced) -> None:
    if not order.total_cents:
        raise Reject("an order of 0.00 cannot be \\x1b[31mpaid")
    print("charged", order.order_id, flush=True)

app = App(billing)
"""


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def __repr__(self) -> str:
        return f"exit {self.code}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


class Shell:
    """A folder with `shop.py`, and `unlost` in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("UNLOST_")} | {
            "COLUMNS": "80",
            "TERM": "dumb",
        }
        self.write("shop.py", SHOP)

    @property
    def database(self) -> Path:
        return self.folder / ".unlost" / "events.db"

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path

    def __call__(self, *arguments: str, stdin: str | bytes = b"", **env: str) -> Result:
        done = subprocess.run(
            [sys.executable, "-m", "unlost", *arguments],
            cwd=self.folder, env=self.env | env, input=stdin if isinstance(stdin, bytes) else stdin.encode(),
            capture_output=True, timeout=SECONDS_MAX, check=False,
        )  # fmt: skip
        result = Result(done.returncode, done.stdout.decode(), done.stderr.decode())
        assert "Traceback" not in result.out + result.err, result
        assert "\x1b" not in result.out + result.err, repr(result)
        return result

    def quick(self, *arguments: str, **env: str) -> Result:
        """The same in this process: ten times as fast, for what needs no stdin and no signals."""
        out, err = io.StringIO(), io.StringIO()
        saved, folder = dict(os.environ), Path.cwd()
        os.environ.clear()
        os.environ.update(self.env | env)
        os.chdir(self.folder)
        path = list(sys.path)
        known = set(sys.modules)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = main(arguments)
        finally:
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(saved)
            sys.path[:] = path
            importlib.invalidate_caches()
            for name in set(sys.modules) - known:
                if not name.startswith(("unlost", "rich", "cyclopts")):
                    del sys.modules[name]
        result = Result(code, out.getvalue(), err.getvalue())
        assert "Traceback" not in result.out + result.err, result
        assert "\x1b" not in result.out + result.err, repr(result)
        return result

    def ok(self, *arguments: str, stdin: str = "", **env: str) -> Result:
        result = self(*arguments, stdin=stdin, **env)
        assert result.code == 0, result
        return result

    def place(self, order_id: str, total_cents: int = 100, *more: str) -> None:
        self.ok("publish", "OrderPlaced", f"order_id={order_id}", f"total_cents={total_cents}", *more, "--app", "shop")

    def start(self, *arguments: str, **env: str) -> Running:
        return Running(
            subprocess.Popen(
                [sys.executable, "-m", "unlost", *arguments],
                cwd=self.folder, env=self.env | env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )  # fmt: skip

    def until(self, holds: Callable[[dict[str, Any]], bool]) -> None:
        """Waits until `unlost status` says so of every service."""
        end = time.monotonic() + SECONDS_MAX
        while True:
            result = self.quick("status", "--json")
            if result.code == 0 and result.json["services"] and all(map(holds, result.json["services"])):
                return
            assert time.monotonic() < end, result

    def handle_all(self, *arguments: str) -> None:
        """Runs the App until nothing waits any more."""
        with self.start("run", "shop", *arguments) as running:
            running.says("unlost: ")  # from here on it ends by a signal as it should
            self.until(lambda s: not s["waiting"] + s["in_flight"] + s["retrying"] and s["next_retry"] is None)
            assert running.end(signal.SIGTERM) == 0


class Running:
    """A command that goes on; what it says is collected."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self._said = {process.stdout: bytearray(), process.stderr: bytearray()}  # apart: they may not mix within a line
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._collect, args=(s,)) for s in (process.stdout, process.stderr)]
        for thread in self._threads:
            thread.start()

    def _collect(self, stream: Any) -> None:
        while part := os.read(stream.fileno(), 65536):
            with self._changed:
                self._said[stream] += part
                self._changed.notify_all()

    def text(self) -> str:
        with self._changed:
            return "".join(said.decode() for said in self._said.values())

    def says(self, text: str) -> None:
        with self._changed:
            found = self._changed.wait_for(
                lambda: any(text.encode() in said for said in self._said.values()), SECONDS_MAX
            )
        assert found, f"it does not say {text!r}: {self.text()}"

    def end(self, number: int = signal.SIGINT) -> int:
        self.process.send_signal(number)
        code = self.process.wait(SECONDS_MAX)
        for thread in self._threads:
            thread.join()
        assert "Traceback" not in self.text()
        return code

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for thread in self._threads:
            thread.join()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
