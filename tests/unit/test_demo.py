"""The parts of the demo: the orders, the shop's decisions, the verdict, the folder, the table."""

from __future__ import annotations

import csv
import gzip
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pytest

import unlost.demo
from unlost import App, UsageError
from unlost.audit import Book, Books, Missing
from unlost.demo import mail, run
from unlost.demo.broker import place
from unlost.demo.folder import broker_path, prepare
from unlost.demo.orders import Order, as_they_came, per_day, read_orders
from unlost.demo.service import Notebook, read_notes
from unlost.demo.shop import CARD_LIMIT_CENTS, OrderCreated, PaymentCompleted, PaymentDeclined, app
from unlost.demo.verdict import Verdict, compare
from unlost.ops.books import Named
from unlost.ops.table import books_table, missing_lines, safe
from unlost.store.records import FileRecords
from unlost.testing import running

DATA = Path(unlost.demo.__file__).parent / "data"


# --- the orders ----------------------------------------------------------------------------------------------


def test_the_orders_are_those_of_the_file() -> None:
    with gzip.open(DATA / "cdnow-orders.csv.gz", "rt") as file:
        lines = list(csv.DictReader(file))
    orders = read_orders()
    assert len(orders) == len(lines)
    assert sum(order.cents for order in orders) == sum(Decimal(line["dollars"]) for line in lines) * 100
    assert Counter(order.customer_id for order in orders) == Counter(line["customer_id"] for line in lines)
    assert max(order.cents for order in orders) < CARD_LIMIT_CENTS


def test_an_order_id_is_the_place_of_its_line() -> None:
    orders = read_orders(20)
    assert [order.id for order in orders][:2] == ["order-00001", "order-00002"]
    assert len(orders) == 20
    assert orders[16].placed().id == "order-00017-placed"
    assert orders[16].placed().occurred_at.date() == orders[16].day


def test_as_they_came_keeps_each_customers_own_order() -> None:
    came = as_they_came(read_orders(5000))
    assert [order.day for order in came] == sorted(order.day for order in came)
    latest: dict[str, int] = {}
    for order in came:
        assert order.number > latest.get(order.customer_id, 0)
        latest[order.customer_id] = order.number


# --- the shop ------------------------------------------------------------------------------------------------


async def test_an_order_above_the_limit_is_declined_and_one_of_nothing_is_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mail._letterbox.cache_clear()
    day = read_orders(1)[0].day
    cents = {"free": 0, "usual": 1177, "huge": CARD_LIMIT_CENTS + 1}
    async with running(app) as t:
        for id, amount in cents.items():
            await t.publish(OrderCreated(customer_id="c", order_id=id, ordered_on=day, total_cents=amount))
        await t.settled()
        assert [e.order_id for e in t.published(PaymentCompleted)] == ["usual"]
        assert [e.order_id for e in t.published(PaymentDeclined)] == ["huge"]
        assert [letter.error for letter in t.dead_letters()] == ["an order of 0.00 cannot be paid"]
        assert [row[1:] for row in t.db("select * from settlement")] == [(1177, 1)]
    assert [line.split()[1:] for line in (tmp_path / "letters.txt").read_text().splitlines()] == [["usual", "11.77"]]


# --- the verdict ---------------------------------------------------------------------------------------------

ORDERS = [order for order in read_orders(60) if order.customer_id == "00003"][:3]


async def _verdict(folder: Path, settled: list[Order], letters: list[Order]) -> Verdict:
    web = App(name="web", broker=f"embedded://{folder}/events.db", schema=Path(run.__file__).with_name("schema.sql"))
    (folder / "letters.txt").write_text("".join(f"key-{order.id} {order.id} 1.00\n" for order in letters))
    async with web:
        for order in settled:
            day = order.day.isoformat()
            await web.file.write(
                lambda tx, order=order, day=day: tx.execute(  # type: ignore[misc]
                    "insert into settlement values (?, ?, 1) on conflict do update set cents = cents + excluded.cents, "
                    "orders = orders + 1",
                    (day, order.cents),
                ).fetchall()
            )
            await web.file.write(
                lambda tx, order=order, day=day: tx.execute(  # type: ignore[misc]
                    "insert into settled_order (order_id, customer_id, day, cents, number) "
                    "select ?, ?, ?, ?, coalesce(max(number), 0) + 1 from settled_order where customer_id = ?",
                    (order.id, order.customer_id, day, order.cents, order.customer_id),
                ).fetchall()
            )
        return compare(ORDERS, FileRecords(web.file), folder / "letters.txt", {})


