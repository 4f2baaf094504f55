"""The source's end of every hand-off: what a prefill worker has offered, keeps for its peers, and still has to say.

Pure: `handle(event, now_s)` returns effects. What must be heard stays in an outbox until the receiver has said that it
has it; a resumed session, or silence, sends it again. A page is leased from the moment it is filled until the hand-off
has ended and nothing of ours moves under its stream: a lease is about availability, never about correctness.
"""

from __future__ import annotations

from random import Random

from core.errors import BatonError, Cancelled, HandoffError, PeerLost, leaves
from core.messages import WorkerId
from kvtransfer import events as e
from kvtransfer import states
from kvtransfer.liveness import Liveness, Timing
from kvtransfer.messages import Busy, Close, Drained, Failed, Fetch, Grant, HandoffKey, Message, Refused, Renew
from kvtransfer.outbox import Sure
from kvtransfer.ports import Counters, Pages
from kvtransfer.sending import Sending
from kvtransfer.states import ALLOWED, State
from kvtransfer.tombstones import Tombstones

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
        self._tombstones: Tombstones[str] = Tombstones(timing.deadlines.tombstone_s)
        self._sending: dict[HandoffKey, Sending] = {}
        self._sealed_pages = 0
        self._renewals = 0
        self._drains = 0
        self._now_s = 0.0
        self._effects: list[e.SourceEffect] = []

    @property
    def accepts_prefill(self) -> bool:
        """False while too much of the pool waits to be fetched: computing more would only fill it."""
        return self._sealed_pages * SEALED_SHARE <= self._pool_pages

    def counts(self) -> dict[str, int]:
        """Hand-offs by state; those that have ended and are being cleared away are not counted."""
        return states.counts(record.state for record in self._sending.values())

    @property
    def idle(self) -> bool:
        """Nothing is held for anybody."""
        return not self._sending

    def handle(self, event: e.SourceEvent, now_s: float) -> list[e.SourceEffect]:
        self._now_s = now_s
        match event:
            case e.FromReceiver():
                self._heard(event)
            case e.Offer():
                self._offer(event)
            case e.Filled():
                self._filled(event)
            case e.Seal():
                self._seal(event)
            case e.Digested():
                self._digested(event)
            case e.GiveUp():
                self._give_up(event.key, event.error)
            case e.AskAgain():
                self._ask_again(event)
            case e.DrainDone():
                self._drain_done(event.drain)
            case e.SessionUp():
                self._session_up(event.peer)
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

    # --- asking for pages ------------------------------------------------------------------------------------

    def _offer(self, event: e.Offer) -> None:
        key = event.key
        assert key not in self._sending, key
        if self._tombstones.word(key) is not None or self._tombstones.superseded(key):
            self._effects.append(e.Closed(key, State.ABORTED, Cancelled(f"{key} is over")))
            return
        self._tombstones.saw(key, self._now_s)
        for older in [other for other in self._sending if other.request_id == key.request_id]:
            self._give_up(older, Cancelled(f"{key} has taken over"))
        record = Sending(
            key=key,
            peer=event.peer.worker,
            prompt_tokens=event.prompt_tokens,
            choices=event.choices,
            page_size=self._page_size,
            until_s=self._now_s + event.deadline_s,
            moved_s=self._now_s,
        )
        self._sending[key] = record
        self._counters.moved(None, State.QUEUED)
        self._liveness.meet(record.peer, self._now_s)
        self._effects.append(e.Dial(event.peer))
        self._ask(record)

    def _ask(self, record: Sending) -> None:
        record.said_s = self._now_s
        self._say(record.peer, record.question())

    def _granted(self, peer: WorkerId, message: Grant) -> None:
        record = self._sending.get(message.key)
        if record is None or record.peer != peer:
            code = self._tombstones.word(message.key) or Cancelled.code
            self._say(peer, Failed(message.key, 0, code, "this hand-off is over"))
        elif record.state is State.QUEUED:
            if not 0 <= message.prefix_pages <= record.full_pages:
                self._give_up(record.key, HandoffError(f"granted a prefix of {message.prefix_pages} pages"))
                return
            record.prefix_pages = message.prefix_pages
            self._move(record, State.GRANTED)
            self._effects.append(e.Granted(message))

    def _busy(self, record: Sending, message: Busy) -> None:
        if record.state is not State.QUEUED or message.number != record.asked:
            return  # the answer to an older question
        first_s, longest_s = BACKOFF_S
        record.pause_s = first_s if record.pause_s is None else min(2 * record.pause_s, longest_s)
        pause_s = max(record.pause_s * self._random.uniform(0.5, 1.0), message.retry_after_s)
        record.asked += 1
        record.said_s = self._now_s + pause_s
        self._effects.append(e.Later(pause_s, e.AskAgain(record.key, record.asked)))

    def _ask_again(self, event: e.AskAgain) -> None:
        record = self._sending.get(event.key)
        if record is not None and record.state is State.QUEUED and record.asked == event.number:
            self._ask(record)

    # --- saying what is there --------------------------------------------------------------------------------

    def _filled(self, event: e.Filled) -> None:
        record = self._sending.get(event.key)
        if record is None or record.ended:
            return  # it ended while the engine computed
        assert record.state in (State.GRANTED, State.STREAMING), (event.key, record.state)
        wanted = [page for page in event.pages if page.position >= record.prefix_pages]
        entries = tuple(record.hold(self._pages, page) for page in wanted)
        if entries:
            self._effects.append(e.Digest(record.key, entries, None))

    def _seal(self, event: e.Seal) -> None:
        record = self._sending.get(event.key)
        if record is None or record.ended:
            return
        record.check_seal(event)
        entries = (record.hold(self._pages, event.tail),) if event.tail else ()
        self._effects.append(e.Digest(record.key, entries, event))

    def _digested(self, event: e.Digested) -> None:
        record = self._sending.get(event.key)
        if record is None or record.ended:
            return
        if record.state is State.GRANTED:
            self._move(record, State.STREAMING)
        record.moved_s = self._now_s
        if event.seal is None:
            for ready in record.readies(event.entries, self._pages_per_ready):
                self._say_surely(record, ready)
        else:
            self._say_surely(record, record.sealed(event.seal, event.entries))
            self._sealed_pages += len(record.leased)
            self._move(record, State.SEALED)

    def _say_surely(self, record: Sending, message: Sure) -> None:
        record.said_s = self._now_s
        self._say(record.peer, record.outbox.put(message))

    def _say(self, peer: WorkerId, message: Message) -> None:
        if self._liveness.is_up(peer):
            self._effects.append(e.Send(peer, message))

    # --- hearing ---------------------------------------------------------------------------------------------

    def _heard(self, event: e.FromReceiver) -> None:
        peer, message = event.peer, event.message
        self._liveness.heard(peer, self._now_s)
        if isinstance(message, Renew):
            return
        if isinstance(message, Grant):
            self._granted(peer, message)
            return
        record = self._sending.get(message.key)
        if record is not None and record.peer != peer:
            return  # not its hand-off: nothing that it says of it counts
        if isinstance(message, Close | Refused):
            self._closed(peer, record, message)
        elif record is not None and isinstance(message, Busy):
            self._busy(record, message)
        elif record is not None and isinstance(message, Fetch) and not record.ended:
            record.stream = message.stream
            if record.outbox.heard(message.acked):
                record.moved_s = self._now_s

    def _closed(self, peer: WorkerId, record: Sending | None, message: Close | Refused) -> None:
        if record is None:  # our Drained was lost, or we never heard of it: either way nothing may move any more
            self._effects.append(e.Drain(message.key, peer, message.stream, 0))
            return
        if record.ended:
            if not record.answered:  # the receiver may have posted fetches after our first drain, and now will not
                record.answered = True
                record.stream = message.stream or record.stream
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

    # --- the end of a hand-off -------------------------------------------------------------------------------

    def _give_up(self, key: HandoffKey, error: BatonError) -> None:
        record = self._sending.get(key)
        if record is None:
            if self._tombstones.word(key) is None:  # cancelled before it was offered
                self._tombstones.bury(key, error.code, self._now_s)
        elif not record.ended:
            self._end(record, State.ABORTED, error, answered=False)

    def _end(
        self, record: Sending, outcome: State, error: BatonError | None, *, answered: bool, drain: bool = True
    ) -> None:
        """Say so at once; the pages stay leased until nothing of ours moves any more."""
        code = error.code if error else ""
        if record.state is State.SEALED:
            self._sealed_pages -= len(record.leased)
        self._move(record, outcome)
        self._counters.handoff(outcome, code)
        if outcome is State.COMMITTED:
            self._counters.pages(len(record.leased))
        record.answered = answered
        record.outbox.clear()
        if not answered:
            self._say_surely(record, Failed(record.key, 0, code, str(error)))
        if drain:
            self._drain(record)
        self._effects.append(e.Closed(record.key, outcome, error))

    def _drain(self, record: Sending) -> None:
        self._drains += 1
        record.drained = False
        record.draining = e.Drain(record.key, record.peer, record.stream, self._drains)
        self._effects.append(record.draining)

    def _drain_done(self, drain: e.Drain) -> None:
        record = self._sending.get(drain.key)
        if record is None:
            self._say(drain.peer, Drained(drain.key, 0))
        elif record.draining == drain:
            record.let_go(self._pages)
            self._bury_if_over(record)

    def _bury_if_over(self, record: Sending) -> None:
        if record.drained and record.answered:
            self._say(record.peer, Drained(record.key, 0))
            self._bury(record)

    def _bury(self, record: Sending) -> None:
        assert record.drained and record.ended
        del self._sending[record.key]
        self._tombstones.bury(record.key, Cancelled.code, self._now_s)

    def _move(self, record: Sending, new: State) -> None:
        assert new in ALLOWED[record.state], (record.key, record.state, new)
        self._counters.moved(record.state, new)
        record.state = new
        record.moved_s = self._now_s

    # --- peers and time --------------------------------------------------------------------------------------

    def _session_up(self, peer: WorkerId) -> None:
        """It may have missed anything: say again what it has not acknowledged."""
        self._liveness.up(peer, self._now_s)
        for record in self._of(peer):
            self._say_again(record)

    def _say_again(self, record: Sending) -> None:
        if record.state is State.QUEUED and record.said_s <= self._now_s:
            self._ask(record)
        for message in record.outbox.unheard():
            record.said_s = self._now_s
            self._say(record.peer, message)

    def _lose(self, peer: WorkerId, error: BatonError) -> None:
        self._liveness.forget(peer)
        for record in self._of(peer):
            if not record.ended:
                self._end(record, State.ABORTED, error, answered=True, drain=False)
            record.answered = True
        self._effects += [e.HangUp(peer), e.Forget(peer)]

    def _forgotten(self, peer: WorkerId) -> None:
        for record in self._of(peer):
            if record.ended:
                record.let_go(self._pages)
                self._bury_if_over(record)

    def _of(self, peer: WorkerId) -> list[Sending]:
        return [record for record in self._sending.values() if record.peer == peer]

    def _tick(self) -> None:
        now_s = self._now_s
        for peer in self._liveness.due(now_s):
            self._renewals += 1
            self._say(peer, Renew(self._renewals))
        if self._liveness.tick_is_late(now_s):
            return
        for peer in self._liveness.lost(now_s):
            self._lose(peer, PeerLost(f"{peer} was not heard any more"))
        for record in list(self._sending.values()):
            self._tick_one(record)
        self._tombstones.expire(now_s)

    def _tick_one(self, record: Sending) -> None:
        if record.ended:
            if record.drained and self._now_s - record.moved_s > self._deadlines.closing_s:
                self._bury(record)  # the receiver never answered: it holds nothing of ours, nor we of its
                return
        elif (error := record.overdue(self._now_s, self._deadlines)) is not None:
            self._give_up(record.key, error)
            return
        if self._now_s - record.said_s > self._deadlines.resend_s:
            self._say_again(record)
