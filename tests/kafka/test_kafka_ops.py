"""The operators' commands on a real Kafka: what they say is so, what is missing is named, and nothing is taken part in."""

from __future__ import annotations

import json
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partialmethod
from pathlib import Path
from typing import Any

import apsw
import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from kafka_kit import make_topic, send

from unlost import Event
from unlost.brokers.kafka.topics import Cluster
from unlost.errors import UsageError
from unlost.events import seal
from unlost.ops import books, ledger
from unlost.ops.connect import opened
from unlost.ops.tail import Tail
from unlost.sqlite.file import File
from unlost.store import outbox
from unlost.world import REAL

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

from cli_kit import Shell

QUICK = "session.timeout.ms=6000"
CANARY = "c4n4ry-s3cret"
SHOP = """
from unlost import App, Event, Reject, Retry, Service, Topic

class OrderPlaced(Event, key="order_id"):
    order_id: str
    total_cents: int

billing = Service("billing", retry=Retry(attempts=1))

@billing.on(OrderPlaced)
async def charge(order: OrderPlaced) -> None:
    if not order.total_cents:
        raise Reject("an order of 0.00 cannot be paid")
    print("charged", order.order_id, flush=True)

app = App(billing, topics=[Topic("order", partitions=2{more})])
"""


class Placed(Event, key="order_id", topic="order", type="order.OrderPlaced"):
    order_id: str
    total_cents: int = 1


@pytest.fixture
def shell(tmp_path: Path, kafka: Any, fresh_prefix: str) -> Shell:
    """A folder with a shop, on a cluster of which it uses its own part."""
    shell = Shell(tmp_path)
    shell.prefix = f"{fresh_prefix}."  # type: ignore[attr-defined]
    shell.env["UNLOST_BROKER"] = f"{kafka.url}?prefix={fresh_prefix}.&{QUICK}"
    with_retention(shell, False)
    return shell


def with_retention(shell: Shell, declared: bool) -> None:
    shell.write("shop.py", SHOP.replace("{more}", ', retention="1h"' if declared else ""))


def full(shell: Shell, topic: str) -> str:
    return str(shell.prefix) + topic  # type: ignore[attr-defined]


def store(shell: Shell) -> Path:
    return shell.folder / ".unlost" / "store.db"


def publish(shell: Shell, *ids: str, cents: int = 1) -> None:
    lines = "\n".join(json.dumps({"order_id": id, "total_cents": cents}) for id in ids)
    shell.ok("publish", "OrderPlaced", "-", "--app", "shop", stdin=lines)


def harm(shell: Shell, sql: str) -> None:
    connection = apsw.Connection(str(store(shell)))
    connection.execute(sql)
    connection.close()


@contextmanager
def looking(shell: Shell) -> Iterator[Any]:
    with opened(shell.env["UNLOST_BROKER"], store=f"embedded://{store(shell)}") as here:
        yield here


@lru_cache
def admin(kafka: Any) -> AdminClient:
    """Kept: what a client has promised is never kept once the client is gone."""
    return AdminClient({"bootstrap.servers": kafka.internal})


def forget(kafka: Any, topic: str, partition: int, before: int) -> None:
    """What retention does: events are gone, handled or not."""
    for future in admin(kafka).delete_records([TopicPartition(topic, partition, before)]).values():
        future.result(20)


def ends(shell: Shell) -> dict[int, int]:
    with looking(shell) as here:
        return {p: end for p, (_, end) in enumerate(here.log.topics(["order"])[0].ranges)}


# --- all of it -------------------------------------------------------------------------------------------


