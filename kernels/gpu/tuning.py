"""Which configuration a kernel runs with: a table by chip and shape, read from files that were measured beforehand.

A file is JSON, for one chip: what was tried for each kernel and shape, and how long it took. The one to use is the
fastest; the default is always tried first, so a table that is half filled is never worse than none. Files are read
strictly, and looking up costs one dict access: serving measures nothing.

    {"version": 1, "chip": "NVIDIA H200", "software": {"torch": "2.11", "triton": "3.6"}, "entries": [
      {"kernel": "decode_attention", "shape": "bfloat16 ... R64", "done": true, "trials": [
        {"config": {"block_keys": 64, "num_warps": 4}, "time_us": 271.3},
        {"config": {"block_keys": 128, "num_warps": 4}, "failed": "out of shared memory"}]}]}

Tables for chips that were measured are shipped in the folder `tuned` beside this file; a user's own file, written by
`baton tune`, comes before them. Where neither has a shape the kernel's default is used, and said to be untuned.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

VERSION = 1
MAX_FILE_BYTES = 16 << 20
MAX_ENTRIES = 10_000
MAX_TRIALS = 1_000  # of one entry
SHIPPED = Path(__file__).parent / "tuned"

Value = int | bool | str | None
Config = Mapping[str, Value]


@dataclass(frozen=True, slots=True)
class Trial:
    """One candidate: its time, or why it has none."""

    config: Config
    time_us: float | None = None
    failed: str | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """One kernel at one shape. `done`: no candidate is left to try."""

    trials: tuple[Trial, ...] = ()
    done: bool = False

    def best(self) -> Trial | None:
        """The fastest; None where every trial failed."""
        timed = [(trial.time_us, i) for i, trial in enumerate(self.trials) if trial.time_us is not None]
        return self.trials[min(timed)[1]] if timed else None

    def tried(self, config: Config) -> bool:
        return any(dict(trial.config) == dict(config) for trial in self.trials)


@dataclass(frozen=True, slots=True)
class Tuned:
    """What one file holds: `entries` by (kernel, shape), `software` the versions that it was measured with."""

    chip: str
    software: Mapping[str, str] = field(default_factory=dict)
    entries: Mapping[tuple[str, str], Entry] = field(default_factory=dict)

    def with_entry(self, kernel: str, shape: str, entry: Entry) -> Tuned:
        return Tuned(self.chip, self.software, {**self.entries, (kernel, shape): entry})


@dataclass(frozen=True, slots=True)
class Choice:
    """A configuration, and whether it was measured to be the best of some on this chip at this shape."""

    config: Config
    tuned: bool


Table = Mapping[tuple[str, str], Config]  # (kernel, shape) -> the configuration to use

EMPTY: Table = MappingProxyType({})


def load_table(chip: str, user_file: Path | None = None, shipped: Path = SHIPPED) -> Table:
    """What is known of this chip; an entry of the user's file replaces the shipped one. Raises ValueError, OSError."""
    found: dict[tuple[str, str], Config] = {}
    for path in (shipped / file_name(chip), user_file):
        if path is None or not path.exists():
            continue
        tuned = read(path)
        if tuned.chip != chip:
            raise ValueError(f"{path}: was measured on {tuned.chip}, and this is {chip}")
        for key, entry in tuned.entries.items():
            best = entry.best()
            if best is not None:
                found[key] = best.config
    return MappingProxyType(found)


def lookup(table: Table, kernel: str, shape: str, default: Config) -> Choice:
    """The measured configuration, or the default. One with other fields than the default's is of another release."""
    config = table.get((kernel, shape))
    if config is None or config.keys() != default.keys():
        return Choice(default, tuned=False)
    return Choice(config, tuned=True)


def file_name(chip: str) -> str:
    """NVIDIA H200 -> nvidia-h200.json."""
    return f"{re.sub('[^a-z0-9]+', '-', chip.lower()).strip('-')}.json"


def shape_key(sizes: Mapping[str, int | str]) -> str:
    """One line for a file: the values in the order given, the names of numbers before them."""
    return " ".join(value if isinstance(value, str) else f"{name}{value}" for name, value in sizes.items())


def row_class(rows: int) -> int:
    """Batches that share a configuration: 1, 2 to 8, 9 to 64, more."""
    return next((most for most in (1, 8, 64) if rows <= most), 256)


