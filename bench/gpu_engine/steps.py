"""Steps as the engine makes them, run by an executor and timed: whole, on the device, and what the host adds.

Time of a step is that of execute(), from the batch to the tokens on the host. Device time is what the kernels of a step
take, by torch's profiler, in steps apart from those that are timed. The host's part is the difference: what the GPU
waits for Python, launches and copies.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from core.sampling import SamplingParams
from engine.batch import Batch, Row, RowResult, SampleSpec
from engine.config import ModelConfig

SCRATCH_PAGES = 1  # frame 0 holds no sequence
PROFILED_STEPS = 8


class Runs(Protocol):
    def execute(self, batch: Batch) -> list[RowResult]: ...


@dataclass(frozen=True, slots=True)
class Load:
    """`rows` sequences of `context` tokens that decode, or, with `prompt_tokens`, prompts of that length."""

    name: str
    rows: int
    context: int = 0
    prompt_tokens: int = 0
    temperature: float = 0.0

    @property
    def tokens(self) -> int:
        """Of a step, that the rate counts."""
        return self.rows * max(1, self.prompt_tokens)

    def pages(self, page_size: int, steps: int) -> int:
        """Of the pool, that so many steps need."""
        return SCRATCH_PAGES + self.rows * self.width(page_size, steps)

    def width(self, page_size: int, steps: int) -> int:
        return -(-(self.prompt_tokens or self.context + steps) // page_size)


@dataclass(frozen=True, slots=True)
class Timed:
    """Medians of one load, in seconds."""

    step_s: float
    device_s: float | None  # None: the profiler saw no kernel
    tokens: int

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.step_s

    @property
    def host_s(self) -> float | None:
        return None if self.device_s is None else max(0.0, self.step_s - self.device_s)


def batches(load: Load, config: ModelConfig, page_size: int, steps: int) -> Iterator[Callable[[Sequence[int]], Batch]]:
    """One maker of a batch for each step, from the last step's tokens: decode goes on where it was, prefill anew."""
    width = load.width(page_size, steps)
    length = load.prompt_tokens or load.context
    pages = [tuple(range(SCRATCH_PAGES + i * width, SCRATCH_PAGES + (i + 1) * width)) for i in range(load.rows)]
    histories = [[(7 * at + i) % config.vocab_size for at in range(length)] for i in range(load.rows)]
    params = SamplingParams(max_tokens=steps + 1, temperature=load.temperature, ignore_eos=True)

    def row_of(index: int, ids: tuple[int, ...], start: int) -> Row:
        history = histories[index]
        spec = SampleSpec(params, 1234 + index, (0,), history, length)
        return Row(index, ids, start, pages[index], spec)

    def decode(last: Sequence[int]) -> Batch:
        for history, token in zip(histories, last, strict=True):
            history.append(token)
        return Batch(tuple(row_of(i, (last[i],), len(histories[i]) - 1) for i in range(load.rows)))

    def prefill(last: Sequence[int]) -> Batch:
        return Batch(tuple(row_of(i, tuple(histories[i]), 0) for i in range(load.rows)))

    for _ in range(steps):
        yield prefill if load.prompt_tokens else decode


def timed(
    load: Load, config: ModelConfig, executor: Runs, page_size: int, warm_steps: int, steps: int, device: torch.device
) -> Timed:
    """Raises RuntimeError when a row of a step failed."""
    makers = batches(load, config, page_size, warm_steps + steps + PROFILED_STEPS)
    last: list[int] = [1] * load.rows
    taken: list[float] = []

    def step() -> None:
        batch = next(makers)(last)
        began_s = time.perf_counter()
        results = executor.execute(batch)
        taken.append(time.perf_counter() - began_s)
        last[:] = [token_of(result) for result in results]

    for _ in range(warm_steps + steps):
        step()
    step_s = statistics.median(taken[warm_steps:])
    return Timed(step_s, device_seconds(step, PROFILED_STEPS) if device.type == "cuda" else None, load.tokens)


def token_of(result: RowResult) -> int:
    if result.error is not None:
        raise RuntimeError(result.error)
    return result.sampled[0].token_id


def device_seconds(step: Callable[[], None], steps: int) -> float | None:
    """What kernels and copies of one step take on the GPU, one after the other."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    total_us = sum(event.self_device_time_total for event in profile.key_averages())
    return total_us / 1e6 / steps if total_us else None


def pages_needed(loads: Sequence[Load], page_size: int, steps: int) -> int:
    """Of a pool that serves the loads one after the other."""
    return max(load.pages(page_size, steps + PROFILED_STEPS) for load in loads)
