"""What runs in a Serve replica: one child process, its health, its signals, and its drain when Serve stops it.

The process is what serves; the actor around it carries no token. When the actor is killed, the child's lifeline breaks
and ends it; when the child ends by itself, the actor ends too, and Serve sees that at its next look.
"""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import ray
from ray import serve

from baton.checkpoint import locate
from baton.cluster.client import HealthClient
from baton.cluster.command_lines import Place, router_options, tls_files, worker_options
from baton.cluster.spec import ClusterSpec, parse
from baton.cluster.supervisor import Supervisor
from baton.options import to_flags
from core.clock import monotonic_s
from core.errors import EngineError
from core.security.channels import Channels
from core.security.tls import ROUTER

log = logging.getLogger("ray.serve")

HAND_BACK_S = 10.0  # beyond drain_s: what is left is handed back, and the process ends
CHECK_S = 8.0  # a long step is no illness


class WorkerReplica:
    """One prefill or decode worker."""

    async def __init__(self, role: str, plain: dict[str, Any], peers: Any = None) -> None:  # type: ignore[misc]
        """Returns when the worker is ready. `peers` are not used: they tie the tiers into one application."""
        self._undo = AsyncExitStack()  # first of all: Serve may stop a replica that is still being made
        self._role = role
        self._spec = parse(plain)
        self._tier = self._spec.prefill if role == "prefill" else self._spec.decode
        checkpoint = await asyncio.to_thread(locate, self._spec.model.path)
        self._name = _name(role)
        options = worker_options(self._spec, role, self._name, checkpoint, _place())
        self._supervisor = Supervisor(self._name, "worker", to_flags(options), self._tier.env, monotonic_s)
        self._undo.push_async_callback(self._supervisor.stop, self._tier.drain_s + HAND_BACK_S)
        await self._supervisor.start(self._tier.start_s, _end_with_it)
        self._client = HealthClient(self._supervisor.endpoint, _channels(self._spec, role))
        self._undo.push_async_callback(self._client.close)
        log.info("%s serves on %s", self._name, self._supervisor.endpoint)

    async def check_health(self) -> None:
        """Through the engine's loop. Raises WorkerLost or EngineError."""
        self._supervisor.check()
        await self._client.check(CHECK_S)

    def record_autoscaling_stats(self) -> dict[str, float]:
        return self._supervisor.numbers

    def record_replica_metadata(self) -> dict[str, str]:
        return {"name": self._name, "role": self._role, "endpoint": self._supervisor.endpoint}

    def process(self) -> dict[str, Any]:
        """For tests and people: which process serves."""
        return {"name": self._name, "pid": self._supervisor.pid, "actor_pid": os.getpid(), "node": _place().host}

    async def __del__(self) -> None:
        """The drain: Serve waits for it."""
        await self._undo.aclose()


class RouterReplica:
    """One router. It answers clients on its own HTTP port; what comes through Serve's proxy is sent there."""

    async def __init__(self, plain: dict[str, Any], prefill: Any = None, decode: Any = None) -> None:  # type: ignore[misc]
        """Returns when the router is ready. The handles tie the tiers into one application."""
        self._undo = AsyncExitStack()
        self._spec = parse(plain)
        checkpoint = await asyncio.to_thread(locate, self._spec.model.path)
        self._name = _name(ROUTER)
        options = router_options(self._spec, self._name, checkpoint)
        tier = self._spec.router
        self._supervisor = Supervisor(self._name, "router", to_flags(options), tier.env, monotonic_s)
        self._undo.push_async_callback(self._supervisor.stop, tier.drain_s + HAND_BACK_S)
        await self._supervisor.start(tier.start_s, _end_with_it)
        self._url = self._supervisor.endpoint
        self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=CHECK_S))
        self._undo.push_async_callback(self._http.close)
        self._inflight = 0.0
        log.info("%s serves on %s", self._name, self._url)

    async def __call__(self, request: Any) -> Any:
        """A redirect to the router's own port, which clients should use in the first place."""
        from starlette.responses import RedirectResponse

        path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        return RedirectResponse(self._url + path, status_code=307)

    async def check_health(self) -> None:
        """The process lives and its HTTP server answers. Raises WorkerLost or EngineError.

        That no worker is there is not the router's illness: another router would find none either.
        """
        self._supervisor.check()
        try:
            async with self._http.get(f"{self._url}/metrics") as reply:
                text = await reply.text()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise EngineError(f"{self._name} does not answer: {error!r}") from None
        self._inflight = _inflight(text)

    def record_autoscaling_stats(self) -> dict[str, float]:
        return {"requests": self._inflight}

    def record_replica_metadata(self) -> dict[str, str]:
        return {"name": self._name, "role": ROUTER, "endpoint": self._url}

    def process(self) -> dict[str, Any]:
        """For tests and people: which process serves."""
        return {"name": self._name, "pid": self._supervisor.pid, "actor_pid": os.getpid(), "url": self._url}

    async def __del__(self) -> None:
        """The drain: Serve waits for it."""
        await self._undo.aclose()


def _name(role: str) -> str:
    """Unique: the replica's own id, which Serve draws."""
    return f"{role}-{serve.get_replica_context().replica_id.unique_id}"


def _place() -> Place:
    me: str = ray.get_runtime_context().get_node_id()
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    node = next(node for node in nodes if node["NodeID"] == me)
    return Place(node["NodeManagerAddress"], node["Labels"])


def _channels(spec: ClusterSpec, role: str) -> Channels:
    files = tls_files(spec.security, role)
    return Channels(files if files.certificate else None)


def _inflight(metrics: str) -> float:
    """Requests under way, in a router's metrics page."""
    lines = (line.split() for line in metrics.splitlines() if line.startswith("baton:router_inflight_requests"))
    return sum(float(words[-1]) for words in lines if len(words) >= 2)


def _end_with_it(code: int) -> None:
    """At once and without a drain: there is nothing left to drain."""
    log.error("the process of this replica ended with code %d: the replica ends with it", code)
    logging.shutdown()
    os._exit(1)
