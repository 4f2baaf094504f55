"""The source's end of every hand-off: what a prefill worker has offered, keeps for its peers, and still has to say.

Pure: `handle(event, now_s)` returns effects. What must be heard stays in an outbox until the receiver has said that it
has it; a resumed session, or silence, sends it again. How a hand-off ends is decided in `source_books`.
"""

from __future__ import annotations

from random import Random

from core.errors import BatonError, Cancelled, HandoffError, PeerLost
from core.messages import Peer, WorkerId
from kvtransfer import events as e
from kvtransfer import states
from kvtransfer.liveness import Liveness, Timing
from kvtransfer.messages import Busy, Close, Failed, Fetch, Grant, Refused, Renew
from kvtransfer.ports import Counters, Pages
from kvtransfer.sending import Sending
from kvtransfer.source_books import SourceBooks
from kvtransfer.states import State

BACKOFF_S = (0.01, 0.25)  # first and longest pause after Busy
SEALED_SHARE = 4  # one in so many pages of the pool may be sealed before new prefills stop


class SourceEnd:
    """All hand-offs that begin at this worker."""

    def __init__(
        self,
        *,
        pages: Pages,
        pool_pages: int,
        page_size: int,
        random: Random,
        counters: Counters,
        timing: Timing,
        pages_per_ready: int,
    ) -> None:
        self._pages = pages
        self._pool_pages = pool_pages
        self._page_size = page_size
        self._random = random
        self._counters = counters
        self._deadlines = timing.deadlines
        self._pages_per_ready = pages_per_ready
        self._liveness = Liveness(timing.lease)
        self._books = SourceBooks(pages, counters, self._liveness, timing.deadlines.tombstone_s)
        self._renewals = 0

    @property
    def accepts_prefill(self) -> bool:
        """False while too much of the pool waits to be fetched: computing more would only fill it."""
        return self._books.sealed_pages * SEALED_SHARE <= self._pool_pages

    def counts(self) -> dict[str, int]:
        """Hand-offs by state; those that have ended and are being cleared away are not counted."""
        return states.counts(record.state for record in self._books.records.values())

    @property
    def idle(self) -> bool:
        """Nothing is held for anybody."""
        return not self._books.records

    def handle(self, event: e.SourceEvent, now_s: float) -> list[e.SourceEffect]:
        self._books.now_s = now_s
        match event:
            case e.FromReceiver():
                self._heard(event)
            case e.Meet():
                self._meet(event.peer)
            case e.Offer():
                self._offer(event)
            case e.Filled():
                self._filled(event)
            case e.Seal():
                self._seal(event)
            case e.Digested():
                self._digested(event)
            case e.GiveUp():
                self._books.give_up(event.key, event.error)
            case e.AskAgain():
                self._ask_again(event)
            case e.DrainDone():
                self._books.drain_done(event.drain)
            case e.SessionUp():
                self._session_up(event.peer)
            case e.SessionDown():
                self._liveness.down(event.peer, now_s)
            case e.PeerGone():
                self._lose(event.peer, event.error)
            case e.Forgotten():
                self._books.forgotten(event.peer)
            case e.Tick():
                self._tick()
        effects, self._books.effects = self._books.effects, []
        return effects

    # --- asking for pages ------------------------------------------------------------------------------------

    def _offer(self, event: e.Offer) -> None:
        key = event.key
        assert key not in self._books.records, key
        if self._books.tombstones.word(key) is not None or self._books.tombstones.superseded(key):
            self._books.effects.append(e.Closed(key, State.ABORTED, Cancelled(f"{key} is over")))
            return
        for older in [other for other in self._books.records if other.request_id == key.request_id]:
            self._books.give_up(older, Cancelled(f"{key} has taken over"))
        record = Sending(
            key=key,
            peer=event.peer.worker,
            prompt_tokens=event.prompt_tokens,
            choices=event.choices,
            page_size=self._page_size,
            until_s=self._books.now_s + event.deadline_s,
            moved_s=self._books.now_s,
            entered_s=self._books.now_s,
            ticket=event.ticket,
        )
        self._books.begin(record)
        self._meet(event.peer)
        self._ask(record)

    def _meet(self, peer: Peer) -> None:
        self._liveness.meet(peer.worker, self._books.now_s)
        self._books.effects.append(e.Dial(peer))

    def _ask(self, record: Sending) -> None:
        record.said_s = self._books.now_s
        self._books.say(record.peer, record.question())

    def _granted(self, peer: WorkerId, message: Grant) -> None:
        record = self._books.records.get(message.key)
        if record is None or record.peer != peer:
            code = self._books.tombstones.word(message.key) or Cancelled.code
            self._books.say(peer, Failed(message.key, 0, code, "this hand-off is over"))
        elif record.state is State.QUEUED:
            if not 0 <= message.prefix_pages <= record.full_pages:
                self._books.give_up(record.key, HandoffError(f"granted a prefix of {message.prefix_pages} pages"))
                return
            record.prefix_pages = message.prefix_pages
            self._books.move(record, State.GRANTED)
            self._books.effects.append(e.Granted(message))

    def _busy(self, record: Sending, message: Busy) -> None:
        if record.state is not State.QUEUED or message.number != record.asked:
            return  # the answer to an older question
        first_s, longest_s = BACKOFF_S
        record.pause_s = first_s if record.pause_s is None else min(2 * record.pause_s, longest_s)
        pause_s = max(record.pause_s * self._random.uniform(0.5, 1.0), message.retry_after_s)
        record.asked += 1
        record.said_s = self._books.now_s + pause_s
        self._books.effects.append(e.Later(pause_s, e.AskAgain(record.key, record.asked)))

    def _ask_again(self, event: e.AskAgain) -> None:
        record = self._books.records.get(event.key)
        if record is not None and record.state is State.QUEUED and record.asked == event.number:
            self._ask(record)

    # --- saying what is there --------------------------------------------------------------------------------

    def _filled(self, event: e.Filled) -> None:
        record = self._books.records.get(event.key)
        if record is None or record.ended:
            return  # it ended while the engine computed
        assert record.state in (State.GRANTED, State.STREAMING), (event.key, record.state)
        wanted = [page for page in event.pages if page.position >= record.prefix_pages]
        entries = tuple(record.hold(self._pages, page) for page in wanted)
        if entries:
            self._books.effects.append(e.Digest(record.key, entries, None))

    def _seal(self, event: e.Seal) -> None:
        record = self._books.records.get(event.key)
        if record is None or record.ended:
            return
        record.check_seal(event)
        entries = (record.hold(self._pages, event.tail),) if event.tail else ()
        self._books.effects.append(e.Digest(record.key, entries, event))

    def _digested(self, event: e.Digested) -> None:
        record = self._books.records.get(event.key)
        if record is None or record.ended:
            return
        if record.state is State.GRANTED:
            self._books.move(record, State.STREAMING)
        record.moved_s = self._books.now_s
        if event.seal is None:
            for ready in record.readies(event.entries, self._pages_per_ready):
                self._books.say_surely(record, ready)
        else:
            self._books.say_surely(record, record.sealed(event.seal, event.entries))
            self._books.move(record, State.SEALED)

    # --- hearing ---------------------------------------------------------------------------------------------

    def _heard(self, event: e.FromReceiver) -> None:
        peer, message = event.peer, event.message
        self._liveness.heard(peer, self._books.now_s)
        if isinstance(message, Renew):
            return
        if isinstance(message, Grant):
            self._granted(peer, message)
            return
        record = self._books.records.get(message.key)
        if record is not None and record.peer != peer:
            return  # not its hand-off: nothing that it says of it counts
        if isinstance(message, Close | Refused):
            self._books.closed(peer, record, message)
        elif record is not None and isinstance(message, Busy):
            self._busy(record, message)
        elif record is not None and isinstance(message, Fetch) and not record.ended:
            record.stream = message.stream
            if record.outbox.heard(message.acked):
                record.moved_s = self._books.now_s

    # --- peers and time --------------------------------------------------------------------------------------

    def _session_up(self, peer: WorkerId) -> None:
        """It may have missed anything: say again what it has not acknowledged."""
        self._liveness.up(peer, self._books.now_s)
        for record in self._books.of(peer):
            self._say_again(record)

    def _say_again(self, record: Sending) -> None:
        if record.state is State.QUEUED and record.said_s <= self._books.now_s:
            self._ask(record)
        for message in record.outbox.unheard():
            record.said_s = self._books.now_s
            self._books.say(record.peer, message)

    def _lose(self, peer: WorkerId, error: BatonError) -> None:
        self._liveness.forget(peer)
        for record in self._books.of(peer):
            self._books.lose(record, error)
        self._books.effects += [e.HangUp(peer), e.Forget(peer)]

    def _tick(self) -> None:
        now_s = self._books.now_s
        for peer in self._liveness.due(now_s):
            self._renewals += 1
            self._books.say(peer, Renew(self._renewals))
        if self._liveness.tick_is_late(now_s):
            return
        for peer in self._liveness.lost(now_s):
            self._lose(peer, PeerLost(f"{peer} was not heard any more"))
        for record in list(self._books.records.values()):
            self._tick_one(record)
        self._books.tombstones.expire(now_s)

    def _tick_one(self, record: Sending) -> None:
        if record.ended:
            if record.drained and self._books.now_s - record.moved_s > self._deadlines.closing_s:
                self._counters.expired(record.state)
                self._books.bury(record)  # the receiver never answered: it holds nothing of ours, nor we of its
                return
        elif (error := record.overdue(self._books.now_s, self._deadlines)) is not None:
            self._counters.expired(record.state)
            self._books.give_up(record.key, error)
            return
        if self._books.now_s - record.said_s > self._deadlines.resend_s:
            self._say_again(record)
