"""The one file that knows ucxx: a context, its workers, endpoints and requests, typed and with errors of our own.

The synchronous core is used; its asyncio layer costs hundreds of microseconds per operation. Everything but
`load` belongs to one thread. No exception of the library leaves this file, nor does one's traceback: it would keep
the library's objects alive, and a worker is destroyed when the last of them goes.

Memory is passed as address and length. Device memory needs nothing but another `Region`, and is not measured yet.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from core.errors import ConfigError, PeerLost

EP_NAME_BYTES, SOCKADDR_BYTES = 32, 128  # ucp.h
EP_FIELD_TRANSPORTS = 1 << 3
MAX_LANES = 16


@dataclass(frozen=True, slots=True)
class Region:
    """Memory that `owner` keeps alive: where it begins, how long it is, and whether a device has it."""

    address: int
    length: int
    owner: object
    on_device: bool = False

    @classmethod
    def of(cls, buffer: memoryview) -> Region:
        """A writable, contiguous buffer of the host."""
        array = np.frombuffer(buffer, np.uint8)
        return cls(array.ctypes.data, array.nbytes, array)

    def part(self, start: int, length: int) -> Region:
        return Region(self.address + start, length, self.owner, self.on_device)

    def __getattr__(self, name: str) -> Any:
        """The array protocol of the one kind of memory that this is; the library asks for both."""
        if name == ("__cuda_array_interface__" if self.on_device else "__array_interface__"):
            return {"shape": (self.length,), "typestr": "|u1", "data": (self.address, False), "version": 3}
        raise AttributeError(name)


class Library:
    """What was imported."""

    def __init__(self, core: ModuleType, arrays: ModuleType) -> None:
        self._core = core
        self._arrays = arrays
        self.version: str = ".".join(str(part) for part in core.get_ucx_version())

    def context(self, settings: Mapping[str, str]) -> Context:
        """Settings by UCX's names, without `UCX_`. Raises ConfigError."""
        features = (self._core.Feature.TAG, self._core.Feature.WAKEUP)
        try:
            return Context(self, self._core.UCXContext(dict(settings), feature_flags=features))
        except self._core.UCXError as error:
            raise ConfigError(f"UCX does not take these settings: {error}: {_shown(settings)}") from None

    def array(self, region: Region) -> Any:
        if region.on_device:
            return self._arrays.Array(region)
        return self._arrays.Array(np.asarray(region))

    @property
    def core(self) -> Any:
        return self._core


def load() -> Library:
    """Raises ConfigError where the library is missing."""
    try:
        from ucxx._lib import arr, libucxx
    except ImportError as error:
        raise ConfigError(f"the ucx transport needs ucxx ({error}): pip install 'baton[ucx]'") from error
    return Library(libucxx, arr)


