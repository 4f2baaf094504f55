"""The two processes of each contender that needs nothing but Baton: its transports, a plain copy, a plain socket.

    python -m bench.transfer.ends KIND ROLE PAGE_BYTES POOL_BYTES

Times are taken in the receiver, around its first request and its last arrival.
"""

from __future__ import annotations

import asyncio
import mmap
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import uvloop

from bench.transfer.orders import End, obey
from bench.transfer.pools import IN_FLIGHT, Pair, fill, make_pool, walk, wrong_pages
from core.messages import WorkerId
from kvtransfer.digest import XXH3_64, SegmentDigest, algorithm
from kvtransfer.frames import Frames
from kvtransfer.shm import ShmTransport
from kvtransfer.transport import Piece, Transport

SOURCE, RECEIVER = "source", "receiver"
SOCKET_STEP_BYTES = 4 << 20
LENGTH = struct.Struct("!Q")
POPULATE_READ = 22  # linux/mman.h: MADV_POPULATE_READ


def no_digest(segment: memoryview) -> bytes:
    """Shows what digests cost, and nothing else: what arrives is not checked."""
    return bytes(8)


class TransportEnd:
    """Any transport behind the port, with fetches like those of a hand-off."""

    def __init__(self, transport: Transport, digest: SegmentDigest, role: str, frames: Frames) -> None:
        self._transport, self._digest, self._frames = transport, digest, frames
        source, receiver = WorkerId("p", 1), WorkerId("d", 2)
        self._peer = receiver if role == SOURCE else source
        self._streams = 0

    async def hello(self) -> str:
        await self._transport.serve(self._frames, self._digest)
        return (await self._transport.invite(self._peer)).hex()

    async def meet(self, hello: str) -> None:
        await self._transport.meet(self._peer, bytes.fromhex(hello))

    async def move(self, total_bytes: int, how: str) -> tuple[int, float, int]:
        size = self._frames.layout.page_bytes
        batches = list(walk(self._frames.pages, size, total_bytes))
        rest = iter([[Piece(source, 0, target) for source, target in pairs] for pairs in batches])
        began_s = time.perf_counter()
        await asyncio.gather(*(self._fetch_all(rest) for _ in range(IN_FLIGHT)))
        seconds = time.perf_counter() - began_s
        return sum(map(len, batches)) * size, seconds, wrong_pages(self._frames, batches[-1])

    async def _fetch_all(self, batches: Iterator[list[Piece]]) -> None:
        for pieces in batches:  # one iterator for all that fetch
            self._streams += 1
            for arrival in await self._transport.fetch(self._peer, self._streams, pieces):
                if not isinstance(arrival, bytes):
                    raise arrival

    async def close(self) -> None:
        await self._transport.close()


class MemcpyEnd:
    """One core copies the same pages between two mappings of one process: what the memory of this machine can do."""

    def __init__(self, frames: Frames, page_bytes: int, pool_bytes: int) -> None:
        self._target = frames
        self._source = make_pool(page_bytes, pool_bytes)
        fill(self._source)
        assert self._source.fd is not None
        self._mapping = mmap.mmap(self._source.fd, 0, prot=mmap.PROT_READ)
        self._mapping.madvise(POPULATE_READ)

    async def hello(self) -> str:
        return ""

    async def meet(self, hello: str) -> None: ...

    async def move(self, total_bytes: int, how: str) -> tuple[int, float, int]:
        size = self._target.layout.page_bytes
        batches = list(walk(self._target.pages, size, total_bytes))
        source, target = np.frombuffer(self._mapping, np.uint8), np.frombuffer(self._target.buffer, np.uint8)
        began_s = time.perf_counter()
        for pairs in batches:
            for page, to in pairs:
                np.copyto(target[to * size : (to + 1) * size], source[page * size : (page + 1) * size])
        seconds = time.perf_counter() - began_s
        return sum(map(len, batches)) * size, seconds, wrong_pages(self._target, batches[-1])

    async def close(self) -> None: ...


class SocketSource:
    """Writes its pool into the connection, from its beginning, as many bytes as it is asked for."""

    def __init__(self, frames: Frames) -> None:
        self._buffer = frames.buffer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            while asked := connection.recv(LENGTH.size, socket.MSG_WAITALL):
                send_in_steps(LENGTH.unpack(asked)[0], self._buffer, connection)

    async def hello(self) -> str:
        self._thread.start()
        return str(self._listener.getsockname()[1])

    async def meet(self, hello: str) -> None: ...

    async def move(self, total_bytes: int, how: str) -> tuple[int, float, int]:
        raise NotImplementedError("the receiver moves")

    async def close(self) -> None:
        self._listener.close()


def send_in_steps(total_bytes: int, buffer: memoryview, connection: socket.socket) -> None:
    at = 0
    while total_bytes:
        step = min(SOCKET_STEP_BYTES, total_bytes, len(buffer) - at)
        connection.sendall(buffer[at : at + step])
        total_bytes -= step
        at = (at + step) % len(buffer)


class SocketReceiver:
    """Reads straight into its pool."""

    def __init__(self, frames: Frames) -> None:
        self._frames = frames
        self._connection: socket.socket

    async def hello(self) -> str:
        return ""

    async def meet(self, hello: str) -> None:
        self._connection = socket.create_connection(("127.0.0.1", int(hello)))

    async def move(self, total_bytes: int, how: str) -> tuple[int, float, int]:
        buffer, left, at = self._frames.buffer, total_bytes, 0
        began_s = time.perf_counter()
        self._connection.sendall(LENGTH.pack(total_bytes))
        while left:
            got = self._connection.recv_into(buffer[at : at + min(SOCKET_STEP_BYTES, left)])
            left -= got
            at = (at + got) % len(buffer)
        seconds = time.perf_counter() - began_s
        whole: list[Pair] = [(0, 0)] if total_bytes >= self._frames.layout.page_bytes else []
        return total_bytes, seconds, wrong_pages(self._frames, whole)

    async def close(self) -> None:
        self._connection.close()


def make_ucx() -> Transport:
    from kvtransfer.ucx import UcxTransport  # where it is not installed, only its rows are missing

    return UcxTransport()


TRANSPORTS: dict[str, tuple[Callable[[], Transport], SegmentDigest]] = {
    "shm": (ShmTransport, algorithm(XXH3_64)),
    "shm-no-digest": (ShmTransport, no_digest),
    "ucx": (make_ucx, algorithm(XXH3_64)),
    "ucx-no-digest": (make_ucx, no_digest),
}


def make_end(kind: str, role: str, page_bytes: int, pool_bytes: int) -> End:
    frames = make_pool(page_bytes, pool_bytes)
    if role == SOURCE:
        fill(frames)
    if kind in TRANSPORTS:
        make, digest = TRANSPORTS[kind]
        return TransportEnd(make(), digest, role, frames)
    if kind == "memcpy":
        return MemcpyEnd(frames, page_bytes, pool_bytes)
    return SocketSource(frames) if role == SOURCE else SocketReceiver(frames)


def main() -> None:
    kind, role, page_bytes, pool_bytes = sys.argv[1:]

    async def run() -> None:
        await obey(make_end(kind, role, int(page_bytes), int(pool_bytes)))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


if __name__ == "__main__":
    main()
