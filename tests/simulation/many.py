"""Many schedules on many cores: each child process plays its share of the seeds and prints one line for each."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from itertools import count
from pathlib import Path

from tests.simulation.schedule import Outcome, play

ROOT = Path(__file__).resolve().parents[2]
STUCK_S = 120.0  # of real time for one schedule: it hangs
COLLECT_EVERY = 50  # schedules: between them nothing is searched for garbage


def cores() -> int:
    return len(os.sched_getaffinity(0))


def replay(outcome: Outcome, kinds: Sequence[str] | None = None) -> str:
    """The command that plays one schedule again."""
    faults = "".join(f" --fault {kind!r}" for kind in kinds or ())
    return f"python -m tests.simulation --seed {outcome.seed}{faults}"


def play_safely(seed: int, kinds: Sequence[str] | None = None) -> Outcome:
    """What breaks the schedule itself is an outcome too."""
    try:
        return play(seed, kinds)
    except Exception as error:  # noqa: BLE001  (the other seeds go on)
        return Outcome(seed, violations=[f"broken: {type(error).__name__}: {error}"])


def play_share(first: int, step: int, number: int | None, kinds: Sequence[str] | None) -> None:
    """A child's work: `number` seeds, or for ever; one JSON line each."""
    logging.disable(logging.CRITICAL)
    gc.freeze()
    gc.disable()
    for n in range(number) if number is not None else count():
        outcome = play_safely(first + n * step, kinds)
        sys.stdout.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
        sys.stdout.flush()
        if n % COLLECT_EVERY == COLLECT_EVERY - 1:
            gc.collect()


async def play_many(
    first: int, *, seeds: int | None, seconds: float | None, kinds: Sequence[str] | None = None, jobs: int | None = None
) -> AsyncIterator[Outcome]:
    """The outcomes as they come, until so many seeds have been played or so much time has passed."""
    jobs = jobs or cores()
    lines: asyncio.Queue[Outcome | None] = asyncio.Queue(1024)
    until_s = time.monotonic() + seconds if seconds is not None else None
    children = [asyncio.create_task(_child(first + n, jobs, _share(seeds, jobs, n), kinds, lines)) for n in range(jobs)]
    try:
        running = jobs
        while running:
            left_s = None if until_s is None else until_s - time.monotonic()
            try:
                async with asyncio.timeout(left_s):
                    outcome = await lines.get()
            except TimeoutError:
                return
            if outcome is None:
                running -= 1
            else:
                yield outcome
    finally:
        for child in children:
            child.cancel()
        await asyncio.gather(*children, return_exceptions=True)


def _share(seeds: int | None, jobs: int, n: int) -> int | None:
    return None if seeds is None else len(range(n, seeds, jobs))


async def _child(
    first: int, step: int, number: int | None, kinds: Sequence[str] | None, lines: asyncio.Queue[Outcome | None]
) -> None:
    arguments = ["--share", str(first), str(step), str(number if number is not None else -1)]
    arguments += [part for kind in kinds or () for part in ("--fault", kind)]
    arguments += ["--no-faults"] if kinds is not None and not kinds else []
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.simulation", *arguments, stdout=asyncio.subprocess.PIPE, cwd=ROOT
    )
    assert child.stdout is not None
    seed = first
    try:
        for seed in _seeds(first, step, number):
            async with asyncio.timeout(STUCK_S):
                line = await child.stdout.readline()
            if not line:
                await lines.put(Outcome(seed, violations=["broken: the process has died"]))
                break
            await lines.put(Outcome(**json.loads(line)))
    except TimeoutError:
        await lines.put(Outcome(seed, violations=[f"broken: no end after {STUCK_S:.0f} s"]))
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()
    await lines.put(None)


def _seeds(first: int, step: int, number: int | None) -> Iterator[int]:
    return iter(count(first, step)) if number is None else iter(range(first, first + number * step, step))
