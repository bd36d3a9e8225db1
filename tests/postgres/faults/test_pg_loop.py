"""The kill loop of the shop on PostgreSQL, and the checker against histories made by hand.

`SECONDS` and `SEED` make a run longer, or repeat a failure: `SECONDS=600 pytest tests/postgres/faults/test_pg_loop.py`. The
seed decides what is done to whom; the machine decides what that hits. A failure leaves the whole history behind.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from pg_checker import COMPLETED, CREATED, PLACED, Counters, Effect, Found, Logged, Ordered, at_most_once, check, kinds
from pg_loop import SERVER, Report, play

from servers.fixtures import require_postgres
from servers.kafka import Kafka
from servers.postgres import Postgres
from unlost.demo.orders import Order

SECONDS = float(os.environ.get("SECONDS", "12"))
LEAST = {"server stopped at once": 1, "server killed": 1, "sessions ended": 3, "answers lost": 1, "zombie": 1}


def loop(folder: Path, least: Mapping[str, int], *, seconds: float = SECONDS, **more: Any) -> Report:
    require_postgres(own=True)
    least = {**least, "at any moment": math.ceil(seconds / 3)}
    with Postgres.start(settings=SERVER, own=True) as postgres:
        report = play(folder / "history", postgres, seconds=seconds, orders=int(seconds * 14), least=least, **more)
    assert report.kills >= seconds / 3, f"too slow: {report}"
    shutil.rmtree(folder / "history")
    return report


def test_nothing_is_lost_doubled_or_out_of_order(tmp_path: Path) -> None:
    """Three processes of all services, a web front in threads and one with an event loop, on the embedded broker."""
    loop(tmp_path, LEAST)


def test_two_machines_on_kafka(kafka: Kafka, fresh_prefix: str, tmp_path: Path) -> None:
    """They share the database and the broker, and no file; now and then one of them is gone as a whole."""
    loop(
        tmp_path, {**LEAST, "a machine at once": 2}, kafka=(kafka.bootstrap, f"{fresh_prefix}."), machines=2,
        options="&session.timeout.ms=1500&heartbeat.interval.ms=300", processes=4,
    )  # fmt: skip


def test_the_loop_can_fail(tmp_path: Path) -> None:
    """Handlers' transactions whose mark comes in a later commit: random kills find it, and the checker names it."""
    with pytest.raises(AssertionError) as caught:
        loop(tmp_path, {}, bug="mark-after-the-block", drain=4.0, seconds=min(SECONDS, 8.0))
    assert "\ndoubled: " in str(caught.value)


# --- the checker: each anomaly, and what must not be taken for one -------------------------------------------------

ORDERS = [Order(n, "c1" if n < 3 else "c2", date(1997, 1, n), 2, 100 * n) for n in (1, 2, 3)]
ONLY = ("order", "payment", "settlement")


def rows() -> list[Ordered]:
    return [Ordered(n, o.id, o.customer_id, o.day.isoformat(), o.cents) for n, o in enumerate(ORDERS)]


def log() -> list[Logged]:
    events = []
    for name in (PLACED, CREATED, COMPLETED):
        for o in ORDERS:
            data = {"order_id": o.id, "customer_id": o.customer_id, "ordered_on": o.day.isoformat()}
            data |= {"total_cents": o.cents, "items": o.items}
            id = f"{o.id}-placed" if name == PLACED else f"{name} {o.id}"
            events.append(Logged("shop", 0, len(events), id, f"shop.{name}", o.customer_id.encode(), data))
    return events


def effects() -> list[Effect]:
    return [
        Effect(n, service, o.id, o.customer_id, o.day.isoformat(), o.cents)
        for n, (service, o) in enumerate((s, o) for s in ("payment", "settlement") for o in ORDERS)
    ]


def found(**other: Any) -> set[str]:
    """What the checker says of a whole history in which these things are otherwise."""
    counters = Counters(
        shards=[(0, 10, 9)], outbox=0, hands=0, waiting=0, marks=dict.fromkeys(ONLY, 3), moved=0, dead=[],
        days={o.day.isoformat(): (o.cents, 1) for o in ORDERS},
    )  # fmt: skip
    figures = {name: other.pop(name) for name in tuple(other) if name in Counters._fields}
    more = {"orders": rows(), "log": log(), "effects": effects(), "counters": counters._replace(**figures)}
    extra = {name: other.pop(name) for name in ("told", "dead_too", "complete") if name in other}
    if "dead_too" in extra:
        extra["dead"] = extra.pop("dead_too")
    return kinds(check(ORDERS, Found(**{**more, **other}), ONLY, **extra))


