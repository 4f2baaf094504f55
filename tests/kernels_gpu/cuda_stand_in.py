"""CUDA's runtime for one process, in the host's memory; and `CudaDevice` over it, which runs in Triton's interpreter.

What is checked so is our own code. What a GPU and its driver do is not.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from collections.abc import Iterator
from enum import IntEnum
from typing import Any

import torch

from kernels.gpu import errors, segment_digest, segments
from kvtransfer.device_cuda import HANDLE_BYTES, CudaDevice

ALIGN = 256  # of what cudaMalloc gives
LARGEST_BYTES = 1 << 30


class Status(IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInvalidResourceHandle = 400


class Handle:
    """cudaIpcMemHandle_t"""

    def __init__(self, address: int = 0) -> None:
        self.bytes = ctypes.create_string_buffer(address.to_bytes(HANDLE_BYTES, "little"), HANDLE_BYTES)

    def getPtr(self) -> int:
        return ctypes.addressof(self.bytes)


class Runtime:
    """It opens what the same process has exported, which CUDA does not."""

    cudaIpcMemLazyEnablePeerAccess = 1

    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}
        self.opened: list[int] = []
        self.exports = True

    def cudaSetDevice(self, device: int) -> tuple[Status]:
        return (Status.cudaSuccess,)

    def cudaDeviceSynchronize(self) -> tuple[Status]:
        return (Status.cudaSuccess,)

    def cudaGetLastError(self) -> tuple[Status]:
        return (Status.cudaSuccess,)

    def cudaMalloc(self, size: int) -> tuple[Status, int | None]:
        if size > LARGEST_BYTES:
            return Status.cudaErrorMemoryAllocation, None
        memory = (ctypes.c_uint8 * (size + ALIGN))(*itertools.repeat(7, size + ALIGN))
        address = -(-ctypes.addressof(memory) // ALIGN) * ALIGN
        self.memory[address] = memory
        return Status.cudaSuccess, address

    def cudaMemset(self, address: int, value: int, size: int) -> tuple[Status]:
        ctypes.memset(address, value, size)
        return (Status.cudaSuccess,)

    def cudaFree(self, address: int) -> tuple[Status]:
        del self.memory[address]
        return (Status.cudaSuccess,)

    def cudaIpcMemHandle_t(self) -> Handle:
        return Handle()

    def cudaIpcGetMemHandle(self, address: int) -> tuple[Status, Handle | None]:
        if not self.exports:
            return Status.cudaErrorInvalidResourceHandle, None
        return Status.cudaSuccess, Handle(address)

    def cudaIpcOpenMemHandle(self, handle: Handle, flags: int) -> tuple[Status, int | None]:
        address = int.from_bytes(handle.bytes.raw, "little")
        if address not in self.memory:
            return Status.cudaErrorInvalidResourceHandle, None
        self.opened.append(address)
        return Status.cudaSuccess, address

    def cudaIpcCloseMemHandle(self, address: int) -> tuple[Status]:
        self.opened.remove(address)
        return (Status.cudaSuccess,)


class Interpreted(CudaDevice):
    """The real code, but for streams and pinned memory."""

    name = "GPU-stand-in"  # type: ignore[assignment]

    def __init__(self) -> None:
        self._torch, self._runtime = torch, Runtime()
        self._segments, self._digest, self._errors = segments, segment_digest, errors.KERNEL_ERRORS
        self._where = torch.device("cpu")
        self._prepare()

    @contextlib.contextmanager
    def _launching(self) -> Iterator[None]:
        with self._turn:
            yield

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def _to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()
