"""One contract for all transports: data, bounds, epochs, cancel, loss, close; and what shared memory alone has."""

import asyncio
import fcntl
import gc
import mmap
import os
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from core.clock import monotonic_s
from core.errors import HandoffError, OutOfBounds, PeerLost, StalePage
from core.layout import PageLayout
from core.messages import WorkerId
from kvtransfer import shm
from kvtransfer.cuda_ipc import CudaIpcTransport
from kvtransfer.device_in_memory import InMemoryDevice
from kvtransfer.device_memory import Block, PageCopy
from kvtransfer.digest import XXH3_64, algorithm, digest_page
from kvtransfer.frames import Frames, epochs_offset, memory_bytes
from kvtransfer.host import Host
from kvtransfer.mapped import MappedTransport
from kvtransfer.memory import MemoryFabric, MemoryTransport, Mischief
from kvtransfer.paths import Paths
from kvtransfer.shm import ShmTransport
from kvtransfer.shm_socket import PoolAddress, ask_for_pool
from kvtransfer.transport import PROOF_STREAM, Piece, Transport
from kvtransfer.ucx import UcxTransport
from kvtransfer.ucx_calls import Request
from kvtransfer.ucx_library import Endpoint, Region
from tests.kvtransfer_seen import Seen, served

ROOT = Path(__file__).resolve().parent.parent
LAYOUT = PageLayout(kv_heads=2, layers=2, page_size=16, head_dim=64, dtype="float32")  # 32 KiB
PAGES = 32
XXH3 = algorithm(XXH3_64)
P, D = WorkerId("p", 7), WorkerId("d", 8)
ON_DEVICE = ("cuda", "ucx on devices")


@dataclass
class Rig:
    """A source and a receiver."""

    source: Transport
    receiver: Transport
    theirs: Frames | Seen
    ours: Frames | Seen
    descriptor: bytes

    def fill(self, seed: int = 0) -> None:
        self.theirs.buffer[:] = Random(seed).randbytes(len(self.theirs.buffer))

    async def meet(self) -> None:
        """What the first messages of a session do."""
        self.descriptor = await self.source.invite(D)
        await self.receiver.meet(P, self.descriptor)
        await self.source.meet(D, await self.receiver.invite(P))

    async def fetch(self, *pieces: Piece, stream: int = 1) -> list[Any]:
        return await self.receiver.fetch(P, stream, pieces)

    def same(self, source_page: int, target_page: int) -> bool:
        return bytes(self.theirs.page(source_page)) == bytes(self.ours.page(target_page))


def make_frames(kind: str, page_s: float = 0.0001) -> Frames | Seen:
    """`page_s`: how long a device takes to copy a page."""
    if kind in ON_DEVICE:
        return Seen(Frames.on_device(LAYOUT, PAGES, InMemoryDevice(page_s=page_s)))
    return Frames.shared(LAYOUT, PAGES)


async def make_rig(kind: str, page_s: float = 0.0001, **options: Any) -> Rig:
    theirs, ours = make_frames(kind, page_s), make_frames(kind, page_s)
    source: Transport
    receiver: Transport
    if kind == "memory":
        mischief = options.pop("mischief", Mischief(delay_s=0.0002, ghost_delay_s=0.0002))
        fabric = MemoryFabric(Random(1), mischief, **options)
        source, receiver = MemoryTransport(P, fabric), MemoryTransport(D, fabric)
    elif kind == "paths":
        fabric, host = MemoryFabric(Random(1), Mischief(delay_s=0.0002, ghost_delay_s=0.0002)), Host("boot", 1, 1)
        source = Paths({"memory": MemoryTransport(P, fabric)}, host=host, clock=monotonic_s)
        receiver = Paths({"memory": MemoryTransport(D, fabric)}, host=host, clock=monotonic_s)
    elif kind in ("ucx", "ucx on devices"):
        source, receiver = UcxTransport(net_devices="lo", **options), UcxTransport(net_devices="lo", **options)
    elif kind == "cuda":
        source, receiver = CudaIpcTransport(), CudaIpcTransport(**{"launch_bytes": 8 * LAYOUT.page_bytes} | options)
    else:
        source, receiver = ShmTransport(), ShmTransport(**options)
    await source.serve(served(theirs), XXH3)
    await receiver.serve(served(ours), XXH3)
    rig = Rig(source, receiver, theirs, ours, b"")
    await rig.meet()
    rig.fill()
    return rig


