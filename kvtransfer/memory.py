"""Bytes within one process, by the hardest transport there is: what tests and simulation run on.

A page moves in steps, in any order, with delays. A fetch that was cancelled, or whose source has died, may go on
writing rubbish into its target pages until the source drains that stream or one end forgets the other: a ghost.
Bytes may be flipped, and a page may be answered with another page's content. All of it is drawn from a seed; time is
the event loop's, so that a run under virtual time can be replayed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from core.errors import HandoffError, OutOfBounds, PeerLost, StalePage
from core.messages import WorkerId
from kvtransfer.digest import SegmentDigest, digest_page
from kvtransfer.frames import Frames
from kvtransfer.transport import PROOF_STREAM, Arrival, Piece


@dataclass(frozen=True, slots=True)
class Mischief:
    """How hard the fabric makes it. Shares are probabilities per page (corrupt, stale) or per fetch (hang)."""

    steps: int = 3  # a page moves in so many parts
    delay_s: float = 0.0005  # mean between two parts
    reorder: bool = True
    ghosts: bool = True
    ghost_delay_s: float = 0.01  # mean between two writes of a ghost
    corrupt: float = 0.0
    stale: float = 0.0
    hang: float = 0.0


CALM = Mischief(steps=1, delay_s=0.0, reorder=False, ghosts=False)


DESCRIPTOR = b"memory/1"


class _Operation:
    """One fetch in flight, or what is left of it: its ghost."""

    def __init__(self, receiver: WorkerId, source: WorkerId, stream: int, pieces: Sequence[Piece]) -> None:
        self.receiver = receiver
        self.source = source
        self.stream = stream
        self.pieces = tuple(pieces)
        self.lost = asyncio.Event()  # one end is gone: the fetch raises
        self.ghost: asyncio.Task[None] | None = None


class MemoryFabric:
    """What joins the transports of one process, and the place where faults are asked for."""

    def __init__(self, random: Random, mischief: Mischief = CALM, *, check_epoch: bool = True) -> None:
        self.mischief = mischief
        self._random = random
        self._check_epoch = check_epoch
        self._digest: SegmentDigest
        self._pools: dict[WorkerId, Frames] = {}
        self._operations: list[_Operation] = []

    def join(self, worker: WorkerId, frames: Frames, digest: SegmentDigest) -> None:
        self._pools[worker] = frames
        self._digest = digest  # one for all: their fingerprints are equal

    def kill(self, worker: WorkerId) -> None:
        """The worker dies without a word. What it was sending goes on arriving."""
        self._pools.pop(worker, None)
        for operation in self._operations:
            if worker in (operation.source, operation.receiver):
                operation.lost.set()

    def touched(self, receiver: WorkerId) -> set[int]:
        """Pages of this worker that something may still write into: what must not be reused."""
        mine = [operation for operation in self._operations if operation.receiver == receiver]
        return {piece.target_page for operation in mine for piece in operation.pieces}

    def cut(self, one: WorkerId, other: WorkerId | None = None, stream: int | None = None) -> None:
        """End what moves between two workers (or between one and all): under one stream, or everything."""
        for operation in list(self._operations):
            ends = {operation.source, operation.receiver}
            if one in ends and (other is None or other in ends) and stream in (None, operation.stream):
                operation.lost.set()
                self._end(operation)

    async def move(
        self, receiver: WorkerId, source: WorkerId, stream: int, pieces: Sequence[Piece]
    ) -> list[Arrival]:
        operation = _Operation(receiver, source, stream, pieces)
        self._operations.append(operation)
        try:
            arrivals = await self._carry(operation)
        except BaseException:  # cancelled or lost: either way the bytes may still be on their way
            self._haunt(operation)
            raise
        self._end(operation)
        return arrivals

    async def _carry(self, operation: _Operation) -> list[Arrival]:
        if self._random.random() < self.mischief.hang:
            await operation.lost.wait()
        admitted = [self._admit(operation, piece) for piece in operation.pieces]
        parts = [(n, part) for n in range(len(admitted)) for part in range(self.mischief.steps)]
        if self.mischief.reorder:
            self._random.shuffle(parts)
        for n, part in parts:
            await self._pause(operation)
            if not isinstance(admitted[n], HandoffError):
                self._write(operation, operation.pieces[n], part)
        return [
            found if isinstance(found, HandoffError) else self._arrived(operation, piece)
            for found, piece in zip(admitted, operation.pieces, strict=True)
        ]

    async def _pause(self, operation: _Operation) -> None:
        delay_s = self._random.uniform(0.0, 2.0) * self.mischief.delay_s
        if not operation.lost.is_set():
            await asyncio.sleep(delay_s)
        if operation.lost.is_set():
            raise PeerLost(f"{operation.source} is gone")

    def _pool(self, worker: WorkerId) -> Frames:
        found = self._pools.get(worker)
        if found is None:
            raise PeerLost(f"{worker} is gone")
        return found

    def _admit(self, operation: _Operation, piece: Piece) -> HandoffError | None:
        source, target = self._pool(operation.source), self._pool(operation.receiver)
        proof = operation.stream == PROOF_STREAM
        try:
            source.check_source(piece.source_page, proof=proof)
            target.check_target(piece.target_page, proof=proof)
        except OutOfBounds as error:
            return error
        return self._stale(source, piece)

    def _stale(self, source: Frames, piece: Piece) -> StalePage | None:
        found = source.epoch(piece.source_page)
        if self._check_epoch and found != piece.epoch:
            return StalePage(f"page {piece.source_page} is at epoch {found}, not {piece.epoch}")
        return None

    def _write(self, operation: _Operation, piece: Piece, part: int) -> None:
        source, target = self._pool(operation.source), self._pool(operation.receiver)
        page, size = piece.source_page, target.layout.page_bytes
        if self._random.random() < self.mischief.stale:
            page = self._random.randrange(source.pages)
        start, end = part * size // self.mischief.steps, (part + 1) * size // self.mischief.steps
        into = target.frame(piece.target_page)
        into[start:end] = source.frame(page)[start:end]
        if self._random.random() < self.mischief.corrupt:
            into[self._random.randrange(start, end)] ^= 1 << self._random.randrange(8)

    def _arrived(self, operation: _Operation, piece: Piece) -> Arrival:
        stale = self._stale(self._pool(operation.source), piece)
        if stale is not None:
            return stale
        target = self._pool(operation.receiver)
        return digest_page(target.everything, target.layout, piece.target_page, self._digest)

    # --- ghosts ----------------------------------------------------------------------------------------------

    def _haunt(self, operation: _Operation) -> None:
        """The fetch is over for its caller, and its bytes are not."""
        alive = operation in self._operations and operation.receiver in self._pools
        if alive and self.mischief.ghosts:
            operation.ghost = asyncio.get_running_loop().create_task(self._wander(operation))
        else:
            self._end(operation)

    async def _wander(self, operation: _Operation) -> None:
        while operation.receiver in self._pools:
            await asyncio.sleep(self._random.uniform(0.0, 2.0) * self.mischief.ghost_delay_s)
            target = self._pools.get(operation.receiver)
            pieces = [piece for piece in operation.pieces if target and _lands(target, operation.stream, piece)]
            if target is not None and pieces:
                into = target.frame(self._random.choice(pieces).target_page)
                into[self._random.randrange(len(into))] = self._random.randrange(256)

    def _end(self, operation: _Operation) -> None:
        if operation in self._operations:
            self._operations.remove(operation)
        if operation.ghost is not None:
            operation.ghost.cancel()


def _lands(target: Frames, stream: int, piece: Piece) -> bool:
    try:
        target.check_target(piece.target_page, proof=stream == PROOF_STREAM)
    except OutOfBounds:
        return False
    return True


class MemoryTransport:
    """One worker's end of a fabric."""

    name = "memory"
    settles_on_return = False

    def __init__(self, worker: WorkerId, fabric: MemoryFabric) -> None:
        self._worker = worker
        self._fabric = fabric
        self._met: set[WorkerId] = set()

    async def serve(self, frames: Frames, digest: SegmentDigest) -> None:
        self._fabric.join(self._worker, frames, digest)

    async def invite(self, peer: WorkerId) -> bytes:
        return DESCRIPTOR

    async def meet(self, peer: WorkerId, descriptor: bytes) -> None:
        if descriptor != DESCRIPTOR:
            raise HandoffError("not a descriptor of a worker of this process")
        self._met.add(peer)

    async def fetch(self, peer: WorkerId, stream: int, pieces: Sequence[Piece]) -> list[Arrival]:
        if peer not in self._met:
            raise PeerLost(f"{peer} was never met")
        return await self._fabric.move(self._worker, peer, stream, pieces)

    async def drain(self, peer: WorkerId, stream: int) -> None:
        self._fabric.cut(self._worker, peer, stream)

    async def forget(self, peer: WorkerId) -> None:
        self._met.discard(peer)
        self._fabric.cut(self._worker, peer)

    async def close(self) -> None:
        self._fabric.cut(self._worker)
