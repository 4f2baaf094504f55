"""POST /v1/chat/completions: which bodies are accepted, and what a reply and a chunk look like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from core.errors import InvalidRequest
from core.sampling import MAX_TOP_LOGPROBS, SamplingParams
from router.call import Call, Conversation
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
from router.validation import Fields, clean_text, refuse

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_NAME_CHARS = 256
MAX_PARTS = 1024


def parse_chat(fields: Fields, model: ServedModel, limits: Limits) -> Call:
    """The body of a chat completion. Raises InvalidRequest."""
    refuse_unsupported(fields)
    check_user(fields)
    if fields.flag("echo"):
        refuse("echo", "is not supported for chat")
    max_tokens, max_tokens_param = max_tokens_of(fields, "max_completion_tokens", "max_tokens")
    stream = fields.flag("stream")
    include_usage, continuous_usage = stream_options(fields, stream)
    return Call(
        model=fields.text("model"),
        prompts=(conversation(fields, limits),),
        params=_with_logprobs(fields, sampling_params(fields, model, limits, max_tokens)),
        max_tokens=max_tokens,
        max_tokens_param=max_tokens_param,
        default_max_tokens=None,
        salt=salt_of(fields, model.tenant_salt),
        stream=stream,
        include_usage=include_usage,
        continuous_usage=continuous_usage,
        include_stop=fields.flag("include_stop_str_in_output"),
        skip_special_tokens=fields.flag("skip_special_tokens", True),
        add_special_tokens=fields.flag("add_special_tokens", False),
        priority=priority_of(fields),
        prompt_param="messages",
    )


def conversation(fields: Fields, limits: Limits) -> Conversation:
    """The messages, and how the template is to treat them."""
    messages = fields.items("messages", limits.max_messages)
    if not messages:
        refuse("messages", "must be a list with at least one message")
    return Conversation(
        messages=tuple(_message(message, f"messages[{i}]") for i, message in enumerate(messages)),
        add_generation_prompt=fields.flag("add_generation_prompt", True),
        template_values=fields.plain("chat_template_kwargs"),
    )


def _with_logprobs(fields: Fields, params: SamplingParams) -> SamplingParams:
    wanted = fields.flag("logprobs")
    top = fields.integer("top_logprobs", 0, 0, MAX_TOP_LOGPROBS)
    if top and not wanted:
        refuse("top_logprobs", "needs logprobs: true")
    return replace(params, logprobs=top) if wanted else params


def _message(value: object, path: str) -> dict[str, object]:
    if type(value) is not dict:
        refuse(path, "must be an object")
    fields = Fields(value, f"{path}.")
    role = fields.text("role", longest=MAX_NAME_CHARS)
    if role not in ROLES:
        refuse(f"{path}.role", f"must be one of {', '.join(ROLES)}")
    if fields.raw("tool_calls") not in (None, []) or fields.raw("function_call") is not None:
        refuse(f"{path}.tool_calls", "is not supported")
    message: dict[str, object] = {"role": "system" if role == "developer" else role, "content": _content(fields)}
    for extra in ("name", "tool_call_id"):
        if fields.raw(extra) is not None:
            message[extra] = fields.text(extra, longest=MAX_NAME_CHARS)
    return message


def _content(fields: Fields) -> str:
    """A string, or text parts joined by newlines, as templates made for strings expect."""
    content = fields.raw("content")
    param = fields.param("content")
    if content is None:
        refuse(param, "must be a string or a list of text parts")
    if type(content) is str:
        return clean_text(content, param)
    if type(content) is not list:
        refuse(param, "must be a string or a list of text parts")
    parts = fields.items("content", MAX_PARTS)
    return "\n".join(_text_part(part, f"{param}[{i}]") for i, part in enumerate(parts))


def _text_part(part: object, path: str) -> str:
    if type(part) is not dict:
        refuse(path, "must be an object")
    if part.get("type") != "text":
        raise InvalidRequest(f"{path}.type: only text parts are supported", param=f"{path}.type")
    return clean_text(part.get("text"), f"{path}.text")


class ChatShape(Shape):
    """How a chat completion is read and written."""

    id_prefix = "chatcmpl-"
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def parse(self, fields: Fields, model: ServedModel, limits: Limits) -> Call:
        return parse_chat(fields, model, limits)

    def opening(self, index: int, first: bool) -> str:
        role = '"role":"assistant",' if first else ""
        return f'{{"index":{index},"delta":{{{role}"content":'

    closing = "}"

    def whole_opening(self, index: int) -> str:
        return f'{{"index":{index},"message":{{"role":"assistant","refusal":null,"content":'

    def token_json(self, token: TokenText) -> TokenJson:
        top = [_entry(piece, logprob) for piece, logprob in token.top]
        return (json_text(_entry(token.piece, token.logprob) | {"top_logprobs": top}),)

    def logprobs(self, tokens: Sequence[TokenJson]) -> str:
        return f'{{"content":[{",".join([entry for (entry,) in tokens])}],"refusal":null}}'


def _entry(piece: bytes, logprob: float) -> dict[str, object]:
    return {"token": piece.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(piece)}
