"""`unlost run --http` and JSON logs: real processes, asked as those ask who watch over them."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_kit import SECONDS_MAX, Running, Shell

from servers.fixtures import require_postgres
from servers.postgres import Postgres
from unlost import UsageError
from unlost.cli.run import _Json
from unlost.config import hide_secrets_within
from unlost.ops.health import CONNECTIONS_MAX, REQUEST_BYTES_MAX, address

SHOP = """
import asyncio, logging, pathlib, sys, time
from unlost import App, Event, Reject, Retry, Service, Topic
import unlost.delivery.worker as worker

worker.STALLED_SECONDS = 0.5  # so long may a handler go on after its deadline

class OrderPlaced(Event, key="order_id"):
    order_id: str

billing = Service("billing", retry=Retry(attempts=1), deadline=0.3)

@billing.on(OrderPlaced)
async def charge(order: OrderPlaced) -> None:
    print("in hand", order.order_id, flush=True)
    if order.order_id == "block":
        time.sleep(4)
    while order.order_id == "stubborn":
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            print("it does not listen", flush=True)

slow = Service("slow")

@slow.on(OrderPlaced)
async def take_time(order: OrderPlaced) -> None:
    if order.order_id == "slow":
        print("in slow hands", flush=True)
        await asyncio.sleep(600)
    while order.order_id == "gate" and not pathlib.Path("open").exists():
        print("at the gate", flush=True)
        await asyncio.sleep(0.05)

