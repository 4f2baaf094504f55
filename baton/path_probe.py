"""What a worker does when it is asked for its paths: reaches the peer in question, proves the path from it, reports."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from core.messages import PathReport, Peer
from core.security.gate import Gate
from kvtransfer.paths import Paths

REACH_S = 5.0


class PathProbe:
    """A session.server.PathsOf. `dial` opens the session with a peer; None for a worker that is only dialled."""

    def __init__(self, paths: Paths, gate: Gate, dial: Callable[[Peer], None] | None) -> None:
        self._paths = paths
        self._gate = gate
        self._dial = dial
        self._turn = asyncio.Lock()  # two probes at once would measure each other

    async def __call__(self, probe: Peer | None, ticket: bytes) -> Sequence[PathReport]:
        """Raises BadTicket: whom we dial gets to know how our pages are read."""
        if probe is None:
            return self._paths.snapshot()
        self._gate.probe(probe, ticket)
        if not await self._probe(probe):
            return (*self._paths.snapshot(), _unreached(probe))
        return self._paths.snapshot()

    async def prove(self, peer: Peer) -> PathReport | None:
        """By our own wish, so without a ticket: the path from a peer that the registry names. None: it is not there."""
        if not await self._probe(peer):
            return None
        return next((report for report in self._paths.snapshot() if report.peer == peer.worker), None)

    async def _probe(self, peer: Peer) -> bool:
        """Whether it could be reached; what is wrong with the path is in the snapshot."""
        async with self._turn:
            if not await self._reach(peer):
                return False
            await self._paths.probe(peer.worker)
        return True

    async def _reach(self, peer: Peer) -> bool:
        """Whether there is a session, in time."""
        if not self._paths.knows(peer.worker) and self._dial is not None and peer.endpoint:
            self._dial(peer)
        try:
            async with asyncio.timeout(REACH_S):
                await self._paths.until_met(peer.worker)
        except TimeoutError:
            return False
        return True


def _unreached(peer: Peer) -> PathReport:
    where = f" at {peer.endpoint}" if peer.endpoint else ""
    trouble = f"no session with {peer.worker.name}{where} within {REACH_S:.0f} s; the log of either worker says why"
    return PathReport(peer.worker, "", "", 0.0, 0.0, 0.0, trouble)