def test_a_whole_history_has_no_anomaly() -> None:
    assert found() == set()
    assert found(log=[*log(), *log()]) == set()  # sent again


def test_a_row_without_its_event() -> None:
    assert found(log=[e for e in log() if e.data["order_id"] != ORDERS[1].id]) == {"zombie", "counters"}


def test_an_event_without_its_row() -> None:
    assert found(orders=rows()[:2]) >= {"ghost", "unplaced", "phantom"}


def test_an_event_that_says_something_else() -> None:
    first, *rest = log()
    assert found(log=[first._replace(data={**first.data, "items": -1}), *rest]) == {"altered"}
    assert found(log=[first._replace(key=b"c2"), *rest]) == {"altered"}


def test_a_row_that_is_not_of_the_file() -> None:
    assert found(orders=[*rows(), rows()[0]._replace(order_id="order-9")]) >= {"foreign", "zombie"}
    assert "unplaced" not in found(orders=rows()[:2], complete=False)


def test_no_effect_and_two() -> None:
    assert found(effects=effects()[1:]) == {"lost"}
    assert found(effects=[*effects(), effects()[0]]) == {"doubled"}


def test_two_ids_for_what_follows_from_one_event() -> None:
    again = next(e for e in log() if e.name == CREATED)._replace(id="another")
    assert found(log=[*log(), again], shards=[(0, 11, 10)]) == {"doubled"}


def test_first_occurrences_out_of_order() -> None:
    one, two, three, *rest = log()
    assert found(log=[two, one, three, *rest]) == {"inversion"}
    assert found(log=[one, two, one, three, *rest]) == set()  # a repeat of what was there
    assert found(log=[three, one, two, *rest]) == set()  # customers do not bind each other
    one_paid, two_paid, *others = effects()
    assert found(effects=[two_paid, one_paid, *others]) == {"inversion"}


def test_money() -> None:
    assert found(days={o.day.isoformat(): (o.cents, 1) for o in ORDERS[:2]}) == {"money"}
    assert found(days={o.day.isoformat(): (o.cents, 2) for o in ORDERS}) == {"money"}


def test_counters_and_marks() -> None:
    assert found(shards=[(0, 11, 9)]) == {"counters"}
    assert found(shards=[(0, 11, 10)]) == {"counters"}
    assert found(outbox=1) == found(hands=1) == found(waiting=1) == {"counters"}
    assert found(marks={"order": 3, "payment": 2, "settlement": 3}) == {"marks"}


def test_the_shelf() -> None:
    killed = ("payment", "process_killed", ORDERS[0].id)
    assert found(dead=[killed]) == {"shelf"}
    without = [e for e in effects() if (e.service, e.order_id) != ("payment", ORDERS[0].id)]
    marks = {"order": 3, "payment": 2, "settlement": 3}
    assert found(dead=[killed, killed], dead_too=[killed], effects=without, marks=marks) == set()
    assert found(dead_too=[killed], effects=without, marks=marks) == {"shelf"}


def test_a_service_that_gets_its_events_at_most_once() -> None:
    done = [o.id for o in ORDERS]
    assert not list(at_most_once(done, (), log()))
    assert not list(at_most_once([*done, done[0]], (), [*log(), *log()]))  # sent again, and delivered again
    assert kinds(at_most_once([*done, done[0]], (), log())) == {"doubled"}
    assert kinds(at_most_once(done[1:], (), log())) == {"lost"}
    assert not list(at_most_once(done[1:], {f"{COMPLETED} {done[0]}"}, log()))
    assert not list(at_most_once(done[1:], (), log(), 1))
    assert kinds(at_most_once(done[2:], (), log(), 1)) == {"lost"}


def test_completions_of_a_service_without_a_table() -> None:
    done = [o.id for o in ORDERS]
    assert found(told={"letters": [done[0], *done]}) == set()
    assert found(told={"letters": done[1:]}) == {"lost"}
    assert found(told={"letters": [done[1], done[0], done[2]]}) == {"inversion"}
