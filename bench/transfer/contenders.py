"""A contender's two processes, as the benchmark sees them: started, met, paused while others run, stopped.

What waits must not disturb what runs, and some contenders poll: whoever has no turn is stopped by a signal.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from bench.transfer.orders import Words, heard

ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE_S = 120.0  # for one answer
ROLES = ("receiver", "source")


class Failed(Exception):
    """Why a contender has no figure: what its row says."""


@dataclass(frozen=True, slots=True)
class Contender:
    """How to start it. `how` is passed on to its receiver with each order."""

    name: str
    command: tuple[str, ...]  # role, page bytes and pool bytes follow
    how: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    roles: tuple[str, ...] = ROLES

    @classmethod
    def own(cls, name: str) -> Contender:
        """One that needs nothing but Baton's own environment."""
        roles = ROLES[:1] if name == "memcpy" else ROLES
        return cls(name, (sys.executable, "-m", "bench.transfer.ends", name), roles=roles)

    @property
    def settings(self) -> str:
        """What was chosen for it, in words."""
        return " ".join([*(f"{name}={value}" for name, value in self.environment.items()), self.how]).strip()


class Running:
    """Use as `async with`: on leaving, both processes are gone."""

    def __init__(self, contender: Contender, page_bytes: int, pool_bytes: int) -> None:
        self.contender = contender
        self._sizes = (str(page_bytes), str(pool_bytes))
        self._processes: list[asyncio.subprocess.Process] = []
        self._errors: list[IO[str]] = []

    async def __aenter__(self) -> Running:
        try:
            for role in self.contender.roles:
                await self._start(role)
            hellos = [(await self._answer(index))["hello"] for index in range(len(self._processes))]
            for index, hello in enumerate(reversed(hellos)):
                await self._order(index, {"meet": hello})
        except BaseException:
            await self.__aexit__()
            raise
        self.pause()
        return self

    async def _start(self, role: str) -> None:
        errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed when the contender leaves
        self._errors.append(errors)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("UCX_")}
        process = await asyncio.create_subprocess_exec(
            *self.contender.command, role, *self._sizes, cwd=ROOT, env=inherited | dict(self.contender.environment),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
        )  # fmt: skip
        self._processes.append(process)

    async def move(self, total_bytes: int) -> float:
        """GB/s of one run. Raises Failed."""
        self._signal(signal.SIGCONT)
        said = await self._order(0, {"move": total_bytes, "how": self.contender.how})
        self.pause()
        moved, seconds, wrong = said["bytes"], said["seconds"], said["wrong"]
        assert isinstance(moved, int) and isinstance(seconds, float)
        if wrong:
            raise Failed(f"{wrong} pages were not what they should be")
        return moved / seconds / 1e9

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    async def _order(self, index: int, words: Words) -> Words:
        process = self._processes[index]
        assert process.stdin is not None
        process.stdin.write(json.dumps(words).encode() + b"\n")
        return await self._answer(index)

    async def _answer(self, index: int) -> Words:
        process = self._processes[index]
        assert process.stdout is not None
        try:
            async with asyncio.timeout(PATIENCE_S):
                while line := await process.stdout.readline():
                    if (words := heard(line.decode())) is not None:
                        return words
        except TimeoutError as error:
            raise Failed(f"no answer in {PATIENCE_S:.0f} s") from error
        raise Failed(self._last_words(index))

    def _last_words(self, index: int) -> str:
        self._errors[index].seek(0)
        lines = self._errors[index].read().strip().splitlines() or ["ended without a word"]
        return lines[-1]

    def _signal(self, number: signal.Signals) -> None:
        for process in self._alive():
            process.send_signal(number)

    def _alive(self) -> Iterator[asyncio.subprocess.Process]:
        return (process for process in self._processes if process.returncode is None)

    async def __aexit__(self, *_: object) -> None:
        self._signal(signal.SIGKILL)
        for process in self._processes:
            await process.communicate()
        for errors in self._errors:
            errors.close()

