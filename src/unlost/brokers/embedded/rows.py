"""What is said of rows of the log that are not as they should be."""

from __future__ import annotations

from pathlib import Path

from unlost.errors import Damaged


def missing(path: Path, place: str, before: int, at: int) -> Damaged:
    """Between the positions `before` and `at` there should be others."""
    return Damaged(
        "UL3005", f"{path}: events of {place} are missing from the log",
        found=f"after position {before} comes {at}", fix="run: unlost audit",
    )  # fmt: skip


def harmed(path: Path, place: str, position: int) -> Damaged:
    return Damaged(
        "UL3004", f"{path} is damaged: the event at {place}:{position} does not match its checksum",
        fix="stop all processes, keep a copy of the folder, and restore the newest good copy",
    )  # fmt: skip
