"""What the modelled workers can do: figures of an 8B model on one H100 each.

A prompt takes its tokens / the rate, and more when attention over its own length counts. A decode step takes a fixed
time, a time for each sequence, and one for each token of context that is read:

    batch 8, 1.3k of context:   7.3 ms      batch 64:  12.9 ms      batch 128:  19.3 ms

which is what public benchmarks of Llama-3.1-8B in 16 bits report, within 5 %. The pool is 55 GB at 128 KiB a token.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Machine:
    """Raises nothing; every figure is of one worker."""

    prefill_tokens_per_s: float = 25_000.0
    prefill_fixed_s: float = 0.02
    prefill_doubled_tokens: float = 100_000.0  # a prompt this long costs twice as much a token
    decode_fixed_s: float = 0.0065
    decode_s_per_sequence: float = 44e-6
    decode_s_per_context_token: float = 44e-9
    page_tokens: int = 16
    pages: int = 26_000
    growth_tokens: int = 256  # room that a decode worker keeps for each sequence beside what it has
    handoff_s: float = 0.01  # what compute does not hide of it
    start_s: float = 20.0  # from the decision to a worker that takes requests

    def prefill_s(self, tokens: int) -> float:
        """Seconds that a prompt of so many tokens takes when nothing else runs."""
        return self.prefill_fixed_s + tokens / self.prefill_tokens_per_s * (1 + tokens / self.prefill_doubled_tokens)

    def step_s(self, sequences: int, context_tokens: float) -> float:
        """Seconds of one decode step."""
        by_context = self.decode_s_per_context_token * context_tokens
        return self.decode_fixed_s + self.decode_s_per_sequence * sequences + by_context


@dataclass(frozen=True, slots=True)
class Slo:
    """When a request was served well: its first token in time, and its tokens fast enough on average."""

    first_token_s: float = 2.0  # or twice what its prompt takes alone, if that is longer
    token_gap_s: float = 0.025

    def first_token_in_time(self, first_token_s: float, alone_s: float) -> bool:
        return first_token_s <= max(self.first_token_s, 2 * alone_s)
