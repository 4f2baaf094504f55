"""The one file that knows ucxx: a context, its workers and endpoints, typed and with errors of our own.

ucxx finds and loads UCX, and owns what lives long; messages go through `ucx_calls`. Everything but `load` belongs to
one thread. No exception of the library leaves this file, nor does one's traceback: it would keep the library's
objects alive, and a worker is destroyed when the last of them goes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from core.errors import ConfigError, PeerLost
from kvtransfer.frames import Frames
from kvtransfer.ucx_calls import Calls, Request

SETTLE_TURNS = 1000  # of progress, after an endpoint was closed: two are enough
SWEEP_AT = 64  # requests that are remembered, before those are forgotten that are over


@dataclass(frozen=True, slots=True)
class Region:
    """Memory as UCX sees it, with whatever keeps it alive. On a GPU: never run, and not measured."""

    address: int
    length: int
    owner: object
    on_gpu: bool = False

    @classmethod
    def of(cls, buffer: memoryview) -> Region:
        """A writable, contiguous buffer of the host."""
        return cls(np.frombuffer(buffer, np.uint8).ctypes.data, buffer.nbytes, buffer)

    @classmethod
    def of_pool(cls, frames: Frames) -> Region:
        """Pages, pattern and landing, wherever they lie. The frames must outlive it."""
        if frames.device is None or frames.block is None:
            return cls.of(frames.everything)
        return cls(frames.block.address, frames.block.size_bytes, frames, frames.device.on_gpu)

    def part(self, start: int, length: int) -> Region:
        return Region(self.address + start, length, self.owner, self.on_gpu)


class Library:
    """What was loaded."""

    def __init__(self, core: Any) -> None:
        self.core = core
        self.calls = Calls()
        self.version: str = ".".join(str(part) for part in core.get_ucx_version())

    def context(self, settings: Mapping[str, str]) -> Context:
        """Settings by UCX's names, without `UCX_`. Raises ConfigError."""
        return Context(self, dict(settings))


def load() -> Library:
    """Raises ConfigError where the library is missing."""
    try:
        from ucxx._lib import libucxx

        return Library(libucxx)
    except (ImportError, OSError) as error:
        raise ConfigError(f"the ucx transport needs ucxx ({error}): pip install 'baton[ucx]'") from error


class Context:
    """The devices of this machine as they were when it was made. One that is gone since fails every new worker."""

    def __init__(self, library: Library, settings: Mapping[str, str]) -> None:
        self._library = library
        self._settings = settings
        self._context = self._look_around()

    def _look_around(self) -> Any:
        core = self._library.core
        try:
            return core.UCXContext(dict(self._settings), feature_flags=(core.Feature.TAG, core.Feature.WAKEUP))
        except core.UCXError as error:
            shown = " ".join(f"{name}={value}" for name, value in sorted(self._settings.items()))
            raise ConfigError(f"UCX does not take these settings: {error}: {shown}") from None

    def worker(self) -> Worker:
        """Raises ConfigError where none can be made: no such device, no file descriptors left."""
        try:
            return Worker(self._library, self._open())
        except ConfigError:
            self._context = self._look_around()  # network devices come and go
            return Worker(self._library, self._open())

    def _open(self) -> Any:
        core = self._library.core
        try:
            worker = core.UCXWorker(self._context, enable_delayed_submission=False, enable_python_future=False)
            worker.init_blocking_progress_mode()
        except core.UCXError as error:
            raise ConfigError(f"UCX cannot open its devices: {error}") from None
        return worker


@dataclass(frozen=True, slots=True)
class Message:
    """One that has arrived, and that must be received: it has left the matching queue."""

    tag: int
    length: int
    handle: int


class Worker:
    """One ucp worker: an address, an event file descriptor, what arrives there, and one endpoint at a time."""

    def __init__(self, library: Library, worker: Any) -> None:
        self._library = library
        self._worker = worker
        self._handle: int = worker.handle
        self._requests: list[tuple[Request, Region]] = []  # under way, with their memory
        self.address: bytes = worker.address.tobytes()
        self.fd: int = worker.epoll_file_descriptor
        self.progress: Callable[[], bool] = worker.progress_once  # whether anything has moved
        self.arm: Callable[[], bool] = worker.arm  # False: something has arrived, progress once more

    def probe(self) -> Message | None:
        """The next message that has arrived, whoever sent it under whatever tag."""
        found = self._library.calls.probe(self._handle)
        return None if found is None else Message(*found)

    def receive(self, message: Message, into: Region) -> Request:
        """Longer than `into`: it fails, and no byte behind it is written."""
        calls = self._library.calls
        return self.keep(calls.receive(self._handle, message.handle, into.address, into.length, into.on_gpu), into)

    def keep(self, request: Request, region: Region) -> Request:
        """Its memory stays while it is under way."""
        if not request.done:
            if len(self._requests) >= SWEEP_AT:
                self._requests = [held for held in self._requests if not held[0].done]
            self._requests.append((request, region))
        return request

    def connect(self, address: bytes) -> Endpoint:
        """With peer error handling. Raises PeerLost for an address that UCX cannot reach."""
        core = self._library.core
        try:
            there = core.UCXAddress.create_from_buffer(address)
            endpoint = core.UCXEndpoint.create_from_worker_address(self._worker, there, endpoint_error_handling=True)
        except core.UCXError as error:
            raise PeerLost(f"UCX cannot reach the peer: {error}") from None
        return Endpoint(self, self._library.calls, endpoint)

    def settle(self) -> bool:
        """After the endpoint was closed: whether every send and receive is over."""
        for _ in range(SETTLE_TURNS):
            self.progress()
            self._requests = [held for held in self._requests if not held[0].done]
            if not self._requests:
                return True
        return False

    def close(self) -> None:
        """Destroy it. The endpoint has been closed."""
        for request, _ in self._requests:
            request.free()
        del self._worker, self.progress, self.arm
        self._requests.clear()


class Endpoint:
    """The way to one other worker."""

    def __init__(self, worker: Worker, calls: Calls, endpoint: Any) -> None:
        self._worker = worker
        self._calls = calls
        self._endpoint = endpoint
        self._handle: int = endpoint.handle

    def send(self, region: Region, tag: int) -> Request:
        sent = self._calls.send(self._handle, region.address, region.length, tag, region.on_gpu)
        return self._worker.keep(sent, region)

    @property
    def alive(self) -> bool:
        return bool(self._endpoint.alive)

    def lanes(self) -> tuple[str, ...]:
        """Transport and device of each lane, as "tcp/eth0". Empty where UCX does not say."""
        return self._calls.lanes(self._handle)

    def close(self) -> bool:
        """By force: what is under way fails, and nobody waits for the peer. Whether all of it is over."""
        self._endpoint.close_blocking()
        del self._endpoint
        return self._worker.settle()
