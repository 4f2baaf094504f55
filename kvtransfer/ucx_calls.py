"""UCX's own C interface, for what must not go through ucxx: tagged messages, their requests, and an endpoint's lanes.

ucxx keeps a request that is under way when its endpoint is closed by force, and with it the worker, for good: the
sockets stay open, and the peer does not see that it was cut off. Requests of our own end with their endpoint.
Handles are addresses, as ucxx gives them. The calls release the GIL.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_char, c_char_p, c_int, c_int8, c_size_t, c_uint, c_uint32, c_uint64, c_void_p

LIBRARY = "libucp.so.0"  # loaded by ucxx
EP_NAME_BYTES, SOCKADDR_BYTES = 32, 128  # ucp.h
EP_FIELD_TRANSPORTS = 1 << 3
MAX_LANES = 16
OP_FIELD_MEMORY_TYPE = 1 << 6
MEMORY_TYPE_CUDA = 1  # ucs/memory/memory_type.h
OK, IN_PROGRESS, LAST_ERROR = 0, 1, -100  # ucs_status_t
FIRST_ERROR_POINTER = 2**64 + LAST_ERROR  # a call that fails at once returns the status as a pointer


class _Parameters(ctypes.Structure):
    """ucp_request_param_t. All zero: contiguous bytes, no callback, and UCX finds out where they lie."""

    _fields_ = (
        ("mask", c_uint32),
        ("flags", c_uint32),
        ("request", c_void_p),
        ("callback", c_void_p),
        ("datatype", c_uint64),
        ("user_data", c_void_p),
        ("reply_buffer", c_void_p),
        ("memory_type", c_int),
        ("receive_info", c_void_p),
        ("memory_handle", c_void_p),
    )


class _Arrived(ctypes.Structure):
    """ucp_tag_recv_info_t"""

    _fields_ = (("tag", c_uint64), ("length", c_size_t))


class _Lane(ctypes.Structure):
    """ucp_transport_entry_t"""

    _fields_ = (("transport", c_char_p), ("device", c_char_p))


class _Attributes(ctypes.Structure):
    """ucp_ep_attr_t"""

    _fields_ = (
        ("mask", c_uint64),
        ("name", c_char * EP_NAME_BYTES),
        ("local", c_char * SOCKADDR_BYTES),
        ("remote", c_char * SOCKADDR_BYTES),
        ("lanes", POINTER(_Lane)),
        ("count", c_uint),
        ("lane_bytes", c_size_t),
        ("user_data", c_void_p),
    )


class Calls:
    """One per library. Raises OSError where UCX is not loaded."""

    def __init__(self) -> None:
        ucp = ctypes.CDLL(LIBRARY)
        on_gpu = _Parameters(mask=OP_FIELD_MEMORY_TYPE, memory_type=MEMORY_TYPE_CUDA)
        self._parameters = {False: _Parameters(), True: on_gpu}
        self._send = ucp.ucp_tag_send_nbx
        self._send.argtypes = (c_void_p, c_void_p, c_size_t, c_uint64, c_void_p)
        self._send.restype = c_void_p
        self._probe = ucp.ucp_tag_probe_nb
        self._probe.argtypes = (c_void_p, c_uint64, c_uint64, c_int, POINTER(_Arrived))
        self._probe.restype = c_void_p
        self._receive = ucp.ucp_tag_msg_recv_nbx
        self._receive.argtypes = (c_void_p, c_void_p, c_size_t, c_void_p, c_void_p)
        self._receive.restype = c_void_p
        self._query = ucp.ucp_ep_query
        self._query.argtypes = (c_void_p, POINTER(_Attributes))
        held = ctypes.PyDLL(LIBRARY)  # these two return at once: letting go of the GIL would cost more
        self._status = held.ucp_request_check_status
        self._status.argtypes, self._status.restype = (c_void_p,), c_int8
        self._free = held.ucp_request_free
        self._free.argtypes, self._free.restype = (c_void_p,), None

    def send(self, endpoint: int, address: int, length: int, tag: int, on_gpu: bool) -> Request:
        """UCX is told of memory on a GPU: its own finding out keeps books that allocations of others escape."""
        return Request(self, self._send(endpoint, address, length, tag, byref(self._parameters[on_gpu])))

    def probe(self, worker: int) -> tuple[int, int, int] | None:
        """Tag, length and handle of the next message under whatever tag. It must be received."""
        arrived = _Arrived()
        handle = self._probe(worker, 0, 0, 1, byref(arrived))
        return (arrived.tag, arrived.length, handle) if handle else None

    def receive(self, worker: int, message: int, address: int, length: int, on_gpu: bool) -> Request:
        return Request(self, self._receive(worker, address, length, message, byref(self._parameters[on_gpu])))

    def lanes(self, endpoint: int) -> tuple[str, ...]:
        """Empty where UCX does not say."""
        lanes = (_Lane * MAX_LANES)()
        asked = _Attributes(mask=EP_FIELD_TRANSPORTS)
        asked.lanes, asked.count, asked.lane_bytes = lanes, MAX_LANES, ctypes.sizeof(_Lane)
        if self._query(endpoint, byref(asked)) != OK:
            return ()
        return tuple(f"{lane.transport.decode()}/{lane.device.decode()}" for lane in lanes[: asked.count])

    def status(self, request: int) -> int:
        return int(self._status(request))

    def free(self, request: int) -> None:
        self._free(request)


class Request:
    """A send or a receive. Its memory must stay until it is done, or its worker is gone."""

    __slots__ = ("_calls", "_handle", "_status")

    def __init__(self, calls: Calls, pointer: int | None) -> None:
        self._calls = calls
        self._handle, self._status = 0, IN_PROGRESS
        if pointer is None:
            self._status = OK
        elif pointer >= FIRST_ERROR_POINTER:
            self._status = pointer - 2**64
        else:
            self._handle = pointer

    @property
    def done(self) -> bool:
        if self._handle:
            self._status = self._calls.status(self._handle)
            if self._status != IN_PROGRESS:
                self.free()
        return self._status != IN_PROGRESS

    @property
    def failed(self) -> bool:
        """Of one that is done: the memory is not what it should be."""
        return self._status != OK

    def free(self) -> None:
        """UCX may have its request back. One that is under way goes on until its endpoint is closed."""
        if self._handle:
            self._calls.free(self._handle)
            self._handle = 0
