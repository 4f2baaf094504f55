"""A worker's metrics of the paths that its pages come over: one row per present peer, and fall-backs counted."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge

from core.messages import PathReport

MAX_PEERS = 256  # whose fall-backs are counted by name; those of later ones are counted together
OTHERS = "others"
NO_PATH = "none"


class PathMetrics:
    """The series of one worker. A peer's incarnations share its name, and with it their series."""

    def __init__(self, registry: CollectorRegistry, labels: dict[str, str]) -> None:
        names = (*labels, "peer", "transport")
        self._labels = labels
        rate, latency = "Bandwidth from a peer, as last measured", "Time to fetch one page from a peer"
        degraded = "1 while a peer's pages come over another path than the best or the expected one, or over none"
        self._rate = Gauge("baton:path_bytes_per_second", rate, names, registry=registry)
        self._latency_s = Gauge("baton:path_latency_seconds", latency, names, registry=registry)
        self._degraded = Gauge("baton:path_degraded", degraded, names, registry=registry)
        fallbacks = "Times that a path other than the best or the expected one was taken"
        self._fallbacks = Counter("baton:path_fallbacks", fallbacks, names, registry=registry)
        self._peers: set[str] = set()

    def show(self, paths: Sequence[PathReport]) -> None:
        """What there is now; peers that are gone lose their series."""
        self._rate.clear()
        self._latency_s.clear()
        self._degraded.clear()
        for path in paths:
            if path.transport or path.trouble:
                where = {**self._labels, "peer": path.peer.name, "transport": path.transport or NO_PATH}
                self._degraded.labels(**where).set(1.0 if path.trouble else 0.0)
            if path.transport:
                self._rate.labels(**where).set(path.bytes_per_s)
                self._latency_s.labels(**where).set(path.latency_s)

    def fell_back(self, peer: str, transport: str) -> None:
        if peer not in self._peers and len(self._peers) >= MAX_PEERS:
            peer = OTHERS
        else:
            self._peers.add(peer)
        self._fallbacks.labels(**self._labels, peer=peer, transport=transport).inc()
