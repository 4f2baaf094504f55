"""After a death in the middle of a hand-off, what had been computed and verified is not computed again."""

from __future__ import annotations

import asyncio
from random import Random

from core.sampling import SamplingParams
from kvtransfer.memory import Mischief
from kvtransfer.receiver_link import HandoffReceiver
from router.generation import Step
from tests.simulation.cluster import SimCluster, SimWorker, request_of
from tests.simulation.test_calm import prompt_of, tokens_of, wanted
from tests.simulation.virtual_time import run

CHUNKS, CHUNK_TOKENS, REST_TOKENS = 6, 64, 20
TOKENS = CHUNKS * CHUNK_TOKENS + REST_TOKENS
PARAMS = SamplingParams(max_tokens=40, temperature=0.0, seed=0)


def verified_tokens(receiver: HandoffReceiver | None, page_size: int) -> int:
    """Of the one hand-off that is under way."""
    assert receiver is not None
    return sum(len(record.verified) for record in receiver._end._books.records.values()) * page_size


def metric(worker: SimWorker, series: str) -> float:
    lines = worker.worker.metrics_text().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(series + "{"))


def computed_tokens(cluster: SimCluster, tier: str) -> float:
    """By the living workers of a tier, in all their steps."""
    workers = [worker for name, worker in cluster.alive.items() if name.startswith(tier) and not worker.dead]
    return sum(metric(worker, "vllm:iteration_tokens_total_sum") for worker in workers)


async def until(holds: object, within_s: float = 30.0) -> None:
    assert callable(holds)
    async with asyncio.timeout(within_s):
        while not holds():
            await asyncio.sleep(0.0002)


def check(steps: list[Step], prompt: list[int]) -> None:
    assert tokens_of(steps) == wanted(prompt, PARAMS)


def test_after_the_death_of_prefill_a_short_rest_is_prefilled_where_the_pages_are() -> None:
    """Another prefill worker stands by, and computes nothing."""

    async def main() -> None:
        cluster = SimCluster(1, prefill=2, decode=1)
        await cluster.start()
        prompt = prompt_of(Random(1), TOKENS)
        answer = asyncio.create_task(cluster.generate(request_of("r", prompt, PARAMS)))
        decode = cluster.alive["decode-0"]
        size = decode.info.page_size
        await until(lambda: verified_tokens(decode.worker.receiver, size) == CHUNKS * CHUNK_TOKENS)
        busy = [name for name in ("prefill-0", "prefill-1") if not cluster.alive[name].worker.engine.is_idle]
        assert len(busy) == 1
        began_s = asyncio.get_running_loop().time()
        await cluster.crash(busy[0], None)
        steps = await answer
        took_s = asyncio.get_running_loop().time() - began_s
        check(steps, prompt)
        [receipt] = [step.receipt for step in steps if step.receipt is not None]
        assert receipt.cached_decode_tokens == CHUNKS * CHUNK_TOKENS and receipt.computed_tokens == REST_TOKENS
        assert metric(decode, "baton:local_prefills_total") == 1
        assert computed_tokens(cluster, "prefill") == 0
        assert took_s < 6.0, "the time to miss the dead, and no deadline"
        assert await cluster.quiesce() == []
        await cluster.close()

    run(main())


def test_after_the_death_of_decode_before_the_commit_nothing_is_computed_again() -> None:
    """The pages are slow to move: prefill has sealed and leased them when their receiver dies. Another takes them."""

    async def main() -> None:
        cluster = SimCluster(1, prefill=1, decode=2, mischief=Mischief(steps=1, delay_s=0.3))
        await cluster.start()
        prompt = prompt_of(Random(1), TOKENS)
        answer = asyncio.create_task(cluster.generate(request_of("r", prompt, PARAMS)))
        prefill = cluster.alive["prefill-0"]
        source, pool, size = prefill.worker.source, prefill.worker.pool, prefill.info.page_size
        assert source is not None
        await until(lambda: source.counts()["sealed"] == 1)
        assert pool.counts()["leased"] + pool.counts()["owned"] == -(-TOKENS // size)
        assert computed_tokens(cluster, "prefill") == TOKENS
        first = [name for name in ("decode-0", "decode-1") if cluster.alive[name].busy]
        assert len(first) == 1
        await cluster.crash(first[0], None)
        steps = await answer
        check(steps, prompt)
        receipt = [step.receipt for step in steps if step.receipt is not None][-1]
        assert receipt.cached_prefill_tokens == TOKENS // size * size == TOKENS - receipt.computed_tokens
        again = TOKENS % size + 1  # the tail page, and the token that the client has
        assert computed_tokens(cluster, "prefill") == TOKENS + again
        assert await cluster.quiesce() == []
        await cluster.close()

    run(main())
