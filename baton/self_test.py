"""Whether a worker may call itself ready: a path from a peer of the other role has carried a test page unharmed.

A fleet must be able to start, and one dead peer must not keep others from serving. So a worker is ready as well when
there is no peer, and when none of those that it tried answers. It is not when peers answer and no path works.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from random import Random

from core.messages import PathReport, Peer, Role, WorkerInfo
from core.registry.records import WorkerRecord, WorkerState

MAX_PEERS = 3  # tried one after the other, until a path works

Prove = Callable[[Peer], Awaitable[PathReport | None]]  # None: the peer does not answer


@dataclass(frozen=True, slots=True)
class Verdict:
    """`why` is for people."""

    passed: bool
    why: str


class SelfTest:
    """Of one worker."""

    def __init__(self, me: WorkerInfo, prove: Prove, random: Random) -> None:
        self._me = me
        self._prove = prove
        self._random = random

    async def __call__(self, records: Mapping[str, WorkerRecord]) -> Verdict:
        """With at most MAX_PEERS of those that are announced."""
        peers = self._peers(records)
        troubles = []
        for peer in peers:
            report = await self._prove(peer)
            if report is not None and report.transport:
                return Verdict(True, f"pages of {peer.worker.name} come over {report.transport}")
            if report is not None:
                troubles.append(f"{peer.worker.name}: {report.trouble or 'no path'}")
        if troubles:
            return Verdict(False, "no path works; " + "; ".join(troubles))
        if peers:
            return Verdict(True, f"no peer answers ({', '.join(peer.worker.name for peer in peers)})")
        return Verdict(True, "there is no peer to try a path with")

    def _peers(self, records: Mapping[str, WorkerRecord]) -> list[Peer]:
        """Those that serve come first; among equals whoever, so that many newcomers do not all try the same one."""
        other = {Role.PREFILL: Role.DECODE, Role.DECODE: Role.PREFILL}.get(self._me.role)
        fitting = [
            record
            for record in records.values()
            if record.info.role is other
            and (record.info.identity, record.info.layout) == (self._me.identity, self._me.layout)
            and record.state is not WorkerState.DRAINING
            and record.info.handoff_endpoint
        ]
        self._random.shuffle(fitting)
        fitting.sort(key=lambda record: record.state is not WorkerState.READY)
        return [Peer(record.worker, record.info.handoff_endpoint) for record in fitting[:MAX_PEERS]]
