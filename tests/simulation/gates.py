"""What SIGSTOP and a partition do to a worker: nothing of it runs, and what it is sent waits or is lost.

A stopped worker's inbox fills; on waking its clock ticks first, then everything that has waited arrives at once.
Between two workers that are parted, messages are lost and fetches stand still.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from core.errors import PeerLost
from core.messages import Peer, WorkerId
from kvtransfer.digest import SegmentDigest
from kvtransfer.frames import Frames
from kvtransfer.memory import MemoryTransport
from kvtransfer.receiver_link import HandoffReceiver
from kvtransfer.source_link import HandoffSource
from kvtransfer.transport import Arrival, Piece


class Parting:
    """Which names cannot reach each other: workers and routers."""

    def __init__(self) -> None:
        self._cut: dict[frozenset[str], int] = {}
        self._touched_s: dict[str, float] = {}
        self._healed = asyncio.Event()
        self.on_heal: list[Callable[[], None]] = []

    def part(self, one: str, other: str) -> None:
        pair = frozenset((one, other))
        self._cut[pair] = self._cut.get(pair, 0) + 1
        self._touch(pair)

    def heal(self, one: str, other: str) -> None:
        pair = frozenset((one, other))
        self._touch(pair)
        self._cut[pair] -= 1
        if not self._cut[pair]:
            del self._cut[pair]
        self._healed.set()
        self._healed = asyncio.Event()
        for call in self.on_heal:
            call()

    def _touch(self, pair: frozenset[str]) -> None:
        for name in pair:
            self._touched_s[name] = asyncio.get_running_loop().time()

    def touched_since(self, name: str, at_s: float) -> bool:
        """Whether it is parted from anybody, or was."""
        return any(name in pair for pair in self._cut) or self._touched_s.get(name, -1.0) >= at_s

    def between(self, one: str, other: str) -> bool:
        return bool(self._cut) and frozenset((one, other)) in self._cut

    async def over(self, one: str, other: str) -> None:
        while self.between(one, other):
            await self._healed.wait()


class Node:
    """The life of one worker process: running, stopped, dead."""

    def __init__(self, me: WorkerId, parting: Parting, clock_offset_s: float) -> None:
        self.me = me
        self.parting = parting
        self.offset_s = clock_offset_s
        self.stopped = False
        self.dead = False
        self.disturbed_s = -1.0  # when it was last stopped or woken
        self.on_wake: list[Callable[[], None]] = []
        self._waiting: list[Callable[[], object]] = []
        self._awake = asyncio.Event()
        self._awake.set()
        self._loop = asyncio.get_running_loop()

    def clock(self) -> float:
        """Its own: no two workers' clocks agree, and it may jump forward."""
        return self._loop.time() + self.offset_s

    def stop(self) -> None:
        if not self.dead:
            self.stopped = True
            self.disturbed_s = self._loop.time()
            self._awake.clear()

    def wake(self) -> None:
        """Its timers first: what it was sent lies unread."""
        if self.dead or not self.stopped:
            return
        self.stopped = False
        self.disturbed_s = self._loop.time()
        for call in self.on_wake:
            call()
        waiting, self._waiting = self._waiting, []
        for do in waiting:
            do()
        self._awake.set()

    def die(self) -> None:
        self.dead, self.stopped = True, False
        self._waiting.clear()
        self._awake.set()

    def call(self, do: Callable[[], object]) -> None:
        """Now, or when it wakes; never when it is dead."""
        if self.dead:
            return
        if self.stopped or self._waiting:
            self._waiting.append(do)
        else:
            do()

    def skip(self, do: Callable[[], None]) -> Callable[[], None]:
        """A periodic call, which a stopped process misses."""
        return lambda: None if self.stopped or self.dead else do()

    async def awake(self) -> None:
        """Raises ConnectionError when it has died instead."""
        await self._awake.wait()
        if self.dead:
            raise ConnectionError(f"{self.me} is dead")