def test_a_shop_from_the_first_event_to_the_books(shell: Shell, kafka: Any) -> None:
    publish(shell, "A1", "A2", "A3")
    publish(shell, "bad", cents=0)
    with shell.start("run", "shop") as running:
        running.says("charged A3")
        running.says("is dead (rejected)")
        service = shell.quick("status", "--json").json["services"][0]
        assert (service["alive"], service["owned"], service["partitions"]) == (1, 2, 2)
        assert service["processes"][0]["pid"] == running.process.pid
        assert running.end() == 0
    status = shell.quick("status")
    assert status.code == 0, status
    assert shell.env["UNLOST_BROKER"] in status.out and str(store(shell)) in status.out
    assert "outbox  empty" in status.out and "PROGRESS" in status.out
    assert "billing: 1 dead: unlost dead list --service billing" in status.out
    found = shell.quick("status", "--json").json
    units = found["services"][0]["units"]
    assert sum(u["highest_sequential"] for u in units) == sum(u["end"] for u in units) == 4
    assert all(u["highest_seen"] == u["highest_succeeded"] == u["end"] and not u["incompletes"] for u in units)
    audit = shell.quick("audit", "--verify")
    assert audit.code == 0 and "read again: the events of 2 partitions" in audit.out, audit
    book = shell.quick("audit", "--json").json["services"][0]
    assert (book["accepted"], book["done"], book["dead"], book["unaccounted"]) == (4, 3, 1, 0)
    topics = shell.quick("topic", "list", "--json").json["topics"]
    assert [(t["name"], t["partitions"], t["events"], t["services"]) for t in topics] == [("order", 2, 4, ["billing"])]
    assert (topics[0]["replication"], topics[0]["min_insync"], topics[0]["survives"]) == (1, 1, "process death")
    assert topics[0]["oldest"] and topics[0]["newest"]
    assert "1, min 1" in shell.quick("topic", "list").out
    assert len(shell.quick("tail").out.splitlines()) == 4
    assert [e["key"] for e in shell.quick("tail", "--key", "A2", "--from", "start", "--json").lines] == ["A2"]
    assert shell.quick("tail", "--from", "2999-01-01").out == ""
    assert len(shell.quick("tail", "-n", "2", "--json").lines) == 2
    groups = admin(kafka).list_consumer_groups().result(20).valid
    assert {g.group_id for g in groups if g.group_id.startswith(full(shell, ""))} == {full(shell, "billing")}


def test_looking_makes_nothing(shell: Shell) -> None:
    before = sorted(shell.folder.iterdir())
    for arguments in (["status"], ["audit"], ["dead", "list"], ["dead", "redrive", "1", "--yes"]):
        result = shell.quick(*arguments)
        assert result.code == 2 and f"UL1302: there is no store at {store(shell)}" in result.err, result
    assert shell.quick("topic", "list").code == 0
    assert shell.quick("tail").code == 0
    assert sorted(p for p in shell.folder.iterdir() if p.name != "__pycache__") == before
    with looking(shell) as here:
        assert here.log.names() == []


