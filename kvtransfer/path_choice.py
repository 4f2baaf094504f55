"""Which transport carries the pages of a pair: what is known of each, and the order in which they are tried. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from core.errors import ConfigError
from kvtransfer.host import Host, why_no_shared_device, why_no_shared_memory
from kvtransfer.proof import Measure

OF_ONE_HOST = MappingProxyType({"shm": why_no_shared_memory, "cuda": why_no_shared_device})  # with what bars each
PAUSE_S = (0.5, 30.0)  # first and longest, before a transport that has failed is tried again


@dataclass(frozen=True, slots=True)
class Expectation:
    """What an operator counts on: "shm", or "ucx", or "ucx:rc" for how the name of one of its lanes must begin.

    `strict`: nothing else may be used; else another path is used and complained about.
    """

    transport: str = ""
    lanes: str = ""
    strict: bool = False

    @classmethod
    def parse(cls, text: str, known: Sequence[str], *, strict: bool) -> Expectation:
        """Raises ConfigError for a transport that there is not."""
        transport, _, lanes = text.partition(":")
        if transport and transport not in known:
            raise ConfigError(f"--expect-transport {transport!r} is not one of those in use: {', '.join(known)}")
        return cls(transport, lanes, strict)

    def unmet(self, transport: str, lanes: str) -> str:
        """What is wrong with a path, in words; empty when it is as expected."""
        if self.transport and transport != self.transport:
            return f"expected {self.transport}, got {transport}"
        if not any(lane.startswith(self.lanes) for lane in lanes.split(", ")):
            return f"expected {self.transport} over {self.lanes}, got {lanes or 'lanes that are not known'}"
        return ""


ANY = Expectation()


@dataclass(slots=True)
class Route:
    """One transport as a way to one peer."""

    name: str
    descriptor: bytes = b""
    barrier: str = ""  # why it can never be the way to this peer; empty: it can
    met: bool = False  # False once it has been cut off: the next session exchanges descriptors again
    lanes: str = ""  # what it runs over, as last proved
    measure: Measure | None = None  # None: not proved since it was met
    proved_s: float = 0.0
    trouble: str = ""  # why it failed last
    retry_s: float = float("-inf")  # not before
    pause_s: float = PAUSE_S[0]

    def proved(self, measure: Measure, now_s: float) -> None:
        self.measure, self.proved_s, self.trouble, self.pause_s = measure, now_s, "", PAUSE_S[0]

    def failed(self, trouble: str, now_s: float) -> None:
        """The pause doubles while it keeps failing."""
        self.met, self.measure, self.lanes, self.trouble = False, None, "", trouble
        self.retry_s = now_s + self.pause_s
        self.pause_s = min(2 * self.pause_s, PAUSE_S[1])

    def is_due(self, now_s: float) -> bool:
        """It can be tried now, or could if it were met."""
        return not self.barrier and self.retry_s <= now_s


def routes_to(
    mine: Host, theirs: Host, order: Sequence[str], offered: Mapping[str, bytes], expect: Expectation = ANY
) -> list[Route]:
    """Every transport of ours with what speaks against it; best first, and an expected one before all others."""
    mixed = bool(mine.device) != bool(theirs.device)  # says more than that the peer lacks what could not serve it
    routes = []
    for name in sorted(order, key=lambda name: name != expect.transport):
        barrier = OF_ONE_HOST[name](mine, theirs) if name in OF_ONE_HOST else ""
        if expect.strict and expect.transport and name != expect.transport:
            barrier = f"only {expect.transport} may be used here"
        if name not in offered and not (mixed and barrier):
            barrier = "the peer does not have it"
        routes.append(Route(name, offered.get(name, b""), barrier))
    return routes


def to_try(routes: Sequence[Route], now_s: float) -> list[Route]:
    """Best first."""
    return [route for route in routes if route.met and route.is_due(now_s)]


def better_than(current: Route, routes: Sequence[Route], now_s: float) -> Route | None:
    """The best that failed, or was never tried, and may be tried again; it may have to be met first."""
    ahead = routes[: routes.index(current)]
    return next((route for route in ahead if route.is_due(now_s)), None)


def what_was_tried(routes: Sequence[Route]) -> str:
    """Of a pair that has no path."""
    said = (f"{route.name}: {route.barrier or route.trouble or 'not met'}" for route in routes)
    return "no path; " + "; ".join(said)


def trouble_of(current: Route, routes: Sequence[Route], unmet: str, *, one_machine: bool) -> str:
    """What is wrong with a path that works; empty when nothing is."""
    ahead = routes[: routes.index(current)]
    failed = [f"{route.name} failed: {route.trouble}" for route in ahead if route.trouble]
    barred = [f"{route.name} cannot be used: {route.barrier}" for route in ahead if route.barrier and one_machine]
    return "; ".join([unmet] * bool(unmet) + failed + barred)


def fell_back(current: Route, routes: Sequence[Route], unmet: str) -> bool:
    """It is not what was expected, or a better one could have been used and failed."""
    return bool(unmet) or any(not route.barrier for route in routes[: routes.index(current)])
