"""Models of known shapes with random weights, made on the device: no checkpoint is read or written."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from engine.architectures.registry import find_architecture
from engine.config import ModelConfig, RopeConfig

LLAMA_8B = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=128256, hidden_size=4096, intermediate_size=14336, layers=32, heads=32,
    kv_heads=8, head_dim=128, max_positions=131072, rms_norm_eps=1e-5,
    rope=RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, 8192), windows=(None,) * 32, tie_word_embeddings=False,
    attention_bias=False, mlp_bias=False, eos_ids=(128001,), dtype="bfloat16",
)  # fmt: skip
QWEN3_06B = ModelConfig(
    architecture="Qwen3ForCausalLM", vocab_size=151936, hidden_size=1024, intermediate_size=3072, layers=28, heads=16,
    kv_heads=8, head_dim=128, max_positions=40960, rms_norm_eps=1e-6, rope=RopeConfig(1000000.0),
    windows=(None,) * 28, tie_word_embeddings=True, attention_bias=False, mlp_bias=False, eos_ids=(151645,),
    dtype="bfloat16",
)  # fmt: skip
TINY = ModelConfig(
    architecture="Qwen3ForCausalLM", vocab_size=97, hidden_size=64, intermediate_size=64, layers=2, heads=4,
    kv_heads=2, head_dim=32, max_positions=256, rms_norm_eps=1e-6, rope=RopeConfig(10000.0), windows=(None,) * 2,
    tie_word_embeddings=True, attention_bias=False, mlp_bias=False, eos_ids=(2,), dtype="float32",
)  # fmt: skip
MODELS: Mapping[str, ModelConfig] = MappingProxyType({"Llama-3.1-8B": LLAMA_8B, "Qwen3-0.6B": QWEN3_06B})
STANDARD_DEVIATION = 0.02


def random_weights(config: ModelConfig, device: torch.device) -> dict[str, torch.Tensor]:
    """Norms of ones, and the rest normal: as a model is before it was trained."""
    dtype = getattr(torch, config.dtype)
    found = {}
    for name, shape in find_architecture(config.architecture).shapes(config).items():
        tensor = torch.empty(shape, dtype=dtype, device=device)
        if name.endswith("norm.weight"):
            found[name] = tensor.fill_(1.0)
        else:
            found[name] = tensor.normal_(std=STANDARD_DEVIATION)
    return found
