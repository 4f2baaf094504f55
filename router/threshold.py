"""Below how many uncached tokens a prompt is prefilled on the decode worker: configured, or measured as we go.

A hand-off costs a fixed time that a local prefill does not: two more messages, a grant, pages moved and checked. It is
measured on every remote prefill, as what its first token took beyond the queue and the computing:

    overhead = time to first token - queue wait - uncached tokens / prefill rate

A local prefill costs the running batch one stall of tokens / rate. With a stall counted as heavily as a delay of the
new request itself, the two cost the same at tokens = overhead * rate, which is the threshold.
"""

from __future__ import annotations

from dataclasses import replace

from router.choose import Terms

WEIGHT = 0.1  # of the newest measurement in the running mean
LEAST_TOKENS, MOST_TOKENS = 16, 2048


class Threshold:
    """`auto` False: the configured number stands."""

    def __init__(self, terms: Terms, *, auto: bool = False) -> None:
        self._terms = terms
        self._auto = auto
        self._overhead_s: float | None = None
        self._rate = 0.0  # prefill tokens per second

    def terms(self) -> Terms:
        """The numbers of the next choice."""
        if not self._auto or self._overhead_s is None or not self._rate:
            return self._terms
        tokens = int(self._overhead_s * self._rate)
        return replace(self._terms, local_prefill_tokens=min(MOST_TOKENS, max(LEAST_TOKENS, tokens)))

    def observe(self, first_token_s: float, queue_s: float, computed_tokens: int, rate: float) -> None:
        """One remote prefill has brought its first token; `rate` is what its worker reports."""
        if not self._auto or rate <= 0.0:
            return
        overhead_s = max(0.0, first_token_s - queue_s - computed_tokens / rate)
        before_s = overhead_s if self._overhead_s is None else self._overhead_s
        self._overhead_s = before_s + WEIGHT * (overhead_s - before_s)
        self._rate = rate
