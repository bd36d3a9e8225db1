"""The settings in force, each with where it comes from. Secrets are hidden."""

from __future__ import annotations

import msgspec

from unlost import config
from unlost.config import hide_secrets

__all__ = ["Value", "hide_secrets", "settings"]


class Value(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    value: str
    source: str
    meaning: str


def settings(**flags: str | None) -> list[Value]:
    """Every setting, in the order of the documentation."""
    found = []
    for name, meaning in config.SETTINGS.items():
        value, source = config.setting(name, flag=flags.get(name))
        found.append(Value(name=name, value=hide_secrets(value), source=source, meaning=meaning))
    return found
