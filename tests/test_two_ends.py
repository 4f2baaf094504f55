"""Two ends over one transport: what one of them cuts off, the other one loses, and both meet it anew."""

import asyncio
from collections.abc import Sequence

import pytest

from core.errors import BatonError, PeerLost
from core.messages import WorkerId
from kvtransfer.digest import SegmentDigest
from kvtransfer.frames import Frames
from kvtransfer.transport import Arrival, Piece
from kvtransfer.two_ends import TwoEnds

PEER, OTHER = WorkerId("x", 1), WorkerId("y", 1)


class SlowTransport:
    """Forgets when the test lets it."""

    name = "slow"
    settles_on_return = True

    def __init__(self) -> None:
        self.forgotten: list[WorkerId] = []
        self.met: list[WorkerId] = []
        self.may_forget = asyncio.Event()
        self.may_meet = asyncio.Event()
        self.may_meet.set()

    async def serve(self, frames: Frames, digest: SegmentDigest) -> None: ...

    async def invite(self, peer: WorkerId) -> bytes:
        await self.may_meet.wait()
        return b"come"

    async def meet(self, peer: WorkerId, descriptor: bytes) -> None:
        await self.may_meet.wait()
        self.met.append(peer)

    async def fetch(self, peer: WorkerId, stream: int, pieces: Sequence[Piece]) -> list[Arrival]:
        return []

    async def drain(self, peer: WorkerId, stream: int) -> None: ...

    async def forget(self, peer: WorkerId) -> None:
        self.forgotten.append(peer)
        await self.may_forget.wait()

    async def close(self) -> None: ...


class Rig:
    def __init__(self) -> None:
        self.transport = SlowTransport()
        self.ends = TwoEnds(self.transport)
        self.told: list[tuple[str, WorkerId]] = []
        self.ends.source.peer_gone = lambda peer, error: self._tell("source", peer, error)
        self.ends.receiver.peer_gone = lambda peer, error: self._tell("receiver", peer, error)

    def _tell(self, end: str, peer: WorkerId, error: BatonError) -> None:
        assert isinstance(error, PeerLost)
        self.told.append((end, peer))


async def soon() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.mark.parametrize(("end", "other"), [("source", "receiver"), ("receiver", "source")])
async def test_the_other_end_hears_of_it_at_once_and_both_wait_until_it_is_done(end: str, other: str) -> None:
    rig = Rig()
    first = asyncio.create_task(getattr(rig.ends, end).forget(PEER))
    await soon()
    assert rig.told == [(other, PEER)], "the one that asked knows it"
    second = asyncio.create_task(getattr(rig.ends, other).forget(PEER))  # as its hand-offs fail
    await soon()
    assert not first.done() and not second.done()
    assert rig.transport.forgotten == [PEER], "once"
    rig.transport.may_forget.set()
    await asyncio.gather(first, second)
    assert rig.told == [(other, PEER)]
    await getattr(rig.ends, other).forget(PEER)
    assert rig.told == [(other, PEER), (end, PEER)], "a later cut is another one"


async def test_whoever_stops_waiting_does_not_stop_the_cut() -> None:
    rig = Rig()
    first = asyncio.create_task(rig.ends.source.forget(PEER))
    await soon()
    first.cancel()
    await soon()
    second = asyncio.create_task(rig.ends.receiver.forget(PEER))
    await soon()
    assert first.cancelled() and not second.done()
    rig.transport.may_forget.set()
    await second


async def test_a_peer_that_is_being_cut_off_is_met_when_that_is_done_and_others_at_once() -> None:
    rig = Rig()
    cut = asyncio.create_task(rig.ends.source.forget(PEER))
    await soon()
    meeting = asyncio.create_task(rig.ends.receiver.meet(PEER, b"d"))
    await rig.ends.receiver.meet(OTHER, b"d")
    await soon()
    assert not meeting.done() and rig.transport.met == [OTHER]
    rig.transport.may_forget.set()
    await asyncio.gather(cut, meeting)
    assert rig.transport.met == [OTHER, PEER]
    assert await rig.ends.receiver.invite(PEER) == b"come"


async def test_a_greeting_that_a_cut_came_into_fails_at_its_next_step() -> None:
    """Each end in its order: a source invites first, a receiver is told first."""
    rig = Rig()
    rig.transport.may_forget.set()
    await rig.ends.source.invite(PEER)
    await rig.ends.receiver.meet(PEER, b"d")
    await rig.ends.receiver.forget(PEER)
    with pytest.raises(PeerLost, match="while it was greeted"):
        await rig.ends.source.meet(PEER, b"d")
    with pytest.raises(PeerLost, match="while it was greeted"):
        await rig.ends.receiver.invite(PEER)
    await rig.ends.source.invite(PEER)
    await rig.ends.source.meet(PEER, b"d")


@pytest.mark.parametrize("end", ["source", "receiver"])
async def test_a_greeting_that_a_cut_comes_into_while_it_waits_fails_too(end: str) -> None:
    rig = Rig()
    rig.transport.may_forget.set()
    here = getattr(rig.ends, end)
    if end == "source":
        await here.invite(PEER)
    rig.transport.may_meet.clear()
    meeting = asyncio.create_task(here.meet(PEER, b"d"))
    await soon()
    await rig.ends.source.forget(PEER)
    rig.transport.may_meet.set()
    with pytest.raises(PeerLost, match="while it was greeted"):
        await meeting
