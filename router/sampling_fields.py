"""Which fields of a body choose the tokens, and which are refused because ignoring them would answer wrongly."""

from __future__ import annotations

import hashlib

from core.sampling import MAX_STOPS, SamplingParams
from router.internal_fields import refuse_internal
from router.limits import Limits, ServedModel
from router.validation import Fields, clean_text, refuse, token_ids

MAX_STOP_CHARS = 256
MAX_SALT_CHARS = 128
MAX_USER_CHARS = 512
INT32_MAX = 2**31 - 1

# Ignoring these would change what the client gets: refused unless the value asks for nothing.
UNSUPPORTED_FIELDS = (
    "allowed_token_ids", "audio", "bad_words", "continue_final_message", "documents", "ebnf",
    "functions", "guided_choice", "guided_grammar", "guided_json", "guided_regex", "json_schema", "logits_processors",
    "prompt_logprobs", "regex", "stop_regex", "structural_tag", "structured_outputs", "suffix",
    "truncate_prompt_tokens", "use_beam_search", "web_search_options",
)  # fmt: skip


def refuse_unsupported(fields: Fields) -> None:
    """Raises InvalidRequest for fields that are internal, or that we would have to ignore to a wrong effect."""
    refuse_internal(fields)
    for name in fields:
        if name in UNSUPPORTED_FIELDS and fields.raw(name) not in (False, "", [], {}):
            refuse(fields.param(name), "is not supported")
    response_format = fields.child("response_format")
    if response_format is not None and response_format.text("type") != "text":
        refuse("response_format", 'only {"type": "text"} is supported')
    _refuse_tools(fields)
    if fields.integer("best_of", 1) != 1 and fields.raw("best_of") != fields.raw("n"):
        refuse("best_of", "is supported only when it equals n")
    if fields.items("modalities", 4) not in ([], ["text"]):
        refuse("modalities", 'only ["text"] is supported')


def _refuse_tools(fields: Fields) -> None:
    choice = fields.raw("tool_choice")
    if choice is not None and type(choice) is not str and type(choice) is not dict:
        refuse("tool_choice", "must be a string or an object")
    if choice not in (None, "none", "auto"):
        refuse("tool_choice", "is not supported")
    if fields.items("tools", 1024) and choice != "none":
        refuse("tools", "is not supported")
    if fields.raw("function_call") not in (None, "none", "auto"):
        refuse("function_call", "is not supported")


def sampling_params(fields: Fields, model: ServedModel, limits: Limits, max_tokens: int | None) -> SamplingParams:
    """The parameters that the body asks for, without logprobs, whose form differs by endpoint."""
    d = model.defaults
    top_k = fields.integer("top_k", d.top_k, -1, INT32_MAX)
    seed = fields.integer("seed", 0) if fields.raw("seed") is not None else None
    return SamplingParams(
        max_tokens=model.context_tokens if max_tokens is None else max_tokens,
        min_tokens=fields.integer("min_tokens", 0, 0, INT32_MAX),
        n=fields.integer("n", 1, 1, limits.max_choices),
        temperature=fields.number("temperature", d.temperature),
        top_k=max(top_k, 0),  # -1 is how vLLM's clients switch it off
        top_p=fields.number("top_p", d.top_p),
        min_p=fields.number("min_p", d.min_p),
        typical_p=fields.number("typical_p", d.typical_p),
        repetition_penalty=fields.number("repetition_penalty", d.repetition_penalty),
        presence_penalty=fields.number("presence_penalty", d.presence_penalty),
        frequency_penalty=fields.number("frequency_penalty", d.frequency_penalty),
        logit_bias=_logit_bias(fields, model.vocab_size),
        seed=seed,
        stop=_stop_strings(fields),
        stop_token_ids=token_ids(fields.items("stop_token_ids", MAX_STOPS), "stop_token_ids", model),
        ignore_eos=fields.flag("ignore_eos"),
    )


def max_tokens_of(fields: Fields, *names: str) -> tuple[int | None, str]:
    """The first of these fields that is there, and its name."""
    for name in names:
        if fields.raw(name) is not None:
            return fields.integer(name, 1, 1, INT32_MAX), name
    return None, names[0]


def _logit_bias(fields: Fields, vocab_size: int) -> dict[int, float]:
    child = fields.child("logit_bias")
    if child is None:
        return {}
    biases = {}
    for key in child:
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) < vocab_size):
            refuse("logit_bias", f"its keys must be token ids from 0 to {vocab_size - 1}")
        biases[int(key)] = child.number(key, 0.0)
    return biases


def _stop_strings(fields: Fields) -> tuple[str, ...]:
    value = fields.raw("stop")
    stops = [value] if type(value) is str else fields.items("stop", MAX_STOPS)
    texts = tuple(clean_text(stop, "stop", MAX_STOP_CHARS) for stop in stops)
    if "" in texts:
        refuse("stop", "must not hold an empty string")
    return texts


def salt_of(fields: Fields, tenant_salt: bytes) -> bytes:
    """The tenant's salt, with the client's mixed in. It separates cached prefixes and never names one."""
    client_salt = fields.text("cache_salt", longest=MAX_SALT_CHARS)
    if fields.raw("cache_salt") is None:
        return tenant_salt
    if not client_salt:
        refuse("cache_salt", "must not be empty")
    return hashlib.blake2b(client_salt.encode(), key=tenant_salt, digest_size=16).digest()


def stream_options(fields: Fields, stream: bool) -> tuple[bool, bool]:
    """(include_usage, continuous_usage_stats)"""
    options = fields.child("stream_options")
    if options is None:
        return False, False
    if not stream:
        refuse("stream_options", "is allowed only with stream: true")
    include = options.flag("include_usage")
    return include, include and options.flag("continuous_usage_stats")


def priority_of(fields: Fields) -> int:
    return fields.integer("priority", 0, -INT32_MAX, INT32_MAX)


def check_user(fields: Fields) -> None:
    """`user` is checked, and used for nothing: it is the client's own word."""
    fields.text("user", longest=MAX_USER_CHARS)
