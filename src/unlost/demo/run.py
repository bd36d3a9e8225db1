"""`unlost demo`: real orders, four processes, `kill -9` in between, and then the books."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from pathlib import Path

import msgspec

from unlost import App, OutcomeUnknown, Unavailable, UnlostError, UsageError
from unlost.audit import Books
from unlost.brokers.connect import kafka_log
from unlost.brokers.embedded.log import EmbeddedLog
from unlost.brokers.port import Log, Place
from unlost.demo import broker as brokers
from unlost.demo.folder import broker_path, prepare
from unlost.demo.orders import Order, as_they_came, read_orders
from unlost.demo.processes import SERVICES, Processes
from unlost.demo.screen import Kill, Screen
from unlost.demo.service import Place as Delivered
from unlost.demo.verdict import Verdict, compare
from unlost.events import Envelope
from unlost.ops.books import Named, name_missing
from unlost.ops.books import books as balance
from unlost.ops.store import migrate
from unlost.store.connect import records
from unlost.store.port import Look, Records
from unlost.store.progress import Runs
from unlost.store.records import FileRecords
from unlost.world import REAL, World

BATCH = 250  # orders in one publish
LOOK_SECONDS = 0.03
AIM_SECONDS = 0.002  # a batch of orders is handled in a moment
STALL_SECONDS = 20.0  # nothing moves for so long: what is missing will not come any more
QUIET_SECONDS = 1.0
BACK_SECONDS = 15.0
IN_HAND_SECONDS = 0.5  # how long a kill waits for the victim to have something in its hands


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """All that the run found."""

    orders: int
    seed: int
    bug: str | None
    seconds: float
    kills: list[Kill]
    books: Books
    named: list[Named]
    verdict: Verdict
    troubles: list[str]
    complete: bool

    @property
    def exit_code(self) -> int:
        """0: books and file agree; 3: something is lost, doubled or out of order; 5: the work did not come to an end."""
        if not self.books.balanced:
            return 3
        if not self.complete and not self.verdict.settled_twice and not self.verdict.inversions:
            return 5
        return 0 if self.verdict.agrees else 3


def main(
    orders: str = "5000",
    kills: int = 5,
    seed: int = 42,
    break_: str | None = None,
    folder: Path | None = None,
    json: bool = False,
    broker: str | None = None,
    store: str | None = None,
) -> int:
    """Runs the demo and returns its exit code."""
    folder = (folder or Path.cwd() / "unlost-demo").absolute()
    screen = Screen(silent=json)
    log: Log | None = None
    try:
        number = _number(orders)
        if kills < 0:
            raise UsageError("UL1393", "--kill takes the number of kills", found=str(kills), fix="0 or more")
        place = brokers.place(folder, broker, store)
        _check_bug(break_, on_kafka=place.on_kafka)
        chosen = read_orders(number)
        if place.on_kafka:
            log = kafka_log(place.url)  # nothing is made before it answers
        if place.on_postgres and place.store is not None:
            migrate(place.store, operator="demo", reason="a schema of its own")
        shows = not place.has_secrets
        anew = prepare(
            folder,
            place.url if place.on_kafka and shows else "",
            place.store or "" if place.on_postgres and shows else "",
        )
        screen.opening(len(chosen), kills, seed, break_, broker_path(folder), place, anew)
        result = asyncio.run(_Demo(chosen, kills, seed, break_, folder, place, screen, log).run())
    except UnlostError as e:
        print(e, file=sys.stderr)
        return e.exit_code
    except (KeyboardInterrupt, asyncio.CancelledError):
        screen.interrupted()
        return 130
    finally:
        if log is not None:
            log.close()
    if json:
        print(msgspec.json.encode(_as_json(result)).decode())
    else:
        screen.closing(result, folder, place, chosen)
    return result.exit_code


class _Demo:
    def __init__(
        self, orders: list[Order], kills: int, seed: int, bug: str | None, folder: Path, place: brokers.Place,
        screen: Screen, log: Log | None,
    ) -> None:  # fmt: skip
        self.orders = orders
        self.kills = kills
        self.seed = seed
        self.bug = bug
        self.folder = folder
        self.screen = screen
        self.place = place
        self.log = log
        self.chance = World(seed).random
        self.struck: list[Kill] = []
        self.strikes_begun = 0
        self.published = 0
        self.web = App(name="web", broker=place.url, store=place.store or place.url, schema="schema.sql")
        self.processes = Processes(folder, place.url, bug, place.store)
        self.began = REAL.monotonic()
        self._moved = REAL.monotonic()
        self._seen_commits: object = None
        self._ends: dict[Place, int] = {}  # of the log, when it was last asked
        self._records: Records | None = None

    @property
    def dealt(self) -> int:
        """How many orders may be published by now: an equal share before each kill, and one after the last."""
        share = len(self.orders) // (self.kills + 1) + 1
        return min(len(self.orders), share * (self.strikes_begun + 1))

    @property
    def seconds(self) -> float:
        return REAL.monotonic() - self.began

    async def run(self) -> Result:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        try:
            async with self.web:
                for service in SERVICES:
                    self.processes.start(service)
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._take_orders())
                    group.create_task(self._strike_all())
                complete = await self._drained()
                seconds = self.seconds
                self.screen.finished(len(self.orders), self._settled(), seconds)
                await asyncio.to_thread(self.processes.stop)
                return self._result(complete, seconds)
        finally:
            self.processes.stop(grace=5.0)
            if self._records is not None:
                self._records.close()

    # --- the web front -----------------------------------------------------------------------------------

    async def _take_orders(self) -> None:
        """Publishes the orders as they came. They are dealt out so that each kill meets a shop at work."""
        envelopes = [order.placed() for order in as_they_came(self.orders)]
        for start in range(0, len(envelopes), BATCH):
            while start >= self.dealt:
                await self._look()
            await self._publish(envelopes[start : start + BATCH])
            self.published = start + BATCH

    async def _publish(self, batch: list[Envelope]) -> None:
        """Until it is surely accepted. After an unknown outcome the same ids go again: at most duplicates, which `order`
        does not see a second time."""
        while True:
            try:
                await self.web.accept(batch)
                return
            except (OutcomeUnknown, Unavailable):
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise asyncio.CancelledError() from None  # it was Ctrl-C
                await asyncio.sleep(LOOK_SECONDS)

    # --- kill -9 -----------------------------------------------------------------------------------------

    async def _strike_all(self) -> None:
        """The seed says who is struck and at which of its orders; so it does not depend on the machine's speed."""
        for number in range(self.kills):
            victim = self.chance.choice(SERVICES)
            moment = (number + self.chance.uniform(0.1, 0.9)) / (self.kills + 1)
            await self._reached(victim, int(moment * len(self.orders)))
            await self._holding(victim)
            await self._strike(victim)

    async def _reached(self, service: str, done: int) -> None:
        while self._done(service) < done and not self._idle() and not self._stalled():
            await self._look(AIM_SECONDS)

    async def _holding(self, service: str) -> None:
        """A kill tells more about a process that has something in its hands."""
        end = REAL.monotonic() + IN_HAND_SECONDS
        while not self._in_hands(service) and REAL.monotonic() < end:
            await self._look(AIM_SECONDS)

    async def _strike(self, service: str) -> None:
        pid = self.processes.pid(service)
        at = self.seconds
        self.processes.kill(service)
        hands = self._in_hands(service)
        self.processes.start(service)
        self.strikes_begun += 1
        kill = Kill(service=service, pid=pid, at=at, in_hands=len(hands))
        self.screen.struck(kill, len(self.struck), self.kills)
        end = REAL.monotonic() + BACK_SECONDS * self.place.patience
        while not self._is_back(service, hands) and REAL.monotonic() < end:
            await self._look()
        again = len(hands & self.processes.given(service, self.processes.pid(service)).keys())
        back = msgspec.structs.replace(
            kill, back_at=self.seconds, back_pid=self.processes.pid(service), delivered_again=again
        )
        self.struck.append(back)
        self.screen.back(back, len(self.struck) - 1, self.kills)

    def _in_hands(self, service: str) -> set[Delivered]:
        """What the service's process was given to handle, and what has no outcome."""
        given = self.processes.given(service, self.processes.pid(service))
        fated = self.records.read(lambda look: _fated(look, service))
        marked = self.records.read(lambda look: _marked(look, service)) if self.place.on_postgres else set()
        return {p for p in given if p not in marked and (p[0] not in fated or p[1] not in fated[p[0]])}

    def _is_back(self, service: str, hands: set[Delivered]) -> bool:
        """It owns partitions again, and was given again what the dead one had in its hands, or never will be: a planted
        bug may have moved the position past it."""
        pid = self.processes.pid(service)
        sql = "select count(*) from unlost_epoch where service = ? and pid = ?"
        owns = self.records.read(lambda look: look.execute(sql, (service, pid)).fetchone()[0])
        missing = hands - self.processes.given(service, pid).keys()
        positions = self.records.read(lambda look: _positions(look, service)) if missing else {}
        return bool(owns) and all(position < positions[partition] for partition, position in missing)

    # --- looking -----------------------------------------------------------------------------------------

    @property
    def records(self) -> Records:
        """What the services' store says."""
        if self._records is None:
            elsewhere = self.place.store if self.place.on_postgres else None
            self._records = FileRecords(self.web.file) if elsewhere is None else records(elsewhere)
        return self._records

    @property
    def _log(self) -> Log:
        return self.log or EmbeddedLog(self.web.file)

    async def _look(self, pause: float = LOOK_SECONDS) -> None:
        self.processes.look_after()
        if self.screen.wants_progress(self.seconds):
            self.screen.progress(self._settled(), len(self.orders), self.seconds)
        await asyncio.sleep(pause)

    def _idle(self) -> bool:
        """What was published is handled: the victim will not get any further before it is struck."""
        return self.published >= self.dealt and self._at_end()

    async def _drained(self) -> bool:
        while not self._at_end():
            if self._stalled():
                return False
            await self._look()
        return True

    def _at_end(self) -> bool:
        """Every service has handled all there is. Where a planted bug has moved a position past events without an outcome,
        nobody can say whether these will still be handled; then a while without any commit has to do."""
        if not self._is_drained():
            return False
        return not self.records.read(_passed_over) or self._quiet_seconds() > QUIET_SECONDS

    def _is_drained(self) -> bool:
        """Every service is at the end of the log, nobody waits for a retry, and nothing of what was accepted is still on
        its way into the log. First what the store says, then the log: so nothing can hide between the two."""
        log = self._log

        def work() -> bool:
            positions = self.records.read(lambda look: _idle_positions(self.records, look))
            if positions is None or any(at < self._ends.get(p, 0) for p, at in positions):
                return False
            self._ends = dict(log.ends({place for place, _ in positions}))
            return all(at >= self._ends[place] for place, at in positions)

        return log.together(work)

    def _stalled(self) -> bool:
        return self._quiet_seconds() > STALL_SECONDS * self.place.patience or self.processes.given_up

    def _quiet_seconds(self) -> float:
        """How long ago anything was last seen to be committed."""
        commits = self.records.read(_traces)
        if commits != self._seen_commits:
            self._seen_commits, self._moved = commits, REAL.monotonic()
        return REAL.monotonic() - self._moved

    def _done(self, service: str) -> int:
        """Events of a service that came to an end."""
        return self.records.read(lambda look: _ended(look, service))

    def _settled(self) -> int:
        dead = self.records.read(lambda look: _dead(look, "payment"))
        return min(self._done("settlement"), self._done("notification")) + dead

    def _result(self, complete: bool, seconds: float) -> Result:
        books = balance(self.records, log=self._log)
        return Result(
            orders=len(self.orders), seed=self.seed, bug=self.bug, seconds=seconds, kills=self.struck, books=books,
            named=name_missing(self.records, books.missing, log=self._log),
            verdict=compare(self.orders, self.records, self.folder / "letters.txt", self.processes.all_notes()),
            troubles=self.processes.troubles(), complete=complete,
        )  # fmt: skip


