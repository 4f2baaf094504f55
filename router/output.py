"""What the client may see of the tokens so far: text that is certain, logprobs, finish reasons, and the counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from core.errors import EngineError
from core.messages import FinishReason, Receipt, Token
from router.call import Call
from router.detokenize import Detokenizer
from router.generation import GenerationRequest, Step
from router.reply import Delta, TokenText, Usage
from router.stop import StopFilter
from router.tokenizer import ModelTokenizer

LEAST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI's clients know this number


class Choice:
    """The text of one choice: tokens in, certain text out."""

    __slots__ = ("_detokenizer", "_filter", "_include_stop", "_table", "_with_logprobs", "chars", "finish", "index",
                 "tokens")  # fmt: skip

    def __init__(self, index: int, call: Call, tokenizer: ModelTokenizer) -> None:
        self.index = index
        self.tokens = 0
        self.chars = 0  # of text decoded, held back or not
        self.finish: str | None = None
        self._detokenizer: Detokenizer = tokenizer.detokenizer(call.skip_special_tokens)
        self._filter = StopFilter(call.params.stop, call.include_stop) if call.params.stop else None
        self._include_stop = call.include_stop
        self._with_logprobs = call.params.logprobs is not None
        self._table = tokenizer.table

    def take(self, token: Token) -> Delta:
        """The token's part of the reply. Sets `finish` when the choice ends with it."""
        self.tokens += 1
        delta = Delta(self.index)
        if self._with_logprobs:
            delta.tokens = [self._token_text(token)]
        delta.text = self._text(token)
        delta.finish = self.finish
        return delta

    def _text(self, token: Token) -> str:
        text = self._decode(token)
        if self._filter is not None:
            text = self._filter.feed(text)
            if self._filter.stopped:
                self.finish = FinishReason.STOP.value
                return text
        if token.finish is not None:
            self.finish = token.finish.value
            if self._filter is not None:
                text += self._filter.flush()
        return text

    def _decode(self, token: Token) -> str:
        """An end id or a stop token is no part of the text, unless the client wants it."""
        hidden = token.finish is FinishReason.STOP and not self._include_stop
        text = "" if hidden else self._detokenizer.feed(token.token_id)
        if token.finish is not None:
            text += self._detokenizer.flush()
        self.chars += len(text)
        return text

    def _token_text(self, token: Token) -> TokenText:
        top = tuple((self._table.piece(token_id), _finite(logprob)) for token_id, logprob in token.top)
        return TokenText(self._table.piece(token.token_id), _finite(token.logprob), top, self.chars)


def _finite(logprob: float | None) -> float:
    return logprob if logprob is not None and logprob > LEAST_LOGPROB else LEAST_LOGPROB


class Output:
    """All choices of one call, numbered over its prompts as OpenAI does: prompt 0's first."""

    def __init__(
        self,
        call: Call,
        requests: Sequence[GenerationRequest],
        tokenizer: ModelTokenizer,
        finish_choice: Callable[[str, int], None],
    ) -> None:
        self._n = call.params.n
        self._requests = requests
        self._finish_choice = finish_choice
        self._receipts: list[Receipt | None] = [None] * len(requests)
        self._open = call.choices
        self.choices = [Choice(index, call, tokenizer) for index in range(call.choices)]

    @property
    def done(self) -> bool:
        return not self._open

    def take(self, number: int, step: Step) -> list[Delta]:
        """What one step of request `number` adds to the reply."""
        if step.receipt is not None and self._receipts[number] is None:
            self._receipts[number] = step.receipt
        deltas = []
        for token in step.tokens:
            choice = self.choices[number * self._n + token.choice]
            if choice.finish is not None:  # decoded before the worker heard of the stop string
                continue
            delta = choice.take(token)
            if delta.finish is not None:
                self._open -= 1
                if token.finish is None:
                    self._finish_choice(self._requests[number].request_id, token.choice)
            deltas.append(delta)
        return deltas

    def check_complete(self) -> None:
        """Raises EngineError when the steps ended before the choices did."""
        if self._open:
            raise EngineError(f"{self._open} choices ended without a finish reason")

    def generated_tokens(self, number: int) -> int:
        return sum(choice.tokens for choice in self.choices[number * self._n : (number + 1) * self._n])

    def finish_reasons(self, number: int) -> list[str]:
        choices = self.choices[number * self._n : (number + 1) * self._n]
        return [choice.finish for choice in choices if choice.finish is not None]

    def cached_tokens(self, number: int) -> int:
        receipt = self._receipts[number]
        if receipt is None:
            return 0
        cached = receipt.cached_prefill_tokens + receipt.cached_decode_tokens + receipt.fetched_tokens
        return min(cached, len(self._requests[number].prompt_ids))

    def usage(self) -> Usage:
        numbers = range(len(self._requests))
        return Usage(
            prompt_tokens=sum(len(request.prompt_ids) for request in self._requests),
            completion_tokens=sum(choice.tokens for choice in self.choices),
            cached_tokens=sum(self.cached_tokens(number) for number in numbers),
            handoff=_handoff([receipt for receipt in self._receipts if receipt is not None]),
        )


def _handoff(receipts: Sequence[Receipt]) -> dict[str, object] | None:
    """What moving pages cost these prompts together."""
    moved = [receipt for receipt in receipts if receipt.transferred_tokens]
    if not moved:
        return None
    sent = sum(receipt.transferred_bytes for receipt in moved)
    hidden = sum(receipt.hidden_bytes for receipt in moved)
    return {
        "fetched_tokens": sum(receipt.fetched_tokens for receipt in moved),
        "transferred_tokens": sum(receipt.transferred_tokens for receipt in moved),
        "transferred_bytes": sent,
        "overlap": round(hidden / sent, 4) if sent else None,
        "transfer_s": round(sum(receipt.transfer_s for receipt in moved), 6),
        "exposed_transfer_s": round(sum(receipt.exposed_transfer_s for receipt in moved), 6),
    }
