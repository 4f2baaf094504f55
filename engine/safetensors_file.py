"""One safetensors file, mapped into memory: its header checked, its tensors views of the map.

The file is eight bytes of header length, a JSON header, and the tensors' bytes. It is mapped copy-on-write: nothing is
written, so the pages stay those of the file and are shared by every worker of the host that maps it.
"""

from __future__ import annotations

import json
import mmap
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from core.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_LENGTH_BYTES = 8
_POPULATE_READ = 22  # MADV_POPULATE_READ of <linux/mman.h>, which the standard library does not name
_DTYPES = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies; `start` and `end` are bytes from the beginning of the file."""

    name: str
    dtype: str  # as the file spells it
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile:
    """Raises CheckpointError, naming the file, when it is cut short, overlapping or not this format."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:  # an empty file cannot be mapped: ValueError
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        self.header = self._header()
        self.entries = MappingProxyType({entry.name: entry for entry in self._entries()})

    def __len__(self) -> int:
        """The file's size in bytes."""
        return len(self._map)

    def read(self, start: int, end: int) -> bytes:
        return self._map[start:end]

    def tensor(self, name: str) -> torch.Tensor:
        """A view of the map, which lives as long as the tensor does."""
        entry = self.entries[name]
        dtype = _DTYPES.get(entry.dtype)
        if dtype is None:
            raise CheckpointError(f"{self.path}: tensor {name} has the type {entry.dtype}, which is not supported")
        elements = (entry.end - entry.start) // dtype.itemsize
        if not elements:
            return torch.empty(entry.shape, dtype=dtype)
        if entry.start % dtype.itemsize:  # written without padding; a copy is aligned
            raw = bytearray(self._map[entry.start : entry.end])
            return torch.frombuffer(raw, dtype=dtype).view(entry.shape)
        return torch.frombuffer(self._map, dtype=dtype, count=elements, offset=entry.start).view(entry.shape)

    def read_ahead(self, entry: TensorEntry) -> None:
        """Reads a tensor's bytes into the page cache and maps them, so that the first step does not wait for a disk."""
        start = entry.start // mmap.PAGESIZE * mmap.PAGESIZE
        try:
            self._map.madvise(_POPULATE_READ, start, entry.end - start)
        except OSError:  # before Linux 5.14: the tensor is read when it is first used
            pass

    def forget(self, entry: TensorEntry) -> None:
        """Lets the system drop the pages behind a tensor from this process: they are read again if touched again."""
        start = -(-entry.start // mmap.PAGESIZE) * mmap.PAGESIZE
        end = entry.end // mmap.PAGESIZE * mmap.PAGESIZE
        if start < end:
            self._map.madvise(mmap.MADV_DONTNEED, start, end - start)

    def _broken(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: broken safetensors file: {what}")

    def _header(self) -> bytes:
        length = int.from_bytes(self._map[:_LENGTH_BYTES], "little")
        if len(self._map) < _LENGTH_BYTES or not 2 <= length <= min(MAX_HEADER_BYTES, len(self._map) - _LENGTH_BYTES):
            raise self._broken(f"its header of {length} bytes does not fit into {len(self._map)} bytes")
        return self._map[_LENGTH_BYTES : _LENGTH_BYTES + length]

    def _entries(self) -> list[TensorEntry]:
        try:
            parsed = json.loads(self.header)
            fields = {name: field for name, field in parsed.items() if name != "__metadata__"}
            found = [self._entry(name, field) for name, field in fields.items()]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._broken(f"its header cannot be understood ({error!r})") from error
        found.sort(key=lambda entry: (entry.start, entry.end))
        end = _LENGTH_BYTES + len(self.header)
        for entry in found:
            if entry.start != end:
                raise self._broken(f"tensor {entry.name} does not begin where the one before it ends")
            end = entry.end
        if end != len(self._map):
            raise self._broken(f"its tensors end at byte {end}, the file at byte {len(self._map)}")
        return found

    def _entry(self, name: str, field: dict[str, Any]) -> TensorEntry:
        base = _LENGTH_BYTES + len(self.header)
        start, end = (int(offset) + base for offset in field["data_offsets"])
        shape = tuple(int(size) for size in field["shape"])
        entry = TensorEntry(name, str(field["dtype"]), shape, start, end)
        dtype = _DTYPES.get(entry.dtype)
        elements = 1
        for size in shape:
            elements *= size
        if start > end or min((0, *shape)) < 0 or (dtype is not None and elements * dtype.itemsize != end - start):
            raise self._broken(f"tensor {name}: {end - start} bytes do not hold {list(shape)} of {entry.dtype}")
        return entry