def _number(orders: str) -> int | None:
    if orders == "all":
        return None
    with contextlib.suppress(ValueError):
        if int(orders.replace(",", "")) > 0:
            return int(orders.replace(",", ""))
    raise UsageError("UL1394", "--orders takes a number, or `all`", found=repr(orders), fix="--orders 5000")


def _check_bug(name: str | None, *, on_kafka: bool) -> None:
    if name is None:
        return
    from unlost.testing import sabotage

    if name not in sabotage.BUGS:
        raise UsageError(
            "UL1395", f"there is no planted bug named {name!r}",
            found=f"there are {', '.join(sorted(n for n, bug in sabotage.BUGS.items() if not bug.not_in_shop))}",
        )  # fmt: skip
    if without := sabotage.BUGS[name].not_in_shop:
        raise UsageError(
            "UL1397", f"the planted bug {name!r} would change nothing in the shop", found=without,
            fix="--break ack-first; the kill loop and the scenes of the test suite plant this one",
        )  # fmt: skip
    why = sabotage.BUGS[name].only_embedded
    if on_kafka and why:
        raise UsageError(
            "UL1397", f"the planted bug {name!r} makes no sense on Kafka", found=why,
            fix="--break ack-first, or run it on the embedded broker",
        )  # fmt: skip


