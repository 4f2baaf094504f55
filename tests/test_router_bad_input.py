"""Whatever a client sends: a 4xx in OpenAI's shape that names the field, nothing reaches the generator, and the same
server answers the next request."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from router_front import CONTEXT, MODEL, VOCAB, chat, completion, error_of, front, in_process, say, tiny_tokenizer
from scripted_generator import ScriptedGenerator

TOKENIZER = tiny_tokenizer()
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HUGE = 10**400


class Served:
    """One server for all cases: it must survive each of them."""

    def __init__(self, client: httpx.AsyncClient, generator: ScriptedGenerator) -> None:
        self.client = client
        self.generator = generator

    async def refuses(self, path: str, content: bytes, statuses: tuple[int, ...] = (400,)) -> dict[str, Any]:
        before = len(self.generator.requests)
        response = await self.client.post(path, content=content)
        assert response.status_code in statuses, (response.status_code, response.text)
        assert len(self.generator.requests) == before, "it reached the generator"
        return error_of(response)

    async def still_answers(self) -> None:
        response = await self.client.post(CHAT, json=chat())
        assert response.json()["choices"][0]["message"]["content"] == "fine"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served() -> AsyncIterator[Served]:
    generator = say(TOKENIZER, "fine")
    async with in_process(front(TOKENIZER, generator)) as client:
        yield Served(client, generator)


BROKEN_BODIES = [
    b"",
    b" ",
    b"{",
    b"}",
    b"nonsense",
    b"null",
    b"true",
    b"1",
    b'"text"',
    b"[]",
    b"[{}]",
    b'{"model": "baton-tiny",}',
    b"{'model': 'baton-tiny'}",
    b'{"model": "baton-tiny"} {}',
    b'{"temperature": NaN}',
    b'{"temperature": Infinity}',
    b'{"temperature": -Infinity}',
    b'{"seed": ' + b"9" * 5000 + b"}",
    b"\xff\xfe{}",
    b"\xef\xbb\xbf{}",
    "{}".encode("utf-16"),
    '{"prompt": "\xe9"}'.encode("latin-1"),
    b'{"a":' * 200_000,
    b"[" * 500_000,
    b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"prompt": "\x00"}',
    b'{"prompt": "line\nbreak"}',
    b"\x00" * 100,
    b"data: {}\n\n",
    b"model=baton-tiny&prompt=x",
]


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize", "/detokenize"])
@pytest.mark.parametrize("body", BROKEN_BODIES, ids=range(len(BROKEN_BODIES)))
async def test_broken_bodies(served: Served, path: str, body: bytes) -> None:
    await served.refuses(path, body)
    await served.still_answers()


COMMON_FIELDS: list[tuple[str, Any]] = [
    *(("model", value) for value in (None, "", 5, [], {}, True)),
    *(("temperature", value) for value in (-0.1, 2.1, "1", True, [], HUGE, -HUGE, 1e308)),
    *(("top_p", value) for value in (0, -1, 1.1, "x", False)),
    *(("top_k", value) for value in (-2, 1.5, "5", True, 2**31, HUGE)),
    *(("min_p", value) for value in (-0.1, 1.1, "0")),
    *(("typical_p", value) for value in (0, 1.1, [])),
    *(("repetition_penalty", value) for value in (0, -1, 11, "1")),
    *(("presence_penalty", value) for value in (-2.1, 2.1, {})),
    *(("frequency_penalty", value) for value in (-2.1, 2.1, "0")),
    *(("max_tokens", value) for value in (0, -1, 1.5, "10", True, 2**31, HUGE, CONTEXT)),
    *(("min_tokens", value) for value in (-1, "1", 1.0, 10**6)),
    *(("n", value) for value in (0, -1, 9, 1000, 1.0, "1", True, HUGE)),
    *(("seed", value) for value in (2**63, -(2**63) - 1, 1.5, "1", True, HUGE)),
    *(("stop", value) for value in ("", [""], 5, [5], ["a"] * 17, "x" * 257, {}, [None], "\ud800")),
    *(("stop_token_ids", value) for value in (5, ["5"], [-1], [VOCAB], [True], [1] * 17, [1.0])),
    *(("logit_bias", value) for value in ([], "x", {"x": 1}, {"-1": 1}, {str(VOCAB): 1}, {"5": 101}, {"5": "1"})),
    *(("logit_bias", value) for value in ({"5": -101}, {"1e3": 1}, {"٣": 1}, {str(i): 0 for i in range(1025)})),
    *(("stream", value) for value in ("true", 1, [])),
    *(("ignore_eos", value) for value in ("true", 1)),
    *(("stream_options", value) for value in ({"include_usage": True}, [], "x")),
    *(("priority", value) for value in (1.5, "1", 2**31, HUGE)),
    *(("cache_salt", value) for value in ("", 5, "x" * 129, "\ud800")),
    *(("user", value) for value in (5, "x" * 513)),
    *(("tools", value) for value in ([{"type": "function"}], "x", {})),
    *(("tool_choice", value) for value in ("required", {"type": "function"}, 5)),
    *(("function_call", value) for value in ({"name": "f"}, 5)),
    *(("functions", value) for value in ([{"name": "f"}], 5)),
    *(("response_format", value) for value in ({"type": "json_object"}, {"type": "json_schema"}, {}, "text", 5)),
    *(("modalities", value) for value in (["audio"], ["text", "audio"], "text")),
    ("best_of", 2),
    ("use_beam_search", True),
    ("skip_special_tokens", "no"),
    ("include_stop_str_in_output", 1),
    ("add_special_tokens", 1),
    ("kv_transfer_params", {"do_remote_decode": True}),
    ("kv_transfer_params", {}),
    ("bootstrap_host", "10.0.0.1"),
    ("bootstrap_port", 5),
    ("bootstrap_room", 1),
    ("do_remote_prefill", True),
    ("do_remote_decode", False),
    ("chat_template", "{{ 1 }}"),
    ("prompt_embeds", "x"),
    ("input_embeds", [[0.0]]),
    ("guided_json", {"type": "object"}),
    ("structured_outputs", {"regex": "a*"}),
    ("stop_regex", "a*"),
    ("logits_processors", ["x"]),
    ("bad_words", ["x"]),
    ("prompt_logprobs", 1),
    ("allowed_token_ids", [1]),
    ("truncate_prompt_tokens", 5),
    ("nvext", {"x": 1}),
]
USER = {"role": "user", "content": "hi"}
DEEP: Any = {"x": 1}
for _ in range(20):
    DEEP = {"x": DEEP}
CHAT_FIELDS: list[tuple[str, Any]] = [
    *(("messages", value) for value in (None, [], {}, "hi", [[]], ["hi"], [5], [USER] * 2049)),
    *(("messages", [{"role": role, "content": "x"}]) for role in (None, "", "root", 5, "SYSTEM", "x" * 1000)),
    *(("messages", [{"role": "user", "content": value}]) for value in (None, 5, {}, [5], [{}], [{"type": "text"}])),
    ("messages", [{"role": "user"}]),
    ("messages", [{"content": "x"}]),
    ("messages", [{"role": "user", "content": "\ud800"}]),
    ("messages", [{"role": "user", "content": [{"type": "text", "text": 5}]}]),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]),
    ("messages", [{"role": "user", "content": [{"type": "input_audio"}]}]),
    ("messages", [{"role": "user", "content": [{"type": ["text"]}]}]),
    ("messages", [{"role": "user", "content": [{"type": "text", "text": "x"}] * 1025}]),
    ("messages", [{"role": "assistant", "content": None, "tool_calls": [{}]}]),
    ("messages", [{"role": "assistant", "content": "x", "function_call": {}}]),
    ("messages", [{"role": "user", "content": "x", "name": 5}]),
    ("messages", [{"role": "user", "content": "x", "name": "x" * 257}]),
    ("messages", [{"role": "user", "content": "a " * 50_000}]),
    *(("max_completion_tokens", value) for value in (0, -1, "5", CONTEXT)),
    *(("logprobs", value) for value in (1, "true", 0)),
    *(("top_logprobs", value) for value in (5, -1, 21, "1", True)),
    ("echo", True),
    ("continue_final_message", True),
    *(("add_generation_prompt", value) for value in ("true", 1)),
    *(("chat_template_kwargs", value) for value in ([], "x", DEEP, {"a": "x" * 5000}, {"a": [1] * 300}, {"a": HUGE})),
    *(("chat_template_kwargs", {name: "x"}) for name in ("messages", "tools", "add_generation_prompt", "eos_token")),
    ("chat_template_kwargs", {"\ud800": 1}),
]
COMPLETION_FIELDS: list[tuple[str, Any]] = [
    *(("prompt", value) for value in (None, "", [], [[]], 5, {}, True, [5.5], [True], [None], [1, "a"], ["a", 1])),
    *(("prompt", value) for value in ([-1], [VOCAB], [[VOCAB]], [2**70], ["a"] * 17, [[1], "\ud800"], "\ud800", [""])),
    *(("prompt", value) for value in ("a " * 50_000, [5] * CONTEXT, [[5] * (CONTEXT + 1)], "a" * 3_000_000)),
    *(("logprobs", value) for value in (-1, 21, True, "1", 1.0)),
    *(("echo", value) for value in ("true", 1)),
    ("suffix", "x"),
]
CASES = [
    *((CHAT, name, value) for name, value in COMMON_FIELDS + CHAT_FIELDS),
    *((COMPLETIONS, name, value) for name, value in COMMON_FIELDS + COMPLETION_FIELDS),
]


def test_the_catalogue_is_large() -> None:
    assert len(CASES) >= 150


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("path", "name", "value"), CASES, ids=[f"{path}-{name}-{i}" for i, (path, name, _) in enumerate(CASES)]
)
async def test_bad_fields(served: Served, path: str, name: str, value: Any) -> None:
    body = (chat if path == CHAT else completion)() | {name: value}
    error = await served.refuses(path, json.dumps(body).encode())
    assert error["type"] == "invalid_request_error"
    assert error["param"] is not None and error["param"].startswith(name), error
    assert error["code"] in ("invalid_value", "context_length_exceeded")
    assert "xxxx" not in error["message"] and "99999" not in error["message"], "it echoes what was sent"
    await served.still_answers()


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("name", ["bootstrap_" + "x" * 5000, "do_remote_\ud800", "do_remote_\u65e5\x00\n"])
async def test_names_of_fields_are_not_echoed_at_length(served: Served, name: str) -> None:
    error = await served.refuses(CHAT, json.dumps(chat() | {name: 1}).encode())
    assert error["param"].isascii() and len(error["param"]) < 200


@pytest.mark.asyncio(loop_scope="module")
async def test_echo_with_logprobs_is_refused(served: Served) -> None:
    await served.refuses(COMPLETIONS, json.dumps(completion(echo=True, logprobs=1)).encode())


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("model", ["other", "x" * 10_000, "../../etc/passwd", "baton-tiny ", "\u0000"])
async def test_unknown_models(served: Served, model: str) -> None:
    for path, body in ((CHAT, chat()), (COMPLETIONS, completion())):
        error = await served.refuses(path, json.dumps(body | {"model": model}).encode(), (404,))
        assert error["code"] == "model_not_found" and error["param"] == "model"


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": 5}),
        ("/tokenize", {"prompt": "\ud800"}),
        ("/tokenize", {"messages": []}),
        ("/tokenize", {"messages": [{"role": "user"}]}),
        ("/tokenize", {"prompt": "x", "add_special_tokens": "yes"}),
        ("/tokenize", {"prompt": "x", "return_token_strs": 1}),
        ("/tokenize", {"prompt": "x", "model": 5}),
        ("/detokenize", {}),
        ("/detokenize", {"tokens": "x"}),
        ("/detokenize", {"tokens": [1.5]}),
        ("/detokenize", {"tokens": [True]}),
        ("/detokenize", {"tokens": [VOCAB]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [2**64]}),
    ],
)
async def test_bad_tokenize(served: Served, path: str, body: dict[str, Any]) -> None:
    await served.refuses(path, json.dumps(body).encode())


HARMLESS: list[dict[str, Any]] = [
    {"tools": [], "tool_choice": "auto"},
    {"tools": [{"type": "function"}], "tool_choice": "none"},
    {"response_format": {"type": "text"}},
    {"logit_bias": {}, "stop": None, "seed": None, "temperature": None, "n": None, "stream_options": None},
    {"stop": [], "user": "me", "store": False, "metadata": {"a": "b"}, "service_tier": "auto"},
    {"parallel_tool_calls": True, "unheard_of": {"x": [1]}, "modalities": ["text"]},
    {"top_k": -1, "top_p": 1, "temperature": 2, "presence_penalty": -2, "seed": -(2**63)},
    {"logit_bias": {"0": -100, str(VOCAB - 1): 100}, "stop_token_ids": [0], "min_tokens": 0},
    {"max_tokens": 5, "max_completion_tokens": 6, "priority": -3, "cache_salt": "tenant"},
    {"best_of": 1, "use_beam_search": False, "guided_json": None, "suffix": ""},
]


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("fields", HARMLESS)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_what_clients_send_without_harm_is_accepted(served: Served, path: str, fields: dict[str, Any]) -> None:
    body = (chat if path == CHAT else completion)() | fields
    response = await served.client.post(path, json=body)
    assert response.status_code == 200, response.text


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    "content",
    [
        "",
        "\x00",
        "\u2028\u2029",
        "\ufeff",
        "🧑\u200d🚀",
        [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
    ],
)
async def test_odd_contents_are_text(served: Served, content: Any) -> None:
    response = await served.client.post(CHAT, json=chat() | {"messages": [{"role": "user", "content": content}]})
    assert response.status_code == 200, response.text
    expected = content if isinstance(content, str) else "a\nb"
    assert expected in TOKENIZER.decode(served.generator.requests[-1].prompt_ids, False)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([MODEL, "user", "text", "none", "auto", 2**63, HUGE, "\ud800"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
field_names = st.sampled_from(sorted({name for _, name, _ in CASES}))


@given(
    path=st.sampled_from([CHAT, COMPLETIONS]), fields=st.dictionaries(field_names, json_values, min_size=1, max_size=6)
)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.asyncio(loop_scope="module")
async def test_any_fields_are_answered_or_refused(served: Served, path: str, fields: dict[str, Any]) -> None:
    body = (chat if path == CHAT else completion)(max_tokens=4) | fields
    before = len(served.generator.requests)
    response = await served.client.post(path, content=json.dumps(body).encode())
    if response.status_code == 200:
        assert len(served.generator.requests) > before
    else:
        assert 400 <= response.status_code < 500, (response.status_code, response.text)
        error_of(response)
        assert len(served.generator.requests) == before


@given(body=st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.asyncio(loop_scope="module")
async def test_any_body_is_refused(served: Served, body: bytes) -> None:
    await served.refuses(CHAT, body, (400, 404))