def _shown(settings: Mapping[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in sorted(settings.items()))


class Context:
    def __init__(self, library: Library, context: Any) -> None:
        self._library = library
        self._context = context

    def worker(self) -> Worker:
        """Raises ConfigError where none can be made: no such device, no file descriptors left."""
        core = self._library.core
        try:
            worker = core.UCXWorker(self._context, enable_delayed_submission=False, enable_python_future=False)
            worker.init_blocking_progress_mode()
        except core.UCXError as error:
            raise ConfigError(f"UCX cannot open its devices: {error}") from None
        return Worker(self._library, worker)


@dataclass(frozen=True, slots=True)
class Message:
    """One that has arrived, and that must be received: it has left the matching queue."""

    tag: int
    length: int
    handle: Any


class Request:
    """A send or a receive. Its memory must stay until it is done."""

    __slots__ = ("_array", "_request")

    def __init__(self, request: Any, array: Any) -> None:
        self._request = request
        self._array = array

    @property
    def done(self) -> bool:
        return bool(self._request.completed)

    @property
    def failed(self) -> bool:
        """Of one that is done: the memory is not what it should be."""
        return int(self._request.status) != 0


class Worker:
    """One ucp worker: an address, an event file descriptor, and what arrives there."""

    def __init__(self, library: Library, worker: Any) -> None:
        self._library = library
        self._worker = worker
        core = library.core
        self._any_tag, self._any_mask = core.UCXXTag(0), core.UCXXTagMask(0)
        self.address: bytes = worker.address.tobytes()
        self.fd: int = worker.epoll_file_descriptor
        self.progress: Callable[[], bool] = worker.progress_once  # whether anything has moved
        self.arm: Callable[[], bool] = worker.arm  # False: something has arrived, progress once more

    def probe(self) -> Message | None:
        """The next message that has arrived, whoever sent it under whatever tag."""
        found = self._worker.tag_probe(self._any_tag, self._any_mask, True)
        if not found.matched:
            return None
        return Message(found.sender_tag.value, found.length, found)

    def receive(self, message: Message, into: Region) -> Request:
        """Longer than `into`: it fails, and no byte behind it is written."""
        array = self._library.array(into)
        return Request(self._worker.tag_recv_with_handle(array, message.handle), array)

    def connect(self, address: bytes) -> Endpoint:
        """With peer error handling. Raises PeerLost for an address that UCX cannot reach."""
        core = self._library.core
        try:
            there = core.UCXAddress.create_from_buffer(address)
            endpoint = core.UCXEndpoint.create_from_worker_address(self._worker, there, endpoint_error_handling=True)
        except core.UCXError as error:
            raise PeerLost(f"UCX cannot reach the peer: {error}") from None
        return Endpoint(self._library, endpoint)

    def close(self) -> None:
        """Destroyed when the last endpoint and request of it are gone too."""
        del self._worker, self.progress, self.arm


class Endpoint:
    """The way to one other worker."""

    def __init__(self, library: Library, endpoint: Any) -> None:
        self._library = library
        self._endpoint = endpoint

    def send(self, region: Region, tag: int) -> Request:
        """Raises PeerLost."""
        array = self._library.array(region)
        try:
            return Request(self._endpoint.tag_send(array, self._library.core.UCXXTag(tag)), array)
        except self._library.core.UCXError as error:
            raise PeerLost(f"UCX cannot send: {error}") from None

    @property
    def alive(self) -> bool:
        return bool(self._endpoint.alive)

    def lanes(self) -> tuple[str, ...]:
        """Transport and device of each lane, as "tcp/eth0". Empty where UCX does not say."""
        entries = (_Lane * MAX_LANES)()
        asked = _EndpointAttributes(field_mask=EP_FIELD_TRANSPORTS)
        asked.entries, asked.count, asked.entry_bytes = entries, MAX_LANES, ctypes.sizeof(_Lane)
        ucp = ctypes.CDLL("libucp.so.0")  # loaded long since
        if ucp.ucp_ep_query(ctypes.c_void_p(self._endpoint.handle), ctypes.byref(asked)) != 0:
            return ()
        return tuple(f"{lane.transport.decode()}/{lane.device.decode()}" for lane in entries[: asked.count])

    def close(self) -> None:
        """By force: what is under way fails, and nobody waits for the peer."""
        self._endpoint.close_blocking()
        del self._endpoint


class _Lane(ctypes.Structure):
    _fields_ = (("transport", ctypes.c_char_p), ("device", ctypes.c_char_p))


class _EndpointAttributes(ctypes.Structure):
    _fields_ = (
        ("field_mask", ctypes.c_uint64),
        ("name", ctypes.c_char * EP_NAME_BYTES),
        ("local", ctypes.c_char * SOCKADDR_BYTES),
        ("remote", ctypes.c_char * SOCKADDR_BYTES),
        ("entries", ctypes.POINTER(_Lane)),
        ("count", ctypes.c_uint),
        ("entry_bytes", ctypes.c_size_t),
        ("user_data", ctypes.c_void_p),
    )
