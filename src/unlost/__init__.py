"""Event-driven services for Python in which no event is lost, and it can be proved."""

__version__ = "0.1.0"
