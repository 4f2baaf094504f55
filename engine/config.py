"""What a checkpoint says about its model: config.json and generation_config.json, read once into a frozen dataclass."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import CheckpointError

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
ROPE_KINDS = ("default", "linear", "llama3")
TORCH_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: the base, and how positions beyond the trained context are squeezed."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    trained_positions: int = 0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder-only model. Names are those of Hugging Face's config.json, but for the shapes' short words."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    rms_norm_eps: float
    rope: RopeConfig
    windows: tuple[int | None, ...]  # per layer: keys that a query sees, itself included; None: all
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    eos_ids: tuple[int, ...]
    dtype: str  # of the weights in the files, as config.json states it


def read_config(checkpoint: Path) -> ModelConfig:
    """Raises CheckpointError, naming the file and the field, when the model is not one that Baton can run."""
    path = checkpoint / CONFIG_FILE
    fields = Fields(path, read_json(path))
    generation = checkpoint / GENERATION_FILE
    more_eos = Fields(generation, read_json(generation)).ids("eos_token_id") if generation.exists() else ()
    heads, hidden = fields.count("num_attention_heads"), fields.count("hidden_size")
    kv_heads = fields.count("num_key_value_heads", heads)
    if heads % kv_heads:
        raise fields.wrong("num_key_value_heads", f"must divide num_attention_heads ({heads})", kv_heads)
    if fields.get("hidden_act", "silu") != "silu":
        raise fields.wrong("hidden_act", "must be 'silu'", fields.get("hidden_act"))
    layers, max_positions = fields.count("num_hidden_layers"), fields.count("max_position_embeddings")
    return ModelConfig(
        architecture=architecture_name(fields),
        vocab_size=fields.count("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.count("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_head_dim(fields, hidden, heads),
        max_positions=max_positions,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=_rope(fields, max_positions),
        windows=_windows(fields, layers),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        attention_bias=fields.flag("attention_bias", False),
        mlp_bias=fields.flag("mlp_bias", False),
        eos_ids=tuple(sorted({*fields.ids("eos_token_id"), *more_eos})),
        dtype=_dtype(fields),
    )


def read_json(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return value


class Fields:
    """The fields of one JSON object, by type; every complaint names the file and the field."""

    def __init__(self, path: Path, values: Mapping[str, Any], prefix: str = "") -> None:
        self._path, self._values, self._prefix = path, values, prefix

    def wrong(self, name: str, expected: str, got: object) -> CheckpointError:
        return CheckpointError(f"{self._path}: {self._prefix}{name} {expected}, got {got!r}", param=name)

    def get(self, name: str, default: Any = None) -> Any:
        value = self._values.get(name)
        return default if value is None else value

    def count(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.wrong(name, "must be a positive whole number", value)
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise self.wrong(name, "must be a positive number", value)
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "must be true or false", value)
        return value

    def ids(self, name: str) -> tuple[int, ...]:
        value = self.get(name, [])
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise self.wrong(name, "must be a token id or a list of them", value)
        return tuple(ids)

    def inner(self, name: str) -> Fields | None:
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(name, "must be an object", value)
        return Fields(self._path, value, f"{self._prefix}{name}.")


def architecture_name(fields: Fields) -> str:
    names = fields.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise fields.wrong("architectures", "must list one name", names)
    return names[0]


def _head_dim(fields: Fields, hidden: int, heads: int) -> int:
    # Qwen3 is the one whose default is a constant and not a quotient.
    default = 128 if fields.get("model_type") == "qwen3" else hidden // heads
    head_dim = fields.count("head_dim", default)
    if head_dim % 2:
        raise fields.wrong("head_dim", "must be even", head_dim)
    return head_dim


def _rope(fields: Fields, max_positions: int) -> RopeConfig:
    """`rope_parameters` holds everything; older files have `rope_theta` beside an optional `rope_scaling`."""
    rope = fields.inner("rope_parameters") or fields.inner("rope_scaling") or fields
    theta = rope.number("rope_theta", fields.number("rope_theta", 10000.0))
    kind = "default" if rope is fields else rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise rope.wrong("rope_type", f"must be one of {', '.join(ROPE_KINDS)}", kind)
    for holder in (fields, rope):
        if holder.get("partial_rotary_factor", 1.0) != 1.0:
            raise holder.wrong("partial_rotary_factor", "must be 1", holder.get("partial_rotary_factor"))
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, kind, rope.number("factor"))
    return RopeConfig(
        theta,
        kind,
        rope.number("factor"),
        rope.number("low_freq_factor"),
        rope.number("high_freq_factor"),
        rope.count("original_max_position_embeddings", max_positions),
    )


def _windows(fields: Fields, layers: int) -> tuple[int | None, ...]:
    model_type = fields.get("model_type")
    window = fields.get("sliding_window")
    if model_type in ("qwen2", "qwen3"):
        window = window if fields.flag("use_sliding_window", False) else None
    elif model_type != "mistral":  # Llama's files may carry the field, and its model ignores it
        window = None
    if window is None:
        return (None,) * layers
    window = fields.count("sliding_window")
    kinds = fields.get("layer_types")
    if kinds is None:
        full = fields.get("max_window_layers", 28) if model_type != "mistral" else 0
        return tuple(None if layer < full else window for layer in range(layers))
    if not isinstance(kinds, list) or len(kinds) != layers or {*kinds} - {"full_attention", "sliding_attention"}:
        raise fields.wrong("layer_types", f"must name full_attention or sliding_attention {layers} times", kinds)
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _dtype(fields: Fields) -> str:
    name = fields.get("dtype", fields.get("torch_dtype", "float32"))
    if name not in TORCH_DTYPES:
        raise fields.wrong("dtype", f"must be one of {', '.join(TORCH_DTYPES)}", name)
    return str(name)
