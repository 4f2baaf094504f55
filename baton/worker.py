"""One worker process: loads its model, faults its pool in, serves routers and peers until it is told to stop.

Three kinds of threads. The event loop's (control, sessions, the pool's bookkeeping); the compute thread with torch's
own under it, the only ones whose priority is lowered; and the transport's copying thread.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import secrets
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any, NoReturn, TypeVar

import setproctitle
import uvloop

from baton import lifeline
from baton.backends import Backend, backend_of
from baton.composition import Limits, Machine, Model, Worker
from baton.credentials import digest_of, keys_of, tickets_of, tls_of
from baton.drain import Drain
from baton.executors import executor_for, frames_for
from baton.k8s.place import labels_from_node, merged
from baton.loaded_model import LoadedModel, PoolWish, load
from baton.logs import set_up_logs
from baton.membership import Membership
from baton.model_facts import model_digest
from baton.options import WorkerOptions, add_options, from_args
from baton.registry_link import labels_of, open_registry
from baton.reports import Report, reporter
from baton.self_test import SelfTest
from baton.transports import paths_for
from baton.worker_server import Listener, WorkerServer, check_address, reached_at
from baton.worker_signals import PERIOD_S, signals_of
from core.clock import monotonic_s
from core.errors import StartupError
from core.messages import Role, WorkerId, WorkerInfo
from core.registry.records import WorkerState
from core.security.channels import Channels
from core.telemetry.drain_metrics import CUT_SHORT
from engine.batch import Executor
from kvtransfer.frames import Frames
from kvtransfer.paths import Paths

log = logging.getLogger(__name__)

T = TypeVar("T")

SWEEP_S = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, WorkerOptions)


def run(args: argparse.Namespace) -> int:
    options = from_args(WorkerOptions, args)
    setproctitle.setproctitle(f"baton-{options.name}")
    set_up_logs()
    lifeline.hold(options.lifeline_fd if options.lifeline_fd >= 0 else None)
    report = reporter(options.report_fd if options.report_fd >= 0 else None)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            code = runner.run(WorkerProcess(options, report).serve())
    except StartupError as error:
        report(Report("failed", message=error.message, exit_code=error.exit_code))
        if options.report_fd < 0:
            raise
        return error.exit_code  # the launcher has the message, and says it once
    _leave(code)


def _leave(code: int) -> NoReturn:
    """End now: all has been closed in order, and taking torch apart module by module would take a second more."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


