"""A device whose memory is the host's: what tests use where there is no GPU. It keeps every promise of a device.

A block is a memfd, so that another process of this user opens it by the source's process and descriptor number, and
whoever has it mapped keeps it when the source dies. Copies take as long as they are told to.
"""

from __future__ import annotations

import json
import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from core.errors import PeerLost, TooLittleMemory
from core.layout import PageLayout
from kvtransfer.device_memory import Block, PageCopy
from kvtransfer.digest import SegmentDigest, digest_page

Bytes = npt.NDArray[np.uint8]


class InMemoryDevice:
    """`page_s`: how long a page takes to copy. `on_gpu` is False: the host can touch what lies here."""

    on_gpu = False

    def __init__(self, name: str = "memory", page_s: float = 0.0, sleep: Callable[[float], None] = time.sleep) -> None:
        self._name = name
        self._page_s = page_s
        self._sleep = sleep
        self._maps: dict[int, tuple[mmap.mmap, int | None]] = {}  # by address, with the descriptor of what is ours
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return self._name

    def enter(self) -> None:
        """There is nothing to make current."""

    def allocate(self, size_bytes: int) -> Block:
        fd = os.memfd_create("baton-device", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size_bytes)
            memory = mmap.mmap(fd, size_bytes)
        except OSError as error:
            os.close(fd)
            raise TooLittleMemory(f"no {size_bytes} bytes: {error}") from error
        where = {"pid": os.getpid(), "fd": fd, "inode": os.fstat(fd).st_ino}
        return self._keep(memory, size_bytes, fd, json.dumps(where).encode())

    def open(self, handle: bytes, size_bytes: int) -> Block:
        """Read-only: a copy into a peer's block is a mistake that shows."""
        try:
            where = json.loads(handle)
            fd = os.open(f"/proc/{int(where['pid'])}/fd/{int(where['fd'])}", os.O_RDONLY | os.O_CLOEXEC)
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise PeerLost(f"the peer's block cannot be opened: {error!r}") from error
        try:
            found = os.fstat(fd)
            if found.st_ino != where["inode"] or found.st_size < size_bytes:
                raise PeerLost(f"the peer's block is not there any more: {found.st_size} bytes")
            memory = mmap.mmap(fd, size_bytes, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        return self._keep(memory, size_bytes, None, b"")

    def _keep(self, memory: mmap.mmap, size_bytes: int, fd: int | None, handle: bytes) -> Block:
        address = int(np.frombuffer(memory, np.uint8).ctypes.data)
        with self._lock:
            self._maps[address] = memory, fd
        return Block(address, size_bytes, handle)

    def close(self, block: Block) -> None:
        with self._lock:
            memory, fd = self._maps.pop(block.address)
        memory.close()
        if fd is not None:
            os.close(fd)

    def view(self, block: Block) -> memoryview:
        """The bytes of an open block. To be released before it is closed."""
        return memoryview(self._maps[block.address][0])

    def copy(self, source: Block, target: Block, page_bytes: int, pages: Sequence[PageCopy]) -> None:
        theirs, ours = self._rows(source, page_bytes), self._rows(target, page_bytes)
        for page in pages:
            np.copyto(ours[page.target], theirs[page.source])
            if self._page_s:
                self._sleep(self._page_s)

    def _rows(self, block: Block, page_bytes: int) -> Bytes:
        """[pages, page_bytes]"""
        return np.frombuffer(self._maps[block.address][0], np.uint8).reshape(-1, page_bytes)

    def digests(self, block: Block, layout: PageLayout, pages: Sequence[int], of: SegmentDigest) -> list[bytes]:
        with self.view(block) as whole:
            return [digest_page(whole, layout, page, of) for page in pages]

    def write(self, block: Block, at: int, content: bytes) -> None:
        with self.view(block) as whole:
            whole[at : at + len(content)] = content
