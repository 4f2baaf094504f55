"""The sockets of one worker: its gRPC server, the sessions over it, the ones it dials; opened and closed in order."""

from __future__ import annotations

from pathlib import Path

import grpc.aio

from baton.composition import Worker
from core.clock import monotonic_s
from kvtransfer.client import HandoffDialer
from kvtransfer.server import add_handoff_service
from session.desk import Desk
from session.server import SERVER_OPTIONS, WorkerServicer, add_worker_service

STOP_S = 1.0  # open calls may end by themselves for so long


class WorkerServer:
    """`listen` is an address as gRPC writes it; a Unix socket's file is removed at the end."""

    def __init__(self, worker: Worker, listen: str) -> None:
        self._listen = listen
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        self.desk = Desk(worker.tier, worker.outlet)
        self._servicer = WorkerServicer(self.desk, monotonic_s, worker.metrics_text)
        add_worker_service(self._server, self._servicer)
        worker.tier.published = self._servicer.publish
        self._dialer = self._sessions = None
        if worker.receiver is not None:
            self._sessions = add_handoff_service(self._server, worker.receiver)
            worker.receiver.start(self._sessions)
        if worker.source is not None:
            self._dialer = HandoffDialer(worker.source, worker.machine.random)
            worker.source.start(self._dialer)

    async def start(self) -> None:
        self._server.add_insecure_port(self._listen)
        await self._server.start()

    async def close(self) -> None:
        """Sessions end first, by themselves, so that no call has to be cancelled."""
        self._servicer.close()
        if self._dialer is not None:
            await self._dialer.close()
        if self._sessions is not None:
            self._sessions.close()
        await self._server.stop(STOP_S)
        if self._listen.startswith("unix:"):
            _tidy(Path(self._listen.removeprefix("unix:")))


def _tidy(path: Path) -> None:
    """Whoever leaves last takes the launcher's folder along: the launcher may have been killed."""
    path.unlink(missing_ok=True)
    try:
        path.parent.rmdir()
    except OSError:
        pass  # somebody else's socket is there yet
