"""From a sequence and a token count to one row of the batch."""

from __future__ import annotations

from engine.batch import Row, SampleSpec
from engine.sequence import Sequence


def build_row(sequence: Sequence, tokens: int) -> Row:
    """The next `tokens` positions of a sequence; it samples when they reach the end of its ids."""
    start, end = sequence.computed, sequence.computed + tokens
    ids = tuple(sequence.ids[start:end])
    sample = sample_spec(sequence) if sequence.sample_last and end == len(sequence.ids) else None
    return Row(sequence.sequence_id, ids, start, sequence.pages, sample)


def sample_spec(sequence: Sequence) -> SampleSpec:
    """The history is passed as it stands, not copied: a step ends before the next id is appended."""
    return SampleSpec(
        params=sequence.params,
        seed=sequence.seed,
        choices=sequence.choices,
        history=sequence.ids,
        prompt_tokens=sequence.prompt_tokens,
        suppress=sequence.suppressed(),
    )
