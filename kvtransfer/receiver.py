"""The receiver's end of every hand-off: it allots, paces, verifies, and alone decides that a hand-off is committed.

Pure: `handle(event, now_s)` returns effects. A page is checked for its place in the prompt before it is fetched, and
for its bytes before it counts. A timeout or a cancel frees no page that something may still write into: the pool keeps
it back until the source has drained, or is cut off. What was verified before an abort stays in the prefix cache.
"""

from __future__ import annotations

from core.errors import BatonError, Cancelled, HandoffError, PeerLost, PlaceMismatch, leaves
from core.messages import WorkerId
from kvtransfer import events as e
from kvtransfer import states
from kvtransfer.intake import Guards, Intake
from kvtransfer.liveness import Liveness, Timing
from kvtransfer.messages import (
    Busy,
    Close,
    Drained,
    Failed,
    Grant,
    HandoffKey,
    Message,
    Next,
    PageEntry,
    Ready,
    Refused,
    Renew,
    Sealed,
)
from kvtransfer.ports import Counters, Pages, Reservations
from kvtransfer.receiving import Receiving
from kvtransfer.states import ALLOWED, State
from kvtransfer.strangers import Strangers

BUSY_S = 0.01  # the shortest pause that we ask for
NOT_THE_SOURCE = frozenset({"cancelled", "no_capacity", "deadline_exceeded"})  # failures that blame nobody


