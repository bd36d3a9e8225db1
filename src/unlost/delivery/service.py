"""Services and their handlers, as users declare them."""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypedDict, TypeVar, Unpack, get_args, overload

from unlost.config import duration
from unlost.delivery.context import Context
from unlost.delivery.fate import Retry
from unlost.errors import UsageError
from unlost.events import Catalog, Event, NamingWarning, check_past_tense

Guarantee = Literal["at-most-once", "at-least-once", "effectively-once"]
"""How often a handler may see an event: `at-most-once` may lose, `at-least-once` may repeat after a crash,
`effectively-once` commits the handler's rows, its events and the mark "handled" together."""
OnDead = Literal["park", "skip"]

A = TypeVar("A", bound=Event)
B = TypeVar("B", bound=Event)
C = TypeVar("C", bound=Event)
Result = None | Awaitable[None]
Handles = Callable[[A], Result] | Callable[[A, Context], Result]

CONCURRENCY_MAX = 1000
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Policy(TypedDict, total=False):
    """What a handler may say otherwise than its service, and what only a handler has: `where` and its `name`."""

    where: Callable[[Any], bool] | None
    guarantee: Guarantee
    on_dead: OnDead
    deadline: str | float | timedelta
    retry: Retry
    concurrency: int
    name: str


@dataclass(frozen=True, kw_only=True)
class Handler:
    """A function for one or more event types in one service, with its policy. `name` is its stored identity."""

    name: str
    function: Callable[..., Any]
    takes_context: bool
    is_async: bool
    where: Callable[[Any], bool] | None
    guarantee: Guarantee
    on_dead: OnDead
    deadline: float
    retry: Retry
    concurrency: int

    @functools.cached_property
    def plain(self) -> bool:
        """Whether it takes every event, and nothing but the event."""
        return not (self.takes_context or self.turns_away)

    @functools.cached_property
    def turns_away(self) -> bool:
        """Whether an event may be not for it: a duplicate, or not what `where` wants."""
        return self.where is not None or self.guarantee == "effectively-once"