app = App(billing, slow, topics=[Topic("order", partitions=1)])
"""


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    shell = Shell(tmp_path)
    shell.write("shop.py", SHOP)
    return shell


class Served(Running):
    """`unlost run` with its health on a port that the kernel has chosen."""

    def __init__(self, shell: Shell, *arguments: str, http: str = "0", **env: str) -> None:
        vars(self).update(vars(shell.start("run", "shop", "--http", http, *arguments, **env)))
        self.says("/live and /ready")
        found = re.search(r"health on http://(\S+):(\d+)/live", self.text())
        assert found is not None
        self.host, self.port = found[1], int(found[2])

    def ask(self, path: str, **headers: str) -> tuple[int, Any]:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=SECONDS_MAX) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as e:
            with e:
                return e.code, json.load(e)

    def raw(self, request: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS_MAX) as s:
            s.sendall(request)
            found = b""
            while part := s.recv(65536):
                found += part
        return found

    def until(self, holds: Callable[[int, dict[str, Any]], bool], path: str = "/ready") -> dict[str, Any]:
        end = time.monotonic() + SECONDS_MAX
        while True:
            status, found = self.ask(path)
            if holds(status, found.get("checks", {})):
                return found
            assert time.monotonic() < end, (status, found, self.text())
            time.sleep(0.02)

    def ready(self) -> dict[str, Any]:
        return self.until(lambda status, _: status == 200)


def place(shell: Shell, *ids: str) -> None:
    lines = "".join(json.dumps({"order_id": id}) + "\n" for id in ids)
    shell.ok("publish", "OrderPlaced", "-", "--app", "shop", stdin=lines)


# --- what is answered ------------------------------------------------------------------------------------


def test_a_healthy_process(shell: Shell) -> None:
    with Served(shell) as running:
        assert running.host == "127.0.0.1"
        found = running.ready()
        assert found["ok"] is True
        assert {name: check["ok"] for name, check in found["checks"].items()} == {
            "event loop": True, "started": True, "store": True, "service billing": True, "service slow": True,
        }  # fmt: skip
        assert found["checks"]["service billing"]["said"] == "it has 1 partitions"
        assert running.ask("/live") == (200, {"ok": True, "checks": {"event loop": {"ok": True, "said": "it answers"}}})
        assert running.ask("/ready?verbose=1")[0] == 200
        assert running.end(signal.SIGTERM) == 0


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="only Linux says who listens there")
def test_without_the_setting_nothing_listens(shell: Shell) -> None:
    with shell.start("run", "shop") as running:
        running.says("unlost: billing")
        inodes = {
            line.split()[9] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if line.split()[3] == "0A"
        }
        own = {str(fd.readlink()) for fd in Path(f"/proc/{running.process.pid}/fd").iterdir()}
        assert not own & {f"socket:[{inode}]" for inode in inodes}
        assert running.end() == 0


def test_a_handler_that_blocks_the_event_loop(shell: Shell) -> None:
    with Served(shell) as running:
        running.ready()
        place(shell, "block")
        running.says("in hand block")
        found = running.until(lambda status, _: status == 503, "/live")
        assert "does a handler block it?" in found["checks"]["event loop"]["said"]
        running.until(lambda status, _: status == 200, "/live")
        running.ready()


def test_a_handler_that_does_not_end(shell: Shell) -> None:
    with Served(shell) as running:
        running.ready()
        place(shell, "stubborn")
        found = running.until(lambda status, _: status == 503)
        assert found["ok"] is False and not found["checks"]["service billing"]["ok"]
        assert "the handler charge goes on after its deadline" in found["checks"]["service billing"]["said"]
        assert found["checks"]["service slow"]["ok"] and running.ask("/live")[0] == 200  # nothing to restart it for yet


def test_a_slow_handler_within_its_deadline_is_healthy(shell: Shell) -> None:
    with Served(shell) as running:
        place(shell, "slow")
        running.says("in slow hands")
        running.ready()


def test_who_waits_for_partitions_is_ready_and_takes_over(shell: Shell) -> None:
    """One partition, two processes: one has it, the other one waits."""
    with Served(shell) as one:
        one.ready()
        with Served(shell) as other:
            found = other.ready()
            said = {name: check["said"] for name, check in found["checks"].items()}
            assert said["service billing"] == "it waits for a partition; others have them all"
            one.process.kill()
            other.until(lambda _, checks: checks["service billing"]["said"] == "it has 1 partitions")
            assert other.end(signal.SIGTERM) == 0


def test_a_process_that_stops_is_alive_and_not_ready(shell: Shell) -> None:
    with Served(shell) as running:
        running.ready()
        place(shell, "slow")
        running.says("in slow hands")
        running.process.send_signal(signal.SIGTERM)
        found = running.until(lambda status, _: status == 503)
        assert found["checks"]["started"]["said"] == "the services stop"
        assert running.ask("/live")[0] == 200


# --- requests that are none ------------------------------------------------------------------------------

GOOD = b"GET /live HTTP/1.1\r\nHost: localhost\r\n"
ANSWERS = [
    (GOOD + b"\r\n", 200),
    (b"GET /live HTTP/1.1\r\nHost: [::1]:80\r\n\r\n", 200),
    (b"GET /live HTTP/1.1\r\nhost:127.0.0.1:9000\r\n\r\n", 200),  # a port that was forwarded
    (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
    (b"GET /live/ HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
    (b"GET /../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
    (b"POST /live HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n", 405),
    (b"HEAD /ready HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
    (b"get /live HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
    (b"GET /live HTTP/1.1\r\nHost: shop.example\r\n\r\n", 403),
    (b"GET /live HTTP/1.1\r\nHost: localhost.shop.example\r\n\r\n", 403),
    (b"GET /live HTTP/1.1\r\nHost: 127.0.0.1.shop.example\r\n\r\n", 403),
    (b"GET /live HTTP/1.1\r\nHost: 10.0.0.1\r\n\r\n", 403),
    (b"GET /live HTTP/1.0\r\n\r\n", 403),
    (b"GET /live HTTP/1.1\r\n\r\n", 400),
    (GOOD + b"Host: localhost\r\n\r\n", 400),
    (GOOD + b"no colon\r\n\r\n", 400),
    (GOOD + b" folded: x\r\n\r\n", 400),
    (b"GET http://localhost/live HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    (b"GET /live HTTP/2.0\r\nHost: localhost\r\n\r\n", 400),
    (b"GET /live\r\n\r\n", 400),
    (b"\x00\xff\r\n\r\n", 400),
    (GOOD + b"X: " + b"a" * REQUEST_BYTES_MAX + b"\r\n\r\n", 431),
    (GOOD + b"X: a\r\n" * 100 + b"\r\n", 431),
]  # fmt: skip


def test_every_request_has_its_answer_and_none_does_harm(shell: Shell) -> None:
    with Served(shell) as running:
        running.ready()
        for request, status in ANSWERS:
            answer = running.raw(request)
            assert answer.startswith(f"HTTP/1.1 {status} ".encode()), (request, answer)
            head, body = answer.split(b"\r\n\r\n")
            assert f"Content-Length: {len(body)}".encode() in head and isinstance(json.loads(body), dict)
        assert b"Allow: GET" in running.raw(b"DELETE /live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        with contextlib.ExitStack() as silent:
            for _ in range(CONNECTIONS_MAX):
                silent.enter_context(socket.create_connection(("127.0.0.1", running.port)))
            try:
                assert running.raw(GOOD + b"\r\n") == b""  # as many as it takes
            except ConnectionResetError:
                pass  # the same, when it hung up before our request was read
        running.until(lambda status, _: status == 200, "/live")
        assert running.end() == 0
        assert "Task" not in running.text()


def test_a_request_that_never_ends_is_hung_up_on(shell: Shell) -> None:
    with Served(shell) as running, socket.create_connection(("127.0.0.1", running.port), timeout=SECONDS_MAX) as s:
        s.sendall(b"GET /live HTTP/1.1\r\n")
        assert s.recv(1) == b""


# --- where it listens ------------------------------------------------------------------------------------


def test_another_address_than_loopback_has_to_be_named(shell: Shell) -> None:
    with Served(shell, http="0.0.0.0:0") as running:
        assert running.host == "0.0.0.0" and running.ready()
        assert running.ask("/live", Host="shop.example")[0] == 200  # probes come under many names
        assert running.end() == 0


def test_a_port_that_is_taken(shell: Shell) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = shell("run", "shop", UNLOST_HTTP=str(port))
        assert result.code == 2 and f"UL1431: the health checks cannot listen on 127.0.0.1:{port}" in result.err
        assert "Address already in use" in result.err and "another process" in result.err
        assert not shell.database.exists()  # it was said before anything began
    with Served(shell, http=str(port)) as running:
        running.ready()
    for nowhere in ("nowhere.invalid:80", "x" * 100 + ":80", "192.0.2.1:80"):
        assert "UL1431" in shell.quick("run", "shop", "--http", nowhere).err


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("8080", ("127.0.0.1", 8080)), ("localhost:1", ("localhost", 1)), ("0.0.0.0:65535", ("0.0.0.0", 65535)),
        ("[::1]:80", ("::1", 80)), (" 0 ", ("127.0.0.1", 0)),
    ],
)  # fmt: skip
def test_addresses(text: str, found: tuple[str, int]) -> None:
    assert address(text) == found


@pytest.mark.parametrize(
    "text", ["", ":80", "host", "host:", "host:http", "::1:80", "h:65536", "h:-1", "http://h:80", "h:8 0", "h:٣"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError, match="UL1430"):
        address(text)


def test_the_setting_says_where_it_is_from(shell: Shell) -> None:
    shell.write("pyproject.toml", '[tool.unlost]\nhttp = "eighty"\n')
    result = shell.quick("run", "shop")
    assert result.code == 2 and "UL1430" in result.err and "'eighty' from pyproject.toml [tool.unlost]" in result.err
    assert {"name": "http", "value": "eighty"}.items() <= shell.quick("config", "--json").json["settings"][-1].items()
    with shell.start("run", "shop", "--http", "") as running:  # a flag that is empty: none
        running.says("unlost: billing")
        assert "health" not in running.text() and running.end() == 0


# --- with servers ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_store_that_does_not_answer(shell: Shell) -> None:
    require_postgres(own=True)
    with Postgres.start(own=True) as postgres:
        shell.env["UNLOST_STORE"] = postgres.fresh()
        shell.ok("store", "migrate", "--yes")
        with Served(shell) as running:
            found = running.ready()
            assert found["checks"]["outbox"] == {"ok": True, "said": "somebody sends it"}
            with Served(shell) as other:
                assert "it waits for a partition" in str(other.ready())
                postgres.stop()
                for each in (running, other):
                    found = each.until(lambda status, _: status == 503)
                    assert not found["checks"]["store"]["ok"] and "@" not in str(found)
                    assert each.ask("/live")[0] == 200
                postgres.start_again()
                running.ready()
                other.ready()


@pytest.mark.slow
def test_outcomes_that_cannot_be_written(shell: Shell, database: str) -> None:
    """The store answers questions, and lets nothing be written."""
    psycopg = pytest.importorskip("psycopg")
    shell.env["UNLOST_STORE"] = database
    shell.ok("store", "migrate", "--yes")
    with Served(shell) as running:
        running.ready()
        place(shell, "gate")
        running.says("at the gate")
        with psycopg.connect(database) as other:
            other.execute("lock table unlost.unlost_progress in exclusive mode")
            shell.write("open", "")
            found = running.until(lambda status, _: status == 503)
            assert "its outcomes have waited for the store" in found["checks"]["service slow"]["said"]
            assert found["checks"]["store"]["ok"] and running.ask("/live")[0] == 200
        running.ready()


@pytest.mark.slow
def test_on_kafka(shell: Shell, kafka: Any, fresh_prefix: str) -> None:
    shell.env["UNLOST_BROKER"] = f"{kafka.url}?prefix={fresh_prefix}."
    with Served(shell) as running:
        found = running.ready()
        assert found["checks"]["service billing"]["said"] == "it has 1 partitions"
        assert found["checks"]["outbox"]["ok"]
        assert running.end(signal.SIGTERM) == 0


# --- JSON logs -------------------------------------------------------------------------------------------

TALKATIVE = """
import logging, sys
from unlost import App, Event, Reject, Retry, Service

