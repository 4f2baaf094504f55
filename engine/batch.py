"""What one step computes: a flat batch of rows, as plain data that any executor can run.

Letters used for shapes in every comment of the engine and the kernels:

    T  token positions of the batch (all rows together)     R  rows
    V  vocabulary                                            E  hidden size
    H  query heads     K  key/value heads     D  head_dim    L  layers
    N  pages of the pool     P  page_size (tokens)           S  context length of one row
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from core.sampling import SamplingParams

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """What is sampled at the end of a row: once per entry of `choices`, from the same logits.

    `history` is every id so far (prompt, then output), from which penalties are rebuilt; `prompt_tokens` says
    where the output begins. `allowed` is a mask over the vocabulary ([V] bool, True = allowed), or None.
    Noise is drawn from (seed, choice, position of the new token), never from state.
    """

    params: SamplingParams
    seed: int
    choices: tuple[int, ...]
    history: Seq[int]
    prompt_tokens: int
    suppress: tuple[int, ...] = ()  # ids that may not come yet: the end ids, before min_tokens
    allowed: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """Some consecutive token positions of one sequence: a prefill chunk, or one or more decode tokens.

    The KV of position p lives in page `pages[p // page_size]`, slot `p % page_size`. Positions before `start` have
    been written by earlier steps (or by another worker); this step writes start .. start + len(ids) - 1.
    """

    sequence_id: int
    ids: tuple[int, ...]
    start: int  # position of ids[0]
    pages: Seq[int]  # covers start + len(ids) tokens
    sample: SampleSpec | None = None  # None: a chunk that is not the prompt's last
    embeddings: torch.Tensor | None = None  # [len(ids), E] in place of the ids' embeddings (multimodal)
    verify_tokens: int = 0  # logits wanted for the last k positions too (speculation); 0 or 1: the last only


@dataclass(frozen=True, slots=True)
class PageCopy:
    """Copy one whole frame before the rows run: how choices of one request part ways in their tail page."""

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Batch:
    rows: tuple[Row, ...]
    copies: tuple[PageCopy, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(len(row.ids) for row in self.rows)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One chosen id. Logprobs are of the model's distribution before temperature and filters."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # the most likely (id, logprob), best first


@dataclass(frozen=True, slots=True)
class RowResult:
    """`sampled[c]` belongs to `row.sample.choices[c]`; empty for a row without a sample.

    A row with `verify_tokens` k > 1 has one choice: `sampled[i]` is what follows the i-th of its last k positions,
    given the ids before it. Its `history` includes the row's ids.

    `error` is set when this row could not be computed though its neighbours could: the error of that request.
    """

    sampled: tuple[SampledToken, ...] = ()
    error: str | None = None


class Executor(Protocol):
    """Runs batches over the frames of one pool. Not thread safe: one compute thread owns it."""

    def execute(self, batch: Batch) -> list[RowResult]:
        """Write the KV of every row and sample where asked; one result per row, in order.

        Raises EngineError when the step as a whole failed: then no row's KV may be used.
        """
        ...

    def zero_tail(self, page: int, used_tokens: int) -> None:
        """Zero the rows of a partly filled page past `used_tokens`, so that its bytes are its content alone."""
        ...
