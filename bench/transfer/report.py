"""What is made of the runs: the rows, the table, and whether each target is met."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.transfer.rounds import Measured


@dataclass(frozen=True, slots=True)
class Row:
    """One transport beside one baseline. Rates are medians, None where there is none: `note` says why."""

    transport: str
    page_bytes: int
    gb_per_s: float | None
    baseline: str
    baseline_gb_per_s: float | None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        if self.gb_per_s is None or not self.baseline_gb_per_s:
            return None
        return self.gb_per_s / self.baseline_gb_per_s

    def as_json(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Target:
    transport: str
    baseline: str
    ratio: float
    from_bytes: int  # for pages of this size and larger


TARGETS = (
    Target("shm-no-digest", "memcpy", 0.8, 256 << 10),
    Target("shm", "memcpy", 0.6, 256 << 10),
    Target("ucx", "socket", 1.0, 512 << 10),
    Target("ucx", "nixl", 2.0, 512 << 10),
    Target("ucx", "nixl-best", 1.2, 512 << 10),
)


def rows_of(
    measured: Mapping[int, Mapping[str, Measured]], transports: list[str], baselines: list[str]
) -> list[Row]:
    """One for each transport, page size and baseline."""
    rows = []
    for transport in transports:
        for page_bytes, by_name in measured.items():
            for baseline in baselines:
                ours, theirs = by_name[transport], by_name[baseline]
                notes = [f"{name}: {one.note}" for name, one in ((transport, ours), (baseline, theirs)) if one.note]
                row = Row(transport, page_bytes, ours.gb_per_s, baseline, theirs.gb_per_s, "; ".join(notes))
                rows.append(row)
    return rows


def table(rows: list[Row]) -> str:
    lines = ["| transport | page | GB/s | baseline | GB/s | ratio | note |", "|---" * 7 + "|"]
    for row in rows:
        cells = [row.transport, size_text(row.page_bytes), rate_text(row.gb_per_s), row.baseline,
                 rate_text(row.baseline_gb_per_s), rate_text(row.ratio), row.note]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def verdicts(rows: list[Row]) -> Iterator[str]:
    """For each target, its worst page size."""
    for target in TARGETS:
        mine = [row for row in rows if (row.transport, row.baseline) == (target.transport, target.baseline)]
        mine = [row for row in mine if row.page_bytes >= target.from_bytes]
        if not mine:
            continue
        goal = f"{target.transport} at least {target.ratio} of {target.baseline} from {size_text(target.from_bytes)}"
        known = [(row.ratio, row) for row in mine if row.ratio is not None]
        if len(known) < len(mine):
            yield f"{goal}: not measured"
            continue
        ratio, row = min(known, key=lambda pair: pair[0])
        yield f"{goal}: {'met' if ratio >= target.ratio else 'MISSED'}, {ratio:.2f} at {size_text(row.page_bytes)}"


def rate_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def size_text(size: int) -> str:
    return f"{size >> 20} MiB" if size % (1 << 20) == 0 else f"{size >> 10} KiB"


def machine() -> str:
    """In words, with how busy it was: figures of a busy machine mean little."""
    models = {
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    }
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    cpus = f"{os.cpu_count()} cores of {' and '.join(sorted(models)) or platform.machine()}, {memory:.0f} GiB"
    return f"{cpus}, Linux {platform.release()}, Python {platform.python_version()}"
