"""Planted bugs."""

def from_environment() -> None:
    pass
