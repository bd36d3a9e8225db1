"""Releases of one service, one after another and side by side, in real processes: no deploy loses an event."""

from __future__ import annotations

import configparser
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import apsw
import pytest
import yaml
from cli_kit import Shell

from unlost.app import RELAY_SECONDS, STOP_SECONDS
from unlost.delivery.service import Service
from unlost.delivery.worker import SAVE_SECONDS
from unlost.sqlite.file import File
from unlost.sqlite.schema import FORMAT

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "deploy"

OLD = """
from pathlib import Path
from unlost import App, Event, Reject, Retry, RetryLater, Service

class OrderPlaced(Event, key="order_id", topic="order", type="order.OrderPlaced"):
    order_id: str
    total: int

class OrderNoted(Event, key="order_id", topic="order", type="order.OrderNoted"):
    order_id: str

billing = Service("billing", retry=Retry(attempts=1))

@billing.on(OrderPlaced)
async def charge(order: OrderPlaced) -> None:
    if order.total == 13:
        raise Reject("no")
    if order.total == 14:
        raise RetryLater(after=3600)
    with Path("charged").open("a") as file:
        file.write(f"{order.order_id} {order.total} by old\\n")

@billing.on(OrderNoted)
async def write_down(order: OrderNoted) -> None: ...

app = App(billing)
"""
# Another module, class and function; cents instead of euros.
NEW = """
from pathlib import Path
from unlost import App, Event, Retry, Service, upcast

class Order(Event, key="order_id", topic="order", type="order.OrderPlaced", version=2):
    order_id: str
    cents: int

@upcast(Order, from_version=1)
def in_cents(data):
    return {"order_id": data["order_id"], "cents": data["total"] * 100}

billing = Service("billing", retry=Retry(attempts=1))

@billing.on(Order)
async def take_the_money(order: Order) -> None:
    with Path("charged").open("a") as file:
        file.write(f"{order.order_id} {order.cents} by new\\n")

app = App(billing)
"""


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    shell = Shell(tmp_path)
    shell.write("shop.py", OLD)
    shell.write("store/main.py", NEW)
    shell.write("store/__init__.py", "")
    return shell


def lines_of(field: str, pairs: Sequence[str]) -> str:
    orders = [pair.split("=") for pair in pairs]
    return "".join(json.dumps({"order_id": id, field: int(price)}) + "\n" for id, price in orders)


def by_old(shell: Shell, *pairs: str) -> None:
    lines = lines_of("total", pairs)
    shell.ok("publish", "order.OrderPlaced", "-", "--app", "shop", stdin=lines)


def by_new(shell: Shell, *pairs: str) -> None:
    lines = lines_of("cents", pairs)
    shell.ok("publish", "order.OrderPlaced", "-", "--app", "store.main", stdin=lines)


def charged(shell: Shell) -> list[str]:
    path = shell.folder / "charged"
    return path.read_text().splitlines() if path.exists() else []


def run(shell: Shell, app: str, *, retrying: int = 0) -> None:
    """Until nothing is left to do but what waits for an operator, and so many events for a time that is far away."""
    with shell.start("run", app) as running:
        running.says("unlost: ")
        shell.until(lambda s: not s["waiting"] + s["in_flight"] + s["requested"] and s["retrying"] == retrying)
        assert running.end(signal.SIGTERM) == 0


def book(shell: Shell) -> Any:
    result = shell.quick("audit", "--json")
    assert result.code == 0, result
    return result.json["services"][0]


def test_two_releases_side_by_side(shell: Shell) -> None:
    """They share the partitions; each event is handled by one of them, or shelved by the one that is too old for it."""
    with shell.start("run", "shop") as old, shell.start("run", "store.main") as new:
        old.says("unlost: ")
        new.says("unlost: ")
        shell.until(lambda s: len(s["processes"]) == 2 and all(p["partitions"] == 4 for p in s["processes"]))
        by_old(shell, *(f"A{n}={n + 100}" for n in range(20)))
        by_new(shell, *(f"B{n}={n + 100}" for n in range(20)))
        shell.until(lambda s: not s["waiting"] + s["in_flight"])
        assert old.end(signal.SIGTERM) == 0
        shell.until(lambda s: s["owned"] == s["partitions"])
        found = book(shell)
        assert found["done"] + found["dead"] == 40 and 0 < found["dead"] < 20
        shell.ok("dead", "redrive", "--reason-is", "unknown_version", "--yes")
        shell.until(lambda s: not s["waiting"] + s["in_flight"] + s["requested"] + s["retrying"])
        assert new.end(signal.SIGTERM) == 0
    assert book(shell)["done"] == 40
    assert sorted(line.split()[0] for line in charged(shell)) == sorted(f"{x}{n}" for x in "AB" for n in range(20))
    assert {line.split()[-1] for line in charged(shell)} == {"old", "new"}


