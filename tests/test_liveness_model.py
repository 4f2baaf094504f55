"""The lease table as a state machine: two workers, each with its own, over sessions that lose, double, delay and break.

A worker may be stopped and wake, die, and be started again as a stranger. Nobody is given up who was heard in time, and
whoever is gone is given up in time, but never by the first look of one that has itself been stopped.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from core.messages import WorkerId
from kvtransfer.liveness import LeaseTerms, Liveness

TERMS = LeaseTerms()


@dataclass
class Known:
    """Another worker, as this one should see it."""

    heard_s: float  # when it was last heard, or first waited for
    down_s: float | None  # since when there is no session
    was_up: bool

    def is_overdue(self, now_s: float) -> bool:
        if self.down_s is not None:
            return now_s - self.down_s > (TERMS.lost_s if self.was_up else TERMS.connect_s)
        return now_s - self.heard_s > TERMS.life_s


@dataclass
class Side:
    """One worker."""

    me: WorkerId
    table: Liveness = field(default_factory=lambda: Liveness(TERMS))
    peers: dict[WorkerId, Known] = field(default_factory=dict)
    looked_s: float | None = None  # its last tick
    inbox: list[tuple[str, WorkerId]] = field(default_factory=list)  # what came while it was stopped
    stopped: bool = False


class Leases(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.now_s = 100.0
        self.sides = [Side(WorkerId("p", 1)), Side(WorkerId("d", 1))]
        self.up = False
        self.wire: list[tuple[WorkerId, WorkerId]] = []  # renewals under way: from, to
        self.meet()

    def other(self, side: Side) -> Side:
        return self.sides[1 - self.sides.index(side)]

    # --- sessions ----------------------------------------------------------------------------------------------

    @rule()
    def meet(self) -> None:
        """There is a hand-off between them: each expects a session with the other."""
        for side in self.sides:
            other = self.other(side).me
            if not side.stopped:
                assert side.table.meet(other, self.now_s) is (other not in side.peers)
                side.peers.setdefault(other, Known(self.now_s, self.now_s, False))

    @rule()
    def connect(self) -> None:
        if self.up or any(side.stopped for side in self.sides):
            return
        self.up = True
        for side in self.sides:
            other = self.other(side).me
            side.table.up(other, self.now_s)
            side.peers[other] = Known(self.now_s, None, True)

    @precondition(lambda self: self.up)
    @rule()
    def break_session(self) -> None:
        self.up = False
        self.wire.clear()
        for side in self.sides:
            self.tell(side, "down", self.other(side).me)

    def tell(self, side: Side, what: str, peer: WorkerId) -> None:
        if side.stopped:
            side.inbox.append((what, peer))
            return
        known = side.peers.get(peer)
        if what == "down":
            side.table.down(peer, self.now_s)
            if known is not None and known.down_s is None:
                known.down_s = self.now_s
        else:
            side.table.heard(peer, self.now_s)
            if known is not None:
                known.heard_s = self.now_s

    # --- renewals ----------------------------------------------------------------------------------------------

    @precondition(lambda self: self.wire)
    @rule(data=st.data(), again=st.booleans())
    def deliver(self, data: st.DataObject, again: bool) -> None:
        """Any of those under way, perhaps not for the last time."""
        index = data.draw(st.integers(0, len(self.wire) - 1))
        sender, target = self.wire[index]
        if not again:
            del self.wire[index]
        self.arrive(sender, target)

    def arrive(self, sender: WorkerId, target: WorkerId) -> None:
        for side in self.sides:
            if side.me == target:
                self.tell(side, "renew", sender)

    @precondition(lambda self: self.wire)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        del self.wire[data.draw(st.integers(0, len(self.wire) - 1))]

    # --- time --------------------------------------------------------------------------------------------------

    @rule(pauses=st.lists(st.sampled_from([0.25, 0.25, 0.25, 0.9, 1.1, 3.0]), min_size=1, max_size=12))
    def time_passes(self, pauses: list[float]) -> None:
        for pause_s in pauses:
            self.now_s += pause_s
            for side in self.sides:
                if not side.stopped:
                    self.look(side)

    def look(self, side: Side) -> None:
        due = side.table.due(self.now_s)
        assert set(due) <= {peer for peer, known in side.peers.items() if known.down_s is None}
        self.wire += [(side.me, peer) for peer in due if self.up and peer == self.other(side).me]
        late = side.looked_s is not None and self.now_s - side.looked_s > TERMS.late_s
        side.looked_s = self.now_s
        assert side.table.tick_is_late(self.now_s) is late
        if late:
            return
        lost = side.table.lost(self.now_s)
        assert set(lost) == {peer for peer, known in side.peers.items() if known.is_overdue(self.now_s)}
        for peer in lost:
            side.table.forget(peer)
            del side.peers[peer]
            if self.up and peer == self.other(side).me:
                self.break_session()

    # --- stops, deaths -----------------------------------------------------------------------------------------

    @rule(index=st.integers(0, 1))
    def stop(self, index: int) -> None:
        self.sides[index].stopped = True

    @rule(index=st.integers(0, 1), looks_first=st.booleans())
    def wake(self, index: int, looks_first: bool) -> None:
        """Its clock may tick before it has read what came: then nobody is given up."""
        side = self.sides[index]
        if not side.stopped:
            return
        side.stopped = False
        if looks_first:
            self.look(side)
        inbox, side.inbox = side.inbox, []
        for what, peer in inbox:
            self.tell(side, what, peer)

    @rule(index=st.integers(0, 1))
    def die_and_start_again(self, index: int) -> None:
        """The other one sees its session break; the new one is a stranger to it."""
        if self.up:
            self.break_session()
        old = self.sides[index].me
        self.sides[index] = Side(WorkerId(old.name, old.incarnation + 1))

    def teardown(self) -> None:
        """All is well from now on: whoever is gone is given up within the longest patience, and the others stay."""
        if not hasattr(self, "sides"):
            return
        for index in (0, 1):
            self.wake(index, looks_first=False)
        if self.up:
            for side in self.sides:
                self.tell(side, "renew", self.other(side).me)
        stays = self.up
        for _ in range(int((TERMS.life_s + TERMS.connect_s) / TERMS.tick_s) + 8):
            self.time_passes([TERMS.tick_s])
            while self.wire:
                self.arrive(*self.wire.pop())
        assert self.up is stays, "they were heard all the time"
        for side in self.sides:
            assert set(side.peers) == ({self.other(side).me} if stays else set()), (side, stays)


TestLeases = Leases.TestCase
TestLeases.settings = settings(
    max_examples=150, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
