"""What passes between the host and a device without waiting: small copies; and where the host does wait, for what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy.typing as npt
import torch


def to_device(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """Through pinned memory: torch keeps it until the copy has run, and reuses it."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """A copy of a device tensor on its way to the host; `take` waits for it, and for nothing that was queued later."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._copy = tensor
        if tensor.device.type == "cuda":
            self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._copy.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def take(self) -> torch.Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._copy


class Fence:
    """Behind all that has been launched on this thread's stream so far."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> None:
        """Return when the device has done it."""
        if self._event is not None:
            self._event.synchronize()


class SideStream:
    """For small work beside the steps; one for each executor, as torch hands the same few out again and again."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def done(self) -> Iterator[None]:
        """What is launched inside waits for no step in flight, and the device has done it at the end."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()
