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


class FlatRows(NamedTuple):
    """Rows of one token first, by context length; the rest follow as they came. Arrays are int64."""

    rows: tuple[Row, ...]  # in that order
    ids: Int64Array  # [T]
    positions: Int64Array  # [T]
    pages: Int64Array  # [T], where each token's keys go
    slots: Int64Array  # [T]
    wanted: tuple[int, ...]  # M token indices, in the order in which the rows came
    embeddings: tuple[tuple[int, torch.Tensor], ...]  # (first token, [t, E]) in place of the ids' own
    draws: tuple[Draw, ...]  # M of them


class Step(NamedTuple):
    """Shapes in the letters of engine.batch; M is the number of logits rows that are wanted."""

    ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    write_rows: torch.Tensor  # [T * K] int64
    plans: tuple[tuple[Group, ...], ...]  # per layer; layers with the same window share one
    wanted: torch.Tensor  # [M] int64, token indices, in the order of the rows
    embeddings: tuple[tuple[int, torch.Tensor], ...]  # (first token, [t, E]) in place of the ids' own
    draws: tuple[Draw, ...]  # M of them


def flatten(rows: Sequence[Row], page_size: int) -> FlatRows:
    order = sorted(range(len(rows)), key=lambda i: _place_in_batch(rows[i]))
    ordered = tuple(rows[i] for i in order)
    counts = np.array([len(row.ids) for row in ordered], dtype=np.int64)
    firsts = counts.cumsum() - counts  # of each row, in the flat batch
    starts = np.array([row.start for row in ordered], dtype=np.int64)
    positions = np.arange(counts.sum()) + np.repeat(starts - firsts, counts)
    first_of = dict(zip(order, firsts.tolist(), strict=True))
    pages, slots = _places(ordered, page_size)
    return FlatRows(
        rows=ordered,
        ids=np.concatenate([_ids(row) for row in ordered]),
        positions=positions,
        pages=pages,
        slots=slots,
        wanted=tuple(first_of[i] + len(row.ids) - back for i, row in enumerate(rows) for back in _backs(row)),
        embeddings=tuple((first_of[i], row.embeddings) for i, row in enumerate(rows) if row.embeddings is not None),
        draws=tuple(draw for row in rows for draw in draws_of(row)),
    )


def prepare(rows: Sequence[Row], frames: torch.Tensor, query_heads: int, windows: Sequence[int | None]) -> Step:
    flat = flatten(rows, frames.shape[4])
    spans = [Span(row.pages, row.start, len(row.ids)) for row in flat.rows]
    plans = {window: plan_attention(spans, frames, query_heads, window) for window in {*windows}}
    return Step(
        ids=torch.from_numpy(flat.ids),
        positions=torch.from_numpy(flat.positions),
        write_rows=write_rows(frames, flat.pages, flat.slots),
        plans=tuple(plans[window] for window in windows),
        wanted=torch.tensor(flat.wanted, dtype=torch.int64),
        embeddings=flat.embeddings,
        draws=flat.draws,
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


def draws_of(row: Row) -> list[Draw]:
    """One per sampled position. With drafted ids in the row, each is judged by the history before it."""
    spec = row.sample
    if spec is None:
        return []
    return [Draw(spec, len(spec.history) - back + 1) for back in _backs(row)]
