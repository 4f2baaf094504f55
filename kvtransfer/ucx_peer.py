"""One peer incarnation: its worker, the endpoint to its worker, and who handles what arrives.

The worker is made when the peer is invited, the endpoint when it is met. A peer that breaks a rule, stalls, or does
not let go of a page that is being filled is cut off: endpoint and worker are destroyed first, and only then are its
fetches told. Belongs to the UCX thread, but for `lost` and `met`.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from core.clock import Clock
from core.errors import ConfigError, HandoffError, PeerLost
from core.messages import WorkerId
from kvtransfer.ucx_answering import Answering
from kvtransfer.ucx_asking import Asking, Fetch, Pool
from kvtransfer.ucx_calls import Request
from kvtransfer.ucx_library import Context, Endpoint, Message, Region, Worker
from kvtransfer.ucx_thread import ProgressThread
from kvtransfer.ucx_wire import (
    MAX_MESSAGE_BYTES,
    Ask,
    Control,
    Descriptor,
    Verdict,
    decode,
    encode_asks,
    encode_verdicts,
)  # fmt: skip

log = logging.getLogger(__name__)

PROGRESS_TURNS = 8  # of UCX's in one of ours, while something moves: ours cost more
MAX_EARLY = 64  # control messages that came before their sender was met
SECRET_BYTES = 8


@dataclass(frozen=True, slots=True)
class Limits:
    """When a peer is too slow, and how much is under way at a time."""

    window_bytes: int = 8 << 20  # asked for at a time; more of it falls out of the cache before it is digested
    window_pages: tuple[int, int] = (2, 64)  # but at least and at most so many
    grace_s: float = 2.0  # without a byte, before the rate counts
    slowest_bytes_per_s: float = 20e6
    fetch_s: float = 120.0  # of one fetch, in all
    cancel_s: float = 0.1  # until a page that is being filled is full, after a cancel

    def window(self, page_bytes: int) -> int:
        """In pages."""
        least, most = self.window_pages
        return max(least, min(most, self.window_bytes // page_bytes))


@dataclass(frozen=True, slots=True)
class House:
    """What all peers of a transport share."""

    context: Context
    pool: Pool
    thread: ProgressThread
    clock: Clock
    random_bytes: Callable[[int], bytes]
    limits: Limits
    check_epoch: bool
    on_lanes: Callable[[WorkerId, tuple[str, ...]], None]  # raises HandoffError: cut the peer off

    def random(self, bits: int) -> int:
        return int.from_bytes(self.random_bytes(SECRET_BYTES)) >> (64 - bits)


class UcxPeer:
    def __init__(self, peer: WorkerId, house: House) -> None:
        self.peer = peer
        self.lost: HandoffError | None = None
        self.met: Descriptor | None = None
        self.fd = -1
        self._house = house
        self._nonce, self._control_tag = house.random(64), house.random(64)
        self._worker: Worker | None = None
        self._endpoint: Endpoint | None = None
        self._hearing: deque[tuple[Request, bytearray, int]] = deque()  # control messages that are arriving
        self._early: list[Control] = []
        self._before = -1  # the nonce of what the peer was before: what it still says is dropped
        self._landed_at_s = 0.0
        self._landed_bytes = 0
        self._lanes: tuple[str, ...] = ()
        window = house.limits.window(house.pool.frames.layout.page_bytes)
        self._asking = Asking(house.pool, house.random(32), window, self._say_asks)
        self._answering = Answering(house.pool, self._send, self._say_verdicts, house.check_epoch)

    # --- commands --------------------------------------------------------------------------------------------

    def invite(self) -> bytes:
        """Raises PeerLost when it was cut off, or when UCX has no room for another worker."""
        worker = self._open()
        layout = self._house.pool.frames.layout
        pages = self._house.pool.frames.pages
        return Descriptor(worker.address, self._nonce, self._control_tag, pages, layout.page_bytes).encode()

    def _open(self) -> Worker:
        self._check()
        if self._worker is None:
            try:
                self._worker = self._house.context.worker()
            except ConfigError as error:  # it was possible when we began to serve
                raise PeerLost(error.message) from None
            self.fd = self._worker.fd
            self._house.thread.add(self)
        return self._worker

    def _check(self) -> None:
        if self.lost is not None:
            raise PeerLost(f"{self.peer} was cut off: {self.lost}")

    def meet(self, theirs: Descriptor) -> None:
        """Raises HandoffError, PeerLost."""
        ours = self._house.pool.frames.layout.page_bytes
        if theirs.page_bytes != ours:
            raise HandoffError(f"pages of {theirs.page_bytes} bytes there, {ours} here")
        worker = self._open()
        if self._endpoint is not None:
            if theirs == self.met:
                return
            self._hang_up(PeerLost(f"{self.peer} began anew"))
            self._check()
        if self.met is not None and self.met.nonce != theirs.nonce:
            self._before = self.met.nonce
        self.met = theirs
        self._connect(worker, theirs)
        early, self._early = self._early, []
        for message in early:
            self._guard(lambda message=message: self._handle(message))  # type: ignore[misc]
        self._check()
        self._house.thread.rouse(self)

    def _connect(self, worker: Worker, theirs: Descriptor) -> None:
        self._endpoint = worker.connect(theirs.address)
        self._lanes = ()

    def start(self, fetch: Fetch) -> None:
        if self.lost is not None or self._endpoint is None:
            fetch.ended.set_exception(PeerLost(f"{self.peer} was cut off: {self.lost or 'the connection has failed'}"))
            return
        now_s = self._house.clock()
        if not self._asking.waiting:
            self._landed_at_s = now_s
        self._guard(lambda: self._asking.start(fetch, now_s))
        self._house.thread.rouse(self)

    def cancel(self, fetch: Fetch) -> None:
        self._guard(lambda: self._asking.give_up(fetch, PeerLost("cancelled"), self._house.clock()))
        self._house.thread.rouse(self)

    def drain(self, stream: int) -> Future[None]:
        return self._answering.drain(stream)

    def lanes(self) -> tuple[str, ...]:
        return self._endpoint.lanes() if self._endpoint is not None else ()

    def cut(self, error: HandoffError) -> None:
        """Endpoint and worker are destroyed: nothing of this peer can land. Then whoever waits is told."""
        if self.lost is not None:
            return
        self.lost = error
        self._house.thread.remove(self.fd)
        self._drop_endpoint()
        self._hearing.clear()
        if self._worker is not None:
            self._worker.close()
            self._worker = None
        self._tell(error)

    def _hang_up(self, error: HandoffError) -> None:
        """The endpoint goes. The worker, which the peer may be meeting again, goes too if it could still be written to.

        A page is written to only while its receive is posted; the connections on which that happens are the worker's.
        """
        if self._asking.filling or not self._drop_endpoint():
            self.cut(error)
        else:
            self._tell(error)

    def _drop_endpoint(self) -> bool:
        """Whether all that was under way over it is over."""
        endpoint, self._endpoint = self._endpoint, None
        return endpoint is None or endpoint.close()

    def _tell(self, error: HandoffError) -> None:
        self._asking.lost(error)
        self._answering.lost()

    # --- what the thread calls -------------------------------------------------------------------------------

    @property
    def waiting(self) -> bool:
        return self._asking.waiting

    def poll(self) -> bool:
        try:
            return self._progress()
        except HandoffError as error:
            self._break(error)
            return True

    def _guard(self, work: Callable[[], None]) -> None:
        """What breaks a rule costs the peer, and nobody else."""
        try:
            work()
        except HandoffError as error:
            self._break(error)

    def _break(self, error: HandoffError) -> None:
        if self.lost is None:
            log.warning("%s is cut off: %s", self.peer, error)
        self.cut(PeerLost(error.message))

    def _progress(self) -> bool:
        worker = self._worker
        if worker is None:
            return False
        moved = more = worker.progress()
        for _ in range(PROGRESS_TURNS):
            more = more and worker.progress()
        while (message := worker.probe()) is not None:
            moved = True
            self._take(message, worker)
        moved |= self._hear()
        if self._asking.poll():
            moved = True
            self._see_lanes()
        moved |= self._answering.poll()
        if self._endpoint is not None and not self._endpoint.alive:
            log.info("the connection to %s has failed", self.peer)
            self._hang_up(PeerLost(f"the connection to {self.peer} has failed"))
        return moved

    def _see_lanes(self) -> None:
        """Once a page has come they are final."""
        if not self._lanes and self._endpoint is not None:
            self._lanes = self._endpoint.lanes()
            self._house.on_lanes(self.peer, self._lanes)

    def rest(self) -> bool:
        return self._worker is None or self._worker.arm()

    def look(self, now_s: float) -> None:
        self._guard(lambda: self._look(now_s))

    def _look(self, now_s: float) -> None:
        limits = self._house.limits
        landed = self._asking.bytes_landed
        if landed != self._landed_bytes or not self._asking.waiting:
            self._landed_bytes, self._landed_at_s = landed, now_s
        page_s = self._house.pool.frames.layout.page_bytes / limits.slowest_bytes_per_s
        if now_s - self._landed_at_s > limits.grace_s + page_s:
            raise PeerLost(f"{self.peer} has stalled for {now_s - self._landed_at_s:.1f} s")
        if self._asking.overdue(now_s, limits.fetch_s, limits.cancel_s):
            raise PeerLost(f"{self.peer} goes on filling a page that nobody wants")

    # --- messages --------------------------------------------------------------------------------------------

    def _take(self, message: Message, worker: Worker) -> None:
        if message.tag != self._control_tag:
            self._asking.arrived(message, worker)
            return
        if message.length > MAX_MESSAGE_BYTES:
            self._asking.arrived(message, worker)  # which gets rid of it
            raise HandoffError(f"a control message of {message.length} bytes")
        heard = bytearray(MAX_MESSAGE_BYTES)
        self._hearing.append((worker.receive(message, Region.of(memoryview(heard))), heard, message.length))

    def _hear(self) -> bool:
        heard = False
        while self._hearing and self._hearing[0][0].done:
            request, buffer, length = self._hearing.popleft()
            heard = True
            if request.failed:
                raise PeerLost("a control message has broken off")
            self._handle(decode(bytes(buffer[:length])))
        return heard

    def _handle(self, message: Control) -> None:
        if message.nonce == self._before:
            return
        if self.met is None or message.nonce != self.met.nonce:
            self._early.append(message)  # of a worker that we have not met yet
            if len(self._early) > MAX_EARLY:
                raise HandoffError("too many messages from a worker that was never met")
        elif message.asks:
            if self._endpoint is None and self._worker is not None:
                self._connect(self._worker, self.met)  # it has hung up, and met us again before we saw the first
            self._answering.asked(message.stream, message.asks)
        else:
            self._asking.judged(message.verdicts)

    def _say_asks(self, stream: int, asks: Sequence[Ask]) -> None:
        self._say(encode_asks(self._nonce, stream, asks))

    def _say_verdicts(self, verdicts: Sequence[Verdict]) -> None:
        self._say(encode_verdicts(self._nonce, verdicts))

    def _say(self, message: bytes) -> None:
        if self.met is None:
            raise PeerLost(f"{self.peer} was never met")
        self._send(Region.of(memoryview(bytearray(message))), self.met.control_tag)

    def _send(self, region: Region, tag: int) -> Request:
        if self._endpoint is None:
            raise PeerLost(f"{self.peer} was cut off")
        return self._endpoint.send(region, tag)