async def close(rig: Rig) -> None:
    await rig.receiver.close()
    await rig.source.close()
    rig.theirs.close()
    rig.ours.close()


@pytest.fixture(params=["memory", "shm", "cuda", "ucx", "ucx on devices", "paths"])
async def rig(request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    rig = await make_rig(request.param)
    yield rig
    await close(rig)


@pytest.fixture
async def shm_rig() -> AsyncIterator[Rig]:
    rig = await make_rig("shm")
    yield rig
    await close(rig)


# --- the contract --------------------------------------------------------------------------------------------


async def test_pages_arrive_where_they_are_wanted_with_their_digests(rig: Rig) -> None:
    targets = list(range(PAGES))
    Random(2).shuffle(targets)
    arrivals = await rig.fetch(*(Piece(page, 0, target) for page, target in enumerate(targets)))
    for page, target in enumerate(targets):
        assert rig.same(page, target)
        assert arrivals[page] == digest_page(rig.theirs.buffer, LAYOUT, page, XXH3)
    assert await rig.fetch() == []


async def test_many_fetches_run_at_once(rig: Rig) -> None:
    await asyncio.gather(*(rig.fetch(Piece(page, 0, page), stream=page + 1) for page in range(PAGES)))
    assert rig.theirs.buffer == rig.ours.buffer


async def test_an_index_outside_either_pool_is_refused_and_writes_nothing(rig: Rig) -> None:
    before = bytes(rig.ours.buffer)
    wrong = [Piece(PAGES, 0, 1), Piece(-1, 0, 1), Piece(1, 0, PAGES), Piece(1, 0, -1), Piece(2**31, 0, 1)]
    assert all(isinstance(arrival, OutOfBounds) for arrival in await rig.fetch(*wrong))
    assert bytes(rig.ours.buffer) == before
    mixed = await rig.fetch(Piece(PAGES, 0, 1), Piece(3, 0, 4))
    assert isinstance(mixed[0], OutOfBounds) and rig.same(3, 4)


async def test_a_proof_moves_the_pattern_to_the_landing_and_can_touch_nothing_else(rig: Rig) -> None:
    pattern, landing = rig.theirs.pattern, rig.ours.landing
    if rig.source.name == "paths":
        await rig.fetch(Piece(1, 0, 1))  # proves itself; the pattern is its own
    else:
        rig.theirs.frame(pattern)[:] = Random(5).randbytes(LAYOUT.page_bytes)
    before = bytes(rig.ours.everything)
    wrong = [Piece(pattern, 0, 3), Piece(3, 0, landing), Piece(rig.theirs.landing, 0, landing), Piece(3, 0, 3)]
    arrivals = [*await rig.fetch(*wrong, stream=PROOF_STREAM), *await rig.fetch(Piece(pattern, 0, landing), stream=1)]
    assert all(isinstance(arrival, OutOfBounds) for arrival in arrivals)
    assert bytes(rig.ours.everything) == before
    expected = digest_page(rig.theirs.everything, LAYOUT, pattern, XXH3)
    assert await rig.fetch(Piece(pattern, 0, landing), stream=PROOF_STREAM) == [expected]
    assert rig.ours.frame(landing) == rig.theirs.frame(pattern)
    assert bytes(rig.ours.buffer) == before[: len(rig.ours.buffer)]


async def test_a_page_of_another_epoch_is_stale_and_writes_nothing(rig: Rig) -> None:
    rig.theirs.epochs[3] = 5
    before = bytes(rig.ours.buffer)
    arrivals = await rig.fetch(Piece(3, 4, 0), Piece(3, 6, 1))
    assert all(isinstance(arrival, StalePage) for arrival in arrivals)
    assert bytes(rig.ours.buffer) == before
    assert await rig.fetch(Piece(3, 5, 2)) == [digest_page(rig.theirs.buffer, LAYOUT, 3, XXH3)]


async def test_a_page_given_up_while_it_is_read_is_stale(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def give_up() -> None:
        rig.theirs.epochs[3] = 1
        rig.theirs.page(3)[-8:] = b"someone!"

    if rig.source.name in ("memory", "paths"):
        if rig.source.name == "paths":
            await rig.fetch(Piece(1, 0, 1))  # so that the proof is over
        asyncio.get_running_loop().call_later(0.0001, give_up)
    elif rig.source.name == "ucx":
        send = Endpoint.send

        def send_and_give_up(self: Endpoint, region: Region, tag: int) -> Request:
            request = send(self, region, tag)
            if region.length == LAYOUT.page_bytes:
                give_up()
            return request

        monkeypatch.setattr(Endpoint, "send", send_and_give_up)
    elif rig.source.name == "cuda":
        copy = InMemoryDevice.copy

        def copy_and_give_up(self: InMemoryDevice, *arguments: Any) -> None:
            copy(self, *arguments)
            give_up()

        monkeypatch.setattr(InMemoryDevice, "copy", copy_and_give_up)
    else:
        real = np.copyto

        def copyto(into: Any, what: Any) -> None:
            real(into, what)
            give_up()

        monkeypatch.setattr(shm.np, "copyto", copyto)
    assert isinstance((await rig.fetch(Piece(3, 0, 3)))[0], StalePage)


@pytest.mark.parametrize("kind", ["memory", "shm", "cuda", "ucx", "ucx on devices"])
async def test_without_the_epoch_fence_another_prompts_page_would_arrive(kind: str) -> None:
    """What the fence is for: with it off, this is served."""
    rig = await make_rig(kind, check_epoch=False)
    rig.theirs.epochs[3] = 1
    rig.theirs.page(3)[:] = b"z" * LAYOUT.page_bytes
    assert isinstance((await rig.fetch(Piece(3, 0, 3)))[0], bytes)
    assert bytes(rig.ours.page(3)) == b"z" * LAYOUT.page_bytes
    await close(rig)


async def quiet(rig: Rig, settled: bool) -> None:
    """Nothing may land from now on: whatever is written into our pool stays."""
    if not settled:
        await rig.source.drain(D, 1)
    rig.ours.buffer[:] = b"q" * len(rig.ours.buffer)
    await asyncio.sleep(0.005)
    assert bytes(rig.ours.buffer) == b"q" * len(rig.ours.buffer)


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 8, 20])
async def test_a_fetch_can_be_cancelled_at_any_point(rig: Rig, turns: int) -> None:
    fetch = asyncio.ensure_future(rig.fetch(*(Piece(page, 0, page) for page in range(PAGES))))
    for _ in range(turns):
        await asyncio.sleep(0)
    fetch.cancel()
    async with asyncio.timeout(1.0):
        await asyncio.wait([fetch])
    await quiet(rig, rig.receiver.settles_on_return)
    assert isinstance((await rig.fetch(Piece(0, 0, 0), stream=2))[0], bytes)


