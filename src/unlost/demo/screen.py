"""What the demo says. Results go to stdout; the moving line goes to stderr, and only to a terminal."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from unlost.demo.broker import Place
from unlost.demo.folder import store_path
from unlost.demo.orders import Order
from unlost.demo.processes import SERVICES
from unlost.ops.table import books_table, missing_lines

if TYPE_CHECKING:
    from unlost.demo.run import Result

BAR = 40
KILLS_SHOWN = 4
NAMES_SHOWN = 5  # orders named in one line
DRAW_SECONDS = 0.1


class Kill(msgspec.Struct, frozen=True, kw_only=True):
    """One `kill -9`. Times in seconds since the start."""

    service: str
    pid: int
    at: float
    in_hands: int  # events that it was given to handle and that had no outcome
    back_at: float | None = None
    back_pid: int | None = None
    delivered_again: int = 0  # of these


class Screen:
    def __init__(self, *, silent: bool = False) -> None:
        self._silent = silent
        self._live = sys.stderr.isatty() and not silent
        self._color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        self._line = False
        self._drawn = 0.0
        self._kills: list[Kill] = []
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # a terminal without these characters shows ? instead

    def say(self, text: str = "") -> None:
        if self._silent:
            return
        self._clear()
        print(text, flush=True)

    def opening(
        self, orders: int, kills: int, seed: int, bug: str | None, path: Path, place: Place, anew: bool
    ) -> None:
        parts = [f"{orders:,} real orders", f"{len(SERVICES)} services, each its own process", f"{kills} × kill -9"]
        self.say(" · ".join([*parts, f"seed {seed}"]))
        if place.on_kafka:
            self.say(f"broker  {place.shown}   all in-sync replicas have an event before it is acknowledged")
        else:
            self.say(f"broker  {shown(path)}   one file, fsync before every acknowledgement")
        if place.on_postgres:
            self.say(f"store   {place.store_shown}")
        elif place.on_kafka:
            self.say(f"store   {shown(store_path(path.parent.parent))}")
        if anew:
            what = (
                "what an earlier demo kept there is" if place.on_kafka else "the events of the earlier demo there are"
            )
            self.say(f"        {what} gone")
        if bug is not None:
            self.say(f"planted {bug}: a classic bug; the audit below should find what it does")
        self.say()

    def struck(self, kill: Kill, number: int, of: int) -> None:
        if self._is_shown(number, of):
            hands = f"{kill.in_hands:,} event{'s' * (kill.in_hands != 1)} in its hands"
            self.say(f"{kill.at:6.1f} s  kill -9  {kill.service} (pid {kill.pid}), {hands}")

    def back(self, kill: Kill, number: int, of: int) -> None:
        if not self._is_shown(number, of):
            self._kills.append(kill)
            return
        again = f"{kill.delivered_again:,} delivered again"
        if kill.delivered_again < kill.in_hands:
            again = f"only {again}"
        self.say(f"{kill.back_at:6.1f} s  back     {kill.service} (pid {kill.back_pid}), {again}")

    def _is_shown(self, number: int, of: int) -> bool:
        """Few kills are shown all; of many the first."""
        return of <= KILLS_SHOWN or number < KILLS_SHOWN - 2

    def wants_progress(self, seconds: float) -> bool:
        return self._live and seconds - self._drawn >= DRAW_SECONDS

    def progress(self, settled: int, orders: int, seconds: float) -> None:
        rate = f"{settled / seconds:,.0f}/s" if seconds > 0 else ""
        print(f"\r\x1b[K{_bar(settled, orders)}   {rate}", end="", file=sys.stderr, flush=True)
        self._line, self._drawn = True, seconds

    def finished(self, orders: int, settled: int, seconds: float) -> None:
        if self._kills:
            hands, again = sum(k.in_hands for k in self._kills), sum(k.delivered_again for k in self._kills)
            n = len(self._kills)
            self.say(
                f"   …      {n} more kill{'s' * (n != 1)}, {hands:,} events in their hands, {again:,} delivered again"
            )
        self.say(f"{_bar(settled, orders)}   {seconds:.1f} s")
        self.say()

    def interrupted(self) -> None:
        self._clear()
        print("interrupted; no process of the demo is left running", file=sys.stderr)

    def closing(self, result: Result, folder: Path, place: Place, orders: Sequence[Order]) -> None:
        v, books = result.verdict, result.books
        self.say(books_table(books, services=[s for s in SERVICES if s in books.services], color=self._color))
        self.say()
        agree = f"{v.days_agreeing:,} of {v.days:,} days agree, in money and in number"
        self.say(f"THE MONEY   in the file {_dollars(v.in_file_cents)} · settled {_dollars(v.settled_cents)} · {agree}")
        twice = "none was counted twice" if not v.settled_twice else f"{len(v.settled_twice):,} WERE COUNTED TWICE"
        self.say(
            f"{_number(v.delivered_again, 'delivery', 'deliveries')} came twice after a kill; {twice}. "
            f"Order per customer: {_number(v.inversions, 'inversion', 'inversions')}."
        )
        if v.letters_twice:
            self.say(
                f"{_number(v.letters_twice, 'receipt', 'receipts')} went out twice, under the same idempotency key."
            )
        if v.dead and not v.dead_wrongly:
            what = (
                "order of 0.00 cannot be paid; it waits"
                if len(v.dead) == 1
                else "orders of 0.00 cannot be paid; they wait"
            )
            self.say(f"{len(v.dead):,} {what} on the shelf.")
        for line in self._complaints(result):
            self.say(f"\x1b[1;31m{line}\x1b[0m" if self._color else line)
        self.say()
        if result.exit_code == 0:
            self._balanced(result, folder, place, orders)
        if place.on_kafka:
            self.say(f"The topics {place.prefix}* stay on the cluster; delete them when you have seen enough.")
        if place.on_postgres:
            schema = place.prefix.rpartition("unlost-demo-")[2].rstrip(".")
            self.say(
                f"The schema unlost_demo_{schema} stays in the database: drop schema … cascade when you have seen enough."
            )

    def _complaints(self, result: Result) -> list[str]:
        v, lines = result.verdict, missing_lines(result.books, result.named, shown=NAMES_SHOWN)
        for what, ids in (
            ("not settled", v.unsettled),
            ("settled twice", v.settled_twice),
            ("settled, but they should not have been", v.foreign),
            ("without a receipt", v.unsent),
            ("of 0.00 not on the shelf", v.not_on_shelf),
        ):
            if ids:
                more = f", … {len(ids) - NAMES_SHOWN:,} more" if len(ids) > NAMES_SHOWN else ""
                lines.append(f"{_number(len(ids), 'order', 'orders')} {what}: {', '.join(ids[:NAMES_SHOWN])}{more}")
        if v.dead_wrongly:
            lines.append(f"{_number(v.dead_wrongly, 'dead letter', 'dead letters')} that should not be on the shelf")
        lines.extend(result.troubles)
        if not result.complete:
            lines.append("the work did not come to an end: nothing moved any more")
        return ["", *lines] if lines else []

    def _balanced(self, result: Result, folder: Path, place: Place, orders: Sequence[Order]) -> None:
        if result.bug is not None:
            self.say(f"The bug {result.bug} did no harm in this run. Try more: --orders all --kill 20")
            return
        self.say("Nothing was lost. Do not take our word for it:")
        self.say("  unlost demo --break ack-first     the same run with a classic bug: the audit names what it lost")
        some = orders[min(17, len(orders)) - 1].id
        cd = f"cd {shown(folder).removeprefix('./')}"
        self.say(f"  {cd:<33} then: unlost audit · unlost dead list · unlost trace {some}")
        names = {
            "BROKER": place.shown if place.on_kafka else "",
            "STORE": place.store_shown if place.on_postgres else "",
        }
        if any(value and (place.has_secrets or f"UNLOST_{name}" in os.environ) for name, value in names.items()):
            told = " ".join(f"UNLOST_{name}='{value}'" for name, value in names.items() if value)
            self.say(f"  with {told}" + (" (and your password)" if place.has_secrets else ""))

    def _clear(self) -> None:
        if self._line:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._line = False


def shown(path: Path) -> str:
    """A path below the current folder as a relative one."""
    try:
        return f"./{path.relative_to(Path.cwd())}"
    except ValueError:
        return str(path)


def _bar(settled: int, orders: int) -> str:
    full = BAR * settled // max(1, orders)
    return f"orders  {'━' * full}{'╌' * (BAR - full)}  {settled:,} of {orders:,}"


def _dollars(cents: int) -> str:
    return f"${cents // 100:,}.{cents % 100:02d}"


def _number(n: int, one: str, many: str) -> str:
    return f"{n:,} {one if n == 1 else many}"
