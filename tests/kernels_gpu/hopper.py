"""Compiles kernels for an H200 where there is none: launchers run on tensors of the CPU and start nothing.

For a process of its own, with an empty cache of Triton's, which must import no kernel before `compile_only`: Triton
decides once how its kernels run.
"""

from __future__ import annotations

import re
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

CAPABILITY = 90
REGISTERS = 65536  # of a multiprocessor
SHARED_BYTES = 228 << 10  # of a multiprocessor
OWN_BYTES = 1 << 10  # that each program takes beside what it asks for


class Compiled:
    """What one launch would have run. `told`: the words of the assembler."""

    def __init__(self, kernel: Any, told: str) -> None:
        self.name: str = kernel.name
        self.ptx: str = kernel.asm["ptx"]
        self.shared_bytes: int = kernel.metadata.shared
        self.warps: int = kernel.metadata.num_warps
        self.fused: bool = kernel.metadata.enable_fp_fusion
        registers = re.search(r"Used (\d+) registers", told)
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", told)
        assert registers is not None and spills is not None, (kernel.name, told)
        self.registers = int(registers[1])  # of a thread
        self.spilled_bytes = int(spills[1]) + int(spills[2])  # of a thread, written and read

    def widths(self, access: str) -> set[int]:
        """Bytes per thread of the loads (`ld`) or stores (`st`) in the pool and the activations."""
        found = re.findall(rf"\b{access}\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)\b", self.ptx)
        return {int(lanes or 1) * int(bits) // 8 for lanes, bits in found}

    @property
    def spills(self) -> bool:
        return self.spilled_bytes > 0 or re.search(r"\b(ld|st)\.local", self.ptx) is not None

    @property
    def programs(self) -> int:
        """That a multiprocessor holds at a time."""
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * 32 * self.warps)
        return min(by_registers, SHARED_BYTES // (self.shared_bytes + OWN_BYTES))


def compile_only() -> list[Compiled]:
    """A list that grows with every launch from now on."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    made: list[Compiled] = []
    words: dict[str, str] = {}  # by kernel: a second launch of the same one compiles nothing
    run = JITFunction.run

    class Hopper:
        def get_current_target(self) -> Any:
            return GPUTarget("cuda", CAPABILITY, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    def compiled(kernel: Any, *given: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        with redirect_stdout(StringIO()) as told:
            found = run(kernel, *given, grid=grid, warmup=True, **options)
        made.append(Compiled(found, words.setdefault(found.hash, told.getvalue())))
        return found

    knobs.nvidia.dump_ptxas_log = True
    driver.set_active(Hopper())
    JITFunction.run = compiled
    return made
