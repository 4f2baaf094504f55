"""One router process: tokenizer, worker sessions, saga, HTTP server; said to be ready when every worker is."""

from __future__ import annotations

import argparse
import asyncio
import logging
import secrets
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import setproctitle
import uvloop

import baton
from baton import lifeline
from baton.credentials import keys_of, tickets_of, tls_of
from baton.logs import set_up_logs
from baton.model_facts import served_model
from baton.options import RouterOptions, add_options, from_args
from baton.ports import bind
from baton.reports import Report, reporter
from core.clock import monotonic_s
from core.errors import NoCapacity, StartupError
from core.messages import Role
from core.security.channels import Channels
from kvtransfer.chores import Chores
from router.app import Front, build_app
from router.choose import Terms
from router.client import WorkerClient
from router.cluster_watch import ClusterWatch, Identity
from router.metrics import RouterMetrics
from router.path_survey import Member, PathSurvey
from router.permits import Permits
from router.saga import Saga
from router.scaling_board import ScalingBoard
from router.server import http_server
from router.threshold import Threshold
from router.tokenizer import load_tokenizer
from router.workers import Workers

log = logging.getLogger(__name__)

STREAM_GRACE_S = 2  # open streams may end by themselves for so long after SIGTERM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, RouterOptions)


def run(args: argparse.Namespace) -> int:
    options = from_args(RouterOptions, args)
    setproctitle.setproctitle(f"baton-{options.name}")
    set_up_logs()
    lifeline.hold(options.lifeline_fd if options.lifeline_fd >= 0 else None)
    report = reporter(options.report_fd if options.report_fd >= 0 else None)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(RouterProcess(options).serve(lambda: report(Report("ready"))))
        return 0
    except StartupError as error:
        report(Report("failed", message=error.message, exit_code=error.exit_code))
        if options.report_fd < 0:
            raise
        return error.exit_code  # the launcher has the message, and says it once


class RouterProcess:
    """Composes the router and runs it until SIGTERM or SIGINT."""

    def __init__(self, options: RouterOptions) -> None:
        """Raises ConfigError."""
        self._options = options
        self._workers = Workers(monotonic_s)
        router = f"{options.name}-{secrets.token_hex(8)}"
        endpoints = dict(part.split("=", 1) for part in options.workers.split(","))
        self._tickets = tickets_of(keys_of(options))
        channels = Channels(tls_of(options))
        self._clients = {
            name: WorkerClient(endpoint, router, self._workers, monotonic_s, channels=channels)
            for name, endpoint in endpoints.items()
        }

    async def serve(self, ready: Callable[[], None]) -> None:
        """Raises PortInUse and CheckpointError."""
        listener = bind(self._options.host, self._options.port)
        checkpoint = Path(self._options.model)
        model = served_model(checkpoint, self._options.served_name, self._options.max_context, int(time.time()))
        tokenizer = load_tokenizer(checkpoint)
        metrics = RouterMetrics(model.names[0])
        saga = Saga(
            self._workers,
            monotonic_s,
            Threshold(terms_of(self._options), auto=self._options.local_prefill == "auto"),
            placement_wait_s=self._options.placement_wait_s,
            counters=metrics,
            tickets=self._tickets,
        )
        survey = PathSurvey(self._members, tuple(self._clients), Permits(self._tickets))
        watch = self._watch(model.names[0], metrics, survey)
        front = Front(
            model=model,
            tokenizer=tokenizer,
            generator=saga,
            metrics=metrics,
            health=self._health,
            worker_metrics=self._worker_metrics,
            survey=survey,
            cluster=watch.look,
            version=baton.__version__,
        )
        chores = Chores()
        loops = {f"session with {name}": client.run() for name, client in self._clients.items()}
        others = {"cluster view": watch.run(), "ready": self._say_ready(ready)}
        for name, loop in (loops | others).items():
            chores.spawn(loop, name)
        try:
            server = http_server(build_app(front), self._options.host, self._options.port, STREAM_GRACE_S)
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, setattr, server, "should_exit", True)
            await server.serve([listener])
        finally:
            await chores.stop()
            tokenizer.close()

    def _watch(self, model: str, metrics: RouterMetrics, survey: PathSurvey) -> ClusterWatch:
        board = ScalingBoard(None, monotonic_s)
        identity = Identity(self._options.name, model, baton.__version__, tuple(self._clients))
        return ClusterWatch(identity, self._workers, metrics, monotonic_s, survey=survey, board=board)

    async def _say_ready(self, ready: Callable[[], None]) -> None:
        while len(self._workers.infos()) < len(self._clients):
            await self._workers.changed()
        ready()

    async def _health(self) -> None:
        """Through the engine's loop of a worker of each role that a request needs. Raises NoCapacity."""
        answers = await asyncio.gather(*(c.health() for c in self._clients.values()), return_exceptions=True)
        alive = {n for n, answer in zip(self._clients, answers, strict=True) if not isinstance(answer, BaseException)}
        roles = {info.role for info, _ in self._workers.infos() if info.worker.name in alive}
        if Role.AGGREGATED not in roles and not {Role.PREFILL, Role.DECODE} <= roles:
            raise NoCapacity("no engine of some role answers", retry_after_s=1.0)

    def _members(self) -> list[Member]:
        up = [info for info, _ in self._workers.infos() if info.worker.name in self._clients]
        return [(info, self._clients[info.worker.name]) for info in up]

    async def _worker_metrics(self) -> Sequence[str]:
        pages = await asyncio.gather(*(client.metrics() for client in self._clients.values()))
        return [page.decode() for page in pages]


def terms_of(options: RouterOptions) -> Terms:
    """The numbers of the choice of workers, as far as they are configured."""
    terms = Terms() if options.lend == "auto" else Terms(lend_tokens=None)
    return terms if options.local_prefill == "auto" else replace(terms, local_prefill_tokens=int(options.local_prefill))
