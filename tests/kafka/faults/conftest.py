"""The proofs on Kafka share their checker, evidence and handlers with those on the embedded broker."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "crash"))