def test_a_rollback_after_the_new_release_wrote(shell: Shell) -> None:
    """The old one puts what it cannot know on the shelf, with what comes after it of the key; the next upgrade handles both
    in their order."""
    by_new(shell, "A1=100", "A2=200")
    by_old(shell, "A1=1", "A3=3")
    run(shell, "shop")
    assert charged(shell) == ["A3 3 by old"]
    letters = shell.quick("dead", "list", "--json").json["letters"]
    assert {(x["reason"], x["parked_behind"]) for x in letters} == {("unknown_version", 1), ("unknown_version", 0)}
    assert (book(shell)["dead"], book(shell)["parked"]) == (2, 1)
    shell.ok("dead", "redrive", "--reason-is", "unknown_version", "--yes")
    run(shell, "store.main")
    assert [line for line in charged(shell) if line.startswith("A1")] == ["A1 100 by new", "A1 100 by new"]
    assert len(charged(shell)) == 4 and book(shell)["done"] == 4


def test_module_class_and_handler_are_renamed(shell: Shell) -> None:
    """What the old code had begun, the new code goes on with: the wire type and the service's name are what counts."""
    by_old(shell, "A1=1", "A2=14", "A2=2", "A3=13")
    run(shell, "shop", retrying=1)
    assert charged(shell) == ["A1 1 by old"]
    assert (book(shell)["retrying"], book(shell)["parked"], book(shell)["dead"]) == (1, 1, 1)
    an_hour_goes_by(shell)
    shell.ok("dead", "redrive", "--all", "--yes")
    with shell.start("run", "store.main") as running:
        running.says("unlost: ")
        shell.until(lambda s: not s["retrying"] + s["parked"] + s["dead"])
        assert running.end(signal.SIGTERM) == 0
    assert [line for line in charged(shell) if line.startswith("A2")] == ["A2 1400 by new", "A2 200 by new"]
    assert "A3 1300 by new" in charged(shell) and book(shell)["done"] == 4


def an_hour_goes_by(shell: Shell) -> None:
    file = File(shell.database)
    try:
        sql = "update unlost_waiting set due = due - 3600000000 where due is not null"
        file.write_sync(lambda tx: tx.execute(sql))
    finally:
        file.close()


def test_a_handler_is_removed(shell: Shell) -> None:
    """What waited for it is passed over by the rule that has a name, when its time comes; nothing is dropped unsaid."""
    by_old(shell, "A1=14", "A2=13", "A1=1")
    run(shell, "shop", retrying=1)
    assert (book(shell)["retrying"], book(shell)["parked"], book(shell)["dead"]) == (1, 1, 1)
    shell.write("shop.py", OLD.replace("@billing.on(OrderPlaced)\n", ""))
    shell.ok("publish", "order.OrderNoted", "order_id=A9", "--app", "shop")
    run(shell, "shop", retrying=1)
    assert (book(shell)["retrying"], book(shell)["dead"], book(shell)["done"]) == (1, 1, 1)  # they stay where they are
    an_hour_goes_by(shell)
    shell.ok("dead", "redrive", "--all", "--yes")
    with shell.start("run", "shop") as running:
        running.says("unlost: ")
        shell.until(lambda s: not s["retrying"] + s["parked"] + s["dead"])
        assert running.end(signal.SIGTERM) == 0
    assert book(shell)["skipped"] == {"no handler": 3} and charged(shell) == []


def test_a_service_that_the_next_release_has_not_any_more(shell: Shell) -> None:
    by_old(shell, "A1=13", "A1=1", "A2=2")
    run(shell, "shop")
    by_old(shell, "A3=3")
    assert "nobody runs it" in shell.quick("status").out
    shell.ok("service", "retire", "billing", "--reason", "release 7 has it no more", "--yes")
    assert "nobody runs it" not in shell.quick("status").out
    assert (book(shell)["done"], book(shell)["removed"], book(shell)["accepted"]) == (1, 3, 4)


def test_an_older_release_and_a_newer_file(shell: Shell) -> None:
    by_old(shell, "A1=1")
    connection = apsw.Connection(str(shell.database))
    connection.pragma("user_version", FORMAT + 1)
    connection.close()
    for command in (["run", "shop"], ["status"], ["service", "retire", "billing", "--reason", "x", "--yes"]):
        result = shell(*command)
        assert result.code == 2 and "UL1112" in result.err and f"format {FORMAT + 1}" in result.err
    connection = apsw.Connection(str(shell.database))
    connection.pragma("user_version", FORMAT)
    connection.close()
    run(shell, "shop")
    assert charged(shell) == ["A1 1 by old"]


# --- the examples ----------------------------------------------------------------------------------------

STOP_MAX = STOP_SECONDS + 2 * SAVE_SECONDS + RELAY_SECONDS


def manifests(name: str) -> dict[str, Any]:
    found = list(yaml.safe_load_all((EXAMPLES / name).read_text()))
    assert all({"apiVersion", "kind", "metadata", "spec"} <= set(m) for m in found)
    return {m["kind"]: m for m in found}


