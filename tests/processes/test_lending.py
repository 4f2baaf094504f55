"""The second turn of a chat on real processes: its history comes from the worker that decoded the first one."""

from __future__ import annotations

import signal
from typing import Any

import httpx
import pytest

from tests.processes.answers import NAME
from tests.processes.cluster import Cluster, serving

WORDS = "The quick brown fox jumps over the lazy dog, and the dog says nothing about it. "
TALKS = 3
PREFILLS = ("prefill-0", "prefill-1")


def chat(cluster: Cluster, messages: list[dict[str, str]]) -> dict[str, Any]:
    request = {"model": NAME, "messages": messages, "temperature": 0, "max_tokens": 40, "ignore_eos": True}
    reply = httpx.post(f"{cluster.url}/v1/chat/completions", json=request, timeout=120)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def content(reply: dict[str, Any]) -> str:
    return str(reply["choices"][0]["message"]["content"])


def cached_tokens(reply: dict[str, Any]) -> int:
    return int(reply["usage"]["prompt_tokens_details"]["cached_tokens"])


def second_turns(cluster: Cluster) -> list[list[dict[str, str]]]:
    """What clients ask next, after a first turn each."""
    talks = []
    for number in range(TALKS):
        talk = [{"role": "user", "content": f"Conversation {number}. " + 30 * WORDS}]
        talk.append({"role": "assistant", "content": content(chat(cluster, talk))})
        talks.append([*talk, {"role": "user", "content": 10 * WORDS}])
    return talks


def start_prefill_anew(cluster: Cluster) -> None:
    """Their caches are empty then, and nobody has measured how fast they are."""
    for name in PREFILLS:
        old = cluster.send(name, signal.SIGKILL)
        cluster.wait_until(f"{name} is back", lambda name=name, old=old: cluster.replaced(old, name))  # type: ignore[misc]
    cluster.wait_until("all workers are known", lambda: len(cluster.metric("baton:pages", "state")) == 3)
    cluster.wait_until("it serves", cluster.is_healthy)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("transport", ["shm", "ucx"])
def test_the_history_of_a_chat_is_fetched_from_decode(transport: str, aggregated: Cluster) -> None:
    with serving("--prefill", "2", "--transport", transport, workers=3) as cluster:
        talks = second_turns(cluster)
        assert cluster.total("baton:fetched_tokens_total") == 0
        start_prefill_anew(cluster)
        replies = [chat(cluster, talk) for talk in talks]
        fetched = cluster.total("baton:fetched_tokens_total")
        assert fetched > 500, cluster.said()
        assert sum(reply["usage"]["handoff"]["fetched_tokens"] for reply in replies) == fetched
        assert sum(map(cached_tokens, replies)) >= fetched, "usage counts what was fetched as cached"
        lent = cluster.metric("baton:handoffs_total", "end")
        assert lent["decode-0"]["lender"] >= 1
        assert sum(lent[name]["borrower"] for name in PREFILLS) >= 1
        assert [content(reply) for reply in replies] == [content(chat(aggregated, talk)) for talk in talks]
