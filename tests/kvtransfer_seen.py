"""The bytes of a pool on a stand-in device, as tests look at those of a pool in the host's memory."""

from __future__ import annotations

from kvtransfer.device_in_memory import InMemoryDevice
from kvtransfer.frames import Frames


class Seen:
    """Like Frames, but `frames` is what a transport serves. To be closed when the transports are."""

    def __init__(self, frames: Frames) -> None:
        assert isinstance(frames.device, InMemoryDevice) and frames.block is not None
        self.frames = frames
        self.pages, self.layout, self.epochs = frames.pages, frames.layout, frames.epochs
        self.pattern, self.landing = frames.pattern, frames.landing
        self.everything = frames.device.view(frames.block)
        self.buffer = self.everything[: frames.pages * frames.layout.page_bytes]

    def page(self, index: int) -> memoryview:
        self.frames.check(index)
        return self.frame(index)

    def frame(self, index: int) -> memoryview:
        size = self.layout.page_bytes
        return self.everything[index * size : (index + 1) * size]

    def close(self) -> None:
        self.buffer.release()
        self.everything.release()
        self.frames.close()




def served(frames: Frames | Seen) -> Frames:
    return frames.frames if isinstance(frames, Seen) else frames
