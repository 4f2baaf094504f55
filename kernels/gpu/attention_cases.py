"""What the attention kernels are measured on: shapes, random inputs, the least bytes and products, the candidates.

Only `prepared` of a case imports its kernel, and triton with it: shapes and candidates cost nothing to look at.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch

from kernels.gpu.tuning import Config, Value, decode_shape, prefill_shape

TORCH_TYPES: Mapping[str, torch.dtype] = {
    "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32,
    "float8_e4m3fn": torch.float8_e4m3fn, "int8": torch.int8,
}  # fmt: skip
QUANTISED = ("float8_e4m3fn", "int8")
CONTEXT_TOKENS = 4096  # that decode is tuned at
PROMPT_TOKENS = 4096  # that prefill is tuned at
DECODE_AXES: Mapping[str, Sequence[Value]] = {
    "block_keys": (32, 64, 128), "num_warps": (2, 4, 8), "num_stages": (2, 3, 4, 5),
}  # fmt: skip
PREFILL_AXES: Mapping[str, Sequence[Value]] = {
    "block_m": (64, 128), "block_n": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4),
    "descriptors": (False, True), "warp_specialize": (False, True),
}  # fmt: skip

Call = Callable[[], torch.Tensor]


class Pool(NamedTuple):
    """Pages full of random keys and values."""

    frames: torch.Tensor  # [N, K, L, 2, P, D]
    scales: torch.Tensor | None  # [N, K, L, 2, P] float32, of a quantised pool
    pages: torch.Tensor  # [R, W] int32, in no order


@dataclass(frozen=True, slots=True)
class Heads:
    """What a model's attention is made of. `q_type` and `kv_type` are torch's names; equal unless quantised."""

    heads: int
    kv_heads: int
    head_dim: int
    page_size: int = 16
    q_type: str = "bfloat16"
    kv_type: str = "bfloat16"
    layers: int = 2  # of the pool: so far apart lie a page's blocks

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    def pool(self, rows: int, tokens: int, device: torch.device) -> Pool:
        """Room for `tokens` of each row, and nothing else but page 0."""
        width = -(-tokens // self.page_size)
        shape = (rows * width + 1, self.kv_heads, self.layers, 2, self.page_size, self.head_dim)
        generator = torch.Generator(device).manual_seed(1)
        frames = torch.empty(shape, dtype=TORCH_TYPES[self.kv_type], device=device)
        for part in frames.split(max(1, (1 << 26) // frames[0].numel())):  # a float32 copy of it all may not fit
            part.copy_(self._values(torch.randn(part.shape, generator=generator, device=device)))
        scales = None
        if self.kv_type in QUANTISED:
            scales = torch.rand(shape[:5], generator=generator, device=device) * 0.02 + 0.01
        order = torch.randperm(rows * width, generator=generator, device=device).to(torch.int32) + 1
        return Pool(frames, scales, order.view(rows, width))

    def _values(self, normal: torch.Tensor) -> torch.Tensor:
        return (normal * 40).clamp(-127, 127) if self.kv_type in QUANTISED else normal

    def queries(self, *shape: int, device: torch.device) -> torch.Tensor:
        """[*shape, H, D]"""
        generator = torch.Generator(device).manual_seed(2)
        wide = torch.randn((*shape, self.heads, self.head_dim), generator=generator, device=device)
        return wide.to(TORCH_TYPES[self.q_type])


@dataclass(frozen=True, slots=True)
class DecodeCase:
    """`rows` sequences of `context` keys, `tokens` new ones of each."""

    of: Heads
    rows: int
    context: int = CONTEXT_TOKENS
    tokens: int = 1
    kernel: str = "decode_attention"

    @property
    def shape(self) -> str:
        of = self.of
        sizes = (of.heads, of.kv_heads, of.head_dim, of.page_size, self.tokens, self.rows)
        return decode_shape(of.q_type, of.kv_type, *sizes)

    @property
    def bytes(self) -> int:
        """Keys and values once, with their scales; queries and results are next to nothing."""
        of = self.of
        vectors = 2 * self.rows * self.context * of.kv_heads
        scale_bytes = 4 if of.kv_type in QUANTISED else 0
        return vectors * (of.head_dim * TORCH_TYPES[of.kv_type].itemsize + scale_bytes)

    def default(self) -> Config:
        from kernels.gpu.decode_attention import default_config

        of = self.of
        item_bytes = TORCH_TYPES[of.kv_type].itemsize
        return asdict(default_config(of.head_dim, item_bytes, of.heads // of.kv_heads * self.tokens))

    def candidates(self, default: Config) -> tuple[Config, ...]:
        return variations(default, DECODE_AXES)

    def prepared(self, device: torch.device) -> Callable[[Config], Call]:
        """From a configuration to a call: what it needs is made beforehand."""
        from kernels.gpu.decode_attention import DecodeConfig, decode_attention

        of = self.of
        pool = of.pool(self.rows, self.context, device)
        q = of.queries(self.rows, self.tokens, device=device)
        lengths = torch.full((self.rows,), self.context, dtype=torch.int32, device=device)
        out = torch.empty_like(q)

        def call_with(config: Config) -> Call:
            chosen = DecodeConfig(**config)  # type: ignore[arg-type]
            return lambda: decode_attention(
                q, pool.frames, of.layers - 1, pool.pages, lengths, of.scale,
                kv_scales=pool.scales, out=out, config=chosen,
            )  # fmt: skip

        return call_with


@dataclass(frozen=True, slots=True)
class PrefillCase:
    """`rows` prompts of `tokens` new tokens each, behind `prefix` tokens that are in the pages already."""

    of: Heads
    rows: int = 1
    tokens: int = PROMPT_TOKENS
    prefix: int = 0
    kernel: str = "prefill_attention"

    @property
    def shape(self) -> str:
        of = self.of
        return prefill_shape(of.q_type, of.kv_type, of.heads, of.kv_heads, of.head_dim, of.page_size)

    @property
    def flops(self) -> int:
        """Two products of what the queries see; the diagonal's other half is not counted."""
        seen = self.tokens * self.prefix + self.tokens * (self.tokens + 1) // 2
        return 4 * self.rows * seen * self.of.heads * self.of.head_dim

    def default(self) -> Config:
        from kernels.gpu.prefill_attention import default_config

        return asdict(default_config(self.of.head_dim, TORCH_TYPES[self.of.q_type], self.of.heads // self.of.kv_heads))

    def candidates(self, default: Config) -> tuple[Config, ...]:
        """Without those that the kernel would run as another one: descriptors want whole tiles in a page."""
        group, page = self.of.heads // self.of.kv_heads, self.of.page_size

        def differs(config: Config) -> bool:
            block_m, block_n = config.get("block_m"), config.get("block_n")
            fits = not isinstance(block_m, int) or block_m >= group
            return fits and (not config.get("descriptors") or (isinstance(block_n, int) and page % block_n == 0))

        return tuple(config for config in variations(default, PREFILL_AXES) if config == default or differs(config))

    def prepared(self, device: torch.device, backend: str = "triton") -> Callable[[Config], Call]:
        """As of DecodeCase. The plan is made once per step of a server, and not timed. `backend`: or "library"."""
        from kernels.gpu.prefill_attention import PrefillConfig, plan_prefill, prefill_attention, tile_tokens

        of = self.of
        pool = of.pool(self.rows, self.prefix + self.tokens, device)
        q = of.queries(self.rows * self.tokens, device=device)
        starts_list = [self.prefix] * self.rows
        offsets_list = [row * self.tokens for row in range(self.rows + 1)]
        starts = torch.tensor(starts_list, dtype=torch.int32, device=device)
        offsets = torch.tensor(offsets_list, dtype=torch.int32, device=device)
        out = torch.empty_like(q)

        def call_with(config: Config) -> Call:
            chosen = PrefillConfig(**config)  # type: ignore[arg-type]
            plan = plan_prefill(starts_list, offsets_list, tile_tokens(chosen, of.heads, of.kv_heads), device)
            return lambda: prefill_attention(
                q, pool.frames, of.layers - 1, pool.pages, starts, offsets, of.scale,
                out=out, kv_scales=pool.scales, plan=plan, config=chosen, backend=backend,  # type: ignore[arg-type]
            )  # fmt: skip

        return call_with


Case = DecodeCase | PrefillCase


def variations(default: Config, axes: Mapping[str, Sequence[Value]]) -> tuple[Config, ...]:
    """The default, then every combination of the axes that it has; what has no axis stays as it is."""
    names = [name for name in axes if name in default]
    products = itertools.product(*(axes[name] for name in names))
    found = [default, *({**default, **dict(zip(names, values, strict=True))} for values in products)]
    return tuple(config for i, config in enumerate(found) if config not in found[:i])
