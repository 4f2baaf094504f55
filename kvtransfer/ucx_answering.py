"""The source's half of a pair: what is sent when a page is asked for, and what is said of it afterwards.

Bounds and epoch are checked before the send, and the epoch again when the page's bytes have left: a page that was
given up meanwhile is stale, whatever its bytes say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from core.errors import HandoffError, OutOfBounds
from kvtransfer.transport import PROOF_STREAM
from kvtransfer.ucx_asking import Pool
from kvtransfer.ucx_calls import Request
from kvtransfer.ucx_library import Region
from kvtransfer.ucx_wire import FAILED, MAX_ENTRIES, OUT_OF_BOUNDS, SENT, STALE, Ask, Verdict

MAX_SENDS = 1024  # of one peer at a time
LOOK_AHEAD = 4  # sends that are looked at in a turn


@dataclass(frozen=True, slots=True, eq=False)
class _Send:
    stream: int
    ask: Ask
    request: Request


class Answering:
    """`send` sends a page, `say` tells verdicts. Errors raised mean: cut the peer off."""

    def __init__(
        self,
        pool: Pool,
        send: Callable[[Region, int], Request],
        say: Callable[[Sequence[Verdict]], None],
        check_epoch: bool,
    ) -> None:
        self._pool = pool
        self._send = send
        self._say = say
        self._check_epoch = check_epoch
        self._sends: list[_Send] = []
        self._drains: list[tuple[int, Future[None]]] = []

    def asked(self, stream: int, asks: Sequence[Ask]) -> None:
        if len(self._sends) + len(asks) > MAX_SENDS:
            raise HandoffError(f"more than {MAX_SENDS} pages asked for at a time")
        refused = []
        for ask in asks:
            verdict = self._refusal(stream, ask)
            if verdict is None:
                self._sends.append(_Send(stream, ask, self._send(self._pool.page(ask.page), ask.tag)))
            else:
                refused.append(verdict)
        self._tell(refused)

    def _refusal(self, stream: int, ask: Ask) -> Verdict | None:
        frames = self._pool.frames
        try:
            frames.check_source(ask.page, proof=stream == PROOF_STREAM)
        except OutOfBounds:
            return Verdict(ask.tag, OUT_OF_BOUNDS, frames.pages)
        found = frames.epoch(ask.page)
        if self._check_epoch and found != ask.epoch:
            return Verdict(ask.tag, STALE, found)
        return None

    def poll(self) -> bool:
        over = self._over()
        if not over:
            return False
        for send in over:
            self._sends.remove(send)
        self._tell([self._judge(send) for send in over])
        self._release()
        return True

    def _over(self) -> list[_Send]:
        """Pages leave in about the order of their sends: the first few are looked at, each look costs."""
        over, unfinished = [], 0
        for send in self._sends:
            if send.request.done:
                over.append(send)
            elif (unfinished := unfinished + 1) == LOOK_AHEAD:
                break
        return over

    def _judge(self, send: _Send) -> Verdict:
        if send.request.failed:
            return Verdict(send.ask.tag, FAILED, 0)
        return self._refusal(send.stream, send.ask) or Verdict(send.ask.tag, SENT, 0)

    def _tell(self, verdicts: Sequence[Verdict]) -> None:
        for start in range(0, len(verdicts), MAX_ENTRIES):
            self._say(verdicts[start : start + MAX_ENTRIES])

    # --- how it ends -----------------------------------------------------------------------------------------

    def drain(self, stream: int) -> Future[None]:
        """Done when no send of this stream is under way."""
        drained: Future[None] = Future()
        self._drains.append((stream, drained))
        self._release()
        return drained

    def _release(self) -> None:
        busy = {send.stream for send in self._sends}
        over = [drained for stream, drained in self._drains if stream not in busy]
        self._drains = [(stream, drained) for stream, drained in self._drains if stream in busy]
        for drained in over:
            drained.set_result(None)

    def lost(self) -> None:
        """The endpoint is gone: nothing is sent any more."""
        self._sends.clear()
        self._release()
