"""The sockets of one worker: its gRPC server, the sessions over it, the ones it dials; opened and closed in order."""

from __future__ import annotations

from pathlib import Path

from baton.composition import Worker
from baton.credentials import KEY_FILE
from baton.path_probe import PathProbe
from baton.ports import WILDCARDS, bind, split_address
from core.clock import monotonic_s
from core.errors import ConfigError, PortInUse
from core.security.channels import Channels, add_port, make_server
from core.security.tls import TlsFiles
from kvtransfer.client import HandoffDialer
from kvtransfer.paths import Paths
from kvtransfer.server import add_handoff_service
from session.desk import Desk
from session.server import SERVER_OPTIONS, WorkerServicer, add_worker_service

STOP_S = 1.0  # open calls may end by themselves for so long


UNIX = "unix:"


def check_address(listen: str, advertise: str) -> None:
    """Before anything is loaded. Raises ConfigError and PortInUse."""
    if listen.startswith(UNIX):
        return
    host, port = split_address(listen)
    if host in WILDCARDS and not advertise:
        raise ConfigError(f"--listen {listen} names no host that peers could reach: add --advertise host:port")
    bind(host if host != "*" else "", port).close()


def reached_at(advertise: str, address: str) -> str:
    """What others are told: the address listened on, unless another is advertised, whose port 0 stands for ours."""
    if advertise.endswith(":0"):
        return advertise.removesuffix("0") + address.rpartition(":")[2]
    return advertise or address


class Listener:
    """A server that has its address and does not serve yet: peers are told the address before it does."""

    def __init__(self, listen: str, tls: TlsFiles | None = None) -> None:
        """Raises PortInUse. `listen` as gRPC writes it; port 0 is whatever is free."""
        self.server = make_server(SERVER_OPTIONS, tls)
        try:
            port = add_port(self.server, listen, tls)
        except RuntimeError as error:
            raise PortInUse(f"cannot listen on {listen}: {error}") from error
        self.address = listen if listen.startswith(UNIX) else f"{listen.rpartition(':')[0]}:{port}"

    def tidy(self) -> None:
        """A Unix socket's file goes with its server."""
        if self.address.startswith(UNIX):
            _tidy(Path(self.address.removeprefix(UNIX)))


class WorkerServer:
    """Everything that comes to one worker and goes from it, over the listener's server."""

    def __init__(self, worker: Worker, paths: Paths, listener: Listener, channels: Channels) -> None:
        self._worker = worker
        self._paths = paths
        self._listener = listener
        self._server = listener.server
        self.desk = Desk(worker.tier, worker.outlet)
        self._dialer = self._sessions = None
        if worker.source is not None:
            self._dialer = HandoffDialer(worker.source, worker.machine.random, channels)
            worker.source.start(self._dialer)
        if worker.receiver is not None:
            self._sessions = add_handoff_service(self._server, worker.receiver)
            worker.receiver.start(self._sessions)
            paths.renew = self._sessions.hang_up
        self.probe = PathProbe(paths, worker.tier.gate, self._dialer.dial if self._dialer is not None else None)
        self._servicer = WorkerServicer(self.desk, monotonic_s, self._metrics_text, self.probe)
        add_worker_service(self._server, self._servicer)
        worker.tier.published = self._servicer.publish
        paths.on_fallback = worker.metrics.paths.fell_back

    def _metrics_text(self) -> bytes:
        self._worker.metrics.paths.show(self._paths.snapshot())
        return self._worker.metrics_text()

    async def start(self) -> None:
        await self._server.start()

    async def close(self) -> None:
        """Sessions end first, by themselves, so that no call has to be cancelled."""
        self._servicer.close()
        if self._dialer is not None:
            await self._dialer.close()
        if self._sessions is not None:
            self._sessions.close()
        await self._server.stop(STOP_S)
        self._listener.tidy()


def _tidy(path: Path) -> None:
    """Whoever leaves last takes the launcher's folder along, and the key in it: the launcher may have been killed."""
    path.unlink(missing_ok=True)
    try:
        if [found.name for found in path.parent.iterdir()] == [KEY_FILE]:
            (path.parent / KEY_FILE).unlink(missing_ok=True)
        path.parent.rmdir()
    except OSError:
        pass  # somebody else's socket is there yet
