"""A GPU's memory by CUDA's runtime: blocks from cudaMalloc itself, exported by CUDA IPC, moved by Triton kernels.

torch's own allocator will not do: it carves tensors out of larger allocations, and an IPC handle names a whole one.
Everything else goes through torch, on one stream that waits for nobody: pages are complete before they are offered.
torch, Triton and cuda.bindings are loaded when a device is made. A process sees one GPU, number 0.

Never run on a GPU, and not measured.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NoReturn

from core.errors import ConfigError, PeerLost, TooLittleMemory
from core.layout import PageLayout
from kvtransfer.device_memory import Block, PageCopy
from kvtransfer.digest import XXH3_64, SegmentDigest, algorithm, digest_page

DEVICE = 0
HANDLE_BYTES = 64  # CUDA_IPC_HANDLE_SIZE
LEAST_SEGMENT_BYTES, SEGMENT_UNIT_BYTES = 256, 16  # that kernels.gpu.segment_digest takes
SHARED = "others may use it: give the workers that share a GPU less each, --gpu-share or --kv-bytes"
KEPT_VIEWS = 64  # tensors over blocks


class CudaDevice:
    """Raises ConfigError where cuda.bindings, torch with CUDA, Triton or the GPU is missing."""

    on_gpu = True

    def __init__(self) -> None:
        try:
            import torch
            from cuda.bindings import runtime

            from kernels.gpu import errors, segment_digest, segments
        except ImportError as error:
            raise ConfigError(f"pages in a GPU's memory need cuda-bindings and triton ({error}): baton[gpu]") from error
        if not torch.cuda.is_available():
            raise ConfigError("pages in a GPU's memory: torch finds no GPU here")
        self._torch, self._runtime = torch, runtime
        self._segments, self._digest, self._errors = segments, segment_digest, errors.KERNEL_ERRORS
        self._where = torch.device("cuda", DEVICE)
        self.enter()
        self._stream = torch.cuda.Stream(self._where)
        self._prepare()

    def _prepare(self) -> None:
        self._ours: set[Block] = set()
        self._turn = threading.Lock()  # of the stream: what one thread waits for is its own
        self._over = lru_cache(KEPT_VIEWS)(self._bytes_over)
        with self._launching():
            self._constants = self._digest.digest_constants(self._where)

    @property
    def name(self) -> str:
        """The UUID of the GPU, or of the slice of one that this process sees."""
        return str(self._torch.cuda.get_device_properties(self._where).uuid)

    def enter(self) -> None:
        self._call("cudaSetDevice", DEVICE, failing=_no_gpu)

    # --- blocks ------------------------------------------------------------------------------------------------

    def allocate(self, size_bytes: int) -> Block:
        """Without a handle where the driver does not export memory, as under some virtual GPUs."""

        def too_little(what: str) -> NoReturn:
            raise TooLittleMemory(f"the GPU has no {size_bytes} bytes in one piece for the pool ({what}); {SHARED}")

        self.enter()
        address = int(self._call("cudaMalloc", size_bytes, failing=too_little))
        self._call("cudaMemset", address, 0, size_bytes, failing=too_little)
        self._call("cudaDeviceSynchronize", failing=too_little)
        block = Block(address, size_bytes, self._exported(address))
        self._ours.add(block)
        return block

    def _exported(self, address: int) -> bytes:
        try:
            handle = self._call("cudaIpcGetMemHandle", address, failing=_lost)
        except PeerLost:
            return b""
        return ctypes.string_at(int(handle.getPtr()), HANDLE_BYTES)  # the one view of it that all versions have

    def open(self, handle: bytes, size_bytes: int) -> Block:
        """The size is the peer's word: CUDA does not say how large what it has opened is."""
        if len(handle) != HANDLE_BYTES:
            raise PeerLost(f"a handle of {len(handle)} bytes")
        given = self._runtime.cudaIpcMemHandle_t()
        ctypes.memmove(int(given.getPtr()), handle, HANDLE_BYTES)
        self.enter()
        flags = int(self._runtime.cudaIpcMemLazyEnablePeerAccess)
        return Block(int(self._call("cudaIpcOpenMemHandle", given, flags, failing=_lost)), size_bytes)

    def close(self, block: Block) -> None:
        """A peer's is unmapped. One of ours is freed, which only who has no peers may do (see `cuda_ipc`)."""
        self.enter()
        self._over.cache_clear()
        ours = block in self._ours
        self._ours.discard(block)
        self._call("cudaFree" if ours else "cudaIpcCloseMemHandle", block.address, failing=_lost)

    # --- bytes -------------------------------------------------------------------------------------------------

    def copy(self, source: Block, target: Block, page_bytes: int, pages: Sequence[PageCopy]) -> None:
        with self._launching():
            sources, targets = (self._list([getattr(page, side) for page in pages]) for side in ("source", "target"))
            theirs, ours = self._frames(source, 1, page_bytes), self._frames(target, 1, page_bytes)
            self._segments.copy_pages_between(theirs, sources, ours, targets)

    def digests(self, block: Block, layout: PageLayout, pages: Sequence[int], of: SegmentDigest) -> list[bytes]:
        """xxh3 where the pages lie; other digests, and of segments that its kernel does not take, on the host."""
        size = layout.segment_bytes
        if of is not algorithm(XXH3_64) or size < LEAST_SEGMENT_BYTES or size % SEGMENT_UNIT_BYTES:
            return [digest_page(memoryview(self._read(block, layout, page)), layout, 0, of) for page in pages]
        with self._launching():
            frames = self._frames(block, layout.kv_heads, layout.page_bytes)
            found = self._digest.segment_digests(frames, self._list(pages), 0, layout.kv_heads, self._constants)
            on_host = self._to_host(found)
        return [page.tobytes() for page in on_host.numpy()]

    def _read(self, block: Block, layout: PageLayout, page: int) -> bytes:
        start = page * layout.page_bytes
        with self._launching():
            on_host = self._to_host(self._over(block)[start : start + layout.page_bytes])
        return bytes(on_host.numpy())

    def write(self, block: Block, at: int, content: bytes) -> None:
        on_host = self._torch.frombuffer(bytearray(content), dtype=self._torch.uint8)
        with self._launching():
            self._over(block)[at : at + len(content)] = self._to_device(on_host)

    @contextmanager
    def _launching(self) -> Iterator[None]:
        """What is launched inside has been done at the end, also when something behind it failed. Raises PeerLost."""
        torch = self._torch
        with self._turn:
            try:
                try:
                    with torch.inference_mode(), torch.cuda.device(self._where), torch.cuda.stream(self._stream):
                        yield
                finally:
                    self._stream.synchronize()
            except (RuntimeError, *self._errors) as error:
                raise PeerLost(f"the GPU has failed: {error}") from error

    def _list(self, pages: Sequence[int]) -> Any:
        """[n] int32, on the device."""
        return self._to_device(self._torch.tensor(pages, dtype=self._torch.int32))

    def _to_device(self, tensor: Any) -> Any:
        """Through pinned memory, which torch keeps until the copy has run."""
        return tensor.pin_memory().to(self._where, non_blocking=True)

    def _to_host(self, tensor: Any) -> Any:
        """It is there when what was launched has been done."""
        on_host = self._torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return on_host.copy_(tensor, non_blocking=True)

    def _frames(self, block: Block, heads: int, page_bytes: int) -> Any:
        """[pages, heads, 1, 2, 1, bytes], as the kernels take pages."""
        return self._over(block).view(-1, heads, 1, 2, 1, page_bytes // heads // 2)

    def _bytes_over(self, block: Block) -> Any:
        """[bytes]. As of our GPU, wherever they lie: what reads them is launched there, and reaches them or fails.

        The public ways to lay a tensor over an address ask the driver whose it is. The GPU of a peer may be one that
        this process does not see, and so has no number here.
        """
        storage = self._torch._C._construct_storage_from_data_pointer(block.address, self._where, block.size_bytes)
        empty = self._torch.empty(0, dtype=self._torch.uint8, device=self._where)
        return empty.set_(storage, 0, (block.size_bytes,), (1,))

    def _call(self, name: str, *args: object, failing: Callable[[str], NoReturn]) -> Any:
        """What the runtime returns beside its status."""
        status, *returned = getattr(self._runtime, name)(*args)
        if int(status) != 0:
            self._runtime.cudaGetLastError()  # it is said here, and not by whoever looks next on this thread
            failing(f"{name}: {getattr(status, 'name', status)}")
        return returned[0] if returned else None


def _lost(what: str) -> NoReturn:
    raise PeerLost(f"CUDA: {what}")


def _no_gpu(what: str) -> NoReturn:
    raise ConfigError(f"the GPU cannot be used: {what}")
