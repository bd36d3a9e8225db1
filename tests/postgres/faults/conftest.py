"""The proofs on PostgreSQL share evidence, crash points and readers with those on the embedded broker and on Kafka."""

from __future__ import annotations

import sys
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(_TESTS / "crash"), str(_TESTS / "kafka" / "faults")]
