"""What keeps a tier from swinging: up at once, in bounded strides; down only to the most that was needed lately.

A scale-down is expensive to take back (a worker has to load its weights again), and a moment's pause in the traffic
is no reason for one. So the count follows the highest need of a window, one worker at a time, with a pause between.
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
    window_s: float = 60.0  # a scale-down looks back so far
    pause_s: float = 10.0  # between two scale-downs
    slack: float = 0.1  # so much of a worker too few is none too few: no step for a rounding error

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


def decide(state: Steady, need: Need, current: int, bounds: Bounds, now_s: float) -> tuple[Steady, Decision]:
    """The next count of workers, from `current` desired ones, and the state to pass in next time."""
    wanted = min(max(math.ceil(need.workers - bounds.slack), bounds.least), bounds.most)
    recent = tuple((at_s, n) for at_s, n in state.needs if now_s - at_s < bounds.window_s and n > wanted)
    needs = (*recent, (now_s, wanted))
    if wanted > current:
        desired = min(wanted, max(2 * current, current + 2))
        short = "" if desired == wanted else f"; {wanted} are needed, no more than doubled at once"
        return Steady(needs, state.lowered_s), Decision(desired, need.reason + short)
    peak = needs[0][1]
    if peak >= current:
        kept = "" if wanted == current else f"; {wanted} would do, {peak} were needed within {bounds.window_s:g} s"
        within = min(max(current, bounds.least), bounds.most)
        return Steady(needs, state.lowered_s), Decision(within, need.reason + kept)
    if now_s - state.lowered_s < bounds.pause_s:
        return Steady(needs, state.lowered_s), Decision(current, f"{need.reason}; one was given up just now")
    lowered = max(min(current - 1, bounds.most), bounds.least)
    return Steady(needs, now_s), Decision(lowered, f"{need.reason}; {peak} were enough for {bounds.window_s:g} s")
