"""The pool's memory and the executor of a loaded model, as its backend wants them."""

from __future__ import annotations

import torch

from baton.loaded_model import LoadedModel
from engine.batch import Executor
from engine.torch_executor import TorchExecutor
from kvtransfer.device_cuda import CudaDevice
from kvtransfer.frames import Frames, Progress


def frames_for(loaded: LoadedModel, shared: bool, progress: Progress | None = None) -> Frames:
    """`shared`: other processes may map it, as they may a pool on a GPU. Raises TooLittleMemory and ConfigError."""
    if loaded.backend.on_gpu:
        frames = Frames.on_device(loaded.layout, loaded.pages, CudaDevice())
        frames.warm_up()
        return frames
    make = Frames.shared if shared else Frames.anonymous
    return make(loaded.layout, loaded.pages, progress)


def executor_for(loaded: LoadedModel, frames: Frames, threads: int, max_rows: int) -> Executor:
    """Over the memory of `frames`, which outlives it. On a GPU every decode step is captured. Raises StartupError."""
    layout, backend = loaded.layout, loaded.backend
    if backend.name == "torch":
        return TorchExecutor(loaded.model, layout, frames.buffer, threads)
    from engine.device_pool import frames_over, pool_over
    from engine.triton_executor import TritonExecutor

    if frames.block is None:
        return TritonExecutor(loaded.model, frames_over(frames.buffer, layout), max_rows, loaded.configs)
    pool = pool_over(frames.block.address, layout, loaded.pages, torch.device(backend.device))
    executor = TritonExecutor(loaded.model, pool, max_rows, loaded.configs)
    if backend.on_gpu:
        executor.capture()
    return executor
