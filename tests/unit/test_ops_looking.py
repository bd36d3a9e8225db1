"""The operators' functions behind the command line: tail, status, settings, publish from text."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from enum import Enum
from pathlib import Path

import pytest

from unlost import Event, Sensitive, UsageError
from unlost.brokers.embedded.log import EmbeddedLog
from unlost.events import Envelope, seal
from unlost.events.topic import Topic
from unlost.ops.publish import build, event_classes, find_class, read_line, shown_data, split_fields
from unlost.ops.settings import hide_secrets
from unlost.ops.status import status, topics
from unlost.ops.tail import BATCH, Tail, moment
from unlost.sqlite.file import File
from unlost.store.records import FileRecords
from unlost.world import REAL


class Color(Enum):
    RED = "red"


class ThingMade(Event, key="thing_id", topic="ops-thing"):
    thing_id: str
    n: int = 0
    price: float = 0.0
    color: Color = Color.RED
    when: datetime | None = None
    parts: dict[str, list[int]] = {}  # noqa: RUF012
    note: str | None = None
    good: bool = True
    secret: Sensitive[int] = 0


class Renamed(Event, key="a_b", topic="ops-renamed", rename="camel"):
    a_b: str
    c_d: Sensitive[str]


@pytest.fixture
def file(tmp_path: Path) -> Iterator[File]:
    file = File(tmp_path / "events.db")
    yield file
    file.close()


def envelope(n: int, key: str = "k", topic: str | None = None) -> Envelope:
    return seal(ThingMade(thing_id=key, n=n), source="test", id=f"e{n}", topic=topic, now=REAL.now())


def put(file: File, *envelopes: Envelope) -> None:
    file.write_sync(lambda tx: tx.append(envelopes))


def ids(found: object) -> list[str]:
    return [a.envelope.id for _, a in found]  # type: ignore[attr-defined]


def test_last_is_exact_over_batches_and_partitions(file: File) -> None:
    many = BATCH * 3 + 7
    for start in range(0, many, 100):
        put(file, *(envelope(n, f"k{n % 7}") for n in range(start, min(many, start + 100))))
    everything = ids(Tail(EmbeddedLog(file)).since(0))
    assert sorted(everything) == sorted(f"e{n}" for n in range(many))
    for count in (0, 1, 5, BATCH, BATCH + 1, many, many + 10):
        found = ids(Tail(EmbeddedLog(file)).last(count))
        assert len(found) == min(count, many)
        assert set(found) == {f"e{n}" for n in range(many)} if count >= many else set(found) <= set(everything)
        of_key = [int(i[1:]) for i in ids(Tail(EmbeddedLog(file), key="k3").last(count))]
        assert of_key == [n for n in range(many) if n % 7 == 3][-count:] if count else of_key == []


def test_a_rare_type_is_found_far_back(file: File) -> None:
    put(file, seal(Renamed(a_b="k", c_d="x"), source="test", id="rare", topic="ops-thing", now=REAL.now()))
    put(file, *(envelope(n) for n in range(BATCH * 2)))
    assert ids(Tail(EmbeddedLog(file), type="Renamed").last(3)) == ["rare"]
    assert ids(Tail(EmbeddedLog(file), type="ops-renamed.Renamed").since(0)) == ["rare"]
    assert ids(Tail(EmbeddedLog(file), type="ops-renamed").last(3)) == []


def test_follow_leaves_nothing_out(file: File) -> None:
    """Everything that is written while somebody follows comes once, in order per partition, also of new topics."""
    put(file, *(envelope(n) for n in range(10)))
    tail = Tail(EmbeddedLog(file))
    before = ids(tail.last(100))

    def write() -> None:
        for n in range(10, 400):
            put(file, envelope(n, f"k{n % 3}", "ops-thing" if n % 4 else "ops-new"))

    writer = threading.Thread(target=write)
    writer.start()
    seen: list[str] = []
    for _, arrival in tail.follow():
        assert arrival.envelope is not None
        seen.append(arrival.envelope.id)
        if len(seen) == 390:
            break
    writer.join()
    assert len(before) == 10
    assert sorted(before + seen) == sorted(f"e{n}" for n in range(400))
    for key in range(3):
        for new in (True, False):
            own = [n for n in (int(i[1:]) for i in seen) if n % 3 == key and (n % 4 == 0) is new]
            assert own == sorted(own)


def test_the_log_answers_where_and_when(file: File) -> None:
    log = EmbeddedLog(file)
    assert (log.names(), log.topics(), dict(log.ends([("none", 0)])), log.at("none", 0, 0)) == ([], [], {}, 0)
    put(file, *(envelope(n, "a") for n in range(5)))
    between = REAL.now()
    put(file, *(envelope(n, "a") for n in range(5, 9)))
    (info,) = log.topics(["ops-thing", "none"])
    place = ("ops-thing", next(p for p, (_, end) in enumerate(info.ranges) if end))
    assert log.names() == ["ops-thing"] and log.ends([place, ("ops-thing", 99)]) == {place: 9}
    assert [log.at(*place, t) for t in (0, between, REAL.now() + 1)] == [0, 5, 9]
    assert [a.position for a in log.read(*place, 3, 2)] == [3, 4] and log.read("none", 0, 0, 9) == []
    first, last = log.spans([info])["ops-thing"]
    assert log.recorded({place: 0}) == {place: first} and log.recorded({place: 8}) == {place: last}
    assert log.recorded({place: 9, ("none", 0): 0}) == {} and first <= between <= last
    assert list(log.holes(*place)) == [] and log.ledger() is None and log.verify(10) == []
    file.write_sync(lambda tx: tx.execute("delete from unlost_log where at % 1024 in (2, 3)").fetchall())
    assert list(log.holes(*place)) == [(2, 4)]


def test_a_look_inside_a_look_sees_the_same_moment(file: File) -> None:
    log = EmbeddedLog(file)

    def work() -> tuple[list[str], list[str]]:
        before = list(log.names())
        put(file, envelope(1))
        return before, list(log.names())

    assert log.together(work) == ([], [])
    assert log.names() == ["ops-thing"]


def test_topics_and_status(file: File) -> None:
    assert status(FileRecords(file)).services == [] and topics(FileRecords(file)) == []
    file.write_sync(lambda tx: tx.create_topic("empty", 2, 60))
    put(file, *(envelope(n, f"k{n}") for n in range(20)))
    found = {t.name: t for t in topics(FileRecords(file))}
    assert (found["empty"].events, found["empty"].oldest, found["empty"].retention) == (0, None, 60)
    assert found["ops-thing"].events == 20 and found["ops-thing"].partitions == Topic("x").partitions
    assert status(FileRecords(file)).bytes > 0


@pytest.mark.parametrize(
    "text", ["", "then", "-5m", "5 parsecs", "2026-13-01", "10000000000000000000d", "9" * 400, "nan"]
)
def test_no_time(text: str) -> None:
    with pytest.raises(UsageError):
        moment(text)


def test_times() -> None:
    assert moment("start") == 0
    assert moment("2020-01-01T00:00:00Z") == moment("2020-01-01T01:00:00+01:00") == 1_577_836_800_000_000
    local = datetime(2020, 1, 1).astimezone(UTC)
    assert moment("2020-01-01") == int(local.timestamp() * 1e6)
    assert abs(REAL.now() - timedelta(minutes=10) / timedelta(microseconds=1) - moment("10m")) < 5e6


def test_fields_from_text() -> None:
    texts = [
        "thing_id=5", "n=7", "price=1.5", "color=red", "when=2020-01-01T00:00:00Z", 'parts={"a": [1]}', "note=null",
        "good=false", "secret=3",
    ]  # fmt: skip
    fields, id = split_fields(ThingMade, [*texts, "id=one"])
    assert id == "one"
    made = build(ThingMade, fields)
    assert made == ThingMade(
        thing_id="5", n=7, price=1.5, color=Color.RED, when=datetime(2020, 1, 1, tzinfo=UTC), parts={"a": [1]},
        note=made.note, good=False, secret=3,  # type: ignore[attr-defined]
    )  # fmt: skip
    assert made.note in (None, "null")  # type: ignore[attr-defined]
    assert build(Renamed, {"aB": "x", "c_d": "y"}) == Renamed(a_b="x", c_d="y")


@pytest.mark.parametrize(
    "text", ["n=x", "n=1.5", "color=blue", "when=noon", "parts=[]", 'parts={"a": 1}', "good=perhaps", "secret=s3cret"]
)
def test_text_of_a_wrong_type(text: str) -> None:
    with pytest.raises(UsageError) as e:
        build(ThingMade, split_fields(ThingMade, ["thing_id=1", text])[0])
    assert e.value.code == "UL1326" and "s3cret" not in str(e.value)


def test_classes_by_name() -> None:
    assert ThingMade in event_classes() and Event not in event_classes()
    assert find_class("ThingMade") is find_class("ops-thing.ThingMade") is ThingMade
    with pytest.raises(UsageError, match="did you mean ThingMade"):
        find_class("ThingMad")


@pytest.mark.parametrize(
    "line",
    [b"", b"1", b"{", b"\xff", b"[" * 100_000, b'{"type": "ThingMade"}', b'{"type": 1, "data": {}}', b'{"data": {}}',
     b'{"type": "ThingMade", "data": {"thing_id": "1", "secret": "s3cret"}}', b'{"type": "ThingMade", "data": "s3cret"}',
     b'{"type": "ThingMade", "data": {"thing_id": "1"}, "id": ""}', b'{"type": "ThingMade", "data": {"thing_id": ""}}',
     b'{"type": "ThingMade", "data": {"thing_id": "1"}, "time": "9999999999"}'],
)  # fmt: skip
def test_lines_that_are_no_events(line: bytes) -> None:
    with pytest.raises(UsageError) as e:
        read_line(line, None, source="test", now=REAL.now())
    assert "s3cret" not in str(e.value)


def test_data_are_shown_as_far_as_classes_allow() -> None:
    class Part(Event, view_of="ops-thing.ThingMade"):
        n: Sensitive[int] = 0

    sealed = seal(ThingMade(thing_id="x", n=5, secret=7), source="test", now=REAL.now())
    shown = shown_data(sealed)
    assert shown is not None
    assert (shown["thing_id"], shown["n"], shown["secret"]) == ("x", "***", "***")
    assert shown_data(seal(Renamed(a_b="1", c_d="2"), source="test", now=REAL.now())) == {"aB": "1", "cD": "***"}
    foreign = type(sealed)(id="1", source="s", type="never.Seen", time=sealed.time, topic="t", key=None, data=b"{}")
    assert shown_data(foreign) is None
    del Part


@pytest.mark.parametrize(
    ("url", "hidden"),
    [
        ("embedded:///a/b.db", "embedded:///a/b.db"),
        ("kafka://ann:s3cret@h:9092/?sasl_password=s3cret&x=1", "kafka://ann:***@h:9092/?sasl_password=***&x=1"),
        ("amqp://ann:s3c@cret@h/", "amqp://ann:***@h/"),
        ("redis://:s3cret@h/", "redis://:***@h/"),
        ("amqp://h/?Token=s3cret", "amqp://h/?Token=***"),
        ("postgresql://ann:s3cret@h1:5432,h2:5433/db", "postgresql://ann:***@h1:5432,h2:5433/db"),
        ("postgresql:///db?host=/x&password=s3cret&user=a", "postgresql:///db?host=/x&password=***&user=a"),
        ("host=h password='s3 cret\\'s' dbname=x", "host=h password=*** dbname=x"),
        ("password = s3cret host=h", "password = *** host=h"),
    ],
)
def test_secrets_are_hidden(url: str, hidden: str) -> None:
    assert hide_secrets(url) == hidden
