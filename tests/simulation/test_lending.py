"""A conversation's history comes from the worker that decoded it; whatever becomes of that, the tokens are right."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest

from core.errors import BatonError
from core.hashing import block_hashes, root_hash
from core.messages import Receipt, Role, WorkerId
from core.sampling import SamplingParams
from kvtransfer.memory import CALM, Mischief
from kvtransfer.session_memory import Weather
from router import saga
from router.choose import Candidate, Need, Placement, Terms, choose
from router.generation import Step
from router.threshold import Threshold
from tests.simulation.cluster import SimCluster, request_of
from tests.simulation.test_calm import prompt_of, tokens_of, wanted
from tests.simulation.virtual_time import run

HARD = Mischief(corrupt=0.02, stale=0.02, hang=0.01)
STORM = Weather(lose=0.02, double=0.05, overtake=0.05, cut=0.01)
ANSWER = 100  # tokens of each turn


def eager(cluster: SimCluster) -> SimCluster:
    """Its routers lend whatever a page or more is gained by."""
    for router in cluster.routers:
        router.saga._threshold = Threshold(Terms(local_prefill_tokens=32, lend_tokens=16, loan_s=0.0))
    return cluster


def params_of(number: int, tokens: int = ANSWER) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0.0, seed=number)


def receipt_of(steps: Sequence[Step]) -> Receipt:
    """That of the last attempt."""
    return [step.receipt for step in steps if step.receipt is not None][-1]


async def turn(cluster: SimCluster, name: str, prompt: list[int], tokens: int = ANSWER) -> tuple[list[int], Receipt]:
    """One request that must succeed: what it answers, and where its prompt came from."""
    params = params_of(0, tokens)
    steps = await cluster.generate(request_of(name, prompt, params))
    assert tokens_of(steps) == wanted(prompt, params)
    receipt = receipt_of(steps)
    assert receipt.prompt_tokens == len(prompt)
    return tokens_of(steps)[0], receipt


async def first_turn(cluster: SimCluster, prompt: list[int], tokens: int = ANSWER) -> list[int]:
    """The prompt of the second turn. Prefill forgets the first one, decode keeps it, and the routers know both."""
    answer, _ = await turn(cluster, "first", prompt, tokens)
    for name in [name for name in cluster.names if name.startswith("prefill")]:
        await cluster.crash(name, 0.0)
    await asyncio.sleep(1.0)
    return [*prompt, *answer, *prompt_of(Random(len(prompt)), 150)]


def fetched_tokens(cluster: SimCluster) -> float:
    """What the prefill workers' metrics say."""
    total = 0.0
    for worker in cluster.alive.values():
        for line in worker.worker.metrics_text().decode().splitlines():
            if line.startswith("baton:fetched_tokens_total{"):
                total += float(line.rsplit(" ", 1)[1])
    return total


def test_the_answer_of_the_first_turn_is_fetched_for_the_second() -> None:
    """The lone prefill worker has the first prompt itself, and fetches what was decoded since."""

    async def main() -> None:
        cluster = SimCluster(1, prefill=1, decode=1)
        await cluster.start()
        prompt = prompt_of(Random(1), 200)
        answer, first = await turn(cluster, "a", prompt, 500)
        assert first.fetched_tokens == 0
        await asyncio.sleep(0.5)
        _, second = await turn(cluster, "b", [*prompt, *answer, *prompt_of(Random(2), 150)])
        # 192 tokens of the first prompt are full pages at both ends; of the 699 that decode has KV for, 688 are.
        assert second.fetched_tokens == 688 - 192 == fetched_tokens(cluster)
        assert second.cached_decode_tokens == 192
        assert second.computed_tokens == 850 - 688
        assert second.transferred_tokens == 850 - 688, "what decode has is not sent back to it"
        assert await cluster.quiesce() == []
        await cluster.close()

    run(main())


