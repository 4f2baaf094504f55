"""How much memory this process may still take: what the machine has, and what the container allows."""

from __future__ import annotations

from pathlib import Path

CGROUPS = (  # (limit, usage, statistics, the page cache in them that the kernel drops before it refuses memory)
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def available_bytes(meminfo: Path = Path("/proc/meminfo"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """The least of what the machine and each control group leave."""
    machine = _table(meminfo)["MemAvailable:"] * 1024
    return max(0, min([machine, *(left for files in CGROUPS if (left := _left(cgroups, files)) is not None)]))


def _left(cgroups: Path, files: tuple[str, str, str, str]) -> int | None:
    """None where there is no such group, or no limit in it ("max")."""
    limit, usage, statistics, droppable = files
    try:
        allowed = (cgroups / limit).read_text().strip()
        if not allowed.isdecimal():
            return None
        used = int((cgroups / usage).read_text())
        return int(allowed) - used + _table(cgroups / statistics).get(droppable, 0)
    except OSError:
        return None


def _table(path: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    rows = (line.split() for line in path.read_text().splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}
