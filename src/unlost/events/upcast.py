"""Older events for the classes of today: functions that bring data up by one version each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import msgspec

from unlost.errors import Undecodable, UsageError
from unlost.events.data import json_of
from unlost.events.envelope import Envelope
from unlost.events.model import Event

Upcaster = Callable[[dict[str, Any]], dict[str, Any]]
F = TypeVar("F", bound=Upcaster)


class Step(NamedTuple):
    """From data of `version` to data of the next one."""

    version: int
    function: Upcaster

    def __str__(self) -> str:
        return f"{_name(self.function)} ({self.version} → {self.version + 1})"


_declared: dict[type[Event], dict[int, Step]] = {}
_chains: dict[type[Event], tuple[Step, ...]] = {}

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode


def upcast(cls: type[Event], *, from_version: int) -> Callable[[F], F]:
    """Declares the function that makes data of `from_version` into data of the next version.

    It gets the data as they were sent (dicts, lists, text, numbers, booleans, None, under the names that are sent) and
    returns those of the next version. It is pure: one event, read twice, gives the same. Events that are older than the
    first declared step are given to that step as they are.

    **Guarantee** what the log and the shelf hold never changes; only what the handler gets does.
    **After a crash** nothing is remembered: the next delivery begins with the stored bytes again.

    Raises:
        UsageError: UL1370 no step of a version below that of `cls`, UL1371 no plain function, UL1372 the step is
            declared already. When an App starts: UL1373 a step is missing, UL1374 two classes lend a view the same step.

    Example:
        >>> class PriceSet(Event, key="sku", version=2):
        ...     sku: str
        ...     currency: str
        >>> @upcast(PriceSet, from_version=1)
        ... def with_currency(data: dict[str, Any]) -> dict[str, Any]:
        ...     return {**data, "currency": "EUR"}
        >>> [str(step) for step in steps_of(PriceSet)]
        ['with_currency (1 → 2)']
    """
    spec = getattr(cls, "__unlost__", None)
    if spec is None or spec.abstract:
        raise UsageError(
            "UL1370", "@upcast is for an event class", found=repr(cls)[:200], fix="@upcast(OrderCreated, from_version=1)"
        )  # fmt: skip
    if type(from_version) is not int or not 1 <= from_version < spec.version:
        raise UsageError(
            "UL1370", f"a step leads from a version below that of {cls.__qualname__}, which is {spec.version}",
            found=f"from_version={from_version!r}",
            fix="raise version= of the class together with the step; "
            + (f"the steps are 1 to {spec.version - 1}" if spec.version > 1 else "version 1 has none"),
        )  # fmt: skip

    def declare(function: F) -> F:
        if not callable(function) or inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
            raise UsageError(
                "UL1371", "an upcaster is a plain function from data to data", found=repr(function)[:200],
                fix="def with_currency(data: dict[str, Any]) -> dict[str, Any]",
            )  # fmt: skip
        steps = _declared.setdefault(cls, {})
        known = steps.get(from_version)
        if known is not None and known.function is not function:
            raise UsageError(
                "UL1372", f"the step of {cls.__qualname__} from version {from_version} is declared already",
                found=f"{_full_name(known.function)} and {_full_name(function)}", fix="keep one of them",
            )  # fmt: skip
        steps[from_version] = Step(from_version, function)
        _chains.clear()
        return function

    return declare


def steps_of(cls: type[Event]) -> tuple[Step, ...]:
    """The steps up to the version of a class, lowest first; none for a class that reads older events as they are. A view
    has its own, and those of the event that it is a view of.

    Raises:
        UsageError: UL1373, a step is missing between the first one and the class's version; UL1374, two classes of the
            view's wire type have the same step.
    """
    chain = _chains.get(cls)
    if chain is None:
        found = {**_lent(cls), **_declared.get(cls, {})}
        _check_whole(cls, found)
        chain = _chains[cls] = tuple(step for _, step in sorted(found.items()))
    return chain


def _lent(view: type[Event]) -> dict[int, Step]:
    spec = view.__unlost__
    lent: dict[int, Step] = {}
    if spec.view_of is None:
        return lent
    for cls, steps in _declared.items():
        if cls.__unlost__.type != spec.type or cls.__unlost__.view_of is not None:
            continue
        for version, step in steps.items():
            if version >= spec.version or version in _declared.get(view, {}):
                continue
            if version in lent:
                raise UsageError(
                    "UL1374", f"two classes have a step from version {version} for the view {view.__qualname__}",
                    found=f"{_full_name(lent[version].function)} and {_full_name(step.function)}",
                    fix=f"say which: @upcast({view.__name__}, from_version={version})",
                )  # fmt: skip
            lent[version] = step
    return lent


def _check_whole(cls: type[Event], steps: dict[int, Step]) -> None:
    version = cls.__unlost__.version
    missing = [n for n in range(min(steps, default=version), version) if n not in steps]
    if missing:
        raise UsageError(
            "UL1373", f"the steps of {cls.__qualname__} lead to its version {version} without a hole",
            found=f"steps from {', '.join(map(str, sorted(steps)))}; none from {', '.join(map(str, missing))}",
            fix=f"@upcast({cls.__name__}, from_version={missing[0]}); where nothing has to change it returns its data",
        )  # fmt: skip


def bring_up(envelope: Envelope, steps: tuple[Step, ...]) -> Envelope:
    """The envelope with the data that the steps make of it. Pure, as they are.

    Raises `Undecodable`: UL1375 when one of them fails; what `json_of` says of data that are none.
    """
    raw = json_of(envelope)
    failed = ""
    try:
        data: Any = _decode(raw)
        if not isinstance(data, dict):
            failed = f"its data are a {type(data).__name__}, not an object"
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        failed = f"its data are no JSON: {type(error).__name__}"
    if failed:
        raise Undecodable(
            "UL5004", f"the data of {envelope.type} cannot be brought up to a newer version", found=failed,
            fix="correct the publisher, then redrive the event from the shelf",
        )  # fmt: skip
    for step in steps:
        if step.version < envelope.eventversion:
            continue
        try:
            data = step.function(data)
            failed = "" if isinstance(data, dict) else f"it returned {_a(data)}"
        except MemoryError:
            raise
        except Exception as error:
            failed = _where(error)
        if failed:
            raise _unfit(step, envelope, failed)
    try:
        return msgspec.structs.replace(envelope, data=_encode(data), eventversion=steps[-1].version + 1)
    except MemoryError:
        raise
    except Exception as error:
        failed = type(error).__name__
    raise _unfit(steps[-1], envelope, f"it returned what is no JSON ({failed})")


def _unfit(step: Step, envelope: Envelope, found: str) -> Undecodable:
    return Undecodable(
        "UL1375", f"the upcaster {step} cannot bring up {envelope.type} of version {envelope.eventversion}", found=found,
        fix=f"correct {_full_name(step.function)}, then redrive the event from the shelf",
    )  # fmt: skip


def _where(error: Exception) -> str:
    """The kind of an error and its line. Its text may quote data, of fields that today's class does not know."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = "" if trace is None else f" in {trace.tb_frame.f_code.co_name}, line {trace.tb_lineno}"
    return f"{type(error).__name__}{place}"


def _a(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}, not a dict"


def _name(function: Upcaster) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def _full_name(function: Upcaster) -> str:
    module = getattr(function, "__module__", "")
    return f"{module}.{getattr(function, '__qualname__', _name(function))}"
