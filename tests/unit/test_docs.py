"""The documentation: what its pages show is run, what is made from the code is complete, and the site is built."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import unlost
import unlost.testing
from unlost.cli.main import commands

ROOT = Path(__file__).resolve().parents[2]
SECONDS_MAX = 60.0

_spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
assert _spec is not None and _spec.loader is not None
docs: Any = importlib.util.module_from_spec(_spec)
sys.modules["docs_build"] = docs  # dataclasses look their module up
_spec.loader.exec_module(docs)

HOW_TO = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What a page shows that is no program: it begins so, and this is where it is run, or why it is not.
FRAGMENTS = {
    "import duckdb": "needs duckdb and the demo's history",
    "import polars as pl": "needs polars and the demo's history",
    "import matplotlib.pyplot as plt": "needs matplotlib and the demo's history",
    "with transaction, app.outbox(connection) as outbox:": "the kinds of connections are in the tests of the outbox",
    "@payment.on(OrderPlaced)": "a handler with names of its reader; the same is run in the tests of PostgreSQL",
    "async with session.begin(), app.outbox(session) as outbox:": "the same, as examples/fastapi_shop has it whole",
}


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """The fenced blocks of a page: language, title, text."""
    found = re.findall(r'^```(\w*)(?: title="([^"]*)")?\n(.*?)^```', page.read_text(), re.S | re.M)
    return [(language, title, text) for language, title, text in found]


# --- pages that are run as a whole: files and commands in their order


class Reader:
    """Does what a page says, in a folder of its own: saves files, types commands, compares what they say.

    Ids and times may differ, and so may the width of columns; a command may say more than the page shows of it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("UNLOST_")} | {
            "COLUMNS": "120",
            "TERM": "dumb",
        }
        self.jobs: list[subprocess.Popen[str]] = []
        (folder / "pyproject.toml").write_text("")

    def do(self, page: Path) -> int:
        done = 0
        try:
            for language, title, text in blocks(page):
                if language == "python":
                    self.save(title, text)
                elif language == "console":
                    for command, said in typed(text):
                        self.type(command, said)
                        done += 1
        finally:
            for job in self.jobs:
                job.kill()
                job.wait()
                assert job.stdout is not None
                job.stdout.close()
        return done

    def save(self, title: str, text: str) -> None:
        if title:
            (self.folder / title).write_text(text)
            return
        (file,) = [f for f in self.folder.glob("*.py") if re.search(rf"^{text.split()[0]} = ", f.read_text(), re.M)]
        file.write_text(re.sub(rf"^{text.split()[0]} = .*\n", text, file.read_text(), flags=re.M))

    def type(self, command: str, said: Sequence[str]) -> None:
        if command.startswith("kill -9 %"):
            job = self.jobs[int(command.rpartition("%")[2]) - 1]
            job.send_signal(signal.SIGKILL)
            assert job.wait(SECONDS_MAX) == -signal.SIGKILL
        elif command.endswith("&"):
            self.jobs.append(self.start(command.removesuffix("&"), said))
        elif said and said[-1] == "^C":
            job = self.start(command, said[:-1])
            self.jobs.append(job)
            job.send_signal(signal.SIGINT)
            assert job.wait(SECONDS_MAX) in (0, 130), command
            self.jobs.remove(job)
            assert job.stdout is not None
            job.stdout.close()
        else:
            result = subprocess.run(
                self.words(command), cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=SECONDS_MAX
            )
            assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
            assert result.stdout, f"{command} says nothing"
            rest = iter([plain(line) for line in result.stdout.splitlines()])
            for line in said:
                assert any(plain(line) in one for one in rest), f"{command} does not say {line!r}:\n{result.stdout}"

    def start(self, command: str, said: Sequence[str]) -> subprocess.Popen[str]:
        """Starts it and waits until it has said this, in this order and nothing between."""
        job = subprocess.Popen(self.words(command), cwd=self.folder, env=self.env, stdout=subprocess.PIPE, text=True)
        assert job.stdout is not None
        stopped = threading.Timer(SECONDS_MAX, job.kill)
        stopped.start()
        try:
            for line in said:
                assert job.stdout.readline().strip() == line, command
        except BaseException:
            job.kill()
            job.wait()
            job.stdout.close()
            raise
        finally:
            stopped.cancel()
        return job

    def words(self, command: str) -> list[str]:
        first, *rest = shlex.split(command)
        program = {"unlost": [sys.executable, "-m", "unlost"], "python": [sys.executable]}
        return [*program[first], *rest]


def typed(text: str) -> Iterator[tuple[str, list[str]]]:
    """Commands, each with what it says."""
    for part in re.split(r"^\$ ", text, flags=re.M)[1:]:
        command, *said = part.rstrip("\n").split("\n")
        yield command.strip(), said


