"""A worker's hand-offs by the peer that they came from: which pair fails, when others do not.

Only the end that takes in counts them, so each hand-off is counted once. All series of a pair are there from the time
that it is met: a counter that began with its first failure would hide that one from every rate.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter

from core.errors import Cancelled, HandoffError, NoCapacity, QueueFull, WorkerDraining, leaves

MAX_PEERS = 256  # that are told apart; later ones are counted together
OTHERS = "others"
TAKING_ENDS = ("receiver", "borrower")
OUTCOMES = ("committed", "cancelled", "failed")
_NOBODYS_FAULT = frozenset({error.code for error in (Cancelled, NoCapacity, QueueFull, WorkerDraining)})


class PairMetrics:
    """The series of one worker. A peer's incarnations share its name, and with it their series."""

    def __init__(self, registry: CollectorRegistry, labels: dict[str, str]) -> None:
        ends, faults = (*labels, "end", "peer", "outcome"), (*labels, "peer", "code")
        self._labels = labels
        self._ended = Counter("baton:pair_handoffs", "Hand-offs taken in, by peer", ends, registry=registry)
        self._faults = Counter("baton:handoff_faults", "Fetches that failed or went wrong", faults, registry=registry)
        self._peers: set[str] = set()

    def met(self, end: str, peer: str) -> None:
        """A hand-off from this peer begins."""
        peer = self._told_apart(peer)
        for outcome in OUTCOMES:
            self._ended.labels(**self._labels, end=end, peer=peer, outcome=outcome)
        for code in leaves(HandoffError):  # every error that a fetch may end with
            self._faults.labels(**self._labels, peer=peer, code=code)

    def ended(self, end: str, peer: str, code: str) -> None:
        """`code` is that of the error; empty: the hand-off was committed."""
        outcome = "committed" if not code else "cancelled" if code in _NOBODYS_FAULT else "failed"
        self._ended.labels(**self._labels, end=end, peer=self._told_apart(peer), outcome=outcome).inc()

    def fault(self, peer: str, code: str) -> None:
        self._faults.labels(**self._labels, peer=self._told_apart(peer), code=code).inc()

    def _told_apart(self, peer: str) -> str:
        if peer not in self._peers and len(self._peers) >= MAX_PEERS:
            return OTHERS
        self._peers.add(peer)
        return peer
