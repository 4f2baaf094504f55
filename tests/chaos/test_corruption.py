"""Pages that are changed on their way, in four places: none is served, all are counted, every request ends right."""

from __future__ import annotations

import asyncio
from random import Random

import pytest
from kvtransfer_pair import content, prompt_of

from core.errors import DigestMismatch, StalePage
from core.layout import PageLayout
from core.messages import Peer
from kvtransfer.messages import HandoffKey
from tests.chaos.damage import PERSISTS, Place, Plan
from tests.chaos.pair import P, RealPair, real_pair
from tests.chaos.table import Table
from tests.chaos.transports import NAMES

LAYOUT = PageLayout(kv_heads=2, layers=1, page_size=16, head_dim=64, dtype="uint8")  # 4 KiB
FEW, MANY = 1_000, 5_000  # injections, over each of two transports
AT_ONCE = 12
MOST_PAGES = 9


class Corruption:
    """Asks for hand-offs until so many pages have been changed. Each request is tried until it is committed."""

    def __init__(self, pair: RealPair, injections: int, seed: int) -> None:
        self.pair = pair
        self.injections = injections
        self.random = Random(seed)
        self.requests = 0
        self.retries = 0

    async def run(self) -> None:
        await asyncio.gather(*(self._requests() for _ in range(AT_ONCE)))
        await self.pair.quiet()

    def _next_place(self) -> Place | None:
        """The one that has had the fewest."""
        done = self.pair.damage.done
        if sum(done.values()) >= self.injections:
            return None
        return min(Place, key=lambda place: (done[place], place.value))

    async def _requests(self) -> None:
        while (place := self._next_place()) is not None:
            self.requests += 1
            await self._request(f"r{self.requests}", place)

    async def _request(self, name: str, place: Place) -> None:
        tokens = self.random.randrange(16, 16 * MOST_PAGES)
        prompt = prompt_of(self.random, tokens)
        first, second = HandoffKey(name, 1), HandoffKey(name, 2)
        self.pair.damage.plans[first] = Plan(place, position=self.random.randrange(len(prompt.names)))
        if not await self._attempt(first, prompt):
            assert place in PERSISTS
            error, blames = self.pair.d.aborted[first]
            assert isinstance(error, StalePage if place is Place.STALE else DigestMismatch) and blames == P
            self.retries += 1
            assert await self._attempt(second, prompt), "a second attempt without harm"

    async def _attempt(self, key: HandoffKey, prompt: object) -> bool:
        """Whether it was committed; then its pages are right now, and once more when they are given up."""
        p, d = self.pair.p, self.pair.d
        d.expect(key, prompt, Peer(P, ""))
        await p.prefill(key, prompt, self.pair.to_d, chunk_pages=self.random.randrange(1, 5), chunk_s=0.0)
        await d.until_ended(key)
        if key in d.aborted:
            return False
        d.drop(key)
        return True


def assert_nothing_wrong_is_kept(pair: RealPair) -> None:
    """Of what was committed, and of what is in the prefix cache."""
    assert not pair.d.wrong
    for name in pair.d.pool.known_hashes():
        (page,) = pair.d.pool.lookup([name])
        assert pair.d.frames.page(page) == content(name, pair.d.frames.layout)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("transport", NAMES)
async def test_no_changed_page_is_served_and_each_is_counted(transport: str, chaos_full: bool, table: Table) -> None:
    injections = MANY if chaos_full else FEW
    async with real_pair(transport, LAYOUT, seed=1) as pair:
        corruption = Corruption(pair, injections, seed=2)
        await corruption.run()
        done, faults = pair.damage.done, pair.faults.by_code
        places = {place.value: count for place, count in done.items()}
        print(f"{transport}: {places}, {corruption.requests} requests, {corruption.retries} retried, {dict(faults)}")
        for place, count in done.items():
            row = table.row(f"page changed: {place.value}", f"{transport}, page by page")
            row.runs = row.survived = count  # the request that it was for ended right
        assert sum(done.values()) >= injections and min(done.values()) > injections / 5
        assert_nothing_wrong_is_kept(pair)
        assert len(pair.d.commits) == corruption.requests
        assert corruption.retries == done[Place.SOURCE] + done[Place.STALE]
        # What is changed for good is found by both fetches of the page, what is changed in passing by the first.
        assert pair.damage.wrong == 2 * done[Place.SOURCE] + done[Place.FLIGHT] + done[Place.DESTINATION]
        assert pair.damage.stale == done[Place.STALE]
        assert faults == {DigestMismatch.code: pair.damage.wrong, StalePage.code: pair.damage.stale}
