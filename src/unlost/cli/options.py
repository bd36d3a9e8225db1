"""Options that several commands have, said the same way everywhere."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

AppName = Annotated[
    str | None,
    Parameter(name="--app", help="Where your App is: module, module:attribute or file.py. Else UNLOST_APP, pyproject."),
]
BrokerUrl = Annotated[
    str | None,
    Parameter(name="--broker", help="URL of the broker. Else UNLOST_BROKER, pyproject, .unlost/events.db."),
]
Json = Annotated[bool, Parameter(name="--json", negative="", help="One JSON object instead of text.")]
JsonLines = Annotated[bool, Parameter(name="--json", negative="", help="One JSON object per line instead of text.")]
