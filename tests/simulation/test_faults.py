"""With faults: every request ends with the right tokens or one clear error, and nothing is left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest

from baton.memory_link import MemoryLink
from core.errors import BatonError
from core.sampling import SamplingParams
from kvtransfer.memory import Mischief
from kvtransfer.session_memory import MemoryNetwork, Weather
from tests.simulation.cluster import VOCABULARY, SimCluster, request_of
from tests.simulation.test_calm import prompt_of, tokens_of, wanted
from tests.simulation.virtual_time import run

HARD = Mischief(corrupt=0.02, stale=0.02, hang=0.01)
STORM = Weather(lose=0.02, double=0.05, overtake=0.05, cut=0.01)


class CountedNetwork(MemoryNetwork):
    """Calls `at` when the k-th message of the cluster is sent, whoever sends it."""

    count = 0
    at: Callable[[int], None] = staticmethod(lambda count: None)

    def send(self, *args: Any) -> None:
        self.count += 1
        self.at(self.count)
        super().send(*args)


def count_links(monkeypatch: pytest.MonkeyPatch, network: CountedNetwork) -> None:
    """The messages of routers and workers count like those of pairs."""
    real = MemoryLink._later

    def later(self: MemoryLink, way: int, do: Callable[[], object]) -> None:
        network.count += 1
        network.at(network.count)
        real(self, way, do)

    monkeypatch.setattr(MemoryLink, "_later", later)


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
def test_a_worker_dies_at_every_message(victim: str, choices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request on two pairs; the worker dies as the k-th message is sent. It must succeed: another pair is there."""
    outcomes = []
    with monkeypatch.context() as patch:
        for k in range(1, 400):
            died, outcome = run(_die_at(k, victim, choices, patch))
            outcomes.append(outcome)
            patch.undo()
            if not died:
                break
        else:
            pytest.fail("the request sends more messages than the test covers")
    assert set(outcomes) == {"right"}
    assert len(outcomes) > 20


async def _die_at(k: int, victim: str, choices: int, patch: pytest.MonkeyPatch) -> tuple[bool, str]:
    cluster = SimCluster(k, prefill=2, decode=2, mischief=Mischief())
    network = cluster.network = CountedNetwork(Random(k), Weather())
    count_links(patch, network)
    await cluster.start()
    crashes: list[asyncio.Task[None]] = []
    base = network.count

    def at(count: int) -> None:
        if count == base + k and running:
            crashes.append(asyncio.create_task(cluster.crash(victim)))

    network.at = at  # type: ignore[method-assign]
    running = True
    prompt = prompt_of(Random(k), 150)
    params = SamplingParams(max_tokens=12, n=choices, temperature=0.0, seed=0)
    outcome = await finish(cluster, "r", prompt, params)
    running = False
    await asyncio.gather(*crashes)
    assert await cluster.quiesce() == [], f"killed at message {k}"
    await cluster.close()
    return bool(crashes), outcome


@dataclass
class Tally:
    right: int = 0
    errors: int = 0


@pytest.mark.simulation
def test_random_faults(seed: int) -> None:
    """Six requests and more, faults of every kind, on two or three workers of each tier."""
    tally = run(_random_faults(seed))
    assert tally.right + tally.errors >= 6


async def _random_faults(seed: int) -> Tally:
    rng = Random(seed)
    weather = STORM if rng.random() < 0.5 else Weather()
    mischief = HARD if rng.random() < 0.5 else Mischief()
    cluster = SimCluster(
        seed, prefill=rng.choice([1, 2, 3]), decode=rng.choice([1, 2, 3]), pages=rng.choice([40, 120]),
        weather=weather, mischief=mischief,
    )  # fmt: skip
    await cluster.start()
    requests = [asyncio.create_task(_late_request(cluster, rng, i)) for i in range(rng.randrange(6, 12))]
    faults = [asyncio.create_task(_fault(cluster, rng)) for _ in range(rng.randrange(2, 5))]
    outcomes = await asyncio.gather(*requests)
    await asyncio.gather(*faults)
    cluster.network.weather, cluster.fabric.mischief = Weather(), Mischief()
    assert await cluster.quiesce() == [], f"seed {seed}"
    await cluster.close()
    right = outcomes.count("right")
    return Tally(right, len(outcomes) - right)


async def _late_request(cluster: SimCluster, rng: Random, number: int) -> str:
    prompt = prompt_of(rng, rng.choice([5, 16, 40, 64, 150, 300]))
    params = SamplingParams(
        max_tokens=rng.randrange(1, 60), n=rng.choice([1, 1, 2]), temperature=rng.choice([0.0, 1.0]), seed=number
    )
    leaves_s = rng.uniform(0.05, 2.0) if rng.random() < 0.15 else None
    await asyncio.sleep(rng.uniform(0, 1.0))
    if leaves_s is None:
        return await finish(cluster, f"r{number}", prompt, params)
    task = asyncio.create_task(finish(cluster, f"r{number}", prompt, params))
    await asyncio.wait([task], timeout=leaves_s)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    if not task.cancelled() and task.exception() is not None:
        raise task.exception()  # type: ignore[misc]
    return "left"


async def _fault(cluster: SimCluster, rng: Random) -> None:
    kind, at_s, name = rng.choice(["kill", "stop", "cut"]), rng.uniform(0, 1.5), rng.choice(list(cluster.alive))
    longest_s = rng.uniform(0.1, 6.0)
    await asyncio.sleep(at_s)
    worker = cluster.alive[name]
    if worker.dead:
        return
    if kind == "kill":
        await cluster.crash(name, longest_s)
    elif kind == "stop":
        worker.stopped.clear()
        await asyncio.sleep(longest_s)
        worker.stopped.set()
    else:
        for other in list(cluster.alive.values()):
            cluster.network.cut(worker.id, other.id)
            cluster.network.cut(other.id, worker.id)


def test_vocabulary_is_large_enough_to_tell_wrong_from_right() -> None:
    assert VOCABULARY > 500
