"""Causal attention of a variable-length batch over pages: chunks and decode tokens in one call.

    q [T, H, D], frames [N, K, L, 2, P, D], layer, groups from plan_attention  →  [T, H, D]

Query head h reads key/value head h // (H / K). A query at position p sees keys p - window + 1 .. p. The keys and values
of the queries themselves have been written before. Slots that no token was written to may hold NaN.

The CPU path copies the pages of a group head by head into a dense buffer and multiplies there. Measured against the
library's fused attention on AVX-512 (16 heads on 8, D 128): decode of 8 rows at 600 tokens 1.3 times faster, a chunk of
512 tokens 2.5 times in bfloat16 and 1.4 times in float32. Scores and probabilities are rounded to bfloat16 in between,
as unfused attention does everywhere; sums and the softmax are float32. float16 is widened to float32 throughout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernels.attention_plan import Block, Group, Span
from kernels.page_address import LAYER, PART, flat, rows_per


def paged_attention_reference(
    q: torch.Tensor, frames: torch.Tensor, layer: int, spans: Sequence[Span], scale: float, window: int | None
) -> torch.Tensor:
    """Token by token, in float32."""
    heads, page_size = q.shape[1], frames.shape[4]
    out, token = torch.empty_like(q), 0
    for span in spans:
        for position in range(span.start, span.start + span.length):
            seen = range(0 if window is None else max(0, position - window + 1), position + 1)
            pages = torch.tensor([span.pages[p // page_size] for p in seen])
            slots = torch.tensor([p % page_size for p in seen])
            pair = frames[:, :, layer][pages, :, :, slots].float()  # [S, K, 2, D]
            pair = pair.repeat_interleave(heads // frames.shape[1], dim=1)  # [S, H, 2, D]
            score = torch.einsum("hd,shd->hs", q[token].float(), pair[:, :, 0]) * scale
            out[token] = torch.einsum("hs,shd->hd", score.softmax(-1), pair[:, :, 1]).to(q.dtype)
            token += 1
    return out


class GatherBuffer:
    """Room for the gathered keys and values of one group, kept from layer to layer and from step to step.

    Fresh memory for each layer would be returned to the system and faulted in again: a third of the gather's time.
    """

    def __init__(self) -> None:
        self._parts: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, name: str, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """[elements], uninitialised; valid until the next call with the same name and type."""
        part = self._parts.get((name, dtype))
        if part is None or part.numel() < elements:
            part = torch.empty(elements, dtype=dtype)
            self._parts[name, dtype] = part
        return part[:elements]


def paged_attention(
    q: torch.Tensor, frames: torch.Tensor, layer: int, groups: Sequence[Group], scale: float, buffer: GatherBuffer
) -> torch.Tensor:
    tokens, heads, head_dim = q.shape
    assert head_dim == frames.shape[5] and heads % frames.shape[1] == 0, (q.shape, frames.shape)
    assert q.dtype == frames.dtype and 0 <= layer < frames.shape[2], (q.dtype, frames.dtype, layer)
    assert tokens == sum(group.rows * group.length for group in groups), tokens
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for group in groups:
        span = slice(group.first_token, group.first_token + group.rows * group.length)
        keys, values = gather(frames, layer, group, buffer)
        grouped = (group.rows, group.length, frames.shape[1], heads // frames.shape[1], head_dim)
        _attend(q[span].view(grouped), keys, values, group.blocks, scale, out[span].view(grouped))
    return out


def gather(frames: torch.Tensor, layer: int, group: Group, buffer: GatherBuffer) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [g * K, slots, D]; unwritten values are 0."""
    page_size, head_dim = frames.shape[4], frames.shape[5]
    width = page_size * head_dim
    blocks = flat(frames, width)
    to_layer = layer * rows_per(frames, LAYER, width)
    to_value = to_layer + rows_per(frames, PART, width)
    parts = []
    for name, offset in (("keys", to_layer), ("values", to_value)):
        part = buffer.take(name, group.gather.numel() * width, frames.dtype).view(-1, width)
        torch.index_select(blocks[offset:], 0, group.gather, out=part)
        if frames.dtype == torch.float16:  # no half-precision products on a CPU
            part = buffer.take(name, part.numel(), torch.float32).view(part.shape).copy_(part)
        parts.append(part.view(-1, group.slots, head_dim))
    keys, values = parts
    if group.unwritten is not None:
        values.view(-1, head_dim).index_fill_(0, group.unwritten, 0)
    return keys, values


def _attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    blocks: Sequence[Block],
    scale: float,
    out: torch.Tensor,
) -> None:
    """q and out [g, M, K, H/K, D]."""
    rows, _, kv_heads, share, head_dim = q.shape
    for first, last, low, high, mask_from, mask in blocks:
        m = last - first
        part = q[:, first:last].permute(0, 2, 3, 1, 4).reshape(rows * kv_heads, share * m, head_dim)
        part = part.to(keys.dtype)
        scores = part.new_empty(part.shape[0], part.shape[1], high - low)
        torch.baddbmm(scores, part, keys[:, low:high].transpose(1, 2), beta=0, alpha=scale, out=scores)
        if mask is not None:
            scores.view(rows, kv_heads, share, m, -1)[..., mask_from:].masked_fill_(mask, float("-inf"))
        mixed = torch.bmm(scores.softmax(-1), values[:, low:high])
        out[:, first:last] = mixed.view(rows, kv_heads, share, m, head_dim).permute(0, 3, 1, 2, 4)
