"""Whole hand-offs in virtual time, over lossy sessions and a haunted fabric: the right pages or one clear error."""

import asyncio
from collections.abc import Coroutine
from random import Random
from typing import Any

import pytest
from kvtransfer_pair import Pair, Prompt, memory_pair, prompt_of
from simulation.virtual_time import run

from core.errors import (
    Cancelled,
    DeadlineExceeded,
    DigestMismatch,
    EngineError,
    HandoffError,
    NoCapacity,
    PeerLost,
    PlaceMismatch,
    StalePage,
)
from core.messages import Token, WorkerId
from kvtransfer.liveness import LeaseTerms, Liveness, Timing
from kvtransfer.memory import CALM, Mischief
from kvtransfer.messages import Close, Failed, HandoffKey
from kvtransfer.places import FilledPage
from kvtransfer.session_memory import Weather
from kvtransfer.states import Deadlines, State

KEY = HandoffKey("r", 1)
QUICK = Timing(lease=LeaseTerms(), deadlines=Deadlines(granted_s=20.0, streaming_s=20.0, sealed_s=10.0))


async def settle(pair: Pair, timeout_s: float = 120.0) -> None:
    """Until nothing is held for anybody, then the books."""
    async with asyncio.timeout(timeout_s):
        while not (pair.p.link.idle and pair.d.link.idle):
            await asyncio.sleep(0.1)
    for key in list(pair.d.committed):
        pair.d.drop(key)
    assert not pair.d.wrong
    for pool in (pair.p.pool, pair.d.pool):
        pool.check()
        counts = pool.counts()
        assert counts["owned"] == counts["leased"] == counts["quarantined"] == 0, counts
    assert not pair.fabric.touched(pair.d.me)


def in_virtual_time(scenario: Coroutine[Any, Any, None]) -> None:
    run(scenario)


# --- one fault at a time -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 32, 100, 160])
def test_prompts_of_every_shape_arrive_whole(tokens: int) -> None:
    async def scenario() -> None:
        pair = await memory_pair(1)
        prompt = prompt_of(Random(1), tokens)
        pair.submit(KEY, prompt)
        await pair.d.until_ended(KEY)
        assert pair.d.commits == [KEY]
        assert pair.d.receipts[KEY].transferred_tokens == pair.d.receipts[KEY].prompt_tokens == tokens
        assert pair.d.receipts[KEY].exposed_transfer_s >= 0.0
        assert pair.d.tokens[KEY] == (Token(0, 0, 7, -0.5, ((7, -0.5), (8, -1.5))),)
        await settle(pair)
        assert pair.p.closed == {KEY: (State.COMMITTED, None)}
        await pair.close()

    in_virtual_time(scenario())


def test_what_the_receiver_has_is_not_sent() -> None:
    async def scenario() -> None:
        pair = await memory_pair(1)
        first = prompt_of(Random(1), 100)
        longer = Prompt((*first.ids[:80], *range(50)))
        same = Prompt(first.ids[:96])
        for number, prompt in enumerate((first, longer, same)):
            key = HandoffKey(f"r{number}", 1)
            pair.submit(key, prompt)
            await pair.d.until_ended(key)
            pair.d.drop(key)
        moved = [receipt.transferred_tokens for receipt in pair.d.receipts.values()]
        assert moved == [100, 50, 0]
        await settle(pair)
        await pair.close()

    in_virtual_time(scenario())


def test_next_may_come_before_the_submit_and_is_refused_when_there_is_none() -> None:
    async def scenario() -> None:
        pair = await memory_pair(1)
        early = pair.prefill(KEY, prompt_of(Random(1), 40))
        never = pair.prefill(HandoffKey("never", 1), prompt_of(Random(1), 40))
        await asyncio.sleep(1.0)
        pair.d.expect(KEY, prompt_of(Random(1), 40), pair.to_p)
        await pair.d.until_ended(KEY)
        await early
        with pytest.raises(HandoffError, match="never submitted"):
            await never
        await settle(pair)
        await pair.close()

    in_virtual_time(scenario())


