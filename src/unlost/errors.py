"""Every error of unlost, sorted by what its reader must do. Imports nothing of ours.

Each carries a stable code and says what was expected, what was found and what to do next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class UnlostError(Exception):
    """The root. `code` is stable across releases; `exit_code` is what the command line ends with.

    Example:
        >>> print(UnlostError("UL0000", "what was expected", found="what there was", fix="what to do"))
        UL0000: what was expected
          found: what there was
          do:    what to do
    """

    exit_code = 1

    def __init__(self, code: str, what: str, *, found: str = "", fix: str = "") -> None:
        self.code = code
        self.what = what
        self.found = found
        self.fix = fix
        super().__init__(code, what, found, fix)

    def __str__(self) -> str:
        text = f"{self.code}: {self.what}"
        if self.found:
            text += f"\n  found: {self.found}"
        if self.fix:
            text += f"\n  do:    {self.fix}"
        return text

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.code, self.what, self.found, self.fix))


def _rebuild(kind: type[UnlostError], code: str, what: str, found: str, fix: str) -> UnlostError:
    return kind(code, what, found=found, fix=fix)


class UsageError(UnlostError):
    """The program or the command is wrong; nothing was accepted. Change it.

    Example:
        >>> try:
        ...     Service("no spaces, please")
        ... except UsageError as error:
        ...     print(error.code, error.exit_code)
        UL1210 2
    """

    exit_code = 2


class Misconfigured(UsageError):
    """No event could ever be handled like this: the service stops, and every event stays where it is."""


class Unavailable(UnlostError):
    """The world said no, and surely nothing was accepted. Retrying is safe.

    **Guarantee** no event of the call is in the log or in the outbox.

    Example:
        >>> async def publish_soon(event: Event) -> None:
        ...     while True:
        ...         try:
        ...             await app.publish(event)
        ...             return
        ...         except Unavailable:
        ...             await asyncio.sleep(1)
    """

    exit_code = 4


class OutcomeUnknown(UnlostError):
    """Nobody can say whether it was accepted. Publishing again with the same id is safe.

    **Guarantee** that is at most a duplicate, which effectively-once handlers never see.

    Example:
        >>> async def publish_surely(event: Event, id: str) -> None:
        ...     try:
        ...         await app.publish(event, id=id)
        ...     except OutcomeUnknown:
        ...         await app.publish(event, id=id)
    """

    exit_code = 5


class PartlyPublished(OutcomeUnknown):
    """Of one `publish_all` some events are accepted and some are not, or nobody can say. Publishing the failed ones
    again with the same ids is safe.

    `receipts` has one for each event in order, None where it was not accepted; `failed` says why, by place.
    """

    def __init__(
        self, code: str, what: str, *, found: str = "", fix: str = "",
        receipts: Sequence[object] = (), failed: Mapping[int, UnlostError] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(code, what, found=found, fix=fix)
        self.receipts = receipts
        self.failed = dict(failed or {})

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_partly, (self.code, self.what, self.found, self.fix, tuple(self.receipts), self.failed))


def _rebuild_partly(
    code: str, what: str, found: str, fix: str, receipts: Sequence[object], failed: Mapping[int, UnlostError]
) -> UnlostError:
    return PartlyPublished(code, what, found=found, fix=fix, receipts=receipts, failed=failed)


class Damaged(UnlostError):
    """Stored data are not what was written, or fewer than what was acknowledged. A loss was found: read it."""

    exit_code = 3


class StatementFailed(UnlostError):
    """A statement of yours in `ctx.transaction()` failed: a constraint, a table that is not there, wrong SQL."""


class Undecodable(UnlostError):
    """These bytes are not an event that this code can read. It goes to the shelf with its bytes."""


class Fenced(UnlostError):
    """This process is no longer the owner of the partition; the newer owner goes on. Not to be retried."""


class Bug(UnlostError):
    """An invariant of unlost does not hold. Please report it with the text of this error."""


def invariant(condition: object, what: str) -> None:
    """Raises `Bug` unless the condition holds; unlike `assert`, also under `python -O`."""
    if not condition:
        raise Bug(
            "UL9001",
            f"an invariant does not hold: {what}",
            fix="please report this; nothing was acknowledged",
        )
