"""The step loop over the hash-chain engine: chunks, batches, prefixes, choices, preemption change no token."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest

from core.errors import EngineError
from core.hashing import root_hash
from core.sampling import SamplingParams
from decode_service.policy import DecodePolicy
from engine.batch import Batch, RowResult
from engine.engine import Engine, StepReport
from engine.hashchain import LAYOUT, HashChainExecutor, reference_tokens
from engine.policy import EngineView, Policy, StepPlan
from engine.pool import PagePool
from engine.sequence import Sequence

VOCABULARY = 997


class Harness:
    """One engine on virtual seconds; collects what each choice got."""

    def __init__(self, pages: int = 64, policy: Policy | None = None) -> None:
        self.now_s = 0.0
        self.pool = PagePool(pages)
        frames = memoryview(bytearray(pages * LAYOUT.page_bytes))
        self.executor = HashChainExecutor(frames, VOCABULARY)
        self.engine = Engine(
            self.executor,
            self.pool,
            LAYOUT.page_size,
            policy or DecodePolicy(),
            lambda: self.now_s,
            self.run_blocking,
            self.report,
        )
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.failed: list[tuple[Sequence, Exception]] = []
        self.before_step: Callable[[], None] = lambda: None

    async def run_blocking(self, call: Callable[[Batch], list[RowResult]], batch: Batch) -> list[RowResult]:
        self.now_s += 0.01
        self.before_step()
        await asyncio.sleep(0)
        return call(batch)

    def report(self, report: StepReport) -> None:
        self.failed += report.failed
        for item in report.sampled:
            self.tokens.setdefault((item.sequence.request_id, item.choice), []).append(item.token.token_id)

    def add(self, name: str, prompt: list[int], params: SamplingParams, seed: int = 1) -> Sequence:
        sequence = Sequence(
            sequence_id=self.engine.new_id(),
            request_id=name,
            attempt=1,
            choices=tuple(range(params.n)),
            ids=list(prompt),
            prompt_tokens=len(prompt),
            params=params,
            seed=seed,
            root=root_hash("model"),
            end_ids=(),
            arrived_s=self.now_s,
            deadline_s=1e9,
        )
        self.engine.add(sequence)
        return sequence

    async def drain(self) -> None:
        task = asyncio.create_task(self.engine.run())
        try:
            async with asyncio.timeout(60):
                while not self.engine.is_idle:
                    await asyncio.sleep(0)
        finally:
            task.cancel()

    def check(self) -> None:
        self.pool.check()
        counts = self.pool.counts()
        assert counts["owned"] == counts["leased"] == counts["quarantined"] == 0, counts


def prompt_of(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(length)]


@pytest.mark.parametrize("length", [1, 15, 16, 17, 100, 512, 513])
@pytest.mark.parametrize("chunk", [7, 16, 512])
async def test_chunks_change_no_token(length: int, chunk: int) -> None:
    harness = Harness(policy=DecodePolicy(step_tokens=chunk))
    prompt = prompt_of(random.Random(length), length)
    params = SamplingParams(max_tokens=20, temperature=0.0)
    harness.add("a", prompt, params)
    await harness.drain()
    assert harness.tokens["a", 0] == reference_tokens(prompt, params, 1, 0, VOCABULARY)
    harness.check()


async def test_batch_prefix_and_choices_change_no_token() -> None:
    harness = Harness(pages=400)
    rng = random.Random(3)
    shared = prompt_of(rng, 70)
    wanted = {}
    for i in range(12):
        prompt = shared[: rng.choice([0, 33, 64, 70])] + prompt_of(rng, rng.randrange(1, 60))
        params = SamplingParams(
            max_tokens=rng.randrange(1, 40), n=rng.choice([1, 1, 3]), temperature=rng.choice([0.0, 1.0])
        )
        harness.add(f"r{i}", prompt, params, seed=i)
        for choice in range(params.n):
            wanted[f"r{i}", choice] = reference_tokens(prompt, params, i, choice, VOCABULARY)
    await harness.drain()
    assert harness.tokens == wanted
    harness.check()


async def test_preemption_recomputes_and_changes_no_token() -> None:
    harness = Harness(pages=14)  # room for one long sequence, not for four
    rng = random.Random(5)
    sequences, wanted = [], {}
    params = SamplingParams(max_tokens=60, temperature=0.0)
    for i in range(4):
        prompt = prompt_of(rng, 30 + i)
        sequences.append(harness.add(f"r{i}", prompt, params))
        wanted[f"r{i}", 0] = reference_tokens(prompt, params, 1, 0, VOCABULARY)
    await harness.drain()
    assert harness.tokens == wanted
    assert sum(s.preemptions for s in sequences) > 0, "the pool was meant to be too small"
    assert sequences[0].preemptions == 0, "the oldest is never preempted"
    harness.check()


async def test_second_prompt_finds_its_prefix_cached_and_salt_separates() -> None:
    harness = Harness()
    prompt = prompt_of(random.Random(1), 100)
    params = SamplingParams(max_tokens=4, temperature=0.0)
    first = harness.add("a", prompt, params)
    await harness.drain()
    second = harness.add("b", prompt, params)
    await harness.drain()
    other = Sequence(
        **{**_fields(second), "root": root_hash("model", salt=b"tenant"), "sequence_id": 99, "request_id": "c"}
    )
    harness.engine.add(other)
    await harness.drain()
    assert (first.cached_tokens, second.cached_tokens, other.cached_tokens) == (0, 96, 0)
    assert harness.tokens["a", 0] == harness.tokens["b", 0] == harness.tokens["c", 0]
    harness.check()


def _fields(sequence: Sequence) -> dict[str, object]:
    names = ("attempt", "choices", "prompt_tokens", "params", "seed", "end_ids", "arrived_s", "deadline_s")
    return {name: getattr(sequence, name) for name in names} | {"ids": sequence.ids[: sequence.prompt_tokens]}


async def test_cancel_during_a_step_keeps_pages_until_it_ends() -> None:
    harness = Harness()
    sequence = harness.add("a", prompt_of(random.Random(1), 40), SamplingParams(max_tokens=50, temperature=0.0))
    seen = []

    def cancel() -> None:
        if harness.engine.steps == 5:
            harness.engine.remove(sequence)
            seen.append(harness.pool.counts()["owned"])

    harness.before_step = cancel
    await harness.drain()
    assert seen == [3]  # 45 tokens: still owned while the step that reads them runs
    harness.check()


async def test_engine_error_fails_the_step_and_the_loop_goes_on() -> None:
    harness = Harness()
    harness.add("bad", prompt_of(random.Random(1), 40), SamplingParams(max_tokens=5, temperature=0.0))
    real = harness.executor.execute

    def broken(batch: Batch) -> list[RowResult]:
        harness.executor.execute = real  # type: ignore[method-assign]
        raise EngineError("device fell over")

    harness.executor.execute = broken  # type: ignore[method-assign]
    await harness.drain()
    assert [str(error) for _, error in harness.failed] == ["device fell over"]
    prompt = prompt_of(random.Random(2), 40)
    params = SamplingParams(max_tokens=5, temperature=0.0)
    harness.add("good", prompt, params)
    await harness.drain()
    assert harness.tokens == {("good", 0): reference_tokens(prompt, params, 1, 0, VOCABULARY)}
    harness.check()


class Forgetful(DecodePolicy):
    """Makes a mistake at its third step."""

    calls = 0

    def plan(self, view: EngineView) -> StepPlan:
        Forgetful.calls += 1
        if Forgetful.calls == 3:
            raise KeyError("a mistake of ours")
        return super().plan(view)


async def test_an_error_of_the_policy_fails_the_requests_and_not_the_loop() -> None:
    harness = Harness(policy=Forgetful())
    harness.add("bad", prompt_of(random.Random(1), 40), SamplingParams(max_tokens=5, temperature=0.0))
    await harness.drain()
    assert len(harness.failed) == 1
    prompt = prompt_of(random.Random(2), 40)
    params = SamplingParams(max_tokens=5, temperature=0.0)
    harness.add("good", prompt, params)
    await harness.drain()
    assert harness.tokens["good", 0] == reference_tokens(prompt, params, 1, 0, VOCABULARY)
    harness.check()