async def test_the_verdict_agrees_only_with_the_whole_truth(tmp_path: Path) -> None:
    one, two, three = ORDERS
    folders = iter(range(100))

    async def verdict(settled: list[Order], letters: list[Order] = ORDERS) -> Verdict:
        folder = tmp_path / str(next(folders))
        folder.mkdir()
        return await _verdict(folder, settled, letters)

    assert len(per_day(ORDERS)) >= 2
    good = await verdict(ORDERS)
    assert good.agrees
    assert good.days == good.days_agreeing == len(per_day(ORDERS))

    lost = await verdict([one, three])
    assert not lost.agrees
    assert lost.unsettled == [two.id]
    assert lost.days_agreeing < lost.days

    doubled = await verdict([one, two, two, three])
    assert not doubled.agrees
    assert doubled.settled_twice == [two.id]

    turned = await verdict([two, one, three])
    assert not turned.agrees
    assert turned.inversions == 1
    assert turned.settled_cents == turned.in_file_cents

    foreign = await verdict([*ORDERS, three._replace(number=999)])
    assert not foreign.agrees
    assert foreign.foreign == ["order-00999"]

    unsent = await verdict(ORDERS, [one, two])
    assert not unsent.agrees
    assert unsent.unsent == [three.id]

    twice = await verdict(ORDERS, [*ORDERS, one])
    assert twice.agrees, "a receipt may go out twice: that is what at-least-once says"
    assert twice.letters_twice == 1


def test_what_came_again_is_counted_across_processes_only(tmp_path: Path) -> None:
    first, second = Counter({(0, 1): 1, (0, 2): 1}), Counter({(0, 2): 1, (0, 3): 2})
    verdict = compare([], _NoFile(), tmp_path / "none", {"payment": [first, second]})  # type: ignore[arg-type]
    assert (verdict.delivered_again, verdict.tried_again) == (1, 1)


class _NoFile:
    """Nothing was settled, nothing is on the shelf."""

    def read(self, work: object) -> object:
        return ({}, []) if getattr(work, "__name__", "") == "_read_tables" else []


def test_a_line_that_was_cut_off_is_no_line(tmp_path: Path) -> None:
    notebook = Notebook(tmp_path, "payment", 1)
    assert read_notes(tmp_path / "payment-2.notes") == Counter()
    path = tmp_path / "payment-1.notes"
    path.write_bytes(bytes(12) + b"torn")
    assert read_notes(path) == Counter({(0, 0): 1})
    del notebook


# --- the folder ----------------------------------------------------------------------------------------------


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "unlost-demo"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError) as refused:
        prepare(folder)
    assert refused.value.code == "UL1390"
    assert (folder / "thesis.txt").read_text() == "years of work"
    assert sorted(path.name for path in folder.iterdir()) == ["thesis.txt"]


def test_an_earlier_demo_makes_place_and_nothing_else_does(tmp_path: Path) -> None:
    folder = tmp_path / "unlost-demo"
    assert prepare(folder) is False
    broker_path(folder).parent.mkdir()
    broker_path(folder).write_text("old")
    (folder / "mine.txt").write_text("kept")
    assert prepare(folder) is True
    assert not broker_path(folder).exists()
    assert (folder / "mine.txt").read_text() == "kept"


