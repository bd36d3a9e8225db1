"""The settings in force, each with where it comes from. Secrets are hidden."""

from __future__ import annotations

import re

import msgspec

from unlost import config

_IN_AUTHORITY = re.compile(r"(?<=://)([^/@\s:]*):([^/\s]*)@")
_IN_QUERY = re.compile(r"(?i)([?&;][^=&]*(?:password|passwd|secret|token|key)[^=&]*=)[^&\s]+")


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


def hide_secrets(url: str) -> str:
    """
    >>> hide_secrets("kafka://ann:s3cret@host/?sasl_password=x")
    'kafka://ann:***@host/?sasl_password=***'
    """
    return _IN_QUERY.sub(r"\1***", _IN_AUTHORITY.sub(r"\1:***@", url))