@pytest.mark.parametrize("weather", [Weather(), STORM])
def test_a_prefill_worker_that_has_nothing_fetches_it_all(weather: Weather) -> None:
    async def main() -> None:
        cluster = SimCluster(2, prefill=1, decode=1, weather=weather, mischief=Mischief())
        await cluster.start()
        prompt = await first_turn(cluster, prompt_of(Random(2), 300))
        _, receipt = await turn(cluster, "second", prompt)
        if weather == Weather():
            assert receipt.fetched_tokens == 384 and receipt.computed_tokens == len(prompt) - 384
        assert await cluster.quiesce() == []
        await cluster.close()

    run(main())


def test_what_is_left_of_a_history_is_fetched_and_the_rest_computed() -> None:
    """The first half of the lender's pages have been in use since; the others were evicted."""

    async def main() -> None:
        cluster = SimCluster(3, prefill=1, decode=1)
        await cluster.start()
        prompt = await first_turn(cluster, prompt_of(Random(3), 450))
        pool = cluster.alive["decode-0"].worker.pool
        (name,) = {c.worker.name for c in cluster.workers.candidates(tuple(prompt), b"") if c.cached_tokens}
        assert name == "decode-0"
        found = pool.lookup(block_hashes(root_hash("hash-chain"), prompt, 16))
        assert len(found) == 34
        pool.acquire(found[:20])
        taken = pool.allocate(pool.reusable)
        assert taken is not None
        pool.release_all([*found[:20], *taken])
        _, receipt = await turn(cluster, "second", prompt)
        assert receipt.fetched_tokens == 20 * 16
        assert receipt.computed_tokens == len(prompt) - 20 * 16
        assert await cluster.quiesce() == []
        await cluster.close()

    run(main())


def test_without_room_the_loan_is_refused_and_the_prompt_computed() -> None:
    async def main() -> None:
        cluster = SimCluster(4, prefill=1, decode=1)
        await cluster.start()
        prompt = await first_turn(cluster, prompt_of(Random(4), 300))
        service = cluster.alive["prefill-0"].worker.tier.prefill
        assert service is not None
        service._borrower._free_pages = lambda: 0
        began_s = asyncio.get_running_loop().time()
        _, receipt = await turn(cluster, "second", prompt, 1)
        assert receipt.fetched_tokens == 0
        assert asyncio.get_running_loop().time() - began_s < 0.15, "it did not wait for what was refused"
        assert await cluster.quiesce() == []
        await cluster.close()

    run(main())


def test_what_has_been_evicted_is_declined_at_once() -> None:
    """The router's index is a hint, and was wrong."""

    async def main() -> None:
        cluster = SimCluster(5, prefill=1, decode=1)
        await cluster.start()
        prompt = await first_turn(cluster, prompt_of(Random(5), 300))
        pool = cluster.alive["decode-0"].worker.pool
        taken = pool.allocate(pool.reusable)
        assert taken is not None
        pool.release_all(taken)
        began_s = asyncio.get_running_loop().time()
        _, receipt = await turn(cluster, "second", prompt, 1)
        assert receipt.fetched_tokens == 0 and receipt.computed_tokens == len(prompt)
        assert asyncio.get_running_loop().time() - began_s < 0.15
        assert await cluster.quiesce() == []
        await cluster.close()

    run(main())


def test_a_lender_that_is_stopped_costs_half_the_time_of_computing_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saga, "choose", lend_apart)

    async def main() -> None:
        cluster = SimCluster(6, prefill=1, decode=2)
        await cluster.start()
        prompt = await first_turn(cluster, prompt_of(Random(6), 300))
        lender = lender_of(cluster, prompt)
        cluster.alive[lender].node.stop()
        asyncio.get_running_loop().call_later(1.0, cluster.alive[lender].node.wake)
        began_s = asyncio.get_running_loop().time()
        _, receipt = await turn(cluster, "second", prompt, 1)
        took_s = asyncio.get_running_loop().time() - began_s
        assert receipt.fetched_tokens == 0
        # Prefill has been started anew and has measured no rate: 1000 tokens per second are assumed.
        assert 0.19 < took_s < 0.35, took_s
        assert await cluster.quiesce() == []
        await cluster.close()

    run(main())


