"""The pool in a device's memory: one block, as large as the weights and the largest step leave room for.

The block is the hand-off's (kvtransfer/device_memory.py): one allocation that never moves, a base address and a length,
which is what CUDA IPC exports and UCX registers. The engine lays its tensor over it, and owns nothing there.

The largest step is run over a pool of two pages, with every row reading and writing the same page: what it computes is
thrown away, what it allocates is measured. Captured decode steps keep their memory, so they are measured as well.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch

from core.errors import TooLittleMemory
from core.layout import PageLayout
from core.sampling import SamplingParams
from engine.attention_configs import AttentionConfigs
from engine.batch import Batch, Row, SampleSpec
from engine.config import ModelConfig
from engine.memory import SCRATCH_PAGES
from engine.model import Model
from engine.triton_executor import TritonExecutor

KEPT_SHARE = 0.04  # of the free memory: for what fragments, and what the driver takes for itself
PAGE = SCRATCH_PAGES


class LargestStep(NamedTuple):
    tokens: int  # of a prefill step
    rows: int  # of a decode step


def frames_over(memory: memoryview, layout: PageLayout) -> torch.Tensor:
    """[N, K, L, 2, P, D] over bytes of the host, which stay the caller's and must outlive it."""
    flat = torch.frombuffer(memory, dtype=getattr(torch, layout.dtype))
    return flat.view(-1, *_shape(layout))


def pool_over(address: int, layout: PageLayout, pages: int, device: torch.device) -> torch.Tensor:
    """[N, K, L, 2, P, D] over memory of the device, or of the host for a CPU, which must outlive it. Nothing moves."""
    size = pages * layout.page_bytes
    if device.type == "cpu":
        memory = (ctypes.c_uint8 * size).from_address(address)
        flat = torch.frombuffer(memory, dtype=torch.uint8)
    else:
        flat = torch.as_tensor(_Described(address, size))
        assert flat.device.type == device.type and flat.data_ptr() == address, (flat.device, device)
    return flat.view(getattr(torch, layout.dtype)).view(-1, *_shape(layout))


def pool_on_device(layout: PageLayout, pages: int, device: torch.device) -> torch.Tensor:
    """[N, K, L, 2, P, D] of torch's own, zeroed: for what is measured, and never handed off."""
    return torch.zeros(pages, *_shape(layout), dtype=getattr(torch, layout.dtype), device=device)


def largest_batches(step: LargestStep, config: ModelConfig, page_size: int) -> tuple[Batch, Batch]:
    """A prefill step and a decode step, both sampling with filters at the end of every row."""
    chunks = [min(config.max_positions, step.tokens - at) for at in range(0, step.tokens, config.max_positions)]
    prefill = tuple(_row(number, tokens, page_size) for number, tokens in enumerate(chunks))
    return Batch(prefill), Batch(tuple(_row(number, 1, page_size) for number in range(step.rows)))


def step_bytes(
    model: Model, layout: PageLayout, step: LargestStep, device: torch.device, configs: AttentionConfigs | None = None
) -> int:
    """What the largest step takes beside weights and pool, and captured steps keep; 0 on a CPU.

    Raises StartupError where a step cannot be captured, EngineError where the largest one fails.
    """
    executor = TritonExecutor(model, pool_on_device(layout, 1 + PAGE, device), step.rows, configs)
    measured = device.type == "cuda"
    if measured:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if measured else 0
    if measured:
        executor.capture()
    for batch in largest_batches(step, model.config, layout.page_size):
        executor.execute(batch)
    return torch.cuda.max_memory_allocated(device) - before if measured else 0


def pages_beside(free_bytes: int, taken_bytes: int, layout: PageLayout, max_context_tokens: int) -> int:
    """Pages, frame 0 included, in what a step of `taken_bytes` leaves. Raises TooLittleMemory when too few."""
    room_bytes = int(free_bytes * (1 - KEPT_SHARE)) - taken_bytes
    pages, needed = max(0, room_bytes) // layout.page_bytes, SCRATCH_PAGES + layout.pages_for(max_context_tokens)
    if pages < needed:
        raise TooLittleMemory(
            f"the device has {free_bytes} bytes free beside the weights, and its largest step takes {taken_bytes}: "
            f"{pages} pages of {layout.page_bytes} bytes, and one sequence of {max_context_tokens} tokens needs "
            f"{needed}; allow smaller steps, or a shorter maximal context"
        )
    return pages


class _Described:
    """Bytes on a device as libraries know them by."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,), "typestr": "|u1", "data": (address, False), "strides": None, "version": 2,
        }  # fmt: skip


def _shape(layout: PageLayout) -> tuple[int, ...]:
    return (layout.kv_heads, layout.layers, layout.parts, layout.page_size, layout.head_dim)


def _row(number: int, tokens: int, page_size: int) -> Row:
    ids = (0,) * tokens
    params = SamplingParams(temperature=1.0, top_k=50, top_p=0.9)
    spec = SampleSpec(params, 0, (0,), ids, tokens)
    return Row(number, ids, 0, (PAGE,) * -(-tokens // page_size), spec)
