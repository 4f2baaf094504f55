"""The alternating runs: every contender is up, one has its turn, and the order is turned round each time."""

from __future__ import annotations

import statistics
import sys
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from bench.transfer.contenders import Contender, Failed, Running

TRIALS = 2  # short runs of each setting


@dataclass(frozen=True, slots=True)
class Plan:
    rounds: int
    run_bytes: int  # of one run
    pool_bytes: int  # of each pool; well above the caches


@dataclass(slots=True)
class Measured:
    """Runs in GB/s, or why there are none."""

    runs: list[float] = field(default_factory=list)
    note: str = ""
    failed: bool = False

    @property
    def gb_per_s(self) -> float | None:
        return None if not self.runs or self.failed else statistics.median(self.runs)

    def fail(self, why: str) -> None:
        self.failed, self.note = True, why


async def measure(choices: dict[str, list[Contender]], page_bytes: int, plan: Plan) -> dict[str, Measured]:
    """By name. Of several settings under one name, the best in a short trial is measured."""
    measured = {name: Measured() for name in choices}
    async with AsyncExitStack() as stack:
        running: dict[str, Running] = {}
        for name, settings in choices.items():
            try:
                contender = settings[0] if len(settings) == 1 else await best_of(settings, page_bytes, plan)
                measured[name].note = contender.settings
                running[name] = await stack.enter_async_context(Running(contender, page_bytes, plan.pool_bytes))
                await running[name].move(plan.pool_bytes)  # maps, connects, faults in
            except Failed as error:
                measured[name].fail(str(error))
                running.pop(name, None)
        await take_turns(running, measured, page_bytes, plan)
    return measured


async def take_turns(
    running: dict[str, Running], measured: dict[str, Measured], page_bytes: int, plan: Plan
) -> None:
    for number in range(plan.rounds):
        for name in list(running) if number % 2 == 0 else list(reversed(running)):
            try:
                rate = await running[name].move(plan.run_bytes)
            except Failed as error:
                measured[name].fail(str(error))
                del running[name]
                continue
            measured[name].runs.append(rate)
            print(f"{page_bytes >> 10} KiB, round {number + 1}, {name}: {rate:.2f} GB/s", file=sys.stderr)


async def best_of(settings: list[Contender], page_bytes: int, plan: Plan) -> Contender:
    """Raises the last Failed when none of them runs."""
    rates: list[tuple[float, Contender]] = []
    failed = Failed("no settings")
    for contender in settings:
        try:
            async with Running(contender, page_bytes, plan.pool_bytes) as one:
                await one.move(plan.pool_bytes)
                best = max([await one.move(plan.run_bytes // 4) for _ in range(TRIALS)])
                rates.append((best, contender))
        except Failed as error:
            failed = error
    if not rates:
        raise failed
    return max(rates, key=lambda pair: pair[0])[1]