class WorkerProcess:
    """Composes a worker over torch and shared memory, and runs it until it is told to stop."""

    def __init__(self, options: WorkerOptions, report: Callable[[Report], None]) -> None:
        """Raises ConfigError."""
        self._options = options
        self._report = report
        self._compute = ThreadPoolExecutor(1, "compute", initializer=_lower_priority, initargs=(options.nice,))
        self._told = asyncio.Event()  # to stop, after a drain
        self._stopping = asyncio.Event()  # at once
        self._keys = keys_of(options)
        self._digest = digest_of(options.digest, self._keys)
        self._tls = tls_of(options)
        self._channels = Channels(self._tls)
        given = labels_of(options.labels)
        self._labels = merged(given, labels_from_node(os.environ)) if options.registry else given
        self._link = open_registry(options.registry, options.registry_prefix)

    async def serve(self) -> int:
        """The exit code: 1 when the engine's loop has ended by an error of ours. Raises StartupError."""
        check_address(self._options.listen, self._options.advertise)
        backend = backend_of(self._options.backend, self._options.device)
        paths = paths_for(self._options, monotonic_s, backend.on_gpu)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        loading = asyncio.ensure_future(loop.run_in_executor(self._compute, self._load, backend))
        stop = asyncio.create_task(self._told.wait())
        either: set[asyncio.Future[Any]] = {loading, stop}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            os._exit(0)  # told to stop while it loads: nothing is held yet, and a read cannot be interrupted
        loaded, frames, executor = loading.result()
        await paths.serve(frames, self._digest.of)
        listener = Listener(self._options.listen, self._tls)
        address = reached_at(self._options.advertise, listener.address)
        worker = self._compose(loaded, frames, executor, paths, address)
        membership = self._membership(worker.info, address)
        try:
            return await self._run(worker, WorkerServer(worker, paths, listener, self._channels), membership)
        finally:
            await membership.close()
            await worker.stop()
            await paths.close()
            self._compute.shutdown()
            stop.cancel()

    def _load(self, backend: Backend) -> tuple[LoadedModel, Frames, Executor]:
        """On the compute thread: torch's own threads are made by it, with its priority."""
        o = self._options
        wish = PoolWish(o.page_size, o.pages, o.kv_bytes, o.max_context, o.gpu_share)
        weights = [0, 0]

        def weights_loaded(done: int, total: int) -> None:
            weights[:] = done, total
            self._report(Report("loading", done, total))

        step = (o.step_tokens, o.max_rows)
        loaded = load(Path(o.model), o.dtype, wish, weights_loaded, backend=backend, step=step)

        def pool_faulted_in(done: int, total: int) -> None:
            self._report(Report("loading", weights[1] + done, weights[1] + total))

        frames = frames_for(loaded, True, pool_faulted_in)
        return loaded, frames, executor_for(loaded, frames, o.threads or len(os.sched_getaffinity(0)), o.max_rows)

    def _compose(self, loaded: LoadedModel, frames: Frames, executor: Executor, paths: Paths, endpoint: str) -> Worker:
        o = self._options
        machine = Machine(
            executor=executor,
            frames=frames,
            transport=paths,
            clock=monotonic_s,
            random=Random(secrets.randbits(64)),
            run_blocking=self._run_blocking,
            offload=asyncio.to_thread,
            digest=self._digest,
            tickets=tickets_of(self._keys),
        )
        info = WorkerInfo(
            worker=WorkerId(o.name, secrets.randbits(63)),
            role=Role(o.role),
            identity=loaded.identity,
            layout=loaded.layout.digest(),
            page_size=loaded.layout.page_size,
            pages_total=loaded.pages,
            max_context_tokens=loaded.max_context_tokens,
            handoff_endpoint=endpoint if o.role != Role.AGGREGATED.value else "",
        )
        model = Model(loaded.identity, loaded.vocabulary, loaded.max_context_tokens, loaded.end_ids)
        limits = Limits(o.step_tokens, o.max_rows, max(o.step_tokens, 4 * o.local_prefill), o.prefill_share)
        return Worker(info, model, limits, machine, o.served_name or Path(o.model).name)

    def _membership(self, info: WorkerInfo, address: str) -> Membership:
        return Membership(self._link, info, address, model=model_digest(Path(self._options.model)), labels=self._labels)

    async def _run_blocking(self, call: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._compute, call, *args)

    async def _run(self, worker: Worker, server: WorkerServer, membership: Membership) -> int:
        """Serve until told to stop."""
        engine = worker.start()
        sweeping = asyncio.create_task(_every(SWEEP_S, server.desk.sweep), name="sweep")
        telling = asyncio.create_task(_every(PERIOD_S, lambda: self._tell(worker)), name="signals")
        told = asyncio.create_task(self._told.wait())
        await server.start()
        info = worker.info
        where, pages = membership.endpoint, info.pages_total
        log.info("%s serves on %s: %d pages of %d tokens", info.worker, where, pages, info.page_size)
        test = SelfTest(info, server.probe.prove, worker.machine.random)
        ready = Report("ready", endpoint=where)
        member = asyncio.create_task(membership.keep(test, lambda: self._report(ready)), name="membership")
        try:
            first: set[asyncio.Future[Any]] = {engine, told, sweeping, telling, member}
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            if self._told.is_set():
                await self._drain(worker, membership, engine)
            return 0 if self._told.is_set() and not engine.done() else _report_end(engine, sweeping, telling, member)
        finally:
            for task in (engine, told, sweeping, telling, member):
                task.cancel()
            await asyncio.gather(engine, told, sweeping, telling, member, return_exceptions=True)
            await membership.withdraw()
            await server.close()

    def _on_signal(self) -> None:
        """The first begins the drain. Another, or the first where there is no time for one, ends the worker at once."""
        if self._told.is_set() or not self._options.drain_s:
            self._stopping.set()
        self._told.set()

    async def _drain(self, worker: Worker, membership: Membership, engine: asyncio.Task[None]) -> None:
        """Finish what it has, or hand it back; unless a second signal, or the end of the engine, cuts that short."""
        if self._stopping.is_set():
            return
        membership.announce(WorkerState.DRAINING)
        drain = asyncio.create_task(Drain(worker, self._options.drain_s, membership.has_successor).run(), name="drain")
        stop = asyncio.create_task(self._stopping.wait())
        try:
            either: set[asyncio.Future[Any]] = {drain, stop, engine}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            drain.cancel()
            stop.cancel()
            ended = await asyncio.gather(drain, return_exceptions=True)
        self._report(Report("drained", message=ended[0] if isinstance(ended[0], str) else CUT_SHORT))

    def _tell(self, worker: Worker) -> None:
        self._report(Report("signals", numbers=signals_of(worker)))


def _report_end(*loops: asyncio.Task[None]) -> int:
    """One that should never end has."""
    for loop in loops:
        if loop.done():
            error = None if loop.cancelled() else loop.exception()
            log.critical("the loop of the %s has ended", loop.get_name(), exc_info=error)
    return 1


async def _every(pause_s: float, do: Callable[[], None]) -> None:
    while True:
        await asyncio.sleep(pause_s)
        do()


def _lower_priority(nice: int) -> None:
    """Of the calling thread, and of those that it makes: on Linux a thread has a priority of its own.

    Nice alone is not enough beside a decode worker: its threads wake some hundreds of times in a step, and a nice
    thread may finish its slice first. One of SCHED_IDLE gives way at once.
    """
    if nice:
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, nice)
        os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
