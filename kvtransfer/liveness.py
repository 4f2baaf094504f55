"""When does a peer count as lost? Its leases and grants live as long as it is heard, and end soon after its session.

A worker that was itself stopped (a debugger, SIGSTOP, an overloaded host) finds on waking that everything is overdue,
while the renewals lie unread in its sockets. So a tick that comes late expires nothing: the next one does, after the
inbox has been drained.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from core.messages import WorkerId
from kvtransfer.states import Deadlines


@dataclass(frozen=True, slots=True)
class LeaseTerms:
    """Seconds. Both ends should have the same ones, though nothing wrong happens when they do not."""

    life_s: float = 10.0  # a peer that is not heard for this long is lost
    renew_s: float = 2.0  # how often each end says Renew
    lost_s: float = 2.0  # time to resume a broken session
    connect_s: float = 5.0  # time for the first session with a peer
    tick_s: float = 0.25  # how often the ends look at their clocks
    late_s: float = 1.0  # a tick later than this expires nothing


@dataclass(frozen=True, slots=True)
class Timing:
    """Every pause and deadline of the hand-off."""

    lease: LeaseTerms = field(default_factory=LeaseTerms)
    deadlines: Deadlines = field(default_factory=Deadlines)


@dataclass(slots=True)
class _Peer:
    heard_s: float
    down_since_s: float | None  # None: the session is up
    ever_up: bool = False


class Liveness:
    """The peers of one end, and when each was last heard."""

    def __init__(self, terms: LeaseTerms) -> None:
        self.terms = terms
        self._peers: dict[WorkerId, _Peer] = {}
        self._ticked_s: float | None = None
        self._renewed_s: float | None = None

    def meet(self, worker: WorkerId, now_s: float) -> bool:
        """Begin to expect a session with this worker. False: we know it already."""
        if worker in self._peers:
            return False
        self._peers[worker] = _Peer(heard_s=now_s, down_since_s=now_s)
        return True

    def up(self, worker: WorkerId, now_s: float) -> None:
        peer = self._peers.setdefault(worker, _Peer(now_s, None))
        peer.heard_s, peer.down_since_s, peer.ever_up = now_s, None, True

    def down(self, worker: WorkerId, now_s: float) -> None:
        peer = self._peers.get(worker)
        if peer is not None and peer.down_since_s is None:
            peer.down_since_s = now_s

    def heard(self, worker: WorkerId, now_s: float) -> None:
        peer = self._peers.get(worker)
        if peer is not None:
            peer.heard_s = now_s

    def forget(self, worker: WorkerId) -> None:
        self._peers.pop(worker, None)

    def is_up(self, worker: WorkerId) -> bool:
        peer = self._peers.get(worker)
        return peer is not None and peer.down_since_s is None

    def was_up(self, worker: WorkerId) -> bool:
        """There has been a session with it."""
        peer = self._peers.get(worker)
        return peer is not None and peer.ever_up

    def due(self, now_s: float) -> list[WorkerId]:
        """The peers to whom Renew is to be said now. Asking says that it will be said."""
        if self._renewed_s is not None and now_s - self._renewed_s < self.terms.renew_s:
            return []
        self._renewed_s = now_s
        return [worker for worker, peer in self._peers.items() if peer.down_since_s is None]

    def tick_is_late(self, now_s: float) -> bool:
        """Whether this tick must not expire anything."""
        last_s, self._ticked_s = self._ticked_s, now_s
        return last_s is not None and now_s - last_s > self.terms.late_s

    def lost(self, now_s: float) -> list[WorkerId]:
        """Those whose time is over."""
        return [worker for worker, peer in self._peers.items() if self._is_lost(peer, now_s)]

    def _is_lost(self, peer: _Peer, now_s: float) -> bool:
        if peer.down_since_s is not None:
            patience_s = self.terms.lost_s if peer.ever_up else self.terms.connect_s
            return now_s - peer.down_since_s > patience_s
        return now_s - peer.heard_s > self.terms.life_s
