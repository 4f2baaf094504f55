"""The table of docs/reliability.md: each kind of fault alone, at random moments of many runs, and all of them together.

`python -m tests.simulation.table` prints its rows; `--write` puts it into the page, between its two marks.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from statistics import median

from tqdm import tqdm

from tests.simulation.faults import FAULTS
from tests.simulation.many import ROOT, cores, play_many
from tests.simulation.schedule import Outcome

PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- simulated: begin -->", "<!-- simulated: end -->"
HEAD = (
    "| fault | where it is injected | runs | survived | requests | right | clear error | left | lost | wrong | leaked "
    "| to recover, median | p99 |"
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.table", description=__doc__)
    parser.add_argument("--runs", type=int, default=300, help="of each kind of fault")
    parser.add_argument("--together", type=int, default=3000, help="runs with two to six faults")
    parser.add_argument("--first", type=int, default=0, help="the first seed of each row")
    parser.add_argument("--jobs", type=int, default=cores())
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.relative_to(ROOT)}")
    options = parser.parse_args()
    text = asyncio.run(_table(options))
    if options.write:
        write(text)
    return 0


async def _table(options: argparse.Namespace) -> str:
    rows = ["", HEAD, "|---" * HEAD.count(" | ") + "|---|"]
    plan: list[tuple[str, str, Sequence[str] | None, int]] = [("none", "", [], options.runs)]
    plan += [(kind, fault.where, [kind], options.runs) for kind, fault in FAULTS.items()]
    plan += [("poison request", "a request that kills whoever computes it", ["poison"], options.runs)]
    plan += [("two to six together", "any of the above, pools of two sizes", None, options.together)]
    for name, where, kinds, runs in tqdm(plan, unit=" rows"):
        outcomes = [
            outcome
            async for outcome in play_many(options.first, seeds=runs, seconds=None, kinds=kinds, jobs=options.jobs)
        ]
        rows.append(row(name, where, outcomes))
        tqdm.write(rows[-1])
    return "\n".join(rows)


def row(name: str, where: str, outcomes: Sequence[Outcome]) -> str:
    """`lost`: ended twice, never, late or without a clear error (I1, I4). `wrong`: I2 and I5. `leaked`: I3."""
    broken = [{violation[:2] for violation in outcome.violations} for outcome in outcomes]
    silences = sorted(outcome.silence_s for outcome in outcomes)
    cells = [
        name,
        where,
        len(outcomes),
        sum(not outcome.violations for outcome in outcomes),
        sum(outcome.requests for outcome in outcomes),
        sum(outcome.right for outcome in outcomes),
        sum(sum(outcome.errors.values()) for outcome in outcomes),
        sum(outcome.left for outcome in outcomes),
        sum(bool(names & {"I1", "I4"}) for names in broken),
        sum(bool(names & {"I2", "I5"}) for names in broken),
        sum("I3" in names for names in broken),
        f"{median(silences):.2f} s",
        f"{silences[int(0.99 * (len(silences) - 1))]:.2f} s",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def write(text: str) -> None:
    page = PAGE.read_text()
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n\n{END}{after}")


if __name__ == "__main__":
    sys.exit(main())
