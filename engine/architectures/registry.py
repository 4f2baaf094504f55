"""Finds the architecture of a checkpoint: Baton's own, or one of a package's entry points."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from types import MappingProxyType

from core.errors import CheckpointError
from engine.architectures.decoder import Traits, decoder
from engine.model import Architecture

ENTRY_POINT_GROUP = "baton.architectures"

BUILT_IN: Mapping[str, Architecture] = MappingProxyType(
    {
        "LlamaForCausalLM": decoder(Traits()),
        "MistralForCausalLM": decoder(Traits()),
        "Qwen2ForCausalLM": decoder(Traits(qkv_bias=True, output_bias=False)),
        "Qwen3ForCausalLM": decoder(Traits(qk_norm=True)),
    }
)


def find_architecture(name: str) -> Architecture:
    """Baton's own come first, so that an installed package cannot replace one unnoticed."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    plugins = entry_points(group=ENTRY_POINT_GROUP)
    for plugin in plugins:
        if plugin.name == name:
            return _load(plugin.value, plugin.load())
    known = ", ".join(sorted({*BUILT_IN, *(plugin.name for plugin in plugins)}))
    raise CheckpointError(f"architectures: {name!r} is not known; known are {known}", param="architectures")


def _load(source: str, loaded: object) -> Architecture:
    if not isinstance(loaded, Architecture):
        raise CheckpointError(f"{source}: the entry point must be an engine.model.Architecture, got {loaded!r}")
    return loaded
