"""How pages come from worker to worker over the whole cluster: every pair is asked for, and proved on request."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from core.errors import QueueFull, WorkerLost
from core.messages import PathReport, Peer, Role, WorkerInfo
from router.permits import Permits


@dataclass(frozen=True, slots=True)
class PairPath:
    """The path by which one worker fetches from another."""

    source: str
    receiver: str
    transport: str = ""  # empty: there is none, or it was never used
    lanes: str = ""
    bytes_per_s: float = 0.0
    latency_s: float = 0.0
    proved_s: float = 0.0  # how long ago
    trouble: str = ""
    needed: bool = True  # every request on this pair goes this way; else it only saves computing


class PathLink(Protocol):
    async def paths(self, probe: Peer | None, ticket: bytes) -> Sequence[PathReport]:
        """What comes to a worker; proved from one peer, if one is given, with a ticket for that. Raises WorkerLost."""
        ...


Member = tuple[WorkerInfo, PathLink]
WITHOUT_TICKETS = Permits(None)


@dataclass(frozen=True, slots=True)
class PathReply:
    """What a survey found."""

    pairs: tuple[PairPath, ...] = ()
    missing: tuple[str, ...] = ()  # workers that are known by name and do not answer


class PathSurvey:
    """`members`: the workers that are up now. `names`: all that there should be."""

    def __init__(
        self,
        members: Callable[[], Sequence[Member]],
        names: Sequence[str] = (),
        permits: Permits = WITHOUT_TICKETS,
    ) -> None:
        self._members = members
        self._names = names
        self._permits = permits
        self._probing = asyncio.Lock()

    async def known(self) -> PathReply:
        """As the workers last proved them, without disturbing anybody."""
        return await self._ask_all(self._rows)

    async def probed(self) -> PathReply:
        """Each path proved now, one after the other, so that they do not measure each other.

        Raises QueueFull while another caller's probe runs.
        """
        if self._probing.locked():
            raise QueueFull("the paths are being probed already", retry_after_s=1.0)
        async with self._probing:
            return await self._ask_all(self._probe)

    async def _ask_all(self, ask: Callable[[Member, Member], Awaitable[list[PairPath]]]) -> PathReply:
        members = sorted(self._members(), key=lambda member: member[0].worker.name)
        by_role = {role: [member for member in members if member[0].role is role] for role in Role}
        pairs = [(prefill, decode) for prefill in by_role[Role.PREFILL] for decode in by_role[Role.DECODE]]
        rows = [row for prefill, decode in pairs for row in await ask(prefill, decode)]
        there = {info.worker.name for info, _ in members}
        return PathReply(tuple(rows), tuple(name for name in self._names if name not in there))

    async def _probe(self, prefill: Member, decode: Member) -> list[PairPath]:
        """The prefill worker is the one that dials, so it is asked first."""
        back = await self._proved(decode, prefill, needed=False)
        return [await self._proved(prefill, decode, needed=True), back]

    async def _rows(self, prefill: Member, decode: Member) -> list[PairPath]:
        forth = await _asked(prefill, decode, None, b"", needed=True)
        return [forth, await _asked(decode, prefill, None, b"", needed=False)]

    async def _proved(self, source: Member, receiver: Member, *, needed: bool) -> PairPath:
        ticket = self._permits.probe(_peer(source), _peer(receiver))
        return await _asked(source, receiver, _peer(source), ticket, needed=needed)


def _peer(member: Member) -> Peer:
    return Peer(member[0].worker, member[0].handoff_endpoint)


async def _asked(source: Member, receiver: Member, probe: Peer | None, ticket: bytes, *, needed: bool) -> PairPath:
    """What the receiver says of the path from the source."""
    row = PairPath(source[0].worker.name, receiver[0].worker.name, needed=needed)
    try:
        reports = await receiver[1].paths(probe, ticket)
    except WorkerLost as error:
        return replace(row, trouble=error.message)
    report = next((report for report in reports if report.peer == source[0].worker), None)
    if report is None:
        return row
    return replace(
        row,
        transport=report.transport,
        lanes=report.lanes,
        bytes_per_s=report.bytes_per_s,
        latency_s=report.latency_s,
        proved_s=report.proved_s,
        trouble=report.trouble,
    )
