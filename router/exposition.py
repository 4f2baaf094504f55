"""The metrics of several processes as one page: each family once, with the samples of all.

Prometheus refuses a page that names a family twice, and the router's page shows its workers' too.
"""

from __future__ import annotations

from collections.abc import Iterable

SUFFIXES = ("_bucket", "_sum", "_count", "_total", "_created", "_info")


def merge(pages: Iterable[str]) -> str:
    """One page of the text format. The first page's HELP and TYPE stand for all; equal series are kept once."""
    heads: dict[str, list[str]] = {}  # family -> its comment lines
    samples: dict[str, dict[str, str]] = {}  # family -> series -> line
    for page in pages:
        _read(page, heads, samples)
    lines = []
    for family, series in samples.items():
        lines += heads.get(family, [])
        lines += series.values()
    return "\n".join(lines) + "\n" if lines else ""


def _read(page: str, heads: dict[str, list[str]], samples: dict[str, dict[str, str]]) -> None:
    known = set(heads)
    for line in page.splitlines():
        if line.startswith("#"):
            words = line.split(" ", 3)
            if len(words) > 2 and words[1] in ("HELP", "TYPE"):
                family = words[2]
                samples.setdefault(family, {})
                if family not in known:
                    heads.setdefault(family, []).append(line)
        elif line.strip():
            series = line.rpartition(" ")[0]
            samples.setdefault(_family(series, heads), {}).setdefault(series, line)


def _family(series: str, heads: dict[str, list[str]]) -> str:
    name = series.partition("{")[0].partition(" ")[0]
    if name in heads:
        return name
    for suffix in SUFFIXES:
        stem = name.removesuffix(suffix)
        if stem != name and stem in heads:
            return stem
    return name
