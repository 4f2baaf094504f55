"""The memory of a page pool: all frames in one allocation, then one epoch per frame, so that peers can map it whole.

    [pages + 2][page_bytes]   pad to 4096   [pages + 2] u64 epochs

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
from collections.abc import Callable

from core.errors import OutOfBounds
from core.layout import PageLayout

ALIGN = mmap.PAGESIZE
EPOCH_BYTES = 8
PROOF_FRAMES = 2  # the pattern, then the landing
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
F_SEAL_FUTURE_WRITE = 0x10  # linux/fcntl.h; Python names it from 3.13 on
MAP_NORESERVE = 0x4000  # linux/mman.h; Python names it from 3.13 on
MADV_POPULATE_WRITE = 23  # linux/mman.h, Linux 5.14
FAULT_STEP_BYTES = 64 << 20

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
    """

    def __init__(self, layout: PageLayout, pages: int, memory: mmap.mmap, fd: int | None) -> None:
        self.layout = layout
        self.pages = pages
        self.fd = fd
        self._memory = memory
        whole = memoryview(memory)
        at = epochs_offset(pages, layout.page_bytes)
        self.everything = whole[: (pages + PROOF_FRAMES) * layout.page_bytes]
        self.buffer = whole[: pages * layout.page_bytes]
        self.epochs = whole[at : at + pages * EPOCH_BYTES].cast("Q")
        whole.release()

    @classmethod
    def anonymous(cls, layout: PageLayout, pages: int, progress: Progress | None = None) -> Frames:
        size = memory_bytes(pages, layout.page_bytes)
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        _fault_in(memory, size, progress)
        return cls(layout, pages, memory, None)

    @classmethod
    def shared(cls, layout: PageLayout, pages: int, progress: Progress | None = None) -> Frames:
        """Memory that another process can map for reading, given the file descriptor."""
        size = memory_bytes(pages, layout.page_bytes)
        fd = os.memfd_create("baton-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            memory = mmap.mmap(fd, size)
            _fault_in(memory, size, progress)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS | F_SEAL_FUTURE_WRITE)
        except OSError:
            os.close(fd)
            raise
        return cls(layout, pages, memory, fd)

    @classmethod
    def on_device(cls, layout: PageLayout, pages: int) -> Frames:
        """The bookkeeping of a pool whose pages lie in a device's memory: epochs, and the two frames of proofs.

        `buffer` is address space that nobody touches, so it takes no memory; nothing can be fetched from it or into it.
        """
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        return cls(layout, pages, mmap.mmap(-1, memory_bytes(pages, layout.page_bytes), flags=flags), None)

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
        """Give the memory back, unless somebody still looks at it: then it goes with the last view."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None
        try:
            self.everything.release()
            self.buffer.release()
            self.epochs.release()
            self._memory.close()
        except BufferError:
            pass  # a tensor of the engine still lies over it


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
