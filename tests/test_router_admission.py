"""Bounds hold at every moment, and what a request holds comes back however it ends."""

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from router_front import HELLO, chat, completion, front, in_process, say, tiny_tokenizer

from core.errors import EngineError, QueueFull
from router.admission import Admission, Parts
from router.limits import Limits

TOKENIZER = tiny_tokenizer()
CHAT = "/v1/chat/completions"


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_requests_are_bounded_by_their_choices() -> None:
    admission = Admission(Limits(max_requests=4), Clock())
    with await admission.admit(3):
        with pytest.raises(QueueFull):
            await admission.admit(2)
        with await admission.admit(1):
            assert admission.requests == 4
    assert admission.requests == 0


async def test_one_that_is_larger_than_the_bound_is_let_in_alone() -> None:
    admission = Admission(Limits(max_requests=2, max_queued_tokens=10), Clock())
    with await admission.admit(8) as slot:
        await slot.queue([100])
        with pytest.raises(QueueFull):
            await admission.admit(1)


async def test_prompt_tokens_wait_until_their_first_token() -> None:
    admission = Admission(Limits(max_queued_tokens=100), Clock())
    with await admission.admit(2) as first, await admission.admit(1) as second:
        await first.queue([50, 40])
        with pytest.raises(QueueFull):
            await second.queue([20])
        first.started(0)
        await second.queue([20])
        assert admission.queued_tokens == 60
        first.started(1)
        assert admission.queued_tokens == 20
    assert admission.queued_tokens == 0


async def test_retry_after_follows_the_rate_of_departures() -> None:
    clock = Clock()
    admission = Admission(Limits(max_requests=1), clock)
    for _ in range(200):
        with await admission.admit(1):
            clock.now += 5.0
    with await admission.admit(1), pytest.raises(QueueFull) as caught:
        await admission.admit(1)
    assert caught.value.retry_after_s == pytest.approx(5.0, rel=0.01)


class Part:
    """A part that a test makes grow."""

    def __init__(self, held: int) -> None:
        self.held, self.is_away, self.was_heard = held, False, True
        self.wishes: list[tuple[int, int]] = []
        self.grown: Callable[[], None] = list

    def use(self, used: int, waiting: int = 0) -> None:
        self.wishes.append((used, waiting))


async def test_a_request_waits_a_moment_for_its_routers_part_to_grow() -> None:
    part = Part(2)
    admission = Admission(Limits(max_requests=8), Clock(), Parts(requests=part))
    with await admission.admit(2):
        third = asyncio.create_task(admission.admit(1))
        await asyncio.sleep(0.01)
        assert not third.done() and part.wishes[-1] == (2, 1)
        part.held = 3
        part.grown()
        with await third:
            assert admission.requests == 3
            fourth = asyncio.create_task(admission.admit(1))
            await asyncio.sleep(0.01)
        with await fourth:  # somebody has left
            assert admission.requests == 3
        part.held = 2
        with pytest.raises(QueueFull):
            await admission.admit(1)
    assert part.wishes[-1] == (0, 0)


async def test_while_the_store_is_away_what_is_over_the_part_is_refused_at_once() -> None:
    part = Part(2)
    admission = Admission(Limits(max_requests=32), Clock(), Parts(requests=part))
    part.is_away = True
    with await admission.admit(2), pytest.raises(QueueFull):
        async with asyncio.timeout(0.1):
            await admission.admit(1)
    part.was_heard, part.held = False, 0  # never reached: a sixteenth
    with await admission.admit(2), pytest.raises(QueueFull):
        await admission.admit(1)


async def test_nobody_is_let_in_beyond_a_part_that_is_nothing() -> None:
    part = Part(0)
    admission = Admission(Limits(max_requests=8), Clock(), Parts(requests=part))
    with pytest.raises(QueueFull):
        await admission.admit(1)
    assert (0, 1) in part.wishes
    part.held = 8
    with await admission.admit(20):  # larger than the whole bound: let in alone
        assert admission.requests == 20


@given(st.lists(st.tuples(st.integers(1, 8), st.lists(st.integers(1, 50), min_size=1, max_size=3)), max_size=30))
async def test_nothing_stays_behind(calls: list[tuple[int, list[int]]]) -> None:
    admission = Admission(Limits(max_requests=16, max_queued_tokens=100), Clock())
    held = []
    for choices, prompts in calls:
        try:
            slot = await admission.admit(choices)
        except QueueFull:
            if held:
                held.pop(0).__exit__(None, None, None)
            continue
        held.append(slot.__enter__())
        try:
            await slot.queue(prompts)
        except QueueFull:
            held.pop().__exit__(None, None, None)
        assert admission.requests <= 16
    for slot in held:
        slot.__exit__(None, None, None)
    assert (admission.requests, admission.queued_tokens) == (0, 0)


async def test_waiting_prompts_are_bounded_over_http() -> None:
    generator = say(TOKENIZER, HELLO, delay_s=0.2)
    served = front(TOKENIZER, generator, Limits(max_queued_tokens=15))
    async with in_process(served) as client:
        first = asyncio.create_task(client.post(CHAT, json=chat(max_tokens=2)))
        await asyncio.sleep(0.05)
        refused = await client.post(CHAT, json=chat())
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert (await first).status_code == 200
        assert (await client.post(CHAT, json=chat(max_tokens=1))).status_code == 200


async def test_every_ending_gives_its_slot_back() -> None:
    for fails_at in (0, 2):
        generator = say(TOKENIZER, HELLO, fails=EngineError("x"), fails_at=fails_at)
        served = front(TOKENIZER, generator)
        async with in_process(served) as client:
            for body in (chat(), chat(stream=True), chat(n=3), chat(temperature=9)):
                await client.post(CHAT, json=body)
            await client.post("/v1/completions", json=completion(["a", "b"]))
        text = served.metrics.text()
        assert "baton:router_inflight_requests 0.0" in text
        assert "baton:router_queued_prompt_tokens 0.0" in text
        assert generator.running == 0