def test_without_room_the_source_asks_until_its_deadline_and_computes_nothing() -> None:
    async def scenario() -> None:
        pair = await memory_pair(1, pages=8)
        held = pair.d.pool.allocate(5)
        assert held is not None
        first = pair.submit(KEY, prompt_of(Random(1), 100), deadline_s=2.0)
        with pytest.raises(NoCapacity):
            await first
        assert not pair.p.granted and pair.p.pool.counts()["owned"] == 0
        second = HandoffKey("s", 1)
        task = pair.submit(second, prompt_of(Random(1), 100), deadline_s=10.0)
        await asyncio.sleep(1.0)
        pair.d.pool.release_all(held)
        await task
        await pair.d.until_ended(second)
        assert pair.d.commits == [second]
        await settle(pair)
        await pair.close()

    in_virtual_time(scenario())


def test_an_engine_that_mixes_prompts_up_is_found_out_before_a_byte_moves() -> None:
    async def scenario() -> None:
        pair = await memory_pair(1)
        mine, other = prompt_of(Random(1), 64), prompt_of(Random(2), 64)
        pair.d.expect(KEY, mine, pair.to_p)
        await pair.p.link.offer(KEY, pair.to_d, 64, 1, 10.0)
        pages = pair.p.pool.allocate(1)
        assert pages is not None
        pair.p.link.ready(KEY, [pair.p.write(0, other.hashes[0], pages[0])])
        await pair.d.until_ended(KEY)
        error, blames = pair.d.aborted[KEY]
        assert isinstance(error, PlaceMismatch) and blames == pair.p.me
        assert not pair.fabric.touched(pair.d.me)
        await asyncio.sleep(1.0)
        outcome, said = pair.p.closed[KEY]
        assert outcome is State.ABORTED and isinstance(said, PlaceMismatch)
        pair.p.pool.release_all(pages)
        await settle(pair)
        await pair.close()

    in_virtual_time(scenario())


def test_two_pages_of_one_prompt_in_each_others_place_are_found_out() -> None:
    async def scenario() -> None:
        pair = await memory_pair(1)
        prompt = prompt_of(Random(1), 64)
        pair.d.expect(KEY, prompt, pair.to_p)
        await pair.p.link.offer(KEY, pair.to_d, 64, 1, 10.0)
        pages = pair.p.pool.allocate(2)
        assert pages is not None
        swapped = [FilledPage(0, prompt.hashes[1], pages[0]), FilledPage(1, prompt.hashes[0], pages[1])]
        pair.p.link.ready(KEY, swapped)
        await pair.d.until_ended(KEY)
        assert isinstance(pair.d.aborted[KEY][0], PlaceMismatch)
        pair.p.pool.release_all(pages)
        await settle(pair)
        await pair.close()

    in_virtual_time(scenario())


def test_wrong_bytes_are_fetched_once_more_and_then_the_source_has_failed() -> None:
    async def scenario() -> None:
        pair = await memory_pair(1, mischief=Mischief(corrupt=1.0, ghosts=False))
        pair.submit(KEY, prompt_of(Random(1), 40))
        await pair.d.until_ended(KEY)
        error, blames = pair.d.aborted[KEY]
        assert isinstance(error, DigestMismatch) and blames == pair.p.me
        await settle(pair)
        assert pair.d.pool.counts()["cached"] == 0
        await pair.close()

    in_virtual_time(scenario())


def test_one_flipped_bit_in_ten_pages_costs_a_second_fetch_and_no_request() -> None:
    async def scenario() -> None:
        pair = await memory_pair(3, pages=200, mischief=Mischief(steps=1, corrupt=0.1))
        for number in range(30):
            key = HandoffKey(f"r{number}", 1)
            pair.submit(key, prompt_of(Random(number), 80))
            await pair.d.until_ended(key)
            if key in pair.d.committed:
                pair.d.drop(key)
        assert len(pair.d.commits) >= 25 and not pair.d.wrong
        await settle(pair)
        await pair.close()

    in_virtual_time(scenario())


def test_what_was_verified_before_an_abort_is_a_prefix_hit_for_the_next_attempt() -> None:
    async def scenario() -> None:
        pair = await memory_pair(1)
        prompt = prompt_of(Random(1), 100)
        stuck = pair.submit(KEY, prompt, chunk_pages=1, stop_after=4)
        await asyncio.sleep(1.0)
        pair.p.link.fail(KEY, EngineError("a step failed"))
        await pair.d.until_ended(KEY)
        error, blames = pair.d.aborted[KEY]
        assert isinstance(error, EngineError) and blames == pair.p.me
        second = HandoffKey("r", 2)
        pair.submit(second, prompt)
        await pair.d.until_ended(second)
        assert pair.d.receipts[second].transferred_tokens == 100 - 4 * 16
        stuck.cancel()
        await asyncio.gather(stuck, return_exceptions=True)
        await settle(pair)
        await pair.close()

    in_virtual_time(scenario())


