"""The hand-offs of one receiver by name: the state of each, what is said of it, and how it ends.

A hand-off that has ended stays in the books, with its last word said again and again, until the source has drained, or
is cut off, and no operation of ours can touch a page any more. Then it leaves a tombstone.
"""

from __future__ import annotations

from core.errors import BatonError, HandoffError
from core.messages import WorkerId
from kvtransfer import events as e
from kvtransfer.intake import Intake
from kvtransfer.liveness import Liveness
from kvtransfer.messages import Close, HandoffKey, Message, Refused
from kvtransfer.ports import Counters
from kvtransfer.receiving import Receiving
from kvtransfer.states import ALLOWED, State
from kvtransfer.strangers import Strangers


class ReceiverBooks:
    """Every change of a hand-off at the receiver goes through here; `ReceiverEnd` decides which."""

    def __init__(
        self, counters: Counters, liveness: Liveness, intake: Intake, strangers: Strangers, page_bytes: int
    ) -> None:
        self._counters = counters
        self._liveness = liveness
        self._intake = intake
        self._strangers = strangers
        self._page_bytes = page_bytes
        self._last_stream = 0
        self.records: dict[HandoffKey, Receiving] = {}
        self.now_s = 0.0  # of the event that is being handled
        self.effects: list[e.ReceiverEffect] = []

    def begin(self, event: e.Expect) -> None:
        self._last_stream += 1
        until_s = self.now_s + event.deadline_s
        self.records[event.key] = Receiving(
            key=event.key,
            peer=event.peer,
            places=event.places,
            until_s=until_s,
            moved_s=self.now_s,
            entered_s=self.now_s,
            stream=self._last_stream,
            loan=event.loan,
            ticket=event.ticket,
        )
        self._counters.met(event.peer)
        self._counters.moved(None, State.QUEUED, 0.0)

    def of(self, peer: WorkerId) -> list[Receiving]:
        return [record for record in self.records.values() if record.peer == peer]

    def move(self, record: Receiving, new: State) -> None:
        assert new in ALLOWED[record.state], (record.key, record.state, new)
        self._counters.moved(record.state, new, self.now_s - record.entered_s)
        record.state = new
        record.moved_s = record.entered_s = self.now_s

    def say(self, peer: WorkerId, message: Message) -> None:
        if self._liveness.is_up(peer):
            self.effects.append(e.Send(peer, message))

    # --- the end of a hand-off -------------------------------------------------------------------------------

    def commit(self, record: Receiving) -> None:
        """Everything is verified."""
        assert record.clear and record.sealed is not None, record
        self.move(record, State.COMMITTED)
        self._counters.handoff(record.peer, State.COMMITTED, "")
        self._counters.pages(len(record.verified))
        self.effects.append(record.commit(self.now_s, self._page_bytes))
        self.say_final(record, Close(record.key, 0, record.stream, State.COMMITTED))

    def refuse(self, record: Receiving, error: HandoffError) -> None:
        """The source is at fault."""
        final = Refused(record.key, 0, record.stream, error.code, str(error))
        self.abort(record, error, record.peer, final)

    def abort(
        self, record: Receiving, error: BatonError, blames: WorkerId | None, final: Refused | None = None
    ) -> None:
        granted = record.state is not State.QUEUED
        self.move(record, State.ABORTED)
        self._counters.handoff(record.peer, State.ABORTED, error.code)
        self._intake.release(record)
        if not record.clear:
            record.held_back = True
            self._counters.held_back(record.key)
        self.effects += [e.CancelFetch(operation) for operation in sorted(record.running)]
        self.effects.append(e.Aborted(record.key, error, blames))
        close = Close(record.key, 0, record.stream, State.ABORTED, error.code, str(error))
        self.say_final(record, final or close)
        if not granted:  # the source may not have heard of us: its next message finds the tombstone
            record.drained = True
            self.bury_if_over(record)

    def say_final(self, record: Receiving, final: Close | Refused) -> None:
        record.final = final
        record.said_s = self.now_s
        self.say(record.peer, final)

    def drained(self, record: Receiving) -> None:
        """The source writes no more. It says so after our Close only: before that, it is no answer."""
        if record.ended:
            self._intake.lay(record)
            self.bury_if_over(record)

    def bury_if_over(self, record: Receiving) -> None:
        if record.held_back and record.clear:
            record.held_back = False
            self._counters.let_go(record.key)
        if record.drained and record.clear and record.final is not None:
            del self.records[record.key]
            self._strangers.bury(record.final, self.now_s, told=True)
