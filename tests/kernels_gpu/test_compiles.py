"""What the interpreter takes, the compiler may refuse: kernels compiled for an H200 without one.

Beside that it compiles: nothing spills into local memory, bulk data moves 16 bytes at a time for each thread, and each
launch says whether products and sums are fused, where the compiler's default differs between releases (a warning then
ends the process). Decode attention has tests of its own, in test_decode_attention.py.
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
PREFILL = """
from kernels.gpu.prefill_attention import plan_prefill, default_config, prefill_attention, tile_tokens
def chunk(stored, head_dim, tokens=300):
    frames, q = zeros(4, 8, 2, 2, 16, head_dim, dtype=stored), zeros(tokens, 32, head_dim, dtype=stored)
    tables = [torch.zeros(shape, dtype=torch.int32) for shape in ((1, 256), (1,), (2,))]
    plan = plan_prefill([0], [0, tokens], tile_tokens(default_config(head_dim, stored, 4), 32, 8))
    prefill_attention(q, frames, 1, *tables, 0.1, plan=plan, splits=1)
chunk(bf16, 128)
assert "wgmma.mma_async" in made[-1].ptx and "cp.async.bulk.tensor" not in made[-1].ptx
chunk(torch.float32, 256)
for kernel in made:
    assert kernel.programs >= 1 and not kernel.spills, (kernel.registers, kernel.shared_bytes, kernel.spilled_bytes)
"""
SAMPLE = """
from kernels.gpu.sample import Draw, pack_draws, sample
sample(zeros(3, 5000, dtype=torch.float32), torch.from_numpy(pack_draws([Draw(0, 1.0, top_k=9), Draw(2, 0.7)])))
assert len(made) == 5 and not any(kernel.fused for kernel in made)
wide()
"""
LAUNCHES = {"pointwise": POINTWISE, "rope": ROPE, "segments": SEGMENTS, "prefill": PREFILL, "sample": SAMPLE}


@pytest.mark.parametrize("launches", LAUNCHES.values(), ids=LAUNCHES)
def test_for_hopper(launches: str, tmp_path: Path) -> None:
    """No GPU is needed for that: the assembler comes with Triton."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", BEGIN + launches],
        env=environment, capture_output=True, text=True, timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
