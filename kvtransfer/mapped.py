"""A transport whose receiver maps the source's pool and copies out of it: the connections, the copying thread, the end.

How a pool is mapped, and how its pages are copied and digested, is the business of `shm` and `cuda_ipc`. Here is what
the two have in common: who is met and asked for a pool, that copies run off the event loop, that a cancelled fetch and
a peer that is forgotten wait until no copy of theirs runs, and that only then a mapping is closed.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from core.errors import HandoffError, OutOfBounds, PeerLost, StalePage
from core.messages import WorkerId
from kvtransfer.digest import SegmentDigest
from kvtransfer.frames import Frames, check_source
from kvtransfer.shm_socket import TOKEN_BYTES, Lent, PoolAddress, PoolSocket, ask_for_pool
from kvtransfer.transport import PROOF_STREAM, Arrival, Piece

Stopped = Callable[[], bool]
T = TypeVar("T")


class Mapping(Protocol):
    """A peer's pool. Belongs to the copying thread once it is made."""

    def fetch(self, pieces: Sequence[Piece], proof: bool, stopped: Stopped) -> list[Arrival]:
        """Copy, and say what arrived. Raises PeerLost, soon when it is stopped; on return nothing is written."""
        ...

    def close(self) -> None: ...


Map = Callable[[Lent, PoolAddress, Frames, SegmentDigest], Mapping]  # in the copying thread; raises HandoffError


def stale(piece: Piece, found: int) -> StalePage:
    return StalePage(f"page {piece.source_page} is at epoch {found}, not {piece.epoch}")


def out_of_bounds(piece: Piece, pages: int, ours: Frames, proof: bool) -> OutOfBounds | None:
    """Why a piece must not be copied out of a pool of so many pages into ours, if it must not."""
    try:
        check_source(piece.source_page, pages, proof=proof)
        ours.check_target(piece.target_page, proof=proof)
    except OutOfBounds as error:
        return error
    return None


@dataclass(slots=True)
class _Connection:
    """What we have of one peer: its pool, once it has been had, and the copies that are running."""

    opening: asyncio.Task[Mapping]
    stop: threading.Event = field(default_factory=threading.Event)  # set when the peer is forgotten
    copies: set[asyncio.Future[list[Arrival]]] = field(default_factory=set)


