"""Who gets in: bounds on the requests in flight and on the prompt tokens that wait for their first token.

What is over a bound is refused at once with 429 and a Retry-After; nothing queues here without an end.
"""

from __future__ import annotations

from types import TracebackType

from core.clock import Clock
from core.errors import QueueFull
from router.limits import Limits

MAX_RETRY_AFTER_S = 60.0
RATE_WEIGHT = 0.1  # of the newest departure in the moving mean


class Admission:
    """Counts what is inside. `retry_after_s` comes from the recent time between departures."""

    def __init__(self, limits: Limits, clock: Clock) -> None:
        self._limits = limits
        self._clock = clock
        self._gap_s = 0.0
        self._last_departure: float | None = None
        self.requests = 0
        self.queued_tokens = 0

    def admit(self, choices: int) -> Slot:
        """Raises QueueFull. A request that is too large for the bound alone is let in when nothing else is there."""
        if self.requests and self.requests + choices > self._limits.max_requests:
            raise self._full("too many requests are in flight")
        return Slot(self, choices)

    def check_tokens(self, tokens: int) -> None:
        """Raises QueueFull when these prompt tokens cannot be queued now."""
        if self.queued_tokens and self.queued_tokens + tokens > self._limits.max_queued_tokens:
            raise self._full("too many prompt tokens are waiting")

    def departed(self) -> None:
        now = self._clock()
        if self._last_departure is not None:
            gap_s = min(now - self._last_departure, MAX_RETRY_AFTER_S)
            self._gap_s += RATE_WEIGHT * (gap_s - self._gap_s)
        self._last_departure = now

    def _full(self, why: str) -> QueueFull:
        return QueueFull(f"{why}; try again later", retry_after_s=min(max(self._gap_s, 1.0), MAX_RETRY_AFTER_S))


class Slot:
    """One admitted call: what it holds of the bounds, given back on leaving."""

    def __init__(self, admission: Admission, choices: int) -> None:
        self._admission = admission
        self._choices = choices
        self._tokens: list[int] = []  # by request: prompt tokens that still wait

    def __enter__(self) -> Slot:
        self._admission.requests += self._choices
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._admission.requests -= self._choices
        self._admission.queued_tokens -= sum(self._tokens)
        self._tokens = []
        self._admission.departed()

    def queue(self, prompt_tokens: list[int]) -> None:
        """The prompts, by request, wait for their first tokens. Raises QueueFull."""
        self._admission.check_tokens(sum(prompt_tokens))
        self._tokens = list(prompt_tokens)
        self._admission.queued_tokens += sum(prompt_tokens)

    def started(self, request: int) -> None:
        """The first token of this request is there: its prompt waits no longer."""
        self._admission.queued_tokens -= self._tokens[request]
        self._tokens[request] = 0
