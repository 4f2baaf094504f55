"""One contract for a device's memory: the stand-in in the host's, and `CudaDevice`.

Without a GPU the second runs over a stand-in for CUDA's runtime, in Triton's interpreter. With one it is the real
thing, but for opening: a process cannot open what it has exported itself.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from core.errors import ConfigError, PeerLost, TooLittleMemory
from core.layout import PageLayout
from kvtransfer.device_cuda import HANDLE_BYTES, CudaDevice
from kvtransfer.device_in_memory import InMemoryDevice
from kvtransfer.device_memory import MAX_HANDLE_BYTES, Block, DeviceMemory, PageCopy
from kvtransfer.digest import XXH3_64, algorithm, digest_page, keyed
from kvtransfer.frames import Frames
from tests.kernels_gpu.conftest import COMPILED
from tests.kernels_gpu.cuda_stand_in import LARGEST_BYTES, Interpreted, Runtime, Status

ROOT = Path(__file__).resolve().parents[2]
LAYOUT = PageLayout(kv_heads=2, layers=1, page_size=16, head_dim=8, dtype="float32")  # segments of 1 KiB
SMALL = PageLayout(kv_heads=2, layers=1, page_size=16, head_dim=2, dtype="uint8")  # of 64 bytes
XXH3 = algorithm(XXH3_64)
PAGES = 5


@pytest.fixture(params=["memory", "cuda"])
def device(request: pytest.FixtureRequest) -> DeviceMemory:
    made: DeviceMemory = InMemoryDevice()
    if request.param == "cuda":
        made = CudaDevice() if COMPILED else Interpreted()
    made.enter()
    return made


@pytest.fixture
def blocks(device: DeviceMemory) -> Iterator[tuple[Block, Block]]:
    made = device.allocate(PAGES * LAYOUT.page_bytes), device.allocate(PAGES * LAYOUT.page_bytes)
    yield made
    for block in made:
        device.close(block)


def opened(device: DeviceMemory, block: Block) -> Block:
    is_real = isinstance(device, CudaDevice) and not isinstance(device, Interpreted)
    return block if is_real else device.open(block.handle, block.size_bytes)


def let_go(device: DeviceMemory, block: Block, ours: Block) -> None:
    if block is not ours:
        device.close(block)


def digests(content: bytes, layout: PageLayout = LAYOUT, of: Any = XXH3) -> list[bytes]:
    whole = memoryview(content)
    return [digest_page(whole, layout, page, of) for page in range(len(content) // layout.page_bytes)]


def test_a_block_is_zeroed_and_tells_how_to_open_it(device: DeviceMemory, blocks: tuple[Block, Block]) -> None:
    assert device.name
    for block in blocks:
        assert 0 < len(block.handle) <= MAX_HANDLE_BYTES
        assert block.address and block.size_bytes == PAGES * LAYOUT.page_bytes
        assert device.digests(block, LAYOUT, range(PAGES), XXH3) == digests(bytes(block.size_bytes))
    assert blocks[0].handle != blocks[1].handle


def test_pages_are_copied_out_of_an_opened_block(device: DeviceMemory, blocks: tuple[Block, Block]) -> None:
    theirs, ours = blocks
    content = Random(1).randbytes(theirs.size_bytes)
    device.write(theirs, 0, content)
    source = opened(device, theirs)
    device.copy(source, ours, LAYOUT.page_bytes, [PageCopy(4, 0), PageCopy(1, 3), PageCopy(4, 0)])
    of = digests(content)
    zeros = digests(bytes(LAYOUT.page_bytes))[0]
    assert device.digests(ours, LAYOUT, range(PAGES), XXH3) == [of[4], zeros, zeros, of[1], zeros]
    assert device.digests(theirs, LAYOUT, [3, 0], XXH3) == [of[3], of[0]]
    let_go(device, source, theirs)
    assert device.digests(ours, LAYOUT, [3], XXH3) == [of[1]], "what was copied is ours"


def test_bytes_are_written_where_they_belong(device: DeviceMemory, blocks: tuple[Block, Block]) -> None:
    block, size = blocks[0], LAYOUT.page_bytes
    content = Random(2).randbytes(size)
    device.write(block, 2 * size, content)
    assert device.digests(block, LAYOUT, range(PAGES), XXH3) == digests(bytes(2 * size) + content + bytes(2 * size))


def test_other_digests_and_small_segments_are_computed_too(device: DeviceMemory, blocks: tuple[Block, Block]) -> None:
    block, of = blocks[0], keyed(b"k" * 32).of
    content = Random(3).randbytes(block.size_bytes)
    device.write(block, 0, content)
    assert device.digests(block, LAYOUT, [4, 0], of) == [digests(content, of=of)[page] for page in (4, 0)]
    assert device.digests(block, SMALL, [7, 2], XXH3) == [digests(content, SMALL)[page] for page in (7, 2)]


def test_too_large_a_block_is_refused(device: DeviceMemory) -> None:
    if COMPILED or isinstance(device, Interpreted):
        with pytest.raises(TooLittleMemory, match="in one piece"):
            device.allocate(LARGEST_BYTES << 14)


def test_what_is_no_handle_opens_nothing(device: DeviceMemory) -> None:
    for handle in (b"", b"x", b"{}", b"\xff" * 64, b'{"pid": 1, "fd": 99999, "inode": 5}'):
        with pytest.raises(PeerLost):
            device.open(handle, 4096)


def test_a_block_that_is_gone_cannot_be_opened(device: DeviceMemory) -> None:
    block = device.allocate(4096)
    handle = block.handle
    device.close(block)
    with pytest.raises(PeerLost):
        device.open(handle, 4096)


def test_a_pool_is_warmed_up_between_the_frames_of_proofs(
    device: DeviceMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtransfer.frames.WARM_COUNTS", (1, 3))
    frames = Frames.on_device(LAYOUT, 2, device)
    content = Random(4).randbytes(LAYOUT.page_bytes)
    frames.write(frames.pattern, content)
    frames.warm_up()
    of = digests(content)[0]
    zeros = digests(bytes(LAYOUT.page_bytes))[0]
    assert frames.digests([0, 1, frames.pattern, frames.landing], XXH3) == [zeros, zeros, of, of]
    frames.close()


# --- what CUDA alone has ---------------------------------------------------------------------------------------


def test_what_is_opened_is_closed_and_what_is_ours_is_freed() -> None:
    device = Interpreted()
    runtime: Runtime = device._runtime
    runtime.exports = False
    ours = device.allocate(4096)
    assert ours.handle == b"", "a driver that exports nothing"
    runtime.exports = True
    other = device.allocate(4096)
    peer = device.open(other.handle, 4096)
    device.close(peer)
    assert not runtime.opened and len(runtime.memory) == 2
    device.close(ours)
    device.close(other)
    assert not runtime.memory


def test_the_runtime_takes_what_it_is_called_with() -> None:
    """The real one, without a driver: each call fails with a status, and none because of its arguments."""
    runtime = pytest.importorskip("cuda.bindings.runtime")
    if COMPILED:
        pytest.skip("with a GPU the calls would be carried out")
    device = Interpreted()
    device._runtime = runtime
    handle = runtime.cudaIpcMemHandle_t()
    ctypes.memmove(int(handle.getPtr()), bytes(range(HANDLE_BYTES)), HANDLE_BYTES)
    assert ctypes.string_at(int(handle.getPtr()), HANDLE_BYTES) == bytes(range(HANDLE_BYTES))
    assert int(runtime.cudaIpcMemLazyEnablePeerAccess) == 1
    with pytest.raises(ConfigError, match="cudaSetDevice: cudaError"):
        device.enter()
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("cudaMalloc", (4096,)),
        ("cudaMemset", (4096, 0, 4096)),
        ("cudaDeviceSynchronize", ()),
        ("cudaIpcGetMemHandle", (4096,)),
        ("cudaIpcOpenMemHandle", (handle, 1)),
        ("cudaIpcCloseMemHandle", (4096,)),
        ("cudaFree", (4096,)),
        ("cudaGetLastError", ()),
    ]
    for name, arguments in calls:
        status, *_ = getattr(runtime, name)(*arguments)
        assert int(status) != int(Status.cudaSuccess), name
        assert callable(getattr(Runtime(), name)), "and the stand-in has it"


@pytest.mark.skipif(COMPILED, reason="there is a GPU")
def test_without_a_gpu_the_error_says_so() -> None:
    with pytest.raises(ConfigError, match="no GPU"):
        CudaDevice()


def test_importing_it_loads_nothing_of_it() -> None:
    program = (
        "import sys, kvtransfer.device_cuda, kvtransfer.cuda_ipc\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'triton', 'cuda.bindings')))"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=60)