class MappedTransport:
    """`token` and the socket's name come from the worker's own source of randomness; both are secrets among workers."""

    settles_on_return = True

    def __init__(
        self, name: str, map_pool: Map, *, token: Callable[[int], bytes], patience_s: float, threads: int
    ) -> None:
        self.name = name
        self._map_pool = map_pool
        self._random_bytes = token
        self._patience_s = patience_s
        self._frames: Frames | None = None
        self._socket: PoolSocket | None = None
        self._digest: SegmentDigest
        self._addresses: dict[WorkerId, PoolAddress] = {}
        self._connections: dict[WorkerId, _Connection] = {}
        self._thread = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="baton-copy")

    async def serve(self, frames: Frames, digest: SegmentDigest) -> None:
        assert self._socket is None, "one pool per transport"
        self._frames = frames
        self._digest = digest
        name = f"baton-{self._random_bytes(TOKEN_BYTES).hex()}"
        self._socket = PoolSocket(frames, name=name, token=self._random_bytes(TOKEN_BYTES))

    async def invite(self, peer: WorkerId) -> bytes:
        assert self._socket is not None, "serve first"
        return self._socket.address.encode()

    async def meet(self, peer: WorkerId, descriptor: bytes) -> None:
        self._addresses[peer] = PoolAddress.decode(descriptor)

    async def fetch(self, peer: WorkerId, stream: int, pieces: Sequence[Piece]) -> list[Arrival]:
        connection = self._connections.get(peer) or self._connect(peer)
        if not connection.opening.done():
            await asyncio.wait([connection.opening])  # not awaited itself: our cancel is not that of the others
        if connection.stop.is_set():
            raise PeerLost(f"{peer} was cut off")
        mapping = connection.opening.result()
        cancelled, forgotten = threading.Event(), connection.stop

        def stopped() -> bool:
            return cancelled.is_set() or forgotten.is_set()

        job = self._thread.submit(mapping.fetch, tuple(pieces), stream == PROOF_STREAM, stopped)
        copying = asyncio.wrap_future(job)
        connection.copies.add(copying)
        try:
            return await _finished(job, copying, cancelled)
        finally:
            connection.copies.discard(copying)

    # --- connections -------------------------------------------------------------------------------------------

    def _connect(self, peer: WorkerId) -> _Connection:
        address = self._addresses.get(peer)
        if address is None:
            raise PeerLost(f"{peer} was never met")
        opening = asyncio.get_running_loop().create_task(self._open(address))
        connection = self._connections[peer] = _Connection(opening)

        def opened(task: asyncio.Task[Mapping]) -> None:
            failed = task.cancelled() or task.exception() is not None
            if failed and self._connections.get(peer) is connection:
                del self._connections[peer]  # the next fetch tries again

        opening.add_done_callback(opened)
        return connection

    async def _open(self, address: PoolAddress) -> Mapping:
        frames = self._frames
        assert frames is not None, "serve first: fetches need somewhere to land"
        if address.page_bytes != frames.layout.page_bytes:
            raise HandoffError(f"pages of {address.page_bytes} bytes there, {frames.layout.page_bytes} here")
        if address.on_device != (frames.block is not None):
            raise HandoffError("one of the two pools is on a device, and the other is not")
        lent = await ask_for_pool(address, self._patience_s)
        job = self._thread.submit(self._map, lent, address, frames)
        mapped = asyncio.wrap_future(job)
        try:
            return await asyncio.shield(mapped)
        except asyncio.CancelledError:
            await _over(mapped)
            if mapped.exception() is None:
                await asyncio.wrap_future(self._thread.submit(mapped.result().close))
            raise

    def _map(self, lent: Lent, address: PoolAddress, frames: Frames) -> Mapping:
        try:
            return self._map_pool(lent, address, frames, self._digest)
        finally:
            os.close(lent.fd)

    # --- the end -----------------------------------------------------------------------------------------------

    async def drain(self, peer: WorkerId, stream: int) -> None:
        """Nothing to wait for: only the receiver's own thread writes into its pages."""

    async def forget(self, peer: WorkerId) -> None:
        self._addresses.pop(peer, None)
        connection = self._connections.pop(peer, None)
        if connection is None:
            return
        connection.stop.set()
        connection.opening.cancel()
        await asyncio.wait([connection.opening])
        if connection.copies:
            await asyncio.wait(connection.copies)
        if not connection.opening.cancelled() and connection.opening.exception() is None:
            unmap = connection.opening.result().close
            await asyncio.get_running_loop().run_in_executor(self._thread, unmap)

    async def close(self) -> None:
        for peer in list(self._connections):
            await self.forget(peer)
        if self._socket is not None:
            await self._socket.close()
            self._socket = None
        self._thread.shutdown(wait=True)


async def _finished(
    job: Future[list[Arrival]], copying: asyncio.Future[list[Arrival]], cancelled: threading.Event
) -> list[Arrival]:
    """The result of a copy. Cancelled, it still waits for the thread to leave our pages alone."""
    try:
        return await asyncio.shield(copying)
    except asyncio.CancelledError:
        cancelled.set()
        job.cancel()  # when it has not begun, it never will
        await _over(copying)
        if not copying.cancelled():
            copying.exception()  # seen
        raise


async def _over(running: asyncio.Future[T]) -> None:
    """Wait until it has ended; cancelled again, the answer is the same."""
    while not running.done():
        try:
            await asyncio.wait([running])
        except asyncio.CancelledError:
            continue
