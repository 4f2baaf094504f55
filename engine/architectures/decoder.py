"""The pre-norm decoder with rotary attention and a gated feed-forward: Llama, Mistral, Qwen2 and Qwen3.

They differ in three switches (Traits); everything else is numbers of the config. Plain code over plain tensors:
the weights are a tuple of layers, the state of a step is passed in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from engine.config import ModelConfig, RopeConfig
from engine.model import Architecture, Attend, Rotary
from engine.ops import PLAIN, Ops
from kernels.linear import linear
from kernels.rope import inverse_frequencies, scale_linear, scale_llama3


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
    qkv: tuple[Linear, ...]  # [H * D, E], [K * D, E], [K * D, E]; or packed into one
    rotary: Rotary
    output: Linear  # [E, H * D]
    feed_norm: torch.Tensor  # [E]
    gate_up: tuple[Linear, ...]  # [F, E], [F, E]; or packed into one
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

    def __init__(self, config: ModelConfig, tensors: dict[str, torch.Tensor], ops: Ops = PLAIN) -> None:
        self.config = config
        self._ops = ops
        self._embedding = tensors["model.embed_tokens.weight"]  # [V, E]
        rotary = Rotary(rope_frequencies(config.rope, config.head_dim).to(self._embedding.device))
        rotary = rotary._replace(eps=config.rms_norm_eps)
        self._layers = tuple(_layer(tensors, f"model.layers.{i}.", rotary, ops.packed) for i in range(config.layers))
        query, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self._qkv_widths = (query, kv, kv)
        self._norm = tensors["model.norm.weight"]  # [E]
        self._head = self._embedding if config.tie_word_embeddings else tensors["lm_head.weight"]  # [V, E]

    @property
    def dtype(self) -> torch.dtype:
        return self._embedding.dtype

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(ids, self._embedding)

    def forward(
        self, hidden: torch.Tensor, positions: torch.Tensor, attend: Attend, wanted: torch.Tensor
    ) -> torch.Tensor:
        config, eps, ops = self.config, self.config.rms_norm_eps, self._ops
        feed_widths = (config.intermediate_size,) * 2
        residual = hidden  # [T, E]
        normed = ops.rms_norm(hidden, self._layers[0].attention_norm, eps)
        for i, layer in enumerate(self._layers):
            q, k, v = _project(layer.qkv, normed, self._qkv_widths)
            q = q.view(-1, config.heads, config.head_dim)  # [T, H, D]
            k = k.view(-1, config.kv_heads, config.head_dim)  # [T, K, D]
            v = v.view(-1, config.kv_heads, config.head_dim)  # [T, K, D]
            mixed = attend(i, q, k, v, layer.rotary).view(len(q), -1)  # [T, H * D]
            if i + 1 == config.layers:  # beyond the last attention only the wanted tokens matter
                mixed, residual = mixed[wanted], residual[wanted]
            normed, residual = ops.add_rms_norm(layer.output(mixed), residual, layer.feed_norm, eps)
            fed = layer.down(ops.silu_mul(*_project(layer.gate_up, normed, feed_widths)))  # [T, E]
            following = self._norm if i + 1 == config.layers else self._layers[i + 1].attention_norm
            normed, residual = ops.add_rms_norm(fed, residual, following, eps)
        return normed  # [M, E]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return linear(hidden, self._head)


def _project(linears: tuple[Linear, ...], x: torch.Tensor, widths: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """[T, width] for each width: of products apart, or of one packed product."""
    if len(linears) == len(widths):
        return tuple(each(x) for each in linears)
    return tuple(torch.split(linears[0](x), list(widths), dim=1))


def _layer(tensors: dict[str, torch.Tensor], prefix: str, rotary: Rotary, packed: bool) -> Layer:
    def of(*names: str) -> tuple[Linear, ...]:
        found = [Linear(tensors[f"{prefix}{name}.weight"], tensors.get(f"{prefix}{name}.bias")) for name in names]
        if not packed or len(found) == 1:
            return tuple(found)
        for name in names:
            del tensors[f"{prefix}{name}.weight"]
        biases = [each.bias for each in found if each.bias is not None]
        assert len(biases) in (0, len(found)), names
        return (Linear(torch.cat([each.weight for each in found]), torch.cat(biases) if biases else None),)

    norms = [tensors.get(f"{prefix}self_attn.{name}.weight") for name in ("q_norm", "k_norm")]
    return Layer(
        attention_norm=tensors[f"{prefix}input_layernorm.weight"],
        qkv=of("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        rotary=rotary._replace(q_norm=norms[0], k_norm=norms[1]),
        output=of("self_attn.o_proj")[0],
        feed_norm=tensors[f"{prefix}post_attention_layernorm.weight"],
        gate_up=of("mlp.gate_proj", "mlp.up_proj"),
        down=of("mlp.down_proj")[0],
    )
