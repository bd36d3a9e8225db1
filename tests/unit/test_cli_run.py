"""`unlost run`, and how an App is found."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli_kit import Shell


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_runs_until_a_signal_and_ends_with_0(shell: Shell, number: int) -> None:
    with shell.start("run", "shop") as running:
        running.says(f"unlost: billing on {shell.database} (made just now)")
        assert running.end(number) == 0


def test_what_is_published_is_handled(shell: Shell) -> None:
    shell.place("A1")
    with shell.start("run", "shop") as running:
        running.says("charged A1")
        shell.place("A2")
        running.says("charged A2")
        assert running.end() == 0
    assert shell.ok("audit", "--json").json["services"][0]["done"] == 2


def test_a_second_signal_ends_it_at_once_with_130(shell: Shell) -> None:
    shell.write(
        "slow.py",
        """
        import asyncio
        from unlost import App, Event, Service
        class OrderPlaced(Event, key="order_id"):
            order_id: str
        s = Service("s")
        @s.on(OrderPlaced)
        async def handle(order: OrderPlaced) -> None:
            print("in hand", flush=True)
            await asyncio.sleep(600)
        app = App(s)
        """,
    )
    shell.ok("publish", "OrderPlaced", "order_id=A1", "--app", "slow")
    with shell.start("run", "slow", "--json") as running:
        running.says("in hand")
        running.process.send_signal(signal.SIGINT)
        # another number than the first: two equal signals may arrive as one
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(30) in (130, 143)
    book = shell.ok("audit", "--json").json["services"][0]
    assert (book["waiting"] + book["in_flight"], book["unaccounted"]) == (1, 0)


def test_json(shell: Shell) -> None:
    with shell.start("run", "shop", "--json") as running:
        running.says('"state":"starting"')
        running.says("made just now")
        assert running.end() == 0
        assert '{"schema":"unlost.run/1","state":"ended","services":["billing"]' in running.text()


def test_it_is_quick_to_start(shell: Shell) -> None:
    """Processes that are killed often are started often. Measured as CPU time, with room for a slow machine."""
    shell.write("one.py", "import sys\nfrom unlost import App\napp = App()\n")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert shell("run", "one").code == 2  # everything but the work itself
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent < 1.0, f"{spent:.2f} s"


def test_it_does_not_import_what_it_does_not_need(shell: Shell) -> None:
    code = "import sys; sys.argv[1:] = ['run', 'one']; import unlost.cli.main as m; m.main(); print(*sys.modules)"
    shell.write("one.py", "from unlost import App\napp = App()\n")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=shell.folder, env=shell.env, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert "one" in loaded
    assert not loaded & {"rich", "unlost.cli.dead", "unlost.cli.tail", "unlost.ops.books", "unlost.demo.run"}


def test_only_the_named_services(shell: Shell) -> None:
    assert "it has billing" in shell("run", "shop", "--service", "bill").err
    with shell.start("run", "shop", "--service", "billing") as running:
        running.says("unlost: billing on")
        assert running.end() == 0


@pytest.mark.parametrize(
    "name", ["shop", "shop:app", "shop.py", "shop.py:app", "./shop.py", "pkg.main", "pkg/main.py:app"]
)
def test_the_ways_to_name_an_app(shell: Shell, name: str) -> None:
    shell.write("pkg/__init__.py", "")
    shell.write("pkg/other.py", "from unlost import App\nthe = App()\n")
    shell.write("pkg/main.py", "from .other import the as app\n")
    result = shell.quick("run", name, "--service", "nobody")
    assert result.code == 2
    assert "UL1237" in result.err or "UL1318" in result.err, result  # it was found


def test_from_environment_and_pyproject(shell: Shell) -> None:
    assert "UL1237" in shell("run", "-s", "x", UNLOST_APP="shop").err
    shell.write("pyproject.toml", '[tool.unlost]\napp = "shop:app"\n')
    assert "UL1237" in shell("run", "-s", "x").err
    shell.write("pyproject.toml", '[tool.unlost]\napp = "shp"\n')
    result = shell("run")
    assert "there is no module shp (from pyproject.toml [tool.unlost])" in result.err
    assert "did you mean shop?" in result.err


BAD = [
    ("nothing", ["run"], None, ["UL1310", "unlost run shop"]),
    ("misspelt", ["run", "shpo"], None, ["UL1312: there is no module shpo", "did you mean shop?"]),
    ("no file", ["run", "nope/x.py"], None, ["UL1312: there is no file nope/x.py"]),
    ("no parent", ["run", "nope.x"], None, ["UL1312", "no module 'nope'"]),
    ("not a name", ["run", "sh op"], None, ["UL1312"]),
    ("half a name", ["run", "shop:"], None, ["UL1311"]),
    ("no attribute", ["run", "shop:ap"], None, ["UL1316", "did you mean shop:app?"]),
    ("not an App", ["run", "shop:billing"], None, ["UL1316: shop:billing is not an App", "it is a Service"]),
    ("stdlib", ["run", "json"], None, ["UL1314: json", "has no App"]),
    ("no App", ["run", "bad"], "import unlost\ns = unlost.Service('s')", ["UL1314", "services without an App: s"]),
    (
        "two Apps",
        ["run", "bad"],
        "from unlost import App\na = App()\nb = App()\nc = a",
        ["UL1315: bad (bad.py) has 2 Apps", "a, b", "bad:a"],
    ),
    (
        "fails",
        ["run", "bad"],
        "def f():\n    return 1 / 0\nf()",
        ["UL1313", "ZeroDivisionError", "bad.py, line 2, in f", "return 1 / 0"],
    ),
    ("syntax", ["run", "bad"], "x = (\n", ["UL1313", "SyntaxError", "bad.py, line 1"]),
    (
        "missing library",
        ["run", "bad"],
        "import nonesuch.x",
        ["UL1313", "No module named 'nonesuch'", "is nonesuch installed", "bad.py, line 1"],
    ),
    ("missing own", ["run", "bad"], "import bad.sub", ["UL1313", "bad.py, line 1"]),
    ("exits", ["run", "bad"], "import sys\nsys.exit(3)", ["UL1313", "SystemExit(3)", "bad.py, line 2"]),
    (
        "our error",
        ["run", "bad"],
        "from unlost import Service\nService('a b')",
        ["UL1313", "UL1210: a service's name", "bad.py, line 2", "Service('a b')"],
    ),
    ("function", ["run", "bad:make"], "def make(): pass", ["UL1316", "it is a function", "app = make()"]),
    ("no services", ["run", "bad"], "from unlost import App\napp = App()", ["UL1318"]),
    ("stdlib name", ["run", "queue.py"], None, ["UL1312"]),
    ("broker", ["run", "shop", "--broker", "redis://h"], None, ["UL1140"]),
    ("log", ["run", "shop", "--log", "loud"], None, ["UL1319", "'loud' from flag --log"]),
    ("option", ["run", "shop", "--nope"], None, ["UL1300", "--nope", "unlost run --help"]),
]


@pytest.mark.parametrize(("arguments", "module", "texts"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_apps_get_a_clear_error(shell: Shell, arguments: list[str], module: str | None, texts: list[str]) -> None:
    if module is not None:
        shell.write("bad.py", module + "\n")
    result = shell.quick(*arguments)
    assert result.code == 2, result
    for text in texts:
        assert text in result.err, result
    assert "importlib" not in result.err and "unlost/cli" not in result.err, result
    assert not shell.database.exists()


def test_a_file_with_the_name_of_pythons_own_module(shell: Shell) -> None:
    shell.write("queue.py", "x = 1\n")
    assert "UL1317" in shell("run", "queue.py").err


def test_a_warning_about_a_name_shows_the_line(shell: Shell) -> None:
    shell.write(
        "named.py",
        """
        from unlost import App, Event, Service
        class SendMail(Event, key="id"):
            id: str
        s = Service("s")
        @s.on(SendMail)
        async def handle(e: SendMail) -> None: ...
        app = App(s)
        """,
    )
    with shell.start("run", "named") as running:
        running.says("named.py:6: UL1005: SendMail does not read as a fact")
        running.says("unlost: s on")
        assert running.end() == 0


def test_a_damaged_file_is_said_loudly_with_3(shell: Shell) -> None:
    shell.place("A1")
    for name in ("events.db", "events.db-wal"):  # the marks beside them know what had been acknowledged
        (shell.database.parent / name).write_bytes(b"")
    result = shell("run", "shop")
    assert result.code == 3 and "UL3001" in result.err