async def test_a_folder_where_processes_are_at_work_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "unlost-demo"
    prepare(folder)
    async with App(broker=f"embedded://{broker_path(folder)}"):
        with pytest.raises(UsageError) as refused:
            prepare(folder)
    assert refused.value.code == "UL1392"
    assert broker_path(folder).exists()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [({"orders": "none"}, "UL1394"), ({"orders": "0"}, "UL1394"), ({"kills": -1}, "UL1393"), ({"break_": "no-such"}, "UL1395"), ({"break_": "release-drops"}, "UL1397")],
)  # fmt: skip
def test_bad_arguments_are_refused_before_anything_is_made(
    arguments: dict[str, object], code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(folder=tmp_path / "demo", **arguments) == 2  # type: ignore[arg-type]
    assert code in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


# --- the broker of a run -------------------------------------------------------------------------------------


def test_a_run_on_kafka_has_names_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNLOST_BROKER", raising=False)
    assert place(tmp_path, None).url == f"embedded://{broker_path(tmp_path)}"
    url = "kafka://ann:s3cret@host:9093?prefix=test.&sasl.mechanism=SCRAM-SHA-256"
    one, two = place(tmp_path, url), place(tmp_path, url)
    assert one.prefix != two.prefix and one.prefix.startswith("test.unlost-demo-") and one.prefix.endswith(".")
    assert f"&prefix={one.prefix}&session.timeout.ms=6000" in one.url and "SCRAM-SHA-256" in one.url
    assert one.has_secrets and "s3cret" not in one.shown
    monkeypatch.setenv("UNLOST_BROKER", "kafka://host")
    assert place(tmp_path, None).on_kafka and not place(tmp_path, None).has_secrets
    monkeypatch.setenv("UNLOST_BROKER", "embedded:///elsewhere/events.db")
    assert place(tmp_path, None).url == f"embedded://{broker_path(tmp_path)}"
    with pytest.raises(UsageError, match="UL1396"):
        place(tmp_path, "embedded:///elsewhere/events.db")


def test_a_bug_without_sense_on_kafka_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(folder=tmp_path / "demo", break_="ack-before-commit", broker="kafka://127.0.0.1:1") == 2
    assert "UL1397" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_a_cluster_that_does_not_answer_makes_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(folder=tmp_path / "demo", broker="kafka://127.0.0.1:1") == 4
    assert "UL2100" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


# --- the table -----------------------------------------------------------------------------------------------


def _books(**book: object) -> Books:
    first = Book(service="payment", accepted=15_000, done=4991, dead=9, skipped={"no handler": 10_000}, **book)  # type: ignore[arg-type]
    second = Book(service="settlement", accepted=4991, done=4991)
    return Books(
        services={"payment": first, "settlement": second}, missing=[], unnamed=0, findings=[], unaccountable=[]
    )


def test_the_table_as_the_readme_shows_it() -> None:
    lines = books_table(_books()).splitlines()
    assert lines[0].split() == ["THE", "BOOKS", "accepted", "done", "dead", "waiting", "in", "flight", "UNACCOUNTED"]
    assert lines[1].split() == ["payment", "5,000", "4,991", "9", "0", "0", "0"]
    assert len({len(line) for line in lines}) == 1
    assert len(lines[0]) <= 80


def test_states_that_somebody_has_get_a_column() -> None:
    assert "parked" not in books_table(_books())
    parked = books_table(_books(parked=3))
    assert "parked" in parked
    everything = books_table(_books(), everything=True)
    assert "skipped (no handler)" in everything
    assert "15,000" in everything
    assert "settlement" not in books_table(_books(), services=["payment"])


def test_a_loss_is_red_and_named() -> None:
    books = _books(unaccounted=12)
    books.missing = [
        Missing(service="payment", topic="shop", partition=0, position=n, why="passed over") for n in range(12)
    ]
    named = [
        Named(
            service="payment", topic="shop", partition=0, position=n, why="passed over", id=f"id-{n}", type="shop.X",
            key="c\x1b[2J", source="web", recorded=0, last_seen="in the hands of payment (pid 7, epoch 1)",
        )
        for n in range(12)
    ]  # fmt: skip
    assert "\x1b[1;31m" in books_table(books, color=True)
    assert "\x1b" not in books_table(books)
    text = "\n".join(missing_lines(books, named, shown=3))
    assert text.startswith("UNACCOUNTED 12\n")
    assert "id-2" in text
    assert "id-3" not in text
    assert "… and 9 more" in text
    assert "in the hands of payment (pid 7, epoch 1)" in text
    assert "\x1b" not in text


def test_text_from_events_cannot_steer_a_terminal() -> None:
    assert safe("ok ✓") == "ok ✓"
    assert safe("a\x1b]0;x\x07\u202e") == "a\\x1b]0;x\\x07\\u202e"