def _as_json(result: Result) -> dict[str, object]:
    books = result.books
    return {
        "schema": "unlost.demo/1",
        **{name: getattr(result, name) for name in ("orders", "seed", "bug", "seconds", "complete", "kills")},
        "books": books.services,
        "unaccounted": books.unaccounted,
        "balanced": books.balanced,
        "missing": result.named,
        "findings": books.findings,
        "unaccountable": books.unaccountable,
        "verdict": result.verdict,
        "agrees": result.verdict.agrees,
        "troubles": result.troubles,
        "exit_code": result.exit_code,
    }


# --- read from the store, each in its own snapshot ------------------------------------------------------------


def _fated(look: Look, service: str) -> dict[int, Runs]:
    rows = look.execute("select partition, fated from unlost_progress where service = ?", (service,))
    return {partition: Runs.decode(fated) for partition, fated in rows}


def _marked(look: Look, service: str) -> set[Delivered]:
    """What was committed with its handler's own transaction, and whose position is settled after it."""
    rows = look.execute(
        "select p.partition, i.position from unlost_progress p join unlost_inbox i on i.unit = p.number "
        "and i.position >= p.position where p.service = ?",
        (service,),
    )
    return set(rows.fetchall())


def _positions(look: Look, service: str) -> dict[int, int]:
    """From where each partition goes on."""
    rows = look.execute("select partition, position from unlost_progress where service = ?", (service,))
    return dict(rows.fetchall())


