"""The decode step over buffers that stay where they are: one CUDA graph per bucket of rows, no wait for the device.

A step's inputs are two numbers for each slot and the pages that are new. Slots without a row have position -1: they
attend to nothing and write nothing. An id of -1 stands for the token that this slot sampled last, which the device has:
a loop that plans its next step before it knows the last one's tokens needs no more than that.

Where there is no GPU the same code runs without capture.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.attention_configs import AttentionConfigs
from engine.device_copy import to_device
from engine.model import Attend, Model, Rotary
from engine.row_slots import BUCKETS
from kernels.gpu.decode_attention import decode_attention
from kernels.gpu.rope_write import rope_write
from kernels.page_address import Int64Array

LAST_SAMPLED = -1  # in place of an id
NO_ROW = -1  # in place of a position


class DecodeGraphs:
    """`table_width`: pages of the longest row. The buffers belong to this object, and the logits until the next run."""

    def __init__(
        self, model: Model, frames: torch.Tensor, max_rows: int, table_width: int, configs: AttentionConfigs
    ) -> None:
        assert max_rows in BUCKETS, max_rows
        device = frames.device
        self._model = model
        self._frames = frames
        self._configs = configs
        self._inputs = torch.zeros(max_rows, 2, dtype=torch.int32, device=device)  # id, position
        self._table = torch.zeros(max_rows, table_width, dtype=torch.int32, device=device)
        self._last = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._every = torch.arange(max_rows, device=device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}  # by bucket, at most all of BUCKETS

    def write_table(self, changes: Int64Array) -> None:
        """[2, n]: places in the flat table and the pages there."""
        if changes.shape[1]:
            places, pages = to_device(changes, self._frames.device)
            self._table.view(-1).index_copy_(0, places, pages.int())

    def run(self, slots: Sequence[int], ids: Sequence[int], positions: Sequence[int], bucket: int) -> torch.Tensor:
        """Logits [bucket, V]; rows of slots without a position hold anything."""
        inputs = np.zeros((bucket, 2), dtype=np.int32)
        inputs[:, 1] = NO_ROW
        inputs[np.array(slots, dtype=np.int64)] = np.array([ids, positions], dtype=np.int32).T
        self._inputs[:bucket].copy_(to_device(inputs, self._frames.device), non_blocking=True)
        if self._frames.device.type != "cuda":
            return self._step(bucket)
        if bucket not in self._graphs:
            self._graphs[bucket] = self._capture(bucket)
        graph, logits = self._graphs[bucket]
        graph.replay()
        return logits

    def keep_sampled(self, slots: torch.Tensor, ids: torch.Tensor) -> None:
        """What these slots sampled, for a next step that asks for it. Both [n] int64, on the device."""
        self._last.index_copy_(0, slots, ids)

    def capture_all(self) -> None:
        """At start, the largest first: the others find their memory in its pool."""
        for bucket in sorted(BUCKETS, reverse=True):
            if bucket <= len(self._inputs):
                self.run((), (), (), bucket)

    def _capture(self, bucket: int) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """A first run compiles the kernels and lets libraries allocate; it writes what the replay writes again."""
        side = torch.cuda.Stream(self._frames.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step(bucket)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        shared = next((other.pool() for other, _ in self._graphs.values()), None)
        with torch.cuda.graph(graph, pool=shared):
            logits = self._step(bucket)
        return graph, logits

    def _step(self, bucket: int) -> torch.Tensor:
        """Only operations on the device, with shapes that follow from the bucket."""
        given, positions = self._inputs[:bucket].unbind(1)
        ids = torch.where(given == LAST_SAMPLED, self._last[:bucket], given.long())
        hidden = self._model.embed(ids)
        at = positions.clamp(min=0).contiguous()
        hidden = self._model.forward(hidden, at, self._attention(positions, at, bucket), self._every[:bucket])
        return self._model.logits(hidden)

    def _attention(self, positions: torch.Tensor, at: torch.Tensor, bucket: int) -> Attend:
        frames, config = self._frames, self._model.config
        page_size, scale = frames.shape[4], config.head_dim**-0.5
        table, lengths = self._table[:bucket], (positions + 1).contiguous()
        own = table.gather(1, (at // page_size).long()[:, None])[:, 0]
        pages = torch.where(positions == NO_ROW, NO_ROW, own)
        slots, chosen = at % page_size, self._configs.decode(bucket)

        def attend(
            layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rotary: Rotary | None = None
        ) -> torch.Tensor:
            assert rotary is not None, "backend triton runs models with rotary attention"
            norms = (rotary.q_norm, rotary.k_norm)
            rope_write(q, k, v, at, rotary.inv_freq, frames, layer, pages, slots, None, *norms, rotary.eps)
            window = config.windows[layer]
            mixed = decode_attention(q[:, None], frames, layer, table, lengths, scale, window, config=chosen)
            return mixed[:, 0]

        return attend