def decode_shape(q_type: str, kv_type: str, heads: int, kv_heads: int, head_dim: int, page: int, m: int, r: int) -> str:
    """Of decode_attention: M query tokens of each of R rows. The types are torch's names."""
    sizes = {"H": heads, "K": kv_heads, "D": head_dim, "P": page, "M": m, "R": row_class(r)}
    return shape_key({"q": q_type, "kv": kv_type, **sizes})


def prefill_shape(q_type: str, kv_type: str, heads: int, kv_heads: int, head_dim: int, page: int) -> str:
    """Of prefill_attention."""
    return shape_key({"q": q_type, "kv": kv_type, "H": heads, "K": kv_heads, "D": head_dim, "P": page})


def read(path: Path) -> Tuned:
    """Raises ValueError, naming the file and what is wrong in it, and OSError."""
    with path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"{path}: is over {MAX_FILE_BYTES} bytes")
    try:
        return _tuned(json.loads(data))
    except RecursionError as error:
        raise ValueError(f"{path}: nested too deep") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write(path: Path, tuned: Tuned) -> None:
    """At once or not at all: whoever reads or is interrupted finds the old file or the new one."""
    entries = [
        {
            "kernel": kernel, "shape": shape, "done": entry.done, "trials": [_trial_fields(t) for t in entry.trials],
        } for (kernel, shape), entry in sorted(tuned.entries.items())
    ]  # fmt: skip
    fields = {"version": VERSION, "chip": tuned.chip, "software": dict(tuned.software), "entries": entries}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def _trial_fields(trial: Trial) -> dict[str, Any]:
    if trial.time_us is None:
        return {"config": dict(trial.config), "failed": trial.failed}
    return {"config": dict(trial.config), "time_us": trial.time_us}


def _tuned(value: object) -> Tuned:
    fields = _fields(value, "the file", {"version", "chip", "software", "entries"})
    if fields["version"] != VERSION:
        raise ValueError(f"version is {fields['version']!r}, and this release reads {VERSION}")
    software = fields["software"]
    if not isinstance(software, dict) or not all(isinstance(version, str) for version in software.values()):
        raise ValueError(f"software must map names to versions, got {software!r}")
    entries: dict[tuple[str, str], Entry] = {}
    for item in _list(fields["entries"], "entries", MAX_ENTRIES):
        entry = _fields(item, "an entry", {"kernel", "shape", "done", "trials"})
        key = (_text(entry["kernel"], "kernel"), _text(entry["shape"], "shape"))
        if key in entries:
            raise ValueError(f"{key} is there twice")
        if not isinstance(entry["done"], bool):
            raise ValueError(f"done must be true or false, got {entry['done']!r}")
        trials = tuple(_trial(trial) for trial in _list(entry["trials"], "trials", MAX_TRIALS))
        entries[key] = Entry(trials, entry["done"])
    return Tuned(_text(fields["chip"], "chip"), software, entries)


def _trial(value: object) -> Trial:
    if isinstance(value, dict) and "failed" in value:
        fields = _fields(value, "a trial", {"config", "failed"})
        return Trial(_config(fields["config"]), failed=_text(fields["failed"], "failed"))
    fields = _fields(value, "a trial", {"config", "time_us"})
    time_us = fields["time_us"]
    if isinstance(time_us, bool) or not isinstance(time_us, int | float) or not (0 < time_us < math.inf):
        raise ValueError(f"time_us must be above 0, got {time_us!r}")
    return Trial(_config(fields["config"]), time_us=float(time_us))


def _config(value: object) -> Config:
    if not isinstance(value, dict) or not all(item is None or isinstance(item, int | str) for item in value.values()):
        raise ValueError(f"a config must map names to numbers, words, true, false or null, got {value!r}")
    return MappingProxyType(value)


def _fields(value: object, what: str, names: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict) or value.keys() != names:
        found = sorted(value) if isinstance(value, dict) else value
        raise ValueError(f"{what} must have the fields {sorted(names)}, got {found!r}")
    return value


def _list(value: object, what: str, most: int) -> Iterable[object]:
    if not isinstance(value, list) or len(value) > most:
        raise ValueError(f"{what} must be a list of at most {most}")
    return value


def _text(value: object, what: str) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{what} must be a text, got {value!r}")
    return value
