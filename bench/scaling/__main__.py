"""Baton's scaling policies against fixed sizes and against one policy for both tiers, over a model of a fleet.

    python -m bench.scaling                                  # made traffic, about a minute
    python -m bench.scaling --trace FILE --times 8 --json rows.json --plot picture.svg

A trace is a file of recorded requests (bench/scaling/traffic.py says in which formats); with --times each of them
comes so often, so that the traffic fills a fleet. Figures are from virtual time: they are the same on every machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from bench.scaling.contest import Row, contest
from bench.scaling.machine import Machine, Slo
from bench.scaling.plot import picture
from bench.scaling.traffic import recorded, workloads

HEADINGS = (
    "traffic", "sizes", "began with", "SLO met", "TTFT met", "ITL met", "worker-hours", "prefill + decode",
    "decisions/h", "swings", "taken back",
)  # fmt: skip


def line(row: Row) -> str:
    v = row.verdict
    cells = (
        row.traffic, row.contender, f"{row.start[0]} + {row.start[1]}", f"{v.attainment:.1%}",
        f"{v.first_token_attainment:.1%}", f"{v.gap_attainment:.1%}", f"{v.worker_hours:.1f}",
        f"{v.prefill_hours:.1f} + {v.decode_hours:.1f}", f"{v.decisions_per_h:.0f}", f"{v.swings}", f"{v.taken_back}",
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def main(arguments: list[str] | None = None) -> int:
    """0, or 2 for a trace that cannot be read."""
    args = parse_args(arguments)
    machine, slo = Machine(), Slo()
    traffics = workloads(args.seed)
    try:
        traffics = [t for t in traffics if not args.only or t.name in args.only.split(",")]
        traffics += [recorded(path, args.times, args.seed) for path in args.trace]
    except (OSError, ValueError, KeyError) as error:
        print(f"bench.scaling: {error}", file=sys.stderr)
        return 2
    print("| " + " | ".join(HEADINGS) + " |\n" + "|---" * len(HEADINGS) + "|")
    plain, pictured = [], []
    for row in contest(traffics, machine, slo):
        print(line(row), flush=True)
        plain.append({"traffic": row.traffic, "sizes": row.contender, "start": row.start, **asdict(row.verdict)})
        if row.contender == "Baton" and row.traffic in args.picture.split(","):
            pictured.append(row)
    if args.json:
        args.json.write_text(json.dumps(plain, indent=1) + "\n")
    if args.plot:
        args.plot.write_text(picture(pictured, machine, slo))
    return 0


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", action="append", type=Path, default=[], metavar="FILE", help="recorded traffic, too")
    parser.add_argument("--times", type=int, default=1, help="each recorded request comes so often")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", metavar="NAMES", help="of the made traffic, these only; commas between")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="an SVG of Baton's runs")
    parser.add_argument("--picture", default="burst,sine,shift", metavar="NAMES", help="which runs the plot shows")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
