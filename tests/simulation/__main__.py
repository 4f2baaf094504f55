"""Plays schedules: `python -m tests.simulation --minutes 3`, or one again: `python -m tests.simulation --seed 7`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import secrets
import sys
import time
from collections import Counter

from tqdm import tqdm

from tests.simulation.many import cores, play_many, play_safely, play_share, replay
from tests.simulation.schedule import Outcome

SHOWN_FAILURES = 20


def main() -> int:
    options = _options()
    kinds = [] if options.no_faults else options.fault
    if options.share is not None:
        first, step, number = options.share
        play_share(first, step, None if number < 0 else number, kinds)
        return 0
    if options.seed is not None:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
        outcome = play_safely(options.seed, kinds)
        print(outcome)
        return 1 if outcome.violations else 0
    return asyncio.run(_many(options, kinds))


async def _many(options: argparse.Namespace, kinds: list[str] | None) -> int:
    first = options.first if options.first is not None else secrets.randbelow(2**31)
    seconds = None if options.seeds is not None else options.minutes * 60.0
    until = f"{options.seeds} seeds" if options.seeds is not None else f"{options.minutes:g} minutes"
    print(f"simulating {until} on {options.jobs} cores, first seed {first}", flush=True)
    began_s, summary, failed = time.monotonic(), Summary(), []
    # Without a terminal, a line now and then.
    style = {} if sys.stderr.isatty() else {"mininterval": 20.0, "bar_format": "{n_fmt} schedules, {rate_fmt}\n"}
    with tqdm(total=options.seeds, unit=" schedules", **style) as bar:
        async for outcome in play_many(first, seeds=options.seeds, seconds=seconds, kinds=kinds, jobs=options.jobs):
            summary.add(outcome)
            bar.update()
            if outcome.violations:
                failed.append(outcome)
                bar.write(f"seed {outcome.seed}: {outcome.violations[0]}", file=sys.stdout)
                bar.write(f"    {replay(outcome, kinds)}", file=sys.stdout)
            if len(failed) >= SHOWN_FAILURES:
                bar.write(f"{SHOWN_FAILURES} seeds have failed: that is enough", file=sys.stdout)
                break
    print(summary.text(time.monotonic() - began_s))
    return 1 if failed or not summary.schedules else 0


class Summary:
    """Of many schedules."""

    def __init__(self) -> None:
        self.schedules = self.failed = self.right = self.left = self.retries = self.messages = 0
        self.errors: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.virtual_s = 0.0

    def add(self, outcome: Outcome) -> None:
        self.schedules += 1
        self.failed += bool(outcome.violations)
        self.right += outcome.right
        self.left += outcome.left
        self.retries += outcome.retries
        self.messages += outcome.messages
        self.virtual_s += outcome.virtual_s
        self.errors.update(outcome.errors)
        self.faults.update(outcome.faults)

    def text(self, took_s: float) -> str:
        requests = self.right + self.left + self.errors.total()
        errors = ", ".join(f"{count} {code}" for code, count in self.errors.most_common()) or "none"
        faults = ", ".join(f"{count} {kind}" for kind, count in self.faults.most_common())
        rate = self.schedules / took_s * 60
        return "\n".join(
            [
                f"{self.schedules} schedules in {took_s:.0f} s ({rate:.0f} a minute), {self.virtual_s / 3600:.1f} h of "
                f"cluster time, {self.messages} messages",
                f"faults: {faults}",
                f"requests: {requests}; right {self.right}; clear errors: {errors}; clients that left {self.left}; "
                f"retries {self.retries}",
                f"schedules in which an invariant was broken: {self.failed}",
            ]
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--minutes", type=float, default=3.0, help="how long to go on (default 3)")
    parser.add_argument("--seeds", type=int, help="how many schedules, instead of a time")
    parser.add_argument("--first", type=int, help="the first seed; a fresh one is drawn otherwise")
    parser.add_argument("--jobs", type=int, default=cores(), help="processes (default: all cores)")
    parser.add_argument("--seed", type=int, help="play this one, with what it logs")
    parser.add_argument("--fault", action="append", help="this kind of fault, instead of what the seed draws")
    parser.add_argument("--no-faults", action="store_true")
    parser.add_argument("--share", type=int, nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
