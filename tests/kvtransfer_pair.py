"""Workers of a hand-off without engines, for tests: pools whose pages hold what their block hash says."""

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from core.errors import BatonError
from core.hashing import block_hashes, root_hash
from core.layout import PageLayout
from core.messages import Peer, Receipt, Token, WorkerId
from engine.pool import PagePool
from kvtransfer.digest import XXH3_64, Digest, algorithm, plain
from kvtransfer.fingerprint import Fingerprint
from kvtransfer.frames import Frames
from kvtransfer.intake import Guards
from kvtransfer.liveness import Timing
from kvtransfer.memory import MemoryFabric, MemoryTransport, Mischief
from kvtransfer.messages import Grant, HandoffKey
from kvtransfer.places import FilledPage, tail_hash
from kvtransfer.ports import Reservation
from kvtransfer.receiver_link import HandoffReceiver, Outcomes
from kvtransfer.session_memory import MemoryNetwork, Weather
from kvtransfer.source_link import HandoffSource
from kvtransfer.states import State

LAYOUT = PageLayout(kv_heads=2, layers=1, page_size=16, head_dim=2, dtype="uint8")
XXH3 = algorithm(XXH3_64)
PRINT = Fingerprint("model", LAYOUT, XXH3_64)
ROOT = root_hash("model")


def content(name: bytes, layout: PageLayout = LAYOUT) -> bytes:
    """What the page of this name holds."""
    return hashlib.shake_128(name).digest(layout.page_bytes)


@dataclass(frozen=True)
class Prompt:
    ids: tuple[int, ...]
    page_size: int = LAYOUT.page_size

    @property
    def hashes(self) -> list[bytes]:
        return block_hashes(ROOT, self.ids, self.page_size)

    @property
    def tail(self) -> bytes:
        return tail_hash(self.hashes, self.ids[len(self.hashes) * self.page_size :])

    @property
    def names(self) -> list[bytes]:
        """Of every page, the tail included."""
        return [*self.hashes, self.tail] if self.tail else self.hashes


def prompt_of(random: Random, tokens: int, page_size: int = LAYOUT.page_size) -> Prompt:
    return Prompt(tuple(random.randrange(1000) for _ in range(tokens)), page_size)


async def inline(function: Callable[[], Any]) -> Any:
    """Offloads to nowhere."""
    return function()


class Receiving:
    """A decode worker: reserves, checks what is committed, and keeps the committed pages until told to drop them."""

    def __init__(
        self,
        name: WorkerId,
        frames: Frames,
        transport: Any,
        clock: Callable[[], float],
        *,
        timing: Timing | None = None,
        guards: Guards | None = None,
        fingerprint: Fingerprint = PRINT,
        counters: Any = None,
    ) -> None:
        self.me = name
        self.frames = frames
        self.transport = transport
        self.pool = PagePool(frames.pages, epochs=frames.epochs)
        self.prompts: dict[HandoffKey, Prompt] = {}
        self.committed: dict[HandoffKey, tuple[int, ...]] = {}
        self.commits: list[HandoffKey] = []
        self.tokens: dict[HandoffKey, tuple[Token, ...]] = {}
        self.receipts: dict[HandoffKey, Receipt] = {}
        self.aborted: dict[HandoffKey, tuple[BatonError, WorkerId | None]] = {}
        self.wrong: list[HandoffKey] = []
        self.reserved: list[HandoffKey] = []
        self.ended = asyncio.Event()
        self.link = HandoffReceiver(
            me=name,
            fingerprint=fingerprint,
            pages=self.pool,
            reservations=self,
            transport=transport,
            clock=clock,
            outcomes=Outcomes(self.on_commit, self.on_abort),
            timing=timing,
            guards=guards,
            counters=counters,
        )

    def expect(self, key: HandoffKey, prompt: Prompt, peer: Peer, deadline_s: float = 30.0) -> None:
        self.prompts[key] = prompt
        self.link.expect(key, prompt.ids, prompt.hashes, peer, deadline_s)

    def reserve(self, key: HandoffKey, pages: int) -> Reservation | None:
        prompt = self.prompts[key]
        prefix = self.pool.lookup(prompt.hashes)
        self.pool.acquire(prefix)
        fresh = self.pool.allocate(len(prompt.names) - len(prefix))
        if fresh is None:
            self.pool.release_all(prefix)
            return None
        self.reserved.append(key)
        return Reservation(tuple(prefix), tuple(fresh))

    def fresh_page(self, key: HandoffKey) -> int | None:
        pages = self.pool.allocate(1)
        return pages[0] if pages else None

    def on_commit(
        self, key: HandoffKey, pages: tuple[int, ...], tokens: tuple[Token, ...], receipt: Receipt, exposed_s: float
    ) -> None:
        self.committed[key] = pages
        self.commits.append(key)
        self.tokens[key] = tokens
        self.receipts[key] = receipt
        self.check(key)
        self.ended.set()

    def on_abort(self, key: HandoffKey, error: BatonError, blames: WorkerId | None) -> None:
        assert key not in self.committed and key not in self.aborted, key
        self.aborted[key] = (error, blames)
        self.ended.set()

    def check(self, key: HandoffKey) -> None:
        """The pages hold what the prompt says, now."""
        names, layout = self.prompts[key].names, self.frames.layout
        pages = self.committed[key]
        assert len(pages) == len(names)
        if any(self.frames.page(page) != content(name, layout) for page, name in zip(pages, names, strict=True)):
            self.wrong.append(key)

    def drop(self, key: HandoffKey) -> None:
        self.check(key)
        self.pool.release_all(self.committed.pop(key))

    async def until_ended(self, key: HandoffKey, timeout_s: float = 30.0) -> None:
        async with asyncio.timeout(timeout_s):
            while key not in self.receipts and key not in self.aborted:
                self.ended.clear()
                await self.ended.wait()


