"""What the router has to know of a model without loading it: context, vocabulary, the client's default parameters."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from core.errors import CheckpointError, ConfigError, InvalidRequest
from core.sampling import SamplingParams
from engine.config import GENERATION_FILE, read_config, read_json
from router.limits import ServedModel

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
FROM_GENERATION_CONFIG = ("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty")


def served_model(checkpoint: Path, served_name: str, max_context: int, created: int) -> ServedModel:
    """Raises CheckpointError or ConfigError. A name that was not given is the folder's."""
    config = read_config(checkpoint)
    return ServedModel(
        names=tuple(served_name.split(",")) if served_name else (checkpoint.name,),
        context_tokens=context_tokens(config.max_positions, max_context),
        vocab_size=config.vocab_size,
        created=created,
        defaults=_defaults(checkpoint),
    )


def model_digest(checkpoint: Path) -> str:
    """Of config and tokenizer: what a router can know without the weights. 32 hex digits. Raises CheckpointError."""
    h = hashlib.blake2b(repr(read_config(checkpoint)).encode(), digest_size=16)
    for path in (checkpoint / name for name in TOKENIZER_FILES):
        content = path.read_bytes() if path.exists() else b""
        h.update(len(content).to_bytes(8, "little") + content)
    return h.hexdigest()


def context_tokens(max_positions: int, asked: int) -> int:
    """Raises ConfigError for more than the model was built for."""
    if asked > max_positions:
        raise ConfigError(f"a context of {asked} tokens was asked for; the model has {max_positions}")
    return asked or max_positions


def _defaults(checkpoint: Path) -> SamplingParams:
    """generation_config.json holds what the model's makers recommend; a client's own values go before it."""
    path = checkpoint / GENERATION_FILE
    fields: dict[str, Any] = dict(read_json(path)) if path.exists() else {}
    wanted = {name: fields[name] for name in FROM_GENERATION_CONFIG if fields.get(name) is not None}
    try:
        return SamplingParams(**wanted)
    except (InvalidRequest, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
