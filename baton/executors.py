"""The pool's memory and the executor of a loaded model, as its backend wants them."""

from __future__ import annotations

import torch

from baton.loaded_model import LoadedModel
from engine.batch import Executor
from engine.torch_executor import TorchExecutor
from kvtransfer.frames import Frames, Progress


def frames_for(loaded: LoadedModel, shared: bool, progress: Progress | None = None) -> Frames:
    """`shared`: other processes may map it. Of a pool on a device only the bookkeeping is made here."""
    if loaded.backend.on_gpu:
        return Frames.on_device(loaded.layout, loaded.pages)
    make = Frames.shared if shared else Frames.anonymous
    return make(loaded.layout, loaded.pages, progress)


def executor_for(loaded: LoadedModel, frames: Frames, threads: int, max_rows: int) -> Executor:
    """On the device the pool is allocated here, and every decode step captured. Raises StartupError."""
    layout, backend = loaded.layout, loaded.backend
    if backend.name == "torch":
        return TorchExecutor(loaded.model, layout, frames.buffer, threads)
    from engine.device_pool import frames_over, pool_on_device
    from engine.triton_executor import TritonExecutor

    if not backend.on_gpu:
        return TritonExecutor(loaded.model, frames_over(frames.buffer, layout), max_rows, loaded.configs)
    pool = pool_on_device(layout, loaded.pages, torch.device(backend.device))
    executor = TritonExecutor(loaded.model, pool, max_rows, loaded.configs)
    executor.capture()
    return executor
