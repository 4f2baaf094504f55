"""Who may map a pool: its file descriptor is handed over on an abstract Unix socket, to our own uid, for the token.

The descriptor is of all that the host's memory has of the pool. Of one on a device that is the epochs alone, and the
handle of its block comes along. An abstract socket has no name in a file system and vanishes with its process.
"""

from __future__ import annotations

import asyncio
import fcntl
import hmac
import json
import logging
import os
import socket
import struct
from dataclasses import asdict, dataclass
from typing import NamedTuple

from core.errors import HandoffError, PeerLost
from kvtransfer.device_memory import MAX_HANDLE_BYTES
from kvtransfer.frames import SEALS, Frames, memory_bytes

log = logging.getLogger(__name__)

DESCRIPTOR_VERSION = 2  # 2: the pool holds two more frames, for proofs
TOKEN_BYTES = 16
UCRED = struct.Struct("3i")  # pid, uid, gid
BACKLOG = 128
GIVEN = b"\1"


@dataclass(frozen=True, slots=True)
class PoolAddress:
    """Where a pool can be had, and how large it says it is. Sent to peers as JSON."""

    socket: str  # abstract name, without the leading NUL
    token: str  # hex
    pages: int
    page_bytes: int
    version: int = DESCRIPTOR_VERSION
    on_device: bool = False

    @property
    def size(self) -> int:
        """Of what the file descriptor maps."""
        return memory_bytes(self.pages, 0 if self.on_device else self.page_bytes)

    def encode(self) -> bytes:
        """A pool in the host's memory is described as it was before there were others."""
        fields = asdict(self)
        if not self.on_device:
            del fields["on_device"]
        return json.dumps(fields).encode()

    @classmethod
    def decode(cls, descriptor: bytes) -> PoolAddress:
        """Raises HandoffError for anything that `encode` has not written."""
        try:
            address = cls(**json.loads(descriptor))
        except (ValueError, TypeError) as error:
            raise HandoffError(f"not a descriptor of a shared pool: {error}") from error
        kinds = {"socket": str, "token": str, "pages": int, "page_bytes": int, "version": int, "on_device": bool}
        wrong = [name for name, kind in kinds.items() if type(getattr(address, name)) is not kind]
        if wrong or address.version != DESCRIPTOR_VERSION or not (address.pages > 0 < address.page_bytes):
            raise HandoffError(f"a descriptor of another version, or broken: {', '.join(wrong) or address.version}")
        return address


class Lent(NamedTuple):
    """What a peer has handed over. The descriptor is ours to close."""

    fd: int
    handle: bytes  # of the block, where the pool is on a device


class PoolSocket:
    """Hands out one pool's file descriptor until it is closed."""

    def __init__(self, frames: Frames, *, name: str, token: bytes, patience_s: float = 1.0) -> None:
        assert frames.fd is not None, "anonymous frames cannot be handed over"
        self._fd = frames.fd
        self._handle = frames.block.handle if frames.block is not None else b""
        self._token = token
        self._patience_s = patience_s
        self.address = PoolAddress(
            name, token.hex(), frames.pages, frames.layout.page_bytes, on_device=frames.block is not None
        )
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        self._socket.bind(f"\0{name}")
        self._socket.listen(BACKLOG)
        self._task = asyncio.get_running_loop().create_task(self._accept())

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(self._socket)
            with connection:
                try:
                    async with asyncio.timeout(self._patience_s):
                        await self._hand_over(connection)
                except (OSError, TimeoutError) as error:
                    log.warning("a peer left before it had our pool: %s", error)

    async def _hand_over(self, connection: socket.socket) -> None:
        if _uid_of(connection) != os.getuid():
            log.warning("refused our pool to uid %d", _uid_of(connection))
            return
        loop = asyncio.get_running_loop()
        shown = b""
        while len(shown) < TOKEN_BYTES:
            more = await loop.sock_recv(connection, TOKEN_BYTES - len(shown))
            if not more:
                return
            shown += more
        if hmac.compare_digest(shown, self._token):
            socket.send_fds(connection, [GIVEN, self._handle], [self._fd])
        else:
            log.warning("refused our pool: wrong token")

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        self._socket.close()


async def ask_for_pool(address: PoolAddress, patience_s: float) -> Lent:
    """A peer's pool, its descriptor checked: same uid, sealed, of the size it says. Raises PeerLost."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.setblocking(False)
    loop = asyncio.get_running_loop()
    with connection:
        try:
            async with asyncio.timeout(patience_s):
                await loop.sock_connect(connection, f"\0{address.socket}")
                if _uid_of(connection) != os.getuid():
                    raise PeerLost("the pool's socket belongs to another user")
                await loop.sock_sendall(connection, bytes.fromhex(address.token))
                await _readable(connection)
            said, fds, _, _ = socket.recv_fds(connection, len(GIVEN) + MAX_HANDLE_BYTES, 1)
        except (OSError, TimeoutError, ValueError) as error:
            raise PeerLost(f"the peer's pool cannot be reached: {error!r}") from error
    if not fds:
        raise PeerLost("the peer did not hand its pool over")
    os.set_inheritable(fds[0], False)
    _check_pool(fds[0], address)
    return Lent(fds[0], said[len(GIVEN) :])


async def _readable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def come() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(connection, come)
    try:
        await ready
    finally:
        loop.remove_reader(connection)


def _uid_of(connection: socket.socket) -> int:
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size)
    uid: int = UCRED.unpack(raw)[1]
    return uid


def _check_pool(fd: int, address: PoolAddress) -> None:
    """A pool that could shrink would kill its reader by SIGBUS."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        size = os.fstat(fd).st_size
    except OSError as error:
        os.close(fd)
        raise HandoffError(f"the peer's pool is no memfd: {error}") from error
    if seals & SEALS != SEALS or size != address.size:
        os.close(fd)
        raise HandoffError(f"the peer's pool is not what it says: {size} bytes, seals {seals:#x}")
