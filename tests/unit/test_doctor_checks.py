"""The checks of `unlost doctor` that need no broker: forecasts, and facts that one node cannot show."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import apsw
import msgspec
import pytest
from cli_kit import Shell

from unlost.brokers.embedded import doctor as embedded
from unlost.brokers.embedded.broker import EmbeddedBroker
from unlost.brokers.findings import CHECKS, Examination, Finding, Ours, worst
from unlost.brokers.kafka import checks
from unlost.brokers.kafka.facts import Facts, GroupFacts, MemberFacts, Node, Place, Reach, TopicFacts, Unread
from unlost.brokers.kafka.forecast import Forecast, forecast
from unlost.brokers.kafka.settings import MESSAGE_BYTES_MAX, parse
from unlost.brokers.port import Saved
from unlost.delivery import note
from unlost.events import Envelope
from unlost.events.topic import Topic, Unit
from unlost.ops import doctor as ops
from unlost.sqlite.file import File
from unlost.store.port import Snapshot
from unlost.store.progress import Runs
from unlost.store.records import FileRecords
from unlost.world import World

HOUR = 3600.0
SETTINGS = parse("kafka://b1:9092")
GOOD = {
    "min.insync.replicas": "2", "retention.ms": "-1", "retention.bytes": "-1", "cleanup.policy": "delete",
    "max.message.bytes": str(MESSAGE_BYTES_MAX), "unclean.leader.election.enable": "false",
    "message.timestamp.type": "CreateTime",
}  # fmt: skip
BROKER = {
    "auto.create.topics.enable": "false", "unclean.leader.election.enable": "false", "offsets.retention.minutes": "10080",
    "offset.metadata.max.bytes": "4096", "group.min.session.timeout.ms": "6000", "group.max.session.timeout.ms": "1800000",
    "group.coordinator.rebalance.protocols": "classic,consumer", "offsets.topic.replication.factor": "3",
}  # fmt: skip
EVERYTHING = frozenset({"READ", "WRITE", "DESCRIBE", "CREATE"})
WHOLE = Place(1, (1, 2, 3), (1, 2, 3))


def topic(name: str = "order", places: Sequence[Place] = (WHOLE,), **config: str) -> TopicFacts:
    named = {key.replace("_", "."): value for key, value in config.items()}
    return TopicFacts(
        name=name, full=name, id="id", places=dict(enumerate(places)), config=GOOD | named, rights=EVERYTHING
    )


def group(name: str = "billing", **changes: Any) -> GroupFacts:
    facts = GroupFacts(
        name=name, full=name, state="STABLE", consumer_protocol=False, assignor="cooperative-sticky",
        members=[MemberFacts("unlost", "10.0.0.7")], saved={("order", 0): Saved(5, "")}, rights=EVERYTHING,
    )  # fmt: skip
    return msgspec.structs.replace(facts, **changes)


def facts(**changes: Any) -> Facts:
    """A cluster in good order."""
    good = Facts(
        cluster="c", library=("2.15.0", 0x020F00FF), nodes=[Node(n, f"b{n}", 9092, f"rack{n}") for n in (1, 2, 3)],
        bootstrap={"b1:9092": Reach(("10.0.0.1",))}, reached={n: Reach((f"10.0.0.{n}",)) for n in (1, 2, 3)},
        apis={68: 1, 60: 2, 47: 0}, rights=EVERYTHING, brokers=dict.fromkeys((1, 2, 3), BROKER), topics={"order": topic()},
        missing=[], offsets=topic("__consumer_offsets", cleanup_policy="compact"), groups={"billing": group()},
        ranges={("order", 0): (0, 5)}, unread={}, newest_of_brokers=-5.0, newest_of_topics={"order": -60.0},
        skipped=[], denied=[],
    )  # fmt: skip
    return msgspec.structs.replace(good, **changes)


def check(seen: Facts, url: str = "kafka://b1:9092?security.protocol=SSL", **ours: Any) -> list[Finding]:
    return checks.check(seen, parse(url), Ours(**ours))


def red(found: Sequence[Finding], code: str, severity: str, text: str = "") -> Finding:
    """The finding of this code that is as bad as said."""
    assert code in CHECKS
    here = [f for f in found if f.code == code]
    matching = [f for f in here if f.severity == severity and text in f.what + f.evidence]
    assert matching, here
    return matching[0]


# --- the forecast ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("position", "age", "retention", "young", "expected"),
    [
        (9, None, HOUR, None, Forecast("nothing waits")),
        (4, None, None, None, Forecast("kept", 5)),
        (4, 600.0, HOUR, False, Forecast("in time", 5, 0, 3000.0)),
        (4, 1800.0, HOUR, False, Forecast("in time", 5, 0, 1800.0)),
        (4, 1801.0, HOUR, False, Forecast("soon", 5, 0, 1799.0)),
        (4, 3600.0, HOUR, False, Forecast("due", 5, 0, 0.0)),
        (4, 9000.0, HOUR, False, Forecast("due", 5, 0, 0.0)),
        (4, -50.0, HOUR, False, Forecast("in time", 5, 0, 3650.0)),  # from the future
        (4, None, HOUR, True, Forecast("in time", 5)),
        (4, None, HOUR, False, Forecast("soon", 5)),  # older than half, and not read
        (4, None, HOUR, None, Forecast("unknown", 5)),  # never taken for good
        (1, 9000.0, HOUR, None, Forecast("removed", 7, 1)),
        (12, None, HOUR, None, Forecast("nothing waits")),  # beyond the end: another check says so
    ],
)
def test_forecast(position: int, age: float | None, retention: float, young: bool | None, expected: Forecast) -> None:
    assert forecast(low=2, high=9, position=position, age=age, retention=retention, young=young) == expected


def test_the_error_begins_below_half_of_the_retention() -> None:
    kept = {"order": topic(retention_ms="3600000")}
    for age, severity in ((1700.0, "note"), (1900.0, "error"), (4000.0, "error")):
        unread = {("billing", "order", 0): Unread(young=age < 1800, age=age)}
        found = check(facts(topics=kept, ranges={("order", 0): (0, 9)}, unread=unread))
        finding = red(found, "UL4301", severity)
        assert "retention.ms=-1" in finding.fix or severity == "note"
    unread = {("billing", "order", 0): Unread(young=False)}
    red(check(facts(topics=kept, ranges={("order", 0): (0, 9)}, unread=unread)), "UL4301", "error", "30 minutes")
    red(check(facts(topics=kept, ranges={("order", 0): (0, 9)})), "UL4007", "note", "how old")


def test_the_store_goes_before_what_the_group_was_told() -> None:
    seen = facts(ranges={("order", 0): (8, 20)})
    red(check(seen), "UL4302", "error", "up to 3 events")
    found = check(seen, positions={Unit("billing", "order", 0): 9})
    red(found, "UL4302", "ok")
    red(check(facts(ranges={("order", 0): (0, 3)})), "UL4303", "error", "position 5, the log ends at 3")


# --- a good cluster, and what one node cannot show ------------------------------------------------------


def test_a_good_cluster_is_in_order_and_every_check_says_so() -> None:
    found = check(facts())
    assert {f.severity for f in found} == {"ok"}, [f for f in found if f.severity != "ok"]
    said = {f.code for f in found}
    elsewhere = {code for code in CHECKS if code >= "UL44"} | {"UL4007", "UL4213"}
    assert said == set(CHECKS) - elsewhere
    assert worst(found) == "ok"


def test_client_and_way() -> None:
    red(check(facts(library=("2.13.1", 0x020D01FF))), "UL4001", "error")
    red(
        check(facts(), "kafka://b1?security.protocol=SSL&ssl.endpoint.identification.algorithm=none"),
        "UL4002",
        "warning",
        "ssl.endpoint.identification.algorithm",
    )
    red(check(facts(), "kafka://b1?test.mock.num.brokers=3"), "UL4002", "error")
    red(check(facts(), "kafka://b1?enable.ssl.certificate.verification=false"), "UL4002", "warning")
    red(check(facts(), "kafka://b1"), "UL4003", "warning", "plain text")
    red(check(facts(), "kafka://b1?security.protocol=SASL_PLAINTEXT"), "UL4003", "warning", "password")
    local = Reach(("127.0.0.1",), loopback=True)
    red(check(facts(bootstrap={"b1": local}, reached={1: local}), "kafka://b1"), "UL4003", "ok")
    red(check(facts(bootstrap={"b1": local}), "kafka://b1"), "UL4003", "warning")
    bad = {1: Reach(problem="the name cannot be resolved"), 2: Reach(), 3: Reach()}
    red(check(facts(reached=bad)), "UL4004", "error", "b1:9092")
    red(check(facts(skipped=["the weather"])), "UL4007", "note", "the weather")


def test_rights() -> None:
    red(check(facts(denied=["the topic order"])), "UL4005", "error", "the topic order")
    blind = msgspec.structs.replace(topic(), rights=frozenset({"DESCRIBE"}))
    red(check(facts(topics={"order": blind})), "UL4005", "error", "read or write")
    reader = msgspec.structs.replace(topic(), rights=frozenset({"DESCRIBE", "READ"}))
    red(check(facts(topics={"order": reader})), "UL4005", "warning", "write")
    red(check(facts(groups={"billing": group(rights=frozenset())})), "UL4005", "error", "take part")
    red(check(facts(rights=frozenset())), "UL4005", "note", "make topics")


def test_clocks() -> None:
    red(check(facts(newest_of_brokers=3600.0)), "UL4006", "warning", "60 minutes ahead")
    red(check(facts(newest_of_topics={"order": 1800.0})), "UL4006", "warning", "future")
    red(check(facts(newest_of_brokers=None)), "UL4006", "note", "not checked")
    red(check(facts(newest_of_brokers=10.0)), "UL4006", "ok")  # within what clocks differ by


def test_the_cluster() -> None:
    nodes = facts().nodes
    red(check(facts(nodes=nodes[:1])), "UL4101", "warning", "one broker")
    red(check(facts(nodes=nodes[:2])), "UL4101", "warning", "two brokers")
    red(check(facts(apis={47: 0})), "UL4102", "warning", "2.4")
    red(check(facts(apis={0: 3})), "UL4102", "warning", "older than")
    red(check(facts(apis={60: 0, 47: 0})), "UL4102", "ok", "2.8")
    assert not [f for f in check(facts(apis={})) if f.code == "UL4102"]
    consumer = "kafka://b1?group.protocol=consumer"
    red(check(facts(apis={60: 0}), consumer), "UL4103", "error")
    red(
        check(facts(brokers={1: BROKER | {"group.coordinator.rebalance.protocols": "classic"}}), consumer),
        "UL4103",
        "error",
    )
    red(check(facts(), consumer), "UL4103", "ok")
    red(check(facts(), "kafka://b1?session.timeout.ms=1000"), "UL4103", "error", "session.timeout.ms=1000")
    on = {1: BROKER, 2: BROKER | {"auto.create.topics.enable": "true", "unclean.leader.election.enable": "true"}}
    red(check(facts(brokers=on)), "UL4104", "warning", "broker 2")
    red(check(facts(brokers=on)), "UL4105", "warning", "broker 2")
    red(check(facts(brokers={1: BROKER | {"offsets.retention.minutes": "60"}})), "UL4106", "warning", "60 minutes")
    red(check(facts(brokers={1: BROKER | {"offset.metadata.max.bytes": "100"}})), "UL4109", "warning")


def test_the_topic_of_positions() -> None:
    def offsets(*places: Place) -> list[Finding]:
        return check(facts(offsets=topic("__consumer_offsets", places, cleanup_policy="compact")))

    red(offsets(Place(1, (1,), (1,))), "UL4107", "warning", "1 copy")
    red(offsets(WHOLE, Place(None, (1, 2, 3), (2,))), "UL4107", "error", "leader")
    red(offsets(WHOLE, Place(1, (1, 2, 3), (1,))), "UL4107", "error", "publishing is refused")
    red(offsets(WHOLE, Place(1, (1, 2, 3), (1, 2))), "UL4107", "warning", "behind")
    red(check(facts(offsets=None, nodes=facts().nodes[:1])), "UL4107", "error", "no group can be formed")


def test_racks() -> None:
    def racks(*names: str, place: Place = WHOLE) -> list[Finding]:
        nodes = [Node(n, f"b{n}", 9092, name) for n, name in enumerate(names, 1)]
        return check(facts(nodes=nodes, topics={"order": topic(places=[place])}))

    red(racks("", "", ""), "UL4108", "note", "no broker says")
    red(racks("a", "a", "a"), "UL4108", "warning", "all brokers are in one rack")
    red(racks("a", "a", "b", place=Place(1, (1, 2), (1, 2))), "UL4108", "warning", "order/0")
    red(racks("a", "b", ""), "UL4108", "note", "some brokers")
    red(racks("a", "b", "b"), "UL4108", "ok")


def test_copies() -> None:
    def places(*all_of_them: Place, **config: str) -> list[Finding]:
        return check(facts(topics={"order": topic(places=all_of_them, **config)}))

    found = places(WHOLE, Place(None, (1, 2, 3), ()), Place(2, (1, 2, 3), (2,)), Place(2, (1, 2, 3), (2, 3)))
    red(found, "UL4202", "error", "order/1")
    assert red(found, "UL4203", "error", "order/2").fix.endswith("1, 3")
    red(found, "UL4204", "warning", "order/3")
    red(places(Place(1, (1,), (1,))), "UL4205", "error", "1 copy")
    red(places(Place(1, (1, 2), (1, 2))), "UL4205", "warning", "2 copies")
    red(places(WHOLE, min_insync_replicas="1"), "UL4206", "warning", "one copy has it")
    red(places(WHOLE, min_insync_replicas="3"), "UL4206", "warning", "stops")
    red(places(WHOLE, min_insync_replicas="4"), "UL4206", "error", "nothing is ever accepted")


def test_groups() -> None:
    ready = {("order", 0): (0, 5)}
    three = [MemberFacts("unlost", f"10.0.0.{n}") for n in (1, 2, 3)]
    red(check(facts(ranges=ready, groups={"billing": group(members=three)})), "UL4305", "warning", "3 members")
    foreign = [MemberFacts("rdkafka", "10.0.0.9")]
    red(check(facts(ranges=ready, groups={"billing": group(members=foreign)})), "UL4306", "warning", "rdkafka")
    red(check(facts(ranges=ready, groups={"billing": group(assignor="range")})), "UL4306", "warning", "range")
    red(check(facts(ranges=ready, groups={"billing": group(state="EMPTY", members=[])})), "UL4304", "note", "7 days")
    red(
        check(facts(ranges=ready, groups={"billing": group(state="DEAD", members=[], saved={})})),
        "UL4304",
        "note",
        "has not run",
    )
    red(
        check(facts(ranges=ready, groups={"billing": group(state="PREPARING_REBALANCING")})),
        "UL4304",
        "note",
        "just now",
    )


def test_where_settings_cannot_be_read_nothing_is_said_to_be_good() -> None:
    hidden = msgspec.structs.replace(topic(), config=None)
    found = check(facts(topics={"order": hidden}, brokers={}, skipped=["the settings of topic order: no"]))
    assert [f.code for f in found if f.severity == "note"] == ["UL4007"]
    assert not [f for f in found if f.code in ("UL4208", "UL4104", "UL4105", "UL4106", "UL4109")]


# --- the store -------------------------------------------------------------------------------------------


def store(**changes: Any) -> ops.StoreFacts:
    good = ops.StoreFacts(
        path="/store.db", id="S", broker="kafka c", units={Unit("billing", "order", 0): ops.Saved("id", 0, 5)},
        unsent=0, oldest=None, relay=True,
    )  # fmt: skip
    return msgspec.structs.replace(good, **changes)


def seen(**changes: Any) -> Examination:
    unit = Unit("billing", "order", 0)
    good = Examination(
        title="", findings=[], services=["billing"], saved={"billing": {unit: Saved(5, "")}},
        members={"billing": ["127.0.0.1", "10.0.0.5"]}, here=frozenset({"10.0.0.5"}),
    )  # fmt: skip
    return msgspec.structs.replace(good, **changes)


def test_members_on_other_machines() -> None:
    red(ops.check_store(store(), seen(), 0), "UL4408", "ok")
    found = ops.check_store(store(), seen(members={"billing": ["10.0.0.5", "10.0.0.6"]}), 0)
    red(found, "UL4408", "warning", "10.0.0.6")


def test_the_outbox() -> None:
    now = 100_000_000
    red(ops.check_store(store(), seen(), now), "UL4409", "ok")
    red(ops.check_store(store(unsent=3, oldest=now, relay=True), seen(), now), "UL4409", "ok")
    red(
        ops.check_store(store(unsent=3, oldest=now, relay=False), seen(), now),
        "UL4409",
        "error",
        "no process sends them",
    )
    red(ops.check_store(store(unsent=3, oldest=0, relay=True), seen(), now), "UL4409", "warning", "100 s")


def test_what_begins_a_note() -> None:
    text, _ = note.encode(
        "S",
        Snapshot(
            unit=Unit("b", "o", 0), topic_id="i", partitions=1, position=1, fated=Runs(()), counts={}, digest=0,
        ),
    )  # fmt: skip
    assert text.startswith(checks.NOTE_MARK) and note.NOTE_MAX == checks.NOTE_BYTES


# --- a file of ours --------------------------------------------------------------------------------------

Usage = namedtuple("Usage", "total used free")


def test_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "events.db"
    path.touch(0o600)
    tmp_path.chmod(0o700)
    monkeypatch.setattr(embedded, "file_system", lambda _: "ext4")
    assert worst([*embedded.library(), *embedded.look_at_file(path)]) == "ok"
    path.chmod(0o644)
    assert red(list(embedded.look_at_file(path)), "UL4504", "warning", "0644").fix == f"chmod 600 {path}"
    path.chmod(0o600)
    tmp_path.chmod(0o770)
    red(list(embedded.look_at_file(path)), "UL4504", "warning", "0770")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(9, 9, 500_000_000))
    red(list(embedded.look_at_file(path)), "UL4503", "warning", "0.5 GB")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(9, 9, 1000))
    red(list(embedded.look_at_file(path)), "UL4503", "error", "full")
    for kind, severity in (("nfs4", "error"), ("tmpfs", "error"), ("overlay", "note")):
        monkeypatch.setattr(embedded, "file_system", lambda _, kind=kind: kind)
        red(list(embedded.look_at_file(path)), "UL4502", severity, kind)
    monkeypatch.setattr(embedded, "file_system", lambda _: "nfs4")
    red(list(embedded.look_at_file(path)), "UL4502", "error", "nfs4")
    monkeypatch.setattr(apsw, "sqlite_lib_version", lambda: "3.46.0")
    red(list(embedded.library()), "UL4501", "error", "3.46.0")


def test_the_command_on_the_embedded_broker(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    assert shell.quick("doctor").code == 2  # it makes no file
    shell.place("A1")
    shell.database.parent.chmod(0o700)
    out = shell.ok("doctor").out
    assert "UL4510" in out and "UL4501" not in out
    assert "UL4501" in shell.ok("doctor", "--all").out
    shell.database.chmod(0o666)
    assert shell.quick("doctor").code == 0 and shell.quick("doctor", "--strict").code == 1
    found = shell.quick("doctor", "--json").json
    assert list(found) == [
        "schema", "broker", "title", "store", "chosen", "topics", "services", "errors", "warnings", "findings",
    ]  # fmt: skip
    assert found["schema"] == "unlost.doctor/1" and found["warnings"] == 1
    assert list(found["findings"][0]) == ["severity", "code", "what", "evidence", "fix"]
    shell.database.chmod(0o600)
    older = shell.database.read_bytes()
    shell.place("A2")
    shell.database.write_bytes(older)
    for end in ("-wal", "-shm"):
        shell.database.with_name(f"events.db{end}").unlink(missing_ok=True)
    result = shell.quick("doctor")
    assert result.code == 1 and "UL4401" in result.out and "UL3002" in result.out


# --- what is in a file -----------------------------------------------------------------------------------

DAY = 86400 * 1_000_000
NOW = 1000 * DAY


def file_facts(**changes: Any) -> embedded.FileFacts:
    """A file in good order."""
    good = embedded.FileFacts(
        path="/events.db", now=NOW, free=100_000_000_000, wal=16_000_000, newest=NOW - 1, per_day=1_000_000.0, log_here=True,
        held=[], living=frozenset({"billing"}), registered=[embedded.Registered("p", 7, "here", "boot", True)],
        here=("here", "boot"), others={}, libraries={},
    )  # fmt: skip
    return msgspec.structs.replace(good, **changes)


def held(**changes: Any) -> embedded.Held:
    return embedded.Held("billing", "order", 3, 17, 5, NOW - 3 * DAY, 86400, False)._replace(**changes)


def of_file(code: str, severity: str, text: str = "", **changes: Any) -> Finding:
    found = [f for f in embedded.check_file(file_facts(**changes)) if f.code == code and f.severity == severity]
    assert len(found) == 1 and text in found[0].what + found[0].evidence, embedded.check_file(file_facts(**changes))
    assert found[0].fix or severity == "ok"
    return found[0]


def test_a_good_file_is_in_order_and_every_check_says_so() -> None:
    found = embedded.check_file(file_facts())
    assert {f.severity for f in found} == {"ok"}
    assert [f.code for f in found] == ["UL4503", "UL1460", "UL1461", "UL4006", "UL4408", "UL4301", "UL4304"]


def test_growth() -> None:
    of_file("UL4503", "ok", "1.0 MB a day")
    of_file("UL4503", "warning", "20 days", per_day=5e9)
    of_file("UL4503", "error", "2 days", per_day=5e10)
    of_file("UL4503", "ok", "cannot be said yet", per_day=None)
    assert not [f for f in embedded.check_file(file_facts(log_here=False)) if f.code == "UL4503"]


def test_the_wal_and_who_holds_it() -> None:
    of_file("UL1460", "warning", "100.0 MB; open in pid 9 (sqlite3)", wal=100_000_000, others={9: "sqlite3"})
    of_file("UL1460", "note", "pid 9 (sqlite3)", others={9: "sqlite3"})
    of_file("UL1461", "note", "_sqlite3.so", libraries={7: ["/lib/_sqlite3.so"]})


def test_a_clock_that_was_set_back() -> None:
    of_file("UL4006", "ok", newest=NOW + 4_000_000)  # what clocks differ by
    of_file("UL4006", "warning", "3,600 s ahead", newest=NOW + 3_600_000_000)


def test_another_machine() -> None:
    there = embedded.Registered("q", 8, "there", "other", True)
    of_file("UL4408", "error", "pid 8 on there", registered=[there])
    of_file("UL4408", "warning", "pid 8 on there", registered=[there._replace(alive=False)])
    of_file("UL4408", "ok", registered=[there._replace(boot="boot")])  # a container beside this one
    of_file("UL4408", "ok", registered=[there._replace(host="here")])  # before this machine was restarted


def test_who_holds_trimming_back() -> None:
    assert "more processes" in of_file("UL4301", "warning", "order/3:17 came 3.0 days ago", held=[held()]).fix
    assert "unlost run --service billing" in of_file("UL4301", "warning", held=[held()], living=frozenset()).fix
    assert "unlost dead list" in of_file("UL4301", "warning", held=[held(on_shelf=True)]).fix
    of_file("UL4301", "ok", held=[held(recorded=NOW - DAY // 2)])
    of_file("UL4301", "ok", held=[held(retention=None)])


def test_a_silent_service() -> None:
    of_file(
        "UL4304", "note", "12 events, the oldest of 1972-", held=[held(waits=7), held(partition=4)], living=frozenset()
    )
    of_file("UL4304", "ok", held=[held()])
    of_file("UL4304", "ok", held=[held(on_shelf=True)], living=frozenset())


def event_of(n: int) -> Envelope:
    return Envelope(
        id=f"e{n}", source="shop", type="T", time="2026-01-01T00:00:00Z", topic="order", key=b"k", data=b"x" * 900
    )


class Late(World):
    """A clock that can be set."""

    at = NOW

    def now(self) -> int:
        return self.at


def test_what_is_read_of_a_real_file(tmp_path: Path) -> None:
    """Ten days of events, a service that is behind, a clock that is set back, another program."""
    world = Late()
    path = tmp_path / "events.db"
    file = File(path, world=world)
    asyncio.run(EmbeddedBroker(file).declare([Topic("order", partitions=1)]))
    for day in range(10):
        world.at = NOW + day * DAY
        file.write_sync(lambda tx, day=day: tx.append([event_of(day * 100 + n) for n in range(100)]))  # type: ignore[misc]
    file.write_sync(
        lambda tx: (
            tx.execute(
                "insert into unlost_progress (service, topic, partition, topic_id, start, start_digest, position, fated, counts, digest) "
                "values ('billing', 'order', 0, 'id', 0, 0, 850, x'', '{}', 0)"
            )
            and None
        )
    )
    world.at = NOW + 10 * DAY
    found = embedded.gather(file, embedded.registered(path))
    assert found.per_day is not None and 100 * 900 < found.per_day < 130 * 1100  # 100 events of 1 KB a day
    assert [(h.service, h.position, h.waits, h.recorded) for h in found.held] == [("billing", 850, 150, NOW + 8 * DAY)]
    assert found.newest == NOW + 9 * DAY and found.living == frozenset() and found.log_here
    assert [(r.pid, r.alive) for r in found.registered] == [(os.getpid(), True)]
    red(embedded.check_file(found), "UL4304", "note", "150 events")
    world.at = NOW + 8 * DAY
    red(embedded.check_file(embedded.gather(file, [])), "UL4006", "warning", "86,400 s ahead")
    file.write_sync(lambda tx: tx.execute("update unlost_topic set retention = 3600") and None)
    world.at = NOW + 12 * DAY
    late = embedded.gather(file, embedded.registered(path))
    red(embedded.check_file(late), "UL4301", "warning", "4.0 days ago")
    assert late.per_day is None  # a retention bounds it
    other = "import sys; f = open(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    reader = subprocess.Popen([sys.executable, "-c", other, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert reader.stdout is not None and reader.stdout.readline() == b"open\n"
        assert reader.pid in embedded.gather(file, []).others
    finally:
        reader.communicate()
    assert embedded.gather(file, []).others == {}
    file.close()


def test_a_second_library_is_seen(tmp_path: Path) -> None:
    """In a process of its own: this one may have loaded it or not."""
    code = (
        "import os, sqlite3, pathlib; from unlost.brokers.embedded.doctor import _libraries; "
        "found = _libraries(os.getpid()); print(found); assert found and all('apsw' not in f for f in found)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done
    none = "import os, apsw; from unlost.brokers.embedded.doctor import _libraries; print(_libraries(os.getpid()))"
    assert subprocess.run([sys.executable, "-c", none], capture_output=True, text=True, check=True).stdout == "[]\n"
    path = tmp_path / "events.db"
    service = (
        "import sqlite3, sys; from pathlib import Path; from unlost.sqlite.file import File; file = File(Path(sys.argv[1])); "
        "print('open', flush=True); sys.stdin.read(); file.close()"
    )
    running = subprocess.Popen([sys.executable, "-c", service, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert running.stdout is not None and running.stdout.readline() == b"open\n"
        before = embedded.registered(path)
        file = File(path)
        found = embedded.gather(file, before)
        file.close()
    finally:
        running.communicate()
    assert list(found.libraries) == [running.pid] and found.others == {}
    red(embedded.check_file(found), "UL4408", "ok")


def test_processes_of_another_machine_in_a_real_file(tmp_path: Path) -> None:
    """They are read before opening strikes them off."""
    path = tmp_path / "events.db"
    file = File(path)
    file.write_sync(
        lambda tx: tx.execute("insert into unlost_process values ('q', 9, 77, 'there', 'boot', 0)") and None
    )
    file.close()
    shell = Shell(tmp_path)
    result = shell.quick("doctor", "--broker", f"embedded://{path}")
    assert "UL4408" in result.out and "pid 77 on there" in result.out, result
    assert "UL4408" not in shell.quick("doctor", "--broker", f"embedded://{path}").out


def test_a_store_beside_kafka_with_rows_and_no_relay(tmp_path: Path) -> None:
    """What its tables say, through the same reader that the doctor has."""
    file = File(tmp_path / "store.db")
    file.write_sync(lambda tx: tx.execute("insert into unlost_meta values ('broker', 'kafka c')") and None)
    file.write_sync(
        lambda tx: tx.execute("insert into unlost_outbox (topic, head, added) values ('order', x'00', 0)") and None
    )
    store = ops.read_store(FileRecords(file))
    assert store.unsent == 1 and not store.relay
    red(ops.check_store(store, seen(), file.world.now()), "UL4409", "error", "no process sends them")
    assert not embedded.gather(file, []).log_here
    file.close()


# --- every check -----------------------------------------------------------------------------------------


def test_every_check_has_been_seen_red() -> None:
    here = Path(__file__)
    others = ("kafka/test_doctor.py", "postgres/test_ops_postgres.py")
    text = here.read_text() + "".join((here.parent.parent / other).read_text() for other in others)
    seen_red = set(re.findall(r'red\([^\n]*"(UL4\d{3})", "(?:error|warning|note)"', text))
    assert seen_red >= set(CHECKS) - {"UL4510"}, sorted(set(CHECKS) - seen_red)


def test_every_code_in_the_source_is_listed() -> None:
    source = Path(embedded.__file__).parents[2]
    used = {code for path in source.rglob("*.py") for code in re.findall(r'"(UL4\d{3})"', path.read_text())}
    assert used == set(CHECKS)
