"""Every state of a hand-off can be left: by a cancel, at once, and by its deadline, which is counted."""

import asyncio
from collections.abc import Callable
from random import Random

import pytest
from kvtransfer_pair import LAYOUT, Pair, memory_pair, prompt_of
from kvtransfer_tally import Tally
from simulation.virtual_time import run
from test_kvtransfer_faults import settle

from core.errors import DeadlineExceeded, PeerLost
from core.telemetry.reclaim import Reclaims
from kvtransfer.liveness import LeaseTerms, Timing
from kvtransfer.memory import CALM, Mischief
from kvtransfer.messages import HandoffKey
from kvtransfer.session_memory import Weather
from kvtransfer.states import Deadlines, State

KEY = HandoffKey("r", 1)
QUICK = Timing(lease=LeaseTerms(), deadlines=Deadlines(queued_s=4.0, granted_s=3.0, streaming_s=2.0, sealed_s=1.0))


class Timed(Tally):
    """Counts for both ends, and times how long a cancelled hand-off keeps pages from others, at whichever end."""

    def __init__(self) -> None:
        super().__init__()
        self.reclaim_s: list[float] = []
        self.reclaims = Reclaims(lambda: asyncio.get_running_loop().time(), self.reclaim_s.append)

    def held_back(self, key: HandoffKey) -> None:
        super().held_back(key)
        self.reclaims.hold((key.request_id, key.attempt))

    def let_go(self, key: HandoffKey) -> None:
        super().let_go(key)
        self.reclaims.let_go((key.request_id, key.attempt))


def lasting(pair: Pair, state: State) -> bool:
    """Both ends are in this state."""
    return pair.p.link.counts()[state.value] == pair.d.link.counts()[state.value] == 1


async def until(holds: Callable[[], bool], within_s: float = 5.0) -> None:
    async with asyncio.timeout(within_s):
        while not holds():
            await asyncio.sleep(0.0002)


# --- cancelled -------------------------------------------------------------------------------------------------

STOPS: dict[State, int | None] = {State.QUEUED: None, State.GRANTED: 0, State.STREAMING: 2, State.SEALED: None}


