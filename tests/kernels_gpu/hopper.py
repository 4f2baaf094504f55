"""Compiles kernels for an H200 where there is none: launchers run on tensors of the CPU and start nothing.

For a process of its own, which must import no kernel before `compile_only`: Triton decides once how its kernels run.
"""

from __future__ import annotations

import re
from typing import Any

CAPABILITY = 90


class Compiled:
    """What one launch would have run."""

    def __init__(self, kernel: Any) -> None:
        self.name: str = kernel.name
        self.ptx: str = kernel.asm["ptx"]
        self.shared_bytes: int = kernel.metadata.shared

    def widths(self, access: str) -> set[int]:
        """Bytes per thread of the loads (`ld`) or stores (`st`) in the pool and the activations."""
        found = re.findall(rf"\b{access}\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)\b", self.ptx)
        return {int(lanes or 1) * int(bits) // 8 for lanes, bits in found}

    @property
    def spills(self) -> bool:
        return re.search(r"\b(ld|st)\.local", self.ptx) is not None


def compile_only() -> list[Compiled]:
    """A list that grows with every launch from now on."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    made: list[Compiled] = []
    run = JITFunction.run

    class Hopper:
        def get_current_target(self) -> Any:
            return GPUTarget("cuda", CAPABILITY, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    def compiled(kernel: Any, *given: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        found = run(kernel, *given, grid=grid, warmup=True, **options)
        made.append(Compiled(found))
        return found

    driver.set_active(Hopper())
    JITFunction.run = compiled
    return made
