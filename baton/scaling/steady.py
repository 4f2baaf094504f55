"""What keeps a tier from swinging: up at once, in bounded strides; down only to the most that was needed lately.

A scale-down is expensive to take back (a worker has to load its weights again), and a moment's pause in the traffic
is no reason for one. So the count follows the highest need of a window, one worker at a time, with a pause between,
and only when some of a worker would be left over even then. Nothing is given up before a whole window was seen: who
has just begun to look, or begins again after a failure, knows no peak.

Workers that are starting count, since `current` is how many are wanted; draining ones do not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Need:
    """What a tier's signals ask for, as a share of workers, before bounds and steadiness."""

    workers: float
    reason: str


@dataclass(frozen=True, slots=True)
class Bounds:
    """Raises ConfigError unless 1 <= least <= most."""

    least: int = 1
    most: int = 8
    window_s: float = 120.0  # a scale-down looks back so far
    pause_s: float = 10.0  # between two scale-downs
    slack: float = 0.1  # so much of a worker too few is none too few: no step for a rounding error
    slack_share: float = 0.1  # and so much of the tier: a need is measured over seconds, and noisy
    spare: float = 0.25  # so much of a worker has to be left over before one is given up

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ConfigError(f"a tier needs 1 <= min <= max workers, got {self.least} and {self.most}")


@dataclass(frozen=True, slots=True)
class Decision:
    """How many workers there should be. `reason` says which signal decided, with its numbers."""

    desired: int
    reason: str


@dataclass(frozen=True, slots=True)
class Steady:
    """The state between two decisions."""

    needs: tuple[tuple[float, int], ...] = field(default_factory=tuple)  # (when, workers), falling; the window's peaks
    lowered_s: float = -math.inf
    since_s: float | None = None  # of the first decision


def decide(state: Steady, need: Need, current: int, bounds: Bounds, now_s: float) -> tuple[Steady, Decision]:
    """The next count of workers, from `current` desired ones, and the state to pass in next time."""
    wanted = _within(need.workers - max(bounds.slack, bounds.slack_share * current), bounds)
    kept_for = _within(need.workers + bounds.spare, bounds)
    recent = tuple((at_s, n) for at_s, n in state.needs if now_s - at_s < bounds.window_s and n > kept_for)
    since_s = now_s if state.since_s is None else state.since_s
    kept = Steady((*recent, (now_s, kept_for)), state.lowered_s, since_s)
    peak = kept.needs[0][1]
    within = min(max(current, bounds.least), bounds.most)
    if wanted > current:
        desired = min(wanted, max(2 * current, current + 2))
        short = "" if desired == wanted else f"; {wanted} are needed, no more than doubled at once"
        return kept, Decision(desired, need.reason + short)
    if peak >= current:
        why = "" if wanted == current else f"; {wanted} would do, {peak} were needed within {bounds.window_s:g} s"
        return kept, Decision(within, need.reason + why)
    if now_s - since_s < bounds.window_s:
        return kept, Decision(within, f"{need.reason}; {peak} would do, but not yet for {bounds.window_s:g} s")
    if now_s - state.lowered_s < bounds.pause_s:
        return kept, Decision(within, f"{need.reason}; one was given up just now")
    lowered = max(min(current - 1, bounds.most), bounds.least)
    enough = f"{need.reason}; {peak} were enough for {bounds.window_s:g} s"
    return Steady(kept.needs, now_s, since_s), Decision(lowered, enough)


def _within(workers: float, bounds: Bounds) -> int:
    return min(max(math.ceil(workers), bounds.least), bounds.most)
