"""The receiver's end in a running worker: it does what `ReceiverEnd` asks for, on one event loop.

    receiver.expect(key, prompt_ids, ...)     a request was submitted, and its prompt comes from a peer
    on_commit(key, pages, tokens, ...)        the pages are the request's; or, once and instead,
    on_abort(key, error, blames)              nothing is held for it any more

Every method is called on the loop's thread and returns at once. Nothing here looks at the wall clock or draws chance
of its own, so that a simulation can run it under virtual time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from core.clock import Clock
from core.errors import BatonError, Cancelled, HandoffError, PeerLost
from core.messages import Peer, Receipt, Token, WorkerId
from kvtransfer import events as e
from kvtransfer import fingerprint as prints
from kvtransfer.chores import Chores
from kvtransfer.intake import Guards
from kvtransfer.liveness import Timing
from kvtransfer.messages import HandoffKey, Open, ToReceiver
from kvtransfer.places import places_of
from kvtransfer.ports import Counters, NoCounters, Pages, Reservations, Sessions
from kvtransfer.receiver import ReceiverEnd
from kvtransfer.transport import Arrival, Transport

log = logging.getLogger(__name__)


class OnCommit(Protocol):
    def __call__(
        self,
        key: HandoffKey,
        pages: tuple[int, ...],  # by position; owned by the request now
        tokens: tuple[Token, ...],
        receipt: Receipt,
        exposed_transfer_s: float,
    ) -> None: ...


class OnAbort(Protocol):
    def __call__(self, key: HandoffKey, error: BatonError, blames: WorkerId | None) -> None: ...


@dataclass(frozen=True, slots=True)
class Outcomes:
    """Where a hand-off's one end is told."""

    on_commit: OnCommit
    on_abort: OnAbort


