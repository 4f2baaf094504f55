"""What the hand-off needs of a device's memory: blocks that never move, and that another process can map.

A pool on a device is one block. Its pages are copied and digested where they lie; the host reads none of them on the
way. One contract test runs over all implementations (tests/kernels_gpu/test_device_memory.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from core.layout import PageLayout
from kvtransfer.digest import SegmentDigest

MAX_HANDLE_BYTES = 256


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """One allocation, ours or a peer's. `handle` is empty for a peer's, and where the device cannot export memory."""

    address: int  # in this process
    size_bytes: int
    handle: bytes = b""  # with it, and nothing else, another process of this user opens the block


@dataclass(frozen=True, slots=True)
class PageCopy:
    """Pages of an opened block to pages of one of ours."""

    source: int
    target: int


class DeviceMemory(Protocol):
    """One device's memory, as this process has it.

    `copy`, `digests` and `write` return when the device is done, with the interpreter's lock released while they wait.
    They do not wait for what others have launched there. May be called on any thread, by several at once.
    """

    @property
    def name(self) -> str:
        """The same in every process that uses this device, and of no other device in the world."""
        ...

    @property
    def on_gpu(self) -> bool:
        """Whether addresses of its blocks mean nothing to the host."""
        ...

    def enter(self) -> None:
        """Make the device current on the calling thread, for a library that expects it there."""
        ...

    def allocate(self, size_bytes: int) -> Block:
        """Zeroed. Raises TooLittleMemory."""
        ...

    def open(self, handle: bytes, size_bytes: int) -> Block:
        """Map a peer's block of at least so many bytes. Raises PeerLost when it is not there, or cannot be reached."""
        ...

    def close(self, block: Block) -> None:
        """Unmap a peer's block, or free one of ours. Nothing may be copied out of it, or into it, any more."""
        ...

    def copy(self, source: Block, target: Block, page_bytes: int, pages: Sequence[PageCopy]) -> None:
        """Whole pages, in any order: no target twice, unless from the same source. Raises PeerLost if that failed."""
        ...

    def digests(self, block: Block, layout: PageLayout, pages: Sequence[int], of: SegmentDigest) -> list[bytes]:
        """Of each page, those of its KV heads one after the other. Raises PeerLost if they could not be computed."""
        ...

    def write(self, block: Block, at: int, content: bytes) -> None:
        """Bytes of the host, from offset `at` on."""
        ...
