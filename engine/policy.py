"""What a scheduling policy sees and what it answers: pure data, so that a policy is a function of a snapshot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class SequenceView:
    sequence_id: int
    running: bool  # holds pages for all its ids
    decoding: bool  # next row is one new token
    uncomputed_tokens: int
    context_tokens: int
    pages_missing: int  # new pages its next row (or, waiting, all its ids) may need at most
    pages_held: int
    priority: int
    arrived_s: float
    deadline_s: float


@dataclass(frozen=True, slots=True)
class EngineView:
    """A snapshot of the engine. Sequences are in order of arrival."""

    now_s: float
    sequences: tuple[SequenceView, ...]
    reusable_pages: int
    page_size: int
    step_s: float = 0.0  # the last step's duration
    peer_wait_s: float = 0.0  # how long the oldest prefill that a peer on this machine owes us has waited


@dataclass(frozen=True, slots=True)
class StepPlan:
    """`rows`: (sequence id, its next tokens); a waiting sequence among them is admitted if its pages can be had.

    `preempt` give their pages back first and wait. `pause_s`: the device is left to others for this long afterwards.
    """

    rows: tuple[tuple[int, int], ...] = ()
    preempt: tuple[int, ...] = ()
    pause_s: float = 0.0


class Policy(Protocol):
    def plan(self, view: EngineView) -> StepPlan:
        """The next step. An empty plan means: nothing to do until something changes."""
        ...


def chunks(view: EngineView, order: list[SequenceView], budget_tokens: int, pages: int) -> list[tuple[int, int]]:
    """Prefill chunks in the given order until half the token budget is spent, or the pages.

    A prompt's end is not put off for the sake of the budget: up to a quarter more is computed at once. And when half
    the budget is spent nothing is begun beside it: the device is busy enough, and the first prompt would only wait
    longer. The first that finds no room ends it: later, smaller ones do not overtake, so that a long prompt is not
    starved.
    """
    rows: list[tuple[int, int]] = []
    spent = 0
    for sequence in order:
        if 2 * spent >= budget_tokens or (not sequence.running and sequence.pages_missing > pages):
            break
        left = budget_tokens - spent
        ends = sequence.uncomputed_tokens <= left + budget_tokens // 4
        tokens = sequence.uncomputed_tokens if ends else left
        rows.append((sequence.sequence_id, tokens))
        spent += tokens
        pages -= max(0, sequence.pages_missing)
    return rows
