"""How a tier's size follows what its workers say, as Serve's controller asks for it. Without a Ray cluster."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator

from baton.cluster.deciding import PERIOD_S, Numbers, TierSize, need_of_decode, need_of_prefill, need_of_routers
from baton.cluster.publishing import DecisionPublisher
from baton.cluster.spec import RouterTarget
from baton.scaling.decode import DecodeTarget
from baton.scaling.prefill import PrefillTarget
from baton.scaling.steady import Bounds
from core.errors import RegistryAway
from core.registry.decisions import Decision, decode

BOUNDS = Bounds(least=1, most=4, window_s=10.0, pause_s=1.0)


def prefill(queued: float, draining: float = 0.0) -> Numbers:
    return {
        "draining": draining,
        "arriving_tokens_per_s": queued,
        "queued_tokens": queued,
        "queue_wait_s": queued / 1000,
        "first_token_s": queued / 1000,
        "tokens_per_s": 1000.0,
    }


def decode_worker(pages: float) -> Numbers:
    return {
        "draining": 0.0,
        "projected_pages": pages,
        "pages_total": 100.0,
        "running": 1.0,
        "token_gap_s": 0.01,
        "refused_grants_per_s": 0.0,
    }


def test_while_nobody_says_anything_nothing_is_changed() -> None:
    size = TierSize(need_of_prefill(PrefillTarget()), BOUNDS)
    assert size.desired([], 3, 0.0).desired == 3
    assert size.desired([], 9, 1.0).desired == BOUNDS.most
    assert size.ready == 0


def test_a_burst_is_answered_at_once_and_its_end_after_a_while() -> None:
    size = TierSize(need_of_prefill(PrefillTarget()), BOUNDS)
    assert size.desired([prefill(10.0)], 1, 0.0).desired == 1
    burst = size.desired([prefill(9000.0)], 1, PERIOD_S)
    assert burst.desired > 1 and "tokens/s" in burst.reason
    current, now_s = burst.desired, 1.0
    while now_s < 60.0:
        now_s += PERIOD_S
        current = size.desired([prefill(0.0)] * current, current, now_s).desired
        assert current == burst.desired or now_s > BOUNDS.window_s
    assert current == 1


def test_between_two_looks_the_decision_stands() -> None:
    size = TierSize(need_of_prefill(PrefillTarget()), BOUNDS)
    first = size.desired([prefill(10.0)], 1, 0.0)
    assert size.desired([prefill(9000.0)], 1, PERIOD_S / 2) is first


def test_those_that_drain_are_not_ready() -> None:
    size = TierSize(need_of_prefill(PrefillTarget()), BOUNDS)
    size.desired([prefill(1.0), prefill(1.0, draining=1.0)], 2, 0.0)
    assert size.ready == 1


def test_decode_and_routers_have_their_own_signals() -> None:
    decodes = TierSize(need_of_decode(DecodeTarget()), BOUNDS)
    assert decodes.desired([decode_worker(180.0)], 1, 0.0).desired == 3
    routers = TierSize(need_of_routers(RouterTarget(requests=100.0)), BOUNDS)
    assert routers.desired([{"requests": 250.0}], 1, 0.0).desired == 3


class SlowStore:
    """Takes its time, and is away at first."""

    def __init__(self) -> None:
        self.values: list[bytes] = []
        self.calls = 0
        self.written, self.closed = threading.Event(), threading.Event()

    async def put(self, group: str, name: str, value: bytes, life_s: float) -> None:
        self.calls += 1
        await asyncio.sleep(0.05)
        if self.calls == 1:
            raise RegistryAway("not yet")
        self.values.append(value)
        self.written.set()

    async def close(self) -> None:
        self.closed.set()

    async def remove(self, group: str, name: str) -> None: ...
    async def read(self, group: str) -> dict[str, bytes]:
        return {}

    async def add(self, counter: str, amount: int, life_s: float) -> int:
        return 0

    async def tell(self, group: str) -> None: ...
    async def listen(self, group: str) -> AsyncIterator[None]:
        yield


def test_publishing_never_waits_and_survives_a_store_that_is_away() -> None:
    store = SlowStore()
    publisher = DecisionPublisher(lambda: store)
    began_s = time.monotonic()
    publisher.say(Decision("prefill", 2, 1, "a burst"))
    assert time.monotonic() - began_s < 0.05
    while store.calls == 0:
        time.sleep(0.01)
    newest = Decision("prefill", 3, 2, "more of it")
    publisher.say(newest)
    assert store.written.wait(5.0) and decode(store.values[-1]) == newest
    publisher.close()
    assert store.closed.wait(5.0)
