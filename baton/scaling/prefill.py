"""How many prefill workers: enough to compute what arrives, and to work off what has become too much of a queue.

    workers = (arriving tokens/s + late tokens / start time) / (tokens/s of a worker x the share that may be busy)

Some queue is no reason for more workers: what those that are ready compute within half of the target for the first
token is in time. What is queued beyond that is late, and no new worker helps before it has started, so the need is
what works it off in about that time. When requests are seen to wait longer than the target although the sum says that
there are enough, the sum is wrong, and one more than are ready is asked for. A high TTFT without a wait is that of
long prompts, which more workers do not shorten.
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
    start_s: float = 20.0  # what a worker takes until it is ready


def prefill_need(signals: PrefillSignals, target: PrefillTarget) -> Need:
    """The sum above, or one more than are ready, with its reason."""
    per_worker = signals.tokens_per_s or target.assumed_tokens_per_s
    rate = per_worker * target.busy_share
    in_time_s = target.first_token_s / 2
    late_tokens = max(0.0, signals.queued_tokens - signals.ready * per_worker * in_time_s)
    workers = (signals.arriving_tokens_per_s + late_tokens / max(in_time_s, target.start_s)) / rate
    reason = (
        f"{signals.arriving_tokens_per_s:.0f} tokens/s arrive, {signals.queued_tokens} wait and {late_tokens:.0f} of"
        f" them too long: {workers:.1f} workers at {rate:.0f} tokens/s"
    )
    late = _late(signals, target)
    if late and signals.queued_tokens and workers <= signals.ready:
        return Need(signals.ready + 1, f"{late}; {reason}")
    return Need(workers, reason)


def _late(signals: PrefillSignals, target: PrefillTarget) -> str:
    """Which observed time is over the target, in words; nothing if none is."""
    against = f"against {target.first_token_s:.2f} s"
    if signals.queue_wait_s > target.first_token_s:
        return f"queue wait is {signals.queue_wait_s:.2f} s {against}"
    if signals.first_token_s > target.first_token_s and signals.queue_wait_s > target.first_token_s / 2:
        return f"TTFT is {signals.first_token_s:.2f} s {against}, {signals.queue_wait_s:.2f} s of it in the queue"
    return ""
