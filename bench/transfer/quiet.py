"""Whether the machine was ours while we measured: what other processes, and other machines on the same host, took."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

WORK = slice(1, 4)  # of the first line of /proc/stat: user, nice, system
STEAL = 8
ENOUGH_CORES = 0.1  # taken by others: figures are no longer what an idle machine gives


@dataclass(frozen=True, slots=True)
class Moment:
    """Seconds of all cores since the machine began, and of ours and our ended children since we began."""

    wall_s: float
    work_s: float
    stolen_s: float
    own_s: float

    @classmethod
    def now(cls) -> Moment:
        ticks = Path("/proc/stat").read_text().splitlines()[0].split()
        tick_s = 1 / os.sysconf("SC_CLK_TCK")
        own = os.times()
        own_s = own.user + own.system + own.children_user + own.children_system
        return cls(time.perf_counter(), sum(map(int, ticks[WORK])) * tick_s, int(ticks[STEAL]) * tick_s, own_s)


def taken_by_others(before: Moment, after: Moment) -> float:
    """Cores, on average, that were not ours to use."""
    theirs_s = after.work_s - before.work_s - (after.own_s - before.own_s) + after.stolen_s - before.stolen_s
    return max(0.0, theirs_s / (after.wall_s - before.wall_s))


def verdict(cores: float) -> str:
    if cores <= ENOUGH_CORES:
        return f"Other processes took {cores:.2f} cores meanwhile: the figures stand."
    return f"Other processes took {cores:.2f} cores meanwhile: the figures are provisional."
