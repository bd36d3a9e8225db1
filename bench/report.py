"""What the runs share: figures, tables, the machine, and the neighbours' own environment."""

from __future__ import annotations

import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from common import HERE

ROOT = HERE.parent
PEERS_VENV = ROOT / ".venv-bench"
PEERS_PYTHON = PEERS_VENV / "bin" / "python"
DISTURBED = 0.1  # share of the processors' time for other programs beyond which a ratio says nothing

Results = list[dict[str, Any]]


# --- figures -----------------------------------------------------------------------------------------------------


def median(values: Sequence[float] | Iterator[float]) -> float:
    return statistics.median(list(values))


def rate(results: Results) -> float:
    return median([r["events"] / r["seconds"] for r in results])


def cpu(results: Results, name: str = "cpu") -> float:
    """Processor time per event, in microseconds."""
    return median([r[name] / r["events"] * 1e6 for r in results])


def percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100)[percent - 1]


def cells(values: Sequence[float]) -> list[str]:
    return [f"{percentile(values, p):,.0f} µs" for p in (50, 95, 99)]


def spread(ratios: Sequence[float]) -> str:
    return f"**{median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


# --- the machine -------------------------------------------------------------------------------------------------


def busy_seconds() -> float | None:
    """Processor time that anybody has used since the machine started, where the system tells."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _idle, _waiting, interrupts, soft, steal = map(int, fields[:8])
    return (user + nice + system + interrupts + soft + steal) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """The same of this program and of all it has run."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    )


def seconds_of(pid: int) -> float:
    """The same of one program that still runs."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Others:
    """Which share of the processors' time went to programs that are not part of the benchmark."""

    def __init__(self, also: Sequence[int] = ()) -> None:
        """`also` are programs that belong to it and still run."""
        self._also = also
        self._began = time.monotonic()
        self._busy, self._own = busy_seconds(), self._ours()

    def share(self) -> float | None:
        if self._busy is None:
            return None
        others = (busy_seconds() or 0.0) - self._busy - (self._ours() - self._own)
        return max(0.0, others) / (time.monotonic() - self._began) / (os.cpu_count() or 1)

    def _ours(self) -> float:
        try:
            return own_seconds() + sum(seconds_of(pid) for pid in self._also)
        except OSError:
            return own_seconds()


def processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def memory() -> str:
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"


# --- the neighbours ----------------------------------------------------------------------------------------------


def install_peers(packages: Iterable[str]) -> dict[str, str]:
    """Each on its own: one that does not install is named in the table, the others are measured."""
    if not PEERS_PYTHON.exists():
        subprocess.run([sys.executable, "-m", "venv", str(PEERS_VENV)], check=True)
        (PEERS_VENV / ".gitignore").write_text("*\n")
    failed = {}
    for package in packages:
        done = subprocess.run(
            [str(PEERS_PYTHON), "-m", "pip", "install", "-q", "-c", str(HERE / "constraints.txt"), package],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            failed[package] = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
    return failed


# --- talking -----------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def timed(work: Callable[[], None]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began
