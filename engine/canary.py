"""A token through an idle engine: what a health check needs where no step has shown lately that the model computes.

It is written into frame 0, which belongs to nobody, and leaves no sequence and no page behind.
"""

from __future__ import annotations

from collections.abc import Sequence

from core.errors import EngineError
from core.sampling import SamplingParams
from engine.batch import Batch, Row, RowResult, SampleSpec

FRESH_S = 2.0  # so long a step is proof enough: checks that follow each other cost one token between them


def canary() -> Batch:
    """One row of one token, of no sequence, with a greedy sample that nobody reads."""
    greedy = SampleSpec(SamplingParams(temperature=0.0), seed=0, choices=(0,), history=(0,), prompt_tokens=1)
    return Batch((Row(sequence_id=0, ids=(0,), start=0, pages=(0,), sample=greedy),))


def fault_of(results: Sequence[RowResult]) -> EngineError | None:
    """Why the canary died."""
    error = next((result.error for result in results if result.error is not None), None)
    return None if error is None else EngineError(f"a token through the idle engine failed: {error}")
