"""An executor of either backend over random weights and a pool full of random numbers, all made on the device."""

from __future__ import annotations

from typing import Literal

import torch

from bench.gpu_engine.shapes import random_weights
from bench.gpu_engine.steps import Runs
from core.layout import PageLayout
from engine.architectures.registry import find_architecture
from engine.config import ModelConfig
from kernels.gpu.tuning import Table

Backend = Literal["triton", "torch"]


def executor_of(
    config: ModelConfig, backend: Backend, pages: int, page_size: int, max_rows: int, device: torch.device, table: Table
) -> Runs:
    """Raises ModuleNotFoundError where the backend is not there. `torch` runs on the CPU alone."""
    if backend == "triton":
        return _triton(config, pages, page_size, max_rows, device, table)
    return _plain(config, pages, page_size)


def _triton(
    config: ModelConfig, pages: int, page_size: int, max_rows: int, device: torch.device, table: Table
) -> Runs:
    from engine.attention_configs import AttentionConfigs
    from engine.triton_executor import TritonExecutor
    from engine.triton_ops import triton_ops

    model = find_architecture(config.architecture).build(config, random_weights(config, device), triton_ops())
    shape = (pages, config.kv_heads, config.layers, 2, page_size, config.head_dim)
    frames = torch.empty(shape, dtype=getattr(torch, config.dtype), device=device).normal_()
    return TritonExecutor(model, frames, max_rows, AttentionConfigs(config, page_size, frames.dtype, table))


def _plain(config: ModelConfig, pages: int, page_size: int) -> Runs:
    from engine.ops import PLAIN
    from engine.torch_executor import TorchExecutor

    weights = random_weights(config, torch.device("cpu"))
    model = find_architecture(config.architecture).build(config, weights, PLAIN)
    layout = PageLayout(config.kv_heads, config.layers, page_size, config.head_dim, config.dtype)
    memory = memoryview(bytearray(pages * layout.page_bytes))
    return TorchExecutor(model, layout, memory, torch.get_num_threads())
