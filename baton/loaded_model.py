"""How a process that runs an engine loads its model, and how many pages its pool has.

The pool is sized before any weight is read, so that too little memory is said at once. In this order:

    pages given      those
    kv_bytes given   as many as fit
    neither          eight of the longest contexts, but at most a quarter of what is free beside the weights,
                     and at least one context

On a GPU nobody else needs the memory but workers that share it, each with its part of the whole: there the model is
loaded first, its largest step is run and measured, and what is left is the pool's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from baton.available_memory import available_bytes
from baton.backends import ON_CPU, Backend
from baton.model_facts import context_tokens
from baton.tuned_table import attention_configs
from core.clock import Clock
from core.errors import ConfigError, EngineError, StartupError, TooLittleMemory
from core.layout import HASH_UNIT_TOKENS, PageLayout
from engine.architectures.registry import find_architecture
from engine.config import ModelConfig, read_config
from engine.identity import identity
from engine.intake import Intake
from engine.memory import SCRATCH_PAGES, page_layout, pages_that_fit, weight_bytes
from engine.model import Model
from engine.weights import Progress, load_model, target_dtype
from kvtransfer.frames import PROOF_FRAMES

if TYPE_CHECKING:
    from engine.attention_configs import AttentionConfigs

CONTEXTS = 8
SHARE = 4  # of the free memory: one in so many parts


@dataclass(frozen=True, slots=True)
class PoolWish:
    """What was asked for; 0 leaves it to the model and the machine."""

    page_size: int = 16  # tokens
    pages: int = 0  # frame 0 included
    kv_bytes: int = 0
    max_context_tokens: int = 0
    gpu_share: float = 1.0  # of a GPU's memory, all that this process may take there

    def __post_init__(self) -> None:
        """Raises ConfigError, naming the flag."""
        if self.page_size < HASH_UNIT_TOKENS or self.page_size % HASH_UNIT_TOKENS:
            raise ConfigError(f"--page-size must be a multiple of {HASH_UNIT_TOKENS}, got {self.page_size}")
        if min(self.pages, self.kv_bytes, self.max_context_tokens) < 0:
            raise ConfigError("--pages, --kv-memory and --max-context must not be negative")
        if not 0.0 < self.gpu_share <= 1.0:
            raise ConfigError(f"--gpu-share must be above 0 and at most 1, got {self.gpu_share}")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory, and the pool that is to be made for it."""

    model: Model
    layout: PageLayout
    pages: int  # frame 0 included
    identity: str
    end_ids: tuple[int, ...]
    vocabulary: int
    max_context_tokens: int
    backend: Backend = ON_CPU
    configs: AttentionConfigs | None = None  # what backend triton's kernels run with

    @property
    def pool_bytes(self) -> int:
        return self.pages * self.layout.page_bytes

    def intake(self, clock: Clock) -> Intake:
        return Intake(self.identity, self.vocabulary, self.max_context_tokens, self.end_ids, clock)


def load(
    checkpoint: Path,
    dtype: str,
    wish: PoolWish,
    progress: Progress | None = None,
    available: Callable[[], int] = available_bytes,
    backend: Backend = ON_CPU,
    step: tuple[int, int] = (512, 256),
) -> LoadedModel:
    """Raises StartupError and its kinds. `progress` is told of bytes loaded, of how many.

    `step`: the most tokens of a prefill step, the most rows of a decode step: what is measured on a GPU.
    """
    config = read_config(checkpoint)
    context = context_tokens(config.max_positions, wish.max_context_tokens)
    kind = target_dtype(config, dtype)
    layout = page_layout(config, wish.page_size, str(kind).removeprefix("torch."))
    configs = attention_configs(backend, config, wish.page_size, kind) if backend.name == "triton" else None
    measured = backend.on_gpu and not (wish.pages or wish.kv_bytes)
    pages = 0 if measured else _pages(config, layout, context, wish, available)
    model = load_model(checkpoint, dtype, progress, backend.device, backend.ops())
    if measured:
        where = _Place(backend.device, wish.gpu_share)
        pages = _pages_on_device(model, layout, context, where, step, configs)
    return LoadedModel(
        model=model,
        layout=layout,
        pages=pages,
        identity=identity(checkpoint),
        end_ids=config.eos_ids,
        vocabulary=config.vocab_size,
        max_context_tokens=context,
        backend=backend,
        configs=configs,
    )


class _Place(NamedTuple):
    device: str
    share: float


def _pages_on_device(
    model: Model,
    layout: PageLayout,
    context: int,
    place: _Place,
    step: tuple[int, int],
    configs: AttentionConfigs | None,
) -> int:
    """Raises TooLittleMemory and StartupError."""
    import torch

    from engine.device_pool import LargestStep, pages_beside, step_bytes

    where = torch.device(place.device)
    try:
        taken_bytes = step_bytes(model, layout, LargestStep(*step), where, configs)
    except EngineError as error:
        advice = "where memory ran out, give smaller --step-tokens or --max-rows"
        raise StartupError(f"the largest step was tried, and failed: {error.message}; {advice}") from error
    torch.cuda.empty_cache()
    free_bytes, all_bytes = torch.cuda.mem_get_info(where)
    if place.share < 1.0:  # the others may not have taken theirs yet
        free_bytes = min(free_bytes, int(all_bytes * place.share) - torch.cuda.memory_reserved(where))
    return pages_beside(free_bytes, taken_bytes + PROOF_FRAMES * layout.page_bytes, layout, context)


def _pages(config: ModelConfig, layout: PageLayout, context: int, wish: PoolWish, available: Callable[[], int]) -> int:
    """Raises TooLittleMemory when one sequence of the longest context would not fit."""
    if wish.pages:
        return _enough(wish.pages, layout, context)
    if wish.kv_bytes:
        return _enough(wish.kv_bytes // layout.page_bytes, layout, context)
    shapes = find_architecture(config.architecture).shapes(config)
    held_bytes, free_bytes = weight_bytes(shapes, layout.dtype), available()
    fitting = pages_that_fit(free_bytes, held_bytes, layout, context)
    one = SCRATCH_PAGES + layout.pages_for(context)
    wanted = SCRATCH_PAGES + CONTEXTS * layout.pages_for(context)
    modest = (free_bytes - held_bytes) // SHARE // layout.page_bytes
    return min(fitting, wanted, max(one, modest))


def _enough(pages: int, layout: PageLayout, context: int) -> int:
    needed = SCRATCH_PAGES + layout.pages_for(context)
    if pages < needed:
        raise TooLittleMemory(
            f"a pool of {pages} pages ({pages * layout.page_bytes} bytes) is too small: one sequence of {context} "
            f"tokens needs {needed} pages ({needed * layout.page_bytes} bytes); give more with --kv-memory or --pages, "
            "or a shorter --max-context"
        )
    return pages
