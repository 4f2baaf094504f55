"""Where a prompt's tokens came from, as the decode worker puts it together: the parts add up to the prompt."""

from __future__ import annotations

from dataclasses import replace

from core.messages import Receipt
from engine.sequence import Sequence


def taken_in(prompt: Sequence, source: Receipt, exposed_s: float) -> Receipt:
    """The source's share, less what was cached here: where both had it, it was ours that counted.

    What the source fetched was fetched, though it may have been from here; and lies after what it had itself.
    """
    cached_there, fetched = source.cached_prefill_tokens, source.fetched_tokens
    all_here = min(prompt.cached_tokens, prompt.prompt_tokens)
    here = min(all_here, cached_there) + max(0, all_here - cached_there - fetched)
    cached_there = max(0, cached_there - all_here)
    return replace(
        source,
        cached_prefill_tokens=cached_there,
        cached_decode_tokens=here,
        computed_tokens=prompt.prompt_tokens - here - cached_there - fetched,
        transferred_tokens=prompt.prompt_tokens - all_here,
        exposed_transfer_s=exposed_s,
    )


def prefilled_here(sequence: Sequence) -> Receipt:
    return Receipt(
        cached_decode_tokens=sequence.cached_tokens,
        computed_tokens=sequence.prompt_tokens - sequence.cached_tokens,
        recomputed_tokens=sequence.recomputed_tokens,
        queue_s=(sequence.first_admitted_s or sequence.arrived_s) - sequence.arrived_s,
    )
