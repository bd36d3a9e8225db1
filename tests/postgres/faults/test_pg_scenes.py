"""Scenes on a real PostgreSQL, one fault each: `pytest tests/postgres/faults/test_pg_scenes.py -k zombie`.

A scene that fails leaves its history behind: what the children said, and the checker's verdict.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pg_scenes import KAFKA, OWN_SERVER, PAIR, SCENES, Plays, Scene, plays_of, some

from servers.kafka import Kafka
from servers.postgres import Postgres


@pytest.fixture(scope="module")
def plays(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, postgres: Postgres
) -> Iterator[Plays]:
    with plays_of(request, tmp_path_factory.mktemp("scenes"), postgres) as found:
        yield found


@pytest.mark.parametrize("scene", [*SCENES, *OWN_SERVER])
def test_scene(scene: str, plays: Plays) -> None:
    assert plays(scene, None) == set()


def test_the_audit_can_fail(postgres: Postgres, tmp_path: Path) -> None:
    """Books that were balanced, and then somebody changed a counter, and a position."""
    orders = some(2, 1)
    with Scene(tmp_path, postgres) as scene:
        one, _ = scene.life("one")
        scene.place(orders)
        assert scene.done(orders, "payment") and scene.settled()
        scene.finish(one)
        assert scene.judge(orders, *PAIR) == set()
        scene.sql("update unlost.unlost_relay set confirmed = confirmed - 1 where confirmed > 0")
        assert any("exit 3" in line for line in scene.audit())
        scene.sql("update unlost.unlost_relay set confirmed = next - 1")
        assert scene.audit() == []
        scene.sql("update unlost.unlost_progress set counts = '{}' where service = 'payment'")
        assert any("exit 3" in line for line in scene.audit())


@pytest.mark.parametrize("scene", KAFKA)
def test_scene_on_kafka(scene: str, kafka: Kafka, fresh_prefix: str, postgres: Postgres, tmp_path: Path) -> None:
    assert KAFKA[scene](tmp_path, postgres, kafka.bootstrap, f"{fresh_prefix}.", None) == set()