class Service:
    """A named group of handlers; its name is the consumer group and part of every stored position.

    What is given here are defaults; `on` may say otherwise for one handler.

    - `guarantee`: `at-least-once` (default) never loses, the handler may see an event twice after a crash;
      `effectively-once` in addition remembers handled events in the transaction that handles them;
      `at-most-once` never repeats: an event counts as begun before its handler runs, and is not tried again. What a
      crash or an error cut off is `abandoned`, named in the audit, at most 256 events of a partition per crash.
    - `on_dead`: `park` (default) lets the later events of a key wait behind a dead letter; `skip` lets them go on
      and gives that key's order up.
    - `deadline`: seconds (or "30s") for one attempt. `concurrency`: how many keys are handled at a time.
    - `database`: the URL of the database where its handlers keep their data, if it is not the store's own file. Checked
      at the start: effectively-once handlers need it to be the store's.
    - `resends`: how long producers may send an event again with its id (seconds, or "30d"). Ids are remembered so long at
      least; an event that occurred earlier and is not known goes to the shelf (`too_old`), because nobody can say
      whether it was handled. Without it, ids are remembered as long as the log holds their events.

    **Guarantee** events of one key are handled in the order of the log, one at a time.
    **After a crash** whatever was not settled is delivered again, to any process of the service.

    Example:
        >>> billing = Service("billing", guarantee="effectively-once", retry=Retry(attempts=3))
    """

    def __init__(
        self,
        name: str,
        *,
        guarantee: Guarantee = "at-least-once",
        on_dead: OnDead = "park",
        deadline: str | float | timedelta = 30.0,
        retry: Retry | None = None,
        concurrency: int = 16,
        database: str = "",
        resends: str | float | timedelta | None = None,
    ) -> None:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UsageError(
                "UL1210",
                "a service's name has letters, digits, dots, dashes and underscores, 100 at most",
                found=repr(name),
            )
        self.name = name
        self.guarantee = _checked_guarantee(guarantee)
        self.on_dead = _checked("on_dead", on_dead, get_args(OnDead))
        self.deadline = _checked_deadline(deadline)
        self.retry = retry or Retry()
        self.concurrency = _checked_concurrency(concurrency)
        self.database = database
        self.resends = None if resends is None else duration(resends)
        self.catalog = Catalog()
        self.handlers: dict[str, Handler] = {}  # by wire type
        self.topics: set[str] = set()
        self.queues: set[str] = set()  # those of the topics that hold commands: nobody else may carry them out

    def __repr__(self) -> str:
        return f"Service({self.name!r}, {len(self.handlers)} event types)"

    @overload
    def on(self, first: type[A], /, **policy: Unpack[Policy]) -> Callable[[Handles[A]], Handles[A]]: ...
    @overload
    def on(
        self, first: type[A], second: type[B], /, **policy: Unpack[Policy]
    ) -> Callable[[Handles[A | B]], Handles[A | B]]: ...
    @overload
    def on(
        self, first: type[A], second: type[B], third: type[C], /, **policy: Unpack[Policy]
    ) -> Callable[[Handles[A | B | C]], Handles[A | B | C]]: ...

    def on(self, *types: type[Event], **policy: Unpack[Policy]) -> Callable[[Any], Any]:
        """Registers a handler for one event type, or for up to three. For a command no other service may have one.

        `where` routes by content: what it turns away is counted as `skipped(where)`.

        Raises:
            UsageError: no event class; a second handler for a type; a function that does not take
                (event) or (event, ctx); an unknown guarantee.
        """
        if not types or not all(isinstance(t, type) and issubclass(t, Event) for t in types):
            raise UsageError(
                "UL1211",
                "`on` takes event classes",
                found=", ".join(map(repr, types)) or "nothing",
                fix="@service.on(OrderPlaced)",
            )

        unknown = set(policy) - set(Policy.__annotations__)
        if unknown:
            raise UsageError(
                "UL1209", f"`on` knows {', '.join(Policy.__annotations__)}", found=", ".join(sorted(unknown))
            )

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            handler = Handler(
                name=policy.get("name") or str(getattr(function, "__name__", type(function).__name__)),
                function=function,
                takes_context=_takes_context(function),
                is_async=inspect.iscoroutinefunction(function)
                or inspect.iscoroutinefunction(getattr(function, "__call__", None)),  # noqa: B004
                where=policy.get("where"),
                guarantee=_checked_guarantee(policy.get("guarantee", self.guarantee)),
                on_dead=_checked("on_dead", policy.get("on_dead", self.on_dead), get_args(OnDead)),
                deadline=_checked_deadline(policy.get("deadline", self.deadline)),
                retry=policy.get("retry", self.retry),
                concurrency=_checked_concurrency(policy.get("concurrency", self.concurrency)),
            )
            if handler.guarantee == "at-most-once" and "retry" in policy:
                raise UsageError(
                    "UL1216", "at-most-once is never tried again, so it has no `retry`", found=handler.name,
                    fix="leave `retry` out, or use at-least-once: it loses nothing",
                )  # fmt: skip
            for cls in types:
                self._add(cls, handler)
            return function

        return register

    def _add(self, cls: type[Event], handler: Handler) -> None:
        known = self.handlers.get(cls.__unlost__.type)
        if known is not None:
            raise UsageError(
                "UL1212", f"the service {self.name!r} has a handler for {cls.__unlost__.type} already: {known.name}",
                found=f"a second one: {handler.name}", fix="make another service for it: each service handles an event once",
            )  # fmt: skip
        namesake = next((h for h in self.handlers.values() if h.name == handler.name and h is not handler), None)
        if namesake is not None:
            raise UsageError(
                "UL1219", f"the service {self.name!r} has a handler named {handler.name!r} already",
                found="a second function of that name", fix='name it: @service.on(OrderPlaced, name="charge-order")',
            )  # fmt: skip
        spec = cls.__unlost__
        if spec.topic in (self.topics - self.queues if spec.is_command else self.queues):
            raise UsageError(
                "UL1226", f"{spec.topic!r} is a queue of commands or a topic of events, not both",
                found=f"{cls.__qualname__} beside {', '.join(self.handlers)}",
                fix="give the events another topic, or the commands another queue",
            )  # fmt: skip
        self.catalog.add(cls)
        warning = check_past_tense(cls)
        if warning is not None:
            warnings.warn(warning, NamingWarning, stacklevel=3)
        self.handlers[cls.__unlost__.type] = handler
        topic = spec.topic
        assert topic is not None
        self.topics.add(topic)
        if spec.is_command:
            self.queues.add(topic)


def _takes_context(function: Callable[..., Any]) -> bool:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as e:
        raise UsageError("UL1214", "a handler is a function", found=repr(function)) from e
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise UsageError("UL1214", "a handler is no generator: nothing of it would run", found=repr(function))
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in parameters if p.default is p.empty and p.kind is p.KEYWORD_ONLY]
    if required or len([p for p in positional if p.default is p.empty]) > 2 or not positional:
        raise UsageError(
            "UL1214", "a handler takes the event, and the context if it wants it",
            found=f"{getattr(function, '__name__', function)}{inspect.signature(function)}",
            fix="async def handle(order: OrderPlaced, ctx: Context) -> None",
        )  # fmt: skip
    return len(positional) > 1


def _checked(what: str, value: Any, allowed: tuple[str, ...]) -> Any:
    if value not in allowed:
        raise UsageError("UL1215", f"{what} is one of {', '.join(allowed)}", found=repr(value))
    return value


def _checked_guarantee(value: Guarantee) -> Guarantee:
    _checked("guarantee", value, get_args(Guarantee))
    return value


def _checked_deadline(value: str | float | timedelta) -> float:
    seconds = duration(value)
    if seconds <= 0:
        raise UsageError("UL1217", "a deadline is longer than nothing", found=repr(value))
    return seconds


def _checked_concurrency(value: int) -> int:
    if not isinstance(value, int) or not 1 <= value <= CONCURRENCY_MAX:
        raise UsageError("UL1218", f"concurrency is between 1 and {CONCURRENCY_MAX}", found=repr(value))
    return value