@pytest.mark.parametrize("hang", [0.0, 1.0], ids=["fetches return", "fetches hang"])
@pytest.mark.parametrize("where", ["source", "receiver", "both"])
@pytest.mark.parametrize("state", STOPS, ids=lambda state: state.value)
def test_a_cancel_in_any_state_reaches_both_ends_and_frees_their_pages(state: State, where: str, hang: float) -> None:
    async def scenario() -> None:
        tally = Timed()
        slow = Mischief(delay_s=0.5 if state is State.SEALED else 0.001, ghost_delay_s=0.001, hang=hang)
        pair = await memory_pair(1, mischief=slow, weather=Weather(delay_s=0.001), counters=tally)
        full = pair.d.pool.allocate(64) if state is State.QUEUED else None
        task = pair.submit(KEY, prompt_of(Random(1), 100), stop_after=STOPS[state])
        await until(lambda: lasting(pair, state))
        tally.reclaims.cancelled((KEY.request_id, KEY.attempt))
        for end in (pair.p, pair.d):
            if where in ("both", "source" if end is pair.p else "receiver"):
                end.link.cancel(KEY)
        await until(lambda: KEY in pair.d.aborted and (KEY in pair.p.closed or task.done()), 0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        tally.reclaims.let_go((KEY.request_id, KEY.attempt))
        await until(lambda: len(tally.reclaim_s) == 1, 0.05)
        pair.d.pool.release_all(full or [])
        for pool in (pair.p.pool, pair.d.pool):
            assert pool.counts()["leased"] == pool.counts()["quarantined"] == pool.counts()["owned"] == 0
        assert tally.reclaim_s[0] < 0.05, "a few messages, and no deadline"
        await settle(pair)
        # The source stops what moves at once: a fetch that it ended may be noticed before its word has come.
        lost = tally.seen[(State.ABORTED, "peer_lost")] if where == "source" else 0
        assert tally.seen[(State.ABORTED, "cancelled")] + lost == 2
        await pair.close()

    run(scenario())


def test_a_cancel_that_crosses_the_commit_is_counted_as_what_it_was() -> None:
    """The client has its answer, the router cancels everywhere, and the source hears that before the receiver."""

    async def scenario() -> None:
        tally = Tally()
        pair = await memory_pair(1, counters=tally)
        pair.submit(KEY, prompt_of(Random(1), 100))
        await pair.d.until_ended(KEY)
        pair.p.link.cancel(KEY)
        await settle(pair)
        assert tally.seen[(State.COMMITTED, "")] == 2 and tally.seen["pages"] == 14
        assert not [key for key in +tally.seen if isinstance(key, tuple) and key[0] is State.ABORTED]
        await pair.close()

    run(scenario())


@pytest.mark.parametrize("answer", ["lost", "aborted"])
def test_a_source_that_gives_up_after_its_seal_counts_what_the_receiver_made_of_it(answer: str) -> None:
    async def scenario() -> None:
        tally = Tally()
        pair = await memory_pair(1, mischief=Mischief(hang=1.0), counters=tally)
        pair.submit(KEY, prompt_of(Random(1), 100))
        await until(lambda: lasting(pair, State.SEALED))
        if answer == "lost":
            pair.network.kill(pair.d.me)
            pair.fabric.kill(pair.d.me)
        pair.p.link.cancel(KEY)
        assert not tally.seen[(State.ABORTED, "cancelled")]
        await until(lambda: pair.p.link.idle, 10.0)
        assert tally.seen[(State.ABORTED, "cancelled")] >= 1 and not tally.seen[(State.COMMITTED, "")]
        await pair.close()

    run(scenario())


# --- too late --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", STOPS, ids=lambda state: state.value)
def test_every_state_has_a_deadline_that_is_counted(state: State) -> None:
    async def scenario() -> None:
        tally = Tally()
        hang = 1.0 if state is State.SEALED else 0.0
        pair = await memory_pair(1, mischief=Mischief(hang=hang), timing=QUICK, counters=tally)
        pair.p.link.meet(pair.to_d)
        prompt = prompt_of(Random(1), 100)
        if state is State.QUEUED:
            pair.d.expect(KEY, prompt, pair.to_p)  # and the source, which lives, never asks for its pages
        else:
            pair.submit(KEY, prompt, stop_after=STOPS[state])
        limit_s = QUICK.deadlines.of(state)
        assert limit_s is not None
        await asyncio.sleep(limit_s)
        assert KEY not in pair.d.aborted
        await pair.d.until_ended(KEY, 0.6)
        error, blames = pair.d.aborted[KEY]
        assert isinstance(error, DeadlineExceeded) and blames == pair.p.me
        assert tally.seen[("expired", state)] >= 1
        for task in pair.tasks:
            task.cancel()
        await asyncio.gather(*pair.tasks, return_exceptions=True)
        await settle(pair)
        await pair.close()

    run(scenario())


def test_an_end_that_nobody_confirms_is_counted_too() -> None:
    async def scenario() -> None:
        tally = Tally()
        pair = await memory_pair(1, mischief=CALM, counters=tally)
        pair.submit(KEY, prompt_of(Random(1), 100), stop_after=2)
        await until(lambda: lasting(pair, State.STREAMING))
        pair.network.weather = Weather(lose=1.0)  # the session stands, and nothing comes through
        pair.p.link.cancel(KEY)
        await until(lambda: pair.p.link.idle, 20.0)
        assert tally.seen[("expired", State.ABORTED)] == 1
        await pair.close()

    run(scenario())


def test_a_source_that_died_before_it_dialled_is_missed_in_seconds() -> None:
    async def scenario() -> None:
        pair = await memory_pair(1)
        pair.network.kill(pair.p.me)
        pair.d.expect(KEY, prompt_of(Random(1), 100), pair.to_p, deadline_s=600.0)
        terms = LeaseTerms()
        await pair.d.until_ended(KEY, terms.connect_s + 2 * terms.tick_s)
        error, blames = pair.d.aborted[KEY]
        assert isinstance(error, PeerLost) and blames == pair.p.me
        await settle(pair)
        await pair.close()

    run(scenario())


def test_a_source_that_waits_for_its_turn_is_met_and_not_missed() -> None:
    async def scenario() -> None:
        pair = await memory_pair(1)
        pair.p.link.meet(pair.to_d)  # when the prompt was queued
        pair.d.expect(KEY, prompt_of(Random(1), 100), pair.to_p, deadline_s=600.0)
        await asyncio.sleep(60.0)
        assert not pair.d.aborted
        await pair.prefill(KEY, prompt_of(Random(1), 100))
        await pair.d.until_ended(KEY)
        assert pair.d.commits == [KEY]
        await settle(pair)
        await pair.close()

    run(scenario())


def test_a_source_that_is_no_longer_needed_is_not_cut_off_for_not_coming() -> None:
    async def scenario() -> None:
        pair = await memory_pair(1)
        pair.d.expect(HandoffKey("given up", 1), prompt_of(Random(1), 100), pair.to_p)
        pair.d.link.cancel(HandoffKey("given up", 1))
        pair.p.link.meet(pair.to_d)
        await asyncio.sleep(LeaseTerms().connect_s - 0.1)
        pair.submit(KEY, prompt_of(Random(1), 160), chunk_s=0.1)
        await pair.d.until_ended(KEY)
        assert pair.d.commits == [KEY]
        await settle(pair)
        await pair.close()

    run(scenario())


# --- what was hidden -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("chunk_s", "hidden"), [(0.05, 8), (0.0, 0)], ids=["slow chunks", "at once"])
def test_the_receipt_says_what_compute_hid(chunk_s: float, hidden: int) -> None:
    """Eight chunks: all but the last move while later ones are computed, if that takes long enough."""

    async def scenario() -> None:
        pair = await memory_pair(1, mischief=Mischief(delay_s=0.002))
        pair.submit(KEY, prompt_of(Random(1), 136), chunk_pages=1, chunk_s=chunk_s)
        await pair.d.until_ended(KEY)
        receipt = pair.d.receipts[KEY]
        assert receipt.transferred_bytes == 9 * LAYOUT.page_bytes
        assert receipt.hidden_bytes == hidden * LAYOUT.page_bytes
        assert receipt.overlap == pytest.approx(hidden / 9)
        assert 0 < receipt.exposed_transfer_s <= receipt.transfer_s
        await settle(pair)
        await pair.close()

    run(scenario())


def test_a_prompt_that_the_receiver_has_moves_nothing() -> None:
    async def scenario() -> None:
        pair = await memory_pair(1)
        for number in range(2):
            key = HandoffKey(f"r{number}", 1)
            pair.submit(key, prompt_of(Random(1), 96))
            await pair.d.until_ended(key)
            pair.d.drop(key)
        receipt = pair.d.receipts[HandoffKey("r1", 1)]
        assert receipt.transferred_bytes == receipt.hidden_bytes == 0 and receipt.transfer_s == 0.0
        assert receipt.overlap is None
        await settle(pair)
        await pair.close()

    run(scenario())
