"""What the interpreter takes, the compiler may refuse: the kernels without products, compiled for an H200 without one.

Beside that it compiles: nothing spills into local memory, and bulk data moves 16 bytes at a time for each thread.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BEGIN = """
import torch
from tests.kernels_gpu.hopper import compile_only
made = compile_only()
bf16 = torch.bfloat16
def zeros(*shape, dtype=bf16):
    return torch.zeros(shape, dtype=dtype)
def wide(*names):
    for kernel in made:
        assert not kernel.spills, kernel.name
        if kernel.name in names:
            assert 16 in kernel.widths("ld") and kernel.widths("st") == {16}, (kernel.name, kernel.ptx)
    assert set(names) <= {kernel.name for kernel in made}, [kernel.name for kernel in made]
"""
POINTWISE = """
from kernels.gpu.rms_norm import add_rms_norm, rms_norm
from kernels.gpu.silu_mul import silu_mul, silu_mul_packed
add_rms_norm(zeros(300, 4096), zeros(300, 4096), zeros(4096), 1e-6)
add_rms_norm(zeros(1, 16384), zeros(1, 16384), zeros(16384), 1e-6)
rms_norm(zeros(4096, 48, 128)[:, :32], zeros(128), 1e-6)
silu_mul_packed(zeros(300, 2 * 4096))
silu_mul(zeros(1, 4096), zeros(1, 4096))
wide("_norm", "_gate")
rms_norm(zeros(3, 5, 80, dtype=torch.float32), zeros(80, dtype=torch.float32), 1e-6)
assert not made[-1].spills
"""
ROPE = """
from kernels.gpu.rope_write import rope_write
def step(tokens, stored=None, norm=False, head_dim=128):
    qkv, ids = zeros(tokens, 48, head_dim), torch.zeros(tokens, dtype=torch.int32)
    frames = zeros(4, 8, 2, 2, 16, head_dim, dtype=stored or bf16)
    scales = None if stored is None else zeros(4, 8, 2, 2, 16, dtype=torch.float32)
    norms = (zeros(head_dim), zeros(head_dim)) if norm else (None, None)
    halves = torch.zeros(head_dim // 2)
    rope_write(qkv[:, :32], qkv[:, 32:40], qkv[:, 40:], ids, halves, frames, 1, ids, ids, scales, *norms, eps=1e-6)
step(300)
assert made[-1].widths("st") <= {8, 16} and 16 in made[-1].widths("st"), made[-1].ptx
step(2, norm=True)
step(300, torch.float8_e4m3fn)
assert "cvt.rn.satfinite.e4m3x2.f32" in made[-1].ptx
step(2, torch.int8, norm=True, head_dim=80)
wide()
"""
SEGMENTS = """
from kernels.gpu.segments import copy_pages, gather_segments, scatter_segments
from kernels.gpu.segment_digest import digest_constants, segment_digests
frames, padded = zeros(200, 8, 2, 2, 16, 64), zeros(200, 9, 2, 2, 24, 64)[:, :8, :, :, :16]
pages = torch.zeros(150, dtype=torch.int32)
for pool in (frames, padded):
    staging = gather_segments(pool, pages, 2, 6)
    scatter_segments(staging, pool, pages, 2, 6)
    copy_pages(pool, pages, pages)
wide("_move")
constants = digest_constants(torch.device("cpu"))
segment_digests(frames, pages, 0, 8, constants)
segment_digests(padded, pages, 0, 8, constants)
segment_digests(zeros(4, 1, 1, 2, 17, 64), pages, 0, 1, constants)
for kernel in made:
    assert kernel.name != "_sum_blocks" or 16 in kernel.widths("ld"), kernel.ptx
wide()
"""


@pytest.mark.parametrize("launches", [POINTWISE, ROPE, SEGMENTS], ids=["pointwise", "rope", "segments"])
def test_for_hopper(launches: str, tmp_path: Path) -> None:
    """No GPU is needed for that: the assembler comes with Triton."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + launches], env=environment, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr[-4000:]
