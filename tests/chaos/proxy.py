"""A TCP forwarder that misbehaves on request: what a bad network does to a connection, without a kernel's help.

Faults hold for connections that are open and for new ones, in each direction by itself, until they are taken back.
What was sent before a fault may still arrive after it; what is swallowed never does, and TCP leaves no gaps: a
connection of which something was swallowed is dead in that direction for ever, and nobody is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

PIECE_BYTES = 16 << 10
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER on, for no time


@dataclass
class Way:
    """What is done to the bytes of one direction."""

    delay_s: float = 0.0  # before each piece
    bytes_per_s: float = 0.0  # 0: as fast as it goes
    swallows: bool = False  # what is read is dropped, and the connection stays open: half of it is gone
    stalls: bool = False  # nothing is read: the sender's buffers fill
    flip_share: float = 0.0  # of the pieces, one bit is flipped
    forwarded_bytes: int = 0
    swallowed_bytes: int = 0
    flipped: int = 0

    def heal(self) -> None:
        self.delay_s = self.bytes_per_s = self.flip_share = 0.0
        self.swallows = self.stalls = False


@dataclass
class ChaosProxy:
    """Forwards to `target` (host, port). `up` is from who connects to the target, `down` is back."""

    target: tuple[str, int]
    random: Random = field(default_factory=lambda: Random(0))
    up: Way = field(default_factory=Way)
    down: Way = field(default_factory=Way)
    refuses: bool = False  # new connections are reset at once
    port: int = 0
    accepted: int = 0
    _server: asyncio.Server | None = None
    _open: dict[asyncio.Task[None], list[asyncio.StreamWriter]] = field(default_factory=dict)

    async def start(self, host: str = "127.0.0.1") -> None:
        self._server = await asyncio.start_server(self._accept, host, 0)
        self.port = self._server.sockets[0].getsockname()[1]

    @property
    def connections(self) -> int:
        return len(self._open)

    def heal(self) -> None:
        """All is well again, for new connections and for those of which nothing was swallowed."""
        self.refuses = False
        self.up.heal()
        self.down.heal()

    async def cut(self, *, reset: bool = False) -> None:
        """Close every connection on both sides: in order, or by a reset."""
        tasks = list(self._open)
        for task in tasks:
            for writer in self._open[task]:
                _end(writer, reset)
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        await self.cut()

    # --- one connection ----------------------------------------------------------------------------------------

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.accepted += 1
        self._open[task] = [writer]
        try:
            if self.refuses:
                _end(writer, reset=True)
                return
            back, forth = await asyncio.open_connection(*self.target)
            self._open[task].append(forth)
            await self._carry_both((reader, forth), (back, writer))
        except (OSError, asyncio.CancelledError):
            pass  # either side has gone, or we were told to cut it
        finally:
            for each in self._open.pop(task):
                _end(each, reset=False)

    async def _carry_both(self, *ways: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
        """Until either direction has ended: then both do."""
        pumps = [
            asyncio.create_task(self._pump(*ends, way)) for ends, way in zip(ways, (self.up, self.down), strict=True)
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: Way) -> None:
        is_dead = False
        while True:
            while way.stalls:
                await asyncio.sleep(0.01)
            piece = await reader.read(PIECE_BYTES)
            if not piece:
                return
            if way.delay_s:
                await asyncio.sleep(way.delay_s)
            if way.bytes_per_s:
                await asyncio.sleep(len(piece) / way.bytes_per_s)
            is_dead = is_dead or way.swallows
            if is_dead:
                way.swallowed_bytes += len(piece)
                continue
            writer.write(self._flipped(piece, way))
            await writer.drain()
            way.forwarded_bytes += len(piece)

    def _flipped(self, piece: bytes, way: Way) -> bytes:
        if not way.flip_share or self.random.random() > way.flip_share:
            return piece
        way.flipped += 1
        changed = bytearray(piece)
        changed[self.random.randrange(len(changed))] ^= 1 << self.random.randrange(8)
        return bytes(changed)


def _end(writer: asyncio.StreamWriter, reset: bool) -> None:
    if not reset:
        writer.close()
        return
    with contextlib.suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    writer.transport.abort()


@asynccontextmanager
async def proxy_to(host: str, port: int, seed: int = 0) -> AsyncIterator[ChaosProxy]:
    proxy = ChaosProxy((host, port), Random(seed))
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.close()


class Proxies:
    """Proxies in a thread of their own, so that a test may wait for something without holding them up."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxies")
        self._thread.start()
        self._proxies: list[ChaosProxy] = []

    def add(self, host: str, port: int) -> ChaosProxy:
        """Before this address, on a port of the loopback."""
        proxy = ChaosProxy((host, port), Random(len(self._proxies)))
        self._run(proxy.start())
        self._proxies.append(proxy)
        return proxy

    def cut(self, proxy: ChaosProxy, *, reset: bool = False) -> None:
        self._run(proxy.cut(reset=reset))

    def heal(self) -> None:
        for proxy in self._proxies:
            proxy.heal()

    def close(self) -> None:
        for proxy in self._proxies:
            self._run(proxy.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10.0)
        self._loop.close()

    def _run(self, doing: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(doing, self._loop).result(10.0)
