"""Both ends of the protocol as a state machine: any order of messages, losses, crashes and late bytes.

Time, messages, fetches and the bytes in the pools are plain values here. What must hold whatever happens: committed
pages hold what the prompt says, and go on holding it; every hand-off ends once at each end; a page that something may
still write into is given to nobody; and when all is quiet again, nothing is held.
"""

import sys
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, Verbosity, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from core.errors import BatonError, EngineError, OutOfBounds, PeerLost, StalePage
from core.messages import Peer, Receipt, Token, WorkerId
from engine.pool import PagePool
from kvtransfer import events as e
from kvtransfer.intake import Guards
from kvtransfer.liveness import Timing
from kvtransfer.messages import HandoffKey, PageEntry
from kvtransfer.places import FilledPage, Places
from kvtransfer.ports import NoCounters, Reservation
from kvtransfer.receiver import ReceiverEnd
from kvtransfer.source import SourceEnd
from kvtransfer.states import State
from kvtransfer.transport import Piece

PAGE = 16
POOL = 12
RUBBISH = b"rubbish"


def digest(content: bytes) -> bytes:
    return content.ljust(8, b"\0")[:8] + len(content).to_bytes(8, "little")


@dataclass
class Job:
    """One request at P, after its grant."""

    key: HandoffKey
    prefix: int
    pages: list[int]
    filled: int = 0
    sealed: bool = False


@dataclass
class Source:
    """A prefill worker of one incarnation."""

    me: WorkerId
    end: SourceEnd
    pool: PagePool
    content: dict[int, bytes] = field(default_factory=dict)
    jobs: dict[HandoffKey, Job] = field(default_factory=dict)
    closed: dict[HandoffKey, State] = field(default_factory=dict)
    offered: set[HandoffKey] = field(default_factory=set)
    granted: set[HandoffKey] = field(default_factory=set)
    drains: list[e.Drain] = field(default_factory=list)
    forgets: list[WorkerId] = field(default_factory=list)
    timers: list[e.AskAgain] = field(default_factory=list)


class Sink:
    """A decode worker of one incarnation."""

    def __init__(self, me: WorkerId, names: dict[str, tuple[bytes, ...]], guards: Guards) -> None:
        self.me = me
        self.names = names
        self.pool = PagePool(POOL)
        self.content: dict[int, bytes] = {}
        self.committed: dict[HandoffKey, tuple[int, ...]] = {}
        self.expected: set[HandoffKey] = set()
        self.ended: dict[HandoffKey, State] = {}
        self.running: dict[int, e.StartFetch] = {}
        self.cancelled: set[int] = set()
        self.cut: set[int] = set()  # running, and the source sends nothing more: can only fail
        self.ghosts: list[e.StartFetch] = []
        self.forgets: list[WorkerId] = []
        self.end = ReceiverEnd(
            pages=self.pool, reservations=self, counters=NoCounters(), timing=Timing(), page_bytes=64, guards=guards
        )

    def haunted(self) -> set[int]:
        """Pages that something may still write into."""
        operations = [*self.ghosts, *self.running.values()]
        return {piece.target_page for operation in operations for piece in operation.pieces}

    def allocate(self, count: int) -> list[int] | None:
        before = self.haunted()
        pages = self.pool.allocate(count)
        assert not before & set(pages or ()), "a page was given out that a late byte may still hit"
        for page in pages or ():
            self.content[page] = b"unwritten"
        return pages

    def reserve(self, key: HandoffKey, pages: int) -> Reservation | None:
        names = self.names[key.request_id]
        full = [name for name in names if not name.endswith(b"tail")]
        prefix = self.pool.lookup(full)
        self.pool.acquire(prefix)
        fresh = self.allocate(len(names) - len(prefix))
        if fresh is None:
            self.pool.release_all(prefix)
            return None
        return Reservation(tuple(prefix), tuple(fresh))

    def fresh_page(self, key: HandoffKey) -> int | None:
        pages = self.allocate(1)
        return pages[0] if pages else None

    def check(self, key: HandoffKey) -> None:
        found = [self.content[page] for page in self.committed[key]]
        assert found == list(self.names[key.request_id]), f"{key} was served {found}"


