"""A value that may be seen by nobody but the handler, on its way through everything that unlost can say; and a password
in the URLs of broker and store."""

from __future__ import annotations

import json
import secrets
import signal
from pathlib import Path

import pytest
from cli_kit import SECONDS_MAX, Result, Shell

SHOP = """
import logging
import os
from pathlib import Path

from unlost import App, Command, Context, Event, Retry, Sensitive, Service

log = logging.getLogger("shop")

class GiftOrdered(Event, key="order_id"):
    order_id: str
    email: Sensitive[str]
    codes: Sensitive[list[int]] = []

class Address(Event, view_of="order.GiftOrdered", past_tense=False):
    email: Sensitive[str]

class SendReceipt(Command, queue="receipts", key="to"):
    to: str
    email: Sensitive[str]

class CodesChecked(Event, key="order_id", version=2):
    order_id: str
    codes: Sensitive[list[int]]

billing = Service("billing", guarantee="effectively-once", retry=Retry(attempts=2, first=0))
mail = Service("mail", retry=Retry(attempts=1))
look = Service("look", retry=Retry(attempts=1), on_dead="skip")

@billing.on(GiftOrdered)
async def charge(order: GiftOrdered, ctx: Context) -> None:
    with Path("seen.txt").open("a") as seen:
        print(order.email, file=seen)
    log.info("charging %s, %r, in %r", order, [order], ctx)
    print("charging", order, flush=True)
    ctx.send(SendReceipt(to=order.order_id, email=order.email))
    if not Path("mended").exists():
        raise RuntimeError(f"cannot handle {order!r} of {ctx!r}: {[order]}")

@mail.on(SendReceipt)
def send(command: SendReceipt) -> None:
    if not Path("mended").exists():
        raise ValueError(command)

@look.on(Address)
async def see(address: Address) -> None:
    try:
        raise KeyError(address)
    except KeyError as e:
        log.exception("could not see %r", address)
        raise LookupError(str(e)) from e

@look.on(CodesChecked)
async def count(event: CodesChecked) -> None: ...

app = App(billing, mail, look)
"""
RAISE_UP = """
from unlost import upcast

@upcast(CodesChecked, from_version=1)
def split(data):
    return {**data, "codes": [int(code) for code in data["codes"].split()]}
"""
OLD = """
from unlost import App, Event

class CodesChecked(Event, key="order_id"):
    order_id: str
    codes: str

class GiftOrdered(Event, key="order_id"):
    order_id: str
    email: list[str]

app = App()
"""


class Silent:
    """The command line, of which nothing that it says has the canary in it."""

    def __init__(self, folder: Path) -> None:
        self.shell = Shell(folder)
        self.canary = f"canary-{secrets.token_hex(12)}"

    def __call__(self, *arguments: str, stdin: str = "", code: int | None = 0, **env: str) -> Result:
        apart = stdin or "--app" in arguments  # its classes are not to stay in this process
        result = self.shell(*arguments, stdin=stdin, **env) if apart else self.shell.quick(*arguments, **env)
        assert code is None or result.code == code, (arguments, result)
        self.check(f"{arguments}: {result}")
        return result

    def check(self, text: str) -> None:
        assert self.canary not in text, text

    def holders(self) -> set[str]:
        """The files that have it in them."""
        files = [path for path in self.shell.folder.rglob("*") if path.is_file()]
        return {path.name for path in files if self.canary.encode() in path.read_bytes()}


@pytest.fixture
def silent(tmp_path: Path) -> Silent:
    silent = Silent(tmp_path)
    silent.shell.write("shop.py", SHOP)
    silent.shell.write("old.py", OLD)
    return silent


def place(silent: Silent, *lines: dict[str, object], app: str = "shop") -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    silent("publish", "-", "--app", app, stdin=text)


def order(silent: Silent, id: str) -> dict[str, object]:
    return {"type": "GiftOrdered", "data": {"order_id": id, "email": silent.canary}}


def run(silent: Silent, log: str) -> None:
    with silent.shell.start("run", "shop", "--log", log) as running:
        running.says("unlost: ")
        silent.shell.until(lambda s: not s["waiting"] + s["in_flight"] + s["retrying"] and s["next_retry"] is None)
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(SECONDS_MAX) == 0, running.text()
    text = running.text()  # whole: the pipes have been read to their end
    assert "***" in text and "could not see" in text
    silent.check(f"run --log {log}: {text}")


def show(silent: Silent, number: int, *more: str) -> str:
    """A letter with its stack, which the other ways to run a command do not expect."""
    with silent.shell.start("dead", "show", str(number), *more) as running:
        assert running.process.wait(SECONDS_MAX) == 0
    silent.check(running.text())
    return running.text()


LOOKS: list[tuple[str, ...]] = [
    ("status",), ("audit",), ("audit", "--all"), ("doctor", "--all"), ("config",), ("topic", "list"),
    ("service", "list"), ("service", "show", "billing"), ("tail",), ("tail", "--data", "--app", "shop"),
    ("trace", "a"), ("dead", "list"), ("dead", "list", "--service", "billing"),
]  # fmt: skip


