"""Planted bugs of the store in PostgreSQL, beside those of `sabotage`: each safety line of it can be broken on purpose.

They are in a module of their own because its driver is an extra.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from unlost.testing.sabotage import VARIABLE, Bug

BUGS: dict[str, Bug] = {}


def from_environment() -> bool:
    """Applies the bug that `UNLOST_BREAK` names, if it is one of these."""
    bug = BUGS.get(os.environ.get(VARIABLE, ""))
    if bug is not None:
        bug.apply()
    return bug is not None


def _bug(name: str, breaks: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def register(apply: Callable[[], None]) -> Callable[[], None]:
        BUGS[name] = Bug(name, breaks, apply)
        return apply

    return register
