"""`unlost demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from unlost.cli.options import Json
from unlost.errors import UsageError


def demo(
    *,
    orders: Annotated[
        str, Parameter(show_default=True, help="How many orders of the data set, or all (69,659).")
    ] = "5000",
    kill: Annotated[int, Parameter(show_default=True, help="How many times a service is killed with kill -9.")] = 5,
    seed: Annotated[
        int, Parameter(show_default=True, help="Repeats a run: the same seed kills at the same times.")
    ] = 42,
    break_: Annotated[
        str | None,
        Parameter(name="--break", help="Run with a classic bug, such as ack-first (a wrong name lists all); exit 3."),
    ] = None,
    folder: Annotated[Path | None, Parameter(help="Where to run it. Else ./unlost-demo.")] = None,
    broker: Annotated[
        str | None, Parameter(help="URL of a Kafka cluster to run it on. Else UNLOST_BROKER, if that is one.")
    ] = None,
    store: Annotated[
        str | None, Parameter(help="URL of a PostgreSQL database for the store. Else UNLOST_STORE, if that is one.")
    ] = None,
    json: Json = False,
) -> int:
    """See it work: a shop on real orders under kill -9, and then the books.

    Four services, each its own process, handle real orders while they are killed; then every event is accounted for.

    **Needs** nothing. Everything happens in the folder unlost-demo. On Kafka the topics get a prefix of their own, and
    stay there; in PostgreSQL it makes a schema of its own.

    **Examples**

    - `unlost demo`
    - `unlost demo --orders all --kill 20 --seed 7`
    - `unlost demo --break ack-first`
    - `unlost demo --broker kafka://localhost:9092`
    - `unlost demo --store postgresql://localhost/test`
    """
    if orders != "all" and not (orders.isascii() and orders.isdigit() and int(orders) > 0):
        raise UsageError("UL1337", "--orders is a number from 1, or all", found=repr(orders))
    if kill < 0:
        raise UsageError("UL1337", "--kill is not negative", found=str(kill))
    from unlost.demo.run import main

    return main(orders, kill, seed, break_, folder, json, broker, store)
