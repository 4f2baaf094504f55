"""The attention kernels' rows: decode at the goals' sizes, prefill at 8k, torch and FlashInfer beside them.

Torch gets dense keys and values of its own, FlashInfer pages of its own layout: neither pays for strides of ours.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import replace

import torch

from bench.kernels.rows import Asked, Call, Goal, Row, Work, close
from kernels.gpu.attention_cases import TORCH_TYPES, Case, DecodeCase, Heads, PrefillCase
from kernels.gpu.tuning import Choice, lookup

LLAMA = Heads(32, 8, 128)
SMALL = Heads(4, 2, 64)
ALLOWED = 0.02  # of the largest value: bfloat16 rounds probabilities and results to 8 bits
WORKSPACE_BYTES = 256 << 20  # that FlashInfer wants


def rows() -> list[Row]:
    return [
        decode("decode bf16 64 x 4k", 64, 4096, goal=3.9),
        decode("decode bf16 8 x 4k", 8, 4096, goal=2.7),
        decode("decode bf16 1 x 8k", 1, 8192, goal=1.8),
        decode("decode fp8 KV 64 x 4k", 64, 4096, "float8_e4m3fn", goal=3.2),
        decode("decode int8 KV 64 x 4k", 64, 4096, "int8", quick=False),
        decode("verify 4 tokens bf16 64 x 4k", 64, 4096, tokens=4, quick=False),
        prefill("prefill causal 8k", 8192, goal=400.0),
        prefill("prefill 2k behind 6k", 2048, prefix=6144, quick=False),
    ]


def decode(
    name: str, batch: int, context: int, kv_type: str = "bfloat16", tokens: int = 1, goal: float = 0.0,
    quick: bool = True,
) -> Row:  # fmt: skip
    def make(asked: Asked) -> Work:
        from kernels.gpu.decode_attention import decode_attention_reference

        case = DecodeCase(replace(LLAMA, kv_type=kv_type), batch, context, tokens)
        if asked.small:
            case = DecodeCase(replace(SMALL, kv_type=kv_type), 2, 40, tokens)
        of, chosen = case.of, chosen_for(case, asked)
        run = case.prepared(asked.device)(chosen.config)

        def check() -> None:
            pool = of.pool(case.rows, case.context, asked.device)
            q = of.queries(case.rows, case.tokens, device=asked.device)
            lengths = torch.full((case.rows,), case.context, dtype=torch.int32, device=asked.device)
            expected = decode_attention_reference(
                q, pool.frames, of.layers - 1, pool.pages, lengths, of.scale, kv_scales=pool.scales
            )
            close(run(), expected, ALLOWED)

        beside = decode_beside(case, asked.device) if asked.beside and kv_type == "bfloat16" else {}
        return Work(run, check, bytes=case.bytes, beside=beside, tuned=chosen.tuned)

    return Row(name, "TB/s", make, Goal(value=goal) if goal else None, quick)


def prefill(name: str, tokens: int, prefix: int = 0, goal: float = 0.0, quick: bool = True) -> Row:
    def make(asked: Asked) -> Work:
        from kernels.gpu.prefill_attention import prefill_attention_reference

        case = PrefillCase(LLAMA, 1, tokens, prefix)
        if asked.small:
            case = PrefillCase(SMALL, 2, 24, 16 if prefix else 0)
        of, device, chosen = case.of, asked.device, chosen_for(case, asked)
        run = case.prepared(device)(chosen.config)

        def check() -> None:
            pool = of.pool(case.rows, case.prefix + case.tokens, device)
            q = of.queries(case.rows * case.tokens, device=device)
            starts = torch.full((case.rows,), case.prefix, dtype=torch.int32, device=device)
            offsets = torch.arange(case.rows + 1, dtype=torch.int32, device=device) * case.tokens
            expected = prefill_attention_reference(q, pool.frames, of.layers - 1, pool.pages, starts, offsets, of.scale)
            close(run(), expected, ALLOWED)

        return Work(run, check, flops=case.flops, beside=prefill_beside(case, asked), tuned=chosen.tuned)

    return Row(name, "TFLOP/s", make, Goal(value=goal) if goal else None, quick)


def chosen_for(case: Case, asked: Asked) -> Choice:
    """What serving would run with."""
    return lookup(asked.table, case.kernel, case.shape, case.default())


def dense(of: Heads, batch: int, tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [R, K, S, D]."""
    generator = torch.Generator(device).manual_seed(3)
    shape = (2, batch, of.kv_heads, tokens, of.head_dim)
    both = torch.empty(shape, dtype=TORCH_TYPES[of.q_type], device=device).normal_(generator=generator)
    return both[0], both[1]


