"""The real engine in the simulated cluster: in float32 every way through it gives the tokens of the plainest way.

One model in torch runs behind prefill, hand-off and decode under virtual time; pages move by the adversarial transport.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from random import Random

import pytest

from baton.composition import Limits, Model
from core.sampling import SamplingParams
from engine.config import read_config
from engine.memory import page_layout
from engine.torch_executor import TorchExecutor
from engine.weights import load_model
from kvtransfer.memory import Mischief
from tests.simulation.cluster import EngineKind, SimCluster, request_of
from tests.simulation.test_calm import tokens_of
from tests.simulation.virtual_time import run

CHECKPOINT = Path(__file__).resolve().parents[2] / "models" / "baton-tiny"
LENGTHS = (1, 15, 16, 17, 130, 300)
Tokens = dict[int, list[int]]


@pytest.fixture(scope="module")
def real() -> EngineKind:
    config = read_config(CHECKPOINT)
    model = load_model(CHECKPOINT, "float32")
    layout = page_layout(config, 16, "float32")
    facts = Model("tiny", config.vocab_size, 1024, config.eos_ids)
    return EngineKind(facts, layout, lambda frames: TorchExecutor(model, layout, frames, threads=1))


def params_of(temperature: float, n: int = 1) -> SamplingParams:
    return SamplingParams(
        max_tokens=24, n=n, temperature=temperature, top_p=0.95, seed=11, ignore_eos=True, repetition_penalty=1.1
    )


def prompt_of(length: int, vocabulary: int) -> list[int]:
    rng = Random(length)
    return [rng.randrange(10, vocabulary) for _ in range(length)]


async def answers(cluster: SimCluster, real: EngineKind, n: int = 1, round_number: int = 0) -> list[Tokens]:
    """Every prompt, greedy and seeded, all at once."""
    jobs = [
        cluster.generate(
            request_of(f"{length}-{t}-{round_number}", prompt_of(length, real.model.vocabulary), params_of(t, n))
        )
        for length in LENGTHS
        for t in (0.0, 0.8)
    ]
    found = [tokens_of(steps) for steps in await asyncio.gather(*jobs)]
    assert await cluster.quiesce() == []
    return found


async def serve(real: EngineKind, n: int = 1, rounds: int = 1, **shape: object) -> list[list[Tokens]]:
    cluster = SimCluster(1, engine=real, **{"prefill": 1, "decode": 1, **shape})  # type: ignore[arg-type]
    await cluster.start()
    try:
        return [await answers(cluster, real, n, number) for number in range(rounds)]
    finally:
        await cluster.close()


@pytest.fixture(scope="module")
def plain(real: EngineKind) -> list[Tokens]:
    """One aggregated worker, one sequence at a time in effect: whole prompts, no hand-off, no shared prefix."""
    return run(serve(real, prefill=0, decode=0, aggregated=1, limits=Limits(step_tokens=2048)))[0]


WAYS: dict[str, dict[str, object]] = {
    "handed off": {"local_prefill_tokens": 0},
    "handed off by an adversary": {"local_prefill_tokens": 0, "mischief": Mischief(corrupt=0.05, stale=0.05)},
    "prefilled on decode": {"local_prefill_tokens": 10_000},
    "in chunks of 7": {"limits": Limits(step_tokens=7)},
    "in chunks of 100": {"limits": Limits(step_tokens=100)},
    "preempted": {"prefill": 0, "decode": 0, "aggregated": 1, "pages": 50},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_same_tokens(way: str, real: EngineKind, plain: list[Tokens]) -> None:
    first = run(serve(real, **WAYS[way]))[0]
    assert first == plain


def test_a_cached_prefix_gives_the_same_tokens(real: EngineKind, plain: list[Tokens]) -> None:
    first, second = run(serve(real, rounds=2))
    assert first == second == plain


def test_choices_share_a_prompt_and_give_what_each_gives_alone(real: EngineKind, plain: list[Tokens]) -> None:
    together = run(serve(real, n=3, local_prefill_tokens=0))[0]
    assert [{0: tokens[0]} for tokens in together] == plain
    assert any(tokens[1] != tokens[2] for tokens in together), "seeded choices differ"


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_history_that_was_lent_gives_the_same_tokens(temperature: float, real: EngineKind) -> None:
    """Three turns, of which the later ones are computed over pages that decode has lent; and by one worker alone."""

    async def talk(lends: bool, **shape: object) -> list[Tokens]:
        cluster = SimCluster(5, engine=real, local_prefill_tokens=0, **shape)  # type: ignore[arg-type]
        await cluster.start()
        prompt, said, fetched = prompt_of(300, real.model.vocabulary), [], 0
        for number in range(3):
            steps = await cluster.generate(request_of(f"turn {number}", prompt, params_of(temperature)))
            said.append(tokens_of(steps))
            fetched += sum(step.receipt.fetched_tokens for step in steps if step.receipt)
            prompt = [*prompt, *said[-1][0], *prompt_of(100 + number, real.model.vocabulary)]
            if lends:
                await cluster.crash("prefill-0", 0.0)  # it forgets; decode does not
            await asyncio.sleep(1.0)
        assert (fetched > 300) == lends, fetched
        assert await cluster.quiesce() == []
        await cluster.close()
        return said

    lent = run(talk(True, prefill=1, decode=1, mischief=Mischief(corrupt=0.02, stale=0.02)))
    assert lent == run(talk(False, prefill=0, decode=0, aggregated=1))


@pytest.mark.parametrize("after", [1, 9, 20])
def test_a_replay_after_the_death_of_decode_gives_the_same_tokens(
    after: int, real: EngineKind, plain: list[Tokens]
) -> None:
    """Decode dies when the client has been given `after` tokens; another worker goes on from there."""

    async def main() -> list[Tokens]:
        cluster = SimCluster(after, engine=real, prefill=1, decode=2, local_prefill_tokens=0)
        await cluster.start()
        found = []
        for length in LENGTHS:
            for temperature in (0.0, 0.8):
                prompt = prompt_of(length, real.model.vocabulary)
                request = request_of(f"{length}-{temperature}", prompt, params_of(temperature))
                found.append(await _with_a_death(cluster, cluster.saga.generate(request), after))
        assert await cluster.quiesce() == []
        await cluster.close()
        return found

    assert run(main()) == plain


async def _with_a_death(cluster: SimCluster, stream, after: int) -> Tokens:  # type: ignore[no-untyped-def]
    steps = []
    crash: asyncio.Task[None] | None = None
    async for step in stream:
        steps.append(step)
        if crash is None and sum(len(s.tokens) for s in steps) >= after:
            busy = _decoding(cluster)
            crash = asyncio.create_task(cluster.crash(busy, 0.5)) if busy else None
    if crash is not None:
        await crash
        await asyncio.sleep(1.0)
    return tokens_of(steps)


def _decoding(cluster: SimCluster) -> str | None:
    """The decode worker that has the request."""
    names = [name for name, w in cluster.alive.items() if w.worker.tier.decode and w.worker.engine.sequences]
    return names[0] if names else None


def test_preemption_and_replay_did_happen(real: EngineKind) -> None:
    """The small pool of the test above is too small indeed."""

    async def main() -> int:
        cluster = SimCluster(1, engine=real, prefill=0, decode=0, aggregated=1, pages=50)
        await cluster.start()
        await answers(cluster, real)
        await cluster.close()
        return cluster.alive["worker-0"].worker.engine.preemptions

    assert run(main()) > 0


def test_pages_handed_off_in_16_bits_are_identical() -> None:
    """Every full page that both workers hold under one name has the same bytes."""
    config = read_config(CHECKPOINT)
    model = load_model(CHECKPOINT, "bfloat16")
    layout = page_layout(config, 16, "bfloat16")
    facts = Model("tiny-bf16", config.vocab_size, 1024, config.eos_ids)
    kind = EngineKind(facts, layout, lambda frames: TorchExecutor(model, layout, frames, threads=1))

    async def main() -> int:
        cluster = SimCluster(1, engine=kind, prefill=1, decode=1, local_prefill_tokens=0)
        await cluster.start()
        await answers(cluster, kind)
        source, target = cluster.alive["prefill-0"], cluster.alive["decode-0"]
        common = set(source.worker.pool.known_hashes()) & set(target.worker.pool.known_hashes())
        for name in common:
            (there,), (here,) = source.worker.pool.lookup([name]), target.worker.pool.lookup([name])
            assert bytes(source.frames.page(there)) == bytes(target.frames.page(here))
        await cluster.close()
        return len(common)

    assert run(main()) >= sum(length // 16 for length in LENGTHS)
