"""With faults: every request ends with the right tokens or one clear error, and nothing is left behind."""

from __future__ import annotations

import asyncio
from random import Random

import pytest

from core.errors import BatonError
from core.sampling import SamplingParams
from kvtransfer.memory import Mischief
from tests.simulation.cluster import VOCABULARY, SimCluster, request_of
from tests.simulation.faults import FAULTS
from tests.simulation.schedule import Outcome, play
from tests.simulation.seeds import FAILED_ONCE
from tests.simulation.test_calm import prompt_of, tokens_of, wanted
from tests.simulation.virtual_time import run


async def finish(cluster: SimCluster, name: str, prompt: list[int], params: SamplingParams) -> str:
    """'right' or the code of the one error. Anything else fails the test."""
    steps = []
    try:
        async for step in cluster.saga.generate(request_of(name, prompt, params)):
            steps.append(step)
    except BatonError as error:
        for choice, ids in tokens_of(steps).items():
            assert ids == wanted(prompt, params)[choice][: len(ids)], "a wrong token before the error"
        return error.code
    assert tokens_of(steps) == wanted(prompt, params)
    return "right"


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
@pytest.mark.parametrize("choices", [1, 2])
def test_a_worker_dies_at_every_message(victim: str, choices: int) -> None:
    """One request on two pairs; the worker dies as the k-th message is sent. It must succeed: another pair is there."""
    outcomes = []
    for k in range(1, 400):
        died, outcome = run(_die_at(k, victim, choices))
        outcomes.append(outcome)
        if not died:
            break
    else:
        pytest.fail("the request sends more messages than the test covers")
    assert set(outcomes) == {"right"}
    assert len(outcomes) > 20


async def _die_at(k: int, victim: str, choices: int) -> tuple[bool, str]:
    cluster = SimCluster(k, prefill=2, decode=2, mischief=Mischief())
    await cluster.start()
    crashes: list[asyncio.Task[None]] = []
    base = cluster.messages

    def at(count: int) -> None:
        if count == base + k and running:
            crashes.append(asyncio.create_task(cluster.crash(victim)))

    cluster.on_message = at
    running = True
    prompt = prompt_of(Random(k), 150)
    params = SamplingParams(max_tokens=12, n=choices, temperature=0.0, seed=0)
    outcome = await finish(cluster, "r", prompt, params)
    running = False
    await asyncio.gather(*crashes)
    assert await cluster.quiesce() == [], f"killed at message {k}"
    await cluster.close()
    return bool(crashes), outcome


@pytest.mark.simulation
def test_schedules(seed: int) -> None:
    """Two routers, six workers, nine requests and more, faults of every kind."""
    judge(play(seed))


@pytest.mark.parametrize("seed", FAILED_ONCE)
def test_seeds_that_failed_once(seed: int) -> None:
    judge(play(seed))


@pytest.mark.parametrize("kind", FAULTS)
def test_each_fault_alone(kind: str) -> None:
    for seed in range(5):
        judge(play(seed, [kind]))


def judge(outcome: Outcome) -> None:
    assert not outcome.violations, outcome
    assert outcome.requests >= 6 and outcome.messages >= 300, outcome


def test_vocabulary_is_large_enough_to_tell_wrong_from_right() -> None:
    assert VOCABULARY > 500
