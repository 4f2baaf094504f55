"""Random checkpoints of every architecture, a few layers small, written to disk as their publishers write them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 211
MAX_POSITIONS = 1024
# Wide initial weights: with the usual 0.02 every attention is uniform, and an error in it would not show.
SIZES: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "max_position_embeddings": MAX_POSITIONS,
        "initializer_range": 0.15,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
)
LLAMA3_ROPE: Mapping[str, Any] = MappingProxyType(
    {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }
)


def llama3() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True, rope_parameters=dict(LLAMA3_ROPE))
    )


def llama_biased() -> PreTrainedModel:
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    return LlamaForCausalLM(
        LlamaConfig(
            **SIZES,
            num_key_value_heads=8,
            tie_word_embeddings=False,
            attention_bias=True,
            mlp_bias=True,
            rope_parameters=rope,
        )
    )


def qwen2() -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=4, tie_word_embeddings=False))


def qwen2_windows() -> PreTrainedModel:
    """The first layer sees everything, the others 48 tokens."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            **SIZES,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            use_sliding_window=True,
            sliding_window=48,
            max_window_layers=1,
        )
    )


def qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=4, head_dim=16, tie_word_embeddings=True))


def mistral() -> PreTrainedModel:
    return MistralForCausalLM(
        MistralConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=False, sliding_window=37)
    )


TINY: Mapping[str, Callable[[], PreTrainedModel]] = MappingProxyType(
    {
        "llama3": llama3,
        "llama_biased": llama_biased,
        "qwen2": qwen2,
        "qwen2_windows": qwen2_windows,
        "qwen3": qwen3,
        "mistral": mistral,
    }
)


def tiny_model(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The same weights at every call; norms and biases are random too, so that a forgotten one shows."""
    torch.manual_seed(7)
    model = TINY[name]()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype).eval()


def save_tiny(name: str, folder: Path, dtype: torch.dtype = torch.float32, shard_bytes: int | None = None) -> Path:
    """The checkpoint's folder."""
    sharded = {} if shard_bytes is None else {"max_shard_size": shard_bytes}
    tiny_model(name, dtype).save_pretrained(folder, **sharded)
    return folder
