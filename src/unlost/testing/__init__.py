"""For tests of programs that use unlost, and for whoever writes an adapter."""

from unlost.testing.clock import VirtualWorld
from unlost.testing.running import Running, running

__all__ = ["Running", "VirtualWorld", "running"]
