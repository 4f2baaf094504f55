"""Which rows of a batch can be computed, and how the results of one row's positions become one."""

from __future__ import annotations

from collections.abc import Sequence

from engine.batch import Row, RowResult
from engine.config import ModelConfig
from engine.step import logits_rows


def row_fault(row: Row, config: ModelConfig, page_size: int) -> str | None:
    """Why this row cannot be computed, though its neighbours can."""
    end = row.start + len(row.ids)
    assert row.verify_tokens <= len(row.ids), row
    assert row.verify_tokens < 2 or row.sample is None or len(row.sample.choices) == 1, row
    assert row.ids and row.start >= 0 and len(row.pages) * page_size >= end, row
    if end > config.max_positions:
        return f"position {end - 1} is beyond the model's context of {config.max_positions} tokens"
    if row.embeddings is not None:
        wanted = (len(row.ids), config.hidden_size)
        shape = tuple(row.embeddings.shape)
        return None if shape == wanted else f"embeddings have the shape {shape}, not {wanted}"
    if not (min(row.ids) >= 0 and max(row.ids) < config.vocab_size):
        return f"a token id is outside the vocabulary of {config.vocab_size}"
    return None


def by_row(rows: Sequence[Row], results: Sequence[RowResult]) -> list[RowResult]:
    """Several results of one row, one for each verified position, become one; a row without a sample has none."""
    merged, first = [], 0
    for row in rows:
        own = results[first : first + logits_rows(row)]
        first += len(own)
        error = next((result.error for result in own if result.error is not None), None)
        sampled = () if error is not None else tuple(token for result in own for token in result.sampled)
        merged.append(RowResult(sampled, error))
    return merged
