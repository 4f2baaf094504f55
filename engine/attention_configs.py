"""Which configuration each attention kernel runs with: the table's for the model's shape, or the kernel's default.

All is looked up once, at start: nothing is tuned, and nothing looked up, while a step runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TypeVar

import torch

from engine.config import ModelConfig
from engine.row_slots import BUCKETS
from kernels.gpu import decode_attention, prefill_attention
from kernels.gpu.decode_attention import DecodeConfig
from kernels.gpu.prefill_attention import PrefillConfig
from kernels.gpu.tuning import EMPTY, Config, Table, decode_shape, lookup, prefill_shape, row_class

C = TypeVar("C", DecodeConfig, PrefillConfig)

LEAST_BLOCK = 16  # rows or keys of a product on tensor cores


class AttentionConfigs:
    """Of one model over pages of `page_size` tokens of `dtype`. `tuned`: kernel and shape, and whether it was measured.

    A table's configuration with other fields than this release's is not used. Raises ValueError for one whose values no
    kernel can run with.
    """

    def __init__(self, config: ModelConfig, page_size: int, dtype: torch.dtype, table: Table = EMPTY) -> None:
        name = str(dtype).removeprefix("torch.")
        shape = (name, name, config.heads, config.kv_heads, config.head_dim, page_size)
        group = config.heads // config.kv_heads
        self._table = table
        self.tuned: dict[str, bool] = {}  # one for each class of batches, and one
        default = decode_attention.default_config(config.head_dim, dtype.itemsize, group)
        self._decode = {
            most: self._chosen("decode_attention", decode_shape(*shape, 1, most), default)
            for most in sorted({row_class(bucket) for bucket in BUCKETS})
        }
        long = prefill_attention.default_config(config.head_dim, dtype, group)
        self.prefill = self._chosen("prefill_attention", prefill_shape(*shape), long)
        if self.prefill.block_m < group:
            raise ValueError(f"prefill_attention: block_m {self.prefill.block_m} is below {group} query heads")

    def decode(self, rows: int) -> DecodeConfig:
        """For a batch of `rows`, one token of each."""
        return self._decode[row_class(rows)]

    def _chosen(self, kernel: str, shape: str, default: C) -> C:
        choice = lookup(self._table, kernel, shape, asdict(default))
        self.tuned[f"{kernel} {shape}"] = choice.tuned
        if not choice.tuned:
            return default
        _check(choice.config, asdict(default), f"{kernel} {shape}")
        return type(default)(**choice.config)  # type: ignore[arg-type]


def _check(config: Config, default: Mapping[str, object], where: str) -> None:
    for name, value in config.items():
        least = LEAST_BLOCK if name.startswith("block_") else 1
        doubled = name.startswith("block_") or name == "num_warps"  # 1, 2, 4, 8 ...
        if isinstance(default[name], bool):
            sound = isinstance(value, bool)
        elif value is None:
            sound = default[name] is None
        else:
            sound = isinstance(value, int) and not isinstance(value, bool) and value >= least
            sound = sound and not (doubled and int(value) & (int(value) - 1))
        if not sound:
            raise ValueError(f"{where}: no kernel can run with {name} {value!r}")
