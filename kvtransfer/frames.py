"""The memory of a page pool: all frames in one allocation, then one epoch per frame, so that peers can map it whole.

    [pages + 2][page_bytes]   pad to 4096   [pages + 2] u64 epochs

A pool on a device has its frames in one block of the device, and only the epochs in the host's memory.

Two frames lie beyond the pool's pages, and no sequence ever owns them: the pattern, which peers fetch to prove the path
from here, and the landing, where our own proofs arrive. Only a proof may touch them, and it may touch nothing else.

Anonymous memory serves a worker whose peers live in the same process (or that has none); a memfd can be passed to
another process. It is sealed against resizing, so that a reader is never killed by SIGBUS, and against further
writable mappings, so that a reader can map it for reading only. It has no name in any file system: nothing is left
behind, whoever dies.

A fresh page of memory costs microseconds at its first touch, so a pool is faulted in when it is made.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Callable, Sequence

from core.errors import OutOfBounds
from core.layout import PageLayout
from kvtransfer.device_memory import Block, DeviceMemory, PageCopy
from kvtransfer.digest import XXH3_64, SegmentDigest, algorithm, digest_page

ALIGN = mmap.PAGESIZE
EPOCH_BYTES = 8
PROOF_FRAMES = 2  # the pattern, then the landing
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
F_SEAL_FUTURE_WRITE = 0x10  # linux/fcntl.h; Python names it from 3.13 on
MADV_POPULATE_WRITE = 23  # linux/mman.h, Linux 5.14
FAULT_STEP_BYTES = 64 << 20
WARM_COUNTS = (1, 3, 16, 256)  # pages: one, some, a whole number of the compiler's units, enough to fill a chip

Progress = Callable[[int, int], None]  # bytes done, bytes in all


def memory_bytes(pages: int, page_bytes: int) -> int:
    """Size of the allocation for a pool of so many pages: frames and epochs, each aligned to the machine's memory."""
    return epochs_offset(pages, page_bytes) + _aligned((pages + PROOF_FRAMES) * EPOCH_BYTES)


def epochs_offset(pages: int, page_bytes: int) -> int:
    return _aligned((pages + PROOF_FRAMES) * page_bytes)


def pattern_of(pages: int) -> int:
    """The frame that proofs fetch, in a pool of so many pages."""
    return pages


def check_source(index: int, pages: int, *, proof: bool) -> None:
    """Raise OutOfBounds unless a fetch may read this frame of a pool of so many pages."""
    if not (index == pattern_of(pages) if proof else 0 <= index < pages):
        raise OutOfBounds(f"page {index} of a pool of {pages}")


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


