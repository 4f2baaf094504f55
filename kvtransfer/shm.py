"""Bytes between two processes of one host: the receiver maps the source's pool and copies out of it.

A page is copied and digested while it is in cache, by one thread off the event loop, with the GIL released. Its epoch
is read before and after the copy, as under a sequence lock: a page that was given up meanwhile is stale, whatever its
bytes say. (Both loads are of aligned 64-bit words, and the interpreter between them and the copy orders them.)
"""

from __future__ import annotations

import asyncio
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from core.errors import HandoffError, OutOfBounds, PeerLost, StalePage
from core.messages import WorkerId
from kvtransfer.digest import SegmentDigest, digest_page
from kvtransfer.frames import EPOCH_BYTES, PROOF_FRAMES, Frames, check_source, epochs_offset
from kvtransfer.shm_socket import TOKEN_BYTES, PoolAddress, PoolSocket, ask_for_pool
from kvtransfer.transport import PROOF_STREAM, Arrival, Piece

Bytes = npt.NDArray[np.uint8]


class _Mapping:
    """A peer's pool, mapped for reading. Belongs to the copying thread once it is made."""

    def __init__(self, fd: int, address: PoolAddress) -> None:
        self.address = address
        self._memory = mmap.mmap(fd, address.size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        at, frames = epochs_offset(address.pages, address.page_bytes), address.pages + PROOF_FRAMES
        bytes_ = np.frombuffer(self._memory, np.uint8, frames * address.page_bytes)
        self._rows: Bytes = bytes_.reshape(frames, address.page_bytes)
        with memoryview(self._memory) as whole:
            self._epochs = whole[at : at + frames * EPOCH_BYTES].cast("Q")

    def copy(self, piece: Piece, into: Bytes, check_epoch: bool) -> HandoffError | None:
        """The source page, which has been checked, into `into`, or why it must not be used."""
        page, epochs = piece.source_page, self._epochs
        if check_epoch and (found := epochs[page]) != piece.epoch:
            return _stale(piece, found)
        np.copyto(into, self._rows[page])
        if check_epoch and (found := epochs[page]) != piece.epoch:
            return _stale(piece, found)
        return None

    def close(self) -> None:
        """Takes milliseconds for each GiB that was read."""
        del self._rows
        self._epochs.release()
        self._memory.close()


def _stale(piece: Piece, found: int) -> StalePage:
    return StalePage(f"page {piece.source_page} is at epoch {found}, not {piece.epoch}")


@dataclass(slots=True)
class _Connection:
    """What we have of one peer: its pool, once it has been had, and the copies that are running."""

    opening: asyncio.Task[_Mapping]
    stop: threading.Event = field(default_factory=threading.Event)  # set when the peer is forgotten
    copies: set[asyncio.Future[list[Arrival]]] = field(default_factory=set)


class ShmTransport:
    """`token` and `name` come from the worker's own source of randomness; both are secrets among workers.

    `threads`: how many fetches copy at a time. A second thread gained less than a tenth where cores are shared.
    """

    name = "shm"
    settles_on_return = True

    def __init__(
        self,
        *,
        token: Callable[[int], bytes] = os.urandom,
        patience_s: float = 5.0,
        check_epoch: bool = True,
        threads: int = 1,
    ) -> None:
        self._random_bytes = token
        self._patience_s = patience_s
        self._check_epoch = check_epoch
        self._frames: Frames | None = None
        self._target: Bytes | None = None  # [frames, page_bytes]
        self._socket: PoolSocket | None = None
        self._digest: SegmentDigest
        self._addresses: dict[WorkerId, PoolAddress] = {}
        self._connections: dict[WorkerId, _Connection] = {}
        self._thread = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="baton-copy")

    async def serve(self, frames: Frames, digest: SegmentDigest) -> None:
        assert self._socket is None, "one pool per transport"
        self._frames = frames
        self._digest = digest
        self._target = np.frombuffer(frames.everything, np.uint8).reshape(-1, frames.layout.page_bytes)
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
        cancelled = threading.Event()
        stops, proof = (cancelled, connection.stop), stream == PROOF_STREAM
        job = self._thread.submit(self._copy, mapping, tuple(pieces), stops, proof)
        copying = asyncio.wrap_future(job)
        connection.copies.add(copying)
        try:
            return await _finished(job, copying, cancelled)
        finally:
            connection.copies.discard(copying)

    def _connect(self, peer: WorkerId) -> _Connection:
        address = self._addresses.get(peer)
        if address is None:
            raise PeerLost(f"{peer} was never met")
        opening = asyncio.get_running_loop().create_task(self._open(address))
        connection = self._connections[peer] = _Connection(opening)

        def opened(task: asyncio.Task[_Mapping]) -> None:
            failed = task.cancelled() or task.exception() is not None
            if failed and self._connections.get(peer) is connection:
                del self._connections[peer]  # the next fetch tries again

        opening.add_done_callback(opened)
        return connection

    async def _open(self, address: PoolAddress) -> _Mapping:
        assert self._frames is not None, "serve first: fetches need somewhere to land"
        if address.page_bytes != self._frames.layout.page_bytes:
            raise HandoffError(f"pages of {address.page_bytes} bytes there, {self._frames.layout.page_bytes} here")
        fd = await ask_for_pool(address, self._patience_s)
        try:
            return _Mapping(fd, address)
        finally:
            os.close(fd)

    def _copy(
        self, mapping: _Mapping, pieces: tuple[Piece, ...], stops: tuple[threading.Event, threading.Event], proof: bool
    ) -> list[Arrival]:
        """In the copying thread: page after page, and soon over when it is stopped."""
        arrivals: list[Arrival] = []
        cancelled, forgotten = stops
        for piece in pieces:
            if cancelled.is_set() or forgotten.is_set():
                raise PeerLost("stopped")
            arrivals.append(self._copy_page(mapping, piece, proof))
        return arrivals

    def _copy_page(self, mapping: _Mapping, piece: Piece, proof: bool) -> Arrival:
        frames, target = self._frames, self._target
        assert frames is not None and target is not None
        try:
            check_source(piece.source_page, mapping.address.pages, proof=proof)
            frames.check_target(piece.target_page, proof=proof)
        except OutOfBounds as error:
            return error
        failed = mapping.copy(piece, target[piece.target_page], self._check_epoch)
        return failed or digest_page(frames.everything, frames.layout, piece.target_page, self._digest)

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
        self._target = None
        self._thread.shutdown(wait=True)


async def _finished(
    job: Future[list[Arrival]], copying: asyncio.Future[list[Arrival]], cancelled: threading.Event
) -> list[Arrival]:
    """The result of a copy. Cancelled, it still waits for the thread to leave our pages alone: one page at most."""
    try:
        return await asyncio.shield(copying)
    except asyncio.CancelledError:
        cancelled.set()
        job.cancel()  # when it has not begun, it never will
        while not copying.done():
            try:
                await asyncio.wait([copying])
            except asyncio.CancelledError:
                continue  # cancelled again: the answer is the same
        if not copying.cancelled():
            copying.exception()  # seen
        raise