def plain(line: str) -> str:
    """Ids, times and how long ago something was differ from run to run."""
    for pattern, word in (
        (r"[0-9a-f]{8}-[0-9a-f-]{27}|…[0-9a-f]{12}", "ID"),
        (r"\d{4}-\d\d-\d\dT[\d:.]+Z", "TIME"),
        (r"\b\d+ (ms|s|min)\b", "AGE"),
    ):
        line = re.sub(pattern, word, line)
    return " ".join(line.split())


@pytest.mark.parametrize(
    ("page", "commands_min"), [pytest.param("tutorial.md", 14, marks=pytest.mark.slow), ("event-docs.md", 1)]
)
def test_a_page_works_word_by_word(tmp_path: Path, page: str, commands_min: int) -> None:
    assert Reader(tmp_path).do(ROOT / "docs" / page) >= commands_min


def test_a_page_that_says_something_else_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```console\n$ unlost config\nnothing of the kind\n```\n")
    with pytest.raises(AssertionError, match="does not say 'nothing of the kind'"):
        Reader(tmp_path).do(page)


# --- what the other pages show


PYTHON = [(page, text) for page in HOW_TO for language, _, text in blocks(page) if language == "python"]


@pytest.mark.parametrize(("page", "text"), PYTHON, ids=lambda p: p.name if isinstance(p, Path) else p.split("\n")[0])
def test_python_on_a_page_runs_or_stands_in_an_example(tmp_path: Path, page: Path, text: str) -> None:
    if any(text.startswith(start) for start in FRAGMENTS):
        compile(textwrap.dedent(text), page.name, "exec", flags=0x2000)  # top-level await is allowed
        return
    shown = lines_of(text)
    for file in (ROOT / "examples").rglob("*.py"):
        if "\n".join(shown) in "\n".join(lines_of(file.read_text())):
            return
    for _, title, other in blocks(page):  # what it imports from above it on the page
        if title:
            (tmp_path / title).write_text(other)
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "schema.sql").write_text("")
    (tmp_path / "shown.py").write_text(text)
    result = subprocess.run(
        [sys.executable, "-W", "error", "shown.py"], cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS_MAX
    )
    assert result.returncode == 0, f"{page.name}\n{text}\n{result.stderr}"


def lines_of(text: str) -> list[str]:
    """Without comments at the end, indentation of the whole and empty lines, by which a page may differ."""
    return [re.sub(r"\s+#.*", "", line).strip() for line in text.splitlines() if line.strip()]


def test_every_exception_is_still_on_a_page() -> None:
    assert [start for start in FRAGMENTS if not any(text.startswith(start) for _, text in PYTHON)] == []


def shown_commands(page: Path) -> list[str]:
    found = []
    for language, _, text in blocks(page):
        if language not in ("python", "json", "yaml", "ini", "properties"):
            for line in text.splitlines():
                match = re.match(r"(?:\$ )?(?:\w+=\S+ )*unlost ([a-z-].*)", line)
                if match:
                    found.append(re.split(r"\s{2,}|\s[#&|]", match[1])[0])
    return found


COMMANDS = sorted(
    {command for page in [*HOW_TO, *(ROOT / "examples").rglob("*.md")] for command in shown_commands(page)}
)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_on_a_page_is_one(command: str) -> None:
    tokens = shlex.split(command)
    function, _, _ = commands(tokens).parse_args(tokens, print_error=False, exit_on_error=False)
    assert function.__module__.startswith("unlost.cli."), command


# --- what is made from the code


def test_every_code_has_its_error_page() -> None:
    used = {code for path in docs.SOURCE.rglob("*.py") for code in re.findall(r"\bUL[1-9]\d{3}\b", path.read_text())}
    page = docs.error_pages()
    titles = re.findall(r"^## (UL\d{4})$", page, re.M)
    assert len(used) > 300 and titles == sorted(used)
    for code, text in zip(titles, re.split(r"^## UL\d{4}$", page, flags=re.M)[1:], strict=True):
        assert len(text.split()) > 8 and "said in" in text, code
    vague = [
        code for code, said in docs.said_by_code().items() if said.cases[0][0] == "What it says depends on the case."
    ]
    assert len(vague) <= 4, f"the sentence of these is not found: {vague}"


def test_an_error_page_says_what_the_error_says() -> None:
    said = docs.said_by_code()["UL1369"]
    (case,) = said.cases
    assert case == (
        "‹path› is there already, and was not written by unlost event docs",
        "name another folder with --out, or move that file away; nothing was changed",
    )
    assert said.kinds == {"UsageError"} and said.rooms == {"`ops.event_docs`"}


