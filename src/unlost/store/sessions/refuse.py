"""What every adapter refuses, with the way out."""

from __future__ import annotations

from unlost.errors import StatementFailed, UsageError
from unlost.store.sessions.port import Session


def autocommit(session: Session) -> None:
    """Refuses a connection on which each statement would be a transaction of its own.

    Raises:
        UsageError: it is one.
    """
    if session.autocommits:
        raise UsageError(
            "UL1270", "events are written in an open transaction, together with the rows that they tell of",
            found=f"{session.library} without a transaction: each statement would be committed by itself",
            fix=session.how_to_begin,
        )  # fmt: skip


def failed(session: Session) -> StatementFailed:
    """The database rolls back such a transaction at COMMIT, and reports no error."""
    return StatementFailed(
        "UL1272", "this transaction cannot be committed",
        found=f"an error of an earlier statement was caught inside the transaction ({session.library})",
        fix="let it out of the block, or put a savepoint around the statement that may fail",
    )  # fmt: skip


def ended(session: Session) -> UsageError:
    return UsageError(
        "UL1273", "a transaction that unlost has begun is ended by unlost",
        found=f"it was committed, rolled back or closed by somebody else ({session.library})",
        fix="leave commit, rollback and close out of the block",
    )  # fmt: skip
