"""A picture of runs: for each traffic and tier, workers wanted and ready over what the traffic takes. Plain SVG."""

from __future__ import annotations

from collections.abc import Sequence

from bench.scaling.contest import Row
from bench.scaling.machine import Machine, Slo
from bench.scaling.sizing import demand

WIDE, HIGH, LEFT, TOP, GAP = 300, 130, 46, 54, 52
TIERS = ("prefill", "decode")
DEMAND, DESIRED, READY = "#c9d3dd", "#c2410c", "#1d4ed8"
STEP_S = 5  # a point every so often

Points = list[tuple[float, float]]


def picture(rows: Sequence[Row], machine: Machine, slo: Slo) -> str:
    """A column for each row of the contest, a panel for each tier."""
    width = LEFT + len(rows) * (WIDE + GAP)
    height = TOP + 2 * (HIGH + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif"'
        ' font-size="11">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        *_legend(),
    ]
    for column, row in enumerate(rows):
        needed = demand(row.course.traffic, machine, slo, 15.0)
        for tier in (0, 1):
            x, y = LEFT + column * (WIDE + GAP), TOP + tier * (HIGH + GAP)
            parts += _panel(row, tier, needed[tier], x, y)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _legend() -> list[str]:
    names = ((DEMAND, "what the traffic takes"), (DESIRED, "desired"), (READY, "ready"))
    parts = []
    for n, (colour, name) in enumerate(names):
        x = LEFT + 160 * n
        parts.append(f'<rect x="{x}" y="10" width="14" height="8" fill="{colour}"/>')
        parts.append(f'<text x="{x + 20}" y="18">{name}</text>')
    return parts


def _panel(row: Row, tier: int, needed: list[float], x: int, y: int) -> list[str]:
    for_s, window_s = row.course.traffic.for_s, row.course.traffic.for_s / len(needed)
    moments = row.course.moments[::STEP_S]
    desired = [(m.seen.now_s, float(m.decisions[tier].desired)) for m in moments]
    ready = [(m.seen.now_s, float((m.seen.prefill, m.seen.decode)[tier].ready)) for m in moments]
    most = max([*needed, *(n for _, n in desired), 1.0])
    taken = [(n * window_s, value) for n, value in enumerate(needed)]

    def line(points: Points) -> str:
        return " ".join(f"{x + WIDE * at / for_s:.1f},{y + HIGH * (1 - n / most):.1f}" for at, n in points)

    area = line([(0.0, 0.0), *_stepped(taken, for_s), (for_s, 0.0)])
    return [
        f'<polygon points="{area}" fill="{DEMAND}"/>',
        f'<polyline points="{line(_stepped(desired, for_s))}" fill="none" stroke="{DESIRED}" stroke-width="1.6"/>',
        f'<polyline points="{line(_stepped(ready, for_s))}" fill="none" stroke="{READY}" stroke-width="1.1"/>',
        f'<path d="M{x} {y}v{HIGH}h{WIDE}" fill="none" stroke="#334155"/>',
        f'<text x="{x}" y="{y - 8}" font-weight="bold">{row.traffic}: {TIERS[tier]} workers</text>',
        f'<text x="{x - 6}" y="{y + 4}" text-anchor="end">{most:.0f}</text>',
        f'<text x="{x - 6}" y="{y + HIGH}" text-anchor="end">0</text>',
        f'<text x="{x + WIDE}" y="{y + HIGH + 16}" text-anchor="end">{for_s / 60:.0f} min</text>',
    ]


def _stepped(points: Points, until_s: float) -> Points:
    """Each value holds until the next one; points on a level are left out."""
    kept: Points = []
    for at_s, value in points:
        if not kept or value != kept[-1][1]:
            kept += [(at_s, kept[-1][1]), (at_s, value)] if kept else [(at_s, value)]
    return [*kept, (until_s, kept[-1][1])] if kept else []