@pytest.mark.parametrize("after_s", [0.0, 0.0004, 0.001, 0.002, 0.004, 0.006, 0.01, 0.02])
@pytest.mark.parametrize("where", ["source", "receiver"])
def test_a_cancel_at_any_time_reaches_both_ends(after_s: float, where: str) -> None:
    async def scenario() -> None:
        pair = await memory_pair(1, mischief=Mischief(delay_s=0.002))
        task = pair.submit(KEY, prompt_of(Random(1), 100))
        await asyncio.sleep(after_s)
        (pair.p if where == "source" else pair.d).link.cancel(KEY)
        await asyncio.wait_for(asyncio.gather(task, return_exceptions=True), 5.0)
        await pair.d.until_ended(KEY, 5.0)
        if KEY in pair.d.aborted:
            assert isinstance(pair.d.aborted[KEY][0], Cancelled)
        await settle(pair, 20.0)
        await pair.close()

    in_virtual_time(scenario())


def test_a_cancel_that_overtakes_its_submit_still_counts() -> None:
    async def scenario() -> None:
        pair = await memory_pair(1)
        pair.p.link.cancel(KEY)
        pair.d.link.cancel(KEY)
        task = pair.submit(KEY, prompt_of(Random(1), 100))
        with pytest.raises(Cancelled):
            await task
        assert isinstance(pair.d.aborted[KEY][0], Cancelled)
        await settle(pair)
        await pair.close()

    in_virtual_time(scenario())


def test_an_older_attempt_is_over_when_a_newer_one_comes() -> None:
    async def scenario() -> None:
        pair = await memory_pair(1)
        prompt = prompt_of(Random(1), 100)
        old = pair.submit(KEY, prompt, stop_after=1)
        await asyncio.sleep(0.1)
        second = HandoffKey("r", 2)
        pair.submit(second, prompt)
        await pair.d.until_ended(second)
        assert isinstance(pair.d.aborted[KEY][0], Cancelled) and pair.d.commits == [second]
        pair.d.expect(KEY, prompt, pair.to_p)  # said again, it is not told again: on_abort would find it
        old.cancel()
        await asyncio.gather(old, return_exceptions=True)
        await settle(pair)
        await pair.close()

    in_virtual_time(scenario())


@pytest.mark.parametrize("chunk", [0, 1, 2])
def test_a_source_that_hangs_is_given_up_in_time_and_blamed(chunk: int) -> None:
    async def scenario() -> None:
        pair = await memory_pair(1, timing=QUICK)
        stuck = pair.submit(KEY, prompt_of(Random(1), 100), stop_after=chunk)
        await pair.d.until_ended(KEY, 40.0)
        error, blames = pair.d.aborted[KEY]
        assert isinstance(error, DeadlineExceeded) and blames == pair.p.me
        stuck.cancel()
        await asyncio.gather(stuck, return_exceptions=True)
        await settle(pair)
        await pair.close()

    in_virtual_time(scenario())


def test_a_fetch_that_never_ends_gives_its_pages_back_once_the_source_has_drained() -> None:
    async def scenario() -> None:
        pair = await memory_pair(1, mischief=Mischief(hang=1.0), timing=QUICK)
        pair.submit(KEY, prompt_of(Random(1), 100))
        await asyncio.sleep(1.0)
        assert pair.fabric.touched(pair.d.me)
        await pair.d.until_ended(KEY, 40.0)
        await settle(pair)
        await pair.close()

    in_virtual_time(scenario())


