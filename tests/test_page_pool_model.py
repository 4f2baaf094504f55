"""The page pool as a state machine: whatever is done to it in whatever order, every page has one state, and no content
changes under a name.

Transfers end late, leases are dropped out of order, sequences come and go; a worker that dies takes its pool along, and
its next incarnation starts with an empty one over the same memory, whose epochs go on.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.pool import STATES, PagePool

PAGES = 9


@dataclass
class Page:
    """What holds it, as those who hold it know."""

    owners: int = 0
    leases: int = 0
    operations: int = 0
    name: bytes | None = None

    @property
    def held(self) -> bool:
        return bool(self.owners or self.leases or self.operations)

    @property
    def state(self) -> str:
        if self.owners:
            return "owned"
        if self.leases:
            return "leased"
        if self.name is not None:
            return "cached"
        return "quarantined" if self.operations else "free"


class Pool(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.epochs = [0] * PAGES
        self.contents: dict[tuple[int, int], int] = {}  # (page, epoch) -> which content; never two
        self.written = 0
        self.restart()

    def restart(self) -> None:
        self.pool = PagePool(PAGES, epochs=self.epochs)
        self.model = {page: Page() for page in range(1, PAGES)}
        self.known: set[bytes] = set()  # block hashes, as one who hears of changes has them

    def pages(self, **held: bool) -> list[int]:
        return [p for p, page in self.model.items() if all(bool(getattr(page, k)) == v for k, v in held.items())]

    # --- ownership ---------------------------------------------------------------------------------------------

    @rule(count=st.integers(0, PAGES))
    def allocate(self, count: int) -> None:
        reusable = [p for p, page in self.model.items() if not page.held]
        assert self.pool.reusable == len(reusable)
        taken = self.pool.allocate(count)
        if count > len(reusable):
            assert taken is None
            return
        assert taken is not None and len(set(taken)) == count
        for page in taken:
            assert not self.model[page].held, f"page {page} was given out while it was held: {self.model[page]}"
            self.model[page] = Page(owners=1)
            self.written += 1
            assert self.contents.setdefault((page, self.pool.epoch(page)), self.written) == self.written
        for page in reusable:
            if self.pool.state(page) == "free" and page not in taken:
                self.model[page].name = None  # evicted to make room

    @precondition(lambda self: any(page.name for page in self.model.values()))
    @rule(data=st.data())
    def find_a_prefix(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(page.name for page in self.model.values() if page.name)))
        (page,) = self.pool.lookup([name, b"unknown"])
        assert self.model[page].name == name
        self.pool.acquire([page])
        self.model[page].owners += 1

    @precondition(lambda self: self.pages(owners=True))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(self.pages(owners=True)))
        self.pool.release(page)
        self.model[page].owners -= 1

    @precondition(lambda self: self.pages(owners=True))
    @rule(data=st.data(), name=st.integers(0, 5))
    def register(self, data: st.DataObject, name: int) -> None:
        page, value = data.draw(st.sampled_from(self.pages(owners=True))), b"%d" % name
        taken = self.model[page].name is not None or any(p.name == value for p in self.model.values())
        assert self.pool.register(page, value) is not taken
        if not taken:
            self.model[page].name = value

    # --- peers and transfers -----------------------------------------------------------------------------------

    @precondition(lambda self: self.pages(owners=True) + self.pages(leases=True))
    @rule(data=st.data())
    def lease(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(self.pages(owners=True) + self.pages(leases=True)))
        self.pool.lease(page)
        self.model[page].leases += 1

    @precondition(lambda self: self.pages(leases=True))
    @rule(data=st.data())
    def unlease(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(self.pages(leases=True)))
        self.pool.unlease(page)
        self.model[page].leases -= 1

    @precondition(lambda self: self.pages(owners=True))
    @rule(data=st.data())
    def a_transfer_is_posted(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(self.pages(owners=True)))
        self.pool.quarantine(page)
        self.model[page].operations += 1

    @precondition(lambda self: self.pages(operations=True))
    @rule(data=st.data())
    def a_transfer_is_over(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(self.pages(operations=True)))
        self.pool.settle(page)
        self.model[page].operations -= 1

    @rule()
    def somebody_hears_of_changes(self) -> None:
        stored, removed = self.pool.take_changes()
        self.known = (self.known | set(stored)) - (set(removed) - self.now_known())
        assert self.known == self.now_known() == set(self.pool.known_hashes())

    def now_known(self) -> set[bytes]:
        return {page.name for page in self.model.values() if page.name is not None}

    @rule()
    def the_worker_dies_and_another_comes(self) -> None:
        """What peers have of it names (incarnation, page, epoch)."""
        self.contents.clear()
        self.restart()

    # --- what holds --------------------------------------------------------------------------------------------

    @invariant()
    def every_page_is_in_the_state_of_its_strongest_holder(self) -> None:
        if not hasattr(self, "model"):
            return
        self.pool.check()
        states = {p: page.state for p, page in self.model.items()}
        assert {p: self.pool.state(p) for p in states} == states
        counts = self.pool.counts()
        assert counts == {state: list(states.values()).count(state) for state in STATES}
        assert sum(counts.values()) == self.pool.capacity

    @invariant()
    def content_that_is_held_keeps_its_name(self) -> None:
        if hasattr(self, "model"):
            kept = [p for p, page in self.model.items() if page.held or page.name is not None]
            assert all((p, self.pool.epoch(p)) in self.contents for p in kept)


TestPool = Pool.TestCase
TestPool.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
