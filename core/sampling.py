"""Which token comes next, as the client asked for it: the sampling parameters and their bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from core.errors import InvalidRequest

MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16
MAX_BIASES = 1024
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen. Temperature 0 is greedy; 0, 1.0 or empty switch a filter off.

    Raises InvalidRequest, naming the field, when a value is out of its bounds.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id -> added to its logit
    seed: int | None = None
    stop: tuple[str, ...] = ()  # applied by the router, across token borders
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; k: of the token and of the k most likely ones

    def __post_init__(self) -> None:
        _within("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _within("min_tokens", self.min_tokens, 0, self.max_tokens)
        _within("n", self.n, 1, MAX_CHOICES)
        _within("temperature", self.temperature, 0.0, 2.0)
        _within("top_k", self.top_k, 0, 2**31 - 1)
        _within("top_p", self.top_p, 0.0, 1.0, above=True)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("typical_p", self.typical_p, 0.0, 1.0, above=True)
        _within("repetition_penalty", self.repetition_penalty, 0.0, 10.0, above=True)
        _within("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _within("seed", 0 if self.seed is None else self.seed, -MAX_SEED - 1, MAX_SEED)
        _within("stop", len(self.stop), 0, MAX_STOPS)
        _within("stop_token_ids", len(self.stop_token_ids), 0, MAX_STOPS)
        _within("logit_bias", len(self.logit_bias), 0, MAX_BIASES)
        for bias in self.logit_bias.values():
            _within("logit_bias", bias, -100.0, 100.0)
        _within("logprobs", 0 if self.logprobs is None else self.logprobs, 0, MAX_TOP_LOGPROBS)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


def _within(name: str, value: float, low: float, high: float, *, above: bool = False) -> None:
    """Raises InvalidRequest unless low <= value <= high (low < value with `above`)."""
    if not math.isfinite(value) or value > high or value < low or (above and value <= low):
        span = f"above {low} and at most {high}" if above else f"between {low} and {high}"
        raise InvalidRequest(f"{name} must be {span}, got {value}", param=name)