@pytest.mark.parametrize("name", ["kubernetes-embedded.yaml", "kubernetes-kafka.yaml"])
def test_a_deployment(name: str) -> None:
    deployment = manifests(name)["Deployment"]["spec"]
    pod = deployment["template"]["spec"]
    assert deployment["selector"]["matchLabels"] == deployment["template"]["metadata"]["labels"]
    assert pod["terminationGracePeriodSeconds"] > max(STOP_MAX, Service("x").deadline)
    assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] > 0
    (container,) = pod["containers"]
    assert container["command"][:2] == ["unlost", "run"], "a shell would keep SIGTERM to itself"
    secure = container["securityContext"]
    assert secure["readOnlyRootFilesystem"] is True and secure["allowPrivilegeEscalation"] is False
    assert secure["capabilities"] == {"drop": ["ALL"]}
    env = {e["name"]: e["value"] for e in container["env"]}
    port = {p["name"]: p["containerPort"] for p in container["ports"]}["health"]
    assert env["UNLOST_HTTP"] == f"0.0.0.0:{port}"
    probes = {kind: container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")}
    assert probes == {
        "startup": {"path": "/ready", "port": "health"},
        "liveness": {"path": "/live", "port": "health"},
        "readiness": {"path": "/ready", "port": "health"},
    }
    volumes = {v["name"] for v in pod["volumes"]}
    assert {m["name"] for m in container["volumeMounts"]} == volumes


def test_the_embedded_broker_has_one_pod_and_a_disk() -> None:
    found = manifests("kubernetes-embedded.yaml")
    deployment = found["Deployment"]["spec"]
    assert deployment["replicas"] == 1 and deployment["strategy"] == {"type": "Recreate"}
    pod = deployment["template"]["spec"]
    (volume,) = pod["volumes"]
    assert volume["persistentVolumeClaim"]["claimName"] == found["PersistentVolumeClaim"]["metadata"]["name"]
    assert found["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteOnce"]
    (mount,) = pod["containers"][0]["volumeMounts"]
    env = {e["name"]: e["value"] for e in pod["containers"][0]["env"]}
    assert env["UNLOST_BROKER"].startswith(f"embedded://{mount['mountPath']}/")


def test_several_pods_keep_nothing_on_their_disks() -> None:
    found = manifests("kubernetes-kafka.yaml")
    pod = found["Deployment"]["spec"]["template"]["spec"]
    assert all(m["readOnly"] for m in pod["containers"][0]["volumeMounts"])
    env = {e["name"]: e["value"] for e in pod["containers"][0]["env"]}
    assert env["UNLOST_BROKER"].startswith("kafka://") and env["UNLOST_STORE_FILE"].startswith("/run/secrets/")
    assert found["Job"]["spec"]["template"]["spec"]["containers"][0]["command"][:3] == ["unlost", "store", "migrate"]


@pytest.mark.parametrize("name", ["kubernetes-embedded.yaml", "kubernetes-kafka.yaml"])
def test_the_commands_of_the_examples_are_understood(name: str) -> None:
    """Each ends at what is missing here (the App, the store), not at an option that does not exist."""
    for kind in ("Deployment", "Job"):
        manifest = manifests(name).get(kind)
        if manifest is None:
            continue
        command = manifest["spec"]["template"]["spec"]["containers"][0]["command"]
        done = subprocess.run(
            [sys.executable, "-m", *command], capture_output=True, text=True, timeout=60, check=False, cwd="/",
            env={k: v for k, v in os.environ.items() if not k.startswith("UNLOST_")},
        )  # fmt: skip
        assert "UL1300" not in done.stderr and ("UL1" in done.stderr or done.returncode == 0), done.stderr


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(EXAMPLES / "shop.service")
    return parser


def test_the_unit_of_systemd() -> None:
    service = unit()["Service"]
    assert (service["Type"], service["KillSignal"], service["KillMode"]) == ("exec", "SIGTERM", "mixed")
    assert int(service["TimeoutStopSec"]) > max(STOP_MAX, Service("x").deadline)
    assert service["StateDirectory"] == "shop" and service["StateDirectoryMode"] == "0700"
    assert "embedded:///var/lib/shop/events.db" in (EXAMPLES / "shop.service").read_text()
    assert service["User"] not in ("", "root") and service["ProtectSystem"] == "strict"
    for name in ("NoNewPrivileges", "ProtectHome", "PrivateTmp", "PrivateDevices", "RestrictSUIDSGID"):
        assert service[name] == "yes", name
    assert service["ExecStart"].split()[1:] == ["run", "shop.main:app"]


def test_systemd_itself_understands_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze here")
    text = (EXAMPLES / "shop.service").read_text()
    for old, new in (
        ("/opt/shop/venv/bin/unlost", sys.executable),
        ("=/opt/shop", f"={tmp_path}"),
    ):
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "shop.service"
    path.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    said = [line for line in done.stderr.splitlines() if "shop.service" in line]
    assert done.returncode == 0 and said == [], done.stderr
    path.write_text(text.replace("Type=exec", "Type=exce"))  # and it would say so
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert "shop.service" in done.stderr
