"""How many prefill workers: enough to compute what arrives, and to be rid of the queue in time for first tokens.

    workers = (arriving tokens/s + queued tokens / time left) / (tokens/s of a worker x the share that may be busy)

The time left is what the target for the first token leaves beside computing a prompt. When requests are seen to wait
longer than the target although the sum says that there are enough, the sum is wrong, and one more is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.scaling.steady import Need


@dataclass(frozen=True, slots=True)
class PrefillSignals:
    """Of the whole tier, over the last seconds."""

    ready: int  # workers that compute
    arriving_tokens_per_s: float  # uncached prompt tokens of accepted requests
    queued_tokens: int  # not computed yet
    queue_wait_s: float  # 90th percentile, of requests that began lately or still wait
    first_token_s: float  # 90th percentile of TTFT
    tokens_per_s: float  # of one busy worker; 0: none has been busy yet


@dataclass(frozen=True, slots=True)
class PrefillTarget:
    first_token_s: float = 2.0
    busy_share: float = 0.8  # queues grow without bound as a server's load nears 1
    assumed_tokens_per_s: float = 1000.0  # of a worker, before any was measured


def prefill_need(signals: PrefillSignals, target: PrefillTarget) -> Need:
    rate = (signals.tokens_per_s or target.assumed_tokens_per_s) * target.busy_share
    time_left_s = target.first_token_s / 2
    arriving = signals.arriving_tokens_per_s / rate
    queued = signals.queued_tokens / time_left_s / rate
    workers = arriving + queued
    reason = (
        f"{signals.arriving_tokens_per_s:.0f} tokens/s arrive and {signals.queued_tokens} wait: "
        f"{workers:.1f} workers at {rate:.0f} tokens/s"
    )
    late_s = max(signals.queue_wait_s, signals.first_token_s)
    if late_s > target.first_token_s and signals.queued_tokens and workers <= signals.ready:
        which = "queue wait" if signals.queue_wait_s >= signals.first_token_s else "TTFT"
        return Need(signals.ready + 1, f"{which} is {late_s:.2f} s against {target.first_token_s:.2f} s; {reason}")
    return Need(workers, reason)
