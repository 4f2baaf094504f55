"""Bytes between two processes of one host: the receiver maps the source's pool and copies out of it.

A page is copied and digested while it is in cache, by one thread off the event loop, with the GIL released. Its epoch
is read before and after the copy, as under a sequence lock: a page that was given up meanwhile is stale, whatever its
bytes say. (Both loads are of aligned 64-bit words, and the interpreter between them and the copy orders them.)
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from core.errors import HandoffError, PeerLost
from kvtransfer.digest import SegmentDigest, digest_page
from kvtransfer.frames import EPOCH_BYTES, PROOF_FRAMES, Frames, epochs_offset
from kvtransfer.mapped import MappedTransport, Stopped, out_of_bounds, stale
from kvtransfer.shm_socket import Lent, PoolAddress
from kvtransfer.transport import Arrival, Piece

Bytes = npt.NDArray[np.uint8]


class ShmTransport(MappedTransport):
    """`threads`: how many fetches copy at a time. A second thread gained less than a tenth where cores are shared."""

    def __init__(
        self,
        *,
        token: Callable[[int], bytes] = os.urandom,
        patience_s: float = 5.0,
        check_epoch: bool = True,
        threads: int = 1,
    ) -> None:
        def map_pool(lent: Lent, address: PoolAddress, frames: Frames, digest: SegmentDigest) -> _Mapping:
            return _Mapping(lent, address, frames, digest, check_epoch)

        super().__init__("shm", map_pool, token=token, patience_s=patience_s, threads=threads)


class _Mapping:
    """A peer's pool, mapped for reading, and our own."""

    def __init__(
        self, lent: Lent, address: PoolAddress, ours: Frames, digest: SegmentDigest, check_epoch: bool
    ) -> None:
        self._pages = address.pages
        self._ours = ours
        self._digest = digest
        self._check_epoch = check_epoch
        self._target: Bytes = np.frombuffer(ours.everything, np.uint8).reshape(-1, ours.layout.page_bytes)
        self._memory = mmap.mmap(lent.fd, address.size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        at, frames = epochs_offset(address.pages, address.page_bytes), address.pages + PROOF_FRAMES
        bytes_ = np.frombuffer(self._memory, np.uint8, frames * address.page_bytes)
        self._rows: Bytes = bytes_.reshape(frames, address.page_bytes)
        with memoryview(self._memory) as whole:
            self._epochs = whole[at : at + frames * EPOCH_BYTES].cast("Q")

    def fetch(self, pieces: Sequence[Piece], proof: bool, stopped: Stopped) -> list[Arrival]:
        """Page after page, and soon over when it is stopped."""
        arrivals: list[Arrival] = []
        for piece in pieces:
            if stopped():
                raise PeerLost("stopped")
            arrivals.append(self._fetch(piece, proof))
        return arrivals

    def _fetch(self, piece: Piece, proof: bool) -> Arrival:
        ours = self._ours
        failed = out_of_bounds(piece, self._pages, ours, proof) or self._copy(piece)
        return failed or digest_page(ours.everything, ours.layout, piece.target_page, self._digest)

    def _copy(self, piece: Piece) -> HandoffError | None:
        """The source page into the target, which have been checked, or why it must not be used."""
        page, epochs = piece.source_page, self._epochs
        if self._check_epoch and (found := epochs[page]) != piece.epoch:
            return stale(piece, found)
        np.copyto(self._target[piece.target_page], self._rows[page])
        if self._check_epoch and (found := epochs[page]) != piece.epoch:
            return stale(piece, found)
        return None

    def close(self) -> None:
        """Takes milliseconds for each GiB that was read."""
        del self._rows, self._target
        self._epochs.release()
        self._memory.close()
