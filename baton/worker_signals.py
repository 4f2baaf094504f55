"""The signals of one worker: what it says twice a second, of its last seconds, to whoever scales its tier.

prefill      arriving_tokens_per_s, queued_tokens, queue_wait_s, first_token_s, tokens_per_s
decode       projected_pages, pages_total, running, token_gap_s, refused_grants_per_s
aggregated   all of them
every role   draining: 0 or 1

`baton.scaling.signals` folds those of a tier into one.
"""

from __future__ import annotations

from baton.composition import Worker
from decode_service.service import DecodeService
from engine.sequence import Status

PERIOD_S = 0.5


def signals_of(worker: Worker) -> dict[str, float]:
    """By name; every number is finite."""
    tier = worker.tier
    numbers: dict[str, float] = {"draining": float(tier.draining)}
    if tier.prefill is not None:
        tokens, waits_s = tier.prefill.backlog()
        numbers |= _prompts(worker, tokens, waits_s)
    elif tier.decode is not None:
        if tier.decode.is_aggregated:
            numbers |= _prompts(worker, *_local_backlog(worker))
        numbers |= _running(worker, tier.decode)
    return numbers


def _prompts(worker: Worker, queued_tokens: int, waits_s: list[float]) -> dict[str, float]:
    """`tokens_per_s`: of steps that are mostly prompts; 0 before the first."""
    lately = worker.metrics.lately
    return {
        "arriving_tokens_per_s": lately.arrived_tokens.per_s(),
        "queued_tokens": queued_tokens,
        "queue_wait_s": lately.queue_wait_s.high(waits_s),
        "first_token_s": lately.first_token_s.high(),
        "tokens_per_s": worker.tier.prefill_rate,
    }


def _local_backlog(worker: Worker) -> tuple[int, list[float]]:
    """Prompts that are not computed to the end, and how long those wait that have not begun."""
    now_s = worker.machine.clock()
    prompts = [s for s in worker.engine.sequences if not s.is_decoding and not s.preemptions]
    waits_s = [now_s - s.arrived_s for s in prompts if s.status is Status.WAITING]
    return sum(s.uncomputed for s in prompts), waits_s


def _running(worker: Worker, service: DecodeService) -> dict[str, float]:
    """A gap that has not ended counts once it is longer than most that have: a worker that hangs is not a quick one."""
    lately, sequences = worker.metrics.lately, worker.engine.sequences
    usual_s = lately.token_gap_s.high()
    return {
        "projected_pages": _projected_pages(worker, service),
        "pages_total": worker.pool.capacity,
        "running": sum(s.is_decoding for s in sequences),
        "token_gap_s": lately.token_gap_s.high(silent for silent in service.silences_s() if silent > usual_s),
        "refused_grants_per_s": lately.refused_grants.per_s(),
    }


def _projected_pages(worker: Worker, service: DecodeService) -> int:
    """Held, expected to be taken yet, promised, and missed by those that gave theirs back or have none."""
    counts, size = worker.pool.counts(), worker.info.page_size
    missing = sum(max(0, -(-len(s.ids) // size) - len(s.pages)) for s in worker.engine.sequences)
    return counts["owned"] + counts["leased"] + service.growth_pages + service.promised_pages + missing
