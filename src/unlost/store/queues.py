"""Which service carries out the commands of a queue: exactly one. It is part of what a service has registered."""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from unlost.errors import UsageError
from unlost.store.steps import Steps


def claim(service: str, queues: Collection[str]) -> Steps[None]:
    """Before a service registers for queues.

    Raises:
        UsageError: another service has registered for one of them.
    """
    if not queues:
        return
    rows = yield "select name, policy from unlost_service where name <> ? order by name", (service,)
    for name, policy in rows:
        for queue in sorted(set(queues) & set(_queues(policy))):
            raise two_for_one(queue, name, service)


def service_of(queue: str) -> Steps[str | None]:
    rows = yield "select name, policy from unlost_service order by name", ()
    return next((name for name, policy in rows if queue in _queues(policy)), None)


def two_for_one(queue: str, one: str, other: str) -> UsageError:
    return UsageError(
        "UL1246", f"exactly one service carries out the commands of a queue, and {one!r} does it for {queue!r}",
        found=f"a handler in {other!r} as well",
        fix=f"move the handler to {one}, or send an event: any number of services may handle it. If {one} has given the queue "
        "up, start its new release once",
    )  # fmt: skip


class _Policy(msgspec.Struct):
    queues: list[str] = []


def _queues(policy: str) -> list[str]:
    return msgspec.json.decode(policy, type=_Policy).queues
