"""Runs a batch in torch: checks the rows, writes and attends through the pages, samples. One step, one model call."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from core.errors import EngineError
from core.layout import PageLayout
from engine.batch import Batch, PageCopy, Row, RowResult
from engine.model import Attend, Model, Rotary
from engine.rows import by_row, row_fault
from engine.sampler import sample_rows
from engine.step import Step, prepare
from kernels.page_write import page_write
from kernels.paged_attention import GatherBuffer, paged_attention
from kernels.rms_norm import rms_norm
from kernels.rope import Angles, angles, rope


class TorchExecutor:
    """Implements engine.batch.Executor over `frames`, the pool's memory: pages * layout.page_bytes writable bytes.

    The memory stays the caller's, and must outlive the executor. `threads` is how many compute threads torch may use
    on the thread that calls `execute`.
    """

    def __init__(self, model: Model, layout: PageLayout, frames: memoryview, threads: int) -> None:
        config = model.config
        shape = (layout.kv_heads, layout.layers, layout.parts, layout.page_size, layout.head_dim)
        assert shape == (config.kv_heads, config.layers, 2, layout.page_size, config.head_dim), shape
        assert model.dtype == getattr(torch, layout.dtype), (model.dtype, layout.dtype)
        assert len(frames) % layout.page_bytes == 0, (len(frames), layout.page_bytes)
        self._model = model
        self._threads = threads
        self._frames = torch.frombuffer(frames, dtype=model.dtype).view(-1, *shape)  # [N, K, L, 2, P, D]
        self._scale = config.head_dim**-0.5
        self._buffer = GatherBuffer()

    def execute(self, batch: Batch) -> list[RowResult]:
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        assert all(min(row.pages) >= 0 and max(row.pages) < len(self._frames) for row in batch.rows), batch.rows
        faults = [row_fault(row, self._model.config, self._frames.shape[4]) for row in batch.rows]
        sound = [row for row, fault in zip(batch.rows, faults, strict=True) if fault is None]
        try:
            with torch.inference_mode():
                self._copy(batch.copies)
                results = iter(self._run(sound))
        except (RuntimeError, IndexError, TypeError, ValueError, MemoryError) as error:
            raise EngineError(f"a step of {batch.tokens} tokens failed: {error}") from error
        return [next(results) if fault is None else RowResult(error=fault) for fault in faults]

    def zero_tail(self, page: int, used_tokens: int) -> None:
        self._frames[page, :, :, :, used_tokens:].zero_()

    def _copy(self, copies: Sequence[PageCopy]) -> None:
        for copy in copies:
            self._frames[copy.target].copy_(self._frames[copy.source])

    def _run(self, rows: Sequence[Row]) -> list[RowResult]:
        if not rows:
            return []
        model = self._model
        step = prepare(rows, self._frames, model.config.heads, model.config.windows)
        hidden = model.forward(self._embed(step), step.positions, self._attention(step), step.wanted)  # [M, E]
        if not step.draws:
            return [RowResult() for _ in rows]
        return by_row(rows, sample_rows(model.logits(hidden), step.draws))

    def _attention(self, step: Step) -> Attend:
        turned: dict[int, Angles] = {}  # by inv_freq: the layers of a model share one or two

        def attend(
            layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rotary: Rotary | None = None
        ) -> torch.Tensor:
            if rotary is not None:
                if id(rotary.inv_freq) not in turned:
                    turned[id(rotary.inv_freq)] = angles(step.positions, rotary.inv_freq, q.dtype)
                q, k = _rotated(q, k, rotary, turned[id(rotary.inv_freq)])
            page_write(self._frames, layer, k, v, step.write_rows)
            return paged_attention(q, self._frames, layer, step.plans[layer], self._scale, self._buffer)

        return attend

    def _embed(self, step: Step) -> torch.Tensor:
        hidden = self._model.embed(step.ids)  # [T, E]
        for first, embeddings in step.embeddings:
            hidden[first : first + len(embeddings)] = embeddings
        return hidden


def _rotated(q: torch.Tensor, k: torch.Tensor, rotary: Rotary, turned: Angles) -> tuple[torch.Tensor, torch.Tensor]:
    if rotary.q_norm is not None and rotary.k_norm is not None:
        q, k = rms_norm(q, rotary.q_norm, rotary.eps), rms_norm(k, rotary.k_norm, rotary.eps)
    return rope(q, turned), rope(k, turned)