@pytest.mark.parametrize("chunk", range(5))
def test_a_source_that_dies_takes_nothing_with_it(chunk: int) -> None:
    """Its late bytes hurt nobody: every page that they can reach stays out of use until it is cut off."""

    async def scenario() -> None:
        pair = await memory_pair(chunk, pages=16, mischief=Mischief(delay_s=0.003, ghost_delay_s=0.001))
        pair.submit(KEY, prompt_of(Random(1), 100), chunk_pages=1, chunk_s=0.01, stop_after=chunk)
        await asyncio.sleep(0.001 + 0.01 * chunk)
        pair.network.kill(pair.p.me)
        pair.fabric.kill(pair.p.me)
        await pair.d.until_ended(KEY, 20.0)
        error, blames = pair.d.aborted[KEY]
        assert isinstance(error, PeerLost) and blames == pair.p.me
        async with asyncio.timeout(10.0):
            while not pair.d.link.idle:
                assert not pair.fabric.touched(pair.d.me) & set(pair.d.pool._free)
                await asyncio.sleep(0.05)
        assert pair.d.pool.counts()["quarantined"] == pair.d.pool.counts()["owned"] == 0
        await pair.close()

    in_virtual_time(scenario())


def test_a_receiver_that_dies_costs_the_source_two_seconds_of_leases() -> None:
    async def scenario() -> None:
        pair = await memory_pair(1)
        pair.submit(KEY, prompt_of(Random(1), 100), stop_after=2)
        await asyncio.sleep(0.2)
        began_s = asyncio.get_running_loop().time()
        pair.network.kill(pair.d.me)
        pair.fabric.kill(pair.d.me)
        async with asyncio.timeout(10.0):
            while KEY not in pair.p.closed:
                await asyncio.sleep(0.05)
        assert 1.9 < asyncio.get_running_loop().time() - began_s < 3.0
        assert isinstance(pair.p.closed[KEY][1], PeerLost)
        await asyncio.sleep(0.1)
        assert pair.p.link.idle and pair.p.pool.counts()["leased"] == 0
        await pair.close()

    in_virtual_time(scenario())


def test_a_broken_session_is_resumed_and_loses_nothing() -> None:
    async def scenario() -> None:
        pair = await memory_pair(1)
        pair.submit(KEY, prompt_of(Random(1), 160), chunk_pages=1, chunk_s=0.1)
        for _ in range(8):
            await asyncio.sleep(0.15)
            pair.network.cut(pair.p.me, pair.d.me)
        await pair.d.until_ended(KEY)
        assert pair.d.commits == [KEY]
        await settle(pair)
        await pair.close()

    in_virtual_time(scenario())


def test_a_page_given_up_by_its_source_is_refused_and_the_source_blamed() -> None:
    async def scenario() -> None:
        pair = await memory_pair(1, mischief=CALM)
        prompt = prompt_of(Random(1), 64)
        pair.d.expect(KEY, prompt, pair.to_p)
        await pair.p.link.offer(KEY, pair.to_d, 64, 1, 10.0)
        pages = pair.p.pool.allocate(1)
        assert pages is not None
        pair.p.link.ready(KEY, [pair.p.write(0, prompt.hashes[0], pages[0])])
        pair.p.frames.epochs[pages[0]] += 1  # as if its lease had run out and the page had been used again
        await pair.d.until_ended(KEY)
        error, blames = pair.d.aborted[KEY]
        assert isinstance(error, StalePage) and blames == pair.p.me
        pair.p.pool.release_all(pages)
        await settle(pair)
        await pair.close()

    in_virtual_time(scenario())


def test_sealed_pages_that_nobody_fetches_stop_new_prefills() -> None:
    async def scenario() -> None:
        pair = await memory_pair(1, pages=33, mischief=Mischief(hang=1.0), timing=QUICK)
        assert pair.p.link.accepts_prefill
        for number in range(2):
            pair.submit(HandoffKey(f"r{number}", 1), prompt_of(Random(number), 100))
        await asyncio.sleep(1.0)
        assert not pair.p.link.accepts_prefill
        assert pair.p.pool.counts()["leased"] == 14
        for number in range(2):
            pair.d.link.cancel(HandoffKey(f"r{number}", 1))
        await settle(pair)
        assert pair.p.link.accepts_prefill
        await pair.close()

    in_virtual_time(scenario())


def test_a_worker_that_was_stopped_itself_expires_nobody_on_waking() -> None:
    """Its peer's renewals lie in its inbox: the first tick after a pause waits for them."""
    liveness = Liveness(LeaseTerms())
    peer = WorkerId("d", 1)
    liveness.up(peer, 0.0)
    assert not liveness.tick_is_late(0.25) and liveness.lost(0.25) == []
    assert liveness.tick_is_late(30.0), "stopped for half a minute"
    liveness.heard(peer, 30.1)
    assert not liveness.tick_is_late(30.25) and liveness.lost(30.25) == []
    assert liveness.lost(41.0) == [peer]


