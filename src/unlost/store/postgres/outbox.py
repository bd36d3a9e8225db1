"""The outbox in PostgreSQL, as relays empty it.

Transactions commit in another order than they took their numbers, so nobody reads on from a number here: a row is to be
sent if it is visible and in nobody's hands. Relays share the outbox by shards. A key is in one shard, a shard in the hands
of one relay at a time; taking it over begins a new epoch, and whoever slept through that writes nothing any more.

**Guarantee** a row is numbered and noted as this relay's in a commit before it is sent, and leaves in a commit that has
the broker's receipt behind it. The numbers of a shard have no gap: `next - 1 = confirmed + those in hands`.
**After a crash** whoever takes the shard sends what was in hands again, with the same ids and numbers.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from unlost.errors import Fenced, OutcomeUnknown, invariant
from unlost.store.port import Lane, Mirrored, Unsent
from unlost.store.postgres.client import Client, Listener
from unlost.store.postgres.rows import STORED, envelope_of
from unlost.store.postgres.schema import SHARDS
from unlost.store.steps import Steps, one

if TYPE_CHECKING:
    from unlost.store.postgres.store import PostgresStore

CLAIM_SECONDS = 1.0  # how often the other relays are looked at
POLL_SECONDS = 0.2
GATHER_SECONDS = 0.02  # where events come faster than they are sent one by one, so long some are gathered
GATHER_BELOW = 100  # a batch that was larger is worth its commit
HUNG_SECONDS = 15  # a relay that gives no sign of life for so long is replaced
LIVES = (
    "exists (select 1 from unlost_process p join pg_locks l on l.objid = p.number and l.locktype = 'advisory' "
    "and l.classid = ?::integer and l.objsubid = 2 and l.granted "
    "and l.database = (select oid from pg_database where datname = current_database()) "
    "where p.id = {process} and p.seen > now() - make_interval(secs => ?))"
)


class _Raw(msgspec.Struct, frozen=True):
    origin: tuple[str, int]
    headers: Sequence[tuple[str, bytes | None]]


_raw = msgspec.json.Decoder(_Raw).decode


class PostgresOutbox:
    """One relay's part of it."""

    def __init__(self, client: Client, listener: Listener, store: PostgresStore) -> None:
        self._client = client
        self._listener = listener
        self._store = store
        self._news = listener.subscribe()
        self._epochs: dict[int, int] = {}  # shards of this relay
        self._looked = float("-inf")
        self._hands: dict[int, tuple[Unsent, int, int]] = {}  # sent or about to be: row, shard, number
        self._confirmed: dict[int, int] = {}  # the broker has these, the database does not know yet: row -> shard
        self._gather = False

    async def claim(self) -> bool:
        """Every relay may have its fair share; a surplus is given up, what nobody alive has is taken."""
        now = asyncio.get_running_loop().time()
        if now - self._looked >= CLAIM_SECONDS:
            self._looked = now
            self._store.relays = True
            confirmed = dict(self._confirmed)
            try:
                shares = await self._client.commit(lambda: self._share(confirmed))
            except OutcomeUnknown:
                self._forget()
                raise
            for number in confirmed:
                self._confirmed.pop(number, None)
            for shard in list(self._epochs):
                if shares.get(shard) != self._epochs[shard]:
                    self._lose(shard)
            for shard, epoch in shares.items():
                if shard not in self._epochs:
                    await self._take_up(shard)
                    self._epochs[shard] = epoch
        self._store.sends_copies = 0 in self._epochs
        self._store.sends_all = len(self._epochs) == SHARDS
        return bool(self._epochs)

    def _share(self, confirmed: Mapping[int, int]) -> Steps[dict[int, int]]:
        """One step towards everybody's fair share, in one commit; returns the shards of this relay with their epochs. What
        is confirmed goes with it, so that under load, too, a part can be given up with nothing of it in hands."""
        me, lock = self._store.process_id, self._client.settings.lock_class
        yield "update unlost_process set relays = true where id = ? and not relays", (me,)
        rows = yield (
            f"select r.shard, r.process, r.epoch, r.process = ? or {LIVES.format(process='r.process')} "
            "from unlost_relay r order by r.shard for update of r",
            (me, lock, HUNG_SECONDS),
        )
        (others,) = yield from one(
            f"select count(*) from unlost_process q where q.relays and q.id <> ? and {LIVES.format(process='q.id')}",
            (me, lock, HUNG_SECONDS),
        )
        share = -(-SHARDS // (others + 1))
        mine = {shard: epoch for shard, process, epoch, _ in rows if process == me}
        free = [shard for shard, process, _, lives in rows if process is None or not lives]
        still_mine = [n for n, shard in confirmed.items() if shard in mine and mine[shard] == self._epochs.get(shard)]
        if still_mine:
            yield from _confirm(still_mine)
        busy = {shard for _, shard, _ in self._hands.values()}
        idle = [shard for shard in mine if shard not in busy]
        for shard in idle[: max(0, len(mine) - share)]:
            yield "update unlost_relay set process = null where shard = ? and process = ?", (shard, me)
            del mine[shard]
        for shard in free[: max(0, share - len(mine))]:
            row = yield from one(
                "update unlost_relay set process = ?, epoch = epoch + 1 where shard = ? returning epoch", (me, shard)
            )
            mine[shard] = row[0]
        return mine

    async def _take_up(self, shard: int) -> None:
        """What its last relay had in hands comes first, under the numbers that it has."""

        def steps() -> Steps[list[tuple[Unsent, int, int]]]:
            rows = yield (
                f"select {STORED} from unlost_outbox_status s join unlost_outbox o on o.seq = s.seq "
                "where s.shard = ? order by s.number",
                (shard,),
            )
            return [(Unsent(number=row[0], envelope=envelope_of(row)), row[1], row[2]) for row in rows]

        self._hands.update({found[0].number: found for found in await self._client.read(steps())})

    def _lose(self, shard: int) -> None:
        self._epochs.pop(shard, None)
        self._hands = {n: found for n, found in self._hands.items() if found[1] != shard}
        self._confirmed = {n: held for n, held in self._confirmed.items() if held != shard}

    async def next(self, held: Collection[Lane], limit: int) -> Sequence[Unsent]:
        """Confirms what was sent, and claims what is to be sent next, in one commit."""
        if self._gather:
            await asyncio.sleep(GATHER_SECONDS)
        self._gather = False
        called = self._news.is_set() and len(self._epochs) == SHARDS  # then it is for us
        self._news.clear()
        waiting = [found for found in self._hands.values() if found[0].lane not in held]
        again = waiting[:limit]
        if again and not self._confirmed:
            return [row for row, _, _ in again]
        if not (again or self._confirmed or called or await self._client.read(self._any(held))):
            return []
        confirmed = list(self._confirmed)
        try:
            rows = await self._client.commit(lambda: self._confirm_and_claim(confirmed, held, 0 if again else limit))
        except Fenced:  # whoever has the shard now sends again what was in our hands, and confirms it
            self._forget()
            return []
        except OutcomeUnknown:
            self._forget()
            raise
        for number in confirmed:
            self._confirmed.pop(number, None)
        for found in rows:
            self._hands[found[0].number] = found
        return [row for row, _, _ in again] or [row for row, _, _ in rows]

    def _any(self, held: Collection[Lane]) -> Steps[bool]:
        """A look that writes nothing: most of the time there is nothing to do."""
        rows = yield f"select 1 {self._unclaimed(held)} limit 1", self._which(held)
        return bool(rows)

    def _unclaimed(self, held: Collection[Lane]) -> str:
        text = "from unlost_outbox o where o.shard = any(?::smallint[])"
        if self._hands:
            text += " and o.seq <> all(?::bigint[])"
        if held:
            text += (
                " and not exists (select 1 from unnest(?::text[], ?::bytea[]) as h(topic, key) where h.topic = o.aggregatetype "
                "and h.key is not distinct from coalesce(o.rawkey, convert_to(o.aggregateid, 'UTF8')))"
            )
        return text

    def _which(self, held: Collection[Lane]) -> list[object]:
        bindings: list[object] = [sorted(self._epochs)]
        if self._hands:
            bindings.append(sorted(self._hands))
        if held:
            bindings += [[topic for topic, _ in held], [key for _, key in held]]
        return bindings

    def _confirm_and_claim(
        self, confirmed: Sequence[int], held: Collection[Lane], limit: int
    ) -> Steps[list[tuple[Unsent, int, int]]]:
        me, mine = self._store.process_id, dict(self._epochs)
        rows = yield (
            "select shard, process, epoch from unlost_relay where shard = any(?::smallint[]) order by shard for update",
            (sorted(mine),),
        )
        if any(process != me or epoch != mine[shard] for shard, process, epoch in rows):
            raise Fenced("UL2103", "another relay has a part of the outbox that was ours")
        if confirmed:
            yield from _confirm(confirmed)
        if not limit:
            return []
        found = yield (
            "with chosen as (select o.seq, o.shard, row_number() over (partition by o.shard order by o.seq) as place "
            f"from (select o.seq, o.shard {self._unclaimed(held)} order by o.seq limit {limit:d}) o), "
            "counted as (select shard, count(*) as many from chosen group by shard), "
            "moved as (update unlost_relay r set next = r.next + c.many from counted c where r.shard = c.shard "
            "returning r.shard, r.next - c.many as first), "
            "s as (insert into unlost_outbox_status (seq, shard, number) select c.seq, c.shard, m.first + c.place - 1 "
            "from chosen c join moved m on m.shard = c.shard returning seq, number) "
            f"select {STORED} from s join unlost_outbox o on o.seq = s.seq order by o.seq",
            self._which(held),
        )
        return [(Unsent(number=row[0], envelope=envelope_of(row)), row[1], row[2]) for row in found]

    async def sent(self, numbers: Sequence[int]) -> None:
        """Kept in memory until the next commit: a crash before it only means that they are sent again."""
        self._gather = self._news.is_set() and len(numbers) < GATHER_BELOW  # more has come meanwhile
        for number in numbers:
            found = self._hands.pop(number, None)
            if found is not None:
                self._confirmed[number] = found[1]

    async def wait(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(seconds, POLL_SECONDS)):
                await self._news.wait()

    async def give(self) -> None:
        """Confirms what is known, and lets others have the rest."""
        confirmed, me = list(self._confirmed), self._store.process_id
        self._store.relays = self._store.sends_all = False

        def steps() -> Steps[None]:
            if confirmed and self._epochs:
                yield from self._confirm_and_claim(confirmed, (), 0)
            yield "update unlost_relay set process = null where process = ?", (me,)
            yield "update unlost_process set relays = false where id = ?", (me,)

        with contextlib.suppress(Fenced):
            await self._client.commit(steps)
        self._forget()
        self._store.wake()

    def _forget(self) -> None:
        """Begins anew: what the tables say is in our hands is read again."""
        self._looked = float("-inf")
        self._epochs.clear()
        self._hands.clear()
        self._confirmed.clear()

    async def close(self) -> None:
        self._listener.unsubscribe(self._news)


def _confirm(numbers: Sequence[int]) -> Steps[None]:
    """Takes rows out that the broker has confirmed, and counts them."""
    (gone,) = yield from one(
        "with gone as (delete from unlost_outbox_status where seq = any(?::bigint[]) returning shard), "
        "taken as (delete from unlost_outbox where seq = any(?::bigint[])), "
        "counted as (update unlost_relay r set confirmed = confirmed + g.many "
        "from (select shard, count(*) as many from gone group by shard) g where r.shard = g.shard) "
        "select count(*) from gone",
        (list(numbers), list(numbers)),
    )
    invariant(gone == len(numbers), "what was sent had been claimed")


class PostgresCopies:
    """Copies of dead letters: whoever relays shard 0 sends them."""

    def __init__(self, client: Client, store: PostgresStore) -> None:
        self._client = client
        self._store = store

    async def claim(self) -> bool:
        return self._store.sends_copies

    async def page(self, after: int, limit: int) -> Sequence[Mirrored]:
        def steps() -> Steps[list[Mirrored]]:
            rows = yield (
                f"select number, topic, key, data, raw from unlost_copy where number > ? order by number limit {limit:d}",
                (after,),
            )
            return [
                Mirrored(
                    number=number, topic=topic, origin=_raw(raw).origin, key=None if key is None else bytes(key),
                    data=None if data is None else bytes(data), headers=_raw(raw).headers,
                )
                for number, topic, key, data, raw in rows
            ]  # fmt: skip

        return await self._client.read(steps())

    async def sent(self, numbers: Sequence[int]) -> None:
        def steps() -> Steps[None]:
            yield "delete from unlost_copy where number = any(?::bigint[])", (list(numbers),)

        await self._client.commit(steps)

    async def wait(self, seconds: float) -> None:
        """Nobody calls for a copy: there are few, and nothing waits for them."""
        await asyncio.sleep(min(seconds, POLL_SECONDS))

    async def give(self) -> None:
        """The outbox gives its shards."""

    async def close(self) -> None:
        """There is nothing to let go of."""