class OrderPlaced(Event, key="order_id"):
    order_id: str

billing = Service("billing", retry=Retry(attempts=1))

@billing.on(OrderPlaced)
async def charge(order: OrderPlaced) -> None:
    try:
        raise ValueError("two\\nlines, and postgresql://ann:s3cret@db/shop")
    except ValueError:
        logging.getLogger("shop").exception("it \\x1b[31mfailed\\n\\u2028 with password=s3cret, see UL5010")
    print("to stderr", file=sys.stderr, flush=True)
    raise Reject("no such order")

app = App(billing)
"""


def test_json_logs(shell: Shell) -> None:
    shell.write("shop.py", TALKATIVE)
    place(shell, "A1")
    with Served(shell, "--log", "info,json") as running:
        running.says("is dead")
        running.says("to stderr")
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(SECONDS_MAX) == 0
        text = running.text()
    assert text.isascii() and "s3cret" not in text
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        assert list(line)[:4] == ["time", "level", "logger", "message"] and line["pid"] == running.process.pid
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", line["time"])
    by_logger = {line["logger"]: line for line in lines}
    own = by_logger["shop"]
    assert (own["level"], own["code"]) == ("error", "UL5010")
    assert own["message"] == "it \x1b[31mfailed\n\u2028 with password=*** see UL5010"
    assert "Traceback" in own["exception"] and "two\nlines, and postgresql://ann:***@db/shop" in own["exception"]
    assert "is dead (rejected): no such order" in by_logger["unlost.worker"]["message"]
    assert "code" not in by_logger["unlost.worker"]
    assert any(line["logger"] == "stderr" and line["message"] == "to stderr" for line in lines)


def test_an_error_at_the_start_is_json_as_well(shell: Shell) -> None:
    result = shell("run", "shop", "--http", "x", UNLOST_LOG="debug,json")
    (line,) = [json.loads(line) for line in result.err.splitlines()]
    assert result.code == 2 and (line["level"], line["code"]) == ("error", "UL1430")
    assert "found: 'x' from flag --http" in line["message"]


@pytest.mark.parametrize("value", ["json", "info,xml", "info,", ",json", "info,json,x"])
def test_how_a_log_can_be(shell: Shell, value: str) -> None:
    result = shell.quick("run", "shop", "--log", value)
    assert result.code == 2 and "UL1319" in result.err and "json" in result.err, result


def test_whatever_is_logged_is_one_line() -> None:
    hostile = "\ud800 \x00\r\n\x85\u2029 %s"
    line = _Json().format(logging.LogRecord("a\nb", logging.WARNING, "f", 1, "%s", (hostile,), None))
    found = json.loads(line)
    assert line.isascii() and len(line.splitlines()) == 1
    assert (found["message"], found["logger"], found["level"]) == (hostile, "a\nb", "warning")


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("to kafka://ann:s3cret@h1:9092,h2/?sasl_password=s3cret failed", "to kafka://ann:***@h1:9092,h2/?sasl_password=*** failed"),
        ("host=db password='s3 cret' user=ann", "host=db password=*** user=ann"),
        ("http://h/?x=" + "s3cret" * 100, "http://…"),
        ("order:A1 is dead: mail bob@example.com", "order:A1 is dead: mail bob@example.com"),
    ],
)  # fmt: skip
def test_secrets_within_a_text(text: str, hidden: str) -> None:
    assert hide_secrets_within(text) == hidden