class SourceGate:
    """A HandoffSource, as a network sees it."""

    def __init__(self, source: HandoffSource, node: Node) -> None:
        self._source = source
        self._node = node
        self.me = source.me

    async def opening(self, peer: WorkerId) -> Any:
        await self._node.awake()
        return await self._source.opening(peer)

    async def answered(self, answer: Any) -> None:
        await self._node.awake()
        await self._source.answered(answer)

    def session_up(self, peer: WorkerId) -> None:
        self._node.call(lambda: self._source.session_up(peer))

    def session_down(self, peer: WorkerId) -> None:
        self._node.call(lambda: self._source.session_down(peer))

    def peer_gone(self, peer: WorkerId, error: Any) -> None:
        self._node.call(lambda: self._source.peer_gone(peer, error))

    def receive(self, peer: WorkerId, message: Any) -> None:
        if not self._node.parting.between(self.me.name, peer.name):
            self._node.call(lambda: self._source.receive(peer, message))


class ReceiverGate:
    """A HandoffReceiver, as a network sees it."""

    def __init__(self, receiver: HandoffReceiver, node: Node) -> None:
        self._receiver = receiver
        self._node = node
        self.me = receiver.me

    async def greet(self, message: Any) -> Any:
        await self._node.awake()
        await self._node.parting.over(self.me.name, message.source.name)
        return await self._receiver.greet(message)

    def session_up(self, peer: WorkerId) -> None:
        self._node.call(lambda: self._receiver.session_up(peer))

    def session_down(self, peer: WorkerId) -> None:
        self._node.call(lambda: self._receiver.session_down(peer))

    def receive(self, peer: WorkerId, message: Any) -> None:
        if not self._node.parting.between(self.me.name, peer.name):
            self._node.call(lambda: self._receiver.receive(peer, message))


class SessionsGate:
    """What an end says: a stopped one says it when it wakes."""

    def __init__(self, sessions: Any, node: Node) -> None:
        self._sessions = sessions
        self._node = node

    def dial(self, peer: Peer) -> None:
        self._node.call(lambda: self._sessions.dial(peer))

    def send(self, worker: WorkerId, message: Any) -> None:
        self._node.call(lambda: self._sessions.send(worker, message))

    def hang_up(self, worker: WorkerId) -> None:
        self._node.call(lambda: self._sessions.hang_up(worker))


class TransportGate:
    """Two-sided like messages, or one-sided: whether pages still move while their source is stopped."""

    name = "memory"
    settles_on_return = False

    def __init__(
        self, transport: MemoryTransport, node: Node, peer_is_awake: Callable[[WorkerId], Awaitable[None]]
    ) -> None:
        self._transport = transport
        self._node = node
        self._peer_is_awake = peer_is_awake

    async def serve(self, frames: Frames, digest: SegmentDigest) -> None:
        await self._transport.serve(frames, digest)

    async def invite(self, peer: WorkerId) -> bytes:
        return await self._transport.invite(peer)

    async def meet(self, peer: WorkerId, descriptor: bytes) -> None:
        await self._transport.meet(peer, descriptor)

    async def fetch(self, peer: WorkerId, stream: int, pieces: Sequence[Piece]) -> list[Arrival]:
        await self._peer_is_awake(peer)
        await self._node.parting.over(self._node.me.name, peer.name)
        try:
            return await self._transport.fetch(peer, stream, pieces)
        finally:
            if self._node.stopped:
                await self._until_awake()

    async def drain(self, peer: WorkerId, stream: int) -> None:
        await self._until_awake()
        await self._transport.drain(peer, stream)

    async def forget(self, peer: WorkerId) -> None:
        await self._until_awake()
        await self._transport.forget(peer)

    async def close(self) -> None:
        await self._transport.close()

    async def _until_awake(self) -> None:
        try:
            await self._node.awake()
        except ConnectionError:
            raise PeerLost(f"{self._node.me} is dead") from None