class Handoffs(RuleBasedStateMachine):
    guards = Guards()

    @initialize()
    def begin(self) -> None:
        self.now_s = 0.0
        self.names: dict[str, tuple[bytes, ...]] = {}
        self.attempts: dict[str, int] = {}
        self.wires: list[tuple[WorkerId, WorkerId, Any]] = []  # from, to, message
        self.up = False
        self.faults = 0
        self.source = self.new_source(1)
        self.sink = Sink(WorkerId("d", 1), self.names, self.guards)

    def new_source(self, incarnation: int) -> Source:
        pool = PagePool(POOL)
        end = SourceEnd(
            pages=pool,
            pool_pages=POOL,
            page_size=PAGE,
            random=Random(incarnation),
            counters=NoCounters(),
            timing=Timing(),
            pages_per_ready=2,
        )
        return Source(WorkerId("p", incarnation), end, pool)

    # --- doing what the ends ask for ---------------------------------------------------------------------------

    def at_source(self, event: e.SourceEvent) -> None:
        source = self.source
        for effect in source.end.handle(event, self.now_s):
            match effect:
                case e.Send(peer, message):
                    if self.up:
                        self.wires.append((source.me, peer, message))
                case e.Digest():
                    entries = tuple(
                        PageEntry(entry.position, entry.block_hash, entry.page, entry.epoch, digest(self.read(entry)))
                        for entry in effect.entries
                    )
                    self.at_source(e.Digested(effect.key, entries, effect.seal))
                case e.Drain():
                    source.drains.append(effect)
                case e.Forget(peer):
                    source.forgets.append(peer)
                case e.Later(_, event_later):
                    source.timers.append(event_later)
                case e.Granted(grant):
                    self.start(grant.key, grant.prefix_pages)
                case e.Closed(key, outcome, _):
                    assert key not in source.closed, f"{key} was closed twice"
                    source.closed[key] = outcome
                    self.release(key)
                case e.HangUp():
                    self.hang_up()

    def read(self, entry: PageEntry) -> bytes:
        return self.source.content[entry.page]

    def start(self, key: HandoffKey, prefix: int) -> None:
        assert key not in self.source.granted, f"{key} was granted twice"
        self.source.granted.add(key)
        pages = self.source.pool.allocate(len(self.names[key.request_id]))
        if pages is None:
            self.at_source(e.GiveUp(key, EngineError("no room at the source")))
        else:
            self.source.jobs[key] = Job(key, prefix, pages)

    def release(self, key: HandoffKey) -> None:
        job = self.source.jobs.pop(key, None)
        if job is not None:
            self.source.pool.release_all(job.pages)

    def at_sink(self, event: e.ReceiverEvent) -> None:
        sink = self.sink
        for effect in sink.end.handle(event, self.now_s):
            match effect:
                case e.Send(peer, message):
                    if self.up:
                        self.wires.append((sink.me, peer, message))
                case e.StartFetch():
                    sink.running[effect.operation] = effect
                    if effect.peer != self.source.me:
                        sink.cut.add(effect.operation)
                case e.CancelFetch(operation):
                    sink.cancelled.add(operation)
                case e.Forget(peer):
                    sink.forgets.append(peer)
                case e.Committed(key, pages, _, _, _):
                    self.ended(key, State.COMMITTED)
                    sink.committed[key] = pages
                    sink.check(key)
                case e.Aborted(key, _, _):
                    self.ended(key, State.ABORTED)
                case e.HangUp():
                    self.hang_up()

    def ended(self, key: HandoffKey, outcome: State) -> None:
        assert key not in self.sink.ended, f"{key} ended twice"
        self.sink.ended[key] = outcome

    def hang_up(self) -> None:
        if self.up:
            self.up = False
            self.wires.clear()
            self.at_source(e.SessionDown(self.sink.me))
            self.at_sink(e.SessionDown(self.source.me))

    # --- requests ----------------------------------------------------------------------------------------------

    @rule(pages=st.integers(0, 4), tail=st.booleans(), family=st.integers(0, 1))
    def submit(self, pages: int, tail: bool, family: int) -> None:
        """A new request; those of one family share their prefix."""
        request_id = f"r{len(self.names)}"
        names = [b"%d.%d" % (family, n) for n in range(pages)]
        if tail or not pages:
            names.append(b"%s.tail" % request_id.encode())
        self.names[request_id] = tuple(names)
        self.expect(HandoffKey(request_id, 1))

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def try_again(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.names)))
        self.expect(HandoffKey(request_id, self.attempts[request_id] + 1))

    def expect(self, key: HandoffKey) -> None:
        self.attempts[key.request_id] = key.attempt
        names = self.names[key.request_id]
        hashes = tuple(name for name in names if not name.endswith(b"tail"))
        tail = names[-1] if len(hashes) < len(names) else b""
        places = Places(len(hashes) * PAGE + (5 if tail else 0), PAGE, hashes, tail)
        self.sink.expected.add(key)
        self.at_sink(e.Expect(key, self.source.me, places, 60.0))

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def offer(self, data: st.DataObject) -> None:
        self.make_offer(data.draw(st.sampled_from(sorted(self.names))))

    def make_offer(self, request_id: str) -> None:
        key = HandoffKey(request_id, self.attempts[request_id])
        if key in self.source.offered:
            return
        self.source.offered.add(key)
        names = self.names[request_id]
        tokens = sum(5 if name.endswith(b"tail") else PAGE for name in names)
        self.at_source(e.Offer(key, Peer(self.sink.me, "d"), tokens, 1, 60.0))
        self.connect()

    @precondition(lambda self: self.source.jobs)
    @rule(data=st.data(), count=st.integers(1, 3))
    def compute(self, data: st.DataObject, count: int) -> None:
        key = data.draw(st.sampled_from(sorted(self.source.jobs)))
        self.work(self.source.jobs[key], count)

    def work(self, job: Job, count: int) -> None:
        names = self.names[job.key.request_id]
        chunk = []
        while count and job.filled < len(names) and not names[job.filled].endswith(b"tail"):
            chunk.append(self.fill(job, names[job.filled]))
            count -= 1
        if chunk:
            self.at_source(e.Filled(job.key, tuple(chunk)))
        elif job.key in self.source.jobs:
            tail = self.fill(job, names[-1]) if job.filled < len(names) else None
            tokens = (Token(0, 0, 1),)
            self.at_source(e.Seal(job.key, tail, tokens, Receipt()))
            self.release(job.key)

    def fill(self, job: Job, name: bytes) -> FilledPage:
        page = job.pages[job.filled]
        self.source.content[page] = name
        job.filled += 1
        return FilledPage(job.filled - 1, name, page)

    @precondition(lambda self: self.source.jobs)
    @rule()
    def the_engine_mixes_prompts_up(self) -> None:
        """It writes, and names, a page of another prompt."""
        job = next(iter(self.source.jobs.values()))
        names = self.names[job.key.request_id]
        if job.prefix <= job.filled < len(names) and not names[job.filled].endswith(b"tail"):
            self.at_source(e.Filled(job.key, (self.fill(job, b"another prompt's"),)))

    @precondition(lambda self: self.source.offered and self.faults < 6)
    @rule(data=st.data())
    def cancel_at_source(self, data: st.DataObject) -> None:
        self.faults += 1
        key = data.draw(st.sampled_from(sorted(self.source.offered)))
        self.at_source(e.GiveUp(key, EngineError("a step failed")))

    @precondition(lambda self: self.names and self.faults < 6)
    @rule(data=st.data())
    def cancel_at_sink(self, data: st.DataObject) -> None:
        self.faults += 1
        request_id = data.draw(st.sampled_from(sorted(self.names)))
        self.at_sink(e.Cancel(HandoffKey(request_id, self.attempts[request_id]), BatonError("cancelled")))

    @precondition(lambda self: self.sink.committed)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.sink.committed)))
        self.sink.check(key)
        self.sink.pool.release_all(self.sink.committed.pop(key))

    # --- things as they should go, so that faults find something to disturb ------------------------------------

    @rule(choices=st.lists(st.integers(0, 4), min_size=4, max_size=24))
    def proceed(self, choices: list[int]) -> None:
        self.connect()
        for choice in choices:
            if choice <= 1 and self.wires:
                self.arrive(*self.wires.pop(0))
            elif choice == 2 and self.source.jobs:
                self.work(next(iter(self.source.jobs.values())), 2)
            elif choice == 3 and self.sink.running:
                self.end_fetch(min(self.sink.running))
            elif choice == 4 and self.source.drains:
                self.drain()

    @rule(choices=st.lists(st.integers(0, 4), min_size=4, max_size=24))
    def proceed_again(self, choices: list[int]) -> None:
        self.proceed(choices)

    @rule(pages=st.integers(1, 4), family=st.integers(0, 1), choices=st.lists(st.integers(0, 4), max_size=24))
    def a_new_request_proceeds(self, pages: int, family: int, choices: list[int]) -> None:
        self.submit(pages, True, family)
        self.make_offer(f"r{len(self.names) - 1}")
        self.proceed(choices)

    # --- messages ------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.wires)
    @rule(data=st.data(), keep=st.sampled_from([False, False, False, True]))
    def deliver(self, data: st.DataObject, keep: bool) -> None:
        """Any of those under way: overtaking is free; `keep`: it comes again."""
        index = data.draw(st.integers(0, min(len(self.wires) - 1, 5)))
        sender, target, message = self.wires[index]
        if not keep:
            del self.wires[index]
        self.arrive(sender, target, message)

    def arrive(self, sender: WorkerId, target: WorkerId, message: Any) -> None:
        if target == self.sink.me and sender == self.source.me:
            self.at_sink(e.FromSource(sender, message))
        elif target == self.source.me and sender == self.sink.me:
            self.at_source(e.FromReceiver(sender, message))

    @precondition(lambda self: self.wires)
    @rule()
    def deliver_a_few(self) -> None:
        for _ in range(min(4, len(self.wires))):
            if self.wires:
                self.arrive(*self.wires.pop(0))

    @precondition(lambda self: self.wires)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        del self.wires[data.draw(st.integers(0, len(self.wires) - 1))]

    @rule()
    def break_session(self) -> None:
        self.hang_up()

    @rule()
    def connect(self) -> None:
        if not self.up:
            self.up = True
            self.at_sink(e.SessionUp(self.source.me))
            self.at_source(e.SessionUp(self.sink.me))

    # --- bytes ---------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.sink.running)
    @rule(data=st.data(), flaw=st.sampled_from(["", "", "", "flipped", "another page"]))
    def fetch_ends(self, data: st.DataObject, flaw: str) -> None:
        self.end_fetch(data.draw(st.sampled_from(sorted(self.sink.running))), flaw)

    def end_fetch(self, number: int, flaw: str = "") -> None:
        if number in self.sink.cut or number in self.sink.cancelled:
            self.fail_fetch(number)
        else:
            self.finish_fetch(number, flaw)

    def finish_fetch(self, number: int, flaw: str = "") -> None:
        operation = self.sink.running.pop(number)
        arrivals = tuple(self.carry(piece, flaw) for piece in operation.pieces)
        self.at_sink(e.FetchEnded(number, arrivals, None, settled=True))

    def carry(self, piece: Piece, flaw: str) -> Any:
        if not 0 <= piece.source_page < POOL:
            return OutOfBounds("no such page")
        if self.source.pool.epoch(piece.source_page) != piece.epoch:
            return StalePage("given up")
        content = self.source.content[piece.source_page]
        if flaw == "flipped":
            content = RUBBISH
        elif flaw == "another page":
            content = next(iter(self.source.content.values()))
        self.sink.content[piece.target_page] = content
        return digest(content)

    @precondition(lambda self: self.sink.running)
    @rule(data=st.data())
    def fetch_fails(self, data: st.DataObject) -> None:
        self.fail_fetch(data.draw(st.sampled_from(sorted(self.sink.running))))

    def fail_fetch(self, number: int) -> None:
        operation = self.sink.running.pop(number)
        if number not in self.sink.cut:
            self.sink.ghosts.append(operation)
        self.at_sink(e.FetchEnded(number, (), PeerLost("lost"), settled=False))

    @precondition(lambda self: self.sink.ghosts)
    @rule(data=st.data())
    def late_bytes(self, data: st.DataObject) -> None:
        operation = data.draw(st.sampled_from(self.sink.ghosts))
        piece = data.draw(st.sampled_from(operation.pieces))
        self.sink.content[piece.target_page] = RUBBISH

    @precondition(lambda self: self.source.drains)
    @rule()
    def drain(self) -> None:
        asked = self.source.drains.pop(0)
        if asked.peer == self.sink.me:
            me, stream = self.source.me, asked.stream
            self.cut_off(lambda operation: (operation.peer, operation.stream) == (me, stream))
        self.at_source(e.DrainDone(asked))

    def cut_off(self, which: Any) -> None:
        self.sink.ghosts = [ghost for ghost in self.sink.ghosts if not which(ghost)]
        self.sink.cut |= {number for number, operation in self.sink.running.items() if which(operation)}

    @precondition(lambda self: self.sink.forgets or self.source.forgets)
    @rule()
    def forget(self) -> None:
        if self.sink.forgets:
            peer = self.sink.forgets.pop(0)
            self.cut_off(lambda operation: operation.peer == peer)
            self.at_sink(e.Forgotten(peer))
        if self.source.forgets:
            self.at_source(e.Forgotten(self.source.forgets.pop(0)))

    # --- time, and death -----------------------------------------------------------------------------------------

    @rule(pause_s=st.sampled_from([0.01, 0.25, 0.25, 0.9, 3.0]))
    def time_passes(self, pause_s: float) -> None:
        self.now_s += pause_s
        timers, self.source.timers = self.source.timers, []
        for timer in timers:
            self.at_source(timer)
        self.at_source(e.Tick())
        self.at_sink(e.Tick())

    @precondition(lambda self: self.faults < 3)
    @rule()
    def source_dies(self) -> None:
        """Its pages are gone; what it was sending goes on arriving."""
        self.faults += 1
        old = self.source
        self.hang_up()
        self.source = self.new_source(old.me.incarnation + 1)
        for number, operation in list(self.sink.running.items()):
            if operation.peer == old.me:
                self.fail_fetch(number)
        self.at_sink(e.PeerGone(old.me, PeerLost("another has come")))

    @precondition(lambda self: self.faults < 3)
    @rule()
    def sink_dies(self) -> None:
        self.faults += 1
        old = self.sink
        self.hang_up()
        self.sink = Sink(WorkerId("d", old.me.incarnation + 1), self.names, self.guards)
        self.at_source(e.PeerGone(old.me, PeerLost("another has come")))

    # --- what holds ----------------------------------------------------------------------------------------------

    @invariant()
    def books_are_right(self) -> None:
        if hasattr(self, "sink"):
            self.sink.pool.check()
            self.source.pool.check()
            for key in self.sink.committed:
                self.sink.check(key)

    def teardown(self) -> None:
        """Faults cease: everything ends, and nothing is held."""
        if not hasattr(self, "sink") or sys.exc_info()[0] is not None:
            return  # something has failed already: that is what is to be seen
        for _ in range(400):
            self.settle_down()
            if self.quiet():
                break
            self.time_passes(0.25)
        for key in list(self.sink.committed):
            self.sink.check(key)
            self.sink.pool.release_all(self.sink.committed.pop(key))
        assert self.quiet(), (self.source.end.counts(), self.sink.end.counts())
        assert self.sink.expected == set(self.sink.ended)
        assert self.source.offered == set(self.source.closed)
        for pool in (self.source.pool, self.sink.pool):
            pool.check()
            counts = pool.counts()
            assert counts["owned"] == counts["leased"] == counts["quarantined"] == 0, counts

    def settle_down(self) -> None:
        self.connect()
        for key in list(self.source.jobs):
            while key in self.source.jobs:
                self.work(self.source.jobs[key], 4)
        while self.source.drains:
            self.drain()
        while self.sink.forgets or self.source.forgets:
            self.forget()
        for number in list(self.sink.running):
            self.end_fetch(number)
        while self.wires:
            self.arrive(*self.wires.pop(0))

    def quiet(self) -> bool:
        return self.source.end.idle and self.sink.end.idle and not self.sink.running and not self.wires


TestHandoffs = Handoffs.TestCase
TestHandoffs.settings = settings(
    max_examples=120, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize(
    ("guards", "what_happens"),
    [
        (Guards(digest=False), "was served"),
        (Guards(place=False), "was served .*another prompt's"),
        (Guards(quarantine=False), "a late byte may still hit"),
    ],
    ids=["digest", "place", "quarantine"],
)
def test_each_guard_is_missed_when_it_is_off(guards: Guards, what_happens: str) -> None:
    """The epoch's fence, which transports keep, is missed in the tests of the transports."""
    unguarded = type("Unguarded", (Handoffs,), {"guards": guards})
    found = settings(
        max_examples=4000,  # the first that shows it ends the search: about the 130th, now and then the 600th
        stateful_step_count=50,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
    )
    with pytest.raises(AssertionError, match=what_happens):
        run_state_machine_as_test(unguarded, settings=found)  # type: ignore[no-untyped-call]
