"""The official client against real processes: a real engine answers, and long prompts are handed off."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.processes.answers import NAME, some_tokens
from tests.processes.cluster import Cluster

LONG: Any = [{"role": "user", "content": "Repeat this text:\n" + "one two three four five six seven " * 40}]
SHORT: Any = [{"role": "user", "content": "3+4=?"}]


@pytest.fixture(scope="module")
def client(disaggregated: Cluster) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{disaggregated.url}/v1", api_key="x", max_retries=0, timeout=60) as client:
        yield client


def test_the_model_is_listed(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]


def test_a_long_prompt_is_handed_off(client: OpenAI, disaggregated: Cluster) -> None:
    before = disaggregated.total("baton:handoffs_total", "outcome", "committed")
    reply = client.chat.completions.create(model=NAME, messages=LONG, temperature=0, max_tokens=20)
    assert reply.choices[0].message.content
    assert reply.usage is not None and reply.usage.prompt_tokens > 128
    cost = (reply.usage.model_extra or {})["handoff"]
    assert cost["transferred_tokens"] == reply.usage.prompt_tokens
    assert cost["transfer_s"] > 0 and cost["exposed_transfer_s"] > 0 and 0 <= cost["overlap"] <= 1
    assert disaggregated.total("baton:transferred_bytes_total") >= cost["transferred_bytes"] > 0

    def both_have_counted() -> bool:
        return disaggregated.total("baton:handoffs_total", "outcome", "committed") == before + 2

    disaggregated.wait_until("the source has heard of the commit", both_have_counted)
    assert disaggregated.metric("baton:handoff_pages_total")["decode-0"]["decode-0"] >= reply.usage.prompt_tokens // 16


def test_a_short_prompt_is_prefilled_where_it_is_decoded(client: OpenAI, disaggregated: Cluster) -> None:
    committed = disaggregated.total("baton:handoffs_total", "outcome", "committed")
    before = disaggregated.total("baton:local_prefills_total")
    client.chat.completions.create(model=NAME, messages=SHORT, temperature=0, max_tokens=5)
    assert disaggregated.total("baton:local_prefills_total") == before + 1
    assert disaggregated.total("baton:handoffs_total", "outcome", "committed") == committed


@pytest.mark.parametrize("messages", [SHORT, LONG], ids=["short", "long"])
def test_a_stream_says_what_the_whole_reply_says(client: OpenAI, messages: Any) -> None:
    whole = client.chat.completions.create(model=NAME, messages=messages, temperature=0, max_tokens=30)
    stream = client.chat.completions.create(
        model=NAME,
        messages=messages,
        temperature=0,
        max_tokens=30,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert [c.finish_reason for chunk in chunks for c in chunk.choices][-1] == whole.choices[0].finish_reason
    assert whole.usage is not None and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens <= 30
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


@pytest.mark.parametrize("length", [20, 300])
def test_the_same_seed_gives_the_same_texts_and_another_seed_others(client: OpenAI, length: int) -> None:
    def texts(seed: int) -> list[str]:
        reply = client.completions.create(
            model=NAME, prompt=some_tokens(1, length), seed=seed, n=3, temperature=1, max_tokens=20
        )
        assert [choice.index for choice in reply.choices] == [0, 1, 2]
        return [choice.text for choice in reply.choices]

    first = texts(7)
    assert first == texts(7)
    assert len(set(first)) == 3 and not set(first) & set(texts(8))


@pytest.mark.parametrize("length", [20, 300])
def test_logprobs_are_those_of_the_likeliest_token(client: OpenAI, length: int) -> None:
    reply = client.completions.create(
        model=NAME, prompt=some_tokens(2, length), temperature=0, max_tokens=10, logprobs=3
    )
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None and logprobs.top_logprobs is not None
    assert len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 10
    for chosen, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert chosen == max(top.values()) <= 0 and len(top) == 3


def test_a_stop_string_ends_the_text_and_frees_the_pages(client: OpenAI, disaggregated: Cluster) -> None:
    request: Any = {"model": NAME, "prompt": some_tokens(3, 300), "temperature": 0, "max_tokens": 40}
    whole = client.completions.create(**request).choices[0].text
    stop = whole[len(whole) // 2 :][:3]
    cut = client.completions.create(**request, stop=[stop]).choices[0]
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"
    disaggregated.quiesce(2)


def test_errors_name_the_field_and_the_server_answers_the_next_request(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no such model"):
        client.completions.create(model="nobody", prompt="x")
    with pytest.raises(openai.BadRequestError, match="2048"):
        client.completions.create(model=NAME, prompt=some_tokens(4, 2049))
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=NAME, prompt="x", temperature=-1)
    assert refused.value.param == "temperature"
    assert client.completions.create(model=NAME, prompt="x", max_tokens=1).usage is not None
