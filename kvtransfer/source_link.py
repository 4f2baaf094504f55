"""The source's end in a running worker: it does what `SourceEnd` asks for, on one event loop.

    grant = await source.offer(key, peer, ...)    pages are reserved at the receiver; compute now
    source.ready(key, pages)                      as they are written, chunk by chunk
    source.seal(key, tail, tokens, receipt)       the prompt is complete
    on_closed(key, outcome, error)                once for every grant

Every method is called on the loop's thread and returns at once. Nothing here looks at the wall clock or draws chance
of its own, so that a simulation can run it under virtual time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

from core.clock import Clock
from core.errors import BatonError, Cancelled, EngineError
from core.messages import Peer, Receipt, Token, WorkerId
from kvtransfer import events as e
from kvtransfer import fingerprint as prints
from kvtransfer.chores import Chores
from kvtransfer.digest import Digest, algorithm
from kvtransfer.frames import Frames
from kvtransfer.liveness import Timing
from kvtransfer.messages import Grant, HandoffKey, Open, PageEntry, ToSource
from kvtransfer.places import FilledPage
from kvtransfer.ports import Counters, Dialer, NoCounters, Offload, Pages
from kvtransfer.source import SourceEnd
from kvtransfer.states import State
from kvtransfer.transport import Transport

READY_BYTES = 128 << 10  # of one Ready; control messages are at most 256 KiB
ENTRY_BYTES = 64  # of a page's entry on the wire beside its digests, at most

OnClosed = Callable[[HandoffKey, State, BatonError | None], None]


def pages_per_ready(digests_bytes: int) -> int:
    """How many pages one Ready names, when each has so many bytes of digests."""
    return max(1, READY_BYTES // (ENTRY_BYTES + digests_bytes))


class HandoffSource:
    """`transport.serve(frames, ...)` has been called."""

    def __init__(
        self,
        *,
        me: WorkerId,
        fingerprint: prints.Fingerprint,
        pages: Pages,
        frames: Frames,
        transport: Transport,
        clock: Clock,
        random: Random,
        offload: Offload[tuple[PageEntry, ...]],
        on_closed: OnClosed,
        counters: Counters | None = None,
        timing: Timing | None = None,
        digest: Digest | None = None,
    ) -> None:
        """`digest`: the one that the fingerprint names; to be given when it is keyed."""
        self.me = me
        self._fingerprint = fingerprint
        self._frames, self._transport, self._clock = frames, transport, clock
        self._offload = offload
        self._on_closed = on_closed
        self._timing = timing or Timing()
        self._digest = digest or Digest(fingerprint.digest, algorithm(fingerprint.digest))
        assert self._digest.name == fingerprint.digest, (self._digest.name, fingerprint.digest)
        self._end = SourceEnd(
            pages=pages,
            pool_pages=frames.pages,
            page_size=frames.layout.page_size,
            random=random,
            counters=counters or NoCounters(),
            timing=self._timing,
            pages_per_ready=pages_per_ready(self._digest.width * frames.layout.kv_heads),
        )
        self._offers: dict[HandoffKey, asyncio.Future[Grant]] = {}
        self._granted: set[HandoffKey] = set()
        self._known: dict[int, PageEntry] = {}  # by page: digests, computed once per content
        # Each entry leases a page or seals a hand-off, so the pool bounds the queue.
        self._digests: asyncio.Queue[e.Digest] = asyncio.Queue(maxsize=16 * frames.pages)
        self._forgetting: dict[WorkerId, asyncio.Task[None]] = {}
        self._chores = Chores()
        self._dialer: Dialer | None = None

    def start(self, dialer: Dialer) -> None:
        """Begin, with the sessions that carry our messages; they bring back what peers say."""
        self._dialer = dialer
        self._chores.every(self._timing.lease.tick_s, self.tick, "hand-off source's clock")
        self._chores.spawn(self._compute_digests(), "hand-off digests")

    async def stop(self) -> None:
        """Nothing runs any more. Offers that wait are cancelled."""
        await self._chores.stop()
        for offer in self._offers.values():
            offer.cancel()

    # --- what the prefill service calls ----------------------------------------------------------------------

    @property
    def accepts_prefill(self) -> bool:
        """False while too many sealed pages wait to be fetched."""
        return self._end.accepts_prefill

    @property
    def idle(self) -> bool:
        """No hand-off is under way, and none is being cleared away."""
        return self._end.idle

    def counts(self) -> dict[str, int]:
        """Hand-offs by state."""
        return self._end.counts()

    def meet(self, peer: Peer) -> None:
        """Begin the session with a peer to whom a prompt will be offered when its turn has come."""
        self._handle(e.Meet(peer))

    async def offer(
        self, key: HandoffKey, peer: Peer, prompt_tokens: int, choices: int, deadline_s: float, ticket: bytes = b""
    ) -> Grant:
        """Ask the receiver for pages, until it has them. It is shown the ticket, and must have the same.

        Raises NoCapacity at the deadline, PeerLost, FingerprintMismatch, Cancelled, or what the receiver refused with.
        """
        assert key not in self._offers, key
        answer: asyncio.Future[Grant] = asyncio.get_running_loop().create_future()
        self._offers[key] = answer
        try:
            self._handle(e.Offer(key, peer, prompt_tokens, choices, deadline_s, ticket))
            return await answer
        except asyncio.CancelledError:
            self._granted.discard(key)  # the caller has gone: nobody waits for on_closed
            self.cancel(key)
            raise
        finally:
            del self._offers[key]

    def decline(self, key: HandoffKey, peer: Peer, error: BatonError) -> None:
        """There will be nothing to offer: so that the receiver need not wait."""
        self._handle(e.Offer(key, peer, 0, 0, self._timing.deadlines.closing_s))
        self.fail(key, error)

    def ready(self, key: HandoffKey, pages: Sequence[FilledPage]) -> None:
        """These full pages have been written. They are leased from now on."""
        self._handle(e.Filled(key, tuple(pages)))

    def seal(self, key: HandoffKey, tail: FilledPage | None, tokens: Sequence[Token], receipt: Receipt) -> None:
        """The prompt is complete. `tail`: its partly filled last page, zeroed past its end (places.tail_hash)."""
        self._handle(e.Seal(key, tail, tuple(tokens), receipt))

    def fail(self, key: HandoffKey, error: BatonError) -> None:
        self._handle(e.GiveUp(key, error))

    def cancel(self, key: HandoffKey) -> None:
        """Also before it is offered: then the offer fails."""
        self.fail(key, Cancelled(f"{key} was cancelled"))

    # --- what the sessions call ------------------------------------------------------------------------------

    async def opening(self, peer: WorkerId) -> Open:
        """The first message of a session."""
        await self._forgotten(peer)
        return Open(self.me, peer, self._fingerprint, await self._transport.invite(peer))

    async def answered(self, answer: Open) -> None:
        """The receiver's first message. Raises FingerprintMismatch, or HandoffError."""
        prints.check(self._fingerprint, answer.fingerprint)
        await self._transport.meet(answer.receiver, answer.descriptor)

    def session_up(self, peer: WorkerId) -> None:
        self._handle(e.SessionUp(peer))

    def session_down(self, peer: WorkerId) -> None:
        self._handle(e.SessionDown(peer))

    def peer_gone(self, peer: WorkerId, error: BatonError) -> None:
        """It refused us, or is another incarnation now."""
        self._handle(e.PeerGone(peer, error))

    def receive(self, peer: WorkerId, message: ToSource) -> None:
        self._handle(e.FromReceiver(peer, message))

    # --- doing it --------------------------------------------------------------------------------------------

    def tick(self) -> None:
        self._handle(e.Tick())

    def _handle(self, event: e.SourceEvent) -> None:
        for effect in self._end.handle(event, self._clock()):
            self._do(effect)

    def _do(self, effect: e.SourceEffect) -> None:
        assert self._dialer is not None, "start first"
        match effect:
            case e.Send(peer, message):
                self._dialer.send(peer, message)
            case e.Dial(peer_and_endpoint):
                self._dialer.dial(peer_and_endpoint)
            case e.HangUp(peer):
                self._dialer.hang_up(peer)
            case e.Forget(peer):
                self._forgetting[peer] = self._chores.spawn(self._forget(peer), f"forget {peer}")
            case e.Digest():
                self._digests.put_nowait(effect)
            case e.Drain():
                self._chores.spawn(self._drain(effect), f"drain {effect.key}")
            case e.Later(pause_s, event):
                asyncio.get_running_loop().call_later(pause_s, self._handle, event)
            case e.Granted(grant):
                self._grant(grant)
            case e.Closed(key, outcome, error):
                self._close(key, outcome, error)

    def _grant(self, grant: Grant) -> None:
        offer = self._offers.get(grant.key)
        if offer is None or offer.done():
            self.cancel(grant.key)
        else:
            self._granted.add(grant.key)
            offer.set_result(grant)

    def _close(self, key: HandoffKey, outcome: State, error: BatonError | None) -> None:
        offer = self._offers.get(key)
        if key in self._granted:
            self._granted.discard(key)
            self._on_closed(key, outcome, error)
        elif offer is not None and not offer.done():
            offer.set_exception(error or Cancelled(f"{key} is over"))

    async def _drain(self, effect: e.Drain) -> None:
        await self._transport.drain(effect.peer, effect.stream)
        self._handle(e.DrainDone(effect))

    async def _forget(self, peer: WorkerId) -> None:
        await self._transport.forget(peer)
        self._forgetting.pop(peer, None)
        self._handle(e.Forgotten(peer))

    async def _forgotten(self, peer: WorkerId) -> None:
        """A peer that is being cut off is met again only when that is done."""
        if peer in self._forgetting:
            await asyncio.wait([self._forgetting[peer]])

    async def _compute_digests(self) -> None:
        """One at a time, in the order of asking: Sealed is said after the last Ready."""
        while True:
            asked = await self._digests.get()
            try:
                entries = await self._offload(lambda asked=asked: self._with_digests(asked))  # type: ignore[misc]
            except Exception as error:  # noqa: BLE001  (one hand-off's failure is not that of the others)
                self.fail(asked.key, EngineError(f"no digest: {error!r}"))
                continue
            if asked.seal is None:  # a tail may still grow
                self._known.update((entry.page, entry) for entry in entries)
            self._handle(e.Digested(asked.key, entries, asked.seal))

    def _with_digests(self, asked: e.Digest) -> tuple[PageEntry, ...]:
        """Off the loop. A page that was handed over before keeps the digests that it had then."""
        digests: dict[int, bytes] = {}
        for entry in asked.entries:
            known = self._known.get(entry.page)
            if known is not None and (known.epoch, known.block_hash) == (entry.epoch, entry.block_hash):
                digests[entry.page] = known.digests
        new = [entry.page for entry in asked.entries if entry.page not in digests]
        digests.update(zip(new, self._frames.digests(new, self._digest.of), strict=True))
        return tuple(replace(entry, digests=digests[entry.page]) for entry in asked.entries)
