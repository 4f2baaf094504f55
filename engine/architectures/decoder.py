"""The pre-norm decoder with rotary attention and a gated feed-forward: Llama, Mistral, Qwen2 and Qwen3.

They differ in three switches (Traits); everything else is numbers of the config. Plain code over plain tensors:
the weights are a tuple of layers, the state of a step is passed in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from engine.config import ModelConfig, RopeConfig
from engine.model import Architecture, Attend
from kernels.linear import linear
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import angles, inverse_frequencies, rope, scale_linear, scale_llama3
from kernels.silu_mul import silu_mul


@dataclass(frozen=True, slots=True)
class Traits:
    """How a family departs from Llama. None: as config.json's `attention_bias` says."""

    qkv_bias: bool | None = None
    output_bias: bool | None = None
    qk_norm: bool = False


class Linear(NamedTuple):
    weight: torch.Tensor  # [O, I]
    bias: torch.Tensor | None  # [O]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


class Layer(NamedTuple):
    attention_norm: torch.Tensor  # [E]
    q: Linear  # [H * D, E]
    k: Linear  # [K * D, E]
    v: Linear  # [K * D, E]
    q_norm: torch.Tensor | None  # [D]
    k_norm: torch.Tensor | None  # [D]
    output: Linear  # [E, H * D]
    feed_norm: torch.Tensor  # [E]
    gate: Linear  # [F, E]
    up: Linear  # [F, E]
    down: Linear  # [E, F]


def decoder(traits: Traits) -> Architecture:
    def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
        return decoder_shapes(config, traits)

    def optional(config: ModelConfig) -> frozenset[str]:
        rotary = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(config.layers)}
        return frozenset(rotary | ({"lm_head.weight"} if config.tie_word_embeddings else set()))

    return Architecture(shapes, optional, Decoder)


def decoder_shapes(config: ModelConfig, traits: Traits) -> dict[str, tuple[int, ...]]:
    hidden, feed, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    query, kv = config.heads * head_dim, config.kv_heads * head_dim
    qkv_bias = config.attention_bias if traits.qkv_bias is None else traits.qkv_bias
    output_bias = config.attention_bias if traits.output_bias is None else traits.output_bias
    linears = {
        "self_attn.q_proj": (query, hidden, qkv_bias),
        "self_attn.k_proj": (kv, hidden, qkv_bias),
        "self_attn.v_proj": (kv, hidden, qkv_bias),
        "self_attn.o_proj": (hidden, query, output_bias),
        "mlp.gate_proj": (feed, hidden, config.mlp_bias),
        "mlp.up_proj": (feed, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, feed, config.mlp_bias),
    }
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.layers):
        prefix = f"model.layers.{layer}."
        for name, (outputs, inputs, has_bias) in linears.items():
            found[f"{prefix}{name}.weight"] = (outputs, inputs)
            if has_bias:
                found[f"{prefix}{name}.bias"] = (outputs,)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{prefix}{norm}.weight"] = (hidden,)
        for norm in ("q_norm", "k_norm") if traits.qk_norm else ():
            found[f"{prefix}self_attn.{norm}.weight"] = (head_dim,)
    found["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = (config.vocab_size, hidden)
    return found


def rope_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """[D/2] float32."""
    inv_freq = inverse_frequencies(head_dim, rope.theta)
    if rope.kind == "linear":
        return scale_linear(inv_freq, rope.factor)
    if rope.kind == "llama3":
        return scale_llama3(inv_freq, rope.factor, rope.low_freq_factor, rope.high_freq_factor, rope.trained_positions)
    return inv_freq


class Decoder:
    """Implements engine.model.Model."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, torch.Tensor]) -> None:
        self.config = config
        self._embedding = tensors["model.embed_tokens.weight"]  # [V, E]
        self._layers = tuple(_layer(tensors, f"model.layers.{i}.") for i in range(config.layers))
        self._norm = tensors["model.norm.weight"]  # [E]
        self._head = self._embedding if config.tie_word_embeddings else tensors["lm_head.weight"]  # [V, E]
        self._inv_freq = rope_frequencies(config.rope, config.head_dim)

    @property
    def dtype(self) -> torch.dtype:
        return self._embedding.dtype

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(ids, self._embedding)

    def forward(
        self, hidden: torch.Tensor, positions: torch.Tensor, attend: Attend, wanted: torch.Tensor
    ) -> torch.Tensor:
        config, eps = self.config, self.config.rms_norm_eps
        turned = angles(positions, self._inv_freq, hidden.dtype)
        residual = hidden  # [T, E]
        normed = rms_norm(hidden, self._layers[0].attention_norm, eps)
        for i, layer in enumerate(self._layers):
            q = layer.q(normed).view(-1, config.heads, config.head_dim)  # [T, H, D]
            k = layer.k(normed).view(-1, config.kv_heads, config.head_dim)  # [T, K, D]
            v = layer.v(normed).view(-1, config.kv_heads, config.head_dim)  # [T, K, D]
            if layer.q_norm is not None and layer.k_norm is not None:
                q, k = rms_norm(q, layer.q_norm, eps), rms_norm(k, layer.k_norm, eps)
            mixed = attend(i, rope(q, turned), rope(k, turned), v).view(len(q), -1)  # [T, H * D]
            if i + 1 == config.layers:  # beyond the last attention only the wanted tokens matter
                mixed, residual = mixed[wanted], residual[wanted]
            normed, residual = add_rms_norm(layer.output(mixed), residual, layer.feed_norm, eps)
            fed = layer.down(silu_mul(layer.gate(normed), layer.up(normed)))  # [T, E]
            following = self._norm if i + 1 == config.layers else self._layers[i + 1].attention_norm
            normed, residual = add_rms_norm(fed, residual, following, eps)
        return normed  # [M, E]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return linear(hidden, self._head)


def _layer(tensors: Mapping[str, torch.Tensor], prefix: str) -> Layer:
    def of(name: str) -> Linear:
        return Linear(tensors[f"{prefix}{name}.weight"], tensors.get(f"{prefix}{name}.bias"))

    return Layer(
        attention_norm=tensors[f"{prefix}input_layernorm.weight"],
        q=of("self_attn.q_proj"),
        k=of("self_attn.k_proj"),
        v=of("self_attn.v_proj"),
        q_norm=tensors.get(f"{prefix}self_attn.q_norm.weight"),
        k_norm=tensors.get(f"{prefix}self_attn.k_norm.weight"),
        output=of("self_attn.o_proj"),
        feed_norm=tensors[f"{prefix}post_attention_layernorm.weight"],
        gate=of("mlp.gate_proj"),
        up=of("mlp.up_proj"),
        down=of("mlp.down_proj"),
    )
