"""One router process: tokenizer, worker sessions, saga, HTTP server; said to be ready when its workers are."""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import secrets
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import setproctitle
import uvloop
from starlette.applications import Starlette

import baton
from baton import lifeline
from baton.credentials import keys_of, tickets_of, tls_of
from baton.logs import set_up_logs
from baton.model_facts import model_digest, served_model
from baton.options import RouterOptions, add_options, from_args
from baton.ports import WILDCARDS, bind
from baton.registry_link import open_registry
from baton.reports import Report, reporter
from baton.router_share import RouterShare
from core.clock import monotonic_s
from core.errors import ConfigError, NoCapacity, StartupError
from core.registry.routers import RouterRecord
from core.security.channels import Channels
from kvtransfer.chores import Chores
from router.admission import Parts
from router.app import Front, build_app
from router.choose import Terms
from router.client import WorkerClient
from router.cluster_watch import ClusterWatch, Identity, nothing_announced
from router.limits import Limits
from router.members import Members
from router.metrics import RouterMetrics
from router.path_survey import PathSurvey
from router.permits import Permits
from router.registry_metrics import show_registry
from router.saga import Saga
from router.scaling_board import ScalingBoard
from router.server import HttpServer, http_server
from router.threshold import Threshold
from router.tokenizer import load_tokenizer
from router.workers import Workers

log = logging.getLogger(__name__)

Loops: TypeAlias = "Mapping[str, Coroutine[Any, Any, None]]"

STREAM_GRACE_S = 2  # open streams may end by themselves for so long, at least
LISTEN_S = 5.0  # of the drain, or a quarter of it: balancers still send requests to a router that has been told to stop


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
            runner.run(RouterProcess(options).serve(report))
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
        self._named = named_workers(options)
        self._id = f"{options.name}-{secrets.token_hex(8)}"
        self._workers = Workers(monotonic_s)
        self._tickets = tickets_of(keys_of(options))
        self._channels = Channels(tls_of(options))
        self._limits = Limits()
        self._server: HttpServer | None = None  # once it runs
        self._link = open_registry(options.registry, options.registry_prefix)

    async def serve(self, report: Callable[[Report], None]) -> None:
        """Raises PortInUse and CheckpointError."""
        listener = bind(self._options.host, self._options.port)
        checkpoint = Path(self._options.model)
        model = served_model(checkpoint, self._options.served_name, self._options.max_context, int(time.time()))
        tokenizer = load_tokenizer(checkpoint)
        metrics = RouterMetrics(model.names[0])
        url = url_of(self._options, listener.getsockname()[1])
        share = self._share(url, metrics)
        members = self._members(model_digest(checkpoint))
        survey = PathSurvey(members.members, lambda: members.names, Permits(self._tickets))
        watch = self._watch(model.names[0], metrics, survey, share)
        front = Front(
            model=model,
            tokenizer=tokenizer,
            generator=self._saga(metrics, share),
            metrics=metrics,
            limits=self._limits,
            parts=Parts() if share is None else share.parts,
            health=lambda: self._health(members),
            worker_metrics=members.metrics,
            survey=survey,
            cluster=watch.look,
            version=baton.__version__,
        )
        loops = {"cluster view": watch.run(), "members": members.run(), "ready": self._say(members, url, report)}
        try:
            await self._run(build_app(front), listener, loops | ({} if share is None else share.loops()))
        finally:
            tokenizer.close()

    async def _run(self, app: Starlette, listener: socket.socket, loops: Loops) -> None:
        """Serve until told to stop."""
        chores = Chores()
        for name, loop in loops.items():
            chores.spawn(loop, name)
        try:
            listen_s = min(LISTEN_S, self._options.drain_s / 4)
            grace_s = max(STREAM_GRACE_S, math.floor(self._options.drain_s - listen_s))
            self._server = server = http_server(app, self._options.host, self._options.port, grace_s)
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, server.drain, listen_s)
            await server.serve([listener])
        finally:
            await chores.stop()
            if self._link is not None:
                await self._link.close()

    async def _health(self, members: Members) -> None:
        """Raises NoCapacity: a balancer is to send nothing more, or no worker answers."""
        if self._server is not None and self._server.draining:
            raise NoCapacity("this router is draining")
        await members.health()

    def _saga(self, metrics: RouterMetrics, share: RouterShare | None) -> Saga:
        return Saga(
            self._workers,
            monotonic_s,
            Threshold(terms_of(self._options), auto=self._options.local_prefill == "auto"),
            placement_wait_s=self._options.placement_wait_s,
            counters=metrics,
            tickets=self._tickets,
            poison=None if share is None else share.poison,
        )

    def _members(self, model: str) -> Members:
        def connect(endpoint: str) -> WorkerClient:
            return WorkerClient(endpoint, self._id, self._workers, monotonic_s, channels=self._channels)

        registry = None if self._link is None else self._link.registry
        return Members(connect, self._workers, self._named, registry, model)

    def _share(self, url: str, metrics: RouterMetrics) -> RouterShare | None:
        """None without a registry."""
        if self._link is None:
            return None
        show_registry(metrics.registry, self._link.store, self._link.registry, monotonic_s)
        return RouterShare(self._link, RouterRecord(self._id, self._options.name, url), self._limits, monotonic_s)

    def _watch(self, model: str, metrics: RouterMetrics, survey: PathSurvey, share: RouterShare | None) -> ClusterWatch:
        board = ScalingBoard(None if self._link is None else self._link.store, monotonic_s)
        identity = Identity(self._options.name, model, baton.__version__, tuple(self._named))
        announced = nothing_announced if share is None else share.announced
        return ClusterWatch(
            identity, self._workers, metrics, monotonic_s, survey=survey, board=board, announced=announced
        )

    async def _say(self, members: Members, url: str, report: Callable[[Report], None]) -> None:
        await members.until_serving()
        report(Report("ready", endpoint=url))


def named_workers(options: RouterOptions) -> dict[str, str]:
    """Endpoints by name. Raises ConfigError, also when there is neither a worker nor a registry."""
    if not options.workers:
        if not options.registry:
            raise ConfigError("a router needs --workers, or --registry to find them")
        return {}
    parts = [part.partition("=") for part in options.workers.split(",")]
    if not all(name and endpoint for name, _, endpoint in parts):
        raise ConfigError(f"--workers must be name=address,..., got {options.workers!r}")
    return {name: endpoint for name, _, endpoint in parts}


def url_of(options: RouterOptions, port: int) -> str:
    """Where others find this router: by the machine's name, when it listens on every address."""
    host = socket.gethostname() if options.host in WILDCARDS else options.host
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def terms_of(options: RouterOptions) -> Terms:
    """The numbers of the choice of workers, as far as they are configured."""
    terms = Terms() if options.lend == "auto" else Terms(lend_tokens=None)
    return terms if options.local_prefill == "auto" else replace(terms, local_prefill_tokens=int(options.local_prefill))