class ReceiverEnd:
    """All hand-offs that end at this worker."""

    def __init__(
        self,
        *,
        pages: Pages,
        reservations: Reservations,
        counters: Counters,
        timing: Timing,
        guards: Guards | None = None,
    ) -> None:
        self._reservations = reservations
        self._counters = counters
        self._deadlines = timing.deadlines
        self._check_place = (guards or Guards()).place
        self._intake = Intake(pages, reservations, counters, guards or Guards())
        self._liveness = Liveness(timing.lease)
        self._strangers = Strangers(timing.deadlines.tombstone_s, timing.deadlines.held_s)
        self._receiving: dict[HandoffKey, Receiving] = {}
        self._forgetting: set[WorkerId] = set()
        self._last_stream = 0
        self._renewals = 0
        self._now_s = 0.0
        self._effects: list[e.ReceiverEffect] = []

    def counts(self) -> dict[str, int]:
        """Hand-offs by state; those that have ended and are being cleared away are not counted."""
        return states.counts(record.state for record in self._receiving.values())

    @property
    def idle(self) -> bool:
        return not self._receiving and not self._strangers.waiting and self._intake.idle

    def handle(self, event: e.ReceiverEvent, now_s: float) -> list[e.ReceiverEffect]:
        self._now_s = now_s
        match event:
            case e.FromSource():
                self._heard(event)
            case e.FetchEnded():
                self._fetch_ended(event)
            case e.Expect():
                self._expect(event)
            case e.Cancel():
                self._cancel(event)
            case e.SessionUp():
                self._session_up(event)
            case e.SessionDown():
                self._liveness.down(event.peer, now_s)
            case e.PeerGone():
                self._lose(event.peer, event.error)
            case e.Forgotten():
                self._forgotten(event.peer)
            case e.Tick():
                self._tick()
        effects, self._effects = self._effects, []
        return effects

    # --- a request arrives, or leaves ------------------------------------------------------------------------

    def _expect(self, event: e.Expect) -> None:
        key = event.key
        if key in self._receiving or self._strangers.told(key):
            return  # submitted twice
        over = self._strangers.admit(key, self._now_s)
        if over is not None:
            self._effects.append(e.Aborted(key, over, None))
            return
        for older in [other for other in self._receiving if other.request_id == key.request_id]:
            self._cancel(e.Cancel(older, Cancelled(f"{key} has taken over")))
        self._last_stream += 1
        until_s = self._now_s + event.deadline_s
        record = Receiving(key, event.peer, event.places, until_s, self._now_s, self._last_stream)
        self._receiving[key] = record
        self._counters.moved(None, State.QUEUED)
        held = self._strangers.question_of(key)
        if held is not None:
            self._heard(e.FromSource(held.peer, held.message))

    def _cancel(self, event: e.Cancel) -> None:
        record = self._receiving.get(event.key)
        if record is not None:
            if not record.ended:
                self._abort(record, event.error, None)
        else:  # it may come yet
            final = Close(event.key, 0, 0, State.ABORTED, event.error.code, str(event.error))
            self._strangers.bury(final, self._now_s)

    # --- hearing ---------------------------------------------------------------------------------------------

    def _heard(self, event: e.FromSource) -> None:
        peer, message = event.peer, event.message
        self._liveness.heard(peer, self._now_s)
        if isinstance(message, Renew):
            return
        record = self._receiving.get(message.key)
        if record is None:
            answer = self._strangers.answer(peer, message, self._now_s)
            if answer is not None:
                self._say(peer, answer)
        elif record.peer != peer:
            self._say(peer, Refused(message.key, 0, 0, HandoffError.code, f"{message.key} is not yours"))
        elif isinstance(message, Drained):
            self._drained(record)
        elif record.final is not None:
            self._say(peer, record.final)
        else:
            try:
                self._heard_of(record, message)
            except HandoffError as error:  # what the source says cannot be true
                self._refuse(record, error)

    def _heard_of(self, record: Receiving, message: Next | Ready | Sealed | Failed) -> None:
        match message:
            case Next():
                self._next(record, message)
            case Failed():
                blames = None if message.code in NOT_THE_SOURCE else record.peer
                self._abort(record, leaves().get(message.code, HandoffError)(message.message), blames)
            case Ready() | Sealed() if record.state is State.QUEUED:
                raise HandoffError(f"pages of {record.key}, which was not granted")
            case Ready():
                self._ready(record, message)
            case Sealed():
                self._sealed(record, message)

    def _next(self, record: Receiving, message: Next) -> None:
        if message.prompt_tokens != record.places.prompt_tokens:
            raise PlaceMismatch(f"a prompt of {message.prompt_tokens} tokens, here {record.places.prompt_tokens}")
        if record.state is State.QUEUED and not self._grant(record, message):
            self._say(record.peer, Busy(record.key, message.number, BUSY_S))
            return
        self._say(record.peer, Grant(record.key, message.number, record.prefix_pages))
        self._say_fetch(record)

    def _grant(self, record: Receiving, message: Next) -> bool:
        if record.peer in self._forgetting:
            return False  # an operation posted now could be taken for one of those that are being cut off
        reservation = self._reservations.reserve(record.key)
        if reservation is None:
            return False
        record.pages = [*reservation.prefix_pages, *reservation.fresh_pages]
        record.prefix_pages = len(reservation.prefix_pages)
        record.choices = message.choices
        assert len(record.pages) == record.places.pages, (record.key, reservation)
        assert record.prefix_pages <= record.places.full_pages, (record.key, reservation)
        self._move(record, State.GRANTED)
        return True

    def _ready(self, record: Receiving, message: Ready) -> None:
        place = self._check_place
        news = [entry for entry in message.pages if record.is_news(entry, tail=False, check_place=place)]
        self._progress(record, message.number)
        self._fetch(record, news)

    def _sealed(self, record: Receiving, message: Sealed) -> None:
        record.check_seal(message)
        tail, place = message.tail, self._check_place
        news = [tail] if tail and record.is_news(tail, tail=True, check_place=place) else []
        self._progress(record, message.number)
        if record.sealed is None:
            record.sealed, record.sealed_s = message, self._now_s
            self._move(record, State.SEALED)
        self._fetch(record, news)
        self._commit_if_whole(record)

    def _progress(self, record: Receiving, number: int) -> None:
        """A numbered message has come: say that we have it."""
        if record.heard.note(number):
            record.moved_s = self._now_s
        if record.state is State.GRANTED:
            self._move(record, State.STREAMING)
        self._say_fetch(record)

    def _fetch(self, record: Receiving, entries: list[PageEntry]) -> None:
        if entries:
            self._effects.append(self._intake.post(record, entries))

    def _fetch_ended(self, event: e.FetchEnded) -> None:
        record = self._receiving[self._intake.key_of(event.operation)]
        try:
            again = self._intake.ended(record, event)
        except PeerLost as error:
            self._abort(record, error, record.peer)
        except HandoffError as error:
            self._refuse(record, error)
        else:
            if record.ended:
                self._bury_if_over(record)
                return
            record.moved_s = self._now_s
            self._fetch(record, again)
            self._commit_if_whole(record)

    # --- the end of a hand-off -------------------------------------------------------------------------------

    def _commit_if_whole(self, record: Receiving) -> None:
        if record.state is not State.SEALED or not record.whole:
            return
        assert record.clear and record.sealed is not None, record
        self._move(record, State.COMMITTED)
        self._counters.handoff(State.COMMITTED, "")
        self._counters.pages(len(record.verified))
        self._effects.append(record.commit(self._now_s))
        self._say_final(record, Close(record.key, 0, record.stream, State.COMMITTED))

    def _refuse(self, record: Receiving, error: HandoffError) -> None:
        """The source is at fault."""
        final = Refused(record.key, 0, record.stream, error.code, str(error))
        self._abort(record, error, record.peer, final)

    def _abort(
        self, record: Receiving, error: BatonError, blames: WorkerId | None, final: Refused | None = None
    ) -> None:
        granted = record.state is not State.QUEUED
        self._move(record, State.ABORTED)
        self._counters.handoff(State.ABORTED, error.code)
        self._intake.release(record)
        self._effects += [e.CancelFetch(operation) for operation in sorted(record.running)]
        self._effects.append(e.Aborted(record.key, error, blames))
        close = Close(record.key, 0, record.stream, State.ABORTED, error.code, str(error))
        self._say_final(record, final or close)
        if not granted:  # the source may not have heard of us: its next message finds the tombstone
            record.drained = True
            self._bury_if_over(record)

    def _say_final(self, record: Receiving, final: Close | Refused) -> None:
        record.final = final
        record.said_s = self._now_s
        self._say(record.peer, final)

    def _drained(self, record: Receiving) -> None:
        """The source writes no more. It says so after our Close only: before that, it is no answer."""
        if record.ended:
            self._intake.lay(record)
            self._bury_if_over(record)

    def _bury_if_over(self, record: Receiving) -> None:
        if record.drained and record.clear and record.final is not None:
            del self._receiving[record.key]
            self._strangers.bury(record.final, self._now_s, told=True)

    def _move(self, record: Receiving, new: State) -> None:
        assert new in ALLOWED[record.state], (record.key, record.state, new)
        self._counters.moved(record.state, new)
        record.state = new
        record.moved_s = self._now_s

    # --- peers and time --------------------------------------------------------------------------------------

    def _session_up(self, event: e.SessionUp) -> None:
        """It may have missed our last words. What else it missed, it asks for."""
        self._liveness.up(event.peer, self._now_s)
        for record in self._of(event.peer):
            if record.final is not None:
                self._say_final(record, record.final)

    def _lose(self, peer: WorkerId, error: BatonError) -> None:
        """Everything of this peer ends; its pages come back when the transport has cut it off."""
        self._liveness.forget(peer)
        for record in self._of(peer):
            if not record.ended:
                self._abort(record, error, peer)
        self._forgetting.add(peer)
        self._effects += [e.HangUp(peer), e.Forget(peer)]

    def _forgotten(self, peer: WorkerId) -> None:
        self._forgetting.discard(peer)
        for record in self._of(peer):
            self._drained(record)

    def _of(self, peer: WorkerId) -> list[Receiving]:
        return [record for record in self._receiving.values() if record.peer == peer]

    def _tick(self) -> None:
        now_s = self._now_s
        for peer in self._liveness.due(now_s):
            self._renewals += 1
            self._say(peer, Renew(self._renewals))
        if self._liveness.tick_is_late(now_s):
            return
        for peer in self._liveness.lost(now_s):
            self._lose(peer, PeerLost(f"{peer} was not heard any more"))
        for peer, refused in self._strangers.expire(now_s):
            self._say(peer, refused)
        for record in list(self._receiving.values()):
            self._tick_one(record)

    def _tick_one(self, record: Receiving) -> None:
        if not record.ended:
            error = record.overdue(self._now_s, self._deadlines)
            if error is not None:
                stalled = self._now_s <= record.until_s
                self._abort(record, error, record.peer if stalled else None)
        elif self._now_s - record.moved_s > self._deadlines.closing_s and record.peer not in self._forgetting:
            if record.clear:
                record.drained = True
                self._bury_if_over(record)
            else:  # it could still write, and does not say when that is over
                self._lose(record.peer, PeerLost(f"{record.peer} did not drain"))
        elif record.final is not None and self._now_s - record.said_s > self._deadlines.resend_s:
            self._say_final(record, record.final)

    def _say(self, peer: WorkerId, message: Message) -> None:
        if self._liveness.is_up(peer):
            self._effects.append(e.Send(peer, message))

    def _say_fetch(self, record: Receiving) -> None:
        self._say(record.peer, record.standing_fetch())
