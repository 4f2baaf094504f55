"""Which model a checkpoint is: one hash, equal on two workers only if their KV pages mean the same.

SHA-256 over every weight file's header and sampled bytes of every tensor, the RoPE and shape fields of the config, and
the tokenizer. Sampled, because reading all of a large checkpoint takes minutes: two trainings of one model differ in
every tensor, and a file that was cut or reordered differs in its header.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from engine.config import read_config
from engine.safetensors_file import SafetensorsFile
from engine.weights import weight_files

SAMPLES = 16  # per tensor, evenly spread, first and last bytes included
SAMPLE_BYTES = 64
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def identity(checkpoint: Path) -> str:
    """64 hex digits. Raises CheckpointError as loading does."""
    h = hashlib.sha256()
    for file in weight_files(checkpoint):
        _add(h, file.path.name.encode())
        _add(h, file.header)
        for entry in sorted(file.entries.values(), key=lambda entry: entry.start):
            _add(h, _sample(file, entry.start, entry.end))
    _add(h, repr(read_config(checkpoint)).encode())
    for name in TOKENIZER_FILES:
        path = checkpoint / name
        _add(h, path.read_bytes() if path.exists() else b"")
    return h.hexdigest()


def _add(h: hashlib._Hash, field: bytes) -> None:
    """Length-prefixed, so that no two checkpoints read alike."""
    h.update(len(field).to_bytes(8, "little"))
    h.update(field)


def _sample(file: SafetensorsFile, start: int, end: int) -> bytes:
    if end - start <= SAMPLES * SAMPLE_BYTES:
        return file.read(start, end)
    step = (end - start - SAMPLE_BYTES) / (SAMPLES - 1)
    places = [start + round(i * step) for i in range(SAMPLES)]
    return b"".join(file.read(place, place + SAMPLE_BYTES) for place in places)
