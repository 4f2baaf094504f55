"""The hand-offs of one source by name: the state of each, what is said of it, and how it ends.

A page is leased from the moment it is filled until the hand-off has ended and nothing of ours moves under its stream.
Those that are over leave tombstones.
"""

from __future__ import annotations

from core.errors import BatonError, Cancelled, HandoffError, leaves
from core.messages import WorkerId
from kvtransfer import events as e
from kvtransfer.liveness import Liveness
from kvtransfer.messages import Close, Drained, Failed, HandoffKey, Message, Refused
from kvtransfer.outbox import Sure
from kvtransfer.ports import Counters, Pages
from kvtransfer.sending import Sending
from kvtransfer.states import ALLOWED, State
from kvtransfer.tombstones import Tombstones


class SourceBooks:
    """Every change of a hand-off at the source goes through here; `SourceEnd` decides which."""

    def __init__(self, pages: Pages, counters: Counters, liveness: Liveness, tombstone_s: float) -> None:
        self._pages = pages
        self._counters = counters
        self._liveness = liveness
        self._drains = 0
        self.tombstones: Tombstones[str] = Tombstones(tombstone_s)
        self.records: dict[HandoffKey, Sending] = {}
        self.sealed_pages = 0  # of hand-offs that are sealed and not taken
        self.now_s = 0.0  # of the event that is being handled
        self.effects: list[e.SourceEffect] = []

    def begin(self, record: Sending) -> None:
        self.tombstones.saw(record.key, self.now_s)
        self.records[record.key] = record
        self._counters.met(record.peer)
        self._counters.moved(None, State.QUEUED, 0.0)

    def of(self, peer: WorkerId) -> list[Sending]:
        return [record for record in self.records.values() if record.peer == peer]

    def move(self, record: Sending, new: State) -> None:
        assert new in ALLOWED[record.state], (record.key, record.state, new)
        self._counters.moved(record.state, new, self.now_s - record.entered_s)
        record.state = new
        record.moved_s = record.entered_s = self.now_s
        if new is State.SEALED:
            self.sealed_pages += len(record.leased)

    def say(self, peer: WorkerId, message: Message) -> None:
        if self._liveness.is_up(peer):
            self.effects.append(e.Send(peer, message))

    def say_surely(self, record: Sending, message: Sure) -> None:
        """Until the receiver has said that it has it."""
        record.said_s = self.now_s
        self.say(record.peer, record.outbox.put(message))

    # --- the end of a hand-off -------------------------------------------------------------------------------

    def give_up(self, key: HandoffKey, error: BatonError) -> None:
        """We end it."""
        record = self.records.get(key)
        if record is None:
            if self.tombstones.word(key) is None:  # cancelled before it was offered
                self.tombstones.bury(key, error.code, self.now_s)
        elif not record.ended:
            self._end(record, State.ABORTED, error, answered=False)

    def lose(self, record: Sending, error: BatonError) -> None:
        """Its peer is being cut off: nothing needs to drain, and nobody answers."""
        if not record.ended:
            self._end(record, State.ABORTED, error, answered=True, drain=False)
        record.answered = True

    def closed(self, peer: WorkerId, record: Sending | None, message: Close | Refused) -> None:
        """The receiver ends it, or says again that it has."""
        if record is None:  # our Drained was lost, or we never heard of it: either way nothing may move any more
            self.effects.append(e.Drain(message.key, peer, message.stream, 0))
            return
        if record.ended:
            if not record.answered:  # the receiver may have posted fetches after our first drain, and now will not
                record.answered = True
                record.stream = message.stream or record.stream
                self._decide(record, message.outcome if isinstance(message, Close) else State.ABORTED)
                self._drain(record)
            return
        record.stream = message.stream or record.stream
        if isinstance(message, Refused) or message.outcome is not State.COMMITTED:
            error = leaves().get(message.code, HandoffError)(message.message)
            self._end(record, State.ABORTED, error, answered=True)
        elif record.state is State.SEALED:
            self._end(record, State.COMMITTED, None, answered=True)
        else:
            self._end(record, State.ABORTED, HandoffError("committed before it was sealed"), answered=True)

    def _end(
        self, record: Sending, outcome: State, error: BatonError | None, *, answered: bool, drain: bool = True
    ) -> None:
        """Say so at once; the pages stay leased until nothing of ours moves any more."""
        code = error.code if error else ""
        was_sealed = record.state is State.SEALED
        if was_sealed:
            self.sealed_pages -= len(record.leased)
        self.move(record, outcome)
        if was_sealed and not answered:
            record.undecided = code  # our word and the receiver's may cross: it may have committed
        else:
            self._count(record, outcome, code)
        if outcome is State.ABORTED and record.leased:
            self._counters.held_back(record.key)
            record.held_back = True
        record.answered = answered
        record.outbox.clear()
        if not answered:
            self.say_surely(record, Failed(record.key, 0, code, str(error)))
        if drain:
            self._drain(record)
        self.effects.append(e.Closed(record.key, outcome, error))

    def _count(self, record: Sending, outcome: State, code: str) -> None:
        self._counters.handoff(record.peer, outcome, code)
        if outcome is State.COMMITTED:
            self._counters.pages(len(record.positions))

    def _decide(self, record: Sending, outcome: State) -> None:
        """What the receiver made of a hand-off that we gave up after its seal."""
        if record.undecided:
            self._count(record, outcome, record.undecided if outcome is State.ABORTED else "")
            record.undecided = ""

    def _drain(self, record: Sending) -> None:
        self._drains += 1
        record.drained = False
        record.draining = e.Drain(record.key, record.peer, record.stream, self._drains)
        self.effects.append(record.draining)

    def drain_done(self, drain: e.Drain) -> None:
        record = self.records.get(drain.key)
        if record is None:
            self.say(drain.peer, Drained(drain.key, 0))
        elif record.draining == drain:
            self._let_go(record)

    def forgotten(self, peer: WorkerId) -> None:
        """The transport has cut it off."""
        for record in self.of(peer):
            if record.ended:
                self._let_go(record)

    def _let_go(self, record: Sending) -> None:
        record.let_go(self._pages)
        if record.held_back:
            record.held_back = False
            self._counters.let_go(record.key)
        if record.answered:
            self.say(record.peer, Drained(record.key, 0))
            self.bury(record)

    def bury(self, record: Sending) -> None:
        assert record.drained and record.ended
        self._decide(record, State.ABORTED)
        del self.records[record.key]
        self.tombstones.bury(record.key, Cancelled.code, self.now_s)