class Frames:
    """Owns the memory. `buffer` is for the engine (writable, pages * page_bytes), `epochs` for the pool.

    `everything` is for transports: the pool's pages, the pattern and the landing. The epoch of these two is always 0.
    Where the pages lie on a device there is neither: there is `block`, on `device`.
    """

    def __init__(
        self,
        layout: PageLayout,
        pages: int,
        memory: mmap.mmap,
        fd: int | None,
        device: DeviceMemory | None = None,
        block: Block | None = None,
    ) -> None:
        self.layout = layout
        self.pages = pages
        self.fd = fd
        self.device = device
        self.block = block
        self._memory = memory
        host_bytes = layout.page_bytes if block is None else 0  # of each frame
        whole = memoryview(memory)
        at = epochs_offset(pages, host_bytes)
        self._everything = whole[: (pages + PROOF_FRAMES) * host_bytes]
        self._buffer = whole[: pages * host_bytes]
        self.epochs = whole[at : at + pages * EPOCH_BYTES].cast("Q")
        whole.release()

    @property
    def everything(self) -> memoryview:
        assert self.block is None, "the pages lie on a device"
        return self._everything

    @property
    def buffer(self) -> memoryview:
        assert self.block is None, "the pages lie on a device"
        return self._buffer

    @classmethod
    def anonymous(cls, layout: PageLayout, pages: int, progress: Progress | None = None) -> Frames:
        size = memory_bytes(pages, layout.page_bytes)
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        _fault_in(memory, size, progress)
        return cls(layout, pages, memory, None)

    @classmethod
    def shared(cls, layout: PageLayout, pages: int, progress: Progress | None = None) -> Frames:
        """Memory that another process can map for reading, given the file descriptor."""
        memory, fd = _shared_memory(memory_bytes(pages, layout.page_bytes), progress)
        return cls(layout, pages, memory, fd)

    @classmethod
    def on_device(cls, layout: PageLayout, pages: int, device: DeviceMemory) -> Frames:
        """Pages, pattern and landing in one block of the device; epochs that another process can map for reading.

        Raises TooLittleMemory.
        """
        block = device.allocate((pages + PROOF_FRAMES) * layout.page_bytes)
        memory, fd = _shared_memory(memory_bytes(pages, 0), None)
        return cls(layout, pages, memory, fd, device, block)

    def warm_up(self) -> None:
        """Have the device do what hand-offs will ask of it, between the two frames of proofs: it compiles kernels then.

        A compilation takes seconds, and whoever wants the device waits for it. Few pages have other kernels than many.
        """
        assert self.device is not None and self.block is not None
        for count in WARM_COUNTS:
            pages = [PageCopy(self.pattern, self.landing)] * count
            self.device.copy(self.block, self.block, self.layout.page_bytes, pages)
            self.device.digests(self.block, self.layout, [self.landing] * count, algorithm(XXH3_64))

    @property
    def pattern(self) -> int:
        return pattern_of(self.pages)

    @property
    def landing(self) -> int:
        return self.pages + 1

    def page(self, index: int) -> memoryview:
        """The bytes of one page. Raises OutOfBounds."""
        self.check(index)
        return self.frame(index)

    def frame(self, index: int) -> memoryview:
        """The bytes of one frame, which has been checked."""
        size = self.layout.page_bytes
        return self.everything[index * size : (index + 1) * size]

    def write(self, index: int, content: bytes) -> None:
        """Fill one frame, which has been checked, wherever it lies. Waits for the device."""
        if self.device is not None and self.block is not None:
            self.device.write(self.block, index * self.layout.page_bytes, content)
        else:
            self.frame(index)[:] = content

    def digests(self, indices: Sequence[int], of: SegmentDigest) -> list[bytes]:
        """Of each of these frames, which have been checked, where it lies. Blocks; raises PeerLost with the device."""
        if not indices:
            return []  # a device is not troubled for nothing
        if self.device is not None and self.block is not None:
            return self.device.digests(self.block, self.layout, indices, of)
        return [digest_page(self.everything, self.layout, index, of) for index in indices]

    def epoch(self, index: int) -> int:
        """Of one frame, which has been checked."""
        return self.epochs[index] if index < self.pages else 0

    def check(self, index: int) -> None:
        """Raise OutOfBounds for an index that is not one of this pool's pages."""
        check_source(index, self.pages, proof=False)

    def check_source(self, index: int, *, proof: bool) -> None:
        """Raise OutOfBounds unless a peer's fetch may read this frame: a page, or for a proof the pattern alone."""
        check_source(index, self.pages, proof=proof)

    def check_target(self, index: int, *, proof: bool) -> None:
        """Raise OutOfBounds unless a fetch may write this frame: a page, or for a proof the landing alone."""
        if not (index == self.landing if proof else 0 <= index < self.pages):
            raise OutOfBounds(f"frame {index} as the target in a pool of {self.pages}")

    def close(self) -> None:
        """Give the memory back, unless somebody still looks at it: then it goes with the last view.

        A block of a device goes at once: nothing may be under way there, and no peer may have it mapped.
        """
        if self.device is not None and self.block is not None:
            self.device.close(self.block)
            self.device = None
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None
        try:
            self._everything.release()
            self._buffer.release()
            self.epochs.release()
            self._memory.close()
        except BufferError:
            pass  # a tensor of the engine still lies over it


def _shared_memory(size: int, progress: Progress | None) -> tuple[mmap.mmap, int]:
    """A sealed memfd, faulted in, and its descriptor."""
    fd = os.memfd_create("baton-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        memory = mmap.mmap(fd, size)
        _fault_in(memory, size, progress)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS | F_SEAL_FUTURE_WRITE)
    except OSError:
        os.close(fd)
        raise
    return memory, fd


def _fault_in(memory: mmap.mmap, size: int, progress: Progress | None) -> None:
    """Touch every page of the machine's memory now, in steps that can be shown."""
    for start in range(0, size, FAULT_STEP_BYTES):
        length = min(FAULT_STEP_BYTES, size - start)
        try:
            memory.madvise(MADV_POPULATE_WRITE, start, length)
        except OSError:  # an older kernel: write a byte to each
            for at in range(start, start + length, ALIGN):
                memory[at] = 0
        if progress is not None:
            progress(start + length, size)
