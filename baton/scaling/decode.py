"""How many decode workers: enough pages for what runs and what is promised, and batches small enough for the gap
between tokens.

    by pages   projected pages / (pages of a worker x the share that may be full)
    by ITL     running sequences / the sequences at which a worker's ITL meets its target
    by grants  one more, while prompts that are computed, or could be, find no room

A worker's ITL is taken to grow in proportion to its batch, which overstates the need a little when batches are small
(part of a step does not depend on the batch) and never understates it.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.scaling.steady import Need


@dataclass(frozen=True, slots=True)
class DecodeSignals:
    """Of the whole tier, over the last seconds."""

    ready: int
    projected_pages: int  # owned and leased, with the growth that running and promised sequences are expected to take
    pages_per_worker: int
    running: int  # sequences that are decoded
    token_gap_s: float  # 90th percentile of ITL
    refused_grants_per_s: float


@dataclass(frozen=True, slots=True)
class DecodeTarget:
    token_gap_s: float = 0.1
    full_share: float = 0.85
    refused_per_s: float = 0.5  # fewer are a moment's coincidence


def decode_need(signals: DecodeSignals, target: DecodeTarget) -> Need:
    """The largest of the three needs, with its reason."""
    room = max(1.0, signals.pages_per_worker * target.full_share)
    pages = signals.projected_pages / room
    needs = [Need(pages, f"{signals.projected_pages} pages projected: {pages:.1f} workers of {room:.0f}")]
    if signals.running and signals.token_gap_s > target.token_gap_s:
        by_gap = signals.ready * signals.token_gap_s / target.token_gap_s
        reason = f"ITL is {signals.token_gap_s * 1000:.0f} ms against {target.token_gap_s * 1000:.0f} ms"
        needs.append(Need(min(by_gap, 2.0 * signals.ready), reason))
    elif signals.running:
        # What keeps the gap below its target now is not given up while it is needed.
        by_gap = signals.ready * signals.token_gap_s / target.token_gap_s
        needs.append(Need(by_gap, f"ITL is {signals.token_gap_s * 1000:.0f} ms with {signals.ready} workers"))
    if signals.refused_grants_per_s > target.refused_per_s:
        needs.append(Need(signals.ready + 1.0, f"{signals.refused_grants_per_s:.1f} grants a second find no room"))
    return max(needs, key=lambda need: need.workers)
