"""The examples are run as they stand there: the web app by its test client, the service by `unlost run`."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from servers.postgres import Postgres

ROOT = Path(__file__).parents[2]
SECONDS = 60

FASTAPI = """
    from fastapi.testclient import TestClient
    from shop import web

    with TestClient(web, raise_server_exceptions=False) as client:
        for order_id, cents in [("A1", 1250), ("A2", 990), ("A1", 1250)]:  # the first one is sent again
            answer = client.put(f"/orders/{order_id}", json={"total_cents": cents})
            assert answer.status_code == 202, answer.text
        assert client.put("/orders/A3", json={"total_cents": 2**40}).status_code == 500  # no such row, no event
        wait_until(lambda: client.get("/orders/A2/invoice").json() == 990)
        wait_until(lambda: client.get("/orders/A1/invoice").json() == 1250)
"""
DJANGO = """
    import os
    os.environ["DJANGO_SETTINGS_MODULE"] = "shop.settings"
    import django
    django.setup()
    from django.test import Client

    client = Client(raise_request_exception=False)
    for order_id, cents in [("A1", 1250), ("A2", 990), ("A1", 1250)]:  # the first one is sent again
        answer = client.put(f"/orders/{order_id}", {"total_cents": cents}, content_type="application/json")
        assert answer.status_code == 202, answer.content
    answer = client.put("/orders/A3", {"total_cents": 2**40}, content_type="application/json")
    assert answer.status_code == 500  # no such row, no event
    wait_until(lambda: client.get("/orders/A2/invoice").json()["total_cents"] == 990)
    wait_until(lambda: client.get("/orders/A1/invoice").json()["total_cents"] == 1250)
"""
WAIT = """
    import time

    def wait_until(holds):
        end = time.monotonic() + 30
        while not holds():
            assert time.monotonic() < end
            time.sleep(0.01)
"""


class Example:
    """A folder of the examples, with a database and a broker's file of its own."""

    def __init__(self, name: str, url: str, folder: Path) -> None:
        self.folder = ROOT / "examples" / name
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("UNLOST_", "PYTHON", "DJANGO_"))}
        self._env = kept | {
            "UNLOST_STORE": url, "UNLOST_BROKER": f"embedded://{folder / 'events.db'}",
            "PYTHONDONTWRITEBYTECODE": "1", "PYTHONWARNINGS": "error::ResourceWarning",
        }  # fmt: skip
        self._log = folder / "service.log"

    def __call__(self, *command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command], cwd=self.folder, env=self._env, capture_output=True, text=True, timeout=SECONDS
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @contextlib.contextmanager
    def service(self, end: signal.Signals = signal.SIGTERM) -> Iterator[None]:
        with self._log.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "unlost", "run"], cwd=self.folder, env=self._env, stdout=log, stderr=log
            )
        try:
            self.until(lambda: "unlost: billing on" in self._log.read_text() or process.poll() is not None)
            yield
            process.send_signal(end)
            assert process.wait(SECONDS) == (0 if end is signal.SIGTERM else -end), self._log.read_text()
        finally:
            process.kill()
            process.wait()
        assert "Traceback" not in self._log.read_text(), self._log.read_text()

    def until(self, holds: Callable[[], bool]) -> None:
        end = time.monotonic() + SECONDS
        while not holds():
            assert time.monotonic() < end, self._log.read_text()
            time.sleep(0.02)


@pytest.mark.parametrize(
    ("name", "web", "prefix", "tables"),
    [
        ("fastapi_shop", FASTAPI, "shop_", ()),
        ("django_shop", DJANGO, "shop_", ("manage.py", "migrate", "--run-syncdb")),
    ],
)
def test_example(
    name: str, web: str, prefix: str, tables: tuple[str, ...], postgres: Postgres, database: str, tmp_path: Path
) -> None:
    example = Example(name, database, tmp_path)

    def sql(statement: str) -> list[Any]:
        return postgres.sql(statement, database=urlsplit(database).path[1:])

    example("-m", "unlost", "store", "migrate")
    if tables:
        example(*tables)
    with example.service(signal.SIGKILL):  # whenever you like
        example("-c", textwrap.dedent(WAIT) + textwrap.dedent(web))
    with example.service():  # what came twice changes nothing
        example.until(lambda: not sql("select 1 from unlost.unlost_outbox"))
        example.until(lambda: "skipped:duplicate" in str(sql("select counts from unlost.unlost_progress")))
    assert sorted(sql(f"select id, total_cents from {prefix}order")) == [("A1", 1250), ("A2", 990)]
    assert sorted(sql(f"select order_id, total_cents from {prefix}invoice")) == [("A1", 1250), ("A2", 990)]
    status = json.loads(example("-m", "unlost", "status", "--json"))
    (billing,) = status["services"]
    assert (billing["name"], billing["waiting"], billing["dead"]) == ("billing", 0, 0)
    example("-m", "unlost", "audit")


def test_what_the_documentation_shows_is_what_is_run() -> None:
    """Its snippets are lines of the examples."""
    text = (ROOT / "docs" / "from-a-web-request.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) >= 4
    examples = [path.read_text() for path in sorted((ROOT / "examples").rglob("*.py"))]
    shown = [block for block in blocks if any(block.strip() in example for example in examples)]
    assert len(shown) >= 4, [block for block in blocks if block not in shown]


@pytest.mark.parametrize("name", ["fastapi_shop", "django_shop"])
def test_each_file_fits_on_a_screen(name: str) -> None:
    for path in (ROOT / "examples" / name).rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 80, path.name
