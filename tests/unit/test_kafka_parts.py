"""What of the Kafka adapter is pure: URLs, notes, layouts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlost.brokers.kafka.settings import OURS, parse
from unlost.delivery import note
from unlost.errors import Undecodable, UsageError
from unlost.events import Envelope, event_hash, from_headers, to_headers
from unlost.events.codec import peek, read_peeked
from unlost.events.topic import Unit
from unlost.store.port import Snapshot
from unlost.store.progress import Progress, Runs

# --- URLs ----------------------------------------------------------------------------------------------------


def test_what_a_url_means() -> None:
    s = parse("kafka://ann:s3cret@one:9093,two,[::1]:9000/?prefix=staging.&sasl.mechanism=SCRAM-SHA-256&linger.ms=5")
    assert s.bootstrap == "one:9093,two:9092,[::1]:9000"
    assert s.prefix == "staging." and not s.consumer_protocol
    client = s.client()
    assert (client["sasl.username"], client["sasl.password"], client["security.protocol"]) == (
        "ann",
        "s3cret",
        "SASL_SSL",
    )
    assert "linger.ms" not in client and s.producer()["linger.ms"] == "5" and "linger.ms" not in s.consumer("g")
    assert "s3cret" not in repr(s)
    assert parse("kafka://h?group.protocol=consumer").consumer("g")["group.protocol"] == "consumer"
    assert "session.timeout.ms" not in parse("kafka://h?group.protocol=consumer").consumer("g")


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("kafka:", "UL1142"), ("kafka://", "UL1142"), ("kafka://h:no", "UL1142"), ("kafka://h/topic", "UL1142"),
        ("kafka://h?transactional.id=x", "UL1143"), ("kafka://h?group.id=x", "UL1143"), ("kafka://h?acks=1", "UL1143"),
        ("kafka://h?request.required.acks=0", "UL1143"), ("kafka://h?delivery.timeout.ms=5", "UL1143"),
        ("kafka://h?group.protocol=other", "UL1144"), ("kafka://h?group.protocol=consumer&session.timeout.ms=1", "UL1144"),
        ("kafka://h?prefix=no good", "UL"),
    ],
)  # fmt: skip
def test_urls_that_are_refused(url: str, code: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(url)
    assert caught.value.code.startswith(code)


def test_each_promise_has_its_setting() -> None:
    """A setting that is refused in the URL must also be given, or be the client's own default."""
    given = parse("kafka://h").producer() | parse("kafka://h").consumer("g")
    for name, value in OURS.items():
        if name != "enable.gapless.guarantee":
            assert given[name] == value, name
        with pytest.raises(UsageError):
            parse(f"kafka://h?{name}=nothing-of-that-kind")


# --- notes ---------------------------------------------------------------------------------------------------


def snapshot(position: int, done: list[tuple[int, int]], counts: dict[str, int] | None = None) -> Snapshot:
    return Snapshot(
        unit=Unit("billing", "order", 0), topic_id="T" * 22, partitions=8, position=position,
        fated=Runs([(0, position), *done]) if position else Runs(done), counts=counts or {"done": 7}, digest=-(2**63),
    )  # fmt: skip


@given(st.integers(1, 2**40), st.lists(st.tuples(st.integers(1, 500), st.integers(1, 500)), max_size=60))
def test_a_note_comes_back(position: int, steps: list[tuple[int, int]]) -> None:
    done, at = [], position
    for gap, length in steps:
        done.append((at + gap, at + gap + length))
        at += gap + length
    text, share = note.encode("store", snapshot(position, done))
    found = note.decode(text)
    assert found is not None and (found.store, found.position, found.partitions) == ("store", position, 8)
    assert share <= 1 and list(found.done_above()) == done
    assert len(text) == round(share * note.NOTE_MAX)


def test_a_done_set_that_does_not_fit_is_left_out() -> None:
    """Never a note that the cluster would refuse, and never one that claims more than is done."""
    import random

    chance = random.Random(5)
    done, at = [], 100
    for _ in range(4000):
        start = at + chance.randrange(1, 300)
        at = start + chance.randrange(1, 300)
        done.append((start, at))
    shares = []
    for count in (10, 400, 900, 4000):
        text, share = note.encode("store", snapshot(100, done[:count], {f"skipped:rule {i}": i for i in range(200)}))
        found = note.decode(text)
        assert len(text) <= note.NOTE_MAX and found is not None and found.position == 100
        assert (found.done is None) == (share > 1)
        assert sum(found.counts.values()) == sum(range(200))
        shares.append(share)
    assert shares == sorted(shares) and shares[0] < note.NARROW < shares[-1] and shares[-1] > 1