def lend_apart(candidates: Sequence[Candidate], need: Need, terms: Terms) -> Placement | None:
    """As chosen, but the lender does not decode."""
    placement = choose(candidates, need, terms)
    if placement is None or placement.loan is None or placement.loan.lender != placement.decode:
        return placement
    others = [c.worker for c in candidates if c.info.role is Role.DECODE and c.worker != placement.decode]
    return replace(placement, decode=others[0]) if others else placement


def lender_of(cluster: SimCluster, prompt: list[int]) -> str:
    """The decode worker that has most of the prompt."""
    candidates = [c for c in cluster.workers.candidates(tuple(prompt), b"") if c.info.role is Role.DECODE]
    return max(candidates, key=lambda c: c.cached_tokens).worker.name


@pytest.mark.parametrize("victim", ["lender", "borrower"])
@pytest.mark.parametrize("apart", [True, False])
def test_one_end_of_a_loan_dies_at_every_message(victim: str, apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another worker of its kind is there: the request must succeed."""
    if apart:
        monkeypatch.setattr(saga, "choose", lend_apart)
    fetched = 0
    for k in range(1, 400):
        died, receipt = run(_die_at(k, victim))
        fetched += receipt.fetched_tokens > 0
        if not died:
            break
    else:
        pytest.fail("the request sends more messages than the test covers")
    assert k > 20
    assert fetched > 0


async def _die_at(k: int, victim: str) -> tuple[bool, Receipt]:
    cluster = eager(SimCluster(k, prefill=2, decode=2, mischief=Mischief()))
    await cluster.start()
    prompt = await first_turn(cluster, prompt_of(Random(k), 150), 30)
    name = lender_of(cluster, prompt) if victim == "lender" else ""
    crashes: list[asyncio.Task[None]] = []
    base = cluster.messages

    def at(count: int) -> None:
        if count == base + k and running:
            crashes.append(asyncio.create_task(cluster.crash(name or _borrower(cluster))))

    cluster.on_message = at
    running = True
    _, receipt = await turn(cluster, "second", prompt, 12)
    running = False
    await asyncio.gather(*crashes)
    assert await cluster.quiesce() == [], f"killed at message {k}"
    await cluster.close()
    return bool(crashes), receipt


def _borrower(cluster: SimCluster) -> str:
    """The prefill worker that has the request, if one has it yet."""
    busy = [name for name, w in cluster.alive.items() if w.worker.tier.prefill and w.worker.tier.prefill._jobs]
    return busy[0] if busy else "prefill-0"


def test_loans_in_all_weathers() -> None:
    """Conversations of several turns on workers that die, over links that lose and bytes that rot."""
    fetched = sum(run(_converse(seed)) for seed in range(60))
    assert fetched > 20, "loans did happen"


async def _converse(seed: int) -> int:
    """How many turns fetched something."""
    rng = Random(seed)
    cluster = eager(
        SimCluster(
            seed,
            prefill=rng.choice([1, 2]),
            decode=rng.choice([1, 2]),
            pages=rng.choice([60, 120]),
            weather=STORM if rng.random() < 0.5 else Weather(),
            mischief=HARD if rng.random() < 0.7 else Mischief(),
            two_sided=rng.random() < 0.5,
        )
    )
    await cluster.start()
    talks = [asyncio.create_task(_talk(cluster, rng, n)) for n in range(4)]
    faults = [asyncio.create_task(_fault(cluster, rng)) for _ in range(3)]
    fetched = sum(await asyncio.gather(*talks))
    await asyncio.gather(*faults)
    cluster.network.weather, cluster.fabric.mischief = Weather(), CALM
    assert await cluster.quiesce() == [], f"seed {seed}"
    await cluster.close()
    return fetched


async def _talk(cluster: SimCluster, rng: Random, number: int) -> int:
    """Three turns, or fewer when one of them fails clearly."""
    prompt, fetched = prompt_of(rng, rng.randrange(60, 200)), 0
    for n in range(3):
        await asyncio.sleep(rng.uniform(0.0, 0.5))
        params = params_of(number, rng.randrange(1, 60))
        steps = []
        try:
            async for step in cluster.saga.generate(request_of(f"{number}-{n}", prompt, params)):
                steps.append(step)
                assert step.receipt is None or step.receipt.prompt_tokens == len(prompt), step.receipt
                fetched += step.receipt is not None and step.receipt.fetched_tokens > 0
        except BatonError:
            for ids in tokens_of(steps).values():
                assert ids == wanted(prompt, params)[0][: len(ids)], "a wrong token before the error"
            return fetched
        assert tokens_of(steps) == wanted(prompt, params)
        prompt += [*tokens_of(steps)[0], *prompt_of(rng, rng.randrange(20, 100))]
    return fetched


async def _fault(cluster: SimCluster, rng: Random) -> None:
    name, at_s, longest_s = rng.choice(cluster.names), rng.uniform(0.1, 2.0), rng.uniform(0.1, 4.0)
    kind = rng.choice(["kill", "stop", "cut"])
    await asyncio.sleep(at_s)
    worker = cluster.alive[name]
    if worker.dead:
        return
    if kind == "kill":
        await cluster.crash(name, longest_s)
    elif kind == "stop":
        worker.node.stop()
        await asyncio.sleep(longest_s)
        worker.node.wake()
    else:
        for other in list(cluster.alive.values()):
            cluster.network.cut(worker.id, other.id)
            cluster.network.cut(other.id, worker.id)


@pytest.mark.parametrize("after_ms", range(0, 60, 3))
def test_leaving_ends_the_loan_at_both_ends(after_ms: int) -> None:
    async def main() -> None:
        cluster = SimCluster(after_ms, prefill=1, decode=1, mischief=Mischief())
        await cluster.start()
        prompt = await first_turn(cluster, prompt_of(Random(after_ms), 300))
        task = asyncio.create_task(cluster.generate(request_of("second", prompt, params_of(0, 500))))
        await asyncio.sleep(after_ms / 1000)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert await cluster.quiesce(3.0) == []
        await cluster.close()

    run(main())


@pytest.mark.parametrize("stopped", ["prefill-0", "decode-0"])
def test_a_cancel_frees_each_end_though_the_other_has_stopped(stopped: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The router tells both; neither needs the other's word."""
    monkeypatch.setattr(saga, "choose", lend_apart)

    async def main() -> None:
        cluster = SimCluster(8, prefill=1, decode=2, mischief=Mischief(delay_s=0.01))
        await cluster.start()
        prompt = await first_turn(cluster, prompt_of(Random(8), 300))
        lender = cluster.alive[lender_of(cluster, prompt)]
        borrower = cluster.alive["prefill-0"]
        halted, other = (borrower, lender) if stopped == "prefill-0" else (lender, borrower)
        task = asyncio.create_task(cluster.generate(request_of("second", prompt, params_of(0, 500))))
        while not other.worker.pool.counts()["owned"]:
            await asyncio.sleep(0.0001)
        halted.node.stop()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.sleep(0.2)
        counts = other.worker.pool.counts()
        assert counts["owned"] == counts["leased"] == 0
        halted.node.wake()
        assert await cluster.quiesce() == []
        await cluster.close()

    run(main())


def test_one_end_that_cuts_a_peer_off_cuts_the_other_too() -> None:
    """Pages go both ways between two workers; when one way is cut, the other is met anew, and all tokens are right."""

    async def main() -> None:
        cluster = eager(SimCluster(9, prefill=1, decode=1, pages=240))
        await cluster.start()
        p, d = cluster.alive["prefill-0"], cluster.alive["decode-0"]
        prompt = prompt_of(Random(9), 100)
        for n in range(8):
            answer, _ = await turn(cluster, f"r{n}", prompt, 150)
            prompt += [*answer, *prompt_of(Random(n), 40)]
            (source, receiver) = [(p, d), (d, p)][n % 2]
            end = source.worker.source if n % 4 < 2 else receiver.worker.receiver
            assert end is not None
            gone: WorkerId = receiver.id if end is source.worker.source else source.id
            end.peer_gone(gone, BatonError("the test says so"))
            await asyncio.sleep(0.3)
        _, receipt = await turn(cluster, "last", prompt, 5)
        assert receipt.fetched_tokens > 0, "it is lent again after all that"
        assert await cluster.quiesce() == []
        await cluster.close()

    run(main())
