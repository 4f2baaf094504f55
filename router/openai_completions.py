"""POST /v1/completions: which bodies are accepted, and what a reply and a chunk look like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from core.sampling import MAX_TOP_LOGPROBS, SamplingParams
from router.call import Call, Prompt
from router.limits import Limits, ServedModel
from router.reply import Shape, TokenJson, TokenText, json_text
from router.sampling_fields import (
    check_user,
    max_tokens_of,
    priority_of,
    refuse_unsupported,
    salt_of,
    sampling_params,
    stream_options,
)
from router.validation import Fields, clean_text, refuse, token_ids

DEFAULT_MAX_TOKENS = 16
LOGPROB_ARRAYS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def parse_completion(fields: Fields, model: ServedModel, limits: Limits) -> Call:
    """The body of a completion. Raises InvalidRequest."""
    refuse_unsupported(fields)
    check_user(fields)
    max_tokens, max_tokens_param = max_tokens_of(fields, "max_tokens")
    stream = fields.flag("stream")
    include_usage, continuous_usage = stream_options(fields, stream)
    params = _with_logprobs(fields, sampling_params(fields, model, limits, max_tokens))
    echo = fields.flag("echo")
    if echo and params.logprobs is not None:
        refuse("echo", "together with logprobs is not supported")
    return Call(
        model=fields.text("model"),
        prompts=_prompts(fields, model, limits),
        params=params,
        max_tokens=max_tokens,
        max_tokens_param=max_tokens_param,
        default_max_tokens=DEFAULT_MAX_TOKENS,
        salt=salt_of(fields, model.tenant_salt),
        stream=stream,
        include_usage=include_usage,
        continuous_usage=continuous_usage,
        echo=echo,
        include_stop=fields.flag("include_stop_str_in_output"),
        skip_special_tokens=fields.flag("skip_special_tokens", True),
        add_special_tokens=fields.flag("add_special_tokens", True),
        priority=priority_of(fields),
        prompt_param="prompt",
    )


def _with_logprobs(fields: Fields, params: SamplingParams) -> SamplingParams:
    if fields.raw("logprobs") is None:
        return params
    return replace(params, logprobs=fields.integer("logprobs", 0, 0, MAX_TOP_LOGPROBS))


def _prompts(fields: Fields, model: ServedModel, limits: Limits) -> tuple[Prompt, ...]:
    """One string, one list of ids, or a list of either."""
    value = fields.raw("prompt")
    if type(value) is str:
        return (clean_text(value, "prompt"),)
    if type(value) is not list or not value:
        refuse("prompt", "must be a string, a list of strings, a list of token ids, or a list of those lists")
    if type(value[0]) is int:
        return (token_ids(value, "prompt", model),)
    if len(value) > limits.max_prompts:
        refuse("prompt", f"must have at most {limits.max_prompts} items")
    return tuple(_prompt(item, f"prompt[{i}]", model) for i, item in enumerate(value))


def _prompt(item: object, param: str, model: ServedModel) -> Prompt:
    return clean_text(item, param) if type(item) is str else token_ids(item, param, model)


class CompletionShape(Shape):
    """How a completion is read and written."""

    id_prefix = "cmpl-"
    object_name = "text_completion"
    chunk_name = "text_completion"
    closing = ""

    def parse(self, fields: Fields, model: ServedModel, limits: Limits) -> Call:
        return parse_completion(fields, model, limits)

    def opening(self, index: int, first: bool) -> str:
        return f'{{"index":{index},"text":'

    def whole_opening(self, index: int) -> str:
        return self.opening(index, first=True)

    def token_json(self, token: TokenText) -> TokenJson:
        entries = (_text(token.piece), token.logprob, _top(token), token.offset)
        return tuple(json_text(entry) for entry in entries)

    def logprobs(self, tokens: Sequence[TokenJson]) -> str:
        columns = zip(*tokens, strict=True) if tokens else [()] * len(LOGPROB_ARRAYS)
        arrays = [f'"{name}":[{",".join(column)}]' for name, column in zip(LOGPROB_ARRAYS, columns, strict=True)]
        return f"{{{','.join(arrays)}}}"


def _top(token: TokenText) -> dict[str, float]:
    """The most likely tokens and the chosen one; of two that read alike, the likelier."""
    best: dict[str, float] = {}
    for piece, logprob in (*token.top, (token.piece, token.logprob)):
        best.setdefault(_text(piece), logprob)
    return best


def _text(piece: bytes) -> str:
    return piece.decode("utf-8", "replace")
