"""Statements in the order they must run, apart from who runs them.

What a store writes is the same whether the connection is ours or the user's, sync or async, SQLite or PostgreSQL. So it
is written once, as a generator: it yields one statement after another and gets the rows of each. Placeholders are `?`
everywhere; whoever runs a statement writes them as its driver wants them.

Example:
    >>> def double(n: int) -> Steps[int]:
    ...     rows = yield "select ? + ?", (n, n)
    ...     return rows[0][0]
    >>> run(double(2), lambda sql, bindings: [(sum(bindings),)])
    4
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Generator, Sequence
from functools import lru_cache
from typing import Any, TypeVar

T = TypeVar("T")
Rows = Sequence[tuple[Any, ...]]
Statement = tuple[str, Sequence[Any]]
Steps = Generator[Statement, Rows, T]
Execute = Callable[[str, Sequence[Any]], Rows]
ExecuteAsync = Callable[[str, Sequence[Any]], Awaitable[Rows]]


def run(steps: Steps[T], execute: Execute) -> T:
    """Runs all statements, one after another. What `execute` raises comes out where the statement stands."""
    try:
        statement = next(steps)
        while True:
            try:
                rows = execute(*statement)
            except BaseException as e:
                statement = steps.throw(e)
            else:
                statement = steps.send(rows)
    except StopIteration as end:
        result: T = end.value
        return result


async def run_async(steps: Steps[T], execute: ExecuteAsync) -> T:
    """The same with a connection that is awaited."""
    try:
        statement = next(steps)
        while True:
            try:
                rows = await execute(*statement)
            except BaseException as e:
                statement = steps.throw(e)
            else:
                statement = steps.send(rows)
    except StopIteration as end:
        result: T = end.value
        return result


def one(sql: str, bindings: Sequence[Any] = ()) -> Steps[Any]:
    """The first row, or None."""
    rows = yield sql, bindings
    return rows[0] if rows else None


# A quoted text, a quoted name, or a comment: a question mark in there is no placeholder.
_TOKEN = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|--[^\n]*|/\*.*?\*/|\?|%|:", re.DOTALL)


@lru_cache(maxsize=1000)
def with_percent(sql: str) -> str:
    """For drivers that write placeholders as `%s` (psycopg, Django).

    >>> with_percent("select '?', ? where a like '5%'")
    "select '?', %s where a like '5%%'"
    """

    def put(found: re.Match[str]) -> str:
        text = found[0]
        return "%s" if text == "?" else text.replace("%", "%%")

    return _TOKEN.sub(put, sql)


_TABLE = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|\bunlost_[a-z_]+\b(?!\.)")


@lru_cache(maxsize=1000)
def in_schema(sql: str, quoted_schema: str) -> str:
    """The same statement with our tables in a schema: nothing is left to the search path of whoever runs it.

    >>> print(in_schema("select 'unlost_x' from unlost_outbox o", '"events"'))
    select 'unlost_x' from "events".unlost_outbox o
    """
    return _TABLE.sub(lambda m: m[0] if m[0][0] in "'\"" else f"{quoted_schema}.{m[0]}", sql)


@lru_cache(maxsize=1000)
def with_names(sql: str) -> tuple[str, int]:
    r"""For SQLAlchemy's `text`: `:p0`, `:p1` …, and how many there are.

    >>> with_names("select ?::text, ? where a = ':x'")
    ("select :p0\\:\\:text, :p1 where a = '\\:x'", 2)
    """
    count = 0

    def put(found: re.Match[str]) -> str:
        nonlocal count
        text = found[0]
        if text != "?":
            return text.replace(":", "\\:")
        count += 1
        return f":p{count - 1}"

    return _TOKEN.sub(put, sql), count
