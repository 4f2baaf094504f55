"""The official client, over a real socket: what it sends is understood, what it reads is what was generated."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from router_front import HELLO, MODEL, front, in_process, on_socket, say, tiny_tokenizer
from scripted_generator import ScriptedGenerator

from core.errors import DeadlineExceeded, EngineError, NoCapacity, PoisonRequest, QueueFull, WorkerLost
from core.messages import FinishReason
from router.limits import Limits

TOKENIZER = tiny_tokenizer()
USER: Any = [{"role": "user", "content": "hi"}]


@asynccontextmanager
async def client_of(
    generator: ScriptedGenerator, limits: Limits | None = None, max_retries: int = 0
) -> AsyncIterator[AsyncOpenAI]:
    async with (
        on_socket(front(TOKENIZER, generator, limits)) as port,
        AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=max_retries) as client,
    ):
        yield client


async def test_chat() -> None:
    generator = say(TOKENIZER, HELLO, cached=3)
    async with client_of(generator) as client:
        reply = await client.chat.completions.create(model=MODEL, messages=USER, temperature=0, seed=5)
    assert reply.choices[0].message.content == HELLO
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.id.startswith("chatcmpl-") and reply.created == 12345 and reply.model == MODEL
    assert reply.usage is not None and reply.usage.prompt_tokens_details is not None
    prompt = len(generator.requests[0].prompt_ids)
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (prompt, len(generator.ids))
    assert reply.usage.total_tokens == prompt + len(generator.ids)
    assert reply.usage.prompt_tokens_details.cached_tokens == 3
    params = generator.requests[0].params
    assert (params.temperature, params.seed, params.max_tokens) == (0.0, 5, 4096 - prompt)


async def test_usage_says_what_the_hand_off_cost() -> None:
    moved = {
        "transferred_tokens": 32, "transferred_bytes": 8000, "hidden_bytes": 6000,
        "transfer_s": 0.25, "exposed_transfer_s": 0.125, "queue_s": 1.0,
    }  # fmt: skip
    two = {"model": MODEL, "prompt": ["one", "two"]}
    async with client_of(say(TOKENIZER, HELLO, moved=moved)) as client:
        both = (await client.completions.create(**two)).usage
        stream = await client.completions.create(**two, stream=True, stream_options={"include_usage": True})
        last = [chunk async for chunk in stream][-1].usage
    async with client_of(say(TOKENIZER, HELLO)) as client:
        nothing = (await client.completions.create(**two)).usage
    assert both is not None and last is not None and nothing is not None
    assert both.model_extra == last.model_extra == {
        "handoff": {
            "fetched_tokens": 0, "transferred_tokens": 64, "transferred_bytes": 16000, "overlap": 0.75,
            "transfer_s": 0.5, "exposed_transfer_s": 0.25,
        }
    }
    assert nothing.model_extra == {}, "nothing was moved"


async def test_chat_stream() -> None:
    async with client_of(say(TOKENIZER, HELLO)) as client:
        stream = await client.chat.completions.create(
            model=MODEL, messages=USER, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == HELLO
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "stop"
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].usage is not None and chunks[-1].choices == []
    assert len({chunk.id for chunk in chunks}) == 1


async def test_the_stream_helper_agrees_with_the_whole_reply() -> None:
    async with client_of(say(TOKENIZER, HELLO)) as client:
        async with client.chat.completions.stream(model=MODEL, messages=USER, logprobs=True, top_logprobs=2) as stream:
            streamed = await stream.get_final_completion()
        whole = await client.chat.completions.create(model=MODEL, messages=USER, logprobs=True, top_logprobs=2)
    assert streamed.choices[0].message.content == whole.choices[0].message.content == HELLO
    assert streamed.choices[0].logprobs is not None and whole.choices[0].logprobs is not None
    assert streamed.choices[0].logprobs.content == whole.choices[0].logprobs.content


async def test_chat_logprobs() -> None:
    generator = say(TOKENIZER, "né!")
    async with client_of(generator) as client:
        reply = await client.chat.completions.create(model=MODEL, messages=USER, logprobs=True, top_logprobs=2)
    assert reply.choices[0].logprobs is not None and reply.choices[0].logprobs.content is not None
    tokens = reply.choices[0].logprobs.content
    assert len(tokens) == len(generator.ids)
    assert all(token.logprob == -0.5 and len(token.top_logprobs) == 2 for token in tokens)
    spelled = b"".join(bytes(token.bytes or ()) for token in tokens)
    assert spelled == "né!<|im_end|>".encode()
    assert generator.requests[0].params.logprobs == 2


async def test_completion_logprobs() -> None:
    async with client_of(say(TOKENIZER, "a bc")) as client:
        reply = await client.completions.create(model=MODEL, prompt="x", logprobs=1, max_tokens=50)
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None and logprobs.text_offset is not None
    text = reply.choices[0].text
    assert "".join(logprobs.tokens[:-1]) == text == "a bc"
    assert logprobs.tokens[-1] == "<|im_end|>" and logprobs.text_offset[-1] == len(text)
    placed = zip(logprobs.text_offset, logprobs.tokens[:-1], strict=False)
    assert all(text[offset:].startswith(token) for offset, token in placed)
    assert logprobs.token_logprobs == [-0.5] * len(logprobs.tokens)
    assert logprobs.top_logprobs is not None
    assert list(logprobs.top_logprobs[0]) == [logprobs.tokens[0]]


async def test_several_choices_of_several_prompts() -> None:
    generator = say(TOKENIZER, HELLO)
    async with client_of(generator) as client:
        reply = await client.completions.create(model=MODEL, prompt=["a", "b", "c"], n=2, max_tokens=100)
        stream = await client.completions.create(model=MODEL, prompt=["a", "b"], n=2, max_tokens=100, stream=True)
        texts = dict.fromkeys(range(4), "")
        async for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
    assert [choice.index for choice in reply.choices] == list(range(6))
    assert {choice.text for choice in reply.choices} == {HELLO}
    assert reply.usage is not None and reply.usage.completion_tokens == 6 * len(generator.ids)
    assert texts == dict.fromkeys(range(4), HELLO)
    first = generator.requests[:3]
    assert [TOKENIZER.decode(request.prompt_ids) for request in first] == ["a", "b", "c"]
    assert len({request.request_id for request in first}) == len({request.params.seed for request in first}) == 3


async def test_stop_strings() -> None:
    generator = say(TOKENIZER, "one two three four")
    async with client_of(generator) as client:
        reply = await client.chat.completions.create(model=MODEL, messages=USER, stop=["three", "zzz"], n=2)
        assert [choice.message.content for choice in reply.choices] == ["one two "] * 2
        assert {choice.finish_reason for choice in reply.choices} == {"stop"}
        request_id = generator.requests[0].request_id
        assert generator.finished_choices == [(request_id, 0), (request_id, 1)]
        included = await client.chat.completions.create(
            model=MODEL, messages=USER, stop="three", extra_body={"include_stop_str_in_output": True}
        )
        assert included.choices[0].message.content == "one two three"
        stream = await client.completions.create(model=MODEL, prompt="x", stop="ee f", stream=True, max_tokens=99)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == "one two thr"


async def test_length_and_echo() -> None:
    async with client_of(say(TOKENIZER, HELLO)) as client:
        reply = await client.completions.create(model=MODEL, prompt="Say: ", max_tokens=2, echo=True)
        assert reply.choices[0].finish_reason == "length"
        assert reply.choices[0].text == "Say: " + TOKENIZER.decode(say(TOKENIZER, HELLO).ids[:2])
        ids = TOKENIZER.encode_now("Say: ", add_special_tokens=False)
        stream = await client.completions.create(model=MODEL, prompt=[ids], max_tokens=2, echo=True, stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == reply.choices[0].text


async def test_models() -> None:
    async with client_of(say(TOKENIZER, HELLO)) as client:
        assert [model.id async for model in await client.models.list()] == [MODEL, "alias"]
        assert (await client.models.retrieve("alias")).owned_by == "baton"
        with pytest.raises(openai.NotFoundError) as caught:
            await client.models.retrieve("a/b")
        assert caught.value.code == "model_not_found"
        assert (await client.chat.completions.create(model="alias", messages=USER)).model == "alias"


@pytest.mark.parametrize(
    ("fields", "kind", "code", "param"),
    [
        ({"model": "other"}, openai.NotFoundError, "model_not_found", "model"),
        ({"temperature": 3}, openai.BadRequestError, "invalid_value", "temperature"),
        ({"n": 0}, openai.BadRequestError, "invalid_value", "n"),
        ({"messages": []}, openai.BadRequestError, "invalid_value", "messages"),
        ({"max_tokens": 5000}, openai.BadRequestError, "context_length_exceeded", "max_tokens"),
        (
            {"messages": [{"role": "user", "content": "ab " * 9000}]},
            openai.BadRequestError,
            "context_length_exceeded",
            "messages",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f"}}]},
            openai.BadRequestError,
            "invalid_value",
            "tools",
        ),
    ],
)
async def test_errors_of_the_client(
    fields: dict[str, Any], kind: type[openai.APIStatusError], code: str, param: str
) -> None:
    generator = say(TOKENIZER, HELLO)
    async with client_of(generator) as client:
        with pytest.raises(kind) as caught:
            await client.chat.completions.create(**({"model": MODEL, "messages": USER} | fields))
    assert caught.value.code == code and caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert not generator.requests


@pytest.mark.parametrize(
    ("error", "kind", "status", "retry_after"),
    [
        (NoCapacity("no grant", retry_after_s=2.4), openai.InternalServerError, 503, "3"),
        (QueueFull("full", retry_after_s=7), openai.RateLimitError, 429, "7"),
        (WorkerLost("gone"), openai.InternalServerError, 503, "1"),
        (EngineError("secret detail"), openai.InternalServerError, 500, None),
        (DeadlineExceeded("too late"), openai.InternalServerError, 504, None),
        (PoisonRequest("it has cost two workers"), openai.InternalServerError, 500, None),
    ],
)
async def test_errors_of_the_server(
    error: Any, kind: type[openai.APIStatusError], status: int, retry_after: str
) -> None:
    async with client_of(say(TOKENIZER, HELLO, fails=error)) as client:
        for stream in (False, True):
            with pytest.raises(kind) as caught:
                await client.chat.completions.create(model=MODEL, messages=USER, stream=stream)
            assert caught.value.status_code == status
            assert caught.value.code == error.code
            assert caught.value.response.headers.get("retry-after") == retry_after
            assert "secret" not in str(caught.value)


async def test_a_poisoned_request_is_not_tried_again_and_others_are() -> None:
    for error, tries in ((PoisonRequest("x"), 1), (NoCapacity("x", retry_after_s=0.01), 3)):
        generator = say(TOKENIZER, HELLO, fails=error)
        async with client_of(generator, max_retries=2) as client:
            with pytest.raises(openai.InternalServerError):
                await client.chat.completions.create(model=MODEL, messages=USER)
        assert len(generator.requests) == tries


async def test_an_error_in_the_middle_of_a_stream() -> None:
    async with client_of(say(TOKENIZER, HELLO, fails=EngineError("x"), fails_at=3)) as client:
        stream = await client.chat.completions.create(model=MODEL, messages=USER, stream=True)
        text = ""
        with pytest.raises(openai.APIError) as caught:
            async for chunk in stream:
                text += chunk.choices[0].delta.content or ""
    assert caught.value.code == "engine_error"
    assert text and HELLO.startswith(text)


async def test_steps_that_end_early_are_an_error() -> None:
    generator = say(TOKENIZER, HELLO, finish=FinishReason.STOP)
    generator.finish = None  # type: ignore[assignment]  what a broken generator would do
    async with client_of(generator) as client:
        with pytest.raises(openai.InternalServerError):
            await client.chat.completions.create(model=MODEL, messages=USER)


async def test_request_ids() -> None:
    async with client_of(say(TOKENIZER, HELLO)) as client:
        raw = await client.chat.completions.with_raw_response.create(model=MODEL, messages=USER)
        assert raw.headers["x-request-id"] == raw.parse().id.removeprefix("chatcmpl-")
        for sent, echoed in (("mine-1", True), ("x" * 200, False), ("a b", False)):
            raw = await client.chat.completions.with_raw_response.create(
                model=MODEL, messages=USER, extra_headers={"X-Request-Id": sent}
            )
            assert (raw.headers["x-request-id"] == sent) is echoed
            assert sent not in raw.parse().id


async def test_too_many_requests() -> None:
    generator = say(TOKENIZER, HELLO, endless=True)
    async with client_of(generator, Limits(max_requests=1)) as client:
        stream = await client.chat.completions.create(model=MODEL, messages=USER, stream=True)
        with pytest.raises(openai.RateLimitError) as caught:
            await client.chat.completions.create(model=MODEL, messages=USER)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        await stream.close()
        await client.close()


async def test_the_server_can_be_asked_by_any_client() -> None:
    async with in_process(front(TOKENIZER, say(TOKENIZER, HELLO))) as client:
        body = '{"model": "baton-tiny", "messages": [{"role": "user", "content": "hi"}]}'
        reply = await client.post("/v1/chat/completions", content=body)  # no content type at all
        assert reply.json()["choices"][0]["message"]["content"] == HELLO