def test_a_store_of_another_broker_is_refused(shell: Shell) -> None:
    publish(shell, "A1")
    other = shell.env["UNLOST_BROKER"].replace("prefix=", "prefix=other-")
    for arguments in (["status"], ["audit"]):
        result = shell.quick(*arguments, "--broker", other)
        assert result.code == 2 and "UL1133" in result.err, result
    result = shell.quick("audit", "--broker", f"embedded://{store(shell)}")
    assert result.code == 2 and "UL1303" in result.err, result


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster that is not there is given up at once, in this process."""
    monkeypatch.setattr(Cluster, "connect", partialmethod(Cluster.connect, seconds=0.2))


def test_a_cluster_that_does_not_answer(shell: Shell, impatient: None) -> None:
    publish(shell, "A1")
    gone = "kafka://127.0.0.1:1?prefix=x."
    result = shell.quick("status", "--broker", gone)
    assert result.code == 4 and "billing" in result.out and "UL2100" in result.err, result
    assert shell.quick("status", "--json", "--broker", gone).json["unreachable"].startswith("UL2100")
    for arguments in (["audit"], ["tail"], ["topic", "list"]):
        result = shell.quick(*arguments, "--broker", gone)
        assert result.code == 4 and "UL2100" in result.err, result
    assert shell.quick("dead", "list", "--broker", gone).code == 0, "the shelf is in the store"
    result = shell("publish", "OrderPlaced", "order_id=1", "total_cents=1", "--app", "shop", "--broker", gone)
    assert result.code == 4 and "UL2100" in result.err, result
    result = shell.quick("run", "shop", "--broker", gone)
    assert result.code == 4 and "UL2100" in result.err, result


def test_secrets_are_hidden_everywhere(shell: Shell, impatient: None) -> None:
    publish(shell, "A1")
    urls = [
        f"kafka://ann:{CANARY}@127.0.0.1:1?prefix=x.&security.protocol=SASL_PLAINTEXT",
        f"kafka://ann:{CANARY}/x@127.0.0.1:1",
        f"kafka://127.0.0.1:1?sasl.username=ann&sasl.password={CANARY}&security.protocol=SASL_PLAINTEXT",
        f"kafka://ann:a?{CANARY}@127.0.0.1:1",
        f"kafka://ann:{CANARY}@",
    ]
    publishing = ["publish", "OrderPlaced", "order_id=1", "total_cents=1", "--app", "shop"]
    result = shell(*publishing, UNLOST_BROKER=urls[0])
    assert result.code == 4 and CANARY not in result.out + result.err, result
    commands = [
        ["status"], ["audit"], ["tail"], ["topic", "list"], ["config"], ["dead", "list"], ["demo"],
        ["run", "shop", "--json"], ["status", "--json"], ["audit", "--json"], ["config", "--json"],
    ]  # fmt: skip
    for url in urls:
        for arguments in commands:
            result = shell.quick(*arguments, UNLOST_BROKER=url)
            assert CANARY not in result.out + result.err, (arguments, result)
            if arguments[0] == "config":
                assert result.code == 0
            elif arguments != ["dead", "list"]:
                assert result.code in (2, 4), (arguments, result)
    assert not (shell.folder / "unlost-demo").exists()


# --- the books -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("declared", [False, True], ids=["nobody declared it", "declared"])
def test_what_retention_took_is_named(shell: Shell, kafka: Any, declared: bool) -> None:
    with_retention(shell, declared)
    publish(shell, "A0")
    shell.handle_all()
    publish(shell, *(f"B{n}" for n in range(20)))
    place, end = max(ends(shell).items(), key=lambda item: item[1])
    at = next(u for u in shell.quick("status", "--json").json["services"][0]["units"] if u["partition"] == place)
    lost = end - 1 - at["highest_sequential"]
    forget(kafka, full(shell, "order"), place, end - 1)

    def said(settled: bool) -> None:
        audit = shell.quick("audit")
        where = f"expired: billing order/{place}, positions {at['highest_sequential']} to {end - 2}: retention removed"
        assert where in audit.out and ("not settled yet" in audit.out) is not settled, audit
        assert ("declares no retention" in audit.out) is not declared
        assert audit.code == (0 if declared else 3), audit
        found = shell.quick("audit", "--json").json
        book = found["services"][0]
        assert (book["accepted"], book["expired"], book["unaccounted"]) == (21, lost, 0)
        assert book["done"] + book["waiting"] + book["expired"] == 21
        assert found["ranges"][0]["declared"] is declared and found["balanced"] is declared

    said(settled=False)
    shell.handle_all()
    said(settled=True)
    verified = shell.quick("audit", "--verify")
    assert f"cannot be verified: billing order/{place}: its books begin at position 0" in verified.out, verified


def test_what_cannot_be_accounted_for_has_its_own_column(shell: Shell) -> None:
    publish(shell, *(f"A{n}" for n in range(8)))
    shell.handle_all()
    rows = "select service, topic, partition, position - 2, position, 'unaccountable', 'the topic is compacted', 0, 0 "
    harm(shell, f"insert into unlost_gap {rows} from unlost_progress where partition = 0")
    harm(
        shell,
        "update unlost_progress set counts = json_set(counts, '$.done', counts ->> '$.done' - 2) where partition = 0",
    )
    audit = shell.quick("audit")
    assert audit.code == 3 and "unaccountable: billing order/0, positions " in audit.out, audit
    assert "the topic is compacted" in audit.out
    book = shell.quick("audit", "--json").json["services"][0]
    assert (book["accepted"], book["done"], book["unaccountable"], book["unaccounted"]) == (8, 6, 2, 0)


def test_markers_of_transactions_are_no_events(shell: Shell, kafka: Any) -> None:
    publish(shell, "A0")
    foreign = Producer({"bootstrap.servers": kafka.internal, "transactional.id": uuid.uuid4().hex})
    foreign.init_transactions(20)
    for commit in (True, False, True):
        foreign.begin_transaction()
        for n in range(3):
            foreign.produce(full(shell, "order"), f"{n}".encode(), b"k", partition=0)
        foreign.flush(20)
        foreign.commit_transaction(20) if commit else foreign.abort_transaction(20)
    publish(shell, *(f"B{n}" for n in range(8)))
    shell.handle_all()
    book = shell.quick("audit", "--json").json["services"][0]
    with looking(shell) as here:
        void = sum(s.counts.get("void", 0) for s in here.records.read(lambda c: books.stored(here.records, c)))
    assert void >= 5, "two markers of commits, and an aborted transaction with its own"
    assert book["done"] == 9 and book["dead"] == 1, "messages of others without CloudEvents wait on the shelf"
    assert book["accepted"] == book["done"] + book["dead"] + book["parked"] + book["waiting"]
    assert shell.quick("audit", "--verify").code == 0


def test_verify_compares_the_log_with_what_was_counted(shell: Shell) -> None:
    publish(shell, *(f"A{n}" for n in range(6)))
    shell.handle_all()
    assert shell.quick("audit", "--verify").code == 0
    harm(shell, "update unlost_progress set digest = digest + 1 where partition = 1")
    assert shell.quick("audit").code == 0
    result = shell.quick("audit", "--verify")
    assert result.code == 3 and "billing order/1: the events in the log are not those" in result.out, result


@pytest.mark.parametrize("how", ["gone", "made again", "more partitions"])
def test_a_topic_that_is_another_one_is_a_finding(shell: Shell, kafka: Any, how: str) -> None:
    publish(shell, "A0", "A1", "A2")
    shell.handle_all()
    name = full(shell, "order")
    if how == "more partitions":
        from confluent_kafka.admin import NewPartitions

        admin(kafka).create_partitions([NewPartitions(name, 3)])[name].result(20)
        text = "has 3 partitions, the service has positions on 2"
    else:
        admin(kafka).delete_topics([name])[name].result(20)
        text = "the broker has no such topic any more"
        if how == "made again":
            text = "was deleted and made again"
            end = REAL.monotonic() + 20
            while REAL.monotonic() < end:  # a deletion takes a moment to be everywhere
                try:
                    make_topic(kafka, name, 2)
                    break
                except Exception:
                    REAL.pause(0.2)
    end = REAL.monotonic() + 20
    while text not in (result := shell.quick("audit")).out and REAL.monotonic() < end:
        REAL.pause(0.2)
    assert result.code == 3 and "finding: billing order: the " in result.out and text in result.out, result
    assert shell.quick("status").code == 0


def test_the_outbox_is_shown_and_never_lost(shell: Shell) -> None:
    publish(shell, "A0")
    shell.handle_all()
    file = File(store(shell))
    envelopes = [seal(Placed(order_id=f"late{n}"), source="test", now=REAL.now()) for n in range(3)]
    file.write_sync(lambda tx: outbox.put(tx, envelopes))
    file.close()
    status = shell.quick("status")
    assert "3 events accepted and not in the log yet" in status.out and "nobody sends them: unlost run" in status.out
    assert shell.quick("status", "--json").json["outbox"]["events"] == 3
    audit = shell.quick("audit")
    assert audit.code == 0 and "3 events accepted and not in the log yet" in audit.out, audit
    assert shell.quick("audit", "--json").json["outbox"]["events"] == 3
    with shell.start("run", "shop") as running:
        for n in range(3):
            running.says(f"charged late{n}")
        assert running.end() == 0
    assert "outbox  empty" in shell.quick("status").out
    assert shell.quick("audit", "--json").json["services"][0]["done"] == 4


def test_statements_beside_the_log(shell: Shell, kafka: Any) -> None:
    publish(shell, *(f"A{n}" for n in range(6)))
    publish(shell, "bad", cents=0)
    shell.handle_all()
    result = shell.quick("audit", "--export")
    assert result.code == 0 and f"2 statements written to {full(shell, 'unlost.ledger')}" in result.out, result
    assert shell.quick("audit", "--export", "--json").json["exported"] == 2
    name = full(shell, "unlost.ledger")
    nonsense = json.dumps({"schema": "unlost.statement/9"}).encode()
    send(kafka, name, [(b"billing/order/7", b"\xff not json", []), (b"later", nonsense, []), (b"x", b"{}", [])])
    with looking(shell) as here:
        records, log = here.pair()
        found = ledger.read(log)
        assert set(found.by_key) == {"billing/order/0", "billing/order/1"}
        assert all(s.store == records.id and s.position == sum(s.counts.values()) for s in found.by_key.values())
        assert sum(s.counts.get("dead", 0) for s in found.by_key.values()) == 1
        assert len(found.unreadable) == 3 and all(text.startswith("unlost.ledger/0:") for text in found.unreadable)
        wrong = next(iter(found.by_key.values()))
        log.ledger().write({"another/key/0": json.dumps({"schema": "x"}).encode(), "moved/x/0": _encoded(wrong)})
        assert any("stands under the key" in text for text in ledger.read(log).unreadable)
        config = here.log._cluster.describe([name])[name]
        assert config.compacted and not config.deletes
    assert len(shell.quick("tail").out.splitlines()) == 7, "statements are no events"
    embedded = Shell(shell.folder / "embedded") if (shell.folder / "embedded").mkdir() is None else shell
    embedded.place("A1")
    result = embedded.quick("audit", "--export")
    assert result.code == 2 and "UL1340" in result.err, result


def _encoded(statement: ledger.Statement) -> bytes:
    import msgspec

    return msgspec.json.encode(statement)


def test_a_ledger_that_is_not_compacted_is_refused(shell: Shell, kafka: Any) -> None:
    publish(shell, "A1")
    make_topic(kafka, full(shell, "unlost.ledger"))
    result = shell.quick("audit", "--export")
    assert result.code == 2 and "UL1106" in result.err, result


# --- the shelf -------------------------------------------------------------------------------------------


def test_the_shelf_without_and_with_a_running_service(shell: Shell) -> None:
    publish(shell, "bad", cents=0)
    publish(shell, "bad", "bad")
    shell.handle_all()
    assert shell.quick("status", "--json").json["services"][0]["parked"] == 2
    result = shell.quick("dead", "redrive", "1", "--yes", "--reason", "again", "--json")
    assert result.code == 0 and result.json["carried_out"] == 1, result
    with shell.start("run", "shop") as running:  # it has no right to the epoch that the operator had
        running.says("is dead (rejected)")
        number = shell.quick("dead", "list", "--json").json["letters"][0]["number"]
        result = shell.quick("dead", "discard", str(number), "--yes", "--reason", "a test order", "--json")
        assert result.code == 0 and result.json["carried_out"] == 1, result
        running.says("charged bad")
        assert running.end() == 0
    audit = shell.quick("audit", "--json")
    book = audit.json["services"][0]
    assert (book["done"], book["removed"], book["dead"], book["unaccounted"]) == (2, 1, 0, 0), audit


def test_messages_of_others_on_the_shelf(shell: Shell, kafka: Any) -> None:
    publish(shell, "A0")
    headers = [("trace", b"abc"), ("empty", None), ("bytes", b"\xff\x1b[2J")]
    send(kafka, full(shell, "order"), [(b"k", b"\x00\x1b]0;x\x07 not json", headers)], partition=0)
    shell.handle_all()
    shown = shell.quick("dead", "show", "1")
    assert shown.code == 0 and "a message of others" in shown.out and "undecodable" in shown.out, shown
    assert "headers    3, " in shown.out and "not json" not in shown.out.replace("is not JSON", "")
    raw = shell.quick("dead", "show", "1", "--raw")
    assert "header     trace: abc" in raw.out and "header     empty: (none)" in raw.out
    assert "header     bytes: \\xff\\x1b[2J" in raw.out and "data       \\x00\\x1b]0;x\\x07 not json" in raw.out
    letter = shell.quick("dead", "show", "1", "--raw", "--json").json["letters"][0]
    assert letter["headers"][0] == {"name": "trace", "value": "abc"}
    assert letter["headers"][1] == {"name": "empty", "value": None}
    assert letter["headers"][2]["value_base64"] and letter["data"].endswith("not json")
    assert "(hidden" in shell.quick("dead", "show", "1", "--data", "--app", "shop").out
    tail = shell.quick("tail", "--raw")
    assert "(no event: " in tail.out and "\\x00\\x1b]0;x\\x07 not json" in tail.out, tail


# --- following -------------------------------------------------------------------------------------------


def test_following_leaves_nothing_out(shell: Shell) -> None:
    publish(shell, *(f"A{n}" for n in range(5)))
    with looking(shell) as here:
        tail = Tail(here.log)
        before = [a.envelope.subject or a.key for _, a in tail.last(100)]
        assert len(before) == 5
        seen: list[Any] = []
        stop = threading.Event()
        tail.stopped = stop.is_set

        def follow() -> None:
            for _, arrival in tail.follow():
                seen.append(arrival.key)
                if len(seen) == 12:
                    stop.set()

        follower = threading.Thread(target=follow, daemon=True)
        follower.start()
        publish(shell, *(f"B{n}" for n in range(10)))
        shell.write(
            "late.py",
            "from unlost import App, Event\nclass Come(Event, key='k', past_tense=False):\n    k: str\napp = App()\n",
        )
        for key in ("C1", "C2"):
            shell.ok("publish", "Come", f"k={key}", "--app", "late")
        follower.join(30)
        assert sorted(seen) == sorted([*(f"B{n}".encode() for n in range(10)), b"C1", b"C2"])


def test_tail_follows_until_it_is_told(shell: Shell) -> None:
    publish(shell, "A1")
    with shell.start("tail", "--follow") as running:
        running.says("A1")
        publish(shell, "A2")
        running.says("A2")
        assert running.end() == 0


# --- publishing ------------------------------------------------------------------------------------------


def test_a_line_that_the_cluster_would_not_take_is_refused_by_its_number(shell: Shell) -> None:
    publish(shell, "A0")
    large = json.dumps({"order_id": "x" * (12 * 1024 * 1024), "total_cents": 1})
    lines = "\n".join([json.dumps({"order_id": "A1", "total_cents": 1}), large, '{"order_id": "A2", "total_cents": 2}'])
    result = shell("publish", "OrderPlaced", "-", "--app", "shop", stdin=lines)
    assert result.code == 1 and "line 2: UL1" in result.err, result
    assert len(result.out.splitlines()) == 2


def test_run_says_where_it_is(shell: Shell) -> None:
    with shell.start("run", "shop") as running:
        running.says(f"unlost: billing on {shell.env['UNLOST_BROKER']}, store {store(shell)} (made just now)")
        assert running.end() == 0


def test_the_embedded_books_have_no_place_for_statements(tmp_path: Path) -> None:
    file = File(tmp_path / "events.db")
    try:
        from unlost.brokers.embedded.log import EmbeddedLog

        with pytest.raises(UsageError, match="UL1340"):
            ledger.place(EmbeddedLog(file))
    finally:
        file.close()
