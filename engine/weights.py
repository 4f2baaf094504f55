"""A checkpoint's weights: which files, which tensors, in which type. Never two copies of them.

In the checkpoint's own type every tensor is a view of the mapped file. In another type tensors are converted one by
one, and the pages of the file behind each are given back to the system. On a device it is a copy in its memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from core.errors import CheckpointError
from engine.architectures.registry import find_architecture
from engine.config import Fields, ModelConfig, read_config, read_json
from engine.model import Model
from engine.ops import PLAIN, Ops
from engine.safetensors_file import SafetensorsFile

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = ("auto", "float32", "bfloat16", "float16")
MAX_NAMED = 5  # tensors named in one complaint

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


def load_model(
    checkpoint: Path,
    dtype: str = "auto",
    progress: Progress | None = None,
    device: str = "cpu",
    ops: Ops = PLAIN,
) -> Model:
    """The model of a checkpoint folder. Raises CheckpointError, naming the file and what is wrong with it."""
    assert dtype in DTYPES, dtype
    config = read_config(checkpoint)
    architecture = find_architecture(config.architecture)
    files = weight_files(checkpoint)
    _check(checkpoint, files, architecture.shapes(config), architecture.optional(config))
    names = set(architecture.shapes(config))
    target = target_dtype(config, dtype)
    tensors = {name: tensor.to(device) for name, tensor in _tensors(files, names, target, progress)}
    return architecture.build(config, tensors, ops)


def target_dtype(config: ModelConfig, dtype: str) -> torch.dtype:
    """`auto` is the type that config.json states."""
    name = config.dtype if dtype == "auto" else dtype
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def weight_files(checkpoint: Path) -> tuple[SafetensorsFile, ...]:
    """The files, in the order of their names."""
    index = checkpoint / INDEX_FILE
    if index.exists():
        shards = Fields(index, read_json(index)).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(_is_file_name(name) for name in shards.values()):
            raise CheckpointError(f"{index}: weight_map must map tensors to file names", param="weight_map")
        names = sorted(set(shards.values()))
    elif (checkpoint / SINGLE_FILE).exists():
        names = [SINGLE_FILE]
    else:
        raise CheckpointError(f"{checkpoint}: holds neither {SINGLE_FILE} nor {INDEX_FILE}")
    missing = [name for name in names if not (checkpoint / name).exists()]
    if missing:
        raise CheckpointError(f"{index}: {len(missing)} of {len(names)} files are missing: {_some(missing)}")
    return tuple(SafetensorsFile(checkpoint / name) for name in names)


def _is_file_name(name: object) -> bool:
    """A name in the checkpoint's own folder: an index is data, and may not point elsewhere."""
    return isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name


def _check(
    checkpoint: Path,
    files: tuple[SafetensorsFile, ...],
    shapes: Mapping[str, tuple[int, ...]],
    optional: frozenset[str],
) -> None:
    found = {}
    for file in files:
        for name, entry in file.entries.items():
            if name in found:
                raise CheckpointError(f"{file.path}: tensor {name} is also in another file", param=name)
            found[name] = entry
    missing = [name for name in shapes if name not in found]
    extra = [name for name in found if name not in shapes and name not in optional]
    wrong = [
        f"{name} is {list(found[name].shape)}, config.json says {list(shape)}"
        for name, shape in shapes.items()
        if name in found and found[name].shape != shape
    ]
    for what, names in (("are missing", missing), ("are not part of the model", extra), ("have a wrong shape", wrong)):
        if names:
            raise CheckpointError(f"{checkpoint}: {len(names)} tensors {what}: {_some(names)}", param=names[0])


def _some(names: list[str]) -> str:
    rest = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _tensors(
    files: tuple[SafetensorsFile, ...], names: set[str], dtype: torch.dtype, progress: Progress | None
) -> Iterator[tuple[str, torch.Tensor]]:
    entries = [(file, entry) for file in files for entry in file.entries.values() if entry.name in names]
    entries.sort(key=lambda pair: (pair[0].path.name, pair[1].start))
    done, total = 0, sum(entry.end - entry.start for _, entry in entries)
    for file, entry in entries:
        tensor = file.tensor(entry.name)
        if tensor.dtype != dtype:
            if not tensor.dtype.is_floating_point:
                raise CheckpointError(
                    f"{file.path}: tensor {entry.name} is {entry.dtype}, not a number with a fraction"
                )
            tensor = tensor.to(dtype)
            file.forget(entry)
        else:
            file.read_ahead(entry)
        done += entry.end - entry.start
        if progress is not None:
            progress(done, total)
        yield entry.name, tensor
