"""An engine in this process, for work without a server: one aggregated worker, its compute thread, its generator."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from baton.backends import backend_of
from baton.composition import Limits, Machine, Model, Worker
from baton.executors import executor_for, frames_for
from baton.loaded_model import LoadedModel, PoolWish, load
from baton.loading import LoadingBar
from baton.local_generator import LocalGenerator
from baton.reports import Report
from core.clock import monotonic_s
from core.messages import Role, WorkerId, WorkerInfo
from engine.batch import Batch, RowResult
from kvtransfer.memory import MemoryFabric, MemoryTransport

NAME = "local"


@dataclass(frozen=True, slots=True)
class EngineWish:
    """What was asked for; 0 leaves it to the model and the machine."""

    dtype: str = "auto"
    pool: PoolWish = field(default_factory=PoolWish)
    threads: int = 0
    step_tokens: int = 512
    backend: str = "auto"
    device: str = "auto"


def load_with_bar(checkpoint: Path, wish: EngineWish, show: bool) -> LoadedModel:
    """Raises CheckpointError, ConfigError and TooLittleMemory."""
    backend = backend_of(wish.backend, wish.device)
    step = (wish.step_tokens, Limits().max_rows)
    if not show:
        return load(checkpoint, wish.dtype, wish.pool, backend=backend, step=step)
    bar = LoadingBar(1)

    def shown(done: int, total: int) -> None:
        bar.report(NAME, _loading(done, total))

    try:
        return load(checkpoint, wish.dtype, wish.pool, shown, backend=backend, step=step)
    finally:
        bar.close()


def _loading(done: int, total: int) -> Report:
    return Report("loading", done, total)


class LocalEngine:
    """`async with` starts the worker and gives its generator; leaving it ends the compute thread and frees the pool."""

    def __init__(self, loaded: LoadedModel, wish: EngineWish) -> None:
        self._loaded = loaded
        self._wish = wish
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> LocalGenerator:
        stack = self._stack
        compute = ThreadPoolExecutor(1, thread_name_prefix="baton-compute")
        stack.callback(compute.shutdown)  # waits for the step in flight
        worker = self._worker(compute)
        generator = LocalGenerator(worker.tier, worker.outlet)
        stack.push_async_callback(worker.stop)
        engine = worker.start()
        engine.add_done_callback(generator.engine_ended)
        for task in (engine, asyncio.create_task(generator.deliver(), name="deliver")):
            stack.push_async_callback(_end, task)
        return generator

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def _worker(self, compute: ThreadPoolExecutor) -> Worker:
        loaded = self._loaded
        frames = frames_for(loaded, shared=False)
        info = WorkerInfo(
            worker=WorkerId(NAME, 1),
            role=Role.AGGREGATED,
            identity=loaded.identity,
            layout=loaded.layout.digest(),
            page_size=loaded.layout.page_size,
            pages_total=loaded.pages,
            max_context_tokens=loaded.max_context_tokens,
            handoff_endpoint="",
        )
        model = Model(loaded.identity, loaded.vocabulary, loaded.max_context_tokens, loaded.end_ids)
        threads = self._wish.threads or len(os.sched_getaffinity(0))
        limits = Limits(step_tokens=self._wish.step_tokens)
        machine = Machine(
            executor=executor_for(loaded, frames, threads, limits.max_rows),
            frames=frames,
            transport=MemoryTransport(info.worker, MemoryFabric(Random(0))),  # an aggregated worker hands nothing off
            clock=monotonic_s,
            random=Random(),
            run_blocking=partial(_compute, compute),
            offload=partial(_offload, compute),
        )
        return Worker(info, model, limits, machine, NAME)


async def _compute(
    compute: ThreadPoolExecutor, call: Callable[[Batch], list[RowResult]], batch: Batch
) -> list[RowResult]:
    return await asyncio.get_running_loop().run_in_executor(compute, call, batch)


async def _offload(compute: ThreadPoolExecutor, call: Callable[[], Any]) -> Any:
    return await asyncio.get_running_loop().run_in_executor(compute, call)


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])
