"""Which class reads which event in one service, and what to do about versions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TypeVar

from unlost.errors import Undecodable, UsageError
from unlost.events.data import codec_of, decode_data
from unlost.events.envelope import Envelope, check_key_not_sensitive
from unlost.events.model import Event
from unlost.events.upcast import Step, bring_up, steps_of

UNKNOWN_VERSION = "UL5003"
"""The code of `Undecodable` for an event that is newer than its class."""

E = TypeVar("E", bound=Event)


class Catalog:
    """The event classes that one service reads, by wire type.

    catalog = Catalog([OrderCreated, PaymentCompleted])
    cls = catalog.resolve(envelope.type)
    """

    def __init__(self, classes: Iterable[type[Event]] = ()) -> None:
        self._by_type: dict[str, type[Event]] = {}
        for cls in classes:
            self.add(cls)

    def add(self, cls: type[Event]) -> None:
        """Takes one more class; the same class again changes nothing.

        Raises `UsageError`: UL1008 for a class that is no event, UL1014 for a sensitive key, UL1015 for a
        second class of one wire type, UL1016 for fields that cannot be data.
        """
        spec = getattr(cls, "__unlost__", None)
        if spec is None or spec.abstract:
            raise UsageError(
                "UL1008",
                "a service reads events and commands",
                found=f"{cls!r}" + ("" if spec is None else ", a base without fields"),
                fix="give a class derived from Event or Command",
            )
        known = self._by_type.get(spec.type)
        if known is cls:
            return
        if known is not None:
            raise UsageError(
                "UL1015",
                f"two classes of one service read {spec.type!r}",
                found=f"{known.__module__}.{known.__qualname__} and {cls.__module__}.{cls.__qualname__}",
                fix="use one class in this service, or make another service for the second",
            )
        codec_of(cls)
        check_key_not_sensitive(cls)
        self._by_type[spec.type] = cls

    def resolve(self, type: str) -> type[Event] | None:
        """The class that reads events of this wire type, or None."""
        return self._by_type.get(type)

    @property
    def known(self) -> Mapping[str, type[Event]]:
        """All classes by wire type; not to be changed."""
        return MappingProxyType(self._by_type)

    def decode(self, envelope: Envelope, cls: type[E]) -> E:
        """The typed event in an envelope.

        Events of the class's version and older ones are read, the older ones through its upcasters; a view reads any
        version. Raises `Undecodable`: UL5003 for a newer version (see `UNKNOWN_VERSION`), UL5004 to UL5006 for data that
        `cls` cannot read, UL1375 and UL1376 for what its upcasters cannot.
        """
        spec = cls.__unlost__
        if envelope.eventversion > spec.version and spec.view_of is None:
            raise Undecodable(
                UNKNOWN_VERSION,
                f"{envelope.type} has a newer version than this service knows",
                found=f"version {envelope.eventversion}; {cls.__qualname__} is version {spec.version}",
                fix="deploy the release that knows this version, then redrive the event from the shelf",
            )
        if envelope.eventversion < spec.version and (steps := steps_of(cls)):
            return _decode_older(envelope, cls, steps)
        return decode_data(envelope, cls)

    def check_steps(self) -> None:
        """Raises `UsageError` (UL1373, UL1374) unless the upcasters of each class lead up to its version."""
        for cls in self._by_type.values():
            steps_of(cls)


def _decode_older(envelope: Envelope, cls: type[E], steps: tuple[Step, ...]) -> E:
    risen = bring_up(envelope, steps)
    try:
        return decode_data(risen, cls)
    except Undecodable as error:
        failed = error
    used = [step for step in steps if step.version >= envelope.eventversion]
    raise Undecodable(
        "UL1376",
        f"what {', '.join(map(str, used))} made of {envelope.type} does not fit {cls.__qualname__}",
        found=failed.found,
        fix="correct the upcaster, then redrive the event from the shelf",
    )
