"""The clock port: monotonic seconds. Passed in everywhere, so that virtual time can stand in for it."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """A source of monotonic time in seconds. Two clocks are never compared: the wire carries durations."""

    def __call__(self) -> float: ...


def monotonic_s() -> float:
    """The machine's monotonic clock, in seconds."""
    return time.monotonic()
