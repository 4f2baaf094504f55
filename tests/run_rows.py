"""Runs sequences through an executor without an engine: pages in random order over a pool full of NaN."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from core.layout import PageLayout
from core.sampling import SamplingParams
from engine.batch import Batch, Executor, Row, RowResult, SampleSpec
from engine.memory import page_layout
from engine.model import Attend, Model
from engine.torch_executor import TorchExecutor

GREEDY = SamplingParams(max_tokens=64, temperature=0.0)


class Recording:
    """A model that keeps the logits that it gave."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.config = model.config
        self.dtype = model.dtype
        self.seen: list[torch.Tensor] = []

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed(ids)

    def forward(
        self, hidden: torch.Tensor, positions: torch.Tensor, attend: Attend, wanted: torch.Tensor
    ) -> torch.Tensor:
        return self.model.forward(hidden, positions, attend, wanted)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        self.seen.append(self.model.logits(hidden).float())
        return self.seen[-1]


@dataclass
class Run:
    """One sequence: its ids so far, its pages, and the logits behind each of its new ids."""

    number: int
    ids: list[int]
    pages: list[int]
    prompt_tokens: int
    params: SamplingParams = GREEDY
    computed: int = 0
    logits: list[torch.Tensor] = field(default_factory=list)

    @property
    def output(self) -> list[int]:
        return self.ids[self.prompt_tokens :]

    def row(self, chunk: int | None, verify_tokens: int = 0) -> Row:
        end = len(self.ids) if chunk is None else min(len(self.ids), self.computed + chunk)
        spec = SampleSpec(self.params, 11, (0,), self.ids, self.prompt_tokens)
        return Row(
            self.number,
            tuple(self.ids[self.computed : end]),
            self.computed,
            self.pages,
            spec if end == len(self.ids) else None,
            verify_tokens=verify_tokens,
        )


class Rig:
    """An executor over a pool that holds `tokens` tokens, every byte of it NaN."""

    def __init__(
        self,
        model: Model,
        tokens: int = 4096,
        page_size: int = 16,
        threads: int = 1,
        build: Callable[[Model, torch.Tensor], Executor] | None = None,
    ) -> None:
        """`build` makes another executor than the reference, over the pool's frames."""
        self.model = Recording(model)
        self.layout: PageLayout = page_layout(model.config, page_size, str(model.dtype).removeprefix("torch."))
        pages = 1 + tokens // page_size
        self.memory = mmap.mmap(-1, pages * self.layout.page_bytes)
        self.frames = torch.frombuffer(self.memory, dtype=model.dtype)
        self.frames.fill_(float("nan"))
        shape = (model.config.kv_heads, model.config.layers, 2, page_size, model.config.head_dim)
        self.frames = self.frames.view(pages, *shape)
        self.executor: Executor = (
            TorchExecutor(self.model, self.layout, memoryview(self.memory), threads)
            if build is None
            else build(model, self.frames)
        )
        generator = torch.Generator().manual_seed(3)
        self.free = (torch.randperm(pages - 1, generator=generator) + 1).tolist()

    def open(self, ids: Sequence[int], room: int = 64, params: SamplingParams = GREEDY) -> Run:
        count = self.layout.pages_for(len(ids) + room)
        pages, self.free = self.free[:count], self.free[count:]
        assert len(pages) == count, "the pool of the test is too small"
        return Run(len(self.free), list(ids), pages, len(ids), params)

    def step(self, rows: Sequence[Row]) -> list[RowResult]:
        self.model.seen.clear()
        return self.executor.execute(Batch(tuple(rows)))

    def advance(self, runs: Sequence[Run], chunk: int | None) -> None:
        """One step over all runs: a chunk of those that are in their prompt, a token of the others."""
        rows = [run.row(chunk) for run in runs]
        results = self.step(rows)
        logits = iter(torch.cat(self.model.seen) if self.model.seen else ())
        for run, row, result in zip(runs, rows, results, strict=True):
            assert result.error is None, result.error
            run.computed += len(row.ids)
            if row.sample is not None:
                run.logits.append(next(logits))
                run.ids.append(result.sampled[0].token_id)

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int, chunk: int | None) -> list[Run]:
        """Each prompt's run, until all have `new_tokens`; short prompts decode while long ones are in their chunks."""
        runs = [self.open(prompt, new_tokens) for prompt in prompts]
        while unfinished := [run for run in runs if len(run.output) < new_tokens]:
            self.advance(unfinished, chunk)
        return runs


def prompt(length: int, vocabulary: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(3, vocabulary, (length,), generator=generator).tolist()
