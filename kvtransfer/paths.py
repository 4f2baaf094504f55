"""A transport made of several: each pair of workers uses the best that works between the two, and proves it first.

shm serves workers of one host, cuda those of them whose pools lie in memory of GPUs, ucx all others. A path counts for
nothing before the peer's pattern has come over it unharmed. It is measured then, and again from time to time. One that
fails is cut off, so that nothing of it can land any more, and the next one is tried; after a pause the better one is
met again, by a new session, and tried beside the running hand-offs. Which one is right is decided in `path_choice`.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from core.clock import Clock
from core.errors import HandoffError, PeerLost
from core.messages import PathReport, WorkerId
from kvtransfer.chores import Chores
from kvtransfer.digest import SegmentDigest
from kvtransfer.frames import Frames
from kvtransfer.host import Host, same_machine
from kvtransfer.path_choice import (
    ANY,
    Expectation,
    Route,
    better_than,
    fell_back,
    routes_to,
    to_try,
    trouble_of,
    what_was_tried,
)
from kvtransfer.path_descriptor import SEED_BYTES, PathDescriptor
from kvtransfer.proof import Measure, Proof, pattern, pattern_digests
from kvtransfer.transport import Arrival, Piece, Transport, lanes_of

log = logging.getLogger(__name__)

OnFallback = Callable[[str, str], None]  # the peer's name, and the transport that is used now


@dataclass(frozen=True, slots=True)
class PathTerms:
    """Seconds."""

    proof_s: float = 5.0  # a path that has not carried the pattern by then does not work
    renew_s: float = 2.0  # a pair without a path waits so long for the session that it has asked for
    period_s: float = 60.0  # a path in use is measured again after so long
    expect: Expectation = ANY


@dataclass(slots=True)
class _Pair:
    """One peer, and the ways to it. A peer that is forgotten and met again is another pair."""

    peer: WorkerId
    theirs: PathDescriptor
    expected: bytes  # digests of its pattern
    routes: list[Route]
    current: Route | None = None  # proved, and in use
    choosing: asyncio.Task[None] | None = None
    checking: asyncio.Task[None] | None = None  # of the current path, or of a better one
    cutting: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    forgotten: bool = False
    unmet: str = ""  # of what was expected


class Paths:
    """`transports`: best first. `renew` is called to have the session with a peer opened anew, which meets it again."""

    name = "paths"

    def __init__(
        self,
        transports: Mapping[str, Transport],
        *,
        host: Host,
        clock: Clock,
        terms: PathTerms | None = None,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._transports = dict(transports)
        self._host = host
        self._clock = clock
        self._terms = terms or PathTerms()
        self._seed = random_bytes(SEED_BYTES)
        self._pairs: dict[WorkerId, _Pair] = {}
        self._used: set[str] = set()  # transports that have carried pages
        self._landing = asyncio.Lock()
        self._chores = Chores()
        self._met = asyncio.Condition()
        self._frames: Frames
        self._digest: SegmentDigest
        self.renew: Callable[[WorkerId], None] = _nobody
        self.on_fallback: OnFallback = _uncounted

    @property
    def settles_on_return(self) -> bool:
        return all(self._transports[name].settles_on_return for name in self._used)

    async def serve(self, frames: Frames, digest: SegmentDigest) -> None:
        self._frames, self._digest = frames, digest
        if frames.device is not None:
            self._host = replace(self._host, device=frames.device.name)
        frames.write(frames.pattern, pattern(self._seed, frames.layout.page_bytes))
        for transport in self._transports.values():
            await transport.serve(frames, digest)

    # --- meeting -----------------------------------------------------------------------------------------------

    async def invite(self, peer: WorkerId) -> bytes:
        """The same until the peer is forgotten, but for transports that were cut off meanwhile: they begin anew."""
        await self._all_cut_off(peer)
        offered = {name: await transport.invite(peer) for name, transport in self._transports.items()}
        return PathDescriptor(self._host, self._frames.pages, self._seed, offered).encode()

    async def meet(self, peer: WorkerId, descriptor: bytes) -> None:
        theirs = PathDescriptor.decode(descriptor)
        pair = self._pairs.get(peer)
        if pair is None or pair.theirs.seed != theirs.seed:
            routes = routes_to(self._host, theirs.host, list(self._transports), theirs.transports, self._terms.expect)
            expected = pattern_digests(theirs.seed, self._frames.layout, self._digest)
            pair = self._pairs[peer] = _Pair(peer, theirs, expected, routes)
        for route in pair.routes:
            if not route.barrier:
                await self._meet(pair, route, theirs.transports.get(route.name, b""))
        async with self._met:
            self._met.notify_all()

    async def _meet(self, pair: _Pair, route: Route, offered: bytes) -> None:
        """For the first time, or again: what was proved stays so while the peer says the same as before."""
        await self._cut_off(pair, route)
        if not route.met or route.descriptor != offered:
            route.descriptor, route.measure, route.retry_s = offered, None, self._clock()
            if pair.current is route:
                pair.current = None
        try:
            await self._transports[route.name].meet(pair.peer, offered)
            route.met = True
        except HandoffError as error:
            route.met = True  # half: it has to be cut off
            await self._give_up(pair, route, f"it cannot be met: {error}")

    def knows(self, peer: WorkerId) -> bool:
        return peer in self._pairs

    async def until_met(self, peer: WorkerId) -> None:
        """Return when a session has brought the peer's descriptor."""
        async with self._met:
            await self._met.wait_for(lambda: peer in self._pairs)

    # --- moving pages ------------------------------------------------------------------------------------------

    async def fetch(self, peer: WorkerId, stream: int, pieces: Sequence[Piece]) -> list[Arrival]:
        pair = self._pairs.get(peer)
        if pair is None:
            raise PeerLost(f"{peer} was never met")
        for _ in self._transports:
            route = await self._path(pair)
            self._used.add(route.name)
            try:
                return await self._transports[route.name].fetch(peer, stream, pieces)
            except PeerLost as error:
                if pair.forgotten:
                    raise
                await self._give_up(pair, route, str(error))
        raise PeerLost(what_was_tried(pair.routes))

    async def _path(self, pair: _Pair) -> Route:
        """The path in use, proved. Raises PeerLost with what was tried when there is none."""
        if pair.current is None:
            if pair.choosing is None:
                pair.choosing = self._chores.spawn(self._choose(pair), f"path to {pair.peer}")
                pair.choosing.add_done_callback(lambda _: setattr(pair, "choosing", None))
            await asyncio.wait([pair.choosing])  # not awaited itself: our cancel is not that of the others
        else:
            self._look_after(pair, pair.current)
        if pair.forgotten:
            raise PeerLost(f"{pair.peer} was cut off")
        if pair.current is None:
            raise PeerLost(what_was_tried(pair.routes))
        return pair.current

    async def _choose(self, pair: _Pair) -> None:
        """The first that can be proved; without any, those that another session brings back."""
        await self._try_all(pair)
        if pair.current is None and self._ask_for_another_session(pair):
            try:
                async with asyncio.timeout(self._terms.renew_s), self._met:
                    await self._met.wait_for(lambda: pair.forgotten or any(route.met for route in pair.routes))
            except TimeoutError:
                return
            await self._try_all(pair)

    async def _try_all(self, pair: _Pair) -> None:
        for route in to_try(pair.routes, self._clock()):
            if not pair.forgotten and pair.current is None and await self._prove(pair, route):
                self._take(pair, route)

    def _take(self, pair: _Pair, route: Route) -> None:
        """From now on pages come this way."""
        before, pair.current = pair.current, route
        pair.unmet = self._terms.expect.unmet(route.name, route.lanes)
        if before is not route and fell_back(route, pair.routes, pair.unmet):
            self.on_fallback(pair.peer.name, route.name)
            trouble = self._trouble(pair, route)
            log.warning("pages of %s come over %s: %s", pair.peer, route.name, trouble or "no better path works")

    async def _prove(self, pair: _Pair, route: Route) -> bool:
        """Whether it works: its measure is taken then, and it is cut off if not."""
        transport = self._transports[route.name]
        proof = Proof(transport, pair.peer, pair.theirs.pages, self._frames, pair.expected, self._clock)
        async with self._landing:
            if pair.forgotten or not route.met:
                return False
            try:
                async with asyncio.timeout(self._terms.proof_s):
                    measure = await proof.run()
                    route.lanes = await lanes_of(transport, pair.peer)
                self._insist_on_lanes(route)
            except TimeoutError:
                await self._give_up(pair, route, f"no answer within {self._terms.proof_s:.1f} s")
            except HandoffError as error:
                await self._give_up(pair, route, str(error))
            else:
                route.proved(measure, self._clock())
        return route.measure is not None

    def _insist_on_lanes(self, route: Route) -> None:
        unmet = self._terms.expect.unmet(route.name, route.lanes)
        if unmet and self._terms.expect.strict:
            raise PeerLost(unmet)

    # --- a path that fails -------------------------------------------------------------------------------------

    async def _give_up(self, pair: _Pair, route: Route, trouble: str) -> None:
        """On return nothing lands over it any more. Asked by several at once, the first one says why."""
        if route.met and not pair.forgotten:
            log.warning("the path from %s over %s failed: %s", pair.peer, route.name, trouble)
            route.failed(trouble, self._clock())
            if pair.current is route:
                pair.current = None
            forget = self._transports[route.name].forget(pair.peer)
            pair.cutting[route.name] = self._chores.spawn(forget, f"cut {route.name} of {pair.peer}")
        await self._cut_off(pair, route)

    async def _cut_off(self, pair: _Pair, route: Route) -> None:
        if route.name in pair.cutting:
            await asyncio.wait([pair.cutting[route.name]])

    async def _all_cut_off(self, peer: WorkerId) -> None:
        pair = self._pairs.get(peer)
        if pair is not None and pair.cutting:
            await asyncio.wait(pair.cutting.values())

    def _look_after(self, pair: _Pair, current: Route) -> None:
        """Beside the running fetches: try a better path whose pause is over, or measure this one again."""
        now_s = self._clock()
        if pair.checking is not None and not pair.checking.done():
            return
        better = better_than(current, pair.routes, now_s)
        if better is not None and better.met:
            pair.checking = self._chores.spawn(self._try(pair, better), f"better path to {pair.peer}")
        elif better is not None:
            self._ask_for_another_session(pair)
        elif now_s - current.proved_s > self._terms.period_s:
            pair.checking = self._chores.spawn(self._prove(pair, current), f"measure {pair.peer}")

    async def _try(self, pair: _Pair, better: Route) -> None:
        if await self._prove(pair, better):
            self._take(pair, better)
            log.info("pages of %s come over %s again", pair.peer, better.name)

    def _ask_for_another_session(self, pair: _Pair) -> bool:
        """A transport that was cut off has new things to tell. Asked once in a pause; whether it was now."""
        now_s = self._clock()
        lost = [route for route in pair.routes if not route.met and route.is_due(now_s)]
        for route in lost:
            route.retry_s = now_s + route.pause_s
        if not lost or pair.forgotten:
            return False
        self.renew(pair.peer)
        return True

    # --- the end -----------------------------------------------------------------------------------------------

    async def drain(self, peer: WorkerId, stream: int) -> None:
        await asyncio.gather(*(transport.drain(peer, stream) for transport in self._transports.values()))

    async def forget(self, peer: WorkerId) -> None:
        pair = self._pairs.pop(peer, None)
        if pair is not None:
            pair.forgotten = True
            async with self._met:
                self._met.notify_all()
        await asyncio.gather(*(transport.forget(peer) for transport in self._transports.values()))

    async def close(self) -> None:
        for pair in self._pairs.values():
            pair.forgotten = True
        await self._chores.stop()
        self._pairs.clear()
        for transport in self._transports.values():
            await transport.close()

    # --- what can be seen --------------------------------------------------------------------------------------

    async def probe(self, peer: WorkerId) -> None:
        """Prove and measure the path from this peer now. What is wrong with it is in the snapshot.

        A caller that leaves does not take the proof along: what is half done could still land.
        """
        pair = self._pairs.get(peer)
        if pair is not None:
            await asyncio.wait([self._chores.spawn(self._probe(pair), f"probe of {peer}")])

    async def _probe(self, pair: _Pair) -> None:
        if pair.current is not None and await self._prove(pair, pair.current):
            return
        try:
            await self._path(pair)
        except PeerLost as error:
            log.info("%s", error)

    def snapshot(self) -> tuple[PathReport, ...]:
        """One row per peer that was met."""
        return tuple(self._report(pair) for pair in self._pairs.values())

    def _report(self, pair: _Pair) -> PathReport:
        route = pair.current
        if route is None or route.measure is None:
            tried = any(route.trouble for route in pair.routes) or all(route.barrier for route in pair.routes)
            return PathReport(pair.peer, "", "", 0.0, 0.0, 0.0, what_was_tried(pair.routes) if tried else "")
        measure: Measure = route.measure
        return PathReport(
            peer=pair.peer,
            transport=route.name,
            lanes=route.lanes,
            bytes_per_s=measure.bytes_per_s,
            latency_s=measure.latency_s,
            proved_s=self._clock() - route.proved_s,
            trouble=self._trouble(pair, route),
        )

    def _trouble(self, pair: _Pair, route: Route) -> str:
        one_machine = same_machine(self._host, pair.theirs.host)
        return trouble_of(route, pair.routes, pair.unmet, one_machine=one_machine)

def _nobody(peer: WorkerId) -> None:
    """No sessions to renew."""


def _uncounted(peer: str, transport: str) -> None:
    """Nobody counts."""