class HandoffReceiver:
    """`transport.serve(frames)` has been called, so that fetches have somewhere to land."""

    def __init__(
        self,
        *,
        me: WorkerId,
        fingerprint: prints.Fingerprint,
        pages: Pages,
        reservations: Reservations,
        transport: Transport,
        clock: Clock,
        outcomes: Outcomes,
        counters: Counters | None = None,
        timing: Timing | None = None,
        guards: Guards | None = None,
    ) -> None:
        self.me = me
        self._fingerprint = fingerprint
        self._transport = transport
        self._clock = clock
        self._outcomes = outcomes
        self._timing = timing or Timing()
        self._end = ReceiverEnd(
            pages=pages,
            reservations=reservations,
            counters=counters or NoCounters(),
            timing=self._timing,
            page_bytes=fingerprint.layout.page_bytes,
            guards=guards,
        )
        self._fetches: dict[int, asyncio.Task[list[Arrival]]] = {}
        self._forgetting: dict[WorkerId, asyncio.Task[None]] = {}
        self._chores = Chores()
        self._sessions: Sessions | None = None

    def start(self, sessions: Sessions) -> None:
        """Begin, with the sessions that carry our messages; they bring in what peers say."""
        self._sessions = sessions
        self._chores.every(self._timing.lease.tick_s, self.tick, "hand-off receiver's clock")

    async def stop(self) -> None:
        """Nothing runs any more, and nothing of ours writes into the pool."""
        await self._chores.stop()
        fetches = list(self._fetches.values())
        for fetch in fetches:
            fetch.cancel()
        if fetches:
            await asyncio.wait(fetches)

    # --- what the decode service calls -----------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """No hand-off is under way, and none is being cleared away."""
        return self._end.idle

    def counts(self) -> dict[str, int]:
        """Hand-offs by state."""
        return self._end.counts()

    def expect(
        self,
        key: HandoffKey,
        prompt_ids: Sequence[int],
        block_hashes: Sequence[bytes],
        peer: Peer,
        deadline_s: float,
        *,
        loan: bool = False,
        ticket: bytes = b"",
    ) -> None:
        """`block_hashes` are those of the prompt's full pages, computed here. Loan, ticket: see events.Expect."""
        places = places_of(prompt_ids, block_hashes, self._fingerprint.layout.page_size)
        self._handle(e.Expect(key, peer.worker, places, deadline_s, loan, ticket))

    def cancel(self, key: HandoffKey, error: BatonError | None = None) -> None:
        """Also before it is expected: then it is aborted when it is."""
        self._handle(e.Cancel(key, error or Cancelled(f"{key} was cancelled")))

    # --- what the sessions call ------------------------------------------------------------------------------

    async def greet(self, message: Open) -> Open:
        """The answer to a session's first message. Raises FingerprintMismatch, or PeerLost when we are not meant."""
        if message.receiver != self.me:
            raise PeerLost(f"this is {self.me}, not {message.receiver}")
        prints.check(self._fingerprint, message.fingerprint)
        await self._forgotten(message.source)
        await self._transport.meet(message.source, message.descriptor)
        return Open(message.source, self.me, self._fingerprint, await self._transport.invite(message.source))

    def session_up(self, peer: WorkerId) -> None:
        self._handle(e.SessionUp(peer))

    def session_down(self, peer: WorkerId) -> None:
        self._handle(e.SessionDown(peer))

    def peer_gone(self, peer: WorkerId, error: BatonError) -> None:
        """It is known to be dead, or another incarnation has come in its place."""
        self._handle(e.PeerGone(peer, error))

    def receive(self, peer: WorkerId, message: ToReceiver) -> None:
        self._handle(e.FromSource(peer, message))

    # --- doing it --------------------------------------------------------------------------------------------

    def tick(self) -> None:
        self._handle(e.Tick())

    def _handle(self, event: e.ReceiverEvent) -> None:
        for effect in self._end.handle(event, self._clock()):
            self._do(effect)

    def _do(self, effect: e.ReceiverEffect) -> None:
        assert self._sessions is not None, "start first"
        match effect:
            case e.Send(peer, message):
                self._sessions.send(peer, message)
            case e.HangUp(peer):
                self._sessions.hang_up(peer)
            case e.Forget(peer):
                self._forgetting[peer] = self._chores.spawn(self._forget(peer), f"forget {peer}")
            case e.StartFetch():
                self._fetch(effect)
            case e.CancelFetch(operation):
                if operation in self._fetches:
                    self._fetches[operation].cancel()
            case e.Committed(key, pages, tokens, receipt, exposed_s):
                self._outcomes.on_commit(key, pages, tokens, receipt, exposed_s)
            case e.Aborted(key, error, blames):
                self._outcomes.on_abort(key, error, blames)

    def _fetch(self, start: e.StartFetch) -> None:
        fetching = self._transport.fetch(start.peer, start.stream, start.pieces)
        task = asyncio.get_running_loop().create_task(fetching, name=f"fetch {start.operation}")
        self._fetches[start.operation] = task

        # A callback, not an await around it: a task that is cancelled before it has begun runs no line of its own.
        def over(task: asyncio.Task[list[Arrival]]) -> None:
            del self._fetches[start.operation]
            self._handle(self._ended(start, task))

        task.add_done_callback(over)

    def _ended(self, start: e.StartFetch, task: asyncio.Task[list[Arrival]]) -> e.FetchEnded:
        if task.cancelled():
            error: BaseException | None = PeerLost(f"fetch {start.operation} was cancelled")
        else:
            error = task.exception()
        if error is None:
            return e.FetchEnded(start.operation, tuple(task.result()), None, settled=True)
        if not isinstance(error, HandoffError):
            log.error("fetch %d from %s failed", start.operation, start.peer, exc_info=error)
            error = PeerLost(f"the transport failed: {error!r}")
        return e.FetchEnded(start.operation, (), error, self._transport.settles_on_return)

    async def _forget(self, peer: WorkerId) -> None:
        await self._transport.forget(peer)
        self._forgetting.pop(peer, None)
        self._handle(e.Forgotten(peer))

    async def _forgotten(self, peer: WorkerId) -> None:
        """A peer that is being cut off is met again only when that is done."""
        if peer in self._forgetting:
            await asyncio.wait([self._forgetting[peer]])
