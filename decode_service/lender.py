"""What a decode worker lends of its prefix cache: a conversation's history, to the prefill worker that goes on from it.

    lend -> offered under a name of its own --Grant--> pages held, ready, sealed --Close--> back in the cache
       `--nothing here: declined               `--refused, cancelled, the peer lost: nothing was held

No page is held while the peer is asked for room, and no token is waited for. A loan that fails costs the borrower the
computing that it would have done without us.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

from core.errors import BatonError, NoCapacity
from core.hashing import block_hashes, root_hash
from core.messages import Lend, Peer, Receipt, Token
from engine.engine import Engine
from kvtransfer.messages import Grant, HandoffKey
from kvtransfer.places import FilledPage
from kvtransfer.states import State

log = logging.getLogger(__name__)

LENT_SHARE = 2  # at most one in so many pages of the pool is lent at any time
MAX_LOANS = 64
PAGES_AT_ONCE = 16  # are named together: they move while the digests of the next ones are computed

Spawn = Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"]


class Source(Protocol):
    """The source end of the hand-off: kvtransfer.source_link.HandoffSource."""

    async def offer(
        self, key: HandoffKey, peer: Peer, prompt_tokens: int, choices: int, deadline_s: float, ticket: bytes = b""
    ) -> Grant: ...

    def decline(self, key: HandoffKey, peer: Peer, error: BatonError) -> None: ...

    def ready(self, key: HandoffKey, pages: Sequence[FilledPage]) -> None: ...

    def seal(self, key: HandoffKey, tail: FilledPage | None, tokens: Sequence[Token], receipt: Receipt) -> None: ...

    def fail(self, key: HandoffKey, error: BatonError) -> None: ...

    def cancel(self, key: HandoffKey) -> None: ...


class Lender:
    """Owned by the event loop's thread, like the engine."""

    def __init__(self, engine: Engine, identity: str, vocabulary: int, spawn: Spawn) -> None:
        self._engine = engine
        self._identity = identity
        self._vocabulary = vocabulary
        self._spawn = spawn
        self._asking: dict[HandoffKey, asyncio.Task[None]] = {}  # for room at the peer
        self._held: dict[HandoffKey, list[int]] = {}  # pages of the loans that were granted

    def attach(self, source: Source) -> None:
        """The hand-off's end, which calls `on_closed` and so is made after this."""
        self._source = source

    def lend(self, lend: Lend) -> None:
        """Offer what is here of it. Raises nothing: whoever asked computes what it does not get."""
        key = HandoffKey(lend.request_id, lend.attempt).history
        if key in self._asking or key in self._held:
            return  # asked twice
        hashes = self._hashes(lend)
        pool = self._engine.pool
        found = pool.lookup(hashes)
        if not found or len(self._asking) + len(self._held) >= MAX_LOANS:
            self._source.decline(key, lend.peer, NoCapacity("nothing of it is here, or too many are asking"))
            return
        pool.acquire(found)  # the most recently used now: they are still here when the grant comes
        pool.release_all(found)
        self._asking[key] = self._spawn(self._lend(key, lend, hashes[: len(found)]))

    def refuse(self, lend: Lend, error: BatonError) -> None:
        """The peer need not wait for it."""
        self._source.decline(HandoffKey(lend.request_id, lend.attempt).history, lend.peer, error)

    def cancel(self, key: HandoffKey) -> None:
        """Of the request's attempt: its loan has no use any more. Unknown ones are ignored."""
        loan = key.history
        if loan in self._asking or loan in self._held:
            self._source.cancel(loan)

    def on_closed(self, key: HandoffKey, outcome: State, error: BatonError | None) -> None:
        """The peer has the pages, or the loan has failed: ours go back to the cache."""
        asking = self._asking.pop(key, None)
        if asking is not None:
            asking.cancel()
        self._engine.pool.release_all(self._held.pop(key, []))

    async def _lend(self, key: HandoffKey, lend: Lend, hashes: list[bytes]) -> None:
        tokens = len(hashes) * self._engine.page_size
        try:
            grant = await self._source.offer(key, lend.peer, tokens, 0, lend.deadline_s, lend.ticket)
        except BatonError as error:
            log.info("the loan %s came to nothing: %s", key, error)
            return
        finally:
            self._asking.pop(key, None)
        self._hand_over(key, hashes, grant.prefix_pages)

    def _hand_over(self, key: HandoffKey, hashes: list[bytes], had: int) -> None:
        """All of it, but for the first pages, which the peer has: it was computed long ago."""
        pool = self._engine.pool
        pages = pool.lookup(hashes)
        held = sum(map(len, self._held.values())) + len(pages) - had
        if len(pages) < len(hashes) or held > pool.capacity // LENT_SHARE:
            self._source.fail(key, NoCapacity("the pages were given up meanwhile, or too many are lent"))
            return
        self._held[key] = pages[had:]
        pool.acquire(pages[had:])
        filled = [FilledPage(n, hashes[n], page) for n, page in enumerate(pages)][had:]
        for start in range(0, len(filled), PAGES_AT_ONCE):
            self._source.ready(key, filled[start : start + PAGES_AT_ONCE])
        self._source.seal(key, None, (), Receipt())

    def _hashes(self, lend: Lend) -> list[bytes]:
        """By the name of every whole page that is asked for; of what is no prompt of ours, none."""
        ids = lend.prompt_ids
        if not 0 <= min(ids) <= max(ids) < self._vocabulary:
            return []
        return block_hashes(root_hash(self._identity, salt=lend.salt), ids, self._engine.page_size)