class Sending:
    """A prefill worker: writes pages chunk by chunk and hands them over."""

    def __init__(
        self,
        name: WorkerId,
        frames: Frames,
        transport: Any,
        clock: Callable[[], float],
        random: Random,
        *,
        timing: Timing | None = None,
        fingerprint: Fingerprint = PRINT,
        offload: Any = inline,
        counters: Any = None,
        digest: Digest | None = None,
    ) -> None:
        self.me = name
        self.frames = frames
        self.transport = transport
        self.random = random
        self.pool = PagePool(frames.pages, epochs=frames.epochs)
        self.closed: dict[HandoffKey, tuple[State, BatonError | None]] = {}
        self.granted: list[HandoffKey] = []
        self.link = HandoffSource(
            me=name,
            fingerprint=fingerprint,
            pages=self.pool,
            frames=frames,
            transport=transport,
            clock=clock,
            random=random,
            offload=offload,
            on_closed=self.on_closed,
            timing=timing,
            counters=counters,
            digest=digest,
        )

    def on_closed(self, key: HandoffKey, outcome: State, error: BatonError | None) -> None:
        assert key not in self.closed, key
        self.closed[key] = (outcome, error)

    async def prefill(
        self,
        key: HandoffKey,
        prompt: Prompt,
        peer: Peer,
        *,
        deadline_s: float = 30.0,
        chunk_pages: int = 2,
        chunk_s: float = 0.002,
        stop_after: int | None = None,
    ) -> Grant:
        """The life of one request at P. `stop_after` chunks it hangs for ever, without a word."""
        grant = await self.link.offer(key, peer, len(prompt.ids), 1, deadline_s)
        self.granted.append(key)
        pages = self.pool.allocate(len(prompt.names))
        assert pages is not None
        try:
            await self._chunks(key, prompt, pages, chunk_pages, chunk_s, stop_after)
        finally:
            self.pool.release_all(pages)
        return grant

    async def _chunks(
        self, key: HandoffKey, prompt: Prompt, pages: Sequence[int], each: int, chunk_s: float, stop_after: int | None
    ) -> None:
        for number, start in enumerate(range(0, len(prompt.hashes), each)):
            if key in self.closed:
                return
            if number == stop_after:
                await asyncio.sleep(1e9)
            await asyncio.sleep(chunk_s)
            self.link.ready(key, [self.write(n, prompt.hashes[n], pages[n]) for n in self._range(prompt, start, each)])
        tail = self.write(len(prompt.hashes), prompt.tail, pages[-1]) if prompt.tail else None
        await asyncio.sleep(chunk_s)
        receipt = Receipt(computed_tokens=len(prompt.ids))
        self.link.seal(key, tail, (Token(0, 0, 7, -0.5, ((7, -0.5), (8, -1.5))),), receipt)

    def _range(self, prompt: Prompt, start: int, each: int) -> range:
        return range(start, min(start + each, len(prompt.hashes)))

    def write(self, position: int, name: bytes, page: int) -> FilledPage:
        """What the engine does."""
        self.frames.write(page, content(name, self.frames.layout))
        return FilledPage(position, name, page)


@dataclass
class Pair:
    """One prefill and one decode worker in one process, over an adversarial fabric."""

    fabric: MemoryFabric
    network: MemoryNetwork
    p: Sending
    d: Receiving
    tasks: list[asyncio.Task[Any]] = field(default_factory=list)

    @property
    def to_d(self) -> Peer:
        return Peer(self.d.me, "d")

    @property
    def to_p(self) -> Peer:
        return Peer(self.p.me, "p")

    def submit(self, key: HandoffKey, prompt: Prompt, **options: Any) -> asyncio.Task[Grant]:
        self.d.expect(key, prompt, self.to_p)
        return self.prefill(key, prompt, **options)

    def prefill(self, key: HandoffKey, prompt: Prompt, **options: Any) -> asyncio.Task[Grant]:
        task = asyncio.get_running_loop().create_task(self.p.prefill(key, prompt, self.to_d, **options))
        self.tasks.append(task)
        return task

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.p.link.stop()
        await self.d.link.stop()
        await self.p.transport.close()
        await self.d.transport.close()


async def memory_pair(
    seed: int = 0,
    *,
    pages: int = 65,
    mischief: Mischief | None = None,
    weather: Weather | None = None,
    timing: Timing | None = None,
    guards: Guards | None = None,
    check_epoch: bool = True,
    counters: Any = None,
    digest: Digest | None = None,
) -> Pair:
    clock = asyncio.get_running_loop().time
    fabric = MemoryFabric(Random(seed), mischief or Mischief(), check_epoch=check_epoch)
    network = MemoryNetwork(Random(seed + 1), weather)
    p_frames, d_frames = Frames.anonymous(LAYOUT, pages), Frames.anonymous(LAYOUT, pages)
    p_id, d_id = WorkerId("p", 1), WorkerId("d", 1)
    p_transport, d_transport = MemoryTransport(p_id, fabric), MemoryTransport(d_id, fabric)
    digest = digest or plain()
    await p_transport.serve(p_frames, digest.of)
    await d_transport.serve(d_frames, digest.of)
    both: dict[str, Any] = {"timing": timing, "counters": counters, "fingerprint": replace(PRINT, digest=digest.name)}
    p = Sending(p_id, p_frames, p_transport, clock, Random(seed + 2), digest=digest, **both)
    d = Receiving(d_id, d_frames, d_transport, clock, guards=guards, **both)
    d.link.start(network.add_receiver("d", d.link))
    p.link.start(network.add_source(p.link))
    return Pair(fabric, network, p, d)