def decode_beside(case: DecodeCase, device: torch.device) -> dict[str, Call]:
    of = case.of
    q = of.queries(case.rows, case.tokens, device=device)
    found: dict[str, Call] = {}
    if case.tokens == 1:  # causality needs no mask
        keys, values = dense(of, case.rows, case.context, device)
        query = q.transpose(1, 2)  # [R, H, 1, D]
        found["torch SDPA"] = lambda: torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, scale=of.scale, enable_gqa=True
        )
        found |= optional(lambda: flashinfer_decode(case, q[:, 0], device))
    return found


def prefill_beside(case: PrefillCase, asked: Asked) -> dict[str, Call]:
    if not asked.beside:
        return {}
    of, device = case.of, asked.device
    found: dict[str, Call] = {}
    library = case.prepared(device, backend="library")(case.default())
    found["our backend library"] = library
    if case.prefix == 0:
        q = of.queries(case.rows * case.tokens, device=device)
        query = q.view(case.rows, case.tokens, of.heads, of.head_dim).transpose(1, 2)
        keys, values = dense(of, case.rows, case.tokens, device)
        found["torch SDPA"] = lambda: torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, is_causal=True, scale=of.scale, enable_gqa=True
        )
        found |= optional(lambda: flashinfer_prefill(case, q, keys[0], values[0]))
    return found


def optional(make: Callable[[], Call]) -> dict[str, Call]:
    """FlashInfer's call where it is installed; one that raises at once where it cannot be made."""
    if importlib.util.find_spec("flashinfer") is None:
        return {}
    try:
        return {"FlashInfer": make()}
    except (RuntimeError, TypeError, ValueError, AttributeError, ImportError) as error:
        reason = str(error)

        def broken() -> None:
            raise RuntimeError(reason)

        return {"FlashInfer": broken}


def flashinfer_decode(case: DecodeCase, q: torch.Tensor, device: torch.device) -> Call:
    """q [R, H, D], over pages [N, 2, K, P, D]."""
    flashinfer = importlib.import_module("flashinfer")
    of = case.of
    pool = replace(of, layers=1).pool(case.rows, case.context, device)
    pages = pool.frames[:, :, 0].transpose(1, 2).contiguous()
    width = pool.pages.shape[1]
    starts = torch.arange(case.rows + 1, dtype=torch.int32, device=device) * width
    last = torch.full((case.rows,), (case.context - 1) % of.page_size + 1, dtype=torch.int32, device=device)
    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    wrapper.plan(
        starts, pool.pages.flatten(), last, of.heads, of.kv_heads, of.head_dim, of.page_size,
        q_data_type=q.dtype, kv_data_type=pages.dtype,
    )  # fmt: skip
    return lambda: wrapper.run(q, pages)


def flashinfer_prefill(case: PrefillCase, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Call:
    """q [T, H, D], keys and values [K, S, D]."""
    flashinfer = importlib.import_module("flashinfer")
    scale = case.of.scale
    return lambda: flashinfer.single_prefill_with_kv_cache(
        q, keys, values, causal=True, kv_layout="HND", sm_scale=scale
    )
