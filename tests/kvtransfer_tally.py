"""What the two ends of hand-offs count, for tests to look at."""

from collections import Counter, defaultdict

from core.messages import WorkerId
from kvtransfer.messages import HandoffKey
from kvtransfer.states import State


class Tally:
    """kvtransfer.ports.Counters, as one counter. What goes up and comes down again is 0 at the end."""

    def __init__(self) -> None:
        self.seen: Counter[object] = Counter()
        self.lasted_s: dict[State, list[float]] = defaultdict(list)

    def met(self, peer: WorkerId) -> None: ...

    def handoff(self, peer: WorkerId, outcome: State, code: str) -> None:
        self.seen[(outcome, code)] += 1

    def pages(self, count: int) -> None:
        self.seen["pages"] += count

    def moved(self, old: State | None, new: State, lasted_s: float) -> None:
        self.seen[new] += 1
        if old is not None:
            self.seen[old] -= 1
            self.lasted_s[old].append(lasted_s)

    def expired(self, state: State) -> None:
        self.seen[("expired", state)] += 1

    def fault(self, peer: WorkerId, code: str) -> None:
        self.seen[(peer.name, code)] += 1

    def held_back(self, key: HandoffKey) -> None:
        self.seen[("held back", key)] += 1

    def let_go(self, key: HandoffKey) -> None:
        self.seen[("held back", key)] -= 1
        self.seen["let go"] += 1
