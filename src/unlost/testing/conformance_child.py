"""A child process of the conformance suites: `python -m unlost.testing.conformance_child TASK`, a JSON object.

It says what happens to it as JSON lines, so that the scenario knows what was acknowledged before it killed us.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from importlib import import_module
from typing import Any

import msgspec

from unlost.brokers.port import Arrivals, Assigned, Broker, Lost, Revoked
from unlost.errors import UnlostError
from unlost.events.topic import Unit
from unlost.store.port import Outcome, Settlement
from unlost.testing.conformance import arrival_of, envelope

Task = dict[str, Any]


def say(word: str, value: Any) -> None:
    """One `write` per line: a killed process leaves whole lines, or the beginning of one."""
    sys.stdout.buffer.write(msgspec.json.encode({word: value}) + b"\n")
    sys.stdout.buffer.flush()


async def words() -> asyncio.StreamReader:
    """What the scenario tells us."""
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


# --- roles of check_broker -----------------------------------------------------------------------------------


async def member(task: Task, broker: Broker) -> None:
    """Takes part in a service, reads from the beginning, saves nothing; leaves when told to."""
    hears = await words()
    taking_part = await broker.join(task["service"], task["topics"])
    say("joined", task["service"])

    async def receive() -> None:
        while True:
            for change in await taking_part.receive():
                if isinstance(change, Arrivals):
                    say(
                        "arrived",
                        [change.unit, [[a.position, a.envelope.id if a.envelope else ""] for a in change.events]],
                    )
                elif isinstance(change, Assigned):
                    say("assigned", change.units)
                    for unit in change.units:
                        taking_part.seek(unit, 0)
                elif isinstance(change, Revoked):
                    say("revoked", change.units)
                    await taking_part.release(change.units)
                elif isinstance(change, Lost):
                    say("lost", change.units)

    receiving = asyncio.create_task(receive())
    told = asyncio.create_task(hears.readline())
    await asyncio.wait([receiving, told], return_when=asyncio.FIRST_COMPLETED)
    if receiving.done():
        receiving.result()
    receiving.cancel()
    await asyncio.gather(receiving, return_exceptions=True)
    await taking_part.close()


async def publisher(task: Task, broker: Broker) -> None:
    """Publishes batch after batch, and says each receipt when it has it. `batches` is 0: until it is killed."""
    count = 0
    say("ready", True)
    while count < task["batches"] or not task["batches"]:
        batch = [
            envelope(task["topic"], key=f"{task['name']}-{i % task['keys']}".encode(), id=f"{task['name']}:{count}:{i}")
            for i in range(task["size"])
        ]
        receipts = await broker.publish(batch)
        say("receipts", [[r.id, r.partition, r.position] for r in receipts])
        count += 1


# --- roles of check_store ------------------------------------------------------------------------------------


async def owner(task: Task, rig: Any) -> None:
    """Takes a unit, notes what it has in hand, and settles position by position as it is told."""
    hears = await words()
    unit = Unit(*task["unit"])
    (taken,) = await rig.store.take([unit])
    hands = [rig.store.hands() for _ in task["in_hand"]]
    for hand, position in zip(hands, task["in_hand"], strict=True):
        await rig.store.starting(taken, position, position in task["waited"], task["alone"])
        hand.take_up(taken.address, position, task["alone"])
    say("taken", taken.epoch)
    while word := (await hears.readline()).decode().strip():
        arrival = arrival_of(envelope(unit.topic, id=f"event-{word}"), int(word))
        fenced = await rig.store.settle([Settlement(unit, taken.epoch, [Outcome(arrival=arrival, state="done")])])
        say("settled", {"position": int(word), "fenced": bool(fenced)})


ROLES: dict[str, Callable[[Task, Any], Awaitable[None]]] = {"member": member, "publisher": publisher, "owner": owner}


async def main(task: Task) -> None:
    module, _, name = task["open"].partition(":")
    opener = getattr(import_module(module), name)
    async with opener(task["url"]) as opened:
        await ROLES[task["role"]](task, opened)


if __name__ == "__main__":
    try:
        asyncio.run(main(msgspec.json.decode(sys.argv[1])))
    except UnlostError as e:
        sys.exit(str(e))
