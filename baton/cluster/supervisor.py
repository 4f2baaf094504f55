"""The one child process of a replica: awaited until it is ready, listened to, told to drain, its end noticed."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import baton
from baton.children import Child, Hooks
from baton.reports import Report
from core.clock import Clock
from core.errors import StartupError, WorkerLost

log = logging.getLogger(__name__)

LAST_LINES = 5  # of the log, for the message when it does not start
STALE_S = 5.0  # signals come twice a second; older ones say nothing about now


class Supervisor:
    """Restarts nothing: when the child has ended the replica is over, and Serve starts another one."""

    def __init__(self, name: str, command: str, flags: Sequence[str], env: Mapping[str, str], clock: Clock) -> None:
        self._child = Child(name, command, flags, child_env(env), Hooks(self._heard, self._said, _nothing))
        self._clock = clock
        self._ready: asyncio.Event = asyncio.Event()
        self._failure = ""
        self._lines: deque[str] = deque(maxlen=LAST_LINES)
        self._numbers: dict[str, float] = {}
        self._heard_s = float("-inf")
        self._life: asyncio.Task[int] | None = None
        self._stopping = False
        self.endpoint = ""

    async def start(self, within_s: float, on_end: Callable[[int], None]) -> None:
        """Returns when the child is ready. `on_end` is called with its exit code if it ends unasked after that.

        Raises StartupError with what the child says of its failure.
        """
        self._life = asyncio.create_task(self._child.live(), name="child")
        ready = asyncio.create_task(self._ready.wait())
        await asyncio.wait({self._life, ready}, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if not self._ready.is_set():
            why = self._failure or ("" if self._life.done() else f"not ready within {within_s:g} s")
            await self.stop(0.0)
            raise StartupError(f"{self._child.name}: {why or self._ended_so(self._life.result())}")
        self._life.add_done_callback(lambda life: self._ended(life, on_end))

    @property
    def numbers(self) -> dict[str, float]:
        """The newest signals; empty when there are none from the last seconds."""
        return dict(self._numbers) if self._clock() - self._heard_s < STALE_S else {}

    @property
    def pid(self) -> int | None:
        return self._child.pid

    def check(self) -> None:
        """Raises WorkerLost when the process has ended."""
        if self._life is None or self._life.done():
            raise WorkerLost(f"the process of {self._child.name} has ended")

    async def stop(self, grace_s: float) -> None:
        """SIGTERM: the child drains. SIGKILL when `grace_s` have passed."""
        self._stopping = True
        await self._child.stop(grace_s)
        if self._life is not None:
            await asyncio.wait({self._life})

    def _ended(self, life: asyncio.Task[int], on_end: Callable[[int], None]) -> None:
        if not self._stopping and not life.cancelled():
            on_end(life.result())

    def _ended_so(self, code: int) -> str:
        return "\n".join((f"ended with code {code}; its last words:", *self._lines))

    def _said(self, _: str, line: str) -> None:
        """Into the replica's own log, which Ray keeps."""
        self._lines.append(line)
        print(line, file=sys.stderr, flush=True)

    def _heard(self, _: str, report: Report) -> None:
        if report.what == "ready":
            self.endpoint = report.endpoint
            self._ready.set()
        elif report.what == "failed":
            self._failure = report.message
        elif report.what == "signals":
            self._numbers, self._heard_s = report.numbers, self._clock()


def child_env(more: Mapping[str, str]) -> dict[str, str]:
    """Ours, with the place where this package lies: the child has another working directory than who installed it."""
    here = str(Path(baton.__file__).resolve().parents[1])
    paths = [here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    quiet = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "20000", "PYTHONUNBUFFERED": "1"}  # see baton/serve.py
    return {**os.environ, **quiet, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), **more}


def _nothing(_name: str, _code: int, _was_ready: bool) -> None:
    """Nobody restarts it."""
