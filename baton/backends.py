"""What computes a worker's model: plain torch on the CPU, or the Triton kernels on a GPU.

`auto` takes Triton where there is a GPU and what it needs is installed. There the pool is a block of the GPU's memory,
of every role alike: a prefill and a decode worker hand its pages over by CUDA IPC or UCX (never run on a GPU).
Without a GPU the kernels run in Triton's interpreter only, thousands of times slower: a check, never a service.
A process sees one GPU: which one is for CUDA_VISIBLE_DEVICES to say.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from core.errors import ConfigError
from engine.ops import PLAIN, Ops

log = logging.getLogger(__name__)

INTERPRETER = "TRITON_INTERPRET"  # Triton's own variable


@dataclass(frozen=True, slots=True)
class Backend:
    name: str = "torch"
    device: str = "cpu"

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    def ops(self) -> Ops:
        """The decoder's operations. Imports triton when they are Triton's."""
        if self.name == "torch":
            return PLAIN
        from engine.triton_ops import triton_ops

        return triton_ops()


ON_CPU = Backend()


def backend_of(name: str, device: str) -> Backend:
    """From --backend (auto, torch, triton) and --device (auto, cpu, cuda). Raises ConfigError, naming the flag."""
    gpu = torch.cuda.is_available()
    if name == "auto":
        name = "triton" if device == "cuda" or (device == "auto" and gpu and _all_there()) else "torch"
    if device == "auto":
        device = "cuda" if gpu and name == "triton" else "cpu"
    if device == "cuda" and not gpu:
        raise ConfigError("--device cuda: torch finds no GPU here")
    if name == "torch" and device != "cpu":
        raise ConfigError("--backend torch runs on the CPU alone: on a GPU the backend is triton, from baton[gpu]")
    if name == "triton":
        _check_triton(device)
    return Backend(name, device)


def _all_there() -> bool:
    """Whether the GPU that was found can be used; if not, it is said."""
    missing = _missing()
    if missing:
        log.warning("there is a GPU, and it is not used: %s not installed; baton[gpu] brings it", " and ".join(missing))
    return not missing


def _missing() -> list[str]:
    """Of what a GPU takes."""
    return [name for name in ("triton", "cuda.bindings") if not _is_there(name)]


def _is_there(module: str) -> bool:
    package, _, _ = module.partition(".")
    return find_spec(package) is not None and find_spec(module) is not None


def _check_triton(device: str) -> None:
    missing = [name for name in _missing() if device != "cpu" or name == "triton"]
    if missing:
        raise ConfigError(f"--backend triton: {' and '.join(missing)} not installed; baton[gpu] brings all it needs")
    if device == "cpu" and os.environ.get(INTERPRETER) != "1":
        raise ConfigError(f"--backend triton needs a GPU; without one only Triton's interpreter ({INTERPRETER}=1)")
