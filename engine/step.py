"""A batch's rows as flat tensors: the order of the tokens, where their keys go, what attends to what, what is sampled.

Rows of one token stand first, by context length, so that rows of like length are attended in one group; the rest follow
as they came. Results are asked for in the order of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from engine.batch import Row
from engine.sampler import Draw
from kernels.attention_plan import Group, Span, plan_attention
from kernels.page_address import Int64Array
from kernels.page_write import write_rows


class Step(NamedTuple):
    """Shapes in the letters of engine.batch; M is the number of logits rows that are wanted."""

    ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    write_rows: torch.Tensor  # [T * K] int64
    plans: tuple[tuple[Group, ...], ...]  # per layer; layers with the same window share one
    wanted: torch.Tensor  # [M] int64, token indices, in the order of the rows
    embeddings: tuple[tuple[int, torch.Tensor], ...]  # (first token, [t, E]) in place of the ids' own
    draws: tuple[Draw, ...]  # M of them


def prepare(rows: Sequence[Row], frames: torch.Tensor, query_heads: int, windows: Sequence[int | None]) -> Step:
    order = sorted(range(len(rows)), key=lambda i: _place_in_batch(rows[i]))
    ordered = [rows[i] for i in order]
    counts = np.array([len(row.ids) for row in ordered], dtype=np.int64)
    firsts = counts.cumsum() - counts  # of each row, in the flat batch
    starts = np.array([row.start for row in ordered], dtype=np.int64)
    positions = np.arange(counts.sum()) + np.repeat(starts - firsts, counts)
    spans = [Span(row.pages, row.start, len(row.ids)) for row in ordered]
    plans = {window: plan_attention(spans, frames, query_heads, window) for window in {*windows}}
    first_of = dict(zip(order, firsts.tolist(), strict=True))
    wanted = [first_of[i] + len(row.ids) - back for i, row in enumerate(rows) for back in _backs(row)]
    return Step(
        ids=torch.from_numpy(np.concatenate([_ids(row) for row in ordered])),
        positions=torch.from_numpy(positions),
        write_rows=write_rows(frames, *_places(ordered, frames.shape[4])),
        plans=tuple(plans[window] for window in windows),
        wanted=torch.tensor(wanted, dtype=torch.int64),
        embeddings=tuple((first_of[i], row.embeddings) for i, row in enumerate(rows) if row.embeddings is not None),
        draws=tuple(draw for row in rows for draw in _draws(row)),
    )


def logits_rows(row: Row) -> int:
    """How many of the row's last positions are sampled at."""
    return 0 if row.sample is None else max(1, row.verify_tokens)


def _place_in_batch(row: Row) -> tuple[bool, int]:
    return (len(row.ids) > 1, -row.start if len(row.ids) == 1 else 0)


def _ids(row: Row) -> Int64Array:
    """Where embeddings stand in for them, ids may be placeholders beyond the vocabulary."""
    return np.array(row.ids if row.embeddings is None else (0,) * len(row.ids), dtype=np.int64)


def _places(rows: Sequence[Row], page_size: int) -> tuple[Int64Array, Int64Array]:
    """Page and slot of each token [T]."""
    pages, slots = [], []
    for row in rows:
        first, last = row.start // page_size, (row.start + len(row.ids) - 1) // page_size
        positions = np.arange(row.start, row.start + len(row.ids), dtype=np.int64)
        own = np.array(row.pages[first : last + 1], dtype=np.int64)
        pages.append(own[positions // page_size - first])
        slots.append(positions % page_size)
    return np.concatenate(pages), np.concatenate(slots)


def _backs(row: Row) -> range:
    """Distances of the sampled positions from the row's end: k .. 1."""
    return range(logits_rows(row), 0, -1)


def _draws(row: Row) -> list[Draw]:
    """With drafted ids in the row, each is judged by the history before it."""
    spec = row.sample
    if spec is None:
        return []
    return [Draw(spec, len(spec.history) - back + 1) for back in _backs(row)]