async def test_forgetting_a_peer_ends_its_fetches_and_nothing_lands_afterwards(rig: Rig) -> None:
    fetches = [asyncio.ensure_future(rig.fetch(*(Piece(n, 0, n) for n in range(PAGES)), stream=n)) for n in range(1, 9)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    async with asyncio.timeout(2.0):
        await rig.receiver.forget(P)
        rig.ours.buffer[:] = b"q" * len(rig.ours.buffer)
        ends = await asyncio.gather(*fetches, return_exceptions=True)
    assert all(isinstance(end, PeerLost | list) for end in ends), ends
    await asyncio.sleep(0.005)
    assert bytes(rig.ours.buffer) == b"q" * len(rig.ours.buffer)
    with pytest.raises(PeerLost, match="never met"):
        await rig.fetch(Piece(0, 0, 0))
    await rig.meet()
    assert isinstance((await rig.fetch(Piece(0, 0, 0)))[0], bytes), "a peer that is met again begins anew"


async def test_closing_ends_what_is_in_flight(rig: Rig) -> None:
    fetch = asyncio.ensure_future(rig.fetch(*(Piece(page, 0, page) for page in range(PAGES))))
    await asyncio.sleep(0.0005)
    async with asyncio.timeout(2.0):
        await rig.receiver.close()
        ends = await asyncio.gather(fetch, return_exceptions=True)
    assert isinstance(ends[0], PeerLost | list)


# --- the memory transport keeps its word: it is as bad as it says ---------------------------------------------


async def test_a_cancelled_fetch_goes_on_writing_until_it_is_drained() -> None:
    rig = await make_rig("memory")
    fetch = asyncio.ensure_future(rig.fetch(*(Piece(page, 0, page) for page in range(4))))
    await asyncio.sleep(0)
    fetch.cancel()
    await asyncio.wait([fetch])
    rig.ours.buffer[:] = b"q" * len(rig.ours.buffer)
    await asyncio.sleep(0.05)
    assert bytes(rig.ours.buffer) != b"q" * len(rig.ours.buffer)
    await quiet(rig, settled=False)
    await close(rig)


async def test_bytes_that_are_flipped_and_pages_that_are_swapped_have_other_digests() -> None:
    for mischief in (Mischief(corrupt=1.0, ghosts=False), Mischief(stale=1.0, ghosts=False)):
        rig = await make_rig("memory", mischief=mischief)
        arrivals = await rig.fetch(*(Piece(page, 0, page) for page in range(8)))
        right = [digest_page(rig.theirs.buffer, LAYOUT, page, XXH3) for page in range(8)]
        assert sum(found == wanted for found, wanted in zip(arrivals, right, strict=True)) <= 1
        await close(rig)


def test_any_single_flipped_bit_changes_the_digest_of_its_segment_alone() -> None:
    frames = Frames.anonymous(LAYOUT, 2)
    random = Random(3)
    frames.buffer[:] = random.randbytes(len(frames.buffer))
    before = digest_page(frames.buffer, LAYOUT, 1, XXH3)
    for _ in range(200):
        at = LAYOUT.page_bytes + random.randrange(LAYOUT.page_bytes)
        bit = 1 << random.randrange(8)
        frames.buffer[at] ^= bit
        after = digest_page(frames.buffer, LAYOUT, 1, XXH3)
        changed = [head for head in range(LAYOUT.kv_heads) if before[8 * head :][:8] != after[8 * head :][:8]]
        assert changed == [(at - LAYOUT.page_bytes) // LAYOUT.segment_bytes]
        frames.buffer[at] ^= bit
    assert digest_page(frames.buffer, LAYOUT, 1, XXH3) == before


# --- frames --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Frames.anonymous, Frames.shared])
def test_frames_hold_pages_and_epochs_and_show_their_progress(make: Callable[..., Frames]) -> None:
    seen: list[tuple[int, int]] = []
    frames = make(LAYOUT, PAGES, lambda done, of: seen.append((done, of)))
    assert seen[-1] == (memory_bytes(PAGES, LAYOUT.page_bytes),) * 2
    assert len(frames.buffer) == PAGES * LAYOUT.page_bytes and len(frames.epochs) == PAGES
    assert not any(frames.epochs) and epochs_offset(3, 100) % 4096 == 0
    with pytest.raises(OutOfBounds):
        frames.page(PAGES)
    frames.epochs[PAGES - 1] = 2**64 - 1
    assert bytes(frames.page(PAGES - 1)) == bytes(LAYOUT.page_bytes)
    frames.close()


def test_frames_outlive_their_close_while_a_tensor_lies_over_them() -> None:
    frames = Frames.shared(LAYOUT, 2)
    tensor = np.frombuffer(frames.buffer, np.uint8)
    frames.close()
    tensor[:] = 1  # unmapped, this would end the process
    assert tensor[-1] == 1


# --- shared memory -------------------------------------------------------------------------------------------


async def test_a_peer_can_neither_write_into_nor_shrink_a_pool(shm_rig: Rig) -> None:
    address = PoolAddress.decode(shm_rig.descriptor)
    fd, handle = await ask_for_pool(address, 1.0)
    assert not handle
    with pytest.raises(PermissionError):
        mmap.mmap(fd, address.size)
    for size in (0, address.size + 4096):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    with pytest.raises(PermissionError):
        os.write(fd, b"x")
    os.close(fd)


async def test_without_the_token_there_is_no_pool(shm_rig: Rig) -> None:
    address = PoolAddress.decode(shm_rig.descriptor)
    for token in ("00" * 16, "", "zz"):
        with pytest.raises(PeerLost):
            await ask_for_pool(replace(address, token=token), 0.2)
    fd, _ = await ask_for_pool(address, 1.0)  # and those who have it are still served
    os.close(fd)


@pytest.mark.parametrize(
    "descriptor",
    [b"", b"{}", b"null", b"[]", b"\xff", b'{"socket":1,"token":"","pages":1,"page_bytes":1}',
     b'{"socket":"a","token":"","pages":0,"page_bytes":1}',
     b'{"socket":"a","token":"","pages":1,"page_bytes":1,"version":9}'],
)  # fmt: skip
async def test_a_broken_descriptor_is_an_error_of_the_hand_off(shm_rig: Rig, descriptor: bytes) -> None:
    with pytest.raises(HandoffError):
        await shm_rig.receiver.meet(WorkerId("x", 1), descriptor)


async def test_a_pool_that_could_shrink_is_not_mapped() -> None:
    """Its owner could kill us by SIGBUS."""
    fd = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    address = PoolAddress("baton-test-loose", "00" * 16, 1, 4096)
    os.ftruncate(fd, address.size)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("\0baton-test-loose")
    listener.listen()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(16)
            socket.send_fds(connection, [b"\1"], [fd])

    thread = threading.Thread(target=serve)
    thread.start()
    with pytest.raises(HandoffError, match="not what it says"):
        await ask_for_pool(address, 1.0)
    thread.join()
    listener.close()
    os.close(fd)


async def test_a_pool_of_another_page_size_is_refused(shm_rig: Rig) -> None:
    other = replace(PoolAddress.decode(shm_rig.descriptor), page_bytes=64)
    await shm_rig.receiver.meet(P, other.encode())
    with pytest.raises(HandoffError, match="64 bytes there"):
        await shm_rig.fetch(Piece(0, 0, 0))


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def mapped_pools() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:baton-pool")


async def test_ten_thousand_transfers_leave_nothing_behind(shm_rig: Rig) -> None:
    await shm_rig.fetch(Piece(0, 0, 0))
    await shm_rig.receiver.forget(P)
    await shm_rig.meet()
    gc.collect()  # what an earlier test left in a cycle would go meanwhile
    files, maps, threads = open_files(), mapped_pools(), threading.active_count()
    for number in range(100):
        for _ in range(5):
            await shm_rig.fetch(*(Piece(page % PAGES, 0, page % PAGES) for page in range(20)), stream=number)
        await shm_rig.receiver.forget(P)
        await shm_rig.meet()
    assert (open_files(), mapped_pools(), threading.active_count()) == (files, maps, threads)


async def test_a_pool_has_no_name_in_any_file_system(shm_rig: Rig) -> None:
    await shm_rig.fetch(Piece(0, 0, 0))
    assert not [name for name in os.listdir("/dev/shm") if "baton" in name]


@pytest.mark.parametrize("kind", ["shm", "cuda"])
@pytest.mark.parametrize("fenced", [True, False], ids=["fenced", "not fenced"])
async def test_pages_that_are_reused_while_they_are_read_are_never_served(fenced: bool, kind: str) -> None:
    """A writer gives pages up and fills them again as fast as it can; without the fence it is seen."""
    by_page = {"launch_bytes": LAYOUT.page_bytes} if kind == "cuda" else {}  # else the writer is always quicker
    rig = await make_rig(kind, page_s=0.0, check_epoch=fenced, **by_page)
    size, stop = LAYOUT.page_bytes, threading.Event()
    published = [(0, 0)]

    def content(page: int, epoch: int) -> bytes:
        return (page * 1000003 + epoch).to_bytes(8, "little") * (size // 8)

    def write() -> None:
        random, epochs = Random(1), [0] * 4
        while not stop.is_set():
            page = random.randrange(4)
            epochs[page] += 1
            rig.theirs.epochs[page] = epochs[page]  # given up before it is written
            rig.theirs.page(page)[:] = content(page, epochs[page])
            published[0] = (page, epochs[page])

    writer = threading.Thread(target=write)
    writer.start()
    served = stale = wrong = 0
    deadline_s = asyncio.get_running_loop().time() + 3.0
    while asyncio.get_running_loop().time() < deadline_s and served + stale < 3000 and not (wrong and not fenced):
        page, epoch = published[0]
        arrivals = await rig.fetch(*[Piece(page, epoch, target) for target in range(4)])
        for target, arrival in enumerate(arrivals):
            if isinstance(arrival, StalePage):
                stale += 1
            elif epoch:
                served += 1
                wrong += bytes(rig.ours.page(target)) != content(page, epoch)
    stop.set()
    writer.join()
    await close(rig)
    assert (wrong == 0 and served and stale) if fenced else wrong, (served, stale, wrong)


# --- two processes -------------------------------------------------------------------------------------------

SOURCE = """
import asyncio, sys
from core.layout import PageLayout
from core.messages import WorkerId
from kvtransfer.cuda_ipc import CudaIpcTransport
from kvtransfer.device_in_memory import InMemoryDevice
from kvtransfer.device_memory import Block, PageCopy
from kvtransfer.digest import XXH3_64, algorithm
from kvtransfer.frames import Frames
from kvtransfer.shm import ShmTransport

async def main(kind):
    layout = PageLayout(2, 2, 16, 64, "float32")
    frames = Frames.shared(layout, 32) if kind == "shm" else Frames.on_device(layout, 32, InMemoryDevice())
    for page in range(32):
        frames.write(page, bytes([page]) * frames.layout.page_bytes)
    transport = ShmTransport() if kind == "shm" else CudaIpcTransport()
    await transport.serve(frames, algorithm(XXH3_64))
    print((await transport.invite(WorkerId("d", 8))).decode(), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)

asyncio.run(main(sys.argv[1]))
"""


@dataclass
class Elsewhere:
    """A source in another process, and our receiver."""

    process: asyncio.subprocess.Process
    receiver: MappedTransport
    ours: Frames | Seen

    def fetch(self, page: int) -> asyncio.Future[list[Any]]:
        return asyncio.ensure_future(self.receiver.fetch(P, 1, [Piece(page, 0, page)]))


@pytest.fixture(params=["shm", "cuda"])
async def elsewhere(request: pytest.FixtureRequest) -> AsyncIterator[Elsewhere]:
    kind: str = request.param
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SOURCE, kind, cwd=ROOT, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None and process.stdin is not None
    descriptor = (await process.stdout.readline()).strip()
    ours = make_frames(kind)
    receiver = ShmTransport(patience_s=0.5) if kind == "shm" else CudaIpcTransport(patience_s=0.5)
    await receiver.serve(served(ours), XXH3)
    await receiver.meet(P, descriptor)
    yield Elsewhere(process, receiver, ours)
    if process.returncode is None:
        process.kill()
    await process.wait()
    process.stdin.close()
    await receiver.close()
    ours.close()


async def test_pages_cross_from_one_process_to_another(elsewhere: Elsewhere) -> None:
    await asyncio.gather(*(elsewhere.fetch(page) for page in range(PAGES)))
    assert all(bytes(elsewhere.ours.page(page)) == bytes([page]) * LAYOUT.page_bytes for page in range(PAGES))


@pytest.mark.parametrize("what", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_source_killed_or_stopped_before_it_was_mapped_is_lost_in_time(
    elsewhere: Elsewhere, what: signal.Signals
) -> None:
    elsewhere.process.send_signal(what)
    await asyncio.sleep(0.05)
    async with asyncio.timeout(2.0):
        with pytest.raises(PeerLost):
            await elsewhere.fetch(1)
        await elsewhere.receiver.forget(P)


@pytest.mark.parametrize("what", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_source_killed_or_stopped_once_mapped_never_hurts_its_reader(
    elsewhere: Elsewhere, what: signal.Signals
) -> None:
    maps = mapped_pools()
    await elsewhere.fetch(0)
    assert mapped_pools() == maps + 1
    elsewhere.process.send_signal(what)
    if what is signal.SIGKILL:
        await elsewhere.process.wait()
    async with asyncio.timeout(2.0):
        await elsewhere.fetch(1)  # its memory is ours as long as we map it
        assert bytes(elsewhere.ours.page(1)) == bytes([1]) * LAYOUT.page_bytes
        await elsewhere.receiver.forget(P)
    assert mapped_pools() == maps


# --- devices -------------------------------------------------------------------------------------------------


class SlowToOpen(InMemoryDevice):
    """As a driver may be. `opened` holds what has not been closed."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = threading.Event()
        self.may_go_on = threading.Event()
        self.opened: list[Block] = []

    def open(self, handle: bytes, size_bytes: int) -> Block:
        self.begun.set()
        assert self.may_go_on.wait(5.0)
        self.opened.append(super().open(handle, size_bytes))
        return self.opened[-1]

    def close(self, block: Block) -> None:
        self.opened = [other for other in self.opened if other is not block]
        super().close(block)


async def test_a_peer_that_is_forgotten_while_its_block_is_opened_leaves_nothing_open() -> None:
    rig = await make_rig("cuda")
    device = SlowToOpen()
    ours = Frames.on_device(LAYOUT, PAGES, device)
    receiver = CudaIpcTransport()
    await receiver.serve(ours, XXH3)
    await receiver.meet(P, rig.descriptor)
    fetch = asyncio.ensure_future(receiver.fetch(P, 1, [Piece(0, 0, 0)]))
    await asyncio.to_thread(device.begun.wait, 5.0)
    forgetting = asyncio.ensure_future(receiver.forget(P))
    await asyncio.sleep(0.01)
    assert not forgetting.done(), "what is being opened is to be closed first"
    device.may_go_on.set()
    await forgetting
    with pytest.raises(PeerLost):
        await fetch
    assert not device.opened
    await receiver.meet(P, rig.descriptor)
    assert isinstance((await receiver.fetch(P, 1, [Piece(0, 0, 0)]))[0], bytes) and len(device.opened) == 1
    await receiver.close()
    assert not device.opened
    ours.close()
    await close(rig)


class NotExporting(InMemoryDevice):
    """Of a driver that does not."""

    def allocate(self, size_bytes: int) -> Block:
        return replace(super().allocate(size_bytes), handle=b"")


async def test_what_cannot_be_opened_loses_the_peer_in_words() -> None:
    rig = await make_rig("cuda")
    frames = Frames.on_device(LAYOUT, PAGES, NotExporting())
    silent = CudaIpcTransport()
    await silent.serve(frames, XXH3)
    await rig.receiver.meet(P, await silent.invite(D))
    with pytest.raises(PeerLost, match="does not export its memory"):
        await rig.fetch(Piece(0, 0, 0))
    shared = ShmTransport()
    in_memory = Frames.shared(LAYOUT, PAGES)
    await shared.serve(in_memory, XXH3)
    await rig.receiver.forget(P)
    await rig.receiver.meet(P, await shared.invite(D))
    with pytest.raises(HandoffError, match="one of the two pools is on a device"):
        await rig.fetch(Piece(0, 0, 0))
    await silent.close()
    await shared.close()
    frames.close()
    in_memory.close()
    await close(rig)


async def test_a_device_that_fails_in_a_copy_loses_the_peer_and_serves_the_next_fetch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = await make_rig("cuda")

    def fail(self: InMemoryDevice, *_: object) -> None:
        raise PeerLost("the GPU has failed")

    with monkeypatch.context() as patched:
        patched.setattr(InMemoryDevice, "copy", fail)
        with pytest.raises(PeerLost, match="has failed"):
            await rig.fetch(Piece(0, 0, 0))
    assert isinstance((await rig.fetch(Piece(0, 0, 0)))[0], bytes)
    await close(rig)


async def test_a_fetch_is_copied_in_launches_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    rig, launches = await make_rig("cuda"), []
    copy = InMemoryDevice.copy

    def watched(self: InMemoryDevice, source: Block, target: Block, size: int, pages: Sequence[PageCopy]) -> None:
        launches.append(len(pages))
        copy(self, source, target, size, pages)

    monkeypatch.setattr(InMemoryDevice, "copy", watched)
    rig.theirs.epochs[9] = 1
    arrivals = await rig.fetch(*(Piece(page, 0, page) for page in range(20)))
    assert launches == [8, 7, 4] and isinstance(arrivals[9], StalePage)
    await close(rig)


def test_the_seals_are_there() -> None:
    frames = Frames.shared(LAYOUT, 1)
    assert frames.fd is not None
    seals = fcntl.fcntl(frames.fd, fcntl.F_GET_SEALS)
    assert seals == fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL | 0x10
    frames.close()