def test_the_reference_has_every_public_name_and_says_something_of_it() -> None:
    page = docs.reference()
    entries = dict(zip(re.findall(r"^### (.+)$", page, re.M), re.split(r"^### .+$", page, flags=re.M)[1:], strict=True))
    wanted = [name for name in unlost.__all__ if name != "__version__"] + list(unlost.testing.__all__)
    operators = [name.removeprefix("unlost.ops.") for name, _ in docs.operator_functions()]
    assert len(operators) > 30 and set(entries) == {*wanted, *operators}
    for name, text in entries.items():
        assert len(re.sub(r"```.*?```", "", text, flags=re.S).split()) >= 3, f"{name} has no docstring"


def test_a_docstring_becomes_a_page() -> None:
    shown = docs.markdown(
        "One line.\n\nMore:\n- a\n- b\n**Guarantee** it holds.\n**After a crash** again.\n\nRaises:\n    UsageError: UL1001, wrong\n"
        "        name.\n\nExample:\n    >>> 1 + 1\n    2\n"
    )
    assert "More:\n\n- a\n- b\n\n**Guarantee** it holds.\n\n**After a crash** again." in shown
    assert "- `UsageError`: UL1001, wrong\n    name." in shown and "```pycon\n>>> 1 + 1\n2\n```" in shown


# --- the site


class Outside(HTMLParser):
    """What a page takes from elsewhere; a link that a person may follow is not that."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [
            value for name, value in attrs if name in ("src", "href") and tag != "a" and value and "//" in value
        ]


def test_the_site_is_built_and_takes_nothing_from_elsewhere(tmp_path: Path) -> None:
    assert docs.main(tmp_path) == 0
    site = tmp_path / "site"
    built = list(site.rglob("*.html"))
    assert {"index.html", "ARCHITECTURE.html", "CHANGELOG.html"} <= {path.name for path in site.iterdir()}
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / "docs" / f"{page.stem}.html").is_file()
    for path in built:
        assert Outside(path.read_text()).found == [], path.name
    assert 'id="ul1369"' in (site / "docs" / "errors.html").read_text()
    assert 'id="app"' in (site / "docs" / "reference.html").read_text()


def test_dead_links_fail_the_build(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    docs.stage(tmp_path / "pages")
    page = tmp_path / "pages" / "docs" / "trace.md"
    dead = ["nowhere.md", "kafka.md#no-such-title", "../src/no_such_file.py", "/docs/kafka.md"]
    page.write_text(page.read_text() + "".join(f"\n[there]({link})\n" for link in dead))
    assert docs.build(tmp_path) != 0
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("WARNING")]
    assert [link for link in dead if not any(link in line for line in said)] == []


# --- examples in docstrings: in a process of its own, because they make event classes

EXAMPLES = """
import asyncio, doctest, importlib.util, inspect, sys
spec = importlib.util.spec_from_file_location("docs_build", sys.argv[1])
docs = sys.modules["docs_build"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(docs)
import unlost, unlost.testing

names = {name: getattr(unlost, name) for name in docs.public_names()}
names |= {name: getattr(unlost.testing, name) for name in unlost.testing.__all__}
things = {f"{thing.__module__}.{name}": thing for name, thing in names.items() if inspect.isclass(thing) or inspect.isfunction(thing)}
without = [name for name, thing in things.items() if ">>> " not in docs._doc(thing)]
things |= {f"{name}.{method}": what for name, thing in [*things.items()] if inspect.isclass(thing) for method, what in docs._methods(thing)}
things |= dict(docs.operator_functions())

class OrderPlaced(unlost.Event, key="order_id"):
    order_id: str

class OrderCharged(unlost.Event, key="order_id"):
    order_id: str

runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
for name, thing in sorted(things.items()):
    module = vars(sys.modules[thing.__module__]) if hasattr(thing, "__module__") else {}
    known = module | names | {"asyncio": asyncio, "OrderPlaced": OrderPlaced, "OrderCharged": OrderCharged}
    runner.run(doctest.DocTestParser().get_doctest(docs._doc(thing), known, name, None, 0))
print(runner.failures, "failed;", runner.tries, "run; without:", *sorted(without))
"""


def test_the_examples_of_the_reference_run(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", EXAMPLES, str(ROOT / "docs" / "build.py")],
        cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS_MAX,
    )  # fmt: skip
    last = result.stdout.splitlines()[-1] if result.stdout else ""
    found = re.fullmatch(r"0 failed; (\d+) run; without: (.*)", last)
    assert found, result.stdout + result.stderr
    assert int(found[1]) > 30
    # A port is implemented, not called: `check_broker` and `check_store` have what it says.
    assert found[2].split() == ["unlost.brokers.port.Broker", "unlost.store.port.Store"]
