"""The receiver's end of every hand-off: it allots, paces, verifies, and alone decides that a hand-off is committed.

Pure: `handle(event, now_s)` returns effects. A page is checked for its place in the prompt before it is fetched, and
for its bytes before it counts. A timeout or a cancel frees no page that something may still write into: the pool keeps
it back until the source has drained, or is cut off. What was verified before an abort stays in the prefix cache.
"""

from __future__ import annotations

from hmac import compare_digest

from core.errors import BadTicket, BatonError, Cancelled, HandoffError, NoCapacity, PeerLost, PlaceMismatch, leaves
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
    Next,
    PageEntry,
    Ready,
    Refused,
    Renew,
    Sealed,
)
from kvtransfer.ports import Counters, Pages, Reservations
from kvtransfer.receiver_books import ReceiverBooks
from kvtransfer.receiving import Receiving
from kvtransfer.states import State
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
        page_bytes: int,
        guards: Guards | None = None,
    ) -> None:
        self._reservations = reservations
        self._counters = counters
        self._deadlines = timing.deadlines
        self._check_place = (guards or Guards()).place
        self._intake = Intake(pages, reservations, counters, guards or Guards())
        self._liveness = Liveness(timing.lease)
        self._strangers = Strangers(timing.deadlines.tombstone_s, timing.deadlines.held_s)
        self._books = ReceiverBooks(counters, self._liveness, self._intake, self._strangers, page_bytes)
        self._forgetting: set[WorkerId] = set()
        self._renewals = 0

    def counts(self) -> dict[str, int]:
        """Hand-offs by state; those that have ended and are being cleared away are not counted."""
        return states.counts(record.state for record in self._books.records.values())

    @property
    def idle(self) -> bool:
        return not self._books.records and not self._strangers.waiting and self._intake.idle

    def handle(self, event: e.ReceiverEvent, now_s: float) -> list[e.ReceiverEffect]:
        self._books.now_s = now_s
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
        effects, self._books.effects = self._books.effects, []
        return effects

    # --- a request arrives, or leaves ------------------------------------------------------------------------

    def _expect(self, event: e.Expect) -> None:
        key = event.key
        if key in self._books.records or self._strangers.told(key):
            return  # submitted twice
        over = self._strangers.admit(key, self._books.now_s)
        if over is not None:
            self._books.effects.append(e.Aborted(key, over, None))
            return
        for older in [other for other in self._books.records if other.request_id == key.request_id]:
            self._cancel(e.Cancel(older, Cancelled(f"{key} has taken over")))
        self._books.begin(event)
        if not event.loan:  # a lender comes if it likes; a source is owed, and is lost when it does not come in time
            self._liveness.meet(event.peer, self._books.now_s)
        held = self._strangers.question_of(key)
        if held is not None:
            self._heard(e.FromSource(held.peer, held.message))

    def _cancel(self, event: e.Cancel) -> None:
        record = self._books.records.get(event.key)
        if record is not None:
            if not record.ended:
                self._books.abort(record, event.error, None)
        else:  # it may come yet
            final = Close(event.key, 0, 0, State.ABORTED, event.error.code, str(event.error))
            self._strangers.bury(final, self._books.now_s)

    # --- hearing ---------------------------------------------------------------------------------------------

    def _heard(self, event: e.FromSource) -> None:
        peer, message = event.peer, event.message
        self._liveness.heard(peer, self._books.now_s)
        if isinstance(message, Renew):
            return
        record = self._books.records.get(message.key)
        if record is None:
            answer = self._strangers.answer(peer, message, self._books.now_s)
            if answer is not None:
                self._books.say(peer, answer)
        elif record.peer != peer:
            self._books.say(peer, Refused(message.key, 0, 0, HandoffError.code, f"{message.key} is not yours"))
        elif isinstance(message, Drained):
            self._books.drained(record)
        elif record.final is not None:
            self._books.say(peer, record.final)
        else:
            try:
                self._heard_of(record, message)
            except HandoffError as error:  # what the source says cannot be true
                self._books.refuse(record, error)

    def _heard_of(self, record: Receiving, message: Next | Ready | Sealed | Failed) -> None:
        match message:
            case Next():
                self._next(record, message)
            case Failed():
                blames = None if message.code in NOT_THE_SOURCE else record.peer
                self._books.abort(record, leaves().get(message.code, HandoffError)(message.message), blames)
            case Ready() | Sealed() if record.state is State.QUEUED:
                raise HandoffError(f"pages of {record.key}, which was not granted")
            case Ready():
                self._ready(record, message)
            case Sealed():
                self._sealed(record, message)

    def _next(self, record: Receiving, message: Next) -> None:
        if not compare_digest(message.ticket, record.ticket):
            self._counters.fault(record.peer, BadTicket.code)
            raise BadTicket(f"{record.peer} has asked for {record.key} with another ticket than the router's")
        record.moved_s = self._books.now_s
        record.shorten(message.prompt_tokens)
        if message.prompt_tokens != record.places.prompt_tokens:
            raise PlaceMismatch(f"a prompt of {message.prompt_tokens} tokens, here {record.places.prompt_tokens}")
        if record.state is State.QUEUED and not self._grant(record, message):
            if record.loan:
                self._books.abort(record, NoCapacity("no room for a loan"), None)
            else:
                self._books.say(record.peer, Busy(record.key, message.number, BUSY_S))
            return
        self._books.say(record.peer, Grant(record.key, message.number, record.prefix_pages))
        self._say_fetch(record)

    def _grant(self, record: Receiving, message: Next) -> bool:
        if record.peer in self._forgetting:
            return False  # an operation posted now could be taken for one of those that are being cut off
        reservation = self._reservations.reserve(record.key, record.places.pages)
        if reservation is None:
            return False
        record.pages = [*reservation.prefix_pages, *reservation.fresh_pages]
        record.prefix_pages = len(reservation.prefix_pages)
        record.choices = message.choices
        assert len(record.pages) == record.places.pages, (record.key, reservation)
        assert record.prefix_pages <= record.places.full_pages, (record.key, reservation)
        self._books.move(record, State.GRANTED)
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
            record.seal(message, self._books.now_s)
            self._books.move(record, State.SEALED)
        self._fetch(record, news)
        self._commit_if_whole(record)

    def _progress(self, record: Receiving, number: int) -> None:
        """A numbered message has come: say that we have it."""
        if record.heard.note(number):
            record.moved_s = self._books.now_s
        if record.state is State.GRANTED:
            self._books.move(record, State.STREAMING)
        self._say_fetch(record)

    def _fetch(self, record: Receiving, entries: list[PageEntry]) -> None:
        if entries:
            self._books.effects.append(self._intake.post(record, entries, self._books.now_s))

    def _fetch_ended(self, event: e.FetchEnded) -> None:
        record = self._books.records[self._intake.key_of(event.operation)]
        try:
            again = self._intake.ended(record, event, self._books.now_s)
        except PeerLost as error:
            self._books.abort(record, error, record.peer)
        except HandoffError as error:
            self._books.refuse(record, error)
        else:
            if record.ended:
                self._books.bury_if_over(record)
                return
            record.moved_s = self._books.now_s
            self._fetch(record, again)
            self._commit_if_whole(record)

    # --- the end of a hand-off -------------------------------------------------------------------------------

    def _commit_if_whole(self, record: Receiving) -> None:
        if record.state is State.SEALED and record.whole:
            self._books.commit(record)

    # --- peers and time --------------------------------------------------------------------------------------

    def _session_up(self, event: e.SessionUp) -> None:
        """It may have missed our last words. What else it missed, it asks for."""
        self._liveness.up(event.peer, self._books.now_s)
        for record in self._books.of(event.peer):
            if record.final is not None:
                self._books.say_final(record, record.final)

    def _lose(self, peer: WorkerId, error: BatonError) -> None:
        """Everything of this peer ends; its pages come back when the transport has cut it off."""
        self._liveness.forget(peer)
        for record in self._books.of(peer):
            if not record.ended:
                self._books.abort(record, error, peer)
        self._forgetting.add(peer)
        self._books.effects += [e.HangUp(peer), e.Forget(peer)]

    def _forgotten(self, peer: WorkerId) -> None:
        self._forgetting.discard(peer)
        for record in self._books.of(peer):
            self._books.drained(record)

    def _tick(self) -> None:
        now_s = self._books.now_s
        for peer in self._liveness.due(now_s):
            self._renewals += 1
            self._books.say(peer, Renew(self._renewals))
        if self._liveness.tick_is_late(now_s):
            return
        for peer in self._liveness.lost(now_s):
            if self._liveness.was_up(peer) or self._books.of(peer):
                self._lose(peer, PeerLost(f"{peer} was not heard any more"))
            else:  # what was expected of it was cancelled before it came
                self._liveness.forget(peer)
        for peer, refused in self._strangers.expire(now_s):
            self._books.say(peer, refused)
        for record in list(self._books.records.values()):
            self._tick_one(record)

    def _tick_one(self, record: Receiving) -> None:
        if not record.ended:
            error = record.overdue(self._books.now_s, self._deadlines)
            if error is not None:
                self._counters.expired(record.state)
                stalled = self._books.now_s <= record.until_s
                self._books.abort(record, error, record.peer if stalled else None)
        elif self._books.now_s - record.moved_s > self._deadlines.closing_s and record.peer not in self._forgetting:
            if record.clear:
                record.drained = True
                self._books.bury_if_over(record)
            else:  # it could still write, and does not say when that is over
                self._counters.expired(record.state)
                self._lose(record.peer, PeerLost(f"{record.peer} did not drain"))
        elif record.final is not None and self._books.now_s - record.said_s > self._deadlines.resend_s:
            self._books.say_final(record, record.final)

    def _say_fetch(self, record: Receiving) -> None:
        self._books.say(record.peer, record.standing_fetch())