def test_a_sensitive_value_is_shown_to_nobody_but_the_handler(silent: Silent) -> None:
    place(silent, order(silent, "a"), order(silent, "a"), order(silent, "b"))
    old = {"order_id": "a", "codes": silent.canary}
    place(silent, {"type": "CodesChecked", "data": old}, app="old")  # today's class cannot read it
    place(silent, {"type": "GiftOrdered", "data": {"order_id": "c", "email": [silent.canary]}}, app="old")
    run(silent, "debug")

    letters = silent("dead", "list", "--json").json["letters"]
    assert {letter["reason"] for letter in letters} == {"exhausted", "undecodable"}
    assert {letter["service"] for letter in letters} == {"billing", "look"}
    for letter in letters:
        shown = show(silent, letter["number"])
        assert "***" in shown or letter["reason"] == "undecodable"
        show(silent, letter["number"], "--data", "--app", "shop", "--json")
    for look in LOOKS:
        for form in ((), ("--json",)):
            assert silent(*look, *form, code=None).code in (0, 1), look
    silent("event", "check", "--update", "--app", "shop")
    for verb in ("list", "check", "usage"):
        silent("event", verb, "--app", "shop")
        silent("event", verb, "--app", "shop", "--json")
    silent("store", "export", "--to", "out", "--format", "jsonl", "--app", "shop")
    for path in (silent.shell.folder / "out").rglob("*.*"):
        silent.check(path.read_text())

    silent.shell.write("shop.py", SHOP.replace("app = App", RAISE_UP + "\napp = App"))
    silent("dead", "redrive", "--all", "--dry-run", "--reason", "test")
    silent("dead", "redrive", "--all", "--yes", "--reason", "test")
    run(silent, "debug,json")  # as before; what was old now fails in its upcaster, which quotes it
    letters = silent("dead", "list", "--json").json["letters"]
    assert {letter["reason"] for letter in letters} == {"exhausted", "undecodable"}
    undecodable = [show(silent, letter["number"]) for letter in letters if letter["reason"] == "undecodable"]
    assert any("UL1375" in text and "split (1 → 2)" in text for text in undecodable)

    (silent.shell.folder / "mended").touch()
    silent("dead", "redrive", "--all", "--yes", "--reason", "mended")
    run(silent, "info,json")
    for look in LOOKS:
        assert silent(*look, "--json", code=None).code in (0, 1), look

    # It can be seen where it belongs: in the handler, in what is stored, and by those who ask for what is stored.
    assert set((silent.shell.folder / "seen.txt").read_text().split()) == {silent.canary}
    assert silent.canary in silent.shell.quick("tail", "--raw", "--json").out
    assert silent.holders() - {"seen.txt"} <= {"events.db", "events.db-wal"}
    assert silent.holders() > {"seen.txt"}


@pytest.mark.parametrize("form", ["fields", "line", "bare line"])
def test_an_event_that_cannot_be_made_does_not_say_what_was_given(silent: Silent, form: str) -> None:
    data = {"order_id": "a", "email": silent.canary, "codes": [silent.canary]}
    if form == "fields":
        fields = ("order_id=a", f"codes={silent.canary}")
        result = silent.shell.quick("publish", "GiftOrdered", *fields, "--app", "shop")
        silent.check(repr(result))
    elif form == "line":
        result = silent(
            "publish", "-", "--app", "shop", stdin=json.dumps({"type": "GiftOrdered", "data": data}), code=None
        )
    else:
        result = silent("publish", "GiftOrdered", "-", "--app", "shop", stdin=json.dumps(data), code=None)
    assert result.code == (2 if form == "fields" else 1) and "UL1326" in result.err


URLS = {
    "kafka": {"UNLOST_BROKER": "kafka://ann:{}@127.0.0.1:1/?nonsense=1"},
    "kafka words": {"UNLOST_BROKER": "kafka://127.0.0.1:1/?sasl.username=ann&sasl.password={}&nonsense=1"},
    "amqp": {"UNLOST_BROKER": "amqp://ann:{}@127.0.0.1:1/"},
    "no broker": {"UNLOST_BROKER": "nobody://ann:{}@127.0.0.1:1/"},
    "embedded": {"UNLOST_BROKER": "embedded://ann:{}@host/events.db"},
    "postgres": {"UNLOST_STORE": "postgresql://ann:{}@127.0.0.1:1/shop"},
    "postgres words": {"UNLOST_STORE": "postgresql://127.0.0.1:1/shop?user=ann&password={}"},
    "no store": {"UNLOST_STORE": "mysql://ann:{}@127.0.0.1:1/shop"},
}


@pytest.mark.parametrize("kind", URLS)
def test_a_password_in_a_url_is_shown_nowhere(silent: Silent, kind: str) -> None:
    env = {name: url.format(silent.canary) for name, url in URLS[kind].items()}
    for look in (*LOOKS, ("publish", "GiftOrdered", "order_id=a", "email=x", "--app", "shop")):
        for json_too in ((), ("--json",)):
            silent(*look, *json_too, code=None, **env)
    for log in ("debug", "debug,json"):
        assert silent("run", "shop", "--log", log, stdin=" ", code=None, **env).code != 0
    shown = silent("config", **env).out
    assert "***" in shown and "ann" in shown


def test_a_password_is_not_shown_when_nobody_answers(silent: Silent) -> None:
    env = {
        "UNLOST_BROKER": f"kafka://ann:{silent.canary}@127.0.0.1:1/",
        "UNLOST_STORE": f"postgresql://ann:{silent.canary}@127.0.0.1:1/x",
    }
    result = silent("run", "shop", "--log", "debug,json", stdin=" ", code=4, **env)
    assert "UL2100" in result.err
