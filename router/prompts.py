"""From prompts to requests: token ids that fit the context, and sampling parameters with a seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from core.errors import ContextTooLong, InvalidRequest
from router.call import Call, Conversation, Prompt
from router.generation import GenerationRequest
from router.limits import ServedModel
from router.tokenizer import ModelTokenizer


@dataclass(frozen=True, slots=True)
class Prompts:
    """What tokenizing needs."""

    tokenizer: ModelTokenizer
    model: ServedModel

    async def requests(
        self, call: Call, request_id: str, deadline_s: float, new_seed: Callable[[], int]
    ) -> list[GenerationRequest]:
        """One request per prompt. Raises InvalidRequest, ContextTooLong, QueueFull."""
        requests = []
        for number, prompt in enumerate(call.prompts):
            ids = await self.ids(prompt, call.add_special_tokens, call.prompt_param)
            requests.append(
                GenerationRequest(
                    request_id=request_id if len(call.prompts) == 1 else f"{request_id}-{number}",
                    prompt_ids=tuple(ids),
                    params=call.params_for(len(ids), self.model.context_tokens, new_seed()),
                    deadline_s=deadline_s,
                    salt=call.salt,
                    priority=call.priority,
                )
            )
        return requests

    async def ids(self, prompt: Prompt, add_special_tokens: bool, param: str) -> Sequence[int]:
        if isinstance(prompt, tuple):
            ids: Sequence[int] = prompt
        elif isinstance(prompt, Conversation):
            parts = self.tokenizer.render(prompt)
            self._check_length(parts, param)
            ids = await self.tokenizer.encode_parts(parts, add_special_tokens)
        else:
            self._check_length([prompt], param)
            ids = await self.tokenizer.encode(prompt, add_special_tokens)
        if not ids:
            raise InvalidRequest(f"{param}: must not be empty", param=param)
        return ids

    def _check_length(self, parts: Sequence[str], param: str) -> None:
        least = sum(self.tokenizer.least_tokens(part) for part in parts)
        if least >= self.model.context_tokens:
            raise ContextTooLong(
                f"This model's maximum context length is {self.model.context_tokens} tokens. However, your "
                f"{param} has at least {least} tokens. Please reduce its length.",
                param=param,
            )

    def texts(self, call: Call) -> list[str]:
        """The prompts as text, for `echo`."""
        return [self._text(prompt) for prompt in call.prompts]

    def _text(self, prompt: Prompt) -> str:
        if isinstance(prompt, str):
            return prompt
        assert isinstance(prompt, tuple), "a conversation is not echoed"
        return self.tokenizer.decode(prompt, skip_special_tokens=False)
