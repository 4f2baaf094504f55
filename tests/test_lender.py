"""The lender by itself: what it holds when, and that it holds nothing in the end."""

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace

from core.errors import BatonError, Cancelled, NoCapacity
from core.hashing import block_hashes, root_hash
from core.messages import Lend, Peer, Receipt, Token, WorkerId
from decode_service.lender import LENT_SHARE, Lender
from engine.pool import PagePool
from kvtransfer.messages import Grant, HandoffKey
from kvtransfer.places import FilledPage
from kvtransfer.states import State

P = Peer(WorkerId("p", 1), "p")
IDS = tuple(range(160))
KEY = HandoffKey("r", 1)


class FakeSource:
    """Remembers what it is told; the test grants."""

    def __init__(self) -> None:
        self.asked: dict[HandoffKey, int] = {}
        self.grants: dict[HandoffKey, asyncio.Future[Grant]] = {}
        self.said: list[object] = []

    async def offer(
        self, key: HandoffKey, peer: Peer, prompt_tokens: int, choices: int, deadline_s: float, ticket: bytes = b""
    ) -> Grant:
        self.asked[key] = prompt_tokens
        self.grants[key] = asyncio.get_running_loop().create_future()
        return await self.grants[key]

    def decline(self, key: HandoffKey, peer: Peer, error: BatonError) -> None:
        self.said.append(("declined", key))

    def ready(self, key: HandoffKey, pages: Sequence[FilledPage]) -> None:
        self.said += [page.position for page in pages]

    def seal(self, key: HandoffKey, tail: FilledPage | None, tokens: Sequence[Token], receipt: Receipt) -> None:
        self.said.append("sealed")

    def fail(self, key: HandoffKey, error: BatonError) -> None:
        self.said.append(error.code)

    def cancel(self, key: HandoffKey) -> None:
        self.said.append(("cancelled", key))


class Rig:
    def __init__(self, pages: int = 64, cached: int = 10) -> None:
        self.pool = PagePool(pages)
        held = self.pool.allocate(cached)
        assert held is not None
        for page, name in zip(held, block_hashes(root_hash("m"), IDS, 16), strict=False):
            self.pool.register(page, name)
        self.pool.release_all(held)
        self.source = FakeSource()
        engine = SimpleNamespace(pool=self.pool, page_size=16)
        self.lender = Lender(engine, "m", 1000, asyncio.ensure_future)  # type: ignore[arg-type]
        self.lender.attach(self.source)

    async def lend(self, ids: tuple[int, ...] = IDS, attempt: int = 1) -> None:
        self.lender.lend(Lend("r", attempt, ids, P, 30.0))
        await soon()

    async def grant(self, prefix_pages: int = 0) -> None:
        self.source.grants[KEY.history].set_result(Grant(KEY.history, 1, prefix_pages))
        await soon()

    @property
    def owned(self) -> int:
        return self.pool.counts()["owned"]


async def soon() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_pages_are_held_from_the_grant_to_the_end_and_only_those_that_move() -> None:
    rig = Rig()
    await rig.lend()
    assert rig.source.asked == {KEY.history: 160}
    assert rig.owned == 0, "nothing is held while the peer is asked for room"
    await rig.grant(prefix_pages=3)
    assert rig.owned == 7
    assert rig.source.said == [*range(3, 10), "sealed"]
    rig.lender.on_closed(KEY.history, State.COMMITTED, None)
    assert rig.owned == 0
    rig.pool.check()


async def test_what_is_here_is_offered_and_nothing_is_declined() -> None:
    rig = Rig(cached=4)
    await rig.lend()
    assert rig.source.asked == {KEY.history: 64}
    for strange in (tuple(range(500, 600)), (1, 2), (5000, *IDS[1:])):
        await rig.lend(strange, attempt=2)
        assert rig.source.said.pop() == ("declined", HandoffKey("r", 2).history)


async def test_pages_that_are_given_up_before_the_grant_are_not_lent() -> None:
    rig = Rig()
    await rig.lend()
    taken = rig.pool.allocate(rig.pool.reusable)
    await rig.grant()
    assert taken is not None and rig.source.said == [NoCapacity.code]
    assert rig.owned == len(taken)


async def test_no_more_is_lent_than_a_share_of_the_pool() -> None:
    rig = Rig(pages=17)
    assert rig.pool.capacity // LENT_SHARE < 10
    await rig.lend()
    await rig.grant(prefix_pages=1)
    assert rig.source.said == [NoCapacity.code] and rig.owned == 0


async def test_an_end_that_comes_with_the_grant_leaves_nothing_held() -> None:
    """The future of the grant is set, and its task has not run yet."""
    rig = Rig()
    await rig.lend()
    rig.source.grants[KEY.history].set_result(Grant(KEY.history, 1, 0))
    rig.lender.on_closed(KEY.history, State.ABORTED, Cancelled("gone"))
    await soon()
    assert rig.owned == 0 and rig.source.said == []
    await rig.lend(attempt=2)
    assert HandoffKey("r", 2).history in rig.source.asked


async def test_a_cancel_reaches_a_loan_that_is_asked_for_or_held_and_no_other() -> None:
    rig = Rig()
    rig.lender.cancel(KEY)
    assert rig.source.said == []
    await rig.lend()
    await rig.lend()  # said twice
    rig.lender.cancel(KEY)
    await rig.grant()
    rig.lender.cancel(KEY)
    assert rig.source.said[0] == rig.source.said[-1] == ("cancelled", KEY.history)
    assert len(rig.source.asked) == 1