@pytest.mark.parametrize("text", ["", "hello", "u1", "u1!!!", "u1AAAA", "u1" + "A" * 4000, "u2AAAA", "u1é"])
def test_notes_of_others_are_no_notes(text: str) -> None:
    assert note.decode(text) is None


# --- layouts -------------------------------------------------------------------------------------------------

NAMES = ["ce_specversion", "ce_id", "ce_source", "ce_type", "ce_time", "content-type", "ce_subject", "ce_unlostversion",
         "ce_correlationid", "ce_datacontenttype", "CE_ID", "ce_region", "campaign", "Content-Type", "ce_traceparent"]  # fmt: skip
GOOD = {"ce_specversion": b"1.0", "ce_id": b"1", "ce_source": b"shop", "ce_type": b"order.Placed",
        "ce_time": b"2026-11-25T18:03:30.926000Z"}  # fmt: skip
VALUES = st.one_of(
    st.sampled_from(
        [b"1.0", b"", None, b"2", b"0", b"application/json", b"Application/CloudEvents+json", b"text/plain",
         b"2026-11-25T18:03:30.926000Z", b"2026-13-25T18:03:30.926000Z", b"2026-11-25T18:03:30.92600xZ", b"a\x07b",
         "ü".encode(), b"\xff", b"99999999999", b"plain"]
    ),
    st.binary(max_size=8),
)  # fmt: skip


@settings(max_examples=1500)
@given(
    st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=8), st.booleans(), st.permutations(range(12)),
    st.one_of(st.none(), st.binary(max_size=20)),
)  # fmt: skip
def test_the_short_way_makes_the_same_envelope(
    more: dict[str, bytes | None], whole: bool, order: list[int], data: bytes | None
) -> None:
    """Whatever `peek` vouches for is what the careful reader makes of it; what that one refuses is never vouched for."""
    headers = list(((GOOD if whole else {}) | more).items())
    headers = [headers[i] for i in order if i < len(headers)]
    found = peek(headers)
    time = "2026-01-01T00:00:00.000000Z"
    try:
        careful = from_headers(headers, data, topic="order", key=b"k", time=time)
    except Undecodable:
        assert found is None
        return
    if found is None:
        return
    type, digest, simple, values, layout = found
    quick = read_peeked(values, layout, data, topic="order", key=b"k", recordedtime=time)
    assert (type, digest) == (careful.type, event_hash(careful.source, careful.id))
    assert quick == Envelope(**{f: getattr(careful, f) for f in Envelope.__struct_fields__} | {"recordedtime": time})
    assert not simple or (quick.eventversion == 1 and quick.datacontenttype == "application/json")


def test_our_own_events_go_the_short_way() -> None:
    envelope = Envelope(
        id="1", source="shop", type="order.Placed", time="2026-11-25T18:03:30.926000Z", topic="order", key=b"k",
        data=b"{}", subject="k", eventversion=3, headers={"campaign": "x"}, traceparent="00-a-b-01",
    )  # fmt: skip
    headers, data = to_headers(envelope)
    found = peek(headers)
    assert found is not None and not found[2]
    assert read_peeked(*found[3:], data, topic="order", key=b"k", recordedtime="t").headers == {"campaign": "x"}


# --- progress ------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 60), unique=True), st.lists(st.lists(st.integers(0, 60), unique=True), max_size=4))
def test_many_positions_are_one_by_one(first: list[int], batches: list[list[int]]) -> None:
    quick, slow = Runs(), Runs()
    for position in first:
        quick.add(position)
        slow.add(position)
    for batch in batches:
        fresh = sum(slow.add(position) for position in batch)
        assert quick.add_many(list(batch)) == fresh
        assert quick == slow and len(quick) == len(slow)


@given(
    st.lists(st.integers(0, 40), unique=True), st.lists(st.tuples(st.integers(0, 40), st.integers(0, 15)), max_size=4)
)
def test_ranges_are_one_by_one(first: list[int], ranges: list[tuple[int, int]]) -> None:
    quick, slow = Runs(), Runs()
    for position in first:
        quick.add(position)
        slow.add(position)
    for start, length in ranges:
        assert quick.add_range(start, start + length) == sum(slow.add(p) for p in range(start, start + length))
        assert quick == slow


def test_what_is_passed_over_is_only_what_had_no_outcome() -> None:
    progress = Progress(2, Runs([(0, 2), (4, 5)]), {}, 0)
    assert progress.pass_over(0, 8) == [(2, 4), (5, 8)]
    assert (progress.position, list(progress.fated)) == (8, [(0, 8)])
    assert progress.pass_over(3, 8) == []
