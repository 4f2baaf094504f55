"""What a program gets back for one prompt: texts, ids, logprobs, and where the prompt's tokens came from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token with its log-probability, before temperature and filters. `top`: the likeliest (id, text, logprob)."""

    token_id: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...]


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One choice. `text` ends before the stop string; `token_ids` are all that were generated, end id included."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """One prompt and its choices. `prompt` is None where ids or messages were given."""

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    cached_tokens: int
