"""What a contender's two processes are told on stdin, and say on stdout: one JSON object a line.

Foreign libraries print what they like: our lines begin with a mark. A process dies with the one that started it, even
when it is stopped.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import signal
import sys
from collections.abc import Mapping
from typing import Protocol

MARK = "@baton "
PR_SET_PDEATHSIG = 1  # linux/prctl.h

Words = Mapping[str, object]


class End(Protocol):
    """One of the two processes. Each needs what the other says in `hello`; the receiver is told to move."""

    async def hello(self) -> str: ...

    async def meet(self, hello: str) -> None: ...

    async def move(self, total_bytes: int, how: str) -> tuple[int, float, int]:
        """(bytes moved, seconds, pages that were wrong afterwards). `how`: for contenders that have a choice."""
        ...

    async def close(self) -> None: ...


def say(words: Words) -> None:
    print(MARK + json.dumps(words), flush=True)


def heard(line: str) -> Words | None:
    """What the line says, when it is one of ours."""
    if not line.startswith(MARK):
        return None
    found: Words = json.loads(line.removeprefix(MARK))
    return found


async def obey(end: End) -> None:
    """Do what comes on stdin until it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    try:
        say({"hello": await end.hello()})
        while line := await asyncio.to_thread(sys.stdin.readline):
            order = json.loads(line)
            if "meet" in order:
                await end.meet(order["meet"])
                say({"met": True})
            else:
                moved, seconds, wrong = await end.move(order["move"], order["how"])
                say({"bytes": moved, "seconds": seconds, "wrong": wrong})
    finally:
        await end.close()
