"""How pages come from worker to worker over the whole cluster: every pair is asked for, and proved on request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
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
        names: Callable[[], Sequence[str]] = tuple,
        permits: Permits = WITHOUT_TICKETS,
    ) -> None:
        self._members = members
        self._names = names
        self._permits = permits
        self._probing = asyncio.Lock()

    async def known(self) -> PathReply:
        """As the workers last proved them: each is asked once, and nothing is moved."""
        members = self._there()
        told = dict(zip(members, await asyncio.gather(*(_told(link, None, b"") for _, link in members)), strict=True))
        rows = [
            _row(source, receiver, told[receiver], needed=needed)
            for prefill, decode in _pairs(members)
            for source, receiver, needed in ((prefill, decode, True), (decode, prefill, False))
        ]
        return self._reply(members, rows)

    async def probed(self) -> PathReply:
        """Each path proved now, one after the other, so that they do not measure each other.

        Raises QueueFull while another caller's probe runs.
        """
        if self._probing.locked():
            raise QueueFull("the paths are being probed already", retry_after_s=1.0)
        async with self._probing:
            members = self._there()
            rows = [row for prefill, decode in _pairs(members) for row in await self._probe(prefill, decode)]
            return self._reply(members, rows)

    async def _probe(self, prefill: Member, decode: Member) -> list[PairPath]:
        """The prefill worker is the one that dials, so it is asked first."""
        back = await self._proved(decode, prefill, needed=False)
        return [await self._proved(prefill, decode, needed=True), back]

    async def _proved(self, source: Member, receiver: Member, *, needed: bool) -> PairPath:
        ticket = self._permits.probe(_peer(source), _peer(receiver))
        return _row(source, receiver, await _told(receiver[1], _peer(source), ticket), needed=needed)

    def _there(self) -> list[Member]:
        return sorted(self._members(), key=lambda member: member[0].worker.name)

    def _reply(self, members: Sequence[Member], rows: Sequence[PairPath]) -> PathReply:
        there = {info.worker.name for info, _ in members}
        return PathReply(tuple(rows), tuple(name for name in self._names() if name not in there))


def _pairs(members: Sequence[Member]) -> list[tuple[Member, Member]]:
    by_role = {role: [member for member in members if member[0].role is role] for role in Role}
    return [(prefill, decode) for prefill in by_role[Role.PREFILL] for decode in by_role[Role.DECODE]]


def _peer(member: Member) -> Peer:
    return Peer(member[0].worker, member[0].handoff_endpoint)


async def _told(link: PathLink, probe: Peer | None, ticket: bytes) -> Sequence[PathReport] | str:
    """What a worker says of the paths to it, or why it says nothing."""
    try:
        return await link.paths(probe, ticket)
    except WorkerLost as error:
        return error.message


def _row(source: Member, receiver: Member, told: Sequence[PathReport] | str, *, needed: bool) -> PairPath:
    """What the receiver has said of the path from the source."""
    row = PairPath(source[0].worker.name, receiver[0].worker.name, needed=needed)
    if isinstance(told, str):
        return replace(row, trouble=told)
    report = next((report for report in told if report.peer == source[0].worker), None)
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