def test_a_stranger_cannot_speak_for_a_hand_off() -> None:
    async def scenario() -> None:
        pair = await memory_pair(1)
        task = pair.submit(KEY, prompt_of(Random(1), 100), chunk_s=0.05)
        await asyncio.sleep(0.06)
        stranger = WorkerId("x", 1)
        pair.d.link.receive(stranger, Failed(KEY, 9, "engine_error", "not mine to say"))
        pair.p.link.receive(stranger, Close(KEY, 9, 1, State.ABORTED, "cancelled", "nor mine"))
        await task
        await pair.d.until_ended(KEY)
        assert pair.d.commits == [KEY]
        await settle(pair)
        await pair.close()

    in_virtual_time(scenario())


# --- all of them at once ---------------------------------------------------------------------------------------

STORM = Weather(delay_s=0.002, lose=0.03, double=0.1, overtake=0.1, cut=0.01)
HAUNTED = Mischief(delay_s=0.001, ghost_delay_s=0.004, corrupt=0.01, stale=0.01, hang=0.02)


class Storm:
    """Six requests, retried by a router of sorts, over everything that can go wrong."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.seed = seed
        self.served = 0

    async def run(self) -> None:
        pair = await memory_pair(self.seed, pages=33, mischief=HAUNTED, weather=STORM, timing=QUICK)
        self.watch(pair)
        trunk = prompt_of(self.random, 80).ids
        async with asyncio.TaskGroup() as group:
            for number in range(6):
                ids = (*trunk[: self.random.randrange(81)], *prompt_of(self.random, self.random.randrange(1, 60)).ids)
                group.create_task(self.request(pair, f"r{number}", Prompt(ids)))
        pair.network.weather = Weather()
        await settle(pair)
        assert set(pair.p.closed) == set(pair.p.granted)
        await pair.close()

    def watch(self, pair: Pair) -> None:
        """No page that something may still write into is given out."""
        allocate = pair.d.pool.allocate

        def watched(count: int) -> list[int] | None:
            haunted = pair.fabric.touched(pair.d.me)
            pages = allocate(count)
            assert not haunted & set(pages or ())
            return pages

        pair.d.pool.allocate = watched  # type: ignore[method-assign]

    async def request(self, pair: Pair, request_id: str, prompt: Prompt) -> None:
        await asyncio.sleep(self.random.uniform(0.0, 0.5))
        for attempt in range(1, 4):
            key = HandoffKey(request_id, attempt)
            task = pair.submit(key, prompt, chunk_pages=self.random.randrange(1, 4), chunk_s=0.01)
            if self.random.random() < 0.2:
                await asyncio.sleep(self.random.uniform(0.0, 0.2))
                self.random.choice((pair.p, pair.d)).link.cancel(key)
            await asyncio.gather(task, return_exceptions=True)
            await pair.d.until_ended(key, 60.0)
            if key in pair.d.committed:
                self.served += 1
                await asyncio.sleep(self.random.uniform(0.0, 0.3))
                pair.d.drop(key)
                return


@pytest.mark.parametrize("seed", range(60))
def test_in_any_storm_a_request_gets_its_own_pages_or_one_error(seed: int) -> None:
    storm = Storm(seed)
    run(storm.run())


def test_most_requests_survive_the_storm() -> None:
    served = 0
    for seed in range(10):
        storm = Storm(1000 + seed)
        run(storm.run())
        served += storm.served
    assert served >= 45, served


def test_the_same_seed_is_the_same_storm() -> None:
    def story(seed: int) -> list[object]:
        seen: list[object] = []

        async def scenario() -> None:
            pair = await memory_pair(seed, weather=STORM, mischief=HAUNTED, timing=QUICK)
            pair.submit(KEY, prompt_of(Random(seed), 100))
            await pair.d.until_ended(KEY, 60.0)
            seen.extend((asyncio.get_running_loop().time(), tuple(pair.d.commits), repr(pair.d.aborted)))
            await pair.close()

        run(scenario())
        return seen

    assert story(5) == story(5)
