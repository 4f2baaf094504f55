"""What one HTTP body asks for: checked, not yet tokenized. Both endpoints become this."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from core.errors import ContextTooLong
from core.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages for the chat template; roles and contents are checked, contents are plain strings."""

    messages: tuple[Mapping[str, object], ...]
    add_generation_prompt: bool = True
    template_values: Mapping[str, object] = field(default_factory=dict)


Prompt = str | tuple[int, ...] | Conversation


@dataclass(frozen=True, slots=True)
class Call:
    """One API call. `params.max_tokens` is a bound only: `params_for` gives the real one when the prompt is known."""

    model: str
    prompts: tuple[Prompt, ...]
    params: SamplingParams
    max_tokens: int | None  # as the client said it
    max_tokens_param: str  # in which field
    default_max_tokens: int | None  # None: the rest of the context
    salt: bytes
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    echo: bool = False
    include_stop: bool = False  # the stop string or stop token is a part of the text
    skip_special_tokens: bool = True
    add_special_tokens: bool = True
    priority: int = 0
    prompt_param: str = "prompt"  # the field that an error about the prompt names

    @property
    def choices(self) -> int:
        return len(self.prompts) * self.params.n

    def params_for(self, prompt_tokens: int, context_tokens: int, seed: int) -> SamplingParams:
        """The parameters of one request. Raises ContextTooLong."""
        room = context_tokens - prompt_tokens
        wanted = self.max_tokens
        if wanted is None:
            wanted = room if self.default_max_tokens is None else max(1, min(self.default_max_tokens, room))
        if room < 1 or wanted > room:
            raise ContextTooLong(
                f"This model's maximum context length is {context_tokens} tokens. However, you requested "
                f"{prompt_tokens + wanted} tokens ({prompt_tokens} in the {self.prompt_param}, {wanted} in the "
                "completion). Please reduce the length of either.",
                param=self.prompt_param if room < 1 or self.max_tokens is None else self.max_tokens_param,
            )
        seed = self.params.seed if self.params.seed is not None else seed
        return replace(self.params, max_tokens=wanted, seed=seed)
