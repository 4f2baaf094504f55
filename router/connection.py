"""Who is at the other end of one HTTP exchange: reads the body within bounds, writes the reply, and cancels the work
when the client leaves or stops reading."""

from __future__ import annotations

import asyncio
from types import TracebackType

from starlette.types import Message, Receive, Scope, Send

from core.clock import Clock
from core.errors import BatonError, BodyTooLarge, BodyTooSlow, Cancelled, UnsupportedEncoding
from router.http_errors import error_body, error_headers
from router.limits import Limits

JSON = (b"content-type", b"application/json")
EVENTS = (b"content-type", b"text/event-stream; charset=utf-8")
NO_CACHE = (b"cache-control", b"no-cache")
NO_PROXY_BUFFER = (b"x-accel-buffering", b"no")
ABORT = "baton.abort"  # the server's extension of the scope: cuts the connection without flushing it
NOT_READING = "the client does not read"
DRAIN_BODIES = 8  # how many times the limit is read and dropped, so that a client sees the 413 before a reset


class Connection:
    """One exchange. `async with` watches the client: when it leaves, the block is cancelled and raises Cancelled."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, limits: Limits, clock: Clock) -> None:
        self._headers: dict[bytes, bytes] = dict(scope["headers"])
        self._abort = (scope.get("extensions") or {}).get(ABORT, {}).get("call")
        self._receive = receive
        self._send = send
        self._limits = limits
        self._clock = clock
        self._extra: list[tuple[bytes, bytes]] = []
        self._left: str | None = None
        self._started = self._streaming = self._ended = self._unread = False
        self._writing_since: float | None = None
        self._owner: asyncio.Task[object] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def header(self, name: bytes) -> bytes | None:
        return self._headers.get(name)

    def add_header(self, name: bytes, value: bytes) -> None:
        """Sent with whatever reply comes."""
        self._extra.append((name, value))

    async def body(self) -> bytes:
        """Raises BodyTooLarge without reading it all, BodyTooSlow, UnsupportedEncoding, Cancelled."""
        if self._headers.get(b"content-encoding", b"identity") != b"identity":
            raise UnsupportedEncoding("Content-Encoding: compressed bodies are not accepted")
        declared = self._headers.get(b"content-length", b"0")
        self._unread = True
        if declared.isdigit() and int(declared[:19]) > self._limits.max_body_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout(self._limits.body_timeout_s):
                body = await self._read()
        except TimeoutError:
            raise BodyTooSlow(f"the body did not arrive within {self._limits.body_timeout_s:g} s") from None
        self._unread = False
        return body

    async def _read(self) -> bytes:
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await self._receive()
            self._check_present(message)
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > self._limits.max_body_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return b"".join(chunks)

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"the body is larger than {self._limits.max_body_bytes} bytes")

    def _check_present(self, message: Message) -> None:
        if message["type"] == "http.disconnect":
            self._left = "the client disconnected"
            raise Cancelled(self._left)

    async def __aenter__(self) -> Connection:
        loop = asyncio.get_running_loop()
        self._owner = asyncio.current_task()
        self._watcher = loop.create_task(self._watch())
        self._timer = loop.call_later(self._limits.send_timeout_s, self._check_reading, loop)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._watcher is not None and self._timer is not None and self._owner is not None
        self._watcher.cancel()
        self._timer.cancel()
        if self._left is not None and isinstance(error, asyncio.CancelledError) and self._owner.uncancel() == 0:
            raise Cancelled(self._left) from None

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._leave("the client disconnected")

    def _check_reading(self, loop: asyncio.AbstractEventLoop) -> None:
        """One timer per exchange instead of one per write: a write is a hundred times as frequent."""
        timeout_s = self._limits.send_timeout_s
        since = self._writing_since
        waited_s = 0.0 if since is None else self._clock() - since
        if waited_s >= timeout_s:
            self._leave(NOT_READING)
            self._cut()
        else:
            self._timer = loop.call_later(timeout_s - waited_s, self._check_reading, loop)

    def _cut(self) -> None:
        """Without it a server would keep what is buffered until the client reads it, or for ever."""
        if self._abort is not None:
            self._abort()

    def _leave(self, why: str) -> None:
        """Once the reply has ended, a disconnect is only the end of the connection."""
        if self._left is None and self._owner is not None and not self._ended:
            self._left = why
            self._owner.cancel()

    async def write(self, text: str) -> None:
        """Some events of the stream. The headers go with the first, so an error before it still has its status."""
        if not self._started:
            await self._start(200, [EVENTS, NO_CACHE, NO_PROXY_BUFFER])
            self._streaming = True
        self._writing_since = self._clock()
        await self._send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        self._writing_since = None

    async def end(self) -> None:
        await self._flush()
        self._ended = True
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _flush(self) -> None:
        """Waits until the client has read most of what was written. Raises Cancelled when it does not."""
        try:
            async with asyncio.timeout(self._limits.send_timeout_s):
                await self._send({"type": "http.response.body", "body": b"", "more_body": True})
        except TimeoutError:
            self._left = NOT_READING
            self._cut()
            raise Cancelled(self._left) from None

    async def reply(self, status: int, body: str, headers: list[tuple[bytes, bytes]] | None = None) -> None:
        """A whole JSON reply."""
        payload = body.encode()
        length = (b"content-length", str(len(payload)).encode())
        await self._start(status, [JSON, length, *(headers or [])])
        await self._send({"type": "http.response.body", "body": payload, "more_body": True})
        if self._unread:
            await self._drain()
        await self.end()

    async def fail(self, error: BatonError) -> None:
        """The error as a reply, or as the last event of a stream that has begun: never a silent end."""
        if self._left is not None or self._ended:
            return
        try:
            if self._streaming:
                await self._flush()
                await self.write(f"data: {error_body(error)}\n\n")
                await self.end()
            elif not self._started:
                await self.reply(error.http_status, error_body(error), error_headers(error))
        except Cancelled:
            pass  # it has left meanwhile

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self._started = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers + self._extra})

    async def _drain(self) -> None:
        """Reads on for a moment and drops it: closing at once would reset the connection before the reply is read."""
        dropped = 0
        try:
            async with asyncio.timeout(self._limits.body_timeout_s / 10):
                while dropped < DRAIN_BODIES * self._limits.max_body_bytes:
                    message = await self._receive()
                    dropped += len(message.get("body", b""))
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        return
        except TimeoutError:
            pass  # the reply is out; a client that still sends gets the reset
