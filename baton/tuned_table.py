"""Where the measured configurations of a chip's kernels lie, and what this process takes of them, once, at start."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from baton.backends import Backend
from core.errors import ConfigError
from kernels.gpu import tuning
from kernels.gpu.tuning import SHIPPED, Table

if TYPE_CHECKING:
    import torch

    from engine.attention_configs import AttentionConfigs
    from engine.config import ModelConfig

log = logging.getLogger(__name__)


def installed() -> dict[str, str]:
    """Versions that a measured time depends on."""
    return {name: version(name) for name in ("torch", "triton")}


def default_file(chip: str) -> Path:
    """In the user's cache folder: what `baton tune` fills."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "baton" / "tuned" / tuning.file_name(chip)


def table_for(chip: str, software: Mapping[str, str], shipped: Path = SHIPPED) -> Table:
    """The user's file before the shipped one. Raises ConfigError, naming the file, for one that is broken.

    A user's file of other software is left out, and the log says so: what was fast there may not even compile here.
    """
    path = default_file(chip)
    try:
        stale = path.exists() and dict(tuning.read(path).software) != dict(software)
        table = tuning.load_table(chip, None if stale else path, shipped)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{error}: mend or remove the file; without it the kernels run with defaults") from error
    if stale:
        log.warning("%s was measured with other versions of torch or triton: not used; run `baton tune` again", path)
    return table


def attention_configs(backend: Backend, model: ModelConfig, page_size: int, dtype: torch.dtype) -> AttentionConfigs:
    """What the kernels of backend `triton` run with; the log names each shape, and whether it is tuned.

    Raises ConfigError. The interpreter is no chip: there it is the defaults.
    """
    from engine.attention_configs import AttentionConfigs

    chip = _chip(backend)
    table = table_for(chip, installed()) if chip else tuning.EMPTY
    try:
        configs = AttentionConfigs(model, page_size, dtype, table)
    except ValueError as error:
        raise ConfigError(f"{default_file(chip)}: {error}: mend or remove the file") from error
    for shape, tuned in configs.tuned.items():
        log.info("%s: %s", shape, "tuned" if tuned else "untuned: defaults")
    return configs


def _chip(backend: Backend) -> str:
    """The name of the GPU; empty without one."""
    import torch

    return str(torch.cuda.get_device_name(torch.device(backend.device))) if backend.on_gpu else ""
