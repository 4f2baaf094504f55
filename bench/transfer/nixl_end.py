"""The two processes of the NIXL contender. Runs in the environment that `nixl_environment.py` makes.

    ENVIRONMENT/bin/python -m bench.transfer.nixl_end PROGRESS ROLE PAGE_BYTES POOL_BYTES

Pages are descriptors that are prepared once; a request names them by index, as an engine would. `how` is READ (the
receiver pulls) or WRITE (it pushes: bytes then move the other way, between equal pools). PROGRESS is `threaded`, NIXL's
default, or `polled`: the receiver has no progress thread and asks without a pause. The source always has one.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import nixl_cu12._api as nixl  # type: ignore[import-not-found]
import numpy as np

from bench.transfer.orders import obey
from bench.transfer.pools import IN_FLIGHT, Pair, fill, make_pool, walk, wrong_pages
from kvtransfer.frames import Frames

PAUSE_S = 0.00005  # between two looks: without it, looking takes the core that the progress thread needs


class NixlEnd:
    def __init__(self, role: str, frames: Frames, *, polled: bool) -> None:
        self._frames = frames
        self._pause_s = 0.0 if polled else PAUSE_S
        self._address = int(np.frombuffer(frames.buffer, np.uint8).ctypes.data)
        threaded = role == "source" or not polled
        self._agent = nixl.nixl_agent(role, nixl.nixl_agent_config(enable_prog_thread=threaded, backends=["UCX"]))
        self._memory = self._agent.register_memory([(self._address, len(frames.buffer), 0, "")], "DRAM")

    async def hello(self) -> str:
        return json.dumps({"agent": self._agent.get_agent_metadata().hex(), "address": self._address})

    async def meet(self, hello: str) -> None:
        words = json.loads(hello)
        peer = self._agent.add_remote_agent(bytes.fromhex(words["agent"]))
        self._local = self._agent.prep_xfer_dlist("NIXL_INIT_AGENT", self._descriptors(self._address), "DRAM")
        self._remote = self._agent.prep_xfer_dlist(peer, self._descriptors(words["address"]), "DRAM")

    def _descriptors(self, address: int) -> list[tuple[int, int, int]]:
        size = self._frames.layout.page_bytes
        return [(address + page * size, size, 0) for page in range(self._frames.pages)]

    async def move(self, total_bytes: int, how: str) -> tuple[int, float, int]:
        size = self._frames.layout.page_bytes
        batches = list(walk(self._frames.pages, size, total_bytes))
        running: list[object] = []
        began_s = time.perf_counter()
        for pairs in batches:
            if len(running) == IN_FLIGHT:
                self._finish(running.pop(0))
            running.append(self._start(pairs, how))
        for handle in running:
            self._finish(handle)
        seconds = time.perf_counter() - began_s
        wrong = wrong_pages(self._frames, batches[-1]) if how == "READ" else 0
        return sum(map(len, batches)) * size, seconds, wrong

    def _start(self, pairs: list[Pair], how: str) -> object:
        theirs, ours = [source for source, _ in pairs], [target for _, target in pairs]
        handle = self._agent.make_prepped_xfer(how, self._local, ours, self._remote, theirs)
        if self._agent.transfer(handle) == "ERR":
            raise RuntimeError("the transfer was refused")
        return handle

    def _finish(self, handle: object) -> None:
        while (state := self._agent.check_xfer_state(handle)) == "PROC":
            if self._pause_s:
                time.sleep(self._pause_s)
        if state != "DONE":
            raise RuntimeError(f"the transfer ended as {state}")
        self._agent.release_xfer_handle(handle)

    async def close(self) -> None: ...


def main() -> None:
    progress, role, page_bytes, pool_bytes = sys.argv[1:]
    frames = make_pool(int(page_bytes), int(pool_bytes))
    if role == "source":
        fill(frames)
    asyncio.run(obey(NixlEnd(role, frames, polled=progress == "polled")))


if __name__ == "__main__":
    main()