def _ended(look: Look, service: str) -> int:
    rows = look.execute("select counts from unlost_progress where service = ?", (service,)).fetchall()
    done = sum(msgspec.json.decode(counts, type=dict[str, int]).get("done", 0) for (counts,) in rows)
    return done + _dead(look, service)


def _dead(look: Look, service: str) -> int:
    sql = "select count(*) from unlost_ledger where service = ? and state = 'dead'"
    (number,) = look.execute(sql, (service,)).fetchone()
    return int(number)


def _idle_positions(records: Records, look: Look) -> list[tuple[Place, int]] | None:
    """From where each service goes on; None while anything waits for a retry or is on its way into the log."""
    if records.accepted(look).events:
        return None
    if look.execute("select 1 from unlost_waiting where due is not null limit 1").fetchone() is not None:
        return None
    rows = look.execute("select service, topic, partition, position from unlost_progress").fetchall()
    if not {service for service, *_ in rows} >= set(SERVICES):
        return None
    return [((topic, partition), position) for _, topic, partition, position in rows]


def _passed_over(look: Look) -> bool:
    """Whether a position is ahead of an event without an outcome. Never so, but for planted bugs."""
    rows = look.execute("select start, position, fated from unlost_progress").fetchall()
    return any(Runs.decode(fated).first_gap(start) < position for start, position, fated in rows)


def _traces(look: Look) -> object:
    """What changes with everything that is settled."""
    position = look.execute("select sum(position), sum(epoch) from unlost_progress").fetchone()
    return position, look.execute("select count(*), max(since) from unlost_ledger").fetchone()
