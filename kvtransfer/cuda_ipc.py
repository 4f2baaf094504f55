"""Bytes between two processes of one host whose pools lie on devices: the receiver opens the source's block (CUDA IPC).

Pages are copied from device memory to device memory, all of a fetch in one launch on a stream of this transport's own,
and digested where they have landed. The source's epochs are mapped from its host memory. They are read before a copy
is launched and again when the device has finished it, as under a sequence lock: a page that was given up meanwhile is
stale, whatever its bytes say. The source bumps an epoch before it launches what writes into the page again.

A copy that was launched is waited for, also when its fetch was cancelled or its peer forgotten: a launch cannot be
taken back. Each launch is bounded, and between two of them a fetch that nobody wants any more ends.

When the source dies, the receiver goes on reading what it has mapped: the driver keeps memory until the last process
that has it mapped lets go. That is how drivers behave, and no promise of CUDA's documentation, which leaves undefined
what happens when an exporter frees memory that is still open elsewhere. So a worker never frees its block: it ends.

Never run on a GPU, and not measured. Tests run it over `device_in_memory`.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence

from core.errors import HandoffError, PeerLost
from kvtransfer.device_memory import PageCopy
from kvtransfer.digest import SegmentDigest
from kvtransfer.frames import EPOCH_BYTES, PROOF_FRAMES, Frames, epochs_offset
from kvtransfer.mapped import MappedTransport, Stopped, out_of_bounds, stale
from kvtransfer.shm_socket import Lent, PoolAddress
from kvtransfer.transport import Arrival, Piece

LAUNCH_BYTES = 512 << 20  # copied by one launch: about a third of a millisecond in an H200's memory, by its data sheet


class CudaIpcTransport(MappedTransport):
    """Serves pools on a device alone. `launch_bytes`: what one launch copies at most, whole pages and at least one."""

    def __init__(
        self,
        *,
        token: Callable[[int], bytes] = os.urandom,
        patience_s: float = 5.0,
        check_epoch: bool = True,
        launch_bytes: int = LAUNCH_BYTES,
    ) -> None:
        def map_pool(lent: Lent, address: PoolAddress, frames: Frames, digest: SegmentDigest) -> _Mapping:
            return _Mapping(lent, address, frames, digest, check_epoch, launch_bytes)

        super().__init__("cuda", map_pool, token=token, patience_s=patience_s, threads=1)

    async def serve(self, frames: Frames, digest: SegmentDigest) -> None:
        assert frames.block is not None, "the pages are to lie on a device"
        await super().serve(frames, digest)


class _Mapping:
    """A peer's block and its epochs, opened, and our own pool."""

    def __init__(
        self,
        lent: Lent,
        address: PoolAddress,
        ours: Frames,
        digest: SegmentDigest,
        check_epoch: bool,
        launch_bytes: int,
    ) -> None:
        assert ours.device is not None and ours.block is not None
        if not lent.handle:
            raise PeerLost("the peer's device does not export its memory to other processes")
        self._pages = address.pages
        self._ours, self._device, self._target = ours, ours.device, ours.block
        self._digest = digest
        self._check_epoch = check_epoch
        self._per_launch = max(1, launch_bytes // address.page_bytes)
        frames = address.pages + PROOF_FRAMES
        self._memory = mmap.mmap(lent.fd, address.size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        try:
            self._source = self._device.open(lent.handle, frames * address.page_bytes)
        except HandoffError:
            self._memory.close()
            raise
        at = epochs_offset(address.pages, 0)
        with memoryview(self._memory) as whole:
            self._epochs = whole[at : at + frames * EPOCH_BYTES].cast("Q")

    def fetch(self, pieces: Sequence[Piece], proof: bool, stopped: Stopped) -> list[Arrival]:
        """Launch after launch, and over after the one that runs when it is stopped."""
        arrivals: list[Arrival] = []
        for first in range(0, len(pieces), self._per_launch):
            if stopped():
                raise PeerLost("stopped")
            arrivals += self._fetch(pieces[first : first + self._per_launch], proof)
        return arrivals

    def _fetch(self, pieces: Sequence[Piece], proof: bool) -> list[Arrival]:
        """One launch for the pages, one for their digests; what cannot be copied, or was given up, is said."""
        failed = [out_of_bounds(piece, self._pages, self._ours, proof) or self._stale(piece) for piece in pieces]
        sound = [piece for piece, error in zip(pieces, failed, strict=True) if error is None]
        if sound:
            copies = [PageCopy(piece.source_page, piece.target_page) for piece in sound]
            self._device.copy(self._source, self._target, self._ours.layout.page_bytes, copies)
        failed = [error or self._stale(piece) for piece, error in zip(pieces, failed, strict=True)]
        arrived = [piece.target_page for piece, error in zip(pieces, failed, strict=True) if error is None]
        digests = iter(self._ours.digests(arrived, self._digest))
        return [next(digests) if error is None else error for error in failed]

    def _stale(self, piece: Piece) -> HandoffError | None:
        found = self._epochs[piece.source_page]
        return stale(piece, found) if self._check_epoch and found != piece.epoch else None

    def close(self) -> None:
        self._epochs.release()
        self._memory.close()
        self._device.close(self._source)
