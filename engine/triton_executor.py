"""Runs batches with the Triton kernels: decode steps as captured graphs, steps with longer rows launched one by one.

`execute` is `launch` and then `finish`: only the second waits for the device, and it always waits until the whole step
is done, tokens or not. What follows from its end, on the host or on any stream, is after every write of the step: pages
are offered to peers, given back at the step fence, and filled by what a peer has sent. A page that has landed was
waited for by the host, so any step that is launched then reads it whole.

The engine's loop calls the two together today; a loop that plans ahead may launch the next step in between
(engine/decode_graphs.py says how it names a token that it does not know yet).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from core.errors import EngineError, StartupError
from engine.attention_configs import AttentionConfigs
from engine.batch import Batch, PageCopy, Row, RowResult
from engine.decode_graphs import LAST_SAMPLED, DecodeGraphs
from engine.device_copy import Fence, SideStream, to_device
from engine.device_sampler import Sampling, on_device
from engine.model import Attend, Model, Rotary
from engine.row_slots import BUCKETS, Held, RowSlots, bucket_for
from engine.rows import by_row, row_fault
from engine.sampler import Draw
from engine.step import FlatRows, draws_of, flatten
from kernels.gpu.decode_attention import decode_attention
from kernels.gpu.errors import KERNEL_ERRORS
from kernels.gpu.prefill_attention import plan_prefill, prefill_attention, tile_tokens
from kernels.gpu.rope_write import rope_write

ERRORS = (RuntimeError, IndexError, TypeError, ValueError, MemoryError, *KERNEL_ERRORS)


class Launched(NamedTuple):
    """A step that the device has been given."""

    batch: Batch
    sound: tuple[Row, ...]
    faults: tuple[str | None, ...]
    sampling: Sampling | None
    done: Fence
    kept: tuple[tuple[int, Held], ...] = ()  # (sound row, its slot) where the device keeps the token for the next step


class TritonExecutor:
    """Implements engine.batch.Executor over `frames` [N, K, L, 2, P, D], on the device where the model's weights are.

    `max_rows`: the most rows of a decode step that are captured; a step with more is launched one by one. `configs`:
    what the attention kernels run with; their defaults where None.
    """

    def __init__(
        self,
        model: Model,
        frames: torch.Tensor,
        max_rows: int = BUCKETS[-1],
        configs: AttentionConfigs | None = None,
    ) -> None:
        config, page_size = model.config, frames.shape[4]
        shape = (config.kv_heads, config.layers, 2, page_size, config.head_dim)
        assert frames.shape[1:] == shape and frames.dtype == model.dtype, (frames.shape, frames.dtype, model.dtype)
        width = -(-config.max_positions // page_size)
        slots = bucket_for(min(max_rows, BUCKETS[-1]))
        self._model = model
        self._frames = frames
        self._scale = config.head_dim**-0.5
        self._slots = RowSlots(slots, width, page_size, len(frames))
        self._configs = configs or AttentionConfigs(config, page_size, frames.dtype)
        self._graphs = DecodeGraphs(model, frames, slots, width, self._configs)
        self._side = SideStream(frames.device)
        self._most = slots

    def execute(self, batch: Batch) -> list[RowResult]:
        return self.finish(self.launch(batch))

    def launch(self, batch: Batch) -> Launched:
        """Queue a step. Raises EngineError."""
        faults = tuple(row_fault(row, self._model.config, self._frames.shape[4]) for row in batch.rows)
        sound = tuple(row for row, fault in zip(batch.rows, faults, strict=True) if fault is None)
        try:
            with torch.inference_mode():
                self._copy(batch.copies)
                decodes = len(sound) <= self._most and all(_is_decode(row) for row in sound)
                sampling, kept = self._decode(sound) if sound and decodes else (self._mixed(sound), ())
        except ERRORS as error:
            raise self._failed(batch, error) from error
        return Launched(batch, sound, faults, sampling, Fence(self._frames.device), kept)

    def finish(self, launched: Launched) -> list[RowResult]:
        """Wait for a step, its tokens first. Raises EngineError."""
        results = [RowResult() for _ in launched.sound]
        try:
            if launched.sampling is not None:
                results = by_row(launched.sound, launched.sampling.results())
            launched.done.wait()
        except ERRORS as error:
            raise self._failed(launched.batch, error) from error
        for i, held in launched.kept:
            held.sampled = results[i].sampled[0].token_id if results[i].error is None else None
        found = iter(results)
        return [next(found) if fault is None else RowResult(error=fault) for fault in launched.faults]

    def capture(self) -> None:
        """Capture every bucket now, so that no request waits for it. Raises StartupError: nobody could be served."""
        try:
            with torch.inference_mode():
                self._graphs.capture_all()
        except ERRORS as error:
            raise StartupError(
                f"the decode step could not be captured: {error}; where memory ran out, give fewer --pages or smaller "
                "--max-rows; where a kernel did not compile, run `baton tune` again, or remove the file that it wrote"
            ) from error

    def zero_tail(self, page: int, used_tokens: int) -> None:
        """Waits: the page may be digested and offered at once."""
        with self._side.done():
            self._frames[page, :, :, :, used_tokens:].zero_()

    def _failed(self, batch: Batch, error: BaseException) -> EngineError:
        """What reached the device is not known; it is done when this returns, so that its pages can be given back."""
        self._slots.forget()
        try:
            Fence(self._frames.device).wait()
        except ERRORS:
            pass  # the device is lost, and every later step says so
        return EngineError(f"a step of {batch.tokens} tokens failed: {error}")

    def _copy(self, copies: Sequence[PageCopy]) -> None:
        for copy in copies:
            self._frames[copy.target].copy_(self._frames[copy.source])

    def _decode(self, rows: Sequence[Row]) -> tuple[Sampling | None, tuple[tuple[int, Held], ...]]:
        """One token of each row, in the slots of the captured step."""
        held, changes = self._slots.place(rows)
        self._graphs.write_table(changes)
        slots = [own.slot for own in held]
        ids = [LAST_SAMPLED if row.ids[0] == own.sampled else row.ids[0] for row, own in zip(rows, held, strict=True)]
        logits = self._graphs.run(slots, ids, [row.start for row in rows], bucket_for(1 + max(slots)))
        draws = [draw for row in rows for draw in draws_of(row)]
        sampling = _sampling(logits, draws, [own.slot for row, own in zip(rows, held, strict=True) if row.sample])
        kept = []
        for i, (row, own) in enumerate(zip(rows, held, strict=True)):
            own.sampled = None
            if row.sample is not None and len(row.sample.choices) == 1 and on_device(draws_of(row)[0]):
                kept.append((i, own))
        if sampling is not None and sampling.rows is not None and sampling.ids is not None:
            self._graphs.keep_sampled(sampling.rows, sampling.ids)
        return sampling, tuple(kept)

    def _mixed(self, rows: Sequence[Row]) -> Sampling | None:
        """Chunks and decode tokens together, launched one by one."""
        if not rows:
            return None
        device, model = self._frames.device, self._model
        flat = flatten(rows, self._frames.shape[4])
        tokens = to_device(np.stack([flat.ids, flat.positions, flat.pages, flat.slots]), device)  # [4, T]
        hidden = model.embed(tokens[0])
        for first, embeddings in flat.embeddings:
            hidden[first : first + len(embeddings)] = embeddings.to(device)
        wanted = to_device(np.array(flat.wanted, dtype=np.int64), device)
        hidden = model.forward(hidden, tokens[1], self._attention(flat, tokens), wanted)
        return _sampling(model.logits(hidden), flat.draws, range(len(flat.draws)))

    def _attention(self, flat: FlatRows, tokens: torch.Tensor) -> Attend:
        frames, scale, windows = self._frames, self._scale, self._model.config.windows
        device, singles = frames.device, sum(_is_single(row) for row in flat.rows)
        positions, (pages, slots) = tokens[1], tokens[2:].int()
        table = to_device(_table(flat.rows, frames.shape[4]), device)  # [R, W]
        starts = [row.start for row in flat.rows[singles:]]
        offsets = np.cumsum([0, *(len(row.ids) for row in flat.rows[singles:])]).tolist()
        given = to_device(np.array([row.start for row in flat.rows] + offsets, dtype=np.int32), device)
        lengths, begins, firsts = given[:singles] + 1, given[singles : len(table)], given[len(table) :]
        config, for_long, for_one = self._model.config, self._configs.prefill, self._configs.decode(singles)
        plan = plan_prefill(starts, offsets, tile_tokens(for_long, config.heads, config.kv_heads), device)

        def attend(
            layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rotary: Rotary | None = None
        ) -> torch.Tensor:
            assert rotary is not None, "backend triton runs models with rotary attention"
            norms = (rotary.q_norm, rotary.k_norm)
            rope_write(q, k, v, positions, rotary.inv_freq, frames, layer, pages, slots, None, *norms, rotary.eps)
            out = torch.empty(q.shape, dtype=q.dtype, device=device)
            window = windows[layer]
            if singles:
                decode_attention(
                    q[:singles, None], frames, layer, table[:singles], lengths, scale, window,
                    out=out[:singles, None], config=for_one,
                )  # fmt: skip
            if starts:
                prefill_attention(
                    q[singles:], frames, layer, table[singles:], begins, firsts, scale, window,
                    out=out[singles:], plan=plan, config=for_long,
                )  # fmt: skip
            return out

        return attend


def _is_single(row: Row) -> bool:
    return len(row.ids) == 1


def _is_decode(row: Row) -> bool:
    return len(row.ids) == 1 and row.embeddings is None


def _table(rows: Sequence[Row], page_size: int) -> npt.NDArray[np.int32]:
    """[R, W]: the pages that each row reads."""
    counts = [(row.start + len(row.ids) - 1) // page_size + 1 for row in rows]
    table = np.zeros((len(rows), max(counts)), dtype=np.int32)
    for line, row, count in zip(table, rows, counts, strict=True):
        line[:count] = row.pages[:count]
    return table


def _sampling(logits: torch.Tensor, draws: Sequence[Draw], rows: Sequence[int]) -> Sampling | None:
    return Sampling(logits, draws, rows) if draws else None
